"""Observed = declared: what a container of the image reports, compared with what its cell promised."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from builder.engines import Runner
from builder.errors import CellFailedError, Problem
from builder.render import PREFIX, Plan

TIMEOUT_S = 300.0
"""Importing torch from a cold disk takes tens of seconds on a busy machine; a hang takes for ever."""
SCHEMA = 1
"""Of what `validate/facts.py` writes."""
_SCRIPT = "/tmp/torchyard-facts.py"  # noqa: S108 (inside a container of its own)
_OUTPUT = "/tmp/torchyard-facts.json"  # noqa: S108

_WHAT = {
    "torch": "torch.__version__",
    "cuda": "torch.version.cuda",
    "cudnn_number": "the loaded cuDNN",
    "nccl": "the loaded NCCL",
    "python": "Python",
    "architectures": "the GPU architectures torch was compiled for",
}


def observe(plan: Plan, digest: str, runner: Runner) -> Mapping[str, Any]:
    """Run `validate/facts.py` in a container of the image and return what it wrote.

    Raises CellFailedError if it ended without facts, or badly after them; what it printed is in the error.
    """
    script = resources.files("validate").joinpath("facts.py").read_bytes()
    result = runner.run(
        digest,
        [f"{PREFIX}/bin/python", "-I", _SCRIPT, _OUTPUT],
        files={_SCRIPT: script},
        collect=[_OUTPUT],
        timeout_s=TIMEOUT_S,
    )
    found: object = None
    with contextlib.suppress(KeyError, ValueError):
        found = json.loads(result.files[_OUTPUT])
    if result.exit_code != 0 or not _is_report(found):
        why = f"no answer within {TIMEOUT_S:.0f} s" if result.exit_code == 124 else f"exit code {result.exit_code}"
        if result.exit_code == 0:
            why += ", but what it wrote are no facts"
        raise CellFailedError(
            f"{plan.cell.id}: the image could not say what it is",
            where=digest,
            why="\n".join([why, *result.log.splitlines()[-15:]]),
        )
    assert isinstance(found, dict)
    return found


def _is_report(found: object) -> bool:
    """Tell whether an image wrote what `validate/facts.py` writes; it is data of somebody else."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return False
    facts, errors = found.get("facts"), found.get("errors")
    return isinstance(facts, dict) and all(
        isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
        for texts in (errors, facts.get("packages", {}))
    )


def differences(plan: Plan, observed: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield every way in which the image is not what its cell declares; a fact that is missing is a difference."""
    facts: Mapping[str, Any] = observed["facts"]
    errors: Mapping[str, str] = observed["errors"]
    expected = plan.expectation
    for name, what in _WHAT.items():
        declared: Any = getattr(expected, name)
        if name == "architectures":
            if not declared:
                continue
            declared = sorted(declared)
        if name not in facts:
            yield Problem(what=f"{what} could not be found out", why=errors.get(name, "no reason was given"))
        elif facts[name] != declared:
            yield Problem(what=f"{what} is {_spell(facts[name])}", why=f"declared: {_spell(declared)}")
    if "packages" not in facts:
        yield Problem(
            what="the installed packages could not be listed", why=errors.get("packages", "no reason was given")
        )
        return
    installed: Mapping[str, str] = facts["packages"]
    for package in sorted({*installed, *expected.packages}):
        declared, found = expected.packages.get(package), installed.get(package)
        if found is None:
            yield Problem(what=f"{package} is not installed", why=f"locked: {declared}")
        elif declared is None:
            yield Problem(what=f"{package} {found} is installed", why="the lock does not have it")
        elif declared != found:
            yield Problem(what=f"{package} is {found}", why=f"locked: {declared}")


def _spell(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def prove(plan: Plan, digest: str, runner: Runner) -> Mapping[str, Any]:
    """Return the facts that a container of the image reports, if they are what its cell declares; see `judge`."""
    return judge(plan, digest, observe(plan, digest, runner))


def judge(plan: Plan, digest: str, observed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the facts of an image that is what its cell declares; raises CellFailedError with every difference.

    `observed` is what `validate/facts.py` writes in a container, or what an engine read out of the image's bytes.
    """
    found = tuple(differences(plan, observed))
    if found:
        raise CellFailedError(
            f"{plan.cell.id}: the image is not what its cell declares, and gets no tag",
            where=digest,
            why=f"{len(found)} difference{'s' if len(found) > 1 else ''}",
            problems=found,
        )
    facts: Mapping[str, Any] = observed["facts"]
    return facts
