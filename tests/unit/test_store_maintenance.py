"""Upkeep: segments deleted and recycled, spares, the disk's room, and the search for damage."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.unit.store_bench import FOLDER, LOG, QUEUES, SEGMENT_BYTES, StoreBench, run
from zrmq.errors import DiskFullError
from zrmq.protocol.events import OffsetsCommitted, TopicDeleted
from zrmq.protocol.requests import PullStatus
from zrmq.store import maintenance
from zrmq.store.config import StoreConfig
from zrmq.store.job import Job
from zrmq.store.maintenance import TRIMS_MAX
from zrmq.store.relocation import Relocation
from zrmq.store.segment import segment_name

HOUR_MS = 3_600_000


def spares(bench: StoreBench) -> list[str]:
    return [name for name in bench.files.listdir(LOG) if name.startswith("spare")]


def old_bench(segments: int = 4, **config: Any) -> StoreBench:
    """A log of so many segments that is saved, and an hour old."""
    bench = StoreBench(**{"retention_ms": HOUR_MS, **config})
    (queue, _) = bench.topic()
    bench.fill_segments(queue, segments - len(bench.segments()))
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    return bench


def begin_deletion(bench: StoreBench) -> Job:
    """What the segments said was said again; the job that deletes them has not run."""
    bench.clock.advance(1000)
    assert bench.store.begin_maintenance() is None
    bench.flush()
    job = bench.store.begin_maintenance()
    assert job is not None
    return job


# --- segments that go -----------------------------------------------------------------------------------------------------


def test_expired_segments_go_and_the_queue_begins_later() -> None:
    bench = old_bench()
    queue = bench.queue()
    bench.maintain()
    assert bench.segments() == [3 * SEGMENT_BYTES]
    assert bench.store.start_position == 3 * SEGMENT_BYTES
    bench.maintain()
    assert 0 < queue.min_offset < queue.next_offset
    chunk = bench.store.read(queue, 0, 1000)
    assert (chunk.status, chunk.next_offset) == (PullStatus.MOVED, queue.min_offset)
    assert len(bench.bodies(queue)) == queue.next_offset - queue.min_offset
    assert bench.store.offset_at(queue, 0) == queue.min_offset


def test_a_segment_that_the_disk_cannot_let_go_of_refuses_no_start() -> None:
    """Its inode is ill, and nothing of it is needed any more."""
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 6)
    bench.checkpoint()
    ill = segment_name(bench.segments()[1])
    for operation in ("unlink", "rename"):
        bench.files.fail(operation, errno.EUCLEAN, 10**6, ill)
    bench.clock.advance(2 * HOUR_MS)
    bench.fill_segments(queue, 1)
    bench.checkpoint()
    bench.maintain(5)
    bench.checkpoint()
    bench.store.close()
    bench.open()
    assert bench.store.start_position > 0
    assert bench.queue().next_offset > 0


@pytest.mark.parametrize("is_disk_low", [False, True])
def test_a_segment_whose_inode_is_ill_does_not_keep_those_behind_it(is_disk_low: bool) -> None:
    room = {"free_delete_bytes": 4 * SEGMENT_BYTES, "free_refuse_bytes": 0, "free_warn_bytes": 0} if is_disk_low else {}
    bench = old_bench(8, retention_ms=HOUR_MS * (99 if is_disk_low else 1), **room)
    ill = segment_name(bench.segments()[1])
    for operation in ("open", "size", "unlink", "rename"):
        bench.files.fail(operation, errno.EUCLEAN, 10**6, ill)
    if is_disk_low:
        bench.files.capacity_bytes = bench.files.used_bytes + SEGMENT_BYTES
    bench.maintain(9)
    assert SEGMENT_BYTES in bench.segments()
    assert bench.segments()[1:] == [segment.start for segment in bench.store._log.segments]
    assert len(bench.segments()) == (5 if is_disk_low else 2)
    assert LOG / ill not in bench.store._log.spares


def test_nothing_grows_older_because_the_clock_is_set_forward() -> None:
    """A box without a battery runs five days late until it finds the time: what it has just stored is not five days old."""
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.checkpoint()
    bench.maintain()
    bench.clock.step(120 * HOUR_MS)
    bench.maintain(3)
    assert bench.store.start_position == 0
    bench.checkpoint()
    bench.crash()
    bench.maintain(3)
    assert bench.store.start_position == 0, "nor after a restart"
    bench.clock.advance(HOUR_MS)
    bench.maintain()
    assert bench.store.start_position > 0


@pytest.mark.parametrize("failures", [0, 2])
def test_younger_stamps_are_saved_when_nothing_else_has_changed(failures: int) -> None:
    """The clock is found, nothing more is stored, and the power goes."""
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.checkpoint()
    bench.maintain(5)
    position = bench.store.appended_position
    bench.clock.step(120 * HOUR_MS)
    bench.maintain()
    bench.files.fail("commit", times=failures)
    for _ in range(1 + failures):
        assert bench.store.checkpoint_position == position
        job = bench.store.begin_checkpoint()
        if job is None:  # what is flushed is said in the log first, once
            bench.flush()
            job = bench.store.begin_checkpoint()
        run(job)
        assert bench.store.begin_checkpoint() is None, "not before its time again"
        bench.clock.advance(30_000)
    assert bench.store.checkpoint_position > position
    assert bench.store.begin_checkpoint() is None
    bench.crash()
    bench.maintain(3)
    assert bench.store.start_position == 0


def test_younger_stamps_are_saved_too_that_are_corrected_while_the_views_are_being_saved() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.maintain(5)
    bench.flush()
    job = bench.store.begin_checkpoint(force=True)
    assert job is not None
    bench.clock.step(120 * HOUR_MS)
    bench.maintain()
    bench.clock.advance(1000)
    run(job)
    if (job := bench.store.begin_checkpoint()) is None:
        bench.flush()
        job = bench.store.begin_checkpoint()
    run(job)
    bench.crash()
    bench.maintain(3)
    assert bench.store.start_position == 0


def test_younger_stamps_of_one_topic_are_saved_where_the_segment_keeps_its_own() -> None:
    """Its newest message is by a clock that was ahead; the other topic's messages are by one that was late."""
    bench = StoreBench(retention_ms=HOUR_MS)
    (ahead,) = bench.topic("ahead", 1)
    (late,) = bench.topic("late", 1)
    bench.clock.step(2 * HOUR_MS)
    bench.maintain()
    bench.append(ahead)
    bench.maintain()
    bench.clock.step(-144 * HOUR_MS)
    bench.maintain()
    bench.fill_segments(late, 2)
    bench.checkpoint()
    bench.maintain(3)
    bench.checkpoint()
    bench.clock.step(142 * HOUR_MS)
    bench.maintain()
    stamps = {topic_id: share.last_ms for topic_id, share in bench.store._log.segments[0].shares.items()}
    bench.checkpoint()
    bench.crash()
    assert {topic_id: share.last_ms for topic_id, share in bench.store._log.segments[0].shares.items()} == stamps


