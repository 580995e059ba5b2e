"""What is installed in an image is read out of its layers, the upper ones over the lower ones."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence

import pytest

from builder import layout, tar
from builder.engines.oci import installed as installing
from builder.engines.oci.entries import Entry, Wanted, entries
from builder.engines.oci.installed import dist_info, identity, installed
from builder.layout import Layer
from builder.store import Store
from tests.support.bases import directory, layer_of

SITE = "opt/venv/lib/python3/site-packages"
STATUS = "var/lib/dpkg/status"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def text(path: str, content: str = "") -> tar.Entry:
    return tar.file_entry(path, content.encode())


def metadata(name: str, version: str, *, at: str = SITE) -> tar.Entry:
    return text(
        f"{at}/{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n"
    )


def status(*packages: str, how: str = "install ok installed") -> tar.Entry:
    stanzas = []
    for package in packages:
        name, version, architecture = package.split()
        stanzas.append(f"Package: {name}\nStatus: {how}\nArchitecture: {architecture}\nVersion: {version}\n more\n")
    return text(STATUS, "\n".join(stanzas))


def layers(store: Store, *several: Sequence[tar.Entry]) -> list[Layer]:
    return [layer_of(store, entries) for entries in several]


def python_in(store: Store, *several: Sequence[tar.Entry]) -> list[str]:
    return [f"{it.name} {it.version}" for it in installed(store, layers(store, *several)).distributions]


def debian_in(store: Store, *several: Sequence[tar.Entry]) -> list[str]:
    return [f"{it.name} {it.version}" for it in installed(store, layers(store, *several)).debian]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b/c.py", None),
        ("a/x-1.dist-info", "a/x-1.dist-info"),
        ("a/x-1.dist-info/METADATA", "a/x-1.dist-info"),
        ("x-1.dist-info/licenses/y.dist-info/z", "x-1.dist-info"),
        ("a/x.dist-info.py", None),
        ("a/notes-on.dist-info-files/x", None),
    ],
)
def test_whose_directory_a_path_lies_in(path: str, expected: str | None) -> None:
    assert dist_info(path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Name: A_b.C\nVersion: 1.0.0rc1\n\nName: other\n", ("a-b-c", "1.0.0rc1")),
        (b"Name: x\nVersion: 2024.01\n", ("x", "2024.1")),
        (b"Name: x\nVersion: whatever\n", ("x", "whatever")),
        (b"", ("some-thing", "3")),
        (b"Version: 4\n", ("some-thing", "4")),
        (b"\xff\xfe\x00", ("some-thing", "3")),
    ],
)
def test_who_a_distribution_is(content: bytes, expected: tuple[str, str]) -> None:
    assert identity("a/some_thing-3.dist-info", content) == expected


def test_each_thing_is_found_in_its_layer(store: Store) -> None:
    base, wheels, own = layers(
        store,
        [status("libc6 2.36-9 amd64", "tzdata 1:2026a all")],
        [metadata("torch", "2.8.0+cu128"), metadata("wheel", "1.0", at=f"{SITE}/setuptools/_vendor")],
        [tar.file_entry("opt/venv/bin/torchyard-start", b"#!/bin/sh\n", mode=0o755), text("opt/venv/bin/pip")],
    )
    found = installed(store, [base, wheels, own])
    assert {(it.path, it.version, it.layer) for it in found.distributions} == {
        (f"/{SITE}/torch-2.8.0+cu128.dist-info", "2.8.0+cu128", wheels.blob.digest),
        (f"/{SITE}/setuptools/_vendor/wheel-1.0.dist-info", "1.0", wheels.blob.digest),
    }
    assert [(it.name, it.version, it.architecture, it.layer) for it in found.debian] == [
        ("libc6", "2.36-9", "amd64", base.blob.digest),
        ("tzdata", "1:2026a", "all", base.blob.digest),
    ]
    (program,) = found.programs
    assert (program.path, program.layer) == ("/opt/venv/bin/torchyard-start", own.blob.digest)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the layers that are walked through from now on, as that happens."""
    found: list[str] = []

    def walk(store: Store, layer: Layer, wanted: Wanted) -> Iterator[Entry]:
        found.append(layer.blob.digest)
        return entries(store, layer, wanted)

    monkeypatch.setattr(installing, "entries", walk)
    return found


def test_a_layer_is_walked_through_once_in_whatever_image_it_is(store: Store, walked: list[str]) -> None:
    base, one, other = layers(
        store,
        [status("b 1 all"), metadata("a", "1"), text("usr/bin/x"), directory("opt")],
        [metadata("c", "1"), text("opt/venv/bin/torchyard-x", "x")],
        [text(f"{SITE}/.wh.a-1.dist-info")],
    )
    first, second = installed(store, [base, one]), installed(store, [base, other])
    assert walked == [layer.blob.digest for layer in (base, one, other)]
    assert installed(store, [base, one]) == first
    assert installed(store, [base, other]) == second
    assert ([it.name for it in first.distributions], second.distributions) == (["a", "c"], ())
    assert len(walked) == 3
    assert installed(store, [base, one], anew=True) == first
    assert walked[3:] == [layer.blob.digest for layer in (base, one)]


