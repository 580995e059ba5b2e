"""The ways people build such images today, each with its tool's own defaults: BuildKit with pip, with uv, and zstd.

The requirements are pinned but carry no hashes, so these tools do not check the wheels, which torchyard does: the
difference is in their favour. Bytecode is what the tool's default says: pip compiles, uv does not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uv

from bench import containers, machine
from bench.process import Spent, shown, timed
from bench.results import Entry, pulled
from builder.base import BaseImage
from builder.engines.docker import DockerEngine
from builder.render import Plan
from builder.store import Store

# One of the two Dockerfiles anybody would write; `base`, `wheels` and `uv` are named contexts.
PIP = """\
FROM base
RUN python3 -m venv /opt/venv
ENV PATH="/opt/venv/bin:$PATH"
RUN --mount=type=bind,from=wheels,target=/wheels \\
    --mount=type=bind,target=/context \\
    pip install --no-index --find-links /wheels --no-deps -r /context/requirements.txt
"""
UV = """\
FROM base
ENV VIRTUAL_ENV="/opt/venv" PATH="/opt/venv/bin:$PATH"
RUN --mount=type=bind,from=uv,target=/uv \\
    --mount=type=bind,from=wheels,target=/wheels \\
    --mount=type=bind,target=/context \\
    /uv/uv venv --python /usr/bin/python3 /opt/venv \\
    && /uv/uv pip install --no-index --find-links /wheels --no-deps -r /context/requirements.txt
"""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One contender: what it is called, its Dockerfile, and whether its image is an archive or in the engine."""

    key: str
    name: str
    dockerfile: str
    zstd: bool = False


PEERS = {
    peer.key: peer
    for peer in (
        Peer(key="a", name="BuildKit + pip", dockerfile=PIP),
        Peer(key="b", name="BuildKit + uv", dockerfile=UV),
        Peer(key="c", name="BuildKit + uv, zstd 1 archive", dockerfile=UV, zstd=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class Buildkit:
    """Runs the peers, from the wheels and bases of a store."""

    engine: DockerEngine
    store: Store
    work: Path
    bases: dict[str, BaseImage]
    """By cell id."""

    def measure(self, peer: Peer, plan: Plan, *, repeat: int, neighbour: Plan | None) -> Entry:
        """Build the plan `repeat` times, try the last image out, and build the neighbour's to compare layers."""
        name = f"{containers.REPOSITORY}:{peer.key}"
        seconds = []
        with self._known_base(plan):
            for _ in range(repeat - 1):
                with self._built(peer, plan, name) as (spent, _):
                    seconds.append(spent.seconds)
            with self._built(peer, plan, name) as (spent, argv):
                seconds.append(spent.seconds)
                first, load_seconds, commands = self._read(peer, name)
                trial = containers.tried(name, plan.expectation.torch)
                pip = containers.pip(name) if peer.dockerfile is PIP else ""
        upgrade = None
        if neighbour is not None:
            with self._known_base(neighbour), self._built(peer, neighbour, name):
                upgrade = pulled(first.layers, self._read(peer, name)[0].layers)
        return Entry(
            key=peer.key,
            name=peer.name,
            seconds=tuple(seconds),
            wheel_bytes=plan.lock.size,
            image_bytes=first.size,
            load_seconds=load_seconds,
            first_run_seconds=trial.first_run_seconds,
            import_cold_seconds=trial.import_cold_seconds,
            import_warm_seconds=trial.import_warm_seconds,
            upgrade_bytes=upgrade,
            pip=pip,
            commands=tuple(shown(line, places=self._places(plan)) for line in (argv, *commands)),
        )

    def _read(self, peer: Peer, name: str) -> tuple[containers.Stored, float | None, tuple[tuple[str, ...], ...]]:
        """Return what was built, having loaded it if it is an archive, and the commands for that and for a trial."""
        if not peer.zstd:
            return containers.saved(name), None, (containers.command(name),)
        with self._archive.open("rb") as file:
            stored = containers.in_archive(file)
        load = ("docker", "load", "--input", str(self._archive))
        spent = timed(load, what="load the archive into the engine")
        return stored, spent.seconds, (load, containers.command(name))

    # ------------------------------------------------------------------ building

    @contextmanager
    def _built(self, peer: Peer, plan: Plan, name: str) -> Iterator[tuple[Spent, list[str]]]:
        """Build as if for the first time; afterwards the image and what BuildKit kept of the build are gone."""
        context = self._context(peer, plan)
        output = (
            ["--output", f"type=oci,dest={self._archive},name={name},compression=zstd,compression-level=1"]
            if peer.zstd
            else ["--load", "--tag", name]
        )
        base = self.bases[plan.cell.id]
        argv = [
            "docker", "buildx", "build", "--builder", "default", "--progress", "plain",
            "--platform", plan.cell.platform, "--network", "none", "--no-cache",
            "--build-context", f"base=oci-layout://{base.layout}@{base.digest}",
            "--build-context", f"wheels={self.work / 'wheels'}",
            *(["--build-context", f"uv={self.work / 'uv'}"] if "/uv/uv" in peer.dockerfile else []),
            *output, str(context),
        ]  # fmt: skip
        before = self.engine.build_cache()
        try:
            machine.settle(self.store.path(wheel.sha256) for wheel in plan.lock.wheels)
            yield timed(argv, what=f"{peer.name}, {plan.cell.id}", env=os.environ), argv
        finally:
            containers.remove(self.engine, name)
            self._archive.unlink(missing_ok=True)
            self.engine.forget_builds(since=before)

    @contextmanager
    def _known_base(self, plan: Plan) -> Iterator[None]:
        """Let BuildKit take in and unpack the base before the clock runs; on a used machine it has it."""
        context, base = self.work / "base", self.bases[plan.cell.id]
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text("FROM base\nRUN true\n")
        before = self.engine.build_cache()
        try:
            argv = [
                "docker", "buildx", "build", "--builder", "default", "--network", "none", "--output", "type=cacheonly",
                "--build-context", f"base=oci-layout://{base.layout}@{base.digest}", str(context),
            ]  # fmt: skip
            timed(argv, what="take in the base")
            yield
        finally:
            self.engine.forget_builds(since=before)

    def _context(self, peer: Peer, plan: Plan) -> Path:
        """Write a fresh build context, and beside it the wheels under their names and uv."""
        context, wheels, tool = self.work / "context", self.work / "wheels", self.work / "uv"
        for directory in (context, wheels, tool):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        (context / "Dockerfile").write_text(peer.dockerfile)
        lines = [f"{wheel.name}=={wheel.version}\n" for wheel in plan.lock.wheels]
        (context / "requirements.txt").write_text("".join(lines))
        self.store.link(wheels, {wheel.filename: wheel.sha256 for wheel in plan.lock.wheels})
        shutil.copy(uv.find_uv_bin(), tool / "uv")
        return context

    @property
    def _archive(self) -> Path:
        return self.work / "image.tar"

    def _places(self, plan: Plan) -> dict[Path, str]:
        return {self.work: "$WORK", self.bases[plan.cell.id].layout: "$BASE", self.store.root: "$STORE"}
