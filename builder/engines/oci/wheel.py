"""Wheels as what they are on disk: zip members whose raw streams go into image layers unchanged.

Readers of zip archives disagree wherever an archive says a thing twice, so whatever is said twice must agree here, and
every byte of the file must belong to something. Nothing is inflated except small metadata: that a member's content has
the stated size, CRC and hash shows when it is inflated once, for its layer.
"""

from __future__ import annotations

import base64
import binascii
import configparser
import csv
import hashlib
import io
import itertools
import os
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from installer.records import InvalidRecordEntry, parse_record_file
from installer.utils import parse_entrypoints, parse_metadata_file
from packaging.metadata import parse_email
from packaging.utils import InvalidWheelFilename, NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder.errors import WheelError

STORED = 0
DEFLATED = 8

# Limits. In brackets: the most that was seen in 75 wheels of torch, NVIDIA's libraries and what they need.
MAX_ENTRIES = 200_000
"""[13 187]"""
MAX_DIRECTORY = 128 << 20
"""[1.4 MB] bytes of the central directory, which is held in memory."""
MAX_SIZE = 64 << 30
"""[1.7 GB] bytes unpacked."""
MAX_MEMBER_SIZE = 16 << 30
"""[0.9 GB]"""
MAX_RATIO = 100
"""[8] unpacked to packed, of the whole wheel."""
MAX_MEMBER_RATIO = 500
"""[57]"""
RATIO_MATTERS_FROM = 16 << 20
"""Bytes unpacked: less than this, zeros for instance, harms nobody however well it compresses."""
DEFLATE_RATIO = 1032
"""No deflate stream holds more: 258 bytes for each 2 bits."""
MAX_METADATA = 64 << 20
"""[1.5 MB] bytes of RECORD, METADATA, WHEEL or entry_points.txt."""
MAX_PART = 255
MAX_PATH = 4096
"""Bytes of a name's part and of a whole name: what Linux allows."""

DIGEST_SIZES: Mapping[str, int] = {name: hashlib.new(name).digest_size for name in ("sha256", "sha384", "sha512")}

_PIECE = 4 << 20
_SHOWN = 300
"""Characters of a name that may be hostile."""
_TRIES = ("do not use this wheel: tell its publisher, or choose another version",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of a wheel; `offset` is where its `compressed_size` raw bytes start in the wheel."""

    path: str
    method: int
    crc: int
    compressed_size: int
    size: int
    offset: int
    executable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordHash:
    """A hash that RECORD states."""

    algorithm: str
    digest: bytes


class EntryPoint(NamedTuple):
    """A script to be generated; `section` is "console" or "gui"."""

    name: str
    module: str
    attribute: str
    section: str


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel whose structure is sound; `dist_info` and `data` are names of directories, `data` may have no members.

    `record` has what RECORD says of each member; its own row and those of its signatures have no hash.
    """

    name: NormalizedName
    version: Version
    filename: str
    path: Path
    sha256: str
    dist_info: str
    data: str
    is_purelib: bool
    members: Mapping[str, Member]
    record: Mapping[str, tuple[RecordHash | None, int | None]]
    entry_points: tuple[EntryPoint, ...]

    def raw(self, member: Member) -> Iterator[bytes]:
        """Yield a member's bytes as they are in the wheel: a deflate stream, or the content itself if stored."""
        with self.path.open("rb") as opened:
            file = _File(opened.fileno(), self.filename)
            yield from file.pieces(member.offset, member.compressed_size)

    def read(self, path: str, limit: int = MAX_METADATA) -> bytes:
        """Return a small member's content, its size and CRC checked; raises WheelError if it is above `limit`."""
        with self.path.open("rb") as opened:
            return _content(_File(opened.fileno(), self.filename), self.members[path], limit)

    def head(self, member: Member, size: int) -> bytes:
        """Return the first bytes of a member's content, unchecked."""
        raw = b"".join(itertools.islice(self.raw(member), 1))
        if member.method == STORED:
            return raw[:size]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size)
        except zlib.error as error:
            where = f"{self.filename}: {_shown(member.path)}"
            raise WheelError("is damaged", where=where, why=str(error), tries=_TRIES) from error


