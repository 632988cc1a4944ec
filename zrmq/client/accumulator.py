"""What was handed over and is not acknowledged yet: open batches that callers fill, and the handles that point into them.

    callers' threads                                  loop's thread
    append --> open batch --full--> sealed --take_sealed--> line of a queue --> broker --> finish
                   '-----------------------take_open--------^

A batch is open while records may join it: one per topic for messages that may go to any queue, one per queue for messages bound
to it. It is sealed when it is full, by the caller, who encodes it too, or when the loop's thread wants something to send. A
handle is the batch and an index, so that a message costs a few list appends and one small object; receipts are made when somebody
asks.

Memory is bounded: `buffer_bytes` counts every record from `append` to `finish`, with what Python needs around it.

One lock guards what is shared. A batch's `outcome` is read without it: it is written once, before those who wait are released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from math import inf
from types import TracebackType
from typing import Protocol

import msgspec

from zrmq.clock import Clock
from zrmq.errors import BufferFullError, InvalidArgumentError, RequestTimeoutError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import FlushMode, MessageQueue, SendReceipt, message_id
from zrmq.protocol.batch import Columns, encode_batch

RECORD_OVERHEAD_BYTES = 64  # of a record in memory; more than its framing in a batch takes, so that batches stay in bounds
ITEM_OVERHEAD_BYTES = 16  # the same for each key and property
LOOK_MS = 1_000  # who waits for an outcome looks that often whether there is still a loop

log = get_logger("producer")


class Lock(Protocol):
    """A `threading.Lock`. Handed in: nothing in this package makes threads or what belongs to them."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, waiting up to `timeout` seconds (-1: for ever). False: not taken."""

    def release(self) -> None:
        """Give it back; any thread may."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class OneWay(msgspec.Struct, frozen=True, gc=False):
    """Target of messages that nobody acknowledges: any queue of the topic, or one."""

    topic: str
    queue: MessageQueue | None = None


Target = str | MessageQueue | OneWay  # what the records of a batch share: a topic (any queue of it), a queue, a topic one-way


class Extras(msgspec.Struct, frozen=True, gc=False):
    """What a record has besides its body."""

    tag: str | None = None
    keys: Sequence[str] = ()
    properties: dict[str, str] | None = None
    message_group: str | None = None


NO_EXTRAS = Extras()


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Where a batch is. A one-way batch is handed over and nothing else is known: its `base_offset` is -1."""

    broker_name: str
    queue_id: int
    base_offset: int
    store_timestamp_ms: int
    durability: FlushMode
    duplicate: bool = False


class AccumulatorConfig(msgspec.Struct, frozen=True):
    """What a producer decides about its memory and its batches."""

    producer_id: int
    buffer_bytes: int
    block_when_full: bool
    batch_records_max: int
    batch_bytes_max: int
    linger_ms: float = 0.0
    compress: bool = False


