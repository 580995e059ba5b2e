"""What the environment says it is, what it was declared to be, and what is installed: T1."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import os
import re
import struct
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from validate import explain, facts, installed
from validate.check import Probe, check
from validate.installed import Closure, Installed, Owners, Recorded
from validate.verdict import Blame, Skip

_WHAT = {
    "torch": "torch.__version__",
    "cuda": "torch.version.cuda",
    "cudnn_number": "the loaded cuDNN",
    "nccl": "the loaded NCCL",
    "python": "Python",
    "architectures": "the GPU architectures torch was compiled for",
}
_REINSTALL = "build the image again, or remove what was installed into it later"


@check("run.identity", title="versions can be told", tier=1, modes=("F01", "F08"))
def identity(probe: Probe) -> None:
    """Observe, without judging, what `validate/facts.py` observes."""
    seen = facts.observe()
    found: Mapping[str, Any] = seen["facts"]
    probe.saw(facts=found)
    _unknown(probe, {_WHAT.get(name, name): why for name, why in seen["errors"].items()})
    probe.detail(f"torch {found.get('torch')}, Python {found.get('python_full')}")


def _unknown(probe: Probe, reasons: Mapping[str, str]) -> None:
    """Tell what could not be found out; what has one cause, at once."""
    for why in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name, reason in reasons.items() if reason == why)
        known = next(explain.matches(why), None)
        probe.fail(
            f"{names} could not be found out",
            why=f"{why}\n{known.cause}" if known else why,
            remedy=known.remedy if known else "",
            mode=known.mode if known else "",
            blame=Blame(known.blame) if known else Blame.IMAGE,
        )


# ----------------------------------------------------------------------------------------------------
# What was declared


@check(
    "run.declared",
    title="it is what it was declared to be",
    tier=1,
    needs=("run.identity",),
    modes=("F01", "F04", "F19"),
)
def declared(probe: Probe) -> None:
    """Compare what is seen with the image's own image.json."""
    expected = probe.declared.get("expect")
    if not isinstance(expected, dict) or not isinstance(expected.get("packages"), dict):
        probe.stop("image.json does not say what to expect", why="it has no 'expect' with 'packages'")
    judge_declared(probe, expected, facts.observe())
    probe.detail(f"{probe.declared.get('id', 'the cell')}: {len(expected['packages'])} packages as locked")


