"""The lock of a base as a value and as a file: what was resolved once, to be made into an image any time."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from builder import debian
from builder.debian import Deb
from builder.errors import LockError, Problem
from builder.layout import canonical_json

SCHEMA = 1

RELOCK = "torchyard lock --bases makes a new lock from what the mirror has now"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BaseLock:
    """Everything a base is made from: `packages` as people asked for them, `debs` as apt resolved them.

    `epoch` (seconds) dates every file of the image. It is the newest `Date:` of the signed Release files that
    the packages were resolved from: an input like the packages themselves, and newer than any of them.
    """

    suite: str
    architecture: str
    packages: tuple[str, ...]
    epoch: int
    debs: tuple[Deb, ...]

    @property
    def name(self) -> str:
        """What people call the base: suite and architecture."""
        return f"{self.suite}-{self.architecture}"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the lock's content, whatever its spelling."""
        return hashlib.sha256(canonical_json({"schema": SCHEMA, **_content(self)})).hexdigest()

    def lacking(self, base: BaseLock) -> tuple[str, ...]:
        """Return the names of the packages of `base` that this lock has not, or not in the same version."""
        return tuple(sorted(deb.name for deb in set(base.debs) - set(self.debs)))

    @property
    def size(self) -> int:
        """Bytes of all packages together."""
        return sum(deb.size for deb in self.debs)

    @property
    def python(self) -> str | None:
        """The minor version of the `python3` package ("3.11"), or None where it is not among the packages."""
        for deb in self.debs:
            if deb.name == "python3":
                return ".".join(deb.version.split(":")[-1].split(".")[:2])
        return None


def _content(lock: BaseLock) -> dict[str, Any]:
    return {
        "suite": lock.suite,
        "architecture": lock.architecture,
        "packages": list(lock.packages),
        "epoch": lock.epoch,
        "deb": [
            {
                "name": deb.name,
                "version": deb.version,
                "architecture": deb.architecture,
                "filename": deb.filename,
                "sha256": deb.sha256,
                "size": deb.size,
            }
            for deb in lock.debs
        ],
    }


def dumps(lock: BaseLock) -> str:
    """Return `lock` as TOML, closed by a digest over its content."""
    content = _content(lock)
    debs = content.pop("deb")
    document = {"schema": SCHEMA, "digest": f"sha256:{lock.digest}", **content, "deb": debs}
    head = "# Made by `torchyard lock --bases`. It is checked against its own digest: do not edit.\n"
    return head + tomli_w.dumps(document)


class _Reader:
    """Takes fields out of a parsed lock and gathers every problem with them, so that all are told at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []

    def problem(self, field: str, what: str, why: str = "") -> None:
        tries = ("restore the file from version control", RELOCK)
        self.problems.append(Problem(what=f"{field}: {what}", where=self.where, why=why, tries=tries))

    def text(self, table: Mapping[str, Any], key: str, pattern: re.Pattern[str], *, at: str = "") -> str:
        value = table.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.problem(f"{at}{key}", "missing" if value is None else f"not valid: {value!r}")
            return ""
        return value

    def number(self, table: Mapping[str, Any], key: str, *, at: str = "") -> int:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.problem(f"{at}{key}", "missing" if value is None else f"not a positive number: {value!r}")
            return 0
        return value

    def only(self, table: Mapping[str, Any], known: Iterable[str], *, at: str = "") -> None:
        for key in sorted(set(table) - set(known)):
            self.problem(f"{at}{key}", "not a field of this schema")

    def stop_if_any(self) -> None:
        if self.problems:
            raise LockError(problems=tuple(self.problems))


def loads(text: str, *, where: str) -> BaseLock:
    """Read a lock; raises LockError, naming `where` and each bad field, if it is damaged or edited."""
    read = _Reader(where)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        read.problem("syntax", "not a TOML document, or cut off", why=str(error))
        read.stop_if_any()
        raise
    if document.get("schema") != SCHEMA:
        read.problem(
            "schema",
            "missing" if "schema" not in document else f"unknown: {document['schema']!r}",
            why=f"this version of torchyard reads schema {SCHEMA}",
        )
        read.stop_if_any()
    lock = _read_content(document, read)
    read.stop_if_any()
    if document["digest"] != f"sha256:{lock.digest}":
        read.problem(
            "digest",
            "the content is not what was locked: the file was edited, or damaged",
            why=f"it says {document['digest']}, its content has sha256:{lock.digest}",
        )
        read.stop_if_any()
    return lock


def _read_content(document: Mapping[str, Any], read: _Reader) -> BaseLock:
    read.only(document, ("schema", "digest", "suite", "architecture", "packages", "epoch", "deb"))
    read.text(document, "digest", _DIGEST)
    suite = read.text(document, "suite", debian.SUITE)
    architecture = read.text(document, "architecture", re.compile("|".join(debian.ARCHITECTURES)))
    epoch = read.number(document, "epoch")
    packages = document.get("packages")
    if not isinstance(packages, list) or not packages:
        read.problem("packages", "missing, or not a list of names")
        packages = []
    for n, name in enumerate(packages):
        if not isinstance(name, str) or not debian.NAME.fullmatch(name):
            read.problem(f"packages[{n}]", f"not a package name: {name!r}")
    tables = document.get("deb")
    if not isinstance(tables, list) or not tables:
        read.problem("deb", "missing, or not a list of tables")
        tables = []
    debs = []
    for n, table in enumerate(tables):
        at = f"deb[{n}]."
        if not isinstance(table, dict):
            read.problem(at.rstrip("."), "not a table")
            continue
        read.only(table, ("name", "version", "architecture", "filename", "sha256", "size"), at=at)
        debs.append(
            Deb(
                name=read.text(table, "name", debian.NAME, at=at),
                version=read.text(table, "version", debian.VERSION, at=at),
                architecture=read.text(table, "architecture", re.compile(f"all|{architecture}"), at=at),
                filename=read.text(table, "filename", debian.FILENAME, at=at),
                sha256=read.text(table, "sha256", _SHA256, at=at),
                size=read.number(table, "size", at=at),
            )
        )
    for field in ("name", "filename", "sha256"):
        seen: dict[str, int] = {}
        for n, deb in enumerate(debs):
            value = getattr(deb, field)
            if value and value in seen:
                read.problem(f"deb[{n}].{field}", f"{value} is there twice, first in deb[{seen[value]}]")
            seen.setdefault(value, n)
    for name in sorted({name for name in packages if isinstance(name, str)} - {deb.name for deb in debs}):
        read.problem("packages", f"{name} was asked for and is not among the packages locked")
    return BaseLock(
        suite=suite,
        architecture=architecture,
        epoch=epoch,
        debs=tuple(debs),
        packages=tuple(name for name in packages if isinstance(name, str)),
    )
