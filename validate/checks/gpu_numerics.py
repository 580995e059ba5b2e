"""Is what the GPU computes right: products, layers, attention, mixed precision, compiled code, twice the same: T2."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence, Tuple

from validate import numerics
from validate.check import Probe, check
from validate.checks.libraries import CONV_FP32, strict
from validate.numerics import Error, Tolerance
from validate.verdict import Blame

if TYPE_CHECKING:
    import torch

_SICK = "run the check again; if it fails on other GPUs of this kind, too, report it to PyTorch; if not, see dev.health"
_SWITCHES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that change by what fp32 is computed."""


def _wider(tolerance: Tolerance, times: float) -> Tolerance:
    return Tolerance(times * tolerance.soft, times * tolerance.hard)


# ----------------------------------------------------------------------------------------------------
# Matrix products

_DEPTHS = (512, 4096)
_SHAPES = ((256, 512), (257, 511))
"""Rows and columns: whole tiles, and sizes that fill none."""


@check(
    "num.gemm",
    title="matrix products are right, and computed by what was asked for",
    tier=2,
    needs=("dev.available",),
    modes=("F56",),
)
def gemm(probe: Probe) -> None:
    """Multiply in fp64, fp32, TF32, fp16 and bf16; the error also tells what computed it."""
    import torch

    matmul = torch.backends.cuda.matmul
    switches = {name: os.environ[name] for name in _SWITCHES if name in os.environ}
    errors: Dict[str, float] = {}

    def look(path: str, dtype: torch.dtype) -> Error:
        worst = Error(0.0, 0.0)
        for depth in _DEPTHS:
            for rows, columns in _SHAPES:
                found = _product(rows, depth, columns, dtype, probe.device)
                errors[f"{path} {rows}x{depth}x{columns}"] = found.norm
                worst = max(worst, found, key=lambda it: max(it.norm, it.peak / numerics.PEAK))
        return worst

    by_default = look("fp32 as set", torch.float32)
    strict(torch)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    numerics.judge(probe, "the product in fp64", look("fp64", torch.float64), numerics.TOLERANCES["fp64"], remedy=_SICK)
    fp32 = look("fp32", torch.float32)
    judge_engine(fp32, switches, probe)
    judge_default(by_default, fp32, switches, probe)
    matmul.allow_tf32 = True
    tf32 = look("tf32", torch.float32)
    numerics.judge(probe, "the product in TF32", tf32, numerics.TOLERANCES["tf32"], remedy=_SICK)
    matmul.allow_tf32 = False
    for name in ("fp16", "bf16"):
        dtype = numerics.dtypes()[name]
        numerics.judge(probe, f"the product in {name}", look(name, dtype), numerics.TOLERANCES[name], remedy=_SICK)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    for name in ("fp16", "bf16"):
        found = look(f"{name} reduced", numerics.dtypes()[name])
        what = f"the product in {name} with reductions in {name}"
        # Sums of parts may be rounded as well, that is what was allowed.
        numerics.judge(probe, what, found, _wider(numerics.TOLERANCES[name], 2), remedy=_SICK)
    engines = {"off": numerics.engine(fp32.norm), "on": numerics.engine(tf32.norm)}
    probe.saw(errors=errors, tf32=engines, switches=switches)
    probe.detail(
        f"fp32 by {engines['off']}, with TF32 allowed by {engines['on']}; error {fp32.norm:.1e}, {tf32.norm:.1e}"
    )


def _product(rows: int, depth: int, columns: int, dtype: torch.dtype, device: str) -> Error:
    import torch

    left, right, reference = _factors(rows, depth, columns, dtype)
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=device)
    torch.mm(left.to(device), right.to(device), out=out)
    return numerics.error(out, reference)


