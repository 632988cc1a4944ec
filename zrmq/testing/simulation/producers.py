"""The producers of a run: the real core and accumulator, and a program that sends at random."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

from zrmq.client.accumulator import Accumulator, AccumulatorConfig
from zrmq.client.batch import Extras, OneWay, SendHandle, Target
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.producing import ProducerCore, ProducingConfig
from zrmq.errors import BufferFullError, ZrmqError
from zrmq.message import MessageQueue
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.promises import Posting

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

BUFFER_BYTES = 64 * 1024
PREPARE_MS = 3_000
PROBE_BYTES = 32
PROBE_TIMEOUT_MS = 60_000
TAGS = (None, "a", "b", "c")
MESSAGE_GROUPS = ("red", "green", "blue")


class NoLock:
    """The lock of a world with one thread."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True

    def release(self) -> None:
        """Nothing to do."""

    def _is_owned(self) -> bool:
        return False

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc_info: object) -> None:
        """Nothing to do."""


class VirtualProducer:
    """One producer, from its start to its crash or the end of the run."""

    def __init__(self, world: World, name: str, life: int) -> None:
        self.name = name
        self.who = f"{name}#{life}"
        self.postings: list[Posting] = []
        self.open_count = 0  # postings without an answer
        self.is_working = True
        self._world = world
        self._rng = rng = Random(f"{world.plan.seed} {self.who}")
        plan = world.plan
        self.machine: Machine = world.network.machine(name)
        self.producer_id = rng.getrandbits(63) | 1
        config = AccumulatorConfig(
            self.producer_id, BUFFER_BYTES, block_when_full=False, batch_records_max=plan.batch_records_max,
            batch_bytes_max=min(plan.segment_bytes // 2, 64 * 1024), linger_ms=plan.linger_ms, compress=rng.random() < 0.2,
            timeout_ms=plan.send_timeout_ms,
        )
        self.accumulator = Accumulator(
            config, self.machine.clock, new_lock=NoLock, new_owned_lock=NoLock, wake=self._wake, may_wait=lambda: False
        )
        identity = Identity(self.who, "producer", "senders")
        self._instance = ClientInstance(self.machine, world.nameserver_addresses, identity, rng)
        self._core = ProducerCore(self.machine, self.accumulator, ProducingConfig(), self._instance, rng)
        self._instance.listener = self._core
        self._ready: list[str] = []
        for topic in plan.topics:
            self._prepare(topic.name)
        self._send_later()
        world.note(self.who, "started")

    def crash(self) -> None:
        """End without a word."""
        self._world.note(self.who, "crashed", f"unanswered={self.open_count}")
        self.machine.close()

    # --- sending ------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self.machine.call_soon_threadsafe(self._core.wake)

    def _prepare(self, topic: str) -> None:
        self._core.prepare(topic, PREPARE_MS, partial(self._prepared, topic))

    def _prepared(self, topic: str, error: ZrmqError | None) -> None:
        if error is None:
            self._ready.append(topic)
        else:
            self.machine.call_later(500.0, partial(self._prepare, topic))

    def _send_later(self) -> None:
        self.machine.call_later(self._rng.expovariate(1.0 / self._world.plan.send_every_ms), self._send_some)

    def _send_some(self) -> None:
        if not self.is_working:
            return
        self._send_later()
        if self._ready:
            for _ in range(self._rng.randint(1, self._world.plan.burst_max)):
                self._send(self._rng.choice(self._ready))

    @property
    def is_ready(self) -> bool:
        """Whether it may send to every topic."""
        return len(self._ready) == len(self._world.plan.topics)

    def probe(self, queue: MessageQueue) -> Posting:
        """Send one message to this queue, which every filter of the plan lets through."""
        posting = self._post(queue, Extras("a", (), None, None), PROBE_BYTES, PROBE_TIMEOUT_MS)
        assert posting is not None  # nothing else is in the buffer
        return posting

    def _send(self, topic: str) -> None:
        target, extras = self._draw_target(topic)
        self._post(target, extras, self._rng.randint(*self._world.plan.body_bytes), self._world.plan.send_timeout_ms)

    def _post(self, target: Target, extras: Extras | None, size: int, timeout_ms: int) -> Posting | None:
        tag = None if extras is None else extras.tag
        number = len(self.postings)
        posting = Posting(self.who, self.producer_id, number, target, tag)
        posting.body = f"{self.who}:{number}:".encode().ljust(size, b".")
        posting.posted_ms = self._world.network.now_ms
        try:
            posting.handle = self.accumulator.append(target, posting.body, size + 64, extras, timeout_ms)
        except BufferFullError:
            return None
        self.postings.append(posting)
        self.open_count += 1
        self._world.promises.postings[posting.body] = posting
        posting.handle.add_done_callback(partial(self._answered, posting))
        return posting

    def _draw_target(self, topic: str) -> tuple[Target, Extras | None]:
        rng = self._rng
        tag = rng.choice(TAGS)
        luck = rng.random()
        queues = self._core.route.queues(topic) if self._core.route is not None else []
        if luck < 0.6 or not queues:
            return topic, None if tag is None else Extras(tag, (), None, None)
        if luck < 0.7:
            return rng.choice(queues), Extras(tag, ("key",), {"n": "1"}, None)
        if luck < 0.75:
            return OneWay(topic), Extras(tag, (), None, None)
        group = rng.choice(MESSAGE_GROUPS)
        writable = self._world.all_queues(topic)
        return writable[crc32(group.encode()) % len(writable)], Extras(tag, (), None, group)

    def _answered(self, posting: Posting, handle: SendHandle) -> None:
        self.open_count -= 1
        outcome: object
        try:
            outcome = handle.result(0)
        except ZrmqError as error:
            outcome = error
            self._world.note(self.who, "send_failed", f"{posting.number} {error.code.name}")
        else:
            if posting.kind is OneWay:
                return
            place = f"{outcome.broker_name}/{outcome.topic}/{outcome.queue_id}@{outcome.queue_offset}"
            self._world.note(self.who, "acknowledged", f"{posting.number} {place}{' duplicate' if outcome.duplicate else ''}")
        self._world.answered(posting, outcome)
