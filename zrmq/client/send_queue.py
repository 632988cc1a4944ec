"""The order of batches on their way to one message queue: a window, the `follows` chain, and the rewind. Pure.

    add --> waiting --next--> sent, no answer yet --acknowledged or given up--> out of the line
               ^                    |
               '------ rewind ------'   when one was refused and all the others have their answers

Promise: the batches of one line that a broker stores, it stores in the order of the line, whatever is refused, lost or resent.
What keeps it: connections are first in, first out; each batch names the one before it as long as that has no answer, and a
broker that has not stored that one refuses; one of another producer id, which it could not name, is waited for; after any
refusal nothing new goes out until every answer is there, then all of it goes out again in order. Batches that were stored after
all are recognised by the broker, because the window is shorter than the list of batches it remembers per producer and queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from zrmq.protocol.limits import INFLIGHT_BATCHES_MAX

WINDOW_MAX = 16  # enough to keep a broker busy; half of what it remembers (limits.INFLIGHT_BATCHES_MAX)

assert WINDOW_MAX < INFLIGHT_BATCHES_MAX


class Sequenced(Protocol):
    """What a line asks of a batch."""

    @property
    def last_sequence(self) -> int:
        """Sequence of its last record."""

    @property
    def producer_id(self) -> int:
        """Whose sequences these are."""


B = TypeVar("B", bound=Sequenced)


class SendQueue(Generic[B]):
    """The line of one message queue. Loop thread only."""

    def __init__(self, window_max: int = WINDOW_MAX) -> None:
        self.window_max = window_max
        self._sent: list[B] = []
        self._refused: list[B] = []  # of those sent: they come again
        self._waiting: deque[B] = deque()

    def __len__(self) -> int:
        """Batches in the line, sent or not."""
        return len(self._sent) + len(self._waiting)

    def __iter__(self) -> Iterator[B]:
        """All batches in the order of the line."""
        return iter([*self._sent, *self._waiting])

    @property
    def has_room(self) -> bool:
        """Whether a batch added now could be sent at once, but behind an unanswered one of another producer id."""
        return not self._refused and not self._waiting and len(self._sent) < self.window_max

    @property
    def unanswered(self) -> list[B]:
        """Batches sent that have no answer, oldest first."""
        return [batch for batch in self._sent if batch not in self._refused]

    def add(self, batch: B) -> None:
        """Put a batch at the end of the line."""
        self._waiting.append(batch)

    def next(self) -> tuple[B, int] | None:
        """The batch to send now and the sequence it follows (0: none); None while the window is full or rewinds, or the
        one before it is of another producer id and has no answer.

        The caller sends it, in the order of these calls, and reports exactly one of `acknowledged`, `refused`, `remove` for it.
        """
        if self._refused or not self._waiting or len(self._sent) >= self.window_max:
            return None
        batch, follows = self._waiting[0], 0
        if self._sent:
            before = self._sent[-1]
            if before.producer_id != batch.producer_id:
                return None
            follows = before.last_sequence
        self._sent.append(self._waiting.popleft())
        return batch, follows

    def acknowledged(self, batch: B) -> None:
        """The broker has stored it."""
        self._sent.remove(batch)
        self._rewind_if_answered()

    def refused(self, batch: B) -> None:
        """The broker has not stored it, or nobody knows, and it is to be sent again."""
        self._refused.append(batch)
        self._rewind_if_answered()

    def remove(self, batch: B) -> None:
        """It is given up or goes elsewhere, sent or not. The caller has forgotten the request it was sent with."""
        if batch in self._refused:
            self._refused.remove(batch)
        if batch in self._sent:
            self._sent.remove(batch)
        else:
            self._waiting.remove(batch)
        self._rewind_if_answered()

    def _rewind_if_answered(self) -> None:
        if self._refused and len(self._refused) == len(self._sent):
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            self._refused.clear()
