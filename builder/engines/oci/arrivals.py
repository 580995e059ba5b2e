"""The layers of many images at once: the largest first, and each as soon as its wheels have arrived in the store.

One image after the other would leave cores idle. A later image brings one large wheel that is new and little beside it;
and while wheels are fetched, there is nothing to be done but for those that are here.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Self

from builder.base import BaseImage
from builder.engines import Steps
from builder.engines.oci.foundation import Foundation, foundation_of
from builder.engines.oci.image import bytecode_of, compiled, shown
from builder.engines.oci.layers import Compiler, StoppedError, spliced
from builder.engines.oci.stack import Group, stack
from builder.engines.oci.turns import Turns
from builder.errors import TorchyardError
from builder.render import Plan
from builder.sha256 import Hasher
from builder.store import Store


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A layer to be made of wheels, and for which cells."""

    group: Group
    title: str
    cells: frozenset[str]

    @property
    def wheels(self) -> tuple[str, ...]:
        """Their hashes, which tell it from other jobs of its kind."""
        return tuple(wheel.sha256 for wheel in self.group.wheels)


class Arrivals:
    """Makes the layers of images in threads of its own; a context manager, which ends when all are made.

    What fails is not raised: the build of an image meets it again, and reports it. But nothing more is made for images
    of which a layer failed.
    """

    def __init__(
        self, plans: Iterable[tuple[Plan, BaseImage | None]], *, store: Store, steps: Steps, workers: int
    ) -> None:
        """Look at the bases; raises as `foundation_of` and `stack` do."""
        self._store, self._steps, self._workers = store, steps, workers
        self._hasher = Hasher(workers)
        self._stack = contextlib.ExitStack()
        self._turns = Turns.on(workers)
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._done = 0
        splices: list[_Job] = []
        compilers: dict[tuple[str, str], tuple[Foundation, list[_Job]]] = {}
        for plan, base in plans:
            cells, foundation = frozenset({plan.cell.id}), foundation_of(plan, base, store)
            groups = stack(plan.lock.wheels, taken=len(foundation.layers))
            splices += [_Job(group=group, title=_title(group), cells=cells) for group in groups]
            _, compiles = compilers.setdefault((foundation.digest, plan.cell.python), (foundation, []))
            compiles += [_Job(group=group, title=bytecode_of(group), cells=cells) for group in compiled(plan)]
        self._splices = _merged(splices)
        self._compilers = [(foundation, python, _merged(jobs)) for (_, python), (foundation, jobs) in compilers.items()]
        self._total = len(self._splices) + sum(len(jobs) for _, _, jobs in self._compilers)
        self._cells = {cell for job in self._splices for cell in job.cells}
        self._failed: set[str] = set()
        wheels = {wheel.sha256: wheel for job in self._splices for wheel in job.group.wheels}
        self._lacking = {sha256 for sha256, wheel in wheels.items() if not store.has(sha256, size=wheel.size)}

    def arrived(self, sha256: str) -> None:
        """Take note that a wheel is in the store, whole and checked."""
        with self._changed:
            self._lacking.discard(sha256)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._hasher)
        producers = self._hasher.producers
        self._pool = ThreadPoolExecutor(producers + 1, thread_name_prefix="layers")
        self._threads: list[Future[None]] = [self._pool.submit(self._compile)]
        self._threads += [self._pool.submit(self._splice) for _ in range(producers)]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                with self._changed:
                    # Nothing more comes. What another run has fetched meanwhile is there, and the rest fails.
                    self._lacking.clear()
                    self._changed.notify_all()
                wait(self._threads)
        finally:
            self._stop()
            self._pool.shutdown()
            self._stack.close()
        for thread in self._threads:
            thread.result()

    def _stop(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ the threads

    def _splice(self) -> None:
        while job := self._next(self._splices):
            self._made(
                job,
                functools.partial(
                    spliced, job.group, self._store, hasher=self._hasher, turns=self._turns, stopped=self._stopped
                ),
            )

    def _compile(self) -> None:
        for foundation, python, jobs in self._compilers:
            layers = Counter(sha256 for job in jobs for sha256 in job.wheels)
            with Compiler(
                foundation,
                self._store,
                python=python,
                workers=self._workers,
                stopped=self._stopped,
                shared={sha256 for sha256, number in layers.items() if number > 1},
            ) as compiler:
                while job := self._next(jobs):
                    self._made(job, functools.partial(compiler.layer, job.group.wheels, title=job.title))

    def _next(self, jobs: list[_Job]) -> _Job | None:
        """Wait for the first of the jobs whose wheels are all here, and take it out; None if there is nothing to do."""
        with self._changed:
            while not self._stopped.is_set():
                jobs[:] = [job for job in jobs if job.cells - self._failed]
                if not jobs:
                    return None
                for job in jobs:
                    if self._lacking.isdisjoint(job.wheels):
                        jobs.remove(job)
                        return job
                self._changed.wait()
        return None

    def _made(self, job: _Job, make: Callable[[], object]) -> None:
        try:
            make()
        except StoppedError:
            return
        except (TorchyardError, OSError):
            with self._changed:
                self._failed |= job.cells
                over = self._failed >= self._cells
            if over:
                self._stop()
            return
        with self._changed:
            self._done += 1
            self._steps.step(f"layer {self._done} of {self._total} · {job.title}")


def _title(group: Group) -> str:
    return f"{group.size / 1e6:.0f} MB · {shown(group)}"


def _merged(jobs: Iterable[_Job]) -> list[_Job]:
    """Return each layer once, for all cells that have it; the largest come first."""
    cells: dict[tuple[str, ...], frozenset[str]] = {}
    jobs = tuple(jobs)
    for job in jobs:
        cells[job.wheels] = cells.get(job.wheels, frozenset()) | job.cells
    merged = {job.wheels: replace(job, cells=cells[job.wheels]) for job in jobs}
    return sorted(merged.values(), key=lambda job: (-job.group.size, job.title))
