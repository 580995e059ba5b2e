"""The notebook image as people use it: started, logged in to with a browser, and refused where it would be open."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import torch_of_family
from tests.support.browser import Page, browser
from tests.support.container import Container, docker

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

PROGRAM = "torchyard-notebook"
GOOD = "correct-horse-battery-staple"
URL = re.compile(r"open http://127\.0\.0\.1:8888/lab\?token=([0-9a-f]{48})")
START_S = 60.0
TORCH = torch_of_family()
CELL = "import torch\nprint('this is', 'torch', torch.__version__)"
NOTEBOOK = {
    "cells": [{"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": CELL}],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@dataclass(frozen=True)
class Running(Container):
    @property
    def port(self) -> int:
        return self.published(8888)

    def ask(self, method: str, path: str, token: str = "", document: Any = None, **more: str) -> tuple[int, bytes]:
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        if token:
            headers["Authorization"] = f"token {token}"
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body=json.dumps(document) if document else None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/api")[0] == 200
        return False

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while not self.answers():
            assert time.monotonic() < end, self.log
            assert self.state["Running"], self.log
            time.sleep(0.2)

    def python(self, code: str, *arguments: str) -> str:
        ran = self.run("python", "-c", code, *arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def stop(self) -> None:
        """End it by SIGTERM: by itself and well, or it would be killed, with 137."""
        assert docker("stop", "-t", "30", self.id).returncode == 0
        assert self.state["ExitCode"] == 0


@contextlib.contextmanager
def started(image: str, *options: str, command: Sequence[str] = ()) -> Iterator[Running]:
    """Start a container as the documentation says; gone afterwards."""
    done = docker("run", "-d", "-p", "127.0.0.1::8888", *options, image, *command)
    assert done.returncode == 0, done.stderr
    running = Running(done.stdout.strip())
    try:
        yield running
    finally:
        docker("rm", "-f", "-v", running.id)


@pytest.fixture(scope="module")
def image(variant_image: Callable[[str], str]) -> str:
    return variant_image("notebook")


@pytest.fixture(scope="module")
def first(image: str) -> Iterator[tuple[Running, str]]:
    """A container started with nothing given, and the token that it printed."""
    # The image's health check, without its first half minute.
    with started(image, "--health-interval", "2s", "--health-start-period", "1s") as running:
        running.wait()
        tokens = URL.findall(running.log)
        assert len(tokens) == 1, running.log
        yield running, tokens[0]


def test_only_the_token_opens_it(first: tuple[Running, str]) -> None:
    running, token = first
    for method, path in (
        ("GET", "/api/status"),
        ("GET", "/api/contents"),
        ("POST", "/api/kernels"),
        ("GET", "/metrics"),
    ):
        assert running.ask(method, path)[0] in (401, 403), path
        assert running.ask(method, path, token[:-1])[0] in (401, 403), path
    assert running.ask("GET", "/lab")[0] == 302  # to the page to log in
    status, body = running.ask("GET", "/api/status", token)
    assert (status, json.loads(body)["kernels"]) == (200, 0)


def test_only_the_token_opens_its_sockets(first: tuple[Running, str]) -> None:
    running, token = first
    assert running.ask("POST", "/api/terminals", token)[0] == 200
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec_WebSocket_Version": "13",
        "Origin": _origin(running).rstrip("/"),
    }
    for path in ("/terminals/websocket/1", "/lsp/ws/pyright", "/api/events/subscribe"):
        assert running.ask("GET", path, **upgrade)[0] in (302, 403), path
    assert running.ask("DELETE", "/api/terminals/1", token)[0] == 204


def test_the_token_is_printed_once_and_kept_in_one_private_place(first: tuple[Running, str]) -> None:
    running, token = first
    assert running.log.count(token) == 1
    assert token not in docker("top", running.id, "-eo", "args").stdout
    kept = running.run("stat", "-c", "%a %u %n", "/home/torch/.local/share/torchyard/jupyter-token").stdout
    assert kept == "600 1000 /home/torch/.local/share/torchyard/jupyter-token\n"
    found = running.run("grep", "-rlF", token, "/home/torch", "/tmp", "/workspace").stdout.split()
    modes = running.run("stat", "-c", "%a", *found).stdout.split()
    assert set(modes) == {"600"}, found


def test_its_health_check_is_well(first: tuple[Running, str]) -> None:
    running, _ = first
    ran = running.run(PROGRAM, "--health")
    assert (ran.returncode, ran.stdout.count("\n")) == (0, 1)
    assert re.fullmatch(r"Jupyter Server [\d.]+ answers at http://127\.0\.0\.1:8888/api\n", ran.stdout)
    end = time.monotonic() + 30
    while running.state["Health"]["Status"] != "healthy":
        assert time.monotonic() < end, running.state
        time.sleep(0.5)


def test_nothing_is_asked_of_the_network(first: tuple[Running, str]) -> None:
    running, token = first
    for path in ("/lab/api/news", "/lab/api/update"):
        status, body = running.ask("GET", path, token)
        assert (status, next(iter(json.loads(body).values()))) == (200, [] if path.endswith("news") else None)


# What a terminal of the user interface has in its environment.
TERMINAL = """
import asyncio, json, sys
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

