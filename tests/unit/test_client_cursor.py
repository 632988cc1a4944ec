"""The cursor of a pull consumer: what counts as given and finished, however polls and iterations are mixed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import zrmq.consumer as consumer_module
from tests.unit.interrupts import Interrupt
from tests.unit.test_client_inbox import Q0, Q1, Desk, offsets
from zrmq.client import cursor as cursor_module
from zrmq.client import inbox as inbox_module
from zrmq.client import process_queue as process_queue_module
from zrmq.client.cursor import Cursor
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.consumer import PullConsumer


@pytest.fixture
def desk() -> Desk:
    return Desk()


def iterate(cursor: Cursor, count: int) -> list[int]:
    """What a `for` loop does that is left after `count` messages."""
    found: list[int] = []
    rest = cursor.rest
    while len(found) < count:
        item = next(rest, None)
        if item is None:
            break
        cursor.index, message = item
        found.append(message.queue_offset)
    return found


def begin(desk: Desk, count: int = 5) -> tuple[ProcessQueue, Cursor, Unit]:
    """An iteration over a unit of `count` messages."""
    queue, cursor = desk.queue(), Cursor(desk.inbox)
    desk.put(queue, count)
    unit = desk.taken()
    cursor.enter_unit(unit)
    return queue, cursor, unit


def test_polled_units_are_finished_by_the_next_poll(desk: Desk) -> None:
    queue, cursor = desk.queue(), Cursor(desk.inbox)
    desk.put(queue, 5)
    cursor.give([desk.taken(3)])
    cursor.settle()
    assert queue.commit_offset == 0
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight) == (3, 0)


class InterruptedReader:
    """A pull consumer's calls without its engine; the loop's side pulls what was forgotten again."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.queues = [desk.queue(Q0), desk.queue(Q1)]
        self.cursor = Cursor(desk.inbox)
        self.consumer = PullConsumer("G")
        engine: Any = SimpleNamespace(inbox=desk.inbox)
        self.consumer._ready = lambda: (engine, self.cursor)  # type: ignore[method-assign]
        self.given: list[tuple[int, int]] = []

    def turn(self) -> None:
        for queue in self.queues:
            while queue.pull_offset < 6:
                self.desk.put(queue, *[1] * min(2, 6 - queue.pull_offset))

    def poll(self) -> None:
        for message in self.consumer.poll(3, timeout_ms=0):
            self.given.append((message.queue.queue_id, message.queue_offset))

    def iterate(self) -> None:
        for message in self.consumer:
            self.given.append((message.queue.queue_id, message.queue_offset))
            if message.queue_offset % 3 == 2:
                break

    def mix(self) -> None:
        for message in self.consumer:
            self.given.append((message.queue.queue_id, message.queue_offset))
            self.poll()
            if len(self.given) > 8:
                break


    def lose(self) -> None:
        """The queue that the iteration is in goes to another member."""
        for message in self.consumer:
            self.given.append((message.queue.queue_id, message.queue_offset))
            if len(self.given) == 2:
                self.desk.inbox.drain(self.queues[message.queue.queue_id])
            if len(self.given) > 5:
                break

    def commit(self) -> None:
        """What is finished was given."""
        self.cursor.finish_given()
        for queue in self.queues:
            given = [offset for queue_id, offset in self.given if queue_id == queue.queue.queue_id]
            assert queue.commit_offset <= len(given), (queue.commit_offset, given)


Step = Callable[[InterruptedReader], None]


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("step", [InterruptedReader.poll, InterruptedReader.iterate, InterruptedReader.mix])
def test_what_an_exception_kept_from_the_caller_comes_again(step: Step, is_committed: bool) -> None:
    """Ctrl-C at every place where Python may run a handler: what is finished was given, and what is left is not forgotten."""
    places = 0
    while True:
        reader = InterruptedReader(Desk())
        interrupt = Interrupt(places, consumer_module, cursor_module, inbox_module, process_queue_module)
        for _ in range(2):
            reader.turn()
            with interrupt.may_come():
                step(reader)
            if is_committed:
                reader.commit()
        for _ in range(8):
            reader.turn()
            reader.poll()
        reader.cursor.finish_given()
        for queue in reader.queues:
            offsets = [offset for queue_id, offset in reader.given if queue_id == queue.queue.queue_id]
            assert offsets == list(range(6)), places
            assert (queue.commit_offset, queue.in_flight) == (6, 0)
        if not interrupt.came:
            break
        places += 1
    assert places > 50


