"""JupyterLab of a notebook image: nobody is let in without a token or a password, and kernels are the image's: T1."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from validate.check import Probe, check
from validate.service import Service, free_port, judge_end, judge_health, judge_token, told_to_end
from validate.verdict import Blame, Skip

NAME = "notebook"
PROGRAM = f"torchyard-{NAME}"
KEPT = ".local/share/torchyard/jupyter-token"
"""Where the program keeps the token that it made, in the home directory."""
START_S = 60.0
KERNEL_S = 90.0

# ----------------------------------------------------------------------------------------------------
# What is configured

_OPENING_ENVIRONMENT = "JUPYTER_SERVER_ALLOW_UNAUTHENTICATED_ACCESS"
_SECRETS = ("JUPYTER_TOKEN", "JUPYTER_PASSWORD", "JUPYTER_HASHED_PASSWORD")
_PASSWORDS = ("password", "hashed_password")
# Jupyter's own loaders, for a configuration file may be a program. What it prints is not wanted.
_LOAD = """
import glob, json, os, sys
from jupyter_core.paths import jupyter_config_path
from traitlets.config.loader import JSONFileConfigLoader, PyFileConfigLoader

found = {}
for directory in jupyter_config_path():
    for path in sorted(glob.glob(os.path.join(directory, "jupyter*_config.*"))):
        loader = {".json": JSONFileConfigLoader, ".py": PyFileConfigLoader}.get(os.path.splitext(path)[1])
        if loader is None:
            continue
        try:
            found[path] = loader(os.path.basename(path), path=directory).load_config()
        except BaseException as error:
            found[path] = {"error": f"{type(error).__name__}: {error}"}
with open(sys.argv[1], "w", encoding="utf-8") as told:
    json.dump(found, told, default=str)
"""
_LOAD_S = 30.0


@dataclass(frozen=True)
class Setting:
    """One value that decides who is let in, and where it stands."""

    place: str
    """A file, "the command" or "the environment"."""
    name: str
    """`IdentityProvider.token`, or a variable."""
    value: Any

    @property
    def path(self) -> Optional[str]:
        """The file, if it is one."""
        return self.place if self.place.startswith("/") else None

    @property
    def trait(self) -> str:
        """The part of the name after the dot."""
        return self.name.rpartition(".")[2]


def of_files(files: Mapping[str, Mapping[str, Any]]) -> List[Setting]:
    """Return the settings of configuration files, by path."""
    return [
        Setting(path, f"{section}.{trait}", value)
        for path, sections in files.items()
        for section, traits in sections.items()
        if isinstance(traits, Mapping)
        for trait, value in traits.items()
    ]


def of_command(words: Sequence[str]) -> List[Setting]:
    """Return the settings among the words of a command, `--IdentityProvider.token=`, or of a shell's command in it."""
    words = [part for word in words for part in (_split(word) if " " in word else [word])]
    found = []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("-") or not name.lstrip("-"):
            continue
        after = words[number + 1] if number + 1 < len(words) else ""
        # With or without "=", as Jupyter takes them.
        found.append(Setting("the command", name.lstrip("-"), value if equals or after.startswith("-") else after))
    return found


def _split(line: str) -> List[str]:
    with contextlib.suppress(ValueError):
        return shlex.split(line)
    return line.split()


def judge_settings(probe: Probe, settings: Sequence[Setting]) -> None:
    """Judge what decides who is let in, whoever set it; a secret only if the image may have brought it."""
    has_password = any(one.trait in _PASSWORDS and one.value for one in settings)
    for one in settings:
        text = str(one.value).strip("'\"")
        if one.trait == "token" and not text and not has_password:
            _opened(probe, one, "everybody is let in")
        elif one.trait in ("token", *_PASSWORDS) and text:
            _judge_secret(probe, f"{one.name} stands in {one.place}", one.path)
        elif one.trait in ("disable_check_xsrf", "allow_unauthenticated_access") and text.lower() in ("true", "1", ""):
            _opened(probe, one, "requests are answered that nobody logged in for")
        elif one.trait == "allow_origin" and text == "*":
            _opened(probe, one, "any web site can use the server through its user's browser")


