"""Several GPUs together: NCCL element by element, DDP, FSDP, the speed between them: T3."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from validate import bundle, timing
from validate.check import Probe, check
from validate.verdict import Blame, Skip

DEADLINE_S = 150.0
"""For the ranks, imports and rendezvous included; a collective that takes longer hangs."""
_START_S = 60.0
"""More for torchrun itself, which must end the ranks and say so."""
FAR = 2e-5
"""Relative distance, by norm, of gradients in float32: as far as sums in another order go, times ten."""
SLOW = 0.7
"""Of the bandwidth that one copy between two GPUs has; less is noted."""
_MOST_RANKS = 8


@dataclass(frozen=True)
class Outcome:
    """What several processes came to."""

    world: int
    returncode: Optional[int]
    """Of torchrun; None if it had to be ended."""
    printed: str
    devices: Tuple[Mapping[str, Any], ...] = ()
    """What each rank computes on, told before it met the others."""
    ranks: Tuple[Mapping[str, Any], ...] = ()
    """What each rank that came to its end saw."""
    transports: Tuple[str, ...] = ()
    """How NCCL says that it sends: "P2P/CUMEM", "SHM/direct/direct", "NET/Socket/0"."""

    @property
    def hung(self) -> bool:
        """Whether a rank waited for the others until its time was up."""
        return self.returncode is None or (self.returncode != 0 and "Timeout (" in self.printed)

    @property
    def ended(self) -> bool:
        """Whether every rank came to its end."""
        return self.returncode == 0 and len(self.ranks) == self.world


def launch(probe: Probe, does: str, environment: Optional[Mapping[str, str]] = None) -> Outcome:
    """Start one process per GPU through torchrun, two on the CPU, and wait for them."""
    on_gpu = probe.device != "cpu"
    world = min(_gpus(probe), _MOST_RANKS) if on_gpu else 2
    folder = tempfile.mkdtemp(prefix=f"{does}-", dir=probe.request.scratch)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={world}", "-m", "validate.ranks", does, folder, str(DEADLINE_S)]
    command += ["nccl" if on_gpu else "gloo"]
    variables = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%p", "OMP_NUM_THREADS": "1"}
    variables.update(os.environ)
    variables.update(environment or {})
    # Not instead of what the user has set: that is part of what is validated.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [bundle.root(), os.environ.get("PYTHONPATH")]))
    path = os.path.join(folder, "printed")  # noqa: PTH118
    with open(path, "wb") as file:  # noqa: PTH123
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables)
        returncode: Optional[int]
        try:
            returncode = process.wait(DEADLINE_S + _START_S)
        except subprocess.TimeoutExpired:
            returncode = None
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    outcome = Outcome(
        world=world,
        returncode=returncode,
        printed=_text(path),
        devices=_documents(folder, "device"),
        ranks=_documents(folder, "rank"),
        transports=transports("".join(_text(os.path.join(folder, name)) for name in _named(folder, "nccl."))),  # noqa: PTH118
    )
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _gpus(probe: Probe) -> int:
    import torch

    count = int(torch.cuda.device_count())
    if count < 2:
        probe.skip(Skip.NEEDS_GPUS, f"torch sees {count} GPU(s); CUDA_VISIBLE_DEVICES may hide the others")
    return count


def _named(folder: str, beginning: str) -> Sequence[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(beginning))  # noqa: PTH208


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read()


def _documents(folder: str, what: str) -> Tuple[Mapping[str, Any], ...]:
    names = [name for name in _named(folder, f"{what}-") if name.endswith(".json")]
    return tuple(json.loads(_text(os.path.join(folder, name))) for name in names)  # noqa: PTH118


def transports(log: str) -> Tuple[str, ...]:
    """Return how NCCL sends, by its own log: "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM"."""
    return tuple(sorted(set(re.findall(r"\[\w+\] -> \d+\[\w+\](?: \[\w+\])? via (\S+)", log))))


# ----------------------------------------------------------------------------------------------------
# Judging


def _end(text: str) -> str:
    """Return the part of what torchrun printed that says most: the last error, or else the last lines."""
    errors = [line for line in text.splitlines() if re.search(r"\b\w*(?:Error|Exception)\b.*: ", line)]
    return "\n".join(dict.fromkeys(errors[:3])) or text.strip()[-600:]


def judge_started(probe: Probe, outcome: Outcome) -> None:
    """Stop unless every rank came to its end, and say what is known of the reason."""
    names = [document["device"] for document in outcome.devices]
    if len(set(names)) < len(names):
        probe.stop(
            "two ranks compute on one GPU",
            why=f"ranks → GPUs: {', '.join(names)}",
            remedy="give each rank a GPU of its own: CUDA_VISIBLE_DEVICES must name each only once",
            mode="F60",
            blame=Blame.HOST,
        )
    if outcome.ended:
        return
    sys.stderr.write(outcome.printed)
    if outcome.hung:
        probe.stop(
            f"{outcome.world} processes did not get done together within {DEADLINE_S:.0f} s",
            why=f"{len(outcome.ranks)} of {outcome.world} came to their end; {_stack(outcome.printed)}",
            remedy="look where each stands in the check's output; NCCL_DEBUG=INFO says how they are connected",
            blame=Blame.UNKNOWN,
        )
    # Left to the catalogue of messages, which knows many of these.
    raise RuntimeError(f"torchrun ended with exit code {outcome.returncode}: {_end(outcome.printed)}")


def _stack(printed: str) -> str:
    found = re.search(r"most recent call first\):\n\s*(.+)", printed)
    return f"one stands in {found.group(1).strip()}" if found else "none said where it stands"


def judge_hang(probe: Probe, outcome: Outcome, without_p2p: Outcome) -> None:
    """Tell a hang that copies between GPUs cause from any other."""
    if outcome.hung and without_p2p.ended:
        probe.stop(
            "GPUs cannot copy to each other directly: the collectives hang, and work with NCCL_P2P_DISABLE=1",
            why="this is how PCIe access control (ACS) or an IOMMU shows that redirects what one GPU sends to another",
            remedy="switch ACS off on the PCIe bridges, or the IOMMU in firmware or by iommu=pt; until then set "
            "NCCL_P2P_DISABLE=1",
            mode="F58",
            blame=Blame.HOST,
        )


def judge_collectives(probe: Probe, outcome: Outcome) -> None:
    """Every element of every collective on every rank must be right."""
    counts: Dict[str, int] = {}
    for document in outcome.ranks:
        for name, count in document["wrong"].items():
            counts[name] = counts.get(name, 0) + count
    bad = {name: count for name, count in counts.items() if count}
    probe.saw(collectives=sorted(counts), wrong=bad, transports=list(outcome.transports))
    missing = sorted({text for document in outcome.ranks for text in document["missing"]})
    if bad:
        probe.fail(
            f"collectives give wrong numbers: {', '.join(sorted({name.split()[0] for name in bad}))}",
            why=", ".join(f"{name}: {count} elements" for name, count in sorted(bad.items())),
            remedy="try NCCL_P2P_DISABLE=1, then NCCL_SHM_DISABLE=1: which of them mends it says what path is broken",
            blame=Blame.UNKNOWN,
        )
    if missing:
        probe.warn("collectives that this backend does not have were not tried", why="; ".join(missing))
    if any(name.startswith("NET/Socket") for name in outcome.transports):
        probe.warn(
            "NCCL sends through sockets between GPUs of one machine",
            why=f"transports: {', '.join(outcome.transports)}",
            remedy="give the container shared memory (--shm-size=8g or --ipc=host); see NCCL_DEBUG=INFO",
            mode="F59",
            blame=Blame.HOST,
        )
    ways = f" through {', '.join(outcome.transports)}" if outcome.transports else ""
    probe.detail(f"{outcome.world} ranks, {len(counts)} collectives exact{ways}")


def _worst(outcome: Outcome, name: str) -> float:
    """Return the largest number of all ranks; NaN is the largest."""
    return max((float(document[name]) for document in outcome.ranks), key=lambda it: (it != it, it))  # noqa: PLR0124


def judge_ddp(probe: Probe, outcome: Outcome) -> None:
    """Gradients must be the mean, and bit by bit the same on all ranks."""
    distance, different = _worst(outcome, "distance"), int(_worst(outcome, "different"))
    probe.metric("distance", distance, "relative")
    if different:
        probe.fail(
            "DDP leaves the ranks with different gradients",
            why=f"{different} elements differ between ranks",
            remedy="run dist.nccl; if it passes, look for what wraps or replaces DistributedDataParallel",
            blame=Blame.UNKNOWN,
        )
    if not distance <= FAR:
        probe.fail(
            "DDP's gradients are not the mean of the ranks' own",
            why=f"relative distance {distance:.1e} from float64 in one process, at most {FAR:.0e}",
            remedy="run num.gemm and dist.nccl: one of them says whether products or sums are wrong",
            blame=Blame.UNKNOWN,
        )
    probe.detail(f"{outcome.world} ranks, gradients equal, {distance:.1e} from float64")


def judge_fsdp(probe: Probe, outcome: Outcome) -> None:
    """FSDP's step must be DDP's, and a checkpoint must bring back every bit."""
    unsupported = [document["unsupported"] for document in outcome.ranks if "unsupported" in document]
    if unsupported:
        probe.skip(Skip.UNSUPPORTED_BY_VERSION, unsupported[0])
    worst = {name: _worst(outcome, name) for name in ("distance", "reference", "step")}
    lost = sum(int(document["lost"]) for document in outcome.ranks)
    for name, value in worst.items():
        probe.metric(name, value, "relative")
    for name, against in (("distance", "DDP's"), ("reference", "float64 in one process"), ("step", "DDP's step")):
        if not worst[name] <= FAR:
            probe.fail(
                f"FSDP computes something else than {against}",
                why=f"relative distance {worst[name]:.1e}, at most {FAR:.0e}",
                remedy="run dist.nccl: all_gather and reduce_scatter are what FSDP is made of",
                blame=Blame.UNKNOWN,
            )
    if lost:
        probe.fail(
            "a distributed checkpoint does not bring back what was saved",
            why=f"{lost} elements differ after torch.distributed.checkpoint.save and load",
            remedy="check that the directory is on a file system that all ranks see, with space left",
            blame=Blame.UNKNOWN,
        )
    if not all(document["sharded"] for document in outcome.ranks):
        probe.fail("fully_shard leaves every rank with all parameters", why="local sizes add up to the whole")
    probe.detail(f"{outcome.world} ranks, step {worst['step']:.1e} from DDP's, checkpoint bit-equal")


def bus_bandwidth(size: int, seconds: float, world: int) -> float:
    """Return what an all-reduce sends over each link, as nccl-tests counts it: algorithm bandwidth · 2(n-1)/n."""
    return size / seconds * 2 * (world - 1) / world


def judge_bandwidth(probe: Probe, outcome: Outcome, link: float) -> None:
    """Warn if summing is far below what copying from one GPU to another can do."""
    document = outcome.ranks[0]
    seconds = statistics.median(timing.rounded(document["all_reduce_s"], 9))
    bus = bus_bandwidth(document["bytes"], seconds, outcome.world)
    probe.metric("busbw", bus / 1e9, "GB/s", better="higher")
    probe.metric("link", link / 1e9, "GB/s", better="higher")
    probe.saw(bytes=document["bytes"], all_reduce_s=timing.rounded(document["all_reduce_s"]))
    if bus < SLOW * link:
        probe.warn(
            f"all_reduce reaches {bus / link:.0%} of what one copy between two GPUs does",
            why=f"{bus / 1e9:.1f} GB/s against {link / 1e9:.1f} GB/s; transports: {', '.join(outcome.transports)}",
            remedy="see by NCCL_DEBUG=INFO whether it sends through P2P, and by `nvidia-smi topo -m` over what",
            blame=Blame.HOST,
        )
    probe.detail(f"{bus / 1e9:.1f} GB/s on each link of {outcome.world}, one copy {link / 1e9:.1f} GB/s")


# ----------------------------------------------------------------------------------------------------
# The checks


@check(
    "dist.nccl",
    title="collectives give every element right",
    tier=3,
    needs=("dev.available",),
    deadline_s=2 * (DEADLINE_S + _START_S + 10) + 20,
    modes=("F58", "F59", "F60"),
)
def nccl(probe: Probe) -> None:
    """all_reduce, all_gather, broadcast, reduce_scatter; a hang is tried again without copies between GPUs."""
    outcome = launch(probe, "collectives")
    if outcome.hung and probe.device != "cpu":
        judge_hang(probe, outcome, launch(probe, "collectives", {"NCCL_P2P_DISABLE": "1"}))
    judge_started(probe, outcome)
    judge_collectives(probe, outcome)


@check(
    "dist.ddp",
    title="DDP gives every rank the mean gradient",
    tier=3,
    needs=("dist.nccl",),
)
def ddp(probe: Probe) -> None:
    """One backward pass."""
    outcome = launch(probe, "ddp")
    judge_started(probe, outcome)
    judge_ddp(probe, outcome)


@check(
    "dist.fsdp",
    title="an FSDP step is a DDP step, its checkpoint brings all back",
    tier=3,
    needs=("dist.nccl",),
)
def fsdp(probe: Probe) -> None:
    """One step, saved, lost and loaded."""
    outcome = launch(probe, "fsdp")
    judge_started(probe, outcome)
    judge_fsdp(probe, outcome)


@check(
    "dist.busbw",
    title="summing over GPUs is as fast as copying between them",
    tier=3,
    needs=("dist.nccl",),
)
def busbw(probe: Probe) -> None:
    """all_reduce of 1 GiB; the way between two GPUs is measured by a copy in this process."""
    on_gpu = probe.device != "cpu"
    link = _copy_between_gpus(probe) if on_gpu else 0.0
    outcome = launch(probe, "bandwidth")
    judge_started(probe, outcome)
    if not on_gpu:
        first = outcome.ranks[0]
        link = first["bytes"] / statistics.median(timing.rounded(first["hop_s"], 9))
    judge_bandwidth(probe, outcome, link)


def _copy_between_gpus(probe: Probe) -> float:
    """Return the bytes per second of a copy from the first GPU to the second."""
    import torch

    _gpus(probe)
    size = 256 << 20
    source = torch.empty(size, dtype=torch.uint8, device="cuda:0").random_()
    target = torch.empty(size, dtype=torch.uint8, device="cuda:1")

    def copy() -> None:
        target.copy_(source)
        # Work on one GPU's stream; the other must have it, too.
        torch.cuda.synchronize(1)

    seconds = [timing.host_seconds(copy, "cuda:0") for _ in range(8)]
    wrong = int((target.cpu() != source.cpu()).sum().item())
    if wrong:
        probe.stop(
            "a copy from one GPU to another changes the bytes",
            why=f"{wrong} of {size} bytes differ",
            remedy="switch ACS off on the PCIe bridges, or the IOMMU in firmware or by iommu=pt",
            mode="F58",
            blame=Blame.HOST,
        )
    return size / statistics.median(seconds[3:])
