"""Results as people read them: a table in Markdown, and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.results import Entry, Results, Run, ratio

BUILD, LOAD, RUN = "#c2410c", "#f59e0b", "#fcd34d"
PEER, PEER_LOAD, PEER_RUN = "#475569", "#94a3b8", "#cbd5e1"
FLOOR = "#cbd5e1"
INK, FAINT = "#0f172a", "#64748b"

X = "\N{MULTIPLICATION SIGN}"
_PLACES = (
    "`$STORE` is the store that holds the wheels, `$BASE` the base as an OCI layout, `$STATE` a store with hard links "
    "to both and nothing derived, `$WORK` a scratch directory on the same disk."
)

Row = tuple[str, ...]


# ----------------------------------------------------------------------------------------------------
# Tables


def markdown(results: Results) -> str:
    """Return the whole report."""
    parts = [_introduction(results), *failures(results), table(_CONTENDERS, contenders(results))]
    if rows := own(results):
        parts += ["## torchyard, after the first cell", table(_OWN, rows)]
    return page(
        results.cell,
        parts,
        words=findings(results),
        machine=results.machine,
        tools=[*results.tools.items(), *(("pip", entry.pip) for entry in results.entries if entry.pip)],
        commands=[_PLACES, *(_commands(results, entry) for entry in results.entries if entry.commands)],
    )


def failures(results: Run[Any]) -> list[str]:
    """Return a line for each contender that failed."""
    return [f"**failed** · {entry.name}: {entry.failure}" for entry in results.entries if entry.failure]


def page(
    title: str,
    parts: Iterable[str],
    *,
    words: Iterable[str],
    machine: Mapping[str, str],
    tools: Iterable[tuple[str, str]],
    commands: Iterable[str],
) -> str:
    """Return a report: what is its own, and then what each has, in words, where, with what, by which commands."""
    sections = [
        f"# {title}",
        *parts,
        "## In words",
        "\n".join(f"- {line}" for line in words),
        "## Machine",
        table(("", ""), [(name.replace("_", " "), value) for name, value in machine.items()]),
        "## Tools",
        table(("", ""), list(tools)),
        "## Commands",
        *commands,
    ]
    return "\n\n".join(sections) + "\n"


def script(name: str, lines: Iterable[str]) -> str:
    """Return what one contender ran."""
    return f"### {name}\n\n```sh\n" + "\n".join(lines) + "\n```"


_CONTENDERS = (
    "contender", "wheels → image", f"{X} torchyard", f"{X} floor", "compressed", "→ `import torch`", "import, cold",
    "import, warm", "memory", "to pull for the neighbour",
)  # fmt: skip
_OWN = ("what", "wheels worked through", "seconds", "their floor", f"{X} floor", "memory")


def contenders(results: Results) -> list[Row]:
    """Return the main table's rows, in the order of the run."""
    own_time = _median(results, "d")
    floor = _median(results, "floor")
    return [
        (
            entry.name,
            shown_seconds(entry.median),
            shown_times(ratio(entry.median, own_time)) if entry.key not in ("d", "floor") else "",
            shown_times(ratio(entry.median, floor)) if entry.key != "floor" else "",
            shown_gb(entry.image_bytes),
            shown_seconds(entry.to_import),
            shown_seconds(entry.import_cold_seconds),
            shown_seconds(entry.import_warm),
            shown_gb(entry.peak_bytes),
            shown_gb(entry.upgrade_bytes),
        )
        for entry in results.entries
        if entry.key in ("floor", "a", "b", "c", "d") and entry.seconds
    ]


def own(results: Results) -> list[Row]:
    """Return the rows of what torchyard did after its first cell."""
    return [
        (
            entry.name,
            shown_gb(entry.wheel_bytes) if entry.wheel_bytes else "none",
            shown_seconds(entry.median),
            shown_seconds(entry.floor_seconds),
            shown_times(ratio(entry.median, entry.floor_seconds)),
            shown_gb(entry.peak_bytes),
        )
        for entry in results.entries
        if entry.key in ("d2", "d3", "d4") and entry.seconds
    ]


