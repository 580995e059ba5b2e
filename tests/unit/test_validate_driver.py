"""The driver as it is seen through ctypes, and what is said of it."""

import ctypes
import tomllib
from pathlib import Path
from typing import Any

import pytest

from validate import bundle, driver
from validate.check import Probe, Request, SkippedError, StoppedError
from validate.checks import driver as checks
from validate.driver import Driver, Health
from validate.verdict import Blame, Finding, Status

ROOT = Path(__file__).parents[2]
NODES = ("nvidia-uvm", "nvidia0", "nvidiactl")
LIBCUDA = "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05"
WELL = Driver(
    nodes=NODES,
    module="580.95.05",
    library=LIBCUDA,
    injected=True,
    init=0,
    cuda="13.0",
    count=1,
    names=("NVIDIA H200",),
    capabilities=("9.0",),
    buses=("0000:18:00.0",),
    nvml="/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.95.05",
    nvml_init=0,
)


def changed(**fields: Any) -> Driver:
    return Driver(**{**WELL.as_json(), **fields})


class Library:
    """Functions by name: each gives its results into the pointers it is passed, in order, and returns its code."""

    def __init__(self, **answers: tuple[int, tuple[Any, ...]]) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            raise AttributeError(name)
        code, results = self._answers[name]

        def call(*arguments: Any) -> int:
            outputs = [it for it in arguments if hasattr(it, "_obj") or isinstance(it, ctypes.Array)]
            for output, result in zip(outputs, results, strict=True):
                target = output if isinstance(output, ctypes.Array) else output._obj
                if isinstance(result, dict):
                    for field, value in result.items():
                        setattr(target, field, value)
                else:
                    target.value = result
            return code

        return call


class Cuda(Library):
    """One whose attributes depend on what is asked for."""

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[which]
        return 0


CUDA = Cuda(
    cuInit=(0, ()),
    cuDriverGetVersion=(0, (13000,)),
    cuDeviceGetCount=(0, (1,)),
    cuDeviceGet=(0, (0,)),
    cuDeviceGetName=(0, (b"NVIDIA H200",)),
    cuDeviceGetPCIBusId=(0, (b"0000:18:00.0",)),
)
NVML = {
    "nvmlInit_v2": (0, ()),
    "nvmlShutdown": (0, ()),
    "nvmlDeviceGetHandleByPciBusId_v2": (0, (1,)),
    "nvmlDeviceGetCurrentClocksEventReasons": (0, (0x44,)),
    "nvmlDeviceGetRemappedRows": (0, (3, 2, 1, 0)),
    "nvmlDeviceGetMigMode": (0, (0, 0)),
    "nvmlDeviceGetPowerUsage": (0, (71500,)),
    "nvmlDeviceGetEnforcedPowerLimit": (0, (700000,)),
    "nvmlDeviceGetTemperature": (0, (33,)),
    "nvmlDeviceGetTemperatureThreshold": (0, (87,)),
    "nvmlDeviceGetTotalEccErrors": (0, (5,)),
    "nvmlDeviceGetRetiredPagesPendingStatus": (3, (0,)),
    "nvmlDeviceGetMemoryInfo": (0, ({"total": 141 << 30, "free": 140 << 30, "used": 1 << 30},)),
    "nvmlDeviceGetComputeRunningProcesses_v3": (7, (2,)),
}


def loaded(monkeypatch: pytest.MonkeyPatch, **libraries: Library) -> None:
    def load(name: str) -> Library:
        stem = name.partition(".")[0]
        if stem not in libraries:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return libraries[stem]

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_what_the_libraries_say_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, libcuda=CUDA, **{"libnvidia-ml": Library(**NVML)})
    seen = driver.look()
    assert (seen.init, seen.cuda, seen.count, seen.nvml_init) == (0, "13.0", 1, 0)
    assert (seen.names, seen.capabilities, seen.buses) == (("NVIDIA H200",), ("9.0",), ("0000:18:00.0",))
    assert not seen.absent


def test_a_driver_that_does_not_start_is_not_asked_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, libcuda=Cuda(cuInit=(803, ()), cuDriverGetVersion=(803, (0,))))
    seen = driver.look()
    assert (seen.init, seen.cuda, seen.count, seen.nvml) == (803, None, 0, None)
    assert not seen.absent


