"""What an image stands on: the layers and configuration of its base, and what must be known about its files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

try:
    from isal import isal_zlib as inflater
    from isal.igzip import IGzipFile as GzipFile
except ImportError:  # a processor it is not built for
    import zlib as inflater  # type: ignore[no-redef]
    from gzip import GzipFile  # type: ignore[assignment]

from builder import layout
from builder.base import BaseImage
from builder.engines.oci.contents import Tally, remember
from builder.engines.oci.recipe import pieces
from builder.errors import CellFailedError
from builder.layout import MEDIA_LAYER_TAR, MEDIA_LAYER_ZSTD, History, Layer, canonical_json
from builder.render import HOME, IMAGE_JSON, PREFIX, PROFILE, SYSTEM_PATH, WORKDIR, Plan
from builder.schema import ImageBase
from builder.store import Store, write_atomically

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SCHEMA = 2
UNREADABLE: tuple[type[Exception], ...] = (  # type: ignore[assignment] # isal's stub says otherwise
    tarfile.TarError, EOFError, ValueError, OverflowError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError,
    inflater.error,
)  # fmt: skip
"""What reading the tar inside a layer may raise if it is none."""
_LATEST = 8**11 - 1
"""The last second that a plain tar header can say."""
_ROOT = PREFIX.lstrip("/")
_OPAQUE = ".wh..wh..opq"
"""In a directory: nothing that lower layers have there shows."""


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """A base as an engine needs it that does not run anything of it."""

    layers: tuple[Layer, ...]
    config: Mapping[str, Any]
    """The run part of the base's configuration: Env, Cmd, …"""
    history: tuple[History, ...]
    home: str
    """Directory of its Python, as found along its PATH: /usr/bin."""
    directories: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    """Mode, user, group and time of the `watched` directories that it has, its system layer included."""
    system: Layer | None = None
    """The variant's Debian packages, a layer that lies above those of the wheels."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 that stands for its files."""
        return hashlib.sha256(canonical_json([layer.diff_id for layer in self.layers])).hexdigest()

    @property
    def search(self) -> tuple[str, ...]:
        """The directories of its PATH."""
        return _search(self.config)


def foundation_of(plan: Plan, base: BaseImage | None, store: Store) -> Foundation:
    """Return what the plan's image stands on; a registry image is pulled by digest unless it is in the store.

    Raises CellFailedError if the base has no such Python.
    """
    system = None
    if base is not None:
        image = layout.read(base.layout)
        assert image is not None, base.layout
        document = json.loads(store.path(image.config.sha256).read_bytes())
        layers, system = image.layers, base.system
    else:
        assert isinstance(plan.cell.base, ImageBase)
        # Imported here: the models of what registries serve take time to make, and bases of one's own need none.
        from builder import registry  # noqa: PLC0415

        pulled = registry.pull(plan.cell.base.image, platform=plan.cell.platform, store=store)
        document, layers = dict(pulled.document), pulled.layers
    config = dict(document.get("config") or {})
    history = _history(document, len(layers))
    if system is not None:
        assert layers[-1] == system, "it is the topmost layer of its base"
        layers, history = layers[:-1], history[:-1]
    seen = _seen(store, layers, plan, search=_search(config))
    above = _Seen() if system is None else _seen(store, (system,), plan, search=())
    if seen.home is None:
        raise CellFailedError(
            f"{plan.cell.id}: the base has no python{plan.cell.python}",
            where=plan.cell.base_name,
            why=f"none of the directories of its PATH has one: {', '.join(_search(config))}",
            tries=("set the base's `python` in matrix.yaml to the version that its image has",),
        )
    if above.hides is not None:
        raise CellFailedError(
            f"{plan.cell.id}: the variant's Debian packages would change what lies below {PREFIX}",
            where=f"/{above.hides}",
            why="their layer lies above those of the Python packages, which every variant shares",
            tries=("leave the package that brings it out of the variant's `system`",),
        )
    if wrong := sorted({*seen.others} - above.directories.keys() | {*above.others}):
        raise CellFailedError(
            f"{plan.cell.id}: /{wrong[0]} is no directory in the base, and files of the image are to lie below it",
            where=plan.cell.base_name,
            why="a link would be replaced by a directory, and what it led to would be gone",
            tries=("name the place that the link leads to in the variant's `directories`", "use another base"),
        )
    return Foundation(
        layers=tuple(layers),
        config=config,
        history=history,
        home=seen.home,
        directories={**seen.directories, **above.directories},
        system=system,
    )


def watched(plan: Plan) -> frozenset[str]:
    """Return the directories into which a cell's own files go: as far as the base has them they stay as they are."""
    places = (IMAGE_JSON, PREFIX, PROFILE, *(f"{path}/x" for path in (HOME, WORKDIR, *plan.directories)))
    return frozenset({str(parent).lstrip("/") for path in places for parent in PurePosixPath(path).parents} - {""})


def _history(document: Mapping[str, Any], layers: int) -> tuple[History, ...]:
    """Return the base's own history if it names each of its layers once, which it need not."""
    found = tuple(
        History(
            created_by=str(line.get("created_by", "")),
            comment=str(line.get("comment", "")),
            empty=bool(line.get("empty_layer")),
        )
        for line in document.get("history") or ()
    )
    if sum(not line.empty for line in found) == layers:
        return found
    return (History(created_by="base"),) * layers


