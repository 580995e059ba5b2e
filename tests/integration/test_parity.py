"""One plan, two engines, one image: whatever differs between them is named here, with the reason, or fails."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import pickle
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import docker
import pytest

from builder.engines.docker import DockerEngine
from builder.render import PREFIX
from tests.integration.conftest import Built

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

INSTALLER = "dist-info/INSTALLER says who installed the package"
RECORD = "dist-info/RECORD holds the hashes of what differs by right, pip's own extra script, and other line ends"
SCRIPT = "a program made of an entry point: pip's template quotes with ', that of `installer` with \""
EXTRA_SCRIPT = "bin/pip3.11: pip makes one for its own wheel, by a rule that no other wheel and installer has"
BYTECODE = "marshal's reference flags depend on what else the compiling process held in memory; the code is the same"
ALLOWED = frozenset({INSTALLER, RECORD, SCRIPT, EXTRA_SCRIPT, BYTECODE})
"""Every difference that may be. One that no file has any more fails as well: then it is to be taken out of here."""

BIN = f"{PREFIX}/bin".lstrip("/")
PIP_EXTRA = f"{BIN}/pip3.11"

BUILDKIT_CONFIG = frozenset({"ArgsEscaped"})
"""Written by BuildKit into every configuration; it has a meaning on Windows only."""

# Run by the image's own Python, for whose version bytecode is: the names of the pairs that are not the same code.
COMPARE = """\
import marshal, pickle, sys, types

def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, types.CodeType):
        # co_lnotab is made of co_linetable when asked for.
        names = [name for name in dir(one) if name.startswith("co_") and name != "co_lnotab"]
        values = [(getattr(one, name), getattr(other, name)) for name in names]
        return all(same(a, b) for a, b in values if not callable(a))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, frozenset):
        return one == other and sorted(map(repr, one)) == sorted(map(repr, other))
    if isinstance(one, (float, complex)):
        return repr(one) == repr(other)  # -0.0 and nan
    return one == other

with open("/tmp/pairs", "rb") as file:
    pairs = pickle.load(file)
different = []
for path, one, other in pairs:
    if one[:16] != other[:16] or not same(marshal.loads(one[16:]), marshal.loads(other[16:])):
        different.append(path)
assert not same(compile("x = 1", "a", "exec"), compile("x = 1", "b", "exec"))
assert not same(compile("x = 1", "a", "exec"), compile("x = 1.0", "a", "exec"))
with open("/tmp/different", "w") as file:
    file.write("\\n".join(different))
"""


@dataclass(frozen=True, kw_only=True)
class File:
    """What a file system says of one path; its times apart, which are each engine's own."""

    kind: bytes
    mode: int
    uid: int
    gid: int
    target: str
    device: tuple[int, int]
    sha256: str
    content: bytes = b""
    """Only of what may differ."""


def _files(client: docker.DockerClient, name: str) -> dict[str, File]:
    container = client.containers.create(name)
    try:
        stream = _Stream(cast("Iterator[bytes]", container.export()))
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            return {entry.name: _file(archive, entry) for entry in archive}
    finally:
        container.remove()


