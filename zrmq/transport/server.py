"""A server's end: one ROUTER that answers, or one PULL that does not.

Nothing is ever pushed into a pipe without room and nothing blocks: a send that a peer cannot take, because it is gone or because
its pipe is full, is False, and that message is lost to it.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq

from zrmq.errors import AddressInUseError, InvalidArgumentError
from zrmq.logs import get_logger
from zrmq.protocol.limits import ROOMLESS_BYTES_MAX, UNREAD_BYTES_MAX
from zrmq.transport.address import Address
from zrmq.transport.backlog import Backlog
from zrmq.transport.inproc import directory_of
from zrmq.transport.interface import Frames, RequestHandler
from zrmq.transport.monitor import Monitor
from zrmq.transport.options import LINGER_MS, Context, Socket, open_socket
from zrmq.transport.wire import is_readable, prepare_references, receive_message, send_message

if TYPE_CHECKING:
    from zrmq.transport.reactor import Reactor

log = get_logger("transport")

BURST_MESSAGES_MAX = 256  # read in one turn from one socket, so that timers and other sockets have theirs
UNBIND_TIMEOUT_MS = 1_000
BURST_BYTES_MAX = 8 * 1024 * 1024  # the same in bytes: what one group commit may hold


class SocketEndpoint:
    """Implements `zrmq.transport.interface.Endpoint`. Loop thread only.

    `unreachable_count` counts sends to peers that were gone, `full_count` those that a full pipe refused.
    """

    def __init__(self, reactor: Reactor, kind: int, address: Address, handler: RequestHandler) -> None:
        self.unreachable_count = 0
        self.full_count = 0
        self._reactor = reactor
        self._handler = handler
        self._linger_ms = LINGER_MS.get(kind, 0)
        self._is_router = kind == zmq.ROUTER
        self._is_closed = False
        self._backlog = Backlog()
        if self._is_router:
            prepare_references()
        self._socket = open_socket(reactor.context, kind)
        try:
            self._bound = bind(self._socket, address)
        except BaseException:
            self._socket.close(0)
            raise
        if address.scheme == "inproc":
            directory_of(reactor.context).note_up(self.address)
        reactor.watch(self._socket, self._read)

    @property
    def address(self) -> str:
        return str(self._bound)

    def send(self, peer: bytes, frames: Frames) -> bool:
        assert self._reactor.is_owner(), "an endpoint is used from the loop's thread"
        if self._is_closed:
            return False
        try:
            if len(frames) > 1 or len(frames[0]) > ROOMLESS_BYTES_MAX:
                frames = self._backlog.count(peer, frames)
            send_message(self._socket, (peer, *frames))
        except zmq.ContextTerminated:
            raise
        except Exception as error:  # noqa: BLE001 - counted or logged
            self._count_failure(error)
            return False
        return True

    def has_room(self, peer: bytes) -> bool:
        return self._backlog.size_bytes(peer) < UNREAD_BYTES_MAX

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._bound.scheme == "inproc":
            directory_of(self._reactor.context).note_down(self.address)
        self._reactor.unwatch(self._socket)
        self._reactor.closed(self)
        with suppress(zmq.ZMQError):  # whoever ended the context under us: nothing listens any more. Not all of pyzmq names it so
            unbind(self._reactor.context, self._socket)
        self._socket.close(self._linger_ms)

    def _count_failure(self, error: Exception) -> None:
        """Whatever it is, it is one peer's. The caller may be in the middle of other peers' answers, or of group commit."""
        number = getattr(error, "errno", None)
        if number == zmq.EHOSTUNREACH:
            self.unreachable_count += 1
        elif number == zmq.EAGAIN:
            self.full_count += 1
        else:
            log.exception("answer_not_sent", address=self.address)

    def _read(self) -> None:
        bytes_left = BURST_BYTES_MAX
        for _ in range(BURST_MESSAGES_MAX):
            frames = receive_message(self._socket)
            bytes_left -= sum(map(len, frames))
            self._handler(frames.pop(0) if self._is_router else b"", frames)
            if self._is_closed or bytes_left < 0 or not is_readable(self._socket):
                return


def bind(sock: Socket, address: Address) -> Address:
    """Bind, and return the address with the port that was picked. Raises `AddressInUseError`, `InvalidArgumentError`."""
    if address.scheme == "ipc":
        _check_ipc(address.place)
    try:
        sock.bind(str(address))
    except zmq.ZMQError as error:
        raise _bind_error(address, error) from error
    if address.scheme == "tcp" and address.port == 0:
        endpoint: bytes = sock.get(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        return Address("tcp", address.place, int(endpoint.rstrip(b"\0").rpartition(b":")[2]))
    return address


def unbind(context: Context, sock: Socket) -> None:
    """Stop listening, and return when that is so, or after a second.

    libzmq closes listeners in a thread of its own, some time after `close`; until then the port is taken and the path alive. The
    file of an ipc path stays: removing it now could remove that of the next server.
    """
    endpoint: bytes = sock.get(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    monitor = None
    if not endpoint.startswith(b"inproc"):  # has no listener: it is gone at once
        with suppress(zmq.ZMQError):  # no descriptor is left: it is not waited for
            monitor = Monitor(context, sock, zmq.EVENT_CLOSED)
    sock.unbind(endpoint.rstrip(b"\0").decode())
    if monitor is not None:
        monitor.socket.poll(UNBIND_TIMEOUT_MS)
        monitor.close()


def _bind_error(address: Address, error: zmq.ZMQError) -> AddressInUseError | InvalidArgumentError:
    if error.errno == zmq.EADDRINUSE:
        return _in_use(address)
    return InvalidArgumentError(
        f"Cannot listen on {address}: {error.strerror}. Use an address of this machine, such as tcp://127.0.0.1:9876, "
        "and a port this user may open.",
        address=str(address), reason=error.strerror,
    )


def _in_use(address: Address) -> AddressInUseError:
    return AddressInUseError(
        f"Another program listens on {address}; stop it, or choose another port (0 picks a free one) or path.",
        address=str(address),
    )


def _check_ipc(path: str) -> None:
    """libzmq replaces whatever lies at an ipc path: a live server there would get nothing more, without a word."""
    folder = os.path.dirname(path) or "."
    try:
        mode = os.stat(folder)
    except OSError as error:
        raise InvalidArgumentError(
            f"The folder {folder} of the socket {path} cannot be used: {error.strerror}; make it first.", path=path
        ) from error
    if not stat.S_ISDIR(mode.st_mode) or mode.st_uid != os.geteuid() or mode.st_mode & 0o077:
        raise InvalidArgumentError(
            f"The folder {folder} of the socket {path} must be this user's alone, since whoever reaches the socket is served: "
            f"chmod 700 {folder}",
            path=path, mode=oct(stat.S_IMODE(mode.st_mode)),
        )
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise InvalidArgumentError(f"{path} is a file and no socket; choose another path.", path=path)
    if _is_alive(path):
        raise _in_use(Address("ipc", path))


def _is_alive(path: str) -> bool:
    """Whether somebody accepts connections there. A socket that a killed process left behind refuses them."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a full backlog: somebody is there, too busy to accept
    return True
