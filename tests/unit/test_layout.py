"""OCI layouts: one spelling, no second copy, nothing half written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from builder import layout, tar
from builder.errors import HashMismatchError
from builder.store import Store

EPOCH = 1_700_000_000


def an_image(store: Store, scratch: Path, text: bytes = b"hello\n") -> layout.Image:
    content = tar.stream([tar.file_entry("greeting", text, mtime=EPOCH)])
    layer = layout.gzip_layer(store, content, scratch=scratch)
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


def test_a_layer_names_its_blob_and_its_tar(store: Store, scratch: Path) -> None:
    layer = layout.gzip_layer(store, [b"one ", b"tar"], scratch=scratch)
    assert layer.blob.media_type == layout.MEDIA_LAYER_GZIP
    assert layer.blob.size == store.path(layer.blob.sha256).stat().st_size
    assert layer.diff_id == f"sha256:{hashlib.sha256(b'one tar').hexdigest()}"
