"""Client-side buffer of one message queue: what was pulled, what is with the caller, and how far all of it is finished.

    finished        with the caller, some finished      decoded        pulled, closed       still at the broker
    ----------|===========--=====-====---------------|--------------|--------------------|----------------------
              ^ commit_offset                        ^ position                          ^ pull_offset

`commit_offset` is the lowest offset that is not finished: whoever reads the queue next begins there. Payload frames stay as they
came until the caller wants their messages, and are decoded in the caller's thread: the loop's thread never opens them. Everything
is done per batch or per unit, never per message.

Nothing here locks, waits or sends; `zrmq.client.inbox` does the first, for the threads that meet at it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

import msgspec

from zrmq.errors import InvalidFrameError
from zrmq.message import Message, MessageQueue
from zrmq.protocol.batch import BatchHeader, decode_messages, iter_batches


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """What one pull brought: frames, still closed, with the messages from `offset` up to `next_offset`; maybe none."""

    frames: Sequence[bytes]
    offset: int
    next_offset: int

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.frames))


class Opened(msgspec.Struct, frozen=True):
    """A chunk's messages. `next_offset` is where to go on; below the chunk's own only when the rest did not check out."""

    messages: list[Message]
    next_offset: int
    damage: str = ""  # what was wrong, empty: nothing
    skipped_count: int = 0  # batches left out for good, because they will never be readable


class Unit(msgspec.Struct, frozen=True, eq=False):
    """Messages handed out together. The range also covers those in between that the filter left out."""

    process_queue: ProcessQueue
    messages: list[Message]
    offset: int
    next_offset: int


class Account(msgspec.Struct):
    """What all process queues of one consumer hold together."""

    size_bytes: int = 0
    messages: int = 0


class Unfinished:
    """Ranges of offsets that were handed out and are not finished, in order; neighbours are one range.

    Both lists are changed without a call in between, so that no signal handler can raise there.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def lowest(self) -> int:
        """The lowest unfinished offset; there has to be one."""
        return self._starts[0]

    def add(self, offset: int, next_offset: int) -> None:
        """Hand out a range that lies behind all earlier ones."""
        if self._ends and self._ends[-1] == offset:
            self._ends[-1] = next_offset
        elif offset < next_offset:
            self._starts += (offset,)
            self._ends += (next_offset,)

    def remove(self, offset: int, next_offset: int) -> None:
        """Finish what is unfinished in a range."""
        starts, ends = self._starts, self._ends
        first = max(bisect_right(starts, offset) - 1, 0)
        if first < len(ends) and ends[first] <= offset:
            first += 1
        last = bisect_left(starts, next_offset)
        if first >= last or offset >= next_offset:
            return
        has_left, has_right = starts[first] < offset, next_offset < ends[last - 1]
        left_starts = [starts[first]] * has_left + [next_offset] * has_right
        left_ends = [offset] * has_left + [ends[last - 1]] * has_right
        starts[first:last] = left_starts
        ends[first:last] = left_ends


def _body_bytes(unit: Unit) -> int:
    return sum(len(message.body) for message in unit.messages)


def forever() -> float:
    """Validity of a queue that is read without a lease."""
    return inf