def _file(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> File:
    digest, kept = hashlib.sha256(), b""
    if entry.isreg():
        stream = archive.extractfile(entry)
        assert stream is not None
        if entry.name.startswith(f"{BIN}/") or entry.name.endswith((".pyc", "/RECORD", "/INSTALLER")):
            kept = stream.read()
            digest.update(kept)
        else:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return File(
        kind=entry.type,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        target=entry.linkname,
        device=(entry.devmajor, entry.devminor) if entry.isdev() else (0, 0),
        sha256=digest.hexdigest(),
        content=kept,
    )


class _Stream:
    """Lets tarfile read what the engine sends in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        parts, wanted = [], size
        while wanted:
            self._rest = self._rest or next(self._pieces, b"")
            if not self._rest:
                break
            parts.append(self._rest[:wanted])
            self._rest = self._rest[wanted:]
            wanted -= len(parts[-1])
        return b"".join(parts)


def _reason(path: str, its: File | None, ours: File | None) -> str | None:
    """Return which of the ALLOWED differences this one is; None if it is none."""
    if path == PIP_EXTRA and ours is None:
        return EXTRA_SCRIPT
    if its is None or ours is None or replace(its, sha256="", content=b"") != replace(ours, sha256="", content=b""):
        return None
    if path.endswith(".dist-info/INSTALLER"):
        return INSTALLER if (its.content, ours.content) == (b"pip\n", b"torchyard\n") else None
    if path.endswith(".dist-info/RECORD"):
        return RECORD if _rows(its.content) == _rows(ours.content) else None
    if path.startswith(f"{BIN}/"):
        one, other = its.content.decode(), ours.content.decode()
        same = one.splitlines()[0] == other.splitlines()[0] and ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
        return SCRIPT if same else None
    return BYTECODE if path.endswith(".pyc") else None


def _rows(record: bytes) -> list[tuple[str, ...]]:
    """Return the rows that must be the same: without what is said of the files that differ by right."""
    rows = []
    for path, *about in csv.reader(io.StringIO(record.decode(), newline="")):
        if path != "../../../bin/pip3.11":
            differs = path.startswith("../../../bin/") or path.endswith(".dist-info/INSTALLER")
            rows.append((path,) if differs else (path, *about))
    return sorted(rows)


@pytest.fixture(scope="module", params=["cpu", pytest.param("notebook", marks=pytest.mark.release)])
def both(request: pytest.FixtureRequest) -> tuple[Built, Built]:
    """One cell from either engine: the plain one, and a variant with a program and packages of its own."""
    its, ours = (request.getfixturevalue(f"{request.param}_{engine}") for engine in ("docker", "oci"))
    return its, ours


def test_the_file_systems_differ_in_nothing_but_this(client: docker.DockerClient, both: tuple[Built, Built]) -> None:
    its, ours = (_files(client, one.name) for one in both)
    assert len(ours) > 30_000
    found: dict[str | None, list[str]] = defaultdict(list)
    for path in sorted(its.keys() | ours.keys()):
        if its.get(path) != ours.get(path):
            found[_reason(path, its.get(path), ours.get(path))].append(path)
    unexplained = [f"{path}: {_shown(its.get(path))} -> {_shown(ours.get(path))}" for path in found.pop(None, ())]
    assert not unexplained, "\n".join(unexplained[:50])
    assert set(found) == ALLOWED, "a difference that no longer is, is to be taken out of ALLOWED"
    engine = DockerEngine()
    try:
        pairs = [(path, its[path].content, ours[path].content) for path in found[BYTECODE]]
        files = {"/tmp/pairs": pickle.dumps(pairs, protocol=4), "/tmp/compare.py": COMPARE.encode()}
        argv = [f"{PREFIX}/bin/python", "-I", "/tmp/compare.py"]
        ran = engine.run(both[1].name, argv, files=files, collect=["/tmp/different"], timeout_s=600)
        assert ran.exit_code == 0, ran.log
        assert not ran.files["/tmp/different"].decode().splitlines()
    finally:
        engine.client.close()


def _shown(file: File | None) -> object:
    return file and replace(file, content=file.content[:200])


def test_the_configurations_differ_in_nothing(client: docker.DockerClient, both: tuple[Built, Built]) -> None:
    its, ours = (_configuration(client, one.name) for one in both)
    assert its == ours


def _configuration(client: docker.DockerClient, name: str) -> Mapping[str, Any]:
    """Return the run part of a configuration, and the platform, in a form in which order does not count."""
    attributes = client.images.get(name).attrs
    config = {key: value for key, value in attributes["Config"].items() if value and key not in BUILDKIT_CONFIG}
    config["Env"] = dict(line.split("=", 1) for line in config["Env"])
    assert config.keys() >= {"Env", "Labels", "User", "WorkingDir", "Entrypoint", "Cmd"}
    return config | {key: attributes[key] for key in ("Architecture", "Os", "Created")}
