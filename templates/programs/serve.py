#!/opt/venv/bin/python
"""Serve a language model from a directory: POST /generate, GET /healthz, /readyz and /metrics.

From top to bottom: the health check, settings, the token, what may be asked for, how tokens become text, the worker
with its queue, HTTP, the model, the start. All but the model works, and is tested, without torch and transformers.

One thread owns the model. Requests wait in a bounded queue and are answered one at a time, in the order they came; the
prompts of one request are computed as one batch. Requests are not merged: that is what vLLM and its like are for.
"""

import asyncio
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

PORT = 8000


def health() -> int:
    """Ask the service beside this process whether it is alive; print one line and return 0 or 1."""
    host = os.environ.get("TORCHYARD_HOST", "0.0.0.0")
    try:
        port = int(os.environ.get("TORCHYARD_PORT", PORT))
        # Unlike urllib this heeds no proxy of the environment.
        connection = http.client.HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, timeout=5)
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        print(f"HTTP {response.status} {response.read(200).decode('utf-8', 'replace')}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"no answer: {type(error).__name__}: {error}")
        return 1
    return 0 if response.status == 200 else 1


if __name__ == "__main__" and sys.argv[1:] == ["--health"]:
    sys.exit(health())  # twice a minute: before anything large is imported

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# --------------------------------------------------------------------------- settings


class ConfigError(Exception):
    """What is wrong with the settings or the model, why, and what to try, in one line; the process ends with 2."""


class Settings(BaseModel):
    """Each is the environment variable TORCHYARD_<NAME>."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    model: Path = Path("/models")
    host: str = "0.0.0.0"  # of the container: `docker run -p 127.0.0.1:8000:8000` says who reaches it
    port: int = Field(PORT, ge=1, le=65535)
    public_metrics: bool = False
    max_prompt_tokens: int = Field(4096, ge=1, le=10_000_000)
    max_new_tokens: int = Field(1024, ge=1, le=1_000_000)
    max_batch: int = Field(8, ge=1, le=256)
    max_body_bytes: int = Field(1 << 20, ge=1 << 10, le=1 << 28)
    max_queue: int = Field(64, ge=1, le=100_000)
    deadline_s: float = Field(120, ge=1, le=86_400)
    grace_s: float = Field(9, ge=3, le=3_600)  # from SIGTERM to the end; docker stop waits 10 s

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Settings":
        """Read them; raises ConfigError with all that is wrong."""
        variables = {name: f"TORCHYARD_{name.upper()}" for name in cls.model_fields}
        try:
            return cls.model_validate({name: environment[it] for name, it in variables.items() if it in environment})
        except ValidationError as error:
            found = (f"{variables[str(it['loc'][0])]} is {it['input']!r}: {it['msg']}" for it in error.errors())
            raise ConfigError("; ".join(found)) from None


# --------------------------------------------------------------------------- the token


def obtain_token(environment: MutableMapping[str, str]) -> str:
    """Return the token that requests must bring: the one that is given, or one made at the first start and kept."""
    name, value = "TORCHYARD_TOKEN", environment.pop("TORCHYARD_TOKEN", None)
    file = environment.get("TORCHYARD_TOKEN_FILE")
    if value is not None and file is not None:
        raise ConfigError("TORCHYARD_TOKEN and TORCHYARD_TOKEN_FILE are both set: leave one out")
    if value is None:
        path = Path(environment.get("HOME", "/"), ".local/share/torchyard/serve-token") if file is None else Path(file)
        name = str(path)
        try:
            if file is None:
                make_token(path)
            value = path.read_text("utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"no token in {path}: {why}: make it accessible, or set TORCHYARD_TOKEN") from None
    if len(value) < 16:
        what = f"has {len(value)} characters, which can be guessed: give 16 or more" if value else "is empty: give one"
        raise ConfigError(f"{name} {what} (openssl rand -hex 32), or none and one is made")
    if not all("!" <= character <= "~" for character in value):
        raise ConfigError(f"{name} has spaces or characters beyond ASCII, which HTTP headers cannot hold: give another")
    return value


def make_token(path: Path) -> None:
    """Make a token that only this user can read and print it, this once; one that exists is left as it is."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        token = secrets.token_urlsafe(32)
        with open(descriptor, "w") as stream:
            stream.write(f"{token}\n")
        print(f"torchyard-serve: token, shown this once and kept in {path}: {token}", flush=True)


# --------------------------------------------------------------------------- what may be asked for


class ApiError(Exception):
    """An answer that is no success; all of them have one shape."""

    def __init__(self, status: int, code: str, message: str, *, details: Sequence[Any] = (), **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"code": code, "message": message, **({"details": details} if details else {})}}


