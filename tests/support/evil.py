"""Wheels that must be refused, each for one reason, and the archive writer that can lie to make them."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

FILENAME = "evil-1.0-py3-none-any.whl"
INFORMATION = "evil-1.0.dist-info"
MODULE = "evil/__init__.py"
TEXT = b"def answer():\n    return 42\n" * 20

Overrides = dict[str, int]
Lies = dict[str, Any]
Stage = Literal["open", "inflate"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of an archive. `central` and `local` replace what each header would truthfully say.

    Their keys: flags, method, crc, compressed_size, size; `local` also signature; `central` also disk, attributes,
    offset and name_size. A descriptor given sets the flag that announces it.
    """

    name: str
    content: bytes = b""
    method: int = 8
    raw: bytes | None = None
    mode: int = 0o100644
    central: Overrides = field(default_factory=dict)
    local: Overrides = field(default_factory=dict)
    central_extra: bytes = b""
    local_extra: bytes = b""
    name_bytes: bytes | None = None
    local_name: bytes | None = None
    before: bytes = b""
    descriptor: bytes = b""

    @property
    def encoded(self) -> bytes:
        return self.name.encode() if self.name_bytes is None else self.name_bytes

    @property
    def stream(self) -> bytes:
        if self.raw is not None:
            return self.raw
        return deflated(self.content) if self.method == 8 else self.content

    @property
    def truth(self) -> Overrides:
        return {
            "flags": (0 if self.encoded.isascii() else 0x800) | (8 if self.descriptor else 0),
            "method": self.method,
            "crc": zlib.crc32(self.content),
            "compressed_size": len(self.stream),
            "size": len(self.content),
            "disk": 0,
            "attributes": self.mode << 16,
        }


