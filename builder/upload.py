"""One blob or manifest to one registry: asked for first, mounted from where it lies already, sent once if need be.

What breaks off is resumed where the registry says that it stopped. A stream is never sent again before the registry
was asked what it has of it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote, urlsplit

from builder.errors import HashMismatchError, ImpossibleError, SourceError
from builder.fetching import Progress, check_stop
from builder.foreign import reason, without_credentials
from builder.layout import Descriptor
from builder.registry import MANIFEST_MAX, MANIFEST_TYPES, Registry
from builder.transfer import ATTEMPTS, RETRYABLE, STALL_S, Patience, Response, stopped_by

SMALL = 1 << 20
"""What is left of a blob, in bytes, that goes with the request that ends its upload, and needs none before it."""
CHUNKS = (64 << 20, 16 << 20, 4 << 20)
"""How much one request brings, in bytes, where a registry, or what stands before it, takes no blob in one.

In one is tried first: most registries take both, some no chunks."""
PATIENCE_S = 300.0
"""A registry may bring a blob to where it keeps them, and read it for its hash, before it answers."""
_AT_A_TIME = 128 << 10
"""Bytes given to the socket at once: they must be gone within a connection's time-out, also over a slow line."""
_SHORT_ANSWER = 64 << 10
_PLAIN = {"Accept-Encoding": "identity"}
_ACCEPT = {**_PLAIN, "Accept": ", ".join(MANIFEST_TYPES)}
_AGAIN = "run again: what arrived is not sent again"

Pieces = Callable[[], Iterator[bytes]]
"""Gives the bytes of a blob from the first on; raises at the end if they were wrong."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A repository of a registry."""

    registry: Registry
    repository: str
    actions: str = "pull,push"
    """What log-ins are asked for: "pull" of whoever only reads, because some registries refuse strangers more."""

    def __str__(self) -> str:
        return f"{self.registry.host}/{self.repository}"

    def url(self, path: str) -> str:
        """Return an address of the registry's interface to the repository."""
        return self.registry.url(self.repository, path)


class Way(StrEnum):
    """How a blob came to be in a repository."""

    THERE = "there"
    MOUNTED = "mounted"
    SENT = "sent"


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A blob that is in the repository, and how many bytes were sent for it, those sent again included."""

    way: Way
    bytes_sent: int = 0


class _BrokenError(Exception):
    """A request without an answer, or with one after which another try is worth it."""

    def __init__(self, why: str, response: Response | None = None) -> None:
        super().__init__(why)
        self.why, self.response = why, response


# ----------------------------------------------------------------------------------------------------
# What is there


def has_blob(target: Target, blob: Descriptor) -> bool:
    """Tell whether the repository has the blob; raises SourceError if that cannot be found out."""
    response = _head(target, f"blobs/{blob.digest}")
    if not _is_there(target, response, "blob"):
        return False
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != blob.size:
        raise HashMismatchError(
            "the registry has other bytes under the digest of a blob",
            where=f"{target}@{blob.digest}",
            why=f"it says that they are {length}; the blob has {blob.size}",
            tries=("have the blob deleted there, and run again: its storage is damaged",),
        )
    return True


def resolve(target: Target, name: str) -> str | None:
    """Return the digest of the manifest that a tag or digest names there, None if there is none."""
    response = _head(target, f"manifests/{name}")
    if not _is_there(target, response, "manifest"):
        return None
    digest = response.headers.get("Docker-Content-Digest", "")
    if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        return digest
    content = read_manifest(target, name)  # registries need not send the header
    return None if content is None else _digest_of(content)


def read_manifest(target: Target, name: str) -> bytes | None:
    """Return the manifest that a tag or digest names there, byte for byte; None if there is none."""
    patience = Patience()
    while True:
        response = target.registry.request(
            "GET", f"manifests/{name}", repository=target.repository, actions=target.actions, headers=_ACCEPT
        )
        if not _is_there(target, response, "manifest"):
            return None
        content = target.registry.small_body(response, MANIFEST_MAX)
        if content is not None:
            return content
        length = response.headers.get("Content-Length", "")
        too_large = length.isdecimal() and int(length) > MANIFEST_MAX
        if too_large or not patience.wait():
            raise SourceError(
                "a manifest could not be read back",
                where=f"{target}: {name}",
                why=f"it is larger than {MANIFEST_MAX >> 20} MiB" if too_large else "it breaks off each time",
                tries=("this is no image's manifest",) if too_large else (_AGAIN,),
            )


def manifest_of(target: Target, name: str) -> tuple[str, bytes]:
    """Return digest and bytes of the manifest that a tag or digest names there.

    Raises ImpossibleError if there is none, HashMismatchError if the registry gives another than it names.
    """
    where = f"{target}@{name}" if name.startswith("sha256:") else f"{target}:{name}"
    digest = resolve(target, name)
    content = read_manifest(target, digest) if digest is not None else None
    if digest is None or content is None:
        raise ImpossibleError("there is no such image", where=where, tries=("check the repository and the tag",))
    if _digest_of(content) != digest:
        raise HashMismatchError(
            "the registry gives another manifest than it names",
            where=where,
            why=f"it names {digest}",
            tries=("do not use this registry if it stays",),
        )
    return digest, content


def _head(target: Target, path: str) -> Response:
    response = target.registry.request(
        "HEAD", path, repository=target.repository, actions=target.actions, headers=_ACCEPT
    )
    target.registry.small_body(response, _SHORT_ANSWER)  # so that the connection is used again
    return response


def _is_there(target: Target, response: Response, name: str) -> bool:
    """Read an answer's status; raises SourceError if it says neither that a thing is there nor that it is not."""
    if response.status_code == 200:
        return True
    # An address elsewhere may have been made for reading alone.
    if response.status_code in (404, 410) or urlsplit(response.url).netloc != target.registry.host:
        response.close()
        return False
    raise _refused(target, response, f"whether it has the {name}", verb="say")


