"""Record batches and log entries: what is put in comes out, what is changed is noticed, what is hostile is refused."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zrmq.errors import Code, InvalidFrameError, PayloadTooLargeError
from zrmq.protocol import batch, limits
from zrmq.protocol.batch import (
    BATCH_HEADER_BYTES,
    ENTRY_HEADER_BYTES,
    Columns,
    decode_messages,
    decode_records,
    encode_batch,
    encode_entry,
    entry_checks_out,
    iter_batches,
    open_batch,
    peek_batch,
    peek_entry,
    stamp,
)
from zrmq.protocol.tags import tag_mask

ASSIGNED = {
    "epoch": 1, "position": 1 << 40, "flushed_position": (1 << 40) - 5, "store_timestamp_ms": 1_795_000_000_123,
    "topic_id": 7, "queue_id": 3, "base_offset": 1 << 33,
}


def make(columns: Columns | None = None, **changes: Any) -> bytes:
    """A batch as a producer makes it."""
    produced = {"producer_id": 5, "first_sequence": 10, "first_born_ms": 1_000, "last_born_ms": 1_250}
    return encode_batch(columns or Columns([b"a", b"bc"]), **{**produced, **changes})


def store(frame: bytes, **changes: Any) -> bytes:
    """The same batch as a broker stores it."""
    return stamp(frame, **{**ASSIGNED, **changes}) + frame[BATCH_HEADER_BYTES:]


def patched(frame: bytes, at: int, new: bytes, *, seal: bool = True) -> bytes:
    """The batch with other bytes at one place; `seal` makes its producer's CRC fit again, as a hostile client would."""
    changed = bytearray(frame)
    changed[at : at + len(new)] = new
    if seal:
        view = memoryview(changed)
        crc = zlib.crc32(view[batch.PRODUCED_AT :], zlib.crc32(view[: batch.START_BYTES]))
        changed[batch.BATCH_CRC_AT : batch.PRODUCED_AT] = struct.pack("<I", crc)
    return bytes(changed)


def with_records(records: bytes, *, count: int = 1, codec: int = batch.CODEC_PLAIN) -> bytes:
    """A well-formed batch around any bytes in the place of its records."""
    frame = patched(make(Columns([b"x"])), 4, struct.pack("<I", BATCH_HEADER_BYTES + len(records)), seal=False)
    frame = frame[: batch.PRODUCED_AT] + bytes([codec]) + frame[batch.PRODUCED_AT + 1 : BATCH_HEADER_BYTES] + records
    return patched(frame, 80, struct.pack("<I", count))


# --- round trips --------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
RECORDS = st.lists(
    st.tuples(
        st.binary(max_size=40), st.none() | TEXT, st.lists(TEXT, max_size=3), st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
        st.none() | TEXT,
    ),
    min_size=1, max_size=20,
)
USED = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())


def columns_of(records: list[Any], used: tuple[bool, ...]) -> Columns:
    bodies, *others = (list(column) for column in zip(*records, strict=True))
    return Columns(bodies, *(column if use else None for column, use in zip(others, used, strict=True)))


@given(RECORDS, USED, st.booleans())
def test_what_a_producer_packs_a_consumer_reads(records: list[Any], used: tuple[bool, ...], compress: bool) -> None:
    columns = columns_of(records, used)
    frame = make(columns, compress=compress)
    assert open_batch(frame).record_count == len(records)
    [(header, view)] = iter_batches(store(frame))
    assert decode_records(header, view) == columns
    messages = decode_messages(header, view, topic="meters", broker_name="broker-a")
    nothing: tuple[Any, ...] = (None, (), None, None)
    for index, (message, (body, *others)) in enumerate(zip(messages, records, strict=True)):
        tag, keys, properties, group = (value if use else none for value, use, none in zip(others, used, nothing, strict=True))
        assert (message.body, message.tag, message.keys, message.message_group) == (body, tag, keys, group)
        assert message.properties == (properties or {})
        assert message.queue_offset == (1 << 33) + index
        assert message.message_id == f"{5:016X}{10 + index:016X}"
        assert (message.queue.topic, message.queue.broker_name, message.queue.queue_id) == ("meters", "broker-a", 3)
        assert (message.store_timestamp_ms, message.born_timestamp_ms) == (1_795_000_000_123, 1_000)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5), st.integers(1, 5))
