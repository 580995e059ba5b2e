"""What wheels' bytes say of versions: read right, wherever the pieces in which they pass by are cut."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.engines.oci.evidence import witness

VERSION = "torch/version.py"
PYTHON_LIBRARY = "torch/lib/libtorch_python.so"
CUDNN = "nvidia/cudnn/include/cudnn_version.h"
NCCL = "nvidia/nccl/lib/libnccl.so.2"


def facts(path: str, *content: bytes) -> Mapping[str, Any]:
    observer = witness(path)
    assert observer is not None
    for piece in content:
        observer.see(piece)
    return observer.facts()


@pytest.mark.parametrize(
    "path",
    [
        "torch/__init__.py",
        "torch/lib/libtorch_cuda.so",
        "other/torch/version.py",
        "torch/version.pyi",
        "nvidia/cudnn/include/cudnn.h",
        "nvidia/nccl/lib/libnccl.so",
        "",
    ],
)
def test_most_files_are_not_looked_at(path: str) -> None:
    assert witness(path) is None


# --------------------------------------------------------------------------- torch

# As torch's builds write it.
TYPED = """\
from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'xpu']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda}
git_version = 'a1cb3cc05d46d198467bebbb6e8fba50a325d4e7'
hip: Optional[str] = None
xpu: Optional[str] = None
"""
PLAIN = """\
__version__ = '{version}'
debug = False
cuda = {cuda}
git_version = 'c263bd43e8e8502d4726643bc6fd046f0130ac0e'
hip = None
"""


@pytest.mark.parametrize("text", [TYPED, PLAIN])
@pytest.mark.parametrize(
    ("version", "cuda"), [("2.8.0+cu128", "12.8"), ("2.8.0+cpu", None), ("2.9.0.dev20260101", "13.0")]
)
def test_torch_says_its_version_and_cuda(text: str, version: str, cuda: str | None) -> None:
    content = text.format(version=version, cuda=repr(cuda)).encode()
    assert facts(VERSION, content) == {"torch": version, "cuda": cuda}
    assert facts(VERSION, *(content[at : at + 1] for at in range(len(content)))) == {"torch": version, "cuda": cuda}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", {}),
        (b"__version__ = get()\ncuda = find()\n", {}),
        (b"  __version__ = '1.0'\nxcuda = '12.8'\ncuda_home = '12.8'\n", {}),
        (b"__version__ = '1.0'\n", {"torch": "1.0"}),
        (b"\xff\xfe\ncuda = None\n", {"cuda": None}),
        # Only so much of a file is read.
        (b"#" * (2 << 20) + b"\ncuda = None\n", {"cuda": None}),
    ],
)
def test_what_torch_does_not_say_is_absent(content: bytes, expected: dict[str, Any]) -> None:
    assert facts(VERSION, content) == expected


def test_no_more_than_a_megabyte_or_two_is_kept() -> None:
    chunks = [b"#" * (1 << 20)] * 5
    assert facts(VERSION, b"cuda = None\n", *chunks, b"\n__version__ = '1.0'\n") == {"cuda": None}


# --------------------------------------------------------------------------- cuDNN

HEADER = """\
/**
 * \\file: The master cuDNN version file.
 */

#ifndef CUDNN_VERSION_H_
#define CUDNN_VERSION_H_

#define CUDNN_MAJOR {0}
#define CUDNN_MINOR {1}
#define CUDNN_PATCHLEVEL {2}

#define CUDNN_VERSION (CUDNN_MAJOR * {3} + CUDNN_MINOR * 100 + CUDNN_PATCHLEVEL)

/* cannot use constexpr here since this is a C-only file */
/* Below is the max SM version this cuDNN library is aware of and supports natively */

#define CUDNN_MAX_SM_MAJOR_NUMBER 12
#define CUDNN_MAX_SM_MINOR_NUMBER 0
#define CUDNN_MAX_DEVICE_VERSION (CUDNN_MAX_SM_MAJOR_NUMBER * 100 + CUDNN_MAX_SM_MINOR_NUMBER * 10)

