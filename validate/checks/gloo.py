"""Two processes on the CPU: torchrun, gloo, DDP, and what becomes of the others when one dies: T1."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Optional

from validate.check import Probe, check
from validate.checks import collectives
from validate.verdict import Blame

_STARTS_S = 150.0
"""For torchrun, which imports torch, to start its ranks; it takes seconds, and many on a machine that is busy."""
_ENDS_S = 100.0
"""For torchrun to notice that a rank died, and to end the other; it takes some seconds."""
_DYING = f"""
import os, signal
signal.alarm({_STARTS_S + _ENDS_S + 10:.0f})  # whatever torchrun does, none of this stays
if os.environ["RANK"] == "1":
    open("dying", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
with open("waiting", "w") as file:
    file.write(str(os.getpid()))
signal.pause()
"""
"""Rank 1 dies as the kernel kills what takes too much memory; rank 0 waits, as in a collective. No torch: quick."""


@dataclass(frozen=True)
class Death:
    """How torchrun ended after one of its ranks was killed."""

    returncode: Optional[int]
    """None if it did not end by itself."""
    printed: str = ""
    survived: bool = False
    """Whether the other rank lived on."""
    began: bool = True
    """Whether a rank was killed at all."""


def judge_death(probe: Probe, seen: Death) -> None:
    """Hold torchrun to ending with an error when a rank dies, and to leaving no other behind."""
    last = "\n".join(seen.printed.strip().splitlines()[-8:])
    if seen.returncode is None and not seen.began:
        probe.fail(
            f"torchrun did not start its ranks within {_STARTS_S:.0f} s",
            why=last,
            remedy="run it again where less else runs; see dist.gloo's output",
            blame=Blame.UNKNOWN,
        )
    elif seen.returncode is None:
        probe.fail(
            f"when a rank dies torchrun waits for the others: it did not end within {_ENDS_S:.0f} s",
            why=last,
            remedy="install torch again; until then something outside must watch a job",
            blame=Blame.UNKNOWN,
        )
    elif seen.returncode == 0:
        probe.fail(
            "torchrun reports success although a rank was killed",
            why="rank 1 was ended by SIGKILL, the exit code of torchrun is 0",
            remedy="install torch again; look for what wraps or replaces torch.distributed.run",
            blame=Blame.UNKNOWN,
        )
    elif seen.survived:
        probe.fail(
            "torchrun leaves a rank running after another died",
            why=f"rank 0 is still there; the exit code of torchrun is {seen.returncode}",
            remedy="install torch again; until then start containers with --init and stop them as a whole",
            blame=Blame.UNKNOWN,
        )


def _lives(path: str) -> bool:
    """Tell whether the process runs whose number stands in a file; one that only waits to be reaped does not."""
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123
            number = int(file.read())
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, ValueError):
        return False


def _die(scratch: str) -> Death:
    """Start two ranks of which one is killed, and wait for torchrun to end."""
    folder = tempfile.mkdtemp(prefix="dying-", dir=scratch)
    with open(os.path.join(folder, "rank.py"), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
        file.write(_DYING)
    path = os.path.join(folder, "printed")  # noqa: PTH118
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    # A thread each, as torchrun would set and say that it did.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(path, "wb") as printed:  # noqa: PTH123
        process = subprocess.Popen(
            [*command, "--nproc-per-node=2", "--monitor-interval=0.2", "rank.py"],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            cwd=folder,
            env=environment,
        )
    died = os.path.join(folder, "dying")  # noqa: PTH118
    returncode = _ended(process, _STARTS_S, until=died)
    began = os.path.exists(died)  # noqa: PTH110
    if returncode is None and began:
        returncode = _ended(process, _ENDS_S)
    if returncode is None:
        process.kill()
        process.wait()
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return Death(returncode, file.read(), _lives(os.path.join(folder, "waiting")), began)  # noqa: PTH118


def _ended(process: subprocess.Popen[bytes], seconds: float, *, until: Optional[str] = None) -> Optional[int]:
    """Wait for a process to end, or for a file to be there; return its exit code, None if it still runs."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not (until and os.path.exists(until)):  # noqa: PTH110
        time.sleep(0.05)
    return process.poll()


@check(
    "dist.gloo",
    title="two processes find each other, compute together, and end together",
    tier=1,
    needs=("run.import",),
)
def gloo(probe: Probe) -> None:
    """Start torchrun twice, on loopback alone: for collectives and DDP's gradients, and to see a rank die."""
    # There may be no other interface, and no name for this machine. What the user has set is not changed.
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    on_cpu = copy.copy(probe)
    on_cpu.device = "cpu"
    with ThreadPoolExecutor(1) as pool:
        dying = pool.submit(_die, probe.request.scratch)
        outcome = collectives.launch(on_cpu, "both", {"GLOO_SOCKET_IFNAME": interface})
        death = dying.result()
    collectives.judge_started(probe, outcome)
    collectives.judge_collectives(probe, outcome)
    collectives.judge_ddp(probe, outcome)
    judge_death(probe, death)
    probe.detail("2 ranks: collectives exact, gradients equal and their mean; when one is killed torchrun fails")
