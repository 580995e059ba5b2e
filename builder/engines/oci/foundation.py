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
from dataclasses import dataclass, field
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
from builder.engines.oci.recipe import pieces
from builder.errors import CellFailedError
from builder.layout import MEDIA_LAYER_TAR, MEDIA_LAYER_ZSTD, History, Layer, canonical_json
from builder.render import HOME, IMAGE_JSON, PREFIX, SYSTEM_PATH, WORKDIR, Plan
from builder.schema import ImageBase
from builder.store import Store, write_atomically

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SCHEMA = 1
_UNREADABLE: tuple[type[Exception], ...] = (  # type: ignore[assignment] # isal's stub says otherwise
    tarfile.TarError, EOFError, ValueError, OverflowError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError,
    inflater.error,
)  # fmt: skip
_LATEST = 8**11 - 1
"""The last second that a plain tar header can say."""
WATCHED = tuple(
    sorted({str(parent).lstrip("/") for path in (IMAGE_JSON, PREFIX, f"{HOME}/x", f"{WORKDIR}/x")
            for parent in PurePosixPath(path).parents} - {""})
)  # fmt: skip
"""Directories into which a cell's own files go: as far as the base has them they stay as they are."""


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
    """Mode, user, group and time of the WATCHED directories that it has."""

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
    if base is not None:
        image = layout.read(base.layout)
        assert image is not None, base.layout
        document = json.loads(store.path(image.config.sha256).read_bytes())
        layers = image.layers
    else:
        assert isinstance(plan.cell.base, ImageBase)
        # Imported here: the models of what registries serve take time to make, and bases of one's own need none.
        from builder import registry  # noqa: PLC0415

        pulled = registry.pull(plan.cell.base.image, platform=plan.cell.platform, store=store)
        document, layers = dict(pulled.document), pulled.layers
    config = dict(document.get("config") or {})
    seen = _seen(store, layers, python=plan.cell.python, search=_search(config))
    if seen["home"] is None:
        raise CellFailedError(
            f"{plan.cell.id}: the base has no python{plan.cell.python}",
            where=plan.cell.base_name,
            why=f"none of the directories of its PATH has one: {', '.join(_search(config))}",
            tries=("set the base's `python` in matrix.yaml to the version that its image has",),
        )
    return Foundation(
        layers=tuple(layers),
        config=config,
        history=_history(document, len(layers)),
        home=str(seen["home"]),
        directories={path: tuple(about) for path, about in seen["directories"].items()},
    )


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


def _seen(store: Store, layers: Sequence[Layer], *, python: str, search: Sequence[str]) -> dict[str, Any]:
    """Walk through the base's files once and remember what was seen: its layers take a second to inflate."""
    key = {"schema": SCHEMA, "layers": [layer.diff_id for layer in layers], "python": python, "search": list(search),
           "watched": list(WATCHED)}  # fmt: skip
    path = store.root / "foundations" / f"{hashlib.sha256(canonical_json(key)).hexdigest()}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_bytes())
        return {"home": found["home"], "directories": dict(found["directories"])}
    places = [f"{directory.strip('/')}/python{python}" for directory in search]
    interpreters: set[str] = set()
    directories: dict[str, tuple[int, int, int, int]] = {}
    for layer in layers:
        with open_tar(store, layer) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for entry in archive:
                name = entry.name.removeprefix("./").strip("/")
                if entry.isdir() and name in WATCHED:
                    mtime = min(max(int(entry.mtime), 0), _LATEST)
                    directories[name] = (entry.mode & 0o7777, entry.uid, entry.gid, mtime)
                elif name in places and not entry.isdir():
                    interpreters.add(name)
                elif name.rpartition("/")[2].startswith(".wh."):
                    interpreters.discard(name.replace(".wh.", "", 1))
    home = next((place.rpartition("/")[0] for place in places if place in interpreters), None)
    seen = {"home": None if home is None else f"/{home}", "directories": directories}
    write_atomically(path, canonical_json(seen))
    return seen


@contextlib.contextmanager
def open_tar(store: Store, layer: Layer) -> Iterator[BinaryIO]:
    """Open the tar inside a layer of the store for reading from its beginning.

    Raises HashMismatchError if the layer was damaged in the store, whatever its reader made of that, CellFailedError if
    it is whole and cannot be read all the same.
    """
    raw = cast("BinaryIO", io.BufferedReader(_Pieces(pieces(store, layer.blob)), buffer_size=1 << 18))
    try:
        with _inflated(raw, layer) as file:
            yield file
    except Exception as error:
        _read_to_end(raw)
        if isinstance(error, _UNREADABLE):
            raise CellFailedError(
                "a layer of the base cannot be read",
                where=layer.blob.digest,
                why=f"{type(error).__name__}: {error}",
                tries=("use another base: the digest of this one names these very bytes",),
            ) from error
        raise
    _read_to_end(raw)


def _read_to_end(raw: BinaryIO) -> None:
    """Read what is left: readers of a tar stop at its end, and the digest is known after the last byte."""
    while raw.read(1 << 20):
        pass


@contextlib.contextmanager
def _inflated(raw: BinaryIO, layer: Layer) -> Iterator[BinaryIO]:
    if layer.blob.media_type == MEDIA_LAYER_TAR:
        yield raw
    elif layer.blob.media_type == MEDIA_LAYER_ZSTD:
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
