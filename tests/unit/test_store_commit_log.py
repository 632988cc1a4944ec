"""The commit log by itself: positions, rolls, spares, flushes, and what a restart does to its files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from zrmq.errors import DiskFullError, FolderUnusableError
from zrmq.files import read_file, replace_file
from zrmq.protocol.batch import KIND_EVENT, encode_entry
from zrmq.store.commit_log import CommitLog, LogFlush, scan_segments
from zrmq.store.open_files import OpenFiles
from zrmq.store.segment import SEGMENT_HEADER_BYTES, encode_segment_header, segment_name
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/data/commitlog")
SEGMENT_BYTES = 4096


def opened(files: FaultyFiles, segment_bytes: int = SEGMENT_BYTES) -> CommitLog:
    files.mkdir(FOLDER)
    commit_log = CommitLog(files, FOLDER, segment_bytes, OpenFiles(files))
    commit_log.load()
    return commit_log


def append(commit_log: CommitLog, size: int = 100) -> tuple[int, int]:
    """One entry of this size, in a new segment if it has to be; where it begins and ends."""
    if commit_log.appended_position + size > commit_log.limit:
        commit_log.roll(5, 0)
    position = commit_log.appended_position
    entry = encode_entry(
        KIND_EVENT, bytes(size - 40), epoch=0, position=position, flushed_position=commit_log.flushed_position,
        store_timestamp_ms=5,
    )
    return position, commit_log.append(entry)


def flush(commit_log: CommitLog) -> LogFlush:
    commit_log.write()
    job = commit_log.begin_flush(commit_log.finish_flush)
    job.run()
    job.finish()
    return job


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def commit_log(files: FaultyFiles) -> CommitLog:
    return opened(files)


def test_an_empty_log_begins_with_its_first_entry(commit_log: CommitLog, files: FaultyFiles) -> None:
    assert (commit_log.start, commit_log.appended_position, commit_log.limit) == (0, 0, 0)
    assert files.listdir(FOLDER) == []
    assert commit_log.segment_at(0) is None
    assert commit_log.read(0, 10) == b""
    assert append(commit_log) == (64, 164)
    assert files.listdir(FOLDER) == [segment_name(0)]
    assert files.size(FOLDER / segment_name(0)) == SEGMENT_BYTES


def test_entries_are_read_once_they_are_written(commit_log: CommitLog) -> None:
    position, end = append(commit_log)
    assert commit_log.read(position, 100) == bytes(100)
    commit_log.write()
    data = commit_log.read(position, 100)
    assert data[:2] == b"ZR"
    assert commit_log.written_position == end
    assert commit_log.read(position, 99_999) == data + bytes(SEGMENT_BYTES - 164)


def test_no_entry_spans_two_segments(commit_log: CommitLog) -> None:
    spans = [append(commit_log, 600) for _ in range(30)]
    flush(commit_log)
    assert len(commit_log.segments) == 5
    for position, end in spans:
        segment = commit_log.segment_at(position)
        assert segment is not None
        assert segment.start + SEGMENT_HEADER_BYTES <= position < end <= segment.end - 40
    found = list(commit_log.scan(0))
    assert [one.position for one in found if one.is_whole and one.header is not None and one.header.kind == KIND_EVENT] == [
        position for position, _ in spans
    ]
    assert all(one.is_whole for one in found[:-1])


def test_segments_are_found_by_position(commit_log: CommitLog) -> None:
    for _ in range(20):
        append(commit_log, 600)
    starts = [segment.start for segment in commit_log.segments]
    assert starts == [0, SEGMENT_BYTES, 2 * SEGMENT_BYTES, 3 * SEGMENT_BYTES]
    for position, start in ((0, 0), (4095, 0), (4096, 4096), (16383, 12288)):
        segment = commit_log.segment_at(position)
        assert segment is not None
        assert segment.start == start
    assert commit_log.segment_at(16384) is None
    assert commit_log.segment_at(-1) is None


def test_the_longest_entry(commit_log: CommitLog) -> None:
    append(commit_log, commit_log.entry_bytes_max)
    append(commit_log, commit_log.entry_bytes_max)
    flush(commit_log)
    assert sum(one.end - one.position == commit_log.entry_bytes_max for one in commit_log.scan(0)) == 2


def test_old_segments_are_closed_once_they_are_flushed(commit_log: CommitLog) -> None:
    for _ in range(10):
        append(commit_log, 600)
    assert all(segment.file is not None for segment in commit_log.segments)
    flush(commit_log)
    assert [segment.file is not None for segment in commit_log.segments] == [False, True]


def test_a_segment_that_ends_during_a_flush_is_synced_by_the_next(commit_log: CommitLog, files: FaultyFiles) -> None:
    append(commit_log)
    commit_log.write()
    job = commit_log.begin_flush(commit_log.finish_flush)
    for _ in range(8):
        append(commit_log, 600)
    commit_log.write()
    job.run()
    job.finish()
    assert commit_log.flushed_position == 164
    assert commit_log.segments[0].file is not None
    assert len(flush(commit_log).segments) == 2
    files.crash()
    again = opened(files)
    assert len([one for one in again.scan(0) if one.is_whole]) == 10


def test_spares_are_taken_before_new_files_are_made(commit_log: CommitLog, files: FaultyFiles) -> None:
    spare = commit_log.next_spare()
    with_rubbish = bytes(range(256)) * 16
    replace_file(files, spare, with_rubbish)
    commit_log.spares.append(spare)
    append(commit_log)
    assert files.listdir(FOLDER) == [segment_name(0)]
    assert commit_log.spares == []
    assert files.counts["allocate"] == 0
    flush(commit_log)
    data = read_file(files, FOLDER / segment_name(0))
    assert data[:64] == encode_segment_header(0, SEGMENT_BYTES)
    assert data[164:] == with_rubbish[164:]


def test_a_file_that_was_made_and_could_not_be_used_is_there_for_the_next_attempt(
    commit_log: CommitLog, files: FaultyFiles
) -> None:
    for _ in range(3):
        files.fail("rename", errno.ENOSPC)
        with pytest.raises(DiskFullError):
            append(commit_log)
    assert len(files.listdir(FOLDER)) == len(commit_log.spares) == 1
    append(commit_log)
    assert files.listdir(FOLDER) == [segment_name(0)]
    assert files.counts["allocate"] == 1


def test_a_spare_that_cannot_be_renamed_is_kept(commit_log: CommitLog, files: FaultyFiles) -> None:
    append(commit_log)
    spare = commit_log.next_spare()
    replace_file(files, spare, bytes(SEGMENT_BYTES))
    commit_log.spares.append(spare)
    files.fail("rename", errno.ENOSPC)
    with pytest.raises(DiskFullError):
        for _ in range(10):
            append(commit_log, 600)
    assert commit_log.spares == [spare]
    assert len(commit_log.segments) == 1
    append(commit_log, 600)
    assert len(commit_log.segments) == 2


def test_no_room_changes_nothing(files: FaultyFiles) -> None:
    commit_log = opened(files)
    append(commit_log)
    files.capacity_bytes = files.used_bytes + SEGMENT_BYTES + 99
    while commit_log.appended_position + 600 <= commit_log.limit:
        append(commit_log, 600)
    position = commit_log.appended_position
    with pytest.raises(DiskFullError, match="the log's next segment needs 4096 and 100 stay free") as caught:
        commit_log.roll(5, 100)
    assert caught.value.facts == {"free_bytes": SEGMENT_BYTES + 99, "needed_bytes": SEGMENT_BYTES + 100, "folder": "/data"}
    assert commit_log.appended_position == position
    assert files.listdir(FOLDER) == [segment_name(0)]
    commit_log.roll(5, 99)
    assert len(commit_log.segments) == 2


def test_spares_have_names_of_their_own(commit_log: CommitLog, files: FaultyFiles) -> None:
    replace_file(files, FOLDER / "spare-7", bytes(SEGMENT_BYTES))
    replace_file(files, FOLDER / "spare-8", b"half made")
    replace_file(files, FOLDER / "notes.txt", b"somebody's")
    again = opened(files)
    assert again.spares == [FOLDER / "spare-7"]
    assert again.next_spare() == FOLDER / "spare-9"
    assert files.listdir(FOLDER) == ["notes.txt", "spare-7"]


def test_segments_may_have_other_lengths_than_new_ones(files: FaultyFiles) -> None:
    commit_log = opened(files)
    for _ in range(10):
        append(commit_log, 600)
    flush(commit_log)
    end = commit_log.appended_position
    commit_log.close()
    again = opened(files, 10_000)
    again.begin_at(end)
    for _ in range(30):
        append(again, 600)
    flush(again)
    assert [segment.start for segment in again.segments] == [0, 4096, 8192, 18192]
    assert all(one.is_whole for one in list(again.scan(0))[:-1])


def test_beginning_in_the_middle_at_the_end_and_behind(files: FaultyFiles) -> None:
    commit_log = opened(files)
    position, _ = append(commit_log)
    flush(commit_log)
    commit_log.close()
    for start in (position, SEGMENT_BYTES - 10, SEGMENT_BYTES):
        again = opened(files)
        again.begin_at(start)
        assert (again.appended_position, again.written_position, again.flushed_position) == (start, start, start)
        place, _ = append(again, 200)
        assert place == (start if start == position else SEGMENT_BYTES + 64)
        again.remove_behind(SEGMENT_BYTES)
    assert files.listdir(FOLDER) == [segment_name(0)]


def test_erasing_and_rewriting(files: FaultyFiles) -> None:
    commit_log = opened(files)
    spans = [append(commit_log, 600) for _ in range(10)]
    flush(commit_log)
    before = [read_file(files, FOLDER / name) for name in files.listdir(FOLDER)]
    files.counts.clear()
    commit_log.rewrite(spans[3][0], spans[8][1])
    assert files.counts["fdatasync"] == 2
    assert [read_file(files, FOLDER / name) for name in files.listdir(FOLDER)] == before
    commit_log.erase(spans[2][0], spans[4][1])
    data = read_file(files, FOLDER / segment_name(0))
    assert not any(data[spans[2][0] : spans[4][1]])
    assert data[: spans[2][0]] == before[0][: spans[2][0]]
    assert data[spans[4][1] :] == before[0][spans[4][1] :]
    commit_log.erase(spans[4][0], spans[4][0])
    commit_log.erase(99_999, 100_099)


def test_the_front_is_taken_off(commit_log: CommitLog, files: FaultyFiles) -> None:
    for _ in range(20):
        append(commit_log, 600)
    flush(commit_log)
    assert commit_log.read(100, 10)
    segment = commit_log.take_front()
    assert (segment.start, commit_log.start) == (0, SEGMENT_BYTES)
    assert commit_log.read(100, 10) == b""
    assert files.listdir(FOLDER)[0] == segment_name(0), "the file is the caller's"
    assert commit_log.size_bytes == 3 * SEGMENT_BYTES
    assert [segment.start for segment in commit_log.take_before(3 * SEGMENT_BYTES)] == [SEGMENT_BYTES, 2 * SEGMENT_BYTES]
    assert commit_log.start == 3 * SEGMENT_BYTES
    commit_log.take_before(99 * SEGMENT_BYTES)
    assert len(commit_log.segments) == 1, "the last one stays"
    assert len(files.listdir(FOLDER)) == 4, "so are theirs"


def test_scanning_stops_where_it_is_told_to(commit_log: CommitLog, files: FaultyFiles) -> None:
    spans = [append(commit_log, 600) for _ in range(20)]
    flush(commit_log)
    for end in (spans[2][1], spans[9][1], spans[19][1]):
        found = list(scan_segments(files, commit_log.segments, 0, end))
        assert all(one.is_whole for one in found)
        assert found[-1].end == end
    assert list(scan_segments(files, commit_log.segments, 0, 0)) == []
    assert next(scan_segments(files, commit_log.segments, spans[7][0])).position == spans[7][0]


def test_empty_and_short_files_are_stretches_without_entries(files: FaultyFiles) -> None:
    commit_log = opened(files)
    append(commit_log)
    flush(commit_log)
    replace_file(files, FOLDER / segment_name(SEGMENT_BYTES), b"")
    replace_file(files, FOLDER / segment_name(2 * SEGMENT_BYTES), b"short")
    again = opened(files)
    found = list(again.scan(0))
    assert [(one.position, one.is_whole) for one in found][:2] == [(64, True), (164, False)]
    assert not any(one.is_whole for one in found[1:])


def test_a_newer_format_is_refused(files: FaultyFiles) -> None:
    files.mkdir(FOLDER)
    header = bytearray(encode_segment_header(0, SEGMENT_BYTES))
    header[8] = 9
    from zlib import crc32

    header[60:] = crc32(header[:60]).to_bytes(4, "little")
    replace_file(files, FOLDER / segment_name(0), bytes(header) + bytes(4032))
    with pytest.raises(FolderUnusableError, match=r"newer zrmq \(format 9"):
        opened(files)


def test_a_failed_sync_is_told_and_nothing_counts_as_flushed(commit_log: CommitLog, files: FaultyFiles) -> None:
    append(commit_log)
    commit_log.write()
    files.fail("fdatasync")
    told: list[LogFlush] = []
    job = commit_log.begin_flush(told.append)
    job.run()
    job.finish()
    assert told == [job]
    assert isinstance(job.error, OSError)
    assert commit_log.flushed_position == 0