OneOrMany = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Asked(BaseModel):
    """The body of POST /generate; the defaults of the sampling parameters change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Annotated[list[Annotated[str, Field(min_length=1)]], OneOrMany, Field(min_length=1)]
    stream: bool = False
    max_new_tokens: int = Field(0, ge=1)  # not given: 128, or the most that the service allows
    temperature: float = Field(1.0, ge=0, le=5)  # 0: the likeliest token, always
    top_k: int = Field(0, ge=0, le=100_000)  # 0: of all tokens
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.5, le=2)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], OneOrMany, Field(max_length=8)] = []

    @field_validator("temperature")
    @classmethod
    def _not_nearly_zero(cls, value: float) -> float:
        if 0 < value < 0.01:  # logits divided by it can overflow
            raise ValueError("should be 0 (greedy), or at least 0.01")
        return value


def parse(body: bytes, settings: Settings) -> Asked:
    """Return what a body asks for; raises ApiError if it is not JSON, not allowed, or too much."""
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise ApiError(400, "invalid_json", found[0]["msg"]) from None
        details = [{"field": ".".join(map(str, it["loc"])) or "body", "message": it["msg"]} for it in found[:10]]
        message = "; ".join(f"{it['field']}: {it['message']}" for it in details)
        raise ApiError(422, "invalid_request", message, details=details) from None
    if len(asked.prompt) > settings.max_batch:
        raise ApiError(422, "batch_too_large", f"{len(asked.prompt)} prompts, at most {settings.max_batch} at once")
    if asked.max_new_tokens > settings.max_new_tokens:
        raise ApiError(422, "invalid_request", f"max_new_tokens: at most {settings.max_new_tokens} here")
    most = asked.max_new_tokens or min(128, settings.max_new_tokens)
    seed = secrets.randbelow(1 << 63) if asked.seed is None else asked.seed
    return asked.model_copy(update={"max_new_tokens": most, "seed": seed})


# --------------------------------------------------------------------------- tokens become text


class Text:
    """The text of one answer: tokens go in, and what is certain of their text comes out.

    A character can take several tokens, and a stop string can begin in one and end in another: what later tokens may
    change is held back. The last tokens of the prompt are decoded with the first new ones, and so on, because a token's
    text can depend on the one before it: a space, mostly.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str]) -> None:
        # From where a character begins: some tokenizers decode no byte of a row whose first is in the middle of one.
        tails = [list(prompt[-count:]) for count in range(8, 12)]  # a character has four tokens at most
        self._tokens = next((tail for tail in tails if "\ufffd" not in decode(tail)), tails[0])
        self._decode, self._stop = decode, stop
        self._start, self._read, self._held = 0, len(self._tokens), ""
        self.stopped = False
        """Whether a stop string is complete; it is not part of the text."""

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self._tokens.append(token)
        return self._release(final=False)

    def end(self) -> str:
        """Return what was held back."""
        return "" if self.stopped else self._release(final=True)

    def _release(self, *, final: bool) -> str:
        known, text = self._decode(self._tokens[self._start : self._read]), self._decode(self._tokens[self._start :])
        if final or not text.endswith("\ufffd"):  # which stands for the first bytes of a character
            self._held += text[len(known) :]
            self._start, self._read = self._read, len(self._tokens)
        # The one that is complete first, however the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        begun = [n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        self.stopped = bool(found)
        cut = min(found)[1] if found else len(self._held) - (0 if final else max(begun, default=0))
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain


# --------------------------------------------------------------------------- the worker


class Model(Protocol):
    """What the worker needs of a model."""

    context: int | None  # most tokens of a prompt and its answer together, if there is a limit
    ends: frozenset[int]  # tokens that end an answer

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""

    def generate(self, prompts: list[list[int]], asked: Asked, step: Callable[[list[int]], list[bool]]) -> None:
        """Call `step` with the next token of each prompt, `max_new_tokens` times or until it says that each is done.

        Raises ApiError where it cannot do that, and BrokenError where it never will again.
        """


