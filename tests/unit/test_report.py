"""Reading reports, refusing what is none, and comparing two."""

from __future__ import annotations

import copy
import datetime as dt
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import report
from builder.errors import MatrixError
from builder.report import Blame, Change, Judgement, Skip, Status
from tests.support import reports
from validate import document as documents
from validate import verdict
from validate.driver import Driver
from validate.waivers import Waiver

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "report.schema.json"


def written(results: list[verdict.Result], **more: Any) -> str:
    """Return what the suite itself writes."""
    made = documents.document(
        results,
        subject={"kind": "environment", "name": None, "digest": None, "declared": None},
        suite={"version": "1", "digest": "sha256:00"},
        profile={"name": "runtime", "options": {}},
        waivers=[one.waiver for one in results if one.waiver],
        driver=Driver(),
        started="2026-11-21T13:09:49+00:00",
        duration_s=1.5,
        **{"narrowed": False, "on_skip": "fail", "strict": False, **more},
    )
    return documents.dumps(made)


def waiver_of(name: str, until: dt.date = dt.date(2026, 11, 21)) -> Waiver:
    return Waiver(name, "a reason", until)


def every_result() -> list[verdict.Result]:
    found = verdict.Finding(verdict.Status.FAIL, "what", "why", "remedy", "F01", verdict.Blame.HOST)
    return [
        verdict.Result("run.identity", "title", 1, verdict.Status.FAIL, required=True, findings=[found], output="text"),
        verdict.Result("run.import", "title", 1, verdict.Status.WARN, metrics={"a": verdict.Metric(2.5, "s", "lower")}),
        *(
            verdict.Result(f"dev.{reason.value.replace('_', '-')}", "title", 2, verdict.Status.SKIP, skip=reason)
            for reason in verdict.Skip
        ),
        verdict.Result(
            "run.limits", "title", 1, verdict.Status.WAIVED, findings=[found], waiver=waiver_of("run.limits")
        ),
    ]


# --------------------------------------------------------------------------- what the suite writes


@pytest.mark.parametrize("narrowed", [False, True])
def test_what_the_suite_writes_is_read_and_written_again_byte_for_byte(*, narrowed: bool) -> None:
    text = written(every_result(), narrowed=narrowed)
    read = report.loads(text.encode(), where="report.json")
    assert report.dumps(read) == text
    assert read.verdict.exit_code == verdict.FAILED
    assert read.results[0].findings[0].blame is Blame.HOST
    assert len(read.results) == 3 + len(verdict.Skip)
    assert str(read.results[-1].waiver) == "until 2026-11-21: a reason"


def test_a_run_of_nothing_is_read() -> None:
    read = report.loads(written([]).encode(), where="report.json")
    assert (read.verdict.exit_code, read.verdict.passed, read.results) == (verdict.HARNESS, False, ())


RESULTS = st.lists(
    st.tuples(st.sampled_from(verdict.Status), st.booleans(), st.sampled_from(verdict.Skip), st.integers(1, 3)),
    max_size=6,
)


@given(RESULTS, st.sampled_from(verdict.ON_SKIP), st.booleans())
def test_whatever_the_suite_writes_agrees_with_itself(
    drawn: list[tuple[verdict.Status, bool, verdict.Skip, int]],
    on_skip: str,
    strict: bool,  # noqa: FBT001
) -> None:
    results = [
        verdict.Result(
            f"run.check{number}", "title", tier, status, required=required,
            skip=reason if status is verdict.Status.SKIP else None,
            waiver=waiver_of(f"run.check{number}") if status is verdict.Status.WAIVED else None,
        )
        for number, (status, required, reason, tier) in enumerate(drawn)
    ]  # fmt: skip
    read = report.loads(written(results, on_skip=on_skip, strict=strict).encode(), where="report.json")
    assert read.verdict.exit_code == verdict.exit_code(results, on_skip=on_skip, strict=strict)


def test_the_words_are_those_of_the_suite() -> None:
    assert {one.value for one in Skip if one.excuses} == {one.value for one in verdict.EXCUSED}
    assert [one.value for one in Status] == [one.value for one in verdict.Status]
    assert [one.value for one in Skip] == [one.value for one in verdict.Skip]
    assert [one.value for one in Blame] == [one.value for one in verdict.Blame]
    codes = (verdict.PASSED, verdict.FAILED, verdict.USAGE, verdict.HARNESS, verdict.SKIPPED, verdict.WARNED)
    assert tuple(report.EXIT) == codes
    assert documents.SCHEMA == report.SCHEMA


