"""Which torch, CUDA, cuDNN, driver, GPU and Python go together: an answer, or the reason why not and what does."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeVar

from packaging.version import Version

from builder.errors import MatrixError, Problem
from builder.facts import (
    CPU,
    NUMBERS,
    Build,
    Coverage,
    Cuda,
    Driver,
    Facts,
    Gpu,
    Index,
    Platform,
    Python,
    build_order,
    cuda_name,
    cuda_tag,
    listed,
    sm_tag,
)

UPDATE_HINT: Final = "run `torchyard update`: it adds releases that are newer than these facts"

_T = TypeVar("_T")
_MOST_ALTERNATIVES: Final = 3

# --- values ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for, as they wrote it; a version may be a prefix (`2.8`, `8.9`, `525`)."""

    torch: str
    cuda: str | None = None
    cudnn: str | None = None
    driver: str | None = None
    gpu: str | None = None
    python: str | None = None
    platform: str = "linux/amd64"
    glibc: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A combination that can exist, and what it needs."""

    torch: Version
    cuda: Cuda
    cudnn: Version | None
    driver: Driver | None
    gpus: tuple[Version, ...] | None
    ptx: tuple[Version, ...] | None
    pythons: tuple[Python, ...]
    glibc: Version | None
    index: Index
    platform: Platform

    def __str__(self) -> str:
        return f"torch {self.torch} + {cuda_name(self.cuda)}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether a request can exist; if not why not, and what does."""

    possible: bool
    problems: tuple[Problem, ...] = ()
    combination: Alternative | None = None
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def __str__(self) -> str:
        lines: list[str] = []
        if self.combination is not None:
            lines.append(describe(self.combination))
        for problem in self.problems:
            lines.append(str(problem))
            lines += [f"  why   {problem.why}"] if problem.why else []
            lines += [f"  try   {' · '.join(problem.tries)}"] if problem.tries else []
        lines += [f"  note  {note}" for note in self.notes]
        if self.possible and self.alternatives:
            lines.append(f"  also  {' · '.join(_offers(self.alternatives))}")
        return "\n".join(lines)


def describe(found: Alternative) -> str:
    """Return one line that says what a combination is and needs."""
    parts = [str(found)]
    if found.cudnn is not None:
        parts[0] += f" + cuDNN {found.cudnn}"
    if found.driver is not None:
        parts.append(f"driver >= {found.driver}")
    if found.gpus is not None:
        ptx = f" + PTX {' '.join(str(sm) for sm in found.ptx)}" if found.ptx else ""
        parts.append(f"GPUs {' '.join(sm_tag(sm) for sm in found.gpus)}{ptx}")
    parts.append(f"Python {' '.join(str(python) for python in found.pythons)}")
    if found.glibc is not None:
        parts.append(f"glibc >= {found.glibc}")
    parts.append("on the default index" if found.index is Index.DEFAULT else "on PyTorch's own index")
    return "; ".join(parts)


def _offers(found: Sequence[Alternative], *, with_cudnn: bool = False) -> tuple[str, ...]:
    """Return the alternatives as one phrase each; a driver floor is said once for those that share it."""
    said: Driver | None = None
    phrases = []
    stock = len({(other.torch, other.cuda) for other in found}) == len(found)
    different = with_cudnn or len({other.cudnn.major for other in found if other.cudnn is not None}) > 1 or not stock
    for other in found:
        phrase = str(other)
        if different and other.cudnn is not None:
            phrase += f" + cuDNN {other.cudnn}"
        if other.driver is not None and other.driver != said:
            phrase += f" (driver >= {other.driver})"
            said = other.driver
        phrases.append(phrase)
    return tuple(phrases)


# --- reading a request ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A request, understood."""

    torch: Version
    cuda: Cuda | None
    cudnn: Version | None
    driver: Driver | None
    gpu: Gpu | None
    python: Python | None
    platform: Platform
    glibc: Version | None


