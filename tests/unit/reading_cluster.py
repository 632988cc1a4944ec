"""A cluster in memory for tests of consumers: the real NameServer, brokers that only know how to be read, and consumers' cores.

A `ReadingBroker` grants leases, holds pulls and keeps commits as the real broker does, over `crash` and `start` too. It can be
told to refuse, to lose its notices, to answer a pull otherwise, and it writes down what it was asked.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import msgspec

from tests.unit.stored import stored_batch
from zrmq.client.consuming import ConsumerCore, ConsumingConfig
from zrmq.client.inbox import Inbox, Ready
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.client.reading import Bounds
from zrmq.client.registration import Registration
from zrmq.errors import (
    Code,
    FencedError,
    InvalidArgumentError,
    RequestRefusedError,
    SubscriptionMismatchError,
    TopicNotFoundError,
    ZrmqError,
)
from zrmq.message import ConsumeFrom, Message, MessageModel, MessageQueue
from zrmq.protocol import limits
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    AcquireLease,
    Alive,
    BrokerInfo,
    Bye,
    CommitOffsets,
    Committed,
    Done,
    Failed,
    GroupChanged,
    Heartbeat,
    Hello,
    Joined,
    JoinGroup,
    Leased,
    Limits,
    Offsets,
    Pull,
    Pulled,
    PullStatus,
    PutTopic,
    QueryCommitted,
    QueryOffsets,
    QuerySubscriptions,
    ReleaseLease,
    Reply,
    Request,
    SubscribedSince,
    TopicInfo,
    TopicRoute,
    Topics,
    Welcome,
    decode_request,
    encode,
)
from zrmq.routing.core import NameServerCore
from zrmq.transport.memory import MemoryLoop, MemoryNetwork
from zrmq.transport.sessions import Session, SessionTable

NAMESERVER = "tcp://127.0.0.1:9876"
SESSION_TIMEOUT_MS = 10_000
TICK_MS = 250.0
STAYS_BYTES_MIN = 10_000  # a pull with less left ends
LIMITS = Limits(
    limits.BODY_BYTES_MAX, limits.BATCH_BYTES_MAX, limits.BATCH_RECORDS_MAX, limits.INFLIGHT_BATCHES_MAX, limits.PULL_BYTES_MAX
)

Key = tuple[str, str, int]  # group, topic, queue id


class Log(msgspec.Struct):
    """One queue: its batches with their base offsets and counts."""

    batches: list[tuple[int, int, bytes]] = []
    min_offset: int = 0
    next_offset: int = 0


class Standing(msgspec.Struct):
    """What a broker keeps of a group."""

    since_ms: dict[tuple[str, str], int] = {}  # instance name, topic
    starts: dict[tuple[str, str, int], int] = {}  # instance name, topic, queue id
    offsets: dict[tuple[str, str, int], int] = {}  # instance name, topic, queue id
    model: MessageModel | None = None
    subscriptions: dict[str, str] = {}


class ReadingBroker:
    """One broker of the fake cluster."""

    def __init__(self, network: MemoryNetwork, name: str, port: int, *, auto_create: bool = True) -> None:
        self.network = network
        self.name = name
        self.address = f"tcp://127.0.0.1:{port}"
        self.auto_create = auto_create
        self.topics: dict[str, list[Log]] = {}
        self.topic_ids: dict[str, int] = {}
        self.topics_made = 0
        self.unflushed: set[str] = set()  # topics of which nothing is
        self.flushed_until: int | None = None  # of the others' queues; None: all
        self.groups: defaultdict[str, Standing] = defaultdict(Standing)
        self.leases: dict[Key, tuple[str, int]] = {}
        self.requests: list[tuple[str, Any]] = []  # client id and request, since the last `forget_requests`
        self.refuse: Callable[[Session, Any], ZrmqError | None] = lambda session, request: None
        self.answer_pull: Callable[[Pull], tuple[Pulled, list[bytes]] | None] = lambda request: None
        self.loses_notices = False
        self.boot = 0
        self.loop: MemoryLoop | None = None

    # --- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and register; with the messages, commits and leases of before."""
        self.boot += 1
        self.loop = loop = self.network.loop(self.name)
        self.sessions = SessionTable(loop.clock.monotonic_ms(), session_timeout_ms=SESSION_TIMEOUT_MS, expire_interval_ms=TICK_MS)
        self.members: defaultdict[str, dict[str, Session]] = defaultdict(dict)
        self.versions: defaultdict[str, int] = defaultdict(lambda: self.boot << 32)
        self.held: list[tuple[Session, Pull]] = []
        self.waits: defaultdict[Key, deque[tuple[Session, AcquireLease]]] = defaultdict(deque)
        self.endpoint = loop.listen(self.address, self.handle)
        info = BrokerInfo("test", self.name, 0, "MASTER", self.boot, self.address, "")
        self.registration = Registration(loop, [NAMESERVER], info, self._routes, self.network.rng)
        loop.call_later(TICK_MS, self._tick)
        self.absent = {client_id for client_id, _ in self.leases.values()}
        loop.call_later(SESSION_TIMEOUT_MS, self._forget_absent)

    def _forget_absent(self) -> None:
        """Who did not come back after the restart has no leases any more."""
        for key in [key for key, (client_id, _) in self.leases.items() if client_id in self.absent]:
            self._end_lease(key)

    def crash(self) -> None:
        """Gone, without a word."""
        assert self.loop is not None
        self.loop.close()
        self.loop = None
        self.held.clear()

    def add_topic(self, topic: str, queue_count: int = 2) -> None:
        """Have it."""
        self.topics[topic] = [Log() for _ in range(queue_count)]
        self.topics_made += 1
        self.topic_ids[topic] = self.topics_made
        if self.loop is not None:
            self.registration.topics_changed()

    def delete_topic(self, topic: str) -> None:
        """Have it no more, nor what groups had of it, and tell those who wait for its messages."""
        del self.topics[topic], self.topic_ids[topic]
        self.leases = {key: lease for key, lease in self.leases.items() if key[1] != topic}
        for group in self.groups.values():
            group.offsets = {key: offset for key, offset in group.offsets.items() if key[1] != topic}
            group.starts = {key: offset for key, offset in group.starts.items() if key[1] != topic}
        held, self.held = self.held, []
        for session, request in held:
            self._try_pull(session, request)
        if self.loop is not None:
            self.registration.topics_changed()

    def store(self, topic: str, queue_id: int, count: int, tags: list[str | None] | None = None) -> None:
        """Messages come in, as one batch."""
        log = self.topics[topic][queue_id]
        frame = stored_batch(log.next_offset, count, tags=tags, queue_id=queue_id, store_timestamp_ms=self._time_ms())
        log.batches.append((log.next_offset, count, frame))
        log.next_offset += count
        held, self.held = self.held, []
        for session, request in held:
            self._try_pull(session, request)

    def committed(self, group: str, topic: str, queue_id: int, instance_name: str = "") -> int | None:
        return self.groups[group].offsets.get((instance_name, topic, queue_id))

    def holder(self, group: str, topic: str, queue_id: int) -> str | None:
        return self.leases.get((group, topic, queue_id), (None, 0))[0]

    def asked(self, kind: type[Request], client_id: str | None = None) -> list[Any]:
        """The requests of this kind so far."""
        return [request for who, request in self.requests if isinstance(request, kind) and client_id in (None, who)]

    def _time_ms(self) -> int:
        return self.loop.clock.time_ms() if self.loop is not None else 0

    def _routes(self) -> tuple[int, Callable[[], list[TopicRoute]]]:
        routes = [TopicRoute(topic, self.name, len(logs), 6) for topic, logs in self.topics.items()]
        version = 1_000 * self.topics_made + sum(route.queue_count + 1 for route in routes) + 1
        return version, lambda: routes

    def _tick(self) -> None:
        assert self.loop is not None
        self.loop.call_later(TICK_MS, self._tick)
        for session in self.sessions.expire(self.loop.clock.monotonic_ms()):
            self.drop(session)

    # --- requests -------------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from the ROUTER."""
        request: Any = decode_request(frames[0])
        try:
            reply, payload = self._answer(peer, request)
        except ZrmqError as error:
            reply, payload = Failed(request.number, int(error.code), error.message, dict(error.facts)), []
        if reply is not None:
            self.endpoint.send(peer, [encode(reply), *payload])

    def _answer(self, peer: bytes, request: Request) -> tuple[Reply | None, list[bytes]]:
        assert self.loop is not None
        now_ms = self.loop.clock.monotonic_ms()
        if isinstance(request, Hello):
            session, old = self.sessions.open(request, peer, now_ms)
            self.absent.discard(session.client_id)
            if old is not None and old.group in self.members and old.client_id in self.members[old.group]:
                self.members[old.group][old.client_id] = session
            return Welcome(
                request.number, limits.PROTOCOL_VERSION, f"{self.name}@{self.boot}", self.name, self._time_ms(),
                SESSION_TIMEOUT_MS, 1_000, LIMITS,
            ), []
        found = self.sessions.by_peer(peer)
        if found is None:
            raise RequestRefusedError("Say HELLO first.", code=Code.NO_SESSION)
        self.sessions.touch(found, now_ms)
        if not isinstance(request, Heartbeat):
            self.requests.append((found.client_id, request))
        refusal = self.refuse(found, request)
        if refusal is not None:
            raise refusal
        handler = getattr(self, f"_do_{type(request).__name__}")
        reply = handler(found, request)
        return reply if isinstance(reply, tuple) else (reply, [])

    def _do_Heartbeat(self, session: Session, request: Heartbeat) -> Reply:
        is_member = session.client_id in self.members[session.group]
        return Alive(request.number, self._time_ms(), self.versions[session.group] if is_member else 0)

    def _do_Bye(self, session: Session, request: Bye) -> Reply:
        self.drop(session)
        self.sessions.close(session)
        return Done(request.number)

    def _do_PutTopic(self, session: Session, request: PutTopic) -> Reply:
        config: TopicConfig = request.config
        if config.topic not in self.topics:
            if not self.auto_create:
                raise TopicNotFoundError(f"Topic {config.topic!r} does not exist.")
            self.add_topic(config.topic, config.queue_count)
        return Topics(request.number, [TopicInfo(config, 1, [])])

    # --- groups ---------------------------------------------------------------------------------------------------------

    def _do_QuerySubscriptions(self, session: Session, request: QuerySubscriptions) -> Reply:
        known = self.groups[session.group].since_ms
        return SubscribedSince(request.number, [known.get((session.instance_name, topic), 0) for topic in request.topics])

    def _do_JoinGroup(self, session: Session, request: JoinGroup) -> Reply:
        members, group = self.members[session.group], self.groups[session.group]
        wanted = {each.topic: each.expression for each in request.subscriptions}
        if set(members) - {session.client_id} and (group.model, group.subscriptions) != (request.message_model, wanted):
            raise SubscriptionMismatchError(f"The group reads {group.subscriptions} and this member wants {wanted}.")
        names = {other.instance_name for other in members.values() if other.client_id != session.client_id}
        if request.message_model is MessageModel.BROADCASTING and session.instance_name in names:
            raise RequestRefusedError("An instance of that name is live.", code=Code.INSTANCE_NAME_TAKEN)
        group.model, group.subscriptions = request.message_model, wanted
        name = session.instance_name if request.message_model is MessageModel.BROADCASTING else ""
        for topic, told_ms in zip(wanted, request.since_ms, strict=True):
            if (name, topic) not in group.since_ms:
                group.since_ms[name, topic] = told_ms or self._time_ms()
                for queue_id, log in enumerate(self.topics.get(topic, [])):
                    group.starts[name, topic, queue_id] = self._start(log, request, told_ms)
        is_new = session.client_id not in members
        members[session.client_id] = session
        if is_new:
            self._announce(session.group, besides=session.client_id)
        since = [group.since_ms[name, each.topic] for each in request.subscriptions]
        return Joined(request.number, self.versions[session.group], sorted(members), since)

    def _start(self, log: Log, request: JoinGroup, told_ms: int) -> int:
        if request.consume_from is ConsumeFrom.EARLIEST:
            return log.min_offset
        if request.consume_from is ConsumeFrom.LATEST and told_ms == 0:
            return log.next_offset
        return self._offset_at(log, request.consume_timestamp_ms or told_ms)

    def _offset_at(self, log: Log, timestamp_ms: int) -> int:
        from zrmq.protocol.batch import peek_batch

        later = [base for base, _, frame in log.batches if peek_batch(frame).store_timestamp_ms >= timestamp_ms]
        return later[0] if later else log.next_offset

    def drop(self, session: Session) -> None:
        """The session's membership and leases end."""
        members = self.members[session.group]
        if members.get(session.client_id) is session:
            del members[session.client_id]
            self._announce(session.group)
        whose = (session.group, session.client_id)
        for key in [key for key, (client_id, _) in self.leases.items() if (key[0], client_id) == whose]:
            self._end_lease(key)

    def _announce(self, group: str, besides: str = "") -> None:
        self.versions[group] += 1
        for client_id, member in self.members[group].items():
            if client_id != besides and not self.loses_notices:
                notice = GroupChanged(0, group, self.versions[group], sorted(self.members[group]))
                self.endpoint.send(member.peer, [encode(notice)])

    # --- leases ---------------------------------------------------------------------------------------------------------

    def _do_AcquireLease(self, session: Session, request: AcquireLease) -> Reply | None:
        if session.client_id not in self.members[session.group]:
            raise RequestRefusedError("Join the group first.", code=Code.FORBIDDEN)
        key = (session.group, request.topic, request.queue_id)
        client_id, epoch = self.leases.get(key, (None, 0))
        if client_id not in (None, session.client_id):
            for earlier in [wait for wait in self.waits[key] if wait[0].client_id == session.client_id]:
                self.waits[key].remove(earlier)
            self.waits[key].append((session, request))
            assert self.loop is not None
            self.loop.call_later(max(request.timeout_ms - 100, 0), lambda: self._refuse_wait(key, session, request))
            return None
        if client_id is None:
            epoch = max((epoch for _, epoch in self.leases.values()), default=self.boot << 32) + 1 + self.network.draw_number()
            self.leases[key] = (session.client_id, epoch)
        return Leased(request.number, epoch, self._stands_at(session.group, "", request.topic, request.queue_id))

    def _refuse_wait(self, key: Key, session: Session, request: AcquireLease) -> None:
        if (session, request) in self.waits[key]:
            self.waits[key].remove((session, request))
            self.endpoint.send(session.peer, [encode(Failed(request.number, Code.LEASE_HELD, "Still held."))])

    def _end_lease(self, key: Key) -> None:
        del self.leases[key]
        while self.waits[key]:
            session, request = self.waits[key].popleft()
            if self.members[session.group].get(session.client_id) is session:
                reply = self._do_AcquireLease(session, request)
                assert reply is not None
                self.endpoint.send(session.peer, [encode(reply)])
                return

    def _check_lease(self, session: Session, topic: str, queue_id: int, epoch: int) -> None:
        if self.leases.get((session.group, topic, queue_id)) != (session.client_id, epoch):
            raise FencedError(f"Queue {queue_id} of {topic!r} is not yours.")

    def _do_ReleaseLease(self, session: Session, request: ReleaseLease) -> Reply:
        self._check_lease(session, request.topic, request.queue_id, request.lease_epoch)
        if request.offset > self._stands_at(session.group, "", request.topic, request.queue_id):
            self.groups[session.group].offsets["", request.topic, request.queue_id] = request.offset
        self._end_lease((session.group, request.topic, request.queue_id))
        return Done(request.number)

    # --- offsets --------------------------------------------------------------------------------------------------------

    def _stands_at(self, group: str, instance_name: str, topic: str, queue_id: int) -> int:
        standing = self.groups[group]
        if (instance_name, topic, queue_id) in standing.offsets:
            return standing.offsets[instance_name, topic, queue_id]
        is_subscribed = (instance_name, topic) in standing.since_ms
        return standing.starts.get((instance_name, topic, queue_id), 0) if is_subscribed else -1

    def _instance(self, session: Session) -> str:
        is_member = session.client_id in self.members[session.group]
        return session.instance_name if is_member and self.groups[session.group].model is MessageModel.BROADCASTING else ""

    def _do_CommitOffsets(self, session: Session, request: CommitOffsets) -> Reply:
        fenced, group, instance = [], self.groups[session.group], self._instance(session)
        for index, each in enumerate(request.offsets):
            if each.topic_id not in (0, self.topic_ids.get(each.topic)):
                fenced.append(index)
                continue
            if each.lease_epoch or (session.group, each.topic, each.queue_id) in self.leases:
                try:
                    self._check_lease(session, each.topic, each.queue_id, each.lease_epoch)
                except FencedError:
                    fenced.append(index)
                    continue
            if request.reset or each.offset > self._stands_at(session.group, instance, each.topic, each.queue_id):
                group.offsets[instance, each.topic, each.queue_id] = each.offset
        return Committed(request.number, fenced)

    def _do_QueryCommitted(self, session: Session, request: QueryCommitted) -> Reply:
        logs = self._logs(request.topic)
        instance = self._instance(session)
        found = [(queue_id, self._stands_at(session.group, instance, request.topic, queue_id)) for queue_id in range(len(logs))]
        return Offsets(request.number, found, self.topic_ids[request.topic])

    def _do_QueryOffsets(self, session: Session, request: QueryOffsets) -> Reply:
        logs = self._logs(request.topic)
        found = []
        for queue_id in request.queue_ids or range(len(logs)):
            if queue_id >= len(logs):
                raise InvalidArgumentError(f"Topic {request.topic!r} has queues 0 to {len(logs) - 1}, not {queue_id}.")
            log = logs[queue_id]
            named = {OFFSET_EARLIEST: log.min_offset, OFFSET_LATEST: log.next_offset}
            at = named[request.timestamp_ms] if request.timestamp_ms in named else self._offset_at(log, request.timestamp_ms)
            found.append((queue_id, at))
        flushed = [self._ends(request.topic, logs[queue_id])[2] for queue_id, _ in found]
        return Offsets(request.number, found, self.topic_ids[request.topic], flushed)

    def _logs(self, topic: str) -> list[Log]:
        if topic not in self.topics:
            raise TopicNotFoundError(f"Topic {topic!r} does not exist.")
        return self.topics[topic]

    # --- pulls ----------------------------------------------------------------------------------------------------------

    def _do_Pull(self, session: Session, request: Pull) -> tuple[Reply | None, list[bytes]]:
        self._logs(request.topic)
        if request.topic_id not in (0, self.topic_ids[request.topic]):
            raise TopicNotFoundError(f"Topic {request.topic!r} is another one.")
        if request.group:
            self._check_lease(session, request.topic, request.queue_id, request.lease_epoch)
        scripted = self.answer_pull(request)
        if scripted is not None:
            return scripted
        log = self._logs(request.topic)[request.queue_id]
        if not log.min_offset <= request.offset <= log.next_offset:
            next_offset = min(max(request.offset, log.min_offset), log.next_offset)
            return Pulled(request.number, PullStatus.MOVED, next_offset, *self._ends(request.topic, log)), []
        batches = [batch for batch in log.batches if batch[0] + batch[1] > request.offset]
        if not batches:
            self._hold(session, request)
            return None, []
        taken = [batches[0]]
        for batch in batches[1:]:
            if sum(len(frame) for _, _, frame in taken) + len(batch[2]) > request.bytes_max:
                break
            taken.append(batch)
        next_offset = taken[-1][0] + taken[-1][1]
        frame = b"".join(frame for _, _, frame in taken)
        bytes_left = request.bytes_max - len(frame)
        stays = request.stays and next_offset == log.next_offset and bytes_left > STAYS_BYTES_MIN
        if stays:
            self._hold(session, msgspec.structs.replace(request, offset=next_offset, bytes_max=bytes_left))
        return Pulled(request.number, PullStatus.FOUND, next_offset, *self._ends(request.topic, log), stays), [frame]

    def _hold(self, session: Session, request: Pull) -> None:
        assert self.loop is not None
        self.held.append((session, request))
        self.loop.call_later(request.wait_ms, lambda: self._end_pull(session, request))

    def _try_pull(self, session: Session, request: Pull) -> None:
        try:
            reply, frames = self._do_Pull(session, request)
        except ZrmqError as error:
            reply, frames = Failed(request.number, int(error.code), error.message), []
        if reply is not None:
            self.endpoint.send(session.peer, [encode(reply), *frames])

    def _ends(self, topic: str, log: Log) -> tuple[int, int, int]:
        flushed_offset = log.next_offset if self.flushed_until is None else self.flushed_until
        return log.min_offset, log.next_offset, 0 if topic in self.unflushed else flushed_offset

    def _end_pull(self, session: Session, request: Pull) -> None:
        if (session, request) in self.held:
            self.held.remove((session, request))
            log = self.topics[request.topic][request.queue_id]
            reply = Pulled(request.number, PullStatus.NOTHING, request.offset, *self._ends(request.topic, log))
            self.endpoint.send(session.peer, [encode(reply)])


