"""Plan → proven, tagged image: fetch, base, engine, proof, and only then the tags."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from builder import base as bases
from builder import proof
from builder.base import BaseImage
from builder.engines import Engine, Steps
from builder.errors import DiskError, ToolError, TorchyardError
from builder.index import Index, Progress
from builder.render import Plan
from builder.store import Store, write_atomically

# What a build through BuildKit takes at its peak, as a multiple of its wheels' size: a copy of the wheels, the
# installed tree and the compressed layer. Measured on the 2.8.0+cu128 cell (docs/measurements.md).
PEAK = 5.5
MARGIN_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Image:
    """A cell that is done: an image in the engine, proven and tagged."""

    id: str
    digest: str
    size_bytes: int
    seconds: float
    engine: str
    proven: bool
    tags: tuple[str, ...]
    facts: Mapping[str, Any]
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
    wheels = {wheel.sha256: wheel.wanted(plan.cell) for plan in plans for wheel in plan.lock.wheels}
    locks = {plan.base_lock.digest: plan.base_lock for plan in plans if plan.base_lock is not None}
    missing = [file for file in wheels.values() if not store.has(file.sha256, size=file.size)]
    if missing:
        size = sum(file.size or 0 for file in missing)
        _require(store.root, size + MARGIN_BYTES, f"fetch {len(missing)} wheels ({_gb(size)})")
        with report.transfers(f"wheels · {len(missing)} of {len(wheels)}, {_gb(size)}") as progress:
            index.fetch_all(missing, store, progress)
    for lock in locks.values():
        if any(not store.has(deb.sha256, size=deb.size) for deb in lock.debs):
            with report.transfers(f"base {lock.suite} · {len(lock.debs)} Debian packages") as progress:
                bases.fetch(lock, store, _one_file(progress))


def base_of(plan: Plan, store: Store, report: Reporter) -> BaseImage | None:
    """Make the plan's bootstrap base, or take it from the store; None if the plan starts from a registry image."""
    if plan.base_lock is None:
        return None
    with report.steps(f"base {plan.base_lock.suite}") as steps:
        return bases.make(plan.base_lock, store, lambda what, _done, _total: steps.step(f"base: {what}"))


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
    return f"{size / 1e9:.1f} GB"


def _require(directory: Path, size: float, purpose: str) -> None:
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
    """Builds one cell after another with one engine, and keeps the engine from filling the disk."""

    def __init__(
        self,
        *,
        engine: Engine,
        index: Index,
        store: Store,
        report: Reporter,
        keep: bool = False,
        only: bool = False,
        rebuild: bool = False,
    ) -> None:
        self._engine, self._index, self._store, self._report = engine, index, store, report
        self._rebuild = rebuild
        self._keep = keep or only
        self._held: list[Image] = []
        self.removed: set[str] = set()
        """Ids of the cells whose images this session has taken out of the engine again."""

    def build(self, plan: Plan) -> Image:
        """Build, prove and tag one cell; an image that fails its proof gets no tag and is removed.

        Two runs that want the same cell wait for each other, and the second finds it done.
        """
        with self._store.lock(f"build-{plan.cell.id}"):
            return self._build(plan)

    def _build(self, plan: Plan) -> Image:
        started = time.monotonic()
        engine, store = self._engine, self._store
        proven = None if self._rebuild else self._proven_before(plan)
        if proven is not None:
            engine.tag(proven.digest, plan.cell.tags)
            self._held.append(proven)
            return proven
        self._make_room(plan)
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
        image = Image(
            id=plan.cell.id,
            digest=built.digest,
            size_bytes=built.size_bytes,
            seconds=round(time.monotonic() - started, 1),
            engine=engine.name,
            proven=True,
            tags=plan.cell.tags,
            facts=facts,
        )
        self._record(plan, image)
        self._held.append(image)
        return image

    def _record(self, plan: Plan, image: Image) -> None:
        content = {"digest": image.digest, "size_bytes": image.size_bytes, "facts": image.facts}
        write_atomically(self._record_path(plan), json.dumps(content).encode())

    def _record_path(self, plan: Plan) -> Path:
        return self._store.root / "proofs" / self._engine.name / f"{plan.digest}.json"

    def _proven_before(self, plan: Plan) -> Image | None:
        """Return the image that an earlier run proved for the very same plan, if the engine still has it."""
        try:
            record = json.loads(self._record_path(plan).read_bytes())
            digest, size_bytes, facts = str(record["digest"]), int(record["size_bytes"]), dict(record["facts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if not self._engine.has(digest):
            return None
        return Image(
            id=plan.cell.id,
            digest=digest,
            size_bytes=size_bytes,
            seconds=0.0,
            engine=self._engine.name,
            proven=True,
            tags=plan.cell.tags,
            facts=facts,
            reused=True,
        )

    def _make_room(self, plan: Plan) -> None:
        """Refuse if the build cannot fit; before that, take out images of this session unless they are to be kept."""
        disk = self._engine.disk
        if disk is None:
            return
        needed = PEAK * plan.lock.size + MARGIN_BYTES
        if disk.stat().st_dev == self._store.root.stat().st_dev:
            needed += sum(w.size for w in plan.lock.wheels if not self._store.has(w.sha256, size=w.size))
        while not self._keep and self._held and shutil.disk_usage(disk).free < needed:
            image = self._held.pop(0)
            self._engine.untag(image.tags)
            self.removed.add(image.id)
            self._report.say(
                f"{image.id}: proven, and removed from the engine again to make room "
                f"({_gb(needed)} needed for the next cell); --keep keeps it"
            )
        _require(disk, needed, f"build {plan.cell.id}")


def _built(session: Session, plan: Plan) -> Image:
    """Build one cell; what the operating system refuses is that cell's failure, not the end of the run."""
    try:
        return session.build(plan)
    except OSError as error:
        raise ToolError(
            f"{plan.cell.id}: {error.strerror or error}", where=str(error.filename or ""), tries=("--debug shows more",)
        ) from error


def build_all(plans: Iterable[Plan], session: Session, report: Reporter) -> list[Outcome]:
    """Build each plan; one that fails does not stop the others."""
    outcomes = []
    for plan in plans:
        try:
            image = _built(session, plan)
        except TorchyardError as error:
            outcomes.append(Outcome(plan=plan, error=error))
            report.say(f"{plan.cell.id}: failed: {error.problems[0].what}")
        else:
            outcomes.append(Outcome(plan=plan, image=image))
            how = "proven by an earlier run" if image.reused else f"proven · {image.seconds:.0f} s"
            report.say(f"{image.id}: {how} · {image.digest} · {_gb(image.size_bytes)}")
    return [
        Outcome(plan=it.plan, image=it.image, error=it.error, removed=it.plan.cell.id in session.removed)
        for it in outcomes
    ]
