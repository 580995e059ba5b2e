"""Environments in which the checks of `validate/checks/collectives.py` must not pass.

The ranks are processes of their own: what a prelude plants reaches them through PYTHONPATH.
"""

from tests.support.mutations import Mutation
from validate.verdict import Status

_PLANT = """
import os, tempfile
folder = tempfile.mkdtemp(dir=os.getcwd())
for name, content in {files!r}.items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(content)
os.environ["PYTHONPATH"] = folder
"""
NO_NCCL = _PLANT.format(
    files={"torch/__init__.py": "raise ImportError('libnccl.so.2: cannot open shared object file: No such file')"}
)


def _patched(code: str) -> str:
    """Return a prelude after which `code` runs in every rank, torch being there."""
    return _PLANT.format(files={"sitecustomize.py": f"import torch, torch.distributed as dist\n{code}\n"})


_LONELY = """
class Lonely(torch.nn.Module):
    def __init__(self, module, **_):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch)

torch.nn.parallel.DistributedDataParallel = Lonely
"""
_SLOW = """
import time
whole = dist.all_reduce

def slow(*arguments, **options):
    time.sleep(0.3)
    return whole(*arguments, **options)

dist.all_reduce = slow
"""
_LOSES = """
import torch.distributed.checkpoint as dcp
dcp.load = lambda *_, **__: None
"""

MUTATIONS = [
    *(
        Mutation(check=name, name="torch cannot be loaded by the ranks", prelude=NO_NCCL, says="libnccl.so.2: cannot")
        for name in ("dist.nccl", "dist.ddp", "dist.fsdp", "dist.busbw")
    ),
    Mutation(
        check="dist.nccl",
        name="sums are not summed",
        prelude=_patched("dist.all_reduce = lambda *_, **__: None"),
        says="collectives give wrong numbers: all_reduce",
        needs="torch",
    ),
    Mutation(
        check="dist.nccl",
        name="no such interface",
        prelude="import os; os.environ['GLOO_SOCKET_IFNAME'] = 'none0'",
        says="torchrun ended with exit code 1",
        needs="torch",
    ),
    Mutation(
        check="dist.ddp",
        name="gradients are not exchanged",
        prelude=_patched(_LONELY),
        says="DDP leaves the ranks with different gradients",
        needs="torch",
    ),
    Mutation(
        check="dist.fsdp",
        name="a checkpoint is not read",
        prelude=_patched(_LOSES),
        says="a distributed checkpoint does not bring back what was saved",
        needs="torch",
    ),
    Mutation(
        check="dist.fsdp",
        name="gradients are not exchanged by DDP",
        prelude=_patched(_LONELY),
        says="FSDP computes something else than DDP's",
        needs="torch",
    ),
    Mutation(
        check="dist.busbw",
        name="sums are slow",
        prelude=_patched(_SLOW),
        says="of what one copy between two GPUs does",
        status=Status.WARN,
        needs="torch",
    ),
]
