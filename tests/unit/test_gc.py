"""Garbage in a store: all that a cell needs stays, what nobody needs goes, and what nobody knows is not touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from builder import cli as commands
from builder import export, gc, layout, project
from builder.build import StoreSession, complete
from builder.engines.oci import OciEngine, layers
from builder.gc import Garbage
from builder.render import Plan
from builder.store import Store
from tests.support.bases import Ready, Said, index_of, ready

LONG_AGO = time.time() - 30 * 86400
ABSENT = "5a" * 32


pytestmark = pytest.mark.usefixtures("compiled_sources")


@pytest.fixture
def one(tmp_path: Path) -> Ready:
    """A cell that is built, all of whose files are old."""
    made = ready(tmp_path / "home")
    build(made, tmp_path)
    age(made.store.root)
    return made


def build(one: Ready, tmp_path: Path) -> str:
    index = index_of(tmp_path / "links", one.wheels)
    session = StoreSession(builder=OciEngine(), host=None, index=index, store=one.store, report=Said())
    return session.build(one.plan).digest


def age(root: Path, *but: Path) -> None:
    """Make everything as old as if it was made long ago."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path not in but:
            os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def find(store: Store, *plans: Plan, before: float | None = None) -> tuple[Garbage, ...]:
    return gc.find(store, plans, before=time.time() - 86400 if before is None else before)


def remove(store: Store, *plans: Plan) -> tuple[Garbage, ...]:
    before = time.time() - 86400
    return gc.remove(store, gc.find(store, plans, before=before), before=before)


def names(found: Sequence[Garbage], store: Store) -> set[str]:
    return {str(garbage.path.relative_to(store.root)) for garbage in found}


def record_of(store: Store) -> Path:
    (path,) = (store.root / "proofs" / "oci").iterdir()
    return path


# --------------------------------------------------------------------------- what stays


