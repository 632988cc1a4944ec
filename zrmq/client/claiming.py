"""Claiming queues: the right to read one, where to begin, and giving it back. Two ways, by how the consumer reads.

`LeaseClaims`      clustering: a lease from the queue's broker, which also says where the group stands
`OffsetClaims`     broadcasting, assigned queues, no group: nobody else minds, so only the place to begin is looked up
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from zrmq.client.link import Link
from zrmq.client.reading import RETRY_MS, Reading
from zrmq.errors import ClosedError, Code, FencedError, RequestTimeoutError, TopicNotFoundError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageQueue
from zrmq.protocol.requests import (
    NOT_HELD,
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    AcquireLease,
    AnyReply,
    Done,
    Leased,
    Offsets,
    QueryCommitted,
    QueryOffsets,
    ReleaseLease,
)

log = get_logger("consumer")

ACQUIRE_TIMEOUT_MS = 15_000  # how long a broker lets us wait for another member's queue before we ask again
HELD_PAUSE_MS = 100.0  # before asking again for a queue that is held
REQUEST_TIMEOUT_MS = 5_000
NO_COMMIT = -1  # as the offset of a release


class Left(NamedTuple):
    """Where a queue was left: at an offset of the topic with this id."""

    offset: int
    safe_offset: int  # the same, or where its broker may have lost what followed, and stored other messages in its place
    topic_id: int


class Doubt(NamedTuple):
    """A lease that may be ours, and where its queue was left: nobody else has read on while it is the same lease."""

    lease_epoch: int = 0  # not known
    offset: int = NO_COMMIT
    reading: Reading | None = None  # of which callers may still have something in hand


class ClaimListener(Protocol):
    """What a claim tells the consumer's core."""

    def on_claimed(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int, topic_id: int = 0, *, goes_back: bool = False,
        flushed_offset: int = -1, committed_offset: int = -1,
    ) -> bool:
        """Read it from here on. False: it is not wanted any more, let it go. `topic_id`: of the topic that the offset belongs to;
        0 where a lease says it. `goes_back`: the broker does not know of a seek. `flushed_offset`: up to there the queue survives
        a power cut; a lease comes with an offset that does. `committed_offset`: what the broker knows, -1 where nothing."""

    def on_unclaimed(self, after_ms: float) -> None:
        """A claim failed, or one of ours ended: look again what to claim, after a while."""

    def on_refused(self, error: ZrmqError) -> None:
        """A claim cannot succeed unless the user changes something."""


