"""Licences: what metadata says in its three ways, and where the texts are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.metadata import parse_email
from packaging.utils import canonicalize_name

from builder import licences
from builder.cli import cli
from builder.engines.oci.wheel import open_wheel
from builder.errors import ImpossibleError, WheelError
from builder.licences import SITE, Cell, Kind, Licence, named
from builder.project import Project
from builder.render import Plan
from builder.store import Store
from tests.support.wheels import FakeWheel, wheel

ROOT = Path(__file__).parents[2]
CPU = "torch2.13.0-cpu-py3.11-bookworm-runtime"


def metadata(*lines: str) -> str:
    return "\n".join(("Metadata-Version: 2.4", "Name: a", "Version: 1", *lines, ""))


PROPRIETARY = "Classifier: License :: Other/Proprietary License"
BSD = "Classifier: License :: OSI Approved :: BSD License"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), (None, False)),
        (("License: UNKNOWN",), (None, False)),
        (("License:   ",), (None, False)),
        (("Classifier: License :: OSI Approved",), (None, False)),
        (("License-Expression: MIT", "License: BSD", BSD), ("MIT", False)),
        (("License: BSD", "Classifier: License :: OSI Approved :: MIT License"), ("BSD", False)),
        ((BSD, "Classifier: License :: OSI Approved :: MIT License"), ("BSD License, MIT License", False)),
        (("License: NVIDIA Proprietary Software", PROPRIETARY), ("NVIDIA Proprietary Software", True)),
        (("License: NVIDIA Proprietary Software",), ("NVIDIA Proprietary Software", True)),
        (("License-Expression: LicenseRef-NVIDIA-Proprietary",), ("LicenseRef-NVIDIA-Proprietary", True)),
        ((PROPRIETARY,), ("Other/Proprietary License", True)),
        (
            ("License: BSD-3-Clause", PROPRIETARY),
            ("BSD-3-Clause (but its classifier: Other/Proprietary License)", True),
        ),
        (("License: " + "Permission is granted " * 9, BSD), ("BSD License", False)),
        (("License: " + "all rights " * 20,), ("all rights " * 7 + "all...", False)),
    ],
)  # fmt: skip
def test_what_metadata_says(lines: tuple[str, ...], expected: tuple[str | None, bool]) -> None:
    assert named(parse_email(metadata(*lines))[0]) == expected


def licence_of(fake: FakeWheel, directory: Path) -> Licence:
    path = fake.write(directory)
    return licences.of_wheel(open_wheel(path, filename=fake.filename, sha256=fake.sha256))


def test_the_texts_are_those_beside_the_metadata(tmp_path: Path) -> None:
    files = {
        "a/__init__.py": b"",
        "a/LICENSE": b"of something inside",
        "a-1.0.dist-info/LICENSE": b"text",
        "a-1.0.dist-info/COPYING.LESSER": b"text",
        "a-1.0.dist-info/licenses/third_party/FP16/anything.md": b"text",
        "a-1.0.dist-info/licensing_tool.py": b"no text",
        "a-1.0.dist-info/entry_points.txt": b"",
    }
    found = licence_of(wheel("a", "1.0", files=files), tmp_path)
    assert (found.kind, found.package, found.version, found.licence) == (Kind.WHEEL, "a", "1.0", None)
    assert found.texts == tuple(
        f"{SITE}/a-1.0.dist-info/{name}"
        for name in ("COPYING.LESSER", "LICENSE", "licenses/third_party/FP16/anything.md")
    )


def test_without_any_there_a_text_among_the_files_will_do(tmp_path: Path) -> None:
    files = {"a/LICENSE.txt": b"text", "a-1.0.data/scripts/licence": b"a program", "a/relicense.py": b"", "a/x.py": b""}
    assert licence_of(wheel("a", "1.0", files=files), tmp_path).texts == (f"{SITE}/a/LICENSE.txt",)


def test_a_wheel_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a-1.0-py3-none-any.whl"
    path.write_bytes(b"PK")
    with pytest.raises(WheelError):
        open_wheel(path, filename=path.name, sha256="0" * 64)


# --------------------------------------------------------------------------- a cell


def licence(package: str, name: str | None, *, proprietary: bool = False, texts: tuple[str, ...] = ()) -> Licence:
    return Licence(
        kind=Kind.WHEEL, package=package, version="1", licence=name, proprietary=proprietary, texts=texts
    )  # fmt: skip


def test_a_cell_is_summed_up() -> None:
    cell = Cell(
        id="cell",
        base="example.org/image@sha256:0",
        licences=(
            licence("a", "MIT", texts=("/x/LICENSE", "/y/LICENSE", "/z/LICENSE")),
            licence("b", "Proprietary", proprietary=True),
            licence("c", None),
            licence("d", None, texts=("/usr/share/doc/d/copyright",)),
        ),
    )
    assert licences.summary(cell).splitlines() == [
        "cell: 4 packages",
        "  proprietary  b",
        "  unknown      c",
        "  not listed   what is in the base example.org/image@sha256:0",
    ]
    assert licences.rows(cell) == [
        ["a", "1", "MIT", "/x/LICENSE and 2 more"],
        ["b", "1", "Proprietary", "-"],
        ["c", "1", "unknown", "-"],
        ["d", "1", "see its text", "/usr/share/doc/d/copyright"],
    ]
    document = json.loads(json.dumps(cell.as_json()))
    assert (document["unknown"], document["proprietary"]) == (["c"], ["b"])
    assert document["packages"][0]["texts"] == ["/x/LICENSE", "/y/LICENSE", "/z/LICENSE"]


def cpu_plan() -> Plan:
    project = Project(ROOT / "matrix.yaml")
    (cell,) = project.select([CPU])
    return project.plan(cell)


def test_a_cell_has_its_wheels_its_debian_packages_and_torchyard(store: Store) -> None:
    plan, fakes = cpu_plan(), [wheel("torch", "2.13.0"), wheel("numpy", "2.0")]
    for fake in fakes:
        store.put(fake.content)
    locked = [
        replace(
            plan.lock.wheels[0],
            name=canonicalize_name(fake.project),
            version=fake.version,
            filename=fake.filename,
            sha256=fake.sha256,
            size=len(fake.content),
        )
        for fake in fakes
    ]
    plan = replace(plan, lock=replace(plan.lock, wheels=tuple(locked)))
    assert licences.missing(plan, store) == ()
    cell = licences.cell_of(plan, store)
    assert cell.base is None
    packages = {one.package: one for one in cell.licences}
    assert {"torch", "numpy", "python3", "tini", "torchyard"} <= set(packages)
    assert packages["tini"].texts == ("/usr/share/doc/tini/copyright",)
    assert [one.package for one in cell.unknown] == ["torch", "numpy"], "the fakes name no licence"


def test_a_cell_whose_wheels_are_not_in_the_store_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHYARD_HOME", str(store.root))
    plan = cpu_plan()
    assert licences.missing(plan, store) == plan.lock.wheels
    ran = CliRunner().invoke(cli, ["licences", CPU, "-m", str(ROOT / "matrix.yaml")])
    assert ran.exit_code == ImpossibleError.exit_code
    assert "lack wheels in the store" in ran.stderr
    assert "torchyard fetch torch" in ran.stderr
