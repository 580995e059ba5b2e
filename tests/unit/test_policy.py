"""How images are published: what matrix.yaml says of it, and that nothing of it is in what is published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder import matrix as matrices
from builder import render as renders
from builder.baselock import BaseLock
from builder.errors import MatrixError, Problem
from builder.facts import Facts
from builder.lock import request_of
from builder.matrix import Family, Policy
from builder.project import Project
from builder.reading import judge
from builder.schema import Runner

ROOT = Path(__file__).parents[2]
FACTS = Facts.load()
TEXT = (ROOT / "matrix.yaml").read_text("utf-8")
SHIPPED: Mapping[str, Any] = yaml.safe_load(TEXT)
H100: Mapping[str, Any] = {"name": "h100", "labels": ["self-hosted", "h100"], "gpu": "H100", "driver": "580.65.06"}
RUNTIME = "2.8.0-cuda12.8-cudnn9-runtime"


def document(publish: object, **more: object) -> dict[str, Any]:
    return {**SHIPPED, "publish": publish, **more}


def family(publish: object, **more: object) -> Family:
    return matrices.family(json.dumps(document(publish, **more)), FACTS)  # JSON is YAML


def problems(publish: object, **more: object) -> tuple[Problem, ...]:
    with pytest.raises(MatrixError) as caught:
        family(publish, **more)
    return caught.value.problems


def only(publish: object, **more: object) -> Problem:
    (problem,) = problems(publish, **more)
    return problem


def test_what_it_says() -> None:
    found = family(
        {"tiers": [2, 1], "latest": RUNTIME, "signed": True, "runners": [H100, {**H100, "name": "many", "gpus": 8}]}
    )
    (cell,) = (cell for cell in found.cells if cell.tag_names[0] == RUNTIME)
    assert found.policy == Policy(
        tiers=(1, 2),
        latest=cell.id,
        signed=True,
        runners=(
            Runner(name="h100", labels=("self-hosted", "h100"), gpu="H100", driver="580.65.06"),
            Runner(name="many", labels=("self-hosted", "h100"), gpu="H100", driver="580.65.06", gpus=8),
        ),
    )


def test_without_it_only_what_needs_no_gpu_is_asked_for() -> None:
    text = json.dumps({key: value for key, value in SHIPPED.items() if key != "publish"})
    assert matrices.family(text, FACTS).policy == Policy(tiers=(1,), latest=None, signed=False, runners=())
    assert family({}).policy == Policy()


def test_the_shipped_one() -> None:
    project = Project(ROOT / "matrix.yaml")
    assert project.policy.tiers == (1,)
    (latest,) = (cell for cell in project.cells if cell.id == project.policy.latest)
    assert latest.torch == max(cell.torch for cell in project.cells)
    assert (latest.variant_name, latest.base_is_default) == ("runtime", True)


def test_nothing_about_a_gpu_can_be_proven_of_a_cell_without_cuda() -> None:
    found = family({"tiers": [1, 2, 3]})
    assert {found.policy.tiers_of(cell) for cell in found.cells if cell.cuda == "cpu"} == {(1,)}
    assert {found.policy.tiers_of(cell) for cell in found.cells if cell.cuda != "cpu"} == {(1, 2, 3)}


def test_a_cell_may_be_named_by_its_id() -> None:
    cell = next(cell for cell in family({}).cells if cell.tag_names[0] == RUNTIME)
    assert family({"latest": cell.id}).policy.latest == cell.id


@pytest.mark.parametrize(
    ("publish", "where", "what", "why"),
    [
        ({"tier": [1]}, "publish.tier", "unknown key 'tier'. Did you mean 'tiers'?", "tiers, latest, signed, runners"),
        ({"tiers": [2]}, "publish.tiers", "a list is not allowed here", "1 is always among them"),
        ({"tiers": [1, 1]}, "publish.tiers", "a list is not allowed here", "stands here twice"),
        ({"tiers": []}, "publish.tiers", "is empty", ""),
        ({"tiers": 1}, "publish.tiers", "the number 1, where a list is needed", ""),
        ({"tiers": [1, 4]}, "publish.tiers[1]", "the number 4 is not allowed", "this torchyard knows 1, 2 or 3"),
        ({"tiers": [True]}, "publish.tiers[0]", "the truth value true", "it is a number"),
        ({"signed": "yes"}, "publish.signed", "'yes' is not allowed", "true or false"),
        ({"latest": "$(id)"}, "publish.latest", "'$(id)' is not allowed here", "a dollar sign"),
        (
            {"latest": "2.8.0-cuda12.8-cudnn9-runtim"},
            "publish.latest",
            f"no cell has the tag '2.8.0-cuda12.8-cudnn9-runtim'. Did you mean '{RUNTIME}'?",
            "one cell of this matrix",
        ),
        ({"latest": "2.8.0*"}, "publish.latest", "", "the tag or the id of a cell"),
        ({"runners": [{**H100, "gpu": "H1000"}]}, "publish.runners[0].gpu", "GPU 'H1000' is not known", ""),
        ({"runners": [{**H100, "gpu": "Blackwell"}]}, "publish.runners[0].gpu", "is not one architecture", "sm_100"),
        ({"runners": [{**H100, "driver": "new"}]}, "publish.runners[0].driver", "'new'", "580.65.06"),
        ({"runners": [{**H100, "gpus": 0}]}, "publish.runners[0].gpus", "the number 0 is not allowed", "how many GPUs"),
        ({"runners": [{**H100, "labels": []}]}, "publish.runners[0].labels", "is empty", ""),
        ({"runners": [{**H100, "labels": ["${{ x }}"]}]}, "publish.runners[0].labels[0]", "", "a brace"),
        ({"runners": [{**H100, "lables": ["x"]}]}, "publish.runners[0].lables", "mean 'labels'?", "name, labels"),
        ({"runners": [{"name": "x", "labels": ["a"], "gpu": "T4"}]}, "publish.runners[0].driver", "missing", "NVIDIA"),
        ({"runners": [H100, H100]}, "publish.runners[1].name", "a second runner class named 'h100'", ""),
        ([], "publish", "a list, where keys with values are needed", ""),
    ],
)  # fmt: skip
def test_a_mistake_is_said_where_it_is(publish: object, where: str, what: str, why: str) -> None:
    problem = only(publish)
    assert problem.where == f"matrix.yaml: {where}"
    assert what in problem.what
    assert why in problem.why


def test_all_mistakes_are_said_at_once_and_none_by_its_consequences() -> None:
    publish = {"latest": "nothing", "runners": [{**H100, "gpu": "H1000"}, H100, H100]}
    assert [problem.where for problem in problems(publish)] == [
        f"matrix.yaml: publish.{at}" for at in ("runners[0].gpu", "runners[1].name", "runners[2].name", "latest")
    ]
    # A cell that cannot exist may be the one that is meant.
    impossible = [*SHIPPED["include"], {"torch": "2.8.0", "cuda": "12.1"}]
    assert "publish" not in only({"latest": "2.8.0-cuda12.1-cudnn9-runtime"}, include=impossible).where
    # What is wrong in the section hides nothing else.
    bad = judge(document({"tiers": [2], "latest": 5}, repository="UPPER"))[2]
    assert [problem.where for problem in bad] == ["repository", "publish.tiers", "publish.latest"]


def test_it_changes_neither_locks_nor_images() -> None:
    """Whoever asks for a GPU from tomorrow on has not to build anything again."""
    project = Project(ROOT / "matrix.yaml")
    other = family({"tiers": [1, 2], "latest": RUNTIME, "signed": True, "runners": [H100]})
    assert other.policy != project.policy
    assert other.cells == project.cells
    for cell, mine in zip(other.cells, project.cells, strict=True):
        assert request_of(cell).digest == request_of(mine).digest
    cell = other.cells[0]
    locks: tuple[BaseLock | None, ...] = (project.base_lock(cell), project.system_lock(cell))
    plan = renders.render(cell, project.lock(cell), *locks, templates=renders.templates_of(ROOT))
    assert project.stale([plan]) == ()
