"""`torchyard update`: add to the facts what the indexes publish; change nothing known, believe no failure."""

from __future__ import annotations

import datetime as dt
import html
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder.errors import MatrixError, Problem, SourceError, ToolError, TorchyardError
from builder.facts import CPU, SCHEMA, Cuda, Facts, Index, Platform, Python, cuda_tag, listed
from builder.store import write_atomically

PYTORCH_INDEX: Final = "https://download.pytorch.org/whl"

_FIRST: Final = Version("2.0.0")
_MACHINES: Final = {Platform.AMD64: "x86_64", Platform.ARM64: "aarch64"}
_RELEASE_KEYS: Final = ("torch", "date", "pythons", "complete", "complete_source", "named", "source")
_BUILD_KEYS: Final = (
    "torch",
    "cuda",
    "platform",
    "index",
    "toolkit",
    "cudnn",
    "nccl",
    "triton",
    "glibc",
    "pythons",
    "gpus",
    "ptx",
    "gpus_by",
    "gpus_source",
    "unverified",
    "note",
    "source",
)
_FROM_DEFAULT: Final = "wheels and their metadata on the default package index, resolved by uv"
_FROM_PYTORCH: Final = "wheel names on PyTorch's own index"

Value = str | int | dt.date | list[str]
Row = Mapping[str, Value]


# --- what is injected ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Page:
    """An answer of a web server."""

    status: int
    text: str


class FetchPage(Protocol):
    """Fetches one page; raises SourceError or OSError when no answer comes."""

    def __call__(self, url: str) -> Page:
        """Fetch `url`."""
        ...


class ListWheels(Protocol):
    """Lists the file names of one project on the default index; raises SourceError when it cannot be read."""

    def __call__(self, project: str) -> Sequence[str]:
        """List the files of `project`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What one requirement resolves to on one platform."""

    versions: Mapping[str, Version]
    wheel: str
    """File name of the wheel chosen for the requirement itself."""
    uploaded: dt.date | None


class Resolve(Protocol):
    """Resolves one pinned requirement without installing; raises TorchyardError when it cannot."""

    def __call__(self, requirement: str, *, python: str, platform: Platform, index: str | None) -> Resolution:
        """Resolve `requirement`, on `index` besides the default one if it is given."""
        ...


# --- what comes back ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Added:
    """A row that the facts lacked; `cuda` is None for the row of a release."""

    torch: Version
    cuda: Cuda | None = None
    platform: Platform | None = None

    def __str__(self) -> str:
        return (
            f"torch {self.torch}" if self.cuda is None else f"torch {self.torch}+{cuda_tag(self.cuda)} {self.platform}"
        )


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """An observation that differs from a known fact; the fact stays until a person decides."""

    row: str
    key: str
    known: str
    observed: str

    def __str__(self) -> str:
        return f"{self.row}: {self.key} is {self.known} in the facts, {self.observed} was observed"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an update did and what it could not do."""

    added: tuple[Added, ...]
    conflicts: tuple[Conflict, ...]
    failures: tuple[Problem, ...]


# --- the file ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Document:
    """torch.toml as tables, with the comments at its top."""

    comments: str
    releases: tuple[Row, ...]
    builds: tuple[Row, ...]
    sources: Mapping[str, Mapping[str, Value]]


def parse_document(text: str) -> Document:
    """Read torch.toml; raise MatrixError when it is not TOML."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MatrixError("is not TOML", where="torch.toml", why=str(error)) from error
    comments = []
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        comments.append(line)
    return Document(
        comments="".join(comments),
        releases=tuple(tables["releases"]),
        builds=tuple(tables["builds"]),
        sources=tables["sources"],
    )


def render_document(document: Document) -> str:
    """Return the canonical text: one row a line, sorted: an addition is one line of a diff."""
    releases = sorted(document.releases, key=lambda row: Version(str(row["torch"])))
    builds = sorted(document.builds, key=_build_place)
    lines = [
        f"schema = {SCHEMA}",
        "",
        "releases = [",
        *(f"  {_inline(row, _RELEASE_KEYS)}," for row in releases),
        "]",
        "",
        "builds = [",
        *(f"  {_inline(row, _BUILD_KEYS)}," for row in builds),
        "]",
    ]
    for name, source in sorted(document.sources.items()):
        lines += ["", f"[sources.{name}]", *(f"{key} = {_value(source[key])}" for key in ("title", "date"))]
    return document.comments + "\n".join(lines) + "\n"


