"""The whole line through real engines, with wheels of a few hundred bytes: what is proven gets tags, all else none."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import docker
import docker.errors
import pytest

from builder import layout
from builder.engines.docker import UNPROVEN, DockerEngine
from builder.project import Project
from tests.integration.conftest import ENGINES, NO_ENGINE, PROOF, Tiny, command, environment, names, remove
from tests.support.wheels import FakeWheel, torch_wheel, universe

pytestmark = [pytest.mark.engine, pytest.mark.debian, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = "torchyard-test-tiny"
ONE = {"torch": "2.8.0", "cuda": "12.8"}


@pytest.fixture(autouse=True)
def _no_leftovers(client: docker.DockerClient) -> Iterator[None]:
    remove(client, REPOSITORY)
    yield
    remove(client, REPOSITORY)


def tags(client: docker.DockerClient) -> set[str]:
    return names(client, REPOSITORY)


def unproven(client: docker.DockerClient, project: Project) -> set[str]:
    """Return the names of the project's images that were left between load and proof."""
    return names(client, UNPROVEN) & {f"{UNPROVEN}:{cell.id}" for cell in project.cells}


# --------------------------------------------------------------------------- both engines


def test_stock_override_and_explicit_index(tiny: Tiny, client: docker.DockerClient, engine: str) -> None:
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
    tiny.lock_and_render()
    ran = tiny.run("build", "--all", "--keep", "--json", *ENGINES[engine])
    assert ran.code == 0, ran.err
    built = {document["id"]: document for document in ran.document}
    assert [cell.id for cell in project.cells] == list(built)
    for cell in project.cells:
        document = built[cell.id]
        assert document["proven"] is True
        assert document["in_engine"] is True
        assert document["engine"] == engine
        assert document["proof"] == PROOF[engine]
        assert document["size_bytes"] > 0
        assert document["seconds"] > 0
        for tag in cell.tags:
            assert client.images.get(tag).id == document["digest"], "a tag points to the manifest that was proven"
    override = next(cell for cell in project.cells if not cell.cudnn_is_stock)
    said = client.containers.run(
        override.tags[0], ["python", "-c", "import torch; print(torch.backends.cudnn.version())"], remove=True
    )
    assert said.decode().strip() == "91600"
    assert not unproven(client, project)


def test_an_image_that_lies_gets_no_tag_and_stops_nobody(tiny: Tiny, client: docker.DockerClient, engine: str) -> None:
    project = tiny.write(repository=REPOSITORY, include=[{"torch": "2.9.1", "cuda": "12.8"}, ONE])
    liar, honest = project.cells
    _serve_liar(tiny, project)
    tiny.serve(universe(honest))
    tiny.lock_and_render()
    ran = tiny.run("build", "--all", "--json", *ENGINES[engine])
    assert ran.code == 1, ran.err
    by_id = {document["id"]: document for document in ran.document}
    assert by_id[honest.id]["proven"] is True
    assert by_id[liar.id]["proven"] is False
    said = "\n".join(problem["what"] for problem in by_id[liar.id]["error"])
    assert "torch.version.cuda is 12.6" in said
    assert "torch.__version__ is 2.9.1+cu126" in said
    assert not tags(client) & set(liar.tags)
    assert set(honest.tags) <= tags(client)
    assert not unproven(client, project)


def test_a_cell_built_again_is_reused_and_its_former_image_makes_room(
    tiny: Tiny, client: docker.DockerClient, engine: str
) -> None:
    tiny.locked(repository=REPOSITORY, include=[ONE])
    build = ("build", "--all", "--json", *ENGINES[engine])
    (first,) = tiny.run(*build).document
    (again,) = tiny.run(*build).document
    assert first["reused"] is False
    assert again["reused"] is True
    assert again["digest"] == first["digest"]
    assert again["in_engine"] is True
    changed = {"runtime": {"description": "another", "packages": ["numpy"]}}
    (cell,) = tiny.write(repository=REPOSITORY, include=[ONE], variants=changed).cells
    assert tiny.run("render").code == 0
    (other,) = tiny.run(*build).document
    assert other["reused"] is False
    assert client.images.get(cell.tags[0]).id == other["digest"] != first["digest"]
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(first["digest"])


