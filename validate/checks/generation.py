"""Text generation: how fast, against what the memory can do, and the proof that the figure is real: T2."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

from validate import generate, model, numerics, roofline, timing
from validate.check import Probe, check
from validate.generate import Decoding, Engine, Plan, Rung
from validate.roofline import Bandwidth
from validate.verdict import Blame

if TYPE_CHECKING:
    import torch

_BATCHES = (8, 32)
_DISTURBED = 0.02
"""Relative; events between the steps may cost this much before the times are those of the events."""
_LINEAR = 0.05


@dataclass(frozen=True)
class Speed:
    """What decoding at batch 1 came to, with what it is held to."""

    decoding: Decoding
    before: Bandwidth
    after: Bandwidth
    floor: float
    warn: float
    resident: bool
    """So small that a cache holds it."""
    compiled: bool

    @property
    def roof(self) -> float:
        """Bytes per second, of the measurement before and the one after the larger of copying and reading."""
        return max(self.before.best, self.after.best)

    @property
    def utilisation(self) -> float:
        """Fraction of `roof`: MBU."""
        return self.decoding.bandwidth / self.roof


def judge_steady(probe: Probe, before: Bandwidth, after: Bandwidth) -> bool:
    """Warn if the memory was not as fast after as before; return whether it was."""
    drift = max(timing.drift(before.copy, after.copy), timing.drift(before.read, after.read))
    probe.metric("drift", drift, "ratio")
    if drift <= timing.DRIFT:
        return True
    probe.warn(
        f"the memory's bandwidth changed by {drift:.0%} during the check: its figures are unstable",
        why=f"copy {before.copy / 1e9:.0f} → {after.copy / 1e9:.0f} GB/s, "
        f"read {before.read / 1e9:.0f} → {after.read / 1e9:.0f} GB/s",
        remedy="see that nothing else uses the GPU, and `nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE`",
        mode="F42",
        blame=Blame.HOST,
    )
    return False


def judge_speed(probe: Probe, speed: Speed) -> None:
    """Hold wide decoding to the memory's bandwidth in this run."""
    decoding = speed.decoding
    if decoding.spread > timing.SPREAD:
        probe.warn(
            "the time of a token is unsteady",
            why=f"the medians of {len(decoding.rounds)} rounds are spread over {decoding.spread:.1%}",
            remedy="see that nothing else uses the GPU",
            mode="F42",
            blame=Blame.HOST,
        )
    if decoding.disturbance > _DISTURBED:
        probe.warn(
            "timing the tokens changes their times",
            why=f"{decoding.disturbance:.1%} between a run with events and one without",
            blame=Blame.UNKNOWN,
        )
    if speed.resident or not speed.compiled:
        return
    why = (
        f"{decoding.bandwidth / 1e9:.0f} GB/s of {speed.roof / 1e9:.0f} GB/s: {decoding.bytes_per_step / 1e9:.2f} GB "
        f"every {decoding.latency * 1e3:.3f} ms"
    )
    remedy = "perf.compile shows which way to run a step is slow; perf.roofline what the memory can do"
    if speed.utilisation < speed.floor:
        probe.fail(
            f"wide decoding reaches {speed.utilisation:.0%} of the memory's bandwidth, less than {speed.floor:.0%}",
            why=why,
            remedy=remedy,
            blame=Blame.UNKNOWN,
        )
    elif speed.utilisation < speed.warn:
        probe.warn(
            f"wide decoding reaches {speed.utilisation:.0%} of the memory's bandwidth, less than {speed.warn:.0%}",
            why=why,
            remedy=remedy,
            blame=Blame.UNKNOWN,
        )


def _decoding_seen(decoding: Decoding, bandwidth: Bandwidth, *, series: bool) -> Dict[str, Any]:
    """Return what is kept as evidence; the series of all steps for a histogram."""
    steps = timing.summary(decoding.steps)
    seen = {
        "itl_s": steps.as_json(),
        "jitter": steps.jitter,
        "tokens_per_s": decoding.tokens_per_second,
        "bytes_per_step": decoding.bytes_per_step,
        "bandwidth": decoding.bandwidth,
        "mbu_copy": decoding.bandwidth / bandwidth.copy,
        "mbu_read": decoding.bandwidth / bandwidth.read,
        "layers": decoding.layers,
        "batch": decoding.batch,
        "disturbance": decoding.disturbance,
    }
    if series:
        seen["series_s"] = [timing.rounded(one) for one in decoding.rounds]
    return seen


