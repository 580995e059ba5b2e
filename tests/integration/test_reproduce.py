"""The real CPU cell made again from its lock alone, and a changed image of it, in which every change is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from builder import layout, tar
from builder.engines.oci.foundation import open_tar
from builder.export import stored_image
from builder.layout import Layer
from builder.project import Project
from builder.store import Store
from builder.tar import Entry
from tests.integration.conftest import CPU, ROOT, Ran, Real, command, environment, new_store, torchyard

pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(1200)]

PYC = "opt/venv/lib/python3/site-packages/torch/__pycache__/version.cpython-311.pyc"
STRAY = "usr/lib/uv_cache.json"


@dataclass(frozen=True)
class Home:
    """A store with the CPU cell in it, built."""

    root: Path
    digest: str

    @property
    def store(self) -> Store:
        return Store.open(self.root)

    @property
    def env(self) -> dict[str, str]:
        return {"TORCHYARD_HOME": str(self.root)}

    def assert_nothing_left(self) -> None:
        assert not any((self.root / "work").iterdir())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    project = Project(ROOT / "matrix.yaml")
    (cell,) = project.select([CPU])
    fetched = torchyard("fetch", CPU)
    assert fetched.code == 0, fetched.err
    new_store(root, cell, wheels=[wheel.sha256 for wheel in project.lock(cell).wheels])
    ran = torchyard("build", CPU, "--json", env={"TORCHYARD_HOME": str(root)})
    assert ran.code == 0, ran.err
    (document,) = ran.document
    return Home(root, document["digest"])


@dataclass(frozen=True)
class Again:
    """What `reproduce` said of an image that had been changed, and the store's own image of that name."""

    expected: str
    """The digest of the changed image."""
    titles: list[str]
    """Of its layers, from the bottom up."""
    ran: Ran
    place: Path
    """Where it was made again."""


@pytest.fixture(scope="module")
def again(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Again:
    """In another directory, with another time zone, language, user mask and hash seed, and in another place."""
    root = tmp_path_factory.mktemp("elsewhere")
    project = Real(root=ROOT).copy(root / "project")
    (place := root / "place").mkdir()
    expected, titles = _spoilt(home)
    (record,) = (home.root / "proofs" / "oci").glob("*.json")
    kept = record.read_bytes()
    record.write_text(json.dumps({**json.loads(kept), "digest": expected}))
    changed = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "5", "SOURCE_DATE_EPOCH": "1"}
    mask = os.umask(0o077)
    try:
        ran = project.run("reproduce", CPU, "--json", "--store", str(place), env={**home.env, **changed})
    finally:
        os.umask(mask)
        record.write_bytes(kept)
    return Again(expected=expected, titles=titles, ran=ran, place=place)


def test_the_cpu_cell_is_made_again_from_its_lock(home: Home, again: Again) -> None:
    (found,) = again.ran.document
    assert found["rebuilt"] == home.digest
    assert not any(again.place.iterdir())
    home.assert_nothing_left()


def test_every_change_of_an_image_is_named(home: Home, again: Again) -> None:
    assert again.ran.code == 1, again.ran.err
    (found,) = again.ran.document
    assert (found["expected"], found["rebuilt"], found["same"]) == (again.expected, home.digest, False)
    named = {
        (group["layer"].partition(",")[0], group["class"], example["path"])
        for group in found["differences"]
        for example in group["examples"]
    }
    assert named == {
        ("torchyard base", "missing", STRAY),
        ("bytecode of torch", "bytecode header", PYC),
        (again.titles[-1], "content", "opt/venv/bin/torchyard-start"),
    }


def _spoilt(home: Home) -> tuple[str, list[str]]:
    """Keep a changed image beside the store's own, and return its digest and the titles of its layers.

    Bytecode in timestamp mode and a stray file, as other builders leave them; and a program that was changed.
    """
    before = stored_image(home.store, home.digest)
    about = json.loads(home.store.path(before.config.sha256).read_bytes())
    titles = [line["created_by"].removeprefix("torchyard: ") for line in about["history"]]

    def by_time(entries: dict[str, Entry]) -> None:
        content = entries[PYC].read()
        assert content[4:8] == b"\1\0\0\0"
        entries[PYC] = _with(entries[PYC], content[:4] + bytes(4) + content[8:])

    def planted(entries: dict[str, Entry]) -> None:
        entries[STRAY] = tar.file_entry(STRAY, b'{"timestamp": "now"}', mtime=int(time.time()))

    def tampered(entries: dict[str, Entry]) -> None:
        path = "opt/venv/bin/torchyard-start"
        entries[path] = _with(entries[path], entries[path].read() + b"# harmless\n")

    changes: dict[str, Callable[[dict[str, Entry]], None]] = {
        titles[0]: planted, "bytecode of torch": by_time, titles[-1]: tampered,
    }  # fmt: skip
    layers = [
        _changed(home.store, layer, changes[title]) if title in changes else layer
        for layer, title in zip(before.layers, titles, strict=True)
    ]
    about["rootfs"]["diff_ids"] = [layer.diff_id for layer in layers]
    config = layout.put_json(home.store, about, layout.MEDIA_CONFIG)
    document = layout.manifest(config=config, layers=[layer.blob for layer in layers])
    return layout.put_json(home.store, document, layout.MEDIA_MANIFEST).digest, titles


def _with(entry: Entry, content: bytes) -> Entry:
    return replace(entry, size=len(content), content=lambda: (content,))


def _changed(store: Store, layer: Layer, change: Callable[[dict[str, Entry]], None]) -> Layer:
    """Return the layer with a change, its other bytes as they were."""
    with tempfile.TemporaryFile() as file, store.scratch("changed") as scratch:
        with open_tar(store, layer) as source:
            while piece := source.read(1 << 20):
                file.write(piece)
        file.seek(0)
        entries = tar.read(file)
        change(entries)
        return layout.gzip_layer(store, tar.stream(entries.values()), scratch=scratch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing(home: Home, number: signal.Signals) -> None:
    with subprocess.Popen(
        command("reproduce", CPU), cwd=ROOT, env={**environment(), **home.env}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines: list[Any] = []
        for line in process.stderr:
            lines.append(line)
            if "base: package index" in line:  # mmdebstrap is running now
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, "".join([*lines, rest])
    home.assert_nothing_left()
    assert "Traceback" not in rest
