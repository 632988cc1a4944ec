"""Consume queues: for each queue, where in the log its batches are. A view of the log, made for looking up by offset and time.

One entry per batch, 44 bytes, little-endian:

    offset size  field
    ------ ----  --------------------
         0    8  base offset            of the batch's first message
         8    8  position               of the batch in the log
        16    4  length                 of the batch
        20    4  record count
        24    8  store timestamp ms     the latest of this batch and all before it, so that it only grows, whatever the clock did
        32    8  tag mask
        40    4  crc                    CRC-32 of 0..40

Entries have numbers, counted from the queue's beginning. The newest are in memory, the *tail*. When the tail is long it goes to
files of 65,536 entries each, `consumequeue/TOPIC@ID/QUEUE/FIRST`, named by the number of their first entry (20 digits; where in
the file an entry is follows from its number). A short tail is saved in the queue's row of views.db instead, so that 10,000 quiet
queues cost one transaction and no file.

    first            synced          filed            end
      |  in files      |  in files     |   tail, in     |
      |  and on disk   |  maybe lost   |   memory       |

Offsets ascend from entry to entry and are dense, unless damage ate a batch of the log. A file's entry that does not check out is
answered with `DamageError`; the store then builds the queue's entries anew from the log.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from zrmq.errors import DamageError
from zrmq.files import Files, read_fully, write_fully
from zrmq.protocol.limits import Natural
from zrmq.store.open_files import OpenFiles
from zrmq.store.segment import UNREADABLE
from zrmq.store.tables import Queue, Topic

ENTRIES_PER_FILE = 65_536
TAIL_BYTES_MAX = 64 * 1024  # a longer tail is written to a file at the end of the turn
ROW_TAIL_BYTES_MAX = 4 * 1024  # a longer tail is written to a file when the views are saved
HINTS_MAX = 8  # sequential readers of one queue that find their place without a search
BLOCK_ENTRIES = 128  # read at once: costs little more than to read one
PATHS_MAX = 128  # remembered of the files that were searched last

_BODY = struct.Struct("<QQIIqQ")
_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<QQIIqQI")
ENTRY_BYTES = _ENTRY.size
_CRC_AT = _BODY.size
_NOWHERE = (1 << 63) - 1  # first position of a queue without entries: behind everything

assert (_CRC_AT, ENTRY_BYTES) == (40, 44)


class QueueEntry(NamedTuple):
    """Where one batch is, and what can be said of it unread."""

    base_offset: int
    position: int
    length: int
    record_count: int
    store_timestamp_ms: int
    tag_mask: int
    crc: int

    @property
    def next_offset(self) -> int:
        """Offset that follows the batch."""
        return self.base_offset + self.record_count


class QueueRow(NamedTuple):
    """A queue as views.db keeps it."""

    topic_id: Natural
    queue_id: Natural
    min_offset: Natural
    next_offset: Natural
    first: Natural
    filed: Natural
    first_position: Natural
    max_timestamp_ms: Natural
    tail: bytes


class SyncFailedError(Exception):
    """The disk refused to sync a file: what the file holds is not known any more, and another try would find out nothing."""


class Shelf:
    """The files of all consume queues. What only reads is for the loop's thread, what writes for any, on different queues."""

    def __init__(self, files: Files, folder: Path, open_files: OpenFiles, entries_per_file: int = ENTRIES_PER_FILE) -> None:
        self.files = files
        self.folder = folder
        self.row_tail_bytes_max = ROW_TAIL_BYTES_MAX
        self._open_files = open_files
        self._entries_per_file = entries_per_file
        self._path = lru_cache(PATHS_MAX)(_path)  # hot in a search: to make a path and its hash costs more than to read

    def folder_of_topic(self, topic: Topic) -> Path:
        """Folder of a topic's queues. With its id: a topic deleted and made again is another one."""
        return self.folder / f"{topic.config.topic}@{topic.topic_id}"

    def folder_of(self, queue: Queue) -> Path:
        """Folder of one queue's files."""
        return self.folder_of_topic(queue.topic) / str(queue.queue_id)

    def read(self, folder: Path, number: int, count: int) -> bytes:
        """Up to `count` packed entries from `number` on, of one file. Raises `DamageError`; `OSError` if it may work later."""
        first = number - number % self._entries_per_file
        path = self._path(folder, first)
        size = min(count, first + self._entries_per_file - number) * ENTRY_BYTES
        try:
            data = read_fully(self._open_files.get(path), size, (number - first) * ENTRY_BYTES)
        except OSError as error:
            if error.errno not in (*UNREADABLE, errno.ENOENT):
                raise
            raise DamageError(f"The queue file {path} cannot be read: {error}.", path=str(path)) from error
        if len(data) < size:
            raise DamageError(f"The queue file {path} is shorter than it was.", path=str(path))
        return data

    def write(self, folder: Path, number: int, entries: bytes) -> None:
        """Write packed entries from `number` on. Raises `OSError`."""
        at = 0
        while at < len(entries):
            first = number - number % self._entries_per_file
            size = min(len(entries) - at, (first + self._entries_per_file - number) * ENTRY_BYTES)
            self._write_part(folder, first, (number - first) * ENTRY_BYTES, entries[at : at + size])
            at += size
            number += size // ENTRY_BYTES

    def _write_part(self, folder: Path, first: int, position: int, part: bytes) -> None:
        path = _path(folder, first)
        try:
            file = self.files.open(path, create=True)
        except FileNotFoundError:
            self.files.mkdir(folder)
            file = self.files.open(path, create=True)
        try:
            write_fully(file, [part], position)
        finally:
            file.close()

    def sync(self, folder: Path, number: int, end: int) -> None:
        """Bring the files with entries `number` up to `end` to the disk, and their names.

        Raises `SyncFailedError`; `OSError` for what cannot be opened, which may work later.
        """
        for path in self._paths(folder, number, end):
            with closing(self.files.open(path)) as file, _syncing(path):
                file.fdatasync()
        with closing(self.files.open_folder(folder)) as opened, _syncing(folder):
            opened.fsync()

    def has(self, folder: Path, number: int, end: int) -> bool:
        """Whether files long enough to hold entries `number` up to `end` are there."""
        for path in self._paths(folder, number, end):
            first = int(path.name)
            try:
                if self.files.size(path) < (min(end, first + self._entries_per_file) - first) * ENTRY_BYTES:
                    return False
            except FileNotFoundError:
                return False
        return True

    def remove_below(self, folder: Path, number: int) -> None:
        """Remove the queue's files all of whose entries are below `number`."""
        for name in self.files.listdir(folder):
            if name.isdecimal() and int(name) + self._entries_per_file <= number:
                self.files.unlink(folder / name)

    def forget(self, folder: Path) -> None:
        """Files in the folder, or in those within, are about to be removed. Loop's thread."""
        self._open_files.forget_folder(folder)

    def next_file(self, number: int) -> int:
        """The number with which the file after the one that holds `number` begins."""
        return number - number % self._entries_per_file + self._entries_per_file

    def _paths(self, folder: Path, number: int, end: int) -> list[Path]:
        first = number - number % self._entries_per_file
        return [_path(folder, start) for start in range(first, end, self._entries_per_file)] if number < end else []


