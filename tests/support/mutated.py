"""Checks in a container of an image, each in the environment of one mutation: one container for all, two at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from builder.engines import BOX, Allowance, End
from builder.engines.docker import DockerEngine
from builder.render import PREFIX
from tests.support.mutations import Mutation
from validate.bundle import bundle
from validate.verdict import Result, result_of

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
        image=mutation["image"],
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


def in_container(image: str, mutations: Sequence[Mutation], *, deadline_s: float) -> Mapping[int, Result]:
    """Return what the checks said, by the number of the mutation."""
    engine = DockerEngine()
    lines: list[str] = []
    files = {
        f"{BOX}/validate.pyz": bundle(),
        f"{BOX}/driver.py": DRIVER.encode(),
        f"{BOX}/mutations.json": json.dumps([dataclasses.asdict(mutation) for mutation in mutations]).encode(),
    }
    try:
        ended = engine.watch(
            engine.find(image),
            [f"{PREFIX}/bin/python", f"{BOX}/driver.py", f"{BOX}/validate.pyz", f"{BOX}/mutations.json"],
            files=files,
            allowance=Allowance(),
            on_line=lines.append,
            deadline_s=deadline_s,
        )
    finally:
        engine.client.close()
    assert (ended.how, ended.code) == (End.ITSELF, 0), "\n".join(lines[-20:])
    documents = [json.loads(line) for line in lines]
    return {document["number"]: result_of(document["result"]) for document in documents}
