"""A base of a few files, or of a few packages of a real one; a Python that compiles nothing; cells of fixed bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import deflate

from builder import base as bases
from builder import layout, tar
from builder import lock as locks
from builder.base import BaseImage, BaseLock
from builder.engines import BuiltImage
from builder.engines.oci import OciEngine, bytecode
from builder.engines.oci.bytecode import Interpreter
from builder.engines.oci.foundation import open_tar
from builder.fetching import Silent
from builder.index import Configuration, Index
from builder.layout import Layer
from builder.lock import Lock
from builder.matrix import Cell
from builder.render import PROGRAMS, Plan, render
from builder.schema import BootstrapBase
from builder.store import Store
from tests.support import cells, evil
from tests.support.wheels import UPLOADED, FakeWheel, universe, wheel

ROOT = Path(__file__).parents[2]
EPOCH = 1_760_000_000
CONFIG: Mapping[str, Any] = {"Env": list(bases.ENV), "Cmd": ["/bin/bash"]}

# --------------------------------------------------------------------------- bases


def directory(path: str, mode: int = 0o755, *, uid: int = 0, mtime: int = EPOCH) -> tar.Entry:
    return tar.Entry(path=path, kind=tar.Kind.DIRECTORY, mode=mode, uid=uid, mtime=mtime)


def base_entries(python: str = "3.11") -> list[tar.Entry]:
    """Return what there must be: a Python, and the directories into which a cell's own files go."""
    places = ("etc", "home", "opt", "usr", "usr/bin", "usr/local", "usr/local/bin", "usr/local/share")
    return [
        *map(directory, places),
        directory("home/torch", 0o775, uid=1000),
        directory("workspace", 0o775, uid=1000),
        tar.file_entry(f"usr/bin/python{python}", b"no program", mode=0o755, mtime=EPOCH),
    ]


def layer_of(store: Store, entries: Iterable[tar.Entry]) -> Layer:
    with store.scratch("layer") as scratch:
        return layout.gzip_layer(store, tar.stream(entries), scratch=scratch)


def base_lock(suite: str = "bookworm") -> BaseLock:
    """Return a lock that needs no Debian package."""
    return BaseLock(suite=suite, architecture="amd64", packages=("python3",), epoch=EPOCH, debs=())


def system_lock() -> BaseLock:
    """Return a lock of the base's packages and more, none of which is there."""
    return replace(base_lock(), packages=("git", "python3"))


def fake_base(
    store: Store,
    lock: BaseLock | None = None,
    *,
    entries: Sequence[tar.Entry] | None = None,
    system: Sequence[tar.Entry] | None = None,
    config: Mapping[str, Any] = CONFIG,
) -> BaseImage:
    """Put a base into the store where the real one of `lock` would be: `base.make` finds it there.

    With `system`, that on top of which lie the system packages of `system_lock`.
    """
    lock = lock or base_lock()
    layers = [layer_of(store, base_entries() if entries is None else entries)]
    history = [layout.History(created_by="a base")]

    def made(*_: object, **__: object) -> layout.Image:
        return layout.assemble(
            store,
            architecture=lock.architecture,
            config=config,
            epoch=lock.epoch,
            layers=tuple(layers),
            history=tuple(history),
        )

    with mock.patch.object(bases, "_make", made), mock.patch.object(bases, "_extend", made):
        below = bases.make(lock, store)
        if system is None:
            return below
        layers.append(layer_of(store, system))
        history.append(layout.History(created_by="system packages"))
        return bases.make(lock, store, system=system_lock())


STARTS = ("bash", "coreutils", "dash", "findutils", "grep", "libc-bin", "mawk", "passwd", "python3-venv", "sed", "tini")
"""Packages whose programs a build through BuildKit, or the start of an image, calls."""


def without_compilers(store: Store, lock: BaseLock, real: BaseImage) -> BaseImage:
    """Put a real base's layer, less the packages that STARTS do not depend on, where that of `lock` would be.

    Engines unpack it in a quarter of the time; `real` may be in another store.
    """
    owner = Store(real.layout.parents[1])
    with tempfile.TemporaryFile() as file:
        with open_tar(owner, Layer(blob=real.layer, diff_id=real.diff_id)) as source:
            while piece := source.read(1 << 20):
                file.write(piece)
        file.seek(0)
        entries = tar.read(file)
        left_out = _files_but_for(entries, STARTS)
        kept = [one for path, one in entries.items() if one.kind is tar.Kind.DIRECTORY or path not in left_out]
        return fake_base(store, lock, entries=kept)


