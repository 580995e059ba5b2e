"""The bench of pushes: what its sinks take and count, and its renderings; what it measures is not tested."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import push as bench
from bench.command import chosen_keys
from bench.process import Spent
from bench.push import Results, Sent, dumps, findings, loads, markdown
from bench.registries import KeepingSink, Sink, asked
from bench.report import X
from builder import layout, push, tar
from builder.credentials import Configuration
from builder.errors import ImpossibleError, MatrixError, SourceError
from builder.fetching import Silent
from builder.layout import Descriptor, Image
from builder.push import Tags
from builder.store import Store
from builder.upload import Way, push_blob
from tests.support.cosign import Cosign

RECORDED = Results(
    started="2026-11-21 21:00 UTC",
    cell="torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
    neighbour="torch2.9.1-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
    repeat=3,
    blobs=21,
    image_bytes=4_083_960_779,
    new_bytes=1_550_000_000,
    machine={"cores": "2", "load_before": "0.10"},
    tools={"skopeo": "1.9.3"},
    entries=(
        Sent(key="copy", name="copy to a sink", seconds=(2.0, 1.0, 9.0), bytes_received=4_083_960_779),
        Sent(key="kept", name="copy to a sink that keeps and hashes", seconds=(10.0,)),
        Sent(key="plain", name="copy to docker-registry", seconds=(12.5,)),
        Sent(key="push", name="torchyard → docker-registry", seconds=(16.0, 14.0, 15.0)),
        Sent(key="again", name="… the same image again", seconds=(1.0, 1.5, 0.9), requests={"HEAD": 30}),
        Sent(key="next", name="… then its neighbour", seconds=(7.0,), bytes_received=1_550_000_000),
        Sent(key="evidence", name="… an unchanged image, with signed evidence", seconds=(2.0, 1.25, 1.5),
             requests={"GET": 10, "HEAD": 31}, prepared_seconds=9.0, prepared="torchyard push"),
        Sent(key="skopeo", name="skopeo copy → docker-registry", seconds=(20.0,), prepared_seconds=25.0,
             prepared="torchyard export", commands=("skopeo copy",)),
        Sent(key="docker", name="docker push → docker-registry", failure="no engine"),
    ),
)  # fmt: skip


@pytest.fixture
def image(store: Store) -> Image:
    with store.scratch("made") as scratch:
        content = random.Random(1).randbytes(1_500_000)
        layers = [layout.gzip_layer(store, tar.stream([tar.file_entry("a", content)]), scratch=scratch)]
    return layout.assemble(store, architecture="amd64", config={}, epoch=0, layers=layers)


@pytest.fixture(params=[Sink, KeepingSink])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sink]:
    with request.param(tmp_path / "sink") as running:
        yield running


def test_a_sink_takes_an_image_and_counts_it(sink: Sink, store: Store, image: Image) -> None:
    for way in (Way.SENT, Way.THERE):
        with push.opened(f"{sink.host}/team/app", Configuration()) as target:
            done = push.push(target, store, image, Tags(moving=("1",)), progress=Silent())
        assert done.blobs == {way: 2}
    assert sink.has("team/app", image.manifest.digest)
    assert not sink.has("team/app", f"sha256:{'0' * 64}")
    assert sink.received == sum(blob.size for blob in image.blobs[1:])
    assert sink.requests["PATCH"] == 1
    assert sink.requests["POST"] == 2
    assert sink.cpu_seconds > 0


def test_a_sink_that_keeps_looks_at_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.upload.ATTEMPTS", 1)
    wrong = Descriptor(media_type=layout.MEDIA_LAYER_GZIP, digest=f"sha256:{'0' * 64}", size=3)
    with (
        KeepingSink(tmp_path / "sink") as sink,
        push.opened(f"{sink.host}/team/app", Configuration()) as target,
        pytest.raises(SourceError),
    ):
        push_blob(target, wrong, lambda: iter([b"abc"]), name="wrong", sources=(), progress=Silent())


def test_what_a_registry_was_asked_stands_in_its_log() -> None:
    line = '127.0.0.1 - - [21/Nov/2026:21:00:00 +0000] "{} HTTP/1.1" 200 0 "" "torchyard/0.1.0"\n'
    log = "".join(line.format(one) for one in ("HEAD /v2/a/blobs/x", "HEAD /v2/a/blobs/y", "PUT /v2/a/manifests/1"))
    assert asked(log + line.format("GET /metrics") + "time=now level=error") == Counter(HEAD=2, PUT=1)


def test_files_of_an_image_are_copied_whole(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(3_000_000)
    path = tmp_path / hashlib.sha256(content).hexdigest()
    path.write_bytes(content)
    with KeepingSink(tmp_path / "sink") as sink:
        bench._copied(path, sink.port)
        assert sink.received == len(content)


def test_rounds_are_put_together_and_the_middle_one_counts() -> None:
    entries: tuple[Sent, ...] = (Sent(key="copy", name="copy"), Sent(key="skopeo", name="skopeo"))
    for number in (3.0, 1.0, 2.0):
        entries = bench._with(entries, [Sent(key="copy", name="copy", seconds=(number,))], None)
    assert entries[0].seconds == (3.0, 1.0, 2.0)
    assert entries[0].median == 2.0
    assert entries[1].median is None
    entries = bench._with(entries, [Sent(key="skopeo", name="skopeo", seconds=(5.0,))], 25.0)
    assert entries[1].prepared_seconds == 25.0


def test_the_report_compares_with_copies_and_with_torchyard() -> None:
    text = markdown(RECORDED)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert f"| torchyard → docker-registry | 15.0 s | 7.5{X} | 1.5{X} | 1.2{X} |  |" in text
    assert f"| skopeo copy → docker-registry | 20.0 s |  |  | 1.6{X} | 1.3{X} | 25.0 s |" in text
    assert "**failed** · docker push → docker-registry: no engine" in text
    assert {line.count(" | ") for line in rows if "docker-registry" in line} == {11}
    words = " ".join(findings(RECORDED))
    assert "An unchanged image: 30 HEAD, nothing else; 1.00 s" in words
    assert "An unchanged image with its evidence: 10 GET, 31 HEAD, nothing else; 1.50 s" in words
    assert "| … an unchanged image, with signed evidence | 1.5 s |  |  |  |  | 9.0 s |" in text
    assert "took 45.0 s with what goes before it: 3.0 times torchyard" in words
    assert RECORDED.failed
    assert not replace(RECORDED, entries=RECORDED.entries[:-1]).failed


def test_results_can_be_read_back() -> None:
    assert loads(dumps(RECORDED)) == RECORDED
    assert json.loads(dumps(RECORDED))["entries"][0]["median_seconds"] == 2.0
    recorded = Path(__file__).parents[2] / "docs" / "bench"
    for path in recorded.glob("push*.json"):
        assert loads(path.read_text("utf-8"), where=path.name).entry("push") is not None
    for text in ("", "{}", dumps(replace(RECORDED, schema=2))):
        with pytest.raises(MatrixError):
            loads(text)


@pytest.mark.parametrize("text", ["", "copy,nothing", ","])
def test_contenders_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        chosen_keys(text, tuple(bench.NAMES))
    assert chosen_keys("again, push,copy", tuple(bench.NAMES)) == ("copy", "push", "again")


@pytest.mark.parametrize("text", ["again", "next,copy", "evidence"])
def test_what_goes_on_from_a_push_needs_one(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--small", "--only", text, "--out", str(tmp_path)]) == MatrixError.exit_code
    assert "go on from push" in capsys.readouterr().err


def test_its_help_says_what_every_contender_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--help"])
    assert ended.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens, too
    for key, name in bench.NAMES.items():
        assert f"{key}:{name}".replace(" ", "") in text
    assert "hastohavebeenvalidated" in text


def test_evidence_needs_a_verdict_before_anything_is_measured(
    tmp_path: Path, store: Store, image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Cosign(tmp_path / "cosign", monkeypatch)
    monkeypatch.setenv("TORCHYARD_HOME", str(store.root))
    monkeypatch.setattr(bench, "_image", lambda *_: image)
    out = tmp_path / "out"
    assert bench.main(["--small", "--only", "push,evidence", "--out", str(out)]) == ImpossibleError.exit_code
    said = capsys.readouterr().err
    assert "has no passing verdict, and so there is no evidence to push" in said
    assert "torchyard validate torch2.13.0-cpu-py3.11-bookworm-runtime" in said
    assert not out.exists()


def test_a_cell_that_is_not_built_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path))
    assert bench.main(["--small", "--only", "copy", "--out", str(tmp_path)]) != 0
    assert "is not built" in capsys.readouterr().err


def test_what_a_program_took_is_put_beside_what_the_other_side_counted(tmp_path: Path) -> None:
    with Sink(tmp_path / "sink") as sink:
        with bench._Counted(sink) as counted:
            assert not sink.has("team/app", "1")
        sent = counted.sent("push", Spent(seconds=2.0, cpu_seconds=1.0, peak_bytes=5, out=""), "a command")
    assert (sent.seconds, sent.cpu_seconds, sent.peak_bytes) == ((2.0,), 1.0, 5)
    assert (sent.requests, sent.bytes_received) == ({"HEAD": 1}, 0)
