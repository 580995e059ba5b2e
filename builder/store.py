"""The content-addressed store: whole, hash-checked files under one directory, safe to kill at any moment."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from platformdirs import user_cache_path

from builder.errors import DiskError, HashMismatchError

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of(file: BinaryIO) -> str:
    """Return the hex SHA-256 of what is left to read in `file`."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextlib.contextmanager
def named_enospc(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into an error that says where and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskError(
            "the disk is full",
            where=str(path.parent),
            why=f"{free / 1e6:.0f} MB are free there",
            tries=(
                "free some space and run the same command again: finished files are kept",
                "set TORCHYARD_HOME to a directory on a larger disk",
            ),
        ) from error


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        # One writer at a time, of all threads and processes: what a killed one left under the name is overwritten.
        fcntl.flock(directory, fcntl.LOCK_EX)
        with named_enospc(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
            os.fsync(directory)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(directory)


class BlobWriter:
    """Takes the bytes of one blob, hashing while writing; `commit` alone makes it a blob of the store.

    What was written before an interruption is kept and hashed again, so `offset` is where a download goes on.
    """

    def __init__(self, partial: Path, final: Path, sha256: str, name: str) -> None:
        self._partial, self._final, self._sha256, self._name = partial, final, sha256, name
        # Unbuffered: what a full disk refused must not be tried again, with another error, when the file is closed.
        self._file = partial.open("a+b", buffering=0)
        self._file.seek(0)
        self._hash = hashlib.sha256()
        while chunk := self._file.read(_CHUNK):
            self._hash.update(chunk)
        self.offset = self._file.tell()

    def write(self, chunk: bytes) -> None:
        """Append `chunk`."""
        rest = memoryview(chunk)
        with named_enospc(self._partial):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(chunk)
        self.offset += len(chunk)

    def restart(self) -> None:
        """Drop what was written: the source cannot continue where an earlier one stopped."""
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.offset = 0

    def commit(self) -> Path:
        """Check the hash and make the blob visible; raises HashMismatchError and starts over if it is wrong."""
        got = self._hash.hexdigest()
        if got != self._sha256:
            size = self.offset
            self.restart()
            raise HashMismatchError(
                f"{self._name}: the bytes are not those that were locked",
                why=f"expected sha256 {self._sha256}, got {got} ({size} bytes)",
                tries=(
                    "nothing was kept; run again if the transfer may have been damaged",
                    "if it stays, the index or a proxy serves another file under this name: do not use it",
                ),
            )
        with named_enospc(self._partial):
            os.fsync(self._file.fileno())
        self._file.close()
        self._partial.chmod(0o444)
        self._partial.replace(self._final)
        return self._final

    def close(self) -> None:
        """Close without committing; what was written stays for a later resume."""
        if not self._file.closed and not self.offset:
            self._partial.unlink()
        self._file.close()


@dataclass(frozen=True)
class Store:
    """Blobs by SHA-256 (`blobs/`), unfinished ones (`partial/`), and a lock per name (`locks/`)."""

    root: Path

    @classmethod
    def open(cls, root: Path | None = None) -> Self:
        """Open the store at `root`, else at TORCHYARD_HOME, else in the user's cache directory."""
        if root is None:
            root = Path(os.environ.get("TORCHYARD_HOME") or user_cache_path("torchyard"))
        for name in ("blobs", "partial", "locks", "layouts", "work"):
            (root / name).mkdir(parents=True, exist_ok=True)
        return cls(root.resolve())

    def path(self, sha256: str) -> Path:
        """Return where the blob lies, or would."""
        assert _SHA256.fullmatch(sha256), sha256
        return self.root / "blobs" / sha256

    def has(self, sha256: str, *, size: int | None = None) -> bool:
        """Tell whether the blob is here, and of `size` bytes if that is given; its hash was checked on entry."""
        try:
            found = self.path(sha256).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def verify(self, sha256: str) -> bool:
        """Read the blob and tell whether it still has its hash; a blob that has not is removed."""
        path = self.path(sha256)
        try:
            with path.open("rb") as file:
                if sha256_of(file) == sha256:
                    return True
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)
        return False

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock; it dies with the process, so a killed run leaves nothing to clean."""
        with (self.root / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def writer(self, sha256: str, name: str) -> Iterator[BlobWriter]:
        """Open the blob for writing under its lock; `name` is what people call it."""
        with self.lock(sha256):
            writer = BlobWriter(self.root / "partial" / sha256, self.path(sha256), sha256, name)
            try:
                yield writer
            finally:
                writer.close()

    def put(self, content: bytes) -> str:
        """Store `content` and return its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has(sha256, size=len(content)):
            with self.writer(sha256, "content") as writer:
                if not self.has(sha256, size=len(content)):  # another process was faster
                    writer.restart()
                    writer.write(content)
                    writer.commit()
        return sha256

    def link(self, directory: Path, files: Mapping[str, str]) -> None:
        """Fill `directory` with `files` (name to SHA-256) as hard links: no second copy on disk."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, sha256 in files.items():
            assert Path(name).name == name, name
            (directory / name).unlink(missing_ok=True)
            (directory / name).hardlink_to(self.path(sha256))

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield an empty directory on the store's file system; it is gone afterwards.

        Left behind only by SIGKILL; the next run with the same `name` clears it, under the same lock.
        """
        directory = self.root / "work" / name
        with self.lock(f"work-{name}"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