def findings(results: Results) -> list[str]:
    """Return what the tables do not say."""
    lines = []
    torchyard, beside = results.entry("d"), results.entry("d3")
    if torchyard and torchyard.state_bytes is not None:
        share = torchyard.state_bytes / results.wheel_bytes
        lines.append(
            f"After the cold build torchyard's store held {torchyard.state_bytes / 1e6:.1f} MB beyond the wheels and "
            f"the base: {share:.2%} of the wheels."
        )
    if beside and results.neighbour:
        lines.append(f"The neighbour is {results.neighbour}; only wheels that the first cell lacks are counted for it.")
    if results.once is not None and results.matrix_wheel_bytes is not None:
        unique, added = results.matrix_wheel_bytes
        lines.append(
            f"The whole matrix, {unique / 1e9:.1f} GB of wheels each counted once, pays {results.once:.2f} times per "
            "wheel what one cell pays: (matrix cold / its floor) / (one cell cold / its floor). Working through "
            f"each cell's wheels anew would give {added / unique:.2f}."
        )
    colds = [entry for entry in results.entries if entry.import_warm_seconds]
    if colds and not any(entry.import_cold_seconds for entry in colds):
        lines.append("Imports with a cold page cache were not measured: emptying it takes root.")
    if any(results.entry(key) for key in ("a", "b", "c")):
        lines.append(
            "pip compiles bytecode, as torchyard does, and uv does not: that is their default. The peers' requirements "
            "carry no hashes, so they do not check the wheels, which torchyard does."
        )
    lines.append(
        "Memory is resident memory of all processes at once. BuildKit works in the engine's daemon: not measured."
    )
    return [*lines, *results.notes]


def _introduction(results: Results) -> str:
    runs = "one run" if results.repeat == 1 else f"the median of {results.repeat} runs"
    return (
        f"{results.wheels} wheels, {results.wheel_bytes / 1e9:.2f} GB, in memory; base known to each engine; {runs}, "
        f"{results.started}. The floor is what no method can avoid: each wheel inflated once, SHA-256 (of OpenSSL) of "
        "its compressed and of its inflated bytes, on all cores. `→ import torch` is building, loading where the image "
        "is not in the engine already, and one container's life."
    )


def _commands(results: Results, entry: Entry) -> str:
    text = script(entry.name, entry.commands)
    if entry.key in results.files:
        text += f"\n\n```dockerfile\n{results.files[entry.key].rstrip()}\n```"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _median(results: Results, key: str) -> float | None:
    entry = results.entry(key)
    return entry.median if entry else None


def shown_seconds(value: float | None) -> str:
    """Return a time as people read it; nothing if it is not known."""
    return "" if value is None else f"{value:.0f} s" if value >= 100 else f"{value:.1f} s"


def shown_times(value: float | None) -> str:
    """Return a ratio as people read it; nothing if it is not known."""
    return "" if value is None else f"{value:.0f}{X}" if value >= 10 else f"{value:.1f}{X}"


def shown_gb(value: int | None) -> str:
    """Return a size as people read it; nothing if it is not known."""
    return "" if value is None else f"{value / 1e9:.2f} GB"


