"""The store as its owner uses it: turns, groups of flushes, what is visible when, what is refused, and what a folder is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.unit.store_bench import ASYNC, FOLDER, LOG, SEGMENT_BYTES, StoreBench, batch, log_entries, run
from zrmq.errors import (
    ClosedError,
    ConfigError,
    DiskFullError,
    FolderLockedError,
    FolderUnusableError,
    PayloadTooLargeError,
    ResourceLimitError,
    StoreFailedError,
)
from zrmq.files import DiskFiles, replace_file
from zrmq.protocol.batch import KIND_EVENT, BatchHeader, encode_entry
from zrmq.protocol.events import (
    BrokerStarted,
    BrokerStopped,
    GroupSubscribed,
    LeaseGranted,
    OffsetsCommitted,
    SessionTimeoutChanged,
    encode_event,
)
from zrmq.protocol.requests import PullStatus
from zrmq.store.config import StoreConfig
from zrmq.store.segment import encode_segment_header, segment_name
from zrmq.store.store import Store
from zrmq.testing.files import FaultyFiles


@pytest.fixture
def bench() -> StoreBench:
    return StoreBench()


# --- a turn -------------------------------------------------------------------------------------------------------------


def test_a_batch_gets_its_place(bench: StoreBench) -> None:
    queue, other = bench.topic()
    bench.clock.advance(5)
    first = bench.append(queue, count=3)
    assert first == (0, bench.clock.time_ms(), bench.store.appended_position)
    assert bench.append(queue).base_offset == 3
    assert bench.append(other).base_offset == 0
    assert (queue.min_offset, queue.visible_offset, queue.next_offset) == (0, 0, 4)


def test_positions_move_in_order(bench: StoreBench) -> None:
    store = bench.store
    (queue, _) = bench.topic()
    bench.flush()
    start = store.flushed_position
    assert start == store.written_position == store.appended_position
    end = bench.append(queue).end_position
    assert (store.flushed_position, store.written_position, store.appended_position) == (start, start, end)
    store.write()
    assert (store.flushed_position, store.written_position, store.appended_position) == (start, end, end)
    bench.flush()
    assert (store.flushed_position, store.written_position, store.appended_position) == (end, end, end)


def test_a_turn_is_one_write_and_a_flush_is_one_sync(bench: StoreBench) -> None:
    queues = bench.topic(queue_count=10)
    bench.flush()
    bench.files.counts.clear()
    for number in range(90):
        bench.append(queues[number % 10], size=1)
    assert bench.files.counts.total() == 0
    bench.store.write()
    bench.store.write()
    assert bench.files.counts == {"pwritev": 1}
    bench.flush()
    assert bench.files.counts == {"pwritev": 1, "fdatasync": 1}
    assert bench.store.begin_flush() is None
    assert bench.files.counts == {"pwritev": 1, "fdatasync": 1}


def test_a_turn_with_more_entries_than_one_call_takes_is_still_one_call() -> None:
    bench = StoreBench(segment_bytes=1 << 20)
    (queue,) = bench.topic(queue_count=1)
    bench.flush()
    bench.files.counts.clear()
    for _ in range(1400):
        bench.append(queue, size=10)
    bench.store.write()
    assert bench.files.counts == {"pwritev": 1}
    bench.flush()
    assert len(bench.bodies(queue)) == 1400


def test_short_writes_are_completed(bench: StoreBench) -> None:
    bench.files.short_writes = True
    (queue, _) = bench.topic()
    for _ in range(20):
        bench.append(queue, count=3, size=200)
        bench.flush()
    assert len(bench.bodies(queue)) == 60
    bench.crash()
    assert len(bench.bodies(bench.queue())) == 60


def test_sync_topics_are_visible_after_the_flush_and_async_ones_after_the_write(bench: StoreBench) -> None:
    (slow,) = bench.topic("slow", 1)
    (quick,) = bench.topic("quick", 1, flush_mode=ASYNC)
    bench.flush()
    assert bench.store.take_visible() == []
    bench.append(slow, count=2)
    bench.append(quick, count=3)
    assert bench.store.take_visible() == []
    bench.store.write()
    assert bench.store.take_visible() == [quick]
    assert (slow.visible_offset, quick.visible_offset) == (0, 3)
    assert bench.store.read(slow, 0, 1000).status is PullStatus.NOTHING
    bench.flush()
    assert bench.store.take_visible() == [slow]
    assert (slow.visible_offset, quick.visible_offset) == (2, 3)
    assert bench.store.take_visible() == []


def test_a_flush_shows_what_was_written_when_it_began(bench: StoreBench) -> None:
    (queue, other) = bench.topic()
    bench.append(queue)
    job = bench.store.begin_flush()
    assert job is not None
    end = bench.append(queue).end_position
    bench.append(other)
    bench.store.write()
    assert bench.store.begin_flush() is None, "one flush at a time"
    run(job)
    assert bench.store.take_visible() == [queue]
    assert queue.visible_offset == 1
    assert bench.store.flushed_position < end
    bench.flush()
    assert queue.visible_offset == 2
    assert bench.store.flushed_position == end or bench.store.flushed_position > end


def test_what_waits_for_a_flush_says_so(bench: StoreBench) -> None:
    (sync,) = bench.topic("sync", 1)
    (later,) = bench.topic("later", 1, flush_mode=ASYNC)
    assert bench.store.needs_flush, "topics are events"
    bench.flush()
    assert not bench.store.needs_flush
    bench.append(later)
    bench.store.write()
    assert not bench.store.needs_flush, "a timer flushes async topics"
    bench.append(sync)
    bench.store.write()
    assert bench.store.needs_flush
    bench.flush()
    assert not bench.store.needs_flush
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 0)]))
    assert bench.store.needs_flush
    bench.flush()
    assert bench.store.begin_flush() is None


def test_events_change_the_tables_at_once(bench: StoreBench) -> None:
    bench.topic()
    end = bench.store.append_event(GroupSubscribed("g", "meters", 5, [(0, 7)]))
    assert end == bench.store.appended_position
    assert bench.store.tables.groups["g"].subscriptions[""]["meters"].starts == {0: 7}
    bench.flush()
    assert bench.store.flushed_position == end


def test_entries_say_what_was_flushed_when_they_were_appended(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.flush()
    flushed = bench.store.flushed_position
    bench.append(queue)
    bench.append(queue)
    bench.flush()
    bench.append(queue)
    bench.flush()
    said = [header.flushed_position for header, content in log_entries(bench.files) if isinstance(content, BatchHeader)]
    assert said[0] == said[1] == flushed
    assert said[2] > said[1]


# --- segments -----------------------------------------------------------------------------------------------------------


def test_the_log_rolls_inside_a_turn(bench: StoreBench) -> None:
    (queue, other) = bench.topic()
    for number in range(100):
        bench.append(queue if number % 3 else other, size=700)
    assert len(bench.segments()) > 3
    bench.flush()
    assert len(bench.bodies(queue)) + len(bench.bodies(other)) == 100
    bench.crash()
    assert len(bench.bodies(bench.queue())) + len(bench.bodies(bench.queue(queue_id=1))) == 100


def test_a_roll_syncs_the_old_segment_then_the_new_one_then_the_folder(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.flush()
    before = len(bench.segments())
    while len(bench.segments()) == before:
        bench.append(queue, size=900)
    calls: list[tuple[str, str]] = []
    bench.files.before = lambda operation, path: calls.append((operation, path.name))
    bench.flush()
    syncs = [call for call in calls if call[0].startswith("f")]
    assert syncs == [
        ("fdatasync", "00000000000000000000.log"), ("fdatasync", f"{SEGMENT_BYTES:020d}.log"), ("fsync_dir", "commitlog"),
    ]


def test_a_flush_under_way_while_the_log_rolls_covers_only_what_was_before(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    job = bench.store.begin_flush()
    assert job is not None
    before = len(bench.segments())
    while len(bench.segments()) == before:
        bench.append(queue, size=900)
    bench.store.write()
    run(job)
    assert queue.visible_offset == 1
    bench.flush()
    total = queue.next_offset
    assert queue.visible_offset == total
    bench.crash()
    assert len(bench.bodies(bench.queue())) == total


def test_a_batch_longer_than_a_segment_is_refused(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    with pytest.raises(PayloadTooLargeError, match="raise segment_bytes") as caught:
        bench.append(queue, size=SEGMENT_BYTES)
    assert caught.value.facts["limit_bytes"] == SEGMENT_BYTES - 64 - 40
    assert queue.next_offset == 0
    header, _ = batch(size=1)
    bench.append(queue, size=SEGMENT_BYTES - 64 - 40 - header.length - 2)
    bench.flush()
    assert len(bench.bodies(queue)) == 1
    with pytest.raises(PayloadTooLargeError):
        bench.store.append_event(OffsetsCommitted("g" * SEGMENT_BYTES, "", []))


# --- a full disk --------------------------------------------------------------------------------------------------------


def full_bench(free_segments: int) -> StoreBench:
    """A store on a disk with room for so many segments more than the first, of which two stay free."""
    bench = StoreBench(free_refuse_bytes=2 * SEGMENT_BYTES, free_delete_bytes=0, free_warn_bytes=0)
    bench.topic()
    bench.flush()
    bench.files.capacity_bytes = bench.files.used_bytes + free_segments * SEGMENT_BYTES + 1000
    return bench


def test_a_full_disk_refuses_batches_before_anything_changed() -> None:
    bench = full_bench(3)
    queue = bench.queue()
    with pytest.raises(DiskFullError, match="sending works again by itself") as caught:
        for _ in range(100):
            bench.append(queue, size=700)
    assert caught.value.facts["needed_bytes"] == 3 * SEGMENT_BYTES
    count = queue.next_offset
    assert count > 20
    with pytest.raises(DiskFullError):
        bench.append(queue, size=700)
    assert queue.next_offset == count
    bench.flush()
    assert bench.store.failure is None
    assert len(bench.bodies(queue)) == count
    bench.crash()
    assert len(bench.bodies(bench.queue())) == count


def test_events_may_use_what_stays_free_for_them() -> None:
    bench = full_bench(3)
    queue = bench.queue()
    with pytest.raises(DiskFullError):
        for _ in range(100):
            bench.append(queue, size=700)
    for number in range(150):
        bench.store.append_event(OffsetsCommitted("group" * 20, "", [(1, 0, number % 10)]))
    bench.flush()
    assert bench.store.failure is None
    with pytest.raises(DiskFullError, match="0 stay free"):
        for number in range(1000):
            bench.store.append_event(OffsetsCommitted("group" * 20, "", [(1, 0, number % 10)]))
    bench.flush()
    assert bench.store.failure is None


def test_a_full_disk_heals_by_itself() -> None:
    bench = full_bench(2)
    queue = bench.queue()
    with pytest.raises(DiskFullError):
        for _ in range(100):
            bench.append(queue, size=700)
    bench.files.capacity_bytes = None
    bench.append(queue, size=700)
    bench.flush()
    assert bench.bodies(queue)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_log_that_may_open_no_file_heals_by_itself(number: int) -> None:
    """Connections count as open files, and they end."""
    bench = StoreBench(free_refuse_bytes=0)
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.files.fail("open", number, times=3)
    refused = 0
    for _ in range(100):
        try:
            bench.append(queue, size=700)
        except DiskFullError as error:
            assert "may open no more files" in error.message
            refused += 1
    assert refused == 3
    bench.flush()
    assert len(bench.bodies(queue)) == 98


def test_a_folder_that_may_not_be_opened_now_may_be_tried_again() -> None:
    bench = StoreBench()
    bench.store.close()
    bench.files.fail("open", errno.EMFILE)
    with pytest.raises(ResourceLimitError, match="no more open files for the data folder .*; close some"):
        bench.open()
    bench.open()


def test_a_flush_behind_a_roll_opens_no_file(bench: StoreBench) -> None:
    """The roll may have taken the last descriptor, and a flush that failed would be the end of storing."""
    (queue, _) = bench.topic()
    bench.flush()
    before = len(bench.segments())
    while len(bench.segments()) == before:
        bench.append(queue, size=900)
    bench.files.fail("open", errno.EMFILE, times=99)
    bench.flush()
    assert bench.store.failure is None
    count = queue.visible_offset
    assert count == queue.next_offset > 0
    bench.crash()
    assert len(bench.bodies(bench.queue())) == count


def test_a_disk_that_does_not_tell_its_room_has_failed() -> None:
    bench = full_bench(3)
    queue = bench.queue()
    bench.append(queue)
    bench.files.capacity_bytes = bench.files.used_bytes + SEGMENT_BYTES
    bench.maintain()
    bench.clock.advance(1_000)
    bench.files.fail("free_bytes")
    with pytest.raises(StoreFailedError, match="tell how much room it has"):
        bench.append(queue)


def test_too_little_free_space_refuses_batches_even_while_a_segment_has_room() -> None:
    bench = full_bench(3)
    queue = bench.queue()
    bench.append(queue)
    bench.files.capacity_bytes = bench.files.used_bytes + SEGMENT_BYTES
    bench.append(queue)
    bench.maintain()
    with pytest.raises(DiskFullError, match="less than 32768 bytes left"):
        bench.append(queue)
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 1)]))
    bench.files.capacity_bytes = None
    looks = bench.files.counts["free_bytes"]
    with pytest.raises(DiskFullError):
        bench.append(queue)
    assert bench.files.counts["free_bytes"] == looks, "the system is not asked at every attempt"
    bench.clock.advance(200)
    bench.append(queue)
    bench.flush()
    assert len(bench.bodies(queue)) == 3


def test_a_file_that_cannot_be_made_for_lack_of_room_refuses_and_leaves_nothing() -> None:
    bench = StoreBench(free_refuse_bytes=0)
    (queue, _) = bench.topic()
    bench.files.fail("allocate", errno.ENOSPC, times=2)
    with pytest.raises(DiskFullError):
        for _ in range(100):
            bench.append(queue, size=700)
    assert not [name for name in bench.files.listdir(LOG) if name.startswith("spare")]
    bench.files.heal()
    bench.append(queue, size=700)
    assert bench.store.failure is None


# --- a disk that refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "number"), [("pwritev", errno.EIO), ("pwritev", errno.ENOSPC), ("fdatasync", errno.EIO)])
def test_after_a_failed_write_or_sync_nothing_is_stored(bench: StoreBench, operation: str, number: int) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.flush()
    bench.append(queue)
    bench.files.fail(operation, number)
    if operation == "fdatasync":
        bench.flush()
    else:
        with pytest.raises(StoreFailedError):
            bench.flush()
    assert bench.store.failure is not None
    assert queue.visible_offset == 1
    for refused in (
        lambda: bench.append(queue), lambda: bench.store.append_event(BrokerStarted(1)), bench.store.write,
        bench.store.begin_flush,
    ):
        with pytest.raises(StoreFailedError, match="until the broker is restarted; check the disk first"):
            refused()
    assert bench.store.begin_checkpoint(force=True) is None
    assert bench.store.begin_maintenance() is None
    assert len(bench.bodies(queue)) == 1, "what was flushed is still served"
    bench.store.close()


def test_a_failed_sync_is_not_made_good_by_the_next_one() -> None:
    """The page cache still has the batch after the process has ended, the disk may not, and the next sync would not write it."""
    for seed in range(30):
        bench = StoreBench(seed)
        (queue, _) = bench.topic()
        bench.append(queue)
        bench.flush()
        bench.append(queue)
        bench.files.fail("fdatasync")
        bench.flush()
        bench.store.close()
        bench.files.kill()
        bench.open()
        assert bench.queue().next_offset == 2
        bench.crash()
        assert bench.queue().next_offset == 2, "what recovery kept it has written again"
        assert len(bench.bodies(bench.queue())) == 2


def test_a_new_segment_that_the_disk_refuses_fails_the_store(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.files.fail("rename")
    with pytest.raises(StoreFailedError, match="go on in a new segment"):
        for _ in range(100):
            bench.append(queue, size=700)
    with pytest.raises(StoreFailedError):
        bench.append(queue)


# --- opening and closing ------------------------------------------------------------------------------------------------


def test_each_opening_counts(bench: StoreBench) -> None:
    first = bench.store.boot
    assert bench.store.recovery.is_clean
    assert bench.reopen().boot == first + 1
    assert bench.store.recovery.is_clean
    assert bench.crash().boot == first + 2
    assert not bench.store.recovery.is_clean
    bench.kill()
    assert bench.store.boot == first + 3
    events = [content for _, content in log_entries(bench.files)]
    assert events == [
        BrokerStarted(first), BrokerStopped(), BrokerStarted(first + 1), BrokerStarted(first + 2), BrokerStarted(first + 3)
    ]


def test_a_broker_whose_disk_was_emptied_counts_on() -> None:
    """Lease epochs and topic ids that clients remember of the former disk mean nothing on the new one."""
    bench = StoreBench()
    for _ in range(3):
        bench.crash()
    former = bench.store.boot
    bench.clock.advance(10_000)
    bench.disk = FaultyFiles()
    assert bench.open().boot > former


def test_a_first_start_that_is_damaged_is_outbid_by_the_newest_entry() -> None:
    """The clock was set back since, and nothing else says the number."""
    bench = StoreBench()
    (queue, _) = bench.topic()
    bench.append(queue)
    former = bench.store.boot
    bench.store.close()
    bench.clock.step(-60_000)
    bench.rot(64 + 42)  # of the first entry, behind the segment's header
    bench.files.unlink(bench.folder / "views.db")
    assert bench.open().boot > former


def test_no_clock_leads_to_a_lease_that_cannot_be_read() -> None:
    """Lease epochs are made of the boot number."""
    bench = StoreBench()
    bench.clock.step(4_102_444_800_000 - bench.clock.time_ms())  # the year 2100
    bench.disk = FaultyFiles()
    former = bench.open().boot
    bench.topic()
    bench.store.append_event(LeaseGranted("g", 1, 0, "c", (former << 32) + 1))
    bench.flush()
    assert bench.crash().boot == former + 1
    assert bench.store.tables.groups["g"].leases[1, 0].lease_epoch == (former << 32) + 1


def test_no_loss_leads_to_a_lease_that_cannot_be_read(bench: StoreBench) -> None:
    """Ninety gigabytes are gone and the views with them: by their size they may have held more starts than there are numbers."""
    bench.files.kill()
    start = 90_000_000_000 // SEGMENT_BYTES * SEGMENT_BYTES
    entry = encode_entry(
        KIND_EVENT, encode_event(SessionTimeoutChanged(5)), epoch=0, position=start + 64, flushed_position=start + 64,
        store_timestamp_ms=1,
    )
    content = encode_segment_header(start, SEGMENT_BYTES) + entry
    replace_file(bench.files, LOG / segment_name(start), content.ljust(SEGMENT_BYTES, b"\0"))
    bench.files.unlink(FOLDER / "views.db")
    assert bench.open().recovery.starts_lost > 1 << 31
    assert bench.store.boot < 1 << 31
    bench.topic()
    bench.store.append_event(LeaseGranted("g", 1, 0, "c", (bench.store.boot << 32) + 1))
    bench.flush()
    bench.crash()
    bench.store.append_event(BrokerStarted((1 << 31) - 1))
    bench.flush()
    assert bench.crash().boot == (1 << 31) - 1, "there is no greater one"


def test_closing_flushes_and_says_so(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.store.close()
    bench.store.close()
    for refused in (lambda: bench.append(queue), bench.store.write, bench.store.begin_flush):
        with pytest.raises(ClosedError):
            refused()
    assert bench.store.begin_checkpoint(force=True) is None
    assert bench.store.begin_maintenance() is None
    bench.files.crash()
    bench.open()
    assert bench.store.recovery.is_clean
    assert bench.store.recovery.replayed_entries == 0
    assert len(bench.bodies(bench.queue())) == 1


def test_closing_saves_what_a_checkpoint_that_never_ran_had_taken(bench: StoreBench) -> None:
    bench.topic()
    bench.store.append_event(OffsetsCommitted("g", "", [(1, 0, 0)]))
    assert bench.store.begin_checkpoint(force=True) is None, "it waits for the flush"
    bench.reopen()
    assert bench.store.recovery.replayed_entries == 0
    assert bench.store.tables.groups["g"].offsets == {("", 1, 0): 0}


def test_a_store_that_cannot_say_goodbye_closes_all_the_same(bench: StoreBench) -> None:
    (queue, _) = bench.topic()
    bench.append(queue)
    bench.files.fail("fdatasync")
    bench.store.close()
    before = bench.store.boot
    bench.crash()
    assert bench.store.boot == before + 1


def test_a_folder_has_one_store(bench: StoreBench) -> None:
    with pytest.raises(FolderLockedError, match=r"in use by pid 0 on this machine, since 2023-11-14T22:13:20\+00:00; stop that"):
        bench.open()
    bench.store.close()
    bench.open()


def test_a_folder_belongs_to_one_broker(bench: StoreBench) -> None:
    bench.store.close()
    with pytest.raises(FolderUnusableError, match="data of broker 'broker-a' of cluster 'test', not of 'broker-b'"):
        Store.open(FOLDER, files=bench.files, clock=bench.clock, config=bench.config, broker_name="broker-b", cluster="test")
    with pytest.raises(FolderUnusableError, match="cluster 'test'"):
        Store.open(FOLDER, files=bench.files, clock=bench.clock, config=bench.config, broker_name="broker-a", cluster="other")
    bench.open()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("not a folder")
    with pytest.raises(FolderUnusableError, match=r"cannot be used: .*use another one"):
        StoreBench(files=DiskFiles(), folder=path)


def test_a_folder_that_cannot_be_written() -> None:
    files = FaultyFiles()
    for operation in ("mkdir", "open", "pwritev", "fdatasync", "commit"):
        files.crash()
        files.fail(operation, errno.EROFS)
        with pytest.raises((FolderUnusableError, StoreFailedError)):
            StoreBench(files=files)
    files.crash()
    StoreBench(files=files)


def test_a_failed_opening_lets_go_of_the_folder(bench: StoreBench) -> None:
    bench.store.close()
    bench.files.fail("fdatasync")
    with pytest.raises((FolderUnusableError, StoreFailedError)):
        bench.open()
    bench.open()


def test_a_disk_too_full_to_start_on_says_so() -> None:
    files = FaultyFiles(capacity_bytes=8000)
    with pytest.raises(DiskFullError):
        StoreBench(files=files)
    files.capacity_bytes = None
    StoreBench(files=files)


def test_segments_of_a_newer_format_are_refused(bench: StoreBench) -> None:
    bench.store.close()
    from zrmq.store import segment

    header = bytearray(segment.encode_segment_header(0, SEGMENT_BYTES))
    header[8] = 2
    header[60:64] = segment.crc32(bytes(header[:60])).to_bytes(4, "little")
    file = bench.files.open(LOG / segment.segment_name(0))
    file.pwritev([bytes(header)], 0)
    with pytest.raises(FolderUnusableError, match="written by a newer zrmq"):
        bench.open()


def test_the_same_on_the_real_disk(tmp_path: Path) -> None:
    bench = StoreBench(files=DiskFiles(), folder=tmp_path / "data")
    (queue, other) = bench.topic()
    for number in range(120):
        bench.append(queue if number % 3 else other, size=300)
        if number % 10 == 0:
            bench.flush()
    bench.flush()
    bench.checkpoint()
    bench.maintain(3)
    with pytest.raises(FolderLockedError):
        bench.open()
    before = bench.bodies(queue), bench.bodies(other)
    bench.reopen()
    assert (bench.bodies(bench.queue()), bench.bodies(bench.queue(queue_id=1))) == before
    bench.store.close()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["broker.toml", "commitlog", "lock", "views.db"]


def test_the_config_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least 4 KiB"):
        StoreConfig(segment_bytes=1000)
    with pytest.raises(ConfigError, match="less than three segments"):
        StoreConfig(store_bytes_max=64 << 20)
    StoreConfig(store_bytes_max=3 * (64 << 20))


def test_a_spoiled_identity_is_reported() -> None:
    bench = StoreBench()
    bench.store.close()
    replace_file(bench.files, FOLDER / "broker.toml", b"\xff\xfe")
    with pytest.raises(FolderUnusableError, match="It says whose data this is"):
        bench.open()
