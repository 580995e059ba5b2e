"""The difference of two file trees: laid on the lower one it gives the upper one, and it holds nothing else."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import tar
from builder.difference import WHITEOUT, difference
from builder.errors import CellFailedError
from builder.tar import Entry, Kind, file_entry

OLD, OF_UPPER, EPOCH = 1_600_000_000, 1_650_000_000, 1_700_000_000

# --------------------------------------------------------------------------- a file system that applies layers


@dataclass
class Inode:
    """A file, whatever its names, or a directory with its own."""

    about: Entry
    children: dict[str, Inode] = field(default_factory=dict)


def about(entry: Entry) -> Entry:
    """Return what stands in an inode: all of the entry but its name; the content as bytes."""
    data = entry.read() if entry.content is not None else b""
    return replace(entry, path="-", size=0, content=None, xattrs={**entry.xattrs, "data": data})


class Root:
    """Applies layers as image-spec's layer.md says: what is replaced is removed first, unless both are directories."""

    def __init__(self) -> None:
        self.inode = Inode(Entry(path="-", kind=Kind.DIRECTORY, mode=0o755))

    def directory(self, path: str) -> dict[str, Inode]:
        inode = self.inode
        for part in PurePosixPath(path).parts[:-1]:
            inode = inode.children[part]  # a reader that made what is missing would give it attributes of its own
            assert inode.about.kind is Kind.DIRECTORY, path
        return inode.children

    def apply(self, layer: Sequence[Entry]) -> None:
        written: dict[str, Inode] = {}
        for entry in layer:
            name = PurePosixPath(entry.path).name
            if name.startswith(WHITEOUT):
                assert (entry.kind, entry.size) == (Kind.FILE, 0)
                del self.directory(entry.path)[name.removeprefix(WHITEOUT)]
        for entry in layer:
            name = PurePosixPath(entry.path).name
            assert all(str(parent) in written for parent in list(PurePosixPath(entry.path).parents)[:-1]), entry.path
            if name.startswith(WHITEOUT):
                continue
            into = self.directory(entry.path)
            if entry.kind is Kind.HARDLINK:
                into[name] = written[entry.target]  # in this layer, and before its link
            elif entry.kind is Kind.DIRECTORY and name in into and into[name].about.kind is Kind.DIRECTORY:
                into[name] = Inode(about(entry), into[name].children)
            else:
                into[name] = Inode(about(entry))
            written[entry.path] = into[name]

    def files(self) -> tuple[dict[str, Entry], set[frozenset[str]]]:
        """Return what each path is, and the names of each file that has several."""
        found: dict[str, Entry] = {}
        names: dict[int, set[str]] = {}
        todo = [("", self.inode)]
        while todo:
            path, inode = todo.pop()
            for name, child in inode.children.items():
                found[f"{path}{name}"] = child.about
                names.setdefault(id(child), set()).add(f"{path}{name}")
                todo.append((f"{path}{name}/", child))
        return found, {frozenset(group) for group in names.values() if len(group) > 1}


def root_of(*layers: Sequence[Entry]) -> Root:
    root = Root()
    for layer in layers:
        root.apply(layer)
    return root


def timeless(files: Mapping[str, Entry]) -> dict[str, Entry]:
    return {path: replace(entry, mtime=0) for path, entry in files.items()}


# --------------------------------------------------------------------------- trees

# Few paths, so that two trees meet; one sorts between a directory and what is in it, and one is no UTF-8.
PATHS = ("a", "a-", "a/a", "a/a/b", "a/b", "a/b/a", "a/b/b", "b", "b/a", "b/a/\udcff", "b/c", "c")


