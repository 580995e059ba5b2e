"""What the entries of any tar are, byte for byte, without unpacking one: read once, forward, within limits.

For tars of strangers. Python's own reader takes whatever length a header claims into memory, and does not say how an
entry was written; here both matter. Single headers are still read by it.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import BinaryIO

BLOCK = 512
HEADER_MAX = 1 << 20
"""Bytes of a header that says more than a plain one can: names, attributes."""
NAME_MAX = 4096
"""Characters of a path; the kernel takes as many bytes."""
ENTRIES_MAX = 300_000
"""The largest image here has 40 000."""
KEPT_MAX = 64 << 20
"""Bytes of all names, attributes and further headers of one tar."""
RECORDS_MAX = 500
"""Records of one PAX header; those for all entries that follow are as many together."""
HEAD = 16
"""Bytes of a file that are kept: a .pyc begins with as many that say when it is valid."""

_PIECE = 1 << 20
_ZEROS = bytes(BLOCK)
_XATTRS = ("SCHILY.xattr.", "LIBARCHIVE.xattr.")
_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.DIRTYPE: "directory",
    tarfile.FIFOTYPE: "pipe",
}
_BODILESS = frozenset(_KINDS) - {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
"""Types of entries that have no content, whatever size they say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a file holds, by its hashes."""

    sha256: str
    head: bytes
    """Its first bytes."""
    body: str | None = None
    """SHA-256 of it without the header of a .pyc, or those of an archive; None for what has no such header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry: what it is, and how that was written."""

    kind: str
    """In words: file, hard link, …"""
    mode: int
    owner: tuple[int, int, str, str]
    """Numbers and names of user and group."""
    time: str
    """Seconds since 1970, with a fraction if the tar has one."""
    size: int = 0
    target: str = ""
    """Of a link."""
    device: tuple[int, int] = (0, 0)
    attributes: tuple[tuple[str, bytes], ...] = ()
    content: Content | None = None
    form: str
    """How it was written: which dialect, which records."""
    written: bytes
    """Hash of its headers and padding."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All entries of a tar, in their order, by path and by which of several of that path it is."""

    entries: Mapping[tuple[str, int], Entry]
    end: str
    """What follows the last entry."""
    sha256: str
    """Of the whole tar."""
    size: int


def listing(file: BinaryIO, *, limit: int) -> Listing:
    """Read the tar in `file` to its end, at most `limit` bytes of it; raises ValueError or TarError if it is none."""
    reader = _Reader(file, limit)
    entries: dict[tuple[str, int], Entry] = {}
    seen: Counter[str] = Counter()
    end = 0
    for name, entry in _entries(reader):
        end = reader.size
        path = _plain(name)
        entries[path, seen[path]] = entry
        seen[path] += 1
        if len(entries) > ENTRIES_MAX:
            raise ValueError(f"it has more than {ENTRIES_MAX} entries")
    # The block of zeros by which the entries ended is among what follows them.
    is_zero = reader.drain()
    follows = f"{reader.size - end} bytes{'' if is_zero else ', not all zero'}"
    return Listing(entries=entries, end=follows, sha256=reader.digest.hexdigest(), size=reader.size)