class ProcessQueue:
    """One message queue as this consumer reads it, from the offset it began at.

    A queue that is acquired again or read from elsewhere (`seek`) gets a new one; this one is then `is_dropped`, and what the
    caller still has of it counts for nothing.

    Invariants: `commit_offset <= position <= pull_offset`; none of them goes back, but `pull_offset` by `forget` and
    `position` by `go_back`.
    """

    def __init__(
        self,
        queue: MessageQueue,
        offset: int,
        *,
        lease_epoch: int = 0,
        wanted_tags: frozenset[str] | None = None,
        account: Account | None = None,
        valid_until_ms: Callable[[], float] = forever,
    ) -> None:
        self.queue = queue
        self.lease_epoch = lease_epoch
        self.wanted_tags = wanted_tags  # None: all messages
        self.valid_until_ms = valid_until_ms  # monotonic; nothing is handed out later than this
        self.pull_offset = offset  # what to pull next
        self.position = offset  # what to hand out next
        self.in_flight = 0  # units with the caller now
        self.held_bytes = 0  # of what is pulled and closed, or rests
        self.held_messages = 0
        self.damaged_offset = -1  # where a chunk did not check out and is pulled once more
        self.parked: list[Unit] = []  # resting units whose time came during a pause
        self.is_paused = False
        self.is_draining = False  # to be given back as soon as nothing is in flight
        self.is_dropped = False
        self.is_lost = False  # dropped with its lease or its broker, or while callers were at work: what they have comes again
        self.is_lapsed = False  # its lease was not confirmed in time when a caller came
        self._account = account if account is not None else Account()
        self._chunks: deque[Chunk] = deque()
        self._opening: Chunk | None = None  # being decoded by a caller
        self._open: list[Message] = []
        self._at = 0  # how much of `_open` was handed out
        self._next_offset = offset  # what follows `_open`
        self._unfinished = Unfinished()
        self._resting: set[Unit] = set()  # failed, to be handed out again later

    @property
    def commit_offset(self) -> int:
        """The lowest offset that is not finished."""
        return self._unfinished.lowest if self._unfinished else self.position

    @property
    def has_more(self) -> bool:
        """Whether there is something to hand out."""
        return bool(self._chunks) or self._at < len(self._open)

    @property
    def chunks_left(self) -> int:
        """How many chunks are pulled and still closed."""
        return len(self._chunks)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def add(self, chunk: Chunk) -> bool:
        """Take what the pull at `pull_offset` brought, which may be nothing but a new place to go on.

        False: reading goes on elsewhere by now, because of `forget` or of damage; the chunk is not wanted.
        """
        if chunk.offset != self.pull_offset:
            return False
        assert chunk.offset <= chunk.next_offset
        self.pull_offset = chunk.next_offset
        if not chunk.frames and not self.has_more and self._opening is None:
            self.position = self._next_offset = chunk.next_offset
            return True
        self._chunks.append(chunk)
        self._hold(chunk.size_bytes, chunk.next_offset - chunk.offset)
        return True

    def _hold(self, size_bytes: int, messages: int) -> None:
        """Count something against the consumer's bounds; negative numbers take it off again."""
        self.held_bytes += size_bytes
        self.held_messages += messages
        self._account.size_bytes += size_bytes
        self._account.messages += messages

    def forget(self) -> None:
        """Throw away what was not handed out yet; it is pulled again, from `position` on."""
        self._open, self._at, self._opening = [], 0, None
        self._forget_behind(self.position)
        self._next_offset = self.position

    def go_back(self, offset: int) -> None:
        """What was handed out from the offset on was never given to anybody; it is pulled again."""
        if offset < self.position:
            self._unfinished.remove(offset, self.position)
            self.position = offset
        self.forget()

    def forget_resting(self) -> None:
        """Throw away what failed; it stays unfinished, for whoever reads the queue next."""
        for unit in self._resting:
            self._hold(-_body_bytes(unit), -len(unit.messages))
        self._resting.clear()
        self.parked.clear()

    # --- what goes out ------------------------------------------------------------------------------------------------

    def begin_opening(self) -> Chunk | None:
        """The next chunk to `open_chunk`, for `end_opening`; None while there are open messages, or nothing at all.

        Opening stands apart so that it can be done without a lock.
        """
        if self._at < len(self._open) or not self._chunks:
            return None
        self._opening = self._chunks.popleft()
        self._hold(-self._opening.size_bytes, self._opening.offset - self._opening.next_offset)
        return self._opening

    def end_opening(self, chunk: Chunk, opened: Opened) -> None:
        """Take the messages of a chunk, unless everything was forgotten meanwhile. Damage makes the rest be pulled again."""
        if self._opening is not chunk:
            return
        self._opening = None
        self._open, self._at, self._next_offset = opened.messages, 0, opened.next_offset
        if not opened.messages:
            self.position = opened.next_offset
        if opened.next_offset < chunk.next_offset:
            self.damaged_offset = opened.next_offset
            self._forget_behind(opened.next_offset)

    def _forget_behind(self, offset: int) -> None:
        for chunk in self._chunks:
            self._hold(-chunk.size_bytes, chunk.offset - chunk.next_offset)
        self._chunks.clear()
        self.pull_offset = offset

    def cut(self, messages_max: int) -> Unit | None:
        """Hand out up to `messages_max` of the open messages; None when there are none."""
        start, end = self._at, min(self._at + messages_max, len(self._open))
        if start == end:
            return None
        if end == len(self._open):
            messages, next_offset = self._open[start:] if start else self._open, self._next_offset
            self._open, self._at = [], 0
        else:
            messages, next_offset = self._open[start:end], self._open[end].queue_offset
            self._at = end
        unit = Unit(self, messages, self.position, next_offset)
        self._unfinished.add(self.position, next_offset)
        self.position = next_offset
        self.in_flight += 1
        return unit

    # --- what comes back ----------------------------------------------------------------------------------------------

    def rest(self, unit: Unit) -> None:
        """Keep a failed unit until it is handed out again; it stays unfinished."""
        self._resting.add(unit)
        self._hold(_body_bytes(unit), len(unit.messages))

    def rouse(self, unit: Unit) -> bool:
        """Hand a resting unit out again. False: it was forgotten meanwhile."""
        if unit not in self._resting:
            return False
        self._resting.remove(unit)
        self._hold(-_body_bytes(unit), -len(unit.messages))
        self.in_flight += 1
        return True

    def finish(self, offset: int, next_offset: int) -> None:
        """Everything in the range is done and need not come again."""
        self._unfinished.remove(offset, next_offset)

    def finish_below(self, offset: int) -> None:
        """Everything handed out so far that lies below the offset is done."""
        if self._unfinished:
            self._unfinished.remove(self._unfinished.lowest, offset)


def open_chunk(chunk: Chunk, queue: ProcessQueue) -> Opened:
    """Decode a chunk; leave out what lies below its offset and tags that are not wanted.

    A batch whose records cannot be read, although its CRC is right, was written like that: it is skipped. One whose CRC is wrong
    was damaged after the broker checked it: reading ends there, to be pulled again; what is damaged at the same offset a second
    time is skipped, with the rest of its frame.
    """
    messages: list[Message] = []
    offset, damage, skipped_count = chunk.offset, "", 0
    for frame in chunk.frames:
        try:
            for header, batch in iter_batches(frame):
                try:
                    found = _read(header, batch, queue, offset)
                except InvalidFrameError as error:
                    found, damage, skipped_count = [], error.message, skipped_count + 1
                if messages:
                    messages += found
                else:
                    messages = found
                offset = max(offset, header.next_offset)
        except InvalidFrameError as error:
            if queue.damaged_offset != offset:
                return Opened(messages, offset, error.message, skipped_count)
            damage, skipped_count = error.message, skipped_count + 1
    return Opened(messages, chunk.next_offset, damage, skipped_count)


def _read(header: BatchHeader, batch: memoryview, queue: ProcessQueue, offset: int) -> list[Message]:
    if header.next_offset <= offset:
        return []
    place = queue.queue
    found = decode_messages(header, batch, topic=place.topic, broker_name=place.broker_name)
    if header.base_offset < offset:
        del found[: offset - header.base_offset]
    wanted = queue.wanted_tags
    return found if wanted is None else [message for message in found if message.tag in wanted]