@pytest.mark.parametrize("after", [InterruptedReader.commit, InterruptedReader.poll, InterruptedReader.iterate])
def test_nothing_is_finished_that_was_kept_from_the_caller_of_a_queue_that_goes(after: Step) -> None:
    places = 0
    while True:
        reader = InterruptedReader(Desk())
        interrupt = Interrupt(places, consumer_module, cursor_module, inbox_module, process_queue_module)
        reader.turn()
        with interrupt.may_come():
            reader.lose()
        after(reader)
        reader.commit()
        assert min(queue.in_flight for queue in reader.queues) == 0, "the queue that goes is let go"
        if not interrupt.came:
            break
        places += 1
    assert places > 50


def test_an_iteration_that_goes_on_behind_another_one_finishes_nothing_of_its_unit() -> None:
    """Whatever keeps it from going on, the loop's side may settle at any moment."""
    places = 0
    while True:
        reader = InterruptedReader(Desk())
        for queue in reader.queues:
            reader.desk.put(queue, 6)
        left, other = iter(reader.consumer), iter(reader.consumer)
        got = [next(left), next(left), *reader.consumer.poll(1, timeout_ms=0), *(next(other) for _ in range(4))]
        interrupt = Interrupt(places, consumer_module, cursor_module, inbox_module, process_queue_module)
        with interrupt.may_come():
            got.append(next(left))
        reader.cursor.settle()
        for queue in reader.queues:
            offsets = [message.queue_offset for message in got if message.queue == queue.queue]
            assert queue.commit_offset <= max(len(offsets) - (got[-1].queue == queue.queue), 0)
        if not interrupt.came:
            break
        places += 1
    assert places > 2


def test_an_iteration_finishes_what_lies_before_the_last_given(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    assert iterate(cursor, 3) == [0, 1, 2]
    cursor.settle()
    assert (queue.commit_offset, queue.in_flight) == (2, 1)


def test_an_iteration_that_has_given_nothing_has_finished_nothing(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    cursor.settle()
    assert queue.commit_offset == 0


def test_all_that_was_given_may_be_called_finished(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 3)
    cursor.finish_given()
    assert (queue.commit_offset, queue.in_flight, cursor.position(queue)) == (3, 1, 3)


def test_a_unit_left_behind_is_finished(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 9)
    cursor.leave_unit()
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight) == (5, 0)


def test_a_unit_cut_short_is_finished_up_to_there(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 3)
    desk.inbox.drain(queue)
    assert cursor.is_void()
    cursor.leave_unit()
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight, desk.wakes) == (3, 0, 1)


def test_a_poll_takes_what_an_iteration_has_left(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 2)
    cursor.finish()
    assert [message.queue_offset for message in cursor.take_rest(2)] == [2, 3]
    assert cursor.position(queue) == 4
    assert [message.queue_offset for message in cursor.take_rest(9)] == [4]
    assert cursor.take_rest(9) == []
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight) == (5, 0)


def test_what_a_poll_took_of_a_unit_is_finished_by_the_next_one(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 1)
    cursor.finish()
    cursor.take_rest(3)
    cursor.settle()
    assert queue.commit_offset == 1, "what the iteration gave, and nothing of what the poll did"
    cursor.finish_given()
    assert (queue.commit_offset, cursor.position(queue)) == (4, 4)
    cursor.take_rest(9)
    cursor.settle()
    assert queue.commit_offset == 4
    cursor.finish_given()
    assert (queue.commit_offset, queue.in_flight) == (5, 0)


def test_an_iteration_that_goes_on_gives_nothing_again_that_a_poll_took() -> None:
    reader = InterruptedReader(Desk())
    reader.turn()
    iteration = iter(reader.consumer)
    got = [next(iteration)]
    got += reader.consumer.poll(1, timeout_ms=0)
    got += [next(iteration) for _ in range(10)]
    for queue_id in (0, 1):
        assert [message.queue_offset for message in got if message.queue.queue_id == queue_id] == list(range(6))


def test_a_poll_lets_a_queue_go_that_an_iteration_was_in() -> None:
    """At once: the next one may be a while."""
    reader = InterruptedReader(Desk())
    reader.turn()
    queue = next(iter(reader.consumer)).queue
    for each in reader.queues:
        reader.desk.inbox.drain(each)
    assert reader.consumer.poll(timeout_ms=0) == []
    assert [each.in_flight for each in reader.queues] == [0, 0]
    assert [each.commit_offset for each in reader.queues] == [int(each.queue == queue) for each in reader.queues]


