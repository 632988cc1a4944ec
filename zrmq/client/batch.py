"""Records on their way together, and the handles that callers have of them.

A handle is the batch and an index, so that a message costs a list append and one small object; receipts are made when somebody
asks. A batch's `outcome` is read without a lock: it is written once, before those who wait are released.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import copy
from inspect import currentframe
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from zrmq.errors import InvalidArgumentError, RequestTimeoutError, ZrmqError
from zrmq.message import FlushMode, MessageQueue, SendReceipt, message_id
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.limits import check_timeout

if TYPE_CHECKING:
    from zrmq.client.accumulator import Accumulator

LOOK_MS = 1_000  # who waits for an outcome looks that often whether there is still a loop


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


class OwnedLock(Lock, Protocol):
    """A `threading.RLock`, of which we want to know whether the thread has it; that it could take it twice is never used."""

    def _is_owned(self) -> bool:
        """Whether the calling thread has it. What `threading.Condition` asks of a lock."""


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
NO_NAMES: frozenset[str] = frozenset()


class Run(msgspec.Struct, gc=False):
    """Checked records for one target, in their order, on their way into batches."""

    target: Target
    bodies: list[bytes]
    sizes_bytes: list[int]  # in the buffer
    extras: list[Extras] | None
    begin: int = 0  # those before are in batches


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Where a batch is. A one-way batch is handed over and nothing else is known: its `base_offset` is -1."""

    broker_name: str
    queue_id: int
    base_offset: int
    store_timestamp_ms: int
    durability: FlushMode
    duplicate: bool = False


Filler = Generator[Any, Any, "SendHandle | None"]  # takes records, gives a `SendHandle` for each; None before the first


