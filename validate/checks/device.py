"""The GPU itself: torch reaches it, torch has code for it, it is well, its memory holds what is written: T2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from validate import bundle, driver, explain
from validate.check import Probe, check
from validate.driver import Driver, Health
from validate.verdict import Blame, Skip


@check(
    "dev.available",
    title="torch reaches every GPU",
    tier=2,
    needs=("drv.visible",),
    modes=("F19", "F31", "F40"),
)
def available(probe: Probe) -> None:
    """Ask torch what it sees, compare with the driver, and send a few bytes to each device and back."""
    import torch

    wanted = str(probe.options["gpus"])
    if torch.version.cuda is None:
        _cpu_build(torch, wanted, probe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        can, count = bool(torch.cuda.is_available()), int(torch.cuda.device_count())
    seen = driver.look()
    said = "; ".join(str(warning.message).strip() for warning in caught)
    probe.saw(available=can, count=count, driver_count=seen.count, warnings=said)
    judge_available(probe, seen, can=can, count=count, wanted=wanted, said=said)
    devices = []
    sent = torch.arange(1 << 16, dtype=torch.int64)
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "l2_bytes": getattr(properties, "L2_cache_size", None),
            }
        )
        # A copy needs no kernel: whether there is one for this device is another check.
        if not torch.equal(sent.to(f"cuda:{number}").cpu(), sent):
            probe.fail(
                f"GPU {number} does not give back what was sent to it",
                mode="F41",
                remedy="see dev.health",
                blame=Blame.HOST,
            )
    probe.saw(devices=devices)
    probe.detail("; ".join(f"{it['name']}, {it['memory_bytes'] / 2**30:.0f} GiB" for it in devices))


def _cpu_build(torch: Any, wanted: str, probe: Probe) -> None:  # noqa: ANN401
    declared = (probe.request.declared or {}).get("cuda")
    if declared not in (None, "cpu") or wanted not in ("auto", "none"):
        probe.stop(
            "this torch was built without CUDA",
            why=f"torch {torch.__version__}; "
            + (f"declared is CUDA {declared}" if declared not in (None, "cpu") else f"GPUs asked for: {wanted}"),
            remedy="install torch from the index of a CUDA build; see which requirement replaced it by a CPU build",
            mode="F19",
        )
    probe.skip(Skip.CPU_BUILD, f"torch {torch.__version__} was built without CUDA")


def judge_available(probe: Probe, seen: Driver, *, can: bool, count: int, wanted: str, said: str) -> None:
    """Judge what torch sees against the driver and what was asked for; `said` are torch's warnings."""
    if not can or count == 0:
        code = "" if seen.init is None else f"cuInit returns {seen.init} {driver.ERRORS.get(seen.init, '')}".strip()
        known = next(explain.matches(said), None)
        probe.stop(
            "torch does not reach the GPU although the driver is there",
            why="; ".join(part for part in (code, f"the driver counts {seen.count}", said) if part),
            remedy=known.remedy
            if known
            else "see drv.floor; drop CUDA_VISIBLE_DEVICES and LD_LIBRARY_PATH and try again",
            mode=known.mode if known else "",
            blame=Blame(known.blame) if known else Blame.UNKNOWN,
        )
    if count < seen.count:
        probe.fail(
            f"torch sees {count} of the {seen.count} GPUs that the driver counts",
            why=said or f"devices of the driver: {', '.join(seen.names)}",
            remedy="with MIG a process can use one instance only: give each process its own by CUDA_VISIBLE_DEVICES",
            mode="F40",
            blame=Blame.HOST,
        )
    if wanted.isdigit() and count < int(wanted):
        probe.fail(
            f"{wanted} GPUs were asked for, {count} {'is' if count == 1 else 'are'} there",
            why=f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}",
            remedy=f"start the container with --gpus {wanted} or all; with MIG a process can use one instance only",
            mode="F31",
            blame=Blame.HOST,
        )


# ----------------------------------------------------------------------------------------------------
# Code for this GPU

KERNELS = """import json, sys
sys.path.insert(0, sys.argv[1])
from validate.checks.device import kernels
print(json.dumps(kernels(sys.argv[2])))
"""
"""What the second process is started with: `python -c KERNELS ROOT DEVICE`."""

_APART = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}
"""Devices that run no code of an earlier minor of their major (the table of torch/cuda/__init__.py; from CUDA 13.2 on
7.2 and 8.7 do). Only explains: what counts is whether kernels run."""

_NO_KERNEL = re.compile(r"no kernel image|not compatible with the current PyTorch|invalid device function")