def deflated(content: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(content) + compressor.flush()


def pack(
    parts: Sequence[Part],
    *,
    prefix: bytes = b"",
    before_end: bytes = b"",
    comment: bytes = b"",
    suffix: bytes = b"",
    end: Overrides | None = None,
    zip64: Overrides | None = None,
    locator: Overrides | None = None,
) -> bytes:
    """Write an archive; `end`, `zip64` and `locator` replace what the end records say, `zip64` asks for one at all."""
    body, directory = bytearray(prefix), bytearray()
    for part in parts:
        body += part.before
        offset = len(body)
        local, central = (
            {**part.truth, "signature": 0x04034B50, **part.local},
            {**part.truth, "offset": offset, **part.central},
        )
        name = part.encoded if part.local_name is None else part.local_name
        body += struct.pack("<L3H4x", local["signature"], 20, local["flags"], local["method"])
        body += struct.pack("<3L", local["crc"], local["compressed_size"], local["size"])
        body += struct.pack("<2H", len(name), len(part.local_extra)) + name + part.local_extra
        body += part.stream + part.descriptor
        directory += struct.pack("<4s2B3H4x", b"PK\1\2", 20, 3, 20, central["flags"], central["method"])
        directory += struct.pack("<3L", central["crc"], central["compressed_size"], central["size"])
        name_size = central.get("name_size", len(part.encoded))
        directory += struct.pack("<3H", name_size, len(part.central_extra), 0)
        directory += struct.pack("<2H2L", central["disk"], 0, central["attributes"], central["offset"])
        directory += part.encoded + part.central_extra
    truth = {"disk": 0, "here": len(parts), "count": len(parts), "size": len(directory), "start": len(body)}
    tail = bytearray(before_end)
    if zip64 is not None:
        said, at = {**truth, "length": 44, **zip64}, len(body) + len(directory) + len(tail)
        tail += struct.pack("<4sQ2H2L", b"PK\6\6", said["length"], 45, 45, said["disk"], 0)
        tail += struct.pack("<4Q", said["here"], said["count"], said["size"], said["start"])
        where = {"disk": 0, "at": at, "disks": 1, **(locator or {})}
        tail += struct.pack("<4sLQL", b"PK\6\7", where["disk"], where["at"], where["disks"])
    said = {**truth, **(end or {})}
    said = {key: min(value, 0xFFFFFFFF if key in ("size", "start") else 0xFFFF) for key, value in said.items()}
    tail += struct.pack("<4s4H", b"PK\5\6", said["disk"], 0, said["here"], said["count"])
    tail += struct.pack("<2LH", said["size"], said["start"], len(comment)) + comment
    return bytes(body + directory + tail + suffix)


# --------------------------------------------------------------------------- wheels


def record_of(parts: Sequence[Part]) -> bytes:
    lines = []
    for part in parts:
        digest = base64.urlsafe_b64encode(hashlib.sha256(part.content).digest()).rstrip(b"=").decode()
        quoted = '"' + part.name.replace('"', '""') + '"'
        lines.append(f"{quoted},sha256={digest},{len(part.content)}\n")
    return "".join([*lines, f"{INFORMATION}/RECORD,,\n"]).encode()


METADATA = Part(name=f"{INFORMATION}/METADATA", content=b"Metadata-Version: 2.1\nName: Evil\nVersion: 1.0\n")
WHEEL = Part(name=f"{INFORMATION}/WHEEL", content=b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")


def wheel_parts(
    *parts: Part, record: bytes | None = None, metadata: Part = METADATA, wheel: Part = WHEEL
) -> list[Part]:
    """Return the entries of a wheel that has these and the usual metadata; RECORD is truthful unless given."""
    listed = [*parts, metadata, wheel]
    content = record_of([part for part in listed if not part.name.endswith("/")]) if record is None else record
    return [*listed, Part(name=f"{INFORMATION}/RECORD", content=content)]


MODULE_PART = Part(name=MODULE, content=TEXT)
GOOD = wheel_parts(MODULE_PART, Part(name="evil/data.bin", content=bytes(range(256)) * 20, method=0))


@dataclass(frozen=True, kw_only=True)
class EvilWheel:
    """A wheel that must be refused: by whoever opens it, or by whoever inflates its members first."""

    title: str
    make: Callable[[], bytes]
    message: str
    filename: str = FILENAME
    stage: Stage = "open"

    @cached_property
    def content(self) -> bytes:
        return self.make()


def _of(title: str, message: str, *parts: Part, stage: Stage = "open", **archive: Any) -> EvilWheel:
    return EvilWheel(title=title, message=message, stage=stage, make=lambda: pack(wheel_parts(*parts), **archive))


def _with(title: str, message: str, *, stage: Stage = "open", **lies: Any) -> EvilWheel:
    """Make a wheel whose one module is not what it should be."""
    return _of(title, message, replace(MODULE_PART, **lies), stage=stage)


def _recorded(title: str, message: str, change: Callable[[bytes], bytes], *, stage: Stage = "open") -> EvilWheel:
    record = change(record_of([MODULE_PART, METADATA, WHEEL]))
    return EvilWheel(
        title=title, message=message, stage=stage, make=lambda: pack(wheel_parts(MODULE_PART, record=record))
    )


def _named(title: str, message: str, name: str) -> EvilWheel:
    return _of(title, message, MODULE_PART, Part(name=name, content=b"x = 1\n"))


def _described(title: str, message: str, text: bytes, which: str) -> EvilWheel:
    part = {"METADATA": METADATA, "WHEEL": WHEEL}.get(which) or Part(name=f"{INFORMATION}/{which}")
    part = replace(part, content=text)
    if which == "METADATA":
        parts = wheel_parts(MODULE_PART, metadata=part)
    elif which == "WHEEL":
        parts = wheel_parts(MODULE_PART, wheel=part)
    else:
        parts = wheel_parts(MODULE_PART, part)
    return EvilWheel(title=title, message=message, make=lambda: pack(parts))


def _without(title: str, message: str, name: str) -> EvilWheel:
    parts = [part for part in GOOD if part.name != f"{INFORMATION}/{name}"]
    if name != "RECORD":
        parts[-1] = replace(parts[-1], content=record_of(parts[:-1]))
    return EvilWheel(title=title, message=message, make=lambda: pack(parts))


def _entries(title: str, message: str, change: Callable[[list[Part]], Sequence[Part]], **archive: Any) -> EvilWheel:
    return EvilWheel(title=title, message=message, make=lambda: pack(change(list(GOOD)), **archive))


def _archive(title: str, message: str, **archive: Any) -> EvilWheel:
    return _entries(title, message, lambda parts: parts, **archive)


def _claims(size: int) -> Lies:
    """Say in every header that the content has this size."""
    return {"central": {"size": size}, "local": {"size": size}}


def _claims64(size: int, compressed_size: int) -> Lies:
    """Say sizes that only zip64 fields can."""
    field = struct.pack("<2H2Q", 1, 16, size, compressed_size)
    return {"central": _FULL, "local": _FULL, "central_extra": field, "local_extra": field}


def _resized(record: bytes, size: bytes) -> bytes:
    """Put another size into the first row."""
    row, _, rest = record.partition(b"\n")
    return row.rpartition(b",")[0] + b"," + size + b"\n" + rest


def _rehashed(record: bytes, hash_: bytes) -> bytes:
    """Put another hash into the first row."""
    row, _, rest = record.partition(b"\n")
    name, _, size = row.split(b",")
    return b",".join((name, hash_, size)) + b"\n" + rest


def _sized(title: str, message: str, size: int) -> EvilWheel:
    """Make a wheel in which all but the stream itself agree about a size."""
    parts = wheel_parts(
        replace(MODULE_PART, **_claims(size)),
        record=_resized(record_of([MODULE_PART, METADATA, WHEEL]), b"%d" % size),
    )
    return EvilWheel(title=title, message=message, stage="inflate", make=lambda: pack(parts))


def _overlapping() -> bytes:
    """Make two members whose data is the same bytes: the trick behind the best zip bombs."""
    inner = Part(name="evil/inner.py", content=TEXT)
    header = struct.pack("<4s3H4x3L2H", b"PK\3\4", 20, 0, 8, zlib.crc32(TEXT), len(inner.stream), len(TEXT), 13, 0)
    stored = header + b"evil/inner.py" + inner.stream
    outer = Part(name="evil/outer.bin", content=stored, method=0)
    parts = wheel_parts(outer, inner)
    offset = 30 + len(outer.encoded)
    # The inner entry is listed, and lies inside the outer; its own copy is left out of the body.
    listed = [part if part is not inner else replace(part, central={"offset": offset}) for part in parts]
    whole = pack(listed)
    start = offset + len(stored)
    body = whole[:start] + whole[start + len(stored) :]
    return _moved(body, by=-len(stored), beyond=start)


def _moved(archive: bytes, *, by: int, beyond: int) -> bytes:
    """Correct the offsets of an archive from which bytes were cut."""
    moved = bytearray(archive)
    (size, start) = struct.unpack_from("<2L", moved, len(moved) - 10)
    struct.pack_into("<L", moved, len(moved) - 6, start + by)
    at = start + by
    while at < start + by + size:
        name, extra, comment = struct.unpack_from("<3H", moved, at + 28)
        (offset,) = struct.unpack_from("<L", moved, at + 42)
        if offset >= beyond:
            struct.pack_into("<L", moved, at + 42, offset + by)
        at += 46 + name + extra + comment
    return bytes(moved)


def _many() -> bytes:
    """Make 200 001 empty entries, without the time that `pack` would take."""
    count = 200_001
    names = [b"%06d" % number for number in range(count)]
    local = struct.pack("<4s3H4x3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 6, 0)
    central = struct.pack("<4s2B3H4x3L3H2HL", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0o100644 << 16)
    body = b"".join(local + name for name in names)
    directory = b"".join(central + struct.pack("<L", 36 * number) + name for number, name in enumerate(names))
    tail = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(body))
    tail += struct.pack("<4sLQL", b"PK\6\7", 0, len(body) + len(directory), 1)
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), len(body), 0)
    return body + directory + tail


