"""Reading: what is chosen, how it is read, and what each status means."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store_bench import ASYNC, LOG, QUEUES, SEGMENT_BYTES, StoreBench, read_all
from zrmq.errors import NotReadyError
from zrmq.files import remove_tree
from zrmq.protocol.batch import decode_records, iter_batches
from zrmq.protocol.requests import PullStatus
from zrmq.protocol.tags import filter_mask
from zrmq.store import reading
from zrmq.store.reading import HOLE_BYTES, JOIN_BYTES, Chunk
from zrmq.store.tables import Queue


@pytest.fixture
def bench() -> StoreBench:
    return StoreBench(segment_bytes=4 << 20)


def offsets(chunk: Chunk) -> list[int]:
    """Base offsets of the batches in a chunk."""
    return [header.base_offset for frame in chunk.frames for header, _ in iter_batches(frame)]


def filled(bench: StoreBench, count: int = 10, **more: int) -> Queue:
    """A queue of so many batches of two messages."""
    (queue,) = bench.topic(queue_count=1)
    for _ in range(count):
        bench.append(queue, count=2, **more)
    bench.flush()
    return queue


# --- what is chosen -----------------------------------------------------------------------------------------------------


def test_an_empty_queue_has_nothing(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    assert bench.store.read(queue, 0, 1000) == (PullStatus.NOTHING, [], 0, 0, 0)


def test_offsets_outside_the_queue_are_moved(bench: StoreBench) -> None:
    queue = filled(bench)
    assert bench.store.read(queue, 21, 1000) == (PullStatus.MOVED, [], 20, 0, 20)
    assert bench.store.read(queue, -1, 1000) == (PullStatus.MOVED, [], 0, 0, 20)
    assert bench.store.read(queue, 20, 1000) == (PullStatus.NOTHING, [], 20, 0, 20)


def test_what_is_not_visible_yet_has_nothing_and_moves_nobody(bench: StoreBench) -> None:
    """A group that begins behind an unflushed batch must not be sent back in front of it."""
    queue = filled(bench, 2)
    bench.append(queue, count=3)
    bench.store.write()
    for offset in (4, 5, 7):
        assert bench.store.read(queue, offset, 1000) == (PullStatus.NOTHING, [], offset, 0, 4)
    assert bench.store.read(queue, 8, 1000).status is PullStatus.MOVED
    assert offsets(bench.store.read(queue, 0, 100_000)) == [0, 2]


def test_whole_batches_up_to_the_bytes_asked_for(bench: StoreBench) -> None:
    queue = filled(bench, size=100)
    length = sum(map(len, bench.store.read(queue, 0, 1).frames))
    for asked, count in ((1, 1), (length, 1), (2 * length - 1, 1), (2 * length, 2), (5 * length, 5), (1 << 20, 10)):
        chunk = bench.store.read(queue, 0, asked)
        assert offsets(chunk) == list(range(0, 2 * count, 2)), asked
        assert chunk == (PullStatus.FOUND, chunk.frames, 2 * count, 0, 20)


def test_an_offset_inside_a_batch_gets_all_of_it(bench: StoreBench) -> None:
    queue = filled(bench)
    assert offsets(bench.store.read(queue, 7, 1)) == [6]
    assert offsets(bench.store.read(queue, 19, 1000)) == [18]


def test_unwanted_tags_are_passed_over_unread(bench: StoreBench) -> None:
    (queue,) = bench.topic(queue_count=1)
    for number in range(12):
        bench.append(queue, tag=("red", "blue", None)[number % 3])
    bench.flush()
    chunk = bench.store.read(queue, 0, 100_000, filter_mask("blue"))
    assert (offsets(chunk), chunk.next_offset) == ([1, 4, 7, 10], 12)
    chunk = bench.store.read(queue, 8, 100_000, filter_mask("red || blue"))
    assert (offsets(chunk), chunk.next_offset) == ([9, 10], 12)
    before = bench.files.counts["pread"]
    chunk = bench.store.read(queue, 0, 100_000, filter_mask("green"))
    assert chunk == (PullStatus.NOTHING, [], 12, 0, 12)
    assert bench.files.counts["pread"] == before
    assert offsets(bench.store.read(queue, 0, 100_000)) == list(range(12))


def test_a_read_passes_over_so_many_batches_only(bench: StoreBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ENTRIES_MAX", 5)
    queue = filled(bench, 12)
    seen = []
    offset = 0
    while offset < 24:
        chunk = bench.store.read(queue, offset, 1000, filter_mask("red"))
        assert chunk.status is PullStatus.NOTHING
        offset = chunk.next_offset
        seen.append(offset)
    assert seen == [10, 20, 24]
    chunks = [bench.store.read(queue, offset, 100_000) for offset in (0, 10, 20)]
    assert [chunk.next_offset for chunk in chunks] == [10, 20, 24], "those it returns count too: each is checked"


def test_time_finds_offsets(bench: StoreBench) -> None:
    (queue,) = bench.topic(queue_count=1)
    start = bench.clock.time_ms()
    for _ in range(5):
        bench.clock.advance(1000)
        bench.append(queue, count=2)
    bench.flush()
    times = {0: 0, start: 0, start + 1000: 0, start + 1001: 2, start + 5000: 8, start + 5001: 10}
    assert {at: bench.store.offset_at(queue, at) for at in times} == times
    bench.append(queue)
    assert bench.store.offset_at(queue, bench.clock.time_ms()) == 8
    assert bench.store.offset_at(queue, start + 9999) == 10, "no further than what is visible"


# --- how it is read -----------------------------------------------------------------------------------------------------


def test_neighbours_are_one_read_and_one_frame(bench: StoreBench) -> None:
    queue = filled(bench, 50)
    before = bench.files.counts["pread"]
    chunk = bench.store.read(queue, 0, 1 << 20)
    assert len(chunk.frames) == 1
    assert bench.files.counts["pread"] == before + 1


def test_other_queues_in_between_are_read_along_where_they_are_short(bench: StoreBench) -> None:
    (queue, other) = bench.topic()
    for _ in range(20):
        bench.append(queue)
        bench.append(other)
    bench.append(other, size=2 * HOLE_BYTES)
    for _ in range(20):
        bench.append(queue)
    bench.flush()
    before = bench.files.counts["pread"]
    chunk = bench.store.read(queue, 0, 1 << 20)
    assert offsets(chunk) == list(range(40))
    assert len(chunk.frames) == 1, "small pieces are joined"
    assert bench.files.counts["pread"] == before + 2


def test_large_pieces_stay_frames_of_their_own_in_order(bench: StoreBench) -> None:
    (queue, other) = bench.topic()
    sizes = [10, 20, 2 * JOIN_BYTES, 2 * JOIN_BYTES, 10, 20, 2 * JOIN_BYTES, 10]
    for size in sizes:
        bench.append(queue, size=size)
        bench.append(other, size=2 * HOLE_BYTES)
    bench.flush()
    chunk = bench.store.read(queue, 0, 1 << 20)
    assert offsets(chunk) == list(range(8))
    assert [len(frame) > JOIN_BYTES for frame in chunk.frames] == [False, True, True, False, True, False]


def test_runs_end_with_their_segment() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    assert offsets(bench.store.read(queue, 0, 1 << 20)) == list(range(queue.next_offset))
    assert bench.store.damage == []


def test_sequential_reading_costs_the_same_at_every_place(bench: StoreBench) -> None:
    queue = filled(bench, 300)
    bench.checkpoint()
    costs = set()
    offset = bench.store.read(queue, 0, 1).next_offset
    while offset < 600:
        before = bench.files.counts["pread"]
        offset = bench.store.read(queue, offset, 1).next_offset
        costs.add(bench.files.counts["pread"] - before)
    assert costs == {2}, "one for the entry, one for the batch"


def test_ten_readers_of_one_queue(bench: StoreBench) -> None:
    queue = filled(bench, 50)
    readers = dict.fromkeys(range(10), 0)
    for step in range(600):
        reader = step * 7 % 10
        chunk = bench.store.read(queue, readers[reader], 1 + reader * 100)
        if readers[reader] < 100:
            assert offsets(chunk)[0] == readers[reader]
        readers[reader] = chunk.next_offset
    assert set(readers.values()) == {100}


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 16), bytes_max=st.integers(1, 40_000), data=st.data())
def test_every_batch_is_read_exactly_once_whatever_is_asked_for(seed: int, bytes_max: int, data: st.DataObject) -> None:
    bench = StoreBench(seed, segment_bytes=64 * 1024)
    queues = bench.topic(queue_count=3, flush_mode=ASYNC)
    for _ in range(data.draw(st.integers(1, 60))):
        queue = queues[data.draw(st.integers(0, 2))]
        bench.append(queue, data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 50, 3000])))
        if data.draw(st.booleans()):
            bench.flush()
    bench.flush()
    for queue in queues:
        found = [header for header, _ in read_all(bench.store, queue, bytes_max)]
        assert [header.base_offset for header in found][:1] in ([], [0])
        assert all(one.next_offset == other.base_offset for one, other in pairwise(found))
        assert (found[-1].next_offset if found else 0) == queue.next_offset
        assert all(header.queue_id == queue.queue_id for header in found)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_damage_in_the_middle_of_a_run(bench: StoreBench) -> None:
    queue = filled(bench, 10)
    ends = [entry.position for entry in bench.store._views.index(queue).entries(0)]
    bench.rot(ends[4] + 120)
    chunk = bench.store.read(queue, 0, 1 << 20)
    assert (chunk.status, offsets(chunk), chunk.next_offset) == (PullStatus.FOUND, [0, 2, 4, 6], 8)
    chunk = bench.store.read(queue, 8, 1 << 20)
    assert (chunk.status, chunk.frames, chunk.next_offset) == (PullStatus.CORRUPT, [], 10)
    chunk = bench.store.read(queue, 10, 1 << 20)
    assert (chunk.status, offsets(chunk), chunk.next_offset) == (PullStatus.FOUND, [10, 12, 14, 16, 18], 20)
    assert len(bench.store.damage) == 1


def test_bad_sectors_cost_the_batches_on_them(bench: StoreBench) -> None:
    queue = filled(bench, 10, size=3000)
    positions = [entry.position for entry in bench.store._views.index(queue).entries(0)]
    path, at = bench.path_at(positions[5])
    bench.files.bad_ranges[path] = [(at + 2000, at + 2100)]
    statuses = []
    offset = 0
    while offset < 20:
        chunk = bench.store.read(queue, offset, 1)
        statuses.append(chunk.status)
        offset = chunk.next_offset
    assert statuses.count(PullStatus.CORRUPT) in (1, 2)
    assert statuses[5] is PullStatus.CORRUPT
    bench.files.bad_ranges.clear()
    assert len(bench.bodies(queue)) == 20


def test_a_system_that_refuses_is_asked_again(bench: StoreBench) -> None:
    queue = filled(bench)
    bench.files.fail("pread", errno.ENOMEM)
    with pytest.raises(NotReadyError, match="cannot be read just now"):
        bench.store.read(queue, 0, 1000)
    assert offsets(bench.store.read(queue, 0, 1000))
    assert bench.store.damage == []


def test_bytes_of_another_queue_are_not_served() -> None:
    """A queue file that points at somebody else's batch, with a CRC that checks out: the batch itself says whose it is."""
    bench = StoreBench()
    (queue, other) = bench.topic()
    bench.append(other)
    bench.append(queue)
    bench.flush()
    mine, theirs = (bench.store._views.index(one) for one in (queue, other))
    mine.tail[:] = theirs.tail
    assert bench.store.read(queue, 0, 1000).status is PullStatus.CORRUPT


