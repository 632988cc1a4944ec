"""Checks of one broker's log while it grows: dense offsets, nothing twice, the order of each producer, where groups begin, leases
and commits.

Each life of a broker has a check of its own that reads the log from its beginning, so what recovery made of it is checked too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from zrmq.message import ConsumeFrom, MessageQueue
from zrmq.protocol.events import GroupSubscribed, LeaseGranted, LeaseReleased, OffsetsCommitted, TopicDeleted, TopicPut
from zrmq.store.tables import Lease, Queue, Subscribed, Tables
from zrmq.testing.simulation.log_watch import Entry, LogWatch, Placed, between
from zrmq.testing.simulation.promises import Place, Promises
from zrmq.testing.simulation.trace import BrokenPromise, spell


class LogCheck:
    """One life of one broker's log. Raises `BrokenPromise` for what must not be in a log."""

    def __init__(
        self, broker_name: str, watch: LogWatch, promises: Promises, checked: Mapping[int, tuple[int, int]],
        recovered_position: int,
    ) -> None:
        """`checked`: entries of an earlier life's log. They are not checked again: the tables may lack what was lost since.
        `recovered_position`: up to there the log is of earlier lives, seen by a check or not."""
        self.watch = watch
        self.flushed_position = 0
        self.log_start = watch.start  # what was before is deleted
        self._broker_name = broker_name
        self._promises = promises
        self._checked = checked
        self._recovered_position = recovered_position
        self._sequences: set[tuple[int, int]] = set()
        self._last_numbers: dict[tuple[MessageQueue, str, type], int] = {}
        self._lease_epoch = 0
        self._resets: Counter[tuple[Place, int]] = Counter()  # by place and topic id

    def advance(self, written_position: int, flushed_position: int) -> None:
        """The store says that its log reaches so far."""
        for entry in self.watch.advance(written_position):
            if isinstance(entry.event, LeaseGranted):
                self._promises.lease_topics[self._broker_name, entry.event.lease_epoch] = entry.event.topic_id
            elif isinstance(entry.event, TopicPut):
                self._promises.topic_ids[self._broker_name, entry.event.config.topic] = entry.event.topic_id
                self._promises.topic_names[self._broker_name, entry.event.topic_id] = entry.event.config.topic
            elif isinstance(entry.event, TopicDeleted):
                self._note_deleted(entry.event.topic_id, entry.position)
            if not self.watch.is_complete:
                self._note_former(entry)  # it was checked when it was written
            elif self._checked.get(entry.position) == (entry.end, entry.crc):
                self._learn(entry)
            elif entry.batch is not None:
                self._check_batch(entry)
            elif isinstance(entry.event, OffsetsCommitted):
                self._check_commit(entry.event)
            elif isinstance(entry.event, LeaseGranted):
                self._check_grant(entry.event)
            elif isinstance(entry.event, GroupSubscribed):
                self._check_subscription(entry.event)
                self._promises.subscribed(self._broker_name, entry.event)
        self.flushed_position = flushed_position

    def placed(self, queue: MessageQueue, offset: int, topic_id: int = 0) -> Placed | None:
        """The message at an offset, None when there is none. `topic_id`: of a former topic of that name, perhaps."""
        topic = self.watch.tables.topics.get(queue.topic)
        topic_id = topic_id or (topic.topic_id if topic is not None else 0)
        return self.watch.queues.get((topic_id, queue.queue_id), {}).get(offset)

    def contents(self, queue: MessageQueue) -> dict[int, Placed]:
        """All messages of a queue by offset."""
        topic = self.watch.tables.topics.get(queue.topic)
        return {} if topic is None else self.watch.queues.get((topic.topic_id, queue.queue_id), {})

    def is_expired(self, queue: MessageQueue, offset: int) -> bool:
        """Whether the log begins behind the message that was at this offset of a queue."""
        topic = self.watch.tables.topics.get(queue.topic)
        if topic is None:
            return not self.watch.is_complete  # there was no room to say again what the deleted log said
        if self.log_start == 0 or queue.queue_id >= len(topic.queues):
            return False
        key, next_offset = (topic.topic_id, queue.queue_id), topic.queues[queue.queue_id].next_offset
        return offset < self.watch.first_offset(key, self.log_start, next_offset)

    def unflushed_bodies(self) -> list[bytes]:
        """What a power cut may take."""
        queues = self.watch.queues.values()
        return [placed.body for contents in queues for placed in contents.values() if placed.end > self.flushed_position]

    def unflushed_queues(self) -> list[MessageQueue]:
        """Those that have messages which a power cut may take."""
        topics = self.watch.tables.topics_by_id
        return [
            MessageQueue(topics[topic_id].config.topic, self._broker_name, queue_id)
            for (topic_id, queue_id), contents in self.watch.queues.items()
            if topic_id in topics and any(placed.end > self.flushed_position for placed in contents.values())
        ]

    def compare_with_former(self, former: LogCheck, survives_until: int) -> None:
        """Everything the former life had up to a position must be here, unchanged."""
        for position, (end, crc) in former.watch.entries.items():
            if self.watch.start < end <= survives_until and self.watch.entries.get(position) != (end, crc):
                self._fail("survival", f"the entry at {position}..{end} is lost; all up to {survives_until} was safe.")

    def compare_tables(self, tables: Tables) -> None:
        """The store's tables must equal a fold of its log."""
        if not self.watch.is_complete:
            return
        if self.watch.start:
            self._check_windows(tables)
        ours, theirs = describe_tables(self.watch.tables), describe_tables(tables)
        for name in ours:
            if ours[name] != theirs[name] and not (name == "windows" and self.watch.start):
                self._fail("views", f"the {name} are {theirs[name]}, but a fold of the log gives {ours[name]}.")
        self.check_first_offsets(tables)

    def check_first_offsets(self, tables: Tables, *, is_trimmed: bool = False) -> None:
        """No queue begins behind what the log still has; nor, once it is trimmed, before that."""
        for topic in tables.topics.values():
            for queue in topic.queues:
                first = self._first_offset(queue)
                if queue.min_offset > first or (is_trimmed and queue.min_offset < first):
                    self._fail("views", f"{queue} does not begin at {first}, as its log does.")

    def _check_windows(self, tables: Tables) -> None:
        """Of a log whose beginning is deleted, the store may still know which batches came before."""
        for key, window in self.watch.tables.windows.items():
            theirs = tables.windows.get(key)
            if theirs is None or theirs.highest_sequence < window.highest_sequence or not theirs.sent.endswith(window.sent):
                self._fail("views", f"the window of {key} is not what a fold of the log gives.")

    def _note_deleted(self, topic_id: int, position: int) -> None:
        """Whatever the topic had may be stored once more, in the next one of the name too, and the order begins anew there."""
        queues = [contents for key, contents in self.watch.queues.items() if key[0] == topic_id]
        had = [placed for contents in queues for placed in contents.values()]
        name = self._promises.topic_names[self._broker_name, topic_id]
        self._promises.topic_deleted(self._broker_name, topic_id, position, (placed.body for placed in had))
        self._sequences.difference_update((placed.producer_id, placed.sequence) for placed in had)
        for key in [key for key in self._last_numbers if key[0].topic == name]:
            del self._last_numbers[key]

    def _note_former(self, entry: Entry) -> None:
        if entry.batch is not None:
            numbers = range(entry.batch.first_sequence, entry.batch.first_sequence + len(entry.bodies))
            self._sequences.update((entry.batch.producer_id, number) for number in numbers)

    def _first_offset(self, queue: Queue) -> int:
        """Of the first message that its log has: a queue that was made anew begins behind the damaged ones that it began with."""
        contents = self.watch.queues.get((queue.topic.topic_id, queue.queue_id), {})
        return next((
            offset for offset, placed in contents.items()
            if placed.end > self.log_start and not self._promises.is_damaged(placed.body)
        ), queue.next_offset)

    def check_reported(self, stretches: list[tuple[int, int]], positions: Iterable[int]) -> None:
        """Damage of these entries must have been told."""
        for position in positions:
            end = position + 1
            if not any(start < end and position < stop for start, stop in stretches):
                self._fail("damage", f"the entry at {position} is damaged, and nobody was told.")

    def _fail(self, kind: str, reason: str) -> NoReturn:
        raise BrokenPromise(kind, f"{self._broker_name}: {reason}")

    def _learn(self, entry: Entry) -> None:
        """Take over what later entries are compared with."""
        if isinstance(entry.event, LeaseGranted):
            self._lease_epoch = max(self._lease_epoch, entry.event.lease_epoch)
        elif isinstance(entry.event, GroupSubscribed):
            self._promises.subscribed(self._broker_name, entry.event)
        batch = entry.batch
        if batch is None or entry.position in self.watch.missing:
            return
        topic = self.watch.tables.topics_by_id[batch.topic_id]
        queue = MessageQueue(topic.config.topic, self._broker_name, batch.queue_id)
        for index, body in enumerate(entry.bodies):
            self._sequences.add((batch.producer_id, batch.first_sequence + index))
            posting = self._promises.postings[body]
            if posting.is_in_order:
                key = (queue, posting.sender, posting.kind)
                self._last_numbers[key] = max(posting.number, self._last_numbers.get(key, -1))

    def _check_batch(self, entry: Entry) -> None:
        batch = entry.batch
        assert batch is not None
        topic = self.watch.tables.topics_by_id.get(batch.topic_id)
        if topic is None or batch.queue_id >= len(topic.queues):
            self._fail("log", f"there is no queue {batch.queue_id} of topic {batch.topic_id} for the batch at {entry.position}.")
        next_offset = topic.queues[batch.queue_id].next_offset
        queue = MessageQueue(topic.config.topic, self._broker_name, batch.queue_id)
        is_behind_lost = batch.base_offset > next_offset and self._has_lost_end(batch.topic_id, batch.queue_id)
        if batch.base_offset != next_offset and not is_behind_lost:
            self._fail("dense", f"{spell(queue)} goes on at {batch.base_offset} after {next_offset}.")
        if batch.record_count != len(entry.bodies):
            self._fail("log", f"the batch at {entry.position} has {len(entry.bodies)} records and says {batch.record_count}.")
        for index, body in enumerate(entry.bodies):
            self._check_message(queue, batch.base_offset + index, batch.producer_id, batch.first_sequence + index, body)

    def _has_lost_end(self, topic_id: int, queue_id: int) -> bool:
        """Whether the entry at hand, which the last life wrote and nobody saw, may know of a later end of the queue: what said so
        is lost since."""
        return self.watch.end < self._recovered_position and self.watch.has_lost_offsets(topic_id, queue_id, self.watch.end)

    def _check_message(self, queue: MessageQueue, offset: int, producer_id: int, sequence: int, body: bytes) -> None:
        if (producer_id, sequence) in self._sequences:
            place = f"{offset} of {spell(queue)}"
            self._fail("double", f"sequence {sequence} of producer {producer_id:x} is there twice, now at {place}.")
        self._sequences.add((producer_id, sequence))
        posting = self._promises.postings.get(body)
        if posting is None or producer_id not in self._promises.producer_ids[posting.sender]:
            self._fail("log", f"nobody sent what is at {offset} of {spell(queue)}.")
        if posting.topic != queue.topic or posting.queue not in (None, queue):
            self._fail("bound", f"{posting} for {posting.queue or posting.topic} is at {offset} of {spell(queue)}.")
        if not posting.is_in_order:
            return
        key = (queue, posting.sender, posting.kind)
        last = self._last_numbers.get(key, -1)
        if self._promises.is_damaged(body):
            return  # stored again, as its first copy was lost
        if posting.number <= last:
            self._fail("order", f"{posting} is at {offset} of {spell(queue)} behind number {last}, which was sent later.")
        self._last_numbers[key] = posting.number

    def _check_grant(self, event: LeaseGranted) -> None:
        group = self.watch.tables.groups.get(event.group)
        held = group.leases.get((event.topic_id, event.queue_id)) if group is not None else None
        if held == Lease(event.client_id, event.lease_epoch):
            return  # said again, before the segment that said it first is deleted
        if held is not None and not any(lost.lease_epoch == held.lease_epoch for lost in self.watch.lost_events(LeaseReleased)):
            self._fail("lease", f"{event} was granted while {held} was in force.")
        if event.lease_epoch <= self._lease_epoch:
            self._fail("lease", f"{event} has an epoch that is not beyond {self._lease_epoch}.")
        self._lease_epoch = event.lease_epoch

    def _check_subscription(self, event: GroupSubscribed) -> None:
        """A group that begins late misses what it asked for, and nothing else in its log shows it."""
        topic, group = self.watch.tables.topics.get(event.topic), self.watch.tables.groups.get(event.group)
        starts = dict(event.starts)
        known = group.subscribed(event.topic, event.instance_name) if group is not None else None
        if known == Subscribed(event.since_ms, starts):
            return  # said again
        if known is not None:
            self._fail("start", f"{event} takes the place of {known}.")
        for queue in topic.queues if topic is not None else ():
            start, latest = starts.get(queue.queue_id, 0), self._latest_start(event, queue)
            if start > latest:
                place = spell(MessageQueue(event.topic, self._broker_name, queue.queue_id))
                self._fail("start", f"{event} begins at {start} of {place}, but what it asked for begins at {latest}.")

    def _latest_start(self, event: GroupSubscribed, queue: Queue) -> int:
        """Where the group has to begin, at the latest. LATEST is now for the first broker that hears of the group, whatever its
        clock says; every other one is told when that was."""
        group = self._promises.groups[event.group]
        first = self._first_offset(queue)
        if group.consume_from is ConsumeFrom.EARLIEST:
            return first
        if group.consume_from is ConsumeFrom.LATEST and not self._promises.is_told(self._broker_name, event):
            return queue.next_offset
        # Two brokers may have their own now in the same millisecond, so what was stored within that one tells nothing.
        from_ms = group.consume_timestamp_ms or event.since_ms + 1
        later = (
            offset for offset, placed in self.watch.queues.get((queue.topic.topic_id, queue.queue_id), {}).items()
            if offset >= first and placed.store_timestamp_ms >= from_ms and not self._promises.is_damaged(placed.body)
        )
        return min(later, default=queue.next_offset)

    def _check_commit(self, event: OffsetsCommitted) -> None:
        group = self.watch.tables.groups.get(event.group)
        for topic_id, queue_id, offset in event.offsets:
            topic = self.watch.tables.topics_by_id.get(topic_id)
            if topic is None or queue_id >= len(topic.queues):
                self._fail("commit", f"{event} is for a queue that does not exist.")
            queue = MessageQueue(topic.config.topic, self._broker_name, queue_id)
            if offset > topic.queues[queue_id].next_offset and not self._has_lost_end(topic_id, queue_id):
                self._fail("commit", f"{event} commits beyond the end of {spell(queue)}, {topic.queues[queue_id].next_offset}.")
            before = group.start_offset(topic, queue_id, event.instance_name) if group is not None else None
            if before is None:
                place = (event.group, event.instance_name, queue)
                before = self._promises.first_commit(place, topic_id, offset, (self.watch.end, offset))  # of who names its queues
            if before is not None:
                self._check_move(event, queue, topic_id, before, offset)
            elif not any(_subscribes(lost, event, queue.topic) for lost in self.watch.lost_events(GroupSubscribed)):
                self._fail("commit", f"{event} is for a group that never subscribed to {spell(queue)}.")

    def _check_move(self, event: OffsetsCommitted, queue: MessageQueue, topic_id: int, before: int, offset: int) -> None:
        place = (event.group, event.instance_name, queue)
        is_lost = self._promises.is_place_lost(place)  # that the group stood elsewhere: who knows it still says it again
        if offset < before and not (is_lost or self._promises.may_be_reset(queue)):  # after a loss consumers go back by a reset
            self._resets[place, topic_id] += 1
            since = self._promises.may_go_back(place, offset, self._resets[place, topic_id])
            if since is None:
                self._fail("commit", f"group {event.group} went back on {spell(queue)} from {before} to {offset}; nobody sought.")
            before = since
        for at, placed in between(self.contents(queue), before, offset):
            if self._promises.is_damaged(placed.body) or self._promises.is_deleted(self._broker_name, placed.end):
                continue
            if not self._promises.is_finished(event.group, event.instance_name, queue, at, placed.body):
                self._fail(
                    "commit", f"group {event.group} {event.instance_name} committed {offset} on {spell(queue)}, but nobody"
                    f" finished {self._promises.postings.get(placed.body)} at {at}."
                )


def _subscribes(lost: GroupSubscribed, event: OffsetsCommitted, topic: str) -> bool:
    return (lost.group, lost.instance_name, lost.topic) == (event.group, event.instance_name, topic)


def describe_tables(tables: Tables) -> dict[str, Any]:
    """Tables as plain values that can be compared."""
    return {
        "topics": {
            topic_id: (topic.config, [queue.next_offset for queue in topic.queues])
            for topic_id, topic in sorted(tables.topics_by_id.items())
        },
        "names": {name: topic.topic_id for name, topic in sorted(tables.topics.items())},
        "groups": {
            name: (dict(group.subscriptions), dict(group.offsets), dict(group.leases))
            for name, group in sorted(tables.groups.items())
        },
        "windows": {key: (window.highest_sequence, bytes(window.sent)) for key, window in sorted(tables.windows.items())},
        "numbers": (tables.next_topic_id, tables.boot, tables.session_timeout_ms),
    }
