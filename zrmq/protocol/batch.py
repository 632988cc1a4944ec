"""Log entries and record batches: one layout for the wire, the commit log, replicas and consumers.

A producer encodes a batch once. The broker checks its CRC, writes the 48 bytes it assigns over the zeros the producer left,
and from then on those very bytes are stored, indexed, replicated and served. Little-endian throughout:

    offset size  field                 assigned by
    ------ ----  --------------------  -----------
         0    2  magic "ZR"            writer
         2    1  format version        writer
         3    1  kind                  writer      1 batch, 2 event, 3 end of segment
         4    4  length                writer      of the whole entry
         8    4  entry crc             broker      CRC-32 of 0..8 and 12..104 (batch) or 12..length (other kinds)
        12    4  epoch                 broker
        16    8  position              broker      of this entry in the log; recycled files hold old entries, this tells
        24    8  flushed position      broker      known to be on disk when this entry was appended
        32    8  store timestamp ms    broker
    ---- events and segment ends: payload from here; batches only: ----
        40    4  topic id              broker
        44    4  queue id              broker
        48    8  base offset           broker      queue offset of the first record
        56    4  crc                   producer    CRC-32 of 0..8 and 60..length: everything the broker does not assign
        60    1  codec                 producer    0 plain, 1 zlib
        61    1  flags                 producer    1 tags, 2 keys, 4 properties, 8 message groups occur
        62    2  zero                  producer
        64    8  producer id           producer    drawn at random per producer instance
        72    8  first sequence        producer    of the first record; the next ones follow
        80    4  record count          producer
        84    4  born span ms          producer    last minus first born time
        88    8  first born ms         producer
        96    8  tag mask              producer    see protocol/tags.py
       104       records               producer    MessagePack [bodies, tags, keys, properties, message groups], as columns;
                                                   a column nobody uses is nil

The entry CRC covers the position, so that bytes at the wrong place never check out; for a batch it covers the other CRC,
which covers the records, so that stamping costs no second pass over them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, repeat
from typing import Annotated, Any, NamedTuple
from zlib import crc32

import msgspec

from zrmq.errors import Code, InvalidFrameError, PayloadTooLargeError
from zrmq.message import BatchSource, Message
from zrmq.protocol import limits
from zrmq.protocol.tags import tag_mask

MAGIC = b"ZR"
FORMAT_VERSION = 1

KIND_BATCH = 1
KIND_EVENT = 2
KIND_SEGMENT_END = 3

CODEC_PLAIN = 0
CODEC_ZLIB = 1

FLAG_TAGS = 1
FLAG_KEYS = 2
FLAG_PROPERTIES = 4
FLAG_MESSAGE_GROUPS = 8

_START = struct.Struct("<2sBBI")  # magic, version, kind, length
_ASSIGNED = struct.Struct("<IQQq")  # epoch, position, flushed position, store timestamp ms
_QUEUE = struct.Struct("<IIQ")  # topic id, queue id, base offset
_CRC = struct.Struct("<I")
_PRODUCED = struct.Struct("<BBHQQIIqQ")  # codec ... tag mask
_BATCH_ASSIGNED = struct.Struct("<IQQqIIQ")  # _ASSIGNED and _QUEUE in one
_ENTRY = struct.Struct("<2sBBIIIQQq")
_BATCH = struct.Struct("<2sBBIIIQQqIIQIBBHQQIIqQ")

START_BYTES = _START.size
ENTRY_CRC_AT = START_BYTES
ASSIGNED_AT = ENTRY_CRC_AT + _CRC.size
ENTRY_HEADER_BYTES = _ENTRY.size
BATCH_CRC_AT = ENTRY_HEADER_BYTES + _QUEUE.size
PRODUCED_AT = BATCH_CRC_AT + _CRC.size
BATCH_HEADER_BYTES = _BATCH.size
_UNASSIGNED = bytes(BATCH_CRC_AT - START_BYTES)

assert (ENTRY_HEADER_BYTES, BATCH_CRC_AT, PRODUCED_AT, BATCH_HEADER_BYTES) == (40, 56, 60, 104)

Buffer = bytes | bytearray | memoryview


class EntryHeader(NamedTuple):
    """The first 40 bytes of any log entry."""

    magic: bytes
    version: int
    kind: int
    length: int
    entry_crc: int
    epoch: int
    position: int
    flushed_position: int
    store_timestamp_ms: int


class BatchHeader(NamedTuple):
    """The first 104 bytes of a batch."""

    magic: bytes
    version: int
    kind: int
    length: int
    entry_crc: int
    epoch: int
    position: int
    flushed_position: int
    store_timestamp_ms: int
    topic_id: int
    queue_id: int
    base_offset: int
    crc: int
    codec: int
    flags: int
    zero: int
    producer_id: int
    first_sequence: int
    record_count: int
    born_span_ms: int
    first_born_ms: int
    tag_mask: int

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + self.record_count - 1

    @property
    def next_offset(self) -> int:
        """Queue offset that follows the last record."""
        return self.base_offset + self.record_count


_COLUMN = msgspec.Meta(max_length=limits.BATCH_RECORDS_MAX)  # checked before anything is built of what a peer sent


class Columns(msgspec.Struct, array_like=True, gc=False):
    """The records of a batch, one list per field; None for a field that no record uses."""

    bodies: Annotated[list[bytes], _COLUMN]
    tags: Annotated[list[str | None], _COLUMN] | None = None
    keys: Annotated[list[Sequence[str]], _COLUMN] | None = None
    properties: Annotated[list[dict[str, str] | None], _COLUMN] | None = None
    message_groups: Annotated[list[str | None], _COLUMN] | None = None


_encoder = msgspec.msgpack.Encoder(enc_hook=str.__str__)  # what is a str by inheritance goes as one
_decoder = msgspec.msgpack.Decoder(Columns)


# --- producer ---------------------------------------------------------------------------------------------------------


def encode_batch(
    columns: Columns, *, producer_id: int, first_sequence: int, first_born_ms: int, last_born_ms: int, compress: bool = False
) -> bytes:
    """One batch of the records in `columns`, ready to send. `compress` packs the records with zlib where that helps.

    Raises `PayloadTooLargeError` when the result, or what it unpacks to, exceeds `limits.BATCH_BYTES_MAX`.
    """
    flags, mask = _describe(columns)
    records = _encoder.encode(columns if flags else (columns.bodies,))
    length = BATCH_HEADER_BYTES + len(records)
    if length > limits.BATCH_BYTES_MAX:
        raise PayloadTooLargeError(
            f"The batch has {length} bytes; the limit is {limits.BATCH_BYTES_MAX}. Send fewer messages at once.",
            size_bytes=length, limit_bytes=limits.BATCH_BYTES_MAX,
        )
    codec = CODEC_PLAIN
    if compress:
        packed = zlib.compress(records, 1)
        if len(packed) < len(records):
            records, codec, length = packed, CODEC_ZLIB, BATCH_HEADER_BYTES + len(packed)
    start = _START.pack(MAGIC, FORMAT_VERSION, KIND_BATCH, length)
    produced = _PRODUCED.pack(
        codec, flags, 0, producer_id, first_sequence, len(columns.bodies),
        min(max(last_born_ms - first_born_ms, 0), 0xFFFFFFFF), first_born_ms, mask,
    )
    crc = crc32(records, crc32(produced, crc32(start)))
    return b"".join((start, _UNASSIGNED, _CRC.pack(crc), produced, records))


def _describe(columns: Columns) -> tuple[int, int]:
    """Flags and tag mask of a batch."""
    flags = mask = 0
    if columns.tags is not None:
        flags |= FLAG_TAGS
        mask = tag_mask(columns.tags)
    if columns.keys is not None:
        flags |= FLAG_KEYS
    if columns.properties is not None:
        flags |= FLAG_PROPERTIES
    if columns.message_groups is not None:
        flags |= FLAG_MESSAGE_GROUPS
    return flags, mask


# --- broker -----------------------------------------------------------------------------------------------------------


def open_batch(frame: Buffer) -> BatchHeader:
    """Check one batch as it came from a producer and return its header. The records stay closed.

    Raises `InvalidFrameError` when it is not a batch, with code MESSAGE_CORRUPTED when its CRC does not match.
    """
    size = len(frame)
    if size < BATCH_HEADER_BYTES:
        raise InvalidFrameError(f"A batch needs {BATCH_HEADER_BYTES} bytes of header and got {size}.")
    header = BatchHeader._make(_BATCH.unpack_from(frame))
    if header.magic != MAGIC or header.kind != KIND_BATCH:
        raise InvalidFrameError("The payload is not a record batch (wrong magic or kind); encode it as docs/protocol.md says.")
    if header.version != FORMAT_VERSION:
        raise InvalidFrameError(
            f"The batch has format version {header.version}; this broker reads {FORMAT_VERSION}. Upgrade one of them.",
            code=Code.VERSION_UNSUPPORTED,
        )
    if header.length != size or size > limits.BATCH_BYTES_MAX:
        raise InvalidFrameError(f"The batch says it has {header.length} bytes and has {size}; at most {limits.BATCH_BYTES_MAX}.")
    if not 0 < header.record_count <= limits.BATCH_RECORDS_MAX:
        raise InvalidFrameError(f"The batch has {header.record_count} records; send 1 to {limits.BATCH_RECORDS_MAX}.")
    if header.first_sequence + header.record_count >= 1 << 63:
        raise InvalidFrameError("The batch's sequence is beyond 2^63; start a new producer id.")
    if not batch_crc_matches(frame, header.crc):
        raise InvalidFrameError(
            "The batch's CRC does not match; it was damaged on the way. Send it again.", code=Code.MESSAGE_CORRUPTED
        )
    return header


def batch_crc_matches(batch: Buffer, crc: int) -> bool:
    """Whether everything the producer wrote is unchanged."""
    view = memoryview(batch)
    return crc32(view[PRODUCED_AT:], crc32(view[:START_BYTES])) == crc


def stamp(
    frame: Buffer, *, epoch: int, position: int, flushed_position: int, store_timestamp_ms: int,
    topic_id: int, queue_id: int, base_offset: int,
) -> bytes:
    """The batch's 104-byte header with what the broker assigns; the records follow it unchanged in the log."""
    assigned = _BATCH_ASSIGNED.pack(epoch, position, flushed_position, store_timestamp_ms, topic_id, queue_id, base_offset)
    start, rest = bytes(frame[:START_BYTES]), bytes(frame[BATCH_CRC_AT:BATCH_HEADER_BYTES])
    crc = crc32(rest, crc32(assigned, crc32(start)))
    return b"".join((start, _CRC.pack(crc), assigned, rest))


