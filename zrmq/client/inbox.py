"""Where the loop's thread and the callers of a consumer meet: chunks go in, units come out, what became of them comes back.

A process queue with something to hand out lies once in a ready queue, which is what callers wait at. Whoever takes it opens its
next chunk outside the lock, cuts a unit off and puts it back: other callers go on with other queues meanwhile, and every queue
has its turn. In order (`in_order`) it is put back only when the unit is done: one caller a queue at a time. A unit that failed
rests until a timer puts it back.

The lock guards all process queues of the consumer; it is held for a few instructions, never while a batch is decoded or a
listener runs. Lock and ready queue are handed in: threads need real ones, the simulator does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from zrmq.client.process_queue import Account, Chunk, Opened, ProcessQueue, Unit, open_chunk
from zrmq.clock import Clock
from zrmq.logs import get_logger

log = get_logger("client")

Ready = ProcessQueue | Unit | None  # None: the end


class ReadyQueue(Protocol):
    """First in, first out, between threads."""

    def put(self, item: Ready) -> None:
        """Never blocks."""

    def take(self, timeout_s: float | None) -> tuple[Ready] | None:
        """The next item, as a tuple of one; None when there was none within the time (None: however long it takes)."""


class Inbox:
    """All process queues of one consumer, seen from both sides.

    `wake` is called, from any thread, when the loop's side has something to look at: room for more pulls, a queue that is
    drained or lapsed. It is called once until the loop's side has called `looked`.
    """

    def __init__(
        self,
        ready: ReadyQueue,
        lock: AbstractContextManager[Any],
        clock: Clock,
        wake: Callable[[], None],
        *,
        in_order: bool = False,
    ) -> None:
        self.account: Final = Account()
        self.failure: BaseException | None = None  # why it was closed, unless by the user
        self.is_closed = False
        self.is_starving = False  # a pull waits for room; whoever runs low on chunks of a queue wakes it
        self.damaged_count = 0  # batches that did not check out or could not be read
        self._ready = ready
        self._lock = lock
        self._now_ms = clock.monotonic_ms
        self._wake = wake
        self._in_order = in_order
        self._is_woken = False
        self._scheduled: dict[ProcessQueue, None] = {}  # a caller has them, or will find them in the ready queue

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def looked(self) -> None:
        """From here on another `wake` is wanted."""
        self._is_woken = False

    def put(self, queue: ProcessQueue, chunk: Chunk) -> bool:
        """Take what a pull brought. False: the queue is read from another offset by now."""
        with self._lock:
            if queue.is_dropped or not queue.add(chunk):
                return False
            self._schedule(queue)
            return True

    def put_back(self, unit: Unit) -> None:
        """The time of a resting unit has come."""
        self._ready.put(unit)

    def commit_offset(self, queue: ProcessQueue) -> int:
        """The lowest offset that is not finished."""
        with self._lock:
            return queue.commit_offset

    def drain(self, queue: ProcessQueue) -> bool:
        """Hand nothing out any more. True: nothing is in flight; else `wake` is called when that is so."""
        with self._lock:
            queue.is_draining = True
            queue.forget()
            queue.forget_resting()
            return queue.in_flight == 0

    def drop(self, queue: ProcessQueue) -> None:
        """The queue is not ours any more; what callers still have of it counts for nothing."""
        with self._lock:
            queue.is_dropped = True
            queue.forget()
            queue.forget_resting()
            self._scheduled.pop(queue, None)  # who has a unit of it does not come back to it

    def pause(self, queue: ProcessQueue, is_paused: bool) -> None:
        """Hand nothing out for a while, and hold nothing either, so that others have the room."""
        with self._lock:
            queue.is_paused = is_paused
            if is_paused:
                queue.forget()
                return
            for unit in queue.parked:
                self._ready.put(unit)
            queue.parked.clear()
            self._schedule(queue)

    def close(self, failure: BaseException | None = None) -> None:
        """End every `take`, now and later. The first failure stays."""
        if self.failure is None:
            self.failure = failure
        self.is_closed = True
        self._ready.put(None)

    # --- the callers' side --------------------------------------------------------------------------------------------

    def take(self, timeout_ms: float | None, size: Callable[[ProcessQueue], int]) -> Unit | None:
        """A unit of at most `size(process queue)` messages; None when there was none within the time, or the inbox is closed.

        Whoever takes a unit owes a `done` for it, or in the end a `finish_below` with `is_all` for its queue.
        """
        deadline_ms = None if timeout_ms is None else self._now_ms() + timeout_ms
        left_ms = timeout_ms
        while True:
            taken = self._ready.take(None if left_ms is None else left_ms / 1000.0)
            if taken is None:
                return None
            unit = self._hand_out(taken[0], size)
            if unit is not None or self.is_closed:
                return unit
            if deadline_ms is not None:
                left_ms = max(deadline_ms - self._now_ms(), 0.0)

    def recover(self, units: Sequence[Unit]) -> None:
        """An exception (Ctrl-C, say) ended a `take`, or came before its caller gave these units, in their order, to anybody: they
        come again. For the only caller of an inbox."""
        for unit in reversed(units):
            self.take_back(unit.process_queue, unit.offset, 1)
        with self._lock:
            for queue in self._scheduled:  # one may have been lost on its way here: better in line twice than not at all
                self._ready.put(queue)
            if self.is_closed:
                self._ready.put(None)

    def done(self, unit: Unit, failed: Sequence[Unit] = (), stop_offset: int | None = None) -> None:
        """The caller is through with a unit. `failed` parts of it rest until they are put back; what lies from `stop_offset` on
        was not touched and stays unfinished."""
        queue = unit.process_queue
        with self._lock:
            if queue.is_dropped:
                queue.in_flight -= 1
                return
            offset = unit.offset
            for part in failed:
                queue.finish(offset, part.offset)
                offset = part.next_offset
                if not queue.is_draining:
                    queue.rest(part)
            queue.finish(offset, unit.next_offset if stop_offset is None else stop_offset)
            queue.in_flight -= 1
            if queue.is_draining:
                self._wake_if(queue.in_flight == 0)
            elif self._in_order and not failed:
                self._put_in_line(queue)

    def finish_below(self, queue: ProcessQueue, offset: int, *, is_all: bool) -> None:
        """Everything handed out below the offset is done, however many units it was. `is_all`: the caller has nothing more of
        the queue, so what lies from the offset on stays unfinished."""
        with self._lock:
            if queue.is_dropped:
                queue.in_flight = 0 if is_all else queue.in_flight
                return
            queue.finish_below(offset)
            if is_all:
                queue.in_flight = 0
                self._wake_if(queue.is_draining)

    def take_back(self, queue: ProcessQueue, offset: int, units: int = 0) -> None:
        """What was handed out from the offset on was not given, among it so many whole units: it comes again. For the only caller
        of the queue."""
        with self._lock:
            queue.in_flight -= units
            if queue.is_dropped:
                return
            queue.go_back(offset)
            self._wake_if(True)

    def _hand_out(self, item: Ready, size: Callable[[ProcessQueue], int]) -> Unit | None:
        if item is None or self.is_closed:
            self._ready.put(None)  # for the next caller
            return None
        if isinstance(item, Unit):
            return self._rouse(item)
        offset, in_flight = item.position, item.in_flight
        try:
            self._open(item)
            return self._cut(item, size)
        except BaseException:  # Ctrl-C, perhaps: nobody has what it was about to hand out
            self.take_back(item, offset, item.in_flight - in_flight)
            raise

    def _rouse(self, unit: Unit) -> Unit | None:
        queue = unit.process_queue
        with self._lock:
            if queue.is_paused:
                queue.parked.append(unit)
                return None
            return unit if queue.rouse(unit) else None

    def _open(self, queue: ProcessQueue) -> None:
        with self._lock:
            chunk = queue.begin_opening() if self._may_hand_out(queue) else None
            self._wake_if(chunk is not None and self.is_starving and queue.chunks_left <= 1)
        if chunk is None:
            return
        opened = open_chunk(chunk, queue)
        with self._lock:
            queue.end_opening(chunk, opened)
            self._wake_if(opened.next_offset < chunk.next_offset)
        if opened.damage:
            self._report(queue, opened)

    def _cut(self, queue: ProcessQueue, size: Callable[[ProcessQueue], int]) -> Unit | None:
        messages_max = size(queue)
        with self._lock:
            if not self._may_hand_out(queue):
                self._scheduled.pop(queue, None)
                return None
            unit = queue.cut(messages_max)
            if unit is None or not self._in_order:
                self._put_in_line(queue)
            return unit

    def _may_hand_out(self, queue: ProcessQueue) -> bool:
        if queue.is_dropped or queue.is_draining or queue.is_paused:
            return False
        if self._now_ms() < queue.valid_until_ms():
            return True
        queue.is_lapsed = True
        self._wake_if(True)
        return False

    def _schedule(self, queue: ProcessQueue) -> None:
        if queue not in self._scheduled and queue.has_more:
            self._scheduled[queue] = None
            self._ready.put(queue)

    def _put_in_line(self, queue: ProcessQueue) -> None:
        """Behind the others, if it has more."""
        self._scheduled.pop(queue, None)
        self._schedule(queue)

    def _wake_if(self, is_wanted: bool) -> None:
        if is_wanted and not self._is_woken:
            self._is_woken = True
            try:
                self._wake()
            except BaseException:  # Ctrl-C, perhaps, before it had any effect
                self._is_woken = False
                raise

    def _report(self, queue: ProcessQueue, opened: Opened) -> None:
        self.damaged_count += 1
        place = queue.queue
        log.error(
            "batch_skipped" if opened.skipped_count else "batch_damaged",
            topic=place.topic, broker_name=place.broker_name, queue_id=place.queue_id,
            before_offset=opened.next_offset, skipped=opened.skipped_count, reason=opened.damage,
        )
