"""Threads of a test: they end in time, and what they raise is the test's failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

WAIT = 10.0
"""Seconds after which a thread that has not ended never will."""


class Threads:
    """Threads that are to end in time, whose failures are the test's."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def start(self, work: Callable[[], object]) -> threading.Thread:
        """Run `work` in a thread of its own."""

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in `join`
                self._failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def join(self) -> None:
        """Wait for all of them; raises what one of them raised."""
        end = time.monotonic() + WAIT
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        stuck = [thread for thread in self.threads if thread.is_alive()]
        for failure in self._failures:
            raise failure
        assert not stuck, f"{len(stuck)} of {len(self.threads)} threads never end"
