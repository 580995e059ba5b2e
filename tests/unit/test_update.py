"""An update adds what it saw, changes nothing, and takes no failure for an absence."""

import datetime as dt
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from builder import facts as facts_module
from builder.errors import ResolveError, SourceError, ToolError, TorchyardError
from builder.facts import CPU, Facts, Index, Platform, Python
from builder.update import (
    PYTORCH_INDEX,
    Added,
    Changes,
    Page,
    Resolution,
    UvResolve,
    cuda_of,
    parse_document,
    pins_of,
    read_links,
    read_pylock,
    read_wheel_names,
    render_document,
    update,
)

DATA = Path(facts_module.__file__).parent / "data"
TODAY = dt.date(2027, 1, 15)
NEW = Version("2.16.0")
NEW_WHEELS = [
    f"torch-2.16.0-cp{python}-cp{python}{threads}-manylinux_2_28_{machine}.whl"
    for python, threads in (("311", ""), ("312", ""), ("315", "t"))
    for machine in ("x86_64", "aarch64")
]
CUDA_13_2 = {
    "torch": Version("2.16.0"),
    "cuda-toolkit": Version("13.2.2.0"),
    "nvidia-cuda-runtime": Version("13.2.86"),
    "nvidia-cudnn-cu13": Version("9.27.0.10"),
    "nvidia-nccl-cu13": Version("2.31.1"),
    "triton": Version("4.0.0"),
}
CUDA_12_6 = {
    "torch": Version("2.16.0+cu126"),
    "nvidia-cuda-runtime-cu12": Version("12.6.77"),
    "nvidia-cudnn-cu12": Version("9.10.2.21"),
    "nvidia-nccl-cu12": Version("2.29.3"),
}


@pytest.fixture
def facts_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "data"))


def known_wheels() -> list[str]:
    """Return names like those that led to the facts, so that an index shows what is known and no more."""
    facts = Facts.load()
    names = []
    for build in facts.builds:
        if build.index is Index.DEFAULT:
            names += wheel_names(str(build.torch), build.platform, facts.pythons_of(build))
    return names


def wheel_names(version: str, platform: Platform, pythons: Sequence[Python]) -> list[str]:
    machine = "x86_64" if platform is Platform.AMD64 else "aarch64"
    names = []
    for python in pythons:
        tag = f"cp{str(python.version).replace('.', '')}"
        names.append(f"torch-{version}-{tag}-{tag}{'t' * python.free_threaded}-manylinux_2_28_{machine}.whl")
    return names


def known_page(cuda: str) -> str:
    facts = Facts.load()
    names = [
        name
        for build in facts.builds
        if build.cuda_tag == cuda and (build.index is Index.PYTORCH)
        for name in wheel_names(f"{build.torch}+{cuda}", build.platform, facts.pythons_of(build))
    ]
    return page_of(names)


def page_of(names: Sequence[str]) -> str:
    links = (f'<a href="/whl/{name.replace("+", "%2B")}#sha256=0">{name}</a><br/>' for name in names)
    return "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"


class World:
    """Both indexes and the resolver, as a test wants them."""

    def __init__(self, wheels: Sequence[str] = ()) -> None:
        self.wheels = [*known_wheels(), *wheels]
        self.pages: dict[str, Page | Exception] = {}
        self.resolutions: dict[str, Mapping[str, Version] | Exception] = {}
        self.resolved: list[tuple[str, str, Platform, str | None]] = []

    def list_wheels(self, project: str) -> Sequence[str]:
        assert project == "torch"
        return self.wheels

    def fetch_page(self, url: str) -> Page:
        tag = url.removeprefix(PYTORCH_INDEX).strip("/").partition("/")[0]
        answer = self.pages.get(tag, Page(status=200, text=known_page(tag)))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def resolve(self, requirement: str, *, python: str, platform: Platform, index: str | None) -> Resolution:
        self.resolved.append((requirement, python, platform, index))
        answer = self.resolutions.get(requirement, ResolveError("nothing prepared"))
        if isinstance(answer, Exception):
            raise answer
        return Resolution(versions=answer, wheel="torch.whl", uploaded=dt.date(2027, 1, 10))

    def update(self, directory: Path, **rest: Any) -> Changes:
        return update(
            directory,
            list_wheels=self.list_wheels,
            fetch_page=self.fetch_page,
            resolve=self.resolve,
            today=TODAY,
            **rest,
        )


