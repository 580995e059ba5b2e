"""What torch computes on the CPU: numerics against fp64, a decoder, training, torch.compile: T1."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from validate import model, numerics
from validate.check import Probe, check
from validate.numerics import TOLERANCES, Error
from validate.verdict import Blame, Skip

if TYPE_CHECKING:
    import torch

_REINSTALL = "install torch again; if it stays wrong, try another machine: memory or processor may be faulty"
_SHM = "docker run --shm-size=8g (or --ipc=host); in Kubernetes mount an emptyDir of medium Memory at /dev/shm"
_COMPILERS = "apt-get install g++ gcc libc6-dev, or set CXX and CC; without torch.compile: --option compile=false"


# ----------------------------------------------------------------------------------------------------
# Numerics


@dataclass(frozen=True)
class Threads:
    """How many threads torch computes with, and what that follows from."""

    used: int
    cores: int
    """Physical ones that this process may run on."""
    asked: Mapping[str, str]
    """OMP_NUM_THREADS and the like, where they are set."""
    openmp: Sequence[str]
    """Files of libgomp in this process."""


def judge_threads(probe: Probe, threads: Threads) -> None:
    """One thread on several cores is a fault, unless it was asked for; two OpenMP libraries often are the cause."""
    probe.saw(threads=threads.used, cores=threads.cores, asked=dict(threads.asked), openmp=list(threads.openmp))
    if len(threads.openmp) > 1:
        probe.warn(
            "two OpenMP libraries are loaded: each has threads of its own",
            why=", ".join(threads.openmp),
            remedy="find out with LD_DEBUG=files who loads the second (LD_PRELOAD, a package beside torch); remove it",
            mode="F23",
            blame=Blame.IMAGE,
        )
    if threads.used > 1 or threads.cores <= 1:
        return
    if threads.asked:
        settings = ", ".join(f"{name}={value}" for name, value in sorted(threads.asked.items()))
        probe.warn(
            f"torch computes with one thread on {threads.cores} cores, as it was told to",
            why=settings,
            remedy=f"unset {' and '.join(sorted(threads.asked))} unless several processes share the machine",
            mode="F23",
            blame=Blame.IMAGE,
        )
    else:
        probe.fail(
            f"torch computes with one thread on {threads.cores} cores",
            why="torch.get_num_threads() is 1 and no variable asks for it",
            remedy="see which OpenMP libraries are loaded; torch.set_num_threads() helps until then",
            mode="F23",
            blame=Blame.IMAGE,
        )


def judge_vectors(probe: Probe, used: str, flags: Sequence[str]) -> None:
    """Torch must use AVX2 where the processor has it: its kernels without are several times slower."""
    probe.saw(vectors=used)
    if "avx2" in flags and not used.startswith("AVX"):
        probe.warn(
            f"torch computes without the processor's vector instructions: {used}",
            why="the processor has AVX2",
            remedy="unset ATEN_CPU_CAPABILITY; if it is not set, this torch was built without AVX2",
            blame=Blame.IMAGE,
        )


def _cores(allowed: Sequence[int]) -> int:
    """Return how many physical cores these processors are; two threads of one core count once."""
    siblings = {_siblings(number) for number in allowed}
    return max(1, len(allowed) // 2) if None in siblings else len(siblings)


def _siblings(number: int) -> Optional[str]:
    """Return which processors share a core with this one, "0,4"; None where the kernel does not say."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return None


def _threads() -> Threads:
    import torch

    openmp = set()
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[-1]
            if re.search(r"/libgomp[^/]*\.so", path):
                openmp.add(path)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
    return Threads(
        used=torch.get_num_threads(),
        cores=_cores(sorted(os.sched_getaffinity(0))),
        asked={name: os.environ[name] for name in names if name in os.environ},
        openmp=sorted(openmp),
    )


