"""Environments in which the checks of `validate/checks/identity.py` must not pass."""

from tests.support.mutations import Mutation
from validate.verdict import Status

NO_TORCH = "import sys; sys.modules['torch'] = None"

# Gives a check's process a torch, distributions and mapped libraries, all in its own directory.
PLANT = """
import mmap, os, sys, types
site = os.path.join(os.getcwd(), "site")
os.makedirs(site, exist_ok=True)
sys.path.insert(0, site)
kept = []

def file(path, content="x"):
    path = os.path.join(site, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(content)
    return path

def mapped(path):
    with open(file(path), "rb") as it:
        kept.append(mmap.mmap(it.fileno(), 0, prot=mmap.PROT_READ))

def distribution(name, version, requires=(), files=()):
    info = name.replace("-", "_") + "-" + version + ".dist-info/"
    lines = ["Metadata-Version: 2.1", "Name: " + name, "Version: " + version]
    lines += ["Requires-Dist: " + it for it in requires]
    file(info + "METADATA", "\\n".join(lines) + "\\n")
    file(info + "RECORD", "\\n".join(files) + "\\n")

def plant(version="2.12.1+cu130", cuda="13.0", compiled=(9, 20, 0), loaded=(9, 20, 0), nccl=(2, 29, 7)):
    torch = types.ModuleType("torch")
    torch.__version__ = version
    torch.version = types.SimpleNamespace(cuda=cuda)
    torch.get_num_threads = lambda: 2
    torch.backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 92000 if cuda else None))
    torch._C = types.SimpleNamespace(_cuda_getArchFlags=lambda: "sm_90" if cuda else None)
    if cuda:
        torch._C._cudnn = types.SimpleNamespace(getCompileVersion=lambda: compiled, getRuntimeVersion=lambda: loaded)
        torch._C._nccl_version = lambda: nccl[0] << 32 | nccl[1] << 16 | nccl[2]
    sys.modules["torch"] = torch
"""
CUDA_CELL = {
    "id": "torch2.12.1-cu130",
    "expect": {
        "torch": "2.12.1+cu130",
        "cuda": "13.0",
        "cudnn_number": 92000,
        "nccl": "2.29.7",
        "python": "3.11",
        "architectures": ["sm_90"],
        "packages": {"planted": "2.0"},
    },
}
OWN = "torch 2.12.1 → cuda-toolkit[cublas]==13.0.2 → nvidia-cublas==13.1.1.3.*"

