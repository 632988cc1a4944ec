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


class HeldPull(msgspec.Struct, eq=False):
    """A pull that may wait for messages. `offset` moves past what was answered, and batches that its filter does not want."""

    session: Session
    request: Pull
    queue: Queue
    offset: int
    bytes_left: int
    deadline_ms: float

    @property
    def is_behind(self) -> bool:
        """Whether it waits for its client to read, and not for messages."""
        return self.offset != self.queue.visible_offset


MayRead = Callable[[Session, Pull, Queue], None]  # raises FencedError


class Pulling:
    """Handles `Pull` and holds those that find nothing.

    Invariant: a pull has one last answer, or its session ends and it is forgotten. A session has at most one held pull per queue,
    `Session.waiting` by queue; a newer one ends the wait of the older, which its client does not want any more (it has paused, or
    sought another offset). Pulls of a client that has not read the answers it got wait until it has. So a reader costs bounded
    memory, and a message is sent to it once.

    A pull that stays spares whoever reads messages as they come a request for each: measured at 1,000 messages a second, a tenth
    of the processor time of producer, broker and consumer together.
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
        self._check(session, request, queue)
        self.pulls += 1
        older = session.waiting.get(queue) if session.waiting else None
        if older is not None:
            self._forget(older)
            self._give_up(older)
        deadline_ms = self._context.clock.monotonic_ms() + min(request.wait_ms, limits.PULL_WAIT_MS_MAX)
        held = HeldPull(session, request, queue, request.offset, min(request.bytes_max, limits.PULL_BYTES_MAX), deadline_ms)
        if self._is_waiting(held):
            self._hold(held)

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

    def _check(self, session: Session, request: Pull, queue: Queue) -> None:
        """Raise unless the session may read the queue now, which may change while a pull waits."""
        if not queue.topic.config.permission & PERMISSION_READ:
            raise RequestRefusedError(
                f"Topic {request.topic!r} may not be read at broker {self._context.config.broker_name};"
                f" 'zrmq topic update {request.topic} --permission rw' lets it be.",
                code=Code.FORBIDDEN, topic=request.topic,
            )
        self._may_read(session, request, queue)

    def _is_waiting(self, held: HeldPull) -> bool:
        """Answer, if there is something and room for it; whether the pull waits (for more) now."""
        request, queue, peer = held.request, held.queue, held.session.peer
        may_wait = request.wait_ms > 0
        if not self._context.outbox.has_room(peer):
            if not may_wait:
                self._give_up(held)
            return may_wait
        chunk = self._store.read(queue, held.offset, held.bytes_left, request.tag_mask)
        held.offset = chunk.next_offset
        may_wait = may_wait and chunk.next_offset >= chunk.max_offset
        if may_wait and chunk.status is PullStatus.NOTHING:
            return True
        size_bytes = sum(map(len, chunk.frames))
        held.bytes_left -= size_bytes
        half = min(request.bytes_max, limits.PULL_BYTES_MAX) // 2
        stays = may_wait and request.stays and chunk.status is PullStatus.FOUND and held.bytes_left > half
        reply = Pulled(
            request.number, chunk.status, chunk.next_offset, chunk.min_offset, chunk.max_offset, queue.flushed_offset, stays
        )
        self._context.outbox.now(peer, reply, chunk.frames)
        self.bytes_out += size_bytes
        return stays

    def _hold(self, held: HeldPull) -> None:
        waiting = held.session.waiting
        if waiting is None:
            waiting = held.session.waiting = {}
        if len(waiting) >= limits.PULLS_HELD_PER_SESSION_MAX:
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
            self._check(held.session, held.request, held.queue)
            if self._is_waiting(held):
                self._hold(held)
        except ZrmqError as error:
            self._context.refuse(held.session.peer, held.request.number, error)

    def _give_up(self, held: HeldPull) -> None:
        """Without a look: what there is to read may be somebody else's by now."""
        queue = held.queue
        ends = queue.min_offset, queue.visible_offset, queue.flushed_offset
        self._context.outbox.now(held.session.peer, Pulled(held.request.number, PullStatus.NOTHING, held.offset, *ends))
