"""The layers: who may import whom, and what may happen in one place only."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from builder import errors
from builder.errors import TorchyardError

ROOT = Path(__file__).parents[2]

ORDER = (
    "errors",
    # What people decide.
    "facts", "compat", "schema", "toolkit", "reading", "matrix", "aliases", "runners",
    # The store, and what fills it.
    "sha256", "store", "foreign", "fetching", "transfer", "index", "lock",
    # The base: a file system of Debian packages.
    "program", "tar", "compress", "layout", "memory", "reference", "credentials", "registry", "upload", "journal",
    "rootfs", "difference", "debian", "baselock", "bootstrap", "base",
    # From a plan to a proven image.
    "render", "project", "engines",
    # The engine that makes layers of wheels.
    "engines.oci.wheel", "engines.oci.install", "engines.oci.evidence", "engines.oci.recipe", "engines.oci.splice",
    "engines.oci.bytecode", "engines.oci.contents", "engines.oci.foundation", "engines.oci.stack",
    "engines.oci.turns", "engines.oci.layers",
    "engines.oci.inventory", "engines.oci.entries", "engines.oci.installed", "engines.oci.image",
    "engines.oci.arrivals", "engines.oci",
    # Its neighbours, and what uses them.
    "engines.*", "export", "proof", "build", "size", "licences", "bills", "sbom", "validate",
    # What a validation found, and the forms it is read in.
    "report", "reports.plots", "reports.figures", "reports.junit_xml", "reports.summary", "reports.textfile",
    "reports.page", "reports",
    # Publishing.
    "gate", "verdicts", "statement", "cosign", "referrers", "provenance", "attestation", "push", "verify",
    # The same again.
    "listing", "compare", "reproduce",
    # What nobody needs any more.
    "gc",
    # The command line.
    "update", "console", "cli", "__main__",
)  # fmt: skip
"""A module may import only those to its left; engines are neighbours that do not know each other."""

ONLY_IN: Mapping[str, frozenset[str]] = {
    # What is compiled of ours.
    "ctypes": frozenset({"builder.sha256"}),
    "docker": frozenset({"builder.engines.docker"}),
    # docker-py raises its exceptions.
    "requests": frozenset({"builder.transfer", "builder.engines.docker"}),
    "urllib3": frozenset({"builder.transfer"}),
    "pypi_simple": frozenset({"builder.index"}),
    "http": frozenset({"builder.index", "builder.transfer"}),
    "socket": frozenset({"builder.index", "builder.transfer"}),
    "yaml": frozenset({"builder.reading"}),
    "click": frozenset({"builder.cli"}),
    "cyclonedx": frozenset({"builder.sbom"}),
    "rich": frozenset({"builder.console"}),
    # Dockerfiles are printed as they are, pages with everything escaped.
    "jinja2": frozenset({"builder.render", "builder.reports.page"}),
}
SHARED = frozenset({"validate.bundle", "validate.explain", "validate.profile"})
"""What of the suite the builder uses on this side: the suite as a file, the catalogue of failures, the profiles."""
LOOKED_FOR = frozenset(
    {
        ("validate.check", "?"),
        ("validate.installed", "?"),
        ("validate.checks.environment", "numpy"),
        ("validate.checks.companions", "?"),
        ("validate.checks.companions", "torchvision"),
        ("validate.checks.companions", "torchaudio"),
    }
)
"""What the suite imports by name, for it may not be there: its own checks, `packaging` wherever it lies, NumPy and the
libraries that are released for one torch each."""
EXITS = frozenset({"builder.cli", "validate.__main__", "validate.child"})


# --------------------------------------------------------------------------- the checker


def place(module: str) -> int | None:
    """Return the place of a module of builder in the order; None if it has none."""
    name = module.removeprefix("builder.")
    if name not in ORDER and name.startswith("engines."):
        name = "engines.*"
    return ORDER.index(name) if name in ORDER else None


def imported(tree: ast.Module, module: str, known: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield every module that is imported, wherever in the file, with the line."""
    known = frozenset(known)
    package = module if f"{module}.__init__" in known else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "__import__"):
            for argument in node.args[:1]:
                yield (str(argument.value) if isinstance(argument, ast.Constant) else "?"), node.lineno


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return every breach of the rules in the modules, by name and text."""
    known = {name for name in sources if not name.endswith(".__init__")} | {
        name.removesuffix(".__init__") for name in sources
    }
    found = []
    for name, text in sources.items():
        module = name.removesuffix(".__init__")
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            found.append(f"{module}: has no docstring")
        if module.startswith("builder.") and place(module) is None:
            found.append(f"{module}: has no place in the order")
        for target, line in imported(tree, name, known | set(sources)):
            top = target.partition(".")[0]
            where = f"{module}:{line}: imports {target}"
            if top == "validate" and not module.startswith("validate") and target not in SHARED:
                found.append(f"{where}: it runs inside images")
            if module.split(".")[0] == "validate":
                if top not in {*sys.stdlib_module_names, "torch", "validate"} and (module, top) not in LOOKED_FOR:
                    found.append(f"{where}: the standard library and torch are all there is in an image")
                continue
            if target == "?":
                found.append(f"{where}: nobody knows what")
            if top in ONLY_IN and module not in ONLY_IN[top]:
                found.append(f"{where}: that is for {' and '.join(sorted(ONLY_IN[top]))}")
            if top == "builder" and target != "builder":
                mine, its = place(module), place(target)
                if mine is None or its is None or its >= mine:
                    found.append(f"{where}: not to its left")
        found += [f"{module}:{line}: {what}" for line, what in breaches(tree, module)]
    return found


def breaches(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Yield what may happen in one place only, or never."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called(node)
            if name in ("sys.exit", "exit", "quit", "os._exit") and module not in EXITS:
                yield node.lineno, "exits: only the command line does"
            if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
                yield node.lineno, "runs a shell"
            for keyword in node.keywords:
                plain = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "shell" and not plain:
                    yield node.lineno, "runs a shell"
        elif isinstance(node, ast.Raise) and node.exc is not None and module not in EXITS:
            text = ast.unparse(node.exc)
            if re.match(r"SystemExit\b", text):
                yield node.lineno, "exits: only the command line does"


def read(*packages: str) -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    }


# --------------------------------------------------------------------------- the product


def test_the_product_keeps_the_rules() -> None:
    assert violations(read("builder", "validate")) == []


def test_the_order_names_only_what_there_is() -> None:
    names = {name.removeprefix("builder.").removesuffix(".__init__") for name in read("builder")} - {"__init__"}
    plain = {name for name in names if not name.startswith("engines.") or name.startswith("engines.oci")}
    assert plain == {name for name in ORDER if name != "engines.*"}


def test_every_module_can_be_imported_by_itself() -> None:
    # In the order, one process for all: a circle would show as a module that is half made.
    names = [f"builder.{name}" for name in ORDER if name not in ("engines.*", "__main__")]
    code = "\n".join(["import sys", *(f"import {name}; assert '{name}' in sys.modules" for name in names)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


PLANTED: Sequence[tuple[dict[str, str], str]] = [
    ({"builder.matrix": '"""D."""\nfrom builder.lock import Lock\n'}, "imports builder.lock: not to its left"),
    ({"builder.matrix": '"""D."""\ndef f():\n    import builder.cli\n'}, "builder.matrix:3: imports builder.cli"),
    ({"builder.matrix": '"""D."""\nfrom .lock import Lock\n', "builder.lock": '"""D."""'}, "imports builder.lock"),
    ({"builder.matrix": '"""D."""\nfrom . import lock\n', "builder.lock": '"""D."""'}, "imports builder.lock"),
    ({"builder.matrix": '"""D."""\nfrom builder import lock\n', "builder.lock": '"""D."""'}, "imports builder.lock"),
    (
        {
            "builder.engines.__init__": '"""D."""\nfrom .docker import DockerEngine\n',
            "builder.engines.docker": '"""D."""',
        },
        "builder.engines:2: imports builder.engines.docker: not to its left",
    ),
    (
        {
            "builder.engines.podman": '"""D."""\nfrom builder.engines.docker import x\n',
            "builder.engines.docker": '"""D."""',
        },
        "builder.engines.podman:2: imports builder.engines.docker: not to its left",
    ),
    ({"builder.matrix": '"""D."""\nimport builder.matrix\n'}, "not to its left"),
    ({"builder.news": '"""D."""\n'}, "builder.news: has no place in the order"),
    ({"builder.matrix": "x = 1\n"}, "builder.matrix: has no docstring"),
    ({"builder.lock": '"""D."""\nimport docker.errors\n'}, "imports docker.errors: that is for"),
    ({"builder.lock": '"""D."""\nfrom requests import get\n'}, "imports requests: that is for"),
    ({"builder.update": '"""D."""\nimport pypi_simple\n'}, "imports pypi_simple: that is for builder.index"),
    ({"builder.matrix": '"""D."""\nimport yaml\n'}, "imports yaml: that is for builder.reading"),
    ({"builder.lock": '"""D."""\nimport importlib\nimportlib.import_module(name)\n'}, "nobody knows what"),
    (
        {"builder.lock": '"""D."""\nimport importlib\nimportlib.import_module("docker")\n'},
        "imports docker: that is for",
    ),
    ({"builder.proof": '"""D."""\nfrom validate import facts\n'}, "it runs inside images"),
    ({"validate.facts": '"""D."""\nimport numpy\n'}, "imports numpy: the standard library and torch"),
    ({"validate.facts": '"""D."""\nfrom builder import errors\n'}, "imports builder: the standard library and torch"),
    ({"builder.lock": '"""D."""\nimport sys\nsys.exit(1)\n'}, "builder.lock:3: exits"),
    ({"builder.lock": '"""D."""\nraise SystemExit(1)\n'}, "builder.lock:2: exits"),
    ({"builder.lock": '"""D."""\nsubprocess.run("x", shell=True)\n'}, "runs a shell"),
    ({"builder.lock": '"""D."""\nsubprocess.run("x", shell=flag)\n'}, "runs a shell"),
    ({"builder.lock": '"""D."""\nos.system("x")\n'}, "runs a shell"),
]


@pytest.mark.parametrize(("sources", "expected"), PLANTED, ids=[expected for _, expected in PLANTED])
def test_planted_breaches_are_found(sources: dict[str, str], expected: str) -> None:
    found = violations(sources)
    assert len(found) == 1, found
    assert expected in found[0]


def test_what_is_allowed_is_not_found() -> None:
    assert violations({
        "builder.cli": '"""D."""\nimport sys\nfrom builder import __version__, lock\nsys.exit(0)\n',
        "builder.lock": '"""D."""\nfrom .index import Index\nsubprocess.run(["x"], shell=False)\n',
        "builder.index": '"""D."""\nimport pypi_simple\n',
        "builder.transfer": '"""D."""\nimport requests\n',
        "builder.engines.docker": '"""D."""\nimport docker\nimport requests\nfrom builder.engines import Steps\n',
        "builder.engines.__init__": '"""D."""\n',
        "validate.facts": '"""D."""\nimport json\nimport torch\n',
    }) == []  # fmt: skip


# --------------------------------------------------------------------------- errors


def every_error() -> list[type[TorchyardError]]:
    found, todo = [], [TorchyardError]
    while todo:
        kinds = todo.pop().__subclasses__()
        found += kinds
        todo += kinds
    return found


def test_every_error_says_what_it_is_and_has_a_code_of_its_own() -> None:
    kinds = every_error()
    assert {kind.__name__ for kind in kinds} == {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, TorchyardError) and value is not TorchyardError
    }, "errors live in errors.py"
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes), sorted(codes)
    assert all(0 < code < 256 for code in codes)
    for kind in kinds:
        assert "exit_code" in vars(kind), kind
        assert (kind.__doc__ or "").strip().endswith("."), kind


# --------------------------------------------------------------------------- hosts


def registry_hosts() -> set[str]:
    """Return the hosts of package registries, as the tools themselves name them; none is written down here."""
    pip = importlib.import_module("pip._internal.models.index").PyPI
    hosts = {urlsplit(PYPI_SIMPLE_ENDPOINT).hostname, pip.netloc, pip.file_storage_domain}
    if shutil.which("apt-get"):
        command = ["apt-get", "indextargets", "--format", "$(SITE)"]
        sites = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        hosts |= {urlsplit(site).hostname for site in sites if re.search(r"/(debian|ubuntu)\b", site)}
    return {host for host in hosts if host and "." in host}


def project_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:  # a copy without its history
        hidden = r"(^|/)(\.(?!ci|github)[^/]*|__pycache__|build|dist)/"
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        names = [name for name in names if not re.search(hidden, name)]
    return [path for path in (ROOT / name for name in names) if path.is_file()]


def naming(hosts: Iterable[str], text: str) -> set[str]:
    return {host for host in hosts if re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text, re.IGNORECASE)}


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = registry_hosts()
    files = project_files()
    assert len(files) > 50
    found = {}
    for path in files:
        named = naming(hosts, path.read_bytes().decode("utf-8", "replace"))
        if named:
            found[str(path.relative_to(ROOT))] = named
    assert found == {}, "wheels and Debian packages come from wherever the user's environment says"


def test_a_planted_host_is_found() -> None:
    host = str(urlsplit(PYPI_SIMPLE_ENDPOINT).hostname)
    assert host in registry_hosts()
    assert naming([host], f"see https://{host}/simple/") == {host}
    assert naming([host], f"see {host.upper()}.") == {host}
    assert naming([host], f"https://mirror.{host}/") == {host}
    assert naming([host], host.replace(".", "x")) == set()
