"""The bootstrap base: Debian packages, locked once and fetched by hash → one reproducible root file system."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import itertools
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from builder import debian, layout, tar
from builder.baselock import RELOCK, SCHEMA, BaseLock, dumps, loads
from builder.bootstrap import PATH, bootstrap, require_locked
from builder.debian import Deb
from builder.difference import difference
from builder.errors import HashMismatchError, LockError, SourceError, ToolError
from builder.layout import Descriptor, Layer
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
    "place",
]

# Raise it with every change of what `make` puts into an image: it is part of the cache's key.
RECIPE = 1

ENV = (f"PATH={PATH}", "LANG=C.UTF-8")
CONFIG = {"Env": list(ENV), "Cmd": ["/bin/bash"]}

Progress = Callable[[str, int, int], None]
"""Called with what was just done, how much is done and how much there is (`fetch`: bytes, `make`: steps)."""


def lock(
    *,
    suite: str,
    architecture: str,
    packages: Iterable[str],
    systems: Iterable[Iterable[str]] = (),
    previous: Iterable[BaseLock] = (),
    keep: BaseLock | None = None,
) -> tuple[BaseLock, ...]:
    """Resolve what a minimal Debian with apt and `packages` consists of now, with updates and security fixes.

    The first lock is that base's. One follows for each of `systems`: the packages of the base in the very same
    versions, and what the names of the system bring besides. With `keep`, a lock of the base, that one stays, and
    those of `previous` that go with it, if the mirror still has all that the new ones need; if not, all are made anew.

    Nothing is downloaded but the signed package lists, once for all. Where the packages come out as in one of
    `previous`, that lock is returned as it was: mirrors are re-signed several times a day, and a new date alone is no
    reason for a new image. Raises SourceError if no mirror serves the suite, ToolError if apt cannot resolve it.
    """
    asked = tuple(sorted(set(packages)))
    extended = [tuple(sorted({*asked, *system})) for system in systems]
    every = ((name, debian.NAME, "package name") for name in sorted({*asked, *itertools.chain(*extended)}))
    for value, pattern, what in ((suite, debian.SUITE, "suite"), *every):
        if not pattern.fullmatch(value):
            raise LockError(f"not a {what}: {value!r}", tries=("correct it in matrix.yaml",))
    if architecture not in debian.ARCHITECTURES:
        raise LockError(f"no base for {architecture!r}", tries=(f"one of: {', '.join(debian.ARCHITECTURES)}",))
    earlier = tuple(previous)

    def locked(packages: tuple[str, ...], now: debian.Resolution) -> BaseLock:
        made = BaseLock(suite=suite, architecture=architecture, packages=packages, epoch=now.epoch, debs=now.debs)
        return next((one for one in earlier if replace(one, epoch=made.epoch) == made), made)

    def on(base: BaseLock, settled: Mapping[tuple[str, ...], BaseLock]) -> tuple[BaseLock, ...]:
        made = dict(settled)
        for names in extended:
            if names not in made:
                made[names] = locked(names, archive.extend(base.debs, names))
        return (base, *(made[names] for names in extended))

    with debian.archive(suite=suite, architecture=architecture) as archive:
        if keep is not None:
            # apt has many words for a package that it has no longer; whatever else it complains of, it does again.
            with contextlib.suppress(ToolError):
                return on(keep, {one.packages: one for one in earlier if not one.lacking(keep)})
        return on(locked(asked, archive.resolve(asked)), {})


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
    """A base as an OCI layout: `digest` names its manifest, `epoch` dates its files.

    Its layers are `layer` and, if there are system packages on top of it, `system`.
    """

    layout: Path
    digest: str
    config_digest: str
    layer: Descriptor
    diff_id: str
    architecture: str
    epoch: int
    system: Layer | None = None
    env: tuple[str, ...] = ENV
    user: str = USER
    uid: int = UID
    gid: int = GID


def make(lock: BaseLock, store: Store, progress: Progress | None = None, system: BaseLock | None = None) -> BaseImage:
    """Make the base of `lock` from packages in the store, without network; a second call returns the first's.

    With `system`, a lock of the same packages and more, what the further ones change is a layer of its own on top of
    the base's. Raises LockError if they are not the same; ToolError if mmdebstrap is missing or fails, or if this
    machine cannot run the architecture's programs; SourceError if packages were not fetched; HashMismatchError if the
    base's layer was damaged in the store, which a second call makes anew.
    """
    report = progress or (lambda *_: None)
    if system is not None and (lacking := system.lacking(lock)):
        raise LockError(
            f"the system packages are not locked on top of this base: {', '.join(lacking[:5])}",
            where=f"base {lock.name}",
            why="their lock lacks packages of the base's, or has them in other versions",
            tries=(f"lock both together: {RELOCK}",),
        )
    if system is None:
        directory, image = _bottom(lock, store, report)
    else:
        directory, image = _once(
            place(lock, store, system),
            lock,
            store,
            lambda scratch, held: _extend(lock, system, store, scratch, report, descriptor=held),
        )
    bottom, *top = image.layers
    return BaseImage(
        layout=directory,
        digest=image.manifest.digest,
        config_digest=image.config.digest,
        layer=bottom.blob,
        diff_id=bottom.diff_id,
        architecture=lock.architecture,
        epoch=lock.epoch,
        system=top[0] if top else None,
    )


def _bottom(lock: BaseLock, store: Store, progress: Progress) -> tuple[Path, layout.Image]:
    """Return the layout of the base alone, and its image."""
    return _once(
        place(lock, store), lock, store, lambda scratch, held: _make(lock, store, scratch, progress, descriptor=held)
    )


def place(lock: BaseLock, store: Store, system: BaseLock | None = None) -> Path:
    """Return where the layout of a base lies, or would, with what `system` lays on it."""
    key = {"lock": lock.digest, "recipe": RECIPE} | ({} if system is None else {"system": system.digest})
    digest = hashlib.sha256(layout.canonical_json(key)).hexdigest()[:16]
    return store.root / "layouts" / f"base-{lock.name}-{digest}"


def _once(
    directory: Path, lock: BaseLock, store: Store, make: Callable[[Path, int], layout.Image]
) -> tuple[Path, layout.Image]:
    """Return a layout and its image, made now unless it was before.

    `make` is given a directory to work in and a descriptor for its programs to hold.
    """
    image = _kept(directory, store)
    if image is None:
        name = f"base-{directory.name.rpartition('-')[2]}"
        with _outlived(store, f"bootstrap-{name}") as descriptor, store.scratch(name) as scratch:
            # Whoever held the lock before may have made it.
            image = _kept(directory, store)
            if image is None:
                image = make(scratch, descriptor)
                layout.write(directory, store, image, tag=lock.name)
    return directory, image


def _kept(directory: Path, store: Store) -> layout.Image | None:
    """Return the base that was made before, None if there is none or it was damaged since.

    A blob that the store lacks may have been removed there because it was damaged, and the layout's is the same file.
    """
    image = layout.read(directory)
    if image is None:
        return None
    missing = [blob for blob in image.blobs if not store.has(blob.sha256, size=blob.size)]
    if missing:
        try:
            layout.verify(directory, image)
        except HashMismatchError:
            shutil.rmtree(directory)
            return None
    for blob in image.blobs:
        path = directory / "blobs" / "sha256" / blob.sha256
        if blob in missing:
            with contextlib.suppress(FileExistsError):  # another process was faster
                store.path(blob.sha256).hardlink_to(path)
        else:
            # Layouts share the base's layer: made anew for one after it was damaged, it is the old file in the others.
            layout.link(store.path(blob.sha256), path)
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
        config=CONFIG,
        epoch=lock.epoch,
        layers=(layer,),
        history=(_history(lock),),
    )
    tell("image")
    return image


def _history(lock: BaseLock) -> layout.History:
    return layout.History(created_by=f"torchyard base, recipe {RECIPE}, lock sha256:{lock.digest}")


def _extend(
    lock: BaseLock, system: BaseLock, store: Store, scratch: Path, progress: Progress, *, descriptor: int
) -> layout.Image:
    """Make a second file system, of the packages of `system`, and lay what it has more on the base of `lock`."""
    _, below = _bottom(lock, store, progress)
    steps = itertools.count(1)
    names = ", ".join(sorted({*system.packages} - {*lock.packages}))

    def tell(step: str) -> None:
        progress(f"{names}: {step}", next(steps), 5)

    # Dated like the base: whatever a package writes the date into is then the same in both.
    raw = bootstrap(replace(system, epoch=lock.epoch), store, scratch, inherit=(descriptor,), tell=tell)
    base = scratch / "base.tar"
    _unpack(below.layers[0], store, base)
    with raw.open("rb") as upper, base.open("rb") as lower:
        found = tar.read(upper)
        require_locked(system, found)
        entries = difference(
            tar.read(lower).values(), canonical(found, suite=lock.suite, epoch=lock.epoch), epoch=system.epoch
        )
        tell("difference")
        layer = layout.gzip_layer(store, tar.stream(entries), scratch=scratch)
    tell("layer")
    image = layout.assemble(
        store,
        architecture=lock.architecture,
        config=CONFIG,
        epoch=max(lock.epoch, system.epoch),
        layers=(*below.layers, layer),
        history=(
            _history(lock),
            layout.History(created_by=f"torchyard system packages: {names}, lock sha256:{system.digest}"),
        ),
    )
    tell("image")
    return image


def _unpack(layer: Layer, store: Store, path: Path) -> None:
    """Write the tar inside a layer of ours to `path`; raises HashMismatchError if it was damaged in the store."""
    got = hashlib.sha256()
    try:
        with gzip.open(store.path(layer.blob.sha256)) as packed, path.open("wb") as file:
            while piece := packed.read(1 << 20):
                got.update(piece)
                file.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        got = hashlib.sha256()
    if f"sha256:{got.hexdigest()}" != layer.diff_id:
        store.verify(layer.blob.sha256)
        raise HashMismatchError(
            "the layer of the base was damaged in the store",
            where=str(store.path(layer.blob.sha256)),
            why="what it holds is not what its digest promises",
            tries=("run it again: it was removed, and is made anew",),
        )
