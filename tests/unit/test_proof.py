"""Observed = declared: an exact observation is accepted, and every single difference from it is reported."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder import proof
from builder.engines import RunResult
from builder.errors import CellFailedError
from builder.project import Project
from builder.render import PREFIX, Expectation, Plan

PROJECT = Project(Path(__file__).parents[2] / "matrix.yaml")
CELLS = {cell.id: cell for cell in PROJECT.cells}
CUDA = PROJECT.plan(CELLS["torch2.8.0-cu128-cudnn9.16.0.29-py3.11-bookworm-runtime"])
CPU = PROJECT.plan(CELLS["torch2.13.0-cpu-py3.11-bookworm-runtime"])
DIGEST = "sha256:" + "a" * 64

both = pytest.mark.parametrize("plan", [CUDA, CPU], ids=["cuda", "cpu"])


def report_of(facts: object, errors: object = None) -> bytes:
    return json.dumps({"schema": 1, "facts": facts, "errors": errors if errors is not None else {}}).encode()


@dataclass
class FakeRunner:
    """Answers as a container would; remembers how it was asked."""

    written: bytes | None = None
    exit_code: int = 0
    log: str = ""
    asked: dict[str, Any] = field(default_factory=dict)

    def run(
        self, digest: str, argv: Sequence[str], *, files: Mapping[str, bytes], collect: Sequence[str], timeout_s: float
    ) -> RunResult:
        self.asked = {"digest": digest, "argv": argv, "files": files, "collect": collect, "timeout_s": timeout_s}
        found = {} if self.written is None else dict.fromkeys(collect, self.written)
        return RunResult(exit_code=self.exit_code, files=found, log=self.log)

    def tag(self, digest: str, tags: Sequence[str]) -> None:
        pytest.fail("a proof tags nothing")

    def untag(self, tags: Sequence[str]) -> None:
        pytest.fail("a proof removes nothing")

    def discard(self, digest: str) -> None:
        pytest.fail("a proof removes nothing")


def facts_of(plan: Plan) -> dict[str, Any]:
    """Return what an image that is just what its cell declares reports."""
    expected = plan.expectation
    return {
        "torch": expected.torch,
        "cuda": expected.cuda,
        "cudnn_number": expected.cudnn_number,
        "nccl": expected.nccl,
        "python": expected.python,
        "python_full": f"{expected.python}.2",
        "architectures": sorted(expected.architectures),
        "packages": dict(expected.packages),
        "libraries": {},
    }


def prove(plan: Plan, facts: Mapping[str, Any], errors: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    return proof.prove(plan, DIGEST, FakeRunner(written=report_of(facts, errors)))


def found_in(plan: Plan, facts: Mapping[str, Any], errors: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return what and why of every difference, behind the headline."""
    with pytest.raises(CellFailedError) as caught:
        prove(plan, facts, errors)
    headline, *problems = caught.value.problems
    assert "gets no tag" in headline.what
    assert headline.where == DIGEST
    assert headline.why == f"{len(problems)} difference{'s' if len(problems) != 1 else ''}"
    return [(problem.what, problem.why) for problem in problems]


@both
def test_the_exact_observation_is_proven(plan: Plan) -> None:
    facts = facts_of(plan)
    assert prove(plan, facts) == facts


def test_the_script_runs_alone_under_the_image_s_own_python() -> None:
    runner = FakeRunner(written=report_of(facts_of(CPU)))
    proof.prove(CPU, DIGEST, runner)
    python, isolated, script, output = runner.asked["argv"]
    assert runner.asked["digest"] == DIGEST
    assert (python, isolated) == (f"{PREFIX}/bin/python", "-I")
    assert runner.asked["files"] == {script: (Path(__file__).parents[2] / "validate" / "facts.py").read_bytes()}, (
        "the very file that is tested"
    )
    assert runner.asked["collect"] == [output]
    assert runner.asked["timeout_s"] > 60


OTHERS: Mapping[str, Callable[[Any], Any]] = {
    "torch": lambda now: now.partition("+")[0] + "+cu999",
    "cuda": lambda now: "12.6" if now else "12.8",
    "cudnn_number": lambda now: now + 1 if now else 91002,
    "nccl": lambda now: "2.0.0" if now else "2.27.3",
    "python": lambda now: "3.99",
    "architectures": lambda now: now[:-1],
}


# A CPU build has no GPU architectures.
DECLARED = [(plan, name) for plan in (CUDA, CPU) for name in OTHERS if name != "architectures" or plan is CUDA]
each_fact = pytest.mark.parametrize(("plan", "name"), DECLARED, ids=[f"{p.cell.cuda}-{name}" for p, name in DECLARED])


def test_every_declared_fact_has_a_mutation() -> None:
    # What an image declares and nothing observes would be a promise without proof: cudnn is proven by its package
    # and by what the loaded library says.
    assert {*OTHERS, "packages", "cudnn"} == set(Expectation.__dataclass_fields__)


