"""What is installed in an image, as its own bytes say: every `*.dist-info`, every dpkg entry, every program of ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from email.parser import BytesHeaderParser
from pathlib import PurePosixPath
from typing import Any, Self

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from builder import memory
from builder.debian import parse_stanzas
from builder.difference import WHITEOUT
from builder.engines.oci.entries import entries
from builder.engines.oci.install import ROOT
from builder.layout import Layer
from builder.render import PROGRAM
from builder.store import Store

SCHEMA = 2
"""Of what is found in a layer. Raise it with every change of that: what was found before is no longer known then."""
DIST_INFO = ".dist-info"
METADATA = "METADATA"
HEAD = 1 << 20
"""Bytes of a METADATA file in which its name and version are looked for."""

_KIND = "installed"
"""What is remembered of layers, as the store calls it."""
_OPAQUE = f"{WHITEOUT}{WHITEOUT}.opq"
"""In a directory: nothing that lower layers have there shows."""
_STATUS = "var/lib/dpkg/status"
_LIST = re.compile(r"var/lib/dpkg/info/[^/]+\.list")
"""Where dpkg says which files a package brought."""
_PROGRAMS = f"{ROOT}/bin/{PROGRAM}"
_GONE = ("not-installed", "config-files")
"""Last word of a dpkg status that means that nothing of the package is there but, perhaps, its configuration."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A Python package as a `*.dist-info` directory says it."""

    path: str
    """That directory, in the image."""
    name: str
    version: str
    layer: str
    """Digest of the layer in which it lies."""


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """A Debian package as dpkg has noted it."""

    name: str
    version: str
    architecture: str
    layer: str
    """Digest of the lowest layer from which on it is there in this version."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of torchyard's."""

    path: str
    sha256: str
    layer: str


@dataclass(frozen=True, kw_only=True)
class Installed:
    """All that was found; of what upper layers replace or take away nothing is left."""

    distributions: tuple[Distribution, ...] = ()
    """Without those that a Debian package brought."""
    debian: tuple[DebianPackage, ...] = ()
    programs: tuple[Program, ...] = ()


def dist_info(path: str) -> str | None:
    """Return the `*.dist-info` directory that a path lies in, or is; None for most."""
    if DIST_INFO not in path:
        return None
    parts = path.split("/")
    return next(("/".join(parts[: n + 1]) for n, part in enumerate(parts) if part.endswith(DIST_INFO)), None)


def identity(directory: str, metadata: bytes) -> tuple[str, str]:
    """Return name and version of a distribution; what its metadata does not say is taken from its directory's name."""
    headers = BytesHeaderParser().parsebytes(metadata[:HEAD])
    name, _, version = directory.rpartition("/")[2].removesuffix(DIST_INFO).partition("-")
    name, version = str(headers.get("Name") or name).strip(), str(headers.get("Version") or version).strip()
    with contextlib.suppress(InvalidVersion):
        version = str(Version(version))
    return canonicalize_name(name), version


def installed(store: Store, layers: Iterable[Layer], *, anew: bool = False) -> Installed:
    """Return what is installed in an image of `layers`, the lowest first.

    What was found in a layer is remembered, and not looked for again in any image unless it shall be, `anew`. Raises
    HashMismatchError or SourceError if something was damaged in the store or lost, CellFailedError if a layer cannot be
    read.
    """
    tree = _Tree()
    for layer in layers:
        tree.lay(layer.blob.digest, _findings(store, layer, anew=anew))
    return tree.installed()


