"""A client's end: the connections that a reactor serves. `lane.py` has one that a thread uses by itself.

libzmq reconnects tcp and ipc by itself, and its socket monitor says when: the end of the ZMTP handshake is the connection, since
what is sent before it may go to nobody. For inproc there are neither events nor reconnects; `inproc.py` has the news.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import zmq

from zrmq.errors import InvalidArgumentError
from zrmq.logs import get_logger
from zrmq.transport.address import Address
from zrmq.transport.inproc import Watch, directory_of
from zrmq.transport.interface import Connection, ConnectionListener, Frames
from zrmq.transport.monitor import CONNECTED, DISCONNECTED, Monitor
from zrmq.transport.options import LINGER_MS, Context, Socket, open_socket
from zrmq.transport.server import BURST_MESSAGES_MAX
from zrmq.transport.wire import is_readable, receive_message, send_message

if TYPE_CHECKING:
    from zrmq.transport.reactor import Reactor

REOPEN_MS = 1_000.0  # before another try to open a socket

log = get_logger("transport")

_WRONG_THREAD = "a connection is used from the loop's thread; use call_soon_threadsafe"


def connect(reactor: Reactor, address: Address, listener: ConnectionListener) -> Connection:
    """The connection for this kind of address."""
    if address.scheme == "inproc":
        return InprocConnection(reactor, zmq.DEALER, address, listener)
    return SocketConnection(reactor, address, listener)


def connect_push(reactor: Reactor, address: Address) -> Connection:
    """The one-way connection for this kind of address."""
    if address.scheme == "inproc":
        return InprocConnection(reactor, zmq.PUSH, address, None)
    return PushConnection(reactor, address)


def connect_socket(sock: Socket, address: Address) -> None:
    """Begin to connect; libzmq goes on trying. Raises `InvalidArgumentError`, `zmq.ContextTerminated`."""
    try:
        sock.connect(str(address))
    except zmq.ContextTerminated:
        raise  # nothing is wrong with the address
    except zmq.ZMQError as error:
        raise InvalidArgumentError(
            f"Cannot connect to {address}: {error.strerror}; correct the address.", address=str(address)
        ) from error


def connect_dealer(context: Context, address: Address) -> tuple[Socket, Monitor]:
    """A DEALER over tcp or ipc that begins to connect, and what tells of its connections. What it raises leaves nothing open."""
    with ExitStack() as undo:
        sock = open_socket(context, zmq.DEALER)
        undo.callback(sock.close, 0)
        monitor = Monitor(context, sock, CONNECTED | DISCONNECTED)
        undo.callback(monitor.close)
        connect_socket(sock, address)
        undo.pop_all()
    return sock, monitor


def try_send(sock: Socket, frames: Frames) -> bool:
    """Send without blocking. False: nobody is connected, or the pipe is full."""
    try:
        send_message(sock, frames)
    except zmq.Again:
        return False
    return True


class SocketConnection:
    """A DEALER over tcp or ipc. Implements `zrmq.transport.interface.Connection`; loop thread only.

    A process without descriptors is one more reason why nothing is connected yet: it goes on trying.
    """

    def __init__(self, reactor: Reactor, address: Address, listener: ConnectionListener) -> None:
        self._reactor = reactor
        self._address = address
        self._listener = listener
        self._is_connected = False
        self._is_closed = False
        self._ends: tuple[Socket, Monitor] | None = None
        self._open()

    def send(self, frames: Frames) -> bool:
        assert self._reactor.is_owner(), _WRONG_THREAD
        return self._is_connected and self._ends is not None and try_send(self._ends[0], frames)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._is_connected = False
        self._reactor.closed(self)
        if self._ends is not None:
            sock, monitor = self._ends
            self._reactor.unwatch(monitor.socket)
            self._reactor.unwatch(sock)
            monitor.close()
            sock.close(0)

    def _open(self) -> None:
        if self._is_closed:
            return
        try:
            sock, monitor = self._ends = connect_dealer(self._reactor.context, self._address)
        except zmq.ContextTerminated:
            raise
        except zmq.ZMQError as error:
            log.warning("socket_not_opened", address=str(self._address), reason=error.strerror, retry_ms=REOPEN_MS)
            self._reactor.call_later(REOPEN_MS, self._open)
            return
        self._reactor.watch(monitor.socket, partial(self._read_events, monitor))
        self._reactor.watch(sock, partial(self._read, sock))

    def _read(self, sock: Socket) -> None:
        for _ in range(BURST_MESSAGES_MAX):
            if self._is_closed or not is_readable(sock):
                return
            self._listener.on_frames(receive_message(sock))

    def _read_events(self, monitor: Monitor) -> None:
        while not self._is_closed and (event := monitor.next_event()):
            if self._is_connected:  # what it brought and is still unread is gone with it: IMMEDIATE drops it
                self._is_connected = False
                self._listener.on_disconnected()
            if event == CONNECTED and not self._is_closed:
                self._is_connected = True
                self._listener.on_connected()


class PushConnection:
    """A PUSH over tcp or ipc. Implements `zrmq.transport.interface.Connection`; loop thread only."""

    def __init__(self, reactor: Reactor, address: Address) -> None:
        self._reactor = reactor
        self._is_closed = False
        self._socket = open_socket(reactor.context, zmq.PUSH)
        try:
            connect_socket(self._socket, address)
        except InvalidArgumentError:
            self._socket.close(0)
            raise

    def send(self, frames: Frames) -> bool:
        assert self._reactor.is_owner(), _WRONG_THREAD
        return not self._is_closed and try_send(self._socket, frames)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._reactor.closed(self)
            self._socket.close(LINGER_MS[zmq.PUSH])


class InprocConnection:
    """A DEALER or PUSH within the process: a new socket each time somebody listens. Implements `Connection`; loop thread only."""

    def __init__(self, reactor: Reactor, kind: int, address: Address, listener: ConnectionListener | None) -> None:
        self._reactor = reactor
        self._kind = kind
        self._address = address
        self._listener = listener
        self._is_closed = False
        self._socket: Socket | None = None
        self._directory = directory_of(reactor.context)
        self._watch = Watch(str(address), reactor.call_soon_threadsafe, self._handle_news)
        self._directory.add_watch(self._watch)

    def send(self, frames: Frames) -> bool:
        assert self._reactor.is_owner(), _WRONG_THREAD
        return self._socket is not None and try_send(self._socket, frames)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._directory.remove_watch(self._watch)
            self._reactor.closed(self)
            self._drop()

    def _handle_news(self, is_up: bool) -> None:
        if self._socket is not None:
            self._read()
            self._drop()
            if self._listener is not None and not self._is_closed:
                self._listener.on_disconnected()
        if is_up and not self._is_closed:
            self._socket = open_socket(self._reactor.context, self._kind)
            connect_socket(self._socket, self._address)
            if self._listener is not None:
                self._reactor.watch(self._socket, self._read)
                self._listener.on_connected()

    def _drop(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            if self._listener is not None:
                self._reactor.unwatch(sock)
            sock.close(LINGER_MS.get(self._kind, 0))

    def _read(self) -> None:
        if self._listener is None:
            return
        for _ in range(BURST_MESSAGES_MAX):
            if self._socket is None or not is_readable(self._socket):
                return
            self._listener.on_frames(receive_message(self._socket))
