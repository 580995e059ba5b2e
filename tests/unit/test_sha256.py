"""SHA-256 of many streams: every method gives hashlib's digests, memory is bounded, and nobody waits for ever."""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import itertools
import platform
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from builder import sha256
from builder.sha256 import Hasher, Method, OneByOne, Part, SideBySide, Stream
from tests.support.threads import WAIT, Threads

MOMENT = 0.05
"""Seconds in which what should not come would have come."""
GENERATE = [Phase.generate]
"""A failure may take that long: none is looked for that is smaller."""
SIZES = (0, 1, 55, 56, 63, 64, 65, 119, 128, 4095, 4096, 4097, 70000)
PIECE = 5000
"""Bytes of a piece that is passed on as it is."""
NOISE = random.Random(7).randbytes(1 << 18)
NAMES = {1: "hashlib", 8: "avx2", 16: "avx512"}
METHODS: list[SideBySide | OneByOne] = [*sha256.kinds(), OneByOne()]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: NAMES[method.lanes])
pieces_of_streams = st.lists(st.lists(st.sampled_from(SIZES), max_size=6), min_size=1, max_size=40)


def noise(sizes: Sequence[Sequence[int]]) -> list[list[bytes]]:
    """Give each piece of each stream other bytes."""
    starts = itertools.count(1, 4099)
    return [[NOISE[(at := next(starts) % 190_000) : at + size] for size in stream] for stream in sizes]


def digests(streams: Sequence[Sequence[bytes]]) -> list[bytes]:
    return [hashlib.sha256(b"".join(pieces)).digest() for pieces in streams]


