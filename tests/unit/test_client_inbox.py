"""The inbox between the loop and the callers: each message is handed out once, in turn, and nothing that is not ours any more."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest

from tests.unit.reading_cluster import ReadyList
from tests.unit.stored import stored_batch
from zrmq.client.consumer_engine import ThreadQueue
from zrmq.client.inbox import Inbox
from zrmq.client.listening import Pace, run_unit
from zrmq.client.process_queue import Chunk, ProcessQueue, Unit
from zrmq.clock import SystemClock
from zrmq.message import Message, MessageQueue
from zrmq.testing.clock import ManualClock

Q0, Q1 = MessageQueue("meters", "broker-a", 0), MessageQueue("meters", "broker-a", 1)


class Desk:
    """An inbox on a clock turned by hand, with the loop's side played by the test."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.wakes = 0
        self.inbox = Inbox(ReadyList(), nullcontext(), self.clock, self._wake, **options)

    def _wake(self) -> None:
        self.wakes += 1

    def queue(self, place: MessageQueue = Q0, offset: int = 0, **options: Any) -> ProcessQueue:
        return ProcessQueue(place, offset, account=self.inbox.account, **options)

    def put(self, queue: ProcessQueue, *counts: int) -> bool:
        """One chunk with batches of these sizes, where the queue goes on."""
        frames, at = [], queue.pull_offset
        for count in counts:
            frames.append(stored_batch(at, count, queue_id=queue.queue.queue_id))
            at += count
        return self.inbox.put(queue, Chunk(frames, queue.pull_offset, at))

    def take(self, messages_max: int = 100) -> Unit | None:
        return self.inbox.take(0.0, lambda queue: messages_max)

    def taken(self, messages_max: int = 100) -> Unit:
        unit = self.take(messages_max)
        assert unit is not None
        return unit


@pytest.fixture
def desk() -> Desk:
    return Desk()


def offsets(unit: Unit) -> list[int]:
    return [message.queue_offset for message in unit.messages]


# --- handing out --------------------------------------------------------------------------------------------------------


def test_units_come_chunk_by_chunk(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 2, 1)
    desk.put(queue, 2)
    assert [offsets(desk.taken()), offsets(desk.taken())] == [[0, 1, 2], [3, 4]]
    assert desk.take() is None


def test_queues_take_turns(desk: Desk) -> None:
    first, second = desk.queue(Q0), desk.queue(Q1)
    desk.put(first, 4)
    desk.put(second, 4)
    assert [desk.taken(2).process_queue for _ in range(4)] == [first, second, first, second]


def test_the_size_is_asked_for_the_queue(desk: Desk) -> None:
    first, second = desk.queue(Q0), desk.queue(Q1)
    desk.put(first, 4)
    desk.put(second, 4)
    sizes = {first: 1, second: 3}
    units = [desk.inbox.take(0.0, lambda queue: sizes[queue]) for _ in range(2)]
    assert [len(unit.messages) for unit in units if unit] == [1, 3]


def test_a_chunk_without_wanted_messages_is_passed_over(desk: Desk) -> None:
    queue = desk.queue(wanted_tags=frozenset({"hall"}))
    desk.put(queue, 3)
    desk.put(queue, 3)
    assert desk.take() is None
    assert queue.commit_offset == 6
    desk.inbox.put(queue, Chunk([stored_batch(6, 1, tags=["hall"])], 6, 7))
    assert offsets(desk.taken()) == [6]


def test_what_does_not_follow_is_not_taken(desk: Desk) -> None:
    queue = desk.queue()
    assert not desk.inbox.put(queue, Chunk([stored_batch(5, 1)], 5, 6))
    assert desk.take() is None


def test_in_order_a_queue_waits_for_its_unit() -> None:
    desk = Desk(in_order=True)
    queue, other = desk.queue(Q0), desk.queue(Q1)
    desk.put(queue, 4)
    desk.put(other, 1)
    unit = desk.taken(2)
    assert desk.taken().process_queue is other
    assert desk.take() is None
    desk.put(queue, 3)
    assert desk.take() is None
    desk.inbox.done(unit)
    assert offsets(desk.taken(2)) == [2, 3]