def judge_declared(probe: Probe, expected: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """Judge facts by an expectation; a package that the lock lacks is a warning, for images are built upon."""
    found: Mapping[str, Any] = seen["facts"]
    errors: Mapping[str, str] = seen["errors"]
    unknown: Dict[str, str] = {}
    for name, what in _WHAT.items():
        wanted: Any = expected.get(name)
        if name == "architectures":
            if not wanted:
                continue
            wanted = sorted(wanted)
        if name not in found:
            unknown[what] = errors.get(name, "no reason was given")
        elif found[name] != wanted:
            mode = {"nccl": "F01", "cudnn_number": "F04", "cuda": "" if found[name] else "F19"}.get(name, "")
            probe.fail(
                f"{what} is {_spell(found[name])}",
                why=f"declared: {_spell(wanted)}",
                remedy=_REINSTALL,
                mode=mode,
            )
    if "packages" not in found:
        unknown["the list of installed packages"] = errors.get("packages", "no reason was given")
    _unknown(probe, unknown)
    if "packages" in found:
        _judge_packages(probe, expected["packages"], found["packages"])


def _judge_packages(probe: Probe, locked: Mapping[str, str], packages: Mapping[str, str]) -> None:
    for name in sorted(locked):
        if name not in packages:
            probe.fail(f"{name} is not installed", why=f"locked: {locked[name]}", remedy=_REINSTALL)
        elif packages[name] != locked[name]:
            probe.fail(f"{name} is {packages[name]}", why=f"locked: {locked[name]}", remedy=_REINSTALL)
    more = sorted(set(packages) - set(locked))
    if more:
        probe.warn(
            f"{_count(len(more), 'package')} besides the locked ones",
            why=", ".join(f"{name} {packages[name]}" for name in more[:20]) + (", …" if len(more) > 20 else ""),
            remedy="nothing, if they were installed on purpose; the lock does not vouch for them",
            blame=Blame.IMAGE,
        )


def _spell(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ----------------------------------------------------------------------------------------------------
# Compiled with = loaded = installed

Version = Tuple[int, ...]

_CUDA = re.compile(
    r"lib(cudart|cudnn|nccl|cublas|cufft|curand|cusolver|cusparse|cufile|cupti|nvrtc|nvJitLink|nvshmem|nvToolsExt|nvtx)"
)
"""What torch's CUDA wheels bring along; libcuda and libnvidia-* belong to the host's driver."""
_SHARED = re.compile(r"(lib.+?\.so(?:\.\d+)?)(?:\.|$)")
"""As much of a file's name as its soname has."""
_PRIVATE = re.compile(r"-[0-9a-f]{8,}(?=[.])")
"""What auditwheel adds to the names of the libraries that it moves into a wheel."""
_OPENMP = ("libgomp", "libiomp5", "libomp")


@check(
    "run.versions",
    title="what torch was compiled with is what is loaded",
    tier=1,
    needs=("run.identity",),
    modes=("F01", "F02", "F03", "F04", "F05", "F06", "F07", "F10", "F20", "F23"),
)
def versions(probe: Probe) -> None:
    """Compare compile-time constants, loaded libraries and metadata; see which files the libraries were loaded from."""
    import torch

    everything = installed.distributions()
    table = installed.first_of_each(everything)
    libraries = {
        os.path.realpath(path): claims for path, claims in installed.owners(everything).items() if _is_shared(path)
    }
    read = installed.requirement_reader()
    names = installed.closure(["torch"], table, read).names if read else None
    judge_torch(probe, str(torch.__version__), table.get("torch"))
    cuda = getattr(torch.version, "cuda", None)
    if cuda is not None:
        _cuda_versions(probe, torch, cuda, table)
    paths = mapped()
    probe.saw(libraries={path: [str(one) for one, _ in libraries.get(path, ())] for path in paths if _watched(path)})
    judge_files(probe, paths, libraries, names)
    judge_openmp(probe, paths, threads=torch.get_num_threads(), cpus=len(os.sched_getaffinity(0)), asked=_asked())
    stack = f", CUDA {cuda}" if cuda else ", CPU only"
    probe.detail(f"torch {torch.__version__}{stack}")


def _cuda_versions(probe: Probe, torch: Any, cuda: str, table: Mapping[str, Installed]) -> None:  # noqa: ANN401
    paths = {_stem(path): path for path in mapped()}
    cudnn = getattr(torch._C, "_cudnn", None)  # noqa: SLF001
    if cudnn is not None:
        judge_cudnn(
            probe,
            tuple(cudnn.getCompileVersion()),
            tuple(cudnn.getRuntimeVersion()),
            _version_of(table, "nvidia-cudnn-"),
        )
    nccl = paths.get("libnccl")
    if nccl is not None and hasattr(torch._C, "_nccl_version"):  # noqa: SLF001
        number = int(torch._C._nccl_version())  # noqa: SLF001
        compiled = (number >> 32, number >> 16 & 0xFFFF, number & 0xFFFF)
        judge_nccl(probe, compiled, _ask(probe, nccl, "ncclGetVersion"), _version_of(table, "nvidia-nccl-"))
    runtime = paths.get("libcudart")
    if runtime is not None:
        judge_runtime(probe, cuda, _ask(probe, runtime, "cudaRuntimeGetVersion"))
    loaded = paths.get("libcudnn")
    if loaded is not None:
        judge_search(probe, loaded, list(_elsewhere(_stem(loaded))))
    compiler = next((path for path in _nvrtc(table) if os.path.exists(path)), None)  # noqa: PTH110
    if compiler is not None:
        judge_nvrtc(probe, compiler, _nvrtc_version(compiler), set(os.listdir(os.path.dirname(compiler))))  # noqa: PTH208, PTH120


def _version_of(table: Mapping[str, Installed], prefix: str) -> Optional[str]:
    """Return the version of the one distribution that is named so; None if none is, or several."""
    found = [one.version for name, one in table.items() if name.startswith(prefix)]
    return found[0] if len(found) == 1 else None


def _ask(probe: Probe, path: str, function: str) -> Optional[Version]:
    """Return what a loaded library says of its version, by a function that fills in an int."""
    number = ctypes.c_int()
    try:
        status = getattr(ctypes.CDLL(path), function)(ctypes.byref(number))
    except (OSError, AttributeError) as error:
        probe.fail(f"{os.path.basename(path)} cannot be asked for its version", why=str(error))  # noqa: PTH119
        return None
    if status != 0:
        probe.fail(f"{os.path.basename(path)} does not tell its version", why=f"{function} returned {status}")  # noqa: PTH119
        return None
    return _decoded(function, number.value)


def _decoded(function: str, number: int) -> Version:
    """Return a version from the number that a library writes for it."""
    if function == "cudaRuntimeGetVersion":
        return number // 1000, number % 1000 // 10
    # NCCL 2.9 and later count 10000 a major and 100 a minor version; earlier ones 1000 and 100.
    scale = 10000 if number >= 10000 else 1000
    return number // scale, number % scale // 100, number % 100


def _nvrtc(table: Mapping[str, Installed]) -> Iterator[str]:
    for name, one in table.items():
        if name.startswith("nvidia-cuda-nvrtc"):
            yield from (path for path, _ in one.files() if _stem(path) == "libnvrtc")


def _nvrtc_version(path: str) -> Optional[Version]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return major.value, minor.value
    return None


def _asked() -> bool:
    return any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def mapped() -> List[str]:
    """Return the shared libraries that are mapped into this process, in their order."""
    found: Dict[str, None] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[-1].replace(" (deleted)", "")
            if path.startswith("/") and _is_shared(path):
                found[path] = None
    return list(found)


def _is_shared(path: str) -> bool:
    return ".so" in os.path.basename(path)  # noqa: PTH119


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".so")[0]  # noqa: PTH119


def _watched(path: str) -> bool:
    return bool(_CUDA.match(_stem(path))) or _PRIVATE.sub("", f"{_stem(path)}.")[:-1] in _OPENMP


def _elsewhere(stem: str) -> Iterator[Tuple[str, str]]:
    """Yield the other libraries of a family that the loader could find by name: what names it, and the path."""
    wanted = re.compile(re.escape(stem) + r"(_.*)?\.so\.\d+")
    for directory in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(directory)):  # noqa: PTH208
                if wanted.fullmatch(name):
                    yield "LD_LIBRARY_PATH", os.path.join(directory, name)  # noqa: PTH118
    with contextlib.suppress(OSError), open("/etc/ld.so.cache", "rb") as cache:  # noqa: PTH123
        for name, path in loader_cache(cache.read()).items():
            if wanted.fullmatch(name):
                yield "the loader's cache", path


