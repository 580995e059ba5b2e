"""Toolkits and extensions: judged as they are where all is well, and as they are where it is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from validate.check import Probe, Request, SkippedError, StoppedError
from validate.checks import toolkit
from validate.checks.toolkit import Toolkit

SAID = """\
nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2026 NVIDIA Corporation
Cuda compilation tools, release 13.2, V13.2.86
"""
GOOD = Toolkit(home="/cuda", nvcc="/cuda/bin/nvcc", on_path="/cuda/bin/nvcc", said=SAID)


def a_probe(**declared: object) -> Probe:
    return Probe(Request(declared=declared), lambda document: None)


def modes(probe: Probe) -> Sequence[str]:
    return [finding.mode for finding in probe.findings]


# ----------------------------------------------------------------------------------------------------
# The toolkit


@pytest.mark.parametrize(
    ("said", "cuda"),
    [(SAID, "13.2"), ("Cuda compilation tools, release 12.8, V12.8.93", "12.8"), ("release", None), ("", None)],
)
def test_the_release_of_nvcc(said: str, cuda: str | None) -> None:
    assert toolkit.release(said) == cuda


def test_a_toolkit_as_declared() -> None:
    probe = a_probe()
    toolkit.judge_toolkit(probe, GOOD, "13.2")
    assert probe.findings == []


@pytest.mark.parametrize(
    ("seen", "declared", "found"),
    [
        (GOOD, "13.0", [""]),
        (replace(GOOD, said="Segmentation fault"), "13.2", ["F77"]),
        (replace(GOOD, on_path=None), "13.2", [""]),
        (replace(GOOD, on_path="/usr/bin/nvcc"), "13.2", [""]),
        (replace(GOOD, missing=["lib64/libcudart.so"]), "13.2", ["F79"]),
        (replace(GOOD, missing=["include/cuda.h", "lib64/libcudart.so"]), "13.2", ["F77"]),
        (replace(GOOD, said="release 12.8", on_path=None, missing=["bin/ptxas"]), "13.2", ["", "", "F77"]),
    ],
)
def test_a_toolkit_that_is_not(seen: Toolkit, declared: str, found: Sequence[str]) -> None:
    probe = a_probe()
    toolkit.judge_toolkit(probe, seen, declared)
    assert modes(probe) == found


@pytest.mark.parametrize("home", ["", "/cuda"])
def test_no_compiler(home: str) -> None:
    probe = a_probe()
    with pytest.raises(StoppedError):
        toolkit.judge_toolkit(probe, Toolkit(home=home), "13.2")
    assert modes(probe) == ["F77"]


def test_a_link_to_the_same_compiler_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "nvcc").touch()
    (tmp_path / "link").symlink_to("nvcc")
    probe = a_probe()
    seen = replace(GOOD, nvcc=str(tmp_path / "nvcc"), on_path=str(tmp_path / "link"))
    toolkit.judge_toolkit(probe, seen, "13.2")
    assert probe.findings == []


def test_a_dangling_link_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bin/nvcc", *toolkit._PROGRAMS, toolkit._CCCL[0], *(f"include/{it}" for it in toolkit._HEADERS)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{SAID}'\n")
        path.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    for name in toolkit._LINKED:
        (tmp_path / "lib64" / f"lib{name}.so.1").touch()
        (tmp_path / "lib64" / f"lib{name}.so").symlink_to(f"lib{name}.so.{2 if name == 'cufft' else 1}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    seen = toolkit._toolkit()
    assert (seen.nvcc, seen.on_path, toolkit.release(seen.said)) == (f"{tmp_path}/bin/nvcc",) * 2 + ("13.2",)
    assert seen.missing == ["lib64/libcufft.so"]
    monkeypatch.delenv("CUDA_HOME")
    assert toolkit._toolkit().nvcc is None


@pytest.mark.parametrize("check", [toolkit.toolkit, toolkit.cuda_extension])
@pytest.mark.parametrize("declared", [{}, {"toolkit": None}])
def test_where_no_toolkit_is_declared_there_is_nothing_to_see(check: object, declared: dict[str, object]) -> None:
    assert callable(check)
    with pytest.raises(SkippedError, match="declares no CUDA toolkit"):
        check(a_probe(**declared))


# ----------------------------------------------------------------------------------------------------
# Extensions


@pytest.mark.parametrize(
    ("out", "gradient", "fine"),
    [
        ([1.0, 4.0, 7.0, 10.0, 13.0, 16.0, 19.0], [3.0] * 7, True),
        ([1.0, 4.0, 7.0, 10.0, 13.0, 16.0, 18.0], [3.0] * 7, False),
        ([1.0, 4.0, 7.0, 10.0, 13.0, 16.0, 19.0], [], False),
        ([], [3.0] * 7, False),
    ],
)
def test_what_a_function_of_tensors_gives(out: Sequence[float], gradient: Sequence[float], fine: bool) -> None:  # noqa: FBT001
    probe = a_probe()
    toolkit.judge_cpp(probe, out, gradient)
    assert (probe.findings == []) is fine


@pytest.mark.parametrize(
    ("names", "capability"),
    [
        (["compute_120", "sm_120", "sm_75", "sm_80"], "7.5"),
        (["sm_100", "sm_90"], "9.0"),
        (["sm_90a", "sm_100"], "10.0"),
        (["compute_90"], None),
        ([], None),
    ],
)
def test_the_lowest_architecture(names: Sequence[str], capability: str | None) -> None:
    assert toolkit.lowest(names) == capability


REFUSED = "x and y must be CUDA tensors\nException raised from scaled_sum"


@pytest.mark.parametrize(
    ("number", "refusal", "found"),
    [(13020, REFUSED, 0), (12080, REFUSED, 1), (13020, "", 1), (13020, "CUDA error: no CUDA-capable device", 1)],
)
def test_what_a_module_says_without_a_gpu(number: int, refusal: str, found: int) -> None:
    probe = a_probe()
    toolkit.judge_module(probe, number, refusal, "13.2")
    assert len(probe.findings) == found


@pytest.mark.parametrize(
    ("code", "found"), [(["sm_75"], 0), (["sm_75", "sm_90"], 0), (["sm_90"], 1), ([], 1), (None, 0)]
)
def test_the_machine_code_in_a_library(code: Sequence[str] | None, found: int) -> None:
    probe = a_probe()
    toolkit.judge_code(probe, code, "7.5")
    assert len(probe.findings) == found


@pytest.mark.parametrize(("wrong", "total", "fine"), [(0, 10.0, True), (1, 10.0, False), (0, 9.0, False)])
def test_what_a_kernel_computed(wrong: int, total: float, fine: bool) -> None:  # noqa: FBT001 (pytest's)
    probe = a_probe()
    toolkit.judge_kernel(probe, wrong=wrong, total=total, wanted=10)
    assert (probe.findings == []) is fine


@pytest.mark.parametrize(
    ("error", "told", "mode"),
    [
        ("Error building extension 'x'\nld: cannot find -lcudart\nninja: stopped", "cannot find -lcudart", "F79"),
        ("Error building extension 'x'\na.cpp:1:10: fatal error: Python.h: No such file", "Python.h", "F49"),
        ("Ninja is required to load C++ extensions", "Ninja is required", ""),
        ("something\nnobody\nhas\never\nseen", "ever\nseen", ""),
    ],
)  # fmt: skip
def test_what_keeps_an_extension_from_being_built_is_told(error: str, told: str, mode: str) -> None:
    probe = a_probe()
    with pytest.raises(StoppedError):
        toolkit._not_built(probe, "C++", error, cuda=False)
    (finding,) = probe.findings
    assert told in finding.why
    assert finding.mode == mode