def encode_entry(
    kind: int, payload: Buffer, *, epoch: int, position: int, flushed_position: int, store_timestamp_ms: int
) -> bytes:
    """A log entry that is not a batch."""
    start = _START.pack(MAGIC, FORMAT_VERSION, kind, ENTRY_HEADER_BYTES + len(payload))
    assigned = _ASSIGNED.pack(epoch, position, flushed_position, store_timestamp_ms)
    crc = crc32(payload, crc32(assigned, crc32(start)))
    return b"".join((start, _CRC.pack(crc), assigned, payload))


def peek_entry(buffer: Buffer, at: int = 0) -> EntryHeader | None:
    """The entry header at `at`, unchecked but for magic and version; None when there is none."""
    if len(buffer) - at < ENTRY_HEADER_BYTES:
        return None
    header = EntryHeader._make(_ENTRY.unpack_from(buffer, at))
    if header.magic != MAGIC or header.version != FORMAT_VERSION or header.length < ENTRY_HEADER_BYTES:
        return None
    return header


def peek_batch(buffer: Buffer, at: int = 0) -> BatchHeader:
    """The batch header at `at`, unchecked. The caller knows that at least `BATCH_HEADER_BYTES` are there."""
    return BatchHeader._make(_BATCH.unpack_from(buffer, at))


