"""A broker's core in the open: a store on an in-memory disk, a clock turned by hand, and clients that ask and read answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from zrmq.errors import StoreFailedError
from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol.batch import Columns, decode_records, encode_batch, iter_batches
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    AcquireLease,
    AnyReply,
    Failed,
    Hello,
    JoinGroup,
    Pull,
    Pulled,
    PutTopic,
    Reply,
    Request,
    Send,
    Subscription,
    Welcome,
    decode_reply,
    encode,
)
from zrmq.serving.context import ServingConfig
from zrmq.serving.core import BrokerCore
from zrmq.store.store import Store, StoreConfig
from zrmq.testing.clock import ManualClock
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/broker")
SEGMENT_BYTES = 1 << 20


class BrokerDesk:
    """A broker core whose peers are names. `turn` writes and flushes, as the end of a reactor's turn does."""

    def __init__(self, files: FaultyFiles | None = None, clock: ManualClock | None = None, **config: Any) -> None:
        self.files = files or FaultyFiles(seed=1)
        self.clock = clock or ManualClock()
        self.config = ServingConfig("broker-a", "test", **config)
        self.sent: dict[bytes, list[list[bytes]]] = {}
        self.gone: set[bytes] = set()
        self.not_reading: set[bytes] = set()
        self.topics_changed = 0
        self.open()

    def open(self) -> None:
        self.store = Store.open(
            FOLDER, files=self.files, clock=self.clock, config=StoreConfig(segment_bytes=SEGMENT_BYTES), broker_name="broker-a",
            cluster="test",
        )
        self.core = BrokerCore(self.store, self.clock, self.config, self._send, self._has_room, self._topics_changed)
        self.turn()

    def crash(self) -> None:
        """Power off and on: sessions and unflushed writes are gone."""
        self.files.crash()
        self.sent.clear()
        self.open()

    def restart(self, **changes: Any) -> None:
        """A clean stop and a start, configured anew: sessions are gone."""
        self.store.close()
        self.config = msgspec.structs.replace(self.config, **changes)
        self.sent.clear()
        self.open()

    def turn(self, flush: bool = True) -> None:
        with suppress(StoreFailedError):  # as a broker does: whoever waits is told
            self.store.write()
            job = self.store.begin_flush() if flush else None
            if job is not None:
                job.run()
                job.finish()
        self.core.after_commit()

    def pass_ms(self, ms: float, step_ms: float = 250) -> None:
        """Let time pass in ticks."""
        while ms > 0:
            self.clock.advance(min(step_ms, ms))
            ms -= step_ms
            self.core.tick()
            self.turn()

    def client(self, client_id: str, role: str = "admin", group: str = "", instance_name: str = "", epoch: int = 1) -> DeskClient:
        return DeskClient(self, client_id, role, group, instance_name, epoch)

    def topic(self, topic: str, **config: Any) -> None:
        """Create a topic."""
        self.client("topic-maker", epoch=self.clock.time_ms() + self.topics_changed).ask(PutTopic, TopicConfig(topic, **config))

    def _send(self, peer: bytes, frames: Sequence[Any]) -> bool:
        if peer in self.gone:
            return False
        self.sent.setdefault(peer, []).append([bytes(frame) for frame in frames])
        return True

    def _has_room(self, peer: bytes) -> bool:
        return peer not in self.not_reading

    def _topics_changed(self) -> None:
        self.topics_changed += 1