def _numbers(text: str, what: str, example: str) -> Version:
    if not NUMBERS.fullmatch(text):
        raise MatrixError(
            f"{what} {_short(text)} is not a version",
            why="it is numbers joined by dots",
            tries=(f"{what} {example}",),
        )
    return Version(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _read_cuda(text: str) -> Cuda:
    text = text.strip().lower()
    if text == CPU:
        return CPU
    if tag := re.fullmatch(r"cu([0-9]{2})([0-9])", text, re.ASCII):
        return Version(f"{tag[1]}.{tag[2]}")
    version = _numbers(text, "CUDA", "12.8, cu128 or cpu")
    return Version(".".join(str(part) for part in version.release[:2]))


def _read_torch(text: str) -> tuple[Version, Cuda | None]:
    """Take `2.8`, `v2.8.0` or `2.8.0+cu128` apart."""
    plain, plus, local = text.strip().lower().removeprefix("v").partition("+")
    return _numbers(plain, "torch", "2.8 or 2.8.0"), _read_cuda(local) if plus else None


def _read_driver(text: str) -> Driver:
    text = text.strip()
    return Driver(version=_numbers(text, "driver", "525 or 525.60.13"), text=text)


def _read_python(text: str) -> Python:
    version = _numbers(text.strip().lower().removesuffix("t"), "Python", "3.11 or 3.13t")
    if len(version.release) < 2:
        raise MatrixError(f"Python {_short(text)} lacks its minor version", tries=("Python 3.11",))
    return Python(version=Version(f"{version.major}.{version.minor}"), free_threaded=text.strip().lower().endswith("t"))


_PLATFORMS: Final = {
    "linux/amd64": Platform.AMD64,
    "amd64": Platform.AMD64,
    "x86_64": Platform.AMD64,
    "linux/x86_64": Platform.AMD64,
    "linux/arm64": Platform.ARM64,
    "arm64": Platform.ARM64,
    "aarch64": Platform.ARM64,
    "linux/aarch64": Platform.ARM64,
}


def _read_platform(text: str) -> Platform:
    found = _PLATFORMS.get(text.strip().lower())
    if found is None:
        raise MatrixError(f"platform {_short(text)} is not one of {listed(Platform)}", tries=tuple(Platform))
    return found


# Words of a product name that do not tell its compute capability.
_IDLE_WORDS = re.compile(r"\b(nvidia|geforce|tesla|laptop|gpu|sxm[0-9]?|pcie|nvl|[0-9]+ ?gb|hbm[0-9]e?)\b", re.ASCII)


@functools.cache
def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _IDLE_WORDS.sub(" ", name.lower()))


def _read_gpu(facts: Facts, text: str) -> Gpu:
    """Find a GPU by `sm_120`, `12.0`, `B200` or the name of its family, if all of that family are alike."""
    short = text.strip().lower()
    if match := re.fullmatch(r"(?:sm_?|compute_?)([0-9]{1,2})([0-9])[af]?|([0-9]{1,2})\.([0-9])", short, re.ASCII):
        sm = Version(f"{match[1] or match[3]}.{match[2] or match[4]}")
        found = [gpu for gpu in facts.gpus if gpu.sm == sm]
        near = [gpu.tag for gpu in sorted(facts.gpus, key=lambda gpu: abs(_decimal(gpu.sm) - _decimal(sm)))[:3]]
    else:
        name = _plain(text)
        found = [gpu for gpu in facts.gpus if name and name in map(_plain, gpu.names)]
        found = found or [gpu for gpu in facts.gpus if name and name == _plain(gpu.family)]
        names = {} if found else {_plain(name): name for gpu in facts.gpus for name in gpu.names}
        near = [names[key] for key in difflib.get_close_matches(name[:80], names, n=3)]
    if not found:
        raise MatrixError(f"GPU {_short(text)} is not known", tries=(*near, "its compute capability, such as sm_90"))
    if len(found) > 1:
        raise MatrixError(
            f"GPU {_short(text)} is not one architecture",
            why=f"it is {listed(g.tag for g in found)}",
            tries=tuple(f"{gpu.tag} ({', '.join(gpu.names[:2])})" for gpu in found),
        )
    return found[0]


