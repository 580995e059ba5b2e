"""Which cells are validated where: everything that must be seen is, nothing that cannot work is chosen, few jobs."""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder import matrix, runners
from builder.cli import cli
from builder.compat import Request, explain
from builder.errors import ImpossibleError, MatrixError
from builder.facts import CPU, Facts
from builder.matrix import Cell
from builder.runners import Cover, cover
from builder.schema import Runner

FACTS = Facts.load()
PLAIN = {"kind": "image", "image": f"debian@sha256:{'0' * 64}", "python": "3.11"}
POINTS = [
    {"torch": "2.7.1", "cuda": "12.6"},
    {"torch": "2.7.1", "cuda": "12.8"},
    {"torch": "2.8.0", "cuda": "12.8"},
    {"torch": "2.8.0", "cuda": "12.8", "cudnn": "9.16.0.29"},
    {"torch": "2.8.0", "cuda": "12.8", "variant": "notebook"},
    {"torch": "2.9.1", "cuda": "12.8", "variant": "ssh"},
    {"torch": "2.8.0", "cuda": "cpu"},
    {"torch": "2.15.0", "cuda": "13.2"},
    {"torch": "2.15.0", "cuda": "13.2", "variant": "notebook"},
    {"torch": "2.15.0", "cuda": "13.2", "platform": "linux/arm64"},
]


def document(points: Sequence[object], **publish: object) -> dict[str, Any]:
    return {
        "version": 1,
        "repository": "torchyard",
        "exclude_newer": "2026-11-15T00:00:00Z",
        "bases": {"plain": PLAIN},
        "variants": {name: {"description": name} for name in ("runtime", "notebook", "ssh")},
        "indexes": [
            {"name": "pytorch", "url": "https://index.example/whl", "packages": ["torch"], "when": {"base": "plain"}}
        ],
        "axes": {"torch": ["2.10.0"], "cuda": ["12.8"], "base": ["plain"], "variant": ["runtime"]},
        "include": list(points),
        "publish": publish,
    }


CELLS = matrix.cells(json.dumps(document(POINTS)), FACTS)


def runner(gpu: str, driver: str, *, name: str = "", gpus: int = 1, platform: str = "linux/amd64") -> Runner:
    return Runner.model_validate(
        {
            "name": name or gpu.lower().replace(" ", "-"),
            "labels": ("self-hosted", gpu.replace(" ", "-")),
            "gpu": gpu,
            "driver": driver,
            "gpus": gpus,
            "platform": platform,
        }
    )


V100, T4, H100 = runner("V100", "535.54.03"), runner("T4", "580.65.06"), runner("H100", "580.65.06")
B200, GH200 = runner("B200", "570", gpus=8), runner("GH200", "595.71.05", platform="linux/arm64")


def works(cell: Cell, machine: Runner) -> bool:
    """Ask what `torchyard resolve` would say."""
    cudnn = None if cell.cudnn_is_stock else str(cell.cudnn)
    return cell.platform == machine.platform and possible(
        Request(
            torch=str(cell.torch),
            cuda=cell.cuda,
            cudnn=cudnn,
            platform=cell.platform,
            driver=machine.driver,
            gpu=machine.gpu,
        )
    )


@functools.cache
def possible(request: Request) -> bool:
    return explain(FACTS, request).possible


def tags(found: Cover, machine: Runner) -> set[str]:
    return {cell.tag_names[0] for cell, one in found.pairs if one == machine}


def test_only_what_can_work_is_chosen() -> None:
    found = cover(FACTS, CELLS, [V100, H100])
    # cuDNN 9.11 and newer do not serve Volta, and CUDA 13 has no code for it.
    assert {cell.cuda for cell, machine in found.pairs if machine == V100} == {"12.6", "12.8"}
    assert not any("9.16" in name for name in tags(found, V100))
    assert tags(found, H100) >= {"2.15.0-cuda13.2-cudnn9-runtime", "2.8.0-cuda12.8-cudnn9.16.0.29-runtime"}
    assert not any("cpu" in name for name in tags(found, V100) | tags(found, H100))


def test_a_driver_that_is_too_old_runs_nothing_of_a_newer_cuda() -> None:
    old = cover(FACTS, CELLS, [runner("H100", "570.124.06")])
    assert {cell.cuda for cell, _ in old.pairs} == {"12.6", "12.8"}
    lost = {key: [one.why for one in problems] for key, problems in old.lost.items()}
    assert {key.partition("-cudnn")[0] for key in lost} == {"torch2.15.0-cu132"}
    assert all("driver >= 580.65.06" in why or "linux/arm64" in why or "amd64" in why for [why] in lost.values())


