"""Reading queues: a pull is outstanding for each of them as long as there is room for what it may bring.

A pull that finds nothing waits at the broker, so a message reaches an idle consumer in one way of the network; and it stays there
for the next one. Its last reply is followed by the next pull at once, before anybody has opened it: pulled chunks lie ready while
the caller works.

Room is counted in bytes and messages over all queues of a consumer. Half of it is free for all. Of the other half each queue has
an equal share of its own, so that one whose messages nobody takes (a listener that fails in order) never starves the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from random import Random

import msgspec

from zrmq.client.inbox import Inbox
from zrmq.client.link import LEASE_MARGIN, Link
from zrmq.client.process_queue import Chunk, ProcessQueue, forever
from zrmq.errors import ClosedError, Code, FencedError, RequestTimeoutError, TopicNotFoundError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import MessageQueue
from zrmq.protocol.requests import AnyReply, Pull, Pulled, PullStatus
from zrmq.protocol.tags import filter_mask, parse_expression
from zrmq.transport.interface import Loop

log = get_logger("consumer")

PULL_BYTES_MAX = 256 * 1024  # larger ones gain nothing, smaller ones cost a quarter
PULL_BYTES_MIN = 16 * 1024
PULL_WAIT_MS = 15_000  # RocketMQ's brokerSuspendMaxTimeMillis
PULL_TIMEOUT_MS = PULL_WAIT_MS + 5_000
RETRY_MS = 1_000.0  # after a refusal that time may heal


class Reading(msgspec.Struct, eq=False):
    """A queue that is ours now, and whom to ask for its messages."""

    process_queue: ProcessQueue
    link: Link
    committed_offset: int  # what the broker knows
    goes_back: bool = False  # the next commit may be smaller than what the broker knows
    pull_number: int = 0  # of the outstanding pull, 0: none
    pull_offset: int = 0  # what it brings next
    pulled_bytes: int = 0  # what it has brought so far
    flushed_offset: int = -1  # no power cut takes what is before; below 0 while that is not known
    topic_id: int = 0  # of the topic that the offsets belong to; 0: the lease says it
    refusal: Code | None = None  # the last one that was logged
    draining_ms: float = 0.0  # since when it is to be given back

    @property
    def queue(self) -> MessageQueue:
        return self.process_queue.queue

    @property
    def is_safe(self) -> bool:
        """Whether all that was read is as it was when its broker is started again, whatever ended it."""
        return self.process_queue.pull_offset <= self.flushed_offset

    def safe_offset(self, offset: int) -> int:
        """Where to go on, instead of at `offset`, when its broker may have lost what it had not flushed: what it stored in its
        place since is still to be read."""
        return min(offset, self.flushed_offset) if self.flushed_offset >= 0 else offset


class Bounds(msgspec.Struct, frozen=True):
    """How much one consumer holds that its caller has not taken yet."""

    size_bytes: int
    messages: int


class Reader:
    """All readings of one consumer. Loop thread only. `on_lost` is told of a reading whose lease, topic or broker is gone."""

    def __init__(
        self,
        loop: Loop,
        inbox: Inbox,
        bounds: Bounds,
        filters: dict[str, str],
        lease_group: str,
        rng: Random,
        on_lost: Callable[[Reading, ZrmqError], None],
    ) -> None:
        """`filters`: expression by topic; `lease_group`: the group in whose name leases are held, empty without leases."""
        self.readings: dict[MessageQueue, Reading] = {}
        self.queue_count = 0  # how many there will be, for the shares of the room
        self.corrupt_count = 0  # batches the brokers reported damaged on their disks
        self._loop = loop
        self._inbox = inbox
        self._bounds = bounds
        self._wanted_tags = {topic: parse_expression(expression) for topic, expression in filters.items()}
        self._tag_masks = {topic: filter_mask(expression) for topic, expression in filters.items()}
        self._lease_group = lease_group
        self._rng = rng
        self._on_lost = on_lost
        self._is_closed = False

    # --- readings -----------------------------------------------------------------------------------------------------

    def begin(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int = 0, topic_id: int = 0, flushed_offset: int = -1,
        committed_offset: int = -1,
    ) -> Reading:
        """Read a queue from an offset on, under a lease that was just given; without one, of the topic with this id. What lies
        before `flushed_offset` survives a power cut. The broker knows of `committed_offset`; of none where that is negative."""
        valid_until_ms = partial(_valid_until_ms, link, link.gap_count) if lease_epoch else forever
        reading = self._begin(queue, link, offset, lease_epoch, topic_id, valid_until_ms)
        reading.flushed_offset, reading.committed_offset = flushed_offset, committed_offset
        return reading

    def _begin(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int, topic_id: int, valid_until_ms: Callable[[], float]
    ) -> Reading:
        process_queue = ProcessQueue(
            queue, offset, lease_epoch=lease_epoch, wanted_tags=self._wanted_tags.get(queue.topic), account=self._inbox.account,
            valid_until_ms=valid_until_ms,
        )
        reading = self.readings[queue] = Reading(process_queue, link, committed_offset=-1, topic_id=topic_id)
        self.pull(reading)
        return reading

    def end(self, reading: Reading) -> None:
        """Read it no more; what callers have of it counts for nothing from now on."""
        self.stop_pulling(reading)
        self._inbox.drop(reading.process_queue)
        if self.readings.get(reading.queue) is reading:
            del self.readings[reading.queue]

    def begin_anew(self, reading: Reading, offset: int) -> Reading:
        """Read the same queue, under the same lease, from another offset on, which the next commit tells the broker."""
        old = reading.process_queue
        self.end(reading)
        anew = self._begin(old.queue, reading.link, offset, old.lease_epoch, reading.topic_id, old.valid_until_ms)
        anew.committed_offset, anew.goes_back, anew.flushed_offset = -1, True, reading.flushed_offset
        if old.is_paused:
            self.pause(anew, True)
        return anew

    def pause(self, reading: Reading, is_paused: bool) -> None:
        """Hand nothing out of it, and pull nothing, until it is resumed."""
        if is_paused:
            self.stop_pulling(reading)
        self._inbox.pause(reading.process_queue, is_paused)
        self.pull(reading)

    def close(self) -> None:
        """Pull no more. The readings stay, to be committed."""
        self._is_closed = True
        for reading in self.readings.values():
            self.stop_pulling(reading)

    # --- pulls --------------------------------------------------------------------------------------------------------

    def pull_all(self) -> None:
        """Pull from all queues that wait for room, if there is some."""
        self._inbox.is_starving = False
        for reading in list(self.readings.values()):
            self.pull(reading)

    def pull(self, reading: Reading) -> None:
        """Ask for what follows, unless that is under way, not wanted now, or there is no room for it."""
        queue = reading.process_queue
        if reading.pull_number and reading.pull_offset != queue.pull_offset:
            self.stop_pulling(reading)  # what came before was damaged and has to come again first
        if reading.pull_number or self._is_closed:
            return
        if queue.is_dropped or queue.is_draining or queue.is_paused:
            return
        if not self._has_room(queue):
            self._inbox.is_starving = True  # before looking again: a caller that makes room from here on will wake us
            if not self._has_room(queue):
                return
        place = queue.queue
        reading.pull_offset, reading.pulled_bytes = queue.pull_offset, 0
        try:
            reading.pull_number = reading.link.request(
                Pull, place.topic, place.queue_id, queue.pull_offset, self._pull_bytes, PULL_WAIT_MS,
                self._tag_masks.get(place.topic, 0), self._lease_group, queue.lease_epoch, reading.topic_id, True,
                timeout_ms=PULL_TIMEOUT_MS, on_reply=partial(self._pulled, reading),
            )
        except ClosedError as error:
            self._on_lost(reading, error)

    def session_renewed(self, link: Link) -> None:
        """The link has a new session. Pulls of the last one are sent again as they were, but those that have brought something
        have to begin behind it."""
        for reading in list(self.readings.values()):
            if reading.link is link and reading.pulled_bytes:
                self.stop_pulling(reading)
                self.pull(reading)

    def stop_pulling(self, reading: Reading) -> None:
        """Whatever the outstanding pull brings is not wanted."""
        if reading.pull_number:
            reading.link.cancel(reading.pull_number)
            reading.pull_number = 0

    @property
    def _pull_bytes(self) -> int:
        return max(PULL_BYTES_MIN, min(PULL_BYTES_MAX, self._bounds.size_bytes // self._parts))

    @property
    def _parts(self) -> int:
        """A queue's own share of the room is one of so many."""
        return 2 * max(len(self.readings), self.queue_count, 1)

    def _has_room(self, queue: ProcessQueue) -> bool:
        bounds, account = self._bounds, self._inbox.account
        if 2 * account.size_bytes < bounds.size_bytes and 2 * account.messages < bounds.messages:
            return True
        parts = self._parts
        return parts * queue.held_bytes < bounds.size_bytes and parts * queue.held_messages < bounds.messages

    def _pulled(self, reading: Reading, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, Pulled):
            if not reply.more:
                reading.pull_number = 0
            self._take(reading, reply, frames)
            return
        reading.pull_number = 0
        if isinstance(reply, FencedError | TopicNotFoundError | ClosedError):
            self._on_lost(reading, reply)
        elif isinstance(reply, RequestTimeoutError):
            self.pull(reading)
        elif isinstance(reply, ZrmqError):
            self._refused(reading, reply)

    def _take(self, reading: Reading, reply: Pulled, frames: list[bytes]) -> None:
        reading.refusal = None
        reading.flushed_offset = reply.flushed_offset
        offset = reading.pull_offset
        if reply.status is not PullStatus.FOUND and reply.status is not PullStatus.NOTHING:
            self._tell(reading, offset, reply)
        if reply.next_offset < offset:  # the end of the queue was lost; what lies before it and is not finished is still owed
            self.begin_anew(reading, min(reply.next_offset, self._inbox.commit_offset(reading.process_queue)))
            return
        chunk = Chunk(frames, offset, reply.next_offset)
        reading.pull_offset = reply.next_offset
        reading.pulled_bytes += chunk.size_bytes
        if reply.next_offset == offset and (frames or reply.more):
            self._refused(reading, ZrmqError(f"{reading.link.address} sent messages that end where they begin, at {offset}."))
        elif reply.more and reading.pulled_bytes > PULL_BYTES_MAX:
            self._refused(reading, ZrmqError(f"{reading.link.address} sent {reading.pulled_bytes} bytes for one pull."))
        else:
            self._inbox.put(reading.process_queue, chunk)
            self.pull(reading)

    def _tell(self, reading: Reading, offset: int, reply: Pulled) -> None:
        queue = reading.queue
        place = {"topic": queue.topic, "broker_name": queue.broker_name, "queue_id": queue.queue_id, "offset": offset}
        if reply.status is PullStatus.CORRUPT:
            self.corrupt_count += 1
            log.error("batch_corrupt_skipped", **place, next_offset=reply.next_offset)
        else:
            log.warning("offset_moved", **place, next_offset=reply.next_offset, min_offset=reply.min_offset)

    def _refused(self, reading: Reading, error: ZrmqError) -> None:
        self.stop_pulling(reading)
        if error.code is not reading.refusal:
            reading.refusal = error.code
            queue = reading.queue
            log.warning(
                "pull_refused", topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id, reason=error.message
            )
        self._loop.call_later(RETRY_MS * self._rng.uniform(0.8, 1.2), partial(self.pull, reading))


def server_id(link: Link) -> str:
    """Which life of the server the link talks to; another one after each start of it."""
    return link.welcome.server_id if link.welcome is not None else ""


def lease_ends_ms(link: Link) -> float:
    """Until when (monotonic) a lease of this link's session is surely ours: the broker answered what we sent `confirmed_ms`."""
    welcome = link.welcome
    return link.confirmed_ms + LEASE_MARGIN * welcome.session_timeout_ms if welcome is not None else link.confirmed_ms


def _valid_until_ms(link: Link, gap_count: int) -> float:
    """Until when a lease is surely ours that the link had when its gaps were so many; never again after another one."""
    return lease_ends_ms(link) if link.gap_count == gap_count else -inf
