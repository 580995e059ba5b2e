"""The CUDA toolkit of a variant that asks for one: which packages make it, where it lies, and where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from packaging.version import Version

from builder.errors import Problem
from builder.facts import CPU
from builder.schema import BootstrapBase, ImageBase

FIRST_IN_WHEELS: Final = 13
"""First CUDA whose packages hold the whole compiler. nvidia-cuda-nvcc-cu12 has ptxas, libnvvm and libdevice, no nvcc,
cudafe++ or cicc (looked up in the wheels of 12.8.93 and 13.2.86, 2026-11-21)."""
IN_IMAGES: Final = "/usr/local/cuda"
"""Where an image base has its toolkit."""
EXTRAS: Final = ("cccl", "cuobjdump", "curand", "nvcc", "nvdisasm", "nvml", "profiler")
"""Of the package cuda-toolkit, besides what torch itself requires: the compiler with its headers; Thrust, CUB and
libcu++; cuRAND and NVML, whose headers torch's own headers include; the disassemblers; the profiler's header."""
LIBRARIES: Final[Mapping[str, int]] = {
    "cublas": 13,
    "cublasLt": 13,
    "cudart": 13,
    "cufft": 12,
    "curand": 10,
    "cusolver": 12,
    "cusparse": 12,
    "nvJitLink": 13,
    "nvrtc": 13,
}
"""Libraries that extensions link with, and the number in their file's name; the wheels of CUDA 13 lack the name without
it, which is the one that a linker looks for."""


def wanted(*, toolkit: bool, cuda: str) -> str | None:
    """Return which CUDA's toolkit the image has, "13.2"; None for one without, which every CPU image is."""
    return cuda if toolkit and cuda != CPU else None


def refusal(*, variant: str, cuda: str, base_name: str, base: BootstrapBase | ImageBase) -> Problem | None:
    """Say why a variant with a toolkit cannot stand on this base for this CUDA; None if it can."""
    if cuda == CPU:
        return None
    has = base.toolkit if isinstance(base, ImageBase) else None
    if has == cuda:
        return None
    if has is not None:
        return Problem(
            what=f"variant {variant} needs nvcc of CUDA {cuda}, and base {base_name} has the toolkit of CUDA {has}",
            why="extensions are compiled with the CUDA that torch was built for",
            tries=(f"a base whose image has CUDA {cuda} in {IN_IMAGES}, with toolkit: '{cuda}'",),
        )
    if Version(cuda).major >= FIRST_IN_WHEELS:
        return None
    return Problem(
        what=f"variant {variant} needs nvcc of CUDA {cuda}, which base {base_name} does not have",
        why=f"NVIDIA's packages hold the whole compiler from CUDA {FIRST_IN_WHEELS} on, those of CUDA "
        f"{Version(cuda).major} only ptxas",
        tries=(
            f"a base of kind `image`, by digest, that has CUDA {cuda} in {IN_IMAGES}, with toolkit: '{cuda}'",
            f"a torch for CUDA {FIRST_IN_WHEELS}",
        ),
    )


def requirements(*, cuda: str, base: BootstrapBase | ImageBase) -> tuple[str, ...]:
    """Return the packages that make the toolkit of a CUDA, none where the base has it."""
    if _of_image(base):
        return ()
    return (f"cuda-toolkit[{','.join(EXTRAS)}]=={cuda}.*",)


def home(*, cuda: str, base: BootstrapBase | ImageBase, packages: str) -> str:
    """Return CUDA_HOME: where `bin/nvcc` and `include/cuda.h` lie; `packages` is the directory of Python's packages."""
    return IN_IMAGES if _of_image(base) else f"{packages}/{_directory(cuda)}"


def links(*, cuda: str, base: BootstrapBase | ImageBase) -> Mapping[str, str]:
    """Return the links that the packages lack, relative to the directory of Python's packages.

    `lib64` is what build systems look for, and a linker looks for a library's name without a number.
    """
    if _of_image(base):
        return {}
    directory = _directory(cuda)
    return {f"{directory}/lib64": "lib"} | {
        f"{directory}/lib/lib{name}.so": f"lib{name}.so.{number}" for name, number in LIBRARIES.items()
    }


def _of_image(base: BootstrapBase | ImageBase) -> bool:
    return isinstance(base, ImageBase) and base.toolkit is not None


def _directory(cuda: str) -> str:
    return f"nvidia/cu{Version(cuda).major}"
