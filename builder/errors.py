"""Every way torchyard can refuse or fail: typed values with fields, printed once, in `cli`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where (file and path inside it), why, and what to try."""

    what: str
    where: str = ""
    why: str = ""
    tries: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class TorchyardError(Exception):
    """Base of all expected failures; carries one problem or several found together."""

    exit_code: ClassVar[int]
    problems: tuple[Problem, ...]

    def __init__(
        self,
        what: str | None = None,
        *,
        where: str = "",
        why: str = "",
        tries: tuple[str, ...] = (),
        problems: tuple[Problem, ...] = (),
    ) -> None:
        if what is not None:
            problems = (Problem(what=what, where=where, why=why, tries=tries), *problems)
        assert problems, "an error says what is wrong"
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class CellFailedError(TorchyardError):
    """A cell, check or comparison failed: a build step, a proof, a difference."""

    exit_code = 1


class MatrixError(TorchyardError):
    """The matrix, the configuration or the command line is not valid."""

    exit_code = 2


class ImpossibleError(TorchyardError):
    """What was asked for cannot exist: no such combination, cell or image."""

    exit_code = 3


class LockError(TorchyardError):
    """A lock is missing, stale, edited or of an unknown schema."""

    exit_code = 4


class ResolveError(TorchyardError):
    """The resolver found no set of wheels that satisfies the cell."""

    exit_code = 5


class HashMismatchError(TorchyardError):
    """Bytes are not those that the lock names."""

    exit_code = 6


class SourceError(TorchyardError):
    """An index, mirror or registry could not be reached or lacks what is locked."""

    exit_code = 7


class EngineError(TorchyardError):
    """No usable container engine, or it broke off."""

    exit_code = 8


class DiskError(TorchyardError):
    """Not enough free disk for what was asked."""

    exit_code = 9


class ToolError(TorchyardError):
    """A program torchyard needs is missing or failed in a way it cannot explain."""

    exit_code = 10


class WheelError(TorchyardError):
    """A wheel is unsafe, damaged, or not what its own record says."""

    exit_code = 11


class InterruptedRunError(TorchyardError):
    """The user stopped the run."""

    exit_code = 130
