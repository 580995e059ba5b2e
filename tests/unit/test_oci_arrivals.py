"""Layers of several images at once: made while wheels are fetched, once for all, and left where they fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.build import StoreSession, build_all
from builder.engines.oci import OciEngine, arrivals, layers
from builder.engines.oci import splice as splicing
from builder.engines.oci.arrivals import Arrivals
from builder.engines.oci.stack import Group, Section
from builder.errors import HashMismatchError, SourceError, WheelError
from builder.index import Configuration, Index
from builder.store import Store
from tests.support.bases import (
    Ready,
    Said,
    bootstrap_cell,
    damage,
    index_of,
    mesh,
    ready,
    wheels_of,
)
from tests.support.index_server import IndexServer
from tests.support.wheels import FakeWheel

DEADLINE_S = 30.0


pytestmark = pytest.mark.usefixtures("compiled_sources")


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups that were worked through, in the order in which that began."""
    began: list[str] = []
    real = splicing.splice

    def splice(wheels: Sequence[Any], **options: Any) -> Any:
        began.append(wheels[0][0].name)
        return real(wheels, **options)

    monkeypatch.setattr(layers, "splice", splice)
    return began


def session_of(store: Store, index: Index, *, workers: int = 2) -> tuple[StoreSession, Said]:
    said = Said()
    builder = OciEngine(workers=workers)
    return StoreSession(builder=builder, host=None, index=index, store=store, report=said), said


def forget(one: Ready, *wheels: FakeWheel) -> None:
    for each in wheels or one.wheels:
        one.store.path(each.sha256).unlink()


def no_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith(("layers", "fetch"))]


# --------------------------------------------------------------------------- while wheels are fetched


def test_layers_are_made_while_wheels_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_before = ready(tmp_path / "other").build().digest
    one = ready(tmp_path / "home")
    forget(one)
    there, seen = threading.Event(), []
    fetch, splice = Index.fetch, layers.spliced

    def late(self: Index, wanted: Any, *rest: Any) -> Path:
        # Nothing but a layer of other wheels lets this one be fetched.
        if wanted.project == "torch":
            assert there.wait(DEADLINE_S), "no layer is made while wheels are fetched"
        path = fetch(self, wanted, *rest)
        seen.append(f"fetched {wanted.project}")
        return path

    def spliced(group: Group, *rest: Any, **options: Any) -> Any:
        made = splice(group, *rest, **options)
        seen.extend(f"spliced {wheel.name}" for wheel in group.wheels)
        there.set()
        return made

    monkeypatch.setattr(Index, "fetch", late)
    monkeypatch.setattr(arrivals, "spliced", spliced)
    with IndexServer() as server:
        url = server.add("default", *one.wheels)
        session, said = session_of(one.store, Index(configuration=Configuration(default_index=url)))
        image = session.build(one.plan)
    assert image.digest == made_before
    assert seen.index("spliced mesh") < seen.index("fetched torch") < seen.index("spliced torch")
    for each in one.wheels:
        assert seen.index(f"fetched {each.project}") < seen.index(f"spliced {each.project}")
    assert sum(line.startswith("wheels ·") for line in said.lines) == 1
    assert no_threads()


def test_a_fetch_that_fails_ends_the_layers_too(one: Ready, tmp_path: Path) -> None:
    torch = one.wheel("torch")
    forget(one, torch)
    session, _ = session_of(one.store, index_of(tmp_path / "links"))
    with pytest.raises(SourceError, match="torch"):
        session.build(one.plan)
    assert no_threads()
    index_of(tmp_path / "links", [torch])
    assert session.build(one.plan).proven


