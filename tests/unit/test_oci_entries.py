"""Layers are walked through without inflating them, and what is found is what a tar reader finds."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import export, tar
from builder.engines.oci import entries, foundation, recipe
from builder.engines.oci.entries import Entry
from builder.errors import CellFailedError, HashMismatchError, SourceError
from builder.layout import Image, Layer
from builder.store import Store
from tests.support.bases import Ready, damage, directory, layer_of

pytestmark = pytest.mark.usefixtures("compiled_sources")


def image_of(one: Ready) -> Image:
    return export.stored_image(one.store, one.build().digest)


def spliced(one: Ready) -> list[Layer]:
    layers = [layer for layer in image_of(one).layers if recipe.find(one.store, layer.blob.sha256)]
    assert len(layers) > 3, "no layers of wheels, nothing to test"
    return layers


def everything(_: str) -> bool:
    return True


def read_whole(store: Store, layer: Layer) -> list[Entry]:
    """Return what Python's tarfile finds in the inflated layer."""
    found = []
    with foundation.open_tar(store, layer) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for info in archive:
            content = archive.extractfile(info)
            found.append(Entry(path=info.name, is_directory=info.isdir(), content=content.read() if content else None))
    return found


def test_what_is_found_is_what_a_tar_reader_finds(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = spliced(one)
    expected = [read_whole(one.store, layer) for layer in layers]
    monkeypatch.setattr(entries, "open_tar", lambda *_: pytest.fail("inflated"))
    found = [list(entries.entries(one.store, layer, everything)) for layer in layers]
    assert found == expected
    contents = {entry.path.rpartition("/")[2]: len(entry.content or b"") for layer in found for entry in layer}
    assert contents["_core.so"] > 65_535, "larger than one stored block"
    assert contents["deep.txt"], "a name that plain headers have no room for"


def test_only_what_is_wanted_is_read(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    inflated: list[int] = []
    real = entries._Sparse._inflated

    def count(self: Any, extent: Any) -> bytes:
        inflated.append(extent.size)
        return real(self, extent)

    monkeypatch.setattr(entries._Sparse, "_inflated", count)
    for layer in spliced(one):
        assert all(entry.content is None for entry in entries.entries(one.store, layer, lambda _: False))
    assert inflated == []
    wanted = [
        entry
        for layer in spliced(one)
        for entry in entries.entries(one.store, layer, lambda path: path.endswith("/mesh/data.bin"))
        if entry.content is not None
    ]
    assert [len(entry.content or b"") for entry in wanted] == [30_000]
    assert sum(inflated) == 30_000


def test_a_layer_that_is_a_tar_like_any_other(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layer = layer_of(
        store,
        [
            directory("etc"),
            tar.file_entry("etc/motd", b"hello"),
            tar.Entry(path="etc/link", kind=tar.Kind.SYMLINK, mode=0o777, target="motd"),
        ],
    )
    assert list(entries.entries(store, layer, everything)) == [
        Entry(path="etc", is_directory=True),
        Entry(path="etc/motd", is_directory=False, content=b"hello"),
        Entry(path="etc/link", is_directory=False),
    ]
    assert [entry.content for entry in entries.entries(store, layer, lambda path: path == "etc")] == [None] * 3


def test_a_long_file_is_read_in_part(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MOST", 1000)
    for layer in spliced(one):
        for entry, whole in zip(
            entries.entries(one.store, layer, everything), read_whole(one.store, layer), strict=True
        ):
            assert entry.content == (None if whole.content is None else whole.content[:1000])


def mangled(made: recipe.Recipe, how: str) -> recipe.Recipe:
    segments = list(made.segments)
    if how == "cut short":
        del segments[-1]
    elif how == "without a beginning":
        del segments[0]
    elif how == "moved":
        segments[0] = (segments[0][0], segments[0][1] + 1, segments[0][2] - 1)
    elif how == "of one wheel":
        segments = [(1, offset, length) for _, offset, length in segments]
    elif how == "of nothing but ours":
        segments = [(0, offset, length) for _, offset, length in segments]
    elif how == "of no segment":
        segments = []
    return replace(made, segments=tuple(segments))


@pytest.mark.parametrize(
    "how", ["cut short", "without a beginning", "moved", "of one wheel", "of nothing but ours", "of no segment"]
)
def test_a_recipe_that_is_wrong_is_noticed(one: Ready, how: str) -> None:
    noticed = 0
    for layer in spliced(one):
        expected = read_whole(one.store, layer)
        made = recipe.find(one.store, layer.blob.sha256)
        assert made is not None
        recipe.keep(one.store, mangled(made, how))
        if one.store.has(layer.blob.sha256):
            # A layer of small files only is all bytes of ours, and the store has it as it is.
            assert list(entries.entries(one.store, layer, everything)) == expected
            continue
        noticed += 1
        with pytest.raises((HashMismatchError, CellFailedError)):
            list(entries.entries(one.store, layer, everything))
    assert noticed


def test_what_is_damaged_or_gone_is_noticed(one: Ready) -> None:
    for layer in spliced(one):
        made = recipe.find(one.store, layer.blob.sha256)
        assert made is not None
        if one.wheel("mesh").sha256 in made.sources:
            break
    else:
        pytest.fail("no layer has it")
    damage(one.store.path(made.sources[0]), 30)
    with pytest.raises(HashMismatchError):
        list(entries.entries(one.store, layer, everything))
    one.path("mesh").unlink()
    recipe.keep(one.store, made)
    with pytest.raises(SourceError):
        list(entries.entries(one.store, layer, everything))
