"""Sessions: only what is proven is recorded and gets tags, damage is mended once, and room is made for the next."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from builder import base
from builder.build import BYTES, CONTAINER, LOADED, EngineSession, Image, StoreSession, build_all, complete
from builder.engines import BuiltImage, RunResult, Steps
from builder.engines.oci import OciEngine, bytecode, splice
from builder.errors import (
    CellFailedError,
    DiskError,
    EngineError,
    HashMismatchError,
    SourceError,
    ToolError,
    WheelError,
)
from builder.export import stored_image
from builder.render import Plan
from builder.store import Store
from tests.support.bases import (
    Ready,
    Said,
    bootstrap_cell,
    damage,
    index_of,
    mesh,
    plan_of,
    ready,
    wheels_of,
)
from tests.support.wheels import torch_wheel

pytestmark = pytest.mark.usefixtures("compiled_sources")


def facts_of(plan: Plan) -> dict[str, Any]:
    expected = plan.expectation
    return {
        "torch": expected.torch,
        "cuda": expected.cuda,
        "cudnn_number": expected.cudnn_number,
        "nccl": expected.nccl,
        "python": expected.python,
        "architectures": sorted(expected.architectures),
        "packages": dict(expected.packages),
    }


@dataclass
class FakeHost:
    """An engine in memory; `calls` is what it was asked, in order."""

    plans: Mapping[str, Plan]
    disk: Path | None = None
    lies: Mapping[str, Any] = field(default_factory=dict)
    refuses: bool = False
    loses_layers: bool = False
    collects: str = ""
    """What becomes of the layers of images: "silently" or "loudly", an image without them is not taken."""
    sent: list[list[str]] = field(default_factory=list)
    """The digests of the layers in each archive."""
    calls: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Every name and what it points to."""
    loaded: dict[str, str] = field(default_factory=dict)
    """Digest to the id of its cell."""

    def check(self) -> None:
        self.calls.append("check")

    def has(self, digest: str) -> bool:
        return digest in self.loaded

    def holds(self, digest: str) -> bool:
        return self.has(digest) and not self.loses_layers

    def whole(self) -> tuple[str, ...]:
        return tuple(digest for digest in self.loaded if self.holds(digest))

    def unproven_name(self, cell_id: str) -> str:
        return f"unproven:{cell_id[:100]}"

    def load(self, archive: Iterator[bytes]) -> None:
        content = b"".join(archive)
        if self.refuses:
            raise EngineError("the engine broke off")
        index = json.loads(content[content.index(b'{"manifests"') :].split(b"\0", 1)[0])
        (entry,) = index["manifests"]
        digest = entry["digest"]
        legacy = json.loads(content[content.index(b'[{"Config"') :].split(b"\0", 1)[0])[0]
        (name,) = legacy["RepoTags"]
        with tarfile.open(fileobj=io.BytesIO(content)) as members:
            blobs = set(members.getnames())
        self.calls.append(f"load {name}")
        self.sent.append([path.rpartition("/")[2] for path in legacy["Layers"] if path in blobs])
        if self.collects and blobs.isdisjoint(legacy["Layers"][:1]):
            if self.collects == "loudly":
                raise EngineError("a blob is missing")
            return
        self.names[name] = digest
        self.loaded[digest] = name.partition(":")[2]

    def run(
        self, digest: str, argv: Sequence[str], *, files: Mapping[str, bytes], collect: Sequence[str], timeout_s: float
    ) -> RunResult:
        assert digest in self.loaded, "an image that is not there cannot run"
        self.calls.append("run")
        facts = {**facts_of(self.plans[self.loaded[digest]]), **self.lies}
        report = json.dumps({"schema": 1, "facts": facts, "errors": {}}).encode()
        return RunResult(exit_code=0, files=dict.fromkeys(collect, report), log="")

    def tag(self, digest: str, tags: Sequence[str]) -> None:
        assert digest in self.loaded, "an image that is not there gets no tag"
        self.calls.append(f"tag {tags[0]}")
        self.names = {name: its for name, its in self.names.items() if not name.startswith("unproven:")}
        self.names |= dict.fromkeys(tags, digest)

    def untag(self, tags: Sequence[str]) -> None:
        self.calls.append(f"untag {tags[0]}")
        for tag in tags:
            digest = self.names.pop(tag)
            self.loaded.pop(digest, None)

    def discard(self, digest: str) -> None:
        self.calls.append("discard")
        self.names = {name: its for name, its in self.names.items() if its != digest}
        self.loaded.pop(digest, None)


