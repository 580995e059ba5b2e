"""What a validation found, as its report.json says it: read, refused where it is not one, compared with another.

`validate/document.py` writes these; every other form (`builder.reports`) is a rendering of what is read here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from builder.errors import MatrixError, Problem

SCHEMA: Final = 1
MAX_FILE_BYTES = 64 << 20
TOLERANCE = 0.05
"""A number that changes by less is neither better nor worse: so far apart are two runs on one machine."""

_AGAIN = "validate again to get a new report"
_NOT_FINITE = ("nan", "inf", "-inf")
_MOST_PROBLEMS = 10


class Status(StrEnum):
    """What became of a check."""

    PASS = "pass"  # noqa: S105
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"
    WAIVED = "waived"
    """It failed or broke, and somebody gave a reason to live with that for a while."""

    @property
    def proves(self) -> bool:
        """Whether the check ran and what it looks at works."""
        return self in (Status.PASS, Status.WARN)


class Skip(StrEnum):
    """Why a check did not run."""

    NO_GPU = "no_gpu"
    NEEDS_GPUS = "needs_gpus"
    CPU_BUILD = "cpu_build"
    DEPENDENCY_FAILED = "dependency_failed"
    UNSUPPORTED_BY_VERSION = "unsupported_by_version"
    UNSUPPORTED_BY_DEVICE = "unsupported_by_device"
    NOT_DECLARED = "not_declared"
    NEEDS_OTHER_USER = "needs_other_user"
    NOT_THIS_KIND = "not_this_kind"
    BUDGET = "budget"

    @property
    def excuses(self) -> bool:
        """Whether a required check may be skipped for it: there is nothing that it could have found."""
        return self in (Skip.NOT_DECLARED, Skip.NEEDS_OTHER_USER, Skip.NOT_THIS_KIND)


class Blame(StrEnum):
    """What has to change."""

    IMAGE = "image"
    HOST = "host"
    HARNESS = "harness"
    UNKNOWN = "unknown"


class Better(StrEnum):
    """Which way a number is better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = ""


EXIT: Final[Mapping[int, str]] = {
    0: "passed",
    1: "failed: a check failed",
    2: "not run: the request was wrong",
    3: "not run: nothing could be checked",
    4: "not passed: what was required did not run",
    5: "not passed: there are warnings, and none are allowed",
}
"""What an exit code of a validation means."""


# --------------------------------------------------------------------------- the document


