"""What takes the space in images: their layers with what is in each → rows, totals, and the forms they are read in.

Nothing here reads a file. A layer is one whose digest is the same: that several images have it is proven by that, and
wherever they lie together it lies there once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.engines.oci.contents import DEB, NOBODY, WHEEL
from builder.engines.oci.inventory import Stored
from builder.layout import Image
from builder.render import Plan

BAR = 12
"""Characters of the longest bar."""
NARROWEST = 80
"""Columns below which nothing is made to fit."""
SMALL = 1_000_000
"""Bytes of a compressed layer below which a page does not name it; each cell has one, with its image.json."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One complete image: its cell, its tag, the layers it has, and the versions of its packages."""

    id: str
    tag: str
    digest: str
    base: str
    layers: tuple[Stored, ...]
    versions: Mapping[str, str]
    """By the names that contents have: "pypi/torch"."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes as they are stored and sent, and those of the files that come out."""

    compressed: int = 0
    unpacked: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(compressed=self.compressed + other.compressed, unpacked=self.unpacked + other.unpacked)

    def as_json(self) -> dict[str, int]:
        """Return the two for machines."""
        return {"compressed_bytes": self.compressed, "unpacked_bytes": self.unpacked}


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer, and the cells that have it."""

    digest: str
    title: str
    size: Bytes
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PackageRow:
    """One version of a package, bytecode included, and the cells that have it."""

    name: str
    """As contents have it; NOBODY for what no package brings."""
    version: str
    unpacked: int
    cells: tuple[str, ...]

    @property
    def text(self) -> str:
        """What people call it."""
        if self.name == NOBODY:
            return "files of no package"
        kind, _, name = self.name.partition("/")
        return f"{name} {self.version}".rstrip() + ("" if kind == WHEEL else " (Debian)")


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """One cell's totals."""

    id: str
    tag: str
    digest: str
    layers: int
    size: Bytes
    own: Bytes
    """Of the layers that no other of the cells has."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What several cells take, each by itself and all together."""

    cells: tuple[CellRow, ...]
    layers: tuple[LayerRow, ...]
    """Each once, those of the first cell first."""
    packages: tuple[PackageRow, ...]
    """The largest first."""

    @property
    def apart(self) -> Bytes:
        """What the cells take if nothing is shared."""
        return _sum(cell.size for cell in self.cells)

    @property
    def together(self) -> Bytes:
        """What they take where each layer lies once."""
        return _sum(layer.size for layer in self.layers)


def cell_of(plan: Plan, image: Image, layers: Iterable[Stored]) -> Cell:
    """Return the cell of a plan, complete as `image`, whose layers are these."""
    debs = {
        f"{DEB}/{deb.name}": deb.version for lock in (plan.base_lock, plan.system_lock) if lock for deb in lock.debs
    }
    return Cell(
        id=plan.cell.id,
        tag=plan.cell.tags[0],
        digest=image.manifest.digest,
        base=plan.cell.base_name,
        layers=tuple(layers),
        versions={**debs, **{f"{WHEEL}/{wheel.name}": str(wheel.version) for wheel in plan.lock.wheels}},
    )


def sizes(cells: Sequence[Cell]) -> Sizes:
    """Count what the cells take; their order is kept."""
    layers: dict[str, Stored] = {}
    titles: dict[str, str] = {}
    having: dict[str, list[str]] = {}
    packages: dict[tuple[str, str, int], list[str]] = {}
    for cell in cells:
        for layer in cell.layers:
            digest = layer.layer.blob.digest
            layers.setdefault(digest, layer)
            titles.setdefault(digest, _title(cell, layer))
            if cell.id not in (have := having.setdefault(digest, [])):
                have.append(cell.id)
        for name, unpacked in _packages(cell).items():
            packages.setdefault((name, cell.versions.get(name, ""), unpacked), []).append(cell.id)
    return Sizes(
        cells=tuple(_cell_row(cell, having) for cell in cells),
        layers=tuple(
            LayerRow(digest=digest, title=titles[digest], size=_size(layer), cells=tuple(having[digest]))
            for digest, layer in layers.items()
        ),
        packages=tuple(
            PackageRow(name=name, version=version, unpacked=unpacked, cells=tuple(have))
            for (name, version, unpacked), have in sorted(packages.items(), key=lambda it: (-it[0][2], it[0]))
        ),
    )