def damaged_files(bench: StoreBench) -> Queue:
    """A queue most of whose entries are in a file that has rotted."""
    queue = filled(bench, 200)
    bench.checkpoint()
    bench.files.rot(QUEUES / "meters@1" / "0" / f"{0:020d}", 44 * 7 + 3)
    bench.append(queue)
    bench.flush()
    return queue


def test_damaged_queue_files_are_made_anew_from_the_log(bench: StoreBench) -> None:
    queue = damaged_files(bench)
    for look in (lambda: bench.store.read(queue, 14, 1000), lambda: bench.store.read(queue, 0, 1 << 20)):
        with pytest.raises(NotReadyError, match="made anew; ask again shortly"):
            look()
    bench.clock.advance(1000)
    job = bench.store.begin_maintenance()
    assert job is not None
    with pytest.raises(NotReadyError):
        bench.store.read(queue, 30, 1000)
    with pytest.raises(NotReadyError):
        bench.store.offset_at(queue, 5)
    bench.append(queue)
    bench.flush()
    assert bench.store.begin_checkpoint(force=True) is None, "not while the entries are being made"
    job.run()
    job.finish()
    assert len(bench.bodies(queue)) == 402
    bench.checkpoint()
    bench.crash()
    assert bench.store.recovery.queues_reindexed == 0
    assert len(bench.bodies(bench.queue())) == 402