def _plain(name: str) -> str:
    """Return a name without what makes no difference to where it lies."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name.strip("/") or "."


class _Reader:
    """Hands out bytes, and counts and hashes all that go by."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self.digest = hashlib.sha256()
        self.size = 0
        self._kept = 0

    def some(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        piece = self._file.read(min(most, _PIECE))
        self.size += len(piece)
        if self.size > self._limit:
            raise ValueError(f"it unpacks to more than {self._limit >> 20} MiB")
        self.digest.update(piece)
        return piece

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield exactly so many bytes."""
        while size:
            piece = self.some(size)
            if not piece:
                raise EOFError("it ends in the middle of an entry")
            size -= len(piece)
            yield piece

    def drain(self) -> bool:
        """Read what is left, and tell whether that is all zeros."""
        is_zero = True
        while piece := self.some(_PIECE):
            is_zero = is_zero and not piece.strip(b"\0")
        return is_zero

    def keep(self, size: int) -> None:
        """Count bytes that stay in memory; raises ValueError if these are too many."""
        self._kept += size
        if self._kept > KEPT_MAX:
            raise ValueError(f"its names and further headers have more than {KEPT_MAX >> 20} MiB")

    def block(self) -> bytes:
        """Return the next block; an empty one at the end."""
        parts, missing = [], BLOCK
        while missing and (piece := self.some(missing)):
            parts.append(piece)
            missing -= len(piece)
        if parts and missing:
            raise EOFError("it ends in the middle of a header")
        return b"".join(parts)


# ----------------------------------------------------------------------------------------------------
# Entries


@dataclass(kw_only=True)
class _Said:
    """What headers before the plain one say about the next entry."""

    records: dict[str, bytes] = field(default_factory=dict)
    dialect: set[str] = field(default_factory=set)

    def after(self, for_all: _Said, dialect: str) -> _Said:
        """Return it with what holds for all entries."""
        return _Said(records={**for_all.records, **self.records}, dialect={dialect, *for_all.dialect, *self.dialect})


def _entries(reader: _Reader) -> Iterator[tuple[str, Entry]]:
    """Yield name and entry up to the block of zeros that ends a tar, or to the end of the file."""
    said, for_all = _Said(), _Said()
    written = hashlib.sha256()
    while (block := reader.block()) and block != _ZEROS:
        written.update(block)
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0:
            raise ValueError("an entry has a negative size")
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            about = for_all if header.type == tarfile.XGLTYPE else said
            records = _records(_body(reader, header.size, written))
            about.records |= records
            if len(about.records) > RECORDS_MAX:
                raise ValueError(f"a PAX header has more than {RECORDS_MAX} records")
            about.dialect |= {f"{'for all ' if about is for_all else ''}{key}" for key in records}
        elif header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = "path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            said.records[key] = _body(reader, header.size, written).rstrip(b"\0")
            said.dialect.add(f"GNU long {key}")
        elif header.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"{header.name!a} is a sparse file of GNU tar, which is not understood")
        else:
            yield _entry(reader, header, said.after(for_all, _dialect(block)), written)
            said, written = _Said(), hashlib.sha256()
    if said.records:
        raise EOFError("it ends with headers that belong to no entry")


def _body(reader: _Reader, size: int, written: hashlib._Hash) -> bytes:
    """Return what a header holds that is not an entry of its own, and pass its padding."""
    if size > HEADER_MAX:
        raise ValueError(f"a header has {size} bytes; {HEADER_MAX} are read")
    reader.keep(size)
    body = b"".join(reader.pieces(size))
    written.update(body)
    for piece in reader.pieces(-size % BLOCK):
        written.update(piece)
    return body


def _records(body: bytes) -> dict[str, bytes]:
    """Return the records of a PAX header: `length key=value` a line, the length that of the whole line."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if not space < end <= len(body) or body[end - 1 : end] != b"\n":
            raise ValueError("a PAX header has a record that is none")
        key, _, value = body[space + 1 : end - 1].partition(b"=")
        if len(key) > 300:
            raise ValueError("a PAX header has a record with a name that is too long")
        records[_text(key)] = value
        at = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _entry(reader: _Reader, header: tarfile.TarInfo, said: _Said, written: hashlib._Hash) -> tuple[str, Entry]:
    records = said.records
    name = _text(records.get("path", header.name.encode("utf-8", "surrogateescape")))
    target = _text(records.get("linkpath", header.linkname.encode("utf-8", "surrogateescape")))
    if max(len(name), len(target)) > NAME_MAX:
        raise ValueError(f"an entry has a name of more than {NAME_MAX} characters: {name[:40]!a}…")
    reader.keep(len(name) + len(target))
    size = 0 if header.type in _BODILESS else _number(records, "size", header.size)
    content = None
    if header.type not in _BODILESS:
        content = _content(reader, size, name)
        for piece in reader.pieces(-size % BLOCK):
            written.update(piece)
            if any(piece):
                said.dialect.add("bytes as padding")
    is_device = header.type in (tarfile.CHRTYPE, tarfile.BLKTYPE)
    return name, Entry(
        kind=_KINDS.get(header.type, f"entry of type {header.type!a}"),
        mode=header.mode & 0o7777,
        owner=(
            _number(records, "uid", header.uid),
            _number(records, "gid", header.gid),
            _text(records["uname"]) if "uname" in records else header.uname,
            _text(records["gname"]) if "gname" in records else header.gname,
        ),
        time=_time(records, header),
        size=size,
        target=target if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else "",
        device=(header.devmajor, header.devminor) if is_device else (0, 0),
        attributes=tuple(
            (key.removeprefix(prefix), value)
            for key, value in sorted(records.items())
            for prefix in _XATTRS
            if key.startswith(prefix)
        ),
        content=content,
        form=sys.intern(", ".join(sorted(said.dialect))),
        written=written.digest()[:HEAD],
    )


def _number(records: Mapping[str, bytes], key: str, default: float) -> int:
    text = records.get(key)
    if text is None:
        return int(default)
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"a PAX header says that {key} is {text[:20]!a}")
    return int(text)


