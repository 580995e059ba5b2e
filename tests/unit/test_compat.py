"""What can exist, what cannot and why, and that everything offered instead can."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from builder.compat import UPDATE_HINT, Answer, Request, check_cell, explain
from builder.errors import MatrixError
from builder.facts import CPU, Coverage, Driver, Facts, Index, Platform, cudnn_number, listed

FACTS = Facts.load()


def ask(torch: str, **rest: Any) -> Answer:
    return explain(FACTS, Request(torch=torch, **rest))


def offered(answer: Answer) -> list[tuple[str, str]]:
    return [(str(one.torch), str(one.cuda)) for one in answer.alternatives]


def driver(text: str) -> Driver:
    return Driver(version=Version(text), text=text)


# --- facts


@pytest.mark.parametrize(
    ("version", "number"),
    [("9.10.2.21", 91002), ("8.9.2.26", 8902), ("8.5.0.96", 8500), ("9.1.0.70", 90100), ("9.26.0.51", 92600)],
)
def test_cudnn_number(version: str, number: int) -> None:
    assert cudnn_number(Version(version)) == number


@pytest.mark.parametrize(
    ("torch", "cuda", "cudnn"),
    [
        ("2.0.1", "11.7", "8.5.0.96"),
        ("2.3.1", "12.1", "8.9.2.26"),
        ("2.7.0", "11.8", "9.1.0.70"),
        ("2.8.0", "12.8", "9.10.2.21"),
        ("2.11.0", "13.0", "9.19.0.56"),
        ("2.15.0", "13.2", "9.26.0.51"),
        ("2.9.1", "12.9", None),
        ("2.8.0", "12.1", None),
    ],
)
def test_stock_cudnn(torch: str, cuda: str, cudnn: str | None) -> None:
    assert FACTS.stock_cudnn(Version(torch), Version(cuda)) == (Version(cudnn) if cudnn else None)


def test_builds_of_a_release() -> None:
    builds = FACTS.builds_of(Version("2.8.0"))
    assert [build.cuda_tag for build in builds] == ["cpu", "cu126", "cu128", "cu129"]
    assert [build.index for build in builds if build.cuda == Version("12.8")] == [Index.DEFAULT]
    assert FACTS.build(Version("2.8"), Version("12.8")) is builds[2]
    assert FACTS.build(Version("2.8.0"), Version("12.1")) is None
    arm = FACTS.builds_of(Version("2.8.0"), Platform.ARM64)
    assert [build.cuda for build in arm] == [CPU]


@pytest.mark.parametrize(("cuda", "floor"), [("11.8", "450.80.02"), ("12.9", "525.60.13"), ("13.2", "580.65.06")])
def test_driver_floor(cuda: str, floor: str) -> None:
    assert str(FACTS.driver_floor(Version(cuda))) == floor


@pytest.mark.parametrize(
    ("given_", "floor", "enough"),
    [
        ("525", "525.60.13", True),
        ("525.60.11", "525.60.13", False),
        ("525.147.05", "525.60.13", True),
        ("570.26", "570.26", True),
        ("570.124.06", "570.26", True),
        ("570", "580.65.06", False),
        ("1000", "580.65.06", True),
    ],
)
def test_drivers_compare_as_versions(given_: str, floor: str, *, enough: bool) -> None:
    assert driver(given_).satisfies(driver(floor)) is enough


@pytest.mark.parametrize(
    ("torch", "cuda", "sm", "coverage"),
    [
        ("2.8.0", "12.8", "7.0", Coverage.CODE),
        ("2.8.0", "12.8", "8.9", Coverage.CODE),  # by code for 8.6
        ("2.8.0", "12.8", "8.7", Coverage.NONE),  # neither 8.0 nor 8.6 runs on Orin …
        ("2.15.0", "13.2", "8.7", Coverage.CODE),  # … before CUDA 13.2
        ("2.8.0", "12.8", "10.3", Coverage.CODE),
        ("2.8.0", "12.8", "12.1", Coverage.CODE),
        ("2.8.0", "12.8", "6.1", Coverage.NONE),
        ("2.8.0", "12.8", "11.0", Coverage.NONE),
        ("2.7.0", "12.8", "12.0", Coverage.CODE),
        ("2.8.0", "12.6", "9.0", Coverage.UNKNOWN),
        ("2.8.0", "12.6", "10.0", Coverage.NONE),  # CUDA 12.6 cannot make it, whatever the list is
        ("2.8.0", "cpu", "9.0", Coverage.NONE),
    ],
)
def test_covers(torch: str, cuda: str, sm: str, coverage: Coverage) -> None:
    build = FACTS.build(Version(torch), CPU if cuda == CPU else Version(cuda))
    assert build is not None
    (gpu,) = (gpu for gpu in FACTS.gpus if gpu.sm == Version(sm))
    assert FACTS.covers(build, gpu) is coverage


@pytest.mark.parametrize(
    ("code", "ptx", "sm", "coverage", "floor"),
    [
        ("8.6", None, "8.0", Coverage.NONE, "525.60.13"),  # never to an earlier minor
        ("8.6", None, "8.9", Coverage.CODE, "525.60.13"),
        ("9.0", None, "10.0", Coverage.NONE, "570.26"),  # never across a major …
        ("9.0", "9.0", "10.0", Coverage.PTX, "575.51.03"),  # … but by PTX, with the toolkit's own driver
        ("9.0", "12.0", "10.0", Coverage.NONE, "570.26"),
    ],
)
def test_code_and_ptx(code: str, ptx: str | None, sm: str, coverage: Coverage, floor: str) -> None:
    build = FACTS.build(Version("2.8.0"), Version("12.9"))
    assert build is not None
    build = replace(build, gpus=(Version(code),), ptx=None if ptx is None else (Version(ptx),))
    (gpu,) = (gpu for gpu in FACTS.gpus if gpu.sm == Version(sm))
    assert FACTS.covers(build, gpu) is coverage
    assert str(FACTS.driver_for(build, gpu)) == floor


def test_listed() -> None:
    assert [listed("abc"), listed("ab"), listed("a"), listed("")] == ["a, b and c", "a and b", "a", "nothing"]


# --- three claims of widely read articles


def test_torch_2_7_with_cudnn_8() -> None:
    answer = ask("2.7.0", cuda="11.8", cudnn="8")
    assert not answer.possible
    (problem,) = answer.problems
    assert "9.1.0.70" in problem.what
    assert "the last torch with cuDNN 8 was 2.3.1" in problem.why
    assert offered(answer) == [("2.3.1", "11.8"), ("2.7.0", "11.8")]
    assert [str(one.cudnn) for one in answer.alternatives] == ["8.7.0.84", "9.1.0.70"]


def test_torch_2_8_with_cuda_12_1_and_cudnn_8_9() -> None:
    answer = ask("2.8", cuda="12.1", cudnn="8.9")
    assert not answer.possible
    never, cudnn = answer.problems
    assert never.what == "torch 2.8.0 was never built for CUDA 12.1"
    assert never.why == "2.8.0 was published for 12.6, 12.8 and 12.9 (cu121 ended with torch 2.5)"
    assert cudnn.what == "torch 2.8.0 carries cuDNN 9 (9.10.2.21), and cuDNN 8.9 cannot replace it"
    assert offered(answer) == [("2.3.1", "12.1"), ("2.8.0", "12.6"), ("2.5.1", "12.1")]


def test_torch_2_9_with_driver_525() -> None:
    answer = ask("2.9", driver="525")
    assert answer.possible
    assert answer.combination is not None
    assert (str(answer.combination.torch), str(answer.combination.cuda)) == ("2.9.1", "12.8")
    assert str(answer.combination.driver) == "525.60.13"
    assert {cuda for _, cuda in offered(answer)} == {"12.6", "12.9"}
    notes = dict(note.split(": ", 1) for note in answer.notes)
    for cuda in ("12.6", "12.8", "12.9"):
        assert notes[f"CUDA {cuda}"].startswith("yes, by minor-version compatibility (driver >= 525.60.13")
    assert notes["CUDA 13.0"] == "no, CUDA 13 needs a driver >= 580.65.06"
    assert notes["not on sm_100 and sm_120 (Blackwell)"] == "a driver >= 570.26 is needed there"


def test_the_text_of_the_design() -> None:
    assert str(ask("2.8.0", cuda="12.1")) == (
        "torch 2.8.0 was never built for CUDA 12.1\n"
        "  why   2.8.0 was published for 12.6, 12.8 and 12.9 (cu121 ended with torch 2.5)\n"
        "  try   torch 2.8.0 + CUDA 12.6 (driver >= 525.60.13) · torch 2.5.1 + CUDA 12.1"
    )


# --- possible


@pytest.mark.parametrize(
    ("request_", "torch", "cuda", "index"),
    [
        ({"torch": "2.8"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "v2.8.0+cu126"}, "2.8.0", "12.6", Index.PYTORCH),
        ({"torch": "2.1"}, "2.1.2", "12.1", Index.DEFAULT),  # 2.1 is not 2.10
        ({"torch": "2"}, "2.15.0", "13.2", Index.DEFAULT),
        ({"torch": "2.8", "cuda": "12"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.8", "cuda": "12.8.1"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.8", "cuda": "cu129"}, "2.8.0", "12.9", Index.PYTORCH),
        ({"torch": "2.8", "cuda": "cpu"}, "2.8.0", "cpu", Index.PYTORCH),
        ({"torch": "2.8", "platform": "aarch64"}, "2.8.0", "cpu", Index.DEFAULT),
        ({"torch": "2.11", "platform": "linux/arm64"}, "2.11.0", "13.0", Index.DEFAULT),
        ({"torch": "2.13", "gpu": "GTX 1080"}, "2.13.0", "12.6", Index.PYTORCH),
        ({"torch": "2.14", "gpu": "V100"}, "2.14.1", "12.6", Index.PYTORCH),
        ({"torch": "2.8", "gpu": "NVIDIA GeForce RTX 5090"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.8", "gpu": "Tesla V100-SXM2-32GB"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.8", "gpu": "hopper"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.12", "driver": "535.104.05"}, "2.12.1", "12.9", Index.PYTORCH),
        ({"torch": "2.13", "python": "3.14t"}, "2.13.0", "13.0", Index.DEFAULT),
        ({"torch": "2.8", "cudnn": "9"}, "2.8.0", "12.8", Index.DEFAULT),
        ({"torch": "2.9", "cuda": "12.9", "cudnn": "9"}, "2.9.1", "12.9", Index.PYTORCH),
        ({"torch": "2.6", "glibc": "2.17"}, "2.6.0", "12.4", Index.DEFAULT),
    ],
)
def test_possible(request_: dict[str, str], torch: str, cuda: str, index: Index) -> None:
    answer = explain(FACTS, Request(**request_))
    assert answer.possible
    assert not answer.problems
    assert answer.combination is not None
    assert (str(answer.combination.torch), str(answer.combination.cuda)) == (torch, cuda)
    assert answer.combination.index is index


def test_an_override_is_named() -> None:
    answer = ask("2.8", cuda="12.8", cudnn="9.15.1.9")
    assert answer.combination is not None
    assert answer.combination.cudnn == Version("9.15.1.9")
    assert answer.notes == ("cuDNN 9.15.1.9 is an override: torch 2.8.0 for CUDA 12.8 pins 9.10.2.21",)


def test_what_is_not_verified_is_said() -> None:
    assert any("not verified" in note for note in ask("2.11", cuda="12.8").notes)
    assert any("never recorded" in note for note in ask("2.8", cuda="12.6", gpu="H100").notes)


# --- impossible


@pytest.mark.parametrize(
    ("request_", "what", "why"),
    [
        ({"torch": "2.99"}, "torch 2.99 is not known", "from 2.0.0 to 2.15.0"),
        ({"torch": "2.8.7"}, "torch 2.8.7 is not known", "from 2.0.0"),
        ({"torch": "1.13"}, "torch 1.13 is older", "begin with torch 2.0.0"),
        ({"torch": "2.8", "cuda": "12.7"}, "CUDA 12.7 does not exist", "12.6 and 12.8"),
        ({"torch": "2.8", "cuda": "14.0"}, "CUDA 14.0 is not known", "13.3"),
        ({"torch": "2.8", "cuda": "10.2"}, "CUDA 10.2 is older", "11.7"),
        ({"torch": "2.6", "cuda": "12.2"}, "never built for CUDA 12.2", "no torch since 2.0.0"),
        ({"torch": "2.6", "cuda": "12.8"}, "never built for CUDA 12.8", "cu128 began with torch 2.7.0"),
        ({"torch": "2.12.0", "cuda": "12.9"}, "never built for CUDA 12.9", "from 2.11.0 to 2.12.1"),
        ({"torch": "2.15", "cuda": "13.0"}, "not known to be published", "torch's own table names CUDA 13.0"),
        ({"torch": "2.8", "cuda": "12.8", "platform": "arm64"}, "not known to be published", "CPU"),
        ({"torch": "2.15.0", "python": "3.10"}, "no build for Python 3.10", "3.11, 3.12"),
        ({"torch": "2.15.0", "python": "3.13t"}, "no build for Python 3.13t", "3.14t"),
        ({"torch": "2.5", "python": "3.13", "platform": "arm64"}, "no build for Python 3.13", "3.12"),
        ({"torch": "2.11", "cuda": "12.8", "gpu": "V100"}, "does not run on sm_70", "sm_75"),
        ({"torch": "2.8", "cuda": "12.6", "gpu": "B200"}, "does not run on sm_100", "came with CUDA 12.8"),
        (
            {"torch": "2.13", "cuda": "13.0", "gpu": "GTX 1080"},
            "does not run on sm_61",
            "CUDA 12.9 was the last",
        ),
        ({"torch": "2.8", "cuda": "cpu", "gpu": "T4"}, "does not run on sm_75", "without CUDA"),
        ({"torch": "2.8", "cuda": "12.8", "cudnn": "9.11", "gpu": "V100"}, "sm_70", "serves sm_75 and newer"),
        ({"torch": "2.9", "cuda": "13.0", "driver": "525"}, "does not run on driver 525", "580.65.06"),
        ({"torch": "2.8", "gpu": "RTX 5090", "driver": "560.35.03"}, "no build", "570.26"),
        ({"torch": "2.8", "cuda": "12.8", "cudnn": "9.8"}, "is older", "earlier minor"),
        ({"torch": "2.8", "cuda": "cpu", "cudnn": "9"}, "has no cuDNN 9", "without CUDA"),
        (
            {"torch": "2.3", "cuda": "12.1", "cudnn": "9.1.0.70"},
            "carries cuDNN 8",
            "first torch with cuDNN 9 was 2.4.0",
        ),
        ({"torch": "2.7", "cuda": "12.6", "glibc": "2.17"}, "needs glibc >= 2.28", "2.28"),
    ],
)
def test_impossible(request_: dict[str, str], what: str, why: str) -> None:
    answer = explain(FACTS, Request(**request_))
    assert not answer.possible
    assert answer.combination is None
    assert what in answer.problems[0].what
    assert why in answer.problems[0].why
    assert answer.problems[-1].tries


def test_an_unknown_release_asks_for_an_update() -> None:
    assert UPDATE_HINT in ask("2.99").problems[0].tries
    assert UPDATE_HINT not in ask("1.13").problems[0].tries


@pytest.mark.parametrize(
    ("request_", "nearest"),
    [
        ({"torch": "2.8", "cuda": "12.1"}, [("2.8.0", "12.6"), ("2.5.1", "12.1")]),
        ({"torch": "2.8", "cuda": "12.7"}, [("2.8.0", "12.6")]),
        ({"torch": "2.11", "cuda": "12.8", "gpu": "V100"}, [("2.11.0", "12.6"), ("2.10.0", "12.8")]),
        ({"torch": "2.15", "python": "3.10"}, [("2.14.1", "13.0")]),
        ({"torch": "2.9", "driver": "470"}, [("2.7.1", "11.8")]),
        ({"torch": "2.99", "cuda": "12.8"}, [("2.11.0", "12.8")]),
        ({"torch": "2.8", "python": "2.7"}, []),
    ],
)
def test_nearest(request_: dict[str, str], nearest: list[tuple[str, str]]) -> None:
    assert offered(explain(FACTS, Request(**request_))) == nearest


# --- bad requests


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        ({"torch": "two"}, "torch 'two' is not a version"),
        ({"torch": ""}, "torch '' is not a version"),
        ({"torch": "2.8", "cuda": "12.x"}, "CUDA '12.x'"),
        ({"torch": "2.8", "cudnn": "9,1"}, "cuDNN '9,1'"),
        ({"torch": "2.8", "driver": "latest"}, "driver 'latest'"),
        ({"torch": "2.8", "python": "3"}, "lacks its minor"),
        ({"torch": "2.8", "platform": "windows"}, "platform 'windows'"),
        ({"torch": "2.8", "glibc": "musl"}, "glibc 'musl'"),
        ({"torch": "2.8", "gpu": "RTX 5099"}, "GPU 'RTX 5099' is not known"),
        ({"torch": "2.8", "gpu": "sm_77"}, "GPU 'sm_77' is not known"),
        ({"torch": "2.8", "gpu": "Blackwell"}, "is not one architecture"),
        ({"torch": "2.8+cu126", "cuda": "12.8"}, "two CUDAs"),
        ({"torch": "\u0662.\u0668"}, "is not a version"),
    ],
)
def test_bad_requests(request_: dict[str, str], what: str) -> None:
    with pytest.raises(MatrixError) as caught:
        explain(FACTS, Request(**request_))
    assert what in caught.value.problems[0].what


def test_all_bad_parts_are_named_at_once() -> None:
    with pytest.raises(MatrixError) as caught:
        ask("x", cuda="y", cudnn="z", driver="d", gpu="g", python="p", platform="q", glibc="l")
    assert len(caught.value.problems) == 8


def test_a_near_name_is_offered() -> None:
    with pytest.raises(MatrixError) as caught:
        ask("2.8", gpu="RTX 5009")
    assert any("50" in hint for hint in caught.value.problems[0].tries)


# --- cells


@pytest.mark.parametrize(
    ("torch", "cuda", "cudnn", "python", "platform", "exists"),
    [
        ("2.8.0", "12.8", "9.10.2.21", "3.11", "linux/amd64", True),
        ("2.8.0", "12.8", None, "3.11", "linux/amd64", True),
        ("2.8.0", "cpu", None, "3.12", "linux/arm64", True),
        ("2.3.1", "12.1", "8.9.2.26", "3.11", "linux/amd64", True),
        ("2.8.0", "12.1", None, "3.11", "linux/amd64", False),
        ("2.8.0", "12.8", "8.9.7.29", "3.11", "linux/amd64", False),
        ("2.8.0", "12.8", None, "3.14", "linux/amd64", False),
        ("2.8.0", "12.8", None, "3.11", "linux/s390x", False),
        ("2.16.0", "13.2", None, "3.11", "linux/amd64", False),
    ],
)
def test_check_cell(torch: str, cuda: str, cudnn: str | None, python: str, platform: str, *, exists: bool) -> None:
    problems = check_cell(
        FACTS,
        torch=Version(torch),
        cuda=CPU if cuda == CPU else Version(cuda),
        cudnn=cudnn and Version(cudnn),
        python=python,
        platform=platform,
    )
    assert (not problems) is exists


# --- properties

TORCHES = st.sampled_from([str(release.torch) for release in FACTS.releases] + ["2", "2.8", "2.99", "2.8.5", "1.9"])
CUDAS = st.sampled_from([str(row.version) for row in FACTS.toolkits] + ["cpu", "12", "11", "13.9", "9.0"])
CUDNNS = st.sampled_from(["7", "8", "8.9", "8.9.2.26", "9", "9.1", "9.1.0.70", "9.10.2.21", "9.19", "9.99", "10"])
DRIVERS = st.sampled_from(["390", "450.80.02", "470", "525", "525.60.13", "550.54.14", "570", "570.26", "580", "610"])
GPUS = st.sampled_from([gpu.tag for gpu in FACTS.gpus])
PYTHONS = st.sampled_from(["2.7", "3.8", "3.9", "3.11", "3.13", "3.13t", "3.14t", "3.15"])
GLIBCS = st.sampled_from(["2.17", "2.27", "2.28", "2.36"])
MAYBE = {
    "cuda": st.none() | CUDAS,
    "cudnn": st.none() | CUDNNS,
    "driver": st.none() | DRIVERS,
    "gpu": st.none() | GPUS,
    "python": st.none() | PYTHONS,
    "glibc": st.none() | GLIBCS,
}
REQUESTS = st.builds(Request, torch=TORCHES, platform=st.sampled_from([str(one) for one in Platform]), **MAYBE)


@given(request=REQUESTS)
def test_everything_offered_can_exist(request: Request) -> None:
    answer = explain(FACTS, request)
    assert answer.possible is (not answer.problems) is (answer.combination is not None)
    assert len(answer.alternatives) <= 3
    for one in (*answer.alternatives, *([answer.combination] if answer.combination else [])):
        again = explain(
            FACTS,
            Request(
                torch=str(one.torch),
                cuda=str(one.cuda),
                cudnn=None if one.cudnn is None else str(one.cudnn),
                driver=request.driver,
                gpu=request.gpu,
                python=request.python,
                platform=request.platform,
                glibc=request.glibc,
            ),
        )
        assert again.possible, (request, one, again.problems)
        assert again.combination is not None
        assert (again.combination.torch, again.combination.cuda) == (one.torch, one.cuda)


TEXT = st.text(max_size=60) | st.from_regex(r"[0-9a-z_.+ ]{0,12}", fullmatch=True) | TORCHES | CUDAS | GPUS


@given(
    request=st.builds(
        Request,
        torch=TEXT,
        platform=TEXT | st.just("linux/amd64"),
        **{key: st.none() | TEXT for key in MAYBE},
    )
)
def test_only_typed_errors_come_out(request: Request) -> None:
    try:
        answer = explain(FACTS, request)
    except MatrixError as error:
        assert all(problem.what for problem in error.problems)  # noqa: PT017 - either outcome is right
    else:
        assert str(answer)
