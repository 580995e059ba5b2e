"""What is said of libraries and of results, given numbers."""

import math
from typing import Any

import pytest

from validate import numerics
from validate.check import Probe, Request, StoppedError
from validate.checks import gpu_numerics, libraries
from validate.numerics import Error
from validate.verdict import Finding, Status

GOOD = Error(3e-7, 2e-6)
TF32 = Error(2.9e-4, 2e-3)
BF16 = Error(2.9e-3, 2e-2)
NAN = Error(math.inf, math.inf)


def findings(judge: Any, *arguments: Any, **named: Any) -> list[Finding]:
    probe = Probe(Request(), lambda _: None)
    try:
        judge(*[probe if it is Probe else it for it in arguments], **named)
    except StoppedError:
        assert probe.findings
    return probe.findings


def only(judge: Any, *arguments: Any, **named: Any) -> Finding:
    (finding,) = findings(judge, *arguments, **named)
    return finding


@pytest.mark.parametrize(("number", "version"), [(91002, "9.10.2"), (90100, "9.1.0"), (8907, "8.9.7"), (None, "none")])
def test_cudnns_number_is_a_version(number: int | None, version: str) -> None:
    assert libraries.numbered(number) == version


def test_cudnn_must_be_the_declared_one() -> None:
    judge = libraries.judge_cudnn_version
    assert findings(judge, 91002, 91002, Probe, on_gpu=True) == []
    assert findings(judge, 91002, None, Probe, on_gpu=True) == []
    assert findings(judge, None, None, Probe, on_gpu=False) == []
    assert "9.16.0" in only(judge, 91600, 91002, Probe, on_gpu=True).why
    assert "finds no cuDNN" in only(judge, None, None, Probe, on_gpu=True).what


def test_with_cudnn_it_must_be_cudnn_and_without_it_not() -> None:
    judge = libraries.judge_backends
    right = {"fp32 with cuDNN": "_ConvBackend.Cudnn", "fp32 without cuDNN": "_ConvBackend.Slow2d"}
    assert findings(judge, right, Probe) == []
    assert findings(judge, {"fp32 with cuDNN": ""}, Probe) == []
    assert "Slow2d" in only(judge, {"fp32 with cuDNN": "_ConvBackend.Slow2d"}, Probe).what
    assert "Cudnn" in only(judge, {"fp32 without cuDNN": "_ConvBackend.Cudnn"}, Probe).what


def test_cudnns_parts_must_lie_together() -> None:
    assert findings(libraries.judge_cudnn_files, ["/a/libcudnn.so.9", "/a/libcudnn_ops.so.9"], Probe) == []
    found = only(libraries.judge_cudnn_files, ["/a/libcudnn.so.9", "/usr/lib/libcudnn_ops.so.9"], Probe)
    assert (found.status, found.mode) == (Status.FAIL, "F03")


def test_nccl_must_be_the_declared_one_and_not_older_than_torch_wants() -> None:
    judge = libraries.judge_nccl_version
    assert findings(judge, "2.30.7", "2.30.7", "2.30.7", Probe) == []
    assert findings(judge, "2.30.7", "2.27.3", None, Probe) == []
    assert only(judge, "2.27.3", "2.30.7", "2.30.7", Probe).status is Status.FAIL
    assert only(judge, None, None, "2.30.7", Probe).status is Status.FAIL
    assert only(judge, "2.9.8", "2.27.3", None, Probe).status is Status.WARN


def test_a_collective_must_be_exact() -> None:
    assert findings(libraries.judge_exact, "all_reduce", 0, 7, Probe) == []
    assert only(libraries.judge_exact, "all_reduce", 1, 7, Probe).status is Status.FAIL


def test_nvrtc_and_a_driver_that_is_too_old_for_it_are_told_apart() -> None:
    message = "nvrtc: error: failed to open libnvrtc-builtins.so.13.0.\n  Make sure it is installed"
    assert only(libraries.judge_nvrtc, message, Probe).mode == "F07"
    message = "CUDA error: the provided PTX was compiled with an unsupported toolchain."
    assert only(libraries.judge_nvrtc, message, Probe).mode == "F46"


def test_the_error_tells_what_computed_fp32() -> None:
    judge = gpu_numerics.judge_engine
    assert findings(judge, GOOD, {}, Probe) == []
    silent = only(judge, TF32, {"NVIDIA_TF32_OVERRIDE": "1"}, Probe)
    assert (silent.status, silent.mode) == (Status.FAIL, "F56")
    assert "NVIDIA_TF32_OVERRIDE=1" in silent.why
    assert "BF16" in only(judge, BF16, {}, Probe).what
    assert only(judge, NAN, {}, Probe).mode == ""
    # The norm hardly sees one wrong element of a hundred thousand.
    assert only(judge, Error(4e-6, 1e-2), {}, Probe).status is Status.FAIL


