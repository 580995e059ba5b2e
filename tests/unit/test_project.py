"""A project on disk: the locks of its bases, alone and with what variants add to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import cli
from builder.baselock import BaseLock
from builder.console import Console
from builder.errors import LockError, ToolError
from builder.matrix import Cell
from builder.project import Project
from tests.support import archive
from tests.support.archive import FakeArchive

VERSIONS = {"base-files": "13", "g++": "12-1", "libc6": "2.36-9", "make": "4-1", "openssh-server": "9-1", "git": "2-1"}
NEEDS = {"g++": ["libc6"], "openssh-server": ["libc6"], "git": ["libc6"]}


def matrix(**system: list[str]) -> dict[str, Any]:
    """Return a matrix of one torch, a cell for each variant; they add these Debian packages."""
    return {
        "version": 1,
        "repository": "torchyard",
        "exclude_newer": "2026-11-15T00:00:00Z",
        "bases": {
            "b": {
                "kind": "bootstrap",
                "suite": "bookworm",
                "python": "3.11",
                "packages": ["g++"],
                "image": f"debian@sha256:{'0' * 64}",
            }
        },
        "variants": {
            "runtime": {"description": "a small one"},
            **{name: {"extends": "runtime", "description": "more", "system": debs} for name, debs in system.items()},
        },
        "axes": {
            "torch": ["2.8.0"],
            "cuda": ["12.8"],
            "cudnn": ["stock"],
            "base": ["b"],
            "variant": ["runtime", *system],
            "platform": ["linux/amd64"],
        },
    }


def project_of(root: Path, **system: list[str]) -> Project:
    (root / "matrix.yaml").write_text(json.dumps(matrix(**system)), "utf-8")
    return Project(root / "matrix.yaml")


def cell_of(project: Project, variant: str) -> Cell:
    return next(cell for cell in project.cells if cell.variant_name == variant)


@pytest.fixture
def mirror() -> Iterator[FakeArchive]:
    with archive.served(FakeArchive(dict(VERSIONS), NEEDS)) as one:
        yield one


def locked(project: Project, *variants: str, again: bool = False) -> list[str]:
    """Lock the bases as `torchyard lock` does, of some cells or all, and return the names of what was written."""
    cells = [cell_of(project, variant) for variant in variants] or project.cells
    made = cli._base_locks(cli.Context(project, Console(quiet=True)), cells, again=again)
    for path, lock in made.items():
        project.write_base_lock(path, lock)
    return [path.name for path in made]


def read(project: Project, variant: str) -> BaseLock:
    lock = project.system_lock(cell_of(project, variant))
    assert lock is not None
    return lock


def test_a_variant_that_adds_packages_has_a_lock_beside_the_bases(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"], devel=["g++"], shell=["openssh-server", "g++"])
    assert locked(project) == ["b-amd64.toml", "b-amd64-ssh.toml", "b-amd64-shell.toml"]
    base = project.base_lock(cell_of(project, "ssh"))
    assert base is not None
    assert {deb.name for deb in read(project, "ssh").debs} - {deb.name for deb in base.debs} == {"openssh-server"}
    assert read(project, "shell") == read(project, "ssh"), "one layer for both"
    for variant in ("runtime", "devel"):
        assert project.system_lock(cell_of(project, variant)) is None, "the base has all that it asks for"


def test_nothing_is_asked_where_all_is_locked(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"])
    locked(project)
    mirror.asked.clear()
    assert locked(project) == []
    assert mirror.asked == []


def test_a_new_variant_leaves_the_base_and_the_others_as_they_are(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"])
    locked(project)
    before = read(project, "ssh"), project.base_lock(project.cells[0])
    mirror.versions["openssh-server"] = "9-2"
    mirror.epoch += 1
    project = project_of(tmp_path, ssh=["openssh-server"], devel=["git", "make"])
    assert "b-amd64-devel.toml" in locked(project)
    assert (read(project, "ssh"), project.base_lock(project.cells[0])) == before
    assert read(project, "devel").epoch == mirror.epoch


@pytest.mark.parametrize("again", [False, True])
def test_all_are_locked_together_if_the_base_cannot_stay(tmp_path: Path, mirror: FakeArchive, *, again: bool) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"])
    locked(project)
    mirror.versions["libc6"] = "2.36-10"
    project = project_of(tmp_path, ssh=["openssh-server"], devel=["git"])
    names = ["b-amd64.toml", "b-amd64-ssh.toml", "b-amd64-devel.toml"]
    assert locked(project, "devel", again=again) == names, "also what other cells stand on"
    versions = {
        deb.version
        for lock in (project.base_lock(project.cells[0]), read(project, "ssh"), read(project, "devel"))
        if lock is not None
        for deb in lock.debs
        if deb.name == "libc6"
    }
    assert versions == {"2.36-10"}


def test_a_lock_from_before_the_matrix_or_the_base_changed_is_stale(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"])
    locked(project)
    with pytest.raises(LockError, match="the base b for ssh is stale") as caught:
        read(project_of(tmp_path, ssh=["openssh-server", "git"]), "ssh")
    assert caught.value.problems[0].why == "the matrix asks for other packages since it was made: git"
    project = project_of(tmp_path, ssh=["openssh-server"])
    base = project.base_lock(project.cells[0])
    assert base is not None
    newer = replace(base, debs=tuple(archive.deb(deb.name, "99") for deb in base.debs))
    project.write_base_lock(project.base_lock_path(project.cells[0]), newer)
    with pytest.raises(LockError, match="the base b for ssh is stale") as caught:
        read(project, "ssh")
    (problem,) = caught.value.problems
    assert problem.why == "the base's own lock has other packages or versions since it was made: base-files, g++, libc6"
    assert problem.tries == ("torchyard lock",)
    assert problem.where == str(project.system_lock_path(cell_of(project, "ssh")))
    mirror.versions |= {"base-files": "99", "g++": "99", "libc6": "99"}
    assert locked(project) == ["b-amd64.toml", "b-amd64-ssh.toml"]
    assert project.base_lock(project.cells[0]) == newer
    assert not read(project, "ssh").lacking(newer)


def check(project: Project) -> Result:
    return CliRunner().invoke(cli.cli, ["lock", "--check", "-m", str(project.matrix_path), "*-ssh"])


def test_lock_check_reads_them_too(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"])
    locked(project)
    path = project.system_lock_path(cell_of(project, "ssh"))
    assert path.name not in check(project).stderr
    path.write_text(path.read_text("utf-8").replace("9-1", "9-2"), "utf-8")
    result = check(project)
    assert result.exit_code == 4
    assert f"{path}\n" in result.stderr
    path.unlink()
    assert "the base b for ssh is not locked" in check(project).stderr


def test_nothing_is_written_if_one_of_them_cannot_be_locked(tmp_path: Path, mirror: FakeArchive) -> None:
    project = project_of(tmp_path, ssh=["openssh-server"], devel=["gti"])
    with pytest.raises(ToolError, match="gti"):
        locked(project)
    assert not project.images.exists()
