"""Checks that need a real torch are seen to fail: every environment made for one, in a container of the CPU cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import pytest

from builder.engines import BOX, Allowance, End
from builder.engines.docker import DockerEngine
from builder.render import PREFIX
from tests.integration.conftest import Built
from tests.support.mutations import Mutation, all_mutations, complaint
from validate.bundle import bundle
from validate.verdict import Result, result_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

MUTATIONS = [mutation for mutation in all_mutations() if mutation.needs == "torch"]
DEADLINE_S = 1500
DRIVER = """
import json, shutil, sys, tempfile
from concurrent.futures import ThreadPoolExecutor

suite, mutations = sys.argv[1:]
sys.path.insert(0, suite)
from validate import check, profile, runner

checks = check.load()


def tell(number, mutation):
    scratch = tempfile.mkdtemp()
    one = checks[mutation["check"]]
    request = check.Request(
        declared=mutation["declared"],
        options={**profile.DEFAULTS, **mutation["options"]},
        device=mutation["device"],
        scratch=scratch,
    )
    result = runner.run_one(one, request, root=suite, deadline_s=one.deadline_s, prelude=mutation["prelude"])
    shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.write(json.dumps({"number": number, "result": result.as_json()}) + "\\n")
    sys.stdout.flush()


with open(mutations) as file, ThreadPoolExecutor(2) as pool:
    for done in [pool.submit(tell, number, mutation) for number, mutation in enumerate(json.load(file))]:
        done.result()
"""
"""Runs in the container: Python 3.9 or newer, the suite, and nothing else."""


@pytest.fixture(scope="module")
def results(cpu_oci: Built) -> Mapping[int, Result]:
    """What the checks said, by the number of the mutation: one container for all, two at a time."""
    engine = DockerEngine()
    lines: list[str] = []
    files = {
        f"{BOX}/validate.pyz": bundle(),
        f"{BOX}/driver.py": DRIVER.encode(),
        f"{BOX}/mutations.json": json.dumps([dataclasses.asdict(mutation) for mutation in MUTATIONS]).encode(),
    }
    try:
        ended = engine.watch(
            engine.find(cpu_oci.name),
            [f"{PREFIX}/bin/python", f"{BOX}/driver.py", f"{BOX}/validate.pyz", f"{BOX}/mutations.json"],
            files=files,
            allowance=Allowance(),
            on_line=lines.append,
            deadline_s=DEADLINE_S,
        )
    finally:
        engine.client.close()
    assert (ended.how, ended.code) == (End.ITSELF, 0), "\n".join(lines[-20:])
    documents = [json.loads(line) for line in lines]
    return {document["number"]: result_of(document["result"]) for document in documents}


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[f"{it.check} {it.name}" for it in MUTATIONS])
def test_a_check_fails_where_it_must(results: Mapping[int, Result], number: int) -> None:
    mutation: Mutation = MUTATIONS[number]
    result = results[number]
    assert result.id == mutation.check
    assert complaint(mutation, result) is None