def covers(archs: Sequence[str], capability: Tuple[int, int]) -> Tuple[bool, bool]:
    """Return whether there is machine code ("sm_90a"), and PTX ("compute_80"), that the device runs."""
    machine_code = ptx = False
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not found:
            continue
        code, exact = (int(found[2]), int(found[3])), found[4] == "a"
        if found[1] == "compute":
            ptx = ptx or (code == capability if exact else code <= capability)
        elif exact or capability in _APART:
            machine_code = machine_code or code == capability
        else:
            machine_code = machine_code or (code[0] == capability[0] and code[1] <= capability[1])
    return machine_code, ptx


def kernels(device: str) -> Dict[str, str]:
    """Run an operation of each of torch's own CUDA libraries; return its error by name, "" if it is right."""
    import torch

    def elementwise() -> bool:
        numbers = torch.arange(1001, dtype=torch.float32, device=device)
        return float((numbers * 2 + 1).sum()) == 1002001.0

    def linalg() -> bool:
        # A batch, which takes other kernels than one matrix does. L of A = L·Lᵀ must give A again.
        root = torch.tril(torch.ones(5, 33, 33, dtype=torch.float64, device=device))
        return bool(torch.allclose(torch.linalg.cholesky(root @ root.mT), root, atol=1e-10))

    def magma() -> bool:
        before = torch.backends.cuda.preferred_linalg_library()
        torch.backends.cuda.preferred_linalg_library("magma")
        try:
            return linalg()
        finally:
            torch.backends.cuda.preferred_linalg_library(before)

    looks = {"elementwise": elementwise, "linalg": linalg}
    if device.startswith("cuda") and getattr(torch.cuda, "has_magma", False):
        looks["linalg through MAGMA"] = magma
    found = {}
    for name, look in looks.items():
        try:
            found[name] = "" if look() else "the result is wrong"
        except RuntimeError as error:  # noqa: PERF203 (two or three rounds)
            found[name] = str(error).strip().splitlines()[0]
    return found


@check(
    "dev.arch",
    title="torch has machine code for this GPU",
    tier=2,
    needs=("dev.available",),
    modes=("F43", "F44", "F45", "F46"),
)
def arch(probe: Probe) -> None:
    """Run kernels as they are, and again where the driver may not compile PTX: what fails only then is compiled."""
    import torch

    if probe.device.startswith("cuda"):
        archs, capability = list(torch.cuda.get_arch_list()), torch.cuda.get_device_capability(probe.device)
        probe.saw(architectures=archs, capability="{}.{}".format(*capability))
        probe.detail(f"compute capability {capability[0]}.{capability[1]} of {', '.join(archs)}")
        judge_coverage(archs, capability, str(torch.version.cuda), probe)
    started = time.perf_counter()
    as_is = kernels(probe.device)
    probe.metric("first_kernels", time.perf_counter() - started, "s", better="lower")
    without = _without_jit(probe.device)
    probe.saw(kernels=as_is, without_jit=without)
    judge_kernels(as_is, without, probe)


def _without_jit(device: str) -> Dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, bundle.root(), device],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "CUDA_DISABLE_PTX_JIT": "1"},
    )
    try:
        found: Dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"elementwise": f"its process ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    return found


def judge_coverage(archs: Sequence[str], capability: Tuple[int, int], cuda: str, probe: Probe) -> None:
    """Judge what torch was compiled for against the device."""
    machine_code, ptx = covers(archs, capability)
    if machine_code or not archs:
        return
    device = "{}.{}".format(*capability)
    why = f"compute capability {device}; torch (CUDA {cuda}) was compiled for {', '.join(archs)}"
    newest = max((int(it) for it in re.findall(r"(?:sm|compute)_(\d+)", " ".join(archs))), default=0)
    newer = capability[0] * 10 + capability[1] > newest
    remedy = (
        f"use a torch of a newer CUDA than {cuda}, compiled for {device}"
        if newer
        else f"use a torch whose build still has {device}: one of an older CUDA, or an older torch"
    )
    if ptx:
        probe.warn(
            "torch has only PTX for this GPU: the driver compiles it at the first use",
            why=why,
            remedy=remedy,
            mode="F45",
        )
    else:
        probe.fail("torch has no code for this GPU", why=why, remedy=remedy, mode="F43")


