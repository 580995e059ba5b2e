"""Tags besides a cell's own: dated ones, which mean one image for ever, and those that move from cell to cell."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Iterator

from builder.matrix import Cell

LATEST = "latest"


def dated_tag(cell: Cell, epoch: int) -> str:
    """Return the tag, without repository, of the image that the cell's locks of a day give.

    `epoch` is the time of that image. The day is the last one up to which packages were considered: that of the newest
    one or, if it is later, that of `exclude_newer`, which people can move where nothing else does.
    """
    day = max(dt.datetime.fromtimestamp(epoch, dt.UTC), cell.exclude_newer.astimezone(dt.UTC))
    return f"{cell.tag_names[0]}-{day:%Y%m%d}"


def serials(dated: str) -> Iterator[str]:
    """Yield the tags that images of one day bear, one after another: `x-20261115`, `x-20261115.1`, `x-20261115.2`.

    The same packages may give another image (with a newer start-up program, say), which needs a name of its own.
    """
    yield dated
    yield from (f"{dated}.{number}" for number in itertools.count(1))


def moving_tags(cell: Cell, cells: Iterable[Cell], *, latest: str | None = None) -> tuple[str, ...]:
    """Return the tags, without repository, that come to a cell of a matrix from other cells; none for most.

    There is one for torch's minor release, CUDA and variant, `2.8-cuda12.8-runtime`: it is the highest patch release's,
    with the cuDNN that torch pins and on the matrix' default base. The cell with the id `latest` is `latest`, too.
    """
    kind = _kind(cell)
    newest = kind is not None and not any(_kind(other) == kind and other.torch > cell.torch for other in cells)
    return (*((kind,) if kind is not None and newest else ()), *((LATEST,) if cell.id == latest else ()))


def _kind(cell: Cell) -> str | None:
    """Return the moving tag that a cell could bear, None if it is not of a kind that has one."""
    if not (cell.cudnn_is_stock and cell.base_is_default) or cell.companions or cell.torch.is_prerelease:
        return None
    processor = cell.platform.partition("/")[2]
    return "-".join(
        (
            f"{cell.torch.major}.{cell.torch.minor}",
            "cpu" if cell.cuda == "cpu" else f"cuda{cell.cuda}",
            cell.variant_name,
            *(() if processor == "amd64" else (processor,)),
        )
    )
