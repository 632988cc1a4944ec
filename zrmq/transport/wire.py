"""One multipart message in, one out. The only place that moves frames between Python and libzmq."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import zmq
import zmq.backend

from zrmq.protocol.limits import FRAME_COUNT_MAX, RECEIVED_BYTES_MAX
from zrmq.transport.interface import Frame, Frames
from zrmq.transport.options import Socket

COPY_BYTES_MAX = 64 * 1024  # from here on handing over a reference is cheaper than a copy

# Hot path: the compiled methods themselves. pyzmq's Python layer over them costs more than they do (4 us against 1 us for two
# frames), for features we do not use.
_send = cast("Callable[[Socket, Frame, int, bool], object]", zmq.backend.Socket.send)
_recv = cast("Callable[[Socket, int, bool], zmq.Frame]", zmq.backend.Socket.recv)
_get = cast("Callable[[Socket, int], int]", zmq.backend.Socket.get)
_MORE = zmq.DONTWAIT | zmq.SNDMORE
_LAST = int(zmq.DONTWAIT)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)  # pyzmq's own is an enum, and its `&` costs as much as asking the socket


def send_message(socket: Socket, frames: Frames) -> None:
    """Send without blocking. Raises `zmq.ZMQError`: EAGAIN when it would block, EHOSTUNREACH for an unknown peer of a ROUTER."""
    last = len(frames) - 1
    index = 0
    try:
        for index, frame in enumerate(frames):
            _send(socket, frame, _MORE if index < last else _LAST, len(frame) < COPY_BYTES_MAX)
    except zmq.ZMQError:
        if 0 < index < last:
            _end_message(socket)
        raise
    except BaseException:  # Ctrl-C in a caller's thread, who knows how far this came: at worst a server refuses an empty frame
        _end_message(socket)
        raise


def prepare_references() -> None:
    """Have pyzmq ready to send frames by reference. For that it opens files and sockets and starts a thread, once in a process:
    otherwise in the middle of the first large answer, when there may be no room for any."""
    zmq.Frame(b"", copy=False)


def _end_message(socket: Socket) -> None:
    """Left in the middle of a message, libzmq drops frames up to a last one, which must not be the next message's."""
    try:
        _send(socket, b"", _LAST, True)
    except zmq.ZMQError as error:
        if error.errno != zmq.EAGAIN:
            raise


def receive_message(socket: Socket, flags: int = _LAST) -> list[bytes]:
    """Receive one message. Raises `zmq.Again` when there is none (within RCVTIMEO for flags 0).

    One that no request or reply can be, with more than `FRAME_COUNT_MAX` frames and the routing id or `RECEIVED_BYTES_MAX` bytes,
    is cut off one frame later: its other frames are not even copied. Empty ones make up the number, so that whatever was cut off
    has more frames than a message may have, which is what `check_whole` looks at.
    """
    frame = _recv(socket, flags, False)
    frames = [frame.bytes]
    room = RECEIVED_BYTES_MAX
    while frame.more:
        if room < 0 or len(frames) > FRAME_COUNT_MAX + 1:
            _drop_rest(socket)
            frames += [b""] * (FRAME_COUNT_MAX + 2 - len(frames))
            break
        frame = _recv(socket, flags, False)
        data = frame.bytes
        room -= len(data)
        frames.append(data)
    return frames


def _drop_rest(socket: Socket) -> None:
    """libzmq hands over whole messages: what follows is there."""
    while _recv(socket, _LAST, False).more:
        pass


def is_readable(socket: Socket) -> bool:
    """Whether `receive_message` would give something."""
    return bool(_get(socket, _EVENTS) & _POLLIN)
