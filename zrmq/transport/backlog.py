"""How much of what a server sent still lies in libzmq, by peer: answers that a client has asked for and does not read.

libzmq does not say. But it lets go of a frame it was handed by reference when it is through with it, and what was sent before
it has left too. So about every 64 KiB the last frame of a message goes by reference and is a mark. A weak reference tells
when nobody has it any more; pyzmq's own tracker tells the same and costs 15 us.
"""

from __future__ import annotations

from collections import deque
from typing import cast
from weakref import ref

import msgspec
import zmq

from zrmq.transport.interface import Frames
from zrmq.transport.wire import COPY_BYTES_MAX

MARK_BYTES = 64 * 1024  # between two marks; what follows the last mark is not known, so it is the error of all we say
SWEEP_PEERS_MIN = 1_024  # so many are remembered before those are looked for that have read everything


class _Sent(msgspec.Struct, eq=False):
    """What one peer was sent. A mark is a frame, which lives as long as libzmq needs it, and the bytes since the mark before."""

    unmarked_bytes: int = 0
    marked_bytes: int = 0
    marks: deque[tuple[ref[memoryview], int]] = msgspec.field(default_factory=deque)

    def settle(self) -> int:
        """Strike off what has left; returns what has not."""
        marks = self.marks
        while marks and marks[0][0]() is None:
            self.marked_bytes -= marks.popleft()[1]
        return self.marked_bytes


class Backlog:
    """Of one socket; used by who uses that. Small messages need not be counted: the high-water mark bounds how many there are."""

    def __init__(self) -> None:
        self._peers: dict[bytes, _Sent] = {}
        self._sweep_at = SWEEP_PEERS_MIN

    def __len__(self) -> int:
        return len(self._peers)

    def count(self, peer: bytes, frames: Frames) -> Frames:
        """Count a message that is about to be sent; returns the frames to send."""
        sent = self._peers.get(peer)
        if sent is None:
            sent = self._begin(peer)
        sent.unmarked_bytes += sum(map(len, frames))
        if sent.unmarked_bytes < MARK_BYTES:
            return frames
        view = memoryview(frames[-1])
        sent.marks.append((ref(view), sent.unmarked_bytes))
        sent.marked_bytes += sent.unmarked_bytes
        sent.unmarked_bytes = 0
        mark = view if len(view) >= COPY_BYTES_MAX else cast("memoryview", zmq.Frame(view, copy=False))
        return (*frames[:-1], mark)

    def size_bytes(self, peer: bytes) -> int:
        """What the peer has not taken yet, up to the last mark. Of a peer that is gone nothing is left."""
        sent = self._peers.get(peer)
        return 0 if sent is None else sent.settle()

    def _begin(self, peer: bytes) -> _Sent:
        """Nobody says which peers are gone, so those without a backlog are forgotten now and then."""
        if len(self._peers) >= self._sweep_at:
            self._peers = {peer: sent for peer, sent in self._peers.items() if sent.settle()}
            self._sweep_at = max(SWEEP_PEERS_MIN, 2 * len(self._peers))
        sent = self._peers[peer] = _Sent()
        return sent