class ReadyList:
    """A ready queue without threads."""

    def __init__(self) -> None:
        self.items: deque[Ready] = deque()

    def put(self, item: Ready) -> None:
        self.items.append(item)

    def take(self, timeout_s: float | None) -> tuple[Ready] | None:
        return (self.items.popleft(),) if self.items else None


def by_turns(group: str, client_id: str, queues: Any, members: Any) -> list[MessageQueue]:
    """The strategy of these tests: queue k goes to member k modulo their number."""
    return list(queues[members.index(client_id) :: len(members)])


class Member:
    """One consumer: its core on a loop of its own, and a caller that takes and finishes when the test says so.

    `eager` ones take and finish whatever comes, every `eager` ms.
    """

    def __init__(
        self,
        cluster: ReadingCluster,
        name: str,
        *,
        eager: float = 0.0,
        in_order: bool = False,
        instance_name: str = "",
        **config: Any,
    ) -> None:
        self.cluster = cluster
        self.loop = cluster.network.loop(name)
        self.seen: list[Message] = []
        self.started_ms: float | None = None
        self.is_closed = False
        full = ConsumingConfig(
            client_id=name,
            **{
                "group": "reports", "filters": {"meters": "*"}, "allocation": by_turns, "bounds": Bounds(32 << 20, 100_000),
                "commit_interval_ms": 1_000, **config,
            },
        )
        self.config = full
        identity = Identity(name, "consumer", full.group, instance_name)
        rng = random.Random(cluster.network.rng.random())
        self.instance = ClientInstance(self.loop, [NAMESERVER], identity, rng)
        self.inbox = Inbox(
            ReadyList(), nullcontext(), self.loop.clock, lambda: self.loop.call_soon_threadsafe(self.core.look), in_order=in_order
        )
        self.core = ConsumerCore(self.loop, full, self.inbox, self.instance, rng, on_started=self._started)
        self._eager_ms = eager
        if eager:
            self.loop.call_later(eager, self._consume)

    def _started(self) -> None:
        assert self.started_ms is None or self.config.is_assigned, "once, or once for each assignment"
        self.started_ms = self.cluster.network.now_ms

    def _consume(self) -> None:
        self.loop.call_later(self._eager_ms, self._consume)
        while (unit := self.take()) is not None:
            self.inbox.done(unit)

    @property
    def queues(self) -> list[MessageQueue]:
        """What it reads now."""
        return sorted(self.core.reader.readings)

    def reading(self, queue: MessageQueue) -> ProcessQueue:
        return self.core.reading(queue).process_queue

    def take(self, messages_max: int = 1_000) -> Unit | None:
        """What is there, without waiting."""
        unit = self.inbox.take(0.0, lambda queue: messages_max)
        if unit is not None:
            self.seen += unit.messages
        return unit

    def take_all(self) -> list[Unit]:
        units = []
        while (unit := self.take()) is not None:
            units.append(unit)
        return units

    def close(self) -> None:
        """Leave politely."""
        self.core.close(lambda: self.instance.close(self._closed), 1_000)
        self.cluster.network.run_until(lambda: self.is_closed)
        self.loop.close()

    def _closed(self) -> None:
        self.is_closed = True

    def crash(self) -> None:
        """Gone, without a word."""
        self.loop.close()


