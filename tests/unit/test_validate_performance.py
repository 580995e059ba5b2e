"""Times and rooflines: what is said of numbers, and how they are judged; figures as an H100 would have them."""

from typing import ClassVar

import pytest

from validate import timing
from validate.check import Probe, Request
from validate.checks import performance
from validate.checks.performance import Climbed, Row
from validate.generate import RUNGS
from validate.roofline import Bandwidth, Roofline
from validate.verdict import Blame, Status

BANDWIDTH = Bandwidth(copy=2.9e12, read=3.0e12)
ROOFLINE = Roofline(
    bandwidth=BANDWIDTH,
    gemm={"bf16": 7.1e14, "fp32": 5.1e13},
    upload=5.5e10,
    download=5.4e10,
    launch_s=4e-6,
    graph_launch_s=1.2e-6,
)


class Told:
    """What a probe was told."""

    def __init__(self) -> None:
        self.documents: list[dict[str, object]] = []
        self.probe = Probe(Request(), lambda document: self.documents.append(dict(document)))

    @property
    def said(self) -> list[tuple[Status, str]]:
        return [(finding.status, finding.mode) for finding in self.probe.findings]

    def metric(self, name: str) -> object:
        return next(document["value"] for document in self.documents if document.get("metric") == name)

    @property
    def detail(self) -> object:
        return next(document["detail"] for document in self.documents if "detail" in document)


@pytest.fixture
def told() -> Told:
    return Told()


class TestTiming:
    def test_a_percentile_is_a_value_that_was_measured(self) -> None:
        values = [5.0, 1.0, 4.0, 2.0, 3.0]
        assert [timing.percentile(values, rank) for rank in (0, 20, 21, 50, 99, 100)] == [1, 1, 2, 3, 5, 5]

    def test_one_slow_step_shows_in_the_tail_and_not_in_the_middle(self) -> None:
        seen = timing.summary([1.0] * 98 + [9.0, 9.0])
        assert (seen.median, seen.p90, seen.p99, seen.longest, seen.spread) == (1.0, 1.0, 9.0, 9.0, 0.0)
        assert seen.jitter == 9.0
        assert seen.mean == pytest.approx(1.16)

    def test_spread_is_relative(self) -> None:
        assert timing.spread([9.0, 10.0, 10.0, 11.0]) == pytest.approx(0.1)
        assert timing.spread([90.0, 100.0, 100.0, 110.0]) == pytest.approx(0.1)

    def test_drift_has_no_sign(self) -> None:
        assert timing.drift(100.0, 94.0) == pytest.approx(0.06)
        assert timing.drift(100.0, 106.0) == pytest.approx(0.06)


class TestRoofline:
    def test_what_the_sheet_promises_is_never_reached_and_that_is_well(self, told: Told) -> None:
        performance.judge_roofline(told.probe, ROOFLINE, 3.35e12)
        assert told.said == []

    def test_less_than_half_is_the_machine_s_fault(self, told: Told) -> None:
        performance.judge_roofline(told.probe, ROOFLINE, 6.0e12)
        assert told.said == [(Status.FAIL, "F42")]
        assert told.probe.findings[0].blame is Blame.HOST

    def test_nothing_is_said_where_nothing_was_promised(self, told: Told) -> None:
        performance.judge_roofline(told.probe, ROOFLINE, None)
        assert told.said == []

    def test_every_figure_is_kept_with_its_unit(self, told: Told) -> None:
        performance.tell_roofline(told.probe, ROOFLINE, 3.35e12)
        assert told.metric("copy") == pytest.approx(2900)
        assert told.metric("gemm_bf16") == pytest.approx(710)
        assert told.metric("graph_launch") == pytest.approx(1.2)
        assert told.detail == "copy 2900 GB/s, read 3000 GB/s, bf16 products 710.0 TFLOP/s"


def row(step_s: float, *losses: float) -> Row:
    return Row(step_s=step_s, samples_per_s=8 / step_s, losses=list(losses), memory_bytes=None)


class TestTypes:
    GOOD: ClassVar[dict[str, Row]] = {
        "fp32": row(0.1, 10.4, 9.0),
        "bf16": row(0.02, 10.41, 9.1),
        "cpu": row(5.0, 10.9, 10.1),
    }

    def test_faster_and_as_well(self, told: Told) -> None:
        performance.judge_amp(told.probe, self.GOOD, tensor_cores=True)
        assert told.said == []

    def test_a_loss_that_does_not_fall(self, told: Told) -> None:
        performance.judge_amp(told.probe, {**self.GOOD, "bf16": row(0.02, 10.4, 10.4)}, tensor_cores=True)
        assert told.said == [(Status.FAIL, "")]

    def test_no_number_is_no_loss(self, told: Told) -> None:
        performance.judge_amp(told.probe, {**self.GOOD, "bf16": row(0.02, 10.4, float("nan"))}, tensor_cores=True)
        assert told.said == [(Status.FAIL, "")]

    def test_another_loss_to_begin_with(self, told: Told) -> None:
        performance.judge_amp(told.probe, {**self.GOOD, "bf16": row(0.02, 12.4, 9.1)}, tensor_cores=True)
        assert "begins with another loss" in told.probe.findings[0].what

    def test_no_faster_is_noted_where_there_are_tensor_cores_only(self, told: Told) -> None:
        rows = {**self.GOOD, "bf16": row(0.09, 10.4, 9.1)}
        performance.judge_amp(told.probe, rows, tensor_cores=False)
        assert told.said == []
        performance.judge_amp(told.probe, rows, tensor_cores=True)
        assert told.said == [(Status.WARN, "")]


def climbed(**speeds: float) -> dict[str, Climbed]:
    rungs = {rung.name: rung for rung in RUNGS}
    return {name: Climbed(rungs[name], speed, 0.5, 10.0) for name, speed in speeds.items()}


class TestLadder:
    def test_compiled_is_faster(self, told: Told) -> None:
        performance.judge_ladder(told.probe, "wide", climbed(R0=100, R2=90, R4=300))
        assert told.said == []

    def test_no_compiled_way_is_faster(self, told: Told) -> None:
        performance.judge_ladder(told.probe, "wide", climbed(R0=100, R1=300, R2=90, R4=95))
        assert told.said == [(Status.WARN, "")]

    def test_what_there_was_no_time_for_is_said(self, told: Told) -> None:
        performance.tell_ladder(
            told.probe, {"wide": climbed(R0=100, R5=310), "narrow": climbed(R0=50)}, left_out=["R3"]
        )
        assert str(told.detail).endswith("310.0 tokens/s, 3.10 times eager; no time for R3")


class TestStability:
    def test_within_five_percent(self, told: Told) -> None:
        performance.judge_stability(told.probe, BANDWIDTH, Bandwidth(copy=2.8e12, read=2.9e12))
        assert told.said == []

    def test_the_worse_of_both_counts(self, told: Told) -> None:
        performance.judge_stability(told.probe, BANDWIDTH, Bandwidth(copy=2.9e12, read=2.7e12))
        assert told.said == [(Status.WARN, "F42")]
        assert "read differs by 10%" in told.probe.findings[0].what
