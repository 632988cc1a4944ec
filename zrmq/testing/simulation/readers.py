"""Readers that name their queues themselves, without membership and leases: in a group of their own, or without one.

Each is a `PullConsumer` that assigns all or some queues of its topics, and now and then others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from zrmq.client.consuming import ConsumerCore, ConsumingConfig
from zrmq.client.link import Identity, Link
from zrmq.client.reading import Reading
from zrmq.errors import ClosedError, ZrmqError
from zrmq.message import Message, MessageQueue
from zrmq.testing.simulation.plan import GroupPlan
from zrmq.testing.simulation.pullers import ASK_MS, Door, VirtualPuller
from zrmq.testing.simulation.read_check import ReadCheck
from zrmq.testing.simulation.trace import BrokenPromise, spell
from zrmq.testing.simulation.work import ReaderPlan
from zrmq.transport.threads import Latch

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

RETRY_MS = 1_000.0
AWAY_MS = 1_000.0  # mean time until a reader is started again
NOTHING_SHARE = 0.05  # of the times that other queues are named: none are


class WatchedCore(ConsumerCore):
    """Tells where a queue is read from, and that it was refused."""

    on_begun: Callable[[MessageQueue, int, int], None]
    on_end: Callable[[ZrmqError], None]

    def on_claimed(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int, topic_id: int = 0, *, goes_back: bool = False,
        flushed_offset: int = -1, committed_offset: int = -1,
    ) -> bool:
        is_taken = super().on_claimed(
            queue, link, offset, lease_epoch, topic_id, goes_back=goes_back, flushed_offset=flushed_offset,
            committed_offset=committed_offset,
        )
        if is_taken:
            self.on_begun(queue, topic_id, offset)
        return is_taken

    def on_refused(self, error: ZrmqError) -> None:
        super().on_refused(error)
        self.on_end(error)


class ReaderDoor(Door):
    """The door, which is started."""

    def __init__(self, reader: VirtualReader) -> None:
        super().__init__(reader)
        self._filters = {}
        self._engine: Any = reader

    def _check_usable(self) -> None:
        """It is."""

    def _await_start(self, engine: object) -> None:
        """What the caller would wait for is done at once: the world has one thread."""
        self._engine.core._rebalance()


class VirtualReader(VirtualPuller):
    """One reader, from its start to its crash, its close, or the end of the run."""

    _core_type = WatchedCore

    def __init__(self, world: World, group: GroupPlan, slot: int, life: int, reader: ReaderPlan) -> None:
        self.has_group = reader.has_group
        self.started = Latch()  # of an engine
        self._reader = reader
        self._chosen: list[MessageQueue] | None = None  # None: nothing was assigned yet
        self._reached: set[Reading] = set()  # whose brokers were there when it was closed
        self._failures = 0  # of last commits until then
        self._read_check = ReadCheck(world, f"{group.name}-{slot}#{life}", group, has_group=reader.has_group)
        super().__init__(world, group, slot, life, reader.pulls)
        assert isinstance(self.core, WatchedCore)
        self.core.on_begun, self.core.on_end = self._begun, self._refused
        self._await_topics(list(group.topics))
        if reader.assign_every_ms:
            self._later(reader.assign_every_ms, self._assign_others)
        if reader.end_every_ms:
            world.later(self._work_rng.expovariate(1.0 / reader.end_every_ms), self._end_somehow)

    @property
    def finishes_by_itself(self) -> bool:
        """There is nowhere to commit to without a group."""
        return self.pulls.auto_commit or not self.has_group

    def _make_door(self) -> Door:
        return ReaderDoor(self)

    def _identity(self) -> Identity:
        return Identity(self.who, "consumer", self.group.name if self.has_group else "")

    def _config(self) -> ConsumingConfig:
        group = self.group.name if self.has_group else ""
        return msgspec.structs.replace(super()._config(), group=group, filters={}, is_assigned=True)

    def holds(self, queue: MessageQueue) -> bool:
        """Whether it reads the queue. Nobody else minds."""
        reading = self.core.reader.readings.get(queue)
        return reading is not None and not reading.process_queue.is_dropped

    # --- queues -------------------------------------------------------------------------------------------------------

    def _await_topics(self, topics: list[str]) -> None:
        """As `PullConsumer.queues`, for one topic after the other."""
        if self.is_leaving:
            return
        self._instance.await_route(partial(self._routed, topics), ASK_MS, topics[0])

    def _routed(self, topics: list[str], error: ZrmqError | None) -> None:
        if isinstance(error, ClosedError):
            return
        if error is not None:
            self.machine.call_later(RETRY_MS, partial(self._await_topics, topics))
        elif len(topics) > 1:
            self._await_topics(topics[1:])
        else:
            self._assign(self._reader.share)

    def _assign_others(self) -> None:
        if self._chosen is not None:
            self._assign(0.0 if self._work_rng.random() < NOTHING_SHARE else self._work_rng.choice((1.0, 0.5, 0.3)))

    def _assign(self, share: float) -> None:
        route = self._instance.route
        queues = sorted(queue for topic in self.group.topics for queue in route.queues(topic)) if route is not None else []
        count = max(round(share * len(queues)), 1 if share else 0)
        self._chosen = sorted(self._work_rng.sample(queues, min(count, len(queues))))
        self._world.note(self.who, "assigns", " ".join(map(spell, self._chosen)))
        self._paused = [queue for queue in self._paused if queue in self._chosen]
        self._read_check.names(self._chosen)
        self.door.assign(self._chosen)

    def _begun(self, queue: MessageQueue, topic_id: int, offset: int) -> None:
        self._world.note(self.who, "begins", f"{spell(queue)} {offset} of topic {topic_id}")
        self._read_check.begins(queue, topic_id, offset)

    def _seek(self, queue: MessageQueue, offset: int) -> None:
        if queue in self.core.queues():
            self._read_check.seeks(queue, offset)
        super()._seek(queue, offset)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _got(self, messages: list[Message]) -> None:
        for message in messages:
            self._read_check.gets(message)
        super()._got(messages)

    def troubles(self) -> Iterator[str]:
        """What is not well yet, when nothing goes wrong any more."""
        if self._chosen is None:
            yield f"{self.who} has named no queues yet."
        for queue in self.chosen:
            topic = self._world.brokers[queue.broker_name].store.tables.topics[queue.topic]
            end = topic.queues[queue.queue_id].next_offset
            if queue not in self.core.queues() or self.core.reader.readings[queue].topic_id != topic.topic_id:
                yield f"{self.who} does not read {spell(queue)} of topic {topic.topic_id}."
            elif self.door.position(queue) < end:
                yield f"{self.who} is at {self.door.position(queue)} of {end} on {spell(queue)}."

    @property
    def chosen(self) -> list[MessageQueue]:
        """The queues it has named last, but for those that a topic which was made anew does not have."""
        topics = {queue: self._world.brokers[queue.broker_name].store.tables.topics[queue.topic] for queue in self._chosen or ()}
        return [queue for queue, topic in topics.items() if queue.queue_id < len(topic.queues)]

    def check_read(self) -> None:
        """It must have got everything by now."""
        self._read_check.ends()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _refused(self, error: ZrmqError) -> None:
        """A route may show queues that a broker had added and has lost before they were flushed: then it is tried again."""
        if self._world.admin is None:
            raise BrokenPromise("health", f"{self.who} was refused: {error.message}")
        self._world.later(0.0, self._start_anew)

    def _start_anew(self) -> None:
        if self in self._world.consumers:
            self._world.crash_consumer(self)
            self._world.start_consumer(self.group, self.slot)

    def _end_somehow(self) -> None:
        """Crash, or close; and start again in a while."""
        if self not in self._world.consumers or self.is_leaving or self.machine.is_paused or not self._world.is_working:
            return
        if self._work_rng.random() < 0.5:
            self._world.crash_consumer(self)
        else:
            self.leave()
        away_ms = self._work_rng.expovariate(1.0 / AWAY_MS)
        self._world.later(away_ms, partial(self._world.start_consumer, self.group, self.slot))

    def broker_up(self, broker_name: str) -> None:
        """Of `VirtualConsumer`."""
        self._read_check.broker_up(broker_name)

    def leave(self) -> None:
        """As `close`."""
        if not self.is_leaving:
            self._failures = self._world.trace.counts["last_commit_failed"]
            self._reached = {reading for reading in self.core.reader.readings.values() if reading.link.is_open}
        super().leave()

    def _core_closed(self) -> None:
        """The last commit is done, at the brokers that were there when it began."""
        if self.has_group and self.pulls.auto_commit and self._world.trace.counts["last_commit_failed"] == self._failures:
            self._world.committed(self, {
                queue: self.inbox.commit_offset(reading.process_queue)
                for queue, reading in self.core.reader.readings.items() if reading in self._reached and reading.link.is_open
            })
        super()._core_closed()