@contextmanager
def _syncing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SyncFailedError(f"The disk refused to sync {path}: {error}.") from error


def _path(folder: Path, first: int) -> Path:
    return folder / f"{first:020d}"


class ConsumeQueue:
    """The entries of one queue. Loop thread only. Small: a broker has up to 10,000 of them, most of them quiet."""

    __slots__ = (
        "_folder", "_hints", "cleaned", "filed", "first", "first_position", "is_spilling", "max_timestamp_ms", "queue",
        "saved_min_offset", "saved_next_offset", "shelf", "synced", "tail",
    )

    def __init__(self, queue: Queue, shelf: Shelf) -> None:
        self.queue = queue
        self.first = 0
        self.synced = 0
        self.filed = 0
        self.tail = bytearray()
        self.first_position = _NOWHERE
        self.max_timestamp_ms = 0
        self.is_spilling = False  # a job counts on the numbers: neither spill nor trim
        self.cleaned = 0  # files all of whose entries are below are removed; a crash may have come between, so 0 at a start
        self.saved_min_offset = self.saved_next_offset = 0  # what views.db has
        self.shelf = shelf
        self._folder: Path | None = None
        self._hints: dict[int, int] | None = None  # offset a reader goes on at, to the number of its entry

    @property
    def end(self) -> int:
        """Number that the next entry gets."""
        return self.filed + len(self.tail) // ENTRY_BYTES

    @property
    def folder(self) -> Path:
        """Where its files are, if it has any. Any thread."""
        folder = self._folder
        if folder is None:
            folder = self._folder = self.shelf.folder_of(self.queue)
        return folder

    # --- writing ------------------------------------------------------------------------------------------------------

    def add(
        self, base_offset: int, position: int, length: int, record_count: int, store_timestamp_ms: int, tag_mask: int
    ) -> None:
        """One more batch. On the hot path."""
        if store_timestamp_ms < self.max_timestamp_ms:
            store_timestamp_ms = self.max_timestamp_ms
        else:
            self.max_timestamp_ms = store_timestamp_ms
        if self.first_position == _NOWHERE:
            self.first_position = position
        body = _BODY.pack(base_offset, position, length, record_count, store_timestamp_ms, tag_mask)
        self.tail += body + _CRC.pack(crc32(body))

    @property
    def is_long(self) -> bool:
        """Whether the tail should be in a file by now, and may."""
        return len(self.tail) > TAIL_BYTES_MAX and not self.is_spilling

    def spill(self) -> None:
        """Move the tail to a file. Raises `OSError`; then it stays where it is."""
        self.shelf.write(self.folder, self.filed, bytes(self.tail))
        self.filed = self.end
        self.tail.clear()

    def trim(self, log_start: int) -> None:
        """Forget the batches before this position of the log; the queue's first offset moves. Raises `DamageError`."""
        if self.first_position >= log_start or self.is_spilling:
            return
        first = self._find(lambda entry: entry.position >= log_start)
        self._begin_with(first)
        if self.shelf.next_file(self.first) <= first:
            self.shelf.forget(self.folder)
        self.first = first
        if first > self.filed:
            del self.tail[: (first - self.filed) * ENTRY_BYTES]
            self.filed = first
        self.synced = max(self.synced, first)
        self._hints = None

    def _begin_with(self, first: int) -> None:
        """The entry with this number is the queue's first from now on."""
        if first == self.end:
            self.first_position = _NOWHERE
            self.queue.min_offset = self.queue.next_offset
        else:
            entry = self.entry(first)
            self.first_position, self.queue.min_offset = entry.position, entry.base_offset

    def replace(self, made: ConsumeQueue, end: int) -> None:
        """Take the entries that were made from the log in place of those before number `end`; they get new numbers and files.

        Nothing may have been spilled or trimmed since `end` was the end: see `is_spilling`.
        """
        self.shelf.forget(self.folder)
        newer = self.tail[max(end - self.filed, 0) * ENTRY_BYTES :]
        self.first = self.synced = self.filed = self.shelf.next_file(self.end)
        self.tail = made.tail + newer
        self.max_timestamp_ms = max(self.max_timestamp_ms, made.max_timestamp_ms)
        self.saved_next_offset = -1
        self._hints = None
        self._begin_with(self.first)

    # --- reading ------------------------------------------------------------------------------------------------------

    def entry(self, number: int) -> QueueEntry:
        """The entry with this number, `first <= number < end`. Raises `DamageError`."""
        if number >= self.filed:
            return QueueEntry._make(_ENTRY.unpack_from(self.tail, (number - self.filed) * ENTRY_BYTES))
        return _checked(QueueEntry._make(_ENTRY.unpack(self.shelf.read(self.folder, number, 1))))

    def entries(self, number: int) -> Iterator[QueueEntry]:
        """The entries from this number on. Nothing may be added meanwhile. Raises `DamageError`."""
        while number < self.filed:
            block = self.shelf.read(self.folder, number, min(self.filed - number, BLOCK_ENTRIES))
            yield from map(_checked, map(QueueEntry._make, _ENTRY.iter_unpack(block)))
            number += len(block) // ENTRY_BYTES
        while number < self.end:
            at = (number - self.filed) * ENTRY_BYTES
            block = bytes(self.tail[at : at + BLOCK_ENTRIES * ENTRY_BYTES])
            yield from map(QueueEntry._make, _ENTRY.iter_unpack(block))
            number += len(block) // ENTRY_BYTES

    def find_offset(self, offset: int) -> int:
        """Number of the entry with this offset; of the one before it where damage left a hole, `first - 1` if there is none.

        Quick where `remember` was told that a reader would ask. Raises `DamageError`.
        """
        hint = self._hints.get(offset) if self._hints else None
        if hint is not None and self.first <= hint < self.end:
            return hint
        return self._find(lambda entry: entry.base_offset > offset) - 1

    def find_time(self, timestamp_ms: int) -> int:
        """Number of the first entry stored at or after this time, `end` if there is none. Raises `DamageError`."""
        return self._find(lambda entry: entry.store_timestamp_ms >= timestamp_ms)

    def _find(self, is_behind: Callable[[QueueEntry], bool]) -> int:
        """Number of the first entry it holds for, `end` if there is none; it holds for all behind that too.

        By halves, the last few of which are read at once. Raises `DamageError`.
        """
        low, high = self.first, self.end
        while high - low > BLOCK_ENTRIES:
            middle = (low + high) // 2
            low, high = (low, middle) if is_behind(self.entry(middle)) else (middle + 1, high)
        packed = self._packed(low, high)

        def is_behind_at(index: int) -> bool:
            return is_behind(_checked(QueueEntry._make(_ENTRY.unpack_from(packed, index * ENTRY_BYTES))))

        return low + bisect_left(range(high - low), True, key=is_behind_at)

    def _packed(self, number: int, end: int) -> bytes:
        """The entries from `number` up to `end`, as they are stored. Raises `DamageError`."""
        blocks = []
        while number < min(end, self.filed):
            blocks.append(self.shelf.read(self.folder, number, min(end, self.filed) - number))
            number += len(blocks[-1]) // ENTRY_BYTES
        if number < end:
            blocks.append(bytes(self.tail[(number - self.filed) * ENTRY_BYTES : (end - self.filed) * ENTRY_BYTES]))
        return b"".join(blocks)

    def number_at(self, position: int) -> int:
        """Number of the first entry, of those in memory, that is at or behind this position of the log."""
        number = self.end
        while number > self.filed and self.entry(number - 1).position >= position:
            number -= 1
        return number

    def remember(self, offset: int, number: int, asked_offset: int) -> None:
        """A reader that asked for `asked_offset` goes on at `offset`, which entry `number` has or will have."""
        hints = self._hints
        if hints is None:
            hints = self._hints = {}
        hints.pop(asked_offset, None)
        hints[offset] = number
        if len(hints) > HINTS_MAX:
            del hints[next(iter(hints))]

    # --- saving -------------------------------------------------------------------------------------------------------

    @property
    def is_saved(self) -> bool:
        """Whether views.db has the queue as it is, and files that the queue has done with are removed."""
        is_clean = self.shelf.next_file(self.cleaned) > self.first
        return is_clean and self.saved_next_offset == self.queue.next_offset and self.saved_min_offset == self.queue.min_offset

    def begin_save(self) -> QueueSave:
        """What has to be written for the queue to be on disk as it is now; `finish_save` belongs to it."""
        spill = bytes(self.tail) if len(self.tail) > self.shelf.row_tail_bytes_max else b""
        self.is_spilling = bool(spill)
        return QueueSave(self, spill)

    def finish_save(self, save: QueueSave, is_done: bool) -> None:
        """The save is on disk, or it failed and nothing has changed."""
        self.is_spilling = False
        if is_done:
            del self.tail[: len(save.spill)]
            self.filed += len(save.spill) // ENTRY_BYTES
            self.synced = max(self.synced, save.row.filed)
            self.cleaned = save.cleaned
            self.saved_min_offset, self.saved_next_offset = save.row.min_offset, save.row.next_offset

    def restore(self, row: QueueRow) -> None:
        """Become what was saved."""
        self.first, self.filed, self.synced = row.first, row.filed, row.filed
        self.tail = bytearray(row.tail)
        self.first_position, self.max_timestamp_ms = row.first_position, row.max_timestamp_ms
        self.saved_min_offset, self.saved_next_offset = row.min_offset, row.next_offset

    def has_files(self) -> bool:
        """Whether the files that should have entries are there."""
        return self.first >= self.filed or self.shelf.has(self.folder, self.first, self.filed)


