"""The workflows: pinned, with the least of rights, and with nothing of the matrix written down a second time."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.project import Project

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = Project(ROOT / "matrix.yaml")


def read(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(document, dict)
    return document


WORKFLOWS: Mapping[str, Mapping[str, Any]] = {path.stem: read(path) for path in FILES}
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job.get("steps", ())


def test_there_are_those_that_the_docs_describe() -> None:
    assert set(WORKFLOWS) == {"ci", "publish", "gpu", "update", "refresh", "propose"}
    page = (ROOT / "docs" / "ci.md").read_text("utf-8")
    assert all(f"`{name}`" in page or f"`{name}.yml`" in page for name in WORKFLOWS)


@every
def test_every_action_is_pinned_by_its_commit_with_the_version_beside_it(path: Path) -> None:
    for line in path.read_text("utf-8").splitlines():
        if match := re.search(r"\buses:\s*(\S+)(.*)", line):
            local = re.fullmatch(r"\$/\.github/workflows/([a-z]+)\.yml", match[1])
            pinned = re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", match[1]) and re.fullmatch(
                r" # v[0-9]+\.[0-9]+\.[0-9]+", match[2]
            )
            assert pinned or (local and local[1] in WORKFLOWS), line


def test_one_version_of_each_action_and_of_the_container() -> None:
    text = "\n".join(path.read_text("utf-8") for path in FILES)
    used = set(re.findall(r"uses: (actions/\S+) # (\S+)", text))
    assert len({action.partition("@")[0] for action, _ in used}) == len(used)
    images = {job["container"]["image"] for path in FILES for job in jobs(path).values() if "container" in job}
    (image,) = images
    assert re.fullmatch(r"debian:bookworm-slim@sha256:[0-9a-f]{64}", image)


@every
def test_no_right_is_given_to_all_jobs_and_each_job_says_its_own(path: Path) -> None:
    assert read(path)["permissions"] == {}
    for name, job in jobs(path).items():
        assert isinstance(job["permissions"], dict), name
        assert job["permissions"], name
        assert "timeout-minutes" in job or "uses" in job, name


def test_only_the_jobs_that_need_it_may_write() -> None:
    writing = {
        (path.stem, name, right)
        for path in FILES
        for name, job in jobs(path).items()
        for right, kind in job["permissions"].items()
        if kind == "write"
    }
    assert writing == {
        ("publish", "publish", "packages"),
        ("publish", "publish", "id-token"),
        *(
            (workflow, "propose", right)
            for workflow in ("propose", "update", "refresh")
            for right in ("contents", "pull-requests")
        ),
    }


@every
def test_no_credentials_lie_about(path: Path) -> None:
    for step in steps(path):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        assert "secrets." not in step.get("run", "")
    secrets = set(re.findall(r"secrets\.([A-Za-z_]+)", path.read_text("utf-8")))
    assert not secrets or path.stem in ("publish", "propose", "update", "refresh")


@every
def test_nothing_that_others_write_is_put_into_a_script(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step


@every
def test_nothing_of_a_release_comes_from_a_cache(path: Path) -> None:
    assert "actions/cache" not in path.read_text("utf-8")
    assert not any("cache" in step.get("with", {}) for step in steps(path))


def test_jobs_fan_out_by_what_torchyard_says() -> None:
    found = [
        (path.stem, name, job["strategy"]["matrix"])
        for path in FILES
        for name, job in jobs(path).items()
        if "strategy" in job
    ]
    assert [(stem, name) for stem, name, _ in found] == [("gpu", "validate"), ("publish", "build")]
    for stem, _, matrix in found:
        match = re.fullmatch(r"\$\{\{ fromJSON\(needs\.plan\.outputs\.(\w+)\) \}\}", matrix)
        assert match, matrix
        plan = WORKFLOWS[stem]["jobs"]["plan"]
        assert plan["outputs"] == {match[1]: f"${{{{ steps.jobs.outputs.{match[1]} }}}}"}
        (script,) = (step["run"] for step in plan["steps"] if step.get("id") == "jobs")
        assert f"{match[1]}=$(.venv/bin/torchyard matrix --github {match[1]} $CELLS)" in script
        assert f'echo "{match[1]}=${match[1]}" >>"$GITHUB_OUTPUT"' in script


@every
def test_no_workflow_knows_a_cell(path: Path) -> None:
    text = path.read_text("utf-8")
    for cell in PROJECT.cells:
        for name in (cell.id, *cell.tag_names, f"{cell.torch}", f"cuda{cell.cuda}", f"cu{cell.cuda}"):
            assert name not in text, name
    for runner in PROJECT.policy.runners:
        assert runner.name not in text


def test_what_is_published_is_proven_before() -> None:
    publish = WORKFLOWS["publish"]["jobs"]
    assert publish["publish"]["needs"] == ["build", "gpu"], "without `if`, it runs only when both succeeded"
    assert "if" not in publish["publish"]
    assert publish["publish"]["environment"] == "publish"
    names = [step.get("name") or step.get("run") for step in publish["publish"]["steps"]]
    assert names.index("build again") < names.index("take the verdicts") < names.index("push")
    pushing = [(path.stem, step) for path in FILES for step in steps(path) if "torchyard push" in step.get("run", "")]
    assert [(stem, step["name"]) for stem, step in pushing] == [("publish", "push")]
    assert "--unproven" not in (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")
    assert WORKFLOWS["publish"]["concurrency"] == {"group": "publish", "cancel-in-progress": False}
    # YAML 1.1 reads `on` as a truth value.
    (triggers,) = (value for key, value in WORKFLOWS["publish"].items() if str(key) in ("on", "True"))
    assert set(triggers) == {"push", "workflow_dispatch"}


@every
def test_scripts_are_shell_that_shellcheck_passes(path: Path, tmp_path: Path) -> None:
    shells = {read(path).get("defaults", {}).get("run", {}).get("shell", "sh")}
    assert shells == {"bash"} or path.stem == "ci"
    for number, step in enumerate(steps(path)):
        if "run" in step:
            script = tmp_path / f"{number}.sh"
            script.write_text(f"#!/bin/bash\nset -eo pipefail\n{step['run']}\n", "utf-8")
            # Variables of a step come from its env.
            program = Path(sys.executable).with_name("shellcheck")
            command = [str(program), "--severity=warning", "--exclude=SC2154", str(script)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


@every
def test_a_container_in_which_images_are_made_may_mount(path: Path) -> None:
    for name, job in jobs(path).items():
        script = "\n".join(step.get("run", "") for step in job.get("steps", ()))
        makes = re.search(r"torchyard (build|load|validate|push)|\.ci/run", script) is not None
        if "container" in job:
            assert (job["container"].get("options") == "--privileged") is makes, name


# --------------------------------------------------------------------------- what a refresh shows


def changed_layers() -> Any:
    spec = importlib.util.spec_from_file_location("changed_layers", ROOT / ".github" / "changed_layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sizes(*titles: str) -> dict[str, Any]:
    layers = [
        {"digest": f"sha256:{title}", "title": title, "compressed_bytes": 1_500_000, "cells": ["cell"]}
        for title in titles
    ]
    cells = [{"id": "cell", "tag": "torchyard:tag", "layers": [layer["digest"] for layer in layers]}]
    return {"layers": layers, "cells": cells}


def test_a_refresh_shows_what_users_have_to_pull() -> None:
    now = sizes("base bookworm", "torch 2.8.0", "bytecode of torch", "environment and image.json of torch2.8.0-cu128")
    text = changed_layers().changes(now, {"cell": ["sha256:torch 2.8.0", "sha256:bytecode of torch", "sha256:old"]})
    assert text.startswith("No layer with Python packages changes.\n")
    assert "| `torchyard:tag` | 2 of 4 | 3.0 | base bookworm; environment and image.json |" in text


def test_a_refresh_says_so_if_python_is_touched() -> None:
    text = changed_layers().changes(sizes("base bookworm", "torch 2.8.0", "bytecode of torch"), {"cell": ["sha256:x"]})
    assert text.startswith("Layers with Python packages change:\n\n- torch 2.8.0\n- bytecode of torch\n")


def test_what_is_not_published_is_not_compared(tmp_path: Path) -> None:
    text = changed_layers().changes(sizes("base bookworm"), {})
    assert text.startswith("Nothing is published")
    assert "| `torchyard:tag` | - | - | not published |" in text
    (tmp_path / "sizes.json").write_text(json.dumps(sizes("base bookworm")), "utf-8")
    (tmp_path / "cell.json").write_text(json.dumps({"layers": [{"digest": "sha256:base bookworm"}]}), "utf-8")
    (tmp_path / "published").mkdir()
    (tmp_path / "cell.json").rename(tmp_path / "published" / "cell.json")
    command = [sys.executable, ROOT / ".github" / "changed_layers.py", tmp_path / "sizes.json", tmp_path / "published"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert "| `torchyard:tag` | 0 of 1 | 0.0 |  |" in done.stdout
