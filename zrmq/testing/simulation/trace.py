"""What happened in a run: the last events in words, and a digest of all of them that tells two runs apart."""

from __future__ import annotations

from collections import Counter, deque
from hashlib import blake2b

from zrmq.message import MessageQueue

EVENTS_KEPT = 200


class BrokenPromise(BaseException):
    """A checker found what must not be. Not an `Exception`, since no code under test may handle it.

    `kind` names the checker, `reason` says in a sentence what is wrong.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class SimulationError(Exception):
    """A run in which a promise was broken, or the cluster did not become healthy. The text has all that is needed to repeat it.

    `seed` repeats the run exactly; `kind` names the checker, `reason` the broken promise in one sentence; `story` has the plan
    and the last events.
    """

    def __init__(self, seed: int, kind: str, reason: str, story: str) -> None:
        super().__init__(seed, kind, reason, story)
        self.seed = seed
        self.kind = kind
        self.reason = reason
        self.story = story

    def __str__(self) -> str:
        return f"[{self.kind}] {self.reason}\n{self.story}"


def spell(queue: MessageQueue) -> str:
    """A queue in an event or a reason."""
    return f"{queue.broker_name}/{queue.topic}/{queue.queue_id}"


class Trace:
    """The events of one run, in order. `counts` has how often each kind occurred."""

    def __init__(self, events_kept: int = EVENTS_KEPT) -> None:
        self.counts: Counter[str] = Counter()
        self._last: deque[str] = deque(maxlen=events_kept)
        self._hash = blake2b(digest_size=16)

    def add(self, now_ms: float, who: str, what: str, detail: str = "") -> None:
        """Note that something happened. It must read the same in every run of a seed: no addresses, no real time."""
        line = f"{now_ms:12.3f}  {who:<14} {what} {detail}"
        self.counts[what] += 1
        self._last.append(line)
        self._hash.update(line.encode())

    def mix(self, state: object) -> None:
        """Let the digest depend on some state, without an event."""
        self._hash.update(repr(state).encode())

    @property
    def digest(self) -> str:
        """Equal for two runs in which the same things happened at the same time."""
        return self._hash.hexdigest()

    @property
    def last(self) -> list[str]:
        """The events that are kept, oldest first."""
        return list(self._last)
