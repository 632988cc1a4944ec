"""Checks of what is deleted: only what has expired or was in the way, and nothing that anybody will want to know."""

from __future__ import annotations

from zrmq.store.store import Store
from zrmq.store.tables import Topic
from zrmq.testing.simulation.log_check import LogCheck, describe_tables
from zrmq.testing.simulation.log_watch import LogWatch
from zrmq.testing.simulation.plan import Plan
from zrmq.testing.simulation.trace import BrokenPromise

SPARE_SEGMENTS_MAX = 4  # that count as the store's size beside its log, and the one that goes last


def check_deleted(broker_name: str, watch: LogWatch, store: Store, plan: Plan, before: int, now_ms: int) -> None:
    """The log began at `before` and begins at the store's start now: every batch between has expired by one of the bounds."""
    start, kept = store.start_position, plan.work.retention
    if start > store.checkpoint_position:
        saved = store.checkpoint_position
        raise BrokenPromise("retention", f"{broker_name} deleted its log up to {start}, and only {saved} is saved.")
    if kept.free_delete_bytes and "full_disk" in plan.faults:
        return  # that may force out anything
    unseen_bytes = store.appended_position - watch.end  # of whatever topic: what a broker wrote just before it crashed, say
    behind_bytes: dict[int, int] = {}
    for position in sorted(watch.batches, reverse=True):
        topic_id, end, stored_ms = watch.batches[position]
        if position < before:
            break
        topic = store.tables.topics_by_id.get(topic_id)
        room_bytes = kept.store_bytes_max - SPARE_SEGMENTS_MAX * plan.segment_bytes
        is_forced = kept.store_bytes_max > 0 and store.appended_position - position > room_bytes
        if end <= start and topic is not None and not is_forced:
            is_expired = _is_expired(topic, now_ms - stored_ms, behind_bytes.get(topic_id, 0) + unseen_bytes, kept.store_ms)
            if not is_expired:
                what = f"a batch of {topic.config.topic} at {position}, {now_ms - stored_ms} ms old"
                raise BrokenPromise("retention", f"{broker_name} deleted {what}, before it had expired: {topic.config}.")
        behind_bytes[topic_id] = behind_bytes.get(topic_id, 0) + end - position


def _is_expired(topic: Topic, age_ms: int, behind_bytes: int, store_ms: int) -> bool:
    config = topic.config
    if config.retention_ms is None and config.retention_bytes is None:
        return age_ms > store_ms
    is_old = config.retention_ms is not None and age_ms > config.retention_ms
    return is_old or (config.retention_bytes is not None and behind_bytes >= config.retention_bytes)


def check_relocated(broker_name: str, store: Store, check: LogCheck, *, is_refused: bool) -> None:
    """What is left of the log says, alone, everything that the tables hold. `is_refused`: there was no room to say it again."""
    watch = check.watch.anew(check.log_start)
    for _ in watch.advance(store.written_position):
        pass
    if not watch.is_complete:
        if not is_refused:
            raise BrokenPromise("relocation", f"{broker_name}: the log from {watch.start} on does not say everything.")
        return
    ours, theirs = describe_tables(watch.tables), describe_tables(store.tables)
    for name in ("topics", "names", "groups", "numbers"):
        if ours[name] != theirs[name]:
            what = f"the {name} are {theirs[name]}; the log from {watch.start} on alone gives {ours[name]}"
            raise BrokenPromise("relocation", f"{broker_name}: {what}.")
