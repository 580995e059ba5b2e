"""`python -m bench.push`: an image of the store on its way to a registry on loopback, beside the ways others bring it.

All contenders bring the same layers to registries on this machine, one after the other, in rounds. The least is a copy:
the blobs lie as files, are sent by the kernel over loopback HTTP, four at a time, to a sink that drops them, or to one
that keeps and hashes them. Everybody else has to get the bytes from somewhere first: torchyard makes them of wheels
while it sends them, skopeo reads a layout that was exported before, Docker an image that was loaded before. These
preparations are measured by themselves. Every image is asked for by its digest afterwards; a wrong one fails the run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from bench import command, containers, machine
from bench.command import chosen, neighbour_of
from bench.process import Spent, shown, timed
from bench.registries import DockerRegistry, KeepingSink, Server, Sink
from bench.report import X, failures, page, script, shown_gb, shown_seconds, shown_times, table
from bench.results import Measured, Run, pulled, ratio, read
from builder import build as builds
from builder import cosign, export, gate
from builder.console import Console
from builder.engines.docker import DockerEngine
from builder.engines.oci import OciEngine, recipe
from builder.errors import CellFailedError, ImpossibleError, MatrixError
from builder.fetching import PARALLEL
from builder.gate import Verdict
from builder.layout import Descriptor, Image
from builder.matrix import Cell
from builder.project import Project
from builder.store import Store, write_atomically

ROOT = Path(__file__).parents[1]
REPOSITORY = "bench/torchyard"
NAMES = {
    "copy": "copy to a sink",
    "kept": "copy to a sink that keeps and hashes",
    "plain": "copy to docker-registry",
    "sink": "torchyard → a sink",
    "push": "torchyard → docker-registry",
    "again": "… the same image again",
    "next": "… then its neighbour",
    "evidence": "… an unchanged image, with signed evidence",
    "skopeo": "skopeo copy → docker-registry",
    "docker": "docker push → docker-registry",
}
AFTER_PUSH = ("again", "next", "evidence")
"""What goes on from the registry that push leaves."""
AGAIN = 5
"""How often an unchanged image is pushed again."""
MARGIN_BYTES = 15 << 30
"""What has to stay free: other programs of the machine need room, too."""
_LAYOUT_TAG = "bench:push"
_PASSWORD = "bench"


@dataclass(frozen=True, kw_only=True)
class Sent(Measured):
    """What one contender took to bring the image there; what was not measured is None."""

    bytes_received: int | None = None
    """By the other side's count: of blobs, by what it read if it is a sink, else by what it stored."""
    requests: Mapping[str, int] = field(default_factory=dict)
    registry_cpu_seconds: float | None = None
    prepared_seconds: float | None = None
    """What had to be done before, and is not in `seconds`."""
    prepared: str = ""


