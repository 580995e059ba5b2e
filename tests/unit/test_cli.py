"""The command line: what it prints, where, and with which exit code."""

import gc
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import docker
import docker.errors
import pytest
import requests
from click.testing import CliRunner, Result

from builder import cli as commands
from builder.baselock import BaseLock
from builder.cli import cli
from builder.errors import EngineError, InterruptedRunError, LockError, MatrixError, TorchyardError
from builder.project import Project
from tests.support.reports import document, finding, result

ROOT = Path(__file__).parents[2]
CPU = "torch2.13.0-cpu-py3.11-bookworm-runtime"
CUDA = "torch2.8.0-cu128-cudnn9.16.0.29-py3.11-bookworm-runtime"


def run(*arguments: str | Path) -> Result:
    """Run the command line; whatever leaves it but an exit code is a traceback, and fails the test."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy the shipped project, to be damaged."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "images", root / "images")
    for name in ("matrix.yaml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no test reach an engine, an index or the user's store."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine.sock")
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------- help


def test_help_lists_every_verb_and_exit_code() -> None:
    text = run("--help").stdout
    verbs = re.search(r"Commands:\n(.*)", text, re.DOTALL)
    assert verbs
    found = [line.split()[0] for line in verbs[1].splitlines() if re.match(r"  [a-z]", line)]
    line = "matrix resolve lock render fetch build load export licences sbom validate explain report push verify"
    order = [*line.split(), "reproduce", "size", "gc", "update", "doctor"]
    assert found == [verb for verb in order if verb in found], "in the order of the line"
    assert set(found) <= set(order)
    codes = dict(re.findall(r"(?m)^ +([0-9]+)  ([A-Z a-z].*)$", text))
    assert codes["0"] == "done"
    kinds = {str(kind.exit_code): (kind.__doc__ or "").splitlines()[0] for kind in TorchyardError.__subclasses__()}
    assert codes == {"0": "done"} | kinds


VERBS = [
    path
    for name, command in cli.commands.items()
    for path in ([[name, inner] for inner in command.commands] if isinstance(command, click.Group) else [[name]])
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb: list[str]) -> None:
    text = run(*verb, "--help").stdout
    assert "--json" in text
    assert "--matrix" in text
    assert "\\b" not in text, "meant for click, not for people"
    assert len(text.splitlines()[2].strip()) > 20


def test_the_version() -> None:
    assert run("--version").stdout.startswith("torchyard, version ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["matrix", "--nonsense"], ["resolve"], ["build", "--engine", "x"]])
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


# --------------------------------------------------------------------------- matrix


def test_matrix_for_machines() -> None:
    result = run("matrix", "-m", ROOT / "matrix.yaml", "--json")
    assert result.exit_code == 0
    cells = json.loads(result.stdout)
    fields = ["id", "torch", "cuda", "cudnn", "nccl", "python", "base", "variant", "companions"]
    fields += ["platform", "tags", "base_kind", "tiers", "runners"]
    assert all(list(cell) == fields for cell in cells)
    by_id = {cell["id"]: cell for cell in cells}
    cuda, cpu = by_id[CUDA], by_id[CPU]
    assert (cuda["torch"], cuda["cuda"], cuda["cudnn"], cuda["nccl"]) == ("2.8.0", "12.8", "9.16.0.29", "2.27.3")
    assert (cpu["cuda"], cpu["cudnn"], cpu["nccl"]) == ("cpu", None, None)
    assert (cuda["python"], cuda["base"], cuda["variant"]) == ("3.11", "bookworm", "runtime")
    assert cuda["platform"] == "linux/amd64"
    assert cuda["tags"] == ["torchyard:2.8.0-cuda12.8-cudnn9.16.0.29-runtime", f"torchyard:{CUDA}"]
    assert (cuda["base_kind"], cuda["tiers"], cuda["runners"]) == ("bootstrap", [1], [])


def test_matrix_for_people_is_a_line_a_cell() -> None:
    lines = run("matrix", "-m", ROOT / "matrix.yaml").stdout.splitlines()
    assert lines[0].split()[:4] == ["torch", "cuda", "cudnn", "nccl"]
    assert len(lines) == 1 + len(Project(ROOT / "matrix.yaml").cells)
    assert any(re.match(r"2\.8\.0 +12\.8 +9\.16\.0\.29 .* torchyard:2\.8\.0-cuda12\.8-cudnn9\.16", it) for it in lines)


def test_matrix_with_patterns() -> None:
    result = run("matrix", "-m", ROOT / "matrix.yaml", "--json", "torch2.8*", "*-cpu-*")
    assert {cell["torch"] for cell in json.loads(result.stdout)} == {"2.8.0", "2.13.0"}


def test_matrix_schema() -> None:
    assert json.loads(run("matrix", "--schema").stdout) == json.loads(
        (ROOT / "docs" / "matrix.schema.json").read_text("utf-8")
    )


@pytest.mark.parametrize("verb", ["matrix", "lock", "render", "fetch", "build"])
def test_an_unknown_cell_is_3_with_what_is_near(verb: str, project: Path) -> None:
    before = tree(project)
    result = run(verb, "-m", project / "matrix.yaml", "2.8.0-cuda12.8-cudnn9-runtim", "zzz")
    assert result.exit_code == 3
    assert "no cell matches '2.8.0-cuda12.8-cudnn9-runtim'" in result.stderr
    assert re.search(r"(?m)^  try   2\.8\.0-cuda12\.8-cudnn9-runtime$", result.stderr)
    assert "no cell matches 'zzz'" in result.stderr
    assert result.stdout == ""
    assert tree(project) == before


def test_a_missing_matrix_is_2(tmp_path: Path) -> None:
    result = run("matrix")
    assert result.exit_code == 2
    assert "matrix.yaml does not exist" in result.stderr
    assert "--matrix" in result.stderr


@pytest.mark.parametrize("verb", [["matrix"], ["lock"], ["lock", "--check"], ["render"], ["fetch"], ["build", "--all"]])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["", "json"])
def test_a_bad_matrix_is_2_with_everything_that_is_wrong_and_nothing_is_written(
    verb: list[str], options: list[str], project: Path, tmp_path: Path
) -> None:
    edit(project / "matrix.yaml", "description: PyTorch", "description: $(id) PyTorch")
    edit(project / "matrix.yaml", "exclude:\n", "exclude:\n  - {torch: '2.99.0', reason: never}\n")
    edit(project / "matrix.yaml", "include:\n", 'include:\n  - {torch: "2.8.0", cuda: "12.1"}\n')
    before = tree(tmp_path)
    result = run(*verb, *options, "-m", project / "matrix.yaml")
    assert result.exit_code == 2
    for place in ("variants.runtime.description", "exclude[0]", "include[0] ("):
        assert f"  where matrix.yaml: {place}" in result.stderr
    assert "3 problems" in result.stderr
    if options:
        document = json.loads(result.stdout)
        assert document["exit_code"] == 2
        assert len(document["problems"]) == 3
    else:
        assert result.stdout == ""
    assert tree(tmp_path) == before


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    result = run("matrix", "-m", tmp_path / "a\x1b[31mb\x07" / "matrix.yaml")
    assert result.exit_code == 2
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    result = run("matrix", "-m", ROOT / "matrix.yaml", "\x1b]0;title\x07")
    assert result.exit_code == 3
    assert "\x1b" not in result.output


# --------------------------------------------------------------------------- resolve


def resolve(*arguments: str) -> tuple[Result, dict[str, Any]]:
    """Ask for people, and for machines."""
    people, machines = run("resolve", *arguments), run("resolve", *arguments, "--json")
    assert people.exit_code == machines.exit_code
    document: dict[str, Any] = json.loads(machines.stdout)
    assert document["possible"] is (people.exit_code == 0)
    return people, document


def test_claim_2_7_0_with_cuda_11_8_and_cudnn_8() -> None:
    result, document = resolve("--torch", "2.7.0", "--cuda", "11.8", "--cudnn", "8")
    assert result.exit_code == 3
    assert "torch 2.7.0 for CUDA 11.8 carries cuDNN 9 (9.1.0.70), and cuDNN 8 cannot replace it" in result.stdout
    assert "the last torch with cuDNN 8 was 2.3.1" in result.stdout
    assert ("2.7.0", "11.8", "9.1.0.70") in {(it["torch"], it["cuda"], it["cudnn"]) for it in document["alternatives"]}


def test_claim_2_8_with_cuda_12_1_and_cudnn_8_9() -> None:
    result, document = resolve("--torch", "2.8", "--cuda", "12.1", "--cudnn", "8.9")
    assert result.exit_code == 3
    assert "torch 2.8.0 was never built for CUDA 12.1" in result.stdout
    assert "2.8.0 was published for 12.6, 12.8 and 12.9 (cu121 ended with torch 2.5)" in result.stdout
    assert "cuDNN 8.9" in result.stdout
    assert ("2.8.0", "12.6") in {(it["torch"], it["cuda"]) for it in document["alternatives"]}
    assert all(it["driver"] for it in document["alternatives"])


def test_claim_2_9_with_driver_525() -> None:
    result, document = resolve("--torch", "2.9", "--driver", "525")
    assert result.exit_code == 0
    notes = "\n".join(document["notes"])
    assert "CUDA 12.8: yes, by minor-version compatibility" in notes
    assert "CUDA 13.0: no" in notes
    assert re.search(r"not on sm_100.*Blackwell", notes)
    assert document["combination"]["cuda"] == "12.8"
    for note in document["notes"]:
        assert note in result.stdout


def test_claim_2_9_with_driver_525_on_blackwell() -> None:
    result, _ = resolve("--torch", "2.9", "--driver", "525", "--gpu", "B200")
    assert result.exit_code == 3
    assert "570" in result.stdout


def test_waivers_that_are_none_are_2_and_nothing_runs(tmp_path: Path) -> None:
    path = tmp_path / "waivers.json"
    arguments = ("validate", "--local", "--only", "run.identity", "--waivers", path, "--report-dir", tmp_path / "r")
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"the waivers cannot be read\n  where {path}" in result.stderr
    path.write_text('{"schema": 1, "waivers": [{"check": "run.*", "why": "all", "until": "2026-12-31"}]}', "utf-8")
    result = run(*arguments)
    assert result.exit_code == 2
    assert 'waivers[0].check: there is no check "run.*"' in result.stderr
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------- validate


def validated(monkeypatch: pytest.MonkeyPatch, *ends: Mapping[str, Any] | TorchyardError) -> Callable[..., Result]:
    """Return the verb for images of which each is validated as told: a report comes, or an error."""

    def target(number: int, end: Mapping[str, Any] | TorchyardError) -> commands._Target:
        def ran(on_event: Callable[[Mapping[str, Any]], None]) -> tuple[None, dict[str, Any]]:
            on_event({"event": "result", "id": "run.import", "text": ["ok     run.import"]})
            if isinstance(end, TorchyardError):
                raise end
            return None, dict(end)

        return commands._Target(f"image:{number}", ran)

    targets = [target(number, end) for number, end in enumerate(ends, 1)]
    monkeypatch.setattr(commands, "_targets", lambda *_, **__: iter(targets))
    return lambda *arguments: run("validate", "image", *arguments)


PASSED = document([result("run.import")], tiers={"1": True})
FAILED = document([result("run.import", "fail", findings=[finding("torch does not import")])], tiers={"1": False})
WITHOUT_GPU = EngineError("the engine cannot give a container a GPU", where="image:1", why="no driver", tries=("run",))


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_validated_is_one_document(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    ran = validated(monkeypatch, *[PASSED, FAILED][:count])("--json")
    assert ran.exit_code == count - 1
    documents = json.loads(ran.stdout)
    assert [one["subject"] for one in documents] == ["image:1", "image:2"][:count]
    assert [one["exit_code"] for one in documents] == [0, 1][:count]
    assert [one["problems"] for one in documents] == [[]] * count
    for one in documents:
        assert one["report"] == json.loads((Path(one["directory"]) / "report.json").read_text("utf-8"))
    assert "ok     run.import" in ran.stderr, "people are told as it goes on"


def test_what_could_not_be_validated_is_in_that_document(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = validated(monkeypatch, WITHOUT_GPU, PASSED)("--json")
    assert ran.exit_code == 3
    first, second = json.loads(ran.stdout)
    assert first == {
        "subject": "image:1",
        "exit_code": 3,
        "directory": None,
        "report": None,
        "problems": [
            {
                "what": "the engine cannot give a container a GPU",
                "where": "image:1",
                "why": "no driver",
                "tries": ["run"],
            }
        ],
    }
    assert (second["exit_code"], second["problems"]) == (0, [])


OTHERS = [kind for kind in TorchyardError.__subclasses__() if kind not in (MatrixError, InterruptedRunError)]


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["", "json"])
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_whatever_keeps_an_image_from_being_validated_is_3(
    monkeypatch: pytest.MonkeyPatch, kind: type[TorchyardError], options: list[str]
) -> None:
    """The codes of other verbs mean something else here: 4 is a stale lock there, and a check that did not run here."""
    error = kind("it is so", where="there", why="that is why", tries=("try this",))
    ran = validated(monkeypatch, error)(*options)
    assert ran.exit_code == 3
    assert "error it is so\n  where there\n  why   that is why\n  try   try this\n" in ran.stderr

    def refused(*_: object, **__: object) -> Iterator[commands._Target]:
        raise error
        yield

    monkeypatch.setattr(commands, "_targets", refused)
    ran = run("validate", "image", *options)
    assert ran.exit_code == 3
    assert "error it is so\n" in ran.stderr


def test_what_was_asked_wrongly_is_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validated(monkeypatch, MatrixError("no such profile"))().exit_code == 2
    assert validated(monkeypatch, MatrixError("no such profile"), MatrixError("no such profile"))().exit_code == 2
    assert validated(monkeypatch, MatrixError("no such profile"), WITHOUT_GPU)().exit_code == 3


def test_reports_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = validated(monkeypatch, PASSED)("--report-dir", str(tmp_path / "file" / "reports"))
    assert ran.exit_code == 2
    assert "the reports cannot be written" in ran.stderr


def test_every_code_of_a_validation_stands_in_its_help() -> None:
    text = run("validate", "--help").stdout
    for code in (0, 1, 2, 3, 4, 5):
        assert re.search(rf"^ +{code}  \S", text, re.MULTILINE), code


def test_what_cannot_be_understood_is_2() -> None:
    result = run("resolve", "--torch", "banana", "--gpu", "toaster")
    assert result.exit_code == 2
    assert "'banana' is not a version" in result.stderr
    assert "'toaster' is not known" in result.stderr


# --------------------------------------------------------------------------- lock and render


def test_the_shipped_locks_and_files_are_fresh() -> None:
    for verb in ("lock", "render"):
        result = run(verb, "--check", "-m", ROOT / "matrix.yaml")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""


Damage = Callable[[Path], object]
LOCK = f"images/{CPU}/pylock.toml"
BASE = "images/bases/bookworm-amd64.toml"


def flip(path: Path) -> None:
    text = path.read_text("utf-8")
    last = re.findall(r'sha256 = "[0-9a-f]{64}"', text)[-1]
    digit = "1" if last[-2] == "0" else "0"
    path.write_text(text.replace(last, f'{last[:-2]}{digit}"'), "utf-8")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a flipped digit": (lambda root: flip(root / LOCK), "edited or damaged"),
    "a truncated lock": (lambda root: (root / LOCK).write_text((root / LOCK).read_text("utf-8")[:900]), LOCK),
    "no lock": (lambda root: (root / LOCK).unlink(), "is not locked"),
    "another schema": (lambda root: edit(root / LOCK, "schema = 1", "schema = 99"), "unknown schema version 99"),
    "a base with another package": (lambda root: edit(root / BASE, '"gcc"', '"gcd"'), BASE),
    "no base": (lambda root: (root / BASE).unlink(), "the base bookworm is not locked"),
    "another package in the matrix": (
        lambda root: edit(root / "matrix.yaml", "[numpy, setuptools]", "[numpy<2, setuptools]"),
        "is stale",
    ),
    "another date in the matrix": (lambda root: edit(root / "matrix.yaml", "2026-11-15T", "2026-11-14T"), "is stale"),
    "another base package in the matrix": (lambda root: edit(root / "matrix.yaml", "- gcc", "- gdb"), "stale"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "verb", [["lock", "--check"], ["render", "--check"], ["render"], ["fetch"], ["build"]], ids=str
)
def test_a_bad_lock_is_4_and_nothing_is_written(damage: str, verb: list[str], project: Path, tmp_path: Path) -> None:
    make, said = DAMAGES[damage]
    make(project)
    before = tree(tmp_path)
    result = run(*verb, "-m", project / "matrix.yaml", CPU)
    assert result.exit_code == 4, result.output
    assert said in result.stderr
    assert re.search(r"(?m)^  (try|where) ", result.stderr)
    assert tree(tmp_path) == before


def test_debian_s_updates_come_without_other_wheels(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def later(*, previous: Sequence[BaseLock], keep: BaseLock | None, **_: Any) -> tuple[BaseLock, ...]:
        assert keep is None
        return tuple(replace(one, epoch=one.epoch + 86400) for one in previous)

    monkeypatch.setattr("builder.base.lock", later)
    monkeypatch.setattr("builder.lock.lock_cell", lambda *_: pytest.fail("a wheel was asked for"))
    before = tree(project)
    result = run("lock", "--bases", "--keep-wheels", "-m", project / "matrix.yaml")
    assert result.exit_code == 0, result.stderr
    changed = {name for name, content in tree(project).items() if before[name] != content}
    assert changed
    assert all(name.startswith("images/bases/") for name in changed)
    edit(project / "matrix.yaml", "[numpy, setuptools]", "[numpy<2, setuptools]")
    stale = run("lock", "--keep-wheels", "-m", project / "matrix.yaml")
    assert stale.exit_code == LockError.exit_code
    assert "is stale" in stale.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "image.json", "requirements.txt"])
def test_an_edited_file_is_4_until_it_is_rendered_again(name: str, project: Path) -> None:
    before = tree(project)
    path = project / "images" / CPU / name
    path.write_text(path.read_text("utf-8") + "# edited\n", "utf-8")
    result = run("render", "--check", "-m", project / "matrix.yaml")
    assert result.exit_code == 4
    assert f"  where {path}" in result.stderr
    assert "torchyard render" in result.stderr
    assert run("render", "-m", project / "matrix.yaml", "-q").exit_code == 0
    assert tree(project) == before
    assert run("render", "--check", "-m", project / "matrix.yaml").exit_code == 0


def test_rendering_tells_what_changed(project: Path) -> None:
    (project / "images" / CPU / "Dockerfile").unlink()
    result = run("render", "-m", project / "matrix.yaml", "--json")
    changed = {it["id"] for it in json.loads(result.stdout) if it["changed"]}
    assert changed == {CPU}


def test_what_no_cell_has_is_reported_then_removed_but_nothing_of_the_user_s(project: Path) -> None:
    stray = project / "images" / "torch1.0.0-gone"
    shutil.copytree(project / "images" / CPU, stray)
    (stray / "notes.txt").write_text("mine")
    result = run("render", "--check", "-m", project / "matrix.yaml")
    assert result.exit_code == 4
    assert "belongs to no cell" in result.stderr
    assert run("render", "-m", project / "matrix.yaml").exit_code == 0
    assert [path.name for path in stray.iterdir()] == ["notes.txt"]
    assert run("render", "--check", "-m", project / "matrix.yaml").exit_code == 0


def test_a_bad_template_is_2(project: Path) -> None:
    shutil.copytree(ROOT / "templates", project / "templates")
    edit(project / "templates" / "Dockerfile.j2", "FROM base\n", "FROM {{ nonsense }}\n")
    before = tree(project)
    result = run("render", "-m", project / "matrix.yaml")
    assert result.exit_code == 2
    assert "'nonsense' is undefined" in result.stderr
    assert "Dockerfile.j2: line " in result.stderr
    assert tree(project) == before


# --------------------------------------------------------------------------- build


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("builder.engines.docker.DockerEngine", lambda: pytest.fail("an engine was asked"))
    return iter(())


@pytest.fixture
def dead_engine() -> Iterator[None]:
    """Collect what docker-py leaves of a failed attempt, an open socket, before another test is blamed for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("dead_engine")
