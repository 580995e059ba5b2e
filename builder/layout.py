"""OCI image layouts as values and on disk."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import deflate

from builder.errors import HashMismatchError, ToolError
from builder.store import Store, sha256_of, write_atomically

MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
MEDIA_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

REF_NAME = "org.opencontainers.image.ref.name"

# One gzip member per this many bytes of tar. Part of the digest: changing it changes every layer. Against one
# member for all it costs 0.03 % of the size (measured on 64 MB of shared libraries) and lets every core work.
CHUNK = 4 << 20
LEVEL = 6

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


# ----------------------------------------------------------------------------------------------------
# Values


def canonical_json(obj: object) -> bytes:
    """Return the one spelling of `obj` that is hashed: sorted keys, no spaces, UTF-8, no end of line."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False,
    ).encode()


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
    *, config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str] | None = None,
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
    about = put_json(
        store,
        image_config(
            architecture=architecture, config=config, epoch=epoch, history=history,
            diff_ids=[layer.diff_id for layer in layers],
        ),
        MEDIA_CONFIG,
    )
    whole = put_json(
        store, manifest(config=about, layers=[layer.blob for layer in layers], annotations=annotations),
        MEDIA_MANIFEST,
    )
    return Image(manifest=whole, config=about, layers=tuple(layers), architecture=architecture)


# ----------------------------------------------------------------------------------------------------
# Layouts on disk


def _link(source: Path, target: Path) -> None:
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
        _link(store.path(blob.sha256), blobs / blob.sha256)
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
            where=str(directory), why=f"its sha256 is {got}", tries=("remove the layout and make it again",),
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
            manifest=whole, config=about, layers=layers, architecture=config["architecture"], os=config["os"],
        )
        whole_blobs = all(
            (directory / "blobs" / "sha256" / blob.sha256).stat().st_size == blob.size for blob in image.blobs
        )
    except (FileNotFoundError, KeyError, ValueError, HashMismatchError):
        return None
    return image if whole_blobs else None


# ----------------------------------------------------------------------------------------------------
# Tar, written by ourselves: Python's writer changed its headers between versions, GNU tar's its defaults


class Kind(enum.Enum):
    """What a tar entry is; the value is its type flag."""

    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHARACTER_DEVICE = b"3"
    BLOCK_DEVICE = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a layer: `path` is relative and has no dot parts; `mode` is permission bits only.

    `content` opens the bytes of a file (`size` of them) each time it is called.
    """

    path: str
    kind: Kind
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    content: Callable[[], Iterable[bytes]] | None = None

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        assert parts, "an entry has a name"
        assert str(PurePosixPath(self.path)) == self.path, self.path
        assert parts[0] != "/", self.path
        assert ".." not in parts, self.path
        assert self.mode == stat.S_IMODE(self.mode), self.path
        assert (self.content is not None) or self.size == 0, self.path


def file_entry(
    path: str, content: bytes, *, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: int = 0,
) -> Entry:
    """Return a regular file that holds `content`."""
    return Entry(
        path=path, kind=Kind.FILE, mode=mode, uid=uid, gid=gid, mtime=mtime, size=len(content),
        content=lambda: (content,),
    )


def _record(key: str, value: bytes) -> bytes:
    """Return one PAX record; its length counts its own digits."""
    rest = len(key.encode()) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key.encode(), value)


def _octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def _ustar(
    name: bytes, flag: bytes, numbers: Mapping[str, int], linkname: bytes, device: tuple[int, int],
) -> bytes:
    header = b"".join((
        name.ljust(100, b"\0"),
        _octal(numbers["mode"], 8),
        _octal(numbers["uid"], 8),
        _octal(numbers["gid"], 8),
        _octal(numbers["size"], 12),
        _octal(numbers["mtime"], 12),
        b" " * 8,
        flag,
        linkname.ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),  # owner names: numbers alone are the same on every machine
        _octal(device[0], 8),
        _octal(device[1], 8),
        bytes(167),
    ))
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def tar_header(entry: Entry) -> bytes:
    """Return the header of `entry`: plain ustar, and before it PAX records only for what ustar cannot say."""
    name = os.fsencode(entry.path) + (b"/" if entry.kind is Kind.DIRECTORY else b"")
    linkname = os.fsencode(entry.target)
    numbers = {key: int(getattr(entry, key)) for key in ("mode", "uid", "gid", "size", "mtime")}
    records = [(f"SCHILY.xattr.{key}", value) for key, value in entry.xattrs.items()]
    if len(name) > 100 or not name.isascii():
        records.append(("path", name))
        name = name[:100]
    if len(linkname) > 100 or not linkname.isascii():
        records.append(("linkpath", linkname))
        linkname = linkname[:100]
    for key, digits in (("uid", 7), ("gid", 7), ("size", 11)):
        if numbers[key] >= 8**digits:
            records.append((key, b"%d" % numbers[key]))
            numbers[key] = 0
    header = _ustar(name, entry.kind.value, numbers, linkname, entry.device or (0, 0))
    if not records:
        return header
    body = b"".join(_record(key, value) for key, value in sorted(records))
    about = {"mode": 0o644, "uid": 0, "gid": 0, "size": len(body), "mtime": 0}
    return _ustar(b"pax_header", b"x", about, b"", (0, 0)) + body + padding(len(body)) + header


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of content in a tar."""
    return bytes(-size % 512)