def judge_environment(probe: Probe, environment: Mapping[str, str]) -> None:
    """Judge the image's environment, or that of a machine, where a secret is its user's."""
    for name in _SECRETS:
        if environment.get(name):
            _judge_secret(probe, f"{name} stands in the image's environment", None)
        elif name in environment:
            _opened(probe, Setting("the environment", name, ""), "an empty secret is none")
    if environment.get(_OPENING_ENVIRONMENT, "").lower() in ("true", "yes"):
        one = Setting("the environment", _OPENING_ENVIRONMENT, environment[_OPENING_ENVIRONMENT])
        _opened(probe, one, "what extensions add answers everybody")


def judge_home(probe: Probe, home: str) -> None:
    """Judge what lies in the home directory that a first start makes."""
    runtime = f"{home}/.local/share/jupyter/runtime"
    left = [f"{home}/{KEPT}", f"{runtime}/jupyter_cookie_secret"]
    with contextlib.suppress(OSError):
        left += [f"{runtime}/{name}" for name in sorted(os.listdir(runtime)) if name.startswith("jpserver-")]  # noqa: PTH208
    for path in left:
        if os.path.lexists(path):
            _judge_secret(probe, f"{path} holds what the first start makes", path)


def _opened(probe: Probe, one: Setting, why: str) -> None:
    probe.fail(
        f"{one.place} switches authentication off: {one.name} is {one.value!r}",
        why=why,
        remedy=f"leave {one.name} out of {one.place}",
        mode="F62",
    )


def _judge_secret(probe: Probe, what: str, path: Optional[str]) -> None:
    """Judge a secret by who brought it: the image, or somebody who uses this container or machine.

    `path` is the file that it is in; None if the image declares it. All that a new container has is the image's. Where
    the suite was started in a container that is used, only time tells: what changed since it began is its user's.
    """
    declared = probe.request.declared is not None
    if probe.request.image or (declared and path is None):
        probe.fail(
            what,
            why="all containers of the image share this secret, and who has the image knows it",
            remedy="leave it out of the image; give it when the container starts: docker run -e JUPYTER_TOKEN=...",
            mode="F62",
        )
    elif declared and path is not None and _is_older(path, _began()):
        probe.warn(
            f"{what}, and is older than this run of the container",
            why="it is of an earlier run, of a volume, or of the image, and then all its containers share it",
            remedy="`torchyard validate IMAGE` looks at the image alone; what it finds there, leave out of the image",
            mode="F62",
        )


def _began() -> Optional[float]:
    """Return when this container was started, by the clock; None if that cannot be known."""
    try:
        with open("/proc/1/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            ticks = int(file.read().rpartition(")")[2].split()[19])
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _is_older(path: str, began: Optional[float]) -> bool:
    """Tell whether a file is as it was before a time; by when the file changed, for anybody can set its content's."""
    try:
        return began is not None and os.lstat(path).st_ctime < began - 1
    except OSError:
        return False


@check("sec.jupyter", title="no configuration of Jupyter lets everybody in", tier=1, modes=("F62",))
def configuration(probe: Probe) -> None:
    """Read what Jupyter would read: its configuration files, and the image's environment and command."""
    declared = probe.request.declared
    if declared is not None:
        _skip_others(probe, declared)
    elif importlib.util.find_spec("jupyter_core") is None:
        probe.skip(Skip.NOT_THIS_KIND, "there is no Jupyter here")
    config: Mapping[str, Any] = (declared or {}).get("config", {})
    words = [*config.get("entrypoint", ()), *config.get("cmd", ())]
    files = _configured(probe)
    judge_settings(probe, [*of_files(files), *of_command(words)])
    judge_environment(probe, config.get("env", os.environ))
    if declared is not None:
        judge_home(probe, config.get("env", {}).get("HOME", "/"))
    probe.saw(files=sorted(files))
    probe.detail(f"{len(files)} configuration files")


def _skip_others(probe: Probe, declared: Mapping[str, Any]) -> None:
    if declared.get("program") != NAME:
        probe.skip(Skip.NOT_THIS_KIND, f"the image runs {declared.get('program') or 'no service'}, not {NAME}")


