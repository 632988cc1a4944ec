"""Segments: the files the log consists of, and how their entries are found again, damaged or not.

A segment is named by the position of its first byte in the log, 20 digits. It begins with 64 bytes, little-endian:

    offset size  field
    ------ ----  --------------------
         0    8  magic "ZRMQ-LOG"
         8    4  format version
        12    4  zero
        16    8  start position         the one in the file's name
        24    8  length of the file
        32   28  zero
        60    4  crc                    CRC-32 of 0..60

Entries follow without a gap (see protocol/batch.py), none across two segments; an entry of kind 3 ends a segment. What lies
behind the last entry is zeros, or what a recycled file had there before: entries that carry other positions and so never check
out. That is also what finds the way again behind damage: an entry is where its position says it is.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from zrmq.files import OpenFile, read_fully
from zrmq.protocol.batch import (
    ASSIGNED_AT,
    BATCH_HEADER_BYTES,
    ENTRY_HEADER_BYTES,
    FORMAT_VERSION,
    KIND_BATCH,
    KIND_SEGMENT_END,
    MAGIC,
    PRODUCED_AT,
    START_BYTES,
    BatchHeader,
    EntryHeader,
    peek_batch,
    peek_entry,
)
from zrmq.protocol.limits import BATCH_BYTES_MAX

SEGMENT_FORMAT_VERSION = 1
SEGMENT_HEADER_BYTES = 64
SEGMENT_END_BYTES = ENTRY_HEADER_BYTES
ENTRY_BYTES_MAX = BATCH_BYTES_MAX  # events stay far below; a length beyond it is damage
SCAN_BYTES = 1 << 20  # read at once when entries are read one after the other

_SEGMENT_MAGIC = b"ZRMQ-LOG"
_HEADER = struct.Struct("<8sIIQQ28xI")
_CRC_AT = _HEADER.size - 4
VERSION_AT = len(MAGIC)
KIND_AT = 3
_MARK = MAGIC + bytes([FORMAT_VERSION])
_POSITION = struct.Struct("<Q")
_POSITION_AT = ASSIGNED_AT + 4
_BLOCK_BYTES = 4096  # what a disk, or the page cache above it, fails to read at once
UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))  # the latter two: a file system's own checksums
_NAME = re.compile(r"(\d{20})\.log\Z")

assert _HEADER.size == SEGMENT_HEADER_BYTES

Read = Callable[[int, int], bytes]  # position in the log, size; fewer bytes at the end of the file


class Share:
    """What one topic has in one segment: when its newest batch was stored, and how many bytes. For retention."""

    __slots__ = ("last_ms", "size_bytes")

    def __init__(self, last_ms: int, size_bytes: int) -> None:
        self.last_ms = last_ms
        self.size_bytes = size_bytes


class Segment:
    """One segment as the running store knows it."""

    __slots__ = ("corrections", "end", "file", "is_header_whole", "last_ms", "path", "saved", "scrubbed_ms", "shares", "start")

    def __init__(self, path: Path, start: int, end: int, is_header_whole: bool = True) -> None:
        self.path = path
        self.start = start
        self.end = end  # of the file, as a position in the log
        self.is_header_whole = is_header_whole
        self.file: OpenFile | None = None  # while it is written to, and until that is flushed
        self.shares: dict[int, Share] = {}  # by topic id
        self.last_ms = 0  # store timestamp of the newest entry
        self.corrections = 0  # of stamps, be they those of shares alone, since the log was opened
        self.scrubbed_ms = 0  # when its checksums were last looked at
        self.saved = (0, 0)  # what views.db has of the last two; of the others it has all when it has the segment's end

    def note_batch(self, topic_id: int, store_timestamp_ms: int, size_bytes: int) -> None:
        """A batch was appended. On the hot path."""
        share = self.shares.get(topic_id)
        if share is None:
            self.shares[topic_id] = Share(store_timestamp_ms, size_bytes)
        else:
            share.size_bytes += size_bytes
            if store_timestamp_ms > share.last_ms:
                share.last_ms = store_timestamp_ms
        if store_timestamp_ms > self.last_ms:
            self.last_ms = store_timestamp_ms

    def rejuvenate(self, first_ms: int, last_ms: int, late_ms: int) -> None:
        """What was stored from `first_ms` to `last_ms`, by a clock `late_ms` late, is younger than its stamps say."""
        if first_ms <= self.last_ms <= last_ms:
            self.last_ms += late_ms
            self.corrections += 1
        for share in self.shares.values():
            if first_ms <= share.last_ms <= last_ms:
                share.last_ms += late_ms
                self.corrections += 1

    def note_event(self, store_timestamp_ms: int) -> None:
        """An event was appended."""
        if store_timestamp_ms > self.last_ms:
            self.last_ms = store_timestamp_ms


def segment_name(start: int) -> str:
    """The file name of the segment that begins at this position."""
    return f"{start:020d}.log"


def start_of(name: str) -> int | None:
    """The start position in a segment's file name, None for the name of something else."""
    match = _NAME.match(name)
    return int(match.group(1)) if match else None


