"""Turns: only so many layers run at once, and all come to an end; the larger one gets more turns, so they end together.

Where one runs at a time, who runs is decided by the sizes alone: nothing here depends on how fast the threads are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from builder.engines.oci import turns as module
from builder.engines.oci.turns import LENGTH, Turn, Turns
from tests.support.threads import WAIT, Threads

GENERATE = [Phase.generate]
"""A failure may take that long: none is looked for that is smaller."""


class Waits:
    """Counts how often a layer has had to wait."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def one_more(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def until(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, WAIT), f"{self.count} of {count} wait"


@pytest.fixture(scope="module")
def waits() -> Iterator[Waits]:
    """For the module, as Hypothesis runs a test many times; who uses it counts from where it stands."""
    found = Waits()
    wait = Turn.wait

    def counted(turn: Turn) -> None:
        found.one_more()
        wait(turn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Turn, "wait", counted)
        yield found


def order(sizes: Sequence[int], waits: Waits, *, step: int = LENGTH) -> list[int]:
    """Let layers that come at the same time run one at a time; gives whose work each `step` was, to the end."""
    turns, threads, seen = Turns(1), Threads(), list[int]()

    def work(layer: int) -> None:
        with turns.turn(sizes[layer]) as turn:
            for at in range(0, sizes[layer], step):
                seen.append(layer)
                turn.worked(min(step, sizes[layer] - at))

    with turns.turn(1):
        for layer in range(len(sizes)):
            before = waits.count
            threads.start(lambda layer=layer: work(layer))  # type: ignore[misc]
            waits.until(before + 1)
    threads.join()
    return seen


# --------------------------------------------------------------------------- how many


@settings(max_examples=25, deadline=None, derandomize=True, phases=GENERATE)
@given(
    running=st.integers(1, 6),
    layers=st.lists(
        st.tuples(st.integers(0, 12 * LENGTH), st.sampled_from([1 << 16, LENGTH - 1, LENGTH, 3 * LENGTH])), max_size=12
    ),
)
def test_no_more_than_that_many_run_and_all_come_to_an_end(running: int, layers: list[tuple[int, int]]) -> None:
    turns, threads, lock = Turns(running), Threads(), threading.Lock()
    inside: set[int] = set()
    ended: list[int] = []

    def moment(layer: int) -> None:
        with lock:
            assert layer not in inside
            inside.add(layer)
            assert len(inside) <= running
        time.sleep(0)
        with lock:
            inside.remove(layer)

    def work(layer: int) -> None:
        size, step = layers[layer]
        with turns.turn(size) as turn:
            moment(layer)
            for _ in range(0, size, step):
                turn.worked(step)
                moment(layer)
        ended.append(layer)

    for layer in range(len(layers)):
        threads.start(lambda layer=layer: work(layer))  # type: ignore[misc]
    threads.join()
    assert sorted(ended) == list(range(len(layers)))


@pytest.mark.parametrize("running", [1, 2, 5])
def test_as_many_as_may_do_run_at_once(running: int) -> None:
    turns, threads = Turns(running), Threads()
    together = threading.Barrier(running)

    def work() -> None:
        with turns.turn(20 * LENGTH) as turn:
            together.wait(WAIT)
            for _ in range(20):
                turn.worked(LENGTH)

    for _ in range(3 * running):
        threads.start(work)
    threads.join()


def test_a_layer_alone_never_waits(waits: Waits) -> None:
    turns, threads, before = Turns(1), Threads(), waits.count

    def work() -> None:
        for size in (0, 1, 5 * LENGTH, 100 * LENGTH):
            with turns.turn(size) as turn:
                for _ in range(200):
                    turn.worked(LENGTH)

    threads.start(work)
    threads.join()
    assert waits.count == before


@pytest.mark.parametrize("running", [2, 3, 8])
def test_with_as_many_turns_as_layers_nobody_waits(waits: Waits, running: int) -> None:
    turns, threads, before = Turns(running), Threads(), waits.count
    together = threading.Barrier(running)

    def work(layer: int) -> None:
        for _ in range(3):
            with turns.turn((layer + 1) * 10 * LENGTH) as turn:
                for _ in range(20):
                    turn.worked(LENGTH)
                together.wait(WAIT)
            together.wait(WAIT)

    for layer in range(running):
        threads.start(lambda layer=layer: work(layer))  # type: ignore[misc]
    threads.join()
    assert waits.count == before


def test_what_is_less_than_a_turn_is_not_interrupted(waits: Waits) -> None:
    sizes = [LENGTH - 1] * 4
    assert order(sizes, waits, step=1 << 14) == sorted(order(sizes, waits, step=1 << 14))


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize("running", [1, 2])
def test_a_failure_gives_its_turn_back(running: int) -> None:
    turns, threads = Turns(running), Threads()

    def work_and_fail(worked: int) -> None:
        with turns.turn(10 * LENGTH) as turn:
            for _ in range(worked):
                turn.worked(LENGTH)
            raise ZeroDivisionError

    def fail(worked: int) -> None:
        with pytest.raises(ZeroDivisionError):
            work_and_fail(worked)

    def work() -> None:
        with turns.turn(10 * LENGTH) as turn:
            for _ in range(10):
                turn.worked(LENGTH)

    for worked in range(6):
        threads.start(lambda worked=worked: fail(worked))  # type: ignore[misc]
        threads.start(work)
    threads.join()