@dataclass(frozen=True, kw_only=True)
class Results(Run[Sent]):
    """One run of the pushes."""

    blobs: int
    image_bytes: int
    """Layers and configuration."""
    new_bytes: int | None
    """Of the neighbour's layers that the image lacks, and its configuration."""
    entries: tuple[Sent, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns 1 if a contender failed, never because one was slow."""
    options = _parser().parse_args(arguments)

    def work(console: Console) -> tuple[str, bool]:
        if options.render:
            results = loads(options.render.read_text("utf-8"), where=str(options.render))
        else:
            results = _run(options, console)
        _write(options.out, results)
        return markdown(results), results.failed

    return command.run(work, stopped="stopped; the rounds that had ended are in push.json and push.md")


def _parser() -> argparse.ArgumentParser:
    return command.parser(
        "python -m bench.push",
        "Measure how long an image takes from the store to a registry on this machine. A proven image is pushed with "
        "its evidence as well: for that its cell has to have been validated, and cosign 3 to be installed.",
        epilog=" · ".join(f"{key}: {name}" for key, name in NAMES.items()),
        contenders=tuple(NAMES),
        texts={
            "small": "the CPU cell: a minute",
            "repeat": "rounds (default: 1)",
            "only": f"by comma: copy,push,again; {', '.join(AFTER_PUSH)} go on from push (default: all)",
            "neighbour": "for next (default: the next torch)",
            "render": "run nothing: the table of a push.json",
        },
    )


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run is about, and where it works."""

    keys: tuple[str, ...]
    cell: Cell
    image: Image
    neighbour: tuple[Cell, Image] | None
    store: Store
    work: Path

    @property
    def layout(self) -> Path:
        """The image as files."""
        return self.work / "layout"

    @property
    def files(self) -> list[Path]:
        """The files of the layout that are sent, the largest first."""
        blobs = {blob.sha256: blob for blob in self.image.blobs[1:]}
        return [
            self.layout / "blobs" / "sha256" / blob.sha256
            for blob in sorted(blobs.values(), key=lambda blob: (-blob.size, blob.digest))
        ]

    @property
    def state(self) -> Path:
        """A store with hard links to all of the user's, but for what it knows of pushes and verdicts."""
        return self.work / "state"

    @property
    def key(self) -> Path:
        """With what the evidence is signed."""
        return self.work / "bench.key"

    def sources(self, *images: Image) -> list[Path]:
        """Return the files of the store that the images' blobs are made of."""
        found: dict[str, None] = {}
        for blob in (blob for image in images for blob in image.blobs):
            made = None if self.store.has(blob.sha256, size=blob.size) else recipe.find(self.store, blob.sha256)
            found |= dict.fromkeys(made.sources if made else (blob.sha256,))
        return [self.store.path(sha256) for sha256 in found]


def _run(options: argparse.Namespace, console: Console) -> Results:
    if options.repeat < 1:
        raise MatrixError("--repeat counts rounds: at least 1")
    keys: tuple[str, ...] = options.only or tuple(NAMES)
    if set(AFTER_PUSH) & set(keys) and "push" not in keys:
        raise MatrixError(f"{', '.join(AFTER_PUSH)} go on from push", tries=("name push in --only as well",))
    project, store = Project(ROOT / "matrix.yaml"), Store.open()
    cell = chosen(project.select([options.cell]) if options.cell else project.cells, small=options.small)
    beside: Cell | None = None
    if "next" in keys:
        beside = project.select([options.neighbour])[0] if options.neighbour else neighbour_of(cell, project.cells)
    image = _image(project, store, cell)
    if "evidence" in keys:
        cosign.require()
        _verdicts(store, cell, image)
    neighbour = (beside, _image(project, store, beside)) if beside else None
    engine = DockerEngine()
    if "docker" in keys:
        engine.check()
    size = sum(blob.size for blob in _unique(image))
    results = Results(
        started=dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cell=cell.id,
        neighbour=beside.id if beside else None,
        repeat=options.repeat,
        blobs=len(_unique(image)),
        image_bytes=size,
        new_bytes=_new(image, neighbour[1]) if neighbour else None,
        machine=machine.describe(store=store.root, engine=engine.disk if "docker" in keys else None),
        tools=_tools(),
        entries=tuple(Sent(key=key, name=NAMES[key]) for key in keys if key != "next" or beside),
    )
    with store.scratch("bench-push") as work:
        course = Course(keys=keys, cell=cell, image=image, neighbour=neighbour, store=store, work=work)
        containers.require(work, MARGIN_BYTES + 2 * size, "push to registries of this machine", patience_s=0)
        _clone(store, course.state)
        exported = None
        if {"copy", "kept", "plain", "skopeo"} & set(course.keys):
            console.say("the image as files, for those who need them")
            machine.settle(course.sources(image))
            started = time.monotonic()
            export.write_layout(course.layout, store, image, tag=_LAYOUT_TAG)
            exported = time.monotonic() - started
        for number in range(options.repeat):
            for key in course.keys:
                last = number == options.repeat - 1
                if key in AFTER_PUSH or (key == "docker" and not last):
                    continue  # with push; and loading an image takes longer than all else together
                console.say(f"{number + 1}/{options.repeat} {NAMES[key]}")
                contender = functools.partial(_contender, key, course, engine, last=last)
                found = command.measured(functools.partial(_failed, key), contender)
                results = replace(results, entries=_with(results.entries, found, exported))
                _write(options.out, results)
                for one in found:
                    console.say(f"   {one.name}: {one.failure or f'{one.seconds[-1]:.2f} s'}")
    load = f"{os.getloadavg()[0]:.2f}"
    return replace(results, machine={**results.machine, "load_after": load})


def _image(project: Project, store: Store, cell: Cell) -> Image:
    (plan,) = project.fresh_plans([cell])
    image = builds.complete(plan, store, builder=OciEngine.name)
    if image is None:
        raise ImpossibleError(
            f"{cell.id} is not built", where=str(store.root), why="building is not measured here",
            tries=(f"torchyard build {cell.id}",),
        )  # fmt: skip
    return image


def _unique(image: Image) -> list[Descriptor]:
    return list({blob.digest: blob for blob in image.blobs[1:]}.values())


def _new(image: Image, neighbour: Image) -> int:
    layers = [[layer.blob for layer in one.layers] for one in (image, neighbour)]
    return pulled(*layers) + neighbour.config.size


def _clone(store: Store, state: Path) -> None:
    """Make a store of the user's own files, which may be pushed from without leaving anything in the user's."""
    left_out = {"locks", "partial", "pushes", "verdicts", "work"}
    shutil.copytree(
        store.root, state, copy_function=os.link, ignore=lambda _, names: left_out & set(names)
    )  # fmt: skip


def _verdicts(store: Store, cell: Cell, image: Image) -> tuple[Verdict, ...]:
    """Return on whose word the image may be published as a proven one; raises ImpossibleError if on nobody's."""
    try:
        return gate.require(store, image.manifest.digest, name=cell.id)
    except CellFailedError as error:
        raise ImpossibleError(
            f"{cell.id} has no passing verdict, and so there is no evidence to push", where=image.manifest.digest,
            why=error.problems[0].why, tries=(f"torchyard validate {cell.id}", "leave evidence out of --only"),
        ) from error  # fmt: skip


def _failed(key: str, why: str) -> Sent:
    return Sent(key=key, name=NAMES[key], failure=why)


def _with(entries: Sequence[Sent], found: Iterable[Sent], exported: float | None) -> tuple[Sent, ...]:
    """Add another round's runs to what there is."""
    new = {one.key: one for one in found}
    merged = []
    for entry in entries:
        one = new.get(entry.key)
        if one is not None:
            prepared = one.prepared_seconds if entry.key != "skopeo" else exported
            one = replace(one, seconds=(*entry.seconds, *one.seconds), prepared_seconds=prepared)
        merged.append(one or entry)
    return tuple(merged)


# --------------------------------------------------------------------------- contenders


def _contender(key: str, course: Course, engine: DockerEngine, *, last: bool) -> list[Sent]:
    registry = course.work / "registry"
    if key in ("copy", "kept"):
        with (KeepingSink if key == "kept" else Sink)(registry) as server:
            return [_copy(key, course, server)]
    if key == "sink":
        with Sink(registry) as server:
            return [_push(key, course, server, course.cell, course.image)]
    with DockerRegistry(registry) as server:
        if key == "plain":
            return [_copy(key, course, server)]
        if key == "push":
            return _pushes(course, server, last=last)
        if key == "skopeo":
            return [_skopeo(course, server)]
        return [_docker(course, server, engine)]


def _copy(key: str, course: Course, server: Server) -> Sent:
    machine.settle(course.files)
    started, cpu, used = time.monotonic(), server.cpu_seconds, time.process_time()
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda path: _copied(path, server.port), course.files))
    return Sent(
        key=key,
        name=NAMES[key],
        seconds=(time.monotonic() - started,),
        bytes_received=server.received,
        requests=server.requests,
        cpu_seconds=time.process_time() - used,
        registry_cpu_seconds=server.cpu_seconds - cpu,
        commands=(shown(["python", "-m", "bench.push", course.cell.id, "--only", key]),),
    )


