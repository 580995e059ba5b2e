"""Locks of cells with a toolkit or with companions, by the real resolver against a loopback index of fake wheels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder.errors import ResolveError, TorchyardError
from builder.index import Configuration, Index
from builder.lock import Lock, contradictions, lock_cell, request_of
from builder.matrix import Cell
from builder.schema import ImageBase
from tests.support.cells import cell
from tests.support.index_server import IndexServer
from tests.support.wheels import FakeWheel, universe, wheel

CPU_INDEX = "pytorch-cpu"
COMPANIONS = ("torchvision", "torchaudio")


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what uv remembers, and how the machine reaches the network, out of the tests."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def with_toolkit(of: Cell) -> Cell:
    return replace(of, variant=of.variant.model_copy(update={"toolkit": True}))


def with_companions(of: Cell, names: Sequence[str] = COMPANIONS) -> Cell:
    return replace(of, companions=tuple(names))


def serve(server: IndexServer, of: Cell, *more: FakeWheel) -> Index:
    made = universe(of)
    server.add("default", *made.default, *more)
    for name, wheels in made.explicit.items():
        server.add(name, *wheels)
    return Index(configuration=Configuration(default_index=server.url()))


def versions(lock: Lock) -> dict[str, str]:
    return {str(one.name): str(one.version) for one in lock.wheels}


def text_of(error: TorchyardError) -> str:
    return "\n".join("\n".join([one.what, one.where, one.why, *one.tries]) for one in error.problems)


# --- the toolkit


def metapackage(version: str, *, nvcc: str) -> FakeWheel:
    """Make a cuda-toolkit whose extras pin what they name, as the real one's do."""
    pins = {"nvcc": "nvidia-cuda-nvcc", "cccl": "nvidia-cuda-cccl"}
    return wheel(
        "cuda-toolkit", version, requires=[f"{name}=={nvcc}.*; extra == '{extra}'" for extra, name in pins.items()]
    )


def toolkits(*pairs: tuple[str, str]) -> list[FakeWheel]:
    return [
        one
        for version, nvcc in pairs
        for one in (metapackage(version, nvcc=nvcc), wheel("nvidia-cuda-nvcc", nvcc), wheel("nvidia-cuda-cccl", nvcc))
    ]


def test_the_toolkit_is_of_the_cells_cuda(server: IndexServer) -> None:
    wanted = with_toolkit(cell("2.15.0", "13.2"))
    made = toolkits(("13.1.9", "13.1.80"), ("13.2.2", "13.2.86"), ("13.4.0", "13.4.92"))
    found = versions(lock_cell(wanted, serve(server, wanted, *made)))
    assert (found["cuda-toolkit"], found["nvidia-cuda-nvcc"], found["nvidia-cuda-cccl"]) == (
        "13.2.2", "13.2.86", "13.2.86",
    )  # fmt: skip


def test_there_is_no_toolkit_of_that_cuda(server: IndexServer) -> None:
    wanted = with_toolkit(cell("2.15.0", "13.2"))
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, serve(server, wanted, *toolkits(("13.1.9", "13.1.80"))))
    assert "cuda-toolkit" in text_of(caught.value)


def test_a_toolkit_without_its_compiler_is_refused(server: IndexServer) -> None:
    wanted = with_toolkit(cell("2.15.0", "13.2"))
    answering = serve(server, wanted, wheel("cuda-toolkit", "13.2.9"))  # no such extras: uv only warns
    with pytest.raises(ResolveError, match="another environment") as caught:
        lock_cell(wanted, answering)
    assert "nvcc of CUDA 13.2 was asked for, none is locked" in text_of(caught.value)


def test_cells_that_need_no_packages_for_it() -> None:
    plain = cell("2.13.0", "cpu", index_url="https://example.invalid/whl/cpu")
    assert request_of(with_toolkit(plain)) == request_of(plain)
    image = cell("2.8.0", "12.8")
    assert isinstance(image.base, ImageBase)
    having = replace(image, base=image.base.model_copy(update={"toolkit": "12.8"}))
    assert request_of(with_toolkit(having)) == request_of(image)


def test_a_request_without_either_is_what_it_was() -> None:
    assert request_of(cell()).requirements == ("torch==2.8.0", "numpy", "pip")
    assert request_of(with_companions(cell())).digest != request_of(cell()).digest
    assert request_of(with_toolkit(cell("2.15.0", "13.2"))).digest != request_of(cell("2.15.0", "13.2")).digest


# --- companions

VISION = wheel("torchvision", "0.23.0", requires=["torch==2.8.0", "numpy"])
NEWER_VISION = wheel("torchvision", "0.24.0", requires=["torch==2.9.0", "numpy"])
AUDIO = wheel("torchaudio", "2.8.0", requires=["torch==2.8.0"])
NEWER_AUDIO = wheel("torchaudio", "2.11.0")
"""As the real one, it does not say which torch it is for."""


