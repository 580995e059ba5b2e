"""Moving tags: names that stand for the newest cell of a kind, and go on to the next one when it is published."""

from __future__ import annotations

from collections.abc import Iterable

from builder.matrix import Cell


def moving_tags(cell: Cell, cells: Iterable[Cell]) -> tuple[str, ...]:
    """Return the moving tags, without repository, that a cell of a matrix bears; none for most cells.

    There is one for torch's minor release, CUDA and variant, `2.8-cuda12.8-runtime`: it is the highest patch release's,
    with the cuDNN that torch pins and on the matrix' default base.
    """
    kind = _kind(cell)
    if kind is None or any(_kind(other) == kind and other.torch > cell.torch for other in cells):
        return ()
    return (kind,)


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
