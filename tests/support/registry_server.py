"""A container registry on the loopback interface that fails as it is told to, and remembers what it was asked."""

from __future__ import annotations

import base64
import itertools
import json
import re
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from builder.errors import TorchyardError
from builder.layout import MEDIA_INDEX, MEDIA_MANIFEST, Descriptor, Image
from builder.store import Store
from tests.support.index_server import Answer
from tests.support.loopback import Loopback, Quiet

__all__ = ["Answer", "Asked", "Fault", "PushServer", "RegistryServer", "TokenService", "Upload", "text_of"]


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
    kind: str = ""
    """What it was for, of a registry that is pushed to."""
    received: int = 0
    """Bytes of its body that were read."""

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
    scopes: dict[str, list[str]] = field(default_factory=dict)
    """What each token opens."""

    def answer(self, asked: Mapping[str, list[str]], form: Mapping[str, list[str]], authorization: str | None) -> bytes:
        if form and form.get("refresh_token") != [self.identity_token]:
            return b""
        if self.user and not form and authorization != basic(*self.user):
            return b""
        scopes = [scope for text in (form or asked)["scope"] for scope in text.split()]
        assert scopes, "a token is asked for something"
        token = f"canary-token-{len(self.given)}"
        self.scopes[token] = scopes
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


class RegistryServer(Loopback):
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
        owner = self

        class Bound(_Handler):
            registry = owner

        super().__init__(Bound)
        self._scheme = "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.host = f"{host}:{self.port}"

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

    # ------------------------------------------------------------------ for the handler

    def _takes(self, handler: _Handler) -> bool:
        """Answer a request by which something is pushed, if this is one."""
        return False

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


def text_of(error: TorchyardError) -> str:
    """Return all that an error says."""
    return "\n".join(
        "\n".join([problem.what, problem.where, problem.why, *problem.tries]) for problem in error.problems
    )


class _Handler(Quiet, BaseHTTPRequestHandler):
    registry: RegistryServer

    def do_GET(self) -> None:
        if not self.registry._takes(self):
            self._respond({})

    def do_HEAD(self) -> None:
        assert self.registry._takes(self)

    def do_PUT(self) -> None:
        assert self.registry._takes(self)

    def do_PATCH(self) -> None:
        assert self.registry._takes(self)

    def do_POST(self) -> None:
        if self.registry._takes(self):
            return
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


# ----------------------------------------------------------------------------------------------------
# A registry that is pushed to


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request to a registry that is pushed to."""

    before: Callable[[], object] | None = None
    """Happens first: somebody else's doing."""
    status: int | None = None
    """Answered instead of doing what is asked."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the answer, whatever it is."""
    body: bytes | None = None
    """Of the answer, instead of the right one."""
    cut: int | None = None
    """Take so many bytes of what is sent, then reset the connection."""
    lost: bool = False
    """Do what is asked, then reset the connection instead of answering."""


@dataclass(kw_only=True)
class Upload:
    """A blob that is being sent."""

    repository: str
    content: bytearray = field(default_factory=bytearray)


