"""The Compose example as people use it: each service started from the CPU's images, asked, and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import torch_of_family
from validate.checks.serve import MODEL_CODE

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

ROOT = Path(__file__).parents[2]
COMPOSE, COMPOSE_GPU = ROOT / "examples" / "compose.yaml", ROOT / "examples" / "compose.gpu.yaml"
VARIANTS = ("runtime", "devel", "notebook", "ssh", "llm")
MAKE_MODEL = f"""{MODEL_CODE}
model.save_pretrained("/models")
tokenizer.save_pretrained("/models")
"""
SHM, MEMORY = 8 << 30, 32 << 30

VariantImage = Callable[[str], str]


@pytest.fixture(scope="module", autouse=True)
def _compose() -> None:
    done = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"the client has no `docker compose`: {done.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(f"needed in CI: {reason}", pytrace=False)
        pytest.skip(reason)


@dataclass(frozen=True)
class Compose:
    """One service of the example, in a project of its own."""

    service: str
    env: Mapping[str, str]

    def run(self, *arguments: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "-p", f"torchyard-test-{self.service}", "-f", str(COMPOSE)]
        return subprocess.run(
            [*command, "--profile", self.service, *arguments],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def inside(self, *command: str) -> str:
        done = self.run("exec", "-T", self.service, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def port(self, port: int) -> int:
        done = self.run("port", self.service, str(port))
        address, _, number = done.stdout.strip().rpartition(":")
        assert address == "127.0.0.1", "it answers on this machine only"
        return int(number)

    @property
    def logs(self) -> str:
        return self.run("logs", "--no-color", "--no-log-prefix", self.service).stdout

    @property
    def container(self) -> Mapping[str, Any]:
        identity = self.run("ps", "--all", "--quiet", self.service).stdout.strip()
        done = subprocess.run(["docker", "inspect", identity], capture_output=True, text=True, check=True)
        (found,) = json.loads(done.stdout)
        container: Mapping[str, Any] = found
        return container


@contextlib.contextmanager
def up(service: str, **env: str) -> Iterator[Compose]:
    """Start a service and wait until it is well; gone afterwards, with its volumes."""
    compose = Compose(service, env)
    compose.run("down", "--volumes")
    try:
        done = compose.run("up", "--detach", "--wait", "--wait-timeout", "150")
        assert done.returncode == 0, done.stderr + compose.logs
        yield compose
    finally:
        compose.run("down", "--volumes", "--timeout", "5")


def closed(compose: Compose) -> None:
    """Look at what the engine was told, and what the container has of it."""
    host = compose.container["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["ShmSize"], host["Memory"], host["PidsLimit"]) == (SHM, MEMORY, 4096)
    status = compose.inside("cat", "/proc/self/status")
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert compose.inside("sh", "-c", "id -u; id -g").split() == ["1000", "0"]


def stops(compose: Compose) -> None:
    """Stop the service: it ends by itself, and is well content."""
    done = compose.run("stop")
    assert done.returncode == 0, done.stderr
    state = compose.container["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False), compose.logs


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body=json.dumps(body) if body is not None else None, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


# --------------------------------------------------------------------------- the files


@pytest.mark.parametrize("files", [(COMPOSE,), (COMPOSE, COMPOSE_GPU)], ids=["cpu", "gpu"])
def test_compose_accepts_the_files(files: tuple[Path, ...]) -> None:
    command = ["docker", "compose", *(it for file in files for it in ("-f", str(file))), "--profile", "*", "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a variable that is not set, or a key that is out of date"
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == set(VARIANTS)
    devices = {name: one.get("deploy", {}).get("resources", {}).get("reservations") for name, one in services.items()}
    assert all(devices.values()) if COMPOSE_GPU in files else not any(devices.values())


def test_nothing_is_started_without_a_profile() -> None:
    command = ["docker", "compose", "-f", str(COMPOSE), "config", "--services"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --------------------------------------------------------------------------- the services


@pytest.mark.parametrize("variant", ["runtime", "devel"])
def test_a_shell_waits_for_work(variant_image: VariantImage, variant: str) -> None:
    with up(variant, **{f"TORCHYARD_{variant.upper()}": variant_image(variant)}) as compose:
        closed(compose)
        code = "import torch; open('/workspace/x', 'w'); print(torch.ones(2, 2).share_memory_().sum().item())"
        assert compose.inside("python", "-c", code) == "4.0\n"
        compose.inside("sh", "-c", "mkdir -p /home/torch/.cache/torch && df -k /dev/shm | grep -q ' 8388608 '")


def test_jupyter_asks_for_the_token_that_its_log_shows(variant_image: VariantImage) -> None:
    env = {"TORCHYARD_NOTEBOOK": variant_image("notebook"), "TORCHYARD_NOTEBOOK_PORT": "0"}
    with up("notebook", **env) as compose:
        closed(compose)
        port = compose.port(8888)
        assert ask(port, "GET", "/api/contents")[0] == 403
        (token,) = set(re.findall(r"[?&]token=(\w+)", compose.logs))
        assert ask(port, "GET", "/api/contents", Authorization=f"token {token}")[0] == 200
        # A new container of the same service has the same token, because it is on a volume.
        assert compose.run("up", "--detach", "--wait", "--force-recreate").returncode == 0
        port = compose.port(8888)
        assert ask(port, "GET", "/api/contents", Authorization=f"token {token}")[0] == 200
        stops(compose)


def test_ssh_lets_in_who_has_the_key(variant_image: VariantImage, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    env = {
        "TORCHYARD_SSH": variant_image("ssh"),
        "TORCHYARD_SSH_PORT": "0",
        "SSH_AUTHORIZED_KEYS_FILE": f"{key}.pub",
    }
    with up("ssh", **env) as compose:
        closed(compose)
        port = compose.port(2222)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            assert connection.recv(8) == b"SSH-2.0-"
        options = [
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "IdentitiesOnly=yes",
        ]
        command = ["ssh", *options, "-o", f"UserKnownHostsFile={tmp_path / 'hosts'}", "-p", str(port)]
        ran = subprocess.run(
            [*command, "-i", str(key), "torch@127.0.0.1", "python -c 'import torch; print(torch.__version__)'"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert ran.stdout == f"{torch_of_family()}\n", ran.stderr + compose.logs
        refused = subprocess.run([*command, "torch@127.0.0.1", "true"], capture_output=True, check=False, timeout=60)
        assert refused.returncode != 0
        stops(compose)


def test_the_service_generates_text_for_who_has_the_token(variant_image: VariantImage, tmp_path: Path) -> None:
    image, model = variant_image("llm"), tmp_path / "model"
    model.mkdir()
    model.chmod(0o777)
    make = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        f"--volume={model}:/models",
        image,
        "python",
        "-c",
        MAKE_MODEL,
    ]
    done = subprocess.run(make, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    env = {"TORCHYARD_LLM": image, "TORCHYARD_LLM_PORT": "0", "TORCHYARD_MODEL": str(model)}
    with up("llm", **env) as compose:
        closed(compose)
        assert compose.container["HostConfig"]["ReadonlyRootfs"] is True
        port = compose.port(8000)
        body = {"prompt": "Once upon a time", "max_new_tokens": 4}
        assert ask(port, "POST", "/generate", body)[0] == 401
        end = time.monotonic() + 150
        while ask(port, "GET", "/readyz")[0] != 200:  # well it is before, while it reads the model
            assert time.monotonic() < end, compose.logs
            time.sleep(0.5)
        (token,) = re.findall(r"token, shown this once and kept in \S+: (\S+)", compose.logs)
        status, text = ask(port, "POST", "/generate", body, Authorization=f"Bearer {token}")
        assert status == 200, text
        assert json.loads(text)["answers"]
        compose.inside("sh", "-c", "touch /cache/huggingface/x && ! touch /models/x && ! touch /opt/venv/x")
        stops(compose)


def test_a_model_that_is_not_there_is_an_error_and_no_empty_directory(
    variant_image: VariantImage, tmp_path: Path
) -> None:
    env = {"TORCHYARD_LLM": variant_image("llm"), "TORCHYARD_MODEL": str(tmp_path / "nowhere")}
    compose = Compose("llm", env)
    done = compose.run("up", "--detach")
    compose.run("down", "--volumes")
    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert not (tmp_path / "nowhere").exists()