def test_the_driver_is_that_of_the_suite() -> None:
    assert set(report.Driver.model_fields) == set(Driver().as_json())


def test_a_number_that_json_does_not_know_survives() -> None:
    for text in ("nan", "inf", "-inf"):
        document = reports.document([reports.result("perf.roofline", metrics={"copy": (text, "GB/s", "higher")})])
        read = reports.read(document)
        assert str(read.results[0].metrics["copy"].value) == text
        assert json.loads(report.dumps(read)) == document


# --------------------------------------------------------------------------- the schema


def test_the_schema_is_fresh() -> None:
    fresh = json.dumps(report.json_schema(), indent=2) + "\n"
    assert SCHEMA.read_text("utf-8") == fresh, "make render"


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema": lambda document: document.update(schema=2),
    "more": lambda document: document.update(more=1),
    "less": lambda document: document.pop("verdict"),
    "status": lambda document: document["results"][0].update(status="fine"),
    "tier": lambda document: document["results"][0].update(tier="1"),
}


def test_the_schema_admits_what_the_reader_reads(tmp_path: Path) -> None:
    documents = {
        make.__name__: make() for make in (reports.good, reports.gpu, reports.bad, reports.waived, reports.hostile)
    }
    for name, change in DAMAGES.items():
        documents[name] = reports.good()
        change(documents[name])
        with pytest.raises(MatrixError):
            reports.read(documents[name])
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document), "utf-8")
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    command = [sys.executable, "-m", "check_jsonschema", "-o", "json", "--schemafile", str(SCHEMA), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert {Path(one["filename"]).stem for one in json.loads(done.stdout)["errors"]} == set(DAMAGES), done.stderr


# --------------------------------------------------------------------------- refusals


GOOD = json.dumps(reports.good(), indent=1).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the report is empty"),
        (b" \n", "the report is empty"),
        (GOOD[:200], "the report is truncated"),
        (GOOD[:-2], "the report is truncated"),
        (GOOD[: GOOD.index(b"profile") + 3], "the report is truncated"),
        (b"<html>502 Bad Gateway</html>", "not a report of torchyard"),
        (b"\xff\xfe\x00", "not a report of torchyard"),
        (b"[]", "not a report of torchyard"),
        (b"{}", "not a report of torchyard"),
        (b'{"schema": 1}', "not a report of torchyard"),
        (b"[" * 100_000, "not a report of torchyard"),
        (b'{"schema": NaN, "results": [], "verdict": {}}', "not a report of torchyard"),
        (b'{"schema": 1e999, "results": [], "verdict": {}}', "not a report of torchyard"),
        (GOOD.replace(b'"torch 2.13.0+cpu"', b'"\\ud800"'), "the report is damaged"),
        (b'{"schema": %s, "results": [], "verdict": {}}' % (b"9" * 5000), "not a report of torchyard"),
        (GOOD.replace(b'"schema": 1', b'"schema": 2'), "a report of schema 2, which this torchyard does not know"),
        (
            GOOD.replace(b'"schema": 1', b'"schema": true'),
            "a report of schema True, which this torchyard does not know",
        ),
        (GOOD.replace(b'"schema": 1', b'"schema": 1, "x": 1'), "the report is damaged"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(MatrixError) as refused:
        report.load(path)
    problem = refused.value.problems[0]
    assert problem.what == what
    assert problem.where.startswith(str(path))
    assert problem.why
    assert problem.tries


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(MatrixError, match="cannot be read") as refused:
            report.load(path)
        assert refused.value.problems[0].why


def test_a_file_larger_than_any_report_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_FILE_BYTES", len(GOOD) - 1)
    (tmp_path / "report.json").write_bytes(GOOD)
    with pytest.raises(MatrixError, match="larger than any"):
        report.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("results", 0, "status"), "fine", "results[0].status"),
        (("results", 0, "metrics"), {"a": {"value": "x", "unit": "", "better": ""}}, "results[0].metrics.a.value"),
        (("results", 1, "id"), "run.identity", ""),
        (("verdict", "counts"), {"pass": 9}, ""),
        (("verdict", "passed"), False, ""),
        (("verdict", "exit_code"), 1, ""),
        (("profile", "required"), [], ""),
        (("volatile", "started"), "yesterday", "volatile.started"),
        (("volatile", "started"), "2026-11-21T13:09:49", "volatile.started"),
        (("volatile", "duration_s"), -1.0, "volatile.duration_s"),
        (("driver", "count"), True, "driver.count"),
    ],
)
def test_damage_is_named_by_its_place(path: tuple[str | int, ...], value: object, where: str) -> None:
    document: Any = reports.good()
    place = document
    for step in path[:-1]:
        place = place[step]
    assert place[path[-1]] != value
    place[path[-1]] = value
    with pytest.raises(MatrixError, match="damaged") as refused:
        reports.read(document)
    assert refused.value.problems[1].where == "report.json" + (f": {where}" if where else "")


