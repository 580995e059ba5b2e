"""A report as Markdown for a CI step's summary or a comment, and as GitHub's annotations: remedies first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence

from builder.report import Finding, Report, Result, Status, line, plain, shown

MAX_LINES = 64
_MOST_FAILURES, _MOST_WARNINGS, _MOST_WAIVED, _MOST_NUMBERS, _MOST_GROUPS = 8, 4, 3, 12, 15
_LONGEST = 300
"""Characters of one text; the whole of it is in the report."""
_MOST_ANNOTATIONS = 10
"""Of errors, of warnings, and of notices: GitHub shows no more of a step."""
MARKS: Mapping[Status, str] = {
    Status.PASS: "✓",
    Status.WARN: "!",
    Status.FAIL: "✗",
    Status.SKIP: "-",
    Status.ERROR: "✗",
    Status.WAIVED: "○",
}


def markdown(report: Report) -> str:
    """Return the report in at most MAX_LINES lines of Markdown."""
    lines = [
        f"### {'✅' if report.verdict.passed else '❌'} {_text(report.name)}: {report.meaning}",
        "",
        _counts(report),
        "",
        *_bad(report),
        *_numbers(report),
        *_details(report),
    ]
    assert len(lines) <= MAX_LINES, "the parts are bounded"
    return "\n".join(lines).rstrip("\n") + "\n"


def overview(reports: Mapping[str, Report]) -> str:
    """Return a table of many reports, each by its name."""
    rows = [
        "| environment | verdict | torch | CUDA | device | checks | not passed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        facts = report.environment.facts
        bad = report.with_status(Status.FAIL, Status.ERROR) or report.missing()
        cells = [
            _text(name),
            f"{'✅' if report.verdict.passed else '❌'} {report.meaning}",
            _text(str(facts.get("torch") or "-")),
            _text(str(facts.get("cuda") or "-")),
            _text(report.driver.devices or "-"),
            str(len(report.results) - len(report.others)),
            _listed([*bad, *report.with_status(Status.WAIVED)]) or "-",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def workflow_commands(report: Report) -> str:
    """Return commands that make GitHub show what is wrong beside the job, one a line; none if nothing is."""
    errors: list[str] = []
    warnings: list[str] = []
    notices = [_command("notice", one.id, f"waived {one.waiver}") for one in report.with_status(Status.WAIVED)]
    for result in report.results:
        # What a waived one found has been accepted.
        for finding in result.findings if result.waiver is None else ():
            failed = finding.status is Status.FAIL
            text = f"{finding.what}. {finding.remedy}" if finding.remedy else finding.what
            (errors if failed else warnings).append(_command("error" if failed else "warning", result.id, text))
    errors += [
        _command("error", result.id, f"did not run: {result.skip}: {result.detail}") for result in report.missing()
    ]
    if not report.verdict.passed and not errors:
        errors.append(_command("error", "verdict", report.meaning))
    return "".join(f"{one}\n" for kind in (errors, warnings, notices) for one in kind[:_MOST_ANNOTATIONS])


def _command(kind: str, title: str, text: str) -> str:
    def data(value: str) -> str:
        return plain(value).replace("%", "%25").replace("\n", "%0A")

    return f"::{kind} title={data(title).replace(':', '%3A').replace(',', '%2C')}::{data(text)}"


def _counts(report: Report) -> str:
    parts = [f"{count} {status}" for status, count in report.counts().items()]
    parts += [f"{len(report.others)} for other kinds of images"] if report.others else []
    tiers = [f"T{tier} {'proven' if proven else 'not proven'}" for tier, proven in report.verdict.tiers.items()]
    tiers += ["T2 not tried"] if report.untried else []
    facts = report.environment.facts
    known = [f"{name} {facts[key]}" for name, key in (("torch", "torch"), ("CUDA", "cuda")) if facts.get(key)]
    words = [*parts, *tiers, f"profile {report.profile.name}", *known]
    return _text(" · ".join([*words, *([report.driver.devices] if report.driver.devices else [])]))


def _bad(report: Report) -> Iterator[str]:
    """Yield what is wrong, failures first, each on a line with its remedy."""
    failed = [*_found(report, Status.FAIL)]
    silent = [one for one in report.with_status(Status.FAIL, Status.ERROR) if not one.findings]
    failed += [f"- **{one.id}** {_text(one.detail or one.title)}" for one in silent]
    failed += [f"- **{one.id}** did not run: {one.skip}: {_text(one.detail)}" for one in report.missing()]
    warned = [*_found(report, Status.WARN)]
    waived = [
        f"- {MARKS[one.status]} **{one.id}** waived {_text(str(one.waiver))}"
        for one in report.with_status(Status.WAIVED)
    ]
    for lines, most, words in (
        (failed, _MOST_FAILURES, "failures"),
        (warned, _MOST_WARNINGS, "warnings"),
        (waived, _MOST_WAIVED, "waived checks"),
    ):
        if lines:
            yield from lines[:most]
            if len(lines) > most:
                yield f"- and {len(lines) - most} more {words}"
            yield ""


def _found(report: Report, status: Status) -> Iterator[str]:
    for result in report.results:
        for finding in result.findings if result.waiver is None else ():
            if finding.status is status:
                yield f"- {'⚠️ ' if status is Status.WARN else ''}**{result.id}** {_sentence(finding)}"


def _sentence(finding: Finding) -> str:
    parts = [_text(finding.what)]
    if finding.why:
        parts.append(f"<br>why: {_text(finding.why)}")
    if finding.remedy:
        parts.append(f"<br>**try: {_text(finding.remedy)}**")
    if finding.mode:
        parts.append(f"({finding.mode})")
    return " ".join(parts)


def _numbers(report: Report) -> Iterator[str]:
    """Yield a table of what was measured: of each check in turn, until the table is full."""
    measured = [result for result in report.results if result.metrics and result.tier > 1]
    measured.sort(key=lambda result: (result.id != "perf.generate", result.group != "perf"))
    rows = [
        f"| {result.id} | {_text(name)} | {_text(shown(metric.value, metric.unit))} |"
        for result in measured
        for name, metric in result.metrics.items()
    ]
    if rows:
        yield from ("| check | number | value |", "|---|---|---:|", *rows[:_MOST_NUMBERS])
        if len(rows) > _MOST_NUMBERS:
            yield f"| | and {len(rows) - _MOST_NUMBERS} more in the report | |"
        yield ""


def _details(report: Report) -> Iterator[str]:
    groups = list(report.groups(others=False).items())
    if not report.results:
        return
    yield from ("<details><summary>all checks</summary>", "")
    for group, results in groups[:_MOST_GROUPS]:
        yield f"- **{_text(group)}** {_listed(results)}"
    if len(groups) > _MOST_GROUPS:
        yield f"- and {len(groups) - _MOST_GROUPS} more groups"
    if report.others:
        yield f"- for other kinds of images: {', '.join(result.id for result in report.others)}"
    yield from ("", "</details>", "", f"<sub>{_text(_origin(report))}</sub>")


def _listed(results: Sequence[Result]) -> str:
    """Return checks on one line, each with a mark for how it ended."""
    return " · ".join(
        f"{MARKS[result.status]} {result.id}" + (f" ({result.skip})" if result.skip else "") for result in results
    )


def _origin(report: Report) -> str:
    parts = [
        report.subject.digest or "",
        f"suite {report.suite.version}",
        report.volatile.started,
        f"{report.volatile.duration_s:.0f} s",
    ]
    return " · ".join(part for part in parts if part)


def _text(value: str) -> str:
    """Return text as one line that Markdown prints as it is: no markup, no link, no mention of anybody."""
    text = line(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(text, quote=False))
    # A space of no width keeps names from being mentions and addresses from being links.
    return re.sub(r"@(?=\w)|(?<=\w):(?=//)|(?<=\bwww)\.", lambda match: f"{match.group()}\N{ZERO WIDTH SPACE}", text)
