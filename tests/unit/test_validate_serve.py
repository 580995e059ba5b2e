"""The checks of language models: what they find in what was seen, and that they pass where nothing is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.mutations.serve import DECLARED, with_service
from validate import bundle, check, profile, runner
from validate.check import Probe, Request, StoppedError
from validate.checks import serve
from validate.verdict import Finding, Result, Skip, Status

CHECKS = check.load()
LLM = ("llm.accelerate", "llm.export", "llm.transformers", "svc.generate")


@pytest.fixture
def probe() -> Probe:
    return Probe(Request(), lambda _: None)


def run(name: str, tmp_path: Path, *, prelude: str = "", declared: Mapping[str, Any] | None = DECLARED) -> Result:
    request = Request(declared=declared, options=profile.DEFAULTS, device="cpu", scratch=str(tmp_path))
    return runner.run_one(CHECKS[name], request, root=bundle.root(), deadline_s=60, prelude=prelude)


@pytest.mark.parametrize("name", LLM)
@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"program": None}, Skip.NOT_THIS_KIND),
        ({"program": "notebook"}, Skip.NOT_THIS_KIND),
        ({}, Skip.NOT_THIS_KIND),
        (None, Skip.NOT_DECLARED),
    ],
)
def test_other_images_are_none_of_their_business(
    name: str, declared: Mapping[str, Any] | None, reason: Skip, tmp_path: Path
) -> None:
    result = run(name, tmp_path, declared=declared)
    assert (result.status, result.skip) == (Status.SKIP, reason)


def test_a_service_without_a_fault_passes(tmp_path: Path) -> None:
    result = run("svc.generate", tmp_path, prelude=with_service(""))
    assert result.findings == []
    assert result.status is Status.PASS
    assert {"start_s", "stop_s"} <= set(result.metrics)


def only(probe: Probe) -> Finding:
    (finding,) = probe.findings
    return finding


GREEDY, OTHER = [1, 2, 3], [1, 5, 3]
SEEN: Mapping[str, Any] = {
    "greedy": [GREEDY, GREEDY, GREEDY],
    "sampled": [GREEDY, GREEDY, OTHER, GREEDY],
    "ranks": [0, 2, 1],
    "top_1": GREEDY,
    "cold": GREEDY,
    "text": "fox",
    "pipeline": "fox",
    "reloaded": True,
    "retokenized": True,
}
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class TestTransformers:
    def test_what_is_right_is_not_found(self, probe: Probe) -> None:
        serve.judge_generation(probe, SEEN)
        serve.judge_forms(probe, SEEN, FILES)
        assert probe.findings == []

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"greedy": [GREEDY, OTHER, GREEDY]}, "other tokens the second time"),
            ({"greedy": [GREEDY, GREEDY, OTHER]}, "does not take the likeliest token"),
            ({"sampled": [GREEDY, OTHER, OTHER, OTHER]}, "one seed gives two samples"),
            ({"sampled": [GREEDY] * 4}, "whatever the seed"),
            ({"ranks": [0, 3]}, "top_k=3 took number 4"),
            ({"top_1": OTHER}, "top_k=1 is not greedy"),
            ({"cold": OTHER}, "temperature 0.0001 is not greedy"),
        ],
    )
    def test_what_is_wrong_with_tokens(self, probe: Probe, changed: Mapping[str, Any], says: str) -> None:
        serve.judge_generation(probe, {**SEEN, **changed})
        assert says in only(probe).what

    @pytest.mark.parametrize(
        ("changed", "files", "says"),
        [
            ({"pipeline": "dog"}, FILES, "the pipeline gives another text"),
            ({"reloaded": False}, FILES, "computes something else"),
            ({"retokenized": False}, FILES, "gives other tokens"),
            ({}, ("config.json", "pytorch_model.bin"), "does not write safetensors"),
            ({}, (*FILES, "pytorch_model.bin"), "does not write safetensors"),
        ],
    )
    def test_what_is_wrong_with_its_forms(
        self, probe: Probe, changed: Mapping[str, Any], files: tuple[str, ...], says: str
    ) -> None:
        serve.judge_forms(probe, {**SEEN, **changed}, files)
        assert says in only(probe).what

    def test_where_tokens_part_is_said(self, probe: Probe) -> None:
        serve.judge_generation(probe, {**SEEN, "cold": OTHER})
        assert only(probe).why == "they differ from token 2 of 3 on"


class TestExport:
    CLOSE: Mapping[str, float] = {
        "export_first": 1e-6, "export_other": 0.0, "onnx_first": 2e-6, "onnx_other": 3e-6, "logits": 0.8,
    }  # fmt: skip

    def test_small_errors_are_none(self, probe: Probe) -> None:
        serve.judge_export(probe, self.CLOSE)
        assert probe.findings == []

    @pytest.mark.parametrize("name", ["export_first", "export_other", "onnx_first", "onnx_other"])
    @pytest.mark.parametrize("error", [0.01, float("nan"), float("inf")])
    def test_other_logits(self, probe: Probe, name: str, error: float) -> None:
        serve.judge_export(probe, {**self.CLOSE, name: error})
        assert ("ONNX" if name.startswith("onnx") else "torch.export") in only(probe).what
        assert ("more tokens" if name.endswith("other") else "was made with") in only(probe).what


def rank(number: int, **changed: Any) -> Mapping[str, Any]:
    return {
        "rank": number,
        "world": 2,
        "seen": list(range(number, 64, 2)),
        "losses": [4.0, 1.0],
        "weights": [0.5, 0.25],
        "gathered": [0, 1],
        **changed,
    }


class TestAccelerate:
    def test_two_that_agree(self, probe: Probe) -> None:
        serve.judge_ranks(probe, [rank(1), rank(0)])
        assert probe.findings == []

    @pytest.mark.parametrize(
        ("ranks", "says"),
        [
            ([rank(0)], "does not make one group"),
            ([rank(0, world=1, gathered=[0]), rank(0, world=1, gathered=[0])], "does not make one group"),
            ([rank(0), rank(1, gathered=[1, 1])], "does not make one group"),
            ([rank(0), rank(1, seen=list(range(64)))], "do not share the samples out"),
            ([rank(0), rank(1, weights=[0.5, 0.26])], "trained two models"),
            ([rank(0, losses=[4.0, 3.9]), rank(1)], "does not reduce the loss"),
            ([rank(0), rank(1, losses=[4.0, float("nan")])], "does not reduce the loss"),
        ],
    )
    def test_two_that_do_not(self, probe: Probe, ranks: list[Mapping[str, Any]], says: str) -> None:
        with contextlib.suppress(StoppedError):
            serve.judge_ranks(probe, ranks)
        assert says in only(probe).what


def test_events_are_read_and_the_rest_is_left_out() -> None:
    stream = 'event: text\ndata: {"text": "a\\n\\nb"}\n\n: comment\n\nevent: end\ndata: {}\n\nevent: te'
    assert serve.events(stream) == [("text", {"text": "a\n\nb"}), ("end", {})]
