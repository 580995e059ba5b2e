"""The journal of pushes: what a killed push leaves, and that nothing depends on it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from builder.journal import Journal
from builder.store import Store

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
HOST, REPOSITORY = "registry.example:5000", "team/app"


def file_of(store: Store) -> Path:
    (path,) = (store.root / "pushes").iterdir()
    return path


def test_what_was_noted_is_known_later(store: Store) -> None:
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        assert not journal.has_read_back(A)
        journal.note_read_back(A)
        journal.note_blob(B)
        assert journal.has_read_back(A)
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        assert journal.has_read_back(A)
        assert not journal.has_read_back(B), "a blob is no manifest"
    with Journal.opened(store, HOST, "team/other") as journal:
        assert not journal.has_read_back(A), "another repository is another journal"


def test_nothing_is_noted_twice(store: Store) -> None:
    for _ in range(3):
        with Journal.opened(store, HOST, REPOSITORY) as journal:
            journal.note_blob(A)
            journal.note_blob(A)
    assert len(file_of(store).read_bytes().splitlines()) == 2


def test_where_else_a_blob_is(store: Store) -> None:
    for repository, digest in (("team/one", A), ("team/two", A), ("team/two", B)):
        with Journal.opened(store, HOST, repository) as journal:
            journal.note_blob(digest)
    with Journal.opened(store, "other.example", "team/three") as journal:
        journal.note_blob(A)
    with Journal.opened(store, HOST, "team/one") as journal:
        assert journal.elsewhere(A) == ("team/two",)
        assert journal.elsewhere(C) == ()
    with Journal.opened(store, HOST, "team/four") as journal:
        assert sorted(journal.elsewhere(A)) == ["team/one", "team/two"]


def test_a_repository_that_is_none_is_not_asked(store: Store) -> None:
    (store.root / "pushes").mkdir()
    for name in ("../../x", "a?from=b", "A", "", None, 7):
        head = {"schema": 1, "registry": HOST, "repository": name}
        path = store.root / "pushes" / f"{name!r:.5}.jsonl".replace("/", "_")
        path.write_text(f"{json.dumps(head)}\n{json.dumps({'blob': A})}\n")
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        assert journal.elsewhere(A) == ()


@pytest.mark.parametrize(
    "rest", ["", '{"blob": "sha', "\x00" * 40, "[]", '{"blob": 7}\n', '{"blob": "sha256:zz"}\n', "[" * 99999]
)
def test_what_was_broken_off_was_not_written(store: Store, rest: str) -> None:
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        journal.note_blob(A)
        journal.note_read_back(B)
    path = file_of(store)
    path.write_bytes(path.read_bytes() + rest.encode())
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        assert journal.has_read_back(B)
        journal.note_blob(C)
    with Journal.opened(store, HOST, "team/other") as journal:
        assert journal.elsewhere(A) == journal.elsewhere(C) == (REPOSITORY,)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"schema": 2}\n', b'{"schema": 1, "registry": "x"}\n'])
def test_a_journal_that_is_none_is_begun_anew(store: Store, content: bytes) -> None:
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        journal.note_blob(A)
    file_of(store).write_bytes(content)
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        journal.note_blob(B)
    with Journal.opened(store, HOST, "team/other") as journal:
        assert journal.elsewhere(B) == (REPOSITORY,)


def test_it_may_be_deleted(store: Store) -> None:
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        journal.note_read_back(A)
    file_of(store).unlink()
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        assert not journal.has_read_back(A)


def test_threads_write_whole_lines(store: Store) -> None:
    digests = [f"sha256:{number:064x}" for number in range(200)]
    with Journal.opened(store, HOST, REPOSITORY) as journal:
        threads = [
            threading.Thread(target=lambda part: list(map(journal.note_blob, part)), args=(digests[start::4],))
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal.opened(store, HOST, "team/other") as journal:
        assert all(journal.elsewhere(digest) == (REPOSITORY,) for digest in digests)


def test_a_killed_push_leaves_what_it_noted(store: Store) -> None:
    code = f"""
import os, signal
from pathlib import Path
from builder.journal import Journal
from builder.store import Store
with Journal.opened(Store.open(Path({str(store.root)!r})), {HOST!r}, {REPOSITORY!r}) as journal:
    journal.note_read_back({A!r})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    with Journal.opened(store, HOST, REPOSITORY) as journal:  # and the lock died with it
        assert journal.has_read_back(A)