def test_failures_do_not_add_turns(waits: Waits) -> None:
    turns, threads = Turns(2), Threads()
    inside, most, lock = [0], [0], threading.Lock()

    def work(layer: int) -> None:
        with turns.turn(8 * LENGTH) as turn:
            for at in range(8):
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0)
                with lock:
                    inside[0] -= 1
                turn.worked(LENGTH)
                if at == layer:
                    raise ZeroDivisionError

    def failing(layer: int) -> None:
        with pytest.raises(ZeroDivisionError):
            work(layer)

    for layer in range(8):
        threads.start(lambda layer=layer: failing(layer))  # type: ignore[misc]
    threads.join()

    def hold() -> None:
        with turns.turn(1), turns.turn(1):
            before = waits.count
            threads.start(lambda: work(9))
            waits.until(before + 1)

    threads.start(hold)
    threads.join()
    assert 1 <= most[0] <= 2


# --------------------------------------------------------------------------- whose turn it is


def test_the_same_sizes_take_turns(waits: Waits) -> None:
    seen = order([10 * LENGTH] * 3, waits)
    for at in range(0, len(seen), 3):
        counts = [seen[:at].count(layer) for layer in range(3)]
        assert max(counts) - min(counts) <= 1


def test_twice_the_size_gets_twice_the_turns(waits: Waits) -> None:
    seen = order([32 * LENGTH, 64 * LENGTH], waits)
    for at in range(1, 97):
        small, large = seen[:at].count(0), seen[:at].count(1)
        assert abs(large - 2 * small) <= 3
    assert {*seen[-4:]} == {0, 1}


@settings(max_examples=40, deadline=None, derandomize=True, phases=GENERATE)
@given(
    sizes=st.lists(st.integers(1, 60 * LENGTH), min_size=2, max_size=6),
    step=st.sampled_from([1 << 18, LENGTH - 1, LENGTH, 2 * LENGTH]),
)
def test_all_have_had_about_the_same_fraction_at_any_time(waits: Waits, sizes: list[int], step: int) -> None:
    seen = order(sizes, waits, step=step)
    assert [seen.count(layer) for layer in range(len(sizes))] == [-(-size // step) for size in sizes]
    a_turn = [(LENGTH + step) / size for size in sizes]
    had = [0.0] * len(sizes)
    for layer in seen:
        had[layer] += step / sizes[layer]
        for other in range(len(sizes)):
            in_work = had[layer] < 1 and had[other] < 1
            assert not in_work or abs(had[layer] - had[other]) <= a_turn[layer] + a_turn[other] + 1e-9


def late(waits: Waits, others: int) -> tuple[int, int]:
    """Let a layer come when others, as large, are half done; gives how much these and it did until it was half done."""
    half = 20
    turns, threads, seen = Turns(1), Threads(), list[str]()
    came = threading.Event()

    def come() -> None:
        with turns.turn(2 * half * LENGTH) as turn:
            for _ in range(2 * half):
                seen.append("late")
                turn.worked(LENGTH)

    def work() -> None:
        with turns.turn(2 * half * LENGTH) as turn:
            for _ in range(2 * half):
                if len(seen) >= half * others and not came.is_set():
                    came.set()
                    before = waits.count
                    threads.start(come)
                    waits.until(before + 1)
                    seen.append("came")
                seen.append("early")
                turn.worked(LENGTH)

    with turns.turn(1):
        for _ in range(others):
            before = waits.count
            threads.start(work)
            waits.until(before + 1)
    threads.join()
    since = seen[seen.index("came") + 1 :]
    until = [at for at, who in enumerate(since) if who == "late"][half - 1]
    return since[:until].count("early"), since[:until].count("late")


@pytest.mark.parametrize("others", [2, 3])
def test_who_comes_later_does_not_get_the_turns_that_others_had_before(waits: Waits, others: int) -> None:
    early, its = late(waits, others)
    assert early >= others * (its - 2)


def test_who_comes_later_does_not_get_the_turns_that_one_had_alone(waits: Waits) -> None:
    early, its = late(waits, 1)
    assert early >= its - 2


def test_who_comes_later_is_not_last_either(waits: Waits) -> None:
    early, its = late(waits, 2)
    assert its >= 15
    assert early <= 2 * (its + 2)


def test_who_comes_when_all_have_ended_is_as_good_as_new(waits: Waits) -> None:
    turns, threads, seen = Turns(1), Threads(), list[int]()

    def work(layer: int) -> None:
        with turns.turn(10 * LENGTH) as turn:
            for _ in range(10):
                seen.append(layer)
                turn.worked(LENGTH)

    for pair in ((0, 1), (2, 3)):
        with turns.turn(1):
            for layer in pair:
                before = waits.count
                threads.start(lambda layer=layer: work(layer))  # type: ignore[misc]
                waits.until(before + 1)
        threads.join()
    assert [layer - 2 for layer in seen[20:]] == seen[:20]
