"""What this environment is, observed and not judged: versions compiled in, versions loaded, what is installed.

A script of its own: `python facts.py OUTPUT` writes the facts as JSON to the file OUTPUT. They travel as a file
because torch, its libraries and drivers print to standard output as they please.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional, Set

SCHEMA = 1


def _loaded_libraries() -> Dict[str, str]:
    """Return the shared libraries mapped into this process: file name to path."""
    found: Dict[str, str] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123 (not a file to look up)
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[-1]
            if path.startswith("/") and ".so" in path:
                found[os.path.basename(path)] = path  # noqa: PTH119
    return found


def _library(stem: str) -> Optional[str]:
    return next((path for name, path in sorted(_loaded_libraries().items()) if name.startswith(stem + ".so")), None)


def _distributions() -> Dict[str, str]:
    """Return the version of every installed distribution by its normalised name; of one installed twice, both."""
    found: Dict[str, Set[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(distribution.version)
    return {name: " and ".join(sorted(versions)) for name, versions in found.items()}


def _nccl() -> Optional[str]:
    """Ask the loaded NCCL for its version; None where none is loaded, as in a CPU build."""
    path = _library("libnccl")
    if path is None:
        return None
    number = ctypes.c_int()
    status = ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
    if status != 0:
        raise RuntimeError(f"ncclGetVersion returned {status}")
    # 2.9 and later count 10000 a major and 100 a minor version; earlier ones 1000 and 100.
    scale = 10000 if number.value >= 10000 else 1000
    return f"{number.value // scale}.{number.value % scale // 100}.{number.value % 100}"


def _architectures() -> List[str]:
    """Return the GPU architectures torch was compiled for; unlike get_arch_list this needs no GPU."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)  # noqa: SLF001
    return sorted((flags() or "").split()) if flags else []


def observe() -> Dict[str, Any]:
    """Return the facts; one that cannot be found out is absent from `facts` and explained in `errors`."""
    facts: Dict[str, Any] = {}
    errors: Dict[str, str] = {}

    def record(name: str, look: Callable[[], Any]) -> None:
        try:
            facts[name] = look()
        except BaseException as error:  # noqa: BLE001 (whatever breaks is itself a finding)
            errors[name] = "".join(traceback.format_exception_only(type(error), error)).strip()

    record("python", lambda: "{}.{}".format(*sys.version_info[:2]))
    record("python_full", platform.python_version)
    record("executable", lambda: sys.executable)
    record("machine", platform.machine)
    record("packages", _distributions)

    def torch_version() -> str:
        import torch

        return str(torch.__version__)

    def torch_cuda() -> Optional[str]:
        import torch

        return None if torch.version.cuda is None else str(torch.version.cuda)

    def cudnn_number() -> Optional[int]:
        import torch

        number = torch.backends.cudnn.version()
        return None if number is None else int(number)

    record("torch", torch_version)
    record("cuda", torch_cuda)
    record("cudnn_number", cudnn_number)
    record("nccl", _nccl)
    record("architectures", _architectures)
    record(
        "libraries",
        lambda: {stem: _library(stem) for stem in ("libtorch", "libcudart", "libcudnn", "libnccl", "libcublas")},
    )
    return {"schema": SCHEMA, "facts": facts, "errors": errors}


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as output:  # noqa: PTH123 (Python 3.9, one line)
        json.dump(observe(), output, indent=2, sort_keys=True)