# ----------------------------------------------------------------------------------------------------
# Manifests


def put_manifest(
    target: Target,
    name: str,
    content: bytes,
    media_type: str,
    *,
    needed: Callable[[], bool],
    conditions: Mapping[str, str] | None = None,
) -> bool:
    """Store a manifest under a tag or digest; returns whether it was sent.

    `needed` is asked before each attempt: an answer may be lost after the registry did what it was asked. `conditions`
    are headers under which the registry may refuse with 412, if it knows them; then `needed` is asked once more.
    """
    patience = Patience()
    headers = {**_PLAIN, "Content-Type": media_type, **(conditions or {})}
    while needed():
        try:
            response = _asked(target, "PUT", target.url(f"manifests/{name}"), headers=headers, body=content)
        except _BrokenError as error:
            broken = error
        else:
            if response.status_code in (200, 201, 202, 204):
                _require_digest(target, response, "manifest", _digest_of(content))
                return True
            if response.status_code != 412:
                raise _refused(target, response, "manifest")
            broken = _BrokenError(target.registry.said(response), response)
        if not patience.wait(broken.response):
            raise _gave_up(target, "manifest", broken)
    return False


def _digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _require_digest(target: Target, response: Response, name: str, digest: str) -> None:
    """Refuse an answer by which a registry took something else than it was sent; the answer is read."""
    target.registry.small_body(response, _SHORT_ANSWER)
    got = response.headers.get("Docker-Content-Digest") or digest
    if got != digest:
        raise HashMismatchError(
            f"the registry took the {name} for another",
            where=str(target),
            why=f"{digest} was sent, and it answers {re.sub('[^A-Za-z0-9:]', '?', got[:80])}",
            tries=("run again: a proxy may have changed it on the way",),
        )


# ----------------------------------------------------------------------------------------------------
# Requests


def _asked(
    target: Target,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes | _Body = b"",
    also: str | None = None,
    patience_s: float = STALL_S,
) -> Response:
    """Return the answer to one request; raises _BrokenError if there is none, or one of those that pass."""
    try:
        response = target.registry.request_once(
            method, url, repository=target.repository, also=also, headers=headers, body=body, patience_s=patience_s
        )
    except (OSError, ValueError) as error:
        raise _BrokenError(reason(error)) from error
    if response.status_code in RETRYABLE or response.status_code == 401:
        raise _BrokenError(target.registry.said(response), response)
    return response


def _refused(target: Target, response: Response, name: str, *, verb: str = "take the") -> SourceError:
    """Return the error for an answer that another try would not change; it is read."""
    said = target.registry.said(response)
    if response.status_code in (401, 403):
        return target.registry.unauthorised(target.repository, said)
    tries = {
        404: "make the repository first: some registries do not do that by themselves",
        413: "have whoever runs the registry, or the proxy before it, allow larger requests",
    }
    return SourceError(
        f"{target} does not {verb} {name}",
        where=without_credentials(response.url),
        why=said,
        tries=(tries.get(response.status_code, _AGAIN),),
    )


def _gave_up(target: Target, name: str, error: _BrokenError) -> SourceError:
    if error.response is not None and error.response.status_code == 401:
        return target.registry.unauthorised(target.repository, error.why)
    return SourceError(
        f"the {name} could not be pushed: gave up after {ATTEMPTS} attempts",
        where=str(target),
        why=error.why,
        tries=(_AGAIN,),
    )


