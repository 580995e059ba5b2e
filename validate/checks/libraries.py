"""The CUDA libraries that torch calls, each by an operation whose result is checked against fp64 on the CPU: T2."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from validate import explain, facts, numerics
from validate.check import Probe, check
from validate.numerics import Error, Tolerance
from validate.verdict import Blame

if TYPE_CHECKING:
    import torch

CONV_FP32 = Tolerance(2e-5, 1e-4)
"""Of a convolution in fp32: Winograd's transforms lose a digit; TF32, which must not be used here, loses more."""


def strict(torch: Any) -> None:  # noqa: ANN401
    """Let this process compute fp32 in fp32: no TF32 anywhere."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _expected(probe: Probe) -> Mapping[str, Any]:
    """Return what was declared of the environment; empty where nothing was."""
    declared: Mapping[str, Any] = (probe.request.declared or {}).get("expect") or {}
    return declared


# ----------------------------------------------------------------------------------------------------
# cuDNN


@check(
    "lib.cudnn",
    title="cuDNN is the declared one, and its convolutions are right",
    tier=2,
    needs=("dev.available",),
    modes=("F01", "F03", "F04", "F09"),
)
def cudnn(probe: Probe) -> None:
    """Convolve forward and backward in fp32, fp16 and bf16, with cuDNN and without."""
    import torch

    on_gpu = probe.device.startswith("cuda")
    strict(torch)
    found = torch.backends.cudnn.version()
    judge_cudnn_version(found, _expected(probe).get("cudnn_number"), probe, on_gpu=on_gpu)
    backends: Dict[str, str] = {}
    errors: Dict[str, float] = {}
    for name in ("fp32", "fp16", "bf16"):
        for enabled in (True, False):
            torch.backends.cudnn.enabled = enabled
            what = f"{name} {'with' if enabled else 'without'} cuDNN"
            backends[what], measured = _convolve(numerics.dtypes()[name], probe.device)
            for part, error in measured.items():
                errors[f"{what}, {part}"] = error.norm
                tolerance = CONV_FP32 if name == "fp32" else numerics.TOLERANCES[name]
                if name != "fp32" and part != "forward":
                    # Without cuDNN there is a rounded matrix between the product and the sum.
                    tolerance = Tolerance(2 * tolerance.soft, 2 * tolerance.hard)
                numerics.judge(
                    probe,
                    f"the convolution in {what}, {part},",
                    error,
                    tolerance,
                    remedy="compare with the other rows of this check's evidence: they tell cuDNN from the rest",
                )
    if on_gpu:
        # bf16 is convolved by cuDNN from compute capability 8.0 on.
        bf16 = torch.cuda.get_device_capability(probe.device) >= (8, 0)
        judge_backends({what: it for what, it in backends.items() if bf16 or "bf16" not in what}, probe)
    files = sorted(path for name, path in facts._loaded_libraries().items() if name.startswith("libcudnn"))  # noqa: SLF001
    judge_cudnn_files(files, probe)
    probe.saw(cudnn=found, backends=backends, errors=errors, files=files)
    probe.detail(f"cuDNN {numbered(found)}, worst relative error {max(errors.values()):.1e}")


def numbered(number: Optional[int]) -> str:
    """Return cuDNN's number as a version: 91002 as 9.10.2; until cuDNN 8 a major counted 1000."""
    if number is None:
        return "none"
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def judge_cudnn_version(found: Optional[int], declared: Optional[int], probe: Probe, *, on_gpu: bool) -> None:
    """Judge the loaded cuDNN's number against the declared one."""
    if found is None and (on_gpu or declared is not None):
        probe.fail(
            "torch finds no cuDNN",
            why=f"declared: {numbered(declared)}",
            remedy="install the nvidia-cudnn package that torch's metadata names",
        )
    elif found is not None and declared is not None and found != declared:
        probe.fail(
            "another cuDNN than the declared one is loaded",
            why=f"loaded: {numbered(found)}, declared: {numbered(declared)}",
            remedy="drop LD_LIBRARY_PATH; remove the second cuDNN (apt-get purge 'libcudnn*', or its package)",
            mode="F04",
        )


