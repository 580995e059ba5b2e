"""The llm image as people use it: its service under load, refused where it would be unsafe, stopped while it works."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.container import Container, docker
from tests.support.mutated import in_container
from tests.support.mutations import all_mutations, complaint
from validate.checks.serve import MODEL_CODE, events

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

TOKEN = "correct-horse-battery-staple"
PRINTED = re.compile(r"^torchyard-serve: token, shown this once and kept in (\S+): (\S{40,})$", re.MULTILINE)
ALONE = ("--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL", "--network", "none")
CONFINED = ("--user", "12345:0", "--env=NVIDIA_VISIBLE_DEVICES=void", *ALONE)
"""As any user, without a GPU, and meant so: an image with CUDA says nothing about that then."""
CANARY = "the quick brown canary"
START_S = 120.0
MAKE = f"""{MODEL_CODE}
import os, pathlib, shutil
models = pathlib.Path("/models")
model.save_pretrained(models / "good")
tokenizer.save_pretrained(models / "good")
for name in ("cut", "poor", "pickled", "code", "wordy"):
    shutil.copytree(models / "good", models / name)
weights = (models / "cut/model.safetensors").read_bytes()
(models / "cut/model.safetensors").write_bytes(weights[:-1000])
from safetensors.torch import load_file, save_file
tensors = load_file(models / "good/model.safetensors")
del tensors["model.layers.1.mlp.up_proj.weight"]
save_file(tensors, models / "poor/model.safetensors", metadata={{"format": "pt"}})
(models / "pickled/model.safetensors").unlink()
torch.save(model.state_dict(), models / "pickled/pytorch_model.bin")
config = json.loads((models / "code/config.json").read_text())
(models / "code/config.json").write_text(json.dumps({{**config, "auto_map": {{"AutoModel": "evil.Model"}}}}))
tokenizer.add_tokens(["more", "words"])
tokenizer.save_pretrained(models / "wordy")
# Weights are written for their owner alone.
shutil.copytree(models / "good", models / "private")
for path in models.rglob("*"):
    if path.is_file() and path.parent.name != "private":
        path.chmod(0o644)
"""
"""Models on a volume: a good one; cut off, without a tensor, pickled, with code, with more words than it knows."""


@dataclass(frozen=True)
class Running(Container):
    token: str = TOKEN

    @property
    def port(self) -> int:
        return self.published(8000)

    def ask(self, method: str, path: str, document: Any = None, *, token: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body=json.dumps(document) if document else None, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if path != "/metrics" else text

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            assert self.state["Running"], self.log
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/readyz")[0] == 200:
                    return
            assert time.monotonic() < end, self.log
            time.sleep(0.2)


@pytest.fixture(scope="module")
def image(variant_image: Callable[[str], str]) -> str:
    return variant_image("llm")


@pytest.fixture(scope="module")
def models(image: str) -> Iterator[str]:
    """A volume with models, made by the image's own transformers."""
    name = docker("volume", "create").stdout.strip()
    try:
        done = docker("run", "--rm", "--network", "none", "-v", f"{name}:/models", image, "python", "-c", MAKE)
        assert done.returncode == 0, done.stderr
        yield name
    finally:
        docker("volume", "rm", "-f", name)


@contextlib.contextmanager
def started(image: str, models: str, *options: str, model: str = "good", **settings: object) -> Iterator[Running]:
    """Start a container as the documentation says; gone afterwards."""
    given = [f"--env=TORCHYARD_{name}={value}" for name, value in {"MODEL": f"/models/{model}", **settings}.items()]
    # By a name: one that is made and cannot be started has to go, too.
    running = Running(f"torchyard-test-llm-{secrets.token_hex(4)}")
    try:
        made = ["run", "-d", "--name", running.id, "-p", "127.0.0.1::8000", "-v", f"{models}:/models:ro"]
        done = docker(*made, *given, *options, image)
        assert done.returncode == 0, done.stderr
        yield running
    finally:
        docker("rm", "-f", "-v", running.id)


@pytest.fixture(scope="module")
def first(image: str, models: str) -> Iterator[Running]:
    """A container started with nothing given but a model, and the token that it printed."""
    # The image's health check, without its first half minute.
    health = ("--health-interval", "2s", "--health-start-period", "1s")
    with started(image, models, *health, MAX_QUEUE=32, MAX_PROMPT_TOKENS=100) as running:
        running.wait()
        ((_, token),) = PRINTED.findall(running.log)
        yield Running(running.id, token)


