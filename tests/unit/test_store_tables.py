"""The fold of the log: what each event and batch does to the tables, in any order a log can have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.store_bench import describe
from zrmq.protocol.batch import BatchHeader
from zrmq.protocol.events import (
    AnyEvent,
    BrokerStarted,
    BrokerStopped,
    GroupDeleted,
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    QueuesAdvanced,
    SessionTimeoutChanged,
    StateRelocated,
    TopicConfig,
    TopicDeleted,
    TopicPut,
    decode_event,
    encode_event,
)
from zrmq.store import tables as tables_module
from zrmq.store.tables import WINDOW_BATCHES, Lease, Tables


def header(
    topic_id: int = 1, queue_id: int = 0, base_offset: int = 0, count: int = 1, *, producer_id: int = 7, first_sequence: int = 1,
    position: int = 0, store_timestamp_ms: int = 1000,
) -> BatchHeader:
    """A batch's header as the fold reads it."""
    return BatchHeader(
        b"ZR", 1, 1, 200, 0, 0, position, 0, store_timestamp_ms, topic_id, queue_id, base_offset, 0, 0, 0, 0, producer_id,
        first_sequence, count, 0, 0, 0,
    )


def folded(*events: AnyEvent | BatchHeader) -> Tables:
    tables = Tables()
    for event in events:
        if isinstance(event, BatchHeader):
            tables.apply_batch(event)
        else:
            tables.apply_event(event)
    return tables


PUT = TopicPut(1, TopicConfig("meters", 2))


# --- topics -------------------------------------------------------------------------------------------------------------


def test_a_topic_comes_with_its_queues() -> None:
    tables = folded(PUT)
    topic = tables.topics["meters"]
    assert topic is tables.topics_by_id[1]
    assert topic.config.queue_count == 2
    assert [queue.queue_id for queue in topic.queues] == [0, 1]
    assert all(queue.topic is topic for queue in topic.queues)
    assert tables.next_topic_id == 2
    assert repr(topic.queues[1]) == "<Queue meters/1 0..0..0>"


def test_queues_are_only_added_and_keep_what_they_have() -> None:
    tables = folded(PUT, header(count=5))
    kept = tables.topics["meters"].queues[0]
    tables.apply_event(TopicPut(1, TopicConfig("meters", 4, retention_ms=5)))
    assert len(tables.topics["meters"].queues) == 4
    tables.apply_event(TopicPut(1, TopicConfig("meters", 1)))
    assert len(tables.topics["meters"].queues) == 4
    assert tables.topics["meters"].queues[0] is kept
    assert kept.next_offset == 5
    assert tables.topics["meters"].config.retention_ms is None


def test_a_deleted_topic_takes_everything_along() -> None:
    tables = folded(
        PUT, TopicPut(2, TopicConfig("other", 1)), header(), header(2), GroupSubscribed("g", "meters", 5, [(0, 3)]),
        OffsetsCommitted("g", "", [(1, 0, 1), (2, 0, 1)]), LeaseGranted("g", 1, 0, "c", 9), LeaseGranted("g", 2, 0, "c", 10),
        TopicDeleted(1),
    )
    assert list(tables.topics) == ["other"]
    group = tables.groups["g"]
    assert group.offsets == {("", 2, 0): 1}
    assert group.leases == {(2, 0): Lease("c", 10)}
    assert group.subscriptions[""]["meters"].starts == {}
    assert [key[1] for key in tables.windows] == [2]
    assert tables.next_topic_id == 3, "ids are never used again"


def test_a_topic_made_again_is_read_from_its_beginning() -> None:
    again = TopicPut(2, TopicConfig("meters", 2))
    tables = folded(PUT, GroupSubscribed("g", "meters", 5, [(0, 30), (1, 40)]), TopicDeleted(1), again)
    assert tables.groups["g"].start_offset(tables.topics["meters"], 0) == 0


