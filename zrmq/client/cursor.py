"""How far the caller of a `PullConsumer` is: what polls returned, and the message an iteration has given last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint

from zrmq.client.inbox import Inbox
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.message import Message


class Cursor:
    """The caller's own thread only, but for `settle`, which may come from another.

    A poll gives whole units. An iteration goes through one unit: `rest` are the messages still to give, each with its index, and
    what was taken of it was given. `index` is the one that the iteration gave last; it notes that itself, which costs it least.
    A poll that takes some of them puts another `rest` in their place, and `index` at the first of those it took: what lies before
    `index` is done, and nothing else.

    What belongs together changes without a call in between, so that no signal handler can raise there.
    """

    def __init__(self, inbox: Inbox) -> None:
        self.index = 0
        self.rest: Iterator[tuple[int, Message]] = iter(())
        self._inbox = inbox
        self._left: Iterator[int] = iter(())  # the indexes in `rest`
        self._unit: Unit | None = None  # what the iteration goes through
        self._given: dict[ProcessQueue, int] = {}  # of other units: below which offset everything was given

    # --- giving -------------------------------------------------------------------------------------------------------

    def give(self, units: Iterable[Unit]) -> None:
        """All of the units were given at once."""
        self._given = self._given | {unit.process_queue: unit.next_offset for unit in units}

    def enter_unit(self, unit: Unit) -> None:
        """From here on its messages are given one by one."""
        left = iter(range(len(unit.messages)))
        rest = zip(left, unit.messages, strict=False)  # `strict` would ask for one more
        self.index, self._left, self.rest, self._unit = 0, left, rest, unit

    @property
    def queue(self) -> ProcessQueue | None:
        """What the unit is of."""
        return None if self._unit is None else self._unit.process_queue

    def is_void(self) -> bool:
        """Whether what is left of the unit is not to be given now: its queue goes to somebody else, or is paused."""
        unit = self._unit
        if unit is None:
            return False
        queue = unit.process_queue
        return queue.is_draining or queue.is_dropped or queue.is_paused

    def leave_unit(self) -> None:
        """What is left of it comes again, in time or at its queue's next owner."""
        unit = self._unit
        if unit is None:
            return
        rest: Iterator[tuple[int, Message]] = iter(())
        index = self._next_index(unit)
        offset = self._offset_of(unit, index)
        given = self._given | {unit.process_queue: offset}
        if index < len(unit.messages):
            self._inbox.take_back(unit.process_queue, offset)
        self._given, self.rest, self._unit = given, rest, None

    def take_rest(self, messages_max: int) -> list[Message]:
        """For a poll: what an iteration has left of its unit, at most so many; a void one it leaves. None is given before this
        returns, where no exception can keep it from the caller."""
        if self.is_void():
            self.leave_unit()
        unit = self._unit
        if unit is None:
            return []
        begin, count = self._next_index(unit), len(unit.messages)
        end = min(begin + messages_max, count)
        is_left = begin < end < count
        left = iter(range(end, count)) if is_left else iter(())
        rest, taken = zip(left, unit.messages[end:], strict=False), unit.messages[begin:end]
        given = self._given if is_left else self._given | {unit.process_queue: self._offset_of(unit, end)}
        self.index, self._left, self.rest, self._given, self._unit = begin, left, rest, given, unit if is_left else None
        return taken

    def position(self, queue: ProcessQueue) -> int:
        """The offset of the next message of the queue."""
        unit = self._unit
        if unit is None or unit.process_queue is not queue:
            return queue.position
        return self._offset_of(unit, self._next_index(unit))

    def _next_index(self, unit: Unit) -> int:
        return len(unit.messages) - length_hint(self._left)

    @staticmethod
    def _offset_of(unit: Unit, index: int) -> int:
        return unit.messages[index].queue_offset if index < len(unit.messages) else unit.next_offset

    # --- finishing ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The messages before the one that the iteration gave last, or before those that a poll took of its unit, are done."""
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, unit.messages[self.index].queue_offset, is_all=False)

    def finish(self) -> None:
        """What was given of units left behind is done."""
        unit = self._unit
        for queue, offset in self._given.items():
            self._inbox.finish_below(queue, offset, is_all=unit is None or queue is not unit.process_queue)
        self._given.clear()

    def unfinished(self) -> list[ProcessQueue]:
        """The queues of which something was given that is not done."""
        given, unit = self._given, self._unit
        if unit is not None:
            given = given | {unit.process_queue: self.position(unit.process_queue)}
        return [queue for queue, offset in given.items() if self._inbox.commit_offset(queue) < offset]

    def finish_given(self) -> None:
        """Everything given so far is done."""
        if self._unit is not None and self._unit.process_queue.is_dropped:
            self.leave_unit()
        self.finish()
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, self.position(unit.process_queue), is_all=False)
