"""Plan → proven image: fetch, base, engine, proof, and only then the tags.

Two ways lead there. An engine that makes images in the store (`StoreSession`) needs no container engine; what the bytes
of an image say is proven at once, and what needs running when the image is loaded into one. An engine that makes images
where it also runs them (`EngineSession`) proves all of it there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from builder import base as bases
from builder import export, layout, proof
from builder.base import BaseImage
from builder.engines import Builder, BuiltImage, Engine, Host, Steps, StoreBuilder
from builder.engines.oci import OciEngine
from builder.errors import (
    DiskError,
    EngineError,
    HashMismatchError,
    ImpossibleError,
    SourceError,
    ToolError,
    TorchyardError,
)
from builder.fetching import Progress
from builder.index import Index, Wanted
from builder.render import Plan
from builder.store import Store, write_atomically

# What a build through BuildKit takes at its peak, as a multiple of its wheels' size: a copy of the wheels, the
# installed tree and the compressed layer. Measured on the 2.8.0+cu128 cell (docs/measurements.md).
PEAK = 5.5
# What an image takes in a container engine, as a multiple of its compressed size: as it came, and unpacked.
LOADED = 3.0
MARGIN_BYTES = 1 << 30

BYTES, CONTAINER = "bytes", "container"
"""What can prove an image: its bytes, read in the store; what a container of it reports."""
_RECIPES = {OciEngine.name: OciEngine.recipe}
"""Of engines whose images are of our own making: with another recipe the same plan gives another image."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A cell that is done: a complete image, and how it was proven to be what the cell declares."""

    id: str
    digest: str
    size_bytes: int
    seconds: float
    engine: str
    proven: bool
    proof: tuple[str, ...]
    """BYTES, CONTAINER or both."""
    tags: tuple[str, ...]
    facts: Mapping[str, Any]
    in_engine: bool
    """Whether a container engine has it, under its tags."""
    reused: bool = False
    """Whether it was made and proven by an earlier run from the very same inputs."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell: an image or the reason why there is none."""

    plan: Plan
    image: Image | None = None
    error: TorchyardError | None = None
    removed: bool = False
    """Whether the image was taken out of the engine again to make room."""


class Reporter(Protocol):
    """Shows what a build is doing."""

    def transfers(self, title: str) -> AbstractContextManager[Progress]:
        """Show transfers while the context is open."""

    def steps(self, title: str) -> AbstractContextManager[Steps]:
        """Show an engine's steps while the context is open."""

    def say(self, text: str) -> None:
        """Say one thing."""


def fetch(plans: Iterable[Plan], index: Index, store: Store, report: Reporter) -> None:
    """Bring every locked file of the plans into the store."""
    plans = tuple(plans)
    _fetch_packages(plans, store, report)
    _fetch_wheels(plans, index, store, report)


def _wheels(plans: Iterable[Plan]) -> tuple[Wanted, ...]:
    """Return the wheels of the plans, each once."""
    return tuple({wheel.sha256: wheel.wanted(plan.cell) for plan in plans for wheel in plan.lock.wheels}.values())


def _lacking(wheels: Iterable[Wanted], store: Store) -> list[Wanted]:
    """Return those that the store does not have."""
    return [wheel for wheel in wheels if not store.has(wheel.sha256, size=wheel.size)]


def _fetch_wheels(
    plans: Iterable[Plan], index: Index, store: Store, report: Reporter, *, arrived: Callable[[str], None] | None = None
) -> None:
    wheels = _wheels(plans)
    missing = _lacking(wheels, store)
    if missing:
        size = sum(file.size or 0 for file in missing)
        require_disk(store.root, size + MARGIN_BYTES, f"fetch {len(missing)} wheels ({_gb(size)})")
        with report.transfers(f"wheels · {len(missing)} of {len(wheels)}, {_gb(size)}") as progress:
            index.fetch_all(missing, store, progress, arrived=arrived or (lambda _: None))


