"""Where jobs run: flushes in the loop while the disk is fast, on a thread while it is not; upkeep on a thread.

A flush in the loop spares two thread switches, which is most of its time on a fast disk; on a slow one it would hold up everybody
who only reads. So a moving average decides, and it is taken wherever the flush runs, or it would never come back to the loop.
Where the system gives no thread, all runs in the loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from zrmq.clock import Clock
from zrmq.errors import ClosedError
from zrmq.logs import get_logger
from zrmq.store.job import Job

log = get_logger("store")

INLINE_BELOW_MS = 0.4  # flushes of a disk that takes less on average run in the loop
ALWAYS_INLINE_MS = float("inf")  # for simulations, which have no threads
NEVER_INLINE_MS = 0.0  # for checkpoints and maintenance

_WEIGHT = 1 / 8  # of the newest flush in the average

Call = Callable[[], None]


class Flusher:
    """Runs jobs one after the other. Everything but the running is on the loop's thread.

    `post` brings a call to the loop's thread from any other (`Loop.call_soon_threadsafe`). The thread starts with the first job
    that needs it.
    """

    def __init__(self, post: Callable[[Call], None], clock: Clock, inline_below_ms: float = INLINE_BELOW_MS) -> None:
        self.average_ms = 0.0
        self.inline_count = 0
        self.thread_count = 0
        self._post = post
        self._clock = clock
        self._inline_below_ms = inline_below_ms
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_thread_refused = False
        self._started: deque[tuple[Job, Call]] = deque()  # handed to the thread, not finished

    @property
    def is_busy(self) -> bool:
        """Whether jobs are under way."""
        return bool(self._started)

    def start(self, job: Job, on_finished: Call) -> None:
        """Run the job, finish it, then call `on_finished`: all before this returns, or later on the loop's thread."""
        if not self._started and (self.average_ms < self._inline_below_ms or not self._start_thread()):
            self.inline_count += 1
            self._run(job)
            job.finish()
            on_finished()
            return
        self.thread_count += 1
        self._started.append((job, on_finished))
        self._queue.put(job)

    def close(self) -> None:
        """Wait for the jobs under way and finish them."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        while self._started:
            self._finish_first()

    def _start_thread(self) -> bool:
        """Start the thread unless it runs already. False where the system gives no more: a loop held up is better than none."""
        if self._thread is None:
            name = "zrmq-flusher" if self._inline_below_ms else "zrmq-upkeep"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not self._is_thread_refused:
                    log.warning("thread_refused", name=name, reason=str(error), next="its work holds up the loop")
                self._is_thread_refused = True
                return False
            self._thread, self._is_thread_refused = thread, False
        return True

    def _run(self, job: Job) -> None:
        began_ms = self._clock.monotonic_ms()
        job.run()
        self.average_ms += (self._clock.monotonic_ms() - began_ms - self.average_ms) * _WEIGHT

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            self._run(job)
            with suppress(ClosedError):  # the loop has ended; `close` finishes what has run
                self._post(self._finish)

    def _finish(self) -> None:
        while self._started and self._started[0][0].has_run:
            self._finish_first()

    def _finish_first(self) -> None:
        job, on_finished = self._started.popleft()
        job.finish()
        on_finished()