def flags() -> frozenset[str]:
    """Return what the processor has, as Linux calls it."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("there is nothing side by side for this processor")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


class Checked:
    """A method that must be called as it may be, and must do what it says."""

    def __init__(self, method: Method[Any], *, full: int | None = None) -> None:
        self._method = method
        self.lanes, self.full = method.lanes, full or method.full
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self.calls: list[tuple[list[list[bytes]], int]] = []
        """Pieces of the streams, and `least`."""
        self.taken = 0

    def new(self) -> Any:
        return self._method.new()

    def update(self, parts: Sequence[Part], least: int) -> list[int]:
        assert 1 <= least <= len(parts)
        waiting = [sum(map(len, part.pieces)) - part.skip for part in parts]
        assert all(waiting)
        assert all(0 <= part.skip < len(part.pieces[0]) for part in parts)
        states = {id(part.state) for part in parts}
        assert len(states) == len(parts)
        with self._lock:
            assert not states & self._inside, "a stream is hashed by two threads"
            self._inside |= states
            self.calls.append(([list(part.pieces) for part in parts], least))
        taken = self.hash(parts, least)
        assert len(taken) == len(parts)
        assert all(0 <= some <= all_ for some, all_ in zip(taken, waiting, strict=True))
        assert any(taken), "nothing was taken"
        assert sum(some < all_ for some, all_ in zip(taken, waiting, strict=True)) < least
        with self._lock:
            self._inside -= states
            self.taken += sum(taken)
        return taken

    def hash(self, parts: Sequence[Part], least: int) -> list[int]:
        return self._method.update(parts, least)

    def digest(self, state: Any) -> bytes:
        return self._method.digest(state)


class Lanes(OneByOne):
    """As if it hashed side by side, on any processor; leaves off as soon as it may, in the middle of a piece."""

    lanes = 4

    def update(self, parts: Sequence[Part], least: int) -> list[int]:
        taken = []
        for index, (state, pieces, skip) in enumerate(parts):
            content = b"".join(pieces)[skip:]
            some = len(content) if index <= len(parts) - least else len(content) * 2 // 3
            state.update(content[:some])
            taken.append(some)
        return taken


class Gate(Checked):
    """Hashes nothing until it is opened."""

    def __init__(self, *, lanes: int = 1, full: int = 4 * PIECE, failure: Exception | None = None) -> None:
        super().__init__(OneByOne(), full=full)
        self.lanes = lanes
        self.open, self.entered = threading.Event(), threading.Event()
        self._failure = failure

    def hash(self, parts: Sequence[Part], least: int) -> list[int]:
        self.entered.set()
        assert self.open.wait(WAIT)
        if self._failure:
            raise self._failure
        return super().hash(parts, least)


def in_time(work: Callable[[], object]) -> None:
    threads = Threads()
    threads.start(work)
    threads.join()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


# --------------------------------------------------------------------------- methods


@every_method
@pytest.mark.parametrize(
    ("content", "digest"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
    ids=["empty", "abc", "448 bits", "a million"],
)
def test_the_examples_of_the_standard(method: Method[Any], content: bytes, digest: str) -> None:
    state = method.new()
    method.update([Part(state, (content,))], 1)
    assert method.digest(state).hex() == digest

    def hashed() -> None:
        with Hasher(1, method=method) as hasher:
            stream = hasher.stream()
            stream.update(content)
            assert stream.hexdigest() == digest

    in_time(hashed)


@every_method
def test_every_size_around_a_block(method: Method[Any]) -> None:
    contents = [NOISE[size : 2 * size] for size in range(200)]
    states = [method.new() for _ in contents]
    parts = [Part(state, (content,)) for state, content in zip(states, contents, strict=True)]
    assert method.update(parts, 1) == list(range(200))
    assert [method.digest(state) for state in states] == digests([[content] for content in contents])


@every_method
def test_every_cut_of_a_few_blocks(method: Method[Any]) -> None:
    contents = [[NOISE[:cut], b"", NOISE[cut:200]] for cut in range(201)]
    states = [method.new() for _ in contents]
    method.update([Part(state, tuple(cut)) for state, cut in zip(states, contents, strict=True)], 1)
    assert {method.digest(state) for state in states} == {hashlib.sha256(NOISE[:200]).digest()}


@every_method
def test_nothing_of_nobody_is_nothing(method: Method[Any]) -> None:
    assert method.update([], 1) == []
    state = method.new()
    assert method.update([Part(state, ())], 1) == [0]
    assert method.update([Part(state, (b"", b""))], 1) == [0]
    assert method.digest(state) == hashlib.sha256().digest()


@every_method
@settings(max_examples=120, deadline=None, derandomize=True)
@given(sizes=pieces_of_streams, seed=st.integers(0, 1 << 32), most=st.sampled_from([1, 2, 5, 11, 40]))
def test_the_digests_are_those_of_hashlib(method: Method[Any], sizes: list[list[int]], seed: int, most: int) -> None:
    checked, chance = Checked(method), random.Random(seed)
    streams = noise(sizes)
    states = [method.new() for _ in streams]
    coming = [deque(pieces) for pieces in streams]
    waiting: list[deque[bytes]] = [deque() for _ in streams]
    skip = [0] * len(streams)
    while any(coming) or any(waiting):
        for some, others in zip(coming, waiting, strict=True):
            for _ in range(chance.randrange(4)):
                if some:
                    others.append(some.popleft())
        for at, pieces in enumerate(waiting):
            while pieces and len(pieces[0]) <= skip[at]:
                skip[at] -= len(pieces.popleft())
        chosen = [at for at, pieces in enumerate(waiting) if pieces]
        chance.shuffle(chosen)
        if not chosen:
            continue
        parts = [Part(states[at], tuple(waiting[at]), skip[at]) for at in chosen]
        for at, taken in zip(chosen, checked.update(parts, min(most, len(chosen))), strict=True):
            skip[at] += taken
    assert [method.digest(state) for state in states] == digests(streams)


# --------------------------------------------------------------------------- which method


@pytest.fixture
def anew() -> Iterator[None]:
    caches = [found for found in vars(sha256).values() if hasattr(found, "cache_clear")]

    def forget() -> None:
        for found in caches:
            found.cache_clear()

    forget()
    yield
    forget()


class Library:
    """What is asked of the library to choose."""

    def __init__(self, best: int, *, own: bool, abi: int = 0) -> None:
        self._best, self._own, self._abi = best, own, abi or sha256._ABI

    def torchyard_sha256_abi(self) -> int:
        return self._abi

    def torchyard_sha256_best(self) -> int:
        return self._best

    def torchyard_sha256_has_own(self) -> int:
        return int(self._own)


def test_the_library_was_built() -> None:
    if "avx2" not in flags():
        pytest.skip("the processor has no AVX2")
    assert sha256.kinds()


def test_what_the_processor_lacks_is_not_offered() -> None:
    has = flags()
    needs = {8: {"avx2"}, 16: {"avx512f", "avx512bw", "avx512vl"}}
    for method in sha256.kinds():
        assert needs[method.lanes] <= has
    assert [method.lanes for method in sha256.kinds()] == sorted({method.lanes for method in sha256.kinds()})


def test_what_is_best_hashes_one_by_one_where_the_processor_hashes() -> None:
    has = flags()
    assert isinstance(sha256.best(), OneByOne) == ("sha_ni" in has or not sha256.kinds())


@pytest.mark.parametrize(
    "content", [None, b"", b"no library", b"\x7fELF" + bytes(60)], ids=["none", "empty", "text", "broken"]
)
def test_without_the_library_streams_are_hashed_one_by_one(
    anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "sha256.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sha256, "_LIBRARY", path)
    assert sha256.kinds() == ()
    assert isinstance(sha256.best(), OneByOne)

    def hashed() -> None:
        with Hasher(2) as hasher:
            stream = hasher.stream()
            stream.update(NOISE)
            assert stream.digest() == hashlib.sha256(NOISE).digest()

    in_time(hashed)


def test_a_library_that_is_another_is_none(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flags()
    monkeypatch.setattr(sha256, "_LIBRARY", Path("libc.so.6"))
    assert sha256.kinds() == ()
    assert isinstance(sha256.best(), OneByOne)


@pytest.mark.parametrize("abi", [-1, sha256._ABI + 1, 1 << 30])
def test_a_library_of_another_version_is_none(anew: None, monkeypatch: pytest.MonkeyPatch, abi: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(2, own=False, abi=abi))
    assert sha256.kinds() == ()
    assert isinstance(sha256.best(), OneByOne)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("best", "lanes"), [(0, []), (1, [8]), (2, [8, 16])])
def test_it_is_one_by_one_where_the_processor_hashes_and_else_the_most_lanes(
    anew: None, monkeypatch: pytest.MonkeyPatch, best: int, lanes: list[int], *, own: bool
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(best, own=own))
    assert [method.lanes for method in sha256.kinds()] == lanes
    assert sha256.best().lanes == (1 if own or not lanes else lanes[-1])
    assert isinstance(sha256.best(), OneByOne) == (own or not lanes)


# --------------------------------------------------------------------------- hashers


SMALL_METHODS = [*METHODS, Lanes()]


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda method: NAMES.get(method.lanes, "lanes"))
@settings(max_examples=40, deadline=None, derandomize=True, phases=GENERATE)
@given(
    sizes=pieces_of_streams,
    workers=st.sampled_from([1, 2, 5]),
    producers=st.integers(1, 6),
    full=st.sampled_from([1, 20_000, 300_000, 16 << 20]),
)
def test_threads_that_bring_streams_get_the_digests_of_hashlib(
    method: Method[Any], sizes: list[list[int]], workers: int, producers: int, full: int
) -> None:
    streams = noise(sizes)
    found: dict[int, bytes] = {}

    def bring(hasher: Hasher, first: int) -> None:
        mine = {at: hasher.stream() for at in range(first, len(streams), producers)}
        for turn in range(6):
            for at, stream in mine.items():
                for piece in streams[at][turn : turn + 1]:
                    stream.update(piece)
        for at, stream in mine.items():
            found[at] = stream.digest()

    threads = Threads()
    hasher = Hasher(workers, method=Checked(method, full=full))
    hasher.__enter__()
    for first in range(producers):
        threads.start(functools.partial(bring, hasher, first))
    threads.join()
    in_time(lambda: hasher.__exit__(None, None, None))
    assert [found[at] for at in range(len(streams))] == digests(streams)


@every_method
def test_large_streams_through_the_method_as_it_is(method: Method[Any]) -> None:
    piece = NOISE[: 1 << 17]

    def bring(hasher: Hasher, pieces: int) -> None:
        stream = hasher.stream()
        for _ in range(pieces):
            stream.update(piece)
        assert stream.digest() == hashlib.sha256(piece * pieces).digest()

    threads = Threads()
    hasher = Hasher(2, method=method)
    hasher.__enter__()
    for pieces in range(8, 40, 2):
        threads.start(functools.partial(bring, hasher, pieces))
    threads.join()
    in_time(lambda: hasher.__exit__(None, None, None))


@pytest.mark.parametrize("workers", [1, 2, 4, 5, 64])
def test_as_many_are_to_bring_streams_as_fill_the_lanes(workers: int) -> None:
    assert Hasher(workers, method=OneByOne()).producers == workers
    before = threading.active_count()
    with Hasher(workers, method=Gate(lanes=16)) as hasher:
        hashing = threading.active_count() - before
        assert 1 <= hashing <= workers
        assert 16 * hashing <= 3 * hasher.producers <= 2 * 16 * hashing
    assert threading.active_count() == before


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("producers", [1, 2, 7])
def test_who_brings_more_than_may_wait_waits_and_goes_on(lanes: int, producers: int) -> None:
    gate, threads = Gate(lanes=lanes), Threads()
    brought = [0] * producers

    with Hasher(1, method=gate) as hasher:
        pieces = 5 * hasher._limit // PIECE

        def bring(index: int) -> None:
            stream = hasher.stream()
            for _ in range(pieces):
                stream.update(NOISE[:PIECE])
                brought[index] += PIECE
            assert stream.digest() == hashlib.sha256(NOISE[:PIECE] * pieces).digest()

        for index in range(producers):
            threads.start(functools.partial(bring, index))
        until(lambda: sum(brought) >= hasher._limit)
        time.sleep(MOMENT)
        assert sum(brought) < hasher._limit + producers * PIECE
        assert all(thread.is_alive() for thread in threads.threads)
        gate.open.set()
        threads.join()
    assert gate.taken == sum(brought) == producers * pieces * PIECE


def test_never_more_waits_than_the_limit_and_a_piece_of_each() -> None:
    method, threads, lock = Checked(Lanes(), full=4 * PIECE), Threads(), threading.Lock()
    brought, most = [0], [0]

    with Hasher(4, method=method) as hasher:

        def bring() -> None:
            stream = hasher.stream()
            for _ in range(200):
                stream.update(NOISE[:PIECE])
                with lock:
                    brought[0] += PIECE
                    most[0] = max(most[0], brought[0] - method.taken)
            stream.digest()

        for _ in range(6):
            threads.start(bring)
        threads.join()
        assert 0 < most[0] <= hasher._limit + 6 * PIECE


def test_nothing_is_hashed_before_enough_waits() -> None:
    gate = Gate(lanes=8, full=10 * PIECE)
    gate.open.set()
    with Hasher(1, method=gate) as hasher:
        streams = [hasher.stream() for _ in range(10)]
        for stream in streams[:9]:
            stream.update(NOISE[:PIECE])
        time.sleep(MOMENT)
        assert not gate.calls
        streams[9].update(NOISE[:PIECE])
        until(lambda: gate.taken == 10 * PIECE)
        assert len(gate.calls[0][0]) == 10


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda method: NAMES.get(method.lanes, "lanes"))
def test_a_digest_that_is_wanted_does_not_wait_for_others(method: Method[Any]) -> None:
    checked, threads = Checked(method, full=1 << 40), Threads()
    with Hasher(1, method=checked) as hasher:
        others = [hasher.stream() for _ in range(5)]
        for stream in others:
            stream.update(NOISE[:PIECE])

        def wanted() -> None:
            for size in (0, 1, PIECE, 70_000):
                stream = hasher.stream()
                stream.update(NOISE[:size])
                assert stream.digest() == hashlib.sha256(NOISE[:size]).digest()

        threads.start(wanted)
        threads.join()
    assert {least for _, least in checked.calls} == {1}


def test_many_digests_that_are_wanted_at_once_all_come() -> None:
    gate, threads = Gate(lanes=4, full=1 << 40), Threads()
    with Hasher(4, method=gate) as hasher:

        def wanted(size: int) -> None:
            stream = hasher.stream()
            stream.update(NOISE[:size])
            assert stream.digest() == hashlib.sha256(NOISE[:size]).digest()

        for size in range(PIECE, PIECE + 30):
            threads.start(functools.partial(wanted, size))
        assert gate.entered.wait(WAIT)
        time.sleep(MOMENT)
        gate.open.set()
        threads.join()


def brought(pieces: Sequence[bytes]) -> list[bytes]:
    """Bring the pieces to one stream; returns those that reach the method."""
    gate = Gate(full=1 << 40)
    gate.open.set()

    def bring() -> None:
        with Hasher(1, method=gate) as hasher:
            stream = hasher.stream()
            for piece in pieces:
                stream.update(piece)
            assert stream.digest() == hashlib.sha256(b"".join(pieces)).digest()

    in_time(bring)
    return [piece for parts, _ in gate.calls for part in parts for piece in part]


def test_small_pieces_are_put_together() -> None:
    reached = brought([NOISE[at : at + 10] for at in range(0, 200_000, 10)])
    assert b"".join(reached) == NOISE[:200_000]
    assert len(reached) <= 8


def test_small_pieces_and_large_ones_stay_in_order() -> None:
    cuts = [0, 1, 10, 10 + PIECE, 20 + PIECE, 30 + 3 * PIECE, 31 + 3 * PIECE, 100_000, 100_001]
    assert b"".join(brought([NOISE[start:end] for start, end in itertools.pairwise(cuts)])) == NOISE[:100_001]


# --------------------------------------------------------------------------- failures


class BrokenError(Exception):
    """What a method raises that does not work."""


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("lanes", [1, 16])
def test_a_failure_is_raised_in_all_who_wait_and_all_who_come(workers: int, lanes: int) -> None:
    gate, threads = Gate(lanes=lanes, failure=BrokenError("broken")), Threads()
    hasher = Hasher(workers, method=gate)
    hasher.__enter__()
    raised: list[str] = []

    def failing(what: str, work: Callable[[], object]) -> None:
        with pytest.raises(BrokenError, match="broken"):
            work()
        raised.append(what)

    def wanted() -> None:
        stream = hasher.stream()
        stream.update(NOISE[:PIECE])
        stream.digest()

    def bring() -> None:
        stream = hasher.stream()
        while True:
            stream.update(NOISE[:PIECE])

    for _ in range(3):
        threads.start(functools.partial(failing, "wanted", wanted))
    assert gate.entered.wait(WAIT)
    for _ in range(3):
        threads.start(functools.partial(failing, "brought", bring))
    until(lambda: hasher._waiting >= hasher._limit)
    time.sleep(MOMENT)
    assert not raised
    gate.open.set()
    threads.join()
    assert sorted(raised) == ["brought"] * 3 + ["wanted"] * 3
    in_time(functools.partial(failing, "later", bring))
    in_time(functools.partial(failing, "later", wanted))
    in_time(lambda: hasher.__exit__(None, None, None))


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("size", [1, PIECE, 200_000])
def test_a_hasher_can_be_left_with_what_nobody_asks_for(workers: int, size: int) -> None:
    def leave() -> None:
        with Hasher(workers, method=Checked(Lanes(), full=1 << 20)) as hasher:
            for _ in range(3):
                hasher.stream().update(NOISE[:size])

    before = threading.active_count()
    in_time(leave)
    until(lambda: threading.active_count() == before)


def test_a_hasher_is_left_by_an_exception() -> None:
    def fail() -> None:
        with Hasher(2, method=Lanes()) as hasher:
            hasher.stream().update(NOISE)
            raise BrokenError

    with pytest.raises(BrokenError):
        in_time(fail)


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda method: NAMES.get(method.lanes, "lanes"))
def test_streams_that_were_abandoned_do_not_block_others(method: Method[Any]) -> None:
    checked, threads = Checked(method, full=4 * PIECE), Threads()
    hasher = Hasher(1, method=checked)
    hasher.__enter__()

    def abandon(pieces: int) -> None:
        stream = hasher.stream()
        for _ in range(pieces):
            stream.update(NOISE[:PIECE])

    def bring() -> None:
        stream = hasher.stream()
        for _ in range(100):
            stream.update(NOISE[:PIECE])
        assert stream.digest() == hashlib.sha256(NOISE[:PIECE] * 100).digest()

    for pieces in (1, 1, 1, 2, 3, hasher._limit // PIECE, 50):
        threads.start(functools.partial(abandon, pieces))
    threads.join()
    for _ in range(3):
        threads.start(bring)
    threads.join()
    in_time(lambda: hasher.__exit__(None, None, None))


def test_a_method_is_not_asked_twice_for_what_it_took() -> None:
    method = copy.copy(Lanes())
    method.full = 3 * PIECE
    checked = Checked(method)

    def bring() -> None:
        with Hasher(2, method=checked) as hasher:
            streams: list[Stream] = [hasher.stream() for _ in range(9)]
            for at in range(40):
                for stream in streams:
                    stream.update(NOISE[at : at + PIECE])
            found = [stream.digest() for stream in streams]
        whole = b"".join(NOISE[at : at + PIECE] for at in range(40))
        assert found == [hashlib.sha256(whole).digest()] * 9

    in_time(bring)
    assert checked.taken == 9 * 40 * PIECE
