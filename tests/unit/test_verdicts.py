"""Verdicts of other machines: taken only if they are about what is here, and nothing less was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import gate, verdicts
from builder.cli import cli
from builder.errors import CellFailedError, MatrixError
from builder.project import Project
from builder.store import Store
from tests.support.registry_server import text_of
from tests.support.reports import document, result
from validate import bundle
from validate.profile import PROFILES

ROOT = Path(__file__).parents[2]
PROJECT = Project(ROOT / "matrix.yaml")
CELL = PROJECT.select(["2.8.0-cuda12.8-cudnn9-runtime"])[0]
PLAN = PROJECT.plan(CELL)
PLANS = (PROJECT.plan(PROJECT.cells[0]), PLAN)
DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
PASSING = (result("run.import"), result("dev.available", tier=2))
FAILING = (result("run.import"), result("dev.available", tier=2, status="fail"))


@pytest.fixture(autouse=True)
def _one_image(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """Let one cell be complete in the store, as the image DIGEST."""

    def complete(plan: Any, where: Store, *, builder: str) -> Any:
        assert (where.root, builder) == (store.root, "oci")
        return SimpleNamespace(manifest=SimpleNamespace(digest=DIGEST)) if plan.cell.id == CELL.id else None

    monkeypatch.setattr("builder.build.complete", complete)
    monkeypatch.setattr(Project, "fresh_plans", lambda *_: PLANS)  # all of them take seconds
    monkeypatch.setenv("TORCHYARD_HOME", str(store.root))


def made(
    results: Sequence[Mapping[str, Any]] = PASSING,
    *,
    profile: str = "gpu",
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    **more: Any,
) -> dict[str, Any]:
    """Return a report as `torchyard validate` on another machine would write it."""
    found = document(results, **more)
    found["subject"] |= {"digest": DIGEST, "declared": json.loads(PLAN.files["image.json"])}
    found["suite"]["digest"] = f"sha256:{bundle.digest()}"
    found["profile"] |= {"name": profile, "options": {**PROFILES[profile].numbers, "gpus": "1"}}
    change(found)
    return found


def write(directory: Path, name: str, report: Mapping[str, Any]) -> Path:
    path = directory / name / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report), "utf-8")
    return path


def keep(*paths: Path) -> Result:
    command = ["report", "keep", "-m", str(ROOT / "matrix.yaml"), *map(str, paths)]
    return CliRunner().invoke(cli, command)


def test_a_verdict_of_another_machine_opens_the_gate(store: Store, tmp_path: Path) -> None:
    write(tmp_path, "verdict-gpu-h100/cell", made())
    ran = keep(tmp_path / "verdict-gpu-h100")
    assert ran.exit_code == 0, ran.output
    assert f"{CELL.id}: passing verdict on T1, T2 kept" in ran.stderr
    assert [one.tier for one in gate.require(store, DIGEST, name="cell", tiers=(1, 2))] == [1, 2]


def test_what_is_kept_is_told_to_machines(tmp_path: Path) -> None:
    path = write(tmp_path, "cell", made())
    assert json.loads(keep(path, Path("--json")).stdout) == [
        {"id": CELL.id, "digest": DIGEST, "path": str(path), "tiers": [1, 2], "passed": True}
    ]


@pytest.mark.parametrize("names", [("a-passed", "b-failed"), ("b-passed", "a-failed")])
def test_of_several_machines_one_that_failed_counts(store: Store, tmp_path: Path, names: tuple[str, str]) -> None:
    passed, failed = names
    later = another("volatile", started="2026-11-22T00:00:00+00:00")
    write(tmp_path / "verdicts", passed, made(change=later))
    write(tmp_path / "verdicts", failed, made(FAILING))
    assert keep(tmp_path / "verdicts").exit_code == 0
    with pytest.raises(CellFailedError):
        gate.require(store, DIGEST, name="cell", tiers=(2,))
    write(tmp_path, "again", made())
    keep(tmp_path / "again")
    gate.require(store, DIGEST, name="cell", tiers=(1, 2))


def another(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found[section].update(values)


@pytest.mark.parametrize(
    ("change", "what", "why"),
    [
        (another("subject", digest=OTHER), "an image that is not here", OTHER),
        (another("subject", digest=None), "an image that is not here", "one without a digest"),
        (another("subject", declared=None), "held the image to another declaration", CELL.id),
        (another("subject", declared={"torch": "2.8.0"}), "held the image to another declaration", CELL.id),
        (another("suite", digest=OTHER), "made by another suite", OTHER),
        (another("profile", name="lax"), "has no profile 'lax'", "gpu, multi-gpu"),
        (
            another("profile", options={**PROFILES["gpu"].numbers, "gpus": "1", "mbu_floor": 0.1}),
            "numbers of the profile were changed",
            "mbu_floor=0.1",
        ),
        (another("profile", options={}), "numbers of the profile were changed", "compile=None"),
    ],
)
def test_what_proves_less_is_refused(
    store: Store, tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str, why: str
) -> None:
    good, bad = write(tmp_path, "good", made()), write(tmp_path, "bad", made(change=change))
    ran = keep(good, bad)
    assert ran.exit_code == MatrixError.exit_code
    assert what in ran.stderr
    assert why in ran.stderr
    assert f"where {bad}" in ran.stderr
    assert not (store.root / "proofs").exists(), "all of them are kept, or none"


def test_everything_that_is_wrong_is_said_at_once(store: Store, tmp_path: Path) -> None:
    paths = [
        write(tmp_path, "other", made(change=another("subject", digest=OTHER))),
        write(tmp_path, "lax", made(change=another("suite", digest=OTHER))),
        tmp_path / "missing.json",
    ]
    (tmp_path / "text.json").write_text("{", "utf-8")
    paths.append(tmp_path / "text.json")
    with pytest.raises(MatrixError) as caught:
        verdicts.read(paths, [PLAN], store)
    assert [one.where.split(":")[0] for one in caught.value.problems] == list(map(str, paths))
    with pytest.raises(MatrixError) as caught:
        verdicts.read(paths[:1] * 30, [PLAN], store)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].what == "and 10 more"


def test_a_directory_without_reports(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = keep(tmp_path / "empty", tmp_path)
    assert ran.exit_code == MatrixError.exit_code
    assert ran.stderr.count("there is no report.json") == 2


def test_a_run_of_some_checks_proves_nothing_elsewhere_either(store: Store, tmp_path: Path) -> None:
    write(tmp_path, "cell", made(tiers={}))
    ran = keep(tmp_path / "cell")
    assert ran.exit_code == 0
    assert "it tried no tier" in ran.stderr
    with pytest.raises(CellFailedError) as caught:
        gate.require(store, DIGEST, name="cell")
    assert "never validated" in text_of(caught.value)
