"""Two images → what differs, from the coarse to the fine: fields, layers, and of which file what.

Layers are streams that are read once, and nothing is unpacked, so both sides may be anybody's. The class of a
difference says what to look for: a time is somebody's clock, another order is somebody's directory, another header of
bytecode is somebody's installer.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from itertools import zip_longest
from typing import Any

from builder import layout
from builder.engines.oci.foundation import UNREADABLE, open_pieces
from builder.errors import CellFailedError, ImpossibleError
from builder.layout import Descriptor
from builder.listing import Content, Entry, Listing, listing

NOTHING = "nothing"
"""What a side is said to have that lacks a thing."""
EXAMPLES = 100
"""Differences of one class in one layer that are kept; all are counted."""
LARGEST = 64 << 30
"""Bytes that a layer may unpack to."""
LAYERS_MAX = 1000
"""Layers of an image that is looked at; no engine runs one of 128."""
_RATIO = 200
_SMALL = 1 << 30
"""A layer may unpack to so many bytes however small it is, and to a multiple of its size."""
_SHOWN = 100


class Kind(StrEnum):
    """Classes of differences."""

    CONFIG = "config"
    MANIFEST = "manifest"
    SPELLING = "spelling"
    LAYER_MISSING = "layer missing"
    LAYER_EXTRA = "layer extra"
    LAYER_ORDER = "layer order"
    COMPRESSION = "compression"
    MISSING = "missing"
    EXTRA = "extra"
    TYPE = "type"
    HARD_LINK = "hard link"
    TARGET = "link target"
    CONTENT = "content"
    BYTECODE = "bytecode header"
    ARCHIVE = "archive header"
    MODE = "mode"
    OWNER = "owner"
    TIME = "time"
    DEVICE = "device"
    ATTRIBUTES = "extended attributes"
    ENTRY_ORDER = "order of entries"
    FORMAT = "tar format"


MEANING: Mapping[Kind, str] = {
    Kind.CONFIG: "what the image says of itself, and how it is run",
    Kind.MANIFEST: "the manifest's own words",
    Kind.SPELLING: "the same document in other bytes",
    Kind.LAYER_MISSING: "the rebuilt image lacks the layer",
    Kind.LAYER_EXTRA: "only the rebuilt image has the layer",
    Kind.LAYER_ORDER: "the same layers, stacked otherwise",
    Kind.COMPRESSION: "the same tar, compressed by another program, version or level",
    Kind.MISSING: "the rebuilt layer lacks the file",
    Kind.EXTRA: "only the rebuilt layer has the file",
    Kind.TYPE: "a file in one, something else in the other",
    Kind.HARD_LINK: "a file of its own in one, another name of a file in the other",
    Kind.TARGET: "a symbolic link that leads elsewhere",
    Kind.CONTENT: "other bytes",
    Kind.BYTECODE: "the same code, valid by another rule: by the source's time, or by its hash",
    Kind.ARCHIVE: "the same content; times or owners in the archive's own headers differ",
    Kind.MODE: "permissions: somebody's umask, or an archive's attributes",
    Kind.OWNER: "user or group, by number or name",
    Kind.TIME: "somebody's clock, where a time of the lock belongs",
    Kind.DEVICE: "another device",
    Kind.ATTRIBUTES: "extended attributes, as some file systems add them",
    Kind.ENTRY_ORDER: "the same entries, in the order of somebody's directory",
    Kind.FORMAT: "the same entry, written by another program",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differs: what the expected image has, and what was found instead."""

    kind: Kind
    layer: str = ""
    """Its title; empty for what is in no layer."""
    path: str = ""
    """Of the file, or of the field."""
    expected: str = ""
    found: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One image: its two documents, and what opens a layer's blob."""

    name: str
    """What it is called in errors."""
    manifest: bytes
    config: bytes
    pieces: Callable[[Descriptor], Iterator[bytes]] = field(repr=False)


