"""The renderings of a report: whole, true to it, and closed to whatever stands in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from builder import reports as forms
from builder.errors import DiskError, MatrixError
from builder.report import Report, Status, load, plain
from builder.reports import page as pages
from builder.reports import plots
from builder.reports import summary as summaries
from builder.reports.figures import figures
from tests.support import reports

MAKERS = (reports.good, reports.gpu, reports.bad, reports.no_gpu, reports.waived, reports.notebook, reports.hostile)
EVERY = pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])
Make = Callable[[], dict[str, Any]]


def nothing() -> dict[str, Any]:
    return reports.document([], tiers={})


def filled(text: str) -> Report:
    """Return a report with this text wherever text can be."""
    there = reports.finding(text, why=text, remedy=text)
    return reports.read(
        reports.document(
            [
                reports.result("run.identity", "fail", title=text, detail=text, findings=[there], output=text),
                reports.result("run.import", "skip", title=text, skip="budget", detail=text),
                reports.result("run.limits", "waived", waiver=(text or "x", "2026-12-31"), findings=[there]),
                reports.result("perf.generate", tier=2, metrics={text: (1.5, text, "")}, evidence={text: text}),
            ],
            name=text,
            facts={**reports.FACTS, "torch": text, "packages": {text: text}},
            driver={**reports.H200, "names": [text], "module": text},
        )
    )


# --------------------------------------------------------------------------- JUnit


def junit(document: dict[str, Any]) -> ET.Element:
    return ET.fromstring(forms.junit(reports.read(document)).encode("utf-8"))


def case(root: ET.Element, name: str) -> ET.Element:
    (found,) = root.iterfind(f".//testcase[@name='{name}']")
    return found


def test_junit_has_a_suite_for_each_group_and_tells_how_each_check_ended() -> None:
    root = junit(reports.bad())
    assert [suite.get("name") for suite in root] == ["run", "cpu", "dist", "dev", "verdict"]
    failed = case(root, "cpu.compile").find("failure")
    assert failed is not None
    assert failed.get("type") == "F48"
    assert failed.get("message") == "torch.compile cannot compile: there is no C compiler"
    assert "try  apt-get install gcc libc6-dev, or set CC to a compiler" in (failed.text or "")
    assert "torchyard explain F48" in (failed.text or "")
    assert case(root, "cpu.compile").findtext("system-out") == "RuntimeError: Failed to find C compiler\n"
    broke = case(root, "dist.gloo").find("error")
    assert broke is not None
    assert broke.get("message") == "it did not end within 60 s"
    skipped = case(root, "dev.available").find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "no_gpu: this machine shows no GPU"
    warned = case(root, "run.limits")
    assert warned.find("failure") is None
    assert warned.find("properties/property[@name='status']") is not None
    assert "--shm-size=1g" in (warned.findtext("system-err") or "")


def test_junit_counts_what_is_in_it() -> None:
    root = junit(reports.bad())
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert suite.get("timestamp") == "2026-11-21T13:09:49"


def test_junit_skips_what_is_waived_with_reason_and_date() -> None:
    root = junit(reports.waived())
    waived = case(root, "perf.generate")
    skipped = waived.find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "waived until 2026-12-31: clocks are capped until the new PSU"
    assert "decoding draws 71 % of the bandwidth" in (skipped.text or "")
    status = waived.find("properties/property[@name='status']")
    assert status is not None
    assert status.get("value") == "waived"
    assert waived.findtext("system-out") == "slow\n"
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "0", "errors": "0", "skipped": "1",
    }  # fmt: skip


def test_junit_holds_numbers_as_properties() -> None:
    root = junit(reports.gpu())
    found = case(root, "perf.roofline").find("properties/property[@name='metric copy']")
    assert found is not None
    assert found.get("value") == "4187.3 GB/s"


@pytest.mark.parametrize("make", [*MAKERS, nothing], ids=lambda make: make.__name__)
def test_junit_fails_if_the_run_did_not_pass(make: Make) -> None:
    document = make()
    verdict = case(junit(document), "verdict.passed")
    assert (verdict.find("failure") is None) is document["verdict"]["passed"]


def test_junit_says_which_required_check_did_not_run() -> None:
    failed = case(junit(reports.no_gpu()), "verdict.passed").find("failure")
    assert failed is not None
    assert "dev.available did not run: no_gpu: this machine shows no GPU" in (failed.text or "")


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_junit_is_xml_whatever_it_holds(text: str) -> None:
    root = ET.fromstring(forms.junit(filled(text)).encode("utf-8"))
    said = case(root, "run.identity").findtext("system-out")
    assert (said or "") == plain(text)


# --------------------------------------------------------------------------- Markdown


@EVERY
def test_markdown_is_short_and_begins_with_the_verdict(make: Make) -> None:
    document = make()
    lines = forms.markdown(reports.read(document)).splitlines()
    assert len(lines) <= summaries.MAX_LINES
    assert lines[0].startswith("### ✅" if document["verdict"]["passed"] else "### ❌")


def test_markdown_stays_short_when_everything_is_wrong() -> None:
    many = [
        reports.result(
            f"{group}.check{number}", "fail", tier=2, metrics={"speed": (1.0, "s", "")},
            findings=[reports.finding("wrong\n" * 9, why="x" * 5000, remedy="y\n" * 99) for _ in range(5)],
        )
        for group in ("aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh", "ii", "jj", "kk", "ll", "mm", "nn", "oo", "pp")
        for number in range(9)
    ]  # fmt: skip
    warned = [
        reports.result(f"zz.check{number}", "warn", findings=[reports.finding("odd", status="warn")])
        for number in range(9)
    ]
    waived = [reports.result(f"zy.check{number}", "waived", waiver=("why", "2026-12-31")) for number in range(9)]
    text = forms.markdown(reports.read(reports.document([*many, *warned, *waived])))
    assert len(text.splitlines()) <= summaries.MAX_LINES
    assert "and 712 more failures" in text
    assert "and 5 more warnings" in text
    assert "and 6 more waived checks" in text
    assert len(text) < 60_000


def test_markdown_tells_remedies_before_numbers() -> None:
    text = forms.markdown(reports.read(reports.bad()))
    assert text.index("try: apt-get install gcc libc6-dev") < text.index("--shm-size=1g") < text.index("<details>")
    text = forms.markdown(reports.read(reports.gpu()))
    assert "| perf.roofline | copy | 4,187 GB/s |" in text
    assert "more in the report" in text


def test_markdown_names_what_was_required_and_did_not_run() -> None:
    text = forms.markdown(reports.read(reports.no_gpu()))
    assert "**dev.available** did not run: no_gpu: this machine shows no GPU" in text


def test_markdown_has_a_line_for_what_is_waived_below_the_warnings() -> None:
    document = reports.bad()
    document["results"] += [reports.waived()["results"][1]]
    document["profile"] |= {"required": sorted(one["id"] for one in document["results"] if one["required"])}
    document["profile"]["waivers"] = reports.waived()["profile"]["waivers"]
    document["verdict"]["counts"]["waived"] = 1
    text = forms.markdown(reports.read(document))
    line = "- ○ **perf.generate** waived until 2026-12-31: clocks are capped until the new PSU\n"
    assert text.index("--shm-size=1g") < text.index(line) < text.index("<details>")
    assert "71 %" not in text, "what it found has been accepted"
    assert "1 waived" in text


def test_markdown_has_one_line_for_what_is_for_other_kinds_of_images() -> None:
    lines = forms.markdown(reports.read(reports.notebook())).splitlines()
    assert lines[2].startswith("2 pass · 1 skip · 2 for other kinds of images · T1 proven · T2 not tried · ")
    assert lines[lines.index("<details><summary>all checks</summary>") + 2 :][:4] == [
        "- **run** ✓ run.identity · - run.locks (not_declared)",
        "- **svc** ✓ svc.jupyter",
        "- for other kinds of images: svc.sshd, sec.sshd",
        "",
    ]
    table = summaries.overview({"notebook": reports.read(reports.notebook())})
    assert table.splitlines()[-1].endswith("| 3 | - |")


PRINTED = "h3 p ul li strong br table thead tbody tr th td details summary sub"


def printed(text: str) -> tuple[list[str], str]:
    """Return the elements and the text that a reader of the Markdown gets."""
    read = Tags()
    read.feed(MarkdownIt("commonmark").enable("table").render(text))
    read.close()
    return read.tags, read.text


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all(name == "style" for name, _ in attrs), attrs  # of a column to the right
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_markdown_prints_the_same_elements_whatever_it_holds(text: str) -> None:
    usual, odd = (printed(forms.markdown(filled(words)))[0] for words in ("x", text + reports.HOSTILE))
    assert odd == usual
    assert set(odd) <= set(PRINTED.split())


def test_markdown_prints_text_as_it_is() -> None:
    words = "a_b*c* `d` [e](f) <g> | h ~~i~~ \\j #k $l & m&amp;n"
    report = reports.read(reports.document([reports.result("run.identity", "fail", detail=words)]))
    assert words in printed(forms.markdown(report))[1]


def test_a_cell_of_a_table_stays_one() -> None:
    metrics = {"a | b": (1.5, "c | d", "")}
    text = forms.markdown(reports.read(reports.document([reports.result("perf.x", tier=2, metrics=metrics)])))
    assert "perf.x\na | b\n1.50 c | d\n" in printed(text)[1]


def test_workflow_commands_are_lines_that_nothing_can_add_to() -> None:
    text = forms.workflow_commands(reports.read(reports.bad()))
    error, warning = text.splitlines()
    assert error.startswith("::error title=cpu.compile::torch.compile cannot compile: there is no C compiler. apt-get")
    assert warning.startswith("::warning title=run.limits::/dev/shm holds 64 MiB: data loaders with workers will die. ")
    assert warning.endswith("docker run --shm-size=1g, or --ipc=host")
    lines = forms.workflow_commands(reports.read(reports.hostile())).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::error title=run.identity::")
    assert lines[1].startswith("::notice title=run.limits::waived until 9999-12-31: </script>")
    assert "%0A::error" in lines[0]
    assert "%250A" in lines[0]
    assert forms.workflow_commands(reports.read(reports.good())) == ""
    assert forms.workflow_commands(reports.read(reports.waived())) == (
        "::notice title=perf.generate::waived until 2026-12-31: clocks are capped until the new PSU\n"
    )
    assert "title=dev.available::did not run: no_gpu" in forms.workflow_commands(reports.read(reports.no_gpu()))
    assert (
        forms.workflow_commands(reports.read(nothing())) == "::error title=verdict::not run: nothing could be checked\n"
    )


def test_workflow_commands_are_no_more_than_are_shown() -> None:
    many = [reports.finding(f"wrong {number}") for number in range(30)]
    document = reports.document([reports.result("run.identity", "fail", findings=many)])
    assert len(forms.workflow_commands(reports.read(document)).splitlines()) == 10


# --------------------------------------------------------------------------- Prometheus

SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (NaN|[+-]Inf|-?[0-9.e+-]+)')


def samples(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Read the text format strictly."""
    found = []
    assert text.endswith("\n")
    for one in text[:-1].split("\n"):
        if one.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) torchyard_[a-z_]+ .+", one), one
            continue
        match = SAMPLE.fullmatch(one)
        assert match, one
        labels = dict(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match.group(2)))
        found.append((match.group(1), labels, match.group(3)))
    return found


