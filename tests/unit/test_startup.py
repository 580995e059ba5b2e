"""What a command costs before it does anything: the command line starts without what only some commands need."""

from __future__ import annotations

import subprocess
import sys

# What speaks to indexes and registries, reads their pages, or drives a container engine: together half a second.
SLOW = ("requests", "urllib3", "docker", "pypi_simple", "bs4")


def test_the_command_line_starts_without_what_transfers_and_runs() -> None:
    code = f"import sys, builder.cli; print(*(name for name in {SLOW!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