@functools.cache
def _factors(
    rows: int, depth: int, columns: int, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two factors and their product in fp64, on the CPU."""
    left = numerics.normal(rows, depth, seed=rows + depth, dtype=dtype)
    right = numerics.normal(depth, columns, seed=columns + depth + 1, dtype=dtype)
    return left, right, left.double() @ right.double()


def judge_engine(error: Error, switches: Mapping[str, str], probe: Probe) -> None:
    """Judge a product in fp32 for which TF32 was switched off."""
    used = numerics.engine(error.norm)
    if used in ("tf32", "bf16"):
        probe.fail(
            f"fp32 is computed in {used.upper()} although that is switched off",
            why=f"relative error {error.norm:.1e}; fp32 gives 3e-7. {_told(switches)}",
            remedy="unset NVIDIA_TF32_OVERRIDE",
            mode="F56",
        )
    else:
        numerics.judge(probe, "the product in fp32", error, numerics.TOLERANCES["fp32"], remedy=_SICK)


def judge_default(by_default: Error, fp32: Error, switches: Mapping[str, str], probe: Probe) -> None:
    """Judge what a product in fp32 is computed by if a program says nothing."""
    used = numerics.engine(by_default.norm)
    if used != "fp32" and numerics.engine(fp32.norm) == "fp32":
        probe.warn(
            f"fp32 is computed in {used.upper() if used else 'something else'} unless a program switches that off",
            why=f"relative error {by_default.norm:.1e}; torch's own default gives 3e-7. {_told(switches)}",
            remedy="unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, if results must be those of other machines",
            mode="F56",
            blame=Blame.IMAGE,
        )


def _told(switches: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in switches.items()) or "No variable says so"


# ----------------------------------------------------------------------------------------------------
# Layers and reductions


def _operations() -> Mapping[str, Tuple[Callable[..., Any], Tuple[Tuple[int, ...], ...]]]:
    """Return operations, each with the shapes of its inputs; their sizes are odd, so that tails are computed, too."""
    import torch
    from torch.nn import functional

    rows = torch.arange(37) * 7 % 101

    return {
        "conv1d": (lambda x, w: functional.conv1d(x, w, padding=2, stride=2), ((3, 13, 257), (17, 13, 5))),
        "conv2d in groups": (lambda x, w: functional.conv2d(x, w, groups=11), ((2, 11, 37, 41), (22, 1, 3, 3))),
        "conv_transpose2d": (
            lambda x, w: functional.conv_transpose2d(x, w, stride=2),
            ((2, 13, 19, 23), (13, 7, 3, 3)),
        ),
        "layer_norm": (lambda x, w, b: functional.layer_norm(x, (1023,), w, b), ((65, 1023), (1023,), (1023,))),
        "group_norm": (lambda x, w, b: functional.group_norm(x, 3, w, b), ((5, 33, 17, 19), (33,), (33,))),
        "batch_norm": (
            lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
            ((9, 31, 17, 13), (31,), (31,)),
        ),
        "softmax": (lambda x: functional.softmax(x, -1), ((129, 1025),)),
        "log_softmax": (lambda x: functional.log_softmax(x, -1), ((129, 1025),)),
        "gelu": (functional.gelu, ((129, 1025),)),
        "silu": (functional.silu, ((129, 1025),)),
        "sum": (lambda x: x.sum(-1), ((129, 4097),)),
        "sum over columns": (lambda x: x.sum(0), ((4097, 129),)),
        "var": (lambda x: x.var(-1), ((129, 4097),)),
        "logsumexp": (lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).logsumexp(-1), ((129, 4097),)),
        "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), ((129, 4097),)),
        "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2, 1), ((3, 5, 37, 41),)),
        "embedding": (lambda w: functional.embedding(rows.to(w.device), w), ((101, 65),)),
    }


def _exact() -> Mapping[str, Callable[[Any], Any]]:
    """Return operations whose result has no rounding: each element must be there."""
    return {
        "sort": lambda x: x.sort(-1).values,
        "argmax": lambda x: x.argmax(-1),
        "topk": lambda x: x.topk(17, -1).values,
        "amax": lambda x: x.amax(-1),
        "transpose": lambda x: x.transpose(0, 1).contiguous(),
        "cumsum of whole numbers": lambda x: _whole(x).cumsum(-1),
        "index_add of whole numbers": _index_add,
        "where": lambda x: x.where(x > 0.25, -x),
    }


def _whole(x: Any) -> Any:  # noqa: ANN401
    """Return whole numbers, none of which is -0.0: whether a sum of those keeps the sign is up to its order."""
    return (x * 8).round() + 0.0


def _index_add(x: Any) -> Any:  # noqa: ANN401
    import torch

    places = torch.arange(x.shape[0], device=x.device) % 7
    return x.new_zeros(7, x.shape[1]).index_add_(0, places, _whole(x))


@check(
    "num.ops",
    title="convolutions, norms, softmax and reductions are right, their gradients, too",
    tier=2,
    needs=("dev.available",),
)
def operations(probe: Probe) -> None:
    """Compare outputs and gradients in fp32, fp16 and bf16 with fp64 on the CPU, from the same rounded inputs."""
    import torch

    strict(torch)
    errors: Dict[str, float] = {}
    for name, (operation, shapes) in _operations().items():
        for kind in ("fp32", "fp16", "bf16"):
            found = _compare(operation, shapes, numerics.dtypes()[kind], probe.device)
            errors[f"{name} in {kind}"] = max(it.norm for it in found.values())
            tolerance = CONV_FP32 if kind == "fp32" and "conv" in name else numerics.TOLERANCES[kind]
            for part, error in found.items():
                # A gradient is made of what was rounded already.
                wider = tolerance if part == "output" or kind == "fp32" else _wider(tolerance, 2)
                numerics.judge(probe, f"{name} in {kind}, {part},", error, wider, remedy=_SICK)
    # Sums of whole numbers up to 4097·40 are exact in fp32.
    sample = numerics.normal(129, 4097, seed=31, dtype=torch.float32)
    for name, exact in _exact().items():
        judge_exact(name, numerics.digest(exact(sample.to(probe.device))), numerics.digest(exact(sample)), probe)
    worst = max(errors, key=lambda name: errors[name])
    probe.saw(errors=errors, exact=sorted(_exact()))
    probe.detail(f"{len(errors)} compared, {len(_exact())} exact; largest relative error {errors[worst]:.1e}: {worst}")


def _compare(
    operation: Callable[..., Any], shapes: Sequence[Tuple[int, ...]], dtype: torch.dtype, device: str
) -> Dict[str, Error]:
    """Return the errors of the output and of the gradient of each input."""
    import torch

    inputs = [
        numerics.normal(*shape, seed=20 + number, dtype=dtype, device=device).requires_grad_()
        for number, shape in enumerate(shapes)
    ]
    out = operation(*inputs)
    direction = numerics.normal(*out.shape, seed=29, dtype=out.dtype, device=device)
    gradients = torch.autograd.grad(out, inputs, direction)
    truths = [it.detach().double().cpu().requires_grad_() for it in inputs]
    true_out = operation(*truths)
    true_gradients = torch.autograd.grad(true_out, truths, direction.double().cpu())
    errors = {"output": numerics.error(out.detach(), true_out.detach())}
    for number, (gradient, true) in enumerate(zip(gradients, true_gradients)):
        errors[f"gradient {number}"] = numerics.error(gradient, true)
    return errors


def judge_exact(name: str, found: str, wanted: str, probe: Probe) -> None:
    """Judge digests of what must be equal bit for bit."""
    if found != wanted:
        probe.fail(f"{name} differs between the GPU and the CPU", why=f"{found[:16]}, {wanted[:16]}", remedy=_SICK)


# ----------------------------------------------------------------------------------------------------
# Attention

_BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
_REFUSAL = re.compile("No available kernel|No viable backend")
_CASES = ("full", "causal", "grouped")
"""grouped: two heads of queries to one of keys."""


@check(
    "num.sdpa",
    title="attention is right in each of its implementations, forward and backward",
    tier=2,
    needs=("dev.available",),
    modes=("F57",),
)
def sdpa(probe: Probe) -> None:
    """Force each implementation in turn; one that does not take a case says so, and is not held against it."""
    import torch
    from torch.nn import attention

    strict(torch)
    ran: Dict[str, List[str]] = {}
    refused: Dict[str, str] = {}
    for kind in ("fp32", "fp16", "bf16"):
        for case in _CASES:
            what = f"{kind} {case}"
            ran[what] = []
            for name in _BACKENDS:
                backend = getattr(attention.SDPBackend, name, None)
                if backend is None:
                    continue
                try:
                    with attention.sdpa_kernel(backend):
                        errors = _attend(case, numerics.dtypes()[kind], probe.device)
                except RuntimeError as raised:
                    refused[f"{what} {name}"] = str(raised).strip().splitlines()[0]
                    continue
                ran[what].append(name)
                for part, error in errors.items():
                    tolerance = numerics.TOLERANCES[kind]
                    # The probabilities are rounded before they are used; gradients are made of them.
                    wider = _wider(tolerance, 1.5 if part == "output" else 3)
                    numerics.judge(probe, f"{name}, {what}, {part},", error, wider, remedy=_SICK)
    fused = not probe.device.startswith("cuda") or torch.cuda.get_device_capability(probe.device) >= (8, 0)
    judge_backends(ran, refused, probe, fused=fused)
    probe.saw(ran=ran, refused=refused)
    probe.detail(
        "; ".join(f"{what}: {', '.join(name.split('_')[0].lower() for name in names)}" for what, names in ran.items())
    )


def _attend(case: str, dtype: torch.dtype, device: str) -> Dict[str, Error]:
    import torch

    heads = 2 if case == "grouped" else 4
    shapes = ((2, 4, 193, 64), (2, heads, 193, 64), (2, heads, 193, 64))
    inputs = [
        numerics.normal(*shape, seed=40 + number, dtype=dtype, device=device).requires_grad_()
        for number, shape in enumerate(shapes)
    ]
    # An older torch does not know enable_gqa.
    grouped = {"enable_gqa": True} if case == "grouped" else {}
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=case == "causal", **grouped)
    direction = numerics.normal(*out.shape, seed=43, dtype=dtype, device=device)
    gradients = torch.autograd.grad(out, inputs, direction)
    truths = [it.detach().double().cpu().requires_grad_() for it in inputs]
    true_out = _attention(*truths, causal=case == "causal")
    true_gradients = torch.autograd.grad(true_out, truths, direction.double().cpu())
    errors = {"output": numerics.error(out.detach(), true_out.detach())}
    for name, gradient, true in zip(("queries", "keys", "values"), gradients, true_gradients):
        errors[f"gradient of the {name}"] = numerics.error(gradient, true)
    return errors


def _attention(query: Any, key: Any, value: Any, *, causal: bool) -> Any:  # noqa: ANN401
    """Compute attention by its definition."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
    return torch.softmax(scores, -1) @ value


def judge_backends(ran: Mapping[str, Sequence[str]], refused: Mapping[str, str], probe: Probe, *, fused: bool) -> None:
    """Judge which implementations took which case; `fused` says that the device can do better than MATH in half."""
    for what, names in ran.items():
        if not names:
            probe.fail(
                f"no attention takes {what}",
                why="; ".join(f"{name}: {text}" for name, text in refused.items() if name.startswith(what)),
                remedy="see dev.arch",
                mode="F43",
            )
    half = {what: names for what, names in ran.items() if not what.startswith("fp32") and "grouped" not in what}
    if fused and all(names == ["MATH"] for names in half.values()):
        probe.warn(
            "there is only the slow attention, which keeps the whole matrix of scores in memory",
            why="; ".join(f"{name}: {text}" for name, text in sorted(refused.items()) if name.startswith("bf16")),
            remedy="use a torch that was compiled for this GPU with flash attention",
            mode="F57",
            blame=Blame.IMAGE,
        )
    odd = {name: text for name, text in refused.items() if not _REFUSAL.search(text) and "grouped" not in name}
    if odd:
        probe.warn(
            f"an implementation of attention broke: {', '.join(sorted(odd))}",
            why="; ".join(sorted(set(odd.values()))),
            remedy="torch takes another one; torch.backends.cuda.enable_cudnn_sdp(False) keeps cuDNN's out",
            mode="F57",
        )


# ----------------------------------------------------------------------------------------------------
# Mixed precision

_STEPS = 30


@check("num.amp", title="training in mixed precision works in fp16 and bf16", tier=2, needs=("dev.available",))
def amp(probe: Probe) -> None:
    """Train one small model in fp32, in fp16 with a scaler and in bf16, from the same start on the same data."""
    import torch

    strict(torch)
    losses: Dict[str, List[float]] = {}
    for name in ("fp32", "fp16", "bf16"):
        losses[name], dtype = _train(torch, None if name == "fp32" else numerics.dtypes()[name], probe.device)
        if dtype != str(numerics.dtypes()[name]):
            probe.fail(
                f"autocast to {name} computes in {dtype}", remedy="see whether something replaces torch.autocast"
            )
    for name, its in losses.items():
        judge_training(name, its, losses["fp32"], probe)
    before, after, moved = _overflow(torch, probe.device)
    judge_scaler(before, after, probe, moved=moved)
    probe.saw(losses=losses, scale=[before, after])
    probe.detail("; ".join(f"{name} {its[0]:.3f} → {its[-1]:.3f}" for name, its in losses.items()))


def _model(torch: Any, device: str) -> Any:  # noqa: ANN401
    torch.manual_seed(50)
    layers = torch.nn.Linear(65, 129), torch.nn.GELU(), torch.nn.LayerNorm(129), torch.nn.Linear(129, 33)
    return torch.nn.Sequential(*layers).to(device)


def _scaler(torch: Any, device: str, *, scale: float, enabled: bool = True) -> Any:  # noqa: ANN401
    kind = device.partition(":")[0]
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(kind, init_scale=scale, enabled=enabled)
    # Before torch 2.3.
    return torch.cuda.amp.GradScaler(init_scale=scale, enabled=enabled)


def _train(torch: Any, dtype: Any, device: str) -> Tuple[List[float], str]:  # noqa: ANN401
    """Return the loss of each step, and in what the first layer computed."""
    model = _model(torch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = _scaler(torch, device, scale=1024.0, enabled=dtype is torch.float16)
    inputs = numerics.normal(257, 65, seed=51, dtype=torch.float32, device=device)
    wanted = (inputs.cpu() @ numerics.normal(65, 33, seed=52, dtype=torch.float32, scale=0.1)).to(device)
    losses, computed = [], ""
    for _ in range(_STEPS):
        optimizer.zero_grad()
        casting = torch.autocast(device.partition(":")[0], dtype) if dtype else contextlib.nullcontext()
        with casting:
            computed = str(model[0](inputs).dtype)
            loss = torch.nn.functional.mse_loss(model(inputs).float(), wanted)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    return losses, computed


def _overflow(torch: Any, device: str) -> Tuple[float, float, bool]:  # noqa: ANN401
    """Let a gradient overflow; return the scale before and after, and whether the weights were changed all the same."""
    model = _model(torch, device)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), _scaler(torch, device, scale=1024.0)
    scaler.scale(model(torch.full((3, 65), float("inf"), device=device)).sum()).backward()
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    before = float(scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(old, new) for old, new in zip(kept, model.parameters()))
    return before, float(scaler.get_scale()), moved


def judge_training(name: str, losses: Sequence[float], exact: Sequence[float], probe: Probe) -> None:
    """Judge the losses of a training against those in fp32."""
    # Written so that NaN fails.
    if not losses[-1] < 0.5 * losses[0]:
        probe.fail(
            f"training in {name} does not learn",
            why=f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} steps",
            remedy=_SICK,
            blame=Blame.UNKNOWN,
        )
    elif not abs(losses[0] - exact[0]) <= 0.02 * exact[0] or not abs(losses[-1] - exact[-1]) <= 0.1 * exact[0]:
        probe.fail(
            f"training in {name} goes another way than in fp32",
            why=f"first and last loss {losses[0]:.4g}, {losses[-1]:.4g}; in fp32 {exact[0]:.4g}, {exact[-1]:.4g}",
            remedy=_SICK,
            blame=Blame.UNKNOWN,
        )


