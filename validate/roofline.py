"""What a device can do at most, measured in this run: memory bandwidth, matrix products, transfers, launches.

A generation is held to these and not to a data sheet, so that its figure says something on a GPU nobody has seen.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from validate import timing

if TYPE_CHECKING:
    import torch

_GIB = 1 << 30
_L2 = 64 << 20
"""Taken for the second-level cache where torch does not tell."""
_SHAPES: Tuple[Tuple[int, int, int], ...] = (
    (4096, 4096, 4096),
    (6144, 6144, 6144),
    (8192, 8192, 8192),
    (8192, 8192, 4096),
    (4096, 14336, 4096),
    (8192, 4096, 14336),
    (16384, 8192, 2048),
    (10240, 8192, 8192),
)
_SMALL_SHAPES: Tuple[Tuple[int, int, int], ...] = ((256, 256, 256), (384, 256, 512))


@dataclass(frozen=True)
class Bandwidth:
    """Of the device's memory, in bytes per second."""

    copy: float
    """Read and written bytes both count."""
    read: float

    @property
    def best(self) -> float:
        """The larger: what reading weights is held to."""
        return max(self.copy, self.read)

    def as_json(self) -> Dict[str, float]:
        """Return it as evidence."""
        return asdict(self)


@dataclass(frozen=True)
class Roofline:
    """All of it."""

    bandwidth: Bandwidth
    gemm: Mapping[str, float]
    """FLOP/s by type: "bf16", "fp16", "tf32", "fp32"."""
    upload: float
    """Bytes per second from pinned host memory; on the CPU a copy like any other."""
    download: float
    launch_s: float
    """Of one small kernel among many, from Python."""
    graph_launch_s: Optional[float]
    """The same among the kernels of one CUDA graph."""

    def as_json(self) -> Dict[str, Any]:
        """Return it as evidence."""
        return asdict(self)


def on_gpu(device: str) -> bool:
    """Tell a GPU from the CPU, its stand-in."""
    return not device.startswith("cpu")


def _patience(device: str) -> float:
    """Return by what to multiply times: figures of the stand-in mean nothing, so they may be had in a hurry."""
    return 1.0 if on_gpu(device) else 0.05


def l2_bytes(device: str) -> int:
    """Return the size of the second-level cache; a guess where torch does not tell."""
    import torch

    if not on_gpu(device):
        return 32 << 20
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _L2)) or _L2


def buffer_bytes(device: str) -> int:
    """Return how much to copy so that no cache can help: 40 times the L2 cache, but a quarter of what is free."""
    import torch

    if not on_gpu(device):
        return 32 << 20
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(2 * _GIB, 40 * l2_bytes(device)), free // 4)) & ~0xFFFF


def capability(device: str) -> Tuple[int, int]:
    """Return the compute capability; (0, 0) of a CPU."""
    import torch

    return tuple(torch.cuda.get_device_capability(device)) if on_gpu(device) else (0, 0)


def free(device: str) -> None:
    """Give back what the allocator keeps, so that the next thing finds room."""
    import torch

    gc.collect()
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def sheet_bandwidth(device: str) -> Optional[float]:
    """Return what memory clock and bus width promise, in bytes per second; None where the driver does not tell.

    Two transfers a clock, as NVIDIA's own deviceQuery counts them. Of a MIG slice nothing is told.
    """
    import torch

    if not on_gpu(device):
        return None
    properties = torch.cuda.get_device_properties(device)
    if " MIG " in properties.name:
        return None
    clock, width = _attribute(device, 36), _attribute(device, 37)  # cuda.h: MEMORY_CLOCK_RATE, ..._BUS_WIDTH
    return 2.0 * clock * 1e3 * width / 8 if clock and width else None


def _attribute(device: str, number: int) -> int:
    """Ask libcuda, which torch has loaded: torch's own properties have these only in newer versions."""
    import torch

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    value, handle = ctypes.c_int(), ctypes.c_int()
    index = torch.device(device).index or 0
    if library.cuDeviceGet(ctypes.byref(handle), index) != 0:
        return 0
    return value.value if library.cuDeviceGetAttribute(ctypes.byref(value), number, handle) == 0 else 0


def raise_clocks(device: str, seconds: float = 2.0) -> None:
    """Keep the device busy with matrix products, so that its clocks are those of work."""
    import torch

    if not on_gpu(device):
        return
    dtype = torch.bfloat16 if capability(device) >= (8, 0) else torch.float16
    left = torch.randn(4096, 4096, device=device, dtype=dtype)
    out = torch.empty_like(left)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(left, left, out=out)
        torch.cuda.synchronize(device)