def _time(records: Mapping[str, bytes], header: tarfile.TarInfo) -> str:
    text = records.get("mtime")
    if text is None:
        return str(int(header.mtime))
    try:
        seconds = Decimal(text.decode("ascii")[:40])
    except (InvalidOperation, UnicodeDecodeError):
        seconds = Decimal("NaN")
    if not seconds.is_finite() or abs(seconds) > 1 << 63:
        raise ValueError(f"a PAX header says that mtime is {text[:20]!a}")
    return f"{seconds:f}".rstrip("0").rstrip(".") if seconds % 1 else str(int(seconds))


def _dialect(block: bytes) -> str:
    magic = block[257:265]
    return {b"ustar\x0000": "ustar", b"ustar  \0": "GNU"}.get(magic, "v7" if not any(magic) else "an unknown dialect")


# ----------------------------------------------------------------------------------------------------
# Contents


def _content(reader: _Reader, size: int, name: str) -> Content:
    head = b"".join(reader.pieces(min(size, HEAD)))
    digest, body, mask = hashlib.sha256(head), hashlib.sha256(), _mask_of(name, head)
    if mask is not None:
        body.update(mask.without(head))
    for piece in reader.pieces(size - len(head)):
        digest.update(piece)
        if mask is not None:
            body.update(mask.without(piece))
    return Content(
        sha256=digest.hexdigest(), head=head, body=body.hexdigest() if mask is not None and mask.is_sound else None
    )


class _Mask:
    """Leaves the first bytes out of a content."""

    is_sound = True
    """Whether the content was of the kind that it is taken for."""

    def __init__(self, size: int) -> None:
        self._left = size

    def without(self, piece: bytes) -> bytes:
        """Return the next piece of the content without what is left out."""
        skipped = min(self._left, len(piece))
        self._left -= skipped
        return piece[skipped:]


class _ArchiveMask(_Mask):
    """Leaves times, owners and modes out of the headers of an `ar` archive, as static libraries are."""

    MAGIC = b"!<arch>\n"
    _SIZE = 60

    def __init__(self) -> None:
        super().__init__(0)
        self._member = len(self.MAGIC)
        """Bytes up to the next header."""
        self._header = b""

    def without(self, piece: bytes) -> bytes:
        kept = []
        while piece and self.is_sound:
            if self._member:
                kept.append(piece[: self._member])
                taken = len(kept[-1])
                self._member -= taken
                piece = piece[taken:]
                continue
            missing = self._SIZE - len(self._header)
            self._header, piece = self._header + piece[:missing], piece[missing:]
            if len(self._header) == self._SIZE:
                size = self._header[48:58].strip()
                self.is_sound = self._header.endswith(b"`\n") and size.isdigit()
                # Name and size stay; members begin at even places.
                kept.append(self._header[:16] + self._header[48:])
                self._member = int(size) + int(size) % 2 if self.is_sound else 0
                self._header = b""
        return b"".join(kept)


def _mask_of(name: str, head: bytes) -> _Mask | None:
    """Return what leaves out the bytes that may differ though the file says the same; None for most files."""
    if name.endswith(".pyc") and len(head) == HEAD and head[2:4] == b"\r\n":
        return _Mask(HEAD)
    if head.startswith(b"\x1f\x8b\x08"):
        return _Mask(10)
    return _ArchiveMask() if head.startswith(_ArchiveMask.MAGIC) else None
