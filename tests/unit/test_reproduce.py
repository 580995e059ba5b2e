"""Images made again: only locked files go into a clean store, nothing stays behind, and differences have names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import base as bases
from builder import cli as commands
from builder import gate, layout, provenance, push, referrers, reproduce, tar, transfer, upload, verify
from builder.build import StoreSession, complete
from builder.compare import Kind
from builder.credentials import Configuration
from builder.debian import Deb
from builder.engines.oci import OciEngine
from builder.errors import (
    CellFailedError,
    DiskError,
    HashMismatchError,
    ImpossibleError,
    LockError,
    MatrixError,
    SourceError,
)
from builder.fetching import Silent
from builder.project import Project
from builder.push import Tags
from builder.referrers import Artifact
from builder.render import Plan
from builder.reproduce import Reproduced, Workshop
from builder.schema import ImageBase
from builder.statement import MEDIA_TYPE
from builder.store import Store
from tests.support import bases as fakes
from tests.support.bases import (
    DOES_NOT_COMPILE,
    Ready,
    Said,
    base_entries,
    base_lock,
    damage,
    fake_python,
    index_of,
    lock_of,
    ready,
    wheels_of,
)
from tests.support.registry_server import PushServer

REPOSITORY = "team/app"
LEAKS = {"SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "7", "HOME": "/else",
         "TORCHYARD_HOME": "/else", "PYTHONPATH": "/else"}  # fmt: skip


@dataclass
class Bootstrap:
    """Makes bases of a few files, as mmdebstrap would, and sees where."""

    entries: Sequence[tar.Entry] = field(default_factory=base_entries)
    error: BaseException | None = None
    stores: list[Path] = field(default_factory=list)
    found: list[dict[str, list[str]]] = field(default_factory=list)
    """What was in each store before the base was made, by directory."""
    environments: list[dict[str, str]] = field(default_factory=list)
    umasks: list[int] = field(default_factory=list)

    def __call__(self, lock: bases.BaseLock, store: Store, scratch: Path, *_: object, **__: object) -> layout.Image:
        self.stores.append(store.root)
        self.found.append({path.name: sorted(it.name for it in path.iterdir()) for path in store.root.iterdir()})
        self.environments.append(dict(os.environ))
        mask = os.umask(0)
        os.umask(mask)
        self.umasks.append(mask)
        if self.error is not None:
            raise self.error
        layer = layout.gzip_layer(store, tar.stream(self.entries), scratch=scratch)
        return layout.assemble(
            store, architecture="amd64", config=fakes.CONFIG, epoch=lock.epoch, layers=(layer,),
            history=(layout.History(created_by="torchyard base"),),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bootstrap]:
    made = Bootstrap()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(bases, "_make", made)
    with fake_python():
        yield made


@dataclass
class Shop:
    """A cell, its user's store, and where it is made again."""

    plan: Plan
    store: Store
    one: Ready
    said: Said
    workshop: Workshop

    def build(self) -> str:
        session = StoreSession(
            builder=OciEngine(), host=None, index=self.workshop.index, store=self.store, report=Said(), rebuild=True
        )
        return session.build(self.plan).digest

    def again(self) -> Reproduced:
        return reproduce.cell(self.plan, self.workshop)

    def assert_nothing_left(self) -> None:
        assert list((self.store.root / "work").iterdir()) == []


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    one = ready(tmp_path / "home")
    # Of the base nothing is there but its lock.
    shutil.rmtree(one.store.root / "layouts")
    said = Said()
    workshop = Workshop(store=one.store, index=index_of(tmp_path / "links", one.wheels), report=said)
    return Shop(plan=one.plan, store=one.store, one=one, said=said, workshop=workshop)


def kinds(found: Reproduced) -> set[tuple[Kind, str]]:
    """Return the classes of differences and the paths, but for those of the documents, which follow."""
    return {(group.kind, one.path) for group in found.groups for one in group.examples if group.layer}


# --------------------------------------------------------------------------- the same


