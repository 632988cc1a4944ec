"""What a reader that names its queues itself must get of each: everything from where it begins on, in order, nothing left out.

A reader goes back only where it seeks, where its broker was away (what is not finished comes again), and where the end of a queue
was lost. Where it goes on further ahead there must be nothing in between that could have been read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zrmq.message import ConsumeFrom, Message, MessageQueue
from zrmq.store.tables import Queue
from zrmq.testing.simulation.plan import GroupPlan
from zrmq.testing.simulation.promises import Place
from zrmq.testing.simulation.servers import VirtualBroker
from zrmq.testing.simulation.trace import BrokenPromise, spell

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World


class ReadCheck:
    """One life of one reader. Raises `BrokenPromise`."""

    def __init__(self, world: World, who: str, group: GroupPlan, *, has_group: bool) -> None:
        self._world = world
        self._who = who
        self._group = group
        self._has_group = has_group
        self._first_commits = world.promises.first_commits(group.name)  # before this life
        self._next: dict[MessageQueue, tuple[int, int]] = {}  # where the next message is at the earliest; what is behind is owed
        self._left: dict[MessageQueue, int] = {}  # the same of queues that were named before
        self._latest: dict[MessageQueue, int] = {}  # where they ended when they were named for the first time
        self._put_off: list[tuple[MessageQueue, int, int]] = []  # gaps that nobody could look at

    # --- what the reader does -----------------------------------------------------------------------------------------

    def names(self, queues: Iterable[MessageQueue]) -> None:
        """It wants these from now on, and no others."""
        wanted = set(queues)
        for queue in [queue for queue in self._next if queue not in wanted]:
            self._left[queue] = self._next.pop(queue)[1]
        for queue in wanted:
            found = self._find(queue)
            self._latest.setdefault(queue, found.visible_offset if found is not None else 0)

    def begins(self, queue: MessageQueue, offset: int) -> None:
        """It reads the queue from here on; because it was named, or its broker is back."""
        known = self._next.get(queue)
        if known is None:
            self._check_beginning(queue, offset)
        else:
            self._check_gap("missed", queue, known[1], offset)
        found = self._find(queue)  # where it sought beyond the end it goes back when the broker says so
        end = found.visible_offset if found is not None else known[0] if known is not None else 0
        self._next[queue] = (min(offset, end), offset)

    def seeks(self, queue: MessageQueue, offset: int) -> None:
        """It goes on from there, or from the queue's end, if that is before; which is where it is when the broker hears of it."""
        found = self._find(queue)
        end = found.visible_offset if found is not None else 0
        self._next[queue] = (min(offset, end), offset)

    def broker_up(self, broker_name: str) -> None:
        """A broker is back. Where it has lost the end of a queue, what it stores there from now on is owed, but to whoever sought
        beyond that."""
        for queue, (earliest, owed) in self._next.items():
            found = self._find(queue) if queue.broker_name == broker_name else None
            if found is not None and earliest > found.visible_offset:
                self._next[queue] = (found.visible_offset, found.visible_offset if owed == earliest else owed)

    def gets(self, message: Message) -> None:
        """It was given the message."""
        queue, offset = message.queue, message.queue_offset
        if queue not in self._next:
            raise BrokenPromise("filter", f"{self._who} got {offset} of {spell(queue)}, which it has not named.")
        earliest, owed = self._next[queue]
        if offset < earliest and not self._world.promises.may_be_reset(queue):
            raise BrokenPromise("order", f"{self._who} got {offset} of {spell(queue)} again, or after {earliest - 1}.")
        self._check_gap("missed", queue, owed, offset)
        self._next[queue] = (offset + 1, offset + 1)

    def ends(self) -> None:
        """Nothing goes wrong any more, and it has read everything."""
        gaps, self._put_off = self._put_off, []
        for queue, (_, owed) in self._next.items():
            found = self._find(queue)
            assert found is not None
            gaps.append((queue, owed, found.next_offset))
        for gap in gaps:
            self._check_gap("missed", *gap)

    # --- what follows -------------------------------------------------------------------------------------------------

    def _check_beginning(self, queue: MessageQueue, offset: int) -> None:
        """Of a queue that was just named: where its group stands, or this reader was; else where it was told to begin."""
        place = (self._group.name, "", queue)
        is_new, left, found = queue not in self._left, self._left.get(queue, 0), self._find(queue)
        known = self._stands_at(queue, found)
        if not self._may_choose(place, offset, known, is_new=is_new, is_known=found is not None):
            self._check_gap("missed", queue, offset if known is None else max(known, left), offset)
            return
        if self._has_group:
            self._world.promises.began(place, offset)
        if found is None:
            return
        if self._group.consume_from is ConsumeFrom.LATEST and not self._has_group and is_new:
            least = self._latest[queue]
            if offset < least and not self._world.promises.may_be_reset(queue):
                raise BrokenPromise("start", f"{self._who} begins at {offset} of {spell(queue)}, which had {least} by then.")
        self._check_gap("start", queue, max(self._latest_start(queue, found), left), offset)

    def _stands_at(self, queue: MessageQueue, found: Queue | None) -> int | None:
        if found is None or not self._has_group:
            return None
        group = self._world.brokers[queue.broker_name].store.tables.groups.get(self._group.name)
        return group.start_offset(found.topic, queue.queue_id) if group is not None else None

    def _may_choose(self, place: Place, offset: int, known: int | None, *, is_new: bool, is_known: bool) -> bool:
        """Whether it begins where it was told to, for want of a place where its group stands. What an earlier life has committed
        may have come too late for this one."""
        if not self._has_group:
            return True
        before = self._first_commits.get(place, 0)
        commits = self._world.promises.first_commits(self._group.name).get(place, 0)
        if not is_known:  # nobody knows what the broker has said
            return is_new and (commits == 0 or commits > before)
        return known is None or (is_new and commits > before and offset > known)

    def _latest_start(self, queue: MessageQueue, found: Queue) -> int:
        """Where it has to begin, at the latest. What has been deleted or damaged since is no gap."""
        if self._group.consume_from is ConsumeFrom.EARLIEST:
            return 0
        if self._group.consume_from is ConsumeFrom.LATEST:
            return found.visible_offset
        contents = self._world.brokers[queue.broker_name].contents(queue)
        from_ms = self._group.consume_timestamp_ms
        later = (
            offset for offset, placed in contents.items()
            if placed.store_timestamp_ms >= from_ms and not self._world.promises.is_damaged(placed.body)
        )
        return min(later, default=found.visible_offset)

    def _check_gap(self, kind: str, queue: MessageQueue, start: int, end: int) -> None:
        """It passes over what lies between: nothing but what was deleted or damaged."""
        if start >= end:
            return
        broker, promises = self._world.brokers[queue.broker_name], self._world.promises
        if not _is_known(broker):
            self._put_off.append((queue, start, end))
            return
        contents = broker.contents(queue)
        for offset in range(start, end):
            placed = contents.get(offset)
            if placed is None or promises.is_damaged(placed.body) or promises.is_deleted(queue.broker_name, placed.end):
                continue
            posting = promises.postings[placed.body]
            what = f"{posting}, at {offset} of {spell(queue)}, and goes on at {end}"
            raise BrokenPromise(kind, f"{self._who} never got {what}; it was at {start}.")

    def _find(self, queue: MessageQueue) -> Queue | None:
        """The queue as its broker has it, None while that is down."""
        broker = self._world.brokers[queue.broker_name]
        if not _is_known(broker):
            return None
        topic = broker.store.tables.topics.get(queue.topic)
        return topic.queues[queue.queue_id] if topic is not None and queue.queue_id < len(topic.queues) else None


def _is_known(broker: VirtualBroker) -> bool:
    return broker.check is not None and broker.machine is not None
