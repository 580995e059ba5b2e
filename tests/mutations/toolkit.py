"""Environments in which checks must not pass: those of `toolkit.py`."""

from tests.support.mutations import Mutation
from validate.verdict import Status

DEVEL = {"toolkit": "13.2", "expect": {"packages": {"ninja": "1.13.2"}}}
RUNTIME = {"toolkit": None, "expect": {"packages": {"numpy": "2.4.6"}}}

# A toolkit without its compiler's insides: what lies where, and what nvcc says.
TOOLKIT = """
import os
home = os.path.join(os.getcwd(), "cuda")

def put(path, text="", mode=0o644):
    path = os.path.join(home, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(text)
    os.chmod(path, mode)

def nvcc(says):
    put("bin/nvcc", "#!/bin/sh\\necho '" + says + "'\\n", 0o755)

nvcc("Cuda compilation tools, release 13.2, V13.2.86")
for name in ("cudafe++", "fatbinary", "nvlink", "ptxas"):
    put("bin/" + name, mode=0o755)
put("nvvm/bin/cicc", mode=0o755)
for name in ("crt/host_config", "cublas_v2", "cuda", "cuda_runtime", "cufft", "curand_kernel", "cusolverDn", "cusparse",
             "nvml", "nvrtc", "cccl/thrust/version"):
    put("include/" + name + ".h")
for name in ("cublas", "cudart", "cufft", "curand", "cusolver", "cusparse", "nvrtc"):
    put("lib64/lib" + name + ".so")
os.environ["CUDA_HOME"] = home
os.environ["PATH"] = home + "/bin:" + os.environ["PATH"]
"""
# A torch for CUDA, and what its cpp_extension gives for whatever is to be built.
TORCH = """
import os, sys, types
torch = types.ModuleType("torch")
torch.__version__ = "2.15.0+cu132"
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
torch._C = types.SimpleNamespace(_cuda_getArchFlags=lambda: "sm_75 sm_80 compute_120")
torch.ones = lambda *size: None
utils, cpp_extension = types.ModuleType("torch.utils"), types.ModuleType("torch.utils.cpp_extension")
torch.utils, utils.cpp_extension = utils, cpp_extension
sys.modules.update({"torch": torch, "torch.utils": utils, "torch.utils.cpp_extension": cpp_extension})
os.environ["CUDA_HOME"] = os.getcwd()

def says(**told):
    for name, text in told.items():
        os.makedirs("bin", exist_ok=True)
        with open("bin/" + name, "w") as it:
            it.write("#!/bin/sh\\necho '" + text + "'\\n")
        os.chmod("bin/" + name, 0o755)

def refuses(x, y, scale):
    raise RuntimeError("x and y must be CUDA tensors")

def built(**parts):
    parts = {"scaled_sum": refuses, "toolkit": lambda: 13020, "__file__": "torchyard_cuda.so", **parts}
    cpp_extension.load = lambda *arguments, **options: types.SimpleNamespace(**parts)

def broken(text):
    def load(*arguments, **options):
        raise RuntimeError(text)
    cpp_extension.load = load

says(cuobjdump="ELF file    1: torchyard_cuda.1.sm_75.cubin")
built()
"""
LINKER = """Error building extension 'torchyard_cuda': [3/3] c++ binding.o kernel.cuda.o -shared -lcudart
/usr/bin/ld: cannot find -lcudart: No such file or directory
collect2: error: ld returned 1 exit status"""
# The real torch, with an extension whose function is written in Python.
STAND_IN = """
import types
import torch
from torch.utils import cpp_extension
torch._C._cuda_getArchFlags = lambda: "sm_80"
def built(function):
    cpp_extension.load = lambda *arguments, **options: types.SimpleNamespace(scaled_sum=function)
"""

