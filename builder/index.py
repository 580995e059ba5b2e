"""Package indexes: files found by name and hash, with the indexes and certificates the user's pip is set up for."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name

from builder.errors import HashMismatchError, Problem, SourceError, ToolError
from builder.fetching import Progress, check_stop, fetch_missing, start_over
from builder.foreign import reason, without_credentials
from builder.store import BlobWriter, Store, sha256_of

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, ProjectPage

    from builder.transfer import Client, Response

_CHUNK = 1 << 20


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


def local_path(location: str) -> Path | None:
    """Return the path that a find-links entry or file: URL names; None if it is a remote address."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme in ("http", "https") else Path(location).expanduser()


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
    def client(self) -> Client:
        """What speaks HTTP for it, and trusts what the user's pip trusts."""
        # Imported here: it takes a quarter of a second, which a build that finds all in the store saves.
        from builder.transfer import Client  # noqa: PLC0415

        client = Client()
        if self.configuration.certificates:
            client.session.verify = self.configuration.certificates
        if self.configuration.client_certificate:
            client.session.cert = self.configuration.client_certificate
        if self.configuration.proxy:
            client.session.proxies = {"http": self.configuration.proxy, "https": self.configuration.proxy}
        return client

    def ask(
        self, url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, stream: bool = False
    ) -> Response:
        """Return the answer of whatever status; raises OSError if there is none."""
        return self.client.request(method, url, headers=headers, stream=stream, verify=self._verify(url))

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
            OSError,  # of a transfer, and of a local index
            pypi_simple.UnsupportedContentTypeError,
            pypi_simple.UnsupportedRepoVersionError,
            ValueError,  # of pypi-simple, for a page that is not one
            TypeError,
            KeyError,
        ) as error:
            raise SourceError(
                f"the package index {without_credentials(index_url)} cannot be read",
                why=reason(error),
                tries=("check the network and `pip config list`", "run again: what was fetched is kept"),
            ) from error
        offers = tuple(map(_offer, page.packages)) if page else ()
        with self._guard:
            self._pages[key] = offers
        return offers

    def _remote_page(self, index_url: str, project: str) -> ProjectPage | None:
        import pypi_simple  # noqa: PLC0415 (see above)

        # JSON is preferred, because it has sizes and upload times; an index that only knows HTML answers in HTML.
        response = self.ask(f"{index_url}/{project}/", headers={"Accept": pypi_simple.ACCEPT_JSON_PREFERRED})
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
            except OSError as error:
                # pip, too, warns and goes on: the file may be elsewhere, and its hash is known.
                problems.append(
                    Problem(what=f"the links of {without_credentials(location)} cannot be read", why=reason(error))
                )
                continue
            yield from (offer for offer in map(_offer, page.packages) if offer.is_of(wanted))

    def _links_page(self, location: str, path: Path | None) -> ProjectPage:
        import pypi_simple  # noqa: PLC0415 (see above)

        if path is not None:
            return pypi_simple.ProjectPage.from_html("find-links", path.read_bytes(), base_url=path.absolute().as_uri())
        response = self.ask(location)
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
            response = self.ask(url)
        except OSError as error:
            raise SourceError(f"{without_credentials(url)} does not answer", why=reason(error)) from error
        return response.status_code, response.text

    def size(self, url: str) -> int:
        """Return the size in bytes of the file at `url` by asking its server (or disk) for nothing more."""
        path = local_path(url)
        try:
            if path is not None:
                return path.stat().st_size
            response = self.ask(url, method="HEAD", headers={"Accept-Encoding": "identity"})
            response.raise_for_status()
            return int(response.headers["Content-Length"])
        except (OSError, KeyError, ValueError) as error:
            raise SourceError(
                f"the size of {Path(unquote(urlsplit(url).path)).name} is not known",
                why=f"{without_credentials(url)}: {reason(error)}",
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
            self.client.download(_Source(index=self, url=offer.url, wanted=wanted), writer, progress, stop)
            return True
        try:
            if offer.sha256 is None and not _has_hash(path, wanted.sha256):
                return False
            with path.open("rb") as file:
                start_over(wanted.filename, writer, progress)
                while chunk := file.read(_CHUNK):
                    check_stop(stop)
                    writer.write(chunk)
                    progress.advance(wanted.filename, len(chunk))
        except OSError as error:
            raise SourceError(f"{wanted.filename} cannot be copied", where=str(path), why=reason(error)) from error
        return True

    def fetch_all(
        self,
        files: Iterable[Wanted],
        store: Store,
        progress: Progress,
        *,
        arrived: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Bring all files into the store, several at a time, largest first so that the tail is short.

        `arrived` is called, from several threads, with the hash of each as soon as it is there. The first failure stops
        the others; what they have is kept for the next run.
        """

        def one(file: Wanted, stop: threading.Event) -> None:
            self.fetch(file, store, progress, stop)
            arrived(file.sha256)

        fetch_missing(files, store, one)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A wanted file at one of the places that offer it."""

    index: Index
    url: str
    wanted: Wanted
    limit: None = None

    @property
    def name(self) -> str:
        return self.wanted.filename

    @property
    def size(self) -> int | None:
        return self.wanted.size

    def ask(self, headers: Mapping[str, str]) -> Response:
        try:
            return self.index.ask(self.url, headers=headers, stream=True)
        except OSError as error:
            raise self._cannot_be_fetched(reason(error)) from error

    def refused(self, response: Response) -> SourceError:
        response.close()
        return self._cannot_be_fetched(f"HTTP {response.status_code} from {without_credentials(response.url)}")

    def too_long(self, response: Response) -> HashMismatchError:
        return HashMismatchError(
            f"{self.name}: the bytes are not those that were locked",
            where=without_credentials(response.url),
            why=f"expected {self.size} bytes with sha256 {self.wanted.sha256}, got more",
            tries=("the index or a proxy serves another file under this name: do not use it",),
        )

    def gave_up(self, attempts: int, why: str) -> SourceError:
        return SourceError(f"{without_credentials(self.url)}: gave up after {attempts} attempts", why=why)

    def _cannot_be_fetched(self, why: str) -> SourceError:
        return SourceError(f"{self.name} cannot be fetched", where=without_credentials(self.url), why=why)


def _offer(package: DistributionPackage) -> Offer:
    return Offer(
        filename=package.filename,
        url=package.url,
        sha256=(package.digests or {}).get("sha256"),
        size=package.size,
        upload_time=package.upload_time,
    )


def _has_hash(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return sha256_of(file) == sha256