#endif /* CUDNN_VERSION_H */
"""


@pytest.mark.parametrize(
    ("version", "factor", "number"),
    [
        ((8, 9, 7), 1000, 8907),
        ((8, 5, 0), 1000, 8500),
        ((9, 0, 0), 10000, 90000),
        ((9, 1, 0), 10000, 90100),
        ((9, 10, 2), 10000, 91002),
        ((10, 1, 2), 10000, 100102),
    ],
)
def test_cudnn_says_its_number(version: tuple[int, int, int], factor: int, number: int) -> None:
    content = HEADER.format(*version, factor).encode()
    assert facts(CUDNN, content) == {"cudnn_number": number}
    assert facts(CUDNN, content[:200], content[200:]) == {"cudnn_number": number}


@pytest.mark.parametrize("missing", ["MAJOR", "MINOR", "PATCHLEVEL"])
def test_half_a_version_of_cudnn_is_none(missing: str) -> None:
    lines = HEADER.format(9, 1, 0, 10000).splitlines(keepends=True)
    content = "".join(line for line in lines if not line.startswith(f"#define CUDNN_{missing} "))
    assert len(content) < len("".join(lines))
    assert facts(CUDNN, content.encode()) == {}


# --------------------------------------------------------------------------- NCCL

LIBRARY = b"\x7fELF" + b"\0x" * 300 + b"%s/NCCL version %s\0NCCL version 2.27.3+cuda12.8\0" + b"NCCL_DEBUG\0" * 60


def test_nccl_says_its_version_wherever_it_is_cut() -> None:
    for at in range(len(LIBRARY) + 1):
        assert facts(NCCL, LIBRARY[:at], LIBRARY[at:]) == {"nccl": "2.27.3"}, at


@pytest.mark.parametrize("size", [1, 2, 7, 100, 511, 512, 513])
def test_nccl_says_its_version_in_pieces_of_any_size(size: int) -> None:
    assert facts(NCCL, *(LIBRARY[at : at + size] for at in range(0, len(LIBRARY), size))) == {"nccl": "2.27.3"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"NCCL version 2.27.3+cuda12.8\0NCCL version 2.27.3+cuda12.9\0", {"nccl": "2.27.3"}),
        (b"NCCL version 2.27.3+cuda12.8\0NCCL version 2.27.4+cuda12.8\0", {}),
        (b"NCCL version 2.27.3\0", {}),
        (b"NCCL version 2.27+cuda12.8\0", {}),
        (b"", {}),
    ],
)
def test_two_versions_of_nccl_are_none(content: bytes, expected: dict[str, str]) -> None:
    assert facts(NCCL, content) == expected


# --------------------------------------------------------------------------- architectures

LIST = b"sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"
SORTED = ["compute_120", "sm_100", "sm_120", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\0" + LIST + b"\0", SORTED),
        (b"pc_h" + LIST + b"\0", SORTED),
        (b"rpc_h" + LIST + b"\0\0", SORTED),
        (b"of \0sm_90\0" + LIST + b"\0sm_80 sm_90\0", SORTED),
        (b"sm_90a sm_100f sm_121a\0", ["sm_100f", "sm_121a", "sm_90a"]),
        # No lists: what ends otherwise, and what is no architecture.
        (LIST, None),
        (LIST + b"\n\0", None),
        (LIST + b" \0", None),
        (b"gfx90a gfx942\0", None),
        (b"", None),
    ],
)
def test_torch_says_what_it_was_compiled_for(content: bytes, expected: list[str] | None) -> None:
    assert facts(PYTHON_LIBRARY, content) == ({} if expected is None else {"architectures": expected})


def test_the_list_is_whole_wherever_it_is_cut() -> None:
    content = b"x" * 700 + b"pc_h" + LIST + b"\0" + b"sm_90\0" * 150
    for at in range(len(content) + 1):
        assert facts(PYTHON_LIBRARY, content[:at], content[at:]) == {"architectures": SORTED}, at


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_the_list_is_whole_in_pieces_of_any_size(sizes: list[int]) -> None:
    content = b"x" * 700 + b"pc_h" + LIST + b"\0" + b"\0sm_90 \0sm_90\0" * 60
    edges = [*itertools.takewhile(lambda at: at < len(content), itertools.accumulate(sizes, initial=0)), len(content)]
    pieces = [content[start:end] for start, end in itertools.pairwise(edges)]
    assert b"".join(pieces) == content
    assert facts(PYTHON_LIBRARY, *pieces) == {"architectures": SORTED}


def test_of_lists_as_long_it_is_always_the_same() -> None:
    """Python's order of byte strings in a set is another in each process."""
    lists = [b"sm_%d sm_90\0" % number for number in range(10, 100)]
    for order in (lists, lists[::-1]):
        assert facts(PYTHON_LIBRARY, *order) == {"architectures": ["sm_90", "sm_99"]}
