"""The suite's journey into an image: the file that travels, and what is made of whatever comes back."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from builder import report as reports
from builder import validate
from builder.engines import Allowance, End, Ended, Found
from builder.errors import ImpossibleError, MatrixError
from builder.validate import FOREIGN_CHECK, FOREIGN_USER, PYTHONS, Asked, Subject
from validate import __main__ as command_line
from validate import check, waivers
from validate.bundle import MAIN, SHEBANG, bundle
from validate.verdict import Status

ROOT = Path(__file__).parents[2]
FOUND = Found(reference="some/image:tag", digest="sha256:" + "a" * 64, platform="linux/arm64")
SUBJECT = Subject(kind="image", name="some/image:tag", digest=FOUND.digest)
IDENTITY = Asked(only=("run.identity",))
SELECTED = validate._selected


# --------------------------------------------------------------------------- the file


def starts(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **more)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "torchyard-validate"
    path.write_bytes(bundle())
    return path


def test_it_is_the_same_bytes_wherever_it_is_made(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, '.'); from validate.bundle import bundle; sys.stdout.buffer.write(bundle())"
    made = []
    source = ROOT
    for number, (zone, umask) in enumerate([("UTC", 0o022), ("Asia/Tokyo", 0o077)]):
        here = tmp_path / f"{number}" / ("a" * number) / "b"
        before = os.umask(umask)
        try:
            shutil.copytree(source / "validate", here / "validate", copy_function=shutil.copyfile)
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=here, env={**os.environ, "TZ": zone}, capture_output=True, check=True
            )
            # What lies about beside sources does not travel.
            (here / "validate" / "notes.txt").write_text(zone, "utf-8")
        finally:
            os.umask(before)
        made.append(done.stdout)
        source = here
    assert len(made[0]) > 10_000
    assert made[0] == made[1]


def test_nothing_of_the_machine_is_in_it(suite: Path) -> None:
    with zipfile.ZipFile(suite) as archive:
        entries = archive.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 2, 0, 0, 0)}
    assert {(entry.create_system, entry.external_attr >> 16, entry.compress_type) for entry in entries} == {
        (3, 0o100644, zipfile.ZIP_STORED)
    }
    names = [entry.filename for entry in entries]
    assert names == sorted(set(names))
    assert {"__main__.py", "validate/__main__.py", "validate/failures.json", "validate/checks/identity.py"} <= set(
        names
    )
    assert not [name for name in names if "__pycache__" in name]


def test_it_contains_itself(suite: Path) -> None:
    """Asked from inside, it is what it was made as: a report names the suite by this digest."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from validate import bundle; print(bundle.digest())"
    import hashlib

    said = starts([sys.executable, "-c", code, str(suite)]).stdout.strip()
    assert said == hashlib.sha256(suite.read_bytes()).hexdigest()


