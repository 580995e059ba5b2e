"""Libraries that are released for one torch each: whether torchvision and torchaudio are of this one: T1."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Tuple

from validate.check import Probe, check
from validate.verdict import Blame, Skip

_MODES: Mapping[str, str] = {"torchvision": "F13", "torchaudio": "F14"}


@dataclass(frozen=True)
class Companion:
    """One such library, and what it did."""

    name: str
    version: str
    cuda: Optional[str]
    """What its compiled part was built for, "12.8"; None for a CPU build."""
    right: bool
    """Whether its compiled part computed what is known."""


def cuda_of(number: Optional[int]) -> Optional[str]:
    """Return CUDA's number as a version: 12080 is "12.8"; -1 and None stand for a CPU build."""
    return None if number is None or number <= 0 else f"{number // 1000}.{number % 1000 // 10}"


def judge_companion(probe: Probe, one: Companion, cuda: Optional[str]) -> None:
    """Hold a companion to torch's CUDA: another major version cannot work, another minor one does as a rule."""
    mode = _MODES[one.name]
    remedy = f"install the {one.name} of this torch, from the index that torch came from"
    if not one.right:
        probe.fail(f"{one.name} computes wrongly", why="by its compiled part, on the CPU", remedy=remedy, mode=mode)
    if one.cuda == cuda:
        return
    built = f"{one.name} {one.version} was built for {_spell(one.cuda)}, torch for {_spell(cuda)}"
    if one.cuda is None or cuda is None or one.cuda.partition(".")[0] != cuda.partition(".")[0]:
        probe.fail(built, why="both must be for one major version of CUDA, or for the CPU", remedy=remedy, mode=mode)
    else:
        probe.warn(
            built,
            why="of one major version of CUDA the later one runs what was built with the earlier",
            remedy=remedy,
            mode=mode,
            blame=Blame.IMAGE,
        )


def _spell(cuda: Optional[str]) -> str:
    return "the CPU" if cuda is None else f"CUDA {cuda}"


def _torchvision() -> Tuple[Optional[int], bool]:
    import torch

    vision = importlib.import_module("torchvision")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    # The second overlaps the first by 0.81, and has the lower score.
    kept = vision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    return vision.extension._check_cuda_version(), kept.tolist() == [0, 2]  # noqa: SLF001


def _torchaudio() -> Tuple[Optional[int], bool]:
    import torch

    functional = importlib.import_module("torchaudio.functional")
    extension = importlib.import_module("torchaudio._extension")
    impulse = torch.zeros(4)
    impulse[0] = 1.0
    # y[n] = x[n] + y[n - 1] / 2: powers of two, exactly.
    out = functional.lfilter(impulse, torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.0]), clamp=False)
    return extension._check_cuda_version(), out.tolist() == [1.0, 0.5, 0.25, 0.125]  # noqa: SLF001


_LOOKS: Mapping[str, Callable[[], Tuple[Optional[int], bool]]] = {
    "torchvision": _torchvision,
    "torchaudio": _torchaudio,
}


@check(
    "run.companions",
    title="torchvision and torchaudio were built for this torch's CUDA, and compute",
    tier=1,
    needs=("run.import",),
    modes=("F13", "F14"),
)
def companions(probe: Probe) -> None:
    """Ask the compiled parts of what is installed for their CUDA, and let each compute something that is known."""
    declared = (probe.request.declared or {}).get("companions") or []
    names = [name for name in _LOOKS if importlib.util.find_spec(name) is not None]
    for name in sorted(set(declared) - set(names)):
        probe.fail(f"{name} is not installed", why="the image declares it", remedy=f"pip install {name}")
    if not names:
        if not declared:
            probe.skip(Skip.NOT_THIS_KIND, "neither torchvision nor torchaudio is declared or installed")
        return
    import torch

    seen = []
    for name in names:
        number, right = _LOOKS[name]()
        seen.append(Companion(name, str(importlib.import_module(name).__version__), cuda_of(number), right))
        judge_companion(probe, seen[-1], torch.version.cuda)
    probe.saw(companions={one.name: {"version": one.version, "cuda": one.cuda} for one in seen})
    probe.detail(", ".join(f"{one.name} {one.version} for {_spell(one.cuda)}" for one in seen))
