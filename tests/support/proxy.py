"""A proxy between a publisher and a registry that understands enough of their talk to spoil a chosen request."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from tests.support.loopback import Loopback, Quiet
from tests.support.registry_server import TokenService

LINGER_S = 0.2
"""How long a server that answered early waits before it ends the connection, so that its answer can be read."""
_PIECE = 64 << 10
_ESTABLISHED = 1
"""State of a connection that neither side has ended, as Linux counts them."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request, after so many bytes of its body went through."""

    after: int = 0
    call: Callable[[], object] | None = None
    """Happens then: somebody else's doing, or the registry's end."""
    reset: bool = False
    """The connections of both sides are reset."""
    stall: bool = False
    """Nothing is read or said any more, until the client goes away."""
    status: int | None = None
    """Answered once the body was read, and the registry is not asked."""
    early: bool = False
    """That answer comes before the rest of the body was read, and then the connection ends."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of that answer."""
    lost: bool = False
    """The registry does what it is asked, and its answer is lost with the connection."""
    mute: bool = False
    """The registry does what it is asked, and its answer never comes."""
    short: int | None = None
    """So many bytes of the answer arrive, its head counted, and then the connection ends."""
    body: bytes | None = None
    """The answer's, instead of the registry's."""
    closes: bool = False
    """After the answer the connection ends without a word of it."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """One request that came."""

    kind: str
    path: str
    query: Mapping[str, list[str]]
    received: int
    """Bytes of its body that were read."""
    status: int
    """0 if there was no answer."""

    @property
    def name(self) -> str:
        """The last part of its path: a digest, a tag, or the upload's own name."""
        return self.path.rpartition("/")[2]


class Proxy(Loopback):
    """Leads to a port of this machine, and notes what comes; requests fail as told, and with `tokens` need one.

    Kinds are those of `PushServer.fault`: `blob` asks for a blob, `fetch` reads it, `mount`, `begin`, `patch`, `state`
    and `commit` are of uploads; `look`, `read`, `manifest` (by digest) and `tag` of manifests.
    """

    def __init__(self, port: int, *, tokens: TokenService | None = None) -> None:
        self.upstream, self.tokens = port, tokens
        self.passed: list[Passed] = []
        self._faults: dict[str, deque[Fault]] = {}
        owner = self

        class Bound(_Handler):
            proxy = owner

        super().__init__(Bound)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fault(self, kind: str, *faults: Fault) -> None:
        """Let the next requests of a kind go wrong."""
        with self._guard:
            self._faults.setdefault(kind, deque()).extend(faults)

    def heal(self) -> None:
        """Forget what should still go wrong."""
        with self._guard:
            self._faults.clear()

    @property
    def pending(self) -> int:
        """How many faults did not happen yet."""
        return sum(map(len, self._faults.values()))

    def of_kind(self, *kinds: str) -> list[Passed]:
        with self._guard:
            return [one for one in self.passed if one.kind in kinds]

    @property
    def received(self) -> int:
        """Bytes of blobs that came."""
        return sum(one.received for one in self.of_kind("patch", "commit"))

    @property
    def ended(self) -> Counter[str]:
        """How often a blob was sent to its end, by digest."""
        return Counter(one.query["digest"][0] for one in self.of_kind("commit") if one.status == 201)

    # ------------------------------------------------------------------ for the handler

    def _next(self, kind: str) -> Fault:
        with self._guard:
            faults = self._faults.get(kind)
            return faults.popleft() if faults else Fault()

    def _challenge(self, path: str, authorization: str | None) -> str | None:
        if self.tokens is None or self.tokens.opens(authorization):
            return None
        repository = _parsed(path)[0]
        scope = f"repository:{repository}:pull,push"
        return f'Bearer realm="http://{self.host}/token",service="proxy",scope="{scope}"'


class _GoneError(Exception):
    """One side has gone away, or was sent there."""


