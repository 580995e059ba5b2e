"""HTTP transfers: repeated within reason, resumed where they broke off, never waited for without end.

Importing requests takes a quarter of a second, so modules import this one where they first transfer something; what
they need before that is in `fetching`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import requests
from requests import Response
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.util.retry import Retry
from urllib3.util.wait import wait_for_read

from builder import __version__
from builder.errors import HashMismatchError, SourceError
from builder.fetching import PARALLEL, Progress, check_stop, start_over
from builder.foreign import reason
from builder.store import BlobWriter

__all__ = ["FAILURES", "Client", "Patience", "Response", "Source", "chunks", "stopped_by"]

RETRYABLE = (408, 425, 429, 500, 502, 503, 504)
ATTEMPTS = 6
BACKOFF_S = 0.5
BACKOFF_MAX_S = 30.0
RETRY_AFTER_MAX_S = 120.0
"""A server may ask for more patience than our own, but not for a day's."""
CONNECT_TIMEOUT_S = 20.0
STALL_S = 30.0
"""A transfer that brought less than STALL_BYTES in this time is broken off and resumed."""
STALL_BYTES = 64 * 1024
STOP_S = 0.2
"""How soon a request ends that is not wanted any more."""
_CHUNK = 1 << 20
FAILURES = (requests.RequestException, Urllib3Error)
"""How a body breaks off."""


class Source(Protocol):
    """A file at a server: how it is asked for, and what its user is told if it does not come."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def size(self) -> int | None:
        """Its size in bytes, if that is known."""

    @property
    def limit(self) -> int | None:
        """How many bytes it may have at most, where its size is not known."""

    def ask(self, headers: Mapping[str, str]) -> Response:
        """Return the answer, whatever it is and with its body unread, to a GET with these headers besides its own."""

    def refused(self, response: Response) -> SourceError:
        """Return the error for an answer without the file, which is closed."""

    def too_long(self, response: Response) -> SourceError | HashMismatchError:
        """Return the error for an answer that brings more than its size or limit."""

    def gave_up(self, attempts: int, why: str) -> SourceError:
        """Return the error for a transfer that broke off each time it was tried."""


class _Retry(Retry):
    """Retries that wait as long as the server says, within reason."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait_s = super().get_retry_after(response)
        return None if wait_s is None else min(wait_s, RETRY_AFTER_MAX_S)


