"""Which of a report's numbers are drawn, and how; a figure whose numbers were not measured is not there.

The numbers are those of `validate/checks/performance.py` and `generation.py`: metrics by name, and evidence as it was
seen, of which nothing is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.report import Metric, Report, Result, shown
from builder.reports.plots import Bar, Line, bars, binned, histogram

_NAMES: Mapping[str, str] = {
    "copy": "copy",
    "read": "read",
    "promised": "memory, by clock and width",
    "upload": "host to device",
    "download": "device to host",
    "bf16": "bfloat16, autocast",
    "fp16": "float16, autocast",
    "tf32": "float32 in TF32",
    "fp32": "float32",
    "cpu": "float32 on the CPU",
}
"""What a name of the suite means to people, in the order in which bars are drawn."""
_GEOMETRIES: Mapping[str, str] = {"wide": "wide layers", "narrow": "narrow layers"}
"""Of the decoder. Wide layers show what the memory does, narrow ones what launching costs."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot with its words, and the table of the same numbers."""

    title: str
    note: str = ""
    svg: str = ""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    wide: bool = False


def figures(report: Report) -> list[Figure]:
    """Return the figures of the report."""
    return [figure for figure in _all(report) if figure.svg or figure.rows]


def _all(report: Report) -> Iterator[Figure]:
    roofline, generation = report.result("perf.roofline"), report.result("perf.generate")
    yield _bandwidth(roofline, generation)
    yield _products(roofline)
    yield _generation(generation)
    for geometry in _GEOMETRIES:
        yield _latencies(generation, geometry)
    for geometry in _GEOMETRIES:
        yield _ladder(report.result("perf.compile"), geometry)
    yield _precisions(report.result("perf.amp"))


def _measured(result: Result | None, unit: str) -> Mapping[str, Metric]:
    """Return the metrics in a unit; none of a check that was not run."""
    return {name: metric for name, metric in result.metrics.items() if metric.unit == unit} if result else {}


