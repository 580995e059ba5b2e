"""Generation with the suite's decoder: ways to run a step, from eager to one graph of compiled blocks, and their times.

The decoder reads every weight once a token: at batch 1 the time of a token is bytes over bandwidth, plus what is lost
between kernels. What is measured is said as a fraction of the bandwidth that this device had in this run.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple

from validate import model, roofline, timing
from validate.check import Request
from validate.model import Decoder, Geometry

if TYPE_CHECKING:
    import torch

RESIDENT = 20
"""A token must move this many times the second-level cache; less and the cache helps."""


# ----------------------------------------------------------------------------------------------------
# Ways to run a step


@dataclass(frozen=True)
class Rung:
    """One way to run a decoding step."""

    name: str
    title: str
    compiles: str = ""
    """"step" as a whole, "block" one for all layers, or nothing."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of torch.compile."""
    graph: bool = False
    """The step is captured by hand, and replayed."""
    folded: bool = False
    """Norms are folded into the matrices, and the logits are one compiled reduction with sums in fp32."""


_DESCENT = {"coordinate_descent_tuning": True}
"""Without it Inductor leaves products with a vector to cuBLAS; with it they are reductions, fused and tuned."""
RUNGS: Tuple[Rung, ...] = (
    Rung("R0", "eager"),
    Rung("R1", "eager, one graph", graph=True),
    Rung("R2", "reduce-overhead", "step", {"triton.cudagraphs": True}),
    Rung("R3", "reduce-overhead, coordinate descent", "step", {"triton.cudagraphs": True, **_DESCENT}),
    Rung("R4", "compiled blocks, one graph", "block", _DESCENT, graph=True),
    Rung("R5", "compiled blocks, norms folded, logits in fp32, one graph", "block", _DESCENT, graph=True, folded=True),
    Rung(
        "R6",
        "the same with dependent launch",
        "block",
        {**_DESCENT, "triton.enable_pdl": True},
        graph=True,
        folded=True,
    ),
)
BATCHED = Rung("R4", "compiled blocks, one graph", "block", {}, graph=True)
"""For more than one sequence: products are matrix products then, which are cuBLAS's."""


def has_dependent_launch(device: str) -> bool:
    """Tell whether Inductor can let a kernel start before the one it waits for has ended: Hopper and newer."""
    if not roofline.on_gpu(device) or roofline.capability(device) < (9, 0):
        return False
    from torch._inductor import config

    return hasattr(config.triton, "enable_pdl")


def ladder(device: str, *, compiles: bool) -> List[Rung]:
    """Return the rungs that can be climbed here; on the CPU those without a graph, which is its alone."""
    rungs = [rung for rung in RUNGS if compiles or not rung.compiles]
    if not roofline.on_gpu(device):
        return [replace(rung, graph=False, options={}) for rung in rungs if rung.name in ("R0", "R2", "R4", "R5")]
    return [rung for rung in rungs if rung.name != "R6" or has_dependent_launch(device)]


def default_rung(device: str, *, compiles: bool) -> Rung:
    """Return the fastest way that needs only public options, R5; without a compiler the best eager one."""
    wanted = ("R5",) if compiles else ("R1", "R0")
    rungs = {rung.name: rung for rung in ladder(device, compiles=compiles)}
    return next(rungs[name] for name in wanted if name in rungs)


def share_cache(request: Request) -> None:
    """Let the checks of one run share what Inductor compiles; must come before torch is imported."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(request.scratch, "inductor"))  # noqa: PTH118


def dtype_for(device: str) -> torch.dtype:
    """Return the type of the weights: bf16 where the GPU has it."""
    import torch

    if not roofline.on_gpu(device):
        return torch.float32
    return torch.bfloat16 if roofline.capability(device) >= (8, 0) else torch.float16


def geometries(device: str) -> Mapping[str, Geometry]:
    """Return the wide and the narrow geometry for a device; the stand-in has tiny ones."""
    import torch

    if not roofline.on_gpu(device):
        return {"wide": model.TINY, "narrow": replace(model.TINY, hidden=128, heads=4, ffn=256, layers=4)}
    memory = torch.cuda.get_device_properties(device).total_memory
    return {"wide": model.wide_for(memory), "narrow": model.NARROW}


def plain_logits(x: torch.Tensor, norm: Optional[torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Return logits in the type of the weights, as most models do."""
    from torch.nn import functional

    return functional.linear(model.rms_norm(x, norm), head)