def test_python_starts_it_and_it_lists_its_checks(suite: Path, tmp_path: Path) -> None:
    done = starts([sys.executable, str(suite), "--list"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert listed == list(check.load())


def test_it_is_a_program_itself(suite: Path, tmp_path: Path) -> None:
    """Its first line names the Python of our images; here it is that of the tests, which has another length."""
    content = suite.read_bytes()
    assert content.startswith(SHEBANG)
    program = tmp_path / "torchyard-validate"
    program.write_bytes(f"#!{sys.executable}\n".encode() + content.removeprefix(SHEBANG))
    program.chmod(0o755)
    done = starts([str(program), "--explain", "F48"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("F48  ")


def test_it_explains_a_pasted_message(suite: Path) -> None:
    done = starts([sys.executable, str(suite), "--explain", "RuntimeError: Failed to find C compiler. Please ..."])
    assert (done.returncode, done.stdout.split()[0]) == (0, "F48")
    unknown = starts([sys.executable, str(suite), "--explain", "all is well"])
    assert unknown.returncode == 1
    assert "Traceback" not in unknown.stderr


def test_a_check_of_another_kind_leaves_no_line(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "image.json").write_text("{}")
    asked = ["--only", "env.toolkit", "--image-json", str(tmp_path / "image.json")]
    done = starts([sys.executable, str(suite), *asked], cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[:2]) == (4, ["", "1 for other kinds of images"]), done.stdout


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 20)])
def test_an_old_python_is_told_in_one_line(version: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "main.py").write_bytes(MAIN)
    text = ".".join(map(str, version))
    code = f"import sys; sys.version_info = {version}; sys.version = '{text} (old)'; exec(open(sys.argv[1]).read())"
    done = starts([sys.executable, "-c", code, str(tmp_path / "main.py")])
    assert done.returncode == 3
    assert done.stderr == f"torchyard-validate needs Python 3.9 or newer; this is {text}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "no.such"], "no check has such an id"),
        (["--profile", "none"], "invalid choice"),
        (["--option", "colour=red"], "no such option"),
        # Text that is no value was taken as it is: "no" as true, and a number that is none broke the check.
        (["--option", "compile=no"], "compile is true or false"),
        (["--option", "workers=-1"], "workers is a whole number, 0 or more"),
        (["--option", "workers=true"], "workers is a whole number, 0 or more"),
        (["--option", "foreign_user=fial"], "foreign_user is fail or warn"),
        (["--option", "mbu_floor=much"], "mbu_floor is a number from 0 to 1"),
        (["--option", "mbu_warn=NaN"], "mbu_warn is a number from 0 to 1"),
        (["--option", f"price_per_hour=1{'0' * 400}"], "price_per_hour is a number, 0 or more, or null"),
        (["--option", "gpus=2"], "no such option"),
        (["--budget", "nan"], "--budget"),
        (["--budget", "0"], "--budget"),
        (["--report", "no/such/directory/report.json"], "there is no such directory"),
        (["--gpus", "-1"], "--gpus"),
        (["--gpus", "0"], "a number above 0"),
        (["--only", "dev.*", "--gpus", "none"], "none of these"),
    ],
)
def test_what_it_does_not_know_is_usage(suite: Path, arguments: Sequence[str], says: str) -> None:
    done = starts([sys.executable, str(suite), *arguments])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_place_for_temporary_files_nothing_is_checked(suite: Path, tmp_path: Path) -> None:
    prelude = "import tempfile; tempfile.tempdir = '/nowhere'; import runpy, sys; sys.argv = sys.argv[1:];"
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = starts([sys.executable, "-c", prelude + run, str(suite), "--only", "run.identity"])
    assert done.returncode == 3
    assert "temporary files" in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- a fake engine


@pytest.fixture(autouse=True, scope="module")
def _asked_once() -> Iterator[None]:
    """Ask the suite only once what the same words mean: each time starts a Python."""
    asked = functools.cache(lambda suite, arguments: SELECTED(suite, Asked(**dict(arguments))))

    def selected(suite: bytes, what: Asked) -> frozenset[str]:
        fields = {name: tuple(it) if isinstance(it, list) else it for name, it in vars(what).items()}
        found: frozenset[str] = asked(suite, tuple(fields.items()))
        return found

    with mock.patch.object(validate, "_selected", selected):
        yield


Script = Sequence[str] | Callable[[Sequence[str]], Sequence[str]]


@dataclass
class FakeWatcher:
    """Plays an image: the lines of each kind of container, and how each ends."""

    looks: Mapping[str, tuple[str, End]] = field(
        default_factory=lambda: {PYTHONS[0]: ("torchyard: Python 3.11 with torch", End.ITSELF)}
    )
    """What each Python says when asked for its version; others cannot be started."""
    foreign: tuple[Sequence[str], End] = ((), End.ITSELF)
    own: tuple[Sequence[str], End] = ((), End.ITSELF)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def find(self, reference: str) -> Found:
        raise AssertionError(reference)

    def watch(
        self,
        image: Found,
        argv: Sequence[str],
        *,
        files: Mapping[str, bytes],
        allowance: Allowance,
        on_line: Callable[[str], None],
        deadline_s: float,
    ) -> Ended:
        assert image is FOUND
        self.asked.append({"argv": list(argv), "files": dict(files), "allowance": allowance, "deadline_s": deadline_s})
        if argv[1] == "-c":
            if argv[0] not in self.looks:
                return Ended(how=End.NO_PROGRAM, code=127)
            text, how = self.looks[argv[0]]
            lines: Sequence[str] = [text]
        else:
            lines, how = self.foreign if allowance.user else self.own
        for line in lines:
            on_line(line)
        return Ended(how=how, code=0)

    @property
    def main(self) -> dict[str, Any]:
        return self.asked[-1]


