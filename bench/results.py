"""What a run found, as values: written as JSON, read back, and compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from builder.errors import MatrixError
from builder.layout import Descriptor

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one contender took; what was not measured is None."""

    key: str
    name: str
    seconds: tuple[float, ...] = ()
    """Of each run."""
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    """Resident memory of all its processes at once, at most; a contender that works in a daemon has none."""
    commands: tuple[str, ...] = ()
    failure: str = ""

    @property
    def median(self) -> float | None:
        """Seconds, of several runs the middle one."""
        return statistics.median(self.seconds) if self.seconds else None


M = TypeVar("M", bound=Measured)


@dataclass(frozen=True, kw_only=True)
class Run(Generic[M]):
    """One run: where, with what, and what each contender took."""

    schema: int = SCHEMA
    started: str
    cell: str
    neighbour: str | None
    repeat: int
    machine: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    entries: tuple[M, ...] = ()
    notes: tuple[str, ...] = ()

    def entry(self, key: str) -> M | None:
        """Return a contender's entry if it took part and has a time."""
        return next((entry for entry in self.entries if entry.key == key and entry.seconds), None)

    @property
    def failed(self) -> bool:
        """Whether any contender failed, or gave something else than it should."""
        return any(entry.failure for entry in self.entries)


R = TypeVar("R", bound=Run[Any])


def read(adapter: TypeAdapter[R], text: str, *, where: str) -> R:
    """Read results back; raises MatrixError if they are none."""
    try:
        found = adapter.validate_json(text)
    except ValidationError as error:
        raise MatrixError("not the results of a bench", where=where, why=str(error).splitlines()[0]) from None
    if found.schema != SCHEMA:
        raise MatrixError("results of another version of the bench", where=where, why=f"schema {found.schema}")
    return found


@dataclass(frozen=True, kw_only=True)
class Entry(Measured):
    """What one contender took from local wheels to the complete image."""

    wheel_bytes: int = 0
    """Of the wheels that had to be worked through; for a neighbour those that the first cell did not have."""
    floor_seconds: float | None = None
    """What the floor took for these same wheels."""
    image_bytes: int | None = None
    """Compressed: manifest, configuration and layers."""
    state_bytes: int | None = None
    """What the store holds afterwards beyond the wheels and the base."""
    load_seconds: float | None = None
    """Into the container engine, where it is not there already."""
    first_run_seconds: float | None = None
    """A container's start, `import torch` and end, right after the image came into the engine."""
    import_cold_seconds: float | None = None
    """`import torch` by itself, the page cache dropped before."""
    import_warm_seconds: tuple[float, ...] = ()
    upgrade_bytes: int | None = None
    """Of layers that a node with this contender's image of the cell lacks for that of the neighbour."""
    pip: str = ""
    """Version of the image's own pip, if that did the work."""

    @property
    def import_warm(self) -> float | None:
        """Seconds `import torch` takes with its files in memory."""
        return statistics.median(self.import_warm_seconds) if self.import_warm_seconds else None

    @property
    def to_import(self) -> float | None:
        """Seconds from wheels until `import torch` has returned in a container."""
        if self.median is None or self.first_run_seconds is None:
            return None
        return self.median + (self.load_seconds or 0.0) + self.first_run_seconds


@dataclass(frozen=True, kw_only=True)
class Results(Run[Entry]):
    """One run of the builds."""

    wheels: int
    wheel_bytes: int
    matrix_wheel_bytes: tuple[int, int] | None = None
    """Of the whole matrix: every wheel once, and every cell's wheels added up."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The Dockerfiles of the peers, by contender."""
    entries: tuple[Entry, ...] = ()

    @property
    def once(self) -> float | None:
        """How many times the whole matrix pays for a wheel, compared with one cell; 1.0 is once.

        (matrix cold / floor of its unique wheels) / (one cell cold / floor of its wheels), all four from this run.
        An engine that worked through each cell's wheels anew would get `matrix_wheel_bytes[1] / matrix_wheel_bytes[0]`.
        """
        one, every = self.entry("d"), self.entry("d4")
        if one is None or every is None:
            return None
        return ratio(ratio(every.median, every.floor_seconds), ratio(one.median, one.floor_seconds))


def ratio(value: float | None, to: float | None) -> float | None:
    """Return how many times `to` goes into `value`; None if one is not known, or there is nothing to compare with."""
    return value / to if value is not None and to else None


def pulled(have: Iterable[Descriptor], want: Iterable[Descriptor]) -> int:
    """Return the bytes of the layers of `want` that whoever holds `have` must pull; a repeated layer counts once."""
    held = {layer.digest for layer in have}
    return sum({layer.digest: layer.size for layer in want if layer.digest not in held}.values())


def dumps(results: Results) -> str:
    """Return the results as JSON, with what follows from them beside it for readers that do not compute."""
    document: dict[str, Any] = _ADAPTER.dump_python(results, mode="json")
    for entry, shown in zip(results.entries, document["entries"], strict=True):
        shown["derived"] = {
            "median_seconds": entry.median,
            "seconds_to_import": entry.to_import,
            "times_floor": ratio(entry.median, entry.floor_seconds),
            "import_warm_seconds": entry.import_warm,
        }
    document["derived"] = {"matrix_pays_per_wheel": results.once}
    return json.dumps(document, indent=2) + "\n"


def loads(text: str, *, where: str = "") -> Results:
    """Read results back; raises MatrixError if they are none."""
    return read(_ADAPTER, text, where=where)


_ADAPTER = TypeAdapter(Results)
