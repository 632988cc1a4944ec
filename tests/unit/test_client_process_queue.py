"""The client's buffer of one queue: messages come out once and in order, and a commit never passes an unfinished one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.stored import body_of, stored_batch, unreadable_batch
from zrmq.client.process_queue import Account, Chunk, ProcessQueue, Unfinished, Unit, open_chunk
from zrmq.message import MessageQueue

QUEUE = MessageQueue("meters", "broker-a", 0)


def chunk(offset: int, *counts: int, next_offset: int | None = None) -> Chunk:
    """Batches of these sizes, one after the other, in one frame."""
    frames, at = [], offset
    for count in counts:
        frames.append(stored_batch(at, count))
        at += count
    return Chunk([b"".join(frames)] if frames else [], offset, at if next_offset is None else next_offset)


def opened(queue: ProcessQueue) -> None:
    """Open the next chunk, as a caller does."""
    begun = queue.begin_opening()
    if begun is not None:
        queue.end_opening(begun, open_chunk(begun, queue))


def take(queue: ProcessQueue, messages_max: int = 1_000) -> Unit:
    opened(queue)
    unit = queue.cut(messages_max)
    assert unit is not None
    return unit


def offsets(unit: Unit) -> list[int]:
    return [message.queue_offset for message in unit.messages]


# --- ranges -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 20))))
def test_unfinished_ranges_behave_like_a_set(steps: list[tuple[bool, int, int]]) -> None:
    ranges, model, end = Unfinished(), set[int](), 0
    for is_add, offset, length in steps:
        if is_add:
            ranges.add(end + offset % 3, end + offset % 3 + length)
            model |= set(range(end + offset % 3, end + offset % 3 + length))
            end += offset % 3 + length
        else:
            ranges.remove(offset, offset + length)
            model -= set(range(offset, offset + length))
        assert bool(ranges) == bool(model)
        if model:
            assert ranges.lowest == min(model)


def test_neighbours_are_one_range() -> None:
    ranges = Unfinished()
    for offset in range(0, 1_000_000, 10):
        ranges.add(offset, offset + 10)
    assert len(ranges._starts) == 1


# --- one way through ----------------------------------------------------------------------------------------------------


def test_messages_come_out_in_order_with_their_offsets() -> None:
    queue = ProcessQueue(QUEUE, 100)
    assert queue.add(chunk(100, 3, 2))
    assert queue.add(chunk(105, 4))
    assert queue.pull_offset == 109
    first, second = take(queue), take(queue)
    assert offsets(first) == [100, 101, 102, 103, 104]
    assert offsets(second) == [105, 106, 107, 108]
    assert [message.body for message in first.messages] == [body_of(offset) for offset in range(100, 105)]
    assert first.messages[0].queue == QUEUE
    assert not queue.has_more


def test_units_are_cut_from_a_chunk() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 7))
    assert [offsets(take(queue, 3)) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert queue.cut(3) is None
    assert queue.position == 7


def test_a_batch_that_begins_before_the_offset_is_trimmed() -> None:
    queue = ProcessQueue(QUEUE, 12)
    queue.add(Chunk([stored_batch(10, 5)], 12, 15))
    assert offsets(take(queue)) == [12, 13, 14]


def test_a_batch_that_ends_before_the_offset_is_left_out() -> None:
    queue = ProcessQueue(QUEUE, 12)
    queue.add(Chunk([stored_batch(8, 4) + stored_batch(12, 2)], 12, 14))
    assert offsets(take(queue)) == [12, 13]


def test_the_commit_waits_for_the_lowest_unfinished() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 9))
    first, second, third = (take(queue, 3) for _ in range(3))
    queue.finish(third.offset, third.next_offset)
    assert queue.commit_offset == 0
    queue.finish(first.offset, first.next_offset)
    assert queue.commit_offset == 3
    queue.finish(4, 6)
    assert queue.commit_offset == 3
    queue.finish(3, 4)
    assert queue.commit_offset == 9
    assert second.next_offset == 6


def test_finishing_below_an_offset() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 9))
    take(queue, 5)
    queue.finish_below(2)
    assert queue.commit_offset == 2
    queue.finish_below(1)
    assert queue.commit_offset == 2
    queue.finish_below(queue.position)
    assert queue.commit_offset == 5


# --- filters ------------------------------------------------------------------------------------------------------------


def test_tags_are_compared_exactly() -> None:
    queue = ProcessQueue(QUEUE, 0, wanted_tags=frozenset({"hall"}))
    queue.add(Chunk([stored_batch(0, 4, tags=["hall", None, "halls", "hall"])], 0, 4))
    unit = take(queue)
    assert offsets(unit) == [0, 3]
    assert (unit.offset, unit.next_offset) == (0, 4)


def test_unwanted_messages_do_not_hold_the_commit_back() -> None:
    queue = ProcessQueue(QUEUE, 0, wanted_tags=frozenset({"hall"}))
    queue.add(Chunk([stored_batch(0, 4)], 0, 4))
    opened(queue)
    assert queue.cut(10) is None
    assert queue.commit_offset == queue.position == 4


def test_a_unit_covers_the_unwanted_behind_its_last_message() -> None:
    queue = ProcessQueue(QUEUE, 0, wanted_tags=frozenset({"hall"}))
    queue.add(Chunk([stored_batch(0, 5, tags=[None, "hall", None, "hall", None])], 0, 5))
    first, second = take(queue, 1), take(queue, 1)
    assert (first.offset, first.next_offset, second.offset, second.next_offset) == (0, 3, 3, 5)


def test_a_move_without_messages_waits_for_those_before_it() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 2))
    queue.add(Chunk([], 2, 50))
    unit = take(queue)
    assert queue.position == 2
    opened(queue)
    assert queue.cut(1) is None
    assert queue.position == 50
    assert queue.commit_offset == 0
    queue.finish(unit.offset, unit.next_offset)
    assert queue.commit_offset == 50


def test_a_move_with_nothing_before_it_counts_at_once() -> None:
    queue = ProcessQueue(QUEUE, 0)
    assert queue.add(Chunk([], 0, 50))
    assert not queue.has_more
    assert queue.commit_offset == queue.position == queue.pull_offset == 50


# --- accounting ---------------------------------------------------------------------------------------------------------


def test_what_is_pulled_counts_until_it_is_opened() -> None:
    account = Account()
    queue, other = ProcessQueue(QUEUE, 0, account=account), ProcessQueue(QUEUE, 0, account=account)
    first = chunk(0, 3)
    queue.add(first)
    other.add(first)
    assert (account.messages, account.size_bytes) == (6, 2 * first.size_bytes)
    assert (queue.held_messages, queue.held_bytes) == (3, first.size_bytes)
    take(queue, 1)
    assert account.messages == 3
    other.forget()
    assert (account.messages, account.size_bytes, other.held_bytes) == (0, 0, 0)


def test_resting_units_count_and_come_back_once() -> None:
    account = Account()
    queue = ProcessQueue(QUEUE, 0, account=account)
    queue.add(chunk(0, 3))
    unit = take(queue)
    queue.in_flight -= 1
    queue.rest(unit)
    assert (account.messages, account.size_bytes) == (3, sum(len(body_of(offset)) for offset in range(3)))
    assert queue.rouse(unit)
    assert not queue.rouse(unit)
    assert (account.messages, account.size_bytes, queue.in_flight) == (0, 0, 1)


def test_forgotten_resting_units_do_not_come_back() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 3))
    unit = take(queue)
    queue.rest(unit)
    queue.forget_resting()
    assert not queue.rouse(unit)
    assert queue.commit_offset == 0
    assert queue.held_messages == 0


# --- going back ---------------------------------------------------------------------------------------------------------


def test_forgetting_goes_on_at_the_position() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 4))
    queue.add(chunk(4, 4))
    take(queue, 2)
    queue.forget()
    assert (queue.pull_offset, queue.position, queue.has_more) == (2, 2, False)
    assert not queue.add(chunk(8, 1)), "a reply to a pull made before does not fit any more"
    queue.add(Chunk([stored_batch(0, 4)], 2, 4))
    assert offsets(take(queue)) == [2, 3]


def test_a_chunk_opened_meanwhile_is_forgotten_too() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(chunk(0, 4))
    begun = queue.begin_opening()
    assert begun is not None
    queue.forget()
    queue.end_opening(begun, open_chunk(begun, queue))
    assert queue.cut(1) is None
    assert queue.pull_offset == 0


# --- damage -------------------------------------------------------------------------------------------------------------


def damaged(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def test_what_was_damaged_on_the_way_is_pulled_again() -> None:
    queue = ProcessQueue(QUEUE, 0)
    queue.add(Chunk([stored_batch(0, 2) + damaged(stored_batch(2, 2)), stored_batch(4, 2)], 0, 6))
    queue.add(chunk(6, 1))
    assert offsets(take(queue)) == [0, 1]
    assert (queue.pull_offset, queue.damaged_offset, queue.held_messages) == (2, 2, 0)
    queue.add(chunk(2, 2, 2))
    assert offsets(take(queue)) == [2, 3, 4, 5]


def test_what_stays_damaged_is_skipped() -> None:
    queue = ProcessQueue(QUEUE, 0)
    for _ in range(2):
        queue.add(Chunk([damaged(stored_batch(0, 2)), stored_batch(2, 2)], 0, 4))
        opened(queue)
    unit = queue.cut(10)
    assert unit is not None
    assert offsets(unit) == [2, 3]
    assert (unit.offset, unit.next_offset) == (0, 4)


def test_damage_is_told() -> None:
    queue = ProcessQueue(QUEUE, 0)
    once = open_chunk(Chunk([damaged(stored_batch(0, 2))], 0, 2), queue)
    assert (once.next_offset, once.skipped_count) == (0, 0)
    assert "does not check out" in once.damage
    queue.damaged_offset = 0
    twice = open_chunk(Chunk([damaged(stored_batch(0, 2))], 0, 2), queue)
    assert (twice.next_offset, twice.skipped_count) == (2, 1)


def test_a_batch_written_unreadable_is_skipped_at_once() -> None:
    result = open_chunk(Chunk([stored_batch(0, 1) + unreadable_batch(1, 2) + stored_batch(3, 1)], 0, 4), ProcessQueue(QUEUE, 0))
    assert [message.queue_offset for message in result.messages] == [0, 3]
    assert (result.next_offset, result.skipped_count) == (4, 1)
    assert "cannot be read" in result.damage


@pytest.mark.parametrize("noise", [b"", b"x", b"ZR\x01\x01", bytes(200)])
def test_noise_instead_of_batches_ends_nothing(noise: bytes) -> None:
    queue = ProcessQueue(QUEUE, 5)
    for _ in range(2):
        queue.add(Chunk([noise], 5, 8))
        opened(queue)
    assert queue.position == 8


# --- everything together ------------------------------------------------------------------------------------------------


class Reading(RuleBasedStateMachine):
    """One queue that is pulled, handed out, finished in any order, forgotten, and damaged on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = ProcessQueue(QUEUE, 0)
        self.units: list[Unit] = []
        self.resting: list[Unit] = []
        self.seen: list[int] = []
        self.finished: set[int] = set()
        self.committed = 0
        self.damaged_count = 0

    @rule(counts=st.lists(st.integers(1, 6), max_size=3), early=st.integers(0, 2), is_damaged=st.booleans())
    def pull(self, counts: list[int], early: int, is_damaged: bool) -> None:
        offset = self.queue.pull_offset
        before = min(early, offset)
        frames = [stored_batch(offset - before, before + counts[0])] if counts else []
        at = offset + sum(counts[:1])
        for count in counts[1:]:
            frames.append(stored_batch(at, count))
            at += count
        if is_damaged and frames and self.queue.damaged_offset < 0 and self.damaged_count < 3:
            self.damaged_count += 1
            frames[-1] = damaged(frames[-1])
        assert self.queue.add(Chunk(frames, offset, at))

    @rule()
    def pull_nothing_but_a_later_offset(self) -> None:
        assert not self.queue.add(Chunk([], self.queue.pull_offset + 1, self.queue.pull_offset + 9))

    @rule(messages_max=st.integers(1, 8))
    def hand_out(self, messages_max: int) -> None:
        opened(self.queue)
        unit = self.queue.cut(messages_max)
        if unit is not None:
            assert 1 <= len(unit.messages) <= messages_max
            self.units.append(unit)
            self.seen += offsets(unit)

    @precondition(lambda self: self.units)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        unit = self.units.pop(data.draw(st.integers(0, len(self.units) - 1)))
        self.queue.finish(unit.offset, unit.next_offset)
        self.finished |= set(range(unit.offset, unit.next_offset))
        self.queue.in_flight -= 1

    @precondition(lambda self: self.units)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        unit = self.units.pop(data.draw(st.integers(0, len(self.units) - 1)))
        self.queue.rest(unit)
        self.queue.in_flight -= 1
        self.resting.append(unit)

    @precondition(lambda self: self.resting)
    @rule()
    def try_again(self) -> None:
        unit = self.resting.pop(0)
        assert self.queue.rouse(unit)
        self.units.append(unit)

    @rule()
    def forget(self) -> None:
        self.queue.forget()

    @invariant()
    def the_commit_is_the_lowest_unfinished(self) -> None:
        unfinished = set(range(self.queue.position)) - self.finished
        assert self.queue.commit_offset == min(unfinished, default=self.queue.position)

    @invariant()
    def nothing_goes_back(self) -> None:
        assert self.committed <= self.queue.commit_offset <= self.queue.position <= self.queue.pull_offset
        self.committed = self.queue.commit_offset

    @invariant()
    def everything_comes_once_in_order(self) -> None:
        assert self.seen == list(range(self.queue.position))

    @invariant()
    def the_count_adds_up(self) -> None:
        assert self.queue.in_flight == len(self.units)
        assert self.queue.held_messages >= sum(len(unit.messages) for unit in self.resting)
        if not self.queue.has_more and not self.resting:
            assert (self.queue.held_bytes, self.queue.held_messages) == (0, 0)


TestReading = Reading.TestCase
