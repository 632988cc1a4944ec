"""A disk in memory that loses, tears, rots, fills up and fails: `FaultyFiles`, the faulty twin of `zrmq.files.DiskFiles`.

The fault model
---------------
The machine has one process, a page cache and a disk. The process reads and writes the page cache. The disk holds what was synced.

**Power cut** (`crash`). Of each file the synced bytes are there. Each write since the last `fdatasync` of that file is, by the
dice, kept whole, lost whole, or taken apart into its sectors of 512 bytes, each of which is then kept, lost or torn (its first
bytes are new, the rest is as before). So a later write may be there and an earlier one not. A write never harms a byte that it
does not cover. A file's length is where its last kept byte ends. Likewise each change of a folder (a file made, renamed,
removed, a folder removed) since its last `fsync_dir` is there or not, each on its own; a rename is there as a whole or not at
all; a folder that was made is there. `cut_power_after(n)` ends the machine in the middle of the n-th change from now, whatever
it is: `PowerCut` comes out of it and out of everything until `crash`.

**End of the process** (`kill`). Open files and locks are gone, the page cache is not, and nothing is synced by it.

**Failing calls** (`fail`). A named operation fails with an error number, as often as told. A failing `fdatasync` loses: each
write it should have synced is by the dice synced or forgotten; forgotten ones are still read back until the power goes, and no
later `fdatasync` writes them, as on Linux.

**Full disk** (`capacity_bytes`). Writing beyond a file's length, and `allocate`, take room; without room they fail with ENOSPC, a
write after taking what fits. Writing where a file has bytes already always works. A database takes no room.

**Bad sectors** (`bad_ranges`). Reading any byte between two positions of a file fails with EIO, until the range is taken out.

**Silent damage**. `rot` flips a bit on the disk, `replace` puts other bytes there, and nobody is told. `misdirect` lets a file's
next write land elsewhere in it.

**Whims**. With `short_writes`, a write takes fewer bytes than given, by the dice. `before` is called with each operation's name
and path before it happens: a slow disk turns a clock there, a stuck one waits.

**Databases** (`connect`) are SQLite in memory. A commit is atomic, counts as a change for `cut_power_after` (and may then have
happened or not), may be made to `fail`, and survives everything that happens after it.

Everything comes from one `random.Random(seed)`: the same calls have the same luck. One thread at a time makes changes; a second
one may sync, as a flusher does.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from zrmq.files import IOV_MAX, Buffer, FolderLock, OpenFile, OpenFolder, locked

SECTOR_BYTES = 512
PLENTY_BYTES = 1 << 50  # free space of a disk that has no capacity


class PowerCut(BaseException):
    """The power is off. Not an `Exception`: no code may handle it, just as none survives it."""


class FaultyFiles:
    """`Files` in memory, with the faults of this module's first page. The object outlives crashes; open files do not."""

    def __init__(self, seed: int = 0, capacity_bytes: int | None = None) -> None:
        self.rng = Random(seed)
        self.capacity_bytes = capacity_bytes
        self.bad_ranges: dict[Path, list[tuple[int, int]]] = {}
        self.short_writes = False
        self.before: Callable[[str, Path], None] | None = None
        self.counts: Counter[str] = Counter()  # operations by name, for tests that count system calls
        self.life = 0  # number of crashes and kills; an open file belongs to one life
        self._names: dict[Path, _Inode | None] = {}  # None is a folder
        self._synced_names: dict[Path, _Inode | None] = {}
        self._changes: list[_Change] = []
        self._locks: dict[Path, str] = {}
        self._faults: list[_Fault] = []
        self._changes_left: int | None = None
        self._off = False

    # --- what a test does to it ---------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Cut the power and start the machine again: what was not synced is subject to the dice."""
        names = dict(self._synced_names)
        for change in self._changes:
            if self.rng.random() < 0.5:
                change.apply(names)
        inodes = {id(inode): inode for inode in (*self._names.values(), *names.values()) if inode is not None}
        for inode in inodes.values():
            inode.crash(self.rng)
        self._names = {path: inode for path, inode in names.items() if all(parent in names for parent in _ancestors(path))}
        self._synced_names = dict(self._names)
        self._changes = []
        self._start_again()

    def kill(self) -> None:
        """End the process: open files, locks and transactions are gone, what was written is not."""
        for inode in self._names.values():
            if inode is not None and inode.database is not None:
                inode.database.rollback()
        self._start_again()

    def _start_again(self) -> None:
        self._locks.clear()
        self._faults.clear()
        self._changes_left = None
        self._off = False
        self.life += 1

    def cut_power_after(self, changes: int) -> None:
        """End the machine in the middle of the change after this many more; then `crash` starts it again."""
        self._changes_left = changes

    def fail(self, operation: str, error_number: int = errno.EIO, times: int = 1, path: str = "") -> None:
        """Let the next `times` calls of a method (or `commit`), of a file with `path` in its path, fail."""
        self._faults.append(_Fault(operation, error_number, times, path))

    def heal(self) -> None:
        """Nothing fails any more."""
        self._faults.clear()

    def rot(self, path: Path, position: int | None = None) -> int:
        """Flip a bit of a file's byte, drawn by the dice if not given; returns its position."""
        inode = self._inode(path)
        at = self.rng.randrange(len(inode.content)) if position is None else position
        inode.flip(at, 1 << self.rng.randrange(8))
        return at

    def replace(self, path: Path, position: int, data: bytes) -> None:
        """Put other bytes in the place of synced ones."""
        self._inode(path).replace(position, data)

    def misdirect(self, path: Path, distance: int) -> None:
        """Let the next write to the file land `distance` bytes behind where it should."""
        self._inode(path).misdirected_by = distance

    @property
    def used_bytes(self) -> int:
        """Lengths of all files."""
        return sum(len(inode.content) for inode in set(self._names.values()) if inode is not None)

    # --- the interface ------------------------------------------------------------------------------------------------

    def open(self, path: Path, create: bool = False) -> OpenFile:
        if create and path not in self._names:
            self.change("open", path)
            self._require_folder(path.parent)
            self._apply(_Change(made=path, inode=_Inode(path)))
        else:
            self.look("open", path)
        return _FaultyFile(self, self._inode(path))

    def size(self, path: Path) -> int:
        self.look("size", path)
        return len(self._inode(path).content)

    def listdir(self, folder: Path) -> list[str]:
        self.look("listdir", folder)
        return sorted(path.name for path in self._names if path.parent == folder and path != folder)

    def mkdir(self, folder: Path) -> None:
        for path in (*reversed(_ancestors(folder)), folder):
            if path not in self._names:
                self.change("mkdir", path)
                self._apply(_Change(made=path))
                self.sync_names(path.parent)
            elif self._names[path] is not None:
                raise _error(errno.ENOTDIR, path)

    def rename(self, old: Path, new: Path) -> None:
        self.change("rename", old)
        self._require_folder(new.parent)
        self._apply(_Change(gone=old, made=new, inode=self._inode(old)))

    def unlink(self, path: Path) -> None:
        if path in self._names:
            self._inode(path)
            self.change("unlink", path)
            self._apply(_Change(gone=path))

    def rmdir(self, folder: Path) -> None:
        if folder in self._names:
            if self.listdir(folder):
                raise _error(errno.ENOTEMPTY, folder)
            self.change("rmdir", folder)
            self._apply(_Change(gone=folder))

    def open_folder(self, folder: Path) -> OpenFolder:
        self.look("open", folder)
        self._require_folder(folder)
        return _FaultyFolder(self, folder)

    def fsync_dir(self, folder: Path) -> None:
        with closing(self.open_folder(folder)) as opened:
            opened.fsync()

    def free_bytes(self, folder: Path) -> int:
        self.look("free_bytes", folder)
        return PLENTY_BYTES if self.capacity_bytes is None else max(self.capacity_bytes - self.used_bytes, 0)

    def lock(self, path: Path, note: str) -> FolderLock:
        self.open(path, create=True)
        if path in self._locks:
            raise locked(path, self._locks[path])
        self._locks[path] = f"pid {self.life} on this machine, {note}"
        return _FaultyLock(self, path)

    def connect(self, path: Path) -> sqlite3.Connection:
        self.look("connect", path)
        if path not in self._names:
            self._require_folder(path.parent)
            database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=_Database)
            database.files, database.path = self, path
            self._apply(_Change(made=path, inode=_Inode(path, database)))
            self.sync_names(path.parent)  # SQLite does so itself
        found = self._inode(path).database
        if found is None:
            raise sqlite3.DatabaseError("file is not a database")
        return found

    # --- what happens inside ------------------------------------------------------------------------------------------

    def look(self, operation: str, path: Path) -> None:
        """An operation that changes nothing begins."""
        if self._off:
            raise PowerCut
        if self.before is not None:
            self.before(operation, path)
        self.counts[operation] += 1
        for fault in self._faults:
            if fault.strikes(operation, path):
                raise _error(fault.error_number, path)

    def change(self, operation: str, path: Path) -> None:
        """An operation that changes something begins; the power may go now."""
        if self._changes_left is not None and not self._off:
            self._off = self._changes_left == 0
            self._changes_left -= 1
        self.look(operation, path)

    def room_bytes(self) -> int:
        """Room that is left, without counting as an operation."""
        return PLENTY_BYTES if self.capacity_bytes is None else max(self.capacity_bytes - self.used_bytes, 0)

    def unlock(self, path: Path) -> None:
        """End the lock."""
        self._locks.pop(path, None)

    def _apply(self, change: _Change) -> None:
        change.apply(self._names)
        if change.inode is not None and change.made is not None:
            change.inode.path = change.made
        self._changes.append(change)

    def sync_names(self, folder: Path) -> None:
        """Bring the names in the folder to the disk, without counting as an operation."""
        for change in self._changes:
            if change.touches(folder):
                change.apply(self._synced_names)
        self._changes = [change for change in self._changes if not change.touches(folder)]

    def _inode(self, path: Path) -> _Inode:
        if path not in self._names:
            raise _error(errno.ENOENT, path)
        inode = self._names[path]
        if inode is None:
            raise _error(errno.EISDIR, path)
        return inode

    def _require_folder(self, folder: Path) -> None:
        if folder != folder.parent and folder not in self._names:
            raise _error(errno.ENOENT, folder)
        if self._names.get(folder) is not None:
            raise _error(errno.ENOTDIR, folder)