# ----------------------------------------------------------------------------------------------------
# Plot


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its parts from left to right, each with a colour, and the words beside it."""

    name: str
    parts: tuple[tuple[float, str], ...]
    label: str
    remark: str
    own: bool = False

    @property
    def length(self) -> float:
        """Seconds in all."""
        return sum(seconds for seconds, _ in self.parts)


def image_bars(results: Results) -> list[Bar]:
    """Return the bars from wheels to image, the shortest first."""
    mine, bars = _median(results, "d"), []
    for entry in results.entries:
        median = entry.median
        if median is None or entry.key not in ("floor", "a", "b", "c", "d"):
            continue
        if entry.key == "floor":
            bar = Bar(
                name="floor", parts=((median, FLOOR),), label=shown_seconds(median), remark="no method can avoid it"
            )
        elif entry.key == "d":
            over = ratio(median, _median(results, "floor"))
            remark = f"{shown_times(over)} the floor" if over else ""
            bar = Bar(name=entry.name, parts=((median, BUILD),), label=shown_seconds(median), remark=remark, own=True)
        else:
            bar = Bar(
                name=entry.name,
                parts=((median, PEER),),
                label=shown_seconds(median),
                remark=_compared(ratio(median, mine)),
            )
        bars.append(bar)
    return sorted(bars, key=lambda bar: bar.length)


def import_bars(results: Results) -> list[Bar]:
    """Return the bars from wheels to `import torch`, the shortest first."""
    mine = results.entry("d")
    bars = []
    for entry in results.entries:
        if entry.to_import is None or entry.median is None or entry.first_run_seconds is None:
            continue
        own = entry.key == "d"
        colours = (BUILD, LOAD, RUN) if own else (PEER, PEER_LOAD, PEER_RUN)
        spans = (entry.median, entry.load_seconds or 0.0, entry.first_run_seconds)
        bars.append(
            Bar(
                name=entry.name,
                parts=tuple(zip(spans, colours, strict=True)),
                label=shown_seconds(entry.to_import),
                remark="" if own else _compared(ratio(entry.to_import, mine.to_import if mine else None)),
                own=own,
            )
        )
    return sorted(bars, key=lambda bar: bar.length)


def _compared(times: float | None) -> str:
    return f"{shown_times(times)} torchyard" if times else ""


def svg(results: Results) -> str:
    """Return the plot; at 800 pixels across its smallest text is 11 pixels high."""
    import matplotlib as mpl  # noqa: PLC0415 (a second and 100 MB, which a run without a plot need not pay)
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = [
        (title, legend, bars)
        for title, legend, bars in (
            ("From local wheels to a complete image", (), image_bars(results)),
            ("… until “import torch” has returned in a container", ("build", "load", "run"), import_bars(results)),
        )
        if bars
    ]
    rows = [len(bars) + 1.6 for _, _, bars in panels]
    height = 0.36 * sum(rows) + 1.15
    # Text as outlines: it looks the same whatever fonts the reader has.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "torchyard", "font.size": 10, "text.color": INK}):
        figure = Figure(figsize=(8, height), dpi=100, facecolor="white")
        FigureCanvasSVG(figure)
        top = 1 - 0.78 / height
        grid = figure.add_gridspec(
            max(len(panels), 1), 1, height_ratios=rows or None, left=0.27, right=0.97, top=top, bottom=0.34 / height,
            hspace=0.16,
        )  # fmt: skip
        figure.text(0.02, 1 - 0.28 / height, results.cell, fontsize=13, fontweight="bold", va="center")
        about = f"{results.wheels} wheels, {results.wheel_bytes / 1e9:.2f} GB · seconds, less is better"
        figure.text(0.02, 1 - 0.53 / height, about, color=FAINT, va="center")
        longest = max((bar.length for _, _, bars in panels for bar in bars), default=1.0)
        for place, (title, legend, bars) in enumerate(panels):
            axes = figure.add_subplot(grid[place])
            axes.set_xlim(0, longest * 1.4)  # the words beside the longest bar need the rest
            axes.set_ylim(len(bars) - 0.4, -1.2)
            axes.axis("off")
            axes.text(-0.357, -0.95, title, transform=axes.get_yaxis_transform(), fontweight="bold", va="center")
            for at, (word, own_colour, colour) in enumerate(
                zip(legend, (BUILD, LOAD, RUN), (PEER, PEER_LOAD, PEER_RUN), strict=False)
            ):
                left = 0.66 + 0.12 * at
                for shift, shade in ((0.0, own_colour), (0.018, colour)):
                    axes.scatter([left + shift], [-0.95], marker="s", s=38, color=shade, clip_on=False,
                                 transform=axes.get_yaxis_transform())  # fmt: skip
                axes.text(left + 0.034, -0.95, word, transform=axes.get_yaxis_transform(), color=FAINT, va="center")
            for at, bar in enumerate(bars):
                weight = "bold" if bar.own else "normal"
                axes.text(-longest * 0.02, at, bar.name, ha="right", va="center", fontweight=weight)
                left = 0.0
                for seconds, colour in bar.parts:
                    axes.barh(at, seconds, left=left, height=0.62, color=colour, linewidth=0)
                    left += seconds
                text = axes.annotate(bar.label, (left, at), (6, 0), textcoords="offset points", va="center",
                                     fontweight="bold")  # fmt: skip
                axes.annotate(bar.remark, (1, 0.5), (6, 0), xycoords=text, textcoords="offset points", va="center",
                              color=BUILD if bar.own else FAINT)  # fmt: skip
        machine = results.machine
        foot = f"{machine.get('processor', '')}, {machine.get('cores', '?')} cores, {machine.get('memory', '')}"
        foot += f" · {results.tools.get('torchyard', 'torchyard')} · {results.started[:10]}"
        figure.text(0.02, 0.16 / height, foot, color=FAINT, fontsize=8.5, va="center")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": f"torchyard bench, {results.cell}"})
    return out.getvalue()
