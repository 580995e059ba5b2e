"""The gate: only a passing verdict for an image's very digest opens it, and what goes past it is marked."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder import cli as commands
from builder import gate, layout
from builder.errors import CellFailedError, MatrixError
from builder.layout import Image
from builder.report import Report, loads
from builder.store import Store
from tests.support.registry_server import text_of
from tests.support.reports import document, result

DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
PASSING = (result("run.import"), result("lib.cudnn", status="warn"))
WITH_GPU = (*PASSING, result("dev.available", tier=2))


def report(
    results: Sequence[Mapping[str, Any]],
    *,
    digest: str | None = DIGEST,
    tiers: Mapping[str, bool] | None = None,
    exit_code: int | None = None,
) -> Report:
    found = document(results, tiers=tiers, exit_code=exit_code)
    found["subject"]["digest"] = digest
    return loads(json.dumps(found).encode(), where="test")


def refusal(store: Store, digest: str = DIGEST, **more: Any) -> str:
    with pytest.raises(CellFailedError) as caught:
        gate.require(store, digest, name="cell", **more)
    return text_of(caught.value)


def test_a_passing_verdict_opens_it(store: Store) -> None:
    assert gate.keep(store, DIGEST, report(PASSING)) == (1,)
    (found,) = gate.require(store, DIGEST, name="cell")
    about = found.as_json()
    assert (about["tier"], about["passed"], about["profile"]) == (1, True, "gpu")
    assert about["suite"]["digest"].startswith("sha256:")
    assert about["at"] == report(PASSING).volatile.started


def test_nothing_else_does(store: Store) -> None:
    assert "never validated at T1" in refusal(store)
    gate.keep(store, OTHER, report(PASSING, digest=OTHER))
    text = refusal(store)
    assert "never validated at T1" in text
    assert DIGEST in text
    assert "torchyard validate cell" in text
    assert "--unproven" in text


def test_a_report_of_another_image_is_not_kept(store: Store) -> None:
    for digest in (OTHER, None):
        with pytest.raises(MatrixError, match="another image"):
            gate.keep(store, DIGEST, report(PASSING, digest=digest))
    refusal(store)


def test_a_verdict_under_another_digest_is_none(store: Store) -> None:
    gate.keep(store, OTHER, report(PASSING, digest=OTHER))
    verdicts = store.root / "proofs" / "verdicts"
    (verdicts / OTHER[7:]).rename(verdicts / DIGEST[7:])
    refusal(store)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[", b"\xff", None])
def test_a_damaged_verdict_is_none(store: Store, damage: bytes | None) -> None:
    gate.keep(store, DIGEST, report(PASSING))
    (path,) = (store.root / "proofs" / "verdicts").rglob("*.json")
    content = path.read_bytes()
    if damage is None:
        damage = content.replace(b'"status": "warn"', b'"status": "fail"')
        assert damage != content
    path.write_bytes(damage)
    refusal(store)


def test_a_later_failure_counts(store: Store) -> None:
    gate.keep(store, DIGEST, report(PASSING))
    gate.keep(store, DIGEST, report((*PASSING, result("num.gemm", status="fail"))))
    assert "failed" in refusal(store)
    gate.keep(store, DIGEST, report(PASSING))
    gate.require(store, DIGEST, name="cell")


def test_a_failure_of_another_tier_counts(store: Store) -> None:
    results = (*PASSING, result("dev.available", tier=2, required=False, status="fail"))
    gate.keep(store, DIGEST, report(results, tiers={"1": True, "2": False}, exit_code=1))
    assert "failed" in refusal(store)


def test_a_run_of_some_checks_proves_nothing(store: Store) -> None:
    assert gate.keep(store, DIGEST, report(PASSING, tiers={})) == ()
    refusal(store)
    gate.keep(store, DIGEST, report(PASSING))
    gate.keep(store, DIGEST, report((result("run.import"),), tiers={}))
    gate.require(store, DIGEST, name="cell")


def test_what_was_not_tried_is_not_replaced(store: Store) -> None:
    assert gate.keep(store, DIGEST, report(WITH_GPU)) == (1, 2)
    without = (*PASSING, result("dev.available", tier=2, required=False, status="skip", skip="no_gpu"))
    assert gate.keep(store, DIGEST, report(without)) == (1,)
    assert [one.tier for one in gate.require(store, DIGEST, name="cell", tiers=(1, 2))] == [1, 2]


def test_a_gpu_may_be_asked_for(store: Store) -> None:
    gate.keep(store, DIGEST, report(PASSING))
    text = refusal(store, tiers=(1, 2))
    assert "never validated at T2" in text
    assert "torchyard validate cell --gpus all" in text


def test_a_skipped_check_that_is_required_closes_it(store: Store) -> None:
    results = (*PASSING, result("lib.nccl", status="skip", skip="budget"))
    gate.keep(store, DIGEST, report(results, tiers={"1": False}))
    assert "T1 is not proven" in refusal(store)


def test_a_waiver_counts_until_it_is_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    until = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=2)
    results = (*PASSING, result("lib.nccl", status="waived", waiver=("known", until.isoformat())))
    gate.keep(store, DIGEST, report(results))
    (found,) = gate.require(store, DIGEST, name="cell")
    assert found.as_json()["waived"] == ["lib.nccl"]

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return super().now(tz) + dt.timedelta(days=3)

    monkeypatch.setattr("builder.gate.dt.datetime", Later)
    assert f"lib.nccl was waived until {until}" in refusal(store)


# --------------------------------------------------------------------------- who keeps it


def validated(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, digest: str | None = DIGEST
) -> Result:
    """Run the verb on a cell whose image has `digest`, and on an image of somebody else if that is None."""
    found = document(PASSING, tiers={} if "--only" in arguments else {"1": True})
    found["subject"]["digest"] = DIGEST
    target = commands._Target("cell", lambda _: (digest, found))
    monkeypatch.setattr(commands, "_targets", lambda *_, **__: iter([target]))
    monkeypatch.setenv("TORCHYARD_HOME", str(store.root))
    command = ["validate", "cell", "--report-dir", str(tmp_path / "reports"), *arguments]
    ran = CliRunner().invoke(commands.cli, command)
    assert ran.exit_code == 0, ran.output
    return ran


def test_the_verb_keeps_the_verdict_of_a_cell(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = validated(store, monkeypatch, tmp_path)
    assert f"passing verdict on T1 kept for {DIGEST}" in ran.stderr
    gate.require(store, DIGEST, name="cell")


@pytest.mark.parametrize(
    ("arguments", "digest"),
    [([], None), (["--only", "run.*"], DIGEST), (["--option", "compile=false"], DIGEST)],
    ids=["no cell", "some checks", "other numbers"],
)
def test_the_verb_keeps_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], digest: str | None
) -> None:
    validated(store, monkeypatch, tmp_path, *arguments, digest=digest)
    assert not (store.root / "proofs").exists()
    refusal(store)


# --------------------------------------------------------------------------- the mark


def image(store: Store, *, annotations: Mapping[str, str] | None = None) -> Image:
    layer = layout.Layer(
        blob=layout.Descriptor(media_type=layout.MEDIA_LAYER_GZIP, digest=OTHER, size=7), diff_id=DIGEST
    )
    return layout.assemble(
        store,
        architecture="amd64",
        config={"Env": ["A=1"], "Labels": {"torchyard.cell": "x"}},
        epoch=0,
        layers=[layer],
        annotations=annotations,
    )


def read(store: Store, digest: str) -> Any:
    return json.loads(store.path(digest[7:]).read_bytes())


def test_the_mark_can_be_seen_everywhere_and_changes_nothing_else(store: Store) -> None:
    made = image(store, annotations={"other": "stays"})
    marked = gate.marked(store, made)
    assert marked.layers == made.layers
    assert len({made.manifest.digest, marked.manifest.digest, made.config.digest, marked.config.digest}) == 4
    config, before = read(store, marked.config.digest), read(store, made.config.digest)
    assert config["config"]["Labels"] == {"torchyard.cell": "x", gate.MARK: "true"}
    assert config["rootfs"] == before["rootfs"]
    assert {**config["config"], "Labels": {}} == {**before["config"], "Labels": {}}
    manifest = read(store, marked.manifest.digest)
    assert manifest["annotations"] == {"other": "stays", gate.MARK: "true"}
    assert manifest["config"] == marked.config.as_json()
    assert manifest["layers"] == read(store, made.manifest.digest)["layers"]
    assert gate.marked(store, made) == marked, "the same image gives the same one"


@pytest.mark.parametrize("run", [{}, {"Labels": None}, {"Labels": {}}])
def test_an_image_without_labels_is_marked(store: Store, run: Mapping[str, Any]) -> None:
    made = layout.assemble(store, architecture="amd64", config=run, epoch=0, layers=[])
    found = read(store, gate.marked(store, made).config.digest)
    assert found["config"]["Labels"] == {gate.MARK: "true"}
