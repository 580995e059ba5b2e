"""A plan → its image in the store, out of layers that are made on all cores."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from builder import layout, tar
from builder.base import BaseImage
from builder.engines import BuiltImage, Steps
from builder.engines.oci.foundation import Foundation, foundation_of
from builder.engines.oci.layers import Compiler, Made, StoppedError, cell_layer, refuse_collisions, spliced
from builder.engines.oci.stack import Group, Section, section_of, stack
from builder.engines.oci.turns import Turns
from builder.layout import History
from builder.lock import Wheel
from builder.render import ImageConfig, Plan
from builder.sha256 import Hasher
from builder.store import Store

NANOSECONDS = 1_000_000_000
"""What a second is in an image's configuration."""
OBSERVED = 1
"""Schema of what was observed: that of `validate/facts.py`."""
_EMPTY = f"sha256:{hashlib.sha256(tar.END).hexdigest()}"
"""The diffID of a layer with nothing in it."""
_COMPILED = {
    Section.TORCH: "torch",
    Section.COMMON: "what torch needs",
    Section.VARIANT: "the variant's own packages",
}
"""Sections above which lies a layer of bytecode, and whose it is: of all others it is in that of COMMON."""


def build(plan: Plan, base: BaseImage | None, *, store: Store, steps: Steps, workers: int) -> BuiltImage:
    """Make the image in the store, and read out of its bytes what they say of it; raises as `OciEngine.build` does."""
    steps.step("base")
    foundation = foundation_of(plan, base, store)
    groups = stack(plan.lock.wheels, taken=len(foundation.layers))
    wheels, bytecode, identity = _layers(plan, foundation, groups, store=store, steps=steps, workers=workers)
    own = cell_layer(plan, foundation, store)
    refuse_collisions([own, *wheels])
    layers = [*_ordered(groups, wheels, bytecode), *_system(plan, foundation), own]
    steps.step("image")
    image = layout.assemble(
        store,
        architecture=plan.cell.platform.partition("/")[2],
        config=run_config(foundation.config, plan.config),
        epoch=plan.epoch,
        layers=[*foundation.layers, *(made.layer for made in layers)],
        history=[*foundation.history, *(History(created_by=f"torchyard: {made.title}") for made in layers)],
    )
    return BuiltImage(
        digest=image.manifest.digest,
        size_bytes=sum(blob.size for blob in image.blobs),
        observed=observed(plan, wheels, identity),
    )


def _layers(
    plan: Plan, foundation: Foundation, groups: Sequence[Group], *, store: Store, steps: Steps, workers: int
) -> tuple[list[Made], Mapping[Section, Made], Mapping[str, str]]:
    """Make the layers of wheels and of bytecode, all cores busy, the longest first."""
    stopped = threading.Event()
    done = 0
    lock = threading.Lock()
    turns = Turns.on(workers)

    def one(group: Group) -> Made:
        nonlocal done
        made = spliced(group, store, hasher=hasher, turns=turns, stopped=stopped)
        with lock:
            done += 1
            steps.step(f"layer {done} of {len(groups)} · {group.size / 1e6:.0f} MB · {shown(group)}")
        return made

    python = plan.cell.python
    with (
        Compiler(foundation, store, python=python, workers=workers, stopped=stopped) as compiler,
        Hasher(workers) as hasher,
        ThreadPoolExecutor(hasher.producers + 1) as pool,
    ):
        code = pool.submit(_bytecode, compiler, plan)
        by_size = sorted(groups, key=lambda group: (-group.size, group.title))
        futures = {group.title: pool.submit(one, group) for group in by_size}
        try:
            _finish([code, *futures.values()])
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [futures[group.title].result() for group in groups], code.result(), compiler.identity


def shown(group: Group) -> str:
    """Return what people read of a group while its layer is made."""
    first, *rest = group.wheels
    return f"{first.name} {first.version}" + (f" and {len(rest)} more" if rest else "")


def _bytecode(compiler: Compiler, plan: Plan) -> dict[Section, Made]:
    """Make the layers of bytecode by the section that each lies above: variants of one torch share the first two."""
    made = {group.section: compiler.layer(group.wheels, title=bytecode_of(group)) for group in compiled(plan)}
    return {section: layer for section, layer in made.items() if layer.layer.diff_id != _EMPTY}