def judge_scaler(before: float, after: float, probe: Probe, *, moved: bool) -> None:
    """Judge what GradScaler did with gradients that overflowed: skip the step, and scale less."""
    if moved or not after < before:
        probe.fail(
            "GradScaler takes a step with gradients that overflowed",
            why=f"scale {before:g} → {after:g}; weights {'changed' if moved else 'kept'}",
            remedy=_SICK,
        )


# ----------------------------------------------------------------------------------------------------
# Compiled code


@check(
    "num.compile",
    title="torch.compile makes code for this GPU that is as exact as eager code",
    tier=2,
    needs=("dev.available",),
    modes=("F48", "F49", "F50", "F51"),
)
def compiled(probe: Probe) -> None:
    """Compile with an empty cache, so that it really happens; compare both ways with fp64."""
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ[name] = os.path.join(probe.request.scratch, folder)  # noqa: PTH118
    import time

    import torch
    from torch._dynamo.utils import counters

    strict(torch)
    promised = bool(probe.options["compile"])
    errors: Dict[str, Dict[str, float]] = {}
    started = time.perf_counter()
    for kind in ("fp32", "bf16"):
        try:
            found = _compile(torch, numerics.dtypes()[kind], probe.device)
        except Exception as raised:
            if promised:
                # Known messages are explained by whoever runs the check.
                raise
            probe.warn("torch.compile does not work; it is not promised here", why=str(raised).strip()[:300])
            return
        for part, (made, eager, elements) in found.items():
            errors[f"{kind}, {part}"] = {"compiled": made, "eager": eager}
            judge_compiled(f"{kind}, {part}", made, eager, elements, probe, half=kind == "bf16")
    seconds = time.perf_counter() - started
    graphs = int(counters["stats"]["unique_graphs"])
    if promised:
        judge_graphs(graphs, probe)
    probe.metric("compile", seconds, "s", better="lower")
    probe.saw(rmse=errors, graphs=graphs)
    probe.detail(f"{graphs} graphs, forward and backward, in {seconds:.1f} s")