def encode_segment_header(start: int, size_bytes: int) -> bytes:
    """The first 64 bytes of a segment's file."""
    header = _HEADER.pack(_SEGMENT_MAGIC, SEGMENT_FORMAT_VERSION, 0, start, size_bytes, 0)
    return header[:_CRC_AT] + crc32(header[:_CRC_AT]).to_bytes(4, "little")


def segment_version(header: bytes, start: int) -> int | None:
    """The format version in a segment's header; None if it is not the header of the segment that begins at `start`."""
    if len(header) < SEGMENT_HEADER_BYTES:
        return None
    magic, version, _, said_start, _, crc = _HEADER.unpack_from(header)
    if magic != _SEGMENT_MAGIC or crc != crc32(header[:_CRC_AT]) or said_start != start:
        return None
    return int(version)


# --- finding entries --------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A stretch of the log: one entry, or bytes that are none."""

    position: int
    end: int
    header: EntryHeader | BatchHeader | None  # None: no entry; its place may have held one or many
    block: bytes  # has the entry at `at`
    at: int
    is_whole: bool  # False with a header: a batch whose header checks out and whose records do not


def scan(read: Read, position: int, end: int) -> Iterator[Found]:
    """All entries of one segment from `position` on, with what lies between them where they do not follow each other.

    Ends behind the segment's end entry. Bytes behind the last entry come as one stretch without a header.
    """
    reader = EntryReader(read, end)
    while end - position >= ENTRY_HEADER_BYTES:
        found = reader.entry(position) or reader.gap(position)
        yield found
        if found.header is not None and found.header.kind == KIND_SEGMENT_END:
            return
        position = found.end


