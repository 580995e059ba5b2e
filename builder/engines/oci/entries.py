"""What lies in a layer, entry by entry: of a layer made of wheels without inflating their files.

In such a layer headers lie in members of ours, which are small, and a file of a wheel is a hole of known size between
them. So its tar can be walked through in a fraction of the time that inflating it takes; whoever wants the content of a
file gets it inflated by itself.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from builder import tar
from builder.engines.oci import recipe
from builder.engines.oci.foundation import open_tar
from builder.engines.oci.recipe import Recipe
from builder.layout import Layer
from builder.store import Store

if TYPE_CHECKING:
    from typing import BinaryIO

    from _typeshed import WriteableBuffer

MOST = 64 << 20
"""Bytes of a file that are read at most; dpkg's list of what is installed has less than one."""

_PLAIN = b"\x1f\x8b\x08\0"
"""How a gzip member begins whose header has ten bytes."""
_HEADER = 10
"""Bytes of such a header."""
_TRAILER = struct.Struct("<II")
"""What stands behind a member: the CRC-32 and the size of what it holds."""
_BLOCK = struct.Struct("<BHH")
"""What stands before a block that is stored: whether it is the last, its length, and that inverted."""

Wanted = Callable[[str], bool]
"""Tells by its path whether the content of a file is wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of a layer; `content` is that of a regular file that was wanted, at most MOST bytes of it."""

    path: str
    """Relative to the root of the image."""
    is_directory: bool
    content: bytes | None = None


def entries(store: Store, layer: Layer, wanted: Wanted) -> Iterator[Entry]:
    """Yield what lies in a layer, in the order of its tar.

    A recipe is taken at its word here: that it gives the layer's digest is checked whenever the layer is read. Raises
    HashMismatchError or SourceError if something was damaged in the store or lost, CellFailedError if a layer is whole
    and cannot be read.
    """
    made = recipe.find(store, layer.blob.sha256)
    found = _skimmed(store, made, wanted) if made is not None else None
    if found is not None:
        yield from found
        return
    with open_tar(store, layer) as file, tarfile.open(fileobj=file, mode="r|") as archive:

        def read(info: tarfile.TarInfo) -> bytes:
            content = archive.extractfile(info)
            assert content is not None, "a regular file has content"
            return content.read(MOST)

        for info in archive:
            yield _entry(info, wanted, read)


def _entry(info: tarfile.TarInfo, wanted: Wanted, read: Callable[[tarfile.TarInfo], bytes]) -> Entry:
    path = info.name.removeprefix("./").strip("/")
    return Entry(path=path, is_directory=info.isdir(), content=read(info) if info.isreg() and wanted(path) else None)


# ----------------------------------------------------------------------------------------------------
# Layers made of wheels


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extent:
    """A part of the tar: bytes of ours, or the place of a wheel's in its file."""

    size: int
    literal: bytes | None = None
    source: int = 0
    offset: int = 0
    length: int = 0
    """Bytes there; as many as come out if they are stored."""
    is_deflated: bool = False


def _skimmed(store: Store, made: Recipe, wanted: Wanted) -> list[Entry] | None:
    """Return what lies in a layer that was spliced; None if it does not look like one, or cannot be read."""
    with contextlib.ExitStack() as stack:
        try:
            literals = store.path(made.sources[0]).read_bytes()
            if hashlib.sha256(literals).hexdigest() != made.sources[0]:
                return None
            files = [stack.enter_context(store.path(source).open("rb")).fileno() for source in made.sources]
            sparse = _Sparse(list(_extents(made, memoryview(literals))), files)
            with tarfile.open(fileobj=cast("BinaryIO", io.BufferedReader(sparse, 1 << 16)), mode="r:") as archive:
                found = [_entry(info, wanted, sparse.content) for info in archive]
                return found if archive.offset + len(tar.END) == sparse.size else None
        except (OSError, tarfile.TarError, struct.error, zlib.error, ValueError, IndexError, OverflowError):
            # Whoever reads all of it learns what is wrong, and says so.
            return None


def _extents(made: Recipe, literals: memoryview) -> Iterator[_Extent]:
    """Yield the parts of the tar in order; raises one of the errors that `_skimmed` expects where a layer has none."""
    segments = iter(made.segments)
    for segment in segments:
        ours = _ours(segment, literals)
        while ours:
            if bytes(ours[: len(_PLAIN)]) != _PLAIN:
                raise ValueError("not a member of ours")
            if len(ours) == _HEADER:
                source, offset, length = _theirs(next(segments, _NONE))
                ours = _ours(next(segments, _NONE), literals)
                _, size = _TRAILER.unpack(ours[: _TRAILER.size])
                yield _Extent(size=size, source=source, offset=offset, length=length, is_deflated=True)
                ours = ours[_TRAILER.size :]
            elif len(ours) == _HEADER + _BLOCK.size:
                ours, is_last = ours[_HEADER:], 0
                while not is_last:
                    is_last, length, _ = _BLOCK.unpack(ours)
                    source, offset, size = _theirs(next(segments, _NONE))
                    if size != length:
                        raise ValueError("not a stored block")
                    yield _Extent(size=size, source=source, offset=offset, length=size)
                    ours = _ours(next(segments, _NONE), literals)
                ours = ours[_TRAILER.size :]
            else:
                member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
                content = member.decompress(ours)
                if not member.eof:
                    raise ValueError("a member that does not end")
                yield _Extent(size=len(content), literal=content)
                ours = memoryview(member.unused_data)


_NONE = (-1, 0, 0)
"""Stands for a segment that is not there."""


def _ours(segment: tuple[int, int, int], literals: memoryview) -> memoryview:
    source, offset, length = segment
    if source != 0:
        raise ValueError("bytes of ours should stand here")
    return literals[offset : offset + length]


def _theirs(segment: tuple[int, int, int]) -> tuple[int, int, int]:
    if segment[0] <= 0:
        raise ValueError("bytes of a wheel should stand here")
    return segment


class _Sparse(io.RawIOBase):
    """The tar as a file in which one can seek; where a file of a wheel would be it reads as zeros."""

    def __init__(self, extents: list[_Extent], files: list[int]) -> None:
        super().__init__()
        self._extents, self._files = extents, files
        self._ends = list(itertools.accumulate(extent.size for extent in extents))
        self._at = 0

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence], 0)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        piece = self._piece(len(target))
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _piece(self, size: int) -> bytes:
        """Return what one part has from here on, at most `size` bytes; none at the end."""
        number = bisect.bisect_right(self._ends, self._at)
        if number == len(self._extents):
            return b""
        extent, rest = self._extents[number], self._ends[number] - self._at
        if extent.literal is None:
            return bytes(min(size, rest))
        start = extent.size - rest
        return extent.literal[start : start + size]

    def content(self, info: tarfile.TarInfo) -> bytes:
        """Return what is in a file of the tar; raises ValueError if that is not as it is in layers of wheels."""
        if info.size > MOST:
            raise ValueError("read by whoever can stop in the middle")
        parts: list[bytes] = []
        number = bisect.bisect_right(self._ends, info.offset_data)
        self._at = info.offset_data
        while (missing := info.size - sum(map(len, parts))) > 0:
            extent = self._extents[number]
            parts.append(self._piece(missing) if extent.literal is not None else self._inflated(extent))
            self._at += len(parts[-1])
            number += 1
        content = b"".join(parts)
        if len(content) != info.size:
            raise ValueError("not of the size that stands before it")
        return content

    def _inflated(self, extent: _Extent) -> bytes:
        raw = os.pread(self._files[extent.source], extent.length, extent.offset)
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, MOST) if extent.is_deflated else raw
