"""Where torch writes: whether the image's user can, and a user whom /etc/passwd does not know: T1."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.util
import os
import stat
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from validate.check import Probe, check
from validate.verdict import Blame


@dataclass(frozen=True)
class Cache:
    """A place that a library writes to."""

    variable: str
    """What to set to move it."""
    path: str
    mode: str
    runs_code: bool = False
    """Shared libraries are loaded from it: it must not be mounted noexec."""


def home_of(environment: Mapping[str, str], declared: Optional[Mapping[str, Any]]) -> str:
    """Return the home directory of this process's user; of one who has none "/", which is what Docker gives it."""
    home = os.path.expanduser("~") if "HOME" not in environment else environment["HOME"]  # noqa: PTH111
    if home == "~":
        home = ((declared or {}).get("config", {}).get("env", {})).get("HOME", "/")
    return home


def caches(environment: Mapping[str, str], home: str, user: str) -> List[Cache]:
    """Return the places that torch and what is used with it write to, by their own rules."""
    xdg = environment.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")  # noqa: PTH118
    temporary = next((environment[name] for name in ("TMPDIR", "TEMP", "TMP") if environment.get(name)), "/tmp")  # noqa: S108
    inductor = environment.get("TORCHINDUCTOR_CACHE_DIR") or f"{temporary}/torchinductor_{user}"
    triton = environment.get("TRITON_CACHE_DIR") or f"{environment.get('TRITON_HOME') or home}/.triton/cache"
    found = [
        Cache("TMPDIR", temporary, "F54", runs_code=True),
        Cache("TORCHINDUCTOR_CACHE_DIR", inductor, "F52", runs_code=True),
        Cache("TORCH_HOME", environment.get("TORCH_HOME") or f"{xdg}/torch", "F61"),
        Cache("HF_HOME", environment.get("HF_HOME") or f"{xdg}/huggingface", "F61"),
    ]
    if importlib.util.find_spec("triton") is not None or "TRITON_CACHE_DIR" in environment:
        found.insert(2, Cache("TRITON_CACHE_DIR", triton, "F52", runs_code=True))
    return [Cache(one.variable, os.path.abspath(one.path), one.mode, one.runs_code) for one in found]  # noqa: PTH100


def nearest(path: str) -> str:
    """Return the path, or the nearest directory above it that exists."""
    while not os.path.lexists(path) and path != "/":
        path = os.path.dirname(path)  # noqa: PTH120
    return path


def blocker(path: str, uid: int, gids: Set[int]) -> Optional[str]:
    """Return what keeps a user from writing below `path`, by permission bits; None if nothing does.

    Not by trying: the whole file system may be mounted read-only around an image that is in order.
    """
    if uid == 0:
        return None
    place = nearest(path)
    if os.access(place, os.W_OK | os.X_OK) and os.path.isdir(place):  # noqa: PTH112
        return None
    place = os.path.realpath(place)
    above = place
    while above != "/":
        above = os.path.dirname(above)  # noqa: PTH120
        if not _may(above, 0o1, uid, gids):
            return above
    return None if os.path.isdir(place) and _may(place, 0o3, uid, gids) else place  # noqa: PTH112


def _may(path: str, bits: int, uid: int, gids: Set[int]) -> bool:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return False
    shift = 6 if found.st_uid == uid else 3 if found.st_gid in gids else 0
    return found.st_mode >> shift & bits == bits


def _who() -> Tuple[int, Set[int]]:
    return os.geteuid(), {os.getegid(), *os.getgroups()}


@check(
    "run.caches",
    title="the image's user can write where torch writes",
    tier=1,
    modes=("F52", "F54", "F61"),
)
def own_caches(probe: Probe) -> None:
    """Look at the places that are written to, as the user that the image runs as."""
    uid, gids = _who()
    places = caches(os.environ, home_of(os.environ, probe.request.declared), _user_name(uid))
    probe.saw(uid=uid, caches={one.variable: one.path for one in places})
    for place, blocked in blocked_by(places, uid, gids).items():
        # The Hub is not part of torch, and what torch.hub downloads is not part of every program.
        tell = probe.fail if any(one.runs_code for one in blocked) else probe.warn
        _tell_blocked(tell, place, blocked, uid)
    judge_mounts(probe, places, compiles=bool(probe.options.get("compile")))
    probe.detail(f"uid {uid}, {len(places)} places")


def _user_name(uid: int) -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid_{uid}"