def test_nothing_grows_older_because_the_clock_is_set_back_and_forward_again() -> None:
    bench = StoreBench(retention_ms=12 * HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 1)
    bench.clock.step(-HOUR_MS * 24 * 365)
    for _ in range(24):
        bench.clock.advance(HOUR_MS)
        bench.maintain()
        bench.fill_segments(queue, 1)
        bench.checkpoint()
    kept = bench.segments()
    assert 12 <= len(kept) <= 14, "what is older goes by any clock"
    bench.clock.step(HOUR_MS * 24 * 365)
    bench.maintain(3)
    assert bench.segments() == kept
    bench.clock.advance(HOUR_MS * 6)
    bench.maintain(3)
    assert 6 <= len(bench.segments()) <= 8


@pytest.mark.parametrize("steps", [[HOUR_MS * 24 * 365], [HOUR_MS, HOUR_MS * 24 * 365 - HOUR_MS]])
@pytest.mark.parametrize("has_messages", [True, False])
def test_nor_what_came_into_the_segment_in_which_it_was_set_back(steps: list[int], has_messages: bool) -> None:
    bench = StoreBench(retention_ms=12 * HOUR_MS)
    (queue, _) = bench.topic()
    if has_messages:
        bench.append(queue)
    bench.maintain()
    bench.clock.step(-HOUR_MS * 24 * 365)
    bench.maintain()
    bench.clock.advance(24 * HOUR_MS)
    while not has_messages and len(bench.segments()) == 1:
        bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 0)]))
    bench.fill_segments(queue, 2 - len(bench.segments()))
    bench.checkpoint()
    bench.clock.advance(6 * HOUR_MS)
    for step_ms in steps:
        bench.clock.step(step_ms)
        bench.maintain(3)
    assert bench.store.start_position == 0
    bench.clock.advance(6 * HOUR_MS)
    bench.maintain(3)
    assert bench.store.start_position == SEGMENT_BYTES


@pytest.mark.parametrize("is_beyond", [True, False])
def test_what_was_stamped_ahead_is_young_only_if_the_clock_is_set_forward_beyond_that(is_beyond: bool) -> None:
    """A late clock is set back by six hours (a time zone) before the time is found; or by mistake, and is right again."""
    bench = StoreBench(retention_ms=12 * HOUR_MS)
    bench.maintain()
    (queue, _) = bench.topic()
    for _ in range(4):
        bench.fill_segments(queue, 1)
        bench.clock.advance(HOUR_MS)
        bench.maintain()
    bench.clock.step(-6 * HOUR_MS)
    bench.maintain()
    bench.fill_segments(queue, 1)
    bench.checkpoint()
    kept = bench.segments()
    bench.clock.step(HOUR_MS * (24 * 365 if is_beyond else 6))
    bench.maintain(3)
    assert bench.segments() == kept
    bench.clock.advance(10 * HOUR_MS)
    bench.maintain(3)
    assert (bench.segments() == kept) == is_beyond
    bench.clock.advance(3 * HOUR_MS)
    bench.maintain(3)
    assert len(bench.segments()) == 1, "but for no longer than the retention"


def test_what_a_late_clock_stored_where_an_earlier_run_had_ended_is_not_hidden_by_what_that_one_stored() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.close()
    bench.clock.advance(2 * HOUR_MS)
    bench.clock.step(-HOUR_MS * 24 * 365)
    bench.open()
    bench.fill_segments(bench.queue(), 2)
    bench.checkpoint()
    bench.maintain()
    bench.clock.step(HOUR_MS * 24 * 365)
    bench.maintain(3)
    assert bench.store.start_position == 0
    bench.clock.advance(HOUR_MS)
    bench.maintain()
    assert bench.store.start_position > 0


