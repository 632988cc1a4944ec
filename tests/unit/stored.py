"""Batches as a broker stores and serves them, for tests of what consumers do with them."""

from __future__ import annotations

from collections.abc import Sequence

from zrmq.protocol.batch import BATCH_HEADER_BYTES, Columns, encode_batch, stamp


def body_of(offset: int) -> bytes:
    """The body that `stored_batch` gives the message at this queue offset."""
    return b"message %d" % offset


def stored_batch(
    base_offset: int, count: int, *, tags: Sequence[str | None] | None = None, queue_id: int = 0, store_timestamp_ms: int = 1_000
) -> bytes:
    """One batch of `count` messages from `base_offset` on, whose bodies tell their offsets."""
    columns = Columns([body_of(offset) for offset in range(base_offset, base_offset + count)], list(tags) if tags else None)
    frame = encode_batch(columns, producer_id=7, first_sequence=base_offset, first_born_ms=1, last_born_ms=2)
    return restamped(frame, base_offset, queue_id=queue_id, store_timestamp_ms=store_timestamp_ms)


def restamped(frame: bytes, base_offset: int, *, queue_id: int = 0, store_timestamp_ms: int = 1_000) -> bytes:
    """A producer's frame with what the broker assigns."""
    header = stamp(
        frame, epoch=1, position=4096 + base_offset, flushed_position=0, store_timestamp_ms=store_timestamp_ms, topic_id=3,
        queue_id=queue_id, base_offset=base_offset,
    )
    return header + frame[BATCH_HEADER_BYTES:]


def unreadable_batch(base_offset: int, count: int) -> bytes:
    """A batch that checks out but whose records are not records: what a faulty producer could store."""
    good = stored_batch(base_offset, count)
    start = bytearray(good)
    start[BATCH_HEADER_BYTES] = 0xC1  # no MessagePack type
    return restamped(_with_crc(bytes(start)), base_offset)


def _with_crc(frame: bytes) -> bytes:
    from zlib import crc32

    from zrmq.protocol.batch import BATCH_CRC_AT, PRODUCED_AT, START_BYTES

    crc = crc32(frame[PRODUCED_AT:], crc32(frame[:START_BYTES]))
    return frame[:BATCH_CRC_AT] + crc.to_bytes(4, "little") + frame[PRODUCED_AT:]
