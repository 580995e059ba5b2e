"""The judgements of the checks on the CPU: what they say of good numbers and of bad ones."""

from dataclasses import replace
from typing import Any

import pytest

from validate.check import Probe, Request, StoppedError
from validate.checks import cpu, gloo
from validate.numerics import Error
from validate.verdict import Status

THREADS = cpu.Threads(used=8, cores=8, asked={}, openmp=["/torch/lib/libgomp.so.1"])
DECODING = cpu.Decoding(
    forward=Error(6e-7, 3e-6),
    cached=Error(1e-15, 6e-15),
    cached32=Error(4e-7, 3e-6),
    leaked=0,
    moved=9,
    repeated=True,
    distinct=16,
)
TOOLS = cpu.Tools(cpp="/usr/bin/g++", c="/usr/bin/gcc", header=None, ldconfig=True, ptxas=[], triton=True, cuda=True)
COMPILED = cpu.Compiled(eager=4.6e-7, compiled=4.5e-7, elements=32768, libraries=3, seconds=9.0)
DEATH = gloo.Death(returncode=1)


def _probe() -> Probe:
    return Probe(Request(), lambda _: None)


def _found(probe: Probe) -> list[tuple[Status, str]]:
    return [(finding.status, finding.mode) for finding in probe.findings]


def test_all_is_well() -> None:
    probe = _probe()
    cpu.judge_threads(probe, THREADS)
    cpu.judge_threads(probe, replace(THREADS, used=1, cores=1))
    cpu.judge_vectors(probe, "AVX2", ["sse2", "avx2"])
    cpu.judge_vectors(probe, "DEFAULT", [])
    cpu.judge_decoding(probe, DECODING)
    cpu.judge_losses(probe, [6.6, 4.0, 1.0])
    cpu.judge_batches(probe, [[0.0, 1.0]], [[0.0, 1.0]])
    cpu.judge_tools(probe, TOOLS)
    cpu.judge_compiled(probe, COMPILED)
    gloo.judge_death(probe, DEATH)
    assert probe.findings == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"used": 1}, [(Status.FAIL, "F23")]),
        ({"used": 1, "asked": {"OMP_NUM_THREADS": "1"}}, [(Status.WARN, "F23")]),
        ({"openmp": ["/a/libgomp.so.1", "/b/libgomp.so.1"]}, [(Status.WARN, "F23")]),
    ],
)
def test_threads(change: dict[str, Any], expected: list[tuple[Status, str]]) -> None:
    probe = _probe()
    cpu.judge_threads(probe, replace(THREADS, **change))
    assert _found(probe) == expected


def test_vectors_that_are_not_used_are_a_warning() -> None:
    probe = _probe()
    cpu.judge_vectors(probe, "DEFAULT", ["avx2"])
    assert _found(probe) == [(Status.WARN, "")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"forward": Error(1e-4, 1e-3)}, "forward pass in fp32 is wrong"),
        ({"cached": Error(1e-8, 1e-7)}, "decoding with a cache in fp64 is wrong"),
        ({"cached32": Error(1e-4, 1e-3)}, "decoding with a cache in fp32 is wrong"),
        ({"leaked": 1}, "looks into the future"),
        ({"moved": 0}, "other tokens give the same logits"),
        ({"repeated": False}, "something else the second time"),
        ({"distinct": 1}, "one token for ever"),
    ],
)
def test_a_decoder(change: dict[str, Any], says: str) -> None:
    probe = _probe()
    cpu.judge_decoding(probe, replace(DECODING, **change))
    assert [finding.status for finding in probe.findings] == [Status.FAIL]
    assert says in probe.findings[0].what


@pytest.mark.parametrize("losses", [[6.6, 3.4], [6.6, float("nan")], [float("nan"), 1.0]])
def test_a_loss_that_does_not_fall(losses: list[float]) -> None:
    probe = _probe()
    cpu.judge_losses(probe, losses)
    assert _found(probe) == [(Status.FAIL, "")]


def test_batches_out_of_order() -> None:
    probe = _probe()
    cpu.judge_batches(probe, [[1.0, 0.0]], [[0.0, 1.0]])
    cpu.judge_batches(probe, [], [[0.0, 1.0]])
    assert _found(probe) == [(Status.FAIL, "F35")] * 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cpp": None}, [(Status.WARN, "F48")]),
        ({"c": None}, [(Status.FAIL, "F48")]),
        ({"header": "/usr/include/python3.11/Python.h"}, [(Status.FAIL, "F49")]),
        ({"ldconfig": False}, [(Status.WARN, "F49")]),
        ({"ptxas": ["/triton/ptxas"]}, [(Status.FAIL, "F51")]),
        ({"c": None, "header": "/Python.h", "ldconfig": False, "triton": False}, []),
        ({"c": None, "header": "/Python.h", "ldconfig": False, "cuda": False}, []),
    ],
)
def test_tools(change: dict[str, Any], expected: list[tuple[Status, str]]) -> None:
    probe = _probe()
    cpu.judge_tools(probe, replace(TOOLS, **change))
    assert _found(probe) == expected


def test_a_cpu_build_needs_a_cpp_compiler() -> None:
    probe = _probe()
    with pytest.raises(StoppedError):
        cpu.judge_tools(probe, replace(TOOLS, cpp=None, cuda=False))
    assert _found(probe) == [(Status.FAIL, "F48")]


@pytest.mark.parametrize("change", [{"libraries": 0}, {"compiled": 1e-3}, {"compiled": float("inf")}])
def test_compiled_code(change: dict[str, Any]) -> None:
    probe = _probe()
    cpu.judge_compiled(probe, replace(COMPILED, **change))
    assert _found(probe) == [(Status.FAIL, "")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"returncode": None}, "when a rank dies torchrun waits for the others: it did not end"),
        ({"returncode": None, "began": False}, "torchrun did not start its ranks"),
        ({"returncode": 0}, "reports success"),
        ({"survived": True}, "leaves a rank running"),
    ],
)
def test_a_death(change: dict[str, Any], says: str) -> None:
    probe = _probe()
    gloo.judge_death(probe, replace(DEATH, **change))
    assert [finding.status for finding in probe.findings] == [Status.FAIL]
    assert says in probe.findings[0].what
