"""A report in the forms that people and programs read: each a rendering of report.json, written whole or not at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from builder.errors import MatrixError
from builder.report import Change, Diff, Report, diff, dumps, json_schema, load, loads
from builder.reports import page, summary
from builder.reports.junit_xml import junit
from builder.reports.page import html
from builder.reports.summary import markdown, workflow_commands
from builder.reports.textfile import prometheus
from builder.store import write_atomically

__all__ = [
    "FILES",
    "Change",
    "Diff",
    "Report",
    "diff",
    "directory_name",
    "dumps",
    "html",
    "json_schema",
    "junit",
    "load",
    "loads",
    "markdown",
    "prometheus",
    "workflow_commands",
    "write_all",
    "write_overview",
]

FILES = {
    "report.json": dumps,
    "junit.xml": junit,
    "summary.md": markdown,
    "metrics.prom": prometheus,
    "report.html": html,
}
"""File name → what makes it."""
_LONGEST = 100
"""Characters of a directory's name."""


def directory_name(name: str) -> str:
    """Return the name of a directory for the reports of an image or cell; different names give different ones.

    A name that it returned stays what it is.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:_LONGEST]
    if plain and plain == name:
        return name
    return f"{plain[: _LONGEST - 9] or 'report'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_all(report: Report, directory: Path) -> tuple[Path, ...]:
    """Write every form into `directory`; each file is the old one or the new one, never a part."""
    # As report.json has it, sorted: so rendering that again gives the same bytes.
    report = loads(dumps(report).encode(), where=str(directory))
    return _write({name: make(report) for name, make in FILES.items()}, directory)


def write_overview(reports: Mapping[str, Report], directory: Path) -> tuple[Path, ...]:
    """Write index.html and summary.md of many reports, by name, whose own pages lie in `directory` beside them."""
    links = {name: f"{directory_name(name)}/report.html" for name in reports}
    contents = {"index.html": page.overview(reports, links=links), "summary.md": summary.overview(reports)}
    return _write(contents, directory)


def _write(contents: Mapping[str, str], directory: Path) -> tuple[Path, ...]:
    try:
        for name, content in contents.items():
            write_atomically(directory / name, content.encode("utf-8"))
    except OSError as error:
        why = error.strerror or str(error)
        raise MatrixError(
            "the reports cannot be written", where=str(directory), why=why, tries=("name a directory of yours",)
        ) from None
    return tuple(directory / name for name in contents)
