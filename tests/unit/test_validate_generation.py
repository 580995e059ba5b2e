"""The figures of a generation: what follows from them, what they are held to, and what proves them."""

from dataclasses import replace

import pytest

from validate import generate
from validate.check import Probe, Request
from validate.checks import generation
from validate.checks.generation import Run, Speed
from validate.generate import Decoding
from validate.roofline import Bandwidth
from validate.verdict import Blame, Finding, Status

BEFORE, AFTER = Bandwidth(copy=2.9e12, read=3.0e12), Bandwidth(copy=2.88e12, read=3.02e12)


@pytest.fixture
def probe() -> Probe:
    return Probe(Request(), lambda _: None)


def decoding(seconds: float, bytes_per_step: int, layers: int, *, batch: int = 1) -> Decoding:
    return Decoding(
        rounds=tuple((seconds,) * 8 for _ in range(5)),
        unmarked=seconds,
        bytes_per_step=bytes_per_step,
        layers=layers,
        batch=batch,
    )


def speed(utilisation: float) -> Speed:
    """Return wide decoding that moves 9 GB a token at a fraction of 3.02 TB/s."""
    size = 9_000_000_000
    return Speed(
        decoding=decoding(size / (3.02e12 * utilisation), size, 5),
        before=BEFORE,
        after=AFTER,
        floor=0.85,
        warn=0.9,
        resident=False,
        compiled=True,
    )


def only(probe: Probe) -> Finding:
    (finding,) = probe.findings
    return finding


class TestFigures:
    def test_two_geometries_give_bandwidth_and_gap(self) -> None:
        bandwidth, gap = 2.8e12, 12e-6
        sizes = {"wide": (9_000_000_000, 5), "narrow": (2_100_000_000, 16)}
        wide, narrow = (
            decoding(size / bandwidth + (layers + 1) * gap, size, layers) for size, layers in sizes.values()
        )
        solution = generate.solve(wide, narrow)
        assert solution is not None
        assert solution.bandwidth == pytest.approx(bandwidth)
        assert solution.gap_s == pytest.approx(gap)

    def test_one_geometry_twice_has_no_solution(self) -> None:
        wide = decoding(3e-3, 9_000_000_000, 5)
        assert generate.solve(wide, wide) is None

    def test_cost_of_a_thousand_tokens(self) -> None:
        assert generate.cost_per_thousand(3.60, 100.0) == pytest.approx(0.01)

    def test_a_batch_counts_all_its_tokens(self) -> None:
        assert decoding(0.004, 10, 5, batch=8).tokens_per_second == pytest.approx(2000)

    def test_one_slow_round_is_not_the_latency(self) -> None:
        steady = decoding(0.003, 10, 5)
        slow = replace(steady, rounds=(*steady.rounds[:4], (0.03,) * 8))
        assert slow.latency == pytest.approx(0.003)

    @pytest.mark.parametrize(
        ("name", "capability", "floor"),
        [
            ("NVIDIA H100 80GB HBM3", (9, 0), 0.85),
            ("NVIDIA L40S", (8, 9), 0.85),
            ("NVIDIA GeForce RTX 4090", (8, 9), 0.75),
            ("Tesla T4", (7, 5), 0.75),
        ],
    )
    def test_less_is_asked_of_small_and_of_old_gpus(self, name: str, capability: tuple[int, int], floor: float) -> None:
        assert generate.floor_for(name, capability, 0.85) == floor

    def test_a_lower_floor_stays_low(self) -> None:
        assert generate.floor_for("Tesla T4", (7, 5), 0.5) == 0.5

    def test_what_a_cache_holds_says_nothing_of_memory(self) -> None:
        assert generate.is_resident(900 << 20, 50 << 20)
        assert not generate.is_resident(9_000_000_000, 50 << 20)


