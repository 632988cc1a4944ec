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

Both deliver at least once. A `PullConsumer` gives each queue in its order; a `PushConsumer` does with `in_order=True` only.

What is finished is committed within `commit_interval_ms`, when a queue goes to another member, and at the end; what is not
finished comes again, here or at another member of the group.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Self, overload

from zrmq.client.allocation import AllocateAveragely, Strategy
from zrmq.client.consumer_base import (
    ASK_MS,
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    CLOSE_MS,
    COMMIT_INTERVAL_MS,
    START_MS,
    Consumer,
    When,
    time_ms,
)
from zrmq.client.consumer_engine import Engine
from zrmq.client.cursor import Cursor
from zrmq.client.listening import Failure, Listener, Pace, run_unit
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.errors import ClosedError, FencedError, InvalidArgumentError, UnreachableError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, Message, MessageModel, MessageQueue
from zrmq.protocol.limits import (
    OFFSET_MAX,
    check_flag,
    check_group,
    check_number,
    check_queues,
    check_timeout,
    check_topic,
)
from zrmq.protocol.requests import OFFSET_EARLIEST, OFFSET_LATEST, Offsets, QueryCommitted
from zrmq.protocol.tags import canonical_expression
from zrmq.transport.options import check_fork, fork_count
from zrmq.transport.signals import until_signal
from zrmq.transport.threads import Latch, start_thread

if TYPE_CHECKING:
    from types import TracebackType

    from zrmq.transport.options import Context

__all__ = ["Listener", "PullConsumer", "PushConsumer"]

CONCURRENCY_MAX = 1_024
POLL_MESSAGES = 1_000
POLL_MS = 1_000
ITERATION_MESSAGES = 500  # taken at once by an iteration

UNRUN_FUNCTIONS = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)  # calling does nothing

log = get_logger("consumer")


# --- a listener is called ------------------------------------------------------------------------------------------------


