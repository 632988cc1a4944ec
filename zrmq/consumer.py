"""The doors for consumers: one calls a listener for each message, the other is asked for messages.

    consumer = zrmq.PushConsumer("alarms")

    @consumer.subscribe("meters", "kitchen || hall")
    def on_reading(message: zrmq.Message) -> None:  # returning finishes the message, raising makes it come again
        print(message.body)

    consumer.run()

    with zrmq.PullConsumer("reports") as consumer:
        consumer.subscribe("meters")
        for message in consumer:
            print(message.body)

Both deliver at least once and in the order of each queue. What is finished is committed within `commit_interval_ms`, when a queue
goes to another member, and at the end; what is not finished comes again, here or at another member of the group.
"""

from __future__ import annotations

import inspect
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from queue import Empty, SimpleQueue
from random import Random
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from zrmq.client.allocation import AllocateAveragely, Strategy
from zrmq.client.consuming import ConsumerCore, ConsumingConfig
from zrmq.client.inbox import Inbox, Ready
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.listening import Failure, Listener, Pace, run_unit
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.client.reading import Bounds
from zrmq.client.runtime import ClientThread
from zrmq.config import find_nameservers
from zrmq.errors import ClosedError, Code, InvalidArgumentError, RequestTimeoutError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, Message, MessageModel, MessageQueue
from zrmq.protocol.limits import CLIENT_ID_CHARS_MAX, SUBSCRIPTIONS_MAX, check_group, check_text, check_topic
from zrmq.protocol.requests import OFFSET_EARLIEST, OFFSET_LATEST, AnyReply, Offsets, QueryCommitted, QueryOffsets, Request
from zrmq.protocol.tags import canonical_expression
from zrmq.transport.options import check_fork, fork_count

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from zrmq.client.link import OnReply
    from zrmq.client.reading import Reading
    from zrmq.transport.options import Context

__all__ = ["Listener", "PullConsumer", "PushConsumer"]

BUFFER_BYTES = 32 * 1024 * 1024  # pulled and not handed out yet: a tenth of a second at full speed, little on a small box
BUFFER_MESSAGES = 100_000
COMMIT_INTERVAL_MS = 1_000  # RocketMQ: 5,000; what a crash may repeat
COMMIT_INTERVAL_MS_MIN = 10
CONCURRENCY_MAX = 1_024
START_MS = 5_000  # how long `start` waits for brokers before it goes on trying in the background
CLOSE_MS = 10_000
LAST_COMMIT_MS = 400  # of a consumer that is ended by the interpreter's exit; its links need the rest of the second
ASK_MS = 5_000
POLL_MESSAGES = 1_000
POLL_MS = 1_000
ITERATION_MESSAGES = 500  # taken at once by an iteration; so many may come again after a crash

T = TypeVar("T")
When = datetime | int  # milliseconds since 1970-01-01 UTC

log = get_logger("consumer")