def test_only_the_token_opens_it(first: Running) -> None:
    asked = {"prompt": CANARY, "max_new_tokens": 4}
    for token in ("", TOKEN, first.token[:-1]):
        assert first.ask("POST", "/generate", asked, token=token)[0] == 401
    status, answer = first.ask("POST", "/generate", asked)
    assert (status, answer["answers"][0]["new_tokens"]) == (200, 4)


def test_its_token_is_printed_once_and_kept_in_one_private_place(first: Running) -> None:
    assert first.log.count(first.token) == 1
    assert first.token not in docker("top", first.id, "-eo", "args").stdout
    path = "/home/torch/.local/share/torchyard/serve-token"
    assert first.run("stat", "-c", "%a %u", path).stdout == "600 1000\n"


def test_greedy_answers_repeat_and_batches_answer_each(first: Running) -> None:
    asked = {"prompt": [CANARY, "fox"], "max_new_tokens": 16, "temperature": 0}
    answers = [first.ask("POST", "/generate", asked)[1]["answers"] for _ in range(2)]
    assert answers[0] == answers[1]
    assert [it["prompt_tokens"] for it in answers[0]] == sorted(
        (it["prompt_tokens"] for it in answers[0]), reverse=True
    )
    assert all(len(it["text"]) >= 16 for it in answers[0])


def test_the_engine_finds_it_healthy(first: Running) -> None:
    end = time.monotonic() + 60
    while first.state["Health"]["Status"] != "healthy":
        assert time.monotonic() < end, first.state["Health"]
        time.sleep(0.5)
    assert first.state["Health"]["Log"][-1]["Output"] == 'HTTP 200 {"status":"ready"}\n'


def test_a_prompt_that_is_too_long(first: Running) -> None:
    status, answer = first.ask("POST", "/generate", {"prompt": "fox " * 200})
    assert (status, answer["error"]["code"]) == (413, "prompt_too_long")
    assert re.search(r"prompt 0 has \d+ tokens, at most 100", answer["error"]["message"])


def test_a_thousand_at_once(first: Running) -> None:
    port = first.port
    body = json.dumps({"prompt": CANARY, "max_new_tokens": 2}).encode()
    request = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {first.token}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()

    async def all_of_them() -> list[bytes]:
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(1000))), 180)

    statuses = [answer.split(maxsplit=2)[1] for answer in asyncio.run(all_of_them())]
    assert set(statuses) == {b"200", b"429"}
    assert statuses.count(b"200") >= 33
    assert first.ask("POST", "/generate", {"prompt": CANARY, "max_new_tokens": 2})[0] == 200
    text = first.ask("GET", "/metrics")[1]
    assert f'torchyard_requests_total{{path="/generate",status="429"}} {float(statuses.count(b"429"))}' in text
    assert "torchyard_waiting 0.0" in text


def test_its_log_has_no_prompt(first: Running) -> None:
    first.ask("POST", "/generate", {"prompt": CANARY, CANARY: 1})
    log = first.log
    assert '"event": "request"' in log
    assert CANARY not in log


def test_for_any_user_on_a_read_only_root_and_stopped_while_it_generates(image: str, models: str) -> None:
    options = ("--user", "12345:0", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "-v", "/cache")
    with started(image, models, *options, TOKEN=TOKEN, MAX_NEW_TOKENS=500) as running:
        running.wait()
        assert running.run("sh", "-c", 'touch "$HF_HOME/model" && id -u').stdout == "12345\n"
        document = json.dumps({"prompt": "fox", "max_new_tokens": 500, "temperature": 0, "stream": True})
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            connection.request("POST", "/generate", document, headers)
            answer = connection.getresponse()
            text = answer.read1(100)
            stopping = subprocess.Popen(["docker", "stop", "-t", "20", running.id], stdout=subprocess.DEVNULL)
            began = time.monotonic()
            text += answer.read()
        assert stopping.wait(30) == 0
        assert time.monotonic() - began < 11
        name, data = events(text.decode())[-1]
        assert name == "end"
        assert data["answers"][0]["finish_reason"] in ("length", "shutdown")
        assert (running.state["ExitCode"], running.state["OOMKilled"]) == (0, False)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("none", "no model in /models/none: /models/none: No such file or directory"),
        ("private", "uid 12345 cannot read /models/private/model.safetensors: chmod"),
        ("pickled", "pytorch_model.bin is a pickle"),
        ("code", "asks for Python code of the model's own"),
        ("cut", "cannot load /models/cut: SafetensorError"),
        ("poor", "no model.layers.1.mlp.up_proj.weight in the weights"),
        ("wordy", "the tokenizer has"),
    ],
)
def test_a_model_that_is_none_ends_it_with_one_line(image: str, models: str, model: str, says: str) -> None:
    options = [f"--env=TORCHYARD_MODEL=/models/{model}", f"--env=TORCHYARD_TOKEN={TOKEN}", "-v", f"{models}:/models:ro"]
    done = docker("run", "--rm", *CONFINED, *options, image)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("torchyard-serve: ")]
    assert says in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("token", ["", "short"])
