"""Segments: their header, and finding entries in one, whole, damaged, torn, or left over from another life of the file."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.store_bench import batch
from zrmq.protocol.batch import (
    BATCH_HEADER_BYTES,
    KIND_EVENT,
    KIND_SEGMENT_END,
    BatchHeader,
    encode_entry,
    entry_checks_out,
    stamp,
)
from zrmq.store.segment import (
    SCAN_BYTES,
    SEGMENT_HEADER_BYTES,
    EntryReader,
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

START = 1 << 20


def stamped(position: int, size: int = 50, flushed_position: int = 0, sequence: int = 1) -> bytes:
    """A batch as it is in the log at `position`."""
    _, frame = batch(size=size, first_sequence=sequence)
    head = stamp(
        frame, epoch=0, position=position, flushed_position=flushed_position, store_timestamp_ms=1000, topic_id=1, queue_id=0,
        base_offset=sequence,
    )
    return head + frame[BATCH_HEADER_BYTES:]


def event(position: int, payload: bytes = b"event", kind: int = KIND_EVENT) -> bytes:
    return encode_entry(kind, payload, epoch=0, position=position, flushed_position=0, store_timestamp_ms=1000)


def log_of(sizes: Sequence[int], padding: int = 500) -> tuple[bytearray, list[int]]:
    """A stretch of log from `START` on with batches of these body sizes (0: an event), zeros behind; and their positions."""
    data, positions = bytearray(), []
    for number, size in enumerate(sizes):
        positions.append(START + len(data))
        data += stamped(START + len(data), size, sequence=number + 1) if size else event(START + len(data))
    return data + bytes(padding), positions


def reading(data: bytes | bytearray, start: int = START) -> Read:
    return lambda position, size: bytes(data[position - start : position - start + size])


def found_in(data: bytes | bytearray) -> list[Found]:
    return list(scan(reading(data), START, START + len(data)))


def places(found: Sequence[Found]) -> list[tuple[int, bool, bool]]:
    """Where each stretch begins, whether it is an entry, and a whole one."""
    return [(one.position, one.header is not None, one.is_whole) for one in found]


# --- header and name ----------------------------------------------------------------------------------------------------


def test_names_sort_like_positions() -> None:
    assert segment_name(67108864) == "00000000000067108864.log"
    assert start_of("00000000000067108864.log") == 67108864
    for other in ("spare-1", "67108864.log", "00000000000067108864.log.draft", "x00000000000067108864.log", ""):
        assert start_of(other) is None
    assert sorted(map(segment_name, [10**19, 9, 10])) == [segment_name(9), segment_name(10), segment_name(10**19)]


def test_a_header_is_that_of_its_segment_only() -> None:
    header = encode_segment_header(START, 1 << 26)
    assert len(header) == SEGMENT_HEADER_BYTES
    assert header.hex() == (
        "5a524d512d4c4f4701000000000000000000100000000000000000040000000000000000000000000000000000000000000000000000000000000000"
        "376e65d5"
    ), "frozen: newer code reads it"
    assert segment_version(header, START) == 1
    assert segment_version(header, START + 1) is None
    assert segment_version(header[:-1], START) is None
    assert segment_version(bytes(64), 0) is None


@given(st.integers(0, 63), st.integers(0, 7))
def test_a_spoiled_header_is_none(at: int, bit: int) -> None:
    header = bytearray(encode_segment_header(START, 1 << 26))
    header[at] ^= 1 << bit
    assert segment_version(bytes(header), START) is None


def test_a_segment_knows_what_each_topic_has_in_it() -> None:
    from pathlib import Path

    segment = Segment(Path("x"), 0, 100)
    segment.note_batch(1, 1000, 10)
    segment.note_batch(2, 900, 20)
    segment.note_batch(1, 800, 5)
    assert (segment.shares[1].last_ms, segment.shares[1].size_bytes) == (1000, 15)
    assert (segment.shares[2].last_ms, segment.shares[2].size_bytes) == (900, 20)
    assert segment.last_ms == 1000
    segment.note_event(1100)
    segment.note_event(5)
    assert segment.last_ms == 1100


# --- finding entries ----------------------------------------------------------------------------------------------------


def test_entries_follow_each_other_and_zeros_end_them() -> None:
    data, positions = log_of([10, 0, 3000, 0, 1])
    found = found_in(data)
    assert places(found) == [*((position, True, True) for position in positions), (START + len(data) - 500, False, False)]
    assert [type(one.header) is BatchHeader for one in found[:-1]] == [True, False, True, False, True]
    for one in found[:-1]:
        assert one.header is not None
        assert one.header.position == one.position
        assert one.end - one.position == one.header.length
        assert one.block[one.at : one.at + one.header.length] == data[one.position - START : one.end - START]


def test_a_full_segment_has_no_stretch_behind_its_last_entry() -> None:
    data, positions = log_of([10, 20], padding=0)
    assert places(found_in(data)) == [(position, True, True) for position in positions]
    assert len(found_in(data + bytes(39))) == 2, "less than an entry's header"


def test_the_end_entry_ends_the_scan() -> None:
    data, _ = log_of([10], padding=0)
    data += event(START + len(data), b"", KIND_SEGMENT_END)
    data += stamped(START + len(data))
    found = found_in(data)
    assert len(found) == 2
    assert found[1].header is not None
    assert found[1].header.kind == KIND_SEGMENT_END


def test_an_entry_at_the_wrong_place_is_none() -> None:
    data, _ = log_of([10, 20, 30])
    moved = bytes(7) + bytes(data)
    assert places(found_in(moved)) == [(START, False, False)]


def test_what_a_recycled_file_held_before_is_not_found() -> None:
    old = b"".join(stamped(position, 26, sequence=1) for position in range(0, 5000, len(stamped(0, 26))))
    data, positions = log_of([10, 20], padding=0)
    recycled = data + old[len(data) :]
    assert places(found_in(recycled)) == [*((position, True, True) for position in positions), (START + len(data), False, False)]


@pytest.mark.parametrize("spoiled", range(5))
def test_a_damaged_record_spoils_its_batch_only_and_its_extent_is_known(spoiled: int) -> None:
    data, positions = log_of([100] * 5)
    data[positions[spoiled] - START + BATCH_HEADER_BYTES + 20] ^= 4
    found = found_in(data)
    assert places(found[:-1]) == [(position, True, number != spoiled) for number, position in enumerate(positions)]


@pytest.mark.parametrize("spoiled", range(5))
@pytest.mark.parametrize("at", [0, 3, 4, 7, 8, 12, 16, 23, 24, 40, 50, 56, 60, 103])
def test_a_damaged_header_spoils_its_entry_only(spoiled: int, at: int) -> None:
    data, positions = log_of([100] * 5)
    data[positions[spoiled] - START + at] ^= 0x40
    found = found_in(data)
    assert places(found[:-1] if spoiled < 4 else found)[: spoiled + 2] == [
        *((position, True, True) for position in positions[:spoiled]), (positions[spoiled], False, False),
        *((position, True, True) for position in positions[spoiled + 1 : spoiled + 2]),
    ]
    if spoiled < 4:
        assert found[spoiled].end == positions[spoiled + 1]


def test_a_damaged_event_is_a_stretch_without_a_header() -> None:
    data, positions = log_of([0, 0, 0])
    data[positions[1] - START + 41] ^= 1
    assert places(found_in(data))[:3] == [(positions[0], True, True), (positions[1], False, False), (positions[2], True, True)]


def test_a_length_that_points_anywhere_is_not_followed() -> None:
    for length in (0, 39, 103, 1 << 20, 0xFFFFFFFF):
        data, positions = log_of([100, 100])
        data[4:8] = length.to_bytes(4, "little")
        assert places(found_in(data))[:2] == [(START, False, False), (positions[1], True, True)]


def test_entries_larger_than_a_block_and_across_blocks() -> None:
    sizes = [SCAN_BYTES - 200, 90, 3 * SCAN_BYTES, 10, 0, SCAN_BYTES]
    data, positions = log_of(sizes, padding=1000)
    assert [one.position for one in found_in(data) if one.is_whole] == positions
    data[positions[2] - START + 5] ^= 0xFF
    found = found_in(data)
    assert [one.position for one in found if one.is_whole] == [*positions[:2], *positions[3:]]
    assert (found[2].position, found[2].end) == (positions[2], positions[3])


def test_a_mark_across_two_blocks_is_found() -> None:
    for shift in range(-45, 5):
        at = 1 + SCAN_BYTES + shift
        data = bytearray(at) + stamped(START + at)
        assert places(found_in(data)) == [(START, False, False), (START + at, True, True)]


@given(seed=st.integers(0, 1 << 32), sizes=st.lists(st.sampled_from([0, 1, 30, 500]), max_size=12))
def test_whatever_is_damaged_the_rest_is_found(seed: int, sizes: list[int]) -> None:
    rng = Random(seed)
    data, positions = log_of(sizes)
    original = bytes(data)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(data))
        for at in range(start, min(start + rng.choice([1, 8, 200]), len(data))):
            data[at] = rng.randrange(256)
    found = found_in(data)
    at = START
    for one in found:
        assert one.position == at, "stretches follow each other"
        assert one.end > one.position
        at = one.end
    whole = {one.position for one in found if one.is_whole}
    ends = [*positions[1:], START + len(data) - 500]
    for position, end in zip(positions, ends, strict=False):
        is_untouched = data[position - START : end - START] == original[position - START : end - START]
        assert (position in whole) == is_untouched
        if position in whole:
            header = next(one.header for one in found if one.position == position)
            assert header is not None
            assert entry_checks_out(bytes(data), header, position - START)  # type: ignore[arg-type]


def test_a_reader_may_be_asked_for_any_position() -> None:
    data, positions = log_of([10, 20, 30])
    reader = EntryReader(reading(data), START + len(data))
    for position in (positions[2], positions[0], positions[1], positions[0]):
        found = reader.entry(position)
        assert found is not None
        assert found.is_whole
    assert reader.entry(positions[1] + 1) is None
    assert reader.entry(START + len(data) - 10) is None


# --- a disk that gives up some sectors ------------------------------------------------------------------------------------


class Failing:
    """A file with unreadable sectors."""

    def __init__(self, data: bytes, bad: set[int], number: int = errno.EIO) -> None:
        self.data, self.bad, self.number = data, bad, number

    def pread(self, size: int, position: int) -> bytes:
        if any(sector in self.bad for sector in range(position // 512, (position + size + 511) // 512)):
            raise OSError(self.number, "bad sector")
        return self.data[position : position + size]


def test_unreadable_sectors_read_as_zeros() -> None:
    data = bytes(range(256)) * 256
    assert read_or_zeros(Failing(data, set()), 60_000, 100) == data[100:60_100]  # type: ignore[arg-type]
    read = read_or_zeros(Failing(data, {20}), 60_000, 100)  # type: ignore[arg-type]
    assert len(read) == 60_000
    wrong = [at for at, (one, other) in enumerate(zip(read, data[100:60_100], strict=True)) if one != other]
    assert 0 < len(wrong) <= 4096
    assert all(abs(at + 100 - 20 * 512) <= 4096 for at in wrong)


def test_other_errors_are_errors() -> None:
    with pytest.raises(OSError, match="bad sector"):
        read_or_zeros(Failing(bytes(9999), {3}, errno.EMFILE), 9999, 0)  # type: ignore[arg-type]
