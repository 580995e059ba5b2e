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

from builder.engines.oci.stack import ALONE_BYTES, BUDGET, CAP, OWN_LAYERS, Group, Section, section_of, stack
from builder.errors import MatrixError
from builder.lock import Wheel
from builder.matrix import Cell
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
            "sympy", "nvidia-cuda-nvcc", "pandas",
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
        ["numpy"],
        ["sympy"],
        # The variant's own: the compiler is no library that torch needs.
        ["aiohttp"],
        ["nvidia-cuda-nvcc"],
        ["pandas"],
    ]


@pytest.mark.parametrize("name", ["nvidia-cudnn-cu11", "nvidia-cudnn-cu13", "nvidia-cudnn"])
def test_a_library_has_its_place_for_every_cuda(name: str) -> None:
    order = names(stack([wheel("nvidia-nccl-cu13"), wheel(name), wheel("nvidia-cufft")], taken=0))
    assert order == [["nvidia-cufft"], [name], ["nvidia-nccl-cu13"]]


def test_what_a_compiler_changes_lies_above_what_torch_needs() -> None:
    libraries = [wheel("nvidia-curand-cu12"), wheel("nvidia-cuda-cccl-cu12"), wheel("torch"), wheel("numpy")]
    assert names(stack(libraries, taken=0))[-2:] == [["torch"], ["numpy"]]
    renamed = [wheel("nvidia-curand"), wheel("nvidia-cuda-cccl"), wheel("torch"), wheel("numpy")]
    assert names(stack(renamed, taken=0))[:2] == [["torch"], ["numpy"]]


@pytest.mark.parametrize("name", ["triton", "pytorch-triton", "pytorch-triton-rocm"])
def test_triton_has_its_place_by_any_name(name: str) -> None:
    wheels = [wheel("torch"), wheel(name), wheel("nvidia-cublas"), wheel("tritonclient")]
    assert names(stack(wheels, taken=0)) == [["nvidia-cublas"], [name], ["torch"], ["tritonclient"]]