# ----------------------------------------------------------------------------------------------------
# Blobs


def push_blob(
    target: Target,
    blob: Descriptor,
    pieces: Pieces,
    *,
    name: str,
    sources: Sequence[str],
    progress: Progress,
    stop: threading.Event | None = None,
) -> Arrived:
    """Bring a blob into the repository if it is not there.

    `name` is what people call it; `sources` are repositories of the same registry that may have it. `progress` hears of
    what is sent. Raises SourceError if it cannot be brought there, and as `pieces` does.
    """
    with stopped_by(stop):
        if has_blob(target, blob):
            return Arrived(way=Way.THERE)
        reader = _Reader(pieces, blob.size)
        upload = _Upload(target=target, blob=blob, reader=reader, name=name, progress=progress, stop=stop)
        return upload.run(sources)


@dataclass(kw_only=True)
class _Session:
    """An upload that a registry has begun to take."""

    url: str
    least: int = 0
    """Bytes that a chunk must have, unless it is the last."""
    offset: int = 0
    is_ending: bool = False
    """Whether the request that ends it was made."""
    is_doubtful: bool = False
    """Whether an answer is missing: what the registry has must be asked before anything is sent."""


@dataclass(kw_only=True)
class _Upload:
    """A blob on its way."""

    target: Target
    blob: Descriptor
    reader: _Reader
    name: str
    progress: Progress
    stop: threading.Event | None
    bytes_sent: int = 0
    _told: int = 0
    _begun: int = 0
    _lost: str = ""
    """What the registry said when it no longer knew an upload."""
    _chunks: list[int] = field(default_factory=lambda: list(CHUNKS))
    _chunk: int | None = None

    def run(self, sources: Sequence[str]) -> Arrived:
        session: _Session | None = None
        for source in sources:
            response = self._mount(source)
            if response is not None and response.status_code == 201:
                _require_digest(self.target, response, self.name, self.blob.digest)
                return Arrived(way=Way.MOUNTED)
            if response is not None:
                session = self._session(response)
                break
        self.progress.start(self.name, self.blob.size, 0)
        self._bring(session)
        self.progress.finish(self.name)
        return Arrived(way=Way.SENT, bytes_sent=self.bytes_sent)

    def tell(self, offset: int) -> None:
        """Report that so many bytes of the blob are on their way; fewer than before if it goes back."""
        self.progress.advance(self.name, offset - self._told)
        self._told = offset

    def _mount(self, source: str) -> Response | None:
        """Return the answer of a registry that mounts the blob, or begins an upload instead; None for any other."""
        url = self.target.url(f"blobs/uploads/?mount={_quoted(self.blob.digest)}&from={_quoted(source)}")
        for _ in range(2):  # a log-in for both repositories may be needed first
            try:
                response = _asked(self.target, "POST", url, headers=_PLAIN, also=source)
            except _BrokenError as error:
                if error.response is not None and error.response.status_code == 401:
                    continue
                return None
            except SourceError:  # the other repository may be closed: the blob is sent, then
                return None
            if response.status_code in (201, 202):
                return response
            response.close()
            return None
        return None

    def _bring(self, session: _Session | None) -> None:
        """Send the blob, and again what broke off, as long as that helps."""
        patience, furthest = Patience(self.stop), 0
        while True:
            check_stop(self.stop)
            try:
                if session is None:
                    session = self._begin()
                elif session.is_doubtful:
                    if session.is_ending and has_blob(self.target, self.blob):
                        return  # only the answer was lost
                    session = self._state(session)
                else:
                    session = self._send(session)
                    if session is not None and session.is_ending and not session.is_doubtful:
                        return
            except _BrokenError as error:
                if not patience.wait(error.response):
                    raise _gave_up(self.target, self.name, error) from error
            if session is not None and session.offset > furthest:
                # Progress earns new attempts.
                furthest = session.offset
                patience.renew()

    def _begin(self) -> _Session:
        if self._begun == ATTEMPTS:
            raise _gave_up(self.target, self.name, _BrokenError(f"the registry lost each upload of it: {self._lost}"))
        response = _asked(self.target, "POST", self.target.url("blobs/uploads/"), headers=_PLAIN)
        if response.status_code != 202:
            raise _refused(self.target, response, self.name)
        self._begun += 1
        return self._session(response)

    def _session(self, response: Response) -> _Session:
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        self._drain(response)
        return _Session(url=self.target.registry.next_url(response), least=int(least) if least.isdecimal() else 0)

    def _drain(self, response: Response) -> None:
        self.target.registry.small_body(response, _SHORT_ANSWER)

    def _send(self, session: _Session) -> _Session | None:
        """Send what is left, or the next chunk of it; returns None if the registry does not know the upload."""
        left = self.blob.size - session.offset
        session.is_ending, session.is_doubtful = left <= SMALL, True
        length = left if session.is_ending or self._chunk is None else min(left, max(self._chunk, session.least))
        headers = {**_PLAIN, "Content-Type": "application/octet-stream"}
        if length and (session.offset or length < left):
            headers["Content-Range"] = f"{session.offset}-{session.offset + length - 1}"
        body = _Body(self, session.offset, length) if length else b""
        if session.is_ending:
            separator = "&" if urlsplit(session.url).query else "?"
            url = f"{session.url}{separator}digest={_quoted(self.blob.digest)}"
            response = _asked(self.target, "PUT", url, headers=headers, body=body, patience_s=PATIENCE_S)
        else:
            response = _asked(self.target, "PATCH", session.url, headers=headers, body=body, patience_s=PATIENCE_S)
        return self._judged(session, response, session.offset + length)

    def _judged(self, session: _Session, response: Response, sent: int) -> _Session | None:
        """Read the answer to what was sent up to the place `sent`."""
        status = response.status_code
        if status == 413 and self._chunks:
            self._drain(response)
            self._chunk = self._chunks.pop(0)
            return session
        if status == 416:  # it has more or less than was thought
            raise _BrokenError(self.target.registry.said(response), response)
        if status in (400, 404):
            self._forget(response)
            return None
        if status not in (200, 201, 202, 204):
            raise _refused(self.target, response, self.name)
        if session.is_ending:
            _require_digest(self.target, response, self.name, self.blob.digest)
            session.is_doubtful = False
            return session
        return self._continued(session, response, default=sent)

    def _state(self, session: _Session) -> _Session | None:
        """Ask the registry what it has of an upload; returns None if it does not know it."""
        response = _asked(self.target, "GET", session.url, headers=_PLAIN)
        if response.status_code not in (200, 202, 204):
            self._forget(response)
            return None
        return self._continued(session, response, default=None)

    def _continued(self, session: _Session, response: Response, *, default: int | None) -> _Session | None:
        """Take up an upload where the registry says that it is, by `default` at that place."""
        found = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        offset = default
        if found is not None:
            offset = int(found[1]) + 1 if int(found[1]) else 0  # nothing is written as 0-0, too
        if offset is None or offset > self.blob.size:
            self._forget(response)
            return None
        self._drain(response)
        if "Location" in response.headers:
            session.url = self.target.registry.next_url(response)
        session.is_ending, session.is_doubtful = False, False
        stands_still = default is not None and offset <= session.offset
        session.offset = offset
        self.tell(offset)
        if stands_still:
            raise _BrokenError("the registry keeps nothing of what it is sent")
        return session

    def _forget(self, response: Response) -> None:
        self._lost = self.target.registry.said(response)
        self.tell(0)


