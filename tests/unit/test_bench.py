"""The bench's own arithmetic and its renderings; what it measures is not tested, and slow is no failure."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from packaging.version import Version

from bench import __main__ as bench
from bench import command, containers, floor, report
from bench.peers import PEERS
from bench.process import shown, timed
from bench.results import Entry, Results, dumps, loads, pulled, ratio
from builder.errors import CellFailedError, EngineError, MatrixError, ToolError, WheelError
from builder.layout import MEDIA_LAYER_GZIP, Descriptor
from builder.matrix import Cell
from builder.project import Project
from tests.support.wheels import wheel

ROOT = Path(__file__).parents[2]

RECORDED = Results(
    started="2026-11-21 10:00 UTC",
    cell="torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
    neighbour="torch2.9.1-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime",
    repeat=3,
    wheels=27,
    wheel_bytes=3_935_798_714,
    matrix_wheel_bytes=(10_000_000_000, 25_000_000_000),
    machine={"processor": "a processor", "cores": "2", "memory": "25.3 GB"},
    tools={"torchyard": "0.1.0 (abc1234)"},
    files={"a": PEERS["a"].dockerfile},
    entries=(
        Entry(key="floor", name="floor", seconds=(14.0, 16.0, 12.0)),
        Entry(key="a", name="BuildKit + pip", seconds=(350.0, 999.0, 340.0), image_bytes=4_140_000_000,
              first_run_seconds=4.0, import_cold_seconds=9.0, import_warm_seconds=(2.5, 2.4, 2.6, 2.4, 9.0),
              upgrade_bytes=4_000_000_000, pip="23.0.1", commands=("docker buildx build $WORK",)),
        Entry(key="c", name="BuildKit + uv, zstd 1 archive", seconds=(200.0, 210.0, 190.0), load_seconds=112.0,
              first_run_seconds=6.0),
        Entry(key="d", name="torchyard", seconds=(17.5, 16.0, 19.0), floor_seconds=14.0, image_bytes=3_910_000_000,
              load_seconds=100.0, first_run_seconds=4.0, peak_bytes=300_000_000, state_bytes=39_357_987),
        Entry(key="d2", name="torchyard, the same cell again", seconds=(0.6,)),
        Entry(key="d3", name="torchyard, then 2.9.1", seconds=(5.0,), wheel_bytes=900_000_000, floor_seconds=4.0),
        Entry(key="d4", name="torchyard, all 7 cells", seconds=(55.0,), wheel_bytes=10_000_000_000, floor_seconds=40.0),
    ),
)  # fmt: skip


# --------------------------------------------------------------------------- arithmetic


def test_of_several_runs_the_median_counts() -> None:
    found = RECORDED.entry("a")
    assert found is not None
    assert found.median == 350.0  # one run that another program disturbed does not move it
    assert found.import_warm == 2.5


def test_an_archive_has_to_be_loaded_before_torch_can_be_imported() -> None:
    archive, direct = RECORDED.entry("c"), RECORDED.entry("a")
    assert archive is not None
    assert direct is not None
    assert archive.to_import == 200.0 + 112.0 + 6.0
    assert direct.to_import == 350.0 + 4.0
    assert replace(direct, first_run_seconds=None).to_import is None


def test_ratios_of_what_is_not_known_are_not_known() -> None:
    assert ratio(6.0, 4.0) == 1.5
    assert ratio(None, 4.0) is None
    assert ratio(6.0, None) is None
    assert ratio(6.0, 0.0) is None


def test_the_matrix_pays_once_per_wheel_if_it_is_as_far_above_its_floor_as_one_cell() -> None:
    assert RECORDED.once == pytest.approx((55 / 40) / (17.5 / 14))
    assert replace(RECORDED, entries=RECORDED.entries[:-1]).once is None


def layer(content: str, size: int) -> Descriptor:
    return Descriptor(
        media_type=MEDIA_LAYER_GZIP, digest=f"sha256:{hashlib.sha256(content.encode()).hexdigest()}", size=size
    )


def test_a_node_pulls_the_layers_it_lacks_each_once() -> None:
    have = [layer("base", 100), layer("nvidia", 3000), layer("torch 2.8", 800)]
    want = [layer("base", 100), layer("nvidia", 3000), layer("torch 2.9", 900), layer("empty", 1), layer("empty", 1)]
    assert pulled(have, want) == 901
    assert pulled(want, have) == 800
    assert pulled(have, have) == 0


# --------------------------------------------------------------------------- reading archives


def archive(*, attested: bool, platform: str = "linux") -> io.BytesIO:
    """Make an OCI archive such as BuildKit writes: with an attestation its manifest is behind a second index."""
    blobs: dict[str, bytes] = {}

    def put(document: object) -> dict[str, object]:
        content = json.dumps(document).encode()
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": "application/json", "digest": f"sha256:{digest}", "size": len(content)}

    layers = [layer("base", 100).as_json(), layer("wheels", 5000).as_json()]
    entry = put({"config": put({"os": "linux"}), "layers": layers}) | {"platform": {"os": platform}}
    if attested:
        statement = put({"config": put({}), "layers": [layer("statement", 7).as_json()]})
        entry = put({"manifests": [statement | {"platform": {"os": "unknown"}}, entry]})
    blobs["index.json"] = json.dumps({"manifests": [entry]}).encode()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for name, content in blobs.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    file.seek(0)
    return file


@pytest.mark.parametrize("attested", [False, True])
def test_an_archives_image_is_found_and_its_attestation_is_not_taken_for_it(*, attested: bool) -> None:
    found = containers.in_archive(archive(attested=attested))
    assert [blob.size for blob in found.layers] == [100, 5000]
    documents = found.size - 5100
    assert 0 < documents < 1000


@pytest.mark.parametrize("content", [b"", b"not a tar", archive(attested=True, platform="unknown").getvalue()])
def test_what_is_no_archive_of_an_image_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="no OCI archive"):
        containers.in_archive(io.BytesIO(content))


# --------------------------------------------------------------------------- the floor


def straightforward(path: Path) -> tuple[str, str, int]:
    """Hash a wheel's members as they are stored, cut out by their headers' own words, and as Python unpacks them."""
    stored, content, size = hashlib.sha256(), hashlib.sha256(), 0
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as members:
        for member in members.infolist():
            start = raw.index(member.filename.encode(), member.header_offset) + len(member.filename.encode())
            stored.update(raw[start : start + member.compress_size])
            content.update(members.read(member))
            size += member.file_size
    return stored.hexdigest(), content.hexdigest(), size


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_the_floor_hashes_what_is_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: int
) -> None:
    monkeypatch.setattr(floor, "CHUNK", 1000)  # so that a small file comes in several pieces as a large one does
    noise = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(700))
    files = {"tiny/__init__.py": b"x = 1\n", "tiny/empty": b"", "tiny/big.bin": noise, "tiny/zeros": bytes(300_000)}
    path = wheel("tiny", "1.0", files=files, compression=compression).write(tmp_path)
    found = floor.hashed(path)
    assert (found.stored, found.content, found.content_bytes) == straightforward(path)
    assert found.content_bytes > 300_000 + len(noise)


def test_the_floor_gives_each_wheel_its_own_hashes_in_the_order_asked(tmp_path: Path) -> None:
    paths = [wheel("small", "1.0").write(tmp_path), wheel("large", "1.0", files={"a": bytes(9999)}).write(tmp_path)]
    found = floor.measure(paths)
    assert [(one.stored, one.content, one.content_bytes) for one in found.wheels] == [*map(straightforward, paths)]
    assert found.seconds > 0


def test_the_floor_refuses_a_wheel_whose_directory_lies(tmp_path: Path) -> None:
    path = wheel("tiny", "1.0", files={"tiny.py": b"x = 1\n"}).write(tmp_path)
    raw = path.read_bytes()
    at = raw.index(b"PK\x01\x02") + 24  # of the first member in the directory: its size
    path.write_bytes(raw[:at] + (7).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(WheelError, match=r"tiny\.py: 6 bytes came out, 7 are announced"):
        floor.hashed(path)


# --------------------------------------------------------------------------- renderings


def test_results_survive_their_json() -> None:
    text = dumps(RECORDED)
    assert loads(text) == RECORDED
    shown = {entry["key"]: entry["derived"] for entry in json.loads(text)["entries"]}
    assert shown["d"]["times_floor"] == 1.25
    assert shown["c"]["seconds_to_import"] == 318.0


@pytest.mark.parametrize("text", ["", "[]", '{"cell": 3}', dumps(replace(RECORDED, schema=99))])
def test_what_are_no_results_is_refused(text: str) -> None:
    with pytest.raises(MatrixError):
        loads(text, where="results.json")


def test_the_table_compares_everyone_with_torchyard_and_with_the_floor() -> None:
    text = report.markdown(RECORDED)
    lines = {cells[1]: cells for line in text.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 6}
    assert lines["BuildKit + pip"][2:8] == ["350 s", "20×", "25×", "4.14 GB", "354 s", "9.0 s"]  # noqa: RUF001
    assert lines["torchyard"][2:5] == ["17.5 s", "", "1.2×"]  # noqa: RUF001
    assert lines["torchyard, then 2.9.1"][2:6] == ["0.90 GB", "5.0 s", "4.0 s", "1.2×"]  # noqa: RUF001
    assert "39.4 MB beyond the wheels and the base: 1.00% of the wheels" in text
    assert "pays 1.10 times per wheel" in text
    assert "would give 2.50" in text
    assert "docker buildx build $WORK" in text
    assert "pip install --no-index" in text
    assert "| pip | 23.0.1 |" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", report.markdown(RECORDED), re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_a_failure_is_told_first_and_makes_the_run_fail() -> None:
    wrong = Entry(key="b", name="BuildKit + uv", failure="the image has torch 2.7.0, the cell declares 2.8.0")
    results = replace(RECORDED, entries=(*RECORDED.entries, wrong))
    assert results.failed
    assert not RECORDED.failed
    text = report.markdown(results)
    assert text.index("the image has torch 2.7.0") < text.index("| contender")
    assert results.entry("b") is None  # and it is in no comparison


def test_the_plot_shows_each_contender_once_in_each_panel_the_fastest_first() -> None:
    assert [bar.name for bar in report.image_bars(RECORDED)] == [
        "floor", "torchyard", "BuildKit + uv, zstd 1 archive", "BuildKit + pip",
    ]  # fmt: skip
    imports = report.import_bars(RECORDED)
    assert [round(bar.length) for bar in imports] == [122, 318, 354]
    assert [len([part for part, _ in bar.parts if part]) for bar in imports] == [3, 3, 2]


def test_the_plot_is_an_svg_with_every_name_time_and_ratio_and_always_the_same() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is a dependency of development only")
    text = report.svg(RECORDED)
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    words = set(re.findall(r"<!-- (.*?) -->", text))  # text is drawn as outlines, and stands beside them as a comment
    expected = {RECORDED.cell, "torchyard", "BuildKit + pip", "350 s", "17.5 s", "1.2× the floor", "20× torchyard"}  # noqa: RUF001
    assert expected <= words
    assert text == report.svg(RECORDED)


def test_a_run_with_one_contender_has_a_plot_as_well() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is a dependency of development only")
    assert "14.0 s" in report.svg(replace(RECORDED, entries=RECORDED.entries[:1]))
    ET.fromstring(report.svg(replace(RECORDED, entries=())))


# --------------------------------------------------------------------------- what is run


@pytest.fixture
def plotting() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is a dependency of development only")


def test_the_default_cell_is_stock_and_small_means_the_cpu() -> None:
    cells = Project(ROOT / "matrix.yaml").cells
    assert command.chosen(cells, small=False).cudnn_is_stock
    assert command.chosen(cells, small=False).id.startswith(command.CELL.removesuffix("*"))
    assert command.chosen(cells, small=True).cuda == "cpu"
    with pytest.raises(MatrixError, match="CPU cell"):
        command.chosen([cell for cell in cells if cell.cuda != "cpu"], small=True)


def test_the_neighbour_has_the_next_torch_and_all_else_alike() -> None:
    cells = Project(ROOT / "matrix.yaml").cells
    cell = command.chosen(cells, small=False)

    def like(torch: str, **changes: Any) -> Cell:
        return replace(cell, torch=Version(torch), **changes)

    later, latest = like("90.1"), like("90.2")
    others = [like("90.0", cuda="99.0"), like("90.0", base_name="other"), like("90.0", cudnn_is_stock=False)]
    family = [latest, *others, later, cell, like("0.1")]
    assert command.neighbour_of(cell, family) is later
    assert command.neighbour_of(later, family) is latest
    assert command.neighbour_of(latest, family) is None


@pytest.mark.parametrize("arguments", [["--only", "x"], ["--only", ","], ["--repeat", "many"]])
def test_a_wrong_option_is_a_matter_of_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "d2"], "go on from d"),
        (["torch2.8.0-cu128-*", "--neighbour", "torch2.8.0-cu128-*"], "not its own neighbour"),
        (["--repeat", "0"], "at least 1"),
        (["no-such-cell"], "no-such-cell"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    plotting: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    assert bench.main([*arguments, "--out", str(tmp_path / "out")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wheels_that_are_not_there_are_not_fetched(
    plotting: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    assert bench.main(["--small", "--only", "floor", "--out", str(tmp_path / "out")]) == 7
    assert "torchyard fetch" in capsys.readouterr().err


def test_without_matplotlib_it_does_not_even_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert bench.main(["--small", "--out", str(tmp_path / "out")]) == 10
    assert "matplotlib" in capsys.readouterr().err


def test_recorded_results_are_rendered_again_without_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is a dependency of development only")
    (tmp_path / "old.json").write_text(dumps(RECORDED), "utf-8")
    assert bench.main(["--render", str(tmp_path / "old.json"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "results.md", "results.svg"]
    assert loads((tmp_path / "out" / "results.json").read_text("utf-8")) == RECORDED


# --------------------------------------------------------------------------- measured programs


def test_a_program_is_measured_with_all_it_starts(tmp_path: Path) -> None:
    eats = "import time; held = bytearray(80_000_000); time.sleep(1)"
    script = (
        "import subprocess, sys; "
        f"two = [subprocess.Popen([sys.executable, '-c', {eats!r}]) for _ in range(2)]; "
        "[one.wait() for one in two]; print('done')"
    )
    spent = timed([sys.executable, "-c", script], what="eat")
    assert spent.out == "done\n"
    assert spent.seconds >= 1
    assert spent.cpu_seconds > 0
    assert spent.peak_bytes > 160_000_000  # of both at once; each alone holds 90


def test_a_program_that_fails_or_is_missing_is_told_with_its_own_words() -> None:
    with pytest.raises(CellFailedError) as failed:
        timed([sys.executable, "-c", "import sys; sys.exit('no space in here')"], what="try")
    assert failed.value.problems[0].why == "no space in here"
    with pytest.raises(ToolError, match="no-such-program"):
        timed(["no-such-program"], what="try")


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a zombie only waits to be noticed
    except FileNotFoundError:
        return False


def test_interrupted_it_ends_the_program_and_what_that_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    # A background job of a shell does not listen to the interrupt.
    script = f"sleep 600 & echo $! > {child}.new; mv {child}.new {child}; wait"
    program = f"from bench.process import timed; timed(['sh', '-c', {script!r}], what='wait')"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not child.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while runs(child.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child.read_text().strip())


def test_commands_are_shown_without_this_machines_directories() -> None:
    places = {Path("/srv/store"): "$STORE", Path("/srv/store/work/bench"): "$WORK"}
    assert shown(["build", "/srv/store/work/bench/context", "a b"], places=places) == "build $WORK/context 'a b'"
