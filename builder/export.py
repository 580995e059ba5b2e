"""A complete image of the store → bytes that other tools take: one archive, a layout on disk, other compressions.

The store keeps most layers as recipes, which no other tool can read. Here they become bytes again, in a stream: no
second copy is made on the way, and nothing is visible where it should go before every byte had the right hash.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import zstandard

try:
    from isal import isal_zlib as inflater
    from isal.igzip import IGzipFile as GzipFile
except ImportError:  # a processor it is not built for
    import zlib as inflater  # type: ignore[no-redef]
    from gzip import GzipFile  # type: ignore[assignment]

from builder import layout, tar
from builder.engines.oci import recipe
from builder.errors import (
    DiskError,
    HashMismatchError,
    ImpossibleError,
    InterruptedRunError,
    MatrixError,
    SourceError,
    ToolError,
)
from builder.layout import Descriptor, Image, Layer
from builder.store import Store, named_enospc, sha256_of, write_atomically

LEVEL = 3
CONTAINERD_NAME = "io.containerd.image.name"
"""Annotation of an index entry: the image's whole name. Docker 25+ and containerd take it, Podman too."""

_PARAMETERS = {"window_log": 21, "job_size": 8 << 20, "overlap_log": 6, "write_checksum": 0, "write_content_size": 0}
"""Part of the digest of every such layer, with the level. What libzstd would choose by itself may change with it."""
_KNOWN_SAMPLE = "92fd244c4eb941a9d07975551a4f2c952149d3f4bfac7bb4b4e3951981e9ba8e"
_PIECE = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*(?::[0-9]+)?/)?{_PART}(?:/{_PART})*:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}"
)
_ELSEWHERE = ("name a file in a directory that exists and may be written to",)
_LAYOUT = layout.canonical_json({"imageLayoutVersion": "1.0.0"})
_BUILD_AGAIN = ("build the cell again: torchyard build CELL",)

# ----------------------------------------------------------------------------------------------------
# Images of the store