@check(
    "perf.generate",
    title="decoding is as fast as the memory lets it be",
    tier=2,
    needs=("perf.roofline",),
    deadline_s=420,
    modes=("F42", "F48", "F50"),
)
def generation(probe: Probe) -> None:
    """Two geometries, prefill and decoding apart, several batches, as the host sees it, and what it costs."""
    generate.share_cache(probe.request)
    import torch

    device, on_gpu = probe.device, roofline.on_gpu(probe.device)
    plan = generate.plan_for(device, generate.FULL)
    rung = generate.default_rung(device, compiles=on_gpu and bool(probe.options["compile"]))
    roofline.raise_clocks(device)
    before = roofline.measure_bandwidth(device)
    kinds = ("fp32",) if not on_gpu else ("bf16",) if roofline.capability(device) >= (8, 0) else ("fp16",)
    gemm = max(roofline.measure_gemm(device, kinds).values())
    l2 = roofline.l2_bytes(device)
    decodings: Dict[str, Decoding] = {}
    price = probe.options["price_per_hour"]
    for name, geometry in generate.geometries(device).items():
        decoder = model.create(geometry, positions=plan.prefill + 1, dtype=generate.dtype_for(device), device=device)
        short = replace(decoder, cos=decoder.cos[: plan.positions], sin=decoder.sin[: plan.positions])
        # Reading a prompt takes the weights as they are; folding copies them.
        flops, prefilled = generate.prefill(decoder, plan, device=device)
        batches = _batches(short, plan, device, compiles=bool(rung.compiles), price=price) if name == "wide" else {}
        engine = Engine(short, rung, device=device)
        del decoder, short
        prompt = generate.prompt_of(geometry, batch=1, tokens=plan.prompt, device=device)
        engine.warm_up(prompt)
        decoding = decodings[name] = generate.decode(engine, prompt, plan)
        visible, alone = generate.first_token(engine, prompt, rounds=plan.rounds)
        host = timing.summary(generate.streamed(engine, prompt, plan.tokens))
        seen = _decoding_seen(decoding, before, series=True)
        seen.update(
            compile_s=engine.compile_s,
            capture_s=engine.capture_s,
            ttft_s=statistics.median(visible),
            ttft_device_s=statistics.median(alone),
            host_itl_s=host.as_json(),
            prefill_tokens=plan.prefill,
            prefill_s=statistics.median(prefilled),
            prefill_utilisation=flops / statistics.median(prefilled) / gemm,
            memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        )
        if batches:
            seen["batches"] = batches
        probe.saw(**{name: seen})
        del engine, prompt
        roofline.free(device)
    after = roofline.measure_bandwidth(device)
    wide = decodings["wide"]
    speed = Speed(
        decoding=wide,
        before=before,
        after=after,
        floor=generate.floor_for(
            torch.cuda.get_device_name(device) if on_gpu else "cpu",
            roofline.capability(device),
            float(probe.options["mbu_floor"]),
        ),
        warn=float(probe.options["mbu_warn"]),
        resident=generate.is_resident(wide.bytes_per_step, l2),
        compiled=bool(rung.compiles) or not on_gpu,
    )
    tell_speed(probe, speed, decodings["narrow"], rung=rung, price=price)
    judge_steady(probe, before, after)
    judge_speed(probe, speed)


def tell_speed(probe: Probe, speed: Speed, narrow: Decoding, *, rung: Rung, price: Optional[float]) -> None:
    """Record the figures that people read, and what follows from both geometries together."""
    wide = speed.decoding
    solution = generate.solve(wide, narrow)
    probe.saw(
        rung=rung.title,
        before=speed.before.as_json(),
        after=speed.after.as_json(),
        resident=speed.resident,
        floor=speed.floor,
        bandwidth_effective=solution.bandwidth if solution else None,
        gap_per_layer_s=solution.gap_s if solution else None,
    )
    probe.metric("tokens_per_s", wide.tokens_per_second, "1/s", better="higher")
    probe.metric("itl", wide.latency * 1e3, "ms", better="lower")
    probe.metric("mbu", speed.utilisation, "ratio", better="higher")
    probe.metric("tokens_per_s_narrow", narrow.tokens_per_second, "1/s", better="higher")
    probe.metric("mbu_narrow", narrow.bandwidth / speed.roof, "ratio", better="higher")
    if solution:
        probe.metric("gap_per_layer", solution.gap_s * 1e6, "us", better="lower")
    parts = [f"wide {wide.tokens_per_second:.1f} tokens/s", f"{speed.utilisation:.1%} of {speed.roof / 1e9:.0f} GB/s"]
    parts.append(f"narrow {narrow.tokens_per_second:.1f} tokens/s")
    if price is not None:
        cost = generate.cost_per_thousand(float(price), wide.tokens_per_second)
        probe.metric("cost_per_1000_tokens", cost, "price", better="lower")
        parts.append(f"{cost:.5f} per 1000 tokens")
    if speed.resident:
        parts.append("a cache holds the weights, so it is not held to the bandwidth")
    elif not speed.compiled:
        parts.append("not compiled, so it is not held to the bandwidth")
    probe.detail(", ".join(parts))


