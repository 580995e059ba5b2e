"""The bootstrap base, without Debian: locks, mirrors, and the file system made canonical."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import base, layout
from builder.base import BaseLock, Deb
from builder.errors import HashMismatchError, LockError, SourceError, ToolError
from builder.layout import Entry, Kind
from builder.store import Store

EPOCH = 1_700_000_000


def a_deb(name: str, n: int, version: str = "1:2.3-4+deb12u1~x") -> Deb:
    return Deb(
        name=name,
        version=version,
        architecture="amd64",
        sha256=f"{n:064x}",
        size=100 + n,
        filename=f"pool/main/{name[0]}/{name}/{name}_2.3-4+deb12u1~x_amd64.deb",
    )


LOCK = BaseLock(
    suite="bookworm",
    architecture="amd64",
    packages=("g++", "python3"),
    epoch=EPOCH,
    debs=(
        a_deb("g++", 1),
        replace(a_deb("libc6", 2), architecture="all"),
        a_deb("python3", 3, version="3.11.2-1+b1"),
    ),
)


# ----------------------------------------------------------------------------------------------------
# The lock


def test_a_lock_survives_its_file() -> None:
    text = base.dumps(LOCK)
    assert base.loads(text, where="x.toml") == LOCK
    assert base.dumps(base.loads(text, where="x.toml")) == text
    assert LOCK.python == "3.11"
    assert LOCK.size == 306


@given(st.data())
def test_any_changed_digit_of_a_hash_is_refused(data: st.DataObject) -> None:
    text = base.dumps(LOCK)
    digest = LOCK.digest
    hexes = [digest, *(deb.sha256 for deb in LOCK.debs)]
    start = text.index(data.draw(st.sampled_from(hexes)))
    at = start + data.draw(st.integers(min_value=0, max_value=63))
    digit = data.draw(st.sampled_from([c for c in "0123456789abcdefABCDEF" if c != text[at]]))
    with pytest.raises(LockError) as caught:
        base.loads(text[:at] + digit + text[at + 1 :], where="bases/x.toml")
    assert {problem.where for problem in caught.value.problems} == {"bases/x.toml"}


@given(st.integers(min_value=0))
def test_any_truncation_is_refused(cut: int) -> None:
    text = base.dumps(LOCK).rstrip()
    with pytest.raises(LockError):
        base.loads(text[: cut % len(text)], where="x.toml")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1\n", "", "schema"),
        ('suite = "bookworm"', 'suite = "trixie"', "digest"),
        ('suite = "bookworm"', 'suite = "book worm"', "suite"),
        ('architecture = "amd64"\npackages', 'architecture = "vax"\npackages', "architecture"),
        (f"epoch = {EPOCH}", "epoch = -1", "epoch"),
        (f"epoch = {EPOCH}", "epoch = true", "epoch"),
        (f"epoch = {EPOCH}", f"epoch = {EPOCH}\nextra = 1", "extra"),
        ("size = 102", "size = 103", "digest"),
        ("size = 102\n", "", "deb[1].size"),
        ('name = "libc6"', 'name = "g++"', "deb[1].name"),
        ('name = "libc6"', 'name = "libc6; reboot"', "deb[1].name"),
        ('name = "python3"', 'name = "python4"', "packages"),
        ("pool/main/l/libc6/libc6_", "https://example.invalid/libc6_", "deb[1].filename"),
        ("pool/main/l/libc6/libc6_", "pool/../../etc/libc6_", "deb[1].filename"),
        ("3.11.2-1+b1", "3.11.2-1+b1 || true", "deb[2].version"),
        (f"{2:064x}", f"{2:063x}", "deb[1].sha256"),
        (f"{2:064x}", f"{1:064x}", "deb[1].sha256"),
        ('[[deb]]\nname = "libc6"', '[[deb]]\nweight = 1\nname = "libc6"', "deb[1].weight"),
    ],
)
def test_an_edited_lock_is_refused_by_file_and_field(old: str, new: str, field: str) -> None:
    text = base.dumps(LOCK)
    assert old in text
    with pytest.raises(LockError) as caught:
        base.loads(text.replace(old, new, 1), where="bases/x.toml")
    said = [str(problem) for problem in caught.value.problems]
    assert any(line.startswith(f"bases/x.toml: {field}: ") for line in said), said


def test_all_problems_are_told_at_once() -> None:
    text = base.dumps(LOCK).replace("size = 101", "size = 0").replace('name = "libc6"', 'name = "?"')
    with pytest.raises(LockError) as caught:
        base.loads(text, where="x.toml")
    assert len(caught.value.problems) == 2


def test_a_lock_names_no_host() -> None:
    assert "://" not in base.dumps(LOCK)


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


# ----------------------------------------------------------------------------------------------------
# apt


def printed(*addresses: str) -> str:
    return "".join(f"'{address}' some_file 0 \n" for address in addresses)


def test_mirrors_are_read_from_what_apt_prints() -> None:
    text = printed(
        "http://other.invalid/repo/dists/nodistro/InRelease",
        "http://m.invalid/debian/dists/bookworm/InRelease",
        "http://m.invalid/debian/dists/bookworm-updates/InRelease",
        "http://m.invalid/debian/dists/bookworm/main/binary-amd64/Packages.xz",
        "http://s.invalid/debian-security/dists/bookworm-security/InRelease",
        "http://b.invalid/debian/dists/bookworm-backports/InRelease",
    )
    archives, securities = base.mirror_candidates(text)
    assert archives == ("http://m.invalid/debian", "http://other.invalid/repo")
    assert securities == ("http://s.invalid/debian-security",)
    assert base.mirror_candidates("") == ((), ())


def test_security_updates_are_looked_for_in_both_archives() -> None:
    tried = [address("pool/updates/main/o/x_1+2.deb") for address in base._addresses(("a:",), ("s:",))]
    assert tried == ["s:/pool/updates/main/o/x_1+2.deb", "a:/pool/main/o/x_1+2.deb"]


def test_control_fields_are_parsed() -> None:
    text = "Package: a\nDescription: x\n more: y\n\nPackage: b\nVersion: 1:2\n"
    assert list(base.parse_stanzas(text)) == [
        {"Package": "a", "Description": "x"},
        {"Package": "b", "Version": "1:2"},
    ]


class FakeApt:
    """Serves what a test put into `files` (address to bytes)."""

    printed_sources = printed(
        "http://m.invalid/debian/dists/bookworm/InRelease",
        "http://s.invalid/security/dists/bookworm-security/InRelease",
    )
    files: Mapping[str, bytes] = {}

    def __init__(self, directory: Path, *, architecture: str) -> None:
        pass

    def download(self, uris: Mapping[str, Path]) -> str:
        for uri, path in uris.items():
            if uri in self.files:
                path.write_bytes(self.files[uri])
        return "E: 404  Not Found\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def fake_apt(monkeypatch: pytest.MonkeyPatch) -> type[FakeApt]:
    monkeypatch.setattr(base, "_Apt", FakeApt)
    return FakeApt


def content_lock(contents: Mapping[str, bytes]) -> tuple[BaseLock, dict[str, bytes]]:
    debs, files = [], {}
    for n, (name, content) in enumerate(contents.items()):
        deb = replace(a_deb(name, n), sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        debs.append(deb)
        files[f"http://m.invalid/debian/{deb.filename}"] = content
    return replace(LOCK, debs=tuple(debs), packages=("g++",)), files


def test_fetch_brings_what_is_missing_only(
    store: Store,
    fake_apt: type[FakeApt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, files = content_lock({"g++": b"one", "libc6": b"two"})
    monkeypatch.setattr(fake_apt, "files", files)
    told: list[tuple[str, int, int]] = []
    base.fetch(lock, store, lambda *news: told.append(news))
    assert all(store.has(deb.sha256) for deb in lock.debs)
    assert told[-1][1:] == (6, 6)
    monkeypatch.setattr(fake_apt, "files", {})
    base.fetch(lock, store)


def test_other_bytes_never_enter_the_store(
    store: Store,
    fake_apt: type[FakeApt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, files = content_lock({"g++": b"one"})
    monkeypatch.setattr(fake_apt, "files", dict.fromkeys(files, b"evil"))
    with pytest.raises(HashMismatchError, match=r"g\+\+_"):
        base.fetch(lock, store)
    assert list((store.root / "blobs").iterdir()) == []
    assert list((store.root / "partial").iterdir()) == []


def test_a_superseded_package_is_named(
    store: Store,
    fake_apt: type[FakeApt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, files = content_lock({"g++": b"one", "libc6": b"two"})
    monkeypatch.setattr(fake_apt, "files", dict(list(files.items())[:1]))
    with pytest.raises(SourceError) as caught:
        base.fetch(lock, store)
    (problem,) = caught.value.problems
    assert "1 of 2" in problem.what
    assert "libc6 1:2.3-4+deb12u1~x" in problem.what
    assert "404" in problem.why
    assert any("torchyard lock --base" in one for one in problem.tries)
    assert store.has(lock.debs[0].sha256), "what came is kept"


def test_make_says_what_was_not_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_tool", lambda *_, **__: "/bin/true")
    monkeypatch.setattr(base, "_require_architecture", lambda _: None)
    with pytest.raises(SourceError, match="not in the store"):
        base.make(LOCK, store)


def test_a_missing_mmdebstrap_is_explained(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(base, "_require_architecture", lambda _: None)
    with pytest.raises(ToolError) as caught:
        base.make(LOCK, store)
    (problem,) = caught.value.problems
    assert problem.what == "the program mmdebstrap is missing"
    assert "apt-get install mmdebstrap" in problem.tries


def test_a_foreign_architecture_is_refused(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(ToolError, match="cannot make a base for amd64"):
        base.make(LOCK, store)


def test_a_failing_program_shows_its_last_lines() -> None:
    script = "for n in $(seq 30); do echo line $n >&2; done; exit 3"
    with pytest.raises(ToolError) as caught:
        base._run(["sh", "-c", script], purpose="count")
    (problem,) = caught.value.problems
    assert problem.what == "could not count: sh ended with status 3"
    assert problem.why.splitlines()[-1] == "line 30"
    assert len(problem.why.splitlines()) == 8


# ----------------------------------------------------------------------------------------------------
# The file system made canonical

SOURCES = """\
# a comment with bookworm in it
deb http://m.invalid/debian bookworm main contrib non-free
deb http://m.invalid/debian bookworm-updates main contrib
deb http://m.invalid/security bookworm-security main contrib

