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
    `index` is the one given last; it keeps both up to date itself, since that costs it least. A poll that takes some of them puts
    another `rest` in their place, and `index` at the first of those it took: what lies before `index` is done, and nothing else.
    """

    def __init__(self, inbox: Inbox) -> None:
        self.index = 0
        self.rest: Iterator[tuple[int, Message]] = iter(())
        self._inbox = inbox
        self._left: Iterator[int] = iter(())  # the indexes in `rest`
        self._unit: Unit | None = None  # what the iteration goes through
        self._polled_end = 0  # a poll took the messages of it before this one
        self._given: dict[ProcessQueue, int] = {}  # of other units: below which offset everything was given

    # --- giving -------------------------------------------------------------------------------------------------------

    def give(self, units: Iterable[Unit]) -> None:
        """All of the units were given at once."""
        self._given = self._given | {unit.process_queue: unit.next_offset for unit in units}

    def enter_unit(self, unit: Unit) -> None:
        """From here on its messages are given one by one."""
        left = iter(range(len(unit.messages)))
        rest = zip(left, unit.messages, strict=False)  # `strict` would ask for one more
        self.index = self._polled_end = 0  # before the unit: `settle` may look in between, and must see too little
        self._left, self.rest, self._unit = left, rest, unit

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
        """For a poll: what an iteration has left of its unit, at most so many. Nothing has changed until it returns, where no
        exception can keep from the caller what counts as given."""
        unit = self._unit
        if unit is None:
            return []
        count = len(unit.messages)
        begin = count - length_hint(self._left)
        end = begin if self.is_void() else min(begin + messages_max, count)
        is_left = begin < end < count
        given_offset = unit.next_offset if end == count else unit.messages[end].queue_offset
        left = iter(range(end, count)) if is_left else iter(())
        rest, taken = zip(left, unit.messages[end:], strict=False), unit.messages[begin:end]
        if is_left:
            self.index, self._polled_end = begin, end
        else:
            self._unit, self._given = None, self._given | {unit.process_queue: given_offset}
        self._left, self.rest = left, rest
        return taken

    def position(self, queue: ProcessQueue) -> int:
        """The offset of the next message of the queue."""
        unit = self._unit
        if unit is None or unit.process_queue is not queue:
            return queue.position
        following = max(self.index + 1, self._polled_end)
        return unit.messages[following].queue_offset if following < len(unit.messages) else unit.next_offset

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

    def finish_given(self) -> None:
        """Everything given so far is done."""
        self.finish()
        unit = self._unit
        if unit is not None:
            self._inbox.finish_below(unit.process_queue, self.position(unit.process_queue), is_all=False)