def open_wheel(path: Path, *, filename: str, sha256: str) -> Wheel:
    """Read the structure and the metadata of the wheel at `path`; raises WheelError for whatever is not sound.

    The file may have any name on disk: `filename` is the wheel's. That its bytes have the hash is the caller's affair.
    """
    with path.open("rb") as opened:
        file = _File(opened.fileno(), filename)
        name, version = _identity(file)
        members = _members(file)
        dist_info, data = _special_directories(file, members, name, version)
        texts = {one: _text(file, members, f"{dist_info}/{one}") for one in ("RECORD", "METADATA", "WHEEL")}
        _check_metadata(file, f"{dist_info}/METADATA", texts["METADATA"], name, version)
        entry_points = f"{dist_info}/entry_points.txt"
        return Wheel(
            name=name,
            version=version,
            filename=filename,
            path=path,
            sha256=sha256,
            dist_info=dist_info,
            data=data,
            is_purelib=_is_purelib(file, f"{dist_info}/WHEEL", texts["WHEEL"]),
            members=members,
            record=_record(file, f"{dist_info}/RECORD", texts["RECORD"], members),
            entry_points=(
                _entry_points(file, entry_points, _text(file, members, entry_points)) if entry_points in members else ()
            ),
        )


class _File:
    """A wheel's open file: reads that are whole or fail, and failures that name the wheel."""

    def __init__(self, descriptor: int, filename: str) -> None:
        self._descriptor = descriptor
        self.filename = filename
        self.size = os.fstat(descriptor).st_size

    def peek(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes, fewer only at the end of the file."""
        return os.pread(self._descriptor, size, offset)

    def pieces(self, offset: int, size: int) -> Iterator[bytes]:
        end = offset + size
        while offset < end:
            piece = self.peek(offset, min(_PIECE, end - offset))
            if not piece:
                self.refuse("the file ends in the middle of its content")
            offset += len(piece)
            yield piece

    def read(self, offset: int, size: int) -> bytes:
        return b"".join(self.pieces(offset, size))

    def refuse(self, what: str, path: str = "", *, why: str = "") -> NoReturn:
        where = f"{self.filename}: {_shown(path)}" if path else self.filename
        raise WheelError(_shown(what), where=where, why=_shown(why), tries=_TRIES)


def _shown(text: str) -> str:
    """Make text from a wheel fit for a terminal."""
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text if text.isprintable() else ascii(text)


# ----------------------------------------------------------------------------------------------------
# The archive's end, and its directory

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4x2H4x3L4H2x2L")
_LOCAL = struct.Struct("<4s2x2H4x3L2H")
_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF

_ENCRYPTED = 1 << 0
_HAS_DESCRIPTOR = 1 << 3
_UTF8 = 1 << 11
_LEVEL = 0b110
"""How hard the compressor tried: no reader needs it."""
_KNOWN_FLAGS = _LEVEL | _HAS_DESCRIPTOR | _UTF8

_EXTRA_ZIP64 = 0x0001
_EXTRA_UNICODE_NAME = 0x7075
_DOS_DIRECTORY = 0x10


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What the central directory says of a member."""

    path: str
    name: bytes
    flags: int
    method: int
    crc: int
    compressed_size: int
    size: int
    header: int
    attributes: int

    @property
    def is_directory(self) -> bool:
        return self.path.endswith("/")


def _members(file: _File) -> dict[str, Member]:
    start, size, count = _directory(file)
    entries = _entries(file, start, size, count)
    _check_sizes(file, entries)
    _check_names(file, entries)
    offsets = _offsets(file, entries, end=start)
    return {
        entry.path: Member(
            path=entry.path,
            method=entry.method,
            crc=entry.crc,
            compressed_size=entry.compressed_size,
            size=entry.size,
            offset=offsets[entry.path],
            executable=_is_executable(entry),
        )
        for entry in sorted(entries, key=lambda entry: entry.path)
        if not entry.is_directory
    }


def _directory(file: _File) -> tuple[int, int, int]:
    """Return where the central directory starts, its size in bytes, and how many entries it has."""
    end = file.size - _END.size
    if end < 0:
        file.refuse("is no wheel: too short for a zip archive")
    signature, *disks, here, count, size, start, comment = _END.unpack(file.read(end, _END.size))
    if signature != b"PK\5\6" or comment:
        _explain_end(file)
    stated = (here, count, size, start)
    # Looked for even where nothing is too large for the plain record, because Python's zipfile does so too.
    if end >= _LOCATOR.size and file.peek(end - _LOCATOR.size, 4) == b"PK\6\7":
        end, disks, stated = _zip64_end(file, end - _LOCATOR.size, disks, stated)
        here, count, size, start = stated
    if not count:
        file.refuse("is an empty archive")
    if disks != [0, 0] or here != count:
        file.refuse("is one part of an archive in several")
    if count > MAX_ENTRIES:
        file.refuse(f"has {count} entries", why=f"at most {MAX_ENTRIES} are accepted")
    if size > MAX_DIRECTORY:
        file.refuse(f"has a directory of {size} bytes", why=f"at most {MAX_DIRECTORY} are accepted")
    if start + size > end:
        file.refuse("has a directory that reaches past its end record")
    if start + size < end:
        between = file.peek(start + size, min(end - start - size, _PIECE))
        if b"PK\5\6" in between:
            file.refuse("has several end records")
        file.refuse(f"has {end - start - size} bytes that belong to nothing, before its end record")
    return start, size, count


def _explain_end(file: _File) -> NoReturn:
    """Say why the file's last bytes are no end record: wheels have no comment, so they should be."""
    tail = file.peek(max(0, file.size - _END.size - _MAX16), _END.size + _MAX16)
    at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    if at < 0:
        file.refuse("is no wheel: it has no end record as zip archives do", why="it may be cut off")
    after = len(tail) - at - _END.size
    if after == _END.unpack_from(tail, at)[-1]:
        file.refuse("has an archive comment", why="readers may look there for another end record")
    file.refuse(f"has {after} bytes after its end record, which is not what the record says")


def _zip64_end(
    file: _File, locator: int, disks: Sequence[int], narrow: Sequence[int]
) -> tuple[int, list[int], tuple[int, int, int, int]]:
    """Return the zip64 end record's place and what it says, which must be what the plain record says if that can."""
    _, disk, at, count = _LOCATOR.unpack(file.read(locator, _LOCATOR.size))
    if disk or count != 1:
        file.refuse("is one part of an archive in several")
    if at + _END64.size != locator:
        file.refuse("has a zip64 end record that is not where it should be, or not of the usual size")
    signature, length, _, _, disk, start_disk, *wide = _END64.unpack(file.read(at, _END64.size))
    if signature != b"PK\6\6" or length != _END64.size - 12:
        file.refuse("has a damaged zip64 end record")
    limits = (_MAX16, _MAX16, _MAX16, _MAX16, _MAX32, _MAX32)
    for said, real, limit in zip((*disks, *narrow), (disk, start_disk, *wide), limits, strict=True):
        if said not in (real, limit):
            file.refuse("has two end records that disagree", why=f"one says {said}, the zip64 one {real}")
    here, entries, size, start = wide
    return at, [disk, start_disk], (here, entries, size, start)


def _entries(file: _File, start: int, size: int, count: int) -> list[_Entry]:
    directory = file.read(start, size)
    entries = []
    at = 0
    for number in range(count):
        if len(directory) - at < _CENTRAL.size or directory[at : at + 4] != b"PK\1\2":
            file.refuse(f"has a damaged directory: entry {number + 1} of {count} is missing")
        fields = _CENTRAL.unpack_from(directory, at)
        name_size, extra_size, comment_size = fields[6:9]
        at += _CENTRAL.size
        end = at + name_size + extra_size + comment_size
        if end > len(directory):
            file.refuse(f"has a damaged directory: entry {number + 1} of {count} is cut off")
        name = directory[at : at + name_size]
        entries.append(_entry(file, name, directory[at + name_size : at + name_size + extra_size], fields))
        at = end
    if at != len(directory):
        file.refuse(f"has {len(directory) - at} bytes in its directory that belong to none of the {count} entries")
    return entries


def _entry(file: _File, name: bytes, extra: bytes, fields: tuple[int, ...]) -> _Entry:
    _, flags, method, crc, *sizes, _, _, _, disk, attributes, offset = fields
    path = _path(file, name, flags)
    if flags & _ENCRYPTED:
        file.refuse("is encrypted", path)
    if flags & ~_KNOWN_FLAGS:
        file.refuse(f"has zip flags with an unknown meaning ({flags & ~_KNOWN_FLAGS:#06x})", path)
    if method not in (STORED, DEFLATED):
        file.refuse(f"is compressed with method {method}", path, why="wheels have members stored or deflated")
    sizes = [*reversed(sizes), offset]  # the order that zip64 fields have
    wide = _zip64_extra(file, path, extra) if extra else b""
    needed = [index for index, value in enumerate(sizes) if value == _MAX32]
    if len(wide) != 8 * len(needed):
        file.refuse("has a zip64 field that does not fit its entry", path)
    for index, value in zip(needed, struct.unpack(f"<{len(needed)}Q", wide), strict=True):
        sizes[index] = value
    if disk:
        file.refuse("is said to be in another part of an archive in several", path)
    return _Entry(
        path=path,
        name=name,
        flags=flags,
        method=method,
        crc=crc,
        compressed_size=sizes[1],
        size=sizes[0],
        header=sizes[2],
        attributes=attributes,
    )


def _zip64_extra(file: _File, path: str, extra: bytes) -> bytes:
    """Return the zip64 field, empty if there is none; fields that give the member another name are refused."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(extra):
        if len(extra) - at < 4:
            file.refuse("has damaged extra fields", path)
        kind, size = struct.unpack_from("<2H", extra, at)
        at += 4
        if size > len(extra) - at:
            file.refuse("has damaged extra fields", path)
        if kind in found or kind == _EXTRA_UNICODE_NAME:
            file.refuse("has extra fields that let readers see different things", path)
        found[kind] = extra[at : at + size]
        at += size
    return found.get(_EXTRA_ZIP64, b"")


# ----------------------------------------------------------------------------------------------------
# Names

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DRIVE = re.compile(r"[A-Za-z]:")


def _path(file: _File, name: bytes, flags: int) -> str:
    """Return a member's name, which must mean the same file to every reader, and one below the directory it is in."""
    try:
        path = name.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        file.refuse("has a name that is not UTF-8, or not marked as such", ascii(name))
    for problem in _path_problems(path):
        file.refuse(problem, path or "''")
    return path


def _path_problems(path: str) -> Iterator[str]:
    if _CONTROL.search(path):
        yield "has a name with control characters"
    if "\\" in path:
        yield "has a name with a backslash"
    if path.startswith("/"):
        yield "has an absolute name"
    if _DRIVE.match(path):
        yield "has a name with a drive letter"
    if not path.isascii() and not unicodedata.is_normalized("NFC", path):
        yield "has a name that is not in Unicode's composed form (NFC)"
    parts = path.removesuffix("/").split("/")
    if "" in parts:
        yield "has a name with an empty part"
    if ".." in parts or "." in parts:
        yield "has a name that leaves its directory, or points to itself"
    if len(path.encode()) > MAX_PART and any(len(part.encode()) > MAX_PART for part in parts):
        yield f"has a name with a part of more than {MAX_PART} bytes"
    if len(path.encode()) > MAX_PATH:
        yield f"has a name of more than {MAX_PATH} bytes"


def _check_names(file: _File, entries: Iterable[_Entry]) -> None:
    """Refuse names that are there twice, files that are directories too, and whatever is neither."""
    files: set[str] = set()
    directories: set[str] = set()
    for entry in entries:
        target = directories if entry.is_directory else files
        path = entry.path.removesuffix("/")
        if path in target:
            file.refuse("is in the archive twice", entry.path)
        target.add(path)
        _check_kind(file, entry)
    parents: set[str] = set()
    for path in (*files, *directories):
        parent = path.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    both = sorted(files & (directories | parents))
    if both:
        file.refuse("is both a file and a directory", both[0])


def _check_kind(file: _File, entry: _Entry) -> None:
    """Judge by the mode whatever system the entry says it comes from: installers do so too."""
    kind = stat.S_IFMT(entry.attributes >> 16)
    if kind not in (0, stat.S_IFDIR if entry.is_directory else stat.S_IFREG):
        names = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFREG: "a file"}
        file.refuse(f"has the mode of {names.get(kind, 'a special file')}", entry.path)
    if entry.attributes & _DOS_DIRECTORY and not entry.is_directory:
        file.refuse("has the attribute of a directory", entry.path)


