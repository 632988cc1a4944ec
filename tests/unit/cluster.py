"""NameServers and bare brokers on a virtual network, for tests of what clients see of a cluster."""

from __future__ import annotations

from random import Random
from typing import Any

from zrmq.client.registration import Registration
from zrmq.errors import Code
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    Alive,
    AnyRequest,
    BrokerInfo,
    Bye,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Limits,
    PutTopic,
    Reply,
    TopicInfo,
    TopicRoute,
    Topics,
    Welcome,
    decode_request,
    encode,
)
from zrmq.routing.core import NameServerCore
from zrmq.transport.memory import MemoryNetwork

LIMITS = Limits(1 << 22, 1 << 22, 1 << 16, 32, 1 << 23)


class BareBroker:
    """A broker that keeps sessions and topics and is registered; it stores nothing."""

    def __init__(
        self, network: MemoryNetwork, nameservers: list[str], name: str, epoch: int = 1, *, auto_create: bool = True,
        address: str = "", queue_count: int = 4, **topics: int,
    ) -> None:
        self.name, self.epoch, self.auto_create = name, epoch, auto_create
        self.topics = dict(topics)
        self.version = 1
        self.queue_count = queue_count
        self.refuse_with: Code | None = None
        self.heard: list[AnyRequest] = []
        self.client_ids: dict[bytes, str] = {}
        self.loop = network.loop(name)
        self.endpoint = self.loop.listen(address or f"tcp://{name}:10911", self.handle)
        info = BrokerInfo("east", name, 0, "MASTER", epoch, self.endpoint.address, "")
        self.register = lambda: Registration(self.loop, nameservers, info, self.list_topics, Random(epoch))
        self.registration = self.register()

    def list_topics(self) -> Any:
        return self.version, lambda: [TopicRoute(topic, self.name, count, 6) for topic, count in self.topics.items()]

    def put(self, topic: str, queue_count: int) -> None:
        """Create or change a topic."""
        self.topics[topic] = queue_count
        self.version += 1
        self.registration.topics_changed()

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        request = decode_request(frames[0])
        self.heard.append(request)
        if isinstance(request, Hello):
            self.client_ids[peer] = request.client_id
            self.send(peer, Welcome(request.number, 1, f"{self.name}@{self.epoch}", self.name, 0, 10_000, 1_000, LIMITS))
        elif peer not in self.client_ids:
            self.send(peer, Failed(request.number, Code.NO_SESSION, "Say HELLO."))
        elif isinstance(request, Heartbeat):
            self.send(peer, Alive(request.number, 0))
        elif isinstance(request, Bye):
            del self.client_ids[peer]
            self.send(peer, Done(request.number))
        elif isinstance(request, PutTopic):
            self.send(peer, self.create(request))

    def create(self, request: PutTopic) -> Reply:
        topic = request.config.topic
        if self.refuse_with is not None:
            return Failed(request.number, self.refuse_with, "It does not want to.")
        if topic not in self.topics and not self.auto_create:
            return Failed(request.number, Code.TOPIC_NOT_FOUND, f"{topic} does not exist.")
        if topic not in self.topics:
            self.put(topic, self.queue_count)
        return Topics(request.number, [TopicInfo(TopicConfig(topic, self.topics[topic]), 1, [])])

    def send(self, peer: bytes, reply: Reply) -> None:
        self.endpoint.send(peer, [encode(reply)])

    @property
    def creations(self) -> list[PutTopic]:
        """The requests to create a topic that came."""
        return [request for request in self.heard if isinstance(request, PutTopic)]

    def kill(self) -> None:
        """Crash."""
        self.loop.close()


class Cluster:
    """NameServers `n0`, `n1`, ... and brokers, all on one network."""

    def __init__(self, nameserver_count: int = 1, seed: int = 5) -> None:
        self.network = MemoryNetwork(Random(seed))
        self.nameservers = [f"tcp://n{number}:9876" for number in range(nameserver_count)]
        self.cores = [self.start_nameserver(number, 0.0) for number in range(nameserver_count)]
        self.network.run_for(500)

    def start_nameserver(self, number: int, start_grace_ms: float = 3_000.0) -> NameServerCore:
        """(Re)start the NameServer of this number."""
        loop = self.network.loop(f"n{number}")
        return NameServerCore(loop, self.nameservers[number], Random(number), start_grace_ms=start_grace_ms)

    def kill_nameserver(self, number: int) -> None:
        self.network.loops[f"n{number}"].close()

    def broker(self, name: str, epoch: int = 1, **options: Any) -> BareBroker:
        """A broker, registered at all NameServers that run."""
        made = BareBroker(self.network, self.nameservers, name, epoch, **options)
        running = [number for number in range(len(self.nameservers)) if f"n{number}" in self.network.loops]
        self.network.run_until(lambda: made.registration.registered_count >= len(running))
        return made
