"""Exports: what other tools read is the image, byte for byte, and nothing half written stays."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import docker.auth
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import compress, export, layout, tar
from builder.engines.oci import recipe
from builder.errors import HashMismatchError, ImpossibleError, MatrixError, SourceError, ToolError
from builder.layout import Descriptor, Image, Layer
from builder.store import Store

EPOCH = 1_700_000_000
TAGS = ("team/torchyard:2.8.0-cuda12.8-cudnn9-runtime", "localhost:5000/torchyard:latest")


def content(seed: int, size: int) -> bytes:
    noise = random.Random(seed)
    return b"".join(noise.randbytes(60) + bytes(40) for _ in range(size // 100))


def spliced(store: Store, seed: int, size: int = 5 << 20) -> Layer:
    """Put a layer into the store as a recipe: its large member is a part of another file, as of a wheel."""
    data = content(seed, size)
    entry = tar.file_entry(f"data{seed}", data, mtime=EPOCH)
    whole = b"".join(tar.stream([entry]))
    head, tail = tar.header(entry), whole[512 + len(data) :]
    members = [compress.member(part) for part in (head, data, tail)]
    literals, wheel = members[0] + members[2], b"before" + members[1] + b"after"
    blob = b"".join(members)
    layer = Layer(
        blob=Descriptor(
            media_type=layout.MEDIA_LAYER_GZIP, digest=f"sha256:{hashlib.sha256(blob).hexdigest()}", size=len(blob)
        ),
        diff_id=f"sha256:{hashlib.sha256(whole).hexdigest()}",
    )
    segments = ((0, 0, len(members[0])), (1, 6, len(members[1])), (0, len(members[0]), len(members[2])))
    recipe.keep(store, recipe.Recipe(layer=layer, sources=(store.put(literals), store.put(wheel)), segments=segments))
    return layer


def an_image(store: Store, *seeds: int, run: str = "A=b") -> Image:
    """Make an image of one plain layer and some spliced ones."""
    with store.scratch("image") as scratch:
        plain = layout.gzip_layer(
            store, tar.stream([tar.file_entry("greeting", b"hello\n", mtime=EPOCH)]), scratch=scratch
        )
    layers = [plain, *(spliced(store, seed) for seed in seeds or (1,))]
    return layout.assemble(
        store, architecture="amd64", config={"Env": [run]}, epoch=EPOCH, layers=layers, annotations={"cell": "x"}
    )


def wheel_of(store: Store, layer: Layer) -> Path:
    found = recipe.find(store, layer.blob.sha256)
    assert found is not None
    return store.path(found.sources[1])


def damage(path: Path) -> None:
    """Change one byte, and nothing that a look at the directory would show."""
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(changed)


def members_of(archive: bytes) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
        for member in members:
            file = members.extractfile(member)
            if file is not None:
                found[member.name] = file.read()
    return found


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --- images of the store


def test_an_image_is_found_by_its_digest(store: Store) -> None:
    image = an_image(store)
    assert export.stored_image(store, image.manifest.digest) == image


@pytest.mark.parametrize("digest", ["", "sha256:../../x", "sha512:" + "0" * 64, "0" * 64, "sha256:" + "0" * 64])
def test_an_image_that_is_not_there(store: Store, digest: str) -> None:
    with pytest.raises(ImpossibleError):
        export.stored_image(store, digest)


def test_an_image_without_its_config(store: Store) -> None:
    image = an_image(store)
    store.path(image.config.sha256).unlink()
    with pytest.raises(ImpossibleError, match="does not have the image"):
        export.stored_image(store, image.manifest.digest)


def test_an_image_whose_layers_cannot_be_had(store: Store) -> None:
    image = an_image(store)
    wheel_of(store, image.layers[1]).unlink()
    with pytest.raises(SourceError, match="1 of 2 layers"):
        export.stored_image(store, image.manifest.digest)


def test_a_damaged_document_is_found_and_removed(store: Store) -> None:
    image = an_image(store)
    damage(store.path(image.config.sha256))
    with pytest.raises(HashMismatchError):
        export.stored_image(store, image.manifest.digest)
    assert not store.has(image.config.sha256)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["config", "layers", "digest", "size", "mediaType", "x"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(document=json_values)
def test_whatever_is_no_manifest_is_refused(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    store = Store.open(tmp_path_factory.getbasetemp() / "hostile")
    digest = f"sha256:{store.put(layout.canonical_json(document))}"
    with pytest.raises(ImpossibleError):
        export.stored_image(store, digest)


# --- archives


def test_an_archive_holds_the_image_and_says_what_it_is(store: Store) -> None:
    image = an_image(store, 1, 2)
    archive = b"".join(export.archive(store, image, tags=TAGS))
    members = members_of(archive)
    names = {name.rpartition("/")[2] for name in members if name.startswith("blobs/sha256/")}
    assert names == {blob.sha256 for blob in image.blobs}
    for name in names:
        assert hashlib.sha256(members[f"blobs/sha256/{name}"]).hexdigest() == name
    assert json.loads(members["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    entries = json.loads(members["index.json"])["manifests"]
    assert [entry["digest"] for entry in entries] == [image.manifest.digest] * 2
    assert [entry["platform"] for entry in entries] == [{"architecture": "amd64", "os": "linux"}] * 2
    assert [entry["annotations"] for entry in entries] == [
        {
            "io.containerd.image.name": f"{docker.auth.INDEX_NAME}/{TAGS[0]}",
            "org.opencontainers.image.ref.name": "2.8.0-cuda12.8-cudnn9-runtime",
        },
        {"io.containerd.image.name": TAGS[1], "org.opencontainers.image.ref.name": "latest"},
    ]
    (legacy,) = json.loads(members["manifest.json"])
    assert legacy["RepoTags"] == list(TAGS)
    config = json.loads(members[legacy["Config"]])
    unpacked = [hashlib.sha256(gzip.decompress(members[path])).hexdigest() for path in legacy["Layers"]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{digest}" for digest in unpacked]


def test_an_archive_without_names(store: Store) -> None:
    members = members_of(b"".join(export.archive(store, an_image(store))))
    (entry,) = json.loads(members["index.json"])["manifests"]
    assert "annotations" not in entry
    assert json.loads(members["manifest.json"])[0]["RepoTags"] is None


def test_an_archive_is_read_as_a_layout_once_unpacked(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    with tarfile.open(fileobj=io.BytesIO(b"".join(export.archive(store, image, tags=TAGS[:1])))) as members:
        members.extractall(tmp_path / "out", filter="data")
    assert layout.read(tmp_path / "out") == image
    layout.verify(tmp_path / "out", image)


@pytest.mark.parametrize("tags", [(), TAGS[:1], TAGS, (*TAGS, *TAGS)])
@pytest.mark.parametrize("left_out", [0, 1])
def test_the_size_is_known_beforehand(store: Store, tags: Sequence[str], left_out: int) -> None:
    image = an_image(store)
    omit = {layer.blob.digest for layer in image.layers[:left_out]}
    archive = b"".join(export.archive(store, image, tags=tags, omit=omit))
    assert export.archive_size(store, image, tags=tags, omit=omit) == len(archive)
    paths = {name for name in members_of(archive) if name.startswith("blobs/")}
    assert len(paths) == len(image.blobs) - left_out


def test_an_archive_depends_on_the_image_alone(store: Store, tmp_path: Path) -> None:
    other = Store.open(tmp_path / "elsewhere")
    first, second = an_image(store), an_image(other)
    with other.writer(second.layers[1].blob.sha256, "layer") as writer:  # here it is a file, there a recipe
        for piece in recipe.pieces(other, second.layers[1].blob):
            writer.write(piece)
        writer.commit()
    assert b"".join(export.archive(store, first, tags=TAGS)) == b"".join(export.archive(other, second, tags=TAGS))


@pytest.mark.parametrize(
    ("tag", "whole"),
    [
        ("torchyard:1", "{default}/library/torchyard:1"),
        ("a/b/c:1.2_3-x", "{default}/a/b/c:1.2_3-x"),
        ("localhost/a:1", "localhost/a:1"),
        ("localhost:5000/a:1", "localhost:5000/a:1"),
        ("registry.example/a/b:1", "registry.example/a/b:1"),
        ("10.0.0.1:5000/a:1", "10.0.0.1:5000/a:1"),
    ],
)
def test_names_are_completed_as_engines_do(store: Store, tag: str, whole: str) -> None:
    members = members_of(b"".join(export.archive(store, an_image(store), tags=[tag])))
    (entry,) = json.loads(members["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == whole.format(default=docker.auth.INDEX_NAME)


@pytest.mark.parametrize(
    "tag",
    ["", "a", ":1", "a:", "A:1", "a b:1", "a/../b:1", "/a:1", "a:1\n", "http://x/a:1", "a:" + "1" * 129, "-x/a:é"],
)
def test_a_wrong_name_is_refused_before_the_first_byte(store: Store, tmp_path: Path, tag: str) -> None:
    image = an_image(store)
    with pytest.raises(MatrixError, match="not a name for an image"):
        export.archive(store, image, tags=[tag])
    with pytest.raises(MatrixError, match="not a name for an image"):
        export.write_archive(tmp_path / "a.tar", store, image, tags=[tag])
    assert not (tmp_path / "a.tar").exists()


@given(tag=st.text(st.sampled_from("aA0.:-_/é\n"), max_size=12) | st.text(max_size=12))
def test_any_text_is_a_name_or_refused(tmp_path_factory: pytest.TempPathFactory, tag: str) -> None:
    blob = Descriptor(media_type="x", digest="sha256:" + "0" * 64, size=1)
    image = Image(manifest=blob, config=blob, layers=(), architecture="amd64")
    store = Store(tmp_path_factory.getbasetemp())
    try:
        export.archive_size(store, image, tags=[tag])
    except MatrixError:
        return
    assert tag.isascii()
    assert ":" in tag


# --- archives on disk


def test_an_archive_is_written_whole(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    target = tmp_path / "out" / "image.tar"
    target.parent.mkdir()
    target.write_bytes(b"old")
    (target.parent / ".image.tar.tmp").write_bytes(b"what a killed run left")
    export.write_archive(target, store, image, tags=TAGS)
    assert target.read_bytes() == b"".join(export.archive(store, image, tags=TAGS))
    assert names_in(target.parent) == {"image.tar"}


def test_a_link_to_an_archive_stays_a_link(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    (tmp_path / "link.tar").symlink_to("image.tar")
    export.write_archive(tmp_path / "link.tar", store, image)
    assert (tmp_path / "link.tar").is_symlink()
    assert (tmp_path / "image.tar").stat().st_size == export.archive_size(store, image)


@pytest.mark.parametrize("which", ["plain", "wheel"])
def test_damage_is_found_and_leaves_no_archive(store: Store, tmp_path: Path, which: str) -> None:
    image = an_image(store)
    damage(
        store.path(image.layers[0].blob.sha256) if which == "plain" else wheel_of(store, image.layers[1]),
    )
    target = tmp_path / "out" / "image.tar"
    target.parent.mkdir()
    with pytest.raises(HashMismatchError, match="other bytes"):
        export.write_archive(target, store, image)
    assert names_in(target.parent) == set()
    target.write_bytes(b"old")
    with pytest.raises((HashMismatchError, SourceError)):
        export.write_archive(target, store, image)
    assert target.read_bytes() == b"old"


def test_an_interrupted_archive_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[bytes]:
        yield b"x"
        raise KeyboardInterrupt

    image = an_image(store)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(recipe, "pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.write_archive(tmp_path / "out" / "image.tar", store, image)
    assert names_in(tmp_path / "out") == set()


def test_an_archive_has_no_place_there(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(MatrixError, match="not a file"):
            export.write_archive(path, store, image)
    with pytest.raises(MatrixError, match="could not be written"):
        export.write_archive(tmp_path / "missing" / "image.tar", store, image)
    with pytest.raises(MatrixError, match="could not be written"):
        export.write_archive(tmp_path / ("x" * 300), store, image)


# --- layouts


def test_a_layout_is_the_image(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    export.write_layout(tmp_path / "out", store, image, tag=TAGS[0])
    assert layout.read(tmp_path / "out") == image
    layout.verify(tmp_path / "out", image)
    assert names_in(tmp_path / "out") == {"blobs", "index.json", "oci-layout"}
    blobs = tmp_path / "out" / "blobs" / "sha256"
    assert names_in(blobs) == {blob.sha256 for blob in image.blobs}
    assert (blobs / image.layers[0].blob.sha256).samefile(store.path(image.layers[0].blob.sha256))
    assert not store.has(image.layers[1].blob.sha256), "what was regenerated went into the layout only"


def test_a_layout_on_another_disk_is_a_copy(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    image = an_image(store)
    monkeypatch.setattr(Path, "hardlink_to", refused)
    export.write_layout(tmp_path / "out", store, image)
    layout.verify(tmp_path / "out", image)
    assert store.path(image.layers[0].blob.sha256).stat().st_nlink == 1


def test_a_layout_goes_on_where_it_broke_off(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = an_image(store, 1, 2, 3)
    first, second, third = (layer.blob for layer in image.layers[1:])
    blobs = tmp_path / "out" / "blobs" / "sha256"
    original = recipe.pieces

    def breaks_off(store: Store, blob: Descriptor) -> Iterator[bytes]:
        for piece in original(store, blob):
            yield piece
            if blob == third:
                raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "pieces", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        export.write_layout(tmp_path / "out", store, image)
    assert not (tmp_path / "out" / "index.json").exists()
    assert names_in(blobs) == {blob.sha256 for blob in image.blobs if blob != third}
    damage(blobs / second.sha256)
    asked = []

    def counted(store: Store, blob: Descriptor) -> Iterator[bytes]:
        asked.append(blob)
        return original(store, blob)

    monkeypatch.setattr(recipe, "pieces", counted)
    before = (blobs / first.sha256).stat().st_ino
    export.write_layout(tmp_path / "out", store, image)
    assert asked == [second, third]
    assert (blobs / first.sha256).stat().st_ino == before
    layout.verify(tmp_path / "out", image)
    assert layout.read(tmp_path / "out") == image


def test_images_share_the_blobs_of_a_layout(store: Store, tmp_path: Path) -> None:
    one, two, three = an_image(store, 1), an_image(store, 1, 2), an_image(store, 2)
    out = tmp_path / "out"
    export.write_layout(out, store, one, tag="a:1")
    export.write_layout(out, store, two, tag="a:2")
    export.write_layout(out, store, three, tag="a:1")
    export.write_layout(out, store, three, tag="a:1")
    export.write_layout(out, store, one, tag="b:1")
    entries = json.loads((out / "index.json").read_bytes())["manifests"]
    assert [(entry["digest"], entry["annotations"][layout.REF_NAME]) for entry in entries] == [
        (two.manifest.digest, "2"),
        (three.manifest.digest, "1"),
        (one.manifest.digest, "1"),
    ]
    for image in (one, two, three):
        layout.verify(out, image)


def test_an_entry_without_name_gives_way_to_the_same_image(store: Store, tmp_path: Path) -> None:
    image, other = an_image(store, 1), an_image(store, 2)
    for each in (image, other, image):
        export.write_layout(tmp_path / "out", store, each)
    entries = json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]
    assert [entry["digest"] for entry in entries] == [other.manifest.digest, image.manifest.digest]


def test_damage_leaves_the_old_index(store: Store, tmp_path: Path) -> None:
    old, new = an_image(store, 1), an_image(store, 2)
    export.write_layout(tmp_path / "out", store, old, tag="a:1")
    damage(wheel_of(store, new.layers[1]))
    with pytest.raises(HashMismatchError):
        export.write_layout(tmp_path / "out", store, new, tag="a:1")
    assert layout.read(tmp_path / "out") == old
    assert not [name for name in names_in(tmp_path / "out" / "blobs" / "sha256") if name.endswith(".tmp")]


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"manifests": 5}', b'{"manifests": [{"annotations": 5}]}', b"\xff"])
def test_a_broken_index_is_not_overwritten(store: Store, tmp_path: Path, index: bytes) -> None:
    image = an_image(store)
    out = tmp_path / "out"
    export.write_layout(out, store, image)
    (out / "index.json").write_bytes(index)
    with pytest.raises(MatrixError, match="no OCI layout"):
        export.write_layout(out, store, image)
    assert (out / "index.json").read_bytes() == index


def test_a_directory_of_something_else_is_left_alone(store: Store, tmp_path: Path) -> None:
    image = an_image(store)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(MatrixError, match="no OCI layout"):
        export.write_layout(tmp_path / "photos", store, image)
    assert names_in(tmp_path / "photos") == {"cat.jpg"}
    with pytest.raises(MatrixError, match="could not be written"):
        export.write_layout(tmp_path / "photos" / "cat.jpg", store, image)


# --- Zstandard


def unpacked(store: Store, layer: Layer) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(store.path(layer.blob.sha256).read_bytes()) as reader:
        return reader.read()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_zstd_layers_hold_the_same_tars(store: Store, workers: int) -> None:
    image = an_image(store, 1)
    big = spliced(store, 9, 20 << 20)  # longer than two of libzstd's jobs
    image = layout.assemble(
        store, architecture="amd64", config={}, epoch=EPOCH, layers=(*image.layers, big), annotations={"cell": "x"}
    )
    made = export.recompressed(store, image, workers=workers)
    assert export.stored_image(store, made.manifest.digest) == made
    assert made.config == image.config
    document = json.loads(store.path(made.manifest.sha256).read_bytes())
    assert document["annotations"] == {"cell": "x"}
    for layer in made.layers:
        assert layer.blob.media_type == layout.MEDIA_LAYER_ZSTD
        assert f"sha256:{hashlib.sha256(unpacked(store, layer)).hexdigest()}" == layer.diff_id
    assert made.manifest.digest == ZSTD_MANIFEST
    assert names_in(store.root / "work") == set()


# The guard of the compressor: libzstd 1.5.7, level 3, jobs of 8 MiB, whatever the number of workers.
ZSTD_MANIFEST = "sha256:11715c94644d8611643f983d4e63af94582290004ea6617b5a154add59787db3"


def test_a_layer_is_compressed_once_for_all_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = an_image(store, 1, 2), an_image(store, 1, 2, run="C=d")
    assert one.manifest != two.manifest
    seen: list[int] = []
    made = export.recompressed(store, one, progress=seen.append)
    assert sum(seen) == sum(layer.blob.size for layer in one.layers)
    monkeypatch.setattr(export, "_compressed", None)
    assert export.recompressed(store, two).layers == made.layers
    assert export.recompressed(store, made) == made


def test_a_lost_zstd_blob_is_made_again(store: Store) -> None:
    image = an_image(store)
    made = export.recompressed(store, image)
    store.path(made.layers[1].blob.sha256).unlink()
    assert export.recompressed(store, image) == made
    assert store.verify(made.layers[1].blob.sha256)


def test_a_layer_of_another_level_is_another(store: Store) -> None:
    image = an_image(store)
    fast, small = export.recompressed(store, image, level=1), export.recompressed(store, image, level=9)
    assert fast.layers[1].blob != small.layers[1].blob
    assert unpacked(store, fast.layers[1]) == unpacked(store, small.layers[1])


def test_annotations_of_a_layer_stay(store: Store) -> None:
    layer = spliced(store, 1)
    noted = Layer(
        blob=Descriptor(
            media_type=layer.blob.media_type, digest=layer.blob.digest, size=layer.blob.size, annotations={"a": "b"}
        ),
        diff_id=layer.diff_id,
    )
    image = layout.assemble(store, architecture="amd64", config={}, epoch=EPOCH, layers=(noted,))
    assert export.recompressed(store, image).layers[0].blob.annotations == {"a": "b"}


@pytest.mark.parametrize("which", ["plain", "wheel"])
def test_damage_is_not_recompressed(store: Store, which: str) -> None:
    image = an_image(store)
    before = names_in(store.root / "blobs")
    damage(store.path(image.layers[0].blob.sha256) if which == "plain" else wheel_of(store, image.layers[1]))
    with pytest.raises(HashMismatchError, match="other bytes"):
        export.recompressed(store, image)
    media = [json.loads(path.read_bytes())["digest"] for path in (store.root / "zstd").glob("*.json")]
    assert len(media) <= 1, "only the undamaged layer"
    assert len(names_in(store.root / "blobs") - before) == len(media)
    assert names_in(store.root / "work") == set()


@pytest.mark.parametrize("blob", [b"not gzip at all", compress.member(b"x" * 1000)[:-9], compress.member(b"other")])
def test_a_layer_that_is_not_its_tar(store: Store, blob: bytes) -> None:
    digest = f"sha256:{store.put(blob)}"
    layer = Layer(
        blob=Descriptor(media_type=layout.MEDIA_LAYER_GZIP, digest=digest, size=len(blob)), diff_id="sha256:" + "0" * 64
    )
    image = layout.assemble(store, architecture="amd64", config={}, epoch=EPOCH, layers=(layer,))
    with pytest.raises(HashMismatchError, match="does not hold what its image says"):
        export.recompressed(store, image)


def test_another_libzstd_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PARAMETERS", export._PARAMETERS | {"window_log": 20})
    export._require_known_zstd.cache_clear()
    with pytest.raises(ToolError, match="not the one image digests are made with"):
        export.recompressed(store, an_image(store))
    assert not (store.root / "zstd").exists()
