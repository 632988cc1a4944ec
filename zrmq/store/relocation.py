"""Relocation: what is still wanted is said again at the end of the log before the segment that said it first is deleted.

Topics, how far their queues had come, subscriptions, consumer offsets and leases are folded from the log, so what only a deleted
segment said would hang on views.db alone. Hence the rule: a log that begins at `Tables.relocated_from` or before has all of it.
One relocation serves until the log begins behind it: the state is written once for a whole log's length, not for each segment.

It may take several rounds. Each event is true when it is appended, and what changes between is in the log behind it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter

from zrmq.errors import DiskFullError, PayloadTooLargeError, StoreFailedError
from zrmq.logs import get_logger
from zrmq.protocol.batch import ENTRY_HEADER_BYTES
from zrmq.protocol.events import (
    AnyEvent,
    GroupSubscribed,
    LeaseGranted,
    OffsetsCommitted,
    QueuesAdvanced,
    StateRelocated,
    TopicPut,
    encode_event,
)
from zrmq.store.commit_log import CommitLog, NoDescriptorError
from zrmq.store.tables import Group, Tables, Topic

log = get_logger("store")

ROUND_BYTES = 128 << 10  # some ten milliseconds of the loop's time
OFFSETS_PER_EVENT = 256  # 4 KiB
PLENTY_SEGMENTS = 4  # no state is longer: 256 MiB


class Relocation:
    """Says everything again when it has to be. Loop thread only."""

    def __init__(self, commit_log: CommitLog, tables: Tables, append: Callable[[AnyEvent], int]) -> None:
        self._log = commit_log
        self._tables = tables
        self._append = append
        self._events: Iterator[AnyEvent] | None = None  # not appended yet
        self._end = 0  # of the last one appended
        self._is_refusal_told = False

    def reaches(self, position: int) -> bool:
        """Whether the log may begin at `position` and still have everything, after a power cut too."""
        return position <= self._tables.relocated_from and self._end <= self._log.flushed_position

    def go_on(self, position: int, free_bytes: int | None) -> bool:
        """Append some more, until `position` is reached and only the flush is to come; the first call begins. False when there is
        no room: what frees a full disk is not to wait for it. `free_bytes`: what new segments may take, None if not known.
        """
        if self._events is None:
            if position <= self._tables.relocated_from:
                return True
            if free_bytes is not None and not self._has_room(free_bytes):
                self._tell_refused("the disk has no room for all of it")
                return False
            self._events = statements(self._tables, self._log.appended_position)
        try:
            end = self._log.appended_position + ROUND_BYTES
            for event in self._events:
                self._end = self._append(event)
                if type(event) is StateRelocated:
                    log.info("state_relocated", position=event.position, bytes=self._end - event.position)
                    self._events = None
                    self._is_refusal_told = False
                    break
                if self._end >= end:
                    break
        except StoreFailedError:
            self._events = None  # nothing is deleted any more either
        except (DiskFullError, PayloadTooLargeError) as error:
            self._events = None
            self._tell_refused(error.message)
            return isinstance(error, NoDescriptorError)  # it passes without anything deleted
        return True

    def _tell_refused(self, reason: str) -> None:
        """Once, until it has been possible: it is tried each second."""
        if not self._is_refusal_told:
            self._is_refusal_told = True
            log.warning("state_not_relocated", reason=reason)

    def _has_room(self, free_bytes: int) -> bool:
        """Nothing is begun that would fill the disk half-way, only to be begun again when something was deleted for it."""
        commit_log = self._log
        if free_bytes >= PLENTY_SEGMENTS * commit_log.segment_bytes:
            return True
        room_bytes = max(commit_log.limit - commit_log.appended_position, 0)
        room_bytes += free_bytes // commit_log.segment_bytes * commit_log.entry_bytes_max
        events = statements(self._tables, commit_log.appended_position)
        return sum(ENTRY_HEADER_BYTES + len(encode_event(event)) for event in events) <= room_bytes


def statements(tables: Tables, position: int) -> Iterator[AnyEvent]:
    """Everything the tables hold, as events that are true when they are taken; the last one says that it was everything.

    `position`: where the log ended before the first one."""
    for topic in list(tables.topics_by_id.values()):
        for event in _topic_statements(topic):
            if tables.topics_by_id.get(topic.topic_id) is not topic:
                break  # deleted meanwhile
            yield event
    for group in list(tables.groups.values()):
        for group_event in _group_statements(group):
            if tables.groups.get(group.name) is not group:
                break
            yield group_event
    yield StateRelocated(position, tables.boot, tables.next_topic_id, tables.session_timeout_ms)


def _topic_statements(topic: Topic) -> Iterator[AnyEvent]:
    yield TopicPut(topic.topic_id, topic.config)
    for at in range(0, len(topic.queues), OFFSETS_PER_EVENT):
        queues = topic.queues[at : at + OFFSETS_PER_EVENT]
        yield QueuesAdvanced(topic.topic_id, [(queue.queue_id, queue.next_offset) for queue in queues])


def _group_statements(group: Group) -> Iterator[AnyEvent]:
    yield OffsetsCommitted(group.name, "", [])  # there is such a group, if nothing else is known of it
    for instance_name, topic in [(name, topic) for name, each in group.subscriptions.items() for topic in each]:
        subscribed = group.subscribed(topic, instance_name)
        if subscribed is not None:
            yield GroupSubscribed(group.name, topic, subscribed.since_ms, list(subscribed.starts.items()), instance_name)
    keys = list(group.offsets)
    for at in range(0, len(keys), OFFSETS_PER_EVENT):
        for instance_name, some in groupby(keys[at : at + OFFSETS_PER_EVENT], itemgetter(0)):
            found = ((topic_id, queue_id, group.offsets.get((name, topic_id, queue_id), -1)) for name, topic_id, queue_id in some)
            yield OffsetsCommitted(group.name, instance_name, [offset for offset in found if offset[2] >= 0])
    for topic_id, queue_id in list(group.leases):
        lease = group.leases.get((topic_id, queue_id))
        if lease is not None:
            yield LeaseGranted(group.name, topic_id, queue_id, lease.client_id, lease.lease_epoch)
