"""Numbers → inline SVG: bars and histograms that need no script, take the page's colours, and fit any width.

Places along the width are percentages and sizes of text are not scaled, so that a plot can be read on a phone and on a
wide screen alike. Text goes through an XML writer: nothing in it can become markup.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET  # (written, never read)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.report import line

_ROW, _BAR = 40, 10
"""Height of a row and of its bar, in CSS pixels."""
_LONGEST = 46
"""Characters of a label and of its value together: as many fit on a phone."""
_HEIGHT = 120
"""Of a histogram's columns."""
_MARK = 15
"""Height of a line of text above a histogram."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its length, and what is written above it."""

    label: str
    value: float
    shown: str
    tone: str = "plain"
    """Class of the bar: "plain", "strong" for what matters most, "pass", "warn", "fail", "skip", "error", "waived"."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line across all bars: something that they are compared with."""

    value: float
    label: str


def bars(title: str, rows: Sequence[Bar], *, line_at: Line | None = None) -> str:
    """Draw horizontal bars from zero; empty if there is nothing to draw."""
    rows = [row for row in rows if math.isfinite(row.value) and row.value >= 0]
    full = max([row.value for row in rows] + ([line_at.value] if line_at else []), default=0.0)
    if not rows or full <= 0:
        return ""
    top = _MARK + 6 if line_at else 0
    root = _svg(title, top + _ROW * len(rows) - 8)
    for number, row in enumerate(rows):
        y = top + number * _ROW
        group = ET.SubElement(root, "g")
        ET.SubElement(group, "title").text = f"{line(row.label)}: {line(row.shown)}"
        _text(group, _short(row.label, _LONGEST - len(row.shown)), x="0", y=y + 13, kind="label")
        _text(group, row.shown, x="100%", y=y + 13, kind="value", anchor="end")
        _rect(group, x="0", y=y + 19, width="100%", height=_BAR, kind="track")
        _rect(group, x="0", y=y + 19, width=_percent(row.value / full), height=_BAR, kind=f"bar {row.tone}")
        if line_at:  # across the bar only: the words above it stay readable
            x = _percent(line_at.value / full)
            ET.SubElement(group, "line", {"class": "mark", "x1": x, "x2": x, "y1": str(y + 17), "y2": str(y + 32)})
    if line_at:
        far = line_at.value / full > 0.5
        _text(
            root, line_at.label, x=_percent(line_at.value / full), y=11, kind="note", anchor="end" if far else "start"
        )
    return _written(root)


def stack(title: str, parts: Sequence[Bar]) -> str:
    """Draw one bar made of parts, for shares of a whole; empty if there is nothing to draw."""
    whole = sum(part.value for part in parts)
    if whole <= 0:
        return ""
    root = _svg(title, 14)
    left = 0.0
    for part in parts:
        if part.value > 0:
            group = ET.SubElement(root, "g")
            ET.SubElement(group, "title").text = f"{line(part.label)}: {line(part.shown)}"
            share = part.value / whole
            _rect(group, x=_percent(left), y=0, width=_percent(share), height=14, kind=f"bar {part.tone}", round_by=0)
            left += share
    return _written(root)


@dataclass(frozen=True, kw_only=True)
class Bins:
    """How often values fell into equal steps from `low` to `high`; those above are in `beyond`."""

    low: float
    high: float
    counts: tuple[int, ...]
    beyond: int = 0


def binned(values: Sequence[float], *, most: int = 40) -> Bins | None:
    """Sort values into steps; None of fewer than two different ones.

    The axis ends where it is twice as long as 95 of 100 values need: a slow outlier would squeeze all others into one
    column.
    """
    values = sorted(value for value in values if math.isfinite(value))
    if len(values) < 2 or values[0] == values[-1]:
        return None
    low, near = values[0], values[math.ceil(len(values) * 0.95) - 1]
    high = min(values[-1], low + 2 * (near - low)) if near > low else values[-1]
    steps = min(most, max(8, math.isqrt(len(values)) * 2))
    inside = [value for value in values if value <= high]
    counts = [0] * steps
    for value in inside:
        counts[min(steps - 1, int((value - low) / (high - low) * steps))] += 1
    return Bins(low=low, high=high, counts=tuple(counts), beyond=len(values) - len(inside))


def histogram(title: str, bins: Bins, *, marks: Mapping[str, float], shown: Mapping[str, str]) -> str:
    """Draw columns, with a line at each of `marks`; `shown` spells the marks, "low" and "high" for people."""
    spread, tallest = bins.high - bins.low, max(bins.counts)
    inside = [(name, value) for name, value in marks.items() if bins.low <= value <= bins.high]
    top = _MARK * len(inside) + 4
    root = _svg(title, top + _HEIGHT + 20)
    width = 100 / len(bins.counts)
    for number, count in enumerate(bins.counts):
        height = max(1.5, _HEIGHT * count / tallest) if count else 0
        group = ET.SubElement(root, "g")
        ET.SubElement(group, "title").text = str(count)
        _rect(
            group, x=f"{number * width + width * 0.06:.2f}%", y=top + _HEIGHT - height, width=f"{width * 0.88:.2f}%",
            height=height, kind="bar plain", round_by=1,
        )  # fmt: skip
    base = str(top + _HEIGHT)
    ET.SubElement(root, "line", {"class": "axis", "x1": "0", "x2": "100%", "y1": base, "y2": base})
    for number, (name, value) in enumerate(inside):
        x, far = _percent((value - bins.low) / spread), (value - bins.low) / spread > 0.7
        y = _MARK * number
        ET.SubElement(root, "line", {"class": "mark", "x1": x, "x2": x, "y1": str(y), "y2": base})
        words = f"{name} {shown[name]}"
        _text(root, words, x=x, y=y + 11, kind="note", anchor="end" if far else "start", dx=-5 if far else 5)
    _text(root, shown["low"], x="0", y=top + _HEIGHT + 15, kind="note")
    more = f", {bins.beyond} beyond" if bins.beyond else ""
    _text(root, shown["high"] + more, x="100%", y=top + _HEIGHT + 15, kind="note", anchor="end")
    return _written(root)


def _svg(title: str, height: int) -> ET.Element:
    attributes = {"class": "plot", "role": "img", "width": "100%", "height": str(height), "aria-label": line(title)}
    return ET.Element("svg", attributes)


def _rect(parent: ET.Element, *, x: str, y: float, width: str, height: float, kind: str, round_by: float = 3) -> None:
    place = {"x": x, "y": f"{y:g}", "width": width, "height": f"{height:g}", "rx": f"{round_by:g}"}
    ET.SubElement(parent, "rect", {"class": kind, **place})


def _text(parent: ET.Element, text: str, *, x: str, y: float, kind: str, anchor: str = "start", dx: float = 0) -> None:
    place = {"x": x, "y": f"{y:g}", "dx": f"{dx:g}", "text-anchor": anchor}
    ET.SubElement(parent, "text", {"class": kind, **place}).text = line(text)


def _short(text: str, most: int) -> str:
    text = line(text)
    return text if len(text) <= most else f"{text[: max(most, 8) - 1]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _written(root: ET.Element) -> str:
    # Between HTML's own elements: without a name space, and with closing tags everywhere.
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)