def entry_checks_out(buffer: Buffer, header: EntryHeader, at: int = 0) -> bool:
    """Whether all of the entry at `at` is there and unchanged: its header, and for a batch its records."""
    view = memoryview(buffer)[at : at + header.length]
    if len(view) < header.length:
        return False
    if header.kind != KIND_BATCH:
        return crc32(view[ASSIGNED_AT:], crc32(view[:START_BYTES])) == header.entry_crc
    if header.length < BATCH_HEADER_BYTES:
        return False
    if crc32(view[ASSIGNED_AT:BATCH_HEADER_BYTES], crc32(view[:START_BYTES])) != header.entry_crc:
        return False
    (crc,) = _CRC.unpack_from(view, BATCH_CRC_AT)
    return batch_crc_matches(view, crc)


# --- consumer ---------------------------------------------------------------------------------------------------------


def iter_batches(payload: Buffer) -> Iterator[tuple[BatchHeader, memoryview]]:
    """The batches of one frame of a pull's reply: header and whole bytes, each checked.

    Raises `InvalidFrameError` at the first that does not check out.
    """
    view, at = memoryview(payload), 0
    while at < len(view):
        entry = peek_entry(view, at)
        if entry is None or entry.kind != KIND_BATCH or not entry_checks_out(view, entry, at):
            raise InvalidFrameError(f"A received batch does not check out at byte {at}.", code=Code.MESSAGE_CORRUPTED)
        yield peek_batch(view, at), view[at : at + entry.length]
        at += entry.length