def _build_place(row: Row) -> tuple[Version, Version, str]:
    cuda = str(row["cuda"])
    return Version(str(row["torch"])), Version("0" if cuda == CPU else cuda), str(row["platform"])


def _inline(row: Row, keys: Sequence[str]) -> str:
    assert set(row) <= set(keys), f"a row has keys that are not written: {sorted(set(row) - set(keys))}"
    return "{ " + ", ".join(f"{key} = {_value(row[key])}" for key in keys if key in row) + " }"


def _value(value: Value) -> str:
    # tomli-w has no inline tables: a row would take up to thirty lines of the file, and of every diff.
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        assert not re.search(r'["\\\x00-\x1f\x7f]', value), f"not plain text: {value!r}"
        return f'"{value}"'
    return str(value)


# --- reading what was observed ------------------------------------------------------------


@dataclass
class _Seen:
    """The wheels of one build, seen by their names."""

    pythons: set[Python] = field(default_factory=set)
    glibc: Version | None = None


def read_wheel_names(names: Iterable[str]) -> dict[tuple[Version, Cuda | None, Platform], _Seen]:
    """Group torch wheels by version, CUDA (None without a local version) and platform; skip all others."""
    seen: dict[tuple[Version, Cuda | None, Platform], _Seen] = {}
    for name in names:
        try:
            project, version, _, tags = parse_wheel_filename(name)
        except (InvalidWheelFilename, InvalidVersion):
            continue
        public = Version(version.public)
        if project != "torch" or version.is_prerelease or version.is_postrelease or public < _FIRST:
            continue
        cuda = _cuda_of_local(version.local)
        if version.local and cuda is None:
            continue
        for tag in tags:
            platform, glibc = _platform_of(tag)
            python = _python_of(tag)
            if platform is None or python is None:
                continue
            one = seen.setdefault((public, cuda, platform), _Seen())
            one.pythons.add(python)
            one.glibc = glibc if one.glibc is None or glibc is None else min(one.glibc, glibc)
    return seen


def _cuda_of_local(local: str | None) -> Cuda | None:
    if local == CPU:
        return CPU
    match = re.fullmatch(r"cu([0-9]{2})([0-9])", local or "", re.ASCII)
    return Version(f"{match[1]}.{match[2]}") if match else None


def _platform_of(tag: Tag) -> tuple[Platform | None, Version | None]:
    for platform, machine in _MACHINES.items():
        if match := re.fullmatch(
            rf"(?:manylinux_([0-9]+)_([0-9]+)|manylinux[0-9]+|linux)_{machine}", tag.platform, re.ASCII
        ):
            return platform, Version(f"{match[1]}.{match[2]}") if match[1] else None
    return None, None


def _python_of(tag: Tag) -> Python | None:
    match = re.fullmatch(r"cp([0-9])([0-9]+)(t?)", tag.abi.removesuffix("m"), re.ASCII)
    return Python(version=Version(f"{match[1]}.{match[2]}"), free_threaded=bool(match[3])) if match else None


_LINK: Final = re.compile(r"<a\b[^>]*\bhref\s*=\s*[\"']([^\"'#]+)", re.IGNORECASE)


def read_links(page: str) -> tuple[str, ...]:
    """Return the file names that an index page links to."""
    return tuple(unquote(html.unescape(link)).rpartition("/")[2] for link in _LINK.findall(page))


def pins_of(versions: Mapping[str, Version]) -> dict[str, Value]:
    """Return the keys of a build that a resolution tells.

    Names differ by release: `-cu11`, `-cu12` or `-cu13` behind them, and from 2.11 on a `cuda-toolkit` above
    most of them.
    """
    found: dict[str, Value] = {}
    for name, version in sorted(versions.items()):
        plain = re.sub(r"-cu[0-9]+$", "", name)
        key = {
            "nvidia-cudnn": "cudnn",
            "nvidia-nccl": "nccl",
            "triton": "triton",
            "pytorch-triton": "triton",
            "cuda-toolkit": "toolkit",
        }.get(plain)
        if key:
            # A toolkit 13.0.3 may be published as 13.0.3.0; its version has three numbers.
            numbers = version.release[:3] if key == "toolkit" else version.release
            found[key] = ".".join(str(number) for number in numbers)
    return found


