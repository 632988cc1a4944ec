"""The consumer's core against brokers in memory: who reads what, from where, what is committed, and what may go wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.reading_cluster import Member, ReadingBroker, ReadingCluster
from tests.unit.stored import stored_batch
from zrmq.client import reading
from zrmq.client.cursor import Cursor
from zrmq.client.process_queue import Unit
from zrmq.client.reading import Bounds
from zrmq.errors import (
    Code,
    FencedError,
    InvalidArgumentError,
    RequestRefusedError,
    StoppingError,
    SubscriptionMismatchError,
    UnreachableError,
    ZrmqError,
)
from zrmq.message import ConsumeFrom, MessageModel, MessageQueue
from zrmq.protocol.requests import (
    AcquireLease,
    CommitOffsets,
    JoinGroup,
    Leased,
    Offsets,
    Pull,
    Pulled,
    PullStatus,
    QueryCommitted,
    QueryOffsets,
    QuerySubscriptions,
    ReleaseLease,
    encode,
)

Q0, Q1 = MessageQueue("meters", "broker-a", 0), MessageQueue("meters", "broker-a", 1)
EARLIEST = {"consume_from": ConsumeFrom.EARLIEST}


@pytest.fixture
def cluster() -> ReadingCluster:
    """One broker with the topic `meters` in two queues."""
    made = ReadingCluster()
    made.add_topic()
    return made


def wait_for_messages(cluster: ReadingCluster, *members: Member) -> None:
    cluster.run_until(lambda: any(member.inbox._ready.items for member in members))  # type: ignore[attr-defined]


def offsets_seen(member: Member, queue: MessageQueue = Q0) -> list[int]:
    return [message.queue_offset for message in member.seen if message.queue == queue]


# --- reading ------------------------------------------------------------------------------------------------------------


def test_a_lone_member_reads_every_queue(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.broker.store("meters", 1, 2)
    wait_for_messages(cluster, member)
    cluster.run_for(5)
    member.take_all()
    assert offsets_seen(member, Q0) == [0, 1, 2]
    assert offsets_seen(member, Q1) == [0, 1]


def test_a_pull_always_waits_at_the_broker(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_for(100_000)
    assert {(request.topic, request.queue_id) for _, request in cluster.broker.held} == {("meters", 0), ("meters", 1)}
    sent_ms = cluster.network.now_ms
    cluster.broker.store("meters", 1, 1)
    wait_for_messages(cluster, member)
    assert cluster.network.now_ms - sent_ms < 1.0


def test_the_next_pull_does_not_wait_for_the_caller(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 1)
    member = cluster.started("one", **EARLIEST)
    cluster.run_for(5)
    for _ in range(5):
        cluster.broker.store("meters", 0, 1)
        cluster.run_for(2)
    assert member.reading(Q0).pull_offset == 6, "all of it is here, and nobody has taken any"


def test_only_wanted_tags_come(cluster: ReadingCluster) -> None:
    member = cluster.started("one", filters={"meters": "hall || kitchen"})
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3, tags=["hall", None, "kitchen"])
    wait_for_messages(cluster, member)
    member.take_all()
    assert offsets_seen(member) == [0, 2]
    assert all(pull.tag_mask for pull in cluster.broker.asked(Pull))


# --- committing ---------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_committed_within_the_interval(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    unit = member.take()
    cluster.run_for(3_000)
    assert cluster.broker.committed("reports", "meters", 0) is None
    assert unit is not None
    member.inbox.done(unit)
    cluster.run_for(1_100)
    assert cluster.broker.committed("reports", "meters", 0) == 3


def test_nothing_new_is_not_committed_again(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(10_000)
    assert len(cluster.broker.asked(CommitOffsets)) == 1
    assert len(member.seen) == 3


def test_closing_commits_and_gives_everything_back(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 4)
    cluster.run_for(5)
    member.close()
    assert cluster.broker.committed("reports", "meters", 1) == 4
    assert cluster.broker.leases == {}
    assert not cluster.broker.members["reports"]


def test_the_group_goes_on_where_it_was(cluster: ReadingCluster) -> None:
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 4)
    cluster.run_for(5)
    first.close()
    cluster.broker.store("meters", 0, 2)
    second = cluster.started("two", eager=1.0)
    cluster.run_for(50)
    assert offsets_seen(second) == [4, 5]


def test_manual_commits_happen_when_asked(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0, auto_commit=False)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(5_000)
    assert cluster.broker.asked(CommitOffsets) == []
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 1_000)
    cluster.run_until(lambda: answers == [None])
    assert cluster.broker.committed("reports", "meters", 0) == 3
    member.core.commit(answers.append, 1_000)
    assert answers == [None, None]


def test_a_commit_that_nobody_answers_fails(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0, auto_commit=False)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(100)
    cluster.network.cut("one", "broker-a")
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 1_000)
    cluster.run_for(1_500)
    assert [type(answer).__name__ for answer in answers] == ["RequestTimeoutError"]


# --- where a group begins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("consume_from", "first"), [(ConsumeFrom.LATEST, 3), (ConsumeFrom.EARLIEST, 0)])
def test_where_a_group_begins(cluster: ReadingCluster, consume_from: ConsumeFrom, first: int) -> None:
    cluster.broker.store("meters", 0, 3)
    member = cluster.started("one", eager=1.0, consume_from=consume_from)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(10)
    assert offsets_seen(member) == list(range(first, 6))


def test_a_group_begins_at_a_time(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(1_000)
    at_ms = member_clock_ms(cluster)
    cluster.broker.store("meters", 0, 3)
    member = cluster.started("one", eager=1.0, consume_from=ConsumeFrom.TIMESTAMP, consume_timestamp_ms=at_ms)
    cluster.run_for(50)
    assert offsets_seen(member) == [3, 4, 5]


def member_clock_ms(cluster: ReadingCluster) -> int:
    assert cluster.broker.loop is not None
    return cluster.broker.loop.clock.time_ms()


def test_started_means_that_nothing_stored_from_now_on_is_missed(cluster: ReadingCluster) -> None:
    member = cluster.member("one", eager=1.0)
    cluster.run_until(lambda: member.started_ms is not None)
    cluster.broker.store("meters", 0, 1)  # before the lease is there
    cluster.run_for(50)
    assert offsets_seen(member) == [0]


def test_started_means_that_the_brokers_have_the_subscription_on_their_disks(cluster: ReadingCluster) -> None:
    """They answer then; that others join meanwhile they tell at once."""
    broker = cluster.broker
    join = broker._do_JoinGroup
    answers: list[tuple[Any, Any]] = []

    def answer_when_flushed(session: Any, request: JoinGroup) -> None:
        answers.append((session, join(session, request)))

    broker._do_JoinGroup = answer_when_flushed  # type: ignore[assignment, method-assign]
    members = [cluster.member(name) for name in ("one", "two")]
    cluster.run_for(1_000)
    assert len(answers) == 2
    assert [member.started_ms for member in members] == [None, None]
    for session, reply in answers:
        broker.endpoint.send(session.peer, [encode(reply)])
    cluster.run_until(lambda: all(member.started_ms is not None for member in members))
    cluster.run_for(1_000)
    assert sorted(queue for member in members for queue in member.queues) == [Q0, Q1]


def test_a_broker_that_is_new_to_the_group_begins_when_the_group_did() -> None:
    cluster = ReadingCluster(brokers=2)
    old, new = cluster.brokers
    old.add_topic("meters", 1)
    new.crash()
    cluster.run_for(12_000)
    cluster.started("one").close()
    cluster.run_for(1_000)
    new.start()
    new.add_topic("meters", 1)
    cluster.run_for(1_000)
    new.store("meters", 0, 3)  # the group subscribed before this, at the other broker
    cluster.run_for(1_000)
    member = cluster.started("two", eager=1.0)
    cluster.run_for(100)
    assert offsets_seen(member, MessageQueue("meters", "broker-b", 0)) == [0, 1, 2]
    assert len(old.asked(QuerySubscriptions, "two")) == len(new.asked(QuerySubscriptions, "two")) == 1


def test_a_broker_that_appears_is_joined_with_the_same_time() -> None:
    cluster = ReadingCluster(brokers=2)
    old, new = cluster.brokers
    old.add_topic("meters", 1)
    new.crash()
    cluster.run_for(12_000)
    member = cluster.started("one", eager=1.0)
    cluster.run_for(5_000)
    new.start()
    new.add_topic("meters", 1)
    new.store("meters", 0, 3)
    cluster.run_until(lambda: len(member.queues) == 2)
    cluster.run_for(100)
    assert offsets_seen(member, MessageQueue("meters", "broker-b", 0)) == [0, 1, 2]
    assert new.groups["reports"].since_ms == old.groups["reports"].since_ms


def test_a_new_group_has_one_time_at_all_brokers() -> None:
    cluster = ReadingCluster(brokers=3)
    cluster.add_topic()
    cluster.started("one")
    assert len({broker.groups["reports"].since_ms["", "meters"] for broker in cluster.brokers}) == 1


def test_each_topic_has_a_time_of_its_own() -> None:
    cluster = ReadingCluster(brokers=2)
    old, new = cluster.brokers
    for broker in cluster.brokers:
        broker.add_topic("meters", 1)
        broker.add_topic("alarms", 1)
    new.crash()
    cluster.run_for(12_000)
    cluster.started("one").close()
    cluster.run_for(1_000)
    new.start()
    cluster.run_for(1_000)
    for topic in ("meters", "alarms"):
        new.store(topic, 0, 3)
    cluster.run_for(1_000)
    member = cluster.started("two", eager=1.0, filters={"meters": "*", "alarms": "*"})
    cluster.run_for(100)
    assert offsets_seen(member, MessageQueue("meters", "broker-b", 0)) == [0, 1, 2], "subscribed to before they were stored"
    assert offsets_seen(member, MessageQueue("alarms", "broker-b", 0)) == [], "and to this one after"
    since = old.groups["reports"].since_ms
    assert new.groups["reports"].since_ms == since
    assert since["", "meters"] < since["", "alarms"]


def test_a_time_is_learned_from_every_broker_that_knows_one() -> None:
    cluster = ReadingCluster(brokers=3)
    cluster.add_topic()
    cluster.add_topic("alarms")
    first, second, third = cluster.brokers
    first.groups["reports"].since_ms["", "meters"] = 5
    second.groups["reports"].since_ms["", "meters"] = 7
    second.groups["reports"].since_ms["", "alarms"] = 6
    cluster.started("one", filters={"meters": "*", "alarms": "*"})
    assert third.groups["reports"].since_ms == {("", "alarms"): 6, ("", "meters"): 5}
    assert first.groups["reports"].since_ms == {("", "alarms"): 6, ("", "meters"): 5}


def test_a_broadcasting_instance_begins_everywhere_when_it_first_began_somewhere() -> None:
    cluster = ReadingCluster(brokers=2)
    new = cluster.brokers[1]
    for broker in cluster.brokers:
        broker.add_topic("meters", 1)
    new.crash()
    cluster.run_for(12_000)
    cluster.started("one", instance_name="host-1", message_model=MessageModel.BROADCASTING).close()
    cluster.run_for(1_000)
    new.start()
    cluster.run_for(1_000)
    new.store("meters", 0, 3)
    cluster.run_for(1_000)
    back = cluster.started("two", eager=1.0, instance_name="host-1", message_model=MessageModel.BROADCASTING)
    other = cluster.started("three", eager=1.0, instance_name="host-2", message_model=MessageModel.BROADCASTING)
    cluster.run_for(100)
    assert offsets_seen(back, MessageQueue("meters", "broker-b", 0)) == [0, 1, 2]
    assert offsets_seen(other, MessageQueue("meters", "broker-b", 0)) == [], "another instance begins when it begins"


def test_a_broker_nobody_reaches_does_not_hold_the_others_up_for_ever() -> None:
    cluster = ReadingCluster(brokers=2)
    cluster.add_topic()
    cluster.network.cut("one", "broker-b")
    member = cluster.member("one")
    cluster.run_for(3_500)
    assert [queue.broker_name for queue in member.queues] == ["broker-a", "broker-a"]


def test_subscribing_creates_the_topic() -> None:
    cluster = ReadingCluster(brokers=2)
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: len(member.queues) == 8)
    cluster.brokers[1].store("meters", 3, 1)
    cluster.run_for(10)
    assert len(member.seen) == 1


def test_a_topic_that_may_not_be_created_is_waited_for() -> None:
    cluster = ReadingCluster(auto_create=False)
    member = cluster.started("one", eager=1.0)
    cluster.run_for(20_000)
    assert member.queues == []
    cluster.broker.add_topic("meters", 1)
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(2_000)
    assert offsets_seen(member) == [0, 1]


# --- sharing ------------------------------------------------------------------------------------------------------------


def test_a_second_member_gets_its_share_at_once(cluster: ReadingCluster) -> None:
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 5)
    cluster.run_for(10)
    second = cluster.member("two", eager=1.0)
    cluster.run_until(lambda: bool(cluster.broker.asked(JoinGroup, "two")))
    joined_ms = cluster.network.now_ms
    cluster.run_until(lambda: (first.queues, second.queues) == ([Q0], [Q1]))
    assert cluster.network.now_ms - joined_ms < 10
    cluster.broker.store("meters", 0, 1)
    cluster.broker.store("meters", 1, 1)
    cluster.run_for(10)
    assert (offsets_seen(first, Q0), offsets_seen(first, Q1)) == ([0], [0, 1, 2, 3, 4])
    assert (offsets_seen(second, Q0), offsets_seen(second, Q1)) == ([], [5])


def test_what_is_in_flight_is_finished_before_the_queue_goes(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 5)
    wait_for_messages(cluster, first)
    unit = first.take(2)
    assert unit is not None
    second = cluster.started("two", eager=1.0)
    cluster.run_for(20_000)
    assert (first.queues, second.queues) == ([Q0, Q1], [])
    assert first.take() is None, "nothing more of a queue that somebody waits for"
    first.inbox.done(unit)
    cluster.run_for(10)
    assert (first.queues, second.queues) == ([Q0], [Q1])
    assert offsets_seen(second, Q1) == [2, 3, 4]


def test_a_queue_is_given_up_when_its_messages_never_come_to_an_end(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 5)
    wait_for_messages(cluster, first)
    unit = first.take(2)
    second = cluster.started("two", eager=1.0)
    cluster.run_for(59_000)
    assert second.queues == []
    cluster.run_for(20_000)
    assert second.queues == [Q1]
    assert offsets_seen(second, Q1) == [0, 1, 2, 3, 4]
    assert unit is not None
    first.inbox.done(unit)
    cluster.run_for(5_000)
    assert cluster.broker.committed("reports", "meters", 1) == 5


def test_a_member_that_leaves_makes_room_at_once(cluster: ReadingCluster) -> None:
    first, second = cluster.started("one", eager=1.0), cluster.started("two", eager=1.0)
    cluster.run_until(lambda: (first.queues, second.queues) == ([Q0], [Q1]))
    left_ms = cluster.network.now_ms
    first.close()
    cluster.run_until(lambda: second.queues == [Q0, Q1])
    assert cluster.network.now_ms - left_ms < 20


def test_a_member_that_dies_makes_room_after_the_session_timeout(cluster: ReadingCluster) -> None:
    first, second = cluster.started("one", eager=1.0), cluster.started("two", eager=1.0)
    cluster.run_until(lambda: (first.queues, second.queues) == ([Q0], [Q1]))
    died_ms = cluster.network.now_ms
    first.crash()
    cluster.run_until(lambda: second.queues == [Q0, Q1])
    assert 8_000 < cluster.network.now_ms - died_ms < 11_000


def test_a_member_is_believed_in_when_every_broker_knows_it() -> None:
    cluster = ReadingCluster(brokers=2)
    cluster.add_topic(queue_count=1)
    first = cluster.started("one")
    cluster.run_until(lambda: len(first.queues) == 2)
    cluster.network.cut("two", "broker-b")
    second = cluster.member("two")
    cluster.run_for(8_000)
    assert len(first.queues) == 2
    assert second.queues == []
    cluster.network.heal("two", "broker-b")
    cluster.run_until(lambda: len(first.queues) == len(second.queues) == 1)


def test_a_queue_whose_lease_would_be_in_doubt_is_not_claimed(cluster: ReadingCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LEASE_MARGIN", 0.0)
    member = cluster.member("one", eager=1.0)
    cluster.run_for(3_000)
    assert cluster.broker.asked(AcquireLease) == []
    monkeypatch.undo()
    cluster.run_until(lambda: member.queues == [Q0, Q1], 1_100)
    assert len(cluster.broker.asked(AcquireLease)) == 2


def test_a_lost_notice_is_noticed(cluster: ReadingCluster) -> None:
    first = cluster.started("one", eager=1.0)
    cluster.broker.loses_notices = True
    second = cluster.started("two", eager=1.0)
    cluster.run_for(2)
    assert (first.queues, second.queues) == ([Q0, Q1], [])
    cluster.run_for(2_000)  # a heartbeat later
    assert (first.queues, second.queues) == ([Q0], [Q1])
    cluster.broker.requests.clear()
    cluster.run_for(5_000)
    assert cluster.broker.asked(JoinGroup) == [], "who knows the version has nothing to ask"


def test_a_lease_that_is_not_wanted_any_more_is_released(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 1)
    wait_for_messages(cluster, first)
    unit = first.take()
    second = cluster.started("two")
    cluster.run_for(10)
    third = cluster.started("three")  # sorted: one, three, two; two queues, so the last one has none
    cluster.run_for(10)
    assert unit is not None
    first.inbox.done(unit)
    cluster.run_for(500)
    assert (first.queues, third.queues, second.queues) == ([Q0], [Q1], [])
    assert len(cluster.broker.asked(ReleaseLease, "two")) == 1


def test_a_strategy_that_fails_is_told_to_the_caller(cluster: ReadingCluster) -> None:
    def broken(*_: Any) -> list[MessageQueue]:
        raise KeyError("room")

    member = cluster.started("one", allocation=broken)
    assert isinstance(member.inbox.failure, InvalidArgumentError)
    assert "strategy broken failed with KeyError('room')" in member.inbox.failure.message


# --- refusals of the group ----------------------------------------------------------------------------------------------


def test_a_member_that_subscribes_otherwise_is_refused(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    second = cluster.started("two", filters={"meters": "hall"})
    assert isinstance(second.inbox.failure, SubscriptionMismatchError)
    assert "{'meters': '*'}" in second.inbox.failure.message
    assert "{'meters': 'hall'}" in second.inbox.failure.message
    assert second.take() is None
    cluster.run_for(20_000)
    assert (first.queues, second.queues) == ([Q0, Q1], [])


def test_a_second_instance_of_one_name_is_refused_when_it_cannot_be_a_ghost(cluster: ReadingCluster) -> None:
    cluster.started("one", message_model=MessageModel.BROADCASTING, instance_name="hall")
    second = cluster.member("two", message_model=MessageModel.BROADCASTING, instance_name="hall")
    cluster.run_for(19_000)  # the session timeout, and what a message of a former life may be late
    assert second.inbox.failure is None
    cluster.run_for(4_000)
    assert isinstance(second.inbox.failure, RequestRefusedError)
    assert second.inbox.failure.code is Code.INSTANCE_NAME_TAKEN


def test_a_name_may_be_a_ghosts_again_at_a_broker_that_was_away(cluster: ReadingCluster) -> None:
    refuse_kind(cluster.broker, JoinGroup, RequestRefusedError("Taken.", code=Code.INSTANCE_NAME_TAKEN))
    member = cluster.member("one", message_model=MessageModel.BROADCASTING, instance_name="hall")
    cluster.run_for(5_000)
    cluster.broker.crash()
    cluster.run_for(30_000)
    cluster.broker.start()
    cluster.run_for(15_000)
    assert member.inbox.failure is None
    cluster.run_for(10_000)
    assert isinstance(member.inbox.failure, RequestRefusedError)


def test_an_instance_comes_back_after_its_former_life_was_killed(cluster: ReadingCluster) -> None:
    first = cluster.started("one", message_model=MessageModel.BROADCASTING, instance_name="hall", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(2_000)
    first.crash()
    second = cluster.member("two", message_model=MessageModel.BROADCASTING, instance_name="hall", eager=1.0)
    cluster.run_until(lambda: second.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(10)
    assert offsets_seen(second) == [3]


@pytest.mark.parametrize("code", [Code.NOT_READY, Code.STOPPING, Code.TOO_MANY_REQUESTS, Code.DISK_FULL])
def test_refusals_that_pass_are_waited_out(cluster: ReadingCluster, code: Code) -> None:
    refuse_kind(cluster.broker, JoinGroup, RequestRefusedError("Not now.", code=code))
    member = cluster.member("one")
    cluster.run_for(5_000)
    assert member.inbox.failure is None
    cluster.broker.refuse = lambda session, request: None
    cluster.run_until(lambda: member.queues == [Q0, Q1])


def test_a_broker_that_appears_while_the_only_one_refuses_keeps_nobody_from_joining() -> None:
    cluster = ReadingCluster(brokers=2)
    cluster.add_topic()
    old, new = cluster.brokers
    new.crash()
    cluster.run_for(12_000)
    refuse_kind(old, JoinGroup, RequestRefusedError("Not now.", code=Code.NOT_READY))
    member = cluster.member("one")
    cluster.run_for(500)
    new.start()
    cluster.run_for(3_000)
    old.refuse = lambda session, request: None
    cluster.run_until(lambda: member.started_ms is not None)
    assert {queue.broker_name for queue in member.queues} == {"broker-a", "broker-b"}


def test_a_refusal_that_does_not_pass_is_told(cluster: ReadingCluster) -> None:
    refuse_kind(cluster.broker, JoinGroup, RequestRefusedError("Nobody may.", code=Code.FORBIDDEN))
    assert str(cluster.started("one").inbox.failure) == "Nobody may. [40300 FORBIDDEN]"


def test_a_lease_stays_in_doubt_while_its_broker_shuts_down(cluster: ReadingCluster) -> None:
    """It is refused then, and given back when the broker is there again and another member is to have it."""
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.crash()
    cluster.run_until(lambda: first.queues == [])
    refuse_kind(cluster.broker, AcquireLease, StoppingError("Not now."))
    cluster.broker.start()
    cluster.run_for(2_000)
    second = cluster.member("two")
    cluster.run_for(2_000)
    cluster.broker.refuse = lambda session, request: None
    cluster.run_until(lambda: len(first.queues) == len(second.queues) == 1)


def refused_by_one_of_two(cluster: ReadingCluster) -> tuple[Member, Member]:
    """Two members; the second broker has been started again, and a member of the next release was there first."""
    cluster.add_topic()
    first, second = cluster.started("one"), cluster.started("two", eager=50.0)
    cluster.run_for(2_000)
    cluster.brokers[0].store("meters", 0, 3)
    cluster.run_for(10)
    cluster.brokers[1].crash()
    cluster.run_for(300)
    other = SubscriptionMismatchError("They read otherwise.")
    cluster.brokers[1].refuse = lambda session, request: (
        other if isinstance(request, JoinGroup) and session.client_id == "one" else None
    )
    cluster.brokers[1].start()
    return first, second


def test_who_is_refused_leaves_its_queues_to_others() -> None:
    cluster = ReadingCluster(2)
    first, second = refused_by_one_of_two(cluster)
    cluster.run_until(lambda: len(second.queues) == 4)
    assert isinstance(first.inbox.failure, SubscriptionMismatchError)
    assert first.queues == []
    first.close()


def test_who_is_refused_finishes_first_what_callers_have() -> None:
    cluster = ReadingCluster(2)
    first, second = refused_by_one_of_two(cluster)
    unit = first.take()
    assert unit is not None
    cluster.run_for(20_000)
    assert len(second.queues) == 2, "its queues are still at work"
    first.inbox.done(unit)
    cluster.run_until(lambda: len(second.queues) == 4)
    cluster.run_for(1_000)
    assert offsets_seen(second) == [], "what was finished was committed before"


def refuse_kind(broker: ReadingBroker, kind: type[Any], error: ZrmqError) -> None:
    broker.refuse = lambda session, request: error if isinstance(request, kind) else None


# --- leases -------------------------------------------------------------------------------------------------------------


def test_a_fenced_pull_drops_the_queue_and_claims_it_again(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    unit = member.take(1)
    assert unit is not None
    cluster.broker.leases["reports", "meters", 0] = ("stranger", 99)
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(10)
    assert member.queues == [Q1]
    assert member.take() is None, "what was buffered is nobody's"
    member.inbox.done(unit)
    cluster.run_for(3_000)
    assert cluster.broker.committed("reports", "meters", 0) is None, "what was in flight is not committed"
    cluster.broker._end_lease(("reports", "meters", 0))
    cluster.run_for(10)
    assert member.queues == [Q0, Q1]
    member.take_all()
    assert offsets_seen(member) == [0, 0, 1, 2, 3]


def test_a_fenced_commit_drops_the_queue(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.broker.store("meters", 1, 3)
    cluster.run_for(5)
    cluster.broker.leases["reports", "meters", 0] = ("stranger", 99)
    cluster.run_for(1_500)
    assert member.queues == [Q1]
    assert cluster.broker.committed("reports", "meters", 1) == 3


def test_a_lease_nobody_confirms_ends_on_this_side_first(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    cluster.network.cut("one", "broker-a")
    cut_ms = cluster.network.now_ms
    cluster.run_for(6_000)
    assert member.take(1) is not None, "short silences do no harm"
    cluster.run_until(lambda: member.queues == [])
    assert cluster.network.now_ms - cut_ms < 8_600
    assert member.take() is None
    assert cluster.broker.holder("reports", "meters", 0) == "one", "the broker still keeps the lease for it"


def test_what_is_buffered_is_checked_when_it_is_handed_out(cluster: ReadingCluster) -> None:
    """A process that stood still wakes up with messages in its hands: its callers may run before its loop does."""
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    member.loop.pause()
    cluster.run_for(60_000)
    assert member.take() is None
    member.loop.resume()
    cluster.run_for(3_000)
    member.take_all()
    assert offsets_seen(member) == [0, 1, 2]


def test_a_connection_that_breaks_and_heals_loses_nothing(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    for _ in range(5):
        cluster.broker.store("meters", 0, 2)
        cluster.network.break_connections("one", "broker-a")
        cluster.broker.store("meters", 0, 2)
        cluster.run_for(1_000)
    assert offsets_seen(member) == list(range(20))
    assert cluster.broker.committed("reports", "meters", 0) is not None


def test_a_restarted_broker_finds_its_reader_where_it_was(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(1_100)
    epochs = dict(cluster.broker.leases)
    cluster.broker.crash()
    cluster.run_for(500)
    cluster.broker.start()
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(3_000)
    assert offsets_seen(member) == [0, 1, 2, 3]
    assert cluster.broker.leases == epochs, "it kept its leases over the restart"


def test_who_has_the_same_lease_again_goes_on_where_it_was(cluster: ReadingCluster) -> None:
    """It lost the queue with its broker, before it had committed; nobody else can have read it since."""
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(10)
    assert cluster.broker.committed("reports", "meters", 0) is None
    cluster.broker.crash()
    cluster.run_until(lambda: member.queues == [])
    cluster.broker.start()
    cluster.broker.store("meters", 0, 2)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.run_for(3_000)
    assert offsets_seen(member) == [0, 1, 2, 3]
    assert cluster.broker.committed("reports", "meters", 0) == 4


def test_who_gets_another_lease_begins_where_the_group_stands(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(10)
    cluster.broker.crash()
    cluster.run_until(lambda: member.queues == [])
    cluster.broker.leases.clear()
    cluster.broker.start()
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.run_for(3_000)
    assert offsets_seen(member) == [0, 1, 0, 1]


def test_what_another_member_is_to_have_is_given_back_with_what_was_finished(cluster: ReadingCluster) -> None:
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 2)
    cluster.run_for(10)
    cluster.broker.crash()
    cluster.run_until(lambda: first.queues == [])
    refuse_kind(cluster.broker, JoinGroup, StoppingError("Not now."))
    cluster.broker.start()
    second = cluster.member("two", eager=1.0)
    cluster.run_for(10)
    cluster.broker.refuse = lambda session, request: None
    cluster.run_until(lambda: (first.queues, second.queues) == ([Q0], [Q1]))
    cluster.run_for(3_000)
    assert offsets_seen(first, Q1) + offsets_seen(second, Q1) == [0, 1]


def lost_with_a_unit_in_hand(cluster: ReadingCluster) -> tuple[Member, Unit]:
    """A member whose broker was away until it lost its queues, and what its caller still has of queue 1."""
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 2)
    cluster.run_for(10)
    unit = member.take()
    assert unit is not None
    cluster.broker.crash()
    cluster.run_until(lambda: member.queues == [])
    cluster.broker.start()
    return member, unit


def test_what_callers_have_in_hand_is_finished_before_another_member_gets_the_queue(cluster: ReadingCluster) -> None:
    """Also when its broker was away meanwhile, so that the queue was lost: the lease lives on."""
    first, unit = lost_with_a_unit_in_hand(cluster)
    second = cluster.member("two")
    cluster.run_for(20_000)
    assert (first.queues, second.queues) == ([Q0], [])
    first.inbox.done(unit)
    cluster.run_until(lambda: second.queues == [Q1])


def test_a_queue_is_not_waited_for_without_end_when_a_caller_hangs(cluster: ReadingCluster) -> None:
    lost_with_a_unit_in_hand(cluster)
    second = cluster.member("two")
    cluster.run_until(lambda: second.queues == [Q1], limit_ms=70_000)


def lose_the_end(cluster: ReadingCluster, *, refill: int) -> None:
    """Power off and on: queue 0 loses what lies behind its first batch, and its offsets are given to other messages."""
    cluster.broker.crash()
    log = cluster.broker.topics["meters"][0]
    del log.batches[1:]
    log.next_offset = log.batches[0][1]
    cluster.broker.start()
    cluster.broker.store("meters", 0, refill)


@pytest.mark.parametrize("model", list(MessageModel))
def test_messages_at_offsets_given_anew_are_not_passed_over(cluster: ReadingCluster, model: MessageModel) -> None:
    cluster.broker.unflushed.add("meters")
    member = cluster.started("one", eager=1.0, message_model=model, instance_name="hall")
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(1_500)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(100)
    lose_the_end(cluster, refill=10)
    cluster.run_for(5_000)
    assert offsets_seen(member) == [*range(8), *range(3, 13)]
    assert cluster.broker.committed("reports", "meters", 0, "" if model is MessageModel.CLUSTERING else "hall") == 13


def test_a_place_that_was_not_committed_is_not_gone_back_to_when_what_lies_before_it_may_be_lost(cluster: ReadingCluster) -> None:
    cluster.broker.unflushed.add("meters")
    member = cluster.started("one", eager=1.0, message_model=MessageModel.BROADCASTING, instance_name="hall")
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(1_500)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(100)
    member.core.seek(Q0, 6)
    member.seen.clear()
    lose_the_end(cluster, refill=10)
    cluster.run_for(5_000)
    assert offsets_seen(member) == list(range(3, 13))


def test_a_commit_of_what_a_broker_lost_is_not_sent_again(cluster: ReadingCluster) -> None:
    cluster.broker.unflushed.add("meters")
    member = cluster.started("one", eager=1.0, auto_commit=False)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(10)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(10)
    cluster.broker._do_CommitOffsets = lambda session, request: None  # type: ignore[method-assign,assignment,return-value]
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 10_000)
    cluster.run_for(10)
    del cluster.broker._do_CommitOffsets
    lose_the_end(cluster, refill=10)
    cluster.run_for(5_000)
    assert [type(answer) for answer in answers] == [UnreachableError]
    assert "commit again" in str(answers[0])
    assert cluster.broker.committed("reports", "meters", 0) is None


def taken(cluster: ReadingCluster, messages_max: int = 3) -> tuple[Member, Cursor, Unit]:
    """A member that commits by itself, and a unit that it has got."""
    member = cluster.started("one", auto_commit=False)
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    unit = member.take(messages_max)
    assert unit is not None
    return member, Cursor(member.inbox), unit


def commit_given(cluster: ReadingCluster, member: Member, cursor: Cursor) -> ZrmqError | None:
    """As `PullConsumer.commit` does."""
    answers: list[ZrmqError | None] = []
    given = cursor.unfinished()
    cursor.finish_given()
    member.core.commit(answers.append, 10_000, given)
    cluster.run_until(lambda: bool(answers))
    return answers[0]


@pytest.mark.parametrize("iterates", [False, True], ids=["polled", "iterated"])
def test_a_commit_of_what_was_given_of_a_lost_queue_says_so_once(cluster: ReadingCluster, iterates: bool) -> None:
    member, cursor, unit = taken(cluster, 2)
    if iterates:
        cursor.enter_unit(unit)
        cursor.index, _ = next(cursor.rest)
    else:
        cursor.give([unit])
    cluster.broker.crash()
    cluster.run_until(lambda: not member.queues)
    error = commit_given(cluster, member, cursor)
    assert isinstance(error, FencedError)
    assert error.facts["queue_id"] == unit.process_queue.queue.queue_id
    assert commit_given(cluster, member, cursor) is None


def test_a_commit_whose_queue_is_lost_at_that_moment_says_so(cluster: ReadingCluster) -> None:
    member, cursor, unit = taken(cluster)
    cursor.give([unit])
    given = cursor.unfinished()
    cursor.finish_given()
    cluster.broker.crash()
    cluster.run_until(lambda: not member.queues)
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 10_000, given)
    assert [type(answer) for answer in answers] == [FencedError]


def test_what_was_committed_before_its_queue_was_lost_is_no_loss(cluster: ReadingCluster) -> None:
    member, cursor, unit = taken(cluster)
    cursor.enter_unit(unit)
    assert [message.queue_offset for cursor.index, message in cursor.rest] == [0, 1, 2]
    assert commit_given(cluster, member, cursor) is None
    cluster.broker.crash()
    cluster.run_until(lambda: not member.queues)
    assert commit_given(cluster, member, cursor) is None


def test_a_broker_that_leaves_during_a_commit_closes_nothing(cluster: ReadingCluster) -> None:
    """The consumer is not closed, so its caller is not to be told that something is."""
    member = cluster.started("one", eager=1.0, auto_commit=False)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(10)
    cluster.broker._do_CommitOffsets = lambda session, request: None  # type: ignore[method-assign,assignment,return-value]
    answers: list[Any] = []
    member.core.commit(answers.append, 10_000)
    member.core.ask("broker-a", QueryCommitted, "meters", timeout_ms=10_000, on_reply=lambda reply, _: answers.append(reply))
    link = member.instance.link("broker-a")
    assert link is not None
    link.close()
    cluster.run_until(lambda: len(answers) == 2)
    assert [type(answer) for answer in answers] == [UnreachableError, UnreachableError]


def test_a_release_under_way_over_a_restart_commits_nothing(cluster: ReadingCluster) -> None:
    cluster.broker.unflushed.add("meters")
    first = cluster.started("one", eager=1.0)
    cluster.broker.store("meters", 1, 3)
    cluster.run_for(10)
    cluster.broker._do_ReleaseLease = lambda session, request: None  # type: ignore[method-assign,assignment,return-value]
    second = cluster.started("two", eager=1.0)
    cluster.run_for(10)
    del cluster.broker._do_ReleaseLease
    cluster.broker.crash()
    cluster.broker.start()
    cluster.run_for(5_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])
    assert [release.offset for release in cluster.broker.asked(ReleaseLease)][:2] == [3, -1]
    assert offsets_seen(first, Q1) + offsets_seen(second, Q1) == [0, 1, 2] * 2


@pytest.mark.parametrize("is_flushed", [True, False])
def test_what_was_read_before_its_flush_is_doubted_whatever_its_topic_is_now(cluster: ReadingCluster, is_flushed: bool) -> None:
    broker = cluster.broker
    broker.unflushed |= set() if is_flushed else {"meters"}
    member = cluster.started("one", eager=1.0, auto_commit=False)
    broker.store("meters", 0, 3)
    cluster.run_for(10)
    broker.crash()
    broker.unflushed.clear()
    broker.start()
    cluster.run_for(1_000)
    assert offsets_seen(member) == [*range(3)] if is_flushed else [*range(3), *range(3)]
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 10_000)
    cluster.run_until(lambda: bool(answers))
    assert broker.committed("reports", "meters", 0) == 3


def test_what_was_read_and_flushed_later_is_not_doubted(cluster: ReadingCluster) -> None:
    broker = cluster.broker
    broker.unflushed.add("meters")
    member = cluster.started("one", eager=1.0, auto_commit=False)
    broker.store("meters", 0, 3)
    cluster.run_for(10)
    broker.unflushed.clear()
    broker.store("meters", 0, 1)
    cluster.run_for(10)
    broker.crash()
    broker.start()
    broker.store("meters", 0, 1)
    cluster.run_for(1_000)
    assert offsets_seen(member) == [*range(5)]


WAYS: list[dict[str, Any]] = [
    {}, {"message_model": MessageModel.BROADCASTING, "instance_name": "hall"}, {"group": ""}, {"assigned": True},
]


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=["clustering", "broadcasting", "no group", "assigned"])
def test_a_topic_made_anew_is_read_from_its_beginning(cluster: ReadingCluster, way: dict[str, Any], is_told: bool) -> None:
    """`is_told`: that it was deleted; else it is there again when the connection is."""
    broker = cluster.broker
    broker.auto_create = False
    if way.get("assigned"):
        member = cluster.member("one", eager=1.0, is_assigned=True)
        member.core.assign([Q0, Q1])
    else:
        member = cluster.started("one", eager=1.0, **way)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    broker.store("meters", 0, 5)
    cluster.run_for(1_500)
    if not is_told:
        cluster.network.break_connections("one", "broker-a")
    broker.delete_topic("meters")
    if is_told:
        cluster.run_for(200)
    broker.add_topic("meters")
    broker.store("meters", 0, 3)
    cluster.run_for(200)
    broker.store("meters", 0, 5)
    cluster.run_for(5_000)
    assert offsets_seen(member) == [*range(5), *range(8)]
    committed = broker.committed("reports", "meters", 0, way.get("instance_name", ""))
    assert committed == (None if way.get("group") == "" else 8)


@pytest.mark.parametrize("model", list(MessageModel))
def test_a_queue_that_is_wanted_again_while_it_is_given_back_is_read_on(cluster: ReadingCluster, model: MessageModel) -> None:
    broker = cluster.broker
    broker.auto_create = False
    member = cluster.started("one", message_model=model, instance_name="hall")
    broker.store("meters", 0, 5)
    wait_for_messages(cluster, member)
    units = member.take_all()
    cluster.run_for(100)
    broker.held.clear()  # the route tells first
    broker.delete_topic("meters")
    cluster.run_until(lambda: not member.core.queues())
    broker.add_topic("meters")
    broker.store("meters", 0, 3)
    cluster.run_for(3_000)
    for unit in units:
        member.inbox.done(unit)
    cluster.run_for(3_000)
    assert member.queues == [Q0, Q1]
    assert [message.queue_offset for unit in member.take_all() for message in unit.messages] == [0, 1, 2]


def test_what_is_finished_of_a_former_topic_is_not_committed_in_the_next(cluster: ReadingCluster) -> None:
    broker = cluster.broker
    member = cluster.started("one", eager=1.0, auto_commit=False, message_model=MessageModel.BROADCASTING, instance_name="hall")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    broker.store("meters", 0, 5)
    cluster.run_for(100)
    broker.delete_topic("meters")
    broker.add_topic("meters")
    broker.store("meters", 0, 5)
    answers: list[ZrmqError | None] = []
    member.core.commit(answers.append, 10_000)
    cluster.run_until(lambda: bool(answers))
    assert broker.committed("reports", "meters", 0, "hall") is None


def test_a_topic_made_anew_with_fewer_queues_ends_nobody(cluster: ReadingCluster) -> None:
    """Who does not know the new route yet asks for queues that are not there."""
    broker = cluster.broker
    member = cluster.started("one", eager=1.0, group="")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.network.cut("one", "nameserver")
    broker.delete_topic("meters")
    broker.add_topic("meters", 1)
    broker.store("meters", 0, 3)
    cluster.run_for(5_000)
    assert not member.inbox.is_closed
    cluster.network.heal("one", "nameserver")
    cluster.run_until(lambda: member.queues == [Q0])
    cluster.run_for(100)
    assert offsets_seen(member) == [*range(3)]


def test_the_last_commit_is_not_made_as_somebody_else(cluster: ReadingCluster) -> None:
    """A broadcasting instance that is no member any more would commit for the group instead of itself."""
    member = cluster.started("one", message_model=MessageModel.BROADCASTING, instance_name="hall")
    cluster.broker.store("meters", 0, 3)
    wait_for_messages(cluster, member)
    for unit in member.take_all():
        member.inbox.done(unit)
    ended: list[bool] = []
    cluster.network.cut("one", "broker-a")
    member.core.close(lambda: ended.append(True), 30_000)
    cluster.broker.crash()
    cluster.network.heal("one", "broker-a")
    cluster.broker.start()
    cluster.run_until(lambda: bool(ended))
    assert cluster.broker.committed("reports", "meters", 0) is None


def test_a_broker_that_left_and_came_back_is_read_on(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(2_000)
    cluster.broker.crash()
    cluster.run_for(15_000)
    assert member.queues == []
    cluster.broker.leases.clear()
    cluster.broker.start()
    cluster.broker.store("meters", 0, 1)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.run_for(20)
    assert offsets_seen(member) == [0, 1, 2]


@pytest.mark.parametrize("code", [Code.FORBIDDEN, Code.INTERNAL_ERROR, Code.LEASE_HELD])
def test_a_refused_lease_is_asked_for_again(cluster: ReadingCluster, code: Code) -> None:
    refuse_kind(cluster.broker, AcquireLease, RequestRefusedError("Not now.", code=code))
    member = cluster.started("one")
    cluster.run_for(3_000)
    assert len(cluster.broker.asked(AcquireLease)) < 100, "but not in a tight circle"
    cluster.broker.refuse = lambda session, request: None
    cluster.run_for(1_500)
    assert member.queues == [Q0, Q1]


def test_a_lease_of_unknown_outcome_is_asked_for_until_it_is_known(cluster: ReadingCluster) -> None:
    """The answer may be lost with a lease in it; nobody must hold a queue without reading it."""
    broker = cluster.broker
    grant = broker._do_AcquireLease
    swallowed = []

    def swallow(session: Any, request: AcquireLease) -> Any:
        reply = grant(session, request)
        swallowed.append(reply)
        return None

    broker._do_AcquireLease = swallow  # type: ignore[method-assign]
    member = cluster.started("one")
    cluster.run_for(1_000)
    assert [type(reply) for reply in swallowed] == [Leased, Leased]
    broker._do_AcquireLease = grant  # type: ignore[method-assign]
    cluster.run_for(16_000)
    assert member.queues == [Q0, Q1]


def test_a_release_of_unknown_outcome_is_repeated(cluster: ReadingCluster) -> None:
    broker = cluster.broker
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    release = broker._do_ReleaseLease
    broker._do_ReleaseLease = lambda session, request: None  # type: ignore[method-assign,assignment,return-value]
    second = cluster.started("two", eager=1.0)
    cluster.run_for(1_000)
    assert second.queues == []
    broker._do_ReleaseLease = release  # type: ignore[method-assign]
    cluster.run_for(6_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])


def test_a_lease_that_was_in_doubt_is_released_when_another_is_to_have_the_queue(cluster: ReadingCluster) -> None:
    """Nobody may hold a queue at the broker without reading it: here a member comes back with leases it has dropped itself."""
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 3)
    cluster.run_for(1_500)
    second = cluster.member("two", eager=1.0)
    first.loop.pause()
    cluster.run_for(8_500)
    assert cluster.broker.holder("reports", "meters", 1) == "one"
    first.loop.resume()
    cluster.run_for(1_500)
    assert (first.queues, second.queues) == ([Q0], [Q1])
    assert cluster.broker.holder("reports", "meters", 1) == "two"
    assert offsets_seen(second, Q1) == []


@pytest.mark.parametrize("kind", [AcquireLease, ReleaseLease])
def test_a_lease_request_cut_off_by_its_broker_leaving_is_settled_when_it_is_back(
    cluster: ReadingCluster, kind: type[Any]
) -> None:
    first = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    broker, name = cluster.broker, f"_do_{kind.__name__}"
    serve = getattr(broker, name)
    setattr(broker, name, lambda session, request: None)
    second = cluster.started("two", eager=1.0)
    cluster.run_for(100)
    setattr(broker, name, serve)
    broker.crash()
    cluster.run_for(15_000)
    broker.start()
    cluster.run_for(15_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])
    assert [broker.holder("reports", "meters", queue_id) for queue_id in (0, 1)] == ["one", "two"]


def test_a_lease_granted_as_its_broker_left_is_given_back_if_another_is_to_have_the_queue(cluster: ReadingCluster) -> None:
    """The answer was lost, so this side has never known of the lease."""
    broker, grant = cluster.broker, cluster.broker._do_AcquireLease

    def swallow(session: Any, request: AcquireLease) -> Any:
        return None if grant(session, request) and request.queue_id == 1 else grant(session, request)

    broker._do_AcquireLease = swallow  # type: ignore[method-assign]
    first = cluster.started("one", eager=1.0)
    assert (first.queues, broker.holder("reports", "meters", 1)) == ([Q0], "one")
    broker.crash()
    broker._do_AcquireLease = grant  # type: ignore[method-assign]
    cluster.run_for(15_000)
    second = cluster.member("two", eager=1.0)
    cluster.network.cut("one", "broker-a")
    broker.start()
    cluster.run_for(2_000)  # the other joins first, so the queue is never the first one's again
    cluster.network.heal("one", "broker-a")
    cluster.run_for(7_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])


@pytest.mark.parametrize("kind", [AcquireLease, ReleaseLease])
def test_a_lease_request_refused_by_a_broker_that_does_not_know_itself_is_settled(
    cluster: ReadingCluster, kind: type[Any]
) -> None:
    """The disk refused the flush, but what was written may be there after all when the broker is started again."""
    broker, name = cluster.broker, f"_do_{kind.__name__}"
    serve = getattr(broker, name)

    def serve_and_fail(session: Any, request: Any) -> Any:
        if kind is AcquireLease:
            serve(session, request)
        raise RequestRefusedError("The disk refused to write.", code=Code.STORE_FAILED)

    first = cluster.started("one", eager=1.0) if kind is ReleaseLease else None
    setattr(broker, name, serve_and_fail)
    first = first or cluster.started("one", eager=1.0)
    second = cluster.member("two", eager=1.0)
    cluster.run_for(500)
    assert broker.holder("reports", "meters", 1) == "one"
    setattr(broker, name, serve)
    cluster.run_for(20_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])


def test_a_lease_that_a_full_disk_does_not_take_back_is_offered_again(cluster: ReadingCluster) -> None:
    first = cluster.started("one", eager=1.0)
    refuse_kind(cluster.broker, ReleaseLease, RequestRefusedError("The disk is full.", code=Code.DISK_FULL))
    second = cluster.member("two", eager=1.0)
    cluster.run_for(3_000)
    assert (first.queues, second.queues) == ([Q0], [])
    assert cluster.broker.holder("reports", "meters", 1) == "one"
    cluster.broker.refuse = lambda session, request: None
    cluster.run_for(20_000)
    assert (first.queues, second.queues) == ([Q0], [Q1])


def test_a_rebalance_that_is_due_is_not_put_off(cluster: ReadingCluster) -> None:
    member = assigned(cluster, "one", Q0)
    member.core.assign([Q1])
    member.core.on_unclaimed(5_000.0)
    cluster.run_for(10)
    assert member.queues == [Q1]


@pytest.mark.parametrize("consume_from", [ConsumeFrom.LATEST, ConsumeFrom.EARLIEST])
@pytest.mark.parametrize("config", [{"group": ""}, {"auto_commit": False}], ids=["no group", "a group that stands nowhere"])
def test_what_a_broker_stored_in_place_of_what_it_lost_is_not_passed_over(
    cluster: ReadingCluster, config: dict[str, Any], consume_from: ConsumeFrom
) -> None:
    member = assigned(cluster, "one", Q0, consume_from=consume_from, **config)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(100)
    cluster.broker.flushed_until = 3
    cluster.broker.store("meters", 0, 7)
    cluster.run_for(100)
    assert offsets_seen(member) == list(range(10))
    cluster.broker.crash()
    log = cluster.broker.topics["meters"][0]
    log.batches, log.next_offset = log.batches[:1], 3
    cluster.broker.start()
    cluster.broker.store("meters", 0, 20)  # more than was lost, before the consumer is back
    cluster.broker.flushed_until = None
    member.seen.clear()
    cluster.run_for(10_000)
    assert offsets_seen(member)[-20:] == list(range(3, 23))


@pytest.mark.parametrize("consume_from", [ConsumeFrom.LATEST, ConsumeFrom.EARLIEST])
def test_a_commit_that_the_disk_of_the_broker_lost_is_remembered_by_who_made_it(
    cluster: ReadingCluster, consume_from: ConsumeFrom
) -> None:
    member = assigned(cluster, "one", Q0, consume_from=consume_from)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(2_500)
    cluster.broker.flushed_until = 3
    cluster.broker.store("meters", 0, 2)  # of which the consumer cannot know whether they survive
    cluster.run_for(100)
    assert cluster.broker.committed("reports", "meters", 0) == 3
    cluster.broker.crash()
    cluster.broker.groups["reports"].offsets.clear()
    cluster.broker.start()
    member.seen.clear()
    cluster.run_for(10_000)
    assert offsets_seen(member) == [3, 4]


def test_where_a_reader_began_is_no_safe_place_when_it_was_not_flushed(cluster: ReadingCluster) -> None:
    """It has not got anything yet, so no answer to a pull has told it."""
    cluster.broker.flushed_until = 3
    cluster.broker.store("meters", 0, 10)
    member = assigned(cluster, "one", Q0, group="")
    cluster.run_for(100)
    cluster.broker.crash()
    log = cluster.broker.topics["meters"][0]
    log.batches, log.next_offset = [], 3
    cluster.broker.start()
    cluster.broker.store("meters", 0, 20)
    cluster.broker.flushed_until = None
    cluster.run_for(10_000)
    assert offsets_seen(member) == list(range(3, 23))


def test_a_topic_made_anew_while_its_broker_was_away_is_read_from_its_beginning(cluster: ReadingCluster) -> None:
    cluster.broker.auto_create = False
    member = assigned(cluster, "one", Q0)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(2_500)
    cluster.broker.crash()
    cluster.run_for(40_000)
    cluster.broker.start()
    cluster.broker.delete_topic("meters")
    cluster.broker.add_topic("meters")
    cluster.broker.store("meters", 0, 3)
    member.seen.clear()
    cluster.run_for(10_000)
    assert offsets_seen(member) == [0, 1, 2]


@pytest.mark.parametrize("group", ["", "reports"])
def test_a_topic_made_anew_is_read_from_its_beginning_by_who_named_others_meanwhile(cluster: ReadingCluster, group: str) -> None:
    cluster.broker.auto_create = False
    member = assigned(cluster, "one", Q0, group=group)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(2_500)
    cluster.broker.delete_topic("meters")
    cluster.broker.add_topic("meters")
    cluster.run_until(lambda: Q0 in member.core._claims.pending)
    member.core.assign([Q1])  # by the time it is told where to begin it does not want it
    cluster.run_for(100)
    cluster.broker.store("meters", 0, 3)
    member.seen.clear()
    member.core.assign([Q0, Q1])
    cluster.run_for(1_000)
    assert offsets_seen(member) == [0, 1, 2]


@pytest.mark.parametrize("consume_from", [ConsumeFrom.LATEST, ConsumeFrom.EARLIEST])
def test_a_queue_that_is_assigned_again_is_read_on_without_a_group_too(
    cluster: ReadingCluster, consume_from: ConsumeFrom
) -> None:
    member = assigned(cluster, "one", Q0, consume_from=consume_from, eager=0.0, group="")
    cluster.run_for(10)
    cluster.broker.store("meters", 0, 4)
    wait_for_messages(cluster, member)
    unit = member.take(2)
    assert unit is not None
    member.core.assign([Q1])
    cluster.run_for(10)
    member.core.assign([Q0, Q1])
    cluster.run_for(10)
    member.inbox.done(unit)
    cluster.run_for(100)
    member.take_all()
    assert offsets_seen(member) == [0, 1, 2, 3]


def test_who_has_no_group_commits_nothing(cluster: ReadingCluster) -> None:
    member = assigned(cluster, "one", Q0, group="")
    cluster.broker.store("meters", 0, 4)
    cluster.run_for(100)
    member.core.assign([Q1])
    cluster.run_for(1_000)
    assert (member.queues, cluster.broker.asked(CommitOffsets)) == ([Q1], [])


def test_a_topic_made_anew_with_fewer_queues_is_read_by_those_it_has(cluster: ReadingCluster) -> None:
    cluster.broker.auto_create = False
    member = assigned(cluster, "one", Q0, Q1, group="")
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(100)
    cluster.broker.delete_topic("meters")
    cluster.broker.add_topic("meters", 1)
    cluster.broker.store("meters", 0, 3)
    member.seen.clear()
    cluster.run_for(5_000)
    assert offsets_seen(member) == [0, 1, 2]
    assert not member.inbox.is_closed


# --- what pulls may bring -----------------------------------------------------------------------------------------------


def answer_once(broker: ReadingBroker, queue_id: int, answer: Callable[[Pull], Pulled]) -> None:
    """The next pull of the queue gets this answer; later ones what is there."""
    left = [True]

    def answer_pull(request: Pull) -> tuple[Pulled, list[bytes]] | None:
        if request.queue_id == queue_id and left.pop() if left else False:
            return answer(request), []
        return None

    broker.answer_pull = answer_pull


def test_what_expired_is_passed_over(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    cluster.broker.store("meters", 0, 3)
    member = cluster.started("one", eager=1.0, **EARLIEST)
    log = cluster.broker.topics["meters"][0]
    log.min_offset, log.batches = 3, log.batches[1:]
    cluster.run_for(1_500)
    assert offsets_seen(member) == [3, 4, 5]
    assert cluster.broker.committed("reports", "meters", 0) == 6


def test_a_damaged_batch_is_passed_over_and_counted(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    cluster.broker.store("meters", 0, 3)
    answer_once(cluster.broker, 0, lambda pull: Pulled(pull.number, PullStatus.CORRUPT, 3, 0, 6))
    member = cluster.started("one", eager=1.0, **EARLIEST)
    cluster.run_for(1_500)
    assert offsets_seen(member) == [3, 4, 5]
    assert member.core.reader.corrupt_count == 1
    assert cluster.broker.committed("reports", "meters", 0) == 6


def test_an_offset_beyond_the_queue_goes_back_and_so_does_the_commit(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(1_500)
    assert cluster.broker.committed("reports", "meters", 0) == 6
    log = cluster.broker.topics["meters"][0]
    log.batches.pop()
    log.next_offset = 3  # as a failover may do that loses an unconfirmed tail
    cluster.network.break_connections("one", "broker-a")
    cluster.run_for(2_500)
    assert cluster.broker.committed("reports", "meters", 0) == 3
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(10)
    assert offsets_seen(member)[-1] == 3


def test_what_was_pulled_and_not_finished_is_still_owed_after_a_queue_lost_its_end(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    for _ in range(3):
        cluster.broker.store("meters", 0, 3)
    cluster.run_for(50)  # all of it is here, and nobody has taken any
    log = cluster.broker.topics["meters"][0]
    log.batches.pop()
    log.next_offset = 6
    cluster.network.break_connections("one", "broker-a")
    cluster.run_for(5_000)
    for unit in member.take_all():
        member.inbox.done(unit)
    assert sorted(offsets_seen(member)) == [0, 1, 2, 3, 4, 5]
    cluster.run_for(2_000)
    assert cluster.broker.committed("reports", "meters", 0) == 6


def test_nonsense_from_a_broker_is_not_a_tight_circle(cluster: ReadingCluster) -> None:
    def nonsense(request: Pull) -> tuple[Pulled, list[bytes]]:
        return Pulled(request.number, PullStatus.FOUND, request.offset, 0, 0), [stored_batch(0, 1)]

    cluster.broker.answer_pull = nonsense
    member = cluster.started("one", eager=1.0)
    cluster.run_for(5_000)
    assert len(cluster.broker.asked(Pull)) < 20
    assert member.seen == []


def test_one_pull_brings_message_after_message(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: len(cluster.broker.held) == 2)
    for _ in range(20):
        cluster.broker.store("meters", 0, 1)
        cluster.run_for(10)
    assert offsets_seen(member) == list(range(20))
    assert len(cluster.broker.asked(Pull)) == 2, "one a queue"


def test_a_pull_that_has_brought_something_goes_on_behind_it_on_a_new_connection(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: len(cluster.broker.held) == 2)
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(10)
    cluster.broker.requests.clear()
    cluster.network.break_connections("one", "broker-a")
    cluster.run_for(2_000)
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(10)
    assert offsets_seen(member) == [0, 1, 2, 3]
    assert sorted((pull.queue_id, pull.offset) for pull in cluster.broker.asked(Pull)) == [(0, 3), (1, 0)]


def test_a_pull_that_brings_more_than_was_asked_for_is_given_up(cluster: ReadingCluster) -> None:
    """A broker that goes on and on must not fill the memory."""
    member = cluster.started("one", bounds=Bounds(32 << 20, 100_000))
    cluster.run_until(lambda: len(cluster.broker.held) == 2)
    session, pull = next((session, pull) for session, pull in cluster.broker.held if pull.queue_id == 0)
    for offset in range(0, 50_000, 100):
        reply = Pulled(pull.number, PullStatus.FOUND, offset + 100, 0, offset + 100, offset + 100, True)
        cluster.broker.endpoint.send(session.peer, [encode(reply), stored_batch(offset, 100)])
    cluster.run_for(500)
    assert reading.PULL_BYTES_MAX - 10_000 < member.inbox.account.size_bytes <= reading.PULL_BYTES_MAX


@pytest.mark.parametrize("code", [Code.INTERNAL_ERROR, Code.TOO_MANY_REQUESTS, Code.FORBIDDEN, Code.TOPIC_NOT_FOUND])
def test_a_refused_pull_is_asked_again_later(cluster: ReadingCluster, code: Code) -> None:
    refuse_kind(cluster.broker, Pull, RequestRefusedError("Not now.", code=code))
    member = cluster.started("one", eager=1.0)
    cluster.run_for(5_000)
    assert 4 <= len(cluster.broker.asked(Pull)) < 20
    cluster.broker.refuse = lambda session, request: None
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(1_500)
    assert offsets_seen(member) == [0]


def test_a_pull_that_is_never_answered_is_made_again(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.run_until(lambda: len(cluster.broker.held) == 2)
    cluster.broker.held.clear()
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(21_000)
    assert offsets_seen(member) == [0]


def test_a_batch_damaged_on_the_way_is_pulled_again(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    good = cluster.broker.topics["meters"][0].batches[0][2]
    answers = [(Pulled(0, PullStatus.FOUND, 3, 0, 3), good[:-1] + b"\xff")]

    def answer_pull(request: Pull) -> tuple[Pulled, list[bytes]] | None:
        if request.queue_id or not answers:
            return None
        reply, frame = answers.pop()
        return Pulled(request.number, reply.status, reply.next_offset, 0, 3), [frame]

    cluster.broker.answer_pull = answer_pull
    member = cluster.started("one", eager=1.0, **EARLIEST)
    cluster.run_for(50)
    assert offsets_seen(member) == [0, 1, 2]
    assert member.inbox.damaged_count == 1


# --- room ---------------------------------------------------------------------------------------------------------------


def test_pulls_stop_when_the_buffer_is_full_and_go_on_when_there_is_room(cluster: ReadingCluster) -> None:
    for _ in range(40):
        cluster.broker.store("meters", 0, 10)
    cluster.broker.answer_pull = one_batch_at_a_time(cluster.broker)
    member = cluster.started("one", bounds=Bounds(32 << 20, 100), **EARLIEST)
    cluster.run_for(1_000)
    assert 50 <= member.inbox.account.messages <= 110
    for _ in range(100):
        for unit in member.take_all():
            member.inbox.done(unit)
        cluster.run_for(1)
    assert offsets_seen(member) == list(range(400))
    assert (member.inbox.account.messages, member.inbox.account.size_bytes) == (0, 0)


def test_room_is_counted_in_bytes_too(cluster: ReadingCluster) -> None:
    for _ in range(40):
        cluster.broker.store("meters", 0, 10)
    cluster.broker.answer_pull = one_batch_at_a_time(cluster.broker)
    size = len(cluster.broker.topics["meters"][0].batches[0][2])
    member = cluster.started("one", bounds=Bounds(10 * size, 100_000), **EARLIEST)
    cluster.run_for(1_000)
    assert 5 * size <= member.inbox.account.size_bytes <= 11 * size


def one_batch_at_a_time(broker: ReadingBroker) -> Callable[[Pull], tuple[Pulled, list[bytes]] | None]:
    def answer(request: Pull) -> tuple[Pulled, list[bytes]] | None:
        for base, count, frame in broker.topics[request.topic][request.queue_id].batches:
            if base <= request.offset < base + count:
                return Pulled(request.number, PullStatus.FOUND, base + count, 0, 0), [frame]
        return None

    return answer


def test_a_queue_that_is_stuck_leaves_room_for_the_others(cluster: ReadingCluster) -> None:
    for _ in range(40):
        cluster.broker.store("meters", 0, 10)
    cluster.broker.answer_pull = one_batch_at_a_time(cluster.broker)
    member = cluster.started("one", bounds=Bounds(32 << 20, 100), in_order=True, **EARLIEST)
    cluster.run_for(100)
    stuck = member.take(1)
    assert stuck is not None
    cluster.run_for(100)
    for _ in range(20):
        cluster.broker.store("meters", 1, 10)
        cluster.run_for(5)
        for unit in member.take_all():
            member.inbox.done(unit)
    assert offsets_seen(member, Q1) == list(range(200))
    assert offsets_seen(member, Q0) == [0]


def test_many_queues_ask_for_less_each() -> None:
    cluster = ReadingCluster()
    cluster.add_topic(queue_count=64)
    cluster.started("one", bounds=Bounds(4 << 20, 100_000))
    cluster.run_for(100)
    asked = {pull.bytes_max for pull in cluster.broker.asked(Pull)}
    assert asked == {(4 << 20) // 128}


# --- broadcasting -------------------------------------------------------------------------------------------------------


def test_every_instance_gets_every_message(cluster: ReadingCluster) -> None:
    options: dict[str, Any] = {"message_model": MessageModel.BROADCASTING, "eager": 1.0}
    one, two = (cluster.started(name, instance_name=name, **options) for name in ("one", "two"))
    cluster.run_until(lambda: one.queues == two.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(2_000)
    assert offsets_seen(one) == offsets_seen(two) == [0, 1, 2]
    assert cluster.broker.committed("reports", "meters", 0, "one") == 3
    assert cluster.broker.committed("reports", "meters", 0, "two") == 3
    assert cluster.broker.leases == {}


def test_an_instance_goes_on_where_it_was(cluster: ReadingCluster) -> None:
    options: dict[str, Any] = {"message_model": MessageModel.BROADCASTING, "eager": 1.0, "instance_name": "hall"}
    one = cluster.started("one", **options)
    cluster.run_until(lambda: one.queues == [Q0, Q1])
    cluster.broker.store("meters", 0, 3)
    cluster.run_for(100)
    one.close()
    cluster.broker.store("meters", 0, 2)
    two = cluster.started("two", **options)
    cluster.run_for(100)
    assert offsets_seen(two) == [3, 4]


# --- without a group ----------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"group": "", "eager": 1.0}


@pytest.mark.parametrize(("consume_from", "first"), [(ConsumeFrom.LATEST, 3), (ConsumeFrom.EARLIEST, 0)])
def test_reading_without_a_group(cluster: ReadingCluster, consume_from: ConsumeFrom, first: int) -> None:
    cluster.broker.store("meters", 0, 3)
    member = cluster.started("one", consume_from=consume_from, **PLAIN)
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(5_000)
    assert offsets_seen(member) == list(range(first, 5))
    assert cluster.broker.asked(CommitOffsets) == cluster.broker.asked(JoinGroup) == cluster.broker.asked(AcquireLease) == []


def test_a_topic_that_appears_is_read_from_its_beginning() -> None:
    cluster = ReadingCluster()
    member = cluster.started("one", **PLAIN)
    cluster.run_for(2_000)
    assert cluster.broker.topics == {}, "reading creates no topics"
    cluster.broker.add_topic("meters", 1)
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(1_000)
    assert offsets_seen(member) == [0, 1]


def test_a_broker_that_was_away_is_read_on_where_it_was(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    member = cluster.started("one", **PLAIN)
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(100)
    cluster.broker.crash()
    cluster.run_for(15_000)
    cluster.broker.store("meters", 0, 1)
    cluster.broker.start()
    cluster.run_for(5_000)
    assert offsets_seen(member) == [3, 4]


def test_a_broker_that_appears_late_shows_what_is_younger_than_the_reader() -> None:
    cluster = ReadingCluster(brokers=2)
    cluster.add_topic(queue_count=1)
    late = cluster.brokers[1]
    late.store("meters", 0, 5)
    late.crash()
    cluster.run_for(12_000)
    member = cluster.started("one", **PLAIN)
    late.start()
    late.store("meters", 0, 1)
    cluster.run_for(5_000)
    assert offsets_seen(member, MessageQueue("meters", "broker-b", 0)) == [5]


# --- assigned queues ----------------------------------------------------------------------------------------------------

ASSIGNED: dict[str, Any] = {"is_assigned": True, "filters": {}, "eager": 1.0}


def assigned(cluster: ReadingCluster, name: str, *queues: MessageQueue, **options: Any) -> Member:
    member = cluster.member(name, **{**ASSIGNED, **options})
    member.core.assign(queues)
    cluster.run_until(lambda: member.queues == sorted(queues))
    return member


def test_assigned_queues_are_read_without_asking_anybody(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 1)
    cluster.broker.store("meters", 1, 1)
    member = assigned(cluster, "one", Q1, consume_from=ConsumeFrom.EARLIEST, group="")
    cluster.run_for(50)
    assert (offsets_seen(member, Q0), offsets_seen(member, Q1)) == ([], [0])
    assert cluster.broker.asked(JoinGroup) == []


def test_assigned_queues_commit_for_the_group_and_begin_there(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 3)
    assigned(cluster, "one", Q0, consume_from=ConsumeFrom.EARLIEST)
    cluster.run_for(2_000)
    assert cluster.broker.committed("reports", "meters", 0) == 3
    cluster.broker.groups["reports"].since_ms["", "meters"] = 1
    cluster.broker.store("meters", 0, 1)
    second = assigned(cluster, "two", Q0, consume_from=ConsumeFrom.EARLIEST)
    cluster.run_for(50)
    assert offsets_seen(second) == [3]


def test_another_assignment_takes_the_place_of_the_first(cluster: ReadingCluster) -> None:
    member = assigned(cluster, "one", Q0)
    member.core.assign([Q1])
    cluster.run_until(lambda: member.queues == [Q1])
    cluster.broker.store("meters", 0, 1)
    cluster.broker.store("meters", 1, 1)
    cluster.run_for(50)
    assert (offsets_seen(member, Q0), offsets_seen(member, Q1)) == ([], [0])


def test_a_queue_that_is_assigned_again_before_it_was_let_go_is_read_on(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 2)
    member = assigned(cluster, "one", Q0, consume_from=ConsumeFrom.EARLIEST, eager=0.0)
    wait_for_messages(cluster, member)
    unit = member.take(1)
    assert unit is not None
    member.core.assign([])
    cluster.run_for(10)
    member.started_ms = None
    member.core.assign([Q0])
    cluster.run_for(10)
    assert (member.core.queues(), member.started_ms) == ([], None), "what was taken is not finished yet"
    member.inbox.done(unit)
    cluster.run_for(10)
    assert member.core.queues() == [Q0]
    assert member.started_ms is not None
    member.take_all()
    assert offsets_seen(member) == [0, 1]


def test_nothing_is_passed_over_for_a_group_that_stands_nowhere_when_a_broker_was_started_again(cluster: ReadingCluster) -> None:
    cluster.broker.unflushed.add("meters")
    member = assigned(cluster, "one", Q0, auto_commit=False)
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(10)
    cluster.broker.crash()
    cluster.broker.start()
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(5_000)
    assert offsets_seen(member) == [0, 0, 1, 2], "the first was not flushed, and might have been another one by now"


@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_seek_back_is_committed_when_the_broker_was_away(cluster: ReadingCluster, is_flushed: bool) -> None:
    cluster.broker.unflushed |= set() if is_flushed else {"meters"}
    cluster.broker.store("meters", 0, 5)
    member = assigned(cluster, "one", Q0, consume_from=ConsumeFrom.EARLIEST)
    cluster.run_for(2_000)
    assert cluster.broker.committed("reports", "meters", 0) == 5
    member.core.seek(Q0, 2)
    member.core.pause([Q0], True)
    cluster.broker.crash()
    cluster.run_for(15_000 if is_flushed else 10)
    member.seen.clear()
    cluster.broker.start()
    cluster.run_for(2_000)
    assert offsets_seen(member) == [], "it is paused still"
    assert cluster.broker.committed("reports", "meters", 0) == 2
    member.core.pause([Q0], False)
    cluster.run_until(lambda: offsets_seen(member) == [2, 3, 4])


def test_a_queue_the_topic_does_not_have_is_refused(cluster: ReadingCluster) -> None:
    member = cluster.member("one", **{**ASSIGNED, "group": ""})
    member.core.assign([MessageQueue("meters", "broker-a", 7)])
    cluster.run_until(lambda: member.inbox.failure is not None)
    assert "has queues 0 to 1, not 7" in str(member.inbox.failure)


def test_commits_of_assigned_queues_that_members_hold_are_refused_but_reading_goes_on(cluster: ReadingCluster) -> None:
    cluster.started("one")
    member = assigned(cluster, "two", Q0)
    cluster.run_for(10)
    cluster.broker.store("meters", 0, 2)
    answers: list[ZrmqError | None] = []
    cluster.run_for(10)
    member.core.commit(answers.append, 1_000)
    cluster.run_until(lambda: bool(answers))
    assert isinstance(answers[0], FencedError)
    assert member.queues == [Q0]


# --- seek, pause, resume ------------------------------------------------------------------------------------------------


def test_seeking_back_reads_again_and_commits_it(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 5)
    member = cluster.started("one", eager=1.0, **EARLIEST)
    cluster.run_for(1_500)
    assert cluster.broker.committed("reports", "meters", 0) == 5
    member.core.seek(Q0, 2)
    cluster.run_for(20)
    assert offsets_seen(member) == [0, 1, 2, 3, 4, 2, 3, 4]
    member.core.seek(Q0, 1)
    member.core.pause([Q0], True)
    cluster.run_for(2_000)
    assert cluster.broker.committed("reports", "meters", 0) == 1
    commits = cluster.broker.asked(CommitOffsets)
    assert commits[-1].reset
    assert not commits[0].reset


def test_seeking_forward_passes_over(cluster: ReadingCluster) -> None:
    for _ in range(5):
        cluster.broker.store("meters", 0, 1)
    member = cluster.started("one", **EARLIEST)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    wait_for_messages(cluster, member)
    member.core.seek(Q0, 4)
    cluster.run_for(20)
    member.take_all()
    assert offsets_seen(member) == [4]


def test_what_was_taken_before_a_seek_counts_for_nothing(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 5)
    member = cluster.started("one", **EARLIEST)
    wait_for_messages(cluster, member)
    unit = member.take()
    assert unit is not None
    member.core.seek(Q0, 0)
    member.inbox.done(unit)
    cluster.run_for(2_000)
    assert cluster.broker.committed("reports", "meters", 0) == 0


def test_paused_queues_hold_and_pull_nothing(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 5)
    member = cluster.started("one", **EARLIEST)
    wait_for_messages(cluster, member)
    first = member.take(2)
    assert first is not None
    member.core.pause([Q0], True)
    cluster.broker.store("meters", 0, 5)
    cluster.run_for(20_000)
    assert member.take() is None
    assert member.inbox.account.messages == 0
    member.inbox.done(first)
    cluster.run_for(1_500)
    assert cluster.broker.committed("reports", "meters", 0) == 2
    member.core.pause([Q0], False)
    cluster.run_for(20)
    member.take_all()
    assert offsets_seen(member) == list(range(10))


def test_pausing_everything_holds_for_queues_that_come_later(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    first.core.pause_all(True)
    second = cluster.started("two")
    cluster.run_until(lambda: (first.queues, second.queues) == ([Q0], [Q1]))
    second.close()
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 1)
    cluster.run_for(100)
    assert first.take() is None
    first.core.pause_all(False)
    cluster.run_for(10)
    assert first.take() is not None


def test_pausing_everything_while_a_queue_is_given_back(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    cluster.broker.store("meters", 1, 5)
    wait_for_messages(cluster, first)
    unit = first.take(2)
    assert unit is not None
    cluster.started("two")
    cluster.run_until(lambda: first.core.queues() == [Q0])
    first.core.pause_all(True)
    cluster.broker.store("meters", 0, 1)
    cluster.run_for(100)
    assert first.take() is None
    first.core.pause_all(False)
    cluster.run_for(100)
    assert first.take() is not None


def test_a_paused_queue_can_be_resumed_while_its_broker_is_away(cluster: ReadingCluster) -> None:
    cluster.broker.store("meters", 0, 1)
    member = assigned(cluster, "one", Q0, Q1, eager=None, consume_from=ConsumeFrom.EARLIEST)
    member.core.pause([Q0, Q1], True)
    cluster.broker.crash()
    cluster.run_until(lambda: member.queues == [])
    assert member.core.paused() == [Q0, Q1]
    member.core.pause([Q0], False)
    with pytest.raises(InvalidArgumentError, match="not assigned"):
        member.core.pause([Q0], False)
    cluster.broker.start()
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    assert [member.reading(queue).is_paused for queue in (Q0, Q1)] == [False, True]


@pytest.mark.parametrize("message_model", MessageModel)
def test_a_subscribed_queue_stays_paused_while_its_broker_is_not_in_the_route(message_model: MessageModel) -> None:
    cluster = ReadingCluster(brokers=2)
    cluster.add_topic()
    member = cluster.started("one", message_model=message_model)
    cluster.run_until(lambda: len(member.queues) == 4)
    away = [queue for queue in member.queues if queue.broker_name == "broker-b"]
    member.core.pause(away, True)
    cluster.brokers[1].crash()
    cluster.run_for(12_000)
    assert {queue.broker_name for queue in member.queues} == {"broker-a"}
    member.core.pause(away[:1], False)
    cluster.brokers[1].start()
    cluster.run_until(lambda: len(member.queues) == 4)
    assert [queue for queue in member.queues if member.reading(queue).is_paused] == away[1:]


def test_a_queue_that_another_member_had_is_still_paused(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    first.core.pause([Q0, Q1], True)
    second = cluster.started("two")
    cluster.run_until(lambda: len(first.queues) == len(second.queues) == 1)
    assert not second.reading(second.queues[0]).is_paused
    second.close()
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    assert [first.reading(queue).is_paused for queue in (Q0, Q1)] == [True, True]
    first.core.pause(first.core.paused(), False)
    assert [first.reading(queue).is_paused for queue in (Q0, Q1)] == [False, False]


def test_a_pause_ends_when_a_queue_is_not_named_any_more(cluster: ReadingCluster) -> None:
    member = assigned(cluster, "one", Q0, Q1)
    member.core.pause([Q0, Q1], True)
    member.core.assign([Q1])
    cluster.run_until(lambda: member.queues == [Q1])
    member.core.assign([Q0, Q1])
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    assert [member.reading(queue).is_paused for queue in (Q0, Q1)] == [False, True]


def test_everything_that_was_paused_is_resumed_at_once(cluster: ReadingCluster) -> None:
    first = cluster.started("one")
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    first.core.pause_all(True)
    cluster.broker.crash()
    cluster.run_until(lambda: first.queues == [])
    first.core.pause_all(False)
    cluster.broker.start()
    cluster.run_until(lambda: first.queues == [Q0, Q1])
    assert not any(first.reading(queue).is_paused for queue in (Q0, Q1))


def test_seek_and_pause_of_a_queue_that_is_not_ours(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    elsewhere = MessageQueue("doors", "broker-a", 3)
    with pytest.raises(InvalidArgumentError, match="Queue 3 of 'doors' at broker-a is not assigned to this consumer"):
        member.core.seek(elsewhere, 0)
    cluster.run_until(lambda: member.queues == [Q0, Q1])
    with pytest.raises(InvalidArgumentError, match="not assigned"):
        member.core.pause([Q0, elsewhere], True)
    assert not member.reading(Q0).is_paused


# --- asking and ending --------------------------------------------------------------------------------------------------


def test_brokers_are_asked_by_name(cluster: ReadingCluster) -> None:
    member = cluster.started("one")
    answers: list[Any] = []
    for name in ("broker-a", "broker-z"):
        member.core.ask(
            name, QueryOffsets, "meters", [], -1, timeout_ms=1_000, on_reply=lambda reply, frames: answers.append(reply)
        )
    cluster.run_until(lambda: len(answers) == 2)
    assert isinstance(answers[0], UnreachableError)
    assert isinstance(answers[1], Offsets)


def test_closing_while_nobody_can_be_reached_ends_too(cluster: ReadingCluster) -> None:
    member = cluster.started("one", eager=1.0)
    cluster.broker.store("meters", 0, 2)
    cluster.run_for(10)
    cluster.network.cut("one", "broker-a")
    began_ms = cluster.network.now_ms
    member.close()
    assert cluster.network.now_ms - began_ms < 2_000


def test_closing_before_anything_was_there() -> None:
    cluster = ReadingCluster()
    cluster.member("one").close()


def test_a_lease_that_arrives_after_the_end_is_not_read(cluster: ReadingCluster) -> None:
    member = cluster.member("one")
    cluster.run_until(lambda: bool(cluster.broker.asked(AcquireLease)))
    member.close()
    assert member.queues == []
    assert cluster.broker.leases == {}


# --- everything at once -------------------------------------------------------------------------------------------------


class Storm:
    """Members come, go, die and stall, connections break, brokers restart, messages come in, for a while; then all is quiet.

    Watched all the time: a unit is only ever handed out by the member that holds the queue's lease, and what a member gets of a
    queue under one lease has no gap and no repetition. Afterwards: every message was handed out, everything is committed.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cluster = ReadingCluster(brokers=2, seed=seed)
        self.cluster.add_topic(queue_count=3)
        self.members: dict[str, Member] = {}
        self.born = 0
        self.seen: set[tuple[str, int, int]] = set()
        self.next_offsets: dict[Any, int] = {}
        self.handed_out: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.rng.choice([self.join, self.join, self.leave, self.die, self.store, self.store, self.disturb, self.restart])()
            for _ in range(self.rng.randint(1, 40)):
                self.cluster.run_for(self.rng.choice([1.0, 10.0, 100.0]))
                for member in self.members.values():
                    self.take(member)
        while len(self.members) < 2:
            self.join()
        for _ in range(400):
            self.cluster.run_for(100)
            for member in self.members.values():
                self.take(member)

    def take(self, member: Member) -> None:
        while self.rng.random() < 0.8 and (unit := member.take(self.rng.randint(1, 5))) is not None:
            queue = unit.process_queue
            broker = next(each for each in self.cluster.brokers if each.name == queue.queue.broker_name)
            assert broker.holder("reports", "meters", queue.queue.queue_id) == member.config.client_id
            assert self.next_offsets.get(queue, unit.offset) == unit.offset
            self.next_offsets[queue] = unit.next_offset
            self.seen |= {(queue.queue.broker_name, queue.queue.queue_id, message.queue_offset) for message in unit.messages}
            self.handed_out[member.config.client_id] += 1
            member.inbox.done(unit)

    def join(self) -> None:
        if len(self.members) < 4:
            self.born += 1
            name = f"member-{self.born}"
            self.members[name] = self.cluster.member(name, consume_from=ConsumeFrom.EARLIEST)

    def leave(self) -> None:
        if self.members:
            self.members.pop(self.rng.choice(sorted(self.members))).close()

    def die(self) -> None:
        if self.members:
            self.members.pop(self.rng.choice(sorted(self.members))).crash()

    def store(self) -> None:
        broker = self.rng.choice(self.cluster.brokers)
        if broker.loop is not None:
            broker.store("meters", self.rng.randrange(3), self.rng.randint(1, 20))

    def disturb(self) -> None:
        if self.members:
            name, broker = self.rng.choice(sorted(self.members)), self.rng.choice(self.cluster.brokers).name
            if self.rng.random() < 0.5:
                self.cluster.network.break_connections(name, broker)
            else:
                self.cluster.network.cut(name, broker)
                self.cluster.network.schedule(
                    None, self.rng.choice([500.0, 5_000.0, 15_000.0]), lambda: self.cluster.network.heal(name, broker)
                )

    def restart(self) -> None:
        broker = self.rng.choice(self.cluster.brokers)
        broker.crash()
        self.cluster.run_for(self.rng.choice([50.0, 3_000.0]))
        broker.start()


@pytest.mark.parametrize("seed", range(12))
def test_a_storm_loses_nothing_and_never_gives_a_queue_two_owners(seed: int) -> None:
    storm = Storm(seed)
    storm.run(30)
    for broker in storm.cluster.brokers:
        for queue_id, log in enumerate(broker.topics["meters"]):
            expected = {(broker.name, queue_id, offset) for offset in range(log.next_offset)}
            assert expected <= storm.seen, f"seed {seed}"
            assert (broker.committed("reports", "meters", queue_id) or 0) == log.next_offset, f"seed {seed}"
    held = [queue for member in storm.members.values() for queue in member.queues]
    assert sorted(held) == sorted(set(held))
    assert len(held) == 6
