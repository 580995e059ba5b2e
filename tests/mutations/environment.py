"""Environments in which checks must not pass: those of `environment.py`, `places.py` and `limits.py`."""

from tests.support.mutations import Mutation
from validate.verdict import Status

# Modules for the processes that a check starts.
PLANT = """
import os
site = os.path.join(os.getcwd(), "site")
os.makedirs(site, exist_ok=True)
os.environ["PYTHONPATH"] = site
import sys; sys.path.insert(0, site)

def module(name, source):
    with open(os.path.join(site, name + ".py"), "w") as it:
        it.write(source)
"""
NOBODY = """
import os
os.geteuid, os.getegid, os.getgroups = lambda: 12345, lambda: 12345, lambda: []
os.access = lambda *_: False
locked = os.path.join(os.getcwd(), "locked")
os.makedirs(locked, mode=0o500)
for name in [name for name in os.environ if name.startswith(("XDG_", "HF_", "TORCH", "TRITON", "TMP", "TEMP"))]:
    del os.environ[name]
os.environ["HOME"] = locked
os.environ["LOGNAME"] = "nobody-here"
"""
NOEXEC = """
import os
real = os.statvfs
class Flags:
    f_flag = os.ST_NOEXEC
os.statvfs = lambda path: Flags
"""
SMALL_SHM = """
import os
real = os.statvfs
class Small:
    f_frsize, f_blocks, f_flag = 4096, {blocks}, 0
os.statvfs = lambda path: Small if path == "/dev/shm" else real(path)
"""
UNDEFINED = "ImportError('/site/libtorch_cuda.so: undefined symbol: ncclCommResume')"
NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"

