"""What is said of the GPU, given what was seen of it."""

from typing import Any

import pytest

from validate.check import Probe, Request, StoppedError
from validate.checks import device
from validate.driver import Driver, Health
from validate.verdict import Blame, Finding, Status

TORCH_2_14 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


def findings(judge: Any, *arguments: Any, **named: Any) -> list[Finding]:
    probe = Probe(Request(), lambda _: None)
    try:
        judge(*[probe if it is Probe else it for it in arguments], **named)
    except StoppedError:
        assert probe.findings
    return probe.findings


@pytest.mark.parametrize(
    ("archs", "capability", "machine_code", "ptx"),
    [
        (TORCH_2_14, (9, 0), True, False),
        (TORCH_2_14, (8, 9), True, False),
        (TORCH_2_14, (12, 1), True, False),
        (TORCH_2_14, (11, 0), False, False),
        (TORCH_2_14, (7, 0), False, False),
        (["sm_80", "sm_86"], (8, 7), False, False),
        (["sm_87"], (8, 7), True, False),
        (["sm_80", "sm_90a"], (9, 0), True, False),
        (["sm_100a"], (10, 3), False, False),
        (["sm_100f"], (10, 3), True, False),
        (["sm_80", "compute_90"], (12, 0), False, True),
        (["sm_80", "compute_90a"], (12, 0), False, False),
        (["compute_120"], (9, 0), False, False),
        ([], (9, 0), False, False),
        (["gfx942"], (9, 0), False, False),
    ],
)
def test_which_code_a_device_runs(
    archs: list[str], capability: tuple[int, int], *, machine_code: bool, ptx: bool
) -> None:
    assert device.covers(archs, capability) == (machine_code, ptx)


def test_coverage_names_the_way_to_a_torch_that_has_it() -> None:
    assert findings(device.judge_coverage, TORCH_2_14, (9, 0), "13.0", Probe) == []
    (failure,) = findings(device.judge_coverage, TORCH_2_14, (7, 0), "13.0", Probe)
    assert (failure.status, failure.mode, failure.blame) == (Status.FAIL, "F43", Blame.IMAGE)
    assert "older CUDA" in failure.remedy
    (failure,) = findings(device.judge_coverage, ["sm_80", "sm_90"], (12, 0), "12.4", Probe)
    assert "newer CUDA" in failure.remedy
    (warning,) = findings(device.judge_coverage, ["sm_80", "compute_90"], (12, 0), "12.4", Probe)
    assert (warning.status, warning.mode) == (Status.WARN, "F45")


def test_kernels_that_run_everywhere_are_not_complained_about() -> None:
    good = {"elementwise": "", "linalg": "", "linalg through MAGMA": ""}
    assert findings(device.judge_kernels, good, good, Probe) == []


def test_no_kernel_at_all_and_a_hole_in_one_library_are_told_apart() -> None:
    (first, second) = findings(device.judge_kernels, {"elementwise": NO_KERNEL, "linalg": NO_KERNEL}, {}, Probe)
    assert (first.mode, second.mode) == ("F43", "F43")
    (hole,) = findings(device.judge_kernels, {"elementwise": "", "linalg": NO_KERNEL}, {"elementwise": ""}, Probe)
    assert (hole.status, hole.mode) == (Status.FAIL, "F44")
    (optional,) = findings(device.judge_kernels, {"elementwise": "", "linalg through MAGMA": NO_KERNEL}, {}, Probe)
    assert optional.status is Status.WARN


def test_ptx_that_the_driver_compiles_or_cannot() -> None:
    (jit,) = findings(device.judge_kernels, {"elementwise": ""}, {"elementwise": NO_KERNEL}, Probe)
    assert (jit.status, jit.mode) == (Status.WARN, "F45")
    text = "CUDA error: the provided PTX was compiled with an unsupported toolchain."
    (old,) = findings(device.judge_kernels, {"elementwise": text}, {}, Probe)
    assert (old.status, old.mode, old.blame) == (Status.FAIL, "F46", Blame.HOST)


def test_a_wrong_result_is_a_failure() -> None:
    (wrong,) = findings(device.judge_kernels, {"elementwise": "the result is wrong"}, {}, Probe)
    assert (wrong.status, wrong.why) == (Status.FAIL, "the result is wrong")


@pytest.mark.parametrize(
    ("can", "count", "driver_count", "wanted", "mode"),
    [
        (True, 1, 1, "auto", None),
        (True, 8, 8, "all", None),
        (True, 2, 2, "2", None),
        (True, 4, 4, "2", None),
        (False, 0, 1, "auto", ""),
        (True, 1, 2, "auto", "F40"),
        (True, 1, 1, "2", "F31"),
    ],
)
def test_devices_are_counted(*, can: bool, count: int, driver_count: int, wanted: str, mode: str | None) -> None:
    seen = Driver(init=0, count=driver_count, names=("A",) * driver_count)
    found = findings(device.judge_available, Probe, seen, can=can, count=count, wanted=wanted, said="some warning")
    assert [finding.mode for finding in found] == ([] if mode is None else [mode])


WELL = Health(
    bus="0000:18:00.0",
    temperature=35,
    slowdown=87,
    reasons=0x1 | 0x4,
    corrected=12,
    uncorrected=0,
    remap_pending=False,
    remap_failed=False,
    mig=False,
    processes=0,
    used_bytes=1 << 30,
    total_bytes=80 << 30,
)


def health(**fields: Any) -> list[Finding]:
    return findings(device.judge_health, 0, Health(**{**WELL.as_json(), **fields}), Probe)


def test_a_gpu_that_is_well_or_tells_nothing_is_not_complained_about() -> None:
    assert health() == []
    assert findings(device.judge_health, 0, Health(bus=""), Probe) == []


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"error": "NVML answers 15"}, Status.FAIL, "does not reach"),
        ({"remap_failed": True}, Status.FAIL, "could not be replaced"),
        ({"remap_pending": True}, Status.WARN, "waits to be replaced"),
        ({"retired_pending": True}, Status.WARN, "waits to be replaced"),
        ({"uncorrected": 1}, Status.WARN, "not corrected"),
        ({"reasons": 0x80}, Status.WARN, "held down"),
        ({"temperature": 87}, Status.WARN, "too hot"),
        ({"processes": 1}, Status.WARN, "others compute"),
        ({"used_bytes": 20 << 30}, Status.WARN, "others hold"),
    ],
)
def test_each_illness_blames_the_host(fields: dict[str, Any], status: Status, says: str) -> None:
    (finding,) = health(**fields)
    assert (finding.status, finding.mode, finding.blame) == (status, "F41", Blame.HOST)
    assert says in finding.what


def test_memory_must_hold_what_is_written_and_come_back() -> None:
    free = 80 << 30
    assert findings(device.judge_memory, free, free * 9 // 10, 0, free, Probe) == []
    (wrong,) = findings(device.judge_memory, free, free * 9 // 10, 1, free, Probe)
    assert (wrong.status, wrong.blame) == (Status.FAIL, Blame.HOST)
    (little,) = findings(device.judge_memory, free, free // 2, 0, free, Probe)
    assert little.status is Status.WARN
    (kept,) = findings(device.judge_memory, free, free * 9 // 10, 0, free // 2, Probe)
    assert kept.status is Status.WARN
