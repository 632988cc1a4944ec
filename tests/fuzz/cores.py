"""Targets: whole messages to a broker's and a NameServer's core, before and after HELLO; a client can read each answer.

State stays from input to input, as a server's does; now and then a new server takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

from tests.corpus.samples import REPLIES, REQUESTS
from tests.fuzz.mutation import bend_batch, bend_bytes, bend_value
from tests.fuzz.probe import Target
from tests.unit.broker_desk import BrokerDesk
from zrmq.errors import Code
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.limits import FRAME_COUNT_MAX
from zrmq.protocol.requests import Failed, Hello, Send, decode_reply, encode
from zrmq.routing.core import NameServerCore
from zrmq.testing.clock import ManualClock

INPUTS_PER_SERVER = 2_000
PEERS = [b"stranger", b"c-1", b"c-2", b"c-3"]  # all but the first have said HELLO, until they say otherwise
BATCH = encode_batch(
    Columns([b"21.5", b"22"], ["kitchen", None]), producer_id=9, first_sequence=1, first_born_ms=1, last_born_ms=2
)
HEADERS = [encode(value) for value in REQUESTS] + [encode(value) for value in REPLIES[:3]]
HEADERS += [encode(Send(number, 1_000, "meters", number % 2)) for number in range(1, 5)]


class WrongAnswerError(Exception):
    """A server said that it failed, or said nothing that a client can read."""


def make_frames(rng: Random, seeds: Sequence[bytes]) -> list[bytes]:
    """The frames of one message: a header, mostly bent, and mostly the payload that belongs to it."""
    kind = rng.random()
    if kind < 0.15:
        return [rng.choice(seeds), bend_batch(rng, [BATCH])]
    header = msgpack.unpackb(rng.choice(seeds), strict_map_key=False)
    head = bend_bytes(rng, seeds) if kind < 0.25 else msgpack.packb(bend_value(rng, header, keep=3))
    payload = [] if rng.random() < 0.5 else [rng.choice((BATCH, b"", bend_batch(rng, [BATCH])))]
    if rng.random() < 0.05:
        payload = [b""] * rng.choice((2, 3, 100, FRAME_COUNT_MAX, FRAME_COUNT_MAX + 5))
    elif rng.random() < 0.01:
        payload = [bytes(1 << 20)]
    return [head, *payload]


def _bend(rng: Random, seeds: Sequence[bytes]) -> bytes:
    data: bytes = msgpack.packb([rng.randrange(len(PEERS)), rng.random() < 0.1, make_frames(rng, seeds)])
    return data


class BrokerServer:
    """A broker's core with topics and sessions."""

    def __init__(self) -> None:
        self.desk = BrokerDesk()
        self.desk.topic("meters", queue_count=8)
        self.desk.topic("alarms", queue_count=2)
        for number, peer in enumerate(PEERS[1:]):
            self.hello(peer, number + 1)
        self.desk.turn()

    def hello(self, peer: bytes, number: int) -> None:
        role = "consumer" if number < 3 else "producer"
        self.desk.core.handle(peer, [encode(Hello(1, 1_000, 1, peer.decode(), number, role, "reports" if number < 3 else ""))])

    def take(self, peer: bytes, frames: list[bytes], is_ingest: bool) -> None:
        if is_ingest:
            self.desk.core.ingest(b"", frames)
        else:
            self.desk.core.handle(peer, frames)
        self.desk.turn(flush=False)
        self.desk.pass_ms(1)
        answers = [(reply[0], reply[1:]) for replies in self.desk.sent.values() for reply in replies]
        self.desk.sent.clear()
        _check(answers)


class _Endpoint:
    """What a NameServer answers through."""

    address = "tcp://n:1"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, list[bytes]]] = []

    def send(self, peer: bytes, frames: Sequence[Any]) -> bool:
        self.sent.append((bytes(frames[0]), [bytes(frame) for frame in frames[1:]]))
        return True

    def has_room(self, peer: bytes) -> bool:
        return True

    def close(self) -> None: ...


class _Loop:
    """As much of a loop as a NameServer's core asks for; its timers are called by hand."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.endpoint = _Endpoint()
        self.timer: Callable[[], None] = lambda: None
        self.hooks: list[Callable[[], None]] = []

    def listen(self, address: str, handler: object) -> _Endpoint:
        return self.endpoint

    def call_later(self, delay_ms: float, callback: Callable[[], None]) -> _Loop:
        self.timer = callback
        return self

    def before_sleep(self, hook: Callable[[], None]) -> None:
        self.hooks.append(hook)

    def cancel(self) -> None: ...


class NameServerServer:
    """A NameServer's core with sessions."""

    def __init__(self) -> None:
        self.loop = _Loop()
        self.core = NameServerCore(self.loop, "tcp://n:1", Random(1), start_grace_ms=0)  # type: ignore[arg-type]
        for number, peer in enumerate(PEERS[1:]):
            self.core.handle(peer, [encode(Hello(1, 1_000, 1, peer.decode(), number + 1, "broker"))])

    def take(self, peer: bytes, frames: list[bytes], is_ingest: bool) -> None:
        self.core.handle(peer, frames)
        self.loop.clock.advance(1)
        if is_ingest:
            self.loop.clock.advance(100)
            self.loop.timer()
        for hook in self.loop.hooks:
            hook()
        answers, self.loop.endpoint.sent = self.loop.endpoint.sent, []
        _check(answers)


def _check(answers: list[tuple[bytes, list[bytes]]]) -> None:
    for header, _ in answers:
        reply = decode_reply(header)
        if isinstance(reply, Failed) and reply.code == Code.INTERNAL_ERROR:
            raise WrongAnswerError(reply.message)


def _serve(make: Callable[[], BrokerServer | NameServerServer]) -> Callable[[bytes], None]:
    servers: list[BrokerServer | NameServerServer] = []
    count = 0

    def take(data: bytes) -> None:
        nonlocal count
        if count % INPUTS_PER_SERVER == 0:
            servers[:] = [make()]
        count += 1
        number, is_ingest, frames = msgpack.unpackb(data)
        servers[0].take(PEERS[number], frames, is_ingest)

    return take


def _server_bytes(data: bytes) -> int:
    """What an input counts for memory: a server's tables and its disk in memory grow by more than one input at a time."""
    return len(data) + (1 << 17)


def targets() -> list[Target]:
    """One for each kind of server."""
    return [
        Target("broker", _serve(BrokerServer), HEADERS, _bend, _server_bytes),
        Target("nameserver", _serve(NameServerServer), HEADERS, _bend, _server_bytes),
    ]