TAR_END = bytes(1024)


def tar_stream(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the tar of `entries` in the order given; raises ValueError if a content has another length."""
    for entry in entries:
        yield tar_header(entry)
        if entry.content is not None:
            got = 0
            for chunk in entry.content():
                got += len(chunk)
                yield chunk
            if got != entry.size:
                raise ValueError(f"{entry.path}: {got} bytes came where {entry.size} were announced")
            yield padding(got)
    yield TAR_END


# ----------------------------------------------------------------------------------------------------
# Gzip that is the same everywhere


@functools.cache
def _require_known_compressor() -> None:
    """Refuse a libdeflate whose output is not the pinned version's: it would silently give other digests.

    libdeflate's output is fixed within one version only. Version 1.26 was seen to give the same bytes on
    x86-64 (all processor features or none, tuned or unoptimised), 64-bit Arm and 32-bit big-endian MIPS.
    """
    sample = b"".join(hashlib.sha256(b"%d" % (n % 977)).hexdigest().encode() * (n % 5) for n in range(4000))
    got = hashlib.sha256(deflate.gzip_compress(sample, LEVEL)).hexdigest()
    if got != _KNOWN_SAMPLE:
        raise ToolError(
            f"the compressor of deflate {deflate.__version__} is not the one image digests were made with",
            why=f"a known sample compressed to sha256 {got}, expected {_KNOWN_SAMPLE}",
            tries=("install the dependencies as pinned: pip install 'deflate==0.9.0'",),
        )


_KNOWN_SAMPLE = "8c3d4598bcd8e41456ccbbbb14a326924eda5d5b427cc9255a495af530e9ad34"


def _compress(chunk: bytes) -> bytes:
    # The header libdeflate writes is fixed: no name, time 0, operating system "unknown".
    return bytes(deflate.gzip_compress(chunk, LEVEL))


class LayerWriter:
    """Takes an uncompressed tar in pieces of any size and makes it a gzip layer of the store.

    The bytes depend on the tar alone: it is cut every `CHUNK` bytes, each piece is a gzip member of its own
    (RFC 1952 allows many), and members are written in order, whichever thread is done first. libdeflate
    releases the interpreter's lock, so threads are enough. A context manager; only `finish` keeps anything.
    """

    def __init__(self, store: Store, scratch: Path, *, workers: int | None = None) -> None:
        """Write to a temporary file in `scratch`, which must be on the store's file system."""
        _require_known_compressor()
        self._store = store
        self._path = scratch / f"layer.{os.getpid()}.{id(self)}.tmp"
        self._workers = workers or os.cpu_count() or 1
        self._buffer = bytearray()
        self._tar = hashlib.sha256()
        self._blob = hashlib.sha256()
        self._size = 0
        self._pending: deque[Future[bytes]] = deque()

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Append to the tar."""
        self._tar.update(piece)
        self._buffer += piece
        while len(self._buffer) >= CHUNK:
            self._submit(bytes(self._buffer[:CHUNK]))
            del self._buffer[:CHUNK]

    def _submit(self, chunk: bytes) -> None:
        self._pending.append(self._pool.submit(_compress, chunk))
        while len(self._pending) > 2 * self._workers:
            self._drain()

    def _drain(self) -> None:
        member = self._pending.popleft().result()
        self._file.write(member)
        self._blob.update(member)
        self._size += len(member)

    def finish(self) -> Layer:
        """Write what is left, make the blob visible in the store, and return the layer."""
        if self._buffer or not (self._pending or self._size):
            self._submit(bytes(self._buffer))
            self._buffer.clear()
        while self._pending:
            self._drain()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.chmod(0o444)
        sha256 = self._blob.hexdigest()
        # An equal blob stays: replaced, it would live on as a second copy in the layouts that link to it.
        if not self._store.has(sha256, size=self._size):
            self._path.replace(self._store.path(sha256))
        return Layer(
            blob=Descriptor(media_type=MEDIA_LAYER_GZIP, digest=f"sha256:{sha256}", size=self._size),
            diff_id=f"sha256:{self._tar.hexdigest()}",
        )


def gzip_layer(store: Store, tar: Iterable[bytes], *, scratch: Path) -> Layer:
    """Compress an uncompressed tar, given in pieces, into a layer of the store."""
    with LayerWriter(store, scratch) as writer:
        for piece in tar:
            writer.write(piece)
        return writer.finish()


def gzip_layer_of_file(store: Store, tar: Path, *, scratch: Path) -> Layer:
    """Compress the uncompressed tar at `tar` into a layer of the store."""
    with tar.open("rb") as file:
        return gzip_layer(store, iter(lambda: file.read(CHUNK), b""), scratch=scratch)


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
