"""The thread behind a producer or consumer: a reactor that other threads can call into, and that ends when it should.

The thread knows the reactor and what runs on it, never the `ClientThread`: so one that nobody holds any more is collected, warns,
and its thread ends. One that is still held when the interpreter exits is closed then, within a bounded time.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from zrmq.errors import ClosedError
from zrmq.logs import get_logger
from zrmq.transport.interface import Loop
from zrmq.transport.options import Context, check_fork, fork_count
from zrmq.transport.reactor import Reactor
from zrmq.transport.threads import Latch, start_thread

T = TypeVar("T")

LEAVE_MS = 1_000.0  # for the last steps: links wait up to 500 ms for the answer to their BYE
JOIN_S = 6.0  # those, and the three seconds that ending a context may take; then the daemon thread is left to itself

LastStep = Callable[[Callable[[], None]], None]

log = get_logger("client")


class ClientThread:
    """One I/O thread with a reactor, running from the making to `close`. Any thread may use it.

    In a forked child `call` and `post` raise `ForkedClientError`, and `close` does nothing: the thread stayed with the parent.
    """

    def __init__(self, name: str = "zrmq-client", *, context: Context | None = None) -> None:
        """`context`: the one of an embedded broker, to reach it in memory; else one is made. Raises as `Reactor`."""
        self._engine = _Engine(name, context)
        self._engine.start()

    @property
    def loop(self) -> Loop:
        """For what runs on the thread."""
        return self._engine.reactor

    @property
    def has_ended(self) -> bool:
        """Whether the thread is through with everything, after `close` or by itself."""
        return not self._engine.is_alive()

    def is_current(self) -> bool:
        """Whether this is called on the thread itself."""
        return self._engine.is_current()

    @property
    def context(self) -> Context:
        """For lanes, which are used beside the thread."""
        return self._engine.reactor.context

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread, wait, and return what it returns or raise what it raises. It must not block.

        Raises `ClosedError` after `close`, `ForkedClientError` in a forked child.
        """
        check_fork(self._engine.forks)
        if self._engine.is_current():
            return function()
        call = _Call(function)
        self.post(call.make)
        return call.wait()

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread soon. It must not block; what it raises is logged. Raises as `call`."""
        if self._engine.is_closing:
            check_fork(self._engine.forks)
            raise ClosedError(f"{self._engine.name} is closed; make a new one.")
        self._engine.reactor.call_soon_threadsafe(function)

    def at_close(self, step: LastStep) -> None:
        """Let `step` run on the thread when it is closed. It is given a function to call, within a second, when it is done.

        It runs as well when the thread ends by itself (its context has ended, a callback called `sys.exit`), so that those who
        wait for something hear of it; then the loop has ended, nothing can be sent any more, and nobody waits for the step.

        It must not refer to this object, or an unclosed one is never collected. Said on the thread itself, in a `call`, it cannot
        come too late for a thread that ends by itself.
        """
        self._engine.last_steps.append(step)

    def close(self) -> None:
        """Run the last steps, end the thread and wait for that, six seconds at most. Closing twice does nothing.

        Called on the thread itself it does not wait.
        """
        self._engine.close()

    def __del__(self) -> None:
        engine: _Engine | None = getattr(self, "_engine", None)
        if engine is not None and not engine.is_closing and not engine.is_elsewhere():
            engine.begin_close()  # without waiting: the collector runs in any thread, perhaps in this very one
            message = f"{engine.name} was never closed; call close() or use `with`."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)  # last: it may be told to raise


class _Engine:
    """The thread and what it works on."""

    def __init__(self, name: str, context: Context | None) -> None:
        self.name = name
        self.reactor = Reactor(context)
        self.forks = fork_count()
        self.is_closing = False
        self.last_steps: list[LastStep] = []
        self._is_leaving = False
        self._claim = threading.Lock()  # whoever has it ends the reactor: the thread, or who could not start it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        try:
            _running.add(self)  # before: at its end the thread takes itself out
            start_thread(self._thread)
        except BaseException:  # Ctrl-C too, and after that the thread may come or not
            if self._claim.acquire(blocking=False):
                _running.discard(self)
                self.is_closing = True
                self.reactor.close()
            else:
                self.begin_close()
            raise

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def is_elsewhere(self) -> bool:
        """Whether the thread stayed with the parent of a fork."""
        return self.forks != fork_count()

    def close(self) -> None:
        if self.is_elsewhere():
            return
        self.begin_close()
        if self.is_current():
            return
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            log.warning("client_thread_left", name=self.name, timeout_s=JOIN_S)

    def begin_close(self) -> None:
        """From any thread, any number of times."""
        if not self.is_closing:
            self.is_closing = True
            try:
                self.reactor.call_soon_threadsafe(self._leave)
            except ClosedError:
                log.debug("client_thread_ended_before", name=self.name)

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self.reactor.run()
        except BaseException:  # a callback's sys.exit() too, of which a thread says nothing by itself
            log.exception("client_thread_failed", name=self.name)
        self.is_closing = True
        _running.discard(self)
        try:
            if not _exit.is_set():  # a thread that starts threads, as this does, may not any more; and nothing is left to free
                self.reactor.close()
        finally:
            if not self._is_leaving:
                for step in self.last_steps:
                    self._take(step, lambda: None)

    def _leave(self) -> None:
        """Take the last steps together; stop when all are done, or time is up."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self.reactor.call_later(LEAVE_MS, self.reactor.stop)
        left = len(self.last_steps) + 1

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.reactor.stop()

        for step in self.last_steps:
            self._take(step, count)
        count()

    def _take(self, step: LastStep, count: Callable[[], None]) -> None:
        try:
            step(count)
        except BaseException:  # as in `_run`: it calls what users gave it
            log.exception("last_step_failed", name=self.name)
            count()


class _Call(Generic[T]):
    """A function that one thread runs and another waits for."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = Latch()
        self._result: Any = None
        self._error: Exception | None = ClosedError("The thread ended during the call.")

    def make(self) -> None:
        try:
            self._result = self._function()
            self._error = None
        except Exception as error:  # noqa: BLE001 -- raised again in the thread that waits
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> T:
        self._done.wait()
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result


_running: set[_Engine] = set()
_exit = threading.Event()


def _close_all() -> None:
    """At the interpreter's exit: daemon threads would be stopped in the middle of anything."""
    _exit.set()
    engines = [engine for engine in list(_running) if not engine.is_elsewhere()]
    for close in [*[engine.begin_close for engine in engines], *[engine.close for engine in engines]]:
        try:
            close()
        except Exception:  # others come after it
            log.exception("client_thread_not_closed")


atexit.register(_close_all)