class _Fault(msgspec.Struct):
    operation: str
    error_number: int
    times: int
    path: str

    def strikes(self, operation: str, path: Path) -> bool:
        if self.times <= 0 or operation != self.operation or self.path not in str(path):
            return False
        self.times -= 1
        return True


class _Change:
    """One change of names: a name gone, a name made, or both at once."""

    def __init__(self, gone: Path | None = None, made: Path | None = None, inode: _Inode | None = None) -> None:
        self.gone, self.made, self.inode = gone, made, inode

    def apply(self, names: dict[Path, _Inode | None]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.made is not None:
            names[self.made] = self.inode

    def touches(self, folder: Path) -> bool:
        return any(path is not None and path.parent == folder for path in (self.gone, self.made))


class _Inode:
    """A file's bytes: as the process reads them, as the disk has them, and the writes between the two."""

    def __init__(self, path: Path, database: _Database | None = None) -> None:
        self.path = path  # the name it was given last
        self.content = bytearray()
        self.synced = bytearray()
        self.pending: list[tuple[int, bytes]] = []
        self.misdirected_by = 0
        self.database = database

    def write(self, position: int, data: bytes) -> None:
        position, self.misdirected_by = position + self.misdirected_by, 0
        _put(self.content, position, data)
        self.pending.append((position, data))

    def sync(self) -> None:
        pending, self.pending = self.pending, []
        for position, data in pending:
            _put(self.synced, position, data)

    def forget(self, rng: Random) -> None:
        """A sync failed: some writes made it, the others are taken for synced and are not."""
        pending, self.pending = self.pending, []
        for position, data in pending:
            if rng.random() < 0.5:
                _put(self.synced, position, data)

    def crash(self, rng: Random) -> None:
        if self.database is not None:
            self.database.rollback()
        pending, self.pending = self.pending, []
        for position, data in pending:
            fate = rng.randrange(3)
            if fate == 0:
                continue
            if fate == 1:
                _put(self.synced, position, data)
            else:
                self._keep_sectors(position, data, rng)
        self.content = bytearray(self.synced)
        self.misdirected_by = 0

    def _keep_sectors(self, position: int, data: bytes, rng: Random) -> None:
        at = 0
        while at < len(data):
            end = min(at + SECTOR_BYTES - (position + at) % SECTOR_BYTES, len(data))
            fate = rng.randrange(5)
            if fate < 2:
                _put(self.synced, position + at, data[at:end])
            elif fate == 2:
                _put(self.synced, position + at, data[at : rng.randrange(at, end)])
            at = end

    def replace(self, at: int, data: bytes) -> None:
        for stored in (self.content, self.synced):
            if at + len(data) > len(stored):
                raise ValueError(f"{self.path} has {len(stored)} bytes; there are none to replace up to {at + len(data)}.")
            stored[at : at + len(data)] = data

    def flip(self, at: int, bit: int) -> None:
        self.content[at] ^= bit
        if at < len(self.synced):
            self.synced[at] ^= bit


class _FaultyFile:
    def __init__(self, files: FaultyFiles, inode: _Inode) -> None:
        self._files, self._inode = files, inode
        self._life: int | None = files.life

    def _require_open(self) -> None:
        if self._life != self._files.life:
            raise _error(errno.EBADF, self._inode.path)

    def pread(self, size: int, position: int) -> bytes:
        self._require_open()
        self._files.look("pread", self._inode.path)
        for start, end in self._files.bad_ranges.get(self._inode.path, ()):
            if position < end and start < position + size:
                raise _error(errno.EIO, self._inode.path)
        return bytes(self._inode.content[position : position + size])

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> int:
        self._require_open()
        if len(buffers) > IOV_MAX:
            raise _error(errno.EINVAL, self._inode.path)
        data = b"".join(buffers)
        if self._files.short_writes and len(data) > 1 and self._files.rng.random() < 0.5:
            data = data[: self._files.rng.randrange(1, len(data))]
        try:
            self._files.change("pwritev", self._inode.path)
        except PowerCut:
            self._inode.write(position, data)  # it had begun: as good as any write that was not synced
            raise
        growth = max(position + len(data) - len(self._inode.content), 0)
        lacking = max(growth - self._files.room_bytes(), 0)
        if lacking and lacking >= len(data):
            raise _error(errno.ENOSPC, self._inode.path)
        self._inode.write(position, data[: len(data) - lacking])
        return len(data) - lacking

    def fdatasync(self) -> None:
        self._require_open()
        try:
            self._files.change("fdatasync", self._inode.path)
        except OSError:
            self._inode.forget(self._files.rng)
            raise
        self._inode.sync()

    def allocate(self, size: int) -> None:
        self._require_open()
        self._files.change("allocate", self._inode.path)
        missing = size - len(self._inode.content)
        if missing > self._files.room_bytes():
            raise _error(errno.ENOSPC, self._inode.path)
        if missing > 0:
            self._inode.write(len(self._inode.content), bytes(missing))

    def close(self) -> None:
        self._life = None


class _FaultyFolder:
    def __init__(self, files: FaultyFiles, path: Path) -> None:
        self._files, self._path = files, path
        self._life: int | None = files.life

    def fsync(self) -> None:
        if self._life != self._files.life:
            raise _error(errno.EBADF, self._path)
        self._files.change("fsync_dir", self._path)
        self._files.sync_names(self._path)

    def close(self) -> None:
        self._life = None


class _FaultyLock:
    def __init__(self, files: FaultyFiles, path: Path) -> None:
        self._files, self._path, self._life = files, path, files.life

    def release(self) -> None:
        if self._life == self._files.life:
            self._files.unlock(self._path)


class _Database(sqlite3.Connection):
    """A database that stays in memory when it is closed, and whose commits can fail."""

    files: FaultyFiles
    path: Path

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql.strip().upper().startswith("COMMIT"):
            try:
                self.files.change("commit", self.path)
            except OSError as error:
                raise sqlite3.OperationalError(f"disk I/O error ({error.strerror})") from error
            except PowerCut:
                if self.in_transaction and self.files.rng.random() < 0.5:
                    super().execute(sql, parameters)
                raise
        else:
            self.files.look("execute", self.path)
        return super().execute(sql, parameters)

    def close(self) -> None:
        self.rollback()

    def __del__(self) -> None:
        super().close()


def _put(target: bytearray, position: int, data: Buffer) -> None:
    if len(target) < position:
        target.extend(bytes(position - len(target)))
    target[position : position + len(data)] = data


def _ancestors(path: Path) -> list[Path]:
    """The folders above, the nearest first, without the root, which is always there."""
    return list(path.parents)[:-1]


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