def _flags() -> List[str]:
    """Return what the processor says that it can do; of other makes than x86, nothing."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        found = re.search(r"^flags\s*:\s*(.*)$", file.read(), re.MULTILINE)
    return found.group(1).split() if found else []


def _operations(dtype: torch.dtype) -> Iterator[Tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield operations: a name, the result in `dtype`, and what it is in fp64 of the same inputs.

    Odd sizes, so that the ends of the vectorised loops are reached as well.
    """
    import torch
    from torch.nn import functional

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return numerics.normal(*shape, seed=seed, dtype=dtype)

    left, right = draw(257, 1031, seed=1), draw(1031, 131, seed=2)
    poisoned = torch.full((257, 131), float("nan"), dtype=dtype)
    yield "matmul", torch.matmul(left, right, out=poisoned), left.double() @ right.double()

    image, kernel, offset = draw(2, 16, 33, 29, seed=3), draw(24, 16, 3, 3, seed=4), draw(24, seed=5)
    # As a product, not as a convolution: the reference goes another way than what it judges.
    patches = functional.unfold(image.double(), 3, padding=1)
    truth = (kernel.double().flatten(1) @ patches).view(2, 24, 33, 29) + offset.double().view(-1, 1, 1)
    yield "conv2d", functional.conv2d(image, kernel, offset, padding=1), truth

    query, key, value = (draw(2, 4, 129, 64, seed=seed) for seed in (6, 7, 8))
    scores = query.double() @ key.double().transpose(-1, -2) / 8.0
    future = torch.ones(129, 129, dtype=torch.bool).triu(1)
    truth = scores.masked_fill(future, float("-inf")).softmax(-1) @ value.double()
    yield "attention", functional.scaled_dot_product_attention(query, key, value, is_causal=True), truth

    rows = draw(67, 1003, seed=9)
    exponents = rows.double().exp()
    yield "softmax", torch.softmax(rows, -1), exponents / exponents.sum(-1, keepdim=True)

    weight, bias, wide = draw(1003, seed=10), draw(1003, seed=11), rows.double()
    deviation = wide - wide.mean(-1, keepdim=True)
    truth = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    yield "layer_norm", functional.layer_norm(rows, (1003,), weight, bias), truth

    poisoned = torch.full((1003,), float("nan"), dtype=dtype)
    yield "sum", torch.sum(rows, 0, out=poisoned), wide.sum(0)
    yield "norm", rows.norm(dim=-1), wide.square().sum(-1).sqrt()
    yield "logsumexp", rows.logsumexp(-1), exponents.sum(-1).log()


def _wrong_products() -> int:
    """Count the elements of a product of whole numbers that are not exact; fp32 holds all its sums exactly."""
    import torch

    generator = torch.Generator().manual_seed(12)
    left, right = (torch.randint(-64, 65, shape, generator=generator) for shape in ((127, 511), (511, 63)))
    # Of integers torch computes it by itself, without a BLAS.
    return int((left.float() @ right.float() != (left @ right)).sum())


@check(
    "cpu.numerics",
    title="results on the CPU are as exact as their type allows",
    tier=1,
    needs=("run.import",),
    modes=("F23",),
)
def compute(probe: Probe) -> None:
    """Matrix products, convolution, attention, norms and sums in fp32 and bf16 against fp64."""
    import torch

    judge_threads(probe, _threads())
    # Named so from torch 2.1 on.
    if hasattr(torch.backends.cpu, "get_cpu_capability"):
        judge_vectors(probe, torch.backends.cpu.get_cpu_capability(), _flags())
    worst: Dict[str, float] = {}
    for name in ("fp32", "bf16"):
        errors: Dict[str, Error] = {}
        for operation, out, truth in _operations(numerics.dtypes()[name]):
            errors[operation] = numerics.error(out, truth)
            numerics.judge(
                probe, f"{operation} in {name} on the CPU", errors[operation], TOLERANCES[name], remedy=_REINSTALL
            )
        probe.saw(**{name: {operation: error.norm for operation, error in errors.items()}})
        worst[name] = max(error.norm for error in errors.values())
        probe.metric(f"{name} error", worst[name], "relative", better="lower")
    wrong = _wrong_products()
    if wrong:
        probe.fail(
            "a matrix product of whole numbers is not exact on the CPU",
            why=f"{wrong} elements differ",
            remedy=_REINSTALL,
            blame=Blame.UNKNOWN,
        )
    probe.detail(f"{torch.get_num_threads()} threads; error {worst['fp32']:.1e} in fp32, {worst['bf16']:.1e} in bf16")


# ----------------------------------------------------------------------------------------------------
# A decoder


@dataclass(frozen=True)
class Decoding:
    """What a decoder did."""

    forward: Error
    """fp32 against fp64."""
    cached: Error
    """fp64, token by token with a cache, against whole sequences."""
    cached32: Error
    """The same in fp32, against fp64."""
    leaked: int
    """Logits that changed when only later tokens did."""
    moved: int
    """Logits that changed where the tokens did."""
    repeated: bool
    """Whether generating twice gave the same tokens, and the same logits bit for bit."""
    distinct: int
    """How many different tokens were generated."""