def _batches(
    decoder: model.Decoder, plan: Plan, device: str, *, compiles: bool, price: Optional[float]
) -> Mapping[str, Any]:
    """Return tokens per second and step times for several sequences at once."""
    found: Dict[str, Any] = {}
    on_gpu = roofline.on_gpu(device)
    rung = generate.BATCHED if compiles and on_gpu else generate.default_rung(device, compiles=False)
    for batch in _BATCHES:
        prompt = generate.prompt_of(decoder.geometry, batch=batch, tokens=plan.prompt, device=device)
        engine = Engine(decoder, rung, device=device, batch=batch)
        engine.warm_up(prompt)
        decoding = generate.decode(engine, prompt, replace(plan, tokens=min(plan.tokens, 64), discarded=1, rounds=2))
        found[str(batch)] = {
            "tokens_per_s": decoding.tokens_per_second,
            "step_s": decoding.latency,
            "rung": rung.title,
            "cost_per_1000_tokens": None
            if price is None
            else generate.cost_per_thousand(float(price), decoding.tokens_per_second),
        }
        del engine
        roofline.free(device)
    return found


# ----------------------------------------------------------------------------------------------------
# The proof


@dataclass(frozen=True)
class Run:
    """What a generation gave, bit for bit."""

    tokens: Sequence[int]
    digest: str
    """Of the last step's logits."""
    finite: bool = True

    def first_difference(self, other: Run) -> Optional[int]:
        """Return where the tokens of two runs part; None if they do not."""
        pairs = zip(self.tokens, other.tokens)
        return next((number for number, (mine, theirs) in enumerate(pairs) if mine != theirs), None)


def judge_same(probe: Probe, what: str, first: Run, second: Run, *, mode: str = "") -> None:
    """Let two runs agree in every token and in every bit of the last logits."""
    where = first.first_difference(second)
    if where is None and first.digest == second.digest:
        return
    place = "in the last logits alone" if where is None else f"from token {where + 1} on"
    probe.fail(
        f"{what} gives another generation",
        why=f"they differ {place}",
        remedy="run num.determinism and num.compile: one of them says what differs",
        mode=mode,
        blame=Blame.UNKNOWN,
    )


def judge_liveness(probe: Probe, before: Run, changed: Run, poisoned: Run) -> None:
    """Expect a changed weight to show, and what is not yet written to the cache not to."""
    if before.digest == changed.digest:
        probe.fail(
            "a weight of the last layer was changed and the logits are the same: they are not computed from it",
            blame=Blame.UNKNOWN,
            remedy="run num.compile; a graph that was captured with copies of the weights does this",
        )
    if not poisoned.finite or poisoned.digest != before.digest:
        probe.fail(
            "what stands in the cache beyond the last token has an influence",
            why="logits are no numbers" if not poisoned.finite else "logits change with what is not yet written",
            remedy="run tf.forward and num.compile",
            blame=Blame.UNKNOWN,
        )


def judge_twin(probe: Probe, device: float, cpu: float, elements: int, *, half: bool, what: str) -> None:
    """Let the device be as far from fp64 as eager code on the CPU in the same type, times torch's own factor."""
    if numerics.as_good(device, cpu, half=half, elements=elements):
        return
    probe.fail(
        f"{what} gives logits that are too far from fp64",
        why=f"root mean square error {device:.2g}, on the CPU in the same type {cpu:.2g}",
        remedy="run num.gemm, num.sdpa and num.compile: one of them says what is wrong",
        blame=Blame.UNKNOWN,
    )


def judge_linearity(probe: Probe, single: Decoding, double: Decoding, roof: float) -> None:
    """Let twice the layers take the time that reading them takes: no less than the memory needs for the difference."""
    more_s, more_bytes = double.latency - single.latency, double.bytes_per_step - single.bytes_per_step
    least_s = more_bytes / roof
    ratio, growth = more_s / least_s, double.latency / single.latency
    expected = double.bytes_per_step / single.bytes_per_step
    probe.metric("linearity", ratio, "ratio")
    probe.saw(
        layers=[single.layers, double.layers],
        latencies_s=timing.rounded([single.latency, double.latency], 9),
        bytes=[single.bytes_per_step, double.bytes_per_step],
    )
    if ratio < 1 - _LINEAR:
        probe.fail(
            "more layers take less time than the memory needs to read them: they are not read",
            why=f"{double.layers - single.layers} layers more, {more_bytes / 1e9:.2f} GB, took {more_s * 1e3:.3f} ms; "
            f"at {roof / 1e9:.0f} GB/s they take {least_s * 1e3:.3f} ms",
            blame=Blame.UNKNOWN,
        )
    elif abs(growth / expected - 1) > _LINEAR:
        probe.warn(
            "the time of a token does not grow as the bytes do",
            why=f"{expected:.2f} times the bytes take {growth:.2f} times the time",
            remedy="see perf.generate: the gap per layer says what is lost beside reading",
            blame=Blame.UNKNOWN,
        )


