"""Package indexes: the one place that speaks HTTP, with the indexes and certificates the user's pip is set up for."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
from packaging.utils import canonicalize_name
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.util.retry import Retry

from builder import __version__
from builder.errors import HashMismatchError, Problem, SourceError, ToolError
from builder.store import BlobWriter, Store, sha256_of

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, ProjectPage

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
PARALLEL = 4
_CHUNK = 1 << 20
_TRANSFER_ERRORS = (requests.RequestException, Urllib3Error)


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


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to be found: its name, its hash, and the index it must come from (None: the user's own)."""

    project: str
    filename: str
    sha256: str
    size: int | None = None
    index_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A file that an index lists."""

    filename: str
    url: str
    sha256: str | None
    size: int | None
    upload_time: datetime | None

    def is_of(self, wanted: Wanted) -> bool:
        """Tell whether this can be the file: another build of the same name has another hash."""
        return self.filename == wanted.filename and self.sha256 in (None, wanted.sha256)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Where the user's pip looks for packages, and how."""

    default_index: str
    extra_indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    certificates: str | None = None
    client_certificate: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()

    @classmethod
    def of_user(cls, environ: Mapping[str, str] = os.environ) -> Configuration:
        """Read pip's merged configuration (files and PIP_* variables) as pip itself reports it.

        pip has no public interface for its default index: uv's variable, then pypi-simple's constant, stand in.
        """
        command = [sys.executable, "-m", "pip", "config", "list"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environ))
        if result.returncode != 0:
            raise ToolError(
                "pip's configuration cannot be read",
                why=(result.stderr.strip().splitlines() or ["pip printed nothing"])[-1],
                tries=(f"{' '.join(command)} shows the full message",),
            )
        return cls.parse(result.stdout, environ)

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str]) -> Configuration:
        """Read the output of `pip config list`: `scope.key='value'` a line, later scopes winning in pip's order."""
        rank = {"global": 0, "install": 1, "download": 1, ":env:": 2}
        found: dict[str, tuple[int, str]] = {}
        for line in text.splitlines():
            left, separator, right = line.partition("=")
            scope, dot, key = left.rpartition(".")
            if not (separator and dot and scope in rank):
                continue
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(right)
                if isinstance(value, str) and rank[scope] >= found.get(key, (-1, ""))[0]:
                    found[key] = (rank[scope], value)

        def one(key: str) -> str | None:
            return found[key][1].strip() or None if key in found else None

        def many(key: str) -> tuple[str, ...]:
            return tuple((one(key) or "").split())

        import pypi_simple  # noqa: PLC0415 (a third of a second, which a build that needs no index saves)

        default = one("index-url") or environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
        return cls(
            default_index=default or pypi_simple.PYPI_SIMPLE_ENDPOINT,
            extra_indexes=many("extra-index-url"),
            find_links=many("find-links"),
            no_index=(one("no-index") or "").lower() in ("1", "true", "yes", "on"),
            certificates=one("cert"),
            client_certificate=one("client-cert"),
            proxy=one("proxy"),
            trusted_hosts=many("trusted-host"),
        )


def without_credentials(url: str) -> str:
    """Return `url` as it may be shown: without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def local_path(location: str) -> Path | None:
    """Return the path that a find-links entry or file: URL names; None if it is a remote address."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme in ("http", "https") else Path(location).expanduser()


