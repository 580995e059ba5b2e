"""Images pushed to a registry that fails at every step: nothing is sent twice, and no tag is set before its time."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import aliases, bills, gate, layout, matrix, push, tar, transfer
from builder import build as builds
from builder import project as projects
from builder.cli import cli
from builder.credentials import Configuration
from builder.engines.oci import recipe
from builder.engines.oci.recipe import Recipe
from builder.errors import CellFailedError, HashMismatchError, MatrixError, SourceError, TorchyardError
from builder.fetching import Silent
from builder.layout import Image
from builder.matrix import Cell
from builder.project import Project as RealProject
from builder.push import Pushed, Tags
from builder.registry import pull
from builder.reports import loads
from builder.store import Store
from builder.upload import Way
from tests.support import cells
from tests.support.cosign import Cosign
from tests.support.registry_server import Fault, PushServer, TokenService, text_of
from tests.support.reports import document, result

REPOSITORY = "team/app"
TAGS = Tags(fixed=("1.0-a", "long-id"), moving=("1-a",))
PASSWORD = "canary-password"
READS = {"blob", "look"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wait for milliseconds, and see no configuration of this machine's."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("TORCHYARD_"):
            monkeypatch.delenv(name)
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "registries.conf"
    empty.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(empty))


@pytest.fixture
def server() -> Iterator[PushServer]:
    with PushServer() as running:
        yield running


def made(store: Store, *names: str, env: str = "A=1") -> Image:
    """Make an image of layers, each of random bytes of its name; the first is kept as a recipe only."""
    with store.scratch("made") as scratch:
        layers = [
            layout.gzip_layer(
                store, tar.stream([tar.file_entry(name, random.Random(name).randbytes(400_000))]), scratch=scratch
            )
            for name in names
        ]
    first = layers[0]
    content = store.path(first.blob.sha256).read_bytes()
    sources = (store.put(b"not the layer" + content[:1000]), store.put(content[1000:]))
    segments = ((0, 13, 1000), (1, 0, len(content) - 1000))
    recipe.keep(store, Recipe(layer=first, sources=sources, segments=segments))
    store.path(first.blob.sha256).unlink()
    return layout.assemble(store, architecture="amd64", config={"Env": [env]}, epoch=0, layers=layers)


@dataclass
class Shipping:
    """A store, an image in it, and a registry that it is pushed to."""

    server: PushServer
    store: Store
    image: Image
    configuration: Configuration = field(default_factory=Configuration)

    def push(
        self, image: Image | None = None, tags: Tags = TAGS, *, repository: str = REPOSITORY, dry: bool = False
    ) -> Pushed:
        with push.opened(f"{self.server.host}/{repository}", self.configuration) as target:
            if dry:
                return push.look(target, image or self.image, tags)
            return push.push(target, self.store, image or self.image, tags, progress=Silent())

    def refused(self, kind: type[TorchyardError] = SourceError, **more: Any) -> str:
        with pytest.raises(kind) as caught:
            self.push(**more)
        return text_of(caught.value)

    @property
    def digest(self) -> str:
        return self.image.manifest.digest

    @property
    def tags(self) -> Mapping[str, str]:
        return self.server.tags.get(REPOSITORY, {})

    def assert_there(self, image: Image | None = None, repository: str = REPOSITORY) -> None:
        image = image or self.image
        for blob in image.blobs[1:]:
            assert self.server.blobs[repository][blob.digest] == b"".join(recipe.pieces(self.store, blob))
        kind, content = self.server.manifests[repository][image.manifest.digest]
        assert (kind, content) == (layout.MEDIA_MANIFEST, self.store.path(image.manifest.sha256).read_bytes())

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.image.blobs[1:])


@pytest.fixture
def shipping(server: PushServer, store: Store) -> Shipping:
    return Shipping(server=server, store=store, image=made(store, "a", "b", "c"))


# --------------------------------------------------------------------------- when all is well


def test_an_image_arrives_and_gets_its_tags_last(shipping: Shipping, tmp_path: Path) -> None:
    done = shipping.push()
    shipping.assert_there()
    assert done == Pushed(
        blobs={Way.SENT: 4}, bytes_sent=shipping.size, tags={"1.0-a": None, "long-id": None, "1-a": None}
    )
    assert shipping.tags == dict.fromkeys(["1.0-a", "long-id", "1-a"], shipping.digest)
    kinds = [one.kind for one in shipping.server.requests if one.kind not in READS]
    assert kinds[-5:] == ["manifest", "read", "tag", "tag", "tag"]
    assert [one.path.rpartition("/")[2] for one in shipping.server.of_kind("tag")] == ["1.0-a", "long-id", "1-a"]
    assert kinds[-6] == "commit"
    *_, last = shipping.server.of_kind("commit")
    assert last.query["digest"] == [shipping.image.config.digest], "the config comes after the layers"
    assert not shipping.store.has(shipping.image.layers[0].blob.sha256), "no copy is made of a layer"
    reference = f"{shipping.server.host}/{REPOSITORY}@{shipping.digest}"
    pulled = pull(reference, platform="linux/amd64", store=Store.open(tmp_path / "other"))
    assert pulled.layers == shipping.image.layers


def labelled(store: Store, cell: str | None, name: str) -> Image:
    """Make an image of one layer and of a cell; of none that torchyard knows if it is None."""
    image = made(store, name)
    labels = {} if cell is None else {"torchyard.cell": cell}
    return layout.assemble(store, architecture="amd64", config={"Labels": labels}, epoch=0, layers=image.layers)


def test_a_tag_of_one_cell_never_goes_to_another(shipping: Shipping) -> None:
    mine = Tags(own=("2.8.0-runtime",), moving=("2.8-runtime",), cell="cell-a")
    first, second, foreign = (
        labelled(shipping.store, cell, name) for cell, name in (("cell-a", "1"), ("cell-a", "2"), ("cell-b", "3"))
    )
    shipping.push(first, mine)
    shipping.push(second, mine)
    assert set(shipping.tags.values()) == {second.manifest.digest}
    theirs = replace(mine, cell="cell-b")
    received = shipping.server.received
    for dry in (True, False):
        said = shipping.refused(CellFailedError, image=foreign, tags=theirs, dry=dry)
        assert "the tag 2.8.0-runtime is another cell's" in said
        assert f"{shipping.server.host}/{REPOSITORY}:2.8.0-runtime" in said
        assert "an image of 'cell-a'; who pinned it would get one of cell-b" in said
        assert "2.8-runtime is another" not in said
    assert shipping.server.received == received
    assert set(shipping.tags.values()) == {second.manifest.digest}


def test_a_tag_that_is_meant_to_goes_from_cell_to_cell(shipping: Shipping) -> None:
    shipping.push(labelled(shipping.store, "cell-a", "1"), Tags(moving=("latest",), cell="cell-a"))
    other = labelled(shipping.store, "cell-b", "2")
    shipping.push(other, Tags(own=("2.8.1-runtime",), moving=("latest",), cell="cell-b"))
    assert set(shipping.tags.values()) == {other.manifest.digest}


@pytest.mark.parametrize("content", [b'{"schemaVersion": 2}', b'{"manifests": []}', b"[]", b"\xff", b'{"config": 1}'])
def test_a_tag_of_what_is_no_image_of_a_cell_is_taken(shipping: Shipping, content: bytes) -> None:
    shipping.server.tag(REPOSITORY, "own", content)
    image = labelled(shipping.store, "cell-a", "1")
    shipping.push(labelled(shipping.store, None, "2"), Tags(moving=("unknown",)))
    shipping.push(image, Tags(own=("own", "unknown"), cell="cell-a"))
    assert set(shipping.tags.values()) == {image.manifest.digest}


def test_an_unchanged_image_is_only_asked_for(shipping: Shipping) -> None:
    shipping.push()
    shipping.server.requests.clear()
    done = shipping.push()
    assert done.blobs == {Way.THERE: 4}
    assert done.bytes_sent == 0
    assert done.tags == dict.fromkeys(["1.0-a", "long-id", "1-a"], shipping.digest)
    assert {one.method for one in shipping.server.requests} == {"HEAD"}
    assert len(shipping.server.requests) == 4 + 1 + 2 * 3


def test_thirty_layers_that_are_there_take_no_time(server: PushServer, store: Store) -> None:
    shipping = Shipping(server=server, store=store, image=made(store, *map(str, range(30))))
    shipping.push()
    started = time.monotonic()
    assert shipping.push().bytes_sent == 0
    assert time.monotonic() - started < 2


def test_a_lost_journal_costs_one_request(shipping: Shipping) -> None:
    shipping.push()
    for path in (shipping.store.root / "pushes").iterdir():
        path.unlink()
    shipping.server.requests.clear()
    assert shipping.push().bytes_sent == 0
    assert [one.kind for one in shipping.server.requests if one.method != "HEAD"] == ["read"]


def test_another_image_brings_only_what_is_new(shipping: Shipping) -> None:
    shipping.push()
    other = made(shipping.store, "a", "b", "d")
    done = shipping.push(other, Tags(fixed=("2.0-a",), moving=("1-a",)))
    assert done.blobs == {Way.THERE: 2, Way.SENT: 2}
    assert done.bytes_sent == other.layers[2].blob.size + other.config.size
    assert done.tags == {"2.0-a": None, "1-a": shipping.digest}
    assert shipping.tags["1-a"] == other.manifest.digest
    assert shipping.tags["1.0-a"] == shipping.digest


def test_another_repository_of_the_registry_gets_it_mounted(shipping: Shipping) -> None:
    shipping.push()
    done = shipping.push(repository="team/other")
    shipping.assert_there(repository="team/other")
    assert done.blobs == {Way.MOUNTED: 4}
    assert done.bytes_sent == 0


def test_a_blob_that_stands_there_twice_is_sent_once(server: PushServer, store: Store) -> None:
    image = made(store, "a", "b")
    twice = layout.assemble(store, architecture="amd64", config={}, epoch=0, layers=[*image.layers, image.layers[1]])
    assert Shipping(server=server, store=store, image=twice).push().blobs == {Way.SENT: 3}


def test_what_would_be_done_is_only_asked(shipping: Shipping) -> None:
    done = shipping.push(dry=True)
    assert done == Pushed(blobs={Way.THERE: 0, Way.SENT: 4}, bytes_sent=shipping.size, tags=dict.fromkeys(done.tags))
    assert {one.method for one in shipping.server.requests} == {"HEAD"}
    assert not shipping.server.uploads
    shipping.push()
    assert shipping.push(dry=True).blobs == {Way.THERE: 4, Way.SENT: 0}
    shipping.server.tag(REPOSITORY, "1.0-a")
    assert "exists" in shipping.refused(CellFailedError, dry=True)


# --------------------------------------------------------------------------- tags of others


@pytest.mark.parametrize("name", ["1.0-a", "long-id"])
def test_a_fixed_tag_of_another_image_is_refused_before_anything_is_sent(shipping: Shipping, name: str) -> None:
    other = shipping.server.tag(REPOSITORY, name)
    text = shipping.refused(CellFailedError)
    assert f"the tag {name} exists, and is another image's" in text
    assert other in text
    assert shipping.digest in text
    assert shipping.tags == {name: other}
    assert {one.method for one in shipping.server.requests} == {"HEAD"}


def test_every_taken_tag_is_named(shipping: Shipping) -> None:
    for name in TAGS.fixed:
        shipping.server.tag(REPOSITORY, name)
    text = shipping.refused(CellFailedError)
    assert all(f"the tag {name} exists" in text for name in TAGS.fixed)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ["1.0-a", "1-a"])
@pytest.mark.parametrize("was_there", [False, True])
def test_a_tag_that_is_moved_meanwhile_is_refused(
    shipping: Shipping, name: str, *, was_there: bool, conditional: bool
) -> None:
    server = shipping.server
    server.conditional = conditional
    before = server.tag(REPOSITORY, "1-a", b"{}") if was_there and name == "1-a" else None
    moved: list[str] = []

    def move() -> None:
        moved.append(server.tag(REPOSITORY, name, b'{"other": 1}'))

    server.fault("manifest", Fault(before=move))
    text = shipping.refused(CellFailedError)
    assert f"the tag {name} was moved by somebody else" in text
    assert moved[0] in text
    assert shipping.digest in text
    assert (before or "not there") in text
    assert shipping.tags[name] == moved[0]
    assert ("1.0-a" in shipping.tags) is (name == "1.0-a" or shipping.tags.get("1.0-a") == shipping.digest)


def test_a_registry_that_heeds_conditions_closes_the_gap(shipping: Shipping) -> None:
    """Between the last look and the request itself only the registry can see what another does."""
    server, other = shipping.server, []
    server.conditional = True
    server.fault("tag", Fault(before=lambda: other.append(server.tag(REPOSITORY, "1.0-a"))))
    text = shipping.refused(CellFailedError)
    assert other[0] in text
    assert shipping.tags == {"1.0-a": other[0]}


def test_who_moves_a_tag_right_afterwards_is_noticed(shipping: Shipping) -> None:
    server = shipping.server
    looks = 0

    def move() -> None:
        nonlocal looks
        looks += 1
        if len(server.of_kind("tag")) == 3:
            server.tag(REPOSITORY, "1-a")

    server.fault("look", *[Fault(before=move)] * 20)
    assert "the tag 1-a was moved by somebody else" in shipping.refused(CellFailedError)
    assert looks


def test_a_tag_that_somebody_set_to_the_same_image_is_fine(shipping: Shipping) -> None:
    content = shipping.store.path(shipping.image.manifest.sha256).read_bytes()
    shipping.server.fault("read", Fault(before=lambda: shipping.server.tag(REPOSITORY, "1-a", content)))
    shipping.push()
    assert len(shipping.server.of_kind("tag")) == 2


# --------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_what_passes_is_waited_for(shipping: Shipping, status: int) -> None:
    for kind in ("blob", "begin", "commit", "look", "manifest", "read", "tag"):
        shipping.server.fault(kind, status, status)
    shipping.push()
    shipping.assert_there()
    assert set(shipping.tags.values()) == {shipping.digest}


def test_a_registry_that_stops_after_the_blobs(shipping: Shipping) -> None:
    """The tag stays as it was, and the next push sends no blob again."""
    old = shipping.server.tag(REPOSITORY, "1-a")
    shipping.server.fault("manifest", *[503] * 6)
    assert "HTTP 503" in shipping.refused()
    assert shipping.tags == {"1-a": old}
    sent = shipping.server.received
    assert sent == shipping.size
    done = shipping.push()
    assert shipping.server.received == sent
    assert done.blobs == {Way.THERE: 4}
    assert shipping.tags["1-a"] == shipping.digest


def test_a_registry_that_stops_between_the_blobs(shipping: Shipping) -> None:
    shipping.server.fault("commit", Fault(), Fault(), *[507] * 9)
    shipping.refused()
    there = set(shipping.server.blobs[REPOSITORY])
    assert 0 < len(there) < 4
    shipping.server._faults.clear()
    sent = len(shipping.server.of_kind("commit"))
    assert shipping.push().blobs == {Way.THERE: len(there), Way.SENT: 4 - len(there)}
    assert len(shipping.server.of_kind("commit")) == sent + 4 - len(there)
    shipping.assert_there()


@pytest.mark.parametrize("name", ["1.0-a", "1-a"])
def test_a_tag_that_fails_leaves_the_image_and_the_old_tag(shipping: Shipping, name: str) -> None:
    old = shipping.server.tag(REPOSITORY, "1-a")
    first = 0 if name == "1.0-a" else 2
    shipping.server.fault("tag", *[Fault()] * first, *[503] * 6)
    shipping.refused()
    shipping.assert_there()
    assert shipping.tags["1-a"] == old
    assert ("1.0-a" in shipping.tags) is bool(first)
    sent = shipping.server.received
    shipping.push()
    assert shipping.server.received == sent
    assert shipping.tags == dict.fromkeys(["1.0-a", "long-id", "1-a"], shipping.digest)


@pytest.mark.parametrize("kind", ["begin", "commit", "manifest", "tag"])
def test_an_answer_that_is_lost_is_looked_for(shipping: Shipping, kind: str) -> None:
    shipping.server.fault(kind, Fault(lost=True))
    shipping.push()
    shipping.assert_there()
    assert shipping.server.received == shipping.size
    assert len(shipping.server.of_kind("tag")) == 3
    assert set(shipping.tags.values()) == {shipping.digest}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b'{"schemaVersion": 2, "other": true}'), Fault(body=b""), 404,
        Fault(headers={"Content-Length": "99999999", "Connection": "close"}),
    ],
    ids=["other", "nothing", "gone", "cut"],
)  # fmt: skip
def test_a_manifest_that_comes_back_otherwise_gets_no_tag(shipping: Shipping, fault: Fault | int) -> None:
    old = shipping.server.tag(REPOSITORY, "1-a")
    shipping.server.fault("read", fault)
    with pytest.raises((HashMismatchError, SourceError)):
        shipping.push()
    assert shipping.tags == {"1-a": old}
    shipping.push()
    assert shipping.tags["1-a"] == shipping.digest
    assert len(shipping.server.of_kind("read")) == 2, "it is read back before any tag is set"


@pytest.mark.parametrize("kind", ["manifest", "look"])
def test_a_registry_that_names_another_digest(shipping: Shipping, kind: str) -> None:
    other = Fault(headers={"Docker-Content-Digest": f"sha256:{'0' * 64}"})
    if kind == "look":
        shipping.push(tags=Tags())
        shipping.server.fault("look", *[Fault()] * 3, other)  # the first ask for the tags
    else:
        shipping.server.fault(kind, other)
    with pytest.raises(HashMismatchError):
        shipping.push()
    assert shipping.tags == {}


def test_bytes_that_are_wrong_in_the_store(shipping: Shipping) -> None:
    found = recipe.find(shipping.store, shipping.image.layers[0].blob.sha256)
    assert found is not None
    path = shipping.store.path(found.sources[1])
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert "came out with other bytes" in shipping.refused(HashMismatchError)
    assert shipping.image.layers[0].blob.digest not in shipping.server.blobs.get(REPOSITORY, {})
    assert shipping.tags == {}


def test_killed_at_any_moment_it_goes_on(server: PushServer, store: Store) -> None:
    """A push is killed as the registry gets a request, each time another one, until it is through."""
    image = made(store, "a", "b", "c")
    shipping = Shipping(server=server, store=store, image=image)
    script = f"""
