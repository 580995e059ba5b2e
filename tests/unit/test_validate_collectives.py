"""Several GPUs together: how what the ranks saw is judged."""

from typing import Any, ClassVar

import pytest

from validate.check import Probe, Request, SkippedError, StoppedError
from validate.checks import collectives
from validate.checks.collectives import Outcome
from validate.verdict import Blame, Finding, Skip, Status

HANG = """\
Timeout (0:01:00)!
Thread 0x00007f0e5b3b3740 (most recent call first):
  File "/usr/lib/python3/torch/distributed/distributed_c10d.py", line 2501 in all_reduce
  File "/usr/lib/python3/torch/distributed/c10d_logger.py", line 83 in wrapper
"""
CHANNELS = """\
host:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
host:1:1 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM
host:2:2 [1] NCCL INFO Channel 00 : 1[1] -> 0[0] via SHM/direct/direct
host:2:2 [1] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [send] via NET/Socket/0
"""


@pytest.fixture
def probe() -> Probe:
    return Probe(Request(), lambda _: None)


def outcome(*ranks: dict[str, Any], returncode: int | None = 0, printed: str = "", **fields: Any) -> Outcome:
    devices = ({"device": "GPU-1"}, {"device": "GPU-2"})
    return Outcome(
        **{"world": 2, "returncode": returncode, "printed": printed, "devices": devices, "ranks": ranks, **fields}
    )


def only(probe: Probe) -> Finding:
    (finding,) = probe.findings
    return finding


def test_how_nccl_sends_is_read_from_its_log() -> None:
    assert collectives.transports(CHANNELS) == ("NET/Socket/0", "P2P/CUMEM", "SHM/direct/direct")


def test_bus_bandwidth_counts_as_nccl_tests_do() -> None:
    assert collectives.bus_bandwidth(1 << 30, 0.004, 8) == pytest.approx((1 << 30) / 0.004 * 1.75)


class TestStarted:
    def test_all_came_to_their_end(self, probe: Probe) -> None:
        collectives.judge_started(probe, outcome({"rank": 0}, {"rank": 1}))
        assert probe.findings == []

    def test_two_ranks_on_one_gpu(self, probe: Probe) -> None:
        with pytest.raises(StoppedError):
            collectives.judge_started(probe, outcome(returncode=1, devices=({"device": "GPU-1"}, {"device": "GPU-1"})))
        assert only(probe).mode == "F60"

    def test_a_hang_says_where(self, probe: Probe) -> None:
        with pytest.raises(StoppedError):
            collectives.judge_started(probe, outcome(returncode=1, printed=HANG))
        assert "line 2501 in all_reduce" in only(probe).why

    def test_what_could_not_be_ended_hung(self) -> None:
        assert outcome(returncode=None).hung
        assert not outcome(returncode=1, printed="RuntimeError: no").hung

    def test_an_error_is_left_to_the_catalogue(self, probe: Probe) -> None:
        printed = "noise\ntorch.distributed.DistBackendError: NCCL error: unhandled system error\nmore noise\n"
        with pytest.raises(RuntimeError, match=r"exit code 1: torch\.distributed\.DistBackendError: NCCL error"):
            collectives.judge_started(probe, outcome(returncode=1, printed=printed))

    def test_a_rank_without_an_end_is_no_success(self, probe: Probe) -> None:
        with pytest.raises(RuntimeError):
            collectives.judge_started(probe, outcome({"rank": 0}))


class TestHang:
    def test_copies_between_gpus_are_to_blame(self, probe: Probe) -> None:
        with pytest.raises(StoppedError):
            collectives.judge_hang(probe, outcome(returncode=1, printed=HANG), outcome({"rank": 0}, {"rank": 1}))
        assert (only(probe).mode, only(probe).blame) == ("F58", Blame.HOST)

    def test_they_are_not_if_it_hangs_without_them(self, probe: Probe) -> None:
        hanging = outcome(returncode=1, printed=HANG)
        collectives.judge_hang(probe, hanging, hanging)
        assert probe.findings == []


