"""Whether extensions can be compiled: the toolkit is the declared one, and what it makes loads, and runs: T1 and T2."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import Any, List, Mapping, NoReturn, Optional, Sequence

from validate import explain, facts
from validate.check import Probe, check
from validate.verdict import Blame, Skip

_PROGRAMS = ("bin/cudafe++", "bin/fatbinary", "bin/nvlink", "bin/ptxas", "nvvm/bin/cicc")
"""What nvcc starts, below CUDA_HOME."""
_HEADERS = (
    "crt/host_config.h",
    "cublas_v2.h",
    "cuda.h",
    "cuda_runtime.h",
    "cufft.h",
    "curand_kernel.h",
    "cusolverDn.h",
    "cusparse.h",
    "nvml.h",
    "nvrtc.h",
)
"""What torch's own headers include, and with it most extensions."""
_CCCL = ("include/thrust/version.h", "include/cccl/thrust/version.h")
"""Where Thrust lies: until CUDA 12, and from CUDA 13 on."""
_LINKED = ("cublas", "cudart", "cufft", "curand", "cusolver", "cusparse", "nvrtc")
"""Libraries that extensions name to the linker: torch itself adds -lcudart."""
_LOOK_S = 30.0
_REINSTALL = "install the toolkit of the CUDA that torch was built for, and set CUDA_HOME to it"


# ----------------------------------------------------------------------------------------------------
# The toolkit


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit as the environment leads to it."""

    home: str
    """CUDA_HOME; empty if it is not set."""
    nvcc: Optional[str] = None
    """The compiler there, None if there is none that can be started."""
    on_path: Optional[str] = None
    """The compiler that a shell starts."""
    said: str = ""
    """What the first one says of its version."""
    missing: Sequence[str] = ()
    """Programs, headers and libraries that are not there, below CUDA_HOME."""


def _toolkit() -> Toolkit:
    home = os.environ.get("CUDA_HOME", "")
    path = os.path.join(home, "bin", "nvcc")  # noqa: PTH118
    nvcc = path if home and os.access(path, os.X_OK) else None
    said = ""
    if nvcc is not None:
        try:
            done = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, errors="replace", timeout=_LOOK_S, check=False
            )
            said = f"{done.stdout}{done.stderr}".strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
    wanted = [*_PROGRAMS, *(f"include/{name}" for name in _HEADERS), *(f"lib64/lib{name}.so" for name in _LINKED)]
    missing = [name for name in wanted if not os.path.exists(os.path.join(home, name))]  # noqa: PTH110, PTH118
    if not any(os.path.exists(os.path.join(home, name)) for name in _CCCL):  # noqa: PTH110, PTH118
        missing.append(_CCCL[0])
    return Toolkit(home, nvcc, shutil.which("nvcc"), said, missing if nvcc else ())


def release(said: str) -> Optional[str]:
    """Return the CUDA that nvcc says it is of: "13.2"."""
    found = re.search(r"\brelease (\d+\.\d+)", said)
    return found.group(1) if found else None


def judge_toolkit(probe: Probe, seen: Toolkit, declared: str) -> None:
    """Hold the toolkit to being the declared one, whole, and the one that is found first."""
    probe.saw(cuda_home=seen.home, nvcc=seen.nvcc, on_path=seen.on_path, said=seen.said)
    if seen.nvcc is None:
        probe.stop(
            f"there is no nvcc in {seen.home}/bin" if seen.home else "CUDA_HOME is not set",
            why=f"declared: the toolkit of CUDA {declared}; nvcc on PATH: {seen.on_path or 'none'}",
            remedy=_REINSTALL,
            mode="F77",
        )
    found = release(seen.said)
    if found is None:
        probe.fail(f"{seen.nvcc} does not tell its version", why=seen.said[-400:], remedy=_REINSTALL, mode="F77")
    elif found != declared:
        probe.fail(f"nvcc is of CUDA {found}", why=f"declared: {declared}", remedy=_REINSTALL)
    if seen.on_path is None or os.path.realpath(seen.on_path) != os.path.realpath(seen.nvcc):
        probe.fail(
            f"a shell starts {seen.on_path or 'no nvcc'}, which is not that of CUDA_HOME",
            why=f"CUDA_HOME has {seen.nvcc}; build systems ask the one or the other",
            remedy=f"put {os.path.dirname(seen.nvcc)} on PATH, before other directories with an nvcc",  # noqa: PTH120
        )
    if seen.missing:
        probe.fail(
            f"the toolkit in {seen.home} is not whole",
            why=f"not there: {', '.join(seen.missing)}",
            remedy=_REINSTALL,
            mode="F79" if all(name.startswith("lib64/") for name in seen.missing) else "F77",
        )
    probe.detail(f"nvcc of CUDA {found} in {seen.home}")


@check(
    "env.toolkit",
    title="nvcc is of the declared CUDA, whole, and where CUDA_HOME and PATH lead",
    tier=1,
    modes=("F77", "F79"),
)
def toolkit(probe: Probe) -> None:
    """Ask nvcc for its version, and see that what it needs lies beside it."""
    judge_toolkit(probe, _toolkit(), _declared_toolkit(probe))


def _declared_toolkit(probe: Probe) -> str:
    declared = probe.declared.get("toolkit")
    if not declared:
        probe.skip(Skip.NOT_THIS_KIND, "the image declares no CUDA toolkit")
    return str(declared)


# ----------------------------------------------------------------------------------------------------
# Extensions

_CPP = """
#include <torch/extension.h>

