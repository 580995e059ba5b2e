"""Tiny but valid wheels, the same bytes every time, and whole universes of them for a cell."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from builder.facts import Facts
from builder.matrix import Cell

UPLOADED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
TRITON = "3.4.0"
NUMPY = "2.3.1"
PIP = "26.3"
NCCL = "2.27.3"
"""For builds whose NCCL the facts do not know."""


@dataclass(frozen=True, kw_only=True)
class FakeWheel:
    """One wheel (or what is named like a source distribution), and when an index says it received it."""

    filename: str
    content: bytes
    metadata: bytes
    upload_time: datetime | None = UPLOADED

    @property
    def project(self) -> str:
        return self._parsed[0]

    @property
    def version(self) -> Version:
        return self._parsed[1]

    @property
    def _parsed(self) -> tuple[str, Version]:
        if self.filename.endswith(".tar.gz"):
            return parse_sdist_filename(self.filename)
        return parse_wheel_filename(self.filename)[:2]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.filename
        path.write_bytes(self.content)
        return path


def wheel(
    project: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    files: Mapping[str, bytes] | None = None,
    requires_python: str = ">=3.9",
    headers: Sequence[str] = (),
    upload_time: datetime | None = UPLOADED,
    compression: int = zipfile.ZIP_DEFLATED,
) -> FakeWheel:
    """Make a wheel that pip and uv accept; without `files` it holds one module that says its version.

    `headers` are further lines of its metadata.
    """
    stem = f"{canonicalize_name(project).replace('-', '_')}-{Version(version)}"
    information = f"{stem}.dist-info"
    module = canonicalize_name(project).replace("-", "_")
    metadata = "\n".join(
        [
            "Metadata-Version: 2.1",
            f"Name: {project}",
            f"Version: {version}",
            f"Requires-Python: {requires_python}",
            *(f"Requires-Dist: {requirement}" for requirement in requires),
            *headers,
            "",
        ]
    ).encode()
    python, abi, platforms = tag.split("-")
    tags = "".join(f"Tag: {python}-{abi}-{platform}\n" for platform in platforms.split("."))
    purelib = "true" if abi == "none" and platforms == "any" else "false"
    members = {
        **(files if files is not None else {f"{module}/__init__.py": f'__version__ = "{version}"\n'.encode()}),
        f"{information}/METADATA": metadata,
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nGenerator: fake\nRoot-Is-Purelib: {purelib}\n{tags}".encode(),
    }
    record = f"{information}/RECORD"
    lines = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in members.items()]
    members[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.compress_type = compression
            entry.external_attr = (0o100755 if ".so" in Path(name).name else 0o100644) << 16
            archive.writestr(entry, content)
    return FakeWheel(
        filename=f"{stem}-{tag}.whl", content=buffer.getvalue(), metadata=metadata, upload_time=upload_time
    )


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


# --------------------------------------------------------------------------- torch and what it needs

_TORCH = '''\
"""A stand-in for torch that can say what it is, and loads the NCCL beside it."""

import ctypes
from pathlib import Path

from torch import _C, backends, cuda, version
from torch.version import __version__

_nccl = Path(__file__).parents[1] / "nvidia/nccl/lib/libnccl.so.2"
if version.cuda is not None and _nccl.exists():
    ctypes.CDLL(str(_nccl))
'''
_CUDA = """\
def is_available():
    return False


def device_count():
    return 0


def get_arch_list():
    return []
"""
_CUDNN = """\
from importlib.metadata import version as installed

from torch.version import cuda


def is_available():
    return cuda is not None


def version():
    if cuda is None:
        return None
    major, minor, patch = map(int, installed("nvidia-cudnn-cu" + cuda.split(".")[0]).split(".")[:3])
    return major * (10000 if major >= 9 else 1000) + minor * 100 + patch