def _fetch_packages(plans: Iterable[Plan], store: Store, report: Reporter) -> None:
    locks = {lock.digest: lock for plan in plans for lock in (plan.base_lock, plan.system_lock) if lock is not None}
    for lock in locks.values():
        if any(not store.has(deb.sha256, size=deb.size) for deb in lock.debs):
            with report.transfers(f"base {lock.suite} · {len(lock.debs)} Debian packages") as progress:
                bases.fetch(lock, store, _one_file(progress))


def base_of(plan: Plan, store: Store, report: Reporter) -> BaseImage | None:
    """Make the plan's bootstrap base, or take it from the store; None if the plan starts from a registry image."""
    if plan.base_lock is None:
        return None
    with report.steps(f"base {plan.base_lock.suite}") as steps:
        return bases.make(
            plan.base_lock, store, lambda what, _done, _total: steps.step(f"base: {what}"), plan.system_lock
        )


def _one_file(progress: Progress) -> bases.Progress:
    """Show what fetching a base reports (package, bytes done, bytes in all) as transfers."""
    seen = 0

    def report(package: str, done: int, total: int) -> None:
        nonlocal seen
        progress.start("base", total, 0)
        progress.advance(package, done - seen)
        progress.finish(package)
        seen = done

    return report


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def require_disk(directory: Path, size: float, purpose: str) -> None:
    """Raise DiskError, with numbers, if `size` bytes are not free there."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DiskError(
            f"not enough disk to {purpose}",
            where=str(directory),
            why=f"about {_gb(size)} are needed, {_gb(free)} are free",
            tries=(
                "free some space: docker image prune, docker buildx prune",
                "build fewer cells at a time",
                "set TORCHYARD_HOME to a directory on a larger disk",
            ),
        )


class Session:
    """Builds one cell after another; what an earlier run made and proved from the same inputs is not made again."""

    def __init__(
        self, *, builder: Builder, index: Index, store: Store, report: Reporter, rebuild: bool = False
    ) -> None:
        self._builder, self._index, self._store, self._report = builder, index, store, report
        self._rebuild = rebuild
        self.removed: set[str] = set()
        """Ids of the cells whose images this session has taken out of the container engine again."""

    def build(self, plan: Plan) -> Image:
        """Build and prove one cell; raises CellFailedError with every difference if it is not what it declares.

        Two runs that want the same cell wait for each other, and the second finds it done.
        """
        with self._store.lock(f"build-{plan.cell.id}"):
            return self._build(plan, time.monotonic())

    def _build(self, plan: Plan, started: float) -> Image:
        raise NotImplementedError

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Do what is better done once for several cells than for each when it is built; nothing has to be."""

    def _image(
        self, plan: Plan, built: BuiltImage, proof: tuple[str, ...], facts: Mapping[str, Any], started: float
    ) -> Image:
        return Image(
            id=plan.cell.id,
            digest=built.digest,
            size_bytes=built.size_bytes,
            seconds=round(time.monotonic() - started, 1),
            engine=self._builder.name,
            proven=True,
            proof=proof,
            tags=plan.cell.tags,
            facts=facts,
            in_engine=CONTAINER in proof,
        )

    def _record(self, plan: Plan, image: Image) -> None:
        content = {
            "digest": image.digest,
            "size_bytes": image.size_bytes,
            "proof": list(image.proof),
            "facts": image.facts,
            "recipe": _RECIPES.get(self._builder.name, ""),
        }
        write_atomically(_record_path(self._store, self._builder.name, plan), json.dumps(content).encode())

    def _proven_before(self, plan: Plan) -> Image | None:
        """Return the image that an earlier run proved for the very same plan, wherever it may be now."""
        record = _recorded(self._store, self._builder.name, plan)
        if record is None:
            return None
        built, proof, facts = record
        return replace(self._image(plan, built, proof, facts, time.monotonic()), reused=True, in_engine=False)


def _record_path(store: Store, builder: str, plan: Plan) -> Path:
    return store.root / "proofs" / builder / f"{plan.digest}.json"


