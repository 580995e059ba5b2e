"""Cell and lock → plan: the files of images/<cell>/ and the image's configuration, as data, without touching a disk."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from packaging.version import Version

from builder import lock as locks
from builder import toolkit
from builder.base import BaseLock
from builder.errors import LockError, MatrixError, Problem
from builder.facts import CPU, Cuda, Facts, cudnn_number
from builder.lock import Lock
from builder.matrix import Cell
from builder.schema import BootstrapBase
from validate.bundle import bundle

SCHEMA = 1
PREFIX = "/opt/venv"
"""Where the virtual environment lies in every image."""
LIBRARY = "lib/python3"
"""Where packages lie in it, under each Python: lib/python3.Y is a link to it, so a path does not hold a version."""
USER = "1000:0"
HOME = "/home/torch"
WORKDIR = "/workspace"
IMAGE_JSON = "/usr/local/share/torchyard/image.json"
"""Where an image keeps what it was declared to be."""
PROFILE = "/etc/profile.d/torchyard.sh"
"""What login shells read after Debian's /etc/profile, which sets PATH anew."""
VALIDATOR = "torchyard-validate"
"""Name of the program by which an image validates itself; beside its Python."""
PROGRAM = "torchyard-"
"""How the names of an image's own programs begin."""
START = f"{PROGRAM}start"
"""The program in every image's entry point: it looks at the host's driver, and then runs what was asked for."""
PROGRAMS = "programs"
"""Directory of the templates of programs, and of the programs among a cell's files."""
UNCOMPILED = "/tests?/"
"""Regular expression for the paths of sources that get no bytecode: nobody imports packages' tests in an image, and
they are a fifth of what there is to compile."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class Healthcheck:
    """How an engine asks a container whether it is well."""

    command: tuple[str, ...]
    interval_s: int = 30
    timeout_s: int = 10
    start_period_s: int = 60
    """Failures during the first seconds do not count."""
    retries: int = 3


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What the image's configuration says; the Dockerfile prints it, an engine without one writes it."""

    env: Mapping[str, str]
    labels: Mapping[str, str]
    user: str
    workdir: str
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    exposed_ports: tuple[str, ...] = ()
    healthcheck: Healthcheck | None = None


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What must be found inside the image; versions as the image itself reports them."""

    torch: str
    """`torch.__version__`: 2.8.0+cu128."""
    cuda: str | None
    """`torch.version.cuda`: 12.8, None in a CPU build."""
    cudnn: str | None
    """Version of the installed cuDNN package."""
    cudnn_number: int | None
    """What the loaded cuDNN library says of itself: 91002."""
    nccl: str | None
    """What the loaded NCCL library says of itself: 2.27.3."""
    python: str
    """Major and minor."""
    architectures: tuple[str, ...]
    """GPU architectures torch was compiled for, in torch's spelling; empty where they are not known yet."""
    packages: Mapping[str, str]
    """Every installed distribution and its version: nothing less, nothing more."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The virtual environment before anything is installed, as paths relative to PREFIX.

    It is written out, not made by `python -m venv`: what that makes differs between versions of Python, and an engine
    that runs nothing of the image must come to the same files. HOME_OF_PYTHON stands for a directory of the base.
    """

    directories: tuple[str, ...]
    links: Mapping[str, str]
    files: Mapping[str, str]


HOME_OF_PYTHON = "{home}"
"""The directory in which the base has its Python, in links and files of an Environment."""


def toolkit_of(cell: Cell) -> str | None:
    """Return which CUDA's toolkit the image has: "13.2"; None for one without."""
    return toolkit.wanted(toolkit=cell.variant.toolkit, cuda=cell.cuda)