def test_a_cell_made_again_has_the_same_digest(shop: Shop, bootstrap: Bootstrap) -> None:
    digest = shop.build()
    found = shop.again()
    assert (found.expected, found.rebuilt, found.is_same, found.groups) == (digest, digest, True, ())
    assert found.against == reproduce.HERE
    assert found.as_json()["same"] is True
    shop.assert_nothing_left()
    assert complete(shop.plan, shop.store, builder="oci") is not None, "the user's own is as it was"


def test_only_locked_files_go_into_the_clean_store(shop: Shop, bootstrap: Bootstrap) -> None:
    shop.build()
    shop.again()
    mine, clean = bootstrap.found
    locked = sorted(one.sha256 for one in shop.one.wheels)
    assert set(mine["blobs"]) >= set(locked)
    assert clean["blobs"] == locked
    assert {name for name, content in clean.items() if content} == {"blobs", "locks", "work"}
    assert bootstrap.stores[1].is_relative_to(shop.store.root / "work")
    assert not bootstrap.stores[1].exists()


def test_nothing_of_the_environment_reaches_the_build(
    shop: Shop, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.build()
    for name, value in LEAKS.items():
        monkeypatch.setenv(name, value)
    before, mask = dict(os.environ), os.umask(0o077)
    try:
        assert shop.again().is_same
        assert dict(os.environ) == before
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(mask)
    assert bootstrap.environments[1].keys() == {"PATH", "HOME"}
    assert Path(bootstrap.environments[1]["HOME"]).is_relative_to(bootstrap.stores[1])
    assert bootstrap.umasks[1] == 0o022


def test_what_is_derived_in_the_users_store_is_not_taken(shop: Shop) -> None:
    digest = shop.build()
    for name in ("layers", "recipes", "interpreters", "foundations", "proofs/oci"):
        for path in (shop.store.root / name).glob("*.json"):
            content = json.loads(path.read_bytes())
            path.write_text(json.dumps({"poison": content}))
    found = shop.again()
    assert found.rebuilt == digest
    assert found.against != reproduce.HERE, "the poisoned store does not have it any more"


def test_what_is_not_built_yet_is_made_twice(shop: Shop, bootstrap: Bootstrap) -> None:
    found = shop.again()
    assert found.is_same
    assert found.notes == ("your store does not have it: it is made twice, and the two are compared",)
    assert len(set(bootstrap.stores)) == 2
    assert complete(shop.plan, shop.store, builder="oci") is None
    shop.assert_nothing_left()


def test_what_is_made_twice_and_differs_is_found_as_well(shop: Shop, bootstrap: Bootstrap) -> None:
    times = iter((0, 1))

    def entries() -> list[tar.Entry]:
        return [*base_entries(), tar.file_entry("etc/made", b"now", mtime=next(times))]

    whole = bootstrap.__call__

    def make(*arguments: Any, **more: Any) -> layout.Image:
        bootstrap.entries = entries()
        return whole(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "_make", make)
        found = shop.again()
    assert not found.is_same
    assert kinds(found) == {(Kind.TIME, "etc/made")}


# --------------------------------------------------------------------------- files of the user's store


def test_a_locked_file_that_was_damaged_is_fetched_again(shop: Shop) -> None:
    digest = shop.build()
    damage(shop.one.path("mesh"), 2000)
    found = shop.again()
    assert (found.rebuilt, found.expected) == (digest, digest)
    assert any("locked files: 1 were damaged" in line for line in shop.said.lines)
    assert shop.store.verify(shop.one.wheel("mesh").sha256)


def test_a_locked_file_that_is_not_there_is_fetched(shop: Shop) -> None:
    digest = shop.build()
    shop.one.path("mesh").unlink()
    assert shop.again().rebuilt == digest


def test_a_locked_file_that_nobody_has(shop: Shop, tmp_path: Path) -> None:
    shop.one.path("mesh").unlink()
    shop.workshop = replace(shop.workshop, index=index_of(tmp_path / "empty"))
    with pytest.raises(SourceError):
        shop.again()
    shop.assert_nothing_left()


def test_a_disk_that_damages_what_is_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.build()
    bad = shop.one.wheel("mesh").sha256
    whole = Store.verify
    monkeypatch.setattr(Store, "verify", lambda self, sha256: sha256 != bad and whole(self, sha256))
    with pytest.raises(HashMismatchError, match="stay so"):
        shop.again()


def test_on_another_file_system_files_are_copied(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = shop.build()

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert reproduce._adopt(reproduce._files(shop.plan), shop.store, clean := Store.open(tmp_path / "clean")) == []
    for one in shop.one.wheels:
        assert not clean.path(one.sha256).samefile(shop.store.path(one.sha256))
        assert clean.verify(one.sha256)
    monkeypatch.undo()
    assert digest


def test_a_directory_of_the_users_own(shop: Shop, bootstrap: Bootstrap, tmp_path: Path) -> None:
    digest = shop.build()
    place = tmp_path / "elsewhere"
    place.mkdir()
    shop.workshop = replace(shop.workshop, directory=place)
    assert shop.again().rebuilt == digest
    assert bootstrap.stores[1].is_relative_to(place)
    assert list(place.iterdir()) == []


# --------------------------------------------------------------------------- when it breaks off


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CellFailedError("no"), OSError(errno.EIO, "no"), MemoryError()])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_nothing_stays_behind(
    shop: Shop, bootstrap: Bootstrap, tmp_path: Path, error: BaseException, *, elsewhere: bool
) -> None:
    shop.build()
    place = tmp_path / "elsewhere"
    place.mkdir()
    if elsewhere:
        shop.workshop = replace(shop.workshop, directory=place)
    bootstrap.error, before = error, dict(os.environ)
    with pytest.raises(type(error)):
        shop.again()
    assert list(place.iterdir()) == []
    shop.assert_nothing_left()
    assert dict(os.environ) == before


