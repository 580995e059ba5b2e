"""Checks → results: each check in a process of its own with a deadline; a crash, a hang, a segfault is a result.

What does not measure runs two at a time. A check whose need failed is skipped and says so: a report shows the first
cause and not all that follows from it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from validate import explain
from validate.check import Check, Request
from validate.child import CODE
from validate.driver import Driver
from validate.verdict import Blame, Finding, Metric, Result, Skip, Status, finding_of, waived
from validate.waivers import Waiver

FOREIGN_UID = 12345
"""A user without an entry in /etc/passwd, in group 0: what OpenShift gives a container."""
_HEAD, _TAIL = 16 << 10, 48 << 10
"""Bytes kept of what a check prints: the first cause stands at the beginning, the last words at the end."""
_MOST_SEEN = 8 << 20
"""Bytes of what a check may report."""
_LAST = 600
"""Characters of what a check printed at last, that its finding shows; of lines, whole ones."""
_TRY_QUIETER = "run it again where less else runs; if it still does not end, the output says where every thread waits"
_GRACE_S = 3.0
"""For the traceback of every thread after the deadline, before the end by force."""

OnResult = Callable[[Result], None]


def run(
    checks: Sequence[Check],
    request: Request,
    *,
    root: str,
    driver: Driver,
    required: Set[str],
    on_result: OnResult,
    budget_s: Optional[float] = None,
    foreign_user: bool = False,
    elsewhere: Mapping[str, Result] = MappingProxyType({}),
    waivers: Mapping[str, Waiver] = MappingProxyType({}),
    today: Optional[dt.date] = None,
    prelude: str = "",
) -> List[Result]:
    """Run the checks and return their results, in the order of `checks`.

    `root` is where `validate` is imported from: a directory or a zip. `foreign_user` says that this process already is
    a user without an entry in /etc/passwd; `elsewhere` are results of checks that such a process ran. `waivers` are by
    check, and `today` decides which of them are over; without it none is applied. `prelude` is Python that runs in each
    check's process before the check: with it the tests make environments in which a check must fail.
    """
    end = None if budget_s is None else time.monotonic() + budget_s
    results: Dict[str, Result] = {}
    todo = list(checks)
    running: Dict[Future[Result], Tuple[Check, float]] = {}
    """Each with the seconds it was given."""

    def finished(result: Result) -> None:
        result.required = result.id in required
        if today is not None and result.id in waivers:
            result = waived(result, waivers[result.id], today)
        results[result.id] = result
        on_result(result)

    with ThreadPoolExecutor(2) as pool:
        while todo or running:
            for one in list(todo):
                if any(need not in results for need in one.needs if _among(need, checks)):
                    continue
                reason = _cannot_run(one, results, driver, foreign_user=foreign_user)
                if one.id in elsewhere and (reason is None or reason[0] is Skip.NEEDS_OTHER_USER):
                    todo.remove(one)
                    finished(elsewhere[one.id])
                    continue
                if reason is None and end is not None and time.monotonic() > end:
                    reason = Skip.BUDGET, f"the run's {budget_s:.0f} s were used up"
                if reason is not None:
                    todo.remove(one)
                    finished(_skipped(one, *reason))
                    continue
                alone = one.exclusive or any(other.exclusive for other, _ in running.values())
                if len(running) >= 2 or (running and alone):
                    continue
                todo.remove(one)
                left = one.deadline_s if end is None else max(1.0, min(one.deadline_s, end - time.monotonic()))
                future = pool.submit(run_one, one, request, root=root, deadline_s=left, prelude=prelude)
                running[future] = one, left
            if running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finished(_within_budget(future.result(), *running.pop(future)))
    return [results[one.id] for one in checks]


def _within_budget(result: Result, one: Check, given_s: float) -> Result:
    """Return the result; of a check that had no time because the run's was used up, that it was skipped."""
    if result.status is Status.ERROR and result.duration_s >= given_s and given_s < one.deadline_s:
        return _skipped(one, Skip.BUDGET, f"the run's time was used up {given_s:.0f} s after it began")
    return result


def _among(name: str, checks: Sequence[Check]) -> bool:
    return any(one.id == name for one in checks)


