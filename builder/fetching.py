"""Fetching many files into the store: what all ways to do it share, whatever they speak."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from builder.errors import SourceError
from builder.store import BlobWriter, Store

PARALLEL = 4


class Progress(Protocol):
    """Receives what a transfer does; calls come from several threads."""

    def start(self, name: str, size: int | None, done: int) -> None:
        """Announce a file of `size` bytes, of which `done` are here already; only the first call for a name counts."""

    def advance(self, name: str, size: int) -> None:
        """Report `size` more bytes; negative when a transfer starts over."""

    def finish(self, name: str) -> None:
        """Report the file whole and checked."""


class Silent:
    """Progress that is not shown."""

    def start(self, name: str, size: int | None, done: int) -> None:
        """Ignore."""

    def advance(self, name: str, size: int) -> None:
        """Ignore."""

    def finish(self, name: str) -> None:
        """Ignore."""


class File(Protocol):
    """A file that is known before it is here."""

    @property
    def sha256(self) -> str:
        """Its hash, in hexadecimal."""

    @property
    def size(self) -> int | None:
        """Its size in bytes, if that is known."""


_AnyFile = TypeVar("_AnyFile", bound=File)


def fetch_missing(
    files: Iterable[_AnyFile], store: Store, fetch: Callable[[_AnyFile, threading.Event], object]
) -> None:
    """Fetch what the store lacks, several files at a time, largest first so that the tail is short.

    The first failure is raised and stops the others: the event that `fetch` is given is then set.
    """
    missing = {file.sha256: file for file in files if not store.has(file.sha256, size=file.size)}
    stop = threading.Event()
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as pool:
        queue = sorted(missing.values(), key=lambda file: (-(file.size or 0), file.sha256))
        futures = [pool.submit(fetch, file, stop) for file in queue]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_stop(stop: threading.Event | None) -> None:
    """Raise SourceError if the transfer is to stop."""
    if stop is not None and stop.is_set():
        raise SourceError("stopped because another transfer failed")


def start_over(name: str, writer: BlobWriter, progress: Progress) -> None:
    """Drop what was written of the file, and take its bytes back from the progress."""
    progress.advance(name, -writer.offset)
    writer.restart()