def test_a_green_verdict_over_a_required_failure_is_refused() -> None:
    failed = [reports.result("run.identity", "fail")]
    assert reports.read(reports.document(failed)).verdict.exit_code == 1
    with pytest.raises(MatrixError, match="not what the results say"):
        reports.read(reports.document(failed, exit_code=0))
    with pytest.raises(MatrixError, match="not what the results say"):
        reports.read(reports.document([], exit_code=0))
    skipped = [reports.result("run.identity", "skip", skip="budget")]
    with pytest.raises(MatrixError, match="not what the results say"):
        reports.read(reports.document(skipped, exit_code=0))
    excused = [reports.result("run.identity"), reports.result("run.import", "skip", skip="not_declared")]
    assert reports.read(reports.document(excused, exit_code=0)).missing() == ()
    assert reports.read(reports.document([*skipped, reports.result("run.import")], on_skip="pass")).verdict.passed


def test_a_green_verdict_that_nothing_proves_is_refused() -> None:
    waived = [reports.result("run.identity", "waived", waiver=("why", "2026-12-31"))]
    read = reports.read(reports.document(waived))
    assert (read.verdict.exit_code, read.meaning) == (4, "not passed: nothing that was required is proven")
    for results in (waived, [*waived, reports.result("run.import", required=False)]):
        with pytest.raises(MatrixError, match="not what the results say"):
            reports.read(reports.document(results, exit_code=0))
    assert reports.read(reports.document([*waived, reports.result("run.import")])).verdict.passed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda result, _: result.update(waiver=None), "waived without a waiver"),
        (lambda result, _: result.update(status="fail"), ""),
        (lambda _, given: given.clear(), "that nobody gave"),
        (lambda _, given: given[0].update(why="another"), "that nobody gave"),
        (lambda _, given: given[0].update(until="2027-12-31"), "that nobody gave"),
        (lambda _, given: given.append(given[0]), "two waivers"),
        (lambda result, given: [one.update(until="2026-11-20") for one in (result["waiver"], given[0])], "was over"),
        (lambda result, given: [one.update(until="tomorrow") for one in (result["waiver"], given[0])], "date"),
        (lambda result, given: [one.update(why="") for one in (result["waiver"], given[0])], "at least 1"),
    ],
)
def test_a_waiver_that_does_not_hold_is_refused(change: Callable[[Any, Any], object], says: str) -> None:
    document = reports.waived()
    change(document["results"][1], document["profile"]["waivers"])
    with pytest.raises(MatrixError, match="damaged") as refused:
        reports.read(document)
    assert any(says in problem.what for problem in refused.value.problems)


def test_a_report_from_before_there_were_waivers_is_read() -> None:
    document = reports.good()
    del document["profile"]["waivers"], document["verdict"]["counts"]["waived"]
    for one in document["results"]:
        del one["waiver"]
    assert reports.read(document).verdict.passed


@given(st.integers(min_value=0, max_value=len(GOOD) - 2))
def test_no_beginning_of_a_report_is_one(length: int) -> None:
    with pytest.raises(MatrixError):
        report.loads(GOOD[:length], where="report.json")


@given(st.binary(max_size=200))
def test_no_bytes_give_a_traceback(content: bytes) -> None:
    with pytest.raises(MatrixError):
        report.loads(content, where="report.json")


# --------------------------------------------------------------------------- differences


def differences(change: Callable[[Any], None]) -> dict[str, list[Change]]:
    before, after = gpu(), gpu()
    change(after)
    found = report.diff(reports.read(before), reports.read(after))
    return {section: list(found.section(section)) for section in report.SECTIONS if found.section(section)}


