"""The commit log: one sequence of entries for all queues of a broker, in segments of fixed length.

A position is a byte's place in the log, counted over all segments from the first one ever written; it never goes back.

    flushed_position <= written_position <= appended_position
         on disk          in the page cache      in memory, until `write`

Each turn of the loop appends any number of entries and writes them by one `pwritev`; each flush is one `fdatasync`, of whatever
was written by then. Positions move in this order and entries are acknowledged by them.

Segments have their full length from the start: `allocate`d, zero-filled, or recycled, so that a flush writes no metadata and the
disk cannot be full half-way through one. The files for the next ones lie ready as *spares*, made by the maintenance job. A
roll takes a spare, writes the header over its beginning and renames it; the flush that follows syncs the old segment, the new one
and the folder, in this order, before an entry in the new segment counts as flushed. A power cut in between leaves a segment that
was never part of the log, and recovery removes it.
"""

from __future__ import annotations

import errno
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

from zrmq.errors import DiskFullError, FolderUnusableError
from zrmq.files import FULL, NO_DESCRIPTOR, Buffer, Files, OpenFile, OpenFolder, fill_zeros, read_fully, write_fully
from zrmq.logs import get_logger
from zrmq.protocol.batch import KIND_SEGMENT_END, encode_entry
from zrmq.store.job import Job
from zrmq.store.open_files import OpenFiles
from zrmq.store.segment import (
    SEGMENT_END_BYTES,
    SEGMENT_FORMAT_VERSION,
    SEGMENT_HEADER_BYTES,
    UNREADABLE,
    Found,
    Read,
    Segment,
    encode_segment_header,
    read_or_zeros,
    scan,
    segment_name,
    segment_version,
    start_of,
)

log = get_logger("store")

EPOCH = 0  # of entries written by a broker without replicas

_SPARE = re.compile(r"spare-(\d+)\Z")


class NoDescriptorError(DiskFullError):
    """The log needs a file, and this process may open no more: for clients like a full disk, but no segment has to go for it."""


