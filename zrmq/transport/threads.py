"""Threads that the system may refuse, and how one waits for another where a signal handler may come in between, and do as much.

A handler runs in the main thread in the middle of whatever that does, between any two steps of Python code. A `threading.Event`
has a lock, and its `wait` is some such steps: a handler that comes while the lock is taken there keeps it from the thread that
would set the event. If it then waits for that thread, as `close` does, both wait for ever.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import Empty, SimpleQueue

from zrmq.errors import ResourceLimitError


def start_thread(thread: threading.Thread) -> None:
    """Start it. Raises `ResourceLimitError` where the system gives no more threads."""
    try:
        thread.start()
    except RuntimeError as error:
        raise ResourceLimitError(
            f"The system gives no thread for {thread.name} ({error}); end some, or raise the limits (ulimit -u, pids of a"
            " container), and try again.",
            thread=thread.name,
        ) from error


class Latch:
    """Something that happens once, and that any number of threads wait for. Any thread may use it, and so may a signal handler,
    also one that interrupted a `set` or `wait` of the same latch.

    There is no lock. Each who waits has a queue of its own, which is one call into C to wait at and one to wake.
    """

    __slots__ = ("_waiters", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiters: list[SimpleQueue[None]] = []

    def set(self) -> None:
        """It has happened: nobody waits any more. Setting twice does nothing."""
        self.is_set = True  # first: who comes to wait after the others are woken sees it
        for waiter in self._waiters:
            waiter.put(None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, at most so long (None: for ever). False: it is not."""
        if not self.is_set:
            waiter: SimpleQueue[None] = SimpleQueue()
            self._waiters.append(waiter)  # before looking again
            if not self.is_set:
                with suppress(Empty):
                    waiter.get(timeout=timeout_s)
        return self.is_set