async def main(token):
    headers = {"Authorization": "token " + token}
    url = "127.0.0.1:8888/api/terminals"
    made = await AsyncHTTPClient().fetch(HTTPRequest(f"http://{url}", "POST", headers, body=""))
    name = json.loads(made.body)["name"]
    socket = await websocket_connect(HTTPRequest(f"ws://127.0.0.1:8888/terminals/websocket/{name}", headers=headers))
    command = "printf 'it is %s.\\\\n' \\"$PATH|$HOME|$(command -v python)|${JUPYTER_TOKEN-none}\\"\\r"
    await socket.write_message(json.dumps(["stdin", command]))
    text = ""
    while "it is /" not in text:
        kind, *words = json.loads(await asyncio.wait_for(socket.read_message(), 20))
        text += words[0] if kind == "stdout" else ""
    await asyncio.sleep(0.3)
    await AsyncHTTPClient().fetch(HTTPRequest(f"http://{url}/{name}", "DELETE", headers))
    print(text)

asyncio.run(main(sys.argv[1]))
"""


def test_terminals_have_the_environment_of_the_image(first: tuple[Running, str]) -> None:
    running, token = first
    path = running.run("printenv", "PATH").stdout.strip()
    assert path.startswith("/opt/venv/bin:")
    said = running.python(TERMINAL, token)
    assert f"it is {path}|/home/torch|/opt/venv/bin/python|none." in re.sub(r"\s*\r\n?|\n", "", said), said


@pytest.mark.browser
def test_a_notebook_in_a_browser(first: tuple[Running, str], tmp_path: Path) -> None:
    running, token = first
    document = {"type": "notebook", "format": "json", "content": NOTEBOOK}
    assert running.ask("PUT", "/api/contents/first.ipynb", token, document)[0] == 201
    with browser() as chromium:
        page = chromium.page()
        page.open(f"http://127.0.0.1:{running.port}/lab/tree/first.ipynb")
        _log_in(page, token)
        _until(page, "document.querySelector('.jp-Notebook .jp-CodeCell .cm-content')?.innerText.includes('torch')")
        _until(page, "document.body.innerText.includes('Python 3 (ipykernel) | Idle')", 120)
        _run_cell(page)
        _until(page, "document.querySelector('.jp-OutputArea-output')?.innerText.includes('this is torch')", 180)
        output = page.value("document.querySelector('.jp-OutputArea-output').innerText")
        (tmp_path / "notebook.png").write_bytes(page.picture(whole=False))
        # News, updates, fonts: a page that asks another machine for something tells it who is here.
        elsewhere = [url for url in page.requests if not url.startswith((_origin(running), "data:", "blob:"))]
        asked_about_news = page.value("document.body.innerText.includes('Jupyter news')")
    assert output.strip() == f"this is torch {TORCH}"
    assert not elsewhere
    assert not asked_about_news


def _origin(running: Running) -> str:
    return f"http://127.0.0.1:{running.port}/"


def _until(page: Page, condition: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not page.value(f"Boolean({condition})"):
        assert time.monotonic() < end, (condition, page.value("document.body.innerText"), page.complaints[-5:])
        time.sleep(0.2)


def _log_in(page: Page, token: str) -> None:
    _until(page, "document.querySelector('#password_input')")
    page.value("document.querySelector('#password_input').focus()")
    page.ask("Input.insertText", text="not-the-token")
    page.value("document.querySelector('#login_submit').click()")
    _until(page, "document.querySelector('.message.error') && document.querySelector('#password_input')")
    page.value("document.querySelector('#password_input').focus()")
    page.ask("Input.insertText", text=token)
    page.value("document.querySelector('#login_submit').click()")


def _run_cell(page: Page) -> None:
    box = page.value(
        "(() => { const it = document.querySelector('.jp-Notebook .jp-CodeCell .cm-content').getBoundingClientRect();"
        " return [it.left + 20, it.top + 10]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    for kind in ("keyDown", "keyUp"):
        page.ask(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=8,
            text="\r" if kind == "keyDown" else "",
        )  # fmt: skip


def test_a_restart_keeps_the_token_and_does_not_print_it_again(first: tuple[Running, str]) -> None:
    running, token = first
    running.stop()
    assert docker("start", running.id).returncode == 0
    running.wait()
    assert running.log.count(token) == 1
    assert "docker exec CONTAINER cat /home/torch/.local/share/torchyard/jupyter-token" in running.log
    assert running.ask("GET", "/api/status", token)[0] == 200


# ----------------------------------------------------------------------------------------------------
# What is given


def test_a_password(image: str) -> None:
    hashed = docker(
        "run", "--rm", "--entrypoint", "python", image, "-c",
        f"from jupyter_server.auth import passwd; print(passwd({GOOD!r}))",
    ).stdout.strip()  # fmt: skip
    with started(image, "-e", f"JUPYTER_HASHED_PASSWORD={hashed}") as running:
        running.wait()
        assert "asks for the password that is configured" in running.log
        assert hashed not in running.log
        assert "token=" not in running.log
        assert running.ask("GET", "/api/status")[0] == 403
        assert running.ask("GET", "/api/status", GOOD)[0] == 403  # a password is no token
        assert running.python(LOG_IN, GOOD) == "200\n"
        assert running.python(LOG_IN, "correct-horse") == "403\n"


LOG_IN = """
import http.cookiejar, sys, urllib.error, urllib.parse, urllib.request
jar = http.cookiejar.CookieJar()
web = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
url = "http://127.0.0.1:8888"
try:
    web.open(url + "/login").read()
    (xsrf,) = [cookie.value for cookie in jar if cookie.name == "_xsrf"]
    web.open(url + "/login", urllib.parse.urlencode({"password": sys.argv[1], "_xsrf": xsrf}).encode()).read()
