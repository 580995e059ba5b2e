"""The checks of the SSH server: good where all is well, and each sign of trouble is told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations.ssh import DECLARED, planted
from validate import bundle, check, profile, runner
from validate.check import Probe, Request
from validate.checks import ssh
from validate.checks.ssh import Seen, Session
from validate.verdict import Skip, Status

CONTAINER = {"VIRTUAL_ENV": "/opt/venv", "CUDA_HOME": "/usr/local/cuda", "HOME": "/home/torch", "PS1": "$"}
GOOD = Seen(
    methods=("publickey",),
    session=Session("/opt/venv/bin/python", {**CONTAINER, "HOME": "/elsewhere", "TORCHYARD_PROBE": ssh._MARK_VALUE}),
    login_python="/opt/venv/bin/python",
    host_keys=("SHA256:a", "SHA256:b"),
)


def a_probe() -> Probe:
    return Probe(Request(declared=DECLARED), lambda document: None)


def told(seen: Seen) -> str:
    probe = a_probe()
    ssh.judge_service(probe, seen, CONTAINER)
    return "\n".join(f"{finding.what}: {finding.why}" for finding in probe.findings)


@pytest.mark.parametrize("name", ["svc.sshd", "sec.sshd"])
def test_a_good_server_passes(tmp_path: Path, name: str) -> None:
    request = check.Request(declared=DECLARED, options=profile.DEFAULTS, scratch=str(tmp_path))
    one = check.load()[name]
    prelude = planted() + "import glob; glob.glob = lambda pattern: []"  # this machine may have keys of its own
    result = runner.run_one(one, request, root=bundle.root(), deadline_s=one.deadline_s, prelude=prelude)
    assert (result.status, result.findings) == (Status.PASS, [])


def test_an_image_that_declares_nothing_is_not_asked(tmp_path: Path) -> None:
    one = check.load()["svc.sshd"]
    result = runner.run_one(one, check.Request(scratch=str(tmp_path)), root=bundle.root(), deadline_s=20)
    assert (result.status, result.skip) == (Status.SKIP, Skip.NOT_DECLARED)


def test_what_clients_see_is_judged() -> None:
    assert told(GOOD) == ""
    assert "offers password" in told(replace(GOOD, methods=("publickey", "password")))
    assert "refuses the key that it was given: no" in told(replace(GOOD, session=None, refusal="no"))
    assert "same host key" in told(replace(GOOD, host_keys=("a", "a")))
    assert "as it should: late" in told(replace(GOOD, ends=("late",)))


@pytest.mark.parametrize(
    ("name", "lost"), [("VIRTUAL_ENV", True), ("CUDA_HOME", True), ("TORCHYARD_PROBE", True), ("HOME", False)]
)
def test_a_session_has_the_container_s_variables(name: str, lost: bool) -> None:  # noqa: FBT001
    assert GOOD.session is not None
    environment = {key: value for key, value in GOOD.session.environment.items() if key != name}
    assert (name in told(replace(GOOD, session=replace(GOOD.session, environment=environment)))) is lost


@pytest.mark.parametrize("name", ["SSH_AUTHORIZED_KEYS", "TORCHYARD_PROBE_TOKEN"])
def test_a_session_has_no_secrets(name: str) -> None:
    assert GOOD.session is not None
    session = replace(GOOD.session, environment={**GOOD.session.environment, name: "x"})
    assert f"stay out of them: {name}" in told(replace(GOOD, session=session))


def test_a_shell_may_print_before_python_does() -> None:
    assert ssh._session('welcome\n["/p", {"A": "b"}]\n') == Session("/p", {"A": "b"})
    assert "'welcome'" in ssh._session("welcome").executable


def test_every_setting_is_demanded() -> None:
    probe = a_probe()
    ssh.judge_configuration(probe, {})
    assert len(probe.findings) == len(ssh._DEMANDED) - len(ssh._OPTIONAL)
    good = a_probe()
    ssh.judge_configuration(good, {**ssh._DEMANDED, "macs": "hmac-sha2-256", "hostkeyalgorithms": "rsa-sha2-256"})
    assert good.findings == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hostkeyalgorithms", "ssh-ed25519,ssh-rsa"),
        ("pubkeyacceptedalgorithms", "ssh-dss"),
        ("ciphers", "aes128-ctr,3des-cbc"),
        ("macs", "hmac-sha1-etm@openssh.com"),
        ("kexalgorithms", "diffie-hellman-group1-sha1"),
    ],
)
def test_weak_algorithms_are_named(name: str, value: str) -> None:
    probe = a_probe()
    ssh.judge_configuration(probe, {**ssh._DEMANDED, name: value})
    (finding,) = probe.findings
    assert finding.what == f"{name} of the SSH server are too weak: {value.rpartition(',')[2]}"