class FakeEngine(FakeHost):
    """An engine that also builds."""

    name = "fake"
    broken = False

    def build(self, plan: Plan, base: object, *, store: Store, steps: Steps) -> BuiltImage:
        self.calls.append("build")
        if self.broken:
            raise CellFailedError("a build step failed")
        digest = f"sha256:{plan.digest}"
        self.loaded[digest] = plan.cell.id
        return BuiltImage(digest=digest, size_bytes=1000)

    def build_cache(self) -> frozenset[str]:
        return frozenset({"before"})

    def forget_builds(self, *, since: frozenset[str]) -> None:
        assert since == {"before"}
        self.calls.append("forget")


def host_of(*plans: Plan, **more: Any) -> FakeHost:
    return FakeHost(plans={plan.cell.id[:100]: plan for plan in plans}, **more)


def session_of(
    one: Ready, tmp_path: Path, *, serves: bool = True, host: FakeHost | None = None, **more: Any
) -> tuple[StoreSession, Said]:
    said = Said()
    index = index_of(tmp_path / "links", one.wheels if serves else ())
    session = StoreSession(builder=OciEngine(), host=host, index=index, store=one.store, report=said, **more)
    return session, said


def records(store: Store) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((store.root / "proofs").rglob("*.json"))]


# --------------------------------------------------------------------------- in the store


def test_what_its_bytes_prove_is_done(one: Ready, tmp_path: Path) -> None:
    session, _ = session_of(one, tmp_path)
    image = session.build(one.plan)
    assert (image.proven, image.proof, image.in_engine, image.reused) == (True, (BYTES,), False, False)
    assert image.engine == "oci"
    assert image.tags == one.plan.cell.tags
    assert image.facts["cudnn_number"] == 91002
    (record,) = records(one.store)
    assert record == {
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "proof": [BYTES],
        "facts": image.facts,
        "recipe": OciEngine.recipe,
    }


def test_missing_wheels_are_fetched(one: Ready, tmp_path: Path) -> None:
    for each in one.wheels:
        one.store.path(each.sha256).unlink()
    session, said = session_of(one, tmp_path)
    session.build(one.plan)
    assert any(line.startswith(f"wheels · {len(one.wheels)} of {len(one.wheels)}") for line in said.lines)


