"""What tests share, and what they may need of the machine: where that is missing they are skipped, in CI they fail."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator

import pytest
import requests

from builder.engines.docker import DockerEngine
from builder.errors import EngineError
from builder.index import Configuration
from tests.support import browser
from tests.support.index_server import IndexServer

# A shell that starts the tests in the background has Ctrl-C ignored, and whatever they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def server() -> Iterator[IndexServer]:
    """A package index on the loopback interface, gone after the test."""
    with IndexServer() as running:
        yield running


@functools.cache
def _no_engine() -> str:
    with warnings.catch_warnings():
        # docker-py leaves a socket open when nobody answers; its warning must not fail whatever test comes next.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            DockerEngine().check()
        except EngineError as error:
            reason = f"no usable container engine: {error} ({error.problems[0].why})"
        else:
            reason = ""
        gc.collect()
    return reason


@functools.cache
def _no_network() -> str:
    configuration = Configuration.of_user()
    page = f"{configuration.default_index.rstrip('/')}/pip/"
    try:
        requests.get(page, timeout=10, verify=configuration.certificates or True).raise_for_status()
    except requests.RequestException as error:
        return f"the default package index does not answer: {type(error).__name__}"
    return ""


@functools.cache
def _no_debian() -> str:
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is not installed"
    if shutil.which("apt-get") is None:
        return "this machine has no apt"
    targets = subprocess.run(["apt-get", "indextargets"], capture_output=True, text=True, check=False).stdout
    return "" if "Origin: Debian" in targets else "apt of this machine knows no Debian archive"


def _no_browser() -> str:
    return "" if browser.found() else f"no Chromium on PATH: {', '.join(browser.NAMES)}"


NEEDS: dict[str, Callable[[], str]] = {
    "browser": _no_browser,
    "debian": _no_debian,
    "engine": _no_engine,
    "network": _no_network,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in NEEDS.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            if os.environ.get("CI"):
                pytest.fail(f"needed in CI: {reason}", pytrace=False)
            pytest.skip(reason)