def test_batches_follow_each_other_in_a_frame(bodies: list[bytes], repeats: int) -> None:
    payload = b"".join(store(make(Columns(bodies)), base_offset=number) for number in range(repeats))
    found = list(iter_batches(payload))
    assert [header.base_offset for header, _ in found] == list(range(repeats))
    assert all(decode_records(header, view).bodies == bodies for header, view in found)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(kind: Any) -> None:
    frame = make()
    assert open_batch(kind(frame)) == open_batch(frame)
    stored = store(kind(frame)) if kind is not memoryview else store(frame)
    [(header, view)] = iter_batches(kind(stored))
    assert decode_records(header, view).bodies == [b"a", b"bc"]


def test_the_drawing_is_true() -> None:
    """Each field stands where the docstring of zrmq/protocol/batch.py draws it."""
    columns = Columns([b"a", b"b"], ["kitchen", None], [["k"], []], [None, {"a": "b"}], [None, "g"])
    stored = store(make(columns, producer_id=(1 << 64) - 1, first_sequence=77))
    assert struct.unpack_from("<2sBBI", stored, 0) == (b"ZR", 1, 1, len(stored))
    assert struct.unpack_from("<IQQq", stored, 12) == (1, 1 << 40, (1 << 40) - 5, 1_795_000_000_123)
    assert struct.unpack_from("<IIQ", stored, 40) == (7, 3, 1 << 33)
    assert struct.unpack_from("<BBH", stored, 60) == (0, 15, 0)
    assert struct.unpack_from("<QQIIqQ", stored, 64) == ((1 << 64) - 1, 77, 2, 250, 1_000, tag_mask(["kitchen"]))
    assert msgpack.unpackb(stored[104:])[0] == [b"a", b"b"]
    assert struct.unpack_from("<I", stored, 56) == (zlib.crc32(stored[60:], zlib.crc32(stored[:8])),)
    assert struct.unpack_from("<I", stored, 8) == (zlib.crc32(stored[12:104], zlib.crc32(stored[:8])),)


def test_a_producer_leaves_the_brokers_part_empty() -> None:
    assert make()[batch.START_BYTES : batch.BATCH_CRC_AT] == bytes(48)


def test_header_arithmetic() -> None:
    header = peek_batch(store(make(Columns([b"a"] * 3))))
    assert (header.last_sequence, header.next_offset) == (12, (1 << 33) + 3)


@pytest.mark.parametrize("first, last, span", [(1_000, 1_250, 250), (1_000, 900, 0), (0, 1 << 40, 0xFFFF_FFFF)])
def test_born_span_stays_in_its_field(first: int, last: int, span: int) -> None:
    assert open_batch(make(first_born_ms=first, last_born_ms=last)).born_span_ms == span


def test_a_small_message_costs_few_bytes() -> None:
    """130 bytes for a 128-byte message in a batch of 500, and a header for all of them."""
    assert len(make(Columns([bytes(128)] * 500))) <= 500 * 130 + BATCH_HEADER_BYTES + 8


def test_compression_is_taken_only_where_it_helps() -> None:
    assert open_batch(make(Columns([b"a" * 1_000]), compress=True)).codec == batch.CODEC_ZLIB
    assert open_batch(make(Columns([bytes(range(256))]), compress=True)).codec == batch.CODEC_PLAIN


# --- changed bytes ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_produced_batch_is_noticed() -> None:
    """The broker's part is not the producer's: it is zeros on the way, and stamped over on arrival."""
    frame = make(Columns([b"21.5", b"22"], ["kitchen", None]))
    for bit in range(len(frame) * 8):
        at = bit // 8
        if batch.START_BYTES <= at < batch.BATCH_CRC_AT:
            continue
        changed = patched(frame, at, bytes([frame[at] ^ 1 << bit % 8]), seal=False)
        with pytest.raises(InvalidFrameError):
            open_batch(changed)


def test_every_flipped_bit_of_a_stored_batch_is_noticed() -> None:
    stored = store(make(Columns([b"21.5", b"22"], ["kitchen", None])))
    for bit in range(len(stored) * 8):
        at = bit // 8
        changed = patched(stored, at, bytes([stored[at] ^ 1 << bit % 8]), seal=False)
        header = peek_entry(changed)
        assert header is None or not entry_checks_out(changed, header), f"bit {bit}"
        with pytest.raises(InvalidFrameError):
            list(iter_batches(changed))


@pytest.mark.parametrize("payload", [b"", b"\x92\x01\x05", bytes(range(200))])
def test_every_flipped_bit_of_an_entry_is_noticed(payload: bytes) -> None:
    entry = encode_entry(batch.KIND_EVENT, payload, epoch=1, position=64, flushed_position=0, store_timestamp_ms=5)
    for bit in range(len(entry) * 8):
        at = bit // 8
        changed = patched(entry, at, bytes([entry[at] ^ 1 << bit % 8]), seal=False)
        header = peek_entry(changed)
        assert header is None or not entry_checks_out(changed, header), f"bit {bit}"


