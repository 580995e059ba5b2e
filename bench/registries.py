"""Where images are pushed to: Debian's docker-registry with a directory of its own, and a sink that keeps nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

from bench.sink import COUNTS
from builder.errors import SourceError, ToolError

_TICKS = os.sysconf("SC_CLK_TCK")
_START_S = 20


@dataclass
class Server:
    """A program that takes images on a port of this machine, while its context is open."""

    directory: Path
    """Its own; gone afterwards."""
    port: int = field(default=0, init=False)
    _process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Self:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self.directory)

    def _begin(self) -> None:
        raise NotImplementedError

    @property
    def host(self) -> str:
        """Where it is."""
        return f"127.0.0.1:{self.port}"

    @property
    def cpu_seconds(self) -> float:
        """What it has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def requests(self) -> Counter[str]:
        """How often it was asked so far, by method."""
        raise NotImplementedError

    @property
    def received(self) -> int:
        """Bytes of blobs so far."""
        raise NotImplementedError

    def has(self, repository: str, digest: str) -> bool:
        """Tell whether it has an image."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(
                "HEAD", f"/v2/{repository}/manifests/{digest}",
                headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
            )  # fmt: skip
            return connection.getresponse().status == 200


class Sink(Server):
    """The least that a registry can do."""

    keeps = False

    def _begin(self) -> None:
        argv = [sys.executable, "-m", "bench.sink", *(["--keep", str(self.directory)] if self.keeps else [])]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def requests(self) -> Counter[str]:
        """How often it was asked so far, by method."""
        return Counter(self._counts()["requests"])

    @property
    def received(self) -> int:
        """Bytes of blobs so far, those that came twice counted twice."""
        return int(self._counts()["received"])

    def _counts(self) -> dict[str, Any]:
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", COUNTS)
            found: dict[str, Any] = json.loads(connection.getresponse().read())
            return found


class KeepingSink(Sink):
    """The least that a registry can do that keeps what it gets."""

    keeps = True


class DockerRegistry(Server):
    """Debian's docker-registry as its package has it, but for the directory and the port; it logs what it is asked."""

    def _begin(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        configuration = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "data")}},
            "http": {"addr": self.host},
        }
        file = self.directory / "config.yml"
        file.write_text(json.dumps(configuration))
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    ["docker-registry", "serve", str(file)], stdout=log, stderr=subprocess.DEVNULL
                )
            except FileNotFoundError:
                raise ToolError(
                    "docker-registry is missing", tries=("install Debian's package of that name",)
                ) from None
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SourceError("docker-registry does not answer", where=self.host)
            time.sleep(0.05)

    @property
    def _log(self) -> Path:
        return self.directory / "access.log"

    @property
    def requests(self) -> Counter[str]:
        """How often it was asked so far, by method."""
        return asked(self._log.read_text("utf-8", "replace"))

    @property
    def received(self) -> int:
        """Bytes that it has stored so far."""
        blobs = self.directory / "data" / "docker" / "registry" / "v2" / "blobs"
        return sum(path.stat().st_size for path in blobs.rglob("data"))


def asked(log: str) -> Counter[str]:
    """Return how often each method stands in a log of requests in the combined format, but for /v2/ itself."""
    return Counter(re.findall(r'"([A-Z]+) /v2/\S+ HTTP/1\.\d" \d{3} ', log))