# ----------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True, kw_only=True)
class _Layer:
    blob: Descriptor
    diff_id: str
    title: str


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A subject whose documents were understood."""

    subject: Subject
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    layers: tuple[_Layer, ...]

    @classmethod
    def of(cls, subject: Subject) -> _Image:
        """Read both documents; raises ImpossibleError if they are not those of an image."""
        try:
            manifest, config = json.loads(subject.manifest), json.loads(subject.config)
            blobs = [Descriptor.from_json(layer) for layer in manifest["layers"]]
            Descriptor.from_json(manifest["config"])
            diff_ids = [str(one) for one in config["rootfs"]["diff_ids"]]
            lines = [line for line in config.get("history") or () if not line.get("empty_layer")]
            titles = [_title(str(line.get("created_by") or "")) for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _unfit(subject, f"{type(error).__name__}: {_short(str(error))}") from None
        if len(blobs) != len(diff_ids) or len(blobs) > LAYERS_MAX:
            raise _unfit(subject, f"its config lists {len(diff_ids)} layers, its manifest {len(blobs)}")
        if len(titles) != len(blobs) or not all(titles):
            titles = [f"layer {number}" for number in range(1, len(blobs) + 1)]
        return cls(
            subject=subject,
            manifest=manifest,
            config=config,
            layers=tuple(
                _Layer(blob=blob, diff_id=diff_id, title=title)
                for blob, diff_id, title in zip(blobs, diff_ids, titles, strict=True)
            ),
        )


def _unfit(subject: Subject, why: str) -> ImpossibleError:
    return ImpossibleError("this is no image that can be compared", where=subject.name, why=why)


def _title(line: str) -> str:
    """Return what people call the layer that a line of the history stands for."""
    return _short(" ".join(line.removeprefix("torchyard: ").split()))


def _short(text: str) -> str:
    """Return foreign text in one line that is not long, and can be written anywhere."""
    text = _writable(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# ----------------------------------------------------------------------------------------------------
# Comparing


def compare(expected: Subject, found: Subject) -> Iterator[Difference]:
    """Yield every difference, those of the documents first; none if the manifests are the same bytes.

    Layers are only read where their digests differ. Raises ImpossibleError for what is no image, CellFailedError for a
    layer that cannot be read, and what `pieces` raises.
    """
    if expected.manifest == found.manifest:
        return
    one, other = _Image.of(expected), _Image.of(found)
    count = 0
    for difference in _differences(one, other):
        count += 1
        yield difference
    if not count:
        yield Difference(kind=Kind.SPELLING, path="manifest", expected=_sized(expected.manifest),
                         found=_sized(found.manifest))  # fmt: skip


def _differences(one: _Image, other: _Image) -> Iterator[Difference]:
    try:
        yield from _documents(one, other)
    except RecursionError:
        raise _unfit(other.subject, "its documents are nested too deeply, or those of the other image") from None
    pairs = _paired(one.layers, other.layers)
    for number, layer in enumerate(one.layers):
        if number not in pairs:
            yield Difference(kind=Kind.LAYER_MISSING, layer=layer.title, expected=_blob(layer), found=NOTHING)
    for number, layer in enumerate(other.layers):
        if number not in pairs.values():
            yield Difference(kind=Kind.LAYER_EXTRA, layer=layer.title, expected=NOTHING, found=_blob(layer))
    for index in _moved([pairs[number] for number in sorted(pairs)]):
        number = sorted(pairs)[index]
        title, there = one.layers[number].title, pairs[number]
        yield Difference(kind=Kind.LAYER_ORDER, layer=title, expected=f"layer {number + 1}", found=f"layer {there + 1}")
    for number in sorted(pairs):
        mine, its = one.layers[number], other.layers[pairs[number]]
        if mine.blob.digest != its.blob.digest:
            yield from _layer_differences(one.subject, mine, other.subject, its)
        elif (mine.blob, mine.diff_id) != (its.blob, its.diff_id):
            yield Difference(
                kind=Kind.MANIFEST if mine.blob != its.blob else Kind.CONFIG,
                layer=mine.title,
                path="layers" if mine.blob != its.blob else "rootfs.diff_ids",
                expected=_value({**mine.blob.as_json(), "diff_id": mine.diff_id}),
                found=_value({**its.blob.as_json(), "diff_id": its.diff_id}),
            )


def _blob(layer: _Layer) -> str:
    return f"{layer.blob.digest[:19]}…, {layer.blob.size} bytes"


def _sized(content: bytes) -> str:
    return f"{len(content)} bytes"


def _paired(one: Sequence[_Layer], other: Sequence[_Layer]) -> dict[int, int]:
    """Return which layer stands for which: the same content, else the same title, else what is left of as many."""
    pairs: dict[int, int] = {}
    for same in ("diff_id", "title"):
        waiting: dict[str, list[int]] = defaultdict(list)
        for number, its in enumerate(other):
            if number not in pairs.values():
                waiting[getattr(its, same)].append(number)
        for number, mine in enumerate(one):
            if number not in pairs and waiting[getattr(mine, same)]:
                pairs[number] = waiting[getattr(mine, same)].pop(0)
    left = [number for number in range(len(one)) if number not in pairs]
    rest = [number for number in range(len(other)) if number not in pairs.values()]
    return pairs | dict(zip(left, rest, strict=True)) if len(left) == len(rest) else pairs


def _moved(places: Sequence[int]) -> list[int]:
    """Return the fewest indexes without which the places, all different, ascend."""
    ends: list[int] = []  # the smallest end of an ascending row of each length, and where it is
    at: list[int] = []
    before: list[int] = []
    for index, place in enumerate(places):
        length = bisect.bisect(ends, place)
        before.append(at[length - 1] if length else -1)
        ends[length : length + 1] = [place]
        at[length : length + 1] = [index]
    staying = set()
    index = at[-1] if at else -1
    while index >= 0:
        staying.add(index)
        index = before[index]
    return [index for index in range(len(places)) if index not in staying]


# ----------------------------------------------------------------------------------------------------
# Documents


def _documents(one: _Image, other: _Image) -> Iterator[Difference]:
    for path, mine, its in _fields("", _own_words(one.manifest), _own_words(other.manifest)):
        yield Difference(kind=Kind.MANIFEST, path=path, expected=_value(mine), found=_value(its))
    if one.subject.config == other.subject.config:
        return
    count = 0
    for path, mine, its in _fields("", _without_layers(one.config), _without_layers(other.config)):
        count += 1
        yield Difference(kind=Kind.CONFIG, path=path, expected=_value(mine), found=_value(its))
    if not count and one.config == other.config:
        yield Difference(kind=Kind.SPELLING, path="config", expected=_sized(one.subject.config),
                         found=_sized(other.subject.config))  # fmt: skip


def _own_words(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without what names blobs: that differs with them, and is said where they are."""
    config = {key: value for key, value in manifest["config"].items() if key not in ("digest", "size")}
    return {key: value for key, value in manifest.items() if key != "layers"} | {"config": config}