@given(st.data())
def test_no_other_change_goes_unnoticed(data: st.DataObject) -> None:
    """Bursts, holes and swaps, as a disk or a bad cable makes them."""
    stored = store(make(Columns([bytes(range(100))])))
    at = data.draw(st.integers(0, len(stored) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=len(stored) - at))
    changed = stored[:at] + burst + stored[at + len(burst) :]
    if changed != stored:
        header = peek_entry(changed)
        assert header is None or not entry_checks_out(changed, header)


@pytest.mark.parametrize("length", [0, 1, 39, 40, 103, 104, 110])
def test_what_is_cut_off_does_not_check_out(length: int) -> None:
    stored = store(make())
    cut = stored[:length]
    header = peek_entry(cut)
    assert header is None or not entry_checks_out(cut, header)
    if cut:
        with pytest.raises(InvalidFrameError, match="does not check out at byte 0"):
            list(iter_batches(cut))


def test_an_entry_of_another_position_is_another_entry() -> None:
    """What a recycled file holds beyond its end is valid, but for somewhere else; its position says so."""
    entry = encode_entry(batch.KIND_EVENT, b"x", epoch=1, position=64, flushed_position=0, store_timestamp_ms=5)
    moved = entry[:16] + struct.pack("<Q", 128) + entry[24:]
    header = peek_entry(moved)
    assert header is not None
    assert header.position == 128
    assert not entry_checks_out(moved, header)


def test_entries_are_found_inside_a_buffer() -> None:
    entry = encode_entry(batch.KIND_EVENT, b"payload", epoch=1, position=64, flushed_position=0, store_timestamp_ms=5)
    buffer = b"\x00" * 13 + entry + b"\xff" * 7
    header = peek_entry(buffer, 13)
    assert header is not None
    assert entry_checks_out(buffer, header, 13)
    assert peek_entry(buffer, 12) is None
    assert peek_entry(buffer, len(buffer) - 20) is None


def test_zeros_are_no_entry() -> None:
    assert peek_entry(bytes(4_096)) is None


def test_a_batch_shorter_than_its_header_does_not_check_out() -> None:
    entry = encode_entry(batch.KIND_BATCH, b"", epoch=1, position=64, flushed_position=0, store_timestamp_ms=5)
    assert len(entry) == ENTRY_HEADER_BYTES
    header = peek_entry(entry)
    assert header is not None
    assert not entry_checks_out(entry, header)


def test_an_entry_shorter_than_any_is_none() -> None:
    assert peek_entry(b"ZR\x01\x02" + struct.pack("<I", 39) + bytes(32)) is None


def test_the_second_batch_is_blamed_where_it_is() -> None:
    stored = store(make())
    damaged = stored + patched(stored, len(stored) - 1, b"\xff", seal=False)
    found = iter_batches(damaged)
    next(found)
    with pytest.raises(InvalidFrameError, match=f"at byte {len(stored)}") as raised:
        next(found)
    assert raised.value.code is Code.MESSAGE_CORRUPTED


# --- what a broker refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame, code, sentence",
    [
        (b"", Code.BAD_REQUEST, "needs 104 bytes of header and got 0"),
        (make()[:103], Code.BAD_REQUEST, "needs 104 bytes of header and got 103"),
        (patched(make(), 0, b"XY"), Code.BAD_REQUEST, "wrong magic or kind"),
        (patched(make(), 3, b"\x02"), Code.BAD_REQUEST, "wrong magic or kind"),
        (patched(make(), 2, b"\x09"), Code.VERSION_UNSUPPORTED, "format version 9"),
        (make() + b"x", Code.BAD_REQUEST, "says it has"),
        (make()[:-1], Code.BAD_REQUEST, "says it has"),
        (patched(make(), 80, struct.pack("<I", 0)), Code.BAD_REQUEST, "has 0 records"),
        (patched(make(), 80, struct.pack("<I", 65_537)), Code.BAD_REQUEST, "has 65537 records"),
        (patched(make(), 72, struct.pack("<Q", (1 << 63) - 2)), Code.BAD_REQUEST, "beyond 2\\^63"),
        (patched(make(), 72, struct.pack("<Q", (1 << 64) - 1)), Code.BAD_REQUEST, "beyond 2\\^63"),
        (patched(make(), 110, b"?", seal=False), Code.MESSAGE_CORRUPTED, "CRC does not match"),
    ],
)
def test_a_broker_refuses(frame: bytes, code: Code, sentence: str) -> None:
    with pytest.raises(InvalidFrameError, match=sentence) as raised:
        open_batch(frame)
    assert raised.value.code is code


