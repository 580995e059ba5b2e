"""A base that is a registry image, by digest: pulled from a real registry on loopback, built upon, and proven."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import requests

from builder import base as bases
from builder.project import Project
from builder.store import Store
from tests.integration.conftest import ROOT, Tiny

pytestmark = [pytest.mark.engine, pytest.mark.debian, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = "torchyard-test-image-base"


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Debian's docker-registry on a free loopback port; yields its host and port."""
    directory = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (directory / "config.yml").write_text(json.dumps(configuration), "utf-8")
    try:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        reason = "docker-registry (Debian's package of that name) is not installed"
        if os.environ.get("CI"):
            pytest.fail(f"needed in CI: {reason}", pytrace=False)
        pytest.skip(reason)
    try:
        for _ in range(100):
            try:
                requests.get(f"http://127.0.0.1:{port}/v2/", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def _push_base(client: docker.DockerClient, registry: str) -> str:
    """Push the shipped bookworm base under another name; returns its reference by digest."""
    project = Project(ROOT / "matrix.yaml")
    cell = next(cell for cell in project.cells if cell.base_name == "bookworm")
    lock = project.base_lock(cell)
    assert lock is not None
    store = Store.open()
    bases.fetch(lock, store)
    made = bases.make(lock, store)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(made.layout.rglob("*")):
            if path.name == "index.json":
                # Without the name the layout has for it, the image is loaded without one.
                index = json.loads(path.read_text("utf-8"))
                for manifest in index["manifests"]:
                    manifest.pop("annotations", None)
                content = json.dumps(index).encode()
                entry = tarfile.TarInfo(str(path.relative_to(made.layout)))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                archive.add(path, str(path.relative_to(made.layout)), recursive=False)
    (image,) = client.images.load(buffer.getvalue())
    assert image.id == made.digest
    name = f"{registry}/python"
    image.tag(name, "bookworm")
    for line in client.images.push(name, "bookworm", stream=True, decode=True):
        assert "error" not in line, line
    client.images.remove(f"{name}:bookworm", force=True)
    return f"{name}@{made.digest}"


def test_a_registry_image_as_base(tiny: Tiny, client: docker.DockerClient, registry: str) -> None:
    reference = _push_base(client, registry)
    project = tiny.write(
        repository=REPOSITORY,
        include=[{"torch": "2.8.0", "cuda": "12.8", "base": "ours"}],
        bases={"ours": {"kind": "image", "image": reference, "python": "3.11", "init": "/usr/bin/tini"}},
    )
    tiny.serve_cells(project)
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    (cell,) = project.cells
    dockerfile = (project.directory(cell) / "Dockerfile").read_text("utf-8")
    assert f"FROM {reference} AS base" in dockerfile
    try:
        ran = tiny.run("build", cell.id, "--json")
        assert ran.code == 0, ran.err
        assert ran.document[0]["proven"] is True
        again = tiny.run("build", cell.id, "--rebuild", "--json")
        assert again.document[0]["digest"] == ran.document[0]["digest"]
        said = client.containers.run(cell.tags[0], ["python", "-c", "import os; print(os.getuid())"], remove=True)
        assert said.decode().strip() == "1000"
    finally:
        for tag in cell.tags:
            client.images.remove(tag, force=True)


def test_a_digest_the_registry_lacks_is_named(tiny: Tiny, registry: str, tmp_path: Path) -> None:
    missing = f"{registry}/python@sha256:{'0' * 64}"
    project = tiny.write(
        repository=REPOSITORY,
        include=[{"torch": "2.8.0", "cuda": "12.8", "base": "ours"}],
        bases={"ours": {"kind": "image", "image": missing, "python": "3.11"}},
    )
    tiny.serve_cells(project)
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    ran = tiny.run("build", project.cells[0].id)
    assert ran.code in (1, 8)
    assert "0" * 64 in ran.err
    assert "Traceback" not in ran.err
