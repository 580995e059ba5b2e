"""Environments in which the checks of `validate/checks/gloo.py` must not pass.

torchrun and its ranks are processes of their own: what a prelude plants reaches them through PYTHONPATH.
"""

from tests.support.mutations import Mutation

_PLANT = """
import os
folder = os.path.join(os.getcwd(), "planted")
os.makedirs(folder)
with open(os.path.join(folder, {name!r}), "w") as file:
    file.write({content!r})
os.environ["PYTHONPATH"] = folder
"""
BROKEN_TORCH = _PLANT.format(name="torch.py", content="raise ImportError('libtorch_cpu.so: cannot open shared object')")
SUMS_NOTHING = _PLANT.format(
    name="sitecustomize.py",
    content="import torch.distributed\ntorch.distributed.all_reduce = lambda *_, **__: None\n",
)
HIDES_DEATHS = _PLANT.format(
    name="sitecustomize.py",
    content="import atexit, os, sys\nif sys.orig_argv[-1] == 'rank.py': atexit.register(os._exit, 0)\n",
)

MUTATIONS = [
    Mutation(
        check="dist.gloo",
        name="torch cannot be loaded by the ranks",
        prelude=BROKEN_TORCH,
        says="libtorch_cpu.so: cannot open shared object",
    ),
    Mutation(
        check="dist.gloo",
        name="sums are not summed",
        prelude=SUMS_NOTHING,
        says="collectives give wrong numbers: all_reduce",
        needs="torch",
    ),
    Mutation(
        check="dist.gloo",
        name="no such interface",
        prelude="import os; os.environ['GLOO_SOCKET_IFNAME'] = 'none0'",
        says="torchrun ended with exit code 1",
        needs="torch",
    ),
    Mutation(
        check="dist.gloo",
        name="the exit code is lost",
        prelude=HIDES_DEATHS,
        says="torchrun reports success although a rank was killed",
        needs="torch",
    ),
]
