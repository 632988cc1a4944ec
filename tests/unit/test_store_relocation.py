"""Relocation: a log whose beginning is deleted still has everything that holds, without views.db too."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store_bench import FOLDER, LOG, QUEUES, SEGMENT_BYTES, StoreBench, describe, log_entries
from zrmq.errors import FolderUnusableError
from zrmq.files import read_file, remove_tree, replace_file
from zrmq.protocol.batch import BatchHeader
from zrmq.protocol.events import (
    AnyEvent,
    GroupDeleted,
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    QueuesAdvanced,
    SessionTimeoutChanged,
    StateRelocated,
    TopicDeleted,
    TopicPut,
)
from zrmq.store import relocation
from zrmq.store.relocation import statements
from zrmq.store.segment import segment_name
from zrmq.store.tables import Tables
from zrmq.testing.files import PowerCut

HOUR_MS = 3_600_000


def state(bench: StoreBench) -> dict[str, Any]:
    """What a log without its beginning has to tell. Who sent what last goes with the batches; openings are counted on."""
    for topic in bench.store.tables.topics.values():
        for queue in topic.queues:
            bench.bodies(queue)  # a read trims the queue
    plain = describe(bench.store.tables)
    next_topic_id, _boot, _is_stopped, relocated_from, session_timeout_ms = plain.pop("numbers")
    del plain["windows"]
    return {**plain, "next_topic_id": next_topic_id, "relocated_from": relocated_from, "session_timeout_ms": session_timeout_ms}


def bodies(bench: StoreBench) -> dict[str, list[list[bytes]]]:
    return {
        name: [bench.bodies(queue) for queue in topic.queues] for name, topic in sorted(bench.store.tables.topics.items())
    }


def lose_views(bench: StoreBench) -> None:
    bench.files.crash()
    bench.files.unlink(FOLDER / "views.db")
    bench.files.fsync_dir(FOLDER)
    remove_tree(bench.files, QUEUES)


def busy_bench(**config: Any) -> StoreBench:
    """A log with a group, and a topic of which only the first segment has anything."""
    bench = StoreBench(retention_ms=HOUR_MS, **config)
    quiet = bench.topic("quiet", 3)
    (busy, _) = bench.topic("busy", 2)
    bench.append(quiet[1], count=7)
    store = bench.store
    store.append_event(GroupSubscribed("readers", "quiet", 5, [(0, 0), (1, 2)]))
    store.append_event(GroupSubscribed("shown", "busy", 6, [(0, 0)], "box-1"))
    store.append_event(OffsetsCommitted("readers", "", [(1, 1, 4)]))
    store.append_event(OffsetsCommitted("shown", "box-1", [(2, 0, 1)]))
    store.append_event(LeaseGranted("readers", 1, 1, "client-1", 1 << 32))
    store.append_event(SessionTimeoutChanged(4_000))
    bench.fill_segments(busy, 4)
    bench.checkpoint()
    return bench


def delete_beginning(bench: StoreBench) -> None:
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain(3)
    assert bench.store.start_position > 0


def test_everything_is_said_again_before_the_segment_that_said_it_goes() -> None:
    bench = busy_bench()
    delete_beginning(bench)
    (busy, _) = bench.topic("busy", 2)
    bench.fill_segments(busy, 1)
    before, kept, boot = state(bench), bodies(bench), bench.store.boot
    assert before["topics"][1][1] == [(0, 0), (7, 7), (0, 0)], "offsets of what is deleted are not given again"
    lose_views(bench)
    bench.open()
    report = bench.store.recovery
    assert (report.has_views, report.is_complete, report.unplaced_batches) == (False, True, 0)
    assert state(bench) == before
    assert bodies(bench) == kept
    assert bench.store.boot == boot + 1


def test_nothing_is_deleted_before_that_is_flushed() -> None:
    bench = busy_bench()
    bench.clock.advance(HOUR_MS + 1)
    assert bench.store.begin_maintenance() is None
    assert bench.store.tables.relocated_from > 0
    assert bench.store.begin_maintenance() is None
    bench.flush()
    assert bench.store.begin_maintenance() is not None
    assert bench.store.start_position > 0


def test_it_is_said_once_however_long_the_flush_takes() -> None:
    bench = busy_bench()
    bench.clock.advance(HOUR_MS + 1)
    for _ in range(5):
        assert bench.store.begin_maintenance() is None
        bench.clock.advance(1_000)
    assert sum(isinstance(event, StateRelocated) for _, event in events_of(bench)) == 1
    assert bench.store.begin_maintenance() is not None


def test_what_is_only_said_again_is_saved_like_anything_else() -> None:
    """A queue that has no messages any more has an offset to go on with."""
    bench = busy_bench()
    delete_beginning(bench)
    lose_views(bench)
    bench.open()
    bench.checkpoint()
    for how in (bench.reopen, bench.crash):
        how()
        assert bench.store.recovery.has_views
        assert (bench.queue("quiet", 1).min_offset, bench.queue("quiet", 1).next_offset) == (7, 7)
    assert bench.append(bench.queue("quiet", 1), first_sequence=900).base_offset == 7


def test_a_power_cut_may_bring_back_some_of_the_deleted_segments() -> None:
    """The first one is back, the second one, which said that there is a topic, is not; and the views are lost."""
    bench = StoreBench(retention_ms=HOUR_MS)
    (other,) = bench.topic("other", 1)
    bench.fill_segments(other, 1)
    (keeper,) = bench.topic("keeper", 1, retention_ms=HOUR_MS * 10)
    bench.fill_segments(other, 1)
    bench.append(keeper, count=3)
    bench.fill_segments(other, 2)
    bench.checkpoint()
    path = LOG / segment_name(0)
    first = read_file(bench.files, path)
    delete_beginning(bench)
    kept = bodies(bench)["keeper"]
    assert len(kept[0]) == 3
    lose_views(bench)
    replace_file(bench.files, path, first)
    bench.open()
    assert (bench.store.recovery.is_complete, bench.store.recovery.unplaced_batches) == (True, 0)
    assert bodies(bench)["keeper"] == kept


def test_a_topic_said_again_has_its_newest_configuration() -> None:
    bench = busy_bench()
    delete_beginning(bench)
    bench.topic("quiet", 3, retention_ms=7 * HOUR_MS)
    bench.append(bench.queue("quiet"))
    bench.flush()
    before = state(bench)
    lose_views(bench)
    bench.open()
    assert state(bench) == before


def test_views_that_cannot_be_read_are_made_anew() -> None:
    bench = busy_bench()
    delete_beginning(bench)
    before = state(bench)
    bench.files.crash()
    replace_file(bench.files, FOLDER / "views.db", b"nonsense" * 100)
    bench.open()
    assert not bench.store.recovery.has_views
    assert state(bench) == before


def test_messages_in_front_of_where_their_topic_is_said_again_are_kept() -> None:
    bench = StoreBench(retention_ms=HOUR_MS)
    (keeper,) = bench.topic("keeper", 1, retention_ms=HOUR_MS * 10)
    (other,) = bench.topic("other", 1)
    bench.fill_segments(other, 2)
    bench.append(keeper, count=3)
    bench.fill_segments(other, 2)
    bench.checkpoint()
    delete_beginning(bench)
    kept = bodies(bench)
    assert len(kept["keeper"][0]) == 3
    lose_views(bench)
    bench.open()
    assert bodies(bench) == kept
    bench.checkpoint()
    bench.maintain(3)
    assert bodies(bench) == kept, "nor does retention take them for nobody's"


def test_one_relocation_serves_until_the_log_begins_behind_it() -> None:
    bench = busy_bench(store_bytes_max=4 * SEGMENT_BYTES)
    positions = set()
    for _ in range(20):
        bench.fill_segments(bench.queue("busy"), 1)
        bench.checkpoint()
        bench.maintain()
        positions.add(bench.store.tables.relocated_from)
        assert bench.store.start_position <= bench.store.tables.relocated_from
    assert 4 <= len(positions) <= 8, "not one for each of twenty segments"


def test_a_log_that_lost_its_beginning_unsaid_is_made_whole_at_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = busy_bench()
    with monkeypatch.context() as patch:
        patch.setattr(relocation.Relocation, "go_on", lambda self, *where: False)
        delete_beginning(bench)
    bench.reopen()
    before = state(bench)
    bench.maintain()
    bench.flush()
    lose_views(bench)
    bench.open()
    assert bench.store.recovery.is_complete
    assert {**state(bench), "relocated_from": 0} == before


def test_what_was_said_again_and_deleted_since_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = busy_bench()
    delete_beginning(bench)
    bench.fill_segments(bench.queue("busy"), 2)
    bench.checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(relocation.Relocation, "go_on", lambda self, *where: False)
        delete_beginning(bench)
    assert bench.store.start_position > bench.store.tables.relocated_from
    lose_views(bench)
    bench.open()
    assert not bench.store.recovery.is_complete


def test_a_disk_without_room_for_it_frees_itself_first() -> None:
    """What frees a full disk does not wait; it is made good when there is room."""
    bench = busy_bench(free_delete_bytes=SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    while bench.store._log.limit - bench.store.appended_position > 60:
        bench.store.append_event(OffsetsCommitted("readers", "", []))
    bench.checkpoint()
    bench.files.capacity_bytes = bench.files.used_bytes
    bench.clock.advance(HOUR_MS + 1)
    bench.maintain()
    assert bench.store.start_position > 0
    assert bench.store.tables.relocated_from == 0
    bench.maintain()
    assert bench.store.tables.relocated_from >= bench.store.start_position
    before = state(bench)
    lose_views(bench)
    bench.open()
    assert state(bench) == before


def test_no_segment_goes_unsaid_for_want_of_a_descriptor() -> None:
    """Connections count as open files, and they end; the disk has room."""
    bench = busy_bench()
    while bench.store._log.limit - bench.store.appended_position > 60:
        bench.store.append_event(OffsetsCommitted("readers", "", []))
    bench.checkpoint()
    bench.clock.advance(HOUR_MS + 1)
    bench.files.fail("open", errno.EMFILE, times=3)
    for _ in range(3):
        assert bench.store.begin_maintenance() is None
    bench.maintain()
    assert bench.store.start_position > 0
    assert bench.store.tables.relocated_from >= bench.store.start_position


@pytest.mark.parametrize("count", [20, 300, 600])
def test_no_messages_are_deleted_to_make_room_for_what_does_not_fit(count: int) -> None:
    """One segment goes at each look at a disk that is low; what is said again must not eat it up each time."""
    bench = StoreBench(retention_ms=HOUR_MS * 1_000, free_delete_bytes=SEGMENT_BYTES, free_refuse_bytes=0, free_warn_bytes=0)
    (busy,) = bench.topic("busy", 1)
    for number in range(count):
        bench.store.append_event(GroupSubscribed(f"group-{number}", "busy", 5, [(0, 0)], f"box-{number}"))
    bench.fill_segments(busy, 12)
    bench.checkpoint()
    bench.files.capacity_bytes = bench.files.used_bytes
    before = len(bench.bodies(busy))
    for _ in range(30):
        bench.maintain()
        bench.checkpoint()
    assert len(bench.bodies(busy)) >= before - 60


def unreadable(bench: StoreBench) -> StoreBench:
    replace_file(bench.files, FOLDER / "views.db", b"nonsense" * 100)
    return bench


def test_what_was_cut_off_with_the_tail_was_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = busy_bench()
    with monkeypatch.context() as patch:
        patch.setattr(relocation.Relocation, "go_on", lambda self, *where: False)
        delete_beginning(bench)
    bench.checkpoint()
    position = bench.store.appended_position
    for event in list(statements(bench.store.tables, position)):
        bench.store.append_event(event)
    bench.store.write()
    bench.files.kill()
    bench.rot(position + 50)  # not flushed: torn, and all behind it with it
    with pytest.raises(FolderUnusableError, match="does not say as a whole"):
        unreadable(bench).open()


@pytest.mark.parametrize("kind", [TopicPut, QueuesAdvanced, OffsetsCommitted, StateRelocated])
def test_what_is_damaged_was_not_said_as_a_whole(kind: type[AnyEvent]) -> None:
    bench = busy_bench()
    delete_beginning(bench)
    bench.fill_segments(bench.queue("busy"), 1)
    said = bench.store.tables.relocated_from
    bench.rot(next(position for position, event in events_of(bench) if position >= said and type(event) is kind) + 50)
    bench.files.crash()
    with pytest.raises(FolderUnusableError, match="or it is damaged"):
        unreadable(bench).open()


CHANGES: list[AnyEvent] = [
    TopicDeleted(1),
    TopicDeleted(2),
    GroupDeleted("readers"),
    LeaseReleased("readers", 1, 1, 1 << 32),
    OffsetsCommitted("readers", "", [(1, 1, 6)]),
    GroupSubscribed("late", "busy", 9, []),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
@pytest.mark.parametrize("taken", range(10))
def test_what_changes_while_it_is_said_again_stays_changed(taken: int, change: AnyEvent) -> None:
    bench = busy_bench()
    saying = statements(bench.store.tables, bench.store.appended_position)
    for _ in range(taken):
        bench.store.append_event(next(saying))
    bench.store.append_event(change)
    after = state(bench)
    for event in saying:
        bench.store.append_event(event)
    said = bench.store.tables.relocated_from
    assert {**state(bench), "relocated_from": 0} == after
    fresh = Tables()
    for position, event in events_of(bench):
        if position >= said:
            fresh.apply_event(event)
    plain = describe(fresh)
    assert plain["groups"] == after["groups"]
    assert plain["names"] == describe(bench.store.tables)["names"]


def events_of(bench: StoreBench) -> list[tuple[int, AnyEvent]]:
    bench.flush()
    return [
        (header.position, content) for header, content in log_entries(bench.disk)
        if content is not None and not isinstance(content, BatchHeader)
    ]


def test_a_large_state_is_said_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relocation, "ROUND_BYTES", 150)
    monkeypatch.setattr(relocation, "OFFSETS_PER_EVENT", 2)
    bench = busy_bench()
    before = state(bench)
    bench.clock.advance(HOUR_MS + 1)
    rounds = 0
    while bench.store.start_position == 0:
        bench.maintain()
        rounds += 1
    assert 2 <= rounds < 9
    said = [event for _, event in events_of(bench) if isinstance(event, StateRelocated)]
    assert len(said) == 1
    lose_views(bench)
    bench.open()
    assert state(bench)["groups"] == before["groups"]


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.sampled_from([50, 500, 2000])),
    st.tuples(st.just("append"), st.integers(0, 3), st.sampled_from([50, 500, 2000])),
    st.tuples(st.just("group"), st.integers(0, 30)),
    st.tuples(st.just("topic"), st.integers(0, 30)),
    st.tuples(st.just("save")),
    st.tuples(st.just("maintain")),
    st.tuples(st.just("reopen")),
)


class Day:
    """A store that is kept small, so that its log soon begins late."""

    def __init__(self, seed: int) -> None:
        self.bench = StoreBench(seed, retention_ms=HOUR_MS, store_bytes_max=3 * SEGMENT_BYTES)
        self.epoch = 0

    def append(self, number: int, size: int) -> None:
        queues = [queue for topic in self.bench.store.tables.topics.values() for queue in topic.queues]
        if queues:
            self.bench.append(queues[number % len(queues)], size=size, count=3)
            self.bench.flush()

    def group(self, number: int) -> None:
        tables = self.bench.store.tables
        ids = sorted(tables.topics_by_id) or [99]
        topic_id, group = ids[number % len(ids)], "xyz"[number % 3]
        topic = tables.topics_by_id.get(topic_id)
        self.epoch += 1
        events: list[AnyEvent] = [
            GroupSubscribed(group, topic.config.topic if topic else "none", number, [(0, number)], "" if number % 2 else "box"),
            OffsetsCommitted(group, "", [(topic_id, 0, topic.queues[0].next_offset if topic else 0)]),
            LeaseGranted(group, topic_id, 0, f"client-{number}", self.epoch),
            LeaseReleased(group, topic_id, 0, self.epoch - 1),
            GroupDeleted(group),
        ]
        self.bench.store.append_event(events[number % len(events)])

    def topic(self, number: int) -> None:
        name = "abc"[number % 3]
        known = self.bench.store.tables.topics.get(name)
        if known is not None and number % 4 == 0:
            self.bench.store.append_event(TopicDeleted(known.topic_id))
        else:
            self.bench.topic(name, max(1 + number % 3, len(known.queues) if known else 0))

    def save(self) -> None:
        self.bench.checkpoint()

    def maintain(self) -> None:
        self.bench.maintain()

    def reopen(self) -> None:
        self.bench.reopen()

    def live(self, script: list[tuple[Any, ...]]) -> None:
        for name, *arguments in script:
            getattr(self, name)(*arguments)


@settings(max_examples=80)
@given(seed=st.integers(0, 1 << 32), script=st.lists(steps, min_size=5, max_size=80))
def test_a_log_without_its_beginning_tells_what_the_views_tell(seed: int, script: list[tuple[Any, ...]]) -> None:
    day = Day(seed)
    day.topic(1)
    day.live(script)
    bench = day.bench
    bench.flush()
    before, kept = state(bench), bodies(bench)
    lose_views(bench)
    bench.open()
    assert bench.store.recovery.is_complete
    assert state(bench) == before
    assert bodies(bench) == kept


@settings(max_examples=80)
@given(seed=st.integers(0, 1 << 32), cut=st.integers(0, 60))
def test_nothing_is_missing_whenever_the_power_goes(seed: int, cut: int) -> None:
    """Segments go while the power may; what had been flushed before that is in the log, whatever is left of it."""
    day = Day(seed)
    day.live([("topic", 1), ("topic", 2), ("group", 5), ("group", 1), ("group", 6)] + [("append", n, 2000) for n in range(20)])
    day.save()
    before = state(day.bench)
    day.bench.files.cut_power_after(cut)
    try:
        for _ in range(4):
            day.maintain()
            day.append(0, 500)
            day.save()
    except PowerCut:
        pass
    day.bench.files._changes_left = None
    lose_views(day.bench)
    day.bench.open()
    after = state(day.bench)
    assert day.bench.store.recovery.is_complete
    assert after["names"] == before["names"]
    assert after["groups"] == before["groups"]
    for topic_id, (_, queues) in before["topics"].items():
        assert all(late >= early for (_, early), (_, late) in zip(queues, after["topics"][topic_id][1], strict=True))