def test_what_was_stored_before_the_clock_was_set_back_is_right_when_the_next_run_has_the_time() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.clock.step(-HOUR_MS * 24 * 365)
    bench.maintain()
    bench.checkpoint()
    bench.crash()
    bench.clock.step(HOUR_MS * 24 * 365)
    bench.reopen()
    bench.maintain(3)
    assert bench.store.start_position == 0


def test_a_clock_that_was_ahead_keeps_nothing_for_ever() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    bench.clock.step(HOUR_MS * 24 * 365)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.maintain(3)
    bench.rot(3000)
    bench.clock.step(-HOUR_MS * 24 * 365)
    bench.fill_segments(queue, 2)
    bench.reopen()
    bench.maintain(3)
    assert bench.store.start_position == 0, "nobody knows yet how old it is"
    assert len(bench.store.damage) == 1, "nor is it left alone by the search for damage"
    bench.clock.advance(HOUR_MS)
    bench.maintain(3)
    assert bench.store.start_position == 4 * SEGMENT_BYTES


def test_what_an_earlier_run_stored_keeps_its_age_when_the_clock_is_set_forward() -> None:
    bench = old_bench()
    bench.clock.step(-2 * HOUR_MS)
    bench.reopen()
    bench.maintain()
    assert bench.store.start_position == 0
    bench.clock.step(2 * HOUR_MS)
    bench.maintain()
    assert bench.store.start_position == 3 * SEGMENT_BYTES


def test_deleted_segments_stay_deleted() -> None:
    for seed in range(20):
        bench = old_bench(seed=seed)
        bench.maintain(2)
        first = bench.queue().min_offset
        for _ in range(3):
            bench.append(bench.queue())
            bench.flush()
        bench.checkpoint()
        bench.crash()
        assert bench.store.start_position == 3 * SEGMENT_BYTES
        assert bench.queue().min_offset == first
        assert len(bench.bodies(bench.queue())) == bench.queue().next_offset - first


def test_a_deletion_that_a_crash_took_back_is_made_good() -> None:
    """The views know that the segments are gone; the folder was not synced, and they are back."""
    bench = old_bench()
    bench.files.before = lambda operation, path: None
    job = begin_deletion(bench)
    bench.checkpoint()  # saves the new beginning while the job has not run
    bench.crash()
    assert bench.segments() == [3 * SEGMENT_BYTES]
    assert bench.queue().min_offset > 0
    run(job)


def test_a_crash_right_after_the_deletion_loses_nothing_else() -> None:
    for seed in range(20):
        bench = old_bench(seed=seed)
        total = bench.queue().next_offset
        bench.maintain()
        bench.crash()
        assert bench.store.recovery.damage == []
        assert bench.queue().next_offset == total
        assert len(bench.bodies(bench.queue())) == total - bench.queue().min_offset


def test_nothing_goes_that_is_not_saved() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.clock.advance(HOUR_MS * 9)
    bench.maintain(3)
    assert bench.store.start_position == 0
    bench.checkpoint()
    bench.maintain()
    assert bench.store.start_position > 0


def keep_up(bench: StoreBench, seconds: int) -> None:
    """What a broker's loop does meanwhile."""
    for _ in range(2 * seconds):
        bench.clock.advance(500)
        run(bench.store.begin_checkpoint() or bench.store.begin_maintenance())
        if bench.store.needs_flush:
            bench.flush()


@pytest.mark.parametrize("is_bounded", [True, False])
def test_what_is_to_make_room_is_saved_at_once(is_bounded: bool) -> None:
    bound = {"store_bytes_max": 4 * SEGMENT_BYTES} if is_bounded else {"free_delete_bytes": 10 * SEGMENT_BYTES}
    bench = StoreBench(free_refuse_bytes=0, free_warn_bytes=0, **bound)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 5)
    if not is_bounded:
        bench.files.capacity_bytes = bench.files.used_bytes + int(9.5 * SEGMENT_BYTES)
    keep_up(bench, 4)
    assert bench.segments()[0] == (2 if is_bounded else 1) * SEGMENT_BYTES
    assert bench.store.damage == []
    bench.crash()
    assert bench.queue().next_offset == queue.next_offset


def test_a_save_that_makes_room_is_one_save_for_the_whole_log() -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES, checkpoint_ms=HOUR_MS, checkpoint_bytes=1 << 30)
    (queue, _) = bench.topic()
    saved = set()
    for _ in range(400):
        bench.append(queue, size=500)
        bench.flush()
        keep_up(bench, 1)
        saved.add(bench.store.checkpoint_position)
    assert len(bench.segments()) <= 5
    assert bench.store.appended_position > 12 * SEGMENT_BYTES
    assert 3 < len(saved) < 8


def test_upkeep_is_urgent_until_the_segment_is_gone_that_was_to_make_room() -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES)
    (queue, _) = bench.topic()
    run(bench.store.begin_maintenance())
    bench.fill_segments(queue, 5)
    for _ in range(9):
        assert bench.store.is_upkeep_urgent
        run(bench.store.begin_checkpoint() or bench.store.begin_maintenance())
        bench.flush()
        if len(bench.segments()) <= 4:
            break
    assert len(bench.segments()) <= 4, "without any wait"
    assert not bench.store.is_upkeep_urgent