def _nodes() -> list[tuple[Entry, int | None]]:
    """Return what may be at a path, and the number of a file that may have several names."""
    plain = file_entry("-", b"x", mode=0o755)
    files = [plain, replace(plain, uid=1000), replace(plain, xattrs={"user.a": b"\0"})]
    files += [file_entry("-", content, mode=mode) for content, mode in ((b"y", 0o755), (b"", 0o755), (b"x", 0o4755))]
    others = [
        Entry(path="-", kind=Kind.SYMLINK, mode=0o777, target="a"),
        Entry(path="-", kind=Kind.SYMLINK, mode=0o777, target="../b"),
        Entry(path="-", kind=Kind.CHARACTER_DEVICE, mode=0o600, device=(1, 3)),
        Entry(path="-", kind=Kind.FIFO, mode=0o600),
    ]
    directories = [Entry(path="-", kind=Kind.DIRECTORY, mode=mode, uid=uid) for mode, uid in ((0o755, 0), (0o1777, 9))]
    linked = [(plain, 1), (file_entry("-", b"y"), 1), (plain, 2), (others[0], 3)]
    return [*((entry, None) for entry in (*files, *others, *directories * 5)), *linked * 2]


NODES = _nodes()


def entries_of(nodes: Mapping[str, tuple[Entry, int | None]], *, mtime: int) -> list[Entry]:
    """Return the entries of a tree in the order and form that bases have: links go to the first of a file's names."""
    entries: dict[str, Entry] = {}
    first: dict[int, Entry] = {}
    for path in sorted(nodes, key=os.fsencode):
        parent = path.rpartition("/")[0]
        if parent and (parent not in entries or entries[parent].kind is not Kind.DIRECTORY):
            continue
        node, number = nodes[path]
        entry = replace(node, path=path, mtime=mtime)
        if number in first:
            to = first[number]
            entry = replace(to, path=path, kind=Kind.HARDLINK, target=to.path, size=0, content=None)
        elif number is not None:
            first[number] = entry
        entries[path] = entry
    return list(entries.values())


TREES = st.dictionaries(st.sampled_from(PATHS), st.sampled_from(range(len(NODES))).map(NODES.__getitem__))
LOWER = TREES.map(lambda tree: entries_of(tree, mtime=OLD))
UPPER = TREES.map(lambda tree: entries_of(tree, mtime=OF_UPPER))


# --------------------------------------------------------------------------- what holds for all


@settings(max_examples=200, deadline=None)
@given(LOWER, UPPER)
def test_laid_on_the_lower_it_gives_the_upper(lower: list[Entry], upper: list[Entry]) -> None:
    layer = difference(lower, upper, epoch=EPOCH)
    got, linked = root_of(lower, layer).files()
    want, want_linked = root_of(upper).files()
    assert timeless(got) == timeless(want)
    assert linked == want_linked


@settings(deadline=None)
@given(LOWER, UPPER)
def test_what_is_new_is_dated_and_what_is_old_keeps_its_time(lower: list[Entry], upper: list[Entry]) -> None:
    layer = difference(lower, upper, epoch=EPOCH)
    before, _ = root_of(lower).files()
    after, _ = root_of(lower, layer).files()
    for path, entry in after.items():
        old = before.get(path)
        if entry.mtime == EPOCH:
            assert entry.kind is not Kind.DIRECTORY or old is None or replace(old, mtime=EPOCH) != entry
        else:
            assert entry == old
            assert entry.mtime == OLD
    assert {entry.mtime for entry in layer if entry.path.rpartition("/")[2].startswith(WHITEOUT)} <= {EPOCH}


@settings(deadline=None)
@given(LOWER, UPPER)
def test_nothing_is_in_it_that_need_not_be(lower: list[Entry], upper: list[Entry]) -> None:
    layer = difference(lower, upper, epoch=EPOCH)
    paths = [entry.path for entry in layer]
    assert paths == sorted(set(paths), key=os.fsencode)
    before, before_linked = root_of(lower).files()
    after, after_linked = root_of(upper).files()
    several = {path for names in before_linked | after_linked for path in names}
    for entry in layer:
        parent, _, name = entry.path.rpartition("/")
        if name.startswith(WHITEOUT):
            gone = f"{parent}/{name.removeprefix(WHITEOUT)}".lstrip("/")
            assert gone in before
            assert gone not in after
        elif entry.path not in several and timeless(before).get(entry.path) == timeless(after)[entry.path]:
            assert entry.kind is Kind.DIRECTORY
            assert any(path.startswith(f"{entry.path}/") for path in paths), "a directory is there for what is in it"