except urllib.error.HTTPError:
    pass
try:
    print(web.open(url + "/api/status").status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_a_token_in_a_file_with_nothing_that_can_be_written_but_tmp(image: str, tmp_path: Path) -> None:
    # An arbitrary user id in group 0, as OpenShift gives it, under a read-only root.
    options = ("--read-only", "--tmpfs", "/tmp", "--user", "12345:0", "-e", "JUPYTER_TOKEN_FILE=/tmp/token")
    start = f"printf '%s\\n' {GOOD} > /tmp/token && exec {PROGRAM}"
    with started(image, *options, command=["bash", "-c", start]) as running:
        running.wait()
        assert "uid 12345 cannot write to /home/torch" in running.log
        assert "cannot write to /workspace" in running.log
        assert "asks for the token of /tmp/token (JUPYTER_TOKEN_FILE)" in running.log
        assert GOOD not in running.log
        assert running.ask("GET", "/api/status", GOOD)[0] == 200
        assert running.ask("GET", "/api/status")[0] == 403
        assert running.run(PROGRAM, "--health").returncode == 0
        assert running.ask("POST", "/api/kernels", GOOD, {"name": "python3"})[0] == 201
        running.stop()


def test_an_arbitrary_user_id(image: str) -> None:
    with started(image, "--user", "12345:0") as running:
        running.wait()
        (token,) = URL.findall(running.log)
        assert "cannot write" not in running.log
        document = {"type": "file", "format": "text", "content": "kept"}
        assert running.ask("PUT", "/api/contents/kept.txt", token, document)[0] == 201
        assert running.run("stat", "-c", "%u", "/workspace/kept.txt").stdout == "12345\n"


# ----------------------------------------------------------------------------------------------------
# What is refused. One container tries all; the server must be looked at, not only what is asked of it.


EMPTY_TOKEN = "is empty, which would let everybody in"
REFUSED: Mapping[str, tuple[Mapping[str, str], Sequence[str], str, Sequence[str]]] = {
    "an empty token": ({"JUPYTER_TOKEN": ""}, [], "", ["JUPYTER_TOKEN is empty"]),
    "a short token": ({"JUPYTER_TOKEN": "secret"}, [], "", ["JUPYTER_TOKEN is too short"]),
    "arguments": (
        {},
        ["--IdentityProvider.token=", "--ServerApp.allow_origin=*", "--ServerApp.disable_check_xsrf=True",
         "--ServerApp.allow_unauthenticated_access=True", "--ServerApp.authenticate_prometheus=False"],
        "",
        [EMPTY_TOKEN, "the origin *", "disable_check_xsrf", "allow_unauthenticated_access", "/metrics"],
    ),
    "older names": (
        {},
        ["--ServerApp.token=''", "--ServerApp.password=''"],
        "c.ServerApp.tornado_settings = {'disable_check_xsrf': True}; c.ServerApp.allow_origin_pat = '.*'",
        [EMPTY_TOKEN, "disable_check_xsrf", "allow_origin_pat"],
    ),
    "the oldest name": ({}, ["--NotebookApp.token="], "", [EMPTY_TOKEN]),
    "a file": ({}, [], "c.IdentityProvider.token = ''", [EMPTY_TOKEN]),
    "a file of the Lab": ({}, [], "LAB c.ServerApp.token = ''", [EMPTY_TOKEN]),
    "a token among the arguments": ({}, [f"--IdentityProvider.token={GOOD}"], "", ["is seen by everybody"]),
    "an empty password": ({"JUPYTER_HASHED_PASSWORD": "EMPTY"}, [], "", ["is that of an empty one"]),
    "a broken hash": ({"JUPYTER_HASHED_PASSWORD": "argon2:$argon2id=19$m"}, [], "", ["is not whole"]),
    "another provider": (
        {"JUPYTER_TOKEN": GOOD},
        ["--ServerApp.login_handler_class=jupyter_server.auth.login.LegacyLoginHandler",
         "--ServerApp.identity_provider_class=jupyter_server.auth.identity.LegacyIdentityProvider"],
        "",
        ["another identity provider"],
    ),
    "a port that is none": ({}, ["--ServerApp.port=http"], "", ["Bad config"]),
}  # fmt: skip
TRY = """
import json, os, pathlib, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from jupyter_server.auth import passwd

def attempt(number, name, variables, arguments, config):
    home = pathlib.Path("/tmp") / str(number)
    (home / ".jupyter").mkdir(parents=True)
    kind = "lab" if config.startswith("LAB ") else "server"
    (home / ".jupyter" / f"jupyter_{kind}_config.py").write_text(config.replace("LAB ", ""))
    if variables.get("JUPYTER_HASHED_PASSWORD") == "EMPTY":
        variables["JUPYTER_HASHED_PASSWORD"] = passwd("")
    environment = {**os.environ, "HOME": str(home), "JUPYTER_PORT": str(9000 + number), **variables}
    try:
        done = subprocess.run(
            ["torchyard-notebook", *arguments], env=environment, capture_output=True, text=True, timeout=90
        )
        return name, done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        return name, None, str(late.stderr)

with ThreadPoolExecutor(2) as pool:
    asked = json.load(sys.stdin).items()
    futures = [pool.submit(attempt, number, name, *one[:3]) for number, (name, one) in enumerate(asked)]
    print(json.dumps([future.result() for future in futures]))
"""


def test_what_would_be_open_is_refused(image: str) -> None:
    done = subprocess.run(
        ["docker", "run", "--rm", "-i", "--network", "none", image, "python", "-c", TRY],
        input=json.dumps(REFUSED), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: (code, said) for name, code, said in json.loads(done.stdout)}
    wrong = {
        name: found[name]
        for name, (_, _, _, says) in REFUSED.items()
        if found[name][0] != 2
        or any(text not in found[name][1] for text in says)
        or any(text in found[name][1] for text in ("Traceback", GOOD, "lab?token="))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-e", "JUPYTER_TOKEN="), "JUPYTER_TOKEN is empty, which would let everybody in"),
        (("--read-only",), "there is no place for Jupyter's files"),
        (("--user", "0:0"), "this is root"),
    ],
)
def test_a_container_that_is_refused(image: str, options: Sequence[str], says: str) -> None:
    done = docker("run", "--rm", *options, image)
    assert done.returncode == 2
    assert says in done.stderr
    assert "lab?token=" not in done.stderr


# ----------------------------------------------------------------------------------------------------
# Validation


def test_validation_starts_it(image: str) -> None:
    done = docker(
        "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL", image,
        "torchyard-validate", "--only", "*.jupyter", timeout_s=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for name in ("sec", "svc"):
        assert re.search(rf"^ok +{name}\.jupyter ", done.stdout, re.MULTILINE), done.stdout


def test_validation_sees_an_open_configuration(image: str) -> None:
    spoil = "mkdir ~/.jupyter; echo \"c.ServerApp.token = ''\" > ~/.jupyter/jupyter_lab_config.py"
    done = docker("run", "--rm", image, "bash", "-c", f"{spoil}; torchyard-validate --only sec.jupyter")
    assert done.returncode == 1
    assert "jupyter_lab_config.py switches authentication off: ServerApp.token is ''" in done.stdout
