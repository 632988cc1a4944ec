"""Roles on one reactor: in a thread of its own beside a program, or in the main thread until a signal ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from zrmq.errors import ClosedError, ForkedClientError, RequestTimeoutError, ResourceLimitError
from zrmq.logs import get_logger
from zrmq.transport.interface import Loop
from zrmq.transport.reactor import Reactor
from zrmq.transport.signals import until_signal
from zrmq.transport.threads import Latch, start_thread

log = get_logger("host")

STOP_TIMEOUT_MS = 30_000  # a last flush and checkpoint on a slow card


class Role(Protocol):
    """What a host runs. All are called on the reactor's thread."""

    def open(self, loop: Loop) -> None:
        """Take up work: open files, listen. What it raises is raised by `Host.start` or `Host.run`."""

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """Finish what was taken, let go of files and sockets, then call `on_stopped` once, now or later, whatever goes wrong."""

    def abandon(self) -> None:
        """Let go of files and locks here and now, and promise nothing more: the loop has ended before a stop did."""


class Host:
    """Runs its roles from `start` to `stop` in a thread, or within `run` in the caller's. A host is used once."""

    def __init__(self, *roles: Role, name: str = "zrmq") -> None:
        self._roles = roles
        self._name = name
        self._reactor: Reactor | None = None
        self._thread: threading.Thread | None = None
        self._opened = Latch()
        self._error: BaseException | None = None
        self._stopping = False
        self._running: list[Role] = []

    @property
    def reactor(self) -> Reactor:
        """What the roles run on. Raises `ClosedError` before the start."""
        if self._reactor is None:
            raise ClosedError(f"{self._name} is not running; start it first.")
        return self._reactor

    def start(self) -> None:
        """Open the roles in a new thread and return when all are open. Raises what the first that cannot open raises, and
        `ResourceLimitError` where there are no descriptors or no thread; then it may be tried again."""
        self._make_reactor()
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        try:
            start_thread(self._thread)
            self._opened.wait()
        except ResourceLimitError:
            self._thread = None
            self.reactor.close()
            self._reactor = None
            raise
        except BaseException:  # Ctrl-C: nobody gets what it could be stopped by
            self._ask_to_stop()
            raise
        if self._error is not None:
            self._thread.join()
        self._raise_error()

    def stop(self, timeout_ms: int = STOP_TIMEOUT_MS) -> None:
        """Stop the roles and wait for that; from any thread but the reactor's, any number of times.

        Raises, once, the error by which they have ended before.
        """
        if self._thread is None:
            return
        self._ask_to_stop()
        if self._thread.is_alive():  # not yet, perhaps: a signal handler may stop in the middle of the start, which goes on then
            self._thread.join(timeout_ms / 1000)
            if self._thread.is_alive():
                said = f"{self._name} did not stop within {timeout_ms} ms; see its log."
                raise RequestTimeoutError(said, timeout_ms=timeout_ms)
        self._raise_error()

    def run(self, on_open: Callable[[], None] = lambda: None) -> None:
        """Run in the calling thread, which must be the main one, until SIGINT or SIGTERM; call `on_open` when all is open.

        From the first signal on they mean what they meant before, so that a second one ends what does not stop.
        Raises as `start`.
        """
        self._make_reactor()
        with until_signal(self._on_signal):
            self._main(on_open)
        self._raise_error()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _make_reactor(self) -> None:
        """Not in the constructor: what is never started holds nothing."""
        if self._reactor is not None:
            raise ClosedError(f"{self._name} was started already; make a new one to start again.")
        self._reactor = Reactor()

    def _ask_to_stop(self) -> None:
        with suppress(ClosedError, ForkedClientError):  # it has ended, or never was in this child; or is stopped already
            self.reactor.call_soon_threadsafe(self._stop_roles)

    def _on_signal(self, number: signal.Signals) -> None:
        with suppress(ClosedError):  # it has just ended by itself
            self.reactor.call_soon_threadsafe(partial(self._signalled, number.name))

    def _signalled(self, name: str) -> None:
        log.info("signal_received", signal=name)
        self._stop_roles()

    def _main(self, on_open: Callable[[], None] = lambda: None) -> None:
        try:
            self._open_roles(on_open)
            self._opened.set()
            self.reactor.run()
        except BaseException as error:
            self._error = self._error or error
            if self._opened.is_set:  # nobody waits for it
                log.exception("host_failed", name=self._name)
        finally:
            for step in (*[role.abandon for role in self._running], self.reactor.close):
                self._try(step)
            self._opened.set()

    def _try(self, step: Callable[[], None]) -> None:
        """Do it, whatever it raises: others come after it, and the first error is the one to know of."""
        try:
            step()
        except Exception as error:
            log.exception("host_not_closed", name=self._name)
            self._error = self._error or error

    def _raise_error(self) -> None:
        """Once: who cleans up afterwards has been told."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _open_roles(self, on_open: Callable[[], None]) -> None:
        """Open all; when one cannot, stop those before it, which takes turns of the reactor: they let go of files and locks."""
        try:
            for role in self._roles:
                role.open(self.reactor)
                self._running.append(role)
            on_open()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that started us
            self._error = error
            self._stop_roles()

    def _stop_roles(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if not self._running:
            self.reactor.stop()
        for role in reversed(self._running[:]):
            self._try(partial(role.stop, partial(self._role_stopped, role)))

    def _role_stopped(self, role: Role) -> None:
        self._running.remove(role)
        if not self._running:
            self.reactor.stop()
