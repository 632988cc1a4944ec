"""The broker's tables as the fold of its log: topics, queues, groups, offsets, leases, and who sent what last. Pure.

The same two functions run when something happens (`Store.append_batch`, `Store.append_event`) and when the log is replayed, so a
restarted broker, a replica and a rebuilt one cannot disagree. Nothing here looks at a clock, a file or chance.

What has changed since the last save is marked as it changes; `take_changed` hands the marks to whoever saves.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from zrmq.protocol.batch import BatchHeader
from zrmq.protocol.events import (
    AnyEvent,
    BrokerStarted,
    BrokerStopped,
    GroupDeleted,
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    QueuesAdvanced,
    SessionTimeoutChanged,
    StateRelocated,
    TopicConfig,
    TopicDeleted,
    TopicPut,
)
from zrmq.protocol.limits import INFLIGHT_BATCHES_MAX

WINDOWS_MAX = 10_000  # (producer, queue) pairs remembered; the ones silent for longest go first. 10 MB when all are full
WINDOW_BATCHES = INFLIGHT_BATCHES_MAX  # a producer resends only what it has no answer for

_SENT = struct.Struct("<QQqI")  # first sequence, base offset, store timestamp ms, record count
SENT_BYTES = _SENT.size

WindowKey = tuple[int, int, int]  # producer id, topic id, queue id
OffsetKey = tuple[str, int, int]  # instance name, topic id, queue id


class Topic:
    """One topic at this broker."""

    __slots__ = ("config", "queues", "topic_id")

    def __init__(self, topic_id: int, config: TopicConfig) -> None:
        self.topic_id = topic_id
        self.config = config
        self.queues: list[Queue] = []

    def grow(self, queue_count: int) -> None:
        """Add queues until there are as many; none are taken away."""
        self.queues += [Queue(self, queue_id) for queue_id in range(len(self.queues), queue_count)]


class Queue:
    """One queue. Invariant: min_offset <= visible_offset <= next_offset, and flushed_offset <= visible_offset."""

    __slots__ = ("flushed_offset", "min_offset", "next_offset", "queue_id", "topic", "visible_offset")

    def __init__(self, topic: Topic, queue_id: int) -> None:
        self.topic = topic
        self.queue_id = queue_id
        self.min_offset = 0  # of the first message that is still there
        self.next_offset = 0  # what the next message gets
        self.visible_offset = 0  # consumers see what is below
        self.flushed_offset = 0  # what is below survives a power cut: the same, unless the topic is acknowledged before its flush

    def advance(self, offset: int) -> None:
        """Offsets before this one were given once; what had them need not be in the log any more."""
        if offset > self.next_offset:
            if self.min_offset == self.next_offset:
                self.min_offset = offset
            self.next_offset = offset

    def __repr__(self) -> str:
        return f"<Queue {self.topic.config.topic}/{self.queue_id} {self.min_offset}..{self.visible_offset}..{self.next_offset}>"


class Subscribed(msgspec.Struct, array_like=True):
    """Since when a group, or an instance of it, has been subscribed to a topic, and where it began in the queues of then."""

    since_ms: int
    starts: dict[int, int]


Subscriptions = dict[str, dict[str, Subscribed]]  # by instance name (empty when clustering), then by topic name


class Lease(msgspec.Struct, array_like=True, frozen=True):
    """Who may read a queue for a group."""

    client_id: str
    lease_epoch: int


class Group:
    """One consumer group."""

    __slots__ = ("leases", "name", "offsets", "subscriptions")

    def __init__(self, name: str) -> None:
        self.name = name
        self.subscriptions: Subscriptions = {}
        self.offsets: dict[OffsetKey, int] = {}
        self.leases: dict[tuple[int, int], Lease] = {}  # by topic id, queue id

    @property
    def topics(self) -> set[str]:
        """The topics that it, or any instance of it, ever subscribed to."""
        return {topic for each in self.subscriptions.values() for topic in each}

    def subscribed(self, topic: str, instance_name: str = "") -> Subscribed | None:
        """The subscription to a topic, None if there never was one."""
        return self.subscriptions.get(instance_name, {}).get(topic)

    def start_offset(self, topic: Topic, queue_id: int, instance_name: str = "") -> int | None:
        """Where to read on: the committed offset, else where the subscription began; None if it never subscribed."""
        offset = self.offsets.get((instance_name, topic.topic_id, queue_id))
        if offset is not None:
            return offset
        subscribed = self.subscribed(topic.config.topic, instance_name)
        return None if subscribed is None else subscribed.starts.get(queue_id, 0)


class Window:
    """The last batches one producer sent to one queue, oldest first, packed: 28 bytes each."""

    __slots__ = ("highest_sequence", "position", "sent")

    def __init__(self, position: int = 0, highest_sequence: int = -1, sent: bytes = b"") -> None:
        self.position = position  # of the newest one in the log; the order in which windows are forgotten
        self.highest_sequence = highest_sequence
        self.sent = bytearray(sent)

    def add(self, position: int, first_sequence: int, base_offset: int, store_timestamp_ms: int, record_count: int) -> None:
        """Remember one more batch, and forget the oldest if there are too many."""
        sent = self.sent
        sent += _SENT.pack(first_sequence, base_offset, store_timestamp_ms, record_count)
        if len(sent) > WINDOW_BATCHES * _SENT.size:
            del sent[: _SENT.size]
        self.position = position
        last_sequence = first_sequence + record_count - 1
        if last_sequence > self.highest_sequence:
            self.highest_sequence = last_sequence


class Changed(msgspec.Struct):
    """Names and ids of what has changed."""

    topics: set[int] = msgspec.field(default_factory=set)
    topics_deleted: set[int] = msgspec.field(default_factory=set)
    groups: set[str] = msgspec.field(default_factory=set)
    groups_deleted: set[str] = msgspec.field(default_factory=set)
    offsets: set[tuple[str, str, int, int]] = msgspec.field(default_factory=set)  # group, instance name, topic id, queue id

    def add(self, other: Changed) -> None:
        """Take over what another one has."""
        for name in self.__struct_fields__:
            getattr(self, name).update(getattr(other, name))


class Tables:
    """All tables of one broker. Loop thread only."""

    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}
        self.topics_by_id: dict[int, Topic] = {}
        self.groups: dict[str, Group] = {}
        self.windows: OrderedDict[WindowKey, Window] = OrderedDict()  # least recently sent first
        self.next_topic_id = 1
        self.boot = 0
        self.is_stopped = False  # the last event was BrokerStopped
        self.relocated_from = 0  # a log that begins here, or before, has everything that is in these tables
        self.session_timeout_ms = 0  # the longest that a holder of a lease may have been told of; 0 before anybody was
        self._changed = Changed()
        self._folds: dict[type[Any], Callable[[Any], None]] = {
            BrokerStarted: self._broker_started,
            BrokerStopped: self._broker_stopped,
            TopicPut: self._topic_put,
            TopicDeleted: self._topic_deleted,
            GroupSubscribed: self._group_subscribed,
            GroupDeleted: self._group_deleted,
            OffsetsCommitted: self._offsets_committed,
            LeaseGranted: self._lease_granted,
            LeaseReleased: self._lease_released,
            QueuesAdvanced: self._queues_advanced,
            StateRelocated: self._state_relocated,
            SessionTimeoutChanged: self._session_timeout_changed,
        }

    def take_changed(self) -> Changed:
        """What has changed since the last call."""
        changed, self._changed = self._changed, Changed()
        return changed

    def give_back(self, changed: Changed) -> None:
        """What was taken could not be saved; it is still to be."""
        self._changed.add(changed)

    # --- batches ------------------------------------------------------------------------------------------------------

    def apply_batch(self, header: BatchHeader) -> Queue | None:
        """Fold one batch of the log. Returns its queue; None, and no queue changes, when the tables have no place for it:
        its topic is gone, or the queue has offsets beyond it already."""
        topic = self.topics_by_id.get(header.topic_id)
        if topic is None:
            self.next_topic_id = max(self.next_topic_id, header.topic_id + 1)  # the log may begin behind the topic's own event
            return None
        if header.queue_id >= len(topic.queues):
            return None
        queue = topic.queues[header.queue_id]
        if header.base_offset < queue.next_offset:
            return None
        if queue.min_offset == queue.next_offset:
            queue.min_offset = header.base_offset  # what lay before it is gone
        self.place(
            queue, header.position, header.producer_id, header.first_sequence, header.base_offset, header.store_timestamp_ms,
            header.record_count,
        )
        return queue

    def place(
        self, queue: Queue, position: int, producer_id: int, first_sequence: int, base_offset: int, store_timestamp_ms: int,
        record_count: int,
    ) -> None:
        """Fold one batch that is known to belong to `queue`; `position` is its own in the log. On the hot path."""
        queue.next_offset = base_offset + record_count
        key = (producer_id, queue.topic.topic_id, queue.queue_id)
        windows = self.windows
        window = windows.get(key)
        if window is None:
            windows[key] = window = Window()
            if len(windows) > WINDOWS_MAX:
                windows.popitem(last=False)
        else:
            windows.move_to_end(key)
        window.add(position, first_sequence, base_offset, store_timestamp_ms, record_count)

    def find_duplicate(
        self, producer_id: int, topic_id: int, queue_id: int, first_sequence: int
    ) -> tuple[int, int, int] | None:
        """Base offset, store timestamp and record count of the batch that begins with this sequence; None if it is new."""
        window = self.windows.get((producer_id, topic_id, queue_id))
        if window is None or first_sequence > window.highest_sequence:
            return None
        for first, base_offset, store_timestamp_ms, record_count in _SENT.iter_unpack(window.sent):
            if first == first_sequence:
                return base_offset, store_timestamp_ms, record_count
        return None

    def has_stored(self, producer_id: int, topic_id: int, queue_id: int, last_sequence: int) -> bool:
        """Whether one of the last batches of this producer to this queue ends with this sequence."""
        window = self.windows.get((producer_id, topic_id, queue_id))
        if window is None:
            return False
        first, _, _, record_count = _SENT.unpack_from(window.sent, len(window.sent) - _SENT.size)
        if first + record_count - 1 == last_sequence:
            return True
        return any(first + count - 1 == last_sequence for first, _, _, count in _SENT.iter_unpack(window.sent))

    # --- events -------------------------------------------------------------------------------------------------------

    def apply_event(self, event: AnyEvent) -> None:
        """Fold one event. What it speaks of may be gone by now: then nothing happens."""
        self.is_stopped = False
        self._folds[type(event)](event)

    def _broker_started(self, event: BrokerStarted) -> None:
        self.boot = event.boot

    def _broker_stopped(self, event: BrokerStopped) -> None:
        self.is_stopped = True

    def _topic_put(self, event: TopicPut) -> None:
        topic = self.topics_by_id.get(event.topic_id)
        if topic is None:
            named = self.topics.get(event.config.topic)
            if named is not None and named.topic_id > event.topic_id:
                return  # it was deleted, and the event that said so is damaged
            if named is not None:
                self._topic_deleted(TopicDeleted(named.topic_id))  # so was that one
            topic = Topic(event.topic_id, event.config)
            self.topics[event.config.topic] = self.topics_by_id[event.topic_id] = topic
            self.next_topic_id = max(self.next_topic_id, event.topic_id + 1)
        topic.config = event.config
        topic.grow(event.config.queue_count)
        self._changed.topics.add(event.topic_id)

    def _topic_deleted(self, event: TopicDeleted) -> None:
        topic = self.topics_by_id.pop(event.topic_id, None)
        if topic is None:
            return
        name = topic.config.topic
        del self.topics[name]
        self._changed.topics_deleted.add(event.topic_id)
        for group in self.groups.values():
            for subscriptions in group.subscriptions.values():
                if name in subscriptions:
                    subscriptions[name].starts.clear()  # a new topic of that name is read from its beginning
                    self._changed.groups.add(group.name)
            if any(topic_id == event.topic_id for topic_id, _ in group.leases):
                group.leases = {key: lease for key, lease in group.leases.items() if key[0] != event.topic_id}
                self._changed.groups.add(group.name)
            group.offsets = {key: offset for key, offset in group.offsets.items() if key[1] != event.topic_id}
        for key in [key for key in self.windows if key[1] == event.topic_id]:
            del self.windows[key]

    def _group(self, name: str) -> Group:
        group = self.groups.get(name)
        if group is None:
            self.groups[name] = group = Group(name)
            self._changed.groups.add(name)
        return group

    def _group_subscribed(self, event: GroupSubscribed) -> None:
        subscriptions = self._group(event.group).subscriptions.setdefault(event.instance_name, {})
        subscriptions[event.topic] = Subscribed(event.since_ms, dict(event.starts))
        self._changed.groups.add(event.group)

    def _group_deleted(self, event: GroupDeleted) -> None:
        if self.groups.pop(event.group, None) is not None:
            self._changed.groups_deleted.add(event.group)

    def _offsets_committed(self, event: OffsetsCommitted) -> None:
        group = self._group(event.group)
        for topic_id, queue_id, offset in event.offsets:
            topic = self.topics_by_id.get(topic_id)
            if topic is None or queue_id >= len(topic.queues):
                continue
            group.offsets[event.instance_name, topic_id, queue_id] = offset
            self._changed.offsets.add((event.group, event.instance_name, topic_id, queue_id))
            topic.queues[queue_id].advance(offset)  # what was committed was once stored: damage ate it

    def _lease_granted(self, event: LeaseGranted) -> None:
        if event.topic_id in self.topics_by_id:
            self._group(event.group).leases[event.topic_id, event.queue_id] = Lease(event.client_id, event.lease_epoch)
            self._changed.groups.add(event.group)

    def _lease_released(self, event: LeaseReleased) -> None:
        group = self.groups.get(event.group)
        lease = group.leases.get((event.topic_id, event.queue_id)) if group else None
        if group and lease and lease.lease_epoch == event.lease_epoch:
            del group.leases[event.topic_id, event.queue_id]
            self._changed.groups.add(event.group)

    def _queues_advanced(self, event: QueuesAdvanced) -> None:
        topic = self.topics_by_id.get(event.topic_id)
        for queue_id, offset in event.next_offsets:
            if topic is not None and queue_id < len(topic.queues):
                topic.queues[queue_id].advance(offset)

    def _state_relocated(self, event: StateRelocated) -> None:
        self.relocated_from = event.position
        self.boot = max(self.boot, event.boot)
        self.next_topic_id = max(self.next_topic_id, event.next_topic_id)
        self.session_timeout_ms = event.session_timeout_ms

    def _session_timeout_changed(self, event: SessionTimeoutChanged) -> None:
        self.session_timeout_ms = event.session_timeout_ms
