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
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
from packaging.utils import canonicalize_name
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    ProjectPage,
    PyPISimple,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.util.retry import Retry

from builder import __version__
from builder.errors import Problem, SourceError, ToolError
from builder.store import BlobWriter, Store, sha256_of

RETRYABLE = (408, 425, 429, 500, 502, 503, 504)
ATTEMPTS = 6
BACKOFF_S = 0.5
BACKOFF_MAX_S = 30.0
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
        """Announce a file of `size` bytes, of which `done` are here already."""

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

        default = one("index-url") or environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
        return cls(
            default_index=default or PYPI_SIMPLE_ENDPOINT,
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


@dataclass(kw_only=True)
class Index:
    """Finds and fetches files by name and hash in the user's find-links and indexes."""

    configuration: Configuration
    _pages: dict[tuple[str, str], tuple[Offer, ...]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def session(self) -> requests.Session:
        """A session that retries what may pass, waits as told, and trusts what the user's pip trusts."""
        session = requests.Session()
        retry = Retry(
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
        key = (index_url.rstrip("/"), canonicalize_name(project))
        with self._guard:
            if key in self._pages:
                return self._pages[key]
        directory = local_path(index_url)
        try:
            page = self._remote_page(*key) if directory is None else self._local_page(directory, key[1])
        except (
            requests.RequestException,
            Urllib3Error,
            UnsupportedContentTypeError,
            UnsupportedRepoVersionError,
        ) as error:
            raise SourceError(
                f"the package index {without_credentials(index_url)} cannot be read",
                why=_reason(error),
                tries=("check the network and `pip config list`", "run again: what was fetched is kept"),
            ) from error
        offers = tuple(
            Offer(
                filename=package.filename,
                url=package.url,
                sha256=(package.digests or {}).get("sha256"),
                size=package.size,
                upload_time=package.upload_time,
            )
            for package in (page.packages if page else ())
        )
        with self._guard:
            self._pages[key] = offers
        return offers

    def _remote_page(self, index_url: str, project: str) -> ProjectPage | None:
        verify = self._verify(index_url)
        session = self.session
        if verify is False:
            session = requests.Session()
            session.verify = False
        # With nothing but HTML asked for, an index that answers in JSON only would fail; prefer JSON: it has sizes.
        client = PyPISimple(endpoint=index_url, session=session)
        try:
            return client.get_project_page(project, timeout=(CONNECT_TIMEOUT_S, STALL_S))
        except NoSuchProjectError:
            return None

    @staticmethod
    def _local_page(directory: Path, project: str) -> ProjectPage | None:
        file = directory / project / "index.html"
        try:
            return ProjectPage.from_html(project, file.read_bytes(), base_url=file.as_uri())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _find_links(self, wanted_filename: str) -> Iterator[Offer]:
        for location in self.configuration.find_links:
            path = local_path(location)
            if path is None:
                try:
                    response = self.session.get(
                        location, timeout=(CONNECT_TIMEOUT_S, STALL_S), verify=self._verify(location)
                    )
                    response.raise_for_status()
                    page = ProjectPage.from_html("find-links", response.content, base_url=response.url)
                except _TRANSFER_ERRORS:
                    continue  # pip, too, warns and goes on: the file may be elsewhere, and its hash is known
                for package in page.packages:
                    if package.filename == wanted_filename:
                        yield Offer(
                            filename=package.filename,
                            url=package.url,
                            sha256=(package.digests or {}).get("sha256"),
                            size=package.size,
                            upload_time=package.upload_time,
                        )
            elif (path / wanted_filename).is_file():
                file = path / wanted_filename
                yield Offer(
                    filename=wanted_filename,
                    url=file.absolute().as_uri(),
                    sha256=None,
                    size=file.stat().st_size,
                    upload_time=None,
                )

    def local_files(self) -> Iterator[Path]:
        """Yield every file in the directories that pip's find-links name."""
        for location in self.configuration.find_links:
            path = local_path(location)
            if path is not None and path.is_dir():
                yield from sorted(path.iterdir())

    def offers(self, wanted: Wanted) -> Iterator[Offer]:
        """Yield where the file can be had, nearest first: find-links, its own index, the default, the extra ones.

        Searching many places is safe here, unlike when resolving: the hash decides what is taken.
        """
        problems: list[Problem] = []
        found = False
        for offer in self._find_links(wanted.filename):
            found = True
            yield offer
        urls = [wanted.index_url] if wanted.index_url else []
        if not self.configuration.no_index:
            urls += [self.configuration.default_index, *self.configuration.extra_indexes]
        for url in dict.fromkeys(urls):
            try:
                listed = self.page(url, wanted.project)
            except SourceError as error:
                problems += error.problems
                continue
            for offer in listed:
                if offer.filename == wanted.filename and offer.sha256 in (None, wanted.sha256):
                    found = True
                    yield offer
        if not found:
            searched = [*map(without_credentials, self.configuration.find_links), *map(without_credentials, urls)]
            raise SourceError(
                f"{wanted.filename} is nowhere to be found",
                why=f"looked for sha256 {wanted.sha256} in {', '.join(searched) or 'no place: pip is set to no-index'}",
                tries=(
                    "if the file was withdrawn, lock the cell again: torchyard lock",
                    "if you have it, put it into a directory that pip's find-links name",
                ),
                problems=tuple(problems),
            )

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
                url, allow_redirects=True, timeout=(CONNECT_TIMEOUT_S, STALL_S), verify=self._verify(url)
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
            failures: list[Exception] = []
            for offer in self.offers(wanted):
                progress.start(wanted.filename, wanted.size or offer.size, writer.offset)
                path = local_path(offer.url)
                try:
                    if path is not None:
                        if offer.sha256 is None and not _has_hash(path, wanted.sha256):
                            continue  # another build of the same name lies there: not what is locked
                        writer.restart()
                        with path.open("rb") as file:
                            while chunk := file.read(_CHUNK):
                                writer.write(chunk)
                                progress.advance(wanted.filename, len(chunk))
                    else:
                        self._download(offer.url, wanted, writer, progress, stop)
                except (OSError, Urllib3Error, SourceError) as error:
                    failures.append(error)
                    continue
                final = writer.commit()
                progress.finish(wanted.filename)
                return final
            raise SourceError(
                f"{wanted.filename} could not be fetched",
                why="; ".join(_reason(failure) for failure in failures)
                or f"the places that have the name have another file: expected sha256 {wanted.sha256}",
                tries=("run again: what arrived is kept and resumed",),
            )

    def _download(
        self, url: str, wanted: Wanted, writer: BlobWriter, progress: Progress, stop: threading.Event | None
    ) -> None:
        delay, last_error = BACKOFF_S, "no attempt was made"
        attempt = 0
        while attempt < ATTEMPTS:
            before = writer.offset
            try:
                headers = {"Accept-Encoding": "identity"}
                if writer.offset:
                    headers["Range"] = f"bytes={writer.offset}-"
                with self.session.get(
                    url,
                    headers=headers,
                    stream=True,
                    timeout=(CONNECT_TIMEOUT_S, STALL_S),
                    verify=self._verify(url),
                ) as response:
                    if response.status_code == 416 and wanted.size == writer.offset:
                        return
                    response.raise_for_status()
                    resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
                        f"bytes {writer.offset}-"
                    )
                    if writer.offset and not resumed:
                        # The server does not know ranges: what we have is sent again.
                        progress.advance(wanted.filename, -writer.offset)
                        writer.restart()
                    length = response.headers.get("Content-Length")
                    end = writer.offset + int(length) if length else None
                    self._receive(response, wanted, writer, progress, stop)
                    if end is None or writer.offset == end:
                        return
                    last_error = f"the connection closed {end - writer.offset} bytes early"
            except _TRANSFER_ERRORS as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and status not in RETRYABLE:
                    raise
                last_error = _reason(error)
            # Progress earns new attempts: a link that breaks every 100 MB still gets a 900 MB file.
            attempt = 0 if writer.offset - before > STALL_BYTES * 16 else attempt + 1
            time.sleep(delay * (1 + random.random() / 2))  # noqa: S311 (jitter, not a secret)
            delay = min(2 * delay, BACKOFF_MAX_S)
        raise SourceError(f"{without_credentials(url)}: gave up after {ATTEMPTS} attempts", why=last_error)

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
            if stop is not None and stop.is_set():
                raise SourceError("stopped because another transfer failed")
            if wanted.size is not None and writer.offset + len(chunk) > wanted.size:
                raise SourceError(
                    f"{wanted.filename}: more bytes than the {wanted.size} that are locked",
                    tries=("the index serves another file under this name: do not use it",),
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
