"""Environments in which the checks of `validate/checks/performance.py` must not pass."""

from tests.support.mutations import Mutation
from validate.verdict import Status

NO_TORCH = "import sys; sys.modules['torch'] = None"
_ONE_THREAD = "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"
"""The stand-in's tensors are small, and threads wait long for each other where there are few cores."""
_OURS = "import sys; sys.path.insert(0, sys.argv[1])\n"
_SLOW_MEMORY = (
    _OURS
    + """
from validate import roofline
roofline.sheet_bandwidth = lambda device: 1e15
"""
)
_NO_STEP = """
import torch
torch.optim.AdamW.step = lambda self, closure=None: None
"""
_BROKEN_HALF = """
import torch
from torch.nn import functional
whole = functional.cross_entropy
def wrong(found, wanted):
    return whole(found, wanted) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)
functional.cross_entropy = wrong
"""
_SLOW_COMPILED = """
import time, torch
def slow(body, **options):
    def step(*arguments, **named):
        time.sleep(0.05)
        return body(*arguments, **named)
    return step
torch.compile = slow
"""
_NO_COMPILER = """
import torch
def broken(body, **options):
    def step(*arguments, **named):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    return step
torch.compile = broken
"""
_SLOWER_NOW = """
import json
rates = {"copy": 1e15, "read": 1e15}
with open("roofline.json", "w") as file:
    json.dump({"bandwidth": rates}, file)
"""

MUTATIONS = [
    *(
        Mutation(check=name, name="no torch", prelude=NO_TORCH, says="import of torch halted")
        for name in ("perf.roofline", "perf.amp", "perf.compile")
    ),
    Mutation(
        check="perf.roofline",
        name="the memory is far below its clock",
        prelude=_ONE_THREAD + _SLOW_MEMORY,
        says="of what its clock and width promise",
        needs="torch",
    ),
    Mutation(
        check="perf.amp",
        name="the optimizer does nothing",
        prelude=_ONE_THREAD + _NO_STEP,
        says="training in fp32 does not lower the loss",
        needs="torch",
    ),
    Mutation(
        check="perf.amp",
        name="the loss is another in a smaller type",
        prelude=_ONE_THREAD + _BROKEN_HALF,
        says="training in bf16 begins with another loss than in float32",
        needs="torch",
    ),
    Mutation(
        check="perf.compile",
        name="compiled code is slow",
        prelude=_ONE_THREAD + _SLOW_COMPILED,
        says="torch.compile makes decoding slower",
        status=Status.WARN,
        needs="torch",
    ),
    Mutation(
        check="perf.compile",
        name="no C compiler",
        prelude=_ONE_THREAD + _NO_COMPILER,
        says="apt-get install gcc",
        needs="torch",
    ),
    Mutation(
        check="perf.stability",
        name="nothing was measured before",
        prelude="",
        says="perf.roofline left nothing to compare with",
        status=Status.SKIP,
    ),
    Mutation(
        check="perf.stability",
        name="the memory was faster before",
        prelude=_ONE_THREAD + _SLOWER_NOW,
        says="not as fast at the end as at the beginning",
        status=Status.WARN,
        needs="torch",
    ),
]