at::Tensor scaled_sum(const at::Tensor& x, const at::Tensor& y, double scale) {
  return x * scale + y;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("scaled_sum", &scaled_sum);
}
"""
# Not torch/extension.h, which alone takes g++ three times as long as all of this; the other extension includes it.
_BINDING = """
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/utils/pybind.h>

void launch(const float* x, const float* y, float* out, double* total, float scale, int64_t size, cudaStream_t stream);

std::tuple<at::Tensor, at::Tensor> scaled_sum(const at::Tensor& x, const at::Tensor& y, double scale) {
  TORCH_CHECK(x.is_cuda() && y.is_cuda(), "x and y must be CUDA tensors");
  TORCH_CHECK(x.scalar_type() == at::kFloat && y.scalar_type() == at::kFloat, "x and y must be fp32");
  TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel(), "x and y must be alike");
  const c10::cuda::CUDAGuard guard(x.device());
  auto out = at::empty_like(x);
  auto total = at::zeros({}, x.options().dtype(at::kDouble));
  launch(x.data_ptr<float>(), y.data_ptr<float>(), out.data_ptr<float>(), total.data_ptr<double>(),
         static_cast<float>(scale), x.numel(), at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, total};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("scaled_sum", &scaled_sum);
  module.def("toolkit", [] { return CUDART_VERSION; });
}
"""
_KERNEL = """
#include <cub/block/block_reduce.cuh>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kThreads = 256;

__global__ void scaled_sum(const float* x, const float* y, float* out, double* total, float scale, int64_t size) {
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage shared;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float value = 0.0f;
  if (at < size) {
    value = scale * x[at] + y[at];
    out[at] = value;
  }
  const double sum = Reduce(shared).Sum(value);
  if (threadIdx.x == 0) {
    atomicAdd(total, sum);
  }
}

void launch(const float* x, const float* y, float* out, double* total, float scale, int64_t size, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  if (blocks > 0) {
    scaled_sum<<<blocks, kThreads, 0, stream>>>(x, y, out, total, scale, size);
  }
}
"""
_SIZE = 100_003
"""Elements; odd, so that the last block is not full."""
_COMPILERS = "apt-get install g++ libc6-dev libpython3-dev, and pip install ninja"


def _built(probe: Probe, name: str, sources: Mapping[str, str], *, cuda: bool) -> Any:  # noqa: ANN401 (a module)
    """Compile, link and load an extension in the run's scratch; one that was built there before is only loaded."""
    folder = os.path.join(probe.request.scratch, name)  # noqa: PTH118
    # What the compilers write meanwhile goes there as well.
    os.environ["TMPDIR"] = probe.request.scratch
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    paths: List[str] = []
    for file, text in sources.items():
        paths.append(os.path.join(folder, file))  # noqa: PTH118
        if not os.path.exists(paths[-1]):  # noqa: PTH110
            with open(paths[-1], "w", encoding="ascii") as source:  # noqa: PTH123
                source.write(text)
    from torch.utils import cpp_extension

    begun = time.monotonic()
    try:
        module = cpp_extension.load(name, paths, build_directory=folder, with_cuda=cuda)
    except (RuntimeError, OSError, ImportError) as error:
        _not_built(probe, "CUDA" if cuda else "C++", str(error), cuda=cuda)
    probe.metric("build", time.monotonic() - begun, "s", better="lower")
    return module


