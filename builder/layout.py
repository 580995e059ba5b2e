"""OCI images as values, and image layouts on disk."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from builder.compress import gzip_blob
from builder.errors import HashMismatchError
from builder.store import Store, sha256_of, write_atomically

MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
MEDIA_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

REF_NAME = "org.opencontainers.image.ref.name"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


# ----------------------------------------------------------------------------------------------------
# Values


def canonical_json(obj: object) -> bytes:
    """Return the one spelling of `obj` that is hashed: sorted keys, no spaces, UTF-8, no end of line."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def timestamp(epoch: int) -> str:
    """Return `epoch` (seconds) as RFC 3339 in UTC, the form image configs use."""
    return dt.datetime.fromtimestamp(epoch, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What OCI documents call a blob by: media type, digest ("sha256:…") and size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert _DIGEST.fullmatch(self.digest), self.digest

    @property
    def sha256(self) -> str:
        """The digest as the store names it: hex, without the algorithm."""
        return self.digest.removeprefix("sha256:")

    def as_json(self) -> dict[str, Any]:
        """Return the descriptor as it stands in manifests and indexes."""
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read a descriptor; raises KeyError or ValueError if it is none."""
        digest = str(document["digest"])
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a sha256 digest: {digest!r}")
        return cls(
            media_type=str(document["mediaType"]),
            digest=digest,
            size=int(document["size"]),
            annotations=dict(document.get("annotations", {})),
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its blob, and the digest of the tar inside it, which the image config lists."""

    blob: Descriptor
    diff_id: str


@dataclass(frozen=True, kw_only=True)
class History:
    """One line of an image's history; `empty` if it made no layer."""

    created_by: str
    comment: str = ""
    empty: bool = False


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image by its manifest; every blob it names is in the store or in the layout it was read from."""

    manifest: Descriptor
    config: Descriptor
    layers: tuple[Layer, ...]
    architecture: str
    os: str = "linux"

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Every blob of the image once, manifest first."""
        every = (self.manifest, self.config, *(layer.blob for layer in self.layers))
        return tuple({blob.digest: blob for blob in every}.values())


def image_config(
    *,
    architecture: str,
    config: Mapping[str, Any],
    epoch: int,
    diff_ids: Sequence[str],
    history: Sequence[History] = (),
    os: str = "linux",
) -> dict[str, Any]:
    """Return an image config; `config` is its run part (Env, Cmd, User, …) and `epoch` dates everything."""
    created = timestamp(epoch)
    document: dict[str, Any] = {
        "architecture": architecture,
        "os": os,
        "created": created,
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }
    if history:
        filled = sum(not line.empty for line in history)
        assert filled == len(diff_ids), "the history must name each layer once"
        document["history"] = [
            {"created": created, "created_by": line.created_by}
            | ({"comment": line.comment} if line.comment else {})
            | ({"empty_layer": True} if line.empty else {})
            for line in history
        ]
    return document


def manifest(
    *, config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return an image manifest."""
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": config.as_json(),
        "layers": [layer.as_json() for layer in layers],
    }
    if annotations:
        document["annotations"] = dict(annotations)
    return document


def gzip_layer(store: Store, tar: Iterable[bytes], *, scratch: Path) -> Layer:
    """Compress an uncompressed tar, given in pieces, into a layer of the store."""
    blob = gzip_blob(store, tar, scratch=scratch)
    return Layer(
        blob=Descriptor(media_type=MEDIA_LAYER_GZIP, digest=f"sha256:{blob.sha256}", size=blob.size),
        diff_id=f"sha256:{blob.content_sha256}",
    )


def put_json(store: Store, document: object, media_type: str) -> Descriptor:
    """Store `document` in its canonical spelling and return what to call it by."""
    content = canonical_json(document)
    return Descriptor(media_type=media_type, digest=f"sha256:{store.put(content)}", size=len(content))


def assemble(
    store: Store,
    *,
    architecture: str,
    config: Mapping[str, Any],
    epoch: int,
    layers: Sequence[Layer],
    history: Sequence[History] = (),
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """Write the config and manifest of an image made of `layers` into the store."""
    diff_ids = [layer.diff_id for layer in layers]
    run = image_config(architecture=architecture, config=config, epoch=epoch, diff_ids=diff_ids, history=history)
    about = put_json(store, run, MEDIA_CONFIG)
    document = manifest(config=about, layers=[layer.blob for layer in layers], annotations=annotations)
    whole = put_json(store, document, MEDIA_MANIFEST)
    return Image(manifest=whole, config=about, layers=tuple(layers), architecture=architecture)


# ----------------------------------------------------------------------------------------------------
# Layouts on disk


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; copy only where the file systems differ."""
    with contextlib.suppress(FileNotFoundError):
        if target.samefile(source):
            return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            temporary.hardlink_to(source)
        except OSError as error:
            # Another file system (an export to a second disk), or one that has no hard links.
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write(directory: Path, store: Store, image: Image, *, tag: str | None = None) -> None:
    """Write `image` as an OCI layout whose blobs are hard links into the store: no second copy.

    The index is replaced last, so that a reader, or a kill at any moment, finds the old image whole or the
    new one. One writer at a time: callers that may meet hold a lock of the store.
    """
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for blob in image.blobs:
        link(store.path(blob.sha256), blobs / blob.sha256)
    write_atomically(directory / "oci-layout", canonical_json({"imageLayoutVersion": "1.0.0"}))
    entry = image.manifest.as_json() | {"platform": {"architecture": image.architecture, "os": image.os}}
    if tag is not None:
        entry["annotations"] = {**entry.get("annotations", {}), REF_NAME: tag}
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [entry]}
    write_atomically(directory / "index.json", canonical_json(index))
    keep = {blob.sha256 for blob in image.blobs}
    for stray in blobs.iterdir():
        if stray.name not in keep:
            stray.unlink()


def _document(directory: Path, blob: Descriptor) -> dict[str, Any]:
    content = (directory / "blobs" / "sha256" / blob.sha256).read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if got != blob.sha256:
        raise HashMismatchError(
            f"a document of the layout is not the one its name promises: {blob.digest}",
            where=str(directory),
            why=f"its sha256 is {got}",
            tries=("remove the layout and make it again",),
        )
    document = json.loads(content)
    assert isinstance(document, dict), blob
    return document


def read(directory: Path) -> Image | None:
    """Return the one image of a layout, or None where there is no whole layout.

    Documents are checked against their digests, layers by presence and size only: they may be gigabytes, and
    the store checked them on entry.
    """
    try:
        index = json.loads((directory / "index.json").read_bytes())
        (entry,) = index["manifests"]
        whole = Descriptor.from_json(entry | {"annotations": {}})
        document = _document(directory, whole)
        about = Descriptor.from_json(document["config"])
        config = _document(directory, about)
        layers = tuple(
            Layer(blob=Descriptor.from_json(layer), diff_id=diff_id)
            for layer, diff_id in zip(document["layers"], config["rootfs"]["diff_ids"], strict=True)
        )
        image = Image(
            manifest=whole,
            config=about,
            layers=layers,
            architecture=config["architecture"],
            os=config["os"],
        )
        whole_blobs = all(
            (directory / "blobs" / "sha256" / blob.sha256).stat().st_size == blob.size for blob in image.blobs
        )
    except (FileNotFoundError, KeyError, ValueError, HashMismatchError):
        return None
    return image if whole_blobs else None


def verify(directory: Path, image: Image) -> None:
    """Read every blob of `image` in a layout; raises HashMismatchError at the first with another hash."""
    for blob in image.blobs:
        with (directory / "blobs" / "sha256" / blob.sha256).open("rb") as file:
            got = sha256_of(file)
        if got != blob.sha256:
            raise HashMismatchError(
                f"{blob.digest} of the layout has other bytes",
                where=str(directory),
                why=f"their sha256 is {got}",
                tries=("remove the layout and make it again",),
            )
