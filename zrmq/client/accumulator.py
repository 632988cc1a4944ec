"""What was handed over and is not acknowledged yet: open batches that callers fill.

    callers' threads                                  loop's thread
    append --> open batch --full--> sealed --take_sealed--> line of a queue --> broker --> finish
                   '-----------------------take_open--------^

A batch is open while records may join it: one per topic for messages that may go to any queue, one per queue for messages
bound to it. It is sealed when it is full, by the caller, who encodes it too, or when the loop's thread wants something to send.

Memory is bounded: `buffer_bytes` counts every record from `append` to `finish`, with what Python needs around it, and what open
batches have been granted and do not use yet.

One lock guards what is shared, but for the quick way in. A batch that grows gets a *filler*, a generator that takes a record
and gives its handle. A generator runs in one thread at a time by nature, so it needs no lock, and whoever wants the batch
otherwise stops the filler first. That fails only while another thread is inside; then the batch is closed to newcomers, and what
has to be done with it is done a moment later.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import msgspec

from zrmq.client.batch import (
    NO_EXTRAS,
    Batch,
    Extras,
    Filler,
    Lock,
    OwnedLock,
    Run,
    SendHandle,
    Span,
    Stored,
    Target,
    interrupted_error,
)
from zrmq.clock import Clock
from zrmq.errors import BufferFullError, InvalidArgumentError, ZrmqError
from zrmq.logs import get_logger

RECORD_OVERHEAD_BYTES = 64  # of a record in memory; more than its framing in a batch takes, so that batches stay in bounds
ITEM_OVERHEAD_BYTES = 16  # the same for each key and property
FILLER_FROM = 4  # records in a batch before it gets a filler, whose making costs as much as it saves on some three
ROOMY_BATCHES = 4  # that fit what is free of the buffer: then a batch is granted all it can use, else record by record
HELD_UP_MS_MAX = 100  # for a thread inside a filler, which has what may be free of the buffer; it needs microseconds

log = get_logger("producer")


class AccumulatorConfig(msgspec.Struct, frozen=True):
    """What a producer decides about its memory and its batches."""

    producer_id: int
    buffer_bytes: int
    block_when_full: bool
    batch_records_max: int
    batch_bytes_max: int
    linger_ms: float = 0.0
    compress: bool = False
    timeout_ms: int = 3_000  # of messages that are given no other; only those are filled in the quick way


class Accumulator:
    """The producer's memory. `append` and what handles do: any thread; the rest as each says.

    `wake` is called, from any thread, when there is something new for the loop's thread: it posts a call and returns. `may_wait`
    is False in a thread that must not wait: the loop's own.
    """

    def __init__(
        self, config: AccumulatorConfig, clock: Clock, *, new_lock: Callable[[], Lock],
        new_owned_lock: Callable[[], OwnedLock], wake: Callable[[], None], may_wait: Callable[[], bool],
    ) -> None:
        self.config = config
        self.clock = clock
        self._new_lock = new_lock
        self.wake = wake
        self.may_wait = may_wait
        self._new_owned_lock = new_owned_lock
        self._lock = new_owned_lock()
        self.body_fillers: dict[Target, Callable[[Any], SendHandle]] = {}  # `send` of the fillers of open batches, for bodies
        self.record_fillers: dict[Target, Callable[[Any], SendHandle]] = {}  # and for body, size and extras
        self._open: dict[Target, Batch] = {}
        self._sealed: deque[Batch] = deque()  # the last ones may still have a filler that could not be stopped
        self._unfinished: dict[str, dict[Batch, None]] = {}
        self._buffered_bytes = 0
        self._waiting_for_room: list[Lock] = []
        self._next_sequence = 1  # 0 means none, in `Send.follows`
        self._refusal: Callable[[], ZrmqError] | None = None
        self._has_news = False
        self._timeout_ms = config.timeout_ms
        self._batch_bytes_max = config.batch_bytes_max
        self._batch_records_max = config.batch_records_max

    # --- callers' threads ---------------------------------------------------------------------------------------------

    def append(self, target: Target, body: bytes, size_bytes: int, extras: Extras | None, timeout_ms: int) -> SendHandle:
        """Add one checked record to the open batch of its target.

        Waits up to `timeout_ms` while the buffer is full. Raises `BufferFullError`, or what `refuse` said.

        With the producer's own timeout `body_fillers[target](body)` does the same for a body alone in less than half the time,
        `record_fillers[target]` for body, size and extras, where there is one. What they raise instead is for `filled`.
        """
        if timeout_ms == self._timeout_ms:
            fill = self.record_fillers.get(target)
            record: Any = (body, size_bytes, extras)
            if fill is None and extras is None:
                fill, record = self.body_fillers.get(target), body
            if fill is not None:
                try:
                    return fill(record)
                except (StopIteration, ValueError) as end:
                    handle = self.filled(end)
                    if handle is not None:
                        return handle
        self._check_free()
        run = Run(target, [body], [size_bytes], None if extras is None else [extras])
        try:
            with self._lock:
                span = self._add(run, timeout_ms)
                if span is not None and span.first + 1 >= FILLER_FROM and timeout_ms == self._timeout_ms:
                    self._start_filler(span.batch)
            if span is not None and self._has_news:
                self._tell(span.batch)
        except ZrmqError:
            raise  # nothing was added, or nobody is there to be told
        except BaseException:  # Ctrl-C, perhaps, after it was added: it must not wait for the next send
            self.wake()
            raise
        if span is None:
            spans: list[Span] = []
            self.append_all([run], timeout_ms, spans)
            span = spans[0]
        return SendHandle(span.batch, span.first)

    def append_all(self, runs: Iterable[Run], timeout_ms: int, spans: list[Span]) -> None:
        """Add checked records in their order: no batch goes out in between unless one is full, or the buffer is. As `append`.

        `spans` gets where they are; where those before it are, when one raises. Returns early when one of them has failed.
        """
        self._check_free()
        left = deque(run for run in runs if run.bodies)
        deadline_ms = None
        settled = 0
        while left:
            while settled < len(spans) and isinstance(spans[settled].batch.outcome, Stored):
                settled += 1
            if settled < len(spans) and spans[settled].batch.outcome is not None:
                return
            count = len(spans)
            try:
                try:
                    with self._lock:
                        room = self._add_until_full(left, timeout_ms, spans)
                finally:
                    if len(spans) > count:
                        deadline_ms = None  # the time is for one room after the other
                        self._tell(*dict.fromkeys(span.batch for span in spans[count:]))
            except ZrmqError:
                raise
            except BaseException:  # as in `append`
                self.wake()
                raise
            if room is not None:
                if deadline_ms is None:
                    deadline_ms = self._deadline_ms(timeout_ms)
                self._wait_for_room(room, deadline_ms)

    def _add_until_full(self, left: deque[Run], timeout_ms: int, spans: list[Span]) -> Lock | None:
        """With the lock. None when a batch is full or all are in; when the buffer is, what is released once there may be room."""
        while left:
            run = left[0]
            span = self._add(run, timeout_ms)
            if span is None:
                return self._ask_for_room()
            spans.append(span)
            run.begin += span.count
            if run.begin == len(run.bodies):
                left.popleft()
            if self._open.get(run.target) is not span.batch:
                return None
        return None

    def _add(self, run: Run, timeout_ms: int) -> Span | None:
        """With the lock: the next records of the run, as many as the batch has room for. None: the buffer has none.

        The batch is sealed when another record of the last one's size would not fit.
        """
        batch = self._batch_with_room(run.target, run.sizes_bytes[run.begin], timeout_ms)
        if batch is None:
            return None
        records_max = min(self._batch_records_max - len(batch.bodies), max(batch.room_bytes // RECORD_OVERHEAD_BYTES, 1))
        sizes_bytes = run.sizes_bytes[run.begin : run.begin + records_max]
        size_bytes = sum(sizes_bytes)
        if size_bytes > batch.room_bytes:
            del sizes_bytes[bisect_right(list(accumulate(sizes_bytes)), batch.room_bytes) :]
            size_bytes = sum(sizes_bytes)
        count = len(sizes_bytes)
        end = run.begin + count
        extras = None if run.extras is None else run.extras[run.begin : end]
        first = batch.add(run.bodies[run.begin : end], size_bytes, extras)
        if not self._can_take(batch, run.sizes_bytes[end - 1]):
            self._seal(batch)
        return Span(batch, first, count)

    def _check_free(self) -> None:
        """Raise in a signal handler or finalizer that runs while its own thread holds the lock, and would wait for itself."""
        if self._lock._is_owned():
            raise interrupted_error()

    def filled(self, end: StopIteration | ValueError) -> SendHandle | None:
        """A filler ended with a record, or before it, or has another thread inside. None: it was not taken; `append` it.

        Raises a `ValueError` again that comes from within the filler, of a signal handler: that record may have been taken.
        """
        if isinstance(end, ValueError) and end.__traceback__ is not None and end.__traceback__.tb_next is not None:
            raise end
        handle: SendHandle | None = end.value if isinstance(end, StopIteration) else None
        if handle is None:
            return None
        batch = handle.batch
        if self._lock._is_owned():  # in a handler that interrupted a send: the next one, or the loop, seals the batch
            return handle
        with self._lock:
            if self._open.get(batch.target) is batch:
                self._seal(batch)
        self._tell(batch)
        return handle

    def _tell(self, *batches: Batch) -> None:
        """After something new. Encodes the caller's batches if they are sealed and nobody else did, so that the loop need not."""
        for batch in batches:
            if batch.record_count:
                batch.encoded()
        self._has_news = False
        try:
            self.wake()
        except BaseException:  # Ctrl-C, perhaps, before it had any effect
            self.wake()
            raise

    # --- fillers ------------------------------------------------------------------------------------------------------

    def _start_filler(self, batch: Batch) -> None:
        """Let those who follow fill it without the lock."""
        if self._open.get(batch.target) is not batch:
            return  # sealed with this record
        if batch.extras is None:
            batch.filler, fillers = self._fill_bodies(batch, self._batch_records_max), self.body_fillers
        else:
            batch.filler, fillers = self._fill_records(batch, batch.extras, self._batch_records_max), self.record_fillers
            self.body_fillers.pop(batch.target, None)  # of before its first extras
        next(batch.filler)  # before others find it
        fillers[batch.target] = batch.filler.send

    @staticmethod
    def _fill_bodies(batch: Batch, records_max: int) -> Filler:
        """The filler of a batch of bodies alone: takes a body, gives its handle. Ends with the handle when no other body of that
        size would fit, with None when this one does not.

        Hot path. All it touches are local variables, and it needs no lock: 0.45 us a message from `send_async` on against 1.05 us
        with the lock, in the same run.
        """
        append = batch.bodies.append
        room_bytes = batch.room_bytes
        handle: SendHandle | None = None
        try:
            for index in range(len(batch.bodies), records_max):
                body = yield handle
                size_bytes = len(body) + RECORD_OVERHEAD_BYTES
                if size_bytes > room_bytes:
                    return None
                append(body)
                room_bytes -= size_bytes
                handle = SendHandle(batch, index)
                if size_bytes > room_bytes:
                    break
            return handle
        finally:
            batch.room_bytes = room_bytes

    @staticmethod
    def _fill_records(batch: Batch, batch_extras: list[Extras], records_max: int) -> Filler:
        """The same for a batch with extras: takes body, size in the buffer, extras."""
        append, append_extras = batch.bodies.append, batch_extras.append
        room_bytes = batch.room_bytes
        handle: SendHandle | None = None
        try:
            for index in range(len(batch.bodies), records_max):
                body, size_bytes, extras = yield handle
                if size_bytes > room_bytes:
                    return None
                append_extras(extras or NO_EXTRAS)
                append(body)
                room_bytes -= size_bytes
                handle = SendHandle(batch, index)
                if size_bytes > room_bytes:
                    break
            return handle
        finally:
            batch.room_bytes = room_bytes

    # --- open batches -------------------------------------------------------------------------------------------------

    def _batch_with_room(self, target: Target, size_bytes: int, timeout_ms: int) -> Batch | None:
        """An open batch for a record of that size. None: the buffer is full. With the lock."""
        batch = self._open.get(target)
        if batch is not None:
            is_fit = batch.stop_filler() and batch.timeout_ms == timeout_ms and self._can_take(batch, size_bytes)
            if is_fit and size_bytes <= batch.room_bytes:
                return batch
            if not is_fit:
                self._seal(batch)
                batch = None
        if self._refusal is not None:
            raise self._refusal()
        if not self._has_room(size_bytes):
            return None
        batch = self._open.get(target)
        if batch is None:
            return self._open_batch(target, size_bytes, timeout_ms)
        granted_bytes = self._grant_bytes(batch, size_bytes)
        self._buffered_bytes += granted_bytes
        batch.size_bytes += granted_bytes
        batch.room_bytes += granted_bytes
        return batch

    def _can_take(self, batch: Batch, size_bytes: int) -> bool:
        """Whether a batch may have another record of that size, the buffer permitting."""
        used_bytes = batch.size_bytes - batch.room_bytes
        return len(batch.bodies) < self._batch_records_max and used_bytes + size_bytes <= self._batch_bytes_max

    def _open_batch(self, target: Target, size_bytes: int, timeout_ms: int) -> Batch:
        batch = Batch(self, target, self.config.producer_id, self._next_sequence, timeout_ms)
        unfinished = self._unfinished.setdefault(batch.topic, {})
        granted_bytes = self._grant_bytes(batch, size_bytes)
        # Without a call in between, so without a signal handler that raises: here and there, or nowhere.
        self._next_sequence += self.config.batch_records_max  # ids are known at once, so a batch reserves what it may need
        self._open[target] = batch
        unfinished[batch] = None
        self._buffered_bytes += granted_bytes
        batch.size_bytes = batch.room_bytes = granted_bytes
        self._has_news = True
        return batch

    def _seal(self, batch: Batch) -> None:
        """No record joins it any more, but for one that is being put in by a thread inside its filler."""
        target = batch.target
        self._has_news = True
        del self._open[target]
        self._sealed += (batch,)  # not `append`: without a call nothing is raised before this, and the batch lost
        self.body_fillers.pop(target, None)
        self.record_fillers.pop(target, None)
        if batch.stop_filler():
            self._close(batch)

    def _close(self, batch: Batch) -> None:
        """It is what it is; what it does not use is free."""
        self._return(batch)
        batch.seal(self.clock.monotonic_ms())

    # --- the buffer ---------------------------------------------------------------------------------------------------

    def _has_room(self, size_bytes: int) -> bool:
        """Whether a record fits the buffer, if need be after what open batches were granted is taken back."""
        if self._buffered_bytes + size_bytes <= self.config.buffer_bytes:
            return True
        for batch in list(self._open.values()):
            if not batch.stop_filler():
                self._seal(batch)  # it returns its room when the thread inside has left
            elif batch.room_bytes:
                self._return(batch)
        return not self._buffered_bytes or self._buffered_bytes + size_bytes <= self.config.buffer_bytes

    def _grant_bytes(self, batch: Batch, size_bytes: int) -> int:
        """What a batch is to get of the buffer for a record of that size: while there is plenty, for all that it can take."""
        used_bytes = batch.size_bytes - batch.room_bytes
        plenty_bytes = ROOMY_BATCHES * self._batch_bytes_max
        if self._buffered_bytes + plenty_bytes <= self.config.buffer_bytes:
            size_bytes = max(size_bytes, self._batch_bytes_max - used_bytes)
        return size_bytes - batch.room_bytes

    def _return(self, batch: Batch) -> None:
        """Take back what it was granted and does not use."""
        self._buffered_bytes -= batch.room_bytes
        batch.size_bytes -= batch.room_bytes
        batch.room_bytes = 0
        self._release_room()

    def _ask_for_room(self) -> Lock:
        """What is released once there may be room. With the lock. Raises `BufferFullError` where that is not waited for."""
        is_held_up = any(batch.filler is not None for batch in self._sealed)
        if not self.may_wait() or not (self.config.block_when_full or is_held_up):
            raise self._full_error()
        room = self.lock_for_waiting()
        self._waiting_for_room.append(room)
        return room

    def _deadline_ms(self, timeout_ms: int) -> float:
        """Until when to wait for room. Who does not block waits for those only who are just leaving a filler."""
        return self.clock.monotonic_ms() + (timeout_ms if self.config.block_when_full else min(timeout_ms, HELD_UP_MS_MAX))

    def _wait_for_room(self, room: Lock, deadline_ms: float) -> None:
        """Wait until something was finished, or returned. Without the lock, so that nothing raised meanwhile can upset it."""
        left_ms = deadline_ms - self.clock.monotonic_ms()
        if left_ms <= 0:
            raise self._full_error()
        self.wake()  # what is open may be what fills the buffer
        room.acquire(timeout=left_ms / 1000)

    def _full_error(self) -> BufferFullError:
        return BufferFullError(
            f"{self._buffered_bytes} bytes of messages wait for a broker and the buffer has {self.config.buffer_bytes}; send"
            " slower, wait for handles, or give the producer a larger buffer_bytes.",
            buffered_bytes=self._buffered_bytes, buffer_bytes=self.config.buffer_bytes,
        )

    def lock_for_waiting(self) -> Lock:
        """A lock that is taken: who acquires it waits until somebody releases it. Raises where nobody may wait."""
        if not self.may_wait():
            raise InvalidArgumentError(
                "Waiting inside a callback of send_async would wait for ever: the thread it runs on is the one that brings the"
                " answer. Use another callback, or wait in a thread of your own."
            )
        if self.config.linger_ms:
            self.wake()  # what lingers goes out when somebody waits
        lock = self._new_lock()
        lock.acquire()
        return lock

    def add_callback(self, handle: SendHandle, callback: Callable[[SendHandle], None]) -> bool:
        """Have it called when the batch is done. False: it is done already."""
        self._check_free()
        with self._lock:
            if handle.batch.outcome is not None:
                return False
            handle.batch.callbacks.append((handle, callback))
            return True

    def encoded_batch(
        self, target: Target, producer_id: int, sequence: int, frame: bytes, size_bytes: int, deadline_ms: float
    ) -> Batch:
        """A batch of one record that was encoded and sent by somebody else, for `adopt`."""
        batch = Batch(self, target, producer_id, sequence, max(1, round(deadline_ms - self.clock.monotonic_ms())))
        batch.bodies.append(b"")
        batch.seal(self.clock.monotonic_ms())
        batch.records, batch.frame, batch.size_bytes = None, frame, size_bytes
        return batch

    def is_idle(self, topic: str) -> bool:
        """Whether nothing of the topic waits here, is on its way, or may still arrive although it was given up. For the calling
        thread's own messages this is exact."""
        return not self._unfinished.get(topic)

    def unfinished(self) -> list[Batch]:
        """Every batch that has no outcome yet."""
        self._check_free()
        with self._lock:
            return [batch for batches in self._unfinished.values() for batch in batches if batch.outcome is None]

    def refuse(self, make_error: Callable[[], ZrmqError]) -> None:
        """Take nothing more: `append` raises, also where it waits for room. What is here goes on its way."""
        for batch in self.unfinished():
            batch.check_free()
        with self._lock:
            self._refusal = make_error
            for batch in list(self._open.values()):
                self._seal(batch)
            self._release_room()

    def abandon_in_child(self, make_error: Callable[[], ZrmqError]) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here any more."""
        self._lock = self._new_owned_lock()
        self._open = {}
        self.body_fillers.clear()
        self.record_fillers.clear()
        self._refusal = make_error

    # --- loop's thread ------------------------------------------------------------------------------------------------

    def tighten(self, batch_records_max: int, batch_bytes_max: int) -> None:
        """A server takes no more than this in a batch. Open ones grow no further."""
        if batch_records_max >= self._batch_records_max and batch_bytes_max >= self._batch_bytes_max:
            return
        with self._lock:
            self._batch_records_max = min(self._batch_records_max, batch_records_max)
            self._batch_bytes_max = min(self._batch_bytes_max, batch_bytes_max)
            for batch in list(self._open.values()):
                self._seal(batch)

    def adopt(self, batch: Batch) -> None:
        """Have an `encoded_batch` here until it ends, like all others."""
        with self._lock:
            self._unfinished.setdefault(batch.topic, {})[batch] = None
            self._buffered_bytes += batch.size_bytes

    def take_sealed(self) -> list[Batch]:
        """The batches that callers have filled, in the order they were sealed."""
        with self._lock:
            return self._take()

    def take_open(self, is_wanted: Callable[[Batch], bool]) -> list[Batch]:
        """Seal and take the open batches for which `is_wanted`; also those sealed since `take_sealed`, which come first."""
        with self._lock:
            for batch in [batch for batch in self._open.values() if is_wanted(batch)]:
                self._seal(batch)
            self._has_news = False
            return self._take()

    def _take(self) -> list[Batch]:
        """The sealed batches, up to one with a thread inside its filler: the loop comes again for that."""
        taken: list[Batch] = []
        while self._sealed:
            batch = self._sealed[0]
            if not batch.is_sealed:
                if not batch.stop_filler():
                    self.wake()
                    break
                self._close(batch)
            self._sealed.popleft()
            if batch.record_count:
                taken.append(batch)
            else:
                self._end(batch, InvalidArgumentError("An exception kept the only record out."))
        return taken

    @property
    def is_pressed(self) -> bool:
        """Whether somebody waits for room, or for a batch that is still open."""
        with self._lock:
            return bool(self._waiting_for_room) or any(batch.waiters for batch in self._open.values())

    @property
    def buffered_bytes(self) -> int:
        """What is held at the moment, as `buffer_bytes` counts, used or granted."""
        return self._buffered_bytes

    def finish(self, batch: Batch, outcome: Stored | ZrmqError, *, is_late: bool = False) -> None:
        """The batch's one outcome: its memory is free, who waits for it goes on, its callbacks are called.

        `is_late`: it may still arrive at its broker, and its topic is not idle before `forget`.
        """
        with self._lock:
            self._end(batch, outcome, is_late=is_late)
            callbacks, batch.callbacks = batch.callbacks, []
        for handle, callback in callbacks:
            _call(callback, handle)

    def forget(self, batch: Batch) -> None:
        """A late one, which arrives no more or has."""
        with self._lock:
            del self._unfinished[batch.topic][batch]

    def _end(self, batch: Batch, outcome: Stored | ZrmqError, *, is_late: bool = False) -> None:
        assert batch.outcome is None
        batch.outcome = outcome
        batch.records, batch.frame = None, b""
        self._buffered_bytes -= batch.size_bytes
        if not is_late:
            del self._unfinished[batch.topic][batch]
        self._release_room()
        for lock in batch.waiters:
            lock.release()

    def _release_room(self) -> None:
        for lock in self._waiting_for_room:
            lock.release()
        self._waiting_for_room.clear()


def _call(callback: Callable[[SendHandle], None], handle: SendHandle) -> None:
    try:
        callback(handle)
    except Exception:  # the user's code; it must not end the thread that everything depends on
        log.exception("done_callback_failed", message_id=handle.message_id)