def _decimal(version: Version) -> int:
    return version.major * 10 + version.minor


def _understand(facts: Facts, request: Request) -> _Wanted:
    """Return the request as values; raise MatrixError with everything that could not be read."""
    problems: list[Problem] = []

    def read(reader: Callable[[str], _T], text: str | None) -> _T | None:
        try:
            return None if text is None else reader(text)
        except MatrixError as error:
            problems.extend(error.problems)
            return None

    torch = read(_read_torch, request.torch)
    cuda = read(_read_cuda, request.cuda)
    cudnn = read(lambda text: _numbers(text.strip(), "cuDNN", "9 or 9.10.2.21"), request.cudnn)
    driver = read(_read_driver, request.driver)
    gpu = read(lambda text: _read_gpu(facts, text), request.gpu)
    python = read(_read_python, request.python)
    platform = read(_read_platform, request.platform)
    glibc = read(lambda text: _numbers(text.strip(), "glibc", "2.28"), request.glibc)
    if torch is not None and torch[1] is not None and cuda is not None and torch[1] != cuda:
        problems.append(Problem(what=f"two CUDAs are asked for: {cuda_name(torch[1])} and {cuda_name(cuda)}"))
    if problems or torch is None or platform is None:
        raise MatrixError(problems=tuple(problems))
    return _Wanted(
        torch=torch[0],
        cuda=cuda or torch[1],
        cudnn=cudnn,
        driver=driver,
        gpu=gpu,
        python=python,
        platform=platform,
        glibc=glibc,
    )


def _starts(prefix: Version, version: Version) -> bool:
    """Say whether `prefix` is `version` or its first numbers; 2.8 is 2.8.0, and 2.1 is not 2.10."""
    return prefix == version or version.release[: len(prefix.release)] == prefix.release


def _is(asked: Cuda, cuda: Cuda) -> bool:
    """Say whether a build's CUDA is the one asked for, or begins like it."""
    if isinstance(asked, str) or isinstance(cuda, str):
        return asked == cuda
    return _starts(asked, cuda)


# --- judging one build ------------------------------------------------------------


class _Kind(StrEnum):
    CUDNN = "cudnn"
    DRIVER = "driver"
    GPU = "gpu"
    PYTHON = "python"
    GLIBC = "glibc"


def _faults(facts: Facts, build: Build, wanted: _Wanted) -> dict[_Kind, Problem]:
    """Return what keeps one existing build from being what is wanted."""
    found = {
        _Kind.CUDNN: _cudnn_fault(facts, build, wanted.cudnn),
        _Kind.DRIVER: _driver_fault(facts, build, wanted),
        _Kind.GPU: _gpu_fault(facts, build, wanted),
        _Kind.PYTHON: _python_fault(facts, build, wanted.python),
        _Kind.GLIBC: _glibc_fault(build, wanted.glibc),
    }
    return {kind: problem for kind, problem in found.items() if problem is not None}


def _full(build: Build) -> str:
    return f"torch {build.torch} for {cuda_name(build.cuda)}"


def _expected_cudnn(facts: Facts, build: Build) -> Version | None:
    """Return the cuDNN of a build, or that of a sibling of the same release where its own is unknown.

    A release is built against one major; no release since 2.0.0 mixes them.
    """
    if build.cudnn is not None or isinstance(build.cuda, str):
        return build.cudnn
    siblings = (other.cudnn for other in facts.builds if other.torch == build.torch)
    return next((Version(str(cudnn.major)) for cudnn in siblings if cudnn is not None), None)