#deb-src http://m.invalid/debian bookworm main
"""
DEB822 = """\
## Debian
Types: deb
URIs: http://m.invalid/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/k.gpg

## Security
Types: deb
URIs: http://m.invalid/security
Suites: trixie-security
Components: main contrib
Signed-By: /usr/share/keyrings/k.gpg
"""


def test_apt_sources_of_either_format() -> None:
    path, text = base.apt_sources({"sources.list": SOURCES}, "bookworm")
    assert path == "etc/apt/sources.list"
    assert text == (
        "deb http://m.invalid/debian bookworm main\ndeb http://m.invalid/debian bookworm-updates main\n"
        "deb http://m.invalid/security bookworm-security main\n"
    )
    path, text = base.apt_sources({"debian.sources": DEB822, "sources.list": SOURCES}, "forky")
    assert path == "etc/apt/sources.list.d/debian.sources"
    assert "Suites: forky forky-updates\nComponents: main\n" in text
    assert "Suites: forky-security" in text
    assert "#" not in text
    with pytest.raises(ToolError):
        base.apt_sources({}, "bookworm")


def tree(*extra: Entry) -> dict[str, Entry]:
    entries = [
        Entry(path="etc", kind=Kind.DIRECTORY, mode=0o755),
        layout.file_entry("etc/passwd", b"root:*:0:0:root:/root:/bin/bash\n"),
        layout.file_entry("etc/shadow", b"root:*:20000:0:99999:7:::\n", mode=0o640, gid=42),
        layout.file_entry("etc/skel/.bashrc", b"alias\n"),
        layout.file_entry("usr/share/doc/apt/examples/sources.list", SOURCES.encode()),
        *extra,
    ]
    return {entry.path: entry for entry in entries}


def text_of(entry: Entry) -> bytes:
    assert entry.content is not None
    return b"".join(entry.content())


def made(*extra: Entry) -> dict[str, Entry]:
    entries = base.canonical(tree(*extra), suite="bookworm", epoch=EPOCH)
    paths = [entry.path for entry in entries]
    assert paths == sorted(paths, key=os.fsencode)
    assert {entry.mtime for entry in entries} == {EPOCH}
    return {entry.path: entry for entry in entries}


def test_the_user_is_added() -> None:
    got = made()
    assert text_of(got["etc/passwd"]).splitlines()[-1] == b"torch:x:1000:0:torchyard:/home/torch:/bin/bash"
    assert text_of(got["etc/shadow"]) == b"root:*:19675:0:99999:7:::\ntorch:*:19675:0:99999:7:::\n"
    assert (got["etc/shadow"].mode, got["etc/shadow"].gid) == (0o640, 42)
    for entry in (got["home/torch"], got["workspace"]):
        assert (entry.kind, entry.mode, entry.uid, entry.gid) == (Kind.DIRECTORY, 0o775, 1000, 0)
    assert text_of(got["home/torch/.bashrc"]) == b"alias\n"


def test_the_user_is_added_where_no_shadow_is() -> None:
    entries = tree()
    del entries["etc/shadow"]
    got = {one.path: one for one in base.canonical(entries, suite="bookworm", epoch=EPOCH)}
    assert text_of(got["etc/passwd"]).splitlines()[-1] == b"torch:*:1000:0:torchyard:/home/torch:/bin/bash"
    assert "etc/shadow" not in got


def test_a_user_of_the_packages_is_not_overwritten() -> None:
    with pytest.raises(ToolError, match="already make the user debian"):
        made(layout.file_entry("etc/passwd", b"debian:x:1000:1000::/:/bin/sh\n"))


@pytest.mark.parametrize(
    "path",
    [
        "etc/resolv.conf",
        "etc/hostname",
        "etc/hosts",
        "etc/passwd-",
        "etc/shadow-",
        "etc/.pwd.lock",
        "etc/ssh/ssh_host_rsa_key",
        "etc/apt/apt.conf.d/99mmdebstrap",
        "etc/apt/sources.list.d/0000x.list",
        "var/log/dpkg.log",
        "var/log/apt/history.log",
        "var/cache/ldconfig/aux-cache",
        "var/cache/apt/pkgcache.bin",
        "var/cache/apt/archives/x.deb",
        "var/lib/apt/lists/x_Packages",
        "var/lib/apt/extended_states",
        "var/cache/debconf/config.dat-old",
        "var/lib/dpkg/status-old",
        "var/lib/dpkg/lock",
        "var/lib/dpkg/triggers/Lock",
        "var/lib/dbus/machine-id",
        "run/mount/utab",
        "root/.cache/x",
        "dev/null",
        "tmp/x",
        "usr/bin/lto-dump-12",
        "usr/share/doc/x/changelog.gz",
        "usr/share/man/man1/x.1.gz",
        "usr/share/locale/de/LC_MESSAGES/x.mo",
        "usr/share/info/dir",
        "usr/share/lintian/overrides/x",
    ],
)
def test_noise_is_left_out(path: str) -> None:
    assert path not in made(layout.file_entry(path, b"noise"))


@pytest.mark.parametrize(
    "path",
    [
        "usr/share/doc/x/copyright",
        "var/lib/dpkg/status",
        "var/lib/dpkg/info/x.list",
        "etc/ld.so.cache",
        "usr/lib/python3.11/os.py",
        "usr/share/locale/locale.alias",
        "var/cache/debconf/config.dat",
        "etc/logrotate.d/x",
        "etc/apt/trusted.gpg.d/debian.asc",
        "usr/lib/logs/var/log/x",
        "etc/devices",
        "etc/hosts.allow",
    ],
)
def test_what_people_need_stays(path: str) -> None:
    assert text_of(made(layout.file_entry(path, b"needed"))[path]) == b"needed"


def test_directories_that_programs_expect_stay() -> None:
    names = (
        "var/log",
        "var/log/apt",
        "var/cache/apt/archives",
        "var/cache/apt/archives/partial",
        "tmp",
        "var/lib/apt/lists/partial",
        "usr/share/man/man1",
        "usr/share/doc/x",
    )
    directories = [Entry(path=name, kind=Kind.DIRECTORY, mode=0o755) for name in names]
    assert set(names) <= set(made(*directories))


def test_directories_of_apt_belong_to_root_whoever_built() -> None:
    path = "var/lib/apt/lists/partial"
    assert made(Entry(path=path, kind=Kind.DIRECTORY, mode=0o700, uid=42))[path].uid == 0


def test_the_machine_id_is_emptied_not_removed() -> None:
    got = made(layout.file_entry("etc/machine-id", b"0123\n"))["etc/machine-id"]
    assert (got.size, stat.S_IMODE(got.mode)) == (0, 0o444)


def test_hard_links_point_at_the_first_name_that_is_kept() -> None:
    got = made(
        layout.file_entry("usr/share/man/z", b"data", mode=0o755),
        Entry(path="usr/bin/b", kind=Kind.HARDLINK, mode=0o755, target="usr/share/man/z"),
        Entry(path="usr/bin/a", kind=Kind.HARDLINK, mode=0o755, target="usr/share/man/z"),
    )
    assert "usr/share/man/z" not in got
    assert (got["usr/bin/a"].kind, text_of(got["usr/bin/a"])) == (Kind.FILE, b"data")
    assert (got["usr/bin/b"].kind, got["usr/bin/b"].target) == (Kind.HARDLINK, "usr/bin/a")


def bytecode(flags: int) -> bytes:
    return b"\xa7\r\r\n" + flags.to_bytes(4, "little") + b"hashhash" + b"code"


def test_bytecode_is_trusted_or_left_out() -> None:
    path = "usr/lib/python3.11/__pycache__/os.cpython-311.pyc"
    assert text_of(made(layout.file_entry(path, bytecode(3)))[path]) == bytecode(1)
    assert text_of(made(layout.file_entry(path, bytecode(1)))[path]) == bytecode(1)
    assert path not in made(layout.file_entry(path, bytecode(0))), "it holds a time that is changed here"


def test_attributes_of_files_are_kept() -> None:
    ping = Entry(
        path="usr/bin/ping",
        kind=Kind.FILE,
        mode=0o755,
        size=1,
        content=lambda: (b"x",),
        xattrs={"security.capability": b"\x01\x00"},
    )
    assert made(ping)["usr/bin/ping"] == replace(ping, mtime=EPOCH)


def test_the_order_of_reading_does_not_matter() -> None:
    entries = tree(layout.file_entry("a", b"1"), layout.file_entry("b", b"2"))
    backwards = dict(reversed(entries.items()))
    one, other = (
        b"".join(layout.tar_stream(base.canonical(each, suite="bookworm", epoch=EPOCH)))
        for each in (entries, backwards)
    )
    assert one == other
