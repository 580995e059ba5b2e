"""Other programs: every failure says what was wanted and what the program said."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from builder import program
from builder.errors import SourceError, ToolError


def test_output_is_returned() -> None:
    assert program.run(["sh", "-c", "umask; echo $A"], purpose="talk", env={"A": "b"}) == "0022\nb\n"


def test_a_failing_program_shows_its_last_lines() -> None:
    script = "for n in $(seq 30); do echo line $n >&2; done; exit 3"
    with pytest.raises(ToolError) as caught:
        program.run(["sh", "-c", script], purpose="count")
    (problem,) = caught.value.problems
    assert problem.what == "could not count: sh ended with status 3"
    assert problem.why.splitlines()[-1] == "line 30"
    assert len(problem.why.splitlines()) == 8


def test_the_caller_says_what_a_failure_is() -> None:
    with pytest.raises(SourceError, match="could not read: false ended with status 1") as caught:
        program.run(["false"], purpose="read", tries=("again",), error=SourceError)
    (problem,) = caught.value.problems
    assert (problem.why, problem.tries) == ("it said nothing", ("again",))


def test_a_missing_program_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ToolError) as caught:
        program.find("frobnicate", package="frob", purpose="frob")
    (problem,) = caught.value.problems
    assert problem.what == "the program frobnicate is missing"
    assert "apt-get install frob" in problem.tries


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
def test_interrupted_it_ends_all_that_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    opened = []

    def interrupted(_: object) -> None:
        opened.append(alive.open("rb"))  # returns when the grandchild has started
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    monkeypatch.setattr(program, "_PATIENCE_S", 0.1)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        program.run(["sh", "-c", f"{trap} (sleep 60) > {alive} & wait"], purpose="sleep")
    with opened[0] as pipe:
        assert pipe.read() == b""  # its end comes when the last process that may write is gone
    assert time.monotonic() - began < 30
