"""What both doors for consumers share: what the user said, and the engine between the start and the end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from zrmq.client.allocation import Strategy
from zrmq.client.consumer_engine import LAST_COMMIT_MS, Answer, Engine
from zrmq.client.consuming import ConsumingConfig
from zrmq.client.link import Identity, OnReply
from zrmq.client.reading import Bounds
from zrmq.client.runtime import ClientThread
from zrmq.config import find_nameservers
from zrmq.errors import ClosedError, Code, InvalidArgumentError, RequestTimeoutError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageModel, MessageQueue
from zrmq.protocol.limits import (
    CLIENT_ID_CHARS_MAX,
    OFFSET_MAX,
    SUBSCRIPTIONS_MAX,
    check_group,
    check_number,
    check_text,
    check_topic,
)
from zrmq.protocol.requests import AnyReply, Offsets, QueryOffsets, Request
from zrmq.protocol.tags import canonical_expression
from zrmq.transport.options import check_fork, fork_count
from zrmq.transport.threads import start_thread

if TYPE_CHECKING:
    from zrmq.transport.options import Context

BUFFER_BYTES = 32 * 1024 * 1024  # a tenth of a second at full speed, and little on a small box
BUFFER_MESSAGES = 100_000
COMMIT_INTERVAL_MS = 1_000  # what a crash may repeat; RocketMQ: 5,000
COMMIT_INTERVAL_MS_MIN = 10
START_MS = 5_000  # how long a start waits for brokers before it goes on trying in the background
CLOSE_MS = 10_000
ASK_MS = 5_000
LIKE_SECONDS = 10**8, 10**11  # times of 1973 and later if they are seconds, of before if they are milliseconds
ANSWER_MARGIN_MS = 1_000  # a request's own deadline comes first

T = TypeVar("T")
When = datetime | int  # an int: milliseconds since 1970-01-01 UTC

log = get_logger("consumer")


class Consumer:
    """Base of the doors. Made by them only."""

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
        auto_commit: bool,
        in_order: bool,
        context: Context | None,
    ) -> None:
        if group is not None:
            check_group(group)
        if not callable(allocation):
            raise InvalidArgumentError(f"allocation={allocation!r} is no strategy; give one such as AllocateAveragely().")
        self.group = group
        self.instance_name = _check_instance_name(instance_name)
        self.client_id = f"{socket.gethostname()[:64]}@{os.getpid()}@{Random().getrandbits(64):016x}"
        self._nameservers = find_nameservers(nameservers)
        self._message_model = _check_model(message_model)
        self._consume_from, self._consume_timestamp_ms = _start_point(consume_from)
        self._allocation = allocation
        self._bounds = Bounds(check_number("buffer_bytes", buffer_bytes, 1), check_number("buffer_messages", buffer_messages, 1))
        self._commit_interval_ms = check_number("commit_interval_ms", commit_interval_ms, COMMIT_INTERVAL_MS_MIN)
        self._auto_commit = auto_commit
        self._in_order = in_order
        self._context = context
        self._forks = fork_count()
        self._filters: dict[str, str] = {}
        self._assigned: frozenset[MessageQueue] | None = None
        self._thread: ClientThread | None = None
        self._engine: Engine | None = None
        self._is_closed = False
        self._lock = threading.RLock()  # a signal handler may close while its thread does

    @property
    def failure(self) -> BaseException | None:
        """What ended the consumer, if it was not `close`: the group's refusal, or what a listener ended the program with."""
        return self._engine.inbox.failure if self._engine is not None else None

    @property
    def skipped_count(self) -> int:
        """Batches that were passed over because they are damaged: on a broker's disk, on the way, or written so."""
        engine = self._engine
        return engine.core.reader.corrupt_count + engine.inbox.damaged_count if engine is not None else 0

    def assigned(self) -> list[MessageQueue]:
        """The queues this consumer reads now, sorted; they change with the members of the group."""
        return self._call(self._running().core.queues)

    # --- life ---------------------------------------------------------------------------------------------------------

    def _add_filter(self, topic: str, expression: str) -> None:
        check_topic(topic)
        self._check_usable()
        if self._engine is not None:
            raise InvalidArgumentError(f"Topic {topic!r} comes too late; subscribe before the consumer is started.", topic=topic)
        if topic in self._filters:
            raise InvalidArgumentError(
                f"Topic {topic!r} is subscribed already; subscribe once, with all tags joined by '||'.", topic=topic
            )
        if len(self._filters) >= SUBSCRIPTIONS_MAX:
            raise InvalidArgumentError(f"A consumer subscribes to at most {SUBSCRIPTIONS_MAX} topics; use several consumers.")
        self._filters[topic] = canonical_expression(expression)

    def _open(self) -> Engine:
        """Start the engine."""
        self._check_usable()
        if not self._filters and self._assigned is None:
            raise InvalidArgumentError("Nothing is subscribed; call subscribe() with a topic before the consumer is started.")
        config, in_order, nameservers = self._config(), self._in_order, self._nameservers
        instance_name = self.instance_name if self._message_model is MessageModel.BROADCASTING else ""
        identity = Identity(self.client_id, "consumer", self.group or "", instance_name)
        thread = ClientThread(f"zrmq-consumer-{self.group or 'reader'}", context=self._context)
        try:
            self._start_workers()
            loop, at_close = thread.loop, thread.at_close
            engine = thread.call(lambda: Engine(loop, config, nameservers, identity, in_order=in_order, at_close=at_close))
        except BaseException:
            thread.close()
            raise
        self._thread, self._engine = thread, engine
        if self._is_closed:  # by a signal handler, when there was nothing to close yet
            engine.inbox.close()
            thread.close()
            self._check_usable()
        return engine

    def _config(self) -> ConsumingConfig:
        return ConsumingConfig(
            client_id=self.client_id, group=self.group or "", filters=dict(self._filters), is_assigned=self._assigned is not None,
            message_model=self._message_model, consume_from=self._consume_from, consume_timestamp_ms=self._consume_timestamp_ms,
            allocation=self._allocation, bounds=self._bounds, commit_interval_ms=self._commit_interval_ms,
            auto_commit=self._auto_commit,
        )

    def _await_start(self, engine: Engine) -> None:
        """Return when the group is joined, so that nothing stored from then on is missed; or when that takes too long."""
        engine.started.wait(START_MS / 1000.0)
        self._warn_of_delay(engine)
        failure = engine.inbox.failure
        if failure is not None:
            self._close(CLOSE_MS)
            raise failure

    def _warn_of_delay(self, engine: Engine) -> None:
        if not engine.started.is_set:
            log.warning("consumer_start_delayed", group=self.group, waited_ms=START_MS)

    def _check_usable(self) -> None:
        check_fork(self._forks)
        if self._is_closed:
            raise ClosedError("The consumer is closed; make a new one.")

    def _running(self) -> Engine:
        """The engine. Raises for a consumer that is not started, closed, refused, or on the other side of a fork."""
        self._check_usable()
        if self._engine is None:
            raise InvalidArgumentError("The consumer is not started; call start() first.")
        if self._engine.inbox.failure is not None:
            raise self._engine.inbox.failure
        return self._engine

    def _close_elsewhere(self, timeout_ms: float) -> None:
        """Close, without waiting for that: this thread has something that the closing needs."""
        start_thread(threading.Thread(target=self._close, args=(timeout_ms,), name="zrmq-consumer-close"))

    def _close(self, timeout_ms: float) -> None:
        """Wait for those at work, commit what is finished, leave, end the thread. Only once, and never in a forked child, whose
        threads and sockets stayed with the parent."""
        with self._lock:
            if self._is_closed or self._forks != fork_count():
                return
            self._is_closed = True
            engine, thread = self._engine, self._thread
            if engine is None or thread is None:
                return
            deadline_ms = engine.loop.clock.monotonic_ms() + timeout_ms
            engine.inbox.close()
            engine.started.set()  # whoever waits for the start need not any more
            try:
                with suppress(ClosedError):  # the interpreter's exit has ended the thread, with its last step
                    thread.call(engine.core.stop)
                    self._await_workers(engine, deadline_ms)
                    left_ms = max(deadline_ms - engine.loop.clock.monotonic_ms(), LAST_COMMIT_MS)
                    self._commit_last(engine, thread, int(left_ms))
            finally:  # after Ctrl-C too: while the thread lives, so do the leases
                thread.close()

    def _start_workers(self) -> None:
        """For doors that have some. The group is joined only when they are there."""

    def _await_workers(self, engine: Engine, deadline_ms: float) -> None:
        """For doors that have some."""

    def _commit_last(self, engine: Engine, thread: ClientThread, timeout_ms: int) -> None:
        answer = Answer()
        thread.post(lambda: engine.core.close(answer.give, timeout_ms))
        with suppress(RequestTimeoutError):  # the core has logged what it could not commit
            answer.wait(timeout_ms + ANSWER_MARGIN_MS, "the last commit")

    # --- asking -------------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T]) -> T:
        """What the function returns on the engine's thread."""
        assert self._thread is not None
        self._check_uninterrupted()
        return self._thread.call(function)

    def _wait(self, begin: Callable[[Callable[[Any], None]], None], what: str, timeout_ms: int = ASK_MS) -> Any:
        """What `begin`, run on the engine's thread, gives sooner or later. A `ZrmqError` is raised."""
        assert self._thread is not None
        self._check_uninterrupted()
        answer = Answer()
        self._thread.post(lambda: begin(answer.give))
        return answer.wait(timeout_ms + ANSWER_MARGIN_MS, what)

    def _check_uninterrupted(self) -> None:
        if self._engine is not None and self._engine.is_interrupted():
            raise InvalidArgumentError(
                "A signal handler interrupted this consumer and may only close it; set a flag there, and ask outside the handler."
            )

    def _ask(self, broker_name: str, kind: type[Request], *fields: object) -> AnyReply:
        """A broker's reply."""
        core = self._running().core

        def begin(give: Callable[[Any], None]) -> None:
            on_reply: OnReply = lambda reply, frames: give(reply)  # noqa: E731
            core.ask(broker_name, kind, *fields, timeout_ms=ASK_MS, on_reply=on_reply)

        reply: AnyReply = self._wait(begin, f"{kind.__name__} at {broker_name}")
        return reply

    def _offsets_at(self, queues: Iterable[MessageQueue], where: int) -> dict[MessageQueue, int]:
        """The offsets that belong to a time, or OFFSET_EARLIEST, OFFSET_LATEST; one question a topic and broker."""
        groups: dict[tuple[str, str], list[int]] = {}
        for queue in queues:
            groups.setdefault((queue.broker_name, queue.topic), []).append(queue.queue_id)
        found: dict[MessageQueue, int] = {}
        for (broker_name, topic), queue_ids in groups.items():
            reply = self._ask(broker_name, QueryOffsets, topic, queue_ids, where)
            if isinstance(reply, Offsets):
                found.update((MessageQueue(topic, broker_name, queue_id), offset) for queue_id, offset in reply.offsets)
        return found


