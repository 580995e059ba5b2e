"""Machines on which the checks of `validate/checks/driver.py` must not pass: drivers made of ctypes that answer."""

from tests.support.mutations import Mutation
from validate.verdict import Status

LOOK = "import sys; sys.path.insert(0, sys.argv[1]); from validate import driver\n"


def sees(**fields: object) -> str:
    """Return a prelude in which the process that asks the driver tells this of it."""
    return f"{LOOK}driver.seen = driver.look = lambda *_: driver.Driver(**{fields!r})\n"


NODES = ("nvidia-uvm", "nvidia0", "nvidiactl")
LIBRARY = "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05"
H100 = {
    "nodes": NODES,
    "module": "580.95.05",
    "library": LIBRARY,
    "injected": True,
    "init": 0,
    "cuda": "13.0",
    "count": 1,
    "names": ("NVIDIA H100 80GB HBM3",),
    "capabilities": ("9.0",),
    "buses": ("0000:18:00.0",),
    "nvml": "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.95.05",
    "nvml_init": 0,
}
BUILT_FOR = """
import importlib.util, os, sys, types
def find(name, *rest, real=importlib.util.find_spec):
    if name != "torch":
        return real(name, *rest)
    folder = os.path.join(os.getcwd(), "torch")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "version.py"), "w") as file:
        file.write("cuda: 'str | None' = {cuda!r}")
    return types.SimpleNamespace(submodule_search_locations=[folder])
importlib.util.find_spec = find
"""


def built_for(cuda: str) -> str:
    """Return a prelude that plants a torch built for this CUDA."""
    return BUILT_FOR.replace("{cuda!r}", repr(cuda))


def visible(name: str, says: str, *, status: Status = Status.FAIL, **fields: object) -> Mutation:
    return Mutation(check="drv.visible", name=name, prelude=sees(**{**H100, **fields}), says=says, status=status)


MUTATIONS = [
    Mutation(
        check="drv.visible",
        name="a driver that hangs",
        prelude=f"{LOOK}driver.CODE = 'import time; time.sleep(60)'; driver.LOOK_S = 0.5",
        says="did not answer within",
    ),
    Mutation(
        check="drv.visible",
        name="a driver that crashes",
        prelude=f"{LOOK}driver.CODE = 'import os; os.abort()'",
        says="asking the driver ended with -6",
    ),
    visible(
        "no libcuda",
        "libcuda.so.1",
        library=None,
        library_error="libcuda.so.1: cannot open shared object file: No such file or directory",
    ),
    visible("a stub", "stub", library="/usr/local/cuda/lib64/stubs/libcuda.so", init=34),
    visible("an updated driver", "restart the host", module="580.65.06", init=803),
    visible("a libcuda of the image", "the driver belongs to the host", module="550.54.15", injected=False, init=803),
    visible("cuda-compat on a GeForce", "cuda-compat", library="/usr/local/cuda/compat/libcuda.so.595.45.04", init=804),
    visible("no fabric manager", "nvidia-fabricmanager", init=802),
    visible("no nvidia-uvm", "nvidia-modprobe", nodes=("nvidia0", "nvidiactl"), init=999),
    visible("forbidden devices", "may not be opened", denied=("nvidiactl: Operation not permitted",), init=999),
    visible("no device", "no GPU was given", count=0),
    visible("no NVML", "NVIDIA_DRIVER_CAPABILITIES", nvml=None, nvml_init=None, status=Status.WARN),
    Mutation(
        check="drv.floor",
        name="a driver for CUDA 12 under a torch for CUDA 13",
        prelude=sees(**{**H100, "module": "570.124.06", "cuda": "12.8"}) + built_for("13.0"),
        says="580.65.06",
    ),
    Mutation(
        check="drv.floor",
        name="a driver older than its toolkit's",
        prelude=sees(**H100) + built_for("13.2"),
        says="595.45.04",
        status=Status.WARN,
    ),
]
