"""The line of one queue: window, `follows`, rewind; and the promise that order and uniqueness hold whatever happens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zrmq.client.send_queue import WINDOW_MAX, SendQueue
from zrmq.protocol.limits import INFLIGHT_BATCHES_MAX


@dataclass(eq=False)
class FakeBatch:
    """As little of a batch as the line needs."""

    first_sequence: int
    record_count: int = 1
    producer_id: int = 7

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + self.record_count - 1

    def __repr__(self) -> str:
        return f"<{self.first_sequence}>"


def line_of(count: int, window_max: int = WINDOW_MAX) -> tuple[SendQueue[FakeBatch], list[FakeBatch]]:
    line: SendQueue[FakeBatch] = SendQueue(window_max)
    batches = [FakeBatch(10 * number + 1, 10) for number in range(count)]
    for batch in batches:
        line.add(batch)
    return line, batches


def send_all(line: SendQueue[FakeBatch]) -> list[tuple[FakeBatch, int]]:
    steps = []
    while (step := line.next()) is not None:
        steps.append(step)
    return steps


def test_sends_in_order_and_names_the_unanswered_predecessor() -> None:
    line, (a, b, c) = line_of(3)
    assert send_all(line) == [(a, 0), (b, 10), (c, 20)]


def test_an_answered_predecessor_is_not_named() -> None:
    line, (a, b) = line_of(2, window_max=1)
    assert send_all(line) == [(a, 0)]
    line.acknowledged(a)
    assert send_all(line) == [(b, 0)]


def test_a_predecessor_that_cannot_be_named_is_waited_for() -> None:
    """A sequence means something beside its producer id only: a broker may have another batch of that number."""
    line, (a, b) = line_of(2)
    a.producer_id = 99
    assert send_all(line) == [(a, 0)]
    line.acknowledged(a)
    assert send_all(line) == [(b, 0)]


def test_the_window_bounds_what_is_unanswered() -> None:
    line, batches = line_of(5, window_max=2)
    assert [batch for batch, _ in send_all(line)] == batches[:2]
    assert not line.has_room
    line.acknowledged(batches[0])
    assert [batch for batch, _ in send_all(line)] == batches[2:3]


def test_has_room_only_for_what_would_go_out_at_once() -> None:
    line, (a,) = line_of(1, window_max=2)
    assert not line.has_room  # one waits already
    send_all(line)
    assert line.has_room
    line.refused(a)
    assert not line.has_room  # it waits again


def test_nothing_goes_out_between_a_refusal_and_the_last_answer() -> None:
    line, (a, b, c, d) = line_of(4, window_max=3)
    send_all(line)
    line.refused(a)
    assert send_all(line) == []
    line.refused(b)
    assert send_all(line) == []
    line.refused(c)
    assert send_all(line) == [(a, 0), (b, 10), (c, 20)]
    assert list(line) == [a, b, c, d]


def test_a_rewind_leaves_out_what_was_stored() -> None:
    line, (a, b, c) = line_of(3)
    send_all(line)
    line.refused(a)
    line.acknowledged(b)
    line.refused(c)
    assert send_all(line) == [(a, 0), (c, 10)]


def test_giving_up_the_last_unanswered_one_lets_the_rest_go_again() -> None:
    line, (a, b) = line_of(2)
    send_all(line)
    line.refused(b)
    line.remove(a)
    assert send_all(line) == [(b, 0)]


def test_giving_up_a_refused_one() -> None:
    line, (a, b) = line_of(2)
    send_all(line)
    line.refused(a)
    line.remove(a)
    line.acknowledged(b)
    assert len(line) == 0


def test_giving_up_one_that_waits() -> None:
    line, (a, b, c) = line_of(3, window_max=1)
    send_all(line)
    line.remove(b)
    line.acknowledged(a)
    assert send_all(line) == [(c, 0)]


def test_unanswered_are_those_with_the_broker() -> None:
    line, (a, b, c) = line_of(3, window_max=2)
    assert line.unanswered == []
    send_all(line)
    assert line.unanswered == [a, b]
    line.refused(a)
    assert line.unanswered == [b]
    assert list(line) == [a, b, c]


def test_a_report_for_a_batch_that_is_not_there_is_a_fault() -> None:
    line, _ = line_of(1)
    with pytest.raises(ValueError, match="not in"):
        line.acknowledged(FakeBatch(99))


class Delivery(RuleBasedStateMachine):
    """One line, a link that resends as zrmq's does, and a broker that checks as zrmq's does. Anything may happen between them.

    The broker's log must hold the batches in the order of the line and none twice, at every moment.
    """

    @initialize(window_max=st.integers(1, WINDOW_MAX))
    def begin(self, window_max: int) -> None:
        self.line: SendQueue[FakeBatch] = SendQueue(window_max)
        self.sequence = 1
        self.added: list[FakeBatch] = []
        self.given_up: set[FakeBatch] = set()
        self.stored: set[FakeBatch] = set()
        self.log: list[FakeBatch] = []
        self.number = 0
        self.outstanding: dict[int, tuple[FakeBatch, int]] = {}
        self.to_broker: deque[tuple[int, FakeBatch, int]] = deque()
        self.to_client: deque[tuple[int, str]] = deque()
        self.is_connected = True

    @rule(record_counts=st.lists(st.integers(1, 3), min_size=1, max_size=5))
    def add(self, record_counts: list[int]) -> None:
        for record_count in record_counts:
            batch = FakeBatch(self.sequence, record_count)
            self.sequence += record_count
            self.added.append(batch)
            self.line.add(batch)
        self.send()

    def send(self) -> None:
        if self.is_connected:
            for batch, follows in send_all(self.line):
                self.number += 1
                self.outstanding[self.number] = (batch, follows)
                self.to_broker.append((self.number, batch, follows))

    @precondition(lambda self: self.to_broker)
    @rule(refusals=st.lists(st.booleans(), min_size=1, max_size=6))
    def broker_takes(self, refusals: list[bool]) -> None:
        for has_no_space in refusals[: len(self.to_broker)]:
            number, batch, follows = self.to_broker.popleft()
            self.answer(number, self.store(batch, follows, has_no_space))

    def store(self, batch: FakeBatch, follows: int, has_no_space: bool) -> str:
        remembered = self.log[-INFLIGHT_BATCHES_MAX:]
        if batch in remembered:
            return "stored"
        if follows and follows not in {other.last_sequence for other in remembered}:
            return "out of order"
        if has_no_space:
            return "refused"
        self.log.append(batch)
        return "stored"

    def answer(self, number: int, text: str) -> None:
        if self.is_connected:
            self.to_client.append((number, text))

    @precondition(lambda self: self.to_client)
    @rule(answers=st.integers(1, 16))
    def client_hears(self, answers: int) -> None:
        for _ in range(min(answers, len(self.to_client))):
            number, text = self.to_client.popleft()
            if number not in self.outstanding:
                continue  # given up, or answered before the connection broke
            batch, _ = self.outstanding.pop(number)
            if text == "stored":
                self.stored.add(batch)
                self.line.acknowledged(batch)
            else:
                self.line.refused(batch)
        self.send()

    @precondition(lambda self: self.is_connected)
    @rule(arriving=st.integers(0, 8))
    def break_connection(self, arriving: int) -> None:
        """Some of what is on its way still arrives; its answers do not."""
        self.is_connected = False
        self.to_client.clear()
        for number, batch, follows in list(self.to_broker)[:arriving]:
            self.answer(number, self.store(batch, follows, False))
        self.to_broker.clear()

    @precondition(lambda self: not self.is_connected)
    @rule()
    def reconnect(self) -> None:
        self.is_connected = True
        for number, (batch, follows) in self.outstanding.items():
            self.to_broker.append((number, batch, follows))
        self.send()

    @precondition(lambda self: len(self.line) > 0)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(list(self.line)))
        self.given_up.add(batch)
        self.line.remove(batch)
        for number in [number for number, (other, _) in self.outstanding.items() if other is batch]:
            del self.outstanding[number]
        self.send()

    @invariant()
    def log_is_in_order_and_without_repeats(self) -> None:
        log = [batch.first_sequence for batch in getattr(self, "log", [])]
        assert log == sorted(set(log))

    @invariant()
    def window_is_kept(self) -> None:
        if hasattr(self, "line"):
            assert len(self.line.unanswered) <= self.line.window_max

    def teardown(self) -> None:
        """Left alone, everything that was not given up gets into the log."""
        if not hasattr(self, "line"):
            return
        if not self.is_connected:
            self.reconnect()
        for _ in range(10 * len(self.added) + 10):
            self.send()
            while self.to_broker:
                self.broker_takes([False])
            while self.to_client:
                self.client_hears(1)
        self.log_is_in_order_and_without_repeats()
        assert len(self.line) == 0
        assert self.stored == set(self.added) - self.given_up
        assert self.stored <= set(self.log)


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=200, stateful_step_count=30)
