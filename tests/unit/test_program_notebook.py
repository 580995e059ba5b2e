"""The notebook program: its secrets and where it keeps its own, what it refuses, and how it is seen to be well."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "templates" / "programs" / "notebook.py"
GOOD = "correct-horse-battery-staple"


def _loaded() -> Any:
    spec = importlib.util.spec_from_file_location("torchyard_notebook", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


notebook = _loaded()

# ----------------------------------------------------------------------------------------------------
# Secrets


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        (GOOD, ""),
        ("0123456789abcdef", ""),
        ("", "is empty"),
        ("0123456789abcde", "too short: it has 15 characters"),
        ("aaaabbbbccccdddd", "it has 4 different characters"),
        ("a token with spaces in it", "has spaces"),
        ("schlüssel-schlüssel-schlüssel", "not ASCII"),
        ("0123456789abcdef\n", "has spaces"),
    ],
)
def test_weak_tokens(token: str, problem: str) -> None:
    found = notebook.weakness(token)
    assert problem in found
    assert bool(problem) == bool(found)


def test_secrets_are_taken_out_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "hash").write_text("argon2:$argon2id$x\r\n")
    environment = {"JUPYTER_TOKEN": GOOD, "JUPYTER_HASHED_PASSWORD_FILE": str(tmp_path / "hash"), "PATH": "/bin"}
    assert notebook.given(environment) == notebook.Secrets(GOOD, "argon2:$argon2id$x", "JUPYTER_TOKEN")
    assert environment == {"PATH": "/bin"}
    assert notebook.given(environment) == notebook.Secrets(source="JUPYTER_TOKEN")


def test_a_token_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{GOOD}\n")
    found = notebook.given({"JUPYTER_TOKEN_FILE": str(path)})
    assert (found.token, found.source) == (GOOD, f"{path} (JUPYTER_TOKEN_FILE)")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JUPYTER_TOKEN": ""}, "JUPYTER_TOKEN is empty, which would let everybody in: unset it"),
        ({"JUPYTER_TOKEN": "secret"}, "JUPYTER_TOKEN is too short: it has 6 characters"),
        ({"JUPYTER_TOKEN_FILE": "{}/short"}, "/short (JUPYTER_TOKEN_FILE) is too short"),
        ({"JUPYTER_TOKEN_FILE": "{}/empty"}, "/empty (JUPYTER_TOKEN_FILE) is empty"),
        ({"JUPYTER_TOKEN_FILE": "{}/lines"}, "has spaces"),
        ({"JUPYTER_TOKEN_FILE": "{}/none"}, "cannot be read: No such file or directory"),
        ({"JUPYTER_TOKEN_FILE": "{}"}, "it is not a file"),
        ({"JUPYTER_TOKEN_FILE": "{}/pipe"}, "it is not a file"),
        ({"JUPYTER_TOKEN_FILE": "{}/large"}, "it has more than 4096 bytes"),
        ({"JUPYTER_TOKEN_FILE": "{}/bytes"}, "can't decode byte"),
        ({"JUPYTER_TOKEN_FILE": ""}, "nothing (JUPYTER_TOKEN_FILE) cannot be read"),
        ({"JUPYTER_TOKEN_FILE": "/a", "JUPYTER_TOKEN": GOOD}, "are both set"),
        ({"JUPYTER_HASHED_PASSWORD": ""}, "JUPYTER_HASHED_PASSWORD is empty"),
        ({"JUPYTER_HASHED_PASSWORD_FILE": "{}/empty"}, "is empty, which would let everybody in"),
        ({"JUPYTER_PASSWORD": "secret"}, "JUPYTER_PASSWORD is not read"),
    ],
)
def test_secrets_that_are_refused(tmp_path: Path, environment: Mapping[str, str], says: str) -> None:
    for name, content in (("short", b"secret"), ("empty", b"\n"), ("lines", b"line one of it\nline two of it\n")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "large").write_bytes(b"x" * 5000)
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(notebook.RefusedError) as refused:
        notebook.given({name: value.format(tmp_path) for name, value in environment.items()})
    assert says in str(refused.value)
    assert "secret" not in str(refused.value).replace("secrets", "")


# ----------------------------------------------------------------------------------------------------
# The token that is kept


def test_a_token_is_made_once(tmp_path: Path) -> None:
    token, new = notebook.kept(tmp_path)
    assert new
    assert re.fullmatch(r"[0-9a-f]{48}", token)
    assert notebook.kept(tmp_path) == (token, False)
    (path,) = tmp_path.iterdir()
    assert (path.name, stat.S_IMODE(path.stat().st_mode)) == ("jupyter-token", 0o600)


def test_two_tokens_differ(tmp_path: Path) -> None:
    places = [tmp_path / str(number) for number in range(20)]
    for place in places:
        place.mkdir()
    assert len({notebook.kept(place)[0] for place in places}) == len(places)


def test_one_of_many_makes_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = [it.result() for it in [pool.submit(notebook.kept, tmp_path) for _ in range(32)]]
    assert len({token for token, _ in found}) == 1
    assert sum(new for _, new in found) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    token, new = notebook.kept(tmp_path)
    assert new
    assert notebook.kept(tmp_path) == (token, False)


def test_a_kept_token_is_made_private_again(tmp_path: Path) -> None:
    token, _ = notebook.kept(tmp_path)
    (tmp_path / "jupyter-token").chmod(0o644)
    assert notebook.kept(tmp_path) == (token, False)
    assert stat.S_IMODE((tmp_path / "jupyter-token").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_text(""), "is empty, which would let everybody in: remove the file"),
        (lambda path: path.write_text("secret"), "is too short"),
        (lambda path: path.symlink_to("/etc/hostname"), "cannot be read"),
        (lambda path: path.mkdir(), "it is not a file"),
    ],
)
def test_a_kept_token_that_is_refused(tmp_path: Path, spoil: Any, says: str) -> None:
    spoil(tmp_path / "jupyter-token")
    with pytest.raises(notebook.RefusedError, match=says):
        notebook.kept(tmp_path)


# ----------------------------------------------------------------------------------------------------
# Places; /proc is where nobody can make a directory, not even root


def test_the_home_directory_is_used(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    directory = notebook.own_directory(environment)
    assert directory == tmp_path / ".local/share/torchyard"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert environment == {"HOME": str(tmp_path)}


def test_a_home_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"HOME": "/proc/home", "TMPDIR": str(tmp_path), "JUPYTER_CONFIG_PATH": "/etc/more"}
    directory = notebook.own_directory(environment)
    private = tmp_path / f"torchyard-{os.geteuid()}"
    assert directory == private / ".local/share/torchyard"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert environment["HOME"] == str(private)
    assert environment["JUPYTER_CONFIG_PATH"] == "/etc/more:/proc/home/.jupyter"
    assert "cannot write to /proc/home" in capsys.readouterr().err
    # A second start finds it.
    assert notebook.own_directory({"HOME": "/proc/home", "TMPDIR": str(tmp_path)}) == directory


def test_nothing_can_be_written() -> None:
    with pytest.raises(notebook.RefusedError, match="--tmpfs /tmp"):
        notebook.own_directory({"HOME": "/proc/home", "TMPDIR": "/proc/tmp"})


def test_a_temporary_directory_of_somebody_else(tmp_path: Path) -> None:
    place = tmp_path / f"torchyard-{os.geteuid()}"
    environment = {"HOME": "/proc/home", "TMPDIR": str(tmp_path)}
    place.mkdir(mode=0o755)
    with pytest.raises(notebook.RefusedError, match="alone"):
        notebook.own_directory(environment)
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to("elsewhere")
    with pytest.raises(notebook.RefusedError, match="alone"):
        notebook.own_directory(environment)


def test_the_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    notebook.look_at_root(str(tmp_path))
    assert not capsys.readouterr().err
    with pytest.raises(notebook.RefusedError, match="cannot read"):
        notebook.look_at_root(str(tmp_path / "none"))
    monkeypatch.setattr(os, "access", lambda path, bits: not bits & os.W_OK)
    notebook.look_at_root(str(tmp_path))
    assert "nothing can be saved there" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# What lets people in


HASHED = "argon2:$argon2id$v=19$m=10240,t=10,p=8$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2hoYXNo"
EMPTY = HASHED.replace("c2Fs", "U2Fs")


class Provider(SimpleNamespace):
    token = GOOD
    hashed_password = ""

    def passwd_check(self, password: str) -> bool:
        return self.hashed_password == EMPTY and not password


def a_server(*, settings: Mapping[str, Any] | None = None, cli: Mapping[str, Any] | None = None, **more: Any) -> Any:
    provider = Provider(**more)
    return SimpleNamespace(
        identity_class=Provider,
        identity_provider=provider,
        web_app=SimpleNamespace(settings={"identity_provider": provider, **(settings or {})}),
        cli_config=cli or {},
    )


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (a_server(), None),
        (a_server(hashed_password=HASHED), None),
        (a_server(hashed_password=HASHED, token=""), None),
        (a_server(token=""), "the token that is configured is empty, which would let everybody in"),
        (a_server(token="secret"), "the token that is configured is too short"),
        (a_server(hashed_password=HASHED, token="secret"), "too short"),
        (a_server(hashed_password=EMPTY), "is that of an empty one"),
        (a_server(hashed_password=HASHED.replace("$v", "")), "is not whole"),
        (a_server(hashed_password=HASHED[:-20]), "is not whole"),
        (a_server(hashed_password="sha1:0e112c3ddfce:a68df677475c2b47b6e86d0467eec97ac5f4b85a"), "Argon2"),
        (a_server(hashed_password="correct horse"), "Argon2"),
        (a_server(cli={"IdentityProvider": {"token": GOOD}}), "--IdentityProvider.token is seen by everybody"),
        (a_server(cli={"ServerApp": {"token": "", "port": "1"}}), None),
        (a_server(settings={"identity_provider": None}), "another identity provider"),
        (a_server(settings={"allow_unauthenticated_access": True}), "allow_unauthenticated_access"),
        (a_server(settings={"authenticate_prometheus": False}), "/metrics"),
        (a_server(settings={"disable_check_xsrf": True}), "disable_check_xsrf"),
        (a_server(settings={"allow_origin": "*"}), "the origin *"),
        (a_server(settings={"allow_origin": "https://a.org"}), None),
        (a_server(settings={"headers": {"Access-Control-Allow-Origin": "*"}}), "the origin *"),
        (a_server(settings={"headers": {"Content-Security-Policy": "x"}}), None),
        (a_server(settings={"allow_origin": "", "allow_origin_pat": re.compile(".*")}), "allow_origin_pat"),
        (a_server(settings={"allow_origin_pat": re.compile("https://.*")}), "allow_origin_pat"),
        (a_server(settings={"allow_origin_pat": re.compile(r"https://[a-z]+\.a\.org$")}), None),
    ],
)  # fmt: skip
def test_what_lets_people_in(server: Any, says: str | None) -> None:
    found = list(notebook.openings(server))
    assert len(found) == (says is not None)
    assert says is None or says in found[0]
    assert not any("secret" in line for line in found)


def test_everything_is_told_at_once() -> None:
    server = a_server(token="", settings={"disable_check_xsrf": True, "allow_origin": "*"})
    assert len(list(notebook.openings(server))) == 3


def test_another_identity_provider() -> None:
    server = a_server()
    server.identity_provider = SimpleNamespace(token="")
    assert len(list(notebook.openings(server))) == 1


@pytest.mark.parametrize(
    ("ip", "certfile", "origin"),
    [
        ("0.0.0.0", "", "http://127.0.0.1:8888"),
        ("", "", "http://127.0.0.1:8888"),
        ("::", "", "http://[::1]:8888"),
        ("127.0.0.1", "/cert", "https://127.0.0.1:8888"),
        ("10.1.2.3", "", "http://10.1.2.3:8888"),
    ],
)
def test_addresses(ip: str, certfile: str, origin: str) -> None:
    assert notebook.origin_of(SimpleNamespace(ip=ip, certfile=certfile, port=8888)) == origin


@pytest.mark.parametrize(
    ("page", "off"),
    [
        ({"news": {"disabled": True}}, [notebook.ANNOUNCEMENTS]),
        ({"news": {"disabled": True}, "disabledExtensions": ["a"]}, ["a", notebook.ANNOUNCEMENTS]),
        ({"news": {"disabled": False}, "disabledExtensions": ["a"]}, ["a"]),
        ({}, None),
    ],
)
def test_nobody_is_asked_about_news(page: dict[str, Any], off: list[str] | None) -> None:
    for _ in range(2):
        page = notebook.without_news(None, page)
    assert page.get("disabledExtensions") == off


# ----------------------------------------------------------------------------------------------------
# Health


class Answers(http.server.BaseHTTPRequestHandler):
    status, body = 200, b'{"version": "2.21.1"}'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def answering(status: int = 200, body: bytes = Answers.body, context: ssl.SSLContext | None = None) -> Iterator[str]:
    handler = type("Handler", (Answers,), {"status": status, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()
        thread.join()


def health(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = notebook.main(["--health"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, out


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path


def test_a_server_that_is_well(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering() as url:
        notebook.remember(url, os.environ)
        assert health(capsys) == (0, f"Jupyter Server 2.21.1 answers at {url}\n")
    code, out = health(capsys)
    assert code == 1
    assert "Connection refused" in out


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [(503, b"", "503"), (200, b"hello", "Expecting value"), (200, b"[]", "200 OK"), (200, b"{}", "200 OK")],
)
def test_a_server_that_is_not(
    places: Path, capsys: pytest.CaptureFixture[str], status: int, body: bytes, says: str
) -> None:
    with answering(status, body) as url:
        notebook.remember(url, os.environ)
        code, out = health(capsys)
    assert code == 1
    assert says in out


def test_an_error_without_a_message_is_named(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(url: str) -> str:
        raise ConnectionAbortedError

    monkeypatch.setattr(notebook, "health", fails)
    code, out = health(capsys)
    assert code == 1
    assert out.endswith(": ConnectionAbortedError\n")


def test_a_server_that_accepts_and_says_nothing(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "HEALTH_S", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        notebook.remember(f"http://127.0.0.1:{listener.getsockname()[1]}/api", os.environ)
        code, out = health(capsys)
    assert code == 1
    assert "timed out" in out


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_a_server_with_a_certificate_of_its_own(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=notebook", "-keyout", "key", "-out", "cert"],
        cwd=places, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(places / "cert", places / "key")
    with answering(context=context) as url:
        notebook.remember(url, os.environ)
        assert health(capsys)[0] == 0


def test_where_the_server_is_looked_for(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notebook.remembered(os.environ) == "http://127.0.0.1:8888/api"
    monkeypatch.setenv("JUPYTER_PORT", "9000")
    assert notebook.remembered(os.environ) == "http://127.0.0.1:9000/api"
    notebook.own_directory(os.environ)
    monkeypatch.setenv("TMPDIR", "/proc/tmp")
    notebook.remember("http://127.0.0.1:1/home/api", os.environ)
    assert notebook.remembered(os.environ) == "http://127.0.0.1:1/home/api"
    monkeypatch.setenv("TMPDIR", str(places / "tmp"))
    notebook.remember("http://127.0.0.1:2/api", os.environ)
    assert notebook.remembered(os.environ) == "http://127.0.0.1:2/api"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert notebook.main(["--help"]) == 0
    assert "JUPYTER_TOKEN_FILE" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------
# The whole program, with a stand-in for JupyterLab; tests/integration has the real one

STAND_IN = {
    "traitlets.py": "def default(name): return lambda method: method\n",
    "jupyter_server/__init__.py": "",
    "jupyter_server/auth/__init__.py": "",
    "jupyter_server/auth/identity.py": """