def _not_built(probe: Probe, kind: str, error: str, *, cuda: bool) -> NoReturn:
    """Tell the first lines that name an error, and of a known one the cause."""
    known = next(explain.matches(error), None)
    lines = [line for line in error.splitlines() if re.search(r"\berror\b|cannot find|not found|[Rr]equired", line)]
    probe.stop(
        f"a {kind} extension cannot be built",
        why="\n".join([*(lines[:4] or error.splitlines()[-4:]), *([known.cause] if known else [])]),
        remedy=known.remedy if known else (_REINSTALL if cuda else _COMPILERS),
        mode=known.mode if known else "",
        blame=Blame(known.blame) if known else Blame.IMAGE,
    )


@check(
    "env.cpp-extension",
    title="a C++ extension compiles, links, loads and computes",
    tier=1,
    needs=("run.import",),
    deadline_s=900,
    modes=("F49",),
)
def cpp_extension(probe: Probe) -> None:
    """Build a function of tensors with g++ and ninja, and take a gradient through it."""
    if "ninja" not in probe.declared.get("expect", {}).get("packages", {}):
        probe.skip(Skip.NOT_THIS_KIND, "the image does not declare ninja, by which torch builds extensions")
    import torch

    module = _built(probe, "torchyard_cpp", {"extension.cpp": _CPP}, cuda=False)
    x = torch.arange(7.0, requires_grad=True)
    out = module.scaled_sum(x, torch.ones(7), 3.0)
    out.sum().backward()
    judge_cpp(probe, out.tolist(), [] if x.grad is None else x.grad.tolist())


def judge_cpp(probe: Probe, out: Sequence[float], gradient: Sequence[float]) -> None:
    """Hold the function, and the gradient that torch takes through it, to whole numbers."""
    if list(out) != [3.0 * number + 1.0 for number in range(7)] or list(gradient) != [3.0] * 7:
        probe.fail(
            "a C++ extension computes something else than torch",
            why=f"3x + 1 of 0…6 is {out}, its gradient {gradient}",
            remedy="see that g++ and torch agree: torch.compiled_with_cxx11_abi(), CXX, CXXFLAGS",
        )
    probe.detail("3x + 1, and its gradient, by a function that g++ compiled")


def _architecture(probe: Probe) -> str:
    """Return the GPU architecture to compile for, "9.0": the one that is there, or else the lowest that torch has."""
    import torch

    if probe.device.startswith("cuda") and torch.cuda.is_available():
        return ".".join(map(str, torch.cuda.get_device_capability(probe.device)))
    found = lowest(facts._architectures())  # noqa: SLF001
    if found is None:
        probe.stop(
            "this torch has no code for any GPU, and the image declares a CUDA toolkit",
            why=f"torch {torch.__version__} was built without CUDA",
            remedy="install the torch of the toolkit's CUDA",
            mode="F19",
        )
    return found


def lowest(names: Sequence[str]) -> Optional[str]:
    """Return the lowest of architectures in torch's spelling as a compute capability: sm_75 is "7.5"."""
    numbers = [int(found.group(1)) for name in names for found in [re.fullmatch(r"sm_(\d+)", name)] if found]
    return f"{min(numbers) // 10}.{min(numbers) % 10}" if numbers else None


