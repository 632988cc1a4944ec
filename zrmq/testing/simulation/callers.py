"""Threads of a producer's program that send and wait, as most scripts do: by the real lanes, over virtual lines."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from zrmq.client.batch import Batch, Extras, OneWay, Run, SendHandle, Span
from zrmq.client.lanes import Lanes
from zrmq.client.link import Identity
from zrmq.errors import BufferFullError, ZrmqError
from zrmq.message import MessageQueue
from zrmq.testing.simulation.promises import Posting
from zrmq.testing.simulation.threads import TurnLock, VirtualLine, VirtualThread
from zrmq.testing.simulation.work import CallPlan
from zrmq.transport.lane import Lane

if TYPE_CHECKING:
    from zrmq.testing.simulation.producers import VirtualProducer
    from zrmq.testing.simulation.world import World

ASYNC_MAX = 3
BESIDES_BYTES = 64  # of the buffer, for what a message has besides its body
LIST_RECORDS_MAX = 20


class Callers:
    """All such threads of one producer."""

    def __init__(self, world: World, producer: VirtualProducer, plan: CallPlan) -> None:
        self._world = world
        self._producer = producer
        self._plan = plan
        self._threads = threads = producer.threads
        self._sending: dict[VirtualThread | None, Posting] = {}  # by a lane, or handed over by one
        lane_id = producer.producer_id ^ 1
        identity = Identity(f"{producer.who}-lane", "producer", "senders")
        self._lanes = Lanes(
            producer.core, producer.accumulator, lane_id,
            open_lane=lambda address: Lane(VirtualLine(threads, address), address, identity, producer.machine.clock),
            post=producer.machine.call_soon_threadsafe,
            new_lock=lambda: TurnLock(threads), new_owned_lock=lambda: TurnLock(threads),
        )
        producer.accumulator.on_handed_over = self._handed_over
        for number in range(plan.threads):
            sender = f"{producer.who}/{number}"
            world.promises.producer_ids[sender] = {producer.producer_id, lane_id}
            threads.start(partial(self._work, sender))

    def _work(self, sender: str) -> None:
        rng = Random(f"{self._world.plan.seed} {sender}")
        producer = self._producer
        while True:
            self._threads.sleep(rng.expovariate(1.0 / self._plan.send_every_ms))
            if not producer.is_working:
                return
            if not producer.ready:
                continue
            luck = rng.random()
            target, extras, size = producer.draw(rng.choice(producer.ready), rng)
            if luck < 0.2 or isinstance(target, OneWay):
                for _ in range(rng.randint(1, ASYNC_MAX)):
                    producer.send_async(sender, target, extras, size)
            elif luck < 0.3:
                self._send_batch(sender, target, extras, [size] * rng.randint(1, LIST_RECORDS_MAX))
            else:
                self._send(sender, target, extras, size)

    def _send(self, sender: str, target: str | MessageQueue, extras: Extras | None, size: int) -> None:
        """As `Producer.send`."""
        producer, timeout_ms = self._producer, self._world.plan.send_timeout_ms
        posting = producer.post(sender, target, extras, size)
        self._sending[self._threads.current] = posting
        receipt = None
        try:
            if producer.accumulator.is_idle(posting.topic):
                receipt = self._lanes.send(target, posting.body, size + BESIDES_BYTES, extras, timeout_ms)
            if receipt is None:
                posting.handle = producer.accumulator.append(
                    target, posting.body, size + BESIDES_BYTES, extras, timeout_ms
                )
                receipt = posting.handle.result()
        except BufferFullError:
            producer.withdraw(posting)
        except ZrmqError as error:
            producer.settle(posting, error)
        else:
            producer.settle(posting, receipt)

    def _handed_over(self, batch: Batch) -> None:
        self._sending[self._threads.current].handle = SendHandle(batch, 0)

    def _send_batch(self, sender: str, target: str | MessageQueue, extras: Extras | None, sizes: list[int]) -> None:
        """As `Producer.send_batch`, whose records need not be in one batch."""
        producer = self._producer
        postings = [producer.post(sender, target, extras, size) for size in sizes]
        spans: list[Span] = []
        run = Run(
            target, [posting.body for posting in postings], [size + BESIDES_BYTES for size in sizes],
            None if extras is None else [extras] * len(sizes),
        )
        with suppress(BufferFullError):  # those that are in are sent
            producer.accumulator.append_all([run], self._world.plan.send_timeout_ms, spans)
        handles = [SendHandle(span.batch, span.first + index) for span in spans for index in range(span.count)]
        for posting, handle in zip(postings, handles, strict=False):
            posting.handle = handle
            handle.add_done_callback(partial(producer.answered, posting))
        for posting in postings[len(handles) :]:
            producer.withdraw(posting)
        for span in spans:
            span.batch.wait(None)
