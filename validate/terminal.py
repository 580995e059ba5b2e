"""Results as lines for people: one a check, and what was found below it."""

from __future__ import annotations

import textwrap
from typing import Dict, Iterator, Mapping, Sequence

from validate.verdict import (
    FAILED,
    HARNESS,
    PASSED,
    SKIPPED,
    WARNED,
    Result,
    Skip,
    Status,
    exit_code,
    is_missing,
    proven_tiers,
)

_MARKS: Mapping[Status, str] = {
    Status.PASS: "ok",
    Status.WARN: "warn",
    Status.FAIL: "FAIL",
    Status.SKIP: "skip",
    Status.ERROR: "ERROR",
    Status.WAIVED: "waived",
}
WIDTH = 110


def lines(result: Result) -> Iterator[str]:
    """Yield the lines of one result; none for a check of another kind of image, which the last lines count."""
    if result.skip is Skip.NOT_THIS_KIND:
        return
    detail = result.detail if result.status in (Status.PASS, Status.SKIP) else ""
    if result.waiver:
        detail = f"until {result.waiver.until.isoformat()}: {result.waiver.why}"
    time = f"{result.duration_s:6.1f} s" if result.status is not Status.SKIP else " " * 8
    reason = f"({result.skip.value}) " if result.skip else ""
    more = f": {reason}{detail}" if reason or detail else ""
    yield f"{_MARKS[result.status]:<6} {result.id:<20}{time}  {result.title}{more}"
    for finding in result.findings:
        yield from _indented(finding.what, "      ")
        for label, text in (("why", finding.why), ("try", finding.remedy)):
            yield from _indented(text, f"        {label}  ")
        if finding.mode:
            yield f"        see  torchyard explain {finding.mode}"


def _indented(text: str, first: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(
            line,
            WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        first = " " * len(first)


def summary(results: Sequence[Result], *, on_skip: str, strict: bool, narrowed: bool) -> Iterator[str]:
    """Yield the last lines: what is proven, what is not, and what the exit code means."""
    mine = [result for result in results if result.skip is not Skip.NOT_THIS_KIND]
    counts: Dict[Status, int] = {status: sum(result.status is status for result in mine) for status in Status}
    words = [f"{count} {_MARKS[status]}" for status, count in counts.items() if count]
    if len(results) > len(mine):
        words.append(f"{len(results) - len(mine)} for other kinds of images")
    yield " · ".join(words) or "no checks"
    names = {1: "without a GPU", 2: "on one GPU", 3: "on several GPUs"}
    if narrowed:
        yield "a selection of the checks: no tier is proven by it"
    tiers = {} if narrowed else proven_tiers(results)
    for tier, proven in tiers.items():
        yield f"T{tier} {names[tier]}: {'proven' if proven else 'not proven'}"
    if tiers and 2 not in tiers and any(result.evidence.get("facts", {}).get("cuda") for result in results):
        yield f"T2 {names[2]}: not tried, --gpus all tries it"
    code = exit_code(results, on_skip=on_skip, strict=strict)
    missing = any(is_missing(result) for result in results)
    yield {
        PASSED: "passed",
        FAILED: "failed: a check failed",
        HARNESS: "nothing was checked",
        SKIPPED: f"not passed: {'what was required did not run' if missing else 'nothing that was required is proven'}",
        WARNED: "not passed: warnings, and --strict",
    }[code]