def test_a_name_belongs_to_the_topic_made_last() -> None:
    """The event that deleted the one before is damaged."""
    again = TopicPut(2, TopicConfig("meters", 2))
    for log in ((PUT, header(), again), (again, PUT)):
        tables = folded(*log, OffsetsCommitted("g", "", [(2, 0, 5)]))
        assert {name: topic.topic_id for name, topic in tables.topics.items()} == {"meters": 2}
        assert list(tables.topics_by_id) == [2]
        tables.apply_event(TopicDeleted(1))
        tables.apply_event(TopicDeleted(2))
        assert tables.topics == tables.topics_by_id == {}


def test_deleting_what_is_gone() -> None:
    tables = folded(PUT, TopicDeleted(1), TopicDeleted(1), GroupDeleted("nobody"))
    assert tables.topics == {}
    assert tables.groups == {}


# --- groups -------------------------------------------------------------------------------------------------------------


def test_where_a_group_begins() -> None:
    tables = folded(PUT, GroupSubscribed("g", "meters", 5, [(0, 30)]))
    topic, group = tables.topics["meters"], tables.groups["g"]
    assert group.start_offset(topic, 0) == 30
    assert group.start_offset(topic, 1) == 0, "a queue that came later is read from its beginning"
    tables.apply_batch(header(base_offset=0, count=50))
    tables.apply_event(OffsetsCommitted("g", "", [(1, 0, 33)]))
    assert group.start_offset(topic, 0) == 33
    assert group.start_offset(topic, 0, "host-a") is None, "an instance has a subscription of its own"
    tables.apply_event(GroupSubscribed("g", "meters", 6, [(0, 40)], "host-a"))
    assert (group.start_offset(topic, 0, "host-a"), group.start_offset(topic, 0)) == (40, 33)
    tables.apply_event(OffsetsCommitted("g", "host-a", [(1, 0, 44)]))
    assert group.start_offset(topic, 0, "host-a") == 44
    assert group.start_offset(topic, 0) == 33
    tables.apply_event(OffsetsCommitted("g", "", [(1, 0, 2)]))
    assert group.start_offset(topic, 0) == 2, "a reset goes back"


def test_a_group_that_never_subscribed_begins_nowhere() -> None:
    tables = folded(PUT, GroupSubscribed("g", "other", 5, []))
    assert tables.groups["g"].start_offset(tables.topics["meters"], 0) is None


def test_a_subscription_may_come_before_its_topic() -> None:
    tables = folded(GroupSubscribed("g", "meters", 5, []), PUT)
    assert tables.groups["g"].start_offset(tables.topics["meters"], 1) == 0


def test_offsets_of_what_is_gone_are_not_kept() -> None:
    tables = folded(PUT, OffsetsCommitted("g", "", [(1, 9, 5), (8, 0, 5)]))
    assert tables.groups["g"].offsets == {}


def test_a_commit_beyond_the_end_proves_that_there_was_more() -> None:
    tables = folded(PUT, header(count=5), OffsetsCommitted("g", "", [(1, 0, 9), (1, 1, 7)]))
    queue, empty = tables.topics["meters"].queues
    assert (queue.min_offset, queue.next_offset) == (0, 9)
    assert empty.next_offset == 7
    assert tables.apply_batch(header(base_offset=9)) is queue


def test_a_deleted_group_is_gone() -> None:
    tables = folded(PUT, GroupSubscribed("g", "meters", 5, []), OffsetsCommitted("g", "", [(1, 0, 0)]), GroupDeleted("g"))
    assert tables.groups == {}
    tables.apply_event(OffsetsCommitted("g", "", [(1, 1, 0)]))
    assert tables.groups["g"].offsets == {("", 1, 1): 0}
    assert tables.groups["g"].subscriptions == {}


def test_leases_come_and_go_by_their_epoch() -> None:
    tables = folded(PUT, LeaseGranted("g", 1, 0, "one", 5))
    tables.apply_event(LeaseReleased("g", 1, 0, 4))
    assert tables.groups["g"].leases == {(1, 0): Lease("one", 5)}
    tables.apply_event(LeaseGranted("g", 1, 0, "two", 6))
    tables.apply_event(LeaseReleased("g", 1, 0, 5))
    assert tables.groups["g"].leases == {(1, 0): Lease("two", 6)}
    tables.apply_event(LeaseReleased("g", 1, 0, 6))
    assert tables.groups["g"].leases == {}
    tables.apply_event(LeaseReleased("g", 1, 0, 6))
    tables.apply_event(LeaseReleased("nobody", 1, 0, 6))
    tables.apply_event(LeaseGranted("g", 99, 0, "c", 7))
    assert tables.groups["g"].leases == {}