def compiled(plan: Plan) -> tuple[Group, ...]:
    """Return the wheels whose bytecode shares a layer, under the section that it lies above."""
    wheels: dict[Section, list[Wheel]] = {}
    for wheel in plan.lock.wheels:
        section = section_of(wheel)
        wheels.setdefault(section if section in _COMPILED else Section.COMMON, []).append(wheel)
    return tuple(Group(section=section, wheels=tuple(members)) for section, members in wheels.items())


def bytecode_of(group: Group) -> str:
    """Return what people read of the bytecode of such a group."""
    return f"bytecode of {_COMPILED[group.section]}"


def _ordered(groups: Sequence[Group], wheels: Sequence[Made], bytecode: Mapping[Section, Made]) -> Iterator[Made]:
    """Yield the layers from the bottom up: what every variant of a torch has, and then what this one adds."""
    for section in Section:
        yield from (made for group, made in zip(groups, wheels, strict=True) if group.section is section)
        if section in bytecode:
            yield bytecode[section]


def _system(plan: Plan, foundation: Foundation) -> Iterator[Made]:
    if foundation.system is not None:
        yield Made(layer=foundation.system, title=f"system packages: {', '.join(plan.cell.variant.system)}")


def _finish(futures: Sequence[Future[Any]]) -> None:
    """Wait until all are done; raises the first failure that is not a mere consequence of another."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        error = future.exception()
        if error is not None and not isinstance(error, StoppedError):
            raise error
    for future in futures:
        future.result()


def run_config(base: Mapping[str, Any], config: ImageConfig) -> dict[str, Any]:
    """Return the run part of an image's configuration: the base's, and over it the plan's, as a Dockerfile would."""
    env = dict(line.split("=", 1) for line in base.get("Env") or () if "=" in line) | dict(config.env)
    merged = dict(base) | {
        "Env": [f"{name}={value}" for name, value in env.items()],
        "Labels": dict(sorted({**(base.get("Labels") or {}), **config.labels}.items())),
        "User": config.user,
        "WorkingDir": config.workdir,
        "Cmd": list(config.cmd),
    }
    if config.entrypoint:
        merged["Entrypoint"] = list(config.entrypoint)
    if config.healthcheck is not None:
        merged["Healthcheck"] = {
            "Test": ["CMD", *config.healthcheck.command],
            "Interval": config.healthcheck.interval_s * NANOSECONDS,
            "Timeout": config.healthcheck.timeout_s * NANOSECONDS,
            "StartPeriod": config.healthcheck.start_period_s * NANOSECONDS,
            "Retries": config.healthcheck.retries,
        }
    ports = {**(base.get("ExposedPorts") or {}), **{port: {} for port in config.exposed_ports}}
    if ports:
        merged["ExposedPorts"] = ports
    return merged


def observed(plan: Plan, wheels: Sequence[Made], identity: Mapping[str, str]) -> dict[str, Any]:
    """Return what the image's bytes say of it, in the form of `validate/facts.py`.

    What no wheel brings is none: a CPU build has no cuDNN. What a wheel should say and does not is absent.
    """
    names = {wheel.name for wheel in plan.lock.wheels}
    facts: dict[str, Any] = {
        "cudnn_number": None,
        "nccl": None,
        "architectures": [],
        "python": ".".join(identity["version"].split(".")[:2]),
        "python_full": identity["version"],
        # Their names and versions were compared with those in the wheels when these were opened.
        "packages": {wheel.name: str(wheel.version) for wheel in plan.lock.wheels},
    }
    for fact, package in (("cudnn_number", "nvidia-cudnn"), ("nccl", "nvidia-nccl")):
        if any(name.startswith(package) for name in names):
            del facts[fact]
    for made in wheels:
        facts |= made.facts
    errors = {
        fact: "the wheels' bytes do not say it"
        for fact in ("torch", "cuda", "cudnn_number", "nccl", "architectures")
        if fact not in facts
    }
    return {"schema": OBSERVED, "facts": facts, "errors": errors}
