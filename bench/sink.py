"""A registry that keeps nothing: it reads what is pushed, counts it, and says yes; with --keep it does what one must.

`python -m bench.sink [--keep DIR]` prints its port. What it does with bytes is the least that can be done: without
--keep they are read and dropped; with it they are written to a file, hashed on the way, flushed to the disk as Debian's
docker-registry does it, and the hash has to be right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PIECE = 1 << 20
COUNTS = "/counts"
"""Where it says what it was asked so far."""


class Sink(ThreadingHTTPServer):
    """Takes images on a free port of this machine."""

    daemon_threads = True

    def __init__(self, keep: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keep = keep
        self.blobs: dict[str, int] = {}
        """Their sizes."""
        self.manifests: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, int]] = {}
        """Digest and size of those that are not at their end."""
        self.requests: Counter[str] = Counter()
        self.received = 0
        self.guard = threading.Lock()
        self._uploads = 0

    def begin(self) -> str:
        """Return the name of a new upload."""
        with self.guard:
            self._uploads += 1
            return str(self._uploads)

    def counts(self) -> bytes:
        """Return what was asked, and how many bytes of blobs came."""
        with self.guard:
            return json.dumps({"requests": self.requests, "received": self.received}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Sink

    def setup(self) -> None:
        super().setup()
        self._buffer = memoryview(bytearray(PIECE))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class' name)
        """Say nothing."""

    # ------------------------------------------------------------------ what is asked

    def do_HEAD(self) -> None:
        self._count()
        path, name = self._path()
        if "/manifests/" in path:
            self._manifest()
        else:
            size = self.server.blobs.get(name)
            self._answer(404) if size is None else self._answer(200, {"Content-Length": str(size)})

    def do_GET(self) -> None:
        if self.path == COUNTS:
            self._answer(200, body=self.server.counts())
            return
        self._count()
        self._manifest()

    def do_POST(self) -> None:
        self._count()
        repository = self.path.partition("/blobs/")[0]
        self._answer(202, {"Location": f"{repository}/blobs/uploads/{self.server.begin()}", "Range": "0-0"})

    def do_PATCH(self) -> None:
        self._count()
        path, upload = self._path()
        size = self._take(upload)
        self._answer(202, {"Location": path, "Range": f"0-{max(size - 1, 0)}"})

    def do_PUT(self) -> None:
        self._count()
        path, name = self._path()
        if "/manifests/" in path:
            self._store(name)
            return
        (digest,) = parse_qs(urlsplit(self.path).query)["digest"]
        self._take(name)
        got, size = self.server.uploads.pop(name)
        if self.server.keep and got != digest:
            self._answer(400)
            return
        self.server.blobs[digest] = size
        self._answer(201, {"Docker-Content-Digest": digest})

    # ------------------------------------------------------------------ what is done

    def _take(self, upload: str) -> int:
        """Read the body of a request; returns its size."""
        size = left = int(self.headers.get("Content-Length") or 0)
        if not size:
            return 0
        digest = hashlib.sha256()
        with ExitStack() as stack:
            file = (
                stack.enter_context((self.server.keep / upload).open("wb", buffering=0)) if self.server.keep else None
            )
            while left:
                # The stream is buffered, but what is larger than its buffer goes past it.
                count = self.rfile.readinto(self._buffer[: min(left, PIECE)])
                if not count:
                    raise ConnectionResetError
                left -= count
                if file is not None:
                    digest.update(self._buffer[:count])
                    file.write(self._buffer[:count])
            if file is not None:
                os.fsync(file.fileno())
        with self.server.guard:
            self.server.uploads[upload] = f"sha256:{digest.hexdigest()}", size
            self.server.received += size
        return size

    def _store(self, name: str) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.server.manifests |= {name: content, digest: content}
        self._answer(201, {"Docker-Content-Digest": digest})

    def _manifest(self) -> None:
        content = self.server.manifests.get(self._path()[1])
        if content is None:
            self._answer(404)
        else:
            self._answer(200, {"Docker-Content-Digest": f"sha256:{hashlib.sha256(content).hexdigest()}"}, content)

    def _path(self) -> tuple[str, str]:
        path = urlsplit(self.path).path
        return path, path.rpartition("/")[2]

    def _count(self) -> None:
        with self.server.guard:
            self.server.requests[self.command] += 1

    def _answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> int:
    """Take images until the program is ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.sink")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    sink = Sink(parser.parse_args().keep)
    print(sink.server_port, flush=True)
    sink.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