class Batch:
    """Records on their way together: filled under the accumulator's lock until it is sealed, then the loop's thread's own."""

    __slots__ = (
        "accumulator", "attempts", "avoid", "bodies", "callbacks", "deadline_ms", "extras", "first_born_ms", "first_sequence",
        "forget", "frame", "last_sequence", "opened_ms", "outcome", "producer_id", "record_count", "records", "refusal",
        "sent_ms", "size_bytes", "target", "timeout_ms", "waiters",
    )

    def __init__(
        self, accumulator: Accumulator, target: Target, producer_id: int, first_sequence: int, timeout_ms: int
    ) -> None:
        self.accumulator = accumulator
        self.target = target
        self.producer_id = producer_id
        self.first_sequence = first_sequence
        self.timeout_ms = timeout_ms
        self.first_born_ms = accumulator.clock.time_ms()
        self.opened_ms = accumulator.clock.monotonic_ms()
        self.bodies: list[bytes] = []
        self.extras: list[Extras] | None = None
        self.size_bytes = 0
        self.record_count = 0
        self.outcome: Stored | ZrmqError | None = None
        self.waiters: list[Lock] = []
        self.callbacks: list[tuple[SendHandle, Callable[[SendHandle], None]]] = []

    @property
    def topic(self) -> str:
        """The topic of its records."""
        return self.target if isinstance(self.target, str) else self.target.topic

    def add_extras(self, index: int, extras: Extras | None) -> None:
        """Note the extras of record `index`, which is next."""
        if self.extras is None:
            self.extras = [NO_EXTRAS] * index
        self.extras.append(extras or NO_EXTRAS)

    def seal(self, now_ms: float) -> None:
        """No record joins it from here on; the time its caller gave it starts to run."""
        self.records: tuple[list[bytes], list[Extras] | None] | None = (self.bodies, self.extras)
        self.record_count = len(self.bodies)
        self.last_sequence = self.first_sequence + self.record_count - 1
        self.bodies, self.extras = [], None
        self.deadline_ms = now_ms + self.timeout_ms
        self.frame = b""
        self.attempts = 0  # that were refused or came to nothing
        self.refusal: ZrmqError | None = None  # the last one: what it ends with if it is not stored in time
        self.avoid: frozenset[str] = frozenset()  # names of brokers that it left and that may have stored it all the same
        self.sent_ms = 0.0
        self.forget: Callable[[], None] = _nothing  # the request it was last sent with

    @property
    def message_count(self) -> int:
        """Records in it so far."""
        return self.record_count or len(self.bodies)

    def encoded(self) -> bytes:
        """The bytes to send; made by whoever asks first. Two threads that ask at once make the same bytes."""
        records = self.records
        if records is None:
            return self.frame
        config = self.accumulator.config
        self.frame = encode_batch(
            columns_of(*records), producer_id=self.producer_id, first_sequence=self.first_sequence,
            first_born_ms=self.first_born_ms, last_born_ms=self.accumulator.clock.time_ms(), compress=config.compress,
        )
        self.records = None
        return self.frame

    def wait(self, timeout_ms: float | None) -> bool:
        """Wait until it has an outcome. False: it has none after `timeout_ms` (None: for ever)."""
        if self.outcome is None:
            lock = self.accumulator.lock_for_waiting()
            self.waiters.append(lock)  # before looking again: the outcome is set first, then those here are released
            if self.outcome is None:
                return self._wait(lock, timeout_ms)
        return True

    def _wait(self, lock: Lock, timeout_ms: float | None) -> bool:
        left_ms = inf if timeout_ms is None else max(timeout_ms, 0)
        while not lock.acquire(timeout=min(left_ms, LOOK_MS) / 1000):
            left_ms -= LOOK_MS
            if left_ms <= 0:
                return False
            self.accumulator.wake()  # raises when the loop has ended, so that nobody waits for what will never be
        return True


def _nothing() -> None:
    """Of a batch that was never sent."""


def columns_of(bodies: list[bytes], extras: list[Extras] | None) -> Columns:
    """The records as a batch has them: a column for each thing that at least one of them has."""
    if extras is None:
        return Columns(bodies)
    columns = Columns(bodies)
    if any(tags := [each.tag for each in extras]):
        columns.tags = tags
    if any(keys := [list(each.keys) for each in extras]):
        columns.keys = keys
    if any(properties := [each.properties for each in extras]):
        columns.properties = properties
    if any(groups := [each.message_group for each in extras]):
        columns.message_groups = groups
    return columns


