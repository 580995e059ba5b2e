"""A service of an image, as a check has started it on the loopback: asked, told to end, and judged alike for all."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

from validate.check import Probe

ANSWER_S = 60.0
STOP_S = 20.0
MOST = 1 << 20
"""Bytes of an answer, or of what it prints, that are read."""


@dataclass
class Service:
    """A running service, and what was given to it."""

    process: subprocess.Popen[bytes]
    port: int
    token: str
    log: str
    """Path of what it prints."""
    environment: Mapping[str, str]
    scheme: str
    """What stands before a token: "Bearer"."""

    def printed(self) -> str:
        """Return what it printed."""
        with open(self.log, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read(MOST)

    def ask(self, method: str, path: str, body: str = "", *, token: Optional[str] = None) -> Tuple[int, str]:
        """Return status and text of an answer; raises OSError or HTTPException if there is none."""
        headers = {"Authorization": f"{self.scheme} {token}"} if token is not None else {}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)) as connection:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(MOST).decode("utf-8", "replace")


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def judge_token(probe: Probe, service: Service) -> None:
    """Judge that the token that was given is in no log and in no list of processes."""
    if service.token in service.printed():
        probe.fail("the service prints the token that it was given", why="logs are read by more people", mode="F62")
    for number in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
        with contextlib.suppress(OSError), open(f"/proc/{number}/cmdline", "rb") as words:  # noqa: PTH123
            if service.token.encode() in words.read(MOST):
                probe.fail("the token stands in the list of processes", why=f"of process {number}", mode="F62")


def judge_health(probe: Probe, service: Service, program: str, *, without: str) -> None:
    """Judge what the image's health check says of it; the variable `without` holds what it must not need."""
    done = subprocess.run(
        [program, "--health"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={name: value for name, value in service.environment.items() if name != without},
        timeout=ANSWER_S,
        check=False,
    )
    if done.returncode != 0:
        probe.fail("the health check fails though the service answers", why=(done.stdout + done.stderr).strip()[-300:])


def told_to_end(service: Service) -> float:
    """Send it SIGTERM; returns when, for `judge_end`."""
    service.process.send_signal(signal.SIGTERM)
    return time.monotonic()


def judge_end(probe: Probe, service: Service, *, since: float) -> None:
    """Judge that it has ended by itself, and well, soon after it was told to."""
    try:
        code = service.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        probe.fail(f"the service does not end within {STOP_S:.0f} s of SIGTERM", why="the engine would kill it")
        return
    probe.metric("stop_s", time.monotonic() - since, "s", better="lower")
    if code != 0:
        probe.fail(f"the service ends with {code} after SIGTERM, not with 0", why=service.printed().strip()[-300:])