def test_who_stops_the_fetch_stops_the_layers(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    forget(one, one.wheel("torch"))
    monkeypatch.setattr(Index, "fetch_all", stopped)
    session, _ = session_of(one.store, index_of(tmp_path / "links"))
    with pytest.raises(KeyboardInterrupt):
        session.build(one.plan)
    assert no_threads()


def test_a_wheel_that_another_run_fetched_is_not_waited_for(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = one.wheel("torch")
    forget(one, torch)
    with Arrivals([(one.plan, one.base)], store=one.store, steps=(said := Said()), workers=1):
        one.store.put(torch.content)  # and nobody says so
    assert sum("torch 2.8.0" in line for line in said.lines) == 1
    monkeypatch.setattr(layers, "splice", lambda *_, **__: pytest.fail("not all layers were made"))
    assert one.build().observed


def test_a_fetched_wheel_that_is_none_is_said_once(tmp_path: Path, spliced: list[str]) -> None:
    cell = bootstrap_cell(packages=("numpy", "alpha"))
    wheels = tuple(replace(w, content=b"no zip") if w.project == "alpha" else w for w in wheels_of(cell))
    one = ready(tmp_path / "home", cell, wheels)
    forget(one)
    session, said = session_of(one.store, index_of(tmp_path / "links", wheels))
    with pytest.raises(WheelError, match="alpha"):
        session.build(one.plan)
    assert not [line for line in said.lines if line.endswith("fetching again")]
    assert no_threads()


# --------------------------------------------------------------------------- for several cells


def two(tmp_path: Path) -> tuple[Ready, Ready]:
    """Return two cells in one store, which differ in a package of the variant's."""
    cell = bootstrap_cell(packages=("numpy", "mesh"))
    other = bootstrap_cell(packages=("numpy", "alpha"))
    wheels = wheels_of(cell, mesh())
    return ready(tmp_path / "home", cell, wheels), ready(tmp_path / "home", other)


def test_what_cells_share_is_made_once(
    tmp_path: Path, spliced: list[str], compiled_sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two(tmp_path)
    session, _ = session_of(first.store, index_of(tmp_path / "links"))
    session.prepare([first.plan, second.plan])
    assert len(spliced) == len(set(spliced))
    assert {"torch", "mesh", "alpha"} <= {*spliced}
    assert len(compiled_sources) == len(set(compiled_sources))
    monkeypatch.setattr(layers, "splice", lambda *_, **__: pytest.fail("made again"))
    outcomes = build_all([first.plan, second.plan], session, Said())
    assert [outcome.image is not None and outcome.image.proven for outcome in outcomes] == [True, True]


def test_a_source_in_several_layers_is_compiled_once(tmp_path: Path, compiled_sources: list[str]) -> None:
    cells = [bootstrap_cell(packages=("numpy",)), bootstrap_cell(packages=("numpy",), cudnn="9.16.0.29")]
    wheels = [wheels_of(cells[0]), tuple(it for it in wheels_of(cells[1]) if "cudnn_cu12-9.10" not in it.filename)]
    both = list(zip(cells, wheels, strict=True))
    alone = [ready(tmp_path / cell.id, cell, mine).build().digest for cell, mine in both]
    first, second = (ready(tmp_path / "home", cell, mine) for cell, mine in both)
    compiled_sources.clear()
    with Arrivals([(it.plan, it.base) for it in (first, second)], store=first.store, steps=Said(), workers=2):
        pass
    assert compiled_sources
    assert len(compiled_sources) == len(set(compiled_sources))
    assert [first.build().digest, second.build().digest] == alone


def test_a_cell_that_fails_leaves_the_others_be(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    damage(second.path("alpha"), 50)
    session, said = session_of(first.store, index_of(tmp_path / "links"))
    good, bad = build_all([first.plan, second.plan], session, said)
    assert good.image is not None
    assert isinstance(bad.error, SourceError | HashMismatchError)
    assert no_threads()


def test_what_is_built_is_not_prepared(one: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = session_of(one.store, index_of(tmp_path / "links"))
    session.build(one.plan)
    monkeypatch.setattr(OciEngine, "arrivals", lambda *_, **__: pytest.fail("prepared"))
    session.prepare([one.plan])


def test_nothing_more_is_made_for_a_cell_whose_layer_failed(one: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fails(group: Group, *_: object, **__: object) -> None:
        tried.append(group.title)
        raise WheelError(f"{group.title}: no wheel")

    monkeypatch.setattr(arrivals, "spliced", fails)
    with Arrivals([(one.plan, one.base)], store=one.store, steps=Said(), workers=1):
        pass
    assert len(tried) == 1
    assert no_threads()


def test_the_largest_comes_first_and_each_once(one: Ready) -> None:
    a, b, c = sorted(one.plan.lock.wheels, key=lambda wheel: wheel.size)[:3]
    jobs = [
        arrivals._Job(group=Group(section=Section.VARIANT, wheels=(wheel,)), title=wheel.name, cells=frozenset({cell}))
        for wheel, cell in ((a, "x"), (c, "x"), (b, "y"), (c, "y"))
    ]
    merged = arrivals._merged(jobs)
    assert [job.title for job in merged] == [c.name, b.name, a.name]
    assert [job.cells for job in merged] == [{"x", "y"}, {"y"}, {"x"}]