def test_a_token_that_is_none_ends_it(image: str, models: str, token: str) -> None:
    options = ["--env=TORCHYARD_MODEL=/models/good", f"--env=TORCHYARD_TOKEN={token}", "-v", f"{models}:/models:ro"]
    done = docker("run", "--rm", *CONFINED, *options, image)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"torchyard-serve: TORCHYARD_TOKEN {'has 5 characters' if token else 'is empty'}")


def test_it_validates_itself(image: str) -> None:
    only = [f"--only={pattern}" for pattern in ("llm.*", "svc.generate")]
    done = docker("run", "--rm", *ALONE, image, "torchyard-validate", *only, "--json", timeout_s=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    results = [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "result"]
    passed = {event["id"] for event in results if event["status"] == "pass"}
    assert passed >= {"llm.transformers", "llm.export", "llm.accelerate", "svc.generate"}, results


TRACE = f"""{MODEL_CODE}
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, tokens, mask):
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

draw = torch.Generator().manual_seed(4)
tokens = [torch.randint(2, len(tokenizer), shape, generator=draw) for shape in ((1, 12), (1, 29), (3, 7))]
masks = [torch.ones_like(batch) for batch in tokens]
masks[-1][0, :3] = 0
with torch.no_grad():
    wrapped = Logits(model).eval()
    torch.jit.trace(wrapped, (tokens[0], masks[0])).save("/tmp/traced.pt")
    torch.save([(batch, mask, wrapped(batch, mask)) for batch, mask in zip(tokens, masks)], "/tmp/truth.pt")
"""
LOAD = """
import json, sys
import torch
traced = torch.jit.load("/tmp/traced.pt")
truth = torch.load("/tmp/truth.pt", weights_only=True)
with torch.no_grad():
    apart = [float((traced(batch, mask) - logits)[mask.bool()].abs().max()) for batch, mask, logits in truth]
print(json.dumps([apart, float(truth[0][2].std()), "transformers" in sys.modules]))
"""
"""Another process, which has nothing but torch and the file."""


def test_a_traced_model_computes_the_same_without_transformers(image: str) -> None:
    """Its mask is an argument: without one transformers writes the batch size of the example into the graph."""
    programs = ("--env", f"TRACE={TRACE}", "--env", f"LOAD={LOAD}")
    done = docker("run", "--rm", *ALONE, *programs, image, "sh", "-ec", 'python -c "$TRACE"; python -c "$LOAD"')
    assert done.returncode == 0, done.stdout + done.stderr
    apart, spread, imported = json.loads(done.stdout.splitlines()[-1])
    assert spread > 0.1, "logits that say something"
    assert max(apart) < 1e-4, "for the tokens it was traced with, for more of them, and for a padded batch"
    assert not imported


MUTATIONS: Sequence[Any] = [mutation for mutation in all_mutations() if mutation.needs == "llm"]


@pytest.fixture(scope="module")
def results(image: str) -> Mapping[int, Any]:
    """What the checks said where they must fail, by the number of the mutation: one container for all."""
    return in_container(image, MUTATIONS, deadline_s=600)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[f"{it.check} {it.name}" for it in MUTATIONS])
def test_a_check_fails_where_it_must(results: Mapping[int, Any], number: int) -> None:
    assert complaint(MUTATIONS[number], results[number]) is None
