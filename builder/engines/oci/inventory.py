"""A complete image → its layers with what is in each: from the wheels' directories, and from a tar only if need be."""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from builder.engines.oci import contents, recipe
from builder.engines.oci.contents import WHEEL, Contents, Tally
from builder.engines.oci.foundation import open_tar
from builder.engines.oci.install import Placed, placed
from builder.engines.oci.layers import blamed, opened
from builder.errors import WheelError
from builder.layout import Image, Layer
from builder.lock import Wheel
from builder.store import Store

_OURS = "torchyard: "
"""How the line of an image's history begins that stands for a layer on top of its base."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One layer of an image of the store: what people call it, and what is in it."""

    layer: Layer
    title: str
    of_base: bool
    contents: Contents


def inventory(store: Store, image: Image, wheels: Iterable[Wheel]) -> tuple[Stored, ...]:
    """Return the layers of an image from the bottom up; `wheels` are those it was made of.

    What was not counted before is counted now, and remembered: of layers made of wheels without inflating anything.
    Raises HashMismatchError if something was damaged in the store, CellFailedError if a layer cannot be read.
    """
    source = _Wheels(store, wheels)
    return tuple(
        Stored(
            layer=layer,
            title=title,
            of_base=of_base,
            contents=contents.recall(store, layer) or _counted(store, layer, source),
        )
        for layer, title, of_base in titled(store, image)
    )


def titled(store: Store, image: Image) -> Iterator[tuple[Layer, str, bool]]:
    """Yield the layers of an image from the bottom up, each with its title and whether it is the base's."""
    history = json.loads(store.path(image.config.sha256).read_bytes()).get("history") or ()
    lines = [str(line.get("created_by", "")) for line in history if not line.get("empty_layer")]
    for layer, line in zip(image.layers, lines, strict=True):
        yield layer, line.removeprefix(_OURS), not line.startswith(_OURS)


class _Wheels:
    """What the wheels of an image bring, each opened at most once."""

    def __init__(self, store: Store, wheels: Iterable[Wheel]) -> None:
        self._store = store
        self._by_hash = {wheel.sha256: wheel for wheel in wheels}
        self.files = functools.cache(self._files)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._by_hash

    def owner(self, sha256: str) -> str:
        """Return the name of a wheel's package, as contents have it."""
        return f"{WHEEL}/{self._by_hash[sha256].name}"

    def _files(self, sha256: str) -> tuple[Placed, ...]:
        wheel = self._by_hash[sha256]
        try:
            return placed(opened(wheel, self._store))
        except WheelError as error:
            raise blamed(error, [wheel], self._store) from error

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Whose each source is, by its path: bytecode belongs to the same package."""
        return {
            file.path: self.owner(sha256)
            for sha256 in self._by_hash
            for file in self.files(sha256)
            if file.path.endswith(".py")
        }


def _counted(store: Store, layer: Layer, wheels: _Wheels) -> Contents:
    made = recipe.find(store, layer.blob.sha256)
    if made is not None and all(source in wheels for source in made.sources[1:]):
        found = Contents(
            packages={wheels.owner(source): sum(map(_size, wheels.files(source))) for source in made.sources[1:]}
        )
    else:
        tally = Tally(wheels.sources)
        with open_tar(store, layer) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for entry in archive:
                tally.add(entry, archive)
        found = tally.contents()
    contents.remember(store, layer, found)
    return found


def _size(file: Placed) -> int:
    return file.member.size if file.member is not None else len(file.content or b"")