def test_what_is_remembered_of_a_layer_says_all_that_it_said(store: Store) -> None:
    """Any order of layers, asked for twice: what a layer says does not depend on those that lay below it before."""
    link = tar.Entry(path="opt/venv", kind=tar.Kind.SYMLINK, mode=0o777, target="/elsewhere")
    these = layers(
        store,
        [status("x 1 all", "y 1 all"), metadata("a", "1"), text("opt/venv/bin/torchyard-x", "1")],
        [link],
        [status("x 2 all"), text(f"{SITE}/.wh..wh..opq"), metadata("b", "1")],
        [directory(STATUS), text("opt/venv/bin/torchyard-x", "2"), text("opt/venv/.wh.bin")],
        [text("var/lib/dpkg/info/p.list", f"/{SITE}/a-1.dist-info\n"), metadata("a", "1")],
    )
    for order in itertools.permutations(these):
        anew = installed(store, order, anew=True)
        assert installed(store, order) == anew


def test_what_is_damaged_or_of_another_version_is_looked_for_again(
    store: Store, walked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    these = layers(store, [metadata("a", "1"), status("b 1 all"), text("opt/venv/bin/torchyard-x", "x")])
    first = installed(store, these)
    (kept,) = (store.root / "installed").iterdir()
    whole = kept.read_bytes()
    for rubbish in (b"", b"[]", b"{}", b"\xff", whole[:-9], whole[64:], whole.replace(b"\n", b"\n\n", 1)):
        kept.write_bytes(rubbish)
        walked.clear()
        assert installed(store, these) == first
        assert (len(walked), kept.read_bytes()) == (1, whole)
    monkeypatch.setattr(installing, "SCHEMA", installing.SCHEMA + 1)
    assert installed(store, these) == first
    assert len(walked) == 2


def test_names_that_are_no_utf_8_are_remembered(store: Store, walked: list[str]) -> None:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("usr/share/\udcff\udc80.dist-info/METADATA")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with store.scratch("odd") as scratch:
        layer = layout.gzip_layer(store, [file.getvalue()], scratch=scratch)
    first = installed(store, [layer])
    assert [it.path for it in first.distributions] == ["/usr/share/\udcff\udc80.dist-info"]
    assert installed(store, [layer]) == first
    assert len(walked) == 1


def test_a_whiteout_takes_away_what_lies_below_it(store: Store) -> None:
    below = [metadata("a", "1"), metadata("b", "1"), status("x 1 all")]
    assert python_in(store, below, [text(f"{SITE}/.wh.a-1.dist-info")]) == ["b 1"]
    assert python_in(store, below, [text(f"{SITE}/.wh..wh..opq"), metadata("c", "1")]) == ["c 1"]
    assert python_in(store, below, [metadata("c", "1"), text(f"{SITE}/.wh..wh..opq")]) == ["c 1"]
    assert python_in(store, below, [text("opt/.wh.venv")]) == []
    assert python_in(store, below, [text("opt/.wh.ven")]) == ["a 1", "b 1"]
    assert python_in(store, below, [text(".wh..wh..opq")]) == []
    assert debian_in(store, below, [text("var/lib/.wh.dpkg")]) == []
    assert debian_in(store, below, [text("var/lib/dpkg/.wh..wh..opq")]) == []
    assert python_in(store, below, [text(f"{SITE}/.wh.a-1.dist-info")], [metadata("a", "1")]) == ["a 1", "b 1"]


def test_a_file_in_the_place_of_a_directory_takes_that_away(store: Store) -> None:
    link = tar.Entry(path="opt/venv", kind=tar.Kind.SYMLINK, mode=0o777, target="/elsewhere")
    assert python_in(store, [metadata("a", "1")], [link]) == []
    assert python_in(store, [metadata("a", "1")], [directory("opt/venv")]) == ["a 1"]
    assert debian_in(store, [status("x 1 all")], [directory(STATUS)]) == []
    away = tar.Entry(path=STATUS, kind=tar.Kind.SYMLINK, mode=0o777, target="other")
    assert debian_in(store, [status("x 1 all")], [away]) == []


def test_the_topmost_status_counts(store: Store) -> None:
    base, system, more = layers(
        store,
        [status("a 1 all", "b 1 all", "c 1 all")],
        [status("a 1 all", "b 2 all", "d 1 all")],
        [text("usr/share/doc/x")],
    )
    found = {it.name: (it.version, it.layer) for it in installed(store, [base, system, more]).debian}
    assert found == {
        "a": ("1", base.blob.digest),
        "b": ("2", system.blob.digest),
        "d": ("1", system.blob.digest),
    }


def test_what_was_removed_with_its_files_is_not_installed(store: Store) -> None:
    for how, expected in (
        ("deinstall ok config-files", []),
        ("purge ok not-installed", []),
        ("install ok half-configured", ["a 1"]),
        ("hold ok installed", ["a 1"]),
    ):
        assert debian_in(store, [status("a 1 all", how=how)]) == expected, how


def test_what_a_debian_package_brought_is_that_packages(store: Store) -> None:
    at = "usr/lib/python3/dist-packages"
    brought = [
        metadata("six", "1.16.0", at=at),
        text("var/lib/dpkg/info/python3-six.list", f"/.\n/{at}\n/{at}/six-1.16.0.dist-info\n"),
    ]
    assert python_in(store, brought) == []
    assert python_in(store, brought, [metadata("other", "1", at=at)]) == ["other 1"]


def test_a_directory_without_metadata_is_found_all_the_same(store: Store) -> None:
    link = tar.Entry(path=f"{SITE}/b-2.dist-info", kind=tar.Kind.SYMLINK, mode=0o777, target="a-1.dist-info")
    other = tar.Entry(path=f"{SITE}/c-3.dist-info/METADATA", kind=tar.Kind.SYMLINK, mode=0o777, target="/x")
    assert python_in(store, [directory(f"{SITE}/a-1.dist-info"), link, other]) == ["a 1", "b 2", "c 3"]