def event(**fields: Any) -> str:
    return json.dumps({"event": fields.pop("event"), **fields})


def document(code: int = 0, **more: Any) -> dict[str, Any]:
    return {"verdict": {"exit_code": code}, **more}


def end_of(code: int = 0, **more: Any) -> str:
    return event(event="end", exit_code=code, text=["passed"], report=document(code, **more))


START = event(event="start", checks=["run.identity"], driver={})
RESULT = event(event="result", id="run.identity", status="pass", text=["ok"])
GOOD = ([START, RESULT, end_of()], End.ITSELF)


def watched(watcher: FakeWatcher, asked: Asked = IDENTITY, subject: Subject = SUBJECT) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    return validate.image(subject, FOUND, asked, watcher, events.append), events


def refused(watcher: FakeWatcher, asked: Asked = IDENTITY) -> str:
    with pytest.raises(ImpossibleError) as caught:
        watched(watcher, asked)
    (problem,) = caught.value.problems
    assert problem.where == "some/image:tag"
    assert problem.tries
    return f"{problem.what}\n{problem.why}\n{' '.join(problem.tries)}"


# --------------------------------------------------------------------------- what comes back


def test_events_are_passed_on_as_they_come_and_the_report_returned() -> None:
    report, events = watched(FakeWatcher(own=GOOD))
    assert report == document()
    assert [it["event"] for it in events] == ["start", "result", "end"]


GARBAGE = [
    "",
    "NVIDIA Release 25.01",
    "\x1b[31mred\x1b[0m",
    '{"event": ',
    '{"event": "result"}',
    '{"event": "result", "id": 5}',
    '{"event": "result", "id": "a.b", "text": 7}',
    '{"event": "result", "id": "a.b", "text": [7]}',
    '{"event": "result", "id": "a.b", "text": ["\\ud800"]}',
    '{"event": "end"}',
    '{"event": "end", "report": []}',
    '{"event": "end", "report": {}}',
    '{"event": "end", "report": {"verdict": {"exit_code": "0"}}}',
    '{"event": "end", "report": {"verdict": {"exit_code": true}}}',
    '{"event": "end", "report": {"verdict": 0}}',
    '{"event": ["end"]}',
    '{"event": null}',
    '{"event": "other", "text": ["hello"]}',
    '{"event": ' + "[" * 100_000,
    '{"event": ' + "9" * 10_000 + "}",
    '["event"]',
]


def test_whatever_else_an_image_prints_is_no_event() -> None:
    lines = [text for line in GOOD[0] for text in (*GARBAGE, line)]
    report, events = watched(FakeWatcher(own=(lines, End.ITSELF)))
    assert report == document()
    assert [it["event"] for it in events] == ["start", "result", "end"]


@pytest.mark.parametrize("line", GARBAGE)
def test_garbage_alone_is_no_report(line: str) -> None:
    assert "ended before its report" in refused(FakeWatcher(own=([START, line], End.ITSELF)))


def test_events_that_are_cut_off_are_no_report() -> None:
    lines = [START, RESULT, end_of()[:-3]]
    text = refused(FakeWatcher(own=(lines, End.ITSELF)))
    assert "1 checks were done" in text


@pytest.mark.parametrize(
    ("how", "says"), [(End.DEADLINE, "did not end within"), (End.FLOOD, "without end"), (End.NO_PROGRAM, "gone")]
)
def test_a_run_that_was_ended_is_no_pass_even_with_a_report(how: End, says: str) -> None:
    assert says in refused(FakeWatcher(own=(GOOD[0], how)))


def test_the_last_words_are_shown() -> None:
    noise = [f"line {number}" for number in range(1000)]
    text = refused(FakeWatcher(own=([*noise, "Fatal Python error: out of luck"], End.ITSELF)))
    assert "Fatal Python error: out of luck" in text
    assert "line 5\n" not in text


# --------------------------------------------------------------------------- which Python


def test_the_first_python_with_torch_is_taken() -> None:
    looks = {
        "python": ("torchyard: Python 2.7", End.ITSELF),
        "python3": ("torchyard: Python 3.12", End.ITSELF),
        "/opt/conda/bin/python": ("torchyard: Python 3.11 with torch", End.ITSELF),
    }
    watcher = FakeWatcher(looks=looks, own=GOOD)
    watched(watcher)
    assert [it["argv"][0] for it in watcher.asked] == [*PYTHONS[:4], "/opt/conda/bin/python"]