def judge_kernels(as_is: Mapping[str, str], without: Mapping[str, str], probe: Probe) -> None:
    """Judge what became of the kernels: as they are, and where the driver may not compile PTX."""
    for name, error in as_is.items():
        if not error:
            continue
        hole = as_is.get("elementwise") == ""
        known = next(explain.matches(error), None)
        note = probe.warn if "MAGMA" in name else probe.fail
        if _NO_KERNEL.search(error):
            note(
                f"torch has no kernel for this GPU in {name}" if hole else "torch has no kernel for this GPU",
                why=error,
                remedy="use a torch that was compiled for this GPU: see the architectures in this check's evidence",
                mode="F44" if hole else "F43",
                blame=Blame.IMAGE,
            )
        elif "toolchain" in error or "JIT" in error:
            note(
                f"{name} has only PTX for this GPU, and the driver cannot compile it",
                why=error,
                remedy="update the host's driver, or use a torch that was compiled for this GPU",
                mode="F46",
                blame=Blame.HOST,
            )
        else:
            note(
                f"a first kernel does not work: {name}",
                why=error,
                remedy=known.remedy if known else "see dev.health",
                mode=known.mode if known else "",
                blame=Blame(known.blame) if known else Blame.UNKNOWN,
            )
    compiled = {
        name: without.get(name, "it did not run") for name, error in as_is.items() if not error and without.get(name)
    }
    if compiled:
        probe.warn(
            f"the driver compiles PTX for {', '.join(sorted(compiled))}: torch has no machine code for this GPU there",
            why="; ".join(sorted(set(compiled.values()))),
            remedy="use a torch that was compiled for this GPU; the first use takes minutes where ~/.nv is not kept",
            mode="F45",
            blame=Blame.IMAGE,
        )


# ----------------------------------------------------------------------------------------------------
# Health


@check("dev.health", title="the GPU is well and idle", tier=2, needs=("dev.available",), modes=("F41",))
def health(probe: Probe) -> None:
    """Ask NVML, from a process that computes nothing."""
    seen = driver.look()
    try:
        found = driver.health(seen.buses)
    except OSError as error:
        probe.warn(
            "the GPU's health is not known: NVML cannot be asked",
            why=str(error),
            remedy="set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            mode="F32",
            blame=Blame.HOST,
        )
        return
    probe.saw(health=[it.as_json() for it in found])
    for number, it in enumerate(found):
        judge_health(number, it, probe)
        for name, value, unit in (("temperature", it.temperature, "°C"), ("power", it.power_w, "W")):
            if value is not None:
                probe.metric(f"{name}_{number}", value, unit)
    probe.detail("; ".join(_told(it) for it in found))


def _told(it: Health) -> str:
    parts = [f"{it.temperature} °C"] if it.temperature is not None else []
    if it.power_w is not None and it.limit_w is not None:
        parts.append(f"{it.power_w:.0f} of {it.limit_w:.0f} W")
    if it.uncorrected is not None:
        parts.append(f"{it.corrected} corrected and {it.uncorrected} uncorrected ECC errors")
    return ", ".join(parts) or "NVML tells nothing of this device"


def judge_health(number: int, it: Health, probe: Probe) -> None:
    """Judge what NVML says of one device."""

    def warn(what: str, why: str, remedy: str) -> None:
        probe.warn(f"GPU {number}: {what}", why=why, remedy=remedy, mode="F41", blame=Blame.HOST)

    if it.error:
        probe.fail(
            f"GPU {number}: NVML does not reach it",
            why=it.error,
            remedy="look for Xid lines in the host's kernel log; reset the GPU or restart the host",
            mode="F41",
            blame=Blame.HOST,
        )
    if it.remap_failed:
        probe.fail(
            f"GPU {number}: a faulty row of its memory could not be replaced",
            why="NVML: a row remapping failed",
            remedy="take this GPU out of use; it has to be replaced",
            mode="F41",
            blame=Blame.HOST,
        )
    if it.uncorrected:
        warn(
            "its memory had errors that were not corrected",
            f"{it.uncorrected} since the driver was loaded",
            "reset the GPU",
        )
    if it.remap_pending or it.retired_pending:
        warn("faulty memory waits to be replaced", "NVML: pending", "reset the GPU or restart the host")
    slow = [text for bit, text in driver.REASONS.items() if bit & (it.reasons or 0) and bit in (0x8, 0x20, 0x40, 0x80)]
    if slow:
        warn(
            "its clocks are held down",
            ", ".join(slow),
            "see to its cooling and power; what is measured now is too slow",
        )
    if it.temperature is not None and it.slowdown is not None and it.temperature >= it.slowdown:
        warn("it is too hot", f"{it.temperature} °C, it slows down from {it.slowdown} °C", "see to its cooling")
    if it.processes:
        warn(
            "others compute on it",
            f"{it.processes} processes",
            "end them, or take what is measured here as a lower bound",
        )
    elif it.used_bytes and it.total_bytes and it.used_bytes > 0.1 * it.total_bytes and not it.mig:
        warn(
            "others hold some of its memory",
            f"{it.used_bytes / 2**30:.1f} of {it.total_bytes / 2**30:.1f} GiB are used before this run",
            "end them, or take what is measured here as a lower bound",
        )


# ----------------------------------------------------------------------------------------------------
# Memory

