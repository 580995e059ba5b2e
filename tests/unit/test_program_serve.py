"""The generation service: what it refuses, what it answers, what it does under load and when it is told to end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from tests.support import serving
from tests.support.serving import END, PROGRAM, Characters, model_folder

serve = serving.load_program()
ROOT = Path(__file__).parents[2]
TOKEN = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CANARY = "canary-4d1c"

# --------------------------------------------------------------------------- settings, token, model directory


def test_settings_come_from_the_environment() -> None:
    settings = serve.Settings.of({"TORCHYARD_PORT": "9000", "TORCHYARD_MODEL": "/m", "PORT": "1", "TORCHYARD_X": "y"})
    assert (settings.port, settings.model, settings.max_queue) == (9000, Path("/m"), 64)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(serve.ConfigError) as caught:
        serve.Settings.of({"TORCHYARD_PORT": "http", "TORCHYARD_DEADLINE_S": "inf", "TORCHYARD_MAX_QUEUE": "0"})
    said = str(caught.value)
    assert "\n" not in said
    assert all(f"TORCHYARD_{name} is" in said for name in ("PORT", "DEADLINE_S", "MAX_QUEUE"))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TORCHYARD_TOKEN": ""}, "TORCHYARD_TOKEN is empty"),
        ({"TORCHYARD_TOKEN": "hunter2"}, "TORCHYARD_TOKEN has 7 characters, which can be guessed"),
        ({"TORCHYARD_TOKEN": "a token with several spaces"}, "has spaces"),
        ({"TORCHYARD_TOKEN": "ein-schönes-langes-wort"}, "beyond ASCII"),
        ({"TORCHYARD_TOKEN": TOKEN, "TORCHYARD_TOKEN_FILE": "/t"}, "both set"),
        ({"TORCHYARD_TOKEN_FILE": "/nowhere/token"}, "/nowhere/token: No such file or directory"),
        ({"TORCHYARD_TOKEN_FILE": "/"}, "Is a directory"),
        ({"HOME": "/dev/null"}, "Not a directory"),
    ],
)
def test_a_token_that_is_none_is_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(serve.ConfigError, match=re.escape(says)):
        serve.obtain_token(environment)


def test_a_given_token_is_taken_out_of_the_environment(tmp_path: Path) -> None:
    environment = {"TORCHYARD_TOKEN": TOKEN, "HOME": str(tmp_path)}
    assert serve.obtain_token(environment) == TOKEN
    assert "TORCHYARD_TOKEN" not in environment
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_token_comes_from_a_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + ending)
    assert serve.obtain_token({"TORCHYARD_TOKEN_FILE": str(path)}) == TOKEN


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff" * 20])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(serve.ConfigError, match=re.escape(str(path))):
        serve.obtain_token({"TORCHYARD_TOKEN_FILE": str(path)})


def test_a_token_is_made_and_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = os.umask(0)
    try:
        token = serve.obtain_token({"HOME": str(tmp_path)})
    finally:
        os.umask(old)
    path = tmp_path / ".local/share/torchyard/serve-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 40
    assert capsys.readouterr().out.count(token) == 1
    assert serve.obtain_token({"HOME": str(tmp_path)}) == token
    assert capsys.readouterr().out == ""


def test_an_empty_token_that_was_kept_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ".local/share/torchyard/serve-token"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(serve.ConfigError, match="is empty"):
        serve.obtain_token({"HOME": str(tmp_path)})


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without("config.json"), "config.json: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is corrupt"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is corrupt"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is corrupt"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is corrupt"),
        (lambda folder: (folder / "config.json").write_text('{"auto_map": {}}'), "never run here"),
        (_without("model.safetensors"), "there are none"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "is a pickle"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    folder = model_folder(tmp_path / "model")
    serve.check_files(folder)
    spoil(folder)
    with pytest.raises(serve.ConfigError, match=re.escape(says)) as caught:
        serve.check_files(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).suffix != ".safetensors")
    with pytest.raises(serve.ConfigError, match=r"uid \d+ cannot read .*/model\.safetensors: chmod"):
        serve.check_files(folder)


@pytest.mark.parametrize("path", ["/nowhere", "/etc/passwd"])
def test_a_place_that_is_no_directory_is_refused(path: str) -> None:
    with pytest.raises(serve.ConfigError, match="mount one"):
        serve.check_files(Path(path))


# --------------------------------------------------------------------------- what may be asked for

LIMITS = serve.Settings(max_batch=3, max_new_tokens=100, max_prompt_tokens=200, max_body_bytes=4096)
BAD: Sequence[tuple[Any, str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt.0"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 5.1}, "temperature"),
    ({"prompt": "a", "temperature": 1e-9}, "temperature"),
    ({"prompt": "a", "temperature": "1"}, "temperature"),
    ({"prompt": "a", "temperature": True}, "temperature"),
    ({"prompt": "a", "top_k": -1}, "top_k"),
    ({"prompt": "a", "top_k": 1.5}, "top_k"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_p": 1.01}, "top_p"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 101}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 10**400}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": None}, "max_new_tokens"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**63}, "seed"),
    ({"prompt": "a", "stop": [""]}, "stop.0"),
    ({"prompt": "a", "stop": ["x"] * 9}, "stop"),
    ({"prompt": "a", "stop": ["x" * 101]}, "stop.0"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream": 1}, "stream"),
    ({"prompt": "a", "max_tokens": 1}, "max_tokens"),
    ({"prompt": ["a"] * 4}, "4 prompts, at most 3"),
    ([], "body: Input should be an object"),
    ("text", "body: Input should be an object"),
    (None, "body: Input should be an object"),
]
NOT_JSON = [b"", b"{", b"\xff", b'{"prompt": "\\ud800"}', b"NaN", b"[" * 100_000, b'{"prompt": "a"} {}']


@pytest.mark.parametrize(("document", "says"), BAD, ids=[json.dumps(document)[:50] for document, _ in BAD])
def test_what_must_not_be_asked_for_is_named(document: Any, says: str) -> None:
    with pytest.raises(serve.ApiError, match=re.escape(says)) as caught:
        serve.parse(json.dumps(document).encode(), LIMITS)
    assert caught.value.status == 422


@pytest.mark.parametrize("body", NOT_JSON, ids=[repr(body[:20]) for body in NOT_JSON])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(serve.ApiError) as caught:
        serve.parse(body, LIMITS)
    assert caught.value.status in (400, 422)


def test_infinity_is_no_number() -> None:
    for value in ("Infinity", "NaN", "1e999"):
        with pytest.raises(serve.ApiError):
            serve.parse(f'{{"prompt": "a", "temperature": {value}}}'.encode(), LIMITS)


def test_the_defaults() -> None:
    asked = serve.parse(b'{"prompt": "a"}', LIMITS)
    assert (asked.prompt, asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p) == (["a"], 100, 1, 0, 1)
    assert 0 <= asked.seed < 2**63
    assert serve.parse(b'{"prompt": "a"}', LIMITS).seed != asked.seed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from([*serve.Asked.model_fields, "model", "n"])


@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_whatever_is_asked_for_is_within_bounds_or_refused(document: Mapping[str, Any]) -> None:
    body = json.dumps(document).encode()
    try:
        asked = serve.parse(body, LIMITS)
    except serve.ApiError:
        with pytest.raises(serve.ApiError) as caught:
            serve.parse(body, LIMITS)
        assert caught.value.status in (400, 422)
        json.dumps(caught.value.body, allow_nan=False, ensure_ascii=False).encode()
        return
    assert set(document) <= set(serve.Asked.model_fields)
    assert 1 <= len(asked.prompt) <= 3
    assert all(asked.prompt)
    assert asked.temperature == 0 or 0.01 <= asked.temperature <= 5
    assert 0 < asked.top_p <= 1
    assert 0 <= asked.top_k <= 100_000
    assert 0.5 <= asked.repetition_penalty <= 2
    assert 1 <= asked.max_new_tokens <= 100
    assert 0 <= asked.seed < 2**63
    assert len(asked.stop) <= 8


@given(st.binary(max_size=100))
def test_whatever_bytes_come_are_refused(body: bytes) -> None:
    with pytest.raises(serve.ApiError):
        serve.parse(body, LIMITS)


# --------------------------------------------------------------------------- tokens become text


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the text ends if a stop string that is complete first is cut off; None if there is none."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@given(
    st.text(alphabet="abé🙂", max_size=30),
    st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_pieces_are_the_text_up_to_a_stop_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    content = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=10)) | {0, len(content)})
    parts = [content[a:b] for a, b in pairwise(cuts)]
    made = serve.Text(lambda tokens: b"".join(parts[it] for it in tokens).decode(errors="replace"), [], stops)
    pieces = []
    for token in range(len(parts)):
        pieces.append(made.add(token))
        if made.stopped:
            break
    pieces.append(made.end())
    end = _first_stop(text, stops)
    assert "".join(pieces) == text[:end]
    assert made.stopped == (end is not None)


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    made = serve.Text(lambda tokens: "".join(map(chr, tokens)), [ord("P")], ["stop"])
    shown = [made.add(ord(character)) for character in "a st one"]
    assert shown == ["a", " ", "", "", "st ", "o", "n", "e"]


def test_a_space_that_depends_on_the_prompt_is_kept() -> None:
    words = ["Hello", "world", "again"]
    made = serve.Text(lambda tokens: " ".join(words[it] for it in tokens), [0], [])
    assert [made.add(1), made.add(2), made.end()] == [" world", " again", ""]


@pytest.mark.parametrize("cut", [0, 3, 12, 15, 24])
def test_a_prompt_is_not_cut_within_a_character(cut: int) -> None:
    def decode(tokens: list[int]) -> str:
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(tokens)

    content = "日本語のテキスト".encode()
    made = serve.Text(decode, list(content[:cut]), [])
    assert "".join(made.add(byte) for byte in content[cut:]) + made.end() == content[cut:].decode()


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    made = serve.Text(lambda tokens: bytes(tokens).decode(errors="replace"), [], [])
    assert [made.add(0x61), made.add(0xF0), made.add(0x9F), made.end()] == ["a", "", "", "\ufffd"]


# --------------------------------------------------------------------------- HTTP, without a network


@dataclass
class Service:
    client: TestClient
    worker: Any
    model: Characters

    def post(self, document: Any, headers: Mapping[str, str] = BEARER) -> Any:
        return self.client.post("/generate", content=json.dumps(document), headers=dict(headers))

    def events(self, document: Mapping[str, Any]) -> list[tuple[str, Any]]:
        answer = self.post({**document, "stream": True})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return parse_events(answer.text)


def parse_events(text: str) -> list[tuple[str, Any]]:
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    assert "".join(f"event: {name}\ndata: {data}\n\n" for name, data in found) == text
    return [(name, json.loads(data)) for name, data in found]


Start = Callable[..., Service]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the service with a model of characters; its thread is gone after the test."""
    workers: list[Any] = []

    def started(model: Characters | None = None, *, ready: bool = True, **settings: Any) -> Service:
        made = model or Characters()
        loaded = threading.Event()

        def load() -> Characters:
            if not ready:
                loaded.wait(30)
            return made

        values = serve.Settings(**settings)
        worker = serve.Worker(load, values, loaded.set)
        worker.start()
        workers.append((worker, loaded, made))
        end = time.monotonic() + 10
        while ready and worker.state != "ready" and time.monotonic() < end:
            time.sleep(0.001)
        app = serve.build_app(values, TOKEN, worker)
        return Service(TestClient(app, raise_server_exceptions=False), worker, made)

    yield started
    for worker, loaded, model in workers:
        loaded.set()
        if model.gate is not None:
            model.gate.set()
        worker.drain()
        worker.join(10)
        assert not worker.is_alive()


