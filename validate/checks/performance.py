"""What the device can do, and what types and torch.compile make of it: T2.

Nothing is held to a data sheet's peak; what is compared was measured in the same run.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence

from validate import generate, model, roofline, timing
from validate.check import Probe, check
from validate.generate import Engine, Rung
from validate.model import Geometry
from validate.roofline import Bandwidth, Roofline
from validate.verdict import Blame, Skip

if TYPE_CHECKING:
    import torch

_HALF = 0.5
"""Of what clock and width of the memory promise; a device that does less is not well."""
_KEPT = "roofline.json"
"""In the run's scratch directory: what `perf.stability` compares with."""
_FASTER = 1.5
"""So much faster than float32 a training step in a half type must be where there are tensor cores for it."""
_LOSS = 0.05
"""Relative; the first loss in a smaller type may be this far from that in float32."""
_LADDER_S = 90.0
"""No further rung is begun after this time."""


# ----------------------------------------------------------------------------------------------------
# Roofline


def judge_roofline(probe: Probe, measured: Roofline, promised: Optional[float]) -> None:
    """Blame the machine if the memory does less than half of what its clock and width promise."""
    copy = measured.bandwidth.copy
    if promised is not None and copy < _HALF * promised:
        probe.fail(
            f"the GPU's memory copies at {copy / promised:.0%} of what its clock and width promise",
            why=f"{copy / 1e9:.0f} GB/s of {promised / 1e9:.0f} GB/s",
            remedy="see that nothing else uses the GPU, and `nvidia-smi -q -d PERFORMANCE,CLOCK,ECC`",
            mode="F42",
            blame=Blame.HOST,
        )


def tell_roofline(probe: Probe, measured: Roofline, promised: Optional[float]) -> None:
    """Record every figure."""
    bandwidth = measured.bandwidth
    for name, rate in (
        ("copy", bandwidth.copy),
        ("read", bandwidth.read),
        ("upload", measured.upload),
        ("download", measured.download),
    ):
        probe.metric(name, rate / 1e9, "GB/s", better="higher")
    for name, rate in sorted(measured.gemm.items()):
        probe.metric(f"gemm_{name}", rate / 1e12, "TFLOP/s", better="higher")
    probe.metric("launch", measured.launch_s * 1e6, "us", better="lower")
    if measured.graph_launch_s is not None:
        probe.metric("graph_launch", measured.graph_launch_s * 1e6, "us", better="lower")
    if promised is not None:
        probe.metric("promised", promised / 1e9, "GB/s", better="higher")
    fastest = max(measured.gemm, key=lambda it: measured.gemm[it])
    probe.detail(
        f"copy {bandwidth.copy / 1e9:.0f} GB/s, read {bandwidth.read / 1e9:.0f} GB/s, "
        f"{fastest} products {measured.gemm[fastest] / 1e12:.1f} TFLOP/s"
    )