def _is_executable(entry: _Entry) -> bool:
    """Tell what pip would: a mode without a file type does not count."""
    mode = entry.attributes >> 16
    return stat.S_ISREG(mode) and bool(mode & 0o111)


# ----------------------------------------------------------------------------------------------------
# Sizes and places


def _check_sizes(file: _File, entries: Sequence[_Entry]) -> None:
    for entry in entries:
        _check_size(file, entry)
    size = sum(entry.size for entry in entries)
    if size > MAX_SIZE:
        file.refuse(f"would unpack to {size} bytes", why=f"at most {MAX_SIZE} are accepted")
    packed = sum(entry.compressed_size for entry in entries)
    if size > RATIO_MATTERS_FROM and size > MAX_RATIO * packed:
        file.refuse(f"would unpack to {size} bytes from {packed}", why=f"at most {MAX_RATIO} to 1 is accepted")


def _check_size(file: _File, entry: _Entry) -> None:
    size, packed = entry.size, entry.compressed_size
    if entry.is_directory and size:
        file.refuse("is a directory with content", entry.path)
    if entry.method == STORED and size != packed:
        file.refuse(f"is stored, but {size} bytes are said to take {packed}", entry.path)
    if entry.method == DEFLATED and (packed == 0 or size > DEFLATE_RATIO * packed):
        file.refuse(f"cannot hold {size} bytes in {packed}", entry.path, why="deflate is not that good")
    if size > MAX_MEMBER_SIZE:
        file.refuse(f"would unpack to {size} bytes", entry.path, why=f"at most {MAX_MEMBER_SIZE} are accepted")
    if size > RATIO_MATTERS_FROM and size > MAX_MEMBER_RATIO * packed:
        why = f"at most {MAX_MEMBER_RATIO} to 1 is accepted"
        file.refuse(f"would unpack to {size} bytes from {packed}", entry.path, why=why)