def test_what_a_cell_needs_stays(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = complete(one.plan, one.store, builder="oci")
    assert image is not None
    export.recompressed(one.store, image)
    age(one.store.root)
    # The manifest of the compressed form is a few hundred bytes that the next export makes again.
    (gone,) = remove(one.store, one.plan)
    assert (gone.kind, gone.size_bytes < 10_000) == ("blobs", True)
    assert complete(one.plan, one.store, builder="oci") is not None
    made: list[int] = []
    export.recompressed(one.store, image, progress=made.append)
    assert made == [], "the compressed layers are there"
    monkeypatch.setattr(layers, "splice", lambda *_, **__: pytest.fail("spliced again"))
    record_of(one.store).unlink()
    build(one, tmp_path)


def test_layers_of_wheels_that_are_needed_stay_when_the_image_is_another_now(one: Ready, tmp_path: Path) -> None:
    """As after a change of what every image carries: nothing is spliced again."""
    record_of(one.store).unlink()
    recipes = sorted((one.store.root / "recipes").iterdir())
    assert recipes
    remove(one.store, one.plan)
    assert sorted((one.store.root / "recipes").iterdir()) == recipes
    for path in recipes:
        document = json.loads(path.read_bytes())
        assert all(one.store.has(source) for source in document["sources"])
    assert build(one, tmp_path)


def test_an_image_that_was_made_lately_stays_whole(one: Ready) -> None:
    """Somebody's other matrix shares the store."""
    path = record_of(one.store)
    os.utime(path)
    digest = json.loads(path.read_bytes())["digest"]
    remove(one.store)
    assert path.exists()
    assert export.stored_image(one.store, digest).manifest.digest == digest


def test_what_is_young_stays(one: Ready) -> None:
    young = [path for path in one.store.root.rglob("*") if path.is_file()]
    for path in young:
        os.utime(path)
    for path in (one.store.root / "layouts").iterdir():
        os.utime(path)
    assert find(one.store) == ()


# --------------------------------------------------------------------------- what goes


def test_what_nobody_needs_goes_and_comes_back(one: Ready, tmp_path: Path) -> None:
    digest = json.loads(record_of(one.store).read_bytes())["digest"]
    found = remove(one.store)
    assert {garbage.kind for garbage in found} >= {"proofs", "layers", "contents", "recipes", "blobs"}
    assert not any((one.store.root / "blobs").iterdir())
    assert not any((one.store.root / "recipes").iterdir())
    assert not any((one.store.root / "proofs" / "oci").iterdir())
    shutil.rmtree(one.store.root / "layouts")
    again = ready(one.store.root)
    assert build(again, tmp_path) == digest


def test_what_another_cell_needs_goes_alone(one: Ready) -> None:
    blob = one.store.put(b"a wheel that no lock names any more")
    verdict = one.store.root / "proofs" / "verdicts" / ABSENT / "t1.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text("{}")
    about = {"schema": 1, "blob": {"mediaType": "x", "digest": f"sha256:{ABSENT}", "size": 1}, "diff_id": "x"}
    for name in ("layers", "recipes", "contents", "zstd"):
        (one.store.root / name).mkdir(exist_ok=True)
        (one.store.root / name / f"{ABSENT}.json").write_text(json.dumps(about))
    gone = one.store.root / "layouts" / f"base-bookworm-amd64-{'0' * 16}"
    gone.mkdir(parents=True)
    (gone / "index.json").write_text("{}")
    age(one.store.root)
    expected = {
        f"blobs/{blob}", f"proofs/verdicts/{ABSENT}/t1.json", f"layers/{ABSENT}.json", f"recipes/{ABSENT}.json",
        f"contents/{ABSENT}.json", f"zstd/{ABSENT}.json", f"layouts/{gone.name}",
    }  # fmt: skip
    assert names(find(one.store, one.plan), one.store) == expected
    assert names(remove(one.store, one.plan), one.store) == expected
    assert not any((one.store.root / name).exists() for name in expected)
    assert not verdict.parent.exists()
    assert find(one.store, one.plan) == ()
    assert complete(one.plan, one.store, builder="oci") is not None


def test_the_verdict_of_an_image_that_is_needed_stays(one: Ready) -> None:
    digest = json.loads(record_of(one.store).read_bytes())["digest"].removeprefix("sha256:")
    verdict = one.store.root / "proofs" / "verdicts" / digest / "t1.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text("{}")
    age(one.store.root)
    assert find(one.store, one.plan) == ()


def test_what_documents_name_is_followed(store: Store) -> None:
    layer = layout.Descriptor(media_type=layout.MEDIA_LAYER_GZIP, digest=f"sha256:{store.put(b'layer')}", size=5)
    config = layout.put_json(store, {"rootfs": {"diff_ids": [f"sha256:{ABSENT}"]}, "config": {}}, layout.MEDIA_CONFIG)
    manifest = layout.put_json(store, layout.manifest(config=config, layers=[layer]), layout.MEDIA_MANIFEST)
    index = layout.put_json(store, {"manifests": [manifest.as_json()]}, layout.MEDIA_INDEX)
    for _ in range(3000):  # deeper than Python calls
        index = layout.put_json(store, {"manifests": [index.as_json()]}, layout.MEDIA_INDEX)
    for name in ("oci", "contents"):
        directory = store.root / ("proofs/oci" if name == "oci" else name)
        directory.mkdir(parents=True)
    (store.root / "contents" / f"{ABSENT}.json").write_text("{}")
    lost = store.put(b"lost")
    age(store.root)
    (store.root / "proofs" / "oci" / f"{ABSENT}.json").write_text(json.dumps({"digest": index.digest}))
    assert names(find(store), store) == {f"blobs/{lost}"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b'{"config": 3, "layers": {}, "manifests": "x", "rootfs": []}', b"[" * 100_000,
        b'{"layers": [3, {"digest": "../../etc/passwd"}], "manifests": [null], "rootfs": {"diff_ids": [3]}}',
        b'{"manifests": [{"digest": "sha256:%s"}]}' % ABSENT.encode(),
    ],
    ids=range(7),
)  # fmt: skip
def test_documents_that_are_none_name_nothing(store: Store, content: bytes) -> None:
    (store.root / "proofs" / "oci").mkdir(parents=True)
    (store.root / "blobs" / ABSENT).write_bytes(content)
    lost = store.put(b"lost")
    age(store.root)
    (store.root / "proofs" / "oci" / f"{ABSENT}.json").write_text(json.dumps({"digest": f"sha256:{ABSENT}"}))
    assert names(find(store), store) == {f"blobs/{lost}"}


# --------------------------------------------------------------------------- what is not touched


def test_what_is_not_known_is_not_touched(one: Ready, tmp_path: Path) -> None:
    root = one.store.root
    outside = tmp_path / "outside"
    outside.write_text("somebody's")
    strange = [
        root / "notes.txt", root / "blobs" / "readme", root / "blobs" / f"{ABSENT}.old", root / "recipes" / "mine.json",
        root / "layouts" / "mine" / "index.json", root / "installed" / ABSENT, root / "pushes" / "a.jsonl",
        root / "proofs" / "oci" / "notes.json", root / "proofs" / "verdicts" / "mine" / "t1.json",
    ]  # fmt: skip
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (root / "layers" / f"{ABSENT}.json").write_text("not JSON")
    (root / "blobs" / ABSENT).symlink_to(outside)
    age(root)
    os.utime(outside, (LONG_AGO, LONG_AGO))
    remove(one.store)
    assert all(path.exists() for path in strange)
    assert (root / "layers" / f"{ABSENT}.json").exists()
    assert (root / "blobs" / ABSENT).is_symlink()
    assert outside.read_text() == "somebody's"


