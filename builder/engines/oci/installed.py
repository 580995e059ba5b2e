"""What is installed in an image, as its own bytes say: every `*.dist-info`, every dpkg entry, every program of ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from email.parser import BytesHeaderParser
from pathlib import Path, PurePosixPath

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from builder.debian import parse_stanzas
from builder.difference import WHITEOUT
from builder.engines.oci.entries import Entry, entries
from builder.engines.oci.install import ROOT
from builder.layout import Layer, canonical_json
from builder.render import PROGRAM
from builder.store import Store, write_atomically

SCHEMA = 1
DIST_INFO = ".dist-info"
METADATA = "METADATA"
HEAD = 1 << 20
"""Bytes of a METADATA file in which its name and version are looked for."""

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


def installed(store: Store, layers: Iterable[Layer]) -> Installed:
    """Return what is installed in an image of `layers`, the lowest first; remembered, so that asking again is free.

    Raises HashMismatchError or SourceError if something was damaged in the store or lost, CellFailedError if a layer
    cannot be read.
    """
    layers = tuple(layers)
    key = {"schema": SCHEMA, "layers": [[layer.blob.digest, layer.diff_id] for layer in layers]}
    path = store.root / "installed" / f"{hashlib.sha256(canonical_json(key)).hexdigest()}.json"
    known = _recalled(path)
    if known is None:
        known = _walked(store, layers)
        write_atomically(path, canonical_json(asdict(known)))
    return known


def _recalled(path: Path) -> Installed | None:
    try:
        found = json.loads(path.read_bytes())
        return Installed(
            distributions=tuple(Distribution(**one) for one in found["distributions"]),
            debian=tuple(DebianPackage(**one) for one in found["debian"]),
            programs=tuple(Program(**one) for one in found["programs"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


# ----------------------------------------------------------------------------------------------------
# Layer upon layer


def _walked(store: Store, layers: Iterable[Layer]) -> Installed:
    tree = _Tree()
    for layer in layers:
        tree.lay(layer.blob.digest, entries(store, layer, _is_read))
    return tree.installed()


def _is_read(path: str) -> bool:
    """Tell whether the content of a file says what is installed."""
    return (
        (path.endswith(f"{DIST_INFO}/{METADATA}") and path == f"{dist_info(path)}/{METADATA}")
        or path == _STATUS
        or _LIST.fullmatch(path) is not None
        or path.startswith(_PROGRAMS)
    )


@dataclass(kw_only=True)
class _Tree:
    """The files that matter, as they are seen from above; each with its content, and the layer it comes from."""

    files: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """A `*.dist-info` directory is one of them, with no content."""
    debian: dict[tuple[str, str], DebianPackage] = field(default_factory=dict)

    def lay(self, layer: str, found: Iterable[Entry]) -> None:
        """Put a layer on top."""
        above = {str(parent) for path in self.files for parent in PurePosixPath(path).parents}
        status = self.files.get(_STATUS)
        new: dict[str, tuple[bytes, str]] = {}
        gone: list[str] = []
        for entry in found:
            directory, _, name = entry.path.rpartition("/")
            if name == _OPAQUE:
                gone.append(f"{directory}/")
                continue
            if name.startswith(WHITEOUT):
                gone.append(f"{directory}/{name.removeprefix(WHITEOUT)}".lstrip("/"))
                continue
            info = dist_info(entry.path)
            if (entry.path in self.files and entry.path != info) or (entry.path in above and not entry.is_directory):
                # Whatever it is, it takes the place of what was there.
                gone.append(entry.path)
            if info is not None:
                new.setdefault(info, (b"", layer))
            if entry.content is not None:
                new[entry.path] = (entry.content, layer)
        self._take_away(gone)
        self.files |= new
        if self.files.get(_STATUS) != status:
            self._read_status(layer)

    def _take_away(self, gone: Iterable[str]) -> None:
        for path in gone:
            below = f"{path.rstrip('/')}/".lstrip("/")
            for other in [other for other in self.files if other == path or other.startswith(below)]:
                del self.files[other]

    def _read_status(self, layer: str) -> None:
        content, _ = self.files.get(_STATUS, (b"", layer))
        now: dict[tuple[str, str], DebianPackage] = {}
        for stanza in parse_stanzas(content.decode("utf-8", "replace")):
            name, architecture = stanza.get("Package", ""), stanza.get("Architecture", "")
            if not name or stanza.get("Status", "").rpartition(" ")[2] in _GONE:
                continue
            one = DebianPackage(name=name, version=stanza.get("Version", ""), architecture=architecture, layer=layer)
            before = self.debian.get((name, architecture))
            now[name, architecture] = before if before and before.version == one.version else one
        self.debian = now

    def installed(self) -> Installed:
        """Return what is there in the end."""
        listed = {
            owned
            for path, (content, _) in self.files.items()
            if _LIST.fullmatch(path)
            for line in content.decode("utf-8", "replace").splitlines()
            if (owned := dist_info(line.strip("/"))) is not None
        }
        distributions = []
        for path, nothing in sorted(self.files.items()):
            if dist_info(path) == path and path not in listed:
                metadata, layer = self.files.get(f"{path}/{METADATA}", nothing)
                name, version = identity(path, metadata)
                distributions.append(Distribution(path=f"/{path}", name=name, version=version, layer=layer))
        return Installed(
            distributions=tuple(distributions),
            debian=tuple(self.debian[key] for key in sorted(self.debian)),
            programs=tuple(
                Program(path=f"/{path}", sha256=hashlib.sha256(content).hexdigest(), layer=layer)
                for path, (content, layer) in sorted(self.files.items())
                if path.startswith(_PROGRAMS)
            ),
        )
