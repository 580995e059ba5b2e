"""What the bytes of a wheel say about versions, caught while they pass by on their way into a layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

SCHEMA = 1
"""Of what is found; a part of the key under which a layer is remembered."""
_KEPT_BYTES = 1 << 20
_OVERLAP = 512
"""Longest text that is looked for across two pieces."""


class Witness(Protocol):
    """Sees the content of one file, in pieces, and says afterwards what it found."""

    def see(self, piece: bytes) -> None:
        """Take the next piece."""

    def facts(self) -> Mapping[str, Any]:
        """Return what was found, by the names that `validate/facts.py` uses; empty if nothing was."""


class _Text:
    """Reads a small text file whole."""

    def __init__(self, read: Callable[[str], Mapping[str, Any]]) -> None:
        self._read = read
        self._content = bytearray()

    def see(self, piece: bytes) -> None:
        if len(self._content) < _KEPT_BYTES:
            self._content += piece

    def facts(self) -> Mapping[str, Any]:
        return self._read(self._content.decode("utf-8", "replace"))


class _Strings:
    """Looks for a pattern in a file of any size, where one of the texts occurs that all matches hold."""

    def __init__(
        self, pattern: re.Pattern[bytes], texts: Sequence[bytes], read: Callable[[set[bytes]], Mapping[str, Any]]
    ) -> None:
        self._pattern, self._texts, self._read = pattern, texts, read
        self._tail = b""
        self._found: set[bytes] = set()

    def see(self, piece: bytes) -> None:
        text = self._tail + piece
        # A search for plain text is many times as fast as one for a pattern.
        if any(one in text for one in self._texts):
            self._found |= {match[1] for match in self._pattern.finditer(text)}
        self._tail = text[-_OVERLAP:]

    def facts(self) -> Mapping[str, Any]:
        return self._read(self._found)


def _torch(text: str) -> Mapping[str, Any]:
    """Read torch/version.py, which its build writes: the version and the CUDA it was built for."""
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]+)? = (?:'([^']+)'|None)", text, re.MULTILINE)
    return ({"torch": version[1]} if version else {}) | ({"cuda": cuda[1]} if cuda else {})


def _cudnn(text: str) -> Mapping[str, Any]:
    """Read cudnn_version.h: the number that cudnnGetVersion() of that release returns."""
    parts = dict(re.findall(r"^#define CUDNN_(MAJOR|MINOR|PATCHLEVEL) (\d+)", text, re.MULTILINE))
    if len(parts) != 3:
        return {}
    major, minor, patch = (int(parts[name]) for name in ("MAJOR", "MINOR", "PATCHLEVEL"))
    # As in the header: from 9.0 on a major version counts 10000, before that 1000.
    return {"cudnn_number": major * (10000 if major >= 9 else 1000) + minor * 100 + patch}


def _nccl(found: set[bytes]) -> Mapping[str, Any]:
    return {"nccl": found.pop().decode()} if len(found) == 1 else {}


def _architectures(found: set[bytes]) -> Mapping[str, Any]:
    """Take the longest list: it is what torch.cuda.get_arch_list() is made of, single names occur elsewhere."""
    return {"architectures": sorted(max(found, key=lambda it: (len(it), it)).decode().split())} if found else {}


_NCCL = re.compile(rb"NCCL version (\d+\.\d+\.\d+)\+cuda")
_ARCHITECTURES = re.compile(rb"((?:(?:sm|compute)_\d+[af]? )*(?:sm|compute)_\d+[af]?)\0")


def witness(path: str) -> Witness | None:
    """Return who shall see the file at `path` (relative to site-packages), None for most files."""
    if path == "torch/version.py":
        return _Text(_torch)
    if path == "torch/lib/libtorch_python.so":
        return _Strings(_ARCHITECTURES, (b"sm_", b"compute_"), _architectures)
    if path == "nvidia/cudnn/include/cudnn_version.h":
        return _Text(_cudnn)
    if path == "nvidia/nccl/lib/libnccl.so.2":
        return _Strings(_NCCL, (b"NCCL version ",), _nccl)
    return None
