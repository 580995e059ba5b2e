"""Wheels → the recipe of a layer: their own deflate streams, unchanged, between small members of ours.

A wheel is a zip of deflate streams; a layer is a gzip of a tar; gzip allows many members, and zip and gzip share the
CRC-32 and the size behind a stream. So a file's raw stream is a gzip member once ten bytes stand before it and eight
behind it, and members with tar headers stand between. Nothing large is compressed; what costs time is what cannot be
left out: every stream is inflated once, which verifies it and gives the digest of the tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

try:
    from isal import isal_zlib as inflater
except ImportError:  # a processor it is not built for
    import zlib as inflater  # type: ignore[no-redef]

from builder import tar
from builder.compress import member as gzip_member
from builder.engines.oci.evidence import Witness, witness
from builder.engines.oci.install import DIRECTORY, SITE, Placed
from builder.engines.oci.recipe import Recipe
from builder.engines.oci.wheel import Member, RecordHash, Wheel
from builder.errors import WheelError
from builder.layout import MEDIA_LAYER_GZIP, Descriptor, Layer
from builder.sha256 import Hasher, Stream

RECIPE = 1
"""Raise it with every change of the bytes of a layer: it is part of the key under which a layer is remembered."""
TIME = 315_619_200
"""1980-01-02 in UTC, for every file: a layer depends on its wheels alone, and zip, which users may put the files into,
knows no earlier day in any time zone."""
INLINE = 4096
"""Files below this many bytes are compressed anew, together with the headers around them: a member of its own takes
18 bytes and loses what neighbours have in common. 70 % of a CUDA cell's files are that small, 0.3 % of its bytes."""
_FLUSH = 1 << 20
"""Bytes of headers and small files after which a member is closed; bounds memory."""
_PIECE = 256 << 10
"""Compressed bytes inflated at a time; what comes out still is in the processor's cache when it is hashed."""
_OUT = 1 << 20
_ALONE = 64 << 10
"""Bytes below which a file is held to RECORD at once: passing it on to be hashed side by side would cost more."""
_BLOCK = 65_535
"""Longest stored block of deflate."""
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"

Advance = Callable[[int], None]
"""Called with the number of compressed bytes that were worked through since the last call."""


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """A layer made of wheels: its recipe, what no wheel has of it, the paths each wheel owns, what its bytes say."""

    recipe: Recipe
    literals: bytes
    paths: Mapping[str, Mapping[str, str]]
    facts: Mapping[str, Any]


