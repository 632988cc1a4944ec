"""The processes of the demo: two NameServers, two brokers, the consumers; started, killed, watched, ended."""

from __future__ import annotations

import queue
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from zrmq.cli.children import Child, await_brokers, start_broker, start_nameserver
from zrmq.cli.demo_reports import decode_report
from zrmq.cli.demo_verdict import Ledger, Worker
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
        self._killed_ms: dict[str, float] = {}
        self._is_over = False
        self._lines: queue.SimpleQueue[tuple[str, bytes | None]] = queue.SimpleQueue()
        self.nameservers = ""

    def start_cluster(self, broker_names: Sequence[str], session_timeout_ms: int) -> None:
        """Two NameServers and these brokers, registered. Raises what `Child.wait_address` and `await_brokers` do."""
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
        await_brokers(self.nameservers, len(broker_names))

    def start_worker(self, worker: Worker) -> None:
        """A consumer; its reports come through `feed`."""
        spec = WorkerSpec(worker.name, worker.group, worker.clustering, self.nameservers, self._run)
        arguments = [msgspec.json.encode(spec).decode()]
        log_file = self._log_file(worker.name)
        child = Child(worker.name, "zrmq.cli.demo_worker", arguments, log_file, on_line=self._take_line)
        self._enter(self._workers, child)

    def _take_line(self, child: Child, line: bytes | None) -> None:
        self._lines.put((child.name, line))

    def feed(self, ledger: Ledger, timeout_s: float) -> None:
        """Hand the workers' reports to the ledger, for so long; and who crashed.

        A worker that is killed is gone for the ledger when all it had reported until then was taken. The last, broken line of one
        is left out.
        """
        clock = SystemClock()
        deadline_ms = clock.monotonic_ms() + timeout_s * 1000
        while (left_ms := deadline_ms - clock.monotonic_ms()) > 0:
            try:
                name, line = self._lines.get(timeout=left_ms / 1000)
            except queue.Empty:
                break
            if line is None:
                killed_ms = self._killed_ms.get(name)
                ledger.gone(name, killed_ms or clock.monotonic_ms(), killed=killed_ms is not None)
            else:
                self._hand_over(ledger, name, line)
        ledger.crashes += [sentence for sentence in self.crashes() if sentence not in ledger.crashes]

    def _hand_over(self, ledger: Ledger, name: str, line: bytes) -> None:
        try:
            ledger.take(name, decode_report(line))
        except InvalidFrameError:
            if name not in self._killed_ms:
                raise

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self.signal(name, signal.SIGKILL)
        self._killed_ms[name] = SystemClock().monotonic_ms()
        self._child(name).kill()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to somebody."""
        self._child(name).signal(number)

    def crashes(self) -> list[str]:
        """A sentence, with the end of the log, for everybody who ended without being told to."""
        return [] if self._is_over else [
            f"{name} ended with code {child.exit_code}. {child.log_tail()}"
            for name, child in (self._servers | self._workers).items()
            if child.exit_code is not None and name not in self._killed_ms
        ]

    def end_workers(self) -> None:
        """Let the workers commit and end; what they report of that is of no interest. One that hangs is killed by `close`."""
        self._is_over = True
        for child in self._workers.values():
            child.end_input()
        for child in self._workers.values():
            child.wait(WORKER_END_TIMEOUT_S)

    def close(self) -> None:
        """End everybody: brokers in order, so that a folder that is kept is left as it should be."""
        self._is_over = True
        with self._stack:
            for name, child in reversed(self._servers.items()):
                if name not in self._killed_ms:
                    child.stop()

    def _child(self, name: str) -> Child:
        return self._servers.get(name) or self._workers[name]

    def _enter(self, where: dict[str, Child], child: Child) -> None:
        where[child.name] = self._stack.enter_context(child)

    def _log_file(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"