def _run(engine: Engine, prompt: torch.Tensor, tokens: int) -> Run:
    import torch

    found, logits = engine.generate(prompt, tokens)
    return Run(found[0].tolist(), numerics.digest(logits), bool(torch.isfinite(logits).all()))


@check(
    "gen.proof",
    title="generated tokens are computed, and from all weights",
    tier=2,
    needs=("dev.available",),
    modes=("F48", "F50"),
)
def proof(probe: Probe) -> None:
    """Try a twin in fp64 on the CPU, a graph against none, a changed weight, a poisoned cache, twice the layers."""
    generate.share_cache(probe.request)
    import torch

    device = probe.device
    dtype = generate.dtype_for(device)
    tokens, positions = 24, 64
    rung = generate.default_rung(device, compiles=bool(probe.options["compile"]) and roofline.on_gpu(device))
    torch.set_float32_matmul_precision("highest")
    rounded = model.create(model.TINY, positions=positions, dtype=dtype, device="cpu")
    decoder = model.converted(rounded, dtype=dtype, device=device)
    prompt = generate.prompt_of(model.TINY, batch=1, tokens=16, device=device)

    engine = Engine(decoder, rung, device=device)
    engine.warm_up(prompt)
    first, second = _run(engine, prompt, tokens), _run(engine, prompt, tokens)
    judge_same(probe, "the second run of two", first, second)
    graph, engine.graph = engine.graph, None
    if graph is not None:
        judge_same(probe, "the graph, against the same code without it,", first, _run(engine, prompt, tokens))
        engine.graph = graph
    _judge_against_fp64(probe, engine, rounded, prompt, tokens)

    for cache in (*engine.state.keys, *engine.state.values):
        cache.fill_(float("nan"))
    poisoned = _run(engine, prompt, tokens)
    weight = engine.decoder.layers[-1].down
    kept = weight[0].clone()
    weight[0].add_(1.0)
    changed = _run(engine, prompt, tokens)
    weight[0].copy_(kept)
    judge_liveness(probe, first, changed, poisoned)
    judge_same(probe, "the weight put back", first, _run(engine, prompt, tokens))
    probe.saw(tokens=list(first.tokens), logits=first.digest, rung=rung.title)
    del engine, decoder
    if roofline.on_gpu(device):
        _prove_linearity(probe, rung)
    probe.detail(f"{tokens} tokens twice bit-equal, near fp64; {rung.title}")


def _judge_against_fp64(
    probe: Probe, engine: Engine, rounded: model.Decoder, prompt: torch.Tensor, tokens: int
) -> None:
    """Compare the logits of the last step with a whole forward pass over all tokens, in fp64 on the CPU."""
    import torch

    found, logits = engine.generate(prompt, tokens)
    # The last token came from these logits: they follow on all but it.
    whole = torch.cat((prompt.cpu(), found[:, :-1].cpu()), 1)
    twin = model.converted(rounded, dtype=torch.float64, device="cpu")
    reference = model.logits(model.forward(twin, whole)[:, -1], twin.norm, twin.head)
    on_cpu = model.logits(model.forward(rounded, whole)[:, -1], rounded.norm, rounded.head)
    errors = numerics.rmse(logits.cpu(), reference), numerics.rmse(on_cpu, reference)
    probe.metric("error", errors[0], "rmse", better="lower")
    probe.metric("error_cpu", errors[1], "rmse", better="lower")
    half = rounded.embedding.dtype != torch.float32
    judge_twin(probe, *errors, elements=reference.numel(), half=half, what="decoding with a cache")


def _prove_linearity(probe: Probe, rung: Rung) -> None:
    device = probe.device
    plan = generate.plan_for(device, generate.BRIEF)
    geometry = generate.geometries(device)["wide"]
    single = max(1, geometry.layers // 2)
    decodings: List[Decoding] = []
    roofline.raise_clocks(device, 1.0)
    roof = roofline.measure_bandwidth(device).best
    for layers in (single, 2 * single):
        decoder = model.create(
            replace(geometry, layers=layers),
            positions=plan.positions,
            dtype=generate.dtype_for(device),
            device=device,
        )
        engine = Engine(decoder, rung, device=device)
        prompt = generate.prompt_of(geometry, batch=1, tokens=plan.prompt, device=device)
        engine.warm_up(prompt)
        decodings.append(generate.decode(engine, prompt, plan))
        del engine, decoder
        roofline.free(device)
    judge_linearity(probe, decodings[0], decodings[1], roof)
