"""Environments in which the checks of `validate/checks/generation.py` must not pass."""

from tests.support.mutations import Mutation
from validate.verdict import Status

NO_TORCH = "import sys; sys.modules['torch'] = None"
_ONE_THREAD = "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"
"""The stand-in's tensors are small, and threads wait long for each other where there are few cores."""
_OURS = "import sys; sys.path.insert(0, sys.argv[1])\n"
_SLOW_STEPS = (
    _OURS
    + """
import time
from validate import model, roofline
roofline.l2_bytes = lambda device: 1
whole = model.decode_block
def slow(*arguments, **named):
    time.sleep(0.02)
    return whole(*arguments, **named)
model.decode_block = slow
"""
)
_UNSTEADY = (
    _OURS
    + """
from validate import roofline
from validate.roofline import Bandwidth
rates = iter([Bandwidth(1e10, 1e10), Bandwidth(2e10, 1e10)])
roofline.measure_bandwidth = lambda device: next(rates)
"""
)
_RANDOM = """
import torch
from torch.nn import functional
whole = functional.linear
calls = [0]
def noisy(*arguments):
    calls[0] += 1
    return whole(*arguments) * (1 + 1e-4 * calls[0])
functional.linear = noisy
"""
_COPIES = (
    _OURS
    + """
from validate import generate, model
whole = generate.Engine._prepared
def of_copies(self):
    kept, self.decoder = self.decoder, self.decoder.mapped(lambda weight: weight.clone())
    call = whole(self)
    self.decoder = kept
    return call
generate.Engine._prepared = of_copies
"""
)
_READS_BEYOND = """
import torch
whole = torch.where
def careless(seen, found, other):
    return found if other == 0.0 else whole(seen, found, other)
torch.where = careless
"""
_COARSE = """
import torch
from torch.nn import functional
whole = functional.linear
def coarse(x, weight):
    return whole(x, weight.bfloat16().to(x.dtype) if x.dim() == 2 else weight)
functional.linear = coarse
"""

MUTATIONS = [
    *(
        Mutation(check=name, name="no torch", prelude=NO_TORCH, says="import of torch halted")
        for name in ("perf.generate", "gen.proof")
    ),
    Mutation(
        check="perf.generate",
        name="steps are slow",
        prelude=_ONE_THREAD + _SLOW_STEPS,
        says="of the memory's bandwidth, less than",
        needs="torch",
    ),
    Mutation(
        check="perf.generate",
        name="the memory changes its speed",
        prelude=_ONE_THREAD + _UNSTEADY,
        says="changed by 100% during the check",
        status=Status.WARN,
        needs="torch",
    ),
    Mutation(
        check="gen.proof",
        name="products are another each time",
        prelude=_ONE_THREAD + _RANDOM,
        says="the second run of two gives another generation",
        needs="torch",
    ),
    Mutation(
        check="gen.proof",
        name="steps use copies of the weights",
        prelude=_ONE_THREAD + _COPIES,
        says="they are not computed from it",
        needs="torch",
    ),
    Mutation(
        check="gen.proof",
        name="the cache is read beyond the last token",
        prelude=_ONE_THREAD + _READS_BEYOND,
        says="has an influence",
        needs="torch",
    ),
    Mutation(
        check="gen.proof",
        name="products of one token are computed in bf16",
        prelude=_ONE_THREAD + _COARSE,
        says="too far from fp64",
        needs="torch",
    ),
]
