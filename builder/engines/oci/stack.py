"""The order and grouping of a cell's wheels as layers: what is shared longest comes first, small ones share a layer.

Registries share layers wherever they stand; a machine that unpacks them shares only what two images have in common from
the bottom up. So cells that differ in torch alone should differ in the last layers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from builder.errors import MatrixError
from builder.lock import Wheel

BUDGET = 40
"""Layers an image has at most, its base's included: container engines allow about 125, and each costs a request."""
CAP = 100
"""Layers no image may have: with this many some engines build images that they cannot run."""
ALONE_BYTES = 8 << 20
"""A wheel of this many bytes has a layer of its own."""
OWN_LAYERS = 3
"""Layers that are made of no wheel alone: bytecode of torch, bytecode of the rest, the cell's own files."""

# NVIDIA's libraries that are released apart from the CUDA toolkit change first between cells of one CUDA version.
_APART = ("nvidia-cusparselt", "nvidia-cudnn", "nvidia-nccl", "nvidia-nvshmem")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Wheels that share a layer."""

    wheels: tuple[Wheel, ...]

    @property
    def size(self) -> int:
        """Bytes of the wheels."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def title(self) -> str:
        """What people read in the image's history."""
        return ", ".join(f"{wheel.name} {wheel.version}" for wheel in self.wheels)


def _section(wheel: Wheel) -> tuple[int, int]:
    """Return where in the stack a wheel belongs: section, and place in it."""
    if wheel.name == "torch":
        return 3, 0
    if wheel.name == "triton" or wheel.name.startswith("pytorch-triton"):
        return 2, 0
    if wheel.name.startswith(("nvidia-", "cuda-")):
        family = re.sub(r"-cu\d+$", "", wheel.name)
        return (1, _APART.index(family)) if family in _APART else (0, 0)
    return 4, 0


def stack(wheels: Iterable[Wheel], *, taken: int) -> tuple[Group, ...]:
    """Return the layers from the bottom up; `taken` layers of the budget belong to the base.

    Depends on the names and sizes of the wheels alone, not on their order. Raises MatrixError if the base leaves no
    room.
    """
    ordered = sorted(wheels, key=lambda wheel: (*_section(wheel), wheel.name))
    sections = sorted({_section(wheel)[0] for wheel in ordered})
    room = max(BUDGET - taken - OWN_LAYERS, len(sections))
    if taken + OWN_LAYERS + len(sections) > CAP:
        raise MatrixError(
            f"the base image has {taken} layers, which leaves none for the packages",
            why=f"an image of more than {CAP} layers does not run everywhere",
            tries=("choose a base of fewer layers",),
        )
    alone = {wheel.sha256 for wheel in ordered if wheel.size >= ALONE_BYTES}
    while len(groups := _groups(ordered, sections, alone)) > room and alone:
        smallest = min((wheel for wheel in ordered if wheel.sha256 in alone), key=lambda it: (it.size, it.name))
        alone.remove(smallest.sha256)
    return groups


def _groups(ordered: Sequence[Wheel], sections: Sequence[int], alone: set[str]) -> tuple[Group, ...]:
    groups = []
    for section in sections:
        members = [wheel for wheel in ordered if _section(wheel)[0] == section]
        groups += [Group(wheels=(wheel,)) for wheel in members if wheel.sha256 in alone]
        small = tuple(sorted((wheel for wheel in members if wheel.sha256 not in alone), key=lambda it: it.name))
        if small:
            groups.append(Group(wheels=small))
    return tuple(groups)
