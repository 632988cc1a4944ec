"""A small file system of its own for a test that fills it: a tmpfs, mounted here and gone afterwards. Needs root."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

_MNT_DETACH = 2


def why_not() -> str:
    """Why a disk cannot be mounted here; empty when it can."""
    if sys.platform != "linux":
        return "only Linux has tmpfs"
    return "" if os.geteuid() == 0 else "only root may mount"


class SmallDisk:
    """A tmpfs of `size_bytes` at `folder`, which is made. Raises `OSError` where it may not be mounted (in most containers)."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir(parents=True)
        try:
            _call("mount", b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % size_bytes)
        except OSError:
            folder.rmdir()
            raise

    def fill(self, leave_bytes: int = 0) -> None:
        """Write a ballast file until only so much is free, if as much is. Others may write at the same time."""
        with self._ballast.open("ab") as file:
            while (free_bytes := shutil.disk_usage(self.folder).free) > leave_bytes:
                with suppress(OSError):  # somebody was faster: less is left to take
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free_bytes - leave_bytes)

    def free(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount, even while somebody has files open there."""
        if self.folder.is_mount():
            _call("umount2", bytes(self.folder), _MNT_DETACH)
        self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _call(name: str, *arguments: bytes | int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
