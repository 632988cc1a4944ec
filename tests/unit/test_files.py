"""What the real file system does that the contract suite cannot ask of both: fallbacks, locks between processes, odd systems."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from zrmq import files as files_module
from zrmq.errors import FolderLockedError
from zrmq.files import DiskFiles, OpenFile, read_fully, remove_tree, write_fully


class Whimsical:
    """A file that reads and writes as little at a time as it is told to."""

    def __init__(self, *counts: int) -> None:
        self.content = bytearray(100)
        self.counts = list(counts)

    def pread(self, size: int, position: int) -> bytes:
        return bytes(self.content[position : position + min(size, self.counts.pop(0))])

    def pwritev(self, buffers: list[bytes], position: int) -> int:
        data = b"".join(buffers)[: self.counts.pop(0)]
        self.content[position : position + len(data)] = data
        return len(data)


def whimsical(*counts: int) -> OpenFile:
    file: OpenFile = Whimsical(*counts)  # type: ignore[assignment]
    return file


def test_a_read_goes_on_where_it_stopped() -> None:
    file = whimsical(3, 4, 99)
    assert len(read_fully(file, 50, 10)) == 50
    assert len(read_fully(whimsical(3, 0), 50, 10)) == 3


def test_a_write_goes_on_where_it_stopped() -> None:
    file = whimsical(2, 1, 99)
    write_fully(file, [b"ab", b"cd", b"efg"], 5)
    assert whimsical_content(file)[5:12] == b"abcdefg"
    with pytest.raises(OSError, match="takes no more bytes"):
        write_fully(whimsical(2, 0), [b"abc"], 0)


def whimsical_content(file: OpenFile) -> bytes:
    return bytes(file.content)  # type: ignore[attr-defined]


def test_allocated_room_is_there(tmp_path: Path) -> None:
    with closing(DiskFiles().open(tmp_path / "a", create=True)) as file:
        file.allocate(1 << 20)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_allocate_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with closing(DiskFiles().open(tmp_path / "a", create=True)) as file:
        file.pwritev([b"abc"], 0)
        file.allocate(10_000)
    content = (tmp_path / "a").read_bytes()
    assert content == b"abc" + bytes(9_997)


def test_a_system_without_allocation_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    with closing(DiskFiles().open(tmp_path / "a", create=True)) as file:
        file.allocate(10_000)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 10_000


def test_a_full_disk_is_not_papered_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with closing(DiskFiles().open(tmp_path / "a", create=True)) as file, pytest.raises(OSError, match="No space"):
        file.allocate(10_000)


def test_a_system_without_fdatasync_syncs_the_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(files_module.fcntl, "fcntl", lambda fd, command: asked.append(command))
    with closing(DiskFiles().open(tmp_path / "a", create=True)) as file:
        file.fdatasync()
    assert asked == [51]


def test_the_lock_holds_between_processes_and_ends_with_them(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom zrmq.files import DiskFiles\n"
        f"lock = DiskFiles().lock(Path({str(tmp_path / 'lock')!r}), 'since noon')\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(FolderLockedError, match=f"pid {process.pid} on .*, since noon"):
            DiskFiles().lock(tmp_path / "lock", "mine")
        process.kill()
    lock = DiskFiles().lock(tmp_path / "lock", "mine")
    assert "mine" in (tmp_path / "lock").read_text()
    lock.release()
    assert (tmp_path / "lock").exists(), "a removed lock file could be locked by two"


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError):
        DiskFiles().lock(tmp_path / "lock", "mine")


def test_free_space_is_that_of_the_file_system(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    assert abs(DiskFiles().free_bytes(tmp_path) - facts.f_bavail * facts.f_frsize) < 1 << 30


def test_a_link_in_the_place_of_a_folder_is_emptied_and_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "meters@1" / "0").mkdir(parents=True)
    (tmp_path / "elsewhere" / "meters@1" / "0" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_tree(DiskFiles(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert DiskFiles().listdir(tmp_path / "link") == []
    DiskFiles().mkdir(tmp_path / "link" / "meters@2")


@pytest.mark.parametrize("who", ["parent", "child"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_lock_is_its_makers_alone(tmp_path: Path, who: str) -> None:
    """A forked child has a copy of it: that must not keep the folder when the parent lets go, nor give it away."""
    lock = DiskFiles().lock(tmp_path / "lock", "as a test")
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        if who == "child":
            lock.release()
        else:
            os.close(go)
            os.read(wait, 1)
        os._exit(0)
    if who == "child":
        os.waitpid(child, 0)
        with pytest.raises(FolderLockedError):
            DiskFiles().lock(tmp_path / "lock", "again")
    lock.release()
    DiskFiles().lock(tmp_path / "lock", "again").release()
    os.close(go)
    os.close(wait)
    if who == "parent":
        os.waitpid(child, 0)