@pytest.mark.parametrize("host", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:1", "nonsense"])
def test_without_an_engine_it_is_8_with_three_ways_to_get_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    result = run("build", "-m", ROOT / "matrix.yaml", CPU, "--load")
    assert result.exit_code == 8
    assert "no container engine answers" in result.stderr
    assert host in result.stderr
    assert len(re.findall(r"(?m)^  (?:try|or ) ", result.stderr)) >= 3
    assert result.stdout == ""
    assert result.stderr.count("\n") < 12


def test_an_engine_that_refuses_is_quoted_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        inner = requests.ConnectionError("HTTPConnectionPool(...): (Caused by X('[Errno 111] Connection refused'))")
        raise docker.errors.DockerException(inner)

    monkeypatch.setattr(docker, "from_env", refuse)
    result = run("load", "-m", ROOT / "matrix.yaml", CPU)
    assert result.exit_code == 8
    assert re.search(r"(?m)^  why   Connection refused$", result.stderr)


@pytest.mark.usefixtures("dead_engine")
def test_without_an_engine_machines_are_told_too() -> None:
    result = run("build", "-m", ROOT / "matrix.yaml", CPU, "--engine", "docker", "--json")
    assert result.exit_code == 8
    assert json.loads(result.stdout)["error"] == "EngineError"


@pytest.mark.usefixtures("no_engine")
def test_an_edited_image_directory_is_refused_before_an_engine_is_asked(project: Path) -> None:
    edit(project / "images" / CPU / "Dockerfile", "USER 1000:0", "USER 0:0")
    result = run("build", "-m", project / "matrix.yaml", CPU)
    assert result.exit_code == 4
    assert "Dockerfile" in result.stderr


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(("arguments", "said"), [([], "no cell is named"), (["--all", CPU], "exclude each other")])
def test_what_to_build_must_be_said(arguments: list[str], said: str) -> None:
    result = run("build", "-m", ROOT / "matrix.yaml", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


# --------------------------------------------------------------------------- the rest


def test_an_interrupted_run_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Project, "select", interrupt)
    result = run("matrix", "-m", ROOT / "matrix.yaml")
    assert result.exit_code == 130
    assert "stopped" in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(TorchyardError):
        run("matrix", "-m", tmp_path / "matrix.yaml", "--debug")
