"""Topics: created, changed, deleted and described."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from zrmq.errors import Code, InvalidArgumentError, RequestRefusedError, TopicNotFoundError
from zrmq.protocol import limits
from zrmq.protocol.events import PERMISSION_READ, PERMISSION_WRITE, TopicConfig, TopicDeleted, TopicPut
from zrmq.protocol.requests import DeleteTopic, DescribeTopics, Done, PutTopic, QueueState, TopicInfo, TopicRoute, Topics
from zrmq.serving.context import Context
from zrmq.store.tables import Topic
from zrmq.transport.sessions import Session


class TopicDesk:
    """Handles the requests about topics. `version` grows with every change of what the NameServers should know."""

    def __init__(self, context: Context, on_changed: Callable[[], None], on_deleted: Callable[[Topic], None]) -> None:
        self._context = context
        self._on_changed = on_changed
        self._on_deleted = on_deleted
        self.version = 1

    def routes(self) -> list[TopicRoute]:
        """The topic table as the NameServers get it."""
        name = self._context.config.broker_name
        return [
            TopicRoute(topic.config.topic, name, len(topic.queues), topic.config.permission)
            for topic in self._context.store.tables.topics.values()
        ]

    def put(self, session: Session, request: PutTopic, frames: list[bytes]) -> None:
        config, tables = request.config, self._context.store.tables
        check_config(config)
        existing = tables.topics.get(config.topic)
        if existing is None:
            topic_id = max(tables.next_topic_id, self._context.store.boot)  # another one than in a former folder of the broker
            config = self._new(request)
        elif request.create_only:
            self._context.reply_when_safe(session, Topics(request.number, [describe(existing)]))
            return
        else:
            topic_id = existing.topic_id
            _check_growth(existing, config)
        self._context.store.append_event(TopicPut(topic_id, config))
        self._changed()
        self._context.reply_when_safe(session, Topics(request.number, [describe(tables.topics[config.topic])]))

    def delete(self, session: Session, request: DeleteTopic, frames: list[bytes]) -> None:
        """Delete a topic; answered when that is flushed, and so is that the one meant is gone."""
        topic = self._context.topic(request.topic)
        if request.topic_id not in (0, topic.topic_id):
            name, broker_name = request.topic, self._context.config.broker_name
            raise TopicNotFoundError(
                f"The topic {name!r} that was to go is deleted at broker {broker_name} already, and another one has its name;"
                " delete that with 'zrmq topic delete' if it is not wanted either.",
                topic=name, broker_name=broker_name,
            )
        self._context.store.append_event(TopicDeleted(topic.topic_id))
        self._on_deleted(topic)
        self._changed()
        self._context.reply_when_safe(session, Done(request.number))

    def describe(self, session: Session, request: DescribeTopics, frames: list[bytes]) -> None:
        """Tell the settings and the queues of the topics named, each once, or of all."""
        names = dict.fromkeys(request.topics) or sorted(self._context.store.tables.topics)
        topics = [describe(self._context.topic(name)) for name in names]
        self._context.outbox.now(session.peer, Topics(request.number, topics))

    def _new(self, request: PutTopic) -> TopicConfig:
        """The configuration of a topic that does not exist yet; raises when it may not come to exist."""
        tables, config = self._context.store.tables, request.config
        if request.auto_create and not self._context.config.auto_create_topics:
            raise RequestRefusedError(
                f"Topic {config.topic!r} does not exist and broker {self._context.config.broker_name} creates none by use;"
                f" create it with 'zrmq topic create {config.topic}'.",
                code=Code.TOPIC_NOT_FOUND, topic=config.topic,
            )
        if len(tables.topics) >= limits.TOPICS_MAX:
            raise RequestRefusedError(
                f"Broker {self._context.config.broker_name} has {limits.TOPICS_MAX} topics, its limit; delete some first.",
                code=Code.TOO_MANY_REQUESTS, limit_count=limits.TOPICS_MAX,
            )
        if request.auto_create:
            return msgspec.structs.replace(config, queue_count=self._context.config.default_queue_count)
        return config

    def _changed(self) -> None:
        self.version += 1
        self._on_changed()


def describe(topic: Topic) -> TopicInfo:
    """The topic as `Topics` tells it."""
    queues = [QueueState(queue.queue_id, queue.min_offset, queue.next_offset) for queue in topic.queues]
    return TopicInfo(topic.config, topic.topic_id, queues)


def check_config(config: TopicConfig) -> None:
    """Raise `InvalidArgumentError` unless a topic can be configured so."""
    limits.check_topic(config.topic)
    if not 1 <= config.queue_count <= limits.QUEUES_PER_TOPIC_MAX:
        raise InvalidArgumentError(
            f"A topic has 1 to {limits.QUEUES_PER_TOPIC_MAX} queues at a broker, not {config.queue_count}; use several topics.",
            queue_count=config.queue_count,
        )
    if config.permission & ~(PERMISSION_READ | PERMISSION_WRITE):
        raise InvalidArgumentError(f"The permission {config.permission} is not a sum of 4 (read) and 2 (write).")
    for name, value in (("retention_ms", config.retention_ms), ("retention_bytes", config.retention_bytes)):
        if value is not None and not 0 < value < 1 << 62:
            raise InvalidArgumentError(f"{name} is {value}; give a positive number or leave it out.")


def _check_growth(existing: Topic, config: TopicConfig) -> None:
    if config.queue_count < len(existing.queues):
        raise InvalidArgumentError(
            f"Topic {config.topic!r} has {len(existing.queues)} queues and cannot shrink to {config.queue_count};"
            " queues are only ever added.",
            topic=config.topic, queue_count=config.queue_count,
        )
