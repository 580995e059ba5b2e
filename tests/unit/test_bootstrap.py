"""One run of mmdebstrap, without mmdebstrap: what is checked before, and what after."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import bootstrap, program
from builder.baselock import BaseLock
from builder.debian import Deb
from builder.errors import CellFailedError, LockError, SourceError, ToolError
from builder.store import Store
from builder.tar import Entry, file_entry

DEB = Deb(name="g++", version="1:2-3", architecture="amd64", filename="pool/g.deb", sha256="0" * 64, size=1)
LOCK = BaseLock(suite="bookworm", architecture="amd64", packages=("g++",), epoch=1, debs=(DEB,))
STATUS = "Package: {}\nStatus: {}\nVersion: 1:2-3\nArchitecture: amd64\n\n"


@pytest.fixture
def try_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    store = Store.open(tmp_path / "home")
    return lambda: bootstrap.bootstrap(LOCK, store, tmp_path, tell=lambda _: None)


def test_packages_must_have_been_fetched(try_it: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/true")
    with pytest.raises(SourceError, match="bookworm-amd64: 1 packages of the base are not in the store"):
        try_it()


def test_a_missing_mmdebstrap_is_explained(try_it: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ToolError) as caught:
        try_it()
    (problem,) = caught.value.problems
    assert problem.what == "the program mmdebstrap is missing"
    assert "apt-get install mmdebstrap" in problem.tries


def test_a_foreign_architecture_is_refused(try_it: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(ToolError, match="cannot make a base for amd64"):
        try_it()


def test_a_package_is_what_its_fields_say(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "Package: g++\nVersion: 1:2-3\nArchitecture: amd64\nDescription: x\n y\n"
    monkeypatch.setattr(program, "run", lambda *_, **__: fields)
    stanza = bootstrap._stanza(DEB, Path("/x/1.deb"))
    assert stanza == f"{fields}Filename: ./1.deb\nSize: 1\nSHA256: {DEB.sha256}\n"
    monkeypatch.setattr(program, "run", lambda *_, **__: fields.replace("1:2-3", "1:2-4"))
    with pytest.raises(LockError, match=r"locked as g\+\+ 1:2-3 amd64 is g\+\+ 1:2-4 amd64"):
        bootstrap._stanza(DEB, Path("/x/1.deb"))


def installed(text: str) -> dict[str, Entry]:
    return {"var/lib/dpkg/status": file_entry("var/lib/dpkg/status", text.encode())}


def test_exactly_what_is_locked_must_be_installed() -> None:
    good = STATUS.format("g++", "install ok installed")
    bootstrap.require_locked(LOCK, installed(good + STATUS.format("gone", "deinstall ok config-files")))
    with pytest.raises(CellFailedError) as caught:
        bootstrap.require_locked(LOCK, installed(STATUS.format("gcc", "install ok installed")))
    (problem,) = caught.value.problems
    assert problem.where == "base bookworm-amd64"
    assert problem.why == "not locked: gcc 1:2-3 amd64; not installed: g++ 1:2-3 amd64"
