"""The consume path: batches found in a queue's entries, read by as few and as large reads as their places allow, each checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from zrmq.errors import DamageError, NotReadyError
from zrmq.protocol.batch import KIND_BATCH, entry_checks_out, peek_batch, peek_entry
from zrmq.protocol.requests import PullStatus
from zrmq.store.commit_log import CommitLog
from zrmq.store.consume_queue import ConsumeQueue, QueueEntry
from zrmq.store.maintenance import Damage, Upkeep
from zrmq.store.tables import Queue
from zrmq.store.views import Views

JOIN_BYTES = 64 * 1024  # smaller pieces are joined to one frame, larger ones are sent as they were read
HOLE_BYTES = 8 * 1024  # other queues' bytes that are read along rather than asking the system once more
RUN_BYTES_MAX = 1 << 20  # read at once; a longer batch is read alone
# Batches one read looks at before it answers how far it came: 8 ms of the loop to pass over them for their tags, 25 to check all.
ENTRIES_MAX = 4_096


class Chunk(NamedTuple):
    """What a read found. `frames` are whole batches, in order."""

    status: PullStatus
    frames: list[bytes]
    next_offset: int  # where to read on, in every case
    min_offset: int
    max_offset: int  # visible end of the queue


class Reader:
    """Reads one store's queues. Loop thread only."""

    def __init__(self, commit_log: CommitLog, views: Views, upkeep: Upkeep, on_damage: Callable[[Damage], None]) -> None:
        self._log = commit_log
        self._views = views
        self._upkeep = upkeep
        self._on_damage = on_damage

    def read(self, queue: Queue, offset: int, bytes_max: int, tag_mask: int) -> Chunk:
        """See `Store.read`."""
        index = self._index(queue)
        if offset < queue.min_offset or offset > queue.next_offset:
            return _chunk(queue, PullStatus.MOVED, queue.min_offset if offset < queue.min_offset else queue.visible_offset)
        if offset >= queue.visible_offset:
            return _chunk(queue, PullStatus.NOTHING, offset)
        try:
            choice = _choose(index, offset, bytes_max, tag_mask)
        except (DamageError, OSError) as error:
            raise self._not_ready(queue, error) from error
        index.remember(choice.next_offset, choice.number, offset)
        if choice.entries:
            return self._read(queue, choice)
        if choice.hole_end:
            return _chunk(queue, PullStatus.CORRUPT, choice.hole_end)
        return _chunk(queue, PullStatus.NOTHING, choice.next_offset)

    def _read(self, queue: Queue, choice: _Choice) -> Chunk:
        try:
            frames, good_count = read_batches(self._log, queue, choice.entries)
        except OSError as error:
            raise self._not_ready(queue, error) from error
        if good_count == len(choice.entries):
            return _chunk(queue, PullStatus.FOUND, choice.next_offset, frames)
        damaged = choice.entries[good_count]
        if damaged.position < self._log.start:  # deleted, and the queue has not been trimmed yet
            return _chunk(queue, PullStatus.MOVED, damaged.next_offset)
        self._on_damage((damaged.position, damaged.position + damaged.length))
        if good_count:
            return _chunk(queue, PullStatus.FOUND, damaged.base_offset, frames)
        return _chunk(queue, PullStatus.CORRUPT, damaged.next_offset)

    def offset_at(self, queue: Queue, timestamp_ms: int) -> int:
        """See `Store.offset_at`."""
        index = self._index(queue)
        try:
            number = index.find_time(timestamp_ms)
            offset = index.entry(number).base_offset if number < index.end else queue.visible_offset
        except (DamageError, OSError) as error:
            raise self._not_ready(queue, error) from error
        return min(offset, queue.visible_offset)

    def _index(self, queue: Queue) -> ConsumeQueue:
        index = self._views.index(queue)
        if index.first_position < self._log.start:
            self._upkeep.trim(index)
        if queue in self._upkeep.reindexing:
            raise self._being_reindexed(queue)
        return index

    def _not_ready(self, queue: Queue, error: DamageError | OSError) -> NotReadyError:
        if isinstance(error, OSError):
            return NotReadyError(f"The log cannot be read just now: {error}. Ask again shortly.", reason=str(error))
        self._upkeep.queue_damaged(queue)
        return self._being_reindexed(queue)

    def _being_reindexed(self, queue: Queue) -> NotReadyError:
        name = queue.topic.config.topic
        return NotReadyError(
            f"The index of queue {queue.queue_id} of {name!r} was damaged and is being made anew; ask again shortly.",
            topic=name, queue_id=queue.queue_id,
        )