def judge_decoding(probe: Probe, seen: Decoding) -> None:
    """Judge a decoder by what must hold of any."""
    numerics.judge(probe, "a decoder's forward pass in fp32", seen.forward, TOLERANCES["fp32"], remedy=_REINSTALL)
    numerics.judge(probe, "decoding with a cache in fp64", seen.cached, TOLERANCES["fp64"], remedy=_REINSTALL)
    numerics.judge(probe, "decoding with a cache in fp32", seen.cached32, TOLERANCES["fp32"], remedy=_REINSTALL)
    if seen.leaked:
        probe.fail(
            "attention looks into the future: earlier logits change with later tokens",
            why=f"{seen.leaked} logits changed",
            remedy=_REINSTALL,
            blame=Blame.UNKNOWN,
        )
    if not seen.moved:
        probe.fail("other tokens give the same logits", why="no logit changed", remedy=_REINSTALL, blame=Blame.UNKNOWN)
    if not seen.repeated:
        probe.fail(
            "greedy decoding gives something else the second time",
            why="the same weights and the same prompt in one process",
            remedy=_REINSTALL,
            blame=Blame.UNKNOWN,
        )
    if seen.distinct < 2:
        probe.fail("decoding gives one token for ever", why="random weights never do", blame=Blame.UNKNOWN)
    probe.metric("forward error", seen.forward.norm, "relative", better="lower")
    probe.metric("cache error", seen.cached32.norm, "relative", better="lower")
    probe.detail(
        f"fp32 is {seen.forward.norm:.1e} from fp64, with a cache {seen.cached32.norm:.1e}; causal, repeatable"
    )


def _logits(decoder: model.Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model.forward(decoder, tokens), decoder.norm, decoder.head)


