"""Calling listeners: units that fit their speed, failures that come again, and an early end when the queue goes away."""

from __future__ import annotations

import doctest
from collections.abc import AsyncIterator, Callable, Iterator
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zrmq.client.listening
from tests.unit.stored import stored_batch
from zrmq.client.listening import UNIT_MESSAGES_MAX, UNIT_MS, Outcome, Pace, retry_ms, run_unit
from zrmq.client.process_queue import Chunk, ProcessQueue, Unit, open_chunk
from zrmq.message import Message, MessageQueue
from zrmq.testing.clock import ManualClock


def unit_of(count: int) -> Unit:
    queue = ProcessQueue(MessageQueue("meters", "broker-a", 0), 0)
    queue.add(Chunk([stored_batch(0, count)], 0, count))
    chunk = queue.begin_opening()
    assert chunk is not None
    queue.end_opening(chunk, open_chunk(chunk, queue))
    unit = queue.cut(count)
    assert unit is not None
    return unit


def run(unit: Unit, listener: Callable[[Message], object], *, in_order: bool = False, pace: Pace | None = None) -> Outcome:
    return run_unit(unit, listener, pace or Pace(), ManualClock(), in_order=in_order)


def failing_at(*offsets: int) -> Callable[[Message], None]:
    def listen(message: Message) -> None:
        if message.queue_offset in offsets:
            raise ValueError(f"not {message.queue_offset}")

    return listen


# --- pace ---------------------------------------------------------------------------------------------------------------


def test_a_fast_listener_gets_many_at_once() -> None:
    pace = Pace()
    sizes = []
    for _ in range(10):
        sizes.append(pace.messages)
        pace.measure(pace.messages, pace.messages * 0.001)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]


def test_a_slow_listener_gets_one() -> None:
    pace = Pace()
    for _ in range(3):
        pace.measure(1, 1_000.0)
    assert pace.messages == 1


def test_a_listener_between_gets_what_fits() -> None:
    pace = Pace()
    for _ in range(20):
        pace.measure(pace.messages, pace.messages * 0.5)
    assert pace.messages == UNIT_MS / 0.5


def test_a_listener_that_becomes_slow_is_noticed() -> None:
    pace = Pace()
    for _ in range(10):
        pace.measure(pace.messages, 0.0)
    pace.measure(pace.messages, pace.messages * 100.0)
    assert pace.messages == 1


@given(st.lists(st.tuples(st.integers(1, 256), st.floats(0.0, 1e6))))
def test_a_unit_always_has_a_size(measured: list[tuple[int, float]]) -> None:
    pace = Pace()
    for messages, elapsed_ms in measured:
        pace.measure(messages, elapsed_ms)
        assert 1 <= pace.messages <= UNIT_MESSAGES_MAX


def test_only_what_was_handled_is_measured() -> None:
    clock, pace = ManualClock(), Pace()
    unit = unit_of(100)

    def listen(message: Message) -> None:
        clock.advance(2)
        unit.process_queue.is_draining = message.queue_offset == 1

    run_unit(unit, listen, pace, clock, in_order=False)
    assert pace.messages == 2


# --- retries ------------------------------------------------------------------------------------------------------------


def test_the_documented_waits() -> None:
    assert doctest.testmod(zrmq.client.listening).failed == 0


@given(st.integers(1, 10**9))
def test_waits_grow_to_a_bound(attempt: int) -> None:
    assert 1_000.0 <= retry_ms(attempt) <= retry_ms(attempt + 1) <= 60_000.0


# --- units --------------------------------------------------------------------------------------------------------------


def test_a_unit_without_failures_is_done_whole() -> None:
    seen: list[int] = []
    outcome = run(unit_of(3), lambda message: seen.append(message.queue_offset))
    assert seen == [0, 1, 2]
    assert outcome == Outcome([], 3)


def test_out_of_order_each_failed_message_comes_again_alone() -> None:
    outcome = run(unit_of(5), failing_at(1, 3))
    assert [(failure.unit.offset, failure.unit.next_offset) for failure in outcome.failures] == [(1, 2), (3, 4)]
    assert [str(failure.error) for failure in outcome.failures] == ["not 1", "not 3"]
    assert outcome.stop_offset == 5


def test_in_order_a_failed_message_comes_again_with_all_behind_it() -> None:
    seen: list[int] = []

    def listen(message: Message) -> None:
        seen.append(message.queue_offset)
        failing_at(2)(message)

    outcome = run(unit_of(5), listen, in_order=True)
    assert seen == [0, 1, 2]
    (failure,) = outcome.failures
    assert [message.queue_offset for message in failure.unit.messages] == [2, 3, 4]
    assert (failure.unit.offset, failure.unit.next_offset) == (2, 5)