MUTATIONS = [
    Mutation(
        check="run.import",
        name="no torch",
        prelude=PLANT + "module('torch', \"raise ModuleNotFoundError('No module', name='torch')\")",
        says="has no torch",
    ),
    Mutation(
        check="run.import",
        name="another wheel's NCCL lies in place of torch's own",
        prelude=PLANT + f'module("torch", "raise {UNDEFINED}")',
        says="undefined symbol: ncclCommResume",
    ),
    Mutation(
        check="run.import",
        name="a library is missing",
        prelude=PLANT
        + "module('torch', \"raise ImportError('libcufile.so.0: cannot open shared object file: No such file')\")",
        says="libcufile.so.0",
    ),
    Mutation(
        check="run.import",
        name="torch crashes",
        prelude=PLANT + "module('torch', 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)')",
        says="the process died of SIGSEGV",
    ),
    Mutation(
        check="run.import",
        name="torch ends the process",
        prelude=PLANT + "module('torch', 'import os; os._exit(3)')",
        says="the process ended",
    ),
    Mutation(
        check="run.import",
        name="a library that was imported before has another NCCL",
        prelude=PLANT
        + f'module("torch", "import sys\\nif \'numpy\' in sys.modules: raise {UNDEFINED}")\nmodule("numpy", "")',
        says="torch cannot be imported after the others",
    ),
    Mutation(
        check="run.import",
        name="a torchvision for another torch",
        prelude=PLANT
        + """
module("torch", "class ops: torchvision = None")
module("torchvision", "import torch")
module("numpy", "")
""",
        says="torchvision cannot be imported after torch",
    ),
    Mutation(
        check="run.import",
        name="torch needs a driver, and there is none",
        prelude=PLANT
        + f"""
real = os.path.exists
os.path.exists = lambda path: False if path in ("/dev/nvidiactl", "/dev/dxg") else real(path)
module("torch", "raise ImportError({NO_DRIVER!r})")
""",
        status=Status.SKIP,
        says="without a driver",
    ),
    Mutation(
        check="run.import",
        name="the Python on PATH is another one",
        prelude=PLANT
        + """
module("torch", "")
other = os.path.join(site, "bin", "python")
os.makedirs(os.path.dirname(other))
with open(other, "w") as it:
    it.write("#!/bin/sh\\nexit 1\\n")
os.chmod(other, 0o755)
os.environ["PATH"] = os.path.dirname(other)
""",
        status=Status.WARN,
        says="which has no torch",
    ),
    Mutation(
        check="run.numpy",
        name="no NumPy",
        prelude="import sys; sys.modules['numpy'] = None",
        status=Status.WARN,
        says="NumPy is not installed",
    ),
    Mutation(
        check="run.numpy",
        name="a NumPy 2 under a torch that was compiled with NumPy 1",
        prelude=PLANT
        + """
module("numpy", "__version__ = '2.0.0'")
module("torch", '''
class arange:
    def __init__(self, end): pass
    def numpy(self): raise RuntimeError("Numpy is not available")
''')
""",
        says="Numpy is not available",
    ),
    Mutation(
        check="run.numpy",
        name="tensors are copied",
        prelude="import torch\nreal = torch.Tensor.numpy\ntorch.Tensor.numpy = lambda tensor: real(tensor).copy()",
        needs="torch",
        says="tensor.numpy() copies",
    ),
    Mutation(
        check="run.numpy",
        name="arrays are copied",
        prelude="import torch\nreal = torch.from_numpy\ntorch.from_numpy = lambda array: real(array.copy())",
        needs="torch",
        says="torch.from_numpy copies",
    ),
    Mutation(
        check="run.numpy",
        name="a dtype is taken for another one",
        prelude="""
import torch
real = torch.from_numpy
torch.from_numpy = lambda array: real(array.view('int16') if array.dtype == 'float16' else array)
""",
        needs="torch",
        says="float16 cannot be shared",
    ),
    Mutation(
        check="run.numpy",
        name="bfloat16 is reinterpreted",
        prelude="""
import torch
real = torch.Tensor.numpy
torch.Tensor.numpy = lambda it: real(it.view(torch.int16) if it.dtype is torch.bfloat16 else it)
""",
        needs="torch",
        says="a bfloat16 tensor is converted",
    ),
    Mutation(
        check="run.caches",
        name="no place for temporary files",
        prelude=NOBODY + "os.environ['TMPDIR'] = locked",
        says="uid 12345 cannot write to",
    ),
    Mutation(
        check="run.caches",
        name="the home directory is another user's",
        prelude=NOBODY + "os.environ['TMPDIR'] = '/tmp'; os.environ['TRITON_CACHE_DIR'] = '/tmp/triton'",
        status=Status.WARN,
        says="or set TORCH_HOME, HF_HOME to a place that is",
    ),
    Mutation(
        check="run.caches",
        name="temporary files on a noexec mount",
        prelude=NOEXEC,
        says="is mounted noexec",
    ),
    Mutation(
        check="run.caches",
        name="a noexec mount, where nothing is compiled",
        prelude=NOEXEC,
        options={"compile": False},
        status=Status.WARN,
        says="is mounted noexec",
    ),
    Mutation(
        check="run.caches",
        name="a cache on a volume that is mounted read-only",
        prelude="""
import os
class Flags:
    f_flag = os.ST_RDONLY
class Device:
    st_dev = 12345
stat, place = os.stat, os.path.join(os.getcwd(), "hub")
os.makedirs(place)
os.environ["HF_HOME"] = place
statvfs = os.statvfs
os.statvfs = lambda path: Flags if path == place else statvfs(path)
os.stat = lambda path, *a, **k: Device if path == place else stat(path, *a, **k)
""",
        status=Status.WARN,
        says="is mounted read-only",
    ),
    Mutation(
        check="run.user",
        name="only root may read the packages",
        prelude=PLANT + "module('torch', \"raise PermissionError(13, 'Permission denied', '/root/venv')\")",
        options={"foreign_user": "fail"},
        says="readable for everyone",
    ),
    Mutation(
        check="run.user",
        name="only root may read the packages, and nobody asked for more",
        prelude=PLANT + "module('torch', \"raise PermissionError(13, 'Permission denied', '/root/venv')\")",
        status=Status.WARN,
        says="readable for everyone",
    ),
    Mutation(
        check="run.user",
        name="Inductor asks for the name of a user who has none",
        prelude="""
import os, torch
package = os.path.join(os.getcwd(), "old")
os.makedirs(os.path.join(package, "_inductor", "runtime"))
with open(os.path.join(package, "_inductor", "runtime", "cache_dir_utils.py"), "w") as it:
    it.write("def default_cache_dir(): raise KeyError('getpwuid(): uid not found: 12345')")
torch.__file__ = os.path.join(package, "__init__.py")
""",
        needs="torch",
        options={"foreign_user": "fail"},
        says="torch.compile does not work for uid",
    ),
    Mutation(
        check="run.user",
        name="the home directory is another user's",
        prelude=NOBODY,
        needs="torch",
        options={"foreign_user": "fail"},
        says="or set TORCH_HOME, HF_HOME to a place that is",
    ),
    Mutation(
        check="host.limits",
        name="Docker's shared memory, for eight workers",
        prelude=SMALL_SHM.format(blocks=16384),
        options={"workers": 8},
        says="/dev/shm has 64 MiB, 512 MiB are needed",
    ),
    Mutation(
        check="host.limits",
        name="hardly any shared memory",
        prelude=SMALL_SHM.format(blocks=256),
        status=Status.WARN,
        says="/dev/shm has 1 MiB, 64 MiB are needed",
    ),
    Mutation(
        check="host.limits",
        name="few open files",
        prelude="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))",
        status=Status.WARN,
        says="a process may open 256 files",
    ),
]
