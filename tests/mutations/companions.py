"""Environments in which checks must not pass: those of `companions.py`."""

from tests.support.mutations import Mutation
from validate.verdict import Status

# A torch for CUDA 12.8, and companions that say and compute what they are told to.
PLANT = """
import os, sys
site = os.path.join(os.getcwd(), "site")
sys.path.insert(0, site)

def module(name, source):
    path = os.path.join(site, *name.split(".")) + ".py"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(source)

def torch(cuda):
    module("torch", "class version: cuda = %r\\ntensor = lambda it: it\\nzeros = lambda size: [0.0] * size" % (cuda,))

RESULT = '''
class Result:
    def __init__(self, values): self.values = values
    def tolist(self): return self.values
'''

def torchvision(number, kept):
    module("torchvision", RESULT + '''
__version__ = "0.23.0"
class ops: nms = lambda *_: Result(%r)
class extension: _check_cuda_version = lambda: %r
''' % (kept, number))

def torchaudio(number, out):
    module("torchaudio.__init__", "__version__ = '2.8.0'")
    module("torchaudio._extension", "_check_cuda_version = lambda: %r" % (number,))
    module("torchaudio.functional", RESULT + "lfilter = lambda *_, **__: Result(%r)" % (out,))

torch("12.8")
"""
KEPT = "[0, 2]"
OUT = "[1.0, 0.5, 0.25, 0.125]"

MUTATIONS = [
    Mutation(
        check="run.companions",
        name="there is none",
        prelude=PLANT,
        status=Status.SKIP,
        says="neither torchvision nor torchaudio",
    ),
    Mutation(
        check="run.companions",
        name="one is declared and not installed",
        prelude=PLANT,
        declared={"companions": ["torchvision"]},
        says="torchvision is not installed",
    ),
    Mutation(
        check="run.companions",
        name="a torchvision for the CPU beside a torch for CUDA",
        prelude=f"{PLANT}\ntorchvision(-1, {KEPT})",
        says="torchvision 0.23.0 was built for the CPU, torch for CUDA 12.8",
    ),
    Mutation(
        check="run.companions",
        name="a torchvision of another major version of CUDA",
        prelude=f"{PLANT}\ntorchvision(13000, {KEPT})",
        says="torchvision 0.23.0 was built for CUDA 13.0, torch for CUDA 12.8",
    ),
    Mutation(
        check="run.companions",
        name="a torchvision of another minor version of CUDA",
        prelude=f"{PLANT}\ntorchvision(12060, {KEPT})",
        status=Status.WARN,
        says="torchvision 0.23.0 was built for CUDA 12.6, torch for CUDA 12.8",
    ),
    Mutation(
        check="run.companions",
        name="a torchvision that keeps every box",
        prelude=f"{PLANT}\ntorchvision(12080, [0, 1, 2])",
        says="torchvision computes wrongly",
    ),
    Mutation(
        check="run.companions",
        name="a torchaudio for CUDA beside a torch for the CPU",
        prelude=f"{PLANT}\ntorch(None)\ntorchaudio(12080, {OUT})",
        says="torchaudio 2.8.0 was built for CUDA 12.8, torch for the CPU",
    ),
    Mutation(
        check="run.companions",
        name="a torchaudio whose filter does nothing",
        prelude=f"{PLANT}\ntorchaudio(12080, [1.0, 0.0, 0.0, 0.0])",
        says="torchaudio computes wrongly",
    ),
]
