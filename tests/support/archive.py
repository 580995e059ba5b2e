"""Debian's archive as a few packages: what it has now, what they need, and when its lists were signed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

from builder import debian
from builder.debian import Deb, Resolution
from builder.errors import ToolError

EPOCH = 1_700_000_000


def deb(name: str, version: str = "1-1", *, filename: str | None = None) -> Deb:
    return Deb(
        name=name,
        version=version,
        architecture="amd64",
        filename=filename or f"pool/main/{name[0]}/{name}/{name}_{version}_amd64.deb",
        sha256=hashlib.sha256(f"{name} {version}".encode()).hexdigest(),
        size=len(name),
    )


@dataclass
class FakeArchive:
    """Has one version of each package; `needs` names what a package brings besides itself."""

    versions: dict[str, str]
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    epoch: int = EPOCH
    asked: list[tuple[str, ...]] = field(default_factory=list)
    """What was resolved, in the order of asking."""

    def _found(self, names: Iterable[str]) -> dict[str, Deb]:
        found: dict[str, Deb] = {}
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in self.versions:
                raise ToolError(f"E: Unable to locate package {name}")
            if name not in found:
                found[name] = deb(name, self.versions[name])
                todo += self.needs.get(name, ())
        return found

    def resolve(self, packages: Iterable[str]) -> Resolution:
        self.asked.append(tuple(packages))
        found = self._found(["base-files", *self.asked[-1]])
        return Resolution(debs=tuple(found[name] for name in sorted(found)), epoch=self.epoch)

    def extend(self, debs: Sequence[Deb], packages: Iterable[str]) -> Resolution:
        self.asked.append(tuple(packages))
        found = self._found([*(one.name for one in debs), *self.asked[-1]])
        for one in debs:
            if found[one.name] != one:
                raise ToolError(f"E: Version '{one.version}' for '{one.name}' was not found")
        return Resolution(debs=tuple(found[name] for name in sorted(found)), epoch=self.epoch)


@contextlib.contextmanager
def served(archive: FakeArchive) -> Iterator[FakeArchive]:
    """Have this archive answer for every suite."""

    @contextlib.contextmanager
    def opened(**_: str) -> Iterator[FakeArchive]:
        yield archive

    with mock.patch.object(debian, "archive", opened):
        yield archive