# ----------------------------------------------------------------------------------------------------
# One layer


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What one layer says, whatever lies below it."""

    directories: list[str]
    """Those that count: a `*.dist-info`, or one in the place of a file that is read."""
    others: list[tuple[str, Any]]
    """The path of everything else, for it may take the place of a directory below, and what it says; mostly None."""

    def dumps(self) -> bytes:
        # Escaped: names in a tar may be no UTF-8.
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def loads(cls, content: bytes) -> Self:
        found = json.loads(content)
        return cls(directories=found["directories"], others=[(path, says) for path, says in found["others"]])


def _findings(store: Store, layer: Layer, *, anew: bool) -> _Findings:
    key = {"schema": SCHEMA, "layer": layer.blob.digest}
    known = None if anew else memory.recall(store, _KIND, key)
    if known is not None:
        return _Findings.loads(known)
    found = _Findings(directories=[], others=[])
    for entry in entries(store, layer, _is_read):
        if not entry.is_directory:
            found.others.append((entry.path, None if entry.content is None else _said(entry.path, entry.content)))
        elif dist_info(entry.path) is not None or _is_read(entry.path):
            found.directories.append(entry.path)
    memory.remember(store, _KIND, key, found.dumps())
    return found


def _is_read(path: str) -> bool:
    """Tell whether the content of a file says what is installed."""
    return (
        (path.endswith(f"{DIST_INFO}/{METADATA}") and path == f"{dist_info(path)}/{METADATA}")
        or path == _STATUS
        or _LIST.fullmatch(path) is not None
        or path.startswith(_PROGRAMS)
    )


def _said(path: str, content: bytes) -> object:
    """Return what a file that is read says, as JSON has it."""
    if path == _STATUS:
        return [
            [stanza["Package"], stanza.get("Version", ""), stanza.get("Architecture", "")]
            for stanza in parse_stanzas(content.decode("utf-8", "replace"))
            if stanza.get("Package") and stanza.get("Status", "").rpartition(" ")[2] not in _GONE
        ]
    if _LIST.fullmatch(path):
        lines = (line.strip("/") for line in content.decode("utf-8", "replace").splitlines())
        return sorted({owned for line in lines if (owned := dist_info(line)) is not None})
    if path.startswith(_PROGRAMS):
        return hashlib.sha256(content).hexdigest()
    return list(identity(path.rpartition("/")[0], content))


# ----------------------------------------------------------------------------------------------------
# Layer upon layer


@dataclass(kw_only=True)
class _Tree:
    """The files that matter, as they are seen from above; each with what it says, and the layer it comes from."""

    files: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """A `*.dist-info` directory is one of them, and says nothing."""
    debian: dict[tuple[str, str], DebianPackage] = field(default_factory=dict)

    def lay(self, layer: str, found: _Findings) -> None:
        """Put a layer on top."""
        above = {str(parent) for path in self.files for parent in PurePosixPath(path).parents}
        status = self.files.get(_STATUS)
        new: dict[str, tuple[Any, str]] = {}
        gone: list[str] = []
        for path in found.directories:
            self._put(path, layer, new, gone)
        for path, says in found.others:
            directory, _, name = path.rpartition("/")
            if name == _OPAQUE:
                gone.append(f"{directory}/")
            elif name.startswith(WHITEOUT):
                gone.append(f"{directory}/{name.removeprefix(WHITEOUT)}".lstrip("/"))
            else:
                if path in above:
                    gone.append(path)
                self._put(path, layer, new, gone)
                if says is not None:
                    new[path] = (says, layer)
        self._take_away(gone)
        self.files |= new
        if self.files.get(_STATUS) != status:
            self._read_status(layer)

    def _put(self, path: str, layer: str, new: dict[str, tuple[Any, str]], gone: list[str]) -> None:
        """Note what an entry brings, and what it takes the place of, whatever it is."""
        info = dist_info(path)
        if path in self.files and path != info:
            gone.append(path)
        if info is not None:
            new.setdefault(info, (None, layer))

    def _take_away(self, gone: Iterable[str]) -> None:
        for path in gone:
            below = f"{path.rstrip('/')}/".lstrip("/")
            for other in [other for other in self.files if other == path or other.startswith(below)]:
                del self.files[other]

    def _read_status(self, layer: str) -> None:
        packages, _ = self.files.get(_STATUS, ((), layer))
        now: dict[tuple[str, str], DebianPackage] = {}
        for name, version, architecture in packages:
            before = self.debian.get((name, architecture))
            now[name, architecture] = (
                before
                if before and before.version == version
                else DebianPackage(name=name, version=version, architecture=architecture, layer=layer)
            )
        self.debian = now

    def installed(self) -> Installed:
        """Return what is there in the end."""
        listed = {owned for path, (says, _) in self.files.items() if _LIST.fullmatch(path) for owned in says}
        distributions = []
        for path, nothing in sorted(self.files.items()):
            if dist_info(path) == path and path not in listed:
                says, layer = self.files.get(f"{path}/{METADATA}", nothing)
                name, version = says or identity(path, b"")
                distributions.append(Distribution(path=f"/{path}", name=name, version=version, layer=layer))
        return Installed(
            distributions=tuple(distributions),
            debian=tuple(self.debian[key] for key in sorted(self.debian)),
            programs=tuple(
                Program(path=f"/{path}", sha256=sha256, layer=layer)
                for path, (sha256, layer) in sorted(self.files.items())
                if path.startswith(_PROGRAMS)
            ),
        )