def _number(value: object) -> object:
    """Read a number; one that JSON does not know is spelt as text."""
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _spelt(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _moment(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError("the time has no time zone")
    return value


Number = Annotated[
    float,
    BeforeValidator(_number),
    PlainSerializer(_spelt),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(_NOT_FINITE)}]}),
]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Moment = Annotated[str, AfterValidator(_moment), Field(json_schema_extra={"format": "date-time"})]
CheckId = Annotated[str, Field(pattern=r"^[a-z]+\.[a-z0-9]+(?:-[a-z0-9]+)*$", max_length=100)]
Mode = Annotated[str, Field(pattern=r"^(?:F[0-9]{2,3})?$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Suite(_Model):
    """The checks that were run."""

    version: str
    digest: str
    """Of the suite's own files, "sha256:..."."""


class Subject(_Model):
    """What was validated."""

    kind: str
    """"environment" for a bare machine, "image" for a container's."""
    name: str | None
    """Image reference or id of the cell."""
    digest: str | None
    """Of the image."""
    declared: Mapping[str, Any] | None
    """What the image was declared to be, its image.json."""


class Waiver(_Model):
    """Leave for a check to fail."""

    why: Annotated[str, Field(min_length=1)]
    until: date
    """The last day of it, in universal time."""

    def __str__(self) -> str:
        return f"until {self.until}: {self.why}"


class NamedWaiver(Waiver):
    """A waiver and the check that it is for."""

    check: CheckId


class Profile(_Model):
    """What was asked of the environment."""

    name: str
    options: Mapping[str, Any]
    on_skip: Literal["fail", "warn", "pass"]
    """What a required check that did not run means."""
    strict: bool
    """Whether warnings fail the run."""
    required: tuple[CheckId, ...]
    waivers: tuple[NamedWaiver, ...] = ()
    """All that were given, whether they were needed or not."""


class Verdict(_Model):
    """How it ended."""

    exit_code: Annotated[int, Field(ge=0, le=5)]
    passed: bool
    tiers: Mapping[Annotated[str, Field(pattern=r"^[0-9]$")], bool]
    """For each tier, whether it is proven; empty if only some of the checks were asked for."""
    counts: Mapping[Status, Count]


class Environment(_Model):
    """What the environment is, observed and not judged."""

    facts: Mapping[str, Any]
    fingerprint: str | None
    """Environments with equal fingerprints load the same libraries; null if some of it is unknown."""

    @property
    def packages(self) -> Mapping[str, str]:
        """Return the version of every installed distribution."""
        packages = self.facts.get("packages")
        return {str(name): str(version) for name, version in packages.items()} if isinstance(packages, dict) else {}


class Driver(_Model):
    """The NVIDIA driver as the environment sees it."""

    nodes: tuple[str, ...]
    """Device files under /dev."""
    denied: tuple[str, ...]
    """Those of them that cannot be opened."""
    module: str | None
    """Version of the kernel module."""
    library: str | None
    """Path of the libcuda.so.1 that was loaded."""
    library_error: str
    injected: bool
    """Whether that file is a mount of its own: a container runtime put it there."""
    init: int | None
    """What cuInit returned."""
    cuda: str | None
    """The newest CUDA the driver knows."""
    count: Count
    names: tuple[str, ...]
    capabilities: tuple[str, ...]
    """Compute capability of each device."""
    buses: tuple[str, ...]
    """PCI address of each device."""
    nvml: str | None
    """Path of the libnvidia-ml.so.1 that was loaded."""
    nvml_init: int | None
    """What nvmlInit returned."""
    error: str
    """Why nothing is known: asking the driver failed."""

    @property
    def devices(self) -> str:
        """Name the devices for people, several of a kind with their number; empty without any."""
        kinds = {name: self.names.count(name) for name in self.names}
        return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in kinds.items())


class Finding(_Model):
    """One thing that a check noticed."""

    status: Literal[Status.WARN, Status.FAIL]
    what: str
    why: str
    remedy: str
    mode: Mode
    """Failure mode of the catalogue (`torchyard explain F48`); empty if there is none for it."""
    blame: Blame


class Metric(_Model):
    """A number with its unit."""

    value: Number
    unit: str
    better: Better


class Result(_Model):
    """What one check gave."""

    id: CheckId
    title: str
    group: str
    tier: Annotated[int, Field(ge=0, le=9)]
    required: bool
    status: Status
    skip: Skip | None
    waiver: Waiver | None = None
    """Of a waived one."""
    detail: str
    findings: tuple[Finding, ...]
    metrics: Mapping[str, Metric]
    evidence: Mapping[str, Any]
    """Values that were seen."""
    output: str
    """The end of what the check printed, if it did not pass."""


class Host(_Model):
    """The machine, as far as the environment sees it."""

    kernel: str
    machine: str
    cpus: Count
    uid: Count


class Volatile(_Model):
    """What differs between any two runs."""

    started: Moment
    duration_s: Seconds
    durations: Mapping[CheckId, Seconds]
    host: Host


class Report(_Model):
    """What a validation found."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    suite: Suite
    subject: Subject
    profile: Profile
    verdict: Verdict
    environment: Environment
    driver: Driver
    results: tuple[Result, ...]
    volatile: Volatile

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """Refuse a verdict that its own results do not bear out."""
        ids = [result.id for result in self.results]
        if len(set(ids)) != len(ids):
            raise ValueError("a check stands here twice")
        if set(self.profile.required) != {result.id for result in self.results if result.required}:
            raise ValueError("the profile and the results do not name the same checks as required")
        if any(self.verdict.counts.get(status, 0) != len(self.with_status(status)) for status in Status):
            raise ValueError("the counts are not those of the results")
        broken = self.with_status(Status.FAIL, Status.ERROR)
        unproven = self._unproven() and self.profile.on_skip == "fail"
        proven = any(result.required and result.status.proves for result in self.results)
        green = self.verdict.exit_code == 0
        if self.verdict.passed is not green or (green and (broken or unproven or not proven)):
            raise ValueError("the verdict is not what the results say")
        self._waives_what_it_may()
        return self

    def _waives_what_it_may(self) -> None:
        given = {one.check: (one.why, one.until) for one in self.profile.waivers}
        if len(given) != len(self.profile.waivers):
            raise ValueError("a check has two waivers")
        today = self.started.astimezone(UTC).date()
        for result in self.results:
            if (result.waiver is not None) is not (result.status is Status.WAIVED):
                raise ValueError("a check is waived without a waiver, or has one and is not")
            if result.waiver is not None:
                if given.get(result.id) != (result.waiver.why, result.waiver.until):
                    raise ValueError("a check has a waiver that nobody gave")
                if result.waiver.until < today:
                    raise ValueError("a check has a waiver that was over when the run began")

    @property
    def name(self) -> str:
        """What people call what was validated."""
        return self.subject.name or self.subject.kind

    @property
    def meaning(self) -> str:
        """The verdict in words."""
        if self.verdict.exit_code == 4 and not self.missing():
            return "not passed: nothing that was required is proven"
        return EXIT[self.verdict.exit_code]

    @property
    def untried(self) -> bool:
        """Return whether nothing was tried on a GPU, though this torch is for GPUs."""
        tiers = self.verdict.tiers
        return bool(tiers) and "2" not in tiers and bool(self.environment.facts.get("cuda"))

    @property
    def started(self) -> datetime:
        """When the run began."""
        return datetime.fromisoformat(self.volatile.started)

    def with_status(self, *statuses: Status) -> tuple[Result, ...]:
        """Return the results with one of these statuses."""
        return tuple(result for result in self.results if result.status in statuses)

    @property
    def others(self) -> tuple[Result, ...]:
        """Return the results of checks that are for other kinds of images, and found nothing here to look at."""
        return tuple(result for result in self.results if result.skip is Skip.NOT_THIS_KIND)

    def counts(self) -> Mapping[Status, int]:
        """Return how many checks ended how, in the order of the statuses, without the others and without zeros."""
        found = Counter(result.status for result in self.results if result.skip is not Skip.NOT_THIS_KIND)
        return {status: found[status] for status in Status if found[status]}

    def groups(self, *, others: bool = True) -> Mapping[str, Sequence[Result]]:
        """Return the results by group, in the order of the run."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            if others or result.skip is not Skip.NOT_THIS_KIND:
                found.setdefault(result.group, []).append(result)
        return found

    def missing(self) -> tuple[Result, ...]:
        """Return the required checks that did not run, where that is why the run did not pass."""
        return self._unproven() if self.verdict.exit_code == 4 else ()

    def _unproven(self) -> tuple[Result, ...]:
        skipped = (result for result in self.with_status(Status.SKIP) if result.required)
        return tuple(result for result in skipped if result.skip is None or not result.skip.excuses)

    def result(self, name: str) -> Result | None:
        """Return the result of a check; None if it was not run."""
        return next((result for result in self.results if result.id == name), None)

    def duration_s(self, result: Result) -> float:
        """Return how long the check took, in seconds."""
        return self.volatile.durations.get(result.id, 0.0)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json."""
    schema: dict[str, Any] = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "torchyard report"}


def dumps(report: Report) -> str:
    """Return the report as it is written: sorted, so that two of them can be compared line by line."""
    document = report.model_dump(mode="json", by_alias=True)
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


# --------------------------------------------------------------------------- reading


def load(path: Path) -> Report:
    """Read a report; raises MatrixError if there is none, it is damaged, or of a schema not known here."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise MatrixError("the report cannot be read", where=str(path), why=why, tries=(_AGAIN,)) from None
    if len(content) > MAX_FILE_BYTES:
        raise MatrixError("not a report: it is larger than any", where=str(path), why=f"over {MAX_FILE_BYTES} bytes")
    return loads(content, where=str(path))


def loads(content: bytes, *, where: str) -> Report:
    """Read a report's bytes; `where` is what errors call them. Raises as `load` does."""
    document = _json(content, where)
    if not isinstance(document, dict) or not {"schema", "results", "verdict"} <= set(document):
        why = "it holds none of what a report is made of: schema, results and verdict"
        raise MatrixError("not a report of torchyard", where=where, why=why, tries=(_AGAIN,))
    if document["schema"] != SCHEMA or isinstance(document["schema"], bool):
        raise MatrixError(
            f"a report of schema {str(document['schema'])[:40]}, which this torchyard does not know",
            where=where,
            why=f"it knows schema {SCHEMA}",
            tries=("read it with the torchyard that wrote it", _AGAIN),
        )
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        findings = error.errors(include_url=False, include_input=False)
    problems = [
        Problem(what=str(one["msg"]).removeprefix("Value error, "), where=_place(where, one["loc"]))
        for one in findings[:_MOST_PROBLEMS]
    ]
    left = len(findings) - len(problems)
    raise MatrixError(
        "the report is damaged",
        where=where,
        why=f"it says it is of schema {SCHEMA}, but is not" + (f"; {left} more places are wrong" if left else ""),
        tries=(_AGAIN,),
        problems=tuple(problems),
    )


def _json(content: bytes, where: str) -> object:
    """Parse JSON that holds finite numbers only."""
    if not content.strip():
        raise MatrixError("the report is empty", where=where, why="its writing was broken off", tries=(_AGAIN,))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8 text, from byte {error.start} on"
        raise MatrixError("not a report of torchyard", where=where, why=why, tries=(_AGAIN,)) from None
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise MatrixError(
            "the report is truncated" if cut else "not a report of torchyard",
            where=f"{where}: line {error.lineno}, column {error.colno}",
            why=f"the text ends there: {error.msg}" if cut else f"it is not JSON: {error.msg}",
            tries=(_AGAIN,),
        ) from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else f"it is not JSON: {error}"
        raise MatrixError("not a report of torchyard", where=where, why=why, tries=(_AGAIN,)) from None


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number there")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _not_finite(text[:40])
    return value


def _place(where: str, location: Iterable[str | int]) -> str:
    """Spell a place in the file: report.json: results[3].status."""
    path = ""
    for step in location:
        name = str(step)[:80]
        path += f"[{step}]" if isinstance(step, int) else f".{name}" if path else name
    return f"{where}: {path}" if path else where


# --------------------------------------------------------------------------- text


_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def plain(text: str) -> str:
    """Return text that any format can hold: no colours of a terminal; a replacement for what cannot be seen or written.

    What turns the direction of writing is among that: it lets a reader see something else than what is there.
    """
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", _COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def line(text: str) -> str:
    """Return text on one line."""
    return " ".join(plain(text).split())


_SCALES: Final[Mapping[str, tuple[float, str]]] = {
    "": (1.0, ""),
    "ratio": (100.0, "%"),
    "1/s": (1.0, "/s"),
    "us": (1.0, "µs"),
    "price": (1.0, ""),
}
"""By unit: what to multiply with for people, and what the unit is then."""


def shown(value: float, unit: str) -> str:
    """Spell a number with its unit for people: three digits at least, a fraction in per cent."""
    factor, unit = _SCALES.get(unit, (1.0, line(unit)))
    value *= factor
    if not math.isfinite(value):
        text = str(value)
    elif value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 0.001:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:.2e}"
    return f"{text} {unit}".strip()