class PushConsumer(Consumer):
    """Calls a listener for each message. Any thread may use it.

    A listener that returns finishes the message. One that raises gets it again after 1 s, 2 s, 4 s, ... 60 s, for as long as it
    raises, with `delivery_attempt` counted up; meanwhile others go on and the commit waits, or, `in_order`, its queue waits.

    A queue's order holds only with `in_order=True`. Without it calls run side by side, and of messages handed out together those
    left when one took long get in line again, behind later ones: `concurrency=1` alone keeps no order.

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
        where a group (BROADCASTING: an instance) begins that is new; a time may be given (a datetime, or milliseconds since 1970
        UTC).
        `concurrency`: listener calls side by side, 1 to 1,024. `in_order`: one call at a time for each queue. `allocation`: who
        gets which queues. `buffer_messages`, `buffer_bytes`: how much is read ahead. `commit_interval_ms`: 10 or more.

        Raises `InvalidArgumentError`, `ConfigError`.
        """
        check_group(group)
        super().__init__(
            group, nameservers=nameservers, message_model=message_model, consume_from=consume_from, allocation=allocation,
            instance_name=instance_name, buffer_messages=buffer_messages, buffer_bytes=buffer_bytes,
            commit_interval_ms=commit_interval_ms, auto_commit=True, in_order=check_flag("in_order", in_order),
            context=context,
        )
        self._concurrency = check_number("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self._listeners: dict[str, tuple[Listener, Pace]] = {}
        self._workers: list[threading.Thread] = []
        self._opened = Latch()  # or not, and then there is no engine; the workers wait for it
        self._ended = Latch()

    @overload
    def subscribe(self, topic: str, expression: str = "*") -> Callable[[Listener], Listener]: ...

    @overload
    def subscribe(self, topic: str, expression: str, listener: Listener) -> None: ...

    def subscribe(
        self, topic: str, expression: str = "*", listener: Listener | None = None
    ) -> Callable[[Listener], Listener] | None:
        """Call `listener(message)` for each message of the topic that has one of the tags in `expression` ("a || b"; "*": all).

        Without a listener it decorates one. Before the start, and once for a topic. All members of a group must subscribe alike.
        Raises `InvalidArgumentError`.
        """
        check_topic(topic)
        if callable(expression):
            raise InvalidArgumentError(f"The filter of {topic!r} is a function; a listener comes third: subscribe(t, '*', f).")
        canonical_expression(expression)
        if listener is None:
            return partial(self._decorate, topic, expression)
        self._decorate(topic, expression, listener)
        return None

    def start(self) -> None:
        """Begin to read, in the background. Returns when the group is joined, from when on no message is missed; or after 5 s,
        and goes on trying.

        Raises `ResourceLimitError`, and what the group refuses: `SubscriptionMismatchError`, `RequestRefusedError`. A name that
        is taken (INSTANCE_NAME_TAKEN) may be this one's own of before a crash, so that is refused only when it is taken for ten
        seconds longer than the session timeout: by then `start` has returned, and `run`, or a PullConsumer's `poll`, raises it.
        """
        self._await_start(self._begin())

    def run(self) -> None:
        """Start, unless it is started, and read until SIGINT, SIGTERM or `close`, also while it is starting; then close.

        Signals end it when it is called in the main thread; from the first one on they mean again what they meant before. Raises
        as `start`, also when the group refuses this consumer later; and what a listener ended the program with.
        """
        check_fork(self._forks)
        if self._engine is None:
            self._check_usable()
        with until_signal(lambda number: self._ended.set()):
            if self._engine is None:
                self._run_from_start()
            else:
                self._ended.wait()
        self.close()
        if self.failure is not None:
            raise self.failure

    def close(self, timeout_ms: int = CLOSE_MS) -> None:
        """Let listeners finish the messages they have, commit, give the queues back, leave. Closing twice does nothing.

        A listener that takes longer than `timeout_ms` is left alone, and its message comes again. Called by a listener it returns
        at once, and the consumer closes when that listener has returned.
        """
        check_timeout(timeout_ms)
        self._ended.set()
        self._opened.set()  # in a signal handler that interrupts the start, workers may wait for it still
        if threading.current_thread() in self._workers:
            self._close_elsewhere(timeout_ms)
        else:
            self._close(timeout_ms)

    def stop(self, timeout_ms: int = CLOSE_MS) -> None:
        """The same as `close`."""
        self.close(timeout_ms)

    def pause(self) -> None:
        """Call listeners no more until `resume`; the queues stay here."""
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

    def _begin(self) -> Engine:
        """Start the engine and its workers."""
        with self._lock:
            if self._engine is not None and not self._is_closed:
                raise InvalidArgumentError("The consumer is started already; make another one to start twice.")
            self._opened = Latch()
            try:
                return self._open()
            finally:
                self._opened.set()

    def _start_workers(self) -> None:
        self._workers = [
            threading.Thread(target=self._work, args=(self._opened,), name=f"zrmq-listener-{number}", daemon=True)
            for number in range(self._concurrency)
        ]
        for worker in self._workers:
            start_thread(worker)

    def _run_from_start(self) -> None:
        """Start and wait for the end; or for that alone, if it comes first: a signal must not have to wait for the start."""
        try:
            engine = self._begin()
        except ClosedError:
            if self._is_closed:  # by a signal handler, in the middle of this: that is the end
                return
            raise
        if not self._ended.wait(START_MS / 1000.0):
            self._warn_of_delay(engine)
            self._ended.wait()

    def _decorate(self, topic: str, expression: str, listener: Listener) -> Listener:
        if not callable(listener):
            raise InvalidArgumentError(f"The listener {listener!r} cannot be called; give a function that takes a message.")
        if any(is_kind(listener) or is_kind(type(listener).__call__) for is_kind in UNRUN_FUNCTIONS):
            raise InvalidArgumentError(
                f"The listener {listener!r} is a coroutine function or a generator; give a plain one, which has handled a message"
                " when it returns."
            )
        self._add_filter(topic, expression)
        self._listeners[topic] = (listener, Pace())
        return listener

    def _work(self, opened: Latch) -> None:
        """One worker's life: unit after unit, until the inbox is closed."""
        opened.wait()
        engine = self._engine
        if engine is None:
            return
        try:
            while (unit := engine.inbox.take(None, self._unit_size)) is not None:
                self._run_unit(engine, unit)
        except BaseException as error:  # noqa: BLE001 - whoever runs the consumer gets it: a listener called sys.exit
            log.error("listener_ended_consumer", group=self.group, error=repr(error))
            engine.inbox.close(error)
            engine.retire()
        finally:
            self._ended.set()

    def _unit_size(self, queue: ProcessQueue) -> int:
        return self._listeners[queue.queue.topic][1].messages

    def _run_unit(self, engine: Engine, unit: Unit) -> None:
        listener, pace = self._listeners[unit.process_queue.queue.topic]
        try:
            outcome = run_unit(unit, listener, pace, engine.loop.clock, in_order=self._in_order)
        except BaseException as error:  # the listener ends the consumer: others are to have all of it
            engine.inbox.close(error)  # first, or another thread here would go on behind what was not handled
            engine.inbox.done(unit, stop_offset=unit.offset)
            raise
        engine.inbox.done(unit, [failure.unit for failure in outcome.failures], outcome.stop_offset)
        for failure in outcome.failures:
            if failure.error is None:
                engine.inbox.put_back(failure.unit)
            else:
                self._tell(failure)
                engine.put_back_later(failure.unit, failure.retry_ms)

    def _tell(self, failure: Failure) -> None:
        message = failure.unit.messages[0]
        queue = message.queue
        log.warning(
            "message_failed", group=self.group, topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id,
            queue_offset=message.queue_offset, message_id=message.message_id, delivery_attempt=message.delivery_attempt - 1,
            retry_in_ms=round(failure.retry_ms), error=repr(failure.error), raised_at=_raised_at(failure.error),
        )

    def _await_workers(self, engine: Engine, deadline_ms: float) -> None:
        for worker in self._workers:
            if worker.is_alive():  # not yet, perhaps: a signal handler may close while they are started, and they end at once
                worker.join(max(deadline_ms - engine.loop.clock.monotonic_ms(), 0.0) / 1000.0)
        left = sum(worker.is_alive() for worker in self._workers)
        if left:
            log.warning("listeners_left", group=self.group, listeners=left)


# --- messages are asked for ----------------------------------------------------------------------------------------------


class PullConsumer(Consumer):
    """Gives messages when asked. One thread at a time; `close` may come from any.

    Either `subscribe` to topics, and share their queues with the group's other members; or `assign` queues, which are read
    whoever else reads them. Without a group nothing is shared and nothing committed.

    With `auto_commit` finished is: for `poll`, what earlier polls returned; for an iteration, the messages before the one it gave
    last; for both, everything given when a `with` block ends without an exception. Without, what was given before `commit`; but
    who has no group cannot commit, and finishes as with it.
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
            commit_interval_ms=commit_interval_ms, auto_commit=check_flag("auto_commit", auto_commit) or group is None,
            in_order=False, context=context,
        )
        self._cursor: Cursor | None = None
        self._uncommitted: list[ProcessQueue] = []  # of which a commit finished something and has failed

    # --- life ---------------------------------------------------------------------------------------------------------

    def subscribe(self, topic: str, expression: str = "*") -> None:
        """Read the topic's messages that have one of the tags in `expression` ("a || b"; "*": all).

        Before the start, and once for a topic. All members of a group must subscribe alike. Raises `InvalidArgumentError`.
        """
        if self._assigned is not None:
            raise InvalidArgumentError("Queues are assigned to this consumer; use another one to subscribe.", topic=topic)
        self._add_filter(topic, expression)

    def assign(self, queues: Iterable[MessageQueue]) -> None:
        """Read these queues and no others, whoever else reads them; a later call takes the place of this one. See `queues`.

        Of a consumer that is started it returns when they are `assigned()`, or after 5 s, and goes on trying.
        With a group it begins where the group stands and commits for it, unless members of the group hold the queue. Without one
        a queue that was assigned before is read on where it was left.
        Raises `InvalidArgumentError` after `subscribe`.
        """
        self._check_usable()
        if self._filters:
            raise InvalidArgumentError("This consumer subscribes to topics; use another one to assign queues.")
        assigned = self._assigned = frozenset(check_queues(queues))
        if self._engine is not None:
            engine = self._engine
            engine.started = Latch()
            self._call(lambda: engine.core.assign(assigned))
            self._await_start(engine)

    def start(self) -> None:
        """Join the group. Returns when that is done, from when on no message is missed; or after 5 s, and goes on trying.

        Starting twice does nothing. Raises as `PushConsumer.start`.
        """
        self._ready()

    def close(self, timeout_ms: int = CLOSE_MS) -> None:
        """Commit what is finished, give the queues back, leave. Closing twice does nothing.

        What the last `poll` returned, or an iteration gave last, is not finished: it comes again unless `commit` was called. In a
        signal handler that interrupts a poll or an iteration, which ends, it may return before it is done; another `close` waits.
        """
        check_timeout(timeout_ms)
        engine = self._engine
        if engine is not None and engine.is_interrupted():
            engine.inbox.close()
            self._close_elsewhere(timeout_ms)
        else:
            self._close(timeout_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Not in a forked child, where the inbox's lock may have stayed with a thread of the parent.
        if error is None and self._auto_commit and self._cursor is not None and self._forks == fork_count():
            self._cursor.finish_given()
        self.close()

    # --- messages -----------------------------------------------------------------------------------------------------

    def poll(self, max_messages: int = POLL_MESSAGES, timeout_ms: int = POLL_MS) -> list[Message]:
        """Up to `max_messages` as soon as there are any; none after `timeout_ms`. Starts the consumer if need be, and waits for
        that as `start` does.

        Raises what the group refuses (see `start`), `ClosedError`.
        """
        if not isinstance(max_messages, int) or isinstance(max_messages, bool) or max_messages < 1:
            raise InvalidArgumentError(f"max_messages is {max_messages!r}; ask for 1 or more, a whole number.")
        check_timeout(timeout_ms)
        engine, cursor = self._ready()
        if self._auto_commit:
            cursor.finish_given()
        rest = cursor.take_rest(max_messages)
        if rest:
            return rest
        if self._auto_commit:
            cursor.finish()  # of a unit whose queue goes to another member, which must not have to wait as long as this may
        units: list[Unit] = []
        try:
            messages = self._take(engine, units, max_messages, float(timeout_ms))
            if not messages and engine.inbox.is_closed:
                raise engine.inbox.failure or ClosedError("The consumer was closed during poll().")
            cursor.give(units)
        except BaseException:  # Ctrl-C, perhaps: what is not returned was not given, and comes again
            engine.inbox.recover(units)
            raise
        return messages

    @staticmethod
    def _take(engine: Engine, units: list[Unit], messages_max: int, wait_ms: float) -> list[Message]:
        """The messages of units, to which `units` are added."""
        messages: list[Message] = []
        while (left := messages_max - len(messages)) > 0:
            unit = engine.inbox.take(wait_ms, partial(_size, left))
            if unit is None:
                break
            units += (unit,)  # not `append`: without a call nothing is raised before it is noted
            messages = messages + unit.messages if messages else unit.messages
            wait_ms = 0.0
        return messages

    def __iter__(self) -> Iterator[Message]:
        """Messages one by one, for ever; ends when the consumer is closed. Another iteration goes on behind the last one given.

        Raises as `poll`, but for the `ClosedError`.
        """
        engine, cursor = self._ready()
        while True:
            queue, rest = cursor.queue, cursor.rest
            if queue is not None and not cursor.is_void():
                for cursor.index, message in rest:  # no call until it is given: Ctrl-C cannot keep from the caller what was taken
                    yield message
                    if cursor.rest is not rest or queue.is_draining or queue.is_dropped or queue.is_paused:
                        break
            if cursor.rest is not rest:  # a poll took some, or another iteration went on
                continue
            check_fork(self._forks)
            cursor.leave_unit()
            if self._auto_commit:
                cursor.finish()
            unit = None
            try:
                unit = engine.inbox.take(None, partial(_size, ITERATION_MESSAGES))
                if unit is None:
                    break
                cursor.enter_unit(unit)
            except BaseException:  # as in a poll
                engine.inbox.recover([] if unit is None else [unit])
                raise
        if engine.inbox.failure is not None:
            raise engine.inbox.failure

    def commit(self, timeout_ms: int = ASK_MS) -> None:
        """Everything given so far is finished; commit it, and return when the brokers have it.

        Raises `FencedError` for queues that went to another member meanwhile, were lost with their broker or with what gave us
        the right to read them, or whose topic was deleted and made anew (the others are committed); `UnreachableError`,
        `RequestTimeoutError`, `InvalidArgumentError` without a group.
        """
        check_timeout(timeout_ms)
        engine, cursor = self._ready()
        self._check_group("has nowhere to commit to")
        given = self._uncommitted = list(dict.fromkeys([*self._uncommitted, *cursor.unfinished()]))
        cursor.finish_given()
        try:
            self._wait(lambda give: engine.core.commit(give, timeout_ms, given), "a commit", timeout_ms)
        except FencedError:
            self._uncommitted = [queue for queue in given if not queue.is_lost]  # of the others it is told once
            raise
        self._uncommitted = []

    # --- places -------------------------------------------------------------------------------------------------------

    def queues(self, topic: str, timeout_ms: int = ASK_MS) -> list[MessageQueue]:
        """All queues of the topic in the cluster, sorted. Raises `TopicNotFoundError`, `UnreachableError`."""
        check_topic(topic)
        check_timeout(timeout_ms)
        if self._engine is None and not self._filters and self._assigned is None:
            self._assigned = frozenset()  # whoever asks for queues first will assign some
        instance = self._ready()[0].instance
        self._wait(lambda give: instance.await_route(give, timeout_ms, topic), "the route", timeout_ms)
        return list(instance.route.queues(topic)) if instance.route is not None else []

    def seek(self, queue: MessageQueue, where: int | ConsumeFrom | datetime) -> None:
        """Go on from a queue offset, from the first or behind the last message, or from the first one stored at or after a time.

        What was given of the queue and is not finished is forgotten. The next commit tells the group, also when it goes back.
        Raises `InvalidArgumentError` for a queue that is not `assigned()` to this consumer now.
        """
        if isinstance(where, int):
            check_queues([queue])
            offset = check_number("where", where, 0, OFFSET_MAX)
            core = self._ready()[0].core
            self._call(lambda: core.seek(queue, offset))
        else:
            self._seek_all([queue], _asked(where))

    def seek_to_earliest(self, *queues: MessageQueue) -> None:
        """Go on from the first message of these queues, or of all `assigned()`. Raises as `seek`, and `UnreachableError`
        for all while no broker of its queues is there."""
        self._seek_all(queues, OFFSET_EARLIEST)

    def seek_to_latest(self, *queues: MessageQueue) -> None:
        """Go on behind the last message of these queues, or of all `assigned()`. Raises as `seek_to_earliest`."""
        self._seek_all(queues, OFFSET_LATEST)

    def seek_to_timestamp(self, when: When, *queues: MessageQueue) -> None:
        """Go on from the first message stored at or after a time, of these queues, or of all `assigned()`. Raises as
        `seek_to_earliest`."""
        self._seek_all(queues, time_ms(when))

    def position(self, queue: MessageQueue) -> int:
        """The offset of the next message this consumer will give of the queue. Raises as `seek`."""
        check_queues([queue])
        engine, cursor = self._ready()
        return cursor.position(self._call(lambda: engine.core.reading(queue).process_queue))

    def committed(self, queue: MessageQueue) -> int | None:
        """Where the group stands on the queue, by its broker; None when it has never subscribed there.

        Raises `InvalidArgumentError` without a group, `TopicNotFoundError`, `UnreachableError`, `RequestTimeoutError`.
        """
        check_queues([queue])
        self._ready()
        self._check_group("has committed nothing")
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
        finished = self._call(engine.core.finished_offsets)
        ends = self._offsets_at(finished, OFFSET_LATEST)
        return {queue: max(ends[queue] - offset, 0) for queue, offset in finished.items() if queue in ends}

    def pause(self, *queues: MessageQueue) -> None:
        """Give nothing of these queues, or of all `assigned()`, until `resume`: nothing that an iteration has begun, either.

        They stay here, and are still paused when their broker was away meanwhile, or another member had them; not those that
        `assign` leaves out. Raises as `seek`.
        """
        given = check_queues(queues)
        core = self._ready()[0].core
        self._call(lambda: core.pause(given or core.queues(), True))

    def resume(self, *queues: MessageQueue) -> None:
        """Go on where `pause` stopped, with these queues or with all that are paused. Raises as `seek`."""
        given = check_queues(queues)
        core = self._ready()[0].core
        self._call(lambda: core.pause(given or core.paused(), False))

    # --- parts --------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[Engine, Cursor]:
        """Engine and cursor, started if need be. What is usual comes first: a poll passes here."""
        check_fork(self._forks)
        engine, cursor = self._engine, self._cursor
        if engine is None or cursor is None:
            return self._begin()
        if self._is_closed or engine.inbox.failure is not None:
            self._running()
        return engine, cursor

    def _begin(self) -> tuple[Engine, Cursor]:
        with self._lock:
            engine = self._open()
            cursor = self._cursor = Cursor(engine.inbox)
            if self._auto_commit:
                engine.settle = cursor.settle
        assigned = self._assigned
        if assigned is not None:
            self._call(lambda: engine.core.assign(assigned))
        self._await_start(engine)
        return engine, cursor

    def _check_group(self, what: str) -> None:
        if not self.group:
            raise InvalidArgumentError(f"A consumer without a group {what}; make it with a group.")

    def _seek_all(self, queues: Sequence[MessageQueue], where: int) -> None:
        given = check_queues(queues)
        core = self._ready()[0].core
        chosen = given or self.assigned()
        if not chosen and self._call(lambda: core.is_cut_off):
            raise UnreachableError("No broker of this consumer's queues is there, so none is assigned to it; try again later.")
        self._call(lambda: [core.reading(queue) for queue in chosen])
        for queue, offset in self._offsets_at(chosen, where).items():
            self._call(partial(core.seek, queue, offset))


def _raised_at(error: Exception | None) -> str:
    """File and line, for a log with one line per failure."""
    trace = error.__traceback__ if error is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""


def _size(messages_max: int, queue: object) -> int:
    return messages_max


def _asked(where: ConsumeFrom | datetime) -> int:
    if isinstance(where, datetime):
        return time_ms(where)
    places = {ConsumeFrom.EARLIEST: OFFSET_EARLIEST, ConsumeFrom.LATEST: OFFSET_LATEST}
    if isinstance(where, str) and where in places:
        return places[ConsumeFrom(where)]
    raise InvalidArgumentError(f"{where!r} is no place; give an offset, 'earliest', 'latest', or a datetime.")