def _recorded(store: Store, builder: str, plan: Plan) -> tuple[BuiltImage, tuple[str, ...], Mapping[str, Any]] | None:
    """Return what an earlier run made from the very same inputs, how it was proven, and its facts."""
    try:
        record = json.loads(_record_path(store, builder, plan).read_bytes())
        if record.get("recipe", "") != _RECIPES.get(builder, ""):
            return None  # today something else would be made, and by whoever has no such record it is
        built = BuiltImage(digest=str(record["digest"]), size_bytes=int(record["size_bytes"]))
        return built, tuple(map(str, record["proof"])), dict(record["facts"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def complete(plan: Plan, store: Store, *, builder: str) -> layout.Image | None:
    """Return the plan's image if an earlier run made it in the store, proved it, and all its bytes are still there."""
    record = _recorded(store, builder, plan)
    if record is None:
        return None
    try:
        return export.stored_image(store, record[0].digest)
    except (ImpossibleError, SourceError, HashMismatchError):
        return None  # somebody cleared a part of the store


class _Room:
    """Keeps a container engine from filling the disk: takes this session's images out of it again, if it may."""

    def __init__(self, host: Host, store: Store, report: Reporter, *, keep: bool, removed: set[str]) -> None:
        self._host, self._store, self._report = host, store, report
        self._keep, self._removed = keep, removed
        self._held: list[Image] = []

    def hold(self, image: Image) -> None:
        """Note an image that may go when another needs its room."""
        self._held.append(image)

    def make(self, needed: float, purpose: str, *, fetched: float = 0) -> None:
        """Refuse if `needed` bytes cannot be had; `fetched` are to be added if the store is on the same disk."""
        disk = self._host.disk
        if disk is None:
            return
        if disk.stat().st_dev == self._store.root.stat().st_dev:
            needed += fetched
        while not self._keep and self._held and shutil.disk_usage(disk).free < needed:
            image = self._held.pop(0)
            self._host.untag(image.tags)
            self._removed.add(image.id)
            self._report.say(
                f"{image.id}: proven, and removed from the engine again to make room "
                f"({_gb(needed)} needed for the next cell); --keep keeps it"
            )
        require_disk(disk, needed, purpose)


class StoreSession(Session):
    """Builds in the store; with a host, also loads each image into it and has a container prove it."""

    def __init__(
        self,
        *,
        builder: StoreBuilder,
        host: Host | None,
        index: Index,
        store: Store,
        report: Reporter,
        rebuild: bool = False,
        keep: bool = False,
    ) -> None:
        super().__init__(builder=builder, index=index, store=store, report=report, rebuild=rebuild)
        self._maker, self._host = builder, host
        self._room = _Room(host, store, report, keep=keep, removed=self.removed) if host is not None else None

    def _build(self, plan: Plan, started: float) -> Image:
        image = None if self._rebuild else self._complete_before(plan)
        if image is None:
            image = self._made(plan, started)
        if self._host is not None and self._room is not None:
            image = self._loaded(plan, image, self._host, self._room, started)
        return image

    def _complete_before(self, plan: Plan) -> Image | None:
        return self._proven_before(plan) if complete(plan, self._store, builder=self._builder.name) else None

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Fetch what the cells lack that are not built yet, and make their layers, each once its wheels are here.

        Raises what fetching does; a layer that cannot be made is left for `build` to report.
        """
        new = [plan for plan in plans if self._rebuild or _recorded(self._store, self._builder.name, plan) is None]
        if new:
            # Not that of each cell: another run may build one of them meanwhile.
            with self._store.lock("build-all"):
                self._prepare(new)

    def _prepare(self, plans: Sequence[Plan]) -> None:
        _fetch_packages(plans, self._store, self._report)
        on_bases = [(plan, base_of(plan, self._store, self._report)) for plan in plans]
        with (
            self._report.steps(f"layers of {len(plans)} cells") as steps,
            self._maker.arrivals(on_bases, store=self._store, steps=steps) as layers,
        ):
            _fetch_wheels(plans, self._index, self._store, self._report, arrived=layers.arrived)

    def _made(self, plan: Plan, started: float) -> Image:
        if _lacking(_wheels([plan]), self._store):
            self._prepare([plan])
        else:
            _fetch_packages([plan], self._store, self._report)
        try:
            built = self._attempt(plan)
        except HashMismatchError as error:
            # What was damaged on this disk is gone, and where one wheel was, others may be: all that are go now.
            self._report.say(f"{plan.cell.id}: {error.problems[0].what}; fetching again")
            for wheel in plan.lock.wheels:
                self._store.verify(wheel.sha256)
            fetch([plan], self._index, self._store, self._report)
            built = self._attempt(plan)
        assert built.observed is not None, self._builder.name
        facts = proof.judge(plan, built.digest, built.observed)
        image = self._image(plan, built, (BYTES,), facts, started)
        self._record(plan, image)
        return image

    def _attempt(self, plan: Plan) -> BuiltImage:
        base = base_of(plan, self._store, self._report)
        with self._report.steps(plan.cell.id) as steps:
            return self._builder.build(plan, base, store=self._store, steps=steps)

    def _loaded(self, plan: Plan, image: Image, host: Host, room: _Room, started: float) -> Image:
        """Load the image under a name that says it is unproven, prove it in a container, and only then tag it."""
        if not (CONTAINER in image.proof and host.holds(image.digest)):
            stored, name = export.stored_image(self._store, image.digest), host.unproven_name(plan.cell.id)
            new = _unshared(stored, _layers_in(host, self._store))
            room.make(LOADED * sum(layer.blob.size for layer in new) + MARGIN_BYTES, f"load {plan.cell.id}")
            with self._report.steps(plan.cell.id) as steps:
                self._send(stored, name, host, steps)
                try:
                    _require_whole(host, image)
                    steps.step("prove in a container: observed = declared")
                    facts = proof.prove(plan, image.digest, host)
                    host.tag(image.digest, plan.cell.tags)
                except BaseException:
                    host.discard(image.digest)
                    raise
            image = replace(image, proof=(BYTES, CONTAINER), facts=facts, reused=False)
            self._record(plan, image)
        else:
            host.tag(image.digest, plan.cell.tags)
        image = replace(image, in_engine=True, seconds=round(time.monotonic() - started, 1))
        room.hold(image)
        return image

    def _send(self, image: layout.Image, name: str, host: Host, steps: Steps) -> None:
        """Load an image into the engine; layers that it has already are left out, unless it does not do without."""

        def send(omit: Collection[str]) -> None:
            size = export.archive_size(self._store, image, tags=[name], omit=omit)
            there = f"; {len(omit)} of {len(layers)} layers are there already" if omit else ""
            steps.step(f"load into the engine ({_gb(size)}{there})")
            host.load(_told(export.archive(self._store, image, tags=[name], omit=omit), size, steps))

        layers = {layer.blob.digest for layer in image.layers}
        held = layers.intersection(itertools.chain.from_iterable(_layers_in(host, self._store)))
        try:
            send(held)
        except EngineError:
            if not held:
                raise
        if not host.holds(image.manifest.digest):
            # The engine may have dropped what it does not need unpacked any more; and it was seen to drop layers while
            # they came, once, beside other builds. Sent again, they stay.
            steps.step("load once more: the engine lacks layers")
            send(frozenset())


def _layers_in(host: Host, store: Store) -> list[tuple[str, ...]]:
    """Return the digests of the layers of each image that the engine has whole, as far as it was made in this store."""
    return [export.layers_of(store, digest) for digest in host.whole()]


def _unshared(image: layout.Image, others: Iterable[Sequence[str]]) -> tuple[layout.Layer, ...]:
    """Return the layers that an engine has to unpack: it shares what two images have in common from the bottom up."""
    shared = 0
    for other in others:
        pairs = zip((layer.blob.digest for layer in image.layers), other, strict=False)
        shared = max(shared, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return image.layers[shared:]


def _told(archive: Iterator[bytes], size: int, steps: Steps) -> Iterator[bytes]:
    """Pass an archive of about `size` bytes on, and report every fifth of it and its end."""
    sent, fifths = 0, 0
    for piece in archive:
        yield piece
        sent += len(piece)
        if sent * 5 // size > fifths:
            fifths = sent * 5 // size
            steps.step(f"sent {_gb(min(sent, size))} of {_gb(size)}")
    steps.step("unpack")


def _require_whole(host: Host, image: Image) -> None:
    """Raise EngineError if a container engine, having accepted an archive, lacks some of its layers."""
    if not host.holds(image.digest):
        raise EngineError(
            f"{image.id}: the engine took the image in, but not all of its layers",
            where=image.digest,
            tries=("load it again", "look into the engine's log"),
        )


class EngineSession(Session):
    """Builds in a container engine, has a container of the image prove it, and tags it there."""

    def __init__(
        self, *, engine: Engine, index: Index, store: Store, report: Reporter, rebuild: bool = False, keep: bool = False
    ) -> None:
        super().__init__(builder=engine, index=index, store=store, report=report, rebuild=rebuild)
        self._engine = engine
        self._room = _Room(engine, store, report, keep=keep, removed=self.removed)

    def _build(self, plan: Plan, started: float) -> Image:
        """Build, prove and tag one cell; an image that fails its proof gets no tag and is removed."""
        engine, store = self._engine, self._store
        proven = None if self._rebuild else self._proven_before(plan)
        if proven is not None and engine.has(proven.digest):
            engine.tag(proven.digest, plan.cell.tags)
            proven = replace(proven, in_engine=True)
            self._room.hold(proven)
            return proven
        missing = sum(w.size for w in plan.lock.wheels if not store.has(w.sha256, size=w.size))
        self._room.make(PEAK * plan.lock.size + MARGIN_BYTES, f"build {plan.cell.id}", fetched=missing)
        fetch([plan], self._index, store, self._report)
        base = base_of(plan, store, self._report)
        before = engine.build_cache()
        try:
            with self._report.steps(plan.cell.id) as steps:
                built = engine.build(plan, base, store=store, steps=steps)
        finally:
            # BuildKit keeps the wheels it was sent and each step's result; nothing of it would be used again.
            engine.forget_builds(since=before)
        try:
            with self._report.steps(plan.cell.id) as steps:
                steps.step("prove: observed = declared")
                facts = proof.prove(plan, built.digest, engine)
            engine.tag(built.digest, plan.cell.tags)
        except BaseException:
            engine.discard(built.digest)
            raise
        image = self._image(plan, built, (CONTAINER,), facts, started)
        self._record(plan, image)
        self._room.hold(image)
        return image


def _built(session: Session, plan: Plan) -> Image:
    """Build one cell; what the operating system refuses is that cell's failure, not the end of the run."""
    try:
        return session.build(plan)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskError if full else ToolError)(
            f"{plan.cell.id}: {error.strerror or error}",
            where=str(error.filename or ""),
            tries=("free some space and run the same command again",) if full else ("--debug shows more",),
        ) from error


def build_all(plans: Iterable[Plan], session: Session, report: Reporter) -> list[Outcome]:
    """Build each plan; one that fails does not stop the others."""
    plans, outcomes = tuple(plans), []
    if len(plans) > 1:
        # What fails here is the failure of some cells, and these meet it again.
        with contextlib.suppress(TorchyardError, OSError):
            session.prepare(plans)
    for plan in plans:
        try:
            image = _built(session, plan)
        except TorchyardError as error:
            outcomes.append(Outcome(plan=plan, error=error))
            report.say(f"{plan.cell.id}: failed: {error.problems[0].what}")
        else:
            outcomes.append(Outcome(plan=plan, image=image))
            how = "proven by an earlier run" if image.reused else f"proven · {image.seconds:.1f} s"
            report.say(f"{image.id}: {how} · {image.digest} · {_gb(image.size_bytes)}")
    return [
        Outcome(plan=it.plan, image=it.image, error=it.error, removed=it.plan.cell.id in session.removed)
        for it in outcomes
    ]
