"""The loop over ZeroMQ: one thread, one poller, timers in a heap.

A turn: sleep until something happens; read what is readable, a bounded burst from each socket; make the calls other threads asked
for; fire the timers that are due; last the `before_sleep` hooks, which make durable what the turn did and release its answers.

A callback that raises is logged with its traceback, and the loop goes on: one bad request must not end a server. A hook that
raises ends the loop and leaves `run`: when group commit fails, nothing may go on as if it had not.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from math import ceil
from typing import Protocol, TypeVar

import zmq

from zrmq.clock import Clock, SystemClock
from zrmq.errors import ClosedError, InvalidArgumentError, ResourceLimitError
from zrmq.logs import get_logger
from zrmq.transport.address import parse_address, parse_connect_address
from zrmq.transport.client import connect, connect_push
from zrmq.transport.interface import Connection, ConnectionListener, RequestHandler
from zrmq.transport.options import Context, Socket, check_fork, end_context, fork_count, make_context, open_socket
from zrmq.transport.server import SocketEndpoint

SLEEP_MS_MAX = 1_000  # a loop with nothing to do looks around that often
CANCELLED_SLACK = 256  # cancelled timers the heap may hold before it is rebuilt
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
RESERVE = 16  # descriptors for a context's first sockets; with libzmq 4.3.5 a broker's two take fifteen

Callback = Callable[[], None]

log = get_logger("transport")


class ReactorTimer:
    """A call to come."""

    __slots__ = ("_reactor", "callback")

    def __init__(self, reactor: Reactor, callback: Callback) -> None:
        self._reactor = reactor
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not call."""
        if self.callback is not None:
            self.callback = None
            self._reactor.timer_cancelled()


class Closable(Protocol):
    """A connection or endpoint."""

    def close(self) -> None: ...


_C = TypeVar("_C", bound=Closable)
_M = TypeVar("_M")


