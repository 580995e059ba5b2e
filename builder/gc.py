"""What the store keeps for nobody: what no lock of the matrix leads to, and what is old; named, and removed.

It starts from what the locks name and from images that were made lately, and follows what documents and recipes name.
Of what it does not reach it takes only files that it knows how to make or fetch again. Other matrices that share the
store lose what they have not used lately, and get it back the same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import base as bases
from builder import layout
from builder.engines.oci import recipe
from builder.export import zstd_key
from builder.registry import CONFIG_MAX
from builder.render import Plan
from builder.schema import ImageBase
from builder.store import Store

KINDS: Mapping[str, str] = {
    "proofs": "proofs of images",
    "verdicts": "verdicts of validations",
    "layers": "notes of which layer was made of what",
    "zstd": "notes of layers compressed by zstd",
    "contents": "sizes of layers by package",
    "recipes": "recipes of layers",
    "layouts": "bases",
    "blobs": "wheels, Debian packages, layers and documents",
    "partial": "files that did not come whole",
    "work": "what killed runs left",
}
"""In the order in which they are removed: what names others before these, so that a kill leaves no broken name."""
LEVELS = range(1, 23)
"""Of zstd, all that there are."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BASE = re.compile(r"base-.+-[0-9a-f]{16}")
_EXCLUSIVE = ("build-", "push-")
"""How the names of locks begin that who builds or publishes a cell holds from beginning to end."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A file or directory that nobody needs."""

    kind: str
    path: Path
    size_bytes: int
    """That its removal frees; of files with several names, with the last of them."""


# ----------------------------------------------------------------------------------------------------
# What is needed


@dataclass(kw_only=True)
class _Needed:
    """What was reached, by SHA-256 in hex where it is nothing else."""

    store: Store
    plans: set[str] = field(default_factory=set)
    """Digests of plans."""
    documents: set[str] = field(default_factory=set)
    """Manifests, indexes and configurations."""
    blobs: set[str] = field(default_factory=set)
    diff_ids: set[str] = field(default_factory=set)
    layouts: set[Path] = field(default_factory=set)

    def plan(self, plan: Plan) -> None:
        """Reach what a plan is made from."""
        self.plans.add(plan.digest)
        self.blobs.update(wheel.sha256 for wheel in plan.lock.wheels)
        for lock in (plan.base_lock, plan.system_lock):
            self.blobs.update(deb.sha256 for deb in (lock.debs if lock is not None else ()))
        if plan.base_lock is not None:
            self.layout(bases.place(plan.base_lock, self.store))
            self.layout(bases.place(plan.base_lock, self.store, plan.system_lock))
        if isinstance(plan.cell.base, ImageBase):
            self.document(plan.cell.base.image.rpartition("@")[2])

    def layout(self, directory: Path) -> None:
        """Reach a base, if it was made."""
        self.layouts.add(directory)
        image = layout.read(directory)
        if image is not None:
            self.blobs.update(blob.sha256 for blob in image.blobs)
            self.diff_ids.update(layer.diff_id.removeprefix("sha256:") for layer in image.layers)

    def document(self, digest: object) -> None:
        """Reach a manifest, an index or a configuration, and all that it names."""
        todo = [digest]
        while todo:
            sha256 = _sha256(todo.pop())
            if sha256 is None or sha256 in self.documents:
                continue
            self.documents.add(sha256)
            self.blobs.add(sha256)
            found = _json(self.store.path(sha256))
            todo += [_named(one) for one in (found.get("config"), *_list(found.get("manifests")))]
            for one in _list(found.get("layers")):
                self.layer(_named(one))
            rootfs = found.get("rootfs")
            diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
            self.diff_ids.update(filter(None, map(_sha256, _list(diff_ids))))

    def layer(self, digest: object) -> None:
        """Reach a layer, whether the store has its bytes or a recipe for them."""
        sha256 = _sha256(digest)
        if sha256 is not None and sha256 not in self.blobs:
            self.blobs.add(sha256)
            made = recipe.find(self.store, sha256)
            self.blobs.update(made.sources if made is not None else ())


def _sha256(digest: object) -> str | None:
    """Return what stands behind the name of the hash; None for whatever is no such digest."""
    text = digest.removeprefix("sha256:") if isinstance(digest, str) else ""
    return text if _SHA256.fullmatch(text) else None


def _named(descriptor: object) -> object:
    return descriptor.get("digest") if isinstance(descriptor, dict) else None


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one if it is gone, too large for one, or none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= CONFIG_MAX:
            found = json.loads(path.read_bytes())
            return found if isinstance(found, dict) else {}
    return {}


def _needed(store: Store, plans: Iterable[Plan], *, before: float) -> _Needed:
    needed = _Needed(store=store)
    for plan in plans:
        needed.plan(plan)
    for path in _proofs(store):
        if path.stem in needed.plans or _time(path) >= before:
            needed.document(_json(path).get("digest"))
    # A layer of wheels that are needed will be as well, whatever image it was made for.
    for path in _files(store, "recipes", ".json"):
        made = recipe.find(store, path.stem)
        if made is not None and needed.blobs.issuperset(made.sources[1:]):
            needed.layer(path.stem)
    for path in _known_zstd(store, needed.diff_ids):
        needed.layer(_json(path).get("digest"))
    return needed


def _known_zstd(store: Store, diff_ids: Iterable[str]) -> Iterator[Path]:
    if not (store.root / "zstd").is_dir():
        return
    for diff_id in diff_ids:
        for level in LEVELS:
            path = store.root / "zstd" / f"{zstd_key(f'sha256:{diff_id}', level)}.json"
            if path.is_file():
                yield path