class CommitLog:
    """Loop thread only, but for the `run` of its jobs. Recovery gives it its positions before anything is appended."""

    def __init__(self, files: Files, folder: Path, segment_bytes: int, open_files: OpenFiles) -> None:
        self.files = files
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.segments: list[Segment] = []
        self.unreadable: list[tuple[int, int]] = []  # stretches that the disk has not given to `load` and `scan`
        self.spares: list[Path] = []
        self.is_refused = False  # the disk had no room for the next segment, whatever it said before
        self.is_room_kept = False  # a segment went so that the views can be saved: the next one is not to take its room
        self.appended_position = 0
        self.written_position = 0
        self.flushed_position = 0
        self.began_position = 0  # what is behind was appended since the log was opened
        self.limit = 0  # entries end at or before it, or else in the next segment
        self.active: Segment | None = None
        self.pending: list[Buffer] = []  # appended and not written
        self._open_files = open_files
        self._open_folder: OpenFolder | None = None  # from `load` on: a roll may take the last descriptor, and its flush needs it
        self._unsynced: list[Segment] = []  # written to since the last flush began, oldest first
        self._is_folder_unsynced = False
        self._spare_number = 0

    # --- opening ------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Find the segments and spares that are there. Raises `FolderUnusableError` for a newer format or what is no segment in
        the place of one, `OSError`."""
        self._open_folder = self.files.open_folder(self.folder)
        names = self.files.listdir(self.folder)
        starts = sorted(start for start in map(start_of, names) if start is not None)
        self.segments = [self._load_segment(start, following) for start, following in zip_longest(starts, starts[1:])]
        for before, segment in pairwise(self.segments):
            if segment.start < before.end:
                self._shorten(before, segment)
        for name in names:
            match = _SPARE.match(name)
            if match:
                self._spare_number = max(self._spare_number, int(match.group(1)))
                self._load_spare(self.folder / name)

    def _load_segment(self, start: int, following: int | None) -> Segment:
        path = self.folder / segment_name(start)
        failed: list[tuple[int, int]] = []
        try:
            size = self.files.size(path)
            version = segment_version(read_or_zeros(self._open_files.get(path), SEGMENT_HEADER_BYTES, 0, failed), start)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            log.error("segment_not_opened", path=str(path), reason=str(error))  # it costs what is in it, if nobody scans there
            size, version = (following or start + self.segment_bytes) - start, SEGMENT_FORMAT_VERSION
            failed.append((0, size))
        self.unreadable += _within_log(failed, start)
        if version is not None and version > SEGMENT_FORMAT_VERSION:
            raise FolderUnusableError(
                f"{path} was written by a newer zrmq (format {version}, this one reads up to {SEGMENT_FORMAT_VERSION}); upgrade.",
                folder=str(self.folder.parent), format_version=version,
            )
        return Segment(path, start, start + size, is_header_whole=version is not None)

    def _shorten(self, before: Segment, segment: Segment) -> None:
        """A file reaches into the next one, which says itself where it begins: what is too much there is not of the log."""
        if not segment.is_header_whole or (segment.start, segment.end) in self.unreadable:
            raise FolderUnusableError(
                f"{segment.path} is no segment of the log, and its name says that it lies within {before.path}. One of the two"
                " does not belong there; move it to another folder and start again.",
                folder=str(self.folder.parent),
            )
        log.warning("segment_too_long", path=str(before.path), end_position=before.end, next_position=segment.start)
        before.end = segment.start

    def _load_spare(self, path: Path) -> None:
        if self.files.size(path) == self.segment_bytes:
            self.spares.append(path)
        else:
            self.files.unlink(path)

    def begin_at(self, position: int) -> None:
        """Append from here on: everything before is on disk, everything behind is not part of the log."""
        self.appended_position = self.written_position = self.flushed_position = self.began_position = position
        self.active = None
        self.limit = 0
        segment = self.segment_at(position)
        if segment is not None and segment is self.segments[-1] and segment.start < position:
            segment.file = self.files.open(segment.path)
            self.active = segment
            self.limit = segment.end - SEGMENT_END_BYTES

    def remove_behind(self, position: int) -> None:
        """Remove segments that begin at `position` or behind it, and all spares, which may have been such segments once."""
        while self.segments and self.segments[-1].start >= position:
            self._unlink(self.segments.pop().path)
        while self.spares:
            self._unlink(self.spares.pop())
        self.files.fsync_dir(self.folder)

    def erase(self, position: int, end: int) -> None:
        """Overwrite with zeros, so that what was cut off cannot come back as a part of the log."""
        segment = self.segment_at(position)
        if segment is None or end <= position:
            return
        file = self.files.open(segment.path)
        try:
            fill_zeros(file, position - segment.start, min(end, segment.end) - segment.start)
            file.fdatasync()
        finally:
            file.close()

    def rewrite(self, position: int, end: int) -> None:
        """Write once more what can be read, and sync it: a flush that failed may have left it in the page cache only. So with the
        length of the file: once the log goes on behind a file that is shorter, what that one lacks counts as missing."""
        for segment in self.segments:
            start, stop = max(position, segment.start), min(end, segment.end)
            if start >= stop:
                continue
            file = self.files.open(segment.path)
            try:
                for at in range(start, stop, 1 << 20):
                    part = read_fully(file, min(1 << 20, stop - at), at - segment.start)
                    write_fully(file, [part], at - segment.start)
                if stop < segment.end:
                    write_fully(file, [b"\0"], segment.end - segment.start - 1)
                file.fdatasync()
            finally:
                file.close()

    # --- appending ----------------------------------------------------------------------------------------------------

    @property
    def entry_bytes_max(self) -> int:
        """The longest entry that fits a segment."""
        return self.segment_bytes - SEGMENT_HEADER_BYTES - SEGMENT_END_BYTES

    def append(self, entry: bytes) -> int:
        """Add one entry that was stamped with `appended_position`; returns where it ends. It has to fit: see `limit`."""
        self.pending.append(entry)
        self.appended_position += len(entry)
        assert self.appended_position <= self.limit
        return self.appended_position

    def append_parts(self, header: bytes, rest: memoryview, size: int) -> None:
        """The same for an entry in two parts, `size` bytes together. On the hot path."""
        self.pending += (header, rest)
        self.appended_position += size

    def note_batch(self, topic_id: int, store_timestamp_ms: int, size: int) -> None:
        """A batch of this topic was appended."""
        assert self.active is not None
        self.active.note_batch(topic_id, store_timestamp_ms, size)

    def note_event(self, store_timestamp_ms: int) -> None:
        """An event was appended."""
        assert self.active is not None
        self.active.note_event(store_timestamp_ms)

    def write(self) -> None:
        """Hand everything appended to the system, by one call. Raises `OSError`: then nobody knows what was written."""
        if not self.pending:
            return
        segment = self.active
        assert segment is not None
        assert segment.file is not None
        buffers, self.pending = self.pending, []
        if not self._unsynced or self._unsynced[-1] is not segment:
            self._unsynced.append(segment)
        write_fully(segment.file, buffers, self.written_position - segment.start)
        self.written_position = self.appended_position

    def roll(self, now_ms: int, reserve_bytes: int) -> None:
        """Go on in a new segment; `reserve_bytes` have to stay free when a file must be made for it.

        Raises `DiskFullError` before anything changed, also when no file can be opened. `OSError` from writing the end of the old
        segment.
        """
        old = self.active
        segment = self._make_segment(self.appended_position if old is None else old.end, reserve_bytes)
        if old is not None and old.end - self.appended_position >= SEGMENT_END_BYTES:
            self.limit = old.end
            self.append(
                encode_entry(
                    KIND_SEGMENT_END, b"", epoch=EPOCH, position=self.appended_position, flushed_position=self.flushed_position,
                    store_timestamp_ms=now_ms,
                )
            )
        try:
            self.write()
        except OSError:
            if segment.file is not None:
                segment.file.close()
            raise
        self.segments.append(segment)
        self.active = segment
        self.appended_position = self.written_position = segment.start + SEGMENT_HEADER_BYTES
        self.limit = segment.end - SEGMENT_END_BYTES
        self._unsynced.append(segment)
        self._is_folder_unsynced = True
        log.info("segment_rolled", position=segment.start, segment_bytes=self.segment_bytes)

    def _make_segment(self, start: int, reserve_bytes: int) -> Segment:
        path = self.folder / segment_name(start)
        try:
            if not self.spares:
                self.spares.append(self._make_spare_now(reserve_bytes))  # there for the next attempt if this one fails
            spare = self.spares[-1]
            file = self.files.open(spare)
            try:
                write_fully(file, [encode_segment_header(start, self.segment_bytes)], 0)
                self.files.rename(spare, path)
            except OSError:
                file.close()
                raise
        except OSError as error:
            if error.errno in FULL:
                self.is_refused = True
                raise self._full(0, reserve_bytes) from error
            if error.errno in NO_DESCRIPTOR:
                raise NoDescriptorError(
                    f"This process may open no more files, and the log in {self.folder} needs one. Raise its limit (ulimit -n)"
                    " or let fewer clients connect; sending works again by itself.",
                    folder=str(self.folder),
                ) from error
            raise
        self.spares.pop()
        self.is_refused = False
        segment = Segment(path, start, start + self.segment_bytes)
        segment.file = file
        return segment

    def _make_spare_now(self, reserve_bytes: int) -> Path:
        free_bytes = self.files.free_bytes(self.folder)
        if free_bytes < self.segment_bytes + reserve_bytes or self.is_room_kept:
            raise self._full(free_bytes, reserve_bytes)
        path = self.next_spare()
        file = self.files.open(path, create=True)
        try:
            file.allocate(self.segment_bytes)
        except OSError:
            self.files.unlink(path)
            raise
        finally:
            file.close()
        return path

    def _full(self, free_bytes: int, reserve_bytes: int) -> DiskFullError:
        return DiskFullError(
            f"The disk of {self.folder.parent} has {free_bytes} bytes left; the log's next segment needs {self.segment_bytes}"
            f" and {reserve_bytes} stay free. Free some space or lower retention_ms; sending works again by itself.",
            free_bytes=free_bytes, needed_bytes=self.segment_bytes + reserve_bytes, folder=str(self.folder.parent),
        )

    def next_spare(self) -> Path:
        """A name for a new spare; it enters `spares` when its file is ready, its name synced."""
        self._spare_number += 1
        return self.folder / f"spare-{self._spare_number}"

    # --- flushing -----------------------------------------------------------------------------------------------------

    def begin_flush(self, on_finished: Callable[[LogFlush], None]) -> LogFlush:
        """A job that syncs everything written so far and then calls `on_finished`, on the loop's thread. One at a time."""
        assert self._open_folder is not None
        folder = self._open_folder if self._is_folder_unsynced else None
        flush = LogFlush(self.written_position, self._unsynced, folder, on_finished)
        self._unsynced = []
        self._is_folder_unsynced = False
        return flush

    def finish_flush(self, flush: LogFlush) -> None:
        """The job has run without error: what it covers is on disk."""
        self.flushed_position = flush.position
        for segment in flush.segments:
            if segment is not self.active and segment not in self._unsynced and segment.file is not None:
                segment.file.close()
                segment.file = None

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def start(self) -> int:
        """Position of the first byte that is still there."""
        return self.segments[0].start if self.segments else self.appended_position

    @property
    def size_bytes(self) -> int:
        """Room that segments and spares take on the disk."""
        return sum(segment.end - segment.start for segment in self.segments) + len(self.spares) * self.segment_bytes

    def segment_at(self, position: int) -> Segment | None:
        """The segment with the byte at `position`, None where there is none."""
        index = bisect_right(self.segments, position, key=_start) - 1
        if index < 0 or position >= self.segments[index].end:
            return None
        return self.segments[index]

    def read(self, position: int, size: int) -> bytes:
        """Bytes of one segment; fewer where it ends, none where its file is gone or out of reach, zeros where the disk fails.

        Raises `OSError` where the system refuses.
        """
        segment = self.segment_at(position)
        if segment is None:
            return b""
        try:
            file = segment.file or self._open_files.get(segment.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *UNREADABLE):
                raise
            return b""
        return read_or_zeros(file, min(size, segment.end - position), position - segment.start)

    def scan(self, position: int) -> Iterator[Found]:
        """All entries from `position` on, with the stretches that are none."""
        return scan_segments(self.files, self.segments, position, unreadable=self.unreadable)

    # --- the front ----------------------------------------------------------------------------------------------------

    def take_before(self, position: int) -> list[Segment]:
        """Take segments that end at or before `position` out of the log: retention had done so, and a crash brought them back.

        Their files are the caller's to remove, once it is known that this is the log from which they were deleted."""
        taken = []
        while len(self.segments) > 1 and self.segments[0].end <= position:
            taken.append(self.take_front())
        return taken

    def take_front(self) -> Segment:
        """Take the oldest segment out of the log. Its file is the caller's, to remove or to recycle."""
        segment = self.segments.pop(0)
        self._open_files.forget(segment.path)
        if segment.file is not None:
            segment.file.close()
            segment.file = None
        return segment

    def close(self) -> None:
        """Close the files and the folder; nothing is written."""
        if self._open_folder is not None:
            self._open_folder.close()
            self._open_folder = None
        for segment in self.segments:
            if segment.file is not None:
                segment.file.close()
                segment.file = None

    def _unlink(self, path: Path) -> None:
        self._open_files.forget(path)
        self.files.unlink(path)


