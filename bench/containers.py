"""Images in the container engine: tried out, read, and removed again with all that making them left there."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench import machine
from bench.process import timed
from builder.engines.docker import DockerEngine
from builder.errors import CellFailedError, DiskError, EngineError
from builder.layout import Descriptor

REPOSITORY = "torchyard-bench"
WARM_RUNS = 5
PATIENCE_S = 120
"""How long the engine may take to give back the room of what was removed; it does so in the background."""
_DOCUMENT = 4 << 20
"""No manifest or configuration is larger."""
_PROGRAM = (
    "import time; started = time.perf_counter(); import torch; print(torch.__version__, time.perf_counter() - started)"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `import torch` takes in an image, and proof that it is the right torch."""

    first_run_seconds: float
    import_cold_seconds: float | None
    import_warm_seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An image by what a registry would hold of it."""

    size: int
    layers: tuple[Descriptor, ...]


def command(name: str) -> tuple[str, ...]:
    """Return the command that tries an image out."""
    return ("docker", "run", "--rm", "--network", "none", name, "python", "-c", _PROGRAM)


def tried(name: str, expected: str) -> Trial:
    """Import torch in containers of the image; raises CellFailedError if that fails or it is not the expected one."""

    def once() -> tuple[float, float]:
        spent = timed(command(name), what=f"import torch in {name}")
        version, _, inner = spent.out.strip().rpartition("\n")[2].partition(" ")
        if version != expected:
            raise CellFailedError(f"{name} has torch {version or 'none'}, the cell declares {expected}")
        return spent.seconds, float(inner)

    first, _ = once()
    cold = once()[1] if machine.drop_caches() else None
    return Trial(
        first_run_seconds=first,
        import_cold_seconds=cold,
        import_warm_seconds=tuple(once()[1] for _ in range(WARM_RUNS)),
    )


def pip(name: str) -> str:
    """Return the version of an image's pip."""
    said = timed(
        ("docker", "run", "--rm", "--network", "none", name, "pip", "--version"), what=f"ask {name} for its pip"
    )
    return said.out.split()[1]


# ----------------------------------------------------------------------------------------------------
# Manifests


def saved(name: str) -> Stored:
    """Read an image of the engine as it would be pushed."""
    with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            return in_archive(process.stdout)
        finally:
            process.kill()


def in_archive(file: IO[bytes]) -> Stored:
    """Read the one image of an OCI archive, which need not be seekable; raises EngineError if there is none."""
    documents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() and member.size <= _DOCUMENT else None
                if content is not None:
                    documents[member.name] = content.read()
        return of_index(json.loads(documents["index.json"]), documents)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise EngineError("the engine gave no OCI archive", why=f"{type(error).__name__}: {error}") from None


def of_index(index: Mapping[str, object], documents: Mapping[str, bytes]) -> Stored:
    """Follow an index of an archive to the one image in it; attestations, which are for no platform, are left out."""
    entries = index["manifests"]
    assert isinstance(entries, list)
    entry = next((entry for entry in entries if (entry.get("platform") or {}).get("os") != "unknown"), None)
    if entry is None:
        raise ValueError("an index without an image")
    document = json.loads(documents[f"blobs/sha256/{entry['digest'].removeprefix('sha256:')}"])
    if "manifests" in document:
        return of_index(document, documents)
    layers = tuple(Descriptor.from_json(layer) for layer in document["layers"])
    return Stored(
        size=int(entry["size"]) + int(document["config"]["size"]) + sum(layer.size for layer in layers), layers=layers
    )


# ----------------------------------------------------------------------------------------------------
# Room


def remove(engine: DockerEngine, name: str) -> None:
    """Remove an image, if it is there."""
    engine.untag([name])


def require(directory: Path, size: float, purpose: str, *, patience_s: float) -> None:
    """Raise DiskError unless `size` bytes are free, or become so in a while."""
    deadline = time.monotonic() + patience_s
    while (free := shutil.disk_usage(directory).free) < size:
        if time.monotonic() >= deadline:
            raise DiskError(
                f"not enough disk to {purpose}",
                why=f"about {size / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free",
                where=str(directory),
                tries=("free some space: docker image prune, docker buildx prune", "python -m bench --small"),
            )
        time.sleep(2)


def load(engine: DockerEngine, archive: Callable[[], Iterable[bytes]]) -> float:
    """Load an archive and return the seconds that took."""
    started = time.monotonic()
    engine.load(archive())
    return time.monotonic() - started