class LeaseClaims:
    """Leases of one group. Loop thread only.

    Invariant: a queue is never ours at the broker without being read or known here. A request that may have given us a lease is
    repeated until it is answered. A lease that was in doubt when reading ended, or when a broker refused a request without a look
    at who holds the queue, may be ours: then it is acquired again where it is wanted, else released.
    """

    def __init__(self, listener: ClaimListener) -> None:
        self.pending: set[MessageQueue] = set()  # being acquired, or released
        self._doubtful: dict[MessageQueue, Doubt] = {}
        self._releases: dict[MessageQueue, tuple[Link, int, int]] = {}  # link, number and lease epoch of those under way
        self._listener = listener

    def claim(self, queues: Iterable[tuple[MessageQueue, Link]]) -> None:
        """Acquire the lease of each, waiting for whoever holds it."""
        for queue, link in queues:
            self.pending.add(queue)
            self._acquire(queue, link)

    def lose(self, reading: Reading, offset: int, error: ZrmqError) -> None:
        """Reading ended without a release. Who was fenced has nothing left to release, nor whose topic was deleted."""
        if not isinstance(error, FencedError | TopicNotFoundError):
            left_offset = NO_COMMIT if reading.goes_back else reading.safe_offset(offset)
            self._doubtful[reading.queue] = Doubt(reading.process_queue.lease_epoch, left_offset, reading)

    def settle(self, unwanted: Callable[[MessageQueue, Reading | None], Link | None]) -> None:
        """Find out about leases in doubt: `unwanted` gives the broker's link if it is there, the queue is not to be read, and
        callers are through with what they had of it."""
        for queue, doubt in list(self._doubtful.items()):
            link = unwanted(queue, doubt.reading)
            if link is None or queue in self.pending:
                continue
            del self._doubtful[queue]
            self.pending.add(queue)
            if doubt.lease_epoch:
                self._release(queue, link, doubt.lease_epoch, doubt.offset)
            else:
                self._acquire(queue, link)

    def restarted(self, link: Link) -> None:
        """The server has been started again: its leases live on, but no offset of before is committed; see `Committer`."""
        for queue, (asked, number, lease_epoch) in list(self._releases.items()):
            if asked is link:
                link.cancel(number)
                self._release(queue, link, lease_epoch, NO_COMMIT)

    def let_go(self, reading: Reading, offset: int) -> None:
        """Release a lease, with the final offset."""
        self.pending.add(reading.queue)
        self._release(reading.queue, reading.link, reading.process_queue.lease_epoch, offset)

    def _acquire(self, queue: MessageQueue, link: Link) -> None:
        link.request(
            AcquireLease, queue.topic, queue.queue_id,
            timeout_ms=ACQUIRE_TIMEOUT_MS, on_reply=partial(self._acquired, queue, link),
        )

    def _acquired(self, queue: MessageQueue, link: Link, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, RequestTimeoutError):
            self._acquire(queue, link)
            return
        self.pending.discard(queue)
        if isinstance(reply, Leased):
            doubt = self._doubtful.pop(queue, Doubt())
            left_offset = doubt.offset if doubt.lease_epoch == reply.lease_epoch else NO_COMMIT
            offset = max(reply.offset, left_offset)
            if not self._listener.on_claimed(
                queue, link, offset, reply.lease_epoch, flushed_offset=offset, committed_offset=reply.offset
            ):
                self._doubtful[queue] = Doubt(reply.lease_epoch, left_offset, doubt.reading)
                self._listener.on_unclaimed(0.0)
        elif isinstance(reply, ZrmqError):
            if reply.code in NOT_HELD:
                self._doubtful.pop(queue, None)
            else:  # also where we knew the epoch: it may have ended, and this request have been granted another
                self._doubtful[queue] = Doubt(reading=self._doubtful.get(queue, Doubt()).reading)
            if isinstance(reply, ClosedError):
                return
            if reply.code is not Code.LEASE_HELD:
                log.warning("lease_refused", topic=queue.topic, queue_id=queue.queue_id, reason=reply.message)
            self._listener.on_unclaimed(HELD_PAUSE_MS if reply.code is Code.LEASE_HELD else RETRY_MS)

    def _release(self, queue: MessageQueue, link: Link, lease_epoch: int, offset: int) -> None:
        number = link.request(
            ReleaseLease, queue.topic, queue.queue_id, lease_epoch, offset,
            timeout_ms=REQUEST_TIMEOUT_MS, on_reply=partial(self._released, queue, link, lease_epoch, offset),
        )
        self._releases[queue] = (link, number, lease_epoch)

    def _released(
        self, queue: MessageQueue, link: Link, lease_epoch: int, offset: int, reply: AnyReply | ZrmqError, frames: list[bytes]
    ) -> None:
        if isinstance(reply, RequestTimeoutError):
            self._release(queue, link, lease_epoch, offset)
            return
        self.pending.discard(queue)
        del self._releases[queue]
        is_open = isinstance(reply, ZrmqError) and reply.code not in NOT_HELD
        if is_open:
            self._doubtful[queue] = Doubt(lease_epoch)
        self._listener.on_unclaimed(RETRY_MS if is_open else 0.0 if isinstance(reply, Done) else HELD_PAUSE_MS)


