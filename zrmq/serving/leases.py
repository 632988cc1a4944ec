"""Leases: the right of one member of a clustering group to read a queue. A lease epoch fences whoever had it before.

A lease is granted by an event in the log and told only after that event is flushed, so a restarted broker knows every holder
and goes on where it was: the holder keeps its lease epoch if it comes back within the session timeout, and nobody else gets the
queue before. Ended leases are events too; so is a change of the session timeout, for a holder goes by the one it was told.
Waiters are served in the order they came.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import msgspec

from zrmq.errors import Code, DiskFullError, FencedError, RequestRefusedError, StoreFailedError, TopicNotFoundError
from zrmq.logs import get_logger
from zrmq.message import MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import LeaseGranted, LeaseReleased, OffsetsCommitted, SessionTimeoutChanged
from zrmq.protocol.requests import AcquireLease, Done, Leased, Pull, ReleaseLease, failed
from zrmq.serving.context import Context
from zrmq.serving.groups import Membership
from zrmq.store.tables import Lease, Queue
from zrmq.transport.sessions import Session

log = get_logger("serving")

ANSWER_MARGIN_MS = 100  # a wait ends this long before its client's deadline, so that the answer arrives in time

Key = tuple[str, int, int]  # group, topic id, queue id


class LeaseWait(msgspec.Struct, eq=False):
    """A member that waits for a queue somebody else holds."""

    session: Session
    request: AcquireLease
    queue: Queue
    deadline_ms: float


class LeaseDesk:
    """Handles acquiring and releasing, and answers whether a holder may read or commit.

    Invariant: a (group, queue) has at most one lease; a new lease has a greater epoch than every lease before it.
    """

    def __init__(
        self, context: Context, is_open: Callable[[Session], bool], membership: Callable[[Session], Membership | None]
    ) -> None:
        self._context = context
        self._is_open = is_open
        self._membership = membership
        self._waiting: dict[Key, deque[LeaseWait]] = {}
        self._wait_counts: Counter[str] = Counter()  # by client id
        self._epoch = context.store.boot << 32
        tables, timeout_ms = context.store.tables, context.config.session_timeout_ms
        if timeout_ms > tables.session_timeout_ms:
            context.store.append_event(SessionTimeoutChanged(timeout_ms))
        self._grace_ends_ms = context.clock.monotonic_ms() + tables.session_timeout_ms
        self._absent = {
            (name, lease.client_id): self._grace_ends_ms
            for name, group in context.store.tables.groups.items()
            for lease in group.leases.values()
        }

    def acquire(self, session: Session, request: AcquireLease, frames: list[bytes]) -> None:
        membership = self._membership(session)
        if membership is None or membership.message_model is not MessageModel.CLUSTERING:
            raise RequestRefusedError(
                "Only a member of a clustering group acquires queues; join the group first.", code=Code.FORBIDDEN
            )
        if request.topic not in membership.subscriptions:
            raise RequestRefusedError(
                f"Group {session.group!r} does not subscribe to {request.topic!r}.", code=Code.FORBIDDEN, topic=request.topic
            )
        queue = self._context.queue(request.topic, request.queue_id)
        key = (session.group, queue.topic.topic_id, queue.queue_id)
        lease = self._lease(key)
        if lease is None:
            self._grant(key, session, request, queue)
        elif lease.client_id == session.client_id:
            self._tell(session, request, queue, lease)
        else:
            self._wait(key, session, request, queue)

    def release(self, session: Session, request: ReleaseLease, frames: list[bytes]) -> None:
        queue = self._context.queue(request.topic, request.queue_id)
        self.check(session, queue, request.lease_epoch)
        topic_id = queue.topic.topic_id
        committed = self._context.store.tables.groups[session.group].start_offset(queue.topic, queue.queue_id)
        offset = min(request.offset, queue.next_offset)
        if offset >= 0 and (committed is None or offset > committed):
            self._context.place(OffsetsCommitted(session.group, "", [(topic_id, queue.queue_id, offset)]))
        self._end((session.group, topic_id, queue.queue_id), request.lease_epoch)
        self._context.reply_when_safe(session, Done(request.number))

    def check(self, session: Session, queue: Queue, lease_epoch: int) -> None:
        """Raise `FencedError` unless the session's client holds the queue under this epoch."""
        lease = self._lease((session.group, queue.topic.topic_id, queue.queue_id))
        if lease is None or lease.client_id != session.client_id or lease.lease_epoch != lease_epoch:
            raise FencedError(
                f"Queue {queue.queue_id} of {queue.topic.config.topic!r} is not held by this member of group {session.group!r}"
                f" under lease epoch {lease_epoch}; drop what was read from it and acquire it again.",
                group=session.group, topic=queue.topic.config.topic, queue_id=queue.queue_id, lease_epoch=lease_epoch,
            )

    def may_read(self, session: Session, request: Pull, queue: Queue) -> None:
        """Raise `FencedError` for a pull in the name of a clustering group without its lease."""
        if request.group:
            membership = self._membership(session)
            if request.lease_epoch or membership is None or membership.message_model is MessageModel.CLUSTERING:
                self.check(session, queue, request.lease_epoch)

    def holder(self, group: str, queue: Queue) -> str | None:
        """Client id of the holder, None when nobody holds the queue for the group."""
        lease = self._lease((group, queue.topic.topic_id, queue.queue_id))
        return lease.client_id if lease else None

    def release_all(self, group: str, client_id: str, is_silent: bool = False) -> None:
        """The member is gone: its queues go to whoever waits for them, as soon as the log can say so.

        `is_silent`: it did not say so itself.
        """
        known = self._context.store.tables.groups.get(group)
        if known is None:
            return
        if is_silent and self._context.clock.monotonic_ms() < self._grace_ends_ms and self._is_timeout_shorter():
            self._absent[group, client_id] = self._grace_ends_ms  # it may not have got the WELCOME that said so
            return
        try:
            for (topic_id, queue_id), lease in list(known.leases.items()):
                if lease.client_id == client_id:
                    self._end((group, topic_id, queue_id), lease.lease_epoch)
        except (DiskFullError, StoreFailedError):
            self._absent[group, client_id] = self._context.clock.monotonic_ms()  # `expire` tries again

    def returned(self, session: Session) -> None:
        """A client opened a session: from here on its session's silence decides, not the restart's grace."""
        self._absent.pop((session.group, session.client_id), None)

    def expire(self, now_ms: float) -> None:
        """End the leases of holders that did not come back after a restart, and the waits that took too long."""
        if now_ms >= self._grace_ends_ms:
            self._shorten_timeout()
        for (group, client_id), deadline_ms in list(self._absent.items()):
            if deadline_ms <= now_ms:
                del self._absent[group, client_id]
                self.release_all(group, client_id)
        for key, waits in list(self._waiting.items()):
            for wait in [wait for wait in waits if wait.deadline_ms <= now_ms or not self._is_open(wait.session)]:
                waits.remove(wait)
                self._uncount(wait)
                self._refuse(key, wait)
            if not waits:
                del self._waiting[key]

    def _is_timeout_shorter(self) -> bool:
        """Whether holders may go by an earlier run's longer session timeout."""
        return self._context.config.session_timeout_ms < self._context.store.tables.session_timeout_ms

    def _shorten_timeout(self) -> None:
        """Nobody goes by the longer one any more."""
        if self._is_timeout_shorter():
            try:
                self._context.store.append_event(SessionTimeoutChanged(self._context.config.session_timeout_ms))
            except (DiskFullError, StoreFailedError):
                log.debug("session_timeout_not_shortened")  # at the next tick then; a grace that is too long harms nobody

    def drop_topic(self, topic_id: int) -> None:
        """The topic is gone: nobody waits for its queues any more."""
        for key in [key for key in self._waiting if key[1] == topic_id]:
            for wait in self._waiting.pop(key):
                self._uncount(wait)
                name = wait.request.topic
                gone = TopicNotFoundError(f"Topic {name!r} was deleted; read another, or create it again.", topic=name)
                self._context.refuse(wait.session.peer, wait.request.number, gone)

    def _lease(self, key: Key) -> Lease | None:
        group = self._context.store.tables.groups.get(key[0])
        return group.leases.get((key[1], key[2])) if group else None

    def _grant(self, key: Key, session: Session, request: AcquireLease, queue: Queue) -> None:
        self._epoch += 1
        self._context.store.append_event(LeaseGranted(*key, session.client_id, self._epoch))
        lease = self._lease(key)
        if lease is None:
            raise RequestRefusedError(f"Group {session.group!r} was deleted; join it again.", code=Code.FORBIDDEN)
        self._tell(session, request, queue, lease)

    def _tell(self, session: Session, request: AcquireLease, queue: Queue, lease: Lease) -> None:
        group = self._context.store.tables.groups[session.group]
        start = group.start_offset(queue.topic, queue.queue_id)
        offset = max(start or 0, queue.min_offset)
        self._context.reply_when_safe(session, Leased(request.number, lease.lease_epoch, offset))

    def _wait(self, key: Key, session: Session, request: AcquireLease, queue: Queue) -> None:
        waits = self._waiting.get(key, deque())
        for earlier in [wait for wait in waits if wait.session.client_id == session.client_id]:
            waits.remove(earlier)  # the same client asks again, on this connection or a new one
            self._uncount(earlier)
        if self._wait_counts[session.client_id] >= limits.WAITS_PER_CLIENT_MAX:
            raise RequestRefusedError(
                f"This client waits for {limits.WAITS_PER_CLIENT_MAX} queues already; wait for some of them first.",
                code=Code.TOO_MANY_REQUESTS, limit_count=limits.WAITS_PER_CLIENT_MAX,
            )
        self._waiting[key] = waits
        self._wait_counts[session.client_id] += 1
        deadline_ms = self._context.clock.monotonic_ms() + max(request.timeout_ms - ANSWER_MARGIN_MS, 0)
        waits.append(LeaseWait(session, request, queue, deadline_ms))

    def _uncount(self, wait: LeaseWait) -> None:
        """It waits no more."""
        client_id = wait.session.client_id
        self._wait_counts[client_id] -= 1
        if not self._wait_counts[client_id]:
            del self._wait_counts[client_id]

    def _end(self, key: Key, lease_epoch: int) -> None:
        """End a lease and give the queue to the first waiter that is still there."""
        self._context.store.append_event(LeaseReleased(*key, lease_epoch))
        waits = self._waiting.get(key)
        while waits:
            wait = waits.popleft()
            self._uncount(wait)
            if self._is_open(wait.session) and self._membership(wait.session) is not None:
                try:
                    self._grant(key, wait.session, wait.request, wait.queue)
                except (DiskFullError, StoreFailedError) as error:  # the release is in the log; who waits asks again
                    self._context.outbox.now(wait.session.peer, failed(wait.request.number, error))
                else:
                    break
        if not waits:
            self._waiting.pop(key, None)

    def _refuse(self, key: Key, wait: LeaseWait) -> None:
        if self._is_open(wait.session):
            lease = self._lease(key)
            held = RequestRefusedError(
                f"Queue {key[2]} of {wait.request.topic!r} is still held by {lease.client_id if lease else 'nobody'}; ask again.",
                code=Code.LEASE_HELD,
            )
            self._context.refuse(wait.session.peer, wait.request.number, held)
