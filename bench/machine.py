"""The machine a run was made on, the tools it used, and the state it is put into before each measurement."""

from __future__ import annotations

import os
import platform
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import uv

from builder import __version__, sha256

_PIECE = 16 << 20


def describe(*, store: Path, engine: Path | None) -> dict[str, str]:
    """Return what decides how fast this machine is, and how busy it was."""
    about = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "sha_extensions": "yes" if _sha_extensions() else "no",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "store_disk": _disk(store),
        "kernel": platform.release(),
        "load_before": f"{os.getloadavg()[0]:.2f}",
    }
    if engine is not None and engine.stat().st_dev != store.stat().st_dev:
        about["engine_disk"] = _disk(engine)
    return about


def tools(root: Path) -> dict[str, str]:
    """Return the versions of what took part; `root` is torchyard's checkout."""
    return {
        "torchyard": f"{__version__} {_commit(root)}",
        "Python": platform.python_version(),
        "isal": metadata.version("isal"),
        "SHA-256, torchyard": _hashing(),
        "SHA-256, the floor": ssl.OPENSSL_VERSION,
        "Docker Engine": _said("docker", "version", "--format", "{{.Server.Version}}"),
        "buildx": _said("docker", "buildx", "version").replace("github.com/docker/buildx ", ""),
        "uv": _said(uv.find_uv_bin(), "--version").removeprefix("uv "),
    }


def settle(files: Iterable[Path]) -> None:
    """Give every measurement the same start: nothing left to be written, and the files read once just before."""
    os.sync()
    buffer = bytearray(_PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_caches() -> bool:
    """Empty the page cache; returns whether this process may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def _processor() -> str:
    found = re.search(r"^model name\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return f"{found[1].strip()} ({platform.machine()})" if found else platform.machine()


def _hashing() -> str:
    lanes = sha256.best().lanes
    return f"{lanes} streams side by side" if lanes > 1 else "one stream at a time, as the floor"


def _sha_extensions() -> bool:
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return flags is not None and bool({"sha_ni", "sha2"} & set(flags[1].split()))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _disk(path: Path) -> str:
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    kind = "unknown kind"
    # A partition has no queue of its own; that of its disk is one level up.
    for directory in (device, device.resolve().parent):
        if (directory / "queue" / "rotational").is_file():
            turns = (directory / "queue" / "rotational").read_text().strip() == "1"
            virtual = device.resolve().name.startswith(("vd", "xvd"))
            kind = f"{'virtual, ' if virtual else ''}{'rotational' if turns else 'solid state'}"
            break
    usage = shutil.disk_usage(path)
    return f"{kind}, {_filesystem(path)}, {usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free"


def _filesystem(path: Path) -> str:
    """Return the type of the file system: that of the longest mount point above the path."""
    found = ("", "unknown file system")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if path.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def _said(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"


def _commit(root: Path) -> str:
    commit = _said("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    return f"({commit}{', changed' if _said('git', '-C', str(root), 'status', '--porcelain') else ''})"
