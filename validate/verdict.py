"""The words a validation ends in: statuses, reasons to skip, who is to blame, findings, results, exit codes.

A run that proved nothing is never green: what was required and did not run decides the exit code as a failure does.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Dict, List, Mapping, Optional, Sequence

from validate.waivers import Waiver


class Status(str, Enum):
    """What became of a check."""

    PASS = "pass"  # noqa: S105
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"
    """The check itself broke or ran out of time in a way that nothing can be blamed for."""
    WAIVED = "waived"
    """It failed or broke, and somebody gave a reason to live with that until a day that is not over."""


class Skip(str, Enum):
    """Why a check did not run."""

    NO_GPU = "no_gpu"
    NEEDS_GPUS = "needs_gpus"
    """The machine has a GPU, but not as many as the check needs."""
    CPU_BUILD = "cpu_build"
    """This torch was built without CUDA."""
    DEPENDENCY_FAILED = "dependency_failed"
    UNSUPPORTED_BY_VERSION = "unsupported_by_version"
    UNSUPPORTED_BY_DEVICE = "unsupported_by_device"
    NOT_DECLARED = "not_declared"
    """There is nothing to compare with: the image says nowhere what it should be."""
    NEEDS_OTHER_USER = "needs_other_user"
    """Only root can try what another user could do."""
    NOT_THIS_KIND = "not_this_kind"
    """The image is for something else: it has not what the check is about."""
    BUDGET = "budget"
    """The time given to the whole run was used up."""


class Blame(str, Enum):
    """What has to change; only the image's own faults should hold up a release."""

    IMAGE = "image"
    HOST = "host"
    HARNESS = "harness"
    UNKNOWN = "unknown"


PASSED, FAILED, USAGE, HARNESS, SKIPPED, WARNED = range(6)
"""Exit codes. FAILED: a check failed or broke, required or not. HARNESS: the checks could not be run at all. SKIPPED:
what was required did not run, or nothing that was required is proven. WARNED: warnings under --strict."""

ON_SKIP = ("fail", "warn", "pass")
EXCUSED = (Skip.NOT_DECLARED, Skip.NEEDS_OTHER_USER, Skip.NOT_THIS_KIND)
"""Reasons for which a required check may be skipped: there is nothing it could have found."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check noticed: what is wrong, why that is so or how it shows, and what to do about it."""

    status: Status
    """WARN or FAIL."""
    what: str
    why: str = ""
    remedy: str = ""
    mode: str = ""
    """Failure mode of `failures.json`, "F01"; empty if there is none for it."""
    blame: Blame = Blame.UNKNOWN

    def as_json(self) -> Dict[str, str]:
        """Return the finding as a report has it."""
        return {
            "status": self.status.value,
            "what": self.what,
            "why": self.why,
            "remedy": self.remedy,
            "mode": self.mode,
            "blame": self.blame.value,
        }


@dataclass(frozen=True)
class Metric:
    """A number with its unit ("GB/s"), and which way is better: "higher", "lower" or "" for neither."""

    value: float
    unit: str
    better: str = ""


@dataclass
class Result:
    """What one check gave."""

    id: str
    title: str
    tier: int
    status: Status
    required: bool = False
    skip: Optional[Skip] = None
    waiver: Optional[Waiver] = None
    """Of a waived one."""
    detail: str = ""
    """For people: why it was skipped, or the one line that sums a pass up."""
    findings: List[Finding] = field(default_factory=list)
    metrics: Dict[str, Metric] = field(default_factory=dict)
    evidence: Dict[str, Any] = field(default_factory=dict)
    """Values that were seen, as JSON; what a pass is made of."""
    output: str = ""
    """The end of what the check's process printed; only kept if it did not pass."""
    duration_s: float = 0.0

    @property
    def group(self) -> str:
        """The part of the id before the dot: "lib" of "lib.cudnn"."""
        return self.id.partition(".")[0]

    def as_json(self) -> Dict[str, Any]:
        """Return the result as a report has it; its duration stands elsewhere, with all that changes each time."""
        return {
            "id": self.id,
            "title": self.title,
            "group": self.group,
            "tier": self.tier,
            "required": self.required,
            "status": self.status.value,
            "skip": self.skip.value if self.skip else None,
            "waiver": {"why": self.waiver.why, "until": self.waiver.until.isoformat()} if self.waiver else None,
            "detail": self.detail,
            "findings": [finding.as_json() for finding in self.findings],
            "metrics": {
                name: {"value": metric.value, "unit": metric.unit, "better": metric.better}
                for name, metric in self.metrics.items()
            },
            "evidence": self.evidence,
            "output": self.output,
        }