class _Consumer:
    """What both doors share: what the user said, and the engine between the start and the end."""

    _in_order = False
    _settle: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        group: str | None,
        *,
        nameservers: str | Sequence[str] | None,
        message_model: MessageModel,
        consume_from: ConsumeFrom | When,
        allocation: Strategy,
        instance_name: str | None,
        buffer_messages: int,
        buffer_bytes: int,
        commit_interval_ms: int,
        context: Context | None,
    ) -> None:
        if group is not None:
            check_group(group)
        if not callable(allocation):
            raise InvalidArgumentError(f"allocation={allocation!r} is no strategy; give one such as AllocateAveragely().")
        self.group = group
        self.instance_name = _instance_name(instance_name)
        self.client_id = f"{socket.gethostname()[:64]}@{os.getpid()}@{Random().getrandbits(64):016x}"
        self._nameservers = find_nameservers(nameservers)
        self._message_model = MessageModel(message_model)
        self._consume_from, self._consume_timestamp_ms = _start_point(consume_from)
        self._allocation = allocation
        self._bounds = Bounds(
            _at_least("buffer_bytes", buffer_bytes, 1), _at_least("buffer_messages", buffer_messages, 1)
        )
        self._commit_interval_ms = _at_least("commit_interval_ms", commit_interval_ms, COMMIT_INTERVAL_MS_MIN)
        self._auto_commit = True
        self._context = context
        self._forks = fork_count()
        self._filters: dict[str, str] = {}
        self._assigned: frozenset[MessageQueue] | None = None
        self._thread: ClientThread | None = None
        self._engine: _Engine | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def failure(self) -> BaseException | None:
        """What ended the consumer, when it was not `close`: the group's refusal, or what a listener ended the program with."""
        return self._engine.inbox.failure if self._engine is not None else None

    @property
    def skipped_count(self) -> int:
        """Batches that were passed over because they are damaged: on a broker's disk, on the way, or written so."""
        return self._engine.core.reader.corrupt_count + self._engine.inbox.damaged_count if self._engine is not None else 0

    def assigned(self) -> list[MessageQueue]:
        """The queues this consumer reads now, sorted; they change with the members of the group."""
        engine = self._running()
        return self._call(lambda: sorted(queue for queue in engine.core.reader.readings if not _is_draining(engine, queue)))

    # --- life ---------------------------------------------------------------------------------------------------------

    def _subscribe(self, topic: str, expression: str) -> None:
        check_topic(topic)
        self._check_usable()
        if self._engine is not None:
            raise InvalidArgumentError(f"{topic!r} cannot be subscribed any more; subscribe before the consumer starts.", topic=topic)
        if topic in self._filters:
            raise InvalidArgumentError(
                f"{topic!r} is subscribed already; subscribe once, with all tags joined by '||'.", topic=topic
            )
        if len(self._filters) >= SUBSCRIPTIONS_MAX:
            raise InvalidArgumentError(f"A consumer subscribes to at most {SUBSCRIPTIONS_MAX} topics; use several consumers.")
        self._filters[topic] = canonical_expression(expression)

    def _open(self) -> _Engine:
        """Start the engine; once."""
        self._check_usable()
        if not self._filters and self._assigned is None:
            raise InvalidArgumentError("Nothing is subscribed; call subscribe() with a topic before the consumer starts.")
        config = ConsumingConfig(
            client_id=self.client_id, group=self.group or "", filters=dict(self._filters), is_assigned=self._assigned is not None,
            message_model=self._message_model, consume_from=self._consume_from, consume_timestamp_ms=self._consume_timestamp_ms,
            allocation=self._allocation, bounds=self._bounds, commit_interval_ms=self._commit_interval_ms,
            auto_commit=self._auto_commit,
        )
        identity = Identity(self.client_id, "consumer", self.group or "", self.instance_name)
        thread = ClientThread(f"zrmq-consumer-{self.group or 'reader'}", context=self._context)
        try:
            loop, nameservers, in_order = thread.loop, self._nameservers, self._in_order
            engine = thread.call(lambda: _Engine(loop, config, nameservers, identity, in_order))
        except BaseException:
            thread.close()
            raise
        thread.at_close(engine.leave)
        self._thread, self._engine = thread, engine
        return engine

    def _check_usable(self) -> None:
        check_fork(self._forks)
        if self._is_closed:
            raise ClosedError("The consumer is closed; make a new one.")

    def _running(self) -> _Engine:
        """The engine, for calls that make no sense before the start."""
        self._check_usable()
        if self._engine is None:
            raise InvalidArgumentError("The consumer is not started; call start() first.")
        if self._engine.inbox.failure is not None:
            raise self._engine.inbox.failure
        return self._engine

    def _await_start(self, engine: _Engine) -> None:
        """Return when the group is joined, so that what is stored from then on is not missed; or when that takes too long."""
        if not engine.started.wait(START_MS / 1000.0):
            log.warning("consumer_start_slow", group=self.group, waited_ms=START_MS)
        if engine.inbox.failure is not None:
            failure = engine.inbox.failure
            self._end(CLOSE_MS)
            raise failure

    def _end(self, timeout_ms: float) -> None:
        """Commit what is finished, leave, end the thread."""
        self._is_closed = True
        if self._thread is None or self._engine is None:
            return
        core, answer = self._engine.core, _Answer[None]()
        with suppress(ClosedError):  # the thread has ended by itself, at the interpreter's exit
            self._thread.post(lambda: core.close(lambda: answer.give(None), max(int(timeout_ms), 1)))
            answer.wait(timeout_ms, "the last commit", is_needed=False)
        self._thread.close()

    def _is_elsewhere(self) -> bool:
        """Whether this is a forked child's copy, whose threads and sockets stayed with the parent."""
        return self._forks != fork_count()

    # --- asking -------------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T]) -> T:
        assert self._thread is not None
        return self._thread.call(function)

    def _wait(self, begin: Callable[[Callable[[Any], None]], None], what: str, timeout_ms: int = ASK_MS) -> Any:
        """What `begin`, run on the engine's thread, gives to the function it is handed. A `ZrmqError` is raised."""
        assert self._thread is not None
        answer = _Answer[Any]()
        self._thread.post(lambda: begin(answer.give))
        return answer.wait(timeout_ms + 1_000, what)

    def _ask(self, broker_name: str, kind: type[Request], *fields: object) -> AnyReply:
        core = self._running().core

        def begin(give: Callable[[Any], None]) -> None:
            on_reply: OnReply = lambda reply, frames: give(reply)  # noqa: E731 - typed where it is made
            core.ask(broker_name, kind, *fields, timeout_ms=ASK_MS, on_reply=on_reply)

        reply: AnyReply = self._wait(begin, f"{kind.__name__} at {broker_name}")
        return reply

    def _offsets_at(self, queues: Iterable[MessageQueue], where: int) -> dict[MessageQueue, int]:
        """The offsets that belong to a time, or OFFSET_EARLIEST, OFFSET_LATEST; one question a topic and broker."""
        groups: dict[tuple[str, str], list[MessageQueue]] = {}
        for queue in queues:
            groups.setdefault((queue.broker_name, queue.topic), []).append(queue)
        found: dict[MessageQueue, int] = {}
        for (broker_name, topic), each in groups.items():
            reply = self._ask(broker_name, QueryOffsets, topic, [queue.queue_id for queue in each], where)
            if isinstance(reply, Offsets):
                found.update((MessageQueue(topic, broker_name, queue_id), offset) for queue_id, offset in reply.offsets)
        return found