def test_an_iteration_goes_on_behind_such_a_poll(desk: Desk) -> None:
    _, cursor, _ = begin(desk)
    iterate(cursor, 1)
    cursor.take_rest(2)
    assert iterate(cursor, 9) == [3, 4]


def test_a_poll_takes_nothing_of_a_queue_that_is_gone(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 2)
    desk.inbox.drain(queue)
    assert cursor.take_rest(9) == []
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight) == (2, 0)


@pytest.mark.parametrize("ask", [InterruptedReader.poll, InterruptedReader.iterate])
def test_what_an_iteration_has_left_of_a_paused_queue_comes_when_it_is_resumed(ask: Step) -> None:
    reader = InterruptedReader(Desk())
    paused, other = reader.queues
    for queue in reader.queues:
        reader.desk.put(queue, 6)
    iteration = iter(reader.consumer)
    for message in (next(iteration), next(iteration)):
        reader.given.append((message.queue.queue_id, message.queue_offset))
    reader.desk.inbox.pause(paused, True)
    ask(reader)
    ask(reader)
    assert reader.given == [(0, 0), (0, 1), *((1, offset) for offset in range(6))]
    assert reader.cursor.position(paused) == 2
    reader.commit()
    assert (paused.commit_offset, paused.in_flight, other.commit_offset) == (2, 0, 6)
    reader.desk.inbox.pause(paused, False)
    reader.turn()
    for message in reader.consumer.poll(9, timeout_ms=0):
        reader.given.append((message.queue.queue_id, message.queue_offset))
    assert reader.given[-4:] == [(0, offset) for offset in range(2, 6)]


def test_finishing_older_units_leaves_the_present_one_in_flight(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    iterate(cursor, 9)
    cursor.leave_unit()
    desk.put(queue, 3)
    cursor.enter_unit(desk.taken())
    iterate(cursor, 1)
    cursor.finish()
    assert (queue.commit_offset, queue.in_flight) == (5, 2)
    desk.inbox.drain(queue)
    assert queue.in_flight, "the loop must not take the queue away from under the iteration"


def test_the_position_is_behind_what_was_given(desk: Desk) -> None:
    queue, cursor, _ = begin(desk)
    other = desk.queue(offset=7)
    iterate(cursor, 2)
    assert (cursor.position(queue), cursor.position(other)) == (2, 7)
    iterate(cursor, 9)
    assert cursor.position(queue) == 5


class Caller(RuleBasedStateMachine):
    """A caller that polls and iterates in any mixture; a loop that settles at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.queue = self.desk.queue()
        self.cursor = Cursor(self.desk.inbox)
        self.given: list[int] = []
        self.open = 0  # of those, how many the caller may be at work on

    @rule(counts=st.lists(st.integers(1, 5), min_size=1, max_size=2))
    def arrive(self, counts: list[int]) -> None:
        self.desk.put(self.queue, *counts)

    @rule(messages_max=st.integers(1, 6))
    def poll(self, messages_max: int) -> None:
        self.cursor.finish_given()
        got = [message.queue_offset for message in self.cursor.take_rest(messages_max)]
        while len(got) < messages_max and (unit := self.desk.take(messages_max - len(got))) is not None:
            self.cursor.give([unit])
            got += offsets(unit)
        assert len(got) <= messages_max
        self.given += got
        self.open = len(got)

    @rule(count=st.integers(1, 6))
    def loop(self, count: int) -> None:
        while count:
            got = iterate(self.cursor, count)
            self.given += got
            self.open = min(len(got), 1) or self.open
            count -= len(got)
            if not count:
                return
            self.cursor.leave_unit()
            self.cursor.finish()
            self.open = 0
            unit: Any = self.desk.take(4)
            if unit is None:
                return
            self.cursor.enter_unit(unit)

    @rule()
    def settle(self) -> None:
        self.cursor.settle()

    @precondition(lambda self: self.given)
    @rule()
    def finish_given(self) -> None:
        self.cursor.finish_given()
        self.open = 0
        assert self.queue.commit_offset == len(self.given)

    @invariant()
    def everything_is_given_once_in_order(self) -> None:
        assert self.given == list(range(len(self.given)))
        assert self.cursor.position(self.queue) >= len(self.given)

    @invariant()
    def nothing_is_finished_while_the_caller_is_at_work_on_it(self) -> None:
        assert self.queue.commit_offset <= len(self.given) - self.open


TestCaller = Caller.TestCase
