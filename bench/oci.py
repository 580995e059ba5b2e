"""torchyard's own engine, through its command line, over a store that holds wheels and bases and nothing derived."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import containers, floor, machine
from bench.process import Spent, shown, timed
from bench.results import Entry, pulled
from builder import export
from builder.base import BaseImage
from builder.engines.docker import DockerEngine
from builder.errors import CellFailedError
from builder.layout import Descriptor
from builder.render import Plan
from builder.store import Store

IMAGE = f"{containers.REPOSITORY}:d"


@dataclass(frozen=True, kw_only=True)
class Torchyard:
    """Runs `torchyard build` as a program of its own, from the wheels and bases of a store."""

    engine: DockerEngine
    store: Store
    work: Path
    root: Path
    """The project: where matrix.yaml is."""
    bases: dict[str, BaseImage]
    """By cell id."""

    def measure(
        self, plan: Plan, *, repeat: int, floor_seconds: float | None, again: bool, neighbour: Plan | None
    ) -> list[Entry]:
        """Build cold, `repeat` times, and try the image out; then the same cell again, and its neighbour."""
        runs = []
        for _ in range(repeat):
            state = self._fresh([plan])
            machine.settle(self._wheels([plan]))
            known = _inodes(state.root)
            spent, (built,) = self._build(state, plan.cell.id)
            runs.append(spent)
        state_bytes = _beyond(state.root, known)
        first = _layers(state, built)
        entry = Entry(
            key="d",
            name="torchyard",
            seconds=tuple(run.seconds for run in runs),
            wheel_bytes=plan.lock.size,
            floor_seconds=floor_seconds,
            cpu_seconds=runs[-1].cpu_seconds,
            peak_bytes=max(run.peak_bytes for run in runs),
            image_bytes=int(built["size_bytes"]),
            state_bytes=state_bytes,
            commands=(
                self._shown(plan.cell.id),
                f"torchyard load {plan.cell.id}  # as that does it, under the name {IMAGE}, and without its proof",
                shown(containers.command(IMAGE)),
            ),
        )
        entries = [self._tried(entry, plan, state, str(built["digest"]))]
        if again:
            entries.append(self._again(plan, state, str(built["digest"])))
        if neighbour is not None:
            beside, layers = self._neighbour(plan, neighbour, state)
            entries = [replace(entries[0], upgrade_bytes=pulled(first, layers)), *entries[1:], beside]
        return entries

    def matrix(self, plans: Sequence[Plan]) -> Entry:
        """Build every cell in one go, cold; with nothing done twice it takes as long as the unique wheels, each once.

        What each image holds is proven by its bytes, as in every build; none of them is run.
        """
        wheels = self._wheels(plans)
        machine.settle(wheels)
        least = floor.measure(wheels)
        state = self._fresh(plans)
        machine.settle(wheels)
        known = _inodes(state.root)
        spent, _ = self._build(state, "--all", cells=len(plans))
        return Entry(
            key="d4",
            name=f"torchyard, all {len(plans)} cells",
            seconds=(spent.seconds,),
            wheel_bytes=sum(path.stat().st_size for path in wheels),
            floor_seconds=least.seconds,
            cpu_seconds=spent.cpu_seconds,
            peak_bytes=spent.peak_bytes,
            state_bytes=_beyond(state.root, known),
            commands=(self._shown("--all"),),
        )

    # ------------------------------------------------------------------ the parts

    def _tried(self, entry: Entry, plan: Plan, state: Store, digest: str) -> Entry:
        machine.settle(self._wheels([plan]))
        image = export.stored_image(state, digest)
        try:
            load_seconds = containers.load(self.engine, lambda: export.archive(state, image, tags=[IMAGE]))
            trial = containers.tried(IMAGE, plan.expectation.torch)
        finally:
            containers.remove(self.engine, IMAGE)
        return replace(
            entry,
            load_seconds=load_seconds,
            first_run_seconds=trial.first_run_seconds,
            import_cold_seconds=trial.import_cold_seconds,
            import_warm_seconds=trial.import_warm_seconds,
        )

    def _again(self, plan: Plan, state: Store, digest: str) -> Entry:
        spent, (built,) = self._build(state, plan.cell.id)
        if built["digest"] != digest:
            raise CellFailedError(f"{plan.cell.id}: built again it is {built['digest']}, it was {digest}")
        return Entry(key="d2", name="torchyard, the same cell again", seconds=(spent.seconds,))

    def _neighbour(self, plan: Plan, neighbour: Plan, state: Store) -> tuple[Entry, tuple[Descriptor, ...]]:
        have = {wheel.sha256 for wheel in plan.lock.wheels}
        new = [self.store.path(wheel.sha256) for wheel in neighbour.lock.wheels if wheel.sha256 not in have]
        machine.settle(new)
        least = floor.measure(new)
        self._fill(state, [neighbour])
        machine.settle(new)
        spent, (built,) = self._build(state, neighbour.cell.id)
        entry = Entry(
            key="d3",
            name=f"torchyard, then {neighbour.expectation.torch}",
            seconds=(spent.seconds,),
            wheel_bytes=sum(path.stat().st_size for path in new),
            floor_seconds=least.seconds,
            cpu_seconds=spent.cpu_seconds,
            peak_bytes=spent.peak_bytes,
            image_bytes=int(built["size_bytes"]),
        )
        return entry, _layers(state, built)

    # ------------------------------------------------------------------ one build

    def _argv(self, *cells: str) -> list[str]:
        return [sys.executable, "-m", "builder", "build", *cells, "--json"]

    def _shown(self, *cells: str) -> str:
        return shown(["TORCHYARD_HOME=$STATE", "python", *self._argv(*cells)[1:]]).replace("'", "")

    def _build(self, state: Store, *what: str, cells: int = 1) -> tuple[Spent, list[Mapping[str, Any]]]:
        """Build, and return what the command line says of each cell; raises CellFailedError if one is not proven."""
        environment = {**os.environ, "TORCHYARD_HOME": str(state.root)}
        spent = timed(self._argv(*what), what=f"torchyard build {' '.join(what)}", env=environment, cwd=self.root)
        documents: list[Mapping[str, Any]] = json.loads(spent.out)
        others = sorted({str(document.get("engine")) for document in documents} - {"oci"})
        if others:
            raise CellFailedError(
                f"torchyard build used the engine {', '.join(others)}",
                why="this bench measures the engine `oci`, which must be the default",
            )
        if len(documents) != cells or not all(document["proven"] for document in documents):
            raise CellFailedError("torchyard build did not prove every cell", why=spent.out[-2000:])
        return spent, documents

    def _fresh(self, plans: Sequence[Plan]) -> Store:
        """Return a store with the plans' wheels, packages and bases as hard links, and nothing derived."""
        shutil.rmtree(self.work / "state", ignore_errors=True)
        state = Store.open(self.work / "state")
        self._fill(state, plans)
        return state

    def _fill(self, state: Store, plans: Sequence[Plan]) -> None:
        for plan in plans:
            base, lock = self.bases[plan.cell.id], plan.system_lock or plan.base_lock
            assert lock is not None
            blobs = {wheel.sha256 for wheel in plan.lock.wheels} | {deb.sha256 for deb in lock.debs}
            if not (state.root / "layouts" / base.layout.name).exists():
                shutil.copytree(base.layout, state.root / "layouts" / base.layout.name, copy_function=os.link)
                blobs |= {path.name for path in (base.layout / "blobs" / "sha256").iterdir()}
            self._link(state, blobs)

    def _link(self, state: Store, blobs: Iterable[str]) -> None:
        for sha256 in blobs:
            if not state.has(sha256):
                state.path(sha256).hardlink_to(self.store.path(sha256))

    def _wheels(self, plans: Sequence[Plan]) -> list[Path]:
        return [self.store.path(sha256) for sha256 in {wheel.sha256 for plan in plans for wheel in plan.lock.wheels}]


def _layers(state: Store, built: Mapping[str, Any]) -> tuple[Descriptor, ...]:
    return tuple(layer.blob for layer in export.stored_image(state, str(built["digest"])).layers)


def _inodes(directory: Path) -> set[int]:
    return {path.stat().st_ino for path in directory.rglob("*") if path.is_file()}


def _beyond(directory: Path, known: set[int]) -> int:
    """Return the bytes on disk of files that are not `known`, each once however many names it has."""
    files = {found.st_ino: found for path in directory.rglob("*") if path.is_file() for found in [path.stat()]}
    return sum(found.st_blocks * 512 for inode, found in files.items() if inode not in known)
