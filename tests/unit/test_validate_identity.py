"""What is declared, compiled in, loaded, installed and required: judged with good numbers and with bad ones."""

import hashlib
import shutil
import struct
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder import proof
from builder.render import Expectation
from validate import installed
from validate.check import Probe, Request
from validate.checks import identity
from validate.installed import Installed, Recorded
from validate.verdict import Finding, Status

EXPECTED = Expectation(
    torch="2.8.0+cu128",
    cuda="12.8",
    cudnn="9.10.2.21",
    cudnn_number=91002,
    nccl="2.27.3",
    python="3.11",
    architectures=("sm_90", "sm_75"),
    packages={"torch": "2.8.0", "numpy": "2.4.6"},
)
SEEN: Mapping[str, Any] = {
    "facts": {
        "torch": "2.8.0+cu128",
        "cuda": "12.8",
        "cudnn_number": 91002,
        "nccl": "2.27.3",
        "python": "3.11",
        "architectures": ["sm_75", "sm_90"],
        "packages": {"torch": "2.8.0", "numpy": "2.4.6"},
    },
    "errors": {},
}


def a_probe(declared: Mapping[str, Any] | None = None) -> Probe:
    return Probe(Request(declared=declared), lambda document: None)


def said(probe: Probe) -> Sequence[tuple[Status, str, str]]:
    return [(finding.status, finding.what, finding.mode) for finding in probe.findings]


def only(probe: Probe) -> Finding:
    (finding,) = probe.findings
    return finding


def one(name: str, version: str = "1.0", *requires: str, root: str = "/site") -> Installed:
    return Installed(name, version, root, requires)


def table(*everything: Installed) -> dict[str, Installed]:
    return installed.first_of_each(everything)


# ----------------------------------------------------------------------------------------------------
# What was declared


def seen_but(**facts: Any) -> Mapping[str, Any]:
    return {"facts": {**SEEN["facts"], **facts}, "errors": {}}


@pytest.mark.parametrize(
    "seen",
    [
        SEEN,
        seen_but(cuda=None),
        seen_but(nccl="2.26.2"),
        seen_but(cudnn_number=91600),
        seen_but(architectures=["sm_75"]),
        seen_but(python="3.12"),
        seen_but(packages={"torch": "2.8.0", "numpy": "1.26.4"}),
        seen_but(packages={"torch": "2.8.0"}),
        seen_but(packages={"torch": "2.8.0", "numpy": "2.3.1 and 2.4.6"}),
        {"facts": {"python": "3.11", "packages": {}}, "errors": {"torch": "ImportError: no"}},
        {"facts": {}, "errors": {}},
    ],
)
def test_it_complains_whenever_a_proof_does(seen: Mapping[str, Any]) -> None:
    probe = a_probe()
    expected = {**vars(EXPECTED), "architectures": list(EXPECTED.architectures)}
    identity.judge_declared(probe, expected, seen)
    plan: Any = SimpleNamespace(expectation=EXPECTED)
    assert bool(probe.findings) == bool(list(proof.differences(plan, seen)))
    assert all(finding.status is Status.FAIL for finding in probe.findings)


def test_the_same_facts_are_compared_as_in_a_proof() -> None:
    assert identity._WHAT == proof._WHAT


def test_what_was_installed_on_top_is_a_warning() -> None:
    probe = a_probe()
    packages = {**SEEN["facts"]["packages"], **{f"extra{number:02}": "1" for number in range(30)}}
    identity.judge_declared(probe, vars(EXPECTED), seen_but(packages=packages))
    assert said(probe) == [(Status.WARN, "30 packages besides the locked ones", "")]
    assert only(probe).why.endswith("extra19 1, …")


def test_a_cpu_torch_in_a_cuda_image_is_recognised() -> None:
    probe = a_probe()
    identity.judge_declared(probe, vars(EXPECTED), seen_but(cuda=None))
    assert said(probe) == [(Status.FAIL, "torch.version.cuda is none", "F19")]


def test_one_cause_is_told_once() -> None:
    probe = a_probe()
    identity._unknown(probe, {"a": "broken", "b": "broken", "c": "undefined symbol: ncclCommResume"})
    assert [finding.what for finding in probe.findings] == ["a, b could not be found out", "c could not be found out"]


# ----------------------------------------------------------------------------------------------------
# Compiled with = loaded = installed


