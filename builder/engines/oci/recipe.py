"""Layers that are not kept: a recipe says which bytes of which wheels, in which order, are the layer.

The bytes are regenerated at the speed of a copy whenever somebody wants them, so the store holds every wheel once and
no layer made of it. A recipe is never trusted: whoever reads a layer through `pieces` gets an error at the end if the
bytes were not those its digest promises.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from builder.errors import HashMismatchError, SourceError
from builder.layout import Descriptor, Layer, canonical_json
from builder.store import Store, write_atomically

SCHEMA = 1
PIECE = 1 << 20
"""Bytes a reader is given at a time: a recipe of 30 000 segments is not 30 000 writes."""
_UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError)
"""What a file that is missing or damaged may raise when it is read as JSON of ours."""
_LARGEST = 1 << 62
"""Above every offset that can be asked for."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One layer as segments of files of the store: (index of the source, offset, length)."""

    layer: Layer
    sources: tuple[str, ...]
    """Hex SHA-256 of the files; the first holds what is in no wheel: headers, padding, generated files."""
    segments: tuple[tuple[int, int, int], ...]

    def dumps(self) -> bytes:
        """Return the recipe as it is kept."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "blob": self.layer.blob.as_json(),
                "diff_id": self.layer.diff_id,
                "sources": list(self.sources),
                "segments": [list(segment) for segment in self.segments],
            }
        )

    @classmethod
    def loads(cls, content: bytes) -> Self:
        """Read a recipe; raises ValueError, KeyError, TypeError or OverflowError if it is none."""
        document = json.loads(content)
        if document["schema"] != SCHEMA:
            raise ValueError("a recipe of another schema")
        sources = tuple(map(str, document["sources"]))
        segments = tuple(map(tuple, document["segments"]))
        if not all(re.fullmatch(r"[0-9a-f]{64}", source) for source in sources):
            raise ValueError("a source that is no SHA-256")
        # Tens of thousands: whoever asks whether an image is complete waits for this.
        numbers = list(itertools.chain.from_iterable(segments))
        if {*map(len, segments)} - {3} or {*map(type, numbers)} - {int}:
            raise ValueError("a segment that is no three numbers")
        if segments and not (min(numbers) >= 0 and max(numbers) < _LARGEST and max(numbers[::3]) < len(sources)):
            raise ValueError("a segment of nothing")
        return cls(
            layer=Layer(blob=Descriptor.from_json(document["blob"]), diff_id=str(document["diff_id"])),
            sources=sources,
            segments=segments,
        )


# ----------------------------------------------------------------------------------------------------
# Keeping


def _path(store: Store, sha256: str) -> Path:
    return store.root / "recipes" / f"{sha256}.json"


def _known_path(store: Store, key: str) -> Path:
    return store.root / "layers" / f"{key}.json"


def keep(store: Store, recipe: Recipe) -> None:
    """Keep a recipe under its layer's digest."""
    write_atomically(_path(store, recipe.layer.blob.sha256), recipe.dumps())


def find(store: Store, sha256: str) -> Recipe | None:
    """Return the recipe of a layer, None if there is none that can be read."""
    try:
        recipe = Recipe.loads(_path(store, sha256).read_bytes())
    except _UNREADABLE:
        return None
    return recipe if recipe.layer.blob.sha256 == sha256 else None


def remember(store: Store, key: str, layer: Layer, about: Mapping[str, Any]) -> None:
    """Keep, under the digest of all that a layer is made from, which layer that gave, and what was seen in it."""
    document = {"schema": SCHEMA, "blob": layer.blob.as_json(), "diff_id": layer.diff_id, "about": dict(about)}
    write_atomically(_known_path(store, key), canonical_json(document))


def recall(store: Store, key: str) -> tuple[Layer, Mapping[str, Any]] | None:
    """Return the layer that `key` gave before, and what was seen in it; None if its bytes can no longer be had."""
    try:
        document = json.loads(_known_path(store, key).read_bytes())
        if document["schema"] != SCHEMA:
            return None
        layer = Layer(blob=Descriptor.from_json(document["blob"]), diff_id=str(document["diff_id"]))
        about = dict(document["about"])
    except _UNREADABLE:
        return None
    return (layer, about) if available(store, layer.blob) else None


# ----------------------------------------------------------------------------------------------------
# Reading


def available(store: Store, blob: Descriptor) -> bool:
    """Tell whether the bytes of a blob can be had without network: as a file, or by a recipe and its sources."""
    if store.has(blob.sha256, size=blob.size):
        return True
    recipe = find(store, blob.sha256)
    return recipe is not None and all(store.has(source) for source in recipe.sources)


def pieces(store: Store, blob: Descriptor) -> Iterator[bytes]:
    """Yield the bytes of a blob, regenerated if need be.

    Raises SourceError if they cannot be had, HashMismatchError after the last piece if they were wrong: a reader
    that writes must not make anything visible before the end. What was damaged is removed from the store.
    """
    recipe = None if store.has(blob.sha256, size=blob.size) else find(store, blob.sha256)
    inner = _file(store.path(blob.sha256), blob) if recipe is None else _regenerated(store, recipe)
    digest, size = hashlib.sha256(), 0
    for piece in inner:
        digest.update(piece)
        size += len(piece)
        yield piece
    if size != blob.size or digest.hexdigest() != blob.sha256:
        raise _damaged(store, blob, recipe)


def _file(path: Path, blob: Descriptor) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except FileNotFoundError:
        raise SourceError(
            f"the store does not have the layer {blob.digest}",
            why="neither its bytes nor a recipe for them are there",
            tries=("build the cell again: torchyard build CELL",),
        ) from None


def _regenerated(store: Store, recipe: Recipe) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        files = []
        for source in recipe.sources:
            try:
                file = stack.enter_context(store.path(source).open("rb"))
            except FileNotFoundError:
                raise SourceError(
                    f"the store lost a file that a layer is made of: sha256 {source}",
                    where=str(store.path(source)),
                    tries=("torchyard fetch brings locked wheels back", "build the cell again: torchyard build CELL"),
                ) from None
            files.append(file.fileno())
        held: list[bytes] = []
        size = 0
        for index, offset, length in recipe.segments:
            at, end = offset, offset + length
            while at < end:
                piece = os.pread(files[index], min(PIECE, end - at), at)
                if not piece:
                    return  # cut short: the digest will tell
                at += len(piece)
                held.append(piece)
                size += len(piece)
                if size >= PIECE:
                    # One alone, which most are, is not copied: that took half of the time.
                    yield b"".join(held)
                    held.clear()
                    size = 0
        if held:
            yield b"".join(held)


def _damaged(store: Store, blob: Descriptor, recipe: Recipe | None) -> HashMismatchError:
    """Find out what is damaged, remove it, and return the error that says so."""
    bad = [source for source in (recipe.sources if recipe else (blob.sha256,)) if not store.verify(source)]
    if recipe is not None:
        # Its segments may be what is wrong; it is made again from the wheels in seconds.
        _path(store, blob.sha256).unlink(missing_ok=True)
    what = f"sha256 {', '.join(bad)}" if bad else "its recipe"
    return HashMismatchError(
        f"the layer {blob.digest} came out with other bytes",
        where=str(store.root),
        why=f"damaged in the store, and removed from it: {what}",
        tries=("run torchyard build for the cell: what is missing is fetched and made again",),
    )
