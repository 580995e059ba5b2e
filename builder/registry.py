"""Container registries: whom to tell what, and images fetched by digest into the store, without any engine."""

from __future__ import annotations

import ipaddress
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.credentials import Configuration, Credential, is_loopback
from builder.errors import HashMismatchError, ImpossibleError, MatrixError, SourceError
from builder.fetching import Progress, Silent, fetch_missing, start_over
from builder.foreign import quoted, reason, without_credentials
from builder.layout import (
    MEDIA_CONFIG,
    MEDIA_INDEX,
    MEDIA_LAYER_GZIP,
    MEDIA_LAYER_TAR,
    MEDIA_LAYER_ZSTD,
    MEDIA_MANIFEST,
    Descriptor,
    Layer,
)
from builder.reference import Platform, Reference
from builder.store import BlobWriter, Store

if TYPE_CHECKING:
    from builder.transfer import Client, Response

MANIFEST_MAX = 4 << 20
CONFIG_MAX = 8 << 20
REDIRECTS_MAX = 5
_TLS_PATIENCE_S = 10.0

_DOCKER = "application/vnd.docker."
_INDEXES = (MEDIA_INDEX, f"{_DOCKER}distribution.manifest.list.v2+json")
_MANIFESTS = (MEDIA_MANIFEST, f"{_DOCKER}distribution.manifest.v2+json")
MANIFEST_TYPES = (*_MANIFESTS, *_INDEXES)
_SCHEMA1 = f"{_DOCKER}distribution.manifest.v1+"
_CONFIGS = (MEDIA_CONFIG, f"{_DOCKER}container.image.v1+json")
_LAYERS = {
    MEDIA_LAYER_TAR: MEDIA_LAYER_TAR,
    MEDIA_LAYER_GZIP: MEDIA_LAYER_GZIP,
    MEDIA_LAYER_ZSTD: MEDIA_LAYER_ZSTD,
    f"{_DOCKER}image.rootfs.diff.tar": MEDIA_LAYER_TAR,
    f"{_DOCKER}image.rootfs.diff.tar.gzip": MEDIA_LAYER_GZIP,
    f"{_DOCKER}image.rootfs.diff.tar.zstd": MEDIA_LAYER_ZSTD,
}
"""The same bytes under the names that OCI has for them."""

