"""Members that ask for messages: the real door of a `PullConsumer` on the core of a virtual one. They poll or iterate, commit
themselves or not, seek, pause and resume.

The world has one thread, so what blocks in the door (waiting for messages, for a broker's answer) is done here by callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from zrmq.client.consuming import ConsumingConfig
from zrmq.client.cursor import Cursor
from zrmq.client.inbox import Inbox
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.consumer import PullConsumer
from zrmq.errors import InvalidArgumentError, ZrmqError
from zrmq.message import Message, MessageQueue
from zrmq.protocol.requests import OFFSET_EARLIEST, OFFSET_LATEST, AnyReply, Offsets, QueryOffsets
from zrmq.testing.simulation.consumers import CLOSE_MS, ReadyLine, VirtualConsumer
from zrmq.testing.simulation.plan import GroupPlan
from zrmq.testing.simulation.trace import BrokenPromise, spell
from zrmq.testing.simulation.work import PullPlan
from zrmq.transport.options import fork_count

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

ASK_MS = 5_000
COMMIT_MS = 1_000.0
PAUSE_MS = (10.0, 2_000.0)
SEEK_SPAN = 50  # how far beyond where it is a member seeks

T = TypeVar("T")


class WatchedInbox(Inbox):
    """Tells of each unit that is taken."""

    on_unit: Callable[[Unit], None]

    def take(self, timeout_ms: float | None, size: Callable[[ProcessQueue], int]) -> Unit | None:
        unit = super().take(timeout_ms, size)
        if unit is not None:
            self.on_unit(unit)
        return unit


class Door(PullConsumer):
    """The door without its thread."""

    def __init__(self, consumer: VirtualPuller) -> None:
        self.group = consumer.group.name
        self.cursor = Cursor(consumer.inbox)
        self._forks = fork_count()
        self._auto_commit = consumer.finishes_by_itself
        self._consumer = consumer

    def _ready(self) -> tuple[Any, Cursor]:
        return self._consumer, self.cursor

    def _call(self, function: Callable[[], T]) -> T:
        return function()


class VirtualPuller(VirtualConsumer):
    """One member of a group of `PullConsumer`s."""

    def __init__(self, world: World, group: GroupPlan, slot: int, life: int, pulls: PullPlan) -> None:
        self.pulls = pulls
        self._work_rng = Random(f"{world.plan.seed} {group.name}-{slot}#{life} work")
        self._given: list[Message] = []
        self._sought: dict[ProcessQueue, int] = {}  # where it goes on that has given nothing since
        self._is_busy = False
        self._mix_rng = Random(f"{world.plan.seed} {group.name}-{slot}#{life} mix")
        self._poll_share = self._mix_rng.choice((0.0, 0.0, 0.3)) if pulls.iterates else 1.0
        self._paused: list[MessageQueue] = []
        super().__init__(world, group, slot, life)
        if not self.finishes_by_itself:
            self.machine.call_later(COMMIT_MS, self._commit_idle)
        if pulls.seek_every_ms:
            self._later(pulls.seek_every_ms, self._seek_somewhere)
        if pulls.pause_every_ms:
            self._later(pulls.pause_every_ms, self._pause_some)

    @property
    def finishes_by_itself(self) -> bool:
        """Whether what was given counts as finished without a commit."""
        return self.pulls.auto_commit

    def _make_inbox(self) -> Inbox:
        inbox = WatchedInbox(ReadyLine(self._work_soon), nullcontext(), self.machine.clock, self._wake)
        inbox.on_unit = self._take_unit
        self.inbox = inbox
        self.door = self._make_door()
        return inbox

    def _make_door(self) -> Door:
        return Door(self)

    def _settle(self) -> None:
        if self.pulls.auto_commit:
            self.door.cursor.settle()

    def _config(self) -> ConsumingConfig:
        return msgspec.structs.replace(super()._config(), auto_commit=self.pulls.auto_commit)

    def _later(self, mean_ms: float, step: Callable[[], None]) -> None:
        """Again and again, while there is work."""
        self.machine.call_later(self._work_rng.expovariate(1.0 / mean_ms), partial(self._do, mean_ms, step))

    def _do(self, mean_ms: float, step: Callable[[], None]) -> None:
        if self._world.is_working and not self.is_leaving:
            step()
            self._later(mean_ms, step)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._is_woken = False
        if not self._is_busy and not self.is_leaving and not self.inbox.is_closed:
            self._ask_for_messages()

    def _ask_for_messages(self) -> None:
        """One call of the door. What it gives is worked on for a while before the next one."""
        self._is_busy = False
        if self.is_leaving or self.inbox.is_closed:
            return
        if self.finishes_by_itself:
            self._finish_given()
        is_polling = self._mix_rng.random() < self._poll_share
        messages = self._poll() if is_polling else self._iterate()
        self._got(messages)
        if not self.finishes_by_itself and self._given and (not messages or self._work_rng.random() < 0.3):
            self._commit()
        elif messages:
            self._is_busy = True
            mean_ms = self.pulls.message_ms * len(messages) if self._world.is_working else 0.0
            self.machine.call_later(self._work_rng.expovariate(1.0 / mean_ms) if mean_ms else 0.0, self._ask_for_messages)

    def _got(self, messages: list[Message]) -> None:
        """The door gave these."""
        for message in messages:
            if message.queue in self._paused:
                where = f"{message.queue_offset} of {spell(message.queue)}"
                raise BrokenPromise("paused", f"{self.who} was given {where}, which is paused.")
        self._given += messages

    def _poll(self) -> list[Message]:
        begun = self.door.cursor.queue
        messages = self.door.poll(self._work_rng.randint(1, 20), 0)
        is_left = begun is not None and self.door.cursor.queue is None and all(each.queue != begun.queue for each in messages)
        if is_left and self.finishes_by_itself:  # what an iteration has given of a queue that goes to another member
            for unit in [unit for unit in self.in_flight if unit.process_queue is begun]:
                del self.in_flight[unit]
        return messages

    def _iterate(self) -> list[Message]:
        """The next message of an iteration; where a real one waits for the next, this one ends, and another goes on behind it."""
        if self._iteration is None:
            self._iteration = iter(self.door)
        message = next(self._iteration, None)
        self._forget_units()  # it may have left one, because its queue goes to another member
        if message is None:
            self._iteration = None
            return []
        return [message]

    _iteration: Iterator[Message] | None = None

    def _take_unit(self, unit: Unit) -> None:
        self.in_flight[unit] = self._world.brokers[unit.process_queue.queue.broker_name].life
        sought = self._sought.pop(unit.process_queue, unit.offset)
        self._world.passed_over(self, unit.process_queue, sought, unit.messages[0].queue_offset)
        self._world.handed_out(self, unit)

    def _finish_given(self) -> None:
        """From here on the door may count everything as finished that it gave. Of units it has begun to give one is left."""
        for message in self._given:
            self._world.listened(self, message, is_failing=False)
        self._given.clear()
        self._forget_units()

    def _forget_units(self) -> None:
        """Keep the one that an iteration is in."""
        begun = self.door.cursor.queue
        for unit in [unit for unit in self.in_flight if unit.process_queue is not begun]:
            del self.in_flight[unit]

    # --- commits ------------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        """As `PullConsumer.commit`, which the caller waits for."""
        self._is_busy = True
        self._finish_given()
        self.door.cursor.finish_given()
        asked = {
            queue: (reading, self.inbox.commit_offset(reading.process_queue))
            for queue, reading in self.core.reader.readings.items()
        }
        self._commits += 1
        self.core.commit(partial(self._committed, self._commits, asked), ASK_MS)
        self.machine.call_later(ASK_MS + 1_000.0, partial(self._go_on, self._commits))

    _commits = 0

    def _commit_idle(self) -> None:
        """What a filter left out is never given, and a commit may have failed."""
        self.machine.call_later(COMMIT_MS, self._commit_idle)
        if not self._is_busy and not self.is_leaving and not self.inbox.is_closed:
            self._commit()

    def _committed(self, number: int, asked: dict[MessageQueue, Any], error: ZrmqError | None) -> None:
        if error is None:
            self._world.committed(self, {
                queue: offset for queue, (reading, offset) in asked.items() if self.core.reader.readings.get(queue) is reading
            })
        self.machine.call_later(0.0, partial(self._go_on, number))  # who waits for it goes on in a thread of its own

    def _go_on(self, number: int) -> None:
        if number == self._commits and self._is_busy:
            self._commits += 1
            self._ask_for_messages()

    # --- places -------------------------------------------------------------------------------------------------------

    def _seek_somewhere(self) -> None:
        queues = self.core.queues()
        if not queues:
            return
        rng = self._work_rng
        queue = rng.choice(queues)
        luck = rng.random()
        if luck < 0.4:
            self._seek(queue, rng.randrange(self.door.position(queue) + SEEK_SPAN))
            return
        past_ms = self.machine.clock.time_ms() - rng.randrange(5_000)
        where = OFFSET_EARLIEST if luck < 0.6 else OFFSET_LATEST if luck < 0.8 else past_ms
        self.core.ask(
            queue.broker_name, QueryOffsets, queue.topic, [queue.queue_id], where, timeout_ms=ASK_MS,
            on_reply=partial(self._found, queue),
        )

    def _found(self, queue: MessageQueue, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, Offsets) and not self.is_leaving:
            self._seek(queue, dict(reply.offsets)[queue.queue_id])

    def _seek(self, queue: MessageQueue, offset: int) -> None:
        """What was given of the queue is forgotten."""
        try:
            reading = self.core.reading(queue)
        except InvalidArgumentError:
            return  # it went to somebody else while the broker was asked
        before = self.inbox.commit_offset(reading.process_queue)
        self._world.note(self.who, "sought", f"{spell(queue)} {before} to {offset}")
        self._world.sought(self, queue, before, offset)
        self._given = [message for message in self._given if message.queue != queue]
        for unit in [unit for unit in self.in_flight if unit.process_queue is reading.process_queue]:
            del self.in_flight[unit]
        self.door.seek(queue, offset)
        anew = self.core.reader.readings.get(queue)
        if anew is not None:
            self._sought[anew.process_queue] = offset

    def _pause_some(self) -> None:
        queues = self.core.queues()
        if not queues or self._paused:
            return
        self._paused = self._work_rng.sample(queues, self._work_rng.randint(1, len(queues)))
        self._world.note(self.who, "queues_paused", f"{len(self._paused)} of {len(queues)}")
        self.door.pause(*self._paused)
        self.machine.call_later(self._work_rng.uniform(*PAUSE_MS), self._resume)

    def _resume(self) -> None:
        self._paused = []
        if not self.is_leaving:
            self.door.resume()

    # --- the end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """As `close`, at the end of a `with` block or without one."""
        if self.is_leaving:
            return
        self._world.note(self.who, "leaving")
        self.is_leaving = True
        if self.pulls.auto_commit and self._work_rng.random() < 0.5:
            self._finish_given()
            self.door.cursor.finish_given()
        self.in_flight.clear()
        self.inbox.close()
        self.core.stop()
        self.core.close(self._core_closed, CLOSE_MS)
