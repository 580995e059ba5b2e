"""OCI layouts: one spelling, one tar, one gzip, no second copy."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import deflate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import layout
from builder.errors import HashMismatchError, ToolError
from builder.layout import Entry, Kind
from builder.store import Store

EPOCH = 1_700_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def scratch(store: Store) -> Iterator[Path]:
    with store.scratch("test") as directory:
        yield directory


def an_image(store: Store, scratch: Path, text: bytes = b"hello\n") -> layout.Image:
    tar = layout.tar_stream([layout.file_entry("greeting", text, mtime=EPOCH)])
    layer = layout.gzip_layer(store, tar, scratch=scratch)
    return layout.assemble(
        store,
        architecture="amd64",
        config={"Env": ["A=b"]},
        epoch=EPOCH,
        layers=[layer],
        history=[layout.History(created_by="a test"), layout.History(created_by="env", empty=True)],
    )


def test_canonical_json_has_one_spelling() -> None:
    assert layout.canonical_json({"b": [1, 2], "a": "é"}) == '{"a":"é","b":[1,2]}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        layout.canonical_json(float("nan"))


def test_descriptor_survives_json() -> None:
    one = layout.Descriptor(media_type="x", digest="sha256:" + "0" * 64, size=3, annotations={"a": "b"})
    assert layout.Descriptor.from_json(json.loads(layout.canonical_json(one.as_json()))) == one
    with pytest.raises(ValueError, match="not a sha256 digest"):
        layout.Descriptor.from_json({"mediaType": "x", "digest": "sha256:../../x", "size": 1})


def test_times_come_from_the_epoch(store: Store, scratch: Path) -> None:
    image = an_image(store, scratch)
    config = json.loads(store.path(image.config.sha256).read_bytes())
    assert config["created"] == "2023-11-14T22:13:20Z"
    assert [line.get("empty_layer", False) for line in config["history"]] == [False, True]


def test_history_must_name_each_layer() -> None:
    with pytest.raises(AssertionError, match="each layer once"):
        layout.image_config(
            architecture="amd64",
            config={},
            epoch=1,
            diff_ids=["a", "b"],
            history=[layout.History(created_by="one")],
        )


# The guard of reproducibility: when this changes, every image's digest changes, and somebody must say why.
MANIFEST = "sha256:82fc0761d70c9b7b55a694590cb316fdbd6621ec22d92b6106aa88b846eb7dac"


def test_digest_of_a_known_image(store: Store, scratch: Path) -> None:
    assert an_image(store, scratch).manifest.digest == MANIFEST


def test_layout_holds_links_not_copies(store: Store, scratch: Path, tmp_path: Path) -> None:
    image = an_image(store, scratch)
    directory = tmp_path / "out"
    layout.write(directory, store, image, tag="here")
    assert json.loads((directory / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((directory / "index.json").read_bytes())
    assert [entry["digest"] for entry in index["manifests"]] == [image.manifest.digest]
    assert index["manifests"][0]["annotations"] == {layout.REF_NAME: "here"}
    for blob in image.blobs:
        assert (directory / "blobs/sha256" / blob.sha256).samefile(store.path(blob.sha256))
    assert layout.read(directory) == image
    layout.verify(directory, image)


def test_rewriting_a_layout_leaves_nothing_of_the_old_image(
    store: Store,
    scratch: Path,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "out"
    layout.write(directory, store, an_image(store, scratch, b"old"))
    new = an_image(store, scratch, b"new")
    layout.write(directory, store, new)
    layout.write(directory, store, new)
    names = {path.name for path in (directory / "blobs/sha256").iterdir()}
    assert names == {blob.sha256 for blob in new.blobs}
    assert layout.read(directory) == new


def test_a_kill_before_the_index_leaves_the_old_image(
    store: Store,
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "out"
    old = an_image(store, scratch, b"old")
    layout.write(directory, store, old)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layout, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        layout.write(directory, store, an_image(store, scratch, b"new"))
    assert layout.read(directory) == old


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "no index", "not json"])
def test_a_damaged_layout_is_not_read(store: Store, scratch: Path, tmp_path: Path, damage: str) -> None:
    image = an_image(store, scratch)
    directory = tmp_path / "out"
    layout.write(directory, store, image)
    layer = directory / "blobs/sha256" / image.layers[0].blob.sha256
    config = directory / "blobs/sha256" / image.config.sha256
    match damage:
        case "missing":
            layer.unlink()
        case "short":
            content = layer.read_bytes()
            layer.unlink()
            layer.write_bytes(content[:-1])
        case "changed":
            content = config.read_bytes()
            config.unlink()
            config.write_bytes(content.replace(b"A=b", b"A=c"))
        case "no index":
            (directory / "index.json").unlink()
        case _:
            (directory / "index.json").write_text("{")
    assert layout.read(directory) is None


def test_verify_finds_a_flipped_bit(store: Store, scratch: Path, tmp_path: Path) -> None:
    image = an_image(store, scratch)
    directory = tmp_path / "out"
    layout.write(directory, store, image)
    layer = directory / "blobs/sha256" / image.layers[0].blob.sha256
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.unlink()
    layer.write_bytes(content)
    with pytest.raises(HashMismatchError):
        layout.verify(directory, image)


# ----------------------------------------------------------------------------------------------------
# Tar


def read_back(entries: list[Entry]) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(layout.tar_stream(entries)))) as tar:
        return tar.getmembers()


def test_every_kind_of_entry_is_read_back_as_written() -> None:
    entries = [
        Entry(path="d", kind=Kind.DIRECTORY, mode=0o1777, uid=1000, gid=5, mtime=EPOCH),
        layout.file_entry("d/f", b"x" * 1000, mode=0o4755),
        Entry(path="d/h", kind=Kind.HARDLINK, mode=0o4755, target="d/f"),
        Entry(path="d/s", kind=Kind.SYMLINK, mode=0o777, target="../" + "t" * 120),
        Entry(path="n", kind=Kind.CHARACTER_DEVICE, mode=0o666, device=(1, 3)),
        Entry(path="p", kind=Kind.FIFO, mode=0o600),
    ]
    got = read_back(entries)
    assert [member.name for member in got] == [entry.path for entry in entries]
    assert [member.type for member in got] == [entry.kind.value for entry in entries]
    assert [member.mode for member in got] == [entry.mode for entry in entries]
    assert (got[0].uid, got[0].gid, got[0].mtime, got[0].uname) == (1000, 5, EPOCH, "")
    assert got[2].linkname == "d/f"
    assert got[3].linkname == entries[3].target
    assert (got[4].devmajor, got[4].devminor) == (1, 3)


def test_pax_headers_appear_only_where_needed() -> None:
    plain = layout.file_entry("a" * 100, b"")
    assert len(layout.tar_header(plain)) == 512
    for entry in (
        layout.file_entry("a" * 101, b""),
        layout.file_entry("Főtanúsítvány", b""),
        Entry(path="cap", kind=Kind.FILE, mode=0o755, xattrs={"security.capability": bytes(range(20))}),
        Entry(path="big", kind=Kind.DIRECTORY, mode=0o755, uid=8**7),
    ):
        assert len(layout.tar_header(entry)) > 512
        assert read_back([entry])[0].name == entry.path


def test_capabilities_survive() -> None:
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    (got,) = read_back([Entry(path="p", kind=Kind.FILE, mode=0o755, xattrs={"security.capability": value})])
    assert got.pax_headers["SCHILY.xattr.security.capability"].encode("utf-8", "surrogateescape") == value


@given(
    st.text(
        alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=140
    ).filter(lambda name: name not in (".", ".."))
)
def test_any_name_survives(name: str) -> None:
    assert read_back([layout.file_entry(name, b"")])[0].name == name


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/"])
def test_paths_that_leave_the_image_cannot_be_said(path: str) -> None:
    with pytest.raises(AssertionError):
        layout.file_entry(path, b"")


def test_a_lying_size_is_refused() -> None:
    entry = Entry(path="a", kind=Kind.FILE, mode=0o644, size=4, content=lambda: (b"abc",))
    with pytest.raises(ValueError, match="3 bytes came where 4"):
        b"".join(layout.tar_stream([entry]))


# ----------------------------------------------------------------------------------------------------
# Gzip


def noise(size: int) -> bytes:
    return random.Random(7).randbytes(size // 2) + bytes(size - size // 2)


@pytest.mark.parametrize(
    "size",
    [0, 1, layout.CHUNK - 1, layout.CHUNK, layout.CHUNK + 1, 3 * layout.CHUNK + 5],
)
def test_gzip_is_read_back(store: Store, scratch: Path, size: int) -> None:
    tar = noise(size)
    layer = layout.gzip_layer(store, [tar], scratch=scratch)
    blob = store.path(layer.blob.sha256).read_bytes()
    assert gzip.decompress(blob) == tar
    assert layer.blob.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert layer.blob.size == len(blob)
    assert layer.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert list(scratch.iterdir()) == []


@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(min_value=0, max_value=2 * layout.CHUNK + 9), max_size=6),
    workers=st.integers(min_value=1, max_value=5),
)
def test_gzip_depends_neither_on_pieces_nor_on_workers(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    workers: int,
) -> None:
    store = Store.open(tmp_path_factory.mktemp("home"))
    tar = noise(2 * layout.CHUNK + 9)
    edges = [0, *sorted(cuts), len(tar)]
    with store.scratch("x") as scratch, layout.LayerWriter(store, scratch, workers=workers) as writer:
        for start, end in itertools.pairwise(edges):
            writer.write(tar[start:end])
        layer = writer.finish()
    assert layer.blob.digest == NOISE_LAYER


# The guard of the compressor: libdeflate 1.26, level 6, 4 MiB members.
NOISE_LAYER = "sha256:59ee4c4630aa59627f5c22e3346bfb9fe9c2d742a90708ec1b65a906c54921ff"


def test_gzip_headers_say_nothing(store: Store, scratch: Path) -> None:
    layer = layout.gzip_layer(store, [noise(10)], scratch=scratch)
    assert store.path(layer.blob.sha256).read_bytes()[:10] == bytes.fromhex("1f8b08000000000000ff")


def test_a_layer_of_a_file_is_the_same(store: Store, scratch: Path, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(noise(layout.CHUNK + 3))
    assert layout.gzip_layer_of_file(store, tar, scratch=scratch) == layout.gzip_layer(
        store,
        [tar.read_bytes()],
        scratch=scratch,
    )


def test_an_interrupted_layer_leaves_nothing(store: Store, scratch: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield noise(layout.CHUNK)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layout.gzip_layer(store, broken(), scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert list((store.root / "blobs").iterdir()) == []


def test_an_equal_layer_is_not_stored_twice(store: Store, scratch: Path) -> None:
    first = layout.gzip_layer(store, [b"same"], scratch=scratch)
    before = store.path(first.blob.sha256).stat().st_ino
    assert layout.gzip_layer(store, [b"same"], scratch=scratch) == first
    assert store.path(first.blob.sha256).stat().st_ino == before


def test_another_compressor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deflate, "gzip_compress", lambda data, _level: gzip.compress(data, mtime=0))
    layout._require_known_compressor.cache_clear()
    with pytest.raises(ToolError, match="not the one image digests were made with"):
        layout._require_known_compressor()