def _cannot_run(
    one: Check, results: Mapping[str, Result], driver: Driver, *, foreign_user: bool
) -> Optional[Tuple[Skip, str]]:
    """Return why a check cannot run; None if it can."""
    if one.gpus and driver.absent:
        return Skip.NO_GPU, driver.why_absent
    if one.gpus > 1 and driver.count < one.gpus:
        return Skip.NEEDS_GPUS, f"needs {one.gpus} GPUs, {driver.count} found"
    for need in one.needs:
        result = results.get(need)
        if result is None or result.status in (Status.PASS, Status.WARN):
            continue
        if result.status is Status.SKIP and result.skip is not None:
            return result.skip, f"as {need}: {result.detail}"
        # A waiver is for what it names: what needs that did not run, and is missing if it was required.
        return Skip.DEPENDENCY_FAILED, f"{need} failed" + (", and is waived" if result.waiver else "")
    if one.foreign_user and not foreign_user and os.geteuid() != 0:
        return Skip.NEEDS_OTHER_USER, f"only root can try what uid {FOREIGN_UID} could do"
    return None


def _skipped(one: Check, reason: Skip, detail: str) -> Result:
    return Result(id=one.id, title=one.title, tier=one.tier, status=Status.SKIP, skip=reason, detail=detail)


# ----------------------------------------------------------------------------------------------------
# One check


def run_one(one: Check, request: Request, *, root: str, deadline_s: float, prelude: str = "") -> Result:
    """Run one check in a process of its own and return its result, whatever becomes of the process."""
    started = time.monotonic()
    reader, writer = os.pipe()
    arguments = [one.id, str(writer), json.dumps(request.as_json())]
    identity: Dict[str, Any] = {}
    environment = dict(os.environ)
    if one.foreign_user and os.geteuid() == 0:
        # Root's; where this process already is such a user, the engine has given it the image's.
        environment.pop("HOME", None)
        identity = {"user": FOREIGN_UID, "group": 0, "extra_groups": []}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{prelude}\n{CODE}", root, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            start_new_session=True,
            cwd=request.scratch,
            env=environment,
            **identity,
        )
    except OSError as error:
        os.close(reader)
        if identity and error.errno == errno.EPERM:
            return _skipped(one, Skip.NEEDS_OTHER_USER, f"root may not become uid {FOREIGN_UID} here: no CAP_SETUID")
        if one.foreign_user and isinstance(error, PermissionError):
            return _unreadable(one, request, error, time.monotonic() - started)
        return _ended(one, [], f"its process could not be started: {error}", "", time.monotonic() - started)
    finally:
        os.close(writer)
    seen, printed, late = _follow(process, reader, started + deadline_s)
    why = ""
    if late:
        why = f"it did not end within {deadline_s:.0f} s"
    elif process.returncode < 0:
        why = f"its process died of {_signal(-process.returncode)}"
    elif process.returncode > 0:
        why = f"its process ended with exit code {process.returncode}"
    return _ended(one, _documents(seen), why, printed, time.monotonic() - started)