def test_what_a_killed_run_left_is_cleared(shop: Shop, bootstrap: Bootstrap) -> None:
    shop.build()
    left = shop.store.root / "work" / f"reproduce-{shop.plan.cell.id}" / "recipes" / "old.json"
    left.parent.mkdir(parents=True)
    left.write_text("left")
    assert shop.again().is_same
    assert "recipes" not in bootstrap.found[1]


def test_a_disk_without_room_is_said_before_anything_is_made(
    shop: Shop, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.build()
    usage = shutil.disk_usage(shop.store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=reproduce.ROOM - 1))
    with pytest.raises(DiskError, match="not enough disk to make"):
        shop.again()
    assert len(bootstrap.stores) == 1
    shop.assert_nothing_left()


# --------------------------------------------------------------------------- differences are named


def test_a_file_planted_in_the_base(shop: Shop, bootstrap: Bootstrap) -> None:
    planted = tar.file_entry("usr/lib/uv_cache.json", b"{}", mtime=7)
    bootstrap.entries = [*base_entries(), tar.Entry(path="usr/lib", kind=tar.Kind.DIRECTORY, mode=0o755), planted]
    shop.build()
    bootstrap.entries = base_entries()
    found = shop.again()
    assert not found.is_same
    assert kinds(found) == {(Kind.MISSING, "usr/lib"), (Kind.MISSING, "usr/lib/uv_cache.json")}
    (group,) = [group for group in found.groups if group.kind is Kind.MISSING]
    assert group.layer == "torchyard base"
    assert (group.count, group.examples[1].expected) == (2, "file, 2 bytes")


def test_a_time_of_the_clock_in_the_base(shop: Shop, bootstrap: Bootstrap) -> None:
    bootstrap.entries = [replace(it, mtime=1_795_000_000) if it.path == "etc" else it for it in base_entries()]
    shop.build()
    bootstrap.entries = base_entries()
    found = shop.again()
    # The directory is in the cell's own layer as well, with the time that it has in the base.
    assert {path for kind, path in kinds(found)} == {"etc"}
    assert {kind for kind, path in kinds(found)} == {Kind.TIME}


