"""Container registries: images fetched by digest over plain HTTP into the store, without an engine or a daemon."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import random
import re
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.util.retry import Retry

from builder import __version__
from builder.errors import HashMismatchError, ImpossibleError, MatrixError, SourceError
from builder.index import (
    ATTEMPTS,
    BACKOFF_MAX_S,
    BACKOFF_S,
    CONNECT_TIMEOUT_S,
    PARALLEL,
    RETRY_AFTER_MAX_S,
    RETRYABLE,
    STALL_BYTES,
    STALL_S,
    Progress,
    Silent,
    without_credentials,
)
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
from builder.store import BlobWriter, Store

__all__ = ["Configuration", "Credential", "Platform", "PulledImage", "Reference", "Registry", "pull"]

MANIFEST_MAX = 4 << 20
CONFIG_MAX = 8 << 20
REDIRECTS_MAX = 5
HELPER_TIMEOUT_S = 60.0

_CHUNK = 1 << 20
_TRANSFER_ERRORS = (requests.RequestException, Urllib3Error)

_DOCKER = "application/vnd.docker."
_INDEXES = (MEDIA_INDEX, f"{_DOCKER}distribution.manifest.list.v2+json")
_MANIFESTS = (MEDIA_MANIFEST, f"{_DOCKER}distribution.manifest.v2+json")
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
    "BLOB_UNKNOWN", "DENIED", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN", "MANIFEST_INVALID", "MANIFEST_UNKNOWN",
    "NAME_INVALID", "NAME_UNKNOWN", "SIZE_INVALID", "TOOMANYREQUESTS", "UNAUTHORIZED", "UNAVAILABLE", "UNKNOWN",
    "UNSUPPORTED",
})  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# What is asked for


_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-f:]+\])"
_REGISTRY = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def _split_host(name: str) -> tuple[str | None, str]:
    """Split `host/path` as Docker does: a first part is a host if no repository could be called so."""
    first, slash, rest = name.partition("/")
    is_host = slash and (first == "localhost" or any(char in ".:[" or char.isupper() for char in first))
    return (first.lower(), rest) if is_host else (None, name)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What `registry/repository:tag@sha256:…` names.

    A short name, one without a registry, means what the user's own tools are set up for, because no registry is a
    default here: a short-name alias of registries.conf, else the registry that TORCHYARD_REGISTRY names, else the one
    of `unqualified-search-registries`, if it is one only: which of several was meant must not depend on which answers.
    As with Docker, `library/` is put before a short name of one part. There is no Docker registry built in: where its
    interface is at another host than in image names, a `[[registry]]` of registries.conf says so (see Configuration).
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, configuration: Configuration) -> Self:
        """Read a reference; raises MatrixError if it is none, or names no registry and there is no default."""
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _no_reference(text, f"{_shown(digest)} is not a sha256 digest in lower case")
        path, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:  # the colon, if there is one, is that of a port
            path, tag = rest, ""
        elif not _TAG.fullmatch(tag):
            raise _no_reference(text, f"{_shown(tag)} is not a tag")
        registry, repository = _split_host(path)
        if not _REPOSITORY.fullmatch(repository) or len(path) > 255:
            raise _no_reference(text, f"{_shown(repository)} is not a repository: names are in lower case")
        if registry is None:
            registry, repository = configuration.qualify(repository, text)
        if not _REGISTRY.fullmatch(registry):
            raise _no_reference(text, f"{_shown(registry)} is not a host")
        return cls(registry=registry, repository=repository, tag=tag or None, digest=digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, kw_only=True)
class Platform:
    """An operating system and processor, as `os/architecture[/variant]`; variants that are the default have no name."""

    os: str
    architecture: str
    variant: str = ""

    _DEFAULTS = {("arm64", "v8"): "", ("amd64", "v1"): "", ("arm", ""): "v7"}  # noqa: RUF012 (no annotation: no field)

    @classmethod
    def of(cls, os: str, architecture: str, variant: str | None) -> Self:
        """Return the platform with one spelling of its variant."""
        plain = variant or ""
        return cls(os=os, architecture=architecture, variant=cls._DEFAULTS.get((architecture, plain), plain))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `linux/arm64` or `linux/arm/v7`; raises MatrixError."""
        if not re.fullmatch(r"[a-z0-9]+/[a-z0-9_]+(/[a-z0-9]+)?", text):
            raise MatrixError(f"{_shown(text)} is not a platform", tries=("write it as linux/amd64",))
        os, architecture, variant = [*text.split("/"), ""][:3]
        return cls.of(os, architecture, variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, kw_only=True)