def test_a_clean_end_leaves_the_leases_to_their_holders() -> None:
    tables = folded(BrokerStarted(3), PUT, LeaseGranted("g", 1, 0, "one", 5), BrokerStopped())
    assert tables.groups["g"].leases == {(1, 0): Lease("one", 5)}
    assert tables.is_stopped
    tables.apply_event(BrokerStarted(4))
    assert not tables.is_stopped
    assert tables.boot == 4


# --- batches ------------------------------------------------------------------------------------------------------------


def test_batches_move_their_queue() -> None:
    tables = folded(PUT)
    queue = tables.topics["meters"].queues[1]
    assert tables.apply_batch(header(queue_id=1, count=3)) is queue
    assert tables.apply_batch(header(queue_id=1, base_offset=3, count=2)) is queue
    assert (queue.min_offset, queue.next_offset) == (0, 5)


def test_a_queue_whose_beginning_is_gone_begins_where_its_log_does() -> None:
    tables = folded(PUT, header(base_offset=100, count=3))
    queue = tables.topics["meters"].queues[0]
    assert (queue.min_offset, queue.next_offset) == (100, 103)
    tables.apply_batch(header(base_offset=110))
    assert (queue.min_offset, queue.next_offset) == (100, 111), "a hole is damage; it does not move the beginning"


def test_batches_without_a_place_change_nothing() -> None:
    tables = folded(PUT, header(count=5))
    before = describe(tables)
    assert tables.apply_batch(header(queue_id=2)) is None
    assert tables.apply_batch(header(base_offset=4)) is None
    assert describe(tables) == before
    assert tables.apply_batch(header(topic_id=9)) is None
    assert describe(tables)["topics"] == before["topics"]
    assert tables.next_topic_id == 10, "an id that was used is not used again, though nobody knows the topic any more"


def test_a_batch_sent_again_is_recognized() -> None:
    later = header(base_offset=3, count=2, first_sequence=20, store_timestamp_ms=2000)
    tables = folded(PUT, header(count=3, first_sequence=10), later)
    assert tables.find_duplicate(7, 1, 0, 10) == (0, 1000, 3)
    assert tables.find_duplicate(7, 1, 0, 20) == (3, 2000, 2)
    for other in ((8, 1, 0, 10), (7, 2, 0, 10), (7, 1, 1, 10), (7, 1, 0, 11), (7, 1, 0, 22)):
        assert tables.find_duplicate(*other) is None


def test_the_predecessor_is_found_by_its_last_sequence() -> None:
    tables = folded(PUT, header(count=3, first_sequence=10), header(base_offset=3, count=2, first_sequence=20))
    assert tables.has_stored(7, 1, 0, 12)
    assert tables.has_stored(7, 1, 0, 21)
    for other in ((7, 1, 0, 13), (7, 1, 0, 20), (7, 1, 1, 12), (8, 1, 0, 12)):
        assert not tables.has_stored(*other)


def test_a_window_has_the_last_batches_only() -> None:
    tables = folded(PUT)
    for number in range(WINDOW_BATCHES + 5):
        tables.apply_batch(header(base_offset=number, first_sequence=number + 1))
    assert tables.find_duplicate(7, 1, 0, 5) is None
    assert tables.find_duplicate(7, 1, 0, 6) == (5, 1000, 1)
    assert not tables.has_stored(7, 1, 0, 5)
    assert tables.has_stored(7, 1, 0, 6)
    assert len(tables.windows[7, 1, 0].sent) == WINDOW_BATCHES * 28


