"""Where the files of a wheel belong: as an installer would put them, which pip itself is asked about."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import posixpath
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from installer.records import RecordEntry, parse_record_file

from builder.engines.oci.install import INSTALLER, PYTHON, ROOT, SITE, Placed, placed
from builder.engines.oci.wheel import Wheel, open_wheel
from builder.errors import WheelError
from builder.store import Store
from tests.support.evil import (
    FILENAME,
    INFORMATION,
    METADATA,
    MODULE,
    MODULE_PART,
    TEXT,
    WHEEL,
    Part,
    pack,
    wheel_parts,
)
from tests.support.wheels import wheel

DATA = "evil-1.0.data"
MAIN = b"""\
import sys
class start:
    @staticmethod
    def now():
        print("ran", sys.argv[1:])
        return 7
"""
ENTRY_POINTS = b"[console_scripts]\nrun = evil.main:start.now\nwith.dots-1 = evil.main:start.now [extra]\n"
ENTRY_POINTS += b"[gui_scripts]\nshow = evil.main:start.now\n[other]\nno = evil\n"


def opened(store: Store, content: bytes, filename: str = FILENAME) -> Wheel:
    sha256 = store.put(content)
    return open_wheel(store.path(sha256), filename=filename, sha256=sha256)


def files_of(store: Store, *parts: Part) -> dict[str, Placed]:
    files = placed(opened(store, pack(wheel_parts(*parts))))
    assert [file.path for file in files] == sorted({file.path for file in files})
    return {file.path: file for file in files}


def data(path: str, content: bytes = TEXT, mode: int = 0o100644) -> Part:
    return Part(name=f"{DATA}/{path}", content=content, mode=mode)


# --------------------------------------------------------------------------- places

USUAL = {f"{SITE}/{INFORMATION}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "INSTALLER", "REQUESTED")}


def test_the_places_are_those_of_the_image() -> None:
    assert (ROOT, SITE, PYTHON) == ("opt/venv", "opt/venv/lib/python3/site-packages", "/opt/venv/bin/python")


@pytest.mark.parametrize(
    ("member", "place"),
    [
        ("evil/x.py", f"{SITE}/evil/x.py"),
        ("top.py", f"{SITE}/top.py"),
        (f"{DATA}/purelib/evil/x.py", f"{SITE}/evil/x.py"),
        (f"{DATA}/platlib/top.so", f"{SITE}/top.so"),
        (f"{DATA}/data/share/man/x.1", f"{ROOT}/share/man/x.1"),
        (f"{DATA}/data/x", f"{ROOT}/x"),
        (f"{DATA}/headers/x/y.h", f"{ROOT}/include/site/python3/evil/x/y.h"),
        (f"{DATA}/scripts/tool", f"{ROOT}/bin/tool"),
        (f"{INFORMATION}/licenses/RECORD", f"{SITE}/{INFORMATION}/licenses/RECORD"),
        (f"{INFORMATION}/sboms/INSTALLER", f"{SITE}/{INFORMATION}/sboms/INSTALLER"),
        ("evil/RECORD", f"{SITE}/evil/RECORD"),
        ("evil/evil-1.0.data/x", f"{SITE}/evil/evil-1.0.data/x"),
    ],
)
@pytest.mark.parametrize("mode", [0o100644, 0o100755])
def test_each_scheme_has_its_place(store: Store, member: str, place: str, mode: int) -> None:
    files = files_of(store, Part(name=member, content=TEXT, mode=mode))
    assert files.keys() == {*USUAL, place}
    found = files[place]
    assert found.member is not None
    assert found.promised is not None
    assert (found.member.path, found.content) == (member, None)
    assert found.promised.digest == hashlib.sha256(TEXT).digest()
    assert found.mode == (0o775 if mode & 0o111 or "/scripts/" in member else 0o664)


@pytest.mark.parametrize("tag", ["py3-none-any", "cp311-cp311-manylinux_2_28_x86_64", "cp313-abi3-linux_aarch64"])
def test_places_are_the_same_for_every_python(store: Store, tag: str) -> None:
    made = wheel("it", "1.0", tag=tag)
    paths = {file.path for file in placed(opened(store, made.content, made.filename))}
    assert f"{SITE}/it/__init__.py" in paths
    assert not [path for path in paths if re.search(r"python3\.", path)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (data("libs/x"), "unknown scheme: libs"),
        (data("Scripts/x"), "unknown scheme: Scripts"),
        (data("scripts"), "lies in no scheme"),
        (data("x.txt"), "lies in no scheme"),
    ],
)
def test_what_has_no_place_is_refused(store: Store, part: Part, message: str) -> None:
    with pytest.raises(WheelError, match=message) as caught:
        files_of(store, MODULE_PART, part)
    assert caught.value.problems[0].what.startswith(FILENAME)
    assert caught.value.problems[0].where == part.name


@pytest.mark.parametrize(
    "name",
    [
        f"{INFORMATION}/RECORD.jws",
        f"{INFORMATION}/RECORD.p7s",
        f"{INFORMATION}/direct_url.json",
        "evil/__pycache__/x.cpython-311.pyc",
        "__pycache__/top.cpython-311.pyc",
        f"{DATA}/purelib/__pycache__/x.pyc",
    ],
)
def test_what_an_installer_makes_itself_is_dropped(store: Store, name: str) -> None:
    dropped = Part(name=name, content=b"{}")
    signature = "RECORD." in name  # which has no row of its own
    it = opened(store, pack([*wheel_parts(MODULE_PART), dropped] if signature else wheel_parts(MODULE_PART, dropped)))
    assert name in it.members
    assert {file.path for file in placed(it)} == {*USUAL, f"{SITE}/{MODULE}"}


def test_installer_and_requested_are_ours(store: Store) -> None:
    theirs = [Part(name=f"{INFORMATION}/{name}", content=b"theirs") for name in ("INSTALLER", "REQUESTED")]
    files = files_of(store, MODULE_PART, *theirs)
    assert files.keys() == {*USUAL, f"{SITE}/{MODULE}"}
    contents = {name: files[f"{SITE}/{INFORMATION}/{name}"].content for name in ("INSTALLER", "REQUESTED")}
    assert contents == {"INSTALLER": INSTALLER, "REQUESTED": b""}


# --------------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("text", "installed"),
    [
        (b"#!python\nprint(1)\n", f"#!{PYTHON}\nprint(1)\n".encode()),
        (b"#!pythonw -x\nprint(1)\n", f"#!{PYTHON}\nprint(1)\n".encode()),
        (b"#!python", f"#!{PYTHON}\n".encode()),
        (b"#!python\n" + b"# long\n" * 9000, f"#!{PYTHON}\n".encode() + b"# long\n" * 9000),
        (b"#!/usr/bin/python\n", None),
        (b"#!/bin/sh\n", None),
        (b"#!pyth", None),
        (b" #!python\n", None),
        (b"\x7fELF", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("method", [0, 8])
def test_scripts_of_the_wheel_start_the_python_of_the_image(
    store: Store, text: bytes, installed: bytes | None, method: int
) -> None:
    file = files_of(store, Part(name=f"{DATA}/scripts/tool", content=text, method=method))[f"{ROOT}/bin/tool"]
    assert file.content == installed
    assert (file.member is None) == (installed is not None)
    assert file.mode == 0o775


def test_entry_points_become_programs_that_run(store: Store, tmp_path: Path) -> None:
    files = files_of(
        store,
        Part(name="evil/__init__.py"),
        Part(name="evil/main.py", content=MAIN),
        Part(name=f"{INFORMATION}/entry_points.txt", content=ENTRY_POINTS),
    )
    scripts = {path: file for path, file in files.items() if path.startswith(f"{ROOT}/bin/")}
    assert scripts.keys() == {f"{ROOT}/bin/{name}" for name in ("run", "with.dots-1", "show")}
    (tmp_path / "site/evil").mkdir(parents=True)
    (tmp_path / "site/evil/main.py").write_bytes(MAIN)
    for path, file in scripts.items():
        assert file.content is not None
        assert file.mode == 0o775
        shebang, _, rest = file.content.partition(b"\n")
        assert shebang == f"#!{PYTHON}".encode()
        script = tmp_path / Path(path).name
        script.write_bytes(f"#!{sys.executable}\n".encode() + rest)
        script.chmod(file.mode)
        ran = subprocess.run(
            [script, "a", "b"],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, ran.stdout, ran.stderr) == (7, "ran ['a', 'b']\n", "")


@pytest.mark.parametrize(
    "parts",
    [
        (data("scripts/run"), Part(name=f"{INFORMATION}/entry_points.txt", content=ENTRY_POINTS)),
        (data("data/bin/run"), Part(name=f"{INFORMATION}/entry_points.txt", content=ENTRY_POINTS)),
        (data("data/bin/run"), data("scripts/run")),
    ],
)
def test_a_program_that_comes_twice_is_refused(store: Store, parts: tuple[Part, ...]) -> None:
    with pytest.raises(WheelError, match=f"{FILENAME}: two of its files would be installed as /{ROOT}/bin/run"):
        files_of(store, MODULE_PART, *parts)


@pytest.mark.parametrize(
    "part",
    [
        data(f"purelib/{MODULE}"),
        data(f"platlib/{MODULE}"),
        data(f"data/lib/python3/site-packages/{MODULE}"),
        data(f"purelib/{INFORMATION}/INSTALLER"),
        data(f"purelib/{INFORMATION}/RECORD"),
        data(f"purelib/{INFORMATION}/METADATA"),
    ],
)
def test_a_file_that_comes_twice_is_refused(store: Store, part: Part) -> None:
    with pytest.raises(WheelError, match="two of its files would be installed as"):
        files_of(store, MODULE_PART, part)


# --------------------------------------------------------------------------- the record

RICH = [
    Part(name="evil/__init__.py"),
    Part(name="evil/main.py", content=MAIN),
    Part(name="evil/lib.so", content=b"\x7fELF" * 3000, mode=0o100755),
    Part(name='evil/a, "b" ä.txt', content=b"x"),
    data("purelib/evil/pure.py"),
    data("platlib/evil/plat.so", mode=0o100755),
    data("data/share/evil/x.txt"),
    data("data/bin/helper", mode=0o100755),
    data("headers/evil.h"),
    data("scripts/tool", b"#!python\nprint(1)\n", mode=0o100755),
    data("scripts/shell", b"#!/bin/sh\n", mode=0o100755),
    Part(name=f"{INFORMATION}/entry_points.txt", content=ENTRY_POINTS),
    Part(name=f"{INFORMATION}/licenses/LICENSE", content=b"free"),
]


def content_of(file: Placed, it: Wheel) -> bytes:
    if file.content is not None:
        return file.content
    assert file.member is not None
    with zipfile.ZipFile(it.path) as archive:
        return archive.read(file.member.path)


def rows_of(content: bytes) -> list[tuple[str, str, str]]:
    return list(parse_record_file(io.StringIO(content.decode(), newline="")))


def test_the_record_lists_each_file_once_as_it_is(store: Store) -> None:
    it = opened(store, pack(wheel_parts(*RICH)))
    files = {file.path: file for file in placed(it)}
    record = files[f"{SITE}/{INFORMATION}/RECORD"].content
    assert record is not None
    rows = rows_of(record)
    listed = [posixpath.normpath(posixpath.join(SITE, path)) for path, _, _ in rows]
    assert sorted(listed) == sorted(files)
    for place, (path, hash_, size) in zip(listed, rows, strict=True):
        if place.endswith("/RECORD"):
            assert (hash_, size) == ("", "")
            continue
        content = content_of(files[place], it)
        assert (hash_, size) != ("", "")
        assert RecordEntry.from_elements(path, hash_, size).validate(content), path
        assert int(size) == len(content)


def test_paths_outside_of_site_packages_are_relative_to_it(store: Store) -> None:
    record = files_of(store, *RICH)[f"{SITE}/{INFORMATION}/RECORD"].content
    assert record is not None
    outside = {path for path, _, _ in rows_of(record) if path.startswith("..")}
    assert outside == {
        f"../../../{path}"
        for path in (
            "bin/helper", "bin/run", "bin/shell", "bin/show", "bin/tool", "bin/with.dots-1",
            "include/site/python3/evil/evil.h", "share/evil/x.txt",
        )
    }  # fmt: skip


def test_the_record_does_not_depend_on_the_order_of_the_archive(store: Store) -> None:
    parts = wheel_parts(*RICH)
    one, other = (opened(store, pack(order)) for order in (parts, parts[::-1]))
    assert [(file.path, file.mode, file.content) for file in placed(one)] == [
        (file.path, file.mode, file.content) for file in placed(other)
    ]


def test_stronger_hashes_of_the_wheel_are_kept(store: Store) -> None:
    lines = []
    for part, algorithm in ((MODULE_PART, "sha512"), (METADATA, "sha384"), (WHEEL, "sha256")):
        digest = base64.urlsafe_b64encode(hashlib.new(algorithm, part.content).digest()).rstrip(b"=").decode()
        lines.append(f"{part.name},{algorithm}={digest},{len(part.content)}")
    it = opened(store, pack(wheel_parts(MODULE_PART, record="\n".join([*lines, ""]).encode())))
    record = next(file for file in placed(it) if file.path == f"{SITE}/{INFORMATION}/RECORD").content
    assert record is not None
    assert {*lines} <= {*record.decode().splitlines()}


# --------------------------------------------------------------------------- pip


@pytest.fixture(scope="module")
def by_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let pip install the rich wheel into a fresh environment, and return that."""
    directory = tmp_path_factory.mktemp("pip")
    (directory / FILENAME).write_bytes(pack(wheel_parts(*RICH)))
    environment = directory / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "--isolated", "install"]
    options = ["--no-deps", "--no-compile", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *options, "--find-links", str(directory), "evil==1.0"], check=True)
    return environment


