"""What the parts of the broker's core share: the store, the outbox, the clock, and what the broker was told to be."""

from __future__ import annotations

import msgspec

from zrmq.clock import Clock
from zrmq.errors import Code, InvalidArgumentError, TopicNotFoundError, ZrmqError
from zrmq.protocol.events import GroupSubscribed, OffsetsCommitted
from zrmq.protocol.requests import NOT_HELD, Reply, failed
from zrmq.serving.outbox import Outbox
from zrmq.store.store import Store
from zrmq.store.tables import Queue, Topic
from zrmq.transport.sessions import Session


class ServingConfig(msgspec.Struct, frozen=True):
    """What an operator decides about serving."""

    broker_name: str
    cluster: str
    auto_create_topics: bool = True  # create a topic at its first use
    default_queue_count: int = 4  # queues of a topic created by use
    session_timeout_ms: int = 10_000  # silence that ends a session and its leases; RocketMQ waits 120 s
    heartbeat_ms: int = 1_000


class Context:
    """One per broker; belongs to the loop's thread."""

    def __init__(self, store: Store, outbox: Outbox, clock: Clock, config: ServingConfig) -> None:
        self.store = store
        self.outbox = outbox
        self.clock = clock
        self.config = config
        self.placed_position = 0  # up to here the log has what was said of where groups stand

    def place(self, event: GroupSubscribed | OffsetsCommitted) -> None:
        """Say where a group (broadcasting: an instance) stands."""
        self.store.append_event(event)
        self.placed_position = self.store.appended_position

    def topic(self, name: str) -> Topic:
        """The topic, or `TopicNotFoundError`."""
        topic = self.store.tables.topics.get(name)
        if topic is None:
            raise TopicNotFoundError(
                f"Topic {name!r} does not exist at broker {self.config.broker_name}; create it with 'zrmq topic create'.",
                topic=name, broker_name=self.config.broker_name,
            )
        return topic

    def queue(self, name: str, queue_id: int, topic_id: int = 0) -> Queue:
        """The queue, `TopicNotFoundError` or, for a queue that the topic has not, `InvalidArgumentError`.

        `topic_id`: which topic of that name is meant; it may have been deleted, and another made. 0: the one there is.
        """
        topic = self.topic(name)
        if topic_id not in (0, topic.topic_id):
            raise TopicNotFoundError(
                f"Topic {name!r} was deleted at broker {self.config.broker_name} and made again; its offsets are new, so ask"
                " where to begin.",
                topic=name, broker_name=self.config.broker_name,
            )
        if not 0 <= queue_id < len(topic.queues):
            raise InvalidArgumentError(
                f"Topic {name!r} has queues 0 to {len(topic.queues) - 1} at broker {self.config.broker_name}, not {queue_id}.",
                code=Code.BAD_REQUEST, topic=name, queue_id=queue_id,
            )
        return topic.queues[queue_id]

    def reply_when_safe(self, session: Session, reply: Reply) -> None:
        """Send the reply once every event appended so far is flushed."""
        self.outbox.after_flush(self.store.appended_position, session.peer, reply)

    def refuse(self, peer: bytes, number: int, error: ZrmqError) -> None:
        """Send the refusal of a request. One that tells what happened, that a lease has ended or is another's, or a topic is
        gone, waits like a reply: a power cut may undo that, and who was told would not know what it holds again."""
        refusal = failed(number, error)
        if error.code in NOT_HELD and self.store.appended_position != self.store.flushed_position:
            self.outbox.after_flush(self.store.appended_position, peer, refusal)
        else:
            self.outbox.now(peer, refusal)