def test_what_was_proven_is_not_made_again(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = session_of(one, tmp_path)[0].build(one.plan)
    monkeypatch.setattr(OciEngine, "build", lambda *_, **__: pytest.fail("made again"))
    again = session_of(one, tmp_path)[0].build(one.plan)
    assert again.reused
    assert replace(again, reused=False, seconds=first.seconds) == first


def test_rebuild_makes_it_again(one: Ready, tmp_path: Path) -> None:
    first = session_of(one, tmp_path)[0].build(one.plan)
    again = session_of(one, tmp_path, rebuild=True)[0].build(one.plan)
    assert not again.reused
    assert again.digest == first.digest


def test_what_another_recipe_made_is_made_again(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is older than this torchyard must not give other digests than one that is new."""
    monkeypatch.setattr("builder.build._RECIPES", {"oci": "0"})
    assert not session_of(one, tmp_path)[0].build(one.plan).reused
    assert session_of(one, tmp_path)[0].build(one.plan).reused
    assert complete(one.plan, one.store, builder="oci") is not None
    monkeypatch.undo()
    assert complete(one.plan, one.store, builder="oci") is None
    assert not session_of(one, tmp_path)[0].build(one.plan).reused


def test_the_recipe_of_an_image_is_that_of_its_layers() -> None:
    assert OciEngine.recipe == f"{base.RECIPE}.{splice.RECIPE}.{bytecode.RECIPE}"


@pytest.mark.parametrize("lost", ["manifest", "wheel", "record", "rubbish"])
def test_what_is_no_longer_whole_is_made_again(one: Ready, tmp_path: Path, lost: str) -> None:
    first = session_of(one, tmp_path)[0].build(one.plan)
    (record,) = (one.store.root / "proofs").rglob("*.json")
    if lost == "manifest":
        one.store.path(first.digest.removeprefix("sha256:")).unlink()
    elif lost == "wheel":
        one.path("mesh").unlink()
    elif lost == "record":
        record.unlink()
    else:
        record.write_bytes(b'{"digest": 3}')
    again = session_of(one, tmp_path)[0].build(one.plan)
    assert not again.reused
    assert again.digest == first.digest


def test_an_image_that_is_not_what_its_cell_declares_leaves_no_record(tmp_path: Path) -> None:
    cell = bootstrap_cell()
    liar = torch_wheel("2.8.0", reports="2.8.0+cu126", cuda="12.6")
    lying = ready(tmp_path / "home", cell, wheels_of(cell, liar))
    session, _ = session_of(lying, tmp_path, host=(host := host_of(lying.plan)))
    with pytest.raises(CellFailedError, match="gets no tag") as caught:
        session.build(lying.plan)
    assert "torch.version.cuda is 12.6" in str(caught.value)
    assert records(lying.store) == []
    assert host.calls == []


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damaged", [("mesh",), ("torch", "mesh", "numpy")])
def test_damage_on_this_disk_is_mended_once(one: Ready, tmp_path: Path, damaged: Sequence[str]) -> None:
    good = one.build().digest
    shutil.rmtree(one.store.root / "layers")
    for project in damaged:
        damage(one.path(project), one.path(project).stat().st_size // 2)
    session, said = session_of(one, tmp_path)
    assert session.build(one.plan).digest == good
    assert [line for line in said.lines if line.endswith("fetching again")]
    assert all(one.store.verify(each.sha256) for each in one.wheels)


def test_damage_without_an_index_is_an_error(one: Ready, tmp_path: Path) -> None:
    damage(one.path("mesh"), 2000)
    session, _ = session_of(one, tmp_path, serves=False)
    with pytest.raises(SourceError, match="mesh"):
        session.build(one.plan)
    assert records(one.store) == []
    assert not one.path("mesh").exists()


def test_an_index_that_serves_other_bytes_is_asked_once(one: Ready, tmp_path: Path) -> None:
    mesh = one.wheel("mesh")
    one.path("mesh").unlink()
    session, said = session_of(one, tmp_path)
    other = tmp_path / "links" / mesh.filename
    other.write_bytes(mesh.content[:-1] + b"x")
    with pytest.raises((HashMismatchError, SourceError), match="mesh"):
        session.build(one.plan)
    assert not [line for line in said.lines if line.endswith("fetching again")], "it is no damage of this disk"


def test_a_wheel_that_is_none_is_not_fetched_again(tmp_path: Path) -> None:
    cell = bootstrap_cell(packages=("numpy", "alpha"))
    wheels = tuple(replace(w, content=b"no zip") if w.project == "alpha" else w for w in wheels_of(cell))
    one = ready(tmp_path / "home", cell, wheels)
    session, said = session_of(one, tmp_path)
    with pytest.raises(WheelError, match="alpha"):
        session.build(one.plan)
    assert not [line for line in said.lines if line.endswith("fetching again")]


# --------------------------------------------------------------------------- with a container engine


def test_it_is_loaded_unproven_then_proven_then_tagged(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan)
    session, said = session_of(one, tmp_path, host=host)
    image = session.build(one.plan)
    assert host.calls == [f"load unproven:{one.plan.cell.id}", "run", f"tag {one.plan.cell.tags[0]}"]
    words = [line.split()[0] for line in said.lines]
    assert [word for word, _ in itertools.groupby(words)][-4:] == ["load", "sent", "unpack", "prove"]
    assert said.lines[-3].startswith("sent ")
    sent, size = said.lines[-3].removeprefix("sent ").split(" of ")
    assert sent == size, "to the last byte"
    assert (image.proof, image.in_engine, image.reused) == ((BYTES, CONTAINER), True, False)
    assert {host.names[tag] for tag in image.tags} == {image.digest}
    (record,) = records(one.store)
    assert record["proof"] == [BYTES, CONTAINER]


def test_what_a_container_does_not_prove_is_discarded_and_gets_no_tag(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan, lies={"cudnn_number": 90000})
    with pytest.raises(CellFailedError, match="gets no tag"):
        session_of(one, tmp_path, host=host)[0].build(one.plan)
    assert host.calls == [f"load unproven:{one.plan.cell.id}", "run", "discard"]
    assert host.names == {}
    (record,) = records(one.store)
    assert record["proof"] == [BYTES], "that its bytes are right stays true"
    honest = host_of(one.plan)
    again = session_of(one, tmp_path, host=honest)[0].build(one.plan)
    assert "run" in honest.calls, "a failed proof is never taken for one"
    assert again.proof == (BYTES, CONTAINER)


def test_a_refused_load_leaves_no_tag(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan, refuses=True)
    with pytest.raises(EngineError):
        session_of(one, tmp_path, host=host)[0].build(one.plan)
    assert host.names == {}


def test_an_engine_that_keeps_only_a_part_gets_no_tag(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan, loses_layers=True)
    with pytest.raises(EngineError, match="not all of its layers"):
        session_of(one, tmp_path, host=host)[0].build(one.plan)
    assert host.calls == [f"load unproven:{one.plan.cell.id}"] * 2 + ["discard"], "sent twice, then given up"
    assert host.names == {}


def test_what_the_engine_has_proven_is_only_tagged(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan)
    first = session_of(one, tmp_path, host=host)[0].build(one.plan)
    host.calls.clear()
    again = session_of(one, tmp_path, host=host)[0].build(one.plan)
    assert host.calls == [f"tag {one.plan.cell.tags[0]}"]
    assert (again.reused, again.in_engine, again.proof) == (True, True, (BYTES, CONTAINER))
    assert again.digest == first.digest


def test_what_the_engine_lost_is_loaded_and_proven_again(one: Ready, tmp_path: Path) -> None:
    session_of(one, tmp_path, host=host_of(one.plan))[0].build(one.plan)
    emptied = host_of(one.plan)
    image = session_of(one, tmp_path, host=emptied)[0].build(one.plan)
    assert emptied.calls == [f"load unproven:{one.plan.cell.id}", "run", f"tag {one.plan.cell.tags[0]}"]
    assert image.in_engine


def test_rebuild_proves_again(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan)
    session_of(one, tmp_path, host=host)[0].build(one.plan)
    host.calls.clear()
    session_of(one, tmp_path, host=host, rebuild=True)[0].build(one.plan)
    assert "run" in host.calls


# --------------------------------------------------------------------------- what the engine has already


@pytest.fixture
def variants(tmp_path: Path) -> tuple[Ready, Ready]:
    """Return two cells of one torch in one store; the second has a package more."""
    runtime, more = bootstrap_cell(packages=("numpy",)), bootstrap_cell(packages=("numpy", "mesh"))
    more = replace(more, id=f"{more.id}-more", variant_name="more")
    return ready(tmp_path / "home", runtime), ready(tmp_path / "home", more, wheels_of(more, mesh()))


def layers_of(one: Ready) -> list[str]:
    image = complete(one.plan, one.store, builder="oci")
    assert image is not None
    return [layer.blob.sha256 for layer in image.layers]


def test_only_layers_that_the_engine_lacks_are_sent(variants: tuple[Ready, Ready], tmp_path: Path) -> None:
    one, other = variants
    host = host_of(one.plan, other.plan)
    for each in variants:
        session, said = session_of(each, tmp_path, host=host)
        assert session.build(each.plan).in_engine
    first, second = host.sent
    assert first == layers_of(one)
    assert second == [digest for digest in layers_of(other) if digest not in first]
    shared = len(first) - 1
    assert any(f"; {shared} of {len(layers_of(other))} layers are there already" in line for line in said.lines)


@pytest.mark.parametrize("how", ["silently", "loudly"])
def test_an_engine_that_does_not_do_without_is_sent_everything(
    variants: tuple[Ready, Ready], tmp_path: Path, how: str
) -> None:
    """As one that has unpacked an image and dropped the archives of its layers."""
    one, other = variants
    host = host_of(one.plan, other.plan)
    session_of(one, tmp_path, host=host)[0].build(one.plan)
    host.collects = how
    image = session_of(other, tmp_path, host=host)[0].build(other.plan)
    assert image.in_engine
    assert host.sent[2] == layers_of(other)
    assert len(host.sent) == 3


def test_images_of_others_in_the_engine_do_not_matter(one: Ready, tmp_path: Path) -> None:
    host = host_of(one.plan)
    host.loaded = {f"sha256:{'0' * 64}": "somebody's", "rubbish": "?"}
    assert session_of(one, tmp_path, host=host)[0].build(one.plan).in_engine
    assert host.sent == [layers_of(one)]


def test_room_is_needed_for_what_is_not_shared(
    variants: tuple[Ready, Ready], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = variants
    host = host_of(one.plan, other.plan, disk=tmp_path)
    session, _ = session_of(one, tmp_path, host=host, keep=True)
    monkeypatch.setattr("builder.build.MARGIN_BYTES", 0)
    session.build(one.plan)
    image = stored_image(other.store, other.build().digest)
    alone = LOADED * sum(layer.blob.size for layer in image.layers)
    monkeypatch.setattr(shutil, "disk_usage", Disk(host, alone - 1, 0).usage)
    assert session.build(other.plan).in_engine
    with pytest.raises(DiskError):
        session_of(other, tmp_path, host=host_of(other.plan, disk=tmp_path))[0].build(other.plan)


# --------------------------------------------------------------------------- room

GB = 10**9


class Disk:
    """A disk with so much free, of which every image that the engine holds takes its part."""

    def __init__(self, host: FakeHost, free: float, each: float) -> None:
        self.host, self.free, self.each = host, free, each

    def usage(self, _: object) -> Any:
        return shutil._ntuple_diskusage(100 * GB, 0, int(self.free - self.each * len(self.host.loaded)))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Ready, Plan]:
    """Return two cells in one store."""
    first = ready(tmp_path / "home")
    cell = bootstrap_cell(torch="2.7.1", cuda="12.6")
    wheels = wheels_of(cell)
    for each in wheels:
        first.store.put(each.content)
    return first, plan_of(cell, wheels)


def test_a_proven_image_makes_room_for_the_next(
    two: tuple[Ready, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    host = host_of(one.plan, other, disk=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Disk(host, 2 * GB, 1.5 * GB).usage)
    session, said = session_of(one, tmp_path, host=host)
    outcomes = build_all([one.plan, other], session, said)
    assert [outcome.removed for outcome in outcomes] == [True, False]
    assert all(outcome.image is not None for outcome in outcomes)
    assert set(host.names) == set(other.cell.tags)
    assert any("removed from the engine again to make room" in line for line in said.lines)
    assert len(records(one.store)) == 2, "what was proven stays proven, and in the store"


def test_keep_refuses_instead(two: tuple[Ready, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    host = host_of(one.plan, other, disk=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Disk(host, 2 * GB, 1.5 * GB).usage)
    session, said = session_of(one, tmp_path, host=host, keep=True)
    first, second = build_all([one.plan, other], session, said)
    assert first.image is not None
    assert isinstance(second.error, DiskError)
    assert "are free" in second.error.problems[0].why
    assert not first.removed
    assert set(one.plan.cell.tags) <= set(host.names)


def test_an_engine_elsewhere_is_not_measured(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(one.plan, disk=None)
    monkeypatch.setattr(shutil, "disk_usage", Disk(host, 0, 0).usage)
    assert session_of(one, tmp_path, host=host)[0].build(one.plan).in_engine


def test_no_room_to_fetch_is_said_before(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one.path("mesh").unlink()
    monkeypatch.setattr(shutil, "disk_usage", Disk(host_of(), 1000, 0).usage)
    with pytest.raises(DiskError, match="not enough disk to fetch 1 wheels"):
        session_of(one, tmp_path)[0].build(one.plan)
    assert not one.path("mesh").exists()


# --------------------------------------------------------------------------- several cells


def test_a_failure_stops_no_other(two: tuple[Ready, Plan], tmp_path: Path) -> None:
    one, other = two
    one.path("torch").unlink()
    session, said = session_of(one, tmp_path, serves=False)
    first, second = build_all([one.plan, other], session, said)
    assert isinstance(first.error, SourceError)
    assert first.image is None
    assert second.image is not None
    assert any(line.startswith(f"{one.plan.cell.id}: failed: ") for line in said.lines)


@pytest.mark.parametrize(("number", "kind"), [(28, DiskError), (122, DiskError), (13, ToolError), (5, ToolError)])
def test_what_the_system_refuses_is_the_cell_s_failure(
    two: tuple[Ready, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    one, other = two
    real = OciEngine.build

    def refused(self: OciEngine, plan: Plan, *arguments: Any, **more: Any) -> BuiltImage:
        if plan is one.plan:
            raise OSError(number, os.strerror(number), "/somewhere")
        return real(self, plan, *arguments, **more)

    monkeypatch.setattr(OciEngine, "build", refused)
    session, said = session_of(one, tmp_path)
    first, second = build_all([one.plan, other], session, said)
    assert type(first.error) is kind
    assert first.error.problems[0].where == "/somewhere"
    assert first.error.problems[0].tries
    assert second.image is not None


def test_an_interrupt_ends_all(two: tuple[Ready, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two

    def interrupted(*_: object, **__: object) -> BuiltImage:
        raise KeyboardInterrupt

    monkeypatch.setattr(OciEngine, "build", interrupted)
    session, said = session_of(one, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build_all([one.plan, other], session, said)
    assert records(one.store) == []


# --------------------------------------------------------------------------- engines that build themselves


def engine_session(one: Ready, tmp_path: Path, engine: FakeEngine, **more: Any) -> EngineSession:
    index = index_of(tmp_path / "links", one.wheels)
    return EngineSession(engine=engine, index=index, store=one.store, report=Said(), **more)


def engine_of(plan: Plan, **more: Any) -> FakeEngine:
    return FakeEngine(plans={plan.cell.id: plan}, **more)


def test_an_engine_builds_is_proven_and_tagged(one: Ready, tmp_path: Path) -> None:
    engine = engine_of(one.plan)
    image: Image = engine_session(one, tmp_path, engine).build(one.plan)
    assert engine.calls == ["build", "forget", "run", f"tag {one.plan.cell.tags[0]}"]
    assert (image.engine, image.proof, image.in_engine) == ("fake", (CONTAINER,), True)
    engine.calls.clear()
    again = engine_session(one, tmp_path, engine).build(one.plan)
    assert again.reused
    assert engine.calls == [f"tag {one.plan.cell.tags[0]}"]
    engine.calls.clear()
    engine_session(one, tmp_path, engine, rebuild=True).build(one.plan)
    assert engine.calls[0] == "build"


def test_an_engine_s_image_that_is_not_proven(one: Ready, tmp_path: Path) -> None:
    engine = engine_of(one.plan, lies={"torch": "2.8.0+cu126"})
    with pytest.raises(CellFailedError):
        engine_session(one, tmp_path, engine).build(one.plan)
    assert engine.calls == ["build", "forget", "run", "discard"]
    assert engine.names == {}
    assert records(one.store) == []


def test_a_failed_build_forgets_what_it_kept(one: Ready, tmp_path: Path) -> None:
    engine = engine_of(one.plan)
    engine.broken = True
    with pytest.raises(CellFailedError, match="a build step failed"):
        engine_session(one, tmp_path, engine).build(one.plan)
    assert engine.calls == ["build", "forget"]


def test_the_proof_of_one_engine_is_not_another_s(one: Ready, tmp_path: Path) -> None:
    session_of(one, tmp_path)[0].build(one.plan)
    engine = engine_of(one.plan)
    assert not engine_session(one, tmp_path, engine).build(one.plan).reused


def test_a_base_is_made_once_for_all_cells(
    two: tuple[Ready, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    monkeypatch.setattr(base, "_make", lambda *_, **__: pytest.fail("made again"))
    session, said = session_of(one, tmp_path)
    assert all(outcome.image for outcome in build_all([one.plan, other], session, said))