class EntryReader:
    """Reads entries of one segment, in large blocks. A restart reads up to a few hundred thousand: `entry` is a hot path."""

    def __init__(self, read: Read, end: int) -> None:
        self._read = read
        self._end = end
        self._block = b""
        self._view = memoryview(b"")
        self._base = 0

    def entry(self, position: int) -> Found | None:
        """The entry at `position`; None if there is none whose header checks out."""
        at = position - self._base
        if at < 0 or at + BATCH_HEADER_BYTES > len(self._block):
            at = self._load(position, SCAN_BYTES)
        header = peek_header(self._block, at)
        if header is None or header.position != position or header.length > min(self._end - position, ENTRY_BYTES_MAX):
            return None
        if at + header.length > len(self._block):
            at = self._load(position, max(SCAN_BYTES, header.length))
        start_crc = crc32(self._view[at : at + START_BYTES])
        if type(header) is BatchHeader:
            if crc32(self._view[at + ASSIGNED_AT : at + BATCH_HEADER_BYTES], start_crc) != header.entry_crc:
                return None
            is_whole = crc32(self._view[at + PRODUCED_AT : at + header.length], start_crc) == header.crc
            return Found(position, position + header.length, header, self._block, at, is_whole)
        if crc32(self._view[at + ASSIGNED_AT : at + header.length], start_crc) != header.entry_crc:
            return None
        return Found(position, position + header.length, header, self._block, at, True)

    def gap(self, position: int) -> Found:
        """The bytes from `position`, where there is no entry, to the next one, also of a newer version, or to the end."""
        after = position + 1
        while self._end - after >= ENTRY_HEADER_BYTES:
            block = self._read(after, min(SCAN_BYTES, self._end - after))
            for at in _marks(block):
                if self._claims(block, after, at) and (self.entry(after + at) or newer_version(self._read, after + at)):
                    return Found(position, after + at, None, b"", 0, False)
            if len(block) < len(MAGIC):
                break
            after += len(block) - len(MAGIC) + 1
        return Found(position, self._end, None, b"", 0, False)

    def _claims(self, block: bytes, base: int, at: int) -> bool:
        """Whether what looks like an entry says it is where it is: a quick look, for recycled files are full of such."""
        if at + _POSITION_AT + _POSITION.size > len(block):
            return True
        return bool(_POSITION.unpack_from(block, at + _POSITION_AT)[0] == base + at)

    def _load(self, position: int, size: int) -> int:
        self._block = self._read(position, min(size, self._end - position))
        self._view = memoryview(self._block)
        self._base = position
        return 0


def _marks(block: bytes) -> Iterator[int]:
    at = block.find(MAGIC)
    while at >= 0:
        yield at
        at = block.find(MAGIC, at + 1)


def peek_header(block: bytes, at: int) -> EntryHeader | BatchHeader | None:
    """The header at `at`, of a batch or another entry, its CRC unchecked; None if there is none."""
    if len(block) - at >= BATCH_HEADER_BYTES and block[at + KIND_AT] == KIND_BATCH:
        batch = peek_batch(block, at)
        return batch if block.startswith(_MARK, at) and batch.length >= BATCH_HEADER_BYTES else None
    entry = peek_entry(block, at)
    return entry if entry is not None and entry.kind != KIND_BATCH else None


def newer_version(read: Read, position: int) -> int | None:
    """The format version of the entry at `position` if it is one that this code does not know; None for anything else.

    Entries of all versions have the same first 40 bytes, and their CRC tells such an entry from one whose version byte rotted.
    """
    start = read(position, ENTRY_HEADER_BYTES)
    header = peek_entry(start[:VERSION_AT] + bytes([FORMAT_VERSION]) + start[KIND_AT:])
    if header is None or start[VERSION_AT] <= FORMAT_VERSION or header.position != position or header.length > ENTRY_BYTES_MAX:
        return None
    entry = read(position, header.length)
    crc = crc32(entry[ASSIGNED_AT : BATCH_HEADER_BYTES if header.kind == KIND_BATCH else None], crc32(entry[:START_BYTES]))
    return start[VERSION_AT] if crc == header.entry_crc else None


def read_or_zeros(file: OpenFile, size: int, position: int, failed: list[tuple[int, int]] | None = None) -> bytes:
    """What can be read: blocks that the disk cannot give come as zeros, which check out as nothing. Raises other `OSError`s.

    Stretches (position, end) of the file that came so are added to `failed`."""
    try:
        return read_fully(file, size, position)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        end = position + size
        if position // _BLOCK_BYTES == (end - 1) // _BLOCK_BYTES:
            if failed is not None:
                failed.append((position, end))
            return bytes(size)
        starts = [position, *range(position - position % _BLOCK_BYTES + _BLOCK_BYTES, end, _BLOCK_BYTES)]
        return b"".join(read_or_zeros(file, stop - start, start, failed) for start, stop in pairwise([*starts, end]))
