"""The producers of a run: the real core and accumulator, and a program that sends at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

from zrmq.client.accumulator import Accumulator, AccumulatorConfig
from zrmq.client.batch import Batch, Extras, OneWay, SendHandle, Target
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.producing import ProducerCore, ProducingConfig
from zrmq.errors import BufferFullError, ZrmqError
from zrmq.message import MessageQueue, SendReceipt
from zrmq.testing.simulation.callers import BESIDES_BYTES, Callers
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.promises import Posting
from zrmq.testing.simulation.threads import Threads, TurnLock

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

BUFFER_BYTES = 64 * 1024
PREPARE_MS = 3_000
PROBE_BYTES = 32
PROBE_TIMEOUT_MS = 60_000
TAGS = (None, "a", "b", "c")
MESSAGE_GROUPS = ("red", "green", "blue")


class VirtualAccumulator(Accumulator):
    """Says which batch a lane hands over, which only its caller's thread and the loop's would know."""

    on_handed_over: Callable[[Batch], None]

    def encoded_batch(
        self, target: Target, producer_id: int, sequence: int, frame: bytes, size_bytes: int, deadline_ms: float
    ) -> Batch:
        """As there."""
        batch = super().encoded_batch(target, producer_id, sequence, frame, size_bytes, deadline_ms)
        self.on_handed_over(batch)
        return batch


class VirtualProducer:
    """One producer, from its start to its crash or the end of the run."""

    def __init__(self, world: World, name: str, life: int) -> None:
        self.name = name
        self.who = f"{name}#{life}"
        self.open_count = 0  # postings without an answer
        self.is_working = True
        self.ready: list[str] = []  # topics that it may send to
        self._world = world
        self._numbers: Counter[str] = Counter()  # postings so far, by sender
        self._rng = rng = Random(f"{world.plan.seed} {self.who}")
        plan = world.plan
        self.machine: Machine = world.network.machine(name)
        self.threads = threads = Threads(self.machine)
        self.producer_id = rng.getrandbits(63) | 1
        world.promises.producer_ids[self.who] = {self.producer_id}
        config = AccumulatorConfig(
            self.producer_id, BUFFER_BYTES, block_when_full=plan.work.calls is not None, batch_records_max=plan.batch_records_max,
            batch_bytes_max=min(plan.segment_bytes // 2, 64 * 1024), linger_ms=plan.linger_ms, compress=rng.random() < 0.2,
            timeout_ms=plan.send_timeout_ms,
        )
        self.accumulator = VirtualAccumulator(
            config, self.machine.clock, new_lock=lambda: TurnLock(threads), new_owned_lock=lambda: TurnLock(threads),
            wake=self._wake, may_wait=lambda: threads.current is not None,
        )
        identity = Identity(self.who, "producer", "senders")
        self._instance = ClientInstance(self.machine, world.nameserver_addresses, identity, rng)
        self.core = ProducerCore(self.machine, self.accumulator, ProducingConfig(), self._instance, rng)
        self._instance.listener = self.core
        for topic in plan.topics:
            self._prepare(topic.name)
        if plan.work.calls is None or not plan.work.calls.is_alone:
            self._send_later()
        if plan.work.calls is not None:
            Callers(world, self, plan.work.calls)
        world.note(self.who, "started")

    def crash(self) -> None:
        """End without a word."""
        self._world.note(self.who, "crashed", f"unanswered={self.open_count}")
        self.machine.close()
        self.threads.end()

    # --- sending ------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self.machine.call_soon_threadsafe(self.core.wake)

    def _prepare(self, topic: str) -> None:
        self.core.prepare(topic, PREPARE_MS, partial(self._prepared, topic))

    def _prepared(self, topic: str, error: ZrmqError | None) -> None:
        if error is None:
            self.ready.append(topic)
        else:
            self.machine.call_later(500.0, partial(self._prepare, topic))

    def _send_later(self) -> None:
        self.machine.call_later(self._rng.expovariate(1.0 / self._world.plan.send_every_ms), self._send_some)

    def _send_some(self) -> None:
        if not self.is_working:
            return
        self._send_later()
        if self.ready:
            for _ in range(self._rng.randint(1, self._world.plan.burst_max)):
                self.send_async(self.who, *self.draw(self._rng.choice(self.ready), self._rng))

    @property
    def is_ready(self) -> bool:
        """Whether it may send to every topic."""
        return len(self.ready) == len(self._world.plan.topics)

    def probe(self, queue: MessageQueue) -> Posting:
        """Send one message to this queue, which every filter of the plan lets through."""
        posting = self.send_async(self.who, queue, Extras("a", (), None, None), PROBE_BYTES, PROBE_TIMEOUT_MS)
        assert posting is not None  # nothing else is in the buffer
        return posting

    def draw(self, topic: str, rng: Random) -> tuple[Target, Extras | None, int]:
        """Where a message of the topic goes, what it has besides its body, and how large that is."""
        target, extras = self._draw_target(topic, rng)
        return target, extras, rng.randint(*self._world.plan.body_bytes)

    def _draw_target(self, topic: str, rng: Random) -> tuple[Target, Extras | None]:
        tag = rng.choice(TAGS)
        luck = rng.random()
        queues = self.core.route.queues(topic) if self.core.route is not None else []
        if luck < 0.6 or not queues:
            return topic, None if tag is None else Extras(tag, (), None, None)
        if luck < 0.7:
            return rng.choice(queues), Extras(tag, ("key",), {"n": "1"}, None)
        if luck < 0.75:
            return OneWay(topic), Extras(tag, (), None, None)
        group = rng.choice(MESSAGE_GROUPS)
        writable = self._world.all_queues(topic)
        return writable[crc32(group.encode()) % len(writable)], Extras(tag, (), None, group)

    def post(self, sender: str, target: Target, extras: Extras | None, size: int) -> Posting:
        """A new message, which may be stored from now on."""
        number = self._numbers[sender]
        self._numbers[sender] += 1
        posting = Posting(sender, number, target, None if extras is None else extras.tag)
        posting.body = f"{sender}:{number}:".encode().ljust(size, b".")
        posting.posted_ms = self._world.network.now_ms
        self._world.promises.postings[posting.body] = posting
        self.open_count += 1
        return posting

    def send_async(
        self, sender: str, target: Target, extras: Extras | None, size: int, timeout_ms: int | None = None
    ) -> Posting | None:
        """Hand one message over, unless the buffer is full."""
        posting = self.post(sender, target, extras, size)
        timeout_ms = timeout_ms or self._world.plan.send_timeout_ms
        try:
            posting.handle = self.accumulator.append(target, posting.body, size + BESIDES_BYTES, extras, timeout_ms)
        except BufferFullError:
            self.withdraw(posting)
            return None
        posting.handle.add_done_callback(partial(self.answered, posting))
        return posting

    def withdraw(self, posting: Posting) -> None:
        """There was no room for it."""
        del self._world.promises.postings[posting.body]
        self.open_count -= 1

    def answered(self, posting: Posting, handle: SendHandle) -> None:
        """It is done."""
        try:
            outcome: SendReceipt | ZrmqError = handle.result(0)
        except ZrmqError as error:
            outcome = error
        self.settle(posting, outcome)

    def settle(self, posting: Posting, outcome: SendReceipt | ZrmqError) -> None:
        """Its sender knows what became of it."""
        self.open_count -= 1
        if isinstance(outcome, ZrmqError):
            self._world.note(self.who, "send_failed", f"{posting.number} {outcome.code.name}")
        elif posting.kind is OneWay:
            return
        else:
            place = f"{outcome.broker_name}/{outcome.topic}/{outcome.queue_id}@{outcome.queue_offset}"
            self._world.note(self.who, "acknowledged", f"{posting.number} {place}{' duplicate' if outcome.duplicate else ''}")
        self._world.answered(posting, outcome)
