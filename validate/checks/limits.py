"""What the host, or whoever started the container, lets a process have: memory, cores, processes, files: T1."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import resource
from dataclasses import dataclass, field
from typing import Dict, Iterator, Mapping, Optional, Tuple

from validate.check import Probe, check
from validate.verdict import Blame

_MIB, _GIB = 1 << 20, 1 << 30
_SHM = "/dev/shm"  # noqa: S108
_WORKER_BYTES = 64 * _MIB
"""Shared memory that a worker of a DataLoader needs for a few batches."""
_COMPILER_BYTES = 1.5 * _GIB
"""What one of Inductor's compile workers takes."""
_MOST_COMPILERS = 32
"""So many compile workers Inductor starts at most; fewer only if there are fewer cores, whatever the quota."""
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
_EPERM = 1
_UNLIMITED = 1 << 60
"""cgroup v1 says "unlimited" by a number near 2**63."""


@dataclass(frozen=True)
class Limits:
    """What this process may use; None is unlimited or unknown."""

    shm: Optional[int] = None
    """Bytes of /dev/shm; None if it is not there."""
    memory: Optional[int] = None
    """Bytes."""
    cores: int = 1
    """That the process may run on."""
    quota: Optional[float] = None
    """Cores' worth of time."""
    processes: Optional[int] = None
    files: Optional[int] = None
    locked: Optional[int] = None
    """Bytes."""
    numa_error: int = 0
    """errno of get_mempolicy; 0 if it works."""
    gpus: int = 0
    infiniband: bool = False
    unreadable: Tuple[str, ...] = ()
    """Files of /proc."""
    threads_set: bool = False
    compilers_set: bool = False
    """Whether the user has set the number of threads, of compile workers."""
    seen: Mapping[str, str] = field(default_factory=dict)
    """Where the limits of the control group were read."""


@check("host.limits", title="memory, cores and files suffice", tier=1, modes=("F35", "F36", "F37", "F38"))
def limits(probe: Probe) -> None:
    """Read what the container, the control group and the shell allow."""
    found = observe_limits(os.environ)
    probe.saw(
        limits={name: value for name, value in vars(found).items() if name != "seen"},
        control_group=dict(found.seen),
    )
    judge_limits(
        probe, found, workers=int(probe.options.get("workers", 0)), compiles=bool(probe.options.get("compile"))
    )
    shm = "no /dev/shm" if found.shm is None else f"{_SHM} {_bytes(found.shm)}"
    memory = "no memory limit" if found.memory is None else f"memory {_bytes(found.memory)}"
    probe.detail(f"{shm}, {memory}, {found.cores} cores" + (f", quota {found.quota:g}" if found.quota else ""))


def observe_limits(environment: Mapping[str, str]) -> Limits:
    """Return the limits of this process."""
    shm = None
    with contextlib.suppress(OSError):
        space = os.statvfs(_SHM)
        shm = space.f_frsize * space.f_blocks
    group, seen = control_group()
    devices = os.listdir("/dev")  # noqa: PTH208
    return Limits(
        shm=shm,
        memory=None if group.get("memory") is None else int(group["memory"] or 0),
        cores=len(os.sched_getaffinity(0)),
        quota=group.get("cpu"),
        processes=None if group.get("pids") is None else int(group["pids"] or 0),
        files=_soft(resource.RLIMIT_NOFILE),
        locked=_soft(resource.RLIMIT_MEMLOCK),
        numa_error=_numa_error(),
        gpus=sum(re.fullmatch(r"nvidia\d+", name) is not None for name in devices),
        infiniband="infiniband" in devices,
        unreadable=tuple(path for path in ("/proc/self/maps", "/proc/meminfo", "/proc/cpuinfo") if not _readable(path)),
        threads_set=bool(environment.get("OMP_NUM_THREADS")),
        compilers_set=bool(environment.get("TORCHINDUCTOR_COMPILE_THREADS")),
        seen=seen,
    )


