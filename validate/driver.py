"""The NVIDIA driver as this process sees it: device nodes, libcuda, cuInit's answer, NVML; by ctypes, without torch.

`torch.cuda.is_available()` is one bit. Which of a dozen things is wrong says the number that cuInit returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple

LOOK_S = 60.0
"""A driver that hangs in cuInit must not hang the run; the first call after a boot takes up to half a minute."""
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from validate.driver import tell; tell()"

# cuda.h, CUresult: those that cuInit and cuDeviceGetCount return when something is wrong with the machine.
ERRORS: Dict[int, str] = {
    3: "CUDA_ERROR_NOT_INITIALIZED",
    34: "CUDA_ERROR_STUB_LIBRARY",
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    304: "CUDA_ERROR_OPERATING_SYSTEM",
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    805: "CUDA_ERROR_MPS_CONNECTION_FAILED",
    999: "CUDA_ERROR_UNKNOWN",
}

# nvml.h, nvmlReturn_t: those that nvmlInit and questions about a device return when something is wrong.
NVML_ERRORS: Dict[int, str] = {
    4: "NVML_ERROR_NO_PERMISSION",
    9: "NVML_ERROR_DRIVER_NOT_LOADED",
    15: "NVML_ERROR_GPU_IS_LOST",
    16: "NVML_ERROR_RESET_REQUIRED",
    17: "NVML_ERROR_OPERATING_SYSTEM",
    18: "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    999: "NVML_ERROR_UNKNOWN",
}

_VERSION = r"\d{3}\.\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Driver:
    """What there is of a driver."""

    nodes: Tuple[str, ...] = ()
    """Device files under /dev."""
    denied: Tuple[str, ...] = ()
    """Those of them that cannot be opened."""
    module: Optional[str] = None
    """Version of the kernel module, "580.95.05"."""
    library: Optional[str] = None
    """Path of the libcuda.so.1 that was loaded; None if none was found."""
    library_error: str = ""
    injected: bool = False
    """Whether that file is a mount of its own: a container runtime put it there."""
    init: Optional[int] = None
    """What cuInit returned; None if there was nothing to call."""
    cuda: Optional[str] = None
    """The newest CUDA the driver knows, "13.0"."""
    count: int = 0
    names: Tuple[str, ...] = ()
    capabilities: Tuple[str, ...] = ()
    """Compute capability of each device, "9.0"."""
    buses: Tuple[str, ...] = ()
    """PCI address of each device, by which NVML knows it: the two count devices differently."""
    nvml: Optional[str] = None
    """Path of the libnvidia-ml.so.1 that was loaded; None if none was found."""
    nvml_init: Optional[int] = None
    """What nvmlInit returned."""
    error: str = ""
    """Why nothing is known: the look itself failed."""

    @property
    def absent(self) -> bool:
        """Whether there is no trace of a GPU at all; a broken driver is not absent."""
        return not self.nodes and self.library is None and not self.error

    @property
    def why_absent(self) -> str:
        """Say what that may come from."""
        if self.module:
            return (
                f"the machine has NVIDIA's driver {self.module}, but no device is in this container: "
                "start it with --gpus all (or --device nvidia.com/gpu=all)"
            )
        return "no NVIDIA device and no driver were found"

    @property
    def library_version(self) -> Optional[str]:
        """The driver that libcuda belongs to, as its file name says."""
        return file_version(self.library)

    def as_json(self) -> Dict[str, Any]:
        """Return it as a report has it."""
        return asdict(self)


def file_version(path: Optional[str]) -> Optional[str]:
    """Return the driver's version in a file name like libcuda.so.580.95.05."""
    found = re.search(rf"\.so\.({_VERSION})$", path or "")
    return found.group(1) if found else None


def number(version: str) -> Tuple[int, ...]:
    """Return a version as numbers that can be compared: "580.95.05" as (580, 95, 5)."""
    return tuple(int(part) for part in version.split("."))


def _nodes() -> List[str]:
    named = re.compile(r"nvidia(?:\d+|ctl|-uvm|-uvm-tools|-modeset)|dxg")
    return sorted(name for name in os.listdir("/dev") if named.fullmatch(name))  # noqa: PTH208 (py39)


