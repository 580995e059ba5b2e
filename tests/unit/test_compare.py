"""What differs between two images: every class of difference is found, at its path, and evil layers end in an error."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import random
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder import compare, layout, listing, tar
from builder.compare import Difference, Kind, Subject, grouped
from builder.errors import CellFailedError, ImpossibleError
from builder.layout import MEDIA_LAYER_GZIP, MEDIA_LAYER_TAR, MEDIA_LAYER_ZSTD, Descriptor
from builder.tar import Entry

TIME = 315_619_200

# --------------------------------------------------------------------------- images of a few bytes


def directory(path: str, **more: Any) -> Entry:
    return Entry(path=path, kind=tar.Kind.DIRECTORY, **{"mode": 0o755, "mtime": TIME, **more})


def file(path: str, content: bytes = b"content", **more: Any) -> Entry:
    return dataclasses.replace(tar.file_entry(path, content, mtime=TIME), **more)


def link(path: str, target: str, kind: tar.Kind = tar.Kind.SYMLINK, **more: Any) -> Entry:
    return Entry(path=path, kind=kind, target=target, **{"mode": 0o777, "mtime": TIME, **more})


ENTRIES = [
    directory("opt"),
    directory("opt/venv"),
    file("opt/venv/a.py", b"a = 1\n"),
    file("opt/venv/b.so", b"\x7fELF" + random.Random(1).randbytes(70_000)),
    link("opt/venv/lib64", "lib"),
    file("opt/venv/naïve.txt", "ï".encode()),
    link("opt/venv/z.py", "opt/venv/a.py", tar.Kind.HARDLINK, mode=0o644),
]


def packed(entries: Sequence[Entry]) -> bytes:
    return b"".join(tar.stream(entries))


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


Pack = Callable[[bytes], bytes]


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def image(
    *tars: bytes,
    pack: Pack = gzipped,
    media_type: str = MEDIA_LAYER_GZIP,
    titles: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    diff_ids: Sequence[str] | None = None,
    top: Mapping[str, Any] | None = None,
    name: str = "an image",
) -> Subject:
    """Make an image of layers; `config` is its run part, `top` and `manifest` replace fields of the two documents."""
    blobs = [pack(content) for content in tars]
    descriptors = [Descriptor(media_type=media_type, digest=digest_of(blob), size=len(blob)) for blob in blobs]
    titles = titles or [f"layer of {number}" for number in range(len(tars))]
    about = layout.image_config(
        architecture="amd64",
        config={"Env": ["A=1", "B=2"], "Labels": {"x": "y"}, "User": "1000:0"} if config is None else config,
        epoch=TIME,
        diff_ids=diff_ids or [digest_of(content) for content in tars],
        history=[layout.History(created_by=f"torchyard: {title}") for title in titles],
    )
    raw = layout.canonical_json({**about, **(top or {})})
    described = Descriptor(media_type=layout.MEDIA_CONFIG, digest=digest_of(raw), size=len(raw))
    document = {**layout.manifest(config=described, layers=descriptors), **(manifest or {})}
    by_digest = {digest_of(blob): blob for blob in blobs}

    def pieces(blob: Descriptor) -> Iterator[bytes]:
        content = by_digest[blob.digest]
        yield from (content[at : at + 1000] for at in range(0, len(content), 1000))

    return Subject(name=name, manifest=layout.canonical_json(document), config=raw, pieces=pieces)


def differences(one: Subject, other: Subject) -> list[Difference]:
    return list(compare.compare(one, other))


def only(one: Subject, other: Subject) -> Difference:
    (found,) = differences(one, other)
    return found


def of_layers(one: bytes, other: bytes) -> list[Difference]:
    return differences(image(one), image(other))


def changed(path: str, **change: Any) -> list[Entry]:
    assert any(entry.path == path for entry in ENTRIES)
    return [dataclasses.replace(entry, **change) if entry.path == path else entry for entry in ENTRIES]


def replaced(path: str, by: Entry) -> list[Entry]:
    return [by if entry.path == path else entry for entry in ENTRIES]


# --------------------------------------------------------------------------- nothing


def test_the_same_image_differs_in_nothing_and_is_not_read() -> None:
    def never(_: Descriptor) -> Iterator[bytes]:
        raise AssertionError

    one = dataclasses.replace(image(packed(ENTRIES)), pieces=never)
    assert differences(one, one) == []


def test_layers_of_the_same_digest_are_not_read() -> None:
    def never(_: Descriptor) -> Iterator[bytes]:
        raise AssertionError

    one = dataclasses.replace(image(packed(ENTRIES)), pieces=never)
    other = dataclasses.replace(image(packed(ENTRIES), config={}), pieces=never)
    assert {found.kind for found in differences(one, other)} == {Kind.CONFIG}


# --------------------------------------------------------------------------- documents

CONFIGS: Sequence[tuple[str, dict[str, Any], str, str, str]] = [
    ("variable", {"Env": ["A=1", "B=3"]}, "config.Env.B", "2", "3"),
    ("variable gone", {"Env": ["A=1"]}, "config.Env.B", "2", "nothing"),
    ("order of variables", {"Env": ["B=2", "A=1"]}, "config.Env, its order", '["A", "B"]', '["B", "A"]'),
    ("no variables", {"Env": "A=1"}, "config.Env", '["A=1", "B=2"]', "A=1"),
    ("label", {"Labels": {"x": "z"}}, "config.Labels.x", "y", "z"),
    ("further label", {"Labels": {"x": "y", "w": ""}}, "config.Labels.w", "nothing", '""'),
    ("user", {"User": "root"}, "config.User", "1000:0", "root"),
    ("entry point", {"Entrypoint": ["/bin/sh"]}, "config.Entrypoint", "nothing", '["/bin/sh"]'),
]


@pytest.mark.parametrize(
    ("change", "path", "expected", "found"), [it[1:] for it in CONFIGS], ids=[it[0] for it in CONFIGS]
)
def test_a_field_of_the_configuration(change: dict[str, Any], path: str, expected: str, found: str) -> None:
    base = {"Env": ["A=1", "B=2"], "Labels": {"x": "y"}, "User": "1000:0"}
    one, other = image(packed(ENTRIES)), image(packed(ENTRIES), config={**base, **change})
    assert only(one, other) == Difference(kind=Kind.CONFIG, path=path, expected=expected, found=found)


def test_created_history_and_platform() -> None:
    one = image(packed(ENTRIES))
    assert only(one, image(packed(ENTRIES), top={"created": "2026-01-01T00:00:00Z"})).path == "created"
    assert only(one, image(packed(ENTRIES), top={"architecture": "arm64"})).path == "architecture"
    found = only(one, image(packed(ENTRIES), titles=["another"]))
    assert (found.kind, found.path) == (Kind.CONFIG, "history[0].created_by")
    assert (found.expected, found.found) == ("torchyard: layer of 0", "torchyard: another")
    found = only(one, image(packed(ENTRIES), top={"history": []}))
    assert (found.path, found.found) == ("history[0]", "nothing")
    found = only(
        one, image(packed(ENTRIES), top={"rootfs": {"type": "else", "diff_ids": [digest_of(packed(ENTRIES))]}})
    )
    assert found.path == "rootfs.type"


def test_a_field_of_the_manifest() -> None:
    one, other = image(packed(ENTRIES)), image(packed(ENTRIES), manifest={"annotations": {"a": "b"}})
    assert only(one, other) == Difference(
        kind=Kind.MANIFEST, path="annotations", expected="nothing", found='{"a": "b"}'
    )
    found = only(one, image(packed(ENTRIES), media_type="application/vnd.docker.image.rootfs.diff.tar.gzip"))
    assert (found.kind, found.layer, found.path) == (Kind.MANIFEST, "layer of 0", "layers")
    assert "docker" in found.found


def test_documents_that_are_spelled_otherwise() -> None:
    one = image(packed(ENTRIES))
    spaced = json.dumps(json.loads(one.manifest), indent=1).encode()
    assert only(one, dataclasses.replace(one, manifest=spaced)) == Difference(
        kind=Kind.SPELLING, path="manifest", expected=f"{len(one.manifest)} bytes", found=f"{len(spaced)} bytes"
    )
    config = json.dumps(json.loads(one.config), indent=1).encode()
    document = json.loads(one.manifest)
    document["config"] |= {"digest": digest_of(config), "size": len(config)}
    other = dataclasses.replace(one, config=config, manifest=layout.canonical_json(document))
    found = only(one, other)
    assert (found.kind, found.path) == (Kind.SPELLING, "config")


# --------------------------------------------------------------------------- layers

A, B, C = (packed([file(name, name.encode() * 50)]) for name in "abc")


def test_layers_that_are_missing_extra_or_moved() -> None:
    assert {(it.kind, it.layer) for it in differences(image(A, B), image(A)) if it.kind is not Kind.CONFIG} == {
        (Kind.LAYER_MISSING, "layer of 1")
    }
    assert {(it.kind, it.layer) for it in differences(image(A), image(A, C)) if it.kind is not Kind.CONFIG} == {
        (Kind.LAYER_EXTRA, "layer of 1")
    }
    found = differences(image(A, B, C, titles="abc"), image(B, C, A, titles="bca"))
    moved = [it for it in found if it.kind is not Kind.CONFIG]
    assert [(it.kind, it.layer, it.expected, it.found) for it in moved] == [
        (Kind.LAYER_ORDER, "a", "layer 1", "layer 3")
    ]


def test_layers_are_compared_with_those_of_the_same_title() -> None:
    other = packed([file("a", b"other")])
    found = [it for it in differences(image(A, B, titles="ab"), image(B, other, titles="ba")) if it.layer == "a"]
    assert {(it.kind, it.path) for it in found} == {(Kind.CONTENT, "a"), (Kind.LAYER_ORDER, "")} or {
        (it.kind, it.path) for it in found
    } == {(Kind.CONTENT, "a")}
    # What is left has another title, and is as much on both sides.
    found = differences(image(A, B, titles="ab"), image(A, packed([file("b", b"other")]), titles="ac"))
    assert (Kind.CONTENT, "b", "b") in {(it.kind, it.layer, it.path) for it in found}


def test_images_without_history_have_numbered_layers() -> None:
    one, other = (image(A, second, top={"history": None}) for second in (B, packed([file("b", b"!")])))
    assert {it.layer for it in differences(one, other)} == {"layer 2"}


@pytest.mark.parametrize(
    ("pack", "media_type"),
    [
        (lambda content: gzip.compress(content, 1, mtime=0), MEDIA_LAYER_GZIP),
        (lambda content: gzip.compress(content, mtime=1), MEDIA_LAYER_GZIP),
        (lambda content: gzip.compress(content[:9], mtime=0) + gzip.compress(content[9:], mtime=0), MEDIA_LAYER_GZIP),
        (zstandard.ZstdCompressor(level=3).compress, MEDIA_LAYER_ZSTD),
        (lambda content: content, MEDIA_LAYER_TAR),
        (lambda content: content, "application/vnd.docker.image.rootfs.diff.tar"),
    ],
    ids=["level", "gzip header", "members", "zstd", "none", "none, by Docker"],
)
def test_the_same_tar_compressed_otherwise(pack: Pack, media_type: str) -> None:
    found = only(image(packed(ENTRIES)), image(packed(ENTRIES), pack=pack, media_type=media_type))
    assert (found.kind, found.layer, found.path) == (Kind.COMPRESSION, "layer of 0", "")
    assert found.expected != found.found


def test_a_configuration_that_lies_about_a_layer_is_found_out() -> None:
    one, lying = image(A), image(B, diff_ids=[digest_of(A)], name="a liar")
    found = differences(one, lying)
    assert [(it.kind, it.path) for it in found] == [
        (Kind.CONFIG, "rootfs.diff_ids"), (Kind.MISSING, "a"), (Kind.EXTRA, "b"),
    ]  # fmt: skip
    assert "as a liar says" in found[0].found
    (other,) = differences(image(A), image(A, diff_ids=[digest_of(B)]))
    assert (other.kind, other.path) == (Kind.CONFIG, "rootfs.diff_ids")


# --------------------------------------------------------------------------- files

PYC = b"\xa7\x0d\x0d\x0a"
CODE = b"code" * 40
HASHED = PYC + struct.pack("<L8s", 1, b"12345678") + CODE
TIMED = PYC + struct.pack("<LLL", 0, TIME, 17) + CODE


def archive(mtime: int, content: bytes = b"object", *, owner: int = 0) -> bytes:
    """Make an `ar` archive of two members, the first of an odd size."""
    parts = [b"!<arch>\n"]
    for name, body in ((b"a.o/", b"odd"), (b"b.o/", content)):
        header = b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name, mtime, owner, owner, b"100644", len(body))
        parts += [header, body, b"\n" * (len(body) % 2)]
    return b"".join(parts)


PATH = "opt/venv/b.so"
FILES: Sequence[tuple[str, list[Entry], list[Entry], str, Kind, str, str]] = [
    ("mode", ENTRIES, changed(PATH, mode=0o600), PATH, Kind.MODE, "0644", "0600"),
    ("setuid", ENTRIES, changed(PATH, mode=0o4755), PATH, Kind.MODE, "0644", "4755"),
    ("user", ENTRIES, changed(PATH, uid=1000), PATH, Kind.OWNER, "0:0", "1000:0"),
    ("group", ENTRIES, changed(PATH, gid=8**8), PATH, Kind.OWNER, "0:0", f"0:{8**8}"),
    ("time", ENTRIES, changed("opt", mtime=1_795_000_000), "opt", Kind.TIME, "1980-01-02T00:00:00Z",
     "2026-11-18T11:06:40Z"),
    ("target", ENTRIES, changed("opt/venv/lib64", target="lib32"), "opt/venv/lib64", Kind.TARGET, "lib", "lib32"),
    ("hard link leads elsewhere", ENTRIES, changed("opt/venv/z.py", target=PATH), "opt/venv/z.py", Kind.HARD_LINK,
     "hard link to opt/venv/a.py", f"hard link to {PATH}"),
    ("hard link is a file", ENTRIES, replaced("opt/venv/z.py", file("opt/venv/z.py", b"a = 1\n")), "opt/venv/z.py",
     Kind.HARD_LINK, "hard link to opt/venv/a.py", "file, 6 bytes"),
    ("type", ENTRIES, replaced(PATH, link(PATH, "x", mode=0o644)), PATH, Kind.TYPE, "file, 70004 bytes",
     "symbolic link to x"),
    ("device", [link("d", "", tar.Kind.CHARACTER_DEVICE, device=(1, 3))],
     [link("d", "", tar.Kind.CHARACTER_DEVICE, device=(1, 5))], "d", Kind.DEVICE, "1:3", "1:5"),
    ("attribute", ENTRIES, changed(PATH, xattrs={"user.x": b"\0y"}), PATH, Kind.ATTRIBUTES, "none",
     r"user.x=b'\x00y'"),
    ("missing", ENTRIES, [it for it in ENTRIES if it.path != PATH], PATH, Kind.MISSING, "file, 70004 bytes", "nothing"),
    ("extra", ENTRIES, [*ENTRIES, link("opt/zz", "a")], "opt/zz", Kind.EXTRA, "nothing", "symbolic link to a"),
    ("bytecode by time", [file("a.pyc", HASHED)], [file("a.pyc", TIMED)], "a.pyc", Kind.BYTECODE,
     "Python's magic number 3495, by unchecked hash 3132333435363738",
     "Python's magic number 3495, by its source's time, 1980-01-02T00:00:00Z, and 17 bytes"),
    ("bytecode by checked hash", [file("a.pyc", HASHED)], [file("a.pyc", PYC + b"\3" + HASHED[5:])], "a.pyc",
     Kind.BYTECODE, "Python's magic number 3495, by unchecked hash 3132333435363738",
     "Python's magic number 3495, by checked hash 3132333435363738"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "path", "kind", "expected", "found"), [it[1:] for it in FILES], ids=[it[0] for it in FILES]
)
def test_a_class_of_difference_between_two_entries(
    one: list[Entry], other: list[Entry], path: str, kind: Kind, expected: str, found: str
) -> None:
    assert of_layers(packed(one), packed(other)) == [
        Difference(kind=kind, layer="layer of 0", path=path, expected=expected, found=found)
    ]


def test_content_by_size_and_hash() -> None:
    changes = (b"\x7fELF" + random.Random(2).randbytes(70_000), b"", b"short")
    for content in changes:
        (found,) = of_layers(packed(ENTRIES), packed(replaced(PATH, file(PATH, content))))
        assert (found.kind, found.path) == (Kind.CONTENT, PATH)
        assert found.found == f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}…"


def test_other_bytecode_is_content_and_says_by_which_rule_it_is_valid() -> None:
    other = HASHED[:-1] + b"!"
    assert [it.kind for it in of_layers(packed([file("a.pyc", HASHED)]), packed([file("a.pyc", other)]))] == [
        Kind.CONTENT
    ]
    other = TIMED[:-1] + b"!"
    found = of_layers(packed([file("a.pyc", HASHED)]), packed([file("a.pyc", other)]))
    assert [it.kind for it in found] == [Kind.CONTENT, Kind.BYTECODE]
    # Nothing that is called so, and is none.
    found = of_layers(packed([file("a.pyc", b"0123456789abcdefgh")]), packed([file("a.pyc", b"9123456789abcdefgh")]))
    assert [it.kind for it in found] == [Kind.CONTENT]


def test_headers_of_archives_inside_a_file() -> None:
    def kinds(one: bytes, other: bytes) -> list[Kind]:
        return [it.kind for it in of_layers(packed([file("lib.x", one)]), packed([file("lib.x", other)]))]

    assert kinds(archive(0), archive(TIME)) == [Kind.ARCHIVE]
    assert kinds(archive(0), archive(0, owner=1000)) == [Kind.ARCHIVE]
    assert kinds(archive(0), archive(TIME, b"others")) == [Kind.CONTENT]
    assert kinds(archive(0), archive(TIME, b"longer than before")) == [Kind.CONTENT]
    assert kinds(archive(0) + b"rest that is no member" * 9, archive(1) + b"rest that is no member" * 9) == [
        Kind.CONTENT
    ]
    noise = random.Random(3).randbytes(3 << 20)  # its members lie in several pieces
    assert kinds(archive(0, noise), archive(1, noise)) == [Kind.ARCHIVE]
    assert kinds(gzip.compress(b"x", mtime=0), gzip.compress(b"x", mtime=TIME)) == [Kind.ARCHIVE]
    assert kinds(gzip.compress(b"x", mtime=0), gzip.compress(b"y", mtime=0)) == [Kind.CONTENT]


def test_several_differences_of_one_file() -> None:
    other = changed(PATH, mode=0o600, uid=7, mtime=0)
    assert [it.kind for it in of_layers(packed(ENTRIES), packed(other))] == [Kind.MODE, Kind.OWNER, Kind.TIME]


def test_the_order_of_entries_names_what_moved_and_nothing_else() -> None:
    other = [*ENTRIES[:2], *ENTRIES[3:], ENTRIES[2]]
    assert of_layers(packed(ENTRIES), packed(other)) == [
        Difference(kind=Kind.ENTRY_ORDER, layer="layer of 0", path="opt/venv/a.py", expected="entry 3", found="entry 7")
    ]
    found = of_layers(packed(ENTRIES), packed(ENTRIES[::-1]))
    assert {it.kind for it in found} == {Kind.ENTRY_ORDER}
    assert len(found) == len(ENTRIES) - 1


def test_an_entry_that_occurs_twice() -> None:
    (found,) = of_layers(packed(ENTRIES), packed([*ENTRIES, ENTRIES[2]]))
    assert (found.kind, found.path) == (Kind.EXTRA, "opt/venv/a.py (entry 2 of that name)")


# --------------------------------------------------------------------------- how tars are written


def by_python(form: int, *, name: str = "opt/a", **more: Any) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as members:
        member = tarfile.TarInfo(name)
        member.mtime, member.size = TIME, 5
        for key, value in more.items():
            setattr(member, key, value)
        members.addfile(member, io.BytesIO(b"12345"))
    return target.getvalue()


def test_another_dialect() -> None:
    (found, end) = of_layers(packed([file("opt/a", b"12345")]), by_python(tarfile.GNU_FORMAT))
    assert (found.kind, found.path, found.expected, found.found) == (Kind.FORMAT, "opt/a", "ustar", "GNU")
    assert (end.kind, end.path) == (Kind.FORMAT, "the end of the tar")
    assert (end.expected, end.found) == ("1024 bytes", "9216 bytes")


@pytest.mark.parametrize("name", ["opt/a", "d/" * 90 + "a", "opt/" + "long" * 50, "opt/ä"])
def test_dialects_say_the_same(name: str) -> None:
    """Long names, numbers and links come out the same, however they were written."""
    written = {form: by_python(form, name=name, uid=8**7) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)}
    found = of_layers(*written.values())
    assert {it.kind for it in found} == {Kind.FORMAT}
    assert {it.path for it in found} <= {name, "the end of the tar"}
    mine = packed([file(name, b"12345", uid=8**7)])
    assert {it.kind for it in of_layers(mine, written[tarfile.PAX_FORMAT])} == {Kind.FORMAT}


def test_names_that_differ_in_what_means_nothing() -> None:
    (found, *_) = of_layers(packed([file("opt/a", b"12345")]), by_python(tarfile.USTAR_FORMAT, name="./opt/a"))
    assert (found.kind, found.path, found.found) == (Kind.FORMAT, "opt/a", "ustar, other bytes in its header")


def test_names_of_owners_and_fractions_of_times() -> None:
    one = by_python(tarfile.PAX_FORMAT)
    (found,) = of_layers(one, by_python(tarfile.PAX_FORMAT, uname="root", gname="wheel"))
    assert (found.kind, found.expected, found.found) == (Kind.OWNER, "0:0", "0:0 (root:wheel)")
    found, *_ = of_layers(one, by_python(tarfile.PAX_FORMAT, mtime=TIME + 0.5))
    assert (found.kind, found.found) == (Kind.TIME, "1980-01-02T00:00:00Z and 0.5 s")
    assert {it.kind for it in of_layers(one, by_python(tarfile.PAX_FORMAT, pax_headers={"atime": "5"}))} == {
        Kind.FORMAT
    }


def test_what_hides_in_padding_and_behind_the_end() -> None:
    content = packed([file("a", b"12345")])
    hidden = content[: 512 + 5] + b"hidden" + content[512 + 5 + 6 :]
    (found,) = of_layers(content, hidden)
    assert (found.kind, found.path, found.found) == (Kind.FORMAT, "a", "bytes as padding, ustar")
    (found,) = of_layers(content, content + b"hidden".ljust(512, b"\0"))
    assert (found.path, found.found) == ("the end of the tar", "1536 bytes, not all zero")
    (found,) = of_layers(content, content[:-1024])
    assert found.found == "0 bytes"


def test_what_holds_for_all_entries() -> None:
    pax = io.BytesIO()
    with tarfile.open(
        fileobj=pax, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"uid": "77", "comment": "c"}
    ) as it:
        member = tarfile.TarInfo("a")
        member.mtime = TIME
        it.addfile(member)
    (found, *_) = of_layers(packed([file("a", b"")]), pax.getvalue())
    assert (found.kind, found.found) == (Kind.OWNER, "77:0")


# --------------------------------------------------------------------------- one random change

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30)
paths = (
    st.lists(names, min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda path: not {".", ".."} & set(path.split("/")) and path.strip("/") == path)
)
contents = st.binary(max_size=2000)


@st.composite
def trees(draw: st.DrawFn) -> list[Entry]:
    found = draw(st.lists(paths, min_size=1, max_size=8, unique=True))
    return [
        draw(st.sampled_from([file(path, draw(contents)), directory(path), link(path, draw(paths))])) for path in found
    ]


def another(draw: st.DrawFn, strategy: st.SearchStrategy[Any], than: Any) -> Any:
    return draw(strategy.filter(lambda value: value != than))


@st.composite
def one_change(draw: st.DrawFn) -> tuple[list[Entry], list[Entry], str, Kind]:
    """Return a tree, the same with one change, where that is, and of which class."""
    before = draw(trees())
    index = draw(st.integers(0, len(before) - 1))
    entry = before[index]
    kinds = [Kind.MODE, Kind.OWNER, Kind.TIME, Kind.MISSING, Kind.EXTRA, Kind.ATTRIBUTES, Kind.TYPE]
    kinds += {tar.Kind.FILE: [Kind.CONTENT], tar.Kind.SYMLINK: [Kind.TARGET]}.get(entry.kind, [])
    kind = draw(st.sampled_from(kinds))
    new: list[Entry]
    if kind is Kind.MISSING:
        new = []
    elif kind is Kind.EXTRA:
        added = file(another(draw, paths.filter(lambda it: it not in {one.path for one in before}), None))
        return before, [*before[:index], added, *before[index:]], added.path, kind
    elif kind is Kind.TYPE:
        new = [dataclasses.replace(directory(entry.path), kind=tar.Kind.FIFO)]
        new[0] = dataclasses.replace(new[0], mode=entry.mode)
    elif kind is Kind.CONTENT:
        new = [file(entry.path, another(draw, contents, entry.read()))]
    else:
        values: dict[Kind, tuple[str, st.SearchStrategy[Any], Any]] = {
            Kind.MODE: ("mode", st.integers(0, 0o7777), entry.mode),
            Kind.OWNER: ("uid", st.integers(0, 2**31), 0),
            Kind.TIME: ("mtime", st.integers(0, 8**11 - 1), TIME),
            Kind.ATTRIBUTES: ("xattrs", contents.map(lambda value: {"user.a": value}), {}),
            Kind.TARGET: ("target", paths, entry.target),
        }
        name, strategy, before_it = values[kind]
        change = {name: another(draw, strategy, before_it)}
        new = [dataclasses.replace(entry, **change)]
    return before, [*before[:index], *new, *before[index + 1 :]], entry.path, kind


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(one_change())
def test_one_random_change_is_found_at_its_path_and_by_its_class(
    case: tuple[list[Entry], list[Entry], str, Kind],
) -> None:
    before, after, path, kind = case
    (found,) = of_layers(packed(before), packed(after))
    assert found.kind is kind
    assert found.path == path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(), unique=True, max_size=40))
def test_as_few_entries_as_possible_have_moved(places: list[int]) -> None:
    moved = set(compare._moved(places))
    staying = [place for index, place in enumerate(places) if index not in moved]
    assert staying == sorted(staying)
    if len(places) > 1 and places != sorted(places):
        assert moved
    assert len(staying) >= len(places) ** 0.5 or sorted(places, reverse=True) == places or len(moved) < len(places)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 6), st.integers(0, 5000))
def test_damaged_tars_end_in_an_error_or_in_differences(noise: bytes, how: int, at: int) -> None:
    whole = packed(ENTRIES)
    at %= len(whole)
    broken = [noise, whole[:at], whole[:at] + noise + whole[at:], noise + whole, whole[:at] + whole[at + 1 :],
              whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + noise][how]  # fmt: skip
    if broken == whole:
        return
    with contextlib.suppress(CellFailedError):
        assert of_layers(whole, broken)


# --------------------------------------------------------------------------- evil


def header(name: bytes = b"a", *, size: int | bytes = 0, kind: bytes = b"0") -> bytes:
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(
        name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"%011o\0" % TIME + b" " * 8 + kind
    ).ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    assert len(block) == 512
    return bytes(block)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    body = b"".join(records)
    return header(b"pax", size=len(body), kind=kind) + body + tar.padding(len(body))


def record(key: str, value: bytes) -> bytes:
    return tar._record(key, value)


END = bytes(1024)
NEGATIVE = b"\xff" * 12
EVIL_TARS: Sequence[tuple[str, bytes, str]] = [
    ("no tar", b"<html>" * 200, "InvalidHeaderError|ReadError|bad checksum"),
    ("cut in a header", packed(ENTRIES)[:700], "ends in the middle of a"),
    ("cut in a file", packed(ENTRIES)[:4000], "ends in the middle of an entry"),
    ("says more than there is", header(size=1 << 40) + bytes(4096), "ends in the middle of an entry"),
    ("negative size", header(size=NEGATIVE), "negative size"),
    ("huge header", header(kind=b"L", size=3 << 20) + bytes(3 << 20), "a header has 3145728 bytes"),
    ("endless header", header(kind=b"x", size=8**11 - 1), "a header has 8589934591 bytes"),
    ("many records", pax(*(record(f"k{n}", b"") for n in range(600))), "more than 500 records"),
    ("many records for all", pax(*(record(f"k{n}", b"") for n in range(600)), kind=b"g"), "more than 500 records"),
    ("long key", pax(record("k" * 400, b"")), "a name that is too long"),
    ("no record", pax(b"nonsense\n"), "a record that is none"),
    ("record without end", pax(b"99 path=a\n"), "a record that is none"),
    ("record of negative length", pax(b"-5 path=a\n"), "a record that is none"),
    ("record that goes back", pax(b"0 path=a\n"), "a record that is none"),
    ("size in words", pax(record("size", b"many")) + header(), "says that size is"),
    ("owner below zero", pax(record("uid", b"-1")) + header(), "says that uid is"),
    ("time in words", pax(record("mtime", b"soon")) + header(), "says that mtime is"),
    ("time without end", pax(record("mtime", b"inf")) + header(), "says that mtime is"),
    ("time of many digits", pax(record("mtime", b"1e30")) + header(), "says that mtime is"),
    ("long name", pax(record("path", b"n" * 5000)) + header(), "name of more than 4096"),
    ("header for nothing", pax(record("path", b"a")) + END, "headers that belong to no entry"),
    ("sparse", header(kind=b"S"), "sparse file"),
]


@pytest.mark.parametrize(("content", "message"), [it[1:] for it in EVIL_TARS], ids=[it[0] for it in EVIL_TARS])
def test_an_evil_tar_is_refused_and_named(content: bytes, message: str) -> None:
    with pytest.raises(CellFailedError, match="a layer of the registry's cannot be read") as caught:
        differences(image(A), image(content, name="the registry's"))
    (problem,) = caught.value.problems
    assert "layer of 0" in problem.where
    assert re.search(message, problem.why), problem.why


def test_weird_names_are_shown_as_they_can_be_written() -> None:
    weird = [b"\xff\xfe", b"a\x1b[2Jb", b"../../etc/passwd", b"/etc/shadow", b"a\nb", b"::set-output name=x::y"]
    content = b"".join(header(name) for name in weird) + END
    found = of_layers(packed([directory("d")]), content)
    shown = [it.path for it in found if it.kind is Kind.EXTRA]
    assert shown == ["\\xff\\xfe", "a\x1b[2Jb", "../../etc/passwd", "etc/shadow", "a\nb", "::set-output name=x::y"]
    json.dumps([group.as_json() for group in grouped(found)], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("blob", "media_type"),
    [
        (gzipped(packed(ENTRIES))[:-9], MEDIA_LAYER_GZIP),
        (gzipped(packed(ENTRIES))[:2000], MEDIA_LAYER_GZIP),
        (gzipped(packed(ENTRIES))[:-8] + bytes(8), MEDIA_LAYER_GZIP),
        (b"no gzip" * 99, MEDIA_LAYER_GZIP),
        (b"no zstd" * 99, MEDIA_LAYER_ZSTD),
        (gzipped(packed(ENTRIES)) + b"garbage" * 9, MEDIA_LAYER_GZIP),
    ],
    ids=["cut in the trailer", "cut", "wrong CRC", "no gzip", "no zstd", "more behind it"],
)
def test_a_layer_that_cannot_be_inflated(blob: bytes, media_type: str) -> None:
    with pytest.raises(CellFailedError, match="cannot be read"):
        differences(image(packed(ENTRIES)), image(b"x", pack=lambda _: blob, media_type=media_type))


def test_a_bomb_is_stopped_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_SMALL", 1 << 20)
    zeros = header(size=1 << 30)
    for blob, media_type in (
        (zlib.compressobj(9, wbits=31), MEDIA_LAYER_GZIP),
        (zstandard.ZstdCompressor().compressobj(), MEDIA_LAYER_ZSTD),
    ):
        parts = [blob.compress(zeros)] + [blob.compress(bytes(1 << 20)) for _ in range(64)]
        bomb = b"".join([*parts, blob.flush()])
        started = time.monotonic()
        with pytest.raises(CellFailedError) as caught:
            differences(image(A), image(bomb, pack=bytes, media_type=media_type))
        assert "unpacks to more than" in caught.value.problems[0].why
        assert time.monotonic() - started < 5


def test_zeros_behind_the_end_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_SMALL", 1 << 20)
    with pytest.raises(CellFailedError, match="cannot be read"):
        differences(image(A), image(A + bytes(64 << 20)))


def test_too_many_entries_or_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    many = packed([file(str(number), b"") for number in range(200)])
    monkeypatch.setattr(listing, "ENTRIES_MAX", 100)
    with pytest.raises(CellFailedError) as caught:
        of_layers(A, many)
    assert "more than 100 entries" in caught.value.problems[0].why
    monkeypatch.setattr(listing, "ENTRIES_MAX", 1000)
    monkeypatch.setattr(listing, "KEPT_MAX", 100)
    with pytest.raises(CellFailedError) as caught:
        of_layers(A, many)
    assert "names and further headers" in caught.value.problems[0].why


def test_thousands_of_entries_of_one_name_take_no_time() -> None:
    content = b"".join([header()] * 5000) + END
    started = time.monotonic()
    assert len(of_layers(packed([file("a", b"")]), content)) == 5000 - 1 + 1
    assert time.monotonic() - started < 20


def test_the_other_layer_is_not_read_on_when_one_fails() -> None:
    read = 0

    def endless(_: Descriptor) -> Iterator[bytes]:
        nonlocal read
        blob = gzipped(bytes(1 << 20))
        yield gzipped(header(size=8**11 - 1))
        while True:
            read += 1
            yield blob

    one = dataclasses.replace(image(A), pieces=endless)
    with pytest.raises(CellFailedError, match="the registry's"):
        differences(one, image(b"no tar at all" * 99, name="the registry's"))
    assert read < 3000


EVIL_DOCUMENTS: Mapping[str, tuple[bytes, bytes]] = {
    "no JSON": (b"{", b"{}"),
    "no object": (b"[]", b"{}"),
    "nothing in it": (b"{}", b"{}"),
    "deep": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"{}"),
    "layers that are none": (b'{"layers": [1], "config": {}}', b"{}"),
    "digest that is none": (b'{"layers": [{"digest": "md5:1", "size": 1, "mediaType": "x"}], "config": {}}', b"{}"),
    "config that is none": (json.loads(b"null") or image(A).manifest, b"[]"),
    "other number of layers": (image(A, B).manifest, image(A).config),
    "history that is none": (image(A).manifest, image(A, top={"history": "no"}).config),
}


@pytest.mark.parametrize("documents", EVIL_DOCUMENTS.values(), ids=EVIL_DOCUMENTS)
def test_what_is_no_image_is_refused(documents: tuple[bytes, bytes]) -> None:
    manifest, config = documents
    evil = dataclasses.replace(image(A, name="the registry's"), manifest=manifest, config=config)
    with pytest.raises(ImpossibleError, match="no image that can be compared") as caught:
        differences(image(C), evil)
    assert caught.value.problems[0].where == "the registry's"


def test_documents_nested_as_deep_as_can_be_read_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [{"a": deep}]
    other: list[Any] = [1]
    for _ in range(900):
        other = [{"a": other}]
    try:
        one, two = (json.dumps(it) for it in (deep, other))
    except RecursionError:
        one, two = "[" * 900 + "]" * 900, "[" * 900 + "1" + "]" * 900
    evil = [
        dataclasses.replace(image(A), manifest=image(A).manifest[:-1] + b',"x":' + text.encode() + b"}")
        for text in (one, two)
    ]
    with contextlib.suppress(ImpossibleError):
        assert differences(*evil)


# --------------------------------------------------------------------------- forms


def test_groups_count_all_and_keep_some() -> None:
    before = packed([file(f"f{number}") for number in range(300)])
    after = packed([file(f"f{number}", mtime=7) for number in range(300)])
    (group,) = grouped(compare.compare(image(before), image(after)))
    assert (group.kind, group.layer, group.count, len(group.examples)) == (Kind.TIME, "layer of 0", 300, 100)
    assert group.as_json()["class"] == "time"
    assert group.as_json()["examples"][0] == {
        "path": "f0", "expected": "1980-01-02T00:00:00Z", "found": "1970-01-01T00:00:07Z",
    }  # fmt: skip
    shown = compare.text([group], top=2)
    assert shown.splitlines()[:3] == ["layer  layer of 0", f"  time: 300  ({compare.MEANING[Kind.TIME]})", "    f0"]
    assert shown.splitlines()[-1] == "    and 298 more"


def test_every_class_says_what_it_means() -> None:
    assert set(compare.MEANING) == set(Kind)
