"""`python -m bench`: run the contenders one after another, and write what each took."""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import command, containers, floor, machine, report
from bench.command import chosen, neighbour_of
from bench.oci import Torchyard
from bench.peers import PEERS, Buildkit
from bench.process import shown
from bench.results import Entry, Results, dumps, loads
from builder import base as bases
from builder.build import LOADED, MARGIN_BYTES, PEAK
from builder.console import Console
from builder.engines.docker import DockerEngine
from builder.errors import MatrixError, SourceError, ToolError
from builder.project import Project
from builder.render import Plan
from builder.store import Store, write_atomically

CONTENDERS = ("floor", "a", "b", "c", "d", "d2", "d3", "d4")
SMALL = ("floor", "a", "d")
NAMES = {"floor": "what no method can avoid", "d": "torchyard", "d4": "torchyard, the whole matrix"} | {
    peer.key: peer.name for peer in PEERS.values()
}
ROOT = Path(__file__).parents[1]
STATE_SHARE = 0.1
"""What torchyard's own state may take, as a share of the wheels, beside MARGIN_BYTES."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns 1 if a contender failed or gave a wrong image, never because one was slow."""
    options = _parser().parse_args(arguments)

    def work(console: Console) -> tuple[str, bool]:
        if importlib.util.find_spec("matplotlib") is None:  # half an hour later is a bad time to find out
            raise ToolError("matplotlib, which draws the plot, is not installed", tries=("pip install -e '.[dev]'",))
        if options.render:
            results = loads(options.render.read_text("utf-8"), where=str(options.render))
        else:
            results = _run(options, console)
        _write(options.out, results)
        return report.markdown(results), results.failed

    return command.run(work, stopped="stopped; contenders that had ended are in results.json and results.md")


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "python -m bench",
        "Measure torchyard beside the ways people build such images today, on the same wheels and base.",
        epilog="floor: what no method can avoid · a: BuildKit + pip · b: BuildKit + uv · c: the same, zstd archive · "
        "d: torchyard, cold · d2: the same cell again · d3: then its neighbour · d4: the whole matrix, cold",
        contenders=CONTENDERS,
        texts={
            "small": f"the CPU cell, contenders {', '.join(SMALL)}: minutes",
            "repeat": "runs of floor and a to d (default: 1)",
            "only": "contenders, by comma: floor,d",
            "neighbour": "for d3 and --upgrade (default: the next torch)",
            "render": "run nothing: table and plot of a results.json",
        },
    )
    parser.add_argument("--upgrade", action="store_true", help="build the neighbour with a, b and c too: what to pull")
    return parser


