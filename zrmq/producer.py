"""Producer: sends messages, one at a time, in batches, without waiting, or without an answer.

    with zrmq.Producer("meter-readers") as producer:
        receipt = producer.send("meters", b"21.5", tag="kitchen")          # stored: the receipt says where, and how safe
        handle = producer.send_async("meters", b"21.6")                    # on its way: handle.result() waits for the receipt
        producer.send_batch("meters", [b"21.7", b"21.8"])

Callers' threads fill batches (`client/accumulator.py`) or use a lane (`client/lanes.py`); one I/O thread does the rest
(`client/producing.py`).
"""

from __future__ import annotations

import atexit
import os
import random
import socket
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import accumulate, groupby
from types import TracebackType
from typing import Any, Literal, Self, overload
from weakref import WeakSet
from zlib import crc32

from zrmq.client.accumulator import Accumulator, AccumulatorConfig
from zrmq.client.batch import Extras, OneWay, Run, SendHandle, Span
from zrmq.client.instance import ClientInstance
from zrmq.client.lanes import Lanes
from zrmq.client.link import Identity
from zrmq.client.outgoing import NO_VALUE, Body, outgoing, outgoing_extras, outgoing_records
from zrmq.client.producing import ProducerCore, ProducingConfig, closed_error
from zrmq.client.runtime import ClientThread
from zrmq.config import find_nameservers
from zrmq.errors import (
    ClosedError,
    Code,
    ForkedClientError,
    InvalidArgumentError,
    RequestTimeoutError,
    TopicNotFoundError,
    ZrmqError,
)
from zrmq.logs import get_logger
from zrmq.message import MessageQueue, Record, SendReceipt
from zrmq.protocol.limits import (
    BATCH_RECORDS_MAX,
    BODY_BYTES_MAX,
    CLIENT_ID_CHARS_MAX,
    check_flag,
    check_group,
    check_number,
    check_text,
    check_topic,
)
from zrmq.transport.lane import open_lane
from zrmq.transport.options import Context, fork_count

BUFFER_BYTES = 64 * 1024 * 1024
SEND_TIMEOUT_MS_MAX = 3_600_000
LINGER_MS_MAX = 60_000
RETRIES_MAX = 100
LANE_SUFFIX = "-lane"  # a lane is a session of its own, so it needs a client id of its own
GRACE_MS = 1_000  # for an answer that the I/O thread gives at the deadline itself

log = get_logger("producer")

Selector = Callable[[Sequence[MessageQueue]], MessageQueue]