def test_bytecode_that_is_valid_by_time(shop: Shop) -> None:
    def by(flags: int) -> Callable[[str, bytes], bytes | None]:
        def compile_one(path: str, source: bytes) -> bytes | None:
            if source == DOES_NOT_COMPILE:
                return None
            head = struct.pack("<4sL8s", b"\xa7\r\r\n", flags, bytes(8))
            return head + hashlib.sha256(path.encode() + source).digest()

        return compile_one

    with fake_python(compile_one=by(0)):
        shop.build()
    with fake_python(compile_one=by(1)):
        found = shop.again()
    assert {kind for kind, _ in kinds(found)} == {Kind.BYTECODE}
    assert all(path.endswith(".pyc") for _, path in kinds(found))
    assert {group.layer for group in found.groups if group.layer} <= {
        "bytecode of torch", "bytecode of what torch needs", "bytecode of the variant's own packages",
    }  # fmt: skip
    assert "by its source's time, 1970-01-01T00:00:00Z" in str(found.groups)


def test_an_image_whose_file_was_tampered_with(shop: Shop) -> None:
    """Whoever changes a layer in the store has to change every digest above it, too; the lock does not go along."""
    digest = shop.build()
    image = complete(shop.plan, shop.store, builder="oci")
    assert image is not None
    entries = base_entries()
    entries[-1] = replace(entries[-1], content=lambda: (b"no prograM",))
    tampered = fakes.layer_of(shop.store, entries)
    about = json.loads(shop.store.path(image.config.sha256).read_bytes())
    about["rootfs"]["diff_ids"][0] = tampered.diff_id
    config = layout.put_json(shop.store, about, layout.MEDIA_CONFIG)
    layers = [tampered.blob, *(layer.blob for layer in image.layers[1:])]
    manifest = layout.put_json(shop.store, layout.manifest(config=config, layers=layers), layout.MEDIA_MANIFEST)
    record = shop.store.root / "proofs" / "oci" / f"{shop.plan.digest}.json"
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "digest": manifest.digest}))
    found = shop.again()
    assert (found.expected, found.rebuilt) == (manifest.digest, digest)
    assert [(group.kind, group.layer) for group in found.groups] == [(Kind.CONTENT, "torchyard base")]
    (one,) = found.groups[0].examples
    assert one.path == "usr/bin/python3.11"
    assert hashlib.sha256(b"no prograM").hexdigest()[:12] in one.expected


# --------------------------------------------------------------------------- a published image


DEB_CONTENT = b"a Debian package"
DEB = Deb(
    name="python3", version="3.11.2-1", architecture="amd64", filename="pool/main/p/python3/python3_3.11.2-1_amd64.deb",
    sha256=hashlib.sha256(DEB_CONTENT).hexdigest(), size=len(DEB_CONTENT),
)  # fmt: skip


def matrix_of(**base: Any) -> dict[str, Any]:
    about = {"kind": "bootstrap", "suite": "bookworm", "python": "3.11", "packages": ["python3"],
             "image": f"debian@sha256:{'0' * 64}"}  # fmt: skip
    return {
        "version": 1,
        "repository": "torchyard",
        "exclude_newer": "2026-11-15T00:00:00Z",
        "bases": {"bookworm": {**about, **base} if base.get("kind") != "image" else base},
        "variants": {"runtime": {"description": "a test", "packages": ["numpy"]}},
        "axes": {
            "torch": ["2.8.0"],
            "cuda": ["12.8"],
            "cudnn": ["stock"],
            "base": ["bookworm"],
            "variant": ["runtime"],
        },
    }