def finding_of(document: Mapping[str, str]) -> Finding:
    """Read what `Finding.as_json` gave."""
    fields = dict(document)
    return Finding(status=Status(fields.pop("status")), blame=Blame(fields.pop("blame")), **fields)


def result_of(document: Mapping[str, Any]) -> Result:
    """Read what `Result.as_json` gave; raises KeyError, ValueError or TypeError if it is something else."""
    waiver = document["waiver"]
    result = Result(
        id=document["id"],
        title=document["title"],
        tier=document["tier"],
        status=Status(document["status"]),
        skip=Skip(document["skip"]) if document["skip"] else None,
        waiver=Waiver(document["id"], waiver["why"], dt.date.fromisoformat(waiver["until"])) if waiver else None,
        detail=document["detail"],
        evidence=dict(document["evidence"]),
        output=document["output"],
        duration_s=float(document.get("seconds", 0.0)),
    )
    result.findings += [finding_of(finding) for finding in document["findings"]]
    for name, metric in document["metrics"].items():
        result.metrics[name] = Metric(metric["value"], metric["unit"], metric["better"])
    return result


def waived(result: Result, waiver: Waiver, today: dt.date) -> Result:
    """Return the result under a waiver: what failed or broke is waived until its day is over, and told after that.

    What did not fail, or did not run, is as it was.
    """
    if result.status not in (Status.FAIL, Status.ERROR):
        return result
    if waiver.until >= today:
        return replace(result, status=Status.WAIVED, waiver=waiver)
    over = Finding(
        Status.FAIL,
        f"the waiver of {waiver.check} is over: it ended with {waiver.until.isoformat()}",
        why=f"it was given because: {waiver.why}",
        remedy="mend what fails, or look at the reason again and give the waiver a later date",
    )
    return replace(result, findings=[*result.findings, over])


def is_missing(result: Result) -> bool:
    """Tell whether a required check did not run, and no good reason excuses it."""
    return result.required and result.status is Status.SKIP and result.skip not in EXCUSED


def exit_code(results: Sequence[Result], *, on_skip: str = "fail", strict: bool = False) -> int:
    """Return the exit code of a run; of nothing at all it is HARNESS, for nothing was proven.

    A waived check neither fails a run nor proves anything.
    """
    if not results:
        return HARNESS
    required = [result for result in results if result.required]
    if any(result.status in (Status.FAIL, Status.ERROR) for result in results):
        return FAILED
    skipped = any(is_missing(result) for result in results)
    if skipped and on_skip not in ("warn", "pass"):
        return SKIPPED
    proven = any(result.status in (Status.PASS, Status.WARN) for result in required)
    if not proven:
        return SKIPPED
    warned = any(result.status is Status.WARN for result in results) or (skipped and on_skip == "warn")
    return WARNED if strict and warned else PASSED


def proven_tiers(results: Sequence[Result]) -> Mapping[int, bool]:
    """Return, for each tier with a check in the run, whether it is proven.

    That is: a required check of it passed, and none failed or is missing; one that is waived counts neither way.
    """
    tiers: Dict[int, bool] = {}
    for tier in sorted({result.tier for result in results}):
        required = [result for result in results if result.tier == tier and result.required]
        bad = any(result.status in (Status.FAIL, Status.ERROR) or is_missing(result) for result in required)
        tiers[tier] = not bad and any(result.status in (Status.PASS, Status.WARN) for result in required)
    return tiers
