"""An image made again from its lock alone, in a store where nothing was before, and compared with what there is of it.

What is taken from the user's store is what the locks name, wheels and Debian packages, and each is hashed again first.
All that was derived from them, the base and the layers among it, is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import __version__, attestation, export, gate, layout, referrers, registry
from builder import build as builds
from builder.attestation import Beside
from builder.build import Reporter, StoreSession, require_disk
from builder.compare import Group, Subject, compare, grouped
from builder.engines.oci import OciEngine, recipe
from builder.errors import HashMismatchError, ImpossibleError, MatrixError
from builder.fetching import Progress
from builder.index import Configuration, Index
from builder.layout import Descriptor, Image
from builder.provenance import Made
from builder.render import Plan
from builder.schema import BootstrapBase
from builder.statement import Predicate
from builder.store import Store
from builder.upload import Target, manifest_of

ROOM = 3 << 30
"""Bytes that are free before anything is built: the base's file system twice, its tar and its layer."""
HERE = "the image of your store"
_OFFLINE = Configuration(default_index="https://nowhere.invalid/", no_index=True)
"""All that is needed is there before the build."""
_KEPT = ("PATH",)
_OF_REGISTRIES = (
    "HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "CONTAINERS_REGISTRIES_CONF",
    "TORCHYARD_REGISTRY", "TORCHYARD_INSECURE_REGISTRIES",
)  # fmt: skip
"""Variables that say which registry a base's short name means; which bytes it means, its digest says."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """An image, and the same one made again."""

    cell_id: str
    against: str
    """What it was compared with: an image of the store, or a reference."""
    expected: str
    """Digest that it should have."""
    rebuilt: str
    """Digest that it has."""
    seconds: float
    """What making it took."""
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether the two are the same, byte for byte."""
        return self.expected == self.rebuilt

    def as_json(self) -> dict[str, Any]:
        """Return it as it is shown to machines."""
        return {
            "id": self.cell_id,
            "against": self.against,
            "same": self.is_same,
            "expected": self.expected,
            "rebuilt": self.rebuilt,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "differences": [group.as_json() for group in self.groups],
        }


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where images are made again, and from what."""

    store: Store
    """The user's: locked files are taken from it, and brought into it."""
    index: Index
    report: Reporter
    directory: Path | None = None
    """Where clean stores are made; without one, in the user's store."""

    @contextlib.contextmanager
    def clean(self, name: str) -> Iterator[Store]:
        """Yield an empty store; it is gone afterwards."""
        if self.directory is None:
            with self.store.scratch(f"reproduce-{name}") as scratch:
                yield Store.open(scratch)
        else:
            with tempfile.TemporaryDirectory(prefix="torchyard-reproduce-", dir=self.directory) as scratch:
                yield Store.open(Path(scratch))

    def make(self, plan: Plan, clean: Store) -> tuple[Image, float]:
        """Make a plan's image in a clean store; returns it, and the seconds that took.

        Raises DiskError before anything is done if there is no room, and as `build.Session.build` does.
        """
        files = _files(plan)
        apart = self.store.root.stat().st_dev != clean.root.stat().st_dev
        require_disk(clean.root, ROOM + (sum(files.values()) if apart else 0), f"make {plan.cell.id} again")
        self._bring(f"{plan.cell.id}: locked files", clean, lambda: self._locked(plan, files))
        if not isinstance(plan.cell.base, BootstrapBase):
            self._bring(f"{plan.cell.id}: its base", clean, lambda: self._base(plan))
        started = time.monotonic()
        with _bare_environment(clean.root / "work", keep=_KEPT if plan.base_lock else (*_KEPT, *_OF_REGISTRIES)):
            session = StoreSession(
                builder=OciEngine(), host=None, index=Index(configuration=_OFFLINE), store=clean, report=self.report
            )
            digest = session.build(plan).digest
        return export.stored_image(clean, digest), round(time.monotonic() - started, 1)

    def _locked(self, plan: Plan, files: Mapping[str, int]) -> Mapping[str, int]:
        builds.fetch([plan], self.index, self.store, self.report)
        return files

    def _base(self, plan: Plan) -> Mapping[str, int]:
        """Bring the image that a plan starts from into the user's store; returns its blobs."""
        pulled = registry.pull(plan.cell.base.image, platform=plan.cell.platform, store=self.store)
        blobs = [pulled.manifest, pulled.config, *(layer.blob for layer in pulled.layers)]
        # What the plan names may be an index, which leads to the manifest.
        named = plan.cell.base.image.rpartition("@sha256:")[2]
        return {named: self.store.path(named).stat().st_size, **{blob.sha256: blob.size for blob in blobs}}

    def _bring(self, what: str, clean: Store, fetch: Callable[[], Mapping[str, int]]) -> None:
        """Take files from the user's store into a clean one, hashed again; `fetch` brings those that are not there."""
        files = fetch()
        with self.report.steps(what) as steps:
            steps.step(f"hash {len(files)} files again ({sum(files.values()) / 1e6:.0f} MB)")
            damaged = _adopt(files, self.store, clean)
        if damaged:
            self.report.say(f"{what}: {len(damaged)} were damaged in your store; fetching them again")
            fetch()
            if still := _adopt(damaged, self.store, clean):
                raise HashMismatchError(
                    "files are damaged in the store, and stay so",
                    where=str(self.store.root),
                    why=f"their bytes have other hashes: {', '.join(still)}",
                    tries=("look after the disk", "set TORCHYARD_HOME to a directory on another one"),
                )


