"""A project on disk: where its matrix, locks and rendered files lie, read and written as whole files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from builder import base as bases
from builder import lock as locks
from builder import matrix as matrices
from builder import render as renders
from builder.base import BaseLock
from builder.errors import LockError, Problem, TorchyardError
from builder.facts import Facts
from builder.lock import Lock
from builder.matrix import Cell, Family, Policy
from builder.reading import text_of
from builder.render import Plan
from builder.schema import BootstrapBase
from builder.store import write_atomically

CATALOGUE_BEGIN = "<!-- images: written by `torchyard render` -->"
CATALOGUE_END = "<!-- /images -->"
GENERATED = ("Dockerfile", "image.json", "pylock.toml", "requirements.txt")


@dataclass(frozen=True)
class Project:
    """The directory that holds matrix.yaml."""

    matrix_path: Path

    @property
    def root(self) -> Path:
        """The project's directory."""
        return self.matrix_path.absolute().parent

    @property
    def images(self) -> Path:
        """Where the generated files lie, a directory a cell."""
        return self.root / "images"

    @cached_property
    def facts(self) -> Facts:
        """What is known of torch, CUDA and GPUs."""
        return Facts.load()

    @cached_property
    def family(self) -> Family:
        """All that the matrix says; raises MatrixError with everything that is wrong with it."""
        return matrices.family(text_of(self.matrix_path), self.facts, file=self.matrix_path.name)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells of the matrix."""
        return self.family.cells

    @property
    def policy(self) -> Policy:
        """How the images are published."""
        return self.family.policy

    def select(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """Return the cells that match a pattern, all if there is none."""
        return matrices.select(self.cells, patterns)

    # ------------------------------------------------------------------ where things lie

    def directory(self, cell: Cell) -> Path:
        """Return the directory of a cell."""
        return self.images / cell.id

    def lock_path(self, cell: Cell) -> Path:
        """Return the path of a cell's lock."""
        return self.directory(cell) / "pylock.toml"

    def base_lock_path(self, cell: Cell) -> Path:
        """Return the path of the lock of the cell's base."""
        return self.images / "bases" / f"{cell.base_name}-{architecture(cell)}.toml"

    def system_lock_path(self, cell: Cell) -> Path:
        """Return the path of the lock of the cell's base with the Debian packages that its variant adds."""
        return self.images / "bases" / f"{cell.base_name}-{architecture(cell)}-{cell.variant_name}.toml"

    # ------------------------------------------------------------------ reading

    def lock(self, cell: Cell) -> Lock:
        """Read the cell's lock; raises LockError if it is missing, damaged or stale."""
        return locks.load(self.lock_path(cell), cell)

    def base_lock(self, cell: Cell) -> BaseLock | None:
        """Read the lock of the cell's base; None for a registry image; raises LockError if missing or stale."""
        if not isinstance(cell.base, BootstrapBase):
            return None
        path = self.base_lock_path(cell)
        lock = _read(path, f"the base {cell.base_name}")
        if why := base_staleness(cell, lock):
            raise _stale(path, f"the base {cell.base_name}", why)
        return lock

    def system_lock(self, cell: Cell) -> BaseLock | None:
        """Read the lock of the base with the Debian packages that the cell's variant adds; None if it adds none.

        Raises LockError if it is missing or stale, or is not of the base's own packages and more.
        """
        base = self.base_lock(cell) if system_packages(cell) else None
        if base is None:
            return None
        path, what = self.system_lock_path(cell), f"the base {cell.base_name} for {cell.variant_name}"
        lock = _read(path, what)
        if why := system_staleness(cell, base, lock):
            raise _stale(path, what, why)
        return lock

    def plan(self, cell: Cell) -> Plan:
        """Render the cell from its locks."""
        return renders.render(
            cell,
            self.lock(cell),
            self.base_lock(cell),
            self.system_lock(cell),
            templates=renders.templates_of(self.root),
        )

    def plans(self, cells: Iterable[Cell]) -> tuple[Plan, ...]:
        """Render the cells; raises one error with the problems of all."""
        plans, errors = [], []
        for cell in cells:
            try:
                plans.append(self.plan(cell))
            except TorchyardError as error:
                errors.append(error)
        if errors:
            raise type(errors[0])(problems=tuple(dict.fromkeys(p for error in errors for p in error.problems)))
        return tuple(plans)

    def fresh_plans(self, cells: Iterable[Cell]) -> tuple[Plan, ...]:
        """Render the cells and require that images/ holds just that: what is built is what was committed."""
        plans = self.plans(cells)
        stale = self.stale(plans)
        if stale:
            raise LockError(problems=stale)
        return plans

    def stale(self, plans: Iterable[Plan]) -> tuple[Problem, ...]:
        """Return every file of images/ that is not what the plans give."""
        return tuple(problem for plan in plans for problem in renders.differences(plan, self.directory(plan.cell)))

    def strays(self) -> tuple[Path, ...]:
        """Return the generated directories of cells that the matrix no longer has."""
        known = {cell.id for cell in self.cells}
        return tuple(
            path
            for path in sorted(self.images.glob("*/"))
            if (path.name not in known and (path / "image.json").is_file()) or self._is_lone_lock(path, known)
        )

    @staticmethod
    def _is_lone_lock(path: Path, known: set[str]) -> bool:
        return path.name not in known and path.name != "bases" and [p.name for p in path.iterdir()] == ["pylock.toml"]

    def stale_catalogue(self) -> tuple[Problem, ...]:
        """Return the README as a problem if its table of images is not the matrix'."""
        if self._readme() == self._readme_with_table():
            return ()
        return (
            Problem(what="its table of images is not the matrix'", where=str(self.readme), tries=("torchyard render",)),
        )

    @property
    def readme(self) -> Path:
        """The file whose marked section holds the table of images, if the project wants one."""
        return self.root / "README.md"

    def _readme(self) -> str:
        try:
            return self.readme.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def _readme_with_table(self) -> str:
        text = self._readme()
        before, begin, rest = text.partition(CATALOGUE_BEGIN)
        _, end, after = rest.partition(CATALOGUE_END)
        if not (begin and end):
            return text
        table = renders.catalogue(self.cells, self.facts, templates=renders.templates_of(self.root))
        return f"{before}{begin}\n{table}{end}{after}"

    # ------------------------------------------------------------------ writing

    def write_catalogue(self) -> bool:
        """Write the table of images into the README, between its marks; returns whether that changed it."""
        text = self._readme_with_table()
        if text == self._readme():
            return False
        write_atomically(self.readme, text.encode())
        return True

    def write_lock(self, cell: Cell, lock: Lock) -> None:
        """Write a cell's lock; where nothing but the resolver's version is new, the one that is there stays."""
        with contextlib.suppress(LockError):
            if replace(self.lock(cell), resolver=lock.resolver) == lock:
                return
        write_atomically(self.lock_path(cell), locks.dumps(lock).encode())

    def write_base_lock(self, path: Path, lock: BaseLock) -> None:
        """Write the lock of a base, or of one with what a variant adds, where it belongs."""
        write_atomically(path, bases.dumps(lock).encode())

    def write(self, plan: Plan) -> bool:
        """Write the generated files of a cell; returns whether any changed."""
        directory = self.directory(plan.cell)
        changed = bool(renders.differences(plan, directory))
        for name, content in plan.files.items():
            if not (directory / name).is_file() or (directory / name).read_bytes() != content:
                write_atomically(directory / name, content)
        return changed

    def remove_stray(self, path: Path) -> bool:
        """Remove the generated files of a directory, and it if nothing else was there; returns whether it is gone."""
        for name in GENERATED:
            (path / name).unlink(missing_ok=True)
        programs = path / renders.PROGRAMS
        for program in programs.glob(f"{renders.PROGRAM}*"):
            program.unlink()
        if programs.is_dir() and not any(programs.iterdir()):
            programs.rmdir()
        if any(path.iterdir()):
            return False
        path.rmdir()
        return True


