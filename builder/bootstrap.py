"""One run of mmdebstrap: exactly the locked packages, offline, into a tar."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import os
import platform
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from builder import program
from builder.baselock import RELOCK, BaseLock
from builder.debian import INSTEAD, Deb, parse_stanzas
from builder.errors import CellFailedError, LockError, SourceError, ToolError
from builder.store import Store
from builder.tar import Entry

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def bootstrap(
    lock: BaseLock, store: Store, scratch: Path, *, inherit: tuple[int, ...] = (), tell: Callable[[str], None]
) -> Path:
    """Make a file system of the packages of `lock`, which are in the store, and return its tar in `scratch`.

    All its processes keep the descriptors `inherit` open; `tell` is called with each of the two steps done. Raises
    ToolError if mmdebstrap is missing or fails, or if this machine cannot run the architecture's programs; SourceError
    if packages were not fetched.
    """
    _require_architecture(lock.architecture)
    mmdebstrap = program.find(
        "mmdebstrap", package="mmdebstrap", purpose="make a base from Debian packages", tries=INSTEAD
    )
    if lost := [deb for deb in lock.debs if not store.has(deb.sha256, size=deb.size)]:
        raise SourceError(
            f"{len(lost)} packages of the base are not in the store: {lost[0].name} {lost[0].version}, …",
            where=f"base {lock.name}",
            tries=("torchyard fetch brings them",),
        )
    tar = scratch / "raw.tar"
    with _repository(lock, store, scratch) as repository:
        tell("package index")
        _run(mmdebstrap, lock, repository, scratch, tar, inherit=inherit)
    tell("mmdebstrap")
    return tar


def require_locked(lock: BaseLock, entries: Mapping[str, Entry]) -> None:
    """Compare what dpkg says is installed with the lock: observed = declared."""
    installed = {
        (stanza["Package"], stanza["Version"], stanza["Architecture"])
        for stanza in parse_stanzas(entries["var/lib/dpkg/status"].read().decode())
        if stanza["Status"] == "install ok installed"
    }
    locked = {(deb.name, deb.version, deb.architecture) for deb in lock.debs}
    if installed != locked:
        more = ", ".join(" ".join(one) for one in sorted(installed - locked))
        less = ", ".join(" ".join(one) for one in sorted(locked - installed))
        raise CellFailedError(
            "what was installed is not what is locked",
            where=f"base {lock.name}",
            why=f"not locked: {more or 'none'}; not installed: {less or 'none'}",
            tries=(RELOCK,),
        )


def _require_architecture(architecture: str) -> None:
    native = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if architecture == native:
        return
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[architecture]
    handler = Path(f"/proc/sys/fs/binfmt_misc/qemu-{machine}")
    with contextlib.suppress(OSError):
        if handler.read_text().startswith("enabled"):
            return
    raise ToolError(
        f"this machine cannot make a base for {architecture}",
        why=f"it is {native}, and packages' set-up scripts must run; no emulator is registered ({handler})",
        tries=(f"make it on a machine that is {architecture}", "apt-get install qemu-user-static binfmt-support"),
    )


@contextlib.contextmanager
def _repository(lock: BaseLock, store: Store, scratch: Path) -> Iterator[Path]:
    """Yield a flat apt repository of exactly the locked packages."""
    with contextlib.ExitStack() as stack:
        directory = scratch / "repository"
        names = {f"{deb.sha256}.deb": deb.sha256 for deb in lock.debs}
        if os.geteuid() == 0:
            store.link(directory, names)
        else:
            # Without root mmdebstrap works as another user, who may not enter our store: lend it a copy.
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchyard-debs-")))
            directory.chmod(0o755)
            for name, sha256 in names.items():
                shutil.copyfile(store.path(sha256), directory / name)
                (directory / name).chmod(0o644)
        with ThreadPoolExecutor() as pool:
            stanzas = list(pool.map(lambda deb: _stanza(deb, directory / f"{deb.sha256}.deb"), lock.debs))
        index = "\n".join(stanzas).encode()
        (directory / "Packages").write_bytes(index)
        (directory / "Release").write_text(
            f"Origin: torchyard\nSuite: {lock.suite}\nCodename: {lock.suite}\n"
            f"Architectures: {lock.architecture} all\n"
            f"Date: {email.utils.formatdate(lock.epoch, usegmt=True)}\n"
            f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
        )
        yield directory


def _stanza(deb: Deb, path: Path) -> str:
    """Return the package's own fields with those an index adds; raises LockError if it is another package."""
    control = program.run(["dpkg-deb", "--field", path], purpose=f"read {deb.name} {deb.version}")
    (fields,) = parse_stanzas(control)
    got = (fields.get("Package"), fields.get("Version"), fields.get("Architecture"))
    if got != (deb.name, deb.version, deb.architecture):
        raise LockError(
            f"what was locked as {deb.name} {deb.version} {deb.architecture} is {' '.join(map(str, got))}",
            why=f"its sha256 is as locked: {deb.sha256}",
            tries=(RELOCK,),
        )
    return f"{control.rstrip()}\nFilename: ./{path.name}\nSize: {deb.size}\nSHA256: {deb.sha256}\n"


def _run(
    mmdebstrap: str, lock: BaseLock, repository: Path, scratch: Path, tar: Path, *, inherit: tuple[int, ...]
) -> None:
    root = os.geteuid() == 0
    # The links that newer suites' base-files ships; with them in place `usrmerge` has nothing to convert.
    libraries = "lib lib64" if lock.architecture == "amd64" else "lib"
    merged = f'for d in bin sbin {libraries}; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done'
    options = [
        "--quiet",
        f"--mode={'root' if root else 'unshare'}",
        "--variant=apt",
        "--format=tar",
        f"--architectures={lock.architecture}",
        # Every name: apt has nothing left to choose, and what it installs is compared with the lock.
        f"--include={','.join(deb.name for deb in lock.debs)}",
        f"--setup-hook={merged}",
    ]
    source = f"deb [trusted=yes] copy:{urllib.parse.quote(str(repository))} ./"
    environment = {
        "PATH": PATH,
        "HOME": os.environ.get("HOME", "/"),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": str(lock.epoch),
    }
    # As root mmdebstrap mounts /proc and /sys where everybody sees them, and a kill leaves them mounted:
    # whoever then clears its directory walks through the machine's own. In namespaces of their own, mounts
    # and processes go with the process that made them, which goes with us.
    namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    fence = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
    if root:
        environment["TMPDIR"] = str(scratch)
        tries: tuple[str, ...] = (
            "as root it needs to mount and to make namespaces: a plain container may forbid that",
        )
    else:
        fence = []
        tries = (
            "without root it needs user namespaces: apt-get install uidmap",
            "give this user lines in /etc/subuid and /etc/subgid",
            "or run it as root",
        )
    program.run(
        [*fence, mmdebstrap, *options, lock.suite, tar, source],
        purpose="make a file system of the locked packages",
        env=environment,
        inherit=inherit,
        tries=tries,
    )