class Engine:
    """A decoder with a state and a way to take the next step."""

    def __init__(self, decoder: Decoder, rung: Rung, *, device: str, batch: int = 1) -> None:
        self.device, self.rung, self.batch = device, rung, batch
        self.decoder = model.folded(decoder) if rung.folded else decoder
        self.state = model.state(self.decoder, batch=batch)
        self.compile_s = self.capture_s = 0.0
        self.logits: Optional[torch.Tensor] = None
        """Of the last step; of a graph always the same tensor."""
        self.graph: Optional[torch.cuda.CUDAGraph] = None
        """One step, if it was captured; without it steps are taken from Python, kernel by kernel."""
        self._captured: Optional[torch.Tensor] = None
        self._call = self._prepared()

    def _prepared(self) -> Callable[[], torch.Tensor]:
        import torch

        decoder, state, rung = self.decoder, self.state, self.rung
        finish: model.Logits = plain_logits
        if rung.folded:
            finish = model.logits_of_one if self.batch == 1 else model.logits
        settings: Dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if rung.options:
            settings["options"] = dict(rung.options)
        if rung.compiles == "step":
            # Graphs of Inductor's own copy what they take for an argument; these stay where they are.
            for tensor in (*decoder.weights(), decoder.cos, decoder.sin, *state.keys, *state.values):
                torch._dynamo.mark_static_address(tensor)  # noqa: SLF001 (there is no other)
            for tensor in (state.token, state.position, state.history):
                torch._dynamo.mark_static_address(tensor)  # noqa: SLF001
            whole = torch.compile(model.step, **settings)
            return lambda: whole(decoder, state, finish=finish)
        run: model.DecodeBlock = model.decode_block
        if rung.compiles == "block":
            run = torch.compile(model.decode_block, **settings)
            if finish is model.logits_of_one:
                finish = torch.compile(model.logits_of_one, **settings)
        return lambda: model.step(decoder, state, run=run, finish=finish)

    def warm_up(self, prompt: torch.Tensor) -> None:
        """Compile and capture, if that is the way, and note how long it took."""
        import torch

        self.start(prompt)
        self.compile_s = timing.host_seconds(self._call, self.device)
        if not self.rung.graph:
            # The graphs of "reduce-overhead" are recorded by the second and third call.
            for _ in range(3):
                self.advance()
            timing.synchronize(self.device)
            return
        begun = time.perf_counter()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._captured = self._call()
        self.graph = graph
        timing.synchronize(self.device)
        self.capture_s = time.perf_counter() - begun

    def start(self, prompt: torch.Tensor) -> None:
        """Read a prompt, int64[batch, tokens] on the device."""
        finish = model.logits if self.rung.folded else plain_logits
        model.prefill(self.decoder, prompt, self.state, finish=finish)

    def advance(self) -> None:
        """Take one step; the host does not wait for it."""
        if self.graph is not None:
            self.graph.replay()
            self.logits = self._captured
        else:
            self.logits = self._call()

    def generate(self, prompt: torch.Tensor, tokens: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens after a prompt, int64[batch, tokens + 1], and the logits of the last."""
        self.start(prompt)
        for _ in range(tokens):
            self.advance()
        assert self.logits is not None
        length = prompt.shape[1]
        return self.state.history[length : length + tokens + 1].t().clone(), self.logits.clone()


def prompt_of(geometry: Geometry, *, batch: int, tokens: int, device: str) -> torch.Tensor:
    """Return a seeded prompt."""
    import torch

    generator = torch.Generator().manual_seed(3)
    return torch.randint(geometry.vocab, (batch, tokens), generator=generator).to(device)


# ----------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Plan:
    """How much is generated."""

    prompt: int = 128
    tokens: int = 256
    discarded: int = 3
    rounds: int = 5
    positions: int = 512
    """Allocated in the cache, and read: attention is dense under a mask."""
    prefill: int = 2048
    prefill_rounds: int = 10


FULL = Plan()
BRIEF = Plan(discarded=1, rounds=2, tokens=96)
"""For one rung among many."""
STAND_IN = Plan(prompt=8, tokens=12, discarded=1, rounds=2, positions=32, prefill=24, prefill_rounds=2)


def plan_for(device: str, plan: Plan) -> Plan:
    """Return the plan, or a tiny one for the stand-in."""
    return plan if roofline.on_gpu(device) else STAND_IN


@dataclass(frozen=True)
class Decoding:
    """Times of decoding, in seconds per step of the whole batch."""

    rounds: Tuple[Tuple[float, ...], ...]
    """Between one token and the next, on the device."""
    unmarked: float
    """Mean of a round without an event between its steps: events must cost nothing."""
    bytes_per_step: int
    layers: int
    batch: int

    @property
    def steps(self) -> List[float]:
        """All times of all rounds."""
        return [value for one in self.rounds for value in one]

    @property
    def latency(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(statistics.median(one) for one in self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range of the rounds' medians over their median."""
        return timing.spread([statistics.median(one) for one in self.rounds])

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, by the mean: what a user gets."""
        return self.batch / statistics.fmean(self.steps)

    @property
    def disturbance(self) -> float:
        """How far the mean with events is from that without, relative."""
        return timing.drift(self.unmarked, statistics.fmean(self.steps))

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the steps moved."""
        return self.bytes_per_step / self.latency


def bytes_per_step(decoder: Decoder, *, positions: int, batch: int) -> int:
    """Return what a step of a batch moves: the weights once, the caches of every sequence."""
    geometry, size = decoder.geometry, int(decoder.embedding.element_size())
    folded = decoder.norm is None
    one: int = geometry.bytes_per_token(positions, element_bytes=size, folded=folded)
    cache = 2 * geometry.layers * geometry.kv * (positions + 1) + geometry.hidden
    return one + (batch - 1) * size * cache


def decode(engine: Engine, prompt: torch.Tensor, plan: Plan) -> Decoding:
    """Generate as planned, and time every step."""

    def marked() -> List[float]:
        engine.start(prompt)
        marks = timing.Marks(engine.device, plan.tokens + 1)
        marks.mark()
        for _ in range(plan.tokens):
            engine.advance()
            marks.mark()
        return marks.intervals()

    def unmarked() -> None:
        for _ in range(plan.tokens):
            engine.advance()

    for _ in range(plan.discarded):
        marked()
    rounds = tuple(tuple(marked()) for _ in range(plan.rounds))
    engine.start(prompt)
    return Decoding(
        rounds=rounds,
        unmarked=timing.host_seconds(unmarked, engine.device) / plan.tokens,
        bytes_per_step=bytes_per_step(engine.decoder, positions=engine.decoder.positions, batch=engine.batch),
        layers=engine.decoder.geometry.layers,
        batch=engine.batch,
    )


def first_token(engine: Engine, prompt: torch.Tensor, *, rounds: int) -> Tuple[List[float], List[float]]:
    """Return seconds to the first token: from a prompt on the host to a token on the host, and on the device alone."""
    import torch

    on_host = prompt.cpu()
    if roofline.on_gpu(engine.device):
        on_host = on_host.pin_memory()

    def visible() -> None:
        engine.start(on_host.to(engine.device, non_blocking=True))
        torch.empty_like(engine.state.token, device="cpu").copy_(engine.state.token)

    seen = [timing.host_seconds(visible, engine.device) for _ in range(rounds)]
    return seen, timing.times(lambda: engine.start(prompt), engine.device, repeats=rounds)


def streamed(engine: Engine, prompt: torch.Tensor, tokens: int) -> List[float]:
    """Return the seconds between one token and the next as the host sees them come.

    The device is a step ahead of the host, and the copies have a stream of their own: as a server would do it.
    """
    import torch

    engine.start(prompt)
    timing.synchronize(engine.device)
    arrivals = [time.perf_counter()]
    if not roofline.on_gpu(engine.device):
        for _ in range(tokens):
            engine.advance()
            arrivals.append(time.perf_counter())
        return [second - first for first, second in zip(arrivals, arrivals[1:])]
    length = prompt.shape[1]
    landed = torch.empty(tokens, engine.batch, dtype=torch.int64).pin_memory()
    side = torch.cuda.Stream(engine.device)
    done = [torch.cuda.Event() for _ in range(tokens)]
    ready = [torch.cuda.Event() for _ in range(tokens)]
    for number in range(tokens):
        engine.advance()
        done[number].record()
        side.wait_event(done[number])
        with torch.cuda.stream(side):
            # Not `token`, which the next step overwrites.
            landed[number].copy_(engine.state.history[length + number + 1], non_blocking=True)
            ready[number].record()
        if number:
            ready[number - 1].synchronize()
            arrivals.append(time.perf_counter())
    ready[-1].synchronize()
    arrivals.append(time.perf_counter())
    return [second - first for first, second in zip(arrivals, arrivals[1:])]


def prefill(decoder: Decoder, plan: Plan, *, device: str) -> Tuple[int, List[float]]:
    """Return the floating-point operations of a long prompt, and the seconds that reading it took."""
    prompt = prompt_of(decoder.geometry, batch=1, tokens=plan.prefill, device=device)
    state = model.state(decoder)
    taken = timing.times(lambda: model.prefill(decoder, prompt, state), device, repeats=plan.prefill_rounds)
    return decoder.geometry.prefill_flops(plan.prefill), taken


# ----------------------------------------------------------------------------------------------------
# What follows from the numbers


@dataclass(frozen=True)
class Solution:
    """What two geometries say together of one device."""

    bandwidth: float
    """Bytes per second while bytes flow."""
    gap_s: float
    """Lost per layer, whatever its size: launches, ramps, what is not fused. The head counts as one more layer."""


def solve(wide: Decoding, narrow: Decoding) -> Optional[Solution]:
    """Solve seconds = bytes / bandwidth + (layers + 1) · gap for both; None where that has no sensible solution."""
    layers_wide, layers_narrow = wide.layers + 1, narrow.layers + 1
    determinant = wide.bytes_per_step * layers_narrow - narrow.bytes_per_step * layers_wide
    if determinant == 0:
        return None
    inverse = (wide.latency * layers_narrow - narrow.latency * layers_wide) / determinant
    gap = (wide.bytes_per_step * narrow.latency - narrow.bytes_per_step * wide.latency) / determinant
    return Solution(1 / inverse, gap) if inverse > 0 else None


def cost_per_thousand(price_per_hour: float, tokens_per_second: float) -> float:
    """Return what 1000 tokens cost on a machine that is busy with nothing else."""
    return price_per_hour / 3600 * 1000 / tokens_per_second


def is_resident(bytes_moved: int, l2_bytes: int) -> bool:
    """Tell whether a cache holds so much of what a token reads that the memory's bandwidth says nothing."""
    return bytes_moved < RESIDENT * l2_bytes


def floor_for(name: str, capability: Tuple[int, int], floor: float) -> float:
    """Return the fraction of the bandwidth that must be reached: less on small and on old GPUs."""
    consumer = any(word in name for word in ("GeForce", "RTX", "GTX", "TITAN", "Quadro", "Tegra", "Orin", "GB10"))
    return min(floor, 0.75) if consumer or capability < (8, 0) else floor
