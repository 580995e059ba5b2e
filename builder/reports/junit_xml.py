"""A report as JUnit XML, for CI servers that show tests: a suite per group of checks, and one for the verdict."""

from __future__ import annotations

import xml.etree.ElementTree as ET  # (written, never read)
from collections.abc import Iterable, Iterator
from datetime import UTC

from builder.report import Finding, Report, Result, Status, line, plain

_XML = '<?xml version="1.0" encoding="utf-8"?>\n'


def junit(report: Report) -> str:
    """Return the report as JUnit XML; what failed has the failure mode as its type and the remedy in its text.

    A run that proved too little has no failing check; the test of the verdict fails then, so that a CI server that
    only knows tests is not green either.
    """
    root = ET.Element("testsuites", name=f"torchyard {line(report.name)}")
    for group, results in report.groups().items():
        _suite(root, report, line(group), [_case(report, result) for result in results])
    _suite(root, report, "verdict", [_verdict(report)])
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("time", f"{report.volatile.duration_s:.3f}")
    ET.indent(root)
    return _XML + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, report: Report, name: str, cases: Iterable[ET.Element]) -> None:
    # Without a time zone, as the format's schema has it; what reads it takes it for universal time.
    started = report.started.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.SubElement(root, "testsuite", name=name, timestamp=started)
    _properties(suite, _header(report))
    suite.extend(cases)
    suite.set("tests", str(len(suite.findall("testcase"))))
    for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{kind}"))))
    suite.set("time", f"{sum(float(case.get('time', '0')) for case in suite.findall('testcase')):.3f}")


def _header(report: Report) -> Iterator[tuple[str, str]]:
    yield "subject", report.name
    yield "digest", report.subject.digest or ""
    yield "profile", report.profile.name
    yield "suite", report.suite.digest
    yield "fingerprint", report.environment.fingerprint or ""
    yield "devices", report.driver.devices
    yield "driver", report.driver.module or ""


def _properties(element: ET.Element, values: Iterable[tuple[str, str]]) -> None:
    known = [(name, value) for name, value in values if value]
    if known:
        properties = ET.SubElement(element, "properties")
        for name, value in known:
            ET.SubElement(properties, "property", name=line(name), value=line(value))


def _case(report: Report, result: Result) -> ET.Element:
    seconds = f"{report.duration_s(result):.3f}"
    case = ET.Element("testcase", classname=line(result.group), name=result.id, time=seconds)
    _properties(case, _measured(result))
    fails = [finding for finding in result.findings if finding.status is Status.FAIL]
    if result.status is Status.SKIP:
        ET.SubElement(case, "skipped", message=line(f"{result.skip or 'skipped'}: {result.detail}"))
    elif result.waiver is not None:
        waived = ET.SubElement(case, "skipped", message=line(f"waived {result.waiver}"))
        waived.text = plain("\n\n".join(_told(finding) for finding in result.findings))
    elif result.status in (Status.FAIL, Status.ERROR):
        first = fails[0] if fails else None
        failed = ET.SubElement(
            case,
            "failure" if result.status is Status.FAIL else "error",
            type=(first.mode if first else "") or result.status,
            message=line(first.what if first else result.detail or result.title),
        )
        failed.text = plain("\n\n".join(_told(finding) for finding in result.findings))
    elif result.findings:
        ET.SubElement(case, "system-err").text = plain("\n\n".join(_told(finding) for finding in result.findings))
    if result.output:
        ET.SubElement(case, "system-out").text = plain(result.output)
    return case


def _measured(result: Result) -> Iterator[tuple[str, str]]:
    yield "title", result.title
    yield "tier", f"T{result.tier}"
    yield "required", "yes" if result.required else "no"
    if result.status in (Status.WARN, Status.WAIVED):
        yield "status", result.status
    for name, metric in result.metrics.items():
        yield f"metric {name}", f"{metric.value!r} {metric.unit}"


def _told(finding: Finding) -> str:
    """Return what a finding says, its remedy included."""
    labelled = (
        ("why", finding.why),
        ("try", finding.remedy),
        ("see", f"torchyard explain {finding.mode}" if finding.mode else ""),
        ("blame", finding.blame),
    )
    return "\n".join([f"{finding.status}: {finding.what}", *(f"  {label}  {text}" for label, text in labelled if text)])


def _verdict(report: Report) -> ET.Element:
    case = ET.Element("testcase", classname="verdict", name="verdict.passed", time="0.000")
    if not report.verdict.passed:
        code = report.verdict.exit_code
        failed = ET.SubElement(case, "failure", type=f"exit code {code}", message=report.meaning)
        failed.text = plain("\n".join(f"{one.id} did not run: {one.skip}: {one.detail}" for one in report.missing()))
    return case