def judge_backends(backends: Mapping[str, str], probe: Probe) -> None:
    """Judge which code convolved: with cuDNN it must be cuDNN, without it something else."""
    for what, backend in backends.items():
        if backend and ("cudnn" in backend.lower()) != (" with cuDNN" in what):
            probe.fail(
                f"the convolution in {what} was computed by {backend}",
                why="torch did not choose what it was told to",
                remedy="see whether cuDNN supports this GPU: from 9.11 on it needs compute capability 7.5",
            )


def judge_cudnn_files(files: Sequence[str], probe: Probe) -> None:
    """Judge where cuDNN's parts were loaded from: a mixture of two of them breaks sooner or later."""
    folders = sorted({os.path.dirname(path) for path in files})  # noqa: PTH120
    if len(folders) > 1:
        probe.fail(
            "parts of different cuDNNs are loaded",
            why=", ".join(folders),
            remedy="remove the system's cuDNN (apt-get purge 'libcudnn*'); drop LD_LIBRARY_PATH",
            mode="F03",
        )


def _convolve(dtype: torch.dtype, device: str) -> Tuple[str, Dict[str, Error]]:
    """Return what convolved, and the errors of the output and of the gradients; sizes are odd and fill no tile."""
    import torch

    image = numerics.normal(4, 33, 29, 31, seed=1, dtype=dtype, device=device).requires_grad_()
    weight = numerics.normal(47, 33, 3, 3, seed=2, dtype=dtype, device=device, scale=0.06).requires_grad_()
    out = torch.nn.functional.conv2d(image, weight, padding=1)
    gradient = numerics.normal(*out.shape, seed=3, dtype=dtype, device=device)
    gradients = torch.autograd.grad(out, (image, weight), gradient)
    image64, weight64 = (it.detach().double().cpu().requires_grad_() for it in (image, weight))
    # A matrix product of patches: nothing of a convolution library.
    patches = torch.nn.functional.unfold(image64, 3, padding=1)
    out64 = (weight64.flatten(1) @ patches).view(out.shape)
    gradients64 = torch.autograd.grad(out64, (image64, weight64), gradient.double().cpu())
    errors = {"forward": numerics.error(out.detach(), out64.detach())}
    for name, found, wanted in zip(("gradient of the input", "gradient of the weight"), gradients, gradients64):
        errors[name] = numerics.error(found, wanted)
    return _backend(torch, image, weight), errors


def _backend(torch: Any, image: Any, weight: Any) -> str:  # noqa: ANN401
    """Return which code torch chooses for this convolution; "" where this torch does not tell."""
    choose = getattr(torch._C, "_select_conv_backend", None)  # noqa: SLF001
    try:
        # Bias, stride, padding, dilation, transposed, output padding, groups, size of the bias.
        arguments = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, None)
        return str(choose(image, weight, *arguments)) if choose else ""
    except (RuntimeError, TypeError):
        return ""


# ----------------------------------------------------------------------------------------------------
# cuBLAS, cuFFT, cuSOLVER, cuSPARSE, cuRAND

Looks = Callable[[str], Mapping[str, Tuple[Error, Tolerance]]]
"""Computes on a device, and returns the error of each result with its tolerance."""


def _cublas(device: str) -> Mapping[str, Tuple[Error, Tolerance]]:
    import torch

    found = {}
    for name in ("fp64", "fp32"):
        left = numerics.normal(129, 513, seed=4, dtype=numerics.dtypes()[name], device=device)
        right = numerics.normal(65, 513, seed=5, dtype=numerics.dtypes()[name], device=device)
        bias = numerics.normal(65, seed=6, dtype=numerics.dtypes()[name], device=device)
        # With a bias it is cublasLt's.
        out = torch.nn.functional.linear(left, right, bias)
        wanted = left.double().cpu() @ right.double().cpu().T + bias.double().cpu()
        found[f"linear in {name}"] = numerics.error(out, wanted), numerics.TOLERANCES[name]
        batch = torch.bmm(left.view(3, 43, 513), right.view(5, 13, 513)[:3].mT)
        wanted = left.double().cpu().view(3, 43, 513) @ right.double().cpu().view(5, 13, 513)[:3].mT
        found[f"batched product in {name}"] = numerics.error(batch, wanted), numerics.TOLERANCES[name]
    return found


