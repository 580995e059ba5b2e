"""What an engine can be asked to do: small protocols, of which an engine implements those it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from builder.base import BaseImage
from builder.render import Plan
from builder.store import Store

BOX = "/torchyard"
"""Directory in which a confined container finds the files it was given."""
MOST_PRINTED = 256 << 20
"""Bytes that a program of somebody else may print before it is ended."""


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


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that a container engine has."""

    reference: str
    """What was asked for."""
    digest: str
    platform: str
    """"linux/amd64"."""


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a confined container gets beyond nothing: no network, no privileges, a root that cannot be written."""

    gpus: str = "none"
    """"none", "all" or how many."""
    user: str | None = None
    """Numeric "uid:gid" in place of the image's own."""
    shm_bytes: int = 1 << 30


class End(Enum):
    """How a confined container ended."""

    ITSELF = "itself"
    DEADLINE = "deadline"
    FLOOD = "flood"
    """It printed without measure."""
    NO_PROGRAM = "no program"
    """It never began: the image has no such program, or its user may not run it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a confined container."""

    how: End
    code: int | None = None
    """The program's exit code, if the engine tells it."""


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


class Arrivals(AbstractContextManager["Arrivals"], Protocol):
    """Makes what images consist of while the wheels arrive; when the context ends, all that can be made is.

    What fails is left: the build of the image meets it again, and raises it.
    """

    def arrived(self, sha256: str) -> None:
        """Take note that a wheel is in the store."""


class StoreBuilder(Builder, Protocol):
    """Makes images in the store, of parts that many images have in common."""

    def arrivals(self, plans: Iterable[tuple[Plan, BaseImage | None]], *, store: Store, steps: Steps) -> Arrivals:
        """Return what makes the parts of all the images, once its context begins."""


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


class Watcher(Protocol):
    """Runs a command in any image and passes on what it prints while it runs."""

    def find(self, reference: str) -> Found:
        """Return the image a reference means, pulled if need be; raises ImpossibleError if there is none."""

    def watch(
        self,
        image: Found,
        argv: Sequence[str],
        *,
        files: Mapping[str, bytes],
        allowance: Allowance,
        on_line: Callable[[str], None],
        deadline_s: float,
    ) -> Ended:
        """Run a command in a confined container; `files` (absolute path to content) lie below BOX."""


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

    def whole(self) -> tuple[str, ...]:
        """Return the digests of the images of which the engine has every byte, as far as it can say."""

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