def _cudnn_fault(facts: Facts, build: Build, cudnn: Version | None, name: str = "") -> Problem | None:
    if cudnn is None:
        return None
    name = name or _full(build)
    stock = _expected_cudnn(facts, build)
    if stock is None:
        why = "it is built without CUDA" if isinstance(build.cuda, str) else "which cuDNN it has is unknown"
        return Problem(what=f"{name} has no cuDNN {cudnn}", why=why)
    if _starts(cudnn, stock):
        return None
    if cudnn.major != stock.major:
        exact = f" ({stock})" if build.cudnn is not None else ""
        return Problem(
            what=f"{name} carries cuDNN {stock.major}{exact}, and cuDNN {cudnn} cannot replace it",
            why=f"torch loads the major it was built against; {_cudnn_span(facts, cudnn.major)}",
        )
    if len(cudnn.release) > 1 and cudnn.minor < stock.minor:
        return Problem(
            what=f"{name} was built against cuDNN {stock}, and cuDNN {cudnn} is older",
            why="torch refuses a cuDNN of an earlier minor than the one it was built against",
            tries=(f"cuDNN {stock.major}.{stock.minor} or newer, or no override at all",),
        )
    return None


def _cudnn_span(facts: Facts, major: int) -> str:
    """Say which torch releases carry a cuDNN major: `the last torch with cuDNN 8 was 2.3.1`."""
    having = sorted({build.torch for build in facts.builds if build.cudnn is not None and build.cudnn.major == major})
    if not having:
        return f"no torch since {facts.releases[0].torch} carries cuDNN {major}"
    if having[-1] == facts.releases[-1].torch:
        return f"the first torch with cuDNN {major} was {having[0]}"
    return f"the last torch with cuDNN {major} was {having[-1]}"


def _driver_fault(facts: Facts, build: Build, wanted: _Wanted) -> Problem | None:
    if wanted.driver is None:
        return None
    floor = facts.driver_for(build, wanted.gpu)
    if floor is None:
        return Problem(what=f"{_full(build)} uses no driver", why="it is built without CUDA")
    if wanted.driver.satisfies(floor):
        return None
    why = f"CUDA {str(build.cuda).partition('.')[0]} needs a driver >= {facts.driver_floor(build.cuda)}"
    if wanted.gpu is not None and facts.driver_floor(build.cuda) != floor:
        why = f"{wanted.gpu.tag} ({wanted.gpu.family}) needs a driver >= {floor}"
    return Problem(
        what=f"{_full(build)} does not run on driver {wanted.driver}",
        why=why,
        tries=(f"a driver >= {floor}",),
    )


def _gpu_fault(facts: Facts, build: Build, wanted: _Wanted) -> Problem | None:
    gpu = wanted.gpu
    if gpu is None:
        return None
    name = f"{gpu.tag} ({gpu.family}{', such as ' + gpu.names[0] if gpu.names else ''})"
    what = f"{_full(build)} does not run on {name}"
    if isinstance(build.cuda, str):
        return Problem(what=what, why="it is built without CUDA")
    if facts.covers(build, gpu) is Coverage.NONE:
        why = f"it holds code for {listed(sm_tag(sm) for sm in build.gpus or ())} only"
        if gpu.first_cuda > build.cuda and not facts.could_cover(build.cuda, gpu):
            why = f"{gpu.tag} came with CUDA {gpu.first_cuda}"
        elif gpu.last_cuda is not None and gpu.last_cuda < build.cuda:
            why = f"CUDA {gpu.last_cuda} was the last with {gpu.family}"
        return Problem(what=what, why=why)
    cudnn = wanted.cudnn if wanted.cudnn is not None and len(wanted.cudnn.release) > 1 else build.cudnn
    floor = None if cudnn is None else facts.cudnn_gpu_floor(cudnn, build.cuda)
    if floor is not None and gpu.sm < floor.gpu:
        return Problem(what=what, why=f"cuDNN {cudnn} serves {sm_tag(floor.gpu)} and newer (since cuDNN {floor.cudnn})")
    return None


def _python_fault(facts: Facts, build: Build, python: Python | None) -> Problem | None:
    if python is None:
        return None
    pythons = facts.pythons_of(build)
    if python in pythons:
        return None
    return Problem(
        what=f"torch {build.torch} has no build for Python {python}",
        why=f"it was published for Python {listed(pythons)}",
        tries=(f"Python {min(pythons, key=lambda one: _apart(one, python))}",),
    )


def _apart(one: Python, other: Python) -> tuple[int, bool]:
    return abs(one.version.minor - other.version.minor), one.free_threaded


