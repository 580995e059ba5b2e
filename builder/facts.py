"""What machines looked up about torch, CUDA, cuDNN and GPUs: typed rows from builder/data/, each with its source."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, Literal, TypeVar

from packaging.version import InvalidVersion, Version

from builder.errors import MatrixError

SCHEMA: Final = 1
FILES: Final = ("torch.toml", "cuda.toml", "gpus.toml", "cudnn.toml")
CPU: Final = "cpu"
Cuda = Version | Literal["cpu"]

_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)

_MOST_ALTERNATIVES: Final = 3
NUMBERS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,3}", re.ASCII)


# --- values ------------------------------------------------------------


class Platform(StrEnum):
    """Where an image runs."""

    AMD64 = "linux/amd64"
    ARM64 = "linux/arm64"


class Index(StrEnum):
    """Where a build is published: as plain `torch==X` on the default index, or on PyTorch's own only."""

    DEFAULT = "default"
    PYTORCH = "pytorch"


class Coverage(StrEnum):
    """How a build reaches a GPU."""

    CODE = "code"  # machine code for it, or for an earlier minor of its major
    PTX = "ptx"  # only through the driver's compiler, which wants the toolkit's own driver
    NONE = "none"
    UNKNOWN = "unknown"  # the build's architectures were never recorded


@dataclass(frozen=True, kw_only=True, order=True)
class Driver:
    """A driver version as NVIDIA writes it: `Version` alone would print 580.65.06 as 580.65.6."""

    version: Version
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def is_branch(self) -> bool:
        """Say whether only the branch is given (`525`), which stands for its newest release."""
        return len(self.version.release) == 1

    def satisfies(self, floor: Driver) -> bool:
        """Say whether this driver is at least `floor`."""
        return self.version.major >= floor.version.major if self.is_branch else self >= floor


@dataclass(frozen=True, kw_only=True, order=True)
class Python:
    """A Python minor version, free-threaded or not (`3.13`, `3.13t`)."""

    version: Version
    free_threaded: bool = False

    def __str__(self) -> str:
        return f"{self.version}{'t' if self.free_threaded else ''}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a fact was looked up, and when."""

    id: str
    title: str
    date: dt.date


@dataclass(frozen=True, kw_only=True)
class Release:
    """One torch release."""

    torch: Version
    date: dt.date
    pythons: tuple[Python, ...]
    complete: frozenset[Platform]
    """Platforms on which the list of builds is known to be whole, so that a missing one was never made."""
    complete_source: str
    named: tuple[Version, ...]
    """CUDA versions that torch's own table of builds names, but whose publication was not observed."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Build:
    """One published build of torch for one platform; what is None was never established."""

    torch: Version
    cuda: Cuda
    platform: Platform
    index: Index
    toolkit: Version | None = None
    cudnn: Version | None = None
    nccl: Version | None = None
    triton: Version | None = None
    glibc: Version | None = None
    pythons: tuple[Python, ...] = ()
    gpus: tuple[Version, ...] | None = None
    ptx: tuple[Version, ...] | None = None
    gpus_by: str = ""
    gpus_source: str = ""
    unverified: frozenset[str] = frozenset()
    note: str = ""
    source: str

    @property
    def cuda_tag(self) -> str:
        """Return `cu128` or `cpu`."""
        return cuda_tag(self.cuda)


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """One CUDA toolkit and the driver that came with it."""

    version: Version
    driver: Driver
    exists: bool = True
    source: str


@dataclass(frozen=True, kw_only=True)
class Major:
    """One CUDA major and the oldest driver that runs all its minors."""

    major: int
    driver: Driver
    source: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One compute capability, with the products that have it."""

    sm: Version
    family: str
    names: tuple[str, ...]
    first_cuda: Version
    last_cuda: Version | None
    driver: Driver | None
    source: str

    @property
    def tag(self) -> str:
        """Return `sm_120`."""
        return sm_tag(self.sm)