def code_of(answer: Any) -> str:
    error = answer.json()["error"]
    assert set(error) <= {"code", "message", "details"}
    assert error["message"]
    return str(error["code"])


def test_an_answer(start: Start) -> None:
    answer = start().post({"prompt": "abc", "max_new_tokens": 5, "seed": 7})
    assert answer.status_code == 200
    assert answer.json() == {
        "seed": 7,
        "answers": [
            {"index": 0, "text": "cbacb", "prompt_tokens": 3, "new_tokens": 5, "finish_reason": "length"},
        ],
    }


def test_a_batch_is_answered_in_order(start: Start) -> None:
    service = start()
    answers = service.post({"prompt": ["ab", "cde"], "max_new_tokens": 3, "stop": ["dc"]}).json()["answers"]
    assert [(it["index"], it["text"], it["finish_reason"]) for it in answers] == [
        (0, "bab", "length"),
        (1, "e", "stop"),
    ]
    assert [it["new_tokens"] for it in answers] == [3, 3]


@pytest.mark.parametrize(
    "document",
    [
        {"prompt": "abc", "max_new_tokens": 9},
        {"prompt": "abc", "max_new_tokens": 9, "stop": "ba"},
        {"prompt": ["abc", "xyz"], "max_new_tokens": 4, "stop": ["cb", "yx"]},
        {"prompt": f"a{chr(END)}bc", "max_new_tokens": 9},
    ],
)
def test_a_stream_gives_the_same_text(start: Start, document: dict[str, Any]) -> None:
    service = start()
    whole = service.post({**document, "seed": 1}).json()
    events = service.events({**document, "seed": 1})
    assert [name for name, _ in events].count("end") == 1
    assert events[-1][0] == "end"
    texts = [""] * len(whole["answers"])
    for name, data in events[:-1]:
        assert name == "text"
        texts[data["index"]] += data["text"]
    ended = events[-1][1]
    assert ended["seed"] == 1
    assert [{**it, "text": text} for it, text in zip(ended["answers"], texts, strict=True)] == whole["answers"]


