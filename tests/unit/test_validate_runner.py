"""The suite's runner: whatever a check does to its process is a result, and nothing becomes green by accident."""

from __future__ import annotations

import ast
import datetime as dt
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validate import check, driver, profile, runner, terminal
from validate.check import Check, Request
from validate.checks import collectives, gloo
from validate.driver import Driver
from validate.verdict import (
    FAILED,
    HARNESS,
    PASSED,
    SKIPPED,
    WARNED,
    Blame,
    Finding,
    Result,
    Skip,
    Status,
    exit_code,
    proven_tiers,
    result_of,
    waived,
)
from validate.waivers import Waiver

ROOT = Path(__file__).parents[2]

CHECKS = '''
"""Checks that behave as badly as a check can."""

import ctypes, json, os, signal, subprocess, sys, threading, time
from validate.check import check
from validate.verdict import Skip

@check("tiny.pass", title="passes", tier=1)
def passes(probe):
    probe.saw(pid=os.getpid(), odd=float("nan"), text="\\ud800")
    probe.metric("speed", float("inf"), "GB/s", better="higher")
    probe.detail("as it should")

@check("tiny.abort", title="aborts", tier=1)
def aborts(probe):
    probe.saw(before="seen")
    os.abort()

@check("tiny.segfault", title="reads where nothing is", tier=1)
def segfault(probe):
    ctypes.string_at(0)

@check("tiny.exit", title="exits", tier=1)
def exits(probe):
    os._exit(7)

@check("tiny.quiet", title="exits as if all was well", tier=1)
def quiet(probe):
    os._exit(0)

@check("tiny.hang", title="hangs", tier=1)
def hangs(probe):
    threading.Thread(target=in_another_thread, daemon=True).start()
    time.sleep(0.1)
    in_the_main_thread()

def in_another_thread():
    time.sleep(100)

def in_the_main_thread():
    while True:
        time.sleep(100)

@check("tiny.deaf", title="hangs and ignores signals", tier=1)
def deaf(probe):
    import faulthandler
    faulthandler.unregister(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    in_the_main_thread()

@check("tiny.fork", title="leaves a child that holds the pipes", tier=1)
def forks(probe):
    pid = os.fork()
    if not pid:
        time.sleep(100)
        os._exit(0)
    probe.saw(child=pid)

@check("tiny.escape", title="leaves a child in another session that prints for ever", tier=1)
def escapes(probe):
    pid = os.fork()
    if not pid:
        os.setsid()
        os.write(1, b"away\\n")
        end = time.time() + 20
        while time.time() < end:
            os.write(1, b"still here\\n")
        os._exit(0)
    probe.saw(child=pid)

@check("tiny.flood", title="prints without end", tier=1)
def floods(probe):
    print("the first line")
    while True:
        os.write(1, b"x" * 65536)

@check("tiny.ours", title="is wrong itself", tier=1)
def ours(probe):
    {}["no such key"]

@check("tiny.theirs", title="finds a library that raises", tier=1)
def theirs(probe):
    json.loads("no JSON")

@check("tiny.runtime", title="is told by a library what is wrong", tier=1)
def runtime(probe):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

@check("tiny.sysexit", title="finds a library that calls exit", tier=1)
def sysexit(probe):
    sys.exit(0)

@check("tiny.fails", title="fails", tier=1)
def fails(probe):
    probe.warn("a little wrong")
    probe.fail("quite wrong", remedy="mend it")

@check("tiny.warns", title="warns", tier=1)
def warns(probe):
    probe.warn("a little wrong")

@check("tiny.stops", title="stops", tier=1)
def stops(probe):
    probe.stop("wrong")

@check("tiny.skips", title="skips", tier=1)
def skips(probe):
    probe.skip(Skip.CPU_BUILD, "no CUDA here")

@check("tiny.fails-then-skips", title="has found something before it gives up", tier=1)
def fails_then_skips(probe):
    probe.fail("wrong")
    probe.skip(Skip.NOT_DECLARED, "nothing to compare with")

@check("tiny.undeclared", title="wants a declaration", tier=1)
def undeclared(probe):
    probe.declared["expect"]

@check("tiny.clock", title="says when it ran", tier=1)
def clock(probe):
    start = time.monotonic()
    time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
    probe.saw(start=start, end=time.monotonic())

@check("tiny.who", title="says who it is", tier=1)
def who(probe):
    open("written", "w").close()
    probe.saw(uid=os.getuid(), gid=os.getgid(), groups=os.getgroups(), home=os.environ.get("HOME"))
'''


