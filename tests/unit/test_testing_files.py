"""The faulty disk has exactly the faults that its first page lists; what it shares with a real one is in tests/contract."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.files import OpenFile, fill_zeros, read_file, write_fully
from zrmq.testing.files import PLENTY_BYTES, SECTOR_BYTES, FaultyFiles, PowerCut

FOLDER = Path("/disk")
FILE = FOLDER / "a"


def disk(seed: int = 0, content: bytes = b"", **more: int) -> FaultyFiles:
    """A disk with one file, synced."""
    files = FaultyFiles(seed, **more)
    files.mkdir(FOLDER)
    file = files.open(FILE, create=True)
    write_fully(file, [content], 0)
    file.fdatasync()
    files.fsync_dir(FOLDER)
    return files


def reopened(files: FaultyFiles) -> OpenFile:
    files.crash()
    return files.open(FILE)


# --- power cuts ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32))
def test_synced_bytes_survive(seed: int) -> None:
    files = disk(seed, b"safe" * 1000)
    files.open(FILE).pwritev([b"x" * 3000], 4000)
    files.crash()
    content = read_file(files, FILE)
    assert content[:4000] == b"safe" * 1000
    assert set(content[4000:]) <= set(b"x\0")


def test_unsynced_writes_are_kept_lost_or_torn() -> None:
    outcomes = set()
    for seed in range(300):
        files = disk(seed, bytes(4 * SECTOR_BYTES))
        files.open(FILE).pwritev([b"x" * 3 * SECTOR_BYTES], 100)
        files.crash()
        content = read_file(files, FILE)
        assert len(content) == 4 * SECTOR_BYTES
        written = content[100 : 100 + 3 * SECTOR_BYTES]
        assert content.count(b"x") == written.count(b"x"), "no byte is harmed that the write does not cover"
        outcomes.add("kept" if set(written) == {ord("x")} else "lost" if not any(written) else "torn")
        if written.count(b"x") % SECTOR_BYTES:
            outcomes.add("torn within a sector")
    assert outcomes == {"kept", "lost", "torn", "torn within a sector"}


def test_a_later_write_may_survive_an_earlier_one() -> None:
    seen = set()
    for seed in range(60):
        files = disk(seed, bytes(2000))
        file = files.open(FILE)
        file.pwritev([b"1"], 0)
        file.pwritev([b"2"], 1000)
        files.crash()
        content = read_file(files, FILE)
        seen.add((content[0:1] == b"1", content[1000:1001] == b"2"))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_the_same_seed_has_the_same_luck() -> None:
    contents = []
    for _ in range(2):
        files = disk(99)
        file = files.open(FILE)
        for position in range(0, 20_000, 700):
            file.pwritev([bytes([position % 251]) * 900], position)
        files.crash()
        contents.append(read_file(files, FILE))
    assert contents[0] == contents[1]


def test_names_are_lost_until_their_folder_is_synced() -> None:
    seen = set()
    for seed in range(40):
        files = disk(seed)
        file = files.open(FOLDER / "new", create=True)
        file.pwritev([b"content"], 0)
        file.fdatasync()
        files.unlink(FILE)
        files.crash()
        seen.add(tuple(files.listdir(FOLDER)))
    assert seen == {(), ("a",), ("new",), ("a", "new")}


def test_synced_names_stay() -> None:
    files = disk()
    files.open(FOLDER / "new", create=True)
    files.unlink(FILE)
    files.fsync_dir(FOLDER)
    files.crash()
    assert files.listdir(FOLDER) == ["new"]


def test_an_open_folder_syncs_names_until_the_process_ends() -> None:
    files = disk()
    with closing(files.open_folder(FOLDER)) as opened:
        files.open(FOLDER / "new", create=True)
        opened.fsync()
        files.crash()
        assert files.listdir(FOLDER) == ["a", "new"]
        with pytest.raises(OSError, match="Bad file descriptor"):
            opened.fsync()


def test_without_a_descriptor_no_folder_is_synced() -> None:
    files = disk()
    files.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        files.fsync_dir(FOLDER)


def test_a_rename_is_whole() -> None:
    seen = set()
    for seed in range(40):
        files = disk(seed, b"old")
        file = files.open(FOLDER / "draft", create=True)
        file.pwritev([b"new"], 0)
        file.fdatasync()
        files.fsync_dir(FOLDER)
        files.rename(FOLDER / "draft", FILE)
        files.crash()
        seen.add((read_file(files, FILE), "draft" in files.listdir(FOLDER)))
    assert seen == {(b"old", True), (b"new", False)}


def test_folders_stay_when_they_are_made() -> None:
    files = disk()
    files.mkdir(FOLDER / "deep")
    files.fsync_dir(FOLDER)
    files.rmdir(FOLDER / "deep")
    files.mkdir(FOLDER / "deep" / "deeper")
    files.crash()
    assert files.listdir(FOLDER / "deep") == ["deeper"]


def test_what_is_open_does_not_outlive_a_crash() -> None:
    files = disk(content=b"abc")
    file = files.open(FILE)
    lock = files.lock(FOLDER / "lock", "")
    files.crash()
    for use in (lambda: file.pread(1, 0), lambda: file.pwritev([b"x"], 0), file.fdatasync, lambda: file.allocate(10)):
        with pytest.raises(OSError, match="Bad file"):
            use()
    again = files.lock(FOLDER / "lock", "")
    lock.release()
    with pytest.raises(Exception, match="in use"):
        files.lock(FOLDER / "lock", "")
    again.release()


def test_a_killed_process_loses_nothing_it_wrote() -> None:
    files = disk()
    file = files.open(FILE)
    file.pwritev([b"unsynced"], 0)
    files.open(FOLDER / "new", create=True)
    files.lock(FOLDER / "lock", "")
    files.kill()
    assert read_file(files, FILE) == b"unsynced"
    assert files.listdir(FOLDER) == ["a", "lock", "new"]
    files.lock(FOLDER / "lock", "")
    with pytest.raises(OSError, match="Bad file"):
        file.pread(1, 0)


def test_a_kill_syncs_nothing() -> None:
    lost = 0
    for seed in range(20):
        files = disk(seed)
        files.open(FILE).pwritev([b"unsynced"], 0)
        files.kill()
        files.crash()
        lost += files.size(FILE) == 0
    assert lost


def test_the_power_goes_in_the_middle_of_the_change_asked_for() -> None:
    files = disk()
    file = files.open(FILE)
    files.cut_power_after(2)
    file.pwritev([b"1"], 0)
    file.fdatasync()
    with pytest.raises(PowerCut):
        file.pwritev([b"2"], 1)
    looks = (lambda: file.pread(1, 0), lambda: files.listdir(FOLDER), lambda: files.open(FILE), lambda: files.free_bytes(FOLDER))
    for use in looks:
        with pytest.raises(PowerCut):
            use()
    files.crash()
    assert read_file(files, FILE) in (b"1", b"12")
    files.open(FILE).pwritev([b"3"], 0)


@pytest.mark.parametrize("operation", ["open", "fdatasync", "fsync_dir", "rename", "unlink", "mkdir", "rmdir", "allocate"])
def test_any_change_can_be_the_last(operation: str) -> None:
    files = disk()
    files.mkdir(FOLDER / "empty")
    file = files.open(FILE)
    changes = {
        "open": lambda: files.open(FOLDER / "new", create=True),
        "fdatasync": file.fdatasync,
        "fsync_dir": lambda: files.fsync_dir(FOLDER),
        "rename": lambda: files.rename(FILE, FOLDER / "b"),
        "unlink": lambda: files.unlink(FILE),
        "mkdir": lambda: files.mkdir(FOLDER / "new"),
        "rmdir": lambda: files.rmdir(FOLDER / "empty"),
        "allocate": lambda: file.allocate(100),
    }
    files.cut_power_after(0)
    with pytest.raises(PowerCut):
        changes[operation]()
    files.crash()
    assert files.listdir(FOLDER) == ["a", "empty"]


# --- calls that fail ----------------------------------------------------------------------------------------------------


def test_calls_fail_as_often_as_told() -> None:
    files = disk()
    file = files.open(FILE)
    files.fail("pwritev", errno.ENOSPC, times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="No space") as caught:
            file.pwritev([b"x"], 0)
        assert caught.value.errno == errno.ENOSPC
    file.pwritev([b"x"], 0)
    files.fail("pwritev", path="other")
    file.pwritev([b"x"], 0)
    files.fail("pread")
    files.heal()
    assert file.pread(1, 0) == b"x"


def test_a_failed_sync_loses_writes_that_are_still_read_back() -> None:
    lost = 0
    for seed in range(40):
        files = disk(seed)
        file = files.open(FILE)
        file.pwritev([b"doubtful"], 0)
        files.fail("fdatasync")
        with pytest.raises(OSError, match="Input/output"):
            file.fdatasync()
        assert file.pread(8, 0) == b"doubtful"
        file.fdatasync()
        assert file.pread(8, 0) == b"doubtful"
        files.crash()
        lost += read_file(files, FILE) == b""
    assert 5 < lost < 35


def test_a_full_disk_takes_what_fits() -> None:
    files = disk(content=b"12345", capacity_bytes=10)
    file = files.open(FILE)
    assert files.free_bytes(FOLDER) == 5
    assert file.pwritev([b"abcdefgh"], 4) == 6
    assert files.free_bytes(FOLDER) == 0
    with pytest.raises(OSError, match="No space"):
        file.pwritev([b"x"], 10)
    assert file.pwritev([b"overwriting"[:10]], 0) == 10
    with pytest.raises(OSError, match="No space"):
        file.allocate(11)
    with pytest.raises(OSError, match="No space"):
        fill_zeros(file, 5, 20)
    files.unlink(FILE)
    assert files.free_bytes(FOLDER) == 10
    assert disk().free_bytes(FOLDER) == PLENTY_BYTES


def test_short_writes_take_a_beginning() -> None:
    files = disk()
    files.short_writes = True
    file = files.open(FILE)
    taken = {file.pwritev([b"0123456789"], 0) for _ in range(50)}
    assert 10 in taken
    assert min(taken) >= 1
    assert len(taken) > 5
    write_fully(file, [b"abc", b"defg", b"hij"] * 20, 0)
    assert file.pread(1000, 0)[:200] == b"abcdefghij" * 20


# --- silent damage ------------------------------------------------------------------------------------------------------


def test_rot_flips_one_bit_on_the_disk() -> None:
    files = disk(content=bytes(1000))
    at = files.rot(FILE)
    content = read_file(files, FILE)
    assert [index for index, byte in enumerate(content) if byte] == [at]
    assert content[at].bit_count() == 1
    files.crash()
    assert read_file(files, FILE) == content
    assert files.rot(FILE, 7) == 7
    with pytest.raises(FileNotFoundError):
        files.rot(FOLDER / "nothing")


def test_bytes_are_replaced_on_the_disk() -> None:
    files = disk(content=b"0123456789")
    files.replace(FILE, 7, b"abc")
    assert read_file(files, FILE) == b"0123456abc"
    files.crash()
    assert read_file(files, FILE) == b"0123456abc"
    with pytest.raises(ValueError, match="none to replace"):
        files.replace(FILE, 8, b"abc")


def test_bad_sectors_cannot_be_read() -> None:
    files = disk(content=b"0123456789")
    file = files.open(FILE)
    files.bad_ranges[FILE] = [(3, 5)]
    assert file.pread(3, 0) == b"012"
    assert file.pread(9, 5) == b"56789"
    for size, position in ((4, 0), (1, 4), (10, 0)):
        with pytest.raises(OSError, match="Input/output"):
            file.pread(size, position)
    files.bad_ranges.clear()
    assert file.pread(10, 0) == b"0123456789"


def test_a_misdirected_write_lands_elsewhere_once() -> None:
    files = disk(content=b"..........")
    file = files.open(FILE)
    files.misdirect(FILE, 4)
    file.pwritev([b"ab"], 0)
    file.pwritev([b"cd"], 8)
    assert file.pread(10, 0) == b"....ab..cd"


def test_a_hook_sees_every_operation_before_it_happens() -> None:
    files = disk()
    seen: list[tuple[str, str]] = []
    files.before = lambda operation, path: seen.append((operation, path.name))
    file = files.open(FILE)
    file.pwritev([b"x"], 0)
    file.fdatasync()
    files.rename(FILE, FOLDER / "b")
    file.fdatasync()
    assert seen == [("open", "a"), ("pwritev", "a"), ("fdatasync", "a"), ("rename", "a"), ("fdatasync", "b")]


# --- databases ----------------------------------------------------------------------------------------------------------


def rows(files: FaultyFiles) -> list[int]:
    return [number for (number,) in files.connect(FOLDER / "db").execute("select n from t")]


def database(seed: int = 0) -> tuple[FaultyFiles, sqlite3.Connection]:
    files = disk(seed)
    connection = files.connect(FOLDER / "db")
    connection.execute("create table t (n)")
    connection.execute("begin")
    connection.execute("insert into t values (1)")
    connection.execute("commit")
    return files, connection


@pytest.mark.parametrize("end", [FaultyFiles.crash, FaultyFiles.kill])
def test_commits_survive_and_open_transactions_do_not(end: object) -> None:
    files, connection = database()
    connection.execute("begin")
    connection.execute("insert into t values (2)")
    assert callable(end)
    end(files)
    assert rows(files) == [1]


def test_a_commit_can_fail() -> None:
    files, connection = database()
    connection.execute("begin")
    connection.execute("insert into t values (2)")
    files.fail("commit", errno.ENOSPC)
    with pytest.raises(sqlite3.OperationalError, match="No space left"):
        connection.execute("commit")
    connection.rollback()
    assert rows(files) == [1]


def test_a_commit_in_a_power_cut_happened_or_did_not() -> None:
    seen = set()
    for seed in range(30):
        files, connection = database(seed)
        connection.execute("begin")
        connection.execute("insert into t values (2)")
        files.cut_power_after(0)
        with suppress(PowerCut):
            connection.execute("commit")
        with pytest.raises(PowerCut):
            connection.execute("select 1")
        files.crash()
        seen.add(tuple(rows(files)))
    assert seen == {(1,), (1, 2)}


def test_removing_a_database_needs_its_folder_synced_too() -> None:
    seen = set()
    for seed in range(20):
        files, _ = database(seed)
        files.unlink(FOLDER / "db")
        files.crash()
        seen.add("db" in files.listdir(FOLDER))
    assert seen == {False, True}