def test_the_end_token_ends_an_answer(start: Start) -> None:
    (answer,) = start().post({"prompt": f"{chr(END)}bc"}).json()["answers"]
    assert (answer["text"], answer["finish_reason"], answer["new_tokens"]) == ("cb", "end", 3)


def test_the_model_is_asked_what_was_asked(start: Start) -> None:
    service = start()
    service.post({"prompt": "a", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5, "seed": 3})
    (asked,) = service.model.asked
    values = (asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty, asked.seed, asked.max_new_tokens)
    assert values == (0.5, 3, 0.9, 1.5, 3, 128)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN.upper()}"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/generate"), ("GET", "/metrics")])
def test_without_the_token_nothing_is_answered(start: Start, headers: Any, method: str, path: str) -> None:
    service = start()
    answer = service.client.request(method, path, headers=headers, content=b'{"prompt": "a"}')
    assert answer.status_code == 401
    assert code_of(answer) == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert service.model.asked == []


def test_the_token_is_not_taken_from_the_address(start: Start) -> None:
    assert start().client.post(f"/generate?token={TOKEN}", content=b'{"prompt": "a"}').status_code == 401


def test_of_a_stranger_nothing_is_read(start: Start) -> None:
    def body() -> Iterator[bytes]:
        raise AssertionError("read")
        yield b""

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b"", "state": {}}
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read before the token is looked at")

    async def send(message: Any) -> None:
        sent.append(message)

    app: Any = start().client.app
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