@check(
    "env.cuda-extension",
    title="a CUDA extension compiles, links and loads",
    tier=1,
    needs=("run.import", "env.toolkit"),
    deadline_s=900,
    modes=("F19", "F77", "F79"),
)
def cuda_extension(probe: Probe) -> None:
    """Build a kernel and its binding for one architecture; without a GPU it is not started."""
    declared = _declared_toolkit(probe)
    module, wanted = _cuda_extension(probe)
    try:
        import torch

        module.scaled_sum(torch.ones(1), torch.ones(1), 1.0)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    judge_module(probe, module.toolkit(), refusal, declared)
    judge_code(probe, _code(module.__file__), wanted)
    probe.detail(f"a kernel for sm_{wanted.replace('.', '')}, bound and loaded")


def _cuda_extension(probe: Probe) -> Any:  # noqa: ANN401 (a module, and the architecture it has code for)
    wanted = _architecture(probe)
    os.environ["TORCH_CUDA_ARCH_LIST"] = wanted
    return _built(probe, "torchyard_cuda", {"binding.cpp": _BINDING, "kernel.cu": _KERNEL}, cuda=True), wanted


def judge_module(probe: Probe, number: int, refusal: str, declared: str) -> None:
    """Judge what the module says without a GPU: the CUDA of its headers, and that it refuses tensors of the CPU."""
    headers = f"{number // 1000}.{number % 1000 // 10}"
    probe.saw(headers=headers, refusal=refusal.partition("\n")[0])
    if headers != declared:
        probe.fail(
            f"the extension was compiled with headers of CUDA {headers}",
            why=f"declared: {declared}; another toolkit's cuda_runtime.h is found first",
            remedy="unset CPATH, CPLUS_INCLUDE_PATH and CUDA_INC_PATH; remove the other toolkit",
        )
    if "must be CUDA tensors" not in refusal:
        probe.fail("the extension takes tensors of the CPU", why=refusal[:400] or "it raised nothing")


def _code(library: str) -> Optional[Sequence[str]]:
    """Return the architectures that a library has machine code for; None if nothing here can tell."""
    program = shutil.which("cuobjdump", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))  # noqa: PTH118
    if program is None:
        return None
    done = subprocess.run(
        [program, "--list-elf", library], capture_output=True, text=True, errors="replace", timeout=_LOOK_S, check=False
    )
    return sorted(set(re.findall(r"\bsm_\d+", done.stdout)))


def judge_code(probe: Probe, found: Optional[Sequence[str]], wanted: str) -> None:
    """Judge whether the library holds machine code for what it was compiled for."""
    if found is None:
        return
    probe.saw(code=list(found))
    if f"sm_{wanted.replace('.', '')}" not in found:
        probe.fail(
            f"the extension holds no code for compute capability {wanted}, for which it was compiled",
            why=f"it holds {', '.join(found) or 'none at all'}",
            remedy=_REINSTALL,
        )


@check(
    "dev.extension",
    title="a kernel that was compiled here computes on the GPU",
    tier=2,
    needs=("env.cuda-extension", "dev.available"),
    deadline_s=900,
    modes=("F43",),
)
def extension_on_gpu(probe: Probe) -> None:
    """Run the kernel on whole numbers, of which fp32 holds every result exactly."""
    import torch

    module, _ = _cuda_extension(probe)
    x, y = (torch.arange(_SIZE) % number for number in (251, 127))
    out, total = module.scaled_sum(x.float().to(probe.device), y.float().to(probe.device), 3.0)
    wanted = 3 * x + y
    judge_kernel(probe, wrong=int((out.cpu().long() != wanted).sum()), total=total.item(), wanted=int(wanted.sum()))


def judge_kernel(probe: Probe, *, wrong: int, total: float, wanted: int) -> None:
    """Hold a kernel to exact results."""
    if wrong or total != wanted:
        probe.fail(
            "a kernel that was compiled here computes wrongly",
            why=f"{wrong} of {_SIZE} elements differ; their sum is {total:.0f}, not {wanted}",
            remedy="compile for this GPU (TORCH_CUDA_ARCH_LIST); if it stays, see dev.health and num.gemm",
            blame=Blame.UNKNOWN,
        )
    probe.detail(f"{_SIZE} elements and their sum, exactly")
