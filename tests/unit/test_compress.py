"""Gzip: the same bytes whatever the pieces, the threads and the machine."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import deflate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import compress
from builder.errors import ToolError
from builder.store import Store


def noise(size: int) -> bytes:
    return random.Random(7).randbytes(size // 2) + bytes(size - size // 2)


@pytest.mark.parametrize(
    "size",
    [0, 1, compress.CHUNK - 1, compress.CHUNK, compress.CHUNK + 1, 3 * compress.CHUNK + 5],
)
def test_gzip_is_read_back(store: Store, scratch: Path, size: int) -> None:
    content = noise(size)
    made = compress.gzip_blob(store, [content], scratch=scratch)
    blob = store.path(made.sha256).read_bytes()
    assert gzip.decompress(blob) == content
    assert made.sha256 == hashlib.sha256(blob).hexdigest()
    assert made.size == len(blob)
    assert made.content_sha256 == hashlib.sha256(content).hexdigest()
    assert list(scratch.iterdir()) == []


@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(min_value=0, max_value=2 * compress.CHUNK + 9), max_size=6),
    workers=st.integers(min_value=1, max_value=5),
)
def test_gzip_depends_neither_on_pieces_nor_on_workers(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    workers: int,
) -> None:
    store = Store.open(tmp_path_factory.mktemp("home"))
    content = noise(2 * compress.CHUNK + 9)
    edges = [0, *sorted(cuts), len(content)]
    with store.scratch("x") as scratch, compress.GzipWriter(store, scratch, workers=workers) as writer:
        for start, end in itertools.pairwise(edges):
            writer.write(content[start:end])
        made = writer.finish()
    assert made.sha256 == NOISE


# The guard of the compressor: libdeflate 1.26, level 6, 4 MiB members.
NOISE = "59ee4c4630aa59627f5c22e3346bfb9fe9c2d742a90708ec1b65a906c54921ff"


def test_members_are_cut_at_fixed_places(store: Store, scratch: Path) -> None:
    content = noise(compress.CHUNK + 5)
    made = compress.gzip_blob(store, [content], scratch=scratch)
    members = compress.member(content[: compress.CHUNK]) + compress.member(content[compress.CHUNK :])
    assert store.path(made.sha256).read_bytes() == members


def test_headers_say_nothing() -> None:
    assert compress.member(noise(10))[:10] == bytes.fromhex("1f8b08000000000000ff")


def test_an_interrupted_blob_leaves_nothing(store: Store, scratch: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield noise(compress.CHUNK)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.gzip_blob(store, broken(), scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert list((store.root / "blobs").iterdir()) == []


def test_an_equal_blob_is_not_stored_twice(store: Store, scratch: Path) -> None:
    first = compress.gzip_blob(store, [b"same"], scratch=scratch)
    before = store.path(first.sha256).stat().st_ino
    assert compress.gzip_blob(store, [b"same"], scratch=scratch) == first
    assert store.path(first.sha256).stat().st_ino == before


def test_another_compressor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deflate, "gzip_compress", lambda data, _level: gzip.compress(data, mtime=0))
    compress._require_known_compressor.cache_clear()
    with pytest.raises(ToolError, match="not the one image digests were made with"):
        compress.member(b"")
