"""Image or machine → report: the suite of `validate/` travels into it as one file, runs there, and tells what it sees.

The image may be anybody's. What it prints is data of somebody else: only whole events count, and a run that does not
come to its end is an error of its own, never a pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from builder.engines import BOX, MOST_PRINTED, Allowance, End, Found, Watcher
from builder.errors import ImpossibleError, MatrixError
from builder.render import PREFIX
from validate.bundle import bundle

PYTHONS = (f"{PREFIX}/bin/python", "python", "python3", "/opt/conda/bin/python", "/usr/local/bin/python3")
"""Where an image may have its Python: ours, what PATH says, and two that images of others forget to put there."""
OLDEST = (3, 9)
FOREIGN_USER = "12345:0"
FOREIGN_CHECK = "run.user"
"""The check that another container runs, as a user without an entry in /etc/passwd."""
BUDGET_S = 1800.0
GRACE_S = 180.0
"""What the last check may take beyond the budget; then the container is ended from outside."""
LOOK_S = 60.0
"""What a Python may take to say its version."""
_LOOK = (
    "import sys; sys.stdout.write('torchyard: Python %d.%d' % sys.version_info[:2]); import importlib.util;"
    "sys.stdout.write(' with torch\\n' if importlib.util.find_spec('torch') else '\\n')"
)
"""Said in words that Python 2 understands as well."""
_SUITE = f"{BOX}/validate.pyz"
_DECLARED = f"{BOX}/image.json"
_ELSEWHERE = f"{BOX}/elsewhere.json"
_WAIVERS = f"{BOX}/waivers.json"
MOST_WAIVERS = 1 << 20
"""Bytes of a file of waivers."""

Event = Mapping[str, Any]
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be validated, and how strictly; the words are those of the suite's own command line."""

    profile: str = "runtime"
    gpus: str = "none"
    on_skip: str = "fail"
    strict: bool = False
    only: Sequence[str] = ()
    options: Sequence[str] = ()
    budget_s: float = BUDGET_S
    waivers: bytes | None = None
    """A file of waivers, as the suite reads it; where it lies is for who runs the suite to say."""
    prelude: str = ""
    """Python for the tests of the suite, run before each check."""

    def arguments(self) -> list[str]:
        """Return the options of the suite's command line."""
        found = ["--json", "--profile", self.profile, "--gpus", self.gpus, "--on-skip", self.on_skip]
        found += ["--strict"] if self.strict else []
        for option, values in (("--only", self.only), ("--option", self.options)):
            found += [f"{option}={value}" for value in values]
        found += ["--budget", str(self.budget_s)]
        return found + ([f"--prelude={self.prelude}"] if self.prelude else [])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is about."""

    kind: str
    """"image" or "machine"."""
    name: str
    digest: str | None = None
    declared: bytes | None = None
    """The image.json it is held to; None: its own, if it has one."""


@dataclass
class _Hearing:
    """Takes the lines of a run: events among whatever else an image prints."""

    on_event: OnEvent
    report: dict[str, Any] | None = None
    results: dict[str, Event] = field(default_factory=dict)
    other: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def line(self, text: str) -> None:
        """Take one line."""
        event = _event(text)
        if event is None:
            if text.strip():
                self.other.append(text[:500])
            return
        if event["event"] == "result":
            self.results[event["id"]] = event
        elif event["event"] == "end":
            self.report = event["report"]
        self.on_event(event)

    @property
    def last(self) -> str:
        """What was printed at last besides events."""
        return "\n".join(self.other)


def _event(text: str) -> dict[str, Any] | None:
    """Return the event that a line is; None for any other line, also one that only looks like it."""
    if not text.startswith('{"event": '):
        return None
    try:
        # Text that cannot be written in UTF-8 could not be shown either.
        event: dict[str, Any] = json.loads(text)
        json.dumps(event, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    lines = event.setdefault("text", [])
    if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        return None
    good: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "result": lambda: isinstance(event.get("id"), str),
        "end": lambda: type(event["report"]["verdict"]["exit_code"]) is int,
    }
    try:
        return event if good[event["event"]]() else None
    except (LookupError, TypeError):
        return None


def image(subject: Subject, found: Found, asked: Asked, engine: Watcher, on_event: OnEvent) -> dict[str, Any]:
    """Run the suite in a container of the image and return its report.

    Raises MatrixError if the suite does not know what is asked for; ImpossibleError if it could not run there to its
    end: no Python, a Python that is too old, another architecture, a container that had to be ended.
    """
    if asked.gpus not in ("all", "none") and not (asked.gpus.isdecimal() and int(asked.gpus)):
        raise MatrixError(f"--gpus {asked.gpus}: a container is given all, none or a number above 0")
    suite = bundle()
    selected = _selected(suite, asked)
    files = {_SUITE: suite}
    arguments = [*asked.arguments(), f"--subject={json.dumps(_about(subject))}"]
    if subject.declared is not None:
        files[_DECLARED] = subject.declared
        arguments.append(f"--image-json={_DECLARED}")
    python = _python(found, engine)
    if FOREIGN_CHECK in selected:
        files[_ELSEWHERE] = json.dumps(_as_foreign_user(found, python, asked, files, engine)).encode()
        arguments.append(f"--elsewhere={_ELSEWHERE}")
    if asked.waivers is not None:
        # The one container that gives the verdict applies them, to what the other one found as well.
        files[_WAIVERS] = asked.waivers
        arguments.append(f"--waivers={_WAIVERS}")
    hearing = _Hearing(on_event)
    ended = engine.watch(
        found,
        [python, _SUITE, *arguments],
        files=files,
        allowance=Allowance(gpus=asked.gpus),
        on_line=hearing.line,
        deadline_s=asked.budget_s + GRACE_S,
    )
    return _concluded(hearing, ended.how, subject.name, asked)


def _about(subject: Subject) -> dict[str, Any]:
    return {"kind": subject.kind, "name": subject.name, "digest": subject.digest}


def _selected(suite: bytes, asked: Asked) -> frozenset[str]:
    """Return the ids of the checks that are asked for; raises MatrixError if the suite does not know the words.

    The suite is asked here, where that takes no container, and by its own command line, so that nobody else has to
    know what it knows.
    """
    with TemporaryDirectory(prefix="torchyard-") as directory:
        path = _placed(suite, Path(directory))
        command = [sys.executable, str(path), *asked.arguments(), *_waivers(asked, Path(directory)), "--list"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == MatrixError.exit_code:
        raise MatrixError(done.stderr.strip().splitlines()[-1].removeprefix("torchyard-validate: error: "))
    assert done.returncode == 0, done.stderr
    return frozenset(line.split()[1] for line in done.stdout.splitlines())


def read_waivers(path: Path) -> bytes:
    """Return the bytes of a file of waivers; raises MatrixError if there is none, or it is too large for one."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_WAIVERS + 1)
    except OSError as error:
        raise MatrixError("the waivers cannot be read", where=str(path), why=error.strerror or str(error)) from None
    if len(content) > MOST_WAIVERS:
        raise MatrixError("no file of waivers", where=str(path), why=f"it is larger than {MOST_WAIVERS} bytes")
    return content