def test_a_proven_image_survives_a_later_failure(tiny: Tiny, client: docker.DockerClient, engine: str) -> None:
    (cell,) = tiny.locked(repository=REPOSITORY, include=[ONE]).cells
    (document,) = tiny.run("build", cell.id, "--json", *ENGINES[engine]).document
    runner = DockerEngine()
    try:
        # What a failed proof of the same bytes does: builds are reproducible, so it is the same digest.
        runner.discard(document["digest"])
        assert set(cell.tags) <= tags(client)
        client.images.get(cell.tags[0]).tag(REPOSITORY, "mine")
        runner.untag(cell.tags)
        assert tags(client) == {f"{REPOSITORY}:mine"}, "a name that the user gave stays"
    finally:
        runner.client.close()


def test_elsewhere_it_is_the_same_image(
    tiny: Tiny, client: docker.DockerClient, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In another directory, under another umask, time zone and language, and out of a store that made nothing yet."""
    (cell,) = tiny.locked(repository=REPOSITORY, include=[ONE]).cells
    elsewhere = replace(tiny, root=tmp_path_factory.mktemp("elsewhere"))
    for name in ("matrix.yaml", "images"):
        source = tiny.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, elsewhere.root / name)
    shutil.copytree(tiny.root / "home", elsewhere.root / "home", copy_function=os.link)
    (here,) = tiny.run("build", cell.id, "--json", *ENGINES[engine]).document
    client.images.get(here["digest"]).tag(REPOSITORY, "here")
    before = os.umask(0o077)
    try:
        ran = elsewhere.run(
            "build", cell.id, "--json", *ENGINES[engine],
            env={"TORCHYARD_HOME": str(elsewhere.root / "home"), "TZ": "Asia/Tokyo", "LANG": "C"},
        )  # fmt: skip
    finally:
        os.umask(before)
    assert ran.code == 0, ran.err
    (there,) = ran.document
    assert there["reused"] is False
    assert there["digest"] == here["digest"]


@pytest.mark.parametrize(
    ("engine", "line", "pause_s", "number", "code"),
    [
        ("docker", "RUN", 0.5, signal.SIGINT, 130),
        ("docker", "RUN", 0.5, signal.SIGKILL, -9),
        ("oci", "layer 1", 0.5, signal.SIGINT, 130),
        ("oci", "layer 1", 0.5, signal.SIGKILL, -9),
        ("oci", "load into", 0.2, signal.SIGTERM, 130),
        ("oci", "prove in", 0.1, signal.SIGKILL, -9),
    ],
)
def test_an_interrupted_build_is_taken_up_again(
    tiny: Tiny, client: docker.DockerClient, *, engine: str, line: str, pause_s: float, number: int, code: int
) -> None:
    project = tiny.locked(repository=REPOSITORY, include=[ONE])
    (cell,) = project.cells
    build = ("build", cell.id, *ENGINES[engine])
    with subprocess.Popen(
        command(*build), cwd=tiny.root, env={**environment(), **tiny.env}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if line in said:
                break
        time.sleep(pause_s)
        process.send_signal(number)
        rest = process.stderr.read()
        # Dropping what BuildKit kept takes long on a disk that is busy.
        assert process.wait(timeout=240) == code, rest
    assert "Traceback" not in rest
    assert not tags(client)
    ran = tiny.run(*build, "--json")
    assert ran.code == 0, ran.err
    assert set(cell.tags) <= tags(client)
    assert not unproven(client, project)


# --------------------------------------------------------------------------- BuildKit


def test_a_failing_step_shows_its_own_last_lines(tiny: Tiny, client: docker.DockerClient) -> None:
    cell_id = _with_uninstallable_wheel(tiny)
    ran = tiny.run("build", cell_id, *ENGINES["docker"])
    assert ran.code == 1
    assert "a build step failed" in ran.err
    assert "triton" in ran.err
    assert len(ran.err.splitlines()) < 60, "the step's own last lines, not a wall"
    assert "Traceback" not in ran.err
    assert not tags(client)


# --------------------------------------------------------------------------- without a container engine


def test_a_wheel_that_cannot_be_installed_is_named(tiny: Tiny) -> None:
    cell_id = _with_uninstallable_wheel(tiny)
    ran = tiny.run("build", cell_id, env=NO_ENGINE)
    assert ran.code == 11
    assert "triton" in ran.err
    assert "WHEEL" in ran.err
    assert "Traceback" not in ran.err


def test_a_build_needs_no_container_engine_and_says_what_it_proved(tiny: Tiny, client: docker.DockerClient) -> None:
    (cell,) = tiny.locked(repository=REPOSITORY, include=[ONE]).cells
    ran = tiny.run("build", cell.id, "--json", env=NO_ENGINE)
    assert ran.code == 0, ran.err
    (document,) = ran.document
    assert (document["proven"], document["proof"], document["in_engine"]) == (True, ["bytes"], False)
    assert document["facts"]["torch"] == "2.8.0+cu128"
    assert re.search(r"Proven by the bytes: versions of torch.*Not proven: that it runs; --load", ran.err)
    assert tiny.run("build", cell.id).code == 0
    assert not tags(client), "neither does it use one that is there"
    assert tiny.run("load", cell.id, env=NO_ENGINE).code == 8
    loaded = tiny.run("load", cell.id, "--json")
    assert loaded.code == 0, loaded.err
    assert "Not proven" not in loaded.err
    (after,) = loaded.document
    assert (after["proof"], after["in_engine"]) == (["bytes", "container"], True)
    assert after["digest"] == document["digest"]
    assert tags(client) == set(cell.tags)


def test_what_was_built_before_takes_no_time(tiny: Tiny) -> None:
    (cell,) = tiny.locked(repository=REPOSITORY, include=[ONE]).cells
    assert tiny.run("build", cell.id, env=NO_ENGINE).code == 0
    took_s: list[float] = []
    for _ in range(3):  # other programs of this machine may be in the way, but not each time
        started = time.monotonic()
        assert tiny.run("matrix").code == 0
        start_of_python_s = time.monotonic() - started
        started = time.monotonic()
        (again,) = tiny.run("build", cell.id, "--json", env=NO_ENGINE).document
        took_s.append(time.monotonic() - started - start_of_python_s)
        assert again["reused"] is True
        if again["seconds"] < 0.5 and took_s[-1] < 1.5:
            return
    pytest.fail(f"it took {took_s} s")


def test_an_image_that_lies_is_refused_by_its_bytes(tiny: Tiny) -> None:
    project = tiny.write(repository=REPOSITORY, include=[{"torch": "2.9.1", "cuda": "12.8"}])
    (cell,) = project.cells
    _serve_liar(tiny, project)
    tiny.lock_and_render()
    output = tiny.root / "image.tar"
    for verb in (("build", cell.id), ("export", cell.id, "-o", str(output))):
        ran = tiny.run(*verb, env=NO_ENGINE)
        assert ran.code == 1, ran.err
        assert "torch.version.cuda is 12.6" in ran.err
        assert "torch.__version__ is 2.9.1+cu126" in ran.err
        assert "Traceback" not in ran.err
    assert not output.exists()


def test_an_export_runs_elsewhere(tiny: Tiny, client: docker.DockerClient, tmp_path: Path) -> None:
    (cell,) = tiny.locked(repository=REPOSITORY, include=[ONE]).cells
    output = tmp_path / "out" / "image.tar"
    ran = tiny.run("export", cell.id, "-o", str(output), "--json", env=NO_ENGINE)
    assert ran.code == 0, ran.err
    (document,) = ran.document
    for more in ((), ("--compression", "zstd")):
        directory = tmp_path / f"layout{len(more)}"
        ran = tiny.run("export", cell.id, "--format", "layout", "-o", str(directory), *more, "--json", env=NO_ENGINE)
        assert ran.code == 0, ran.err
        read = layout.read(directory)
        assert read is not None
        assert read.manifest.digest == ran.document[0]["digest"]
        assert (read.manifest.digest == document["digest"]) is not bool(more)
    assert not tags(client)
    loaded = subprocess.run(["docker", "load", "-q", "-i", output], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert tags(client) == set(cell.tags)
    assert client.images.get(cell.tags[0]).id == document["digest"]
    code = "import os, torch; print(torch.__version__, os.getuid())"
    said = client.containers.run(cell.tags[0], ["python", "-c", code], remove=True, user="4321:0")
    assert said.decode().strip() == "2.8.0+cu128 4321"


# --------------------------------------------------------------------------- wheels that are not as they should be


def _serve_liar(tiny: Tiny, project: Project) -> None:
    """Serve all that the project's first cell needs, with a torch of another CUDA than its version says."""
    one = universe(project.cells[0])
    lying = torch_wheel("2.9.1", reports="2.9.1+cu126", cuda="12.6", requires=_requires(one.default))
    tiny.server.add("default", *(wheel for wheel in one.default if wheel.project != "torch"), lying)


def _with_uninstallable_wheel(tiny: Tiny) -> str:
    """Make a project of a cell with a triton that no installer takes; returns the cell's id."""
    (cell,) = tiny.write(repository=REPOSITORY, include=[ONE]).cells
    one = universe(cell)
    triton = next(wheel for wheel in one.default if wheel.project == "triton")
    tiny.server.add("default", *(wheel for wheel in one.default if wheel is not triton), _uninstallable(triton))
    tiny.lock_and_render()
    return cell.id


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