import json, os
class PasswordIdentityProvider:
    def __init__(self):
        self.hashed_password = ""
        self._token = json.loads(os.environ.get("CONFIG", "{}")).get("token")
    @property
    def need_token(self): return not self.hashed_password
    @property
    def token(self):
        if self._token is None: self._token = self._kept_token()
        return self._token
    @token.setter
    def token(self, value): self._token = value
    def passwd_check(self, password): return False
""",
    "jupyter_server/serverapp.py": """
import json, os, signal, sys, time
from types import SimpleNamespace
class ServerApp:
    ip, port, certfile, base_url, default_url = "0.0.0.0", 8888, "", "/", "/lab"
    allow_root, cli_config = True, {}
    def __init__(self, arguments):
        config = json.loads(os.environ.get("CONFIG", "{}"))
        self.root_dir = os.environ["ROOT"]
        self.identity_provider = self._own_identity()()
        self.identity_provider.token
        self.web_app = SimpleNamespace(settings={"identity_provider": self.identity_provider, **config})
        if "--bad" in arguments: sys.exit(1)
        print("ARGUMENTS", arguments, flush=True)
    def start(self):
        print("STARTED", self.identity_provider.token, sorted(n for n in os.environ if "JUPYTER" in n), flush=True)
        if "--dies" in sys.argv: sys.exit(1)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        while "--stays" in sys.argv: time.sleep(0.05)