def test_a_remake_that_fails_is_tried_again(bench: StoreBench) -> None:
    queue = damaged_files(bench)
    with pytest.raises(NotReadyError):
        bench.bodies(queue)
    bench.files.fail("free_bytes", errno.EIO)
    bench.maintain()
    with pytest.raises(NotReadyError):
        bench.bodies(queue)
    bench.maintain()
    assert len(bench.bodies(queue)) == 401


def test_a_queue_without_files_is_made_anew_while_it_is_served(bench: StoreBench) -> None:
    queue = damaged_files(bench)
    bench.store._open_files.close()
    remove_tree(bench.files, QUEUES)
    with pytest.raises(NotReadyError):
        bench.bodies(queue)
    bench.maintain()
    assert len(bench.bodies(queue)) == 401


def test_a_missing_segment_file_is_damage() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.store._open_files.close()
    bench.files.unlink(LOG / f"{SEGMENT_BYTES:020d}.log")
    assert 0 < len(bench.bodies(queue)) < queue.next_offset
    assert all(SEGMENT_BYTES <= start < 2 * SEGMENT_BYTES for start, _ in bench.store.damage)


def test_batches_deleted_under_a_queue_that_could_not_be_trimmed_are_moved_over() -> None:
    bench = StoreBench(retention_ms=1)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.checkpoint()
    index = bench.store._views.index(queue)
    index.is_spilling = True
    bench.maintain()
    assert bench.store.start_position == 2 * SEGMENT_BYTES
    chunk = bench.store.read(queue, 0, 1 << 20)
    assert (chunk.status, chunk.next_offset) == (PullStatus.MOVED, 1)
    assert bench.store.damage == []
    index.is_spilling = False
    chunk = bench.store.read(queue, 1, 1 << 20)
    assert chunk.status is PullStatus.MOVED
    assert chunk.next_offset == queue.min_offset > 10
    assert bench.bodies(queue)


def test_the_bodies_are_those_sent(bench: StoreBench) -> None:
    queue = filled(bench, 3)
    chunk = bench.store.read(queue, 0, 1 << 20)
    batches = [found for frame in chunk.frames for found in iter_batches(frame)]
    bodies = [body for header, whole in batches for body in decode_records(header, whole).bodies]
    assert [body.split()[0] for body in bodies] == [b"7/%d" % number for number in range(1, 7)]