class PulledImage:
    """An image whose every blob is in the store; `document` is its config, `layers` have OCI media types."""

    manifest: Descriptor
    config: Descriptor
    document: Mapping[str, Any]
    layers: tuple[Layer, ...]
    architecture: str


def _no_reference(text: str, why: str) -> MatrixError:
    return MatrixError(
        f"{_shown(text)} is not an image reference", why=why, tries=("write registry/repository:tag@sha256:…",)
    )


def _shown(text: object) -> str:
    """Return foreign text as it may be printed: quoted, on one line, and not long."""
    shown = ascii(text)
    return shown if len(shown) <= 120 else f"{shown[:117]}…'"


# ----------------------------------------------------------------------------------------------------
# The user's configuration


@dataclass(frozen=True, kw_only=True)
class Credential:
    """What proves to a registry who asks; none of it is ever shown."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str | None:
        """The value of a Basic Authorization header, if there is a user name and password."""
        if not (self.username and self.password):
            return None
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How the user's container tools are set up: names of registries, and where their credentials lie.

    `locations` are the `[[registry]]` tables of registries.conf that say where a prefix of names really lies (some
    registries answer at another host than the one in their images' names). `plain` are hosts besides this machine that
    may be spoken to without TLS.
    """

    default: str | None = None
    search: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    locations: Mapping[str, str] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()
    auth_files: tuple[Path, ...] = ()

    @classmethod
    def of_user(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read registries.conf and the environment; raises MatrixError if a file cannot be understood."""
        home = Path(environ.get("HOME") or Path.home())
        search: tuple[str, ...] = ()
        aliases: dict[str, str] = {}
        locations: dict[str, str] = {}
        for path in _registries_files(environ, home):
            document = _toml(path)
            named = document.get("unqualified-search-registries")
            if isinstance(named, list):
                search = tuple(str(one) for one in named)
            aliases |= _strings(document.get("aliases"))
            tables = document.get("registry")
            for table in map(_strings, tables if isinstance(tables, list) else ()):
                if "location" in table:
                    locations[table.get("prefix") or table["location"]] = table["location"]
        insecure = environ.get("TORCHYARD_INSECURE_REGISTRIES", "").replace(",", " ").split()
        return cls(
            default=environ.get("TORCHYARD_REGISTRY") or None,
            search=search,
            aliases=aliases,
            locations=locations,
            plain=frozenset(host.lower() for host in insecure),
            auth_files=tuple(_auth_files(environ, home)),
        )

    def qualify(self, repository: str, text: str) -> tuple[str, str]:
        """Return registry and repository of a short name; raises MatrixError if nothing says which registry."""
        alias = self.aliases.get(repository)
        if alias is not None:
            registry, path = _split_host(alias)
        elif self.default is None and len(self.search) != 1:
            why = "registries.conf lists several to search" if self.search else "this machine has no default registry"
            raise MatrixError(
                f"{_shown(text)} names no registry",
                why=f"{why}: {', '.join(map(_shown, self.search))}" if self.search else why,
                tries=("name the registry in the reference: registry/repository@sha256:…", "or set TORCHYARD_REGISTRY"),
            )
        else:
            path = repository if "/" in repository else f"library/{repository}"
            registry, path = _split_host(f"{(self.default or self.search[0]).rstrip('/')}/{path}")
        if registry is None or not _REPOSITORY.fullmatch(path):
            raise MatrixError(
                f"the registry that {_shown(text)} would come from is not one",
                why=f"TORCHYARD_REGISTRY or registries.conf makes it {_shown(alias or self.default or self.search[0])}",
                tries=("write a host there, with port and path if need be",),
            )
        return registry, path

    def locate(self, reference: Reference) -> Reference:
        """Return where the reference's image lies: the longest matching prefix is replaced by its location."""
        name = f"{reference.registry}/{reference.repository}"
        matching = [prefix for prefix in self.locations if f"{name}/".startswith(f"{prefix.rstrip('/')}/")]
        if not matching:
            return reference
        prefix = max(matching, key=len)
        place = self.locations[prefix].rstrip("/") + name[len(prefix.rstrip("/")) :]
        registry, _, repository = place.partition("/")
        if not (_REGISTRY.fullmatch(registry) and _REPOSITORY.fullmatch(repository)):
            raise MatrixError(
                f"registries.conf sends {name} to a place that is none",
                why=f"prefix {_shown(prefix)} has location {_shown(self.locations[prefix])}",
            )
        return replace(reference, registry=registry.lower(), repository=repository)

    def may_be_plain(self, netloc: str) -> bool:
        """Tell whether a host may be spoken to without TLS: this machine, or one that the user named."""
        return netloc.lower() in self.plain or _is_loopback(netloc)

    def credential(self, hosts: Sequence[str], repository: str, notes: list[str]) -> Credential | None:
        """Return the first credential that the user's files and helpers have; adds to `notes` what cannot be read."""
        for path in self.auth_files:
            try:
                document = json.loads(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError):
                notes.append(f"{path} cannot be read")
                continue
            if isinstance(document, dict) and (found := _credential(document, hosts, repository, path, notes)):
                return found
        return None


def _is_loopback(netloc: str) -> bool:
    host = urlsplit(f"//{netloc}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _registries_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the registries.conf files there are, later ones winning; a file named by the environment stands alone."""
    named = environ.get("CONTAINERS_REGISTRIES_CONF")
    if named:
        return [Path(named)]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers"
    mains = [path for folder in (user, Path("/etc/containers")) if (path := folder / "registries.conf").is_file()]
    parts = [path for folder in (Path("/etc/containers"), user) for path in sorted(folder.glob("registries.conf.d/*"))]
    return [*mains[:1], *(path for path in parts if path.suffix == ".conf")]


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MatrixError("the configuration of registries cannot be read", where=str(path), why=str(reason)) from error


def _strings(table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        return {}
    return {str(key): value for key, value in table.items() if isinstance(value, str)}


def _auth_files(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    """Yield where credentials may lie: what the environment names, then Podman's and Docker's usual places."""
    if named := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json"
    yield Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"


def _credential(
    document: Mapping[str, Any], hosts: Sequence[str], repository: str, path: Path, notes: list[str]
) -> Credential | None:
    """Look in one file: a helper for the host, then the helper for all, then the file itself."""
    helpers, store = _strings(document.get("credHelpers")), document.get("credsStore")
    for host in hosts:
        for name, servers in ((helpers.get(host), (host,)), (store, (host, _index_key(host)))):
            if isinstance(name, str) and name:
                for server in servers:
                    if found := _ask_helper(name, server, notes):
                        return found
    auths = document.get("auths")
    listed = {_auth_key(key): value for key, value in auths.items()} if isinstance(auths, dict) else {}
    parts = repository.split("/")
    for host in hosts:
        # Podman keeps credentials for parts of a registry as well; the nearest counts.
        for count in range(len(parts), -1, -1):
            entry = listed.get("/".join([host, *parts[:count]]))
            if isinstance(entry, dict) and (found := _listed(entry, path, notes)):
                return found
    return None


def _index_key(host: str) -> str:
    """Return the address under which Docker keeps a log-in to its default registry: that of the registry's old API."""
    return f"https://index.{host}/v1/"


def _auth_key(key: str) -> str:
    if found := re.fullmatch(r"https://index\.([^/]+)/v1/?", key):
        return found[1].lower()
    plain = re.sub(r"/v[12]/?$", "", re.sub(r"^https?://", "", key)).rstrip("/")
    host, slash, path = plain.partition("/")
    return f"{host.lower()}{slash}{path}"


def _listed(entry: Mapping[str, Any], path: Path, notes: list[str]) -> Credential | None:
    values = _strings(entry)
    username, password = values.get("username", ""), values.get("password", "")
    if auth := values.get("auth"):
        try:
            username, _, password = base64.b64decode(auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            notes.append(f"{path} has a log-in that is not in base64")
    found = Credential(
        username=username,
        password=password.strip("\0"),
        identity_token=values.get("identitytoken", ""),
        registry_token=values.get("registrytoken", ""),
    )
    return found if found != Credential() else None


def _ask_helper(name: str, server: str, notes: list[str]) -> Credential | None:
    """Ask docker-credential-NAME; a helper that is missing or fails leaves a note, since the image may be public."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        notes.append(f"{_shown(name)} is not the name of a credential helper")
        return None
    command = [f"docker-credential-{name}", "get"]
    try:
        done = subprocess.run(
            command, input=server, capture_output=True, text=True, timeout=HELPER_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            # Helpers say so in words only, on standard output; of other words nothing is shown.
            if "credentials not found" not in done.stdout:
                notes.append(f"{command[0]} ended with status {done.returncode}")
            return None
        answer = _strings(json.loads(done.stdout))
    except FileNotFoundError:
        notes.append(f"{command[0]} is not installed")
        return None
    except (OSError, ValueError, RecursionError, subprocess.SubprocessError) as error:
        notes.append(f"{command[0]} failed: {type(error).__name__}")
        return None
    username, secret = answer.get("Username", ""), answer.get("Secret", "")
    if username == "<token>":  # the helpers' way to say that the secret is an identity token
        return Credential(identity_token=secret)
    return Credential(username=username, password=secret) if username and secret else None


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
class _Grant:
    """An Authorization header, what it answers, and when it ends."""

    challenge: _Challenge
    authorization: str | None = field(repr=False)
    expires: float = float("inf")


class _Authorization(AuthBase):
    """Sets the header it is given, or none.

    It always stands in a request, because without one requests would take a password from ~/.netrc or from the URL.
    """

    def __init__(self, value: str | None) -> None:
        self._value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is not None:
            request.headers["Authorization"] = self._value
        return request


class _Retry(Retry):
    """Retries that wait as long as the server says, within reason."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait_s = super().get_retry_after(response)
        return None if wait_s is None else min(wait_s, RETRY_AFTER_MAX_S)


class _Session(requests.Session):
    """A session that leaves redirections alone.

    Told not to follow, requests still prepares to: it parses the new address and reads the whole body, into memory.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Say that there is none."""


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
        accept = {"Accept": ", ".join((*_MANIFESTS, *_INDEXES))} if self.kind == "manifests" else {}
        return {**accept, "Accept-Encoding": "identity"}


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
        # Another host gets the named one's credentials only within the same domain: a mirror has its own.
        within = named is not None and (urlsplit(f"//{host}").hostname or "").endswith(f".{named}")
        self._known_as = (host, named) if named is not None and within else (host,)
        self._grants: dict[tuple[str, str], _Grant] = {}
        self._notes: list[str] = []
        self._guard = threading.Lock()
        self._session = _Session()
        self._session.headers["User-Agent"] = f"torchyard/{__version__}"
        retry = _Retry(
            total=ATTEMPTS - 1,
            status_forcelist=RETRYABLE,
            allowed_methods=("GET", "HEAD", "POST"),  # a POST asks for a token
            backoff_factor=BACKOFF_S,
            backoff_max=BACKOFF_MAX_S,
            backoff_jitter=BACKOFF_S,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=2 * PARALLEL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    # ------------------------------------------------------------------ requests

    def request(
        self, method: str, path: str, *, repository: str, actions: str = "pull", headers: Mapping[str, str]
    ) -> requests.Response:
        """Return the answer to a request below /v2/REPOSITORY/, after log-in and redirections, its body unread.

        Raises SourceError if there is no answer, or none without a log-in that is not there; every status that is an
        answer is the caller's to judge.
        """
        url = f"{self._scheme}://{self.host}/v2/{repository}/{path}"
        scope = (repository, actions)
        grant = self._current_grant(scope)
        response = self._send(method, url, headers, grant)
        if response.status_code == 401:
            response.close()
            grant = self._new_grant(scope, grant, response)
            response = self._send(method, url, headers, grant)
        return self._follow(method, response, headers, grant)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], grant: _Grant | None, data: object = None
    ) -> requests.Response:
        netloc = urlsplit(url).netloc
        # Nobody's proxy can reach this machine's loopback, or should see what is sent there in the clear.
        proxies: MutableMapping[str, str] = {}
        if _is_loopback(netloc):
            proxies["no_proxy"] = urlsplit(url).hostname or ""
        try:
            return self._session.request(
                method,
                url,
                headers=dict(headers),
                data=data,  # type: ignore[arg-type]
                auth=_Authorization(grant.authorization if grant else None),
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_TIMEOUT_S, STALL_S),
                proxies=proxies,
            )
        except (*_TRANSFER_ERRORS, ValueError) as error:  # ValueError: of addresses that are none
            raise SourceError(
                f"{netloc.rpartition('@')[2]} cannot be reached",
                where=without_credentials(url),
                why=_reason(error),
                tries=("check the name of the registry and the network", "run again: what was fetched is kept"),
            ) from error

    def _follow(
        self, method: str, response: requests.Response, headers: Mapping[str, str], grant: _Grant | None
    ) -> requests.Response:
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
            raise SourceError(
                f"the registry {self.host} points to an address that is not safe",
                where=without_credentials(source),
                why=f"{_shown(without_credentials(target) if target else 'an address that is none')} is not https",
                tries=(
                    "if that host is yours and plain HTTP is meant, add it to TORCHYARD_INSECURE_REGISTRIES",
                    "otherwise do not use this registry from here",
                ),
            )
        return target

    # ------------------------------------------------------------------ authorization

    def _current_grant(self, scope: tuple[str, str]) -> _Grant | None:
        with self._guard:
            grant = self._grants.get(scope)
            if grant is not None and grant.expires <= time.monotonic():
                grant = self._grants[scope] = self._grant(grant.challenge, scope)
            return grant

    def _new_grant(self, scope: tuple[str, str], refused: _Grant | None, response: requests.Response) -> _Grant:
        """Return what answers a 401: another thread's newer grant, or a new one."""
        with self._guard:
            known = self._grants.get(scope)
            if known is not None and known is not refused:
                return known
            challenge = _Challenge.best(response.headers.get("WWW-Authenticate", ""))
            if challenge is None:
                raise self._unauthorised(scope[0], "HTTP 401, without saying how to log in")
            self._grants[scope] = self._grant(challenge, scope)
            return self._grants[scope]

    def _grant(self, challenge: _Challenge, scope: tuple[str, str]) -> _Grant:
        self._notes.clear()
        credential = self._configuration.credential(self._known_as, scope[0], self._notes) or Credential()
        if credential.registry_token and challenge.scheme == "bearer":
            return _Grant(challenge=challenge, authorization=_bearer(self.host, credential.registry_token))
        if challenge.scheme == "bearer":
            return self._token(challenge, credential, scope)
        if credential.basic is None:
            raise self._unauthorised(scope[0], "HTTP 401: it wants a user name and password")
        return _Grant(challenge=challenge, authorization=credential.basic)

    def _token(self, challenge: _Challenge, credential: Credential, scope: tuple[str, str]) -> _Grant:
        """Ask the token service that the registry names, as the distribution specification describes."""
        # The address is the registry's word: it vouches for who may see what opens it.
        realm = self._checked(challenge.parameters.get("realm", ""), f"{self._scheme}://{self.host}/v2/")
        about = {"scope": challenge.parameters.get("scope") or f"repository:{scope[0]}:{scope[1]}"}
        if service := challenge.parameters.get("service"):
            about["service"] = service
        asked = time.monotonic()
        accept = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if credential.identity_token:
            form = {
                **about,
                "grant_type": "refresh_token",
                "client_id": "torchyard",
                "refresh_token": credential.identity_token,
            }
            response = self._send("POST", realm, accept, None, form)
        else:
            url = requests.Request("GET", realm, params=about).prepare().url or realm
            basic = _Grant(challenge=challenge, authorization=credential.basic) if credential.basic else None
            response = self._follow("GET", self._send("GET", url, accept, basic), accept, basic)
        with response:
            if response.status_code in (400, 401, 403):
                raise self._unauthorised(
                    scope[0], f"HTTP {response.status_code} from its token service, {without_credentials(realm)}"
                )
            if response.status_code != 200:
                raise SourceError(
                    f"the token service of {self.host} does not answer as one",
                    where=without_credentials(realm),
                    why=f"HTTP {response.status_code}",
                    tries=("run again later: what was fetched is kept",),
                )
            answer = _json_of(response)
        token = answer.get("token") or answer.get("access_token")
        lasts = answer.get("expires_in")
        lasts_s = min(max(lasts, 0), 86400) if isinstance(lasts, (int, float)) else 60  # 60: by the specification
        return _Grant(
            challenge=challenge,
            authorization=_bearer(self.host, token),
            # A little early, for what is on the way.
            expires=asked + lasts_s - min(10.0, lasts_s / 10),
        )

    def _unauthorised(self, repository: str, why: str) -> SourceError:
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
            transfer = _Transfer(
                registry=self, repository=repository, wanted=wanted, writer=writer, progress=progress, stop=stop
            )
            try:
                return transfer.fill()
            except HashMismatchError:
                # Once more: what was resumed may have been damaged, or a proxy have answered for the registry.
                return transfer.fill()

    def fetch_all(self, repository: str, files: Sequence[_Wanted], store: Store, progress: Progress) -> None:
        """Fetch several at a time, largest first; the first failure stops the others, and what they have is kept."""
        missing = {file.sha256: file for file in files if not store.has(file.sha256, size=file.size)}
        stop = threading.Event()
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
            queue = sorted(missing.values(), key=lambda file: (-(file.size or 0), file.digest))
            futures = [pool.submit(self.fetch, repository, file, store, progress, stop) for file in queue]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

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

    def refusal(self, response: requests.Response, repository: str, name: str) -> SourceError:
        """Return the error for an answer that is none of the hoped for; the answer is closed."""
        with response:
            status = response.status_code
            code = _code_of(response)
        said = f"HTTP {status}{f' ({code})' if code else ''}"
        place = without_credentials(response.url)
        if urlsplit(response.url).netloc != self.host:
            return SourceError(
                f"the {name} could not be fetched from where {self.host} keeps it",
                where=place,
                why=said,
                tries=("run again: the registry may give another address",),
            )
        if status in (401, 403):
            return self._unauthorised(repository, said)
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
            raise _unfit(place, f"it is no container image, but has a config of type {_shown(config.media_type)}")
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
            f"{_shown(reference)} has no digest",
            why="a tag is moved to other images; a digest always names the same one",
            tries=("write name:tag@sha256: and 64 hexadecimal digits",),
        )
    place = configuration.locate(named)
    with Registry(place.registry, configuration=configuration, named=named.registry) as registry:
        return registry.pull(place.repository, named.digest, platform=about, store=store, progress=progress or Silent())


# ----------------------------------------------------------------------------------------------------
# One transfer


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    """A blob on its way into the store."""

    registry: Registry
    repository: str
    wanted: _Wanted
    writer: BlobWriter
    progress: Progress
    stop: threading.Event | None

    def fill(self) -> Path:
        """Write what is missing, check it and commit it; on other bytes nothing is kept."""
        name, size = self.wanted.name, self.wanted.size
        self.progress.start(name, size, self.writer.offset)
        self._download()
        done = self.writer.offset
        if size is not None and done != size:
            self._start_over()
            raise self._mismatch(f"expected {size} bytes, got {done}")
        try:
            final = self.writer.commit()
        except HashMismatchError as error:
            self.progress.advance(name, -done)
            raise self._mismatch(error.problems[0].why) from error
        self.progress.finish(name)
        return final

    def _download(self) -> None:
        """Ask for the rest until it is here.

        The session repeats requests that get no answer or a passing refusal; here, answers that break off are resumed.
        """
        writer = self.writer
        delay, attempt, reason = BACKOFF_S, 0, ""
        while attempt < ATTEMPTS:
            _check_stop(self.stop)
            if writer.offset == self.wanted.size:
                return
            with self._open() as response:
                before = writer.offset
                length = response.headers.get("Content-Length", "")
                end = before + int(length) if length.isdecimal() else self.wanted.size
                try:
                    self._receive(response)
                except _TRANSFER_ERRORS as error:
                    reason = _reason(error)
                else:
                    if end is None or writer.offset >= end:
                        return
                    reason = f"the connection closed {end - writer.offset} bytes early"
            # Progress earns new attempts: a link that breaks every 100 MB still gets a layer of gigabytes.
            attempt = 0 if writer.offset - before > STALL_BYTES * 16 else attempt + 1
            _pause(delay * (1 + random.random() / 2), self.stop)  # noqa: S311 (jitter, not a secret)
            delay = min(2 * delay, BACKOFF_MAX_S)
        raise SourceError(
            f"the {self.wanted.name} could not be fetched: gave up after {ATTEMPTS} attempts",
            where=self._place,
            why=reason,
            tries=("run again: what arrived is kept and resumed",),
        )

    def _open(self) -> requests.Response:
        """Return the answer whose body goes on where the writer is, which starts over if the server cannot do that."""
        offset, headers = self.writer.offset, self.wanted.headers
        if offset:
            headers["Range"] = f"bytes={offset}-"
        response = self.registry.request(
            "GET", f"{self.wanted.kind}/{self.wanted.digest}", repository=self.repository, headers=headers
        )
        if offset and response.status_code == 416:  # it is shorter than what is here: that is of something else
            response.close()
            self._start_over()
            return self._open()
        if response.status_code not in (200, 206):
            raise self.registry.refusal(response, self.repository, self.wanted.name)
        if response.headers.get("Content-Type", "").startswith(_SCHEMA1):
            # Said here, since a signed one would fail as a hash that does not match: its digest is of a part of it.
            response.close()
            raise _schema1(self._place)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if offset and not (response.status_code == 206 and resumed):
            self._start_over()
        return response

    def _receive(self, response: requests.Response) -> None:
        wanted, writer = self.wanted, self.writer
        for chunk in _chunks(response):
            _check_stop(self.stop)
            total = writer.offset + len(chunk)
            if wanted.limit is not None and total > wanted.limit:
                self._start_over()
                raise _too_large(wanted, self._place)
            if wanted.size is not None and total > wanted.size:
                self._start_over()
                raise self._mismatch(f"expected {wanted.size} bytes, got more")
            writer.write(chunk)
            self.progress.advance(wanted.name, len(chunk))

    def _start_over(self) -> None:
        self.progress.advance(self.wanted.name, -self.writer.offset)
        self.writer.restart()

    @property
    def _place(self) -> str:
        return f"{self.registry.host}/{self.repository}@{self.wanted.digest}"

    def _mismatch(self, why: str) -> HashMismatchError:
        return HashMismatchError(
            f"the {self.wanted.name} is not the one that was asked for",
            where=self._place,
            why=why,
            tries=(
                "nothing was kept; run again if the transfer may have been damaged",
                "if it stays, the registry or a proxy serves other bytes under this digest: do not use it",
            ),
        )


def _chunks(response: requests.Response) -> Iterator[bytes]:
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


def _small_body(response: requests.Response, limit: int = 1 << 20) -> bytes | None:
    """Return a body that ought to be small; None if it is not, or does not come."""
    body = bytearray()
    try:
        for chunk in _chunks(response):
            body += chunk
            if len(body) > limit:
                return None
    except _TRANSFER_ERRORS:
        return None
    return bytes(body)


def _json_of(response: requests.Response) -> dict[str, Any]:
    try:
        document = json.loads(_small_body(response) or b"")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _code_of(response: requests.Response) -> str | None:
    """Return the registry's own word for a refusal, if it is one of the specification."""
    errors = _json_of(response).get("errors")
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


def _check_stop(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise SourceError("stopped because another transfer failed")


def _pause(time_s: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(time_s)
    else:
        stop.wait(time_s)


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _reason(error: BaseException) -> str:
    """Say the innermost cause in one line, without addresses of objects, and without queries, which may be secret."""
    cause: BaseException = error
    for _ in range(10):
        inner = getattr(cause, "reason", None) or cause.__cause__ or (cause.args[0] if cause.args else None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return re.sub(r"\?\S+", "?…", text.rsplit(">: ", 1)[-1])


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
        raise _unfit(place, f"it has the media type {_shown(media_type)}, and the parts of another")
    return str(media_type)


def _chosen(index: _Index, platform: Platform, place: str) -> _DescriptorPart:
    known: dict[str, None] = {}
    for entry in index.manifests:
        if entry.platform is None:
            continue
        offered = Platform.of(entry.platform.os, entry.platform.architecture, entry.platform.variant)
        if offered == platform:
            if entry.media_type not in _MANIFESTS:
                raise _unfit(place, f"what it lists for {platform} is of type {_shown(entry.media_type)}")
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
        why=f"there is one for: {', '.join(_shown(one)[1:-1] for one in known) or 'no platform that has a name'}",
        tries=("use the digest of an image or index that has the platform",),
    )


def _layer(part: _DescriptorPart, place: str) -> Descriptor:
    """Return a layer's descriptor with its OCI media type; what cannot be had from here or read is refused."""
    kind = part.media_type
    if part.urls or "nondistributable" in kind or ".foreign." in kind:
        raise _unfit(place, f"layer {part.digest} is not in the registry: it is a foreign one, of type {_shown(kind)}")
    if kind.endswith("+encrypted"):
        raise _unfit(place, f"layer {part.digest} is encrypted")
    if kind not in _LAYERS:
        raise _unfit(place, f"layer {part.digest} is of the unknown type {_shown(kind)}")
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