@each_fact
def test_every_fact_that_differs_is_reported(plan: Plan, name: str) -> None:
    facts = facts_of(plan)
    facts[name] = OTHERS[name](facts[name])
    ((what, why),) = found_in(plan, facts)
    shown = {None: "none"}.get(facts[name], facts[name]) if not isinstance(facts[name], list) else facts[name][0]
    assert str(shown) in what
    assert why.startswith("declared: ")


@both
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "architectures"])
@pytest.mark.parametrize("value", [None, "", 0, [], "None"])
def test_nothing_passes_for_a_fact(plan: Plan, name: str, value: object) -> None:
    facts = facts_of(plan)
    if facts[name] == value:
        return
    facts[name] = value
    assert len(found_in(plan, facts)) == 1


@each_fact
def test_every_fact_that_is_missing_is_reported_with_the_reason(plan: Plan, name: str) -> None:
    facts = facts_of(plan)
    del facts[name]
    ((what, why),) = found_in(plan, facts, {name: "ImportError: libcudnn.so.9"})
    assert "could not be" in what
    assert why == "ImportError: libcudnn.so.9"
    ((_, why),) = found_in(plan, facts)
    assert why == "no reason was given"


def test_packages_that_could_not_be_listed_are_a_difference() -> None:
    facts = facts_of(CPU)
    del facts["packages"]
    assert found_in(CPU, facts) == [("the installed packages could not be listed", "no reason was given")]


def test_each_package_that_is_missing_is_reported() -> None:
    for name in CUDA.expectation.packages:
        facts = facts_of(CUDA)
        version = facts["packages"].pop(name)
        assert found_in(CUDA, facts) == [(f"{name} is not installed", f"locked: {version}")]


def test_each_package_of_another_version_is_reported() -> None:
    for name, version in CUDA.expectation.packages.items():
        facts = facts_of(CUDA)
        facts["packages"][name] = f"{version}.post1"
        assert found_in(CUDA, facts) == [(f"{name} is {version}.post1", f"locked: {version}")]


def test_a_package_too_many_is_reported() -> None:
    facts = facts_of(CUDA)
    facts["packages"]["wheel"] = "0.45.1"
    assert found_in(CUDA, facts) == [("wheel 0.45.1 is installed", "the lock does not have it")]


def test_all_differences_are_reported_together() -> None:
    facts = facts_of(CUDA)
    for name in OTHERS:
        facts[name] = OTHERS[name](facts[name])
    facts["packages"] |= {"wheel": "1", "numpy": "0"}
    assert len(found_in(CUDA, facts)) == len(OTHERS) + 2


def test_architectures_are_a_set_in_any_order() -> None:
    facts = facts_of(CUDA)
    facts["architectures"] = sorted(facts["architectures"])
    assert prove(CUDA, facts)
    facts["architectures"] = [*facts["architectures"], "sm_999"]
    assert "sm_999" in found_in(CUDA, facts)[0][0]


@pytest.mark.parametrize(
    "runner",
    [
        FakeRunner(exit_code=1, log="line 1\nSegmentation fault"),
        FakeRunner(exit_code=0, written=b"", log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b'{"facts": {', log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b"\xff\xfe", log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b"[]", log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b"null", log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b'{"schema": 1}', log="Segmentation fault"),
        FakeRunner(exit_code=0, written=b'{"schema": 2, "facts": {}, "errors": {}}', log="Segmentation fault"),
        FakeRunner(exit_code=0, written=report_of([]), log="Segmentation fault"),
        FakeRunner(exit_code=0, written=report_of({"packages": ["a"]}), log="Segmentation fault"),
        FakeRunner(exit_code=0, written=report_of({}, ["a"]), log="Segmentation fault"),
    ],
    ids=lambda runner: str(runner.written),
)
def test_a_container_without_facts_is_a_failure_that_shows_its_log(runner: FakeRunner) -> None:
    with pytest.raises(CellFailedError) as caught:
        proof.prove(CPU, DIGEST, runner)
    (problem,) = caught.value.problems
    assert "could not say what it is" in problem.what
    assert "Segmentation fault" in problem.why
    assert f"exit code {runner.exit_code}" in problem.why


def test_a_container_that_hangs_is_a_failure() -> None:
    with pytest.raises(CellFailedError, match="could not say what it is") as caught:
        proof.prove(CPU, DIGEST, FakeRunner(exit_code=124))
    assert "no answer within" in caught.value.problems[0].why


def test_facts_of_a_process_that_then_failed_are_none() -> None:
    runner = FakeRunner(
        written=report_of(facts_of(CPU)),
        exit_code=139,
        log="Segmentation fault",
    )
    with pytest.raises(CellFailedError) as caught:
        proof.prove(CPU, DIGEST, runner)
    assert "exit code 139" in caught.value.problems[0].why


def test_only_the_end_of_a_long_log_is_shown() -> None:
    runner = FakeRunner(exit_code=1, log="\n".join(f"line {number}" for number in range(1000)))
    with pytest.raises(CellFailedError) as caught:
        proof.prove(CPU, DIGEST, runner)
    why = caught.value.problems[0].why
    assert "line 999" in why
    assert "line 900" not in why