def _offsets(file: _File, entries: Iterable[_Entry], *, end: int) -> dict[str, int]:
    """Return where each entry's data starts; entries must follow one another without gaps, from 0 to `end`."""
    ordered = sorted(entries, key=lambda entry: entry.header)
    following = [*(entry.header for entry in ordered[1:]), end]
    if ordered[0].header:
        file.refuse(f"has {ordered[0].header} bytes before its first entry")
    offsets = {}
    for entry, limit in zip(ordered, following, strict=True):
        offset = _data_offset(file, entry, limit)
        after = offset + entry.compressed_size
        if after > limit:
            file.refuse("overlaps with what follows it in the archive", entry.path)
        if entry.flags & _HAS_DESCRIPTOR:
            _check_descriptor(file, entry, file.peek(after, min(limit - after, 25)))
        elif after < limit:
            file.refuse(f"is followed by {limit - after} bytes that belong to nothing", entry.path)
        offsets[entry.path] = offset
    return offsets


def _data_offset(file: _File, entry: _Entry, limit: int) -> int:
    """Check the local header against the directory, and return where it ends."""
    guess = _LOCAL.size + len(entry.name) + 36
    header = file.peek(entry.header, guess)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        file.refuse("is not where the directory says", entry.path)
    _, flags, method, crc, compressed_size, size, name_size, extra_size = _LOCAL.unpack_from(header)
    length: int = _LOCAL.size + name_size + extra_size
    if entry.header + length > limit:
        file.refuse("overlaps with what follows it in the archive", entry.path)
    if length > len(header):
        header = file.read(entry.header, length)
    if header[_LOCAL.size : _LOCAL.size + name_size] != entry.name:
        file.refuse("has another name in its own header", entry.path)
    if method != entry.method:
        file.refuse("has another method in its own header", entry.path)
    if (flags ^ entry.flags) & ~_LEVEL:
        file.refuse("has other flags in its own header", entry.path)
    narrow = (crc, compressed_size, size)
    if extra_size or narrow != (entry.crc, entry.compressed_size, entry.size):
        _check_local_sizes(file, entry, narrow, header[_LOCAL.size + name_size : length])
    return entry.header + length


