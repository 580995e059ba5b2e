"""What people see: results on standard output, progress and errors on standard error, in one style."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from builder.engines import Steps
from builder.errors import TorchyardError
from builder.fetching import Progress as Transfers

PLAIN_EVERY_S = 10.0
"""Without a terminal, a transfer reports at most this often."""


# Lines that a CI runner obeys (GitHub's, with or without indentation), in the middle of what somebody else wrote.
_COMMAND = re.compile(r"(?m)(^\s*:)(?=:)|(#)(?=#\[)")


def printable(text: str) -> str:
    """Replace control characters: what an index, a package or a build prints must not steer a terminal or a CI log."""
    plain = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
    return _COMMAND.sub(lambda match: f"{match.group()} ", plain)


class _Transfers:
    """Bytes of several files as one bar on a terminal, as lines otherwise."""

    def __init__(self, console: RichConsole, progress: Progress | None, title: str, *, quiet: bool) -> None:
        self._console, self._progress, self._title, self._quiet = console, progress, title, quiet
        self._sizes: dict[str, int] = {}
        self._done = 0
        self._files = 0
        self._started = self._last = time.monotonic()
        self._task: TaskID | None = progress.add_task(title, total=None) if progress else None

    def start(self, name: str, size: int | None, done: int) -> None:
        if name in self._sizes:
            return
        self._sizes[name] = size or 0
        self._done += done
        if self._progress and self._task is not None:
            self._progress.update(self._task, total=sum(self._sizes.values()) or None, completed=self._done)

    def advance(self, name: str, size: int) -> None:  # noqa: ARG002 (one bar for all files)
        self._done += size
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._last > PLAIN_EVERY_S:
            self._last = time.monotonic()
            self._console.print(f"  {self._rate()}", highlight=False)

    def finish(self, name: str) -> None:  # noqa: ARG002
        self._files += 1

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{self._done / 1e6:.0f} MB in {seconds:.0f} s, {self._done / 1e6 / seconds:.0f} MB/s"

    def close(self) -> None:
        if self._done and not self._quiet:
            self._console.print(f"  {self._files} files, {self._rate()}", style="dim", highlight=False)


class _Lines:
    """An engine's steps, a line each, with what they print behind them where that is wanted."""

    def __init__(self, console: RichConsole, title: str, *, verbose: bool, quiet: bool) -> None:
        self._console, self._title, self._verbose, self._quiet = console, title, verbose, quiet
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        if not self._quiet:
            seconds = time.monotonic() - self._started
            self._console.print(f"  [dim]{seconds:5.0f} s[/dim]  {escape(printable(text))}", highlight=False)

    def output(self, line: str) -> None:
        if self._verbose and not self._quiet:
            self._console.print(f"           [dim]{escape(printable(line))}[/dim]", highlight=False)


class Console:
    """One console for a whole run; implements the reporters that stages ask for."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        # Soft wrapping leaves lines whole where they go to a file: CI logs and greps want one line a thing.
        self._out = RichConsole(soft_wrap=True)
        self._err = RichConsole(stderr=True, soft_wrap=True)

    # ------------------------------------------------------------------ results

    def result(self, document: object) -> None:
        """Print the one document for machines, if it was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people, one line a row so that it can be searched."""
        if self.as_json:
            return
        if not self._out.is_terminal:
            widths = [max(map(len, column), default=0) for column in zip(columns, *rows, strict=True)]
            for row in (columns, *rows):
                cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                self._out.print(Text("  ".join(cells).rstrip()), highlight=False)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self._out.print(table)

    def write(self, text: str) -> None:
        """Print text for people on standard output."""
        if not self.as_json:
            self._out.print(Text(printable(text)), highlight=False)

    # ------------------------------------------------------------------ progress

    def say(self, text: str) -> None:
        """Say one thing about the run."""
        if not self.quiet:
            self._err.print(Text(printable(text)), highlight=False)

    @contextmanager
    def transfers(self, title: str) -> Iterator[Transfers]:
        """Show transfers while the context is open."""
        if self.quiet or not self._err.is_terminal:
            if not self.quiet:
                self.say(title)
            plain = _Transfers(self._err, None, title, quiet=self.quiet)
            yield plain
            plain.close()
            return
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self._err) as progress:
            yield _Transfers(self._err, progress, escape(title), quiet=False)

    @contextmanager
    def steps(self, title: str) -> Iterator[Steps]:
        """Show an engine's steps while the context is open."""
        yield _Lines(self._err, title, verbose=self.verbose, quiet=self.quiet)

    # ------------------------------------------------------------------ errors

    def error(self, error: TorchyardError) -> None:
        """Print what · where · why · what to try, for every problem the error carries."""
        if self.as_json:
            self.result(
                {
                    "error": type(error).__name__,
                    "exit_code": error.exit_code,
                    "problems": [
                        {"what": p.what, "where": p.where, "why": p.why, "tries": list(p.tries)} for p in error.problems
                    ],
                }
            )
        self.problems(error)

    def problems(self, error: TorchyardError) -> None:
        """Print the problems for people, on standard error."""
        for problem in error.problems:
            head = Text("error ", style="bold red")
            head.append(printable(problem.what), style="bold")
            self._err.print(head, highlight=False)
            for label, text in (("where", problem.where), ("why", problem.why)):
                self._block(label, text)
            for number, text in enumerate(problem.tries):
                self._block("try" if number == 0 else "or", text)
        if len(error.problems) > 1:
            self._err.print(Text(f"{len(error.problems)} problems", style="dim"), highlight=False)

    def _block(self, label: str, text: str) -> None:
        for number, line in enumerate(printable(text).splitlines()):
            row = Text(f"  {label if number == 0 else '':<6}", style="dim")
            row.append(line, style="default")
            self._err.print(row, highlight=False)
