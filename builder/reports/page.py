"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from builder.report import Finding, Report, Result, Status, line, plain, shown
from builder.reports.figures import figures
from builder.reports.plots import Bar, stack

_LONGEST = 20_000
"""Characters of one value or output; the whole of it is in report.json."""
_TIERS: Mapping[int | str, str] = {"1": "without a GPU", "2": "on one GPU", "3": "on several GPUs"}


def html(report: Report) -> str:
    """Return the page of one report."""
    # What a waived one found stands under its waiver.
    found = [(one, finding) for one in report.results if one.waiver is None for finding in one.findings]
    return _printed(
        "report.html.j2",
        report=report,
        tiers=_TIERS,
        failures=[*_with(found, Status.FAIL), *_silent(report)],
        warnings=_with(found, Status.WARN),
        missing=report.missing(),
        waived=report.with_status(Status.WAIVED),
        counts=_counts(report),
        facts=list(_facts(report)),
        figures=figures(report),
    )


def overview(reports: Mapping[str, Report], *, links: Mapping[str, str] | None = None) -> str:
    """Return a page with a row for each report, by its name; `links` are relative addresses of their own pages."""
    rows = [
        {
            "name": name,
            "link": quote((links or {}).get(name, "")),
            "report": report,
            "counts": _counts(report),
            "facts": dict(_facts(report)),
            "waived": [result.id for result in report.with_status(Status.WAIVED)],
            "bad": [result.id for result in report.with_status(Status.FAIL, Status.ERROR) or report.missing()],
        }
        for name, report in reports.items()
    ]
    passed = sum(report.verdict.passed for report in reports.values())
    return _printed("overview.html.j2", rows=rows, passed=passed)


def _with(found: list[tuple[Result, Finding]], status: Status) -> list[tuple[Result, Finding]]:
    return [(result, finding) for result, finding in found if finding.status is status]


def _silent(report: Report) -> Iterator[tuple[Result, Finding]]:
    """Yield a finding for what failed without one."""
    for result in report.with_status(Status.FAIL, Status.ERROR):
        if not any(finding.status is Status.FAIL for finding in result.findings):
            what = result.detail or f"{result.id} did not pass"
            values = {"status": "fail", "what": what, "why": "", "remedy": "", "mode": "", "blame": "unknown"}
            yield result, Finding.model_validate_json(json.dumps(values))


def _counts(report: Report) -> str:
    parts = [Bar(label=status, value=count, shown=str(count), tone=status) for status, count in report.counts().items()]
    return stack(", ".join(f"{part.shown} {part.label}" for part in parts), parts)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what people ask first about an environment."""
    facts, driver = report.environment.facts, report.driver
    number = facts.get("cudnn_number")
    yield "torch", str(facts.get("torch") or "unknown")
    if "cuda" in facts:
        yield "CUDA", str(facts["cuda"] or "none: a CPU build")
    if isinstance(number, int):
        yield "cuDNN", cudnn(number)
    if facts.get("nccl"):
        yield "NCCL", str(facts["nccl"])
    yield "Python", str(facts.get("python_full") or "unknown")
    yield "GPU", driver.devices or ("no answer" if driver.nodes or driver.error else "none")
    if driver.capabilities:
        yield "compute capability", ", ".join(dict.fromkeys(driver.capabilities))
    if driver.module:
        yield "driver", f"{driver.module}, knows CUDA {driver.cuda}" if driver.cuda else driver.module
    yield "machine", f"{report.volatile.host.machine}, {report.volatile.host.cpus} CPUs"
    yield "kernel", report.volatile.host.kernel
    yield "user id", str(report.volatile.host.uid)
    if facts.get("architectures"):
        yield "architectures in torch", " ".join(sorted(map(str, facts["architectures"]), key=_natural))
    if report.subject.digest:
        yield "digest", report.subject.digest
    if driver.error or driver.library_error:
        yield "driver says", driver.error or driver.library_error


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts sm_90 before sm_100."""
    return [(len(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]


def cudnn(number: int) -> str:
    """Spell the number by which cuDNN tells its version: from 9 on with two digits more for the major one."""
    major = 10_000 if number >= 90_000 else 1_000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _seconds(value: float) -> str:
    return f"{value / 60:.1f} min" if value >= 100 else f"{value:.1f} s"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\n[... {len(text) - _LONGEST} characters more]"


def _pretty(value: object) -> str:
    return plain(json.dumps(value, indent=2, ensure_ascii=False, default=dict))


@functools.cache
def _templates() -> Environment:
    package = Path(__file__).parents[1]
    environment = Environment(
        # Beside the package in a checkout, in it where it is installed.
        loader=FileSystemLoader([package / "templates", package.parent / "templates"]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "line": line, "plain": plain, "shown": shown, "seconds": _seconds, "shortened": _shortened, "pretty": _pretty,
    }  # fmt: skip
    return environment


def _printed(name: str, **values: object) -> str:
    return _templates().get_template(name).render(**values).lstrip()