def test_tf32_by_default_is_a_warning() -> None:
    judge = gpu_numerics.judge_default
    assert findings(judge, GOOD, GOOD, {}, Probe) == []
    assert findings(judge, TF32, TF32, {}, Probe) == []
    assert only(judge, TF32, GOOD, {}, Probe).status is Status.WARN


def test_what_has_no_rounding_must_be_equal() -> None:
    assert findings(gpu_numerics.judge_exact, "sort", "aa", "aa", Probe) == []
    assert only(gpu_numerics.judge_exact, "sort", "aa", "ab", Probe).status is Status.FAIL


def test_attention_must_have_an_implementation_and_should_have_a_fast_one() -> None:
    judge = gpu_numerics.judge_backends
    slow = {"fp32 full": ["MATH"], "fp16 full": ["MATH"], "bf16 full": ["MATH"], "bf16 grouped": ["MATH"]}
    none = {"fp16 full FLASH_ATTENTION": "No available kernel. Aborting execution."}
    assert findings(judge, {**slow, "bf16 full": ["FLASH_ATTENTION", "MATH"]}, none, Probe, fused=True) == []
    assert findings(judge, slow, none, Probe, fused=False) == []
    warning = only(judge, slow, none, Probe, fused=True)
    assert (warning.status, warning.mode) == (Status.WARN, "F57")
    assert only(judge, {**slow, "fp32 full": []}, none, Probe, fused=False).status is Status.FAIL
    broken = {"bf16 full CUDNN_ATTENTION": "cuDNN Frontend error: [cudnn_frontend] Error: No valid engine configs"}
    assert "CUDNN_ATTENTION" in only(judge, slow, broken, Probe, fused=False).what


def test_training_must_learn_and_go_the_way_of_fp32() -> None:
    judge = gpu_numerics.judge_training
    exact = [1.0, 0.5, 0.1]
    assert findings(judge, "bf16", [1.001, 0.5, 0.11], exact, Probe) == []
    assert "does not learn" in only(judge, "bf16", [1.0, 0.9, 0.8], exact, Probe).what
    assert "does not learn" in only(judge, "fp16", [1.0, math.nan, math.nan], exact, Probe).what
    assert "another way" in only(judge, "fp16", [1.1, 0.5, 0.1], exact, Probe).what
    assert "another way" in only(judge, "fp16", [1.0, 0.5, 0.3], exact, Probe).what


@pytest.mark.parametrize(
    ("after", "moved", "good"), [(512.0, False, True), (512.0, True, False), (1024.0, False, False)]
)
def test_an_overflow_must_be_skipped_and_scaled_down(after: float, *, moved: bool, good: bool) -> None:
    assert (findings(gpu_numerics.judge_scaler, 1024.0, after, Probe, moved=moved) == []) is good


def test_compiled_code_may_be_as_inexact_as_eager_code() -> None:
    judge = gpu_numerics.judge_compiled
    assert findings(judge, "output", 5e-3, 2e-3, 10_000, Probe, half=True) == []
    assert only(judge, "output", 5e-3, 2e-3, 10_000, Probe, half=False).status is Status.FAIL
    assert only(judge, "output", math.inf, 2e-3, 10_000, Probe, half=True).status is Status.FAIL


def test_something_must_have_been_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert findings(gpu_numerics.judge_graphs, 2, Probe) == []
    assert "TORCHDYNAMO_DISABLE=1" in only(gpu_numerics.judge_graphs, 0, Probe).why


def test_repeats_must_be_equal() -> None:
    run = {"loss": "aa", "weight": "bb"}
    assert findings(gpu_numerics.judge_repeats, [run, run, run], Probe) == []
    found = only(gpu_numerics.judge_repeats, [run, run, {**run, "weight": "bc"}], Probe)
    assert found.status is Status.FAIL
    assert "weight" in found.why
    assert "loss" not in found.why


def test_training_must_go_on_from_a_checkpoint() -> None:
    assert findings(gpu_numerics.judge_resumed, [], Probe) == []
    assert "0.weight" in only(gpu_numerics.judge_resumed, ["0.weight"], Probe).why


def test_a_convolution_in_tf32_would_not_pass_for_one_in_fp32() -> None:
    assert numerics.verdict(TF32, libraries.CONV_FP32) is Status.FAIL
