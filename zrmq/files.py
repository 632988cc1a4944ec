"""The file system as the store uses it: `DiskFiles` is the real one, `zrmq.testing.files.FaultyFiles` breaks on demand.

Only this module and `zrmq.store` touch the files of messages. What a power cut leaves behind is the interface's contract:

- what was written is on disk once `fdatasync` of the same file returned, the room made by `allocate` too;
- a file's name (after `open(create=True)`, `rename`, `unlink`) is on disk once its folder was synced; a folder's is when `mkdir`
  has;
- after a failed `fdatasync` nobody knows what is on disk: the system may have dropped the writes and call the next one good.

The same suite (tests/contract/test_files_contract.py) runs over both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zrmq.errors import FolderLockedError

if TYPE_CHECKING:
    import sqlite3

Buffer = bytes | bytearray | memoryview
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or this user's part of it, has no room
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)  # clients' connections may have taken them all

IOV_MAX = 1024  # buffers the kernel takes in one pwritev; Linux and macOS agree
ZEROS = bytes(1 << 20)

_OWNER_BYTES_MAX = 4096


class OpenFile(Protocol):
    """A file open for reading and writing. Any thread may call anything but `close`, which comes last."""

    def pread(self, size: int, position: int) -> bytes:
        """Up to `size` bytes from `position` on; fewer at the end of the file and, on a whim of the system, elsewhere."""

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> int:
        """Write up to `IOV_MAX` buffers one after the other; returns how many bytes it took, which may be fewer than given."""

    def fdatasync(self) -> None:
        """Bring everything written to this file, by whomever, to the disk."""

    def allocate(self, size: int) -> None:
        """Make the file `size` bytes long with room for all of them, so that writing there does not run out of space."""

    def close(self) -> None:
        """Give the descriptor back. What was not synced may be lost at a power cut, not at the end of the process."""


class OpenFolder(Protocol):
    """A folder kept open, to be synced while no more files may be opened. Any thread may call `fsync`; `close` comes last."""

    def fsync(self) -> None:
        """Bring the names in the folder to the disk."""

    def close(self) -> None:
        """Give the descriptor back."""


class FolderLock(Protocol):
    """The right to a folder; ends by `release` or with the process."""

    def release(self) -> None:
        """Let others have the folder."""


class Files(Protocol):
    """Files and folders by absolute path. Errors are `OSError` as the system gives them. Any thread."""

    def open(self, path: Path, create: bool = False) -> OpenFile:
        """Open for reading and writing, making an empty file if asked to and there is none."""

    def size(self, path: Path) -> int:
        """Length in bytes."""

    def listdir(self, folder: Path) -> list[str]:
        """Names in the folder, sorted; none if it does not exist."""

    def mkdir(self, folder: Path) -> None:
        """Make the folder and those above it, where missing, and bring their names to the disk."""

    def rename(self, old: Path, new: Path) -> None:
        """Give the file another name, in place of the file that has it."""

    def unlink(self, path: Path) -> None:
        """Remove a file; nothing happens if there is none."""

    def rmdir(self, folder: Path) -> None:
        """Remove an empty folder; nothing happens if there is none. A link to one stays: somebody wants it elsewhere."""

    def open_folder(self, folder: Path) -> OpenFolder:
        """Open a folder that is there."""

    def fsync_dir(self, folder: Path) -> None:
        """Open the folder, bring the names in it to the disk, and close it."""

    def free_bytes(self, folder: Path) -> int:
        """Room left for an unprivileged process on the folder's file system."""

    def lock(self, path: Path, note: str) -> FolderLock:
        """Take the lock file at `path` and leave `note` and who we are in it. Raises `FolderLockedError` with the owner's."""

    def connect(self, path: Path) -> sqlite3.Connection:
        """An SQLite database, in autocommit mode, usable from any thread but by one at a time."""


# --- what both have in common -----------------------------------------------------------------------------------------


def write_fully(file: OpenFile, buffers: Sequence[Buffer], position: int) -> None:
    """Write all of it, in one system call wherever the system plays along."""
    if len(buffers) > IOV_MAX:
        buffers = [b"".join(buffers)]
    size = sum(map(len, buffers))
    written = file.pwritev(buffers, position)
    if written < size:
        rest = memoryview(b"".join(buffers))
        while written < size:
            count = file.pwritev([rest[written:]], position + written)
            if not count:
                raise OSError(errno.EIO, "the system takes no more bytes and does not say why")
            written += count


