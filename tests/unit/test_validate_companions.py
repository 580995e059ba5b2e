"""Torchvision and torchaudio: judged as they are where all is well, and as they are where it is not."""

from __future__ import annotations

import pytest

from validate.check import Probe, Request
from validate.checks import companions
from validate.checks.companions import Companion
from validate.verdict import Status


@pytest.mark.parametrize(
    ("number", "cuda"), [(12080, "12.8"), (13020, "13.2"), (11080, "11.8"), (12040, "12.4"), (-1, None), (None, None)]
)
def test_the_number_of_a_cuda(number: int | None, cuda: str | None) -> None:
    assert companions.cuda_of(number) == cuda


@pytest.mark.parametrize(
    ("built", "torch", "statuses"),
    [
        ("12.8", "12.8", []),
        (None, None, []),
        ("12.6", "12.8", [Status.WARN]),
        ("13.0", "13.2", [Status.WARN]),
        ("13.0", "12.8", [Status.FAIL]),
        (None, "12.8", [Status.FAIL]),
        ("12.8", None, [Status.FAIL]),
    ],
)
@pytest.mark.parametrize(("name", "mode"), [("torchvision", "F13"), ("torchaudio", "F14")])
def test_a_companion_is_of_torchs_cuda(
    built: str | None, torch: str | None, statuses: list[Status], name: str, mode: str
) -> None:
    probe = Probe(Request(), lambda document: None)
    companions.judge_companion(probe, Companion(name, "1.0", built, right=True), torch)
    assert [finding.status for finding in probe.findings] == statuses
    assert {finding.mode for finding in probe.findings} <= {mode}


def test_a_companion_that_computes_wrongly() -> None:
    probe = Probe(Request(), lambda document: None)
    companions.judge_companion(probe, Companion("torchvision", "1.0", "12.8", right=False), "12.8")
    assert [finding.what for finding in probe.findings] == ["torchvision computes wrongly"]
