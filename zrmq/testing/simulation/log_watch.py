"""Reads a broker's commit log as it grows, by the format alone, and folds it: what the store's own tables and queues must equal.

Nothing of `zrmq.store` takes part but the pure fold of `tables.py`; files are read as they lie on the virtual disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypeVar
from zlib import crc32

from zrmq.files import Files, OpenFile
from zrmq.protocol.batch import (
    ASSIGNED_AT,
    BATCH_HEADER_BYTES,
    ENTRY_HEADER_BYTES,
    KIND_BATCH,
    KIND_EVENT,
    KIND_SEGMENT_END,
    START_BYTES,
    BatchHeader,
    EntryHeader,
    decode_records,
    entry_checks_out,
    peek_batch,
    peek_entry,
)
from zrmq.protocol.events import AnyEvent, QueuesAdvanced, StateRelocated, TopicPut, decode_event
from zrmq.store.tables import Tables
from zrmq.testing.simulation.trace import BrokenPromise

SEGMENT_HEADER_BYTES = 64
BLOCK_BYTES = 4096  # what a disk fails to read at once

Lost = TypeVar("Lost", bound=AnyEvent)
QueueKey = tuple[int, int]  # topic id, queue id


class Entry(NamedTuple):
    """One entry of the log: a batch with the bodies of its records, an event, or neither, at the end of a segment."""

    position: int
    end: int
    crc: int
    flushed_position: int
    batch: BatchHeader | None
    bodies: list[bytes]
    event: AnyEvent | None


class Placed(NamedTuple):
    """One message of the log."""

    body: bytes
    producer_id: int
    sequence: int
    end: int  # of its batch in the log
    store_timestamp_ms: int


def between(contents: dict[int, Placed], start: int, end: int) -> Iterator[tuple[int, Placed]]:
    """What a queue has from `start` on and before `end`, in order. Behind damage offsets are far apart."""
    if end - start > len(contents):
        yield from ((offset, placed) for offset, placed in contents.items() if start <= offset < end)
    else:
        yield from ((offset, contents[offset]) for offset in range(start, end) if offset in contents)


class State(Enum):
    """What the disk has of an entry."""

    WHOLE = 1
    HEADER = 2  # of a batch whose records do not check out
    LOST = 3


class LogWatch:
    """One life of a broker's log. `entries` has position -> (end, crc) of everything seen, `queues` what each queue holds,
    `batches` position -> topic id, end, store timestamp; what was seen stays there when its segment is deleted.

    A log that begins behind `start` 0 is folded without what came before, until it has said everything again (`is_complete`).

    `hurt`: entries that the disk has been at before this life, as they were written. `queues` has all of them, `tables` only what
    the broker can know: it read those behind `saved_position` from the disk, and had the others in its views, without `unsaved`.
    """

    def __init__(
        self, files: Files, folder: Path, start: int, hurt: Mapping[int, Entry], saved_position: int, unsaved: frozenset[int]
    ) -> None:
        self.log: list[Entry] = []
        self.missing = set(unsaved)
        self.damaged: dict[int, State] = {}  # those of `hurt` that are not whole any more
        self._hurt = hurt
        self.saved_position = saved_position
        self.tables = Tables()
        self.start = self.end = start
        self.is_complete = start == 0
        self.entries: dict[int, tuple[int, int]] = {}
        self.queues: dict[QueueKey, dict[int, Placed]] = {}
        self.batches: dict[int, tuple[int, int, int]] = {}
        self._files = files
        self._folder = folder
        self._segment: tuple[int, int, OpenFile] | None = None  # start, end, file

    def anew(self, start: int) -> LogWatch:
        """One that has seen nothing yet, of an unhurt log that begins at `start` by now."""
        return LogWatch(self._files, self._folder, start, {}, 0, frozenset())

    def advance(self, until: int) -> Iterator[Entry]:
        """Each entry from where it was left to position `until`; raises `BrokenPromise` if there is something else.

        An entry is folded when the caller asks for the next one: at first sight the tables are as they were before it.
        """
        if self.end == self.start > 0:
            self._find_topics(until)
        while self.end < until:
            entry = self._read(until)
            if entry is None:
                continue
            yield entry
            self._fold(entry)
            self.entries[entry.position] = (entry.end, entry.crc)
            self.end = entry.end

    def first_offset(self, key: QueueKey, log_start: int, next_offset: int) -> int:
        """The offset of the first message that is in the log from `log_start` on; `next_offset` if there is none."""
        contents = self.queues.get(key, {})
        return next((offset for offset, placed in contents.items() if placed.end > log_start), next_offset)

    def has_lost_offsets(self, topic_id: int, queue_id: int, before: int) -> bool:
        """Whether an entry before this position is lost that said where a queue goes on: a batch of it, or that damaged offsets
        are passed over."""
        lost = [self._hurt[position] for position in self.missing if position < before]
        return any(
            (entry.batch is not None and (entry.batch.topic_id, entry.batch.queue_id) == (topic_id, queue_id))
            or (
                isinstance(entry.event, QueuesAdvanced) and entry.event.topic_id == topic_id
                and queue_id in dict(entry.event.next_offsets)
            )
            for entry in lost
        )

    def lost_events(self, kind: type[Lost]) -> Iterator[Lost]:
        """Those of this kind that are lost of what was read until now."""
        for position in self.missing:
            event = self._hurt[position].event
            if position < self.end and isinstance(event, kind):
                yield event

    def _find_topics(self, until: int) -> None:
        """Of a log that begins with batches of topics it tells of only further on: look ahead for those. Not for another topic of
        the same name, which comes when that one is deleted."""
        known: set[str] = set()
        while self.end < until:
            entry = self._read(until)
            if entry is not None:
                if isinstance(entry.event, TopicPut) and entry.event.config.topic not in known:
                    known.add(entry.event.config.topic)
                    self.tables.apply_event(entry.event)
                self.end = entry.end
        self.end, self._segment = self.start, None
        self.log.clear()

    def _read(self, until: int) -> Entry | None:
        """The entry at `end`; None when the log goes on elsewhere, where `end` is by now."""
        start, segment_end, file = self._open_segment()
        hurt = self._hurt.get(self.end)
        if hurt is not None:
            return self._read_hurt(hurt, file, self.end - start, segment_end)
        if segment_end - self.end < ENTRY_HEADER_BYTES:
            self.end = segment_end
            return None
        if self.end == start:
            self.end += SEGMENT_HEADER_BYTES
            return None
        head = file.pread(ENTRY_HEADER_BYTES, self.end - start)
        header = peek_entry(head)
        if header is not None and header.position == self.end:
            whole = file.pread(header.length, self.end - start)
            if entry_checks_out(whole, header):
                return self._decode(header, whole, segment_end)
        raise BrokenPromise("log", f"{self._folder}: no entry at {self.end}, though the log is said to reach {until}.")

    def _decode(self, header: EntryHeader, whole: bytes, segment_end: int) -> Entry | None:
        end = self.end + header.length
        said = (self.end, end, header.entry_crc, header.flushed_position)
        if header.kind == KIND_SEGMENT_END:
            self.log.append(Entry(*said, None, [], None))
            self.end = segment_end
            return None
        if header.kind == KIND_EVENT:
            return Entry(*said, None, [], decode_event(whole[ENTRY_HEADER_BYTES:]))
        if header.kind != KIND_BATCH:
            raise BrokenPromise("log", f"{self._folder}: an entry of kind {header.kind} at {self.end}.")
        batch = peek_batch(whole)
        return Entry(*said, batch, decode_records(batch, whole).bodies, None)

    def _read_hurt(self, entry: Entry, file: OpenFile, at: int, segment_end: int) -> Entry | None:
        state = _state(entry, read_blocks(file, entry.end - entry.position, at))
        if state is not State.WHOLE:
            self.damaged[entry.position] = state
        if state is State.LOST and entry.position >= self.saved_position:
            self.missing.add(entry.position)
        if entry.batch is None and entry.event is None:
            self.log.append(entry)
            self.end = segment_end
            return None
        return entry

    def _fold(self, entry: Entry) -> None:
        self.log.append(entry)
        if entry.position in self.missing:
            pass
        elif entry.event is not None:
            self.tables.apply_event(entry.event)
            if isinstance(entry.event, StateRelocated) and entry.event.position >= self.start:
                self.is_complete = True
        elif entry.batch is not None:
            self.tables.apply_batch(entry.batch)
        batch = entry.batch
        if batch is not None:
            self.batches[entry.position] = batch.topic_id, entry.end, batch.store_timestamp_ms
            queue = self.queues.setdefault((batch.topic_id, batch.queue_id), {})
            for index, body in enumerate(entry.bodies):
                queue[batch.base_offset + index] = Placed(
                    body, batch.producer_id, batch.first_sequence + index, entry.end, batch.store_timestamp_ms
                )

    def _open_segment(self) -> tuple[int, int, OpenFile]:
        segment = self._segment
        if segment is None or not segment[0] <= self.end < segment[1]:
            segment = self._segment = self._find_segment(self.end)
        return segment

    def is_whole(self, entry: Entry) -> bool:
        """Whether the disk has it as it was written; what fell on it may have been the same bytes."""
        start, _, file = self._find_segment(entry.position)
        return _state(entry, read_blocks(file, entry.end - entry.position, entry.position - start)) is State.WHOLE

    def _find_segment(self, position: int) -> tuple[int, int, OpenFile]:
        for name in self._files.listdir(self._folder):
            if len(name) != 24 or not name.endswith(".log"):
                continue
            path = self._folder / name
            start = int(name[:20])
            end = start + self._files.size(path)
            if start <= position < end:
                return start, end, self._files.open(path)
        raise BrokenPromise("log", f"{self._folder}: no segment has position {position}.")


def _state(entry: Entry, data: bytes) -> State:
    header = peek_entry(data)
    if header is None or (header.position, header.entry_crc) != (entry.position, entry.crc):
        return State.LOST
    if entry_checks_out(data, header):
        return State.WHOLE
    is_header_whole = crc32(data[ASSIGNED_AT:BATCH_HEADER_BYTES], crc32(data[:START_BYTES])) == header.entry_crc
    return State.HEADER if header.kind == KIND_BATCH and is_header_whole else State.LOST


def read_blocks(file: OpenFile, size: int, position: int) -> bytes:
    """Zeros for blocks that cannot be read."""
    parts, end = [], position + size
    while position < end:
        stop = min(position - position % BLOCK_BYTES + BLOCK_BYTES, end)
        try:
            parts.append(file.pread(stop - position, position))
        except OSError:
            parts.append(bytes(stop - position))
        position = stop
    return b"".join(parts)
