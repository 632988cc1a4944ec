"""The consumer's core: which queues are ours, read, committed, given back. Parts beside it know how; this one knows when.

    route, members  ->  share (rebalance.py)  ->  claim (claiming.py)  ->  read (reading.py)  ->  inbox  ->  callers
                                                                                    commit (committing.py)  <-'

    a queue:   wanted --claim--> ours --not wanted--> draining --nothing in flight--> committed and released
                                  '--- fenced, lapsed, broker gone ---> dropped, and claimed again if still wanted

Once a lease is in doubt, nothing of its queue is handed out any more. It is in doubt as soon as no heartbeat sent within four
fifths of the session timeout was answered, well before the broker may give it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from random import Random

import msgspec

from zrmq.client.allocation import Strategy
from zrmq.client.claiming import LeaseClaims, OffsetClaims
from zrmq.client.committing import COMMIT_TIMEOUT_MS, Committer, OnCommitted
from zrmq.client.inbox import Inbox
from zrmq.client.instance import ClientInstance, RouteView
from zrmq.client.link import Link, OnReply
from zrmq.client.membership import Joining, Membership
from zrmq.client.process_queue import ProcessQueue
from zrmq.client.reading import Bounds, Reader, Reading, lease_ends_ms, server_id
from zrmq.client.rebalance import plan, share
from zrmq.errors import ClosedError, FencedError, InvalidArgumentError, TopicNotFoundError, UnreachableError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageModel, MessageQueue
from zrmq.protocol.requests import AnyReply, Request, Subscription
from zrmq.transport.interface import Loop, Timer

log = get_logger("consumer")

TICK_MS = 500.0  # how late a lapsed lease may be noticed by this side; what is handed out is checked each time
HANDOVER_MS_MAX = 60_000.0  # a queue that another member waits for is given up after this, whatever is still in flight
CLAIM_MS_MAX = 500.0  # how long the start waits for queues that other members give back
TOPIC_TIMEOUT_MS = 10_000
RETRY_MS = 1_000.0


class ConsumingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one consumer was told."""

    client_id: str
    group: str  # empty: read without a group; nothing is committed
    filters: Mapping[str, str]  # canonical expression by topic
    is_assigned: bool = False  # the user names the queues; no membership, no leases
    message_model: MessageModel = MessageModel.CLUSTERING
    consume_from: ConsumeFrom = ConsumeFrom.LATEST
    consume_timestamp_ms: int = 0
    allocation: Strategy
    bounds: Bounds
    commit_interval_ms: int
    auto_commit: bool = True

    @property
    def joins(self) -> bool:
        """Whether it becomes a member of its group."""
        return bool(self.group) and not self.is_assigned

    @property
    def leases(self) -> bool:
        """Whether it shares queues with other members."""
        return self.joins and self.message_model is MessageModel.CLUSTERING


