"""Log events: every change of a broker's state that is not a message. The broker's tables are the fold of these and the batches.

An event is the payload of an entry of kind 2: a MessagePack array whose first element is the tag below. Fields are only ever
appended. Events carry their outcome, not their reason (offsets found, epochs given), so that folding needs no clock and no luck.
"""

from __future__ import annotations

import msgspec

from zrmq.errors import InvalidFrameError
from zrmq.message import FlushMode
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX, Name, Natural, QueueId

PERMISSION_READ = 4
PERMISSION_WRITE = 2


class TopicConfig(msgspec.Struct, array_like=True, frozen=True):
    """What can be set for a topic at one broker. None of the retention bounds given: the store's own apply."""

    topic: Name
    queue_count: QueueId = 4
    permission: QueueId = PERMISSION_READ | PERMISSION_WRITE  # RocketMQ's perm: 4 read, 2 write
    flush_mode: FlushMode = FlushMode.SYNC
    retention_ms: Natural | None = None
    retention_bytes: Natural | None = None


class Event(msgspec.Struct, array_like=True, frozen=True):
    """Base of all events; never written itself."""


class BrokerStarted(Event, tag=1, frozen=True):
    """A broker opened this log; `boot` counts the openings, from the time (s since 2020) of the first one on. Lease epochs given
    from here on start with it, and no new topic has a smaller id."""

    boot: Natural


class TopicPut(Event, tag=2, frozen=True):
    """A topic was created, or its configuration replaced; queues are only ever added."""

    topic_id: Natural
    config: TopicConfig


class TopicDeleted(Event, tag=3, frozen=True):
    """The topic, its queues and all groups' offsets on it are gone. Ids are never used again."""

    topic_id: Natural


class GroupSubscribed(Event, tag=4, frozen=True):
    """A group, or one instance of a broadcasting group, subscribed to a topic for the first time, at `since_ms`.

    `starts` has (queue id, offset) for the queues that existed; a queue that appears later starts at 0. The topic may not
    exist yet: it is named, not numbered. `instance_name` is empty for clustering groups.
    """

    group: str
    topic: str
    since_ms: Natural
    starts: list[tuple[Natural, Natural]]
    instance_name: str = ""


class OffsetsCommitted(Event, tag=5, frozen=True):
    """Consumer offsets: the next queue offset the group wants, as (topic id, queue id, offset).

    `instance_name` is empty for clustering groups; each broadcasting instance has offsets of its own.
    """

    group: str
    instance_name: str
    offsets: list[tuple[Natural, Natural, Natural]]


class LeaseGranted(Event, tag=6, frozen=True):
    """The right to read a queue for a group went to a client."""

    group: str
    topic_id: Natural
    queue_id: Natural
    client_id: str
    lease_epoch: Natural


class LeaseReleased(Event, tag=7, frozen=True):
    """The holder gave the queue back, or went silent for longer than the session timeout."""

    group: str
    topic_id: Natural
    queue_id: Natural
    lease_epoch: Natural


class BrokerStopped(Event, tag=8, frozen=True):
    """A clean end: everything before it was flushed. Leases stay with their holders, who come back."""


class GroupDeleted(Event, tag=9, frozen=True):
    """The group's subscriptions and offsets are gone."""

    group: str


class QueuesAdvanced(Event, tag=10, frozen=True):
    """How far queues of a topic have come, as (queue id, next offset): said again before the batches that tell it are deleted,
    and by a start for queues whose newest batches may be damaged."""

    topic_id: Natural
    next_offsets: list[tuple[Natural, Natural]]


class StateRelocated(Event, tag=11, frozen=True):
    """Everything that events and batches before `position` said, and that still holds, was said again from there to here.

    The single numbers are in this one: of openings, the id for the next topic, and the longest session timeout in force.
    """

    position: Natural
    boot: Natural
    next_topic_id: Natural
    session_timeout_ms: Natural


class SessionTimeoutChanged(Event, tag=12, frozen=True):
    """No holder of a lease goes by a longer session timeout from here on: so long after a restart it may be reading."""

    session_timeout_ms: Natural


AnyEvent = (
    BrokerStarted | TopicPut | TopicDeleted | GroupSubscribed | OffsetsCommitted | LeaseGranted | LeaseReleased | BrokerStopped
    | GroupDeleted | QueuesAdvanced | StateRelocated | SessionTimeoutChanged
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyEvent)


def encode_event(event: AnyEvent) -> bytes:
    """The payload of an entry of kind 2."""
    return _encoder.encode(event)


def decode_event(payload: bytes | bytearray | memoryview) -> AnyEvent:
    """The event in an entry's payload. Raises `InvalidFrameError` for bytes that are no event of this or an older version."""
    try:
        event: AnyEvent = _decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidFrameError(f"A log event cannot be read: {error}.") from error
    if isinstance(event, TopicPut) and event.config.queue_count > QUEUES_PER_TOPIC_MAX:
        raise InvalidFrameError(f"A log event has a topic of {event.config.queue_count} queues; at most {QUEUES_PER_TOPIC_MAX}.")
    return event