class PushServer(RegistryServer):
    """Repositories that are pushed to, by the distribution specification; what it is asked goes wrong as told."""

    def __init__(self, *, host: str = "127.0.0.1", tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(host=host, tls=tls)
        self.blobs: dict[str, dict[str, bytes]] = {}
        """Repository → digest → content."""
        self.manifests: dict[str, dict[str, tuple[str, bytes]]] = {}
        """Repository → digest → media type and content."""
        self.tags: dict[str, dict[str, str]] = {}
        self.uploads: dict[str, Upload] = {}
        self.forgets_broken = False
        """Whether an upload is lost with the request that broke off: docker-registry has its length in its address."""
        self.conditional = False
        """Whether If-Match and If-None-Match are heeded."""
        self.largest: int | None = None
        """How long a request may be."""
        self.begin_headers: dict[str, str] = {}
        """Of the answer that begins an upload."""
        self.lists_referrers = False
        """Whether there is the referrers API of OCI 1.1."""
        self.page: int | None = None
        """How many referrers an answer lists."""
        self._faults: dict[str, deque[Fault]] = {}

    def fault(self, kind: str, *faults: Fault | int) -> None:
        """Let the next requests of a kind go wrong; a bare number is a status.

        Kinds: `blob` asks for a blob, `mount`, `begin`, `patch`, `state` and `commit` are of uploads; `look`, `read`,
        `manifest` (by digest) and `tag` of manifests, `list` of what refers to one.
        """
        found = [one if isinstance(one, Fault) else Fault(status=one) for one in faults]
        self._faults.setdefault(kind, deque()).extend(found)

    def of_kind(self, *kinds: str) -> list[Asked]:
        with self._guard:
            return [one for one in self.requests if one.kind in kinds]

    @property
    def received(self) -> int:
        """Bytes of blobs that were sent, all in all."""
        return sum(one.received for one in self.of_kind("patch", "commit"))

    def forget(self) -> None:
        """Drop every upload that is not at its end."""
        self.uploads.clear()

    def store(self, repository: str, content: bytes) -> str:
        digest = _digest(content)
        self.blobs.setdefault(repository, {})[digest] = content
        return digest

    def tag(self, repository: str, name: str, content: bytes = b'{"schemaVersion": 2}') -> str:
        """Let somebody push a manifest under a tag; returns its digest."""
        digest = _digest(content)
        self.manifests.setdefault(repository, {})[digest] = (MEDIA_MANIFEST, content)
        self.tags.setdefault(repository, {})[name] = digest
        return digest

    # ------------------------------------------------------------------ requests

    def _takes(self, handler: _Handler) -> bool:
        parts = urlsplit(handler.path)
        if not parts.path.startswith("/v2/"):
            return False
        _Exchange(self, handler, parts.path, parse_qs(parts.query)).run()
        return True

    def _opens(self, authorization: str | None, scopes: Iterable[str]) -> str | None:
        """Return a challenge unless the log-in opens all of the scopes."""
        wanted = list(scopes)
        if self.tokens is None:
            return self._challenge("", authorization)
        token = (authorization or "").removeprefix("Bearer ")
        if self.tokens.opens(authorization) and set(wanted) <= set(self.tokens.scopes[token]):
            return None
        # Registries name what this request takes, which is less than what comes next.
        return f'Bearer realm="{self.realm or self.origin + "/token"}",service="s",scope="{wanted[0]}"'


class _Exchange:
    """One request to a registry that is pushed to, and its answer."""

    def __init__(self, server: PushServer, handler: _Handler, path: str, query: Mapping[str, list[str]]) -> None:
        self.server, self.handler, self.path, self.query = server, handler, path, query
        self.method = handler.command
        found = re.fullmatch(r"/v2/(.+)/(blobs/uploads|blobs|manifests|referrers)/([^/]*)", path)
        assert found, path
        self.repository, self.part, self.name = found.groups()
        self.kind = self._kind()
        with server._guard:
            faults = server._faults.get(self.kind)
            self.fault = faults.popleft() if faults else Fault()
        self.length = int(handler.headers.get("Content-Length") or 0)
        assert "chunked" not in handler.headers.get("Transfer-Encoding", ""), "the length is known"
        self.received = 0

    def _kind(self) -> str:
        if self.part == "blobs/uploads":
            begins = "mount" if "mount" in self.query else "begin"
            kinds = {"POST": begins, "PATCH": "patch", "PUT": "commit", "GET": "state"}
        elif self.part == "blobs":
            kinds = {"HEAD": "blob", "GET": "fetch"}
        elif self.part == "referrers":
            kinds = {"GET": "list"}
        else:
            kinds = {"HEAD": "look", "GET": "read", "PUT": "manifest" if self.name.startswith("sha256:") else "tag"}
        return kinds[self.method]

    def run(self) -> None:
        if self.fault.before is not None:
            self.fault.before()
        scopes = [f"repository:{self.repository}:pull,push"]
        if self.kind == "mount":
            scopes.append(f"repository:{self.query['from'][0]}:pull")
        challenge = self.server._opens(self.handler.headers.get("Authorization"), scopes)
        if challenge is not None:
            self._body()
            self._answer(401, {"WWW-Authenticate": challenge}, _error("UNAUTHORIZED"))
        elif self.fault.cut is not None:
            self._cut()
        elif self.fault.status is not None:
            self._body()
            self._answer(self.fault.status, {}, _error("UNKNOWN"))
        elif self.server.largest is not None and self.length > self.server.largest:
            self._body()
            self._answer(413, {})
        else:
            self._answer(*getattr(self, f"_{self.kind}")())

    def _body(self, most: int | None = None) -> bytes:
        content = self.handler.rfile.read(self.length if most is None else min(most, self.length))
        self.received += len(content)
        return content

    def _cut(self) -> None:
        content = self._body(self.fault.cut)
        if upload := self.server.uploads.get(self.name):
            upload.content += content
        self._note(0)
        self._reset()

    def _reset(self) -> None:
        connection = self.handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        self.handler.close_connection = True

    def _note(self, status: int) -> None:
        asked = Asked(
            method=self.method,
            path=self.path,
            headers={name.lower(): value for name, value in self.handler.headers.items()},
            query=self.query,
            form={},
            status=status,
            at_s=time.monotonic(),
            kind=self.kind,
            received=self.received,
        )
        with self.server._guard:
            self.server.requests.append(asked)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self._note(status)
        if self.fault.lost:
            self._reset()
            return
        body = body if self.fault.body is None else self.fault.body
        self.handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers, **self.fault.headers}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(body)

    # ------------------------------------------------------------------ blobs

    def _blob(self) -> tuple[int, Mapping[str, str]]:
        content = self.server.blobs.get(self.repository, {}).get(self.name)
        return (404, {}) if content is None else (200, {"Content-Length": str(len(content))})

    def _fetch(self) -> tuple[int, Mapping[str, str], bytes]:
        content = self.server.blobs.get(self.repository, {}).get(self.name)
        return (404, {}, b"") if content is None else (200, {}, content)

    def _mount(self) -> tuple[int, Mapping[str, str]]:
        digest, source = self.query["mount"][0], self.query["from"][0]
        content = self.server.blobs.get(source, {}).get(digest)
        if content is None:
            return self._begin()
        self.server.store(self.repository, content)
        return 201, {"Docker-Content-Digest": digest}

    def _begin(self) -> tuple[int, Mapping[str, str]]:
        self._body()
        with self.server._guard:
            name = f"upload-{len(self.server.requests)}-{len(self.server.uploads)}"
            self.server.uploads[name] = Upload(repository=self.repository)
        return 202, {"Location": self._location(name), "Range": "0-0", **self.server.begin_headers}

    def _location(self, name: str) -> str:
        size = len(self.server.uploads[name].content)
        return f"/v2/{self.repository}/blobs/uploads/{name}?state=hidden%3D{size}"

    def _known(self) -> Upload | None:
        upload = self.server.uploads.get(self.name)
        if upload is None or not self.server.forgets_broken:
            return upload
        return upload if self.query["state"] == [f"hidden={len(upload.content)}"] else None

    def _state(self) -> tuple[int, Mapping[str, str], bytes] | tuple[int, Mapping[str, str]]:
        upload = self._known()
        if upload is None:
            return 404, {}, _error("BLOB_UPLOAD_UNKNOWN")
        return 204, {"Location": self._location(self.name), "Range": f"0-{max(len(upload.content) - 1, 0)}"}

    def _patch(self) -> tuple[int, Mapping[str, str], bytes] | tuple[int, Mapping[str, str]]:
        upload, content = self._known(), self._body()
        if upload is None:
            return 404, {}, _error("BLOB_UPLOAD_UNKNOWN")
        if not self._fits(upload, content):
            return 416, {}, _error("RANGE_INVALID")
        upload.content += content
        return 202, {"Location": self._location(self.name), "Range": f"0-{len(upload.content) - 1}"}

    def _fits(self, upload: Upload, content: bytes) -> bool:
        wanted = self.handler.headers.get("Content-Range")
        start = len(upload.content)
        return wanted == f"{start}-{start + len(content) - 1}" if wanted else not start or not content

    def _commit(self) -> tuple[int, Mapping[str, str], bytes] | tuple[int, Mapping[str, str]]:
        upload, content = self._known(), self._body()
        if upload is None:
            return 404, {}, _error("BLOB_UPLOAD_UNKNOWN")
        if not self._fits(upload, content):
            return 416, {}, _error("RANGE_INVALID")
        whole = bytes(upload.content) + content
        del self.server.uploads[self.name]
        if _digest(whole) != self.query["digest"][0]:
            return 400, {}, _error("DIGEST_INVALID")
        return 201, {"Docker-Content-Digest": self.server.store(self.repository, whole)}

    # ------------------------------------------------------------------ manifests

    def _look(self) -> tuple[int, Mapping[str, str]]:
        digest = self.server.tags.get(self.repository, {}).get(self.name, self.name)
        found = self.server.manifests.get(self.repository, {}).get(digest)
        if found is None:
            return 404, {}
        return 200, {"Content-Type": found[0], "Content-Length": str(len(found[1])), "Docker-Content-Digest": digest}

    def _read(self) -> tuple[int, Mapping[str, str], bytes]:
        digest = self.server.tags.get(self.repository, {}).get(self.name, self.name)
        found = self.server.manifests.get(self.repository, {}).get(digest)
        if found is None:
            return 404, {}, _error("MANIFEST_UNKNOWN")
        return 200, {"Content-Type": found[0], "Docker-Content-Digest": digest}, found[1]

    def _manifest(self) -> tuple[int, Mapping[str, str], bytes] | tuple[int, Mapping[str, str]]:
        content, tags = self._body(), self.server.tags.setdefault(self.repository, {})
        digest = _digest(content)
        if self.server.conditional and not self._condition(tags.get(self.name)):
            return 412, {}, b""
        document = json.loads(content)
        blobs = [document["config"], *document["layers"]] if "config" in document else []
        if not all(blob["digest"] in self.server.blobs.get(self.repository, {}) for blob in blobs):
            return 400, {}, _error("MANIFEST_BLOB_UNKNOWN")
        kind = self.handler.headers["Content-Type"]
        self.server.manifests.setdefault(self.repository, {})[digest] = (kind, content)
        if self.kind == "tag":
            tags[self.name] = digest
        elif self.name != digest:
            return 400, {}, _error("DIGEST_INVALID")
        return 201, {"Docker-Content-Digest": digest}

    _tag = _manifest

    def _list(self) -> tuple[int, Mapping[str, str], bytes]:
        if not self.server.lists_referrers:
            return 404, {}, b"404 page not found"
        found = []
        for digest, (kind, content) in self.server.manifests.get(self.repository, {}).items():
            document = json.loads(content)
            if (document.get("subject") or {}).get("digest") == self.name:
                found.append({"mediaType": kind, "digest": digest, "size": len(content)})
        first, most = int(self.query.get("from", ["0"])[0]), self.server.page or len(found)
        headers = {"Content-Type": MEDIA_INDEX}
        if first + most < len(found):
            headers["Link"] = f'<{self.path}?from={first + most}>; rel="next"'
        index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": found[first : first + most]}
        return 200, headers, json.dumps(index).encode()

    def _condition(self, now: str | None) -> bool:
        if self.handler.headers.get("If-None-Match") == "*" and now is not None:
            return False
        wanted = self.handler.headers.get("If-Match")
        return wanted is None or wanted == f'"{now}"'


def _digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def _error(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "canary-message"}]}).encode()