def _cufft(device: str) -> Mapping[str, Tuple[Error, Tolerance]]:
    import torch

    signal = numerics.normal(7, 1000, seed=7, dtype=torch.float64, device=device)
    image = numerics.normal(3, 255, 91, seed=8, dtype=torch.float32, device=device)
    spectrum = torch.fft.rfft2(image)
    wanted = torch.fft.rfft2(image.double().cpu())
    # By the definition, which no library computes by.
    angle = torch.outer(torch.arange(1000.0, dtype=torch.float64), torch.arange(1000.0, dtype=torch.float64))
    matrix = torch.polar(torch.ones_like(angle), -2 * torch.pi * (angle % 1000) / 1000)
    defined = signal.cpu().to(torch.complex128) @ matrix
    return {
        "fft in fp64": (
            numerics.error(torch.view_as_real(torch.fft.fft(signal)), torch.view_as_real(defined)),
            Tolerance(1e-12, 1e-11),
        ),
        "rfft2 in fp32": (
            numerics.error(torch.view_as_real(spectrum), torch.view_as_real(wanted)),
            numerics.TOLERANCES["fp32"],
        ),
        "irfft2 in fp32": (
            numerics.error(torch.fft.irfft2(spectrum, s=image.shape[1:]), image.double()),
            numerics.TOLERANCES["fp32"],
        ),
    }


def _cusolver(device: str) -> Mapping[str, Tuple[Error, Tolerance]]:
    import torch

    # Jacobi's way to singular values ends a little before the last digit.
    tolerance = Tolerance(1e-11, 1e-10)
    square = numerics.normal(131, 131, seed=9, dtype=torch.float64, device=device)
    definite = square @ square.mT / 131 + torch.eye(131, dtype=torch.float64, device=device)
    right = numerics.normal(131, 3, seed=10, dtype=torch.float64, device=device)
    factor = torch.linalg.cholesky(definite)
    solution = torch.linalg.solve(definite, right)
    values, vectors = torch.linalg.eigh(definite)
    left, singular, adjoint = torch.linalg.svd(square)
    host = definite.cpu()
    return {
        # Judged on the CPU: a product on the GPU that fails in the same way would hide it.
        "Cholesky": (numerics.error(factor.cpu() @ factor.cpu().mT, host), tolerance),
        "solve (LU)": (numerics.error(host @ solution.cpu(), right.cpu()), tolerance),
        "eigenvalues": (numerics.error((vectors.cpu() * values.cpu()) @ vectors.cpu().mT, host), tolerance),
        "singular values": (numerics.error((left.cpu() * singular.cpu()) @ adjoint.cpu(), square.cpu()), tolerance),
    }


def _cusparse(device: str) -> Mapping[str, Tuple[Error, Tolerance]]:
    import torch

    dense = numerics.normal(257, 129, seed=11, dtype=torch.float64, device=device)
    dense = torch.where(dense > 1, dense, torch.zeros_like(dense))
    right = numerics.normal(129, 33, seed=12, dtype=torch.float64, device=device)
    wanted = dense.cpu() @ right.cpu()
    return {
        "product of CSR": (numerics.error(dense.to_sparse_csr() @ right, wanted), numerics.TOLERANCES["fp64"]),
        "product of COO": (
            numerics.error(torch.sparse.mm(dense.to_sparse(), right), wanted),
            numerics.TOLERANCES["fp64"],
        ),
    }