class Patience:
    """How often what failed is tried again, and how long is waited before: longer each time, or as the server says."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        """Break off waiting when `stop` is set."""
        self._stop = stop
        self.renew()

    def renew(self) -> None:
        """Begin anew: something was achieved."""
        self._left, self._delay_s = ATTEMPTS - 1, BACKOFF_S

    def wait(self, response: Response | None = None) -> bool:
        """Wait, and return whether to try again; `response` is the refusal, if there was an answer at all."""
        if not self._left:
            return False
        told_s = None if response is None else _told_s(response)
        if response is not None and response.status_code == 401:
            told_s = 0.0  # the next request has another log-in
        _pause(told_s if told_s is not None else self._delay_s * (1 + random.random() / 2), self._stop)  # noqa: S311 (jitter, not a secret)
        self._left, self._delay_s = self._left - 1, min(2 * self._delay_s, BACKOFF_MAX_S)
        return True


def _told_s(response: Response) -> float | None:
    """Return how long an answer asks to wait, if it does."""
    try:
        return _Retry().get_retry_after(response.raw)
    except Urllib3Error:  # a header that is none
        return None


_this_thread = threading.local()


@contextlib.contextmanager
def stopped_by(stop: threading.Event | None) -> Iterator[None]:
    """Let requests of this thread wait for their answers only until `stop` is set; then they raise SourceError.

    A registry may think about a large blob for minutes, and nobody who presses Ctrl-C should have to.
    """
    _this_thread.stop = stop
    try:
        yield
    finally:
        _this_thread.stop = None


def _await_answer(connection: HTTPConnection) -> None:
    stop: threading.Event | None = getattr(_this_thread, "stop", None)
    if stop is None or not isinstance(connection.timeout, (int, float)):
        return
    end = time.monotonic() + connection.timeout
    while not wait_for_read(connection.sock, STOP_S):
        check_stop(stop)
        if time.monotonic() > end:
            raise TimeoutError


class _Head:
    """An answer's head, line by line, which has to come whole and within STALL_S of its first byte."""

    def __init__(self, file: io.BufferedReader, connection: socket.socket) -> None:
        self._file, self._connection, self._patience_s = file, connection, connection.gettimeout()
        self._end: float | None = None
        self.is_whole = False

    def readline(self, limit: int) -> bytes:
        """Return the next line; less than one only if the connection ends in it, or it is too long."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n") and (here := self._arrived()):
            line += self._file.read(min(here.find(b"\n") + 1 or len(here), limit - len(line)))
        self.is_whole = line in (b"\r\n", b"\n")
        if self.is_whole:
            # What comes next may take its time again: the body, or after "100 Continue" another head.
            self._end = None
            self._connection.settimeout(self._patience_s)
        return line

    def _arrived(self) -> bytes:
        """Return what has come and was not read, at least a byte; nothing if the connection ended."""
        check_stop(getattr(_this_thread, "stop", None))
        if self._end is not None:
            self._connection.settimeout(max(self._end - time.monotonic(), 0.001))
        try:
            here = self._file.peek(1)
        except TimeoutError as error:
            if self._end is None:
                raise
            raise http.client.HTTPException(f"the head of the answer is not there after {STALL_S:.0f} s") from error
        if self._end is None:
            self._end = time.monotonic() + STALL_S
        return here

    def close(self) -> None:
        """Close the file: what has no status line is not read on."""
        self._file.close()


class _Answer(http.client.HTTPResponse):
    """An answer with a whole head: else a connection's end would pass for the head's, and what was cut off be lost."""

    def __init__(self, sock: socket.socket, *arguments: Any, **more: Any) -> None:  # noqa: ANN401 (the base class')
        super().__init__(sock, *arguments, **more)
        self._connection = sock

    def begin(self, **more: Any) -> None:  # noqa: ANN401 (the base class', of newer Pythons)
        file = self.fp
        head = _Head(file, self._connection)
        self.fp = head  # type: ignore[assignment] # as much of a file as a head needs
        try:
            super().begin(**more)
        finally:
            if self.fp is not None:
                self.fp = file
        if not head.is_whole:
            raise http.client.HTTPException("the connection ended within the head of the answer")


class _Connection(HTTPConnection):
    response_class = _Answer

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as in the base class
        _await_answer(self)
        return super().getresponse()


class _TLSConnection(HTTPSConnection):
    response_class = _Answer

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as in the base class
        _await_answer(self)
        return super().getresponse()


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """Makes connections that can be stopped."""

    def init_poolmanager(self, *args: Any, **more: Any) -> None:  # noqa: ANN401 (the base class')
        super().init_poolmanager(*args, **more)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:  # noqa: ANN401 (the base class')
        manager = super().proxy_manager_for(proxy, **more)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


class _BareSession(requests.Session):
    """A session that follows no redirection and logs in nowhere by itself."""

    def get_redirect_target(self, resp: Response) -> None:
        """Say that there is none.

        Told not to follow, requests still prepares to: it parses the new address and reads the whole body, into memory.
        """

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """Let the headers be as they are: without `auth`, requests takes a password from ~/.netrc or from the URL."""
        request.auth = _as_it_is
        return super().prepare_request(request)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class Client:
    """Speaks HTTP; repeats what may pass, and waits as it is told.

    A bare client leaves redirections and log-ins to its user.
    """

    def __init__(
        self, *, bare: bool = False, methods: Iterable[str] = ("GET", "HEAD"), attempts: int = ATTEMPTS
    ) -> None:
        """Repeat requests of `methods`; with one of `attempts`, none."""
        self.session = _BareSession() if bare else requests.Session()
        retry = _Retry(
            total=attempts - 1,
            status_forcelist=RETRYABLE,
            allowed_methods=tuple(methods),
            backoff_factor=BACKOFF_S,
            backoff_max=BACKOFF_MAX_S,
            backoff_jitter=BACKOFF_S,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _Adapter(max_retries=retry, pool_maxsize=4 * PARALLEL))
        self.session.headers["User-Agent"] = f"torchyard/{__version__}"

    def close(self) -> None:
        """Close its connections."""
        self.session.close()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | Sequence[str]] | None = None,
        data: Mapping[str, str] | bytes | Iterable[bytes | memoryview] | None = None,
        stream: bool = False,
        verify: bool | None = None,
        proxies: Mapping[str, str] | None = None,
        patience_s: float = STALL_S,
    ) -> Response:
        """Return the answer of whatever status; raises OSError if there is none, ValueError for a URL that is none.

        `stream` leaves its body unread; `verify` and `proxies` are requests' own. The answer may begin `patience_s`
        after the last byte was sent.
        """
        try:
            return self.session.request(
                method,
                url,
                headers=headers,
                params=params,
                data=data,  # type: ignore[arg-type] # a socket takes a memoryview as it takes bytes
                stream=stream,
                verify=verify,
                proxies=dict(proxies or {}),
                # A HEAD is followed as well: it asks about the file, wherever that is.
                allow_redirects=True,
                timeout=(CONNECT_TIMEOUT_S, patience_s),
            )
        except Urllib3Error as error:  # requests lets some of them pass, and its own are OSErrors
            raise requests.RequestException(error) from error

    @staticmethod
    def download(source: Source, writer: BlobWriter, progress: Progress, stop: threading.Event | None = None) -> None:
        """Write what is missing of the file; raises what the source says if it does not come."""
        _Download(source=source, writer=writer, progress=progress, stop=stop).run()

    @staticmethod
    def small_body(response: Response, limit: int = 1 << 20) -> bytes | None:
        """Return an unread body that ought to be small; None if it is not, or does not come."""
        body = bytearray()
        try:
            for chunk in chunks(response):
                body += chunk
                if len(body) > limit:
                    return None
        except FAILURES:
            return None
        return bytes(body)


@dataclass(frozen=True, kw_only=True)
class _Download:
    """A file on its way into the store."""

    source: Source
    writer: BlobWriter
    progress: Progress
    stop: threading.Event | None

    def run(self) -> None:
        """Ask for the rest until it is here.

        The session repeats requests that get no answer or a passing refusal; here, answers that break off are resumed.
        """
        source, writer = self.source, self.writer
        delay, attempt, why = BACKOFF_S, 0, ""
        while attempt < ATTEMPTS:
            check_stop(self.stop)
            if writer.offset == source.size:
                return
            with self._open() as response:
                before = writer.offset
                length = response.headers.get("Content-Length", "")
                end = before + int(length) if length.isdecimal() else source.size
                try:
                    self._receive(response)
                except FAILURES as error:
                    why = reason(error)
                else:
                    if end is None or writer.offset >= end:
                        return
                    why = f"the connection closed {end - writer.offset} bytes early"
            # Progress earns new attempts: a link that breaks every 100 MB still gets a file of gigabytes.
            attempt = 0 if writer.offset - before > STALL_BYTES * 16 else attempt + 1
            _pause(delay * (1 + random.random() / 2), self.stop)  # noqa: S311 (jitter, not a secret)
            delay = min(2 * delay, BACKOFF_MAX_S)
        raise source.gave_up(ATTEMPTS, why)

    def _open(self) -> Response:
        """Return the answer whose body goes on where the writer is, which starts over if the server cannot do that."""
        offset = self.writer.offset
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        response = self.source.ask(headers)
        if offset and response.status_code == 416:  # the file is shorter than what is here: that is of another one
            response.close()
            start_over(self.source.name, self.writer, self.progress)
            return self._open()
        if response.status_code not in (200, 206):
            raise self.source.refused(response)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if offset and not (response.status_code == 206 and resumed):
            start_over(self.source.name, self.writer, self.progress)
        return response

    def _receive(self, response: Response) -> None:
        source, writer = self.source, self.writer
        most = source.limit if source.size is None else source.size
        for chunk in chunks(response):
            check_stop(self.stop)
            if most is not None and writer.offset + len(chunk) > most:
                start_over(source.name, writer, self.progress)
                raise source.too_long(response)
            writer.write(chunk)
            self.progress.advance(source.name, len(chunk))


def chunks(response: Response) -> Iterator[bytes]:
    """Yield the body as it comes, not decoded; raises ReadTimeout if next to nothing comes."""
    window_start, window_bytes = time.monotonic(), 0
    # read1 returns what has arrived instead of waiting for a whole chunk, so a trickle is noticed.
    read = response.raw.read1 if hasattr(response.raw, "read1") else response.raw.read
    while chunk := read(_CHUNK):
        yield chunk
        window_bytes += len(chunk)
        now = time.monotonic()
        if now - window_start > STALL_S:
            if window_bytes < STALL_BYTES:
                raise requests.exceptions.ReadTimeout(f"only {window_bytes} bytes in {STALL_S:.0f} s")
            window_start, window_bytes = now, 0


def _pause(time_s: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(time_s)
    else:
        stop.wait(time_s)
