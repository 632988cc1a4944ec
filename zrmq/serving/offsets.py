"""Consumer offsets: committed as events in the log, looked up, and found by time."""

from __future__ import annotations

from zrmq.errors import Code, FencedError, InvalidArgumentError, RequestRefusedError, TopicNotFoundError
from zrmq.message import MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import OffsetsCommitted
from zrmq.protocol.requests import (
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    CommitOffsets,
    Committed,
    Offsets,
    QueryCommitted,
    QueryOffsets,
    QueueOffset,
)
from zrmq.serving.context import Context
from zrmq.serving.groups import GroupDesk
from zrmq.serving.leases import LeaseDesk
from zrmq.store.tables import Queue
from zrmq.transport.sessions import Session


class OffsetDesk:
    """Handles commits and queries. Invariant: a committed offset never goes back but by `reset`."""

    def __init__(self, context: Context, groups: GroupDesk, leases: LeaseDesk) -> None:
        self._context = context
        self._groups = groups
        self._leases = leases

    def commit(self, session: Session, request: CommitOffsets, frames: list[bytes]) -> None:
        """Commit what the session may commit; answered when that is flushed, with the indexes of what it may not."""
        if not session.group:
            raise InvalidArgumentError(
                "Only a session with a group commits offsets; name it in HELLO.", code=Code.ILLEGAL_CONSUMER_GROUP
            )
        if len(request.offsets) > limits.OFFSETS_PER_COMMIT_MAX:
            raise InvalidArgumentError(f"A commit has at most {limits.OFFSETS_PER_COMMIT_MAX} offsets; send several.")
        instance = self._instance(session)
        if not instance and self._groups.model(session.group) is MessageModel.BROADCASTING:
            raise RequestRefusedError(
                f"Group {session.group!r} broadcasts, so each instance has offsets of its own; give instance_name in HELLO.",
                code=Code.FORBIDDEN, group=session.group,
            )
        fenced: list[int] = []
        moved: dict[tuple[int, int], int] = {}
        for index, asked in enumerate(request.offsets):
            try:
                queue = self._context.queue(asked.topic, asked.queue_id, asked.topic_id)
                if not instance:  # an instance's offsets are nobody else's business
                    self._check_holder(session, queue, asked)
            except (FencedError, TopicNotFoundError):
                fenced.append(index)
                continue
            offset = self._target(session, instance, queue, asked, request.reset)
            if offset is not None:
                moved[queue.topic.topic_id, queue.queue_id] = offset
        if moved:
            group = self._context.store.tables.groups.get(session.group)
            known = group.offsets if group else {}
            places = sum((instance, *key) not in known for key in moved)
            self._groups.check_room(session.group, places)
            offsets = [(topic_id, queue_id, offset) for (topic_id, queue_id), offset in moved.items()]
            self._context.place(OffsetsCommitted(session.group, instance, offsets))
            self._groups.note_places(places)
        self._context.reply_when_safe(session, Committed(request.number, fenced))

    def query_committed(self, session: Session, request: QueryCommitted, frames: list[bytes]) -> None:
        """Tell where the session's group stands on each queue of a topic, once that is flushed: whoever goes on there relies on
        everything before it to be on the disk."""
        topic = self._context.topic(request.topic)
        group = self._context.store.tables.groups.get(session.group)
        instance = self._instance(session)
        starts = [group.start_offset(topic, queue.queue_id, instance) if group else None for queue in topic.queues]
        offsets = [(queue_id, OFFSET_LATEST if offset is None else offset) for queue_id, offset in enumerate(starts)]
        reply = Offsets(request.number, offsets, topic.topic_id)
        self._context.outbox.after_flush(self._context.placed_position, session.peer, reply)

    def query_offsets(self, session: Session, request: QueryOffsets, frames: list[bytes]) -> None:
        """Tell which offsets belong to a time, or the first and the next: of the queues named, each once, or of all."""
        topic = self._context.topic(request.topic)
        queue_ids = dict.fromkeys(request.queue_ids) or range(len(topic.queues))
        queues = [self._context.queue(request.topic, queue_id) for queue_id in queue_ids]
        offsets = [(queue.queue_id, self._find(queue, request.timestamp_ms)) for queue in queues]
        flushed_offsets = [queue.flushed_offset for queue in queues]
        self._context.outbox.now(session.peer, Offsets(request.number, offsets, topic.topic_id, flushed_offsets))

    def _instance(self, session: Session) -> str:
        """The name under which the session's offsets are kept: its own when broadcasting, none when clustering.

        Who is no member (yet, again, or at all) is taken by its word in HELLO, where only a broadcasting consumer names itself.
        """
        membership = self._groups.membership(session)
        if membership is not None and membership.message_model is MessageModel.CLUSTERING:
            return ""
        return session.instance_name

    def _check_holder(self, session: Session, queue: Queue, asked: QueueOffset) -> None:
        if asked.lease_epoch or self._leases.holder(session.group, queue) is not None:
            self._leases.check(session, queue, asked.lease_epoch)

    def _target(self, session: Session, instance: str, queue: Queue, asked: QueueOffset, reset: bool) -> int | None:
        """The offset to commit, None when the committed one is as far already."""
        offset = min(asked.offset, queue.next_offset)
        group = self._context.store.tables.groups.get(session.group)
        committed = group.start_offset(queue.topic, queue.queue_id, instance) if group else None
        return offset if reset or committed is None or offset > committed else None

    def _find(self, queue: Queue, timestamp_ms: int) -> int:
        if timestamp_ms == OFFSET_EARLIEST:
            return queue.min_offset
        if timestamp_ms == OFFSET_LATEST:
            return queue.visible_offset
        return self._context.store.offset_at(queue, timestamp_ms)
