"""Which cells are validated on which machines with GPUs: only pairs that can work, and few of them that see it all."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.compat import check_host
from builder.errors import MatrixError, Problem
from builder.facts import CPU, Facts
from builder.matrix import Cell
from builder.schema import Runner

MOST_JOBS = 256
"""Jobs that GitHub makes of one matrix, and no more."""

Pair = tuple[Cell, Runner]
Goal = tuple[str, ...]
"""What has to be seen once: a value of an axis on a runner class, or a cell anywhere."""


@dataclass(frozen=True, kw_only=True)
class Cover:
    """Which cells run where, in the order of the matrix, and those with CUDA that can run nowhere."""

    pairs: tuple[Pair, ...]
    lost: Mapping[str, tuple[Problem, ...]]
    """By the id of the cell, why each runner class cannot run it; nothing where there is no runner class."""

    def runners_of(self, cell: Cell) -> tuple[Runner, ...]:
        """Return the runner classes on which a cell is validated."""
        return tuple(runner for one, runner in self.pairs if one.id == cell.id)


def cover(facts: Facts, cells: Sequence[Cell], runners: Sequence[Runner], *, tiers: Sequence[int] = (1,)) -> Cover:
    """Choose pairs so that each runner class gets each torch release, CUDA and variant, and each cell a runner class.

    Always as far as there is a pair that can work. If T3 is among the `tiers` that have to be proven, each cell also
    gets one with several GPUs. Cells without CUDA need no GPU, and get none. The choice depends on nothing but the
    arguments; none of its pairs can be left out.
    """
    cuda = [cell for cell in cells if cell.cuda != CPU]
    found = {(cell.id, runner.name): _problems(facts, cell, runner) for cell in cuda for runner in runners}
    fit = [(cell, runner) for cell in cuda for runner in runners if not found[cell.id, runner.name]]
    needed = max(tiers) - 1
    able = {cell.id for cell, runner in fit if runner.gpus >= needed}
    lost = {
        cell.id: tuple(
            problem for runner in runners for problem in found[cell.id, runner.name][:1] or _too_few(runner, needed)
        )
        for cell in cuda
        if cell.id not in able
    }
    return Cover(pairs=_chosen(fit, needed), lost=lost)


def _too_few(runner: Runner, needed: int) -> tuple[Problem, ...]:
    assert runner.gpus < needed, "a machine that can run a cell, and has what it needs, is no reason against it"
    return (Problem(what="T3 needs several GPUs", where=runner.name, why="it has one"),)


def _goals(pair: Pair) -> frozenset[Goal]:
    """Return what a pair would let us see of a runner class."""
    cell, runner = pair
    axes = (("torch", str(cell.torch)), ("cuda", cell.cuda), ("variant", cell.variant_name))
    return frozenset((runner.name, axis, value) for axis, value in axes)


def _chosen(pairs: Sequence[Pair], needed: int) -> tuple[Pair, ...]:
    """See everything of each runner class, and then each cell, which takes as many GPUs as `needed`.

    Greedily: the pair with most that is new, of those one whose cell is new, in the given order; cells that are left
    go to the class with the least to do.
    """
    goals = [_goals(pair) for pair in pairs]
    left: set[Goal] = set().union(*goals)
    cells: set[str] = set()
    load: Counter[str] = Counter()
    chosen: list[int] = []

    def rank(number: int) -> tuple[int, bool, int]:
        return -len(goals[number] & left), pairs[number][0].id in cells, number

    def choose(number: int) -> None:
        cell, runner = pairs[number]
        chosen.append(number)
        load[runner.name] += 1
        if runner.gpus >= needed:
            cells.add(cell.id)

    queue = [rank(number) for number in range(len(pairs))]
    heapq.heapify(queue)
    while left:
        # Ranks only ever fall: a pair that still has the one under which it was queued is the best of all.
        queued = heapq.heappop(queue)
        number = queued[-1]
        if rank(number) == queued:
            choose(number)
            left -= goals[number]
        else:
            heapq.heappush(queue, rank(number))
    able: dict[str, list[int]] = {}
    for number, (cell, runner) in enumerate(pairs):
        if runner.gpus >= needed:
            able.setdefault(cell.id, []).append(number)
    for key, numbers in able.items():
        if key not in cells:
            choose(min(numbers, key=lambda number: (load[pairs[number][1].name], number)))
    seen = [
        goal | ({(cell.id,)} if runner.gpus >= needed else set())
        for goal, (cell, runner) in zip(goals, pairs, strict=True)
    ]
    return tuple(pairs[number] for number in sorted(_needed(chosen, seen)))


def _needed(chosen: Sequence[int], goals: Sequence[frozenset[Goal]]) -> set[int]:
    """Leave out what later choices have made superfluous."""
    times = Counter(goal for number in chosen for goal in goals[number])
    kept = set(chosen)
    for number in chosen:
        if all(times[goal] > 1 for goal in goals[number]):
            kept.remove(number)
            times.subtract(goals[number])
    return kept


def _problems(facts: Facts, cell: Cell, runner: Runner) -> tuple[Problem, ...]:
    """Say what keeps a cell from a machine, nothing if it runs there."""
    if cell.platform != runner.platform:
        return (
            Problem(what=f"it is for {cell.platform}", where=runner.name, why=f"{runner.name} is {runner.platform}"),
        )
    found = check_host(
        facts,
        torch=cell.torch,
        cuda=cell.cuda,
        cudnn=None if cell.cudnn_is_stock else cell.cudnn,
        platform=cell.platform,
        driver=runner.driver,
        gpu=runner.gpu,
    )
    return tuple(Problem(what=one.what, where=runner.name, why=one.why) for one in found)


# ----------------------------------------------------------------------------------------------------
# Jobs


def builds(cells: Iterable[Cell], *, most: int = MOST_JOBS) -> dict[str, Any]:
    """Return the matrix of a workflow's jobs that build: a cell each, several where there are more than `most`."""
    cells = tuple(cells)
    return {
        "include": [
            {"name": _name(group), "cells": " ".join(cell.id for cell in group)}
            for group in _groups(cells, -(-len(cells) // most) or 1)
        ]
    }


def validations(found: Cover, *, most: int = MOST_JOBS) -> dict[str, Any]:
    """Return the matrix of a workflow's jobs on machines with GPUs, each for one runner class.

    Raises MatrixError if there are more runner classes than jobs.
    """
    classes: dict[str, tuple[Runner, list[Cell]]] = {}
    for cell, runner in found.pairs:
        classes.setdefault(runner.name, (runner, []))[1].append(cell)
    if len(classes) > most:
        raise MatrixError(
            f"{len(classes)} runner classes are more than the {most} jobs that a workflow's matrix may have",
            where="publish.runners",
            tries=("leave out machines that are like others",),
        )
    several = next(
        size for size in itertools.count(1) if sum(-(-len(cells) // size) for _, cells in classes.values()) <= most
    )
    return {
        "include": [
            {
                "name": f"{runner.name}-{_name(group)}",
                "cells": " ".join(cell.id for cell in group),
                "runner": runner.name,
                "labels": list(runner.labels),
                "gpus": str(runner.gpus),
                "profile": "gpu" if runner.gpus == 1 else "multi-gpu",
            }
            for runner, cells in classes.values()
            for group in _groups(cells, several)
        ]
    }


def _groups(cells: Sequence[Cell], size: int) -> list[Sequence[Cell]]:
    return [cells[start : start + size] for start in range(0, len(cells), size)]


def _name(cells: Sequence[Cell]) -> str:
    """Return what a job is called, which is also the name of what it hands on."""
    return cells[0].id if len(cells) == 1 else f"{cells[0].id}-and-{len(cells) - 1}-more"
