"""Committing: tells each broker how far its queues are finished, and finds out which of them are not ours any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from zrmq.client.inbox import Inbox
from zrmq.client.link import Link
from zrmq.client.reading import Reading
from zrmq.errors import ClosedError, FencedError, UnreachableError, ZrmqError
from zrmq.logs import get_logger
from zrmq.protocol.requests import AnyReply, CommitOffsets, Committed, QueueOffset

log = get_logger("consumer")

COMMIT_TIMEOUT_MS = 10_000

OnCommitted = Callable[[ZrmqError | None], None]


class Committer:
    """Commits of one consumer. Loop thread only. `on_lost` is told of a reading that the broker says is not ours.

    Invariant: a commit that is under way reaches the life of the server that it was sent to, or none. Later ones are of readings
    that are safe (`Reading.is_safe`): of the others the same offsets may be other messages after another start.
    """

    def __init__(self, inbox: Inbox, on_lost: Callable[[Reading, ZrmqError], None]) -> None:
        self._inbox = inbox
        self._on_lost = on_lost
        self._under_way: dict[_Attempt, None] = {}  # in the order begun
        self._busy: set[Link] = set()  # links with a commit of `commit_idle` under way

    def commit_idle(self, readings: Iterable[Reading]) -> None:
        """What changed since the last time, where the broker has answered the last one."""
        able = [reading for reading in readings if reading.link not in self._busy]
        links = dict.fromkeys(reading.link for reading, _ in self._changed(able))  # in order: the same run for the same seed
        self._busy.update(links)
        for link in links:
            self.commit([reading for reading in able if reading.link is link], partial(self._idle, link), COMMIT_TIMEOUT_MS)

    def commit(self, readings: Iterable[Reading], on_done: OnCommitted, timeout_ms: int) -> None:
        """What changed; `on_done` once all brokers have answered, with the first error, or at once when nothing changed."""
        groups: dict[tuple[Link, bool], list[tuple[Reading, int]]] = {}
        for reading, offset in self._changed(readings):
            groups.setdefault((reading.link, reading.goes_back), []).append((reading, offset))
        tally = _Tally(len(groups), on_done)
        for (link, goes_back), changed in groups.items():
            attempt = _Attempt(link, changed, tally)
            self._under_way[attempt] = None
            offsets = [_wire(reading, offset) for reading, offset in changed]
            attempt.number = link.request(
                CommitOffsets, offsets, goes_back, timeout_ms=timeout_ms, on_reply=partial(self._committed, attempt)
            )
        if not groups:
            on_done(None)

    def commit_last(self, reading: Reading) -> None:
        """Before a queue is given back: where releasing it would not commit, or not back to a smaller offset."""
        if reading.goes_back or not reading.process_queue.lease_epoch:
            self.commit([reading], partial(_log_failure, reading.link), COMMIT_TIMEOUT_MS)

    def give_up(self, link: Link) -> None:
        """The session is a new one, perhaps with a server that was started again: end what is under way before the link sends it
        again."""
        for attempt in [attempt for attempt in self._under_way if attempt.link is link]:
            link.cancel(attempt.number)
            self._end(attempt, _cut_off(link))

    def _changed(self, readings: Iterable[Reading]) -> list[tuple[Reading, int]]:
        found = [(reading, self._inbox.commit_offset(reading.process_queue)) for reading in readings]
        return [(reading, offset) for reading, offset in found if offset > reading.committed_offset]

    def _committed(self, attempt: _Attempt, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        error = reply if isinstance(reply, ZrmqError) else None
        if isinstance(reply, ClosedError):  # the link was, as its broker has left
            error = _cut_off(attempt.link)
        if isinstance(reply, Committed):
            fenced = set(reply.fenced)
            for index, (reading, offset) in enumerate(attempt.changed):
                if index in fenced:
                    error = _fenced(reading)
                    self._on_lost(reading, error)
                else:
                    reading.committed_offset = offset
                    reading.goes_back = False
        self._end(attempt, error)

    def _end(self, attempt: _Attempt, error: ZrmqError | None) -> None:
        self._under_way.pop(attempt, None)
        attempt.tally.add(error)

    def _idle(self, link: Link, error: ZrmqError | None) -> None:
        self._busy.discard(link)
        _log_failure(link, error)


class _Tally:
    """Counts answers; the first error stays."""

    def __init__(self, expected: int, on_done: OnCommitted) -> None:
        self._expected = expected
        self._on_done = on_done
        self._error: ZrmqError | None = None

    def add(self, error: ZrmqError | None) -> None:
        self._error = self._error or error
        self._expected -= 1
        if self._expected == 0:
            self._on_done(self._error)


class _Attempt(msgspec.Struct, eq=False):
    """One request and what it is to commit."""

    link: Link
    changed: list[tuple[Reading, int]]
    tally: _Tally
    number: int = 0


def _log_failure(link: Link, error: ZrmqError | None) -> None:
    if error is not None and not isinstance(error, FencedError):  # that one was told to `on_lost`
        log.warning("commit_failed", address=link.address, reason=error.message)


def _wire(reading: Reading, offset: int) -> QueueOffset:
    queue = reading.queue
    return QueueOffset(queue.topic, queue.queue_id, offset, reading.process_queue.lease_epoch, reading.topic_id)


def _cut_off(link: Link) -> UnreachableError:
    text = f"The session with {link.address} was lost during the commit; commit again."
    return UnreachableError(text, address=link.address)


def _fenced(reading: Reading) -> FencedError:
    queue = reading.queue
    return FencedError(
        f"Queue {queue.queue_id} of {queue.topic!r} at {queue.broker_name} went to another member of the group, where messages"
        " that are not committed come again; or its topic was deleted and made anew, and the new one is read next.",
        topic=queue.topic, broker_name=queue.broker_name, queue_id=queue.queue_id,
    )