MUTATIONS = [
    Mutation(check="run.identity", name="no torch", prelude=NO_TORCH, says="torch.__version__, torch.version.cuda"),
    Mutation(
        check="run.declared",
        name="a CPU torch in a CUDA image",
        prelude=PLANT + "plant('2.12.1+cpu', None)\ndistribution('planted', '2.0')",
        declared=CUDA_CELL,
        says="torch.version.cuda is none",
    ),
    Mutation(
        check="run.declared",
        name="no NCCL is loaded",
        prelude=PLANT + "plant()\ndistribution('planted', '2.0')",
        declared=CUDA_CELL,
        says="the loaded NCCL is none",
    ),
    Mutation(
        check="run.declared",
        name="a package of another version",
        prelude=PLANT + "plant()\ndistribution('planted', '2.1')",
        declared=CUDA_CELL,
        says="planted is 2.1",
    ),
    Mutation(
        check="run.declared",
        name="a package is gone",
        prelude=PLANT + "plant()",
        declared=CUDA_CELL,
        says="planted is not installed",
    ),
    Mutation(
        check="run.declared",
        name="an image.json that expects nothing",
        prelude=PLANT + "plant()",
        declared={"id": "odd"},
        says="does not say what to expect",
    ),
    Mutation(
        check="run.declared",
        name="no image.json",
        prelude=PLANT + "plant()",
        status=Status.SKIP,
        says="does not say what it should be",
    ),
    Mutation(
        check="run.versions",
        name="another torch comes first on sys.path",
        prelude=PLANT + "plant()\ndistribution('torch', '2.8.0')",
        says="torch 2.12.1+cu130 is imported, but torch 2.8.0 is installed",
    ),
    Mutation(
        check="run.versions",
        name="a cuDNN older than torch was compiled with",
        prelude=PLANT + "plant(loaded=(9, 1, 0))",
        says="cuDNN 9.1.0 is loaded, torch was compiled with 9.20.0",
    ),
    Mutation(
        check="run.versions",
        name="a cuDNN that is not the installed one",
        prelude=PLANT + "plant(loaded=(9, 23, 0))\ndistribution('nvidia-cudnn-cu13', '9.20.0.48')",
        says="cuDNN 9.23.0 is loaded, but 9.20.0.48 is installed",
    ),
    Mutation(
        check="run.versions",
        name="a broken NCCL",
        prelude=PLANT + "plant()\nmapped('nvidia/nccl/lib/libnccl.so.2')",
        says="libnccl.so.2 cannot be asked for its version",
    ),
    Mutation(
        check="run.versions",
        name="a wheel of an older torch is left over, and is preferred",
        prelude=PLANT
        + """
plant()
mapped('nvidia/cusparse/lib/libcusparse.so.12')
distribution('torch', '2.12.1', ['nvidia-cusparse'])
distribution('nvidia-cusparse', '12.6.3')
distribution('nvidia-cusparse-cu12', '12.5.8', files=['nvidia/cusparse/lib/libcusparse.so.12,sha256=a,1'])
""",
        says="libcusparse.so.12 is loaded, of nvidia-cusparse-cu12 12.5.8",
    ),
    Mutation(
        check="run.versions",
        name="the system's cuBLAS is loaded",
        prelude=PLANT
        + """
plant()
mapped('usr/lib/libcublas.so.13')
distribution('torch', '2.12.1', ['nvidia-cublas'])
distribution('nvidia-cublas', '13.1.1')
""",
        says="which no package brought",
    ),
    Mutation(
        check="run.versions",
        name="the system's cuDNN has a part that the wheel lacks",
        prelude=PLANT
        + """
plant()
mapped('nvidia/cudnn/lib/libcudnn.so.9')
os.environ['LD_LIBRARY_PATH'] = os.path.dirname(file('usr/lib/libcudnn_engines_tensor_ir.so.9'))
""",
        says="would be mixed with torch's own",
    ),
    Mutation(
        check="run.versions",
        name="LD_LIBRARY_PATH hides a part of cuDNN",
        prelude=PLANT
        + """
plant()
mapped('nvidia/cudnn/lib/libcudnn.so.9')
file('nvidia/cudnn/lib/libcudnn_ops.so.9')
os.environ['LD_LIBRARY_PATH'] = os.path.dirname(file('usr/lib/libcudnn_ops.so.9', 'another build'))
""",
        says="hides torch's own",
    ),
    Mutation(
        check="run.versions",
        name="one soname, two files",
        prelude=PLANT + "plant()\nmapped('a/libcusolver.so.12')\nmapped('b/libcusolver.so.12')",
        says="libcusolver.so.12 is loaded from 2 files",
    ),
    Mutation(
        check="run.versions",
        name="cuBLAS and cuBLASLt of two installations",
        prelude=PLANT + "plant()\nmapped('a/libcublas.so.13')\nmapped('b/libcublasLt.so.13')",
        says="libcublas and libcublasLt come from different places",
    ),
    Mutation(
        check="run.versions",
        name="two OpenMP runtimes",
        prelude=PLANT + "plant('2.12.1+cpu', None)\nmapped('a/libgomp-24e2ab19.so.1.0.0')\nmapped('b/libiomp5.so')",
        status=Status.WARN,
        says="2 OpenMP runtimes are loaded",
    ),
    Mutation(
        check="run.versions",
        name="torch is left with one core",
        prelude="""
import os, torch
os.sched_getaffinity = lambda _: set(range(8))
os.environ.pop("OMP_NUM_THREADS", None)
os.environ.pop("MKL_NUM_THREADS", None)
torch.set_num_threads(1)
""",
        needs="torch",
        status=Status.WARN,
        says="torch computes on one of 8 cores",
    ),
    Mutation(
        check="run.closure",
        name="a pin behind an extra is broken, which pip check does not see",
        prelude=PLANT
        + """
distribution('torch', '2.12.1', ['cuda-toolkit[cublas]==13.0.2; platform_system == "Linux"'])
distribution('cuda-toolkit', '13.0.2', ['nvidia-cublas==13.1.1.3.*; extra == "cublas"'])
distribution('nvidia-cublas', '13.4.1.3')
""",
        says=OWN,
    ),
    Mutation(
        check="run.closure",
        name="installed with --no-deps",
        prelude=PLANT + "distribution('torch', '2.12.1', ['nvidia-cusparselt-cu13==0.8.1'])",
        says="nvidia-cusparselt-cu13 is not installed",
    ),
    Mutation(
        check="run.closure",
        name="a torchvision for another torch",
        prelude=PLANT + "distribution('torch', '2.12.1')\ndistribution('torchvision', '0.29.0', ['torch==2.14.0'])",
        says="torch 2.12.1 is installed",
    ),
    Mutation(
        check="run.closure",
        name="two wheels own one library",
        prelude=PLANT
        + """
distribution('torch', '2.12.1')
library = file('nvidia/nccl/lib/libnccl.so.2', 'of 12')
distribution('nvidia-nccl-cu12', '2.27.3', files=['nvidia/nccl/lib/libnccl.so.2,sha256=a,5'])
distribution('nvidia-nccl-cu13', '2.29.7', files=['nvidia/nccl/lib/libnccl.so.2,sha256=b,9'])
""",
        says="what lies there is of nvidia-nccl-cu12 2.27.3",
    ),
    Mutation(
        check="run.closure",
        name="half of an upgrade",
        prelude=PLANT + "distribution('torch', '2.12.1')\ndistribution('torch', '2.8.0')",
        says="torch is installed 2 times",
    ),
    Mutation(
        check="run.closure",
        name="torch was copied, not installed",
        prelude="import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]",
        says="no distribution named torch",
    ),
    Mutation(
        check="run.closure",
        name="nothing that reads requirements",
        prelude=PLANT
        + """
distribution('torch', '2.12.1')
sys.path[:] = [site, *(path for path in sys.path if 'site-packages' not in path)]
sys.modules['packaging'] = sys.modules['pip'] = sys.modules['setuptools'] = None
""",
        status=Status.SKIP,
        says="requirements cannot be read",
    ),
]