def test_sequences_may_come_out_of_order() -> None:
    """A batch that changed brokers keeps its sequences, so an older one may be appended later."""
    tables = folded(PUT, header(first_sequence=50), header(base_offset=1, first_sequence=10))
    assert tables.find_duplicate(7, 1, 0, 50) == (0, 1000, 1)
    assert tables.find_duplicate(7, 1, 0, 10) == (1, 1000, 1)
    assert tables.has_stored(7, 1, 0, 50)
    assert tables.windows[7, 1, 0].highest_sequence == 50


def test_the_window_silent_for_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "WINDOWS_MAX", 3)
    tables = folded(PUT)
    for offset, producer_id in enumerate([1, 2, 3, 1, 4]):
        tables.apply_batch(header(base_offset=offset, producer_id=producer_id, first_sequence=offset + 1, position=offset))
    assert [key[0] for key in tables.windows] == [3, 1, 4]
    assert tables.find_duplicate(2, 1, 0, 2) is None
    assert tables.find_duplicate(1, 1, 0, 1) == (0, 1000, 1)


# --- what has changed ---------------------------------------------------------------------------------------------------


def test_changes_are_taken_once_and_can_be_given_back() -> None:
    tables = folded(PUT, GroupSubscribed("g", "meters", 5, []), OffsetsCommitted("g", "h", [(1, 0, 0)]))
    changed = tables.take_changed()
    assert (changed.topics, changed.groups, changed.offsets) == ({1}, {"g"}, {("g", "h", 1, 0)})
    assert tables.take_changed().topics == set()
    tables.apply_event(GroupDeleted("g"))
    tables.apply_event(TopicDeleted(1))
    tables.give_back(changed)
    again = tables.take_changed()
    assert (again.topics, again.topics_deleted, again.groups_deleted) == ({1}, {1}, {"g"})
    assert again.offsets == {("g", "h", 1, 0)}


# --- purity -------------------------------------------------------------------------------------------------------------

ids = st.integers(1, 3)
small = st.integers(0, 3)
names = st.sampled_from(["a", "b", "c"])
offsets = st.lists(st.tuples(ids, small, st.integers(0, 50)), max_size=3)
events: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda topic_id, count: TopicPut(topic_id, TopicConfig(f"t{topic_id}", count)), ids, st.integers(1, 4)),
    st.builds(TopicDeleted, ids),
    st.builds(GroupSubscribed, names, st.sampled_from(["t1", "t2"]), small, st.lists(st.tuples(small, small), max_size=3)),
    st.builds(OffsetsCommitted, names, st.sampled_from(["", "host"]), offsets),
    st.builds(LeaseGranted, names, ids, small, names, st.integers(1, 9)),
    st.builds(LeaseReleased, names, ids, small, st.integers(1, 9)),
    st.builds(BrokerStarted, small),
    st.builds(BrokerStopped),
    st.builds(GroupDeleted, names),
    st.builds(QueuesAdvanced, ids, st.lists(st.tuples(small, st.integers(0, 50)), max_size=3)),
    st.builds(StateRelocated, small, small, small, small),
    st.builds(SessionTimeoutChanged, small),
    st.builds(
        lambda topic_id, queue_id, offset, count, producer: header(
            topic_id, queue_id, offset, count, producer_id=producer, first_sequence=offset + 1, position=offset
        ),
        ids, small, st.integers(0, 60), st.integers(1, 5), ids,
    ),
)


@given(st.lists(events, max_size=40))
def test_any_log_folds_and_the_same_log_folds_alike(log: list[Any]) -> None:
    tables = folded(*log)
    again = folded(*(event if isinstance(event, BatchHeader) else decode_event(encode_event(event)) for event in log))
    assert describe(again) == describe(tables)
    for topic in tables.topics.values():
        assert tables.topics_by_id[topic.topic_id] is topic
        assert all(queue.min_offset <= queue.next_offset for queue in topic.queues)
    for group in tables.groups.values():
        assert {topic_id for topic_id, _ in group.leases} <= tables.topics_by_id.keys()
        assert {topic_id for _, topic_id, _ in group.offsets} <= tables.topics_by_id.keys()
    assert {topic_id for _, topic_id, _ in tables.windows} <= tables.topics_by_id.keys()
