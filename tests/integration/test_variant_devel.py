"""The devel variant of the CPU cell: C++ extensions compile in it, for any user of group 0.

For its own user test_walk_through has one compiled, which validates this image.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

VariantImage = Callable[[str], str]
ANYBODY = ("--user", "12345:0", "--cap-drop", "ALL")
CONFINED = (*ANYBODY, "--read-only", "--tmpfs", "/tmp:exec")
PROJECT = """
cat > extension.cpp <<'END'
#include <torch/extension.h>
int64_t doubled(int64_t number) { return 2 * number; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("doubled", &doubled); }
END
cat > setup.py <<'END'
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
setup(
    name="doubling",
    version="1",
    ext_modules=[CppExtension("doubling", ["extension.cpp"], extra_compile_args=["-O0", "-g0"])],
    cmdclass={"build_ext": BuildExtension},
)
END
pip install --quiet --no-build-isolation --no-index --no-deps --disable-pip-version-check . && cd / &&
python -c 'import torch, doubling; print(doubling.doubled(21))'
"""
"""A package with an extension, built and installed as people do it: in the image's workspace, into its environment.

Only quicker: Debian's Python asks for optimized code with debugging information, which takes most of a compiler's time.
"""


def run(image: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    words = ["docker", "run", "--rm", "--network", "none", *options, image, *command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def devel(variant_image: VariantImage) -> str:
    return variant_image("devel")


def test_its_tools_are_there_and_no_cuda(devel: str) -> None:
    tools = "for tool in g++ gcc git make ninja; do $tool --version >/dev/null || exit 1; done"
    done = run(devel, "bash", "-c", f'{tools}; command -v nvcc; echo "CUDA_HOME=$CUDA_HOME"')
    assert (done.returncode, done.stdout) == (0, "CUDA_HOME=\n"), done.stdout + done.stderr


def test_it_validates_itself_for_any_user_on_a_read_only_root(devel: str) -> None:
    done = run(devel, "torchyard-validate", "--only", "env.*", "--json", options=CONFINED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    results: Mapping[str, Any] = {event["id"]: event for event in events if event["event"] == "result"}
    assert results["env.cpp-extension"]["status"] == "pass"
    for name in ("env.toolkit", "env.cuda-extension"):
        assert (results[name]["status"], results[name]["skip"]) == ("skip", "not_this_kind"), results[name]


def test_any_user_can_install_a_package_with_an_extension(devel: str) -> None:
    done = run(devel, "bash", "-ec", PROJECT, options=ANYBODY)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stdout[-2000:] + done.stderr[-2000:]
