"""Files kept open for reading: the ones used last, so that 10,000 queues and a long log do not need as many descriptors."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from zrmq.files import Files, OpenFile

OPEN_FILES_MAX = 128  # far below the usual limit of 1,024 for a process


class OpenFiles:
    """The least recently used file is closed when another one is needed. Loop thread only."""

    def __init__(self, files: Files, files_max: int = OPEN_FILES_MAX) -> None:
        self._files = files
        self._files_max = files_max
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()

    def get(self, path: Path) -> OpenFile:
        """The file, opened if it is not. Raises `OSError`. Use it at once: the next call may close it."""
        file = self._open.get(path)
        if file is not None:
            self._open.move_to_end(path)
            return file
        file = self._files.open(path)
        self._open[path] = file
        if len(self._open) > self._files_max:
            self._open.popitem(last=False)[1].close()
        return file

    def forget(self, path: Path) -> None:
        """Close it, if it is open: its name is about to belong to another file, or to none."""
        file = self._open.pop(path, None)
        if file is not None:
            file.close()

    def forget_folder(self, folder: Path) -> None:
        """Close what is open in this folder and those within: a file that is removed takes room for as long as it is open."""
        for path in [path for path in self._open if path.is_relative_to(folder)]:
            self.forget(path)

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()