# --------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run is about."""

    plan: Plan
    neighbour: Plan | None
    every: tuple[Plan, ...]
    """The whole matrix; empty if it does not take part."""
    keys: tuple[str, ...]
    repeat: int
    upgrade: bool

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Return every plan that takes part, once."""
        found = (self.plan, *((self.neighbour,) if self.neighbour else ()), *self.every)
        return tuple({plan.cell.id: plan for plan in found}.values())


def _course(options: argparse.Namespace, project: Project) -> Course:
    if options.repeat < 1:
        raise MatrixError("--repeat counts runs: at least 1")
    keys: tuple[str, ...] = options.only or (SMALL if options.small else CONTENDERS)
    if {"d2", "d3"} & set(keys) and "d" not in keys:
        raise MatrixError("d2 and d3 go on from d", tries=("name d in --only as well",))
    cell = chosen(project.cells if not options.cell else project.select([options.cell]), small=options.small)
    wanted = options.upgrade or "d3" in keys
    beside = neighbour_of(cell, project.cells) if wanted and not options.neighbour else None
    if wanted and options.neighbour:
        beside = project.select([options.neighbour])[0]
        if beside.id == cell.id:
            raise MatrixError("a cell is not its own neighbour", where=cell.id, tries=("name another one",))
    taking_part = project.cells if "d4" in keys else [cell, *([beside] if beside else [])]
    plans = {plan.cell.id: plan for plan in project.fresh_plans(taking_part)}
    return Course(
        plan=plans[cell.id],
        neighbour=plans[beside.id] if beside else None,
        every=tuple(plans.values()) if "d4" in keys else (),
        keys=keys,
        repeat=options.repeat,
        upgrade=options.upgrade,
    )


def _require_wheels(course: Course, store: Store) -> None:
    lost = []
    for plan in course.plans:
        if plan.base_lock is None:
            raise MatrixError(
                f"{plan.cell.id} starts from a registry's image",
                why="the bench gives every contender one and the same base, made from Debian packages",
            )
        files = [(wheel.sha256, wheel.size) for wheel in plan.lock.wheels]
        files += [(deb.sha256, deb.size) for deb in (plan.system_lock or plan.base_lock).debs]
        if any(not store.has(sha256, size=size) for sha256, size in files):
            lost.append(plan.cell.id)
    if lost:
        raise SourceError(
            f"wheels or packages of {len(lost)} cells are not in the store",
            where=str(store.root),
            why="downloads are not measured: everything has to be there before",
            tries=(f"torchyard fetch {' '.join(lost)}",),
        )


def _require_room(course: Course, store: Store, engine: DockerEngine, *, patience_s: float = 0) -> None:
    """Refuse before anything is built if the largest contender would not find its room."""
    require = functools.partial(containers.require, patience_s=patience_s)
    in_turn = (course.plan, course.neighbour) if course.upgrade and course.neighbour else (course.plan,)
    wheels = max(plan.lock.size for plan in in_turn)
    in_engine = wheels * (PEAK if {"a", "b", "c"} & set(course.keys) else LOADED if "d" in course.keys else 0)
    in_store = STATE_SHARE * (_matrix_bytes(course.every or in_turn)[0])
    disk = engine.disk if in_engine else None
    if disk is not None and disk.stat().st_dev == store.root.stat().st_dev:
        in_store += in_engine  # the archive of c counts there: it takes the place of an image in the engine
    else:
        in_store += 1.2 * wheels if "c" in course.keys else 0
        if disk is not None:
            require(disk, in_engine + MARGIN_BYTES, "run the bench in the container engine")
    require(store.root, in_store + MARGIN_BYTES, "run the bench")


# --------------------------------------------------------------------------- the run


def _run(options: argparse.Namespace, console: Console) -> Results:
    project, store, engine = Project(ROOT / "matrix.yaml"), Store.open(), DockerEngine()
    course = _course(options, project)
    _require_wheels(course, store)
    if set(course.keys) - {"floor", "d4"}:
        engine.check()
    _require_room(course, store, engine)
    console.say("making sure of the base")
    made = {
        plan.cell.id: bases.make(plan.base_lock, store, system=plan.system_lock)
        for plan in course.plans
        if plan.base_lock is not None
    }
    results = Results(
        started=dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cell=course.plan.cell.id,
        neighbour=course.neighbour.cell.id if course.neighbour else None,
        repeat=course.repeat,
        wheels=len(course.plan.lock.wheels),
        wheel_bytes=course.plan.lock.size,
        matrix_wheel_bytes=_matrix_bytes(course.every) if course.every else None,
        machine=machine.describe(store=store.root, engine=engine.disk if set(course.keys) - {"floor", "d4"} else None),
        tools=machine.tools(ROOT),
        files={key: PEERS[key].dockerfile for key in course.keys if key in PEERS},
    )
    with store.scratch("bench") as work:
        buildkit = Buildkit(engine=engine, store=store, work=work, bases=made)
        torchyard = Torchyard(engine=engine, store=store, work=work, root=ROOT, bases=made)
        for key in course.keys:
            if key in ("d2", "d3"):
                continue  # with d
            console.say(f"{key}: {NAMES[key]}")
            contender = functools.partial(_contender, key, course, buildkit, torchyard, results)
            entries = command.measured(functools.partial(_failed, key), contender)
            results = replace(results, entries=(*results.entries, *entries))
            _write(options.out, results, plot=False)
            for entry in entries:
                console.say(f"   {entry.name}: {entry.failure or f'{entry.median:.1f} s'}")
    return results


def _failed(key: str, why: str) -> Entry:
    return Entry(key=key, name=NAMES[key], failure=why)


def _contender(key: str, course: Course, buildkit: Buildkit, torchyard: Torchyard, so_far: Results) -> list[Entry]:
    _require_room(course, torchyard.store, torchyard.engine, patience_s=containers.PATIENCE_S)
    if key == "floor":
        return [_floor(course, torchyard.store)]
    if key in PEERS:
        beside = course.neighbour if course.upgrade else None
        return [buildkit.measure(PEERS[key], course.plan, repeat=course.repeat, neighbour=beside)]
    if key == "d4":
        return [torchyard.matrix(course.every)]
    least = so_far.entry("floor")
    return torchyard.measure(
        course.plan,
        repeat=course.repeat,
        floor_seconds=least.median if least else None,
        again="d2" in course.keys,
        neighbour=course.neighbour if "d3" in course.keys or course.upgrade else None,
    )


def _floor(course: Course, store: Store) -> Entry:
    wheels = [store.path(wheel.sha256) for wheel in course.plan.lock.wheels]
    runs = []
    for _ in range(course.repeat):
        machine.settle(wheels)
        runs.append(floor.measure(wheels))
    return Entry(
        key="floor",
        name="floor",
        seconds=tuple(run.seconds for run in runs),
        wheel_bytes=course.plan.lock.size,
        cpu_seconds=runs[-1].cpu_seconds,
        commands=(shown(["python", "-m", "bench", course.plan.cell.id, "--only", "floor"]),),
    )


def _matrix_bytes(plans: Sequence[Plan]) -> tuple[int, int]:
    unique = {wheel.sha256: wheel.size for plan in plans for wheel in plan.lock.wheels}
    return sum(unique.values()), sum(plan.lock.size for plan in plans)


def _write(directory: Path, results: Results, *, plot: bool = True) -> None:
    write_atomically(directory / "results.json", dumps(results).encode())
    write_atomically(directory / "results.md", report.markdown(results).encode())
    if plot:
        write_atomically(directory / "results.svg", report.svg(results).encode())


if __name__ == "__main__":
    sys.exit(main())
