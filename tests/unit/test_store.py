"""The store holds whole files only, whatever ends a writer and however many there are."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.errors import DiskError, HashMismatchError
from builder.store import BlobWriter, Store, write_atomically

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def files_of(store: Store) -> set[str]:
    """Return all files but the locks, which are empty."""
    return {
        str(path.relative_to(store.root))
        for path in store.root.rglob("*")
        if path.is_file() and path.parent.name != "locks"
    }


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE)


def killed(code: str, *arguments: str) -> None:
    """Run `code` until it prints, then kill it as the kernel would."""
    with python(code, *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


# --- blobs


def test_put_and_find(store: Store) -> None:
    assert store.put(CONTENT) == SHA256
    assert store.path(SHA256).read_bytes() == CONTENT
    assert store.has(SHA256)
    assert store.has(SHA256, size=len(CONTENT))
    assert not store.has(SHA256, size=len(CONTENT) + 1)
    assert not store.has("0" * 64)
    assert store.path(SHA256).stat().st_mode & 0o777 == 0o444
    assert files_of(store) == {f"blobs/{SHA256}"}


def test_put_of_nothing(store: Store) -> None:
    assert store.path(store.put(b"")).read_bytes() == b""


def test_put_replaces_a_blob_of_the_wrong_size(store: Store) -> None:
    store.path(SHA256).write_bytes(CONTENT[:-1])
    store.put(CONTENT)
    assert store.path(SHA256).read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_not_kept(store: Store) -> None:
    with store.writer(SHA256, "some-1.0.whl") as writer:
        writer.write(b"something else")
        with pytest.raises(HashMismatchError) as caught:
            writer.commit()
    (problem,) = caught.value.problems
    assert "some-1.0.whl" in problem.what
    assert SHA256 in problem.why
    assert hashlib.sha256(b"something else").hexdigest() in problem.why
    assert files_of(store) == set()


def test_a_writer_can_start_over_after_wrong_bytes(store: Store) -> None:
    with store.writer(SHA256, "some-1.0.whl") as writer:
        writer.write(b"something else")
        with pytest.raises(HashMismatchError):
            writer.commit()
        assert writer.offset == 0
        writer.write(CONTENT)
        writer.commit()
    assert store.path(SHA256).read_bytes() == CONTENT


def test_an_interrupted_blob_is_no_blob_and_is_resumed(store: Store) -> None:
    def interrupted() -> None:
        with store.writer(SHA256, "x") as writer:
            writer.write(CONTENT[:1000])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not store.has(SHA256)
    with store.writer(SHA256, "x") as writer:
        assert writer.offset == 1000
        writer.write(CONTENT[1000:])
        assert not store.has(SHA256)
        assert writer.commit() == store.path(SHA256)
    assert store.path(SHA256).read_bytes() == CONTENT
    assert files_of(store) == {f"blobs/{SHA256}"}


def test_restart_drops_what_was_written(store: Store) -> None:
    with store.writer(SHA256, "x") as writer:
        writer.write(b"not this")
        writer.restart()
        assert writer.offset == 0
        writer.write(CONTENT)
        writer.commit()
    assert store.path(SHA256).read_bytes() == CONTENT


def test_a_writer_that_wrote_nothing_leaves_nothing(store: Store) -> None:
    with store.writer(SHA256, "x"):
        pass
    assert files_of(store) == set()


def test_put_ignores_what_another_left_unfinished(store: Store) -> None:
    (store.root / "partial" / SHA256).write_bytes(b"rubbish")
    store.put(CONTENT)
    assert store.path(SHA256).read_bytes() == CONTENT


def test_kill_in_the_middle_of_a_blob(store: Store) -> None:
    code = """
import sys, time
from pathlib import Path
from builder.store import Store
with Store.open(Path(sys.argv[1])).writer(sys.argv[2], "x") as writer:
    writer.write(bytes(range(256)) * 10)
    print("now", flush=True)
    time.sleep(60)
"""
    killed(code, str(store.root), SHA256)
    assert not store.has(SHA256)
    with store.writer(SHA256, "x") as writer:  # its lock died with the process
        assert writer.offset == 2560
        writer.write(CONTENT[2560:])
        writer.commit()
    assert store.path(SHA256).read_bytes() == CONTENT


def test_kill_before_the_rename_of_a_blob(store: Store) -> None:
    code = """
import os, sys, time
from pathlib import Path
from builder.store import Store
def stop(*_):
    print("now", flush=True)
    time.sleep(60)