@settings(deadline=None)
@given(LOWER)
def test_equal_trees_differ_in_nothing(lower: list[Entry]) -> None:
    later = [replace(entry, mtime=OF_UPPER) for entry in lower]
    assert difference(lower, later, epoch=EPOCH) == []


@settings(deadline=None)
@given(LOWER, UPPER)
def test_the_same_trees_give_the_same_bytes(lower: list[Entry], upper: list[Entry]) -> None:
    one = b"".join(tar.stream(difference(lower, upper, epoch=EPOCH)))
    assert one == b"".join(tar.stream(difference(reversed(lower), upper, epoch=EPOCH)))
    with tarfile.open(fileobj=io.BytesIO(one)) as members:
        assert len(members.getmembers()) == len(difference(lower, upper, epoch=EPOCH))


# --------------------------------------------------------------------------- by hand


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path=path, kind=Kind.DIRECTORY, mode=mode, mtime=OLD)


def link(path: str, target: str) -> Entry:
    return Entry(path=path, kind=Kind.HARDLINK, mode=0o644, target=target, mtime=OLD)


def layer_of(lower: Iterable[Entry], upper: Iterable[Entry]) -> list[tuple[str, Kind, int]]:
    return [(entry.path, entry.kind, entry.mtime) for entry in difference(lower, upper, epoch=EPOCH)]


def test_a_directory_comes_with_its_own_attributes_and_time() -> None:
    lower = [directory("tmp", 0o1777), directory("usr")]
    upper = [*lower, file_entry("tmp/new", b"")]
    found = difference(lower, upper, epoch=EPOCH)
    assert [(entry.path, entry.mode, entry.mtime) for entry in found] == [
        ("tmp", 0o1777, OLD),
        ("tmp/new", 0o644, EPOCH),
    ]


def test_what_is_gone_is_said_once() -> None:
    lower = [directory("d"), directory("d/gone"), file_entry("d/gone/x", b""), file_entry("y", b"")]
    assert layer_of(lower, [directory("d")]) == [
        (".wh.y", Kind.FILE, EPOCH),
        ("d", Kind.DIRECTORY, OLD),
        ("d/.wh.gone", Kind.FILE, EPOCH),
    ]


def test_a_file_in_the_place_of_a_directory_needs_no_whiteout() -> None:
    tree, file = [directory("d"), file_entry("d/x", b"")], [file_entry("d", b"")]
    assert layer_of(tree, file) == [("d", Kind.FILE, EPOCH)]
    assert layer_of(file, tree) == [("d", Kind.DIRECTORY, EPOCH), ("d/x", Kind.FILE, EPOCH)]


def test_a_new_name_of_an_old_file_brings_the_file_along() -> None:
    lower = [file_entry("a", b"x"), file_entry("b", b"x")]
    assert layer_of(lower, [file_entry("a", b"x"), file_entry("b", b"x"), link("c", "b")]) == [
        ("b", Kind.FILE, EPOCH),
        ("c", Kind.HARDLINK, EPOCH),
    ]


def test_two_files_that_were_one_are_two() -> None:
    lower = [file_entry("a", b"x"), link("b", "a"), link("c", "a")]
    apart = [file_entry("a", b"x"), file_entry("b", b"x"), link("c", "b")]
    assert [path for path, *_ in layer_of(lower, apart)] == ["a"], "the pair stays"
    assert layer_of(lower, [file_entry("b", b"x"), link("c", "b")]) == [(".wh.a", Kind.FILE, EPOCH)]


def test_a_symbolic_link_is_not_followed() -> None:
    lower = [Entry(path="l", kind=Kind.SYMLINK, mode=0o777, target="d"), directory("d"), file_entry("d/x", b"1")]
    upper = [replace(lower[0], target="e"), *lower[1:]]
    assert layer_of(lower, upper) == [("l", Kind.SYMLINK, EPOCH)]


@pytest.mark.parametrize("name", [".wh.x", ".wh..wh..opq", ".wh."])
def test_a_name_that_readers_would_take_for_a_whiteout_is_refused(name: str) -> None:
    for lower, upper in (([], [file_entry(name, b"")]), ([file_entry(name, b"")], [])):
        with pytest.raises(CellFailedError, match="no layer can hold"):
            difference(lower, upper, epoch=EPOCH)
