"""How far a result may be from the truth: errors against fp64, tolerances per path, and what an error betrays.

Errors are norm-wise, ‖out - reference‖ / ‖reference‖: for products of random normal matrices they do not depend on the
size, while element-wise tolerances mean nothing where the reference is near zero. They are made for references and
inputs from a normal distribution. Functions that take tensors import nothing but torch, and that when they are called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, Mapping, Optional

from validate.check import Probe
from validate.verdict import Blame, Status

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tolerance:
    """Up to `soft` all is well; above it something is odd; above `hard` the result is wrong."""

    soft: float
    hard: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp64": Tolerance(1e-13, 1e-12),
    "fp32": Tolerance(3e-6, 2e-5),
    "tf32": Tolerance(6e-4, 1e-3),
    "fp16": Tolerance(6e-4, 1.5e-3),
    "bf16": Tolerance(5e-3, 1e-2),
}
"""By the path that computes, accumulation in fp32 for all below fp64. Expected of a matrix product against fp64 of the
inputs before they were rounded: 1e-15, 3e-7, 2.9e-4, 3.6e-4, 2.9e-3; of the rounded ones 3e-7 for TF32, 2.1e-4 for
fp16, 1.65e-3 for bf16. The same limits hold for both."""

PEAK = 10.0
"""The worst element may be off by this many times the hard tolerance, relative to the reference's root mean square:
a single wrong element of a million hardly moves the norm."""

COMPILED_TOL = 1e-4
"""`tol` of torch's own comparison of compiled code."""


@dataclass(frozen=True)
class Error:
    """Distance of a result from its reference; infinite if it holds NaN or has another shape."""

    norm: float
    """‖out - reference‖ / ‖reference‖ over all elements."""
    peak: float
    """Largest |out - reference| of any element, over the root mean square of the reference."""


# ----------------------------------------------------------------------------------------------------
# Judging, from numbers alone


def verdict(error: Error, tolerance: Tolerance) -> Status:
    """Return PASS, WARN or FAIL; NaN never passes."""
    if not (error.norm <= tolerance.hard and error.peak <= PEAK * tolerance.hard):
        return Status.FAIL
    return Status.PASS if error.norm <= tolerance.soft else Status.WARN


def judge(
    probe: Probe,
    what: str,
    error: Error,
    tolerance: Tolerance,
    *,
    remedy: str = "",
    mode: str = "",
    blame: Blame = Blame.UNKNOWN,
) -> Status:
    """Tell the probe if `what` ("matmul in bf16") is further off than the tolerance; return the verdict."""
    status = verdict(error, tolerance)
    why = (
        f"relative error {error.norm:.2g}, worst element {error.peak:.2g}; "
        f"expected at most {tolerance.soft:.2g}, wrong above {tolerance.hard:.2g}"
    )
    if status is Status.FAIL:
        probe.fail(f"{what} is wrong", why=why, remedy=remedy, mode=mode, blame=blame)
    elif status is Status.WARN:
        probe.warn(f"{what} is less exact than expected", why=why, remedy=remedy, mode=mode, blame=blame)
    return status


def engine(error: float) -> Optional[str]:
    """Return what computed an fp32 product of random normals with this norm-wise error: "fp32", "tf32" or "bf16".

    fp16 looks like TF32: both have ten bits. None: none of them, the result is wrong.
    """
    return next((name for name in ("fp32", "tf32", "bf16") if error <= TOLERANCES[name].hard), None)


def multiplier(*, half: bool, elements: int, tol: float = COMPILED_TOL) -> float:
    """Return by how much compiled code may be further from fp64 than eager code: `same` in torch/_dynamo/utils.py."""
    return 3.0 if half or elements < 1000 or tol >= 2e-2 else 2.0


def as_good(compiled: float, eager: float, *, half: bool, elements: int, tol: float = COMPILED_TOL) -> bool:
    """Tell whether compiled code is about as near to fp64 as eager code is, by torch's own rule.

    `compiled` and `eager` are root mean square errors against fp64, see `rmse`; `half` says that the results are fp16
    or bf16; `tol` is for results of unit scale. Compiled and eager results are never compared with each other.
    """
    return compiled <= multiplier(half=half, elements=elements, tol=tol) * eager + tol / 10


# ----------------------------------------------------------------------------------------------------
# Measuring, from tensors


def error(out: torch.Tensor, reference: torch.Tensor) -> Error:
    """Return how far `out` is from `reference`, which is fp64 and stands on any device; computed where `out` is."""
    import torch

    if out.shape != reference.shape or out.numel() == 0:
        return Error(math.inf, math.inf)
    truth = reference.to(out.device, torch.float64)
    difference = out.to(torch.float64) - truth
    off, worst = float(difference.norm()), float(difference.abs().max())
    whole = float(truth.norm())
    if not (math.isfinite(off) and math.isfinite(worst) and math.isfinite(whole)):
        return Error(math.inf, math.inf)
    if whole == 0.0:
        return Error(0.0, 0.0) if worst == 0.0 else Error(math.inf, math.inf)
    return Error(off / whole, worst / (whole / math.sqrt(truth.numel())))


def rmse(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the root mean square of out - reference, computed in fp64; infinite if it is no number."""
    import torch

    value = float((out.to(torch.float64) - reference.to(out.device, torch.float64)).square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> torch.Tensor:
    """Return seeded random normals; the same on every device, for they are drawn on the CPU in fp32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's elements, bit for bit: equal digests mean equal results, -0.0 and NaN, too."""
    import ctypes
    import hashlib

    host = tensor.detach().cpu().contiguous()
    # Without NumPy, which an environment need not have.
    return hashlib.sha256(ctypes.string_at(host.data_ptr(), host.numel() * host.element_size())).hexdigest()


def dtypes() -> Dict[str, torch.dtype]:
    """Return torch's dtypes by the names of TOLERANCES; TF32 is a way to compute, not a dtype."""
    import torch

    return {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