def _compile(torch: Any, dtype: Any, device: str) -> Dict[str, Tuple[float, float, int]]:  # noqa: ANN401
    """Return, for output and gradients, the errors of compiled and of eager code, and the number of elements."""

    def layer(x: Any, weight: Any, gain: Any) -> Any:  # noqa: ANN401
        hidden = torch.nn.functional.gelu(x @ weight)
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * gain
        return torch.softmax(normed, -1).cumsum(-1) + torch.where(normed > 0, normed, 0.1 * normed)

    inputs = [
        numerics.normal(*shape, seed=60 + number, dtype=dtype, device=device, scale=scale).requires_grad_()
        for number, (shape, scale) in enumerate((((129, 257), 1.0), ((257, 385), 0.06), ((385,), 1.0)))
    ]
    direction = numerics.normal(129, 385, seed=63, dtype=dtype, device=device)

    def run(function: Callable[..., Any], values: Sequence[Any], along: Any) -> Dict[str, Any]:  # noqa: ANN401
        out = function(*values)
        names = ("gradient of x", "gradient of the weight", "gradient of the gain")
        return {"output": out.detach(), **dict(zip(names, torch.autograd.grad(out, values, along)))}

    truth = run(layer, [it.detach().double().cpu().requires_grad_() for it in inputs], direction.double().cpu())
    eager = run(layer, inputs, direction)
    made = run(torch.compile(layer, fullgraph=True, dynamic=False), inputs, direction)
    return {
        name: (numerics.rmse(made[name], true), numerics.rmse(eager[name], true), true.numel())
        for name, true in truth.items()
    }