class _Handler(Quiet, BaseHTTPRequestHandler):
    """One connection of a client, and one to the registry for it."""

    proxy: Proxy
    _upstream: http.client.HTTPConnection

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream)

    def finish(self) -> None:
        self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/token" and self.proxy.tokens is not None:
            self._give_token(parts.query)
        else:
            self._pass()

    def do_HEAD(self) -> None:
        self._pass()

    def do_POST(self) -> None:
        self._pass()

    def do_PATCH(self) -> None:
        self._pass()

    def do_PUT(self) -> None:
        self._pass()

    # ------------------------------------------------------------------ one request

    def _give_token(self, query: str) -> None:
        assert self.proxy.tokens is not None
        body = self.proxy.tokens.answer(parse_qs(query), {}, self.headers.get("Authorization"))
        self._write(_head(200 if body else 401, {"Content-Length": str(len(body))}) + body)

    def _pass(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        kind = _kind(self.command, parts.path, query)
        self._received, status = 0, 0
        fault = Fault()
        try:
            challenge = self.proxy._challenge(parts.path, self.headers.get("Authorization"))
            if challenge is None:
                fault = self.proxy._next(kind)
                status, answer = self._answered(fault)
            else:
                self._discard()
                status, answer = 401, _head(401, {"WWW-Authenticate": challenge, "Content-Length": "0"})
        except (_GoneError, OSError, http.client.HTTPException):
            answer = None
        passed = Passed(kind=kind, path=parts.path, query=query, received=self._received, status=status)
        with self.proxy._guard:
            self.proxy.passed.append(passed)
        if answer is None or fault.lost:
            self._reset()
            return
        if fault.mute:
            self._wait()
            return
        self._write(answer[: fault.short])
        if fault.short is not None or fault.early or fault.closes:
            self._end()
            if fault.early:
                time.sleep(LINGER_S)

    def _answered(self, fault: Fault) -> tuple[int, bytes]:
        """Bring the request to the registry as far as the fault lets it; returns the answer for the client."""
        if fault.status is not None:
            if not fault.early:
                self._discard()
            return fault.status, _head(fault.status, {"Content-Length": "0", **fault.headers})
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            # With tokens, the log-in is the proxy's own affair.
            if self.proxy.tokens is None or name.lower() != "authorization":
                self._upstream.putheader(name, value)
        self._upstream.endheaders()
        length = int(self.headers.get("Content-Length") or 0)
        self._forward(min(fault.after, length))
        if fault.call is not None:
            fault.call()
        if fault.reset:
            raise _GoneError
        if fault.stall:
            self._wait()
            raise _GoneError
        self._forward(length - self._received)
        response = self._upstream.getresponse()
        body = response.read()
        headers = {name: value for name, value in response.getheaders() if name.lower() != "transfer-encoding"}
        if self.command != "HEAD":
            body = body if fault.body is None else fault.body
            headers["Content-Length"] = str(len(body))
        return response.status, _head(response.status, headers) + body

    def _forward(self, length: int) -> None:
        while length:
            piece = self._read(min(length, _PIECE))
            length -= len(piece)
            self._upstream.send(piece)

    def _discard(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            left -= len(self._read(min(left, _PIECE)))

    def _read(self, most: int) -> bytes:
        piece = self.rfile.read1(most)
        if not piece:
            raise _GoneError
        self._received += len(piece)
        return bytes(piece)

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def _wait(self) -> None:
        """Say nothing until the client goes away; what it still sends stays where it is."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            while self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED:
                time.sleep(0.02)

    def _reset(self) -> None:
        for connection in (self.connection, self._upstream.sock):
            with contextlib.suppress(OSError):
                if connection is not None:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._upstream.close()
        self.connection.close()
        self.close_connection = True

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.close_connection = True


def _parsed(path: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"/v2/(?:(.+)/(blobs/uploads|blobs|manifests|referrers)/([^/]*))?", path)
    return (found[1] or "", found[2] or "", found[3] or "") if found else ("", "", "")


def _kind(method: str, path: str, query: Mapping[str, list[str]]) -> str:
    _, part, name = _parsed(path)
    if part == "blobs/uploads":
        begins = "mount" if "mount" in query else "begin"
        kinds = {"POST": begins, "PATCH": "patch", "PUT": "commit", "GET": "state"}
    elif part == "blobs":
        kinds = {"HEAD": "blob", "GET": "fetch"}
    elif part == "manifests":
        kinds = {"HEAD": "look", "GET": "read", "PUT": "manifest" if name.startswith("sha256:") else "tag"}
    else:
        kinds = {}
    return kinds.get(method, "other")


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    reason = http.client.responses.get(status, "")
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")