def _curand(device: str) -> Mapping[str, Tuple[Error, Tolerance]]:
    import torch

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.randn(1 << 20, generator=generator, device=device, dtype=torch.float64)

    drawn, again, other = draw(13), draw(13), draw(14)
    one = torch.ones((), dtype=torch.float64)
    # A million draws: their moments are within 1/1000 of 0, 1 and 3, five times as far is no chance.
    moments = torch.stack([drawn.mean() + 1, drawn.var(), (drawn**4).mean() / 3, (drawn * other).mean() + 1])
    return {
        "the same seed": (numerics.error(again, drawn), Tolerance(0.0, 0.0)),
        "moments of normals": (numerics.error(moments.cpu(), one.expand(4)), Tolerance(5e-3, 1e-2)),
    }


_LIBRARIES: Mapping[str, Looks] = {
    "cuBLAS": _cublas,
    "cuFFT": _cufft,
    "cuSOLVER": _cusolver,
    "cuSPARSE": _cusparse,
    "cuRAND": _curand,
}


@check(
    "lib.math",
    title="cuBLAS, cuFFT, cuSOLVER, cuSPARSE and cuRAND compute rightly",
    tier=2,
    needs=("dev.available",),
    modes=("F05", "F06", "F08", "F10", "F44"),
)
def mathematics(probe: Probe) -> None:
    """Let each compute; in one process, since what is slow is the import of torch."""
    import torch

    strict(torch)
    errors: Dict[str, Dict[str, float]] = {}
    for library, look in _LIBRARIES.items():
        try:
            found = look(probe.device)
        except (RuntimeError, OSError) as raised:
            _broken(library, raised, probe)
            continue
        errors[library] = {name: error.norm for name, (error, _) in found.items()}
        for name, (error, tolerance) in found.items():
            numerics.judge(probe, f"{library}: {name}", error, tolerance, remedy="see dev.health and run.identity")
    probe.saw(errors=errors)
    probe.detail("; ".join(f"{library} {max(its.values()):.0e}" for library, its in errors.items()))


def _broken(library: str, raised: BaseException, probe: Probe) -> None:
    text = str(raised).strip()
    known = next(explain.matches(text), None)
    probe.fail(
        f"{library} does not work",
        why=text.splitlines()[0] if text else type(raised).__name__,
        remedy=known.remedy if known else "reinstall torch with all that its metadata requires; drop LD_LIBRARY_PATH",
        mode=known.mode if known else "",
        blame=Blame(known.blame) if known else Blame.UNKNOWN,
    )


# ----------------------------------------------------------------------------------------------------
# NCCL


@check(
    "lib.nccl",
    title="NCCL is the declared one and makes a communicator",
    tier=2,
    needs=("dev.available",),
    modes=("F01", "F02"),
)
def nccl(probe: Probe) -> None:
    """Use a group of this process alone, over a file; it takes the whole way through NCCL but other GPUs."""
    from datetime import timedelta

    import torch
    from torch import distributed

    on_gpu = probe.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(probe.device)
    store = distributed.FileStore(os.path.join(probe.request.scratch, f"rendezvous-{os.getpid()}"), 1)  # noqa: PTH118
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    sent = torch.arange(1, 100_002, dtype=torch.float32, device=probe.device)
    reduced = sent.clone()
    distributed.all_reduce(reduced)
    gathered = torch.full_like(sent, float("nan"))
    distributed.all_gather([gathered], sent)
    scattered = torch.full_like(sent, float("nan"))
    if on_gpu:
        distributed.reduce_scatter_tensor(scattered, sent)
        torch.cuda.synchronize(probe.device)
    else:
        # gloo, which stands in for NCCL in the tests, cannot scatter sums in every torch.
        distributed.scatter(scattered, [sent])
    for name, out in (("all_reduce", reduced), ("all_gather", gathered), ("reduce_scatter", scattered)):
        judge_exact(name, int((out != sent).sum()), sent.numel(), probe)
    loaded = facts._nccl()  # noqa: SLF001
    compiled = ".".join(str(part) for part in torch.cuda.nccl.version()) if on_gpu else None
    judge_nccl_version(loaded, compiled, _expected(probe).get("nccl"), probe)
    distributed.destroy_process_group()
    probe.saw(loaded=loaded, compiled=compiled)
    probe.detail(f"NCCL {loaded}: all_reduce, all_gather and reduce_scatter of one rank are exact")


