"""The producer's core: which batch goes to which queue and when, and what becomes of those that are refused, lost or late.

    Accumulator --sealed--> topic's ready line --round robin--> line of a queue --window--> Link --> broker
                '--bound to a queue----------------------------^      |
                                ^----------- fail over ---------------'

- Messages that may go anywhere are given a queue as late as possible: when one has room, its broker's session is open and it is
  not to be avoided. So a broker that is down costs them nothing, and it is known that it has not stored them.
- Batching forms by itself: full batches go out as the window allows, a batch that is not full only while fewer than
  `UNFILLED_MAX` of its topic (or its queue) are on their way.
- A batch of unknown outcome stays with its queue, where a resend is recognised, until `failover_after_ms`; then it moves to
  another broker, unless it is bound to its queue. It never goes back to a broker that may have it. A refusal that is the
  broker's trouble (disk full, stopping, ...) moves it at once, or is tried again after a pause, `retries` times in all.
- A refusal is about one sending. Of a batch that may have been stored by an earlier one nobody is told that it was not.
- Every batch ends once: acknowledged, refused for good, or at its deadline.

Loop thread only, but for `route`, `reachable` and `faults`, which any thread may read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from math import ceil, inf
from random import Random

import msgspec

from zrmq.client.accumulator import Accumulator
from zrmq.client.batch import Batch, OneWay, Stored
from zrmq.client.faults import NOTICED_MS, FaultTable
from zrmq.client.instance import ClientInstance, RouteView
from zrmq.client.link import Link
from zrmq.client.send_queue import WINDOW_MAX, SendQueue
from zrmq.client.waiting import no_nameserver
from zrmq.errors import (
    ClosedError,
    Code,
    InvalidFrameError,
    OutOfOrderError,
    RequestRefusedError,
    RequestTimeoutError,
    TopicNotFoundError,
    UnreachableError,
    ZrmqError,
)
from zrmq.logs import get_logger
from zrmq.message import FlushMode, MessageQueue
from zrmq.protocol.requests import Alive, AnyReply, Send, Sent, encode
from zrmq.transport.interface import Connection, Loop, Timer

FAILOVER_AFTER_MS = 2_000.0  # a planned restart is over by then, and the resend is recognised
TICK_MS = 50.0  # how late deadlines and failovers may be, while anything is on its way
UNFILLED_MAX = 2  # with one, a message waits for the flush of the one before and then for its own: p90 2.6 ms instead of 2.0
FULL_PAUSE_MS = 5.0  # a full one-way pipe is tried again after
OPEN_MS_MAX = 250.0  # a batch open for longer is sealed, so that its deadline begins
PAUSE_MS_MIN, PAUSE_MS_MAX = 100.0, 1_000.0  # before a refused batch is tried again, doubled each time
REPORT_MS = 1_000.0  # failures are logged together, at most so often

BROKERS_TROUBLE = frozenset({  # refusals that are not the batch's fault: another broker, or the same one later, may take it
    Code.DISK_FULL, Code.STORE_FAILED, Code.STOPPING, Code.NOT_READY, Code.TOO_MANY_REQUESTS, Code.INTERNAL_ERROR,
    Code.TOPIC_NOT_FOUND, Code.FORBIDDEN,
})
OPEN_OUTCOMES = frozenset({  # errors that say themselves that nobody knows whether the batch was stored
    Code.REQUEST_TIMEOUT, Code.STORE_FAILED, Code.INTERNAL_ERROR, Code.CLOSED,
})

log = get_logger("producer")


class ProducingConfig(msgspec.Struct, frozen=True):
    """What a producer decides about sending."""

    retries: int = 2
    failover_after_ms: float = FAILOVER_AFTER_MS
    window_max: int = WINDOW_MAX


class _Line(SendQueue[Batch]):
    """One queue's line, and when it may go on after a refusal."""

    def __init__(self, queue: MessageQueue, window_max: int) -> None:
        super().__init__(window_max)
        self.queue = queue
        self.resume_ms = 0.0


class _Topic:
    """What is ready and has no queue yet."""

    def __init__(self, name: str, turn: int) -> None:
        self.name = name
        self.ready: deque[Batch] = deque()  # in the order of their sequences
        self.one_way: deque[Batch] = deque()
        self.placed = 0  # batches that got their queue here and have not ended
        self.turn = turn

    def put_back(self, batch: Batch) -> None:
        """It lost its queue: among the ready ones, where it was."""
        at = 0
        while at < len(self.ready) and self.ready[at].first_sequence < batch.first_sequence:
            at += 1
        self.ready.insert(at, batch)
        self.placed -= 1


