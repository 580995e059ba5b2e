"""Images in which the checks of `notebook.py` must not pass: a stand-in for the program, and Jupyter's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.mutations import Mutation
from validate.verdict import Status

# ----------------------------------------------------------------------------------------------------
# The program: what the check asks of it, without Jupyter

PROGRAM = """
import http.server, json, os, signal, sys

FAULTS = {faults!r}
token = os.environ.get("JUPYTER_TOKEN")
port = int(os.environ["JUPYTER_PORT"])
if sys.argv[1:] == ["--health"]:
    sys.exit("sick" in FAULTS)
if "broken" in FAULTS:
    sys.exit("No module named 'jupyterlab'")
if token == "" and "takes an empty token" not in FAULTS:
    sys.exit(3 if "ends with 3" in FAULTS else 2)
if "--IdentityProvider.token=" in sys.argv and "takes an empty argument" not in FAULTS:
    sys.exit(2)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        given = self.headers.get("Authorization")
        if self.path == "/api" or not token or "open" in FAULTS or given == "token " + token:
            known = True
        else:
            known = given is not None and "any token" in FAULTS
        if "refuses all" in FAULTS and self.path != "/api":
            known = False
        status = 403 if not known else 201 if self.command == "POST" else 200
        if status == 201 and "no kernel" in FAULTS:
            status = 500
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({{"id": "k", "version": "1"}}).encode())
    do_POST = do_DELETE = do_GET
    def log_message(self, *_):
        pass

if "prints its token" in FAULTS:
    print("http://127.0.0.1/lab?token=", token, flush=True)
if "shows its token" in FAULTS and "shown" not in sys.argv:
    os.execv(sys.executable, [sys.executable, __file__, "shown", str(token)])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
signal.signal(signal.SIGTERM, lambda *_: os._exit(1 if "ends with 1" in FAULTS else 0))
server.serve_forever()
"""
CLIENT = """
import os, subprocess, sys

class BlockingKernelClient:
    def load_connection_file(self, path): pass
    def start_channels(self): pass
    def stop_channels(self): pass
    def wait_for_ready(self, timeout): pass
    def execute_interactive(self, code, timeout, output_hook):
        environment = {**os.environ, **KERNEL}
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-2, text=True)
        output_hook({"content": {"text": done.stdout}})
"""
PLANT = """
import os, sys
site = os.path.join(os.getcwd(), "site")
os.makedirs(os.path.join(site, "bin"), exist_ok=True)
os.environ["PYTHONPATH"] = site
sys.path.insert(0, site)

