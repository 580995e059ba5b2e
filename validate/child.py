"""The process of one check: CUDA errors stick to a process, libraries crash, drivers hang; each check has its own.

What it sees goes through a pipe, a JSON document a line, as it is seen; what the libraries print goes elsewhere.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import math
import os
import signal
import sys
import traceback
from typing import Any, Mapping, Sequence

from validate.check import Probe, Request, SkippedError, StoppedError, load

CODE = "import sys; sys.path.insert(0, sys.argv[1]); from validate.child import main; main(sys.argv[2:])"
"""What Python is started with: `python -c CODE ROOT CHECK DESCRIPTOR REQUEST`. Unlike -I it leaves the user's own
settings (PYTHONPATH, the user's site-packages) in force: they are part of what is validated."""

_OUR_MISTAKES = (LookupError, TypeError, AttributeError, NameError, AssertionError, ValueError)
"""Raised in a line of ours, these mean that the check is wrong; raised in a library they are a finding."""


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a value as JSON can hold it: no NaN, which JSON does not know, and no text that is no UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _end_with_the_suite() -> None:
    """Have the kernel end this process if the suite is killed: in a session of its own, no signal would reach it."""
    with contextlib.suppress(Exception):  # not everywhere is there a prctl, nor ctypes
        ctypes = importlib.import_module("ctypes")
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1: PR_SET_PDEATHSIG


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.dirname(__file__) in frames[-1].filename  # noqa: PTH120 (of a file in a zip)


def main(arguments: Sequence[str]) -> None:
    """Run one check: its id, the descriptor that takes what it sees, the request as JSON."""
    name, descriptor, request = arguments
    # Not for what a check starts: a process that outlives it would keep the pipe open.
    os.set_inheritable(int(descriptor), False)  # noqa: FBT003 (no keywords)
    _end_with_the_suite()
    # os.fdopen would buffer: what was seen before a crash would be lost.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)

    def report(document: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(document), allow_nan=False).encode() + b"\n"
        while line:
            line = line[os.write(int(descriptor), line) :]

    probe = Probe(Request.from_json(json.loads(request)), report)
    try:
        load()[name].body(probe)
    except SkippedError as skipped:
        report({"skip": skipped.reason.value, "detail": skipped.detail})
    except StoppedError:
        pass
    except BaseException as error:  # noqa: BLE001 (whatever a library raises is a result)
        traceback.print_exc()
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        report({"raised": text, "ours": isinstance(error, _OUR_MISTAKES) and _raised_here(error)})
    report({"end": True})
    sys.stdout.flush()
    sys.stderr.flush()
    # Finalisers of CUDA libraries hang or crash at times; they are not what the check is about.
    os._exit(0)
