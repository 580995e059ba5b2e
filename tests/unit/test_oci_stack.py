"""The order and grouping of layers: what cells have in common comes first, and no image has too many."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder.engines.oci.stack import ALONE_BYTES, BUDGET, CAP, OWN_LAYERS, Group, stack
from builder.errors import MatrixError
from builder.lock import Wheel
from builder.project import Project

LARGE, SMALL = 100 << 20, 1 << 20
PROJECT = Project(Path(__file__).parents[2] / "matrix.yaml")


def wheel(name: str, size: int = LARGE, version: str = "1.0") -> Wheel:
    return Wheel(
        name=canonicalize_name(name),
        version=Version(version),
        filename=f"{name.replace('-', '_')}-{version}-py3-none-any.whl",
        sha256=hashlib.sha256(f"{name} {version} {size}".encode()).hexdigest(),
        size=size,
        upload_time=None,
        index="default",
    )


def names(groups: Iterable[Group]) -> list[list[str]]:
    return [[str(it.name) for it in group.wheels] for group in groups]


# --------------------------------------------------------------------------- order


def test_what_changes_last_comes_first() -> None:
    wheels = [
        wheel(name)
        for name in (
            "torch", "numpy", "triton", "nvidia-nccl-cu12", "nvidia-cublas-cu12", "nvidia-cudnn-cu12",
            "nvidia-nvshmem-cu12", "nvidia-cusparselt-cu12", "cuda-bindings", "nvidia-cusparse-cu12", "aiohttp",
        )
    ]  # fmt: skip
    assert names(stack(wheels, taken=1)) == [
        ["cuda-bindings"],
        ["nvidia-cublas-cu12"],
        ["nvidia-cusparse-cu12"],
        ["nvidia-cusparselt-cu12"],
        ["nvidia-cudnn-cu12"],
        ["nvidia-nccl-cu12"],
        ["nvidia-nvshmem-cu12"],
        ["triton"],
        ["torch"],
        ["aiohttp"],
        ["numpy"],
    ]


@pytest.mark.parametrize("name", ["nvidia-cudnn-cu11", "nvidia-cudnn-cu13", "nvidia-cudnn"])
def test_a_library_has_its_place_for_every_cuda(name: str) -> None:
    order = names(stack([wheel("nvidia-nccl-cu13"), wheel(name), wheel("nvidia-cufft")], taken=0))
    assert order == [["nvidia-cufft"], [name], ["nvidia-nccl-cu13"]]


@pytest.mark.parametrize("name", ["triton", "pytorch-triton", "pytorch-triton-rocm"])
def test_triton_has_its_place_by_any_name(name: str) -> None:
    wheels = [wheel("torch"), wheel(name), wheel("nvidia-cublas"), wheel("tritonclient")]
    assert names(stack(wheels, taken=0)) == [["nvidia-cublas"], [name], ["torch"], ["tritonclient"]]


def test_small_wheels_share_a_layer_with_their_like() -> None:
    wheels = [
        wheel("nvidia-cublas-cu12"), wheel("nvidia-nvtx-cu12", SMALL), wheel("nvidia-cufile-cu12", SMALL),
        wheel("nvidia-cudnn-cu12"), wheel("nvidia-nccl-cu12", SMALL), wheel("torch", SMALL), wheel("triton", SMALL),
        wheel("numpy"), wheel("jinja2", SMALL), wheel("filelock", SMALL),
    ]  # fmt: skip
    assert names(stack(wheels, taken=1)) == [
        ["nvidia-cublas-cu12"],
        # Before those that are released apart, which change first.
        ["nvidia-cufile-cu12", "nvidia-nvtx-cu12"],
        ["nvidia-cudnn-cu12"],
        ["nvidia-nccl-cu12"],
        ["triton"],
        ["torch"],
        ["numpy"],
        ["filelock", "jinja2"],
    ]


@pytest.mark.parametrize(("size", "groups"), [(ALONE_BYTES - 1, 1), (ALONE_BYTES, 3)])
def test_a_large_wheel_has_its_own_layer(size: int, groups: int) -> None:
    assert len(stack([wheel(name, size) for name in ("a", "b", "c")], taken=0)) == groups


def test_no_wheels_need_no_layer() -> None:
    assert stack([], taken=0) == ()


def test_a_group_says_what_is_in_it() -> None:
    (group,) = stack([wheel("b", 10, "2.0+cu1"), wheel("a", 5)], taken=0)
    assert (group.title, group.size) == ("a 1.0, b 2.0+cu1", 15)


# --------------------------------------------------------------------------- budget


def many(count: int) -> list[Wheel]:
    """Return wheels of all sections, large and small, no two of one size."""
    kinds = ("nvidia-x{}-cu12", "package{}", "cuda-y{}", "another{}")
    usual = [wheel("torch"), wheel("triton"), wheel("nvidia-cudnn-cu12"), wheel("nvidia-nccl-cu12")]
    return [
        *usual,
        *(wheel(kinds[n % 4].format(n), (1 + n * 7919 % 150) * (ALONE_BYTES // 20) + n) for n in range(count - 4)),
    ]


@pytest.mark.parametrize("taken", [0, 1, 5, 20, 30, 36, 37, 60, 90])
def test_many_wheels_keep_the_budget(taken: int) -> None:
    wheels = many(150)
    groups = stack(wheels, taken=taken)
    assert sorted(it.name for group in groups for it in group.wheels) == sorted(it.name for it in wheels)
    sections = 5
    assert len(groups) == max(BUDGET - taken - OWN_LAYERS, sections)
    # Whoever lost a layer of its own is smaller than whoever kept one.
    shared = [it.size for group in groups if len(group.wheels) > 1 for it in group.wheels]
    alone = [group.size for group in groups if len(group.wheels) == 1]
    kept = sorted(alone)[2 if taken > 30 else 0 :]  # torch's and triton's sections have nobody to share with
    assert taken > 30 or max(shared) < min(kept)


def test_few_wheels_are_not_merged() -> None:
    wheels = [wheel(f"package{n}") for n in range(BUDGET - OWN_LAYERS - 1)]
    assert len(stack(wheels, taken=1)) == len(wheels)
    assert len(stack([*wheels, wheel("one-more", LARGE + 1)], taken=1)) == len(wheels)


@given(st.randoms(use_true_random=False), st.integers(0, 60), st.integers(0, 50))
def test_the_order_of_the_wheels_does_not_matter(shuffle: random.Random, count: int, taken: int) -> None:
    wheels = many(max(4, count))
    # Of one size, so that which of them loses its layer hangs on their names.
    wheels += [wheel(f"equal{n}", LARGE) for n in range(10)]
    shuffled = shuffle.sample(wheels, len(wheels))
    assert stack(shuffled, taken=taken) == stack(wheels, taken=taken)


@pytest.mark.parametrize("taken", [CAP, CAP - OWN_LAYERS, CAP - OWN_LAYERS - 1])
def test_a_base_that_leaves_no_room_is_refused(taken: int) -> None:
    with pytest.raises(MatrixError, match=f"the base image has {taken} layers") as caught:
        stack([wheel("torch"), wheel("numpy")], taken=taken)
    assert caught.value.problems[0].tries


def test_a_base_that_leaves_just_enough_room_is_taken() -> None:
    taken = CAP - OWN_LAYERS - 2
    assert names(stack([wheel("torch"), wheel("numpy"), wheel("scipy")], taken=taken)) == [
        ["torch"],
        ["numpy", "scipy"],
    ]


# --------------------------------------------------------------------------- the cells of this repository

CELLS = {cell.id: cell for cell in PROJECT.cells}


def groups_of(id_: str, *, taken: int = 1) -> tuple[Group, ...]:
    return stack(PROJECT.lock(CELLS[id_]).wheels, taken=taken)


@pytest.mark.parametrize("id_", CELLS)
@pytest.mark.parametrize("taken", [1, 10])
def test_every_cell_keeps_the_budget(id_: str, taken: int) -> None:
    groups = groups_of(id_, taken=taken)
    assert 0 < taken + len(groups) + OWN_LAYERS <= BUDGET
    wheels = PROJECT.lock(CELLS[id_]).wheels
    assert sorted(it.name for group in groups for it in group.wheels) == sorted(it.name for it in wheels)


def shared_prefix(one: Iterable[Group], other: Iterable[Group]) -> list[str]:
    """Return the hashes of the wheels in the layers that two cells have in common from the bottom up."""
    pairs = zip(one, other, strict=False)
    equal = itertools.takewhile(lambda pair: pair[0].wheels == pair[1].wheels, pairs)
    return [it.sha256 for group, _ in equal for it in group.wheels]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
            "torch2.9.1-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
        ),
        (
            "torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
            "torch2.8.0-cu128-cudnn9.16.0.29-py3.11-bookworm-runtime",
        ),
    ],
)
def test_cells_share_every_library_up_to_the_first_that_differs(one: str, other: str) -> None:
    cells = [groups_of(one), groups_of(other)]
    shared = set(shared_prefix(*cells))
    libraries = [
        [it for group in cell for it in group.wheels if it.name.startswith(("nvidia-", "cuda-"))] for cell in cells
    ]
    common = {it.sha256 for it in libraries[0]} & {it.sha256 for it in libraries[1]}
    apart = ("cusparselt", "cudnn", "nccl", "nvshmem")
    toolkit = {it.sha256 for it in libraries[0] if not any(name in it.name for name in apart)}
    assert toolkit <= common
    assert toolkit <= shared
    # Of the others, in their order: all before the first that the cells do not have in common.
    rest = [it.sha256 for name in apart for it in libraries[0] if name in it.name.split("-")]
    assert set(itertools.takewhile(lambda sha256: sha256 in common, rest)) <= shared