def decode_records(header: BatchHeader, batch: Buffer) -> Columns:
    """The records of one batch. Raises `InvalidFrameError` when they are not what the header says."""
    records: Buffer = memoryview(batch)[BATCH_HEADER_BYTES:]
    if header.codec == CODEC_ZLIB:
        records = _unpack(records)
    elif header.codec != CODEC_PLAIN:
        raise InvalidFrameError(f"The batch is packed with codec {header.codec}, which this version cannot read. Upgrade it.")
    try:
        columns = _decoder.decode(records)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidFrameError(f"The records of a batch cannot be read: {error}.", code=Code.MESSAGE_CORRUPTED) from error
    for column in (columns.bodies, columns.tags, columns.keys, columns.properties, columns.message_groups):
        if column is not None and len(column) != header.record_count:
            raise InvalidFrameError("A batch has another number of records than its header says.", code=Code.MESSAGE_CORRUPTED)
    return columns


def _unpack(records: Buffer) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(records, limits.RECORDS_BYTES_MAX + 1)  # one more shows that there is more
    except zlib.error as error:
        raise InvalidFrameError(f"The records of a batch cannot be unpacked: {error}.", code=Code.MESSAGE_CORRUPTED) from error
    if len(plain) > limits.RECORDS_BYTES_MAX:
        raise InvalidFrameError(f"The records of a batch unpack to more than {limits.RECORDS_BYTES_MAX} bytes.")
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidFrameError("The packed records of a batch are cut off or followed by more.", code=Code.MESSAGE_CORRUPTED)
    return plain


def decode_messages(header: BatchHeader, batch: Buffer, *, topic: str, broker_name: str) -> list[Message]:
    """The records of one batch as messages. `map` over the columns: the quickest of the ways measured."""
    columns = decode_records(header, batch)
    source = BatchSource(
        topic, broker_name, header.queue_id, header.base_offset, header.store_timestamp_ms, header.first_born_ms,
        header.producer_id, header.first_sequence,
    )
    if not header.flags:
        return list(map(Message, columns.bodies, repeat(source), count()))
    return list(
        map(
            Message, columns.bodies, repeat(source), count(), _or(columns.tags, None), _or(columns.keys, ()),
            _or(columns.properties, None), _or(columns.message_groups, None),
        )
    )


def _or(column: Sequence[Any] | None, default: Any) -> Iterable[Any]:
    return repeat(default) if column is None else column
