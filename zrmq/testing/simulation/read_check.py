"""What a reader that names its queues itself must get of each: everything from where it begins on, in order, nothing left out.

A reader goes back only where it seeks, where its broker was away (what is not finished comes again), and where the end of a queue
was lost. Where it goes on further ahead there must be nothing in between that could have been read. A topic that is deleted owes
nobody anything; the next one of the name is read from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from zrmq.message import ConsumeFrom, Message, MessageQueue
from zrmq.store.tables import Queue
from zrmq.testing.simulation.log_watch import between
from zrmq.testing.simulation.plan import GroupPlan
from zrmq.testing.simulation.promises import Place
from zrmq.testing.simulation.servers import VirtualBroker
from zrmq.testing.simulation.trace import BrokenPromise, spell

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World


class Standing(NamedTuple):
    """How far it has come in a queue of the topic with this id."""

    topic_id: int
    earliest: int  # where the next message is at the earliest
    owed: int  # what is there and behind is owed


class Gap(NamedTuple):
    """What it has passed over in a queue of the topic with this id."""

    queue: MessageQueue
    topic_id: int
    start: int
    end: int


class ReadCheck:
    """One life of one reader. Raises `BrokenPromise`."""

    def __init__(self, world: World, who: str, group: GroupPlan, *, has_group: bool) -> None:
        self._world = world
        self._who = who
        self._group = group
        self._has_group = has_group
        self._first_commits = world.promises.first_commits(group.name)  # before this life
        self._next: dict[MessageQueue, Standing] = {}
        self._left: dict[MessageQueue, Standing] = {}  # in queues that were named before
        self._latest: dict[tuple[MessageQueue, int], int] = {}  # where those of a topic ended when they were first named
        self._put_off: list[Gap] = []  # that nobody could look at

    # --- what the reader does -----------------------------------------------------------------------------------------

    def names(self, queues: Iterable[MessageQueue]) -> None:
        """It wants these from now on, and no others."""
        wanted = set(queues)
        for queue in [queue for queue in self._next if queue not in wanted]:
            self._left[queue] = self._next.pop(queue)
        for queue in wanted:
            found = self._find(queue)
            if found is not None:
                self._latest.setdefault((queue, found.topic.topic_id), found.visible_offset)

    def begins(self, queue: MessageQueue, topic_id: int, offset: int) -> None:
        """It reads the queue from here on; because it was named, its broker is back, or there is another topic of the name."""
        known, left = self._next.get(queue), self._left.get(queue)
        if known is not None and known.topic_id == topic_id:
            self._check_gap("missed", Gap(queue, topic_id, known.owed, offset))
        elif (known or left or Standing(topic_id, 0, 0)).topic_id != topic_id:
            self._check_renewal(queue, topic_id, offset)
        else:
            self._check_beginning(queue, topic_id, offset, left)
        found = self._find(queue, topic_id)  # where it sought beyond the end it goes back when the broker says so
        end = found.visible_offset if found is not None else known.earliest if known is not None else 0
        self._next[queue] = Standing(topic_id, min(offset, end), offset)

    def seeks(self, queue: MessageQueue, offset: int) -> None:
        """It goes on from there, or from the queue's end, if that is before; which is where it is when the broker hears of it."""
        topic_id = self._next[queue].topic_id
        found = self._find(queue, topic_id)
        end = found.visible_offset if found is not None else 0
        self._next[queue] = Standing(topic_id, min(offset, end), offset)

    def broker_up(self, broker_name: str) -> None:
        """A broker is back. Where it has lost the end of a queue, what it stores there from now on is owed, but to whoever sought
        beyond that."""
        for queue, (topic_id, earliest, owed) in self._next.items():
            found = self._find(queue, topic_id) if queue.broker_name == broker_name else None
            if found is not None and earliest > found.visible_offset:
                end = found.visible_offset
                self._next[queue] = Standing(topic_id, end, end if owed == earliest else owed)

    def gets(self, message: Message) -> None:
        """It was given the message."""
        queue, offset = message.queue, message.queue_offset
        if queue not in self._next:
            raise BrokenPromise("filter", f"{self._who} got {offset} of {spell(queue)}, which it has not named.")
        topic_id, earliest, owed = self._next[queue]
        if self._is_former(message, topic_id):
            return
        if offset < earliest and not self._world.promises.may_be_reset(queue):
            raise BrokenPromise("order", f"{self._who} got {offset} of {spell(queue)} again, or after {earliest - 1}.")
        self._check_gap("missed", Gap(queue, topic_id, owed, offset))
        self._next[queue] = Standing(topic_id, offset + 1, offset + 1)

    def ends(self) -> None:
        """Nothing goes wrong any more, and it has read everything."""
        gaps, self._put_off = self._put_off, []
        for queue, (topic_id, _, owed) in self._next.items():
            found = self._find(queue, topic_id)
            if found is not None:  # a topic that was made anew may have fewer
                gaps.append(Gap(queue, topic_id, owed, found.next_offset))
        for gap in gaps:
            self._check_gap("missed", gap)

    # --- what follows -------------------------------------------------------------------------------------------------

    def _check_beginning(self, queue: MessageQueue, topic_id: int, offset: int, before: Standing | None) -> None:
        """Of a queue that was just named: where its group stands, or this reader was; else where it was told to begin."""
        place = (self._group.name, "", queue)
        is_new, left, found = before is None, before.owed if before is not None else 0, self._find(queue, topic_id)
        known = self._stands_at(queue, found)
        if not self._may_choose((place, topic_id), offset, known, is_new=is_new, is_known=found is not None):
            start = offset if known is None else max(known, left)
            self._check_gap("missed", Gap(queue, topic_id, start, offset))
            return
        if self._has_group:
            self._world.promises.began(place, topic_id, offset)
        elif not is_new:
            self._check_gap("missed", Gap(queue, topic_id, left, offset))
            return
        if found is None:
            return
        if self._group.consume_from is ConsumeFrom.LATEST and not self._has_group:
            least = self._latest.get((queue, topic_id), 0)
            if offset < least and not self._world.promises.may_be_reset(queue):
                raise BrokenPromise("start", f"{self._who} begins at {offset} of {spell(queue)}, which had {least} by then.")
        self._check_gap("start", Gap(queue, topic_id, max(self._latest_start(queue, found), left), offset))

    def _check_renewal(self, queue: MessageQueue, topic_id: int, offset: int) -> None:
        """Of a queue that it has read in a former topic of the name: where its group stands by now, else the beginning. While the
        broker is down nobody knows where a group stands."""
        found = self._find(queue, topic_id)
        known = self._stands_at(queue, found)
        if known is None and self._has_group:
            self._world.promises.began((self._group.name, "", queue), topic_id, offset)
        if known is not None or found is not None or not self._has_group:
            self._check_gap("missed", Gap(queue, topic_id, known or 0, offset))

    def _stands_at(self, queue: MessageQueue, found: Queue | None) -> int | None:
        if found is None or not self._has_group:
            return None
        group = self._world.brokers[queue.broker_name].store.tables.groups.get(self._group.name)
        return group.start_offset(found.topic, queue.queue_id) if group is not None else None

    def _may_choose(self, key: tuple[Place, int], offset: int, known: int | None, *, is_new: bool, is_known: bool) -> bool:
        """Whether it begins where it was told to, for want of a place where its group stands. What an earlier life has committed
        may have come too late for this one."""
        if not self._has_group:
            return True
        before = self._first_commits.get(key, 0)
        commits = self._world.promises.first_commits(self._group.name).get(key, 0)
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

    def _is_former(self, message: Message, topic_id: int) -> bool:
        """Whether it was read before its broker lost it with its power, which the reader has not heard of yet."""
        queue = message.queue
        if self._find(queue, topic_id) is None or not self._world.promises.may_have_lost(queue.broker_name, message.body):
            return False
        placed = self._world.brokers[queue.broker_name].contents(queue).get(message.queue_offset)
        return placed is None or placed.body != message.body

    def _check_gap(self, kind: str, gap: Gap) -> None:
        """It passes over what lies between: nothing but what was deleted or damaged."""
        queue, topic_id, start, end = gap
        if start >= end:
            return
        broker, promises = self._world.brokers[queue.broker_name], self._world.promises
        if not _is_known(broker):
            self._put_off.append(gap)
            return
        contents = broker.contents(queue) if self._find(queue, topic_id) is not None else {}
        for offset, placed in between(contents, start, end):
            if promises.is_damaged(placed.body) or promises.is_deleted(queue.broker_name, placed.end):
                continue
            posting = promises.postings[placed.body]
            what = f"{posting}, at {offset} of {spell(queue)}, and goes on at {end}"
            raise BrokenPromise(kind, f"{self._who} never got {what}; it was at {start}.")

    def _find(self, queue: MessageQueue, topic_id: int = 0) -> Queue | None:
        """The queue as its broker has it; None while that is down, or when the topic is not the one with this id."""
        broker = self._world.brokers[queue.broker_name]
        if not _is_known(broker):
            return None
        topic = broker.store.tables.topics.get(queue.topic)
        is_there = topic is not None and topic_id in (0, topic.topic_id) and queue.queue_id < len(topic.queues)
        return topic.queues[queue.queue_id] if topic is not None and is_there else None


def _is_known(broker: VirtualBroker) -> bool:
    return broker.check is not None and broker.machine is not None