def _files_but_for(entries: Mapping[str, tar.Entry], packages: Iterable[str]) -> set[str]:
    """Return the paths of all packages but these and what they depend on, by what dpkg says of them."""
    depends: dict[str, set[str]] = {}
    for paragraph in entries["var/lib/dpkg/status"].read().decode().split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if "Package" in fields:
            asked = ",".join(fields.get(name, "") for name in ("Depends", "Pre-Depends"))
            # Versions and architectures apart; a name that no package has is a virtual one.
            depends[fields["Package"]] = set(re.findall(r"[a-z0-9][a-z0-9.+-]+", re.sub(r"\([^)]*\)|:\w+", "", asked)))
    kept: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        if name in depends and name not in kept:
            kept.add(name)
            waiting += depends[name]
    listed: dict[bool, set[str]] = {True: set(), False: set()}
    for path, entry in entries.items():
        if found := re.fullmatch(r"var/lib/dpkg/info/([^:]+)(:\w+)?\.list", path):
            for line in entry.read().decode().splitlines():
                listed[found[1] in kept].add(re.sub(r"^/(?=(?:bin|sbin|lib|lib64)/)", "/usr/", line).removeprefix("/"))
    # Directories, and links in their place, are of many packages.
    return listed[False] - listed[True]


# --------------------------------------------------------------------------- Python

Compile = Callable[[str, bytes], bytes | None]
DOES_NOT_COMPILE = b"print 'python 2'\n"


def compiled(path: str, source: bytes) -> bytes | None:
    """Return what stands for bytecode: a function of path and source, whatever Python runs the tests."""
    if source == DOES_NOT_COMPILE:
        return None
    return b"compiled " + hashlib.sha256(path.encode() + b"\0" + source).hexdigest().encode() + b"\n"


@contextlib.contextmanager
def fake_python(version: str = "3.11.2", *, compile_one: Compile = compiled) -> Iterator[list[str]]:
    """Have engines find this Python in every base; yields the paths of what was compiled."""
    tag = "cpython-" + "".join(version.split(".")[:2])
    found = Interpreter(version=version, magic=b"\xa7\r\r\n", tag=tag, command=(), environment={})
    seen: list[str] = []

    @contextlib.contextmanager
    def interpreter(
        tars: Sequence[Callable[[], contextlib.AbstractContextManager[BinaryIO]]],
        *,
        python: str,
        search: Sequence[str],
        scratch: Path,
    ) -> Iterator[Interpreter]:
        assert scratch.is_dir()
        assert search
        for opened in tars:
            with opened() as file, tarfile.open(fileobj=file, mode="r|") as archive:
                assert archive.next(), "a base of nothing"
        yield found

    def compile_sources(
        _: Interpreter, sources: Iterable[tuple[str, bytes]], *, workers: int
    ) -> Iterator[tuple[str, bytes | None]]:
        assert workers > 0
        for path, source in sources:
            seen.append(path)
            yield path, compile_one(path, source)

    with (
        mock.patch.object(bytecode, "interpreter", interpreter),
        mock.patch.object(bytecode, "compile_sources", compile_sources),
    ):
        yield seen


# --------------------------------------------------------------------------- cells


def bootstrap_cell(**options: Any) -> Cell:
    """Return a cell on a bootstrap base; the options are those of `cells.cell`."""
    cell = cells.cell(**options)
    base = BootstrapBase(
        kind="bootstrap",
        suite="bookworm",
        python=cell.python,
        packages=("python3",),
        image=f"debian@sha256:{'0' * 64}",
    )
    return replace(cell, base_name="bookworm", base=base)


def fixed(one: FakeWheel) -> FakeWheel:
    """Return the same wheel, compressed by the pinned compressor: `zipfile` uses whatever zlib Python was built with.

    Every third member is stored.
    """
    parts = []
    with zipfile.ZipFile(io.BytesIO(one.content)) as archive:
        for number, entry in enumerate(archive.infolist()):
            content = archive.read(entry)
            stored = number % 3 == 2
            raw = content if stored else bytes(deflate.deflate_compress(content, 6))
            mode = entry.external_attr >> 16
            parts.append(evil.Part(name=entry.filename, content=content, method=0 if stored else 8, raw=raw, mode=mode))
    return replace(one, content=evil.pack(parts))