def test_without_torch_the_first_that_is_new_enough_is() -> None:
    looks = {
        "python": ("torchyard: Python 3.8 with torch", End.ITSELF),
        "python3": ("torchyard: Python 3.9", End.ITSELF),
        "/usr/local/bin/python3": ("torchyard: Python 3.13", End.ITSELF),
    }
    watcher = FakeWatcher(looks=looks, own=GOOD)
    watched(watcher)
    assert watcher.main["argv"][0] == "python3"


def test_the_question_for_the_version_is_understood_by_this_python() -> None:
    said = starts([sys.executable, "-c", validate._LOOK]).stdout
    assert said.startswith("torchyard: Python {}.{}".format(*sys.version_info[:2]))


def test_an_image_without_python() -> None:
    text = refused(FakeWatcher(looks={}))
    assert all(f"{python}: cannot be started" in text for python in PYTHONS)
    assert "linux/arm64" in text


@pytest.mark.parametrize(
    ("said", "how", "says"),
    [
        ("torchyard: Python 3.8", End.ITSELF, "is Python 3.8"),
        ("Fatal Python error: init_fs_encoding", End.ITSELF, "Fatal Python error"),
        ("", End.DEADLINE, "did not say its version within"),
        ("garbage", End.FLOOD, "prints without end"),
    ],
)
def test_an_image_whose_python_is_none(said: str, how: End, says: str) -> None:
    assert says in refused(FakeWatcher(looks={"python": (said, how)}))


# --------------------------------------------------------------------------- the foreign user


USER = Asked(only=("run.*",))
FOREIGN_RESULT = {
    "event": "result",
    "id": FOREIGN_CHECK,
    "title": "a title",
    "tier": 1,
    "status": "warn",
    "skip": None,
    "waiver": None,
    "detail": "",
    "evidence": {"uid": 12345},
    "output": "",
    "findings": [],
    "metrics": {},
    "seconds": 1.5,
    "text": ["warn"],
}


def test_the_foreign_user_s_result_is_passed_on() -> None:
    watcher = FakeWatcher(own=GOOD, foreign=([START, json.dumps(FOREIGN_RESULT)], End.ITSELF))
    _, events = watched(watcher, USER)
    assert [it["event"] for it in events] == ["start", "result", "end"], "of the other container nothing is shown"
    foreign, main = watcher.asked[-2:]
    assert (foreign["allowance"].user, foreign["allowance"].gpus) == (FOREIGN_USER, "none")
    assert "--foreign-user" in foreign["argv"]
    assert f"--only={FOREIGN_CHECK}" in foreign["argv"]
    assert main["allowance"].user is None
    (path,) = [it.removeprefix("--elsewhere=") for it in main["argv"] if it.startswith("--elsewhere=")]
    passed = json.loads(main["files"][path])["result"]
    assert passed == {name: value for name, value in FOREIGN_RESULT.items() if name not in ("event", "text")}


def test_it_is_not_asked_for_what_nobody_wants_to_know() -> None:
    watcher = FakeWatcher(own=GOOD)
    watched(watcher)
    assert not [it for it in watcher.asked if it["allowance"].user]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (End.ITSELF, "broke off"),
        (End.DEADLINE, "did not end"),
        (End.FLOOD, "without end"),
        (End.NO_PROGRAM, "cannot be started by that user"),
    ],
)
@pytest.mark.parametrize(("option", "status"), [("warn", "warn"), ("fail", "fail")])
def test_a_foreign_user_that_gives_no_result_is_one(
    tmp_path: Path, how: End, says: str, option: str, status: str
) -> None:
    """What the host writes down is understood by the suite, and is not green."""
    watcher = FakeWatcher(own=GOOD, foreign=(["last words"], how))
    watched(watcher, USER)
    (name,) = [name for name in watcher.main["files"] if name.endswith("elsewhere.json")]
    path = tmp_path / "elsewhere.json"
    path.write_bytes(watcher.main["files"][name])
    found = command_line._elsewhere(str(path), list(check.load().values()), {"foreign_user": option})
    result = found[FOREIGN_CHECK]
    assert (result.status.value, result.tier) == (status, 1)
    (finding,) = result.findings
    assert says in finding.why
    assert "last words" in finding.why


