"""Tar: what is written has one spelling, and everybody reads it as it was meant."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import tar
from builder.tar import Entry, Kind, file_entry

EPOCH = 1_700_000_000


EVERY_KIND = [
    Entry(path="d", kind=Kind.DIRECTORY, mode=0o1777, uid=1000, gid=5, mtime=EPOCH),
    file_entry("d/f", b"x" * 1000, mode=0o4755),
    Entry(path="d/h", kind=Kind.HARDLINK, mode=0o4755, target="d/f"),
    Entry(path="d/s", kind=Kind.SYMLINK, mode=0o777, target="../" + "t" * 120),
    Entry(path="n", kind=Kind.CHARACTER_DEVICE, mode=0o666, device=(1, 3)),
    Entry(path="p", kind=Kind.FIFO, mode=0o600),
    Entry(path="x", kind=Kind.DIRECTORY, mode=0o755, uid=8**7, xattrs={"user.a": b"1", "user.b": b"\xff\0"}),
]


def read_back(entries: list[Entry]) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar.stream(entries)))) as members:
        return members.getmembers()


def test_python_reads_every_kind_of_entry() -> None:
    got = read_back(EVERY_KIND)
    assert [member.name for member in got] == [entry.path for entry in EVERY_KIND]
    assert [member.type for member in got] == [entry.kind.value for entry in EVERY_KIND]
    assert [member.mode for member in got] == [entry.mode for entry in EVERY_KIND]
    assert (got[0].uid, got[0].gid, got[0].mtime, got[0].uname) == (1000, 5, EPOCH, "")
    assert got[2].linkname == "d/f"
    assert got[3].linkname == EVERY_KIND[3].target
    assert (got[4].devmajor, got[4].devminor) == (1, 3)


def test_we_read_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(tar.stream(EVERY_KIND)))
    with path.open("rb") as file:
        got = tar.read(file)
        assert got["d/f"].read() == got["d/f"].read() == b"x" * 1000
    assert list(got) == [entry.path for entry in EVERY_KIND]
    assert [replace(entry, content=None, size=0) for entry in got.values()] == [
        replace(entry, content=None, size=0) for entry in EVERY_KIND
    ]


def test_other_tools_spellings_of_a_path_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as members:
        for name in ("./", "./a/", "./a/" + "b" * 120):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            members.addfile(member)
        link = tarfile.TarInfo("./c")
        link.type, link.linkname = tarfile.LNKTYPE, "./a/b"
        members.addfile(link)
    with path.open("rb") as file:
        got = tar.read(file)
    assert list(got) == ["a", "a/" + "b" * 120, "c"]
    assert got["c"].target == "a/b"


def test_pax_headers_appear_only_where_needed() -> None:
    plain = file_entry("a" * 100, b"")
    assert len(tar.header(plain)) == 512
    for entry in (
        file_entry("a" * 101, b""),
        file_entry("Főtanúsítvány", b""),
        Entry(path="cap", kind=Kind.FILE, mode=0o755, xattrs={"security.capability": bytes(range(20))}),
        Entry(path="big", kind=Kind.DIRECTORY, mode=0o755, uid=8**7),
    ):
        assert len(tar.header(entry)) > 512
        assert read_back([entry])[0].name == entry.path


def test_capabilities_survive() -> None:
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    (got,) = read_back([Entry(path="p", kind=Kind.FILE, mode=0o755, xattrs={"security.capability": value})])
    assert got.pax_headers["SCHILY.xattr.security.capability"].encode("utf-8", "surrogateescape") == value


@given(
    st.text(
        alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=140
    ).filter(lambda name: name not in (".", ".."))
)
def test_any_name_survives(name: str) -> None:
    assert read_back([file_entry(name, b"")])[0].name == name


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/"])
def test_paths_that_leave_the_image_cannot_be_said(path: str) -> None:
    with pytest.raises(AssertionError):
        file_entry(path, b"")


def test_a_lying_size_is_refused() -> None:
    entry = Entry(path="a", kind=Kind.FILE, mode=0o644, size=4, content=lambda: (b"abc",))
    with pytest.raises(ValueError, match="3 bytes came where 4"):
        b"".join(tar.stream([entry]))
