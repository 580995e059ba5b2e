"""What an engine can be asked to do: small protocols, of which an engine implements those it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from builder.base import BaseImage
from builder.render import Plan
from builder.store import Store


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image that an engine made and that no tag of the matrix points to yet."""

    digest: str
    """Digest of the manifest, "sha256:...": the same wherever the image goes."""
    size_bytes: int
    """Compressed size: manifest, configuration and layers."""
    observed: Mapping[str, Any] | None = None
    """What the image's bytes say of it, in the form of `validate/facts.py`; None from an engine that did not look."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished container left."""

    exit_code: int
    """The process' own, or 124 if the deadline ended it."""
    files: Mapping[str, bytes]
    """The files asked for, by path, as far as they exist."""
    log: str
    """The end of what it printed to both streams."""


class Steps(Protocol):
    """Receives what an engine is doing."""

    def step(self, text: str) -> None:
        """Report that a step began."""

    def output(self, line: str) -> None:
        """Report a line that a step printed."""


class Builder(Protocol):
    """Makes an image from a plan."""

    name: str

    def build(self, plan: Plan, base: BaseImage | None, *, store: Store, steps: Steps) -> BuiltImage:
        """Make the image; raises CellFailedError with the failing step's own last lines if one fails.

        `base` is the bootstrap base as made from its lock, None if the plan starts from a registry image.
        """


class Runner(Protocol):
    """Runs images and names them; an image is known by its manifest's digest."""

    def run(
        self, digest: str, argv: Sequence[str], *, files: Mapping[str, bytes], collect: Sequence[str], timeout_s: float
    ) -> RunResult:
        """Run a command in a fresh container without network, privileges or mounts.

        `files` (absolute path to content) are put into it before, `collect` are read out of it after.
        """

    def tag(self, digest: str, tags: Sequence[str]) -> None:
        """Point the tags at the image; one that points elsewhere is moved."""

    def untag(self, tags: Sequence[str]) -> None:
        """Remove the tags; an image goes with its last name, and one that somebody named otherwise stays."""

    def discard(self, digest: str) -> None:
        """Drop an image that was not proven; one that has tags, because it was proven before, stays."""


class Host(Runner, Protocol):
    """A runner that images can be brought to; it keeps them on a disk that can fill."""

    @property
    def disk(self) -> Path | None:
        """Directory in which the engine keeps its data, None if it is not on this machine."""

    def check(self) -> None:
        """Raise EngineError, saying what is missing, if images cannot be built or loaded here."""

    def has(self, digest: str) -> bool:
        """Tell whether the engine knows the image."""

    def holds(self, digest: str) -> bool:
        """Tell whether the engine has all of the image's layers, as far as it can say."""

    def unproven_name(self, cell_id: str) -> str:
        """Return the name under which a cell's image is loaded until it is proven."""

    def load(self, archive: Iterator[bytes]) -> None:
        """Take in an image from an archive; raises EngineError if the engine refuses it or breaks off."""


class Engine(Builder, Host, Protocol):
    """An engine that makes images where it also runs them."""

    def build_cache(self) -> frozenset[str]:
        """Return the ids of what the engine keeps of builds at the moment."""

    def forget_builds(self, *, since: frozenset[str]) -> None:
        """Drop what the engine has kept of builds since `since`."""