def read_fully(file: OpenFile, size: int, position: int) -> bytes:
    """Exactly `size` bytes, fewer only at the end of the file."""
    data = file.pread(size, position)
    if len(data) == size:
        return data
    parts = [data]
    missing = size - len(data)
    while missing and parts[-1]:
        parts.append(file.pread(missing, position + size - missing))
        missing -= len(parts[-1])
    return b"".join(parts)


def read_file(files: Files, path: Path) -> bytes:
    """All of a file."""
    file = files.open(path)
    try:
        return read_fully(file, files.size(path), 0)
    finally:
        file.close()


def replace_file(files: Files, path: Path, data: bytes) -> None:
    """Write a whole file so that after a crash it is there with all of `data`, or as it was before."""
    draft = path.with_name(path.name + ".draft")
    files.unlink(draft)
    file = files.open(draft, create=True)
    try:
        write_fully(file, [data], 0)
        file.fdatasync()
    finally:
        file.close()
    files.rename(draft, path)
    files.fsync_dir(path.parent)


def fill_zeros(file: OpenFile, start: int, end: int) -> None:
    """Write zeros from `start` to `end`."""
    for position in range(start, end, len(ZEROS)):
        write_fully(file, [memoryview(ZEROS)[: end - position]], position)


def remove_tree(files: Files, folder: Path) -> None:
    """Remove a folder of files and folders of files. Not atomic: what a crash leaves is removed by the next call."""
    for name in files.listdir(folder):
        path = folder / name
        try:
            files.unlink(path)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):  # EPERM is what macOS says of a folder
                raise
            remove_tree(files, path)
    files.rmdir(folder)


# --- the real one -----------------------------------------------------------------------------------------------------


class DiskFiles:
    """`Files` over the operating system. Has no state; one instance serves everybody."""

    def open(self, path: Path, create: bool = False) -> OpenFile:
        return _DiskFile(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644))

    def size(self, path: Path) -> int:
        return os.stat(path).st_size

    def listdir(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []

    def mkdir(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self.fsync_dir(path.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def rmdir(self, folder: Path) -> None:
        if folder.exists() and not folder.is_symlink():
            os.rmdir(folder)

    def open_folder(self, folder: Path) -> OpenFolder:
        return _DiskFolder(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))

    def fsync_dir(self, folder: Path) -> None:
        with closing(self.open_folder(folder)) as opened:
            opened.fsync()

    def free_bytes(self, folder: Path) -> int:
        facts = os.statvfs(folder)
        return facts.f_bavail * facts.f_frsize

    def lock(self, path: Path, note: str) -> FolderLock:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}, {note}\n".encode(), 0)
        except BlockingIOError as error:
            owner = os.pread(fd, _OWNER_BYTES_MAX, 0).decode(errors="replace").strip() or "a process that left no name"
            os.close(fd)
            raise locked(path, owner) from error
        except OSError:
            os.close(fd)
            raise
        return _DiskLock(fd)

    def connect(self, path: Path) -> sqlite3.Connection:
        import sqlite3

        return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def locked(path: Path, owner: str) -> FolderLockedError:
    """The error for a folder whose lock file `path` is held by `owner`."""
    return FolderLockedError(
        f"The data folder {path.parent} is in use by {owner}; stop that process, or use another folder.",
        folder=str(path.parent), owner=owner,
    )


class _DiskFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, position: int) -> bytes:
        return os.pread(self._fd, size, position)

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> int:
        return os.pwritev(self._fd, buffers, position)

    def fdatasync(self) -> None:
        _fdatasync(self._fd)

    def allocate(self, size: int) -> None:
        try:
            _allocate(self._fd, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            fill_zeros(self, os.fstat(self._fd).st_size, size)  # the file system cannot promise room but by writing

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _DiskFolder:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fsync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _DiskLock:
    """The file stays: were it removed, two processes could each lock a file of that name.

    A forked child has a copy of the descriptor, which would keep the lock for as long as the child lives; and its own end must
    not take the lock from the parent.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()

    def release(self) -> None:
        if self._fd >= 0:
            if os.getpid() == self._pid:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _fdatasync(fd: int) -> None:
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:  # macOS, where fsync stops at the drive's own cache
        fcntl.fcntl(fd, getattr(fcntl, "F_FULLFSYNC", 51))


def _allocate(fd: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOSYS, "no posix_fallocate here")
    os.posix_fallocate(fd, 0, size)