def _configured(probe: Probe) -> Mapping[str, Mapping[str, Any]]:
    """Return what Jupyter's configuration files say, by path; those that cannot be read are told."""
    told = f"{probe.request.scratch}/jupyter-config-{os.getpid()}.json"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, told],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LOAD_S,
            check=False,
        )
        with open(told, encoding="utf-8") as file:  # noqa: PTH123
            found: Dict[str, Dict[str, Any]] = json.load(file)
    except subprocess.TimeoutExpired:
        probe.stop(f"reading Jupyter's configuration files takes more than {_LOAD_S:.0f} s")
    except OSError:
        probe.stop("Jupyter's configuration files cannot be read", why=done.stderr.strip()[-500:])
    for path, sections in found.items():
        if "error" in sections:
            probe.warn(f"{path} cannot be read", why=str(sections["error"]), blame=Blame.IMAGE)
    return found


# ----------------------------------------------------------------------------------------------------
# What is served

_KERNEL = """
import json, queue, sys, time
from jupyter_client import BlockingKernelClient

path, code, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
client = BlockingKernelClient()
client.load_connection_file(path)
client.start_channels()
client.wait_for_ready(timeout=seconds)
said = []
def hear(message):
    content = message["content"]
    said.append(content.get("text") or "\\n".join(content.get("traceback") or ()))
client.execute_interactive(code, timeout=seconds, output_hook=hear)
client.stop_channels()
print(json.dumps("".join(said)))
"""
# Printed by a kernel, and by the Python that runs this check.
_SELF = """
import json, os, sys
import torch
secret = [name for name in os.environ if name.startswith("JUPYTER_TOKEN")]
said = {"torch": torch.__version__, "file": torch.__file__, "PATH": os.environ.get("PATH"), "secret": secret}
print(json.dumps(said))
"""


@dataclass
class Served(Service):
    """A running server, and what was given to it."""

    runtime: str
    """Directory of its kernels' connection files."""

    def answers(self) -> bool:
        """Tell whether it answers at all."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/api")[0] > 0
        return False


@check(
    "svc.jupyter",
    title="JupyterLab lets nobody in without the token, and its kernels import this torch",
    tier=1,
    needs=("run.import",),
    modes=("F62", "F71"),
)
def service(probe: Probe) -> None:
    """Start the image's program on a port of the loopback, and use it with and without the token."""
    _skip_others(probe, probe.declared)
    program = shutil.which(PROGRAM)
    if program is None:
        probe.stop(f"there is no {PROGRAM} on PATH", why="the image declares it as its program")
    for label, token, arguments in (
        ("an empty token", "", []),
        ("an argument that empties the token", None, ["--IdentityProvider.token="]),
    ):
        _judge_refusal(probe, program, label, token, arguments)
    token = secrets.token_hex(24)
    with serving(probe, program, token, ()) as server:
        if not _wait(server):
            probe.stop(
                f"{PROGRAM} does not answer",
                why=server.printed().strip()[-600:] or "it printed nothing",
                remedy=f"{PROGRAM} starts it, and says what it lacks",
                mode="F71",
            )
        _judge_doors(probe, server)
        judge_token(probe, server)
        _judge_kernel(probe, server)
        judge_health(probe, server, program, without="JUPYTER_TOKEN")
        judge_end(probe, server, since=told_to_end(server))


