"""Times on a device: CUDA events or the clock, and what is said of many of them: median, spread, percentiles, drift."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, Sequence, Union

DRIFT = 0.05
"""Rooflines further apart than this, relative to the first, belong to a device whose speed changed in between."""
SPREAD = 0.03
"""Interquartile range over the median; more than this is no steady measurement."""


def percentile(values: Sequence[float], rank: float) -> float:
    """Return the nearest-rank percentile: a value that was measured, never one between two."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(rank / 100 * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    return (percentile(values, 75) - percentile(values, 25)) / statistics.median(values)


def drift(before: float, after: float) -> float:
    """Return how far apart two measurements of one thing are, relative to the first."""
    return abs(after / before - 1)


@dataclass(frozen=True)
class Summary:
    """What is said of many times, in seconds."""

    count: int
    mean: float
    median: float
    spread: float
    p90: float
    p99: float
    longest: float

    @property
    def jitter(self) -> float:
        """How much longer the slowest of a hundred takes than the middle one, as a ratio."""
        return self.p99 / self.median

    def as_json(self) -> Dict[str, Any]:
        """Return it as evidence."""
        return asdict(self)


def summary(values: Sequence[float]) -> Summary:
    """Sum times up; there must be one at least."""
    return Summary(
        count=len(values),
        mean=statistics.fmean(values),
        median=statistics.median(values),
        spread=spread(values),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
        longest=max(values),
    )


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Points on a device's time line, set without waiting for it."""

    def __init__(self, device: str, count: int) -> None:
        import torch

        self._device = device
        self._on_gpu = torch.device(device).type == "cuda"
        self._set = 0
        # Made beforehand: making an event takes longer than recording it.
        self._points: List[Any] = [torch.cuda.Event(enable_timing=True) if self._on_gpu else 0.0 for _ in range(count)]

    def mark(self) -> None:
        """Set the next point: after all that was asked of the device until now."""
        if self._on_gpu:
            self._points[self._set].record()
        else:
            self._points[self._set] = time.perf_counter()
        self._set += 1

    def intervals(self) -> List[float]:
        """Wait for the device and return the seconds between one point and the next."""
        synchronize(self._device)
        points = self._points[: self._set]
        pairs = zip(points, points[1:])
        if self._on_gpu:
            return [first.elapsed_time(second) / 1e3 for first, second in pairs]
        return [second - first for first, second in pairs]


def times(call: Callable[[], object], device: str, *, repeats: int, warm_up: int = 2) -> List[float]:
    """Return the seconds that each of `repeats` calls took on the device."""
    for _ in range(warm_up):
        call()
    marks = Marks(device, repeats + 1)
    synchronize(device)
    marks.mark()
    for _ in range(repeats):
        call()
        marks.mark()
    return marks.intervals()


def times_for(
    call: Callable[[], object], device: str, *, seconds: float, fewest: int = 5, most: int = 1000
) -> List[float]:
    """Return the seconds of as many calls as fit into the time given, between `fewest` and `most`."""
    first = times(call, device, repeats=2)
    repeats = int(seconds / max(min(first), 1e-7))
    return times(call, device, repeats=max(fewest, min(most, repeats)), warm_up=0)


def host_seconds(call: Callable[[], object], device: str) -> float:
    """Return how long a call takes as the host sees it, the device's work included."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


Number = Union[int, float]


def rounded(values: Sequence[Number], digits: int = 7) -> List[float]:
    """Return a series as evidence holds it: no more digits than a clock has."""
    return [round(float(value), digits) for value in values]
