"""Tar archives: any tool's read as values, ours written with one spelling.

Written by ourselves, because Python's writer changed its headers between versions, and GNU tar its defaults. What is
written is `header(entry)`, the content, `padding(size)`, for each entry, and `END`: a caller that has the content in
another form, compressed already for instance, puts these between by itself.
"""

from __future__ import annotations

import enum
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

END = bytes(1024)

_PIECE = 4 << 20
_XATTR = "SCHILY.xattr."


class Kind(enum.Enum):
    """What an entry is; the value is its type flag."""

    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHARACTER_DEVICE = b"3"
    BLOCK_DEVICE = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry: `path` is relative and has no dot parts; `mode` is permission bits only; `mtime` is in seconds.

    `content` opens the bytes of a file (`size` of them) each time it is called. `target` is what a symbolic link says,
    or the path of the entry that a hard link links to. `device` is major and minor number.
    """

    path: str
    kind: Kind
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    content: Callable[[], Iterable[bytes]] | None = None

    def __post_init__(self) -> None:
        # An absolute path has an empty part, too.
        assert not {"", ".", ".."} & set(self.path.split("/")), self.path
        assert self.mode == stat.S_IMODE(self.mode), self.path
        assert (self.content is not None) or self.size == 0, self.path

    def read(self) -> bytes:
        """Return a file's content, whole."""
        assert self.content is not None, self.path
        return b"".join(self.content())


def file_entry(path: str, content: bytes, *, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: int = 0) -> Entry:
    """Return a regular file that holds `content`."""
    return Entry(
        path=path,
        kind=Kind.FILE,
        mode=mode,
        uid=uid,
        gid=gid,
        mtime=mtime,
        size=len(content),
        content=lambda: (content,),
    )


# ----------------------------------------------------------------------------------------------------
# Writing


def header(entry: Entry) -> bytes:
    """Return the header of `entry`: plain ustar, and before it PAX records only for what ustar cannot say."""
    name = _bytes(entry.path) + (b"/" if entry.kind is Kind.DIRECTORY else b"")
    linkname = _bytes(entry.target)
    numbers = {key: int(getattr(entry, key)) for key in ("mode", "uid", "gid", "size", "mtime")}
    records = [(f"{_XATTR}{key}", value) for key, value in entry.xattrs.items()]
    if len(name) > 100 or not name.isascii():
        records.append(("path", name))
        name = name[:100]
    if len(linkname) > 100 or not linkname.isascii():
        records.append(("linkpath", linkname))
        linkname = linkname[:100]
    for key, digits in (("uid", 7), ("gid", 7), ("size", 11)):
        if numbers[key] >= 8**digits:
            records.append((key, b"%d" % numbers[key]))
            numbers[key] = 0
    ustar = _ustar(name, entry.kind.value, numbers, linkname, entry.device or (0, 0))
    if not records:
        return ustar
    body = b"".join(_record(key, value) for key, value in sorted(records))
    about = {"mode": 0o644, "uid": 0, "gid": 0, "size": len(body), "mtime": 0}
    return _ustar(b"pax_header", b"x", about, b"", (0, 0)) + body + padding(len(body)) + ustar


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of content."""
    return bytes(-size % 512)


def stream(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the tar of `entries` in the order given; raises ValueError if a content has another length."""
    for entry in entries:
        yield header(entry)
        if entry.content is not None:
            got = 0
            for chunk in entry.content():
                got += len(chunk)
                yield chunk
            if got != entry.size:
                raise ValueError(f"{entry.path}: {got} bytes came where {entry.size} were announced")
            yield padding(got)
    yield END


def _bytes(name: str) -> bytes:
    """Return a name as the bytes it was read from, whatever the locale is."""
    return name.encode("utf-8", "surrogateescape")


def _ustar(name: bytes, flag: bytes, numbers: Mapping[str, int], linkname: bytes, device: tuple[int, int]) -> bytes:
    fields = (
        name.ljust(100, b"\0"),
        _octal(numbers["mode"], 8),
        _octal(numbers["uid"], 8),
        _octal(numbers["gid"], 8),
        _octal(numbers["size"], 12),
        _octal(numbers["mtime"], 12),
        b" " * 8,  # counted as spaces in the checksum that takes their place
        flag,
        linkname.ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),  # owner names: numbers alone are the same on every machine
        _octal(device[0], 8),
        _octal(device[1], 8),
        bytes(167),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def _record(key: str, value: bytes) -> bytes:
    """Return one PAX record; its length counts its own digits."""
    rest = len(key.encode()) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key.encode(), value)


# ----------------------------------------------------------------------------------------------------
# Reading


def read(file: BinaryIO) -> dict[str, Entry]:
    """Return the entries of an uncompressed tar by path; their contents are read from `file` while it is open."""
    entries = {}
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as members:
        for member in members:
            path = member.name.removeprefix("./").strip("/")
            if path not in ("", "."):
                entries[path] = _entry(path, member, file.fileno())
    return entries


def _entry(path: str, member: tarfile.TarInfo, descriptor: int) -> Entry:
    kind = Kind.FILE if member.type == tarfile.AREGTYPE else Kind(member.type)
    is_file = kind is Kind.FILE
    return Entry(
        path=path,
        kind=kind,
        mode=member.mode & 0o7777,
        uid=member.uid,
        gid=member.gid,
        mtime=int(member.mtime),
        size=member.size if is_file else 0,
        target=member.linkname.removeprefix("./") if kind is Kind.HARDLINK else member.linkname,
        device=(member.devmajor, member.devminor) if member.isdev() and kind is not Kind.FIFO else None,
        xattrs={
            key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
            for key, value in member.pax_headers.items()
            if key.startswith(_XATTR)
        },
        content=_part(descriptor, member.offset_data, member.size) if is_file else None,
    )


def _part(descriptor: int, offset: int, size: int) -> Callable[[], Iterator[bytes]]:
    """Return what opens a part of a file without moving its position."""

    def pieces() -> Iterator[bytes]:
        at, end = offset, offset + size
        while at < end:
            piece = os.pread(descriptor, min(_PIECE, end - at), at)
            if not piece:
                return
            at += len(piece)
            yield piece

    return pieces