def cuda_of(versions: Mapping[str, Version]) -> Cuda:
    """Return the CUDA of a resolved default build: that of its runtime, CPU when it brings none."""
    for name in (
        "nvidia-cuda-runtime",
        "nvidia-cuda-runtime-cu11",
        "nvidia-cuda-runtime-cu12",
        "nvidia-cuda-runtime-cu13",
    ):
        if name in versions:
            return Version(f"{versions[name].major}.{versions[name].minor}")
    return CPU


# --- the update ------------------------------------------------------------


def update(
    directory: Path,
    *,
    list_wheels: ListWheels,
    fetch_page: FetchPage,
    resolve: Resolve,
    today: dt.date,
    recheck: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> Changes:
    """Add to `directory`/torch.toml each published release and build that it lacks, with its source.

    With `recheck`, known builds of the default index are resolved again, and what differs is reported. Raises
    SourceError, with nothing written, when the default index shows less than is known already.
    """
    path = directory / "torch.toml"
    facts = Facts.load(directory)
    document = parse_document(path.read_text(encoding="utf-8"))
    work = _Work(facts=facts, resolve=resolve, today=today, say=say)
    work.default_index(list_wheels("torch"), recheck=recheck)
    for cuda in _variants(facts, work.cudas):
        work.pytorch_index(cuda, fetch_page)
    if work.releases or work.builds:
        rendered = render_document(
            Document(
                comments=document.comments,
                releases=(*document.releases, *work.releases),
                builds=(*document.builds, *work.builds),
                sources={**document.sources, **work.sources},
            )
        )
        write_atomically(path, rendered.encode())
    return Changes(added=tuple(work.added), conflicts=tuple(work.conflicts), failures=tuple(work.failures))


def _variants(facts: Facts, seen: set[Cuda]) -> list[Cuda]:
    """Return the CUDAs whose pages are worth asking for: those ever used, and toolkits newer than those."""
    used = {build.cuda for build in facts.builds} | seen
    newest = max(cuda for cuda in used if isinstance(cuda, Version))
    newer = {row.version for row in facts.toolkits if row.exists and row.version > newest}
    return sorted(used | newer, key=lambda cuda: Version("0") if isinstance(cuda, str) else cuda)


@dataclass
class _Work:
    """One update under way."""

    facts: Facts
    resolve: Resolve
    today: dt.date
    say: Callable[[str], None]
    releases: list[Row] = field(default_factory=list)
    builds: list[Row] = field(default_factory=list)
    sources: dict[str, Mapping[str, Value]] = field(default_factory=dict)
    added: list[Added] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    failures: list[Problem] = field(default_factory=list)
    cudas: set[Cuda] = field(default_factory=set)
    known: set[Version] = field(default_factory=set)
    unresolved: set[tuple[Version, Platform]] = field(default_factory=set)

    def default_index(self, names: Sequence[str], *, recheck: bool) -> None:
        """Compare what the default index lists with what is known, and add what is new."""
        seen = {
            (torch, platform): one for (torch, cuda, platform), one in read_wheel_names(names).items() if cuda is None
        }
        listed_torches = {torch for torch, _ in seen}
        self.known = {release.torch for release in self.facts.releases}
        if missing := self.known - listed_torches:
            raise SourceError(
                f"the default index lists {len(listed_torches)} torch releases, {len(self.known)} are known",
                why=f"it lacks {listed(sorted(missing)[:5])}: nothing is learnt from a partial mirror",
                tries=("configure an index that carries every torch release", "run the same command again"),
            )
        for torch in sorted(listed_torches):
            for platform in Platform:
                one = seen.get((torch, platform))
                if one is not None:
                    self._default_build(torch, platform, one, recheck=recheck)

    def _default_build(self, torch: Version, platform: Platform, seen: _Seen, *, recheck: bool) -> None:
        known = next((build for build in self.facts.builds_of(torch, platform) if build.index is Index.DEFAULT), None)
        if known is not None:
            self._compare(
                f"torch {torch} {platform}",
                "pythons",
                sorted(self.facts.pythons_of(known)),
                sorted(seen.pythons),
            )
            if not recheck:
                return
        self.say(f"resolving torch {torch} for {platform}")
        try:
            found = self.resolve(f"torch=={torch}", python=str(_usual(seen.pythons)), platform=platform, index=None)
        except (TorchyardError, OSError) as error:
            self._failed(f"torch {torch} on {platform} could not be resolved", error)
            self.unresolved.add((torch, platform))
            return
        cuda = cuda_of(found.versions)
        self.cudas.add(cuda)
        pins = {key: value for key, value in pins_of(found.versions).items() if cuda != CPU}
        if known is not None:
            row = f"torch {torch}+{known.cuda_tag} {platform}"
            self._compare(row, "cuda", known.cuda, cuda)
            for key, value in pins.items():
                if getattr(known, key) is not None:
                    self._compare(row, key, str(getattr(known, key)), value)
            return
        source = self._source("default-index", _FROM_DEFAULT)
        if torch not in self.known:
            if found.uploaded is None:
                self.failures.append(Problem(what=f"torch {torch} was not added", why="the index tells no upload date"))
                return
            self.known.add(torch)
            self.added.append(Added(torch=torch))
            self.releases.append(
                {
                    "torch": str(torch),
                    "date": found.uploaded,
                    "pythons": _texts(seen.pythons),
                    "complete": [],
                    "source": source,
                }
            )
        self._add(Added(torch=torch, cuda=cuda, platform=platform), Index.DEFAULT, seen, pins, source)

    def pytorch_index(self, cuda: Cuda, fetch_page: FetchPage) -> None:
        """Add the builds on one page of PyTorch's index; a page that cannot be trusted tells nothing."""
        url = f"{PYTORCH_INDEX}/{cuda_tag(cuda)}"
        self.say(f"reading {url}/torch/")
        try:
            page = fetch_page(f"{url}/torch/")
        except (TorchyardError, OSError) as error:
            self._failed(f"{url}/torch/ could not be read", error)
            return
        if page.status != 200:
            # This index answers 403, not 404, for what is absent and for what it refuses.
            self.failures.append(
                Problem(
                    what=f"{url}/torch/ answered {page.status}",
                    why="that says nothing about what is published",
                )
            )
            return
        seen = {
            (torch, platform): one
            for (torch, local, platform), one in read_wheel_names(read_links(page.text)).items()
            if local == cuda
        }
        known = {(b.torch, b.platform) for b in self.facts.builds if b.cuda == cuda and b.index is Index.PYTORCH}
        missing = known - set(seen)
        if missing or not seen:
            self.failures.append(
                Problem(
                    what=f"{url}/torch/ is implausibly short: {len(seen)} builds, {len(known)} are known",
                    where=url,
                    why=f"it lacks {listed(f'{one} {platform}' for one, platform in sorted(missing)[:5])}",
                )
            )
            return
        for (torch, platform), one in sorted(seen.items()):
            new = Added(torch=torch, cuda=cuda, platform=platform)
            if torch in self.known and new not in self.added and self._is_news(torch, cuda, platform):
                self._pytorch_build(torch, cuda, platform, one, url)

    def _is_news(self, torch: Version, cuda: Cuda, platform: Platform) -> bool:
        # While the default build of a platform is unresolved, any build may be it: it waits for next time.
        return self.facts.build(torch, cuda, platform) is None and (torch, platform) not in self.unresolved

    def _pytorch_build(self, torch: Version, cuda: Cuda, platform: Platform, seen: _Seen, url: str) -> None:
        pins: dict[str, Value] = {}
        if cuda != CPU:
            self.say(f"resolving torch {torch}+{cuda_tag(cuda)} for {platform}")
            try:
                pins = pins_of(
                    self.resolve(
                        f"torch=={torch}+{cuda_tag(cuda)}",
                        python=str(_usual(seen.pythons)),
                        platform=platform,
                        index=url,
                    ).versions
                )
            except (TorchyardError, OSError) as error:
                # Its existence was seen; what it pins stays unknown until somebody looks again.
                self._failed(f"the pins of torch {torch}+{cuda_tag(cuda)} on {platform} could not be read", error)
        source = self._source("pytorch-index", _FROM_PYTORCH)
        self._add(Added(torch=torch, cuda=cuda, platform=platform), Index.PYTORCH, seen, pins, source)

    def _add(self, new: Added, index: Index, seen: _Seen, pins: Mapping[str, Value], source: str) -> None:
        assert new.platform is not None
        row: dict[str, Value] = {
            "torch": str(new.torch),
            "cuda": str(new.cuda),
            "platform": new.platform.value,
            "index": index.value,
            **pins,
        }
        if seen.glibc is not None:
            row["glibc"] = str(seen.glibc)
        row |= {"pythons": _texts(seen.pythons), "source": source}
        self.builds.append(row)
        self.added.append(new)

    def _compare(self, row: str, key: str, known: object, observed: object) -> None:
        if known != observed:
            texts = [listed(one) if isinstance(one, list) else str(one) for one in (known, observed)]
            self.conflicts.append(Conflict(row=row, key=key, known=texts[0], observed=texts[1]))

    def _source(self, kind: str, title: str) -> str:
        name = f"{kind}-{self.today}"
        known = {source.id for source in self.facts.sources}
        if name not in known:
            self.sources[name] = {"title": title, "date": self.today}
        return name

    def _failed(self, what: str, error: Exception) -> None:
        why = (
            "; ".join(str(problem) + (f" ({problem.why})" if problem.why else "") for problem in error.problems)
            if isinstance(error, TorchyardError)
            else str(error)
        )
        self.failures.append(Problem(what=what, why=why))


def _texts(pythons: Iterable[Python]) -> list[str]:
    return [str(python) for python in sorted(pythons)]


def _usual(pythons: Iterable[Python]) -> Version:
    """Return a Python to resolve with: the middle one, for which dependencies are likely to have wheels."""
    plain = sorted(python.version for python in pythons if not python.free_threaded)
    return plain[len(plain) // 2] if plain else max(python.version for python in pythons)


# --- uv ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UvResolve:
    """Resolves with uv, which reads metadata by range requests: seconds, and no wheel is downloaded."""

    uv: str = "uv"
    arguments: tuple[str, ...] = ()
    """How the user's configuration reaches uv: indexes, certificates, `--no-config` …"""
    timeout_s: float = 300.0

    def __call__(self, requirement: str, *, python: str, platform: Platform, index: str | None) -> Resolution:
        """Resolve `requirement`; raise SourceError when uv cannot, ToolError when it does not start."""
        with tempfile.TemporaryDirectory() as folder:
            lock = Path(folder) / "pylock.toml"
            (Path(folder) / "in.txt").write_text(requirement + "\n", encoding="utf-8")
            command = [
                self.uv,
                "pip",
                "compile",
                str(Path(folder) / "in.txt"),
                "--format",
                "pylock.toml",
                "--output-file",
                str(lock),
                "--python-platform",
                f"{_MACHINES[platform]}-manylinux_2_28",
                "--python-version",
                python,
                "--only-binary",
                ":all:",
                "--quiet",
                *(["--index", index] if index else []),
                *self.arguments,
            ]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.timeout_s,
                    check=False,
                )
            except OSError as error:
                raise ToolError("uv cannot be started", why=str(error), tries=("make setup",)) from error
            except subprocess.TimeoutExpired as error:
                raise SourceError(f"uv gave no answer for {requirement} in {self.timeout_s:.0f} s") from error
            if done.returncode:
                raise SourceError(f"uv could not resolve {requirement}", why=done.stderr.strip()[-2000:])
            return read_pylock(lock.read_text(encoding="utf-8"), "torch")


def read_pylock(text: str, project: str) -> Resolution:
    """Return what a pylock.toml resolved, and the wheel of `project`; raise SourceError if it lacks that."""
    try:
        packages = tomllib.loads(text)["packages"]
        versions = {package["name"]: Version(package["version"]) for package in packages}
        wheel = next(package["wheels"][0] for package in packages if package["name"] == project)
        name = wheel.get("name") or str(wheel.get("url") or wheel["path"]).rpartition("/")[2]
        uploaded = wheel.get("upload-time")
    except (tomllib.TOMLDecodeError, KeyError, IndexError, TypeError, StopIteration, InvalidVersion) as error:
        raise SourceError("the resolver's answer cannot be read", why=f"{type(error).__name__}: {error}") from error
    return Resolution(
        versions=versions,
        wheel=unquote(name),
        uploaded=uploaded.date() if isinstance(uploaded, dt.datetime) else None,
    )