import sys
from builder import push
from builder.credentials import Configuration
from builder.export import stored_image
from builder.fetching import Silent
from builder.push import Tags
from builder.store import Store
from pathlib import Path
store = Store.open(Path({str(store.root)!r}))
with push.opened("{server.host}/{REPOSITORY}", Configuration()) as target:
    tags = Tags(fixed=("1.0-a", "long-id"), moving=("1-a",))
    push.push(target, store, stored_image(store, {image.manifest.digest!r}), tags, progress=Silent())
"""
    process: subprocess.Popen[bytes]

    def kill() -> None:
        process.kill()
        process.wait()

    for kind, untouched in (("commit", 1), ("manifest", 0), ("tag", 1)):
        server.fault(kind, *[Fault()] * untouched, Fault(before=kill))
        process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
        assert process.wait(timeout=60) == -9, kind
        if kind != "tag":
            assert shipping.tags == {}
    done = shipping.push()
    shipping.assert_there()
    assert done.blobs == {Way.THERE: 4}
    assert set(shipping.tags.values()) == {shipping.digest}
    ends = [one.query["digest"][0] for one in server.of_kind("commit") if one.status == 201]
    assert len(ends) - len(set(ends)) <= 3, "only what was on its way when it was killed is sent again"


# --------------------------------------------------------------------------- where to, and who asks


def test_a_first_answer_that_is_400_is_just_that(shipping: Shipping) -> None:
    """It may mean that TLS is wanted; this server does not speak it."""
    shipping.server.fault("look", 400)
    assert "HTTP 400" in shipping.refused()
    shipping.push()
    shipping.assert_there()


@pytest.mark.parametrize("text", ["registry.example/a:tag", f"registry.example/a@sha256:{'0' * 64}", "A/B", "", "app"])
def test_a_destination_that_is_none(text: str) -> None:
    with pytest.raises(MatrixError), push.opened(text, Configuration()):
        pass


def test_a_log_in_is_used_and_never_shown(shipping: Shipping, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {shipping.server.host: {"username": "user", "password": PASSWORD}}}))
    shipping.server.basic = ("user", PASSWORD)
    assert "does not open team/app to you" in shipping.refused()
    shipping.configuration = Configuration(auth_files=(auth,))
    shipping.server.fault("tag", 422)
    texts = [shipping.refused()]
    shipping.push()
    shipping.server.basic, shipping.server.tokens = None, TokenService(user=("user", PASSWORD))
    shipping.server.fault("tag", 403)
    texts.append(shipping.refused(tags=Tags(fixed=("other",))))
    kept = b"".join(path.read_bytes() for path in (shipping.store.root / "pushes").iterdir())
    assert kept.count(b"\n") > 4
    assert b"canary" not in kept
    for one in [*texts, caplog.text]:
        assert "canary" not in one
        assert PASSWORD not in one
    assert caplog.records
    assert shipping.server.host.encode() in kept


# --------------------------------------------------------------------------- cells


def cell_matrix(*axes: Mapping[str, Any]) -> tuple[Cell, ...]:
    content = {
        "version": 1,
        "repository": "torchyard",
        "exclude_newer": cells.EXCLUDE_NEWER,
        "bases": {
            name: {"kind": "image", "image": f"debian@sha256:{'0' * 64}", "python": python}
            for name, python in (("plain", "3.11"), ("newer", "3.12"))
        },
        "variants": {name: {"description": "a small one"} for name in ("runtime", "notebook")},
        "indexes": [
            {"name": "cpu", "url": "https://index.example/cpu", "packages": ["torch"], "when": {"cuda": "cpu"}},
            {"name": "cuda", "url": "https://index.example/c", "packages": ["torch"], "when": {"cuda": ">=12"}},
        ],
        "axes": {"torch": ["2.8.0"], "cuda": ["12.8"], "base": ["plain"], "variant": ["runtime"]},
        "include": list(axes),
    }
    return matrix.cells(json.dumps(content), cells.FACTS)


def test_moving_tags_are_the_newest_patch_releases() -> None:
    found = cell_matrix(
        {"torch": "2.7.0", "cuda": "12.8"},
        {"torch": "2.7.1", "cuda": "12.8"},
        {"torch": "2.7.1", "cuda": "12.6"},
        {"torch": "2.8.0", "cuda": "12.8", "cudnn": "9.16.0.29"},
        {"torch": "2.8.0", "cuda": "12.8", "base": "newer"},
        {"torch": "2.8.0", "cuda": "12.8", "variant": "notebook"},
        {"torch": "2.8.0", "cuda": "12.8", "companions": ["torchvision"]},
        {"torch": "2.8.0", "cuda": "cpu"},
    )
    moving = {cell.tag_names[0]: aliases.moving_tags(cell, found) for cell in found}
    assert moving == {
        "2.8.0-cuda12.8-cudnn9-runtime": ("2.8-cuda12.8-runtime",),
        "2.7.0-cuda12.8-cudnn9-runtime": (),
        "2.7.1-cuda12.8-cudnn9-runtime": ("2.7-cuda12.8-runtime",),
        "2.7.1-cuda12.6-cudnn9-runtime": ("2.7-cuda12.6-runtime",),
        "2.8.0-cuda12.8-cudnn9.16.0.29-runtime": (),
        "2.8.0-cuda12.8-cudnn9-runtime-newer": (),
        "2.8.0-cuda12.8-cudnn9-notebook": ("2.8-cuda12.8-notebook",),
        "2.8.0-cuda12.8-cudnn9-runtime-vision": (),
        "2.8.0-cpu-runtime": ("2.8-cpu-runtime",),
    }
    every = list(itertools.chain.from_iterable(moving.values()))
    assert len(set(every)) == len(every)
    assert not set(every) & {name for cell in found for name in cell.tag_names}


def passing(store: Store, digest: str) -> None:
    about = document([result("run.import")], name="cell")
    about["subject"]["digest"] = digest
    gate.keep(store, digest, loads(json.dumps(about).encode(), where="test"))


PROJECT = RealProject(Path(__file__).parents[2] / "matrix.yaml")
(CELL,) = PROJECT.select(["torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime"])
DATED = aliases.dated_tag(CELL, PROJECT.plan(CELL).epoch)


def test_only_a_proven_image_gets_the_names_of_its_cell(store: Store) -> None:
    image = made(store, "a")
    digest = image.manifest.digest
    taken: dict[str, str] = {}
    found = functools.partial(push.candidate, store, PROJECT.plan(CELL), PROJECT.family, digest, now=taken.get)
    with pytest.raises(CellFailedError, match="no passing verdict"):
        found(unproven=False)
    unproven = found(unproven=True)
    assert unproven.verdicts == ()
    assert unproven.image == gate.marked(store, image)
    assert unproven.tags == Tags(own=tuple(f"{name}-unproven" for name in CELL.tag_names), cell=CELL.id)
    passing(store, digest)
    for flag in (False, True):
        proven = found(unproven=flag)
        assert [verdict.tier for verdict in proven.verdicts] == [1]
        assert proven.image == image
        assert proven.tags == Tags(fixed=(DATED,), own=CELL.tag_names, moving=("2.8-cuda12.8-runtime",), cell=CELL.id)


def test_the_days_next_tag_is_taken_where_one_is_another_images(store: Store) -> None:
    image = made(store, "a")
    digest, other = image.manifest.digest, "sha256:" + "0" * 64
    passing(store, digest)

    def dated(taken: Mapping[str, str]) -> str:
        found = push.candidate(store, PROJECT.plan(CELL), PROJECT.family, digest, now=taken.get, unproven=False)
        return found.tags.fixed[0]

    assert dated({}) == dated({DATED: digest}) == DATED
    assert dated({DATED: other}) == dated({DATED: other, f"{DATED}.1": digest}) == f"{DATED}.1"
    assert dated({DATED: other, f"{DATED}.1": other, f"{DATED}.2": digest}) == f"{DATED}.2"
    with pytest.raises(CellFailedError, match="more than 100 images have this day's tags"):
        dated(dict.fromkeys((DATED, *(f"{DATED}.{number}" for number in range(1, 100))), other))


def test_the_policy_says_which_tiers_and_who_is_latest(store: Store) -> None:
    image = made(store, "a")
    digest = image.manifest.digest
    passing(store, digest)
    policy = replace(PROJECT.policy, tiers=(1, 2), latest=CELL.id)
    strict = replace(PROJECT.family, policy=policy)
    with pytest.raises(CellFailedError) as caught:
        push.candidate(store, PROJECT.plan(CELL), strict, digest, now=lambda _: None, unproven=False)
    assert "never validated at T2" in text_of(caught.value)
    lax = replace(PROJECT.family, policy=replace(policy, tiers=(1,)))
    found = push.candidate(store, PROJECT.plan(CELL), lax, digest, now=lambda _: None, unproven=False)
    assert found.tags.moving[-1] == "latest"


# --------------------------------------------------------------------------- the verb


@dataclass
class Project:
    """A project whose cells are built in no time: each is an image of its name."""

    root: Path
    server: PushServer
    store: Store
    digests: dict[str, str]

    def run(self, *arguments: str) -> Result:
        to = f"{self.server.host}/{REPOSITORY}"
        command = ["push", "-m", str(self.root / "matrix.yaml"), "--to", to, *arguments]
        found = CliRunner().invoke(cli, command)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert "Traceback" not in found.output
        return found


@pytest.fixture
def project(server: PushServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    store = Store.open(tmp_path / "home")
    digests: dict[str, str] = {}

    def build(self: builds.StoreSession, plan: Any) -> Any:
        if plan.cell.id not in digests:
            digests[plan.cell.id] = made(store, plan.cell.torch_local, plan.cell.id).manifest.digest
        return replace(BUILT, id=plan.cell.id, digest=digests[plan.cell.id])

    monkeypatch.setattr(builds.StoreSession, "build", build)
    # Whether images/ is fresh is for other tests to say.
    monkeypatch.setattr(projects.Project, "fresh_plans", projects.Project.plans)
    # These images hold nothing of what a bill would list.
    monkeypatch.setattr(bills, "checked", lambda *_: b'{"bomFormat": "CycloneDX"}')
    monkeypatch.setattr(bills, "check_reported", lambda *_, **__: None)
    return Project(root=root, server=server, store=store, digests=digests)


BUILT = builds.Image(
    id="", digest="", size_bytes=1, seconds=0.0, engine="oci", proven=True, proof=("bytes",), tags=(), facts={},
    in_engine=False,
)  # fmt: skip
CUDA = "2.8.0-cuda12.8-cudnn9-runtime"
OTHER = "2.9.1-cuda12.8-cudnn9-runtime"


def test_the_verb_refuses_what_is_not_proven(project: Project) -> None:
    found = project.run(CUDA)
    assert found.exit_code == 1
    assert "has no passing verdict, and is not published" in found.stderr
    assert not project.server.tags
    assert not project.server.received


def test_the_verb_publishes_what_is(project: Project) -> None:
    project.run(CUDA, OTHER)
    for digest in project.digests.values():
        passing(project.store, digest)
    found = project.run(CUDA, OTHER, "--json")
    assert found.exit_code == 0, found.stderr
    first, second = json.loads(found.stdout)
    assert first["repository"] == f"{project.server.host}/{REPOSITORY}"
    assert first["digest"] == project.digests[first["id"]]
    assert (first["proven"], first["dry_run"]) == (True, False)
    assert [one["tier"] for one in first["verdicts"]] == [1]
    assert first["blobs"] == {"there": 0, "mounted": 0, "sent": 3}
    assert first["bytes_sent"] > 800_000
    assert [one["name"] for one in first["tags"]] == [DATED, CUDA, first["id"], "2.8-cuda12.8-runtime"]
    assert [one["name"] for one in second["tags"]][1:] == [OTHER, second["id"], "2.9-cuda12.8-runtime"]
    assert project.server.tags[REPOSITORY]["2.8-cuda12.8-runtime"] == first["digest"]


def test_a_bill_that_does_not_fit_the_image_stops_the_push(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run(CUDA)
    passing(project.store, next(iter(project.digests.values())))

    def differing(*_: object) -> bytes:
        raise CellFailedError("the image holds something else")

    monkeypatch.setattr(bills, "checked", differing)
    found = project.run(CUDA)
    assert found.exit_code == 1
    assert "the image holds something else" in found.stderr
    assert not project.server.received
    assert not project.server.tags


def test_one_cell_that_is_refused_does_not_stop_the_others(project: Project) -> None:
    project.run(CUDA, OTHER)
    passing(project.store, next(digest for name, digest in project.digests.items() if "2.9.1" in name))
    found = project.run(CUDA, OTHER)
    assert found.exit_code == 1
    assert "torch2.8.0-cu128" in found.stderr
    assert OTHER in found.stdout
    assert CUDA not in project.server.tags[REPOSITORY]
    assert OTHER in project.server.tags[REPOSITORY]


def test_the_verb_publishes_with_a_mark_what_is_not(project: Project) -> None:
    found = project.run(CUDA, "--unproven", "--json")
    assert found.exit_code == 0, found.stderr
    (one,) = json.loads(found.stdout)
    assert one["proven"] is False
    assert one["digest"] not in project.digests.values()
    assert set(project.server.tags[REPOSITORY]) == {f"{CUDA}-unproven", f"{one['id']}-unproven"}
    _, content = project.server.manifests[REPOSITORY][one["digest"]]
    config = json.loads(project.server.blobs[REPOSITORY][json.loads(content)["config"]["digest"]])
    assert config["config"]["Labels"][gate.MARK] == "true"
    assert "unproven, and marked so" in project.run(CUDA, "--unproven").stdout


def test_the_verb_asks_and_sends_nothing(project: Project) -> None:
    found = project.run(CUDA, "--unproven", "--dry-run", "--json")
    assert found.exit_code == 0, found.stderr
    (one,) = json.loads(found.stdout)
    assert (one["dry_run"], one["blobs"]["sent"]) == (True, 3)
    assert {request.method for request in project.server.requests} == {"HEAD"}
    assert "nothing was sent" in project.run(CUDA, "--unproven", "--dry-run").stdout


def test_a_matrix_that_wants_signatures_gets_them(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(PROJECT.policy, signed=True)
    monkeypatch.setattr(projects.Project, "policy", property(lambda _: policy))
    found = project.run(CUDA)
    assert found.exit_code == 2
    assert "nothing is pushed without a signature" in found.stderr
    assert project.run(CUDA, "--unproven").exit_code == 0


def test_one_who_signs_has_one_key(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, public = Cosign(tmp_path / "cosign", monkeypatch).pair()
    assert project.run(CUDA, "--key", str(key), "--keyless").exit_code == 2
    lost = project.run(CUDA, "--key", "/nonexistent/key")
    assert (lost.exit_code, "there is no such key" in lost.stderr) == (2, True)
    project.run(CUDA)
    passing(project.store, next(iter(project.digests.values())))
    found = project.run(CUDA, "--key", str(key), "--json")
    assert found.exit_code == 0, found.stderr
    (one,) = json.loads(found.stdout)
    assert (one["signed"], one["attached"]) == (True, 5)
    reference = f"{project.server.host}/{REPOSITORY}:{CUDA}"
    # Its layers are not those of the cell.
    verified = CliRunner().invoke(cli, ["verify", reference, "--key", str(public)])
    assert verified.exit_code == 1
    assert "torchyard.cell is not what its inputs declare" in verified.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--key", "k", "--unsigned"], ["--identity", "me"], ["--key", "k", "--identity", "a", "--issuer", "b"]],
)
def test_who_verifies_says_whom_he_trusts(arguments: list[str]) -> None:
    found = CliRunner().invoke(cli, ["verify", "registry.example/app:1", *arguments])
    assert found.exit_code == 2
    assert "whose signature counts is not said" in found.stderr


@pytest.mark.parametrize("arguments", [[], ["--all", CUDA]])
def test_the_verb_wants_cells(project: Project, arguments: list[str]) -> None:
    assert project.run(*arguments).exit_code == 2


def test_the_verb_wants_a_repository(project: Project) -> None:
    found = project.run(CUDA, "--to", "registry.example/app:tag")
    assert found.exit_code == 2
    assert "is an image, not a repository" in found.stderr
    assert CliRunner().invoke(cli, ["push", CUDA]).exit_code == 2