def _copied(path: Path, port: int) -> None:
    """Send one file by the requests that a registry wants, its bytes by the kernel alone."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection, path.open("rb") as file:
        connection.request("POST", f"/v2/{REPOSITORY}/blobs/uploads/")
        place = _place(_read(connection, 202))
        connection.putrequest("PATCH", place)
        connection.putheader("Content-Length", str(path.stat().st_size))
        connection.endheaders()
        connection.sock.sendfile(file)
        place = _place(_read(connection, 202))
        connection.request("PUT", f"{place}{'&' if '?' in place else '?'}digest=sha256:{path.name}")
        _read(connection, 201)


def _place(response: http.client.HTTPResponse) -> str:
    """Return where an upload goes on."""
    parts = urlsplit(response.headers["Location"])
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def _read(connection: http.client.HTTPConnection, expected: int) -> http.client.HTTPResponse:
    response = connection.getresponse()
    response.read()
    if response.status != expected:
        raise CellFailedError(f"the other side answered HTTP {response.status}, not {expected}")
    return response


def _pushes(course: Course, server: DockerRegistry, *, last: bool) -> list[Sent]:
    """Push, and after the last round the same again and its neighbour."""
    found = [_push("push", course, server, course.cell, course.image)]
    if last and "again" in course.keys:
        runs = [_push("again", course, server, course.cell, course.image) for _ in range(AGAIN)]
        found.append(replace(runs[-1], seconds=tuple(one.seconds[0] for one in runs)))
    if last and "next" in course.keys and course.neighbour is not None:
        found.append(_push("next", course, server, *course.neighbour))
    if last and "evidence" in course.keys:
        found += command.measured(functools.partial(_failed, "evidence"), lambda: [_evidence(course, server)])
    return found


def _evidence(course: Course, server: Server) -> Sent:
    """Push the image as the proven one that it is, with a key made for it, and then unchanged again."""
    state = Store.open(course.state)
    for verdict in _verdicts(course.store, course.cell, course.image):
        gate.keep(state, course.image.manifest.digest, verdict.report)
    timed(
        ["cosign", "generate-key-pair", "--output-key-prefix", course.key.with_suffix("")],
        what="make a key", env={**os.environ, "COSIGN_PASSWORD": _PASSWORD},
    )  # fmt: skip
    first, *runs = [
        _push("evidence", course, server, course.cell, course.image, key_path=course.key) for _ in range(1 + AGAIN)
    ]
    return replace(
        runs[-1],
        seconds=tuple(one.seconds[0] for one in runs),
        prepared_seconds=first.seconds[0],
        prepared=runs[-1].commands[0],
    )


def _push(key: str, course: Course, server: Server, cell: Cell, image: Image, *, key_path: Path | None = None) -> Sent:
    """Push by the command line as a program of its own: unsigned and marked as unproven, or signed with a key.

    The mark changes no layer.
    """
    machine.settle(course.sources(image))
    how = ["--unproven"] if key_path is None else ["--key", str(key_path)]
    argv = [sys.executable, "-m", "builder", "push", cell.id, "--to", f"{server.host}/{REPOSITORY}", *how, "--json"]
    environment = {**os.environ, "TORCHYARD_HOME": str(course.state), "COSIGN_PASSWORD": _PASSWORD}
    with _Counted(server) as counted:
        spent = timed(argv, what=f"push {cell.id}", env=environment, cwd=ROOT)
    (document,) = json.loads(spent.out)
    if not server.has(REPOSITORY, document["digest"]):
        raise CellFailedError(f"the registry does not have {document['digest']}")
    if isinstance(server, Sink) and counted.received != document["bytes_sent"]:
        raise CellFailedError(f"{counted.received} bytes came, torchyard says {document['bytes_sent']}")
    places = {Path(server.host): "$REGISTRY", course.key: "$KEY"}
    return counted.sent(key, spent, shown(["python", *argv[1:]], places=places))


def _skopeo(course: Course, server: DockerRegistry) -> Sent:
    machine.settle(course.files)
    argv = [
        "skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false",
        f"oci:{course.layout}:{_LAYOUT_TAG.rpartition(':')[2]}", f"docker://{server.host}/{REPOSITORY}:skopeo",
    ]  # fmt: skip
    with _Counted(server) as counted:
        spent = timed(argv, what="skopeo copy")
    _require(course, server)
    places = {Path(server.host): "$REGISTRY", course.layout: "$LAYOUT"}
    sent = counted.sent("skopeo", spent, shown(argv, places=places))
    return replace(sent, prepared=f"torchyard export --format layout -o $LAYOUT {course.cell.id}")


def _docker(course: Course, server: DockerRegistry, engine: DockerEngine) -> Sent:
    """Push from a container engine that has the image, as `docker push` alone can."""
    size = sum(blob.size for blob in course.image.blobs)
    containers.require(
        engine.disk or course.work, MARGIN_BYTES + builds.LOADED * size + size, "load the image into the engine",
        patience_s=containers.PATIENCE_S,
    )  # fmt: skip
    name = f"{server.host}/{REPOSITORY}:docker"
    try:
        machine.settle(course.sources(course.image))
        loaded = containers.load(engine, lambda: export.archive(course.store, course.image, tags=[name]))
        machine.settle([])
        argv = ["docker", "push", "--quiet", name]
        with _Counted(server) as counted:
            spent = timed(argv, what="docker push")
        _require(course, server)
    finally:
        containers.remove(engine, name)
    sent = counted.sent("docker", spent, shown(argv, places={Path(server.host): "$REGISTRY"}))
    # The client only waits; the daemon works.
    return replace(
        sent, cpu_seconds=None, peak_bytes=None, prepared_seconds=loaded, prepared=f"torchyard load {course.cell.id}"
    )  # fmt: skip


def _require(course: Course, server: Server) -> None:
    digest = course.image.manifest.digest
    if not server.has(REPOSITORY, digest):
        raise CellFailedError(f"the registry does not have {digest}", why="the image was changed on the way")


class _Counted:
    """What a registry was asked, got and used while the context was open."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Self:
        self._before = self._state()
        return self

    def __exit__(self, *_: object) -> None:
        requests, received, cpu_seconds = self._state()
        self.requests = requests - self._before[0]
        self.received = received - self._before[1]
        self.cpu_seconds = cpu_seconds - self._before[2]

    def _state(self) -> tuple[Counter[str], int, float]:
        return self._server.requests, self._server.received, self._server.cpu_seconds

    def sent(self, key: str, spent: Spent, command: str) -> Sent:
        """Return the entry of a program that ran meanwhile."""
        return Sent(
            key=key,
            name=NAMES[key],
            seconds=(spent.seconds,),
            bytes_received=self.received,
            requests=self.requests,
            cpu_seconds=spent.cpu_seconds,
            registry_cpu_seconds=self.cpu_seconds,
            peak_bytes=spent.peak_bytes,
            commands=(command,),
        )


