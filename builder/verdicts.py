"""Verdicts of other machines: reports that were made elsewhere, and count here if they are about the images of here.

A report is believed as far as the way it came is: whoever can put one there could have made it up. What is checked is
that it is about an image that this store made itself, with the same digest, and that nothing less was asked of it than
`torchyard validate` asks here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import build, gate
from builder.engines.oci import OciEngine
from builder.errors import MatrixError, Problem
from builder.render import Plan
from builder.report import Report, load
from builder.store import Store
from validate import bundle
from validate.profile import PROFILES

NAME = "report.json"
_MOST_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A report from elsewhere, and the cell that it is about."""

    path: Path
    report: Report
    cell_id: str

    @property
    def digest(self) -> str:
        """Digest of the image."""
        assert self.report.subject.digest is not None, "it was found by it"
        return self.report.subject.digest


def find(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the files that are named, and every report.json below the directories that are.

    Raises MatrixError naming each directory that has none.
    """
    found: list[Path] = []
    problems = []
    for path in paths:
        below = sorted(path.rglob(NAME)) if path.is_dir() else [path]
        if not below:
            tries = ("torchyard validate writes them",)
            problems.append(Problem(what=f"there is no {NAME}", where=str(path), tries=tries))
        found += below
    if problems:
        raise MatrixError(problems=tuple(problems))
    return tuple(dict.fromkeys(found))


def read(paths: Sequence[Path], plans: Iterable[Plan], store: Store) -> tuple[Arrived, ...]:
    """Return the reports; raises MatrixError, with every reason, if one of them may not count for the plans' images."""
    images = {
        image.manifest.digest: plan
        for plan in plans
        if (image := build.complete(plan, store, builder=OciEngine.name)) is not None
    }
    arrived: list[Arrived] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            report = load(path)
        except MatrixError as error:
            problems += error.problems
            continue
        plan = images.get(report.subject.digest or "")
        if plan is None:
            problems.append(_unknown(path, report))
            continue
        problems += [Problem(what=what, where=str(path), why=why) for what, why in _less(report, plan).items()]
        arrived.append(Arrived(path=path, report=report, cell_id=plan.cell.id))
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        left = (Problem(what=f"and {more} more"),) if more > 0 else ()
        raise MatrixError(problems=(*problems[:_MOST_PROBLEMS], *left))
    return tuple(arrived)


def _unknown(path: Path, report: Report) -> Problem:
    return Problem(
        what="a report is about an image that is not here",
        where=str(path),
        why=f"it is about {report.subject.digest or 'one without a digest'} ({report.name})",
        tries=(
            "torchyard build it here: from the same locks the same torchyard makes the same digest",
            "validate the image that is here",
        ),
    )


def _less(report: Report, plan: Plan) -> Mapping[str, str]:
    """Say in which way a run asked for less than one of here would, and why that is known."""
    found: dict[str, str] = {}
    if report.subject.declared != json.loads(plan.files["image.json"]):
        found["it held the image to another declaration than the matrix'"] = f"{plan.cell.id} is declared in images/"
    suite = f"sha256:{bundle.digest()}"
    if report.suite.digest != suite:
        found["it was made by another suite"] = f"this torchyard's is {suite}, that one was {report.suite.digest}"
    profile = PROFILES.get(report.profile.name)
    if profile is None:
        found[f"this torchyard has no profile {report.profile.name!r}"] = f"it has {', '.join(PROFILES)}"
        return found
    # `gpus` says how many were to be there, which the tiers say again.
    numbers = {name: value for name, value in profile.numbers.items() if name != "gpus"}
    given = {name: value for name, value in report.profile.options.items() if name != "gpus"}
    if changed := sorted(name for name in {*numbers, *given} if numbers.get(name) != given.get(name)):
        found["numbers of the profile were changed"] = ", ".join(f"{name}={given.get(name)}" for name in changed)
    return found


def keep(store: Store, arrived: Iterable[Arrived]) -> tuple[dict[str, Any], ...]:
    """Keep reports as verdicts of their images; of several about one image, one that failed counts."""
    # The last one counts, and several machines may have tried the same.
    ordered = sorted(arrived, key=lambda one: (not one.report.verdict.passed, one.report.started))
    return tuple(
        {
            "id": one.cell_id,
            "digest": one.digest,
            "path": str(one.path),
            "tiers": list(gate.keep(store, one.digest, one.report)),
            "passed": one.report.verdict.passed,
        }
        for one in ordered
    )