class Receipts(Sequence[SendReceipt]):
    """What `send_batch` returns: a receipt for each record, in their order, made when it is looked at."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._begins = list(accumulate((span.count for span in spans), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    @overload
    def __getitem__(self, index: int) -> SendReceipt: ...

    @overload
    def __getitem__(self, index: slice) -> list[SendReceipt]: ...

    def __getitem__(self, index: int | slice) -> SendReceipt | list[SendReceipt]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        at = bisect_right(self._begins, index) - 1
        span = self._spans[at]
        return SendHandle(span.batch, span.first + index - self._begins[at]).result()

    def __repr__(self) -> str:
        return f"<Receipts of {len(self)} messages>"


class Producer:
    """Sends messages to the topics of a cluster. Any number of threads may use one producer; close it, or use `with`.

    `group` names producers of one kind. `nameservers`: `"host:9876,other:9876"`, a list, or None for `ZRMQ_NAMESERVERS`, else
    this machine's. `buffer_bytes` bounds what waits for a broker; a full buffer blocks `send_timeout_ms` long or, without
    `block_when_full`, raises `BufferFullError` at once. `linger_ms`: how long a batch waits for more messages when nothing else
    is on its way. `batch_records_max`, `batch_bytes_max`: when a batch is full. `send_timeout_ms`: for one message with all its
    retries. `retries`: how often a message is tried again, at another broker where that is possible. `compression`: "zlib"
    packs batches where it helps. `client_id`: unique among all clients; made up when None. `context`: of an embedded broker.

    A message goes to any queue of its topic in turn; or to the one given by `queue=` or picked by `selector=`, a function of the
    topic's queues; or, with `message_group=`, to the one at CRC-32(UTF-8 of the group) modulo the number of queues, in the sorted
    list of the topic's queues. Those of one queue are stored in the order they were sent by a thread.

    A topic's first message waits until the topic is known, or created where brokers create topics by use. In a signal handler
    set a flag, or raise: sending, flushing or closing in the middle of a send of its own thread may raise `InvalidArgumentError`.

    Raises `InvalidArgumentError`, `ConfigError`, `ResourceLimitError`. Connects at once, and goes on trying while it is open.
    """

    def __init__(
        self,
        group: str = "DEFAULT_PRODUCER",
        *,
        nameservers: str | Sequence[str] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        block_when_full: bool = True,
        linger_ms: float = 0.0,
        batch_records_max: int = 1_000,
        batch_bytes_max: int = 256 * 1024,
        send_timeout_ms: int = 3_000,
        retries: int = 2,
        compression: Literal["zlib"] | None = None,
        client_id: str | None = None,
        context: Context | None = None,
    ) -> None:
        check_group(group)
        check_number("buffer_bytes", buffer_bytes, 1, 1 << 40)
        check_flag("block_when_full", block_when_full)
        check_number("linger_ms", linger_ms, 0, LINGER_MS_MAX, float)
        check_number("batch_records_max", batch_records_max, 1, BATCH_RECORDS_MAX)
        check_number("batch_bytes_max", batch_bytes_max, 1, BODY_BYTES_MAX)
        check_number("send_timeout_ms", send_timeout_ms, 1, SEND_TIMEOUT_MS_MAX)
        check_number("retries", retries, 0, RETRIES_MAX)
        if compression not in (None, "zlib"):
            raise InvalidArgumentError(f"There is no compression {compression!r}; use 'zlib' or None.", compression=compression)
        rng = random.Random()
        self.group = group
        self.client_id = _client_id(client_id, rng)
        self.nameservers = find_nameservers(nameservers)
        self._timeout_ms = send_timeout_ms
        self._topics: set[str] = set()
        self._is_closed = False
        self._forks = fork_count()
        self._close_lock = threading.RLock()  # a signal handler may close while its thread does
        config = AccumulatorConfig(
            rng.getrandbits(64), buffer_bytes, block_when_full, batch_records_max, batch_bytes_max, linger_ms,
            compression is not None, send_timeout_ms,
        )
        self._thread = ClientThread(f"zrmq-producer-{group}", context=context)
        try:
            self._core, self._accumulator = self._thread.call(
                partial(_assemble, self._thread, config, retries, self.nameservers, self._identity(""), rng)
            )
        except BaseException:
            self._thread.close()
            raise
        self._append = self._accumulator.append
        self._body_fillers = self._accumulator.body_fillers
        self._record_fillers = self._accumulator.record_fillers
        self._lanes = Lanes(
            self._core, self._accumulator, rng.getrandbits(64),
            open_lane=partial(open_lane, self._thread.context, identity=self._identity(LANE_SUFFIX)),
            post=self._thread.loop.call_soon_threadsafe, new_lock=threading.Lock, new_owned_lock=_owned_lock,
        )
        _producers.add(self)

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(
        self, topic: str, body: Body | None = None, tag: str | None = None, keys: Sequence[str] = (),
        properties: dict[str, str] | None = None, message_group: str | None = None, queue: MessageQueue | None = None,
        selector: Selector | None = None, value: Any = NO_VALUE, timeout_ms: int | None = None,
    ) -> SendReceipt:
        """Send one message and wait until it is stored, as safe as the topic's flush mode says.

        `body`: at most 4 MiB, text as UTF-8; or `value`, which is packed with MessagePack. Give all others by name. `tag`: one,
        for filters; no '|', no blanks around it. `keys`: for readers, at most 64. `properties`: at most 128, 16 KiB with
        tag and keys. `message_group`: what order holds within, at most 64 bytes. `queue`: this one and no other; or `selector`
        picks one of the topic's. `timeout_ms`: instead of the producer's `send_timeout_ms`.

        Before anything is sent: `InvalidArgumentError`, `PayloadTooLargeError`, `ClosedError`, `ForkedClientError`,
        `BufferFullError`, `TopicNotFoundError`. After: `UnreachableError` when it is certain that it was not stored,
        `RequestTimeoutError` when that is unknown, and the brokers' own, such as `DiskFullError`. Not inside a callback.
        """
        target, data, size_bytes, extras, left_ms = self._outgoing(
            topic, body, tag, keys, properties, message_group, queue, selector, value, timeout_ms
        )
        if not self._accumulator.may_wait():
            raise InvalidArgumentError("send() waits, and a callback must not; use send_async() there.")
        if self._accumulator.is_idle(topic):  # else it would overtake what this thread sent before
            receipt = self._lanes.send(target, data, size_bytes, extras, left_ms)
            if receipt is not None:
                return receipt
        return self._append(target, data, size_bytes, extras, left_ms).result()

    def send_async(
        self, topic: str, body: Body | None = None, tag: str | None = None, keys: Sequence[str] = (),
        properties: dict[str, str] | None = None, message_group: str | None = None, queue: MessageQueue | None = None,
        selector: Selector | None = None, value: Any = NO_VALUE, timeout_ms: int | None = None,
    ) -> SendHandle:
        """Hand one message over and go on; arguments as for `send`. The handle has the receipt, or the error, later.

        Waits only at a topic's first message, while the buffer is full, and, when it is bound to a queue, until a broker of the
        topic is there and all that are making it have, at most a second. Raises what `send` raises before anything is sent.
        """
        # Hot path: a message that may go to any queue, like some before it. See `Accumulator.append`. Keyword-only parameters
        # would cost another 0.1 us, as Python looks each one's default up in a dict; `**options`, one they fill, 0.4.
        if (
            message_group is None and queue is None and selector is None and value is NO_VALUE and timeout_ms is None
            and type(body) is bytes and type(topic) is str
        ):
            record: Any = body
            if tag is None and not keys and not properties:
                fill = self._body_fillers.get(topic)
            else:
                fill = self._record_fillers.get(topic)
                if fill is not None:
                    besides_bytes, extras = outgoing_extras(tag, keys, properties)
                    record = body, len(body) + besides_bytes, extras
            if fill is not None:
                try:
                    return fill(record)
                except (StopIteration, ValueError) as end:
                    handle = self._accumulator.filled(end)
                    if handle is not None:
                        return handle
        return self._append(*self._outgoing(
            topic, body, tag, keys, properties, message_group, queue, selector, value, timeout_ms
        ))

    def send_batch(
        self,
        topic: str,
        records: Iterable[Body | Record],
        *,
        message_group: str | None = None,
        queue: MessageQueue | None = None,
        selector: Selector | None = None,
        timeout_ms: int | None = None,
    ) -> Receipts:
        """Send many messages of one topic and wait until all are stored. A `Record` has a tag, keys, properties, a message group.

        All records are checked before the first is sent; the error of one that is refused has its `index` among its `facts`.
        They share batches, and a batch goes to one queue. When some are not stored, the error is that of the first of these, and
        in its facts `failed_indexes` has all of them, `unknown_indexes` those that may be stored all the same. Once one has
        failed no more are handed over. Raises as `send`.
        """
        if isinstance(records, str | bytes | bytearray | memoryview | Record | Mapping) or not isinstance(records, Iterable):
            raise InvalidArgumentError(
                f"send_batch() takes a list of records and got {type(records).__name__}; for one message use send()."
            )
        given = list(records)
        bodies, sizes_bytes, extras = outgoing_records(given, message_group)
        is_grouped = extras is not None and any(each.message_group is not None for each in extras)
        left_ms = self._ready(topic, timeout_ms, is_grouped or queue is not None or selector is not None)
        if not self._accumulator.may_wait():
            raise InvalidArgumentError("send_batch() waits, and a callback must not; use send_async() there.")
        target = self._target(topic, message_group, queue, selector)
        run = Run(target, bodies, sizes_bytes, extras)
        spans: list[Span] = []
        refusal = None
        try:
            self._accumulator.append_all(self._grouped(run) if target is topic and is_grouped else [run], left_ms, spans)
        except ZrmqError as error:
            refusal = error
        return _settled(spans, len(bodies), refusal)

    def send_oneway(
        self, topic: str, body: Body | None = None, tag: str | None = None, keys: Sequence[str] = (),
        properties: dict[str, str] | None = None, message_group: str | None = None, queue: MessageQueue | None = None,
        selector: Selector | None = None, value: Any = NO_VALUE, timeout_ms: int | None = None,
    ) -> None:
        """Hand one message over that nobody acknowledges; arguments as for `send`. For readings of which a few may be lost.

        When brokers take them too slowly the buffer fills, and this waits or raises `BufferFullError` as the producer was told.
        What no broker takes within `timeout_ms` is dropped, and counted in a log line.
        """
        target, data, size_bytes, extras, left_ms = self._outgoing(
            topic, body, tag, keys, properties, message_group, queue, selector, value, timeout_ms
        )
        self._append(OneWay(topic, None if isinstance(target, str) else target), data, size_bytes, extras, left_ms)

    # --- the end ------------------------------------------------------------------------------------------------------

    def flush(self, timeout_ms: int | None = None) -> None:
        """Wait until every message handed over so far is stored or has failed; its handle, its callbacks and the log say which.

        Raises `RequestTimeoutError` when some have neither after `timeout_ms` (None: as long as their own timeouts last).
        """
        left = self._wait_for_all(timeout_ms)
        if left:
            raise RequestTimeoutError(
                f"{left} messages are not acknowledged after {timeout_ms} ms and are still on their way.", messages=left
            )

    def close(self, timeout_ms: int | None = None) -> None:
        """Take no more messages, flush, and disconnect. Closing twice does nothing, or goes on where an exception (Ctrl-C, say)
        ended the first time; another thread may be sending.

        What is not acknowledged after `timeout_ms` (None: as long as the messages' own timeouts last) fails with `ClosedError` on
        its handle and is counted in a log line.
        """
        if self._forks != fork_count():
            return  # in a forked child, where nothing of it works
        if not self._accumulator.may_wait():
            raise InvalidArgumentError("close() waits, and a callback must not; call it in another thread.")
        with self._close_lock:
            if self in _producers:
                self._drain(timeout_ms)
                self._thread.close()
                _producers.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- steps --------------------------------------------------------------------------------------------------------

    def _outgoing(
        self, topic: str, body: Body | None, tag: str | None, keys: Sequence[str], properties: dict[str, str] | None,
        message_group: str | None, queue: MessageQueue | None, selector: Selector | None, value: Any, timeout_ms: int | None,
    ) -> tuple[str | MessageQueue, bytes, int, Extras | None, int]:
        """Target, body, size in the buffer, extras and the time left of a message that may be sent."""
        data, size_bytes, extras = outgoing(body, value, tag, keys, properties, message_group)
        is_bound = queue is not None or selector is not None or message_group is not None
        left_ms = self._ready(topic, timeout_ms, is_bound)
        target = self._target(topic, message_group, queue, selector) if is_bound else topic
        return target, data, size_bytes, extras, left_ms

    def _ready(self, topic: str, timeout_ms: int | None, is_bound: bool) -> int:
        """How much of the time is left once the topic is known and, for a message bound to a queue, has queues and will not have
        more in a moment."""
        if timeout_ms is None:
            timeout_ms = self._timeout_ms
        else:
            check_number("timeout_ms", timeout_ms, 1, SEND_TIMEOUT_MS_MAX)
        if isinstance(topic, str) and topic in self._topics and (
            not is_bound or (self._core.queues(topic) and not self._core.is_settling(topic))
        ):
            return timeout_ms
        return self._prepare(topic, timeout_ms, is_bound)

    def _prepare(self, topic: str, timeout_ms: int, is_bound: bool) -> int:
        """A topic's first message waits for its route; one that is bound to a queue, until there are some again, and all."""
        check_topic(topic)
        if self._is_closed:
            raise closed_error()
        if not self._accumulator.may_wait():
            raise InvalidArgumentError(
                f"A message to topic {topic!r} waits for the topic's route, and a callback must not; send one like it elsewhere"
                " before.",
                topic=topic,
            )
        now_ms = self._accumulator.clock.monotonic_ms
        started_ms = now_ms()
        answers: list[ZrmqError | None] = []
        done = self._accumulator.lock_for_waiting()

        def answer(error: ZrmqError | None) -> None:
            answers.append(error)
            done.release()

        self._thread.call(lambda: self._core.prepare(topic, timeout_ms, answer, is_bound))
        if not done.acquire(timeout=(timeout_ms + GRACE_MS) / 1000):
            raise RequestTimeoutError(f"Topic {topic!r} is not known after {timeout_ms} ms; try again.", topic=topic)
        if answers[0] is not None:
            raise answers[0]
        self._topics.add(topic)
        return max(1, round(timeout_ms - (now_ms() - started_ms)))

    def _target(
        self, topic: str, message_group: str | None, queue: MessageQueue | None, selector: Selector | None
    ) -> str | MessageQueue:
        """The topic for any of its queues, or the queue the message is bound to."""
        if queue is None and selector is None and message_group is None:
            return topic
        queues = self._core.queues(topic)
        if not queues:
            raise TopicNotFoundError(
                f"Topic {topic!r} has no queue at present: deleted, or its brokers left; create it, or start one.", topic=topic
            )
        if queue is not None and selector is not None:
            raise InvalidArgumentError("Give queue= or selector=, not both.")
        if queue is None and selector is None:
            assert message_group is not None
            return queues[crc32(message_group.encode()) % len(queues)]
        if selector is not None:
            if not callable(selector):
                raise InvalidArgumentError(f"selector is {selector!r}; give a function that takes the queues and returns one.")
            queue = selector(tuple(queues))
        if not isinstance(queue, MessageQueue) or queue not in queues:
            raise InvalidArgumentError(
                f"{queue!r} is not a queue of topic {topic!r}, which has {len(queues)}; take one of a receipt, or let a selector"
                " pick.",
                topic=topic, queue_count=len(queues),
            )
        return queue

    def _grouped(self, run: Run) -> Iterator[Run]:
        """The records of any queue of a topic, each of a message group in its own."""
        assert isinstance(run.target, str) and run.extras is not None
        targets = [self._target(run.target, extras.message_group, None, None) for extras in run.extras]
        begin = 0
        for target, same in groupby(targets):
            end = begin + sum(1 for _ in same)
            yield Run(target, run.bodies[begin:end], run.sizes_bytes[begin:end], run.extras[begin:end])
            begin = end

    def _wait_for_all(self, timeout_ms: int | None) -> int:
        """Wait for everything that has no outcome. Returns how many messages have none after the timeout."""
        if timeout_ms is not None:
            check_number("timeout_ms", timeout_ms, 0, SEND_TIMEOUT_MS_MAX)
        now_ms = self._accumulator.clock.monotonic_ms
        deadline_ms = None if timeout_ms is None else now_ms() + timeout_ms
        batches = self._accumulator.unfinished()
        for batch in batches:
            if not batch.wait(None if deadline_ms is None else deadline_ms - now_ms()):
                break
        return sum(batch.message_count for batch in batches if batch.outcome is None)

    def _drain(self, timeout_ms: int | None) -> None:
        """Take nothing more, and let out what is here."""
        self._accumulator.refuse(closed_error)
        self._is_closed = True
        try:
            self._accumulator.wake()
            self._wait_for_all(timeout_ms)
        except ClosedError as error:  # what it was embedded in is closed already
            log.warning("producer_cut_off", group=self.group, reason=error.message)
        self._lanes.close()

    def _identity(self, suffix: str) -> Identity:
        return Identity(self.client_id + suffix, "producer", self.group)


def _assemble(
    thread: ClientThread, config: AccumulatorConfig, retries: int, nameservers: Sequence[str], identity: Identity,
    rng: random.Random,
) -> tuple[ProducerCore, Accumulator]:
    """What runs on the loop's thread, made there. None of it knows the `Producer`, or the `ClientThread`."""
    here, loop = threading.get_ident(), thread.loop
    instance = ClientInstance(loop, nameservers, identity, rng)
    accumulator = Accumulator(
        config, loop.clock, new_lock=threading.Lock, new_owned_lock=_owned_lock,
        wake=lambda: loop.call_soon_threadsafe(core.wake), may_wait=lambda: threading.get_ident() != here,
    )
    core = ProducerCore(loop, accumulator, ProducingConfig(retries), instance, rng)
    instance.listener = core
    thread.at_close(core.leave)
    return core, accumulator


def _owned_lock() -> Any:
    return threading.RLock()


def _settled(spans: list[Span], count: int, refusal: ZrmqError | None) -> Receipts:
    """Wait for all that were handed over. Raises the error of the first that is not stored; `refusal` is that of the rest."""
    failed: list[int] = []
    unknown: list[int] = []
    first_error = None
    end = 0
    for span in spans:
        begin, end = end, end + span.count
        span.batch.wait(None)
        outcome = span.batch.outcome
        if isinstance(outcome, ZrmqError):
            first_error = first_error or outcome
            failed += range(begin, end)
            if span.batch.may_be_stored or isinstance(outcome, RequestTimeoutError):
                unknown += range(begin, end)
    first_error = first_error or refusal
    if first_error is None:
        return Receipts(spans)
    failed += range(end, count)
    error = copy(first_error)
    error.facts = {**error.facts, "failed_indexes": failed, "unknown_indexes": unknown}
    if len(failed) < count or unknown:
        error.message += f" Of {count} records {count - len(failed)} are stored, {len(unknown)} may be; see failed_indexes."
    raise error


def _client_id(given: str | None, rng: random.Random) -> str:
    if given is None:
        return f"{socket.gethostname()[:60]}-{os.getpid()}-{rng.getrandbits(32):08x}"
    check_text(given, "client id", Code.CLIENT_ID_REQUIRED)
    chars_max = CLIENT_ID_CHARS_MAX - len(LANE_SUFFIX)
    if len(given) > chars_max:
        raise InvalidArgumentError(
            f"The client id has {len(given)} characters; use at most {chars_max}.", client_id=given, limit_chars=chars_max
        )
    return given


def _forked_error() -> ForkedClientError:
    return ForkedClientError("The producer was made before this process was forked; make a new one in the child.")


_producers: WeakSet[Producer] = WeakSet()


def _drain_all() -> None:
    """At the interpreter's exit: what was handed over still goes out. The threads end after this (`client/runtime.py`)."""
    for producer in list(_producers):
        producer._drain(None)


def _forget_in_child() -> None:
    for producer in list(_producers):
        producer._accumulator.abandon_in_child(_forked_error)
    _producers.clear()  # there is nothing to drain at its exit


atexit.register(_drain_all)
os.register_at_fork(after_in_child=_forget_in_child)
