"""The bootstrap base, without Debian: fetched by hash, made once, always the same."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import base, debian, layout, tar
from builder.base import BaseLock, Deb
from builder.debian import Mirrors
from builder.errors import CellFailedError, HashMismatchError, LockError, SourceError, ToolError
from builder.layout import Descriptor, Layer
from builder.store import Store
from builder.tar import Entry, Kind, file_entry
from tests.support import archive
from tests.support.archive import FakeArchive

EPOCH = 1_700_000_000
MIRRORS = Mirrors(archives=("http://m.invalid/debian",), securities=("http://s.invalid/security",))


@pytest.mark.parametrize(
    "asked",
    [
        {"suite": "Bad Suite", "architecture": "amd64", "packages": ["gcc"]},
        {"suite": "bookworm", "architecture": "amd64", "packages": ["--option"]},
        {"suite": "bookworm", "architecture": "vax", "packages": ["gcc"]},
        {"suite": "bookworm", "architecture": "amd64", "packages": ["gcc"], "systems": [["git"], ["--option"]]},
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


# ----------------------------------------------------------------------------------------------------
# Locking


VERSIONS = {
    "base-files": "13",
    "g++": "12-1",
    "libc6": "2.36-9",
    "libedit2": "3-1",
    "openssh-server": "9-1",
    "git": "2-1",
}
NEEDS = {"g++": ["libc6"], "openssh-server": ["libc6", "libedit2"], "git": ["libc6"]}
ASKED: Mapping[str, Any] = {"suite": "bookworm", "architecture": "amd64", "packages": ["g++"]}
SSH = ["openssh-server"]


@pytest.fixture
def mirror() -> Iterator[FakeArchive]:
    with archive.served(FakeArchive(dict(VERSIONS), NEEDS)) as one:
        yield one


def test_a_new_date_alone_makes_no_new_lock(mirror: FakeArchive) -> None:
    locks = base.lock(**ASKED, systems=[SSH])
    mirror.epoch += 1
    again = base.lock(**ASKED, systems=[SSH], previous=locks)
    assert [one is two for one, two in zip(again, locks, strict=True)] == [True, True]
    (more,) = base.lock(**{**ASKED, "packages": ["libc6", "g++", "g++"]}, previous=locks)
    assert (more.packages, more.epoch) == (("g++", "libc6"), archive.EPOCH + 1)


def test_system_packages_are_locked_on_top_of_the_base(mirror: FakeArchive) -> None:
    lock, ssh, git, same = base.lock(**ASKED, systems=[SSH, ["git"], ["openssh-server", "g++"]])
    assert [one.name for one in lock.debs] == ["base-files", "g++", "libc6"]
    assert ssh.packages == ("g++", "openssh-server")
    assert [one.name for one in ssh.debs] == ["base-files", "g++", "libc6", "libedit2", "openssh-server"]
    assert {one.name for one in git.debs} - {one.name for one in lock.debs} == {"git"}
    assert not ssh.lacking(lock)
    assert lock.lacking(ssh) == ("libedit2", "openssh-server")
    assert same is ssh, "what is asked for with the base already makes no difference"
    assert len(mirror.asked) == 3


def test_a_kept_base_gets_what_is_new_on_top_of_itself(mirror: FakeArchive) -> None:
    lock, ssh = base.lock(**ASKED, systems=[SSH])
    mirror.epoch += 1
    mirror.versions |= {"openssh-server": "9-2"}
    mirror.asked.clear()
    kept, settled, git = base.lock(**ASKED, systems=[SSH, ["git"]], previous=[lock, ssh], keep=lock)
    assert kept is lock
    assert settled is ssh, "only --bases looks for updates"
    assert not git.lacking(lock)
    assert git.epoch == lock.epoch + 1
    assert mirror.asked == [("g++", "git")]


def test_a_base_that_the_mirror_no_longer_has_is_locked_anew_with_all_on_it(mirror: FakeArchive) -> None:
    lock, ssh = base.lock(**ASKED, systems=[SSH])
    mirror.versions |= {"libc6": "2.36-10"}
    new, new_ssh, git = base.lock(**ASKED, systems=[SSH, ["git"]], previous=[lock, ssh], keep=lock)
    assert ssh.lacking(new) == ("libc6",)
    assert not new_ssh.lacking(new)
    assert not git.lacking(new)


def test_a_package_that_does_not_exist_is_said_so(mirror: FakeArchive) -> None:
    (lock,) = base.lock(**ASKED)
    with pytest.raises(ToolError, match="Unable to locate package gti"):
        base.lock(**ASKED, systems=[["gti"]], keep=lock)


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


def a_tree(lock: BaseLock = LOCK) -> list[Entry]:
    status = "\n".join(
        f"Package: {deb.name}\nStatus: install ok installed\nVersion: {deb.version}\nArchitecture: {deb.architecture}\n"
        for deb in lock.debs
    )
    sources = b"deb http://m.invalid/debian bookworm main contrib\n"
    return [
        Entry(path="etc", kind=Kind.DIRECTORY, mode=0o755, mtime=5),
        file_entry("etc/hostname", b"here\n"),
        file_entry("etc/passwd", b"root:*:0:0:root:/root:/bin/bash\n", mtime=7),
        file_entry("usr/share/doc/apt/examples/sources.list", sources),
        file_entry("var/lib/dpkg/status", status.encode()),
    ]


def a_whole_tree(lock: BaseLock) -> list[Entry]:
    """Return a tree with all its directories, and with a file of each package."""
    above = ("etc/apt", "home", "usr", "usr/bin", "usr/share", "usr/share/doc", "usr/share/doc/apt", "var", "var/lib")
    directories = [Entry(path=path, kind=Kind.DIRECTORY, mode=0o755) for path in (*above, "var/lib/dpkg", "var/log")]
    programs = [file_entry(f"usr/bin/{deb.name}", deb.version.encode(), mode=0o755) for deb in lock.debs]
    return [*a_tree(lock), *directories, *programs, file_entry("var/log/dpkg.log", b"today")]


@pytest.fixture
def bootstrapped(monkeypatch: pytest.MonkeyPatch) -> list[BaseLock]:
    """Have `make` find such trees, and see for which locks."""
    asked: list[BaseLock] = []

    def fake(lock: BaseLock, store: Store, scratch: Path, *, tell: Callable[[str], None], **_: object) -> Path:
        asked.append(lock)
        path = scratch / "raw.tar"
        path.write_bytes(b"".join(tar.stream(a_whole_tree(lock) if lock != LOCK else a_tree())))
        tell("mmdebstrap")
        return path

    monkeypatch.setattr(base, "bootstrap", fake)
    return asked


# The guard of what `make` puts into an image: when this changes, RECIPE must change too.
DIGEST = "sha256:0c551cb98b50ea1b5d087a0634fae2b6d886c0bd6f71ee121b8860c72d4e4ab1"


def test_made_once_and_the_same_everywhere(store: Store, bootstrapped: list[BaseLock]) -> None:
    image = base.make(LOCK, store)
    assert image.digest == DIGEST
    assert image.layout.name.startswith("base-bookworm-amd64-")
    assert image.system is None
    assert base.make(LOCK, store) == image
    store.path(image.layer.sha256).unlink()
    assert base.make(LOCK, store) == image
    assert store.has(image.layer.sha256), "a blob that was collected is linked back from the layout"
    assert bootstrapped == [LOCK]


def damage(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"!")


def test_a_damaged_base_is_made_again(store: Store, bootstrapped: list[BaseLock]) -> None:
    image = base.make(LOCK, store)
    damage(store.path(image.layer.sha256))  # in the store and in the layout, which are one file
    assert not store.verify(image.layer.sha256), "whoever reads it finds out, and removes it"
    assert base.make(LOCK, store) == image
    assert len(bootstrapped) == 2
    assert store.verify(image.layer.sha256)


# ----------------------------------------------------------------------------------------------------
# System packages on top

LOWER = replace(LOCK, debs=(archive.deb("g++"), archive.deb("libc6")))
UPPER = replace(
    LOCK, packages=("g++", "ssh"), epoch=EPOCH + 86_400, debs=(*LOWER.debs, archive.deb("libedit2"), archive.deb("ssh"))
)
# Guards the difference as DIGEST guards the base.
SYSTEM_DIGEST = "sha256:b5af49bdd778b8acdf6ed564eea747a90241ec3b724b35dcdb70565ff9c65cae"


def entries_of(store: Store, blob: Descriptor) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(store.path(blob.sha256)) as members:
        return {member.name: member for member in members}


def test_only_the_difference_is_stored(store: Store, bootstrapped: list[BaseLock]) -> None:
    alone = base.make(LOWER, store)
    told: list[str] = []
    image = base.make(LOWER, store, lambda what, *_: told.append(what), UPPER)
    assert image.digest == SYSTEM_DIGEST
    assert (image.layer, image.diff_id, image.epoch) == (alone.layer, alone.diff_id, alone.epoch)
    assert image.system is not None
    found = layout.read(image.layout)
    assert found is not None
    assert found.layers == (Layer(blob=alone.layer, diff_id=alone.diff_id), image.system)
    assert found.manifest.digest == image.digest != alone.digest
    entries = entries_of(store, image.system.blob)
    new = ["usr/bin/libedit2", "usr/bin/ssh", "var/lib/dpkg/status"]
    above = ["usr", "usr/bin", "var", "var/lib", "var/lib/dpkg"]
    assert sorted(entries) == sorted(new + above)
    assert {int(entries[path].mtime) for path in new} == {UPPER.epoch}
    assert {int(entries[path].mtime) for path in above} == {LOWER.epoch}
    assert bootstrapped == [LOWER, replace(UPPER, epoch=LOWER.epoch)], "dates that packages write are the base's"
    assert told[0] == "ssh: mmdebstrap"


def test_system_packages_are_laid_once(store: Store, bootstrapped: list[BaseLock]) -> None:
    image = base.make(LOWER, store, system=UPPER)
    assert base.make(LOWER, store, system=UPPER) == image
    assert len(bootstrapped) == 2
    shutil.rmtree(base.make(LOWER, store).layout)
    assert base.make(LOWER, store, system=UPPER) == image, "the layout has all its layers"
    assert len(bootstrapped) == 2
    assert image.system is not None
    store.path(image.system.blob.sha256).unlink()
    assert base.make(LOWER, store, system=UPPER) == image
    assert store.has(image.system.blob.sha256)


def test_the_layer_does_not_depend_on_the_variant_that_asks(store: Store, bootstrapped: list[BaseLock]) -> None:
    other = replace(UPPER, packages=("g++", "libedit2", "ssh"))
    one, two = base.make(LOWER, store, system=UPPER), base.make(LOWER, store, system=other)
    assert one.system == two.system
    assert one.layout != two.layout


@pytest.mark.parametrize("debs", [UPPER.debs[1:], (archive.deb("g++", "1-2"), *UPPER.debs[1:])])
def test_what_is_not_locked_on_the_base_is_refused(store: Store, debs: tuple[Deb, ...]) -> None:
    with pytest.raises(LockError) as caught:
        base.make(LOWER, store, system=replace(UPPER, debs=debs))
    (problem,) = caught.value.problems
    assert problem.what.endswith(": g++")
    assert problem.tries[0].startswith("lock both together: torchyard lock --bases")


def test_system_packages_are_just_those_locked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(lock: BaseLock, store: Store, scratch: Path, **_: object) -> Path:
        path = scratch / "raw.tar"
        path.write_bytes(b"".join(tar.stream(a_whole_tree(LOWER))))
        return path

    monkeypatch.setattr(base, "bootstrap", fake)
    with pytest.raises(CellFailedError, match="not what is locked"):
        base.make(LOWER, store, system=UPPER)
    assert list((store.root / "work").iterdir()) == []


def test_a_damaged_layer_below_is_found_and_made_again(store: Store, bootstrapped: list[BaseLock]) -> None:
    alone = base.make(LOWER, store)
    damage(store.path(alone.layer.sha256))
    with pytest.raises(HashMismatchError, match="layer of the base was damaged"):
        base.make(LOWER, store, system=UPPER)
    image = base.make(LOWER, store, system=UPPER)
    assert image.digest == SYSTEM_DIGEST
    assert store.verify(alone.layer.sha256)


def test_a_base_made_again_is_that_of_every_layout(store: Store, bootstrapped: list[BaseLock]) -> None:
    image = base.make(LOWER, store, system=UPPER)
    damage(store.path(image.layer.sha256))
    assert not store.verify(image.layer.sha256)
    base.make(LOWER, store)
    assert store.verify(image.layer.sha256)
    again = base.make(LOWER, store, system=UPPER)
    found = layout.read(again.layout)
    assert found is not None
    layout.verify(again.layout, found)
    assert len(bootstrapped) == 3, "the system packages are not made again for that"