def test_small_wheels_share_a_layer_with_their_like() -> None:
    wheels = [
        wheel("nvidia-cublas-cu12"), wheel("nvidia-nvtx-cu12", SMALL), wheel("nvidia-cufile-cu12", SMALL),
        wheel("nvidia-cudnn-cu12"), wheel("nvidia-nccl-cu12", SMALL), wheel("torch", SMALL), wheel("triton", SMALL),
        wheel("numpy"), wheel("jinja2", SMALL), wheel("filelock", SMALL), wheel("uvicorn", SMALL),
        wheel("fastapi", SMALL), wheel("pyarrow"),
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
        ["pyarrow"],
        ["fastapi", "uvicorn"],
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


LIBRARIES = [
    "cuda-bindings", "cuda-pathfinder", "nvidia-cublas", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc", "nvidia-cufft",
    "nvidia-cuda-runtime", "nvidia-cufile", "nvidia-curand", "nvidia-cusolver", "nvidia-cusparse", "nvidia-nvjitlink",
]  # fmt: skip


def many(count: int) -> list[Wheel]:
    """Return wheels of all sections, and many of a variant's own, large and small, no two of one size."""
    usual = [wheel("torch"), wheel("triton"), wheel("nvidia-cudnn-cu12"), wheel("nvidia-nccl-cu12"), wheel("numpy")]
    libraries = [f"{name}-cu{n}" for n in (11, 12, 13) for name in LIBRARIES]
    names = [*libraries, *(f"package{n}" for n in range(count))][: max(count - len(usual), 0)]
    return [
        *usual, *(wheel(name, (1 + n * 7919 % 150) * (ALONE_BYTES // 20) + n) for n, name in enumerate(names)),
    ]  # fmt: skip


@pytest.mark.parametrize("taken", [0, 1, 5, 20, 28, 29, 30, 60, 88])
def test_many_wheels_keep_the_budget(taken: int) -> None:
    wheels = many(150)
    groups = stack(wheels, taken=taken)
    assert sorted(it.name for group in groups for it in group.wheels) == sorted(it.name for it in wheels)
    assert len(groups) == max(BUDGET - taken - OWN_LAYERS, len(Section))
    for part in ([it for it in groups if it.section is not Section.VARIANT], groups[-1:]):
        # Whoever lost a layer of its own is smaller than whoever kept one.
        shared = [it.size for group in part if len(group.wheels) > 1 for it in group.wheels]
        alone = [group.size for group in part if len(group.wheels) == 1]
        kept = sorted(alone)[3 if taken > 20 else 0 :]  # some sections have nobody to share with
        assert taken > 20 or not kept or max(shared) < min(kept)


def test_few_wheels_are_not_merged() -> None:
    wheels = [wheel(f"package{n}") for n in range(BUDGET - OWN_LAYERS - 1)]
    assert len(stack(wheels, taken=1)) == len(wheels)
    assert len(stack([*wheels, wheel("one-more", LARGE + 1)], taken=1)) == len(wheels)


@pytest.mark.parametrize("taken", [1, 12, 30])
@pytest.mark.parametrize("libraries", [10, 41])
def test_what_a_variant_adds_changes_nothing_below_it(taken: int, libraries: int) -> None:
    wheels = many(libraries)
    assert not [it for it in wheels if section_of(it) is Section.VARIANT]
    below = stack(wheels, taken=taken)
    for count in (1, 3, 200):
        own = [wheel(f"mine{n}", LARGE - n) for n in range(count)]
        groups = stack([*wheels, *own], taken=taken)
        assert groups[: len(below)] == below
        assert {group.section for group in groups[len(below) :]} == {Section.VARIANT}
        assert len(groups) <= max(BUDGET - taken - OWN_LAYERS, len(Section))


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
    taken = CAP - OWN_LAYERS - 3
    wheels = [wheel(name) for name in ("torch", "numpy", "sympy", "scipy", "pandas")]
    assert names(stack(wheels, taken=taken)) == [["torch"], ["numpy", "sympy"], ["pandas", "scipy"]]


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


@pytest.mark.parametrize("id_", [cell.id for cell in PROJECT.cells if cell.variant_name == "runtime"])
def test_only_companions_are_above_what_torch_needs(id_: str) -> None:
    """A library that a newer torch needs has to be named in `stack`, or every variant's own packages lie below it."""
    own = {it.name for group in groups_of(id_) if group.section is Section.VARIANT for it in group.wheels}
    # The one that a compiler brings in another version.
    own -= {"nvidia-cuda-cccl"} if CELLS[id_].cuda == "13.2" else set()
    assert not [name for name in own if name.startswith(("nvidia-", "cuda-"))]
    assert bool(own) is bool(CELLS[id_].companions)


def variants() -> list[tuple[str, str]]:
    """Return the cells that are a runtime cell with more in it, each with that one."""
    runtime = {of(cell): cell.id for cell in PROJECT.cells if cell.variant_name == "runtime" and not cell.companions}
    return [(runtime[of(cell)], cell.id) for cell in PROJECT.cells if runtime.get(of(cell), cell.id) != cell.id]


def of(cell: Cell) -> tuple[object, ...]:
    return cell.torch, cell.cuda, cell.cudnn, cell.base_name, cell.platform


@pytest.mark.parametrize(("runtime", "variant"), variants())
def test_a_variant_shares_all_that_torch_needs(runtime: str, variant: str) -> None:
    """The same layers up to the first wheel of which a package of the variant's wants another version."""
    above = {it.sha256 for it in PROJECT.lock(CELLS[variant]).wheels}
    groups = [group for group in groups_of(runtime) if group.section is not Section.VARIANT]
    shared = itertools.takewhile(lambda group: above.issuperset(it.sha256 for it in group.wheels), groups)
    prefix = shared_prefix(groups, groups_of(variant))
    assert prefix == [it.sha256 for group in shared for it in group.wheels]
    assert next(it.sha256 for it in PROJECT.lock(CELLS[runtime]).wheels if it.name == "torch") in prefix
