"""Running the command line as a user does, and looking at what it leaves in the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from builder.project import Project
from tests.support.index_server import IndexServer
from tests.support.wheels import Universe, universe

ROOT = Path(__file__).parents[2]


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


def torchyard(*arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 900) -> Ran:
    done = subprocess.run(
        command(*arguments), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True,
        timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@dataclass
class Tiny:
    """A project of cells made of tiny wheels on a loopback index, and the shipped bases."""

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

    def run(self, *arguments: str, timeout_s: float = 600) -> Ran:
        return torchyard(*arguments, cwd=self.root, env=self.env, timeout_s=timeout_s)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Tiny]:
    with IndexServer() as server:
        environment = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": server.url("default"),
            "PIP_FIND_LINKS": "",
            "PIP_EXTRA_INDEX_URL": "",
            "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        }
        yield Tiny(root=tmp_path, server=server, env=environment)