def _glibc_fault(build: Build, glibc: Version | None) -> Problem | None:
    if glibc is None or build.glibc is None or glibc >= build.glibc:
        return None
    return Problem(
        what=f"{_full(build)} needs glibc >= {build.glibc}, not {glibc}",
        why=f"its wheels are made for systems with glibc {build.glibc} or newer",
    )


# --- what does exist ------------------------------------------------------------


def _alternative(facts: Facts, build: Build, wanted: _Wanted) -> Alternative:
    cudnn = build.cudnn
    asked = wanted.cudnn
    if asked is not None and len(asked.release) > 1 and not (cudnn is not None and _starts(asked, cudnn)):
        cudnn = asked
    return Alternative(
        torch=build.torch,
        cuda=build.cuda,
        cudnn=cudnn,
        driver=facts.driver_for(build, wanted.gpu),
        gpus=build.gpus,
        ptx=build.ptx,
        pythons=facts.pythons_of(build),
        glibc=build.glibc,
        index=build.index,
        platform=build.platform,
    )


def _nearest(facts: Facts, wanted: _Wanted, torch: Version, cuda: Cuda | None) -> tuple[Alternative, ...]:
    """Return at most three combinations that can exist, nearest first.

    What people have (driver, GPU, Python, glibc, platform) is kept; what they choose (torch, CUDA, cuDNN)
    is moved as little as can be: same torch and nearest CUDA, same CUDA and nearest torch, then the same
    without the wish for a cuDNN.
    """
    order = [release.torch for release in facts.releases]
    place = sum(known < torch for known in order)
    free = replace(wanted, cudnn=None)
    apt = [b for b in facts.builds if b.platform is wanted.platform and not _faults(facts, b, free)]
    loose = [build for build in apt if isinstance(build.cuda, str) == (cuda == CPU)] or apt
    strict = [build for build in loose if not _faults(facts, build, wanted)]

    def far_torch(build: Build) -> tuple[int, int]:
        step = order.index(build.torch) - place
        return abs(step), -step

    def far_cuda(build: Build) -> tuple[int, int]:
        if cuda is None:
            return 0 if build.index is Index.DEFAULT else 1, 0
        if isinstance(cuda, str) or isinstance(build.cuda, str):
            return 0, 0
        step = _decimal(build.cuda) - _decimal(cuda)
        return abs(step), step

    def same_torch(builds: list[Build]) -> Build | None:
        return min((b for b in builds if b.torch == torch), key=far_cuda, default=None)

    def same_cuda(builds: list[Build]) -> Build | None:
        same = (build for build in builds if cuda is None or _is(cuda, build.cuda))
        return min(same, key=lambda build: (far_torch(build), far_cuda(build)), default=None)

    picks = [(same_torch(strict), wanted), (same_cuda(strict), wanted)]
    if wanted.cudnn is not None:
        picks += [(same_torch(loose), free), (same_cuda(loose), free)]
    if not any(build for build, _ in picks):
        picks.append((min(strict or loose, key=lambda b: (far_torch(b), far_cuda(b)), default=None), free))
    found: dict[tuple[Version, Cuda], Alternative] = {}
    for build, wish in picks:
        if build is not None:
            found.setdefault((build.torch, build.cuda), _alternative(facts, build, wish))
    return tuple(found.values())[:_MOST_ALTERNATIVES]


# --- answering ------------------------------------------------------------