def judge_compiled(what: str, made: float, eager: float, elements: int, probe: Probe, *, half: bool) -> None:
    """Judge compiled code by its distance from fp64, given that of eager code."""
    if not numerics.as_good(made, eager, half=half, elements=elements):
        probe.fail(
            f"compiled code is less exact than eager code: {what}",
            why=f"root mean square error {made:.2g}, eager {eager:.2g}",
            remedy="report it to PyTorch with torch._inductor's minifier; until then compile with backend='aot_eager'",
        )


def judge_graphs(graphs: int, probe: Probe) -> None:
    """Judge whether anything was compiled at all."""
    if graphs == 0:
        probe.fail(
            "torch.compile compiles nothing",
            why=", ".join(
                f"{name}={os.environ[name]}"
                for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
                if name in os.environ
            )
            or "no graph was made",
            remedy="unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE",
        )


# ----------------------------------------------------------------------------------------------------
# The same twice


@check(
    "num.determinism",
    title="the same seed gives the same bits",
    tier=2,
    needs=("dev.available",),
    modes=("F41",),
)
def determinism(probe: Probe) -> None:
    """Repeat a fixed training step; a difference is a kernel that is none of a kind, or silent corruption of data."""
    # cuBLAS reads it when it starts; without it, its sums may come in another order.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import torch

    strict(torch)
    torch.use_deterministic_algorithms(True)  # noqa: FBT003
    digests = [_step(torch, probe.device) for _ in range(4)]
    judge_repeats(digests, probe)
    probe.saw(digests=digests[0])
    probe.detail(f"4 runs of one step are equal in {len(digests[0])} tensors, bit for bit: {digests[0]['loss'][:12]}")