@pytest.mark.parametrize("in_order", [False, True])
def test_attempts_are_counted_and_waits_grow(in_order: bool) -> None:
    unit, waits = unit_of(1), []
    for attempt in range(1, 4):
        assert unit.messages[0].delivery_attempt == attempt
        (failure,) = run(unit, failing_at(0), in_order=in_order).failures
        waits.append(failure.retry_ms)
        unit = failure.unit
    assert waits == [1_000.0, 2_000.0, 4_000.0]


async def coroutine() -> None: ...


def generator() -> Iterator[None]:
    yield


async def generator_to_await() -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("returned", [coroutine, generator, generator_to_await])
def test_what_nobody_runs_has_handled_nothing(returned: Callable[[], object]) -> None:
    """Such as the coroutine of a lambda around a coroutine function."""
    outcome = run(unit_of(2), lambda message: returned())
    assert [failure.unit.messages[0].queue_offset for failure in outcome.failures] == [0, 1]
    assert all("which nobody runs" in str(failure.error) for failure in outcome.failures)


@pytest.mark.parametrize("returned", [0, "", [1], {"a": 1}, b"x", MagicMock()])
def test_what_a_listener_returns_otherwise_is_its_own(returned: object) -> None:
    assert run(unit_of(2), lambda message: returned).failures == []


@pytest.mark.parametrize("flag", ["is_draining", "is_dropped"])
def test_a_unit_ends_early_when_its_queue_goes_away(flag: str) -> None:
    unit, seen = unit_of(5), []

    def listen(message: Message) -> None:
        seen.append(message.queue_offset)
        setattr(unit.process_queue, flag, len(seen) == 2)

    assert run(unit, listen) == Outcome([], 2)
    assert seen == [0, 1]


@pytest.mark.parametrize("in_order", [False, True])
def test_what_is_left_of_a_unit_comes_when_its_queue_is_resumed(in_order: bool) -> None:
    unit, seen = unit_of(5), []

    def listen(message: Message) -> None:
        seen.append(message.queue_offset)
        unit.process_queue.is_paused = len(seen) == 2

    outcome = run(unit, listen, in_order=in_order)
    assert (seen, outcome.stop_offset) == ([0, 1], 2)
    assert [([each.queue_offset for each in failure.unit.messages], failure.retry_ms) for failure in outcome.failures] == [
        ([2, 3, 4], 0.0)
    ]


def test_a_unit_of_a_queue_that_is_gone_is_not_begun() -> None:
    unit = unit_of(5)
    unit.process_queue.is_dropped = True
    pace = Pace()
    assert run(unit, failing_at(0), pace=pace) == Outcome([], 0)
    assert pace.messages == 1


def test_a_listener_may_end_the_program() -> None:
    def leave(message: Message) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(unit_of(2), leave)


def test_a_unit_that_takes_too_long_is_shared_with_other_threads() -> None:
    clock, pace = ManualClock(), Pace()
    unit = unit_of(20)
    outcome = run_unit(unit, lambda message: clock.advance(1_000), pace, clock, in_order=True)
    (rest,) = outcome.failures
    assert (rest.error, rest.retry_ms) == (None, 0.0)
    assert [message.queue_offset for message in rest.unit.messages] == list(range(1, 20))
    assert (rest.unit.offset, rest.unit.next_offset) == (1, 20)
    assert {message.delivery_attempt for message in rest.unit.messages} == {1}
    assert pace.messages == 1


def test_a_unit_that_becomes_slow_is_shared_soon() -> None:
    clock, seen = ManualClock(), []

    def listen(message: Message) -> None:
        seen.append(message.queue_offset)
        if message.queue_offset >= 3:
            clock.advance(1_000)

    (rest,) = run_unit(unit_of(256), listen, Pace(), clock, in_order=False).failures
    assert len(seen) <= 9
    assert rest.unit.offset == len(seen)


def test_a_slow_message_at_the_end_leaves_nothing_to_share() -> None:
    clock = ManualClock()
    assert run_unit(unit_of(1), lambda message: clock.advance(1_000), Pace(), clock, in_order=False).failures == []


def test_what_failed_before_a_slow_message_comes_again_too() -> None:
    clock = ManualClock()

    def listen(message: Message) -> None:
        clock.advance(1_000)
        raise ValueError("no")

    failed, rest = run_unit(unit_of(3), listen, Pace(), clock, in_order=False).failures
    assert (failed.unit.offset, failed.unit.next_offset, rest.unit.offset, rest.unit.next_offset) == (0, 1, 1, 3)
