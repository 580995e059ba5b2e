"""Bytecode by the Python of the shipped bases: stable in any order, and what their own `compileall` writes."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from builder import base
from builder.engines.oci.bytecode import Interpreter, cache_path, compile_sources, interpreter
from builder.project import Project
from builder.store import Store

pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SITE = "/opt/venv/lib/python3/site-packages"

# Run by the base's Python: how many of the files named hold another code, and the names of those with other bytes.
COMPARE = """\
import marshal, pathlib, sys
for line in sys.stdin:
    one, other = (pathlib.Path(path).read_bytes() for path in line.rstrip().split("\\t"))
    if one != other:
        same = one[:16] == other[:16] and marshal.loads(one[16:]) == marshal.loads(other[16:])
        print("same" if same else "other", line.split("\\t")[0])
"""


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A base's interpreter, and its own standard library as sources to compile."""

    interpreter: Interpreter
    sources: tuple[tuple[str, bytes], ...]

    def run(self, *arguments: str, said: str = "") -> str:
        command = [*self.interpreter.command, "-S", "-s", *arguments]
        done = subprocess.run(
            command, env=dict(self.interpreter.environment), input=said, capture_output=True, text=True, check=True
        )
        return done.stdout


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpacked]:
    project = Project(ROOT / "matrix.yaml")
    cell = next(cell for cell in project.cells if cell.base_name == request.param)
    lock = project.base_lock(cell)
    assert lock is not None
    store = Store.open()
    base.fetch(lock, store)
    image = base.make(lock, store)
    layer = store.path(image.layer.sha256)

    def opened() -> BinaryIO:
        return cast("BinaryIO", gzip.open(layer))

    scratch = tmp_path_factory.mktemp("scratch")
    search = base.PATH.split(":")
    with interpreter([opened], python=cell.python, search=search, scratch=scratch) as found:
        assert found.version.startswith(f"{cell.python}.")
        stdlib = Path(found.environment["PYTHONHOME"]) / "lib" / f"python{cell.python}"
        sources = tuple(
            (f"{SITE}/{path.relative_to(stdlib)}", path.read_bytes()) for path in sorted(stdlib.rglob("*.py"))
        )
        assert len(sources) > 400
        yield Unpacked(interpreter=found, sources=sources)


def test_order_and_workers_do_not_show(unpacked: Unpacked) -> None:
    first = dict(compile_sources(unpacked.interpreter, unpacked.sources, workers=2))
    assert sum(content is None for content in first.values()) < 5
    for seed, workers in ((1, 1), (2, 3)):
        shuffled = list(unpacked.sources)
        random.Random(seed).shuffle(shuffled)
        assert dict(compile_sources(unpacked.interpreter, shuffled, workers=workers)) == first
    some = unpacked.sources[::7]
    assert dict(compile_sources(unpacked.interpreter, some, workers=2)) == {path: first[path] for path, _ in some}


def test_it_is_what_compileall_writes(unpacked: Unpacked, tmp_path: Path) -> None:
    """Its one process has a history, so that from Python 3.12 on a few of its files differ; none holds another code."""
    site = tmp_path / "site"
    for path, source in unpacked.sources:
        file = site / os.path.relpath(path, SITE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source)
    # It reads only what it compiles: `-s` and `-p` put the path in the image in the place of this one.
    unpacked.run(
        "-m", "compileall", "-qq", "-s", str(site), "-p", SITE, "--invalidation-mode", "unchecked-hash", str(site)
    )
    pairs = []
    for number, (path, content) in enumerate(compile_sources(unpacked.interpreter, unpacked.sources, workers=2)):
        its = site / os.path.relpath(cache_path(path, unpacked.interpreter.tag), SITE)
        assert its.exists() == (content is not None), path
        if content is not None:
            mine = tmp_path / f"{number}.pyc"
            mine.write_bytes(content)
            pairs.append(f"{mine}\t{its}")
    said = unpacked.run("-c", COMPARE, said="\n".join(pairs)).splitlines()
    assert not [line for line in said if line.startswith("other")]
    assert len(said) <= (0 if unpacked.interpreter.tag == "cpython-311" else len(pairs) // 100)
