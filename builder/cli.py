"""The command line: one verb per stage, in the order of the line; the only place that prints errors and exits.

Each verb imports what it needs itself, and here stands only what all of them do: all modules together take longer to
import than a verb takes that finds its work done.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder import __version__, errors, facts
from builder.errors import CellFailedError, ImpossibleError, LockError, MatrixError, Problem, ToolError, TorchyardError
from builder.store import Store, write_atomically

if TYPE_CHECKING:
    from builder import base as bases
    from builder import compat, cosign, reports, runners
    from builder import update as updates
    from builder import validate as validation
    from builder.build import EngineSession, Outcome, Session, StoreSession
    from builder.console import Console
    from builder.index import Index
    from builder.layout import Image
    from builder.matrix import Cell, Policy
    from builder.project import Project
    from builder.render import Plan

EXIT_CODES = "\n    ".join(
    f"{code:>3}  {text}"
    for code, text in [
        (0, "done"),
        *sorted((cls.exit_code, (cls.__doc__ or "").splitlines()[0]) for cls in TorchyardError.__subclasses__()),
    ]
)


@dataclass(frozen=True)
class Context:
    """What every command is given."""

    project: Project
    console: Console


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(self.commands)  # in the order of the line, not of the alphabet


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has, and hand it a Context instead of them."""

    @click.option("-m", "--matrix", "matrix_path", type=click.Path(path_type=Path), default=Path("matrix.yaml"),
                  show_default=True, help="The matrix; generated files lie in images/ beside it.")  # fmt: skip
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output, nothing else.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress; errors and results only.")
    @click.option("-v", "--verbose", is_flag=True, help="Also show what build steps print.")
    @click.option("--debug", is_flag=True, envvar="TORCHYARD_DEBUG", help="On an error, show the traceback.")
    @functools.wraps(command)
    def wrapper(
        *args: object, matrix_path: Path, as_json: bool, quiet: bool, verbose: bool, debug: bool, **kwargs: object
    ) -> None:
        from builder.console import Console
        from builder.project import Project

        console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
        try:
            command(Context(Project(matrix_path), console), *args, **kwargs)
        except TorchyardError as error:
            if debug:
                raise
            console.error(error)
            sys.exit(error.exit_code)
        except OSError as error:
            # A file that may not be read or written, a disk that fails: the user's to mend, and no bug.
            if debug:
                raise
            console.error(ToolError(error.strerror or str(error), where=str(error.filename or "")))
            sys.exit(ToolError.exit_code)
        except KeyboardInterrupt:
            console.say("stopped; what is finished is kept, and the same command goes on from there")
            sys.exit(errors.InterruptedRunError.exit_code)

    return wrapper


patterns = click.argument("patterns", metavar="[CELL]...", nargs=-1)