def _tools() -> dict[str, str]:
    def said(pattern: str, *argv: str) -> str:
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        except OSError:
            return "none"
        found = re.search(pattern, done.stdout, re.MULTILINE)
        return found[1] if done.returncode == 0 and found else "none"

    general = machine.tools(ROOT)
    return {
        **{name: general[name] for name in ("torchyard", "Python", "Docker Engine")},
        "docker-registry": said(r"(\d[\w.+~-]*)\s*$", "docker-registry", "--version"),
        "skopeo": said(r"^skopeo version (.+)$", "skopeo", "--version"),
        "cosign": said(r"^GitVersion:\s*(\S+)$", "cosign", "version"),
    }


# --------------------------------------------------------------------------- results


def markdown(results: Results) -> str:
    """Return the whole report."""
    places = (
        "`$REGISTRY` is a host and port of this machine, `$LAYOUT` the image as an OCI layout on the store's disk, "
        "`$KEY` a key made for the run."
    )
    return page(
        f"Pushing {results.cell}",
        [_introduction(results), *failures(results), table(_COLUMNS, _rows(results))],
        words=findings(results),
        machine=results.machine,
        tools=results.tools.items(),
        commands=[places, *(_commands(entry) for entry in results.entries if entry.commands)],
    )


_COLUMNS = (
    "contender", "seconds", f"{X} copy", f"{X} copy, kept", f"{X} copy, registry",
    f"{X} torchyard", "before it", "received", "requests",
    "CPU of the sender", "CPU of the registry", "memory",
)  # fmt: skip


