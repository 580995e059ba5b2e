"""Real torch through a real engine: the CPU cell every time, one CUDA cell where the disk allows."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import docker
import pytest

from builder.engines.docker import DockerEngine
from builder.project import Project
from tests.integration.conftest import ROOT, torchyard

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

CPU = "torch2.13.0-cpu-py3.11-bookworm-runtime"
CUDA = "torch2.15.0-cu132-cudnn9.26.0.51-py3.11-bookworm-runtime"
CUDA_NEEDS_GB = 30


@pytest.fixture(scope="module")
def cpu_digest() -> str:
    ran = torchyard("build", CPU, "--rebuild", "--json")
    assert ran.code == 0, ran.err
    (document,) = ran.document
    assert document["proven"] is True
    return str(document["digest"])


@pytest.fixture(scope="module")
def cpu_tag() -> str:
    (cell,) = Project(ROOT / "matrix.yaml").select([CPU])
    return cell.tags[0]


def run(client: docker.DockerClient, image: str, code: str, *, user: str | None = None) -> str:
    output: bytes = client.containers.run(image, ["python", "-c", code], remove=True, network_mode="none", user=user)
    return output.decode().strip()


def test_the_cpu_cell_runs_and_is_what_it_says(client: docker.DockerClient, cpu_digest: str, cpu_tag: str) -> None:
    image = client.images.get(cpu_tag)
    assert image.id == cpu_digest
    declared = json.loads((ROOT / "images" / CPU / "image.json").read_text("utf-8"))
    configuration = image.attrs["Config"]
    assert configuration["User"] == declared["config"]["user"]
    assert configuration["Labels"].items() >= declared["config"]["labels"].items()
    assert dict(entry.split("=", 1) for entry in configuration["Env"]).items() >= declared["config"]["env"].items()
    assert run(client, cpu_tag, "import torch; print(torch.__version__, torch.version.cuda)") == "2.13.0+cpu None"
    inside = run(client, cpu_tag, f"print(open({'/usr/local/share/torchyard/image.json'!r}).read())")
    assert json.loads(inside) == declared


def test_the_cpu_cell_is_the_same_image_when_built_again(cpu_digest: str, tmp_path: Path) -> None:
    # Elsewhere, as somebody else would: another directory, umask, time zone and language.
    for name in ("matrix.yaml", "images", "templates"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    before = os.umask(0o077)
    try:
        ran = torchyard(
            "build",
            CPU,
            "--rebuild",
            "--json",
            cwd=tmp_path,
            env={"TZ": "Asia/Tokyo", "LANG": "C", "PYTHONPATH": str(ROOT)},
        )
    finally:
        os.umask(before)
    assert ran.code == 0, ran.err
    assert ran.document[0]["digest"] == cpu_digest


def test_compile_works_for_an_arbitrary_user(client: docker.DockerClient, cpu_digest: str) -> None:
    code = "import torch; print(torch.compile(lambda x: (x + 1).sum())(torch.ones(8)).item())"
    assert run(client, cpu_digest, code, user="12345:0") == "16.0"


def test_pip_can_install_more(client: docker.DockerClient, cpu_digest: str, tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys; d = pathlib.Path('/tmp/p'); d.mkdir();"
        "(d / 'pyproject.toml').write_text('[project]\\nname=\"more\"\\nversion=\"1\"\\n');"
        "(d / 'more.py').write_text('x = 1\\n');"
        "subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-build-isolation', '--no-index', '/tmp/p'],"
        " check=True, stdout=sys.stderr); import importlib; importlib.invalidate_caches(); import more; print(more.x)"
    )
    assert run(client, cpu_digest, code) == "1"


@pytest.mark.timeout(1800)
def test_a_cuda_cell(client: docker.DockerClient, capsys: pytest.CaptureFixture[str]) -> None:
    if not (os.environ.get("CI") or os.environ.get("TORCHYARD_TEST_CUDA")):
        pytest.skip("takes 3 GB of downloads and minutes: set TORCHYARD_TEST_CUDA=1 (CI does it always)")
    free_gb = shutil.disk_usage(DockerEngine().disk or "/").free / 1e9
    if free_gb < CUDA_NEEDS_GB:
        message = f"NO CUDA CELL WAS BUILT: {free_gb:.0f} GB are free, {CUDA_NEEDS_GB} are needed"
        with capsys.disabled():
            sys.stderr.write(f"\n{'!' * 80}\n{message}\n{'!' * 80}\n")
        pytest.skip(message)
    (cell,) = Project(ROOT / "matrix.yaml").select([CUDA])
    ran = torchyard("build", CUDA, "--rebuild", "--json", timeout_s=1700)
    try:
        assert ran.code == 0, ran.err
        (document,) = ran.document
        assert document["proven"] is True
        code = "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
        assert run(client, document["digest"], code) == "2.15.0+cu132 13.2 92600"
    finally:
        DockerEngine().untag(cell.tags)
