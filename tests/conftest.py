"""What tests of several kinds share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.index_server import IndexServer


@pytest.fixture
def server() -> Iterator[IndexServer]:
    """A package index on the loopback interface, gone after the test."""
    with IndexServer() as running:
        yield running