""",
    "jupyterlab/__init__.py": "",
    "jupyterlab/labapp.py": """
import os, sys, time
print("IMPORTING", flush=True)
time.sleep(float(os.environ.get("SLOW", 0)))
class LabApp:
    @classmethod
    def launch_instance(cls, argv): cls.serverapp_class(argv).start()
""",
}


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """The environment of a container with a stand-in for JupyterLab."""
    for name, content in STAND_IN.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER_")}
    return {
        **inherited,
        "PYTHONPATH": str(tmp_path / "site"),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "ROOT": str(tmp_path),
    }


def run(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def token_file(environment: Mapping[str, str]) -> Path:
    return Path(environment["HOME"]) / ".local/share/torchyard/jupyter-token"


def test_the_first_start_prints_the_token_and_later_ones_do_not(stand_in: dict[str, str]) -> None:
    first = run(stand_in)
    token = token_file(stand_in).read_text().strip()
    assert first.returncode == 0
    assert f"torchyard-notebook: open http://127.0.0.1:8888/lab?token={token}\n" in first.stderr
    assert (first.stderr.count(token), first.stdout.count(token)) == (1, 1)  # the stand-in prints it, too
    second = run(stand_in)
    assert second.returncode == 0
    assert token not in second.stderr
    assert f"docker exec CONTAINER cat {token_file(stand_in)}" in second.stderr
    assert f"STARTED {token}" in second.stdout


def test_a_token_that_is_given_is_used_and_told_to_nobody(stand_in: dict[str, str]) -> None:
    ran = run({**stand_in, "JUPYTER_TOKEN": GOOD})
    assert ran.returncode == 0
    assert f"STARTED {GOOD} []" in ran.stdout
    assert GOOD not in ran.stderr
    assert "asks for the token of JUPYTER_TOKEN" in ran.stderr
    assert not token_file(stand_in).exists()


def test_the_environment_is_stronger_than_a_file(stand_in: dict[str, str]) -> None:
    ran = run({**stand_in, "JUPYTER_TOKEN": GOOD, "CONFIG": '{"token": ""}'})
    assert f"STARTED {GOOD}" in ran.stdout


def test_a_password_needs_no_token(stand_in: dict[str, str]) -> None:
    ran = run({**stand_in, "JUPYTER_HASHED_PASSWORD": HASHED})
    assert "STARTED  []" in ran.stdout
    assert "asks for the password" in ran.stderr
    assert HASHED not in ran.stderr
    assert not token_file(stand_in).exists()


def test_the_users_arguments_come_last(stand_in: dict[str, str]) -> None:
    ran = run(stand_in, "--ServerApp.port=1", "--LabApp.news_url=mine")
    assert re.search(r"ARGUMENTS \['--no-browser', .*'--ServerApp.port=1', '--LabApp.news_url=mine'\]", ran.stdout)


@pytest.mark.parametrize(
    ("environment", "arguments", "says"),
    [
        ({"JUPYTER_TOKEN": ""}, [], "JUPYTER_TOKEN is empty"),
        ({"CONFIG": '{"token": ""}'}, [], "the token that is configured is empty"),
        ({"CONFIG": '{"disable_check_xsrf": true}'}, [], "disable_check_xsrf"),
        ({"ROOT": "/nowhere"}, [], "cannot read /nowhere"),
        ({"HOME": "/proc/home", "TMPDIR": "/proc/tmp"}, [], "--tmpfs /tmp"),
        ({"PYTHONPATH": "/nowhere"}, [], "JupyterLab cannot be imported"),
        ({}, ["--bad"], ""),
    ],
)
def test_a_refusal(stand_in: dict[str, str], environment: Mapping[str, str], arguments: list[str], says: str) -> None:
    ran = run({**stand_in, **environment}, *arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "STARTED" not in ran.stdout
    # A token that nobody was told is not kept: the next start prints its own.
    assert not token_file(stand_in).exists()


def test_what_ends_a_running_server_is_no_refusal(stand_in: dict[str, str]) -> None:
    assert run(stand_in, "--dies").returncode == 1
    assert token_file(stand_in).exists()


@pytest.mark.parametrize(("moment", "slow"), [("IMPORTING", "30"), ("STARTED", "0")])
def test_sigterm_ends_it_with_0_at_any_time(stand_in: dict[str, str], moment: str, slow: str) -> None:
    with subprocess.Popen(
        [sys.executable, PROGRAM, "--stays"], env={**stand_in, "SLOW": slow}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith(moment) for line in process.stdout)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_it_starts_in_a_home_that_cannot_be_written(stand_in: dict[str, str]) -> None:
    environment = {**stand_in, "HOME": "/proc/home"}
    first, second = run(environment), run(environment)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "lab?token=" in first.stderr
    assert "lab?token=" not in second.stderr
    assert f"cannot write to /proc/home: settings and the token are in {stand_in['TMPDIR']}" in first.stderr
    kept = Path(stand_in["TMPDIR"]) / f"torchyard-{os.geteuid()}/.local/share/torchyard/jupyter-token"
    assert f"STARTED {kept.read_text().strip()}" in second.stdout


def test_what_the_health_check_needs_is_written(stand_in: dict[str, str]) -> None:
    run(stand_in)
    address = Path(stand_in["TMPDIR"]) / f"torchyard-{os.geteuid()}" / "jupyter-address"
    assert address.read_text() == "http://127.0.0.1:8888/api\n"