def _seen(result: Result | None, *path: str) -> Any:  # noqa: ANN401 (any JSON)
    """Return what was seen under these names, one in the other; None if there is nothing."""
    value: Any = result.evidence if result else None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _number(value: object, factor: float = 1.0) -> float | None:
    """Return a number times a factor; None of whatever is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value * factor


def _spelt(value: object, unit: str, factor: float = 1.0) -> str:
    number = _number(value, factor)
    return "-" if number is None else shown(number, unit)


def _bandwidth(roofline: Result | None, generation: Result | None) -> Figure:
    measured = _measured(roofline, "GB/s")
    rows = [
        Bar(label=_NAMES.get(name, name), value=one.value, shown=shown(one.value, one.unit))
        for name, one in sorted(measured.items(), key=lambda it: [*_NAMES, it[0]].index(it[0]))
    ]
    around = [_seen(generation, when, name) for when in ("before", "after") for name in ("copy", "read")]
    own = [value for value in (_number(one, 1e-9) for one in around) if value]
    limit = max(own or [one.value for name, one in measured.items() if name in ("copy", "read")], default=0.0)
    decoded = [(name, _number(_seen(generation, key, "bandwidth"), 1e-9)) for key, name in _GEOMETRIES.items()]
    for name, value in decoded:
        if value is not None and limit > 0:
            text = f"{shown(value, 'GB/s')} · {value / limit:.0%}"
            rows.append(Bar(label=f"decoding, {name}", value=value, shown=text, tone="strong"))
    compared = limit > 0 and any(value is not None for _, value in decoded)
    return Figure(
        title="Bandwidth",
        note="What memory and bus do, and what generating one token after another draws of it.",
        svg=bars(
            "bandwidth in GB/s",
            rows,
            line_at=Line(value=limit, label=f"while decoding, memory gives {shown(limit, 'GB/s')}")
            if compared
            else None,
        ),
    )


def _products(roofline: Result | None) -> Figure:
    measured = _measured(roofline, "TFLOP/s").items()
    kinds = [(name.removeprefix("gemm_"), metric) for name, metric in measured]
    rows = [
        Bar(label=_NAMES.get(kind, kind).removesuffix(", autocast"), value=one.value, shown=shown(one.value, one.unit))
        for kind, one in sorted(kinds, key=lambda it: -it[1].value)
    ]
    launches = _measured(roofline, "us")
    note = "The best of several large shapes."
    if "launch" in launches:
        note += f" Launching a kernel takes {shown(launches['launch'].value, 'us')}"
        inside = launches.get("graph_launch")
        note += f", in a CUDA graph {shown(inside.value, 'us')}." if inside else "."
    return Figure(title="Matrix products", note=note, svg=bars("matrix products in TFLOP/s", rows))


def _generation(result: Result | None) -> Figure:
    columns = [name for name in _GEOMETRIES if isinstance(_seen(result, name), dict)]
    limit = max(
        (value for name in ("copy", "read") if (value := _number(_seen(result, "before", name)))), default=math.nan
    )
    lines: Sequence[tuple[str, tuple[str, ...], str, float]] = (
        ("tokens a second", ("tokens_per_s",), "1/s", 1),
        ("share of the memory's bandwidth", ("bandwidth",), "ratio", 1 / limit),
        ("time between tokens, median", ("itl_s", "median"), "ms", 1e3),
        ("of a hundred tokens the slowest", ("itl_s", "p99"), "ms", 1e3),
        ("as the host sees it, median", ("host_itl_s", "median"), "ms", 1e3),
        ("time to the first token", ("ttft_s",), "ms", 1e3),
        ("reading a prompt, share of the products' peak", ("prefill_utilisation",), "ratio", 1),
        ("compiling", ("compile_s",), "s", 1),
        ("memory", ("memory_bytes",), "GiB", 2**-30),
        ("read for each token", ("bytes_per_step",), "GB", 1e-9),
    )
    rows = []
    for title, path, unit, factor in lines:
        cells = [_spelt(_seen(result, name, *path), unit, factor) for name in columns]
        if any(cell != "-" for cell in cells):
            rows.append((title, *cells))
    for name in columns:
        batches = _seen(result, name, "batches")
        for size in sorted(batches, key=lambda it: (len(it), it)) if isinstance(batches, dict) else ():
            others = [_spelt(_seen(result, one, "batches", size, "tokens_per_s"), "1/s") for one in columns]
            rows.append((f"tokens a second, {size} at once", *others))
    rung = _seen(result, "rung")
    return Figure(
        title="Generation",
        note="One sequence, token after token, weights drawn at random"
        + (f"; of the ways to run a step below, “{rung}”." if isinstance(rung, str) else "."),
        headings=("", *(_GEOMETRIES[name] for name in columns)),
        rows=rows,
        wide=True,
    )


def _latencies(result: Result | None, geometry: str) -> Figure:
    title = f"Time between tokens, {_GEOMETRIES[geometry]}"
    rounds = _seen(result, geometry, "series_s")
    steps = [step for one in rounds if isinstance(one, list) for step in one] if isinstance(rounds, list) else []
    values = sorted(value for value in (_number(step, 1e3) for step in steps) if value is not None)
    bins = binned(values)
    if bins is None:
        return Figure(title=title)
    marks = {f"p{rank}": values[math.ceil(len(values) * rank / 100) - 1] for rank in (50, 90, 99)}
    spelt = {name: shown(value, "ms") for name, value in (marks | {"low": bins.low, "high": bins.high}).items()}
    return Figure(
        title=title,
        note=f"{len(values)} tokens: p99 {spelt['p99']}, the slowest {shown(values[-1], 'ms')}.",
        svg=histogram("time between tokens in ms", bins, marks=marks, shown=spelt),
    )


def _ladder(result: Result | None, geometry: str) -> Figure:
    found = _seen(result, "ladder", geometry)
    rungs = sorted(found) if isinstance(found, dict) else []
    speeds = {
        name: speed for name in rungs if (speed := _number(_seen(result, "ladder", geometry, name, "tokens_per_s")))
    }
    eager, best = speeds.get("R0"), max(speeds.values(), default=0.0)
    drawn, rows = [], []
    for name, speed in speeds.items():
        one = found[name]
        title = f"{name} {one.get('title', '')}"
        times = f"{speed / eager:.2f}x" if eager else "-"
        tone = "strong" if speed == best else "plain"
        drawn.append(Bar(label=title, value=speed, shown=shown(speed, "1/s"), tone=tone))
        rows.append((name, times, _spelt(one.get("mbu"), "ratio"), _spelt(one.get("compile_s"), "s")))
    return Figure(
        title=f"torch.compile, {_GEOMETRIES[geometry]}",
        note="Tokens a second, from eager on; each step adds to the one before.",
        svg=bars("tokens a second", drawn),
        headings=("", "to eager", "bandwidth", "compiling"),
        rows=rows,
    )


def _precisions(result: Result | None) -> Figure:
    found = _seen(result, "rows")
    kinds = list(found) if isinstance(found, dict) else []
    speeds = {kind: speed for kind in kinds if (speed := _number(_seen(result, "rows", kind, "samples_per_s")))}
    plain = speeds.get("fp32")
    drawn, rows = [], []
    for kind, speed in sorted(speeds.items(), key=lambda it: it[1]):
        one, name = found[kind], _NAMES.get(kind, kind)
        drawn.append(Bar(label=name, value=speed, shown=shown(speed, "1/s")))
        losses = one.get("losses")
        last = losses[-1] if isinstance(losses, list) and losses else None
        rows.append((
            name,
            _spelt(one.get("step_s"), "ms", 1e3),
            f"{speed / plain:.2f}x" if plain else "-",
            _spelt(one.get("memory_bytes"), "GiB", 2**-30),
            _spelt(last, ""),
        ))  # fmt: skip
    return Figure(
        title="Training by number format",
        note="Samples a second of one transformer: forward, loss, backward, AdamW.",
        svg=bars("samples a second", drawn),
        headings=("", "step", "to float32", "memory", "last loss"),
        rows=rows,
        wide=True,
    )
