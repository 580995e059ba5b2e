"""The script that looks around inside an image: what it writes with a torch, without one, and with a broken one."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from builder import proof

SCRIPT = Path(__file__).parents[2] / "validate" / "facts.py"

TORCH = """
    __version__ = "2.8.0+cu128"
    class version:
        cuda = "12.8"
    class backends:
        class cudnn:
            @staticmethod
            def version():
                return 91002
    class _C:
        @staticmethod
        def _cuda_getArchFlags():
            return "sm_90 sm_75 compute_120"
    print("torch prints what it likes", flush=True)
"""
CPU_TORCH = """
    __version__ = "2.13.0+cpu"
    class version:
        cuda = None
    class backends:
        class cudnn:
            version = staticmethod(lambda: None)
    class _C:
        _cuda_getArchFlags = staticmethod(lambda: None)
"""


def module(directory: Path, source: str, name: str = "torch") -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text(textwrap.dedent(source))


def distribution(directory: Path, name: str, version: str) -> None:
    info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def look(directory: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run the script as a proof does, with what lies in the directory installed besides."""
    output = directory / "facts.json"
    environment = {"PATH": os.defpath, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, str(SCRIPT), str(output)], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    assert proof._is_report(found)
    return found


def test_a_cuda_build(tmp_path: Path) -> None:
    module(tmp_path, TORCH)
    distribution(tmp_path, "NVIDIA.cuDNN_cu12", "9.10.2.21")
    found = look(tmp_path)
    facts = found["facts"]
    assert found["schema"] == proof.SCHEMA
    assert facts["torch"] == "2.8.0+cu128"
    assert facts["cuda"] == "12.8"
    assert facts["cudnn_number"] == 91002
    assert facts["architectures"] == ["compute_120", "sm_75", "sm_90"]
    assert facts["nccl"] is None
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert facts["executable"] == sys.executable
    assert facts["packages"]["nvidia-cudnn-cu12"] == "9.10.2.21"
    assert facts["packages"]["pytest"] == pytest.__version__
    assert found["errors"] == {}


def test_a_cpu_build(tmp_path: Path) -> None:
    module(tmp_path, CPU_TORCH)
    found = look(tmp_path)
    assert {name: found["facts"][name] for name in ("torch", "cuda", "cudnn_number", "nccl", "architectures")} == {
        "torch": "2.13.0+cpu",
        "cuda": None,
        "cudnn_number": None,
        "nccl": None,
        "architectures": [],
    }
    assert found["errors"] == {}


def test_without_torch_the_rest_is_still_said(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    found = look(tmp_path)
    missing = {"torch", "cuda", "cudnn_number", "architectures"}
    assert set(found["errors"]) == missing
    assert not missing & set(found["facts"])
    assert found["errors"]["torch"] == "ModuleNotFoundError: No module named 'torch'"
    assert found["facts"]["packages"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "OSError: libcudnn.so.9"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("__version__ = '2.8.0'", "AttributeError"),
    ],
)
def test_a_torch_that_breaks_is_a_finding(tmp_path: Path, source: str, error: str) -> None:
    module(tmp_path, source)
    found = look(tmp_path)
    assert found["errors"]["cuda"].startswith(error)
    assert "cuda" not in found["facts"]


def test_a_distribution_that_is_there_twice_is_not_hidden(tmp_path: Path) -> None:
    distribution(tmp_path, "twice-here", "2.3.1")
    distribution(tmp_path, "Twice.Here", "1.26.4")
    assert look(tmp_path)["facts"]["packages"]["twice-here"] == "1.26.4 and 2.3.1"


@pytest.mark.parametrize(("number", "version"), [(22703, "2.27.3"), (2708, "2.7.8"), (23007, "2.30.7")])
def test_the_loaded_nccl_is_asked(tmp_path: Path, number: int, version: str) -> None:
    library(tmp_path, f"int ncclGetVersion(int *n) {{ *n = {number}; return 0; }}")
    found = look(tmp_path)
    assert found["facts"]["nccl"] == version
    assert found["facts"]["libraries"]["libnccl"] == str(tmp_path / "libnccl.so.2")


def test_an_nccl_that_refuses_is_a_finding(tmp_path: Path) -> None:
    library(tmp_path, "int ncclGetVersion(int *n) { return 3; }")
    assert look(tmp_path)["errors"]["nccl"] == "RuntimeError: ncclGetVersion returned 3"


def library(directory: Path, source: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    (directory / "nccl.c").write_text(source)
    path = directory / "libnccl.so.2"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, directory / "nccl.c"], check=True, capture_output=True)
    module(directory, f"import ctypes\n_library = ctypes.CDLL({str(path)!r})\n" + textwrap.dedent(TORCH))


def test_the_script_is_python_3_9() -> None:
    ast.parse(SCRIPT.read_text("utf-8"), feature_version=(3, 9))
    with pytest.raises(SyntaxError):
        ast.parse("match 1:\n    case 1: pass\n", feature_version=(3, 9))


def test_the_script_needs_the_standard_library_only() -> None:
    names = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert names <= {*sys.stdlib_module_names, "torch"}


def other_python(version: str) -> str | None:
    """Find another Python: on PATH, or where pyenv and uv keep theirs; one that is only a stand-in does not count."""
    found = [shutil.which(f"python{version}") or ""]
    for root in (Path(os.environ.get("PYENV_ROOT", "~/.pyenv")), Path("~/.local/share/uv/python")):
        found += [str(path) for path in sorted(root.expanduser().glob(f"**/*{version}*/bin/python{version}"))]
    for python in filter(None, found):
        command = [python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return python
    return None


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_other_pythons(tmp_path: Path, version: str) -> None:
    python = other_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    module(tmp_path, TORCH)
    distribution(tmp_path, "numpy", "2.3.1")
    found = look(tmp_path, python)
    assert found["errors"] == {}
    assert found["facts"]["python"] == version
    assert found["facts"]["torch"] == "2.8.0+cu128"
    assert found["facts"]["packages"]["numpy"] == "2.3.1"


def test_what_a_proof_compares_is_what_the_script_observes(tmp_path: Path) -> None:
    module(tmp_path, TORCH)
    facts: Mapping[str, Any] = look(tmp_path)["facts"]
    assert {*proof._WHAT, "packages"} <= set(facts)
    assert sysconfig.get_python_version() == facts["python"]