def _check_local_sizes(file: _File, entry: _Entry, narrow: tuple[int, int, int], extra: bytes) -> None:
    """Compare CRC and sizes; writers that learn them too late put zeros, and a descriptor behind the data.

    A zip64 field has both sizes here, and some versions of Python wrote it where the plain fields would do.
    """
    wide = _zip64_extra(file, entry.path, extra)
    if len(wide) not in (0, 16):
        file.refuse("has a zip64 field that does not fit its entry", entry.path)
    size, compressed_size = struct.unpack("<2Q", wide) if wide else (narrow[2], narrow[1])
    late = bool(entry.flags & _HAS_DESCRIPTOR)
    stated = (
        ("CRC", entry.crc, (narrow[0],)),
        ("size", entry.compressed_size, (compressed_size, *((narrow[1],) if narrow[1] != _MAX32 else ()))),
        ("size", entry.size, (size, *((narrow[2],) if narrow[2] != _MAX32 else ()))),
    )
    for what, expected, values in stated:
        if not all(value == expected or (late and value == 0) for value in values):
            file.refuse(f"has another {what} in its own header", entry.path)


def _check_descriptor(file: _File, entry: _Entry, found: bytes) -> None:
    """Check what stands between an entry's data and the next entry: one of the four spellings of a descriptor."""
    numbers = (entry.crc, entry.compressed_size, entry.size)
    forms = [struct.pack("<L2Q", *numbers)]
    if max(numbers) <= _MAX32:
        forms.append(struct.pack("<3L", *numbers))
    if found not in [*forms, *(b"PK\7\x08" + form for form in forms)]:
        file.refuse("has a data descriptor that does not say what the directory does", entry.path)


