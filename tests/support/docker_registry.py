"""Debian's docker-registry on loopback: open, behind a password, with TLS; and a link to it that breaks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

USER, PASSWORD = "user", "s3cret-canary"
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuuMW7rijBXKQMxQs6A55XYLyzdzLF4c5S\n"
"""The password as bcrypt has it, at its lowest cost."""


@dataclass
class DockerRegistry:
    """One registry, its storage under `root`; it can be killed and started again at the same port."""

    root: Path
    closed: bool = False
    tls: tuple[Path, Path] | None = None
    """A certificate and its key."""
    port: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> str:
        """Start it on a free port, or where it was before; returns its host and port."""
        self.port = self.port or free_port()
        http: dict[str, Any] = {"addr": self.host}
        configuration: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self.root / "data")}, "delete": {"enabled": True}},
            "http": http,
        }
        if self.closed:
            (self.root / "htpasswd").write_text(HTPASSWD)
            configuration["auth"] = {"htpasswd": {"realm": "test", "path": str(self.root / "htpasswd")}}
        if self.tls:
            http["tls"] = {"certificate": str(self.tls[0]), "key": str(self.tls[1])}
        file = self.root / "config.yml"
        file.write_text(json.dumps(configuration))
        try:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError:
            reason = "docker-registry (Debian's package of that name) is not installed"
            if os.environ.get("CI"):
                pytest.fail(f"needed in CI: {reason}", pytrace=False)
            pytest.skip(reason)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return self.host
            time.sleep(0.1)
        pytest.fail("docker-registry does not answer")

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=20)
            self._process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def registries() -> Iterator[list[DockerRegistry]]:
    """Yield a list of registries, all of which are ended afterwards."""
    running: list[DockerRegistry] = []
    try:
        yield running
    finally:
        for one in running:
            one.kill()


@dataclass
class BreakingLink:
    """A TCP proxy that resets connections after so many bytes that a client sent; counts what it sent in all."""

    port: int
    """Where it leads."""
    cuts: deque[int | None] = field(default_factory=deque)
    """One for each connection that comes; None, and any after them, stay whole."""
    sent: int = 0
    broken: int = 0

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for one in self._open:
            one.close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def _accept(self) -> None:
        pumps = []
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                break
            try:
                registry = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            self._open += [client, registry]
            limit = self.cuts.popleft() if self.cuts else None
            for pump in (
                threading.Thread(target=self._forward, args=(client, registry, limit)),
                threading.Thread(target=self._back, args=(registry, client)),
            ):
                pump.start()
                pumps.append(pump)
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for pump in pumps:
            pump.join()

    def _forward(self, client: socket.socket, registry: socket.socket, limit: int | None) -> None:
        seen = 0
        try:
            while piece := client.recv(65536 if limit is None else min(65536, limit - seen)):
                seen += len(piece)
                with self._guard:
                    self.sent += len(piece)
                registry.sendall(piece)
                if seen == limit:
                    self.broken += 1
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                    break
        except OSError:
            pass
        finally:
            _end(registry)

    @staticmethod
    def _back(registry: socket.socket, client: socket.socket) -> None:
        try:
            while piece := registry.recv(65536):
                client.sendall(piece)
        except OSError:
            pass
        finally:
            _end(client)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