class _Choice(NamedTuple):
    """What to read."""

    entries: list[QueueEntry]
    next_offset: int  # follows them, and those passed over
    number: int  # of the entry that has `next_offset`
    hole_end: int = 0  # `next_offset` is in a hole that damage left, which ends here


def _choose(index: ConsumeQueue, offset: int, bytes_max: int, tag_mask: int) -> _Choice:
    visible = index.queue.visible_offset
    number = max(index.find_offset(offset), index.first)
    wanted: list[QueueEntry] = []
    size = looked_at = 0
    for entry in index.entries(number):
        if entry.next_offset <= offset:  # it ends before the offset: damage ate what followed it
            number += 1
            continue
        if entry.base_offset >= visible:
            break
        if entry.base_offset > offset:
            return _Choice(wanted, offset, number, entry.base_offset)
        if not tag_mask or entry.tag_mask & tag_mask:
            if wanted and size + entry.length > bytes_max:
                return _Choice(wanted, offset, number)
            wanted.append(entry)
            size += entry.length
        offset = entry.next_offset
        number += 1
        looked_at += 1
        if size >= bytes_max or looked_at >= ENTRIES_MAX:
            return _Choice(wanted, offset, number)
    return _Choice(wanted, offset, number, visible if offset < visible else 0)


def _chunk(queue: Queue, status: PullStatus, next_offset: int, frames: list[bytes] | None = None) -> Chunk:
    return Chunk(status, frames or [], next_offset, queue.min_offset, queue.visible_offset)


def read_batches(commit_log: CommitLog, queue: Queue, entries: Sequence[QueueEntry]) -> tuple[list[bytes], int]:
    """Frames of whole batches, in order, and how many of `entries` are in them: those before the first that is damaged.

    Raises `OSError` where the system, not the disk, refuses.
    """
    pieces: list[bytes] = []
    good_count = 0
    for run in _runs(commit_log, entries):
        piece, count = _read_run(commit_log, queue, run)
        if count:
            pieces.append(piece)
        good_count += count
        if count < len(run):
            break
    return _join(pieces), good_count


def _runs(commit_log: CommitLog, entries: Sequence[QueueEntry]) -> Iterator[list[QueueEntry]]:
    """The entries, those near each other in one segment of the log together."""
    run: list[QueueEntry] = []
    end = limit = 0  # where the run ends, and where it may end at most
    for entry in entries:
        entry_end = entry.position + entry.length
        if run and 0 <= entry.position - end <= HOLE_BYTES and entry_end <= limit:
            run.append(entry)
        else:
            if run:
                yield run
            run = [entry]
            segment = commit_log.segment_at(entry.position)
            limit = min(segment.end if segment is not None else 0, entry.position + RUN_BYTES_MAX)
        end = entry_end
    if run:
        yield run


def _read_run(commit_log: CommitLog, queue: Queue, run: list[QueueEntry]) -> tuple[bytes, int]:
    """The batches of one run without what lies between them, up to the first that does not check out; and their number."""
    start = run[0].position
    data = commit_log.read(start, run[-1].position + run[-1].length - start)
    count = size = 0
    for entry in run:
        if not batch_checks_out(data, entry.position - start, queue, entry):
            break
        count += 1
        size += entry.length
    if size == len(data):
        return data, count
    view = memoryview(data)
    return b"".join([view[entry.position - start :][: entry.length] for entry in run[:count]]), count


def batch_checks_out(data: bytes, at: int, queue: Queue, entry: QueueEntry) -> bool:
    """Whether the batch that the queue's entry speaks of is at `at`, unchanged."""
    header = peek_entry(data, at)
    if header is None or header.kind != KIND_BATCH or header.position != entry.position or header.length != entry.length:
        return False
    if not entry_checks_out(data, header, at):
        return False
    batch = peek_batch(data, at)
    return (batch.topic_id, batch.queue_id, batch.base_offset) == (queue.topic.topic_id, queue.queue_id, entry.base_offset)


def _join(pieces: list[bytes]) -> list[bytes]:
    frames: list[bytes] = []
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) < JOIN_BYTES:
            small.append(piece)
            continue
        if small:
            frames.append(b"".join(small))
            small = []
        frames.append(piece)
    if small:
        frames.append(b"".join(small))
    return frames