def without_minor(path: str) -> str:
    """Map lib/python3.11 to the one directory that all versions share in the image."""
    return re.sub(r"(^|/)python3\.[0-9]+/", r"\1python3/", path)


def test_pip_puts_the_same_files_in_the_same_places(store: Store, by_pip: Path) -> None:
    it = opened(store, pack(wheel_parts(*RICH)))
    ours = {file.path.removeprefix(f"{ROOT}/"): file for file in placed(it)}
    bare = re.compile(r"pyvenv\.cfg|bin/(activate.*|Activate\.ps1|python[0-9.]*)|lib64(/.*)?")
    theirs = {
        without_minor(name): path
        for path in by_pip.rglob("*")
        if not path.is_dir() and not bare.fullmatch(name := str(path.relative_to(by_pip)))
    }
    assert ours.keys() == theirs.keys()
    # Written by the installer: its name, its list, and programs in its own words.
    own = {f"lib/python3/site-packages/{INFORMATION}/{name}" for name in ("INSTALLER", "RECORD")}
    own |= {f"bin/{name}" for name in ("run", "show", "with.dots-1", "tool")}
    for name, path in theirs.items():
        assert bool(path.stat().st_mode & 0o111) == bool(ours[name].mode & 0o111), name
        if name not in own:
            assert path.read_bytes() == content_of(ours[name], it), name
    # pip keeps the wheel's own line ends and says another Python; the rest is the same.
    assert (by_pip / "bin/tool").read_bytes().partition(b"\n")[2] == b"print(1)\n"


def test_pip_records_the_same(store: Store, by_pip: Path) -> None:
    (path,) = by_pip.glob(f"lib/python*/site-packages/{INFORMATION}/RECORD")
    theirs = {without_minor(name): (hash_, size) for name, hash_, size in csv.reader(io.StringIO(path.read_text()))}
    record = files_of(store, *RICH)[f"{SITE}/{INFORMATION}/RECORD"].content
    assert record is not None
    ours = {name: (hash_, size) for name, hash_, size in rows_of(record)}
    assert ours.keys() == theirs.keys()
    own = {f"{INFORMATION}/INSTALLER", *(f"../../../bin/{name}" for name in ("run", "show", "with.dots-1", "tool"))}
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == own