def _denied(nodes: List[str]) -> List[str]:
    """Return those nodes that computing needs and that cannot be opened: a cgroup may forbid it."""
    denied = []
    for name in nodes:
        if re.fullmatch(r"nvidia(?:\d+|ctl|-uvm)", name):
            try:
                os.close(os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                denied.append(f"{name}: {error.strerror}")
    return denied


def _module() -> Optional[str]:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            found = re.search(rf"\b({_VERSION})\b", file.read())
    except OSError:
        return None
    return found.group(1) if found else None


def _mapped(name: str) -> Optional[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[-1]
            if os.path.basename(path).startswith(name):  # noqa: PTH119
                return path
    return None


def _mounted(path: str) -> bool:
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:  # noqa: PTH123
        return any(line.split()[4] == path for line in mounts)
    return False


def look() -> Driver:
    """Ask the driver in this process, which keeps libcuda loaded; call `seen` to leave the process as it is."""
    nodes = _nodes()
    nvml, nvml_init = _nvml()
    known: Dict[str, Any] = {
        "nodes": tuple(nodes),
        "denied": tuple(_denied(nodes)),
        "module": _module(),
        "nvml": nvml,
        "nvml_init": nvml_init,
    }
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Driver(library_error=str(error), **known)
    path = _mapped("libcuda.so") or "libcuda.so.1"
    known.update(library=path, injected=_mounted(path), init=int(library.cuInit(0)))
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        known["cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if known["init"] != 0:
        return Driver(**known)
    library.cuDeviceGetCount(ctypes.byref(count))
    names, capabilities, buses = [], [], []
    for ordinal in range(count.value):
        device = ctypes.c_int()
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(device), ordinal)
        library.cuDeviceGetName(name, 256, device)
        library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # ..._COMPUTE_CAPABILITY_MAJOR, _MINOR
        library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        library.cuDeviceGetPCIBusId(bus, 32, device)
        names.append(name.value.decode("utf-8", "replace"))
        capabilities.append(f"{major.value}.{minor.value}")
        buses.append(bus.value.decode("ascii", "replace"))
    return Driver(count=count.value, names=tuple(names), capabilities=tuple(capabilities), buses=tuple(buses), **known)


def tell() -> None:
    """Print what `look` sees, as JSON."""
    sys.stdout.write(json.dumps(look().as_json()))


def seen(root: str) -> Driver:
    """Return what a process of its own sees: a driver that crashes or hangs is a finding, too.

    `root` is where `validate` is imported from.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE, root], capture_output=True, text=True, timeout=LOOK_S, check=False
        )
        document: Dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Driver(nodes=tuple(_nodes()), error=f"the driver did not answer within {LOOK_S:.0f} s")
    except ValueError:
        return Driver(
            nodes=tuple(_nodes()), error=f"asking the driver ended with {done.returncode}: {done.stderr[-500:].strip()}"
        )
    values: Dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in document.items()}
    return Driver(**values)


# ----------------------------------------------------------------------------------------------------
# NVML: how the devices are


@dataclass(frozen=True)
class Health:
    """What NVML says of one device; None is what it does not say, as most of it on a GeForce or in a MIG instance."""

    bus: str
    error: str = ""
    """Why nothing is known."""
    temperature: Optional[int] = None
    """Of the GPU, in °C."""
    slowdown: Optional[int] = None
    """Where the hardware slows itself down, in °C."""
    power_w: Optional[float] = None
    limit_w: Optional[float] = None
    """The power limit in force."""
    reasons: Optional[int] = None
    """Why clocks are lower than they could be: NVML's bits, see REASONS."""
    corrected: Optional[int] = None
    uncorrected: Optional[int] = None
    """ECC errors since the driver was loaded."""
    remap_pending: Optional[bool] = None
    """A row of memory is replaced at the next reset."""
    remap_failed: Optional[bool] = None
    """No spare row was left."""
    retired_pending: Optional[bool] = None
    """As remap_pending, on GPUs before Ampere."""
    mig: Optional[bool] = None
    processes: Optional[int] = None
    """That compute on it; in a container NVML may show none of other containers."""
    used_bytes: Optional[int] = None
    total_bytes: Optional[int] = None

    def as_json(self) -> Dict[str, Any]:
        """Return it as a report has it."""
        return asdict(self)


# nvml.h, nvmlClocksEventReasons (before CUDA 12.2 nvmlClocksThrottleReasons).
REASONS: Dict[int, str] = {
    0x1: "idle",
    0x2: "clocks set by the administrator",
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def _nvml() -> Tuple[Optional[str], Optional[int]]:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    path = _mapped("libnvidia-ml.so") or "libnvidia-ml.so.1"
    started = int(library.nvmlInit_v2())
    if started == 0:
        library.nvmlShutdown()
    return path, started


def health(buses: Tuple[str, ...]) -> List[Health]:
    """Return how the devices at these PCI addresses are; raises OSError if there is no NVML or it does not start."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    started = int(library.nvmlInit_v2())
    if started != 0:
        raise OSError(f"nvmlInit returned {started} {NVML_ERRORS.get(started, '')}".strip())
    try:
        return [_health(library, bus) for bus in buses]
    finally:
        library.nvmlShutdown()


def _health(library: Any, bus: str) -> Health:  # noqa: ANN401
    handle = ctypes.c_void_p()
    found = int(library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)))
    if found != 0:
        return Health(bus=bus, error=f"NVML answers {found} {NVML_ERRORS.get(found, '')}".strip())

    def ask(name: str, kind: Any, *arguments: Any, outputs: int = 1) -> Optional[List[Any]]:  # noqa: ANN401
        """Call a function that writes `outputs` values of a C type; None if this NVML or device cannot tell."""
        call = getattr(library, name, None)
        values = [kind() for _ in range(outputs)]
        if call is None or call(handle, *arguments, *map(ctypes.byref, values)) != 0:
            return None
        return [value.value for value in values]

    def one(name: str, kind: Any, *arguments: Any) -> Optional[int]:  # noqa: ANN401
        answer = ask(name, kind, *arguments)
        return None if answer is None else int(answer[0])

    def flag(value: Optional[int]) -> Optional[bool]:
        return None if value is None else bool(value)

    whole, long = ctypes.c_uint, ctypes.c_ulonglong
    reasons = one("nvmlDeviceGetCurrentClocksEventReasons", long)
    if reasons is None:
        reasons = one("nvmlDeviceGetCurrentClocksThrottleReasons", long)
    # Rows corrected and uncorrected, pending, failed.
    rows = ask("nvmlDeviceGetRemappedRows", whole, outputs=4)
    mig = ask("nvmlDeviceGetMigMode", whole, outputs=2)
    power, limit = one("nvmlDeviceGetPowerUsage", whole), one("nvmlDeviceGetEnforcedPowerLimit", whole)
    memory = _Memory()
    told = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    return Health(
        bus=bus,
        temperature=one("nvmlDeviceGetTemperature", whole, whole(0)),  # NVML_TEMPERATURE_GPU
        slowdown=one("nvmlDeviceGetTemperatureThreshold", whole, whole(1)),  # NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        power_w=None if power is None else power / 1000,
        limit_w=None if limit is None else limit / 1000,
        reasons=reasons,
        # Corrected is 0, uncorrected 1; counted since the driver was loaded is 0.
        corrected=one("nvmlDeviceGetTotalEccErrors", long, whole(0), whole(0)),
        uncorrected=one("nvmlDeviceGetTotalEccErrors", long, whole(1), whole(0)),
        remap_pending=flag(rows[2] if rows else None),
        remap_failed=flag(rows[3] if rows else None),
        retired_pending=flag(one("nvmlDeviceGetRetiredPagesPendingStatus", whole)),
        mig=flag(mig[0] if mig else None),
        processes=_processes(library, handle),
        used_bytes=int(memory.used) if told else None,
        total_bytes=int(memory.total) if told else None,
    )


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _processes(library: Any, handle: ctypes.c_void_p) -> Optional[int]:  # noqa: ANN401
    """Count without asking for the list, whose layout differs between drivers."""
    call = getattr(library, "nvmlDeviceGetComputeRunningProcesses_v3", None) or getattr(
        library, "nvmlDeviceGetComputeRunningProcesses_v2", None
    )
    count = ctypes.c_uint(0)
    # 7: there are more than the none that there is room for.
    if call is None or call(handle, ctypes.byref(count), None) not in (0, 7):
        return None
    return int(count.value)
