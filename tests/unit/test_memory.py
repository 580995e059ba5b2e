"""What was worked out once is known as long as all that it was worked out from is the same, and the file is whole."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from builder import memory
from builder.memory import recall, remember
from builder.store import Store

KEY = {"version": 1, "of": ["a", "b"]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def kept(store: Store, kind: str = "things") -> Path:
    (path,) = (store.root / kind).iterdir()
    return path


@pytest.mark.parametrize("content", [b"", b"x", b"\0\xff\n" * 100_000])
def test_it_comes_back_byte_for_byte(store: Store, content: bytes) -> None:
    assert recall(store, "things", KEY) is None
    remember(store, "things", KEY, content)
    assert recall(store, "things", KEY) == content
    assert recall(store, "things", {"of": ["a", "b"], "version": 1}) == content, "no order of a key means anything"
    assert kept(store).stat().st_size < 3000


@pytest.mark.parametrize("key", [{**KEY, "version": 2}, {**KEY, "of": ["b", "a"]}, {}, None, "a"])
def test_another_key_is_another_thing(store: Store, key: object) -> None:
    remember(store, "things", KEY, b"content")
    assert recall(store, "things", key) is None
    assert recall(store, "other", KEY) is None
    remember(store, "things", key, b"other")
    assert recall(store, "things", KEY) == b"content"


def test_what_lies_under_the_name_of_another_is_not_taken_for_it(store: Store) -> None:
    remember(store, "things", KEY, b"content")
    mine = kept(store)
    remember(store, "things", {**KEY, "version": 2}, b"newer")
    (newer,) = [path for path in mine.parent.iterdir() if path != mine]
    mine.write_bytes(newer.read_bytes())
    assert recall(store, "things", KEY) is None


def test_no_damage_goes_unnoticed(store: Store) -> None:
    remember(store, "things", KEY, b"content")
    whole = kept(store).read_bytes()
    seal = whole.partition(b"\n")[0]
    # Bits behind the end of what was packed, which zlib does not look at, change nothing.
    forms = [whole[:size] for size in range(len(whole))]
    forms += [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (0, 7)
    ]
    forms += [b"\xff" * 64 + whole[64:], seal + b"\n" + zlib.compress(b"other"), b"content", b"{}"]
    for form in forms:
        kept(store).write_bytes(form)
        assert recall(store, "things", KEY) in (None, b"content"), form
    kept(store).write_bytes(seal + b"\n" + zlib.compress(b"other"))
    assert recall(store, "things", KEY) is None
    remember(store, "things", KEY, b"content")
    assert kept(store).read_bytes() == whole


def test_how_it_is_packed_is_not_part_of_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(store, "things", KEY, b"content" * 1000)
    monkeypatch.setattr(memory, "_LEVEL", 1)
    assert recall(store, "things", KEY) == b"content" * 1000