# ----------------------------------------------------------------------------------------------------
# Metadata


def _identity(file: _File) -> tuple[NormalizedName, Version]:
    try:
        name, version, _, _ = parse_wheel_filename(file.filename)
    except InvalidWheelFilename as error:
        raise WheelError("is not a wheel's name", where=file.filename, why=str(error), tries=_TRIES) from error
    return name, version


def _is_of(stem: str, name: NormalizedName, version: Version) -> bool:
    """Tell whether a directory's NAME-VERSION is the wheel's: spellings differ between build tools."""
    its_name, _, its_version = stem.partition("-")
    try:
        return canonicalize_name(its_name) == name and Version(its_version) == version
    except InvalidVersion:
        return False


def _special_directories(
    file: _File, members: Iterable[str], name: NormalizedName, version: Version
) -> tuple[str, str]:
    top = {path.partition("/")[0] for path in members if "/" in path}
    found = {}
    for suffix in (".dist-info", ".data"):
        directories = sorted(one for one in top if one.endswith(suffix))
        if len(directories) > 1:
            file.refuse(f"has {len(directories)} {suffix} directories", why=", ".join(directories[:5]))
        for one in directories:
            if not _is_of(one.removesuffix(suffix), name, version):
                file.refuse(f"is not the {suffix} directory of {name} {version}", one)
            found[suffix] = one
    if ".dist-info" not in found:
        file.refuse("has no .dist-info directory")
    stem = found[".dist-info"].removesuffix(".dist-info")
    return found[".dist-info"], found.get(".data", f"{stem}.data")


def _content(file: _File, member: Member, limit: int) -> bytes:
    if max(member.size, member.compressed_size) > limit:
        file.refuse(f"has {member.size} bytes", member.path, why=f"at most {limit} are accepted here")
    content = raw = file.read(member.offset, member.compressed_size)
    if member.method == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(raw, member.size + 1)
        except zlib.error as error:
            file.refuse("is damaged", member.path, why=str(error))
        if not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
            file.refuse("does not inflate to what its size says", member.path)
    if len(content) != member.size:
        file.refuse("does not inflate to what its size says", member.path)
    if zlib.crc32(content) != member.crc:
        file.refuse("has another CRC than it should", member.path)
    return content


def _text(file: _File, members: Mapping[str, Member], path: str) -> str:
    if path not in members:
        file.refuse("is missing", path)
    try:
        return _content(file, members[path], MAX_METADATA).decode("utf-8")
    except UnicodeDecodeError as error:
        file.refuse("is not UTF-8", path, why=str(error))


def _check_metadata(file: _File, path: str, text: str, name: NormalizedName, version: Version) -> None:
    raw, _ = parse_email(text)
    if canonicalize_name(raw.get("name", "")) != name:
        file.refuse(f"does not name {name} once", path, why=f"its Name is {raw.get('name')!r}")
    try:
        same = Version(raw.get("version", "")) == version
    except InvalidVersion:
        same = False
    if not same:
        file.refuse(f"does not give version {version} once", path, why=f"its Version is {raw.get('version')!r}")