def blocked_by(places: Sequence[Cache], uid: int, gids: Set[int]) -> Dict[str, List[Cache]]:
    """Return what cannot be written, by the directory that is in the way."""
    found: Dict[str, List[Cache]] = {}
    for one in places:
        place = blocker(one.path, uid, gids)
        if place is not None:
            found.setdefault(place, []).append(one)
    return found


def _tell_blocked(tell: Callable[..., None], place: str, blocked: Sequence[Cache], uid: int) -> None:
    names = ", ".join(one.variable for one in blocked)
    mode = os.stat(place).st_mode if os.path.exists(place) else 0  # noqa: PTH110, PTH116
    tell(
        f"uid {uid} cannot write to {place}",
        why=f"{stat.filemode(mode)}; below it lies {', '.join(one.path for one in blocked)}",
        remedy=f"set {names} to a place that is writable for group 0; HOME moves most of them"
        if place == "/"
        else f"make {place} writable for group 0, or set {names} to a place that is",
        mode=blocked[-1].mode,
        blame=Blame.IMAGE,
    )


def judge_mounts(probe: Probe, places: Sequence[Cache], *, compiles: bool) -> None:
    """Judge how the places are mounted; a read-only root is a way to run a container, and no fault of the image."""
    root = os.stat("/").st_dev  # noqa: PTH116
    seen: Set[Tuple[int, str]] = set()
    for one in places:
        place = nearest(one.path)
        flags, device = os.statvfs(place).f_flag, os.stat(place).st_dev  # noqa: PTH116
        if flags & os.ST_RDONLY and device != root and (device, "ro") not in seen:
            seen.add((device, "ro"))
            probe.warn(
                f"{place} is mounted read-only",
                why=f"{one.variable} is {one.path}",
                remedy=f"mount it writable, or set {one.variable} to a place that is",
                mode=one.mode,
                blame=Blame.HOST,
            )
        if one.runs_code and flags & os.ST_NOEXEC and (device, "noexec") not in seen:
            seen.add((device, "noexec"))
            tell = probe.fail if compiles else probe.warn
            tell(
                f"{place} is mounted noexec",
                why=f"torch.compile loads the libraries that it makes from {one.path}",
                remedy=f"mount it with exec (docker run --tmpfs {place}:exec), or set {one.variable} to another place",
                mode="F54",
                blame=Blame.HOST,
            )


@check(
    "run.user",
    title="a user without a name can work",
    tier=1,
    needs=("run.identity",),
    foreign_user=True,
    modes=("F25", "F52", "F53", "F61"),
)
def foreign_user(probe: Probe) -> None:
    """Import torch as a user without an entry in /etc/passwd, as OpenShift and Kubernetes run images."""
    tell = probe.fail if probe.options.get("foreign_user") == "fail" else probe.warn
    uid, gids = _who()
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError, KeyError) as error:
        tell(
            f"uid {uid} cannot import torch",
            why=f"{type(error).__name__}: {error}",
            remedy="keep Python and its packages out of /root, and readable for everyone: chmod -R a+rX",
            mode="F25",
            blame=Blame.IMAGE,
        )
        return
    user = _user_name(uid)
    try:
        user = os.path.basename(_inductor_cache(os.path.dirname(torch.__file__ or ""))).partition("_")[2]  # noqa: PTH119, PTH120
    except (KeyError, OSError) as error:
        tell(
            f"torch.compile does not work for uid {uid}, which has no name",
            why=f"{type(error).__name__}: {error}: the name is part of its cache directory",
            remedy="set LOGNAME in the image, to any name; from torch 2.13 on it works without",
            mode="F53",
            blame=Blame.IMAGE,
        )
    places = caches(os.environ, home_of(os.environ, probe.request.declared), user)
    probe.saw(uid=uid, user=user, caches={one.variable: one.path for one in places})
    for place, blocked in blocked_by(places, uid, gids).items():
        _tell_blocked(tell, place, blocked, uid)
    probe.detail(f"uid {uid} in group {os.getegid()}, as {user}")


def _inductor_cache(torch: str) -> str:
    """Return where Inductor would keep its cache; by its own file, without the two seconds that importing it takes."""
    path = os.path.join(torch, "_inductor", "runtime", "cache_dir_utils.py")  # noqa: PTH118
    spec = importlib.util.spec_from_file_location("torchyard_cache_dir_utils", path)
    if os.path.isfile(path) and spec is not None and spec.loader is not None:  # noqa: PTH113
        module = importlib.util.module_from_spec(spec)
        with contextlib.suppress(ImportError):
            spec.loader.exec_module(module)
            return str(module.default_cache_dir())
    return f"torchinductor_{getpass.getuser()}"
