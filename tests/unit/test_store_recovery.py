"""Recovery: where the log ends, what is damage and what is a torn tail, and what the views are made from."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuzz.mutation import seal
from tests.unit.store_bench import FOLDER, LOG, QUEUES, SEGMENT_BYTES, StoreBench, batch, describe, fold, log_entries, run
from zrmq.errors import DamageError, FolderUnusableError, StoreFailedError
from zrmq.files import DiskFiles, read_file, remove_tree, replace_file
from zrmq.protocol.batch import BATCH_HEADER_BYTES, KIND_EVENT, BatchHeader, encode_entry
from zrmq.protocol.events import (
    BrokerStarted,
    GroupSubscribed,
    LeaseGranted,
    OffsetsCommitted,
    TopicConfig,
    TopicDeleted,
    TopicPut,
)
from zrmq.protocol.requests import PullStatus
from zrmq.store.relocation import Relocation
from zrmq.store.segment import segment_name
from zrmq.testing.files import PowerCut


@pytest.fixture
def bench() -> StoreBench:
    return StoreBench()


def bodies_of(bench: StoreBench, queue_id: int = 0) -> list[bytes]:
    return bench.bodies(bench.queue(queue_id=queue_id))


def overwrite(bench: StoreBench, position: int, data: bytes, synced: bool = True) -> None:
    """Put bytes into the log's files behind the store's back."""
    path, at = bench.path_at(position)
    file = bench.files.open(path)
    file.pwritev([data], at)
    if synced:
        file.fdatasync()


# --- where the log ends -------------------------------------------------------------------------------------------------


def test_flushed_batches_survive_and_later_ones_may_not(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, count=3)
    bench.flush()
    bench.append(queue, count=2)
    bench.crash()
    assert len(bodies_of(bench)) == 3
    assert bench.queue().next_offset == 3


def test_what_was_written_survives_the_end_of_the_process(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, count=3)
    bench.store.write()
    bench.append(queue, count=2)
    bench.kill()
    assert len(bodies_of(bench)) == 3


def test_an_unflushed_tail_is_cut_at_the_first_entry_that_does_not_check_out(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    first = bench.append(queue).end_position
    second = bench.append(queue).end_position
    bench.append(queue)
    bench.store.write()
    bench.files.kill()
    overwrite(bench, second - 3, b"\xff")
    bench.open()
    report = bench.store.recovery
    assert (report.end_position, report.damage) == (first, [])
    assert report.cut_bytes > 0
    assert len(bodies_of(bench)) == 2
    assert bench.queue().next_offset == 2


def test_what_was_cut_off_does_not_come_back(bench: StoreBench) -> None:
    """Entries behind the cut check out, and the log grows up to exactly where one begins. It must be gone by then."""
    (queue, _) = bench.topic()
    bench.flush()
    start = bench.store.appended_position
    torn = bench.store.append_event(TopicDeleted(99_999_990))  # as long as the start that will be written there
    for _ in range(20):
        bench.append(queue, size=100)
    bench.store.write()
    bench.files.kill()
    overwrite(bench, torn - 1, b"\xff")
    bench.open()
    assert bench.store.recovery.end_position == start
    assert bench.store.recovery.cut_bytes > 20 * 100
    assert bench.store.appended_position == torn, "the new entry is as long as the one that was torn"
    for _ in range(3):
        bench.kill()
        assert bodies_of(bench) == []
        assert bench.queue().next_offset == 0
        assert describe(bench.store.tables) == describe(fold(bench.disk))


def test_a_lost_write_in_front_of_a_kept_one_cuts_both(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.flush()
    start = bench.store.appended_position
    end = bench.append(queue, size=2000).end_position
    bench.store.write()
    bench.append(queue)
    bench.store.write()
    bench.files.kill()
    overwrite(bench, start, bytes(end - start))
    bench.open()
    assert bench.store.recovery.end_position == start
    assert bodies_of(bench) == []


def test_a_log_that_ends_with_a_full_segment(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    room = SEGMENT_BYTES - 40 - bench.store.appended_position
    size = next(size for size in range(room, 0, -1) if batch(size=size)[0].length == room)
    bench.append(queue, size=size)
    assert bench.store.appended_position == SEGMENT_BYTES - 40
    bench.flush()
    bench.crash()
    assert len(bodies_of(bench)) == 1
    bench.append(bench.queue())
    bench.flush()
    bench.crash()
    assert len(bodies_of(bench)) == 2


def test_a_segment_that_never_became_part_of_the_log_is_removed(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.flush()
    start = bench.store.appended_position
    while len(bench.segments()) == 1:
        bench.append(queue, size=900)
    bench.store.write()
    bench.files.kill()
    overwrite(bench, start, bytes(SEGMENT_BYTES - start))  # the new segment is there, the end of the old one is not
    bench.open()
    assert bench.segments() == [0]
    assert bench.store.recovery.end_position == start
    bench.fill_segments(bench.queue(), 2)
    bench.crash()
    assert len(bodies_of(bench)) == bench.queue().next_offset


def test_spares_are_not_trusted_after_a_crash(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 1)
    for _ in range(9):
        bench.append(queue, size=900)
    bench.flush()
    bench.maintain(2)
    assert [name for name in bench.files.listdir(LOG) if name.startswith("spare")]
    bench.files.crash()
    bench.open()
    assert not [name for name in bench.files.listdir(LOG) if name.startswith("spare")]


def test_spares_are_kept_over_a_clean_end(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    for _ in range(12):
        bench.append(queue, size=900)
    bench.flush()
    bench.maintain(2)
    spares = [name for name in bench.files.listdir(LOG) if name.startswith("spare")]
    assert spares
    replace_file(bench.files, LOG / "spare-99", b"of another length")
    bench.reopen()
    assert [name for name in bench.files.listdir(LOG) if name.startswith("spare")] == spares
    bench.fill_segments(bench.queue(), 1)
    assert [name for name in bench.files.listdir(LOG) if name.startswith("spare")] == []


# --- damage -------------------------------------------------------------------------------------------------------------


def damaged_bench(at: int) -> tuple[StoreBench, list[int]]:
    """Ten flushed batches of which the fourth has a flipped bit `at` bytes from its start; and where each ends."""
    bench = StoreBench()
    (queue, other) = bench.topic()
    ends = []
    for number in range(10):
        placed = bench.append(queue if number != 6 else other, count=2)
        ends.append(placed.end_position)
        bench.flush()
    bench.rot(ends[2] + at)
    return bench, ends


@pytest.mark.parametrize("at", [0, 4, 10, 20, 50, 90, BATCH_HEADER_BYTES + 10])
@pytest.mark.parametrize("lose_views", [False, True])
def test_damage_before_the_flushed_position_is_never_cut_off(at: int, lose_views: bool) -> None:
    bench, ends = damaged_bench(at)
    bench.files.crash()
    if lose_views:
        bench.files.unlink(FOLDER / "views.db")
        bench.files.fsync_dir(FOLDER)
    bench.open()
    report = bench.store.recovery
    assert report.damage == [(ends[2], ends[3])]
    assert report.end_position == ends[9]
    assert report.cut_bytes <= 0 or report.cut_bytes == 0
    assert bench.store.damage == [(ends[2], ends[3])]
    assert len(bodies_of(bench)) == 16
    assert len(bodies_of(bench, 1)) == 2
    assert (bench.queue().min_offset, bench.queue().next_offset) == (0, 18)


@pytest.mark.parametrize("at", [20, BATCH_HEADER_BYTES + 10])
def test_a_damaged_batch_answers_corrupt_and_says_where_to_go_on(at: int) -> None:
    bench, _ = damaged_bench(at)
    bench.crash()
    queue = bench.queue()
    chunk = bench.store.read(queue, 0, 100_000)
    assert (chunk.status, chunk.next_offset) == (PullStatus.FOUND, 6)
    for offset in (6, 7):
        chunk = bench.store.read(queue, offset, 100_000)
        assert (chunk.status, chunk.next_offset, chunk.frames) == (PullStatus.CORRUPT, 8, [])
    chunk = bench.store.read(queue, 8, 100_000)
    assert (chunk.status, chunk.next_offset) == (PullStatus.FOUND, 18)


def test_damage_is_remembered_over_a_checkpoint(bench: StoreBench) -> None:
    damaged, _ = damaged_bench(20)
    damaged.crash()
    before = describe(damaged.store.tables)
    damaged.checkpoint()
    damaged.crash()
    assert damaged.store.recovery.damage == []
    after = describe(damaged.store.tables)
    assert after["topics"] == before["topics"]
    assert damaged.store.read(damaged.queue(), 6, 1000).status is PullStatus.CORRUPT
    assert len(bodies_of(damaged)) == 16


def test_damage_found_while_serving(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    ends = [bench.append(queue).end_position for _ in range(5)]
    bench.flush()
    bench.rot(ends[1] + 30)
    assert bench.store.read(queue, 0, 100_000).next_offset == 2
    assert bench.store.read(queue, 2, 100_000).status is PullStatus.CORRUPT
    assert bench.store.read(queue, 3, 100_000).next_offset == 5
    assert bench.store.damage == [(ends[1], ends[2])]


def test_the_last_flushed_batch_is_protected_by_what_follows_it(bench: StoreBench) -> None:
    """Its flush is known from the next entry, though that one was never flushed itself."""
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    start = bench.store.appended_position
    end = bench.append(queue, count=2).end_position
    bench.flush()
    bench.append(queue)
    bench.store.write()
    bench.files.kill()
    bench.rot(start + BATCH_HEADER_BYTES + 20)
    bench.open()
    assert bench.store.recovery.damage == [(start, end)]
    assert bench.queue().next_offset == 4
    assert len(bodies_of(bench)) == 2


def test_the_last_flushed_batch_is_protected_by_the_views(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    start = bench.store.appended_position
    end = bench.append(queue).end_position
    bench.checkpoint()
    bench.rot(start + 20)
    bench.crash()
    assert bench.store.recovery.end_position == end
    assert bench.queue().next_offset == 2
    assert bench.store.read(bench.queue(), 1, 1000).status is PullStatus.CORRUPT


@pytest.mark.parametrize("has_views", [True, False])
def test_what_proves_a_flush_is_kept_before_it_is_erased(has_views: bool) -> None:
    """Only an entry behind the torn one says how far the log was flushed. The start erases it, and may be cut short itself."""

    def damaged() -> tuple[StoreBench, int]:
        bench = StoreBench()
        (queue, _) = bench.topic()
        bench.append(queue)
        bench.flush()
        if has_views:
            bench.checkpoint()
        start = bench.store.appended_position
        bench.append(queue, count=3)
        bench.append(queue)
        bench.flush()
        flushed = bench.store.flushed_position
        bench.append(queue)
        bench.append(queue)
        bench.store.write()
        bench.files.kill()
        bench.rot(start + 20)
        bench.rot(flushed + 20)
        return bench, start

    def check(bench: StoreBench, start: int) -> None:
        assert bench.open().recovery.damage[0][0] == start
        assert [body[:4] for body in bodies_of(bench)[:2]] == [b"7/1 ", b"7/5 "]

    for operation, error_number, path in (("commit", errno.ENOSPC, ""), ("fdatasync", errno.EIO, "commitlog")):
        bench, start = damaged()
        bench.files.fail(operation, error_number, path=path)
        with pytest.raises(FolderUnusableError):
            bench.open()
        bench.files.heal()
        check(bench, start)
    for changes in range(12):
        bench, start = damaged()
        bench.files.cut_power_after(changes)
        with suppress(PowerCut):
            bench.open()
        bench.files.crash()
        check(bench, start)


def test_a_stretch_that_is_damage_in_front_and_torn_behind(bench: StoreBench) -> None:
    """One unreadable stretch reaches over the flushed position. The log goes on at that position: not before it, not behind."""
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    start = bench.store.appended_position
    bench.append(queue, count=3)
    bench.flush()
    flushed = bench.store.flushed_position
    bench.append(queue)
    bench.append(queue)
    bench.store.write()
    bench.files.kill()
    bench.rot(start + 20)
    bench.rot(flushed + 20)
    bench.open()
    assert bench.store.recovery.damage == [(start, flushed)]
    assert bench.store.recovery.end_position == flushed
    assert len(bodies_of(bench)) == 1
    bench.append(bench.queue())
    bench.flush()
    bench.crash()
    assert len(bodies_of(bench)) == 2


def test_damaged_events_cost_only_themselves(bench: StoreBench) -> None:
    bench.topic()
    start = bench.store.append_event(GroupSubscribed("one", "meters", 5, []))
    bench.flush()
    end = bench.store.append_event(GroupSubscribed("two", "meters", 5, []))
    bench.flush()
    bench.store.append_event(GroupSubscribed("three", "meters", 5, []))
    bench.flush()
    bench.store.append_event(LeaseGranted("one", 1, 0, "c", 1))
    bench.flush()
    bench.rot(start + 42)
    bench.crash()
    assert bench.store.recovery.damage == [(start, end)]
    assert sorted(bench.store.tables.groups) == ["one", "three"]


def test_offsets_are_not_given_again_when_a_commit_proves_they_were(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, count=3)
    bench.flush()
    start = bench.store.appended_position
    bench.append(queue, count=4)
    bench.flush()
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 7)]))
    bench.flush()
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 7)]))
    bench.flush()
    bench.rot(start + 20)
    bench.crash()
    next_offset = bench.queue().next_offset
    assert next_offset >= 7
    assert bench.append(bench.queue()).base_offset == next_offset
    bench.flush()
    chunk = bench.store.read(bench.queue(), 3, 1000)
    assert (chunk.status, chunk.next_offset) == (PullStatus.CORRUPT, next_offset)
    assert len(bodies_of(bench)) == 4


@pytest.mark.parametrize("lose_views", [False, True])
def test_offsets_that_a_damaged_stretch_may_have_held_are_not_given_again(bench: StoreBench, lose_views: bool) -> None:
    """Whoever has read them goes on behind them, and would pass over what is stored in their place."""
    (queue, other) = bench.topic()
    bench.append(queue, count=3)
    bench.flush()
    start = bench.store.appended_position
    bench.append(queue, count=4)
    bench.flush()
    for _ in range(2):
        bench.append(other)  # known to be as long as it is, and to be flushed behind the damage
        bench.flush()
    bench.rot(start + 20)
    bench.crash()
    assert (bench.queue().next_offset, bench.queue(queue_id=1).next_offset) == (3 + 3 * 65_536, 2)
    assert bench.append(bench.queue()).base_offset >= 7
    bench.flush()
    next_offset = bench.queue().next_offset
    if lose_views:
        bench.files.unlink(FOLDER / "views.db")
    bench.crash()
    assert bench.queue().next_offset == next_offset, "said once, and known from then on"


def test_a_stretch_too_short_for_a_batch_skips_no_offsets(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, count=3)
    bench.flush()
    start = bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 2)]))
    bench.flush()
    for _ in range(2):
        bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 3)]))
        bench.flush()
    bench.rot(start + 42)
    bench.crash()
    assert len(bench.store.recovery.damage) == 1
    assert bench.queue().next_offset == 3


def test_what_is_damaged_may_have_been_a_start(bench: StoreBench) -> None:
    """A life of the broker must not pass for an earlier one: lease epochs and the name of the life are made of the number."""
    first = highest = bench.store.boot
    starts: list[int] = []
    for _ in range(6):
        for _ in range(2):
            starts.append(bench.store.appended_position)
            bench.crash()
            assert bench.store.boot > highest
            highest = bench.store.boot
        bench.store.append_event(OffsetsCommitted("g", "", []))
        bench.flush()
        for position in starts:
            bench.rot(position + 42)
        starts.clear()
    assert len(bench.store.recovery.damage) >= 5
    assert highest < first + 100, "what was counted once is not counted again at each start"


def test_a_hole_at_the_end_of_a_queue(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, count=3)
    bench.flush()
    start = bench.store.appended_position
    bench.append(queue, count=4)
    bench.flush()
    for _ in range(2):
        bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 7)]))
        bench.flush()
    bench.rot(start + 20)
    bench.crash()
    end = bench.queue().next_offset
    for offset in (3, 6):
        chunk = bench.store.read(bench.queue(), offset, 1000)
        assert (chunk.status, chunk.next_offset) == (PullStatus.CORRUPT, end)
    assert bench.store.read(bench.queue(), end, 1000).status is PullStatus.NOTHING


def test_a_misdirected_write_is_damage_at_both_places(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    ends = []
    for number in range(10):
        if number == 7:
            path, _ = bench.path_at(ends[-1])
            bench.files.misdirect(path, ends[2] - ends[6])
        ends.append(bench.append(queue).end_position)
        bench.flush()
    bench.crash()
    report = bench.store.recovery
    assert report.end_position == ends[9]
    assert report.damage == [(ends[2], ends[3]), (ends[6], ends[7])]
    assert len(bodies_of(bench)) == 8
    assert bench.queue().next_offset == 10


def test_an_unreadable_sector_costs_only_what_is_in_it(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    ends = [bench.append(queue, size=1000).end_position for _ in range(12)]
    bench.flush()
    bench.append(queue)
    bench.flush()
    bench.files.kill()
    bench.files.bad_ranges[LOG / segment_name(0)] = [(ends[3] + 200, ends[3] + 300)]
    bench.open()
    assert bench.store.recovery.end_position > ends[-1]
    assert bench.queue().next_offset == 13
    assert 7 <= len(bodies_of(bench)) < 13, "what shares the file system's block of 4 KiB is lost with it"


def test_what_cannot_be_read_at_the_end_is_not_taken_for_never_written(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    bench.checkpoint()
    known = bench.store.appended_position
    bench.fill_segments(queue, 3)
    before, files, segments = bodies_of(bench), bench.files.listdir(LOG), bench.segments()
    bench.files.kill()
    for start in segments:
        bench.files.bad_ranges[LOG / segment_name(start)] = [(0 if start else known, SEGMENT_BYTES)]
    with pytest.raises(FolderUnusableError, match="does not give .* may go on there. Check the disk") as caught:
        bench.open()
    assert caught.value.facts["end"] > known
    assert bench.files.listdir(LOG) == files
    bench.files.bad_ranges.clear()
    bench.open()
    assert bodies_of(bench) == before


def test_records_at_the_end_that_cannot_be_read_may_have_been_acknowledged(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue, size=9000)
    bench.flush()
    bench.files.kill()
    path = LOG / segment_name(0)
    bench.files.bad_ranges[path] = [(8200, 8300)]
    with pytest.raises(FolderUnusableError, match="does not give positions 8192 to"):
        bench.open()
    bench.files.bad_ranges.clear()
    bench.files.replace(path, 8192, bytes(4096))  # what the error says: a copy with zeros
    bench.open()
    assert bodies_of(bench) == []


def test_no_segment_is_removed_that_cannot_be_read(bench: StoreBench) -> None:
    """The end of the log is torn, and whether what lies behind it ever was a part of it nobody can tell."""
    (queue, _) = bench.topic()
    bench.flush()
    torn = bench.append(queue).end_position
    while len(bench.segments()) < 2:
        bench.append(queue, size=1000)
    bench.store.write()
    bench.files.kill()
    overwrite(bench, torn - 1, b"\xff")
    path = LOG / segment_name(SEGMENT_BYTES)
    bench.files.bad_ranges[path] = [(0, 10)]
    with pytest.raises(FolderUnusableError, match="does not give"):
        bench.open()
    bench.files.bad_ranges.clear()
    assert bench.open().recovery.cut_bytes > 0
    assert bench.segments() == [0]


def test_a_bad_sector_where_nothing_was_written_is_no_end(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    bench.files.kill()
    bench.files.bad_ranges[LOG / segment_name(0)] = [(SEGMENT_BYTES - 4096, SEGMENT_BYTES)]
    bench.open()
    assert len(bodies_of(bench)) == 1


@pytest.mark.parametrize("operation", ["open", "size"])
def test_a_segment_that_cannot_be_opened_costs_only_what_is_in_it(bench: StoreBench, operation: str) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    total = queue.next_offset
    bench.checkpoint()
    bench.files.kill()
    bench.files.fail(operation, errno.EIO, times=999, path=segment_name(SEGMENT_BYTES))
    bench.open()
    assert bench.queue().next_offset == total
    assert total // 2 < len(bodies_of(bench)) < total or operation == "size", "what it has can be read"


def test_a_segment_that_cannot_be_opened_is_not_passed_over_by_a_replay(bench: StoreBench) -> None:
    """What it says of topics and offsets would be lost for good, and the next attempt may succeed."""
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    before = bodies_of(bench)
    bench.files.kill()
    bench.files.fail("open", errno.EIO, times=99, path=segment_name(SEGMENT_BYTES))
    with pytest.raises(FolderUnusableError, match="cannot be used"):
        bench.open()
    bench.files.heal()
    bench.open()
    assert bodies_of(bench) == before
    assert bench.store.recovery.damage == []


def test_a_running_store_passes_over_a_segment_that_cannot_be_opened(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.reopen()
    total = len(bodies_of(bench))
    bench.store._open_files.close()
    bench.files.fail("open", errno.EIO, times=999, path=segment_name(SEGMENT_BYTES))
    assert total // 2 < len(bodies_of(bench)) < total


def test_a_last_segment_that_cannot_be_opened_is_no_end(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.flush()
    files = bench.files.listdir(LOG)
    bench.files.kill()
    bench.files.fail("open", errno.EIO, times=999, path=segment_name(bench.segments()[-1]))
    with pytest.raises(FolderUnusableError, match="cannot be used"):
        bench.open()
    assert bench.files.listdir(LOG) == files


def test_a_damaged_segment_header_costs_nothing(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    count = queue.next_offset
    bench.rot(SEGMENT_BYTES + 20)
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.open()
    assert bench.store.recovery.damage == [(SEGMENT_BYTES, SEGMENT_BYTES + 64)]
    assert len(bodies_of(bench)) == count


def test_a_segment_whose_file_has_grown_costs_nothing(bench: StoreBench) -> None:
    bench.topic()
    bench.fill_segments(bench.queue(), 3)
    before = bench.bodies(bench.queue())
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    first, second, *_ = bench.segments()
    file = bench.files.open(LOG / segment_name(first))
    file.pwritev([bytes(2 * SEGMENT_BYTES)], second - first)
    file.fdatasync()
    bench.open()
    assert bench.bodies(bench.queue()) == before
    bench.append(bench.queue())
    bench.flush()
    assert len(bench.bodies(bench.queue())) == len(before) + 1


def test_what_is_no_segment_in_the_place_of_one_is_refused(bench: StoreBench) -> None:
    bench.topic()
    bench.append(bench.queue())
    bench.flush()
    bench.store.close()
    stray = LOG / segment_name(1)
    replace_file(bench.files, stray, b"notes of mine")
    with pytest.raises(FolderUnusableError, match="is no segment of the log"):
        bench.open()
    bench.files.unlink(stray)
    bench.open()
    assert len(bench.bodies(bench.queue())) == 1


def test_an_offset_that_no_queue_has_is_refused(bench: StoreBench) -> None:
    bench.topic()
    position = bench.store.appended_position
    bench.append(bench.queue())
    bench.flush()
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    path, at = bench.path_at(position)
    entry = bytearray(read_file(bench.files, path)[at : at + 2 * BATCH_HEADER_BYTES])
    entry = entry[: int.from_bytes(entry[4:8], "little")]
    entry[48:56] = b"\xff" * 8
    file = bench.files.open(path)
    file.pwritev([seal(bytes(entry))], at)
    with pytest.raises(DamageError, match="no queue is that long"):
        bench.open()


def test_a_missing_segment_in_the_middle(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    total = queue.next_offset
    bench.files.crash()
    bench.files.unlink(LOG / segment_name(SEGMENT_BYTES))
    bench.files.fsync_dir(LOG)
    bench.files.unlink(FOLDER / "views.db")
    bench.files.fsync_dir(FOLDER)
    bench.open()
    assert bench.store.recovery.damage == [(SEGMENT_BYTES, 2 * SEGMENT_BYTES)]
    assert bench.queue().next_offset == total
    kept = len(bodies_of(bench))
    assert 0 < kept < total


def test_a_log_that_cannot_make_up_for_the_views_is_told_by_what_is_missing(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 5)
    bench.store.close()
    starts = bench.segments()
    for start in (starts[1], starts[3]):
        bench.files.unlink(LOG / segment_name(start))
    replace_file(bench.files, FOLDER / "views.db", b"nonsense")
    missing = f"positions {starts[1]} to {starts[2]} and {starts[3]} to {starts[4]} is gone"
    with pytest.raises(FolderUnusableError, match=missing) as caught:
        bench.open()
    assert caught.value.facts["missing"] == [(starts[1], starts[2]), (starts[3], starts[4])]


@pytest.mark.parametrize("has_file", [True, False])
def test_a_segment_that_the_power_took_of_what_was_not_flushed(bench: StoreBench, has_file: bool) -> None:
    """The log ends before it, also when a later one is there, and the views are to be made from it."""
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.flush()
    total, segments = queue.next_offset, len(bench.segments())
    while len(bench.segments()) < segments + 3:
        bench.append(queue, size=500)
    bench.store.write()
    bench.files.kill()
    bench.files.unlink(LOG / segment_name(bench.segments()[-2]))
    bench.files.fsync_dir(LOG)
    bench.files.unlink(FOLDER / "views.db")
    if has_file:
        replace_file(bench.files, FOLDER / "views.db", b"")
    bench.open()
    assert bench.store.recovery.is_complete
    assert bench.store.recovery.damage == []
    assert len(bodies_of(bench)) >= total


def test_a_missing_segment_under_intact_views(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    total = queue.next_offset
    bench.checkpoint()
    bench.files.crash()
    bench.files.unlink(LOG / segment_name(SEGMENT_BYTES))
    bench.files.fsync_dir(LOG)
    bench.open()
    assert 0 < len(bodies_of(bench)) < total
    assert bench.queue().next_offset == total
    assert bench.store.recovery.damage == [(SEGMENT_BYTES, 2 * SEGMENT_BYTES)]


def test_segments_missing_in_front_after_a_clean_end_are_told(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.store.close()
    for start in (0, SEGMENT_BYTES):
        bench.files.unlink(LOG / segment_name(start))
    bench.open()
    assert bench.store.recovery.is_clean
    assert bench.store.damage == [(0, 2 * SEGMENT_BYTES)]


def test_segments_that_retention_deletes_are_not_missing() -> None:
    bench = StoreBench(retention_ms=10_000)
    bench.topic()
    bench.fill_segments(bench.queue(), 4)
    bench.checkpoint()
    bench.clock.advance(20_000)
    bench.maintain(3)
    bench.kill()
    assert bench.segments()[0] > 0
    assert bench.store.damage == []
    assert bench.reopen().damage == []


def test_a_log_without_its_end_is_not_gone_on_with(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.store.close()
    names = bench.files.listdir(LOG)
    kept = read_file(bench.files, LOG / names[-1])
    bench.files.unlink(LOG / names[-1])
    with pytest.raises(FolderUnusableError, match="files are missing. Bring them back; or delete views.db"):
        bench.open()
    replace_file(bench.files, LOG / names[-1], kept)
    assert len(bench.open().tables.topics) == 1


def test_a_start_that_is_refused_removes_nothing_of_an_older_log() -> None:
    bench = StoreBench(retention_ms=10_000)
    bench.topic()
    bench.fill_segments(bench.queue(), 4)
    bench.flush()
    older = {name: read_file(bench.files, LOG / name) for name in bench.files.listdir(LOG)}
    bench.fill_segments(bench.queue(), 4)
    bench.flush()
    bench.checkpoint()
    bench.clock.advance(20_000)
    bench.maintain(8)
    bench.checkpoint()
    bench.store.close()
    assert bench.segments()[0] > 4 * SEGMENT_BYTES
    remove_tree(bench.files, LOG)
    bench.files.mkdir(LOG)
    for name, data in older.items():
        replace_file(bench.files, LOG / name, data)
    with pytest.raises(FolderUnusableError, match="files are missing. Bring them back; or delete views.db"):
        bench.open()
    assert bench.files.listdir(LOG) == list(older)


def test_the_way_out_that_the_error_names_works(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.store.close()
    bench.files.unlink(LOG / bench.files.listdir(LOG)[-1])
    bench.files.unlink(FOLDER / "views.db")
    remove_tree(bench.files, QUEUES)
    bench.open()
    assert bodies_of(bench)


@pytest.mark.parametrize("is_batch", [True, False])
@pytest.mark.parametrize("is_followed", [True, False])
def test_entries_of_a_newer_format_are_not_written_over(bench: StoreBench, is_batch: bool, is_followed: bool) -> None:
    """Here they end the log, or would be taken for damage."""
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    position = bench.store.appended_position
    end = bench.append(queue).end_position if is_batch else bench.store.append_event(GroupSubscribed("one", "meters", 5, []))
    bench.flush()
    if is_followed:
        bench.append(queue)
        bench.flush()
    bench.files.kill()
    path, at = bench.path_at(position)
    entry = bytearray(read_file(bench.files, path)[at : at + end - position])
    entry[2] = 2
    bench.files.replace(path, at, seal(bytes(entry)))
    before = read_file(bench.files, path)
    with pytest.raises(FolderUnusableError, match=f"an entry of format 2 at {position} .* a newer zrmq wrote it. Upgrade"):
        bench.open()
    assert read_file(bench.files, path) == before
    bench.files.kill()
    bench.files.replace(path, at, bytes(entry))  # the version byte alone has rotted
    bench.open()
    assert bench.store.recovery.damage == ([(position, end)] if is_followed else [])


def test_nor_are_those_behind_one_that_has_rotted(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    position = bench.store.appended_position
    middle = bench.append(queue).end_position
    bench.flush()
    end = bench.append(queue).end_position
    bench.flush()
    bench.files.kill()
    path, at = bench.path_at(position)
    data = read_file(bench.files, path)[at : at + end - position]
    entries = [bytearray(data[: middle - position]), bytearray(data[middle - position :])]
    for entry in entries:
        entry[2] = 2
    rotted, sound = (bytearray(seal(bytes(entry))) for entry in entries)
    rotted[20] ^= 1
    bench.files.replace(path, at, bytes(rotted + sound))
    before = read_file(bench.files, path)
    with pytest.raises(FolderUnusableError, match=f"an entry of format 2 at {middle} "):
        bench.open()
    assert read_file(bench.files, path) == before


def test_entries_of_a_newer_version_are_not_skipped(bench: StoreBench) -> None:
    for kind, payload in ((9, b"?"), (KIND_EVENT, b"\x92\xcc\xfa\x01")):
        other = StoreBench()
        end = other.store.flushed_position
        other.files.kill()
        overwrite(
            other, end, encode_entry(kind, payload, epoch=0, position=end, flushed_position=end, store_timestamp_ms=1)
        )
        with pytest.raises(FolderUnusableError, match="a newer zrmq wrote it"):
            other.open()


# --- the views ----------------------------------------------------------------------------------------------------------


def busy(bench: StoreBench) -> None:
    """A few of everything, over several segments, partly saved."""
    first = bench.topic("first", 3)
    bench.topic("second", 1)
    for number in range(60):
        bench.append(first[number % 3], count=1 + number % 4, size=300, producer_id=number % 5 + 1)
        bench.append(bench.queue("second"), producer_id=9)
        bench.store.append_event(OffsetsCommitted(f"g{number % 3}", "", [(1, number % 3, number % 7)]))
        if number == 20:
            bench.store.append_event(GroupSubscribed("g1", "first", 77, [(0, 5)]))
            bench.store.append_event(LeaseGranted("g1", 1, 0, "client", 9))
        if number == 30:
            bench.checkpoint()
        if number == 40:
            bench.store.append_event(TopicDeleted(2))
            bench.topic("second", 2)
        bench.flush()


@pytest.mark.parametrize("lose", ["nothing", "views", "queues", "both"])
def test_what_can_be_made_again_is_made_again(bench: StoreBench, lose: str) -> None:
    busy(bench)
    before = {name: [bench.bodies(queue) for queue in topic.queues] for name, topic in bench.store.tables.topics.items()}
    bench.files.crash()
    if lose in ("views", "both"):
        bench.files.unlink(FOLDER / "views.db")
        bench.files.fsync_dir(FOLDER)
    if lose in ("queues", "both"):
        remove_tree(bench.files, QUEUES)
        bench.files.fsync_dir(FOLDER)
    bench.open()
    report = bench.store.recovery
    assert report.has_views == (lose in ("nothing", "queues"))
    assert (report.replayed_from > 0) == report.has_views
    assert describe(bench.store.tables) == describe(fold(bench.disk))
    after = {name: [bench.bodies(queue) for queue in topic.queues] for name, topic in bench.store.tables.topics.items()}
    assert after == before


def test_queues_without_files_are_made_from_the_log(bench: StoreBench) -> None:
    (queue, other) = bench.topic()
    for _ in range(150):  # long enough for a file
        bench.append(queue, size=10)
        bench.flush()
    bench.append(other)
    bench.checkpoint()
    assert bench.files.listdir(QUEUES / "meters@1") == ["0"], "the short one is in views.db"
    bench.files.crash()
    remove_tree(bench.files, QUEUES)
    bench.open()
    assert bench.store.recovery.queues_reindexed == 1
    assert len(bodies_of(bench)) == 150
    bench.append(bench.queue())
    bench.flush()
    bench.checkpoint()
    bench.crash()
    assert bench.store.recovery.queues_reindexed == 0
    assert len(bodies_of(bench)) == 151


def test_only_what_was_not_saved_is_replayed(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 5)
    bench.checkpoint()
    position = bench.store.checkpoint_position
    bench.append(queue)
    bench.flush()
    bench.files.crash()
    read: list[str] = []
    bench.files.before = lambda operation, path: read.append(path.name) if operation == "pread" else None
    bench.open()
    assert bench.store.recovery.replayed_from == position
    assert bench.store.recovery.replayed_entries == 1
    scanned = {name for name in read if read.count(name) > 1 and name.endswith(".log")}  # a header is read of each
    assert scanned <= {segment_name(start) for start in bench.segments()[-1:]}


def test_a_clean_end_is_believed_after_one_look(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.close()
    read: list[str] = []
    bench.files.before = lambda operation, path: read.append(path.name) if operation == "pread" else None
    bench.open()
    assert [name for name in read if name.endswith(".log")] == [segment_name(0)] * 2, "its header, and what lies at the end"
    bench.files.before = None
    bench.append(bench.queue())
    bench.flush()
    bench.crash()
    assert not bench.store.recovery.is_clean, "the mark of a clean end is gone once the log goes on"
    assert len(bodies_of(bench)) == 2


@pytest.mark.parametrize("segments", [0, 2])
def test_a_clean_end_is_not_believed_where_the_log_goes_on(tmp_path: Path, segments: int) -> None:
    """A copy of views.db from before the last run, put back by somebody: nothing behind that clean end may be written over."""
    bench = StoreBench(files=DiskFiles(), folder=tmp_path / "data")
    views, copy = bench.folder / "views.db", tmp_path / "copy"
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.close()
    shutil.copy(views, copy)
    bench.open()
    bench.append(bench.queue(), count=5)
    bench.flush()
    bench.fill_segments(bench.queue(), segments)
    before = bodies_of(bench)
    bench.store.close()
    for path in bench.folder.glob("views.db*"):
        path.unlink()
    shutil.copy(copy, views)
    bench.open()
    assert bodies_of(bench) == before
    assert not bench.store.recovery.damage
    bench.reopen()
    assert bodies_of(bench) == before
    bench.store.close()


def test_damage_right_behind_a_clean_end_is_damage(bench: StoreBench) -> None:
    """The first entry of the next run rots: without the mark being taken back, all of that run would seem never written."""
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.close()
    end = bench.store.flushed_position
    bench.open()
    bench.append(bench.queue())
    bench.flush()
    bench.append(bench.queue())
    bench.flush()
    bench.rot(end + 42)
    bench.crash()
    assert bench.store.recovery.damage[0][0] == end
    assert len(bodies_of(bench)) == 3


def test_views_that_cannot_be_read_are_made_again(bench: StoreBench) -> None:
    busy(bench)
    bench.files.crash()
    replace_file(bench.files, FOLDER / "views.db", b"nonsense" * 1000)
    bench.open()
    assert not bench.store.recovery.has_views
    assert describe(bench.store.tables) == describe(fold(bench.disk))
    bench.checkpoint()
    bench.crash()
    assert bench.store.recovery.has_views


@pytest.mark.parametrize("rubbish", [b"", b"nonsense" * 1000])
def test_views_that_cannot_be_read_are_not_given_up_when_the_log_has_lost_its_beginning(
    bench: StoreBench, rubbish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event that made the topic is deleted, and there was no room to say it again: without views.db its messages belong to
    nobody, and retention removes them."""
    monkeypatch.setattr(Relocation, "go_on", lambda self, *where: False)
    bench.topic("brief", 1, retention_bytes=1)
    bench.topic("kept", 1)
    bench.fill_segments(bench.queue("brief"), 3)
    bench.fill_segments(bench.queue("kept"), 2)
    bench.checkpoint()
    bench.maintain()
    assert bench.store.start_position > 0
    bodies, views = bench.bodies(bench.queue("kept")), FOLDER / "views.db"
    bench.files.kill()
    bench.files.rename(views, FOLDER / "aside")
    replace_file(bench.files, views, rubbish)
    start = bench.segments()[0]
    with pytest.raises(FolderUnusableError, match=rf"cannot be read.* positions 0 to {start} is gone.* Bring the file back"):
        bench.open()
    bench.files.rename(FOLDER / "aside", views)
    bench.open()
    bench.maintain(3)
    assert bench.bodies(bench.queue("kept")) == bodies


