"""Consume queues: entries in memory and in files, found by offset, time and place; trimmed, spilled, saved, and made anew."""

from __future__ import annotations

import errno
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import DamageError
from zrmq.protocol.events import TopicConfig
from zrmq.store.consume_queue import (
    ENTRY_BYTES,
    HINTS_MAX,
    ROW_TAIL_BYTES_MAX,
    TAIL_BYTES_MAX,
    ConsumeQueue,
    QueueRow,
    Shelf,
)
from zrmq.store.open_files import OpenFiles
from zrmq.store.tables import Queue, Topic
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/data/consumequeue")
PER_FILE = 10


class Case:
    """A queue on a shelf with small files. Batch n has two records, offsets 2n and 2n+1, lies at 100n, came at second n."""

    def __init__(self, count: int = 0, seed: int = 0, per_file: int = PER_FILE, open_files_max: int = 2) -> None:
        self.files = FaultyFiles(seed)
        self.shelf = Shelf(self.files, FOLDER, OpenFiles(self.files, open_files_max), per_file)
        topic = Topic(17, TopicConfig("meters", 1))
        topic.grow(1)
        self.queue = topic.queues[0]
        self.index = ConsumeQueue(self.queue, self.shelf)
        self.count = 0
        self.add(count)

    @property
    def folder(self) -> Path:
        return FOLDER / "meters@17" / "0"

    def add(self, count: int = 1, store_timestamp_ms: int | None = None) -> None:
        for _ in range(count):
            number = self.count
            at_ms = number * 1000 if store_timestamp_ms is None else store_timestamp_ms
            self.index.add(2 * number, 100 * number, 90, 2, at_ms, 1 << number % 64)
            self.queue.next_offset = self.queue.visible_offset = 2 * number + 2
            self.count += 1

    def numbers(self, first: int = 0) -> list[int]:
        """The batches that the entries from a number on speak of."""
        return [entry.base_offset // 2 for entry in self.index.entries(first)]

    def restart(self) -> None:
        """Save, cut the power, and begin again with what was saved."""
        row = self.restored_row()
        self.files.crash()
        self.shelf = Shelf(self.files, FOLDER, OpenFiles(self.files, 2), PER_FILE)
        self.index = ConsumeQueue(self.queue, self.shelf)
        self.index.restore(row)

    def restored(self) -> ConsumeQueue:
        """A new object from what was saved."""
        row = self.restored_row()
        index = ConsumeQueue(self.queue, self.shelf)
        index.restore(row)
        return index

    def restored_row(self) -> QueueRow:
        save = self.index.begin_save()
        save.write()
        save.sync()
        self.index.finish_save(save, True)
        return save.row


# --- entries ------------------------------------------------------------------------------------------------------------


def test_an_entry_is_44_bytes_with_a_crc() -> None:
    assert ENTRY_BYTES == 44
    case = Case()
    case.index.add(5, 6, 7, 8, 9, 10)
    assert case.index.entry(0)[:6] == (5, 6, 7, 8, 9, 10)
    assert case.index.entry(0).next_offset == 13
    fields = b"".join(value.to_bytes(size, "little") for value, size in ((5, 8), (6, 8), (7, 4), (8, 4), (9, 8), (10, 8)))
    assert bytes(case.index.tail) == fields + crc32(fields).to_bytes(4, "little"), "frozen: newer code reads it"


@pytest.mark.parametrize("spilled", [0, 1, 9, 10, 11, 25, 30])
def test_entries_are_read_from_files_and_memory_alike(spilled: int) -> None:
    case = Case(spilled)
    if spilled:
        case.index.spill()
    case.add(30 - spilled)
    assert case.index.filed == spilled
    assert case.index.end == 30
    assert case.numbers() == list(range(30))
    assert case.numbers(17) == list(range(17, 30))
    assert case.numbers(30) == []
    assert [case.index.entry(number).position for number in (0, 9, 10, 29)] == [0, 900, 1000, 2900]


def test_files_are_named_by_their_first_entry() -> None:
    case = Case(25)
    case.index.spill()
    assert case.files.listdir(case.folder) == [f"{first:020d}" for first in (0, 10, 20)]
    assert [case.files.size(case.folder / f"{first:020d}") for first in (0, 10, 20)] == [440, 440, 220]
    assert not case.index.tail


def test_more_blocks_than_one() -> None:
    case = Case(500)
    assert case.numbers() == list(range(500))
    case.index.spill()
    assert case.numbers() == list(range(500))


def test_a_long_tail_wants_to_be_in_a_file() -> None:
    case = Case()
    while len(case.index.tail) <= TAIL_BYTES_MAX:
        assert not case.index.is_long
        case.add()
    assert case.index.is_long
    case.index.is_spilling = True
    assert not case.index.is_long
    case.index.is_spilling = False
    case.index.spill()
    assert not case.index.is_long


def test_a_refused_spill_changes_nothing() -> None:
    case = Case(15)
    case.files.fail("pwritev", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        case.index.spill()
    assert (case.index.filed, case.numbers()) == (0, list(range(15)))
    case.index.spill()
    assert (case.index.filed, case.numbers()) == (15, list(range(15)))


# --- finding ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 40), spilled=st.integers(0, 40), offset=st.integers(-3, 90))
def test_offsets_are_found(count: int, spilled: int, offset: int) -> None:
    case = Case(min(spilled, count))
    case.index.spill()
    case.add(count - case.count)
    assert case.index.find_offset(offset) == min(max(offset // 2, -1), count - 1)


@given(count=st.integers(0, 40), spilled=st.integers(0, 40), timestamp_ms=st.integers(-1500, 50_000))
def test_times_are_found(count: int, spilled: int, timestamp_ms: int) -> None:
    case = Case(min(spilled, count))
    case.index.spill()
    case.add(count - case.count)
    assert case.index.find_time(timestamp_ms) == min(max(-(-timestamp_ms // 1000), 0), count)


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(-1, 22))
def test_a_clock_that_steps_back_does_not_hide_anything(times: list[int], asked: int) -> None:
    case = Case()
    for at_ms in times:
        case.add(store_timestamp_ms=at_ms)
    expected = next((number for number, at_ms in enumerate(times) if at_ms >= asked), len(times))
    assert case.index.find_time(asked) == expected


def test_sequential_readers_do_not_search() -> None:
    case = Case(100)
    case.index.spill()
    case.index.remember(60, 30, asked_offset=0)
    before = case.files.counts["pread"]
    assert case.index.find_offset(60) == 30
    assert case.files.counts["pread"] == before
    assert case.index.find_offset(61) == 30
    assert case.files.counts["pread"] > before


def test_a_search_reads_the_last_of_its_way_at_once() -> None:
    """12 halves of 4,000 entries: five until 125 are left, and those together."""
    case = Case(4_000, per_file=5_000)
    case.index.spill()
    for offset in (0, 1, 2_500, 7_999):
        before = case.files.counts["pread"]
        assert case.index.find_offset(offset) == offset // 2
        assert case.files.counts["pread"] - before <= 6


@pytest.mark.parametrize("spilled", [0, 100, 450, 1_000])
def test_a_long_queue_is_searched_by_offset_and_time_across_files_and_memory(spilled: int) -> None:
    case = Case(spilled, per_file=400)
    case.index.spill()
    case.add(1_000 - spilled)
    assert [case.index.find_offset(offset) for offset in range(2_000)] == [offset // 2 for offset in range(2_000)]
    assert [case.index.find_time(number * 1000 - 500) for number in range(1_001)] == list(range(1_001))


def test_a_hint_ahead_of_the_last_entry_counts_once_it_is_there() -> None:
    case = Case(5)
    case.index.remember(10, 5, asked_offset=0)
    assert case.index.find_offset(10) == 4
    case.add()
    assert case.index.find_offset(10) == 5


def test_hints_are_few_and_follow_their_reader() -> None:
    case = Case(100)
    for reader in range(HINTS_MAX * 2):
        case.index.remember(2 * reader, reader, asked_offset=-1)
    assert len(case.index._hints or ()) == HINTS_MAX
    for offset in range(0, 180, 2):
        case.index.remember(offset + 2, offset // 2 + 1, asked_offset=offset)
    assert len(case.index._hints or ()) <= HINTS_MAX


# --- the front ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spilled", [0, 5, 12, 30])
@pytest.mark.parametrize("log_start", [0, 1, 100, 450, 1150, 2900, 2901, 9999])
def test_trimming_forgets_what_is_before_the_log(spilled: int, log_start: int) -> None:
    case = Case(spilled)
    case.index.spill()
    case.add(30 - spilled)
    case.index.trim(log_start)
    first = min(-(-log_start // 100), 30)
    assert case.index.first == first
    assert case.queue.min_offset == 2 * first
    assert case.numbers(case.index.first) == list(range(first, 30))
    assert case.index.end == 30
    case.add(3)
    assert case.numbers(case.index.first) == list(range(first, 33))
    assert case.index.first_position == 100 * first
    case.index.spill()
    assert case.numbers(case.index.first) == list(range(first, 33))


def test_trimming_lets_go_of_the_files_that_are_to_be_removed() -> None:
    case = Case(3 * PER_FILE, open_files_max=3)
    case.index.spill()
    held = case.shelf._open_files.get(case.folder / f"{0:020d}")
    case.index.trim(100 * (PER_FILE - 1))
    assert held.pread(1, 0), "it still has an entry"
    case.index.trim(100 * PER_FILE)
    with pytest.raises(OSError, match="Bad file"):
        held.pread(1, 0)
    assert case.numbers(case.index.first)[0] == PER_FILE


def test_trimming_waits_for_a_job() -> None:
    case = Case(10)
    case.index.is_spilling = True
    case.index.trim(500)
    assert case.index.first == 0


def test_files_below_the_first_entry_are_removed_once_that_is_saved() -> None:
    case = Case(35)
    case.index.spill()
    case.index.trim(2_500)
    save = case.index.begin_save()
    save.write()
    save.sync()
    assert len(case.files.listdir(case.folder)) == 4
    save.clean()
    assert case.files.listdir(case.folder) == [f"{first:020d}" for first in (20, 30)]
    assert case.numbers(25) == list(range(25, 35))


# --- damage -------------------------------------------------------------------------------------------------------------


def test_damaged_files_are_noticed() -> None:
    case = Case(30)
    case.index.spill()
    path = case.folder / f"{10:020d}"
    case.files.rot(path, 3 * ENTRY_BYTES + 9)
    assert case.numbers(14) == list(range(14, 30))
    for look in (lambda: case.index.entry(13), lambda: case.numbers(0)):
        with pytest.raises(DamageError, match="does not check out"):
            look()
    case.files.unlink(path)
    case = Case(30)
    case.index.spill()
    case.files.unlink(path)
    with pytest.raises(DamageError, match="cannot be read"):
        case.index.entry(13)
    assert not case.index.has_files()


def test_a_system_that_refuses_is_not_damage() -> None:
    case = Case(30)
    case.index.spill()
    case.files.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        case.index.entry(3)
    case.files.fail("pread", errno.EIO)
    with pytest.raises(DamageError, match="cannot be read"):
        case.index.entry(3)
    assert case.numbers() == list(range(30))


def test_a_file_that_became_shorter_is_noticed() -> None:
    case = Case(15)
    case.index.spill()
    case.files.unlink(case.folder / f"{10:020d}")
    case.shelf.write(case.folder, 10, b"x" * 50)
    with pytest.raises(DamageError, match="shorter"):
        case.index.entry(13)
    assert not case.index.has_files()


@pytest.mark.parametrize("spilled", [0, 30])
def test_entries_made_anew_take_the_place_of_the_old_ones(spilled: int) -> None:
    case = Case(30)
    case.index.spill()
    case.add(5)
    made = ConsumeQueue(case.queue, case.shelf)
    for number in range(10, 35):
        made.add(2 * number, 100 * number, 90, 2, 1000 * number, 0)
    end = case.index.end
    case.index.is_spilling = True
    case.add(4)
    case.index.is_spilling = False
    case.index.replace(made, end)
    assert case.index.first % PER_FILE == 0
    assert case.index.first > 39
    assert case.numbers(case.index.first) == list(range(10, 39))
    assert (case.queue.min_offset, case.index.first_position) == (20, 1000)
    assert not case.index.is_saved
    index = case.restored()
    assert [entry.base_offset // 2 for entry in index.entries(index.first)] == list(range(10, 39))


def test_nothing_made_anew() -> None:
    case = Case(5)
    case.index.replace(ConsumeQueue(case.queue, case.shelf), case.index.end)
    assert case.numbers(case.index.first) == []
    assert case.queue.min_offset == 10
    case.add()
    assert case.numbers(case.index.first) == [5]


def test_the_newest_entries_are_told_by_their_place() -> None:
    case = Case(10)
    case.index.spill()
    case.add(10)
    assert [case.index.number_at(position) for position in (0, 1000, 1001, 1900, 1901, 5000)] == [10, 10, 11, 19, 20, 20]


# --- saving -------------------------------------------------------------------------------------------------------------


def test_a_short_tail_is_saved_in_the_row_and_needs_no_file() -> None:
    case = Case(20)
    save = case.index.begin_save()
    assert (save.spill, len(save.row.tail)) == (b"", 20 * ENTRY_BYTES)
    save.write()
    save.sync()
    assert case.files.listdir(FOLDER) == []
    case.index.finish_save(save, True)
    assert case.index.is_saved
    case.add()
    assert not case.index.is_saved
    index = ConsumeQueue(case.queue, case.shelf)
    index.restore(save.row)
    assert [entry.base_offset // 2 for entry in index.entries(0)] == list(range(20))
    assert (index.first_position, index.max_timestamp_ms) == (0, 19_000)


def test_a_long_tail_goes_to_files_that_are_synced() -> None:
    count = ROW_TAIL_BYTES_MAX // ENTRY_BYTES + 1
    for seed in range(10):
        case = Case(count, seed)
        save = case.index.begin_save()
        case.add(3)
        save.write()
        save.sync()
        assert save.row.filed == count
        assert save.row.tail == b""
        assert case.index.filed == 0, "nothing changes on another thread"
        case.index.finish_save(save, True)
        assert (case.index.filed, case.index.synced) == (count, count)
        assert case.numbers() == list(range(count + 3))
        case.files.crash()
        index = ConsumeQueue(case.queue, case.shelf)
        index.restore(save.row)
        assert index.has_files()
        assert [entry.base_offset // 2 for entry in index.entries(0)] == list(range(count))


def test_what_was_spilled_before_is_synced_by_the_save() -> None:
    for seed in range(10):
        case = Case(25, seed)
        case.index.spill()
        index = case.restored()
        case.files.crash()
        assert index.has_files()
        assert [entry.base_offset // 2 for entry in index.entries(0)] == list(range(25))


def test_a_failed_save_changes_nothing() -> None:
    case = Case(ROW_TAIL_BYTES_MAX // ENTRY_BYTES + 1)
    count = case.count
    save = case.index.begin_save()
    assert case.index.is_spilling
    case.index.finish_save(save, False)
    assert (case.index.filed, case.index.is_spilling, case.index.is_saved) == (0, False, False)
    case.add(2)
    index = case.restored()
    assert [entry.base_offset // 2 for entry in index.entries(0)] == list(range(count + 2))


def test_a_trim_is_to_be_saved_too() -> None:
    case = Case(20)
    case.restored()
    assert case.index.is_saved
    case.index.trim(700)
    assert not case.index.is_saved
    index = case.restored()
    assert [entry.base_offset // 2 for entry in index.entries(index.first)] == list(range(7, 20))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 130)), st.tuples(st.just("spill"), st.just(0)),
            st.tuples(st.just("trim"), st.integers(0, 6000)), st.tuples(st.just("restore"), st.just(0)),
            st.tuples(st.just("save"), st.booleans()), st.tuples(st.just("crash"), st.integers(0, 100)),
        ),
        max_size=25,
    )
)
def test_whatever_is_done_the_entries_are_those_added_and_not_trimmed(script: list[tuple[str, int]]) -> None:
    case = Case()
    first = 0
    for step, value in script:
        if step == "add":
            case.add(value)
        elif step == "spill":
            case.index.spill()
        elif step == "trim":
            case.index.trim(value)
            first = max(first, min(-(-value // 100), case.count))
        elif step == "restore":
            case.index = case.restored()
        elif step == "save":
            save = case.index.begin_save()
            case.add(3)
            save.write()
            save.sync()
            case.index.finish_save(save, bool(value))
            save.clean()
        else:
            case.restart()
        assert case.numbers(case.index.first) == list(range(first, case.count))
        assert case.queue.min_offset == 2 * first
        assert case.index.first_position == (100 * first if first < case.count else (1 << 63) - 1)


def test_queues_of_topics_of_the_same_name_have_folders_of_their_own() -> None:
    case = Case()
    topic = Topic(18, TopicConfig("meters", 1))
    topic.grow(1)
    other: Queue = topic.queues[0]
    assert case.shelf.folder_of(case.queue) == FOLDER / "meters@17" / "0"
    assert case.shelf.folder_of(other) == FOLDER / "meters@18" / "0"
