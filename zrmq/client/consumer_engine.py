"""What works for a consumer between its start and its end, on a thread of its own, and how callers' threads meet it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from random import Random
from typing import Any

from zrmq.client.consuming import ConsumerCore, ConsumingConfig
from zrmq.client.inbox import Inbox, Ready
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.process_queue import Unit
from zrmq.client.runtime import LastStep
from zrmq.errors import ClosedError, RequestTimeoutError, ZrmqError
from zrmq.transport.interface import Loop
from zrmq.transport.threads import Latch

LAST_COMMIT_MS = 400  # of a consumer that the interpreter's exit ends: its links need the rest of the second there is


class Engine:
    """A consumer's core with what it needs. Made on its thread. It does not know the consumer it works for, so that one nobody
    holds any more is collected.

    `settle` is called before each round of commits, on the engine's thread; `started` is set when the group is joined or refuses,
    and another latch takes its place to wait for that once more.
    """

    def __init__(
        self, loop: Loop, config: ConsumingConfig, nameservers: Sequence[str], identity: Identity, *, in_order: bool,
        at_close: Callable[[LastStep], None],
    ) -> None:
        rng = Random()
        self.loop = loop
        self.started = Latch()
        self.settle: Callable[[], None] = lambda: None
        self._inbox_lock: Any = threading.RLock()
        self.inbox = Inbox(ThreadQueue(), self._inbox_lock, loop.clock, self._wake, in_order=in_order)
        self.instance = ClientInstance(loop, nameservers, identity, rng)
        self.core = ConsumerCore(
            loop, config, self.inbox, self.instance, rng, settle=lambda: self.settle(), on_started=lambda: self.started.set()
        )
        at_close(self.leave)

    def is_interrupted(self) -> bool:
        """Whether the calling thread is within the inbox: then this is a signal handler. It must not wait for the engine's
        thread, which may be waiting for the inbox."""
        return bool(self._inbox_lock._is_owned())

    def put_back_later(self, unit: Unit, delay_ms: float) -> None:
        """Hand a failed unit out again after a while. From any thread."""
        with suppress(ClosedError):  # the consumer is closed: the unit stays unfinished and comes again elsewhere
            self.loop.call_soon_threadsafe(lambda: self._put_back_later(unit, delay_ms))

    def retire(self) -> None:
        """Nobody will take anything out of the inbox any more: give the queues to others. From any thread."""
        with suppress(ClosedError):  # the consumer is closed, and has
            self.loop.call_soon_threadsafe(self.core.retire)

    def leave(self, on_done: Callable[[], None]) -> None:
        """The thread's last step: commit, and say goodbye; or tell those who wait for messages that the loop ended by itself."""
        if self.loop.has_ended:
            if not self.inbox.is_closed:
                self.inbox.close(ClosedError("The consumer's I/O thread has ended; the log says why. Make a new consumer."))
            self.started.set()
            return
        self.core.close(lambda: self.instance.close(on_done), LAST_COMMIT_MS)

    def _put_back_later(self, unit: Unit, delay_ms: float) -> None:
        self.loop.call_later(delay_ms, partial(self.inbox.put_back, unit))

    def _wake(self) -> None:
        with suppress(ClosedError):  # there is nothing to look at any more
            self.loop.call_soon_threadsafe(self.core.look)


class ThreadQueue:
    """A `ReadyQueue` between threads. `SimpleQueue` is a deque and a raw lock, in C."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Ready] = SimpleQueue()

    def put(self, item: Ready) -> None:
        self._items.put(item)

    def take(self, timeout_s: float | None) -> tuple[Ready] | None:
        try:
            return (self._items.get(timeout=timeout_s),)
        except Empty:
            return None


class Answer:
    """Something that the engine's thread gives once and a caller's thread waits for."""

    def __init__(self) -> None:
        self._given = Latch()
        self._value: Any = None

    def give(self, value: Any = None) -> None:
        """The value, or the error to raise."""
        self._value = value
        self._given.set()

    def wait(self, timeout_ms: float, what: str) -> Any:
        """The value. Raises the `ZrmqError` that was given, and `RequestTimeoutError` when nothing was given in time."""
        if not self._given.wait(timeout_ms / 1000.0):
            raise RequestTimeoutError(f"No answer to {what} came within {timeout_ms:.0f} ms; try again.", timeout_ms=timeout_ms)
        if isinstance(self._value, ZrmqError):
            raise self._value
        return self._value