MUTATIONS = [
    Mutation(
        check="env.toolkit",
        name="no toolkit was declared",
        prelude=TOOLKIT,
        declared=RUNTIME,
        status=Status.SKIP,
        says="declares no CUDA toolkit",
    ),
    Mutation(
        check="env.toolkit",
        name="CUDA_HOME is not set",
        prelude=TOOLKIT + 'del os.environ["CUDA_HOME"]',
        declared=DEVEL,
        says="CUDA_HOME is not set",
    ),
    Mutation(
        check="env.toolkit",
        name="CUDA_HOME leads to a toolkit without a compiler",
        prelude=TOOLKIT + 'os.remove(home + "/bin/nvcc")',
        declared=DEVEL,
        says="there is no nvcc in",
    ),
    Mutation(
        check="env.toolkit",
        name="a toolkit of another CUDA",
        prelude=TOOLKIT + 'nvcc("Cuda compilation tools, release 13.0, V13.0.88")',
        declared=DEVEL,
        says="nvcc is of CUDA 13.0",
    ),
    Mutation(
        check="env.toolkit",
        name="an nvcc that does not start",
        prelude=TOOLKIT + 'nvcc("nvcc: error while loading shared libraries")',
        declared=DEVEL,
        says="does not tell its version",
    ),
    Mutation(
        check="env.toolkit",
        name="another nvcc comes first on PATH",
        prelude=TOOLKIT
        + """
put("other/nvcc", "#!/bin/sh\\n", 0o755)
os.environ["PATH"] = home + "/other:" + os.environ["PATH"]
""",
        declared=DEVEL,
        says="other/nvcc, which is not that of CUDA_HOME",
    ),
    Mutation(
        check="env.toolkit",
        name="a library has its numbered name only",
        prelude=TOOLKIT + 'os.rename(home + "/lib64/libcudart.so", home + "/lib64/libcudart.so.13")',
        declared=DEVEL,
        says="lib64/libcudart.so",
    ),
    Mutation(
        check="env.toolkit",
        name="the compiler proper is missing",
        prelude=TOOLKIT + 'os.remove(home + "/nvvm/bin/cicc")',
        declared=DEVEL,
        says="nvvm/bin/cicc",
    ),
    Mutation(
        check="env.cpp-extension",
        name="ninja is not declared",
        prelude=TORCH,
        declared=RUNTIME,
        status=Status.SKIP,
        says="does not declare ninja",
    ),
    Mutation(
        check="env.cpp-extension",
        name="ninja is declared, and not there",
        prelude="import os\nos.environ['PATH'] = os.getcwd()",
        needs="torch",
        declared=DEVEL,
        says="Ninja is required",
    ),
    Mutation(
        check="env.cpp-extension",
        name="the compiler has no headers of the C library",
        prelude=TORCH
        + "broken(\"Error building extension 'torchyard_cpp': fatal error: stdlib.h: No such file or directory\")",
        declared=DEVEL,
        says="stdlib.h: No such file or directory",
    ),
    Mutation(
        check="env.cpp-extension",
        name="the extension computes something else",
        prelude=STAND_IN + "built(lambda x, y, scale: x * scale)",
        needs="torch",
        declared=DEVEL,
        says="a C++ extension computes something else than torch",
    ),
    Mutation(
        check="env.cpp-extension",
        name="no gradient goes through the extension",
        prelude=STAND_IN
        + """
class Cut(torch.autograd.Function):
    @staticmethod
    def forward(context, x, y, scale): return x * scale + y
    @staticmethod
    def backward(context, gradient): return torch.zeros_like(gradient), None, None
built(Cut.apply)
""",
        needs="torch",
        declared=DEVEL,
        says="its gradient [0.0, 0.0",
    ),
    Mutation(
        check="env.cuda-extension",
        name="no toolkit was declared",
        prelude=TORCH,
        declared=RUNTIME,
        status=Status.SKIP,
        says="declares no CUDA toolkit",
    ),
    Mutation(
        check="env.cuda-extension",
        name="the linker does not find libcudart",
        prelude=TORCH + f"broken({LINKER!r})",
        declared=DEVEL,
        says="cannot find -lcudart",
    ),
    Mutation(
        check="env.cuda-extension",
        name="headers of another CUDA come first",
        prelude=TORCH + "built(toolkit=lambda: 12080)",
        declared=DEVEL,
        says="compiled with headers of CUDA 12.8",
    ),
    Mutation(
        check="env.cuda-extension",
        name="the extension takes what it must refuse",
        prelude=TORCH + "built(scaled_sum=lambda *arguments: None)",
        declared=DEVEL,
        says="takes tensors of the CPU",
    ),
    Mutation(
        check="env.cuda-extension",
        name="there is no code for the architecture in the library",
        prelude=TORCH + 'says(cuobjdump="ELF file    1: torchyard_cuda.1.sm_90.cubin")',
        declared=DEVEL,
        says="holds no code for compute capability 7.5",
    ),
    Mutation(
        check="env.cuda-extension",
        name="a torch without CUDA beside a toolkit",
        prelude=TORCH + 'torch._C._cuda_getArchFlags = lambda: ""',
        declared=DEVEL,
        says="no code for any GPU",
    ),
    Mutation(
        check="dev.extension",
        name="the kernel leaves out the last block",
        prelude=STAND_IN
        + """
def cut(x, y, scale):
    out = x * scale + y
    out[-99:] = 0
    return out, out.double().sum()
built(cut)
""",
        needs="torch",
        declared=DEVEL,
        says="99 of 100003 elements differ",
    ),
    Mutation(
        check="dev.extension",
        name="the blocks' sums are not added up",
        prelude=STAND_IN + "built(lambda x, y, scale: (x * scale + y, (x * scale + y)[:256].double().sum()))",
        needs="torch",
        declared=DEVEL,
        says="0 of 100003 elements differ",
    ),
]