@dataclass(frozen=True, kw_only=True)
class CodeException:
    """Code that does not run on a later minor of its major, or does on a renamed one."""

    code: Version
    gpu: Version
    runs: bool
    before: Version | None
    """The exception ended with this CUDA."""
    source: str


@dataclass(frozen=True, kw_only=True)
class CudnnFloor:
    """From this cuDNN on, GPUs below a compute capability are no longer served."""

    cudnn: Version
    majors: frozenset[int]
    gpu: Version
    source: str


# --- names ------------------------------------------------------------


def cudnn_number(version: Version) -> int:
    """Return the number that cuDNN reports for `version`: 91002 for 9.10.2.21, 8902 for 8.9.2.26."""
    # cuDNN 9 changed the factor of the major from 1000 to 10000 (its 9.0.0 release notes).
    factor = 10000 if version.major >= 9 else 1000
    return version.major * factor + version.minor * 100 + version.micro


def cuda_tag(cuda: Cuda) -> str:
    """Return `cu128` or `cpu`."""
    return "cpu" if isinstance(cuda, str) else f"cu{cuda.major}{cuda.minor}"


def cuda_name(cuda: Cuda) -> str:
    """Return `CUDA 12.8` or `CPU`."""
    return "CPU" if isinstance(cuda, str) else f"CUDA {cuda}"


def sm_tag(sm: Version) -> str:
    """Return `sm_120` for compute capability 12.0."""
    return f"sm_{sm.major}{sm.minor}"


def listed(words: Iterable[object]) -> str:
    """Join words as prose: `12.6, 12.8 and 12.9`."""
    *first, last = [str(word) for word in words] or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


# --- loading ------------------------------------------------------------


