"""The order and grouping of a cell's wheels as layers: what is shared longest comes first, small ones share a layer.

Registries share layers wherever they stand; a machine that unpacks them shares only what two images have in common from
the bottom up. So cells that differ in torch alone should differ in the last layers alone, and variants of one torch
only above all that torch itself needs.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from builder.errors import MatrixError
from builder.lock import Wheel

BUDGET = 40
"""Layers an image has at most, its base's included: container engines allow about 125, and each costs a request."""
CAP = 100
"""Layers no image may have: with this many some engines build images that they cannot run."""
ALONE_BYTES = 8 << 20
"""A wheel of this many bytes has a layer of its own."""
OWN_LAYERS = 5
"""Layers that are made of no wheel alone: bytecode of torch, of what every variant has and of the variant's own
packages, the variant's system packages, the cell's own files. Counted whether a cell has them or not: variants of one
torch would else differ in how its wheels are grouped."""

COMMON = (
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "numpy", "pip", "setuptools", "sympy",
    "typing-extensions",
)  # fmt: skip
"""Packages that every variant has: what torch requires, and what that requires; NumPy and setuptools, without which
parts of torch do not work; pip, which every lock asks for. They are named here, because a lock lists all packages alike
and does not say which of them torch requires."""
_LIBRARIES = (
    "cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "nvidia-cublas", "nvidia-cuda-cccl", "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cufft", "nvidia-cufile", "nvidia-curand", "nvidia-cusolver",
    "nvidia-cusparse", "nvidia-nvjitlink", "nvidia-nvtx",
)  # fmt: skip
"""NVIDIA's packages that torch requires, released together as one CUDA toolkit. Its compiler is another matter: only a
variant asks for that."""
_COMPILED_WITH = ("nvidia-cuda-cccl", "nvidia-curand")
"""Of these, by the names they have for CUDA 13, those that a compiler changes: it comes with headers of its own version
and with a library that torch 2.15 does not require. Below all else they would make a variant with it share nothing."""
_APART = ("nvidia-cusparselt", "nvidia-cudnn", "nvidia-nccl", "nvidia-nvshmem")
"""Those that are released apart from the CUDA toolkit: they change first between cells of one CUDA version."""


class Section(enum.IntEnum):
    """Where in the stack a wheel belongs, from the bottom up."""

    TOOLKIT = 0
    APART = 1
    TRITON = 2
    TORCH = 3
    COMMON = 4
    VARIANT = 5


@dataclass(frozen=True, kw_only=True)
class Group:
    """Wheels that share a layer."""

    section: Section
    wheels: tuple[Wheel, ...]

    @property
    def size(self) -> int:
        """Bytes of the wheels."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def title(self) -> str:
        """What people read in the image's history."""
        return ", ".join(f"{wheel.name} {wheel.version}" for wheel in self.wheels)


def section_of(wheel: Wheel) -> Section:
    """Return where in the stack a wheel belongs; its name alone decides."""
    family = re.sub(r"-cu\d+$", "", wheel.name)
    if wheel.name == "torch":
        return Section.TORCH
    if wheel.name == "triton" or wheel.name.startswith("pytorch-triton"):
        return Section.TRITON
    if family in _APART:
        return Section.APART
    if family in _LIBRARIES and wheel.name not in _COMPILED_WITH:
        return Section.TOOLKIT
    return Section.COMMON if wheel.name in COMMON else Section.VARIANT


def _place(wheel: Wheel) -> tuple[int, int, str]:
    section = section_of(wheel)
    family = re.sub(r"-cu\d+$", "", wheel.name)
    return section, _APART.index(family) if section is Section.APART else 0, wheel.name


def stack(wheels: Iterable[Wheel], *, taken: int) -> tuple[Group, ...]:
    """Return the layers from the bottom up; `taken` layers of the budget belong to the base.

    Depends on the names and sizes of the wheels alone, not on their order; and the groups below the variant's own
    packages do not depend on these. Raises MatrixError if the base leaves no room.
    """
    sections: dict[Section, list[Wheel]] = {}
    for wheel in sorted(wheels, key=_place):
        sections.setdefault(section_of(wheel), []).append(wheel)
    if taken + OWN_LAYERS + len(sections) > CAP:
        raise MatrixError(
            f"the base image has {taken} layers, which leaves none for the packages",
            why=f"an image of more than {CAP} layers does not run everywhere",
            tries=("choose a base of fewer layers",),
        )
    own = {section: sections.pop(section) for section in (Section.VARIANT,) if section in sections}
    room = BUDGET - OWN_LAYERS - taken
    below = _fitting(sections, room - 1)  # one is the variant's, of which nothing else may be known here
    return (*below, *_fitting(own, room - len(below)))


def _fitting(sections: Mapping[Section, Sequence[Wheel]], room: int) -> tuple[Group, ...]:
    """Return groups for which there is room: the smallest wheels lose layers of their own, each section keeps one."""
    large = [wheel for wheels in sections.values() for wheel in wheels if wheel.size >= ALONE_BYTES]
    large.sort(key=lambda it: (it.size, it.name))
    while len(groups := _groups(sections, {wheel.sha256 for wheel in large})) > room and large:
        del large[0]
    return groups


def _groups(sections: Mapping[Section, Sequence[Wheel]], alone: set[str]) -> tuple[Group, ...]:
    groups = []
    for section, members in sections.items():
        groups += [Group(section=section, wheels=(wheel,)) for wheel in members if wheel.sha256 in alone]
        small = tuple(sorted((wheel for wheel in members if wheel.sha256 not in alone), key=lambda it: it.name))
        if small:
            groups.append(Group(section=section, wheels=small))
    return tuple(groups)
