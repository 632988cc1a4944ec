"""Checkpoints: when they are due, what they wait for, that the loop goes on meanwhile, and what a failed one leaves to do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.unit.store_bench import FOLDER, QUEUES, StoreBench, describe, fold, run
from zrmq.protocol.events import GroupDeleted, GroupSubscribed, LeaseGranted, OffsetsCommitted, TopicDeleted
from zrmq.store.checkpoint import Checkpoint
from zrmq.store.consume_queue import ENTRY_BYTES, ROW_TAIL_BYTES_MAX, TAIL_BYTES_MAX, Shelf

LONG = ROW_TAIL_BYTES_MAX // ENTRY_BYTES + 1


@pytest.fixture
def bench() -> StoreBench:
    return StoreBench(checkpoint_bytes=20_000, checkpoint_ms=30_000)


def saved_right(bench: StoreBench) -> None:
    """After a power cut the tables come from views.db, and are the fold of the log."""
    bench.crash()
    assert bench.store.recovery.has_views
    assert describe(bench.store.tables) == describe(fold(bench.disk))
    assert bench.store.recovery.damage == []


def save_due(bench: StoreBench) -> None:
    """Save the views as a broker does when it is due and nothing is on its way to the disk."""
    assert bench.store.begin_checkpoint() is None, "what is flushed is said in the log first"
    bench.flush()
    run(bench.store.begin_checkpoint())


def test_an_idle_broker_whose_views_cannot_be_saved_says_once_what_is_flushed(bench: StoreBench) -> None:
    bench.topic()
    bench.flush()
    bench.files.fail("commit", times=10**6)
    positions = set()
    for _ in range(20):
        bench.clock.advance(30_000)
        for _ in range(3):
            run(bench.store.begin_checkpoint())
            bench.flush()
        positions.add(bench.store.appended_position)
    assert len(positions) == 1


def test_due_by_time(bench: StoreBench) -> None:
    bench.topic()
    bench.flush()
    assert bench.store.begin_checkpoint() is None
    bench.clock.advance(29_999)
    assert bench.store.begin_checkpoint() is None
    bench.clock.advance(1)
    save_due(bench)
    assert bench.store.checkpoint_position == bench.store.appended_position
    bench.clock.advance(99_000)
    assert bench.store.begin_checkpoint() is None, "nothing has changed"
    saved_right(bench)


def test_due_by_bytes(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    while bench.store.appended_position < 20_000:
        assert bench.store.begin_checkpoint() is None
        bench.append(queue, size=500)
        bench.flush()
    save_due(bench)
    assert bench.store.checkpoint_position >= 20_000
    saved_right(bench)


def last_group_is_damage(bench: StoreBench, position: int) -> None:
    """A batch of it rots and views.db is lost: all others are there."""
    bench.files.kill()
    bench.rot(position + 20)
    bench.files.unlink(FOLDER / "views.db")
    bench.open()
    assert not bench.store.recovery.has_views
    assert [position for position, _ in bench.store.recovery.damage] == [position]
    assert [body[:4] for body in bench.bodies(bench.queue())] == [b"7/1 ", b"7/3 "]


def append_group(bench: StoreBench) -> int:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    position = bench.store.appended_position
    bench.append(queue)
    bench.append(queue)
    return position


def test_the_log_says_itself_what_was_flushed_before_a_broker_was_idle(bench: StoreBench) -> None:
    position = append_group(bench)
    bench.flush()
    bench.clock.advance(30_000)
    save_due(bench)
    last_group_is_damage(bench, position)


def test_it_says_so_later_when_the_broker_was_busy(bench: StoreBench) -> None:
    position = append_group(bench)
    bench.clock.advance(30_000)
    assert bench.store.begin_checkpoint() is None
    bench.flush()
    run(bench.store.begin_checkpoint())
    assert bench.store.checkpoint_position == bench.store.appended_position
    assert bench.store.begin_checkpoint() is None
    bench.clock.advance(30_000)
    save_due(bench)
    bench.clock.advance(30_000)
    assert bench.store.begin_checkpoint() is None, "and then no more"
    last_group_is_damage(bench, position)


def test_a_broker_that_is_closed_says_so_too(bench: StoreBench) -> None:
    position = append_group(bench)
    bench.store.close()
    last_group_is_damage(bench, position)


def test_without_room_to_say_it_the_views_are_saved_all_the_same(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    while bench.store._log.limit - bench.store.appended_position >= 4000:
        bench.append(queue, size=3000)
    size = bench.store._log.limit - bench.store.appended_position - 110
    bench.append(queue, size=size)
    bench.flush()
    position = bench.store.appended_position
    bench.files.capacity_bytes = bench.files.used_bytes
    bench.clock.advance(30_000)
    run(bench.store.begin_checkpoint())
    assert bench.store.checkpoint_position == position == bench.store.appended_position
    for _ in range(20):
        bench.clock.advance(30_000)
        assert bench.store.begin_checkpoint() is None, "not the same once more"
        assert not bench.store.needs_flush
    bench.files.capacity_bytes = None
    bench.clock.advance(30_000)
    save_due(bench)
    assert bench.store.checkpoint_position == bench.store.appended_position > position, "it is said when there is room"


def test_it_waits_for_the_flush_of_what_it_saves(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    assert bench.store.begin_checkpoint(force=True) is None
    position = bench.store.appended_position
    assert bench.store.needs_flush
    bench.append(queue)
    bench.flush()
    bench.append(queue)
    job = bench.store.begin_checkpoint()
    run(job)
    assert bench.store.checkpoint_position == position, "what came after the copy was taken is not in it"
    saved_right(bench)
    assert bench.queue().next_offset == 2


def test_a_flush_that_began_too_early_is_followed_by_another(bench: StoreBench) -> None:
    (queue, _) = bench.topic(flush_mode="async")
    job = bench.store.begin_flush()
    bench.append(queue)
    assert bench.store.begin_checkpoint(force=True) is None
    bench.store.write()
    run(job)
    assert bench.store.needs_flush, "or an idle broker would never save"
    bench.flush()
    run(bench.store.begin_checkpoint())
    saved_right(bench)


def test_one_at_a_time(bench: StoreBench) -> None:
    bench.topic()
    bench.flush()
    job = bench.store.begin_checkpoint(force=True)
    assert job is not None
    assert bench.store.begin_checkpoint(force=True) is None
    run(job)
    assert bench.store.begin_checkpoint(force=True) is not None


def test_the_loop_goes_on_while_it_is_written(bench: StoreBench) -> None:
    queue, other = bench.topic()
    for _ in range(LONG + 5):
        bench.append(queue, size=10)
    bench.append(other)
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 5)]))
    bench.flush()
    job = bench.store.begin_checkpoint(force=True)
    assert job is not None
    for number in range(LONG):
        bench.append(queue, size=10)
        bench.append(other)
        bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 6 + number)]))
        if number == LONG // 2:
            bench.flush()
            job.run()
    assert len(bench.bodies(queue)) == queue.visible_offset
    bench.flush()
    job.finish()
    assert len(bench.bodies(queue)) == 2 * LONG + 5
    saved_right(bench)
    assert len(bench.bodies(bench.queue())) == 2 * LONG + 5
    assert bench.store.tables.groups["g"].offsets == {("", 1, 0): 5 + LONG}
    bench.checkpoint()
    saved_right(bench)
    assert bench.store.recovery.replayed_entries == 0
    assert len(bench.bodies(bench.queue())) == 2 * LONG + 5


def test_all_kinds_of_changes_are_saved(bench: StoreBench) -> None:
    first = bench.topic("first", 2)
    bench.topic("second", 1)
    for group in ("a", "b", "c"):
        bench.store.append_event(GroupSubscribed(group, "first", 5, [(0, 3)]))
        bench.store.append_event(OffsetsCommitted(group, "", [(1, 0, 0), (2, 0, 0)]))
        bench.store.append_event(OffsetsCommitted(group, "host", [(1, 1, 0)]))
        bench.store.append_event(LeaseGranted(group, 1, 0, f"client of {group}", 1 << 40))
    for number in range(40):
        bench.append(first[number % 2], producer_id=(1 << 64) - 1 - number % 3, size=20)
        bench.append(bench.queue("second"), producer_id=5)
    bench.flush()
    bench.checkpoint()
    saved_right(bench)
    bench.store.append_event(GroupDeleted("b"))
    bench.store.append_event(OffsetsCommitted("b", "", [(1, 1, 1)]))
    bench.store.append_event(TopicDeleted(2))
    bench.topic("second", 3)
    bench.store.append_event(GroupDeleted("c"))
    bench.append(bench.queue("second", 2))
    bench.flush()
    bench.checkpoint()
    saved_right(bench)
    assert bench.store.recovery.replayed_entries == 0
    assert bench.store.tables.groups.keys() == {"a", "b"}
    assert bench.store.tables.groups["b"].offsets == {("", 1, 1): 1}


@pytest.mark.parametrize("operation", ["commit", "pwritev", "fsync_dir", "mkdir"])
def test_a_failed_save_is_made_good_by_the_next(bench: StoreBench, operation: str) -> None:
    queue, other = bench.topic()
    for _ in range(LONG):
        bench.append(queue, size=10)
    bench.append(other)
    bench.store.append_event(GroupSubscribed("g", "meters", 5, []))
    bench.flush()
    if operation == "fsync_dir":
        bench.checkpoint()  # that failure ends saving, so a first one has to be there
        for _ in range(LONG):
            bench.append(queue, size=10)
        bench.flush()
    before = bench.store.checkpoint_position
    bench.files.fail(operation, errno.ENOSPC)
    bench.checkpoint()
    assert bench.store.checkpoint_position == before
    assert bench.store.failure is None
    assert len(bench.bodies(queue)) == queue.next_offset
    bench.append(queue)
    bench.flush()
    if operation != "fsync_dir":
        bench.checkpoint()
        assert bench.store.checkpoint_position > before
    saved_right(bench)
    assert len(bench.bodies(bench.queue())) == bench.queue().next_offset


def test_after_a_failed_sync_of_a_queue_file_nothing_is_saved_any_more(bench: StoreBench) -> None:
    """The next sync would say that all is well, and the entries are not on the disk."""
    for seed in range(10):
        bench = StoreBench(seed)
        (queue, _) = bench.topic()
        for _ in range(LONG):
            bench.append(queue, size=10)
        bench.flush()
        bench.files.fail("fdatasync", path="consumequeue")
        bench.checkpoint()
        for _ in range(LONG):
            bench.append(queue, size=10)
        bench.flush()
        assert bench.store.begin_checkpoint(force=True) is None
        assert bench.store.failure is None
        bench.reopen()
        assert len(bench.bodies(bench.queue())) == 2 * LONG
        bench.checkpoint()
        bench.crash()
        assert len(bench.bodies(bench.queue())) == 2 * LONG


@pytest.mark.parametrize("last", ["pwritev", "fdatasync"], ids=["a queue file", "its folder"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_what_cannot_be_opened_to_be_synced_is_saved_by_the_next(bench: StoreBench, number: int, last: str) -> None:
    """Connections count as open files, and they end; the disk has refused nothing."""

    def use_up(operation: str, path: Path) -> None:
        if operation == last and QUEUES in path.parents:
            bench.files.fail("open", number)

    (queue, _) = bench.topic()
    for _ in range(LONG):
        bench.append(queue, size=10)
    bench.flush()
    before = bench.store.checkpoint_position
    bench.files.before = use_up
    bench.checkpoint()
    bench.files.before = None
    assert bench.store.checkpoint_position == before
    bench.checkpoint()
    assert bench.store.checkpoint_position > before
    saved_right(bench)
    bench.crash()
    assert len(bench.bodies(bench.queue())) == LONG
    assert not bench.store.recovery.queues_reindexed


def test_a_queue_goes_on_as_before_after_a_failed_save(bench: StoreBench) -> None:
    """Its entries go to files and its front is cut, though nothing is saved any more; else they would gather in memory."""
    (queue, _) = bench.topic()
    for _ in range(LONG):
        bench.append(queue, size=10)
    bench.flush()
    bench.files.fail("fdatasync", path="consumequeue")
    bench.checkpoint()
    index = bench.store._views.index(queue)
    assert not index.is_spilling
    for _ in range(TAIL_BYTES_MAX // ENTRY_BYTES):
        bench.append(queue, size=10)
    bench.flush()
    assert len(index.tail) < TAIL_BYTES_MAX
    assert len(bench.bodies(queue)) == queue.next_offset


def test_files_that_cannot_be_removed_are_removed_later(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    for _ in range(LONG):
        bench.append(queue, size=10)
    bench.flush()
    bench.checkpoint()
    bench.store.append_event(TopicDeleted(1))
    bench.flush()
    bench.files.fail("unlink")
    bench.checkpoint()
    position = bench.store.checkpoint_position
    assert position == bench.store.appended_position, "it is saved all the same"
    assert bench.files.listdir(QUEUES) == ["meters@1"]
    bench.topic("other")
    bench.flush()
    bench.checkpoint()
    assert bench.files.listdir(QUEUES) == []
    saved_right(bench)


@pytest.mark.parametrize("how", ["listdir fails", "unlink fails", "kill", "power cut"])
def test_queue_files_that_were_to_go_when_it_ended_go_later(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of queues that get no messages any more."""
    monkeypatch.setattr(Shelf.__init__, "__defaults__", (64,))  # entries per file
    bench = StoreBench(retention_ms=10_000)
    quiet, other = bench.topic("quiet", 2)
    (busy,) = bench.topic("busy", 1)
    for _ in range(LONG * 2):
        bench.append(quiet, size=10)
        bench.append(other, size=10)
    bench.fill_segments(busy, 1)
    bench.checkpoint()
    folders = [QUEUES / "quiet@1" / "0", QUEUES / "quiet@1" / "1"]
    assert [len(bench.files.listdir(folder)) for folder in folders] == [3, 3]
    bench.clock.advance(20_000)
    bench.maintain(2)
    if how.endswith("fails"):
        bench.files.fail(how.split()[0], errno.EMFILE, path="quiet@1/0")
        bench.checkpoint()
        assert [len(bench.files.listdir(folder)) for folder in folders] == [3, 1], "one queue's folder keeps no other's files"
    else:
        job = bench.store.begin_checkpoint(force=True)
        assert isinstance(job, Checkpoint)
        job._database.save(job.saved)
        bench.kill() if how == "kill" else bench.crash()
        assert [len(bench.files.listdir(folder)) for folder in folders] == [3, 3]
        assert bench.store.recovery.queues_reindexed == 0
    position = bench.store.checkpoint_position
    bench.append(bench.queue("busy"))
    bench.flush()
    bench.checkpoint()
    assert bench.store.checkpoint_position > position
    assert [len(bench.files.listdir(folder)) for folder in folders] == [1, 1]
    looks = bench.files.counts["listdir"]
    bench.append(bench.queue("busy"))
    bench.flush()
    bench.checkpoint()
    assert bench.files.counts["listdir"] == looks, "nothing is left to be looked for"


def test_the_first_save_after_the_views_were_lost_has_everything(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 1)]))
    bench.checkpoint()
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.files.fsync_dir(FOLDER)
    bench.open()
    bench.checkpoint()
    saved_right(bench)
    assert bench.store.recovery.replayed_entries == 0


def test_ten_thousand_quiet_queues_are_one_transaction_and_no_file() -> None:
    bench = StoreBench(segment_bytes=8 << 20)
    queues = [queue for number in range(10) for queue in bench.topic(f"t{number}", 1000)]
    for queue in queues:
        bench.append(queue, size=1)
    bench.flush()
    bench.files.counts.clear()
    bench.checkpoint()
    assert bench.files.counts["commit"] == 1
    assert bench.files.counts["fdatasync"] == bench.files.counts["pwritev"] == bench.files.counts["open"] == 0
    bench.crash()
    assert bench.store.recovery.replayed_entries == 0
    assert all(topic.queues[number].next_offset == 1 for topic in bench.store.tables.topics.values() for number in range(1000))
