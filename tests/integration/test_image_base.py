"""A base that is a registry image, by digest: pulled from a real registry on loopback, built upon, and proven."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

import docker
import pytest
import requests

from builder import base as bases
from builder import export, layout
from builder.engines.docker import DockerEngine
from builder.layout import Layer
from builder.matrix import Cell
from builder.project import Project
from builder.store import Store
from tests.integration.conftest import ENGINES, NO_ENGINE, PROOF, Tiny, remove

pytestmark = [pytest.mark.engine, pytest.mark.debian, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = "torchyard-test-image-base"
BASE_CONFIG = {
    "Env": [f"PATH={bases.PATH}", "OF_THE_BASE=kept as it is: $HOME, a=b", "LANG=of the base"],
    "Labels": {"of.the.base": "kept", "torchyard.torch": "of the base"},
    "User": "nobody",
    "WorkingDir": "/srv",
    "Entrypoint": ["/bin/false"],
    "Cmd": ["of the base"],
    "ExposedPorts": {"8080/tcp": {}},
    "Volumes": {"/srv/volume": {}},
    "StopSignal": "SIGQUIT",
}
"""With something of everything that an image built upon it takes over or replaces."""


@pytest.fixture(autouse=True)
def _no_leftovers(client: docker.DockerClient) -> Iterator[None]:
    remove(client, REPOSITORY)
    yield
    remove(client, REPOSITORY)


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


def _push_base(client: docker.DockerClient, registry: str, tiny: Tiny) -> str:
    """Push the files of the shipped bookworm base with BASE_CONFIG; returns the image's reference by digest."""
    project = Project(tiny.root / "matrix.yaml")
    lock = project.base_lock(project.cells[0])
    assert lock is not None
    store = Store.open(tiny.root / "home")
    base = bases.make(lock, store)
    image = layout.assemble(
        store,
        architecture="amd64",
        config=BASE_CONFIG,
        epoch=base.epoch,
        layers=(Layer(blob=base.layer, diff_id=base.diff_id),),
    )
    name = f"{registry}/python:bookworm"
    engine = DockerEngine()
    try:
        engine.load(export.archive(store, image, tags=[name]))
    finally:
        engine.client.close()
    for line in client.images.push(name, stream=True, decode=True):
        assert "error" not in line, line
    client.images.remove(name, force=True)
    # What a machine that never made this base does not have either.
    for blob in (image.manifest, image.config, base.layer):
        store.path(blob.sha256).unlink()
    return f"{registry}/python@{image.manifest.digest}"


def _cell_on(tiny: Tiny, reference: str) -> Cell:
    (cell,) = tiny.locked(
        repository=REPOSITORY,
        include=[{"torch": "2.8.0", "cuda": "12.8", "base": "ours"}],
        bases={"ours": {"kind": "image", "image": reference, "python": "3.11", "init": "/usr/bin/tini"}},
    ).cells
    dockerfile = (tiny.root / "images" / cell.id / "Dockerfile").read_text("utf-8")
    assert f"FROM {reference} AS base" in dockerfile
    return cell


@pytest.fixture
def cell(tiny: Tiny, client: docker.DockerClient, registry: str) -> Cell:
    """A cell whose base is in the registry and nowhere else."""
    tiny.write(repository=REPOSITORY, include=[{"torch": "2.8.0", "cuda": "12.8"}])
    return _cell_on(tiny, _push_base(client, registry, tiny))


def _configuration(client: docker.DockerClient, name: str) -> Mapping[str, Any]:
    attributes = client.images.get(name).attrs
    # ArgsEscaped is BuildKit's own, and means something on Windows only.
    config = {key: value for key, value in attributes["Config"].items() if value and key != "ArgsEscaped"}
    return config | {"Env": dict(line.split("=", 1) for line in config["Env"])}


def test_a_registry_image_as_base(tiny: Tiny, client: docker.DockerClient, cell: Cell) -> None:
    configurations = {}
    for engine, arguments in ENGINES.items():
        ran = tiny.run("build", cell.id, "--json", *arguments)
        assert ran.code == 0, ran.err
        (document,) = ran.document
        assert document["proof"] == PROOF[engine]
        (again,) = tiny.run("build", cell.id, "--rebuild", "--json", *arguments).document
        assert again["digest"] == document["digest"]
        code = "import os, torch; print(os.getuid(), os.environ['OF_THE_BASE'])"
        said = client.containers.run(cell.tags[0], ["python", "-c", code], remove=True)
        assert said.decode().strip() == "1000 kept as it is: $HOME, a=b"
        configurations[engine] = _configuration(client, cell.tags[0])
    config = configurations["oci"]
    assert config == configurations["docker"]
    for taken_over in ("ExposedPorts", "Volumes", "StopSignal"):
        assert config[taken_over] == BASE_CONFIG[taken_over]
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == ("1000:0", "/workspace", ["python"])
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "/opt/venv/bin/torchyard-start"]
    assert config["Env"]["LANG"] == "C.UTF-8"
    assert config["Labels"]["of.the.base"] == "kept"
    assert config["Labels"]["torchyard.torch"] == "2.8.0+cu128"


def test_it_is_pulled_without_a_container_engine(tiny: Tiny, cell: Cell) -> None:
    ran = tiny.run("build", cell.id, "--json", env=NO_ENGINE)
    assert ran.code == 0, ran.err
    assert ran.document[0]["proof"] == ["bytes"]


def test_a_digest_the_registry_lacks_is_named(tiny: Tiny, registry: str, engine: str) -> None:
    cell = _cell_on(tiny, f"{registry}/python@sha256:{'0' * 64}")
    ran = tiny.run("build", cell.id, *ENGINES[engine])
    assert ran.code in {"oci": (7,), "docker": (1, 8)}[engine]
    assert "0" * 64 in ran.err
    assert "Traceback" not in ran.err