def test_a_broker_refuses_what_is_too_long() -> None:
    with pytest.raises(InvalidFrameError, match="at most"):
        open_batch(with_records(bytes(limits.BATCH_BYTES_MAX)))


def test_a_producer_refuses_what_is_too_long() -> None:
    with pytest.raises(PayloadTooLargeError) as raised:
        make(Columns([bytes(limits.BATCH_BYTES_MAX)]))
    assert raised.value.facts["limit_bytes"] == limits.BATCH_BYTES_MAX


def test_what_would_only_pack_into_a_batch_is_too_long_as_well() -> None:
    """Otherwise a consumer would have to unpack more than it may."""
    with pytest.raises(PayloadTooLargeError):
        make(Columns([bytes(limits.BODY_BYTES_MAX)] * 2), compress=True)


def test_the_largest_message_fits() -> None:
    limits.check_body(bytes(limits.BODY_BYTES_MAX))
    limits.check_extras("t", ["k"] * 64, {f"{n:03}": "x" * 100 for n in range(128)}, "g" * 64)
    columns = Columns(
        [bytes(limits.BODY_BYTES_MAX)], ["t"], [["k"] * 64], [{f"{n:03}": "x" * 100 for n in range(128)}], ["g" * 64]
    )
    assert open_batch(make(columns)).record_count == 1
    [(header, view)] = iter_batches(store(make(columns, compress=True)))
    assert decode_records(header, view) == columns


# --- what a consumer refuses --------------------------------------------------------------------------------------------


def refusal(frame: bytes) -> InvalidFrameError:
    """How a consumer refuses the records of a batch that passed the broker."""
    header = open_batch(frame)
    with pytest.raises(InvalidFrameError) as raised:
        decode_records(header, frame)
    return raised.value


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"\xc1",
        b"\x91\x91\xa1x",  # a body that is text
        b"\x91\xc0",  # no bodies
        b"\x92\x91\xc4\x00\x91\x05",  # a tag that is a number
        b"\x92\x91\xc4\x00\x91\xa1\xff",  # a tag that is not UTF-8
        b"\x91\x91\xc4\x00\x00",  # something behind
        b"\x91" * 5_000,  # deeper than anything needs to be
        b"\x91\xdd\xff\xff\xff\xff",  # says four billion bodies follow
        b"\x91\x91\xc6\xff\xff\xff\xff",  # says four billion bytes follow
    ],
)
def test_records_that_cannot_be_read(records: bytes) -> None:
    assert refusal(with_records(records)).code is Code.MESSAGE_CORRUPTED


@pytest.mark.parametrize(
    "columns",
    [
        Columns([b"a"]),
        Columns([b"a", b"b", b"c"]),
        Columns([b"a", b"b"], ["t"]),
        Columns([b"a", b"b"], None, [[]]),
        Columns([b"a", b"b"], None, None, [None]),
        Columns([b"a", b"b"], None, None, None, ["g", None, None]),
        Columns([]),
    ],
)
def test_columns_of_another_length(columns: Columns) -> None:
    records = encode_batch(columns, producer_id=1, first_sequence=1, first_born_ms=0, last_born_ms=0)[BATCH_HEADER_BYTES:]
    assert "another number of records" in refusal(with_records(records, count=2)).message


def test_an_unknown_codec() -> None:
    assert "codec 9" in refusal(with_records(b"x", codec=9)).message


def test_packed_records_that_are_cut_off_or_go_on() -> None:
    packed = zlib.compress(msgpack.packb([[b"a"]]))
    assert decode_records(open_batch(with_records(packed, codec=1)), with_records(packed, codec=1)).bodies == [b"a"]
    assert "cut off" in refusal(with_records(packed[:-1], codec=1)).message
    assert "followed by more" in refusal(with_records(packed + b"x", codec=1)).message
    assert "cannot be unpacked" in refusal(with_records(b"\x00" + packed, codec=1)).message
    assert refusal(with_records(b"", codec=1)).code is Code.MESSAGE_CORRUPTED


@example(0)
@example(1)
@given(st.integers(-3, 3))
def test_packed_records_at_their_limit(difference: int) -> None:
    body = bytes(limits.RECORDS_BYTES_MAX - len(msgpack.packb([[bytes(1 << 16)]])) + (1 << 16) + difference)
    frame = with_records(zlib.compress(msgpack.packb([[body]]), 1), codec=1)
    if difference <= 0:
        assert decode_records(open_batch(frame), frame).bodies == [body]
    else:
        assert "unpack to more than" in refusal(frame).message