def _rows(results: Results) -> list[tuple[str, ...]]:
    medians = {
        key: found.median if (found := results.entry(key)) else None for key in ("copy", "kept", "plain", "push")
    }
    rows = []
    for entry in results.entries:
        if entry.median is None:
            continue
        own = entry.key in ("sink", "push")
        compared = {
            "copy": own or entry.key in ("kept", "plain"),
            "kept": own,
            "plain": entry.key in ("push", "skopeo", "docker"),
            "push": entry.key in ("skopeo", "docker"),
        }
        rows.append(
            (
                entry.name,
                shown_seconds(entry.median),
                *(shown_times(ratio(entry.median, medians[key])) if compared[key] else "" for key in compared),
                shown_seconds(entry.prepared_seconds),
                shown_gb(entry.bytes_received),
                ", ".join(f"{count} {method}" for method, count in sorted(entry.requests.items())),
                shown_seconds(entry.cpu_seconds),
                shown_seconds(entry.registry_cpu_seconds),
                shown_gb(entry.peak_bytes),
            )
        )
    return rows


def _introduction(results: Results) -> str:
    rounds = "one round" if results.repeat == 1 else f"the median of {results.repeat} rounds"
    return (
        f"{results.blobs} blobs, {results.image_bytes / 1e9:.2f} GB, to registries on loopback, each empty at first; "
        f"what is read was read before, so it is in memory if it fits; {rounds}, {results.started}. A copy to a sink "
        "is what nobody can avoid: the same bytes, from files, by the kernel alone, four at a time, to a program that "
        "drops them. One that keeps them writes them to files, hashes them and flushes them to the disk, as a registry "
        "must; docker-registry is one. `before it` is what had to be done first and is not in the seconds."
    )