def test_a_save_that_is_to_make_room_and_fails_is_not_tried_at_each_look() -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 5)
    bench.files.fail("commit", times=10**6)
    tried = bench.files.counts["commit"]
    keep_up(bench, 60)
    assert not bench.store.is_upkeep_urgent
    assert bench.segments()[0] == 0
    assert 5 < bench.files.counts["commit"] - tried < 40
    bench.files.heal()
    keep_up(bench, 5)
    assert len(bench.segments()) <= 4


def test_a_failing_save_keeps_the_log() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.clock.advance(HOUR_MS * 9)
    bench.files.fail("commit", times=99)
    bench.checkpoint()
    bench.maintain(3)
    assert bench.store.start_position == 0
    bench.files.heal()
    bench.checkpoint()
    bench.maintain()
    assert bench.store.start_position > 0


def test_a_queue_all_of_whose_batches_are_gone_is_empty() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    quiet, busy = bench.topic()
    bench.append(quiet, count=5)
    bench.fill_segments(busy, 3)
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain(2)
    assert (quiet.min_offset, quiet.next_offset) == (5, 5)
    assert bench.store.read(quiet, 5, 1000).status is PullStatus.NOTHING
    assert bench.append(quiet).base_offset == 5
    bench.flush()
    bench.checkpoint()
    bench.crash()
    assert (bench.queue().min_offset, bench.queue().next_offset) == (5, 6)
    assert len(bench.bodies(bench.queue())) == 1


def test_a_topic_that_keeps_longer_keeps_its_segment() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (keeper,) = bench.topic("keeper", 1, retention_ms=HOUR_MS * 10)
    (other,) = bench.topic("other", 1)
    bench.fill_segments(other, 2)
    bench.append(keeper)
    bench.fill_segments(other, 2)
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain(2)
    assert bench.store.start_position == 2 * SEGMENT_BYTES
    assert len(bench.bodies(keeper)) == 1
    bench.store.append_event(TopicDeleted(keeper.topic.topic_id))
    bench.maintain(2)
    assert bench.store.start_position == 4 * SEGMENT_BYTES


def test_what_each_topic_has_in_a_segment_survives_restarts() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (keeper,) = bench.topic("keeper", 1, retention_ms=HOUR_MS * 10)
    (other,) = bench.topic("other", 1)
    bench.append(keeper)
    bench.fill_segments(other, 2)
    bench.reopen()
    bench.fill_segments(bench.queue("other"), 2)
    bench.checkpoint()
    bench.crash()
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain(2)
    assert bench.store.start_position == 0
    bench.clock.advance(HOUR_MS * 10)
    bench.maintain(2)
    assert bench.store.start_position > 0


def test_the_store_has_a_size() -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES)
    (queue, _) = bench.topic()
    for _ in range(12):
        bench.fill_segments(queue, 1)
        bench.checkpoint()
        bench.maintain()
        assert bench.files.used_bytes <= 5 * SEGMENT_BYTES + 8000
    assert len(bench.segments()) <= 4
    assert bench.bodies(queue)


