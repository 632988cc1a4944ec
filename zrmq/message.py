"""The values users meet: messages in both directions, receipts, queues, and the names of the modes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import msgspec

from zrmq.errors import InvalidFrameError


class FlushMode(str, Enum):
    """When a broker acknowledges a batch. RocketMQ: flushDiskType."""

    SYNC = "sync"  # after fdatasync: an acknowledged message survives a power cut
    ASYNC = "async"  # from the page cache: survives a crash of the broker; flushed within 500 ms


class MessageModel(str, Enum):
    """How the members of a consumer group share messages."""

    CLUSTERING = "clustering"  # each message goes to one member
    BROADCASTING = "broadcasting"  # each message goes to every member


class ConsumeFrom(str, Enum):
    """Where a group that has never committed on a topic begins; a broadcasting group each instance of it.

    LATEST means: with the first message stored after it first subscribed to the topic, at whichever broker; a queue that is
    created later is read from its beginning. The limit: if every broker that knows of the subscription is away while all members
    start anew, it is made anew at the others, and what they stored before is not read there.
    """

    LATEST = "latest"
    EARLIEST = "earliest"
    TIMESTAMP = "timestamp"


class MessageQueue(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One queue of a topic at one broker name."""

    topic: str
    broker_name: str
    queue_id: int


class Record(msgspec.Struct, gc=False):
    """One message as a producer hands it over (for `send_batch`); see `Producer.send` for the limits."""

    body: bytes
    tag: str | None = None
    keys: Sequence[str] = ()
    message_group: str | None = None
    properties: dict[str, str] | None = None


class BatchSource(msgspec.Struct, gc=False):
    """What all messages of one received batch have in common."""

    topic: str
    broker_name: str
    queue_id: int
    base_offset: int
    store_timestamp_ms: int
    born_timestamp_ms: int
    producer_id: int
    first_sequence: int


class Message(msgspec.Struct, gc=False):
    """One received message. The fields that are the same for a whole batch are properties that look them up there."""

    body: bytes
    source: BatchSource
    index: int
    tag: str | None = None
    keys: Sequence[str] = ()
    properties_or_none: dict[str, str] | None = None
    message_group: str | None = None
    delivery_attempt: int = 1

    @property
    def topic(self) -> str:
        return self.source.topic

    @property
    def queue(self) -> MessageQueue:
        """The queue it was read from."""
        return MessageQueue(self.source.topic, self.source.broker_name, self.source.queue_id)

    @property
    def queue_offset(self) -> int:
        """Position in the queue; dense from 0."""
        return self.source.base_offset + self.index

    @property
    def message_id(self) -> str:
        """32 hexadecimal digits, the same for every copy of this message: producer id and sequence."""
        return message_id(self.source.producer_id, self.source.first_sequence + self.index)

    @property
    def store_timestamp_ms(self) -> int:
        """When the broker stored it, milliseconds since 1970 UTC by the broker's clock."""
        return self.source.store_timestamp_ms

    @property
    def born_timestamp_ms(self) -> int:
        """When the first message of its batch was handed to the producer, by the producer's clock."""
        return self.source.born_timestamp_ms

    @property
    def properties(self) -> dict[str, str]:
        return self.properties_or_none or {}

    def value(self) -> Any:
        """The body unpacked from MessagePack: what `send(..., value=...)` packed.

        Raises `InvalidFrameError` when the body is something else; `body` has it as it came.
        """
        import msgpack

        try:
            return msgpack.unpackb(self.body, strict_map_key=False)
        except (ValueError, TypeError) as error:
            raise InvalidFrameError(f"The body is not one MessagePack value ({error}); read message.body instead.") from error


class SendReceipt(msgspec.Struct, frozen=True, gc=False):
    """What `send` returns: where the message is, and how safe it is by now."""

    topic: str
    broker_name: str
    queue_id: int
    queue_offset: int
    message_id: str
    store_timestamp_ms: int
    durability: FlushMode
    duplicate: bool = False  # the broker had stored it already; this is the original place

    @property
    def queue(self) -> MessageQueue:
        return MessageQueue(self.topic, self.broker_name, self.queue_id)


def message_id(producer_id: int, sequence: int) -> str:
    """The id of the record with this sequence of this producer."""
    return f"{producer_id:016X}{sequence:016X}"
