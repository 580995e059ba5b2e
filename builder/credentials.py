"""The user's registries: how their container tools name them, and the credentials that these tools keep for them."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from builder.errors import MatrixError
from builder.foreign import quoted
from builder.reference import REGISTRY, REPOSITORY, Reference, split_host

HELPER_TIMEOUT_S = 60.0


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
            registry, path = split_host(alias)
        elif self.default is None and len(self.search) != 1:
            why = "registries.conf lists several to search" if self.search else "this machine has no default registry"
            raise MatrixError(
                f"{quoted(text)} names no registry",
                why=f"{why}: {', '.join(map(quoted, self.search))}" if self.search else why,
                tries=("name the registry in the reference: registry/repository@sha256:…", "or set TORCHYARD_REGISTRY"),
            )
        else:
            path = repository if "/" in repository else f"library/{repository}"
            registry, path = split_host(f"{(self.default or self.search[0]).rstrip('/')}/{path}")
        if registry is None or not REPOSITORY.fullmatch(path):
            raise MatrixError(
                f"the registry that {quoted(text)} would come from is not one",
                why=f"TORCHYARD_REGISTRY or registries.conf makes it {quoted(alias or self.default or self.search[0])}",
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
        if not (REGISTRY.fullmatch(registry) and REPOSITORY.fullmatch(repository)):
            raise MatrixError(
                f"registries.conf sends {name} to a place that is none",
                why=f"prefix {quoted(prefix)} has location {quoted(self.locations[prefix])}",
            )
        return replace(reference, registry=registry.lower(), repository=repository)

    def may_be_plain(self, netloc: str) -> bool:
        """Tell whether a host may be spoken to without TLS: this machine, or one that the user named."""
        return netloc.lower() in self.plain or is_loopback(netloc)

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


def is_loopback(netloc: str) -> bool:
    """Tell whether a host, with or without port, is this machine."""
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
        notes.append(f"{quoted(name)} is not the name of a credential helper")
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