@dataclass
class Published:
    """A project, its image in a registry, and a stranger with an empty store who has the reference only."""

    project: Project
    plan: Plan
    server: PushServer
    publisher: Store
    image: layout.Image
    workshop: Workshop
    said: Said

    @property
    def digest(self) -> str:
        return self.image.manifest.digest

    def statement(self, **change: Any) -> dict[str, Any]:
        made = provenance.statement(self.project, self.plan, self.digest)
        document: dict[str, Any] = json.loads(made.dumps())
        document["predicate"]["buildDefinition"]["internalParameters"].update(change)
        return document

    def push(self, statement: Mapping[str, Any] | None = None, image: layout.Image | None = None) -> None:
        image = image or self.image
        with push.opened(f"{self.server.host}/{REPOSITORY}", Configuration()) as target:
            push.push(target, self.publisher, image, Tags(moving=("latest",)), progress=Silent())
            if statement is not None:
                content = layout.canonical_json(statement)
                referrers.attach(target, image.manifest, Artifact(artifact_type=MEDIA_TYPE, content=content))

    def again(self, name: str = "latest", **more: Any) -> Reproduced:
        with verify.opened(f"{self.server.host}/{REPOSITORY}:{name}", Configuration()) as (target, tag):
            return reproduce.published(target, tag, self.workshop, **more)


@pytest.fixture
def server() -> Iterator[PushServer]:
    with PushServer() as running:
        running.lists_referrers = True
        yield running


@pytest.fixture
def published(tmp_path: Path, server: PushServer) -> Published:
    (root := tmp_path / "project").mkdir()
    (root / "matrix.yaml").write_text(json.dumps(matrix_of()))
    project = Project(root / "matrix.yaml")
    (cell,) = project.cells
    wheels = wheels_of(cell)
    project.write_lock(cell, lock_of(cell, wheels))
    project.write_base_lock(project.base_lock_path(cell), replace(base_lock(), debs=(DEB,)))
    plan = project.plan(cell)
    publisher, stranger = Store.open(tmp_path / "publisher"), Store.open(tmp_path / "stranger")
    for store in (publisher, stranger):
        store.put(DEB_CONTENT)
    index = index_of(tmp_path / "links", wheels)
    built = StoreSession(builder=OciEngine(), host=None, index=index, store=publisher, report=Said()).build(plan)
    image = complete(plan, publisher, builder="oci")
    assert image is not None
    assert image.manifest.digest == built.digest
    said = Said()
    workshop = Workshop(store=stranger, index=index, report=said)
    return Published(
        project=project, plan=plan, server=server, publisher=publisher, image=image, workshop=workshop, said=said
    )


def test_a_published_image_is_made_again_from_its_provenance(published: Published) -> None:
    published.push(published.statement())
    asked = len(published.server.requests)
    found = published.again()
    assert (found.expected, found.rebuilt, found.groups, found.notes) == (published.digest, published.digest, (), ())
    assert found.cell_id == published.plan.cell.id
    assert found.against == f"{published.server.host}/{REPOSITORY}:latest"
    since = published.server.requests[asked:]
    assert {one.method for one in since} <= {"GET", "HEAD"}, "it is only read"
    layers = {layer.blob.digest for layer in published.image.layers}
    assert not [one for one in since if one.path.rpartition("/")[2] in layers], "and no layer is fetched"
    assert list((published.workshop.store.root / "work").iterdir()) == []


def test_a_published_image_by_its_digest_and_without_the_api(published: Published) -> None:
    published.server.lists_referrers = False
    published.push(published.statement())
    with verify.opened(f"{published.server.host}/{REPOSITORY}@{published.digest}", Configuration()) as (target, name):
        found = reproduce.published(target, name, published.workshop)
    assert found.is_same
    assert found.against == f"{published.server.host}/{REPOSITORY}@{published.digest}"


def test_only_what_differs_is_fetched(published: Published, bootstrap: Bootstrap) -> None:
    published.push(published.statement())
    bootstrap.entries = [replace(it, mode=0o700) if it.path == "workspace" else it for it in base_entries()]
    asked = len(published.server.requests)
    found = published.again()
    assert not found.is_same
    assert kinds(found) == {(Kind.MODE, "workspace")}
    assert found.groups[0].examples[0].expected == "0775"
    first, *others = (layer.blob.digest for layer in published.image.layers)
    fetched = {one.path.rpartition("/")[2] for one in published.server.requests[asked:] if one.method == "GET"}
    assert first in fetched
    assert not fetched & set(others)