def test_the_metrics_can_be_public(start: Start) -> None:
    service = start(public_metrics=True)
    assert service.client.get("/metrics").status_code == 200


def test_the_metrics_count(start: Start) -> None:
    service = start()
    service.post({"prompt": ["abc", "de"], "max_new_tokens": 4})
    service.post({"prompt": ""})
    text = service.client.get("/metrics", headers=BEARER).text
    assert 'torchyard_requests_total{path="/generate",status="200"} 1.0' in text
    assert 'torchyard_requests_total{path="/generate",status="422"} 1.0' in text
    assert 'torchyard_tokens_total{of="prompts"} 5.0' in text
    assert 'torchyard_tokens_total{of="answers"} 8.0' in text
    assert 'torchyard_answers_total{finish_reason="length"} 2.0' in text
    assert "torchyard_waiting 0.0" in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("POST", "/generate/", 404, "not_found"),
    ],
)
def test_other_addresses_are_errors_of_the_same_shape(
    start: Start, method: str, path: str, status: int, code: str
) -> None:
    answer = start().client.request(method, path, headers=BEARER, follow_redirects=False)
    assert (answer.status_code, code_of(answer)) == (status, code)


@pytest.mark.parametrize(("document", "_"), BAD[:3])
def test_a_bad_request_names_its_fields(start: Start, document: Any, _: str) -> None:
    answer = start().post(document)
    assert answer.status_code == 422
    assert code_of(answer) == "invalid_request"
    assert answer.json()["error"]["details"][0]["field"].startswith("prompt")