def _step(torch: Any, device: str) -> Dict[str, str]:  # noqa: ANN401
    """Return digests of the loss and of the gradients of a step of a small network with dropout."""
    torch.manual_seed(70)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 17, 3, padding=1),
        torch.nn.BatchNorm2d(17),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(17 * 29 * 31, 131),
        torch.nn.Dropout(0.3),
        torch.nn.LayerNorm(131),
        torch.nn.Linear(131, 37),
    ).to(device)
    images = numerics.normal(33, 3, 29, 31, seed=71, dtype=torch.float32, device=device)
    labels = torch.arange(33, device=device) % 37
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": numerics.digest(loss), **{name: numerics.digest(it) for name, it in named.items()}}


def judge_repeats(digests: Sequence[Mapping[str, str]], probe: Probe) -> None:
    """Judge digests of runs that must not differ."""
    different = sorted({name for run in digests for name, it in run.items() if it != digests[0][name]})
    if different:
        probe.fail(
            "the same step gives different bits from run to run, with deterministic algorithms",
            why=f"{', '.join(different)} differ in {len(digests)} runs",
            remedy="see dev.health and dev.memory; run on another GPU: if it happens there, too, report it to PyTorch",
            mode="F41",
            blame=Blame.UNKNOWN,
        )


# ----------------------------------------------------------------------------------------------------
# Checkpoints


