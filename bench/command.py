"""What the command lines of the benches have in common: options, the cells that are measured, how a run ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.results import Measured
from builder.console import Console
from builder.errors import InterruptedRunError, MatrixError, ToolError, TorchyardError
from builder.matrix import Cell

CELL = "torch2.8.0-cu128-*"

E = TypeVar("E", bound=Measured)


def parser(
    program: str, description: str, *, epilog: str, contenders: Sequence[str], texts: dict[str, str]
) -> argparse.ArgumentParser:
    """Return the options of a bench with these contenders; `texts` say by their names what some of them mean to it."""

    def keys(text: str) -> tuple[str, ...]:
        return chosen_keys(text, contenders)

    made = argparse.ArgumentParser(prog=program, description=description, epilog=epilog)
    made.add_argument("cell", nargs="?", help=f"id, tag or pattern (default: {CELL}, its stock cuDNN)")
    made.add_argument("--small", action="store_true", help=texts["small"])
    made.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR", help="(default: %(default)s)")
    made.add_argument("--repeat", type=int, default=1, metavar="N", help=texts["repeat"])
    made.add_argument("--only", type=keys, metavar="KEYS", help=texts["only"])
    made.add_argument("--neighbour", metavar="CELL", help=texts["neighbour"])
    made.add_argument("--render", type=Path, metavar="FILE", help=texts["render"])
    return made


def chosen_keys(text: str, contenders: Sequence[str]) -> tuple[str, ...]:
    """Return the contenders that are named, by comma, in the order of a run; raises ArgumentTypeError for another."""
    asked = [key.strip() for key in text.split(",") if key.strip()]
    unknown = sorted(set(asked) - set(contenders))
    if unknown or not asked:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(contenders)}")
    return tuple(key for key in contenders if key in asked)


def run(work: Callable[[Console], tuple[str, bool]], *, stopped: str) -> int:
    """Do the work, and print the text that it returns; returns the exit code: 1 if a contender failed, as it says, too.

    `stopped` is said when the user ends it.
    """
    console = Console()
    try:
        text, failed = work(console)
    except TorchyardError as error:
        console.error(error)
        return error.exit_code
    except OSError as error:
        console.error(ToolError(error.strerror or str(error), where=str(error.filename or "")))
        return ToolError.exit_code
    except KeyboardInterrupt:
        console.say(stopped)
        return InterruptedRunError.exit_code
    print(text)
    return int(failed)


def measured(failed: Callable[[str], E], contender: Callable[[], list[E]]) -> list[E]:
    """Measure; one contender that fails does not stop the others: `failed` makes its entry of the reason."""
    try:
        return contender()
    except TorchyardError as error:
        reasons = [f"{problem.what}: {problem.why}".removesuffix(": ") for problem in error.problems]
        return [failed("; ".join(reasons))]


def chosen(cells: Sequence[Cell], *, small: bool) -> Cell:
    """Return the cell to measure: for --small the CPU's, else the first that CELL means, else the first."""
    if small:
        cells = [cell for cell in cells if cell.cuda == "cpu"]
        if not cells:
            raise MatrixError("--small measures a CPU cell, and none was found")
    prefix = CELL.removesuffix("*")
    return next((cell for cell in cells if cell.id.startswith(prefix) and cell.cudnn_is_stock), cells[0])


def neighbour_of(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """Return the cell with the next torch and all else alike but cuDNN, which torch decides; None if there is none."""
    alike = [
        other
        for other in cells
        if other.torch > cell.torch
        and other.cudnn_is_stock
        and (other.cuda, other.base_name, other.variant_name, other.platform)
        == (cell.cuda, cell.base_name, cell.variant_name, cell.platform)
    ]
    return min(alike, key=lambda other: other.torch, default=None)
