"""Whose turn it is: more wheels are in work than there are cores, and all of them are to end together.

Hashing side by side wants many streams at once, more than threads that should run: on two cores eight threads would
each get a quarter of one, and the largest layer, which is one thread's work, would be what all wait for in the end. So
about as many run as there are cores, for a moment each, and the larger a layer is the more moments it gets.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

LENGTH = 512 << 10
"""Bytes of a wheel that a turn lasts, 4 ms of work: what six wheels bring to be hashed meanwhile fits into memory."""


class Turns:
    """Lets `running` layers run at a time."""

    def __init__(self, running: int) -> None:
        self._free = running
        self._lock = threading.Lock()
        self._active: list[Turn] = []
        self._waiting: list[Turn] = []

    @classmethod
    def on(cls, cores: int) -> Self:
        """Let one more run than there are cores: now and then one waits for room, or for Python's lock."""
        return cls(cores + 1)

    @contextmanager
    def turn(self, size: int) -> Iterator[Turn]:
        """Wait for the first turn of a layer of `size` bytes, and give back the last one at the end."""
        turn = Turn(self, size)
        with self._lock:
            # Who comes later does not make up for what the others have had.
            turn.passed = min((other.passed for other in self._active), default=0)
            self._active.append(turn)
            taken = self._take(turn)
        if not taken:
            turn.wait()
        try:
            yield turn
        finally:
            with self._lock:
                self._active.remove(turn)
                self._give_back()

    def change(self, turn: Turn) -> None:
        """Let a layer that waits run instead of this one, if its turn has come; returns when this one may run again."""
        with self._lock:
            if not self._waiting or min(other.passed for other in self._waiting) >= turn.passed:
                return
            self._give_back()
            taken = self._take(turn)
        if not taken:
            turn.wait()

    def _take(self, turn: Turn) -> bool:
        if self._free:
            self._free -= 1
            return True
        self._waiting.append(turn)
        return False

    def _give_back(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        following = min(self._waiting, key=lambda it: it.passed)
        self._waiting.remove(following)
        following.go()


class Turn:
    """A layer that runs, or waits; `passed` is how much of it, as a fraction, it has had, and what it missed before."""

    def __init__(self, turns: Turns, size: int) -> None:
        self.passed = 0.0
        self._turns, self._size = turns, max(size, 1)
        self._worked = 0
        self._may = threading.Semaphore(0)

    def worked(self, count: int) -> None:
        """Take note that bytes were worked through; waits if it is another's turn."""
        self._worked += count
        if self._worked >= LENGTH:
            self.passed += self._worked / self._size
            self._worked = 0
            self._turns.change(self)

    def wait(self) -> None:
        """Wait until `go`."""
        self._may.acquire()

    def go(self) -> None:
        """Let it run."""
        self._may.release()
