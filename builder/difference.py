"""What a layer must hold so that one file tree becomes another, by the rules of OCI image layers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from builder.errors import CellFailedError
from builder.tar import Entry, Kind

WHITEOUT = ".wh."
"""How the name of an empty file begins that stands for a path which is gone; OCI image-spec, layer.md, "Whiteouts"."""

Tree = Mapping[str, Entry]


def difference(lower: Iterable[Entry], upper: Iterable[Entry], *, epoch: int) -> list[Entry]:
    """Return, in the order of their paths, the entries of a layer that turns `lower` into `upper`.

    It holds what is new or changed, dated `epoch`, a whiteout for what is gone, and the directories above these with
    their attributes, since some readers would make missing ones with their own; those that are as they were keep their
    time, and time alone is no change. Names of one file (hard links) are all in it or none of them: some readers look
    for a link's target in the same layer only. What takes the place of a directory or is replaced by one needs no
    whiteout: applying an entry removes what was there, unless both are directories. So no directory is opaque.

    Both trees name every directory, and link to the first of a file's names, as `rootfs.canonical` leaves them. Raises
    CellFailedError if a file's name is that of a whiteout.
    """
    before, after = {entry.path: entry for entry in lower}, {entry.path: entry for entry in upper}
    for path in (*before, *after):
        _require_plain(path)
    same = {*_same_directories(before, after), *_same_files(before, after)}
    layer = {path: replace(entry, mtime=epoch) for path, entry in after.items() if path not in same}
    for path in before:
        if path not in after and _is_directory(before, _parent(path)) and _is_directory(after, _parent(path)):
            gone = str(PurePosixPath(path).with_name(f"{WHITEOUT}{_name(path)}"))
            layer[gone] = Entry(path=gone, kind=Kind.FILE, mode=0, mtime=epoch, content=lambda: ())
    for path in tuple(layer):
        while (path := _parent(path)) and path not in layer:
            layer[path] = before[path]
    return [layer[path] for path in sorted(layer, key=os.fsencode)]


def _require_plain(path: str) -> None:
    if _name(path).startswith(WHITEOUT):
        raise CellFailedError(
            f"no layer can hold /{path}",
            why=f"in a layer, a name that begins with {WHITEOUT} says that another file is gone",
            tries=("leave out the package that has it",),
        )


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _is_directory(tree: Tree, path: str) -> bool:
    """Tell whether `path` is a directory in the tree; the empty one is its root."""
    return not path or (path in tree and tree[path].kind is Kind.DIRECTORY)


def _same_directories(before: Tree, after: Tree) -> Iterator[str]:
    for path, entry in after.items():
        if entry.kind is Kind.DIRECTORY and path in before and _alike(before[path], entry):
            yield path


def _same_files(before: Tree, after: Tree) -> Iterator[str]:
    """Yield the names whose file stays the one that `before` has under them.

    One file of `before` may have become several of the same content. Only one of these can stay: left alone, their
    names would still be one file.
    """
    earlier = {path: file for file, names in _files(before).items() for path in names}
    heirs: dict[str, list[list[str]]] = defaultdict(list)
    for file, names in _files(after).items():
        origins = {earlier.get(path) for path in names}
        if len(origins) == 1 and (origin := origins.pop()) is not None and _alike(before[origin], after[file]):
            heirs[origin].append(names)
    for candidates in heirs.values():
        yield from max(candidates, key=len)


def _files(tree: Tree) -> dict[str, list[str]]:
    """Return the names of everything but directories by the name that has the content."""
    files: dict[str, list[str]] = defaultdict(list)
    for path, entry in tree.items():
        if entry.kind is not Kind.DIRECTORY:
            files[entry.target if entry.kind is Kind.HARDLINK else path].append(path)
    return files


def _alike(one: Entry, other: Entry) -> bool:
    """Tell whether two entries differ in path and time at most."""
    if (one.kind, one.size) != (other.kind, other.size):
        return False
    if replace(one, path=other.path, mtime=other.mtime, content=other.content) != other:
        return False
    return one.size == 0 or one.read() == other.read()
