"""SLSA provenance of an image: which inputs, byte for byte, it was made from; and those inputs back from it.

Most provenance names inputs. This one holds those that people write and lock, a few hundred kilobytes, so that whoever
has only the image can make it again: wheels and Debian packages are in the locks by digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from builder import __version__
from builder.baselock import BaseLock
from builder.debian import Deb
from builder.errors import MatrixError
from builder.foreign import quoted
from builder.lock import Wheel
from builder.project import Project
from builder.render import Plan
from builder.statement import Predicate, Statement

BUILD_TYPE = "urn:torchyard:build:v1"
"""What the parameters mean: this module's docstrings, for each version."""
SOMEBODY = "urn:torchyard:builder:unnamed"
"""Who built it, if nobody says: one who can be trusted as far as the key that signs."""
INPUT_MAX = 4 << 20
"""Bytes of one input."""

_BUILDER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]{1,500}")
_CELL = re.compile(r"[a-z0-9][a-z0-9._-]{0,200}")
_INPUT = re.compile(r"matrix\.yaml|images/(?:bases|[a-z0-9][a-z0-9._-]{0,200})/[a-z0-9][a-z0-9._-]{0,200}\.toml")
"""Paths that an input may have: nothing of a stranger's is written anywhere else."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a provenance says: what was made, by which torchyard, from which inputs."""

    cell_id: str
    torchyard: str
    """Version that made it."""
    plan: str
    """Hex digest of all that decided what the image is; another torchyard may render another plan."""
    builder: str
    inputs: Mapping[str, bytes]
    """The project's files by their paths in it."""
    materials: frozenset[tuple[str, str]]
    """Name and hex digest of everything that it says went into the image."""

    @classmethod
    def read(cls, statement: Statement, *, where: str) -> Self:
        """Read a provenance; raises MatrixError if it is not of torchyard's kind, or has inputs of another."""
        try:
            definition = statement.predicate["buildDefinition"]
            if definition["buildType"] != BUILD_TYPE:
                raise _unfit(where, f"it describes a build of type {quoted(str(definition['buildType']))}")
            asked, internal = definition["externalParameters"], definition["internalParameters"]
            inputs = {str(path): str(text).encode() for path, text in asked["inputs"].items()}
            made = cls(
                cell_id=str(asked["cell"]),
                torchyard=str(internal["torchyard"]),
                plan=str(internal["plan"]),
                builder=str(statement.predicate["runDetails"]["builder"]["id"]),
                inputs=inputs,
                materials=named(definition["resolvedDependencies"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _unfit(where, f"it lacks something, or has it in another form: {error}") from None
        except UnicodeEncodeError:
            raise _unfit(where, "an input is not text") from None
        for path, content in inputs.items():
            if not _INPUT.fullmatch(path) or ".." in path:
                raise _unfit(where, f"it has an input where none belongs: {quoted(path)}")
            if len(content) > INPUT_MAX:
                raise _unfit(where, f"its {path} has {len(content)} bytes")
        if "matrix.yaml" not in inputs or not _CELL.fullmatch(made.cell_id):
            raise _unfit(where, "it has no matrix, or names no cell")
        return made

    def restore(self, directory: Path) -> Project:
        """Write the inputs into an empty directory; returns it as a project like any other."""
        for path, content in sorted(self.inputs.items()):
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return Project(directory / "matrix.yaml")


def named(materials: Iterable[Mapping[str, Any]]) -> frozenset[tuple[str, str]]:
    """Return name and hex digest of materials as provenance lists them."""
    return frozenset((str(one["name"]), str(one["digest"]["sha256"])) for one in materials)


def inputs(project: Project, plan: Plan) -> Mapping[str, bytes]:
    """Return the files that people wrote or locked and that decide a cell's image, by their paths in the project."""
    paths = {"matrix.yaml": project.matrix_path}
    locks = [project.lock_path(plan.cell)]
    if plan.base_lock is not None:
        locks.append(project.base_lock_path(plan.cell))
    if plan.system_lock is not None:
        locks.append(project.system_lock_path(plan.cell))
    paths |= {path.relative_to(project.root).as_posix(): path for path in locks}
    return {name: path.read_bytes() for name, path in paths.items()}


def statement(project: Project, plan: Plan, digest: str, *, builder: str = SOMEBODY) -> Statement:
    """Return what a cell's image was made from. The same inputs give the same statement: no time, no host, no path.

    `builder` is a URI of who built it, such as that of a workflow; raises MatrixError if it is none.
    """
    if not _BUILDER.fullmatch(builder):
        raise MatrixError(
            f"{quoted(builder)} is not a URI",
            why="provenance names who built an image by a URI",
            tries=("https://ci.example/publish",),
        )
    files = inputs(project, plan)
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "cell": plan.cell.id,
                "inputs": {path: content.decode() for path, content in files.items()},
            },
            "internalParameters": {
                "torchyard": __version__,
                "plan": plan.digest,
                "epoch": plan.epoch,
                "engine": "oci",
            },
            "resolvedDependencies": materials(plan, files),
        },
        "runDetails": {"builder": {"id": builder, "version": {"torchyard": __version__}}},
    }
    return Statement(digest=digest, name=plan.cell.id, predicate_type=Predicate.PROVENANCE, predicate=predicate)


def materials(plan: Plan, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return everything that went into an image, with its digest, in the order of the locks; `files` are its inputs."""
    base: list[dict[str, Any]] = []
    if plan.base_lock is None:
        reference, _, sha256 = plan.cell.base.image.partition("@sha256:")
        base.append({"name": reference, "digest": {"sha256": sha256}})
    debs = _debs(plan.system_lock or plan.base_lock)
    return [
        *(
            {"name": path, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}
            for path, content in sorted(files.items())
        ),
        {"name": "validator", "digest": {"sha256": hashlib.sha256(plan.validator).hexdigest()}},
        *base,
        *map(_deb, debs),
        *map(_wheel, plan.lock.wheels),
    ]


def _debs(lock: BaseLock | None) -> tuple[Deb, ...]:
    return lock.debs if lock is not None else ()


def _deb(deb: Deb) -> dict[str, Any]:
    return {
        "name": deb.filename.rpartition("/")[2],
        "uri": f"pkg:deb/debian/{deb.name}@{_escaped(deb.version)}?arch={deb.architecture}",
        "digest": {"sha256": deb.sha256},
    }


def _wheel(wheel: Wheel) -> dict[str, Any]:
    return {
        "name": wheel.filename,
        "uri": f"pkg:pypi/{wheel.name}@{_escaped(str(wheel.version))}",
        "digest": {"sha256": wheel.sha256},
    }


def _escaped(version: str) -> str:
    """Return a version as package URLs spell it."""
    return version.replace("+", "%2B").replace(":", "%3A").replace("~", "~")


def _unfit(where: str, why: str) -> MatrixError:
    return MatrixError("this provenance cannot be used", where=where, why=why)
