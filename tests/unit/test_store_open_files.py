"""Files kept open: the ones used last, and never one whose name now belongs to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from zrmq.files import replace_file
from zrmq.store.open_files import OpenFiles
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/data")


def disk(names: Sequence[str]) -> FaultyFiles:
    files = FaultyFiles()
    files.mkdir(FOLDER)
    for name in names:
        replace_file(files, FOLDER / name, name.encode())
    files.counts.clear()
    return files


def test_a_file_is_opened_once() -> None:
    files = disk("a")
    open_files = OpenFiles(files)
    first = open_files.get(FOLDER / "a")
    assert open_files.get(FOLDER / "a") is first
    assert files.counts["open"] == 1


def test_the_least_recently_used_one_is_closed() -> None:
    files = disk("abcd")
    open_files = OpenFiles(files, 3)
    a, b, c = (open_files.get(FOLDER / name) for name in "abc")
    open_files.get(FOLDER / "a")
    open_files.get(FOLDER / "d")
    with pytest.raises(OSError, match="Bad file"):
        b.pread(1, 0)
    assert (a.pread(1, 0), c.pread(1, 0)) == (b"a", b"c")
    assert open_files.get(FOLDER / "b").pread(1, 0) == b"b"


def test_a_forgotten_file_is_opened_anew() -> None:
    files = disk("a")
    open_files = OpenFiles(files)
    old = open_files.get(FOLDER / "a")
    replace_file(files, FOLDER / "a", b"new")
    assert open_files.get(FOLDER / "a").pread(3, 0) == b"a"
    open_files.forget(FOLDER / "a")
    open_files.forget(FOLDER / "a")
    assert open_files.get(FOLDER / "a").pread(3, 0) == b"new"
    with pytest.raises(OSError, match="Bad file"):
        old.pread(1, 0)


def test_files_in_a_folder_are_forgotten_together() -> None:
    files = disk("a")
    for folder in ("topic", "topic/0", "topic2"):
        files.mkdir(FOLDER / folder)
        replace_file(files, FOLDER / folder / "x", b"x")
    open_files = OpenFiles(files)
    kept = [open_files.get(FOLDER / name) for name in ("a", "topic2/x")]
    gone = [open_files.get(FOLDER / name) for name in ("topic/x", "topic/0/x")]
    open_files.forget_folder(FOLDER / "topic")
    assert [file.pread(1, 0) for file in kept] == [b"a", b"x"]
    for file in gone:
        with pytest.raises(OSError, match="Bad file"):
            file.pread(1, 0)


def test_a_missing_file_is_not_remembered() -> None:
    files = disk("")
    open_files = OpenFiles(files)
    with pytest.raises(FileNotFoundError):
        open_files.get(FOLDER / "a")
    replace_file(files, FOLDER / "a", b"a")
    assert open_files.get(FOLDER / "a").pread(1, 0) == b"a"


def test_closing_closes_all() -> None:
    files = disk("ab")
    open_files = OpenFiles(files)
    held = [open_files.get(FOLDER / name) for name in "ab"]
    open_files.close()
    for file in held:
        with pytest.raises(OSError, match="Bad file"):
            file.pread(1, 0)
