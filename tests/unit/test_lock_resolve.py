"""The real resolver against a loopback index of fake wheels: what is taken, from where, and what is refused."""

from __future__ import annotations

import itertools
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from builder.errors import ResolveError, SourceError, TorchyardError
from builder.index import Configuration, Index
from builder.lock import DEFAULT_INDEX, Lock, dumps, loads, lock_cell, request_of, requirements_txt
from builder.matrix import Cell
from tests.support.cells import cell
from tests.support.index_server import Answer, IndexServer
from tests.support.wheels import FakeWheel, torch_wheel, universe, wheel

CU118 = "pytorch-cu118"


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what uv remembers, and how the machine reaches the network, out of the tests."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed() -> Iterator[str]:
    """An index at a port on which nothing answers, and nothing else can begin to."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


def index(url: str, **rest: Any) -> Index:
    return Index(configuration=Configuration(default_index=url, **rest))


def serve(server: IndexServer, of: Cell, **how: bool) -> Index:
    made = universe(of)
    server.add("default", *made.default, **how)
    for name, wheels in made.explicit.items():
        server.add(name, *wheels, **how)
    return index(server.url())


def versions(lock: Lock) -> dict[str, str]:
    return {str(one.name): str(one.version) for one in lock.wheels}


def text_of(error: TorchyardError) -> str:
    return "\n".join("\n".join([one.what, one.where, one.why, *one.tries]) for one in error.problems)


def cu118(server: IndexServer, **rest: Any) -> Cell:
    return cell("2.7.1", "11.8", index_url=server.url(CU118), **rest)


# --- what is taken


def test_a_cell_of_the_default_index(server: IndexServer) -> None:
    wanted = cell()
    lock = lock_cell(wanted, serve(server, wanted))
    assert versions(lock) == {
        "numpy": "2.3.1",
        "nvidia-cuda-runtime-cu12": "12.8.90",
        "nvidia-cudnn-cu12": "9.10.2.21",
        "nvidia-nccl-cu12": "2.27.3",
        "pip": "26.3",
        "torch": "2.8.0",
        "triton": "3.4.0",
        "typing-extensions": "4.14.0",
    }
    assert {one.index for one in lock.wheels} == {DEFAULT_INDEX}
    by_name = {one.filename: one for one in lock.wheels}
    for made in universe(wanted).wheels:
        found = by_name[made.filename]
        assert (found.sha256, found.size, found.upload_time) == (made.sha256, len(made.content), made.upload_time)
    assert (lock.cell_id, lock.request) == (wanted.id, request_of(wanted).digest)
    assert lock.resolver.startswith("uv ")
    assert loads(dumps(lock), where="x") == lock
    assert not [one for one in server.requests if one.path.endswith(".whl")]  # no wheel is downloaded


def test_no_address_in_a_lock(server: IndexServer) -> None:
    wanted = cu118(server)
    lock = lock_cell(wanted, serve(server, wanted))
    for text in (dumps(lock), requirements_txt(lock)):
        assert "127.0.0.1" not in text
        assert "://" not in text


def test_another_python_and_processor(server: IndexServer) -> None:
    wanted = cell("2.15.0", "13.2", python="3.13")
    lock = lock_cell(wanted, serve(server, wanted))
    (torch,) = [one for one in lock.wheels if one.name == "torch"]
    assert torch.filename == "torch-2.15.0-cp313-cp313-manylinux_2_28_x86_64.whl"
    assert lock.cuda == Version("13.2.90")


def test_a_cudnn_override(server: IndexServer) -> None:
    wanted = cell(cudnn="9.16.0.29")
    answering = serve(server, wanted)
    assert lock_cell(wanted, answering).cudnn == Version("9.16.0.29")
    assert lock_cell(cell(), answering).cudnn == Version("9.10.2.21")


def test_packages_of_the_variant(server: IndexServer) -> None:
    wanted = cell(packages=["numpy==2.0.0", "scipy>=1.0,<2"])
    answering = serve(server, wanted)
    server.add("default", wheel("scipy", "1.5", requires=["numpy>=1.20"]), wheel("scipy", "2.0"))
    assert {"numpy": "2.0.0", "scipy": "1.5"}.items() <= versions(lock_cell(wanted, answering)).items()


def test_twice_gives_the_same_text(server: IndexServer) -> None:
    wanted = cu118(server)
    answering = serve(server, wanted)
    first = dumps(lock_cell(wanted, answering))
    assert dumps(lock_cell(wanted, answering)) == first
    with IndexServer() as mirror:  # another host, shuffled
        made = universe(wanted)
        mirror.add("default", *reversed(made.default))
        mirror.add(CU118, *made.explicit[CU118])
        moved = cell("2.7.1", "11.8", index_url=mirror.url(CU118))
        assert dumps(lock_cell(moved, index(mirror.url()))) == first


def test_the_latest_of_equal_files_is_taken(server: IndexServer) -> None:
    wanted = cell()
    answering = serve(server, wanted)
    tag = "py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64"
    again = wheel("nvidia-cuda-runtime-cu12", "12.8.90", tag=tag, upload_time=datetime(2026, 3, 1, tzinfo=UTC))
    server.add("default", again)
    found = {str(one.name): one.filename for one in lock_cell(wanted, answering).wheels}
    assert found["nvidia-cuda-runtime-cu12"] == again.filename


# --- from where


def test_a_build_that_only_an_explicit_index_has(server: IndexServer) -> None:
    wanted = cu118(server)
    lock = lock_cell(wanted, serve(server, wanted))
    found = {str(one.name): one for one in lock.wheels}
    assert str(found["torch"].version) == "2.7.1+cu118"
    assert {one.name for one in lock.wheels if one.index == CU118} == {"torch"}
    assert found["torch"].wanted(wanted).index_url == server.url(CU118)
    assert str(lock.cuda) == "11.8.90"


def test_no_index_can_pass_for_another(server: IndexServer) -> None:
    wanted = cu118(server)
    answering = serve(server, wanted)
    evil: dict[str, Any] = {"reports": "evil", "cuda": None}
    server.add("default", torch_wheel("2.7.1", **evil), torch_wheel("2.7.1.post1", **evil), torch_wheel("99.0", **evil))
    server.add(CU118, wheel("numpy", "99.0"), wheel("pip", "99.0"), wheel("nvidia-cudnn-cu11", "99.0"))
    lock = lock_cell(wanted, answering)
    found = versions(lock)
    assert (found["torch"], found["numpy"], found["pip"]) == ("2.7.1+cu118", "2.3.1", "26.3")
    (torch,) = universe(wanted).explicit[CU118]
    assert [one.sha256 for one in lock.wheels if one.name == "torch"] == [torch.sha256]
    assert {one.path for one in server.asked(f"/{CU118}/*")} <= {
        server.page("torch", CU118),
        server.file(torch, CU118) + ".metadata",
    }
    assert not server.asked(server.page("torch"))


def test_extra_indexes_have_no_say(server: IndexServer) -> None:
    wanted = cell()
    serve(server, wanted)
    server.add("extra", wheel("numpy", "99.0"))
    answering = index(server.url(), extra_indexes=(server.url("extra"),))
    assert versions(lock_cell(wanted, answering))["numpy"] == "2.3.1"
    assert not server.asked("/extra/*")


def test_the_users_settings_for_uv_have_no_say(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cell(cudnn="9.16.0.29")
    answering = serve(server, wanted)
    plain = dumps(lock_cell(wanted, answering))
    server.add("evil", wheel("numpy", "99.0"))
    (tmp_path / "config" / "uv").mkdir(parents=True)
    settings = f'override-dependencies = ["numpy==99.0"]\n[[index]]\nname = "evil"\nurl = "{server.url("evil")}"\n'
    (tmp_path / "config" / "uv" / "uv.toml").write_text(settings)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("UV_INDEX", server.url("evil"))
    monkeypatch.setenv("UV_PRERELEASE", "allow")
    assert dumps(lock_cell(wanted, answering)) == plain


def test_a_local_build_where_its_index_is_out_of_reach(server: IndexServer, tmp_path: Path, closed: str) -> None:
    wanted = cell("2.13.0", "cpu", index_url=f"{closed}/whl/cpu")
    made = universe(wanted)
    (torch,) = made.explicit["pytorch-cpu"]
    server.add("default", *made.default)
    torch.write(tmp_path / "wheels")
    wheel("numpy", "99.0").write(tmp_path / "wheels")  # find-links are for what no index in reach has, nothing else
    torch_wheel("2.13.1+cpu", reports="", cuda=None).write(tmp_path / "wheels")
    (tmp_path / "wheels" / "notes-1.0.txt").touch()
    lock = lock_cell(wanted, index(server.url(), find_links=(str(tmp_path / "wheels"),)))
    assert versions(lock)["numpy"] == "2.3.1"
    (found,) = [one for one in lock.wheels if one.name == "torch"]
    assert (str(found.version), found.sha256, found.size) == ("2.13.0+cpu", torch.sha256, len(torch.content))
    assert (found.index, found.upload_time) == ("pytorch-cpu", None)
    assert str(tmp_path) not in dumps(lock)
    with pytest.raises(SourceError):
        lock_cell(wanted, index(server.url()))


def test_no_index_is_obeyed(server: IndexServer, tmp_path: Path) -> None:
    wanted = cell()
    for one in universe(wanted).wheels:
        one.write(tmp_path / "wheels")
    answering = index(server.url(), no_index=True, find_links=(str(tmp_path / "wheels"),))
    lock = lock_cell(wanted, answering)
    assert {one.sha256 for one in lock.wheels} == {one.sha256 for one in universe(wanted).wheels}
    assert not server.requests


# --- when it was uploaded


def later(made: FakeWheel) -> FakeWheel:
    return replace(made, upload_time=datetime(2027, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("json", [False, True])
def test_what_is_newer_is_not_considered(server: IndexServer, json: bool) -> None:  # noqa: FBT001 (pytest's)
    wanted = cell()
    answering = serve(server, wanted)
    server.add("default", later(wheel("numpy", "3.0")), wheel("numpy", "2.4"), json=json)
    assert versions(lock_cell(wanted, answering))["numpy"] == "2.4"
    after = cell(exclude_newer="2027-02-01T00:00:00Z")
    assert versions(lock_cell(after, answering))["numpy"] == "3.0"


def test_only_newer_ones(server: IndexServer) -> None:
    wanted = cell()
    server.add("default", *map(later, universe(wanted).default))
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, index(server.url()))
    text = text_of(caught.value)
    assert "published at 2027-01-01" in text
    assert "PEP 700" not in text


def test_an_index_that_does_not_say_when(server: IndexServer) -> None:
    wanted = cell()
    server.add("default", *(replace(made, upload_time=None) for made in universe(wanted).default))
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, index(server.url()))
    assert "PEP 700" in text_of(caught.value)


@pytest.mark.parametrize("json", [False, True])
def test_an_explicit_index_need_not_say_when(server: IndexServer, json: bool) -> None:  # noqa: FBT001 (pytest's)
    wanted = cu118(server)
    made = universe(wanted)
    server.add("default", *made.default)
    server.add(CU118, *(replace(one, upload_time=None) for one in made.explicit[CU118]), json=json)
    lock = lock_cell(wanted, index(server.url()))
    (torch,) = [one for one in lock.wheels if one.name == "torch"]
    assert (str(torch.version), torch.upload_time) == ("2.7.1+cu118", None)
    (whole,) = made.explicit[CU118]
    assert torch.size == len(whole.content)


# --- what is refused


def test_an_index_that_is_down(closed: str) -> None:
    wanted = cell()
    with pytest.raises(SourceError, match="could not be reached") as caught:
        lock_cell(wanted, index(closed.replace("//", "//user:secret@")))
    assert wanted.id in text_of(caught.value)
    assert "secret" not in text_of(caught.value)


@pytest.mark.parametrize("answer", [401, 403, 500, 503, Answer(body=b"{}"), Answer(body=b"not a page")])
def test_an_index_that_refuses_is_not_one_that_has_nothing(server: IndexServer, answer: int | Answer) -> None:
    wanted = cell()
    answering = serve(server, wanted)
    server.script(server.page("torch"), then=itertools.repeat(answer))
    with pytest.raises(SourceError):
        lock_cell(wanted, answering)


def test_no_such_build(server: IndexServer) -> None:
    wanted = cell()
    server.add("default", *(one for one in universe(wanted).default if one.project != "torch"))
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, index(server.url()))
    text = text_of(caught.value)
    assert wanted.id in text
    assert "torch was not found" in text


def test_no_set_that_satisfies(server: IndexServer) -> None:
    wanted = cell(packages=["numpy", "scipy"])
    answering = serve(server, wanted)
    server.add("default", wheel("scipy", "1.1", requires=["numpy<2"], upload_time=datetime(2026, 2, 1, tzinfo=UTC)))
    server.add("default", wheel("scipy", "1.2", requires=["typing-extensions<4"]))
    refusing = cell(packages=["numpy", "scipy>=1.1"])
    with pytest.raises(ResolveError) as caught:
        lock_cell(refusing, answering)
    text = text_of(caught.value)
    assert "unsatisfiable" in text
    assert "scipy" in text
    assert "torchyard-lock-" not in text  # the temporary directory is nobody's business


def test_source_distributions_are_not_taken(server: IndexServer) -> None:
    wanted = cell()
    answering = serve(server, wanted)
    server.add("default", replace(wheel("numpy", "9.9"), filename="numpy-9.9.tar.gz"))
    assert versions(lock_cell(wanted, answering))["numpy"] == "2.3.1"


def test_a_cpu_set_for_a_cuda_cell(server: IndexServer) -> None:
    wanted = cell()
    others = [one for one in universe(wanted).default if one.project != "torch"]
    # As on aarch64, where torch 2.9.1's CUDA dependencies are conditioned away.
    condition = 'platform_machine == "s390x"'
    requires = [f"nvidia-cuda-runtime-cu12==12.8.90; {condition}", f"nvidia-cudnn-cu12==9.10.2.21; {condition}"]
    server.add("default", torch_wheel("2.8.0", reports="2.8.0+cpu", cuda=None, requires=requires), *others)
    with pytest.raises(ResolveError, match="another environment") as caught:
        lock_cell(wanted, index(server.url()))
    assert "it is a CPU set" in text_of(caught.value)


def test_another_cuda_than_the_cell_s(server: IndexServer) -> None:
    made = universe(cell("2.7.1", "12.6"))
    server.add("default", *made.default)
    wanted = cell("2.7.1", "12.8", index_url=server.url("pytorch-cu128"))
    (torch,) = universe(wanted).explicit["pytorch-cu128"]
    requires = ["nvidia-cuda-runtime-cu12==12.6.90", "nvidia-nccl-cu12", "nvidia-cudnn-cu12"]
    wrong = torch_wheel("2.7.1+cu128", reports="2.7.1+cu128", cuda="12.8", requires=requires)
    assert wrong.filename == torch.filename
    server.add("pytorch-cu128", wrong)
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, index(server.url()))
    assert "CUDA 12.8 was asked for, the CUDA runtime in the set is 12.6.90" in text_of(caught.value)


def test_a_password_is_no_argument(server: IndexServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cell()
    serve(server, wanted)
    commands: list[list[str]] = []
    run = subprocess.run

    def recording(command: list[str], **rest: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return run(command, **rest)

    monkeypatch.setattr(subprocess, "run", recording)
    lock = lock_cell(wanted, index(server.url().replace("//", "//user:secret@")))
    assert commands
    assert not [word for command in commands for word in command if "secret" in word]
    assert "secret" not in dumps(lock)
