"""The bootstrap base: Debian packages, locked once and fetched by hash → one reproducible root file system."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from builder import debian, layout, tar
from builder.baselock import RELOCK, SCHEMA, BaseLock, dumps, loads
from builder.bootstrap import PATH, bootstrap, require_locked
from builder.debian import Deb
from builder.errors import HashMismatchError, LockError, SourceError
from builder.layout import Descriptor
from builder.rootfs import GID, UID, USER, canonical
from builder.store import Store

__all__ = [
    "ENV",
    "GID",
    "PATH",
    "RECIPE",
    "SCHEMA",
    "UID",
    "USER",
    "BaseImage",
    "BaseLock",
    "Deb",
    "Progress",
    "dumps",
    "fetch",
    "loads",
    "lock",
    "make",
]

# Raise it with every change of what `make` puts into an image: it is part of the cache's key.
RECIPE = 1

ENV = (f"PATH={PATH}", "LANG=C.UTF-8")

Progress = Callable[[str, int, int], None]
"""Called with what was just done, how much is done and how much there is (`fetch`: bytes, `make`: steps)."""


def lock(*, suite: str, architecture: str, packages: Iterable[str], previous: BaseLock | None = None) -> BaseLock:
    """Resolve what a minimal Debian with apt and `packages` consists of now, with updates and security fixes.

    Nothing is downloaded but the signed package lists. Where the packages come out as in `previous`, that
    lock is returned as it was: mirrors are re-signed several times a day, and a new date alone is no reason
    for a new image. Raises SourceError if no mirror serves the suite, ToolError if apt cannot resolve it.
    """
    asked = tuple(sorted(set(packages)))
    names = ((name, debian.NAME, "package name") for name in asked)
    for value, pattern, what in ((suite, debian.SUITE, "suite"), *names):
        if not pattern.fullmatch(value):
            raise LockError(f"not a {what}: {value!r}", tries=("correct it in matrix.yaml",))
    if architecture not in debian.ARCHITECTURES:
        raise LockError(f"no base for {architecture!r}", tries=(f"one of: {', '.join(debian.ARCHITECTURES)}",))
    now = debian.resolve(suite=suite, architecture=architecture, packages=asked)
    made = BaseLock(suite=suite, architecture=architecture, packages=asked, epoch=now.epoch, debs=now.debs)
    if previous is not None and replace(previous, epoch=made.epoch) == made:
        return previous
    return made


def fetch(lock: BaseLock, store: Store, progress: Progress | None = None) -> None:
    """Bring every package of `lock` into the store, by its hash; those already there cost nothing.

    Raises HashMismatchError if a mirror serves other bytes, SourceError, naming them, if some cannot be had.
    """
    missing = [deb for deb in lock.debs if not store.has(deb.sha256, size=deb.size)]
    if not missing:
        return
    done = lock.size - sum(deb.size for deb in missing)

    def arrived(deb: Deb) -> None:
        nonlocal done
        done += deb.size
        if progress:
            progress(f"{deb.name} {deb.version}", done, lock.size)

    with store.scratch(f"fetch-{lock.digest}") as scratch:
        lost = debian.fetch(missing, store, scratch, architecture=lock.architecture, arrived=arrived)
    if lost is None:
        return
    shown = [f"{deb.name} {deb.version}" for deb in lost.debs[:5]]
    if len(lost.debs) > len(shown):
        shown.append("…")
    raise SourceError(
        f"{len(lost.debs)} of {len(lock.debs)} packages could not be fetched: {', '.join(shown)}",
        where=f"base {lock.name}",
        why=lost.why or "this machine's apt sources name no Debian mirror",
        tries=(
            "if the network or the mirror is at fault, run it again: what was fetched is kept",
            f"if the mirror no longer has these versions, they were superseded: {RELOCK}",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class BaseImage:
    """A base as an OCI layout: `digest` names its manifest, `epoch` dates its files."""

    layout: Path
    digest: str
    config_digest: str
    layer: Descriptor
    diff_id: str
    architecture: str
    epoch: int
    env: tuple[str, ...] = ENV
    user: str = USER
    uid: int = UID
    gid: int = GID


def make(lock: BaseLock, store: Store, progress: Progress | None = None) -> BaseImage:
    """Make the base of `lock` from packages in the store, without network; a second call returns the first's.

    Raises ToolError if mmdebstrap is missing or fails, or if this machine cannot run the architecture's
    programs; SourceError if packages were not fetched.
    """
    key = hashlib.sha256(layout.canonical_json({"lock": lock.digest, "recipe": RECIPE})).hexdigest()
    directory = store.root / "layouts" / f"base-{lock.name}-{key[:16]}"
    image = _kept(directory, store)
    if image is None:
        name = f"base-{key[:16]}"
        with _outlived(store, f"bootstrap-{name}") as descriptor, store.scratch(name) as scratch:
            # Whoever held the lock before may have made it.
            image = _kept(directory, store)
            if image is None:
                image = _make(lock, store, scratch, progress or (lambda *_: None), descriptor=descriptor)
                layout.write(directory, store, image, tag=lock.name)
    (layer,) = image.layers
    return BaseImage(
        layout=directory,
        digest=image.manifest.digest,
        config_digest=image.config.digest,
        layer=layer.blob,
        diff_id=layer.diff_id,
        architecture=lock.architecture,
        epoch=lock.epoch,
    )


def _kept(directory: Path, store: Store) -> layout.Image | None:
    """Return the base that was made before, None if there is none or it was damaged since.

    A blob that the store lacks may have been removed there because it was damaged, and the layout's is the same file.
    """
    image = layout.read(directory)
    missing = [blob for blob in image.blobs if not store.has(blob.sha256, size=blob.size)] if image else []
    if image is not None and missing:
        try:
            layout.verify(directory, image)
        except HashMismatchError:
            shutil.rmtree(directory)
            return None
        for blob in missing:
            with contextlib.suppress(FileExistsError):  # another process was faster
                store.path(blob.sha256).hardlink_to(directory / "blobs" / "sha256" / blob.sha256)
    return image


@contextlib.contextmanager
def _outlived(store: Store, name: str) -> Iterator[int]:
    """Hold a lock that processes which inherit its descriptor hold as well.

    After a kill -9 of torchyard alone its programs may work on, and whoever cleared their directory meanwhile
    would find files coming back. So the next run waits until the last of them has ended.
    """
    with (store.root / "locks" / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _make(lock: BaseLock, store: Store, scratch: Path, progress: Progress, *, descriptor: int) -> layout.Image:
    steps = itertools.count(1)

    def tell(step: str) -> None:
        progress(step, next(steps), 4)

    raw = bootstrap(lock, store, scratch, inherit=(descriptor,), tell=tell)
    with raw.open("rb") as file:
        found = tar.read(file)
        require_locked(lock, found)
        entries = canonical(found, suite=lock.suite, epoch=lock.epoch)
        layer = layout.gzip_layer(store, tar.stream(entries), scratch=scratch)
    tell("layer")
    image = layout.assemble(
        store,
        architecture=lock.architecture,
        config={"Env": list(ENV), "Cmd": ["/bin/bash"]},
        epoch=lock.epoch,
        layers=(layer,),
        history=(layout.History(created_by=f"torchyard base, recipe {RECIPE}, lock sha256:{lock.digest}"),),
    )
    tell("image")
    return image