def gpu() -> dict[str, Any]:
    metrics = {"copy": (4300.0, "GB/s", "higher"), "launch": (2.0, "us", "lower"), "threads": (8.0, "", "")}
    return reports.document(
        [
            reports.result("run.identity"),
            reports.result("perf.roofline", tier=2, metrics=metrics),
            reports.result("run.limits", "warn", findings=[reports.finding("small shm", status="warn")]),
        ],
        driver=reports.H200,
    )


def test_a_report_does_not_differ_from_itself_nor_from_one_of_another_time() -> None:
    assert differences(lambda after: after["volatile"].update(duration_s=9.0, started="2026-11-22T00:00:00Z")) == {}
    nan = reports.document([reports.result("perf.roofline", metrics={"copy": ("nan", "GB/s", "higher")})])
    assert report.diff(reports.read(nan), reports.read(copy.deepcopy(nan))).changes == ()


def test_packages_facts_driver_and_host_are_compared() -> None:
    def change(after: Any) -> None:
        facts = after["environment"]["facts"]
        facts["cuda"] = "12.9"
        facts["packages"] = {"torch": "2.8.0+cu129", "numpy": "2.3.1", "triton": "3.4.0", "nvidia-nccl-cu12": "2.27.3"}
        after["driver"]["module"] = "570.0.0"
        after["volatile"]["host"]["cpus"] = 2
        after["profile"]["options"]["gpus"] = "none"

    found = differences(change)
    assert {section: [(one.name, one.before, one.after) for one in changes] for section, changes in found.items()} == {
        "run": [("option gpus", "all", "none")],
        "environment": [("cuda", "12.8", "12.9")],
        "packages": [
            ("torch", "2.8.0+cu128", "2.8.0+cu129"),
            ("nvidia-cudnn-cu12", "9.10.2.21", None),
            ("nvidia-nccl-cu12", None, "2.27.3"),
        ],
        "driver": [("module", "580.95.05", "570.0.0")],
        "host": [("cpus", 16, 2)],
    }


@pytest.mark.parametrize(
    ("name", "value", "relative", "judgement"),
    [
        ("copy", 4300.0 * 1.10, 0.10, Judgement.BETTER),
        ("copy", 4300.0 * 0.90, -0.10, Judgement.WORSE),
        ("copy", 4300.0 * 0.96, -0.04, Judgement.NEITHER),
        ("launch", 1.0, -0.5, Judgement.BETTER),
        ("launch", 3.0, 0.5, Judgement.WORSE),
        ("threads", 2.0, -0.75, Judgement.NEITHER),
        ("copy", "nan", None, Judgement.NEITHER),
    ],
)
def test_numbers_are_judged_by_what_is_better(
    name: str, value: float, relative: float | None, judgement: Judgement
) -> None:
    (change,) = differences(lambda after: after["results"][1]["metrics"][name].update(value=value))["metrics"]
    assert change.name == f"perf.roofline {name}"
    assert change.judgement is judgement
    assert change.relative is None if relative is None else math.isclose(change.relative or 0, relative)


def test_numbers_of_different_units_are_not_compared() -> None:
    changes = differences(lambda after: after["results"][1]["metrics"]["copy"].update(value=4.3, unit="TB/s"))
    assert [(one.before, one.after, one.unit, one.relative) for one in changes["metrics"]] == [
        (4300.0, None, "GB/s", None),
        (None, 4.3, "TB/s", None),
    ]


