"""Cell → lock: exactly which wheels make the image, by name, hash and size; resolved by uv, never by us."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import tomli_w
from packaging.pylock import Package, PackageWheel, Pylock, PylockValidationError
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder import toolkit
from builder.errors import LockError, ResolveError, SourceError, ToolError
from builder.index import Index, Wanted, local_path
from builder.matrix import Cell

SCHEMA = 1
DEFAULT_INDEX = "default"
WHEELS = "wheels"
"""Directory, relative to the lock, where the locked wheels are when somebody puts them beside it."""

UV_PLATFORMS = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# uv reports a refusal (401, 403) as "not found" with a hint; but an index that refuses is not one that has nothing.
_UNREACHED = re.compile(
    r"Failed to fetch|Failed to read|error sending request|Connection refused|dns error|timed out|status code \(5|"
    r"returned a 40\d|valid authentication credentials|Received some unexpected|network connectivity is disabled"
)
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides what a cell's lock is; its digest tells a lock that is stale."""

    cell_id: str
    requirements: tuple[str, ...]
    overrides: tuple[str, ...]
    sources: tuple[tuple[str, str, str], ...]
    """Packages with an explicit index: (package, index name, index URL)."""
    companions: tuple[str, ...] = ()
    """Those of the requirements that are released for one torch each."""
    python: str
    platform: str
    exclude_newer: datetime

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the request, in a fixed spelling."""
        # Companions are among the requirements.
        content = {
            "cell": self.cell_id,
            "requirements": list(self.requirements),
            "overrides": list(self.overrides),
            # The index counts by its name: a mirror of the same index serves the same hashes.
            "sources": [[package, index] for package, index, _ in self.sources],
            "python": self.python,
            "platform": self.platform,
            "exclude-newer": _stamp(self.exclude_newer),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One locked wheel."""

    name: NormalizedName
    version: Version
    filename: str
    sha256: str
    size: int
    """Size in bytes."""
    upload_time: datetime | None
    """When the index received it; unknown for a wheel from a local directory."""
    index: str
    """Name of the explicit index it comes from, or DEFAULT_INDEX."""

    def wanted(self, cell: Cell) -> Wanted:
        """Return what to look for, and where if this wheel has an index of its own."""
        urls = {index.name: index.url for index in cell.indexes}
        return Wanted(
            project=self.name,
            filename=self.filename,
            sha256=self.sha256,
            size=self.size,
            index_url=urls.get(self.index),
        )


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The wheels of one cell, sorted by name, and the request they answer."""

    request: str
    """Digest of the request."""
    cell_id: str
    python: str
    exclude_newer: datetime
    resolver: str
    wheels: tuple[Wheel, ...]

    @property
    def epoch(self) -> int:
        """Seconds since 1970 that stand for every time in the image: the newest upload, never the clock."""
        times = [wheel.upload_time for wheel in self.wheels if wheel.upload_time]
        return int((max(times) if times else self.exclude_newer).timestamp())

    @property
    def size(self) -> int:
        """Bytes of all wheels together."""
        return sum(wheel.size for wheel in self.wheels)

    def version(self, *names: str) -> Version | None:
        """Return the version of the first of the packages that is locked, None if none is."""
        locked = {wheel.name: wheel.version for wheel in self.wheels}
        return next((locked[key] for name in names if (key := canonicalize_name(name)) in locked), None)

    @property
    def cudnn(self) -> Version | None:
        """CuDNN's version; its package carries the CUDA major in its name."""
        return self._suffixed("nvidia-cudnn")

    @property
    def nccl(self) -> Version | None:
        """NCCL's version; its package carries the CUDA major in its name."""
        return self._suffixed("nvidia-nccl")

    def _suffixed(self, prefix: str) -> Version | None:
        return next((w.version for w in self.wheels if re.fullmatch(rf"{prefix}(-cu\d+)?", w.name)), None)

    @property
    def cuda(self) -> Version | None:
        """Version of the CUDA runtime library's package, None in a CPU set."""
        return next((w.version for w in self.wheels if re.fullmatch(r"nvidia-cuda-runtime(-cu\d+)?", w.name)), None)


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole_second(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


# --------------------------------------------------------------------------- request


def cudnn_package(cuda: str) -> str:
    """Return the name of cuDNN's package for a CUDA version."""
    return f"nvidia-cudnn-cu{cuda.partition('.')[0]}"


def companion(name: str, torch: Version) -> str:
    """Return what to ask for so that a companion is the one of this torch."""
    if name == "torchaudio":
        # It has torch's own number, and releases of it (2.11.0) do not say which torch they are for.
        return f"{name}=={torch.major}.{torch.minor}.*"
    return name


def request_of(cell: Cell) -> Request:
    """Say what has to be resolved for the cell."""
    sources = {
        canonicalize_name(package): (index.name, index.url) for index in cell.indexes for package in index.packages
    }
    if "torch" in sources:
        # Another index has builds for another CUDA.
        sources |= {canonicalize_name(name): sources[canonicalize_name("torch")] for name in cell.companions}
    # A build from an index of its own is pinned with its local version, which the default index cannot carry: the
    # two can then not be confused, whatever an index serves under the plain version.
    torch = f"torch=={cell.torch_local if 'torch' in sources else cell.torch}"
    overrides: tuple[str, ...] = ()
    if cell.cudnn is not None and not cell.cudnn_is_stock:
        # An override, not a constraint: torch pins its cuDNN exactly, so a constraint could never be satisfied.
        overrides = (f"{cudnn_package(cell.cuda)}=={cell.cudnn}",)
    packages = {"pip", *cell.variant.packages, *(companion(name, cell.torch) for name in cell.companions)}
    if toolkit.wanted(toolkit=cell.variant.toolkit, cuda=cell.cuda):
        packages |= set(toolkit.requirements(cuda=cell.cuda, base=cell.base))
    return Request(
        cell_id=cell.id,
        requirements=(torch, *sorted(packages)),
        overrides=overrides,
        sources=tuple(sorted((package, name, url) for package, (name, url) in sources.items())),
        companions=cell.companions,
        python=cell.python,
        platform=cell.platform,
        exclude_newer=cell.exclude_newer,
    )


# --------------------------------------------------------------------------- resolve


def uv_program() -> str:
    """Return the path of uv's binary, which its wheel ships; raises ToolError if it is not there."""
    try:
        from uv import find_uv_bin  # noqa: PLC0415 (its absence is an error of ours, not an import error)

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
        if found is None:
            raise ToolError(
                "uv is not installed", why="it resolves the locks", tries=("make setup", "pip install uv")
            ) from None
        return found


def _uv_environment() -> dict[str, str]:
    """Return the environment for uv: the user's, less what would change the answer or fetch an interpreter."""
    network = r"CACHE_DIR|OFFLINE|NATIVE_TLS|HTTP_TIMEOUT|HTTP_RETRIES|CONCURRENT_\w+|KEYRING_PROVIDER"
    kept = {
        name: value
        for name, value in os.environ.items()
        # Where packages come from is decided by the matrix and by pip's configuration, in one place.
        if not re.fullmatch(rf"UV_(?!{network}).*", name) and name != "VIRTUAL_ENV"
    }
    return kept | {"UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}


def _project_file(request: Request, *, local: frozenset[str]) -> str:
    """Write the request as a project file for uv: it alone can bind a package to an index of its own."""
    sources = [source for source in request.sources if source[0] not in local]
    indexes = {name: url for _, name, url in sources}
    content = {
        "project": {
            "name": "cell",
            "version": "0",
            "requires-python": f"=={request.python}.*",
            "dependencies": list(request.requirements),
        },
        "tool": {
            "uv": {
                "index": [{"name": name, "url": url, "explicit": True} for name, url in sorted(indexes.items())],
                "sources": {package: {"index": name} for package, name, _ in sources},
            }
        },
    }
    return tomli_w.dumps(content)


def _exact_builds(request: Request) -> dict[NormalizedName, Version]:
    """Return the packages that only an explicit index carries and of which one build was asked for."""
    builds = {}
    for requirement in request.requirements:
        name, separator, version = requirement.partition("==")
        if separator and "+" in version and any(name == package for package, _, _ in request.sources):
            builds[canonicalize_name(name)] = Version(version)
    return builds


def _local_wheels(
    builds: Mapping[NormalizedName, Version], companions: Iterable[str], index: Index
) -> dict[str, list[Path]]:
    """Return the wheels of exact builds in the user's find-links, and of companions in builds of the same label."""
    found: dict[str, list[Path]] = {}
    if not builds:
        return found
    labels = {build.local for build in builds.values()}
    for path in index.local_files():
        try:
            package, built, _, _ = parse_wheel_filename(path.name)
        except (InvalidWheelFilename, InvalidVersion):
            continue
        if builds.get(package) == built or (package in companions and built.local in labels):
            found.setdefault(package, []).append(path)
    return found


def resolve(request: Request, index: Index) -> Lock:
    """Resolve the request with uv, without an interpreter of that version and without downloading a wheel.

    Raises ResolveError with uv's own explanation, SourceError if an index cannot be reached.
    """
    configuration = index.configuration
    builds = _exact_builds(request)
    local = _local_wheels(builds, request.companions, index)
    with tempfile.TemporaryDirectory(prefix="torchyard-lock-") as name:
        directory = Path(name)
        (directory / "pyproject.toml").write_text(_project_file(request, local=frozenset(local)), "utf-8")
        (directory / "overrides.txt").write_text("".join(f"{line}\n" for line in request.overrides), "utf-8")
        environment = _uv_environment()
        options = []
        explicit = {package for package, _, _ in request.sources}
        for package in (*builds, *sorted(explicit & set(request.companions))):
            # The date decides between versions; of a build there is one, and a companion's torch decides on its own.
            # Not every index says when it got its files.
            options += ["--exclude-newer-package", f"{package}=false"]
        if configuration.no_index:
            options.append("--no-index")
            for location in configuration.find_links:
                path = local_path(location)
                options += ["--find-links", location if path is None else str(path.absolute())]
        else:
            environment["UV_DEFAULT_INDEX"] = configuration.default_index  # not an argument: it can hold a password
        if local and not configuration.no_index:
            # Only the exact wheels of packages the default index does not have: find-links outrank nothing else.
            (directory / "local").mkdir()
            for paths in local.values():
                for path in paths:
                    (directory / "local" / path.name).symlink_to(path.absolute())
            options += ["--find-links", str(directory / "local")]
        for host in configuration.trusted_hosts:
            options += ["--allow-insecure-host", host]
        if configuration.certificates:
            environment["SSL_CERT_FILE"] = configuration.certificates
        if configuration.proxy:
            environment |= {"HTTP_PROXY": configuration.proxy, "HTTPS_PROXY": configuration.proxy}
        command = [
            uv_program(), "pip", "compile", "pyproject.toml",
            "--format", "pylock.toml", "--output-file", "pylock.toml", "--overrides", "overrides.txt",
            "--python-platform", UV_PLATFORMS[request.platform], "--python-version", request.python,
            "--only-binary", ":all:", "--index-strategy", "first-index",
            "--exclude-newer", _stamp(request.exclude_newer), "--no-progress", "--quiet", *options,
        ]  # fmt: skip
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, env=environment)
        if result.returncode != 0:
            raise _refusal(request, result.stderr, name)
        raw = tomllib.loads((directory / "pylock.toml").read_text("utf-8"))
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout.split()
        return _lock_of(request, raw, index, resolver=f"uv {version[1]}")


def _refusal(request: Request, message: str, directory: str) -> ResolveError | SourceError:
    text = " ".join(message.replace(directory, "").split())
    text = re.sub(r"^(error:|\N{MULTIPLICATION SIGN})\s*", "", text).replace("╰─▶", "").strip()
    if _UNREACHED.search(text):
        return SourceError(
            f"{request.cell_id}: an index could not be reached",
            why=text,
            tries=(
                "run again",
                "if the index is not reachable from here, put its wheels into a directory that pip's find-links name",
            ),
        )
    tries = ["torchyard resolve says which combinations exist", "look at `exclude_newer` in the matrix"]
    alone = [name for name in request.companions if name in text]
    if alone:
        tries.insert(0, f"leave {' and '.join(alone)} out of `companions`: not every torch has a release of each")
    if "filtered by `exclude-newer`" in text and "was published at" not in text:
        tries.append("use an index that says when it received its files (PEP 700): for uv, any other has only new ones")
    return ResolveError(
        f"{request.cell_id}: there is no set of wheels for {', '.join(request.requirements)}",
        why=text,
        tries=tuple(tries),
    )


def _lock_of(request: Request, raw: Mapping[str, object], index: Index, *, resolver: str) -> Lock:
    named = {package: name for package, name, _ in request.sources}
    try:
        pylock = Pylock.from_dict(raw)
    except PylockValidationError as error:
        raise ToolError("uv wrote a lock that is not valid", why=str(error)) from error
    with ThreadPoolExecutor(8) as pool:
        sized = pool.map(
            lambda package: _wheel_of(package, index, named.get(package.name, DEFAULT_INDEX)), pylock.packages
        )
        wheels = tuple(sorted(sized, key=lambda wheel: wheel.name))
    return Lock(
        request=request.digest,
        cell_id=request.cell_id,
        python=request.python,
        exclude_newer=request.exclude_newer,
        resolver=resolver,
        wheels=wheels,
    )


def _wheel_of(package: Package, index: Index, index_name: str) -> Wheel:
    if not package.wheels or package.version is None:
        raise ToolError(f"uv locked no wheel of {package.name}", why="a lock has one wheel of each package")
    # uv leaves the choice open between files that fit equally well, such as one wheel uploaded again under a longer
    # name (nvidia-cuda-cupti-cu12 12.6.80): the latest upload is meant to replace the others.
    wheel = max(package.wheels, key=lambda it: (it.upload_time or _NEVER, it.url or ""))
    location = wheel.url or wheel.path or ""
    filename = wheel.name or unquote(Path(urlsplit(location).path).name)
    sha256 = wheel.hashes.get("sha256")
    if sha256 is None:
        raise SourceError(f"the index gives no SHA-256 for {filename}", why="a wheel is locked by its hash")
    size = wheel.size if wheel.size is not None else index.size(location)
    return Wheel(
        name=package.name,
        version=package.version,
        filename=filename,
        sha256=sha256,
        size=size,
        upload_time=_whole_second(wheel.upload_time) if wheel.upload_time and local_path(location) is None else None,
        index=index_name,
    )


def contradictions(cell: Cell, lock: Lock) -> list[str]:
    """Say in which ways the lock is not what the cell declares; resolving can "succeed" with a CPU set.

    (On aarch64, torch 2.9.1's CUDA dependencies are conditioned away, so the resolver is content without any.)
    """
    found = []
    torch = lock.version("torch")
    if torch is None or torch.release != cell.torch.release:
        found.append(f"torch {cell.torch} was asked for, {torch or 'none'} is locked")
    elif torch.local is not None and torch != Version(cell.torch_local):
        found.append(f"torch {cell.torch_local} was asked for, {torch} is locked")
    found += _other_companions(cell, lock)
    if cell.cuda == "cpu":
        gpu = sorted(wheel.name for wheel in lock.wheels if wheel.name.startswith("nvidia-"))
        if gpu:
            found.append(f"a CPU cell has {len(gpu)} NVIDIA packages ({gpu[0]}, ...)")
        return found
    if lock.cuda is None:
        found.append(f"CUDA {cell.cuda} was asked for, but the set has no CUDA runtime: it is a CPU set")
    elif lock.cuda.release[:2] != Version(cell.cuda).release[:2]:
        found.append(f"CUDA {cell.cuda} was asked for, the CUDA runtime in the set is {lock.cuda}")
    found += _other_toolkit(cell, lock)
    if lock.cudnn != cell.cudnn:
        found.append(f"cuDNN {cell.cudnn} was asked for, {lock.cudnn or 'none'} is locked")
    if lock.nccl is None:
        found.append("the set has no NCCL")
    elif cell.nccl is not None and lock.nccl != cell.nccl:
        found.append(f"NCCL {cell.nccl} is torch's own, {lock.nccl} is locked")
    return found


def _other_companions(cell: Cell, lock: Lock) -> Iterator[str]:
    torch = lock.version("torch")
    for name in cell.companions:
        version = lock.version(name)
        if version is None:
            yield f"{name} was asked for, none is locked"
        elif torch is not None and version.local != torch.local:
            yield f"{name} {version} is locked, which is another build than torch {torch}"


def _other_toolkit(cell: Cell, lock: Lock) -> Iterator[str]:
    if not cell.variant.toolkit or not toolkit.requirements(cuda=cell.cuda, base=cell.base):
        return
    nvcc = lock.version("nvidia-cuda-nvcc")
    if nvcc is None or nvcc.release[:2] != Version(cell.cuda).release[:2]:
        yield f"nvcc of CUDA {cell.cuda} was asked for, {nvcc or 'none'} is locked"


def lock_cell(cell: Cell, index: Index) -> Lock:
    """Resolve the cell and check that the answer is what it declares; raises ResolveError if it is not."""
    lock = resolve(request_of(cell), index)
    found = contradictions(cell, lock)
    if found:
        raise ResolveError(
            f"{cell.id}: the resolver's answer is another environment",
            why="; ".join(found),
            tries=(
                "torchyard resolve says which combinations exist",
                "a build that only PyTorch's own index carries needs an entry in `indexes`",
            ),
        )
    return lock


# --------------------------------------------------------------------------- the file


def _pylock(lock: Lock) -> dict[str, object]:
    """Return the lock as PEP 751 has it, and in `tool.torchyard` what PEP 751 has no place for."""
    packages = []
    for wheel in lock.wheels:
        entry = PackageWheel(
            name=wheel.filename,
            upload_time=wheel.upload_time,
            path=f"{WHEELS}/{wheel.filename}",
            size=wheel.size,
            hashes={"sha256": wheel.sha256},
        )
        packages.append(
            Package(
                name=wheel.name,
                version=wheel.version,
                wheels=[entry],
                tool=None if wheel.index == DEFAULT_INDEX else {"torchyard": {"index": wheel.index}},
            )
        )
    content: dict[str, object] = dict(
        Pylock(
            lock_version=Version("1.0"),
            requires_python=SpecifierSet(f"=={lock.python}.*"),
            created_by="torchyard",
            packages=packages,
            tool={
                "torchyard": {
                    "schema": SCHEMA,
                    "cell": lock.cell_id,
                    "request": lock.request,
                    "exclude-newer": lock.exclude_newer,
                    "resolver": lock.resolver,
                    "python": lock.python,
                }
            },
        ).to_dict()
    )
    return content


def _self_digest(content: Mapping[str, object]) -> str:
    """Hash all of the content but the digest itself, so that any edit shows."""
    plain = json.loads(
        json.dumps(content, default=lambda value: _stamp(value) if isinstance(value, datetime) else str(value))
    )
    plain["tool"]["torchyard"].pop("digest", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dumps(lock: Lock) -> str:
    """Return the text of pylock.toml."""
    content = _pylock(lock)
    content["tool"]["torchyard"]["digest"] = _self_digest(content)  # type: ignore[index]
    header = (
        f"# Locked by torchyard for {lock.cell_id}: `torchyard lock` writes this file, nobody edits it.\n"
        "# PEP 751; wheels by name and hash, found in whatever index your environment configures.\n"
    )
    return header + tomli_w.dumps(content)


def digest_of(text: str) -> str:
    """Return the digest by which others refer to a lock: the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def loads(text: str, *, where: str) -> Lock:
    """Read a lock; raises LockError naming file and field if it is not whole, edited or of another schema."""

    def refuse(what: str, field: str = "", why: str = "") -> LockError:
        return LockError(
            what,
            where=f"{where}: {field}" if field else where,
            why=why,
            tries=("`git checkout` the file, or write it anew: torchyard lock",),
        )

    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise refuse("the lock is not whole", why=str(error)) from None
    tool = content.get("tool", {})
    ours = tool.get("torchyard") if isinstance(tool, dict) else None
    if not isinstance(ours, dict):
        raise refuse("not a lock of torchyard", "tool.torchyard", "the section is missing")
    if ours.get("schema") != SCHEMA:
        raise refuse(
            f"unknown schema version {ours.get('schema')!r}", "tool.torchyard.schema", f"this version knows {SCHEMA}"
        )
    try:
        pylock = Pylock.from_dict(content)
    except PylockValidationError as error:
        raise refuse("the lock is not valid", why=str(error)) from None
    if ours.get("digest") != _self_digest(content):
        raise refuse(
            "the lock was edited or damaged",
            "tool.torchyard.digest",
            f"its content hashes to {_self_digest(content)}, it says {ours.get('digest')}",
        )
    wheels: list[Wheel] = []
    for number, package in enumerate(pylock.packages):
        field = f"packages[{number}] ({package.name})"
        if any(package.name == wheel.name for wheel in wheels):
            raise refuse("a package is locked twice", field)
        wheels.append(_locked_wheel(package, field, refuse))
    moment = ours.get("exclude-newer")
    if not isinstance(moment, datetime) or not all(
        isinstance(ours.get(k), str) for k in ("cell", "request", "python", "resolver")
    ):
        raise refuse("the lock lacks a field", "tool.torchyard", "cell, request, python, resolver, exclude-newer")
    lock = Lock(
        request=str(ours["request"]),
        cell_id=str(ours["cell"]),
        python=str(ours["python"]),
        exclude_newer=_whole_second(moment),
        resolver=str(ours["resolver"]),
        wheels=tuple(wheels),
    )
    if _self_digest(_pylock(lock)) != ours["digest"]:
        # Such as a source distribution or the URL of an index, which other readers of PEP 751 would follow.
        raise refuse("the lock says more than torchyard writes", why="a field or a value in it is foreign")
    return lock


def _locked_wheel(package: Package, field: str, refuse: Callable[[str, str, str], LockError]) -> Wheel:
    if package.version is None or not package.wheels or len(package.wheels) != 1:
        raise refuse("a locked package has a version and exactly one wheel", field, "")
    (entry,) = package.wheels
    sha256 = entry.hashes.get("sha256", "")
    if entry.size is None or entry.url is not None or not _SHA256.fullmatch(sha256):
        raise refuse("a locked wheel has a size and a SHA-256, and no URL", f"{field}.wheels[0]", "")
    filename = entry.name or ""
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion) as error:
        raise refuse("not a wheel's name", f"{field}.wheels[0].name", str(error)) from None
    if (name, version) != (package.name, package.version):
        raise refuse("the wheel is of another package or version", f"{field}.wheels[0].name", filename)
    upload_time = entry.upload_time
    index = (package.tool or {}).get("torchyard", {}).get("index", DEFAULT_INDEX)
    return Wheel(
        name=package.name,
        version=package.version,
        filename=filename,
        sha256=sha256,
        size=entry.size,
        upload_time=_whole_second(upload_time) if upload_time else None,
        index=index,
    )


def load(path: Path, cell: Cell) -> Lock:
    """Read the cell's lock; raises LockError if it is missing, damaged, stale or for another environment."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise LockError(f"{cell.id} is not locked", where=str(path), tries=(f"torchyard lock '{cell.id}'",)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LockError("the lock cannot be read", where=str(path), why=str(error)) from None
    lock = loads(text, where=str(path))
    stale = staleness(cell, lock)
    if stale:
        raise LockError(
            f"the lock of {cell.id} is stale", where=str(path), why=stale, tries=(f"torchyard lock '{cell.id}'",)
        )
    found = contradictions(cell, lock)
    if found:
        raise LockError(f"the lock of {cell.id} is another environment", where=str(path), why="; ".join(found))
    return lock


def staleness(cell: Cell, lock: Lock) -> str:
    """Say why the lock no longer answers the cell; empty if it does."""
    if lock.cell_id != cell.id:
        return f"it is the lock of {lock.cell_id}"
    if lock.request != request_of(cell).digest:
        return "the matrix asks for something else since it was made (packages, overrides, indexes or dates)"
    return ""


def requirements_txt(lock: Lock) -> str:
    """Return the lock as hashed requirements for pip, one wheel each, without URL or host."""
    lines: Sequence[str] = [f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in lock.wheels]
    return "\n".join(["# Generated by torchyard from pylock.toml: do not edit, run `make render`.", *lines, ""])
