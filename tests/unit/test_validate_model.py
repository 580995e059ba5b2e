from dataclasses import replace

import pytest

from validate.model import NARROW, PRESETS, TINY, WIDE, WIDE_SMALL, Geometry, wide_for

GB = 10**9
SMALL = Geometry(hidden=8, heads=2, kv_heads=1, ffn=16, vocab=32, layers=3)


def test_the_weights_of_a_layer_are_counted() -> None:
    qkv, output, gate_up, down = 8 * (8 + 4 + 4), 8 * 8, 2 * 16 * 8, 8 * 16
    assert (SMALL.head_dim, SMALL.kv) == (4, 4)
    assert SMALL.layer_parameters == qkv + output + gate_up + down
    assert SMALL.norm_parameters == 7 * 8
    assert SMALL.parameters == 3 * SMALL.layer_parameters + 2 * 32 * 8 + 7 * 8


def test_a_token_moves_all_weights_but_the_embedding_of_which_it_moves_one_row() -> None:
    without_cache = 2 * (SMALL.parameters - 32 * 8 + 8)
    written = 4 * 3 * 4
    assert SMALL.bytes_per_token(0) == without_cache + written
    # Keys and values, two bytes each, of three layers and four columns, for each position.
    assert SMALL.bytes_per_token(10) - SMALL.bytes_per_token(0) == 10 * 2 * 2 * 3 * 4
    assert SMALL.bytes_per_token(0) - SMALL.bytes_per_token(0, folded=True) == 2 * 7 * 8
    assert SMALL.bytes_per_token(10, element_bytes=4) == 2 * SMALL.bytes_per_token(10)


def test_a_prompt_costs_two_operations_a_weight_and_token_and_attention_by_its_square() -> None:
    one, two = SMALL.prefill_flops(1), SMALL.prefill_flops(2)
    assert one == 2 * 3 * SMALL.layer_parameters + 2 * 32 * 8 + 2 * 3 * 8
    assert two - one == 2 * 3 * SMALL.layer_parameters + 2 * 3 * 8 * (4 - 1)


def test_the_presets_are_as_large_as_they_should_be() -> None:
    assert 2 * WIDE.layer_parameters == pytest.approx(1.71 * GB, rel=0.01)
    assert WIDE.bytes_per_token(512) == pytest.approx(14.2 * GB, rel=0.01)
    assert NARROW.bytes_per_token(512) == pytest.approx(2.1 * GB, rel=0.01)
    # At a context of 512 the cache hardly counts: the weights are what is measured.
    cache = WIDE.bytes_per_token(512) - WIDE.bytes_per_token(0)
    assert cache < 0.005 * WIDE.bytes_per_token(512)
    assert {len(PRESETS), len(set(PRESETS.values()))} == {4}


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (141 * GB, WIDE),
        (80 * GB, replace(WIDE, layers=5)),
        (24 * GB, replace(WIDE, layers=1)),
        (16 * GB, replace(WIDE, layers=1)),
        (11 * GB, replace(WIDE_SMALL, layers=3)),
        (1 * GB, replace(WIDE_SMALL, layers=1)),
    ],
)
def test_the_wide_geometry_fits_the_memory(memory: int, expected: Geometry) -> None:
    geometry = wide_for(memory)
    assert geometry == expected
    assert 2 * geometry.parameters < memory


def test_geometries_that_cannot_be_are_refused() -> None:
    with pytest.raises(AssertionError, match="rotary"):
        replace(TINY, heads=TINY.hidden)
    with pytest.raises(AssertionError, match="key/value head"):
        replace(TINY, kv_heads=3)