def _waivers(asked: Asked, directory: Path) -> list[str]:
    """Write the waivers beside a suite of this machine; return the option that names them."""
    if asked.waivers is None:
        return []
    path = directory / "waivers.json"
    path.write_bytes(asked.waivers)
    return [f"--waivers={path}"]


def _placed(suite: bytes, directory: Path) -> Path:
    """Write the suite so that any user can read it: a check runs as another one."""
    path = directory / "validate.pyz"
    path.write_bytes(suite)
    path.chmod(0o644)
    directory.chmod(0o755)
    return path


def _python(found: Found, engine: Watcher) -> str:
    """Return the image's Python: the first that has torch, or else the first that is new enough."""
    without: list[str] = []
    tried: list[str] = []
    for python in PYTHONS:
        lines: deque[str] = deque(maxlen=20)
        ended = engine.watch(
            found, [python, "-c", _LOOK], files={}, allowance=Allowance(), on_line=lines.append, deadline_s=LOOK_S
        )
        said = next(
            (match for line in lines if (match := re.search(r"torchyard: Python (\d+)\.(\d+)( with torch)?", line))),
            None,
        )
        if ended.how is End.ITSELF and said is not None:
            version = int(said[1]), int(said[2])
            if version < OLDEST:
                tried.append(f"{python}: is Python {said[1]}.{said[2]}")
            elif said[3]:
                return python
            else:
                without.append(python)
        else:
            last = [line[:200] for line in lines if line.strip()][-1:]
            why = {
                End.ITSELF: " ".join(["does not say its version:", *last]),
                End.DEADLINE: f"did not say its version within {LOOK_S:.0f} s",
                End.FLOOD: "prints without end",
                End.NO_PROGRAM: "cannot be started",
            }[ended.how]
            tried.append(f"{python}: {why}")
            if ended.how in (End.DEADLINE, End.FLOOD):
                break
    if without:
        return without[0]
    raise ImpossibleError(
        "the image has no Python that could run the suite",
        where=found.reference,
        why="\n".join(tried),
        tries=(
            f"validate an image that has Python {OLDEST[0]}.{OLDEST[1]} or newer on its PATH",
            f"the image is for {found.platform}: use a machine of that kind, or qemu-user-static",
        ),
    )


