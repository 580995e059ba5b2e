"""One process of several that torchrun starts: what each does together with the others, and what it saw of it.

`torchrun … -m validate.ranks DOES FOLDER SECONDS BACKEND`; each writes FOLDER/RANK.json, which only a rank that came to
its end has. A rank that waits too long for the others prints where it stands and ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_SIZES = (1, 1023, (1 << 20) + 3)
"""Elements: the least, one that no vector divides, one that is cut into several chunks."""


class Rank:
    """This process among the others."""

    def __init__(self, folder: str, backend: str) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.folder = folder
        self.device = torch.device("cpu")
        if backend == "nccl":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self._say("device", {"rank": self.rank, "device": self._name()})
        dist.init_process_group(backend)

    def _name(self) -> str:
        import torch

        if self.device.type == "cpu":
            return f"cpu:{self.rank}"
        properties = torch.cuda.get_device_properties(self.device)
        return str(getattr(properties, "uuid", f"cuda:{self.device.index}"))

    def _say(self, what: str, document: Mapping[str, Any]) -> None:
        path = os.path.join(self.folder, f"{what}-{self.rank}.json")  # noqa: PTH118
        with open(f"{path}.new", "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(document, file)
        os.replace(f"{path}.new", path)  # noqa: PTH105

    def end(self, document: Mapping[str, Any]) -> None:
        """Write what was seen and leave the group."""
        import torch.distributed as dist

        self._say("rank", {"rank": self.rank, **document})
        dist.barrier()
        dist.destroy_process_group()


def _wrong(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Count the elements that are not exactly what they must be; NaN is never."""
    return int((~(found == expected)).sum().item())


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.full_like(like, float("nan") if like.is_floating_point() else -1)


def collectives(rank: Rank) -> Dict[str, Any]:
    """Compare every element of four collectives with what whole numbers make of it."""
    import torch
    import torch.distributed as dist

    wrong: Dict[str, int] = {}
    missing: List[str] = []
    me, world = rank.rank, rank.world
    for dtype in (torch.float32, torch.int64, torch.bfloat16):
        for size in _SIZES:
            # At most 64 times 16: exact in bfloat16, which has eight bits, as their sums are multiples of 8 below 2048.
            base = torch.arange(size, device=rank.device) % 8 * 8

            def of(number: int, base: torch.Tensor = base, dtype: torch.dtype = dtype) -> torch.Tensor:
                return (base + 8 * (number % 2)).to(dtype)

            total = sum((of(number).double() for number in range(world)), torch.zeros((), device=rank.device).double())
            name = f"{str(dtype).rpartition('.')[2]}[{size}]"

            def note(what: str, count: int, name: str = name) -> None:
                wrong[f"{what} {name}"] = count

            reduced = of(me)
            dist.all_reduce(reduced)
            note("all_reduce", _wrong(reduced.double(), total))

            mine = of(me)
            gathered = [_poisoned(mine) for _ in range(world)]
            dist.all_gather(gathered, mine)
            note("all_gather", sum(_wrong(part, of(number)) for number, part in enumerate(gathered)))

            sent = mine if me == world - 1 else _poisoned(mine)
            dist.broadcast(sent, src=world - 1)
            note("broadcast", _wrong(sent, of(world - 1)))

            part = _poisoned(mine)
            try:
                dist.reduce_scatter_tensor(part, mine.repeat(world))
            except (RuntimeError, NotImplementedError) as error:
                # gloo learnt it late; NCCL always could.
                if rank.device.type != "cpu":
                    raise
                missing.append(f"reduce_scatter {name}: {error}")
            else:
                note("reduce_scatter", _wrong(part.double(), total))
    return {"wrong": wrong, "missing": missing}


def _network(seed: int, device: torch.device) -> torch.nn.Module:
    """Return a small network with a transformer's parts, on every rank and every device the same."""
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(96, 256, bias=False),
        torch.nn.LayerNorm(256),
        torch.nn.GELU(),
        torch.nn.Linear(256, 192),
        torch.nn.GELU(),
        torch.nn.Linear(192, 33),
    ).to(device)


def _batches(world: int) -> List[torch.Tensor]:
    """Return what each rank trains on."""
    import torch

    generator = torch.Generator().manual_seed(11)
    return [torch.randn(24, 96, generator=generator) for _ in range(world)]