class SendHandle(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A message handed over by `send_async`. Any thread may use it, also after the producer is closed."""

    batch: Batch
    index: int

    def done(self) -> bool:
        """Whether it is stored or has failed for good."""
        return self.batch.outcome is not None

    def result(self, timeout_ms: float | None = None) -> SendReceipt:
        """The receipt, waiting for it if need be: at most `timeout_ms`, None as long as sending may take.

        Raises what the message failed with, or `RequestTimeoutError` when it is still on its way; ask again later then. Must
        not wait inside a callback (`InvalidArgumentError`): the thread that it runs on is the one that would answer.
        """
        batch = self.batch
        if not batch.wait(timeout_ms):
            raise RequestTimeoutError(
                f"The message is not acknowledged after {timeout_ms} ms and is still on its way; ask its handle again.",
                topic=batch.topic, message_id=self.message_id,
            )
        outcome = batch.outcome
        if not isinstance(outcome, Stored):
            assert outcome is not None
            raise copy(outcome)  # every handle of the batch raises it: an error of its own, with a traceback of its own
        return SendReceipt(
            batch.topic, outcome.broker_name, outcome.queue_id, outcome.base_offset + self.index, self.message_id,
            outcome.store_timestamp_ms, outcome.durability, outcome.duplicate,
        )

    def add_done_callback(self, callback: Callable[[SendHandle], None]) -> None:
        """Call `callback(handle)` once when it is done: on the producer's I/O thread, or at once when it is done already.

        A callback must be quick and must not wait; what it raises is logged.
        """
        if not self.batch.accumulator.add_callback(self, callback):
            callback(self)

    @property
    def message_id(self) -> str:
        """Known from the start: 32 hexadecimal digits, the same for every copy of the message."""
        return message_id(self.batch.producer_id, self.batch.first_sequence + self.index)


class Accumulator:
    """The producer's memory. `append` and what handles do: any thread; the rest as each says.

    `wake` is called, from any thread and without the lock, when there is something new for the loop's thread. `may_wait` is
    False in a thread that must not wait: the loop's own.
    """

    def __init__(
        self, config: AccumulatorConfig, clock: Clock, *, new_lock: Callable[[], Lock], wake: Callable[[], None],
        may_wait: Callable[[], bool],
    ) -> None:
        self.config = config
        self.clock = clock
        self._new_lock = new_lock
        self.wake = wake
        self.may_wait = may_wait
        self._lock = new_lock()
        self._open: dict[Target, Batch] = {}
        self._sealed: deque[Batch] = deque()
        self._unfinished: dict[str, set[Batch]] = {}
        self._buffered_bytes = 0
        self._waiting_for_room: list[Lock] = []
        self._next_sequence = 1  # 0 means none, in `Send.follows`
        self._refusal: Callable[[], ZrmqError] | None = None
        self._has_news = False
        self._buffer_bytes = config.buffer_bytes
        self._batch_bytes_max = config.batch_bytes_max
        self._batch_records_max = config.batch_records_max

    # --- callers' threads ---------------------------------------------------------------------------------------------

    def append(self, target: Target, body: bytes, size_bytes: int, extras: Extras | None, timeout_ms: int) -> SendHandle:
        """Add one checked record to the open batch of its target: the hot path.

        Waits up to `timeout_ms` while the buffer is full. Raises `BufferFullError`, or what `refuse` said.
        """
        with self._lock:
            batch = self._open.get(target)
            if (
                batch is None
                or batch.size_bytes + size_bytes > self._batch_bytes_max
                or self._buffered_bytes + size_bytes > self._buffer_bytes
                or batch.timeout_ms != timeout_ms
            ):
                batch = self._start(target, size_bytes, timeout_ms)
            bodies = batch.bodies
            index = len(bodies)
            if extras is not None or batch.extras is not None:
                batch.add_extras(index, extras)
            bodies.append(body)
            self._buffered_bytes += size_bytes
            batch.size_bytes = total_bytes = batch.size_bytes + size_bytes
            is_full = index + 1 >= self._batch_records_max or total_bytes + size_bytes > self._batch_bytes_max
            if is_full:
                self._seal(batch)
        if is_full:
            batch.encoded()
        if self._has_news:
            self._has_news = False
            self.wake()
        return SendHandle(batch, index)

    def _start(self, target: Target, size_bytes: int, timeout_ms: int) -> Batch:
        """An open batch with room for a record, made if need be. With the lock, which is given up while the buffer is full."""
        self._wait_for_room(size_bytes, timeout_ms)
        batch = self._open.get(target)
        if batch is not None:
            if batch.timeout_ms == timeout_ms and batch.size_bytes + size_bytes <= self._batch_bytes_max:
                return batch
            self._seal(batch)
        batch = self._open[target] = Batch(self, target, self.config.producer_id, self._next_sequence, timeout_ms)
        self._next_sequence += self.config.batch_records_max  # ids are known at once, so a batch reserves what it may need
        self._unfinished.setdefault(batch.topic, set()).add(batch)
        self._has_news = True
        return batch

    def _seal(self, batch: Batch) -> None:
        del self._open[batch.target]
        batch.seal(self.clock.monotonic_ms())
        self._sealed.append(batch)
        self._has_news = True

    def _wait_for_room(self, size_bytes: int, timeout_ms: int) -> None:
        deadline_ms = self.clock.monotonic_ms() + timeout_ms
        while self._refusal is None and self._buffered_bytes and self._buffered_bytes + size_bytes > self._buffer_bytes:
            left_ms = deadline_ms - self.clock.monotonic_ms()
            if not self.config.block_when_full or left_ms <= 0 or not self.may_wait():
                raise BufferFullError(
                    f"{self._buffered_bytes} bytes of messages wait for a broker and the buffer has {self._buffer_bytes}; send"
                    " slower, wait for handles, or give the producer a larger buffer_bytes.",
                    buffered_bytes=self._buffered_bytes, buffer_bytes=self._buffer_bytes,
                )
            room = self.lock_for_waiting()
            self._waiting_for_room.append(room)
            self._lock.release()
            try:
                room.acquire(timeout=left_ms / 1000)
            finally:
                self._lock.acquire()
        if self._refusal is not None:
            raise self._refusal()

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
        with self._lock:
            if handle.batch.outcome is not None:
                return False
            handle.batch.callbacks.append((handle, callback))
            return True

    def adopt(
        self, target: Target, producer_id: int, sequence: int, frame: bytes, size_bytes: int, deadline_ms: float
    ) -> Batch:
        """A batch of one record that was encoded and sent by somebody else, so that it ends like all others."""
        batch = Batch(self, target, producer_id, sequence, max(1, round(deadline_ms - self.clock.monotonic_ms())))
        batch.bodies.append(b"")
        batch.seal(self.clock.monotonic_ms())
        batch.records, batch.frame, batch.size_bytes = None, frame, size_bytes
        with self._lock:
            self._unfinished.setdefault(batch.topic, set()).add(batch)
            self._buffered_bytes += size_bytes
        return batch

    def is_idle(self, topic: str) -> bool:
        """Whether nothing of the topic waits here or is on its way. For the calling thread's own messages this is exact."""
        return not self._unfinished.get(topic)

    def unfinished(self) -> list[Batch]:
        """Every batch that has no outcome yet."""
        with self._lock:
            return [batch for batches in self._unfinished.values() for batch in batches]

    def refuse(self, make_error: Callable[[], ZrmqError]) -> None:
        """Take nothing more: `append` raises, also where it waits for room. What is here goes on its way."""
        with self._lock:
            self._refusal = make_error
            for batch in list(self._open.values()):
                self._seal(batch)
            self._release_room()

    def abandon_in_child(self, make_error: Callable[[], ZrmqError]) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here any more."""
        self._lock = self._new_lock()
        self._open = {}
        self._refusal = make_error

    # --- loop's thread ------------------------------------------------------------------------------------------------

    def tighten(self, batch_records_max: int, batch_bytes_max: int) -> None:
        """A server takes no more than this in a batch."""
        self._batch_records_max = min(self._batch_records_max, batch_records_max)
        self._batch_bytes_max = min(self._batch_bytes_max, batch_bytes_max)

    def take_sealed(self) -> list[Batch]:
        """The batches that callers have filled, in the order they were sealed."""
        with self._lock:
            sealed = list(self._sealed)
            self._sealed.clear()
        return sealed

    def take_open(self, is_wanted: Callable[[Batch], bool]) -> list[Batch]:
        """Seal and take the open batches for which `is_wanted`; also those sealed since `take_sealed`, which come first."""
        with self._lock:
            for batch in [batch for batch in self._open.values() if is_wanted(batch)]:
                self._seal(batch)
            self._has_news = False
            sealed = list(self._sealed)
            self._sealed.clear()
        return sealed

    @property
    def is_pressed(self) -> bool:
        """Whether somebody waits for room, or for a batch that is still open."""
        with self._lock:
            return bool(self._waiting_for_room) or any(batch.waiters for batch in self._open.values())

    @property
    def buffered_bytes(self) -> int:
        """What is held at the moment, as `buffer_bytes` counts."""
        return self._buffered_bytes

    def finish(self, batch: Batch, outcome: Stored | ZrmqError) -> None:
        """The batch's one outcome: its memory is free, who waits for it goes on, its callbacks are called."""
        with self._lock:
            assert batch.outcome is None
            batch.outcome = outcome
            callbacks, batch.callbacks = batch.callbacks, []
            self._buffered_bytes -= batch.size_bytes
            self._unfinished[batch.topic].discard(batch)
            self._release_room()
        batch.records, batch.frame = None, b""
        for lock in batch.waiters:
            lock.release()
        for handle, callback in callbacks:
            _call(callback, handle)

    def _release_room(self) -> None:
        for lock in self._waiting_for_room:
            lock.release()
        self._waiting_for_room.clear()


def _call(callback: Callable[[SendHandle], None], handle: SendHandle) -> None:
    try:
        callback(handle)
    except Exception:  # the user's code; it must not end the thread that everything depends on
        log.exception("done_callback_failed", message_id=handle.message_id)