class PushConsumer(_Consumer):
    """Calls a listener for each message, in threads of its own. Any thread may use it.

    A listener that returns finishes the message; one that raises gets it again, after 1 s, 2 s, 4 s, ... 60 s, for as long as it
    raises, with `delivery_attempt` counted up. Meanwhile others go on, and the commit waits for it; with `in_order` its queue waits.

    Members of a group share the queues. When one comes or goes, a queue changes hands after what is in work was finished.
    """

    def __init__(
        self,
        group: str,
        *,
        nameservers: str | Sequence[str] | None = None,
        message_model: MessageModel = MessageModel.CLUSTERING,
        consume_from: ConsumeFrom | When = ConsumeFrom.LATEST,
        concurrency: int = 1,
        in_order: bool = False,
        allocation: Strategy = AllocateAveragely(),  # noqa: B008 - it has no state
        instance_name: str | None = None,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        commit_interval_ms: int = COMMIT_INTERVAL_MS,
        context: Context | None = None,
    ) -> None:
        """Connects when it is started.

        `nameservers`: else `ZRMQ_NAMESERVERS`, else this machine's. `message_model`: CLUSTERING, each message for one member, or
        BROADCASTING, each for every member; then `instance_name` (the host's name) says whose offsets these are. `consume_from`:
        where a group begins that has never committed; a time may be given (a datetime, or milliseconds since 1970 UTC).
        `concurrency`: listener calls side by side, 1 to 1,024. `in_order`: one call at a time for each queue. `allocation`: who
        gets which queues. `buffer_messages`, `buffer_bytes`: what is read ahead. `commit_interval_ms`: at least 10.

        Raises `InvalidArgumentError`, `ConfigError`.
        """
        super().__init__(
            group, nameservers=nameservers, message_model=message_model, consume_from=consume_from, allocation=allocation,
            instance_name=instance_name, buffer_messages=buffer_messages, buffer_bytes=buffer_bytes,
            commit_interval_ms=commit_interval_ms, context=context,
        )
        check_group(group)
        self._concurrency = _at_least("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self._in_order = in_order
        self._listeners: dict[str, tuple[Listener, Pace]] = {}
        self._workers: list[threading.Thread] = []
        self._ended = threading.Event()
        self._is_paused = False

    @overload
    def subscribe(self, topic: str, expression: str = "*") -> Callable[[Listener], Listener]: ...

    @overload
    def subscribe(self, topic: str, expression: str, listener: Listener) -> None: ...

    def subscribe(self, topic: str, expression: str = "*", listener: Listener | None = None) -> Callable[[Listener], Listener] | None:
        """Call `listener(message)` for each message of the topic that has one of the tags in `expression` ("a || b"; "*": all).

        Without a listener it decorates one. Before the start; once a topic. All members of a group must subscribe alike.
        Raises `InvalidArgumentError`.
        """
        if listener is None:
            return partial(self._decorate, topic, expression)
        self._add(topic, expression, listener)
        return None

    def start(self) -> None:
        """Begin to read, in the background; return when the group is joined, or after 5 s, which go on in the background.

        Raises what the group refuses: `SubscriptionMismatchError`, `RequestRefusedError` (INSTANCE_NAME_TAKEN).
        """
        with self._lock:
            if self._engine is not None:
                raise InvalidArgumentError("The consumer is started already; make a new one for a second start.")
            engine = self._open()
            self._workers = [
                threading.Thread(target=self._work, args=(engine,), name=f"zrmq-listener-{number}", daemon=True)
                for number in range(self._concurrency)
            ]
        for worker in self._workers:
            worker.start()
        self._await_start(engine)

    def run(self) -> None:
        """Start, unless it is started, and read until SIGINT, SIGTERM or `close`; then close.

        Signals end it when it is called in the main thread, and mean again what they meant before from the first one on. Raises
        as `start`, also when the group refuses this consumer later on.
        """
        with _until_signal(self._ended.set):
            if self._engine is None:
                self.start()
            self._ended.wait()
        self.close()
        if self.failure is not None:
            raise self.failure

    def close(self, timeout_ms: int = CLOSE_MS) -> None:
        """Let listeners finish the message they have, commit, give the queues back, leave. Closing twice does nothing.

        A listener that takes longer than `timeout_ms` is left alone; its message comes again. Called by a listener it returns at
        once, and the consumer closes when that has returned.
        """
        if self._is_elsewhere():
            return
        self._ended.set()
        if threading.current_thread() in self._workers:
            threading.Thread(target=self.close, args=(timeout_ms,), name="zrmq-consumer-close").start()
            return
        with self._lock:
            if not self._is_closed:
                self._stop(timeout_ms)

    def stop(self, timeout_ms: int = CLOSE_MS) -> None:
        """The same as `close`."""
        self.close(timeout_ms)

    def pause(self) -> None:
        """Call listeners no more, but those that are at work, until `resume`; the queues stay here."""
        core = self._running().core
        self._call(lambda: core.pause_all(True))

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        core = self._running().core
        self._call(lambda: core.pause_all(False))

    def __enter__(self) -> Self:
        """Starts it, unless it is started."""
        if self._engine is None:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- listeners ----------------------------------------------------------------------------------------------------

    def _decorate(self, topic: str, expression: str, listener: Listener) -> Listener:
        self._add(topic, expression, listener)
        return listener

    def _add(self, topic: str, expression: str, listener: Listener) -> None:
        if not callable(listener):
            raise InvalidArgumentError(f"The listener {listener!r} cannot be called; give a function that takes a message.")
        if inspect.iscoroutinefunction(listener):
            raise InvalidArgumentError(f"The listener {listener!r} is a coroutine function; give a plain one.")
        self._subscribe(topic, expression)
        self._listeners[topic] = (listener, Pace())

    def _work(self, engine: _Engine) -> None:
        """One worker's life: units, until the inbox is closed."""
        try:
            while (unit := engine.inbox.take(None, self._unit_size)) is not None:
                self._run_unit(engine, unit)
        except BaseException as error:  # what a listener ends the program with belongs into the main thread: run() raises it
            log.error("listener_ended_consumer", group=self.group, error=repr(error))
            engine.inbox.close(error)
        finally:
            self._ended.set()

    def _unit_size(self, queue: ProcessQueue) -> int:
        return self._listeners[queue.queue.topic][1].messages

    def _run_unit(self, engine: _Engine, unit: Unit) -> None:
        listener, pace = self._listeners[unit.process_queue.queue.topic]
        outcome = run_unit(unit, listener, pace, engine.loop.clock, in_order=self._in_order)
        engine.inbox.done(unit, [failure.unit for failure in outcome.failures], outcome.stop_offset)
        for failure in outcome.failures:
            self._tell(failure)
            engine.put_back_later(failure.unit, failure.retry_ms)

    def _tell(self, failure: Failure) -> None:
        message = failure.unit.messages[0]
        queue = message.queue
        log.warning(
            "message_failed", group=self.group, topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id,
            queue_offset=message.queue_offset, message_id=message.message_id, delivery_attempt=message.delivery_attempt - 1,
            retry_in_ms=round(failure.retry_ms), error=repr(failure.error),
        )

    def _stop(self, timeout_ms: int) -> None:
        engine = self._engine
        if engine is not None:
            now_ms = engine.loop.clock.monotonic_ms
            deadline_ms = now_ms() + timeout_ms
            engine.inbox.close()
            with suppress(ClosedError):  # as in _end
                self._call(engine.core.drain_all)
            for worker in self._workers:
                worker.join(max(deadline_ms - now_ms(), 0.0) / 1000.0)
            if any(worker.is_alive() for worker in self._workers):
                log.warning("listener_left", group=self.group, waited_ms=timeout_ms)
            timeout_ms = int(max(deadline_ms - now_ms(), LAST_COMMIT_MS))
        self._end(timeout_ms)


class PullConsumer(_Consumer):
    """Gives messages when asked. One thread at a time; `close` may come from any.

    Either `subscribe` to topics, sharing their queues with the group's other members, or `assign` queues, which are read whoever
    else reads them. Without a group nothing is shared and nothing committed.

    What counts as finished, with `auto_commit`: for `poll`, what earlier polls returned; for an iteration, the messages before the
    one it has just given; for both, everything given when a `with` block ends without an exception. Without `auto_commit`: what was
    given before `commit`.
    """

    def __init__(
        self,
        group: str | None = None,
        *,
        nameservers: str | Sequence[str] | None = None,
        message_model: MessageModel = MessageModel.CLUSTERING,
        consume_from: ConsumeFrom | When = ConsumeFrom.LATEST,
        auto_commit: bool = True,
        allocation: Strategy = AllocateAveragely(),  # noqa: B008 - it has no state
        instance_name: str | None = None,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        commit_interval_ms: int = COMMIT_INTERVAL_MS,
        context: Context | None = None,
    ) -> None:
        """Connects when it is started, by `start` or by the first call that needs it. Options as of `PushConsumer`."""
        super().__init__(
            group, nameservers=nameservers, message_model=message_model, consume_from=consume_from, allocation=allocation,
            instance_name=instance_name, buffer_messages=buffer_messages, buffer_bytes=buffer_bytes,
            commit_interval_ms=commit_interval_ms, context=context,
        )
        self._auto_commit = auto_commit
        self._cursor: _Cursor | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    def subscribe(self, topic: str, expression: str = "*") -> None:
        """Read the topic's messages that have one of the tags in `expression` ("a || b"; "*": all). Before the start; once a topic.

        All members of a group must subscribe alike. Raises `InvalidArgumentError`.
        """
        if self._assigned is not None:
            raise InvalidArgumentError("Queues are assigned to this consumer; use another one to subscribe.", topic=topic)
        self._subscribe(topic, expression)

    def assign(self, queues: Iterable[MessageQueue]) -> None:
        """Read these queues and no others, whoever else reads them; a later call takes the place of this one. See `queues`.

        With a group it begins where the group stands and commits for it, unless members of the group hold the queue.
        Raises `InvalidArgumentError` after `subscribe`.
        """
        self._check_usable()
        if self._filters:
            raise InvalidArgumentError("This consumer subscribes to topics; use another one to assign queues.")
        self._assigned = frozenset(queues)
        if self._engine is not None:
            core, assigned = self._engine.core, self._assigned
            self._call(lambda: core.assign(assigned))

    def start(self) -> None:
        """Join the group, and return when that is done or has taken 5 s; from then on no message is missed.

        Starting twice does nothing. Raises as `PushConsumer.start`.
        """
        self._ready()

    def close(self, timeout_ms: int = CLOSE_MS) -> None:
        """Commit what is finished, give the queues back, leave. Closing twice does nothing.

        What the last `poll` returned, or the iteration gave last, is not finished: it comes again unless `commit` was called.
        """
        if self._is_elsewhere():
            return
        with self._lock:
            if self._is_closed:
                return
            if self._engine is not None:
                self._engine.inbox.close()
            self._end(timeout_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._auto_commit and self._cursor is not None:
            self._cursor.finish_given()
        self.close()

    # --- messages -----------------------------------------------------------------------------------------------------

    def poll(self, max_messages: int = POLL_MESSAGES, timeout_ms: int = POLL_MS) -> list[Message]:
        """Up to `max_messages`, as soon as there are any; none after `timeout_ms`. Starts the consumer if need be.

        Raises what the group refuses (see `start`), `ClosedError`.
        """
        if max_messages < 1:
            raise InvalidArgumentError(f"max_messages is {max_messages}; ask for at least 1.")
        engine, cursor = self._ready()
        if self._auto_commit:
            cursor.finish()
        messages = cursor.take_rest(max_messages)
        wait_ms = 0.0 if messages else float(timeout_ms)
        while len(messages) < max_messages:
            left = max_messages - len(messages)
            unit = engine.inbox.take(wait_ms, lambda queue: left)  # noqa: B023 - called within this very turn
            if unit is None:
                break
            cursor.give(unit)
            messages = messages + unit.messages if messages else unit.messages
            wait_ms = 0.0
        if not messages and engine.inbox.is_closed:
            raise engine.inbox.failure or ClosedError("The consumer was closed during poll().")
        return messages

    def __iter__(self) -> Iterator[Message]:
        """Messages one by one, for ever; ends when the consumer is closed. A later iteration goes on after the last message given."""
        engine, cursor = self._ready()
        while True:
            for cursor.index, message in cursor.rest:
                if cursor.is_void():
                    break
                yield message
            else:
                cursor.index += 1
            cursor.leave_unit()
            if self._auto_commit:
                cursor.finish()
            unit = engine.inbox.take(None, lambda queue: ITERATION_MESSAGES)
            if unit is None:
                break
            cursor.enter_unit(unit)
        if engine.inbox.failure is not None:
            raise engine.inbox.failure

    def commit(self, timeout_ms: int = ASK_MS) -> None:
        """Everything given so far is finished; commit it and return when the brokers have it.

        Raises `FencedError` for queues that went to another member meanwhile (others are committed), `RequestTimeoutError`,
        `InvalidArgumentError` without a group.
        """
        engine, cursor = self._ready()
        if not self.group:
            raise InvalidArgumentError("A consumer without a group has nowhere to commit to; give it a group.")
        cursor.finish_given()
        self._wait(lambda give: engine.core.commit(give, timeout_ms), "a commit", timeout_ms)

    # --- places -------------------------------------------------------------------------------------------------------

    def queues(self, topic: str, timeout_ms: int = ASK_MS) -> list[MessageQueue]:
        """All queues of the topic in the cluster, sorted. Raises `TopicNotFoundError`, `UnreachableError`."""
        check_topic(topic)
        if self._engine is None and not self._filters and self._assigned is None:
            self._assigned = frozenset()  # asking comes before assigning
        instance = self._ready()[0].instance
        self._wait(lambda give: instance.await_route(give, timeout_ms, topic), "the route", timeout_ms)
        return list(instance.route.queues(topic)) if instance.route is not None else []

    def seek(self, queue: MessageQueue, where: int | ConsumeFrom | datetime) -> None:
        """Go on from a queue offset, the first or last message, or the first one stored at or after a time; what was given of the
        queue and is not finished is forgotten. The next commit tells the group, also when it goes back.

        Raises `InvalidArgumentError` for a queue that is not `assigned()` to this consumer now.
        """
        core = self._ready()[0].core
        self._call(lambda: core.reading(queue))
        if isinstance(where, int):
            offset = _at_least("where", where, 0)
        else:
            offset = self._offsets_at([queue], _time_asked(where))[queue]
        self._call(lambda: core.seek(queue, offset))

    def seek_to_earliest(self, *queues: MessageQueue) -> None:
        """Go on from the first message of these queues, or of all `assigned()`. Raises as `seek`."""
        self._seek_all(queues, OFFSET_EARLIEST)

    def seek_to_latest(self, *queues: MessageQueue) -> None:
        """Go on behind the last message of these queues, or of all `assigned()`. Raises as `seek`."""
        self._seek_all(queues, OFFSET_LATEST)

    def seek_to_timestamp(self, when: When, *queues: MessageQueue) -> None:
        """Go on from the first message stored at or after a time, of these queues, or of all `assigned()`. Raises as `seek`."""
        self._seek_all(queues, _time_ms(when))

    def position(self, queue: MessageQueue) -> int:
        """The offset of the next message this consumer will give of the queue. Raises as `seek`."""
        engine, cursor = self._ready()
        process_queue = self._call(lambda: engine.core.reading(queue).process_queue)
        return cursor.position(process_queue)

    def committed(self, queue: MessageQueue) -> int | None:
        """Where the group stands on the queue, by its broker; None when it has never subscribed there.

        Raises `InvalidArgumentError` without a group, `TopicNotFoundError`, `UnreachableError`, `RequestTimeoutError`.
        """
        self._ready()
        if not self.group:
            raise InvalidArgumentError("A consumer without a group has committed nothing; give it a group.")
        reply = self._ask(queue.broker_name, QueryCommitted, queue.topic)
        offset = dict(reply.offsets).get(queue.queue_id, OFFSET_LATEST) if isinstance(reply, Offsets) else OFFSET_LATEST
        return offset if offset >= 0 else None

    def lag(self) -> dict[MessageQueue, int]:
        """For each queue that is `assigned()`, how many messages the broker has that are not finished here.

        Messages that the filter leaves out count until they were passed. Raises `UnreachableError`, `RequestTimeoutError`.
        """
        engine, cursor = self._ready()
        if self._auto_commit:
            cursor.settle()
        readings = self._call(lambda: list(engine.core.reader.readings.values()))
        ends = self._offsets_at([reading.queue for reading in readings], OFFSET_LATEST)
        return {reading.queue: max(ends[reading.queue] - self._finished(reading), 0) for reading in readings if reading.queue in ends}

    def pause(self, *queues: MessageQueue) -> None:
        """Give nothing of these queues, or of all `assigned()`, until `resume`; they stay here. Raises as `seek`."""
        self._pause(queues, True)

    def resume(self, *queues: MessageQueue) -> None:
        """Go on where `pause` stopped."""
        self._pause(queues, False)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[_Engine, _Cursor]:
        """Engine and cursor, started if need be. The quick way is the usual one."""
        check_fork(self._forks)
        if self._cursor is None or self._engine is None:
            return self._begin()
        if self._is_closed or self._engine.inbox.failure is not None:
            self._running()
        return self._engine, self._cursor

    def _begin(self) -> tuple[_Engine, _Cursor]:
        with self._lock:
            engine = self._open()
            cursor = self._cursor = _Cursor(engine.inbox)
            if self._auto_commit:
                engine.settle = cursor.settle
        if self._assigned is not None:
            core, assigned = engine.core, self._assigned
            self._call(lambda: core.assign(assigned))
        self._await_start(engine)
        return engine, cursor

    def _finished(self, reading: Reading) -> int:
        assert self._engine is not None
        return self._engine.inbox.commit_offset(reading.process_queue)

    def _seek_all(self, queues: Sequence[MessageQueue], where: int) -> None:
        core = self._ready()[0].core
        chosen = list(queues) or self.assigned()
        self._call(lambda: [core.reading(queue) for queue in chosen])
        for queue, offset in self._offsets_at(chosen, where).items():
            self._call(partial(core.seek, queue, offset))

    def _pause(self, queues: Sequence[MessageQueue], is_paused: bool) -> None:
        core = self._ready()[0].core
        chosen = list(queues) or self.assigned()
        self._call(lambda: core.pause(chosen, is_paused))


class _Engine:
    """What works for a consumer between its start and its end. Made on its thread; knows nothing of the consumer it works for, so
    that one nobody holds any more is collected."""

    def __init__(
        self, loop: Any, config: ConsumingConfig, nameservers: Sequence[str], identity: Identity, in_order: bool
    ) -> None:
        rng = Random()
        self.loop = loop
        self.started = threading.Event()
        self.settle: Callable[[], None] = lambda: None
        self.inbox = Inbox(_ThreadQueue(), threading.Lock(), loop.clock, self._wake, in_order=in_order)
        self.instance = ClientInstance(loop, nameservers, identity, rng)
        self.core = ConsumerCore(
            loop, config, self.inbox, self.instance, rng, settle=lambda: self.settle(), on_started=self.started.set
        )

    def put_back_later(self, unit: Unit, delay_ms: float) -> None:
        """From any thread."""
        with suppress(ClosedError):  # the consumer is closed: the message stays unfinished
            self.loop.call_soon_threadsafe(lambda: self.loop.call_later(delay_ms, partial(self.inbox.put_back, unit)))

    def leave(self, on_done: Callable[[], None]) -> None:
        """The thread's last step."""
        self.core.close(lambda: self.instance.close(on_done), LAST_COMMIT_MS)

    def _wake(self) -> None:
        with suppress(ClosedError):  # there is nothing to look at any more
            self.loop.call_soon_threadsafe(self.core.look)


class _Cursor:
    """How far the caller of a `PullConsumer` is. Its own thread only, but `settle`, which may come from the engine's.

    A unit that is iterated over is given up to `index`; `rest` goes on behind it.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._given: dict[ProcessQueue, int] = {}  # offsets below which everything was given, of units that are left behind
        self._unit: Unit | None = None
        self.index = 0
        self.rest: Iterator[tuple[int, Message]] = iter(())

    def give(self, unit: Unit) -> None:
        """All of the unit was given at once."""
        self._given[unit.process_queue] = unit.next_offset

    def enter_unit(self, unit: Unit) -> None:
        """From here on its messages are given one by one."""
        self.index = 0  # before the unit changes: `settle` may look in between, and must see too little rather than too much
        self.rest = enumerate(unit.messages)
        self._unit = unit

    def is_void(self) -> bool:
        """Whether what is left of the unit is not to be given any more."""
        unit = self._unit
        return unit is not None and (unit.process_queue.is_draining or unit.process_queue.is_dropped)

    def leave_unit(self) -> None:
        """Messages before `index` were given, the others will not be."""
        unit, self._unit = self._unit, None
        if unit is not None:
            is_whole = self.index >= len(unit.messages)
            self._given[unit.process_queue] = unit.next_offset if is_whole else unit.messages[self.index].queue_offset
            self.rest = iter(())

    def take_rest(self, messages_max: int) -> list[Message]:
        """For a poll: what an iteration has left of its unit, at most so many."""
        unit = self._unit
        if unit is None:
            return []
        messages: list[Message] = []
        for self.index, message in self.rest:
            if self.is_void() or len(messages) == messages_max:
                break
            messages.append(message)
        else:
            self.index = len(unit.messages)
            self.leave_unit()
            return messages
        self.rest = iter(list(enumerate(unit.messages))[self.index :])
        if self.is_void():
            self.leave_unit()
        return messages

    def position(self, queue: ProcessQueue) -> int:
        """The offset of the next message of the queue."""
        unit = self._unit
        if unit is None or unit.process_queue is not queue:
            return queue.position
        following = self.index + 1
        return unit.messages[following].queue_offset if following < len(unit.messages) else unit.next_offset

    def finish(self) -> None:
        """What was given of units left behind is done."""
        unit = self._unit
        for queue, offset in self._given.items():
            self._inbox.finish_below(queue, offset, is_all=unit is None or queue is not unit.process_queue)
        self._given.clear()

    def settle(self) -> None:
        """The messages before the one that was given last are done."""
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, unit.messages[self.index].queue_offset, is_all=False)

    def finish_given(self) -> None:
        """Everything given so far is done."""
        self.finish()
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, self.position(unit.process_queue), is_all=False)


class _ThreadQueue:
    """A ready queue between threads."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Ready] = SimpleQueue()
        self.put = self._items.put

    def take(self, timeout_s: float | None) -> tuple[Ready] | None:
        try:
            return (self._items.get(timeout=timeout_s),)
        except Empty:
            return None


class _Answer(Generic[T]):
    """Something one thread gives and another waits for."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._value: T | ZrmqError | None = None

    def give(self, value: T | ZrmqError | None) -> None:
        """The value, or the error to raise."""
        self._value = value
        self._done.set()

    def wait(self, timeout_ms: float, what: str, *, is_needed: bool = True) -> Any:
        """The value. Raises the error that was given, `RequestTimeoutError` when nothing was given in time and it `is_needed`."""
        if not self._done.wait(timeout_ms / 1000.0) and is_needed:
            raise RequestTimeoutError(f"No answer to {what} came within {timeout_ms:.0f} ms; try again.", timeout_ms=timeout_ms)
        if isinstance(self._value, ZrmqError):
            raise self._value
        return self._value


@contextmanager
def _until_signal(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call `on_signal` at the first SIGINT or SIGTERM; from then on, and afterwards, they mean what they meant before.

    Only the main thread can do that; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        on_signal()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _is_draining(engine: _Engine, queue: MessageQueue) -> bool:
    return engine.core.reader.readings[queue].process_queue.is_draining


def _at_least(name: str, value: int, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f"a whole number from {least}" + (f" to {most}" if most is not None else " on")
        raise InvalidArgumentError(f"{name} is {value!r}; give {bounds}.")
    return value


def _instance_name(given: str | None) -> str:
    name = socket.gethostname() if given is None else given
    check_text(name, "instance name", Code.BAD_REQUEST)
    if len(name) > CLIENT_ID_CHARS_MAX:
        raise InvalidArgumentError(f"The instance name has {len(name)} characters; use at most {CLIENT_ID_CHARS_MAX}.")
    return name


def _start_point(given: ConsumeFrom | When) -> tuple[ConsumeFrom, int]:
    if given is ConsumeFrom.TIMESTAMP:
        raise InvalidArgumentError("consume_from=TIMESTAMP names no time; give the time itself, a datetime or milliseconds.")
    if isinstance(given, ConsumeFrom):
        return given, 0
    return ConsumeFrom.TIMESTAMP, _time_ms(given)


def _time_ms(given: When) -> int:
    if isinstance(given, datetime):
        return round(given.timestamp() * 1000)
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    raise InvalidArgumentError(f"{given!r} is no time; give a datetime, or milliseconds since 1970-01-01 UTC.")


def _time_asked(where: ConsumeFrom | datetime) -> int:
    named = {ConsumeFrom.EARLIEST: OFFSET_EARLIEST, ConsumeFrom.LATEST: OFFSET_LATEST}
    return named[where] if isinstance(where, ConsumeFrom) and where in named else _time_ms(where)  # type: ignore[arg-type]
