"""Jupyter's settings: judged as they are where all is well, and as they are where somebody is let in."""

from __future__ import annotations

import os
import time
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


def a_probe(*, image: bool = True, declared: Mapping[str, Any] | None = NOTEBOOK) -> Probe:
    return Probe(Request(image=image, declared=declared), lambda document: None)


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


# ----------------------------------------------------------------------------------------------------
# Who brought it


HASHED = {"PasswordIdentityProvider": {"hashed_password": "argon2:x"}}


def told(tmp_path: Path, probe: Probe) -> list[tuple[Status, str]]:
    """Judge a home that somebody has used: a token that a first start made, and a password of its user."""
    token = tmp_path / notebook.KEPT
    token.parent.mkdir(parents=True)
    token.write_text("hunter2")
    password = tmp_path / ".jupyter/jupyter_server_config.json"
    password.parent.mkdir()
    password.write_text("")
    notebook.judge_home(probe, str(tmp_path))
    notebook.judge_settings(probe, notebook.of_files({str(password): HASHED}))
    return [(one.status, one.what) for one in probe.findings]


def test_what_a_new_container_has_is_the_images(tmp_path: Path) -> None:
    assert [status for status, _ in told(tmp_path, a_probe())] == [Status.FAIL] * 2


def test_what_a_user_left_in_a_container_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "_began", lambda: time.time() - 60)
    assert told(tmp_path, a_probe(image=False)) == []


def test_what_is_older_than_a_container_that_is_used_may_be_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "_began", lambda: time.time() + 60)
    probe = a_probe(image=False)
    findings = told(tmp_path, probe)
    assert [status for status, _ in findings] == [Status.WARN] * 2
    assert all("older than this run of the container" in what for _, what in findings)
    assert all("torchyard validate IMAGE" in one.remedy and one.mode == "F62" for one in probe.findings)


def test_a_machines_password_is_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "_began", lambda: time.time() + 60)
    probe = a_probe(image=False, declared=None)
    notebook.judge_environment(probe, {"JUPYTER_TOKEN": "hunter2"})
    assert told(tmp_path, probe) == []


def test_who_left_an_open_door_does_not_matter(tmp_path: Path) -> None:
    probe = a_probe(image=False, declared=None)
    notebook.judge_settings(probe, [Setting(str(tmp_path / "a.py"), "ServerApp.token", "")])
    assert [one.status for one in probe.findings] == [Status.FAIL]


def test_when_the_first_process_began(tmp_path: Path) -> None:
    began = notebook._began()
    assert began is not None
    assert time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - 5 < began < time.time()
    new = tmp_path / "new"
    new.write_text("")
    os.utime(new, (1, 1))
    assert not notebook._is_older(str(new), began)
    assert not notebook._is_older(str(new), None)
    assert not notebook._is_older(str(tmp_path / "gone"), time.time() + 60)