def test_an_image_marked_as_unproven_is_made_with_its_mark(published: Published) -> None:
    marked = gate.marked(published.publisher, published.image)
    published.image = marked
    published.push(published.statement())
    found = published.again()
    assert (found.is_same, found.expected) == (True, marked.manifest.digest)


def test_another_version_and_plan_are_said_first(published: Published) -> None:
    published.push(published.statement(torchyard="0.0.1", plan="0" * 64))
    found = published.again()
    assert found.is_same, "the digest decides, whatever a version is called"
    assert found.notes[0].startswith("made by torchyard 0.0.1; this is ")
    assert "another plan of the same inputs" in found.notes[1]
    lines = published.said.lines
    assert next(n for n, line in enumerate(lines) if "0.0.1" in line) < next(
        n for n, line in enumerate(lines) if "files again" in line
    )


def test_an_image_that_is_not_there(published: Published) -> None:
    with pytest.raises(ImpossibleError, match="no such image"):
        published.again("another")


def test_an_image_of_which_nothing_is_said(published: Published) -> None:
    published.push()
    with pytest.raises(ImpossibleError, match="nothing says what the image was made of"):
        published.again()


def test_a_provenance_of_another_kind(published: Published) -> None:
    statement = published.statement()
    statement["predicate"]["buildDefinition"]["buildType"] = "https://example/other"
    published.push(statement)
    with pytest.raises(MatrixError, match="cannot be used"):
        published.again()


def test_a_provenance_whose_cell_is_not_in_its_matrix(published: Published) -> None:
    statement = published.statement()
    statement["predicate"]["buildDefinition"]["externalParameters"]["cell"] = "torch9-cpu"
    published.push(statement)
    with pytest.raises(MatrixError, match="has no cell torch9-cpu"):
        published.again()
    assert list((published.workshop.store.root / "work").iterdir()) == []


def test_a_provenance_whose_lock_was_changed(published: Published) -> None:
    statement = published.statement()
    inputs = statement["predicate"]["buildDefinition"]["externalParameters"]["inputs"]
    (path,) = [path for path in inputs if path.endswith("pylock.toml")]
    inputs[path] = inputs[path].replace("size = ", "size = 1", 1)
    published.push(statement)
    with pytest.raises(LockError):
        published.again()


def test_provenances_that_disagree_are_said(published: Published) -> None:
    statement = published.statement()
    inputs = statement["predicate"]["buildDefinition"]["externalParameters"]["inputs"]
    other = json.loads(json.dumps(statement))
    other["predicate"]["buildDefinition"]["externalParameters"]["inputs"]["matrix.yaml"] += " "
    published.push(statement)
    published.push(other)
    assert inputs
    assert published.again().notes[0].startswith("2 provenances disagree")


def test_a_base_of_somebody_is_not_run_unless_that_is_said(published: Published) -> None:
    statement = published.statement()
    asked = statement["predicate"]["buildDefinition"]["externalParameters"]
    image = {"kind": "image", "python": "3.11", "image": f"{published.server.host}/evil/base@sha256:{'1' * 64}"}
    asked["inputs"]["matrix.yaml"] = json.dumps(matrix_of(**image))
    published.push(statement)
    with pytest.raises(MatrixError, match="whose Python would run on this machine"):
        published.again()
    assert not [one for one in published.server.requests if "evil" in one.path]
    with pytest.raises(SourceError, match="no such manifest in evil/base"):
        published.again(trust_base=True)


