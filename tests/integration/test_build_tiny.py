"""The whole line through a real engine, with wheels of a few hundred bytes: what is proven gets tags, all else none."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import docker
import pytest

from builder.engines.docker import UNPROVEN, DockerEngine
from tests.integration.conftest import Tiny, command
from tests.support.wheels import FakeWheel, torch_wheel, universe

pytestmark = [pytest.mark.engine, pytest.mark.debian, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = "torchyard-test-tiny"


@pytest.fixture(autouse=True)
def _no_leftovers(client: docker.DockerClient) -> Iterator[None]:
    _remove(client)
    yield
    _remove(client)


def _remove(client: docker.DockerClient) -> None:
    for image in client.images.list(name=REPOSITORY):
        for tag in image.tags:
            client.images.remove(tag, force=True)


def tags(client: docker.DockerClient) -> set[str]:
    return {tag for image in client.images.list(name=REPOSITORY) for tag in image.tags}


def unproven(client: docker.DockerClient) -> set[str]:
    return {tag for image in client.images.list(name=UNPROVEN) for tag in image.tags}


def test_stock_override_and_explicit_index(tiny: Tiny, client: docker.DockerClient) -> None:
    project = tiny.write(
        repository=REPOSITORY,
        include=[
            {"torch": "2.8.0", "cuda": "12.8"},
            {"torch": "2.8.0", "cuda": "12.8", "cudnn": "9.16.0.29"},
            {"torch": "2.7.1", "cuda": "11.8"},
        ],
        indexes=[
            {
                "name": "pytorch-cu118",
                "url": tiny.server.url("pytorch-cu118"),
                "packages": ["torch"],
                "when": {"cuda": "11.8"},
            }
        ],
    )
    tiny.serve_cells(project)
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    ran = tiny.run("build", "--all", "--keep", "--json")
    assert ran.code == 0, ran.err
    built = {document["id"]: document for document in ran.document}
    assert [cell.id for cell in project.cells] == list(built)
    for cell in project.cells:
        document = built[cell.id]
        assert document["proven"] is True
        assert document["engine"] == "docker"
        assert document["size_bytes"] > 0
        assert document["seconds"] > 0
        for tag in cell.tags:
            assert client.images.get(tag).id == document["digest"], "a tag points to the manifest that was proven"
    override = next(cell for cell in project.cells if not cell.cudnn_is_stock)
    said = client.containers.run(
        override.tags[0], ["python", "-c", "import torch; print(torch.backends.cudnn.version())"], remove=True
    )
    assert said.decode().strip() == "91600"
    assert not unproven(client)


def test_an_image_that_lies_gets_no_tag_and_stops_nobody(tiny: Tiny, client: docker.DockerClient) -> None:
    project = tiny.write(
        repository=REPOSITORY,
        include=[{"torch": "2.9.1", "cuda": "12.8"}, {"torch": "2.8.0", "cuda": "12.8"}],
    )
    liar, honest = project.cells
    one = universe(liar)
    lying = torch_wheel("2.9.1", reports="2.9.1+cu126", cuda="12.6", requires=_requires(one.default))
    tiny.server.add("default", *(wheel for wheel in one.default if wheel.project != "torch"), lying)
    tiny.serve(universe(honest))
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    ran = tiny.run("build", "--all", "--json")
    assert ran.code == 1, ran.err
    by_id = {document["id"]: document for document in ran.document}
    assert by_id[honest.id]["proven"] is True
    assert by_id[liar.id]["proven"] is False
    said = "\n".join(problem["what"] for problem in by_id[liar.id]["error"])
    assert "torch.version.cuda is 12.6" in said
    assert "torch.__version__ is 2.9.1+cu126" in said
    assert not tags(client) & set(liar.tags)
    assert set(honest.tags) <= tags(client)
    assert not unproven(client)


def test_a_cell_built_again_is_reused_and_its_former_image_makes_room(tiny: Tiny, client: docker.DockerClient) -> None:
    one = {"torch": "2.8.0", "cuda": "12.8"}
    project = tiny.write(repository=REPOSITORY, include=[one])
    tiny.serve_cells(project)
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    (first,) = tiny.run("build", "--all", "--json").document
    (again,) = tiny.run("build", "--all", "--json").document
    assert first["reused"] is False
    assert again["reused"] is True
    assert again["digest"] == first["digest"]
    changed = {"runtime": {"description": "another", "packages": ["numpy"]}}
    (cell,) = tiny.write(repository=REPOSITORY, include=[one], variants=changed).cells
    assert tiny.run("render").code == 0
    (other,) = tiny.run("build", "--all", "--json").document
    assert other["reused"] is False
    assert client.images.get(cell.tags[0]).id == other["digest"] != first["digest"]
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(first["digest"])


def test_a_proven_image_survives_a_later_failure(tiny: Tiny, client: docker.DockerClient) -> None:
    project = tiny.write(repository=REPOSITORY, include=[{"torch": "2.8.0", "cuda": "12.8"}])
    tiny.serve_cells(project)
    (cell,) = project.cells
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    (document,) = tiny.run("build", cell.id, "--json").document
    engine = DockerEngine()
    try:
        # What a failed proof of the same bytes does: builds are reproducible, so it is the same digest.
        engine.discard(document["digest"])
        assert set(cell.tags) <= tags(client)
        client.images.get(cell.tags[0]).tag(REPOSITORY, "mine")
        engine.untag(cell.tags)
        assert tags(client) == {f"{REPOSITORY}:mine"}, "a name that the user gave stays"
    finally:
        engine.client.close()


def test_a_failing_step_shows_its_own_last_lines(tiny: Tiny, client: docker.DockerClient) -> None:
    project = tiny.write(repository=REPOSITORY, include=[{"torch": "2.8.0", "cuda": "12.8"}])
    (cell,) = project.cells
    one = universe(cell)
    triton = next(wheel for wheel in one.default if wheel.project == "triton")
    tiny.server.add("default", *(wheel for wheel in one.default if wheel is not triton), _uninstallable(triton))
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    ran = tiny.run("build", cell.id)
    assert ran.code == 1
    assert "a build step failed" in ran.err
    assert "triton" in ran.err
    assert len(ran.err.splitlines()) < 60, "the step's own last lines, not a wall"
    assert "Traceback" not in ran.err
    assert not tags(client)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_build_is_taken_up_again(
    tiny: Tiny, client: docker.DockerClient, number: int, code: int
) -> None:
    project = tiny.write(repository=REPOSITORY, include=[{"torch": "2.8.0", "cuda": "12.8"}])
    tiny.serve_cells(project)
    (cell,) = project.cells
    assert tiny.run("lock").code == 0
    assert tiny.run("render").code == 0
    with subprocess.Popen(
        command("build", cell.id), cwd=tiny.root, env={**os.environ, **tiny.env}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "RUN" in line:
                break
        time.sleep(0.5)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == code, rest
    assert "Traceback" not in rest
    assert not tags(client)
    ran = tiny.run("build", cell.id, "--json")
    assert ran.code == 0, ran.err
    assert set(cell.tags) <= tags(client)
    assert not unproven(client)


def _requires(wheels: tuple[FakeWheel, ...]) -> list[str]:
    """Return the requirements of the torch among the wheels."""
    torch = next(wheel for wheel in wheels if wheel.project == "torch")
    lines = torch.metadata.decode().splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]


def _uninstallable(wheel: FakeWheel) -> FakeWheel:
    """Return a wheel that indexes and resolvers accept and an installer does not: its WHEEL file is missing."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(wheel.content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith("/WHEEL"):
                target.writestr(entry, source.read(entry))
    return replace(wheel, content=buffer.getvalue())