class TestSpeed:
    def test_the_roof_is_the_largest_of_all_four(self) -> None:
        assert speed(0.9).roof == 3.02e12
        assert speed(0.93).utilisation == pytest.approx(0.93)

    @pytest.mark.parametrize(
        ("utilisation", "said"),
        [(0.93, []), (0.87, [Status.WARN]), (0.80, [Status.FAIL])],
    )
    def test_it_is_held_to_floor_and_warning(self, probe: Probe, utilisation: float, said: list[Status]) -> None:
        generation.judge_speed(probe, speed(utilisation))
        assert [finding.status for finding in probe.findings] == said

    @pytest.mark.parametrize("why", ["resident", "eager"])
    def test_it_is_not_held_to_it_where_that_says_nothing(self, probe: Probe, why: str) -> None:
        slow = speed(0.2)
        generation.judge_speed(
            probe, replace(slow, resident=True) if why == "resident" else replace(slow, compiled=False)
        )
        assert probe.findings == []

    def test_unsteady_rounds_are_noted(self, probe: Probe) -> None:
        good = speed(0.93)
        medians = (1.0, 1.0, 1.1, 1.2, 1.0)
        rounds = tuple((good.decoding.latency * it,) * 8 for it in medians)
        generation.judge_speed(
            probe, replace(good, decoding=replace(good.decoding, rounds=rounds, unmarked=good.decoding.latency * 1.06))
        )
        assert only(probe).mode == "F42"

    def test_events_that_cost_time_are_noted(self, probe: Probe) -> None:
        good = speed(0.93)
        generation.judge_speed(
            probe, replace(good, decoding=replace(good.decoding, unmarked=good.decoding.latency * 0.9))
        )
        assert "timing the tokens" in only(probe).what

    def test_memory_that_changes_its_speed(self, probe: Probe) -> None:
        assert generation.judge_steady(probe, BEFORE, AFTER)
        assert probe.findings == []
        assert not generation.judge_steady(probe, BEFORE, Bandwidth(copy=2.5e12, read=3.0e12))
        assert only(probe).blame is Blame.HOST


class TestProof:
    RUN = Run(tokens=(5, 3, 8), digest="aa")

    def test_equal_runs_are_equal(self, probe: Probe) -> None:
        generation.judge_same(probe, "again", self.RUN, Run((5, 3, 8), "aa"))
        assert probe.findings == []

    def test_where_tokens_part_is_said(self, probe: Probe) -> None:
        generation.judge_same(probe, "again", self.RUN, Run((5, 4, 8), "ab"))
        assert only(probe).why == "they differ from token 2 on"

    def test_a_bit_of_the_logits_is_enough(self, probe: Probe) -> None:
        generation.judge_same(probe, "again", self.RUN, Run((5, 3, 8), "ab"))
        assert only(probe).why == "they differ in the last logits alone"

    def test_a_changed_weight_must_show(self, probe: Probe) -> None:
        generation.judge_liveness(probe, self.RUN, changed=self.RUN, poisoned=self.RUN)
        assert "not computed from it" in only(probe).what

    def test_poison_must_not(self, probe: Probe) -> None:
        changed = Run((5, 3, 7), "bb")
        generation.judge_liveness(probe, self.RUN, changed=changed, poisoned=Run((0, 0, 0), "cc", finite=False))
        assert only(probe).why == "logits are no numbers"

    @pytest.mark.parametrize(
        ("device", "findings"), [(0.010, 0), (0.029, 0), (0.04, 1), (float("inf"), 1), (float("nan"), 1)]
    )
    def test_three_times_the_error_of_the_cpu(self, probe: Probe, device: float, findings: int) -> None:
        generation.judge_twin(probe, device, 0.010, 2048, half=True, what="decoding")
        assert len(probe.findings) == findings

    def test_layers_that_are_read_take_their_time(self, probe: Probe) -> None:
        head, layer, bandwidth, gap = 500_000_000, 1_710_000_000, 2.8e12, 10e-6
        two, four = (
            decoding((head + layers * layer) / bandwidth + layers * gap, head + layers * layer, layers)
            for layers in (2, 4)
        )
        generation.judge_linearity(probe, two, four, 3.0e12)
        assert probe.findings == []

    def test_layers_that_are_not_read_take_none(self, probe: Probe) -> None:
        two, four = decoding(1.4e-3, 3_900_000_000, 2), decoding(1.5e-3, 7_300_000_000, 4)
        generation.judge_linearity(probe, two, four, 3.0e12)
        assert only(probe).status is Status.FAIL

    def test_time_that_grows_faster_than_bytes_is_noted(self, probe: Probe) -> None:
        two, four = decoding(1.4e-3, 3_900_000_000, 2), decoding(3.5e-3, 7_300_000_000, 4)
        generation.judge_linearity(probe, two, four, 3.0e12)
        assert only(probe).status is Status.WARN


class TestLadder:
    def test_the_stand_in_has_no_graphs(self) -> None:
        rungs = generate.ladder("cpu", compiles=True)
        assert [rung.name for rung in rungs] == ["R0", "R2", "R4", "R5"]
        assert not any(rung.graph or rung.options for rung in rungs)

    def test_without_a_compiler_it_is_eager(self) -> None:
        assert generate.default_rung("cpu", compiles=False).name == "R0"
        assert generate.default_rung("cpu", compiles=True).name == "R5"

    def test_every_rung_is_told_apart(self) -> None:
        assert len({rung.name for rung in generate.RUNGS}) == len({rung.title for rung in generate.RUNGS}) == 7