def _stepped(decoder: model.Decoder, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits of the tokens after the prompt, each fed in by itself."""
    import torch

    at = model.state(decoder, batch=tokens.shape[0])
    for cache in (*at.keys, *at.values):
        # What is not written yet must not be read.
        cache.fill_(float("nan"))
    model.prefill(decoder, tokens[:, :prompt], at)
    found = []
    for number in range(prompt, tokens.shape[1]):
        at.token.copy_(tokens[:, number])
        found.append(model.step(decoder, at))
    return torch.stack(found, 1)


def _generated(decoder: model.Decoder, prompt: torch.Tensor, count: int) -> Tuple[List[int], str]:
    """Return the tokens that follow a prompt, and the digest of the last logits."""
    at = model.state(decoder)
    found = model.prefill(decoder, prompt, at)
    for _ in range(count - 1):
        found = model.step(decoder, at)
    return at.history[prompt.shape[1] :, 0].tolist()[:count], numerics.digest(found)


def _decode() -> Decoding:
    import torch

    geometry, length, prompt = model.TINY, 24, 12
    decoder = model.create(geometry, positions=length + 8, dtype=torch.float32, device="cpu")
    exact = model.converted(decoder, dtype=torch.float64, device="cpu")
    tokens = torch.randint(0, geometry.vocab, (2, length), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, prompt:] = (other[:, prompt:] + 1) % geometry.vocab
    with torch.inference_mode():
        truth, found, changed = _logits(exact, tokens), _logits(decoder, tokens), _logits(decoder, other)
        first, again = (_generated(decoder, tokens[:1, :prompt], 16) for _ in range(2))
        return Decoding(
            forward=numerics.error(found, truth),
            cached=numerics.error(_stepped(exact, tokens, prompt), truth[:, prompt:]),
            cached32=numerics.error(_stepped(decoder, tokens, prompt), truth[:, prompt:]),
            leaked=int((found[:, :prompt] != changed[:, :prompt]).sum()),
            moved=int((found[:, prompt:] != changed[:, prompt:]).sum()),
            repeated=first == again,
            distinct=len(set(first[0])),
        )


@check(
    "cpu.transformer",
    title="a decoder computes what fp64 does, with a cache and without",
    tier=1,
    needs=("run.import",),
)
def transformer(probe: Probe) -> None:
    """Forward pass, causality, key/value cache and greedy decoding of the suite's own decoder."""
    judge_decoding(probe, _decode())


# ----------------------------------------------------------------------------------------------------
# Training


class Numbered:
    """A data set whose n-th tensor is filled with n; a worker process makes it."""

    def __init__(self, length: int, size: int) -> None:
        self._length, self._size = length, size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> torch.Tensor:
        import torch

        return torch.full((self._size,), float(number))


def judge_losses(probe: Probe, losses: Sequence[float]) -> None:
    """Training on one batch again and again must at least halve the loss."""
    probe.saw(losses=[round(loss, 4) for loss in losses])
    probe.metric("loss left", losses[-1] / losses[0], "of the first", better="lower")
    if not losses[-1] <= losses[0] / 2:
        probe.fail(
            "training does not learn: on one batch the loss does not fall by half",
            why=f"{losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps",
            remedy=_REINSTALL,
            blame=Blame.UNKNOWN,
        )


def judge_batches(probe: Probe, batches: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """Compare what arrived with what worker processes made: whole, and in order."""
    if list(map(list, batches)) != list(map(list, expected)):
        probe.fail(
            "a DataLoader's workers hand over other data than they made",
            why=f"{list(batches)[:4]} instead of {list(expected)[:4]}",
            remedy=_SHM,
            mode="F35",
            blame=Blame.HOST,
        )


def _loss(decoder: model.Decoder, tokens: torch.Tensor, *, checkpointed: bool = False) -> torch.Tensor:
    """Return the mean loss of predicting each token from those before it."""
    import torch.utils.checkpoint
    from torch.nn import functional

    def run(*arguments: Any) -> Any:  # noqa: ANN401 (as model.block)
        if not checkpointed:
            return model.block(*arguments)
        return torch.utils.checkpoint.checkpoint(model.block, *arguments, use_reentrant=False)

    x = model.forward(decoder, tokens[:, :-1], run=run)
    found = model.logits(x, decoder.norm, decoder.head)
    return functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten())


def _losses(decoder: model.Decoder, tokens: torch.Tensor, steps: int) -> List[float]:
    import torch

    optimizer = torch.optim.AdamW(decoder.weights(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(decoder, tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def _gradients(decoder: model.Decoder, tokens: torch.Tensor, *, checkpointed: bool) -> torch.Tensor:
    """Return all gradients in one row."""
    import torch

    for weight in decoder.weights():
        weight.grad = None
    _loss(decoder, tokens, checkpointed=checkpointed).backward()
    # None where no gradient came: as wrong as a zero.
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in decoder.weights()]
    return torch.cat([part.flatten() for part in parts])


def _check_saving(probe: Probe, decoder: model.Decoder) -> None:
    """Save weights, load them as data alone, compare them bit for bit."""
    import torch

    path = os.path.join(probe.request.scratch, "weights.pt")  # noqa: PTH118
    torch.save({"weights": [weight.detach() for weight in decoder.weights()], "step": 7}, path)
    loaded = torch.load(path, weights_only=True)
    os.unlink(path)  # noqa: PTH108
    saved = [numerics.digest(weight) for weight in decoder.weights()]
    if loaded["step"] != 7 or [numerics.digest(weight) for weight in loaded["weights"]] != saved:
        probe.fail(
            "torch.load gives back other weights than torch.save wrote",
            why=f"{len(saved)} tensors through {path}",
            remedy="check the disk: is there space left, do other files survive there?",
            blame=Blame.UNKNOWN,
        )


def _check_workers(probe: Probe) -> None:
    """Take tensors from two worker processes, through shared memory."""
    from torch.utils.data import DataLoader

    batch, count, size = 2, 8, 1 << 18
    try:
        batches = [
            [float(row.sum()) / size for row in rows]
            for rows in DataLoader(Numbered(count, size), batch_size=batch, num_workers=2)
        ]
    except RuntimeError as error:
        text = str(error)
        if not re.search(r"Bus error|shared memory|unable to (?:resize|allocate|mmap)", text):
            raise
        probe.fail(
            "the workers of a DataLoader cannot hand over tensors: shared memory is too small",
            why=text.strip().splitlines()[-1],
            remedy=_SHM,
            mode="F35",
            blame=Blame.HOST,
        )
        return
    whole = [[float(number + offset) for offset in range(batch)] for number in range(0, count, batch)]
    judge_batches(probe, batches, whole)


@check(
    "cpu.train",
    title="training learns, saves and loads, and gets data from worker processes",
    tier=1,
    needs=("run.import",),
    modes=("F35",),
)
def train(probe: Probe) -> None:
    """Overfit one batch; activation checkpointing; save and load; a DataLoader with two workers."""
    import torch

    # Before any thread of a backward pass exists: the workers are forked where Python does so.
    _check_workers(probe)
    geometry = model.Geometry(hidden=128, heads=4, kv_heads=2, ffn=256, vocab=512, layers=2)
    decoder = model.create(geometry, positions=33, dtype=torch.float32, device="cpu", seed=2)
    for weight in decoder.weights():
        weight.requires_grad_()
    tokens = torch.randint(0, geometry.vocab, (4, 33), generator=torch.Generator().manual_seed(2))
    plain = _gradients(decoder, tokens, checkpointed=False)
    checkpointed = numerics.error(_gradients(decoder, tokens, checkpointed=True), plain)
    numerics.judge(
        probe, "the gradient under activation checkpointing", checkpointed, TOLERANCES["fp32"], remedy=_REINSTALL
    )
    losses = _losses(decoder, tokens, 15)
    judge_losses(probe, losses)
    _check_saving(probe, decoder)
    probe.detail(f"loss {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps; saved, loaded, two data workers")


# ----------------------------------------------------------------------------------------------------
# torch.compile


@dataclass(frozen=True)
class Tools:
    """What there is to compile with."""

    cpp: Optional[str]
    """C++ compiler, for Inductor's code for the CPU."""
    c: Optional[str]
    """C compiler, for Triton's launcher."""
    header: Optional[str]
    """Where Python.h should be, if it is not there."""
    ldconfig: bool
    ptxas: Sequence[str]
    """Those that come with Triton and cannot be executed."""
    triton: bool
    """Whether Triton is installed."""
    cuda: bool
    """Whether this torch is built for CUDA."""


def judge_tools(probe: Probe, tools: Tools) -> None:
    """Say what is missing; Triton's needs count only where it is installed for a GPU."""
    probe.saw(tools={"c++": tools.cpp, "c": tools.c, "triton": tools.triton})
    if tools.cpp is None and not tools.cuda:
        probe.stop("torch.compile has no C++ compiler", why="g++ is not on PATH", remedy=_COMPILERS, mode="F48")
    if tools.cpp is None:
        probe.warn(
            "torch.compile has no C++ compiler, and cannot compile code for the CPU",
            why="g++ is not on PATH",
            remedy=_COMPILERS,
            mode="F48",
            blame=Blame.IMAGE,
        )
    if not (tools.triton and tools.cuda):
        return
    if tools.c is None:
        probe.fail(
            "Triton has no C compiler: torch.compile fails on a GPU",
            why="CC is not set, neither gcc nor clang is on PATH",
            remedy=_COMPILERS,
            mode="F48",
        )
    if tools.header is not None:
        probe.fail(
            "Triton finds no Python.h: torch.compile fails on a GPU",
            why=f"{tools.header} does not exist",
            remedy="apt-get install python3-dev, or libpython3-dev, of the Python that runs torch",
            mode="F49",
        )
    if not tools.ldconfig:
        probe.warn(
            "Triton finds no /sbin/ldconfig, by which it looks for libcuda",
            why="/sbin/ldconfig does not exist",
            remedy="install libc-bin, or set TRITON_LIBCUDA_PATH to the directory of libcuda.so.1",
            mode="F49",
            blame=Blame.IMAGE,
        )
    if tools.ptxas:
        probe.fail(
            "Triton's ptxas cannot be executed",
            why=", ".join(tools.ptxas),
            remedy="install triton again; files were copied without their modes, or lie on a noexec mount",
            mode="F51",
        )


def _tools() -> Tools:
    import torch

    spec = importlib.util.find_spec("triton")
    ptxas: List[str] = []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        programs = os.path.join(folder, "backends", "nvidia", "bin")  # noqa: PTH118
        if os.path.isdir(programs):  # noqa: PTH112
            found = [os.path.join(programs, name) for name in os.listdir(programs) if name.startswith("ptxas")]  # noqa: PTH118, PTH208
            ptxas += [path for path in sorted(found) if not os.access(path, os.X_OK)]
    # "posix_local" is Debian's, for what pip installs; the headers are not there.
    scheme = "posix_prefix" if "posix_local" in sysconfig.get_scheme_names() else None
    paths = sysconfig.get_paths(scheme) if scheme else sysconfig.get_paths()
    header = os.path.join(paths["include"], "Python.h")  # noqa: PTH118
    return Tools(
        cpp=shutil.which(os.environ.get("CXX", "g++")),
        c=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        header=None if os.path.exists(header) else header,  # noqa: PTH110
        ldconfig=os.path.exists("/sbin/ldconfig"),  # noqa: PTH110
        ptxas=ptxas,
        triton=spec is not None,
        cuda=torch.version.cuda is not None,
    )


@dataclass(frozen=True)
class Compiled:
    """What torch.compile made of a block."""

    eager: float
    """Root mean square error against fp64."""
    compiled: float
    elements: int
    libraries: int
    """How many were written; none if torch ran the code as it was."""
    seconds: float


def judge_compiled(probe: Probe, seen: Compiled) -> None:
    """Hold compiled code to being about as near to fp64 as eager code, and to having been compiled at all."""
    probe.metric("compile", seen.seconds, "s", better="lower")
    probe.metric("eager rmse", seen.eager, "")
    probe.metric("compiled rmse", seen.compiled, "")
    if not seen.libraries:
        probe.fail(
            "torch.compile compiled nothing and ran the code as it is",
            why="no generated library was written",
            remedy="unset TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE and TORCHDYNAMO_SUPPRESS_ERRORS",
        )
    if not numerics.as_good(seen.compiled, seen.eager, half=False, elements=seen.elements):
        probe.fail(
            "code compiled for the CPU is wrong",
            why=f"root mean square error {seen.compiled:.2g} against fp64, of eager code {seen.eager:.2g}",
            remedy="try another compiler (CXX), then TORCHINDUCTOR_CACHE_DIR on an empty directory",
            blame=Blame.UNKNOWN,
        )
    probe.detail(
        f"a feed-forward layer in {seen.seconds:.0f} s; error {seen.compiled:.1e}, of eager code {seen.eager:.1e}"
    )


def _feed(layer: model.Layer, x: torch.Tensor) -> torch.Tensor:
    """Return what is compiled: half a block; the whole of it has three times as many kernels, seconds each."""
    return model.feed_forward(layer, model.rms_norm(x, layer.ffn_norm))


def _compile(caches: str) -> Compiled:
    import torch

    geometry = model.TINY
    decoder = model.create(geometry, positions=1, dtype=torch.float32, device="cpu", seed=3)
    exact = model.converted(decoder, dtype=torch.float64, device="cpu")
    x = numerics.normal(64, geometry.hidden, seed=4, dtype=torch.float32)
    with torch.inference_mode():
        truth, eager = _feed(exact.layers[0], x.double()), _feed(decoder.layers[0], x)
        begun = time.monotonic()
        found = torch.compile(_feed, fullgraph=True, dynamic=False)(decoder.layers[0], x)
        seconds = time.monotonic() - begun
    libraries = [name for _, _, names in os.walk(caches) for name in names if name.endswith(".so")]
    return Compiled(
        eager=numerics.rmse(eager, truth),
        compiled=numerics.rmse(found, truth),
        elements=found.numel(),
        libraries=len(libraries),
        seconds=seconds,
    )


@check(
    "cpu.compile",
    title="torch.compile works, and computes what eager code does",
    tier=1,
    needs=("run.import",),
    deadline_s=900,
    modes=("F48", "F49", "F51", "F52", "F54", "F78"),
)
def compiled(probe: Probe) -> None:
    """Look for the tools, then send a feed-forward layer through Inductor's C++."""
    if not probe.options["compile"]:
        probe.skip(Skip.NOT_DECLARED, "the profile says that torch.compile need not work here: compile=false")
    caches = os.path.join(probe.request.scratch, "inductor")  # noqa: PTH118
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    os.environ["TRITON_CACHE_DIR"] = os.path.join(probe.request.scratch, "triton")  # noqa: PTH118
    # Headers that Inductor compiles beforehand go to the directory for temporary files.
    os.environ["TMPDIR"] = probe.request.scratch
    # One graph needs no pool of compiling processes, which would load torch once more each.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch

    tools = _tools()
    judge_tools(probe, tools)
    if tools.cpp is None:
        probe.detail("Triton's tools are there; nothing was compiled for the CPU")
        return
    try:
        seen = _compile(caches)
    except RuntimeError as error:
        # Dynamo refuses interpreters newer than itself: "Dynamo is not supported on Python 3.12+".
        if not re.search(r"not supported on Python", str(error)):
            raise
        probe.skip(
            Skip.UNSUPPORTED_BY_VERSION, f"torch {torch.__version__} on Python {platform.python_version()}: {error}"
        )
    judge_compiled(probe, seen)