def measure_bandwidth(device: str, *, seconds: float = 0.5) -> Bandwidth:
    """Measure copying, and reading by whatever reads fastest: sums of two shapes, and a matrix-vector product."""
    import torch

    seconds *= _patience(device)
    size = buffer_bytes(device)
    dtype = torch.bfloat16 if capability(device) >= (8, 0) else torch.float32
    count = size // (2 if dtype is torch.bfloat16 else 4)
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = timing.times_for(lambda: target.copy_(source), device, seconds=seconds)
    rows = source.view(-1, 8192)
    floats = source.view(torch.float32)
    vector = torch.randn(8192, device=device, dtype=dtype)
    readers: Sequence[Callable[[], object]] = (
        floats.sum,
        lambda: rows.sum(-1, dtype=torch.float32),
        lambda: rows @ vector,
    )
    read = [timing.times_for(reader, device, seconds=seconds / 2) for reader in readers]
    return Bandwidth(
        copy=2 * size / statistics.median(copied), read=size / min(statistics.median(times) for times in read)
    )


def _types(device: str) -> Dict[str, Tuple[torch.dtype, str]]:
    """Return the types whose products are measured, with the precision that float32 is set to meanwhile."""
    import torch

    if not on_gpu(device):
        return {"fp32": (torch.float32, "highest")}
    types = {"fp16": (torch.float16, "highest"), "fp32": (torch.float32, "highest")}
    if capability(device) >= (8, 0):
        types.update(bf16=(torch.bfloat16, "highest"), tf32=(torch.float32, "high"))
    return types


def measure_gemm(device: str, names: Optional[Sequence[str]] = None, *, seconds: float = 0.2) -> Dict[str, float]:
    """Return the best FLOP/s over several large shapes, by type; inputs are random, for zeros would run faster."""
    import torch

    seconds *= _patience(device)
    best: Dict[str, float] = {}
    precision = torch.get_float32_matmul_precision()
    for name, (dtype, setting) in _types(device).items():
        if names is not None and name not in names:
            continue
        torch.set_float32_matmul_precision(setting)
        # float32 without tensor cores is an order slower: its peak shows with fewer shapes.
        shapes = _SMALL_SHAPES if not on_gpu(device) else _SHAPES[:2] if name == "fp32" else _SHAPES
        rates = []
        for rows, inner, columns in shapes:
            left = [torch.randn(rows, inner, device=device, dtype=dtype) for _ in range(2)]
            right = torch.randn(inner, columns, device=device, dtype=dtype)
            out = torch.empty(rows, columns, device=device, dtype=dtype)
            turn = _Turn(left)
            taken = timing.times_for(lambda: torch.mm(turn(), right, out=out), device, seconds=seconds)  # noqa: B023
            rates.append(2.0 * rows * inner * columns / statistics.median(taken))
        best[name] = max(rates)
    torch.set_float32_matmul_precision(precision)
    free(device)
    return best


class _Turn:
    """Hands out one of several inputs after the other: the same one again might still be cached."""

    def __init__(self, inputs: List[torch.Tensor]) -> None:
        self._inputs, self._calls = inputs, 0

    def __call__(self) -> torch.Tensor:
        self._calls += 1
        return self._inputs[self._calls % len(self._inputs)]


def _transfers(device: str) -> Tuple[float, float]:
    import torch

    size = (256 << 20) if on_gpu(device) else (16 << 20)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu(device)).fill_(3)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = 0.3 * _patience(device)
    upload = timing.times_for(lambda: there.copy_(host, non_blocking=True), device, seconds=seconds)
    download = timing.times_for(lambda: host.copy_(there, non_blocking=True), device, seconds=seconds)
    return size / statistics.median(upload), size / statistics.median(download)


def _launches(device: str) -> Tuple[float, Optional[float]]:
    import torch

    small = torch.zeros(32, device=device)
    count = 1000

    def many() -> None:
        for _ in range(count):
            small.add_(1.0)

    many()
    eager = statistics.median(timing.host_seconds(many, device) for _ in range(5)) / count
    if not on_gpu(device):
        return eager, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    replayed = statistics.median(timing.times(graph.replay, device, repeats=10)) / count
    return eager, replayed


def measure(device: str) -> Roofline:
    """Measure everything; about fifteen seconds on a GPU of the H100 class."""
    raise_clocks(device)
    bandwidth = measure_bandwidth(device)
    gemm = measure_gemm(device)
    upload, download = _transfers(device)
    launch, graph_launch = _launches(device)
    free(device)
    return Roofline(bandwidth, gemm, upload, download, launch, graph_launch)