def _is_purelib(file: _File, path: str, text: str) -> bool:
    """Check the format's version, of which a newer minor one is no reason to stop, and read where files go."""
    fields = parse_metadata_file(text)
    versions, roots = fields.get_all("Wheel-Version", []), fields.get_all("Root-Is-Purelib", [])
    if len(versions) != 1 or not re.fullmatch(r"1\.[0-9]+", str(versions[0]).strip()):
        file.refuse("does not say that this is a wheel of version 1", path, why=f"Wheel-Version: {versions}")
    if len(roots) != 1 or str(roots[0]).strip().lower() not in ("true", "false"):
        file.refuse("does not say where the wheel's files go", path, why=f"Root-Is-Purelib: {roots}")
    return str(roots[0]).strip().lower() == "true"


def _entry_points(file: _File, path: str, text: str) -> tuple[EntryPoint, ...]:
    try:
        found = [EntryPoint(*fields) for fields in parse_entrypoints(text)]
    except (configparser.Error, AssertionError, AttributeError) as error:  # what it cannot match, it asserts
        file.refuse("is not a valid list of entry points", path, why=str(error))
    for one in found:
        # They become a file's name and lines of Python.
        if "/" in one.name or any(_path_problems(one.name)):
            file.refuse(f"has a script that cannot be a file's name: {one.name}", path)
        if not all(part.isidentifier() for part in f"{one.module}.{one.attribute}".split(".")):
            file.refuse(f"has a script that is no Python object: {one.name} = {one.module}:{one.attribute}", path)
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        file.refuse(f"has a script twice: {', '.join(twice)}", path)
    return tuple(found)


# ----------------------------------------------------------------------------------------------------
# RECORD


def _record(
    file: _File, path: str, text: str, members: Mapping[str, Member]
) -> dict[str, tuple[RecordHash | None, int | None]]:
    """Return RECORD's rows; it must list every member once and nothing else, except itself and its signatures."""
    unhashed = {path, f"{path}.jws", f"{path}.p7s"}
    record: dict[str, tuple[RecordHash | None, int | None]] = {}
    try:
        for listed, hash_, size in parse_record_file(io.StringIO(text, newline="")):
            if listed in record:
                file.refuse("is in RECORD twice", listed)
            record[listed] = (_record_hash(file, listed, hash_), _record_size(file, listed, size))
    except (InvalidRecordEntry, csv.Error) as error:
        file.refuse("is damaged", path, why=str(error))
    for listed in sorted(record.keys() - members.keys() - unhashed):
        file.refuse("is in RECORD, but not in the wheel", listed)
    for member in members.values():
        if member.path in unhashed:
            record.setdefault(member.path, (None, None))
        _check_row(file, member, record.get(member.path), hashed=member.path not in unhashed)
    return {listed: record[listed] for listed in members}


def _check_row(file: _File, member: Member, row: tuple[RecordHash | None, int | None] | None, *, hashed: bool) -> None:
    if row is None:
        file.refuse("is not in RECORD", member.path)
    hash_, size = row
    if hashed and hash_ is None:
        file.refuse("has no hash in RECORD", member.path)
    if not hashed and hash_ is not None:
        file.refuse("has a hash in RECORD, which it cannot have", member.path)
    if size is not None and size != member.size:
        file.refuse(f"has {member.size} bytes, but {size} in RECORD", member.path)


def _record_hash(file: _File, path: str, text: str) -> RecordHash | None:
    if not text:
        return None
    algorithm, _, encoded = text.partition("=")
    if algorithm not in DIGEST_SIZES:
        allowed = ", ".join(DIGEST_SIZES)
        file.refuse(f"has a hash in RECORD that is not accepted: {algorithm}", path, why=f"only {allowed}")
    try:
        digest = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != DIGEST_SIZES[algorithm]:
        file.refuse(f"has a hash in RECORD that is no {algorithm}", path)
    return RecordHash(algorithm=algorithm, digest=digest)


def _record_size(file: _File, path: str, text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", text):
        file.refuse("has a size in RECORD that is no number", path)
    return int(text)