def _as_foreign_user(
    found: Found, python: str, asked: Asked, files: Mapping[str, bytes], engine: Watcher
) -> dict[str, Any]:
    """Return the result of the check that wants a container of its own, or why there is none."""
    declared = [f"--image-json={_DECLARED}"] if _DECLARED in files else []
    mine = replace(asked, only=(FOREIGN_CHECK,), gpus="none", strict=False, budget_s=GRACE_S)
    hearing = _Hearing(lambda _: None)
    ended = engine.watch(
        found,
        [python, _SUITE, *mine.arguments(), *declared, "--foreign-user"],
        files=files,
        allowance=Allowance(user=FOREIGN_USER),
        on_line=hearing.line,
        deadline_s=2 * GRACE_S,
    )
    result = hearing.results.get(FOREIGN_CHECK)
    if result is not None:
        return {"result": {name: it for name, it in result.items() if name not in ("event", "text")}}
    why = {
        End.ITSELF: "the suite broke off",
        End.DEADLINE: f"it did not end within {2 * GRACE_S:.0f} s",
        End.FLOOD: "it printed without end",
        End.NO_PROGRAM: f"{python} cannot be started by that user",
    }[ended.how]
    return {"id": FOREIGN_CHECK, "broke": "\n".join(filter(None, [why, hearing.last]))}


def _concluded(hearing: _Hearing, end: End, name: str, asked: Asked) -> dict[str, Any]:
    """Return the report of a run that came to its end; raises ImpossibleError for any other."""
    if hearing.report is not None and end is End.ITSELF:
        return hearing.report
    why = {
        End.ITSELF: "the suite ended before its report",
        End.DEADLINE: f"it did not end within {asked.budget_s + GRACE_S:.0f} s",
        End.FLOOD: "it printed without end",
        End.NO_PROGRAM: "its Python is gone",
    }[end]
    done = f"{len(hearing.results)} checks were done"
    raise ImpossibleError(
        "the suite could not run there",
        where=name,
        why="\n".join(filter(None, [f"{why}; {done}", hearing.last])),
        tries=("Python 3.9 or newer must run there; --debug shows more", "raise --budget if the machine is slow"),
    )


# ----------------------------------------------------------------------------------------------------
# A machine


def machine(python: str, asked: Asked, on_event: OnEvent) -> dict[str, Any]:
    """Run the suite with a Python of this machine and return its report; raises ImpossibleError as `image` does."""
    suite = bundle()
    _selected(suite, asked)
    subject = Subject(kind="machine", name=python)
    with TemporaryDirectory(prefix="torchyard-") as directory:
        path = _placed(suite, Path(directory))
        command = [python, str(path), *asked.arguments(), f"--subject={json.dumps(_about(subject))}"]
        command += _waivers(asked, Path(directory))
        hearing = _Hearing(on_event)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ImpossibleError(
                "this Python cannot be started", where=python, why=error.strerror or str(error),
                tries=("name another: --python /path/to/python",),
            ) from error  # fmt: skip
        ended: list[End] = []

        def end(why: End) -> None:
            ended.append(why)
            _kill(process)

        timer = threading.Timer(asked.budget_s + GRACE_S, end, [End.DEADLINE])
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout as stdout:
                for line in _lines(stdout, flooded=lambda: end(End.FLOOD)):
                    hearing.line(line)
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
        return _concluded(hearing, ended[0] if ended else End.ITSELF, python, asked)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, as far as that stayed in its group; its checks end with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _lines(output: IO[bytes], *, flooded: Callable[[], None]) -> Iterator[str]:
    total = 0
    while line := output.readline(MOST_PRINTED):
        total += len(line)
        if total >= MOST_PRINTED:
            flooded()
            return
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def exit_code(codes: Sequence[int]) -> int:
    """Return the exit code of a run over several subjects: a failure is worse than a gap, that than a warning."""
    return next((code for code in (3, 1, 4, 5) if code in codes), 0 if codes else 3)
