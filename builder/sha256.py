"""SHA-256 of many streams at once, on all cores: half of what it takes to make layers is to hash them.

Processors without instructions for SHA-256 hash a stream at 0.4 GB/s; but what they do to one stream their vector units
can do to eight or sixteen side by side, at 1.1 (AVX2) to 2.5 GB/s (AVX-512) together. No package was found that does
it, so it is here, in C, compiled when torchyard is installed: `native/sha256.c`. Where it could not be compiled, and
where the processor has such instructions, streams are hashed one by one, by `hashlib`.

What is to be hashed is passed on and hashed by threads of the hasher: lanes are worth their cost when many are filled.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from hashlib import _Hash

_MOST = 4
"""Threads that fill lanes, at most, and three times as many batches may wait: memory must not grow with the cores."""
_SMALL = 4096
"""Bytes below which pieces are put together first."""
_TOGETHER = 64 << 10
"""Bytes of such pieces that are passed on at a time."""
_ABI = 1
"""That of native/sha256.c."""
_LIBRARY = Path(__file__).with_name("native") / "sha256.so"
_START = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
"""First 32 bits of the fractional parts of the square roots of the first 8 primes (FIPS 180-4, 5.3.3)."""
_BLOCK = 64


State = TypeVar("State")


class Part(NamedTuple):
    """What a stream has next: its state, pieces, and how much of the first was hashed before."""

    state: Any
    pieces: Sequence[bytes]
    skip: int = 0


class Method(Protocol[State]):
    """A way to hash streams; what it knows of a stream is its own."""

    @property
    def lanes(self) -> int:
        """Streams that are hashed side by side."""
        ...

    @property
    def full(self) -> int:
        """Bytes that should wait before some are hashed: enough to fill the lanes, and to make one call of them."""
        ...

    def new(self) -> State:
        """Return the state of a stream that has nothing yet."""
        ...

    def update(self, parts: Sequence[Part], least: int) -> list[int]:
        """Hash the parts of several streams, and return how many bytes of each were taken.

        It may end when fewer than `least` streams have something left, and must not before.
        """
        ...

    def digest(self, state: State) -> bytes:
        """Return the digest of a stream, which ends with that."""
        ...


class OneByOne:
    """The standard library's, a stream after the other."""

    lanes = 1
    full = 4 << 20

    def new(self) -> _Hash:
        """Return a hash object."""
        return hashlib.sha256()

    def update(self, parts: Sequence[Part], least: int) -> list[int]:  # noqa: ARG002 - as Method
        """Hash all pieces, whole as they always are here."""
        for state, pieces, skip in parts:
            assert not skip
            for piece in pieces:
                state.update(piece)
        return [sum(map(len, part.pieces)) for part in parts]

    def digest(self, state: _Hash) -> bytes:
        """Return the digest of a hash object."""
        return state.digest()


class _State(ctypes.Structure):
    """`struct stream` of native/sha256.c."""

    _fields_ = (
        ("state", ctypes.c_uint32 * 8),
        ("size", ctypes.c_uint64),
        ("held", ctypes.c_uint64),
        ("block", ctypes.c_uint8 * _BLOCK),
    )


class SideBySide:
    """Vector instructions, a stream in each lane; `kind` is one of native/sha256.c that the processor has."""

    full = 16 << 20

    def __init__(self, library: ctypes.CDLL, kind: int) -> None:
        self._library, self._kind = library, kind
        self.lanes = {1: 8, 2: 16}[kind]

    def new(self) -> _State:
        """Return a structure for the library."""
        return _State(state=_START)

    def update(self, parts: Sequence[Part], least: int) -> list[int]:
        """Hash until fewer than `least` streams have something left."""
        count = len(parts)
        pieces = [piece for part in parts for piece in part.pieces]
        consumed = (ctypes.c_uint64 * count)()
        self._library.torchyard_sha256_update(
            ctypes.c_int(self._kind),
            (ctypes.POINTER(_State) * count)(*(ctypes.pointer(part.state) for part in parts)),
            ctypes.c_size_t(count),
            (ctypes.c_char_p * len(pieces))(*pieces),
            (ctypes.c_size_t * len(pieces))(*map(len, pieces)),
            (ctypes.c_size_t * (count + 1))(*itertools.accumulate((len(part.pieces) for part in parts), initial=0)),
            (ctypes.c_size_t * count)(*(part.skip for part in parts)),
            ctypes.c_size_t(least),
            consumed,
        )
        return list(consumed)

    def digest(self, state: _State) -> bytes:
        """Pad a stream and return its digest (FIPS 180-4, 5.1.1)."""
        size = state.size
        padding = b"\x80" + bytes((_BLOCK - 9 - size) % _BLOCK) + (8 * size).to_bytes(8, "big")
        self.update([Part(state, (padding,))], 1)
        return b"".join(word.to_bytes(4, "big") for word in state.state)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library; None where there is none, or one of another version of its source."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        return library if library.torchyard_sha256_abi() == _ABI else None
    except (OSError, AttributeError):
        return None


@functools.cache
def kinds() -> tuple[SideBySide, ...]:
    """Return the ways to hash side by side that this processor has, the best one last; none without the library."""
    library = _library()
    if library is None:
        return ()
    return tuple(SideBySide(library, kind) for kind in range(1, library.torchyard_sha256_best() + 1))