class QueueSave:
    """One queue's part of a checkpoint: its row, and what goes to its files before the row may be saved."""

    __slots__ = ("_synced", "cleaned", "index", "row", "spill", "spill_at")

    def __init__(self, index: ConsumeQueue, spill: bytes) -> None:
        queue = index.queue
        self.index = index
        self.spill = spill
        self.spill_at = index.filed
        self.cleaned = index.cleaned
        self.row = QueueRow(
            queue.topic.topic_id, queue.queue_id, queue.min_offset, queue.next_offset, index.first,
            index.filed + len(spill) // ENTRY_BYTES, index.first_position, index.max_timestamp_ms,
            b"" if spill else bytes(index.tail),
        )
        self._synced = index.synced

    def write(self) -> None:
        """What goes to files, into the page cache. Any thread. Raises `OSError`."""
        if self.spill:
            self.index.shelf.write(self.index.folder, self.spill_at, self.spill)

    def sync(self) -> None:
        """The files, to the disk. Any thread. Raises as `Shelf.sync` does."""
        if self._synced < self.row.filed:
            self.index.shelf.sync(self.index.folder, self._synced, self.row.filed)

    def clean(self) -> None:
        """Remove files that the row, which is saved by now, does not speak of. Any thread. Raises `OSError`."""
        shelf = self.index.shelf
        if shelf.next_file(self.cleaned) <= self.row.first:
            shelf.remove_below(self.index.folder, self.row.first)
            self.cleaned = self.row.first


def _checked(entry: QueueEntry) -> QueueEntry:
    if crc32(_BODY.pack(*entry[:-1])) != entry.crc:
        raise DamageError("An entry of a queue file does not check out.", position=entry.position)
    return entry