def _loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def _reference(world: int) -> Dict[str, torch.Tensor]:
    """Return the mean of all ranks' gradients as one process computes it in float64."""
    model = _network(5, _cpu()).double()
    for batch in _batches(world):
        (_loss(model, batch.double()) / world).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _distance(found: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """Return the largest relative distance of two sets of tensors, by norm."""
    import torch

    distances = []
    for name, expected in reference.items():
        expected64 = expected.detach().double().cpu()
        distance = torch.linalg.vector_norm(found[name].detach().double().cpu() - expected64)
        distances.append(float(distance / torch.linalg.vector_norm(expected64)))
    return max(distances, key=lambda it: (it != it, it))  # NaN is the largest  # noqa: PLR0124


def _across(tensors: Sequence[torch.Tensor]) -> int:
    """Count the elements of the tensors in which this rank differs from the first, bit by bit."""
    import torch
    import torch.distributed as dist

    different = 0
    for tensor in tensors:
        first = tensor.detach().clone()
        dist.broadcast(first, src=0)
        different += int((first.view(torch.int32) != tensor.detach().view(torch.int32)).sum().item())
    return different


def data_parallel(rank: Rank) -> Dict[str, Any]:
    """Take gradients by DDP: the same on every rank, and the mean of what each alone would have."""
    import torch

    torch.set_float32_matmul_precision("highest")
    ids = [rank.device.index] if rank.device.type == "cuda" else None
    model = torch.nn.parallel.DistributedDataParallel(_network(5, rank.device), device_ids=ids)
    _loss(model, _batches(rank.world)[rank.rank].to(rank.device)).backward()
    gradients = {name.partition(".")[2]: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "distance": _distance(gradients, _reference(rank.world)),
        "different": _across([gradients[name] for name in sorted(gradients)]),
    }


def both(rank: Rank) -> Dict[str, Any]:
    """Do what `collectives` and `data_parallel` do, in processes that are started once."""
    return {**collectives(rank), **data_parallel(rank)}


def fully_sharded(rank: Rank) -> Dict[str, Any]:
    """Take a step by FSDP2, compare it with DDP's, save it, lose it, load it again."""
    import torch
    import torch.distributed.checkpoint as dcp

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return {"unsupported": f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard"}
    torch.set_float32_matmul_precision("highest")
    batch = _batches(rank.world)[rank.rank].to(rank.device)
    models: Dict[str, Any] = {}
    gradients: Dict[str, Dict[str, torch.Tensor]] = {}
    for name in ("ddp", "fsdp"):
        inner = _network(5, rank.device)
        if name == "ddp":
            ids = [rank.device.index] if rank.device.type == "cuda" else None
            model: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(inner, device_ids=ids)
        else:
            for layer in inner:
                if isinstance(layer, torch.nn.Linear):
                    fully_shard(layer)
            model = fully_shard(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        _loss(model, batch).backward()
        gradients[name] = {key: _whole(it.grad) for key, it in inner.named_parameters()}
        optimizer.step()
        models[name] = {key: _whole(it) for key, it in inner.named_parameters()}
        last = inner
    state = last.state_dict()
    saved = {key: _local(it).detach().clone() for key, it in state.items()}
    path = os.path.join(rank.folder, "checkpoint")  # noqa: PTH118
    dcp.save(state, checkpoint_id=path)
    with torch.no_grad():
        for it in state.values():
            _local(it).fill_(float("nan"))
    dcp.load(state, checkpoint_id=path)
    return {
        "distance": _distance(gradients["fsdp"], gradients["ddp"]),
        "reference": _distance(gradients["fsdp"], _reference(rank.world)),
        "step": _distance(models["fsdp"], models["ddp"]),
        "lost": sum(_wrong(_local(it), saved[key]) for key, it in last.state_dict().items()),
        "sharded": sum(_local(it).numel() for it in state.values()) < sum(it.numel() for it in state.values()),
    }


def _whole(tensor: Any) -> torch.Tensor:  # noqa: ANN401 (a tensor or a DTensor)
    return tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def _local(tensor: Any) -> torch.Tensor:  # noqa: ANN401
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bandwidth(rank: Rank) -> Dict[str, Any]:
    """Time summing a large buffer over all ranks; through gloo a small one, and the way from one rank to the next."""
    import torch
    import torch.distributed as dist

    on_gpu = rank.device.type == "cuda"
    count = (1 << 28) if on_gpu else (1 << 20)
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(rank.device)
        count = min(count, free // 16)
    # All must sum as many.
    least = torch.tensor([count], device=rank.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    buffer = torch.zeros(int(least.item()), device=rank.device)

    def once() -> None:
        dist.all_reduce(buffer)

    def hop() -> None:
        if rank.rank < 2:
            (dist.send if rank.rank == 0 else dist.recv)(buffer, 1 - rank.rank)

    def seconds(call: Callable[[], None]) -> List[float]:
        taken = []
        for _ in range(8):
            dist.barrier()
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        return taken[3:]

    return {
        "bytes": buffer.numel() * buffer.element_size(),
        "world": rank.world,
        "all_reduce_s": seconds(once),
        "hop_s": [] if on_gpu else seconds(hop),
    }


DOES: Mapping[str, Callable[[Rank], Dict[str, Any]]] = {
    "collectives": collectives,
    "ddp": data_parallel,
    "both": both,
    "fsdp": fully_sharded,
    "bandwidth": bandwidth,
}


def main(arguments: Sequence[str]) -> None:
    """Do one of DOES together with the other ranks."""
    does, folder, seconds, backend = arguments
    # torchrun gives its workers sessions of their own: they would live on if it were killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    rank = Rank(folder, backend)
    rank.end(DOES[does](rank))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1:])