def _files(plan: Plan) -> dict[str, int]:
    """Return the sizes of all files that the plan's locks name, by their hashes."""
    debs = [deb for lock in (plan.base_lock, plan.system_lock) if lock is not None for deb in lock.debs]
    wheels = {wheel.sha256: wheel.size for wheel in plan.lock.wheels}
    return wheels | {deb.sha256: deb.size for deb in debs}


def _adopt(files: Collection[str], store: Store, clean: Store) -> list[str]:
    """Take files of a store into a clean one if their hashes are right; returns those that were not, and are gone."""

    def is_sound(sha256: str) -> bool:
        layout.link(store.path(sha256), clean.path(sha256))
        if clean.verify(sha256):
            return True
        store.verify(sha256)
        return False

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [sha256 for sha256, sound in zip(files, pool.map(is_sound, files), strict=True) if not sound]


@contextlib.contextmanager
def _bare_environment(home: Path, *, keep: Sequence[str]) -> Iterator[None]:
    """Have no variable of the user's while the context is open, but those to `keep`, and the usual umask."""
    before, mask = dict(os.environ), os.umask(0o022)
    try:
        for name in [name for name in before if name not in keep]:
            del os.environ[name]
        os.environ.setdefault("HOME", str(home))
        yield
    finally:
        os.umask(mask)
        os.environ.clear()
        os.environ.update(before)


# ----------------------------------------------------------------------------------------------------
# A cell


def cell(plan: Plan, workshop: Workshop) -> Reproduced:
    """Make a cell's image again and compare it with that of the user's store; if there is none, make it twice."""
    known, store = builds.complete(plan, workshop.store, builder=OciEngine.name), workshop.store
    against, notes = HERE, []
    with contextlib.ExitStack() as stack:
        if known is None:
            against = "another build, in a clean store of its own"
            notes.append("your store does not have it: it is made twice, and the two are compared")
            workshop.report.say(f"{plan.cell.id}: {notes[0]}")
            store = stack.enter_context(workshop.clean(f"{plan.cell.id}-once"))
            known, _ = workshop.make(plan, store)
        clean = stack.enter_context(workshop.clean(plan.cell.id))
        image, seconds = workshop.make(plan, clean)
        expected = _subject(against, store, known)
        return Reproduced(
            cell_id=plan.cell.id,
            against=against,
            expected=known.manifest.digest,
            rebuilt=image.manifest.digest,
            seconds=seconds,
            groups=grouped(compare(expected, _subject("the rebuilt image", clean, image))),
            notes=tuple(notes),
        )


def _subject(name: str, store: Store, image: Image) -> Subject:
    pieces = functools.partial(recipe.pieces, store)
    manifest, config = (b"".join(pieces(blob)) for blob in (image.manifest, image.config))
    return Subject(name=name, manifest=manifest, config=config, pieces=pieces)


# ----------------------------------------------------------------------------------------------------
# A published image