def _search(config: Mapping[str, Any]) -> tuple[str, ...]:
    environment = dict(line.split("=", 1) for line in config.get("Env") or () if "=" in line)
    return tuple(part for part in environment.get("PATH", SYSTEM_PATH).split(":") if part)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What layers were seen to hold."""

    home: str | None = None
    directories: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    """What is watched as a directory and is none."""
    hides: str | None = None
    """The first entry that lies in the environment, or takes it away."""


def _seen(store: Store, layers: Sequence[Layer], plan: Plan, *, search: Sequence[str]) -> _Seen:
    """Walk through the layers' files once and remember what was seen: those of a base take a second to inflate."""
    python, paths = plan.cell.python, watched(plan)
    key = {"schema": SCHEMA, "layers": [layer.diff_id for layer in layers], "python": python, "search": list(search),
           "watched": sorted(paths)}  # fmt: skip
    path = store.root / "foundations" / f"{hashlib.sha256(canonical_json(key)).hexdigest()}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(path.read_bytes())
        directories = {name: (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in found["directories"].items()}
        return _Seen(home=found["home"], directories=directories, others=tuple(found["others"]), hides=found["hides"])
    seen = _walked(store, layers, [f"{directory.strip('/')}/python{python}" for directory in search], paths)
    write_atomically(path, canonical_json(asdict(seen)))
    return seen


def _walked(store: Store, layers: Sequence[Layer], places: Sequence[str], paths: frozenset[str]) -> _Seen:
    interpreters: set[str] = set()
    directories: dict[str, tuple[int, int, int, int]] = {}
    others: set[str] = set()
    hides = None
    for layer in layers:
        tally = Tally()
        with open_tar(store, layer) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for entry in archive:
                tally.add(entry, archive)
                name = entry.name.removeprefix("./").strip("/")
                if hides is None and _hides(name):
                    hides = name
                if (gone := _whited_out(name)) is not None:
                    interpreters.discard(gone)
                    others.discard(gone)
                    if not name.endswith(_OPAQUE):
                        directories.pop(gone, None)
                    continue
                if name in places and not entry.isdir():
                    interpreters.add(name)
                if name in paths:
                    others.discard(name)
                    directories.pop(name, None)
                    if entry.isdir():
                        mtime = min(max(int(entry.mtime), 0), _LATEST)
                        directories[name] = (entry.mode & 0o7777, entry.uid, entry.gid, mtime)
                    else:
                        others.add(name)
        # Inflated once, gigabytes in some bases; whoever wants to know their sizes later does not do so again.
        remember(store, layer, tally.contents())
    home = next((place.rpartition("/")[0] for place in places if place in interpreters), None)
    return _Seen(
        home=None if home is None else f"/{home}", directories=directories, others=tuple(sorted(others)), hides=hides
    )


def _whited_out(name: str) -> str | None:
    """Return what an entry takes away of the layers below; None if it is no whiteout."""
    directory, _, base = name.rpartition("/")
    if base == _OPAQUE:
        return directory
    return f"{directory}/{base.removeprefix('.wh.')}".lstrip("/") if base.startswith(".wh.") else None


def _hides(name: str) -> bool:
    """Tell whether an entry lies in the environment, or takes it away."""
    gone = _whited_out(name)
    if gone is None:
        return f"{name}/".startswith(f"{_ROOT}/")
    return not gone or f"{gone}/".startswith(f"{_ROOT}/") or f"{_ROOT}/".startswith(f"{gone}/")


@contextlib.contextmanager
def open_tar(store: Store, layer: Layer) -> Iterator[BinaryIO]:
    """Open the tar inside a layer of the store for reading from its beginning.

    Raises HashMismatchError if the layer was damaged in the store, whatever its reader made of that, CellFailedError if
    it is whole and cannot be read all the same.
    """
    try:
        with open_pieces(pieces(store, layer.blob), layer.blob.media_type) as file:
            yield file
    except UNREADABLE as error:
        raise CellFailedError(
            "a layer of the base cannot be read",
            where=layer.blob.digest,
            why=f"{type(error).__name__}: {error}",
            tries=("use another base: the digest of this one names these very bytes",),
        ) from error


@contextlib.contextmanager
def open_pieces(layer: Iterator[bytes], media_type: str) -> Iterator[BinaryIO]:
    """Open the tar inside a layer that comes in pieces for reading from its beginning; it may raise what is UNREADABLE.

    The pieces are read to their last, whatever the reader made of them, and what they raise is raised instead.
    """
    raw = cast("BinaryIO", io.BufferedReader(_Pieces(layer), buffer_size=1 << 18))
    try:
        with _inflated(raw, media_type) as file:
            yield file
    except Exception:
        _read_to_end(raw)
        raise
    _read_to_end(raw)


def _read_to_end(raw: BinaryIO) -> None:
    """Read what is left: readers of a tar stop at its end, and the digest is known after the last byte."""
    while raw.read(1 << 20):
        pass


@contextlib.contextmanager
def _inflated(raw: BinaryIO, media_type: str) -> Iterator[BinaryIO]:
    if media_type == MEDIA_LAYER_TAR:
        yield raw
    elif media_type == MEDIA_LAYER_ZSTD:
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as file:
            yield cast("BinaryIO", file)
    else:
        with GzipFile(fileobj=raw) as file:  # type: ignore[no-untyped-call]
            yield cast("BinaryIO", file)


class _Pieces(io.RawIOBase):
    """Gives pieces of bytes to whoever wants to read a file."""

    def __init__(self, inner: Iterator[bytes]) -> None:
        super().__init__()
        self._inner = inner
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._rest:
            piece = next(self._inner, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