class Reactor:
    """Implements `zrmq.transport.interface.Loop`. The thread that uses it first owns it; `run` works there until `stop`.

    Only `call_soon_threadsafe` and `stop` may be called from other threads (asserted, so not under `python -O`). `context` is
    shared with whoever talks to this loop over inproc; one that was not handed in is made, and ended by `close`.

    Raises `ResourceLimitError`, and `ClosedError` for a context that has ended.
    """

    def __init__(self, context: Context | None = None, clock: Clock | None = None) -> None:
        if not isinstance(context, zmq.Context | None):
            raise InvalidArgumentError(f"context is {context!r}; leave it out, or take that of an embedded broker's fabric.")
        self.clock: Clock = clock or SystemClock()
        self._bell: _Bell | None = _made(_Bell)  # before a context, which would have to be ended
        self._reserve: list[_Bell] = _made(_reserve) if context is None else []
        self.context = context or _made(make_context)
        self.failed_count = 0  # callbacks that raised
        self._owns_context = context is None
        self._forks = fork_count()
        self._owner: int | None = None
        self._poller = zmq.Poller()
        self._sources: dict[Socket | int, Callback] = {}
        self._closables: dict[Closable, None] = {}
        self._calls: deque[Callback] = deque()
        self._timers: list[tuple[float, int, ReactorTimer]] = []
        self._timer_numbers = count()
        self._cancelled_count = 0
        self._hooks: list[Callback] = []
        self._is_stopping = False
        self.has_ended = False
        self._is_asleep = False
        try:
            self.watch(self._bell.descriptor, self._bell.silence)
            if context is not None:
                # With no socket open, as while no server is there, nothing else would tell the loop that the context has ended.
                # It is opened here, by the thread that makes the reactor and hands it over, so that it hears why it cannot be.
                self.watch(self._opened(_made(partial(open_socket, context, zmq.PAIR))), lambda: None)
        except BaseException:  # Ctrl-C too: a socket that stays open would keep its context from ending
            self.close()
            raise

    # --- Loop -------------------------------------------------------------------------------------------------------

    def call_later(self, delay_ms: float, callback: Callback) -> ReactorTimer:
        assert self.is_owner(), "call_later is for the loop's thread; use call_soon_threadsafe"
        timer = ReactorTimer(self, callback)
        heappush(self._timers, (self.clock.monotonic_ms() + delay_ms, next(self._timer_numbers), timer))
        return timer

    def call_soon_threadsafe(self, callback: Callback) -> None:
        check_fork(self._forks)
        self._calls.append(callback)
        if self.has_ended:
            self._take_back(callback)
        elif self._is_asleep:
            self._is_asleep = False  # one ring is enough, whoever else calls meanwhile
            self._ring()

    def before_sleep(self, callback: Callback) -> None:
        self._hooks.append(callback)

    def connect(self, address: str, listener: ConnectionListener) -> Connection:
        self._make_ready()
        return self._opened(connect(self, parse_connect_address(address), listener))

    def connect_push(self, address: str) -> Connection:
        self._make_ready()
        return self._opened(connect_push(self, parse_connect_address(address)))

    def listen(self, address: str, handler: RequestHandler) -> SocketEndpoint:
        self._make_ready()
        return self._opened(SocketEndpoint(self, zmq.ROUTER, parse_address(address), handler))

    def listen_pull(self, address: str, handler: RequestHandler) -> SocketEndpoint:
        self._make_ready()
        return self._opened(SocketEndpoint(self, zmq.PULL, parse_address(address), handler))

    # --- life -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`, in this thread. Then make the calls that were asked for before that; later ones are refused."""
        self._make_ready()
        try:
            while not self._is_stopping:
                self._turn()
        except zmq.ContextTerminated:
            log.warning("context_ended", next="the loop ends; close clients before what they are embedded in")
        finally:
            self.has_ended = True
            while self._calls:
                with suppress(zmq.ContextTerminated):  # one that fails so costs the others nothing: somebody may wait for them
                    self._guard(self._make_calls)

    def stop(self) -> None:
        """End `run` after the turn it is in; from any thread, any number of times."""
        self._is_stopping = True
        self._ring()

    def close(self) -> None:
        """Close what is still open, and the context if it is ours, within a few seconds. `run` has ended, or never began."""
        self.has_ended = True
        self._reserve.clear()
        for closable in list(self._closables):
            closable.close()
        self._timers.clear()
        if self._bell is not None:
            self.unwatch(self._bell.descriptor)
            self._bell = None
        if self._owns_context and not self.context.closed:
            end_context(self.context)

    # --- for connections and endpoints ------------------------------------------------------------------------------

    def watch(self, source: Socket | int, on_readable: Callback) -> None:
        """Call when the socket or descriptor has something; it may leave some for the next turn."""
        self._sources[source] = on_readable
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: Socket | int) -> None:
        """Stop calling."""
        del self._sources[source]
        self._poller.unregister(source)

    def closed(self, closable: Closable) -> None:
        """A connection or endpoint was closed."""
        self._closables.pop(closable, None)

    def is_owner(self) -> bool:
        """Whether this is the loop's thread; the first that asks becomes it. For asserts."""
        here = threading.get_ident()
        if self._owner is None:
            self._owner = here
        return self._owner == here

    def timer_cancelled(self) -> None:
        """Count it, and sweep them out when there are many."""
        self._cancelled_count += 1
        if self._cancelled_count > CANCELLED_SLACK and 2 * self._cancelled_count > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapify(self._timers)
            self._cancelled_count = 0

    # --- a turn -----------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        bell = self._bell
        if bell is not None:
            bell.ring()

    def _turn(self) -> None:
        self._is_asleep = True  # before the look at the calls: who appends after that look sees us asleep
        events = self._poller.poll(0 if self._calls or self._is_stopping else self._sleep_ms())
        self._is_asleep = False
        for source, _ in events:
            on_readable = self._sources.get(source)  # one before it may have closed it
            if on_readable is not None:
                self._guard(on_readable)
        self._guard(self._make_calls)
        self._guard(self._fire_timers)
        for hook in self._hooks:
            hook()

    def _guard(self, callback: Callback) -> None:
        try:
            callback()
        except zmq.ContextTerminated:
            raise
        except Exception:
            self.failed_count += 1
            log.exception("callback_failed")

    def _sleep_ms(self) -> int:
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heappop(timers)
            self._cancelled_count -= 1
        if not timers:
            return SLEEP_MS_MAX
        return min(max(ceil(timers[0][0] - self.clock.monotonic_ms()), 0), SLEEP_MS_MAX)

    def _make_calls(self) -> None:
        for _ in range(len(self._calls)):  # not those that these make: other sources have their turn first
            self._calls.popleft()()

    def _fire_timers(self) -> None:
        if not self._timers:
            return
        now_ms, end = self.clock.monotonic_ms(), next(self._timer_numbers)
        while self._timers and self._timers[0][0] <= now_ms and self._timers[0][1] < end:
            timer = heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled_count -= 1
            else:
                callback()

    # --- checks -----------------------------------------------------------------------------------------------------

    def _make_ready(self) -> None:
        """For the next socket, or to run."""
        check_fork(self._forks)
        assert self.is_owner(), "a reactor is used from the thread that used it first"
        if self.has_ended:
            raise ClosedError("The loop has ended; make a new one.")
        self._reserve.clear()

    def _take_back(self, callback: Callback) -> None:
        """The loop ended: either it has made this call in its last act, or nobody will."""
        try:
            self._calls.remove(callback)
        except ValueError:
            return
        raise ClosedError("The loop has ended; make a new one.")

    def _opened(self, closable: _C) -> _C:
        self._closables[closable] = None
        return closable