class ConsumerCore:
    """One consumer's decisions. Loop thread only; what callers get and give back goes through the `Inbox`.

    `settle` is called before each round of commits, for what the callers' side knows to be finished by then. `on_started` is
    called once, when everything that fixes where this consumer begins has been done, or cannot be.
    """

    def __init__(
        self,
        loop: Loop,
        config: ConsumingConfig,
        inbox: Inbox,
        instance: ClientInstance,
        rng: Random,
        *,
        settle: Callable[[], None] = lambda: None,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._config = config
        self._inbox = inbox
        self._instance = instance
        self._rng = rng
        self._settle = settle
        self._on_started = on_started
        self._is_started = False
        self._is_closed = False
        self._is_paused = False
        self._paused: set[MessageQueue] = set()
        self._assigned: frozenset[MessageQueue] = frozenset()
        self._wanted: frozenset[MessageQueue] | None = None  # as of the last rebalance; None: not known yet
        self._unsure: set[Link] = set()  # that have queues of ours to claim, and nothing that says the broker knows we live
        self._creating: set[str] = set()
        self._missing: set[str] = set()  # topics that nobody may create
        self._patience: Timer | None = None  # with the members that have our queues, at the start
        self._server_ids: dict[str, str] = {}  # by broker name, as of the last session
        self._rebalance_ms = inf  # when the next one is due
        self._rebalance_timer = loop.call_later(0.0, lambda: None)
        self._began_ms = loop.clock.time_ms()
        self.reader = Reader(
            loop, inbox, config.bounds, dict(config.filters), config.group if config.leases else "", rng, self._lose
        )
        self._committer = Committer(inbox, self._fenced)
        self._claims: LeaseClaims | OffsetClaims = LeaseClaims(self) if config.leases else OffsetClaims(
            self, has_group=bool(config.group), is_assigned=config.is_assigned, consume_from=config.consume_from,
            consume_timestamp_ms=config.consume_timestamp_ms,
        )
        self._membership: Membership | None = None
        if config.joins:
            self._membership = Membership(loop, _joining(config), rng, self._rebalance_soon, self.on_refused)
        self._timers = [loop.call_later(TICK_MS, self._tick)]
        if config.group and config.auto_commit:
            self._timers.append(loop.call_later(config.commit_interval_ms, self._commit_round))
        instance.listener = self
        instance.want_topics(config.filters)

    # --- what the instance says ---------------------------------------------------------------------------------------

    def on_route(self, route: RouteView) -> None:
        """Of `InstanceListener`. A member of a group is known to every broker, with or without its topics there."""
        for reading in list(self.reader.readings.values()):
            if self._instance.link(reading.queue.broker_name) is not reading.link:
                self._lose(reading, ClosedError(f"Broker {reading.queue.broker_name} left."))
        if self._membership is not None:
            self._membership.expect(frozenset(route.brokers))
            for broker_name in route.brokers:
                self._instance.link(broker_name)
        self._rebalance_soon()

    def on_link_open(self, broker_name: str, link: Link) -> None:
        """Of `InstanceListener`. Joining goes out before what the link sends again."""
        if self._is_closed:
            self._committer.give_up(link)  # as no member any more we could not say whose offsets these are
            return
        if self._membership is not None:
            self._membership.link_open(broker_name, link)
        before, self._server_ids[broker_name] = self._server_ids.get(broker_name), server_id(link)
        if before not in (None, server_id(link)):
            self._restarted(link)
        self.reader.session_renewed(link)

    def on_link_lost(self, broker_name: str, link: Link) -> None:
        """Of `InstanceListener`. The readings wait: the session may come back before their leases are in doubt."""
        self._unsure.discard(link)
        if self._membership is not None:
            self._membership.link_lost(broker_name, link)

    def on_notice(self, broker_name: str, link: Link, notice: AnyReply) -> None:
        """Of `InstanceListener`."""
        if link in self._unsure:
            self._unsure.discard(link)
            self._rebalance_soon()
        if self._membership is not None:
            self._membership.notice(broker_name, notice)

    # --- what claims say ----------------------------------------------------------------------------------------------

    def on_claimed(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int, topic_id: int = 0, *, goes_back: bool = False,
        flushed_offset: int = -1, committed_offset: int = -1,
    ) -> bool:
        """Of `ClaimListener`."""
        if self._is_closed or self._wanted is None or queue not in self._wanted:
            return False
        reading = self.reader.begin(queue, link, offset, lease_epoch, topic_id, flushed_offset, committed_offset)
        reading.goes_back = goes_back
        if self._is_paused:
            self._paused.add(queue)
        if queue in self._paused:
            self.reader.pause(reading, True)
        log.info("queue_claimed", **_place(queue), group=self._config.group, offset=offset, lease_epoch=lease_epoch)
        self._check_started()
        return True

    def on_unclaimed(self, after_ms: float) -> None:
        """Of `ClaimListener`."""
        self._rebalance_soon(after_ms)

    def on_refused(self, error: ZrmqError) -> None:
        """Of `ClaimListener`, and of the membership: nothing but the user can help. The callers are told."""
        if not self._is_closed:
            log.error("consumer_refused", group=self._config.group, reason=error.message)
            self._inbox.close(error)
            self._end_start()
            self.retire()

    # --- rebalancing --------------------------------------------------------------------------------------------------

    def _rebalance_soon(self, after_ms: float = 0.0) -> None:
        """Once for all that asks for it until then; the earliest counts."""
        wait_ms = after_ms * self._rng.uniform(0.8, 1.2)
        due_ms = self._loop.clock.monotonic_ms() + wait_ms
        if due_ms < self._rebalance_ms:
            self._rebalance_timer.cancel()
            self._rebalance_ms = due_ms
            self._rebalance_timer = self._loop.call_later(wait_ms, self._rebalance)

    def _rebalance(self) -> None:
        self._rebalance_ms = inf
        if self._is_closed:
            return
        try:
            wanted = self._find_wanted()
        except InvalidArgumentError as error:
            self.on_refused(error)
            return
        if wanted is None:
            return
        self._want(wanted)
        self.reader.queue_count = len(wanted)
        moves = plan(wanted, self.reader.readings.keys() | self._claims.pending)
        for queue in moves.give_back:
            if queue in self.reader.readings:
                self._drain(self.reader.readings[queue])
        self._claims.claim([(queue, link) for queue in moves.acquire if (link := self._link_for(queue)) is not None])
        self._claims.settle(partial(self._unwanted_link, wanted))
        self._create_topics()
        self._check_started()

    def _want(self, wanted: frozenset[MessageQueue]) -> None:
        self._wanted = wanted
        if self._config.is_assigned:
            self._paused &= wanted  # of others the queues may be away: at a broker that is not there, or with another member

    def _find_wanted(self) -> frozenset[MessageQueue] | None:
        """The queues this consumer should read; None while that cannot be known, so that what is read stays."""
        if self._config.is_assigned:
            return self._assigned
        route = self._instance.route
        if route is None or not all(map(self._instance.covers, self._config.filters)):
            return None
        queues = {topic: route.queues(topic) for topic in self._config.filters}
        if not self._config.leases:
            return frozenset(queue for each in queues.values() for queue in each)
        members = self._membership.members if self._membership is not None else []
        if not members:
            return None
        return share(self._config.allocation, self._config.group, self._config.client_id, queues, members)

    def _link_for(self, queue: MessageQueue) -> Link | None:
        """Whom to ask for the queue. Nobody whose lease would be in doubt as soon as we have it: a heartbeat has to be answered
        first, or we would claim it and lose it as fast as the network goes."""
        link = self._member_link(queue)
        if link is None or not self._config.leases or lease_ends_ms(link) > self._loop.clock.monotonic_ms():
            return link
        self._unsure.add(link)
        return None

    def _member_link(self, queue: MessageQueue) -> Link | None:
        """The link to the queue's broker; None before we are a member there."""
        if self._membership is not None and not self._membership.is_joined(queue.broker_name):
            return None
        return self._instance.link(queue.broker_name)

    def _unwanted_link(self, wanted: frozenset[MessageQueue], queue: MessageQueue, reading: Reading | None) -> Link | None:
        """Whom to give a queue back to that may be ours still. Not while callers are at work on it, up to a bound."""
        if queue in wanted:
            return None
        now_ms = self._loop.clock.monotonic_ms()
        if reading is not None and reading.process_queue.in_flight and now_ms - reading.draining_ms <= HANDOVER_MS_MAX:
            return None
        return self._member_link(queue)

    def _create_topics(self) -> None:
        """Subscribing creates topics where that is allowed; but first every broker knows when we subscribed."""
        route = self._instance.route
        if self._membership is None or route is None or not self._membership.is_complete:
            return
        for topic in self._config.filters:
            if topic not in self._creating and not route.queues(topic):
                self._creating.add(topic)
                self._instance.ensure_topic(topic, partial(self._created, topic), TOPIC_TIMEOUT_MS)

    def _created(self, topic: str, error: ZrmqError | None) -> None:
        if isinstance(error, TopicNotFoundError):
            log.warning("topic_not_found", topic=topic, reason=error.message)  # once: the route shows it when somebody creates it
            self._missing.add(topic)
            self._check_started()
        elif error is not None and not isinstance(error, ClosedError):
            self._creating.discard(topic)
            self._rebalance_soon(RETRY_MS)

    def _check_started(self) -> None:
        """The start is over when we are a member everywhere, and our queues are there; for those other members still have it does
        not wait long, and what is stored meanwhile is not missed."""
        if self._is_started or self._wanted is None or (self._membership is not None and not self._membership.is_complete):
            return
        if self._wanted.issubset(self.queues()) and not self._awaits_topics():
            self._end_start()
        elif self._patience is None:
            self._patience = self._loop.call_later(CLAIM_MS_MAX, self._end_start)

    def _awaits_topics(self) -> bool:
        route = self._instance.route
        return self._membership is not None and route is not None and not all(
            route.queues(topic) or topic in self._missing for topic in self._config.filters
        )

    def _end_start(self) -> None:
        if not self._is_started:
            self._is_started = True
            if isinstance(self._claims, OffsetClaims) and not self._config.is_assigned:
                self._claims.start_late(self._began_ms)
            self._on_started()

    # --- giving back, losing ------------------------------------------------------------------------------------------

    def _drain(self, reading: Reading) -> None:
        """Another member is to have it: hand nothing out any more, and let it go when callers are through with what they have."""
        if reading.process_queue.is_draining:
            return
        self.reader.stop_pulling(reading)
        reading.draining_ms = self._loop.clock.monotonic_ms()
        if self._inbox.drain(reading.process_queue):
            self._let_go(reading)

    def _let_go(self, reading: Reading) -> None:
        if self._config.group:
            self._committer.commit_last(reading)
        offset = self._inbox.commit_offset(reading.process_queue)
        self.reader.end(reading)
        # Said before it is done: whoever gets the queue next says so later than this, on any clock both can see.
        log.info("queue_given_back", **_place(reading.queue), group=self._config.group, offset=offset)
        self._claims.let_go(reading, offset)

    def _lose(self, reading: Reading, error: ZrmqError) -> None:
        """The lease, the topic or the broker is gone: what is buffered is nobody's, what is in flight is not committed."""
        if self._is_closed or reading.process_queue.is_dropped:
            return
        log.warning("queue_lost", **_place(reading.queue), group=self._config.group, reason=error.message)
        reading.draining_ms = reading.draining_ms or self._loop.clock.monotonic_ms()
        reading.process_queue.is_lost = True
        self._claims.lose(reading, self._inbox.commit_offset(reading.process_queue), error)
        self.reader.end(reading)
        self._rebalance_soon(RETRY_MS if isinstance(error, TopicNotFoundError) else 0.0)  # unless the route tells of another one

    def _fenced(self, reading: Reading, error: ZrmqError) -> None:
        """A commit was refused. Without leases of our own it means that the group has members that hold some, or that the topic
        was made anew, which the next pull tells."""
        if self._config.leases:
            self._lose(reading, error)
        else:
            log.warning("commit_refused", **_place(reading.queue), group=self._config.group, reason=error.message)

    # --- brokers that were started again ------------------------------------------------------------------------------

    def _restarted(self, link: Link) -> None:
        """A broker that was started again may have lost what it had not flushed. Then the offsets behind are given anew, and who
        goes on where it was would pass messages over. So queues of which such messages were read are claimed again, where the
        group stands: a commit is only on disk when everything before it is."""
        self._claims.restarted(link)
        self._committer.give_up(link)
        for reading in list(self.reader.readings.values()):
            if reading.link is link and not reading.is_safe:
                self._lose(reading, UnreachableError(f"Broker {reading.queue.broker_name} was started again."))

    # --- time ---------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """The inbox has room again, or a queue is drained or lapsed."""
        self._inbox.looked()
        if self._is_closed:
            return
        for reading in list(self.reader.readings.values()):
            if reading.process_queue.is_draining and reading.process_queue.in_flight == 0:
                self._let_go(reading)
            elif reading.process_queue.is_lapsed:
                self._lapse(reading)
        self.reader.pull_all()

    def _tick(self) -> None:
        self._timers[0] = self._loop.call_later(TICK_MS, self._tick)
        now_ms = self._loop.clock.monotonic_ms()
        for reading in list(self.reader.readings.values()):
            if reading.process_queue.valid_until_ms() <= now_ms:
                self._lapse(reading)
            elif reading.process_queue.is_draining and now_ms - reading.draining_ms > HANDOVER_MS_MAX:
                log.warning("queue_given_up", **_place(reading.queue), in_flight=reading.process_queue.in_flight)
                reading.process_queue.is_lost = True
                self._let_go(reading)
        if self._wanted is not None:
            self._claims.settle(partial(self._unwanted_link, self._wanted))

    def _lapse(self, reading: Reading) -> None:
        address = reading.link.address
        self._lose(reading, UnreachableError(f"{address} has not answered heartbeats for too long to rely on its lease."))

    def _commit_round(self) -> None:
        self._timers[1] = self._loop.call_later(self._config.commit_interval_ms, self._commit_round)
        self._settle()
        self._committer.commit_idle(self._committable())

    def _committable(self) -> list[Reading]:
        """The readings whose broker is there, and knows us as a member if we are one."""
        return [
            reading for reading in self.reader.readings.values()
            if reading.link.is_open and (self._membership is None or self._membership.is_joined(reading.queue.broker_name))
        ]

    # --- for the door -------------------------------------------------------------------------------------------------

    def assign(self, queues: Iterable[MessageQueue]) -> None:
        """Read these queues and no others. `on_started` is called again when they are."""
        self._assigned = frozenset(queues)
        self._want(self._assigned)
        self._is_started = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._instance.want_topics({queue.topic for queue in self._assigned})
        self._rebalance_soon()

    def commit(self, on_done: OnCommitted, timeout_ms: int, given: Sequence[ProcessQueue] = ()) -> None:
        """Commit what is finished, now. `given`: what was finished for it; where that is lost by now, the error says so."""
        lost = next((_lost(each.queue) for each in given if each.is_lost), None)
        self._committer.commit(list(self.reader.readings.values()), lambda error: on_done(error or lost), timeout_ms)

    @property
    def is_cut_off(self) -> bool:
        """Whether it reads nothing although it should: it has not started, or no broker of its queues is there."""
        route = self._instance.route
        has_queues = route is not None and any(route.queues(topic) for topic in self._config.filters)
        is_idle = self._is_started and not self._wanted and (has_queues or self._config.is_assigned)  # others have the queues
        return not self.reader.readings and not is_idle

    def seek(self, queue: MessageQueue, offset: int) -> None:
        """Go on from another offset. Raises `InvalidArgumentError` for a queue that is not read here."""
        self.reader.begin_anew(self.reading(queue), offset)

    def reading(self, queue: MessageQueue) -> Reading:
        """The reading of a queue, or `InvalidArgumentError`."""
        reading = self.reader.readings.get(queue)
        if reading is None or reading.process_queue.is_draining:
            raise InvalidArgumentError(
                f"Queue {queue.queue_id} of {queue.topic!r} at {queue.broker_name} is not assigned to this consumer now; see"
                " assigned().",
                topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id,
            )
        return reading

    def pause(self, queues: Iterable[MessageQueue], is_paused: bool) -> None:
        """Pause or resume some queues; one that goes and comes again is as it was. Raises `InvalidArgumentError` for one
        that is neither read here nor paused, before anything is done."""
        chosen = set(queues)
        away = chosen & self._paused - set(self.queues())
        readings = [self.reading(queue) for queue in sorted(chosen - away)]
        self._paused = self._paused | chosen if is_paused else self._paused - chosen
        for reading in readings:
            self.reader.pause(reading, is_paused)

    def pause_all(self, is_paused: bool) -> None:
        """Pause or resume everything, queues that are claimed later too; what is being given back stands still anyway."""
        self._is_paused = is_paused
        self.pause(self.queues() if is_paused else self.paused(), is_paused)

    def ask(self, broker_name: str, kind: type[Request], *fields: object, timeout_ms: int, on_reply: OnReply) -> None:
        """Ask a broker something. `UnreachableError` when the route does not have it."""
        absent = UnreachableError(f"Broker {broker_name} is not in the route; it is down or has another name.")

        def answer(reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
            on_reply(absent if isinstance(reply, ClosedError) and not self._is_closed else reply, frames)

        link = self._instance.link(broker_name)
        if link is None:
            on_reply(absent, [])
        else:
            link.request(kind, *fields, timeout_ms=timeout_ms, on_reply=answer)

    def queues(self) -> list[MessageQueue]:
        """What is read here now, sorted; without what is being given back."""
        readings = self.reader.readings
        return sorted(queue for queue, reading in readings.items() if not reading.process_queue.is_draining)

    def paused(self) -> list[MessageQueue]:
        """What is paused, sorted; also what is lost for now."""
        return sorted(self._paused)

    def finished_offsets(self) -> dict[MessageQueue, int]:
        """For each of `queues`, the lowest offset that is not finished."""
        return {queue: self._inbox.commit_offset(self.reader.readings[queue].process_queue) for queue in self.queues()}

    def stop(self) -> None:
        """Hand nothing out any more; who is at work on a unit ends after a message. `close` comes next."""
        self._stop()
        for reading in self.reader.readings.values():
            self._inbox.drain(reading.process_queue)

    def retire(self) -> None:
        """Nobody will ask for messages any more. Leave as soon as callers are through with what they have: while the sessions
        live, so do the leases, and others wait for our queues."""
        if not self._is_closed:
            self._stop()
            self._leave_when_idle(self._loop.clock.monotonic_ms() + HANDOVER_MS_MAX)

    def _leave_when_idle(self, until_ms: float) -> None:
        is_busy = any(reading.process_queue.in_flight for reading in self.reader.readings.values())
        if is_busy and self._loop.clock.monotonic_ms() < until_ms:
            self._loop.call_later(TICK_MS, lambda: self._leave_when_idle(until_ms))
        else:
            self.close(self._leave, COMMIT_TIMEOUT_MS)

    def _leave(self) -> None:
        for reading in list(self.reader.readings.values()):
            self.reader.end(reading)
        self._instance.close()

    def close(self, on_closed: Callable[[], None], timeout_ms: int) -> None:
        """Commit what is finished, as far as brokers can be reached, then call back. The instance's BYE gives the leases back."""
        self._stop()
        if self._config.group and self._config.auto_commit:
            self._settle()
            self._committer.commit(self._committable(), lambda error: self._closed(error, on_closed), timeout_ms)
        else:
            on_closed()

    def _closed(self, error: ZrmqError | None, on_closed: Callable[[], None]) -> None:
        if error is not None:
            log.warning("last_commit_failed", group=self._config.group, reason=error.message)
        on_closed()

    def _stop(self) -> None:
        self._is_closed = True
        self.reader.close()
        if self._membership is not None:
            self._membership.close()
        for timer in self._timers:
            timer.cancel()


def _joining(config: ConsumingConfig) -> Joining:
    subscriptions = [Subscription(topic, expression) for topic, expression in sorted(config.filters.items())]
    return Joining(
        config.group, config.client_id, config.message_model, subscriptions, config.consume_from, config.consume_timestamp_ms
    )


def _lost(queue: MessageQueue) -> FencedError:
    return FencedError(
        f"Queue {queue.queue_id} of {queue.topic!r} at {queue.broker_name} was lost before the commit, as was its broker or our"
        " right to read it; what is not committed of it comes again, here or at another member.",
        topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id,
    )


def _place(queue: MessageQueue) -> dict[str, object]:
    return {"topic": queue.topic, "broker_name": queue.broker_name, "queue_id": queue.queue_id}