"""


def torch_wheel(
    version: str,
    *,
    reports: str,
    cuda: str | None,
    requires: Sequence[str] = (),
    architectures: Sequence[str] = ("sm_80", "sm_90"),
    tag: str = "cp311-cp311-manylinux_2_28_x86_64",
    upload_time: datetime | None = UPLOADED,
) -> FakeWheel:
    """Make a torch of package version `version` whose `torch.__version__` is `reports` (2.8.0, 2.8.0+cu128)."""
    flags = f"def _cuda_getArchFlags():\n    return {' '.join(architectures)!r}\n" if cuda else ""
    files = {
        "torch/__init__.py": _TORCH,
        "torch/_C.py": flags,
        "torch/version.py": f"__version__ = {reports!r}\ncuda = {cuda!r}\n",
        "torch/cuda/__init__.py": _CUDA,
        "torch/backends/__init__.py": "from torch.backends import cudnn\n",
        "torch/backends/cudnn.py": _CUDNN,
        # Where the real one holds the list it was compiled with.
        "torch/lib/libtorch_python.so": f"\x7fELF\0...rpc_h{' '.join(architectures)}\0\0" if cuda else "\x7fELF\0",
    }
    return wheel(
        "torch",
        version,
        requires=requires,
        tag=tag,
        files={name: content.encode() for name, content in files.items()},
        upload_time=upload_time,
    )


def nccl_wheel(project: str, version: str, *, platform: str = "linux/amd64") -> FakeWheel:
    """Make an NCCL whose library can be loaded (on amd64) and asked for its version."""
    major, minor, patch = Version(version).release[:3]
    library = _shared_object(b"ncclGetVersion", major * 10000 + minor * 100 + patch)
    library += b"\0NCCL version %d.%d.%d+cuda12.8\0" % (major, minor, patch)
    tag = f"py3-none-manylinux_2_18_{MACHINES[platform]}"
    return wheel(project, version, tag=tag, files={"nvidia/nccl/lib/libnccl.so.2": library})


def cudnn_wheel(project: str, version: str, *, tag: str) -> FakeWheel:
    """Make a cuDNN with the header in which the real one says what it is."""
    names = ("MAJOR", "MINOR", "PATCHLEVEL")
    numbers = zip(names, Version(version).release, strict=False)
    header = "".join(f"#define CUDNN_{name} {number}\n" for name, number in numbers)
    return wheel(project, version, tag=tag, files={"nvidia/cudnn/include/cudnn_version.h": header.encode()})


def _shared_object(symbol: bytes, answer: int) -> bytes:
    """Return an x86-64 library with one function: `int symbol(int *out) { *out = answer; return 0; }`.

    Written by hand, so that tests need no compiler and its bytes never change.
    """
    code = b"\xc7\x07" + struct.pack("<I", answer) + b"\x31\xc0\xc3"  # mov [rdi], answer; xor eax, eax; ret
    strings = b"\0" + symbol + b"\0"
    page, headers = 0x1000, 64 + 4 * 56
    hashes = struct.pack("<5I", 1, 2, 1, 0, 0).ljust(24, b"\0")
    symbols_at = headers + len(hashes)
    strings_at = symbols_at + 2 * 24
    code_at = strings_at + len(strings)
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1, code_at, len(code))
    text = hashes + symbols + strings + code
    # DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL; the loader writes here, hence a page of its own.
    entries = ((4, headers), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    end = headers + len(text)

    def program(kind: int, flags: int, at: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)

    elf = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    elf += program(1, 5, 0, end, page) + program(1, 6, page, len(dynamic), page)
    elf += program(2, 6, page, len(dynamic), 8) + program(0x6474E551, 6, 0, 0, 16)
    return (elf + text).ljust(page, b"\0") + dynamic


# --------------------------------------------------------------------------- universes


@dataclass(frozen=True, kw_only=True)
class Universe:
    """The wheels that a cell resolves to, by the index that carries them."""

    default: tuple[FakeWheel, ...]
    explicit: Mapping[str, tuple[FakeWheel, ...]]

    @property
    def wheels(self) -> tuple[FakeWheel, ...]:
        return (*self.default, *(one for group in self.explicit.values() for one in group))


def universe(cell: Cell) -> Universe:
    """Make torch as the cell declares it, with pins like the real one's, and all else its image needs."""
    python = f"cp{cell.python.replace('.', '')}"
    machine = MACHINES[cell.platform]
    others = {"pip": PIP, "numpy": NUMPY, "typing-extensions": "4.14.0"}
    for requirement in map(Requirement, cell.variant.packages):
        pins = [one.version for one in requirement.specifier if one.operator == "=="]
        others[canonicalize_name(requirement.name)] = pins[0] if pins else others.get(requirement.name, "1.0")
    default = [wheel(project, version) for project, version in others.items()]
    requires = ["typing-extensions>=4.8"]
    if cell.cuda != "cpu":
        major = cell.cuda.partition(".")[0]
        stock = cell.cudnn if cell.cudnn_is_stock else Facts.load().stock_cudnn(cell.torch, Version(cell.cuda))
        assert stock is not None
        assert cell.cudnn is not None
        runtime = "nvidia-cuda-runtime" + (f"-cu{major}" if int(major) < 13 else "")
        cudnn, nccl, nccl_version = f"nvidia-cudnn-cu{major}", f"nvidia-nccl-cu{major}", str(cell.nccl or NCCL)
        library = f"py3-none-manylinux_2_27_{machine}"
        default += [wheel(runtime, f"{cell.cuda}.90", tag=library), wheel("triton", TRITON)]
        default += [cudnn_wheel(cudnn, version, tag=library) for version in sorted({str(stock), str(cell.cudnn)})]
        default += [nccl_wheel(nccl, nccl_version, platform=cell.platform)]
        pins = [f"{runtime}=={cell.cuda}.90", f"{cudnn}=={stock}", f"{nccl}=={nccl_version}", f"triton=={TRITON}"]
        requires += [f'{pin}; platform_system == "Linux"' for pin in pins]
    owner = next((index.name for index in cell.indexes if "torch" in index.packages), None)
    torch = torch_wheel(
        cell.torch_local if owner else str(cell.torch),
        reports=cell.torch_local,
        cuda=None if cell.cuda == "cpu" else cell.cuda,
        requires=requires,
        architectures=cell.architectures or ("sm_80", "sm_90"),
        tag=f"{python}-{python}-manylinux_2_28_{machine}",
    )
    if owner:
        return Universe(default=tuple(default), explicit={owner: (torch,)})
    return Universe(default=(*default, torch), explicit={})