# --------------------------------------------------------------------------- differences


class Judgement(StrEnum):
    """Whether a change is to be welcomed."""

    BETTER = "better"
    WORSE = "worse"
    NEITHER = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that is not the same in two reports; what is absent is None."""

    section: str
    """Of SECTIONS."""
    name: str
    before: Any
    after: Any
    judgement: Judgement = Judgement.NEITHER
    relative: float | None = None
    """Of a number: the change as a fraction of what it was."""
    unit: str = ""

    def __str__(self) -> str:
        name = line(self.name)
        if self.section == "findings":
            text = f"{name}: {line(str(self.after or self.before))} {'appeared' if self.after else 'is gone'}"
        elif self.section == "metrics":
            before, after = (
                "-" if value is None else shown(float(value), self.unit) for value in (self.before, self.after)
            )
            text = f"{name}: {before} → {after}"
            text += "" if self.relative is None else f" ({self.relative:+.1%})"
        else:
            text = f"{name}: {_brief(self.before)} → {_brief(self.after)}"
        return f"{text}, {self.judgement}" if self.judgement else text


SECTIONS: Final = ("run", "environment", "packages", "driver", "host", "statuses", "findings", "metrics")
"""run: what was validated, with which checks, and what was asked of it."""


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What changed from one report to another, in the order of SECTIONS."""

    changes: tuple[Change, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """The changes for the worse."""
        return tuple(change for change in self.changes if change.judgement is Judgement.WORSE)

    def section(self, name: str) -> tuple[Change, ...]:
        """Return the changes of one of SECTIONS."""
        return tuple(change for change in self.changes if change.section == name)

    def as_json(self) -> dict[str, Any]:
        """Return it for machines."""

        def finite(value: object) -> object:
            return _spelt(value) if isinstance(value, float) else value

        sections: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
        for change in self.changes:
            row = {name: finite(value) for name, value in asdict(change).items() if name != "section"}
            sections[change.section].append(row)
        return {"changes": sections, "worse": len(self.worse)}

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "no difference but in times"

    def lines(self) -> Iterator[str]:
        """Yield it for people: a heading for each section with a change, and the changes below it."""
        for section in SECTIONS:
            changes = self.section(section)
            if changes:
                yield section
                yield from (f"  {change}" for change in changes)


def diff(before: Report, after: Report) -> Diff:
    """Return what changed; times are left out."""
    return Diff(changes=(
        *_changed("run", _run(before), _run(after)),
        *_changed("environment", _facts(before), _facts(after)),
        *_changed("packages", before.environment.packages, after.environment.packages),
        *_changed("driver", before.driver.model_dump(mode="json"), after.driver.model_dump(mode="json")),
        *_changed("host", before.volatile.host.model_dump(mode="json"), after.volatile.host.model_dump(mode="json")),
        *_statuses(before, after),
        *_findings(before, after),
        *_metrics(before, after),
    ))  # fmt: skip


def _run(report: Report) -> Mapping[str, object]:
    profile = report.profile.model_dump(mode="json", exclude={"required", "options", "waivers"})
    return {
        **{f"subject {name}": value for name, value in report.subject.model_dump(mode="json").items()},
        **{f"suite {name}": value for name, value in report.suite.model_dump(mode="json").items()},
        **{f"profile {name}": value for name, value in profile.items()},
        **{f"option {name}": value for name, value in report.profile.options.items()},
        **{f"waiver {one.check}": str(one) for one in report.profile.waivers},
        "verdict": report.meaning,
        "proven tiers": sorted(tier for tier, proven in report.verdict.tiers.items() if proven),
    }


def _facts(report: Report) -> Mapping[str, object]:
    return {name: value for name, value in report.environment.facts.items() if name != "packages"}


def _changed(section: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[Change]:
    for name in _names(before, after):
        if before.get(name) != after.get(name):
            yield Change(section=section, name=name, before=before.get(name), after=after.get(name))


def _names(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """Return the names of both, in the order in which they stand."""
    return list(dict.fromkeys([*before, *after]))


def _statuses(before: Report, after: Report) -> Iterator[Change]:
    then, now = ({result.id: result.status for result in report.results} for report in (before, after))
    for name in _names(then, now):
        was, became = then.get(name), now.get(name)
        if was is not became:
            yield Change(section="statuses", name=name, before=was, after=became, judgement=_judged(was, became))


_WORTH: Final[Mapping[Status, int]] = {
    Status.PASS: 3,
    Status.WARN: 2,
    Status.WAIVED: 1,
    Status.FAIL: 0,
    Status.ERROR: 0,
}
"""Of what ran."""


def _judged(before: Status | None, after: Status | None) -> Judgement:
    """Judge a change of status; where nothing was proven before or is proven now, there is nothing to compare."""
    if after is None:
        return Judgement.NEITHER
    if before is None or before is Status.SKIP:
        return Judgement.WORSE if after in (Status.FAIL, Status.ERROR) else Judgement.NEITHER
    if after is Status.SKIP:
        return Judgement.WORSE if before.proves else Judgement.NEITHER
    gained = _WORTH[after] - _WORTH[before]
    return Judgement.BETTER if gained > 0 else Judgement.WORSE if gained < 0 else Judgement.NEITHER


def _findings(before: Report, after: Report) -> Iterator[Change]:
    then, now = (
        {(result.id, finding.status, finding.what): None for result in report.results for finding in result.findings}
        for report in (before, after)
    )
    for name, status, what in then:
        if (name, status, what) not in now:
            yield Change(section="findings", name=f"{name} {status}", before=what, after=None)
    for name, status, what in now:
        if (name, status, what) not in then:
            yield Change(section="findings", name=f"{name} {status}", before=None, after=what)


def _metrics(before: Report, after: Report) -> Iterator[Change]:
    then, now = (
        {(result.id, name): metric for result in report.results for name, metric in result.metrics.items()}
        for report in (before, after)
    )
    for key in dict.fromkeys([*then, *now]):
        old, new = then.get(key), now.get(key)
        known = [one for one in (old, new) if one is not None]
        for one in known[:1] if len({metric.unit for metric in known}) == 1 else known:
            # Numbers of different units are two numbers: one is gone, the other is new.
            a = old.value if old is not None and old.unit == one.unit else None
            b = new.value if new is not None and new.unit == one.unit else None
            if a != b and not (a is not None and b is not None and math.isnan(a) and math.isnan(b)):
                relative = _relative(a, b)
                yield Change(
                    section="metrics",
                    name=f"{key[0]} {key[1]}",
                    before=a,
                    after=b,
                    relative=relative,
                    judgement=_better(relative, known[-1].better),
                    unit=one.unit,
                )


def _relative(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or not before or not (math.isfinite(before) and math.isfinite(after)):
        return None
    return (after - before) / abs(before)


def _better(relative: float | None, better: Better) -> Judgement:
    if relative is None or better is Better.NEITHER or abs(relative) < TOLERANCE:
        return Judgement.NEITHER
    return Judgement.BETTER if (relative > 0) is (better is Better.HIGHER) else Judgement.WORSE


def _brief(value: object) -> str:
    """Spell a value on one short line."""
    if value is None:
        return "-"
    text = line(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    return text if len(text) <= 100 else f"{text[:97]}..."