class _Digest(Protocol):
    """Hashes a file: one of `hashlib`, or a stream that is hashed beside others."""

    def update(self, content: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


@dataclass
class _Layer:
    """Takes a tar, in order: bytes of ours, and members of wheels; passes both forms on to be hashed."""

    hasher: Hasher
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    literals: bytearray = field(default_factory=bytearray)
    size: int = 0

    def __post_init__(self) -> None:
        self.blob, self.tar = self.hasher.stream(), self.hasher.stream()
        self._pending = bytearray()
        self._noted = 0
        self._streams: list[_Stream] = []

    def write(self, content: bytes) -> None:
        """Append bytes of the tar that are in no wheel, or too few to stay as they are."""
        self._pending += content
        if len(self._pending) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Close the member that holds what was written."""
        if self._pending:
            content = bytes(self._pending)
            self._pending.clear()
            self.tar.update(content)
            self.literal(gzip_member(content))

    def literal(self, raw: bytes) -> None:
        """Append bytes of the blob."""
        self.literals += raw
        self.blob.update(raw)
        self.size += len(raw)

    def taken(self, source: int, offset: int, length: int) -> None:
        """Note that bytes of a source stand here; the caller has hashed them."""
        if len(self.literals) > self._noted:
            self.segments.append((0, self._noted, len(self.literals) - self._noted))
            self._noted = len(self.literals)
        if length:
            self.segments.append((source, offset, length))
        self.size += length

    def promised(self, size: int, promise: RecordHash) -> _Digest:
        """Return what hashes a file of that size to hold it to RECORD."""
        if promise.algorithm == "sha256" and size >= _ALONE:
            return self.hasher.stream()
        return hashlib.new(promise.algorithm)

    def keep(self, stream: _Stream) -> None:
        """Hold a file to RECORD in the end: until then it need not have been hashed."""
        self._streams.append(stream)

    def require_promised(self) -> None:
        """Raise WheelError unless all that were kept are what RECORD says."""
        for stream in self._streams:
            stream.require_promised()


def splice(
    wheels: Sequence[tuple[Wheel, Sequence[Placed]]], *, hasher: Hasher, advance: Advance | None = None
) -> Spliced:
    """Make the layer that holds the files of `wheels`.

    Raises WheelError if a stream is not what the zip and the record say of it, or if two wheels want one path.
    """
    layer = _Layer(hasher)
    owners: dict[str, tuple[str, str]] = {}
    facts: dict[str, Any] = {}
    directories: set[str] = set()
    files = sorted(
        ((file, number) for number, (_, placed) in enumerate(wheels) for file in placed), key=lambda it: it[0].path
    )
    with _opened((wheel for wheel, _ in wheels), advance or (lambda _: None)) as sources:
        for file, number in files:
            wheel = wheels[number][0]
            owner = wheel.filename, _identity(file)
            if file.path in owners:
                require_equal(file.path, owners[file.path], owner)
                continue
            owners[file.path] = owner
            for directory in parents(file.path, directories):
                layer.write(tar.header(directory))
            observer = witness(file.path.removeprefix(f"{SITE}/"))
            _place(layer, file, sources[number], observer)
            if observer is not None:
                facts |= observer.facts()
        layer.write(tar.END)
        layer.flush()
        layer.taken(0, 0, 0)
    layer.require_promised()
    literals = bytes(layer.literals)
    digest, diff_id = layer.blob.hexdigest(), layer.tar.hexdigest()
    blob = Descriptor(media_type=MEDIA_LAYER_GZIP, digest=f"sha256:{digest}", size=layer.size)
    recipe = Recipe(
        layer=Layer(blob=blob, diff_id=f"sha256:{diff_id}"),
        sources=(hashlib.sha256(literals).hexdigest(), *(wheel.sha256 for wheel, _ in wheels)),
        segments=tuple(layer.segments),
    )
    paths = {wheel.filename: {file.path: _identity(file) for file in placed} for wheel, placed in wheels}
    return Spliced(recipe=recipe, literals=literals, paths=paths, facts=facts)


def require_equal(path: str, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Raise WheelError unless two wheels (name, hash of the content) bring the same file to one path."""
    if one[1] != other[1]:
        raise WheelError(
            f"{one[0]} and {other[0]} both install /{path}, with different content",
            why="which of them a user would get depends on the order in which they are installed",
            tries=("leave one of the two packages out of the variant, or pin versions that agree",),
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A wheel that files are taken from: its place among the recipe's sources, and its open file."""

    wheel: Wheel
    index: int
    descriptor: int
    advance: Advance

    def raw(self, member: Member, length: int) -> Iterator[bytes]:
        """Yield a member's bytes as they are in the wheel, fewer if the file ends before it does: `finish` says so."""
        at, end = member.offset, member.offset + member.compressed_size
        while at < end and (raw := os.pread(self.descriptor, min(length, end - at), at)):
            at += len(raw)
            yield raw
            self.advance(len(raw))


@contextlib.contextmanager
def _opened(wheels: Iterable[Wheel], advance: Advance) -> Iterator[list[_Source]]:
    """Hold the wheels' files open."""
    with contextlib.ExitStack() as stack:
        files = [(wheel, stack.enter_context(wheel.path.open("rb"))) for wheel in wheels]
        yield [
            _Source(wheel=wheel, index=index, descriptor=file.fileno(), advance=advance)
            for index, (wheel, file) in enumerate(files, 1)
        ]


def _identity(file: Placed) -> str:
    """Return what identifies a file's content and mode: "sha256=…" in hex."""
    if file.content is not None:
        return f"sha256={hashlib.sha256(file.content).hexdigest()}:{file.mode:o}"
    assert file.promised is not None, file.path
    return f"{file.promised.algorithm}={file.promised.digest.hex()}:{file.mode:o}"


def parents(path: str, seen: set[str]) -> Iterator[tar.Entry]:
    """Yield the directories above `path` that the layer does not have yet: implicit ones trouble some readers."""
    missing = []
    while (path := path.rpartition("/")[0]) and path not in seen:
        missing.append(path)
    for name in reversed(missing):
        seen.add(name)
        # The first is the system's own, /opt; the rest belongs to the environment.
        mode = DIRECTORY if "/" in name else 0o755
        yield tar.Entry(path=name, kind=tar.Kind.DIRECTORY, mode=mode, mtime=TIME)


def _place(layer: _Layer, file: Placed, source: _Source, observer: Witness | None) -> None:
    """Append one file: header, content, padding."""
    size = len(file.content) if file.content is not None else file.member.size if file.member else 0
    content = file.content if file.content is not None else b""
    entry = tar.Entry(
        path=file.path, kind=tar.Kind.FILE, mode=file.mode, mtime=TIME, size=size, content=lambda: (content,)
    )
    layer.write(tar.header(entry))
    if file.member is None:
        layer.write(content)
    else:
        assert file.promised is not None, file.path
        promised = layer.promised(size, file.promised)
        stream = _Stream(source.wheel, file.member, file.promised, promised, observer)
        if size < INLINE:
            # Not at once: nothing keeps the stream of a small file from being endless.
            for raw in source.raw(file.member, _PIECE):
                for piece in stream.inflate(raw):
                    layer.write(piece)
            for piece in stream.rest():
                layer.write(piece)
        else:
            layer.flush()
            layer.literal(_HEADER)
            (_deflated if file.member.method else _stored)(layer, stream, file.member, source)
            layer.literal(struct.pack("<II", file.member.crc, size & 0xFFFFFFFF))
        stream.finish()
        if isinstance(promised, Stream):
            layer.keep(stream)
        else:
            stream.require_promised()
    layer.write(tar.padding(size))


def _deflated(layer: _Layer, stream: _Stream, member: Member, source: _Source) -> None:
    """Append a deflate stream as it is."""
    for raw in source.raw(member, _PIECE):
        layer.blob.update(raw)
        for piece in stream.inflate(raw):
            layer.tar.update(piece)
    for piece in stream.rest():
        layer.tar.update(piece)
    layer.taken(source.index, member.offset, member.compressed_size)


def _stored(layer: _Layer, stream: _Stream, member: Member, source: _Source) -> None:
    """Append a member that is not compressed, in stored blocks."""
    at, end = member.offset, member.offset + member.size
    for raw in source.raw(member, _BLOCK):
        layer.literal(struct.pack("<BHH", at + len(raw) == end, len(raw), len(raw) ^ 0xFFFF))
        layer.blob.update(raw)
        layer.taken(source.index, at, len(raw))
        for piece in stream.inflate(raw):
            layer.tar.update(piece)
        at += len(raw)


class _Stream:
    """Inflates one member and holds it to what the zip and the record say of it."""

    def __init__(
        self, wheel: Wheel, member: Member, promised: RecordHash, digest: _Digest, observer: Witness | None
    ) -> None:
        self._wheel, self._member, self._promised, self._observer = wheel, member, promised, observer
        self._inflater = inflater.decompressobj(-15) if member.method else None
        self._digest = digest
        self._crc, self._size = 0, 0

    def inflate(self, raw: bytes) -> Iterator[bytes]:
        """Yield what the next compressed bytes hold, a megabyte at a time however much that is."""
        while raw:
            if self._inflater is None:
                piece, raw = raw, b""
            else:
                try:
                    piece = self._inflater.decompress(raw, _OUT)
                except inflater.error as error:  # type: ignore[misc] # its stub says otherwise
                    raise self._error("its compressed data is damaged", str(error)) from None
                raw = self._inflater.unconsumed_tail
                self._require_nothing_after()
            yield self._checked(piece)

    def rest(self) -> Iterator[bytes]:
        """Yield what the inflater still holds after the last compressed byte: a part of one match."""
        if self._inflater is not None and not self._inflater.eof:
            yield self._checked(self._inflater.flush())
            # The last bytes may have been taken in before the stream's end was reached.
            self._require_nothing_after()

    def _require_nothing_after(self) -> None:
        if self._inflater is not None and self._inflater.unused_data:
            raise self._error("its compressed data goes on after its end", "nothing may hide there")

    def _checked(self, piece: bytes) -> bytes:
        self._size += len(piece)
        if self._size > self._member.size:
            raise self._error("it is larger than the zip says", f"declared: {self._member.size} bytes")
        self._crc = inflater.crc32(piece, self._crc)
        self._digest.update(piece)
        if self._observer is not None:
            self._observer.see(piece)
        return piece

    def finish(self) -> None:
        """Raise WheelError unless all came that the zip says."""
        if self._inflater is not None and not self._inflater.eof:
            raise self._error("its compressed data ends too early", f"{self._size} bytes came out")
        if self._size != self._member.size:
            raise self._error(
                "it is not as large as the zip says", f"{self._member.size} bytes declared, {self._size} found"
            )
        if self._crc != self._member.crc:
            raise self._error("its checksum is wrong", f"CRC-32 {self._member.crc:08x} declared, {self._crc:08x} found")

    def require_promised(self) -> None:
        """Raise WheelError unless what came is what RECORD says; waits until it has been hashed."""
        found = self._digest.digest()
        if found != self._promised.digest:
            raise self._error(
                "it is not what RECORD says",
                f"{self._promised.algorithm} {self._promised.digest.hex()} recorded, {found.hex()} found",
            )

    def _error(self, what: str, why: str) -> WheelError:
        return WheelError(
            f"{self._wheel.filename}: {self._member.path}: {what}",
            why=why,
            tries=(
                "the file has the hash that was locked: report it to those who publish it, and lock another version",
            ),
        )
