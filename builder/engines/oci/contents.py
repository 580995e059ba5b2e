"""What takes the space in a layer: bytes of its files by the package that brings them, counted once and remembered."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import source_from_cache
from pathlib import Path

from builder.layout import Layer, canonical_json
from builder.store import Store, write_atomically

SCHEMA = 1
WHEEL, DEB = "pypi", "deb"
"""Where a package comes from: names of it begin so, as in pypi/torch."""
NOBODY = ""
"""What stands for the package of files that no package brings."""
_LIST = re.compile(r"var/lib/dpkg/info/(?P<package>[^/:]+)(?::[a-z0-9-]+)?\.list")
"""Where dpkg says which files a package brought."""
_MOST_LISTED = 16 << 20
"""Bytes of the longest such list that is read; that of a large package has one."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Bytes of files, unpacked, by package: as in "pypi/torch", "deb/gcc-12", or NOBODY."""

    packages: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.packages.values())


class Tally:
    """Counts the files of one layer while somebody walks through its tar."""

    def __init__(self, owners: Mapping[str, str] | None = None) -> None:
        """Count; `owners` says, by path, whose files are that no list in the layer names, and their bytecode."""
        self._owners = owners or {}
        self._sizes: dict[str, int] = {}
        self._listed: dict[str, str] = {}

    def add(self, entry: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Take the next entry, before the one after it is read."""
        if not entry.isreg():
            return
        path = entry.name.removeprefix("./").strip("/")
        self._sizes[path] = entry.size
        found = _LIST.fullmatch(path)
        if found and entry.size <= _MOST_LISTED:
            file = archive.extractfile(entry)
            assert file is not None, "a regular file has content"
            for line in file.read().decode("utf-8", "replace").splitlines():
                self._listed.setdefault(line.strip("/"), f"{DEB}/{found['package']}")

    def contents(self) -> Contents:
        """Return what was counted."""
        packages: Counter[str] = Counter()
        for path, size in self._sizes.items():
            packages[self._owner(path)] += size
        return Contents(packages=dict(packages))

    def _owner(self, path: str) -> str:
        # Lists say /lib/x of what lies in /usr/lib/x since /lib is a link.
        listed = self._listed.get(path) or self._listed.get(path.removeprefix("usr/"))
        return listed or self._owners.get(path) or self._owners.get(_source(path), NOBODY)


def _source(path: str) -> str:
    """Return the path of what a file of bytecode was compiled from; empty if it is none."""
    try:
        return source_from_cache(path)
    except ValueError:
        return ""


def remember(store: Store, layer: Layer, contents: Contents) -> None:
    """Keep what is in a layer, however that is compressed."""
    document = {"schema": SCHEMA, "packages": dict(contents.packages)}
    write_atomically(_path(store, layer), canonical_json(document))


def recall(store: Store, layer: Layer) -> Contents | None:
    """Return what is in a layer, None if that was not counted yet."""
    try:
        document = json.loads(_path(store, layer).read_bytes())
        if document["schema"] != SCHEMA:
            return None
        return Contents(packages={str(name): int(size) for name, size in document["packages"].items()})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _path(store: Store, layer: Layer) -> Path:
    return store.root / "contents" / f"{layer.diff_id.removeprefix('sha256:')}.json"
