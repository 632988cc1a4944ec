"""Which segments may go: by each topic's own bounds, by force, and never what is not saved or still written to."""

from __future__ import annotations

from pathlib import Path

from zrmq.protocol.events import TopicConfig
from zrmq.store.retention import AHEAD_MS, expired_count
from zrmq.store.segment import Segment
from zrmq.store.tables import Topic

NOW = 1_000_000
HOUR = 1_000  # the store's own age
EVERYTHING = 1 << 60


def segments(*shares: dict[int, tuple[int, int]], last_ms: int = 0) -> list[Segment]:
    """Segments of 100 bytes; each with age and bytes of what its topics have in it."""
    made = []
    for number, topics in enumerate(shares):
        segment = Segment(Path("x"), 100 * number, 100 * number + 100)
        segment.note_event(last_ms)
        for topic_id, (age_ms, size_bytes) in topics.items():
            segment.note_batch(topic_id, NOW - age_ms, size_bytes)
        made.append(segment)
    return made


def topics(**configs: TopicConfig) -> dict[int, Topic]:
    return {number: Topic(number, config) for number, config in enumerate(configs.values(), 1)}


def count(
    made: list[Segment], known: dict[int, Topic], saved_position: int = EVERYTHING, excess_bytes: int = 0, began_ms: int = 0
) -> int:
    return expired_count(
        made, known, now_ms=NOW, began_ms=began_ms, retention_ms=HOUR, saved_position=saved_position, excess_bytes=excess_bytes
    )


PLAIN = topics(a=TopicConfig("a"), b=TopicConfig("b"))


def test_a_stamp_ahead_of_the_clock_counts_as_no_older_than_this_run() -> None:
    """What is behind it may be stamped by a clock that had lost the time."""
    ahead, ancient, new = {1: (-AHEAD_MS - 1, 50)}, {1: (NOW - 1, 50)}, {1: (0, 50)}
    assert count(segments(ahead, ancient, new), PLAIN, began_ms=NOW - HOUR) == 0
    assert count(segments(ahead, ancient, new), PLAIN, began_ms=NOW - HOUR - 1) == 2


def test_old_segments_go_from_the_front() -> None:
    old, new = {1: (HOUR + 1, 50)}, {1: (HOUR, 50)}
    assert count(segments(old, old, new, new), PLAIN) == 2
    assert count(segments(new, old, old), PLAIN) == 0, "never from the middle"
    assert count([], PLAIN) == 0


def test_the_last_segment_stays() -> None:
    old = {1: (HOUR * 99, 50)}
    assert count(segments(old), PLAIN) == 0
    assert count(segments(old, old), PLAIN) == 1
    assert count(segments(old, old), PLAIN, excess_bytes=EVERYTHING) == 1


def test_what_is_not_saved_stays() -> None:
    old = {1: (HOUR * 99, 50)}
    assert count(segments(old, old, old, old), PLAIN, saved_position=200) == 2
    assert count(segments(old, old, old, old), PLAIN, saved_position=199) == 1
    assert count(segments(old, old, old, old), PLAIN, saved_position=0, excess_bytes=EVERYTHING) == 0


def test_every_topic_must_be_done_with_a_segment() -> None:
    both = {1: (HOUR * 2, 50), 2: (HOUR - 1, 50)}
    assert count(segments(both, both), PLAIN) == 0
    keeps = topics(a=TopicConfig("a"), b=TopicConfig("b", retention_ms=HOUR * 9))
    both = {1: (HOUR * 2, 50), 2: (HOUR * 2, 50)}
    assert count(segments(both, both), keeps) == 0
    hurries = topics(a=TopicConfig("a", retention_ms=5), b=TopicConfig("b", retention_ms=5))
    both = {1: (6, 50), 2: (6, 50)}
    assert count(segments(both, both), hurries) == 1


def test_topics_that_are_gone_keep_nothing() -> None:
    assert count(segments({9: (0, 50)}, {1: (0, 50)}), PLAIN) == 1


def test_a_topic_bounded_by_bytes_only_has_no_age() -> None:
    bounded = topics(a=TopicConfig("a", retention_bytes=100))
    ancient = {1: (HOUR * 99, 60)}
    assert count(segments(ancient, ancient), bounded) == 0
    assert count(segments(ancient, ancient, ancient), bounded) == 1, "two segments behind have 120 bytes"
    assert count(segments(ancient, ancient, {}, ancient), bounded) == 1
    fresh = {1: (0, 60)}
    assert count(segments(fresh, fresh, fresh), bounded) == 1


def test_whichever_bound_comes_first() -> None:
    bounded = topics(a=TopicConfig("a", retention_bytes=100, retention_ms=50))
    assert count(segments({1: (51, 1)}, {1: (0, 1)}), bounded) == 1
    assert count(segments({1: (49, 1)}, {1: (0, 100)}), bounded) == 1
    assert count(segments({1: (49, 1)}, {1: (0, 99)}), bounded) == 0


def test_segments_of_events_go_by_age() -> None:
    assert count(segments({}, {}, last_ms=NOW - HOUR - 1), PLAIN) == 1
    assert count(segments({}, {}, last_ms=NOW - HOUR), PLAIN) == 0


def test_force_takes_as_many_as_it_needs() -> None:
    fresh = {1: (0, 50)}
    made = segments(*[fresh] * 6)
    assert [count(made, PLAIN, excess_bytes=excess) for excess in (0, 1, 100, 101, 300, 9999)] == [0, 1, 1, 2, 3, 5]


def test_force_and_age_together() -> None:
    made = segments({1: (0, 50)}, {1: (HOUR * 2, 50)}, {1: (0, 50)}, {1: (0, 50)})
    assert count(made, PLAIN, excess_bytes=1) == 2


def test_a_stamp_from_the_future_is_as_old_as_what_was_stored_behind_it() -> None:
    future, old, new = {1: (-AHEAD_MS - 1, 50)}, {1: (HOUR + 1, 50)}, {1: (HOUR, 50)}
    assert count(segments(future, future, old, new), PLAIN) == 3
    assert count(segments(future, new, old, new), PLAIN) == 0, "the next one is nearest"
    assert count(segments(future, future, future), PLAIN) == 0, "nothing tells an age"
    assert count(segments(future, {}, old, new), PLAIN) == 3, "a segment all of which is damaged has no stamp"
    assert count(segments({}, {}, old, new, last_ms=NOW + AHEAD_MS + 1), PLAIN) == 0
    assert count([*segments({}, last_ms=NOW + AHEAD_MS + 1), *segments(old, new)], PLAIN) == 2
    assert count(segments({1: (-AHEAD_MS, 50)}, old, new), PLAIN) == 0, "that is soon past"
    bounded = topics(a=TopicConfig("a", retention_ms=HOUR * 2))
    assert count(segments(future, old, new), bounded) == 0
    assert count(segments(future, {1: (HOUR * 2 + 1, 50)}, new), bounded) == 2
