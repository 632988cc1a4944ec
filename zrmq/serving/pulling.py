"""Pull: batches of one queue, at once or as soon as there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from zrmq.errors import Code, RequestRefusedError, TopicNotFoundError, ZrmqError
from zrmq.protocol import limits
from zrmq.protocol.events import PERMISSION_READ
from zrmq.protocol.requests import Pull, Pulled, PullStatus
from zrmq.serving.context import Context
from zrmq.serving.outbox import failed
from zrmq.store.tables import Queue
from zrmq.transport.sessions import Session

PULLS_HELD_PER_SESSION_MAX = 2 * limits.QUEUES_PER_TOPIC_MAX  # two a queue of the largest topic


class HeldPull(msgspec.Struct, eq=False):
    """A pull that waits for messages. `offset` moves past batches that its filter does not want."""

    session: Session
    request: Pull
    offset: int
    deadline_ms: float


MayRead = Callable[[Session, Pull, Queue], None]  # raises FencedError


class Pulling:
    """Handles `Pull` and holds those that find nothing.

    Invariant: a pull is answered exactly once; held pulls are few per session, so a reader costs bounded memory.
    """

    def __init__(self, context: Context, may_read: MayRead, is_open: Callable[[Session], bool]) -> None:
        self._context = context
        self._store = context.store
        self._may_read = may_read
        self._is_open = is_open
        self._held: dict[tuple[int, int], list[HeldPull]] = {}
        self._held_per_client: dict[str, int] = {}
        self.pulls = 0
        self.bytes_out = 0

    @property
    def held_count(self) -> int:
        return sum(self._held_per_client.values())

    def pull(self, session: Session, request: Pull, frames: list[bytes]) -> None:
        """The consume path, whole: check, read, answer or hold."""
        queue = self._context.queue(request.topic, request.queue_id)
        if not queue.topic.config.permission & PERMISSION_READ:
            raise RequestRefusedError(
                f"Topic {request.topic!r} may not be read at broker {self._context.config.broker_name}.",
                code=Code.FORBIDDEN, topic=request.topic,
            )
        self._may_read(session, request, queue)
        self.pulls += 1
        offset = self._answer(session, request, queue, request.offset, wait=request.wait_ms > 0)
        if offset is not None:
            self._hold(session, request, queue, offset)

    def wake(self, queues: Iterable[Queue]) -> None:
        """Try the pulls held on queues that have something new to show."""
        for queue in queues:
            for held in self._held.pop((queue.topic.topic_id, queue.queue_id), ()):
                self._forget(held)
                self._try_again(held, queue)

    def expire(self, now_ms: float) -> None:
        """Answer the pulls that waited long enough with nothing; those of closed sessions vanish."""
        for key, pulls in list(self._held.items()):
            kept = [held for held in pulls if held.deadline_ms > now_ms and self._is_open(held.session)]
            if len(kept) == len(pulls):
                continue
            for held in pulls:
                if held not in kept:
                    self._forget(held)
                    self._give_up(held)
            if kept:
                self._held[key] = kept
            else:
                del self._held[key]

    def drop_topic(self, topic_id: int) -> None:
        """The topic is gone: say so to everybody who waits for its messages."""
        for key in [key for key in self._held if key[0] == topic_id]:
            for held in self._held.pop(key):
                self._forget(held)
                gone = TopicNotFoundError(f"Topic {held.request.topic!r} was deleted.", topic=held.request.topic)
                self._context.outbox.now(held.session.peer, failed(held.request.number, gone))

    def _answer(self, session: Session, request: Pull, queue: Queue, offset: int, wait: bool) -> int | None:
        """Answer, or return the offset to wait at when there is nothing and it may wait."""
        chunk = self._store.read(queue, offset, min(request.bytes_max, limits.PULL_BYTES_MAX), request.tag_mask)
        if wait and chunk.status is PullStatus.NOTHING and chunk.next_offset >= chunk.max_offset:
            return chunk.next_offset
        reply = Pulled(request.number, chunk.status, chunk.next_offset, chunk.min_offset, chunk.max_offset)
        self._context.outbox.now(session.peer, reply, chunk.frames)
        self.bytes_out += sum(map(len, chunk.frames))
        return None

    def _hold(self, session: Session, request: Pull, queue: Queue, offset: int) -> None:
        count = self._held_per_client.get(session.client_id, 0)
        if count >= PULLS_HELD_PER_SESSION_MAX:
            raise RequestRefusedError(
                f"{count} pulls of this client wait already; wait for some of them first.", code=Code.TOO_MANY_REQUESTS
            )
        wait_ms = min(request.wait_ms, limits.PULL_WAIT_MS_MAX)
        held = HeldPull(session, request, offset, self._context.clock.monotonic_ms() + wait_ms)
        self._held.setdefault((queue.topic.topic_id, queue.queue_id), []).append(held)
        self._held_per_client[session.client_id] = count + 1

    def _forget(self, held: HeldPull) -> None:
        left = self._held_per_client[held.session.client_id] - 1
        if left:
            self._held_per_client[held.session.client_id] = left
        else:
            del self._held_per_client[held.session.client_id]

    def _try_again(self, held: HeldPull, queue: Queue) -> None:
        if not self._is_open(held.session):
            return
        try:
            self._may_read(held.session, held.request, queue)
            offset = self._answer(held.session, held.request, queue, held.offset, wait=True)
        except ZrmqError as error:
            self._context.outbox.now(held.session.peer, failed(held.request.number, error))
            return
        if offset is not None:
            held.offset = offset
            self._held.setdefault((queue.topic.topic_id, queue.queue_id), []).append(held)
            self._held_per_client[held.session.client_id] = self._held_per_client.get(held.session.client_id, 0) + 1

    def _give_up(self, held: HeldPull) -> None:
        if not self._is_open(held.session):
            return
        try:
            queue = self._context.queue(held.request.topic, held.request.queue_id)
            self._answer(held.session, held.request, queue, held.offset, wait=False)
        except ZrmqError as error:
            self._context.outbox.now(held.session.peer, failed(held.request.number, error))