@click.group(
    cls=_Group,
    epilog="CELL is an id, a tag or a shell-style pattern of one: 'torch2.8*-runtime'. Without any: all cells.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=f"""Reproducible PyTorch x CUDA x cuDNN images from one matrix, each one proven.

    \b
    Exit codes:
    {EXIT_CODES}
    """,
)
@click.version_option(__version__, prog_name="torchyard")
def cli() -> None:
    """Hold the verbs."""


# --------------------------------------------------------------------------- matrix


def _cell_document(cell: Cell, policy: Policy, found: runners.Cover) -> dict[str, Any]:
    return {
        "id": cell.id,
        "torch": str(cell.torch),
        "cuda": cell.cuda,
        "cudnn": str(cell.cudnn) if cell.cudnn else None,
        "nccl": str(cell.nccl) if cell.nccl else None,
        "python": cell.python,
        "base": cell.base_name,
        "variant": cell.variant_name,
        "companions": list(cell.companions),
        "platform": cell.platform,
        "tags": list(cell.tags),
        "base_kind": cell.base.kind,
        "tiers": list(policy.tiers_of(cell)),
        "runners": [runner.name for runner in found.runners_of(cell)],
    }


@cli.command("matrix")
@patterns
@click.option("--schema", is_flag=True, help="Print the JSON Schema of matrix.yaml instead.")
@click.option("--github", "jobs", type=click.Choice(["builds", "gpus"]),
              help="Print the matrix of a GitHub workflow's jobs instead: building, or on GPUs.")  # fmt: skip
@_options
def matrix_command(context: Context, patterns: Sequence[str], *, schema: bool, jobs: str | None) -> None:
    """List the cells of the matrix."""
    from builder import runners

    if schema:
        from builder.schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        return
    policy, cells = context.project.policy, context.project.select(patterns)
    found = runners.cover(context.project.facts, cells, policy.runners, tiers=policy.tiers)
    if jobs:
        if jobs == "gpus":
            _tell_lost(context, cells, found)
        click.echo(json.dumps(runners.builds(cells) if jobs == "builds" else runners.validations(found)))
        return
    documents = [_cell_document(cell, policy, found) for cell in cells]
    columns = ("torch", "cuda", "cudnn", "nccl", "python", "base", "variant", "platform")
    context.console.table(
        (*columns, "tag", "id"),
        [
            [*(str(document[column] or "-") for column in columns), document["tags"][0], document["id"]]
            for document in documents
        ],
    )
    context.console.result(documents)


def _tell_lost(context: Context, cells: Iterable[Cell], found: runners.Cover) -> None:
    """Name the cells that no machine with a GPU can run; if their tiers have to be proven there, that is an error."""
    policy = context.project.policy
    names = {cell.id: cell.tag_names[0] for cell in cells}
    lost = {names[key]: "; ".join(f"{one.where}: {one.what}" for one in found.lost[key]) for key in found.lost}
    if policy.tiers == (1,) and not policy.runners:
        context.console.say("there are no runners in the matrix: nothing is validated on a GPU")
    elif policy.tiers == (1,):
        for name, why in lost.items():
            context.console.say(f"{name}: not validated on a GPU: {why}")
    elif lost:
        raise ImpossibleError(
            problems=tuple(
                Problem(
                    what=f"no runner can prove {name}",
                    where=f"{context.project.matrix_path.name}: publish.runners",
                    why=why or "there are none",
                    tries=("add a runner class that can", "publish.tiers: [1], and such an image is not held to a GPU"),
                )
                for name, why in lost.items()
            )
        )


# --------------------------------------------------------------------------- resolve


@cli.command("resolve")
@click.option("--torch", required=True, help="A release: 2.8.0, or 2.8 for its newest patch.")
@click.option("--cuda", help="CUDA torch was built for: 12.8, or cpu.")
@click.option("--cudnn", help="cuDNN: 9, 9.10 or a full version.")
@click.option("--driver", help="The host's NVIDIA driver: 525 or 525.60.13.")
@click.option("--gpu", help="The host's GPU: H100, 'RTX 5090', sm_90 or 9.0.")
@click.option("--python", help="Python: 3.12.")
@click.option("--platform", type=click.Choice([p.value for p in facts.Platform]), default="linux/amd64",
              show_default=True)  # fmt: skip
@_options
def resolve_command(context: Context, **asked: str | None) -> None:
    """Say whether a combination exists and what it needs; if not, why, and what does."""
    from builder import compat

    answer = compat.explain(context.project.facts, compat.Request(**asked))  # type: ignore[arg-type]
    context.console.write(str(answer))
    context.console.result(_answer_document(answer))
    if not answer.possible:
        sys.exit(errors.ImpossibleError.exit_code)


def _answer_document(answer: compat.Answer) -> dict[str, Any]:
    def combination(found: compat.Alternative) -> dict[str, Any]:
        return {
            "torch": str(found.torch),
            "cuda": str(found.cuda),
            "cudnn": str(found.cudnn) if found.cudnn else None,
            "driver": str(found.driver) if found.driver else None,
            "gpus": None if found.gpus is None else [facts.sm_tag(sm) for sm in found.gpus],
            "pythons": [str(python) for python in found.pythons],
            "glibc": str(found.glibc) if found.glibc else None,
            "index": found.index.value,
            "platform": found.platform.value,
        }

    return {
        "possible": answer.possible,
        "combination": combination(answer.combination) if answer.combination else None,
        "problems": [{"what": p.what, "why": p.why, "tries": list(p.tries)} for p in answer.problems],
        "notes": list(answer.notes),
        "alternatives": [combination(found) for found in answer.alternatives],
    }


# --------------------------------------------------------------------------- lock


def _base_locks(context: Context, cells: Sequence[Cell], *, again: bool) -> dict[Path, bases.BaseLock]:
    """Lock the bases of the cells where a lock is missing or stale, or all `again`; returns them by their paths.

    A base is locked for all cells of the matrix that stand on it: what their variants add goes with its very packages.
    """
    from builder.schema import BootstrapBase

    families: dict[Path, list[Cell]] = {}
    for cell in context.project.cells:
        if isinstance(cell.base, BootstrapBase):
            families.setdefault(context.project.base_lock_path(cell), []).append(cell)
    chosen = {context.project.base_lock_path(cell) for cell in cells}
    made: dict[Path, bases.BaseLock] = {}
    for path, family in families.items():
        if path in chosen:
            made |= _family_locks(context, family, again=again)
    return made


def _family_locks(context: Context, cells: Sequence[Cell], *, again: bool) -> dict[Path, bases.BaseLock]:
    """Lock the base that all of the cells stand on, and with it what their variants add, if need be or `again`."""
    from builder import base as bases
    from builder.project import architecture, system_packages
    from builder.schema import BootstrapBase

    project, first = context.project, cells[0]
    assert isinstance(first.base, BootstrapBase)
    extended = {project.system_lock_path(cell): cell for cell in cells if system_packages(cell)}
    base, systems = _found(project.base_lock, first), [_found(project.system_lock, cell) for cell in extended.values()]
    if not again and base is not None and None not in systems:
        return {}
    context.console.say(f"base {first.base_name}: asking Debian's archive")
    lock, *others = bases.lock(
        suite=first.base.suite,
        architecture=architecture(first),
        packages=first.base.packages,
        systems=[system_packages(cell) for cell in extended.values()],
        previous=[one for one in (base, *systems) if one is not None],
        keep=None if again else base,
    )
    if base is not None and lock != base:
        context.console.say(f"base {first.base_name}: the archive has other packages now, it is locked anew")
    return {project.base_lock_path(first): lock, **dict(zip(extended, others, strict=True))}


def _found(read: Callable[[Cell], bases.BaseLock | None], cell: Cell) -> bases.BaseLock | None:
    """Return a lock of the cell if it is whole and fresh."""
    try:
        return read(cell)
    except LockError:
        return None


@cli.command("lock")
@patterns
@click.option("--check", is_flag=True, help="Write nothing; fail if a lock is missing, stale or damaged.")
@click.option("--bases", "again", is_flag=True, help="Also lock the bases' Debian packages again, for their updates.")
@click.option("--keep-wheels", is_flag=True, help="Leave the wheels as they are locked, for updates of Debian alone.")
@_options
def lock_command(context: Context, patterns: Sequence[str], *, check: bool, again: bool, keep_wheels: bool) -> None:
    """Resolve the cells to hash-pinned wheels and write their locks."""
    from concurrent.futures import ThreadPoolExecutor

    from builder import lock as locks
    from builder.index import Index

    project, console = context.project, context.console
    cells = project.select(patterns)
    if check:
        problems: list[Problem] = []
        for cell in cells:
            for read in (project.lock, project.base_lock, project.system_lock):
                try:
                    read(cell)
                except LockError as error:
                    problems += error.problems
        if problems:
            raise LockError(problems=tuple(dict.fromkeys(problems)))
        console.say(f"{len(cells)} locks are whole and answer the matrix")
        console.result([{"id": cell.id, "lock": str(project.lock_path(cell)), "fresh": True} for cell in cells])
        return
    resolve = project.lock if keep_wheels else functools.partial(locks.lock_cell, index=Index())
    # All or nothing: a set of locks that is half old and half new would be committed by somebody.
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        futures = [pool.submit(resolve, cell) for cell in cells]
        found, failed = [], []
        try:
            for cell, future in zip(cells, futures, strict=True):
                try:
                    lock = future.result()
                except TorchyardError as error:
                    failed.append(error)
                else:
                    found.append((cell, lock))
                    console.say(f"{cell.id}: {len(lock.wheels)} wheels, {lock.size / 1e9:.2f} GB")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for what has not begun
    if failed:
        raise type(failed[0])(problems=tuple(problem for error in failed for problem in error.problems))
    for path, base_lock in _base_locks(context, cells, again=again).items():
        project.write_base_lock(path, base_lock)
    for cell, lock in found:
        project.write_lock(cell, lock)
    console.result(
        [
            {"id": cell.id, "lock": str(project.lock_path(cell)), "wheels": len(lock.wheels), "size_bytes": lock.size}
            for cell, lock in found
        ]
    )


# --------------------------------------------------------------------------- render


@cli.command("render")
@patterns
@click.option("--check", is_flag=True, help="Write nothing; fail if a generated file is missing or differs.")
@_options
def render_command(context: Context, patterns: Sequence[str], *, check: bool) -> None:
    """Write images/<cell>/: Dockerfile, requirements.txt and image.json, from the matrix and the locks."""
    project, console = context.project, context.console
    plans = project.plans(project.select(patterns))
    strays = () if patterns else project.strays()
    if check:
        problems = [
            *project.stale(plans),
            *(() if patterns else project.stale_catalogue()),
            *(Problem(what="belongs to no cell", where=str(p), tries=("torchyard render",)) for p in strays),
        ]
        if problems:
            raise LockError(problems=tuple(problems))
        console.say(f"{len(plans)} cells are rendered as the matrix and the locks say")
        console.result([{"id": plan.cell.id, "changed": False} for plan in plans])
        return
    documents = []
    for plan in plans:
        changed = project.write(plan)
        documents.append({"id": plan.cell.id, "changed": changed})
        console.say(f"{plan.cell.id}: {'written' if changed else 'as it was'}")
    if not patterns and project.write_catalogue():
        console.say("README.md: table of images written")
    for path in strays:
        gone = project.remove_stray(path)
        console.say(f"{path.name}: belongs to no cell, {'removed' if gone else 'its generated files removed'}")
    console.result(documents)


# --------------------------------------------------------------------------- fetch


@cli.command("fetch")
@patterns
@_options
def fetch_command(context: Context, patterns: Sequence[str]) -> None:
    """Bring the locked wheels and Debian packages into the store."""
    from builder import build as builds
    from builder.index import Index

    project = context.project
    plans = project.plans(project.select(patterns))
    builds.fetch(plans, Index(), Store.open(), context.console)
    wheels = {wheel.sha256: wheel for plan in plans for wheel in plan.lock.wheels}
    size = sum(wheel.size for wheel in wheels.values())
    context.console.say(f"{len(wheels)} wheels are in the store, {size / 1e9:.2f} GB")
    context.console.result([{"id": plan.cell.id, "wheels": len(plan.lock.wheels), "size_bytes": plan.lock.size}
                            for plan in plans])  # fmt: skip


# --------------------------------------------------------------------------- build


def _session(
    context: Context, *, engine: str, load: bool, rebuild: bool = False, keep: bool = False
) -> EngineSession | StoreSession:
    """Make what builds: in the store, and with `load` also in the container engine; or all of it in that engine."""
    from builder.build import EngineSession, StoreSession
    from builder.engines.oci import OciEngine
    from builder.index import Index

    index, store = Index(), Store.open()
    host = None
    if load or engine == "docker":
        from builder.engines.docker import DockerEngine

        host = DockerEngine()
        host.check()
    if engine == "docker":
        assert host is not None
        return EngineSession(engine=host, index=index, store=store, report=context.console, rebuild=rebuild, keep=keep)
    return StoreSession(
        builder=OciEngine(), host=host, index=index, store=store, report=context.console, rebuild=rebuild, keep=keep
    )


def _plans(context: Context, patterns: Sequence[str], *, everything: bool = False, verb: str) -> tuple[Plan, ...]:
    """Return the plans of the cells that are named; building nothing or all by mistake costs hours."""
    if not patterns and not everything:
        raise MatrixError("no cell is named", tries=(f"torchyard {verb} '*cu128*'", f"torchyard {verb} --all"))
    if patterns and everything:
        raise MatrixError("--all and cells exclude each other", tries=("leave one of them out",))
    return context.project.fresh_plans(context.project.select(patterns))


def _fail(failures: Sequence[TorchyardError], console: Console, *, of: int) -> None:
    """Print what failed and exit; one cell's own failure keeps its exit code, of several "a cell failed" is true."""
    if failures:
        kind = type(failures[0]) if of == 1 else CellFailedError
        error = kind(problems=tuple(problem for failure in failures for problem in failure.problems))
        console.problems(error)
        sys.exit(error.exit_code)


def _state(outcome: Outcome) -> str:
    if outcome.image is None:
        return "failed"
    if outcome.removed:
        return "proven, removed for room"
    return "proven by its bytes" if not outcome.image.in_engine else "proven in a container"


def _build(context: Context, plans: Sequence[Plan], session: Session) -> None:
    """Build the plans, show what became of each, and exit with an error if one failed."""
    from builder.build import build_all

    console = context.console
    outcomes = build_all(plans, session, console)
    documents = []
    for outcome in outcomes:
        document: dict[str, Any] = {"id": outcome.plan.cell.id, "proven": False}
        if outcome.image is not None:
            document |= asdict(outcome.image)
            document |= {"in_engine": outcome.image.in_engine and not outcome.removed}
        if outcome.error is not None:
            document["error"] = [asdict(problem) for problem in outcome.error.problems]
        documents.append(document)
    console.table(
        ("tag", "digest", "size", "seconds", "state"),
        [
            [
                outcome.plan.cell.tags[0],
                outcome.image.digest[:19] if outcome.image else "-",
                f"{outcome.image.size_bytes / 1e9:.2f} GB" if outcome.image else "-",
                f"{outcome.image.seconds:.1f}" if outcome.image else "-",
                _state(outcome),
            ]
            for outcome in outcomes
        ],
    )
    console.result(documents)
    if any(outcome.image and not outcome.image.in_engine for outcome in outcomes):
        console.say(
            "complete in the store. Proven by the bytes: versions of torch, CUDA, cuDNN, NCCL and Python, GPU "
            "architectures, packages, every file's hash. Not proven: that it runs; --load has a container prove that"
        )
    _fail([outcome.error for outcome in outcomes if outcome.error is not None], console, of=len(plans))


everything_option = click.option("--all", "everything", is_flag=True, help="Every cell of the matrix.")
keep_option = click.option(
    "--keep", is_flag=True, help="Never take a proven image out of the container engine to make room for the next."
)


@cli.command("build")
@patterns
@everything_option
@click.option("--engine", type=click.Choice(["oci", "docker"]), default="oci", show_default=True,
              help="What makes the image: torchyard, out of the wheels, or BuildKit, from the Dockerfile.")  # fmt: skip
@click.option("--load", is_flag=True, help="Also load each image into the container engine, and prove it there.")
@click.option("--rebuild", is_flag=True, help="Build also what an earlier run proved from the same inputs.")
@keep_option
@_options
def build_command(
    context: Context, patterns: Sequence[str], *, everything: bool, engine: str, load: bool, rebuild: bool, keep: bool
) -> None:
    """Build cells and prove them; only what is proven is complete, and gets its tags."""
    plans = _plans(context, patterns, everything=everything, verb="build")
    session = _session(context, engine=engine, load=load, rebuild=rebuild, keep=keep or len(plans) == 1)
    _build(context, plans, session)


# --------------------------------------------------------------------------- load


@cli.command("load")
@patterns
@everything_option
@keep_option
@_options
def load_command(context: Context, patterns: Sequence[str], *, everything: bool, keep: bool) -> None:
    """Load images into the container engine and prove them there; what is not built yet is built before."""
    plans = _plans(context, patterns, everything=everything, verb="load")
    _build(context, plans, _session(context, engine="oci", load=True, keep=keep or len(plans) == 1))


# --------------------------------------------------------------------------- export


@cli.command("export")
@patterns
@everything_option
@click.option("-o", "--output", required=True, metavar="PATH",
              help="A file for one archive (- is standard output), or a directory for several.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["archive", "layout"]), default="archive", show_default=True,
              help="An archive that docker, podman and skopeo read, or an OCI layout.")  # fmt: skip
@click.option("--compression", type=click.Choice(["gzip", "zstd"]), default="gzip", show_default=True,
              help="gzip is the image as it was proven; zstd is smaller, and has another digest.")  # fmt: skip
@_options
def export_command(
    context: Context, patterns: Sequence[str], *, everything: bool, output: str, form: str, compression: str
) -> None:
    """Write images as files; what is not built yet is built before."""
    from builder import export as exports

    console = context.console
    plans = _plans(context, patterns, everything=everything, verb="export")
    target = Path(output)
    if output == "-":
        _refuse_stdout(plans, form, as_json=console.as_json)
    session, store = _session(context, engine="oci", load=False), Store.open()
    failures, documents = [], []
    for plan in plans:
        try:
            image = exports.stored_image(store, session.build(plan).digest)
            if compression != "gzip":
                console.say(
                    f"{plan.cell.id}: compressing with {compression}; layers that were compressed before are kept"
                )
                image = exports.recompressed(store, image)
            tags = plan.cell.tags
            if output == "-":
                for piece in exports.archive(store, image, tags=tags):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
                continue
            several = len(plans) > 1 or target.is_dir() or output.endswith("/")
            if form == "layout":
                path = target / plan.cell.id if several else target
                exports.write_layout(path, store, image, tag=tags[0])
            else:
                path = target / f"{plan.cell.id}.tar" if several else target
                path.parent.mkdir(parents=True, exist_ok=True)
                exports.write_archive(path, store, image, tags=tags)
        except TorchyardError as error:
            failures.append(error)
            console.say(f"{plan.cell.id}: failed: {error.problems[0].what}")
        else:
            size = sum(blob.size for blob in image.blobs)
            console.say(f"{plan.cell.id}: {path} · {image.manifest.digest} · {size / 1e9:.2f} GB")
            documents.append(
                {"id": plan.cell.id, "path": str(path), "digest": image.manifest.digest, "size_bytes": size}
            )
    console.result(documents)
    _fail(failures, console, of=len(plans))


def _refuse_stdout(plans: Sequence[Plan], form: str, *, as_json: bool) -> None:
    """Refuse what cannot go to standard output."""
    if len(plans) > 1 or form != "archive" or as_json:
        raise MatrixError(
            "standard output takes one archive, and nothing else",
            tries=("name one cell", "write to a file or a directory: -o PATH"),
        )
    if sys.stdout.isatty():
        raise MatrixError("an archive is nothing for a terminal", tries=("torchyard export CELL -o - | docker load",))


# --------------------------------------------------------------------------- licences


@cli.command("licences")
@patterns
@_options
def licences_command(context: Context, patterns: Sequence[str]) -> None:
    """List the licence of every package in an image, as its own metadata says, and where its text lies."""
    from builder import licences

    store, console, found, without = Store.open(), context.console, [], []
    for plan in context.project.plans(context.project.select(patterns)):
        if licences.missing(plan, store):
            without.append(plan.cell.id)
        else:
            found.append(licences.cell_of(plan, store))
    if without and (patterns or not found):
        raise ImpossibleError(
            f"{len(without)} cells lack wheels in the store: {', '.join(without[:3])}",
            where=str(store.root),
            why="what a package says of its licence stands in its wheel",
            tries=(f"torchyard fetch {without[0]}",),
        )
    if without:
        console.say(f"{len(without)} cells are left out, their wheels are not in the store: {', '.join(without)}")
    for cell in found:
        console.write(licences.summary(cell))
        console.table(("package", "version", "licence", "text"), licences.rows(cell))
    console.result([cell.as_json() for cell in found])


# --------------------------------------------------------------------------- sbom


@cli.command("sbom")
@patterns
@everything_option
@click.option("-o", "--output", default="-", show_default=True, metavar="PATH",
              help="A file for one bill (- is standard output), or a directory for several.")  # fmt: skip
@_options
def sbom_command(context: Context, patterns: Sequence[str], *, everything: bool, output: str) -> None:
    """Write the bill of materials of images that are built: CycloneDX, checked against what is installed in them."""
    from builder import bills, sbom

    store, console, target = Store.open(), context.console, Path(output)
    plans = _plans(context, patterns, everything=everything, verb="sbom")
    if output == "-" and len(plans) > 1:
        raise MatrixError(
            "standard output takes one bill", tries=("name one cell", "write to a directory: -o DIRECTORY/")
        )
    several = len(plans) > 1 or target.is_dir() or output.endswith("/")
    failures, documents = [], []
    for plan in plans:
        try:
            image = _complete(plan, store)
            bill = bills.checked(plan, store, image, sbom.bill)
            if output == "-":
                sys.stdout.buffer.write(bill)
                sys.stdout.buffer.flush()
                continue
            path = target / f"{plan.cell.id}.cdx.json" if several else target
            _write(path, bill)
        except TorchyardError as error:
            failures.append(error)
            console.say(f"{plan.cell.id}: failed: {error.problems[0].what}")
        else:
            console.say(f"{plan.cell.id}: {path} · {image.manifest.digest}")
            documents.append(
                {"id": plan.cell.id, "path": str(path), "digest": image.manifest.digest, "size_bytes": len(bill)}
            )
    if output != "-":
        console.result(documents)
    _fail(failures, console, of=len(plans))


def _complete(plan: Plan, store: Store) -> Image:
    """Return the image of a cell that is built; raises ImpossibleError if it is not."""
    from builder import build as builds
    from builder.engines.oci import OciEngine

    image = builds.complete(plan, store, builder=OciEngine.name)
    if image is None:
        raise ImpossibleError(
            f"{plan.cell.id} is not complete in the store",
            where=str(store.root),
            why="a bill of materials names the digests of an image and of its layers",
            tries=(f"torchyard build {plan.cell.id}",),
        )
    return image


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises MatrixError if the path is no place for one."""
    if path.exists() and not path.is_file():
        raise MatrixError("not a file", where=str(path), tries=("name a file, or an existing directory",))
    write_atomically(path, content)


# --------------------------------------------------------------------------- validate


def _cells_and_references(context: Context, names: Sequence[str], *, everything: bool) -> tuple[list[Cell], list[str]]:
    """Tell the cells of the matrix from the images that are none of it."""
    if everything:
        return list(context.project.select(())), []
    cells: list[Cell] = []
    references: list[str] = []
    for name in names:
        try:
            cells += context.project.select([name])
        except (MatrixError, ImpossibleError):
            # A pattern can only mean cells, and where there is no matrix there are none.
            if any(character in name for character in "*?[") and context.project.matrix_path.exists():
                raise
            references.append(name)
    return list({cell.id: cell for cell in cells}.values()), references


@dataclass(frozen=True)
class _Target:
    """One thing to validate: its name, and how."""

    name: str
    run: Callable[[validation.OnEvent], tuple[str | None, dict[str, Any]]]
    """Returns the digest of the cell's image, None for what is no cell, and what the suite reported."""


def _targets(
    context: Context, names: Sequence[str], what: validation.Asked, *, everything: bool, keep: bool
) -> Iterator[_Target]:
    """Yield the images: cells, built and loaded if need be, and then those that are none."""
    from builder import validate as validation
    from builder.engines.docker import DockerEngine

    cells, references = _cells_and_references(context, names, everything=everything)
    engine = DockerEngine()
    engine.check()

    def cell(plan: Plan, session: Session, on_event: validation.OnEvent) -> tuple[str | None, dict[str, Any]]:
        digest = session.build(plan).digest
        # It is held to what the matrix declares, and not to what it says of itself.
        subject = validation.Subject(
            kind="image", name=plan.cell.tags[0], digest=digest, declared=plan.files["image.json"]
        )
        return digest, validation.image(subject, engine.find(digest), what, engine, on_event)

    def reference(name: str, on_event: validation.OnEvent) -> tuple[str | None, dict[str, Any]]:
        found = engine.find(name)
        subject = validation.Subject(kind="image", name=name, digest=found.digest)
        return None, validation.image(subject, found, what, engine, on_event)

    if cells:
        session = _session(context, engine="oci", load=True, keep=keep or len(cells) == 1)
        for plan in context.project.fresh_plans(cells):
            yield _Target(plan.cell.id, functools.partial(cell, plan, session))
    for name in references:
        yield _Target(name, functools.partial(reference, name))


def _report(name: str, document: Mapping[str, Any]) -> reports.Report:
    """Read what a suite reported from inside an image, which may be anything."""
    from builder import reports

    try:
        return reports.loads(json.dumps(document).encode(), where=name)
    except MatrixError as error:
        raise ImpossibleError(
            "what was reported from there is no report of the suite", where=name, problems=error.problems
        ) from error


@cli.command("validate")
@click.argument("subjects", metavar="[CELL|IMAGE]...", nargs=-1)
@everything_option
@click.option("--local", is_flag=True, help="Validate this machine's own Python instead of an image.")
@click.option("--python", default="python3", show_default=True, help="With --local: which Python.")
@click.option("--gpus", metavar="all|N|none",
              help="GPUs to give the container, none unless said; a machine has those it has. With any, "
              "the checks of a GPU must run.")  # fmt: skip
@click.option("--profile", default="runtime", show_default=True, metavar="NAME",
              help="The use: runtime, cpu, gpu, multi-gpu, training, kubernetes, quick.")  # fmt: skip
@click.option("--on-skip", type=click.Choice(["fail", "warn", "pass"]), default="fail", show_default=True,
              help="What it means if a required check did not run.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Warnings fail the run.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only checks with such an id: 'lib.*'.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE",
              help="A number of the profile.")  # fmt: skip
@click.option("--budget", "budget_s", type=click.FloatRange(min=1), default=1800.0, show_default=True,
              metavar="SECONDS", help="No check begins after this time.")  # fmt: skip
@click.option("--waivers", type=click.Path(path_type=Path), metavar="PATH",
              help="Checks that may fail until a day, with reasons: a JSON file.")  # fmt: skip
@click.option("--report-dir", type=click.Path(path_type=Path, file_okay=False), default=Path("reports"),
              show_default=True, help="Where the reports go, a directory for each subject.")  # fmt: skip
@keep_option
@_options
def validate_command(
    context: Context,
    subjects: Sequence[str],
    *,
    everything: bool,
    local: bool,
    python: str,
    gpus: str | None,
    waivers: Path | None,
    report_dir: Path,
    keep: bool,
    **asked: Any,  # noqa: ANN401 (the words of Asked)
) -> None:
    """Say whether images, or this machine, are what they claim to be, and work.

    \b
    Exit codes:
      0  every required check passed, and none failed
      1  a check failed or broke
      2  usage
      3  something could not be validated at all: no such image, no engine, or one that has no GPU to give
      4  a required check did not run, or nothing was proven
      5  warnings, with --strict
    """  # noqa: D301 (a backspace, by which click knows lines that it is not to join)
    from builder import reports
    from builder import validate as validation

    console = context.console
    if sum((bool(subjects), everything, local)) != 1:
        raise MatrixError(
            "name cells or images, or --all, or --local",
            tries=("torchyard validate '*cu128*'", "torchyard validate some/image:tag", "torchyard validate --local"),
        )
    what = validation.Asked(
        gpus=gpus or ("auto" if local else "none"),
        waivers=None if waivers is None else validation.read_waivers(waivers),
        **asked,
    )
    targets: Iterable[_Target] = [_Target("machine", lambda show: (None, validation.machine(python, what, show)))]
    if not local:
        targets = _targets(context, subjects, what, everything=everything, keep=keep)
    done: dict[str, reports.Report] = {}
    failures: list[TorchyardError] = []
    documents: list[Mapping[str, Any]] = []
    for target in _possible(targets):

        def show(event: Mapping[str, Any]) -> None:
            for line in event.get("text", ()):
                console.say(str(line))

        console.say(f"validate {target.name}")
        directory = report_dir / reports.directory_name(target.name)
        try:
            digest, document = target.run(show)
            report = _report(target.name, document)
            _write_reports(report, directory)
            if digest is not None:
                _keep_verdict(digest, report, what, console)
        except TorchyardError as error:
            failures.append(error)
            console.problems(error)
            documents.append(_validated(target.name, exit_code=_kept_from(error), problems=error.problems))
        else:
            done[reports.directory_name(target.name)] = report
            documents.append(
                _validated(target.name, exit_code=report.verdict.exit_code, directory=str(directory), report=document)
            )
            console.say(f"reports: {directory}")
            if not console.as_json and os.environ.get("GITHUB_ACTIONS") == "true":
                click.echo(reports.workflow_commands(report), nl=False)
    if len(done) > 1:
        reports.write_overview(done, report_dir)
    console.result(documents)
    if failures and not done:
        sys.exit(max(map(_kept_from, failures)))
    codes = [report.verdict.exit_code for report in done.values()]
    sys.exit(ImpossibleError.exit_code if failures else validation.exit_code(codes))


def _write_reports(report: reports.Report, directory: Path) -> None:
    from builder import reports

    try:
        reports.write_all(report, directory)
    except OSError as error:
        raise MatrixError(
            "the reports cannot be written",
            where=str(error.filename or directory),
            why=error.strerror or str(error),
            tries=("name another place: --report-dir DIRECTORY",),
        ) from error


def _kept_from(error: TorchyardError) -> int:
    """Return the exit code for what kept a subject from being validated; those of other verbs mean something else."""
    return error.exit_code if isinstance(error, MatrixError) else ImpossibleError.exit_code


def _possible(targets: Iterable[_Target]) -> Iterator[_Target]:
    """Yield the targets; whatever keeps all of them from being validated has one exit code."""
    try:
        yield from targets
    except TorchyardError as error:
        if _kept_from(error) == error.exit_code:
            raise
        raise ImpossibleError(problems=error.problems) from error


def _validated(
    subject: str,
    *,
    exit_code: int,
    directory: str | None = None,
    report: Mapping[str, Any] | None = None,
    problems: Sequence[Problem] = (),
) -> dict[str, Any]:
    """Return what machines are told of one subject: its report, or the problems that kept it from having one."""
    return {
        "subject": subject,
        "exit_code": exit_code,
        "directory": directory,
        "report": report,
        "problems": [asdict(problem) for problem in problems],
    }


def _keep_verdict(digest: str, report: reports.Report, what: validation.Asked, console: Console) -> None:
    """Keep what a run found of a cell's image, for `push` to ask."""
    from builder import gate

    if what.options:
        console.say("no verdict is kept: the numbers of the profile were changed")
    elif tiers := gate.keep(Store.open(), digest, report):
        kind = "passing" if report.verdict.passed else "failing"
        console.say(f"{kind} verdict on {', '.join(f'T{tier}' for tier in tiers)} kept for {digest}")


@cli.command("explain")
@click.argument("text", nargs=-1, required=True)
@_options
def explain_command(context: Context, text: Sequence[str]) -> None:
    """Explain an error message, pasted, a failure mode (F35), or what comes on standard input (-)."""
    from validate import explain

    asked = sys.stdin.read() if tuple(text) == ("-",) else " ".join(text)
    context.console.result([failure.as_json() for failure in explain.known(asked)])
    sys.exit((0 if explain.known(asked) else 1) if context.console.as_json else explain.tell(asked))


# --------------------------------------------------------------------------- report


@cli.group("report")
def report_group() -> None:
    """Compare and render reports of validations."""


@report_group.command("diff")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@_options
def report_diff_command(context: Context, before: Path, after: Path) -> None:
    """Say what is different between two reports; exit code 1 if a check became worse."""
    from builder import reports

    found = reports.diff(reports.load(before), reports.load(after))
    context.console.write(str(found))
    context.console.result(found.as_json())
    if found.worse:
        sys.exit(CellFailedError.exit_code)


@report_group.command("render")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@_options
def report_render_command(context: Context, path: Path, output: Path) -> None:
    """Write a report.json in every form: JUnit, Markdown, Prometheus, HTML."""
    from builder import reports

    reports.write_all(reports.load(path), output)
    context.console.say(f"written: {output}")
    context.console.result({"path": str(output)})


@report_group.command("keep")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@_options
def report_keep_command(context: Context, paths: Sequence[Path]) -> None:
    """Keep reports that other machines made as verdicts on images of this store, for `push` to ask.

    A PATH is a report.json, or a directory with some below it. All of them are kept, or none.
    """
    from builder import verdicts

    store, found = Store.open(), verdicts.find(paths)
    kept = verdicts.keep(store, verdicts.read(found, context.project.fresh_plans(context.project.cells), store))
    for one in kept:
        tiers = ", ".join(f"T{tier}" for tier in one["tiers"])
        kind = "passing" if one["passed"] else "failing"
        context.console.say(f"{one['id']}: {f'{kind} verdict on {tiers} kept' if tiers else 'it tried no tier'}")
    context.console.result(kept)


@report_group.command("schema")
@_options
def report_schema_command(context: Context) -> None:  # noqa: ARG001 (it is JSON with any option)
    """Print the JSON Schema of report.json."""
    from builder import reports

    click.echo(json.dumps(reports.json_schema(), indent=2))


# --------------------------------------------------------------------------- push


@cli.command("push")
@patterns
@everything_option
@click.option("--to", "destination", required=True, metavar="REGISTRY/REPOSITORY", help="Where the images go.")
@click.option("--unproven", is_flag=True,
              help="Push also what has no passing verdict, marked as unproven in its labels and tags.")  # fmt: skip
@click.option(
    "--key", metavar="KEY", help="Sign with a private key as cosign knows it: a file, awskms://..., env://..."
)
@click.option("--keyless", is_flag=True, help="Sign as whom the environment's identity token names; needs the network.")
@click.option("--vex", "vex_path", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
              help="An OpenVEX document to attach: which vulnerabilities do not touch the images.")  # fmt: skip
@click.option("--builder", metavar="URI", envvar="TORCHYARD_BUILDER",
              help="Who builds, for the provenance: the URI of a workflow.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Ask the registry what it has, and send nothing.")
@_options
def push_command(
    context: Context,
    patterns: Sequence[str],
    *,
    everything: bool,
    destination: str,
    unproven: bool,
    key: str | None,
    keyless: bool,
    vex_path: Path | None,
    builder: str | None,
    dry_run: bool,
) -> None:
    """Publish images that have a passing verdict, and set their tags last; what is not built yet is built before."""
    from builder import push as pushes
    from builder import upload
    from builder.provenance import SOMEBODY

    console = context.console
    plans = _plans(context, patterns, everything=everything, verb="push")
    session, store = _session(context, engine="oci", load=False), Store.open()
    signer, vex = _signer(key, keyless=keyless), vex_path.read_bytes() if vex_path else None
    if context.project.policy.signed and signer is None and not (unproven or dry_run):
        raise MatrixError(
            "nothing is pushed without a signature",
            where=f"{context.project.matrix_path.name}: publish.signed",
            tries=("--key KEY, or --keyless",),
        )
    failures, documents, rows = [], [], []
    with pushes.opened(destination) as target:
        for plan in plans:
            started = time.monotonic()
            try:
                digest = session.build(plan).digest
                now = functools.partial(upload.resolve, target)
                found = pushes.candidate(store, plan, context.project.family, digest, now=now, unproven=unproven)
                if dry_run:
                    done = pushes.look(target, found.image, found.tags)
                else:
                    said = pushes.evidence(
                        context.project, plan, store, found, signer=signer, vex=vex, builder=builder or SOMEBODY
                    )
                    with console.transfers(f"push {plan.cell.id}") as progress:
                        done = pushes.push(target, store, found.image, found.tags, evidence=said, progress=progress)
            except TorchyardError as error:
                failures.append(error)
                console.say(f"{plan.cell.id}: failed: {error.problems[0].what}")
                continue
            document = {
                "id": plan.cell.id,
                "repository": str(target),
                "digest": found.image.manifest.digest,
                "proven": bool(found.verdicts),
                "signed": bool(found.verdicts) and signer is not None,
                "verdicts": [verdict.as_json() for verdict in found.verdicts],
                "dry_run": dry_run,
                "seconds": round(time.monotonic() - started, 1),
                **done.as_json(),
            }
            documents.append(document)
            rows.append(_pushed_row(document))
    if rows:
        console.table(("tag", "digest", "there", "mounted", "sent", "MB", "seconds", "state"), rows)
    console.result(documents)
    _fail(failures, console, of=len(plans))


def _signer(key: str | None, *, keyless: bool) -> cosign.Signer | None:
    """Return who signs; None if nobody does. A key that cannot be read is found out before anything is sent."""
    from builder import cosign

    if key and keyless:
        raise MatrixError("a key and --keyless exclude each other", tries=("sign with one of them",))
    if not key and not keyless:
        return None
    cosign.require()
    signer = cosign.Signer(key=key or "")
    signer.public_key()
    return signer


def _pushed_row(document: Mapping[str, Any]) -> list[str]:
    state = "proven" if document["proven"] else "unproven, and marked so"
    if document["signed"]:
        state += ", signed"
    return [
        document["tags"][0]["name"],
        document["digest"][:19],
        *(str(document["blobs"][way]) for way in ("there", "mounted", "sent")),
        f"{document['bytes_sent'] / 1e6:.1f}",
        f"{document['seconds']:.1f}",
        f"{state}; nothing was sent" if document["dry_run"] else state,
    ]


# --------------------------------------------------------------------------- verify


@cli.command("verify")
@click.argument("reference", metavar="REFERENCE")
@click.option("--key", metavar="KEY", help="The publisher's public key: a file, or what cosign knows of it elsewhere.")
@click.option("--identity", metavar="NAME", help="Without a key: whose certificate, as its issuer names him.")
@click.option("--issuer", metavar="URL", help="Who vouches for that identity.")
@click.option("--unsigned", is_flag=True, help="Ask for no signature: what is said is compared, whoever says it.")
@click.option("--tier", type=click.IntRange(1, 9), default=1, show_default=True, help="The tier that must be proven.")
@click.option("--content", is_flag=True, help="Also fetch every layer, and hash its bytes.")
@_options
def verify_command(
    context: Context,
    reference: str,
    *,
    key: str | None,
    identity: str | None,
    issuer: str | None,
    unsigned: bool,
    tier: int,
    content: bool,
) -> None:
    """Verify a published image: signature, provenance, bill of materials, verdict, and observed = declared."""
    from builder import verify as verifying

    trust = _trust(key, identity, issuer, unsigned=unsigned)
    console = context.console
    with verifying.opened(reference) as (target, name), console.transfers(f"verify {reference}") as progress:
        done = verifying.verify(target, name, trust, tiers=range(1, tier + 1), content=content, progress=progress)
    console.table(("verified", ""), [[one.what, one.detail] for one in done.known])
    for note in done.notes:
        console.say(f"note: {note}")
    console.result(done.as_json())


def _trust(key: str | None, identity: str | None, issuer: str | None, *, unsigned: bool) -> cosign.Trust | None:
    from builder import cosign

    if [bool(key), bool(identity or issuer), unsigned].count(True) != 1 or bool(identity) is not bool(issuer):
        raise MatrixError(
            "whose signature counts is not said, or not once",
            tries=("--key cosign.pub", "--identity NAME --issuer URL", "--unsigned, if nobody's is wanted"),
        )
    if unsigned:
        return None
    cosign.require()
    return cosign.Trust(key=key or "", identity=identity or "", issuer=issuer or "")


# --------------------------------------------------------------------------- reproduce


@cli.command("reproduce")
@click.argument("subjects", metavar="CELL|IMAGE...", nargs=-1, required=True)
@click.option("--store", "directory", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Where the clean store is made for as long as it takes, instead of in your own.")  # fmt: skip
@click.option("--trust-base", is_flag=True,
              help="Also if a published image starts from another image, whose Python then runs here.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="Differences of a class to show.")  # fmt: skip
@_options
def reproduce_command(
    context: Context, subjects: Sequence[str], *, directory: Path | None, trust_base: bool, top: int
) -> None:
    """Make images again from their locks, in a clean store; exit code 1 if a digest is another, and what differs.

    A CELL is compared with the image of your store; an IMAGE in a registry is made from the inputs in its provenance.
    """
    from builder import reproduce, verify
    from builder.compare import text
    from builder.index import Index

    console = context.console
    cells, references = _cells_and_references(context, subjects, everything=False)
    workshop = reproduce.Workshop(store=Store.open(), index=Index(), report=console, directory=directory)

    def image(reference: str) -> reproduce.Reproduced:
        with verify.opened(reference) as (target, name):
            return reproduce.published(target, name, workshop, trust_base=trust_base)

    tasks: dict[str, Callable[[], reproduce.Reproduced]] = {
        plan.cell.id: functools.partial(reproduce.cell, plan, workshop) for plan in context.project.fresh_plans(cells)
    }
    tasks |= {reference: functools.partial(image, reference) for reference in references}
    failures, done = [], []
    for name, task in tasks.items():
        try:
            done.append(task())
        except TorchyardError as error:
            failures.append(error)
            console.say(f"{name}: failed: {error.problems[0].what}")
            continue
        console.write(f"{done[-1].cell_id}: {'the same' if done[-1].is_same else 'DIFFERS'}")
        console.write(f"  expected  {done[-1].expected}  {done[-1].against}")
        console.write(f"  rebuilt   {done[-1].rebuilt}  from the lock, in {done[-1].seconds:.1f} s")
        if done[-1].groups:
            console.write(text(done[-1].groups, top=top))
    console.result([one.as_json() for one in done])
    _fail(failures, console, of=len(tasks))
    if not all(one.is_same for one in done):
        sys.exit(CellFailedError.exit_code)


# --------------------------------------------------------------------------- size


@cli.command("size")
@patterns
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
              help="How many packages to show, the largest first.")  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print a page of documentation: sizes per cell and layer.")
@_options
def size_command(context: Context, patterns: Sequence[str], *, top: int, markdown: bool) -> None:
    """Say what takes the space in images that are built, by layer and by package, and what they share."""
    from builder import build as builds
    from builder import size as sizes
    from builder.engines.oci import OciEngine
    from builder.engines.oci.inventory import inventory

    store, console = Store.open(), context.console
    found, missing = [], []
    for plan in context.project.plans(context.project.select(patterns)):
        image = builds.complete(plan, store, builder=OciEngine.name)
        if image is None:
            missing.append(plan.cell.id)
        else:
            found.append(sizes.cell_of(plan, image, inventory(store, image, plan.lock.wheels)))
    if missing and (patterns or not found):
        raise ImpossibleError(
            f"{len(missing)} cells are not complete in the store: {', '.join(missing[:3])}",
            where=str(store.root),
            why="what an image takes is known when it is built",
            tries=(f"torchyard build {missing[0]}", *(("torchyard build --all",) if len(missing) > 1 else ())),
        )
    if missing:
        console.say(f"{len(missing)} cells are left out, they are not built: {', '.join(missing)}")
    all_of_them = sizes.sizes(found)
    if markdown:
        console.write(sizes.markdown(all_of_them).rstrip("\n"))
    else:
        console.write(sizes.text(all_of_them, width=shutil.get_terminal_size((120, 24)).columns, top=top))
    console.result(sizes.as_json(all_of_them))


# --------------------------------------------------------------------------- gc


@cli.command("gc")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--older-than", "days", type=click.FloatRange(min=0), default=7.0, show_default=True, metavar="DAYS",
              help="Leave what is younger, and what images that were made since then need.")  # fmt: skip
@_options
def gc_command(context: Context, *, dry_run: bool, days: float) -> None:
    """Remove from the store what no lock of the matrix needs any more; all of it can be fetched or made again."""
    from builder import gc

    project, console, store = context.project, context.console, Store.open()
    plans, before = project.plans(project.cells), time.time() - days * 86400
    if dry_run:
        found = gc.find(store, plans, before=before)
    else:
        with gc.alone(store, lambda name: console.say(f"waiting for another run to end: {name}")):
            found = gc.remove(store, gc.find(store, plans, before=before), before=before)
    sizes_of = {kind: [one.size_bytes for one in found if one.kind == kind] for kind in gc.KINDS}
    rows = [[gc.KINDS[kind], str(len(them)), f"{sum(them) / 1e6:.1f}"] for kind, them in sizes_of.items() if them]
    total = sum(one.size_bytes for one in found)
    if rows:
        console.table(("what", "number", "MB"), rows)
    done = "would be removed" if dry_run else "removed"
    console.say(f"{len(found)} of {store.root} {done}, {total / 1e6:.1f} MB" if found else "there is nothing to remove")
    console.result(
        {
            "dry_run": dry_run,
            "bytes": total,
            "kinds": [
                {"kind": kind, "count": len(them), "bytes": sum(them)} for kind, them in sizes_of.items() if them
            ],
            "paths": [str(one.path.relative_to(store.root)) for one in found],
        }
    )


# --------------------------------------------------------------------------- update


@cli.command("update")
@click.option("--recheck", is_flag=True, help="Also resolve known builds again and report what differs; minutes.")
@_options
def update_command(context: Context, *, recheck: bool) -> None:
    """Look for torch releases and builds that the facts lack, and add them; nothing is ever taken away."""
    from builder import lock as locks
    from builder import update as updates
    from builder.index import Index

    console = context.console
    index = Index()
    configuration = index.configuration
    changes = updates.update(
        Path(facts.__file__).parent / "data",
        list_wheels=lambda project: [offer.filename for offer in index.page(configuration.default_index, project)],
        fetch_page=lambda url: _page(index, url),
        resolve=updates.UvResolve(
            uv=locks.uv_program(), arguments=("--no-config", "--default-index", configuration.default_index)
        ),
        today=dt.datetime.now(dt.UTC).date(),
        recheck=recheck,
        say=console.say,
    )
    for added in changes.added:
        console.say(f"added     {added}")
    for conflict in changes.conflicts:
        console.say(f"differs   {conflict}")
    for failure in changes.failures:
        console.say(f"unknown   {failure}: {failure.why}")
    console.result(
        {
            "added": [str(it) for it in changes.added],
            "conflicts": [str(it) for it in changes.conflicts],
            "failures": [str(it) for it in changes.failures],
        }
    )
    if not (changes.added or changes.conflicts or changes.failures):
        console.say("the facts are complete")
    if changes.conflicts or changes.failures:
        sys.exit(CellFailedError.exit_code)


def _page(index: Index, url: str) -> updates.Page:
    from builder.update import Page

    status, text = index.get(url)
    return Page(status=status, text=text)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a SIGTERM is handled like Ctrl-C, so that nothing is left half done."""
    signal.signal(signal.SIGTERM, _terminate)
    cli(args=list(argv) if argv is not None else None, prog_name="torchyard")