def stored_image(store: Store, digest: str) -> Image:
    """Return the image whose manifest has `digest` ("sha256:…"), all of whose bytes can be had from the store.

    Raises ImpossibleError if the store has no such image, SourceError if bytes of one of its layers are gone,
    HashMismatchError if a document is damaged.
    """
    if not _DIGEST.fullmatch(digest):
        raise ImpossibleError(f"not the digest of an image: {digest!r}", why="it is sha256: and 64 hex digits")
    try:
        manifest = _document(store, digest)
        config = Descriptor.from_json(manifest["config"])
        about = _document(store, config.digest)
        blobs = [Descriptor.from_json(layer) for layer in manifest["layers"]]
        image = Image(
            manifest=Descriptor(
                media_type=str(manifest["mediaType"]),
                digest=digest,
                size=store.path(digest.removeprefix("sha256:")).stat().st_size,
            ),
            config=config,
            layers=tuple(
                Layer(blob=blob, diff_id=str(diff_id))
                for blob, diff_id in zip(blobs, about["rootfs"]["diff_ids"], strict=True)
            ),
            architecture=str(about["architecture"]),
            os=str(about["os"]),
        )
    except FileNotFoundError:
        raise ImpossibleError(
            f"the store does not have the image {digest}", where=str(store.root), tries=_BUILD_AGAIN
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ImpossibleError(
            f"not an image manifest: {digest}", where=str(store.root), why=f"{type(error).__name__}: {error}"
        ) from None
    if lost := [layer.blob.digest for layer in image.layers if not recipe.available(store, layer.blob)]:
        raise SourceError(
            f"bytes of {len(lost)} of {len(image.layers)} layers are not in the store: {', '.join(lost[:3])}",
            where=str(store.root),
            tries=("torchyard fetch brings locked wheels back", *_BUILD_AGAIN),
        )
    return image


def layers_of(store: Store, digest: str) -> tuple[str, ...]:
    """Return the digests of an image's layers if the store has its manifest, whether it has the layers or not."""
    if not _DIGEST.fullmatch(digest):
        return ()
    try:
        return tuple(str(layer["digest"]) for layer in _document(store, digest)["layers"])
    except (FileNotFoundError, HashMismatchError, KeyError, TypeError, ValueError):
        return ()


def _document(store: Store, digest: str) -> dict[str, Any]:
    path = store.path(digest.removeprefix("sha256:"))
    content = path.read_bytes()
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        path.unlink(missing_ok=True)
        raise HashMismatchError(
            f"a document of an image was damaged: {digest}",
            where=str(path),
            why="its bytes have another hash; it was removed",
            tries=_BUILD_AGAIN,
        )
    return dict(json.loads(content))


# ----------------------------------------------------------------------------------------------------
# Archives


def archive(
    store: Store, image: Image, *, tags: Sequence[str] = (), omit: Collection[str] = frozenset()
) -> Iterator[bytes]:
    """Return, in pieces, a tar that is an OCI layout and a docker-archive at once, of `archive_size` bytes.

    `tags` are references such as team/image:tag, with or without registry; a wrong one is a MatrixError. Blobs whose
    digests are in `omit` are named but left out: only for an engine that is known to hold them. While it is read it
    may raise as `recipe.pieces` does: then what came so far is worth nothing.
    """
    return tar.stream(list(_entries(store, image, tags, omit)))


def archive_size(store: Store, image: Image, *, tags: Sequence[str] = (), omit: Collection[str] = frozenset()) -> int:
    """Return how many bytes `archive` gives for the same arguments."""
    entries = _entries(store, image, tags, omit)
    return len(tar.END) + sum(len(tar.header(entry)) + entry.size + -entry.size % 512 for entry in entries)


def _entries(store: Store, image: Image, tags: Sequence[str], omit: Collection[str]) -> Iterator[tar.Entry]:
    """Yield the documents before the blobs, so that a reader knows at once what is coming."""
    tags = tuple(dict.fromkeys(tags))
    yield tar.file_entry("oci-layout", _LAYOUT)
    yield tar.file_entry("index.json", _index([_index_entry(image, tag) for tag in tags or (None,)]))
    legacy = {
        "Config": f"blobs/sha256/{image.config.sha256}",
        "RepoTags": list(tags) or None,
        "Layers": [f"blobs/sha256/{layer.blob.sha256}" for layer in image.layers],
    }
    yield tar.file_entry("manifest.json", layout.canonical_json([legacy]))
    for directory in ("blobs", "blobs/sha256"):
        yield tar.Entry(path=directory, kind=tar.Kind.DIRECTORY, mode=0o755)
    for blob in image.blobs:
        if blob.digest not in omit:
            yield tar.Entry(
                path=f"blobs/sha256/{blob.sha256}",
                kind=tar.Kind.FILE,
                mode=0o644,
                size=blob.size,
                content=functools.partial(recipe.pieces, store, blob),
            )


def _index(entries: Sequence[dict[str, Any]]) -> bytes:
    return layout.canonical_json({"schemaVersion": 2, "mediaType": layout.MEDIA_INDEX, "manifests": entries})


def _index_entry(image: Image, tag: str | None) -> dict[str, Any]:
    entry = image.manifest.as_json() | {"platform": {"architecture": image.architecture, "os": image.os}}
    if tag is not None:
        # Slow to import, and needed only where a name is written.
        from builder.engines.docker import whole_name  # noqa: PLC0415

        names = {CONTAINERD_NAME: whole_name(_checked(tag)), layout.REF_NAME: tag.rpartition(":")[2]}
        entry["annotations"] = {**entry.get("annotations", {}), **names}
    return entry


def _checked(tag: str) -> str:
    if not _REFERENCE.fullmatch(tag):
        raise MatrixError(
            f"not a name for an image: {tag!r}",
            why="it is [registry/]name:tag, the name in small letters",
            tries=("torchyard matrix lists the names of every cell",),
        )
    return tag


# ----------------------------------------------------------------------------------------------------
# Files


def write_archive(path: Path, store: Store, image: Image, *, tags: Sequence[str] = ()) -> None:
    """Write `archive` to a file that appears whole, replacing another, or not at all.

    Raises DiskError if the disk is too small, MatrixError if the path is no place for a file, and as `archive` does.
    """
    with _refusals(path):
        path = path.resolve()
        foreign = path.exists() and not path.is_file()
    if foreign:
        raise MatrixError(
            "not a file", where=str(path), tries=("name a file", "- is standard output, for pipes and devices")
        )
    stream, size = archive(store, image, tags=tags), archive_size(store, image, tags=tags)
    with _whole_file(store, path) as file:
        _require_free(path.parent, size)
        for piece in stream:
            file.write(piece)


@contextlib.contextmanager
def _whole_file(store: Store, path: Path, *, mode: int | None = None) -> Iterator[io.BufferedWriter]:
    """Open a file that takes the name `path`, durably, if the block ends well, and is gone otherwise.

    What a killed run left under the temporary name is overwritten; a lock of the store keeps two runs apart.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    with store.lock(f"export-{name}"), _refusals(path):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _too_small(path.parent, str(error)) from error
        raise MatrixError(
            "the export could not be written", where=str(path), why=str(error), tries=_ELSEWHERE
        ) from error


def _require_free(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise _too_small(directory, f"{size / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


def _too_small(directory: Path, why: str) -> DiskError:
    return DiskError(
        "the disk is too small for the export",
        where=str(directory),
        why=why,
        tries=("free some space there, or name a directory on a larger disk", "--compression zstd takes less"),
    )


# ----------------------------------------------------------------------------------------------------
# Layouts


def write_layout(directory: Path, store: Store, image: Image, *, tag: str | None = None) -> None:
    """Add `image` to the OCI layout in `directory`, or begin one there; blobs that several images share are there once.

    Plain blobs are hard links into the store where the file system allows it. What an earlier, broken off run wrote
    is kept if its hash is right. The index is replaced last; an image that had the same tag loses its place in it.
    """
    directory = directory.resolve()
    entry = _index_entry(image, tag)
    blobs = directory / "blobs" / "sha256"
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    with store.lock(f"layout-{name}"), _refusals(directory):
        others = [other for other in _entries_of(directory) if not _replaced(other, entry)]
        blobs.mkdir(parents=True, exist_ok=True)
        if not (directory / "oci-layout").exists():  # first, so that a later run knows what was begun here
            write_atomically(directory / "oci-layout", _LAYOUT)
        missing = [blob for blob in image.blobs if not _whole(blobs / blob.sha256, blob)]
        _require_free(blobs, sum(blob.size for blob in missing if not _linkable(store, blob, blobs)))
        for blob in missing:
            _place(blobs / blob.sha256, store, blob)
        _sync(blobs)
        write_atomically(directory / "index.json", _index([*others, entry]))


def _entries_of(directory: Path) -> list[dict[str, Any]]:
    """Return the entries of the index in a directory, none if it is empty; raises MatrixError if it is no layout."""
    if not directory.exists() or not any(directory.iterdir()):
        return []
    try:
        known = json.loads((directory / "oci-layout").read_bytes()) == json.loads(_LAYOUT)
        index = directory / "index.json"
        entries = json.loads(index.read_bytes())["manifests"] if index.exists() else []
        known = known and all(isinstance(entry.get("annotations", {}), dict) for entry in map(dict, entries))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise MatrixError(
            "the directory is not empty and holds no OCI layout that could be added to",
            where=str(directory),
            tries=("name an empty directory, or one that does not exist",),
        )
    return list(entries)


def _replaced(other: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry gives way: to one of the same name, or to the same image with one."""
    names, new = other.get("annotations", {}), entry.get("annotations", {})
    if layout.REF_NAME not in names:
        return bool(other.get("digest") == entry["digest"])
    return all(names.get(key) == new.get(key) for key in (layout.REF_NAME, CONTAINERD_NAME))


def _whole(path: Path, blob: Descriptor) -> bool:
    """Tell whether a blob is in a layout already; the hash of every byte is checked."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == blob.size and sha256_of(file) == blob.sha256
    except FileNotFoundError:
        return False


def _linkable(store: Store, blob: Descriptor, directory: Path) -> bool:
    return store.has(blob.sha256, size=blob.size) and store.root.stat().st_dev == directory.stat().st_dev


def _place(path: Path, store: Store, blob: Descriptor) -> None:
    if _linkable(store, blob, path.parent):
        for _ in recipe.pieces(store, blob):
            pass  # read for its hash
        path.unlink(missing_ok=True)
        # A file system without hard links gets a copy.
        with contextlib.suppress(OSError):
            path.hardlink_to(store.path(blob.sha256))
            return
    with _whole_file(store, path, mode=0o444) as file:
        for piece in recipe.pieces(store, blob):
            file.write(piece)


# ----------------------------------------------------------------------------------------------------
# Zstandard


def recompressed(
    store: Store,
    image: Image,
    *,
    level: int = LEVEL,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Image:
    """Return the same image with every layer compressed by Zstandard, in the store: same config, another manifest.

    A layer is compressed once for all images that have it. `progress` is called, by several threads, with the number
    of bytes read of the old layers. Raises ToolError if this machine's libzstd is not the pinned one, or as
    `recipe.pieces` does.
    """
    _require_known_zstd()
    workers = workers or os.cpu_count() or 1
    stopped = threading.Event()

    def tell(size: int) -> None:
        if stopped.is_set():
            raise InterruptedRunError("stopped")
        if progress:
            progress(size)

    make = functools.partial(_zstd_layer, store, level=level, workers=workers, progress=tell)
    # The largest first, or it would be alone at the end. Two at a time are enough, and what bounds the memory:
    # beside the compressor's own threads only decompression and hashes are left.
    once = sorted({layer.diff_id: layer for layer in image.layers}.values(), key=lambda layer: -layer.blob.size)
    with ThreadPoolExecutor(min(workers, 2)) as pool:
        try:
            made = {layer.diff_id: layer for layer in pool.map(make, once)}
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    layers = tuple(made[layer.diff_id] for layer in image.layers)
    annotations = _document(store, image.manifest.digest).get("annotations")
    document = layout.manifest(config=image.config, layers=[layer.blob for layer in layers], annotations=annotations)
    return replace(image, manifest=layout.put_json(store, document, layout.MEDIA_MANIFEST), layers=layers)


def _zstd_layer(store: Store, layer: Layer, *, level: int, workers: int, progress: Callable[[int], None]) -> Layer:
    if layer.blob.media_type == layout.MEDIA_LAYER_ZSTD:
        return layer
    key = zstd_key(layer.diff_id, level)
    known = store.root / "zstd" / f"{key}.json"
    if (blob := _known(store, known)) is None:
        with store.scratch(f"zstd-{key}") as scratch:
            # Whoever held the lock before may have made it.
            if (blob := _known(store, known)) is None:
                blob = _compressed(store, layer, scratch / "blob", level=level, workers=workers, progress=progress)
                write_atomically(known, layout.canonical_json(blob.as_json()))
    return replace(layer, blob=replace(blob, annotations=layer.blob.annotations))


def zstd_key(diff_id: str, level: int) -> str:
    """Return the name under `zstd/` of which blob a layer is, compressed so by this libzstd."""
    about = {"diff_id": diff_id, "libzstd": zstandard.ZSTD_VERSION, "level": level, "parameters": _PARAMETERS}
    return hashlib.sha256(layout.canonical_json(about)).hexdigest()


def _known(store: Store, path: Path) -> Descriptor | None:
    try:
        blob = Descriptor.from_json(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return blob if store.has(blob.sha256, size=blob.size) else None


def _compressed(
    store: Store, layer: Layer, path: Path, *, level: int, workers: int, progress: Callable[[int], None]
) -> Descriptor:
    diff_id, digest, size = hashlib.sha256(), hashlib.sha256(), 0
    compressor = _compressor(level, workers)
    with named_enospc(path), path.open("wb") as file:

        def keep(compressed: bytes) -> None:
            nonlocal size
            file.write(compressed)
            digest.update(compressed)
            size += len(compressed)

        for piece in _inflated(store, layer, progress):
            diff_id.update(piece)
            keep(compressor.compress(piece))
        keep(compressor.flush())
        file.flush()
        os.fsync(file.fileno())
    if f"sha256:{diff_id.hexdigest()}" != layer.diff_id:
        raise _not_its_tar(layer, f"the tar in it has sha256 {diff_id.hexdigest()}, not {layer.diff_id}")
    path.chmod(0o444)
    path.replace(store.path(digest.hexdigest()))
    return Descriptor(media_type=layout.MEDIA_LAYER_ZSTD, digest=f"sha256:{digest.hexdigest()}", size=size)


def _compressor(level: int, workers: int) -> zstandard.ZstdCompressionObj:
    # One worker or many give the same bytes, but no worker gives others: libzstd cuts the content for its workers only.
    parameters = zstandard.ZstdCompressionParameters.from_level(level, threads=max(workers, 1), **_PARAMETERS)
    return zstandard.ZstdCompressor(compression_params=parameters).compressobj()


def _inflated(store: Store, layer: Layer, progress: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the tar of a layer; both its forms are checked, the blob here and the tar by whoever reads it."""
    source = _told(recipe.pieces(store, layer.blob), progress)
    if layer.blob.media_type == layout.MEDIA_LAYER_TAR:
        yield from source
        return
    try:
        with GzipFile(fileobj=_Reader(source), mode="rb") as file:  # type: ignore[no-untyped-call]
            while piece := file.read(_PIECE):
                yield piece
    except (EOFError, OSError, inflater.error) as error:  # type: ignore[misc] # its stub says otherwise
        # Wrong bytes end the decompressor first; the whole blob's hash says what is damaged.
        for _ in source:
            pass
        raise _not_its_tar(layer, str(error)) from error


def _told(pieces: Iterable[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    for piece in pieces:
        progress(len(piece))
        yield piece


def _not_its_tar(layer: Layer, why: str) -> HashMismatchError:
    return HashMismatchError(
        f"the layer {layer.blob.digest} does not hold what its image says", why=why, tries=_BUILD_AGAIN
    )


class _Reader(io.RawIOBase):
    """A file to read from, of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 (typeshed's Buffer cannot be indexed)
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


@functools.cache
def _require_known_zstd() -> None:
    """Refuse a libzstd whose output is not the pinned version's: it would silently give other digests."""
    sample = b"".join(hashlib.sha256(b"%d" % (n % 977)).hexdigest().encode() * (n % 5) for n in range(20000))
    compressor = _compressor(LEVEL, 1)
    got = hashlib.sha256(compressor.compress(sample) + compressor.flush()).hexdigest()
    if got != _KNOWN_SAMPLE:
        version = ".".join(map(str, zstandard.ZSTD_VERSION))
        raise ToolError(
            f"the libzstd {version} of zstandard {zstandard.__version__} is not the one image digests are made with",
            why=f"a known sample compressed to sha256 {got}, expected {_KNOWN_SAMPLE}",
            tries=("install the dependencies as pinned: pip install 'zstandard==0.25.0'",),
        )
