"""Reads a broker's commit log as it grows, by the format alone, and folds it: what the store's own tables and queues must equal.

Nothing of `zrmq.store` takes part but the pure fold of `tables.py`; files are read as they lie on the virtual disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zrmq.files import Files, OpenFile
from zrmq.protocol.batch import (
    ENTRY_HEADER_BYTES,
    KIND_BATCH,
    KIND_EVENT,
    KIND_SEGMENT_END,
    BatchHeader,
    EntryHeader,
    decode_records,
    entry_checks_out,
    peek_batch,
    peek_entry,
)
from zrmq.protocol.events import AnyEvent, decode_event
from zrmq.store.tables import Tables
from zrmq.testing.simulation.trace import BrokenPromise

SEGMENT_HEADER_BYTES = 64

QueueKey = tuple[int, int]  # topic id, queue id


class Entry(NamedTuple):
    """One entry of the log: either a batch with the bodies of its records, or an event."""

    position: int
    end: int
    crc: int
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


class LogWatch:
    """One life of a broker's log. `entries` has position -> (end, crc) of everything seen, `queues` what each queue holds."""

    def __init__(self, files: Files, folder: Path) -> None:
        self.tables = Tables()
        self.end = 0
        self.entries: dict[int, tuple[int, int]] = {}
        self.queues: dict[QueueKey, dict[int, Placed]] = {}
        self._files = files
        self._folder = folder
        self._segment: tuple[int, int, OpenFile] | None = None  # start, end, file

    def advance(self, until: int) -> Iterator[Entry]:
        """Each entry from where it was left to position `until`; raises `BrokenPromise` if there is something else.

        An entry is folded when the caller asks for the next one: at first sight the tables are as they were before it.
        """
        while self.end < until:
            entry = self._read(until)
            if entry is None:
                continue
            yield entry
            self._fold(entry)
            self.entries[entry.position] = (entry.end, entry.crc)
            self.end = entry.end

    def _read(self, until: int) -> Entry | None:
        """The entry at `end`; None when the log goes on elsewhere, where `end` is by now."""
        start, segment_end, file = self._open_segment()
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
        if header.kind == KIND_SEGMENT_END:
            self.end = segment_end
            return None
        if header.kind == KIND_EVENT:
            return Entry(self.end, end, header.entry_crc, None, [], decode_event(whole[ENTRY_HEADER_BYTES:]))
        if header.kind != KIND_BATCH:
            raise BrokenPromise("log", f"{self._folder}: an entry of kind {header.kind} at {self.end}.")
        batch = peek_batch(whole)
        return Entry(self.end, end, header.entry_crc, batch, decode_records(batch, whole).bodies, None)

    def _fold(self, entry: Entry) -> None:
        if entry.event is not None:
            self.tables.apply_event(entry.event)
        elif entry.batch is not None:
            batch = entry.batch
            self.tables.apply_batch(batch)
            queue = self.queues.setdefault((batch.topic_id, batch.queue_id), {})
            for index, body in enumerate(entry.bodies):
                queue[batch.base_offset + index] = Placed(
                    body, batch.producer_id, batch.first_sequence + index, entry.end, batch.store_timestamp_ms
                )

    def _open_segment(self) -> tuple[int, int, OpenFile]:
        segment = self._segment
        if segment is None or not segment[0] <= self.end < segment[1]:
            segment = self._segment = self._find_segment()
        return segment

    def _find_segment(self) -> tuple[int, int, OpenFile]:
        for name in self._files.listdir(self._folder):
            if len(name) != 24 or not name.endswith(".log"):
                continue
            path = self._folder / name
            start = int(name[:20])
            end = start + self._files.size(path)
            if start <= self.end < end:
                return start, end, self._files.open(path)
        raise BrokenPromise("log", f"{self._folder}: no segment has position {self.end}.")