def write(name, content):
    path = os.path.join(site, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(content)
    return path
"""
NOTEBOOK: Mapping[str, Any] = {
    "program": "notebook",
    "config": {
        "env": {"HOME": "/nowhere"},
        "entrypoint": ["/usr/bin/tini", "--", "/opt/venv/bin/torchyard-start"],
        "cmd": ["torchyard-notebook"],
    },
}


def image(*faults: str, kernel: Mapping[str, str] | None = None, other_torch: bool = False) -> str:
    """Return a prelude that makes an image whose program has the faults, and whose kernels have more environment."""
    prelude = PLANT + (
        f"program = write('bin/torchyard-notebook', '#!' + sys.executable + {PROGRAM.format(faults=faults)!r})\n"
        "os.chmod(program, 0o755)\n"
        "os.environ['PATH'] = os.path.dirname(program) + ':' + os.environ['PATH']\n"
        "write('torch.py', '__version__ = \"2.13.0\"')\n"
    )
    variables = dict(kernel or {})
    if other_torch:
        prelude += "write('other/torch.py', '__version__ = \"2.7.1\"')\n"
        return prelude + (
            f"write('jupyter_client.py', 'KERNEL = ' + repr(dict({variables!r}, PYTHONPATH=site + '/other'))"
            f" + {CLIENT!r})\n"
        )
    return prelude + f"write('jupyter_client.py', {f'KERNEL = {variables!r}{CLIENT}'!r})\n"


def service(name: str, says: str, prelude: str, status: Status = Status.FAIL) -> Mutation:
    return Mutation(check="svc.jupyter", name=name, prelude=prelude, says=says, status=status, declared=NOTEBOOK)


# ----------------------------------------------------------------------------------------------------
# Configuration files, and what reads them

LOADERS = """
write("jupyter_core/__init__.py", "")
write("jupyter_core/paths.py", '''
import os
def jupyter_config_path(): return [os.path.join(os.path.dirname(os.path.dirname(__file__)), "etc")]
''')
write("traitlets/__init__.py", "")
write("traitlets/config/__init__.py", "")
write("traitlets/config/loader.py", '''
import collections, json, os
class JSONFileConfigLoader:
    def __init__(self, name, path): self.path = os.path.join(path, name)
    def load_config(self):
        with open(self.path) as file: return json.load(file)
class Section(dict):
    __setattr__ = dict.__setitem__
class Sections(collections.defaultdict):
    __getattr__ = collections.defaultdict.__getitem__
class PyFileConfigLoader(JSONFileConfigLoader):
    def load_config(self):
        c = Sections(Section)
        with open(self.path) as file: exec(file.read(), {"c": c})
        return c
''')
"""


def configured(name: str, content: str = "", *, file: str = "jupyter_server_config.py", **more: Any) -> Mutation:
    """Return an image with one configuration file; `env` and `cmd` are over what it declares, `says` over its name."""
    config = {**NOTEBOOK["config"], "env": {**NOTEBOOK["config"]["env"], **more.pop("env", {})}}
    config["cmd"] = more.pop("cmd", config["cmd"])
    written = f"write('etc/{file}', {content!r})\n" if content else ""
    fields: dict[str, Any] = {
        "declared": {**NOTEBOOK, "config": config},
        "says": "switches authentication off",
        "image": True,
        **more,
    }
    return Mutation(check="sec.jupyter", name=name, prelude=PLANT + LOADERS + written, **fields)


MUTATIONS = [
    service("everybody is let in", "is answered without a token", image("open")),
    service("any token will do", "is answered with a wrong token", image("any token")),
    service("nobody is let in", "with the token is refused with 403", image("refuses all")),
    service("it starts with an empty token", "starts with an empty token", image("takes an empty token", "open")),
    service(
        "an argument switches authentication off",
        "starts with an argument that empties the token",
        image("takes an empty argument", "open"),
    ),
    service("a refusal is no usage error", "ends with 3, not 2", image("ends with 3"), Status.WARN),
    service("it does not start", "No module named 'jupyterlab'", image("broken")),
    service("its log has the token", "prints the token that it was given", image("prints its token")),
    service("the list of processes has the token", "stands in the list of processes", image("shows its token")),
    service("no kernel starts", "no kernel starts: 500", image("no kernel")),
    service("a kernel cannot import torch", "a kernel cannot import torch", image(kernel={"PYTHONPATH": "/nowhere"})),
    service("a kernel has another torch", "kernels have another torch", image(other_torch=True)),
    service("a kernel has another PATH", "kernels have another PATH", image(kernel={"PATH": "/usr/bin"})),
    service("a kernel sees the token", "kernels see the token", image(kernel={"JUPYTER_TOKEN": "x"})),
    service("the health check fails", "the health check fails", image("sick")),
    service("it ends with an error", "ends with 1 after SIGTERM", image("ends with 1")),
    service("there is no program", "there is no torchyard-notebook on PATH", PLANT),
    Mutation(
        check="svc.jupyter",
        name="the image is for something else",
        prelude="",
        declared={"program": None},
        status=Status.SKIP,
        says="the image runs no service, not notebook",
    ),
    configured("an empty token", "c.ServerApp.token = ''"),
    configured("an empty token in JSON", '{"IdentityProvider": {"token": ""}}', file="jupyter_server_config.json"),
    configured("an empty token by the old name", "c.NotebookApp.token = ''", file="jupyter_notebook_config.py"),
    configured("an empty token for the Lab alone", "c.ServerApp.token = ''", file="jupyter_lab_config.py"),
    configured("requests of other sites", "c.ServerApp.disable_check_xsrf = True"),
    configured("pages of other sites", "c.ServerApp.allow_origin = '*'"),
    configured("extensions for all", "c.ServerApp.allow_unauthenticated_access = True"),
    configured(
        "extensions for all, by the environment",
        env={"JUPYTER_SERVER_ALLOW_UNAUTHENTICATED_ACCESS": "yes"},
    ),
    configured("an argument of the command", cmd=["jupyter", "lab", "--IdentityProvider.token", ""]),
    configured("an argument in a shell's command", cmd=["sh", "-c", "jupyter lab --NotebookApp.token=''"]),
    configured("an empty token in the environment", env={"JUPYTER_TOKEN": ""}),
    configured("a token that all images share", "c.IdentityProvider.token = 'abc'", says="who has the image knows it"),
    configured(
        "a password that all images share",
        '{"PasswordIdentityProvider": {"hashed_password": "argon2:x"}}',
        file="jupyter_server_config.json",
        says="hashed_password stands in",
    ),
    configured("a token in the environment", env={"JUPYTER_TOKEN": "abc"}, says="JUPYTER_TOKEN stands in"),
    configured("a configuration file that is broken", "c.ServerApp.token = ", says="SyntaxError", status=Status.WARN),
    Mutation(
        check="sec.jupyter",
        name="a token that was made when the image was",
        prelude=PLANT + LOADERS + "write('home/.local/share/torchyard/jupyter-token', 'abc')\nos.chdir(site)",
        declared={"program": "notebook", "config": {"env": {"HOME": "home"}}},
        image=True,
        says="jupyter-token holds what the first start makes",
    ),
    Mutation(
        check="sec.jupyter",
        name="a secret for cookies that all containers share",
        prelude=PLANT + LOADERS + "write('home/.local/share/jupyter/runtime/jpserver-7.json', '')\nos.chdir(site)",
        declared={"program": "notebook", "config": {"env": {"HOME": "home"}}},
        image=True,
        says="jpserver-7.json holds what the first start makes",
    ),
    Mutation(
        check="sec.jupyter",
        name="Jupyter's own reading fails",
        prelude=PLANT + "write('jupyter_core/__init__.py', \"raise ImportError('broken')\")",
        declared=NOTEBOOK,
        says="cannot be read",
    ),
    Mutation(
        check="sec.jupyter",
        name="somebody else's image with an open Jupyter",
        prelude=PLANT + LOADERS + "write('etc/jupyter_server_config.py', \"c.ServerApp.token = ''\")",
        says="switches authentication off",
    ),
    Mutation(
        check="sec.jupyter",
        name="the image is for something else",
        prelude="",
        declared={"program": "ssh"},
        status=Status.SKIP,
        says="the image runs ssh, not notebook",
    ),
]