def tiny(name: str, **more: Any) -> Check:
    """Return a check of CHECKS as the runner sees it: its body is looked up in its own process."""
    return Check(
        **{"id": f"tiny.{name}", "title": name, "tier": 1, "body": lambda probe: None, "deadline_s": 20, **more}
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A suite of its own, with no other checks than those above."""
    directory = tmp_path_factory.mktemp("suite")
    shutil.copytree(ROOT / "validate", directory / "validate", ignore=shutil.ignore_patterns("__pycache__", "checks"))
    (directory / "validate" / "checks").mkdir()
    (directory / "validate" / "checks" / "__init__.py").write_text('"""Tiny ones."""\n', "utf-8")
    (directory / "validate" / "checks" / "tiny.py").write_text(CHECKS, "utf-8")
    return str(directory)


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request(options=profile.DEFAULTS, scratch=str(tmp_path))


def one(root: str, request: Request, name: str, **more: Any) -> Result:
    deadline_s = more.pop("deadline_s", 20)
    return runner.run_one(tiny(name, **more), request, root=root, deadline_s=deadline_s)


def gone(pid: int) -> bool:
    """Tell whether a process has ended, or only waits to be buried."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in ("Z", "X")


def goes(pid: int) -> bool:
    """Tell whether a process that was killed ends: on a busy machine the kernel takes a moment."""
    for _ in range(100):
        if gone(pid):
            return True
        time.sleep(0.1)
    return False


# --------------------------------------------------------------------------- one check


def test_what_was_seen_is_kept(root: str, request_: Request) -> None:
    result = one(root, request_, "pass")
    assert (result.status, result.detail, result.findings) == (Status.PASS, "as it should", [])
    assert (result.evidence["odd"], result.evidence["text"]) == ("nan", "?")
    assert f"{result.metrics['speed'].value} {result.metrics['speed'].unit}" == "inf GB/s"
    assert result.output == ""


BROKEN = [
    ("abort", "SIGABRT"),
    ("segfault", "SIGSEGV"),
    ("exit", "exit code 7"),
    ("quiet", "ended early"),
]


@pytest.mark.parametrize(("name", "says"), BROKEN)
def test_a_process_that_dies_is_a_failure(root: str, request_: Request, name: str, says: str) -> None:
    result = one(root, request_, name)
    assert result.status is Status.FAIL
    assert says in result.findings[-1].what


def test_what_was_seen_before_a_crash_is_kept(root: str, request_: Request) -> None:
    result = one(root, request_, "abort")
    assert result.evidence == {"before": "seen"}
    assert "in aborts" in result.output  # faulthandler's traceback


def test_no_deadline_is_so_early_that_a_busy_machine_misses_it() -> None:
    checks = check.load()
    # The slowest without one of its own took 18 s at most where two cores had other work as well.
    assert check.DEADLINE_S >= 10 * 18
    assert {one.id: one.deadline_s for one in checks.values() if one.deadline_s < check.DEADLINE_S} == {}


def test_what_a_check_waits_for_ends_before_its_deadline() -> None:
    checks = check.load()
    launch_s = collectives.DEADLINE_S + collectives._START_S + 10
    assert 2 * launch_s < checks["dist.nccl"].deadline_s
    for name in ("dist.gloo", "dist.ddp", "dist.fsdp", "dist.busbw"):
        assert launch_s < checks[name].deadline_s
    assert checks["dist.gloo"].deadline_s > gloo._STARTS_S + gloo._ENDS_S
    assert checks["drv.visible"].deadline_s > driver.LOOK_S


def test_a_hang_is_ended_with_a_traceback_of_every_thread(root: str, request_: Request) -> None:
    result = one(root, request_, "hang", deadline_s=1)
    assert result.status is Status.ERROR
    (finding,) = result.findings
    assert "did not end within 1 s" in finding.what
    assert "less else runs" in finding.remedy
    assert finding.why in result.output
    assert result.output.strip().endswith(finding.why)
    assert "in_another_thread" in result.output
    assert "in_the_main_thread" in result.output


def test_the_end_of_what_was_printed_begins_with_a_whole_line() -> None:
    lines = [f"line {number} of what was printed" for number in range(100)]
    shown = runner._recognised("it broke", "\n".join(lines)).why.splitlines()
    assert 15 < len(shown) < 30
    assert shown == lines[-len(shown) :]
    assert runner._recognised("it broke", "x" * 5000).why == "x" * 600


def test_one_that_ignores_signals_is_ended_by_force(
    root: str, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_GRACE_S", 0.3)
    started = time.monotonic()
    assert one(root, request_, "deaf", deadline_s=1).status is Status.ERROR
    assert time.monotonic() - started < 4


def test_a_child_that_holds_the_pipes_is_ended_too(root: str, request_: Request) -> None:
    started = time.monotonic()
    result = one(root, request_, "fork")
    assert result.status is Status.PASS
    assert time.monotonic() - started < 5
    assert goes(result.evidence["child"])


def test_a_child_that_got_away_and_prints_is_not_waited_for(
    root: str, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_GRACE_S", 0.5)
    started = time.monotonic()
    result = one(root, request_, "escape")
    try:
        assert result.status is Status.PASS
        assert time.monotonic() - started < 8
    finally:
        os.kill(result.evidence["child"], signal.SIGKILL)


def test_of_endless_output_the_beginning_and_the_end_are_kept(root: str, request_: Request) -> None:
    result = one(root, request_, "flood", deadline_s=1)
    assert result.status is Status.ERROR
    assert result.output.startswith("the first line")
    assert "bytes ...]" in result.output
    assert "floods" in result.output[-2000:]
    assert len(result.output) < 200_000


def test_our_own_mistakes_are_told_from_a_library_that_raises(root: str, request_: Request) -> None:
    ours = one(root, request_, "ours")
    assert (ours.status, ours.findings[0].blame) == (Status.ERROR, Blame.HARNESS)
    theirs = one(root, request_, "theirs")
    assert theirs.status is Status.FAIL
    assert theirs.findings[0].what.startswith("json.decoder.JSONDecodeError")
    assert theirs.findings[0].blame is not Blame.HARNESS


def test_a_library_that_exits_does_not_pass(root: str, request_: Request) -> None:
    assert one(root, request_, "sysexit").status is Status.FAIL


def test_a_known_message_comes_with_its_remedy(root: str, request_: Request) -> None:
    (finding,) = one(root, request_, "runtime").findings
    assert (finding.mode, finding.blame) == ("F48", Blame.IMAGE)
    assert "gcc" in finding.remedy


@pytest.mark.parametrize(
    ("name", "status", "skip"),
    [
        ("fails", Status.FAIL, None),
        ("warns", Status.WARN, None),
        ("stops", Status.FAIL, None),
        ("skips", Status.SKIP, Skip.CPU_BUILD),
        ("undeclared", Status.SKIP, Skip.NOT_DECLARED),
    ],
)
def test_findings_make_the_status(root: str, request_: Request, name: str, status: Status, skip: Skip | None) -> None:
    result = one(root, request_, name)
    assert (result.status, result.skip) == (status, skip)


def test_what_was_found_before_a_check_gave_up_counts(root: str, request_: Request) -> None:
    assert one(root, request_, "fails-then-skips").status is Status.FAIL


def test_a_check_runs_where_it_can_write(root: str, request_: Request) -> None:
    result = one(root, request_, "who")
    assert (Path(request_.scratch) / "written").exists()
    assert result.evidence["uid"] == os.getuid()


SYSTEM_PYTHON = "/usr/bin/python3"
"""One that every user can start; that of the tests may lie in somebody's home."""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@only_root
@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason=f"there is no {SYSTEM_PYTHON}")
def test_a_foreign_user_has_no_name_no_home_and_group_0(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", SYSTEM_PYTHON)
    with TemporaryDirectory() as directory:
        shutil.copytree(root, f"{directory}/suite")
        scratch = Path(directory) / "scratch"
        scratch.mkdir()
        for path in (Path(directory), *Path(directory).rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        evidence = one(f"{directory}/suite", Request(scratch=str(scratch)), "who", foreign_user=True).evidence
    assert evidence == {"uid": runner.FOREIGN_UID, "gid": 0, "groups": [], "home": None}


@only_root
@pytest.mark.parametrize("status", [Status.WARN, Status.FAIL])
def test_a_python_that_others_cannot_start(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    (locked / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(locked / "python"))
    request = Request(options={"foreign_user": status.value}, scratch=str(tmp_path))
    result = one(root, request, "who", foreign_user=True)
    assert (result.status, result.findings[0].mode) == (status, "F25")


@only_root
def test_root_that_may_not_become_another(root: str, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(subprocess, "Popen", denied)
    assert one(root, request_, "who", foreign_user=True).skip is Skip.NEEDS_OTHER_USER


def test_a_prelude_runs_in_the_check_s_process(root: str, request_: Request) -> None:
    result = runner.run_one(
        tiny("pass"), request_, root=root, deadline_s=20, prelude="import os; os.getpid = lambda: -1"
    )
    assert result.evidence["pid"] == -1


def test_a_check_ends_when_the_suite_is_killed(root: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from validate import check, runner\n"
        "runner.run_one(check.load()['tiny.hang'], check.Request(scratch=sys.argv[2]), root=sys.argv[1], deadline_s=60)"
    )
    suite = subprocess.Popen([sys.executable, "-c", code, root, str(tmp_path)])
    try:
        children: list[int] = []
        listed = Path(f"/proc/{suite.pid}/task/{suite.pid}/children")
        for _ in range(100):
            children = [int(pid) for pid in listed.read_text("utf-8").split()]
            # In its last function it has asked the kernel to be ended.
            if children and "tiny.hang" in Path(f"/proc/{children[0]}/cmdline").read_text("utf-8"):
                break
            time.sleep(0.05)
        time.sleep(0.7)
        assert not gone(children[0])
    finally:
        suite.kill()
        suite.wait()
    assert goes(children[0])


# --------------------------------------------------------------------------- a run


def run(
    root: str, request: Request, checks: Sequence[Check], *, driver: Driver | None = None, **more: Any
) -> Mapping[str, Result]:
    told: list[str] = []
    results = runner.run(
        checks,
        request,
        root=root,
        driver=driver or Driver(),
        required={it.id for it in checks},
        on_result=lambda result: told.append(result.id),
        **more,
    )
    assert [result.id for result in results] == [it.id for it in checks]
    assert sorted(told) == sorted(result.id for result in results)
    return {result.id.partition(".")[2]: result for result in results}


def test_what_needs_a_failed_check_is_skipped(root: str, request_: Request) -> None:
    results = run(
        root,
        request_,
        [
            tiny("stops"),
            tiny("pass", needs=("tiny.stops",)),
            tiny("who", needs=("tiny.pass",)),
            tiny("warns"),
            tiny("quiet", needs=("tiny.warns",)),
            tiny("skips"),
            tiny("clock", needs=("tiny.skips",)),
        ],
    )
    assert {name: (it.status, it.skip) for name, it in results.items()} == {
        "stops": (Status.FAIL, None),
        "pass": (Status.SKIP, Skip.DEPENDENCY_FAILED),
        "who": (Status.SKIP, Skip.DEPENDENCY_FAILED),
        "warns": (Status.WARN, None),
        "quiet": (Status.FAIL, None),
        "skips": (Status.SKIP, Skip.CPU_BUILD),
        "clock": (Status.SKIP, Skip.CPU_BUILD),
    }
    assert results["pass"].detail == "tiny.stops failed"


def test_checks_of_a_gpu_are_skipped_without_one(root: str, request_: Request) -> None:
    checks = [tiny("pass", gpus=1, tier=2), tiny("clock", gpus=2, tier=3)]
    none = run(root, request_, checks)
    assert {it.skip for it in none.values()} == {Skip.NO_GPU}
    single = Driver(nodes=("/dev/nvidia0",), library="/lib/libcuda.so.1", init=0, count=1)
    assert not single.absent
    results = run(root, request_, checks, driver=single)
    assert results["pass"].status is Status.PASS
    assert (results["clock"].skip, results["clock"].detail) == (Skip.NEEDS_GPUS, "needs 2 GPUs, 1 found")


def test_when_the_time_is_used_up_the_rest_is_skipped(root: str, request_: Request) -> None:
    checks = [tiny("hang"), tiny("pass", needs=("tiny.hang",)), tiny("deaf"), tiny("clock", exclusive=True)]
    started = time.monotonic()
    results = run(root, request_, checks, budget_s=1)
    assert time.monotonic() - started < 8
    assert {name: it.skip for name, it in results.items()} == dict.fromkeys(results, Skip.BUDGET)
    assert exit_code(list(results.values())) == SKIPPED


def test_a_deadline_of_its_own_is_no_lack_of_time(root: str, request_: Request) -> None:
    assert run(root, request_, [tiny("hang", deadline_s=1)], budget_s=30)["hang"].status is Status.ERROR


def test_what_measures_runs_alone_and_the_rest_two_at_a_time(
    root: str, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_SLEEP", "0.7")
    checks = [tiny("clock", title=f"{number}", exclusive=number == 2) for number in range(5)]
    # One body under several names.
    many = "".join(f'check("tiny.clock{n}", title="{n}", tier=1)(clock)\n' for n in range(5))
    extra = Path(root) / "validate" / "checks" / "tinyclocks.py"
    extra.write_text(
        f'"""More."""\nfrom validate.check import check\nfrom validate.checks.tiny import clock\n{many}', "utf-8"
    )
    try:
        checks = [replace(it, id=f"tiny.clock{number}") for number, it in enumerate(checks)]
        results = run(root, request_, checks)
    finally:
        extra.unlink()
    spans = {name: (it.evidence["start"], it.evidence["end"]) for name, it in results.items()}
    overlapping = {
        (a, b) for a, b in itertools.combinations(spans, 2) if spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
    }
    assert overlapping, "two run at a time"
    assert not any("clock2" in pair for pair in overlapping)
    most = max(sum(start <= moment < end for start, end in spans.values()) for moment, _ in spans.values())
    assert most == 2


def test_a_result_from_elsewhere_is_taken_over(root: str, request_: Request) -> None:
    one = tiny("who", foreign_user=True)
    elsewhere = {one.id: Result(one.id, one.title, 1, Status.WARN, findings=[Finding(Status.WARN, "no name")])}
    results = run(root, request_, [one], elsewhere=elsewhere)
    assert (results["who"].findings[0].what, results["who"].required) == ("no name", True)
    after = run(root, request_, [tiny("stops"), replace(one, needs=("tiny.stops",))], elsewhere=elsewhere)
    assert after["who"].skip is Skip.DEPENDENCY_FAILED


def test_who_is_not_root_cannot_be_another(root: str, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    one = tiny("who", foreign_user=True)
    assert run(root, request_, [one])["who"].skip is Skip.NEEDS_OTHER_USER
    assert run(root, request_, [one], foreign_user=True)["who"].status is Status.PASS


TODAY = dt.date(2026, 11, 21)


def waiver_of(name: str, until: dt.date = TODAY) -> dict[str, Waiver]:
    return {f"tiny.{name}": Waiver(f"tiny.{name}", "known since the last driver", until)}


def test_a_failure_is_waived_and_keeps_what_it_found(root: str, request_: Request) -> None:
    checks = [tiny("fails"), tiny("hang", deadline_s=1), tiny("warns"), tiny("pass"), tiny("skips")]
    names = [it.id.partition(".")[2] for it in checks]
    every = {check: waiver for name in names for check, waiver in waiver_of(name).items()}
    results = run(root, request_, checks, waivers=every, today=TODAY)
    assert {name: it.status.value for name, it in results.items()} == {
        "fails": "waived", "hang": "waived", "warns": "warn", "pass": "pass", "skips": "skip",
    }  # fmt: skip
    assert [it.what for it in results["fails"].findings] == ["a little wrong", "quite wrong"]
    assert "in_the_main_thread" in results["hang"].output
    assert {name for name, it in results.items() if it.waiver} == {"fails", "hang"}
    assert all(it.required for it in results.values())


def test_the_last_day_counts_and_the_next_one_does_not(root: str, request_: Request) -> None:
    checks = [tiny("stops")]
    for today, status in ((TODAY - dt.timedelta(1), "waived"), (TODAY, "waived"), (TODAY + dt.timedelta(1), "fail")):
        result = run(root, request_, checks, waivers=waiver_of("stops"), today=today)["stops"]
        assert result.status.value == status
    assert result.waiver is None
    first, over = result.findings
    assert (first.what, over.status) == ("wrong", Status.FAIL)
    assert over.what == "the waiver of tiny.stops is over: it ended with 2026-11-21"
    assert "known since the last driver" in over.why
    assert over.remedy


def test_a_run_that_does_not_say_its_day_waives_nothing(root: str, request_: Request) -> None:
    found = run(root, request_, [tiny("stops")], waivers=waiver_of("stops", dt.date.max))
    assert found["stops"].status is Status.FAIL


def test_a_result_from_elsewhere_is_waived_too(root: str, request_: Request) -> None:
    one = tiny("who", foreign_user=True)
    elsewhere = {one.id: Result(one.id, one.title, 1, Status.FAIL, findings=[Finding(Status.FAIL, "no name")])}
    results = run(root, request_, [one], elsewhere=elsewhere, waivers=waiver_of("who"), today=TODAY)
    assert results["who"].status is Status.WAIVED
    assert elsewhere[one.id].status is Status.FAIL


def test_a_waiver_hides_nothing_that_it_does_not_name(root: str, request_: Request) -> None:
    checks = [tiny("warns"), tiny("stops"), tiny("pass", needs=("tiny.stops",))]
    results = run(root, request_, checks, waivers=waiver_of("stops") | waiver_of("pass"), today=TODAY)
    assert (results["pass"].status, results["pass"].skip) == (Status.SKIP, Skip.DEPENDENCY_FAILED)
    assert results["pass"].detail == "tiny.stops failed, and is waived"
    assert exit_code(list(results.values())) == SKIPPED


def test_a_waived_result_is_read_as_it_was_written() -> None:
    one = waived(Result("tiny.stops", "stops", 1, Status.FAIL), waiver_of("stops")["tiny.stops"], TODAY)
    read = result_of(one.as_json())
    assert (read.status, read.waiver) == (Status.WAIVED, one.waiver)


def test_people_see_what_is_waived_until_when_and_why() -> None:
    one = waived(Result("tiny.stops", "stops", 1, Status.FAIL, required=True), waiver_of("stops")["tiny.stops"], TODAY)
    (line,) = terminal.lines(one)
    assert line.startswith("waived tiny.stops")
    assert line.endswith("stops: until 2026-11-21: known since the last driver")
    last = list(terminal.summary([one], on_skip="fail", strict=False, narrowed=False))
    assert last == ["1 waived", "T1 without a GPU: not proven", "not passed: nothing that was required is proven"]
    last = list(terminal.summary([one, MISSING], on_skip="fail", strict=False, narrowed=True))
    assert last[-1] == "not passed: what was required did not run"


def test_people_are_not_shown_what_is_for_other_kinds_of_images() -> None:
    other = Result("svc.sshd", "keys", 1, Status.SKIP, required=True, skip=Skip.NOT_THIS_KIND)
    fine = Result("tiny.works", "works", 1, Status.PASS, required=True)
    assert list(terminal.lines(other)) == []
    last = list(terminal.summary([fine, other], on_skip="fail", strict=False, narrowed=False))
    assert last == ["1 ok · 1 for other kinds of images", "T1 without a GPU: proven", "passed"]


def test_people_are_told_if_nothing_was_tried_on_a_gpu_that_torch_is_for() -> None:
    def last(cuda: str | None, *more: Result, narrowed: bool = False) -> list[str]:
        identity = Result(
            "run.identity", "", 1, Status.PASS, required=True, evidence={"facts": {"torch": "2.8.0", "cuda": cuda}}
        )
        return list(terminal.summary([identity, *more], on_skip="fail", strict=False, narrowed=narrowed))

    said = "T2 on one GPU: not tried, --gpus all tries it"
    assert last("12.8") == ["1 ok", "T1 without a GPU: proven", said, "passed"]
    assert said not in last(None), "torch has no CUDA"
    assert said not in last("12.8", narrowed=True)
    assert said not in last("12.8", replace(EXTRA_SKIP, tier=2))


# --------------------------------------------------------------------------- verdict


def result(status: Status, *, required: bool = True, skip: Skip | None = None, tier: int = 1) -> Result:
    return Result(f"a.{status.value}", "", tier, status, required=required, skip=skip)


PASS, WARN, FAIL, ERROR = (result(it) for it in (Status.PASS, Status.WARN, Status.FAIL, Status.ERROR))
MISSING = result(Status.SKIP, skip=Skip.NO_GPU)
EXCUSED = result(Status.SKIP, skip=Skip.NOT_DECLARED)
EXTRA_PASS = result(Status.PASS, required=False)
EXTRA_FAIL = result(Status.FAIL, required=False, tier=2)
EXTRA_WARN = result(Status.WARN, required=False)
WAIVED = result(Status.WAIVED)
EXTRA_WAIVED = result(Status.WAIVED, required=False, tier=2)
EXTRA_SKIP = result(Status.SKIP, required=False, skip=Skip.NO_GPU)


@pytest.mark.parametrize(
    ("results", "options", "code"),
    [
        ([], {}, HARNESS),
        ([PASS], {}, PASSED),
        ([PASS, EXTRA_SKIP], {}, PASSED),
        ([PASS, EXCUSED], {}, PASSED),
        ([PASS, FAIL], {}, FAILED),
        ([PASS, ERROR], {}, FAILED),
        ([PASS, EXTRA_FAIL], {}, FAILED),
        ([PASS, EXTRA_FAIL], {"on_skip": "pass"}, FAILED),
        ([FAIL, MISSING], {}, FAILED),
        ([PASS, MISSING], {}, SKIPPED),
        ([PASS, MISSING], {"on_skip": "warn"}, PASSED),
        ([PASS, MISSING], {"on_skip": "pass"}, PASSED),
        ([PASS, MISSING], {"on_skip": "warn", "strict": True}, WARNED),
        ([PASS, MISSING], {"on_skip": "pass", "strict": True}, PASSED),
        ([MISSING], {"on_skip": "pass"}, SKIPPED),
        ([EXCUSED], {}, SKIPPED),
        ([EXCUSED], {"on_skip": "pass"}, SKIPPED),
        ([EXTRA_PASS], {}, SKIPPED),
        ([EXTRA_PASS, EXCUSED], {"on_skip": "pass"}, SKIPPED),
        ([PASS, WARN], {}, PASSED),
        ([PASS, WARN], {"strict": True}, WARNED),
        ([PASS, EXTRA_WARN], {"strict": True}, WARNED),
        ([WARN, FAIL], {"strict": True}, FAILED),
        ([PASS, WAIVED], {}, PASSED),
        ([WARN, WAIVED], {}, PASSED),
        ([PASS, WAIVED], {"strict": True}, PASSED),
        ([PASS, EXTRA_WAIVED], {}, PASSED),
        ([WAIVED], {}, SKIPPED),
        ([WAIVED], {"on_skip": "pass"}, SKIPPED),
        ([WAIVED, EXTRA_PASS, EXCUSED], {"on_skip": "pass"}, SKIPPED),
        ([EXTRA_WAIVED], {}, SKIPPED),
        ([PASS, WAIVED, MISSING], {}, SKIPPED),
        ([PASS, WAIVED, MISSING], {"on_skip": "warn"}, PASSED),
        ([PASS, WAIVED, FAIL], {}, FAILED),
        ([PASS, WAIVED, EXTRA_FAIL], {}, FAILED),
    ],
)
def test_exit_codes(results: Sequence[Result], options: dict[str, Any], code: int) -> None:
    assert exit_code(results, **options) == code


RESULTS = st.lists(
    st.builds(
        lambda status, skip, required, tier: Result(
            "a.b", "", tier, status, required=required, skip=skip if status is Status.SKIP else None
        ),
        st.sampled_from(Status),
        st.sampled_from(Skip),
        st.booleans(),
        st.sampled_from([1, 2, 3]),
    ),
    max_size=6,
)


@given(results=RESULTS, on_skip=st.sampled_from(["fail", "warn", "pass"]), strict=st.booleans())
def test_nothing_is_green_without_a_required_pass(*, results: list[Result], on_skip: str, strict: bool) -> None:
    code = exit_code(results, on_skip=on_skip, strict=strict)
    required = [it for it in results if it.required]
    if code == PASSED:
        assert any(it.status in (Status.PASS, Status.WARN) for it in required)
        assert not any(it.status in (Status.FAIL, Status.ERROR) for it in results)
        if strict:
            assert not any(it.status is Status.WARN for it in results)
    # Stricter is never greener, and a result more never mends a failure.
    assert not (code != PASSED and exit_code(results, on_skip=on_skip, strict=True) == PASSED)
    assert code == PASSED or exit_code(results, on_skip="fail", strict=strict) != PASSED
    if code == FAILED:
        assert exit_code([*results, PASS], on_skip=on_skip, strict=strict) == FAILED


@given(results=RESULTS, on_skip=st.sampled_from(["fail", "warn", "pass"]), strict=st.booleans())
def test_what_is_waived_is_as_if_it_had_not_been_asked_for(
    *, results: list[Result], on_skip: str, strict: bool
) -> None:
    rest = [it for it in results if it.status is not Status.WAIVED]
    code = exit_code(results, on_skip=on_skip, strict=strict)
    if rest:
        assert code == exit_code(rest, on_skip=on_skip, strict=strict)
        tiers = proven_tiers(rest)
        assert {tier: it for tier, it in proven_tiers(results).items() if tier in tiers} == tiers
    elif results:
        assert (code, any(proven_tiers(results).values())) == (SKIPPED, False)


@given(results=RESULTS, until=st.dates(), today=st.dates())
def test_a_waiver_touches_only_what_failed(results: list[Result], until: dt.date, today: dt.date) -> None:
    waiver = Waiver("a.b", "why", until)
    for before in results:
        after = waived(before, waiver, today)
        if before.status not in (Status.FAIL, Status.ERROR):
            assert after == before
        elif until >= today:
            assert after == replace(before, status=Status.WAIVED, waiver=waiver)
        else:
            assert after.status is before.status
            assert after.findings[: len(before.findings)] == before.findings
            assert len(after.findings) == len(before.findings) + 1


@given(RESULTS)
def test_a_tier_is_proven_by_its_own_required_passes_only(results: list[Result]) -> None:
    tiers = proven_tiers(results)
    assert set(tiers) == {it.tier for it in results}
    for tier, proven in tiers.items():
        required = [it for it in results if it.tier == tier and it.required]
        if proven:
            assert any(it.status in (Status.PASS, Status.WARN) for it in required)
            assert not any(it.status in (Status.FAIL, Status.ERROR) for it in required)
            assert not any(it.skip is Skip.NO_GPU for it in required)
    if exit_code(results) == PASSED:
        assert any(tiers.values())


# --------------------------------------------------------------------------- profiles


def selected(name: str = "runtime", **more: Any) -> tuple[set[str], set[str]]:
    checks = {
        it.id: it
        for it in (
            tiny("base"),
            tiny("one", needs=("tiny.base",)),
            tiny("gpu", tier=2, gpus=1, needs=("tiny.one",)),
            tiny("gpus", tier=3, gpus=2, needs=("tiny.gpu",)),
        )
    }
    wanted, required = profile.select(checks, profile.PROFILES[name], **more)
    assert [it.id for it in wanted] == [it for it in checks if it in {one.id for one in wanted}], "their order is kept"
    return {it.id.partition(".")[2] for it in wanted}, {it.partition(".")[2] for it in required}


T1, T2, T3 = {"base", "one"}, {"gpu"}, {"gpus"}


@pytest.mark.parametrize(
    ("name", "options", "wanted", "required"),
    [
        ("runtime", {}, T1 | T2 | T3, T1),
        ("runtime", {"gpus": "none"}, T1, T1),
        ("runtime", {"gpus": "all"}, T1 | T2 | T3, T1 | T2),
        ("runtime", {"gpus": "1"}, T1 | T2 | T3, T1 | T2),
        ("runtime", {"gpus": "2"}, T1 | T2 | T3, T1 | T2 | T3),
        ("cpu", {}, T1, T1),
        ("cpu", {"gpus": "1"}, T1 | T2, T1 | T2),
        ("gpu", {}, T1 | T2 | T3, T1 | T2),
        ("gpu", {"gpus": "none"}, T1 | T2, T1 | T2),
        ("multi-gpu", {}, T1 | T2 | T3, T1 | T2 | T3),
        ("runtime", {"only": ["tiny.one"]}, {"base", "one"}, {"one"}),
        ("runtime", {"only": ["tiny.gpu"]}, {"base", "one", "gpu"}, {"gpu"}),
        ("runtime", {"only": ["*.o*", "tiny.gpu"]}, {"base", "one", "gpu"}, {"one"}),
        ("runtime", {"only": ["tiny.gpu"], "gpus": "none"}, set(), set()),
    ],
)
def test_selections(name: str, options: dict[str, Any], wanted: set[str], required: set[str]) -> None:
    assert selected(name, **options) == (wanted, required)


def test_every_profile_requires_something_of_the_real_checks() -> None:
    checks = check.load()
    for one in profile.PROFILES.values():
        wanted, required = profile.select(checks, one)
        assert required, one.name
        assert required <= {it.id for it in wanted}
        assert {need for it in wanted for need in it.needs} <= {it.id for it in wanted}


# --------------------------------------------------------------------------- old Pythons


@pytest.mark.parametrize(
    "path", sorted((ROOT / "validate").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_module_can_be_read_by_python_3_9(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 9))
    for node in ast.walk(tree):
        # feature_version lets these through: they are no syntax, but fail when the module is loaded.
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("dataclass"):
            assert not {keyword.arg for keyword in node.keywords} & {"kw_only", "slots"}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
            assert "strict" not in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"
