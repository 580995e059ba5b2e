"""A package index on the loopback interface that fails as it is told to, and remembers what it was asked."""

from __future__ import annotations

import html
import itertools
import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name

from tests.support.loopback import Loopback, Quiet
from tests.support.wheels import FakeWheel

_JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How to answer one request; the plain `Answer()` serves what was asked for, as a good server does."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Other bytes than the right ones."""
    cut: int | None = None
    """Break off after so many bytes of the body, ..."""
    reset: bool = True
    """... with a reset of the connection, or else by closing it as if all had been sent."""
    ranges: bool = True
    """Whether a Range header is honoured, or the whole file sent again."""
    length: bool = True
    """Whether the length is announced."""
    pace: tuple[int, float] | None = None
    """Send so many bytes, then sleep so many seconds, and so on."""


def reset(after: int) -> Answer:
    """Send `after` bytes of the body, then reset the connection."""
    return Answer(cut=after)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request that was made."""

    method: str
    path: str
    range: str | None
    accept: str
    status: int
    at_s: float


@dataclass(kw_only=True)
class _Shelf:
    wheels: list[FakeWheel] = field(default_factory=list)
    json: bool = True
    hashes: bool = True


class IndexServer(Loopback):
    """Named indexes at `/<name>/simple/`, their files at `/<name>/files/`, all in one page at `/<name>/links/`."""

    def __init__(self) -> None:
        self._shelves: dict[str, _Shelf] = {}
        self._scripts: dict[str, Iterator[int | Answer]] = {}
        self.requests: list[Seen] = []
        owner = self

        class Bound(_Handler):
            index = owner

        super().__init__(Bound)

    # ------------------------------------------------------------------ what it serves

    def add(self, name: str, *wheels: FakeWheel, json: bool = True, hashes: bool = True) -> str:
        """Put wheels on the index `name` and return its URL; without `json` it only speaks HTML."""
        shelf = self._shelves.setdefault(name, _Shelf())
        shelf.wheels += wheels
        shelf.json, shelf.hashes = json, hashes
        return self.url(name)

    def script(self, path: str, *answers: int | Answer, then: Iterable[int | Answer] = ()) -> None:
        """Answer the next requests for `path` like this, one after the other; a bare number is a status."""
        self._scripts[path] = itertools.chain(answers, then)

    # ------------------------------------------------------------------ where things are

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str = "default") -> str:
        return f"{self.origin}/{name}/simple"

    def links(self, name: str = "default") -> str:
        return f"{self.origin}/{name}/links/"

    @staticmethod
    def page(project: str, name: str = "default") -> str:
        return f"/{name}/simple/{canonicalize_name(project)}/"

    @staticmethod
    def file(wheel: FakeWheel, name: str = "default") -> str:
        return f"/{name}/files/{wheel.filename}"

    # ------------------------------------------------------------------ what it was asked

    def asked(self, path: str) -> list[Seen]:
        """Return the requests for `path`, or for all below it if it ends in `*`."""
        with self._guard:
            seen = list(self.requests)
        if path.endswith("*"):
            return [one for one in seen if one.path.startswith(path[:-1])]
        return [one for one in seen if one.path == path]

    # ------------------------------------------------------------------ for the handler

    def _next(self, path: str) -> Answer:
        with self._guard:
            step = next(self._scripts.get(path, iter(())), Answer())
        return step if isinstance(step, Answer) else Answer(status=step)

    def _content(self, path: str, accept: str) -> tuple[str, bytes] | None:
        parts = path.strip("/").split("/")
        shelf = self._shelves.get(parts[0])
        if shelf is None or len(parts) < 2:
            return None
        if parts[1] == "links":
            return "text/html", _html(shelf, shelf.wheels, "../files/").encode()
        if parts[1] == "simple" and len(parts) == 3:
            wheels = [wheel for wheel in shelf.wheels if wheel.project == parts[2]]
            if not wheels:
                return None
            if shelf.json and _JSON in accept:
                return _JSON, _json(shelf, parts[2], wheels, "../../files/").encode()
            return "text/html", _html(shelf, wheels, "../../files/").encode()
        if parts[1] == "files" and len(parts) == 3:
            name = parts[2].removesuffix(".metadata")
            for wheel in shelf.wheels:
                if wheel.filename == name:
                    return "application/octet-stream", wheel.content if name == parts[2] else wheel.metadata
        return None


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _html(shelf: _Shelf, wheels: Iterable[FakeWheel], files: str) -> str:
    links = []
    for wheel in wheels:
        digest = f"#sha256={wheel.sha256}" if shelf.hashes else ""
        metadata = f' data-core-metadata="sha256={sha256(wheel.metadata).hexdigest()}"'
        name = html.escape(wheel.filename)
        if wheel.upload_time is not None:  # not in any standard, but uv reads it
            metadata += f' data-upload-time="{_moment(wheel.upload_time)}"'
        links.append(f'<a href="{files}{name.replace("+", "%2B")}{digest}"{metadata}>{name}</a><br>')
    return "<!DOCTYPE html>\n<html><body>\n" + "\n".join(links) + "\n</body></html>\n"


def _json(shelf: _Shelf, project: str, wheels: Iterable[FakeWheel], files: str) -> str:
    listed = []
    for wheel in wheels:
        entry: dict[str, Any] = {
            "filename": wheel.filename,
            "url": files + wheel.filename.replace("+", "%2B"),
            "hashes": {"sha256": wheel.sha256} if shelf.hashes else {},
            "size": len(wheel.content),
            "core-metadata": {"sha256": sha256(wheel.metadata).hexdigest()},
        }
        if wheel.upload_time is not None:
            entry["upload-time"] = _moment(wheel.upload_time)
        listed.append(entry)
    versions = sorted({str(wheel.version) for wheel in wheels})
    return json.dumps({"meta": {"api-version": "1.1"}, "name": project, "versions": versions, "files": listed})


class _Handler(Quiet, BaseHTTPRequestHandler):
    index: IndexServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        accept = self.headers.get("Accept", "")
        answer = self.index._next(path)
        found = self.index._content(path, accept)
        status, headers, kind, body = answer.status, dict(answer.headers), "text/plain", b""
        if status == 200 and found is None and answer.body is None:
            status = 404
        elif status == 200:
            kind, body = found or ("application/octet-stream", b"")
            body = body if answer.body is None else answer.body
            wanted = self.headers.get("Range")
            if answer.ranges and path.endswith(".whl"):
                headers["Accept-Ranges"] = "bytes"
                if wanted:
                    status, headers, body = _ranged(wanted, headers, body)
        with self.index._guard:
            self.index.requests.append(
                Seen(
                    method=self.command,
                    path=path,
                    range=self.headers.get("Range"),
                    accept=accept,
                    status=status,
                    at_s=time.monotonic(),
                )
            )
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if answer.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(body[: answer.cut], answer.pace)
        if answer.cut is not None:
            self.close_connection = True
            if answer.reset:
                time.sleep(0.03)  # time for the peer to read: a reset may overtake what was sent
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _send(self, body: bytes, pace: tuple[int, float] | None) -> None:
        if pace is None:
            self.wfile.write(body)
            return
        size, pause_s = pace
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(pause_s)


def _ranged(wanted: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(body)), len(body) - 1)
    if start >= len(body):
        return 416, {**headers, "Content-Range": f"bytes */{len(body)}"}, b""
    return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}, body[start : end + 1]
