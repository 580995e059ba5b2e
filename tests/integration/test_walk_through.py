"""The walk-through of docs/publishing.md, typed as it stands there: three real images, from proof to rebuild."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import docker
import docker.errors
import pytest

from tests.integration.conftest import ROOT
from tests.support.docker_registry import free_port

PAGE = ROOT / "docs" / "publishing.md"
HOST = "127.0.0.1:5000"
CELLS = ("2.13.0-cpu-runtime", "2.13.0-cpu-devel", "2.13.0-cpu-ssh")
TIME_S = 1500

pytestmark = [pytest.mark.engine, pytest.mark.network, pytest.mark.debian]


def commands(text: str) -> list[str]:
    """Return what is typed in a page's section of that name."""
    section = text.partition("\n## A walk-through\n")[2].partition("\n## ")[0]
    return [
        line[2:]
        for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_the_walk_through(tmp_path: Path, client: docker.DockerClient) -> None:
    host = f"127.0.0.1:{free_port()}"
    lines = [line.replace(HOST, host).replace("build/", f"{tmp_path}/") for line in commands(PAGE.read_text())]
    assert len(lines) > 12
    # What is typed as `torchyard` and `docker` is this code, and the engine of these tests.
    script = "\n".join([
        "set -Eeuo pipefail",
        f'torchyard() {{ {shlex.quote(sys.executable)} -m builder "$@"; }}',
        *(f"echo {shlex.quote('$ ' + line)} >&2\n{line}" for line in lines),
    ])  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIME_S)
    finally:
        # What it started in the background, and all else if it hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for cell in CELLS:
            with contextlib.suppress(docker.errors.ImageNotFound):
                client.images.remove(f"{host}/team/torchyard:{cell}", force=True)
    assert process.returncode == 0, said[-6000:]
    assert said.count("T1 without a GPU: proven") == len(CELLS)
    assert said.count("proven, signed") == len(CELLS)
    assert "\n2.13.0+cpu\n" in said
    assert said.count("observed = declared") == len(CELLS)
    assert "all fetched and hashed" in said
    statement = json.loads((tmp_path / "provenance.json").read_text().splitlines()[0])
    assert statement["payloadType"] == "application/vnd.in-toto+json"
    assert "sha256:" in said.partition("$ torchyard reproduce")[2]