def loader_cache(content: bytes) -> Dict[str, str]:
    """Return the sonames and paths of an ld.so.cache; nothing of a format that is not known."""
    start = content.find(b"glibc-ld.so.cache1.1")
    found: Dict[str, str] = {}
    if start < 0:
        return found
    view = content[start:]
    with contextlib.suppress(struct.error, ValueError):
        (number,) = struct.unpack_from("=I", view, 20)
        for index in range(number):
            _, name, path, _, _ = struct.unpack_from("=iIIIQ", view, 48 + 24 * index)
            found.setdefault(_text(view, name), _text(view, path))
    return found


def _text(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode("utf-8", "replace")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def judge_torch(probe: Probe, imported: str, one: Optional[Installed]) -> None:
    """Judge whether the torch that is imported is the torch that is installed."""
    if one is None:
        probe.warn(f"torch {imported} is imported, but pip knows of none", mode="F20", blame=Blame.IMAGE)
    elif imported.partition("+")[0] != one.version.partition("+")[0]:
        probe.fail(
            f"torch {imported} is imported, but torch {one.version} is installed",
            why=f"installed in {one.root}; another torch comes before it on sys.path, or an upgrade left files behind",
            remedy="pip uninstall torch until none is left, then install the one that is wanted",
            mode="F20",
        )


def judge_cudnn(probe: Probe, compiled: Version, loaded: Version, package: Optional[str]) -> None:
    """Judge cuDNN by NVIDIA's rule, which is torch's own: the same major version, not an older minor version."""
    probe.saw(cudnn={"compiled": _dotted(compiled), "loaded": _dotted(loaded), "package": package})
    if loaded[0] != compiled[0] or loaded[1] < compiled[1]:
        probe.fail(
            f"cuDNN {_dotted(loaded)} is loaded, torch was compiled with {_dotted(compiled)}",
            why="cuDNN works with what was compiled for the same major version and the same or an earlier minor one",
            remedy="install the cuDNN that torch asks for, and drop another one from LD_LIBRARY_PATH",
            mode="F04",
        )
    if package is not None and package.split(".")[:3] != list(map(str, loaded[:3])):
        probe.fail(
            f"cuDNN {_dotted(loaded)} is loaded, but {package} is installed",
            why="another cuDNN is found first, or another package has overwritten its files",
            remedy="look for it in LD_LIBRARY_PATH and among the packages: pip list | grep cudnn",
            mode="F03",
        )


def judge_nccl(probe: Probe, compiled: Version, loaded: Optional[Version], package: Optional[str]) -> None:
    """Judge NCCL: symbols are only added, so a newer one works; an older one lacks some that torch calls."""
    if loaded is None:
        return
    probe.saw(nccl={"compiled": _dotted(compiled), "loaded": _dotted(loaded), "package": package})
    if loaded[0] != compiled[0] or loaded < compiled:
        probe.fail(
            f"NCCL {_dotted(loaded)} is loaded, torch was compiled with {_dotted(compiled)}",
            why="an older NCCL lacks functions that torch calls",
            remedy="install the NCCL that torch asks for, and no other that owns the same file",
            mode="F01",
        )
    if package is not None and package.split(".")[:3] != list(map(str, loaded)):
        probe.fail(
            f"NCCL {_dotted(loaded)} is loaded, but {package} is installed",
            why="another NCCL was loaded first, or another package has overwritten libnccl.so.2",
            remedy="pip list | grep nccl; keep one, and reinstall it with --force-reinstall --no-deps",
            mode="F01",
        )


def judge_runtime(probe: Probe, compiled: str, loaded: Optional[Version]) -> None:
    """Judge the CUDA runtime library: the same major version, not an older minor one."""
    if loaded is None:
        return
    probe.saw(runtime={"compiled": compiled, "loaded": _dotted(loaded)})
    wanted = tuple(int(part) for part in compiled.split(".")[:2])
    if loaded[0] != wanted[0] or loaded < wanted:
        probe.fail(
            f"the CUDA runtime {_dotted(loaded)} is loaded, torch was compiled with {compiled}",
            why="functions that torch calls may be missing",
            remedy="install the nvidia-cuda-runtime that torch asks for",
            mode="F04",
        )


def judge_nvrtc(probe: Probe, path: str, version: Optional[Version], beside: Set[str]) -> None:
    """Judge whether NVRTC will find its builtins: it opens them by name, minor version included."""
    if version is None:
        probe.fail(f"{path} does not tell its version", why="it cannot be loaded, or is no NVRTC", mode="F07")
        return
    builtins = f"libnvrtc-builtins.so.{_dotted(version)}"
    if builtins not in beside:
        probe.fail(
            f"{builtins} is missing",
            why=f"{path} is of version {_dotted(version)} and opens it at the first compilation",
            remedy="reinstall nvidia-cuda-nvrtc",
            mode="F07",
        )


def judge_search(probe: Probe, loaded: str, elsewhere: Sequence[Tuple[str, str]]) -> None:
    """Judge the cuDNN libraries that lie elsewhere: cuDNN opens its parts late, by name, and may get one of those."""
    home = os.path.realpath(os.path.dirname(loaded))  # noqa: PTH120
    shipped = {name: _size(os.path.join(home, name)) for name in os.listdir(home)}  # noqa: PTH118, PTH208
    strange: Dict[Tuple[str, str], List[str]] = {}
    hiding: Dict[str, List[str]] = {}
    for via, path in elsewhere:
        directory, name = os.path.split(path)
        if os.path.realpath(directory) == home:
            continue
        if name not in shipped:
            strange.setdefault((via, directory), []).append(name)
        elif via == "LD_LIBRARY_PATH" and _size(path) != shipped[name]:
            hiding.setdefault(directory, []).append(name)
    for (via, directory), names in strange.items():
        probe.fail(
            f"the cuDNN in {directory} would be mixed with torch's own",
            why=f"{', '.join(names)}: not in {home}, and {via} leads to the other",
            remedy="remove the system's cuDNN: apt-get purge 'libcudnn*'",
            mode="F03",
        )
    for directory, names in hiding.items():
        probe.fail(
            f"the cuDNN in {directory} hides torch's own",
            why=f"{', '.join(names)}: LD_LIBRARY_PATH is searched before cuDNN's own directory, and has another build",
            remedy="drop the directory from LD_LIBRARY_PATH: torch's wheels need none",
            mode="F04",
        )


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_size  # noqa: PTH116
    return -1


def judge_files(probe: Probe, paths: Sequence[str], libraries: Owners, closure: Optional[Set[str]]) -> None:
    """Judge which files the libraries came from; `closure` is what torch requires, None if that cannot be told."""
    by_name: Dict[str, List[str]] = {}
    for path in paths:
        match = _SHARED.match(os.path.basename(path))  # noqa: PTH119
        if match:
            by_name.setdefault(match.group(1), []).append(path)
    for name, files in sorted(by_name.items()):
        if len(files) > 1 and _stem(name) not in _OPENMP:
            tell = probe.fail if _CUDA.match(name) else probe.warn
            tell(
                f"{name} is loaded from {len(files)} files",
                why=", ".join(files),
                remedy="keep one of them",
                mode=_mode(name),
                blame=Blame.IMAGE,
            )
    _judge_places(probe, by_name)
    # A torch without requirements on NVIDIA's wheels uses the CUDA of the system, as NVIDIA's own images do.
    if closure is None or not any(name.startswith("nvidia-") for name in closure):
        return
    strange: Dict[Tuple[str, str], List[str]] = {}
    for path in paths:
        if not _CUDA.match(_stem(path)):
            continue
        claims = [one for one, _ in libraries.get(path, ())]
        directory, name = os.path.split(path)
        if not claims:
            strange.setdefault((directory, _mode(path)), []).append(name)
        elif not any(one.name in closure for one in claims):
            probe.fail(
                f"{path} is loaded, of {claims[0]}",
                why="torch does not require that package: it is a leftover of another torch, or another library's",
                remedy=f"pip uninstall {claims[0].name}, then reinstall torch's own packages",
                mode="F10",
            )
    for (directory, mode), names in strange.items():
        probe.fail(
            f"{', '.join(names)} is loaded from {directory}, which no package brought",
            why="torch's wheels bring their own; this one was found first",
            remedy="drop the directory from LD_LIBRARY_PATH, or import torch before what loads it",
            mode=mode,
        )


def _judge_places(probe: Probe, by_name: Mapping[str, Sequence[str]]) -> None:
    places = {
        stem: {os.path.dirname(path) for files in by_name.values() for path in files if _stem(path) == stem}  # noqa: PTH120
        for stem in ("libcublas", "libcublasLt")
    }
    if places["libcublas"] and places["libcublasLt"] and places["libcublas"] != places["libcublasLt"]:
        probe.fail(
            "libcublas and libcublasLt come from different places",
            why=", ".join(sorted({*places["libcublas"], *places["libcublasLt"]})),
            remedy="drop the system's CUDA from LD_LIBRARY_PATH",
            mode="F06",
        )


def _mode(path: str) -> str:
    stem = _stem(path)
    for start, mode in (("libnccl", "F02"), ("libcudnn", "F03"), ("libcublas", "F06"), ("libnvJitLink", "F05")):
        if stem.startswith(start):
            return mode
    return "F04" if _CUDA.match(stem) else ""


def judge_openmp(probe: Probe, paths: Sequence[str], *, threads: int, cpus: int, asked: bool) -> None:
    """Judge OpenMP: two runtimes in one process fight for the cores; torch then uses one of them, or stops.

    `asked` says that the number of threads was set by the user.
    """
    runtimes = [path for path in paths if _PRIVATE.sub("", f"{_stem(path)}.")[:-1] in _OPENMP]
    probe.saw(openmp=runtimes, threads=threads, mkl=[path for path in paths if _stem(path).startswith("libmkl_core")])
    probe.metric("threads", threads, "threads")
    if len(runtimes) > 1:
        probe.warn(
            f"{len(runtimes)} OpenMP runtimes are loaded by torch",
            why=", ".join(runtimes),
            remedy="remove the one that torch did not bring",
            mode="F23",
            blame=Blame.IMAGE,
        )
    if threads == 1 and cpus > 1 and not asked:
        probe.warn(
            f"torch computes on one of {cpus} cores",
            why="two OpenMP runtimes, or one that was set up before torch",
            remedy="import torch before other libraries, or set OMP_NUM_THREADS",
            mode="F23",
        )


# ----------------------------------------------------------------------------------------------------
# What is required = what is installed

_COMPANIONS = ("torchvision", "torchaudio", "triton")


@check("run.closure", title="all that torch requires is installed", tier=1, modes=("F01", "F11", "F13", "F20"))
def closure(probe: Probe) -> None:
    """Follow the requirements with their extras, and see that no two distributions claim one file."""
    everything = installed.distributions()
    table = installed.first_of_each(everything)
    if "torch" not in table:
        probe.stop(
            "no distribution named torch is installed",
            why=f"{_count(len(table), 'distribution')} found, torch not among them",
            remedy="pip install torch, or run this with the Python that has it",
            mode="F24",
        )
    judge_disputed(probe, installed.owners(everything))
    read = installed.requirement_reader()
    found = installed.closure(["torch", *_COMPANIONS], table, read) if read else None
    judge_twice(probe, everything, {"torch"} if found is None else found.names)
    if found is not None:
        judge_closure(probe, found, probe.request.declared)
        probe.detail(f"{_count(len(found.names), 'distribution')} of {len(table)} are required by torch")
    elif not probe.findings:
        probe.skip(
            Skip.UNSUPPORTED_BY_VERSION, "neither packaging nor pip is installed, so that requirements cannot be read"
        )


def judge_closure(probe: Probe, found: Closure, declared: Optional[Mapping[str, Any]]) -> None:
    """Judge requirements that are not met; a cuDNN that the image declares is chosen on purpose."""
    chosen: Mapping[str, str] = {}
    if declared is not None and declared.get("cudnn_is_stock") is False:
        chosen = declared.get("expect", {}).get("packages", {})
    probe.saw(closure=sorted(found.names), unreadable=list(found.unreadable))
    for edge in found.broken:
        if edge.name.startswith("nvidia-cudnn-") and edge.found is not None and chosen.get(edge.name) == edge.found:
            probe.saw(declared_over_required=f"{edge.name} {edge.found}, required: {edge.requirement}")
            continue
        mode = "F13" if edge.name == "torch" else "F11"
        what = f"{edge.name} {edge.found} is installed" if edge.found else f"{edge.name} is not installed"
        probe.fail(
            what,
            why=f"required: {' → '.join([*edge.path, edge.requirement])}",
            remedy=f"pip install '{edge.requirement}'",
            mode=mode,
        )
    if found.unreadable:
        probe.warn(
            f"{_count(len(found.unreadable), 'requirement')} could not be read",
            why="\n".join(found.unreadable[:5]),
            blame=Blame.IMAGE,
        )


def judge_twice(probe: Probe, everything: Sequence[Installed], required: Set[str]) -> None:
    """Judge distributions that are there more than once: in one directory half of the files are of the wrong one."""
    by_name: Dict[str, List[Installed]] = {}
    for one in everything:
        by_name.setdefault(one.name, []).append(one)
    hidden: List[str] = []
    for name, copies in sorted(by_name.items()):
        where = ", ".join(f"{one.version} in {one.root}" for one in copies)
        if len({one.root for one in copies}) < len(copies) or (name == "torch" and len(copies) > 1):
            probe.fail(
                f"{name} is installed {len(copies)} times",
                why=where,
                remedy=f"pip uninstall {name} until none is left, then install the one that is wanted",
                mode="F20",
            )
        elif name in required and len({one.version for one in copies}) > 1:
            hidden.append(f"{name}: {where}")
    if hidden:
        probe.warn(
            f"torch requires {_count(len(hidden), 'package')} of which another version is installed elsewhere",
            why="\n".join(hidden),
            remedy="nothing, if the first place is the wanted one; else clean PYTHONPATH and the user's site-packages",
            mode="F20",
            blame=Blame.IMAGE,
        )


def judge_disputed(probe: Probe, files: Owners) -> None:
    """Judge files that two distributions claim: who was installed last has overwritten the other's."""
    groups: Dict[Tuple[str, ...], List[str]] = {}
    disputed = installed.disputed(files)
    for path, claims in sorted(disputed.items()):
        groups.setdefault(tuple(sorted({str(one) for one, _ in claims})), []).append(path)
    for names, paths in groups.items():
        shared = [path for path in paths if _is_shared(path)]
        path = (shared or paths)[0]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        last = _on_disk(path, disputed[path])
        why = f"what lies there is of {last}" if last else "what lies there is of neither"
        if shared:
            first, *rest = (name.partition(" ")[0] for name in names)
            probe.fail(
                f"{' and '.join(names)} own one file: {path}{more}",
                why=f"{why}; the other's users find functions missing or of another version",
                remedy=f"pip uninstall {first} {' '.join(rest)}, then install the one that torch requires",
                mode="F01",
            )
        else:
            probe.warn(
                f"{' and '.join(names)} own one file: {path}{more}", why=why, remedy="keep one", blame=Blame.IMAGE
            )


def _on_disk(path: str, claims: Sequence[Tuple[Installed, Recorded]]) -> Optional[Installed]:
    """Return whose file it is that lies there; by its size if that tells, for these files are large."""
    fitting = [(one, recorded) for one, recorded in claims if recorded.size in (None, _size(path))]
    if len(fitting) == 1:
        return fitting[0][0]
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(path, "rb") as file:  # noqa: PTH123
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    text = "sha256=" + base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
    return next((one for one, recorded in fitting if recorded.digest == text), None)