def test_the_registry_gives_a_manifest_that_it_does_not_name(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.push(published.statement())
    monkeypatch.setattr(upload, "read_manifest", lambda *_: b"{}")
    with pytest.raises(HashMismatchError, match="another manifest"):
        published.again()


# --------------------------------------------------------------------------- a base that is an image


def test_an_image_as_base_comes_through_the_users_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Store.open(tmp_path / "publisher")
    base = layout.assemble(
        publisher, architecture="amd64", config=fakes.CONFIG, epoch=0,
        layers=[fakes.layer_of(publisher, base_entries())],
    )  # fmt: skip
    with PushServer() as server:
        with push.opened(f"{server.host}/team/base", Configuration()) as target:
            push.push(target, publisher, base, Tags(), progress=Silent())
        cell = fakes.bootstrap_cell(packages=("numpy",))
        image = f"{server.host}/team/base@{base.manifest.digest}"
        cell = replace(cell, base=ImageBase(kind="image", python="3.11", image=image))
        wheels = wheels_of(cell)
        plan = fakes.plan_of(cell, wheels)
        workshop = Workshop(
            store=Store.open(tmp_path / "home"), index=index_of(tmp_path / "links", wheels), report=Said()
        )
        monkeypatch.setenv("TORCHYARD_INSECURE_REGISTRIES", server.host)
        assert reproduce.cell(plan, workshop).is_same
        blobs = [one for one in server.requests if one.kind == "blob" and one.method == "GET"]
        assert len(blobs) == len({one.path for one in blobs}), "each was fetched once, for two stores"


# --------------------------------------------------------------------------- the verb


@pytest.fixture
def run(published: Published, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for plan in published.project.plans(published.project.cells):
        published.project.write(plan)
    monkeypatch.setenv("TORCHYARD_HOME", str(published.workshop.store.root))
    monkeypatch.setattr("builder.index.Index", lambda: published.workshop.index)

    def invoke(*arguments: str) -> Result:
        found = CliRunner().invoke(commands.cli, ["reproduce", "-m", str(published.project.matrix_path), *arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert "Traceback" not in found.output
        return found

    return invoke


def test_the_verb_for_a_cell_and_an_image(published: Published, run: Callable[..., Result]) -> None:
    published.push(published.statement())
    found = run("2.8.0-cuda12.8-cudnn9-runtime", f"{published.server.host}/{REPOSITORY}:latest", "--json")
    assert found.exit_code == 0, found.stderr
    mine, theirs = json.loads(found.stdout)
    assert mine["rebuilt"] == theirs["rebuilt"] == published.digest
    assert (mine["same"], theirs["same"], theirs["differences"]) == (True, True, [])


def test_the_verb_says_what_differs(published: Published, run: Callable[..., Result], bootstrap: Bootstrap) -> None:
    published.push(published.statement())
    bootstrap.entries = [replace(it, mtime=1) if it.path == "workspace" else it for it in base_entries()]
    reference = f"{published.server.host}/{REPOSITORY}:latest"
    found = run(reference)
    assert found.exit_code == 1
    shown = found.stdout.splitlines()
    assert shown[0] == f"{published.plan.cell.id}: DIFFERS"
    assert published.digest in shown[1]
    assert any(line.startswith("  time: 1  (") for line in shown)
    assert "    workspace" in shown
    assert "      found     1970-01-01T00:00:01Z" in shown
    document = json.loads(run(reference, "--json").stdout)
    assert {group["class"] for group in document[0]["differences"]} >= {"time"}


def test_the_verb_refuses(published: Published, run: Callable[..., Result], tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert run("2.8.0-cuda12.8-cudnn9-runtime", "--store", str(tmp_path / "nowhere")).exit_code == 2
    assert run("torch9*").exit_code in (2, 3)
    nowhere = run(f"{published.server.host}/{REPOSITORY}:nothing", "-m", str(tmp_path / "nowhere" / "matrix.yaml"))
    assert nowhere.exit_code == 3, "no project is needed for an image"
    assert "no such image" in nowhere.stderr
    found = run(f"{published.server.host}/{REPOSITORY}")
    assert found.exit_code == 2
    assert "names no image" in found.stderr
    found = run(f"{published.server.host}/{REPOSITORY}:nothing", "2.8.0-cuda12.8-cudnn9-runtime")
    assert found.exit_code == 1
    assert "no such image" in found.stderr
    assert "the same" in found.stdout, "one that fails does not stop the others"
