import math

import pytest

from validate.check import Probe, Request
from validate.numerics import PEAK, TOLERANCES, Error, Tolerance, as_good, engine, judge, multiplier, verdict
from validate.verdict import Blame, Status

BF16 = TOLERANCES["bf16"]


@pytest.mark.parametrize(
    ("norm", "peak", "expected"),
    [
        (0.0, 0.0, Status.PASS),
        (BF16.soft, 0.02, Status.PASS),
        (BF16.soft * 1.01, 0.02, Status.WARN),
        (BF16.hard, 0.02, Status.WARN),
        (BF16.hard * 1.01, 0.02, Status.FAIL),
        (1e-4, PEAK * BF16.hard, Status.PASS),
        (1e-4, PEAK * BF16.hard * 1.01, Status.FAIL),  # one element among a million
        (math.nan, 0.0, Status.FAIL),
        (0.0, math.nan, Status.FAIL),
        (math.inf, math.inf, Status.FAIL),
    ],
)
def test_an_error_is_judged_by_its_norm_and_by_its_worst_element(norm: float, peak: float, expected: Status) -> None:
    assert verdict(Error(norm, peak), BF16) is expected


def test_every_limit_lies_above_what_the_path_makes_and_below_what_the_next_coarser_one_makes() -> None:
    # Made by the path itself, against fp64 of inputs that were not rounded.
    made = {"fp64": 1e-15, "fp32": 3e-7, "tf32": 2.9e-4, "fp16": 3.6e-4, "bf16": 2.9e-3}
    for name, tolerance in TOLERANCES.items():
        assert made[name] < tolerance.soft < tolerance.hard
    for name, coarser in (("fp64", "fp32"), ("fp32", "tf32"), ("fp32", "fp16"), ("tf32", "bf16"), ("fp16", "bf16")):
        assert TOLERANCES[name].hard < made[coarser], f"{name} would accept what {coarser} computes"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(3e-7, "fp32"), (2.9e-4, "tf32"), (6e-4, "tf32"), (2.9e-3, "bf16"), (0.5, None), (math.nan, None)],
)
def test_the_error_of_an_fp32_product_tells_what_computed_it(error: float, expected: str | None) -> None:
    assert engine(error) == expected


@pytest.mark.parametrize(
    ("half", "elements", "tol", "expected"),
    [(False, 10**6, 1e-4, 2.0), (True, 10**6, 1e-4, 3.0), (False, 999, 1e-4, 3.0), (False, 10**6, 2e-2, 3.0)],
)
def test_the_multiplier_is_torchs(half: bool, elements: int, tol: float, expected: float) -> None:  # noqa: FBT001
    assert multiplier(half=half, elements=elements, tol=tol) == expected


def test_compiled_code_may_be_off_by_a_multiple_of_what_eager_code_is_off() -> None:
    assert as_good(2e-3, 1e-3, half=False, elements=10**6)
    assert not as_good(2.1e-3, 1e-3, half=False, elements=10**6)
    assert as_good(2.9e-3, 1e-3, half=True, elements=10**6)
    assert as_good(9e-6, 0.0, half=False, elements=10**6)
    assert not as_good(math.inf, 1e-3, half=True, elements=10**6)
    assert not as_good(math.nan, 1e-3, half=True, elements=10**6)


def test_a_judgement_says_how_far_off_and_what_was_allowed() -> None:
    probe = Probe(Request(), lambda _: None)
    limits = Tolerance(1e-3, 1e-2)
    assert judge(probe, "matmul", Error(1e-4, 1e-3), limits) is Status.PASS
    assert probe.findings == []
    judge(probe, "matmul", Error(2e-3, 1e-2), limits)
    judge(probe, "matmul", Error(2e-2, 1e-1), limits, remedy="buy another", mode="F56", blame=Blame.HOST)
    warned, failed = probe.findings
    assert (warned.status, failed.status) == (Status.WARN, Status.FAIL)
    assert failed.what == "matmul is wrong"
    assert "0.02" in failed.why
    assert "0.01" in failed.why
    assert (failed.remedy, failed.mode, failed.blame) == ("buy another", "F56", Blame.HOST)
