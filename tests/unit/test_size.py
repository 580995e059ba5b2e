"""What takes the space: every byte of every layer is counted once, by who brings it, and nothing is inflated twice."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import export, size, tar
from builder.build import StoreSession, complete
from builder.cli import cli
from builder.engines.oci import OciEngine, contents, foundation, inventory, recipe
from builder.engines.oci.contents import NOBODY, Contents, Tally
from builder.engines.oci.inventory import Stored
from builder.errors import HashMismatchError, ImpossibleError
from builder.layout import MEDIA_LAYER_GZIP, Descriptor, Layer
from builder.project import Project
from builder.size import Bytes, Cell, sizes
from builder.store import Store
from tests.support.bases import (
    Ready,
    Said,
    base_entries,
    bootstrap_cell,
    damage,
    index_of,
    mesh,
    ready,
    wheels_of,
)

pytestmark = pytest.mark.usefixtures("compiled_sources")

# --------------------------------------------------------------------------- counting


def counted(*entries: tar.Entry, **owners: str) -> dict[str, int]:
    tally = Tally(owners)
    content = io.BytesIO(b"".join(tar.stream(entries)))
    with tarfile.open(fileobj=content, mode="r|") as archive:
        for entry in archive:
            tally.add(entry, archive)
    return dict(tally.contents().packages)


def listed(package: str, *paths: str) -> tar.Entry:
    return tar.file_entry(f"var/lib/dpkg/info/{package}.list", "".join(f"{path}\n" for path in paths).encode())


def test_files_are_counted_by_the_debian_package_that_lists_them() -> None:
    entries = [
        tar.Entry(path="usr", kind=tar.Kind.DIRECTORY, mode=0o755),
        tar.file_entry("usr/bin/bash", b"b" * 700),
        tar.file_entry("usr/bin/git", b"g" * 90),
        tar.Entry(path="usr/bin/git-upload-pack", kind=tar.Kind.HARDLINK, mode=0o755, target="usr/bin/git"),
        tar.Entry(path="usr/bin/sh", kind=tar.Kind.SYMLINK, mode=0o777, target="bash"),
        tar.file_entry("usr/lib/libx.so", b"x" * 30),
        tar.file_entry("etc/made-up", b"m" * 5),
        listed("bash", "/.", "/bin", "/bin/bash"),
        listed("git", "/usr/bin/git", "/usr/bin/git-upload-pack"),
        listed("libx1:amd64", "/usr/lib/libx.so"),
    ]
    lists = sum(entry.size for entry in entries[-3:])
    assert counted(*entries) == {"deb/bash": 700, "deb/git": 90, "deb/libx1": 30, NOBODY: 5 + lists}


def test_a_list_that_is_too_long_or_no_text_is_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_MOST_LISTED", 20)
    entries = [tar.file_entry("a", b"1"), tar.file_entry("b", b"22"), listed("long", "/a", "/x" * 20)]
    raw = tar.file_entry("var/lib/dpkg/info/raw.list", b"\xff\xfe\n/b\n")
    found = counted(*entries, raw)
    assert found == {"deb/raw": 2, NOBODY: 1 + entries[-1].size + raw.size}


def test_bytecode_belongs_to_its_source() -> None:
    found = counted(
        tar.file_entry("a/__pycache__/x.cpython-311.pyc", b"1" * 7),
        tar.file_entry("a/__pycache__/gone.cpython-311.pyc", b"1" * 3),
        tar.file_entry("a/x.pyc", b"1"),
        **{"a/x.py": "pypi/a"},
    )
    assert found == {"pypi/a": 7, NOBODY: 4}


def layer_called(number: int, compressed: int = 0) -> Layer:
    digest = f"sha256:{number:064x}"
    return Layer(blob=Descriptor(media_type=MEDIA_LAYER_GZIP, digest=digest, size=compressed), diff_id=digest)


def test_what_was_counted_is_remembered(tmp_path: Path) -> None:
    store, layer = Store.open(tmp_path), layer_called(1)
    assert contents.recall(store, layer) is None
    contents.remember(store, layer, Contents(packages={"pypi/a": 3, NOBODY: 0}))
    assert contents.recall(store, layer) == Contents(packages={"pypi/a": 3, NOBODY: 0})
    (path,) = (tmp_path / "contents").iterdir()
    for rubbish in (b"", b"[]", b"{}", b'{"schema":0,"packages":{}}', b'{"schema":1,"packages":[1]}', b"\xff",
                    b'{"schema":1,"packages":{"a":"x"}}', b'{"schema":1,"packages":{"a":1e999}}'):  # fmt: skip
        path.write_bytes(rubbish)
        assert contents.recall(store, layer) is None, rubbish


# --------------------------------------------------------------------------- layers of an image


@pytest.fixture
def one(tmp_path: Path) -> Ready:
    return ready(tmp_path / "home", entries=[*base_entries(), listed("python3", "/usr/bin/python3.11")])


def layers_of(one: Ready, digest: str) -> tuple[Stored, ...]:
    return inventory.inventory(one.store, export.stored_image(one.store, digest), one.plan.lock.wheels)


def test_every_byte_of_every_layer_is_counted(one: Ready) -> None:
    digest = one.build().digest
    found = layers_of(one, digest)
    image = export.stored_image(one.store, digest)
    assert [stored.layer for stored in found] == list(image.layers)
    for stored in found:
        content = gzip.decompress(b"".join(recipe.pieces(one.store, stored.layer.blob)))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            assert stored.contents.size == sum(info.size for info in archive if info.isreg()), stored.title
    whole = sum((Counter(stored.contents.packages) for stored in found), Counter())
    assert set(whole) == {"deb/python3", NOBODY, *(f"pypi/{wheel.name}" for wheel in one.plan.lock.wheels)}
    by_title = {stored.title: stored for stored in found}
    assert [stored.of_base for stored in found] == [True] + [False] * (len(found) - 1)
    assert by_title["bytecode of torch"].contents.packages.keys() == {"pypi/torch"}
    assert by_title["bytecode of the variant's own packages"].contents.packages.keys() == {"pypi/mesh"}
    assert f"environment and image.json of {one.plan.cell.id}" in by_title


def test_layers_of_wheels_and_the_base_are_not_inflated_for_it(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = one.build().digest
    walked: list[str] = []
    real = foundation.open_tar

    def open_tar(store: Store, layer: Layer) -> Any:
        walked.append(layer.blob.digest)
        return real(store, layer)

    monkeypatch.setattr(inventory, "open_tar", open_tar)
    first = layers_of(one, digest)
    titles = [stored.title for stored in first if stored.layer.blob.digest in walked]
    assert [title.split()[0] for title in titles] == ["bytecode", "bytecode", "bytecode", "environment"]
    walked.clear()
    monkeypatch.setattr(inventory, "opened", lambda *_: pytest.fail("opened again"))
    assert layers_of(one, digest) == first
    assert not walked


def test_a_store_that_remembers_nothing(one: Ready) -> None:
    digest = one.build().digest
    first = layers_of(one, digest)
    for path in (one.store.root / "contents").iterdir():
        path.unlink()
    assert layers_of(one, digest) == first


def test_a_layer_whose_wheels_are_not_locked_is_walked_through(one: Ready) -> None:
    """As after somebody edited the lock and not yet built again."""
    digest = one.build().digest
    expected = [it.contents.size for it in layers_of(one, digest)]
    for path in (one.store.root / "contents").iterdir():
        path.unlink()
    found = inventory.inventory(one.store, export.stored_image(one.store, digest), ())
    assert [it.contents.size for it in found] == expected


def test_damage_is_no_size(one: Ready) -> None:
    digest = one.build().digest
    damage(one.path("mesh"), 40)
    with pytest.raises(HashMismatchError, match="mesh"):
        layers_of(one, digest)


# --------------------------------------------------------------------------- sums


def stored(number: int, compressed: int, title: str = "", *, of_base: bool = False, **packages: int) -> Stored:
    return Stored(
        layer=layer_called(number, compressed),
        title=title or f"layer {number}",
        of_base=of_base,
        contents=Contents(packages={f"pypi/{name}": bytes_ for name, bytes_ in packages.items()}),
    )


def cell(id_: str, *layers: Stored, **versions: str) -> Cell:
    return Cell(
        id=id_,
        tag=f"torchyard:{id_}",
        digest=f"sha256:{len(layers):064x}",
        base="bookworm",
        layers=layers,
        versions={f"pypi/{name}": version for name, version in versions.items()},
    )


BASE = stored(1, 60_000_000, "debian", of_base=True, bash=200_000_000)
TORCH = stored(2, 900_000_000, "torch 2.8.0", torch=2_000_000_000)
BYTECODE = stored(3, 20_000_000, "bytecode of torch", torch=50_000_000)
RUNTIME = cell("runtime", BASE, TORCH, BYTECODE, stored(4, 1000, "environment"), torch="2.8.0", bash="5.2")
LLM = cell(
    "llm", BASE, TORCH, BYTECODE, stored(5, 30_000_000, "transformers 5.0, datasets 4.2", transformers=90_000_000),
    stored(6, 2000, "environment"), torch="2.8.0", bash="5.2", transformers="5.0",
)  # fmt: skip


def test_one_cell() -> None:
    found = sizes([RUNTIME])
    (row,) = found.cells
    assert row.size == row.own == found.apart == found.together == Bytes(compressed=980_001_000, unpacked=2_250_000_000)
    assert [(it.title, it.cells) for it in found.layers] == [
        ("base bookworm", ("runtime",)), ("torch 2.8.0", ("runtime",)), ("bytecode of torch", ("runtime",)),
        ("environment", ("runtime",)),
    ]  # fmt: skip
    assert [(it.text, it.unpacked) for it in found.packages] == [
        ("torch 2.8.0", 2_050_000_000), ("bash 5.2", 200_000_000),
    ]  # fmt: skip


def test_what_cells_share_counts_once() -> None:
    found = sizes([RUNTIME, LLM])
    assert [row.own.compressed for row in found.cells] == [1000, 30_002_000]
    assert found.apart.compressed == 980_001_000 + 1_010_002_000
    assert found.together.compressed == 980_001_000 + 30_002_000
    assert found.together.unpacked == 2_250_000_000 + 90_000_000
    shared = [it.digest for it in found.layers if it.cells == ("runtime", "llm")]
    assert shared == [it.layer.blob.digest for it in (BASE, TORCH, BYTECODE)]
    assert {it.text: it.cells for it in found.packages} == {
        "torch 2.8.0": ("runtime", "llm"), "bash 5.2": ("runtime", "llm"), "transformers 5.0": ("llm",),
    }  # fmt: skip


def test_a_layer_that_an_image_has_twice_counts_twice_in_it_and_once_in_all() -> None:
    found = sizes([cell("twice", TORCH, TORCH)])
    assert found.apart.compressed == 2 * found.together.compressed
    assert found.layers[0].cells == ("twice",)


def test_versions_of_one_package_are_told_apart() -> None:
    other = cell("old", stored(7, 1, torch=2_050_000_000), torch="2.7.1")
    assert [it.text for it in sizes([RUNTIME, other]).packages] == ["torch 2.7.1", "torch 2.8.0", "bash 5.2"]


def test_debian_s_packages_are_called_so() -> None:
    nobody = replace(BASE, contents=Contents(packages={"deb/gcc-12": 3, NOBODY: 2}))
    one_of_them = replace(cell("x", nobody), versions={"deb/gcc-12": "12.2.0-14"})
    assert [it.text for it in sizes([one_of_them]).packages] == ["gcc-12 12.2.0-14 (Debian)", "files of no package"]


# --------------------------------------------------------------------------- forms


def test_for_people() -> None:
    assert size.text(sizes([RUNTIME, LLM]), width=80, top=2).splitlines() == [
        "cell  compressed   unpacked  its own",
        "1       980.0 MB  2250.0 MB   0.0 MB  torchyard:runtime",
        "2      1010.0 MB  2340.0 MB  30.0 MB  torchyard:llm",
        "",
        "cells  compressed   unpacked                layer",
        "1-2       60.0 MB   200.0 MB  #             base bookworm",
        "1-2      900.0 MB  2000.0 MB  ############  torch 2.8.0",
        "1-2       20.0 MB    50.0 MB                bytecode of torch",
        "1          0.0 MB     0.0 MB                environment",
        "2         30.0 MB    90.0 MB                transformers 5.0, datasets 4.2",
        "2          0.0 MB     0.0 MB                environment",
        "",
        "cells   unpacked                package",
        "1-2    2050.0 MB  ############  torch 2.8.0",
        "1-2     200.0 MB  #             bash 5.2",
        "and 1 smaller: --top shows more",
        "",
        "1010.0 MB compressed, 2340.0 MB unpacked, 6 layers",
        "1990.0 MB compressed, 4590.0 MB unpacked, 9 layers if none was shared",
    ]


def test_one_cell_needs_no_number() -> None:
    assert size.text(sizes([RUNTIME]), width=80, top=1).splitlines() == [
        "torchyard:runtime",
        "",
        "compressed   unpacked                layer",
        "   60.0 MB   200.0 MB  #             base bookworm",
        "  900.0 MB  2000.0 MB  ############  torch 2.8.0",
        "   20.0 MB    50.0 MB                bytecode of torch",
        "    0.0 MB     0.0 MB                environment",
        "",
        " unpacked                package",
        "2050.0 MB  ############  torch 2.8.0",
        "and 1 smaller: --top shows more",
        "",
        "980.0 MB compressed, 2250.0 MB unpacked, 4 layers",
    ]


@pytest.mark.parametrize("width", [0, 80, 120])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    many = ", ".join(f"package-{n} {n}.0" for n in range(40))
    long = cell("torch" + "-long" * 30, BASE, stored(8, 5, many), stored(9, 5, "x" * 300), torch="2.8.0")
    lines = size.text(sizes([RUNTIME, LLM, long]), width=width, top=10).splitlines()
    assert max(map(len, lines)) <= max(width, size.NARROWEST)
    (listing,) = [line for line in lines if "package-0 0.0" in line]
    shown = listing.count("package-")
    assert listing.endswith(f" and {40 - shown} more")


def test_which_cells() -> None:
    cells = [cell(f"c{n}", *([TORCH] if n not in (3, 4, 6) else [BASE])) for n in range(9)]
    rows = {row.split()[-1]: row for row in size.text(sizes(cells), width=80, top=0).splitlines()[11:] if row}
    assert rows["2.8.0"].startswith("1-3, 6, 8-9 ")
    assert rows["bookworm"].startswith("4-5, 7 ")


def test_a_page_of_documentation() -> None:
    pipes = cell("pipes", stored(10, 5_000_000, "RUN a | b"))
    page = size.markdown(sizes([RUNTIME, LLM, pipes]))
    rows = [[field.strip() for field in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    assert [row for row in rows if row[1].startswith("`")] == [
        ["1", "`torchyard:runtime`", "4", "980.0", "2250.0", "-", "-"],
        ["2", "`torchyard:llm`", "5", "1010.0", "2340.0", "30.0", "1"],
        ["3", "`torchyard:pipes`", "1", "5.0", "0.0", "5.0", "1"],
    ]
    layers = rows[[row[0] for row in rows].index("layer") + 2 :]
    assert layers == [
        ["torch 2.8.0", "1-2", "`000000000000`", "900.0", "2000.0"],
        ["base bookworm", "1-2", "`000000000000`", "60.0", "200.0"],
        ["transformers 5.0, datasets 4.2", "2", "`000000000000`", "30.0", "90.0"],
        ["bytecode of torch", "1-2", "`000000000000`", "20.0", "50.0"],
        [r"RUN a \| b", "3", "`000000000000`", "5.0", "0.0"],
        ["2 more of less than 1 MB each", "", "", "0.0", "0.0"],
    ]
    assert "\n- 1015.0 MB compressed, 2340.0 MB unpacked, 7 layers\n" in page
    assert page.endswith("|\n")


def test_a_page_of_one_cell_leaves_nothing_out() -> None:
    page = size.markdown(sizes([cell("one", BASE, TORCH)]))
    assert "| 1 | `torchyard:one` | 2 | 960.0 | 2200.0 | - | - |" in page
    assert "less than" not in page


def test_for_machines() -> None:
    found = size.as_json(sizes([RUNTIME, LLM]))
    assert json.loads(json.dumps(found)) == found
    by_digest = {layer["digest"]: layer for layer in found["layers"]}
    for row in found["cells"]:
        for key in ("compressed_bytes", "unpacked_bytes"):
            assert row[key] == sum(by_digest[digest][key] for digest in row["layers"])
            assert row["own"][key] == sum(it[key] for it in found["layers"] if it["cells"] == [row["id"]])
    assert found["together"]["compressed_bytes"] == sum(layer["compressed_bytes"] for layer in found["layers"])
    assert found["packages"][0] == {
        "name": "pypi/torch", "version": "2.8.0", "unpacked_bytes": 2_050_000_000, "cells": ["runtime", "llm"],
    }  # fmt: skip


# --------------------------------------------------------------------------- the command


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["size", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Ready, Ready]:
    """Make a project of two cells on one torch, none of them built."""
    runtime, more = bootstrap_cell(packages=("numpy",)), bootstrap_cell(packages=("numpy", "mesh"))
    more = replace(more, id=f"{more.id}-more", variant_name="more")
    found = ready(tmp_path / "home", runtime), ready(tmp_path / "home", more, wheels_of(more, mesh()))
    plans = {one.plan.cell.id: one.plan for one in found}
    assert len(plans) == 2
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Project, "select", lambda _, patterns: [
        plan.cell for id_, plan in plans.items() if not patterns or id_ in patterns
    ])  # fmt: skip
    monkeypatch.setattr(Project, "plans", lambda _, cells: [plans[cell.id] for cell in cells])
    return found


def built(one: Ready, tmp_path: Path) -> str:
    index = index_of(tmp_path / "links")
    session = StoreSession(builder=OciEngine(), host=None, index=index, store=one.store, report=Said())
    return session.build(one.plan).digest


def test_what_is_not_built_has_no_size(two: tuple[Ready, Ready], tmp_path: Path) -> None:
    one, other = (each.plan.cell.id for each in two)
    nothing = run("--json")
    assert nothing.exit_code == ImpossibleError.exit_code
    (problem,) = json.loads(nothing.stdout)["problems"]
    assert problem["tries"][0] == f"torchyard build {one}"
    digest = built(two[0], tmp_path)
    assert run(other).exit_code == ImpossibleError.exit_code
    assert run(one, other).exit_code == ImpossibleError.exit_code, "it was named"
    rest = run()
    assert rest.exit_code == 0, "those that are built, if none is named"
    assert f"1 cells are left out, they are not built: {other}" in rest.stderr
    document = json.loads(run("--json", "-q").stdout)
    assert [(row["id"], row["digest"]) for row in document["cells"]] == [(one, digest)]


def test_a_variant_adds_only_its_own_bytes(two: tuple[Ready, Ready], tmp_path: Path) -> None:
    digests = [built(each, tmp_path) for each in two]
    document = json.loads(run("--json").stdout)
    runtime, more = document["cells"]
    assert [runtime["digest"], more["digest"]] == digests
    own = [layer["title"] for layer in document["layers"] if layer["cells"] == [more["id"]]]
    assert own == [
        "mesh 1.0", "bytecode of the variant's own packages",
        f"environment and image.json of {more['id']}",
    ]  # fmt: skip
    assert document["together"]["compressed_bytes"] == runtime["compressed_bytes"] + more["own"]["compressed_bytes"]
    images = [complete(each.plan, each.store, builder="oci") for each in two]
    compressed = [sum(layer.blob.size for layer in image.layers) for image in images if image]
    assert [runtime["compressed_bytes"], more["compressed_bytes"]] == compressed


def test_the_forms(two: tuple[Ready, Ready], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in two:
        built(each, tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    plain = run("--top", "3")
    assert max(map(len, plain.stdout.splitlines())) <= 80
    assert "smaller: --top shows more" in plain.stdout
    page = run("--markdown")
    assert page.stdout.startswith("# Sizes\n")
    assert page.stdout.endswith("|\n")
    assert run("--top", "-1").exit_code == 2


def test_what_is_no_longer_whole_is_not_complete(two: tuple[Ready, Ready], tmp_path: Path) -> None:
    one, _ = two
    assert complete(one.plan, one.store, builder="oci") is None
    built(one, tmp_path)
    assert complete(one.plan, one.store, builder="docker") is None
    image = complete(one.plan, one.store, builder="oci")
    assert image is not None
    one.store.path(image.layers[-1].blob.sha256).unlink()
    assert complete(one.plan, one.store, builder="oci") is None