@pytest.mark.parametrize(
    ("before", "after", "judgement"),
    [
        ("pass", "fail", Judgement.WORSE),
        ("pass", "warn", Judgement.WORSE),
        ("pass", "skip", Judgement.WORSE),
        ("warn", "pass", Judgement.BETTER),
        ("fail", "pass", Judgement.BETTER),
        ("error", "warn", Judgement.BETTER),
        ("fail", "error", Judgement.NEITHER),
        ("fail", "skip", Judgement.NEITHER),
        ("skip", "fail", Judgement.WORSE),
        ("skip", "pass", Judgement.NEITHER),
        ("fail", "waived", Judgement.BETTER),
        ("error", "waived", Judgement.BETTER),
        ("waived", "pass", Judgement.BETTER),
        ("waived", "warn", Judgement.BETTER),
        ("pass", "waived", Judgement.WORSE),
        ("warn", "waived", Judgement.WORSE),
        ("waived", "fail", Judgement.WORSE),
        ("waived", "error", Judgement.WORSE),
        ("waived", "skip", Judgement.NEITHER),
        ("skip", "waived", Judgement.NEITHER),
    ],
)
def test_statuses_are_judged(before: str, after: str, judgement: Judgement) -> None:
    a, b = (
        reports.read(
            reports.document([
                reports.result(
                    "run.identity", status, skip="budget" if status == "skip" else None,
                    waiver=("why", "2026-12-31") if status == "waived" else None,
                )
            ])
        )
        for status in (before, after)
    )  # fmt: skip
    found = report.diff(a, b)
    (change,) = found.section("statuses")
    assert (change.name, change.before, change.after, change.judgement) == ("run.identity", before, after, judgement)
    assert (change in found.worse) is (judgement is Judgement.WORSE)


def test_waivers_are_compared_each_by_itself() -> None:
    before, after = reports.waived(), reports.waived()
    for one in (after["results"][1]["waiver"], after["profile"]["waivers"][0]):
        one["until"] = "2027-06-30"
    (change,) = report.diff(reports.read(before), reports.read(after)).changes
    assert str(change) == (
        "waiver perf.generate: until 2026-12-31: clocks are capped until the new PSU"
        " → until 2027-06-30: clocks are capped until the new PSU"
    )


def test_findings_come_and_go() -> None:
    new = reports.finding("no shm at all", status="warn")
    changes = differences(lambda after: after["results"][2].update(findings=[new]))["findings"]
    assert [(one.name, one.before, one.after) for one in changes] == [
        ("run.limits warn", "small shm", None),
        ("run.limits warn", None, "no shm at all"),
    ]
    assert [str(one) for one in changes] == [
        "run.limits warn: small shm is gone",
        "run.limits warn: no shm at all appeared",
    ]


def test_a_difference_is_told_to_people_and_to_machines() -> None:
    before, after = reports.read(gpu()), reports.read(gpu() | {"driver": reports.NO_GPU})
    slower = gpu()
    slower["results"][1]["metrics"]["copy"]["value"] = 2150.0
    found = report.diff(before, reports.read(slower))
    assert list(found.lines()) == ["metrics", "  perf.roofline copy: 4,300 GB/s → 2,150 GB/s (-50.0%), worse"]
    assert found.as_json()["worse"] == 1
    assert found.as_json()["changes"]["metrics"] == [
        {
            "name": "perf.roofline copy", "before": 4300.0, "after": 2150.0, "judgement": "worse",
            "relative": -0.5, "unit": "GB/s",
        }
    ]  # fmt: skip
    json.dumps(report.diff(before, after).as_json(), allow_nan=False)
    odd = gpu()
    odd["results"][1]["metrics"]["copy"]["value"] = "inf"
    json.dumps(report.diff(before, reports.read(odd)).as_json(), allow_nan=False)


def test_a_hostile_difference_stays_on_its_lines() -> None:
    lines = list(report.diff(reports.read(reports.good()), reports.read(reports.hostile())).lines())
    assert lines
    assert all(len(one.splitlines()) == 1 and "\x1b" not in one for one in lines)


# --------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (4312.34, "GB/s", "4,312 GB/s"),
        (93.456, "", "93.5"),
        (0.9312, "ratio", "93.1 %"),
        (3.5301, "ms", "3.53 ms"),
        (0.01234, "s", "0.0123 s"),
        (2.9e-7, "relative", "2.90e-07 relative"),
        (16.0, "threads", "16 threads"),
        (0.0, "", "0"),
        (-12.5, "s", "-12.5 s"),
        (math.nan, "s", "nan s"),
        (math.inf, "", "inf"),
    ],
)
def test_numbers_are_spelt_for_people(value: float, unit: str, text: str) -> None:
    assert report.shown(value, unit) == text


@given(st.text())
def test_plain_text_can_be_written_anywhere(text: str) -> None:
    plain = report.plain(text + reports.HOSTILE)
    plain.encode("utf-8")
    assert all(
        char == "\n" or char == "\t" or char.isprintable() or char.isspace() for char in plain if ord(char) < 128
    )
    assert "\n" not in report.line(plain)