def test_a_machine_of_another_architecture_gets_its_own_cells() -> None:
    found = cover(FACTS, CELLS, [H100, GH200])
    assert {cell.platform for cell, machine in found.pairs if machine == GH200} == {"linux/arm64"}
    assert found.lost == {}


def test_cells_that_no_machine_runs_are_named() -> None:
    found = cover(FACTS, CELLS, [T4])
    (key,) = (cell.id for cell in CELLS if cell.platform == "linux/arm64")
    assert set(found.lost) == {key}
    assert [(one.what, one.where) for one in found.lost[key]] == [("it is for linux/arm64", "t4")]
    assert set(cover(FACTS, CELLS, []).lost) == {cell.id for cell in CELLS if cell.cuda != CPU}


def test_several_gpus_where_they_are_asked_for() -> None:
    found = cover(FACTS, CELLS, [H100, B200], tiers=(1, 2, 3))
    several = {cell.id for cell, machine in found.pairs if machine.gpus > 1}
    assert several | set(found.lost) == {cell.id for cell in CELLS if cell.cuda != CPU}
    assert all(not works(next(cell for cell in CELLS if cell.id == key), B200) for key in found.lost)
    alone = cover(FACTS, CELLS[:1], [H100], tiers=(1, 2, 3))
    assert [one.what for one in alone.lost[CELLS[0].id]] == ["T3 needs several GPUs"]


def test_the_work_is_shared() -> None:
    """Cells that teach nothing new about a machine go to the one with the least to do."""
    like = [runner("H100", "580.65.06", name=f"h100-{letter}") for letter in "abc"]
    many = [{"torch": "2.8.0", "cuda": "12.8", "cudnn": f"9.{minor}.0.1"} for minor in range(11, 41)]
    found = cover(FACTS, matrix.cells(json.dumps(document(many)), FACTS), like)
    counts = [sum(machine == one for _, machine in found.pairs) for one in like]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) <= 31 + 6, "each cell once, and for each machine the two torch releases"


MACHINES = [V100, T4, H100, B200, GH200, runner("RTX 5090", "580"), runner("A100", "450.80.02", gpus=4),
            runner("L4", "525.60.13"), runner("GTX 1080", "595.71.05")]  # fmt: skip


def wanted(cells: Sequence[Cell], machines: Sequence[Runner]) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for cell, machine in itertools.product(cells, machines):
        if cell.cuda != CPU and works(cell, machine):
            found |= seen(cell, machine)
    return found


def seen(cell: Cell, machine: Runner) -> set[tuple[str, ...]]:
    return {
        (cell.id,),
        (machine.name, "torch", str(cell.torch)),
        (machine.name, "CUDA", cell.cuda),
        (machine.name, "variant", cell.variant_name),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(CELLS), unique_by=lambda cell: cell.id),
    st.lists(st.sampled_from(MACHINES), unique_by=lambda machine: machine.name),
)
def test_the_cover_holds_and_nothing_of_it_is_too_much(cells: list[Cell], machines: list[Runner]) -> None:
    found = cover(FACTS, cells, machines)
    assert all(works(cell, machine) and cell.cuda != CPU for cell, machine in found.pairs)
    assert set().union(*(seen(*pair) for pair in found.pairs)) == wanted(cells, machines)
    for left_out in found.pairs:
        rest = [pair for pair in found.pairs if pair != left_out]
        assert set().union(*(seen(*pair) for pair in rest)) < wanted(cells, machines), "a job for nothing"
    runs = {cell.id for cell, _ in found.pairs}
    assert set(found.lost) == {cell.id for cell in cells if cell.cuda != CPU} - runs
    for cell in cells:
        reasons = {one.where for one in found.lost.get(cell.id, ())}
        assert reasons == ({machine.name for machine in machines} if cell.id in found.lost else set())
    assert cover(FACTS, tuple(cells), tuple(machines)) == found
    assert list(found.pairs) == sorted(found.pairs, key=lambda pair: (cells.index(pair[0]), machines.index(pair[1]))), (
        "in the order of the matrix"
    )


