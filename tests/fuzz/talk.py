"""What a hostile client says once it is in: valid requests with numbers that the server gave, most of them bent in one place.

A request that nobody bent keeps what others build on: topics are there, the group is joined, queues are leased, batches are
stored in their order. So the bent one gets as far as it can. HELLO is bent often too, and said properly soon after.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgpack
import msgspec

from tests.corpus.samples import BROKER, ROUTE
from tests.fuzz.mutation import bend_batch, bend_bytes, bend_value
from zrmq.message import MessageModel
from zrmq.protocol import requests
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import Leased, QueueOffset, Reply, Request, Subscription, encode

GROUP = "hostile"
TOPICS = {"meters": 8, "alarms": 2}
HELLO_EVERY = 60  # messages, at the latest; what is sent may end the session
TIMEOUTS_MS = (0, 50, 1_000)
BENT_HELLO_SHARE, WHOLE_SHARE, BENT_BYTES_SHARE = 0.12, 0.25, 0.1
PULL_BYTES = 16_384

# The sample's broker would be at ports where others may listen.
NOBODY = msgspec.structs.replace(BROKER, address="tcp://127.0.0.1:1", ingest_address="tcp://127.0.0.1:1")

Frames = list[bytes]


class Talk:
    """One client's side. `role` is that of its HELLO, `epoch` what its session's is beyond."""

    def __init__(self, rng: Random, name: str, role: str, epoch: int) -> None:
        self._rng = rng
        self._name = name
        self._role = role
        self._epoch = epoch
        self._number = 100
        self._since_hello = HELLO_EVERY
        self._to_build: list[Callable[[], Frames]] = []
        self._sequences: dict[tuple[str, int], int] = {}
        self._leases: dict[tuple[str, int], int] = {}  # epochs by queue
        self._asked: dict[int, tuple[str, int]] = {}  # queues by number of the request for a lease
        self._makers = [self._register, self._ask_route] if role == "broker" else [
            self._send, self._send, self._pull, self._pull, self._join, self._acquire, self._acquire, self._release, self._commit,
            self._commit, self._ask_offsets, self._ask_committed, self._ask_groups, self._ask_topics, self._ask_subscriptions,
            self._put, self._ask_broker, self._leave, self._delete,
        ]

    # --- what is said -------------------------------------------------------------------------------------------------

    def hello(self) -> Frames:
        """Open the session, on a connection that may have had another one."""
        self._epoch += 1
        self._since_hello = 0
        group = "" if self._role == "broker" else GROUP
        return [encode(requests.Hello(self._next(), 1_000, 1, self._name, self._epoch, self._role, group))]

    def next(self) -> Frames:
        """The frames of the next message."""
        if self._to_build:
            return self._to_build.pop(0)()
        rng = self._rng
        self._since_hello += 1
        if self._since_hello > HELLO_EVERY:
            self._to_build = [self._join, self._put] if self._role != "broker" else [self._register]
            return self.hello()
        if rng.random() < BENT_HELLO_SHARE:
            frames = self._bend(self.hello())
            self._to_build = [self.hello, *([self._join] if self._role != "broker" else [])]
            return frames
        frames = rng.choice(self._makers)()
        return frames if rng.random() < WHOLE_SHARE else self._bend(frames)

    def learn(self, reply: Reply) -> None:
        """The server's answer."""
        queue = self._asked.pop(reply.number, None)
        if isinstance(reply, Leased) and queue is not None:
            self._leases[queue] = reply.lease_epoch

    def _bend(self, frames: Frames) -> Frames:
        """In one place: a value behind the number, seldom before, the bytes, or the payload. Sometimes a frame is too many."""
        head, *payload = frames
        luck = self._rng.random()
        if payload and luck < 0.5:
            payload = [bend_batch(self._rng, payload)]
        elif luck > 1.0 - BENT_BYTES_SHARE:
            head = bend_bytes(self._rng, [head])
        else:
            head = msgpack.packb(bend_value(self._rng, msgpack.unpackb(head, strict_map_key=False), keep=2))
        return [head, *payload, *([b"x"] if self._rng.random() < 0.02 else [])]

    # --- requests -----------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _queue(self) -> tuple[str, int]:
        topic = self._rng.choice(sorted(TOPICS))
        return topic, self._rng.randrange(TOPICS[topic])

    def _say(self, kind: type[Request], *fields: object) -> Frames:
        return [encode(kind(self._next(), self._rng.choice(TIMEOUTS_MS), *fields))]

    def _send(self) -> Frames:
        queue = self._queue()
        first = self._sequences.get(queue, 1)
        bodies = [b"21.5"] * self._rng.randint(1, 4)
        self._sequences[queue] = first + len(bodies)
        columns = Columns(bodies, ["kitchen"] * len(bodies))
        batch = encode_batch(columns, producer_id=self._epoch, first_sequence=first, first_born_ms=1, last_born_ms=2)
        return [*self._say(requests.Send, *queue, self._rng.choice((0, 0, first - 1))), batch]

    def _pull(self) -> Frames:
        topic, queue_id = queue = self._queue()
        epoch = self._leases.get(queue, 0)
        offset, wait_ms, mask = self._rng.choice((0, 0, 1, 50)), self._rng.choice((0, 1_000)), self._rng.choice((0, 1 << 63))
        return self._say(requests.Pull, topic, queue_id, offset, PULL_BYTES, wait_ms, mask, GROUP if epoch else "", epoch)

    def _join(self) -> Frames:
        subscriptions = [Subscription(topic, "*") for topic in sorted(TOPICS)]
        return self._say(requests.JoinGroup, MessageModel.CLUSTERING, subscriptions)

    def _leave(self) -> Frames:
        self._to_build = [self._join]
        return self._say(requests.LeaveGroup)

    def _acquire(self) -> Frames:
        queue = self._queue()
        frames = self._say(requests.AcquireLease, *queue)
        self._asked[self._number] = queue
        return frames

    def _held(self) -> tuple[tuple[str, int], int]:
        queue = self._rng.choice(sorted(self._leases)) if self._leases else self._queue()
        return queue, self._leases.get(queue, 0)

    def _release(self) -> Frames:
        queue, epoch = self._held()
        return self._say(requests.ReleaseLease, *queue, epoch, self._rng.choice((-1, 0, 3)))

    def _commit(self) -> Frames:
        held = [self._held() for _ in range(self._rng.randint(1, 3))]
        offsets = [QueueOffset(*queue, self._rng.choice((0, 1, 5)), epoch) for queue, epoch in held]
        return self._say(requests.CommitOffsets, offsets, self._rng.random() < 0.3)

    def _ask_offsets(self) -> Frames:
        topic, queue_id = self._queue()
        return self._say(requests.QueryOffsets, topic, [0, queue_id], self._rng.choice((-2, -1, 0, 1 << 50)))

    def _ask_committed(self) -> Frames:
        return self._say(requests.QueryCommitted, self._queue()[0])

    def _ask_groups(self) -> Frames:
        return self._say(requests.DescribeGroups, [GROUP])

    def _ask_topics(self) -> Frames:
        return self._say(requests.DescribeTopics, sorted(TOPICS))

    def _ask_subscriptions(self) -> Frames:
        return self._say(requests.QuerySubscriptions, MessageModel.CLUSTERING, sorted(TOPICS))

    def _ask_broker(self) -> Frames:
        return self._say(requests.DescribeBroker)

    def _put(self) -> Frames:
        topic = self._rng.choice(sorted(TOPICS))
        return self._say(requests.PutTopic, TopicConfig(topic, TOPICS[topic]), self._rng.random() < 0.5)

    def _delete(self) -> Frames:
        """Of a topic that there is not, or of the one that most do without."""
        return self._say(requests.DeleteTopic, self._rng.choice(("nothing", "alarms")))

    def _register(self) -> Frames:
        return self._say(requests.RegisterBroker, NOBODY, self._number, [ROUTE])

    def _ask_route(self) -> Frames:
        return self._say(requests.QueryRoute, sorted(TOPICS), self._rng.choice((0, 7)))