@check(
    "perf.roofline",
    title="memory, products, transfers and launches are as fast as the GPU is",
    tier=2,
    needs=("dev.available",),
    modes=("F42",),
)
def measure_roofline(probe: Probe) -> None:
    """Measure, and keep it for the end of the run."""
    measured = roofline.measure(probe.device)
    promised = roofline.sheet_bandwidth(probe.device)
    with open(os.path.join(probe.request.scratch, _KEPT), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
        json.dump(measured.as_json(), file)
    tell_roofline(probe, measured, promised)
    judge_roofline(probe, measured, promised)


# ----------------------------------------------------------------------------------------------------
# Types


@dataclass(frozen=True)
class Training:
    """A transformer, and what it is trained on in one step."""

    geometry: Geometry
    batch: int
    tokens: int


@dataclass(frozen=True)
class Precision:
    """One row of the table."""

    name: str
    title: str
    matmul: str = "highest"
    """Of torch.set_float32_matmul_precision."""
    autocast: str = ""
    """"float16" or "bfloat16"; float32 without."""


@dataclass(frozen=True)
class Row:
    """What one precision came to."""

    step_s: float
    samples_per_s: float
    losses: List[float]
    memory_bytes: Optional[int]
    """The most that was allocated; None of the CPU."""

    def as_json(self) -> Dict[str, Any]:
        """Return it as evidence."""
        return {
            "step_s": self.step_s,
            "samples_per_s": self.samples_per_s,
            "losses": timing.rounded(self.losses, 5),
            "memory_bytes": self.memory_bytes,
        }


_PRECISIONS = (
    Precision("fp32", "float32"),
    Precision("tf32", "float32, products in TF32", matmul="high"),
    Precision("fp16", "autocast to float16, losses scaled", autocast="float16"),
    Precision("bf16", "autocast to bfloat16", autocast="bfloat16"),
)
_LARGE = Geometry(hidden=1024, heads=16, kv_heads=16, ffn=4096, vocab=32000, layers=12)


def precisions(device: str) -> List[Precision]:
    """Return the precisions that a device has; the stand-in those of a CPU."""
    if not roofline.on_gpu(device):
        return [one for one in _PRECISIONS if one.name in ("fp32", "bf16")]
    old = roofline.capability(device) < (8, 0)
    return [one for one in _PRECISIONS if not (old and one.name in ("tf32", "bf16"))]


def train(device: str, training: Training, precision: Precision, *, repeats: int) -> Row:
    """Take training steps on one batch, as any training loop does: forward, loss, backward, AdamW."""
    import torch
    from torch.nn import functional

    on_gpu = roofline.on_gpu(device)
    torch.set_float32_matmul_precision(precision.matmul)
    geometry = training.geometry
    decoder = model.create(geometry, positions=training.tokens, dtype=torch.float32, device=device)
    for weight in decoder.weights():
        weight.requires_grad_(True)  # noqa: FBT003 (no keyword)
    optimizer = torch.optim.AdamW(decoder.weights(), lr=1e-4)
    half = getattr(torch, precision.autocast) if precision.autocast else None
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16)
    tokens = generate.prompt_of(geometry, batch=training.batch, tokens=training.tokens, device=device)
    losses: List[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        mode: Any = contextlib.nullcontext()
        if half is not None:
            mode = torch.autocast("cuda" if on_gpu else "cpu", dtype=half)
        with mode:
            hidden = model.forward(decoder, tokens[:, :-1])
            found = functional.linear(model.rms_norm(hidden, decoder.norm), decoder.head)
            loss = functional.cross_entropy(found.flatten(0, 1).float(), tokens[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    taken = timing.times(step, device, repeats=repeats, warm_up=3 if on_gpu else 1)
    memory = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None
    seconds = statistics.median(taken)
    return Row(seconds, training.batch / seconds, [float(loss.item()) for loss in losses], memory)


def judge_amp(probe: Probe, rows: Mapping[str, Row], *, tensor_cores: bool) -> None:
    """Compare the types: their losses fall and begin where float32 begins, and the half types are faster."""
    reference = rows["fp32"]
    for name, row in rows.items():
        finite = all(abs(loss) < float("inf") for loss in row.losses)
        if not finite or row.losses[-1] >= row.losses[0]:
            probe.fail(
                f"training in {name} does not lower the loss",
                why=f"{row.losses[0]:.3f} → {row.losses[-1]:.3f} in {len(row.losses)} steps on one batch",
                remedy="run num.amp and num.gemm: one of them says what is wrong",
                blame=Blame.UNKNOWN,
            )
        elif abs(row.losses[0] / reference.losses[0] - 1) > _LOSS and name != "cpu":
            probe.fail(
                f"training in {name} begins with another loss than in float32",
                why=f"{row.losses[0]:.3f} and {reference.losses[0]:.3f}",
                remedy="run num.amp and num.gemm: one of them says what is wrong",
                blame=Blame.UNKNOWN,
            )
    fastest = "bf16" if "bf16" in rows else "fp16"
    if not tensor_cores or fastest not in rows:
        return
    ratio = reference.step_s / rows[fastest].step_s
    if ratio < _FASTER:
        probe.warn(
            f"a training step in {fastest} is only {ratio:.2f} times as fast as in float32",
            why=f"{rows[fastest].step_s * 1e3:.1f} ms and {reference.step_s * 1e3:.1f} ms",
            remedy="see perf.roofline for the products themselves, and num.gemm for what computes float32",
            blame=Blame.UNKNOWN,
        )


@check(
    "perf.amp",
    title="smaller types train faster, and as well",
    tier=2,
    needs=("perf.roofline",),
)
def amp(probe: Probe) -> None:
    """Train one transformer in every type, and on the CPU."""
    import torch

    device, on_gpu = probe.device, roofline.on_gpu(probe.device)
    training = Training(model.TINY, batch=2, tokens=32)
    if on_gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
        training = Training(_LARGE, batch=8 if memory > 30e9 else 2, tokens=512)
    rows: Dict[str, Row] = {}
    for precision in precisions(device):
        rows[precision.name] = train(device, training, precision, repeats=10 if on_gpu else 3)
        roofline.free(device)
    if on_gpu:
        # One sequence: a batch would take minutes.
        rows["cpu"] = train("cpu", replace(training, batch=1), _PRECISIONS[0], repeats=1)
    probe.saw(
        rows={name: row.as_json() for name, row in rows.items()},
        parameters=training.geometry.parameters,
        batch=training.batch,
        tokens=training.tokens,
    )
    for name, row in rows.items():
        probe.metric(f"samples_per_s_{name}", row.samples_per_s, "1/s", better="higher")
    probe.detail(", ".join(f"{name} {row.samples_per_s:.2f} samples/s" for name, row in rows.items()))
    judge_amp(probe, rows, tensor_cores=on_gpu and roofline.capability(device) >= (7, 0))


# ----------------------------------------------------------------------------------------------------
# torch.compile


@dataclass(frozen=True)
class Climbed:
    """What one way to run a step came to on one geometry."""

    rung: Rung
    tokens_per_s: float
    utilisation: float
    compile_s: float

    def as_json(self) -> Dict[str, Any]:
        """Return it as evidence."""
        return {
            "title": self.rung.title,
            "tokens_per_s": self.tokens_per_s,
            "mbu": self.utilisation,
            "compile_s": self.compile_s,
        }


def judge_ladder(probe: Probe, name: str, climbed: Mapping[str, Climbed]) -> None:
    """Warn if compiled code is slower than eager code."""
    eager = climbed.get("R0")
    compiled = [one for one in climbed.values() if one.rung.compiles]
    if eager is None or not compiled:
        return
    best = max(compiled, key=lambda one: one.tokens_per_s)
    if best.tokens_per_s < eager.tokens_per_s:
        probe.warn(
            f"torch.compile makes decoding slower ({name})",
            why=f"{best.rung.title}: {best.tokens_per_s:.1f} tokens/s, eager {eager.tokens_per_s:.1f}",
            remedy="look for graph breaks and recompilations with TORCH_LOGS=graph_breaks,recompiles",
            blame=Blame.UNKNOWN,
        )


def _climb(
    device: str,
    geometry: Geometry,
    rungs: Sequence[Rung],
    bandwidth: Bandwidth,
    *,
    end: float,
    tell: Callable[[Climbed], None],
) -> None:
    """Measure one rung after the other, as long as there is time to begin with another."""
    import torch

    plan = generate.plan_for(device, generate.BRIEF)
    decoder = model.create(geometry, positions=plan.positions, dtype=generate.dtype_for(device), device=device)
    prompt = generate.prompt_of(geometry, batch=1, tokens=plan.prompt, device=device)
    for rung in rungs:
        if time.monotonic() > end:
            break
        engine = Engine(decoder, rung, device=device)
        engine.warm_up(prompt)
        decoding = generate.decode(engine, prompt, plan)
        tell(Climbed(rung, decoding.tokens_per_second, decoding.bandwidth / bandwidth.best, engine.compile_s))
        del engine
        torch._dynamo.reset()  # noqa: SLF001 (its public name is newer)
        roofline.free(device)


@check(
    "perf.compile",
    title="torch.compile makes decoding faster, step by step",
    tier=2,
    needs=("perf.roofline",),
    deadline_s=420,
    modes=("F48", "F49", "F50", "F51"),
)
def compile_ladder(probe: Probe) -> None:
    """Run the same decoding step in every way from eager to one graph of compiled blocks."""
    if not probe.options["compile"]:
        probe.skip(Skip.NOT_DECLARED, "the profile does not promise torch.compile")
    generate.share_cache(probe.request)
    device = probe.device
    roofline.raise_clocks(device, 1.0)
    bandwidth = roofline.measure_bandwidth(device)
    rungs = generate.ladder(device, compiles=True)
    if not roofline.on_gpu(device):
        rungs = [rung for rung in rungs if rung.name in ("R0", "R4")]
    geometries = dict(generate.geometries(device))
    # Fewer layers of one kind say the same, and a step of them is compiled sooner.
    geometries["wide"] = replace(geometries["wide"], layers=min(4, geometries["wide"].layers))
    # Compiling whole steps takes longest, and of many narrow layers minutes: what there is no time for is left out.
    whole = [rung for rung in rungs if rung.compiles == "step"]
    others = [rung for rung in rungs if rung.compiles != "step"]
    end = time.monotonic() + _LADDER_S
    climbed: Dict[str, Dict[str, Climbed]] = {name: {} for name in geometries}
    for name, wanted in (("wide", others), ("narrow", others), ("wide", whole)):

        def tell(one: Climbed, name: str = name) -> None:
            climbed[name][one.rung.name] = one
            probe.metric(f"tokens_per_s_{name}_{one.rung.name}", one.tokens_per_s, "1/s", better="higher")

        _climb(device, geometries[name], wanted, bandwidth, end=end, tell=tell)
    tell_ladder(probe, climbed, left_out=[rung.name for rung in rungs if rung.name not in climbed["wide"]])
    for name, table in climbed.items():
        judge_ladder(probe, name, table)


def tell_ladder(probe: Probe, climbed: Mapping[str, Mapping[str, Climbed]], *, left_out: Sequence[str]) -> None:
    """Record the table, and what there was no time for."""
    probe.saw(
        ladder={name: {rung: table[rung].as_json() for rung in sorted(table)} for name, table in climbed.items()},
        left_out=list(left_out),
    )
    wide = climbed["wide"]
    best = max(wide.values(), key=lambda one: one.tokens_per_s)
    gain = f", {best.tokens_per_s / wide['R0'].tokens_per_s:.2f} times eager" if "R0" in wide else ""
    missing = f"; no time for {', '.join(left_out)}" if left_out else ""
    probe.detail(f"{best.rung.name} ({best.rung.title}) {best.tokens_per_s:.1f} tokens/s{gain}{missing}")


# ----------------------------------------------------------------------------------------------------
# Stability


def judge_stability(probe: Probe, before: Bandwidth, after: Bandwidth) -> None:
    """Say of all figures of the run that they are unstable, if the memory's bandwidth changed."""
    drifts = {"copy": timing.drift(before.copy, after.copy), "read": timing.drift(before.read, after.read)}
    worst = max(drifts, key=lambda it: drifts[it])
    probe.metric("drift", drifts[worst], "ratio", better="lower")
    probe.saw(stable=drifts[worst] <= timing.DRIFT, before=before.as_json(), after=after.as_json())
    if drifts[worst] > timing.DRIFT:
        probe.warn(
            f"the GPU was not as fast at the end as at the beginning: {worst} differs by {drifts[worst]:.0%}",
            why="what was measured in between is unstable",
            remedy="see that nothing else uses the GPU, and `nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE`",
            mode="F42",
            blame=Blame.HOST,
        )
    probe.detail(f"bandwidth within {drifts[worst]:.1%}")


@check(
    "perf.stability",
    title="the GPU is as fast at the end as at the beginning",
    tier=2,
    needs=("perf.roofline",),
    modes=("F42",),
)
def stability(probe: Probe) -> None:
    """Measure the memory again, after all that stands above, and compare with `perf.roofline`."""
    path = os.path.join(probe.request.scratch, _KEPT)  # noqa: PTH118
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            kept: Mapping[str, Any] = json.load(file)
    except OSError as error:
        probe.skip(Skip.DEPENDENCY_FAILED, f"perf.roofline left nothing to compare with: {error}")
    roofline.raise_clocks(probe.device, 1.0)
    judge_stability(probe, Bandwidth(**kept["bandwidth"]), roofline.measure_bandwidth(probe.device))
