"""Replies on their way out: at once, after the write, or after the flush that makes them true."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from zrmq.errors import ZrmqError
from zrmq.protocol.requests import Reply, encode_fitting, failed
from zrmq.transport.interface import Frames

Send = Callable[[bytes, Frames], bool]
HasRoom = Callable[[bytes], bool]


class Outbox:
    """Holds each reply until what it claims is so.

    Invariant: nothing leaves before its position is reached. Releasing is popping from the left, as positions are added in the
    order of the log; an earlier one waits for those before it. A reply to a peer that is gone is dropped and counted: its
    client asks again on a new connection, and resent writes are recognized.
    """

    def __init__(self, send: Send, has_room: HasRoom) -> None:
        self._send = send
        self.has_room = has_room  # whether a peer has read so much that it may be sent more than a small header
        self._until_written: deque[tuple[int, bytes, Reply]] = deque()
        self._until_flushed: deque[tuple[int, bytes, Reply]] = deque()
        self.unroutable_count = 0

    def __len__(self) -> int:
        return len(self._until_written) + len(self._until_flushed)

    def now(self, peer: bytes, reply: Reply, payload: Frames = ()) -> None:
        """Send a reply or notice that is true already. Whoever adds a payload has looked whether there is room for it."""
        header = encode_fitting(reply, peer, self.has_room)
        if not self._send(peer, (header, *payload)):
            self.unroutable_count += 1

    def after_write(self, position: int, peer: bytes, reply: Reply) -> None:
        """Send when the log is written up to `position`: it then survives a crash of this process."""
        self._until_written.append((position, peer, reply))

    def after_flush(self, position: int, peer: bytes, reply: Reply) -> None:
        """Send when the log is flushed up to `position`: it then survives a power cut."""
        self._until_flushed.append((position, peer, reply))

    def release(self, written_position: int, flushed_position: int) -> None:
        """Send what has become true."""
        for held, reached in ((self._until_written, written_position), (self._until_flushed, flushed_position)):
            while held and held[0][0] <= reached:
                _, peer, reply = held.popleft()
                self.now(peer, reply)

    def refuse_held(self, error: ZrmqError) -> None:
        """Answer everything held with `error`: the disk failed and none of it will become true."""
        for held in (self._until_written, self._until_flushed):
            while held:
                _, peer, reply = held.popleft()
                self.now(peer, failed(reply.number, error))
