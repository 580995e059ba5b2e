"""Who may be published: an image with a passing verdict for its very digest, and any other only under a mark.

A verdict is the report of a validation, kept as the suite wrote it. What a container reported when an image was loaded
(`build`) is none: it says what is in the image, not that it works.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import layout
from builder.errors import CellFailedError, MatrixError, Problem
from builder.layout import Image
from builder.report import Report, Status, dumps, load
from builder.store import Store, write_atomically

TIERS = (1,)
"""What must be proven before anything is published: that the image is what it declares, and works without a GPU."""
MARK = "torchyard.unproven"
"""Label and annotation of an image that was published without a verdict."""
SUFFIX = "-unproven"
"""What the tags of such an image end in."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the last validation that tried a tier found of it."""

    tier: int
    report: Report

    @property
    def refusal(self) -> str:
        """Why nothing can be published on its word; empty if it can."""
        if not self.report.verdict.tiers.get(str(self.tier)):
            return f"T{self.tier} is not proven: {self.report.meaning}"
        if not self.report.verdict.passed:
            return self.report.meaning
        today = dt.datetime.now(dt.UTC).date()
        over = [one for one in self.report.with_status(Status.WAIVED) if one.waiver and one.waiver.until < today]
        return "; ".join(f"{one.id} was waived until {one.waiver.until}" for one in over if one.waiver)

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as it is shown to machines."""
        return {
            "tier": self.tier,
            "passed": not self.refusal,
            "at": self.report.volatile.started,
            "profile": self.report.profile.name,
            "suite": {"version": self.report.suite.version, "digest": self.report.suite.digest},
            "waived": [one.id for one in self.report.with_status(Status.WAIVED)],
        }


# ----------------------------------------------------------------------------------------------------
# Verdicts


def _path(store: Store, digest: str, tier: int) -> Path:
    return store.root / "proofs" / "verdicts" / digest.removeprefix("sha256:") / f"t{tier}.json"


def keep(store: Store, digest: str, report: Report) -> tuple[int, ...]:
    """Keep a report as the verdict of an image on each tier that the run tried to prove; returns these tiers.

    A later run replaces an earlier one, whether it passed or not; a run of some of the checks tries no tier.
    """
    if report.subject.digest != digest:
        raise MatrixError(
            "a report is about another image", where=digest, why=f"it names {report.subject.digest or 'none'}"
        )
    tried = {result.tier for result in report.results if result.required}
    tiers = tuple(sorted(tried & {int(tier) for tier in report.verdict.tiers}))
    content = dumps(report).encode()
    for tier in tiers:
        write_atomically(_path(store, digest, tier), content)
    return tiers


def verdict(store: Store, digest: str, tier: int) -> Verdict | None:
    """Return what is known of a tier of an image; None if it was never validated, or what was kept is damaged."""
    path = _path(store, digest, tier)
    if not path.is_file():
        return None
    try:
        report = load(path)
    except MatrixError:
        return None
    return Verdict(tier=tier, report=report) if report.subject.digest == digest else None


def require(store: Store, digest: str, *, name: str, tiers: Sequence[int] = TIERS) -> tuple[Verdict, ...]:
    """Return the verdicts on the tiers; raises CellFailedError, with every reason, if an image may not be published.

    `name` is what its cell is called.
    """
    found: list[Verdict] = []
    problems: list[Problem] = []
    for tier in tiers:
        known = verdict(store, digest, tier)
        why = f"it was never validated at T{tier}, or before it changed" if known is None else known.refusal
        if known is not None and not why:
            found.append(known)
            continue
        gpus = " --gpus all" if tier > 1 else ""
        problems.append(
            Problem(
                what=f"{name} has no passing verdict, and is not published",
                where=digest,
                why=why,
                tries=(
                    f"torchyard validate {name}{gpus}",
                    "publish it with a mark that says so: --unproven",
                ),
            )
        )
    if problems:
        raise CellFailedError(problems=tuple(problems))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------
# The mark


def marked(store: Store, image: Image) -> Image:
    """Return the image with a label and an annotation that say that it is unproven: other digests, the same layers.

    The label goes wherever the image goes, and `docker inspect` shows it; the annotation can be read without fetching
    anything. No verdict can ever be about a marked image, for validation is of images as they are built.
    """
    document = _document(store, image.config.digest)
    run = document.get("config") or {}
    document["config"] = {**run, "Labels": {**(run.get("Labels") or {}), MARK: "true"}}
    config = layout.put_json(store, document, image.config.media_type)
    about = _document(store, image.manifest.digest)
    about["config"] = config.as_json()
    about["annotations"] = {**about.get("annotations", {}), MARK: "true"}
    return replace(image, config=config, manifest=layout.put_json(store, about, image.manifest.media_type))


def _document(store: Store, digest: str) -> dict[str, Any]:
    document = json.loads(store.path(digest.removeprefix("sha256:")).read_bytes())
    assert isinstance(document, dict), digest
    return document
