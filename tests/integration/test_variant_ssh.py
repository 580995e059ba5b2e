"""The ssh image as people use it: logged in to by OpenSSH's own client, and closed to everybody else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.integration.conftest import torch_of_family, torchyard
from tests.support.container import Container, docker

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

TORCH = torch_of_family()
START_S = 30.0
FINGERPRINT = re.compile(r"torchyard-ssh: host key (SHA256:[A-Za-z0-9+/]{43}) \(ED25519\)")
KEPT = "/home/torch/.local/share/torchyard/ssh/ssh_host_ed25519_key"
NO_PRIVILEGES = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges")
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Key:
    """A pair of keys of somebody who logs in."""

    private: Path

    @property
    def public(self) -> str:
        return self.private.with_suffix(".pub").read_text().strip()


def new_key(place: Path, kind: str = "ed25519", *options: str) -> Key:
    private = place / f"key-{len(list(place.iterdir()))}"
    command = ["ssh-keygen", "-q", "-t", kind, *options, "-N", "", "-C", "me@laptop", "-f", str(private)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return Key(private)


@dataclass(frozen=True)
class Running(Container):
    key: Key | None = None

    @property
    def port(self) -> int:
        return self.published(2222)

    def command(self, *options: str, program: str = "ssh") -> list[str]:
        """Return the client's command up to the host, without any configuration of this machine."""
        assert self.key is not None
        settings = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": os.devnull,
            "LogLevel": "ERROR",
        }
        words = [program, "-F", "none", "-i", str(self.key.private)]
        words += [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        return [*words, "-P" if program == "sftp" else "-p", str(self.port), *options]

    def ssh(self, *words: str, options: Sequence[str] = (), user: str = "torch", given: str = "") -> Done:
        command = [*self.command(*options), f"{user}@127.0.0.1", *words]
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)

    def tell(self, *words: str) -> str:
        done = self.ssh(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as made:
                if made.recv(8) == b"SSH-2.0-":
                    return
            assert self.state["Running"], self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    @property
    def fingerprints(self) -> list[str]:
        """Of the host key at each start."""
        return FINGERPRINT.findall(self.log)


@contextlib.contextmanager
def started(image: str, key: Key, *options: str) -> Iterator[Running]:
    """Start a container for who has the key, as the documentation says; gone afterwards."""
    given = ("-e", f"SSH_AUTHORIZED_KEYS={key.public}", "-p", "127.0.0.1::2222")
    done = docker("run", "-d", *given, *options, image)
    assert done.returncode == 0, done.stderr
    running = Running(done.stdout.strip(), key)
    try:
        running.wait()
        yield running
    finally:
        docker("rm", "-f", "-v", running.id)


def refused(image: str, *options: str) -> str:
    """Start a container that must not start, and return the line that says why."""
    began = time.monotonic()
    done = docker("run", "--rm", *options, image)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert time.monotonic() - began < START_S
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def image(variant_image: Callable[[str], str]) -> str:
    return variant_image("ssh")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return new_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def first(image: str, key: Key) -> Iterator[Running]:
    """A container as it is started by most, with a health check that does not wait."""
    options = ("--health-interval", "2s", "--health-start-period", "1s", "-e", "MINE=a \"b\" 'c' $HOME #d \\e")
    with started(image, key, *options, "-e", "HF_TOKEN=hush", *NO_PRIVILEGES) as running:
        yield running


# --------------------------------------------------------------------------- who gets in


def test_a_key_is_the_only_way_in(first: Running, tmp_path: Path) -> None:
    asked = replace(first, key=new_key(tmp_path)).ssh("true", options=["-v", "-o", "LogLevel=DEBUG1"])
    assert asked.returncode == 255
    assert "Permission denied (publickey)." in asked.stderr
    assert set(re.findall(r"Authentications that can continue: (\S+)", asked.stderr)) == {"publickey"}
    # As a client that has nothing but a password, and no reason not to ask for it.
    word = shutil.which("true")
    done = subprocess.run(
        ["ssh", "-F", "none", "-o", "PubkeyAuthentication=no", "-o", "StrictHostKeyChecking=no",
         "-o", f"UserKnownHostsFile={os.devnull}", "-p", str(first.port), "torch@127.0.0.1", "true"],
        env={**os.environ, "SSH_ASKPASS": str(word), "SSH_ASKPASS_REQUIRE": "force"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 255
    assert "Permission denied (publickey)." in done.stderr


@pytest.mark.parametrize("user", ["root", "daemon", "sshd", "nobody-at-all"])
def test_the_key_opens_one_account(first: Running, user: str) -> None:
    assert "Permission denied (publickey)." in first.ssh("true", user=user).stderr


def test_the_container_is_healthy_and_its_log_is_short(first: Running) -> None:
    end = time.monotonic() + START_S
    while first.state["Health"]["Status"] != "healthy":
        assert time.monotonic() < end, first.state["Health"]
        time.sleep(0.2)
    time.sleep(5)
    assert "kex_exchange_identification" not in first.log
    assert first.key is not None
    assert first.key.public.split()[1] not in first.log


# --------------------------------------------------------------------------- what they find


def test_a_session_is_the_image(first: Running) -> None:
    code = "import json, os, sys, torch; print(json.dumps([sys.executable, torch.__version__, dict(os.environ)]))"
    executable, torch, environment = json.loads(first.tell(f"python -c {shlex.quote(code)}"))
    assert (executable, torch) == ("/opt/venv/bin/python", TORCH)
    config = json.loads(docker("inspect", "-f", "{{json .Config}}", first.id).stdout)
    given = dict(entry.split("=", 1) for entry in config["Env"])
    for name in set(given) - {"HF_TOKEN", "SSH_AUTHORIZED_KEYS"}:
        assert environment[name] == given[name], name
    assert not {"HF_TOKEN", "SSH_AUTHORIZED_KEYS"} & set(environment)
    assert environment["MINE"] == "a \"b\" 'c' $HOME #d \\e"
    assert "look like secrets: HF_TOKEN\n" in first.log
    assert "hush" not in first.log


def test_a_login_shell_finds_the_image_s_python(first: Running) -> None:
    assert first.tell("bash -lc 'command -v python'") == "/opt/venv/bin/python\n"
    done = first.ssh(options=["-tt"], given="echo found $(command -v python) $(whoami); exit\n")
    assert "found /opt/venv/bin/python torch" in done.stdout.replace("\r", "")


def test_a_session_is_an_ordinary_one(first: Running) -> None:
    assert first.tell("umask; pwd; id -u; id -g").split() == ["0022", "/home/torch", "1000", "0"]
    assert first.ssh("exit 7").returncode == 7
    done = first.ssh("tty", options=["-tt"])
    assert re.match(r"/dev/pts/\d+", done.stdout)


def test_files_are_transferred(first: Running, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(os.urandom(1 << 20))
    batch = f"put {tmp_path}/sent /workspace/got\nget /workspace/got {tmp_path}/back\n"
    command = [*first.command("-b", "-", program="sftp"), "torch@127.0.0.1"]
    subprocess.run(command, input=batch, text=True, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()


# --------------------------------------------------------------------------- forwarding


def forwarded(running: Running) -> bytes:
    """Return what sshd's own port says to a client that reaches it through a session."""
    command = [*running.command("-W", "127.0.0.1:2222"), "torch@127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            return process.stdout.read(8)
        finally:
            process.kill()


def test_ports_are_forwarded_if_asked_for(image: str, key: Key, first: Running) -> None:
    assert forwarded(first) == b""
    with started(image, key, "-e", "SSH_PORT_FORWARDING=local") as running:
        assert forwarded(running) == b"SSH-2.0-"
        remote = ["-o", "ExitOnForwardFailure=yes", "-R", "9999:127.0.0.1:9"]
        assert running.ssh("true", options=remote).returncode == 255


# --------------------------------------------------------------------------- host keys


def test_each_container_has_a_host_key_of_its_own_and_keeps_it(image: str, key: Key, first: Running) -> None:
    with started(image, key) as running:
        (mine,) = running.fingerprints
        assert [mine] != first.fingerprints
        assert running.tell(f"stat -c '%a %u' {KEPT} {Path(KEPT).parent}") == "600 1000\n700 1000\n"
        began = time.monotonic()
        assert docker("restart", running.id).returncode == 0
        assert time.monotonic() - began < 8
        running.wait()
        assert running.fingerprints == [mine, mine]
        assert running.tell(f"ssh-keygen -l -f {KEPT}").split()[1] == mine


def test_no_key_is_in_the_image(image: str) -> None:
    command = "find / -xdev ( -name ssh_host_* -o -name authorized_keys* -o -name id_* -path *.ssh* ) -type f"
    done = docker("run", "--rm", "--user", "0:0", "--entrypoint", "find", image, *command.split()[1:])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_sigterm_ends_it_and_its_sessions(image: str, key: Key) -> None:
    with started(image, key) as running:
        command = [*running.command("-tt"), "torch@127.0.0.1", "sleep 600"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as session:
            end = time.monotonic() + START_S
            while "sleep 600" not in docker("top", running.id, "-eo", "pid,args").stdout:
                assert time.monotonic() < end
                time.sleep(0.1)
            began = time.monotonic()
            assert docker("stop", running.id).returncode == 0
            assert time.monotonic() - began < 8
            assert session.wait(10) == 255
        assert running.state["ExitCode"] == 0


# --------------------------------------------------------------------------- keys, users, places


def test_keys_may_be_mounted(image: str, key: Key, tmp_path: Path) -> None:
    # Copied, not mounted, since the engine may be on another machine.
    (tmp_path / "authorized_keys").write_text(f"# mine\n{key.public}\n")
    (tmp_path / "authorized_keys").chmod(0o444)
    for place in ("/run/secrets", "/home/torch/.ssh"):
        made = docker("create", "-p", "127.0.0.1::2222", "-v", place, image).stdout.strip()
        running = Running(made, key)
        try:
            assert docker("cp", f"{tmp_path}/authorized_keys", f"{made}:{place}/authorized_keys").returncode == 0
            assert docker("start", made).returncode == 0
            running.wait()
            assert running.tell("echo here") == "here\n"
            assert f"keys: 1 from {place}/authorized_keys" in running.log
        finally:
            docker("rm", "-f", "-v", made)


def test_bad_keys_are_refused(image: str, key: Key, tmp_path: Path) -> None:
    assert "no public key was given" in refused(image)
    assert "SSH_AUTHORIZED_KEYS has no key" in refused(image, "-e", "SSH_AUTHORIZED_KEYS=")
    malformed = refused(image, "-e", f"SSH_AUTHORIZED_KEYS={key.public}\nssh-ed25519 AAAAhello")
    assert "SSH_AUTHORIZED_KEYS, line 2: this is no public key" in malformed
    assert "hello" not in malformed
    private = key.private.read_text()
    told = refused(image, "-e", f"SSH_AUTHORIZED_KEYS={private}")
    assert "line 1: this is a PRIVATE key" in told
    assert private.splitlines()[1] not in told
    short = new_key(tmp_path, "rsa", "-b", "1024").public
    assert "RSA with 1024 bits is too weak" in refused(image, "-e", f"SSH_AUTHORIZED_KEYS={short}")


def test_root_is_refused(image: str, key: Key) -> None:
    assert "does not run as root" in refused(image, "--user", "0", "-e", f"SSH_AUTHORIZED_KEYS={key.public}")


@pytest.mark.parametrize("options", [(), ("--tmpfs", "/tmp")])
def test_nothing_need_be_writable(image: str, key: Key, options: Sequence[str]) -> None:
    with started(image, key, "--read-only", *options, *NO_PRIVILEGES) as running:
        assert running.tell("command -v python") == "/opt/venv/bin/python\n"
        assert re.match(r"/dev/pts/\d+", running.ssh("tty", options=["-tt"]).stdout)
        assert "this host key lasts as long as the container" in running.log


def test_any_user_id_of_group_0_will_do(image: str, key: Key) -> None:
    with started(image, key, "--user", "12345:0", *NO_PRIVILEGES) as running:
        code = "import os, pwd; print(os.getuid(), pwd.getpwuid(os.getuid()).pw_name, os.environ['HOME'])"
        assert running.tell(f"python -c {shlex.quote(code)}") == "12345 torch /home/torch\n"
        assert re.match(r"/dev/pts/\d+", running.ssh("tty", options=["-tt"]).stdout)
        assert running.tell(f"stat -c '%a %u' {KEPT}") == "600 12345\n"
        assert docker("stop", running.id).returncode == 0
        assert running.state["ExitCode"] == 0


# --------------------------------------------------------------------------- validation


def test_it_is_valid(image: str, tmp_path: Path) -> None:
    only = ("--only", "svc.sshd", "--only", "sec.sshd")
    ran = torchyard("validate", image, *only, "--report-dir", str(tmp_path))
    assert ran.code == 0, ran.out + ran.err
    (report,) = tmp_path.rglob("report.json")
    results = {result["id"]: result["status"] for result in json.loads(report.read_text())["results"]}
    assert results == {"svc.sshd": "pass", "sec.sshd": "pass"}