def test_a_disk_that_fills_up_takes_the_oldest_segment_at_each_look() -> None:
    bench = old_bench(6, retention_ms=HOUR_MS * 99, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    bench.files.capacity_bytes = bench.files.used_bytes + int(7.5 * SEGMENT_BYTES)
    bench.maintain()
    assert len(bench.segments()) == 6, "the first look only finds out"
    for left in (5, 4, 3):
        bench.maintain()
        assert len(bench.segments()) == left
    bench.maintain(2)
    assert len(bench.segments()) == 3, "there is room enough now"
    assert spares(bench) == [], "recycling would free nothing"


def test_a_full_disk_that_lets_go_of_nothing_costs_no_more_than_one_segment() -> None:
    bench = old_bench(8, retention_ms=HOUR_MS * 99, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    bench.files.capacity_bytes = bench.files.used_bytes + int(8.5 * SEGMENT_BYTES)
    bench.maintain()
    bench.files.fail("unlink", times=99, path="commitlog")
    bench.maintain(6)
    assert len(bench.segments()) == 8
    assert bench.store.start_position == SEGMENT_BYTES
    bench.files.heal()
    bench.maintain()
    assert bench.segments()[0] == bench.store.start_position == SEGMENT_BYTES
    bench.maintain(3)
    assert bench.segments()[0] == 2 * SEGMENT_BYTES, "as many as it needs, then"


def test_nothing_is_recycled_while_a_full_disk_lets_go_of_nothing() -> None:
    bench = old_bench(6, retention_ms=HOUR_MS * 99, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    bench.files.capacity_bytes = bench.files.used_bytes + int(8.5 * SEGMENT_BYTES)
    bench.maintain()
    bench.files.fail("unlink", times=99, path="commitlog")
    bench.maintain(2)
    bench.clock.advance(HOUR_MS * 99)
    bench.maintain()
    bench.files.heal()
    bench.maintain()
    assert bench.segments() == [5 * SEGMENT_BYTES]
    assert spares(bench) == []


def with_spare(segments: int, **config: Any) -> StoreBench:
    """So many segments, all saved, the newest one half full, and a spare for the next one."""
    bench = old_bench(segments, retention_ms=HOUR_MS * 99, free_refuse_bytes=0, free_warn_bytes=0, **config)
    half_fill(bench)
    bench.checkpoint()
    bench.maintain(2)
    assert len(spares(bench)) == 1
    return bench


def half_fill(bench: StoreBench) -> None:
    while bench.store._log.limit - bench.store.appended_position > SEGMENT_BYTES // 2 - 100:
        bench.append(bench.queue(), size=500)
    bench.flush()


def test_a_disk_that_is_low_takes_the_spare_before_any_message() -> None:
    bench = with_spare(4, free_delete_bytes=10 * SEGMENT_BYTES)
    bench.files.capacity_bytes = bench.files.used_bytes + int(9.5 * SEGMENT_BYTES)
    bench.maintain(9)
    assert bench.segments()[0] == 0, "that was enough"
    assert spares(bench) == [], "none is made only to go again"
    bench.files.capacity_bytes -= SEGMENT_BYTES
    bench.maintain(3)
    assert bench.segments()[0] == SEGMENT_BYTES


def test_what_goes_before_it_has_expired_is_told_once_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    bench = old_bench(6, retention_ms=HOUR_MS * 99, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    newest_ms = [segment.shares[bench.queue().topic.topic_id].last_ms for segment in bench.store._log.segments[:2]]
    bench.files.capacity_bytes = bench.files.used_bytes + int(8.5 * SEGMENT_BYTES)
    capsys.readouterr()
    bench.maintain(5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unexpired_messages_deleted" in line]
    assert len(bench.segments()) == 4
    assert len(lines) == 2
    for line, last_ms in zip(lines, newest_ms, strict=True):
        assert "warning" in line
        assert f"stored_until_ms={last_ms}" in line
        assert "free_delete_bytes" in line


def test_what_goes_for_a_bound_and_has_not_expired_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 5)
    bench.checkpoint()
    shares = [segment.shares[queue.topic.topic_id].size_bytes for segment in bench.store._log.segments]
    capsys.readouterr()
    bench.maintain()
    taken = len(shares) - len(bench.segments())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "unexpired_messages_deleted" in line]
    assert taken > 1
    assert f"bytes={sum(shares[:taken])}" in line
    assert "store_bytes_max" in line


def test_what_has_expired_goes_without_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    bench = old_bench(6, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    bench.files.capacity_bytes = bench.files.used_bytes + int(4.5 * SEGMENT_BYTES)
    bench.maintain(3)
    assert bench.segments() == [5 * SEGMENT_BYTES]
    assert "unexpired_messages_deleted" not in capsys.readouterr().err


def test_a_low_disk_takes_more_than_the_spare_where_that_is_not_enough() -> None:
    bench = with_spare(4, free_delete_bytes=10 * SEGMENT_BYTES)
    bench.files.capacity_bytes = bench.files.used_bytes + int(8.5 * SEGMENT_BYTES)
    bench.maintain(9)
    assert spares(bench) == []
    assert bench.segments()[0] == SEGMENT_BYTES, "no more than is needed"


def test_a_spare_that_a_low_disk_does_not_let_go_of_is_tried_again() -> None:
    bench = with_spare(4, free_delete_bytes=10 * SEGMENT_BYTES)
    bench.files.capacity_bytes = bench.files.used_bytes + int(9.5 * SEGMENT_BYTES)
    bench.files.fail("unlink", times=99, path="spare")
    bench.maintain(5)
    assert (bench.segments()[0], len(spares(bench))) == (0, 1)
    bench.files.heal()
    bench.maintain(2)
    assert (bench.segments()[0], len(spares(bench))) == (0, 0)


def test_a_file_that_was_to_become_a_spare_does_not_when_the_disk_is_low_by_then() -> None:
    bench = old_bench(6, free_delete_bytes=10 * SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    bench.files.fail("rename", times=99, path="commitlog")
    bench.maintain()
    bench.files.capacity_bytes = bench.files.used_bytes + int(8.5 * SEGMENT_BYTES)
    bench.maintain()
    bench.files.heal()
    bench.maintain()
    assert bench.segments() == [5 * SEGMENT_BYTES]
    assert spares(bench) == []


def test_no_spare_is_made_that_a_bounded_store_has_no_room_for() -> None:
    bench = StoreBench(store_bytes_max=4 * SEGMENT_BYTES)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    half_fill(bench)
    bench.checkpoint()
    bench.maintain(3)
    assert bench.segments()[0] == 0
    assert len(bench.segments()) + len(spares(bench)) == 4
    bench.fill_segments(queue, 1)
    bench.maintain(3)
    assert bench.segments()[0] == SEGMENT_BYTES, "it goes for messages"


def test_a_spare_goes_before_a_segment_when_the_store_is_to_be_smaller() -> None:
    bench = with_spare(4, free_delete_bytes=0, store_bytes_max=5 * SEGMENT_BYTES)
    bench.store._upkeep._config = StoreConfig(segment_bytes=SEGMENT_BYTES, store_bytes_max=4 * SEGMENT_BYTES)
    bench.maintain(3)
    assert (bench.segments()[0], len(spares(bench))) == (0, 0)


@pytest.mark.parametrize("config", [{"free_delete_bytes": 10 * SEGMENT_BYTES}, {"store_bytes_max": 4 * SEGMENT_BYTES}])
def test_a_quota_costs_the_oldest_segment_too_where_no_spare_is_made_ahead(config: dict[str, int]) -> None:
    bench = under_quota(4, **{"free_refuse_bytes": 0, "free_delete_bytes": SEGMENT_BYTES, **config})
    bench.files.free_bytes = lambda folder: int(10.5 * SEGMENT_BYTES)  # type: ignore[method-assign]
    refused = 0
    for _ in range(200):
        try:
            bench.append(bench.queue(), size=500)
        except DiskFullError:
            refused += 1
        bench.flush()
        bench.checkpoint()
        bench.maintain()
    assert 0 < refused < 20
    assert bench.store.appended_position > 7 * SEGMENT_BYTES
    assert 3 <= len(bench.segments()) <= 4, "no more than are needed go"


def test_queue_files_go_with_the_log() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    bench.store._views.shelf._entries_per_file = 100
    (queue, _) = bench.topic()
    for _ in range(350):
        bench.append(queue, size=300)
    bench.flush()
    bench.checkpoint()
    assert len(bench.files.listdir(QUEUES / "meters@1" / "0")) == 4
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain(2)
    assert queue.min_offset > 200
    assert len(bench.files.listdir(QUEUES / "meters@1" / "0")) == 4
    bench.checkpoint()
    assert len(bench.files.listdir(QUEUES / "meters@1" / "0")) <= 2
    assert len(bench.bodies(queue)) == 350 - queue.min_offset


def test_many_queues_are_trimmed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "TRIMS_MAX", 10)
    bench = StoreBench(retention_ms=HOUR_MS)
    queues = bench.topic(queue_count=35)
    for queue in queues:
        bench.append(queue)
    (other,) = bench.topic("other", 1)
    bench.fill_segments(other, 2)
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    left = []
    for _ in range(6):
        bench.maintain()
        left.append(sum(queue.min_offset == 0 for queue in queues))
    assert left[:2] == [35, 25]
    assert left[-1] == 0
    assert TRIMS_MAX > 10


def test_a_queue_is_trimmed_when_it_is_read() -> None:
    bench = old_bench()
    bench.maintain()
    queue = bench.queue()
    assert bench.store.read(queue, 0, 1000).status is PullStatus.MOVED
    assert queue.min_offset > 0


def test_what_is_known_only_from_deleted_segments_is_gone_with_the_views_but_never_given_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Relocation, "go_on", lambda self, *where: False)  # no room
    bench = old_bench()
    bench.maintain(2)
    for _ in range(3):
        bench.append(bench.queue())
        bench.flush()
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.files.fsync_dir(FOLDER)
    bench.open()
    assert bench.store.tables.topics == {}
    assert bench.store.recovery.unplaced_batches > 3
    assert bench.store.tables.next_topic_id == 2
    assert bench.store.boot > 100_000_000, "greater than any before: lease epochs count on it"
    assert bench.store.boot << 32 < 1 << 62, "and they fit for decades"
    boot = bench.store.boot
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    bench.crash()
    assert bench.store.boot == boot + 1
    assert len(bench.bodies(bench.queue())) == 1


@pytest.mark.parametrize(("spare_segments_max", "operation"), [(0, "unlink"), (2, "rename")])
def test_files_that_the_disk_does_not_let_go_of_go_at_the_next_round(spare_segments_max: int, operation: str) -> None:
    bench = old_bench(5, spare_segments_max=spare_segments_max)
    bench.files.fail(operation, path="commitlog")
    job = begin_deletion(bench)
    run(job)
    assert bench.store.start_position == 4 * SEGMENT_BYTES
    assert len(bench.segments()) == 5
    assert bench.store._upkeep.free_bytes is not None, "the disk's room is looked at nevertheless"
    bench.maintain()
    assert bench.segments() == [4 * SEGMENT_BYTES]
    assert len(spares(bench)) == spare_segments_max


def test_a_folder_that_was_not_synced_is_synced_at_the_next_round() -> None:
    bench = old_bench(5, spare_segments_max=2)
    job = begin_deletion(bench)
    bench.files.fail("fsync_dir")
    run(job)
    bench.maintain()
    assert bench.segments() == [4 * SEGMENT_BYTES]
    assert sorted(path.name for path in bench.store._log.spares) == spares(bench), "none is forgotten"
    bench.crash()
    assert bench.segments() == [4 * SEGMENT_BYTES]


# --- spares ---------------------------------------------------------------------------------------------------------------


def test_deleted_segments_are_written_again() -> None:
    bench = old_bench(6)
    bench.maintain()
    assert len(spares(bench)) == 2, "no more than are wanted"
    made = bench.files.counts["allocate"]
    bench.fill_segments(bench.queue(), 2)
    assert bench.files.counts["allocate"] == made
    assert spares(bench) == []
    bench.maintain()
    queue = bench.queue()
    assert len(bench.bodies(queue)) == queue.next_offset - queue.min_offset
    assert bench.store.damage == []
    bench.crash()
    queue = bench.queue()
    assert len(bench.bodies(queue)) == queue.next_offset - queue.min_offset
    assert bench.store.recovery.damage == []


def test_what_a_recycled_segment_held_never_comes_back() -> None:
    for seed in range(15):
        bench = old_bench(5, seed=seed)
        bench.maintain(2)
        for _ in range(30):
            bench.append(bench.queue(), size=600)
        bench.store.write()
        total = bench.queue().next_offset
        bench.crash()
        queue = bench.queue()
        assert queue.next_offset <= total
        assert len(bench.bodies(queue)) == queue.next_offset - queue.min_offset
        assert bench.store.recovery.damage == []


def test_a_spare_is_made_when_half_of_the_segment_is_used() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.maintain(2)
    assert spares(bench) == []
    while bench.store.appended_position < SEGMENT_BYTES // 2 + 100:
        bench.append(queue)
    bench.maintain(2)
    assert len(spares(bench)) == 1
    assert bench.files.size(LOG / spares(bench)[0]) == SEGMENT_BYTES
    bench.maintain(3)
    assert len(spares(bench)) == 1
    made = bench.files.counts["allocate"]
    bench.fill_segments(queue, 1)
    assert bench.files.counts["allocate"] == made
    assert spares(bench) == []


def test_no_spare_is_made_of_what_has_to_stay_free() -> None:
    bench = StoreBench(free_refuse_bytes=2 * SEGMENT_BYTES, free_delete_bytes=0)
    (queue, _) = bench.topic()
    while bench.store.appended_position < SEGMENT_BYTES // 2 + 100:
        bench.append(queue)
    bench.files.capacity_bytes = bench.files.used_bytes + 3 * SEGMENT_BYTES - 1
    bench.maintain(3)
    assert spares(bench) == []
    bench.files.capacity_bytes += 10_000
    bench.maintain(2)
    assert len(spares(bench)) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_spare_that_cannot_be_made_leaves_nothing(number: int) -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    while bench.store.appended_position < SEGMENT_BYTES // 2 + 100:
        bench.append(queue)
    bench.flush()
    bench.maintain()
    bench.files.fail("pwritev", number, path="spare")
    bench.maintain()
    assert spares(bench) == []
    assert bench.store.failure is None
    if number == errno.ENOSPC:
        bench.maintain(50)
        assert spares(bench) == [], "nothing has changed"
        bench.clock.advance(10_000)
    bench.maintain()
    assert len(spares(bench)) == 1


def under_quota(segments: int, **config: Any) -> StoreBench:
    """A log that may have so many segments and no more, on a disk that says that it has room."""
    bench = StoreBench(retention_ms=HOUR_MS * 99, **config)

    def refuse(operation: str, path: Path) -> None:
        if operation in ("allocate", "pwritev") and path.name.startswith("spare") and bench.files.size(path) < SEGMENT_BYTES:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))

    (queue, _) = bench.topic()
    bench.fill_segments(queue, segments - 1)
    bench.checkpoint()
    bench.files.before = refuse
    return bench


def test_a_quota_costs_the_oldest_segment_for_each_new_one() -> None:
    bench = under_quota(4, free_delete_bytes=SEGMENT_BYTES, free_refuse_bytes=0)
    for _ in range(200):
        bench.append(bench.queue(), size=500)
        bench.flush()
        bench.checkpoint()
        bench.maintain()
    assert bench.store.appended_position > 8 * SEGMENT_BYTES
    assert 3 <= len(bench.segments()) <= 4, "no more than are needed go"
    assert bench.store.damage == []


def test_a_quota_costs_nothing_where_no_segment_may_go_for_room() -> None:
    bench = under_quota(4, free_delete_bytes=0)
    with pytest.raises(DiskFullError):
        for _ in range(200):
            bench.append(bench.queue(), size=500)
            bench.flush()
            bench.checkpoint()
            bench.maintain()
    assert bench.segments()[0] == 0


def test_a_broker_under_a_quota_does_not_try_each_second_to_make_a_spare() -> None:
    bench = under_quota(4, free_delete_bytes=0)
    while bench.store._log.limit - bench.store.appended_position > SEGMENT_BYTES // 2 - 100:
        bench.append(bench.queue(), size=500)
    bench.flush()
    opened = bench.files.counts["open"]
    bench.maintain(600)
    assert bench.files.counts["open"] - opened < 20
    bench.files.before = lambda operation, path: None
    bench.append(bench.queue(), size=500)
    bench.flush()
    bench.checkpoint()
    bench.maintain()
    assert len(spares(bench)) == 1, "a save that went well is a sign"


@pytest.mark.parametrize("sends", [1, 6])
def test_a_quota_used_up_to_the_last_byte_keeps_nobody_from_sending(sends: int) -> None:
    """Queue files and views.db need room too: were all of it the log's, nothing could be saved, and so nothing could go."""
    bench = StoreBench(checkpoint_bytes=20_000)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 8)
    bench.checkpoint()
    bench.files.free_bytes = lambda folder: 1 << 50  # type: ignore[method-assign]
    bench.files.capacity_bytes = bench.files.used_bytes
    refused = 0
    for _ in range(400):
        for _ in range(sends):
            try:
                bench.append(queue, size=500)
            except DiskFullError:
                refused += 1
            bench.flush()
        for _ in range(2):
            bench.clock.advance(500)
            run(bench.store.begin_checkpoint() or bench.store.begin_maintenance())
            bench.flush()
    assert refused < 40 * sends
    assert bench.store.checkpoint_position > bench.store.appended_position - 3 * SEGMENT_BYTES
    assert bench.store.damage == []
    bench.crash()
    assert bench.queue().next_offset == queue.next_offset