class LogFlush(Job):
    """One group commit. Opens nothing: an error is one of the disk, and there is no trying again."""

    def __init__(
        self, position: int, segments: list[Segment], folder: OpenFolder | None, on_finished: Callable[[LogFlush], None]
    ) -> None:
        self.position = position
        self.segments = segments
        self._files = [segment.file for segment in segments if segment.file is not None]
        self._folder = folder  # with new names in it, or None
        self._on_finished = on_finished

    def work(self) -> None:
        for file in self._files:
            file.fdatasync()
        if self._folder is not None:
            self._folder.fsync()

    def finish(self) -> None:
        self._on_finished(self)


def scan_segments(
    files: Files, segments: Sequence[Segment], position: int, end: int | None = None,
    unreadable: list[tuple[int, int]] | None = None,
) -> Iterator[Found]:
    """All entries in these segments from `position` up to `end`, with the stretches that are none. Any thread.

    Opens the files by itself; sectors that cannot be read count as damaged, and are added to `unreadable`. Raises `OSError` where
    a file cannot be opened: who scans makes something of all that is there, and can try again.
    """
    unreadable = [] if unreadable is None else unreadable
    for segment in segments:
        stop = segment.end if end is None else min(segment.end, end)
        if stop <= position:
            continue
        if position < segment.start:
            yield _nothing(position, segment.start)
        if position < segment.start + SEGMENT_HEADER_BYTES:
            if not segment.is_header_whole:
                yield _nothing(segment.start, min(segment.start + SEGMENT_HEADER_BYTES, stop))
            position = segment.start + SEGMENT_HEADER_BYTES
        file = files.open(segment.path)
        try:
            yield from scan(_reading(file, segment, unreadable), position, stop)
        finally:
            file.close()
        position = max(position, stop)


def _reading(file: OpenFile, segment: Segment, unreadable: list[tuple[int, int]]) -> Read:
    def read(position: int, size: int) -> bytes:
        failed: list[tuple[int, int]] = []
        content = read_or_zeros(file, size, position - segment.start, failed)
        unreadable.extend(_within_log(failed, segment.start))
        return content

    return read


def _within_log(stretches: list[tuple[int, int]], start: int) -> list[tuple[int, int]]:
    return [(start + position, start + end) for position, end in stretches]


def _start(segment: Segment) -> int:
    return segment.start


def _nothing(position: int, end: int) -> Found:
    return Found(position, end, None, b"", 0, False)
