"""Relocation: what is still wanted is said again at the end of the log before the segment that said it first is deleted.

Topics, how far their queues had come, subscriptions, consumer offsets and leases are folded from the log, so what only a deleted
segment said would hang on views.db alone. Hence the rule: a log that begins at `Tables.relocated_from` or before has all of it.
One relocation serves until the log begins behind it: the state is written once for a whole log's length, not for each segment.

It may take several rounds. Each event is true when it is appended, and what changes between is in the log behind it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from zrmq.errors import DiskFullError, PayloadTooLargeError, StoreFailedError
from zrmq.logs import get_logger
from zrmq.protocol.events import (
    AnyEvent,
    GroupSubscribed,
    LeaseGranted,
    OffsetsCommitted,
    QueuesAdvanced,
    StateRelocated,
    TopicPut,
)
from zrmq.store.commit_log import CommitLog
from zrmq.store.tables import Group, Tables, Topic

log = get_logger("store")

EVENTS_PER_ROUND = 1_000  # some ten milliseconds of the loop's time
OFFSETS_PER_EVENT = 256  # 4 KiB


class Relocation:
    """Says everything again when it has to be. Loop thread only."""

    def __init__(self, commit_log: CommitLog, tables: Tables, append: Callable[[AnyEvent], int]) -> None:
        self._log = commit_log
        self._tables = tables
        self._append = append
        self._events: Iterator[AnyEvent] | None = None  # not appended yet
        self._end = 0  # of the last one appended

    def reaches(self, position: int) -> bool:
        """Whether the log may begin at `position` and still have everything, after a power cut too."""
        return position <= self._tables.relocated_from and self._end <= self._log.flushed_position

    def go_on(self) -> bool:
        """Append some more; the first call begins. False when there is no room: what frees a full disk is not to wait for it."""
        if self._events is None:
            self._events = statements(self._tables, self._log.appended_position)
        try:
            for event in islice(self._events, EVENTS_PER_ROUND):
                self._end = self._append(event)
                if type(event) is StateRelocated:
                    log.info("state_relocated", position=event.position, bytes=self._end - event.position)
                    self._events = None
        except StoreFailedError:
            self._events = None  # nothing is deleted any more either
        except (DiskFullError, PayloadTooLargeError) as error:
            self._events = None
            log.warning("state_not_relocated", reason=error.message)
            return False
        return True


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
    by_instance: dict[str, list[tuple[int, int]]] = {}
    for instance_name, topic_id, queue_id in group.offsets:
        by_instance.setdefault(instance_name, []).append((topic_id, queue_id))
    for instance_name, queues in by_instance.items():
        for at in range(0, len(queues), OFFSETS_PER_EVENT):
            some = ((*key, group.offsets.get((instance_name, *key), -1)) for key in queues[at : at + OFFSETS_PER_EVENT])
            yield OffsetsCommitted(group.name, instance_name, [offset for offset in some if offset[2] >= 0])
    for topic_id, queue_id in list(group.leases):
        lease = group.leases.get((topic_id, queue_id))
        if lease is not None:
            yield LeaseGranted(group.name, topic_id, queue_id, lease.client_id, lease.lease_epoch)
