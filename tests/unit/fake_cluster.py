"""A cluster in memory for tests of producers: the real NameServer, and brokers that only know how to store batches.

A `StoringBroker` checks, recognises and refuses as the real broker does, keeps what it stored over `crash` and `start`, can be
told to refuse, to be slow, or to lose its answers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from zrmq.client.registration import Registration
from zrmq.errors import Code, InvalidFrameError, NoSessionError, OutOfOrderError, TopicNotFoundError, ZrmqError
from zrmq.message import FlushMode
from zrmq.protocol import limits
from zrmq.protocol.batch import BatchHeader, decode_records, open_batch
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    Alive,
    BrokerInfo,
    Bye,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Limits,
    PutTopic,
    Reply,
    Request,
    Send,
    Sent,
    TopicInfo,
    TopicRoute,
    Topics,
    Welcome,
    decode_request,
    encode,
)
from zrmq.routing.core import NameServerCore
from zrmq.transport.memory import MemoryLoop, MemoryNetwork
from zrmq.transport.sessions import SessionTable

NAMESERVER = "tcp://127.0.0.1:9876"
LIMITS = Limits(
    limits.BODY_BYTES_MAX, limits.BATCH_BYTES_MAX, limits.BATCH_RECORDS_MAX, limits.INFLIGHT_BATCHES_MAX, limits.PULL_BYTES_MAX
)


class Entry(NamedTuple):
    """One stored batch."""

    header: BatchHeader
    base_offset: int
    bodies: list[bytes]


class StoringBroker:
    """One broker of the fake cluster. `logs` has what it stored, per topic and queue id."""

    def __init__(self, network: MemoryNetwork, name: str, port: int, *, queue_count: int = 2, auto_create: bool = True) -> None:
        self.network = network
        self.name = name
        self.address, self.ingest_address = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"
        self.auto_create = auto_create
        self.queue_count = queue_count
        self.topics: dict[str, TopicConfig] = {}
        self.logs: defaultdict[tuple[str, int], list[Entry]] = defaultdict(list)
        self.one_way: list[Entry] = []
        self.sends: list[Send] = []
        self.refuse: Callable[[Send], ZrmqError | None] = lambda request: None
        self.limits = LIMITS
        self.answer_after_ms = 0.0
        self.loses_answers = False
        self.epoch = 0
        self.loop: MemoryLoop | None = None

    # --- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and register; with the topics and logs of before."""
        self.epoch += 1
        self.loop = loop = self.network.loop(self.name)
        self.sessions = SessionTable(loop.clock.monotonic_ms())
        self.endpoint = loop.listen(self.address, self.handle)
        loop.listen_pull(self.ingest_address, self.ingest)
        info = BrokerInfo("test", self.name, 0, "MASTER", self.epoch, self.address, self.ingest_address)
        self.registration = Registration(loop, [NAMESERVER], info, self._routes, self.network.rng)

    def crash(self) -> None:
        """Gone, without a word."""
        assert self.loop is not None
        self.loop.close()
        self.loop = None

    def add_topic(self, topic: str, **config: Any) -> None:
        """Have it."""
        self.topics[topic] = TopicConfig(topic, **{"queue_count": self.queue_count, **config})
        if self.loop is not None:
            self.registration.topics_changed()

    def delete_topics(self) -> None:
        """All of them, with their messages."""
        self.topics.clear()
        self.logs.clear()
        self.registration.topics_changed()

    def _routes(self) -> tuple[int, Callable[[], list[TopicRoute]]]:
        routes = [TopicRoute(topic, self.name, config.queue_count, config.permission) for topic, config in self.topics.items()]
        return len(routes) + 1, lambda: routes

    # --- requests -------------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from the ROUTER."""
        request: Any = decode_request(frames[0])
        try:
            reply: Reply = self._answer(peer, request, frames)
        except ZrmqError as error:
            reply = Failed(request.number, int(error.code), error.message, dict(error.facts))
        if isinstance(request, Send):
            if self.loses_answers:
                return
            if self.answer_after_ms:
                assert self.loop is not None
                self.loop.call_later(self.answer_after_ms, lambda: self._tell(peer, reply))
                return
        self._tell(peer, reply)

    def ingest(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from the PULL."""
        request = decode_request(frames[0])
        assert isinstance(request, Send)
        header = open_batch(frames[1])
        self.one_way.append(Entry(header, -1, decode_records(header, frames[1]).bodies))

    def _tell(self, peer: bytes, reply: Reply) -> None:
        self.endpoint.send(peer, [encode(reply)])

    def _answer(self, peer: bytes, request: Request, frames: list[bytes]) -> Reply:
        assert self.loop is not None
        now_ms = self.loop.clock.monotonic_ms()
        if isinstance(request, Hello):
            self.sessions.open(request, peer, now_ms)
            return Welcome(
                request.number, limits.PROTOCOL_VERSION, f"{self.name}@{self.epoch}", self.name, 0, 10_000, 1_000, self.limits
            )
        session = self.sessions.by_peer(peer)
        if session is None:
            raise NoSessionError("Say HELLO first.")
        self.sessions.touch(session, now_ms)
        if isinstance(request, Send):
            return self._store(request, frames[1])
        if isinstance(request, PutTopic):
            return self._put_topic(request)
        if isinstance(request, Bye):
            self.sessions.close(session)
            return Done(request.number)
        assert isinstance(request, Heartbeat)
        return Alive(request.number, 0)

    def _put_topic(self, request: PutTopic) -> Reply:
        topic = request.config.topic
        if topic not in self.topics:
            if not self.auto_create:
                raise TopicNotFoundError(f"Topic {topic!r} does not exist at {self.name}.")
            self.add_topic(topic)
        return Topics(request.number, [TopicInfo(self.topics[topic], 1, [])])

    def _store(self, request: Send, frame: bytes) -> Reply:
        self.sends.append(request)
        config = self.topics.get(request.topic)
        if config is None:
            raise TopicNotFoundError(f"Topic {request.topic!r} does not exist at {self.name}.")
        if request.queue_id >= config.queue_count:
            raise InvalidFrameError("No such queue.", code=Code.BAD_REQUEST)
        header = open_batch(frame)
        log = self.logs[request.topic, request.queue_id]
        remembered = [entry for entry in log if entry.header.producer_id == header.producer_id][-limits.INFLIGHT_BATCHES_MAX :]
        for entry in remembered:
            if entry.header.first_sequence == header.first_sequence:
                return Sent(request.number, entry.base_offset, 1_000, FlushMode.SYNC, True)
        if request.follows and request.follows not in {entry.header.last_sequence for entry in remembered}:
            raise OutOfOrderError(f"The batch follows {request.follows}.")
        error = self.refuse(request)
        if error is not None:
            raise error
        base_offset = sum(entry.header.record_count for entry in log)
        log.append(Entry(header, base_offset, decode_records(header, frame).bodies))
        return Sent(request.number, base_offset, 1_000, FlushMode.SYNC)

    # --- what tests ask -------------------------------------------------------------------------------------------------

    @property
    def bodies(self) -> list[bytes]:
        """Every stored body, queue by queue."""
        return [body for _, log in sorted(self.logs.items()) for entry in log for body in entry.bodies]

    def check_log(self) -> None:
        """No batch twice in this broker, whatever the queue."""
        seen = [(entry.header.producer_id, entry.header.first_sequence) for log in self.logs.values() for entry in log]
        assert len(seen) == len(set(seen)), f"{self.name} stored a batch twice: {seen}"


class FakeCluster:
    """A NameServer and storing brokers on one network."""

    def __init__(self, *names: str, seed: int = 1, **options: Any) -> None:
        self.network = MemoryNetwork(random.Random(seed))
        self.nameserver = self.network.loop("nameserver")
        self.nameserver_core = NameServerCore(self.nameserver, NAMESERVER, self.network.rng, start_grace_ms=0)
        self.brokers = {
            name: StoringBroker(self.network, name, 20_000 + 10 * index, **options) for index, name in enumerate(names)
        }
        for broker in self.brokers.values():
            broker.start()

    def __getitem__(self, name: str) -> StoringBroker:
        return self.brokers[name]

    @property
    def bodies(self) -> list[bytes]:
        """Every stored body of every broker."""
        return [body for broker in self.brokers.values() for body in broker.bodies]