def architecture(cell: Cell) -> str:
    """Return the processor architecture of a cell as Debian and OCI name it."""
    return cell.platform.partition("/")[2]


def system_packages(cell: Cell) -> tuple[str, ...]:
    """Return the Debian packages that a cell's variant asks for and its base does not."""
    if not isinstance(cell.base, BootstrapBase):
        return ()
    return tuple(sorted(set(cell.variant.system) - set(cell.base.packages)))


def _read(path: Path, what: str) -> BaseLock:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise LockError(f"{what} is not locked", where=str(path), tries=("torchyard lock",)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LockError(f"the lock of {what} cannot be read", where=str(path), why=str(error)) from None
    return bases.loads(text, where=str(path))


def _stale(path: Path, what: str, why: str) -> LockError:
    return LockError(f"the lock of {what} is stale", where=str(path), why=why, tries=("torchyard lock",))


def base_staleness(cell: Cell, lock: BaseLock) -> str:
    """Say why a base's lock no longer answers the matrix; empty if it does."""
    assert isinstance(cell.base, BootstrapBase)
    if why := _staleness(cell, lock, cell.base.packages):
        return why
    if lock.python is not None and lock.python != cell.base.python:
        return f"{lock.suite} has Python {lock.python}, the matrix says {cell.base.python}"
    return ""


def system_staleness(cell: Cell, base: BaseLock, lock: BaseLock) -> str:
    """Say why a lock of system packages no longer answers the matrix, or the lock of the base; empty if it does."""
    if why := _staleness(cell, lock, (*base.packages, *cell.variant.system)):
        return why
    if lacking := lock.lacking(base):
        shown = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        return f"the base's own lock has other packages or versions since it was made: {shown}"
    return ""


def _staleness(cell: Cell, lock: BaseLock, packages: Iterable[str]) -> str:
    assert isinstance(cell.base, BootstrapBase)
    if (lock.suite, lock.architecture) != (cell.base.suite, architecture(cell)):
        return f"it is for {lock.suite} on {lock.architecture}"
    if changed := sorted(set(lock.packages) ^ set(packages)):
        return f"the matrix asks for other packages since it was made: {', '.join(changed)}"
    return ""