@functools.cache
def best() -> Method[Any]:
    """Return the fastest way that this machine has."""
    library = _library()
    if library is None or not kinds() or library.torchyard_sha256_has_own():
        return OneByOne()
    return kinds()[-1]


class Stream:
    """What is hashed to one digest; one thread at a time brings it."""

    def __init__(self, hasher: Hasher, method: Method[Any]) -> None:
        self._hasher, self._method = hasher, method
        self._small = bytearray()
        # The hasher's, under its lock; the state is that of the thread that has taken the stream.
        self.state = method.new()
        self.pieces: deque[bytes] = deque()
        self.skip = 0
        self.waiting = 0
        self.taken = False
        self.wanted = False

    def update(self, content: bytes) -> None:
        """Append bytes; waits while too many wait to be hashed."""
        if len(content) >= _SMALL:
            self._flush()
            self._hasher.bring(self, content)
            return
        self._small += content
        if len(self._small) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        if self._small:
            self._hasher.bring(self, bytes(self._small))
            self._small.clear()

    def digest(self) -> bytes:
        """Wait until all is hashed, and return the digest; the stream ends with that."""
        self._flush()
        self._hasher.finish(self)
        return self._method.digest(self.state)

    def hexdigest(self) -> str:
        """Return the digest in hex."""
        return self.digest().hex()


class Hasher:
    """Threads that hash streams; a context manager, to be left when nobody brings anything any more."""

    def __init__(self, workers: int, *, method: Method[Any] | None = None) -> None:
        """Take `workers` as the number of cores, not all of which are needed where lanes are filled."""
        self._method = method or best()
        number = min(-(-workers // 4), _MOST) if self._method.lanes > 1 else workers
        self.producers = 6 * number + 2 if self._method.lanes > 1 else workers
        """Threads that should bring streams, three each, at once: a few more than fill the lanes."""
        self._full = self._method.full
        self._limit = 3 * min(number, _MOST) * self._full
        lock = threading.Lock()
        self._work, self._room = threading.Condition(lock), threading.Condition(lock)
        self._streams: dict[Stream, None] = {}
        """Those with something that waits."""
        self._waiting = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, name="sha256", daemon=True) for _ in range(number)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._work:
            self._closed = True
            self._work.notify_all()
            self._room.notify_all()
        for thread in self._threads:
            thread.join()

    def stream(self) -> Stream:
        """Return a stream that has nothing yet."""
        return Stream(self, self._method)

    # ------------------------------------------------------------------ what streams call

    def bring(self, stream: Stream, content: bytes) -> None:
        """Take bytes of a stream, as soon as there is room: that bounds memory."""
        with self._room:
            while self._waiting >= self._limit and not self._over:
                self._room.wait()
            self._raise()
            stream.pieces.append(content)
            stream.waiting += len(content)
            self._waiting += len(content)
            self._streams[stream] = None
            if self._waiting >= self._full:
                self._work.notify()

    def finish(self, stream: Stream) -> None:
        """Wait until nothing of a stream waits."""
        with self._room:
            stream.wanted = True
            self._work.notify()
            while (stream.waiting or stream.taken) and not self._over:
                self._room.wait()
            self._raise()

    @property
    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert not self._closed, "whoever brings something is done before its hasher is left"

    # ------------------------------------------------------------------ the threads

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._hash(*batch)
        except BaseException as error:  # noqa: BLE001 - raised again in those who wait, who would wait for ever
            with self._room:
                self._failure = error
                self._room.notify_all()

    def _next(self) -> tuple[list[tuple[Stream, Part]], int] | None:
        """Wait for enough to hash, and take it; None at the end."""
        with self._work:
            while not self._closed:
                chosen = self._chosen()
                if chosen:
                    for stream in chosen:
                        stream.taken = True
                    # A digest that is waited for is the end of a layer; else what fills few lanes waits for more.
                    wanted = any(stream.wanted for stream in chosen)
                    least = 1 if wanted else max(1, min(len(chosen), self._method.lanes) * 2 // 3)
                    return [(stream, Part(stream.state, tuple(stream.pieces), stream.skip)) for stream in chosen], least
                self._work.wait()
        return None

    def _chosen(self) -> list[Stream]:
        free = [stream for stream in self._streams if not stream.taken]
        wanted = [stream for stream in free if stream.wanted]
        if not wanted and sum(stream.waiting for stream in free) < self._full:
            return []
        others = sorted((stream for stream in free if not stream.wanted), key=lambda stream: -stream.waiting)
        # Twice as many as there are lanes: whoever ends makes room for another.
        return [*wanted, *others][: 2 * self._method.lanes if self._method.lanes > 1 else 1]

    def _hash(self, batch: Sequence[tuple[Stream, Part]], least: int) -> None:
        consumed = self._method.update([part for _, part in batch], least)
        with self._room:
            for (stream, _), taken in zip(batch, consumed, strict=True):
                stream.taken = False
                stream.waiting -= taken
                self._waiting -= taken
                stream.skip += taken
                while stream.pieces and len(stream.pieces[0]) <= stream.skip:
                    stream.skip -= len(stream.pieces.popleft())
                if not stream.pieces:
                    del self._streams[stream]
            self._room.notify_all()
            self._work.notify()
