"""Whether torch starts: alone, beside other libraries, and with NumPy: T1."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from validate import explain
from validate.check import Probe, check
from validate.verdict import Blame, Skip

# ----------------------------------------------------------------------------------------------------
# Imports

_BESIDE = ("numpy", "triton", "torchvision", "torchaudio")
_IMPORT = """
import importlib, json, sys, time
with open(sys.argv[1], "w", encoding="utf-8") as told:
    def tell(**what):
        told.write(json.dumps(what) + "\\n")
        told.flush()
    for name in sys.argv[2:]:
        tell(begun=name)
        start = time.perf_counter()
        try:
            module = importlib.import_module(name)
            if name == "torchvision":
                sys.modules["torch"].ops.torchvision.nms
        except BaseException as error:
            tell(name=name, missing=getattr(error, "name", None), error=f"{type(error).__name__}: {error}")
        else:
            tell(name=name, seconds=time.perf_counter() - start, file=getattr(module, "__file__", None))
"""
_HAS_TORCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
_LOOK_S = 10.0


@dataclass(frozen=True)
class Import:
    """What became of one import."""

    name: str
    seconds: float = 0.0
    error: str = ""
    """Empty if there was none."""
    missing: Optional[str] = None
    """The module that was not found, if that was the error."""


@check(
    "run.import",
    title="torch imports, alone and beside others",
    tier=1,
    modes=("F01", "F02", "F08", "F13", "F24"),
)
def imports(probe: Probe) -> None:
    """Import torch and then the others that are installed; and the others before torch."""
    others = [name for name in _BESIDE if _is_there(name)]
    gpu = any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/dxg"))  # noqa: PTH110
    first = _imported(probe, "torch-first", ["torch", *others])
    torch = first[0]
    if torch.missing == "torch":
        having = [python for python in _pythons() if _has_torch(python)]
        probe.stop(
            f"{sys.executable} has no torch",
            why=f"torch is installed for {', '.join(having)}" if having else "no Python that was found has it",
            remedy=f"start {having[0]}, and put its directory first on PATH" if having else "pip install torch",
            mode="F24",
        )
    if _needs_driver(torch.error) and not gpu:
        probe.skip(Skip.NO_GPU, f"this torch cannot be imported without a driver: {torch.error}")
    last = _imported(probe, "torch-last", [*others, "torch"]) if others and not torch.error else []
    judge_imports(probe, first, last, gpu=gpu)
    for one in first:
        if not one.error:
            probe.metric(f"import_{one.name}_s", one.seconds, "s", better="lower")
    _judge_python(probe)
    good = [one for one in first if not one.error]
    probe.detail(", ".join(f"{one.name} in {one.seconds:.1f} s" for one in good))


def _is_there(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def _imported(probe: Probe, label: str, names: Sequence[str]) -> List[Import]:
    """Import modules one after the other in a fresh interpreter; what kills it is an error of the one it was at."""
    told = os.path.join(probe.request.scratch, f"import-{label}-{os.getpid()}.jsonl")  # noqa: PTH118
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, told, *names],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    found: List[Import] = []
    begun = names[0]
    with contextlib.suppress(OSError), open(told, encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            document = json.loads(line)
            if "begun" in document:
                begun = document["begun"]
            else:
                document.pop("file", None)
                found.append(Import(**document))
    if done.returncode < 0:
        found.append(Import(begun, error=f"the process died of {signal.Signals(-done.returncode).name}"))
    elif len(found) < len(names):
        found.append(Import(begun, error=f"the process ended: {done.stderr.strip()[-500:]}"))
    return found


def _needs_driver(error: str) -> bool:
    return "libcuda.so" in error and "cannot open shared object file" in error


def judge_imports(probe: Probe, first: Sequence[Import], last: Sequence[Import], *, gpu: bool) -> None:
    """Judge imports with torch first, and with torch last; the same error twice is told once."""
    broken = {one.name for one in first if one.error}
    for one in first:
        if not one.error:
            continue
        if _needs_driver(one.error) and not gpu:
            probe.saw(needs_driver=one.name)
            continue
        _import_failed(probe, one, beside=one.name != "torch", order=False)
        if one.name == "torch":
            return
    for one in last:
        if one.error and one.name not in broken and not (_needs_driver(one.error) and not gpu):
            _import_failed(probe, one, beside=True, order=True)


def _import_failed(probe: Probe, one: Import, *, beside: bool, order: bool) -> None:
    what = f"{one.name} cannot be imported" + (
        (" after the others" if one.name == "torch" else " before torch")
        if order
        else (" after torch" if beside else "")
    )
    symbol = re.search(r"undefined symbol: (\w+)", one.error)
    if symbol and order:
        probe.fail(
            what,
            why=f"{one.error}: a library that was loaded before brought another version of what torch needs",
            remedy="remove the second copy of the library (NCCL, most often), or import torch first",
            mode="F02",
        )
        return
    if symbol and one.name in ("torchvision", "torchaudio"):
        probe.fail(
            what,
            why=f"{one.error}: {one.name} was built for another torch",
            remedy=f"install the {one.name} of this torch, from the same index",
            mode="F13",
        )
        return
    known = next(explain.matches(one.error), None)
    if known is not None:
        probe.fail(
            what,
            why=f"{one.error}: {known.cause}",
            remedy=known.remedy,
            mode=known.mode,
            blame=Blame(known.blame),
        )
        return
    if symbol:
        remedy, mode = "pip list | grep nvidia: keep the packages that torch requires, reinstall those", "F01"
    elif "cannot open shared object file" in one.error:
        remedy, mode = "install what brings the library; pip install --no-deps and slimming tools leave it out", "F08"
    elif one.name == "torchvision":
        remedy, mode = "install the torchvision of this torch, from the same index", "F13"
    else:
        remedy, mode = f"{sys.executable} -c 'import {one.name}' shows where it happens", ""
    probe.fail(what, why=one.error, remedy=remedy, mode=mode)


def _pythons() -> Iterator[str]:
    """Yield other interpreters, where they are looked for and where images have them."""
    own = os.path.dirname(sys.executable)  # noqa: PTH120
    places = [*os.environ.get("PATH", "").split(":"), "/opt/venv/bin", "/opt/conda/bin", "/usr/local/bin", "/usr/bin"]
    for place in dict.fromkeys(places):
        for name in ("python", "python3"):
            path = os.path.join(place, name)  # noqa: PTH118
            if place != own and os.access(path, os.X_OK):
                yield path
                break


def _has_torch(python: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return (
            subprocess.run([python, "-c", _HAS_TORCH], capture_output=True, timeout=_LOOK_S, check=False).returncode
            == 0
        )
    return False


def _judge_python(probe: Probe) -> None:
    """Judge whether the Python that people start is one that has torch."""
    own = os.path.dirname(sys.executable)  # noqa: PTH120
    for name in ("python", "python3"):
        path = shutil.which(name)
        if path is not None and os.path.dirname(path) != own and not _has_torch(path):  # noqa: PTH120
            probe.warn(
                f"{name} is {path}, which has no torch",
                why=f"torch is installed for {sys.executable}",
                remedy=f"put {own} first on PATH",
                mode="F24",
                blame=Blame.IMAGE,
            )
            return


# ----------------------------------------------------------------------------------------------------
# NumPy

_DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "bool",
    "complex64",
    "complex128",
)


@check(
    "run.numpy",
    title="tensors and NumPy arrays share memory",
    tier=1,
    needs=("run.identity",),
    modes=("F15",),
)
def numpy_bridge(probe: Probe) -> None:
    """Take tensors to arrays and back: values, memory, strides, and the refusals that keep them honest."""
    if not _is_there("numpy"):
        probe.warn(
            "NumPy is not installed",
            why="torch works without it, but tensor.numpy(), torch.from_numpy and most data loaders do not",
            remedy="pip install numpy",
            blame=Blame.IMAGE,
        )
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        numpy = importlib.import_module("numpy")
    told = [
        str(one.message).strip() for one in caught if "umpy" in str(one.message) or "_ARRAY_API" in str(one.message)
    ]
    try:
        array = torch.arange(6.0).numpy()
    except RuntimeError as error:
        probe.stop(
            "torch cannot use the NumPy that is installed",
            why="\n".join([f"NumPy {numpy.__version__}: {error}", *told[:1]]),
            remedy="pip install 'numpy<2' for a torch before 2.3; for a later one: pip install -U numpy",
            mode="F15",
        )
    if told:
        probe.warn("importing NumPy and torch together warns", why=told[0], mode="F15", blame=Blame.IMAGE)
    probe.saw(numpy=str(numpy.__version__), array=type(array).__name__)
    _judge_sharing(probe, torch, numpy)
    _judge_dtypes(probe, torch, numpy)
    _judge_refusals(probe, torch, numpy)
    probe.detail(f"NumPy {numpy.__version__}, {len(_DTYPES)} dtypes both ways without a copy")


def _judge_sharing(probe: Probe, torch: Any, numpy: Any) -> None:  # noqa: ANN401
    tensor = torch.zeros(4, 3)
    tensor.t().numpy()[2, 1] = 42.0
    if tensor[1, 2].item() != 42.0:
        probe.fail("tensor.numpy() copies", why="what is written to the array is not seen in the tensor", mode="F15")
    array = numpy.zeros((4, 3), dtype="float32")
    torch.from_numpy(array[::2, 1:])[1, 0] = 42.0
    if array[2, 1] != 42.0:
        probe.fail("torch.from_numpy copies", why="what is written to the tensor is not seen in the array", mode="F15")


def _judge_dtypes(probe: Probe, torch: Any, numpy: Any) -> None:  # noqa: ANN401
    """Take values that every dtype can hold both ways."""
    wrong: Dict[str, str] = {}
    for name in _DTYPES:
        array = numpy.array([0, 1, 3, 100, 127]).astype(name)
        tensor = torch.from_numpy(array)
        back = tensor.numpy()
        right = tensor.dtype == getattr(torch, name) and back.dtype == array.dtype
        exact = [complex(value) for value in tensor.tolist()] == [complex(value) for value in array.tolist()]
        shared = tensor.data_ptr() == array.__array_interface__["data"][0] == back.__array_interface__["data"][0]
        if not (right and exact and shared):
            wrong[name] = (
                f"torch: {tensor.dtype} {tensor.tolist()}; NumPy: {back.dtype} {array.tolist()}; "
                f"{'one' if shared else 'not one'} memory"
            )
    if wrong:
        probe.fail(
            f"{', '.join(wrong)} cannot be shared by NumPy and torch", why=next(iter(wrong.values())), mode="F15"
        )


def _judge_refusals(probe: Probe, torch: Any, numpy: Any) -> None:  # noqa: ANN401
    """See refused what cannot be shared: a silent copy or a reinterpretation would give wrong numbers."""
    refusals: Sequence[Tuple[str, Callable[[], Any]]] = (
        ("a bfloat16 tensor", lambda: torch.ones(2, dtype=torch.bfloat16).numpy()),
        ("a tensor that requires a gradient", lambda: torch.ones(2, requires_grad=True).numpy()),
        ("an array with negative strides", lambda: torch.from_numpy(numpy.zeros(3)[::-1])),
    )
    for what, convert in refusals:
        try:
            convert()
        except (TypeError, RuntimeError, ValueError):
            continue
        probe.fail(f"{what} is converted between NumPy and torch instead of being refused", mode="F15")
