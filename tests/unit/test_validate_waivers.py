"""Files of waivers: what is read, and that nothing but exactly that is."""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validate import waivers
from validate.waivers import Waiver, read

ROOT = Path(__file__).parents[2]
CHECKS = ("perf.generate", "run.limits")
GOOD = {"check": "perf.generate", "why": "clocks are capped", "until": "2026-12-31"}


def text(*entries: object, **more: Any) -> bytes:
    return json.dumps({"schema": 1, "waivers": list(entries), **more}).encode()


def test_waivers_are_read_by_their_check() -> None:
    other = {"check": "run.limits", "why": " größer geht nicht ", "until": "2028-02-29"}
    assert read(text(GOOD, other), CHECKS) == {
        "perf.generate": Waiver("perf.generate", "clocks are capped", dt.date(2026, 12, 31)),
        "run.limits": Waiver("run.limits", "größer geht nicht", dt.date(2028, 2, 29)),
    }
    assert read(text(), CHECKS) == {}


def test_a_waiver_is_written_as_it_was_read() -> None:
    (waiver,) = read(text(GOOD), CHECKS).values()
    assert waiver.as_json() == GOOD


REFUSED = [
    (b"", "the file is not JSON: line 1, column 1"),
    (b"\xff\xfe{}", "the file is not UTF-8 text, from byte 0 on"),
    (b"\xef\xbb\xbf{}", "the file is not JSON"),
    (text(GOOD)[:-3], "the file is not JSON"),
    (text(GOOD) + b"x", "the file is not JSON"),
    (b"[" * 100_000, "the file is nested too deeply"),
    (b'{"schema": ' + b"9" * 5000 + b"}", "limit"),
    (b"[]", "a list is no object with schema, waivers"),
    (b"null", "null is no object"),
    (b"{}", "schema is missing"),
    (b'{"schema": 1}', "waivers is missing"),
    (text(GOOD, more=1), '"more" is not known'),
    (text(GOOD, schema=2), "schema: 2 is not known, only 1"),
    (text(GOOD, schema=True), "schema: true is not known"),
    (text(GOOD, schema=1.0), "schema: 1.0 is not known"),
    (text(waivers={}), "waivers: an object is no list"),
    (b'{"schema": 1, "schema": 1, "waivers": []}', 'the key "schema" stands twice'),
    (text(GOOD).replace(b'"why"', b'"until"'), 'the key "until" stands twice'),
    (text(GOOD, GOOD), "waivers[1].check: perf.generate has a waiver already"),
    (text("perf.generate"), 'waivers[0]: "perf.generate" is no object with check, why, until'),
    (text({**GOOD, "by": "me"}), 'waivers[0]: "by" is not known'),
    (text({"check": "run.limits", "why": "x"}), "waivers[0]: until is missing"),
    (text({**GOOD, "check": "perf.generat"}), 'waivers[0].check: there is no check "perf.generat"'),
    (text({**GOOD, "check": "perf.*"}), 'there is no check "perf.*"'),
    (text({**GOOD, "check": "Perf.generate"}), "there is no check"),
    (text({**GOOD, "check": ["perf.generate"]}), "there is no check a list"),
    (text({**GOOD, "check": "x" * 5000 + "\n"}), "there is no check"),
    (text({**GOOD, "why": ""}), 'waivers[0].why: "" is no reason'),
    (text({**GOOD, "why": " \n"}), "is no reason"),
    (text({**GOOD, "why": None}), "null is no reason"),
    (text({**GOOD, "why": "two\nlines"}), "is not one line of printable text"),
    (text({**GOOD, "why": "\x1b[2J"}), "is not one line of printable text"),
    (text({**GOOD, "why": "\ud800"}), "is not one line of printable text"),
    (text({**GOOD, "why": "\u202egnp"}), "is not one line of printable text"),
    (text({**GOOD, "until": "2026-02-30"}), "waivers[0].until: there is no day 2026-02-30"),
    (text({**GOOD, "until": "2026-13-01"}), "there is no day"),
    (text({**GOOD, "until": "0000-01-01"}), "there is no day"),
    (text({**GOOD, "until": "20261231"}), "is no date like 2026-12-31"),
    (text({**GOOD, "until": "2026-W01-1"}), "is no date like"),
    (text({**GOOD, "until": "2026-12-31T00:00"}), "is no date like"),
    (text({**GOOD, "until": "2026-12-31\n"}), "is no date like"),
    (text({**GOOD, "until": "\uff12\uff10\uff12\uff16-12-31"}), "is no date like"),
    (text({**GOOD, "until": 20261231}), "is no date like"),
    (text({**GOOD, "until": "never"}), '"never" is no date like'),
    (b" " * (waivers.MOST_BYTES + 1), "the file is larger than"),
]


@pytest.mark.parametrize(("content", "says"), REFUSED, ids=[f"{number}" for number in range(len(REFUSED))])
def test_what_is_no_file_of_waivers_is_refused_in_one_line(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        read(content, CHECKS)
    assert type(refused.value) is ValueError
    message = str(refused.value)
    assert message.isprintable()
    assert len(message) < 200


@given(st.binary(max_size=100))
def test_no_bytes_give_anything_else_than_a_refusal(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read(content, CHECKS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*CHECKS, "2026-12-31"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(GOOD)), inner, max_size=3),
)


@given(
    st.fixed_dictionaries(
        {"check": st.sampled_from(CHECKS) | VALUES, "why": VALUES, "until": st.dates().map(str) | VALUES}
    )
)
def test_what_is_read_has_a_check_a_reason_and_a_day(entry: dict[str, Any]) -> None:
    try:
        (waiver,) = read(text(entry), CHECKS).values()
    except ValueError:
        return
    assert waiver.check == entry["check"] in CHECKS
    assert waiver.why == entry["why"].strip() != ""
    assert waiver.until.isoformat() == entry["until"]


def started(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "validate", "--only", "run.identity", "--list", "--waivers", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL)


def test_the_command_line_refuses_them_as_usage(tmp_path: Path) -> None:
    path = tmp_path / "waivers.json"
    for says in ("cannot be read: No such file", '--waivers: waivers[0].check: there is no check "no.such"'):
        done = started(path)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        path.write_bytes(text({**GOOD, "check": "no.such"}))
    # One that is not of this run is no mistake: one file serves many runs.
    path.write_bytes(text(GOOD))
    assert started(path).returncode == 0
