"""Pull: batches of one queue, at once or as soon as there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from zrmq.errors import Code, RequestRefusedError, TopicNotFoundError, ZrmqError
from zrmq.protocol import limits
from zrmq.protocol.events import PERMISSION_READ
from zrmq.protocol.requests import Pull, Pulled, PullStatus
from zrmq.serving.context import Context
from zrmq.store.tables import Queue, Topic
from zrmq.transport.sessions import Session

PULLS_HELD_PER_SESSION_MAX = 2 * limits.QUEUES_PER_TOPIC_MAX  # one a queue, of two of the largest topics


class HeldPull(msgspec.Struct, eq=False):
    """A pull that waits for messages. `offset` moves past batches that its filter does not want."""

    session: Session
    request: Pull
    queue: Queue
    offset: int
    deadline_ms: float

    @property
    def is_behind(self) -> bool:
        """Whether it waits for its client to read, and not for messages."""
        return self.offset != self.queue.visible_offset


MayRead = Callable[[Session, Pull, Queue], None]  # raises FencedError


class Pulling:
    """Handles `Pull` and holds those that find nothing.

    Invariant: a pull is answered exactly once, or its session ends and it is forgotten. A session has at most one held pull per
    queue, `Session.waiting` by queue; a newer one ends the wait of the older, which its client does not want any more (it has
    paused, or sought another offset). Pulls of a client that has not read the answers it got wait until it has. So a reader costs
    bounded memory, and a message is sent to it once.
    """

    def __init__(self, context: Context, may_read: MayRead) -> None:
        self._context = context
        self._store = context.store
        self._may_read = may_read
        self._held: dict[Queue, dict[HeldPull, None]] = {}
        self._behind: dict[Session, None] = {}  # that have pulls waiting although there is something for them to read
        self.held_count = 0
        self.pulls = 0
        self.bytes_out = 0

    def pull(self, session: Session, request: Pull, frames: list[bytes]) -> None:
        """The consume path, whole: check, read, answer or hold."""
        queue = self._context.queue(request.topic, request.queue_id, request.topic_id)
        if not queue.topic.config.permission & PERMISSION_READ:
            raise RequestRefusedError(
                f"Topic {request.topic!r} may not be read at broker {self._context.config.broker_name}.",
                code=Code.FORBIDDEN, topic=request.topic,
            )
        self._may_read(session, request, queue)
        self.pulls += 1
        older = session.waiting.get(queue) if session.waiting else None
        if older is not None:
            self._forget(older)
            self._give_up(older)
        offset = self._answer(session, request, queue, request.offset, wait=request.wait_ms > 0)
        if offset is not None:
            wait_ms = min(request.wait_ms, limits.PULL_WAIT_MS_MAX)
            deadline_ms = self._context.clock.monotonic_ms() + wait_ms
            self._hold(HeldPull(session, request, queue, offset, deadline_ms))

    def wake(self, queues: Iterable[Queue]) -> None:
        """Try the pulls held on queues that have something new to show."""
        for queue in queues:
            for held in list(self._held.get(queue, ())):
                self._forget(held)
                self._try_again(held)

    @property
    def awaits_readers(self) -> bool:
        """Whether somebody has to read before pulls of theirs are answered."""
        return bool(self._behind)

    def go_on(self) -> None:
        """Answer the pulls of those that have read enough meanwhile. Call it at the end of each turn, and every tick."""
        for session in list(self._behind):
            if self._context.outbox.has_room(session.peer):
                del self._behind[session]
                for held in [held for held in session.waiting.values() if held.is_behind]:
                    self._forget(held)
                    self._try_again(held)

    def expire(self, now_ms: float) -> None:
        """Answer the pulls that waited long enough with nothing."""
        for held in [held for pulls in self._held.values() for held in pulls if held.deadline_ms <= now_ms]:
            self._forget(held)
            self._give_up(held)

    def drop(self, session: Session) -> None:
        """The session ended: nobody waits for the answers any more."""
        for held in list((session.waiting or {}).values()):
            self._forget(held)
        self._behind.pop(session, None)

    def drop_topic(self, topic: Topic) -> None:
        """The topic is gone: say so to everybody who waits for its messages."""
        for held in [held for queue in topic.queues for held in self._held.get(queue, ())]:
            self._forget(held)
            name = held.request.topic
            gone = TopicNotFoundError(f"Topic {name!r} was deleted; read another, or create it again.", topic=name)
            self._context.refuse(held.session.peer, held.request.number, gone)

    def _answer(self, session: Session, request: Pull, queue: Queue, offset: int, wait: bool) -> int | None:
        """Answer, or return the offset to wait at when there is nothing, or no room for it, and it may wait."""
        if not self._context.outbox.has_room(session.peer):
            if wait:
                return offset
            self._answer_nothing(session, request, queue, offset)
            return None
        chunk = self._store.read(queue, offset, min(request.bytes_max, limits.PULL_BYTES_MAX), request.tag_mask)
        if wait and chunk.status is PullStatus.NOTHING and chunk.next_offset >= chunk.max_offset:
            return chunk.next_offset
        reply = Pulled(
            request.number, chunk.status, chunk.next_offset, chunk.min_offset, chunk.max_offset, queue.flushed_offset
        )
        self._context.outbox.now(session.peer, reply, chunk.frames)
        self.bytes_out += sum(map(len, chunk.frames))
        return None

    def _hold(self, held: HeldPull) -> None:
        waiting = held.session.waiting
        if waiting is None:
            waiting = held.session.waiting = {}
        if len(waiting) >= PULLS_HELD_PER_SESSION_MAX:
            raise RequestRefusedError(
                f"{len(waiting)} pulls of this client wait already; wait for some of them first.", code=Code.TOO_MANY_REQUESTS
            )
        waiting[held.queue] = held
        self._held.setdefault(held.queue, {})[held] = None
        self.held_count += 1
        if held.is_behind:
            self._behind[held.session] = None

    def _forget(self, held: HeldPull) -> None:
        del held.session.waiting[held.queue]
        pulls = self._held[held.queue]
        del pulls[held]
        if not pulls:
            del self._held[held.queue]
        self.held_count -= 1

    def _try_again(self, held: HeldPull) -> None:
        try:
            self._may_read(held.session, held.request, held.queue)
            offset = self._answer(held.session, held.request, held.queue, held.offset, wait=True)
        except ZrmqError as error:
            self._context.refuse(held.session.peer, held.request.number, error)
            return
        if offset is not None:
            held.offset = offset
            self._hold(held)

    def _give_up(self, held: HeldPull) -> None:
        """Without a look: what there is to read may be somebody else's by now."""
        self._answer_nothing(held.session, held.request, held.queue, held.offset)

    def _answer_nothing(self, session: Session, request: Pull, queue: Queue, offset: int) -> None:
        ends = queue.min_offset, queue.visible_offset, queue.flushed_offset
        reply = Pulled(request.number, PullStatus.NOTHING, offset, *ends)
        self._context.outbox.now(session.peer, reply)