# ----------------------------------------------------------------------------------------------------
# What is there


def _time(path: Path) -> float:
    """Return when a file was written; of one that is gone, that it is as young as can be."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return float("inf")


def _files(store: Store, kind: str, suffix: str = "") -> Iterator[Path]:
    """Yield the files of a directory of the store that are named by a SHA-256."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted((store.root / kind).iterdir()):
            if path.suffix == suffix and _SHA256.fullmatch(path.stem) and path.is_file() and not path.is_symlink():
                yield path


def _proofs(store: Store) -> Iterator[Path]:
    """Yield the records of images that were proven, whichever engine made them."""
    with contextlib.suppress(FileNotFoundError):
        for directory in sorted((store.root / "proofs").iterdir()):
            if directory.name != "verdicts":
                yield from _files(store, f"proofs/{directory.name}", ".json")


def _left(store: Store, needed: _Needed) -> Iterator[tuple[str, Path]]:
    """Yield what was not reached, of whatever age, with its kind."""
    yield from (("proofs", path) for path in _proofs(store) if path.stem not in needed.plans)
    for path in sorted((store.root / "proofs" / "verdicts").glob("*/t[1-9].json")):
        if _SHA256.fullmatch(path.parent.name) and path.parent.name not in needed.documents:
            yield "verdicts", path
    for path in _files(store, "layers", ".json"):
        sha256 = _sha256(_named(_json(path).get("blob")))
        if sha256 is not None and sha256 not in needed.blobs:
            yield "layers", path
    zstd = set(_known_zstd(store, needed.diff_ids))
    yield from (("zstd", path) for path in _files(store, "zstd", ".json") if path not in zstd)
    yield from (("contents", path) for path in _files(store, "contents", ".json") if path.stem not in needed.diff_ids)
    yield from (("recipes", path) for path in _files(store, "recipes", ".json") if path.stem not in needed.blobs)
    for path in sorted((store.root / "layouts").iterdir()):
        if _BASE.fullmatch(path.name) and path.is_dir() and path not in needed.layouts:
            yield "layouts", path
    yield from (("blobs", path) for path in _files(store, "blobs") if path.stem not in needed.blobs)
    yield from (("partial", path) for path in _files(store, "partial"))
    yield from (("work", path) for path in sorted((store.root / "work").iterdir()) if path.is_dir())


# ----------------------------------------------------------------------------------------------------
# What is garbage


def find(store: Store, plans: Iterable[Plan], *, before: float) -> tuple[Garbage, ...]:
    """Return what neither the plans nor an image that was made after the time `before` needs, and is older than that.

    What somebody is working on is left out.
    """
    needed = _needed(store, plans, before=before)
    names: Counter[tuple[int, int]] = Counter()
    found = []
    for kind, path in _left(store, needed):
        if _time(path) < before and not _is_held(store, kind, path):
            size = sum(_freed(file, names) for file in _below(path))
            found.append(Garbage(kind=kind, path=path, size_bytes=size))
    return tuple(found)


def _below(path: Path) -> Iterator[Path]:
    """Yield the file, or the files below the directory."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for directory, _, files in os.walk(path):
        yield from (Path(directory) / name for name in files)


def _freed(path: Path, names: Counter[tuple[int, int]]) -> int:
    """Return what the removal of a file frees; its bytes go with the last of its names, and bases share theirs."""
    try:
        about = path.lstat()
    except OSError:
        return 0
    file = (about.st_dev, about.st_ino)
    names[file] += 1
    return about.st_size if names[file] == about.st_nlink else 0


def _lock_of(kind: str, path: Path) -> str | None:
    """Return the name of the lock that whoever writes there holds, of those kinds that are never finished."""
    return {"partial": path.name, "work": f"work-{path.name}"}.get(kind)


@contextlib.contextmanager
def _held(store: Store, name: str | None) -> Iterator[bool]:
    """Hold a lock unless somebody else does; tells whether it is held. Without a name there is nothing to hold."""
    if name is None:
        yield True
        return
    with (store.root / "locks" / name).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_held(store: Store, kind: str, path: Path) -> bool:
    with _held(store, _lock_of(kind, path)) as mine:
        return not mine


# ----------------------------------------------------------------------------------------------------
# Removing


@contextlib.contextmanager
def alone(store: Store, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the locks of all builds and pushes that the store has seen: they wait for us, and we for those that run.

    `waiting` hears the lock's name of each that has to be waited for.
    """
    with contextlib.ExitStack() as stack:
        for path in sorted((store.root / "locks").iterdir()):
            if path.name.startswith(_EXCLUSIVE):
                with _held(store, path.name) as mine:
                    if not mine:
                        waiting(path.name)
                stack.enter_context(store.lock(path.name))
        yield


def remove(store: Store, garbage: Collection[Garbage], *, before: float) -> tuple[Garbage, ...]:
    """Remove it and return what was removed; what is in use again, or was written again meanwhile, stays."""
    order = {kind: number for number, kind in enumerate(KINDS)}
    removed = []
    for one in sorted(garbage, key=lambda it: order[it.kind]):
        with _held(store, _lock_of(one.kind, one.path)) as mine:
            if not mine or _time(one.path) >= before:
                continue
            if one.path.is_dir():
                shutil.rmtree(one.path, ignore_errors=True)
            else:
                one.path.unlink(missing_ok=True)
            if one.kind == "verdicts":
                with contextlib.suppress(OSError):  # another tier's is there
                    one.path.parent.rmdir()
            if not one.path.exists():
                removed.append(one)
    return tuple(removed)