class TestCollectives:
    GOOD: ClassVar[dict[str, Any]] = {"wrong": {"all_reduce float32[1]": 0}, "missing": []}

    def test_every_element_is_right(self, probe: Probe) -> None:
        collectives.judge_collectives(probe, outcome(self.GOOD, self.GOOD))
        assert probe.findings == []

    def test_one_element_on_one_rank_is_enough(self, probe: Probe) -> None:
        bad = {"wrong": {"all_reduce float32[1]": 1}, "missing": []}
        collectives.judge_collectives(probe, outcome(self.GOOD, bad))
        assert only(probe).why == "all_reduce float32[1]: 1 elements"

    def test_sockets_within_one_machine_are_noted(self, probe: Probe) -> None:
        collectives.judge_collectives(probe, outcome(self.GOOD, self.GOOD, transports=("NET/Socket/0",)))
        assert (only(probe).status, only(probe).mode) == (Status.WARN, "F59")

    def test_what_was_not_tried_is_said(self, probe: Probe) -> None:
        collectives.judge_collectives(probe, outcome({**self.GOOD, "missing": ["reduce_scatter"]}))
        assert only(probe).status is Status.WARN


class TestTraining:
    SHARDED: ClassVar[dict[str, Any]] = {"distance": 1e-7, "reference": 5e-7, "step": 0.0, "lost": 0, "sharded": True}

    def test_ddp(self, probe: Probe) -> None:
        collectives.judge_ddp(probe, outcome({"distance": 5e-7, "different": 0}, {"distance": 5e-7, "different": 0}))
        assert probe.findings == []

    @pytest.mark.parametrize("distance", [1e-3, float("nan")])
    def test_ddp_off_the_mean(self, probe: Probe, distance: float) -> None:
        collectives.judge_ddp(
            probe, outcome({"distance": 5e-7, "different": 0}, {"distance": distance, "different": 0})
        )
        assert "not the mean" in only(probe).what

    def test_ddp_that_differs(self, probe: Probe) -> None:
        collectives.judge_ddp(probe, outcome({"distance": 5e-7, "different": 0}, {"distance": 5e-7, "different": 3}))
        assert only(probe).why == "3 elements differ between ranks"

    def test_fsdp(self, probe: Probe) -> None:
        collectives.judge_fsdp(probe, outcome(self.SHARDED, self.SHARDED))
        assert probe.findings == []

    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            ({"distance": 1e-2}, "something else than DDP's"),
            ({"reference": 1e-2}, "something else than float64"),
            ({"step": float("nan")}, "something else than DDP's step"),
            ({"lost": 1}, "does not bring back"),
            ({"sharded": False}, "leaves every rank with all parameters"),
        ],
    )
    def test_fsdp_that_is_wrong(self, probe: Probe, fault: dict[str, Any], says: str) -> None:
        collectives.judge_fsdp(probe, outcome(self.SHARDED, {**self.SHARDED, **fault}))
        assert says in only(probe).what

    def test_fsdp_that_is_not_there(self, probe: Probe) -> None:
        with pytest.raises(SkippedError) as skipped:
            collectives.judge_fsdp(probe, outcome({"unsupported": "torch 2.4 has none"}))
        assert skipped.value.reason is Skip.UNSUPPORTED_BY_VERSION


@pytest.mark.parametrize(("link", "said"), [(3e11, []), (6e11, [Status.WARN])])
def test_summing_is_held_to_copying(probe: Probe, link: float, said: list[Status]) -> None:
    document = {"bytes": 1 << 30, "all_reduce_s": [0.0030, 0.0031, 0.0032]}
    collectives.judge_bandwidth(probe, outcome(document, document), link)
    assert [finding.status for finding in probe.findings] == said