def test_a_roll_while_a_spare_is_being_made_makes_one_itself() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    while bench.store.appended_position < SEGMENT_BYTES // 2 + 100:
        bench.append(queue)
    bench.maintain()
    bench.clock.advance(1000)
    job = bench.store.begin_maintenance()
    assert job is not None
    bench.fill_segments(queue, 1)
    job.run()
    bench.fill_segments(queue, 1)
    job.finish()
    assert len(spares(bench)) == 1
    bench.fill_segments(queue, 2)
    assert len(bench.bodies(queue)) == queue.next_offset


# --- the disk's room ------------------------------------------------------------------------------------------------------


def test_the_disk_is_looked_at_once_a_second() -> None:
    bench = StoreBench()
    assert bench.store.begin_maintenance() is not None
    bench = StoreBench()
    bench.maintain()
    looks = bench.files.counts["free_bytes"]
    assert bench.store.begin_maintenance() is None
    bench.maintain()
    assert bench.files.counts["free_bytes"] == looks + 1


def test_one_job_at_a_time() -> None:
    bench = StoreBench()
    bench.clock.advance(1000)
    job = bench.store.begin_maintenance()
    bench.clock.advance(1000)
    assert bench.store.begin_maintenance() is None
    run(job)
    assert bench.store.begin_maintenance() is not None