def test_a_result_from_there_is_read_as_it_was_written(tmp_path: Path) -> None:
    watcher = FakeWatcher(own=GOOD, foreign=([json.dumps(FOREIGN_RESULT)], End.ITSELF))
    watched(watcher, USER)
    (name,) = [name for name in watcher.main["files"] if name.endswith("elsewhere.json")]
    path = tmp_path / "elsewhere.json"
    path.write_bytes(watcher.main["files"][name])
    result = command_line._elsewhere(str(path), (), {})[FOREIGN_CHECK]
    assert (result.status, result.evidence, result.duration_s) == (Status.WARN, {"uid": 12345}, 1.5)


# --------------------------------------------------------------------------- what is asked for


def test_the_suite_travels_with_the_words_of_the_user() -> None:
    asked = Asked(
        profile="gpu", gpus="2", on_skip="warn", strict=True, only=("dev.*",), options=("workers=3",), budget_s=77
    )
    watcher = FakeWatcher(own=GOOD)
    watched(watcher, asked)
    argv, files = watcher.main["argv"], watcher.main["files"]
    assert files[argv[1]] == bundle()
    assert {"--profile", "gpu", "--gpus", "2", "--strict", "--only=dev.*", "--option=workers=3", "77"} <= set(argv)
    assert watcher.main["allowance"] == Allowance(gpus="2")
    assert watcher.main["deadline_s"] == 77 + validate.GRACE_S
    (subject,) = [json.loads(it.removeprefix("--subject=")) for it in argv if it.startswith("--subject=")]
    assert subject == {"kind": "image", "name": "some/image:tag", "digest": FOUND.digest}
    assert not [it for it in argv if it.startswith(("--image-json", "--waivers"))]


WAIVERS = b'{"schema": 1, "waivers": [{"check": "run.user", "why": "nobody is foreign here", "until": "9999-12-31"}]}'


def test_waivers_travel_to_the_container_that_gives_the_verdict() -> None:
    watcher = FakeWatcher(own=GOOD, foreign=([START, json.dumps(FOREIGN_RESULT)], End.ITSELF))
    watched(watcher, replace(USER, waivers=WAIVERS))
    foreign, main = watcher.asked[-2:]
    (path,) = [it.removeprefix("--waivers=") for it in main["argv"] if it.startswith("--waivers=")]
    assert main["files"][path] == WAIVERS
    assert not [it for it in foreign["argv"] if it.startswith("--waivers")]


def test_waivers_that_are_none_are_refused_with_their_place() -> None:
    content = WAIVERS.replace(b"9999-12-31", b"soon")
    with pytest.raises(MatrixError) as caught:
        watched(FakeWatcher(own=GOOD), replace(IDENTITY, waivers=content))
    assert caught.value.problems[0].what == '--waivers: waivers[0].until: "soon" is no date like 2026-12-31'


def test_a_file_of_waivers_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "waivers.json"
    for wrong in (path, tmp_path):
        with pytest.raises(MatrixError, match="cannot be read"):
            validate.read_waivers(wrong)
    path.write_bytes(WAIVERS)
    assert validate.read_waivers(path) == WAIVERS
    monkeypatch.setattr(validate, "MOST_WAIVERS", len(WAIVERS) - 1)
    with pytest.raises(MatrixError, match="no file of waivers"):
        validate.read_waivers(path)


def test_both_sides_read_as_much_of_the_waivers() -> None:
    assert validate.MOST_WAIVERS == waivers.MOST_BYTES


def test_a_declaration_is_passed_to_both_containers() -> None:
    watcher = FakeWatcher(own=GOOD)
    watched(watcher, USER, Subject(kind="image", name="cell", declared=b'{"id": "cell"}'))
    for one in watcher.asked[-2:]:
        (path,) = [it.removeprefix("--image-json=") for it in one["argv"] if it.startswith("--image-json=")]
        assert one["files"][path] == b'{"id": "cell"}'


