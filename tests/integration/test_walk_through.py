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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors
import pytest

from builder.project import Project
from tests.integration.conftest import ROOT
from tests.support.docker_registry import free_port

PAGE = ROOT / "docs" / "publishing.md"
HOST = "127.0.0.1:5000"
CELLS = ("2.13.0-cpu-runtime", "2.13.0-cpu-devel", "2.13.0-cpu-ssh")
TIME_S = 1500

pytestmark = [pytest.mark.engine, pytest.mark.network, pytest.mark.debian, pytest.mark.timeout(1800)]


def commands(text: str) -> list[str]:
    """Return what is typed in a page's section of that name."""
    section = text.partition("\n## A walk-through\n")[2].partition("\n## ")[0]
    return [
        line[2:]
        for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


@dataclass(frozen=True)
class Walked:
    code: int
    said: str
    build: Path
    """What stood where the page says `build/`."""
    digests: Mapping[str, str]
    """By the moving tag: what the container engine has under it."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, client: docker.DockerClient) -> Walked:
    build = tmp_path_factory.mktemp("build")
    host = f"127.0.0.1:{free_port()}"
    lines = [line.replace(HOST, host).replace("build/", f"{build}/") for line in commands(PAGE.read_text())]
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
    digests = {cell: client.images.get(f"torchyard:{cell}").id or "" for cell in CELLS if process.returncode == 0}
    return Walked(process.returncode, said, build, digests)


def test_the_walk_through(walked: Walked) -> None:
    said = walked.said
    assert walked.code == 0, said[-6000:]
    assert said.count("T1 without a GPU: proven") == len(CELLS)
    assert said.count("proven, signed") == len(CELLS)
    assert "\n2.13.0+cpu\n" in said
    # At the start of its line: a build names a step so, where one was needed.
    assert said.count("\nobserved = declared  torch 2.13.0+cpu") == len(CELLS)
    assert "all fetched and hashed" in said
    statement = json.loads((walked.build / "provenance.json").read_text().splitlines()[0])
    assert statement["payloadType"] == "application/vnd.in-toto+json"
    assert "sha256:" in said.partition("$ torchyard reproduce")[2]


@pytest.mark.parametrize("tag", CELLS)
def test_what_its_validations_proved(walked: Walked, tag: str) -> None:
    assert walked.code == 0, "it did not come to its end"
    (cell,) = Project(ROOT / "matrix.yaml").select([tag])
    directory = ROOT / "reports" / cell.id
    report = json.loads((directory / "report.json").read_text("utf-8"))
    assert report["subject"]["digest"] == walked.digests[tag]
    assert report["verdict"]["tiers"] == {"1": True}
    assert {it["tier"] for it in report["results"]} == {1}
    results = {it["id"]: it for it in report["results"] if it["skip"] != "not_this_kind"}
    assert {it["status"] for it in results.values()} <= {"pass", "warn"}
    assert len(results) > 14
    assert results["run.declared"]["status"] == "pass"
    assert results["run.user"]["evidence"]["uid"] == 12345
    of_its_kind = {"devel": {"env.cpp-extension"}, "ssh": {"svc.sshd", "sec.sshd"}}.get(cell.variant_name, set())
    assert {name for name in results if name.startswith(("env.", "svc."))} <= of_its_kind <= set(results)
    assert len(list(directory.iterdir())) > 1, "in other forms, too"
