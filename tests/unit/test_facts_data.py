"""The facts themselves: sourced, in order, without a host of a package registry."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

from builder import compat
from builder import facts as facts_module
from builder.errors import MatrixError
from builder.facts import CPU, Coverage, Facts, Index, Platform

DATA = Path(facts_module.__file__).parent / "data"
FILES = sorted(DATA.glob("*.toml"))


@pytest.fixture(scope="module")
def facts() -> Facts:
    return Facts.load()


def test_every_file_is_loaded() -> None:
    assert [path.name for path in FILES] == sorted(facts_module.FILES)


def test_every_row_names_a_source(facts: Facts) -> None:
    names = {source.id for source in facts.sources}
    used = [row.source for row in facts.releases]
    used += [row.source for row in facts.builds]
    used += [row.source for row in facts.toolkits]
    used += [row.source for row in facts.majors]
    used += [row.source for row in facts.gpus]
    used += [row.source for row in facts.exceptions]
    used += [row.source for row in facts.cudnn_floors]
    assert set(used) <= names
    assert all(release.complete_source in names for release in facts.releases if release.complete)
    assert all(build.gpus_source in names and build.gpus_by for build in facts.builds if build.gpus is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_host_but_pytorchs(path: Path) -> None:
    hosts = re.findall(r"\b(?:[a-z0-9-]+\.)+(?:org|com|net|io|dev|host)\b", path.read_text())
    assert set(hosts) <= {"pytorch.org", "download.pytorch.org"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_plain_text_with_a_newline_at_the_end(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_rows_are_unique(facts: Facts) -> None:
    builds = [(build.torch, build.cuda, build.platform) for build in facts.builds]
    for keys in (
        builds,
        [release.torch for release in facts.releases],
        [toolkit.version for toolkit in facts.toolkits],
        [gpu.sm for gpu in facts.gpus],
    ):
        assert len(keys) == len(set(keys))


def test_releases_reach_without_a_gap(facts: Facts) -> None:
    minors = [release.torch.minor for release in facts.releases if release.torch.micro == 0]
    assert minors == list(range(16))
    assert {release.torch.major for release in facts.releases} == {2}


def test_minors_were_released_in_order(facts: Facts) -> None:
    dates = [release.date for release in facts.releases]
    assert dates == sorted(dates)


def test_one_default_build_a_release_and_platform(facts: Facts) -> None:
    for release in facts.releases:
        for platform in Platform:
            default = [b for b in facts.builds_of(release.torch, platform) if b.index is Index.DEFAULT]
            assert len(default) == 1


def test_default_builds_are_complete(facts: Facts) -> None:
    for build in facts.builds:
        if build.index is Index.DEFAULT and build.cuda != CPU:
            assert None not in (build.cudnn, build.nccl, build.triton, build.gpus, build.glibc)
            assert build.gpus_by == "measured"


def test_the_oldest_build_of_a_cuda_is_older_than_its_end(facts: Facts) -> None:
    """Default builds never go back to an older CUDA."""
    cudas = [b.cuda for b in facts.builds if b.index is Index.DEFAULT and b.platform is Platform.AMD64]
    assert all(isinstance(cuda, Version) for cuda in cudas)
    assert [str(cuda) for cuda in cudas] == [str(cuda) for cuda in sorted(map(Version, map(str, cudas)))]


def test_every_build_has_a_toolkit_and_a_driver(facts: Facts) -> None:
    for build in facts.builds:
        if isinstance(build.cuda, Version):
            assert facts.toolkit(build.cuda) is not None
            assert facts.driver_floor(build.cuda) is not None
        else:
            assert facts.driver_floor(build.cuda) is None
            assert build.cudnn is None
            assert build.gpus is None


def test_toolkit_of_a_build_is_of_its_cuda(facts: Facts) -> None:
    for build in facts.builds:
        if build.toolkit is not None:
            assert str(build.toolkit).startswith(f"{build.cuda}.")


def test_a_release_has_one_cudnn_major(facts: Facts) -> None:
    for release in facts.releases:
        majors = {b.cudnn.major for b in facts.builds if b.torch == release.torch and b.cudnn is not None}
        assert majors == {8 if release.torch < Version("2.4") else 9}


def test_drivers_rise_with_cuda(facts: Facts) -> None:
    drivers = [toolkit.driver for toolkit in facts.toolkits if toolkit.exists]
    assert drivers == sorted(drivers)
    assert [row.driver for row in facts.majors] == sorted(row.driver for row in facts.majors)
    for toolkit in facts.toolkits:
        floor = facts.driver_floor(toolkit.version)
        assert floor is not None
        assert not toolkit.exists or toolkit.driver >= floor


def test_cuda_12_7_was_left_out(facts: Facts) -> None:
    assert facts.toolkit(Version("12.7")) is None
    assert facts.toolkit(Version("12.6")) is not None


def test_gpus_have_a_name_and_known_toolkits(facts: Facts) -> None:
    names = [name for gpu in facts.gpus for name in gpu.names]
    assert len(names) == len(set(names))
    for gpu in facts.gpus:
        assert gpu.names
        assert gpu.family
        assert gpu.last_cuda is None or gpu.last_cuda >= gpu.first_cuda
        toolkit = facts.toolkit(gpu.first_cuda)
        assert gpu.driver is None or (toolkit is not None and gpu.driver == toolkit.driver)


def test_gpu_names_stay_distinct_when_plain(facts: Facts) -> None:
    plain = [compat._plain(name) for gpu in facts.gpus for name in gpu.names]
    assert len(plain) == len(set(plain))
    assert all(plain)


def test_builds_hold_code_only_for_what_their_cuda_can_make(facts: Facts) -> None:
    known = {gpu.sm: gpu for gpu in facts.gpus}
    for build in facts.builds:
        for sm in (*(build.gpus or ()), *(build.ptx or ())):
            gpu = known[sm]
            assert isinstance(build.cuda, Version)
            assert gpu.first_cuda <= build.cuda, f"{build.torch} {build.cuda} {gpu.tag}"
            assert gpu.last_cuda is None or build.cuda <= gpu.last_cuda
            assert facts.covers(build, gpu) is Coverage.CODE or sm in (build.ptx or ())


def test_glibc_moved_once(facts: Facts) -> None:
    for build in facts.builds:
        assert build.glibc in (Version("2.17"), Version("2.28"))
        if build.torch >= Version("2.7"):
            assert build.glibc == Version("2.28")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("torch.toml", 'source = "default-index"', 'source = "hearsay"', "hearsay"),
        ("torch.toml", "schema = 1", "schema = 2", "schema"),
        ("torch.toml", 'torch = "2.8.0"', 'torch = "two"', "two"),
        ("torch.toml", 'index = "pytorch"', 'index = "elsewhere"', "elsewhere"),
        ("cuda.toml", "toolkits = [", "tools = [", "toolkits"),
        ("cuda.toml", "major = 11", 'major = "11"', "major"),
        ("gpus.toml", "family =", "kin =", "family"),
        ("cudnn.toml", "floors = [", "colour = 1\nfloors = [", "colour"),
        ("cudnn.toml", "schema = 1", "schema 1", "TOML"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    for path in FILES:
        text = path.read_text()
        assert path.name != name or old in text
        (tmp_path / path.name).write_text(text.replace(old, new, 1) if path.name == name else text)
    with pytest.raises(MatrixError) as caught:
        Facts.load(tmp_path)
    (problem,) = caught.value.problems
    assert name in problem.where
    assert said in problem.what


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MatrixError) as caught:
        Facts.load(tmp_path)
    assert caught.value.problems[0].where == "torch.toml"
