"""Which segments may go: whole ones, the oldest first, when nobody's messages in them are wanted any more. Pure.

A topic's messages in a segment are expired by the topic's own bounds, age or bytes, whichever comes first; by the store's age
where the topic has none. A segment goes when all its topics' messages are expired. Two things force the oldest segment out,
whatever is in it: the store's own size and a disk that fills up. What is not in a saved view yet never goes, nor does the
segment that is written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zrmq.store.segment import Segment, Share
from zrmq.store.tables import Topic

AHEAD_MS = 3_600_000  # a stamp that is no more in the future keeps its segment so much longer, which does no harm


class _Now(NamedTuple):
    """What time it is, and what it was when this run of the broker began."""

    ms: int
    began_ms: int


def expired_count(
    segments: Sequence[Segment], topics: Mapping[int, Topic], *, now_ms: int, began_ms: int, retention_ms: int,
    saved_position: int, excess_bytes: int,
) -> int:
    """How many segments at the front may be deleted. `began_ms`: when this run of the broker began. `excess_bytes`: how much has
    to go, expired or not."""
    count = freed_bytes = 0
    for index in range(len(segments) - 1):
        segment = segments[index]
        if segment.end > saved_position:
            break
        if freed_bytes >= excess_bytes and not _is_expired(segments, index, topics, _Now(now_ms, began_ms), retention_ms):
            break
        freed_bytes += segment.end - segment.start
        count += 1
    return count


def unexpired(
    segments: Sequence[Segment], count: int, topics: Mapping[int, Topic], *, now_ms: int, began_ms: int, retention_ms: int
) -> tuple[int, int]:
    """What goes with so many segments at the front although it is not expired: how many bytes, and when the newest of it was
    stored."""
    now = _Now(now_ms, began_ms)
    size_bytes = last_ms = 0
    for index in range(count):
        for topic_id, share in segments[index].shares.items():
            topic = topics.get(topic_id)
            if topic is not None and not _is_share_expired(segments, index, topic, share, now, retention_ms):
                size_bytes += share.size_bytes
                last_ms = max(last_ms, share.last_ms)
    return size_bytes, last_ms


def _is_expired(
    segments: Sequence[Segment], index: int, topics: Mapping[int, Topic], now: _Now, retention_ms: int
) -> bool:
    segment = segments[index]
    if not segment.shares:
        return _age_ms(segments, index, segment.last_ms, now) > retention_ms
    for topic_id, share in segment.shares.items():
        topic = topics.get(topic_id)
        if topic is not None and not _is_share_expired(segments, index, topic, share, now, retention_ms):
            return False
    return True


def _is_share_expired(
    segments: Sequence[Segment], index: int, topic: Topic, share: Share, now: _Now, retention_ms: int
) -> bool:
    config = topic.config
    if config.retention_ms is None and config.retention_bytes is None:
        return _age_ms(segments, index, share.last_ms, now) > retention_ms
    if config.retention_ms is not None and _age_ms(segments, index, share.last_ms, now) > config.retention_ms:
        return True
    return config.retention_bytes is not None and _bytes_behind(segments, index, topic.topic_id) >= config.retention_bytes


def _age_ms(segments: Sequence[Segment], index: int, stamp_ms: int, now: _Now) -> int:
    """How old at least is what was stamped so in a segment. A stamp ahead of the clock tells no age, but what is behind it is
    younger. That one's stamp may be by a clock that was far too late, so the segment counts as no older than this run."""
    if stamp_ms > now.ms + AHEAD_MS:
        behind_ms = (segment.last_ms for segment in segments[index + 1 :] if 0 < segment.last_ms <= now.ms)
        stamp_ms = max(next(behind_ms, stamp_ms), now.began_ms)
    return now.ms - stamp_ms


def _bytes_behind(segments: Sequence[Segment], index: int, topic_id: int) -> int:
    """Bytes of a topic in the segments after this one."""
    shares = (segment.shares.get(topic_id) for segment in segments[index + 1 :])
    return sum(share.size_bytes for share in shares if share is not None)
