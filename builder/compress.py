"""Gzip that is the same everywhere, on every core.

The bytes depend on the content alone: it is cut every `CHUNK` bytes, and each piece is a gzip member of its own (RFC
1952 allows many). So members made elsewhere may stand between ours.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import deflate

from builder.errors import ToolError
from builder.store import Store

# Part of every layer's digest. Against one member for all it costs 0.03 % of the size (measured on 64 MB of shared
# libraries) and lets every core work.
CHUNK = 4 << 20
LEVEL = 6

_KNOWN_SAMPLE = "8c3d4598bcd8e41456ccbbbb14a326924eda5d5b427cc9255a495af530e9ad34"


@dataclass(frozen=True, kw_only=True)
class Gzip:
    """A gzip blob of the store: its hash and size in bytes, and the hash of what it holds (both hex SHA-256)."""

    sha256: str
    size: int
    content_sha256: str


def member(content: bytes) -> bytes:
    """Return `content` as one gzip member; raises ToolError where the compressor is not the known one.

    The header libdeflate writes is fixed: no name, time 0, operating system "unknown".
    """
    _require_known_compressor()
    return bytes(deflate.gzip_compress(content, LEVEL))


@functools.cache
def _require_known_compressor() -> None:
    """Refuse a libdeflate whose output is not the pinned version's: it would silently give other digests.

    libdeflate's output is fixed within one version only. Version 1.26 was seen to give the same bytes on
    x86-64 (all processor features or none, tuned or unoptimised), 64-bit Arm and 32-bit big-endian MIPS.
    """
    sample = b"".join(hashlib.sha256(b"%d" % (n % 977)).hexdigest().encode() * (n % 5) for n in range(4000))
    got = hashlib.sha256(deflate.gzip_compress(sample, LEVEL)).hexdigest()
    if got != _KNOWN_SAMPLE:
        raise ToolError(
            f"the compressor of deflate {deflate.__version__} is not the one image digests were made with",
            why=f"a known sample compressed to sha256 {got}, expected {_KNOWN_SAMPLE}",
            tries=("install the dependencies as pinned: pip install 'deflate==0.9.0'",),
        )


class GzipWriter:
    """Takes content in pieces of any size and makes it a gzip blob of the store.

    Members are written in order, whichever thread is done first; libdeflate releases the interpreter's lock, so
    threads are enough. A context manager; only `finish` keeps anything.
    """

    def __init__(self, store: Store, scratch: Path, *, workers: int | None = None) -> None:
        """Write to a temporary file in `scratch`, which must be on the store's file system."""
        _require_known_compressor()
        self._store = store
        self._path = scratch / f"gzip.{os.getpid()}.{id(self)}.tmp"
        self._workers = workers or os.cpu_count() or 1
        self._buffer = bytearray()
        self._content = hashlib.sha256()
        self._blob = hashlib.sha256()
        self._size = 0
        self._pending: deque[Future[bytes]] = deque()

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Append to the content."""
        self._content.update(piece)
        self._buffer += piece
        while len(self._buffer) >= CHUNK:
            self._submit(bytes(self._buffer[:CHUNK]))
            del self._buffer[:CHUNK]

    def _submit(self, chunk: bytes) -> None:
        self._pending.append(self._pool.submit(member, chunk))
        while len(self._pending) > 2 * self._workers:
            self._drain()

    def _drain(self) -> None:
        compressed = self._pending.popleft().result()
        self._file.write(compressed)
        self._blob.update(compressed)
        self._size += len(compressed)

    def finish(self) -> Gzip:
        """Write what is left, make the blob visible in the store, and return what to call it by."""
        if self._buffer or not (self._pending or self._size):
            self._submit(bytes(self._buffer))
            self._buffer.clear()
        while self._pending:
            self._drain()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.chmod(0o444)
        sha256 = self._blob.hexdigest()
        # An equal blob stays: replaced, it would live on as a second copy in the layouts that link to it.
        if not self._store.has(sha256, size=self._size):
            self._path.replace(self._store.path(sha256))
        return Gzip(sha256=sha256, size=self._size, content_sha256=self._content.hexdigest())


def gzip_blob(store: Store, content: Iterable[bytes], *, scratch: Path) -> Gzip:
    """Compress `content`, given in pieces, into a blob of the store."""
    with GzipWriter(store, scratch) as writer:
        for piece in content:
            writer.write(piece)
        return writer.finish()