def failed(changes: Changes) -> str:
    return "\n".join(f"{problem}: {problem.why}" for problem in changes.failures)


# --- the file


def test_the_facts_are_canonical() -> None:
    text = (DATA / "torch.toml").read_text()
    assert render_document(parse_document(text)) == text


def test_comments_at_the_top_are_kept() -> None:
    text = (DATA / "torch.toml").read_text()
    document = parse_document("# mine\n\n# and mine\n" + text)
    assert render_document(document).startswith("# mine\n\n# and mine\n# What machines")


# --- updates


def test_nothing_new_changes_nothing(facts_dir: Path) -> None:
    before = (facts_dir / "torch.toml").read_bytes()
    world = World()
    changes = world.update(facts_dir)
    assert changes.added == ()
    assert changes.conflicts == ()
    assert not world.resolved
    # Pages of toolkits that no torch was built for yet are read too.
    assert all("implausibly short: 0 builds, 0 are known" in problem.what for problem in changes.failures)
    assert (facts_dir / "torch.toml").read_bytes() == before


def test_a_new_release_is_added(facts_dir: Path) -> None:
    before = (facts_dir / "torch.toml").read_text()
    world = World(NEW_WHEELS)
    world.resolutions = {"torch==2.16.0": CUDA_13_2, "torch==2.16.0+cu126": CUDA_12_6}
    world.pages["cu126"] = Page(
        status=200,
        text=known_page("cu126") + page_of(["torch-2.16.0+cu126-cp312-cp312-manylinux_2_28_x86_64.whl"]),
    )
    changes = world.update(facts_dir)
    assert changes.added == (
        Added(torch=NEW),
        Added(torch=NEW, cuda=Version("13.2"), platform=Platform.AMD64),
        Added(torch=NEW, cuda=Version("13.2"), platform=Platform.ARM64),
        Added(torch=NEW, cuda=Version("12.6"), platform=Platform.AMD64),
    )
    assert not changes.conflicts
    facts = Facts.load(facts_dir)
    release = facts.release(NEW)
    assert release is not None
    assert release.date == dt.date(2027, 1, 10)
    assert [str(python) for python in release.pythons] == ["3.11", "3.12", "3.15t"]
    default = facts.build(NEW, Version("13.2"))
    assert default is not None
    assert (default.index, default.source) == (Index.DEFAULT, f"default-index-{TODAY}")
    pins = (default.toolkit, default.cudnn, default.nccl, default.triton, default.glibc)
    assert [str(pin) for pin in pins] == [
        "13.2.2", "9.27.0.10", "2.31.1", "4.0.0", "2.28",
    ]  # fmt: skip
    older = facts.build(NEW, Version("12.6"))
    assert older is not None
    assert (older.index, str(older.cudnn), older.source) == (
        Index.PYTORCH,
        "9.10.2.21",
        f"pytorch-index-{TODAY}",
    )
    assert {source.date for source in facts.sources if str(TODAY) in source.id} == {TODAY}
    # Every line that was there still is: an update adds lines, and nothing else.
    after = (facts_dir / "torch.toml").read_text()
    assert not set(before.splitlines()) - set(after.splitlines())
    assert render_document(parse_document(after)) == after
    assert ("torch==2.16.0+cu126", "3.12", Platform.AMD64, f"{PYTORCH_INDEX}/cu126") in world.resolved


def test_an_update_is_stable(facts_dir: Path) -> None:
    world = World(NEW_WHEELS)
    world.resolutions = {"torch==2.16.0": CUDA_13_2}
    assert world.update(facts_dir).added
    once = (facts_dir / "torch.toml").read_bytes()
    assert not world.update(facts_dir).added
    assert (facts_dir / "torch.toml").read_bytes() == once
    assert sorted(path.name for path in facts_dir.iterdir()) == sorted(path.name for path in DATA.glob("*.toml"))


def test_a_new_build_of_a_known_release_is_added(facts_dir: Path) -> None:
    world = World()
    name = "torch-2.15.0+cu130-cp312-cp312-manylinux_2_28_x86_64.whl"
    world.pages["cu130"] = Page(status=200, text=known_page("cu130") + page_of([name]))
    changes = world.update(facts_dir)
    assert changes.added == (Added(torch=Version("2.15.0"), cuda=Version("13.0"), platform=Platform.AMD64),)
    build = Facts.load(facts_dir).build(Version("2.15.0"), Version("13.0"))
    assert build is not None
    assert build.cudnn is None  # it was seen, but could not be resolved
    assert "the pins of torch 2.15.0+cu130" in failed(changes)