@pytest.mark.parametrize("kind", ["partial", "work"])
def test_what_somebody_is_working_on_stays(store: Store, kind: str) -> None:
    path = store.root / kind / (ABSENT if kind == "partial" else "cell-1")
    lock = ABSENT if kind == "partial" else "work-cell-1"
    if kind == "partial":
        path.write_bytes(b"half a wheel")
    else:
        path.mkdir()
        (path / "file").write_bytes(b"half a wheel")
    age(store.root)
    (found,) = find(store)
    assert (found.kind, found.path, found.size_bytes) == (kind, path, 12)
    before = time.time()
    with store.lock(lock):
        assert find(store) == ()
        assert gc.remove(store, [found], before=before) == ()
    os.utime(path)
    assert gc.remove(store, [found], before=LONG_AGO + 1) == (), "somebody has begun anew"
    assert path.exists()
    assert gc.remove(store, [found], before=time.time() + 1) == (found,)
    assert not path.exists()


def test_builds_and_pushes_are_waited_for(store: Store) -> None:
    held, over, entered = threading.Event(), threading.Event(), threading.Event()
    told: list[str] = []

    def building() -> None:
        with store.lock("build-cell"):
            held.set()
            over.wait(10)

    def collecting() -> None:
        with gc.alone(store, told.append):
            entered.set()

    threads = [threading.Thread(target=building), threading.Thread(target=collecting)]
    threads[0].start()
    assert held.wait(10)
    threads[1].start()
    assert not entered.wait(0.3)
    over.set()
    assert entered.wait(10)
    for thread in threads:
        thread.join()
    assert told == ["build-cell"]
    with gc.alone(store, told.append):
        assert told == ["build-cell"], "nobody is waited for"


def test_a_file_with_two_names_is_freed_once_and_with_the_last(store: Store) -> None:
    content = b"a layer" * 1000
    sha256 = store.put(content)
    base = store.root / "layouts" / f"base-bookworm-amd64-{'1' * 16}"
    base.mkdir()
    (base / "blob").hardlink_to(store.path(sha256))
    other = store.root / "elsewhere"
    other.hardlink_to(store.path(sha256))
    age(store.root)
    assert sum(garbage.size_bytes for garbage in find(store)) == 0, "it lives on under another name"
    other.unlink()
    found = find(store)
    assert {garbage.kind for garbage in found} == {"layouts", "blobs"}
    assert sum(garbage.size_bytes for garbage in found) == len(content)


# --------------------------------------------------------------------------- the verb


def run(one: Ready, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    class FakeProject:
        cells = (one.plan.cell,)

        def __init__(self, _: Path) -> None:
            pass

        def plans(self, _: object) -> tuple[Plan, ...]:
            return (one.plan,)

    monkeypatch.setattr(project, "Project", FakeProject)
    monkeypatch.setenv("TORCHYARD_HOME", str(one.store.root))
    ran = CliRunner().invoke(commands.cli, ["gc", *arguments])
    assert ran.exit_code == 0, ran.output
    return ran


def test_the_verb(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"x" * 1_500_000
    sha256 = one.store.put(content)
    age(one.store.root)
    path = one.store.path(sha256)
    ran = run(one, monkeypatch, "--dry-run")
    assert "wheels, Debian packages, layers and documents  1       1.5" in ran.stdout
    assert "1 of " in ran.stderr
    assert "would be removed, 1.5 MB" in ran.stderr
    assert path.exists()
    assert "there is nothing" in run(one, monkeypatch, "--dry-run", "--older-than", "60").stderr
    document = json.loads(run(one, monkeypatch, "--json").stdout)
    assert document == {
        "dry_run": False,
        "bytes": len(content),
        "kinds": [{"kind": "blobs", "count": 1, "bytes": len(content)}],
        "paths": [f"blobs/{hashlib.sha256(content).hexdigest()}"],
    }
    assert not path.exists()
    assert json.loads(run(one, monkeypatch, "--json").stdout)["paths"] == []
    assert complete(one.plan, one.store, builder="oci") is not None


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "home")
    path = store.path(store.put(b"a wheel"))
    age(store.root)
    monkeypatch.setenv("TORCHYARD_HOME", str(store.root))
    ran = CliRunner().invoke(commands.cli, ["gc", "-m", str(tmp_path / "matrix.yaml"), "--older-than", "0"])
    assert ran.exit_code == 2
    assert path.exists()