_PIECE = 1 << 30
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
"""Odd, so that each address has a word of its own, which differs from its neighbours' in about half of the bits."""
_STAND_IN_BYTES = 64 << 20
"""Instead of all free memory, where a CPU stands in for the GPU."""


@check(
    "dev.memory", title="the GPU's memory holds what is written to it", tier=2, needs=("dev.available",), modes=("F41",)
)
def memory(probe: Probe) -> None:
    """Fill 90 % of the free memory with words that differ by address, read them, flip every bit, read again."""
    import torch

    on_gpu = probe.device.startswith("cuda")
    free = int(torch.cuda.mem_get_info(probe.device)[0]) if on_gpu else _STAND_IN_BYTES
    pieces = _allocate(torch, free * 9 // 10, probe.device)
    held = sum(piece.numel() * 8 for piece in pieces)

    def finish() -> None:
        if on_gpu:
            torch.cuda.synchronize(probe.device)

    finish()
    started = time.perf_counter()
    for number, piece in enumerate(pieces):
        _fill(torch, piece, number)
    finish()
    write_s = time.perf_counter() - started
    started = time.perf_counter()
    wrong = [_wrong(torch, piece, number, flipped=False) for number, piece in enumerate(pieces)]
    finish()
    read_s = time.perf_counter() - started
    for piece in pieces:
        piece.bitwise_not_()
    wrong += [_wrong(torch, piece, number, flipped=True) for number, piece in enumerate(pieces)]
    mistakes = sum(int(count) for count in wrong)
    del pieces, piece
    left = free
    if on_gpu:
        torch.cuda.empty_cache()
        left = int(torch.cuda.mem_get_info(probe.device)[0])
    probe.metric("held", held / 2**30, "GiB")
    probe.metric("fill", held / write_s / 1e9, "GB/s", better="higher")
    probe.metric("verify", held / read_s / 1e9, "GB/s", better="higher")
    probe.saw(free_bytes=free, held_bytes=held, wrong_words=mistakes, free_after_bytes=left)
    probe.detail(f"{held / 2**30:.1f} GiB written, flipped and read twice")
    judge_memory(free, held, mistakes, left, probe)


def _allocate(torch: Any, size: int, device: str) -> List[Any]:  # noqa: ANN401
    """Allocate up to `size` bytes in pieces; fewer if others were quicker."""
    pieces: List[Any] = []
    # Before torch 2.5 it is in torch.cuda only.
    out_of_memory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    while size >= 8:
        words = min(size, _PIECE) // 8
        try:
            pieces.append(torch.empty(words, dtype=torch.int64, device=device))
        except out_of_memory:
            break
        size -= words * 8
    return pieces


def _fill(torch: Any, piece: Any, number: int, first: int = 0) -> None:  # noqa: ANN401
    """Write to each word what its address alone decides; `first` is the address of the piece's first word."""
    first += number * (_PIECE // 8)
    torch.arange(first, first + piece.numel(), out=piece)
    piece.mul_(_SPREAD)


def _wrong(torch: Any, piece: Any, number: int, *, flipped: bool) -> Any:  # noqa: ANN401
    """Count the words that are not what was written, a sixteenth of the piece at a time."""
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    step = max(1, -(-piece.numel() // 16))
    expected = torch.empty(step, dtype=torch.int64, device=piece.device)
    for start in range(0, piece.numel(), step):
        part = piece[start : start + step]
        wanted = expected[: part.numel()]
        _fill(torch, wanted, number, start)
        if flipped:
            wanted.bitwise_not_()
        total += (part != wanted).sum()
    return total


def judge_memory(free: int, held: int, wrong: int, left: int, probe: Probe) -> None:
    """Judge the test of the memory: bytes free before, held, words wrong, bytes free afterwards."""
    if wrong:
        probe.fail(
            "the GPU's memory does not hold what is written to it",
            why=f"{wrong} words of {2 * held // 8} read were wrong",
            remedy="take this GPU out of use and run its maker's diagnostics (dcgmi diag -r 3)",
            mode="F41",
            blame=Blame.HOST,
        )
    if held < 0.8 * free:
        probe.warn(
            "much less memory could be allocated than is said to be free",
            why=f"{held / 2**30:.1f} of {free / 2**30:.1f} GiB",
            remedy="see whether others compute on this GPU (dev.health)",
            mode="F41",
            blame=Blame.HOST,
        )
    elif left < 0.9 * free:
        probe.warn(
            "memory that was freed is not given back",
            why=f"{left / 2**30:.1f} GiB are free, {free / 2**30:.1f} were before",
            remedy="see whether others compute on this GPU (dev.health)",
            blame=Blame.UNKNOWN,
        )