class OffsetClaims:
    """Where to begin on queues that are read without a lease. Loop thread only."""

    def __init__(
        self, listener: ClaimListener, *, has_group: bool, is_assigned: bool, consume_from: ConsumeFrom, consume_timestamp_ms: int
    ) -> None:
        """`has_group`: begin where the group (broadcasting: the instance) stands, if it stands anywhere. `is_assigned`: the user
        named the queues."""
        self.pending: set[MessageQueue] = set()
        self.left_off: dict[MessageQueue, Left] = {}  # where reading ended without a commit: broker gone, or no group
        self._latest: dict[MessageQueue, Left] = {}  # the same, where what lies before it may be lost: to begin no later
        self._committed_at: dict[MessageQueue, Left] = {}  # where it ended with a commit, which the broker's disk may lose
        self._going_back: set[MessageQueue] = set()  # of both, those that were sought and not committed since
        self._emptied: set[MessageQueue] = set()  # topics deleted: the next of the name is read from its beginning
        self._topic_ids: dict[MessageQueue, int] = {}  # of what was read last
        self._listener = listener
        self._has_group = has_group
        self._is_assigned = is_assigned
        self._consume_from = consume_from
        self._timestamp_ms = consume_timestamp_ms

    def claim(self, queues: Iterable[tuple[MessageQueue, Link]]) -> None:
        """Find the offset to begin at, with one question for all queues of a topic at a broker."""
        groups: dict[tuple[Link, str], list[MessageQueue]] = {}
        for queue, link in queues:
            if queue in self.left_off:
                left = self.left_off.pop(queue)
                self._begin_at(queue, link, left.safe_offset, left.topic_id, left.safe_offset)
            else:
                groups.setdefault((link, queue.topic), []).append(queue)
        for (link, topic), wanted in groups.items():
            self.pending.update(wanted)
            if self._has_group:
                link.request(
                    QueryCommitted, topic, timeout_ms=REQUEST_TIMEOUT_MS, on_reply=partial(self._committed, wanted, link)
                )
            else:
                self._find(wanted, link)

    def let_go(self, reading: Reading, offset: int) -> None:
        """Nothing to tell any broker; but by now it may be wanted again. No group knows then where it was left."""
        self._topic_ids[reading.queue] = reading.topic_id
        if not self._has_group:
            self.left_off[reading.queue] = _left(reading, offset)
        self._listener.on_unclaimed(0.0)

    def lose(self, reading: Reading, offset: int, error: ZrmqError) -> None:
        """The broker is gone. What it does not know we have to remember; else it is asked when it is back."""
        self._topic_ids[reading.queue] = reading.topic_id
        if isinstance(error, TopicNotFoundError):
            self._emptied.add(reading.queue)
        elif self._has_group and reading.committed_offset >= 0:
            self._committed_at[reading.queue] = _left(reading, reading.committed_offset)
        else:
            places = self._latest if self._has_group and offset > reading.flushed_offset else self.left_off
            places[reading.queue] = _left(reading, offset)
            if reading.goes_back:
                self._going_back.add(reading.queue)

    def restarted(self, link: Link) -> None:
        """Nothing is under way that would commit."""

    def settle(self, unwanted: Callable[[MessageQueue, Reading | None], Link | None]) -> None:
        """Nothing is ever in doubt."""

    def start_late(self, now_ms: int) -> None:
        """Queues found from here on are new, or at a broker that was away: LATEST means the time this consumer began."""
        if self._consume_from is ConsumeFrom.LATEST:
            self._consume_from, self._timestamp_ms = ConsumeFrom.TIMESTAMP, now_ms

    def _committed(self, wanted: list[MessageQueue], link: Link, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, ZrmqError):
            self._refused(wanted, reply)
            return
        found, topic_id = (dict(reply.offsets), reply.topic_id) if isinstance(reply, Offsets) else ({}, 0)
        known = {queue: found[queue.queue_id] for queue in wanted if found.get(queue.queue_id, OFFSET_LATEST) >= 0}
        self._begin(known, link, topic_id, known, is_committed=True)  # which is on the disk only after what is before it
        forgotten = {
            queue: self._committed_at[queue].safe_offset for queue in wanted
            if queue not in known and queue in self._committed_at and self._committed_at[queue].topic_id == topic_id
        }
        self._begin(forgotten, link, topic_id, forgotten)
        unknown = [queue for queue in wanted if queue not in known and queue not in forgotten]
        self._emptied.update(queue for queue in unknown if self._topic_ids.get(queue, topic_id) != topic_id)  # while it was away
        if unknown:
            self._find(unknown, link)

    def _find(self, wanted: list[MessageQueue], link: Link) -> None:
        named = {ConsumeFrom.LATEST: OFFSET_LATEST, ConsumeFrom.EARLIEST: OFFSET_EARLIEST}
        emptied = [queue for queue in wanted if queue in self._emptied]
        others = [queue for queue in wanted if queue not in self._emptied]
        for queues, where in ((emptied, OFFSET_EARLIEST), (others, named.get(self._consume_from, self._timestamp_ms))):
            if queues:
                link.request(
                    QueryOffsets, queues[0].topic, [queue.queue_id for queue in queues], where,
                    timeout_ms=REQUEST_TIMEOUT_MS, on_reply=partial(self._found, queues, link),
                )

    def _found(self, wanted: list[MessageQueue], link: Link, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, Offsets):
            found = dict(reply.offsets)
            flushed = dict(zip(found, reply.flushed_offsets, strict=False))
            known = {queue: found[queue.queue_id] for queue in wanted if queue.queue_id in found}
            self._begin(known, link, reply.topic_id, {queue: flushed.get(queue.queue_id, -1) for queue in known})
            self.pending.difference_update(wanted)
        elif isinstance(reply, ZrmqError) and reply.code is Code.BAD_REQUEST and len(wanted) > 1:
            for queue in wanted:  # one of them does not exist
                self._find([queue], link)
        elif isinstance(reply, ZrmqError):
            self._refused(wanted, reply)

    def _begin(
        self, offsets: dict[MessageQueue, int], link: Link, topic_id: int, flushed: dict[MessageQueue, int], *,
        is_committed: bool = False,
    ) -> None:
        for queue, offset in offsets.items():
            self.pending.discard(queue)
            left = self._latest.get(queue)
            if left is not None and left.topic_id == topic_id:  # what lies before a commit is not lost
                offset = min(offset, left.offset if is_committed else left.safe_offset)
            if self._topic_ids.get(queue, topic_id) != topic_id:
                self._going_back.discard(queue)  # that was in the former one
            self._begin_at(queue, link, offset, topic_id, flushed[queue])

    def _begin_at(self, queue: MessageQueue, link: Link, offset: int, topic_id: int, flushed_offset: int) -> None:
        goes_back = queue in self._going_back
        if self._listener.on_claimed(queue, link, offset, 0, topic_id, goes_back=goes_back, flushed_offset=flushed_offset):
            self._going_back.discard(queue)  # else it is not wanted any more, and may be again
            self._emptied.discard(queue)
            self._latest.pop(queue, None)
            self._committed_at.pop(queue, None)

    def _refused(self, wanted: Collection[MessageQueue], error: ZrmqError) -> None:
        self.pending.difference_update(wanted)
        if error.code is Code.BAD_REQUEST and self._is_assigned and not self._topic_ids.keys() & wanted:  # there never was one
            self._listener.on_refused(error)
        elif not isinstance(error, ClosedError):
            log.warning("queue_not_found", topic=min(wanted).topic, reason=error.message)
            self._listener.on_unclaimed(RETRY_MS)


def _left(reading: Reading, offset: int) -> Left:
    return Left(offset, reading.safe_offset(offset), reading.topic_id)
