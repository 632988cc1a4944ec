"""The consumer that calls a listener for each message, in threads of its own."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self, overload

from zrmq.client.allocation import AllocateAveragely, Strategy
from zrmq.client.listening import Failure, Listener, Pace, run_unit
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.consumer.base import (
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    CLOSE_MS,
    COMMIT_INTERVAL_MS,
    Consumer,
    When,
    check_count,
)
from zrmq.consumer.engine import Engine
from zrmq.errors import InvalidArgumentError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageModel
from zrmq.protocol.limits import check_group

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from zrmq.transport.options import Context

CONCURRENCY_MAX = 1_024

log = get_logger("consumer")


class PushConsumer(Consumer):
    """Calls a listener for each message. Any thread may use it.

    A listener that returns finishes the message. One that raises gets it again after 1 s, 2 s, 4 s, ... 60 s, for as long as it
    raises, with `delivery_attempt` counted up; meanwhile others go on and the commit waits, or, `in_order`, its queue waits.

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
        gets which queues. `buffer_messages`, `buffer_bytes`: how much is read ahead. `commit_interval_ms`: 10 or more.

        Raises `InvalidArgumentError`, `ConfigError`.
        """
        check_group(group)
        super().__init__(
            group, nameservers=nameservers, message_model=message_model, consume_from=consume_from, allocation=allocation,
            instance_name=instance_name, buffer_messages=buffer_messages, buffer_bytes=buffer_bytes,
            commit_interval_ms=commit_interval_ms, auto_commit=True, in_order=in_order, context=context,
        )
        self._concurrency = check_count("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self._listeners: dict[str, tuple[Listener, Pace]] = {}
        self._workers: list[threading.Thread] = []
        self._ended = threading.Event()

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
        if listener is None:
            return partial(self._decorate, topic, expression)
        self._decorate(topic, expression, listener)
        return None

    def start(self) -> None:
        """Begin to read, in the background. Returns when the group is joined, from when on no message is missed; or after 5 s,
        and goes on trying.

        Raises what the group refuses: `SubscriptionMismatchError`, `RequestRefusedError` (INSTANCE_NAME_TAKEN).
        """
        with self._lock:
            if self._engine is not None and not self._is_closed:
                raise InvalidArgumentError("The consumer is started already; make another one to start twice.")
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

        Signals end it when it is called in the main thread; from the first one on they mean again what they meant before. Raises
        as `start`, also when the group refuses this consumer later; and what a listener ended the program with.
        """
        with _until_signal(self._ended.set):
            if self._engine is None:
                self.start()
            self._ended.wait()
        self.close()
        if self.failure is not None:
            raise self.failure

    def close(self, timeout_ms: int = CLOSE_MS) -> None:
        """Let listeners finish the messages they have, commit, give the queues back, leave. Closing twice does nothing.

        A listener that takes longer than `timeout_ms` is left alone, and its message comes again. Called by a listener it returns
        at once, and the consumer closes when that listener has returned.
        """
        self._ended.set()
        if threading.current_thread() in self._workers:
            threading.Thread(target=self._close, args=(timeout_ms,), name="zrmq-consumer-close").start()
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

    def _decorate(self, topic: str, expression: str, listener: Listener) -> Listener:
        if not callable(listener):
            raise InvalidArgumentError(f"The listener {listener!r} cannot be called; give a function that takes a message.")
        if inspect.iscoroutinefunction(listener):
            raise InvalidArgumentError(f"The listener {listener!r} is a coroutine function; give a plain one.")
        self._add_filter(topic, expression)
        self._listeners[topic] = (listener, Pace())
        return listener

    def _work(self, engine: Engine) -> None:
        """One worker's life: unit after unit, until the inbox is closed."""
        try:
            while (unit := engine.inbox.take(None, self._unit_size)) is not None:
                self._run_unit(engine, unit)
        except BaseException as error:  # noqa: BLE001 - whoever runs the consumer gets it: a listener called sys.exit
            log.error("listener_ended_consumer", group=self.group, error=repr(error))
            engine.inbox.close(error)
        finally:
            self._ended.set()

    def _unit_size(self, queue: ProcessQueue) -> int:
        return self._listeners[queue.queue.topic][1].messages

    def _run_unit(self, engine: Engine, unit: Unit) -> None:
        listener, pace = self._listeners[unit.process_queue.queue.topic]
        outcome = run_unit(unit, listener, pace, engine.loop.clock, in_order=self._in_order)
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
            retry_in_ms=round(failure.retry_ms), error=repr(failure.error),
        )

    def _await_workers(self, engine: Engine, deadline_ms: float) -> None:
        for worker in self._workers:
            worker.join(max(deadline_ms - engine.loop.clock.monotonic_ms(), 0.0) / 1000.0)
        left = sum(worker.is_alive() for worker in self._workers)
        if left:
            log.warning("listeners_left", group=self.group, listeners=left)


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
