"""What else is done in a run besides sending and reading, drawn apart from everything else: a run without it stays what it was.

A run has some kinds of this work and rarely all, as with faults. `WorkPlan()` is none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from zrmq.message import ConsumeFrom

KEPT_MS = 72 * 3_600_000  # what a store keeps where nothing is drawn: longer than any run

GROUPS = ("group-0", "group-1", "group-2")


class RetentionPlan(msgspec.Struct, frozen=True):
    """When segments are deleted. A bound of 0 is none."""

    store_ms: int = KEPT_MS  # for topics without a bound of their own
    store_bytes_max: int = 0
    topic_ms: int = 0
    topic_bytes: int = 0
    free_delete_bytes: int = 0
    segment_bytes: int = 0  # in place of the plan's: short ones, so that some are deleted; 0 leaves that
    checkpoint_ms: int = 0  # likewise: what is not saved is not deleted


class PullPlan(msgspec.Struct, frozen=True):
    """How the members of a group ask for messages. Times are means in virtual ms, 0: never."""

    iterates: bool
    auto_commit: bool
    seek_every_ms: float  # of one member
    pause_every_ms: float
    message_ms: float  # what it does with one message takes so long


class ReaderPlan(msgspec.Struct, frozen=True):
    """One reader that names its queues itself. Times are means in virtual ms, 0: never."""

    has_group: bool  # of its own, where it commits
    topics: tuple[int, ...]  # numbers, of those there are
    share: float  # of their queues that it reads at a time
    consume_from: ConsumeFrom
    consume_after_ms: int  # where it begins at a time: so long after the run's beginning
    pulls: PullPlan
    assign_every_ms: float  # it names others
    end_every_ms: float  # it is closed, or crashes, and is started again
    starts_ms: float


class CallPlan(msgspec.Struct, frozen=True):
    """Threads of each producer's program that send and wait. Times are means in virtual ms."""

    threads: int
    send_every_ms: float  # of one thread
    is_alone: bool  # nothing else in the program sends, so that most of it goes by lanes


class WorkPlan(msgspec.Struct, frozen=True):
    """The kinds of work of one run."""

    retention: RetentionPlan = RetentionPlan()
    pulls: dict[str, PullPlan] = {}  # by group; the members of others have listeners
    change_topics_every_ms: float = 0.0  # mean time between two changes of an administrator, 0: none
    readers: tuple[ReaderPlan, ...] = ()
    change_flush_every_ms: float = 0.0  # mean time between two changes from sync to async or back
    remake_topics_every_ms: float = 0.0  # between two deletions of a topic, which is made again a little later
    session_timeouts_ms: tuple[int, ...] = ()  # one of these from each start of a broker on but the first; else always the plan's
    calls: CallPlan | None = None
    clock_drift: float = 0.0  # the share of the time by which a machine's clocks are too fast or too slow, at most

    @property
    def has_admin(self) -> bool:
        """Whether somebody changes topics."""
        return bool(self.change_topics_every_ms or self.change_flush_every_ms or self.remake_topics_every_ms)


def draw_work(seed: int) -> WorkPlan:
    """The work of a seed. Each kind is drawn apart, so that a new one changes none of the others."""
    share = Random(f"plan {seed} work").choice((0.0, 0.0, 0.3, 0.6))
    drawn = {}
    for kind, draw in KINDS.items():
        rng = Random(f"plan {seed} work {kind}")
        if rng.random() < share:
            drawn[kind] = draw(rng)
    return WorkPlan(**drawn)


def _retention(rng: Random) -> RetentionPlan:
    segment_bytes = rng.choice((4_096, 4_096, 8_192))
    kind = rng.choice(("age", "topic age", "topic bytes", "store bytes", "disk"))
    return RetentionPlan(
        store_ms=rng.choice((500, 2_000, 6_000)) if kind != "store bytes" else KEPT_MS,
        store_bytes_max=rng.randint(3, 12) * segment_bytes if kind == "store bytes" else 0,
        topic_ms=rng.choice((300, 1_500, 5_000)) if kind == "topic age" else 0,
        topic_bytes=rng.choice((1_000, 4_000, 16_000)) if kind == "topic bytes" else 0,
        free_delete_bytes=3 * segment_bytes if kind == "disk" else 0,
        segment_bytes=segment_bytes,
        checkpoint_ms=rng.choice((200, 500, 2_000)),
    )


def _pulls(rng: Random) -> dict[str, PullPlan]:
    return {group: _pull(rng) for group in GROUPS if rng.random() < 0.6}


def _pull(rng: Random) -> PullPlan:
    return PullPlan(
        iterates=rng.random() < 0.4, auto_commit=rng.random() < 0.6, seek_every_ms=rng.choice((0.0, 300.0, 3_000.0)),
        pause_every_ms=rng.choice((0.0, 0.0, 1_000.0)), message_ms=rng.choice((0.0, 1.0, 10.0, 100.0)),
    )


def _readers(rng: Random) -> tuple[ReaderPlan, ...]:
    return tuple(_reader(rng) for _ in range(rng.randint(1, 3)))


def _reader(rng: Random) -> ReaderPlan:
    return ReaderPlan(
        has_group=rng.random() < 0.5, topics=tuple(rng.sample(range(3), rng.randint(1, 3))),
        share=rng.choice((1.0, 1.0, 0.5, 0.3)),
        consume_from=rng.choice((ConsumeFrom.EARLIEST, ConsumeFrom.LATEST, ConsumeFrom.TIMESTAMP)),
        consume_after_ms=rng.randrange(4_000), pulls=_pull(rng), assign_every_ms=rng.choice((0.0, 500.0, 3_000.0)),
        end_every_ms=rng.choice((0.0, 2_000.0, 5_000.0)), starts_ms=rng.choice((0.0, rng.uniform(0.0, 3_000.0))),
    )


def _changes(rng: Random) -> float:
    return rng.choice((200.0, 1_000.0, 3_000.0))


def _remakes(rng: Random) -> float:
    return rng.choice((500.0, 1_500.0, 4_000.0))


def _timeouts(rng: Random) -> tuple[int, ...]:
    return rng.choice(((2_000, 10_000), (1_000, 4_000, 15_000)))


def _drift(rng: Random) -> float:
    """Up to what docs/decisions/clock-rates.md says that leases bear: two clocks are then 1.1 / 0.9 unlike."""
    return rng.choice((1e-5, 1e-3, 1e-2, 1e-1))


def _calls(rng: Random) -> CallPlan:
    return CallPlan(
        threads=rng.choice((1, 1, 2, 4)), send_every_ms=rng.choice((150.0, 400.0, 1_000.0)), is_alone=rng.random() < 0.7
    )


KINDS: dict[str, Callable[[Random], Any]] = {
    "retention": _retention, "pulls": _pulls, "readers": _readers, "change_topics_every_ms": _changes,
    "session_timeouts_ms": _timeouts, "clock_drift": _drift, "change_flush_every_ms": _changes,
    "remake_topics_every_ms": _remakes, "calls": _calls,
}
