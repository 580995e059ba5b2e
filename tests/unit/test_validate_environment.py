"""Imports, places for files, limits: judged as they are where all is well, and as they are where it is not."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from validate.check import Probe, Request
from validate.checks import environment, limits, places
from validate.checks.environment import Import
from validate.checks.limits import Limits
from validate.checks.places import Cache
from validate.verdict import Blame, Status

SYMBOL = "ImportError: /s/libtorch_cuda.so: undefined symbol: ncclCommResume"
DRIVER = "OSError: libcuda.so.1: cannot open shared object file: No such file or directory"


def a_probe(scratch: str = "/tmp") -> Probe:
    return Probe(Request(scratch=scratch), lambda document: None)


def modes(probe: Probe) -> Sequence[str]:
    return [finding.mode for finding in probe.findings]


# ----------------------------------------------------------------------------------------------------
# Imports

GOOD = [Import("torch", 3.0), Import("numpy", 0.1)]


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        (GOOD, GOOD, []),
        ([Import("torch", error=SYMBOL)], [], ["F01"]),
        (GOOD, [Import("numpy", 0.1), Import("torch", error=SYMBOL)], ["F02"]),
        ([*GOOD, Import("torchvision", error=SYMBOL)], GOOD, ["F13"]),
        ([*GOOD, Import("torchvision", error="AttributeError: no attribute 'nms'")], GOOD, ["F13"]),
        ([*GOOD, Import("triton", error=SYMBOL)], [Import("triton", error=SYMBOL), *GOOD], ["F01"]),
        ([Import("torch", error=SYMBOL), Import("numpy", error=SYMBOL)], [], ["F01"]),
        ([*GOOD, Import("triton", error="ValueError: odd")], GOOD, [""]),
    ],
)
def test_imports(first: Sequence[Import], last: Sequence[Import], found: Sequence[str]) -> None:
    probe = a_probe()
    environment.judge_imports(probe, first, last, gpu=False)
    assert modes(probe) == found


def test_a_library_that_needs_the_driver_is_no_fault_without_a_gpu() -> None:
    probe = a_probe()
    environment.judge_imports(probe, [*GOOD, Import("triton", error=DRIVER)], GOOD, gpu=False)
    environment.judge_imports(probe, GOOD, [Import("triton", error=DRIVER), *GOOD], gpu=False)
    assert not probe.findings
    environment.judge_imports(probe, [*GOOD, Import("triton", error=DRIVER)], GOOD, gpu=True)
    assert len(probe.findings) == 1


def test_modules_are_imported_in_a_fresh_process(tmp_path: Path) -> None:
    first, second, third = environment._imported(a_probe(str(tmp_path)), "test", ["json", "no_such_module", "csv"])
    assert (first.name, first.error) == ("json", "")
    assert first.seconds >= 0
    assert (second.name, second.missing) == ("no_such_module", "no_such_module")
    assert "ModuleNotFoundError" in second.error
    assert (third.name, third.error) == ("csv", "")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "the process died of SIGSEGV"),
        ("import os, sys\nsys.stderr.write('goodbye'); sys.stderr.flush()\nos._exit(3)", "the process ended: goodbye"),
    ],
)
def test_who_ends_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str) -> None:
    (tmp_path / "deadly.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = environment._imported(a_probe(str(tmp_path)), "test", ["json", "deadly", "csv"])
    assert [one.name for one in found] == ["json", "deadly"]
    assert found[1].error == error


def test_other_interpreters_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("with", 0), ("without", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python3").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/without:{tmp_path}/with")
    pythons = list(environment._pythons())
    assert pythons[:2] == [f"{tmp_path}/without/python3", f"{tmp_path}/with/python3"]
    assert [environment._has_torch(python) for python in pythons[:2]] == [False, True]
    assert not environment._has_torch(str(tmp_path))


# ----------------------------------------------------------------------------------------------------
# Places


def test_caches_by_the_rules_of_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one.variable: one.path for one in places.caches({"TRITON_CACHE_DIR": "/t"}, "/home/me", "me")}
    assert found == {
        "TMPDIR": "/tmp",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor_me",
        "TRITON_CACHE_DIR": "/t",
        "TORCH_HOME": "/home/me/.cache/torch",
        "HF_HOME": "/home/me/.cache/huggingface",
    }
    asked = {"TMPDIR": "/a", "XDG_CACHE_HOME": "/b", "HF_HOME": "/c", "TRITON_HOME": "/d", "TRITON_CACHE_DIR": ""}
    found = {one.variable: one.path for one in places.caches(asked, "/home/me", "me")}
    assert found == {
        "TMPDIR": "/a",
        "TORCHINDUCTOR_CACHE_DIR": "/a/torchinductor_me",
        "TRITON_CACHE_DIR": "/d/.triton/cache",
        "TORCH_HOME": "/b/torch",
        "HF_HOME": "/c",
    }


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert places.home_of({"HOME": "/h"}, None) == "/h"
    assert places.home_of({}, {"config": {"env": {"HOME": "/home/torch"}}}) == "/home/torch"
    assert places.home_of({}, None) == "/"


@pytest.mark.parametrize(
    ("mode", "uid", "gids", "free"),
    [
        (0o700, 500, set(), True),
        (0o577, 500, set(), False),
        (0o770, 12345, {0, 7}, True),
        (0o757, 12345, {7}, False),
        (0o777, 12345, set(), True),
        (0o776, 12345, set(), False),
        (0o000, 0, set(), True),
    ],
)
def test_permission_bits(
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    uid: int,
    gids: set[int],
    free: bool,  # noqa: FBT001
) -> None:
    entries = {"/": (0, 0, 0o755), "/cache": (500, 7, mode)}
    assert file_system(monkeypatch, entries, "/cache/not/yet/there", uid, gids) == (None if free else "/cache")


def test_what_lies_above_must_be_passable(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"/": (0, 0, 0o755), "/root": (0, 0, 0o700), "/root/open": (0, 0, 0o777)}
    assert file_system(monkeypatch, entries, "/root/open/x", 12345, {0}) == "/root"


def file_system(
    monkeypatch: pytest.MonkeyPatch,
    entries: Mapping[str, tuple[int, int, int]],
    path: str,
    uid: int,
    gids: set[int],
) -> str | None:
    """Ask for what is in the way in a file system of these directories: user, group, mode."""

    def status(place: str) -> os.stat_result:
        user, group, mode = entries[place]
        return os.stat_result((0o40000 | mode, 0, 0, 1, user, group, 0, 0, 0, 0))

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(os, "stat", status)
        patch.setattr(os.path, "lexists", lambda place: place in entries)
        patch.setattr(os.path, "isdir", lambda place: place in entries)
        patch.setattr(os.path, "realpath", lambda place: place)
        return places.blocker(path, uid, gids)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert places.blocker(str(tmp_path / "file" / "below"), os.getuid() + 1, set()) is not None


class Flags:
    def __init__(self, flags: int) -> None:
        self.f_flag = flags


def test_mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = [Cache("TMPDIR", str(tmp_path), "F54", runs_code=True), Cache("HF_HOME", str(tmp_path), "F61")]
    probe = a_probe()
    places.judge_mounts(probe, where, compiles=True)
    assert not probe.findings
    monkeypatch.setattr(os, "statvfs", lambda path: Flags(os.ST_NOEXEC))
    places.judge_mounts(probe, where, compiles=True)
    assert [(it.status, it.mode, it.blame) for it in probe.findings] == [(Status.FAIL, "F54", Blame.HOST)]


def test_a_read_only_root_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: Flags(os.ST_RDONLY))
    probe = a_probe()
    places.judge_mounts(probe, [Cache("HF_HOME", "/", "F61")], compiles=True)
    assert not probe.findings


# ----------------------------------------------------------------------------------------------------
# Limits

FINE = Limits(shm=8 << 30, memory=None, cores=16, files=1 << 20, locked=None)


def test_a_machine_without_limits() -> None:
    probe = a_probe()
    limits.judge_limits(probe, FINE, workers=8, compiles=True)
    assert not probe.findings


@pytest.mark.parametrize(
    ("found", "workers", "told"),
    [
        (Limits(shm=64 << 20), 0, []),
        (Limits(shm=64 << 20), 1, []),
        (Limits(shm=(64 << 20) - 4096), 0, [(Status.WARN, "F35")]),
        (Limits(shm=64 << 20), 2, [(Status.FAIL, "F35")]),
        (Limits(shm=None), 0, [(Status.WARN, "F35")]),
        (Limits(shm=None), 4, [(Status.FAIL, "F35")]),
        (Limits(shm=1 << 30, cores=16, quota=2.0), 0, [(Status.WARN, "F36")]),
        (Limits(shm=1 << 30, cores=16, quota=2.0, threads_set=True), 0, []),
        (Limits(shm=1 << 30, cores=2, quota=1.5), 0, []),
        (Limits(shm=1 << 30, cores=16, memory=4 << 30), 0, [(Status.WARN, "F36")]),
        (Limits(shm=1 << 30, cores=16, memory=4 << 30, compilers_set=True), 0, []),
        (Limits(shm=1 << 30, cores=64, memory=48 << 30), 0, []),
        (Limits(shm=1 << 30, processes=256), 0, [(Status.WARN, "F36")]),
        (Limits(shm=1 << 30, processes=2048), 0, []),
        (Limits(shm=1 << 30, files=256), 0, [(Status.WARN, "F38")]),
        (Limits(shm=1 << 30, locked=65536), 0, []),
        (Limits(shm=1 << 30, locked=65536, infiniband=True), 0, [(Status.WARN, "F38")]),
        (Limits(shm=1 << 30, numa_error=1, gpus=1), 0, []),
        (Limits(shm=1 << 30, numa_error=1, gpus=2), 0, [(Status.WARN, "F37")]),
        (Limits(shm=1 << 30, numa_error=38, gpus=2), 0, []),
        (Limits(shm=1 << 30, unreadable=("/proc/cpuinfo",)), 0, [(Status.WARN, "")]),
    ],
)
def test_limits(found: Limits, workers: int, told: Sequence[tuple[Status, str]]) -> None:
    probe = a_probe()
    limits.judge_limits(probe, found, workers=workers, compiles=True)
    assert [(finding.status, finding.mode) for finding in probe.findings] == told
    assert all(finding.blame is Blame.HOST for finding in probe.findings)


def test_a_remedy_that_fits() -> None:
    probe = a_probe()
    limits.judge_limits(probe, Limits(shm=1 << 30, cores=16, memory=4 << 30, quota=2.5), workers=0, compiles=True)
    assert [finding.remedy.partition(",")[0] for finding in probe.findings] == [
        "OMP_NUM_THREADS=3",
        "TORCHINDUCTOR_COMPILE_THREADS=2",
    ]


def group(root: Path, membership: str, **files: str) -> dict[str, float | None]:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("cfs.max", "cfs_max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "membership").write_text(membership)
    return limits.control_group(str(root), str(root / "membership"))[0]


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    found = group(tmp_path, "0::/\n", memory_max="4294967296\n", cpu_max="150000 100000\n", pids_max="max\n")
    assert found == {"memory": 4294967296, "cpu": 1.5, "pids": None}


def test_a_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    found = group(
        tmp_path,
        "0::/pod/app\n",
        pod__app__memory_max="max\n",
        pod__memory_max="1000\n",
        memory_max="2000\n",
        pod__app__cpu_max="max 100000\n",
        pod__app__pids_max="100\n",
    )
    assert found == {"memory": 1000, "cpu": None, "pids": 100}


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    for path, content in {
        "memory/c/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.limit_in_bytes": "5000",
        "cpu/c/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
        "pids/c/pids.max": "77",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    found = group(tmp_path, "3:cpu,cpuacct:/c\n2:memory:/c\n1:pids:/c\n")
    assert found == {"memory": 5000, "cpu": 0.5, "pids": 77}


def test_no_control_group_at_all(tmp_path: Path) -> None:
    assert limits.control_group(str(tmp_path), str(tmp_path / "absent"))[0] == dict.fromkeys(("memory", "cpu", "pids"))


def test_this_machine() -> None:
    found = limits.observe_limits({"OMP_NUM_THREADS": "2"})
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.threads_set
    assert not found.compilers_set
    assert found.unreadable == ()
    assert found.quota is None or math.isfinite(found.quota)