@pytest.mark.parametrize(
    ("compiled", "loaded", "package", "modes"),
    [
        ((9, 8, 0), (9, 10, 2), "9.10.2.21", []),
        ((9, 8, 0), (9, 8, 0), None, []),
        ((9, 8, 0), (9, 7, 9), "9.7.9.1", ["F04"]),
        ((8, 9, 2), (9, 10, 2), "9.10.2.21", ["F04"]),
        ((9, 8, 0), (9, 23, 0), "9.20.0.48", ["F03"]),
        ((9, 8, 0), (9, 1, 0), "9.10.2.21", ["F04", "F03"]),
    ],
)
def test_cudnn(compiled: tuple[int, ...], loaded: tuple[int, ...], package: str | None, modes: list[str]) -> None:
    probe = a_probe()
    identity.judge_cudnn(probe, compiled, loaded, package)
    assert [finding.mode for finding in probe.findings] == modes


@pytest.mark.parametrize(
    ("compiled", "loaded", "package", "count"),
    [
        ((2, 27, 3), (2, 27, 3), "2.27.3", 0),
        ((2, 27, 3), (2, 30, 7), "2.30.7", 0),
        ((2, 27, 3), (2, 26, 2), "2.26.2", 1),
        ((2, 27, 3), (2, 26, 2), "2.27.3", 2),
        ((2, 27, 3), (2, 29, 7), "2.27.3", 1),
        ((2, 27, 3), (2, 27, 3), None, 0),
        ((2, 27, 3), None, "2.27.3", 0),
    ],
)
def test_nccl(compiled: tuple[int, ...], loaded: tuple[int, ...] | None, package: str | None, count: int) -> None:
    probe = a_probe()
    identity.judge_nccl(probe, compiled, loaded, package)
    assert len(probe.findings) == count
    assert {finding.mode for finding in probe.findings} <= {"F01"}


@pytest.mark.parametrize(
    ("compiled", "loaded", "good"),
    [("12.8", (12, 8), True), ("12.8", (12, 9), True), ("12.8", (12, 6), False), ("12.8", (13, 0), False)],
)
def test_the_cuda_runtime(compiled: str, loaded: tuple[int, ...], good: bool) -> None:  # noqa: FBT001
    probe = a_probe()
    identity.judge_runtime(probe, compiled, loaded)
    assert bool(probe.findings) is not good


@pytest.mark.parametrize(
    ("function", "number", "version"),
    [
        ("ncclGetVersion", 22703, (2, 27, 3)),
        ("ncclGetVersion", 2708, (2, 7, 8)),
        ("cudaRuntimeGetVersion", 12080, (12, 8)),
        ("cudaRuntimeGetVersion", 13020, (13, 2)),
    ],
)
def test_versions_as_numbers(function: str, number: int, version: tuple[int, ...]) -> None:
    assert identity._decoded(function, number) == version