def _several_bombs() -> list[Part]:
    """Make members that each keep the limit of a member, and together break that of a wheel."""
    noise = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(300))
    return wheel_parts(*(Part(name=f"evil/{n}.bin", content=noise + bytes(8 << 20)) for n in range(3)))


_STREAM = deflated(TEXT)
_SIZES64 = struct.pack("<2H2Q", 1, 16, len(TEXT), len(_STREAM))
_LIES64 = struct.pack("<2H2Q", 1, 16, len(TEXT) + 1, len(_STREAM))
_FULL = {"compressed_size": 0xFFFFFFFF, "size": 0xFFFFFFFF}
_DESCRIPTOR = struct.pack("<4s3L", b"PK\7\x08", zlib.crc32(TEXT), len(_STREAM), len(TEXT))
_EMPTY = {"crc": 0, "compressed_size": 0, "size": 0}

EVIL: tuple[EvilWheel, ...] = (
    # Names
    _named("traversal", r"evil/\.\./\.\./x\.py: has a name that leaves its directory", "evil/../../x.py"),
    _named("traversal at once", "has a name that leaves its directory", "../x.py"),
    _named("dot part", "has a name that leaves its directory, or points to itself", "evil/./x.py"),
    _named("absolute path", "/etc/x.py: has an absolute name", "/etc/x.py"),
    _named("drive letter", "C:/x.py: has a name with a drive letter", "C:/x.py"),
    _named("backslash", "has a name with a backslash", "evil\\..\\x.py"),
    _named("empty part", "has a name with an empty part", "evil//x.py"),
    _named("no name", "has a name with an empty part", ""),
    _named("NUL", r"'evil/x\.py\\x00\.txt': has a name with control characters", "evil/x.py\0.txt"),
    _named("line end", "has a name with control characters", "evil/x.py\nevil/y.py"),
    _named("terminal escape", r"\\x1b\[2J.*: has a name with control characters", "evil/\x1b[2J.py"),
    _named("not composed", r"\(NFC\)", "evil/e\u0301.py"),
    _named("long part", "a part of more than 255 bytes", f"evil/{'x' * 256}"),
    _named("long part of few letters", "a part of more than 255 bytes", f"evil/{'ä' * 128}"),
    _named("long name", "has a name of more than 4096 bytes", "evil/" * 820),
    _of("not UTF-8", "name that is not UTF-8", Part(name="evil/x", name_bytes=b"evil/\xff\xfe.py")),
    _of("not marked as UTF-8", "not marked as such", Part(name="evil/ä", central={"flags": 0}, local={"flags": 0})),
    # What it is
    _with("symlink mode", f"{MODULE}: has the mode of a symbolic link", mode=0o120777, content=b"/etc/passwd"),
    _with("device mode", "has the mode of a special file", mode=0o020644),
    _with("pipe mode", "has the mode of a special file", mode=0o010644),
    _with("directory mode", "has the mode of a directory", mode=0o040755),
    _with("directory attribute", "attribute of a directory", central={"attributes": 0o100644 << 16 | 0x10}),
    _of("directory that is a file", "has the mode of a file", MODULE_PART, Part(name="evil/", method=0)),
    _of("directory with content", "is a directory with content", Part(name="x/", content=b"x", mode=0o40755)),
    # Names against each other
    _of("duplicate names", f"{MODULE}: is in the archive twice", MODULE_PART, MODULE_PART),
    _of(
        "duplicate names, other content",
        f"{MODULE}: is in the archive twice",
        MODULE_PART,
        replace(MODULE_PART, content=b"import os\n"),
    ),
    _of("file below a file", "evil: is both a file and a directory", MODULE_PART, Part(name="evil", content=b"x")),
    _of(
        "file and directory",
        "evil/x: is both a file and a directory",
        Part(name="evil/x"),
        Part(name="evil/x/", method=0, mode=0o40755),
    ),
    # Methods and flags
    _with("encrypted", f"{MODULE}: is encrypted", central={"flags": 1}, local={"flags": 1}),
    _with("unknown method", f"{MODULE}: is compressed with method 12", central={"method": 12}, local={"method": 12}),
    _with("unknown flag", "zip flags with an unknown meaning", central={"flags": 0x2000}, local={"flags": 0x2000}),
    # Local against central header
    _with("local name differs", f"{MODULE}: has another name in its own", local_name=b"evil/__init__.PY"),
    _with("local name is longer", f"{MODULE}: has another name in its own", local_name=b"evil/__init__.py/../../x"),
    _with("local method differs", f"{MODULE}: has another method in its own", local={"method": 0}),
    _with("local size differs", f"{MODULE}: has another size in its own", local={"size": 5}),
    _with("local packed size differs", f"{MODULE}: has another size in its own", local={"compressed_size": 5}),
    _with("local CRC differs", f"{MODULE}: has another CRC in its own", local={"crc": 5}),
    _with("local flags differ", f"{MODULE}: has other flags in its own", local={"flags": 8}),
    _with("local sizes zero, no descriptor", "has another CRC in its own", local=_EMPTY),
    _with("no local header", f"{MODULE}: is not where the directory says", local={"signature": 0}),
    _with("local extra field that is cut off", f"{MODULE}: has damaged extra fields", local_extra=b"\1\0\x10\0abc"),
    _with("local extra field of 2 bytes", f"{MODULE}: has damaged extra fields", local_extra=b"\1\0"),
    # Data descriptors
    _with("no descriptor where one is said", "descriptor that does not say", central={"flags": 8}, local={"flags": 8}),
    _with("descriptor with another CRC", "descriptor that does not say", descriptor=b"PK\7\x08" + bytes(12)),
    _with("descriptor with another size", "descriptor that does not say", descriptor=_DESCRIPTOR[:-1] + b"\1"),
    _with("descriptor and more", "descriptor that does not say", descriptor=_DESCRIPTOR + b"x"),
    _with("descriptor, and a header that lies", "has another size", descriptor=_DESCRIPTOR, local={"size": 1}),
    # Places
    EvilWheel(title="overlap", message=r"evil/outer\.bin: overlaps with what follows", make=_overlapping),
    _of(
        "two entries of the same data",
        "overlaps with what follows",
        MODULE_PART,
        Part(name="evil/b.py", content=TEXT, central={"offset": 0}, local_name=MODULE.encode()),
    ),
    _with("past the directory", "overlaps", central={"compressed_size": 9 << 20}, local={"compressed_size": 9 << 20}),
    _archive("bytes before the first entry", "has 7 bytes before its first entry", prefix=b"#!/bin/"),
    _entries(
        "bytes between entries",
        f"{MODULE}: is followed by 5 bytes that belong to nothing",
        lambda parts: [parts[0], replace(parts[1], before=b"12345"), *parts[2:]],
    ),
    _archive("bytes before the end record", "has 5 bytes that belong to nothing", before_end=b"12345"),
    _archive("trailing data", "has 5 bytes after its end record", suffix=b"12345"),
    _archive("comment", "has an archive comment", comment=b"hello"),
    _archive("two end records", "has several end records", before_end=pack(GOOD)[-22:]),
    EvilWheel(
        title="archive after an archive", message="has several end records", make=lambda: pack(GOOD) + pack(GOOD)
    ),
    _archive(
        "end record in the comment",
        "has 22 bytes after its end record|has an archive comment|is an empty archive",
        comment=pack([]),
    ),
    EvilWheel(title="cut off", message="no end record", make=lambda: pack(GOOD)[:-30]),
    EvilWheel(title="cut in the end record", message="no end record", make=lambda: pack(GOOD)[:-1]),
    EvilWheel(title="nothing", message="too short for a zip archive", make=lambda: b""),
    EvilWheel(title="no zip", message="no end record", make=lambda: b"<html>not found</html>" * 9),
    EvilWheel(title="empty archive", message="is an empty archive", make=lambda: pack([])),
    # The directory
    _archive("fewer entries than said", "entry 6 of 6 is missing", end={"here": 6, "count": 6}),
    _archive("more entries than said", "belong to none of the 4 entries", end={"here": 4, "count": 4}),
    _archive("directory too long", "directory that reaches past its end record", end={"size": 1 << 20}),
    _archive("multi-disk", "one part of an archive in several", end={"disk": 1}),
    _archive("entries on other disks", "one part of an archive in several", end={"here": 1}),
    _with("entry on another disk", f"{MODULE}: is said to be in another part", central={"disk": 1}),
    _entries(
        "directory that is cut off",
        "entry 5 of 5 is cut off",
        lambda parts: [*parts[:-1], replace(parts[-1], central={"name_size": 60_000})],
    ),
    # Extra fields
    _with("extra field that is cut off", f"{MODULE}: has damaged extra fields", central_extra=b"UT\x10\0abc"),
    _with("extra field of 3 bytes", f"{MODULE}: has damaged extra fields", central_extra=b"UT\x10"),
    _with("second name", "let readers see different things", central_extra=b"up\x06\0\1abcdx"),
    _with("two zip64 fields", "let readers see different things", central_extra=b"\1\0\0\0" * 2),
    _with("zip64 field for nothing", "zip64 field that does not fit", central_extra=_SIZES64),
    _with("zip64 field missing", "zip64 field that does not fit", central=_FULL, local={}),
    _with(
        "zip64 field too short",
        "zip64 field that does not fit",
        central=_FULL,
        central_extra=struct.pack("<2HQ", 1, 8, len(TEXT)),
    ),
    _with("zip64 field of odd size in its own header", "does not fit", local_extra=struct.pack("<2HQ", 1, 8, 20)),
    _with("zip64 lie in its own header", "has another size in its own", local=_FULL, local_extra=_LIES64),
    _with("zip64 field against plain ones", "has another size in its own", local_extra=_LIES64),
    # Zip64 end records
    _archive("zip64 says other size", "two end records that disagree", zip64={"size": 5}),
    _archive("zip64 says other count", "two end records that disagree", zip64={"here": 3, "count": 3}),
    _archive("zip64 of odd length", "damaged zip64 end record", zip64={"length": 45}),
    _archive("zip64 elsewhere", "zip64 end record that is not where it should be", zip64={}, locator={"at": 0}),
    _archive("zip64 multi-disk", "one part of an archive in several", zip64={}, locator={"disks": 2}),
    # Bombs
    _with("bomb by ratio", r"would unpack to \d+ bytes from \d+", content=bytes(32 << 20)),
    EvilWheel(
        title="bomb by ratio of the whole", message=f"^{FILENAME}: would unpack", make=lambda: pack(_several_bombs())
    ),
    EvilWheel(title="bomb by count", message="has 200001 entries", make=_many),
    _with("more than deflate can hold", "cannot hold 65536 bytes in", content=TEXT, **_claims(1 << 16)),
    _with("no stream at all", "cannot hold 0 bytes in 0", content=b"", raw=b""),
    _with("stored, other size", "is stored, but", method=0, **_claims(17)),
    _with("huge", f"{MODULE}: would unpack to {1 << 40} bytes", **_claims64(1 << 40, 1 << 39)),
    _of(
        "huge together",
        rf"^{FILENAME}: would unpack to \d+ bytes",
        *(Part(name=f"evil/{n}.bin", **_claims64(15 << 30, 14 << 30)) for n in range(5)),
    ),
    # Metadata
    _without("no RECORD", "RECORD: is missing", "RECORD"),
    _without("no METADATA", "METADATA: is missing", "METADATA"),
    _without("no WHEEL", "WHEEL: is missing", "WHEEL"),
    _described("other name", "METADATA: does not name evil once", b"Name: good\nVersion: 1.0\n", "METADATA"),
    _described("two names", "METADATA: does not name evil once", b"Name: evil\nName: x\nVersion: 1.0\n", "METADATA"),
    _described("other version", r"does not give version 1\.0 once", b"Name: evil\nVersion: 1.1\n", "METADATA"),
    _described("no version", r"does not give version 1\.0 once", b"Name: evil\n", "METADATA"),
    _described("METADATA not UTF-8", "METADATA: is not UTF-8", b"Name: evil\nVersion: 1.0\nAuthor: \xff\n", "METADATA"),
    _described("wheel version 2", "wheel of version 1", b"Wheel-Version: 2.0\nRoot-Is-Purelib: true\n", "WHEEL"),
    _described("no wheel version", "wheel of version 1", b"Root-Is-Purelib: true\n", "WHEEL"),
    _described("no root", "where the wheel's files go", b"Wheel-Version: 1.0\n", "WHEEL"),
    _named("two dist-info directories", r"has 2 \.dist-info directories", "other-1.0.dist-info/METADATA"),
    _named(
        "data of another", r"other-1\.0\.data: is not the \.data directory of evil 1\.0", "other-1.0.data/purelib/x"
    ),
    EvilWheel(
        title="other project",
        filename="good-1.0-py3-none-any.whl",
        message=rf"{INFORMATION}: is not the \.dist-info directory of good 1\.0",
        make=lambda: pack(GOOD),
    ),
    EvilWheel(title="no wheel's name", filename="evil.whl", message="is not a wheel's name", make=lambda: pack(GOOD)),
    _described("entry points that cannot be parsed", "not a valid list", b"[console_scripts\nx\n", "entry_points.txt"),
    _described("entry point without object", "not a valid list", b"[console_scripts]\nx = a\n", "entry_points.txt"),
    _described(
        "entry point that is code", "not a valid|no Python", b"[gui_scripts]\nx = a:b();c\n", "entry_points.txt"
    ),
    _described("entry point that is no name", "no Python", b"[console_scripts]\nx = a..b:c\n", "entry_points.txt"),
    _described("entry point with a path", "cannot be a file", b"[console_scripts]\n../x = a:b\n", "entry_points.txt"),
    _described("entry point with dots", "cannot be a file", b"[console_scripts]\n.. = a:b\n", "entry_points.txt"),
    _described(
        "entry point twice",
        "has a script twice: x",
        b"[console_scripts]\nx = a:b\n[gui_scripts]\nx = a:c\n",
        "entry_points.txt",
    ),
    # RECORD
    _recorded("missing RECORD row", f"{MODULE}: is not in RECORD", lambda record: record.partition(b"\n")[2]),
    _entries(
        "extra unlisted file", "evil/extra.py: is not in RECORD", lambda parts: [*parts, Part(name="evil/extra.py")]
    ),
    _recorded("row too many", "evil/gone.py: is in RECORD, but not", lambda record: record + b"evil/gone.py,,\n"),
    _recorded("row twice", f"{MODULE}: is in RECORD twice", lambda record: record + record.partition(b"\n")[0] + b"\n"),
    _recorded("wrong RECORD size", rf"{MODULE}: has \d+ bytes, but 7 in RECORD", lambda record: _resized(record, b"7")),
    _recorded("RECORD size no number", "is no number", lambda record: _resized(record, b"-1")),
    _recorded("RECORD size of fancy digits", "is no number", lambda record: _resized(record, "٣".encode())),
    _recorded("RECORD row of 2", "RECORD: is damaged", lambda record: record + b"a,b\n"),
    _recorded("RECORD with an open quote", "RECORD: is damaged", lambda record: record + b'"a,,\n'),
    _recorded("no hash", f"{MODULE}: has no hash in RECORD", lambda record: _rehashed(record, b"")),
    _recorded("weak hash", "hash in RECORD that is not accepted: md5", lambda record: _rehashed(record, b"md5=AAAA")),
    _recorded("short hash", "hash in RECORD that is no sha256", lambda record: _rehashed(record, b"sha256=AAAA")),
    _recorded(
        "hash no base64", "hash in RECORD that is no sha256", lambda record: _rehashed(record, b"sha256=\xc3\xa4?")
    ),
    _recorded(
        "RECORD with a hash of itself",
        "RECORD: has a hash in RECORD",
        lambda record: record.replace(b"RECORD,,", b"RECORD,sha256=" + b"A" * 43 + b","),
    ),
    # What shows only in the members' content
    _with("wrong CRC", "checksum|CRC", stage="inflate", central={"crc": 7}, local={"crc": 7}),
    _recorded(
        "wrong RECORD hash",
        "RECORD",
        lambda record: _rehashed(record, b"sha256=" + b"A" * 43),
        stage="inflate",
    ),
    _with("garbage after the stream", "after its end", stage="inflate", raw=_STREAM + b"garbage"),
    _with("second stream", "after its end", stage="inflate", raw=_STREAM + _STREAM),
    _with("stream cut off", "too early|damaged|not as large", stage="inflate", raw=_STREAM[:-4]),
    _with("no deflate stream", "damaged|too early", stage="inflate", raw=b"\xff" * 40),
    _sized("shorter than said", "not as large|size", len(TEXT) + 9),
    _sized("longer than said", "larger|size", len(TEXT) - 9),
)