Path.replace = stop
Store.open(Path(sys.argv[1])).put(bytes(range(256)) * 4096)
"""
    killed(code, str(store.root))
    assert not store.has(SHA256)
    with store.writer(SHA256, "x") as writer:
        assert writer.offset == len(CONTENT)
        writer.commit()
    assert store.path(SHA256).read_bytes() == CONTENT


# --- several at once


def test_threads_that_put_one_blob(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []
    commit = BlobWriter.commit

    def counting(self: BlobWriter) -> Path:
        time.sleep(0.01)
        commits.append(threading.get_ident())
        return commit(self)

    monkeypatch.setattr(BlobWriter, "commit", counting)
    barrier = threading.Barrier(8)

    def put(_: int) -> str:
        barrier.wait()
        return store.put(CONTENT)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(put, range(8))) == {SHA256}
    assert len(commits) == 1
    assert store.path(SHA256).read_bytes() == CONTENT
    assert files_of(store) == {f"blobs/{SHA256}"}


def test_processes_that_put_one_blob(store: Store) -> None:
    code = """
import sys
from pathlib import Path
from builder.store import Store
store = Store.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
print(store.put(bytes(range(256)) * 4096), flush=True)
"""
    processes = [python(code, str(store.root)) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        with process:
            assert process.stdout is not None
            assert process.stdout.read().decode().strip() == SHA256
        assert process.returncode == 0
    assert store.path(SHA256).read_bytes() == CONTENT
    assert files_of(store) == {f"blobs/{SHA256}"}


def test_a_second_writer_waits_for_the_first(store: Store) -> None:
    order: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with store.writer(SHA256, "x") as writer:
            inside.set()
            time.sleep(0.05)
            order.append("first")
            writer.write(CONTENT)
            writer.commit()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with store.writer(SHA256, "x") as writer:
        order.append("second")
        assert store.has(SHA256)
        assert writer.offset == 0
    thread.join()
    assert order == ["first", "second"]


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.25 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1280k", "tmpfs", str(directory)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_is_named_and_leaves_no_blob(small_disk: Path) -> None:
    store = Store.open(small_disk / "home")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(768 << 10))

    def fill() -> None:
        with store.writer(SHA256, "x") as writer:
            for start in range(0, len(CONTENT), 5000):
                writer.write(CONTENT[start : start + 5000])

    with pytest.raises(DiskError) as caught:
        fill()
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(small_disk))
    assert "MB are free" in problem.why
    assert not store.has(SHA256)
    ballast.unlink()
    with store.writer(SHA256, "x") as writer:  # what was written is the right start
        assert 0 < writer.offset < len(CONTENT)
        writer.write(CONTENT[writer.offset :])
        writer.commit()
    assert store.path(SHA256).read_bytes() == CONTENT


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "pylock.toml"
    write_atomically(path, b"old")
    with pytest.raises(DiskError):
        write_atomically(path, bytes(2 << 20))
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


def test_a_disk_that_fills_up_when_the_blob_is_made_durable(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError):
        store.put(CONTENT)
    assert not store.has(SHA256)
    with pytest.raises(DiskError):
        write_atomically(store.root / "file", b"new")
    assert not (store.root / "file").exists()


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "directory", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


# --- files replaced whole


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_kill_between_write_and_rename_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pylock.toml"
    write_atomically(path, b"old")
    code = """
import sys, time
from pathlib import Path
from builder.store import write_atomically
def stop(*_):
    print("now", flush=True)
    time.sleep(60)
Path.replace = stop
write_atomically(Path(sys.argv[1]), b"new and never whole")
"""
    killed(code, str(path))
    assert path.read_bytes() == b"old"
    write_atomically(path, b"next")
    assert path.read_bytes() == b"next"
    assert list(tmp_path.iterdir()) == [path]  # what the killed one left is gone as well


def test_readers_see_one_version_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = [bytes([number]) * 100_000 for number in range(4)]
    write_atomically(path, versions[0])
    done = threading.Event()

    def write(content: bytes) -> None:
        for _ in range(10):
            write_atomically(path, content)

    def read() -> int:
        count = 0
        while not done.is_set():
            assert path.read_bytes() in versions
            count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, content) for content in versions]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert reader.result() > 0
    assert list(tmp_path.iterdir()) == [path]


# --- the rest


def test_a_damaged_blob_is_found_and_removed(store: Store) -> None:
    store.put(CONTENT)
    assert store.verify(SHA256)
    path = store.path(SHA256)
    path.chmod(0o644)
    path.write_bytes(CONTENT[:-1] + b"\0")
    assert not store.verify(SHA256)
    assert not store.has(SHA256)
    assert not store.verify(SHA256)


def test_links_are_no_copies(store: Store, tmp_path: Path) -> None:
    store.put(CONTENT)
    for _ in range(2):
        store.link(tmp_path / "wheels", {"a-1.0.whl": SHA256})
    assert (tmp_path / "wheels" / "a-1.0.whl").samefile(store.path(SHA256))


def test_scratch_is_empty_and_goes_away(store: Store) -> None:
    left = store.root / "work" / "job"
    left.mkdir()
    (left / "left-by-a-killed-run").touch()

    def interrupted() -> None:
        with store.scratch("job") as directory:
            assert list(directory.iterdir()) == []
            (directory / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not left.exists()


def test_the_home_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "there"))
    assert Store.open().root == tmp_path / "there"