class _Row:
    """A table of a facts file that is taken apart key by key; what is left over is unknown."""

    def __init__(self, table: object, where: str, sources: Mapping[str, Source] | None = None) -> None:
        if not isinstance(table, dict):
            raise MatrixError("is not a table", where=where)
        self._left = dict(table)
        self.where = where
        self._sources = sources

    def bad(self, key: str, why: str) -> MatrixError:
        return MatrixError(f"{key} {why}", where=self.where)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._left.pop(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "is missing" if value is None else "is not text")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        value = self._left.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(key, "is not a list of texts")
        return tuple(value)

    def date(self, key: str) -> dt.date:
        value = self._left.pop(key, None)
        if not isinstance(value, dt.date) or isinstance(value, dt.datetime):
            raise self.bad(key, "is not a date")
        return value

    def number(self, key: str) -> int:
        value = self._left.pop(key, None)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.bad(key, "is not a whole number")
        return value

    def numbers(self, key: str) -> frozenset[int]:
        value = self._left.pop(key, None)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.bad(key, "is not a list of whole numbers")
        return frozenset(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._left.pop(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "is neither true nor false")
        return value

    def version(self, key: str) -> Version:
        return self._version(key, self.text(key))

    def version_or_none(self, key: str) -> Version | None:
        return self.version(key) if key in self._left else None

    def versions(self, key: str) -> tuple[Version, ...] | None:
        texts = self.texts(key)
        return None if texts is None else tuple(self._version(key, text) for text in texts)

    def cuda(self, key: str) -> Cuda:
        text = self.text(key)
        return CPU if text == CPU else self._version(key, text)

    def driver(self, key: str) -> Driver:
        text = self.text(key)
        return Driver(version=self._version(key, text), text=text)

    def driver_or_none(self, key: str) -> Driver | None:
        return self.driver(key) if key in self._left else None

    def pythons(self, key: str) -> tuple[Python, ...]:
        return tuple(self._python(key, text) for text in self.texts(key) or ())

    def one_of(self, key: str, kind: type[_E]) -> _E:
        return self._member(key, self.text(key), kind)

    def some_of(self, key: str, kind: type[_E]) -> frozenset[_E]:
        return frozenset(self._member(key, text, kind) for text in self.texts(key) or ())

    def source(self, key: str = "source", default: str | None = None) -> str:
        name = self.text(key, default)
        if name and self._sources is not None and name not in self._sources:
            raise self.bad(key, f"names {name!r}, which [sources] lacks")
        return name

    def done(self) -> None:
        if self._left:
            raise MatrixError(f"unknown key {min(self._left)!r}", where=self.where)

    def _version(self, key: str, text: str) -> Version:
        try:
            return Version(text)
        except InvalidVersion:
            raise self.bad(key, f"is not a version: {text!r}") from None

    def _python(self, key: str, text: str) -> Python:
        return Python(version=self._version(key, text.removesuffix("t")), free_threaded=text.endswith("t"))

    def _member(self, key: str, text: str, kind: type[_E]) -> _E:
        try:
            return kind(text)
        except ValueError:
            raise self.bad(key, f"is {text!r}, not one of {listed(kind)}") from None


class _File:
    """A facts file whose rows are read list by list; a list nobody read is unknown."""

    def __init__(self, folder: Traversable, name: str) -> None:
        self._name = name
        try:
            self._left: dict[str, object] = tomllib.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MatrixError("the facts cannot be read", where=name, why=str(error)) from error
        except tomllib.TOMLDecodeError as error:
            raise MatrixError("is not TOML", where=name, why=str(error)) from error
        if self._left.pop("schema", None) != SCHEMA:
            raise MatrixError(
                f"is not written in schema {SCHEMA}",
                where=name,
                tries=("update torchyard, or remove the facts directory you gave",),
            )
        self.sources: dict[str, Source] = {}
        tables = self._left.pop("sources", None)
        if not isinstance(tables, dict):
            raise MatrixError("[sources] is missing", where=name)
        for key, table in tables.items():
            row = _Row(table, f"{name}: sources.{key}")
            self.sources[key] = Source(id=key, title=row.text("title"), date=row.date("date"))
            row.done()

    def rows(self, key: str, read: Callable[[_Row], _T]) -> tuple[_T, ...]:
        tables = self._left.pop(key, None)
        if not isinstance(tables, list):
            raise MatrixError(f"{key} is not a list of tables", where=self._name)
        found = []
        for number, table in enumerate(tables):
            row = _Row(table, f"{self._name}: {key}[{number}]", self.sources)
            found.append(read(row))
            row.done()
        return tuple(found)

    def done(self) -> None:
        if self._left:
            raise MatrixError(f"unknown key {min(self._left)!r}", where=self._name)


def _read_release(row: _Row) -> Release:
    return Release(
        torch=row.version("torch"),
        date=row.date("date"),
        pythons=row.pythons("pythons"),
        complete=row.some_of("complete", Platform),
        complete_source=row.source("complete_source", ""),
        named=row.versions("named") or (),
        source=row.source(),
    )


def _read_build(row: _Row) -> Build:
    return Build(
        torch=row.version("torch"),
        cuda=row.cuda("cuda"),
        platform=row.one_of("platform", Platform),
        index=row.one_of("index", Index),
        toolkit=row.version_or_none("toolkit"),
        cudnn=row.version_or_none("cudnn"),
        nccl=row.version_or_none("nccl"),
        triton=row.version_or_none("triton"),
        glibc=row.version_or_none("glibc"),
        pythons=row.pythons("pythons"),
        gpus=row.versions("gpus"),
        ptx=row.versions("ptx"),
        gpus_by=row.text("gpus_by", ""),
        gpus_source=row.source("gpus_source", ""),
        unverified=frozenset(row.texts("unverified") or ()),
        note=row.text("note", ""),
        source=row.source(),
    )


def _read_toolkit(row: _Row) -> Toolkit:
    exists = row.flag("exists", default=True)
    none = Driver(version=Version("0"), text="none")
    row.texts("updates")
    return Toolkit(
        version=row.version("version"),
        driver=row.driver("driver") if exists else none,
        exists=exists,
        source=row.source(),
    )


def _read_major(row: _Row) -> Major:
    return Major(major=row.number("major"), driver=row.driver("driver"), source=row.source())


def _read_gpu_row(row: _Row) -> Gpu:
    return Gpu(
        sm=row.version("sm"),
        family=row.text("family"),
        names=row.texts("names") or (),
        first_cuda=row.version("first_cuda"),
        last_cuda=row.version_or_none("last_cuda"),
        driver=row.driver_or_none("driver"),
        source=row.source(),
    )


def _read_exception(row: _Row) -> CodeException:
    return CodeException(
        code=row.version("code"),
        gpu=row.version("gpu"),
        runs=row.flag("runs", default=False),
        before=row.version_or_none("before"),
        source=row.source(),
    )


def _read_floor(row: _Row) -> CudnnFloor:
    return CudnnFloor(
        cudnn=row.version("cudnn"),
        majors=row.numbers("cuda_majors"),
        gpu=row.version("gpu"),
        source=row.source(),
    )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was looked up, in rising order of version."""

    sources: tuple[Source, ...]
    releases: tuple[Release, ...]
    builds: tuple[Build, ...]
    toolkits: tuple[Toolkit, ...]
    majors: tuple[Major, ...]
    gpus: tuple[Gpu, ...]
    exceptions: tuple[CodeException, ...]
    cudnn_floors: tuple[CudnnFloor, ...]

    @classmethod
    def load(cls, directory: Path | None = None) -> Facts:
        """Read the package's own facts, or those in `directory`; raise MatrixError for a bad row."""
        folder: Traversable = files("builder") / "data" if directory is None else directory
        torch, cuda, gpus, cudnn = (_File(folder, name) for name in FILES)
        facts = cls(
            sources=tuple(
                {key: one for file in (torch, cuda, gpus, cudnn) for key, one in file.sources.items()}.values()
            ),
            releases=tuple(sorted(torch.rows("releases", _read_release), key=lambda row: row.torch)),
            builds=tuple(sorted(torch.rows("builds", _read_build), key=build_order)),
            toolkits=tuple(sorted(cuda.rows("toolkits", _read_toolkit), key=lambda row: row.version)),
            majors=tuple(sorted(cuda.rows("majors", _read_major), key=lambda row: row.major)),
            gpus=tuple(sorted(gpus.rows("gpus", _read_gpu_row), key=lambda row: row.sm)),
            exceptions=gpus.rows("exceptions", _read_exception),
            cudnn_floors=cudnn.rows("floors", _read_floor),
        )
        for file in (torch, cuda, gpus, cudnn):
            file.done()
        facts._check_references()
        return facts

    def _check_references(self) -> None:
        """Raise MatrixError when a build names a release, or a CUDA, that no other row describes."""
        majors = {row.major for row in self.majors}
        for build in self.builds:
            if build.torch not in self._releases:
                raise MatrixError(f"torch {build.torch} has builds but no release row", where=FILES[0])
            if isinstance(build.cuda, Version) and build.cuda.major not in majors:
                raise MatrixError(f"CUDA {build.cuda.major} has builds but no driver floor", where=FILES[1])

    @cached_property
    def _releases(self) -> dict[Version, Release]:
        return {release.torch: release for release in self.releases}

    @cached_property
    def _builds(self) -> dict[tuple[Version, Cuda, Platform], Build]:
        return {(build.torch, build.cuda, build.platform): build for build in self.builds}

    def release(self, torch: Version) -> Release | None:
        """Return what is known of one torch release."""
        return self._releases.get(torch)

    def build(self, torch: Version, cuda: Cuda, platform: Platform = Platform.AMD64) -> Build | None:
        """Return the build of `torch` for `cuda`, if it is known to be published."""
        return self._builds.get((torch, cuda, platform))

    def builds_of(self, torch: Version, platform: Platform = Platform.AMD64) -> tuple[Build, ...]:
        """Return the builds of one release: CPU first, then by CUDA."""
        return tuple(build for build in self.builds if build.torch == torch and build.platform is platform)

    def pythons_of(self, build: Build) -> tuple[Python, ...]:
        """Return the Pythons of a build: its own where they differ from those of its release."""
        return build.pythons or self._releases[build.torch].pythons

    def stock_cudnn(self, torch: Version, cuda: Cuda, platform: Platform = Platform.AMD64) -> Version | None:
        """Return the cuDNN that the build's own metadata pins; None if unknown or if it has none."""
        build = self.build(torch, cuda, platform)
        return None if build is None else build.cudnn

    def driver_floor(self, cuda: Cuda) -> Driver | None:
        """Return the oldest driver that runs `cuda` by minor-version compatibility.

        None for CPU and for an unknown major.
        """
        if isinstance(cuda, str):
            return None
        return next((row.driver for row in self.majors if row.major == cuda.major), None)

    def toolkit(self, cuda: Version) -> Toolkit | None:
        """Return the toolkit of that major and minor, None where it is unknown or was never released."""
        return next((row for row in self.toolkits if row.exists and row.version == cuda), None)

    def covers(self, build: Build, gpu: Gpu) -> Coverage:
        """Say how `build` reaches `gpu`.

        Machine code runs on the same major with an equal or higher minor, save for listed exceptions; PTX
        runs on anything newer.
        """
        if isinstance(build.cuda, str):
            return Coverage.NONE
        if build.gpus is None:
            return Coverage.UNKNOWN if self.could_cover(build.cuda, gpu) else Coverage.NONE
        if any(self._runs(code, gpu.sm, build.cuda) for code in build.gpus):
            return Coverage.CODE
        if any(code <= gpu.sm for code in build.ptx or ()):
            return Coverage.PTX
        return Coverage.NONE

    def _runs(self, code: Version, gpu: Version, cuda: Version) -> bool:
        for row in self.exceptions:
            if row.code == code and row.gpu == gpu and (row.before is None or cuda < row.before):
                return row.runs
        return code.major == gpu.major and code.minor <= gpu.minor

    def could_cover(self, cuda: Version, gpu: Gpu) -> bool:
        """Say whether a compiler of that CUDA can make any code that `gpu` runs."""
        return any(
            row.first_cuda <= cuda
            and (row.last_cuda is None or cuda <= row.last_cuda)
            and self._runs(row.sm, gpu.sm, cuda)
            for row in self.gpus
        )

    def driver_for(self, build: Build, gpu: Gpu | None = None) -> Driver | None:
        """Return the oldest driver on which `build` runs, on `gpu` if one is named; None for CPU builds."""
        floor = self.driver_floor(build.cuda)
        if floor is None or gpu is None or isinstance(build.cuda, str):
            return floor
        floors = [floor, *([gpu.driver] if gpu.driver else [])]
        # Minor-version compatibility does not reach PTX: the driver's compiler must be as new as the toolkit.
        own = self.toolkit(build.cuda)
        if own is not None and self.covers(build, gpu) is Coverage.PTX:
            floors.append(own.driver)
        return max(floors)

    def cudnn_gpu_floor(self, cudnn: Version, cuda: Version) -> CudnnFloor | None:
        """Return the rule that says which GPUs a cuDNN no longer serves."""
        rules = [row for row in self.cudnn_floors if cudnn >= row.cudnn and cuda.major in row.majors]
        return max(rules, key=lambda row: row.gpu, default=None)


def build_order(build: Build) -> tuple[Version, Version, str]:
    """Return the key that sorts builds by torch, then CUDA (CPU first), then platform."""
    return build.torch, Version("0") if isinstance(build.cuda, str) else build.cuda, build.platform