class _Reader:
    """The bytes of a blob from any place on; made again from the first where that lies before what was read."""

    def __init__(self, pieces: Pieces, size: int) -> None:
        self._pieces, self._size = pieces, size
        self._stream: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._at = -1

    def read(self, start: int, length: int) -> Iterator[memoryview]:
        """Yield `length` bytes from `start` on; the blob's last ones only after all of them were found right."""
        if start != self._at:
            self._stream, self._rest, self._at = self._pieces(), memoryview(b""), 0
            while self._at < start:
                self._take(start - self._at)
        while length:
            piece = self._take(min(length, _AT_A_TIME))
            length -= len(piece)
            yield piece

    def _take(self, most: int) -> memoryview:
        if not self._rest:
            self._rest = memoryview(next(self._stream))
        piece, self._rest = self._rest[:most], self._rest[most:]
        self._at += len(piece)
        if self._at == self._size:
            for _ in self._stream:  # it ends here, or raises
                pass
        return piece


class _Body:
    """A part of a blob as the body of a request."""

    def __init__(self, upload: _Upload, start: int, length: int) -> None:
        self._upload, self._start, self._length = upload, start, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[memoryview]:
        at = self._start
        for piece in self._upload.reader.read(self._start, self._length):
            check_stop(self._upload.stop)
            yield piece
            at += len(piece)
            self._upload.bytes_sent += len(piece)
            self._upload.tell(at)


def _quoted(text: str) -> str:
    return quote(text, safe="")