@pytest.mark.parametrize(
    "asked",
    [
        Asked(only=("no.such",)),
        Asked(profile="none"),
        Asked(options=("colour=red",)),
        Asked(gpus="many"),
        Asked(gpus="0"),
        Asked(gpus="auto"),
        Asked(on_skip="cry"),
        Asked(only=("dev.*",)),
        Asked(waivers=b"{}"),
        Asked(waivers=b'{"schema": 1, "waivers": [{"check": "no.such", "why": "x", "until": "2026-12-31"}]}'),
    ],
)
def test_what_the_suite_does_not_know_is_refused_before_any_container(asked: Asked) -> None:
    watcher = FakeWatcher(own=GOOD)
    with pytest.raises(MatrixError) as caught:
        watched(watcher, asked)
    assert "\n" not in caught.value.problems[0].what
    assert watcher.asked == []


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 3),
        ([0], 0),
        ([0, 0], 0),
        ([0, 5], 5),
        ([5, 4], 4),
        ([4, 1], 1),
        ([1, 3], 3),
        ([0, 4, 5, 1], 1),
    ],
)
def test_the_exit_code_of_several_subjects_is_that_of_the_worst(codes: Sequence[int], worst: int) -> None:
    assert validate.exit_code(codes) == worst


# --------------------------------------------------------------------------- this machine


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """A program in the place of Python."""

    def make(text: str) -> str:
        path = tmp_path / "python"
        path.write_text(text, "utf-8")
        path.chmod(0o755)
        return str(path)

    before = set(threading.enumerate())
    yield make
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_machine_s_own_python_is_asked() -> None:
    events: list[Any] = []
    report = validate.machine(sys.executable, IDENTITY, events.append)
    assert report["subject"] == {"kind": "machine", "name": sys.executable, "digest": None, "declared": None}
    assert [it["id"] for it in report["results"]] == ["run.identity"]
    assert [it["event"] for it in events] == ["start", "result", "end"]


@pytest.mark.parametrize(("until", "status", "code"), [("9999-12-31", "waived", 4), ("2026-01-01", "fail", 1)])
def test_a_machine_s_failure_is_waived_until_the_day(until: str, status: str, code: int) -> None:
    """Nothing else is required here, so what is waived leaves nothing that is proven."""
    text = {"schema": 1, "waivers": [{"check": "run.identity", "why": "it is another one", "until": until}]}
    asked = replace(IDENTITY, waivers=json.dumps(text).encode(), prelude="import sys; sys.flags = None")
    report = validate.machine(sys.executable, asked, lambda _: None)
    (result,) = report["results"]
    assert (result["status"], report["verdict"]["exit_code"]) == (status, code)
    assert report["profile"]["waivers"] == text["waivers"]
    assert reports.loads(json.dumps(report).encode(), where="report.json").result("run.identity")


def test_a_python_that_does_not_exist() -> None:
    with pytest.raises(ImpossibleError, match="cannot be started"):
        validate.machine("/nowhere/python", IDENTITY, lambda _: None)


def test_a_program_that_is_no_python(program: Callable[[str], str]) -> None:
    with pytest.raises(ImpossibleError) as caught:
        validate.machine(program("#!/bin/sh\necho I am no Python\n"), IDENTITY, lambda _: None)
    assert "I am no Python" in caught.value.problems[0].why


def test_a_python_that_prints_without_end(program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MOST_PRINTED", 1 << 20)
    with pytest.raises(ImpossibleError, match="could not run") as caught:
        validate.machine(program("#!/bin/sh\nexec yes garbage\n"), IDENTITY, lambda _: None)
    assert "without end" in caught.value.problems[0].why


def test_a_python_that_prints_one_endless_line(program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MOST_PRINTED", 1 << 20)
    with pytest.raises(ImpossibleError, match="could not run") as caught:
        validate.machine(program("#!/bin/sh\nexec cat /dev/zero\n"), IDENTITY, lambda _: None)
    assert "without end" in caught.value.problems[0].why


def test_a_python_that_never_ends_and_its_children_are_ended(
    program: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "GRACE_S", 0.2)
    script = f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/child\nsleep 300\n"
    started = time.monotonic()
    with pytest.raises(ImpossibleError) as caught:
        validate.machine(program(script), Asked(only=IDENTITY.only, budget_s=0.3), lambda _: None)
    assert "did not end within" in caught.value.problems[0].why
    assert time.monotonic() - started < 10
    child = Path("/proc", (tmp_path / "child").read_text("utf-8").strip(), "stat")
    for _ in range(50):
        if not child.exists() or " Z " in child.read_text("utf-8"):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the child lives on")