def test_companions_are_those_of_the_torch(server: IndexServer) -> None:
    wanted = with_companions(cell())
    answering = serve(server, wanted, VISION, NEWER_VISION, AUDIO, NEWER_AUDIO)
    found = versions(lock_cell(wanted, answering))
    assert (found["torch"], found["torchvision"], found["torchaudio"]) == ("2.8.0", "0.23.0", "2.8.0")


def test_a_torch_without_torchaudio(server: IndexServer) -> None:
    wanted = with_companions(cell("2.15.0", "13.2"))
    vision = wheel("torchvision", "0.29.2", requires=["torch>=2.14.0"])
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, serve(server, wanted, vision, AUDIO, NEWER_AUDIO))
    text = text_of(caught.value)
    assert "torchaudio==2.15.*" in text
    assert "leave torchaudio out of `companions`" in text


def test_a_refusal_for_another_reason_does_not_blame_them(server: IndexServer) -> None:
    wanted = with_companions(cell(packages=["numpy", "nowhere"]))
    made = universe(with_companions(cell()))
    server.add("default", *made.default, VISION, AUDIO)
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, Index(configuration=Configuration(default_index=server.url())))
    assert "companions" not in text_of(caught.value)


def on_cpu(server: IndexServer, **rest: Any) -> Cell:
    return with_companions(cell("2.13.0", "cpu", index_url=server.url(CPU_INDEX), **rest), ["torchvision"])


def cpu_vision(version: str = "0.28.0+cpu") -> FakeWheel:
    return wheel("torchvision", version, requires=["torch==2.13.0"], upload_time=None)


def test_companions_come_from_the_index_of_torch(server: IndexServer) -> None:
    wanted = on_cpu(server)
    answering = serve(server, wanted, wheel("torchvision", "0.28.0", requires=["torch==2.13.0"]))
    server.add(CPU_INDEX, cpu_vision())
    lock = lock_cell(wanted, answering)
    (vision,) = [one for one in lock.wheels if one.name == "torchvision"]
    assert (str(vision.version), vision.index) == ("0.28.0+cpu", CPU_INDEX)
    assert vision.wanted(wanted).index_url == server.url(CPU_INDEX)
    assert not server.asked(server.page("torchvision"))


def test_an_index_without_the_companion(server: IndexServer) -> None:
    wanted = on_cpu(server)
    answering = serve(server, wanted, wheel("torchvision", "0.28.0", requires=["torch==2.13.0"]))
    with pytest.raises(ResolveError) as caught:
        lock_cell(wanted, answering)
    assert "leave torchvision out of `companions`" in text_of(caught.value)


def test_a_companion_of_another_build_is_refused(server: IndexServer) -> None:
    wanted = on_cpu(server)
    answering = serve(server, wanted)
    server.add(CPU_INDEX, cpu_vision("0.28.0+cu126"))
    with pytest.raises(ResolveError, match="another environment") as caught:
        lock_cell(wanted, answering)
    assert "torchvision 0.28.0+cu126 is locked, which is another build than torch 2.13.0+cpu" in text_of(caught.value)


def test_local_wheels_where_the_index_is_out_of_reach(server: IndexServer, tmp_path: Path) -> None:
    wanted = with_companions(cell("2.13.0", "cpu", index_url="http://127.0.0.1:9/whl/cpu"), ["torchvision"])
    made = universe(wanted)
    server.add("default", *made.default, wheel("torchvision", "0.28.0", requires=["torch==2.13.0"]))
    for one in (*made.explicit[CPU_INDEX], cpu_vision(), cpu_vision("0.28.1+cu126")):
        one.write(tmp_path / "wheels")
    answering = Index(configuration=Configuration(default_index=server.url(), find_links=(str(tmp_path / "wheels"),)))
    found = versions(lock_cell(wanted, answering))
    assert (found["torch"], found["torchvision"]) == ("2.13.0+cpu", "0.28.0+cpu")


def test_a_lock_without_a_companion_contradicts_its_cell(server: IndexServer) -> None:
    plain = cell()
    lock = lock_cell(plain, serve(server, plain))
    assert contradictions(plain, lock) == []
    assert contradictions(with_companions(plain), lock) == [
        "torchvision was asked for, none is locked",
        "torchaudio was asked for, none is locked",
    ]
    vision = replace(lock.wheels[0], name=canonicalize_name(VISION.project), version=Version("0.23.0+cpu"))
    found = contradictions(with_companions(plain, ["torchvision"]), replace(lock, wheels=(*lock.wheels, vision)))
    assert found == ["torchvision 0.23.0+cpu is locked, which is another build than torch 2.8.0"]