def noise(size: int, seed: str = "noise") -> bytes:
    """Return bytes that compress somewhat, the same ones always."""
    lines = (
        hashlib.sha256(f"{seed} {number}".encode()).hexdigest().encode() + b"\n" for number in range(size // 65 + 1)
    )
    return b"".join(lines)[:size]


LONG = "/".join(["a_directory_with_a_long_name"] * 5)


def mesh(version: str = "1.0", more: Mapping[str, bytes] | None = None) -> FakeWheel:
    """Make a wheel with one of everything that wheels hold, and `more` files."""
    information, data = f"mesh-{version}.dist-info", f"mesh-{version}.data"
    files = {
        "mesh/__init__.py": b"from mesh import big\n",
        "mesh/big.py": b"".join(b"x%d = '%s'\n" % (n, noise(40, str(n)).strip()) for n in range(400)),
        "mesh/_core.so": b"\x7fELF" + noise(70_000, "core"),
        "mesh/data.bin": noise(30_000, "data"),
        "mesh/empty.txt": b"",
        "mesh/naïve.txt": "ï\n".encode(),
        f"mesh/{LONG}/deep.txt": b"deep\n",
        "mesh/broken.py": DOES_NOT_COMPILE,
        "mesh/__pycache__/big.cpython-39.pyc": b"somebody else's",
        "mesh/tests/test_big.py": b"assert True\n",
        f"{data}/scripts/mesh-run": b"#!python\nimport mesh\n",
        f"{data}/data/share/mesh/notes.txt": b"notes\n",
        f"{data}/headers/mesh.h": b"int mesh;\n",
        f"{data}/purelib/mesh_extra.py": b"extra = 1\n",
        f"{information}/entry_points.txt": b"[console_scripts]\nmesh = mesh.big:main\n",
        **(more or {}),
    }
    return wheel("mesh", version, files=files)


def lock_of(cell: Cell, wheels: Iterable[FakeWheel]) -> Lock:
    """Lock these wheels for the cell, without asking uv."""
    torch = {"torch": next((index.name for index in cell.indexes if "torch" in index.packages), locks.DEFAULT_INDEX)}
    return Lock(
        request=locks.request_of(cell).digest,
        cell_id=cell.id,
        python=cell.python,
        exclude_newer=cell.exclude_newer,
        resolver="none",
        wheels=tuple(
            locks.Wheel(
                name=one.project,  # type: ignore[arg-type] # a normalized name
                version=one.version,
                filename=one.filename,
                sha256=one.sha256,
                size=len(one.content),
                upload_time=UPLOADED.replace(microsecond=0),
                index=torch.get(one.project, locks.DEFAULT_INDEX),
            )
            for one in sorted(wheels, key=lambda one: one.project)
        ),
    )


def plan_of(cell: Cell, wheels: Iterable[FakeWheel]) -> Plan:
    lock = base_lock() if isinstance(cell.base, BootstrapBase) else None
    plan = render(cell, lock_of(cell, wheels), lock, templates=ROOT / "templates")
    # The real ones change with every check and every word of a message; digests in tests do not.
    programs = {f"{PROGRAMS}/{name}": f"#!/bin/sh\n# {name}\n".encode() for name in plan.programs}
    return dataclasses.replace(plan, validator=b"#!/opt/venv/bin/python\n", files={**plan.files, **programs})


def wheels_of(cell: Cell, *others: FakeWheel) -> tuple[FakeWheel, ...]:
    """Return the wheels of the cell's universe, `others` in the place of those of the same name."""
    names = {one.project for one in others}
    mine = [one for one in universe(cell).wheels if one.project not in names]
    return tuple(map(fixed, [*mine, *others]))


@dataclass(kw_only=True)
class Said:
    """Steps, and a reporter of a build, that remember."""

    lines: list[str] = field(default_factory=list)

    def step(self, text: str) -> None:
        self.lines.append(text)

    def output(self, line: str) -> None:
        self.lines.append(line)

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextlib.contextmanager
    def transfers(self, title: str) -> Iterator[Silent]:
        self.lines.append(title)
        yield Silent()

    @contextlib.contextmanager
    def steps(self, title: str) -> Iterator[Said]:
        self.lines.append(title)
        yield self


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cell, its wheels, and a store that holds them and a base."""

    plan: Plan
    wheels: tuple[FakeWheel, ...]
    store: Store
    base: BaseImage

    def build(self, *, workers: int = 2, plan: Plan | None = None) -> BuiltImage:
        return OciEngine(workers=workers).build(plan or self.plan, self.base, store=self.store, steps=Said())

    def wheel(self, project: str) -> FakeWheel:
        return next(one for one in self.wheels if one.project == project)

    def path(self, project: str) -> Path:
        """Return where a wheel lies in the store."""
        return self.store.path(self.wheel(project).sha256)


def ready(root: Path, cell: Cell | None = None, wheels: Sequence[FakeWheel] = (), **base: Any) -> Ready:
    """Prepare a cell in a store at `root`; by default one with a package that has one of everything."""
    if cell is None:
        plan, wheels = _default()
    else:
        wheels = tuple(wheels or wheels_of(cell))
        plan = plan_of(cell, wheels)
    store = Store.open(root)
    for one in wheels:
        store.put(one.content)
    return Ready(plan=plan, wheels=wheels, store=store, base=fake_base(store, **base))


@functools.cache
def _default() -> tuple[Plan, tuple[FakeWheel, ...]]:
    cell = bootstrap_cell(packages=("numpy", "mesh"))
    wheels = wheels_of(cell, mesh())
    return plan_of(cell, wheels), wheels


def index_of(root: Path, wheels: Iterable[FakeWheel] = ()) -> Index:
    """Return an index that reads these wheels from a directory, and knows nothing else."""
    root.mkdir(exist_ok=True)
    for one in wheels:
        one.write(root)
    return Index(configuration=Configuration(default_index="", no_index=True, find_links=(str(root),)))


def damage(path: Path, at: int) -> None:
    """Flip one bit, and nothing that a look at the directory would show."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(content)