class Batch:
    """Records on their way together: filled under the accumulator's lock until it is sealed, then the loop's thread's own."""

    __slots__ = (
        "accumulator", "attempts", "avoid", "bodies", "callbacks", "deadline_ms", "extras", "filler", "first_born_ms",
        "first_sequence", "forget", "frame", "is_sealed", "last_born_ms", "last_sequence", "may_be_stored", "opened_ms",
        "outcome", "producer_id", "record_count", "records", "refusal", "room_bytes", "sent_ms", "size_bytes", "target",
        "timeout_ms", "waiters",
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
        self.filler: Filler | None = None
        self.size_bytes = 0  # of the buffer that are this batch's, used or not
        self.room_bytes = 0  # the unused ones; while there is a filler it knows better
        self.record_count = 0
        self.is_sealed = False
        self.outcome: Stored | ZrmqError | None = None
        self.waiters: list[Lock] = []
        self.callbacks: list[tuple[SendHandle, Callable[[SendHandle], None]]] = []
        self.forget: Callable[[], None] = _nothing  # the request it was last sent with
        self.may_be_stored = False  # an earlier sending than the one under way got no answer, or one that leaves it open

    @property
    def topic(self) -> str:
        """The topic of its records."""
        return self.target if isinstance(self.target, str) else self.target.topic

    def add(self, bodies: list[bytes], size_bytes: int, extras: list[Extras] | None) -> int:
        """Records more, for which there is room. Returns the index of the first."""
        index = len(self.bodies)
        if extras is not None or self.extras is not None:
            if self.extras is None:
                self.extras = [NO_EXTRAS] * index
            self.extras += [NO_EXTRAS] * len(bodies) if extras is None else extras
        self.room_bytes -= size_bytes
        self.bodies += bodies
        return index

    def stop_filler(self) -> bool:
        """Have the batch to oneself, holding the lock. False: a thread is inside the filler at this very moment."""
        if self.filler is not None:
            try:
                self.filler.close()
            except ValueError:
                return False
            self.filler = None
        if self.extras is not None:
            del self.extras[len(self.bodies) :]  # of a record that an exception (Ctrl-C, say) kept out
        return True

    def seal(self, now_ms: float) -> None:
        """No record joins it from here on; the time its caller gave it starts to run."""
        self.last_born_ms = self.accumulator.clock.time_ms()
        self.deadline_ms = now_ms + self.timeout_ms
        self.frame = b""
        self.attempts = 0  # that were refused or came to nothing
        self.refusal: ZrmqError | None = None  # the last one: what it ends with if it is not stored in time
        self.avoid = NO_NAMES  # names of brokers that it left and that may have stored it all the same
        self.sent_ms = 0.0
        self.record_count = len(self.bodies)
        self.last_sequence = self.first_sequence + self.record_count - 1
        # Without a call from here on: an exception of a signal handler comes before, and it is sealed again.
        self.records: tuple[list[bytes], list[Extras] | None] | None = (self.bodies, self.extras)
        self.bodies, self.extras = [], None
        self.is_sealed = True

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
        self.frame = frame = encode_batch(
            columns_of(*records), producer_id=self.producer_id, first_sequence=self.first_sequence,
            first_born_ms=self.first_born_ms, last_born_ms=self.last_born_ms, compress=config.compress,
        )
        self.records = None
        if self.outcome is not None:
            self.frame = b""  # it ended meanwhile, and nobody sends it any more
        return frame

    def wait(self, timeout_ms: float | None) -> bool:
        """Wait until it has an outcome. False: it has none after `timeout_ms` (None: for ever)."""
        if self.outcome is None:
            self.check_free()
            lock = self.accumulator.lock_for_waiting()
            self.waiters.append(lock)  # before looking again: the outcome is set first, then those here are released
            if self.outcome is None:
                return self._wait(lock, timeout_ms)
        return True

    def check_free(self) -> None:
        """Raise in a signal handler or finalizer that interrupted its own thread inside the filler: the batch waits for that."""
        inside = getattr(self.filler, "gi_frame", None)
        frame = None if inside is None else currentframe()
        while frame is not None:
            if frame is inside:
                raise interrupted_error()
            frame = frame.f_back

    def _wait(self, lock: Lock, timeout_ms: float | None) -> bool:
        left_ms = inf if timeout_ms is None else max(timeout_ms, 0)
        while not lock.acquire(timeout=min(left_ms, LOOK_MS) / 1000):
            left_ms -= LOOK_MS
            if left_ms <= 0:
                return False
            self.accumulator.wake()  # raises when the loop has ended, so that nobody waits for what will never be
        return True


def interrupted_error() -> InvalidArgumentError:
    """What a call gets that would wait for what it interrupted."""
    return InvalidArgumentError(
        "This signal handler or finalizer interrupted a send of its own thread, and cannot use the same producer before that has"
        " returned. Set a flag there, or raise an exception, and go on outside."
    )


def _nothing() -> None:
    """Of a batch that was never sent."""


def columns_of(bodies: list[bytes], extras: list[Extras] | None) -> Columns:
    """The records as a batch has them: a column for each thing that at least one of them has."""
    if extras is None:
        return Columns(bodies)
    if len(extras) != len(bodies):  # a broker would store it unopened, and no consumer could read it
        raise InvalidArgumentError(f"A batch has {len(bodies)} bodies and {len(extras)} extras; report this as a fault of zrmq.")
    columns = Columns(bodies)
    if any(tags := [each.tag for each in extras]):
        columns.tags = tags
    if any(keys := [each.keys for each in extras]):
        columns.keys = keys
    if any(properties := [each.properties for each in extras]):
        columns.properties = properties
    if any(groups := [each.message_group for each in extras]):
        columns.message_groups = groups
    return columns


class Span(msgspec.Struct, frozen=True, gc=False):
    """Records of a batch that were added together."""

    batch: Batch
    first: int
    count: int


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
        if timeout_ms is not None:
            check_timeout(timeout_ms)
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

        A callback must be quick and must not wait; what it raises is logged. Raises `InvalidArgumentError` for what cannot be
        called.
        """
        if not callable(callback):
            raise InvalidArgumentError(f"The callback is {callback!r}, which cannot be called; give a function of one handle.")
        if not self.batch.accumulator.add_callback(self, callback):
            callback(self)

    @property
    def message_id(self) -> str:
        """Known from the start: 32 hexadecimal digits, the same for every copy of the message."""
        return message_id(self.batch.producer_id, self.batch.first_sequence + self.index)