class DeskClient:
    """One connection with a session."""

    def __init__(self, desk: BrokerDesk, client_id: str, role: str, group: str, instance_name: str, epoch: int) -> None:
        self.desk, self.client_id, self.peer = desk, client_id, f"{client_id}#{epoch}".encode()
        self._number = 0
        self._sequence = 1
        self.hello = self.ask(Hello, 1, client_id, epoch, role, group, instance_name)
        assert isinstance(self.hello, Welcome | Failed)

    def post(self, kind: type[Request], *fields: Any, payload: Sequence[bytes] = (), timeout_ms: int = 3000) -> int:
        """Send a request without waiting; returns its number."""
        self._number += 1
        self.desk.core.handle(self.peer, [encode(kind(self._number, timeout_ms, *fields)), *payload])
        return self._number

    def ask(self, kind: type[Request], *fields: Any, payload: Sequence[bytes] = (), timeout_ms: int = 3000) -> Any:
        """Send a request and return its reply after one turn; None when it is held."""
        number = self.post(kind, *fields, payload=payload, timeout_ms=timeout_ms)
        self.desk.turn()
        return self.reply(number)

    def inbox(self) -> list[tuple[AnyReply, list[bytes]]]:
        return [(decode_reply(frames[0]), frames[1:]) for frames in self.desk.sent.get(self.peer, [])]

    def reply(self, number: int) -> Any:
        """The one reply to a request, None when there is none yet."""
        found = [reply for reply, _ in self.inbox() if reply.number == number]
        assert len(found) <= 1, f"request {number} was answered {len(found)} times"
        return found[0] if found else None

    def answers(self, number: int) -> list[Any]:
        """All replies to a pull that stays, so far."""
        return [reply for reply, _ in self.inbox() if reply.number == number]

    def payload(self, number: int) -> list[bytes]:
        return next(payload for reply, payload in self.inbox() if reply.number == number)

    @property
    def payload_count(self) -> int:
        """How many replies brought one."""
        return sum(1 for _, payload in self.inbox() if payload)

    def notices(self) -> list[Reply]:
        return [reply for reply, _ in self.inbox() if reply.number == 0]

    # --- what clients do ----------------------------------------------------------------------------------------------

    def batch(self, bodies: Sequence[bytes], tag: str | None = None, sequence: int | None = None) -> bytes:
        """A batch of these bodies with the next sequences of this client."""
        first = self._sequence if sequence is None else sequence
        if sequence is None:
            self._sequence += len(bodies)
        tags = [tag] * len(bodies) if tag else None
        return encode_batch(
            Columns(list(bodies), tags),
            producer_id=hash_of(self.client_id), first_sequence=first, first_born_ms=5, last_born_ms=5,
        )

    def send(self, topic: str, queue_id: int, bodies: Sequence[bytes], tag: str | None = None) -> Any:
        return self.ask(Send, topic, queue_id, 0, payload=[self.batch(bodies, tag)])

    def pull(
        self, topic: str, queue_id: int, offset: int, wait_ms: int = 0, **more: Any
    ) -> tuple[Pulled | Failed | None, list[bytes]]:
        """Pull and return the reply with the bodies in it."""
        number = self.post(
            Pull, topic, queue_id, offset, more.pop("bytes_max", 1 << 20), wait_ms, more.pop("tag_mask", 0),
            more.pop("group", ""),
            more.pop("lease_epoch", 0),
        )
        self.desk.turn()
        reply = self.reply(number)
        return reply, self.bodies(number) if isinstance(reply, Pulled) else []

    def bodies(self, number: int) -> list[bytes]:
        return [
            body
            for frame in self.payload(number)
            for header, batch in iter_batches(frame)
            for body in decode_records(header, batch).bodies
        ]

    def join(
        self, *topics: str, model: MessageModel = MessageModel.CLUSTERING, expression: str = "*",
        consume_from: ConsumeFrom = ConsumeFrom.LATEST, timestamp_ms: int = 0, since_ms: Sequence[int] = (),
    ) -> Any:
        subscriptions = [Subscription(topic, expression) for topic in topics]
        return self.ask(JoinGroup, model, subscriptions, consume_from, timestamp_ms, list(since_ms))

    def acquire(self, topic: str, queue_id: int, timeout_ms: int = 3000) -> Any:
        return self.ask(AcquireLease, topic, queue_id, timeout_ms=timeout_ms)


def hash_of(client_id: str) -> int:
    """A producer id for a test client."""
    return int.from_bytes(client_id.encode()[:8].ljust(8, b"\0"), "little")


ASYNC = FlushMode.ASYNC