def explain(facts: Facts, request: Request) -> Answer:
    """Say whether a request can exist and what it needs, or why not and what does exist.

    Raises MatrixError, with every reason, when a part of the request cannot be understood.
    """
    wanted = _understand(facts, request)
    matching = [row.torch for row in facts.releases if _starts(wanted.torch, row.torch)]
    if not matching:
        return _refused(facts, wanted, wanted.torch, [_unknown_torch(facts, wanted.torch)])
    torch = matching[-1]
    known = facts.builds_of(torch, wanted.platform)
    if wanted.cuda is None:
        builds = [build for build in known if not isinstance(build.cuda, str)] or list(known)
    else:
        builds = [build for build in known if _is(wanted.cuda, build.cuda)]
    if not builds:
        return _refused(facts, wanted, torch, _never_built(facts, wanted, torch, known))
    judged = {build: _faults(facts, build, wanted) for build in builds}
    fitting = [build for build in builds if not judged[build]]
    if not fitting:
        return _refused(facts, wanted, torch, _no_fit(judged))
    # Plain `pip install torch` takes the build of the default index; after it, the newest CUDA.
    fitting.sort(key=lambda build: (build.index is Index.DEFAULT, build_order(build)), reverse=True)
    first, *others = fitting
    return Answer(
        possible=True,
        combination=_alternative(facts, first, wanted),
        notes=_notes(facts, wanted, first, judged),
        alternatives=tuple(_alternative(facts, build, wanted) for build in others[:_MOST_ALTERNATIVES]),
    )


def check_cell(
    facts: Facts,
    *,
    torch: Version | str,
    cuda: Version | str,
    cudnn: Version | str | None,
    python: str,
    platform: str,
) -> tuple[Problem, ...]:
    """Return why a cell of the matrix cannot exist, nothing when it can; `cuda` is a version or `cpu`."""
    request = Request(
        torch=str(torch),
        cuda=str(cuda),
        cudnn=None if cudnn is None else str(cudnn),
        python=python,
        platform=platform,
    )
    try:
        return explain(facts, request).problems
    except MatrixError as error:
        return error.problems


def check_host(
    facts: Facts, *, torch: Version, cuda: str, cudnn: Version | None, platform: str, driver: str, gpu: str
) -> tuple[Problem, ...]:
    """Return why a cell that can exist does not run on a host, nothing when it does; what would is not looked for.

    `cudnn` is that of an override.
    """
    request = Request(
        torch=str(torch),
        cuda=cuda,
        cudnn=None if cudnn is None else str(cudnn),
        driver=driver,
        gpu=gpu,
        platform=platform,
    )
    wanted = _understand(facts, request)
    assert wanted.cuda is not None, "it was given"
    build = facts.build(wanted.torch, wanted.cuda, wanted.platform)
    assert build is not None, "it can exist"
    return tuple(_faults(facts, build, wanted).values())


def check_gpu(facts: Facts, gpu: str) -> tuple[Problem, ...]:
    """Return why a GPU is not one that the facts know, nothing when it is."""
    try:
        _read_gpu(facts, gpu)
    except MatrixError as error:
        return error.problems
    return ()


def _refused(facts: Facts, wanted: _Wanted, torch: Version, problems: Sequence[Problem]) -> Answer:
    """Return a refusal whose last reason ends in what does exist."""
    found = _nearest(facts, wanted, torch, wanted.cuda)
    *before, last = problems
    last = replace(last, tries=(*_offers(found, with_cudnn=wanted.cudnn is not None), *last.tries))
    return Answer(possible=False, problems=(*before, last), alternatives=found)


def _unknown_torch(facts: Facts, torch: Version) -> Problem:
    first, last = facts.releases[0].torch, facts.releases[-1].torch
    looked_up = max(source.date for source in facts.sources)
    if torch < first:
        return Problem(what=f"torch {torch} is older than the facts reach", why=f"they begin with torch {first}")
    return Problem(
        what=f"torch {torch} is not known",
        why=f"the facts reach from {first} to {last} (looked up {looked_up})",
        tries=(UPDATE_HINT,),
    )


def _never_built(facts: Facts, wanted: _Wanted, torch: Version, known: Sequence[Build]) -> list[Problem]:
    """Return why there is no such build, then whatever else is asked for that no build of the release has."""
    problems = [_no_such_cuda(facts, wanted.cuda) or _not_published(facts, wanted, torch, known)]
    with_cuda = [build for build in known if not isinstance(build.cuda, str)]
    for kind in (_Kind.CUDNN, _Kind.PYTHON, _Kind.GLIBC):
        faults = [_faults(facts, build, wanted).get(kind) for build in with_cuda]
        if faults and faults[-1] is not None and None not in faults:
            fault = faults[-1]
            if kind is _Kind.CUDNN:
                fault = _cudnn_fault(facts, with_cuda[-1], wanted.cudnn, f"torch {torch}") or fault
            problems.append(replace(fault, tries=()))
    return problems


