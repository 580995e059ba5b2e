"""Environments in which a check must not pass: Python that runs in the check's own process before it.

Each check has at least one (`tests/unit/test_mutations.py` sees to it), so no check can be green whatever happens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from validate.verdict import Result, Status


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One environment, and what the check must say of it."""

    check: str
    name: str
    """What is wrong, in a few words."""
    prelude: str
    """Python; it may plant modules in sys.modules, patch torch, change os.environ or the limits of the process."""
    says: str
    """Stands in one of the check's findings, or in its detail if it is skipped."""
    status: Status = Status.FAIL
    needs: Literal["python", "torch", "llm"] = "python"
    """What it runs in: any Python, all else being planted by the prelude; the CPU cell; or the CPU cell's llm image."""
    declared: Mapping[str, Any] | None = None
    """The image.json that the environment is held to."""
    image: bool = False
    """Whether the check is told that it is in a container of its own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Over the profile's defaults."""
    device: str = "cpu"
    """Stand-in for the GPU."""


def all_mutations() -> Sequence[Mutation]:
    """Return every mutation of `tests/mutations/`."""
    package = importlib.import_module("tests.mutations")
    found: list[Mutation] = []
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda it: it.name):
        found += importlib.import_module(f"tests.mutations.{module.name}").MUTATIONS
    return found


def complaint(mutation: Mutation, result: Result) -> str | None:
    """Return what is wrong with a result, None if it is what the mutation demands."""
    told = "\n".join([result.detail, *(f"{it.what}\n{it.why}\n{it.remedy}" for it in result.findings)])
    if result.status is not mutation.status:
        return f"{mutation.check} in {mutation.name!r}: {result.status.value}, not {mutation.status.value}:\n{told}"
    if mutation.says not in told:
        return f"{mutation.check} in {mutation.name!r}: does not say {mutation.says!r} but:\n{told}"
    if any(finding.blame.value == "harness" for finding in result.findings):
        return f"{mutation.check} in {mutation.name!r}: the check itself broke:\n{told}"
    return None