def _unreadable(one: Check, request: Request, error: PermissionError, duration_s: float) -> Result:
    """Return the result where another user cannot even start Python."""
    status = Status.FAIL if request.options.get("foreign_user") == "fail" else Status.WARN
    finding = Finding(
        status,
        f"uid {FOREIGN_UID} cannot start {sys.executable}",
        why=str(error),
        remedy="keep Python and its packages out of /root, and readable for everyone: chmod -R a+rX",
        mode="F25",
        blame=Blame.IMAGE,
    )
    return Result(one.id, one.title, one.tier, status, findings=[finding], duration_s=duration_s)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _follow(process: subprocess.Popen[bytes], reader: int, end: float) -> Tuple[bytes, str, bool]:
    """Read until the process ends; return what it reported, what it printed, and whether the deadline ended it."""
    assert process.stdout is not None
    seen, printed = bytearray(), _Ends()
    late = killed = False
    with selectors.DefaultSelector() as selector:
        for descriptor in (reader, process.stdout.fileno()):
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)

        def drain(timeout: float) -> bool:
            some = False
            for key, _ in selector.select(timeout):
                try:
                    content = os.read(key.fd, 1 << 16)
                except OSError:
                    content = b""
                if not content:
                    selector.unregister(key.fd)
                    continue
                some = True
                if key.fd != reader:
                    printed.add(content)
                elif len(seen) < _MOST_SEEN:
                    seen.extend(content)
            return some

        while process.poll() is None:
            now = time.monotonic()
            if now > end + _GRACE_S and not killed:
                killed = True
                _kill(process, signal.SIGKILL)
            elif now > end and not late:
                late = True
                # faulthandler prints where every thread is.
                _kill(process, signal.SIGTERM)
            if selector.get_map():
                drain(0.05)
            else:
                time.sleep(0.01)
        # What it started must not go on beside the next check, nor hold our pipes open.
        _kill(process, signal.SIGKILL)
        # One that left its group and prints for ever is not waited for.
        last = time.monotonic() + _GRACE_S
        while selector.get_map() and drain(0.2) and time.monotonic() < last:
            pass
    process.stdout.close()
    os.close(reader)
    return bytes(seen), printed.text(), late


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class _Ends:
    """The beginning and the end of a text that may be endless."""

    def __init__(self) -> None:
        self._head, self._tail, self._dropped = bytearray(), bytearray(), 0

    def add(self, content: bytes) -> None:
        """Append."""
        room = _HEAD - len(self._head)
        if room > 0:
            self._head += content[:room]
            content = content[room:]
        self._tail += content
        if len(self._tail) > 2 * _TAIL:
            self._dropped += len(self._tail) - _TAIL
            del self._tail[:-_TAIL]

    def text(self) -> str:
        """Return it, with a note of what was left out."""
        gap = f"\n[... {self._dropped} bytes ...]\n".encode() if self._dropped else b""
        return (bytes(self._head) + gap + bytes(self._tail)).decode("utf-8", "replace")


def _documents(seen: bytes) -> List[Mapping[str, Any]]:
    """Return what was reported; a last line that was cut off is dropped."""
    documents: List[Mapping[str, Any]] = []
    for line in seen.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            documents.append(document)
    return documents


def _ended(one: Check, documents: Sequence[Mapping[str, Any]], why: str, printed: str, duration_s: float) -> Result:
    """Make the result of what a process reported, what it printed and how it ended (`why`; empty: as it should)."""
    result = Result(id=one.id, title=one.title, tier=one.tier, status=Status.PASS, duration_s=duration_s)
    whole = False
    for document in documents:
        if "metric" in document:
            result.metrics[document["metric"]] = Metric(document["value"], document["unit"], document["better"])
        elif "evidence" in document:
            result.evidence.update(document["evidence"])
        elif "finding" in document:
            result.findings.append(finding_of(document["finding"]))
        elif "skip" in document:
            result.status, result.skip, result.detail = Status.SKIP, Skip(document["skip"]), document["detail"]
        elif "detail" in document:
            result.detail = document["detail"]
        elif "raised" in document:
            what = document["raised"]
            result.status = Status.ERROR if document["ours"] else Status.FAIL
            result.findings.append(_recognised(what, printed, harness=document["ours"]))
        whole = whole or "end" in document
    if not whole:
        late = why.startswith("it did not end")
        result.status = Status.ERROR if late else Status.FAIL
        what, remedy = f"{one.id} broke off: {why or 'its process ended early'}", _TRY_QUIETER if late else ""
        result.findings.append(_recognised(what, printed, remedy=remedy))
    elif result.status is not Status.ERROR:
        worst = {finding.status for finding in result.findings}
        # What was found before a check gave up counts more than that it gave up.
        passed = (Status.FAIL, Status.WARN) if result.status is Status.PASS else (Status.FAIL,)
        result.status = next((it for it in passed if it in worst), result.status)
    if result.status not in (Status.PASS, Status.SKIP):
        result.output = printed
    return result


def _recognised(what: str, printed: str, *, harness: bool = False, remedy: str = "") -> Finding:
    """Return the finding for something that broke: with cause and remedy if the message is a known one."""
    if harness:
        return Finding(Status.FAIL, what, why="the check itself is wrong: please report it", blame=Blame.HARNESS)
    for known in explain.matches(f"{what}\n{printed}"):
        return Finding(
            Status.FAIL, what, why=known.cause, remedy=known.remedy, mode=known.mode, blame=Blame(known.blame)
        )
    last = printed.strip()
    if len(last) > _LAST:
        last = last[-_LAST:].partition("\n")[2] or last[-_LAST:]
    return Finding(Status.FAIL, what, why=last, remedy=remedy)
