"""The file tree: what stays, what is added, and that nothing else tells one machine from another."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

import pytest

from builder import rootfs, tar
from builder.errors import ToolError
from builder.tar import Entry, Kind, file_entry

EPOCH = 1_700_000_000

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
    path, text = rootfs.apt_sources({"sources.list": SOURCES}, "bookworm")
    assert path == "etc/apt/sources.list"
    assert text == (
        "deb http://m.invalid/debian bookworm main\ndeb http://m.invalid/debian bookworm-updates main\n"
        "deb http://m.invalid/security bookworm-security main\n"
    )
    path, text = rootfs.apt_sources({"debian.sources": DEB822, "sources.list": SOURCES}, "forky")
    assert path == "etc/apt/sources.list.d/debian.sources"
    assert "Suites: forky forky-updates\nComponents: main\n" in text
    assert "Suites: forky-security" in text
    assert "#" not in text
    with pytest.raises(ToolError):
        rootfs.apt_sources({}, "bookworm")


def tree(*extra: Entry) -> dict[str, Entry]:
    entries = [
        Entry(path="etc", kind=Kind.DIRECTORY, mode=0o755),
        file_entry("etc/passwd", b"root:*:0:0:root:/root:/bin/bash\n"),
        file_entry("etc/shadow", b"root:*:20000:0:99999:7:::\n", mode=0o640, gid=42),
        file_entry("etc/skel/.bashrc", b"alias\n"),
        file_entry("usr/share/doc/apt/examples/sources.list", SOURCES.encode()),
        *extra,
    ]
    return {entry.path: entry for entry in entries}


def made(*extra: Entry) -> dict[str, Entry]:
    entries = rootfs.canonical(tree(*extra), suite="bookworm", epoch=EPOCH)
    paths = [entry.path for entry in entries]
    assert paths == sorted(paths, key=os.fsencode)
    assert {entry.mtime for entry in entries} == {EPOCH}
    return {entry.path: entry for entry in entries}


def test_the_user_is_added() -> None:
    got = made()
    assert got["etc/passwd"].read().splitlines()[-1] == b"torch:x:1000:0:torchyard:/home/torch:/bin/bash"
    assert got["etc/shadow"].read() == b"root:*:19675:0:99999:7:::\ntorch:*:19675:0:99999:7:::\n"
    assert (got["etc/shadow"].mode, got["etc/shadow"].gid) == (0o640, 42)
    for entry in (got["home/torch"], got["workspace"]):
        assert (entry.kind, entry.mode, entry.uid, entry.gid) == (Kind.DIRECTORY, 0o775, 1000, 0)
    assert got["home/torch/.bashrc"].read() == b"alias\n"


def test_the_user_is_added_where_no_shadow_is() -> None:
    entries = tree()
    del entries["etc/shadow"]
    got = {one.path: one for one in rootfs.canonical(entries, suite="bookworm", epoch=EPOCH)}
    assert got["etc/passwd"].read().splitlines()[-1] == b"torch:*:1000:0:torchyard:/home/torch:/bin/bash"
    assert "etc/shadow" not in got


def test_a_user_of_the_packages_is_not_overwritten() -> None:
    with pytest.raises(ToolError, match="already make the user debian"):
        made(file_entry("etc/passwd", b"debian:x:1000:1000::/:/bin/sh\n"))


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
        "var/lib/ucf/registry.0",
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
    assert path not in made(file_entry(path, b"noise"))


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
    assert made(file_entry(path, b"needed"))[path].read() == b"needed"


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
    got = made(file_entry("etc/machine-id", b"0123\n"))["etc/machine-id"]
    assert (got.size, stat.S_IMODE(got.mode)) == (0, 0o444)


def test_hard_links_point_at_the_first_name_that_is_kept() -> None:
    got = made(
        file_entry("usr/share/man/z", b"data", mode=0o755),
        Entry(path="usr/bin/b", kind=Kind.HARDLINK, mode=0o755, target="usr/share/man/z"),
        Entry(path="usr/bin/a", kind=Kind.HARDLINK, mode=0o755, target="usr/share/man/z"),
    )
    assert "usr/share/man/z" not in got
    assert (got["usr/bin/a"].kind, got["usr/bin/a"].read()) == (Kind.FILE, b"data")
    assert (got["usr/bin/b"].kind, got["usr/bin/b"].target) == (Kind.HARDLINK, "usr/bin/a")


def bytecode(flags: int) -> bytes:
    return b"\xa7\r\r\n" + flags.to_bytes(4, "little") + b"hashhash" + b"code"


def test_bytecode_is_trusted_or_left_out() -> None:
    path = "usr/lib/python3.11/__pycache__/os.cpython-311.pyc"
    assert made(file_entry(path, bytecode(3)))[path].read() == bytecode(1)
    assert made(file_entry(path, bytecode(1)))[path].read() == bytecode(1)
    assert path not in made(file_entry(path, bytecode(0))), "it holds a time that is changed here"


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
    entries = tree(file_entry("a", b"1"), file_entry("b", b"2"))
    backwards = dict(reversed(entries.items()))
    one, other = (
        b"".join(tar.stream(rootfs.canonical(each, suite="bookworm", epoch=EPOCH))) for each in (entries, backwards)
    )
    assert one == other
