"""What the store counts on of a file system, asked of the real one and of its faulty twin alike."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from zrmq.errors import FolderLockedError
from zrmq.files import (
    IOV_MAX,
    DiskFiles,
    Files,
    fill_zeros,
    read_file,
    read_fully,
    remove_tree,
    replace_file,
    write_fully,
)
from zrmq.testing.files import FaultyFiles


@pytest.fixture(params=[DiskFiles, FaultyFiles])
def files(request: pytest.FixtureRequest) -> Files:
    made: Files = request.param()
    return made


@pytest.fixture
def folder(files: Files, tmp_path: Path) -> Iterator[Path]:
    """An empty folder on the file system under test."""
    path = tmp_path / "folder"
    files.mkdir(path)
    return path


# --- files --------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        assert file.pwritev([b"one ", bytearray(b"two "), memoryview(b"three")], 0) == 13
        assert file.pwritev([b"TWO"], 4) == 3
        file.fdatasync()
        assert file.pread(100, 0) == b"one TWO three"
        assert file.pread(3, 4) == b"TWO"
        assert file.pread(5, 13) == b""
    assert files.size(folder / "a") == 13


def test_two_openings_see_one_file(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as one, closing(files.open(folder / "a")) as other:
        one.pwritev([b"abc"], 0)
        assert other.pread(3, 0) == b"abc"


def test_a_hole_reads_as_zeros(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        file.pwritev([b"x"], 10)
        assert file.pread(20, 0) == bytes(10) + b"x"


def test_opening_makes_a_file_only_if_asked_to(files: Files, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.open(folder / "a")
    files.open(folder / "a", create=True).close()
    with closing(files.open(folder / "a", create=True)) as file:
        file.pwritev([b"kept"], 0)
    files.open(folder / "a", create=True).close()
    assert files.size(folder / "a") == 4


def test_a_file_needs_its_folder(files: Files, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.open(folder / "no" / "a", create=True)


def test_size_of_nothing(files: Files, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.size(folder / "a")


def test_closed_files_are_closed(files: Files, folder: Path) -> None:
    file = files.open(folder / "a", create=True)
    file.close()
    file.close()
    with pytest.raises(OSError, match=r"Bad file descriptor") as caught:
        file.pread(1, 0)
    assert caught.value.errno == errno.EBADF


def test_allocate_makes_room_that_reads_as_zeros(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        file.pwritev([b"abc"], 0)
        file.allocate(8192)
        assert files.size(folder / "a") == 8192
        assert file.pread(8192, 0) == b"abc" + bytes(8189)
        file.allocate(100)
    assert files.size(folder / "a") == 8192


def test_more_buffers_than_the_system_takes_are_refused(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        assert file.pwritev([b"x"] * IOV_MAX, 0) == IOV_MAX
        with pytest.raises(OSError, match=r"Invalid argument"):
            file.pwritev([b"x"] * (IOV_MAX + 1), 0)


# --- names --------------------------------------------------------------------------------------------------------------


def test_names_are_listed_in_order(files: Files, folder: Path) -> None:
    for name in ("b", "c", "a"):
        files.open(folder / name, create=True).close()
    files.mkdir(folder / "d" / "deeper")
    assert files.listdir(folder) == ["a", "b", "c", "d"]
    assert files.listdir(folder / "d") == ["deeper"]
    assert files.listdir(folder / "nowhere") == []


def test_rename_takes_the_place_of_another_file(files: Files, folder: Path) -> None:
    for name in ("old", "new"):
        with closing(files.open(folder / name, create=True)) as file:
            file.pwritev([name.encode()], 0)
    with closing(files.open(folder / "new")) as replaced:
        files.rename(folder / "old", folder / "new")
        files.fsync_dir(folder)
        assert files.listdir(folder) == ["new"]
        assert read_file(files, folder / "new") == b"old"
        assert replaced.pread(3, 0) == b"new"


def test_renaming_nothing(files: Files, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.rename(folder / "a", folder / "b")


def test_unlink_is_content_with_nothing(files: Files, folder: Path) -> None:
    files.open(folder / "a", create=True).close()
    files.unlink(folder / "a")
    files.unlink(folder / "a")
    assert files.listdir(folder) == []


def test_unlink_is_for_files_only(files: Files, folder: Path) -> None:
    files.mkdir(folder / "d")
    with pytest.raises((IsADirectoryError, PermissionError)):
        files.unlink(folder / "d")


def test_an_unlinked_file_can_be_read_by_those_who_have_it_open(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        file.pwritev([b"still here"], 0)
        files.unlink(folder / "a")
        assert file.pread(10, 0) == b"still here"


def test_folders_are_made_with_those_above_and_removed_when_empty(files: Files, folder: Path) -> None:
    files.mkdir(folder / "a" / "b")
    files.mkdir(folder / "a" / "b")
    with pytest.raises(OSError, match=r"not empty"):
        files.rmdir(folder / "a")
    files.rmdir(folder / "a" / "b")
    files.rmdir(folder / "a")
    files.rmdir(folder / "a")
    assert files.listdir(folder) == []


def test_a_folder_cannot_be_made_where_a_file_is(files: Files, folder: Path) -> None:
    files.open(folder / "a", create=True).close()
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        files.mkdir(folder / "a")
    with pytest.raises(OSError, match=r"Not a directory|exists"):
        files.mkdir(folder / "a" / "b")


def test_fsync_dir_needs_a_folder(files: Files, folder: Path) -> None:
    files.fsync_dir(folder)
    with pytest.raises(FileNotFoundError):
        files.fsync_dir(folder / "nowhere")


def test_an_open_folder_is_synced_as_often_as_wanted(files: Files, folder: Path) -> None:
    with closing(files.open_folder(folder)) as opened:
        opened.fsync()
        files.open(folder / "a", create=True).close()
        opened.fsync()
    opened.close()


def test_only_a_folder_that_is_there_can_be_opened(files: Files, folder: Path) -> None:
    files.open(folder / "a", create=True).close()
    with pytest.raises(NotADirectoryError):
        files.open_folder(folder / "a")
    with pytest.raises(FileNotFoundError):
        files.open_folder(folder / "nowhere")


def test_there_is_room(files: Files, folder: Path) -> None:
    assert files.free_bytes(folder) > 0


# --- locks --------------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner(files: Files, folder: Path) -> None:
    lock = files.lock(folder / "lock", "since noon")
    with pytest.raises(FolderLockedError, match=r"in use by pid \d+ on .*, since noon; stop that process") as caught:
        files.lock(folder / "lock", "since one")
    assert caught.value.facts["folder"] == str(folder)
    assert "since noon" in str(caught.value.facts["owner"])
    lock.release()
    lock.release()
    again = files.lock(folder / "lock", "since two")
    with pytest.raises(FolderLockedError, match="since two"):
        files.lock(folder / "lock", "since three")
    again.release()


def test_a_lock_needs_its_folder(files: Files, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.lock(folder / "no" / "lock", "")


# --- databases ----------------------------------------------------------------------------------------------------------


def test_a_database_keeps_what_was_committed(files: Files, folder: Path) -> None:
    path = folder / "views.db"
    with closing(files.connect(path)) as connection:
        connection.execute("create table t (n integer)")
        connection.execute("begin")
        connection.executemany("insert into t values (?)", [(1,), (2,)])
        connection.execute("commit")
        connection.execute("begin")
        connection.execute("insert into t values (3)")
        connection.rollback()
    assert "views.db" in files.listdir(folder)
    with closing(files.connect(path)) as connection:
        assert connection.execute("select n from t").fetchall() == [(1,), (2,)]


def test_a_removed_database_is_empty(files: Files, folder: Path) -> None:
    path = folder / "views.db"
    with closing(files.connect(path)) as connection:
        connection.execute("create table t (n integer)")
    files.unlink(path)
    with closing(files.connect(path)) as connection:
        assert connection.execute("select count(*) from sqlite_master").fetchone() == (0,)


def test_a_file_that_is_no_database(files: Files, folder: Path) -> None:
    replace_file(files, folder / "views.db", b"this is not a database, however long one looks at it" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        connection = files.connect(folder / "views.db")
        with closing(connection):
            connection.execute("select * from sqlite_master")


# --- what is made of these ----------------------------------------------------------------------------------------------


def test_write_fully_joins_what_the_system_would_refuse(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        write_fully(file, [bytes([number % 256]) for number in range(3000)], 5)
        assert read_fully(file, 3000, 5) == bytes(number % 256 for number in range(3000))
        write_fully(file, [], 0)


def test_read_fully_ends_at_the_end(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        write_fully(file, [b"abc"], 0)
        assert read_fully(file, 10, 1) == b"bc"
        assert read_fully(file, 10, 99) == b""


def test_replace_file(files: Files, folder: Path) -> None:
    replace_file(files, folder / "a", b"one")
    replace_file(files, folder / "a", b"two, longer")
    assert read_file(files, folder / "a") == b"two, longer"
    assert files.listdir(folder) == ["a"]


def test_fill_zeros(files: Files, folder: Path) -> None:
    with closing(files.open(folder / "a", create=True)) as file:
        write_fully(file, [b"x" * 3_000_000], 0)
        fill_zeros(file, 10, 2_500_000)
        assert read_fully(file, 3_000_000, 0) == b"x" * 10 + bytes(2_499_990) + b"x" * 500_000


def test_remove_tree(files: Files, folder: Path) -> None:
    files.mkdir(folder / "t" / "deep" / "deeper")
    for path in (folder / "t" / "a", folder / "t" / "deep" / "b", folder / "t" / "deep" / "deeper" / "c"):
        files.open(path, create=True).close()
    remove_tree(files, folder / "t")
    remove_tree(files, folder / "t")
    assert files.listdir(folder) == []
