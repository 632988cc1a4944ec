"""What happens to a tcp or ipc socket below the messages: libzmq's socket monitor."""

from __future__ import annotations

import struct
from contextlib import suppress

import zmq

from zrmq.transport.options import Context, Socket
from zrmq.transport.wire import receive_message

CONNECTED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)

_EVENT = struct.Struct("=HI")  # event, value


class Monitor:
    """The chosen events of one socket, which the same thread uses. `socket` is readable when there is one."""

    def __init__(self, context: Context, watched: Socket, events: int) -> None:
        address = f"inproc://zrmq-monitor-{id(watched)}-{watched.underlying}"
        self._watched = watched
        self.socket: Socket = context.socket(zmq.PAIR)  # first: it may fail, by EMFILE, and then nothing is to be undone
        watched.monitor(address, events)
        self.socket.connect(address)

    def next_event(self) -> int:
        """The next event, or 0."""
        try:
            frames = receive_message(self.socket)
        except zmq.Again:
            return 0
        event: int = _EVENT.unpack(frames[0])[0]
        return event

    def close(self) -> None:
        """Stop watching; before the watched socket is closed."""
        with suppress(zmq.ContextTerminated):  # an ended context has ended this already
            self._watched.disable_monitor()
        self.socket.close(0)
