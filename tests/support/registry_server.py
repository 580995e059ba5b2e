"""A container registry on the loopback interface that fails as it is told to, and remembers what it was asked."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from builder.layout import Descriptor, Image
from builder.store import Store
from tests.support.index_server import Answer

__all__ = ["Answer", "Asked", "RegistryServer", "TokenService"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request that was made; `form` is what a POST sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, list[str]]
    form: Mapping[str, list[str]]
    status: int
    at_s: float

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass(kw_only=True)
class TokenService:
    """Gives tokens at `/token` of the server it is set on; a token opens what it was asked for, until it expires."""

    expires_in: float | None = 300
    lifetime_s: float = 300
    """How long tokens really open anything."""
    user: tuple[str, str] | None = None
    """Who must ask; None for anybody."""
    identity_token: str | None = None
    token_name: str = "token"
    given: dict[str, float] = field(default_factory=dict)

    def answer(self, asked: Mapping[str, list[str]], form: Mapping[str, list[str]], authorization: str | None) -> bytes:
        if form and form.get("refresh_token") != [self.identity_token]:
            return b""
        if self.user and not form and authorization != basic(*self.user):
            return b""
        assert (form or asked)["scope"], "a token is asked for something"
        token = f"canary-token-{len(self.given)}"
        self.given[token] = time.monotonic() + self.lifetime_s
        answer: dict[str, Any] = {self.token_name: token}
        if self.expires_in is not None:
            answer["expires_in"] = self.expires_in
        return json.dumps(answer).encode()

    def opens(self, authorization: str | None) -> bool:
        token = (authorization or "").removeprefix("Bearer ")
        return self.given.get(token, 0.0) > time.monotonic()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class RegistryServer:
    """Blobs and manifests by digest, in every repository alike; open, or behind a password or a token."""

    def __init__(self, *, host: str = "127.0.0.1", tls: tuple[Path, Path] | None = None) -> None:
        """With `tls`, a certificate and its key, speak TLS; `host` is what the server calls itself."""
        self.documents: dict[str, tuple[str, bytes]] = {}
        self.requests: list[Asked] = []
        self.basic: tuple[str, str] | None = None
        self.tokens: TokenService | None = None
        self.realm: str | None = None
        """Where the challenge says tokens are given, if not here."""
        self._scripts: dict[str, Iterator[int | Answer]] = {}
        self._guard = threading.Lock()
        self._connections: set[socket.socket] = set()
        owner = self

        class Handler(_Handler):
            registry = owner

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._scheme = "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.host = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="registry")

    # ------------------------------------------------------------------ what it serves

    def add(self, image: Image, store: Store, *, repository: str = "team/app") -> str:
        """Serve every blob of an image; returns its reference."""
        for blob in image.blobs:
            self.put(store.path(blob.sha256).read_bytes(), blob.media_type)
        return self.reference(image.manifest.digest, repository)

    def put(self, content: bytes, media_type: str = "application/octet-stream") -> Descriptor:
        """Serve `content` under its digest, as blob and as manifest."""
        digest = f"sha256:{sha256(content).hexdigest()}"
        self.documents[digest] = (media_type, content)
        return Descriptor(media_type=media_type, digest=digest, size=len(content))

    def put_json(self, document: object, media_type: str) -> Descriptor:
        return self.put(json.dumps(document).encode(), media_type)

    def reference(self, digest: str, repository: str = "team/app") -> str:
        return f"{self.host}/{repository}@{digest}"

    def script(self, path: str, *answers: int | Answer, then: Iterable[int | Answer] = ()) -> None:
        """Answer the next requests for `path` like this, one after the other; a bare number is a status."""
        self._scripts[path] = itertools.chain(answers, then)

    # ------------------------------------------------------------------ where things are, and what was asked

    @property
    def origin(self) -> str:
        return f"{self._scheme}://{self.host}"

    @staticmethod
    def blob(digest: str, repository: str = "team/app") -> str:
        return f"/v2/{repository}/blobs/{digest}"

    @staticmethod
    def manifest(digest: str, repository: str = "team/app") -> str:
        return f"/v2/{repository}/manifests/{digest}"

    def asked(self, path: str) -> list[Asked]:
        """Return the requests for `path`."""
        with self._guard:
            return [one for one in self.requests if one.path == path]

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    # ------------------------------------------------------------------ for the handler

    def _next(self, path: str) -> Answer:
        with self._guard:
            step = next(self._scripts.get(path, iter(())), Answer())
        return step if isinstance(step, Answer) else Answer(status=step)

    def _challenge(self, repository: str, authorization: str | None) -> str | None:
        """Return what a client is told that may not enter; None if it may."""
        if self.tokens is not None or self.realm is not None:
            if self.tokens is not None and self.tokens.opens(authorization):
                return None
            realm = self.realm or f"{self.origin}/token"
            return f'Bearer realm="{realm}",service="a, \\"quoted\\" service",scope="repository:{repository}:pull"'
        if self.basic is not None and authorization != basic(*self.basic):
            return 'Basic realm="a realm"'
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that break off are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: RegistryServer

    def setup(self) -> None:
        super().setup()
        with self.registry._guard:
            self.registry._connections.add(self.connection)

    def finish(self) -> None:
        with self.registry._guard:
            self.registry._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class' name)
        """Say nothing."""

    def do_GET(self) -> None:
        self._respond({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._respond(parse_qs(body.decode()))

    def _respond(self, form: Mapping[str, list[str]]) -> None:
        parts = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        answer = self.registry._next(parts.path)
        status, headers, kind, body = answer.status, dict(answer.headers), "application/json", b""
        found = re.fullmatch(r"/v2/(.+)/(?:blobs|manifests)/(sha256:[0-9a-f]{64})", parts.path)
        challenge = self.registry._challenge(found[1], authorization) if found else None
        if status != 200:
            body = answer.body or b""
        elif challenge is not None:
            status, headers = 401, {**headers, "WWW-Authenticate": challenge}
            body = b'{"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}'
        elif answer.body is not None:
            body = answer.body
        elif parts.path == "/token" and self.registry.tokens is not None:
            body = self.registry.tokens.answer(parse_qs(parts.query), form, authorization)
            status = 200 if body else 401
        elif found and found[2] in self.registry.documents:
            kind, body = self.registry.documents[found[2]]
        else:
            status = 404
            body = b'{"errors": [{"code": "NAME_UNKNOWN", "message": "no such thing"}]}'
        wanted = self.headers.get("Range")
        if status == 200 and found and wanted and answer.ranges:
            status, headers, body = _part(int(wanted.removeprefix("bytes=").removesuffix("-")), headers, body)
        with self.registry._guard:
            self.registry.requests.append(
                Asked(
                    method=self.command,
                    path=parts.path,
                    headers={name.lower(): value for name, value in self.headers.items()},
                    query=parse_qs(parts.query),
                    form=form,
                    status=status,
                    at_s=time.monotonic(),
                )
            )
        self.send_response(status)
        headers.setdefault("Content-Type", kind)
        if answer.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._send(body[: answer.cut], answer.pace)
        if answer.cut is not None:
            self.close_connection = True
            if answer.reset:
                time.sleep(0.03)  # time for the peer to read: a reset may overtake what was sent
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _send(self, body: bytes, pace: tuple[int, float] | None) -> None:
        size, pause_s = pace or (len(body) or 1, 0.0)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(pause_s)


def _part(start: int, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    if start >= len(body):
        return 416, {**headers, "Content-Range": f"bytes */{len(body)}"}, b""
    about = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
    return 206, {**headers, **about}, body[start:]