def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch)
    seen = driver.look()
    assert seen.library is None
    assert "cannot open" in seen.library_error


def test_health_is_read_and_what_nvml_cannot_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, **{"libnvidia-ml": Library(**NVML)})
    (found,) = driver.health(("0000:18:00.0",))
    assert found == Health(
        bus="0000:18:00.0",
        temperature=33,
        slowdown=87,
        power_w=71.5,
        limit_w=700.0,
        reasons=0x44,
        corrected=5,
        uncorrected=5,
        remap_pending=True,
        remap_failed=False,
        retired_pending=None,
        mig=False,
        processes=2,
        used_bytes=1 << 30,
        total_bytes=141 << 30,
    )


def test_health_with_the_older_names_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {**NVML, "nvmlDeviceGetCurrentClocksThrottleReasons": (0, (0x1,))}
    del answers["nvmlDeviceGetCurrentClocksEventReasons"], answers["nvmlDeviceGetComputeRunningProcesses_v3"]
    loaded(monkeypatch, **{"libnvidia-ml": Library(**answers)})
    (found,) = driver.health(("0000:18:00.0",))
    assert (found.reasons, found.processes) == (1, None)


def test_a_lost_gpu_and_an_nvml_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, **{"libnvidia-ml": Library(**{**NVML, "nvmlDeviceGetHandleByPciBusId_v2": (15, (0,))})})
    assert driver.health(("0000:18:00.0",)) == [
        Health(bus="0000:18:00.0", error="NVML answers 15 NVML_ERROR_GPU_IS_LOST")
    ]
    loaded(monkeypatch, **{"libnvidia-ml": Library(nvmlInit_v2=(18, ()))})
    with pytest.raises(OSError, match="NVML_ERROR_LIB_RM_VERSION_MISMATCH"):
        driver.health(())


def test_what_another_process_sees_is_what_this_one_sees() -> None:
    assert driver.seen(bundle.root()) == driver.look()


