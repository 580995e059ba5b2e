"""Running the command line as a user does, and looking at what it leaves in the engine."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import yaml

from builder import base as bases
from builder.engines.docker import DockerEngine
from builder.matrix import Cell
from builder.project import Project
from builder.store import Store
from tests.support.bases import without_compilers
from tests.support.index_server import IndexServer
from tests.support.wheels import Universe, universe

ROOT = Path(__file__).parents[2]
ENGINES: Mapping[str, tuple[str, ...]] = {"oci": ("--load",), "docker": ("--engine", "docker")}
"""What to ask of `build` so that an image made by the engine runs in the container engine."""
PROOF = {"oci": ["bytes", "container"], "docker": ["container"]}
NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
CPU = "torch2.13.0-cpu-py3.11-bookworm-runtime"
NOTEBOOK = "torch2.13.0-cpu-py3.11-bookworm-notebook"
FAMILY = os.environ.get("TORCHYARD_TEST_FAMILY", "torch2.13.0-cpu-*")
"""Whose variants are started: those without a GPU, or others that fit on the disk, `torch2.8.0-cu128-*`."""
CUDA = "torch2.15.0-cu132-cudnn9.26.0.51-py3.11-bookworm-runtime"
CUDA_NEEDS_GB = 15
REAL_REPOSITORY = os.environ.get("TORCHYARD_TEST_REPOSITORY", "torchyard-test-real")
"""Whose images go when the tests have ended: runs beside each other have one each."""


def torch_of_family() -> str:
    """Return the version of torch that the variants which are started have, as torch itself says it."""
    first, *_ = Project(ROOT / "matrix.yaml").select([f"{FAMILY}-notebook"])
    return first.torch_local


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "builder", *arguments]


def environment() -> dict[str, str]:
    """Return the environment in which the code beside these tests is found from any directory."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def torchyard(*arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 900) -> Ran:
    done = subprocess.run(
        command(*arguments), cwd=cwd, env={**environment(), **(env or {})}, capture_output=True, text=True,
        timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """Each of the engines that make images, in turn."""
    return str(request.param)


def names(client: docker.DockerClient, repository: str) -> set[str]:
    """Return every name of the repository's images."""
    return {tag for image in client.images.list(name=repository) for tag in image.tags}


def remove(client: docker.DockerClient, repository: str) -> None:
    """Take every image of the repository out of the engine, as far as it has no other name."""
    for name in names(client, repository):
        with contextlib.suppress(docker.errors.ImageNotFound):
            client.images.remove(name, force=True)


# --------------------------------------------------------------------------- stores


def new_store(root: Path, *cells: Cell, wheels: Iterable[str] = (), base: bases.BaseImage | None = None) -> None:
    """Make a store with the cells' bases and some wheels of the user's store, and nothing that was made of them.

    With `base`, that stands for the base of each.
    """
    project, user, store = Project(ROOT / "matrix.yaml"), Store.open(), Store.open(root)
    blobs = set(wheels)
    for cell in cells:
        lock = project.base_lock(cell)
        assert lock is not None
        system = project.system_lock(cell)
        for one in (lock, *([system] if system else [])):
            bases.fetch(one, user)
            blobs |= {deb.sha256 for deb in one.debs}
        made = [base or bases.make(lock, user), *([bases.make(lock, user, system=system)] if system else [])]
        for layout in {one.layout for one in made}:
            shutil.copytree(layout, store.root / "layouts" / layout.name, copy_function=_link, dirs_exist_ok=True)
    for sha256 in blobs:
        _link(user.path(sha256), store.path(sha256))


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


# --------------------------------------------------------------------------- tiny cells


@dataclass
class Tiny:
    """A project of cells made of tiny wheels on a loopback index, and the shipped locks of bases."""

    root: Path
    server: IndexServer
    env: dict[str, str]

    def write(self, *, repository: str, include: Sequence[Mapping[str, Any]], **more: Any) -> Project:
        shipped = yaml.safe_load((ROOT / "matrix.yaml").read_text("utf-8"))
        first, *rest = include
        content = {
            "version": 1,
            "repository": repository,
            "exclude_newer": shipped["exclude_newer"],
            "bases": shipped["bases"],
            "variants": {"runtime": {"description": "a test", "packages": ["numpy"]}},
            "axes": {
                **{axis: [first[axis]] for axis in ("torch", "cuda")},
                "cudnn": [first.get("cudnn", "stock")],
                "base": [first.get("base", "bookworm")],
                "variant": ["runtime"],
            },
            "include": rest,
            **more,
        }
        (self.root / "matrix.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
        bases = self.root / "images" / "bases"
        bases.mkdir(parents=True, exist_ok=True)
        for lock in (ROOT / "images" / "bases").iterdir():
            (bases / lock.name).write_bytes(lock.read_bytes())
        return Project(self.root / "matrix.yaml")

    def serve(self, *universes: Universe) -> None:
        for one in universes:
            self.server.add("default", *one.default)
            for name, wheels in one.explicit.items():
                self.server.add(name, *wheels)

    def serve_cells(self, project: Project) -> None:
        self.serve(*(universe(cell) for cell in project.cells))

    def locked(self, *, repository: str, include: Sequence[Mapping[str, Any]], **more: Any) -> Project:
        """Write a project whose index has all that it needs, lock and render it."""
        project = self.write(repository=repository, include=include, **more)
        self.serve_cells(project)
        self.lock_and_render()
        return project

    def lock_and_render(self) -> None:
        for verb in ("lock", "render"):
            ran = self.run(verb)
            assert ran.code == 0, ran.err

    def run(self, *arguments: str, timeout_s: float = 600, env: Mapping[str, str] | None = None) -> Ran:
        return torchyard(*arguments, cwd=self.root, env={**self.env, **(env or {})}, timeout_s=timeout_s)


def tiny_project(root: Path, server: IndexServer) -> Tiny:
    """Return a project without cells yet, whose store is `home`, and which knows no index but that of the server."""
    environment = {
        "TORCHYARD_HOME": str(root / "home"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": server.url("default"),
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "UV_CACHE_DIR": str(root / "uv-cache"),
    }
    return Tiny(root=root, server=server, env=environment)


def bookworm() -> Cell:
    """Return a cell of the shipped matrix on bookworm, without system packages."""
    project = Project(ROOT / "matrix.yaml")
    return next(cell for cell in project.cells if cell.base_name == "bookworm" and project.system_lock(cell) is None)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> bases.BaseImage:
    """The shipped bookworm base without its compilers, which no tiny cell calls."""
    lock, user = Project(ROOT / "matrix.yaml").base_lock(bookworm()), Store.open()
    assert lock is not None
    bases.fetch(lock, user)
    return without_compilers(Store.open(tmp_path_factory.mktemp("small")), lock, bases.make(lock, user))


@pytest.fixture
def tiny(tmp_path: Path, small_base: bases.BaseImage) -> Iterator[Tiny]:
    """A project without cells yet, and a store of its own: what an earlier test made is not there."""
    new_store(tmp_path / "home", bookworm(), base=small_base)
    with IndexServer() as server:
        yield tiny_project(tmp_path, server)


# --------------------------------------------------------------------------- real cells


@dataclass(frozen=True)
class Real:
    """The project as it is, but for the repository: images that the user made are not touched."""

    root: Path

    @property
    def project(self) -> Project:
        return Project(self.root / "matrix.yaml")

    def cell(self, name: str) -> Cell:
        (cell,) = self.project.select([name])
        return cell

    def run(self, *arguments: str, timeout_s: float = 900, env: Mapping[str, str] | None = None) -> Ran:
        return torchyard(*arguments, cwd=self.root, env=env, timeout_s=timeout_s)

    def copy(self, root: Path) -> Real:
        root.mkdir(exist_ok=True)
        for name in ("matrix.yaml", "images", "templates"):
            source = self.root / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        return Real(root=root)


@dataclass(frozen=True)
class Built:
    """A cell that was built by one of the engines and proven in a container."""

    name: str
    """In the container engine; the cell's own tags may have moved on to another engine's image."""
    document: Mapping[str, Any]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, client: docker.DockerClient) -> Iterator[Real]:
    real = Real(root=ROOT).copy(tmp_path_factory.mktemp("real"))
    matrix = real.root / "matrix.yaml"
    text = matrix.read_text("utf-8")
    assert text.count("\nrepository: torchyard\n") == 1
    matrix.write_text(text.replace("\nrepository: torchyard\n", f"\nrepository: {REAL_REPOSITORY}\n"), "utf-8")
    ran = real.run("render")
    assert ran.code == 0, ran.err
    remove(client, REAL_REPOSITORY)
    yield real
    remove(client, REAL_REPOSITORY)


@pytest.fixture(scope="session")
def cpu_oci(real: Real, client: docker.DockerClient) -> Built:
    return _built(real, client, "oci", CPU, "--rebuild")


@pytest.fixture(scope="session")
def cpu_docker(real: Real, client: docker.DockerClient) -> Built:
    return _built(real, client, "docker", CPU, "--rebuild")


@pytest.fixture(scope="session")
def variant_image(real: Real) -> Callable[[str], str]:
    """Return a function from a variant's name to its cell's image, proven and in the engine; built once a run."""

    @functools.cache
    def image(variant: str) -> str:
        pattern = f"{FAMILY}-{variant}"
        cells = fnmatch.filter((cell.id for cell in Project(ROOT / "matrix.yaml").cells), pattern)
        if not cells:
            pytest.skip(f"no cell of the matrix is called {pattern}")
        ran = real.run("build", cells[0], *ENGINES["oci"], "--keep", "--json", timeout_s=1700)
        assert ran.code == 0, ran.err
        (document,) = ran.document
        assert document["proof"] == PROOF["oci"]
        return str(document["tags"][0])

    return image


@pytest.fixture(scope="session")
def cuda_oci(real: Real, request: pytest.FixtureRequest) -> Built:
    """A CUDA cell; it takes 3 GB of wheels, minutes, and the room that it is skipped for, loudly, where that lacks."""
    if not (os.environ.get("CI") or os.environ.get("TORCHYARD_TEST_CUDA")):
        pytest.skip("takes 3 GB of downloads and minutes: set TORCHYARD_TEST_CUDA=1 (CI does it always)")
    free_gb = shutil.disk_usage(DockerEngine().disk or "/").free / 1e9
    if free_gb < CUDA_NEEDS_GB:
        message = f"NO CUDA CELL WAS BUILT: {free_gb:.0f} GB are free, {CUDA_NEEDS_GB} are needed"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stderr.write(f"\n{'!' * 80}\n{message}\n{'!' * 80}\n")
        pytest.skip(message)
    ran = real.run("build", CUDA, "--load", "--keep", "--rebuild", "--json", timeout_s=1700)
    assert ran.code == 0, ran.err
    (document,) = ran.document
    return Built(name=real.cell(CUDA).tags[0], document=document)


@pytest.fixture(scope="session")
def notebook_docker(real: Real, client: docker.DockerClient) -> Built:
    """A variant with a program of its own and many packages; leave the tags to `notebook_oci`, which comes second."""
    return _built(real, client, "docker", NOTEBOOK)


@pytest.fixture(scope="session")
def notebook_oci(real: Real, client: docker.DockerClient, notebook_docker: Built) -> Built:
    """The same cell; if it was loaded before, for other tests, its tags only come back to it."""
    assert notebook_docker.name in names(client, REAL_REPOSITORY)
    return _built(real, client, "oci", NOTEBOOK, "--keep")


def _built(real: Real, client: docker.DockerClient, engine: str, cell: str, *options: str) -> Built:
    ran = real.run("build", cell, *ENGINES[engine], *options, "--json")
    assert ran.code == 0, ran.err
    (document,) = ran.document
    assert (document["proven"], document["engine"], document["proof"]) == (True, engine, PROOF[engine])
    for tag in real.cell(cell).tags:
        assert client.images.get(tag).id == document["digest"]
    # The other engine's image will take over the tags, and an image goes with its last name.
    name = f"{engine}-{document['tags'][0].rpartition(':')[2]}"
    client.images.get(document["digest"]).tag(REAL_REPOSITORY, name)
    return Built(name=f"{REAL_REPOSITORY}:{name}", document=document)