def _no_such_cuda(facts: Facts, cuda: Cuda | None) -> Problem | None:
    if not isinstance(cuda, Version) or len(cuda.release) < 2 or facts.toolkit(cuda) is not None:
        return None
    known = [row.version for row in facts.toolkits if row.exists]
    if cuda > known[-1]:
        return Problem(what=f"CUDA {cuda} is not known", why=f"the newest toolkit in the facts is {known[-1]}")
    if cuda < known[0]:
        return Problem(what=f"CUDA {cuda} is older than the facts reach", why=f"they begin with CUDA {known[0]}")
    around = [max(v for v in known if v < cuda), min(v for v in known if v > cuda)]
    return Problem(what=f"CUDA {cuda} does not exist", why=f"the toolkits beside it are {listed(around)}")


def _not_published(facts: Facts, wanted: _Wanted, torch: Version, known: Sequence[Build]) -> Problem:
    assert wanted.cuda is not None
    release = facts.release(torch)
    complete = release is not None and wanted.platform in release.complete
    where = "" if wanted.platform is Platform.AMD64 else f" on {wanted.platform}"
    cudas = [build.cuda for build in known if build.cuda != CPU]
    published = listed(cudas) if cudas else "the CPU"
    if complete:
        history = _history(facts, wanted.cuda, torch, wanted.platform)
        return Problem(
            what=f"torch {torch} was never built for {cuda_name(wanted.cuda)}{where}",
            why=f"{torch} was published for {published}{f' ({history})' if history else ''}",
        )
    why = f"only its build for {published} was observed{where}, not what PyTorch's own index has"
    if not known:
        why = f"no build of it was observed{where}"
    if release is not None and wanted.cuda in release.named:
        why += f"; torch's own table names {cuda_name(wanted.cuda)}, which does not prove that it was published"
    return Problem(
        what=f"torch {torch} is not known to be published for {cuda_name(wanted.cuda)}{where}",
        why=why,
        tries=(UPDATE_HINT,),
    )


def _history(facts: Facts, cuda: Cuda, torch: Version, platform: Platform) -> str:
    """Say when a CUDA came or went: `cu121 ended with torch 2.5`."""
    if isinstance(cuda, Version) and len(cuda.release) < 2:
        return ""
    having = [build.torch for build in facts.builds if build.cuda == cuda and build.platform is platform]
    if not having:
        return f"no torch since {facts.releases[0].torch} was built for {cuda_name(cuda)}"
    if having[-1] < torch:
        return f"{cuda_tag(cuda)} ended with torch {having[-1].major}.{having[-1].minor}"
    if having[0] > torch:
        return f"{cuda_tag(cuda)} began with torch {having[0]}"
    below, above = max(v for v in having if v < torch), min(v for v in having if v > torch)
    return f"{cuda_tag(cuda)} skipped it, from {below} to {above}"


def _no_fit(judged: Mapping[Build, Mapping[_Kind, Problem]]) -> list[Problem]:
    """Return the reasons of a single build, or one reason for all builds of a release together."""
    builds = list(judged)
    if len(builds) == 1:
        return list(judged[builds[0]].values())
    shared = [kind for kind in _Kind if all(kind in judged[build] for build in builds)]
    alike = [kind for kind in shared if len({judged[build][kind].what for build in builds}) == 1]
    if alike:
        return [judged[builds[-1]][kind] for kind in alike]
    reasons: dict[str, list[Build]] = {}
    for build in builds:
        reasons.setdefault(next(iter(judged[build].values())).why, []).append(build)
    why = "; ".join(
        reason if len(reasons) == 1 else f"{listed(cuda_name(build.cuda) for build in those)}: {reason}"
        for reason, those in reasons.items()
    )
    tries = next(iter(judged[builds[0]].values())).tries
    return [Problem(what=f"no build of torch {builds[0].torch} fits", why=why, tries=tries)]