@contextlib.contextmanager
def serving(probe: Probe, program: str, token: Optional[str], arguments: Sequence[str]) -> Iterator[Served]:
    """Start the program with a home of its own; gone afterwards."""
    port = free_port()
    place = f"{probe.request.scratch}/jupyter-{os.getpid()}-{port}"
    runtime, home = f"{place}/runtime", f"{place}/home"
    for directory in (runtime, home):
        os.makedirs(directory, mode=0o700)  # noqa: PTH103
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER_")}
    environment.update(HOME=home, TMPDIR=place, JUPYTER_RUNTIME_DIR=runtime, JUPYTER_PORT=str(port))
    if token is not None:
        environment["JUPYTER_TOKEN"] = token
    root = ["--allow-root"] if os.geteuid() == 0 else []
    log = f"{place}/log"
    with open(log, "wb") as output:  # noqa: PTH123
        process = subprocess.Popen(
            [program, "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={home}", *root, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield Served(process, port, token or "", log, environment, "token", runtime)
    finally:
        process.kill()
        process.wait()


def _wait(server: Served) -> bool:
    """Wait until the server answers or has ended; tell whether it answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.process.poll() is None:
        if server.answers():
            return True
        time.sleep(0.1)
    return False


def _judge_refusal(probe: Probe, program: str, label: str, token: Optional[str], arguments: Sequence[str]) -> None:
    """Judge that the program does not start where nobody would have to log in; an overridden setting is as good."""
    with serving(probe, program, token, arguments) as server:
        if _wait(server):
            status, _ = server.ask("GET", "/api/status")
            if status not in (401, 403):
                probe.fail(
                    f"{PROGRAM} starts with {label}, and lets everybody in",
                    why=f"GET /api/status is answered with {status}",
                    remedy="refuse it",
                    mode="F62",
                )
        elif server.process.poll() is None:
            probe.fail(f"{PROGRAM} with {label} neither starts nor ends within {START_S:.0f} s")
        elif server.process.returncode != 2:
            probe.warn(
                f"{PROGRAM} with {label} ends with {server.process.returncode}, not 2",
                why=server.printed().strip()[-300:],
                blame=Blame.IMAGE,
            )


def _judge_doors(probe: Probe, server: Served) -> None:
    """Judge what is answered with no token, with a wrong one and with the right one."""
    wrong = server.token[:-1] + ("0" if server.token[-1] != "0" else "1")
    asked: List[Tuple[str, str, str, Optional[str], Tuple[int, ...]]] = [
        ("without a token", "GET", "/api/status", None, (401, 403)),
        ("without a token", "GET", "/api/contents", None, (401, 403)),
        ("without a token", "POST", "/api/kernels", None, (401, 403)),
        ("without a token", "GET", "/lab", None, (302, 401, 403)),
        ("with a wrong token", "GET", "/api/status", wrong, (401, 403)),
        ("with an empty token", "GET", "/api/status", "", (401, 403)),
        ("with the token", "GET", "/api/status", server.token, (200,)),
    ]
    seen: Dict[str, int] = {}
    for label, method, path, token, right in asked:
        status, _ = server.ask(method, path, token=token)
        seen[f"{method} {path} {label}"] = status
        if status in right:
            continue
        if token == server.token:
            probe.fail(f"{method} {path} {label} is refused with {status}", mode="F71")
        else:
            probe.fail(
                f"{method} {path} is answered {label}",
                why=f"with {status}: whoever reaches the port can run programs",
                remedy="let the server be started with a token or a password",
                mode="F62",
            )
    probe.saw(answers=seen)


def _judge_kernel(probe: Probe, server: Served) -> None:
    """Start a kernel as the user interface does, and compare the torch that it imports with this Python's."""
    status, body = server.ask("POST", "/api/kernels", "{}", token=server.token)
    if status != http.client.CREATED:
        probe.stop(f"no kernel starts: {status}", why=body[-400:])
    kernel = str(json.loads(body)["id"])
    path = f"{server.runtime}/kernel-{kernel}.json"
    start = time.monotonic()
    there = _program(probe, server, [_KERNEL, path, _SELF, str(KERNEL_S)])
    probe.metric("kernel_s", time.monotonic() - start, "s", better="lower")
    here = _program(probe, server, [_SELF])
    try:
        said: Mapping[str, Any] = json.loads(json.loads(there).strip().splitlines()[-1])
    except (ValueError, IndexError):
        probe.stop("a kernel cannot import torch", why=there.strip()[-600:], mode="F24")
    own: Mapping[str, Any] = json.loads(here.strip().splitlines()[-1])
    probe.saw(kernel={name: said[name] for name in ("torch", "file", "PATH")})
    for name in ("torch", "file", "PATH"):
        if said[name] != own[name]:
            probe.fail(
                f"kernels have another {name} than the image's Python: {said[name]}",
                why=f"the image's is {own[name]}",
                remedy="jupyter kernelspec list  # argv[0] of kernel.json must be the image's python",
                mode="F24",
            )
    if said["secret"]:
        probe.fail("kernels see the token", why=f"{', '.join(said['secret'])} is in their environment", mode="F62")
    server.ask("DELETE", f"/api/kernels/{kernel}", token=server.token)
    probe.detail(f"a kernel imports torch {said['torch']}; nobody is let in without the token")


def _program(probe: Probe, server: Served, arguments: Sequence[str]) -> str:
    """Return what the image's own Python prints."""
    environment = {name: value for name, value in server.environment.items() if not name.startswith("JUPYTER_")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=KERNEL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        probe.stop(f"a kernel says nothing for {KERNEL_S:.0f} s", why=server.printed().strip()[-600:])
    if done.returncode != 0:
        probe.stop("a kernel cannot be used", why=done.stderr.strip()[-600:])
    return done.stdout