# --------------------------------------------------------------------------- jobs


def test_a_job_a_cell() -> None:
    jobs = runners.builds(CELLS)["include"]
    assert [job["cells"] for job in jobs] == [cell.id for cell in CELLS]
    assert [job["name"] for job in jobs] == [cell.id for cell in CELLS]
    assert runners.builds([]) == {"include": []}


@pytest.mark.parametrize("most", range(1, 13))
def test_never_more_jobs_than_there_may_be_and_every_cell_in_one(most: int) -> None:
    jobs = runners.builds(CELLS, most=most)["include"]
    assert len(jobs) <= most
    assert " ".join(job["cells"] for job in jobs).split() == [cell.id for cell in CELLS]
    assert len({job["name"] for job in jobs}) == len(jobs)


@pytest.mark.parametrize("most", [3, 4, 7, 256])
def test_jobs_on_machines(most: int) -> None:
    found = cover(FACTS, CELLS, [V100, H100, B200])
    jobs = runners.validations(found, most=most)["include"]
    assert len(jobs) <= most
    assert len({job["name"] for job in jobs}) == len(jobs)
    pairs = {(name, job["runner"]) for job in jobs for name in job["cells"].split()}
    assert pairs == {(cell.id, machine.name) for cell, machine in found.pairs}
    assert {(job["runner"], tuple(job["labels"]), job["gpus"], job["profile"]) for job in jobs} == {
        ("v100", ("self-hosted", "V100"), "1", "gpu"),
        ("h100", ("self-hosted", "H100"), "1", "gpu"),
        ("b200", ("self-hosted", "B200"), "8", "multi-gpu"),
    }


def test_more_machines_than_jobs() -> None:
    with pytest.raises(MatrixError, match="3 runner classes are more than the 2 jobs"):
        runners.validations(cover(FACTS, CELLS, [V100, H100, B200]), most=2)


# --------------------------------------------------------------------------- the command


def run(tmp_path: Any, publish: dict[str, Any], *arguments: str) -> Result:
    path = tmp_path / "matrix.yaml"
    path.write_text(json.dumps(document(POINTS, **publish)), "utf-8")
    return CliRunner().invoke(cli, ["matrix", "-m", str(path), *arguments])


ONE = [H100.model_dump(mode="json")]


def test_the_command_prints_one_object_for_a_workflow(tmp_path: Any) -> None:
    for jobs in ("builds", "gpus"):
        result = run(tmp_path, {"runners": ONE}, "--github", jobs)
        assert result.exit_code == 0
        (line,) = result.stdout.splitlines()
        assert set(json.loads(line)) == {"include"}
        assert json.loads(line)["include"]
    chosen = run(tmp_path, {"runners": ONE}, "--github", "builds", "2.15.0*", "--quiet")
    assert len(json.loads(chosen.stdout)["include"]) == 3


def test_the_list_says_where_cells_are_proven(tmp_path: Any) -> None:
    documents = json.loads(run(tmp_path, {"runners": ONE, "tiers": [1, 2]}, "--json").stdout)
    about = {one["tags"][0].partition(":")[2]: (one["tiers"], one["runners"], one["base_kind"]) for one in documents}
    assert about["2.8.0-cpu-runtime"] == ([1], [], "image")
    assert about["2.15.0-cuda13.2-cudnn9-runtime"] == ([1, 2], ["h100"], "image")


def test_what_is_not_validated_is_said_and_an_error_where_it_must_be(tmp_path: Any) -> None:
    said = run(tmp_path, {"runners": ONE}, "--github", "gpus")
    assert said.exit_code == 0
    assert "2.15.0-cuda13.2-cudnn9-runtime-arm64: not validated on a GPU: h100: it is for linux/arm64" in said.stderr
    assert "there are no runners" in run(tmp_path, {}, "--github", "gpus").stderr
    result = run(tmp_path, {"runners": ONE, "tiers": [1, 2]}, "--github", "gpus")
    assert result.exit_code == ImpossibleError.exit_code
    assert "no runner can prove 2.15.0-cuda13.2-cudnn9-runtime-arm64" in result.stderr
    assert result.stdout == ""
    none = run(tmp_path, {"tiers": [1, 2]}, "--github", "gpus")
    assert none.exit_code == ImpossibleError.exit_code
    assert none.stderr.count("no runner can prove") == sum(cell.cuda != CPU for cell in CELLS)
