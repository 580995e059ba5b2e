"""What no method can avoid, on all cores: each wheel's content inflated once, and the hashes of both its forms.

An image needs the digest of every layer as it is sent (compressed) and as it is unpacked. So whoever makes an image of
wheels without compressing anew still has to read each deflate stream, inflate it, and run SHA-256 over both. Nothing
else is done here: no layer, no header, no file.

SHA-256 is the standard library's, as a program would use it that knows of no better. On a processor without
instructions for it torchyard hashes several streams side by side, faster than the floor does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from builder.errors import WheelError

# Of 64 kB, 256 kB and 1 MB the largest took the least processor time, by 3 % (the wheels of 2.8.0+cu128).
CHUNK = 1 << 20
_HEADER = 30
"""Bytes of a zip member's local header before its name."""


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """Of one wheel: SHA-256 of its members' data as they are stored, and of their contents, in the archive's order."""

    stored: str
    content: str
    content_bytes: int


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The hashes of all wheels, in the order given, and what they took."""

    seconds: float
    cpu_seconds: float
    wheels: tuple[Hashes, ...]


def measure(wheels: Sequence[Path]) -> Floor:
    """Hash the wheels on all cores, the longest first, and take the time; starting the processes does not count."""
    workers = len(os.sched_getaffinity(0))
    by_size = sorted(wheels, key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(time.sleep, [0.2] * workers))  # all processes are there
        started = time.monotonic()
        done = dict(zip(by_size, pool.map(_one, by_size), strict=True))
        seconds = time.monotonic() - started
    return Floor(
        seconds=seconds,
        cpu_seconds=sum(cpu for _, cpu in done.values()),
        wheels=tuple(done[path][0] for path in wheels),
    )


def _one(wheel: Path) -> tuple[Hashes, float]:
    before = time.process_time()
    return hashed(wheel), time.process_time() - before


def hashed(wheel: Path) -> Hashes:
    """Return the hashes of one wheel; raises WheelError if a stream is not what the archive says of it."""
    stored, content, size = hashlib.sha256(), hashlib.sha256(), 0
    with (
        wheel.open("rb") as file,
        zipfile.ZipFile(file) as archive,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        for member in archive.infolist():
            with _data(view, member) as data:
                stored.update(data)
                found = 0
                for piece in _inflated(data, member):
                    content.update(piece)
                    found += len(piece)
            if found != member.file_size:
                raise WheelError(f"{member.filename}: {found} bytes came out, {member.file_size} are announced")
            size += found
    return Hashes(stored=stored.hexdigest(), content=content.hexdigest(), content_bytes=size)


def _data(view: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """Return a member's data: its local header may be longer than the directory's copy of it."""
    at = member.header_offset
    name = int.from_bytes(view[at + 26 : at + 28], "little")
    extra = int.from_bytes(view[at + 28 : at + 30], "little")
    start = at + _HEADER + name + extra
    return view[start : start + member.compress_size]


def _inflated(data: memoryview, member: zipfile.ZipInfo) -> Iterator[bytes | memoryview]:
    if member.compress_type == zipfile.ZIP_STORED:
        yield data
        return
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise WheelError(f"{member.filename}: neither stored nor deflated")
    if len(data) <= CHUNK and member.file_size <= 4 * CHUNK:
        yield isal_zlib.decompress(data, -15, max(1, member.file_size))
        return
    inflate = isal_zlib.decompressobj(-15)
    for at in range(0, len(data), CHUNK):
        yield inflate.decompress(data[at : at + CHUNK])
    yield inflate.flush()