def _notes(
    facts: Facts,
    wanted: _Wanted,
    first: Build,
    judged: Mapping[Build, Mapping[_Kind, Problem]],
) -> tuple[str, ...]:
    notes: list[str] = []
    if wanted.driver is not None:
        notes += [_driver_note(facts, wanted, build, faults, wanted.driver) for build, faults in judged.items()]
        notes += _newer_gpus_note(facts, wanted, [build for build in judged if not judged[build]], wanted.driver)
    elif len(judged) > 1:
        notes += [
            f"not with {cuda_name(build.cuda)}: {listed(fault.why for fault in faults.values())}"
            for build, faults in judged.items()
            if faults
        ]
    notes += _cudnn_notes(facts, wanted, first)
    if wanted.gpu is not None:
        coverage = facts.covers(first, wanted.gpu)
        if coverage is Coverage.UNKNOWN:
            notes.append(f"the GPU architectures of {_full(first)} were never recorded: validate on a {wanted.gpu.tag}")
        if coverage is Coverage.PTX:
            notes.append(
                f"{wanted.gpu.tag} is reached through PTX only: the first start compiles, and the driver "
                f"must be as new as the toolkit's own ({facts.driver_for(first, wanted.gpu)})"
            )
    if wanted.cuda is None and isinstance(first.cuda, str):
        notes.append(f"torch {first.torch} has no known CUDA build on {wanted.platform}")
    if first.unverified:
        notes.append(f"not verified for {_full(first)}: {listed(sorted(first.unverified))}")
    if first.note:
        notes.append(first.note)
    return tuple(notes)


def _driver_note(
    facts: Facts,
    wanted: _Wanted,
    build: Build,
    faults: Mapping[_Kind, Problem],
    driver: Driver,
) -> str:
    name = cuda_name(build.cuda)
    if faults:
        return f"{name}: no, {listed(fault.why for fault in faults.values())}"
    floor = facts.driver_for(build, wanted.gpu)
    own = facts.toolkit(build.cuda) if isinstance(build.cuda, Version) else None
    branch = (
        f"; any release of branch {driver} from {floor} on"
        if floor and driver.is_branch and driver.version.major == floor.version.major
        else ""
    )
    if own is not None and not driver.satisfies(own.driver):
        return (
            f"{name}: yes, by minor-version compatibility "
            f"(driver >= {floor}; the toolkit's own is {own.driver})"
            f"{branch}"
        )
    return f"{name}: yes (driver >= {floor}){branch}"


def _newer_gpus_note(facts: Facts, wanted: _Wanted, builds: Sequence[Build], driver: Driver) -> list[str]:
    """Say which GPUs that the builds reach want a newer driver than the one given."""
    if wanted.gpu is not None:
        return []
    late = [
        gpu
        for gpu in facts.gpus
        if gpu.driver is not None
        and not driver.satisfies(gpu.driver)
        and any(facts.covers(build, gpu) is Coverage.CODE for build in builds)
    ]
    needs: dict[Driver, list[Gpu]] = {}
    for gpu in late:
        assert gpu.driver is not None
        needs.setdefault(gpu.driver, []).append(gpu)
    return [
        f"not on {listed(gpu.tag for gpu in gpus)} ({listed(sorted({gpu.family for gpu in gpus}))}): "
        f"a driver >= {floor} is needed there"
        for floor, gpus in needs.items()
    ]


def _cudnn_notes(facts: Facts, wanted: _Wanted, build: Build) -> list[str]:
    if wanted.cudnn is None or isinstance(build.cuda, str):
        return []
    if build.cudnn is None:
        family = _expected_cudnn(facts, build)
        return [f"the cuDNN that {_full(build)} pins is not recorded; its release has {family}"]
    if not _starts(wanted.cudnn, build.cudnn):
        return [f"cuDNN {wanted.cudnn} is an override: {_full(build)} pins {build.cudnn}"]
    return []