class ReadingCluster:
    """A network with a NameServer and as many brokers as asked for."""

    def __init__(self, brokers: int = 1, *, seed: int = 7, auto_create: bool = True) -> None:
        self.network = MemoryNetwork(random.Random(seed))
        self.nameserver = NameServerCore(self.network.loop("nameserver"), NAMESERVER, random.Random(seed), start_grace_ms=0)
        self.brokers = [
            ReadingBroker(self.network, f"broker-{letter}", 10_911 + 10 * at, auto_create=auto_create)
            for at, letter in enumerate("abcdef"[:brokers])
        ]
        for broker in self.brokers:
            broker.start()
        self.run_for(50)

    @property
    def broker(self) -> ReadingBroker:
        return self.brokers[0]

    def add_topic(self, topic: str = "meters", queue_count: int = 2) -> None:
        """At every broker."""
        for broker in self.brokers:
            broker.add_topic(topic, queue_count)
        self.run_for(50)

    def member(self, name: str, **options: Any) -> Member:
        """A consumer that begins now."""
        return Member(self, name, **options)

    def started(self, name: str, **options: Any) -> Member:
        """A consumer that has started and read what it will read."""
        member = Member(self, name, **options)
        self.run_until(lambda: member.started_ms is not None)
        return member

    def run_until(self, condition: Callable[[], bool], limit_ms: float = 60_000.0) -> None:
        self.network.run_until(condition, limit_ms)

    def run_for(self, duration_ms: float) -> None:
        self.network.run_for(duration_ms)
