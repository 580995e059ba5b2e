"""What a check is: an id, a tier, what must hold before it, a deadline, and a function that looks and judges.

A file in `validate/checks/` that uses the decorator below is all it takes to add one. The files are read by a process
that must be quick and must not have loaded torch, so they import torch only inside their functions.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from validate.verdict import Blame, Finding, Skip, Status

_ID = re.compile(r"[a-z]+\.[a-z0-9]+(?:-[a-z0-9]+)*")
DEADLINE_S = 300.0
"""It ends what hangs and measures nothing: more than ten times what a check takes on two cores that others use as well.
A check may have a later one, for what compiles; none has an earlier one."""

Body = Callable[["Probe"], None]
Report = Callable[[Mapping[str, Any]], None]
"""Takes one thing that was seen, as JSON: it is not lost if the process dies later."""


class StoppedError(Exception):
    """The check has seen enough: its findings, or the reason to skip, are told already."""


class SkippedError(StoppedError):
    """The check cannot run here."""

    def __init__(self, reason: Skip, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Request:
    """What a run was asked for, and what is known before it; the same for all its checks."""

    declared: Optional[Mapping[str, Any]] = None
    """What the image was declared to be, its `image.json`; None for an image of somebody else."""
    image: bool = False
    """Whether it is an image in a container of its own; a machine, and whatever the suite was started in, is none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The profile's numbers, overridden by the command line."""
    device: str = "cuda:0"
    """Where T2 checks compute; tests of the checks use "cpu" as a stand-in."""
    scratch: str = "/tmp"  # noqa: S108 (where the run has a directory of its own)
    """A directory that can be written, and that programs can be started from; gone after the run."""

    def as_json(self) -> Dict[str, Any]:
        """Return the request as it travels to a check's process."""
        return {
            "declared": None if self.declared is None else dict(self.declared),
            "image": self.image,
            "options": dict(self.options),
            "device": self.device,
            "scratch": self.scratch,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Request:
        """Read what `as_json` gave."""
        return cls(
            declared=document["declared"],
            image=document["image"],
            options=document["options"],
            device=document["device"],
            scratch=document["scratch"],
        )


class Probe:
    """A check's hands: what it was asked, and where it puts what it saw."""

    def __init__(self, request: Request, report: Report) -> None:
        self.request = request
        self.device = request.device
        self.findings: List[Finding] = []
        self._report = report

    @property
    def options(self) -> Mapping[str, Any]:
        """The profile's numbers, overridden by the command line."""
        return self.request.options

    @property
    def declared(self) -> Mapping[str, Any]:
        """What the image was declared to be; a check that needs it is skipped where nothing was declared."""
        if self.request.declared is None:
            self.skip(Skip.NOT_DECLARED, "the image does not say what it should be: it has no image.json")
        return self.request.declared

    def metric(self, name: str, value: float, unit: str, *, better: str = "") -> None:
        """Record a number."""
        self._report({"metric": name, "value": float(value), "unit": unit, "better": better})

    def saw(self, **values: Any) -> None:  # noqa: ANN401 (whatever JSON can hold)
        """Record what was seen, by name; lists and mappings of plain values, too."""
        self._report({"evidence": values})

    def detail(self, text: str) -> None:
        """Sum up in one line what was seen, for people."""
        self._report({"detail": text})

    def warn(self, what: str, *, why: str = "", remedy: str = "", mode: str = "", blame: Blame = Blame.UNKNOWN) -> None:
        """Note what is wrong but lets the environment work."""
        self._add(Finding(Status.WARN, what, why, remedy, mode, blame))

    def fail(self, what: str, *, why: str = "", remedy: str = "", mode: str = "", blame: Blame = Blame.IMAGE) -> None:
        """Note what is wrong; the check may go on to find more."""
        self._add(Finding(Status.FAIL, what, why, remedy, mode, blame))

    def stop(
        self, what: str, *, why: str = "", remedy: str = "", mode: str = "", blame: Blame = Blame.IMAGE
    ) -> NoReturn:
        """Note what is wrong and end the check."""
        self.fail(what, why=why, remedy=remedy, mode=mode, blame=blame)
        raise StoppedError(what)

    def skip(self, reason: Skip, detail: str) -> NoReturn:
        """End the check without a verdict."""
        raise SkippedError(reason, detail)

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._report({"finding": finding.as_json()})


@dataclass(frozen=True)
class Check:
    """One check, as its decorator declares it."""

    id: str
    title: str
    tier: int
    """1 needs no GPU, 2 one, 3 several."""
    body: Body
    needs: Tuple[str, ...] = ()
    """Ids of checks that must not have failed."""
    deadline_s: float = DEADLINE_S
    gpus: int = 0
    exclusive: bool = False
    """Nothing else may run beside it: it measures, or it uses all cores."""
    foreign_user: bool = False
    """It tries what a user can do who has no entry in /etc/passwd."""
    modes: Tuple[str, ...] = ()
    """Failure modes of `failures.json` that it can find."""


CHECKS: Dict[str, Check] = {}


def check(
    name: str,
    *,
    title: str,
    tier: int,
    needs: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
    gpus: Optional[int] = None,
    exclusive: Optional[bool] = None,
    foreign_user: bool = False,
    modes: Sequence[str] = (),
) -> Callable[[Body], Body]:
    """Declare the function below it as the check `name`; the title is what it proves, as a phrase."""
    assert _ID.fullmatch(name), name

    def declare(body: Body) -> Body:
        assert name not in CHECKS, f"{name} is declared twice"
        CHECKS[name] = Check(
            id=name,
            title=title,
            tier=tier,
            body=body,
            needs=tuple(needs),
            deadline_s=deadline_s,
            gpus=max(0, tier - 1) if gpus is None else gpus,
            exclusive=tier >= 2 if exclusive is None else exclusive,
            foreign_user=foreign_user,
            modes=tuple(modes),
        )
        return body

    return declare


def load() -> Mapping[str, Check]:
    """Return every check by its id: by tier, and in a tier in the order of the files and of the lines in them."""
    package = importlib.import_module("validate.checks")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda it: it.name):
        importlib.import_module(f"validate.checks.{module.name}")
    unknown = {need for one in CHECKS.values() for need in one.needs} - set(CHECKS)
    assert not unknown, f"checks need what is no check: {sorted(unknown)}"
    return dict(sorted(CHECKS.items(), key=lambda item: item[1].tier))