class BrokenError(Exception):
    """The model cannot be used any more, as after an error of the GPU: only a new process helps."""


class Piece(NamedTuple):
    """Some more text of the answer to one of the prompts, counted from 0."""

    prompt: int
    text: str


class Ended(NamedTuple):
    """All answers are complete: for each, in order, the numbers of its tokens and what ended it."""

    answers: list[dict[str, Any]]


Event = Piece | Ended | ApiError


@dataclass(eq=False)
class Job:
    """One request in the queue or at work; `send` takes what becomes of it, from any thread."""

    asked: Asked
    deadline: float
    send: Callable[[Event], None]
    cut: str = ""  # why it must end before its time, "cancelled" or "shutdown"; set by any thread

    @property
    def over(self) -> str:
        """Why it must end now; empty if it need not."""
        return self.cut or ("deadline" if time.monotonic() > self.deadline else "")


class Worker(threading.Thread):
    """The thread that owns the model, and the queue before it."""

    def __init__(self, load: Callable[[], Model], settings: Settings, on_end: Callable[[], None]) -> None:
        super().__init__(name="model", daemon=True)
        self._load, self._settings, self._on_end = load, settings, on_end
        self._changed, self._usual_s = threading.Condition(), 1.0
        self.state = "loading"  # then "ready", then "draining"
        self.failure: Exception | None = None
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None

    def check(self) -> None:
        """Raise ApiError if no request can be taken now."""
        if self.state != "ready":
            why = "the model is being loaded" if self.state == "loading" else "the service is shutting down"
            raise ApiError(503, self.state, why, Retry_After="5")
        if len(self.waiting) >= self._settings.max_queue:
            wait_s = round(min(60.0, max(1.0, len(self.waiting) * self._usual_s)))
            raise ApiError(429, "queue_full", f"{len(self.waiting)} requests are waiting", Retry_After=str(wait_s))

    def admit(self, job: Job) -> None:
        """Put a job at the end of the queue; raises ApiError if there is no room."""
        with self._changed:
            self.check()
            self.waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Take a job out of the queue, or have it end at the next token."""
        with self._changed:
            job.cut = job.cut or "cancelled"
            with contextlib.suppress(ValueError):
                self.waiting.remove(job)

    def drain(self) -> None:
        """Take no more jobs and send away those that wait; the thread ends after the one it is at."""
        with self._changed:
            self.state = "draining"
            for job in self.waiting:
                job.send(ApiError(503, "draining", "the service is shutting down", Retry_After="5"))
            self.waiting.clear()
            self._changed.notify()

    def run(self) -> None:
        """Load the model, then answer until the service is drained."""
        try:
            model = self._load()
            with self._changed:
                self.state = "ready" if self.state == "loading" else self.state
            log("ready")
            while job := self._next():
                began = time.monotonic()
                self._answer(model, job)
                self._usual_s += 0.2 * (time.monotonic() - began - self._usual_s)
        except Exception as error:
            self.failure = error
        finally:
            self._on_end()

    def _next(self) -> Job | None:
        with self._changed:
            self.running = None
            self._changed.wait_for(lambda: self.waiting or self.state == "draining")
            self.running = self.waiting.popleft() if self.waiting else None
            return self.running

    def _answer(self, model: Model, job: Job) -> None:
        try:
            job.send(Ended(answer(model, job, self._settings)))
        except ApiError as error:
            job.send(error)
        except BrokenError:
            job.send(ApiError(500, "broken", "the model cannot be used any more; the service ends"))
            raise
        except Exception as error:  # one request must not end the service
            last = traceback.extract_tb(error.__traceback__)[-1]
            log(
                "error", kind=type(error).__name__, where=f"{last.filename}:{last.lineno}"
            )  # its text may be a prompt's
            job.send(ApiError(500, "internal", "the generation failed; the service's log says where"))


def answer(model: Model, job: Job, settings: Settings) -> list[dict[str, Any]]:
    """Generate the answers of a job, sending text as it comes; return what each of them came to."""
    if job.over:
        raise ApiError(504, "deadline_exceeded", f"it waited longer than {settings.deadline_s:g} s in the queue")
    prompts, new = [model.encode(prompt) for prompt in job.asked.prompt], job.asked.max_new_tokens
    for index, prompt in enumerate(prompts):
        size = f"prompt {index} has {len(prompt)} tokens"
        if not prompt:
            raise ApiError(422, "invalid_request", size)
        if len(prompt) > settings.max_prompt_tokens:
            raise ApiError(413, "prompt_too_long", f"{size}, at most {settings.max_prompt_tokens} are allowed")
        if model.context is not None and len(prompt) + new > model.context:
            raise ApiError(413, "prompt_too_long", f"{size}, with {new} new ones more than the model's {model.context}")
    texts = [Text(model.decode, prompt, job.asked.stop) for prompt in prompts]
    reasons, counts = [""] * len(prompts), [0] * len(prompts)

    def step(tokens: list[int]) -> list[bool]:
        for index, token in enumerate(tokens):
            if reasons[index]:
                continue
            counts[index] += 1
            if token in model.ends:
                reasons[index] = "end"
            elif text := texts[index].add(token):
                job.send(Piece(index, text))
            reasons[index] = reasons[index] or ("stop" if texts[index].stopped else job.over)
        return [bool(reason) for reason in reasons]

    model.generate(prompts, job.asked, step)
    for index, text in enumerate(texts):
        if rest := text.end():
            job.send(Piece(index, rest))
        reasons[index] = "stop" if text.stopped else reasons[index] or "length"
    return [
        {"index": index, "prompt_tokens": len(prompt), "new_tokens": counts[index], "finish_reason": reasons[index]}
        for index, prompt in enumerate(prompts)
    ]


# --------------------------------------------------------------------------- HTTP


def log(event: str, **fields: object) -> None:
    """Write one JSON line; never a prompt, a text or a token."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    sys.stdout.write(json.dumps({"time": now, "event": event, **fields}) + "\n")
    sys.stdout.flush()