def test_a_loaded_library_is_asked(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    source = tmp_path / "a.c"
    source.write_text(
        "int good(int *n) { *n = 22703; return 0; } int bad(int *n) { return 3; }"
        "int nvrtcVersion(int *major, int *minor) { *major = 12; *minor = 8; return 0; }"
    )
    library = str(tmp_path / "liba.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    probe = a_probe()
    assert identity._ask(probe, library, "good") == (2, 27, 3)
    assert not probe.findings
    assert identity._ask(probe, library, "bad") is None
    assert identity._ask(probe, library, "absent") is None
    assert [finding.what for finding in probe.findings] == [
        "liba.so does not tell its version",
        "liba.so cannot be asked for its version",
    ]
    assert identity._nvrtc_version(library) == (12, 8)
    assert identity._nvrtc_version(str(source)) is None
    assert library in identity.mapped()


def test_nvrtc_needs_the_builtins_of_its_minor_version() -> None:
    probe = a_probe()
    identity.judge_nvrtc(probe, "/l/libnvrtc.so.12", (12, 8), {"libnvrtc.so.12", "libnvrtc-builtins.so.12.8"})
    assert not probe.findings
    identity.judge_nvrtc(probe, "/l/libnvrtc.so.12", (12, 8), {"libnvrtc-builtins.so.12.6"})
    identity.judge_nvrtc(probe, "/l/libnvrtc.so.12", None, set())
    assert [finding.mode for finding in probe.findings] == ["F07", "F07"]


def test_other_cudnns_that_do_no_harm(tmp_path: Path) -> None:
    for place in ("own", "system", "same"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "libcudnn.so.9").write_bytes(b"x")
        (tmp_path / place / "libcudnn_ops.so.9").write_bytes(b"another" if place == "system" else b"x")
    (tmp_path / "link").symlink_to("own")
    probe = a_probe()
    elsewhere = [
        ("the loader's cache", f"{tmp_path}/system/libcudnn_ops.so.9"),
        ("LD_LIBRARY_PATH", f"{tmp_path}/same/libcudnn_ops.so.9"),
        ("LD_LIBRARY_PATH", f"{tmp_path}/link/libcudnn_ops.so.9"),
    ]
    identity.judge_search(probe, f"{tmp_path}/own/libcudnn.so.9", elsewhere)
    assert not probe.findings
    elsewhere = [
        ("LD_LIBRARY_PATH", f"{tmp_path}/system/libcudnn_ops.so.9"),
        ("the loader's cache", f"{tmp_path}/system/libcudnn_engines_tensor_ir.so.9"),
    ]
    identity.judge_search(probe, f"{tmp_path}/own/libcudnn.so.9", elsewhere)
    assert [finding.mode for finding in probe.findings] == ["F03", "F04"]


def test_the_loaders_cache_is_read() -> None:
    texts = b"libcudnn.so.9\0/usr/lib/libcudnn.so.9\0"
    start = 48 + 24
    entry = struct.pack("=iIIIQ", 0x303, start, start + 14, 0, 0)
    cache = b"glibc-ld.so.cache1.1" + struct.pack("=II", 1, len(texts)) + b"\0" * 20 + entry + texts
    found = {"libcudnn.so.9": "/usr/lib/libcudnn.so.9"}
    assert identity.loader_cache(cache) == found
    # The older format may stand before it.
    assert identity.loader_cache(b"ld.so-1.7.0" + b"\0" * 37 + cache) == found
    assert identity.loader_cache(cache[:60]) == {}
    assert identity.loader_cache(b"something else") == {}


def test_this_machines_cache_agrees_with_ldconfig() -> None:
    ldconfig = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin")
    cache = Path("/etc/ld.so.cache")
    if ldconfig is None or not cache.exists():
        pytest.skip("no ldconfig here")
    listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    found = identity.loader_cache(cache.read_bytes())
    assert found
    assert all(f"\t{name} " in listed and f"=> {path}\n" in listed for name, path in found.items())


OWN = "/site/nvidia"
CLOSURE = {"torch", "nvidia-nccl-cu13", "nvidia-cublas"}


def claims(*pairs: tuple[str, str]) -> dict[str, list[tuple[Installed, Recorded]]]:
    return {path: [(one(name), Recorded("sha256=a", 1))] for path, name in pairs}


def test_files_from_torchs_own_wheels_are_good() -> None:
    probe = a_probe()
    paths = [
        f"{OWN}/nccl/lib/libnccl.so.2",
        f"{OWN}/cu13/lib/libcublas.so.13",
        "/usr/lib/libc.so.6",
        "/usr/lib/libcuda.so.1",
    ]
    owners = claims((paths[0], "nvidia-nccl-cu13"), (paths[1], "nvidia-cublas"))
    identity.judge_files(probe, paths, owners, CLOSURE)
    assert not probe.findings


@pytest.mark.parametrize(
    ("path", "owner", "mode"),
    [
        ("/usr/lib/libnccl.so.2", None, "F02"),
        ("/usr/lib/libcudnn_ops.so.9", None, "F03"),
        ("/usr/lib/libnvJitLink.so.12", None, "F05"),
        ("/usr/local/cuda/lib64/libcufft.so.12", None, "F04"),
        (f"{OWN}/cusparse/lib/libcusparse.so.12", "nvidia-cusparse-cu12", "F10"),
    ],
)
def test_files_from_elsewhere(path: str, owner: str | None, mode: str) -> None:
    owners = claims((path, owner)) if owner else {}
    probe = a_probe()
    identity.judge_files(probe, [path], owners, CLOSURE)
    assert [finding.mode for finding in probe.findings] == [mode]
    # A torch that uses the system's CUDA on purpose requires none of NVIDIA's wheels.
    probe = a_probe()
    identity.judge_files(probe, [path], owners, {"torch", "sympy"})
    identity.judge_files(probe, [path], owners, None)
    assert not probe.findings


def test_one_soname_from_two_files() -> None:
    probe = a_probe()
    identity.judge_files(probe, ["/a/libnccl.so.2", "/b/libnccl.so.2.27.3"], {}, None)
    identity.judge_files(probe, ["/a/libz.so.1", "/b/libz.so.1.3"], {}, None)
    # Not one soname: another major version, another library, modules of two packages.
    identity.judge_files(
        probe, ["/a/libffi.so.7", "/b/libffi.so.8", "/a/_c.so", "/b/_c.so", "/a/libffix.so.8"], {}, None
    )
    assert said(probe) == [
        (Status.FAIL, "libnccl.so.2 is loaded from 2 files", "F02"),
        (Status.WARN, "libz.so.1 is loaded from 2 files", ""),
    ]


def test_cublas_from_two_places() -> None:
    probe = a_probe()
    identity.judge_files(probe, ["/a/libcublas.so.12", "/a/libcublasLt.so.12"], {}, None)
    assert not probe.findings
    identity.judge_files(probe, ["/a/libcublas.so.12", "/usr/lib/libcublasLt.so.12"], {}, None)
    assert only(probe).mode == "F06"


def test_openmp() -> None:
    probe = a_probe()
    identity.judge_openmp(probe, ["/t/libgomp.so.1"], threads=8, cpus=8, asked=False)
    identity.judge_openmp(probe, ["/t/libgomp.so.1"], threads=1, cpus=1, asked=False)
    identity.judge_openmp(probe, ["/t/libgomp.so.1"], threads=1, cpus=8, asked=True)
    assert not probe.findings
    identity.judge_openmp(probe, ["/t/libgomp-24e2ab19.so.1.0.0", "/s/libgomp.so.1"], threads=1, cpus=8, asked=False)
    assert said(probe) == [
        (Status.WARN, "2 OpenMP runtimes are loaded by torch", "F23"),
        (Status.WARN, "torch computes on one of 8 cores", "F23"),
    ]


def test_the_torch_that_is_imported() -> None:
    probe = a_probe()
    identity.judge_torch(probe, "2.8.0+cu128", one("torch", "2.8.0"))
    identity.judge_torch(probe, "2.13.0+cpu", one("torch", "2.13.0+cpu"))
    assert not probe.findings
    identity.judge_torch(probe, "2.6.0+cu124", one("torch", "2.8.0"))
    identity.judge_torch(probe, "2.6.0+cu124", None)
    assert [(finding.status, finding.mode) for finding in probe.findings] == [
        (Status.FAIL, "F20"),
        (Status.WARN, "F20"),
    ]


# ----------------------------------------------------------------------------------------------------
# What is installed and required


def reader() -> installed.ReadRequirement:
    read = installed.requirement_reader()
    assert read is not None
    return read


TOOLKIT = "cuda-toolkit[cublas,cudart]==13.0.2"


def test_a_closure_with_extras() -> None:
    everything = table(
        one("torch", "2.12.1", f"{TOOLKIT}; platform_system == 'Linux'", "colorama; platform_system == 'Windows'"),
        one(
            "cuda-toolkit",
            "13.0.2",
            'nvidia-cublas==13.1.1.3.*; extra == "cublas"',
            'nvidia-cuda-runtime; extra == "cudart"',
            'nvidia-cufft; extra == "cufft"',
        ),
        one("nvidia-cublas", "13.1.1.3"),
        one("nvidia-cuda-runtime", "13.0.96", "NVIDIA_cublas", "torch"),
        one("numpy"),
    )
    found = installed.closure(["torch", "torchaudio"], everything, reader())
    assert found.names == {"torch", "cuda-toolkit", "nvidia-cublas", "nvidia-cuda-runtime"}
    assert found.broken == ()
    worse = {**everything, "nvidia-cublas": one("nvidia-cublas", "13.4.1.3")}
    (edge,) = installed.closure(["torch"], worse, reader()).broken
    assert edge.path == ("torch 2.12.1", TOOLKIT)
    assert (edge.name, edge.requirement, edge.found) == ("nvidia-cublas", "nvidia-cublas==13.1.1.3.*", "13.4.1.3")
    del worse["nvidia-cublas"]
    gone = installed.closure(["torch"], worse, reader()).broken
    assert {(edge.name, edge.found) for edge in gone} == {("nvidia-cublas", None)}


def test_requirements_as_they_are_met() -> None:
    met = table(one("torch", "2.8.0+cu128", "b>=1"), one("b", "2.0rc1", "torch==2.8.0"))
    assert installed.closure(["torch"], met, reader()).broken == ()


def test_what_cannot_be_read_is_told() -> None:
    everything = table(one("torch", "1.0", "this is no requirement", "a>=1"), one("a", "not a version"))
    probe = a_probe()
    found = installed.closure(["torch"], everything, reader())
    identity.judge_closure(probe, found, None)
    assert found.names == {"torch"} or found.names == {"torch", "a"}
    assert len(found.unreadable) + len(found.broken) == 2
    assert probe.findings


def test_a_cudnn_chosen_by_the_image_is_no_fault() -> None:
    cudnn = "nvidia-cudnn-cu12"
    everything = table(one("torch", "2.8.0", f"{cudnn}==9.10.2.21"), one(cudnn, "9.16.0.29"))
    found = installed.closure(["torch"], everything, reader())
    declared = {"cudnn_is_stock": False, "expect": {"packages": {cudnn: "9.16.0.29"}}}
    for image, count in (
        (declared, 0),
        (None, 1),
        ({**declared, "cudnn_is_stock": True}, 1),
        ({**declared, "expect": {"packages": {cudnn: "9.20.0.48"}}}, 1),
    ):
        probe = a_probe()
        identity.judge_closure(probe, found, image)
        assert [finding.mode for finding in probe.findings] == ["F11"] * count


def test_a_companion_of_another_torch() -> None:
    everything = table(one("torch", "2.15.0"), one("torchvision", "0.29.0", "torch==2.14.0"))
    probe = a_probe()
    identity.judge_closure(probe, installed.closure(["torch", "torchvision"], everything, reader()), None)
    assert only(probe).mode == "F13"
    assert only(probe).why == "required: torchvision 0.29.0 → torch==2.14.0"


def test_installed_twice() -> None:
    probe = a_probe()
    everything = [
        one("torch"),
        one("a", "1"),
        one("a", "1", root="/other"),
        one("b", "1"),
        one("b", "2", root="/other"),
    ]
    identity.judge_twice(probe, everything, {"torch", "a"})
    assert not probe.findings
    identity.judge_twice(probe, everything, {"torch", "a", "b"})
    identity.judge_twice(probe, [one("c", "1"), one("c", "2")], {"torch"})
    identity.judge_twice(probe, [one("torch", "1"), one("torch", "1", root="/other")], set())
    assert [(finding.status, finding.mode) for finding in probe.findings] == [
        (Status.WARN, "F20"),
        (Status.FAIL, "F20"),
        (Status.FAIL, "F20"),
    ]


def recorded(content: bytes, *, size: bool = True) -> Recorded:
    digest = urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return Recorded(f"sha256={digest}", len(content) if size else None)


@pytest.mark.parametrize(
    ("content", "sizes", "winner"),
    [
        (b"of cu12", True, "of a 1.0"),
        (b"of cu13", True, "of b 1.0"),
        (b"of cu13", False, "of b 1.0"),
        (b"patched", False, "of neither"),
        (b"patched and longer", True, "of neither"),
    ],
)
def test_two_owners_of_one_library(tmp_path: Path, content: bytes, sizes: bool, winner: str) -> None:  # noqa: FBT001
    library = tmp_path / "libnccl.so.2"
    library.write_bytes(content)
    files = {
        str(library): [(one("a"), recorded(b"of cu12", size=sizes)), (one("b"), recorded(b"of cu13", size=sizes))],
        "/site/shared/__init__.py": [(one("a"), recorded(b"")), (one("b"), recorded(b""))],
    }
    probe = a_probe()
    identity.judge_disputed(probe, files)
    assert only(probe).status is Status.FAIL
    assert only(probe).mode == "F01"
    assert winner in only(probe).why


def test_two_owners_of_other_files_are_a_warning() -> None:
    probe = a_probe()
    files = {f"/site/tests/{name}.py": [(one("a"), recorded(b"1")), (one("b"), recorded(b"2"))] for name in "xyz"}
    identity.judge_disputed(probe, files)
    assert only(probe).status is Status.WARN
    assert "and 2 more" in only(probe).what


def test_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "A_b-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: A.b\nVersion: 1.0\nRequires-Dist: c\n")
    (info / "RECORD").write_text(
        'a/x.so,sha256=q,7\n"a/with, comma.py",sha256=r,\n../bin/a,,\na/x.pyc,,\nA_b-1.0.dist-info/METADATA,,\n'
    )
    (site / "broken-1.0.dist-info").mkdir()
    (tmp_path / "link").symlink_to(site)
    monkeypatch.setattr(sys, "path", [str(site), str(tmp_path / "link")])
    (found,) = installed.distributions()
    assert (found.name, found.version, found.root, found.requires) == ("a-b", "1.0", str(site), ("c",))
    assert {path: claim[0][1] for path, claim in installed.owners([found]).items()} == {
        f"{site}/a/x.so": Recorded("sha256=q", 7),
        f"{site}/a/with, comma.py": Recorded("sha256=r", None),
        f"{tmp_path}/bin/a": Recorded("", None),
    }
    assert not list(replace(found, source=None).files())