def _without_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "rootfs": {key: value for key, value in config["rootfs"].items() if key != "diff_ids"}}


_ABSENT = object()


def _fields(path: str, one: object, other: object) -> Iterator[tuple[str, object, object]]:
    """Yield every field that differs, as deep as both sides have the same structure."""
    if type(one) is type(other) and one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _fields(inner, one.get(key, _ABSENT), other.get(key, _ABSENT))
    elif path == "config.Env" and (before := _variables(one)) is not None and (after := _variables(other)) is not None:
        if before != after:
            yield from _fields(path, before, after)
        else:
            yield f"{path}, its order", list(before), list(after)
    elif isinstance(one, list) and isinstance(other, list) and any(isinstance(it, dict) for it in (*one, *other)):
        for number, (mine, its) in enumerate(zip_longest(one, other, fillvalue=_ABSENT)):
            yield from _fields(f"{path}[{number}]", mine, its)
    else:
        yield path, one, other


def _variables(env: object) -> dict[str, str] | None:
    """Return environment variables by name; None if they are not written as such, or one twice."""
    if not isinstance(env, list) or not all(isinstance(line, str) and "=" in line for line in env):
        return None
    found = dict(line.split("=", 1) for line in env)
    return found if len(found) == len(env) else None


def _value(value: object) -> str:
    if value is _ABSENT:
        return NOTHING
    return _short(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


# ----------------------------------------------------------------------------------------------------
# Layers


def _layer_differences(one: Subject, mine: _Layer, other: Subject, its: _Layer) -> Iterator[Difference]:
    """Read two layers, side by side, and yield what differs in them."""
    stop = threading.Event()
    with ThreadPoolExecutor(2, thread_name_prefix="compare") as pool:
        futures = [pool.submit(_read, subject, layer, stop) for subject, layer in ((one, mine), (other, its))]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
        left, right = (future.result() for future in futures)
    for subject, layer, read in ((one, mine, left), (other, its, right)):
        if f"sha256:{read.sha256}" != layer.diff_id:
            yield Difference(
                kind=Kind.CONFIG,
                layer=layer.title,
                path="rootfs.diff_ids",
                expected=f"sha256:{read.sha256[:12]}…, as the tar has",
                found=f"{_short(layer.diff_id)[:19]}…, as {subject.name} says",
            )
    if left.sha256 == right.sha256:
        yield Difference(
            kind=Kind.COMPRESSION,
            layer=mine.title,
            expected=f"{_blob(mine)}, {_type(mine)}",
            found=f"{_blob(its)}, {_type(its)}",
        )
    else:
        yield from _entry_differences(mine.title, left, right)


def _type(layer: _Layer) -> str:
    return _short(layer.blob.media_type.rpartition(".")[2])


class _StoppedError(Exception):
    """The other layer could not be read."""


def _read(subject: Subject, layer: _Layer, stop: threading.Event) -> Listing:
    def pieces() -> Iterator[bytes]:
        for piece in subject.pieces(layer.blob):
            if stop.is_set():
                raise _StoppedError
            yield piece

    limit = min(LARGEST, max(_SMALL, _RATIO * layer.blob.size))
    try:
        with open_pieces(pieces(), _known_type(layer.blob.media_type)) as file:
            return listing(file, limit=limit)
    except UNREADABLE as error:
        raise CellFailedError(
            f"a layer of {subject.name} cannot be read",
            where=f"{layer.title} ({layer.blob.digest})",
            why=_short(f"{type(error).__name__}: {error}"),
        ) from error


def _known_type(media_type: str) -> str:
    """Return how a layer is compressed, in OCI's words; Docker has others for the same."""
    for ending, known in (("zstd", layout.MEDIA_LAYER_ZSTD), ("gzip", layout.MEDIA_LAYER_GZIP)):
        if media_type.endswith(ending):
            return known
    return layout.MEDIA_LAYER_TAR


def _entry_differences(layer: str, one: Listing, other: Listing) -> Iterator[Difference]:
    def difference(kind: Kind, key: tuple[str, int], expected: str, found: str) -> Difference:
        path, number = key  # not cut: a path is to be found again
        shown = _writable(path) + (f" (entry {number + 1} of that name)" if number else "")
        return Difference(kind=kind, layer=layer, path=shown, expected=expected, found=found)

    for key, mine in one.entries.items():
        its = other.entries.get(key)
        if its is None:
            yield difference(Kind.MISSING, key, _described(mine), NOTHING)
        elif mine != its:
            for kind, expected, found in _of_entry(mine, its):
                yield difference(kind, key, expected, found)
    for key, its in other.entries.items():
        if key not in one.entries:
            yield difference(Kind.EXTRA, key, NOTHING, _described(its))
    places = {key: place for place, key in enumerate(key for key in other.entries if key in one.entries)}
    common = [key for key in one.entries if key in places]
    for index in _moved([places[key] for key in common]):
        yield difference(Kind.ENTRY_ORDER, common[index], f"entry {index + 1}", f"entry {places[common[index]] + 1}")
    if one.end != other.end:
        yield Difference(kind=Kind.FORMAT, layer=layer, path="the end of the tar", expected=one.end, found=other.end)


def _writable(text: str) -> str:
    """Return text that can be written as UTF-8; names in tars, and strings of JSON, may be none."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def _of_entry(one: Entry, other: Entry) -> Iterator[tuple[Kind, str, str]]:
    """Yield what differs in two entries of one path, that are not equal."""
    count = 0
    for difference in (*_of_kind(one, other), *_of_attributes(one, other)):
        count += 1
        yield difference
    if not count:
        same = "" if one.form != other.form else ", other bytes in its header"
        yield Kind.FORMAT, _short(one.form), _short(f"{other.form}{same}")


def _of_kind(one: Entry, other: Entry) -> Iterator[tuple[Kind, str, str]]:
    if Kind.HARD_LINK in (one.kind, other.kind) and (one.kind, one.target) != (other.kind, other.target):
        yield Kind.HARD_LINK, _described(one), _described(other)
    elif one.kind != other.kind:
        yield Kind.TYPE, _described(one), _described(other)
    elif one.target != other.target:
        yield Kind.TARGET, _short(one.target), _short(other.target)
    elif one.content is not None and other.content is not None:
        yield from _of_content(one.content, one.size, other.content, other.size)


def _of_content(one: Content, size: int, other: Content, its_size: int) -> Iterator[tuple[Kind, str, str]]:
    if one.sha256 == other.sha256:
        return
    mine, its = f"{size} bytes, sha256 {one.sha256[:12]}…", f"{its_size} bytes, sha256 {other.sha256[:12]}…"
    rule, its_rule = _rule(one.head), _rule(other.head)
    is_same = one.body is not None and one.body == other.body
    if not is_same:
        yield Kind.CONTENT, mine, its
    # The first bytes after the magic number say which rule it is; what is behind them changes with the source.
    if rule and its_rule and (is_same or one.head[:8] != other.head[:8]):
        yield Kind.BYTECODE, rule, its_rule
    elif is_same:
        yield Kind.ARCHIVE, mine, its


def _rule(head: bytes) -> str:
    """Say by which rule bytecode is valid, as PEP 552 has it; empty if it is none."""
    if head[2:4] != b"\r\n":
        return ""
    flags, first, second = (int.from_bytes(head[at : at + 4], "little") for at in (4, 8, 12))
    magic = f"Python's magic number {int.from_bytes(head[:2], 'little')}"
    if flags == 0:
        return f"{magic}, by its source's time, {_moment(str(first))}, and {second} bytes"
    by = {1: "unchecked hash", 3: "checked hash"}.get(flags, f"flags {flags}")
    return f"{magic}, by {by} {head[8:].hex()}"


def _of_attributes(one: Entry, other: Entry) -> Iterator[tuple[Kind, str, str]]:
    if one.mode != other.mode:
        yield Kind.MODE, f"{one.mode:04o}", f"{other.mode:04o}"
    if one.owner != other.owner:
        yield Kind.OWNER, _owner(one), _owner(other)
    if one.time != other.time:
        yield Kind.TIME, _moment(one.time), _moment(other.time)
    if one.device != other.device and one.kind == other.kind:
        yield Kind.DEVICE, "{}:{}".format(*one.device), "{}:{}".format(*other.device)
    if one.attributes != other.attributes:
        yield Kind.ATTRIBUTES, _attributes(one), _attributes(other)


def _described(entry: Entry) -> str:
    if entry.content is not None:
        return f"{entry.kind}, {entry.size} bytes"
    return _short(f"{entry.kind} to {entry.target}") if entry.target else entry.kind


def _owner(entry: Entry) -> str:
    uid, gid, user, group = entry.owner
    return _short(f"{uid}:{gid}" + (f" ({user}:{group})" if user or group else ""))


def _attributes(entry: Entry) -> str:
    return _short(", ".join(f"{key}={value[:40]!a}" for key, value in entry.attributes)) or "none"


def _moment(text: str) -> str:
    """Return seconds since 1970 as people read them."""
    seconds = Decimal(text)
    try:
        whole = layout.timestamp(int(seconds // 1))
    except (ValueError, OverflowError, OSError):
        return f"second {text}"
    return whole if seconds % 1 == 0 else f"{whole} and {seconds % 1} s"


# ----------------------------------------------------------------------------------------------------
# Forms


@dataclass(frozen=True, kw_only=True)
class Group:
    """The differences of one class in one layer."""

    kind: Kind
    layer: str
    count: int
    examples: tuple[Difference, ...]
    """The first of them."""

    def as_json(self) -> dict[str, Any]:
        """Return it as it is shown to machines."""
        return {
            "class": self.kind.value,
            "layer": self.layer or None,
            "count": self.count,
            "examples": [{"path": it.path, "expected": it.expected, "found": it.found} for it in self.examples],
        }


def grouped(differences: Iterable[Difference], *, most: int = EXAMPLES) -> tuple[Group, ...]:
    """Count differences by class and layer, in the order in which they come, and keep the first of each."""
    counts: Counter[tuple[str, Kind]] = Counter()
    kept: dict[tuple[str, Kind], list[Difference]] = defaultdict(list)
    for one in differences:
        key = (one.layer, one.kind)
        counts[key] += 1
        if counts[key] <= most:
            kept[key].append(one)
    return tuple(
        Group(kind=kind, layer=layer, count=count, examples=tuple(kept[layer, kind]))
        for (layer, kind), count in counts.items()
    )


def text(groups: Sequence[Group], *, top: int = 5) -> str:
    """Return the groups for people, with at most `top` examples of each."""
    lines: list[str] = []
    last = None
    for group in groups:
        if group.layer != last and group.layer:
            lines.append(f"layer  {group.layer}")
        last = group.layer
        lines.append(f"  {group.kind}: {group.count}  ({MEANING[group.kind]})")
        for one in group.examples[:top]:
            lines.append(f"    {one.path or 'all of it'}")
            lines.append(f"      expected  {one.expected}")
            lines.append(f"      found     {one.found}")
        if group.count > top:
            lines.append(f"    and {group.count - top} more")
    return "\n".join(lines)
