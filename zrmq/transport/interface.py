"""What the cores need from the world: time, timers, connections. `reactor.py` gives it over ZeroMQ, `memory.py` in memory.

Everything here is called and calls back on one thread, the loop's, except what says otherwise. Callbacks must not block.
The same contract suite (tests/contract) runs over both implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zrmq.clock import Clock

Frame = bytes | bytearray | memoryview
Frames = Sequence[Frame]


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Do not call. Does nothing when it was called or cancelled already."""


class Connection(Protocol):
    """A client's end: one DEALER to one server, which reconnects by itself for as long as it is open."""

    def send(self, frames: Frames) -> bool:
        """Hand one message over. False: nobody is connected or the pipe is full; the caller keeps it and tries again later."""

    def close(self) -> None:
        """End the connection; nothing is called back afterwards. What was sent and is still in the pipe may be lost."""


class ConnectionListener(Protocol):
    """What a connection tells its owner."""

    def on_connected(self) -> None:
        """A server accepted the connection (again). It knows nothing of us yet: open a session."""

    def on_disconnected(self) -> None:
        """The connection was lost. What was sent before may have arrived or not."""

    def on_frames(self, frames: list[bytes]) -> None:
        """One message came in: header and payload frames."""


class Endpoint(Protocol):
    """A server's end: one ROUTER (answers) or PULL (does not)."""

    @property
    def address(self) -> str:
        """Where it listens, with the port that was picked for port 0."""

    def send(self, peer: bytes, frames: Frames) -> bool:
        """Send one message to a peer, never blocking. False: that peer is gone or full, and will not have it."""

    def has_room(self, peer: bytes) -> bool:
        """Whether the peer has taken so much of what it was sent that it may be sent something large: `UNREAD_BYTES_MAX`."""

    def close(self) -> None:
        """Stop listening."""


RequestHandler = Callable[[bytes, list[bytes]], None]  # peer, [header, payload...]; for a PULL the peer is b""


class Loop(Protocol):
    """One thread of events: sockets, timers, calls from other threads."""

    @property
    def clock(self) -> Clock:
        """The time, as this thread's machine sees it."""

    @property
    def has_ended(self) -> bool:
        """Whether it works no more, for good; from any thread."""

    def call_later(self, delay_ms: float, callback: Callable[[], None]) -> Timer:
        """Call once, on this thread, not before `delay_ms` from now. Timers that are due together run in the order made."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread as soon as it can; from any thread. Raises `ClosedError` after the loop has ended."""

    def before_sleep(self, callback: Callable[[], None]) -> None:
        """Call at the end of each turn, when what was ready has been handled: the place for group commit."""

    def connect(self, address: str, listener: ConnectionListener) -> Connection:
        """A connection to a server, whether it is up or not. Raises `InvalidArgumentError` for an address that cannot be one."""

    def connect_push(self, address: str) -> Connection:
        """A one-way connection (PUSH) to a server's ingest address; `send` is False when the pipe is full."""

    def listen(self, address: str, handler: RequestHandler) -> Endpoint:
        """A ROUTER. Raises `AddressInUseError`, `InvalidArgumentError`."""

    def listen_pull(self, address: str, handler: RequestHandler) -> Endpoint:
        """A PULL for one-way sends."""