@EVERY
def test_prometheus_can_be_read_and_names_each_series_once(make: Make) -> None:
    text = forms.prometheus(reports.read(make()))
    found = samples(text)
    assert len({(name, tuple(sorted(labels.items()))) for name, labels, _ in found}) == len(found)
    assert all(name.startswith("torchyard_") and "subject" in labels for name, labels, _ in found)
    assert {name for name, _, _ in found} == set(re.findall(r"# TYPE (\S+) gauge", text))


def test_prometheus_has_verdict_numbers_and_the_time() -> None:
    found = {
        (name, labels.get("check", ""), labels.get("metric", "")): (labels, value)
        for name, labels, value in samples(forms.prometheus(reports.read(reports.gpu())))
    }
    assert found["torchyard_passed", "", ""][1] == "1"
    assert found["torchyard_timestamp_seconds", "", ""][1] == "1795266589"
    labels, value = found["torchyard_metric", "perf.roofline", "copy"]
    assert (labels["unit"], labels["better"], value) == ("GB/s", "higher", "4187.3")
    assert found["torchyard_check_status", "run.limits", ""][0]["status"] == "warn"
    assert found["torchyard_info", "", ""][0]["devices"] == "NVIDIA H200"


def test_prometheus_tells_what_is_waived() -> None:
    found = samples(forms.prometheus(reports.read(reports.waived())))
    statuses = {labels["check"]: labels["status"] for name, labels, _ in found if name == "torchyard_check_status"}
    assert statuses == {"run.identity": "pass", "perf.generate": "waived"}
    counts = {labels["status"]: value for name, labels, value in found if name == "torchyard_checks"}
    assert counts["waived"] == "1"


