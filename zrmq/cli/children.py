"""Processes that a command starts beside itself and that end with it, whatever happens.

Run as a program (`python -m zrmq.cli.children MODULE ARGUMENT...`) this runs a module so that the kernel kills it as soon as the
process that started it is gone. Only Linux can do that; elsewhere a command that is itself killed leaves its children behind,
except those that end when their stdin does.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from zrmq.clock import SystemClock
from zrmq.errors import RequestTimeoutError, UnreachableError, ZrmqError

LINE_TIMEOUT_S = 20.0  # for a line that a process prints within a second, unless the machine is busy
STOP_TIMEOUT_S = 30.0  # a broker's last flush and checkpoint on a slow card
TAIL_LINES = 12  # of a log, in a message for a person

_PR_SET_PDEATHSIG = 1
_ADDRESS = re.compile(rb"tcp://[^\s,;\"']+:\d+")

LineHandler = Callable[["Child", bytes | None], None]  # None: stdout ended


class Child:
    """A Python module as a process of its own: its lines on stdout, its log (stderr) in a file. Use it from one thread.

    `on_line` is called on a reading thread with each line; without it lines wait for `wait_line`.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], log_file: Path, *, on_line: LineHandler | None = None
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._on_line = on_line
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zrmq.cli.children", str(os.getpid()), module, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C is for the command; it ends its children in order
            )
        self._reader = threading.Thread(target=self._read, name=f"{name}-stdout", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self.process.poll()

    def wait_line(self, pattern: re.Pattern[bytes], timeout_s: float = LINE_TIMEOUT_S) -> re.Match[bytes]:
        """The first line from here on that matches.

        Raises `UnreachableError` when the process ends before, `RequestTimeoutError` when it takes too long.
        """
        clock = SystemClock()
        deadline_ms = clock.monotonic_ms() + timeout_s * 1000
        while True:
            try:
                line = self._lines.get(timeout=max(deadline_ms - clock.monotonic_ms(), 0) / 1000)
            except queue.Empty:
                raise RequestTimeoutError(
                    f"{self.name} did not print what was expected within {timeout_s:.0f} s. {self.log_tail()}", name=self.name
                ) from None
            if line is None:
                self._lines.put(None)  # for whoever waits next
                raise UnreachableError(f"{self.name} ended with code {self.wait()}. {self.log_tail()}", name=self.name)
            match = pattern.search(line)
            if match is not None:
                return match

    def wait_address(self, timeout_s: float = LINE_TIMEOUT_S) -> str:
        """The address that a server prints when it is ready. Raises as `wait_line` does."""
        return self.wait_line(_ADDRESS, timeout_s)[0].decode()

    def tell(self, line: bytes = b"") -> None:
        """Write one line to its stdin; does nothing when the process or its stdin has ended."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.write(line + b"\n")
                self.process.stdin.flush()

    def end_input(self) -> None:
        """End its stdin: a consumer that waits for that closes in order."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing when the process is gone."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code, when it has ended by itself. Raises `RequestTimeoutError`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RequestTimeoutError(
                f"{self.name} did not end within {timeout_s:.0f} s. {self.log_tail()}", name=self.name
            ) from None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to end (SIGTERM, end of stdin) and wait; past the timeout it is killed. Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.end_input()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._reap()

    def kill(self) -> int:
        """End it as a power cut would (SIGKILL)."""
        self.process.kill()
        return self._reap()

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log, for a person."""
        tail = self.log_file.read_bytes().decode(errors="replace").splitlines()[-lines:]
        return f"The end of its log, {self.log_file}:\n  " + "\n  ".join(tail) if tail else f"Its log, {self.log_file}, is empty."

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def _reap(self) -> int:
        code = self.process.wait()
        self.end_input()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def _read(self) -> None:
        lines = self.process.stdout or ()
        for line in lines:
            self._give(line)
        self._give(None)

    def _give(self, line: bytes | None) -> None:
        if self._on_line is None:
            self._lines.put(line)
        else:
            self._on_line(self, line)


def start_nameserver(name: str, log_file: Path, *options: str, port: int = 0) -> tuple[Child, str]:
    """A NameServer as a process, and its address."""
    return _start(name, log_file, ["nameserver", "--nameserver-port", str(port), *options])


def start_broker(name: str, log_file: Path, nameservers: str, data: Path, *options: str, port: int = 0) -> tuple[Child, str]:
    """A broker of that name as a process, and its address. One-way sends get a free port."""
    arguments = ["broker", "--broker-name", name, "--broker-port", str(port), "--ingest-port", "0", "--data", str(data)]
    return _start(name, log_file, [*arguments, "--nameservers", nameservers, *options])


@contextmanager
def work_folder(given: Path | None, prefix: str) -> Iterator[Path]:
    """The folder given, else a temporary one. That is removed, but not after an error, which names logs in it."""
    if given is not None:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except ZrmqError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _start(name: str, log_file: Path, arguments: list[str]) -> tuple[Child, str]:
    child = Child(name, "zrmq", arguments, log_file)
    try:
        return child, child.wait_address()
    except BaseException:  # Ctrl-C too: nobody else knows of the process yet
        child.kill()
        raise


def await_brokers(nameservers: str, count: int, timeout_s: float = LINE_TIMEOUT_S) -> None:
    """Return when so many brokers are registered: one that listens is not in the routes at once. Raises `RequestTimeoutError`."""
    from zrmq.client.admin import Admin  # here, or every child would load it

    clock, pause = SystemClock(), threading.Event()
    deadline_ms = clock.monotonic_ms() + timeout_s * 1000
    with Admin(nameservers) as admin:
        while len(admin.cluster()) < count:
            if clock.monotonic_ms() > deadline_ms:
                raise RequestTimeoutError(f"{count} brokers did not register within {timeout_s:.0f} s; see their logs.")
            pause.wait(0.02)


def _end_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before we could ask
        sys.exit(1)


def _run_module(parent_pid: str, module: str, *arguments: str) -> None:
    _end_with_parent(int(parent_pid))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_module(*sys.argv[1:])