def _title(cell: Cell, layer: Stored) -> str:
    if not layer.of_base:
        return layer.title
    # A base of ours is one layer; what an image of others says of its layers may be a page of shell.
    return f"base {cell.base}" if layer is cell.layers[0] else f"base {cell.base}: {layer.title}"


def _packages(cell: Cell) -> Counter[str]:
    found: Counter[str] = Counter()
    for layer in cell.layers:
        found.update(layer.contents.packages)
    return found


def _cell_row(cell: Cell, having: Mapping[str, Sequence[str]]) -> CellRow:
    return CellRow(
        id=cell.id,
        tag=cell.tag,
        digest=cell.digest,
        layers=len(cell.layers),
        size=_sum(map(_size, cell.layers)),
        own=_sum(_size(layer) for layer in cell.layers if len(having[layer.layer.blob.digest]) == 1),
    )


def _size(layer: Stored) -> Bytes:
    return Bytes(compressed=layer.layer.blob.size, unpacked=layer.contents.size)


def _sum(several: Iterable[Bytes]) -> Bytes:
    return sum(several, Bytes())


# ----------------------------------------------------------------------------------------------------
# Forms


def as_json(found: Sizes) -> dict[str, Any]:
    """Return all of it for machines."""
    return {
        "cells": [
            {
                "id": cell.id,
                "tag": cell.tag,
                "digest": cell.digest,
                **cell.size.as_json(),
                "own": cell.own.as_json(),
                "layers": [layer.digest for layer in found.layers if cell.id in layer.cells],
            }
            for cell in found.cells
        ],
        "layers": [
            {"digest": layer.digest, "title": layer.title, **layer.size.as_json(), "cells": list(layer.cells)}
            for layer in found.layers
        ],
        "packages": [
            {"name": it.name, "version": it.version, "unpacked_bytes": it.unpacked, "cells": list(it.cells)}
            for it in found.packages
        ],
        "apart": found.apart.as_json(),
        "together": found.together.as_json(),
    }


def text(found: Sizes, *, width: int, top: int) -> str:
    """Return the sizes for people, in lines of `width` characters, with the `top` largest packages."""
    width, which = max(width, NARROWEST), _numbers(found)
    several = len(found.cells) > 1
    lines = [cell.tag for cell in found.cells]
    if several:
        rows = [
            (which([cell.id]), _mb(cell.size.compressed), _mb(cell.size.unpacked), _mb(cell.own.compressed), cell.tag)
            for cell in found.cells
        ]
        lines = list(_table(("cell", "compressed", "unpacked", "its own", ""), rows, width))
    largest = max((layer.size.compressed for layer in found.layers), default=0)
    layers = [
        (which(layer.cells), _mb(layer.size.compressed), _mb(layer.size.unpacked),
         _bar(layer.size.compressed, largest), layer.title)
        for layer in found.layers
    ]  # fmt: skip
    lines += ["", *_table(("cells", "compressed", "unpacked", "", "layer"), layers, width, numbered=several)]
    if shown := found.packages[:top]:
        packages = [(which(it.cells), _mb(it.unpacked), _bar(it.unpacked, shown[0].unpacked), it.text) for it in shown]
        lines += ["", *_table(("cells", "unpacked", "", "package"), packages, width, numbered=several)]
        if len(found.packages) > top:
            lines.append(f"and {len(found.packages) - top} smaller: --top shows more")
    return "\n".join([*lines, "", *_totals(found)])


def _totals(found: Sizes) -> Iterator[str]:
    together, apart = found.together, found.apart
    yield f"{_mb(together.compressed)} compressed, {_mb(together.unpacked)} unpacked, {len(found.layers)} layers"
    if len(found.cells) > 1:
        layers = sum(cell.layers for cell in found.cells)
        yield f"{_mb(apart.compressed)} compressed, {_mb(apart.unpacked)} unpacked, {layers} layers if none was shared"