def test_low_disks_are_warned_of_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    bench = StoreBench(free_warn_bytes=1 << 40, free_delete_bytes=0, free_refuse_bytes=0)
    bench.files.capacity_bytes = 1 << 30
    bench.maintain(5)
    assert capsys.readouterr().err.count("disk_space_ran_low") == 1
    bench.clock.advance(HOUR_MS)
    bench.maintain(5)
    assert capsys.readouterr().err.count("disk_space_ran_low") == 1


def test_a_disk_full_for_batches_says_so_once_and_when_it_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    bench = StoreBench(free_refuse_bytes=1 << 20, free_delete_bytes=0, free_warn_bytes=0)
    (queue, _) = bench.topic()
    bench.files.capacity_bytes = bench.files.used_bytes + 1000
    bench.maintain(3)
    with pytest.raises(DiskFullError):
        bench.append(queue)
    assert capsys.readouterr().err.count("disk_filled") == 1
    bench.files.capacity_bytes = None
    bench.maintain()
    bench.append(queue)
    assert capsys.readouterr().err.count("disk_freed") == 1


def test_a_look_that_fails_is_not_the_end() -> None:
    bench = StoreBench()
    bench.files.fail("free_bytes")
    bench.maintain()
    bench.maintain()
    assert bench.store.failure is None


