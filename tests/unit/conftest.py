"""A store of its own for each test, and a cell whose wheels and base are in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.store import Store
from tests.support.bases import Ready, fake_python, ready


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def compiled_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the test start no interpreter of a base, and wait for no disk; gives the paths of what was compiled."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with fake_python() as seen:
        yield seen


@pytest.fixture
def one(tmp_path: Path) -> Ready:
    """A cell with all that it is made from."""
    return ready(tmp_path / "home")


@pytest.fixture
def scratch(store: Store) -> Iterator[Path]:
    with store.scratch("test") as directory:
        yield directory