# What a registry may say about a refusal, of the distribution specification: its messages are not shown, because
# anything could stand in them, also what was sent to it.
_CODES = frozenset({
    "BLOB_UNKNOWN", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "DENIED", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN", "RANGE_INVALID", "SIZE_INVALID",
    "TAG_INVALID", "TOOMANYREQUESTS", "UNAUTHORIZED", "UNAVAILABLE", "UNKNOWN", "UNSUPPORTED",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PulledImage:
    """An image whose every blob is in the store; `document` is its config, `layers` have OCI media types."""

    manifest: Descriptor
    config: Descriptor
    document: Mapping[str, Any]
    layers: tuple[Layer, ...]
    architecture: str


# ----------------------------------------------------------------------------------------------------
# Authorization


@dataclass(frozen=True, kw_only=True)
class _Challenge:
    """What a registry answers who has not shown who he is."""

    scheme: str
    parameters: Mapping[str, str]

    @classmethod
    def best(cls, header: str) -> _Challenge | None:
        """Return the Bearer challenge of a WWW-Authenticate header, else the Basic one."""
        found: dict[str, dict[str, str]] = {}
        parameters: dict[str, str] = {}
        for word in re.finditer(r'([\w-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+)))?', header):
            if word[2] is None and word[3] is None:
                parameters = found.setdefault(word[1].lower(), {})
            else:
                parameters[word[1].lower()] = re.sub(r"\\(.)", r"\1", word[2]) if word[2] is not None else word[3]
        for scheme in ("bearer", "basic"):
            if scheme in found:
                return cls(scheme=scheme, parameters=found[scheme])
        return None


@dataclass(frozen=True, kw_only=True)
class _Access:
    """What is to be opened: a repository for actions, and another one to mount blobs from."""

    repository: str
    actions: str
    also: str | None

    def scopes(self, challenge: _Challenge) -> tuple[str, ...]:
        """Return what a token is asked for.

        A registry that is asked to read challenges for reading only: whoever will write says so at once.
        """
        mine = [f"repository:{self.repository}:{self.actions}"]
        named = challenge.parameters.get("scope")
        if named and self.actions == "pull":
            mine = [named]
        if self.also is not None:
            mine.append(f"repository:{self.also}:pull")
        return tuple(mine)


@dataclass(frozen=True, kw_only=True)
class _Grant:
    """An Authorization header, what it answers, and when it ends."""

    challenge: _Challenge
    authorization: str | None = field(repr=False)
    expires: float = float("inf")


# ----------------------------------------------------------------------------------------------------
# The client


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A blob or manifest to be fetched; `limit` bounds what has no size of its own."""

    kind: Literal["blobs", "manifests"]
    digest: str
    size: int | None
    name: str
    limit: int | None = None

    @property
    def sha256(self) -> str:
        return self.digest.removeprefix("sha256:")

    @property
    def headers(self) -> dict[str, str]:
        # Registries convert a manifest for clients that do not say they know its type.
        return {"Accept": ", ".join(MANIFEST_TYPES)} if self.kind == "manifests" else {}


class Registry:
    """One registry: its session, the grants it gave, and the rules for whom to tell what.

    Credentials go to the registry itself and to the token service that it names, over TLS or within this machine;
    redirections are followed without them. A context manager.
    """

    def __init__(self, host: str, *, configuration: Configuration, named: str | None = None) -> None:
        """Speak to `host`; `named` is what images call the registry, where its API is at another host."""
        self.host = host
        self._configuration = configuration
        self._scheme = "http" if configuration.may_be_plain(host) else "https"
        self._is_answering = False
        # Another host gets the named one's credentials only within the same domain: a mirror has its own.
        within = named is not None and (urlsplit(f"//{host}").hostname or "").endswith(f".{named}")
        self._known_as = (host, named) if named is not None and within else (host,)
        self._grants: dict[_Access, _Grant] = {}
        self._notes: list[str] = []
        self._guard = threading.Lock()

    @cached_property
    def _client(self) -> Client:
        # Imported here: it takes a quarter of a second, which a pull that finds all in the store saves.
        from builder.transfer import Client  # noqa: PLC0415

        return Client(bare=True, methods=("GET", "HEAD", "POST"))  # a POST asks for a token

    @cached_property
    def _once(self) -> Client:
        """What repeats nothing: a stream cannot be sent again before the registry has said what it has of it."""
        from builder.transfer import Client  # noqa: PLC0415 (as above)

        return Client(bare=True, attempts=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("_client", "_once"):  # nothing may have been asked
            if name in vars(self):
                vars(self)[name].close()

    # ------------------------------------------------------------------ requests

    def request(
        self, method: str, path: str, *, repository: str, actions: str = "pull", headers: Mapping[str, str]
    ) -> Response:
        """Return the answer to a request below /v2/REPOSITORY/, after log-in and redirections, its body unread.

        Raises SourceError if there is no answer, or none without a log-in that is not there; every status that is an
        answer is the caller's to judge.
        """
        url = self.url(repository, path)
        access = _Access(repository=repository, actions=actions, also=None)
        grant = self._current_grant(access)
        response = self._send(method, url, headers, grant)
        if response.status_code == 401:
            response.close()
            grant = self._new_grant(access, grant, response)
            response = self._send(method, url, headers, grant)
        if response.status_code == 400 and not self._is_answering and self._wants_tls():
            response.close()
            return self.request(method, path, repository=repository, actions=actions, headers=headers)
        self._is_answering = True
        return self._follow(method, response, headers, grant)

    def _wants_tls(self) -> bool:
        """Speak TLS from now on if a host that may be spoken to without it wants it; tells whether that is so.

        Servers that speak TLS answer a request in the clear with 400, and had no log-in by then.
        """
        if self._scheme == "https":
            return False
        try:
            url = f"https://{self.host}/v2/"
            self._exchange(self._once, "GET", url, {}, None, patience_s=_TLS_PATIENCE_S).close()
        except (OSError, ValueError) as error:
            if "CERTIFICATE_VERIFY_FAILED" not in reason(error):
                return False
        self._scheme = "https"
        return True

    def request_once(
        self,
        method: str,
        url: str,
        *,
        repository: str,
        also: str | None = None,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes | memoryview] = b"",
        patience_s: float,
    ) -> Response:
        """Return the answer to one request to write to `repository`, its body unread; raises OSError if none came.

        `url` is of `url` or `next_url`; `also` is a repository that blobs are mounted from. Nothing is repeated and no
        redirection followed. A 401 is an answer like others, after which the next request has a new grant.
        """
        access = _Access(repository=repository, actions="pull,push", also=also)
        # What lies elsewhere is opened by its address: nobody there is told who asks.
        is_own = _origin(url) == _origin(self.url(repository, ""))
        grant = self._current_grant(access) if is_own else None
        response = self._exchange(self._once, method, url, headers, grant, data=body, patience_s=patience_s)
        if response.status_code == 401 and is_own:
            self._new_grant(access, grant, response)
        return response

    def url(self, repository: str, path: str) -> str:
        """Return an address of this registry's interface to a repository."""
        return f"{self._scheme}://{self.host}/v2/{repository}/{path}"

    def next_url(self, response: Response) -> str:
        """Return where an answer says to go on; raises SourceError if that is not an address, or not a safe one.

        What is to be written may go to another host, but a registry must not point into somebody's private network.
        """
        location = response.headers.get("Location")
        if not location:
            raise SourceError(
                f"the registry {self.host} does not say where to go on",
                where=without_credentials(response.url),
                why=f"its answer, HTTP {response.status_code}, has no Location",
            )
        target = self._checked(location, response.url)
        if _origin(target) != _origin(response.url) and _is_private(target) and not self._named_plain(target):
            raise self._unsafe(
                target, response.url, "is in a private network, and not this registry", "uploads to that address"
            )
        return target

    def _named_plain(self, url: str) -> bool:
        return urlsplit(url).netloc.lower() in self._configuration.plain

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        grant: _Grant | None,
        *,
        params: Mapping[str, str | Sequence[str]] | None = None,
        data: Mapping[str, str] | None = None,
    ) -> Response:
        try:
            return self._exchange(self._client, method, url, headers, grant, params=params, data=data)
        except (OSError, ValueError) as error:  # ValueError: of addresses that are none
            raise SourceError(
                f"{urlsplit(url).netloc.rpartition('@')[2]} cannot be reached",
                where=without_credentials(url),
                why=reason(error),
                tries=("check the name of the registry and the network", "run again: what arrived is kept"),
            ) from error

    @staticmethod
    def _exchange(
        client: Client,
        method: str,
        url: str,
        headers: Mapping[str, str],
        grant: _Grant | None,
        **more: Any,  # noqa: ANN401 (the client's own)
    ) -> Response:
        netloc = urlsplit(url).netloc
        authorization = {"Authorization": grant.authorization} if grant and grant.authorization else {}
        # Nobody's proxy can reach this machine's loopback, or should see what is sent there in the clear.
        proxies = {"no_proxy": urlsplit(url).hostname or ""} if is_loopback(netloc) else {}
        return client.request(method, url, headers={**headers, **authorization}, stream=True, proxies=proxies, **more)

    def _follow(self, method: str, response: Response, headers: Mapping[str, str], grant: _Grant | None) -> Response:
        """Follow redirections, as registries that keep blobs elsewhere answer with.

        By ourselves, because requests would follow from https to http, and log in at the new host from ~/.netrc.
        """
        for _ in range(REDIRECTS_MAX):
            location = response.headers.get("Location")
            if response.status_code not in (301, 302, 303, 307, 308) or not location:
                return response
            response.close()
            target = self._checked(location, response.url)
            if _origin(target) != _origin(response.url):
                grant = None
            response = self._send(method, target, headers, grant)
        response.close()
        raise SourceError(f"the registry {self.host} only redirects", where=without_credentials(response.url))

    def _checked(self, location: str, source: str) -> str:
        """Return the absolute address of what a server at `source` points to, if it may be asked."""
        try:
            target = urljoin(source, location)
            scheme, netloc = urlsplit(target).scheme, urlsplit(target).netloc.rpartition("@")[2]
            is_plain = scheme == "http"
            allowed = is_plain and urlsplit(source).scheme == "http" and self._configuration.may_be_plain(netloc)
        except ValueError:
            target, netloc, scheme, allowed = "", "", "", False
        if not netloc or (scheme != "https" and not allowed):
            raise self._unsafe(target or "an address that is none", source, "is not https", "plain HTTP")
        return target

    def _unsafe(self, target: str, source: str, why: str, meant: str) -> SourceError:
        return SourceError(
            f"the registry {self.host} points to an address that is not safe",
            where=without_credentials(source),
            why=f"{quoted(without_credentials(target))} {why}",
            tries=(
                f"if that host is yours and {meant} is meant, add it to TORCHYARD_INSECURE_REGISTRIES",
                "otherwise do not use this registry from here",
            ),
        )

    # ------------------------------------------------------------------ authorization

    def _current_grant(self, access: _Access) -> _Grant | None:
        with self._guard:
            grant = self._grants.get(access)
            if grant is not None and grant.expires <= time.monotonic():
                grant = self._grants[access] = self._grant(grant.challenge, access)
            return grant

    def _new_grant(self, access: _Access, refused: _Grant | None, response: Response) -> _Grant:
        """Return what answers a 401: another thread's newer grant, or a new one."""
        with self._guard:
            known = self._grants.get(access)
            if known is not None and known is not refused:
                return known
            challenge = _Challenge.best(response.headers.get("WWW-Authenticate", ""))
            if challenge is None:
                raise self.unauthorised(access.repository, "HTTP 401, without saying how to log in")
            self._grants[access] = self._grant(challenge, access)
            return self._grants[access]

    def _grant(self, challenge: _Challenge, access: _Access) -> _Grant:
        self._notes.clear()
        credential = self._configuration.credential(self._known_as, access.repository, self._notes) or Credential()
        if credential.registry_token and challenge.scheme == "bearer":
            return _Grant(challenge=challenge, authorization=_bearer(self.host, credential.registry_token))
        if challenge.scheme == "bearer":
            return self._token(challenge, credential, access)
        if credential.basic is None:
            raise self.unauthorised(access.repository, "HTTP 401: it wants a user name and password")
        return _Grant(challenge=challenge, authorization=credential.basic)

    def _token(self, challenge: _Challenge, credential: Credential, access: _Access) -> _Grant:
        """Ask the token service that the registry names, as the distribution specification describes."""
        # The address is the registry's word: it vouches for who may see what opens it.
        realm = self._checked(challenge.parameters.get("realm", ""), f"{self._scheme}://{self.host}/v2/")
        scopes = access.scopes(challenge)
        about: dict[str, str] = {}
        if service := challenge.parameters.get("service"):
            about["service"] = service
        asked = time.monotonic()
        accept = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if credential.identity_token:
            form = {
                **about,
                "scope": " ".join(scopes),
                "grant_type": "refresh_token",
                "client_id": "torchyard",
                "refresh_token": credential.identity_token,
            }
            response = self._send("POST", realm, accept, None, data=form)
        else:
            basic = _Grant(challenge=challenge, authorization=credential.basic) if credential.basic else None
            first = self._send("GET", realm, accept, basic, params={**about, "scope": scopes})
            response = self._follow("GET", first, accept, basic)
        with response:
            if response.status_code in (400, 401, 403):
                raise self.unauthorised(
                    access.repository,
                    f"HTTP {response.status_code} from its token service, {without_credentials(realm)}",
                )
            if response.status_code != 200:
                raise SourceError(
                    f"the token service of {self.host} does not answer as one",
                    where=without_credentials(realm),
                    why=f"HTTP {response.status_code}",
                    tries=("run again later: what arrived is kept",),
                )
            answer = self._json_of(response)
        token = answer.get("token") or answer.get("access_token")
        lasts = answer.get("expires_in")
        lasts_s = min(max(lasts, 0), 86400) if isinstance(lasts, (int, float)) else 60  # 60: by the specification
        return _Grant(
            challenge=challenge,
            authorization=_bearer(self.host, token),
            # A little early, for what is on the way.
            expires=asked + lasts_s - min(10.0, lasts_s / 10),
        )

    def unauthorised(self, repository: str, why: str) -> SourceError:
        """Return the error for a repository that is closed to who asks."""
        notes = f"; {'; '.join(dict.fromkeys(self._notes))}" if self._notes else ""
        return SourceError(
            f"{self.host} does not open {repository} to you",
            why=f"{why}{notes}",
            tries=(
                f"log in: docker login {self.host}, or podman login {self.host}",
                "check the name: many registries say this of repositories that do not exist",
            ),
        )

    # ------------------------------------------------------------------ fetching

    def fetch(
        self, repository: str, wanted: _Wanted, store: Store, progress: Progress, stop: threading.Event | None = None
    ) -> Path:
        """Bring a blob or manifest into the store, resuming where an earlier run stopped; returns its path.

        Raises HashMismatchError if the registry serves other bytes twice, SourceError if it does not serve them.
        """
        if store.has(wanted.sha256, size=wanted.size):
            return store.path(wanted.sha256)
        with store.writer(wanted.sha256, wanted.name) as writer:
            if store.has(wanted.sha256, size=wanted.size):  # another process was faster
                return store.path(wanted.sha256)
            if writer.offset > (wanted.size if wanted.size is not None else writer.offset):
                writer.restart()
            source = _Source(registry=self, repository=repository, wanted=wanted)
            try:
                return self._fill(source, writer, progress, stop)
            except HashMismatchError:
                # Once more: what was resumed may have been damaged, or a proxy have answered for the registry.
                return self._fill(source, writer, progress, stop)

    def _fill(self, source: _Source, writer: BlobWriter, progress: Progress, stop: threading.Event | None) -> Path:
        """Write what is missing, check it and commit it; on other bytes nothing is kept."""
        progress.start(source.name, source.size, writer.offset)
        self._client.download(source, writer, progress, stop)
        done = writer.offset
        if source.size is not None and done != source.size:
            start_over(source.name, writer, progress)
            raise source.mismatch(f"expected {source.size} bytes, got {done}")
        try:
            final = writer.commit()
        except HashMismatchError as error:
            progress.advance(source.name, -done)
            raise source.mismatch(error.problems[0].why) from error
        progress.finish(source.name)
        return final

    def fetch_all(self, repository: str, files: Sequence[_Wanted], store: Store, progress: Progress) -> None:
        """Fetch what the store lacks, several at a time; the first failure stops the others."""
        fetch_missing(files, store, lambda file, stop: self.fetch(repository, file, store, progress, stop))

    def fetch_blob(self, repository: str, blob: Descriptor, store: Store, progress: Progress) -> None:
        """Bring one blob into the store, as `fetch` does."""
        wanted = _Wanted(kind="blobs", digest=blob.digest, size=blob.size, name=f"layer {blob.sha256[:12]}")
        self.fetch(repository, wanted, store, progress)

    def document(self, repository: str, wanted: _Wanted, store: Store) -> dict[str, Any]:
        """Return a manifest or config, from the store if it is there; raises SourceError if it is no JSON object."""
        assert wanted.limit is not None
        place = f"{self.host}/{repository}@{wanted.digest}"
        if wanted.size is not None and wanted.size > wanted.limit:
            raise _too_large(wanted, place)
        if not (store.has(wanted.sha256, size=wanted.size) and store.verify(wanted.sha256)):
            self.fetch(repository, wanted, store, Silent())
        path = store.path(wanted.sha256)
        if path.stat().st_size > wanted.limit:
            raise _too_large(wanted, place)
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise _unfit(place, f"its {wanted.name} is not JSON") from error
        if not isinstance(document, dict):
            raise _unfit(place, f"its {wanted.name} is not a JSON object")
        return document

    def refusal(self, response: Response, repository: str, name: str) -> SourceError:
        """Return the error for an answer that is none of the hoped for; the answer is closed."""
        status, said = response.status_code, self.said(response)
        place = without_credentials(response.url)
        if urlsplit(response.url).netloc != self.host:
            return SourceError(
                f"the {name} could not be fetched from where {self.host} keeps it",
                where=place,
                why=said,
                tries=("run again: the registry may give another address",),
            )
        if status in (401, 403):
            return self.unauthorised(repository, said)
        if status in (404, 410):
            return SourceError(
                f"{self.host} has no such {name} in {repository}",
                where=place,
                why=said,
                tries=(
                    "check repository and digest: the image may have been deleted, or lie in another registry",
                    "where images have no path of their own, registries may keep them under library/",
                ),
            )
        return SourceError(
            f"the {name} could not be fetched from {self.host}",
            where=place,
            why=said,
            tries=("run again later: what was fetched is kept and resumed",),
        )

    def said(self, response: Response) -> str:
        """Say what an answer is that is none of the hoped for, in words of the specification; it is read and closed."""
        with response:
            code = _code_of(self._json_of(response))
        return f"HTTP {response.status_code}{f' ({code})' if code else ''}"

    def small_body(self, response: Response, limit: int) -> bytes | None:
        """Return a body that ought to be small, and let its connection be used again; None if it is not, or breaks."""
        with response:
            return self._client.small_body(response, limit)

    def _json_of(self, response: Response) -> dict[str, Any]:
        """Return the JSON object that is the answer's body; an empty one if it is none."""
        try:
            document = json.loads(self._client.small_body(response) or b"")
        except (ValueError, RecursionError):
            return {}
        return document if isinstance(document, dict) else {}

    # ------------------------------------------------------------------ images

    def pull(
        self, repository: str, digest: str, *, platform: Platform, store: Store, progress: Progress
    ) -> PulledImage:
        """Bring the image that `digest` names, or that its index has for `platform`, into the store."""
        place = f"{self.host}/{repository}@{digest}"
        wanted = _Wanted(kind="manifests", digest=digest, size=None, name="manifest", limit=MANIFEST_MAX)
        document = self.document(repository, wanted, store)
        if _kind_of(document, place) in _INDEXES:
            chosen = _chosen(_parsed(_Index, document, place), platform, place)
            wanted = replace(wanted, digest=chosen.digest, size=chosen.size)
            document = self.document(repository, wanted, store)
        media_type = _kind_of(document, place)
        if media_type not in _MANIFESTS:
            raise _unfit(place, "its index lists another index")
        manifest = _parsed(_Manifest, document, place)
        config = manifest.config
        if config.media_type not in _CONFIGS:
            raise _unfit(place, f"it is no container image, but has a config of type {quoted(config.media_type)}")
        blobs = tuple(_layer(layer, place) for layer in manifest.layers)
        wanted_config = _Wanted(
            kind="blobs", digest=config.digest, size=config.size, name="image config", limit=CONFIG_MAX
        )
        about = self.document(repository, wanted_config, store)
        run = _parsed(_Config, about, place)
        _require_platform(Platform.of(run.os, run.architecture, run.variant), platform, place)
        if len(run.rootfs.diff_ids) != len(blobs):
            raise _unfit(place, f"its config lists {len(run.rootfs.diff_ids)} layers, its manifest {len(blobs)}")
        layers = [
            _Wanted(kind="blobs", digest=blob.digest, size=blob.size, name=f"layer {blob.sha256[:12]} of {repository}")
            for blob in blobs
        ]
        self.fetch_all(repository, layers, store, progress)
        return PulledImage(
            manifest=Descriptor(
                media_type=media_type, digest=wanted.digest, size=store.path(wanted.sha256).stat().st_size
            ),
            config=Descriptor(media_type=MEDIA_CONFIG, digest=config.digest, size=config.size),
            document=about,
            layers=tuple(
                Layer(blob=blob, diff_id=diff_id) for blob, diff_id in zip(blobs, run.rootfs.diff_ids, strict=True)
            ),
            architecture=run.architecture,
        )


def pull(
    reference: str,
    *,
    platform: str,
    store: Store,
    progress: Progress | None = None,
    configuration: Configuration | None = None,
) -> PulledImage:
    """Bring the image that `reference` names by digest into the store, for a platform such as linux/amd64.

    What is in the store is not asked for again: a second pull makes no request. Raises MatrixError for a reference
    without digest or registry, ImpossibleError if there is no image for the platform, SourceError if the registry
    cannot be reached or does not have or give the image, or if it is of a kind that cannot be built upon, and
    HashMismatchError if other bytes come.
    """
    about = Platform.parse(platform)
    configuration = configuration or Configuration.of_user()
    named = Reference.parse(reference, configuration)
    if named.digest is None:
        raise MatrixError(
            f"{quoted(reference)} has no digest",
            why="a tag is moved to other images; a digest always names the same one",
            tries=("write name:tag@sha256: and 64 hexadecimal digits",),
        )
    place = configuration.locate(named)
    with Registry(place.registry, configuration=configuration, named=named.registry) as registry:
        return registry.pull(place.repository, named.digest, platform=about, store=store, progress=progress or Silent())


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A blob or manifest in a registry."""

    registry: Registry
    repository: str
    wanted: _Wanted

    @property
    def name(self) -> str:
        return self.wanted.name

    @property
    def size(self) -> int | None:
        return self.wanted.size

    @property
    def limit(self) -> int | None:
        return self.wanted.limit

    @property
    def _place(self) -> str:
        return f"{self.registry.host}/{self.repository}@{self.wanted.digest}"

    def ask(self, headers: Mapping[str, str]) -> Response:
        response = self.registry.request(
            "GET",
            f"{self.wanted.kind}/{self.wanted.digest}",
            repository=self.repository,
            headers={**self.wanted.headers, **headers},
        )
        if response.ok and response.headers.get("Content-Type", "").startswith(_SCHEMA1):
            # Said here, since a signed one would fail as a hash that does not match: its digest is of a part of it.
            response.close()
            raise _schema1(self._place)
        return response

    def refused(self, response: Response) -> SourceError:
        return self.registry.refusal(response, self.repository, self.name)

    def too_long(self, response: Response) -> SourceError | HashMismatchError:  # noqa: ARG002 (its address may be secret)
        if self.size is None:
            return _too_large(self.wanted, self._place)
        return self.mismatch(f"expected {self.size} bytes, got more")

    def gave_up(self, attempts: int, why: str) -> SourceError:
        return SourceError(
            f"the {self.name} could not be fetched: gave up after {attempts} attempts",
            where=self._place,
            why=why,
            tries=("run again: what arrived is kept and resumed",),
        )

    def mismatch(self, why: str) -> HashMismatchError:
        """Return the error for bytes that are of something else."""
        return HashMismatchError(
            f"the {self.name} is not the one that was asked for",
            where=self._place,
            why=why,
            tries=(
                "nothing was kept; run again if the transfer may have been damaged",
                "if it stays, the registry or a proxy serves other bytes under this digest: do not use it",
            ),
        )


def _code_of(document: Mapping[str, Any]) -> str | None:
    """Return the registry's own word for a refusal, if it is one of the specification."""
    errors = document.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    code = first.get("code") if isinstance(first, dict) else None
    return code if isinstance(code, str) and code in _CODES else None


def _bearer(host: str, token: object) -> str:
    # Checked, because requests shows a header that cannot be one in its error.
    if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
        raise SourceError(
            f"the token for {host} is not one",
            why="its token service, or the log-in that is stored, gave something else",
            tries=("run again later", f"log in again: docker login {host}, or podman login {host}"),
        )
    return f"Bearer {token}"


def _is_private(url: str) -> bool:
    """Tell whether an address can only be of this machine or its network, by the looks of its host."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


# ----------------------------------------------------------------------------------------------------
# What registries serve: only what is read is described, and all of it is checked


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


_Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _PlatformPart(_Part):
    os: str
    architecture: str
    variant: str | None = None


class _DescriptorPart(_Part):
    media_type: str = Field(alias="mediaType")
    digest: _Digest
    size: int = Field(ge=0)
    urls: list[str] | None = None
    platform: _PlatformPart | None = None


class _Index(_Part):
    manifests: list[_DescriptorPart]


class _Manifest(_Part):
    config: _DescriptorPart
    layers: list[_DescriptorPart]


class _Rootfs(_Part):
    type: Literal["layers"]
    diff_ids: list[_Digest]


class _Config(_PlatformPart):
    rootfs: _Rootfs


_AnyPart = TypeVar("_AnyPart", bound=_Part)


def _parsed(model: type[_AnyPart], document: Mapping[str, Any], place: str) -> _AnyPart:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _unfit(place, f"{where}: {first['msg']}") from error


def _kind_of(document: Mapping[str, Any], place: str) -> str:
    """Return the media type of a manifest or index, by what it says of itself and what it has.

    Not by what the server calls it: what the digest covers must mean the same each time, also without a server.
    """
    media_type = document.get("mediaType")
    if document.get("schemaVersion") == 1 or (isinstance(media_type, str) and media_type.startswith(_SCHEMA1)):
        raise _schema1(place)
    lists, holds = "manifests" in document, "layers" in document or "config" in document
    if lists == holds:
        raise _unfit(place, "it is an index and a manifest at once" if lists else "it is neither index nor manifest")
    kinds = _INDEXES if lists else _MANIFESTS
    if media_type is None:
        return kinds[0]
    if media_type not in kinds:
        raise _unfit(place, f"it has the media type {quoted(media_type)}, and the parts of another")
    return str(media_type)


def _chosen(index: _Index, platform: Platform, place: str) -> _DescriptorPart:
    known: dict[str, None] = {}
    for entry in index.manifests:
        if entry.platform is None:
            continue
        offered = Platform.of(entry.platform.os, entry.platform.architecture, entry.platform.variant)
        if offered == platform:
            if entry.media_type not in _MANIFESTS:
                raise _unfit(place, f"what it lists for {platform} is of type {quoted(entry.media_type)}")
            return entry
        if offered.os != "unknown":  # attestations are listed as images for nothing
            known[str(offered)] = None
    raise _no_platform(platform, known, place)


def _require_platform(found: Platform, platform: Platform, place: str) -> None:
    """Refuse an image for another platform; configs may leave out the variant."""
    same = (found.os, found.architecture) == (platform.os, platform.architecture)
    if not same or (found.variant and platform.variant and found.variant != platform.variant):
        raise _no_platform(platform, [str(found)], place)


def _no_platform(platform: Platform, known: Mapping[str, None] | Sequence[str], place: str) -> ImpossibleError:
    return ImpossibleError(
        f"there is no image for {platform}",
        where=place,
        why=f"there is one for: {', '.join(quoted(one)[1:-1] for one in known) or 'no platform that has a name'}",
        tries=("use the digest of an image or index that has the platform",),
    )


def _layer(part: _DescriptorPart, place: str) -> Descriptor:
    """Return a layer's descriptor with its OCI media type; what cannot be had from here or read is refused."""
    kind = part.media_type
    if part.urls or "nondistributable" in kind or ".foreign." in kind:
        raise _unfit(place, f"layer {part.digest} is not in the registry: it is a foreign one, of type {quoted(kind)}")
    if kind.endswith("+encrypted"):
        raise _unfit(place, f"layer {part.digest} is encrypted")
    if kind not in _LAYERS:
        raise _unfit(place, f"layer {part.digest} is of the unknown type {quoted(kind)}")
    return Descriptor(media_type=_LAYERS[kind], digest=part.digest, size=part.size)


def _unfit(place: str, why: str) -> SourceError:
    return SourceError(
        "this image cannot be used", where=place, why=why, tries=("use the digest of another build of the image",)
    )


def _schema1(place: str) -> SourceError:
    return SourceError(
        "this image cannot be used",
        where=place,
        why="its manifest is of Docker's schema 1, whose layers are not named by what they hold",
        tries=("push it again with a current tool and use the new digest",),
    )


def _too_large(wanted: _Wanted, place: str) -> SourceError:
    assert wanted.limit is not None
    return _unfit(place, f"its {wanted.name} is larger than {wanted.limit >> 20} MiB")