def test_a_driver_is_as_it_was_after_its_journey(monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"import json; print(json.dumps({WELL.as_json()!r}))"
    monkeypatch.setattr(driver, "CODE", told)
    assert driver.seen("/") == WELL


def test_absence_says_whether_the_machine_has_a_driver() -> None:
    assert "--gpus all" in Driver(module="580.95.05").why_absent
    assert "no driver" in Driver().why_absent
    assert not changed(library=None).absent


# ----------------------------------------------------------------------------------------------------
# Verdicts


def judged(seen: Driver, settings: dict[str, str] | None = None) -> list[Finding]:
    probe = Probe(Request(), lambda _: None)
    try:
        checks.judge_visible(seen, settings or {}, probe)
    except StoppedError as stopped:
        if isinstance(stopped, SkippedError):
            raise
    return probe.findings


def test_a_driver_that_works_is_not_complained_about() -> None:
    assert judged(WELL) == []
    # WSL has neither device files nor a kernel module of its own.
    assert judged(changed(nodes=("dxg",), module=None, library="/usr/lib/wsl/lib/libcuda.so.1.1")) == []


@pytest.mark.parametrize(
    ("fields", "settings", "mode", "blame"),
    [
        ({"error": "the driver did not answer within 60 s"}, {}, "F41", Blame.HOST),
        ({"library": None, "library_error": "libcuda.so.1: file too short"}, {}, "F22", Blame.IMAGE),
        ({"library": None, "library_error": "cannot open shared object file: No such file"}, {}, "F32", Blame.IMAGE),
        (
            {"library": None, "library_error": "cannot open shared object file: No such file"},
            {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility"},
            "F32",
            Blame.HOST,
        ),
        ({"init": 34}, {}, "F21", Blame.IMAGE),
        ({"init": 100, "library": "/usr/local/cuda/lib64/stubs/libcuda.so"}, {}, "F21", Blame.IMAGE),
        ({"init": 802}, {}, "F30", Blame.HOST),
        ({"init": 803}, {}, "F29", Blame.HOST),
        ({"init": 803, "injected": False}, {}, "F22", Blame.UNKNOWN),
        ({"init": 999, "module": "570.124.06"}, {}, "F29", Blame.HOST),
        ({"init": 804}, {}, "F28", Blame.IMAGE),
        ({"init": 999, "denied": ("nvidiactl: Operation not permitted",)}, {}, "F33", Blame.HOST),
        ({"init": 999, "nodes": ("nvidia0", "nvidiactl")}, {}, "F34", Blame.HOST),
        ({"init": 999}, {}, "F34", Blame.HOST),
        ({"init": 100, "nodes": ()}, {}, "F31", Blame.HOST),
        ({"init": 100}, {"CUDA_VISIBLE_DEVICES": ""}, "F31", Blame.HOST),
        ({"count": 0}, {}, "F31", Blame.HOST),
    ],
)
def test_each_way_to_be_broken_has_its_name(
    fields: dict[str, Any], settings: dict[str, str], mode: str, blame: Blame
) -> None:
    (finding,) = judged(changed(**fields), settings)
    assert (finding.status, finding.mode, finding.blame) == (Status.FAIL, mode, blame)
    assert finding.why
    assert finding.remedy


def test_what_works_by_luck_is_a_warning() -> None:
    for fields, mode in (
        ({"module": "580.65.06"}, "F29"),
        ({"module": "580.65.06", "injected": False}, "F22"),
        ({"nvml": None, "nvml_init": None}, "F32"),
        ({"nvml_init": 18}, "F22"),
        ({"nvml_init": 999}, "F33"),
    ):
        (finding,) = judged(changed(**fields))
        assert (finding.status, finding.mode) == (Status.WARN, mode)


def test_a_libcuda_in_an_image_on_a_machine_without_a_driver_proves_nothing() -> None:
    with pytest.raises(SkippedError, match="no driver"):
        judged(changed(nodes=(), module=None, init=100, injected=False))


def floored(cuda: str, seen: Driver, settings: dict[str, str] | None = None) -> list[Finding]:
    probe = Probe(Request(), lambda _: None)
    try:
        checks.judge_floor(cuda, seen, checks._floors(), settings or {}, probe)
    except StoppedError:
        assert probe.findings
    return probe.findings


def test_the_floor_is_of_the_major_and_of_the_whole_version() -> None:
    assert floored("13.0", WELL) == []
    assert floored("12.8", WELL) == []
    (warning,) = floored("13.2", WELL)
    assert (warning.status, warning.mode) == (Status.WARN, "F46")
    assert "595.45.04" in warning.remedy
    (failure,) = floored("13.0", changed(module="570.124.06", cuda="12.8"), {"NVIDIA_DISABLE_REQUIRE": "true"})
    assert (failure.status, failure.mode, failure.blame) == (Status.FAIL, "F26", Blame.HOST)
    assert "580.65.06" in failure.remedy
    assert "NVIDIA_DISABLE_REQUIRE=true" in failure.why
    # 525.60.9 is older than 525.60.13, although it does not look so as text; what it knows cannot be asked.
    (failure,) = floored("12.4", changed(module="525.60.9", cuda=None))
    assert failure.mode == "F26"
    # A CUDA that came after the table: the driver's own word counts.
    (failure,) = floored("14.0", WELL)
    assert failure.mode == "F26"


def test_compat_is_odd_only_where_the_driver_is_as_new() -> None:
    compat = {"library": "/usr/local/cuda/compat/libcuda.so.595.45.04", "injected": False, "cuda": "13.2"}
    assert floored("13.2", changed(**compat)) == []
    (warning,) = floored("13.2", changed(module="610.43.02", **compat))
    assert (warning.status, warning.mode) == (Status.WARN, "F28")


def test_floors_are_the_facts_that_builds_are_made_by() -> None:
    facts = tomllib.loads((ROOT / "builder/data/cuda.toml").read_text(encoding="utf-8"))
    floors = checks._floors()
    assert floors["toolkits"] == {it["version"]: it["driver"] for it in facts["toolkits"] if it.get("exists", True)}
    assert floors["majors"] == {str(it["major"]): it["driver"] for it in facts["majors"]}
    assert floors["source"] == facts["sources"]["release-notes"]["title"]
    assert floors["date"] == str(facts["sources"]["release-notes"]["date"])


def test_the_cuda_of_a_torch_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    version = package / "version.py"
    version.write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checks.torch_cuda() == "12.8"
    version.write_text("cuda = None\n")
    assert checks.torch_cuda() is None