def test_a_prompt_that_is_too_long(start: Start) -> None:
    service = start(max_prompt_tokens=10)
    answer = service.post({"prompt": ["short", "x" * 11]})
    assert (answer.status_code, code_of(answer)) == (413, "prompt_too_long")
    assert "prompt 1 has 11 tokens, at most 10" in answer.text
    assert service.model.steps == 0
    assert service.post({"prompt": "x" * 10}).status_code == 200


def test_a_prompt_that_leaves_no_room_in_the_models_context(start: Start) -> None:
    service = start(Characters(context=20))
    assert service.post({"prompt": "x" * 10, "max_new_tokens": 10}).status_code == 200
    answer = service.post({"prompt": "x" * 10, "max_new_tokens": 11, "stream": True})
    assert (answer.status_code, code_of(answer)) == (413, "prompt_too_long")


def test_a_body_that_is_too_large_is_not_read_to_its_end(start: Start) -> None:
    read = 0

    def parts() -> Iterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1024
            yield b"x" * 1024

    service = start(max_body_bytes=2048)
    answer = service.client.post("/generate", content=parts(), headers=BEARER)
    assert (answer.status_code, code_of(answer)) == (413, "body_too_large")


def test_a_model_that_fails_fails_one_request(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(asked: Any) -> None:
        if asked.prompt == [CANARY]:
            raise RuntimeError(f"cannot read {asked.prompt}")

    service = start(Characters(before=fail))
    answer = service.post({"prompt": CANARY})
    assert (answer.status_code, code_of(answer)) == (500, "internal")
    assert CANARY not in answer.text
    assert service.post({"prompt": "a"}).status_code == 200
    printed = capsys.readouterr()
    assert CANARY not in printed.out + printed.err
    assert '"kind": "RuntimeError"' in printed.out


def test_the_model_can_refuse(start: Start) -> None:
    def full(_: Any) -> None:
        raise serve.ApiError(503, "out_of_memory", "the GPU's memory does not hold this")

    service = start(Characters(before=full))
    for stream in (False, True):
        answer = service.post({"prompt": "a", "stream": stream})
        assert (answer.status_code, code_of(answer)) == (503, "out_of_memory")


def test_a_model_that_fails_in_the_middle_of_a_stream_says_so(start: Start) -> None:
    def fail(tokens: list[int]) -> str:
        if model.steps > 3:
            raise RuntimeError("no")
        return "".join(map(chr, tokens))

    model = Characters()
    model.decode = fail  # type: ignore[method-assign]
    events = start(model).events({"prompt": "abcd"})
    assert [name for name, _ in events][-1] == "error"
    assert events[-1][1]["error"]["code"] == "internal"


def test_a_loading_service_is_alive_but_not_ready(start: Start) -> None:
    service = start(ready=False)
    assert (service.client.get("/healthz").status_code, service.client.get("/healthz").json()) == (
        200,
        {"status": "loading"},
    )
    assert service.client.get("/readyz").status_code == 503
    answer = service.post({"prompt": "a"})
    assert (answer.status_code, code_of(answer), answer.headers["retry-after"]) == (503, "loading", "5")


def test_a_ready_service_says_so_and_no_more(start: Start) -> None:
    client = start().client
    assert (client.get("/healthz").json(), client.get("/readyz").json()) == ({"status": "ready"}, {"status": "ready"})


def test_a_service_without_its_thread_is_dead(start: Start) -> None:
    def broken(_: Any) -> None:
        raise serve.BrokenError("the GPU failed")

    service = start(Characters(before=broken))
    answer = service.post({"prompt": "a"})
    assert (answer.status_code, code_of(answer)) == (500, "broken")
    service.worker.join(10)
    assert isinstance(service.worker.failure, serve.BrokenError)
    assert service.client.get("/healthz").status_code == 503


def test_nothing_that_was_said_is_in_the_log(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    service = start()
    service.post({"prompt": CANARY, "max_new_tokens": 64, "stop": ["zz"]})
    service.events({"prompt": CANARY, "max_new_tokens": 64})
    service.post({"prompt": CANARY, CANARY: 1})
    service.post({"prompt": "a"}, {"Authorization": f"Bearer {CANARY}-wrong-token"})
    service.client.get(f"/{CANARY}?token={CANARY}")
    service.client.post(f"/generate?prompt={CANARY}", content=CANARY, headers={**BEARER, "User-Agent": CANARY})
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["status"] for line in lines if line["event"] == "request"] == [200, 200, 422, 401, 404, 400]
    said = printed.out + printed.err
    assert CANARY not in said
    assert CANARY[::-1] not in said
    assert TOKEN not in said


# --------------------------------------------------------------------------- the queue


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def test_the_queue_is_bounded_and_in_order(start: Start) -> None:
    gate = threading.Event()
    service = start(Characters(gate=gate), max_queue=3)

    def queued(number: int) -> bool:
        return service.worker.running is not None and len(service.worker.waiting) == number

    threads = []
    for number in range(4):
        threads.append(in_thread(partial(service.post, {"prompt": "ab", "seed": number})))
        wait_for(partial(queued, number))
    refused = service.post({"prompt": "x"})
    assert (refused.status_code, code_of(refused)) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    gate.set()
    for thread, _ in threads:
        thread.join(10)
    assert [answers[0].status_code for _, answers in threads] == [200] * 4
    assert [asked.seed for asked in service.model.asked] == [0, 1, 2, 3]
    assert service.post({"prompt": "x"}).status_code == 200


def test_who_waits_too_long_is_told_so(start: Start) -> None:
    gate = threading.Event()
    service = start(Characters(gate=gate), deadline_s=1)
    first = in_thread(lambda: service.post({"prompt": "ab"}))
    wait_for(lambda: service.worker.running)
    second = in_thread(lambda: service.post({"prompt": "ab"}))
    time.sleep(1.1)
    gate.set()
    for thread, _ in (first, second):
        thread.join(10)
    assert first[1][0].json()["answers"][0]["finish_reason"] == "deadline"
    assert (second[1][0].status_code, code_of(second[1][0])) == (504, "deadline_exceeded")


def test_a_step_that_does_not_end_is_not_waited_for(start: Start) -> None:
    gate = threading.Event()
    service = start(Characters(gate=gate), deadline_s=1)
    began = time.monotonic()
    answer = service.post({"prompt": "ab"})
    assert (answer.status_code, code_of(answer)) == (504, "deadline_exceeded")
    assert 3 <= time.monotonic() - began < 8


def test_draining_sends_away_who_waits_and_finishes_what_runs(start: Start) -> None:
    gate = threading.Event()
    service = start(Characters(gate=gate))
    first = in_thread(lambda: service.post({"prompt": "ab", "max_new_tokens": 2}))
    wait_for(lambda: service.worker.running)
    second = in_thread(lambda: service.post({"prompt": "ab"}))
    wait_for(lambda: service.worker.waiting)
    service.worker.drain()
    second[0].join(10)
    assert (second[1][0].status_code, code_of(second[1][0])) == (503, "draining")
    assert service.post({"prompt": "ab"}).status_code == 503
    assert service.client.get("/readyz").status_code == 503
    gate.set()
    first[0].join(10)
    assert first[1][0].json()["answers"][0]["finish_reason"] == "length"


# --------------------------------------------------------------------------- the whole program


@dataclass
class Process:
    process: subprocess.Popen[str]
    port: int
    log: Path

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, document: Any = None) -> tuple[int, Any]:
        connection = self.connection()
        try:
            connection.request(method, path, None if document is None else json.dumps(document), BEARER)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(content)

    def start_stream(self, document: Mapping[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self.connection()
        connection.request("POST", "/generate", json.dumps({**document, "stream": True}), BEARER)
        answer = connection.getresponse()
        assert answer.status == 200
        return connection, answer

    def healthy(self) -> bool:
        try:
            return self.ask("GET", "/healthz")[0] == 200
        except OSError:
            return False

    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM, *, seconds: float = 20) -> tuple[int, float]:
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(seconds), time.monotonic() - began


Run = Callable[..., Process]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run the program with a model of characters, in a process that is gone after the test."""
    running: list[subprocess.Popen[str]] = []

    def started(*, ready: str = "ready", **settings: object) -> Process:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHYARD_")},
            "PYTHONPATH": str(ROOT),
            "TORCHYARD_TOKEN": TOKEN,
            "TORCHYARD_MODEL": str(model_folder(tmp_path / "model")),
            "TORCHYARD_PORT": str(port),
            "TORCHYARD_HOST": "127.0.0.1",
            **{name: str(value) for name, value in settings.items()},
        }
        log = tmp_path / f"log-{port}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.serving"],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            )  # fmt: skip
        running.append(process)
        one = Process(process, port, log)
        if ready:
            wait_for(lambda: process.poll() is not None or (one.healthy() and ready in log.read_text()), 30)
            assert process.poll() is None, log.read_text()
        return one

    yield started
    for process in running:
        process.kill()
        process.wait()


def test_a_thousand_at_once(run: Run) -> None:
    service = run(TORCHYARD_MAX_QUEUE=20, TEST_PAUSE_S=0.002)
    body = json.dumps({"prompt": "abc", "max_new_tokens": 5}).encode()
    request = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()

    async def all_of_them() -> list[bytes]:
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(1000))), 120)

    answers = asyncio.run(all_of_them())
    good = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ")]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429 ")]
    assert len(good) + len(refused) == 1000
    assert len(good) >= 21
    assert len(refused) >= 100
    assert all(b'"text":"cbacb"' in answer for answer in good)
    assert all(b"retry-after: " in answer and b"queue_full" in answer for answer in refused)
    assert service.ask("POST", "/generate", {"prompt": "abc", "max_new_tokens": 2})[0] == 200
    assert service.end()[0] == 0
    statuses = [record["status"] for record in service.records() if record["event"] == "request"]
    assert len(statuses) == 1001


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_answered_any_longer(run: Run, stream: bool) -> None:  # noqa: FBT001
    service = run(TEST_PAUSE_S=0.05, TORCHYARD_MAX_NEW_TOKENS=100_000)
    document = {"prompt": "abc", "max_new_tokens": 100_000}
    connection = service.connection()
    connection.request("POST", "/generate", json.dumps({**document, "stream": stream}), BEARER)
    time.sleep(0.5)
    connection.close()
    began = time.monotonic()
    assert service.ask("POST", "/generate", {"prompt": "abc", "max_new_tokens": 1})[0] == 200
    assert time.monotonic() - began < 5
    assert any(record.get("error") == "cancelled" for record in service.records())


def test_who_leaves_the_queue_is_not_generated_for(run: Run) -> None:
    service = run(TEST_PAUSE_S=0.05)
    running, answer = service.start_stream({"prompt": "abc", "max_new_tokens": 20})
    waiting = service.connection()
    waiting.request("POST", "/generate", json.dumps({"prompt": "abc", "max_new_tokens": 1000}), BEARER)
    time.sleep(0.2)
    waiting.close()
    answer.read()
    running.close()
    began = time.monotonic()
    assert service.ask("POST", "/generate", {"prompt": "abc", "max_new_tokens": 1})[0] == 200
    assert time.monotonic() - began < 5


def test_a_signal_lets_a_generation_end(run: Run) -> None:
    service = run(TEST_PAUSE_S=0.05)
    connection, answer = service.start_stream({"prompt": "abc", "max_new_tokens": 30})
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in service.log.read_text())
    assert service.ask("POST", "/generate", {"prompt": "abc"})[0] == 503
    assert service.ask("GET", "/readyz")[0] == 503
    assert service.ask("GET", "/healthz") == (200, {"status": "draining"})
    name, data = parse_events(answer.read().decode())[-1]
    connection.close()
    assert (name, data["answers"][0]["finish_reason"], data["answers"][0]["new_tokens"]) == ("end", "length", 30)
    assert service.process.wait(10) == 0


def test_a_generation_is_cut_when_the_grace_is_over(run: Run) -> None:
    service = run(TEST_PAUSE_S=0.05, TORCHYARD_GRACE_S=4)
    connection, answer = service.start_stream({"prompt": "abc", "max_new_tokens": 1000})
    code, seconds = service.end()
    name, data = parse_events(answer.read().decode())[-1]
    connection.close()
    assert (name, data["answers"][0]["finish_reason"]) == ("end", "shutdown")
    assert (code, seconds < 4) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_does_not_end_does_not_keep_the_service(run: Run, number: int) -> None:
    service = run(TORCHYARD_GRACE_S=3)
    thread, answers = in_thread(lambda: service.ask("POST", "/generate", {"prompt": "hang"}))
    time.sleep(0.5)
    code, seconds = service.end(number)
    assert (code, seconds < 4) == (0, True)
    thread.join(10)
    assert answers[0][0] == 503
    assert answers[0][1]["error"]["code"] == "draining"


def test_a_signal_while_the_model_is_loaded(run: Run) -> None:
    service = run(ready="started", TEST_LOAD_S=60)
    assert service.ask("GET", "/healthz") == (200, {"status": "loading"})
    code, seconds = service.end()
    assert (code, seconds < 3) == (0, True)


def test_a_model_that_cannot_be_loaded_ends_it(run: Run) -> None:
    service = run(ready="", TEST_CORRUPT=1)
    assert service.process.wait(20) == 2
    assert "torchyard-serve: cannot load /models: it is corrupt\n" in service.log.read_text()
    assert "Traceback" not in service.log.read_text()


def test_a_gpu_that_fails_ends_it(run: Run) -> None:
    service = run()
    assert service.ask("POST", "/generate", {"prompt": "break"})[0] == 500
    assert service.process.wait(20) == 1
    assert "torchyard-serve: the GPU failed\n" in service.log.read_text()


def test_a_port_that_is_taken(run: Run) -> None:
    first = run()
    second = run(ready="", TORCHYARD_PORT=first.port)
    assert second.process.wait(20) == 2
    assert f"cannot listen on 127.0.0.1:{first.port}: Address already in use" in second.log.read_text()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"TORCHYARD_TOKEN": ""}, "TORCHYARD_TOKEN is empty"),
        ({"TORCHYARD_MODEL": "/nowhere"}, "no model in /nowhere"),
        ({"TORCHYARD_MAX_QUEUE": "many"}, "TORCHYARD_MAX_QUEUE is 'many'"),
        ({"TORCHYARD_HOST": "no such host"}, "cannot listen on no such host"),
    ],
)
def test_a_bad_start_is_one_line_and_exit_code_2(run: Run, settings: Mapping[str, str], says: str) -> None:
    service = run(ready="", **settings)
    assert service.process.wait(20) == 2
    lines = service.log.read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("torchyard-serve: ")
    assert says in lines[0]


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--port", "80"]) == 2
    assert "takes no argument" in capsys.readouterr().err


def _health(port: int | str) -> tuple[int, str]:
    # Without site-packages: nothing but the standard library is there to be imported.
    environment = {"TORCHYARD_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", PROGRAM, "--health"], capture_output=True, text=True, env=environment, check=False,
        timeout=20,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_health_is_asked_for_without_importing_anything(run: Run) -> None:
    service = run()
    assert _health(service.port) == (0, 'HTTP 200 {"status":"ready"}\n')
    service.end()
    code, said = _health(service.port)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("no answer: ConnectionRefusedError")
    assert _health("http")[0] == 1
