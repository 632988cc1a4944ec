"""Threads of the programs in a run, which call and wait as a user's do.

One runs at a time, and the world stands still meanwhile: it goes on when the thread waits for something, so a seed gives one run
with them too. A thread belongs to a machine: it is resumed by a timer of that, and so neither while the machine is paused nor
after it has crashed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from types import TracebackType

from zrmq.testing.simulation.network import Machine
from zrmq.transport.interface import Frames


class Threads:
    """Those of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.current: VirtualThread | None = None  # the one that runs; none: it is the loop's, or nobody's
        self._all: list[VirtualThread] = []

    def start(self, program: Callable[[], None]) -> None:
        """Have it called on a thread of its own."""
        thread = VirtualThread(self, program)
        self._all.append(thread)
        self.machine.call_later(0.0, thread.resume)

    def sleep(self, duration_ms: float) -> None:
        """For the calling thread."""
        Signal(self).wait(duration_ms)

    def end(self) -> None:
        """Nobody resumes them any more: they end where they wait."""
        for thread in self._all:
            thread.kill()


class _KilledError(BaseException):
    """Ends a thread of a process that is gone."""


class VirtualThread:
    """One thread. Its program ends as the machine's timers do: what it raises, they raise."""

    def __init__(self, threads: Threads, program: Callable[[], None]) -> None:
        self._threads = threads
        self._program = program
        self._thread = threading.Thread(target=self._run, name=f"virtual-{threads.machine.name}", daemon=True)
        self._may_go, self._has_paused = threading.Lock(), threading.Lock()  # free: yes, for one turn
        self._may_go.acquire()
        self._has_paused.acquire()
        self._is_killed = False
        self._has_ended = False
        self._fault: BaseException | None = None
        self._thread.start()

    def resume(self) -> None:
        """Let it run until it waits. Not from a thread."""
        if self._has_ended:
            return
        assert self._threads.current is None
        self._threads.current = self
        self._may_go.release()
        self._has_paused.acquire()
        self._threads.current = None
        if self._fault is not None:
            raise self._fault

    def pause(self) -> None:
        """Let the world go on until somebody resumes this thread, which is the calling one."""
        self._has_paused.release()
        self._may_go.acquire()
        if self._is_killed:
            raise _KilledError

    def kill(self) -> None:
        """Its process is gone."""
        self._is_killed = True
        self.resume()
        self._thread.join()

    def _run(self) -> None:
        self._may_go.acquire()
        try:
            with suppress(_KilledError):
                if not self._is_killed:
                    self._program()
        except BaseException as fault:  # noqa: BLE001 - raised in the world's thread
            self._fault = fault
        self._has_ended = True
        self._has_paused.release()


class Signal:
    """What threads wait for; who calls `give` has all of those that wait by now resumed."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._waits: list[_Wait] = []

    def wait(self, timeout_ms: float = inf) -> bool:
        """Block the calling thread. False: nobody has given it within `timeout_ms`."""
        thread, machine = self._threads.current, self._threads.machine
        assert thread is not None, "the loop's thread never waits"
        wait = _Wait(thread)
        self._waits.append(wait)
        timer = None if timeout_ms == inf else machine.call_later(timeout_ms, wait.end)
        thread.pause()
        if timer is not None:
            timer.cancel()
        if wait in self._waits:
            self._waits.remove(wait)
            return False
        return True

    def give(self) -> None:
        """In any thread."""
        waits, self._waits = self._waits, []
        for wait in waits:
            if not self._threads.machine.is_closed:
                self._threads.machine.call_soon_threadsafe(wait.end)


class _Wait:
    """Of one thread, which is resumed once."""

    def __init__(self, thread: VirtualThread) -> None:
        self._thread = thread
        self._is_over = False

    def end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._thread.resume()


class TurnLock:
    """A `zrmq.client.batch.Lock`, and an `OwnedLock`."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._released = Signal(threads)
        self._is_taken = False
        self._owner: VirtualThread | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, waiting up to `timeout` virtual seconds (-1: for ever)."""
        now_ms = self._threads.machine.clock.monotonic_ms
        end_ms = inf if timeout < 0 else now_ms() + timeout * 1_000.0
        while self._is_taken:
            if not blocking or now_ms() >= end_ms:
                return False
            self._released.wait(end_ms - now_ms())
        self._is_taken, self._owner = True, self._threads.current
        return True

    def release(self) -> None:
        """Give it back; any thread may."""
        self._is_taken, self._owner = False, None
        self._released.give()

    def _is_owned(self) -> bool:
        return self._is_taken and self._owner is self._threads.current

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class VirtualLine:
    """A `zrmq.transport.lane.Line` over the network of the run."""

    def __init__(self, threads: Threads, address: str) -> None:
        self._threads = threads
        self._news = Signal(threads)
        self._received: deque[list[bytes]] = deque()
        self._connections = 0
        self._is_connected = False
        self._connection = threads.machine.connect(address, self)

    # --- what its user does -------------------------------------------------------------------------------------------

    def look(self) -> int:
        """A number for the present connection, 0 for none."""
        return self._connections if self._is_connected else 0

    def wait_connected(self, timeout_ms: int) -> None:
        """Until anything happens to it."""
        self._news.wait(timeout_ms)

    def pause(self, pause_ms: float) -> None:
        """For that long."""
        self._threads.sleep(pause_ms)

    def send(self, frames: Frames) -> bool:
        """Hand one message over; False: it is not taken."""
        return self._connection.send(frames)

    def wait_room(self, timeout_ms: int) -> None:
        """Until anything happens to it."""
        self._news.wait(timeout_ms)

    def receive(self, timeout_ms: int) -> list[bytes]:
        """The next message, or no frames when something else has happened, or nothing."""
        if not self._received:
            self._news.wait(timeout_ms)
        return self._received.popleft() if self._received else []

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    # --- what the connection tells ------------------------------------------------------------------------------------

    def on_connected(self) -> None:
        """A server accepted it."""
        self._connections += 1
        self._is_connected = True
        self._news.give()

    def on_disconnected(self) -> None:
        """It is lost."""
        self._is_connected = False
        self._news.give()

    def on_frames(self, frames: list[bytes]) -> None:
        """A message came."""
        self._received.append(frames)
        self._news.give()