class ProducerCore:
    """One producer's decisions. The door connects it to callers by the `Accumulator` and what is published:

    `route`: the view that is current, None before the first; `reachable`: names of the brokers whose session is open; `faults`;
    `is_settling`, of the instance.
    """

    def __init__(
        self, loop: Loop, accumulator: Accumulator, config: ProducingConfig, instance: ClientInstance, rng: Random
    ) -> None:
        self._loop = loop
        self._now_ms = loop.clock.monotonic_ms
        self._accumulator = accumulator
        self._config = config
        self._instance = instance
        self._rng = rng
        self.route: RouteView | None = None
        self.reachable: frozenset[str] = frozenset()
        self.faults = FaultTable()
        self.is_settling = instance.is_settling
        self._links: dict[str, Link] = {}
        self._topics: dict[str, _Topic] = {}
        self._lines: dict[MessageQueue, _Line] = {}  # those that are not empty
        self._pushes: dict[str, Connection] = {}
        self._late: dict[str, dict[str, tuple[Batch, float]]] = {}  # by broker name and topic: see `_keep_late`
        self._creating: set[str] = set()
        self._is_due = False
        self._is_closed = False
        self._tick_timer: Timer | None = None
        self._failed: Counter[str] = Counter()
        self._last_failure: ZrmqError | None = None

    # --- for the door -------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something new in the accumulator; it is looked at when this turn ends."""
        self._soon()

    def prepare(
        self, topic: str, timeout_ms: int, on_done: Callable[[ZrmqError | None], None], is_bound: bool = False
    ) -> None:
        """Make the topic usable: known, created where that is allowed, its brokers being connected to; and settled, for a message
        that is bound to one of all its queues. `on_done(None)`, or the error, once."""

        def done(error: ZrmqError | None) -> None:
            if error is None and topic not in self._topics:
                self._topics[topic] = _Topic(topic, self._rng.randrange(1 << 16))
                self._connect()
            is_unknown = isinstance(error, RequestTimeoutError) and self.route is None
            on_done(no_nameserver(self._instance, timeout_ms) if is_unknown else error)

        self._instance.want_topics([topic])
        if self.queues(topic) and not (is_bound and self.is_settling(topic)):
            done(None)
        else:
            self._instance.ensure_topic(topic, done, timeout_ms, is_bound)

    def usable_queues(self, topic: str) -> list[MessageQueue]:
        """Queues a message may go to now: writable, the broker's session open and, if possible, not to be avoided. Any thread."""
        return self._usable(topic, frozenset(), self._now_ms())

    def adopt(self, batch: Batch, queue: MessageQueue, error: ZrmqError) -> None:
        """Go on with a batch that a lane sent to `queue` and that came back with `error`: a broker's trouble, or no answer."""
        self._accumulator.adopt(batch)  # not before, in the caller's thread: Ctrl-C could leave it here and nobody to end it
        batch.may_be_stored |= error.code in OPEN_OUTCOMES
        if self._is_closed:
            self._accumulator.finish(batch, _given_up_error(batch))
            return
        now_ms = self._now_ms()
        self._soon()
        self.faults.record_failure(queue.broker_name, now_ms)
        if not isinstance(error, UnreachableError):
            batch.sent_ms = now_ms
        line = self._line(queue)
        line.add(batch)
        if isinstance(batch.target, str):
            self._topics[batch.target].placed += 1
        if isinstance(error, RequestRefusedError):
            batch.attempts, batch.refusal = 1, error
            line.resume_ms = now_ms + PAUSE_MS_MIN
            if error.code is Code.TOPIC_NOT_FOUND:
                self._create_again(queue.topic)
        if batch.attempts > self._config.retries:
            self._end(line, batch, error)
        elif self._config.retries and self._may_leave(line, batch, now_ms):
            self._leave(line, batch)

    def queues(self, topic: str) -> list[MessageQueue]:
        """All queues of the topic as the route has them now, sorted; the list is not to be changed. Any thread."""
        return [] if self.route is None else self.route.queues(topic)

    def leave(self, on_left: Callable[[], None]) -> None:
        """Close, end all sessions, and say when that is done."""
        self.close()
        self._instance.close(on_left)

    def close(self) -> None:
        """Fail what has no outcome with `ClosedError`, say how much that was, and forget everything. The instance stays."""
        self._is_closed = True
        self._accumulator.refuse(closed_error)
        left = self._accumulator.unfinished()
        if left:
            for line in self._lines.values():
                _leave_open(line.unanswered)
            unknown = sum(batch.message_count for batch in left if batch.may_be_stored)
            messages = sum(batch.message_count for batch in left)
            log.warning("messages_given_up", messages=messages, batches=len(left), of_unknown_outcome=unknown)
        for batch in left:
            batch.forget()
            self._accumulator.finish(batch, _given_up_error(batch))
        self._report_failures()
        self._lines.clear()
        self._topics.clear()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        for push in self._pushes.values():
            push.close()

    # --- what the instance says ---------------------------------------------------------------------------------------

    def on_route(self, route: RouteView) -> None:
        """Of `InstanceListener`."""
        self.route = route
        self._close_pushes({broker.ingest_address for broker in route.brokers.values()})
        self._connect()
        self._soon()

    def on_link_open(self, broker_name: str, link: Link) -> None:
        """Of `InstanceListener`. Nothing is sent in here: what the link sends again must come first."""
        self._links[broker_name] = link
        if link.welcome is not None:
            self._accumulator.tighten(link.welcome.limits.batch_records_max, link.welcome.limits.batch_bytes_max)
        self._publish_reachable()
        self._soon()

    def on_link_lost(self, broker_name: str, link: Link) -> None:
        """Of `InstanceListener`. What is on its way stays with the link, which sends it again: the answer will be to that."""
        self._links.pop(broker_name, None)
        for line in self._lines.values():
            if line.queue.broker_name == broker_name:
                _leave_open(line.unanswered)
        self._publish_reachable()  # before no lane is kept from being used any more
        self._forget_late(broker_name, inf)
        self.faults.record_failure(broker_name, self._now_ms())
        self._end_push(broker_name)
        self._soon()

    def on_notice(self, broker_name: str, link: Link, notice: AnyReply) -> None:
        """Of `InstanceListener`. Heartbeats take the way of what was given up: it has arrived, or never will."""
        if self._late and isinstance(notice, Alive):
            self._forget_late(broker_name, link.confirmed_ms)

    def _connect(self) -> None:
        """Links to every broker of the topics in use."""
        if self.route is not None:
            for name in sorted({queue.broker_name for topic in self._topics for queue in self.route.queues(topic)}):
                self._instance.link(name)

    def _publish_reachable(self) -> None:
        self.reachable = frozenset(name for name, link in self._links.items() if link.is_open)

    def _link(self, broker_name: str) -> Link | None:
        link = self._links.get(broker_name)
        return link if link is not None and link.is_open else None

    # --- a turn -------------------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        """Look at everything once this turn has heard all there is to hear. A timer, because the loop survives what it raises."""
        if not self._is_due and not self._is_closed:
            self._is_due = True
            self._loop.call_later(0, self._pump)

    def _pump(self) -> None:
        """Everything that can go out goes out."""
        self._is_due = False
        if self._is_closed:
            return
        if self._tick_timer is None and self._accumulator.buffered_bytes:
            self._tick_timer = self._loop.call_later(self._tick_ms(), self._tick)
        self._take(self._accumulator.take_sealed())
        self._dispatch()
        self._take(self._accumulator.take_open(self._opening_rule()))
        self._dispatch()

    def _take(self, batches: list[Batch]) -> None:
        for batch in batches:
            target = batch.target
            if isinstance(target, MessageQueue):
                self._line(target).add(batch)
            elif isinstance(target, OneWay):
                self._topics[target.topic].one_way.append(batch)
            else:
                self._topics[target].ready.append(batch)

    def _opening_rule(self) -> Callable[[Batch], bool]:
        """Which open batches go out now although they are not full."""
        now_ms = self._now_ms()
        linger_ms = self._accumulator.config.linger_ms
        if linger_ms and self._accumulator.is_pressed:
            linger_ms = 0.0

        def is_wanted(batch: Batch) -> bool:
            age_ms = now_ms - batch.opened_ms
            return age_ms >= linger_ms and (age_ms >= OPEN_MS_MAX or not self._is_busy(batch))

        return is_wanted

    def _is_busy(self, batch: Batch) -> bool:
        """Whether something is on its way whose answer the batch had better wait for, filling up."""
        target = batch.target
        if isinstance(target, MessageQueue):
            return target in self._lines and len(self._lines[target]) >= UNFILLED_MAX
        topic = self._topics[batch.topic]
        return bool(topic.one_way if isinstance(target, OneWay) else topic.ready or topic.placed >= UNFILLED_MAX)

    def _dispatch(self) -> None:
        now_ms = self._now_ms()
        for topic in self._topics.values():
            if topic.ready:
                self._place(topic, now_ms)
            if topic.one_way:
                self._send_one_way(topic)
            if (topic.ready or topic.one_way) and self.route is not None:
                self._look_why(topic, self.route)
        for line in list(self._lines.values()):
            self._send_line(line, now_ms)

    def _line(self, queue: MessageQueue) -> _Line:
        line = self._lines.get(queue)
        if line is None:
            link = self._links.get(queue.broker_name)
            limits = link.welcome.limits if link is not None and link.welcome is not None else None
            window = self._config.window_max if limits is None else min(self._config.window_max, limits.inflight_batches_max)
            line = self._lines[queue] = _Line(queue, window)
        return line

    # --- choosing a queue ---------------------------------------------------------------------------------------------

    def _place(self, topic: _Topic, now_ms: float) -> None:
        """Give each ready batch a queue that can take it now."""
        left: list[Batch] = []
        while topic.ready:
            batch = topic.ready.popleft()
            queue = self._choose(topic, batch, now_ms)
            if queue is not None:
                topic.placed += 1
                self._line(queue).add(batch)
                self._send_line(self._lines[queue], now_ms)
                continue
            left.append(batch)
            if not batch.avoid:
                break  # no queue for this one, so none for those behind it
        topic.ready.extendleft(reversed(left))

    def _look_why(self, topic: _Topic, route: RouteView) -> None:
        """Something found no queue: by what the brokers have registered there may be none, or none that takes messages."""
        if not route.queues(topic.name):
            self._create_again(topic.name)
        elif not route.writable_queues(topic.name):
            self._fail_waiting(topic, _read_only_error(topic.name))

    def _choose(self, topic: _Topic, batch: Batch, now_ms: float) -> MessageQueue | None:
        """The next queue in turn that has room, at a broker that is not to be avoided if there is one."""
        queues = self._usable(topic.name, batch.avoid, now_ms)
        for step in range(len(queues)):
            queue = queues[(topic.turn + step) % len(queues)]
            line = self._lines.get(queue)
            if line is None or (line.has_room and line.resume_ms <= now_ms):
                topic.turn += step + 1
                return queue
        return None

    def _usable(self, topic: str, avoid: frozenset[str], now_ms: float) -> list[MessageQueue]:
        route = self.route
        if route is None:
            return []
        names = self.reachable - avoid
        queues = [queue for queue in route.writable_queues(topic) if queue.broker_name in names]
        return [queue for queue in queues if not self.faults.is_avoided(queue.broker_name, now_ms)] or queues

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send_line(self, line: _Line, now_ms: float) -> None:
        """Send what the window allows, in order."""
        link = self._link(line.queue.broker_name)
        if link is None or line.resume_ms > now_ms:
            return
        while (step := line.next()) is not None:
            batch, follows = step
            try:
                frame = batch.encoded()
            except ZrmqError as error:
                self._end(line, batch, error)
                continue
            timeout_ms = max(1, ceil(batch.deadline_ms - now_ms))
            number = link.request(
                Send, line.queue.topic, line.queue.queue_id, follows,
                payload=(frame,), timeout_ms=timeout_ms, on_reply=partial(self._answered, line, batch),
            )
            batch.sent_ms = now_ms
            batch.forget = partial(link.cancel, number)

    def _send_one_way(self, topic: _Topic) -> None:
        """Hand over what the pipes take; each batch to the next broker in turn."""
        if self.route is None:
            return
        while topic.one_way:
            batch = topic.one_way[0]
            bound = batch.target.queue if isinstance(batch.target, OneWay) else None
            queues = [bound] if bound is not None else self.route.writable_queues(topic.name)
            for step in range(len(queues)):
                queue = queues[(topic.turn + step) % len(queues)]
                if self._push(queue, batch):
                    topic.turn += step + 1
                    topic.one_way.popleft()
                    self._accumulator.finish(batch, Stored(queue.broker_name, queue.queue_id, -1, 0, FlushMode.ASYNC))
                    break
            else:
                return

    def _end_push(self, broker_name: str) -> None:
        """The next one-way message takes a new connection: of this one nobody would ever say that it is half-open."""
        broker = None if self.route is None else self.route.brokers.get(broker_name)
        push = None if broker is None else self._pushes.pop(broker.ingest_address, None)
        if push is not None:
            push.close()

    def _close_pushes(self, present: set[str]) -> None:
        """Those to addresses that no broker has any more; they would try to connect for ever."""
        for address in self._pushes.keys() - present:
            self._pushes.pop(address).close()

    def _push(self, queue: MessageQueue, batch: Batch) -> bool:
        broker = None if self.route is None else self.route.brokers.get(queue.broker_name)
        if broker is None or not broker.ingest_address:
            return False
        address = broker.ingest_address
        if address not in self._pushes:
            self._pushes[address] = self._loop.connect_push(address)
        header = encode(Send(0, 0, queue.topic, queue.queue_id, 0))
        return self._pushes[address].send((header, batch.encoded()))

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answered(self, line: _Line, batch: Batch, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        self._soon()
        now_ms = self._now_ms()
        if isinstance(reply, Sent):
            queue = line.queue
            self.faults.record(queue.broker_name, now_ms - batch.sent_ms, now_ms)
            stored = Stored(
                queue.broker_name, queue.queue_id, reply.base_offset, reply.store_timestamp_ms, reply.durability, reply.duplicate
            )
            line.acknowledged(batch)
            self._ended(line, batch, stored)
            if self._late:
                self._forget_late(queue.broker_name, batch.sent_ms)
        elif isinstance(reply, OutOfOrderError):
            self._send_again(line, batch, now_ms)
        elif isinstance(reply, ClosedError):  # the broker left the route, and its link with it; `_fail_over` does the rest
            line.refused(batch)
        elif isinstance(reply, ZrmqError):
            self._refused(line, batch, reply, now_ms)
        else:
            name = type(reply).__name__
            self._end(line, batch, InvalidFrameError(f"Broker {line.queue.broker_name} answered a send with {name}; upgrade it."))

    def _refused(self, line: _Line, batch: Batch, error: ZrmqError, now_ms: float) -> None:
        batch.attempts += 1
        batch.refusal = error
        if error.code in OPEN_OUTCOMES:
            batch.may_be_stored = True
        elif error.code is Code.DISK_FULL and not batch.avoid and batch.producer_id == self._accumulator.config.producer_id:
            batch.may_be_stored = False  # of what is stored no disk is too full; what a lane sent may yet arrive
        if error.code not in BROKERS_TROUBLE or batch.attempts > self._config.retries:
            self._end(line, batch, error)
            return
        self.faults.record_failure(line.queue.broker_name, now_ms)
        if error.code is Code.TOPIC_NOT_FOUND:
            self._create_again(line.queue.topic)
        if self._send_again(line, batch, now_ms):
            line.resume_ms = now_ms + min(PAUSE_MS_MIN * 2.0 ** (batch.attempts - 1), PAUSE_MS_MAX)

    def _send_again(self, line: _Line, batch: Batch, now_ms: float) -> bool:
        """Elsewhere if its broker is in trouble and it may, else in its place. True: in its place."""
        if self.faults.is_avoided(line.queue.broker_name, now_ms) and self._may_leave(line, batch, now_ms):
            self._leave(line, batch)
            return False
        line.refused(batch)
        return True

    def _may_leave(self, line: _Line, batch: Batch, now_ms: float) -> bool:
        """Whether it is not bound to its queue and another broker is there that cannot have it and serves better."""
        if not isinstance(batch.target, str):
            return False
        name = line.queue.broker_name
        is_lost = self._link(name) is None
        return any(
            queue.broker_name != name and (is_lost or not self.faults.is_avoided(queue.broker_name, now_ms))
            for queue in self._usable(batch.target, batch.avoid, now_ms)
        )

    def _leave(self, line: _Line, batch: Batch) -> None:
        """Back to the ready ones, and never again to a broker that may have stored it."""
        if batch.may_be_stored:
            batch.avoid |= {line.queue.broker_name}
        batch.attempts = batch.attempts or 1  # also of one that was refused for the sake of those before it
        line.remove(batch)
        self._drop_if_empty(line)
        self._topics[batch.topic].put_back(batch)

    def _create_again(self, topic: str) -> None:
        """The topic is gone: deleted, or its broker lost its data."""
        if topic not in self._creating:
            self._creating.add(topic)
            self._instance.ensure_topic(topic, partial(self._created_again, topic), int(FAILOVER_AFTER_MS))

    def _created_again(self, topic: str, error: ZrmqError | None) -> None:
        self._creating.discard(topic)
        self._soon()
        if isinstance(error, TopicNotFoundError) and not self._is_closed:
            self._fail_waiting(self._topics[topic], error)

    def _fail_waiting(self, topic: _Topic, error: ZrmqError) -> None:
        for ready in (topic.ready, topic.one_way):
            while ready:
                self._finish(ready.popleft(), error)

    def _end(self, line: _Line, batch: Batch, error: ZrmqError) -> None:
        line.remove(batch)
        self._ended(line, batch, error)

    def _ended(self, line: _Line, batch: Batch, outcome: Stored | ZrmqError) -> None:
        self._drop_if_empty(line)
        if isinstance(batch.target, str):
            self._topics[batch.target].placed -= 1
        self._finish(batch, outcome)

    def _drop_if_empty(self, line: _Line) -> None:
        if not len(line) and self._lines.get(line.queue) is line:
            del self._lines[line.queue]

    def _finish(self, batch: Batch, outcome: Stored | ZrmqError) -> None:
        if isinstance(outcome, ZrmqError):
            if batch.may_be_stored and outcome.code not in OPEN_OUTCOMES:
                outcome = unknown_error(batch.topic, batch.timeout_ms, outcome)
            if not self._failed:
                self._loop.call_later(REPORT_MS, self._report_failures)
            self._failed[outcome.code.name] += batch.message_count
            self._last_failure = outcome
        self._accumulator.finish(batch, outcome, is_late=self._keep_late(batch, outcome))

    def _keep_late(self, batch: Batch, outcome: Stored | ZrmqError) -> bool:
        """Whether a batch that ends is to keep its topic from lanes: it is bound to its queue and may yet arrive, and a lane is
        another connection, which would overtake it. One of a topic and broker is enough."""
        if not isinstance(outcome, RequestTimeoutError) or not isinstance(batch.target, MessageQueue):
            return False
        name = batch.target.broker_name
        if self._link(name) is None:
            return False  # before any lane is used again there is a new session, and nothing of the former is taken any more
        late, now_ms = self._late.setdefault(name, {}), self._now_ms()
        first = late.get(batch.topic)
        late[batch.topic] = (batch if first is None else first[0], now_ms)
        return first is None

    def _forget_late(self, broker_name: str, until_ms: float) -> None:
        """What the broker's link had before then has arrived, for what was sent later is answered, or it never will."""
        late = self._late.get(broker_name, {})
        for topic, (batch, given_up_ms) in list(late.items()):
            if given_up_ms < until_ms:
                del late[topic]
                self._accumulator.forget(batch)
        if not late:
            self._late.pop(broker_name, None)

    def _report_failures(self) -> None:
        if self._failed:
            reason = self._last_failure.message if self._last_failure else ""
            log.warning("messages_failed", messages=self._failed.total(), by_code=dict(self._failed), last_reason=reason)
            self._failed.clear()

    # --- time ---------------------------------------------------------------------------------------------------------

    def _tick_ms(self) -> float:
        if any(topic.one_way for topic in self._topics.values()):
            return FULL_PAUSE_MS
        linger_ms = self._accumulator.config.linger_ms
        return max(1.0, min(TICK_MS, linger_ms)) if linger_ms else TICK_MS

    def _tick(self) -> None:
        self._tick_timer = None
        self._soon()
        now_ms = self._now_ms()
        for line in list(self._lines.values()):
            self._end_overdue(line, now_ms)
            self._fail_over(line, now_ms)
        for topic in self._topics.values():
            for ready in (topic.ready, topic.one_way):
                for batch in [batch for batch in ready if batch.deadline_ms <= now_ms]:
                    ready.remove(batch)
                    self._finish(batch, self._overdue_error(batch))

    def _end_overdue(self, line: _Line, now_ms: float) -> None:
        for batch in line:
            if batch.deadline_ms <= now_ms:
                if batch in line.unanswered:
                    batch.may_be_stored = True
                batch.forget()
                self._end(line, batch, self._overdue_error(batch))

    def _fail_over(self, line: _Line, now_ms: float) -> None:
        """Move what waits too long for its broker, oldest first, and let new batches avoid a broker that is silent."""
        unanswered = line.unanswered
        if unanswered and now_ms - unanswered[0].sent_ms > NOTICED_MS:
            self.faults.record(line.queue.broker_name, now_ms - unanswered[0].sent_ms, now_ms)
        for batch in line:
            is_unanswered = batch in unanswered
            is_late = now_ms - batch.sent_ms > self._config.failover_after_ms
            if not is_unanswered:
                is_behind = bool(unanswered) and unanswered[-1].producer_id != batch.producer_id  # which has to be answered first
                is_lost = self._link(line.queue.broker_name) is None
                is_late = (is_lost and (is_late or not batch.may_be_stored)) or (is_late and is_behind)
            if is_late and batch.attempts < self._config.retries and self._may_leave(line, batch, now_ms):
                batch.attempts += 1
                batch.may_be_stored |= is_unanswered
                batch.forget()
                self._leave(line, batch)

    def _overdue_error(self, batch: Batch) -> ZrmqError:
        """What a batch ends with at its deadline."""
        if batch.may_be_stored or (batch.sent_ms and batch.refusal is None):
            return unknown_error(batch.topic, batch.timeout_ms, batch.refusal)
        return batch.refusal or self._unreachable_error(batch)

    def _unreachable_error(self, batch: Batch) -> ZrmqError:
        brokers = {} if self.route is None else {
            queue.broker_name: self.route.brokers[queue.broker_name].address
            for queue in self.route.queues(batch.topic) if queue.broker_name in self.route.brokers
        }
        absent = "none is registered"
        if isinstance(batch.target, MessageQueue):
            brokers = {name: address for name, address in brokers.items() if name == batch.target.broker_name}
            absent = f"{batch.target.broker_name} has no such queue"
        if any(name in self.reachable for name in brokers):
            return UnreachableError(
                f"The message waited {batch.timeout_ms} ms for its turn and was not sent; the brokers of topic {batch.topic!r}"
                " are slower than this producer. Send slower, or give it a longer timeout_ms.",
                topic=batch.topic, timeout_ms=batch.timeout_ms,
            )
        names = ", ".join(f"{name} ({address})" for name, address in sorted(brokers.items())) or absent
        return UnreachableError(
            f"No broker of topic {batch.topic!r} could be reached within {batch.timeout_ms} ms: {names}. Start one, or check the"
            " network; the message was not stored.",
            topic=batch.topic, brokers=brokers, timeout_ms=batch.timeout_ms,
        )


def _read_only_error(topic: str) -> RequestRefusedError:
    return RequestRefusedError(
        f"Topic {topic!r} takes no messages; 'zrmq topic update {topic} --permission rw' lets it again.",
        code=Code.FORBIDDEN, topic=topic,
    )


def closed_error() -> ClosedError:
    """What sending raises once the producer is closed."""
    return ClosedError("The producer is closed; make a new one.")


def unknown_error(topic: str, timeout_ms: int, refusal: ZrmqError | None) -> RequestTimeoutError:
    """What a message ends with that may have been stored. `refusal`: what was said to another sending of it."""
    why = f"No broker answered within {timeout_ms} ms; it"
    if refusal is not None:
        why = f"A sending of the message got no answer, and another one was refused: {refusal.message} It"
    return RequestTimeoutError(
        f"{why} is unknown whether the message was stored. Send it again if a second copy does no harm.",
        topic=topic, timeout_ms=timeout_ms,
    )


def _leave_open(batches: list[Batch]) -> None:
    """Their answers will never come."""
    for batch in batches:
        batch.may_be_stored = True


def _given_up_error(batch: Batch) -> ClosedError:
    known = "it is unknown whether it was stored" if batch.may_be_stored else "it was not stored"
    return ClosedError(
        f"The producer was closed before the message was acknowledged; {known}. Flush before closing.", topic=batch.topic
    )
