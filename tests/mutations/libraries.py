"""Libraries with which the checks of `validate/checks/libraries.py` must not pass."""

from tests.support.mutations import Mutation

WRONG_CONVOLUTION = """
import torch
real = torch.nn.functional.conv2d
torch.nn.functional.conv2d = lambda x, w, **k: real(x.to(torch.bfloat16), w.to(torch.bfloat16), **k).to(x.dtype)
"""
OTHER_CUDNN = "import torch; torch.backends.cudnn.version = lambda: 91600"
TWO_CUDNNS = """
import sys; sys.path.insert(0, sys.argv[1])
from validate import facts
facts._loaded_libraries = lambda: {
    "libcudnn.so.9": "/opt/venv/lib/libcudnn.so.9",
    "libcudnn_engines_tensor_ir.so.9": "/usr/lib/libcudnn_engines_tensor_ir.so.9",
}
"""
NO_SPARSE = """
import torch
def mm(*_):
    raise RuntimeError("libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12")
torch.sparse.mm = mm
"""
WRONG_SOLVER = (
    "import torch; real = torch.linalg.solve; torch.linalg.solve = lambda a, b: real(a.float(), b.float()).double()"
)
WRONG_FFT = "import torch; real = torch.fft.rfft2; torch.fft.rfft2 = lambda x: real(x.bfloat16().to(x.dtype))"
SAME_DRAWS = "import torch; real = torch.randn; torch.randn = lambda *s, **k: real(*s, **k).abs()"
LOST_ELEMENTS = """
from torch import distributed
real = distributed.all_gather
def all_gather(out, sent):
    real(out, sent)
    out[0][-7:] = float("nan")
distributed.all_gather = all_gather
"""
OTHER_NCCL = """
import sys; sys.path.insert(0, sys.argv[1])
from validate import facts
facts._nccl = lambda: "2.27.3"
"""
JIT = "from torch.cuda import jiterator\n"

MUTATIONS = [
    Mutation(
        check="lib.cudnn", name="convolutions in bf16", prelude=WRONG_CONVOLUTION, needs="torch", says="fp32 with cuDNN"
    ),
    Mutation(
        check="lib.cudnn",
        name="another cuDNN",
        prelude=OTHER_CUDNN,
        needs="torch",
        declared={"expect": {"cudnn_number": 91002}},
        says="loaded: 9.16.0, declared: 9.10.2",
    ),
    Mutation(
        check="lib.cudnn",
        name="no cuDNN",
        prelude="",
        needs="torch",
        declared={"expect": {"cudnn_number": 91002}},
        says="torch finds no cuDNN",
    ),
    Mutation(check="lib.cudnn", name="two cuDNNs", prelude=TWO_CUDNNS, needs="torch", says="parts of different cuDNNs"),
    Mutation(
        check="lib.math",
        name="cuSPARSE without its linker",
        prelude=NO_SPARSE,
        needs="torch",
        says="cuSPARSE does not work",
    ),
    Mutation(check="lib.math", name="solving in fp32", prelude=WRONG_SOLVER, needs="torch", says="solve (LU) is wrong"),
    Mutation(check="lib.math", name="an inexact FFT", prelude=WRONG_FFT, needs="torch", says="rfft2 in fp32 is wrong"),
    Mutation(
        check="lib.math",
        name="normals that are none",
        prelude=SAME_DRAWS,
        needs="torch",
        says="moments of normals is wrong",
    ),
    Mutation(check="lib.nccl", name="elements lost", prelude=LOST_ELEMENTS, needs="torch", says="7 of 100001 elements"),
    Mutation(
        check="lib.nccl",
        name="another NCCL",
        prelude=OTHER_NCCL,
        needs="torch",
        declared={"expect": {"nccl": "2.30.7"}},
        says="loaded: 2.27.3, declared: 2.30.7",
    ),
    Mutation(
        check="lib.nvrtc",
        name="no builtins",
        prelude=f"{JIT}def make(*_, **k):\n"
        "    raise RuntimeError('nvrtc: error: failed to open libnvrtc-builtins.so.13.0.')\n"
        "jiterator._create_jit_fn = make",
        needs="torch",
        says="NVRTC cannot compile",
    ),
    Mutation(
        check="lib.nvrtc",
        name="a wrong kernel",
        prelude=f"{JIT}jiterator._create_jit_fn = lambda source, **k: lambda x, y: x * x + k['factor'] * y",
        needs="torch",
        says="compiled by NVRTC is wrong",
    ),
]