def published(target: Target, name: str, workshop: Workshop, *, trust_base: bool = False) -> Reproduced:
    """Make the image again that a tag or digest names in a registry, from the inputs in its provenance.

    Whoever wrote that need not be trusted: if what it names gives the very same bytes, that is what they were made of.
    With `trust_base` also an image that starts from another image is made, whose Python then runs on this machine.
    Raises ImpossibleError if there is no such image or nothing says what it was made of, MatrixError if that cannot be
    used, SourceError if the registry does not answer.
    """
    digest, manifest = manifest_of(target, name)
    where = f"{target}@{digest}"
    made, notes = _made(attestation.beside(target, digest), where)
    if made.torchyard != __version__:
        notes.append(f"made by torchyard {made.torchyard}; this is {__version__}")
    for note in notes:
        workshop.report.say(f"{made.cell_id}: {note}")
    with workshop.clean(digest.removeprefix("sha256:")[:16]) as clean:
        plan = _plan(made, clean.root / "work" / "project", trust_base=trust_base)
        if made.plan != plan.digest:
            notes.append(
                "this torchyard, or its templates, make another plan of the same inputs than the one it was made from: "
                "differences are to be expected"
            )
            workshop.report.say(f"{made.cell_id}: {notes[-1]}")
        image, seconds = workshop.make(plan, clean)
        if _is_marked(manifest):
            image = gate.marked(clean, image)
        groups: tuple[Group, ...] = ()
        if image.manifest.digest != digest:
            with workshop.report.transfers(f"what differs of {where}") as progress:
                pieces = _pieces(target, clean, progress)
                expected = Subject(
                    name=where, manifest=manifest, config=_config(target, manifest, where), pieces=pieces
                )
                groups = grouped(compare(expected, _subject("the rebuilt image", clean, image)))
        return Reproduced(
            cell_id=made.cell_id,
            against=where if name.startswith("sha256:") else f"{target}:{name}",
            expected=digest,
            rebuilt=image.manifest.digest,
            seconds=seconds,
            groups=groups,
            notes=tuple(notes),
        )


def _made(beside: Beside, where: str) -> tuple[Made, list[str]]:
    """Return what an image was made of by its provenance, a signed one first, and what else should be known."""
    found = beside.of(Predicate.PROVENANCE, signed=False)
    usable: list[Made] = []
    errors: list[MatrixError] = []
    for one in sorted(found, key=lambda it: it.bundle is None):
        try:
            usable.append(Made.read(one.statement, where=where))
        except MatrixError as error:
            errors.append(error)
    if not usable and errors:
        raise errors[0]
    if not usable:
        raise ImpossibleError(
            "nothing says what the image was made of",
            where=where,
            why="no provenance lies beside it: " + ("; ".join(beside.strange[:3]) or "nothing is attached"),
            tries=("torchyard push attaches one: have it pushed again", "torchyard reproduce CELL, if it is yours"),
        )
    others = {tuple(sorted(one.inputs.items())) for one in usable}
    notes = [f"{len(others)} provenances disagree; the first is taken, signed ones before others"]
    return usable[0], notes if len(others) > 1 else []


def _plan(made: Made, directory: Path, *, trust_base: bool) -> Plan:
    """Restore the inputs into a directory and return their plan; raises MatrixError if they must not be used."""
    project = made.restore(directory)
    cell = next((cell for cell in project.cells if cell.id == made.cell_id), None)
    if cell is None:
        raise MatrixError(
            f"the provenance's matrix has no cell {made.cell_id}", where="matrix.yaml in the provenance",
            why=f"it has {', '.join(one.id for one in project.cells[:3])}",
            tries=(f"use torchyard {made.torchyard}: cells are named by what a version knows of them",),
        )  # fmt: skip
    if not isinstance(cell.base, BootstrapBase) and not trust_base:
        raise MatrixError(
            "the image starts from another image, whose Python would run on this machine",
            where=cell.base.image,
            why="bytecode is compiled by the base's own Python, without a sandbox",
            tries=("--trust-base, if you would run a program of whoever made that image",),
        )
    return project.plan(cell)


def _is_marked(manifest: bytes) -> bool:
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        return bool((json.loads(manifest).get("annotations") or {}).get(gate.MARK))
    return False


def _config(target: Target, manifest: bytes, where: str) -> bytes:
    try:
        config = Descriptor.from_json(json.loads(manifest)["config"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ImpossibleError("this is no container image", where=where) from None
    return referrers.document(target, config, limit=registry.CONFIG_MAX)


def _pieces(target: Target, store: Store, progress: Progress) -> Callable[[Descriptor], Iterator[bytes]]:
    """Return what fetches a layer, gives its bytes, and drops it: one at a time takes room."""

    def pieces(blob: Descriptor) -> Iterator[bytes]:
        require_disk(store.root, blob.size + builds.MARGIN_BYTES, f"fetch the layer {blob.digest}")
        target.registry.fetch_blob(target.repository, blob, store, progress)
        try:
            yield from recipe.pieces(store, blob)
        finally:
            store.path(blob.sha256).unlink(missing_ok=True)

    return pieces
