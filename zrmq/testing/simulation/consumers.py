"""The consumers of a run: the real core and inbox, workers in virtual time, listeners that take a while and sometimes raise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from zrmq.client.allocation import AllocateAveragely, AllocateByCircle, AllocateConsistentHash, Strategy
from zrmq.client.consuming import ConsumerCore, ConsumingConfig
from zrmq.client.inbox import Inbox, Ready
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.listening import Outcome, Pace, run_unit
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.client.reading import Bounds
from zrmq.message import Message, MessageModel, MessageQueue
from zrmq.protocol.events import LeaseGranted
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.plan import GroupPlan
from zrmq.testing.simulation.trace import BrokenPromise, spell

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

BOUNDS = Bounds(64 * 1024, 500)
COMMIT_MS = 300
CLOSE_MS = 2_000
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "averagely": AllocateAveragely, "by circle": AllocateByCircle, "consistent hash": AllocateConsistentHash,
}


class ReadyLine:
    """`ReadyQueue` of a world with one thread: tells that there is something instead of letting anybody wait."""

    def __init__(self, on_item: Callable[[], None]) -> None:
        self._items: deque[Ready] = deque()
        self._on_item = on_item

    def put(self, item: Ready) -> None:
        self._items.append(item)
        self._on_item()

    def take(self, timeout_s: float | None) -> tuple[Ready] | None:
        return (self._items.popleft(),) if self._items else None


class Heard(NamedTuple):
    """What the listener has got of a queue that is read in order."""

    offset: int = -1  # of the last message it got through
    failed_offset: int = -1  # of the one it raised on since


class ListenerError(Exception):
    """What a virtual listener raises."""


class VirtualConsumer:
    """One member of a group, from its start to its crash, its leave, or the end of the run."""

    def __init__(self, world: World, group: GroupPlan, slot: int, life: int) -> None:
        self.group = group
        self.slot = slot
        self.name = f"{group.name}-{slot}"
        self.who = f"{self.name}#{life}"
        self.is_broadcasting = group.message_model is MessageModel.BROADCASTING
        self.instance_name = f"host-{slot}" if self.is_broadcasting else ""
        self.is_started = False
        self.is_leaving = False
        self.topic_ids: dict[MessageQueue, int] = {}  # of which topic of its name the last messages of a queue were
        self.in_flight: dict[Unit, object] = {}  # units with workers, and the life of the broker they were handed out in
        self._world = world
        self._rng = rng = Random(f"{world.plan.seed} {self.who}")
        self.machine: Machine = world.network.machine(self.name)
        self.inbox = self._make_inbox()
        self._instance = ClientInstance(self.machine, world.nameserver_addresses, self._identity(), rng)
        self.core = self._core_type(
            self.machine, self._config(), self.inbox, self._instance, rng, settle=self._settle, on_started=self._started
        )
        self._idle = group.workers
        self._pace = Pace()
        self._is_woken = False
        self._heard: dict[ProcessQueue, Heard] = {}
        world.note(self.who, "started")

    _core_type: type[ConsumerCore] = ConsumerCore

    def _identity(self) -> Identity:
        return Identity(self.who, "consumer", self.group.name, self.instance_name)

    def _make_inbox(self) -> Inbox:
        line = ReadyLine(self._work_soon)
        return Inbox(line, nullcontext(), self.machine.clock, self._wake, in_order=self.group.in_order)

    def _settle(self) -> None:
        """Of the core."""

    def _config(self) -> ConsumingConfig:
        group = self.group
        return ConsumingConfig(
            client_id=self.who, group=group.name, filters=dict.fromkeys(group.topics, group.expression),
            message_model=group.message_model, consume_from=group.consume_from,
            consume_timestamp_ms=group.consume_timestamp_ms, allocation=STRATEGIES[group.allocation](), bounds=BOUNDS,
            commit_interval_ms=COMMIT_MS,
        )

    # --- lives --------------------------------------------------------------------------------------------------------

    def broker_up(self, broker_name: str) -> None:
        """A broker is back, and its log was looked at."""

    def _started(self) -> None:
        self.is_started = True
        self._world.note(self.who, "ready")
        self._world.consumer_ready(self)

    def crash(self) -> None:
        """End without a word."""
        self._world.note(self.who, "crashed", f"in_flight={len(self.in_flight)}")
        self.machine.close()

    def leave(self) -> None:
        """Finish what is in work, commit, say goodbye."""
        if not self.is_leaving:
            self._world.note(self.who, "leaving")
            self.is_leaving = True
            self._leave_when_idle()

    def _leave_when_idle(self) -> None:
        if not self.in_flight:
            self.inbox.close()
            self.core.close(self._core_closed, CLOSE_MS)

    def _core_closed(self) -> None:
        self._instance.close(self._gone)

    def _gone(self) -> None:
        self._world.note(self.who, "left")
        self.machine.close()
        self._world.consumer_left(self)

    def holds(self, queue: MessageQueue) -> bool:
        """Whether by its own rules the queue is its own at this moment."""
        reading = self.core.reader.readings.get(queue)
        if reading is None or reading.process_queue.is_dropped or (self.is_leaving and not self.in_flight):
            return False
        return reading.process_queue.valid_until_ms() > self.machine.clock.monotonic_ms()

    def topic_id(self, queue: ProcessQueue) -> int:
        """Of which topic of its name a queue is that it reads, or had; 0 if that is not known."""
        broker_name, reading = queue.queue.broker_name, self.core.reader.readings.get(queue.queue)
        if queue.lease_epoch:
            return self._world.promises.lease_topics.get((broker_name, queue.lease_epoch), 0)
        return reading.topic_id if reading is not None and reading.process_queue is queue else 0

    def note_told(self) -> None:
        """What it knows to be committed does not come again. Not where its lease is over, as while it stands still: another
        member may have sought since."""
        for queue, reading in self.core.reader.readings.items():
            if reading.committed_offset > 0 and not reading.goes_back and self.holds(queue):
                place = (self.group.name, self.instance_name, queue)
                self._world.promises.told(place, self.topic_id(reading.process_queue), reading.committed_offset)

    def is_giving_back(self, queue: MessageQueue, topic_id: int) -> bool:
        """Whether it was told to give the queue back and is not through with all of its messages; not those of another topic that
        had the name."""
        now_ms, life = self.machine.clock.monotonic_ms(), self._world.brokers[queue.broker_name].life
        busy = [
            unit.process_queue for unit, begun in self.in_flight.items()
            if begun == life and self.topic_id(unit.process_queue) == topic_id and not self.is_lease_lost(unit.process_queue)
        ]
        return any(each.queue == queue and each.is_draining and each.valid_until_ms() > now_ms for each in busy)

    def is_lease_lost(self, queue: ProcessQueue) -> bool:
        """Whether its broker has lost that the queue was leased to it."""
        return self._world.promises.is_lease_lost(LeaseGranted, queue.queue.broker_name, queue.lease_epoch)

    # --- work ---------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self.machine.call_soon_threadsafe(self.core.look)

    def _work_soon(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self.machine.call_later(self._rng.uniform(0.0, 0.2), self._work)

    def _work(self) -> None:
        self._is_woken = False
        while self._idle and not self.is_leaving:
            unit = self.inbox.take(0.0, self._unit_size)
            if unit is None:
                return
            if self.group.in_order and any(other.process_queue is unit.process_queue for other in self.in_flight):
                raise BrokenPromise("order", f"{self.who} works on {spell(unit.process_queue.queue)} twice at a time.")
            self._idle -= 1
            self.in_flight[unit] = self._world.brokers[unit.process_queue.queue.broker_name].life
            self._world.handed_out(self, unit)
            self.machine.call_later(self._draw_ms(len(unit.messages)), partial(self._run, unit))

    def _unit_size(self, queue: ProcessQueue) -> int:
        return self._pace.messages if self.group.message_ms == 0.0 else self._rng.randint(1, 8)

    def _draw_ms(self, messages: int) -> float:
        mean_ms = self.group.message_ms * messages
        if mean_ms == 0.0 or not self._world.is_working:  # in the end the backlog is to go quickly
            return 0.0
        return self._rng.expovariate(1.0 / mean_ms)

    def _run(self, unit: Unit) -> None:
        """The unit's listener calls, all at the end of their time; then what the door of a PushConsumer does with the outcome."""
        listener = partial(self._listen, unit.process_queue)
        outcome = run_unit(unit, listener, self._pace, self.machine.clock, in_order=self.group.in_order)
        self.inbox.done(unit, [failure.unit for failure in outcome.failures], outcome.stop_offset)
        self._rest(outcome)
        self._idle += 1
        del self.in_flight[unit]
        if self.is_leaving:
            self._leave_when_idle()
        else:
            self._work_soon()

    def _rest(self, outcome: Outcome) -> None:
        for failure in outcome.failures:
            self.machine.call_later(failure.retry_ms, partial(self.inbox.put_back, failure.unit))

    def _listen(self, queue: ProcessQueue, message: Message) -> None:
        is_failing = message.delivery_attempt < 3 and self._rng.random() < self.group.failure_share
        if self.group.in_order:
            self._check_turn(queue, message.queue_offset, is_failing)
        self._world.listened(self, message, is_failing)
        if is_failing:
            raise ListenerError

    def _check_turn(self, queue: ProcessQueue, offset: int, is_failing: bool) -> None:
        """In order a listener gets what is behind a message only when it is through with that."""
        heard = self._heard.get(queue, Heard())
        if offset <= heard.offset or heard.failed_offset not in (-1, offset):
            raise BrokenPromise("order", f"{self.who} was given {offset} of {spell(queue.queue)} after {heard}.")
        self._heard[queue] = heard._replace(failed_offset=offset) if is_failing else Heard(offset)
