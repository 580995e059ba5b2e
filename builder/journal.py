"""What was pushed where, noted as it happens: a push that was killed goes on, and blobs are mounted where they can be.

Nothing here is trusted. Registries say what they have; the journal saves asking twice, and says where asking is worth
it. It may be deleted at any time. It holds names of registries and repositories, and no address: that may be a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

from builder.reference import REPOSITORY
from builder.store import Store, named_enospc, write_atomically

SCHEMA = 1
BLOB, MANIFEST, REFERRER = "blob", "manifest", "referrer"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Journal:
    """The pushes from one store to one repository."""

    def __init__(self, store: Store, registry: str, repository: str) -> None:
        self._directory = store.root / "pushes"
        self._head = {"schema": SCHEMA, "registry": registry, "repository": repository}
        self._path = self._directory / f"{_name(registry, repository)}.jsonl"
        self._guard = threading.Lock()
        head, self._noted = _read(self._path)
        self._is_whole = head == self._head and self._path.read_bytes().endswith(b"\n")

    @classmethod
    @contextlib.contextmanager
    def opened(cls, store: Store, registry: str, repository: str) -> Iterator[Self]:
        """Yield the journal of a repository, to which nobody else pushes from this store meanwhile."""
        with store.lock(f"push-{_name(registry, repository)}"):
            journal = cls(store, registry, repository)
            journal._begin()
            yield journal

    def _begin(self) -> None:
        """Write a file to which lines can be added, without what a kill broke off."""
        if not self._is_whole:
            self._directory.mkdir(exist_ok=True)
            lines = [_line(self._head), *(_line({kind: digest}) for digest, kind in self._noted.items())]
            write_atomically(self._path, b"".join(lines))

    def has_read_back(self, digest: str) -> bool:
        """Tell whether the manifest came back from the repository byte for byte."""
        return self._noted.get(digest) == MANIFEST

    def elsewhere(self, digest: str) -> tuple[str, ...]:
        """Return the other repositories of the registry to which an image with this blob was pushed."""
        return tuple(name for name, noted in self._others.items() if digest in noted)

    @cached_property
    def _others(self) -> Mapping[str, Mapping[str, str]]:
        found = {}
        for path in sorted(self._directory.glob("*.jsonl")):
            head, noted = _read(path)
            name = head.get("repository") if head and head.get("registry") == self._head["registry"] else None
            if path != self._path and isinstance(name, str) and REPOSITORY.fullmatch(name):
                found[name] = noted
        return found

    def note_blob(self, digest: str) -> None:
        """Note that the repository has a blob."""
        self._note(BLOB, digest)

    def note_read_back(self, digest: str) -> None:
        """Note that a manifest came back from the repository byte for byte."""
        self._note(MANIFEST, digest)

    def note_attached(self, digest: str) -> None:
        """Note the manifest of a statement that this store attached to an image there, or found to be of its key."""
        self._note(REFERRER, digest)

    def has_attached(self, digest: str) -> bool:
        """Tell whether that was noted of a statement."""
        return self._noted.get(digest) == REFERRER

    def _note(self, kind: str, digest: str) -> None:
        with self._guard:
            if digest not in self._noted:
                self._noted[digest] = kind
                with named_enospc(self._path), self._path.open("ab") as file:
                    file.write(_line({kind: digest}))


def _name(registry: str, repository: str) -> str:
    return hashlib.sha256(f"{registry}/{repository}".encode()).hexdigest()[:32]


def _line(document: Mapping[str, object]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _read(path: Path) -> tuple[dict[str, object] | None, dict[str, str]]:
    """Return the head of a journal and what is noted in it, by digest; what is no line of one was not written."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return None, {}
    head: dict[str, object] | None = None
    noted: dict[str, str] = {}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(line)
            if not isinstance(document, dict):
                continue
            if document.get("schema") == SCHEMA:
                head = document
            for kind in (BLOB, MANIFEST, REFERRER):
                if _DIGEST.fullmatch(str(document.get(kind))):
                    noted[document[kind]] = kind
    return head, noted
