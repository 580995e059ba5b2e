"""GPUs on which the checks of `validate/checks/device.py` must not pass."""

from tests.mutations.driver import H100, LOOK, sees
from tests.support.mutations import Mutation
from validate.verdict import Status

FAKE_TORCH = """
import sys, types, warnings
torch = types.ModuleType("torch")
torch.__version__ = "2.8.0+cu128"
torch.version = types.SimpleNamespace(cuda="12.8")
torch.cuda = types.SimpleNamespace(is_available=lambda: bool(warnings.warn(SAID)), device_count=lambda: 0)
sys.modules["torch"] = torch
"""
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."
NO_KERNEL = """
import torch
def cholesky(*_):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
torch.linalg.cholesky = cholesky
"""
STUCK_BIT = """
import torch
real = torch.Tensor.mul_
def mul_(self, other):
    real(self, other)
    if self.numel() > 1 << 20:
        self[12345] &= ~(1 << 7)
    return self
torch.Tensor.mul_ = mul_
"""
WELL = {"bus": "0000:18:00.0", "temperature": 40, "slowdown": 87, "reasons": 1, "corrected": 0, "uncorrected": 0}


def nvml(**fields: object) -> str:
    """Return a prelude in which NVML says this of the GPU."""
    return f"{sees(**H100)}driver.health = lambda _: [driver.Health(**{ ({**WELL, **fields})!r})]\n"


MUTATIONS = [
    Mutation(
        check="dev.available",
        name="a CPU build in a CUDA image",
        prelude="",
        needs="torch",
        declared={"cuda": "12.8"},
        says="built without CUDA",
    ),
    Mutation(
        check="dev.available",
        name="a CPU build where GPUs are asked for",
        prelude="",
        needs="torch",
        options={"gpus": "all"},
        says="GPUs asked for: all",
    ),
    Mutation(
        check="dev.available",
        name="torch refuses the driver",
        prelude=f"SAID = {TOO_OLD!r}\n{FAKE_TORCH}\n{sees(**H100)}",
        says="too old",
    ),
    Mutation(
        check="dev.arch", name="no kernels for linear algebra", prelude=NO_KERNEL, needs="torch", says="in linalg"
    ),
    Mutation(
        check="dev.arch",
        name="kernels are compiled from PTX",
        prelude=f"{LOOK}from validate.checks import device\ndevice.KERNELS = {NO_KERNEL!r} + device.KERNELS",
        needs="torch",
        says="the driver compiles PTX",
        status=Status.WARN,
    ),
    Mutation(
        check="dev.health", name="a row that cannot be replaced", prelude=nvml(remap_failed=True), says="replaced"
    ),
    Mutation(check="dev.health", name="a lost GPU", prelude=nvml(error="NVML answers 15"), says="NVML answers 15"),
    Mutation(check="dev.health", name="a hot GPU", prelude=nvml(reasons=0x40), says="thermal", status=Status.WARN),
    Mutation(check="dev.health", name="a busy GPU", prelude=nvml(processes=2), says="2 processes", status=Status.WARN),
    Mutation(check="dev.memory", name="a stuck bit", prelude=STUCK_BIT, needs="torch", says="does not hold"),
]