def markdown(found: Sizes) -> str:
    """Return the sizes as a page of documentation: of cells in their order, of layers the largest first."""
    which = _numbers(found)
    layers = sorted(found.layers, key=lambda layer: -layer.size.compressed)
    shown = [layer for layer in layers if layer.size.compressed >= SMALL]
    rest = _sum(layer.size for layer in layers[len(shown) :])
    lines = [
        "# Sizes",
        "",
        "Written by `torchyard size --markdown > docs/sizes.md`, from a store in which these images are complete",
        "(`torchyard build --all`). It takes their wheels, so `make check` does not do it again.",
        "",
        "Numbers are MB, of 10^6 bytes. *Compressed* is what a registry stores and sends, *unpacked* the bytes of the",
        "files. Images share a layer whose digest is the same. *Adds* is what has to be fetched, compressed, where",
        "another image is there already: of those that stand above it the nearest, whose number follows.",
        "",
        *_markdown_table(
            ("no.", "image", "layers", "compressed", "unpacked", "adds", "to no."),
            [
                (which([cell.id]), f"`{cell.tag}`", str(cell.layers), _number(cell.size.compressed),
                 _number(cell.size.unpacked), *_added(found, cell, which))
                for cell in found.cells
            ],
            left=2,
        ),
        "",
        *(f"- {line}" for line in _totals(found)),
        "",
        "## Layers",
        "",
        *_markdown_table(
            ("layer", "in no.", "digest", "compressed", "unpacked"),
            [
                *((_fitted(layer.title, 100), which(layer.cells), f"`{layer.digest.removeprefix('sha256:')[:12]}`",
                   _number(layer.size.compressed), _number(layer.size.unpacked)) for layer in shown),
                *([(f"{len(layers) - len(shown)} more of less than {SMALL / 1e6:.0f} MB each", "", "",
                    _number(rest.compressed), _number(rest.unpacked))] if len(layers) > len(shown) else []),
            ],
            left=3,
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _added(found: Sizes, cell: CellRow, which: Callable[[Sequence[str]], str]) -> tuple[str, str]:
    """Return what a cell adds to the one before it to which that is least, and which it is; of the first, "-"."""
    before = [other.id for other in found.cells[: found.cells.index(cell)]]
    added = {
        other: sum(it.size.compressed for it in found.layers if cell.id in it.cells and other not in it.cells)
        for other in before
    }
    if not added:
        return "-", "-"
    nearest = min(added, key=added.__getitem__)
    return _number(added[nearest]), which([nearest])


def _number(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> Iterator[str]:
    """Yield the lines of a table; after the `left` first columns, which are text, numbers stand to the right."""
    for row in (columns, ("---",) * left + ("---:",) * (len(columns) - left), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, numbered: bool = True
) -> Iterator[str]:
    """Yield lines; sizes stand to the right, what does not fit into the last column is cut.

    If not `numbered`, the first column, which says whose something is, is left out.
    """
    if not numbered:
        columns, rows = columns[1:], [row[1:] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rest = width - sum(widths[:-1]) - 2 * (len(widths) - 1)
    for row in (columns, *rows):
        cells = [
            cell.rjust(size) if title in _SIZES else cell.ljust(size)
            for cell, size, title in zip(row[:-1], widths, columns, strict=False)
        ]
        yield "  ".join([*cells, _fitted(row[-1], rest)]).rstrip()


_SIZES = ("compressed", "unpacked", "its own")


def _fitted(title: str, width: int) -> str:
    """Return a title in one line of at most `width` characters; of a list, as many as fit, and how many more."""
    title = " ".join(title.split())
    if len(title) <= width:
        return title
    items = title.split(", ")
    for count in range(len(items) - 1, 0, -1):
        short = f"{', '.join(items[:count])} and {len(items) - count} more"
        if len(short) <= width:
            return short
    return f"{title[: width - 3]}..."


def _numbers(found: Sizes) -> Callable[[Sequence[str]], str]:
    """Return what names several cells shortly: 1-3, 5."""
    numbers = {cell.id: number for number, cell in enumerate(found.cells, 1)}
    return lambda cells: ", ".join(_ranges(sorted(numbers[cell] for cell in cells)))


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    for _, group in itertools.groupby(enumerate(numbers), key=lambda it: it[1] - it[0]):
        first, *rest = (number for _, number in group)
        yield f"{first}-{rest[-1]}" if rest else str(first)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _bar(size: int, largest: int) -> str:
    return "#" * round(BAR * size / largest) if largest else ""
