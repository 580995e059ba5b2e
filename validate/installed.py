"""What is installed, as the metadata tells it: distributions, the files each one owns, what each one requires."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

_READERS = ("packaging", "pip._vendor.packaging", "setuptools._vendor.packaging")
"""Where the reader of requirements may be: the standard library has none, and nearly every image has one of these."""

ReadRequirement = Callable[[str], Any]


def normal(name: str) -> str:
    """Return a distribution's name as names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Recorded:
    """What a RECORD says of one file."""

    digest: str
    """Its algorithm, "=", and base64 without padding; empty if there is none."""
    size: Optional[int]


@dataclass(frozen=True)
class Installed:
    """One distribution, in one place."""

    name: str
    """Normalised."""
    version: str
    root: str
    """The directory that its files are named from, without links."""
    requires: Tuple[str, ...] = ()
    source: Optional[importlib.metadata.Distribution] = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def files(self) -> Iterator[Tuple[str, Recorded]]:
        """Yield the path of each file of its RECORD; nothing if it has none, as what a Linux distribution packages."""
        text = self.source.read_text("RECORD") if self.source else None
        for row in csv.reader((text or "").splitlines()):
            if row and row[0]:
                _, digest, size, *_ = (*row, "", "")
                path = os.path.normpath(os.path.join(self.root, row[0]))  # noqa: PTH118 (a hundred thousand of them)
                yield path, Recorded(digest, int(size) if size.isdigit() else None)


Owners = Mapping[str, Sequence[Tuple[Installed, Recorded]]]
"""Path → everyone who claims it."""


def distributions() -> List[Installed]:
    """Return every distribution on sys.path, that which is imported first; one found by two ways only once."""
    found: Dict[Tuple[str, str, str], Installed] = {}
    for source in importlib.metadata.distributions():
        name = source.metadata["Name"]
        if name:
            root = os.path.realpath(str(source.locate_file("")))
            one = Installed(normal(name), source.version or "", root, tuple(source.requires or ()), source)
            found.setdefault((one.name, one.version, root), one)
    return list(found.values())


def first_of_each(everything: Sequence[Installed]) -> Dict[str, Installed]:
    """Return the distributions by name; of those with one name the one that is imported."""
    found: Dict[str, Installed] = {}
    for one in everything:
        found.setdefault(one.name, one)
    return found


def owners(everything: Sequence[Installed]) -> Dict[str, List[Tuple[Installed, Recorded]]]:
    """Return who owns which file; bytecode and the metadata itself are left out."""
    found: Dict[str, List[Tuple[Installed, Recorded]]] = {}
    for one in everything:
        for path, recorded in one.files():
            if not path.endswith(".pyc") and ".dist-info/" not in path:
                found.setdefault(path, []).append((one, recorded))
    return found


def disputed(files: Owners) -> Dict[str, Sequence[Tuple[Installed, Recorded]]]:
    """Return the files that distributions of different names claim with different contents."""
    return {
        path: claims
        for path, claims in files.items()
        if len({one.name for one, _ in claims}) > 1 and len({recorded.digest for _, recorded in claims}) > 1
    }


# ----------------------------------------------------------------------------------------------------
# What is required


@dataclass(frozen=True)
class Edge:
    """One requirement that applies here and is not met."""

    name: str
    """Of what is required."""
    requirement: str
    path: Tuple[str, ...]
    """From the root to who requires it, each step as it is written."""
    found: Optional[str]
    """The version that is installed; None if none is."""


@dataclass(frozen=True)
class Closure:
    """Everything that some distributions require, directly or not."""

    names: Set[str]
    broken: Tuple[Edge, ...]
    unreadable: Tuple[str, ...]
    """Requirements and versions that do not follow the standards."""


def requirement_reader() -> Optional[ReadRequirement]:
    """Return what reads a requirement, from wherever the environment has it; None if nowhere."""
    for name in _READERS:
        with contextlib.suppress(ImportError):
            reader: ReadRequirement = importlib.import_module(f"{name}.requirements").Requirement
            return reader
    return None


def closure(roots: Sequence[str], table: Mapping[str, Installed], read: ReadRequirement) -> Closure:
    """Follow what the roots require through what is installed, extras included: pip check does not look at extras."""
    names: Set[str] = set()
    broken: Dict[Tuple[str, str], Edge] = {}
    unreadable: List[str] = []
    seen: Set[Tuple[str, str]] = set()
    todo: List[Tuple[str, str, Tuple[str, ...]]] = [(name, "", (str(table[name]),)) for name in roots if name in table]
    while todo:
        name, extra, path = todo.pop(0)
        names.add(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in table[name].requires:
            try:
                requirement = read(text)
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                    continue
                wanted = normal(requirement.name)
                one = table.get(wanted)
                good = one is not None and requirement.specifier.contains(one.version, prereleases=True)
            except ValueError as error:
                unreadable.append(f"{table[name]}: {text}: {error}")
                continue
            step = text.partition(";")[0].strip()
            if not good:
                broken.setdefault((name, step), Edge(wanted, step, path, one.version if one else None))
            if one is not None:
                todo += [(wanted, inner, (*path, step)) for inner in ("", *sorted(requirement.extras))]
    return Closure(names, tuple(broken.values()), tuple(dict.fromkeys(unreadable)))
