"""How far the caller of a `PullConsumer` is: what polls returned, and the message an iteration has given last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zrmq.client.inbox import Inbox
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.message import Message


class Cursor:
    """The caller's own thread only, but for `settle`, which may come from another.

    A poll gives whole units. An iteration goes through one unit: `rest` are the messages still to give, each with its index, and
    `index` is the one given last; it keeps both up to date itself, since that costs it least.
    """

    def __init__(self, inbox: Inbox) -> None:
        self.index = 0
        self.rest: Iterator[tuple[int, Message]] = iter(())
        self._inbox = inbox
        self._unit: Unit | None = None  # what the iteration goes through
        self._given: dict[ProcessQueue, int] = {}  # of other units: below which offset everything was given

    # --- giving -------------------------------------------------------------------------------------------------------

    def give(self, units: Iterable[Unit]) -> None:
        """All of the units were given at once."""
        self._given = self._given | {unit.process_queue: unit.next_offset for unit in units}

    def enter_unit(self, unit: Unit) -> None:
        """From here on its messages are given one by one."""
        self.index = 0  # before the unit changes: `settle` may look in between, and must see too little rather than too much
        self.rest = enumerate(unit.messages)
        self._unit = unit

    @property
    def queue(self) -> ProcessQueue | None:
        """What the unit is of."""
        return None if self._unit is None else self._unit.process_queue

    def is_void(self) -> bool:
        """Whether what is left of the unit is not to be given any more, because its queue goes to somebody else."""
        unit = self._unit
        return unit is not None and (unit.process_queue.is_draining or unit.process_queue.is_dropped)

    def leave_unit(self, *, is_whole: bool) -> None:
        """All messages were given, or (not `is_whole`) those before `index`, and the others will not be."""
        unit, self._unit = self._unit, None
        self.rest = iter(())
        if unit is not None:
            self._given[unit.process_queue] = unit.next_offset if is_whole else unit.messages[self.index].queue_offset

    def take_rest(self, messages_max: int) -> list[Message]:
        """For a poll: what an iteration has left of its unit, at most so many."""
        unit = self._unit
        if unit is None:
            return []
        begin = next((index for index, _ in self.rest), len(unit.messages))
        end = begin if self.is_void() else min(begin + messages_max, len(unit.messages))
        if end == len(unit.messages) or self.is_void():
            self.index = end
            self.leave_unit(is_whole=end == len(unit.messages))
        else:
            self.index = end - 1
            self.rest = iter(list(enumerate(unit.messages))[end:])
        return unit.messages[begin:end]

    def position(self, queue: ProcessQueue) -> int:
        """The offset of the next message of the queue."""
        unit = self._unit
        if unit is None or unit.process_queue is not queue:
            return queue.position
        following = self.index + 1
        return unit.messages[following].queue_offset if following < len(unit.messages) else unit.next_offset

    # --- finishing ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The messages before the one that the iteration gave last are done."""
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, unit.messages[self.index].queue_offset, is_all=False)

    def finish(self) -> None:
        """What was given of units left behind is done."""
        unit = self._unit
        for queue, offset in self._given.items():
            self._inbox.finish_below(queue, offset, is_all=unit is None or queue is not unit.process_queue)
        self._given.clear()

    def finish_given(self) -> None:
        """Everything given so far is done."""
        self.finish()
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, self.position(unit.process_queue), is_all=False)
