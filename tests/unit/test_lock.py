"""A lock says what makes an image, and nothing that was edited, cut or made for another matrix passes for one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder import lock as locks
from builder.errors import LockError
from builder.lock import DEFAULT_INDEX, Lock, Wheel, contradictions, dumps, load, loads, request_of, requirements_txt
from builder.matrix import Cell
from tests.support.cells import cell
from tests.support.wheels import FakeWheel, Universe, universe

CELL = cell()
CPU = cell("2.13.0", "cpu", index_url="http://127.0.0.1/pytorch-cpu/simple")


def entry(made: FakeWheel, index: str = DEFAULT_INDEX) -> Wheel:
    return Wheel(
        name=canonicalize_name(made.project),
        version=made.version,
        filename=made.filename,
        sha256=made.sha256,
        size=len(made.content),
        upload_time=made.upload_time,
        index=index,
    )


def lock_of(of: Cell, made: Universe | None = None) -> Lock:
    made = made or universe(of)
    # Of a cuDNN that is overridden, the universe has torch's own version as well.
    wheels = [entry(one) for one in made.default if "cudnn" not in one.project or one.version == of.cudnn]
    wheels += [entry(one, name) for name, group in made.explicit.items() for one in group]
    return Lock(
        request=request_of(of).digest,
        cell_id=of.id,
        python=of.python,
        exclude_newer=of.exclude_newer,
        resolver="uv 0.9.0",
        wheels=tuple(sorted(wheels, key=lambda wheel: wheel.name)),
    )


LOCK = lock_of(CELL)
TEXT = dumps(LOCK)


def refused(text: str) -> str:
    """Return all that the refusal of `text` says."""
    with pytest.raises(LockError) as caught:
        loads(text, where="images/x/pylock.toml")
    (problem,) = caught.value.problems
    assert problem.where.startswith("images/x/pylock.toml")
    assert problem.tries
    return f"{problem.where}: {problem.what}: {problem.why}"


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    """Edit the lock as somebody does who also corrects its digest."""
    content = tomllib.loads(TEXT)
    edit(content)
    content["tool"]["torchyard"]["digest"] = locks._self_digest(content)
    return tomli_w.dumps(content)


# --- the file


@pytest.mark.parametrize("of", [CELL, CPU, cell(cudnn="9.16.0.29")], ids=lambda of: of.id)
def test_round_trip(of: Cell) -> None:
    lock = lock_of(of)
    text = dumps(lock)
    assert loads(text, where="x") == lock
    assert dumps(loads(text, where="x")) == text


def test_the_file_is_a_pylock_with_one_wheel_a_package() -> None:
    content = tomllib.loads(TEXT)
    assert content["lock-version"] == "1.0"
    assert content["requires-python"] == "==3.11.*"
    for package in content["packages"]:
        (found,) = package["wheels"]
        assert found["path"] == f"wheels/{found['name']}"
        assert set(found) == {"name", "path", "size", "upload-time", "hashes"}


@pytest.mark.parametrize("of", [CELL, CPU], ids=lambda of: of.id)
def test_no_address_in_it(of: Cell) -> None:
    lock = lock_of(of)
    for text in (dumps(lock), requirements_txt(lock)):
        assert "://" not in text
        assert "127.0.0.1" not in text
        assert not re.search(r"\b[a-z0-9-]+\.(org|com|net|io|example)\b", text)


def test_an_unknown_upload_time_is_left_out() -> None:
    wheels = tuple(replace(one, upload_time=None) for one in LOCK.wheels)
    lock = replace(LOCK, wheels=wheels)
    assert "upload-time" not in dumps(lock)
    assert loads(dumps(lock), where="x") == lock
    assert lock.epoch == int(LOCK.exclude_newer.timestamp())


def test_epoch_is_the_newest_upload() -> None:
    newest = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
    wheels = (replace(LOCK.wheels[0], upload_time=newest), *LOCK.wheels[1:])
    assert replace(LOCK, wheels=wheels).epoch == int(newest.timestamp())


def test_versions() -> None:
    assert LOCK.version("torch") == Version("2.8.0")
    assert LOCK.version("nothing", "Typing_Extensions") == Version("4.14.0")
    assert LOCK.version("nothing") is None
    assert (str(LOCK.cuda), str(LOCK.cudnn), str(LOCK.nccl)) == ("12.8.90", "9.10.2.21", "2.27.3")
    of_13 = lock_of(cell("2.15.0", "13.2"))
    assert of_13.cuda == Version("13.2.90")
    none = lock_of(CPU)
    assert (none.cuda, none.cudnn, none.nccl) == (None, None, None)
    assert LOCK.size == sum(one.size for one in LOCK.wheels)


def test_requirements_txt() -> None:
    lines = [line for line in requirements_txt(LOCK).splitlines() if not line.startswith("#")]
    assert len(lines) == len(LOCK.wheels)
    for line, locked in zip(lines, LOCK.wheels, strict=True):
        requirement, digest = line.split(" --hash=sha256:")
        assert Requirement(requirement).name == locked.name
        assert str(Requirement(requirement).specifier) == f"=={locked.version}"
        assert digest == locked.sha256
    assert "torch==2.13.0+cpu --hash" in requirements_txt(lock_of(CPU))


def test_wanted_names_the_explicit_index() -> None:
    found = {one.name: one.wanted(CPU) for one in lock_of(CPU).wheels}
    assert found[canonicalize_name("torch")].index_url == "http://127.0.0.1/pytorch-cpu/simple"
    assert found[canonicalize_name("numpy")].index_url is None


# --- damage


def test_whatever_is_changed_in_it_is_noticed() -> None:
    guarded = [
        match.span(1)
        for pattern in (
            r'^sha256 = "(.*)"$', r'^(?:version|name|path) = "(.*)"$', r"^size = (.*)$", r"^upload-time = (.*)$",
            r'^(?:cell|request|resolver|python|digest) = "(.*)"$', r"^(?:schema|exclude-newer) = (.*)$",
        )
        for match in re.finditer(pattern, TEXT, re.MULTILINE)
    ]  # fmt: skip
    positions = [position for start, end in guarded for position in range(start, end)]
    assert len(positions) > 1000

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(position=st.sampled_from(positions), new=st.characters(min_codepoint=32, max_codepoint=126))
    def check(position: int, new: str) -> None:
        text = TEXT[:position] + new + TEXT[position + 1 :]
        try:
            assert loads(text, where="x") == LOCK  # the same in other words, such as 12:00Z for 12:00+00:00
        except LockError:
            return
        line = text[text.rfind("\n", 0, position) + 1 :].split("\n")[0]
        assert text == TEXT or line.startswith(("upload-time", "exclude-newer")), line

    check()


@pytest.mark.parametrize("number", range(4))
def test_a_flipped_digit_of_a_hash(number: int) -> None:
    digest = LOCK.wheels[number].sha256
    flipped = digest[:17] + ("0" if digest[17] != "0" else "1") + digest[18:]
    text = refused(TEXT.replace(digest, flipped))
    assert "edited or damaged" in text
    assert "tool.torchyard.digest" in text


@settings(max_examples=200, deadline=None)
@given(end=st.integers(min_value=0, max_value=len(TEXT) - 2))
def test_a_truncated_lock(end: int) -> None:
    with pytest.raises(LockError):
        loads(TEXT[:end], where="x")


@settings(max_examples=200, deadline=None)
@given(line=st.integers(min_value=0, max_value=TEXT.count("\n") - 1))
def test_a_lost_line(line: int) -> None:
    lines = TEXT.splitlines(keepends=True)
    lost = lines.pop(line)
    try:
        assert loads("".join(lines), where="x") == LOCK
    except LockError:
        return
    assert lost.startswith("#") or not lost.strip()


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_rubbish(text: str) -> None:
    with pytest.raises(LockError):
        loads(text, where="x")


def test_comments_are_free() -> None:
    assert loads("# somebody's note\n" + TEXT, where="x") == LOCK


@pytest.mark.parametrize("schema", ["0", "2", '"1"', "[]"])
def test_unknown_schema(schema: str) -> None:
    text = refused(TEXT.replace("schema = 1\n", f"schema = {schema}\n"))
    assert "unknown schema version" in text
    assert "tool.torchyard.schema" in text


@pytest.mark.parametrize("text", ["", "tool = 3\n", '[tool]\ntorchyard = "x"\n', 'lock-version = "1.0"\n'])
def test_not_a_lock_of_ours(text: str) -> None:
    assert "not a lock of torchyard" in refused(text)


def first_wheel(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["packages"][0]["wheels"][0]
    return found


def rename(content: dict[str, Any]) -> None:
    first_wheel(content).update(name="evil-1.0-py3-none-any.whl", path="wheels/evil-1.0-py3-none-any.whl")


# In each, the digest is right: the edit was made by somebody who knows the format.
@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda c: c["packages"].append(c["packages"][0]), "locked twice"),
        (lambda c: first_wheel(c).update(url="https://evil.example/a.whl"), "no URL"),
        (lambda c: first_wheel(c).pop("size"), "a size"),
        (lambda c: first_wheel(c).update(hashes={"sha256": "A" * 64}), "SHA-256"),
        (lambda c: first_wheel(c).update(hashes={"md5": "0" * 32}), "SHA-256"),
        (lambda c: first_wheel(c)["hashes"].update(md5="0" * 32), "more than torchyard writes"),
        (lambda c: first_wheel(c).update(name="setup.py", path="wheels/setup.py"), "not valid|not a wheel"),
        (lambda c: first_wheel(c).update(path="../../etc/passwd"), "more than torchyard writes"),
        (rename, "not consistent|another package"),
        (lambda c: c["packages"][0].update(version="0.0.1"), "not consistent|another package or version"),
        (lambda c: c["packages"][0].pop("version"), "has a version"),
        (lambda c: c["packages"][0].update(wheels=[]), "not valid|exactly one wheel"),
        (lambda c: c["packages"][0]["wheels"].append(first_wheel(c)), "exactly one wheel"),
        (lambda c: c["packages"][0].update(index="https://evil.example/simple"), "more than torchyard writes"),
        (lambda c: c["packages"][0].update(marker="python_version < '3'"), "more than torchyard writes"),
        (
            lambda c: c["packages"][0].update(
                sdist={"url": "https://evil.example/numpy-2.3.1.tar.gz", "hashes": {"sha256": "0" * 64}}
            ),
            "more than torchyard writes",
        ),
        (lambda c: c.update(environments=["sys_platform == 'win32'"]), "more than torchyard writes"),
        (lambda c: c["tool"]["torchyard"].update(note="hello"), "more than torchyard writes"),
        (lambda c: c["tool"].update(other={"x": 1}), "more than torchyard writes"),
        (lambda c: c["tool"]["torchyard"].pop("request"), "lacks a field"),
        (lambda c: c["tool"]["torchyard"].update(cell=3), "lacks a field"),
        (lambda c: c.update({"lock-version": "9.0"}), "not valid"),
        (lambda c: c.update(packages={}), "not valid"),
    ],
)
def test_a_lock_with_what_no_lock_has(edit: Callable[[dict[str, Any]], object], what: str) -> None:
    assert re.search(what, refused(edited(edit)))


# --- of which matrix


def test_the_request_is_all_that_decides() -> None:
    request = request_of(CPU)
    changes: dict[str, Any] = {
        "cell_id": "another",
        "requirements": (*request.requirements, "scipy"),
        "overrides": ("numpy==1.0",),
        "sources": (("torch", "another", "http://127.0.0.1/simple"),),
        "python": "3.12",
        "platform": "linux/arm64",
        "exclude_newer": datetime(2026, 1, 1, tzinfo=UTC),
    }
    assert {*changes, "companions"} == {field.name for field in fields(request)}, "those are among the requirements"
    digests = {replace(request, **{name: value}).digest for name, value in changes.items()}
    assert len(digests) == len(changes)
    assert request.digest not in digests
    assert request_of(CPU).digest == request.digest


def test_a_mirror_of_an_index_changes_nothing() -> None:
    here = request_of(CPU)
    there = request_of(cell("2.13.0", "cpu", index_url="http://127.0.0.1/mirror/simple"))
    assert here.sources != there.sources
    assert here.digest == there.digest


def test_what_is_asked_for() -> None:
    stock, override = request_of(CELL), request_of(cell(cudnn="9.16.0.29", packages=["scipy>=1.10", "numpy"]))
    assert (stock.requirements, stock.overrides, stock.sources) == (("torch==2.8.0", "numpy", "pip"), (), ())
    assert override.requirements == ("torch==2.8.0", "numpy", "pip", "scipy>=1.10")
    assert override.overrides == ("nvidia-cudnn-cu12==9.16.0.29",)
    assert request_of(CPU).requirements[0] == "torch==2.13.0+cpu"
    assert request_of(cell("2.15.0", "13.2", cudnn="9.27.0.10")).overrides == ("nvidia-cudnn-cu13==9.27.0.10",)


def write(path: Path, lock: Lock) -> Path:
    path.write_text(dumps(lock), "utf-8")
    return path


def test_load(tmp_path: Path) -> None:
    assert load(write(tmp_path / "pylock.toml", LOCK), CELL) == LOCK


@pytest.mark.parametrize(
    "changed",
    [
        cell(packages=["numpy", "scipy"]),
        cell(exclude_newer="2026-11-16T00:00:00Z"),
        cell(index_url="http://127.0.0.1/pytorch-cu128/simple"),
    ],
)
def test_a_stale_lock(tmp_path: Path, changed: Cell) -> None:
    assert changed.id == CELL.id
    path = write(tmp_path / "pylock.toml", LOCK)
    with pytest.raises(LockError, match="stale") as caught:
        load(path, changed)
    (problem,) = caught.value.problems
    assert CELL.id in problem.what
    assert "the matrix asks for something else" in problem.why
    assert problem.where == str(path)
    assert problem.tries == (f"torchyard lock '{CELL.id}'",)


def test_the_lock_of_another_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "pylock.toml", lock_of(CPU))
    with pytest.raises(LockError, match="stale") as caught:
        load(path, CELL)
    assert CPU.id in caught.value.problems[0].why


def test_no_lock(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="is not locked"):
        load(tmp_path / "pylock.toml", CELL)
    (tmp_path / "pylock.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(LockError, match="cannot be read"):
        load(tmp_path / "pylock.toml", CELL)


def test_a_lock_that_contradicts_its_cell(tmp_path: Path) -> None:
    cpu_set = replace(LOCK, wheels=tuple(one for one in LOCK.wheels if not one.name.startswith("nvidia-")))
    with pytest.raises(LockError, match="another environment") as caught:
        load(write(tmp_path / "pylock.toml", cpu_set), CELL)
    assert "it is a CPU set" in caught.value.problems[0].why


# --- contradictions


def changed(lock: Lock, name: str, version: str | None) -> Lock:
    """Return the lock with another version of a package, or without it."""
    wheels = (
        replace(one, version=Version(version or "0")) if one.name == name else one
        for one in lock.wheels
        if version is not None or one.name != name
    )
    return replace(lock, wheels=tuple(wheels))


@pytest.mark.parametrize(
    "of",
    [CELL, CPU, cell(cudnn="9.16.0.29"), cell("2.15.0", "13.2"), cell("2.7.1", "11.8", index_url="http://a.example")],
    ids=lambda of: of.id,
)
def test_no_contradiction(of: Cell) -> None:
    assert contradictions(of, lock_of(of)) == []


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torch", "2.8.1", "torch 2.8.0 was asked for, 2.8.1 is locked"),
        ("torch", None, "torch 2.8.0 was asked for, none is locked"),
        ("torch", "2.8.0+cpu", "torch 2.8.0+cu128 was asked for, 2.8.0+cpu is locked"),
        ("nvidia-cuda-runtime-cu12", "12.6.77", "the CUDA runtime in the set is 12.6.77"),
        ("nvidia-cuda-runtime-cu12", None, "it is a CPU set"),
        ("nvidia-cudnn-cu12", "9.16.0.29", "cuDNN 9.10.2.21 was asked for, 9.16.0.29 is locked"),
        ("nvidia-cudnn-cu12", None, "cuDNN 9.10.2.21 was asked for, none is locked"),
        ("nvidia-nccl-cu12", None, "the set has no NCCL"),
        ("nvidia-nccl-cu12", "2.26.2", "NCCL 2.27.3 is torch's own, 2.26.2 is locked"),
    ],
)
def test_contradictions(name: str, version: str | None, said: str) -> None:
    (found,) = contradictions(CELL, changed(LOCK, name, version))
    assert said in found


def test_an_override_that_did_not_take() -> None:
    (found,) = contradictions(cell(cudnn="9.16.0.29"), LOCK)
    assert found == "cuDNN 9.16.0.29 was asked for, 9.10.2.21 is locked"


def test_nvidia_packages_in_a_cpu_cell() -> None:
    lock = lock_of(CPU)
    (found,) = contradictions(CPU, replace(lock, wheels=(*lock.wheels, *LOCK.wheels[1:4])))
    assert "a CPU cell has 3 NVIDIA packages (nvidia-" in found