def judge_exact(name: str, wrong: int, elements: int, probe: Probe) -> None:
    """Judge a collective of whole numbers: each must be there."""
    if wrong:
        probe.fail(
            f"{name} is wrong",
            why=f"{wrong} of {elements} elements",
            remedy="run again with NCCL_DEBUG=INFO",
            blame=Blame.UNKNOWN,
        )


def judge_nccl_version(loaded: Optional[str], compiled: Optional[str], declared: Optional[str], probe: Probe) -> None:
    """Judge the loaded NCCL against the declared one and against what torch was compiled with."""
    if declared is not None and loaded != declared:
        probe.fail(
            "another NCCL than the declared one is loaded",
            why=f"loaded: {loaded or 'none'}, declared: {declared}",
            remedy="remove the other one: a second nvidia-nccl package, libnccl2 of the system, LD_LIBRARY_PATH",
            mode="F01",
        )
    elif loaded and compiled and _release(loaded) < _release(compiled):
        probe.warn(
            "the loaded NCCL is older than the one torch was compiled with",
            why=f"loaded: {loaded}, compiled with: {compiled}",
            remedy="install the nvidia-nccl package that torch's metadata names",
            mode="F01",
            blame=Blame.IMAGE,
        )


def _release(version: str) -> List[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


# ----------------------------------------------------------------------------------------------------
# NVRTC

_SOURCE = """
template <typename T> T validated(T x, T y, T factor) {
    return x * x - factor * y;
}
"""


@check(
    "lib.nvrtc",
    title="NVRTC compiles a kernel while the program runs",
    tier=2,
    needs=("dev.available",),
    modes=("F07", "F46"),
)
def nvrtc(probe: Probe) -> None:
    """Compile as torch's own operations do; torch.cuda._compile_kernel would want a CUDA toolkit's headers."""
    import time

    import torch
    from torch.cuda import jiterator

    # A kernel kept from an earlier run would be loaded and not compiled.
    os.environ["USE_PYTORCH_KERNEL_CACHE"] = "0"
    left = numerics.normal(100_003, seed=15, dtype=torch.float32, device=probe.device)
    right = numerics.normal(100_003, seed=16, dtype=torch.float32, device=probe.device)
    started = time.perf_counter()
    try:
        out = jiterator._create_jit_fn(_SOURCE, factor=0.5)(left, right)  # noqa: SLF001
    except RuntimeError as raised:
        judge_nvrtc(str(raised), probe)
        return
    if probe.device.startswith("cuda"):
        torch.cuda.synchronize(probe.device)
    seconds = time.perf_counter() - started
    error = numerics.error(out, left.double().cpu().square() - 0.5 * right.double().cpu())
    numerics.judge(probe, "a kernel compiled by NVRTC", error, numerics.TOLERANCES["fp32"], remedy="see dev.health")
    probe.metric("compile", seconds, "s", better="lower")
    probe.detail(f"compiled and run in {seconds:.2f} s, relative error {error.norm:.0e}")


def judge_nvrtc(message: str, probe: Probe) -> None:
    """Judge what NVRTC, or the driver that loads what it made, says is wrong."""
    line = message.strip().splitlines()[0] if message.strip() else "no message"
    known = next(explain.matches(message), None)
    if "toolchain" in message:
        probe.stop(
            "the driver cannot load what NVRTC compiled",
            why=line,
            remedy="update the host's driver to the one of torch's CUDA (drv.floor)",
            mode="F46",
            blame=Blame.HOST,
        )
    probe.stop(
        "NVRTC cannot compile a kernel",
        why=line,
        remedy=known.remedy
        if known
        else "install the nvidia-cuda-nvrtc package that torch's metadata names, at that version",
        mode=known.mode if known else "F07",
    )
