"""Other programs: found, run to their end, and explained when they fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.errors import SourceError, ToolError

_PATIENCE_S = 10


def find(name: str, *, package: str, purpose: str, tries: tuple[str, ...] = ()) -> str:
    """Return where the program `name` is; raises ToolError, saying which Debian package has it, if it is missing.

    `tries` is what else can be done then.
    """
    # Debian leaves the sbin directories out of an ordinary user's PATH.
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise ToolError(
            f"the program {name} is missing",
            why=f"torchyard needs it to {purpose}",
            tries=(f"apt-get install {package}", *tries),
        )
    return path


def tail(text: str, *, lines: int = 8) -> str:
    """Return the last lines of what a program said, without progress noise and blank ones."""
    said = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(said[-lines:])


def run(
    argv: Sequence[str | Path],
    *,
    purpose: str,
    env: Mapping[str, str] | None = None,
    inherit: tuple[int, ...] = (),
    tries: tuple[str, ...] = (),
    error: type[ToolError | SourceError] = ToolError,
) -> str:
    """Run a program to its end and return its output; raises `error` with its last lines if it fails.

    Interrupted, it ends the program and all it started first: a group of its own makes them reachable.
    """
    with subprocess.Popen(
        [os.fspath(part) for part in argv],
        env=dict(env) if env is not None else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        umask=0o022,
        process_group=0,
        pass_fds=inherit,
    ) as process:
        try:
            said, complained = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        raise error(
            f"could not {purpose}: {Path(argv[0]).name} ended with status {process.returncode}",
            why=tail(complained + said) or "it said nothing",
            tries=tries,
        )
    return said


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and its group, and wait for it: whoever clears up behind it must not meet it at work."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