def test_what_differs_is_reported_and_not_written(facts_dir: Path) -> None:
    before = (facts_dir / "torch.toml").read_bytes()
    world = World(["torch-2.15.0-cp316-cp316-manylinux_2_28_x86_64.whl"])
    world.resolutions["torch==2.15.0"] = {**CUDA_13_2, "nvidia-cudnn-cu13": Version("9.99.0.1")}
    conflicts = world.update(facts_dir, recheck=True).conflicts
    assert {(conflict.row, conflict.key) for conflict in conflicts} >= {
        ("torch 2.15.0 linux/amd64", "pythons"),
        ("torch 2.15.0+cu132 linux/amd64", "cudnn"),
    }
    assert any("9.26.0.51" in str(conflict) and "9.99.0.1" in str(conflict) for conflict in conflicts)
    assert (facts_dir / "torch.toml").read_bytes() == before


# --- distrust


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Page(status=403, text="AccessDenied"), "answered 403"),
        (Page(status=404, text=""), "answered 404"),
        (Page(status=503, text="busy"), "answered 503"),
        (Page(status=200, text="<html></html>"), "implausibly short: 0 builds"),
        (
            Page(status=200, text=page_of(["torch-2.8.0+cu126-cp311-cp311-manylinux_2_28_x86_64.whl"])),
            "short: 1 builds",
        ),
        (SourceError("no answer", why="timed out"), "timed out"),
        (TimeoutError("read timed out"), "read timed out"),
    ],
)
def test_a_failed_page_is_no_absence(facts_dir: Path, answer: Page | Exception, said: str) -> None:
    before = (facts_dir / "torch.toml").read_bytes()
    world = World()
    world.pages["cu126"] = answer
    changes = world.update(facts_dir)
    assert changes.added == ()
    assert any("cu126" in str(problem) and said in f"{problem} {problem.why}" for problem in changes.failures)
    assert (facts_dir / "torch.toml").read_bytes() == before


def test_an_index_with_less_than_is_known_stops_it(facts_dir: Path) -> None:
    before = (facts_dir / "torch.toml").read_bytes()
    world = World(NEW_WHEELS)
    world.wheels = [name for name in world.wheels if not name.startswith("torch-2.4.")]
    with pytest.raises(SourceError) as caught:
        world.update(facts_dir)
    assert "2.4.0 and 2.4.1" in caught.value.problems[0].why
    assert (facts_dir / "torch.toml").read_bytes() == before


def test_a_release_that_does_not_resolve_waits(facts_dir: Path) -> None:
    before = (facts_dir / "torch.toml").read_bytes()
    world = World(NEW_WHEELS)
    name = "torch-2.16.0+cu132-cp312-cp312-manylinux_2_28_x86_64.whl"
    world.pages["cu132"] = Page(status=200, text=known_page("cu132") + page_of([name]))
    changes = world.update(facts_dir)
    assert changes.added == ()  # which build is the default one is not known yet
    assert "torch 2.16.0 on linux/amd64 could not be resolved" in failed(changes)
    assert (facts_dir / "torch.toml").read_bytes() == before


# --- reading


def test_wheel_names_are_grouped() -> None:
    seen = read_wheel_names([
        "torch-2.16.0-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-2.16.0-3-cp313-cp313t-manylinux_2_28_x86_64.whl",
        "torch-2.16.0+cu126-cp312-cp312-linux_x86_64.whl",
        "torch-2.16.0+cpu-cp312-cp312-manylinux2014_aarch64.whl",
        "torch-2.16.0+rocm6.4-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-2.16.0+xpu-cp312-cp312-linux_x86_64.whl",
        "torch-2.16.0rc1-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-1.13.1-cp310-cp310-manylinux1_x86_64.whl",
        "torch-2.16.0-cp312-none-macosx_11_0_arm64.whl",
        "torch-2.16.0-cp312-cp312-win_amd64.whl",
        "torchvision-0.30.0-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-2.16.0.tar.gz",
        "../evil",
    ])  # fmt: skip
    assert set(seen) == {
        (NEW, None, Platform.AMD64), (NEW, Version("12.6"), Platform.AMD64), (NEW, CPU, Platform.ARM64),
    }  # fmt: skip
    plain = seen[NEW, None, Platform.AMD64]
    assert [str(python) for python in sorted(plain.pythons)] == ["3.12", "3.13t"]
    assert plain.glibc == Version("2.28")
    assert seen[NEW, Version("12.6"), Platform.AMD64].glibc is None


