"""The processes of the demo: two NameServers, two brokers, the consumers; started, killed, watched, ended."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from zrmq.cli.children import Child, start_broker, start_nameserver
from zrmq.cli.demo_reports import AnyReport, decode_report
from zrmq.cli.demo_verdict import Worker
from zrmq.cli.demo_worker import WorkerSpec
from zrmq.clock import SystemClock
from zrmq.errors import InvalidFrameError

WORKER_END_TIMEOUT_S = 20.0


class Cast:
    """Everybody who plays. One thread; close it, whatever happened."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._run = run
        self._stack = ExitStack()
        self._servers: dict[str, Child] = {}
        self._workers: dict[str, Child] = {}
        self._killed: set[str] = set()
        self._lines: queue.SimpleQueue[tuple[str, bytes | None]] = queue.SimpleQueue()
        self.nameservers = ""

    def start_cluster(self, broker_names: Sequence[str], session_timeout_ms: int) -> None:
        """Two NameServers and these brokers. Raises what `Child.wait_address` does."""
        addresses = []
        for name in ("nameserver-1", "nameserver-2"):
            child, address = start_nameserver(name, self._log_file(name))
            self._enter(self._servers, child)
            addresses.append(address)
        self.nameservers = ",".join(addresses)
        for name in broker_names:
            options = ("--session-timeout-ms", str(session_timeout_ms))
            child, _ = start_broker(name, self._log_file(name), self.nameservers, self._folder / name, *options)
            self._enter(self._servers, child)

    def start_worker(self, worker: Worker) -> None:
        """A consumer; its reports come through `take_reports`."""
        spec = WorkerSpec(worker.name, worker.group, worker.clustering, self.nameservers, self._run)
        arguments = [msgspec.json.encode(spec).decode()]
        log_file = self._log_file(worker.name)
        child = Child(worker.name, "zrmq.cli.demo_worker", arguments, log_file, on_line=self._take_line)
        self._enter(self._workers, child)

    def _take_line(self, child: Child, line: bytes | None) -> None:
        self._lines.put((child.name, line))

    def take_reports(self, timeout_s: float) -> Iterator[tuple[str, AnyReport]]:
        """Who reported what, for at most so long; the last, broken line of a killed worker is left out."""
        clock = SystemClock()
        deadline_ms = clock.monotonic_ms() + timeout_s * 1000
        while (left_ms := deadline_ms - clock.monotonic_ms()) > 0:
            try:
                name, line = self._lines.get(timeout=left_ms / 1000)
            except queue.Empty:
                return
            if line is not None:
                try:
                    yield name, decode_report(line)
                except InvalidFrameError:
                    if name not in self._killed:
                        raise

    def kill(self, name: str) -> float:
        """SIGKILL, and when it was."""
        self._killed.add(name)
        child = self._servers.get(name) or self._workers[name]
        child.signal(signal.SIGKILL)
        killed_ms = SystemClock().monotonic_ms()
        child.kill()
        return killed_ms

    def crashes(self) -> dict[str, str]:
        """Who ended without being told to, and a sentence with the end of its log."""
        return {
            name: f"{name} ended with code {child.exit_code}. {child.log_tail()}"
            for name, child in (self._servers | self._workers).items()
            if child.exit_code is not None and name not in self._killed
        }

    def end_workers(self) -> Iterator[tuple[str, AnyReport]]:
        """Let the workers commit and end; their last reports. One that does not is killed by `close`."""
        left = [child for name, child in self._workers.items() if name not in self._killed]
        self._killed.update(self._workers)
        for child in left:
            child.end_input()
        for child in left:
            child.wait(WORKER_END_TIMEOUT_S)
        yield from self.take_reports(0.1)

    def close(self) -> None:
        """End everybody: brokers in order, so that a folder that is kept is left as it should be."""
        with self._stack:
            for name, child in reversed(self._servers.items()):
                if name not in self._killed:
                    child.stop()

    def _enter(self, where: dict[str, Child], child: Child) -> None:
        where[child.name] = self._stack.enter_context(child)

    def _log_file(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"
