"""Environments in which the checks of `validate/checks/cpu.py` must not pass."""

from tests.support.mutations import Mutation
from validate.verdict import Status

NO_TORCH = "import sys; sys.modules['torch'] = None"
MANY_CORES = "import os; os.sched_getaffinity = lambda _: set(range(4))"
IGNORES_MASK = """
from torch.nn import functional
attention = functional.scaled_dot_product_attention
functional.scaled_dot_product_attention = lambda *given, is_causal=False, **options: attention(*given, **options)
"""
MISSES_LAST_ROW = """
import torch
product = torch.matmul
torch.matmul = lambda left, right, out: (product(left[:-1], right, out=out[:-1]), out)[1]
"""
CONVOLVES_IN_BF16 = """
from torch.nn import functional
convolve = functional.conv2d

def in_bf16(image, kernel, offset, **options):
    return convolve(image.bfloat16(), kernel.bfloat16(), offset.bfloat16(), **options).to(image.dtype)

functional.conv2d = in_bf16
"""
LOSES_CACHE = "import torch; torch.Tensor.index_copy_ = lambda self, *_: self"
CHOOSES_AT_RANDOM = """
import torch
torch.Tensor.argmax = lambda self, *_, **__: torch.randint(0, self.shape[-1], self.shape[:-1])
"""
DOES_NOT_STEP = "import torch; torch.optim.AdamW.step = lambda self: None"
LOADS_ROUNDED = """
import torch
load = torch.load

def rounded(*given, **options):
    found = load(*given, **options)
    found["weights"] = [weight.bfloat16().float() for weight in found["weights"]]
    return found

torch.load = rounded
"""
FORGETS_GRADIENT = """
import torch.utils.checkpoint

def detached(run, *given, **_):
    return tuple(tensor.detach() for tensor in run(*given))

torch.utils.checkpoint.checkpoint = detached
"""
# More than the checkpoint has, less than a batch: shared memory is a file as well.
LITTLE_SHARED_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_900_000, 1_900_000))"
NO_COMPILERS = """
import os
os.environ["PATH"] = "/nonexistent"
os.environ.pop("CC", None)
os.environ.pop("CXX", None)
"""
CUDA_BUILD_WITH_TRITON = """
import os, sys, types
torch = types.ModuleType("torch")
torch.version = types.SimpleNamespace(cuda="13.2")
sys.modules["torch"] = torch
programs = os.path.join(os.getcwd(), "site", "triton", "backends", "nvidia", "bin")
os.makedirs(programs)
open(os.path.join(programs, "ptxas"), "w").close()
open(os.path.join(os.getcwd(), "site", "triton", "__init__.py"), "w").close()
sys.path.insert(0, os.path.join(os.getcwd(), "site"))
sys.modules.pop("triton", None)
"""

MUTATIONS = [
    *(
        Mutation(check=name, name="no torch", prelude=NO_TORCH, says="import of torch halted")
        for name in ("cpu.numerics", "cpu.transformer", "cpu.train", "cpu.compile")
    ),
    Mutation(
        check="cpu.numerics",
        name="one thread on many cores",
        prelude=f"{MANY_CORES}\nimport torch; torch.set_num_threads(1)",
        says="torch computes with one thread on",
        needs="torch",
    ),
    Mutation(
        check="cpu.numerics",
        name="the image asks for one thread",
        prelude=f"{MANY_CORES}\nos.environ['OMP_NUM_THREADS'] = '1'",
        says="OMP_NUM_THREADS=1",
        status=Status.WARN,
        needs="torch",
    ),
    Mutation(
        check="cpu.numerics",
        name="vector instructions are switched off",
        prelude="import os; os.environ['ATEN_CPU_CAPABILITY'] = 'default'",
        says="without the processor's vector instructions",
        status=Status.WARN,
        needs="torch",
    ),
    Mutation(
        check="cpu.numerics",
        name="attention ignores its mask",
        prelude=IGNORES_MASK,
        says="attention in fp32 on the CPU is wrong",
        needs="torch",
    ),
    Mutation(
        check="cpu.numerics",
        name="a row of a product is not written",
        prelude=MISSES_LAST_ROW,
        says="matmul in fp32 on the CPU is wrong",
        needs="torch",
    ),
    Mutation(
        check="cpu.numerics",
        name="fp32 is computed in bf16",
        prelude=CONVOLVES_IN_BF16,
        says="conv2d in fp32 on the CPU is wrong",
        needs="torch",
    ),
    Mutation(
        check="cpu.transformer",
        name="attention ignores its mask",
        prelude=IGNORES_MASK,
        says="attention looks into the future",
        needs="torch",
    ),
    Mutation(
        check="cpu.transformer",
        name="the cache is not written",
        prelude=LOSES_CACHE,
        says="decoding with a cache in fp64 is wrong",
        needs="torch",
    ),
    Mutation(
        check="cpu.transformer",
        name="tokens are chosen at random",
        prelude=CHOOSES_AT_RANDOM,
        says="greedy decoding gives something else the second time",
        needs="torch",
    ),
    Mutation(
        check="cpu.train",
        name="the optimizer does nothing",
        prelude=DOES_NOT_STEP,
        says="training does not learn",
        needs="torch",
    ),
    Mutation(
        check="cpu.train",
        name="weights are rounded on their way",
        prelude=LOADS_ROUNDED,
        says="other weights than torch.save wrote",
        needs="torch",
    ),
    Mutation(
        check="cpu.train",
        name="checkpointed layers have no gradient",
        prelude=FORGETS_GRADIENT,
        says="the gradient under activation checkpointing is wrong",
        needs="torch",
    ),
    Mutation(
        check="cpu.train",
        name="little shared memory",
        prelude=LITTLE_SHARED_MEMORY,
        says="shared memory is too small",
        needs="torch",
    ),
    Mutation(
        check="cpu.compile",
        name="nobody promised that it compiles",
        prelude="",
        says="compile=false",
        status=Status.SKIP,
        options={"compile": False},
    ),
    Mutation(
        check="cpu.compile",
        name="a CUDA build without compilers",
        prelude=CUDA_BUILD_WITH_TRITON + NO_COMPILERS,
        says="Triton has no C compiler",
    ),
    Mutation(
        check="cpu.compile",
        name="ptxas lost its mode",
        prelude=CUDA_BUILD_WITH_TRITON + NO_COMPILERS,
        says="bin/ptxas",
    ),
    Mutation(
        check="cpu.compile",
        name="a CPU build without compilers",
        prelude=NO_COMPILERS,
        says="torch.compile has no C++ compiler",
        needs="torch",
    ),
    Mutation(
        check="cpu.compile",
        name="a compiler that fails",
        prelude="import os; os.environ['CXX'] = '/bin/false'",
        says="/bin/false",
        needs="torch",
    ),
    Mutation(
        check="cpu.compile",
        name="compiling is switched off",
        prelude="import os; os.environ['TORCHDYNAMO_DISABLE'] = '1'",
        says="torch.compile compiled nothing",
        needs="torch",
    ),
]