def _made(make: Callable[[], _M]) -> _M:
    """What a reactor needs from the start. Raises typed errors instead of ZeroMQ's and the system's."""
    try:
        return make()
    except (zmq.ZMQError, OSError) as error:
        if error.errno in (zmq.ETERM, zmq.ENOTSUP):  # libzmq's, and pyzmq's for a context that it knows to be closed
            raise ClosedError(
                "The context has ended; leave context= out, or take that of an embedded broker's fabric that is open."
            ) from error
        if error.errno in NO_ROOM:
            raise ResourceLimitError(
                f"The system gives no more sockets or open files ({error.strerror}); close some, or raise the limits (ulimit -n,"
                " the context's MAX_SOCKETS), and try again.",
            ) from error
        raise


def _reserve() -> list[_Bell]:
    """Descriptors that are held from the making of a context until just before its first socket.

    That socket is what makes libzmq start its threads, and if there is no descriptor for one of those it aborts the process. So
    does a server's with the context that pyzmq has for itself, and when libzmq looks up the address to bind. So who makes the
    context hears of it instead, and whatever is opened in between, as by a broker's recovery, takes none of these.
    """
    return [_Bell() for _ in range(RESERVE)]


class _Bell:
    """Wakes the poller from another thread: an eventfd where there is one, a pair of sockets elsewhere.

    It ends with the last reference to it, and whoever rings has one: a closed descriptor's number may be somebody else's file by
    the time a late ring writes to it. No lock, which a signal handler could have interrupted and then wait for the loop's end.
    """

    def __init__(self) -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self.descriptor = -1
        if hasattr(os, "eventfd"):
            self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
            self.descriptor = self._pair[0].fileno()

    def ring(self) -> None:
        """Make the descriptor readable; from any thread."""
        if self._pair is None:
            os.eventfd_write(self.descriptor, 1)
        else:
            with suppress(BlockingIOError):  # full: it has been rung often enough
                self._pair[1].send(b"!")

    def silence(self) -> None:
        """Make it unreadable until the next ring. It is readable now."""
        if self._pair is None:
            os.eventfd_read(self.descriptor)
        else:
            self._pair[0].recv(4096)

    def __del__(self) -> None:
        for end in self._pair or ():
            end.close()
        if self._pair is None and self.descriptor >= 0:
            os.close(self.descriptor)