def test_out_of_order_it_does_not(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    assert [offsets(desk.taken(2)), offsets(desk.taken(2))] == [[0, 1], [2, 3]]
    assert queue.in_flight == 2


# --- coming back --------------------------------------------------------------------------------------------------------


def test_done_units_count(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    first, second = desk.taken(2), desk.taken(2)
    desk.inbox.done(second)
    assert desk.inbox.commit_offset(queue) == 0
    desk.inbox.done(first)
    assert (desk.inbox.commit_offset(queue), queue.in_flight) == (4, 0)


def test_failed_parts_rest_until_they_are_put_back(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    unit = desk.taken()
    part = Unit(queue, [unit.messages[1]], 1, 2)
    desk.inbox.done(unit, [part])
    assert desk.inbox.commit_offset(queue) == 1
    assert (desk.inbox.account.messages, queue.in_flight) == (1, 0)
    assert desk.take() is None
    desk.inbox.put_back(part)
    again = desk.taken()
    assert again is part
    desk.inbox.done(again)
    assert (desk.inbox.commit_offset(queue), desk.inbox.account.messages) == (4, 0)


def test_in_order_a_failed_part_holds_its_queue() -> None:
    desk = Desk(in_order=True)
    queue = desk.queue()
    desk.put(queue, 4)
    desk.put(queue, 2)
    unit = desk.taken()
    part = Unit(queue, unit.messages[2:], 2, 4)
    desk.inbox.done(unit, [part], 3)
    assert desk.take() is None
    assert desk.inbox.commit_offset(queue) == 2
    desk.inbox.put_back(part)
    desk.inbox.done(desk.taken())
    assert offsets(desk.taken()) == [4, 5]


@pytest.mark.parametrize(("in_order", "expected"), [(False, [[0], [4, 5], [1, 2, 3]]), (True, [[0], [1, 2, 3], [4, 5]])])
def test_what_a_slow_listener_left_comes_in_its_place_only_in_order(in_order: bool, expected: list[list[int]]) -> None:
    desk, given = Desk(in_order=in_order), []
    queue = desk.queue()
    desk.put(queue, 4)
    desk.put(queue, 2)

    def listen(message: Message) -> None:
        given[-1].append(message.queue_offset)
        desk.clock.advance(1_000.0 if message.queue_offset == 0 else 0.0)

    while (unit := desk.take()) is not None:
        given.append([])
        outcome = run_unit(unit, listen, Pace(), desk.clock, in_order=in_order)
        desk.inbox.done(unit, [failure.unit for failure in outcome.failures], outcome.stop_offset)
        for failure in outcome.failures:
            desk.inbox.put_back(failure.unit)
    assert given == expected


def test_what_was_not_touched_stays_unfinished(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    unit = desk.taken()
    desk.inbox.drain(queue)
    desk.inbox.done(unit, (), 3)
    assert desk.inbox.commit_offset(queue) == 3


def test_finishing_below_an_offset_ends_what_is_in_flight_only_if_it_is_all(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    desk.taken(2), desk.taken(2)
    desk.inbox.finish_below(queue, 3, is_all=False)
    assert (desk.inbox.commit_offset(queue), queue.in_flight) == (3, 2)
    desk.inbox.finish_below(queue, 3, is_all=True)
    assert (desk.inbox.commit_offset(queue), queue.in_flight) == (3, 0)


# --- going away ---------------------------------------------------------------------------------------------------------


def test_a_drained_queue_hands_nothing_out_and_tells_when_it_is_idle(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    unit = desk.taken(2)
    assert not desk.inbox.drain(queue)
    assert desk.take() is None
    assert desk.wakes == 0
    desk.inbox.done(unit)
    assert (desk.wakes, queue.in_flight, desk.inbox.commit_offset(queue)) == (1, 0, 2)


def test_an_idle_queue_is_drained_at_once(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    assert desk.inbox.drain(queue)
    assert desk.inbox.account.messages == 0


def test_what_failed_on_a_drained_queue_does_not_come_back(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 2)
    unit = desk.taken()
    desk.inbox.drain(queue)
    part = Unit(queue, unit.messages[:1], 0, 1)
    desk.inbox.done(unit, [part])
    desk.inbox.put_back(part)
    assert desk.take() is None
    assert (desk.inbox.commit_offset(queue), desk.inbox.account.messages) == (0, 0)


def test_a_dropped_queue_counts_for_nothing(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 4)
    unit = desk.taken(2)
    desk.inbox.drop(queue)
    assert not desk.put(queue, 1)
    desk.inbox.done(unit, [Unit(queue, unit.messages[:1], 0, 1)])
    desk.inbox.finish_below(queue, 4, is_all=True)
    assert desk.take() is None
    assert (queue.commit_offset, desk.inbox.account.messages, desk.inbox.account.size_bytes) == (0, 0, 0)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_dropped_queue_is_not_remembered(in_order: bool) -> None:
    desk = Desk(in_order=in_order)
    queue = desk.queue()
    desk.put(queue, 4)
    unit = desk.taken(2)
    seen = weakref.ref(queue)
    desk.inbox.drop(queue)
    desk.inbox.done(unit)
    assert desk.take() is None
    del queue, unit
    gc.collect()
    assert seen() is None


def test_nothing_is_handed_out_after_the_lease_has_lapsed(desk: Desk) -> None:
    queue = desk.queue(valid_until_ms=lambda: 5_000.0)
    desk.put(queue, 4)
    desk.clock.advance(4_000 - desk.clock.monotonic_ms())
    assert desk.take(1) is not None
    desk.clock.advance(1_000)
    assert desk.take(1) is None
    assert queue.is_lapsed
    assert desk.wakes == 1


def test_paused_queues_hand_nothing_out_and_resting_units_wait(desk: Desk) -> None:
    queue = desk.queue()
    desk.put(queue, 3)
    unit = desk.taken(1)
    desk.inbox.done(unit, [unit])
    desk.inbox.pause(queue, True)
    desk.inbox.put_back(unit)
    assert desk.take() is None
    assert queue.pull_offset == 1
    desk.inbox.pause(queue, False)
    assert offsets(desk.taken()) == [0]
    desk.put(queue, 2)
    assert offsets(desk.taken()) == [1, 2]


# --- waking the loop ----------------------------------------------------------------------------------------------------


def test_the_loop_is_woken_when_a_queue_runs_low_while_a_pull_waits_for_room(desk: Desk) -> None:
    queue = desk.queue()
    for _ in range(4):
        desk.put(queue, 1)
    desk.inbox.is_starving = True
    desk.taken(), desk.taken()
    assert desk.wakes == 0, "not for each chunk: waking costs the caller more than taking"
    desk.taken()
    assert desk.wakes == 1
    desk.taken()
    assert desk.wakes == 1, "once until it has looked"
    desk.inbox.looked()
    desk.put(queue, 1)
    desk.taken()
    assert desk.wakes == 2


def test_the_loop_is_left_alone_while_no_pull_waits(desk: Desk) -> None:
    desk.put(desk.queue(), 1)
    desk.taken()
    assert desk.wakes == 0


def test_the_loop_is_woken_by_damage(desk: Desk) -> None:
    queue = desk.queue()
    desk.inbox.put(queue, Chunk([stored_batch(0, 2)[:-1] + b"\xff"], 0, 2))
    assert desk.take() is None
    assert (desk.wakes, desk.inbox.damaged_count, queue.pull_offset) == (1, 1, 0)


# --- the end ------------------------------------------------------------------------------------------------------------


def test_closing_ends_every_take(desk: Desk) -> None:
    desk.put(desk.queue(), 3)
    desk.inbox.close()
    assert [desk.take() for _ in range(3)] == [None, None, None]


def test_the_first_failure_stays(desk: Desk) -> None:
    desk.inbox.close(KeyError("first"))
    desk.inbox.close(KeyError("second"))
    desk.inbox.close()
    assert repr(desk.inbox.failure) == "KeyError('first')"


# --- threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [False, True])
def test_many_threads_take_everything_once(in_order: bool) -> None:
    """One thread puts and drains, eight take: no message is lost or given twice, in order none overtakes another."""
    inbox = Inbox(ThreadQueue(), threading.Lock(), SystemClock(), lambda: None, in_order=in_order)
    queues = [ProcessQueue(MessageQueue("meters", "broker-a", number), 0, account=inbox.account) for number in range(3)]
    seen: list[list[int]] = [[] for _ in queues]
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while (unit := inbox.take(None, lambda queue: rng.randint(1, 40))) is not None:
            with lock:
                seen[unit.process_queue.queue.queue_id] += offsets(unit)
            if rng.random() < 0.2:
                with lock:  # before others may have it, and what follows
                    del seen[unit.process_queue.queue.queue_id][-len(unit.messages) :]
                inbox.done(unit, [unit])
                inbox.put_back(unit)
            else:
                inbox.done(unit)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8 if in_order else 1)]
    for worker in workers:
        worker.start()
    for _ in range(60):
        for queue in queues:
            counts = [random.Random(queue.pull_offset).randint(1, 30) for _ in range(2)]
            first = stored_batch(queue.pull_offset, counts[0], queue_id=queue.queue.queue_id)
            second = stored_batch(queue.pull_offset + counts[0], counts[1], queue_id=queue.queue.queue_id)
            inbox.put(queue, Chunk([first, second], queue.pull_offset, queue.pull_offset + sum(counts)))
    pause = threading.Event()
    while any(inbox.commit_offset(queue) < queue.pull_offset for queue in queues):
        pause.wait(0.005)
    inbox.close()
    for worker in workers:
        worker.join()
    for queue, offsets_seen in zip(queues, seen, strict=True):
        assert (offsets_seen if in_order else sorted(offsets_seen)) == list(range(queue.pull_offset))
    assert (inbox.account.messages, inbox.account.size_bytes) == (0, 0)


def test_side_by_side_threads_share_one_queue() -> None:
    """Without order several threads have units of one queue at the same time."""
    inbox = Inbox(ThreadQueue(), threading.Lock(), SystemClock(), lambda: None)
    queue = ProcessQueue(Q0, 0, account=inbox.account)
    inbox.put(queue, Chunk([stored_batch(0, 4)], 0, 4))
    meeting = threading.Barrier(4)
    seen: list[int] = []

    def work() -> None:
        unit = inbox.take(None, lambda queue: 1)
        assert unit is not None
        meeting.wait(30)
        seen.extend(offsets(unit))
        inbox.done(unit)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(seen) == [0, 1, 2, 3]
    assert inbox.commit_offset(queue) == 4


def test_a_take_waits_for_what_comes() -> None:
    inbox = Inbox(ThreadQueue(), threading.Lock(), SystemClock(), lambda: None)
    queue = ProcessQueue(Q0, 0)
    timer = threading.Timer(0.02, lambda: inbox.put(queue, Chunk([stored_batch(0, 1)], 0, 1)))
    timer.start()
    unit = inbox.take(30_000.0, lambda queue: 10)
    timer.join()
    assert unit is not None
    assert offsets(unit) == [0]
    assert inbox.take(1.0, lambda queue: 10) is None


def test_a_wake_that_was_kept_from_the_loop_is_made_up_for(desk: Desk) -> None:
    """Ctrl-C comes when the wake is noted and not posted."""
    queue = desk.queue()
    desk.put(queue, 1, 1)
    unit = desk.taken(1)
    desk.inbox._wake = interrupted
    queue.is_draining = True
    with pytest.raises(KeyboardInterrupt):
        desk.inbox.done(unit)
    desk.inbox._wake = desk._wake
    desk.inbox.recover([])
    desk.inbox.finish_below(queue, 2, is_all=True)
    assert desk.wakes == 1


def interrupted() -> None:
    raise KeyboardInterrupt