def test_prometheus_spells_what_is_not_finite() -> None:
    metrics = {name: (name, "s", "") for name in ("nan", "inf", "-inf")}
    text = forms.prometheus(reports.read(reports.document([reports.result("perf.roofline", metrics=metrics)])))
    values = {labels["metric"]: value for name, labels, value in samples(text) if name == "torchyard_metric"}
    assert values == {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}


# --------------------------------------------------------------------------- HTML


class Reader(HTMLParser):
    """What elements and text a page has; every element that is opened is closed."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


ELEMENTS = """
    html head meta link title style body main header section footer article figure figcaption details summary div
    dl dt dd ul li h1 h2 h3 h4 p span b i small code pre a table thead tbody tr th td svg g rect line text
"""


def safe(page: str) -> Reader:
    """Read a page, and refuse one that could run or fetch anything."""
    read = Reader(page)
    assert {tag for tag, _ in read.elements} <= set(ELEMENTS.split())
    for tag, attributes in read.elements:
        assert not any(name.startswith("on") or name in ("src", "style", "action") for name in attributes), tag
        assert tag != "link" or attributes == {"rel": "icon", "href": "data:,"}
        assert tag != "a" or not re.match(r"[a-z]+:|//", attributes["href"] or "")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    return read


@pytest.mark.parametrize("make", [*MAKERS, nothing], ids=lambda make: make.__name__)
def test_a_page_is_whole_and_needs_nothing_else(make: Make) -> None:
    document = make()
    read = safe(forms.html(reports.read(document)))
    for one in document["results"]:
        assert one["id"] in read.text


def test_a_page_shows_hostile_text_as_text() -> None:
    read = safe(forms.html(reports.read(reports.hostile())))
    assert "</script><script>alert(1)</script>" in read.text
    assert "{{ 7 * 7 }}" in read.text
    assert "49" not in read.text.replace("13:09:49", "")


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60))
def test_a_page_has_the_same_elements_whatever_it_holds(text: str) -> None:
    usual, odd = (safe(forms.html(filled(words))).elements for words in ("some words", text + "x"))
    assert [tag for tag, _ in odd] == [tag for tag, _ in usual]


def test_a_page_says_what_to_mend_first() -> None:
    text = safe(forms.html(reports.read(reports.bad()))).text
    assert text.index("apt-get install gcc libc6-dev") < text.index("--shm-size=1g") < text.index("Environment")
    assert "dev.available is required and did not run" in safe(forms.html(reports.read(reports.no_gpu()))).text


def test_a_page_lists_what_is_waived_with_its_reason_and_not_as_a_failure() -> None:
    read = safe(forms.html(reports.read(reports.waived())))
    assert "perf.generate may fail until 2026-12-31" in read.text
    assert "clocks are capped until the new PSU" in read.text
    assert "What to mend" not in read.text
    assert "Warnings" not in read.text
    assert {"finding waived", "status waived", "bar waived"} <= {
        attributes.get("class") for _, attributes in read.elements
    }


def test_a_page_says_if_nothing_was_tried_on_a_gpu() -> None:
    said = "T2, on one GPU: not tried"
    assert said in safe(forms.html(reports.read(reports.notebook()))).text
    assert said not in safe(forms.html(reports.read(reports.gpu()))).text
    cpu = reports.notebook()
    cpu["environment"]["facts"]["cuda"] = None
    assert said not in safe(forms.html(reports.read(cpu))).text


def test_a_page_has_architectures_in_their_order() -> None:
    assert "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120" in safe(forms.html(reports.read(reports.gpu()))).text


def test_a_page_folds_what_is_for_other_kinds_of_images() -> None:
    page = forms.html(reports.read(reports.notebook()))
    text = " ".join(safe(page).text.split())
    assert "2 pass 1 skip 2 for other kinds of images" in text
    folded = "2 more are for other kinds of images svc.sshd svc.sshd holds: the image runs no SSH server sec.sshd"
    assert text.index("not_declared") < text.index(folded)
    assert page.count("svc.sshd") == 2, "nowhere else"
    assert "not_this_kind" not in page


def test_every_status_has_a_colour_of_its_own() -> None:
    page = forms.html(reports.read(reports.waived()))
    themes = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", theme))
        assert len({colours[status] for status in Status}) == len(Status)
    for status in Status:
        for rule in (f"i.{status} {{ background", f".plot .{status} {{ fill", f".status.{status} {{ color"):
            assert f"{rule}: var(--{status})" in page


def test_a_page_draws_what_was_measured_and_nothing_else() -> None:
    titles = [figure.title for figure in figures(reports.read(reports.gpu()))]
    assert titles == [
        "Bandwidth", "Matrix products", "Generation",
        "Time between tokens, wide layers", "Time between tokens, narrow layers",
        "torch.compile, wide layers", "torch.compile, narrow layers", "Training by number format",
    ]  # fmt: skip
    assert figures(reports.read(reports.good())) == []
    assert "Performance" not in safe(forms.html(reports.read(reports.good()))).text


@pytest.mark.parametrize(
    "evidence",
    [
        {"wide": None, "narrow": 3, "before": []},
        {"wide": {"series_s": "abc", "bandwidth": True, "batches": [1]}},
        {"wide": {"series_s": [[None, "x", {}], 3], "itl_s": {"median": []}}, "rung": {}},
        {"wide": {"series_s": [[0.003] * 50], "batches": {"x": None}, "bandwidth": "fast"}},
        {"ladder": {"wide": {"R0": {"tokens_per_s": 0}, "R1": None}}, "rows": {"fp32": [], "bf16": {"losses": {}}}},
        {"ladder": {"wide": ["R0"]}, "rows": {"bf16": {"samples_per_s": 1e308, "losses": ["x"], "step_s": None}}},
    ],
)
def test_odd_evidence_is_left_out_and_breaks_nothing(evidence: dict[str, Any]) -> None:
    document = reports.gpu()
    for one in document["results"]:
        if one["group"] == "perf":
            one["evidence"] = evidence
    safe(forms.html(reports.read(document)))


def test_the_overview_leads_to_each_report(tmp_path: Path) -> None:
    many = {"cell/one:1": reports.read(reports.gpu()), reports.HOSTILE: reports.read(reports.bad())}
    for name, report in many.items():
        forms.write_all(report, tmp_path / forms.directory_name(name))
    index, summary = forms.write_overview(many, tmp_path)
    read = safe(index.read_text("utf-8"))
    links = [attributes["href"] for tag, attributes in read.elements if tag == "a"]
    assert len(links) == 2
    assert all((tmp_path / str(link)).is_file() for link in links)
    assert "1 of 2 environments passed" in read.text
    assert len(summary.read_text("utf-8").splitlines()) == 4


@pytest.mark.parametrize(("number", "version"), [(91002, "9.10.2"), (8902, "8.9.2"), (92600, "9.26.0")])
def test_cudnn_is_spelt_as_its_version(number: int, version: str) -> None:
    assert pages.cudnn(number) == version


# --------------------------------------------------------------------------- plots


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_bars_are_as_long_as_their_values() -> None:
    rows = [plots.Bar(label="a", value=25.0, shown="25"), plots.Bar(label="b", value=100.0, shown="100")]
    svg = drawn(plots.bars("t", rows, line_at=plots.Line(value=50.0, label="half")))
    assert [rect.get("width") for rect in svg.iter("rect") if "bar" in rect.get("class", "")] == ["25.00%", "100.00%"]
    assert {line.get("x1") for line in svg.iter("line")} == {"50.00%"}


def test_nothing_is_drawn_of_nothing() -> None:
    nan = plots.Bar(label="a", value=float("nan"), shown="nan")
    for rows in ([], [nan], [plots.Bar(label="a", value=0.0, shown="0")], [plots.Bar(label="a", value=-1, shown="-1")]):
        assert plots.bars("t", rows) == ""
    assert plots.stack("t", []) == ""


@given(st.lists(st.floats(min_value=1e-6, max_value=1e3), min_size=0, max_size=300))
def test_every_value_is_in_one_bin_or_beyond(values: list[float]) -> None:
    bins = plots.binned(values)
    if len(set(values)) < 2:
        assert bins is None
    else:
        assert bins is not None
        assert sum(bins.counts) + bins.beyond == len(values)
        assert bins.low == min(values)
        assert bins.beyond == sum(value > bins.high for value in values)


def test_one_outlier_does_not_squeeze_the_rest() -> None:
    bins = plots.binned([1.0 + number / 1000 for number in range(200)] + [50.0])
    assert bins is not None
    assert bins.beyond == 1
    assert bins.high < 2
    assert max(bins.counts) < 100


# --------------------------------------------------------------------------- files


@EVERY
def test_every_form_is_written(tmp_path: Path, make: Make) -> None:
    document = make()
    paths = forms.write_all(reports.read(document), tmp_path / "deep" / "down")
    names = ["report.json", "junit.xml", "summary.md", "metrics.prom", "report.html"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "deep" / "down").iterdir()) == sorted(names)
    assert json.loads(paths[0].read_text("utf-8")) == document


def test_what_is_rendered_again_is_the_same(tmp_path: Path) -> None:
    document = reports.gpu()
    # In the order of a run, which no file keeps.
    document["results"][2]["metrics"] = {name: {"value": 1.5, "unit": "s", "better": ""} for name in ("z", "a")}
    document["results"][2]["evidence"] = {"z": 1, "a": {"z": 2, "a": 3}}
    first = forms.write_all(reports.read(document), tmp_path / "first")
    again = forms.write_all(load(first[0]), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]


def test_what_cannot_be_written_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms.write_all(reports.read(reports.good()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise DiskError("the disk is full")

    monkeypatch.setattr("builder.reports.write_atomically", full)
    with pytest.raises(DiskError):
        forms.write_all(reports.read(reports.bad()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    with pytest.raises(MatrixError, match="cannot be written"):
        forms.write_all(reports.read(reports.good()), tmp_path / "report.json" / "below")


def test_a_form_that_cannot_be_made_leaves_all_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Report) -> str:
        raise RuntimeError

    monkeypatch.setitem(forms.FILES, "report.html", broken)
    with pytest.raises(RuntimeError):
        forms.write_all(reports.read(reports.good()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directories_are_named_apart_and_safely() -> None:
    names = ["torch2.8.0-cu128", "a/b:1", "a-b:1", "a-b-1", "..", ".", "", "/etc/passwd", "x" * 300, "x" * 301, "é"]
    made = [forms.directory_name(name) for name in names]
    assert made[0] == names[0]
    assert len(set(made)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) for name in made)
    assert [forms.directory_name(name) for name in made] == made