def environment_of(cell: Cell) -> Environment:
    """Return the virtual environment of the cell's Python."""
    python = f"python{cell.python}"
    packages = f"{LIBRARY}/site-packages"
    links: dict[str, str] = {}
    if toolkit_of(cell):
        lacking = toolkit.links(cuda=cell.cuda, base=cell.base)
        links = {f"{packages}/{path}": target for path, target in lacking.items()}
    return Environment(
        directories=(
            "bin",
            "include/site/python3",
            packages,
            *sorted({path.rpartition("/")[0] for path in links}),
        ),
        links={
            **links,
            "bin/python": f"{HOME_OF_PYTHON}/{python}",
            "bin/python3": "python",
            f"bin/{python}": "python",
            f"include/site/{python}": "python3",
            f"lib/{python}": LIBRARY.rpartition("/")[2],
            "lib64": "lib",
        },
        files={
            "pyvenv.cfg": (f"home = {HOME_OF_PYTHON}\ninclude-system-site-packages = false\nversion = {cell.python}\n"),
            "bin/activate": (
                "# The environment is active in this image; this is for programs that insist on activating one.\n"
                f'export VIRTUAL_ENV={PREFIX} PATH="{PREFIX}/bin:$PATH"\n'
                "deactivate() { :; }\n"
            ),
        },
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All an engine needs to make the image, and all a proof needs to judge it."""

    cell: Cell
    lock: Lock
    base_lock: BaseLock | None
    """The base's Debian packages; None for a base that is an image."""
    system_lock: BaseLock | None = None
    """The base's Debian packages and those that the variant adds; None if it adds none."""
    config: ImageConfig
    environment: Environment
    expectation: Expectation
    epoch: int
    """Seconds since 1970 that stand for every time in the image."""
    files: Mapping[str, bytes]
    """The content of images/<cell>/, by name."""
    validator: bytes
    """The program that the image carries to validate itself."""

    @property
    def programs(self) -> Mapping[str, bytes]:
        """The image's own programs besides the validator, by the names they have beside its Python."""
        return {
            name.rpartition("/")[2]: content for name, content in self.files.items() if name.startswith(f"{PROGRAMS}/")
        }

    @property
    def directories(self) -> tuple[str, ...]:
        """The directories that the image's user and group 0 can write, besides those of every image."""
        return tuple(sorted(self.cell.variant.directories))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that decides what the image is: its files, the validator and the base's lock."""
        content = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        content["validator"] = hashlib.sha256(self.validator).hexdigest()
        if self.base_lock is not None:
            content["base"] = self.base_lock.digest
        if self.system_lock is not None:
            content["system"] = self.system_lock.digest
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _configuration(cell: Cell, expectation: Expectation) -> ImageConfig:
    cuda = {} if cell.cuda == "cpu" else {
        # Read by NVIDIA's container runtime: every GPU unless told otherwise, and no graphics libraries.
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    }  # fmt: skip
    tools = []
    if toolkit_of(cell):
        home = toolkit.home(cuda=cell.cuda, base=cell.base, packages=f"{PREFIX}/{LIBRARY}/site-packages")
        cuda["CUDA_HOME"] = home
        tools = [f"{home}/bin"]
    title = f"PyTorch {cell.torch}, " + ("CPU" if cell.cuda == "cpu" else f"CUDA {cell.cuda}, cuDNN {cell.cudnn}")
    versions = {
        "torch": expectation.torch,
        "cuda": cell.cuda,
        "cudnn": expectation.cudnn,
        "nccl": expectation.nccl,
        "python": cell.python,
        "toolkit": toolkit_of(cell),
    }
    init = "/usr/bin/tini" if isinstance(cell.base, BootstrapBase) else cell.base.init
    program = f"{PROGRAM}{cell.variant.program}" if cell.variant.program else None
    shell = "bash" if isinstance(cell.base, BootstrapBase) else "python"
    return ImageConfig(
        env={
            "PATH": ":".join((f"{PREFIX}/bin", *tools, SYSTEM_PATH)),
            "VIRTUAL_ENV": PREFIX,
            "LANG": "C.UTF-8",
            # With these, a user id that /etc/passwd does not know still has a name and a place for caches.
            "HOME": HOME,
            "LOGNAME": "torch",
            **cuda,
            **cell.variant.env,
        },
        labels={
            "org.opencontainers.image.title": title,
            "org.opencontainers.image.description": cell.variant.description,
            "org.opencontainers.image.version": cell.tag_names[0],
            "torchyard.cell": cell.id,
            **{f"torchyard.{name}": value for name, value in versions.items() if value is not None},
        },
        user=USER,
        workdir=WORKDIR,
        entrypoint=(*((init, "--") if init else ()), f"{PREFIX}/bin/{START}"),
        cmd=(program or shell,),
        exposed_ports=(f"{cell.variant.port}/tcp",) if cell.variant.port else (),
        healthcheck=Healthcheck(command=(program, "--health")) if program else None,
    )


def profile_of(config: ImageConfig) -> str:
    """Return what puts the directories of the image's own programs first again in a login shell."""
    system = SYSTEM_PATH.split(":")
    own = ":".join(place for place in config.env["PATH"].split(":") if place not in system)
    return (
        "# /etc/profile has set PATH anew, without the directories of the image's own programs.\n"
        f'[ "${{PATH#{own}:}}" != "$PATH" ] || PATH="{own}:$PATH"\n'
    )


def expectation_of(cell: Cell, lock: Lock) -> Expectation:
    """Return what the cell declares, in the words in which an image reports it."""
    gpu = cell.cuda != "cpu"
    return Expectation(
        torch=cell.torch_local,
        cuda=cell.cuda if gpu else None,
        cudnn=str(cell.cudnn) if cell.cudnn else None,
        cudnn_number=cudnn_number(cell.cudnn) if cell.cudnn else None,
        nccl=str(lock.nccl) if gpu and lock.nccl else None,
        python=cell.python,
        architectures=cell.architectures,
        packages={wheel.name: str(wheel.version) for wheel in lock.wheels},
    )


def image_json(
    cell: Cell,
    lock: Lock,
    base_lock: BaseLock | None,
    system_lock: BaseLock | None,
    *,
    config: ImageConfig,
    expectation: Expectation,
    epoch: int,
) -> dict[str, Any]:
    """Return what images/<cell>/image.json holds: everything the image must turn out to be."""
    base: dict[str, Any] = {"name": cell.base_name, "kind": cell.base.kind, "image": cell.base.image}
    if isinstance(cell.base, BootstrapBase):
        assert base_lock is not None
        base |= {"suite": cell.base.suite, "lock": f"sha256:{base_lock.digest}"}
    if system_lock is not None:
        base |= {"system": list(cell.variant.system), "system_lock": f"sha256:{system_lock.digest}"}
    return {
        "schema": SCHEMA,
        "id": cell.id,
        "tags": list(cell.tags),
        "torch": str(cell.torch),
        "cuda": cell.cuda,
        "cudnn": str(cell.cudnn) if cell.cudnn else None,
        "cudnn_is_stock": cell.cudnn_is_stock,
        "variant": cell.variant_name,
        "companions": list(cell.companions),
        "program": cell.variant.program,
        "port": cell.variant.port,
        "toolkit": toolkit_of(cell),
        "platform": cell.platform,
        "base": base,
        "lock": f"sha256:{locks.digest_of(locks.dumps(lock))}",
        "epoch": epoch,
        "prefix": PREFIX,
        "config": asdict(config),
        "expect": asdict(expectation),
    }


def templates_of(root: Path) -> Path:
    """Return the directory with the templates: the project's own, else the ones torchyard ships."""
    for candidate in (root / "templates", Path(__file__).parent / "templates", Path(__file__).parents[1] / "templates"):
        if (candidate / "Dockerfile.j2").is_file():
            return candidate
    raise LockError("there are no templates", where=str(root / "templates"), tries=("reinstall torchyard",))


def _quoted(value: str) -> str:
    """Quote a value for LABEL and ENV, where `$` would be replaced."""
    return json.dumps(value, ensure_ascii=False).replace("$", "\\$")


def _in_shell(value: str) -> str:
    """Quote a value for a shell that knows the directory of the base's Python as $home."""
    if HOME_OF_PYTHON not in value:
        return shlex.quote(value)
    escaped = re.sub(r'([\\"$`])', r"\\\1", value)
    return f'"{escaped.replace(HOME_OF_PYTHON, "$home")}"'


def _jinja(templates: Path) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = _quoted
    environment.filters["in_shell"] = _in_shell
    environment.filters["json_array"] = lambda items: json.dumps(list(items))
    return environment


def _printed(templates: Path, name: str, **values: object) -> str:
    """Render a template; raises MatrixError naming its line if it asks for what is not there, or is not whole."""
    try:
        return _jinja(templates).get_template(name).render(**values)
    except (TemplateError, TypeError) as error:
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(templates / name):
                line = frame.lineno
        raise MatrixError(
            "the template cannot be rendered",
            where=f"{templates / name}: line {line}" if line else str(templates / name),
            why=str(error).partition("\n")[0],
        ) from error


def programs_of(cell: Cell, *, templates: Path, **values: object) -> dict[str, bytes]:
    """Return the programs that every image has and the one its variant runs, by name; raises MatrixError if one lacks.

    A template is shell with Jinja (`start.sh.j2`), or Python as it is (`serve.py`).
    """
    found: dict[str, bytes] = {}
    for name in ("start", *((cell.variant.program,) if cell.variant.program else ())):
        shell, python = templates / PROGRAMS / f"{name}.sh.j2", templates / PROGRAMS / f"{name}.py"
        if python.is_file():
            found[f"{PROGRAM}{name}"] = python.read_bytes()
        elif shell.is_file():
            found[f"{PROGRAM}{name}"] = _printed(templates, f"{PROGRAMS}/{shell.name}", cell=cell, **values).encode()
        else:
            raise MatrixError(
                f"there is no template for the program {name}",
                where=f"variants.{cell.variant_name}.program",
                why=f"looked for {shell.name} and {python.name} in {templates / PROGRAMS}",
            )
    return found


def render(
    cell: Cell, lock: Lock, base_lock: BaseLock | None, system_lock: BaseLock | None = None, *, templates: Path
) -> Plan:
    """Return the plan of the cell; the same inputs give the same bytes."""
    expectation = expectation_of(cell, lock)
    config = _configuration(cell, expectation)
    environment = environment_of(cell)
    epoch = max(lock.epoch, *(one.epoch for one in (base_lock, system_lock) if one), 0)
    programs = programs_of(
        cell,
        templates=templates,
        config=config,
        driver=str(cell.driver) if cell.driver else None,
        prefix=PREFIX,
        home=HOME,
        image_json=IMAGE_JSON,
    )
    dockerfile = _printed(
        templates,
        "Dockerfile.j2",
        cell=cell,
        base=cell.base,
        config=config,
        environment=environment,
        epoch=epoch,
        prefix=PREFIX,
        library=LIBRARY,
        uncompiled=UNCOMPILED,
        image_json=IMAGE_JSON,
        profile={"path": PROFILE, "text": profile_of(config)},
        validator=VALIDATOR,
        programs=PROGRAMS,
        # What is new below these is given the image's time.
        roots=sorted({f"/{PurePosixPath(path).parts[1]}" for path in cell.variant.directories}),
        directory=f"images/{cell.id}",
    )
    declared = image_json(cell, lock, base_lock, system_lock, config=config, expectation=expectation, epoch=epoch)
    return Plan(
        cell=cell,
        lock=lock,
        base_lock=base_lock,
        system_lock=system_lock,
        config=config,
        environment=environment,
        expectation=expectation,
        epoch=epoch,
        files={
            "Dockerfile": dockerfile.encode(),
            "image.json": (json.dumps(declared, indent=2, ensure_ascii=False) + "\n").encode(),
            "pylock.toml": locks.dumps(lock).encode(),
            "requirements.txt": locks.requirements_txt(lock).encode(),
            **{f"{PROGRAMS}/{name}": content for name, content in programs.items()},
        },
        validator=bundle(),
    )


def catalogue(cells: Iterable[Cell], facts: Facts, *, templates: Path) -> str:
    """Return the table of images for people, in Markdown; drivers are those that suffice by minor compatibility."""
    rows = []
    for cell in cells:
        cuda: Cuda = CPU if cell.cuda == CPU else Version(cell.cuda)
        driver = facts.driver_floor(cuda)
        rows.append(
            {
                "tag": cell.tags[0],
                "torch": cell.torch,
                "cuda": cell.cuda,
                "cudnn": f"{cell.cudnn}{'' if cell.cudnn_is_stock else ' (override)'}" if cell.cudnn else "-",
                "nccl": cell.nccl or "-",
                "python": cell.python,
                "base": cell.base_name,
                "driver": f"≥ {driver}" if driver else "-",
                "gpus": ", ".join(sorted(cell.architectures, key=lambda name: (len(name), name))) or "-",
            }
        )
    return _printed(templates, "catalogue.md.j2", rows=rows)


def differences(plan: Plan, directory: Path) -> tuple[Problem, ...]:
    """Compare the plan with the files of images/<cell>/ as they are; empty if they are the same."""
    problems = []
    for name, content in sorted(plan.files.items()):
        path = directory / name
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            problems.append(Problem(what="is missing", where=str(path), tries=("torchyard render",)))
            continue
        if found != content:
            line = _first_difference(found, content)
            problems.append(
                Problem(
                    what=f"differs from what the matrix, the lock and the templates give, from line {line} on",
                    where=str(path),
                    tries=("torchyard render",),
                )
            )
    return tuple(problems)


def _first_difference(one: bytes, other: bytes) -> int:
    lines = zip(one.splitlines(), other.splitlines(), strict=False)
    return next(
        (number for number, (a, b) in enumerate(lines, 1) if a != b), min(one.count(b"\n"), other.count(b"\n")) + 1
    )