class Metrics:
    """What /metrics shows."""

    def __init__(self, worker: Worker) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("torchyard_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram("torchyard_request_seconds", "Whole requests", ["path"], registry=registry)
        self.answers = Counter("torchyard_answers", "Answers, by what ended them", ["finish_reason"], registry=registry)
        self.tokens = Counter("torchyard_tokens", "Tokens of prompts and of answers", ["of"], registry=registry)
        Gauge("torchyard_waiting", "Requests in the queue", registry=registry).set_function(lambda: len(worker.waiting))

    def count(self, answers: list[dict[str, Any]]) -> None:
        """Add what a request came to."""
        for it in answers:
            self.answers.labels(it["finish_reason"]).inc()
            self.tokens.labels("prompts").inc(it["prompt_tokens"])
            self.tokens.labels("answers").inc(it["new_tokens"])


class Recorded:
    """ASGI: count each request and write one line about it; probes are not worth one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at its answer."""
        if scope["type"] != "http" or scope["path"] in ("/healthz", "/readyz"):
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0  # 0: the client was gone before there was an answer
        record: dict[str, Any] = {}
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = status or 500
            raise
        finally:
            seconds = round(time.monotonic() - began, 3)
            path = scope["path"] if scope["path"] in ("/generate", "/metrics") else "other"  # it could hold anything
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log("request", path=path, status=status, seconds=seconds, **record)


async def follow(job: Job, events: "asyncio.Queue[Event]", request: Request, worker: Worker) -> AsyncIterator[Event]:
    """Yield what becomes of a job, to its end; it is withdrawn as soon as nobody wants to know any more."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        worker.withdraw(job)
        events.put_nowait(ApiError(499, "cancelled", "the client has gone"))

    watching = asyncio.create_task(watch())
    try:
        event: Event | None = None
        while not isinstance(event, Ended | ApiError):
            try:
                # The worker looks at the deadline after each token; a single one can take longer.
                async with asyncio.timeout_at(job.deadline + 2):
                    event = await events.get()
            except TimeoutError:
                event = ApiError(504, "deadline_exceeded", "the deadline is over, and no token came since")
            yield event
    finally:
        watching.cancel()
        worker.withdraw(job)


def build_app(settings: Settings, token: str, worker: Worker) -> FastAPI:
    """Return the service before a worker."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)  # no pages: they would load scripts from elsewhere
    metrics, expected = Metrics(worker), hashlib.sha256(token.encode()).digest()
    app.add_middleware(Recorded, metrics=metrics)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        getattr(request.state, "record", {})["error"] = error.body["error"]["code"]
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        return await refused(request, ApiError(error.status_code, code, error.detail, **(error.headers or {})))

    @app.exception_handler(Exception)
    async def wrong(request: Request, _: Exception) -> Response:
        return await refused(request, ApiError(500, "internal", "the service made a mistake; its log says where"))

    async def authorized(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip().encode()).digest(), expected)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(401, "unauthorized", "send Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")

    async def parsed(request: Request, _: Annotated[None, Depends(authorized)]) -> Asked:
        worker.check()  # of one who is sent away nothing is read
        body = bytearray()
        try:
            async with asyncio.timeout(10):
                async for part in request.stream():
                    body += part
                    if len(body) > settings.max_body_bytes:
                        raise ApiError(413, "body_too_large", f"at most {settings.max_body_bytes} bytes are allowed")
        except TimeoutError:
            raise ApiError(408, "too_slow", "the body did not come within 10 s") from None
        except ClientDisconnect:
            raise ApiError(499, "cancelled", "the client has gone") from None
        return parse(bytes(body), settings)

    @app.get("/healthz")
    async def healthz() -> Response:
        alive = worker.is_alive() or worker.state == "draining"
        return JSONResponse({"status": worker.state if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503)

    @app.get("/metrics", dependencies=[] if settings.public_metrics else [Depends(authorized)])
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.post("/generate")
    async def generate(request: Request, asked: Annotated[Asked, Depends(parsed)]) -> Response:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(asked, time.monotonic() + settings.deadline_s, send)
        worker.admit(job)
        following = follow(job, events, request, worker)
        texts = [""] * len(asked.prompt)

        def told(event: Event) -> dict[str, Any]:
            if isinstance(event, Piece):
                texts[event.prompt] += event.text
                return {"index": event.prompt, "text": event.text}
            if isinstance(event, ApiError):
                request.state.record["error"] = event.body["error"]["code"]
                return event.body
            request.state.record["answers"] = event.answers
            metrics.count(event.answers)
            return {"seed": asked.seed, "answers": event.answers}

        def sse(event: Event) -> str:
            name = {Piece: "text", Ended: "end", ApiError: "error"}[type(event)]
            return f"event: {name}\ndata: {json.dumps(told(event))}\n\n"

        async def stream(first: Event) -> AsyncIterator[str]:
            yield sse(first)
            async for event in following:
                yield sse(event)

        event = await anext(following)
        if asked.stream and not isinstance(event, ApiError):  # an error before any text has a status of its own
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(stream(event), media_type="text/event-stream", headers=headers)
        document = told(event)
        async for event in following:
            document = told(event)
        if isinstance(event, ApiError):
            raise event
        answers = [{**it, "text": text} for it, text in zip(document["answers"], texts, strict=True)]
        return JSONResponse({**document, "answers": answers})

    return app


# --------------------------------------------------------------------------- the model


def check_files(folder: Path) -> None:
    """Refuse a directory that cannot be a model, or would run code, before anything is loaded."""
    try:
        names = sorted(path.name for path in folder.iterdir())
        config = json.loads((folder / "config.json").read_text("utf-8")).keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "config.json is corrupt"
        raise ConfigError(f"no model in {folder}: {why}: mount one (-v /path/to/model:/models:ro)") from None
    if "auto_map" in config:
        raise ConfigError(f"{folder}/config.json asks for Python code of the model's own, which is never run here")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        why = f"{pickles[0]} is a pickle, and reading one runs whatever code is in it" if pickles else "there are none"
        raise ConfigError(f"no weights in {folder}: {why}: give *.safetensors, which save_pretrained writes")
    for name in names:
        if name.endswith((".safetensors", ".json")) and not os.access(folder / name, os.R_OK):
            raise ConfigError(f"uid {os.getuid()} cannot read {folder / name}: chmod -R a+rX the directory")


class Transformers:
    """A causal language model of transformers: on the first GPU in bfloat16, or on the CPU in float32."""

    def __init__(self, folder: Path) -> None:
        # Before the imports, which read them: nothing is looked for elsewhere.
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch, self._transformers = torch, transformers
        self._device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            self._model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **local
            )
            if found["missing_keys"]:  # transformers would make up numbers for them
                raise ValueError(f"no {', '.join(sorted(found['missing_keys'])[:3])} in the weights")
            self._model.to(self._device).eval()
            self._try()
        except Exception as error:  # whatever is wrong with the directory
            first = next(iter(str(error).strip().splitlines()), "")[:300]
            raise ConfigError(f"cannot load {folder}: {type(error).__name__}: {first}: copy it again") from error
        ends = self._model.generation_config.eos_token_id
        self._model.generation_config = transformers.GenerationConfig()  # what is asked for, not what it recommends
        ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        self.ends = frozenset(ends)
        self.context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else min(ends, default=0)

    def _try(self) -> None:
        """Have the model read a token: the first request should not be the one to find out."""
        rows = self._model.get_input_embeddings().num_embeddings
        if len(self._tokenizer) > rows:  # a GPU does not recover from a token that the model does not have
            raise ValueError(f"the tokenizer has {len(self._tokenizer)} tokens, the model {rows}")
        with self._torch.inference_mode():
            logits = self._model(self._torch.zeros(1, 1, dtype=self._torch.long, device=self._device)).logits
        if not self._torch.isfinite(logits).all():
            raise ValueError("what it computes is not finite")

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, with those that the tokenizer puts around it."""
        return list(self._tokenizer(prompt)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(self, prompts: list[list[int]], asked: Asked, step: Callable[[list[int]], list[bool]]) -> None:
        """Generate with transformers' own loop, in which a stopping criterion sees each token."""
        torch, device, width = self._torch, self._device, max(map(len, prompts))
        samples = asked.temperature > 0
        config = self._transformers.GenerationConfig(
            max_new_tokens=asked.max_new_tokens,
            repetition_penalty=asked.repetition_penalty,
            do_sample=samples,
            **({"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p} if samples else {}),
            pad_token_id=self._pad,
            eos_token_id=sorted(self.ends) or None,
        )

        def watch(tokens: Any, *_: Any, **__: Any) -> Any:
            return torch.tensor(step(tokens[:, -1].tolist()), device=device)

        torch.manual_seed(asked.seed)
        try:
            self._model.generate(
                # Padded on the left, so that all answers begin in one column.
                input_ids=torch.tensor([[self._pad] * (width - len(it)) + it for it in prompts], device=device),
                attention_mask=torch.tensor([[0] * (width - len(it)) + [1] * len(it) for it in prompts], device=device),
                generation_config=config,
                stopping_criteria=self._transformers.StoppingCriteriaList([watch]),
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ApiError(503, "out_of_memory", "the GPU's memory does not hold this: ask for less") from None
        except RuntimeError as error:
            if "CUDA error" in str(error):
                raise BrokenError(f"the GPU failed: {str(error).splitlines()[0]}: see its driver's log") from error
            raise


# --------------------------------------------------------------------------- the start


class Server(uvicorn.Server):
    """Uvicorn, with its signals left to `serve`: by itself it ends with the signal, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def serve(settings: Settings, token: str, load: Callable[[Path], Model]) -> None:
    """Serve until a signal comes, or the worker fails: raises its failure."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}: try another") from None

    def ended() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(stop.set)

    worker = Worker(lambda: load(settings.model), settings, ended)
    app = build_app(settings, token, worker)
    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    worker.start()
    log("started", host=settings.host, port=settings.port, model=str(settings.model))
    await stop.wait()

    log("stopping", waiting=len(worker.waiting), running=worker.running is not None)
    worker.drain()
    if job := worker.running:
        await asyncio.to_thread(worker.join, settings.grace_s - 3)
        job.cut = job.cut or "shutdown"
        await asyncio.to_thread(worker.join, 1)
        # Unless it has ended by now, it is in the middle of a token.
        job.send(ApiError(503, "draining", "the service is shutting down"))
    server.should_exit = True
    await serving
    if worker.failure:
        raise worker.failure


def main(arguments: Sequence[str], load: Callable[[Path], Model] = Transformers) -> int:
    """Run the service and return its exit code."""
    try:
        if arguments:
            raise ConfigError(
                "it takes no argument but --health: its settings are environment variables, TORCHYARD_..."
            )
        settings = Settings.of(os.environ)
        check_files(settings.model)
        asyncio.run(serve(settings, obtain_token(os.environ), load))
    except (ConfigError, BrokenError) as error:
        print(f"torchyard-serve: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the model may be in the middle of a token, which nothing can interrupt
