"""A server on the loopback interface, for as long as a block lasts; then its connections are ended, too."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class' name)
        """Say nothing."""


class Listener(ThreadingHTTPServer):
    """Listens on a free port, and knows who is connected."""

    daemon_threads = True

    def __init__(self, handler: type[Quiet]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.connections: set[socket.socket] = set()
        self.guard = threading.Lock()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.guard:
            self.connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.guard:
                self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: connections that break are part of the tests."""


class Loopback:
    """What stands behind a listener; a handler's class names it by itself."""

    def __init__(self, handler: type[Quiet]) -> None:
        self._server = Listener(handler)
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name=type(self).__name__)

    @property
    def port(self) -> int:
        return self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._server.guard:
            connections = list(self._server.connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