def _soft(which: int) -> Optional[int]:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _readable(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:  # noqa: PTH123
        return bool(file.read(1))
    return False


def _numa_error() -> int:
    """Return the errno of get_mempolicy, as libnuma calls it; 0 if it works or is not known here."""
    number = _GET_MEMPOLICY.get(platform.machine())
    if number is None:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_int()
    failed = libc.syscall(ctypes.c_long(number), ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    return ctypes.get_errno() if failed else 0


def control_group(
    root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup"
) -> Tuple[Dict[str, Optional[float]], Dict[str, str]]:
    """Return the limits on memory (bytes), cpu (cores) and pids, of both versions, and the files that say so.

    A limit of any group above this one counts, too.
    """
    found: Dict[str, Optional[float]] = {"memory": None, "cpu": None, "pids": None}
    seen: Dict[str, str] = {}

    def take(name: str, value: Optional[float], path: str) -> None:
        known = found[name]
        if value is not None and value < _UNLIMITED and (known is None or value < known):
            found[name], seen[name] = value, path

    with contextlib.suppress(OSError):
        with open(membership, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            lines = file.read().splitlines()
        for line in lines:
            _, controllers, below = line.split(":", 2)
            for place in _upwards(below):
                if not controllers:
                    take("memory", _number(f"{root}{place}/memory.max"), f"{root}{place}/memory.max")
                    take("pids", _number(f"{root}{place}/pids.max"), f"{root}{place}/pids.max")
                    take("cpu", _quota(f"{root}{place}/cpu.max"), f"{root}{place}/cpu.max")
                for controller in controllers.split(","):
                    where = f"{root}/{controller}{place}"
                    if controller == "memory":
                        path = f"{where}/memory.limit_in_bytes"
                        take("memory", _number(path), path)
                    elif controller == "pids":
                        take("pids", _number(f"{where}/pids.max"), f"{where}/pids.max")
                    elif controller == "cpu":
                        quota, period = _number(f"{where}/cpu.cfs_quota_us"), _number(f"{where}/cpu.cfs_period_us")
                        if quota is not None and quota > 0 and period:
                            take("cpu", quota / period, f"{where}/cpu.cfs_quota_us")
    return found, seen


def _upwards(place: str) -> Iterator[str]:
    """Yield a group's path and those of the groups above it; the root's is empty."""
    parts = [part for part in place.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        yield "".join(f"/{part}" for part in parts[:length])


def _content(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


def _number(path: str) -> Optional[float]:
    text = _content(path)
    return float(text) if re.fullmatch(r"-?\d+", text) else None


def _quota(path: str) -> Optional[float]:
    match = re.fullmatch(r"(\d+) (\d+)", _content(path))
    return int(match.group(1)) / int(match.group(2)) if match else None


def _bytes(number: float) -> str:
    return f"{number / _GIB:.1f} GiB" if number >= _GIB else f"{number / _MIB:.0f} MiB"


def judge_limits(probe: Probe, found: Limits, *, workers: int, compiles: bool) -> None:
    """Judge limits: all of them are the host's, or of the command that started the container."""
    for path in found.unreadable:
        probe.warn(f"{path} cannot be read", why="libraries look there for cores and memory", blame=Blame.HOST)
    _judge_shm(probe, found, workers)
    _judge_cores(probe, found, compiles=compiles)
    if found.processes is not None and found.processes < 512:
        probe.warn(
            f"the control group allows {found.processes} processes and threads",
            why="torch starts a thread for each core, several times over, and data loaders start processes",
            remedy="docker run --pids-limit=-1",
            mode="F36",
            blame=Blame.HOST,
        )
    if found.files is not None and found.files < 1024:
        probe.warn(
            f"a process may open {found.files} files",
            why="data loaders hand tensors over by open files",
            remedy="ulimit -n 65536, or docker run --ulimit nofile=65536",
            mode="F38",
            blame=Blame.HOST,
        )
    if found.infiniband and found.locked is not None:
        probe.warn(
            f"a process may lock {_bytes(found.locked)} of memory",
            why="InfiniBand registers its buffers by locking them",
            remedy="docker run --ulimit memlock=-1",
            mode="F38",
            blame=Blame.HOST,
        )
    if found.numa_error == _EPERM and found.gpus > 1:
        probe.warn(
            "NUMA calls are blocked",
            why="NCCL then moves its buffers to /dev/shm",
            remedy="docker run --cap-add SYS_NICE",
            mode="F37",
            blame=Blame.HOST,
        )


def _judge_shm(probe: Probe, found: Limits, workers: int) -> None:
    wanted = max(1, workers) * _WORKER_BYTES
    if found.shm is not None and found.shm >= wanted:
        return
    there = "there is no /dev/shm" if found.shm is None else f"{_SHM} has {_bytes(found.shm)}"
    tell = probe.fail if workers else probe.warn
    tell(
        f"{there}, {_bytes(wanted)} are needed",
        why=f"for {workers} data loading workers" if workers else "the least that data loaders and NCCL work with",
        remedy="docker run --shm-size=8g, or --ipc=host; Kubernetes: an emptyDir with medium: Memory at /dev/shm",
        mode="F35",
        blame=Blame.HOST,
    )


def _judge_cores(probe: Probe, found: Limits, *, compiles: bool) -> None:
    if found.quota is not None and found.cores > math.ceil(found.quota) and not found.threads_set:
        probe.warn(
            f"torch starts {found.cores} threads, for {found.quota:g} cores' worth of time",
            why="it counts the cores that it may run on, not the quota; threads that wait for time are slow",
            remedy=f"OMP_NUM_THREADS={math.ceil(found.quota)}, or --cpuset-cpus instead of --cpus",
            mode="F36",
            blame=Blame.HOST,
        )
    compilers = min(_MOST_COMPILERS, found.cores)
    if compiles and found.memory is not None and not found.compilers_set and found.memory < compilers * _COMPILER_BYTES:
        fitting = max(1, int(found.memory // _COMPILER_BYTES))
        probe.warn(
            f"the memory, {_bytes(found.memory)}, does not suffice for {compilers} compile workers",
            why="torch.compile starts one for each core, and the kernel ends those that exceed the limit",
            remedy=f"TORCHINDUCTOR_COMPILE_THREADS={fitting}",
            mode="F36",
            blame=Blame.HOST,
        )