class _Retry(Retry):
    """Retries that wait as long as the server says, within reason."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait_s = super().get_retry_after(response)
        return None if wait_s is None else min(wait_s, RETRY_AFTER_MAX_S)


class Index:
    """Finds and fetches files by name and hash in the user's find-links and indexes."""

    def __init__(self, *, configuration: Configuration | None = None) -> None:
        """Look where `configuration` says; without one, where the user's pip looks."""
        self._given = configuration
        self._pages: dict[tuple[str, str], tuple[Offer, ...]] = {}
        self._guard = threading.Lock()

    @cached_property
    def configuration(self) -> Configuration:
        """Where to look; the user's is asked for when it is needed, because asking pip takes half a second."""
        return self._given or Configuration.of_user()

    @cached_property
    def session(self) -> requests.Session:
        """A session that retries what may pass, waits as told, and trusts what the user's pip trusts."""
        session = requests.Session()
        retry = _Retry(
            total=ATTEMPTS - 1,
            status_forcelist=RETRYABLE,
            allowed_methods=("GET", "HEAD"),
            backoff_factor=BACKOFF_S,
            backoff_max=BACKOFF_MAX_S,
            backoff_jitter=BACKOFF_S,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=4 * PARALLEL))
        session.headers["User-Agent"] = f"torchyard/{__version__}"
        if self.configuration.certificates:
            session.verify = self.configuration.certificates
        if self.configuration.client_certificate:
            session.cert = self.configuration.client_certificate
        if self.configuration.proxy:
            session.proxies = {"http": self.configuration.proxy, "https": self.configuration.proxy}
        return session

    def _verify(self, url: str) -> bool | None:
        """Return False for the hosts the user told pip to trust without a certificate, None for the session's rule."""
        parts = urlsplit(url)
        return (
            False if {parts.hostname, parts.netloc.rpartition("@")[2]} & set(self.configuration.trusted_hosts) else None
        )

    # ------------------------------------------------------------------ listing

    def page(self, index_url: str, project: str) -> tuple[Offer, ...]:
        """Return the files an index lists for a project; empty if the index says it has no such project.

        Raises SourceError if the index cannot be asked: an index that fails is never one that has nothing.
        """
        import pypi_simple  # noqa: PLC0415 (see above)

        key = (index_url.rstrip("/"), canonicalize_name(project))
        with self._guard:
            if key in self._pages:
                return self._pages[key]
        directory = local_path(index_url)
        try:
            page = self._remote_page(*key) if directory is None else self._local_page(directory, key[1])
        except (
            OSError,  # of requests, and of a local index
            Urllib3Error,
            pypi_simple.UnsupportedContentTypeError,
            pypi_simple.UnsupportedRepoVersionError,
            ValueError,  # of pypi-simple, for a page that is not one
            TypeError,
            KeyError,
        ) as error:
            raise SourceError(
                f"the package index {without_credentials(index_url)} cannot be read",
                why=_reason(error),
                tries=("check the network and `pip config list`", "run again: what was fetched is kept"),
            ) from error
        offers = tuple(map(_offer, page.packages)) if page else ()
        with self._guard:
            self._pages[key] = offers
        return offers

    def _remote_page(self, index_url: str, project: str) -> ProjectPage | None:
        import pypi_simple  # noqa: PLC0415 (see above)

        # JSON is preferred, because it has sizes and upload times; an index that only knows HTML answers in HTML.
        response = self.session.get(
            f"{index_url}/{project}/",
            headers={"Accept": pypi_simple.ACCEPT_JSON_PREFERRED},
            timeout=(CONNECT_TIMEOUT_S, STALL_S),
            verify=self._verify(index_url),
        )
        if response.status_code == 404:
            return None
        response.raise_for_status()
        return pypi_simple.ProjectPage.from_response(response, project)

    @staticmethod
    def _local_page(directory: Path, project: str) -> ProjectPage | None:
        import pypi_simple  # noqa: PLC0415 (see above)

        file = directory / project / "index.html"
        try:
            return pypi_simple.ProjectPage.from_html(project, file.read_bytes(), base_url=file.as_uri())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _find_links(self, wanted: Wanted, problems: list[Problem]) -> Iterator[Offer]:
        for location in self.configuration.find_links:
            path = local_path(location)
            if path is not None and path.is_dir():
                file = path / wanted.filename
                if file.is_file():
                    yield Offer(
                        filename=wanted.filename,
                        url=file.absolute().as_uri(),
                        sha256=None,
                        size=file.stat().st_size,
                        upload_time=None,
                    )
                continue
            try:
                page = self._links_page(location, path)
            except (OSError, Urllib3Error) as error:
                # pip, too, warns and goes on: the file may be elsewhere, and its hash is known.
                problems.append(
                    Problem(what=f"the links of {without_credentials(location)} cannot be read", why=_reason(error))
                )
                continue
            yield from (offer for offer in map(_offer, page.packages) if offer.is_of(wanted))

    def _links_page(self, location: str, path: Path | None) -> ProjectPage:
        import pypi_simple  # noqa: PLC0415 (see above)

        if path is not None:
            return pypi_simple.ProjectPage.from_html("find-links", path.read_bytes(), base_url=path.absolute().as_uri())
        response = self.session.get(location, timeout=(CONNECT_TIMEOUT_S, STALL_S), verify=self._verify(location))
        response.raise_for_status()
        return pypi_simple.ProjectPage.from_html("find-links", response.content, base_url=response.url)

    def local_files(self) -> Iterator[Path]:
        """Yield every file in the directories that pip's find-links name."""
        for location in self.configuration.find_links:
            path = local_path(location)
            if path is not None and path.is_dir():
                yield from sorted(path.iterdir())

    def offers(self, wanted: Wanted, problems: list[Problem]) -> Iterator[Offer]:
        """Yield where the file can be had, nearest first: find-links, its own index, the default, the extra ones.

        Searching many places is safe here, unlike when resolving: the hash decides what is taken. Places that cannot
        be asked are added to `problems`.
        """
        yield from self._find_links(wanted, problems)
        for url in self._indexes(wanted):
            try:
                listed = self.page(url, wanted.project)
            except SourceError as error:
                problems += error.problems
                continue
            yield from (offer for offer in listed if offer.is_of(wanted))

    def _indexes(self, wanted: Wanted) -> tuple[str, ...]:
        urls = [wanted.index_url] if wanted.index_url else []
        if not self.configuration.no_index:
            urls += [self.configuration.default_index, *self.configuration.extra_indexes]
        return tuple(dict.fromkeys(urls))

    def get(self, url: str) -> tuple[int, str]:
        """Return status and text of a page as they are; raises SourceError only if there is no answer at all."""
        try:
            response = self.session.get(url, timeout=(CONNECT_TIMEOUT_S, STALL_S), verify=self._verify(url))
        except _TRANSFER_ERRORS as error:
            raise SourceError(f"{without_credentials(url)} does not answer", why=_reason(error)) from error
        return response.status_code, response.text

    def size(self, url: str) -> int:
        """Return the size in bytes of the file at `url` by asking its server (or disk) for nothing more."""
        path = local_path(url)
        try:
            if path is not None:
                return path.stat().st_size
            response = self.session.head(
                url,
                headers={"Accept-Encoding": "identity"},
                allow_redirects=True,
                timeout=(CONNECT_TIMEOUT_S, STALL_S),
                verify=self._verify(url),
            )
            response.raise_for_status()
            return int(response.headers["Content-Length"])
        except (OSError, Urllib3Error, KeyError, ValueError) as error:
            raise SourceError(
                f"the size of {Path(unquote(urlsplit(url).path)).name} is not known",
                why=f"{without_credentials(url)}: {_reason(error)}",
                tries=("run again",),
            ) from error

    # ------------------------------------------------------------------ fetching

    def fetch(self, wanted: Wanted, store: Store, progress: Progress, stop: threading.Event | None = None) -> Path:
        """Bring the file into the store, resuming where an earlier run stopped; returns its path.

        Raises HashMismatchError if every place serves other bytes, SourceError if none can serve it.
        """
        if store.has(wanted.sha256, size=wanted.size):
            return store.path(wanted.sha256)
        with store.writer(wanted.sha256, wanted.filename) as writer:
            if store.has(wanted.sha256, size=wanted.size):  # another process was faster
                return store.path(wanted.sha256)
            if wanted.size is not None and writer.offset > wanted.size:
                writer.restart()
            unread: list[Problem] = []
            failures: list[SourceError | HashMismatchError] = []
            for offer in self.offers(wanted, unread):
                for _ in range(2):
                    resumed, done = writer.offset > 0, 0
                    try:
                        if not self._transfer(offer, wanted, writer, progress, stop):
                            break  # another build of the same name lies there: not what is locked
                        done = writer.offset
                        final = writer.commit()
                    except SourceError as error:
                        failures.append(error)
                        break
                    except HashMismatchError as error:
                        progress.advance(wanted.filename, -done)
                        if not resumed:
                            failures.append(error)
                            break
                        # Perhaps not this place's fault: what was resumed may be damaged, or of another place.
                    else:
                        progress.finish(wanted.filename)
                        return final
            raise self._not_fetched(wanted, failures, unread)

    def _not_fetched(
        self, wanted: Wanted, failures: Sequence[SourceError | HashMismatchError], unread: Sequence[Problem]
    ) -> SourceError | HashMismatchError:
        problems = (*(problem for failure in failures for problem in failure.problems), *unread)
        if any(isinstance(failure, HashMismatchError) for failure in failures):
            return HashMismatchError(problems=problems)
        if failures:
            return SourceError(
                f"{wanted.filename} could not be fetched",
                tries=("run again: what arrived is kept and resumed",),
                problems=problems,
            )
        searched = [without_credentials(place) for place in (*self.configuration.find_links, *self._indexes(wanted))]
        return SourceError(
            f"{wanted.filename} is nowhere to be found",
            why=f"looked for sha256 {wanted.sha256} in {', '.join(searched) or 'no place: pip is set to no-index'}",
            tries=(
                "if the file was withdrawn, lock the cell again: torchyard lock",
                "if you have it, put it into a directory that pip's find-links name",
            ),
            problems=problems,
        )

    def _transfer(
        self, offer: Offer, wanted: Wanted, writer: BlobWriter, progress: Progress, stop: threading.Event | None
    ) -> bool:
        """Write what is missing of the file; returns False, having written nothing, if it is visibly another one."""
        path = local_path(offer.url)
        progress.start(wanted.filename, wanted.size or offer.size, writer.offset)
        if path is None:
            if wanted.size is None or writer.offset < wanted.size:
                self._download(offer.url, wanted, writer, progress, stop)
            return True
        try:
            if offer.sha256 is None and not _has_hash(path, wanted.sha256):
                return False
            with path.open("rb") as file:
                _start_over(wanted, writer, progress)
                while chunk := file.read(_CHUNK):
                    _check_stop(stop)
                    writer.write(chunk)
                    progress.advance(wanted.filename, len(chunk))
        except OSError as error:
            raise SourceError(f"{wanted.filename} cannot be copied", where=str(path), why=_reason(error)) from error
        return True

    def _download(
        self, url: str, wanted: Wanted, writer: BlobWriter, progress: Progress, stop: threading.Event | None
    ) -> None:
        """Ask for the rest of the file until it is here.

        The session repeats requests that get no answer or a passing refusal; here, answers that break off are resumed.
        """
        delay, attempt, reason = BACKOFF_S, 0, ""
        while attempt < ATTEMPTS:
            _check_stop(stop)
            with self._open(url, wanted, writer, progress) as response:
                before = writer.offset
                length = response.headers.get("Content-Length")
                end = before + int(length) if length else wanted.size
                try:
                    self._receive(response, wanted, writer, progress, stop)
                except _TRANSFER_ERRORS as error:
                    reason = _reason(error)
                else:
                    if end is None or writer.offset >= end:
                        return
                    reason = f"the connection closed {end - writer.offset} bytes early"
            # Progress earns new attempts: a link that breaks every 100 MB still gets a 900 MB file.
            attempt = 0 if writer.offset - before > STALL_BYTES * 16 else attempt + 1
            _pause(delay * (1 + random.random() / 2), stop)  # noqa: S311 (jitter, not a secret)
            delay = min(2 * delay, BACKOFF_MAX_S)
        raise SourceError(f"{without_credentials(url)}: gave up after {ATTEMPTS} attempts", why=reason)

    def _open(self, url: str, wanted: Wanted, writer: BlobWriter, progress: Progress) -> requests.Response:
        """Return the answer whose body goes on where the writer is, which starts over if the server cannot do that."""
        headers = {"Accept-Encoding": "identity"}
        if writer.offset:
            headers["Range"] = f"bytes={writer.offset}-"
        try:
            response = self.session.get(
                url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, STALL_S), verify=self._verify(url)
            )
        except _TRANSFER_ERRORS as error:
            raise self._cannot_fetch(url, wanted, error) from error
        beyond = bool(writer.offset) and response.status_code == 416
        if not beyond:
            try:
                response.raise_for_status()
            except requests.HTTPError as error:
                response.close()
                raise self._cannot_fetch(url, wanted, error) from error
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {writer.offset}-"
        )
        if writer.offset and not resumed:
            _start_over(wanted, writer, progress)
        if beyond:  # the file is shorter than what is here: it is another one
            response.close()
            return self._open(url, wanted, writer, progress)
        return response

    @staticmethod
    def _cannot_fetch(url: str, wanted: Wanted, error: Exception) -> SourceError:
        return SourceError(f"{wanted.filename} cannot be fetched", where=without_credentials(url), why=_reason(error))

    @staticmethod
    def _receive(
        response: requests.Response,
        wanted: Wanted,
        writer: BlobWriter,
        progress: Progress,
        stop: threading.Event | None,
    ) -> None:
        window_start, window_bytes = time.monotonic(), 0
        # read1 returns what has arrived instead of waiting for a whole chunk, so a trickle is noticed.
        read = response.raw.read1 if hasattr(response.raw, "read1") else response.raw.read
        while chunk := read(_CHUNK):
            _check_stop(stop)
            if wanted.size is not None and writer.offset + len(chunk) > wanted.size:
                _start_over(wanted, writer, progress)
                raise HashMismatchError(
                    f"{wanted.filename}: the bytes are not those that were locked",
                    where=without_credentials(response.url),
                    why=f"expected {wanted.size} bytes with sha256 {wanted.sha256}, got more",
                    tries=("the index or a proxy serves another file under this name: do not use it",),
                )
            writer.write(chunk)
            progress.advance(wanted.filename, len(chunk))
            window_bytes += len(chunk)
            now = time.monotonic()
            if now - window_start > STALL_S:
                if window_bytes < STALL_BYTES:
                    raise requests.exceptions.ReadTimeout(f"only {window_bytes} bytes in {STALL_S:.0f} s")
                window_start, window_bytes = now, 0

    def fetch_all(self, files: Iterable[Wanted], store: Store, progress: Progress) -> None:
        """Bring all files into the store, several at a time, largest first so that the tail is short.

        The first failure stops the others; what they have is kept for the next run.
        """
        missing = {file.sha256: file for file in files if not store.has(file.sha256, size=file.size)}
        stop = threading.Event()
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as pool:
            queue = sorted(missing.values(), key=lambda file: (-(file.size or 0), file.filename))
            futures = [pool.submit(self.fetch, file, store, progress, stop) for file in queue]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


def _offer(package: DistributionPackage) -> Offer:
    return Offer(
        filename=package.filename,
        url=package.url,
        sha256=(package.digests or {}).get("sha256"),
        size=package.size,
        upload_time=package.upload_time,
    )


def _check_stop(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise SourceError("stopped because another transfer failed")


def _start_over(wanted: Wanted, writer: BlobWriter, progress: Progress) -> None:
    progress.advance(wanted.filename, -writer.offset)
    writer.restart()


def _pause(time_s: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(time_s)
    else:
        stop.wait(time_s)


def _has_hash(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return sha256_of(file) == sha256


def _reason(error: BaseException) -> str:
    """Say the innermost cause in one line, without addresses of objects or credentials."""
    cause: BaseException = error
    for _ in range(10):
        inner = getattr(cause, "reason", None) or cause.__cause__ or (cause.args[0] if cause.args else None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} from {without_credentials(response.url)}"
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return text.rsplit(">: ", 1)[-1]