def time_ms(given: When) -> int:
    """Milliseconds since 1970 UTC, or `InvalidArgumentError`, also for what can only be seconds. A datetime without a zone is
    local time."""
    try:
        at_ms = round(given.timestamp() * 1000) if isinstance(given, datetime) else given
    except (OSError, OverflowError, ValueError):  # local time has its own bounds, by the platform
        at_ms = -1
    if isinstance(given, int) and LIKE_SECONDS[0] <= given < LIKE_SECONDS[1]:
        raise InvalidArgumentError(f"{given} would be a time in the seventies; give milliseconds, or a datetime.")
    if isinstance(at_ms, int) and not isinstance(at_ms, bool) and 0 <= at_ms <= OFFSET_MAX:
        return at_ms
    raise InvalidArgumentError(f"{given!r} is no time; give a datetime or milliseconds, not before 1970-01-01 UTC.")


def _check_model(given: MessageModel | str) -> MessageModel:
    try:
        return MessageModel(given)
    except ValueError as error:
        names = ", ".join(model.value for model in MessageModel)
        raise InvalidArgumentError(f"message_model is {given!r}; use one of {names}.") from error


def _start_point(given: ConsumeFrom | When | str) -> tuple[ConsumeFrom, int]:
    if isinstance(given, str) and given in (ConsumeFrom.LATEST, ConsumeFrom.EARLIEST):
        return ConsumeFrom(given), 0
    if isinstance(given, str) and given != ConsumeFrom.TIMESTAMP:
        raise InvalidArgumentError(f"consume_from is {given!r}; use 'earliest', 'latest', or a time: a datetime or milliseconds.")
    if given == ConsumeFrom.TIMESTAMP:
        raise InvalidArgumentError("consume_from=TIMESTAMP names no time; give the time itself, a datetime or milliseconds.")
    return ConsumeFrom.TIMESTAMP, time_ms(given)  # type: ignore[arg-type]  # what is no time is refused there


def _check_instance_name(given: str | None) -> str:
    name = socket.gethostname() if given is None else given
    check_text(name, "instance name", Code.BAD_REQUEST)
    if len(name) > CLIENT_ID_CHARS_MAX:
        raise InvalidArgumentError(f"The instance name has {len(name)} characters; use at most {CLIENT_ID_CHARS_MAX}.")
    return name
