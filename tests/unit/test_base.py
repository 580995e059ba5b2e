"""The bootstrap base, without Debian: fetched by hash, made once, always the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from builder import base, debian, tar
from builder.base import BaseLock, Deb
from builder.debian import Mirrors
from builder.errors import HashMismatchError, LockError, SourceError
from builder.store import Store
from builder.tar import Entry, Kind, file_entry

EPOCH = 1_700_000_000
MIRRORS = Mirrors(archives=("http://m.invalid/debian",), securities=("http://s.invalid/security",))


@pytest.mark.parametrize(
    "asked",
    [
        {"suite": "Bad Suite", "architecture": "amd64", "packages": ["gcc"]},
        {"suite": "bookworm", "architecture": "amd64", "packages": ["--option"]},
        {"suite": "bookworm", "architecture": "vax", "packages": ["gcc"]},
    ],
)
def test_nothing_odd_reaches_apt(asked: Mapping[str, object]) -> None:
    with pytest.raises(LockError):
        base.lock(**asked)  # type: ignore[arg-type]


def a_lock(contents: Mapping[str, bytes]) -> BaseLock:
    debs = [
        Deb(
            name=name,
            version="1:2.3-4+deb12u1~x",
            architecture="amd64",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            filename=f"pool/main/{name[0]}/{name}/{name}_2.3-4+deb12u1~x_amd64.deb",
        )
        for name, content in contents.items()
    ]
    return BaseLock(suite="bookworm", architecture="amd64", packages=("g++",), epoch=EPOCH, debs=tuple(debs))


CONTENTS = {"g++": b"one", "libc6": b"two"}
LOCK = a_lock(CONTENTS)


def test_a_new_date_alone_makes_no_new_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = debian.Resolution(debs=LOCK.debs, epoch=EPOCH + 1)
    monkeypatch.setattr(debian, "resolve", lambda **_: now)
    again = base.lock(suite="bookworm", architecture="amd64", packages=["g++", "g++"], previous=LOCK)
    assert again is LOCK
    more = base.lock(suite="bookworm", architecture="amd64", packages=["g++", "libc6"], previous=LOCK)
    assert (more.packages, more.epoch) == (("g++", "libc6"), EPOCH + 1)


# ----------------------------------------------------------------------------------------------------
# Fetching


class FakeApt:
    """Serves what a test put into `files` (address to bytes)."""

    mirrors = MIRRORS
    files: Mapping[str, bytes] = {}

    def __init__(self, directory: Path, *, architecture: str) -> None:
        pass

    def download(self, uris: Mapping[str, Path]) -> str:
        for uri, path in uris.items():
            if uri in self.files:
                path.write_bytes(self.files[uri])
        return "E: 404  Not Found\n"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    files = {f"http://m.invalid/debian/{deb.filename}": CONTENTS[deb.name] for deb in LOCK.debs}
    monkeypatch.setattr(FakeApt, "files", files)
    monkeypatch.setattr(debian, "Apt", FakeApt)
    return files


def test_fetch_brings_what_is_missing_only(store: Store, served: dict[str, bytes]) -> None:
    told: list[tuple[str, int, int]] = []
    base.fetch(LOCK, store, lambda *news: told.append(news))
    assert all(store.has(deb.sha256) for deb in LOCK.debs)
    assert [news[1:] for news in told] == [(3, 6), (6, 6)]
    served.clear()
    base.fetch(LOCK, store)


def test_other_bytes_never_enter_the_store(store: Store, served: dict[str, bytes]) -> None:
    served.update(dict.fromkeys(served, b"evil"))
    with pytest.raises(HashMismatchError, match=r"g\+\+_"):
        base.fetch(LOCK, store)
    assert list((store.root / "blobs").iterdir()) == []
    assert list((store.root / "partial").iterdir()) == []


def test_a_superseded_package_is_named(store: Store, served: dict[str, bytes]) -> None:
    served.popitem()
    with pytest.raises(SourceError) as caught:
        base.fetch(LOCK, store)
    (problem,) = caught.value.problems
    assert "1 of 2" in problem.what
    assert "libc6 1:2.3-4+deb12u1~x" in problem.what
    assert "404" in problem.why
    assert any("torchyard lock --bases" in one for one in problem.tries)
    assert store.has(LOCK.debs[0].sha256), "what came is kept"


# ----------------------------------------------------------------------------------------------------
# Making, of a tree as mmdebstrap would hand over


def a_tree() -> list[Entry]:
    status = "\n".join(
        f"Package: {deb.name}\nStatus: install ok installed\nVersion: {deb.version}\nArchitecture: {deb.architecture}\n"
        for deb in LOCK.debs
    )
    sources = b"deb http://m.invalid/debian bookworm main contrib\n"
    return [
        Entry(path="etc", kind=Kind.DIRECTORY, mode=0o755, mtime=5),
        file_entry("etc/hostname", b"here\n"),
        file_entry("etc/passwd", b"root:*:0:0:root:/root:/bin/bash\n", mtime=7),
        file_entry("usr/share/doc/apt/examples/sources.list", sources),
        file_entry("var/lib/dpkg/status", status.encode()),
    ]


# The guard of what `make` puts into an image: when this changes, RECIPE must change too.
DIGEST = "sha256:0c551cb98b50ea1b5d087a0634fae2b6d886c0bd6f71ee121b8860c72d4e4ab1"


def test_made_once_and_the_same_everywhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(lock: BaseLock, store: Store, scratch: Path, **_: object) -> Path:
        path = scratch / "raw.tar"
        path.write_bytes(b"".join(tar.stream(a_tree())))
        return path

    monkeypatch.setattr(base, "bootstrap", fake)
    image = base.make(LOCK, store)
    assert image.digest == DIGEST
    assert image.layout.name.startswith("base-bookworm-amd64-")
    monkeypatch.delattr(base, "bootstrap")
    assert base.make(LOCK, store) == image
    store.path(image.layer.sha256).unlink()
    assert base.make(LOCK, store) == image
    assert store.has(image.layer.sha256), "a blob that was collected is linked back from the layout"


def test_a_damaged_base_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def fake(lock: BaseLock, store: Store, scratch: Path, **_: object) -> Path:
        nonlocal made
        made += 1
        path = scratch / "raw.tar"
        path.write_bytes(b"".join(tar.stream(a_tree())))
        return path

    monkeypatch.setattr(base, "bootstrap", fake)
    image = base.make(LOCK, store)
    blob = store.path(image.layer.sha256)
    blob.chmod(0o644)
    with blob.open("r+b") as file:  # in the store and in the layout, which are one file
        file.seek(20)
        file.write(b"!")
    assert not store.verify(image.layer.sha256), "whoever reads it finds out, and removes it"
    assert base.make(LOCK, store) == image
    assert made == 2
    assert store.verify(image.layer.sha256)