@check(
    "num.checkpoint",
    title="training goes on from a checkpoint, and recomputed activations give the same gradients",
    tier=2,
    needs=("dev.available",),
)
def checkpoints(probe: Probe) -> None:
    """Save model and optimizer, load them with weights_only, and take the next step in both."""
    import torch

    strict(torch)
    path = os.path.join(probe.request.scratch, f"checkpoint-{os.getpid()}.pt")  # noqa: PTH118
    model, optimizer = _trained(torch, probe.device, steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    size = os.path.getsize(path)  # noqa: PTH202
    other, continued = _trained(torch, probe.device, steps=0)
    state = torch.load(path, map_location=probe.device, weights_only=True)
    os.unlink(path)  # noqa: PTH108
    other.load_state_dict(state["model"])
    continued.load_state_dict(state["optimizer"])
    for network, its in ((model, optimizer), (other, continued)):
        _advance(torch, network, its, probe.device)
    differing = [
        name
        for (name, kept), (_, loaded) in zip(model.state_dict().items(), other.state_dict().items())
        if numerics.digest(kept) != numerics.digest(loaded)
    ]
    judge_resumed(differing, probe)
    plain, recomputed = (
        _gradients(torch, probe.device, recompute=False),
        _gradients(torch, probe.device, recompute=True),
    )
    errors = {name: numerics.error(recomputed[name], plain[name].double()) for name in plain}
    for name, error in errors.items():
        numerics.judge(
            probe,
            f"the gradient of {name} with recomputed activations",
            error,
            numerics.TOLERANCES["fp32"],
            remedy=_SICK,
        )
    worst = max(error.norm for error in errors.values())
    probe.saw(bytes=size, recomputed={name: error.norm for name, error in errors.items()})
    probe.detail(f"{size} bytes saved, loaded and trained on, bit for bit; recomputed gradients differ by {worst:.0e}")


def _trained(torch: Any, device: str, *, steps: int) -> Tuple[Any, Any]:  # noqa: ANN401
    model = _model(torch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        _advance(torch, model, optimizer, device)
    return model, optimizer


def _advance(torch: Any, model: Any, optimizer: Any, device: str) -> None:  # noqa: ANN401
    inputs = numerics.normal(64, 65, seed=80, dtype=torch.float32, device=device)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def _gradients(torch: Any, device: str, *, recompute: bool) -> Dict[str, Any]:  # noqa: ANN401
    """Return the gradients of a model with dropout, whose second pass must draw what its first one drew."""
    from torch.utils.checkpoint import checkpoint

    model = _model(torch, device)
    torch.manual_seed(81)
    inputs = numerics.normal(64, 65, seed=82, dtype=torch.float32, device=device)

    def forward(values: Any) -> Any:  # noqa: ANN401
        return model(torch.nn.functional.dropout(values, 0.5))

    out = checkpoint(forward, inputs, use_reentrant=False) if recompute else forward(inputs)
    out.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def judge_resumed(differing: Sequence[str], probe: Probe) -> None:
    """Judge which tensors differ after a step from a checkpoint and without one."""
    if differing:
        probe.fail(
            "training does not go on from a checkpoint as it would have gone on",
            why=f"after one step these differ: {', '.join(differing)}",
            remedy="see whether the disk under TMPDIR is full or faulty; see num.determinism",
            blame=Blame.UNKNOWN,
        )
