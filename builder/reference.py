"""Names of images: what a reference and a platform say, and which of them are none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol, Self

from builder.errors import MatrixError
from builder.foreign import quoted

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-f:]+\])"
REGISTRY = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def split_host(name: str) -> tuple[str | None, str]:
    """Split `host/path` as Docker does: a first part is a host if no repository could be called so."""
    first, slash, rest = name.partition("/")
    is_host = slash and (first == "localhost" or any(char in ".:[" or char.isupper() for char in first))
    return (first.lower(), rest) if is_host else (None, name)


class Completion(Protocol):
    """Says which registry a short name means."""

    def qualify(self, repository: str, text: str) -> tuple[str, str]:
        """Return registry and repository of a short name; raises MatrixError if nothing says which registry."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What `registry/repository:tag@sha256:…` names.

    A short name, one without a registry, means what the user's own tools are set up for, because no registry is a
    default here: a short-name alias of registries.conf, else the registry that TORCHYARD_REGISTRY names, else the one
    of `unqualified-search-registries`, if it is one only: which of several was meant must not depend on which answers.
    As with Docker, `library/` is put before a short name of one part. There is no Docker registry built in: where its
    interface is at another host than in image names, a `[[registry]]` of registries.conf says so (see
    credentials.Configuration).
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, configuration: Completion) -> Self:
        """Read a reference; raises MatrixError if it is none, or names no registry and there is no default."""
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _no_reference(text, f"{quoted(digest)} is not a sha256 digest in lower case")
        path, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:  # the colon, if there is one, is that of a port
            path, tag = rest, ""
        elif not _TAG.fullmatch(tag):
            raise _no_reference(text, f"{quoted(tag)} is not a tag")
        registry, repository = split_host(path)
        if not REPOSITORY.fullmatch(repository) or len(path) > 255:
            raise _no_reference(text, f"{quoted(repository)} is not a repository: names are in lower case")
        if registry is None:
            registry, repository = configuration.qualify(repository, text)
        if not REGISTRY.fullmatch(registry):
            raise _no_reference(text, f"{quoted(registry)} is not a host")
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
            raise MatrixError(f"{quoted(text)} is not a platform", tries=("write it as linux/amd64",))
        os, architecture, variant = [*text.split("/"), ""][:3]
        return cls.of(os, architecture, variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def _no_reference(text: str, why: str) -> MatrixError:
    return MatrixError(
        f"{quoted(text)} is not an image reference", why=why, tries=("write registry/repository:tag@sha256:…",)
    )