def findings(results: Results) -> list[str]:
    """Return what follows from the figures, in words."""
    lines = []
    beside, mine = results.entry("next"), results.entry("push")
    for key, what in (("again", "An unchanged image"), ("evidence", "An unchanged image with its evidence")):
        found = results.entry(key)
        if found is None:
            continue
        asked = ", ".join(f"{count} {method}" for method, count in sorted(found.requests.items()))
        lines.append(
            f"{what}: {asked}, nothing else; {found.median:.2f} s, the median of {len(found.seconds)} (fastest "
            f"{min(found.seconds):.2f} s), the program's start included."
        )
    if beside is not None and results.new_bytes:
        lines.append(
            f"The neighbour is {results.neighbour}: {results.new_bytes / 1e9:.3f} GB of it are new, and the registry "
            f"stored {(beside.bytes_received or 0) / 1e9:.3f} GB more."
        )
    for key in ("skopeo", "docker"):
        other = results.entry(key)
        if mine is None or other is None or mine.median is None or other.median is None:
            continue
        whole = other.median + (other.prepared_seconds or 0.0)
        lines.append(
            f"From the store to the registry, {other.name.partition(' →')[0]} took {whole:.1f} s with what goes before "
            f"it: {whole / mine.median:.1f} times torchyard."
        )
    lines.append(
        "What a registry received is its own count: what a sink read, what docker-registry stored. Memory is resident "
        "memory of all processes of the sender at once; Docker's daemon is not measured."
    )
    return [*lines, *results.notes]


def _commands(entry: Sent) -> str:
    before = [f"{entry.prepared}  # before it"] if entry.prepared else []
    return script(entry.name, [*before, *entry.commands])


def dumps(results: Results) -> str:
    """Return the results as JSON, with the medians beside them."""
    document = _ADAPTER.dump_python(results, mode="json")
    for entry, written in zip(results.entries, document["entries"], strict=True):
        written["median_seconds"] = entry.median
    return json.dumps(document, indent=2) + "\n"


def loads(text: str, *, where: str = "") -> Results:
    """Read results back; raises MatrixError if they are none."""
    return read(_ADAPTER, text, where=where)


_ADAPTER = TypeAdapter(Results)


def _write(directory: Path, results: Results) -> None:
    write_atomically(directory / "push.json", dumps(results).encode())
    write_atomically(directory / "push.md", markdown(results).encode())


if __name__ == "__main__":
    sys.exit(main())
