"""Layers out of recipes: the bytes their digest promises, or an error at the end and nothing damaged left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.engines.oci import recipe as recipes
from builder.engines.oci.recipe import PIECE, Recipe, available, find, keep, pieces, recall, remember
from builder.errors import HashMismatchError, SourceError, TorchyardError
from builder.layout import MEDIA_LAYER_GZIP, Descriptor, Layer
from builder.store import Store

LITERALS = random.Random(1).randbytes(5000)
WHEEL = random.Random(2).randbytes(3_500_000)
SEGMENTS = ((0, 0, 100), (1, 50, 3_000_000), (0, 100, 1), (1, 3_000_100, 77), (0, 101, 4899), (1, 0, 50))
KEY = "a" * 64


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def layer_of(content: bytes) -> Layer:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    blob = Descriptor(media_type=MEDIA_LAYER_GZIP, digest=digest, size=len(content))
    return Layer(blob=blob, diff_id=f"sha256:{'d' * 64}")


def joined(segments: tuple[tuple[int, int, int], ...] = SEGMENTS) -> bytes:
    return b"".join((LITERALS, WHEEL)[source][offset : offset + length] for source, offset, length in segments)


def kept(store: Store, segments: tuple[tuple[int, int, int], ...] = SEGMENTS) -> Recipe:
    """Put a recipe and its sources into the store."""
    sources = (store.put(LITERALS), store.put(WHEEL))
    made = Recipe(layer=layer_of(joined(segments)), sources=sources, segments=segments)
    keep(store, made)
    return made


def recipe_file(store: Store, made: Recipe) -> Path:
    return store.root / "recipes" / f"{made.layer.blob.sha256}.json"


def overwrite(store: Store, sha256: str, content: bytes | bytearray) -> None:
    path = store.path(sha256)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# --------------------------------------------------------------------------- reading


def test_a_layer_is_regenerated(store: Store) -> None:
    made = kept(store)
    assert b"".join(pieces(store, made.layer.blob)) == joined()
    assert find(store, made.layer.blob.sha256) == made
    assert not store.has(made.layer.blob.sha256)


@pytest.mark.parametrize("length", [1, 1000, PIECE - 1, PIECE, PIECE + 1, 3_400_000])
def test_pieces_are_large(store: Store, length: int) -> None:
    starts = range(0, 3_400_000, length)
    made = kept(store, tuple((1, at, min(length, 3_400_000 - at)) for at in starts) if length > 1 else SEGMENTS)
    sizes = [len(piece) for piece in pieces(store, made.layer.blob)]
    assert sum(sizes) == made.layer.blob.size
    assert all(PIECE <= size < 2 * PIECE for size in sizes[:-1])
    assert 0 < sizes[-1] < 2 * PIECE


def test_a_blob_that_is_there_needs_no_recipe(store: Store) -> None:
    content = joined()
    store.put(content)
    got = list(pieces(store, layer_of(content).blob))
    assert b"".join(got) == content
    assert {len(piece) for piece in got[:-1]} == {PIECE}


def test_a_blob_that_is_there_is_preferred(store: Store) -> None:
    made = kept(store)
    store.put(joined())
    store.path(made.sources[1]).unlink()
    assert b"".join(pieces(store, made.layer.blob)) == joined()
    assert available(store, made.layer.blob)


def test_a_reader_that_stops_leaves_no_file_open(store: Store) -> None:
    made = kept(store)
    before = open_files()
    reader = pieces(store, made.layer.blob)
    next(reader)
    assert open_files() > before
    reader.close()  # type: ignore[attr-defined]
    assert open_files() == before


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 4999), st.integers(0, 5000)).map(
            lambda it: (it[0], it[1], min(it[2], 5000 - it[1]))
        )
    )
)
def test_any_segments_are_joined(store: Store, segments: list[tuple[int, int, int]]) -> None:
    made = kept(store, tuple(segments))
    assert Recipe.loads(made.dumps()) == made
    assert b"".join(pieces(store, made.layer.blob)) == joined(tuple(segments))


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_shows_at_the_end_and_is_removed(store: Store, which: int, bit: int) -> None:
    made = kept(store)
    content = bytearray((LITERALS, WHEEL)[which])
    content[150] ^= 1 << bit
    overwrite(store, made.sources[which], content)
    with pytest.raises(HashMismatchError, match=made.layer.blob.digest) as caught:
        list(pieces(store, made.layer.blob))
    assert made.sources[which] in caught.value.problems[0].why
    assert made.sources[1 - which] not in caught.value.problems[0].why
    assert caught.value.problems[0].tries
    assert not store.has(made.sources[which])
    assert store.has(made.sources[1 - which])
    assert not recipe_file(store, made).exists()
    assert not available(store, made.layer.blob)


def test_a_size_that_is_not_the_blobs_is_noticed(store: Store) -> None:
    blob = kept(store).layer.blob
    with pytest.raises(HashMismatchError):
        list(pieces(store, replace(blob, size=blob.size + 1)))


def test_every_piece_is_given_before_the_error(store: Store) -> None:
    made = kept(store)
    content = bytearray(WHEEL)
    content[60] ^= 1
    overwrite(store, made.sources[1], content)
    size = 0
    reader = pieces(store, made.layer.blob)
    with pytest.raises(HashMismatchError):  # noqa: PT012 - when it comes is what is tested
        while True:
            size += len(next(reader))
    assert size == made.layer.blob.size


@pytest.mark.parametrize("length", [0, 60, 2_000_000, 3_000_120])
def test_a_source_that_is_cut_off_is_noticed(store: Store, length: int) -> None:
    made = kept(store)
    overwrite(store, made.sources[1], WHEEL[:length])
    with pytest.raises(HashMismatchError, match="came out with other bytes"):
        list(pieces(store, made.layer.blob))
    assert not store.has(made.sources[1])


@pytest.mark.parametrize(
    "segments", [SEGMENTS[:-1], (*SEGMENTS, (0, 0, 1)), ((0, 1, 100), *SEGMENTS[1:]), (*SEGMENTS, (1, 1 << 40, 5))]
)
def test_wrong_segments_cost_the_recipe_and_no_source(store: Store, segments: tuple[tuple[int, int, int], ...]) -> None:
    made = kept(store)
    keep(store, replace(made, segments=segments))
    with pytest.raises(HashMismatchError, match="came out") as caught:
        list(pieces(store, made.layer.blob))
    assert "its recipe" in caught.value.problems[0].why
    assert not recipe_file(store, made).exists()
    assert all(store.has(source) for source in made.sources)


@pytest.mark.parametrize("content", [b"", joined()[:-1], joined()[:-1] + b"x", joined() + b"x"])
def test_a_blob_that_is_damaged_is_removed(store: Store, content: bytes) -> None:
    blob = layer_of(joined()).blob
    overwrite(store, blob.sha256, content)
    with pytest.raises(HashMismatchError, match=blob.digest):
        list(pieces(store, blob))
    assert not store.path(blob.sha256).exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_source_is_named(store: Store, which: int) -> None:
    made = kept(store)
    store.path(made.sources[which]).unlink()
    assert not available(store, made.layer.blob)
    with pytest.raises(SourceError, match=made.sources[which]) as caught:
        next(pieces(store, made.layer.blob))
    assert caught.value.problems[0].tries
    assert recipe_file(store, made).exists(), "the source may come back"


def test_an_unknown_layer_is_named(store: Store) -> None:
    blob = layer_of(b"nobody knows").blob
    assert not available(store, blob)
    with pytest.raises(SourceError, match=blob.digest):
        next(pieces(store, blob))


# --------------------------------------------------------------------------- files that are not what they should be

Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, Change] = {
    "other schema": lambda it: it.update(schema=recipes.SCHEMA + 1),
    "no schema": lambda it: it.pop("schema"),
    "no blob": lambda it: it.pop("blob"),
    "blob of another kind": lambda it: it.update(blob=[1]),
    "digest of another kind": lambda it: it["blob"].update(digest="md5:abc"),
    "endless size": lambda it: it["blob"].update(size=float("inf")),
    "no sources": lambda it: it.pop("sources"),
    "fewer sources": lambda it: it["sources"].pop(),
    "sources that are text": lambda it: it.update(sources="ab"),
    "source that is a path": lambda it: it["sources"].__setitem__(1, "../../../../etc/passwd"),
    "source with a line end": lambda it: it["sources"].__setitem__(1, it["sources"][1] + "\n"),
    "segments that are none": lambda it: it.update(segments=5),
    "segment of two": lambda it: it["segments"].append([1, 2]),
    "segment of text": lambda it: it["segments"].append(["a", "b", "c"]),
    "segment of an unknown source": lambda it: it["segments"].append([2, 0, 1]),
    "segment of a source from the end": lambda it: it["segments"].append([-1, 0, 1]),
    "segment from before": lambda it: it["segments"].append([1, -1, 1]),
    "segment of less than nothing": lambda it: it["segments"].append([1, 0, -1]),
    "segment from far away": lambda it: it["segments"].append([1, 1 << 70, 1]),
    "endless segment": lambda it: it["segments"].append([1, 0, float("inf")]),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_none(store: Store, change: Change) -> None:
    made = kept(store)
    document = json.loads(made.dumps())
    change(document)
    recipe_file(store, made).write_text(json.dumps(document))
    assert find(store, made.layer.blob.sha256) is None
    assert not available(store, made.layer.blob)
    with pytest.raises(SourceError):
        next(pieces(store, made.layer.blob))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'"schema"', b"null", b"\xff\xfe", b'{"schema": 1}'])
def test_what_is_no_recipe_is_none(store: Store, content: bytes) -> None:
    made = kept(store)
    recipe_file(store, made).write_bytes(content)
    assert find(store, made.layer.blob.sha256) is None


def test_the_recipe_of_another_layer_is_none(store: Store) -> None:
    made, other = kept(store), kept(store, SEGMENTS[:2])
    recipe_file(store, made).write_bytes(other.dumps())
    assert find(store, made.layer.blob.sha256) is None
    assert find(store, other.layer.blob.sha256) == other


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4))
def test_whatever_happens_to_a_recipe_its_layer_is_right_or_an_error(
    store: Store, where: float, inserted: bytes, removed: int
) -> None:
    made = kept(store, ((0, 0, 100), (1, 50, 400), (0, 100, 1)))
    content = made.dumps()
    at = int(where * len(content))
    recipe_file(store, made).write_bytes(content[:at] + inserted + content[at + removed :])
    with contextlib.suppress(TorchyardError):
        assert b"".join(pieces(store, made.layer.blob)) == joined(made.segments)
    assert store.has(made.sources[0])
    assert store.has(made.sources[1])


# --------------------------------------------------------------------------- layers that are remembered


def test_a_layer_is_remembered_with_what_was_seen_in_it(store: Store) -> None:
    made = kept(store)
    assert recall(store, KEY) is None
    remember(store, KEY, made.layer, {"facts": {"torch": "2.8.0"}, "paths": {"ä": {}}})
    assert recall(store, KEY) == (made.layer, {"facts": {"torch": "2.8.0"}, "paths": {"ä": {}}})
    assert recall(store, "b" * 64) is None


def test_a_layer_is_remembered_while_its_bytes_can_be_had(store: Store) -> None:
    made = kept(store)
    remember(store, KEY, made.layer, {})
    store.path(made.sources[1]).unlink()
    assert recall(store, KEY) is None
    store.put(WHEEL)
    assert recall(store, KEY) == (made.layer, {})
    recipe_file(store, made).unlink()
    assert recall(store, KEY) is None
    store.put(joined())
    assert recall(store, KEY) == (made.layer, {})


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.update(schema=recipes.SCHEMA + 1),
        lambda it: it.pop("schema"),
        lambda it: it.pop("blob"),
        lambda it: it.pop("diff_id"),
        lambda it: it.pop("about"),
        lambda it: it.update(about=5),
        lambda it: it["blob"].update(digest="sha256:no"),
        lambda it: it["blob"].update(size=float("inf")),
    ],
)
def test_what_is_remembered_wrongly_is_forgotten(store: Store, change: Change) -> None:
    made = kept(store)
    remember(store, KEY, made.layer, {})
    path = store.root / "layers" / f"{KEY}.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
    assert recall(store, KEY) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_what_cannot_be_read_is_forgotten(store: Store, content: bytes) -> None:
    made = kept(store)
    remember(store, KEY, made.layer, {})
    (store.root / "layers" / f"{KEY}.json").write_bytes(content)
    assert recall(store, KEY) is None