def test_files_of_topics_that_are_gone_are_removed(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    for _ in range(150):
        bench.append(queue, size=10)
    bench.flush()
    bench.checkpoint()
    assert bench.files.listdir(QUEUES) == ["meters@1"]
    bench.store.append_event(TopicDeleted(1))
    bench.flush()
    bench.crash()
    assert bench.files.listdir(QUEUES) == ["meters@1"], "views.db still speaks of them"
    bench.checkpoint()
    assert bench.files.listdir(QUEUES) == []
    bench.files.mkdir(QUEUES / "left@9" / "0")
    bench.reopen()
    assert bench.files.listdir(QUEUES) == []


def test_a_topic_whose_deletion_is_damaged_ends_with_the_next_of_its_name(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    bench.checkpoint()
    position = bench.store.appended_position
    bench.store.append_event(TopicDeleted(1))
    bench.store.append_event(TopicPut(2, TopicConfig("meters", 1)))
    bench.append(bench.queue(), count=3)
    bench.flush()
    bench.append(bench.queue())
    bench.flush()
    bench.rot(position + 41)
    for how in (bench.crash, bench.reopen, bench.crash):
        how()
        assert list(bench.store.tables.topics_by_id) == [2]
        assert len(bodies_of(bench)) == 4
        bench.checkpoint()


def test_the_report_counts(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.append_event(TopicDeleted(1))
    bench.flush()
    entries = len(log_entries(bench.disk))
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.open()
    report = bench.store.recovery
    assert (report.replayed_entries, report.unplaced_batches, report.queues_reindexed) == (entries, 0, 0)
    assert isinstance(log_entries(bench.disk)[-1][1], BrokerStarted)
    assert sum(isinstance(content, BatchHeader) for _, content in log_entries(bench.disk)) == 1


def test_batches_of_a_topic_that_nobody_knows_are_counted(bench: StoreBench) -> None:
    """The event that made the topic is damaged, and the views are lost: its messages have no name to be served under."""
    start = bench.store.appended_position
    (queue, _) = bench.topic()
    bench.flush()
    for _ in range(3):
        bench.append(queue)
        bench.flush()
    bench.rot(start + 42)
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.files.fsync_dir(FOLDER)
    bench.open()
    assert bench.store.recovery.unplaced_batches == 3
    assert bench.store.tables.topics == {}


def test_a_job_that_was_begun_before_a_crash_harms_nobody(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    job, before = bench.store.begin_flush(), bench.store.boot
    bench.files.crash()
    bench.open()
    run(job)
    assert bench.store.failure is None
    assert bench.store.boot == before + 1


def test_a_segment_keeps_its_length_whose_first_flush_failed() -> None:
    for seed in range(20):
        bench = StoreBench(seed)
        (queue, _) = bench.topic()
        bench.fill_segments(queue, 1)
        while len(bench.segments()) == 2:
            bench.append(queue, size=500)
            if len(bench.segments()) == 2:
                bench.flush()
        bench.store.write()
        bench.files.fail("fdatasync", path=segment_name(2 * SEGMENT_BYTES))
        with suppress(StoreFailedError):
            bench.store.flush()
        bench.kill()
        bench.fill_segments(bench.queue(), 2)
        total = bench.queue().next_offset
        bench.crash()
        assert bench.store.recovery.damage == []
        assert bench.queue().next_offset == total
        assert [segment.end - segment.start for segment in bench.store._log.segments[:-1]] == [SEGMENT_BYTES] * 4
