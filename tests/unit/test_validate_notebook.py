"""Jupyter's settings: judged as they are where all is well, and as they are where somebody is let in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutations.notebook import LOADERS, NOTEBOOK, PLANT, configured, image
from validate import bundle, check, profile, runner
from validate.check import Probe, Request
from validate.checks import notebook
from validate.checks.notebook import Setting
from validate.verdict import Result, Skip, Status, is_missing

CHECKS = check.load()
MANY = """
c.ServerApp.port = 9000
c.ServerApp.allow_origin = 'https://a.org'
c.ServerApp.disable_check_xsrf = False
c.ContentsManager.root_dir = '/data'
"""


def a_probe() -> Probe:
    return Probe(Request(), lambda document: None)


def run(name: str, tmp_path: Path, prelude: str, declared: Mapping[str, Any] | None = NOTEBOOK) -> Result:
    request = Request(declared=declared, options=profile.DEFAULTS, scratch=str(tmp_path))
    return runner.run_one(CHECKS[name], request, root=bundle.root(), deadline_s=60, prelude=prelude)


# ----------------------------------------------------------------------------------------------------
# Where all is well


def test_a_service_as_it_should_be(tmp_path: Path) -> None:
    result = run("svc.jupyter", tmp_path, image())
    assert result.status is Status.PASS, result
    assert result.evidence["kernel"]["torch"] == "2.13.0"
    assert result.evidence["answers"]["GET /api/status with the token"] == 200
    assert result.evidence["answers"]["GET /api/status with a wrong token"] == 403
    assert set(result.metrics) == {"kernel_s", "stop_s"}


@pytest.mark.parametrize("content", ["", MANY])
def test_configuration_as_it_should_be(tmp_path: Path, content: str) -> None:
    mutation = configured("good", content)
    result = run("sec.jupyter", tmp_path, mutation.prelude, mutation.declared)
    assert result.status is Status.PASS, result
    assert len(result.evidence["files"]) == bool(content)


@pytest.mark.parametrize("name", ["svc.jupyter", "sec.jupyter"])
@pytest.mark.parametrize("program", [None, "ssh"])
def test_other_images_are_excused(tmp_path: Path, name: str, program: str | None) -> None:
    result = run(name, tmp_path, "", {"program": program})
    assert (result.status, result.skip) == (Status.SKIP, Skip.NOT_THIS_KIND)
    result.required = True
    assert not is_missing(result)


def test_images_that_declare_nothing(tmp_path: Path) -> None:
    without = "import sys; sys.modules['jupyter_core'] = None"
    assert run("sec.jupyter", tmp_path, without, None).skip is Skip.NOT_THIS_KIND
    assert run("svc.jupyter", tmp_path, without, None).skip is Skip.NOT_DECLARED
    assert run("sec.jupyter", tmp_path, PLANT + LOADERS, None).status is Status.PASS


# ----------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["torchyard-notebook"], []),
        (["--IdentityProvider.token="], [("IdentityProvider.token", "")]),
        (["--IdentityProvider.token", ""], [("IdentityProvider.token", "")]),
        (["--ServerApp.token", "--port=1"], [("ServerApp.token", ""), ("port", "1")]),
        (["tini", "--", "x"], []),
        (["sh", "-c", "jupyter lab --NotebookApp.token=''"], [("c", "jupyter"), ("NotebookApp.token", "")]),
        (["sh", "-c", "it's --token="], [("c", "it's"), ("token", "")]),
    ],
)  # fmt: skip
def test_settings_of_a_command(words: Sequence[str], found: Sequence[tuple[str, str]]) -> None:
    assert [(one.name, one.value) for one in notebook.of_command(words)] == found


def test_settings_of_files() -> None:
    files = {"/a.py": {"ServerApp": {"token": "", "port": 1}, "version": 1}, "/b.json": {}}
    assert notebook.of_files(files) == [
        Setting("/a.py", "ServerApp.token", ""),
        Setting("/a.py", "ServerApp.port", 1),
    ]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"ServerApp.token": ""}, 1),
        ({"ServerApp.token": "''"}, 1),
        ({"ServerApp.token": "abc"}, 1),
        ({"ServerApp.password": ""}, 0),
        # The password is what is wrong there: all containers have it.
        ({"ServerApp.token": "", "ServerApp.password": "argon2:x"}, 1),
        ({"ServerApp.disable_check_xsrf": "True"}, 1),
        ({"ServerApp.disable_check_xsrf": False}, 0),
        ({"ServerApp.allow_origin": "*"}, 1),
        ({"ServerApp.allow_origin": ""}, 0),
        ({"GatewayClient.auth_token": ""}, 0),
    ],
)
def test_settings_are_judged(settings: Mapping[str, Any], count: int) -> None:
    probe = a_probe()
    notebook.judge_settings(probe, [Setting("a file", name, value) for name, value in settings.items()])
    assert len(probe.findings) == count
    assert all(one.mode == "F62" for one in probe.findings)


def test_no_finding_tells_a_secret() -> None:
    probe = a_probe()
    notebook.judge_settings(probe, [Setting("a file", "ServerApp.token", "hunter2")])
    notebook.judge_environment(probe, {"JUPYTER_TOKEN": "hunter2"})
    assert len(probe.findings) == 2
    assert "hunter2" not in str(probe.findings)


def test_the_environment_of_a_good_image() -> None:
    probe = a_probe()
    notebook.judge_environment(probe, {"PATH": "/bin", "JUPYTER_SERVER_ALLOW_UNAUTHENTICATED_ACCESS": "no"})
    assert not probe.findings


def test_a_home_directory_nobody_has_used(tmp_path: Path) -> None:
    probe = a_probe()
    (tmp_path / ".local/share/jupyter/runtime").mkdir(parents=True)
    notebook.judge_home(probe, str(tmp_path))
    assert not probe.findings
    (tmp_path / ".local/share/jupyter/runtime/jupyter_cookie_secret").write_text("")
    notebook.judge_home(probe, str(tmp_path))
    assert len(probe.findings) == 1