# --- the search for damage ------------------------------------------------------------------------------------------------


def test_closed_segments_are_searched_and_damage_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.rot(SEGMENT_BYTES + 3000)
    bench.maintain(6)
    assert [SEGMENT_BYTES < start < 2 * SEGMENT_BYTES for start, _ in bench.store.damage] == [True]
    bench.clock.advance(8 * 24 * HOUR_MS)
    bench.maintain(6)
    assert len(bench.store.damage) == 1
    assert capsys.readouterr().err.count("damage_found") == 1


def test_each_segment_is_searched_once_a_week() -> None:
    bench = StoreBench(retention_ms=HOUR_MS * 24 * 99)
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 3)
    bench.maintain(6)
    reads = bench.files.counts["pread"]
    bench.maintain(6)
    assert bench.files.counts["pread"] == reads
    bench.checkpoint()
    bench.crash()
    bench.checkpoint()
    reads = bench.files.counts["pread"]
    bench.maintain(6)
    assert bench.files.counts["pread"] == reads, "restarts do not begin anew"
    bench.clock.advance(7 * 24 * HOUR_MS)
    bench.maintain(6)
    assert bench.files.counts["pread"] > reads


def test_a_long_segment_is_searched_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "SCRUB_BYTES", 3000)
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 1)
    bench.rot(SEGMENT_BYTES - 2000)
    rounds = 0
    while not bench.store.damage:
        bench.maintain()
        rounds += 1
    assert 3 < rounds < 9


def test_a_segment_that_cannot_be_opened_for_a_while_is_searched_later() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.rot(3000)
    bench.files.fail("open", errno.EMFILE, path=segment_name(0))
    bench.maintain()
    assert bench.store.damage == []
    bench.maintain()
    assert len(bench.store.damage) == 1


def test_a_segment_that_the_disk_does_not_give_is_damage() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.files.fail("open", errno.EUCLEAN, times=99, path=segment_name(0))
    bench.maintain(3)
    assert bench.store.damage == [(0, SEGMENT_BYTES)]


def test_a_segment_that_cannot_be_opened_at_all_does_not_end_the_search() -> None:
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.fill_segments(queue, 2)
    bench.rot(SEGMENT_BYTES + 3000)
    bench.files.fail("open", errno.EACCES, times=99, path=segment_name(0))
    bench.maintain(3)
    assert len(bench.store.damage) == 1


def test_a_segment_deleted_while_it_is_searched() -> None:
    bench = old_bench()
    job = begin_deletion(bench)
    bench.maintain()
    run(job)
    bench.maintain(3)
    assert bench.store.failure is None
    assert bench.store.damage == []
    assert FOLDER.name == "broker"