def test_links_are_read_by_their_last_part() -> None:
    page = "<a class=x href='a/torch-2.0%2Bcu118.whl#sha256=1'>t</a><A HREF=\"b&amp;c.whl\">u</A><a name=z>"
    assert read_links(page) == ("torch-2.0+cu118.whl", "b&c.whl")


@pytest.mark.parametrize(
    ("versions", "cuda", "pins"),
    [
        (
            CUDA_13_2,
            Version("13.2"),
            {"toolkit": "13.2.2", "cudnn": "9.27.0.10", "nccl": "2.31.1", "triton": "4.0.0"},
        ),
        (CUDA_12_6, Version("12.6"), {"cudnn": "9.10.2.21", "nccl": "2.29.3"}),
        ({"torch": NEW}, CPU, {}),
    ],
)
def test_pins(versions: Mapping[str, Version], cuda: Version | str, pins: dict[str, str]) -> None:
    assert cuda_of(versions) == cuda
    assert pins_of(versions) == pins


PYLOCK = """
lock-version = "1.0"
created-by = "uv"

[[packages]]
name = "nvidia-cudnn-cu12"
version = "9.10.2.21"
wheels = [{ url = "wheels/nvidia_cudnn_cu12-9.10.2.21-py3-none-manylinux_2_27_x86_64.whl", hashes = {} }]

[[packages]]
name = "torch"
version = "2.8.0"
wheels = [{ upload-time = 2025-08-06T14:55:05Z, url = "w/torch-2.8.0%2Bcu126-cp311-cp311-linux_x86_64.whl" }]
"""


def test_pylock() -> None:
    found = read_pylock(PYLOCK, "torch")
    assert found.versions == {"torch": Version("2.8.0"), "nvidia-cudnn-cu12": Version("9.10.2.21")}
    assert found.wheel == "torch-2.8.0+cu126-cp311-cp311-linux_x86_64.whl"
    assert found.uploaded == dt.date(2025, 8, 6)


@pytest.mark.parametrize(
    "text", ["", "packages = 1", "packages = []", "[[packages]]\nname = 1", "=", PYLOCK.partition("url")[0]]
)
def test_a_broken_pylock_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        read_pylock(text, "torch")


# --- uv


def resolve_with(uv: str, *, timeout_s: float = 60.0) -> Resolution:
    resolver = UvResolve(uv=uv, arguments=("--no-config",), timeout_s=timeout_s)
    return resolver("torch==2.8.0", python="3.11", platform=Platform.ARM64, index="https://index.invalid/whl/cu126")


def fake_uv(folder: Path, body: str) -> str:
    path = folder / "uv"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_uv_is_asked_for_a_lock(tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(PYLOCK)
    body = f'echo "$*" > {tmp_path}/asked; cat "$3" > {tmp_path}/in; cp {tmp_path}/answer "$7"'
    assert resolve_with(fake_uv(tmp_path, body)).uploaded == dt.date(2025, 8, 6)
    asked = (tmp_path / "asked").read_text()
    assert (tmp_path / "in").read_text() == "torch==2.8.0\n"
    assert "--python-platform aarch64-manylinux_2_28 --python-version 3.11 --only-binary :all:" in asked
    assert asked.strip().endswith("--index https://index.invalid/whl/cu126 --no-config")


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ("echo 'No solution found' >&2; exit 1", SourceError, "No solution found"),
        ("exec sleep 60", SourceError, "no answer"),
    ],
)
def test_uv_fails(tmp_path: Path, body: str, error: type[TorchyardError], said: str) -> None:
    with pytest.raises(error) as caught:
        resolve_with(fake_uv(tmp_path, body), timeout_s=0.5 if "sleep" in body else 60.0)
    (problem,) = caught.value.problems
    assert said in problem.what + problem.why


def test_no_uv(tmp_path: Path) -> None:
    (tmp_path / "not-executable").write_text("")
    for name in ("none", "not-executable"):
        with pytest.raises(ToolError):
            resolve_with(str(tmp_path / name))
