"""Programs, run to their end and measured: time, processor, and the memory of all their processes at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.errors import CellFailedError, ToolError
from builder.program import tail

SAMPLE_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a program took and printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    out: str


def timed(
    argv: Sequence[str | Path],
    *,
    what: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Spent:
    """Run a program to its end; raises CellFailedError with its last lines if it fails.

    Interrupted, it ends the program and all it started first.
    """
    # Files, not pipes: nobody has to read while the clock runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=dict(env) if env is not None else None, cwd=cwd, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            raise ToolError(f"the program {argv[0]} is missing", why=f"it is needed for: {what}") from None
        with _ended(process), _sampled(process.pid) as peak:
            # Not process.wait(): this tells what the program and all it waited for have used.
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise CellFailedError(
                f"{what}: exit code {process.returncode}",
                where=shown(argv),
                why=tail(err.read() or out.read(), lines=25),
            )
        # The kernel's own figure is exact, but of the largest process only; the samples see all, and may miss a moment.
        largest = usage.ru_maxrss * 1024
        return Spent(
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=max(largest, *peak),
            out=out.read(),
        )


def shown(argv: Sequence[str | Path], *, places: Mapping[Path, str] | None = None) -> str:
    """Return a command as one would type it, with names such as $WORK for directories of this machine."""
    text = shlex.join(str(part) for part in argv)
    for path, name in sorted((places or {}).items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(path), name)
    return text


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        # Its group outlives it if something in it does not listen: a shell's background jobs, for instance.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@contextlib.contextmanager
def _sampled(pid: int) -> Iterator[list[int]]:
    """Yield a list whose one value is, after the end, the most memory the process and its descendants held at once."""
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(SAMPLE_S):
            peak[0] = max(peak[0], sum(map(_resident, _tree(pid))))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text().split():
                    yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):  # it has just ended
        return 0
