"""Consumer groups: members, one subscription for all, and where a group begins."""

from __future__ import annotations

import pytest

from tests.unit.broker_desk import BrokerDesk, DeskClient
from zrmq.errors import Code, DiskFullError
from zrmq.message import ConsumeFrom, MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import AnyEvent, GroupSubscribed, TopicConfig
from zrmq.protocol.requests import (
    Alive,
    Bye,
    CommitOffsets,
    Committed,
    DeleteTopic,
    DescribeGroups,
    Done,
    Failed,
    GroupChanged,
    Heartbeat,
    Joined,
    JoinGroup,
    LeaveGroup,
    PutTopic,
    QueryCommitted,
    QuerySubscriptions,
    QueueOffset,
    Subscription,
)


@pytest.fixture
def desk() -> BrokerDesk:
    desk = BrokerDesk()
    desk.topic("meters", queue_count=2)
    return desk


def member(desk: BrokerDesk, name: str, group: str = "readers", epoch: int = 1) -> DeskClient:
    return desk.client(name, "consumer", group, instance_name=name, epoch=epoch)


def starts(client: DeskClient, topic: str = "meters") -> list[tuple[int, int]]:
    return list(client.ask(QueryCommitted, topic).offsets)


def test_members_see_each_other_and_are_told_of_changes(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    assert a.join("meters").members == ["a"]
    joined = b.join("meters")
    assert joined.members == ["a", "b"]
    assert a.notices() == [GroupChanged(0, "readers", joined.group_version, ["a", "b"])]
    b.ask(LeaveGroup)
    assert a.notices()[-1].members == ["a"]
    assert b.notices() == []


def test_a_heartbeat_tells_the_groups_version(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters")
    version = b.join("meters").group_version
    alive = a.ask(Heartbeat)
    assert isinstance(alive, Alive) and alive.group_version == version
    assert desk.client("x").ask(Heartbeat).group_version == 0


def test_nobody_is_told_where_a_group_begins_before_that_is_flushed(desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody joined: there was room to note the first topic, and none for the second."""
    a, b = (desk.client(name, "consumer", "readers") for name in "ab")
    append_event = desk.store.append_event

    def append_what_fits(event: AnyEvent) -> int:
        if isinstance(event, GroupSubscribed) and event.topic != "meters":
            raise DiskFullError("full")
        return append_event(event)

    monkeypatch.setattr(desk.store, "append_event", append_what_fits)
    topics = [Subscription("meters"), Subscription("alarms")]
    joining = a.post(JoinGroup, MessageModel.CLUSTERING, topics, ConsumeFrom.LATEST, 0, [0, 0])
    query = b.post(QueryCommitted, "meters")
    desk.turn(flush=False)
    assert (a.reply(joining).code, b.reply(query)) == (Code.DISK_FULL, None)
    desk.turn()
    assert b.reply(query).offsets[0] == (0, 0)


def test_joining_again_changes_nothing(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters")
    first = b.join("meters")
    again = b.join("meters")
    assert (again.group_version, again.members) == (first.group_version, first.members)
    assert len(a.notices()) == 1


def test_a_silent_member_is_dropped_and_the_others_are_told(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters")
    b.join("meters")
    for _ in range(11):
        desk.pass_ms(1_000)
        a.ask(Heartbeat)
    assert a.notices()[-1].members == ["a"]


def test_a_member_that_says_bye_is_gone_at_once(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters")
    b.join("meters")
    assert isinstance(b.ask(Bye), Done)
    assert a.notices()[-1].members == ["a"]
    assert b.ask(Heartbeat).code == Code.NO_SESSION


def test_a_member_that_reconnects_stays_one(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters")
    b.join("meters")
    back = member(desk, "b", epoch=2)
    assert back.ask(Heartbeat).group_version != 0
    assert [notice.members for notice in a.notices()] == [["a", "b"]]


def test_members_that_subscribe_otherwise_are_refused_with_both_subscriptions(desk: BrokerDesk) -> None:
    member(desk, "a").join("meters", expression="hall || kitchen")
    b = member(desk, "b")
    assert isinstance(b.join("meters", expression="kitchen||hall"), Joined)
    c = member(desk, "c").join("meters", expression="hall")
    assert c.code == Code.SUBSCRIPTION_MISMATCH
    assert "hall || kitchen" in c.message and "(hall)" in c.message
    d = member(desk, "d").join("meters", expression="hall || kitchen", model=MessageModel.BROADCASTING)
    assert d.code == Code.SUBSCRIPTION_MISMATCH


def test_a_group_without_live_members_may_subscribe_anew(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("meters", expression="hall")
    a.ask(LeaveGroup)
    assert isinstance(member(desk, "b").join("meters"), Joined)


def test_the_only_member_may_change_its_mind(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("meters", expression="hall")
    assert isinstance(a.join("meters"), Joined)


@pytest.mark.parametrize(
    "subscriptions",
    [[], [Subscription("a/b")], [Subscription("t", "a||")], [Subscription("t"), Subscription("t", "x")]],
)
def test_a_subscription_that_cannot_be_is_refused(desk: BrokerDesk, subscriptions: list[Subscription]) -> None:
    reply = member(desk, "a").ask(JoinGroup, MessageModel.CLUSTERING, subscriptions)
    assert isinstance(reply, Failed) and 40000 <= reply.code < 41000


def test_only_consumers_join(desk: BrokerDesk) -> None:
    assert desk.client("p", "producer", "readers").join("meters").code == Code.BAD_REQUEST
    assert desk.client("c", "consumer").join("meters").code == Code.BAD_REQUEST


# --- where a group begins -------------------------------------------------------------------------------------------------


def test_latest_is_the_moment_of_the_first_subscription(desk: BrokerDesk) -> None:
    producer = desk.client("p")
    producer.send("meters", 0, [b"before"])
    a = member(desk, "a")
    a.join("meters")
    producer.send("meters", 0, [b"after"])
    producer.send("meters", 1, [b"after"])
    assert starts(a) == [(0, 1), (1, 0)]


def test_latest_misses_nothing_of_a_topic_that_is_created_later(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("alarms")
    desk.topic("alarms", queue_count=1)
    desk.client("p").send("alarms", 0, [b"first"])
    assert starts(a, "alarms") == [(0, 0)]


def test_latest_misses_nothing_of_a_queue_that_is_added_later(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("meters")
    desk.client("admin").ask(PutTopic, TopicConfig("meters", queue_count=3))
    desk.client("p").send("meters", 2, [b"x"])
    assert starts(a)[2] == (2, 0)


def test_earliest_and_timestamp(desk: BrokerDesk) -> None:
    producer = desk.client("p")
    producer.send("meters", 0, [b"1", b"2"])
    desk.clock.advance(1000)
    noon_ms = desk.clock.time_ms()
    producer.send("meters", 0, [b"3"])
    early, timed = member(desk, "e", "early"), member(desk, "t", "timed")
    early.join("meters", consume_from=ConsumeFrom.EARLIEST)
    timed.join("meters", consume_from=ConsumeFrom.TIMESTAMP, timestamp_ms=noon_ms)
    assert starts(early) == [(0, 0), (1, 0)]
    assert starts(timed)[0] == (0, 2)


def test_a_group_known_elsewhere_begins_here_when_it_began_there(desk: BrokerDesk) -> None:
    producer = desk.client("p")
    producer.send("meters", 0, [b"old"])
    desk.clock.advance(1000)
    since_ms = desk.clock.time_ms()
    producer.send("meters", 0, [b"between"])
    a = member(desk, "a")
    assert a.join("meters", since_ms=[since_ms]).since_ms == [since_ms]
    assert starts(a)[0] == (0, 1)


def test_only_the_subscriptions_known_elsewhere_begin_earlier(desk: BrokerDesk) -> None:
    desk.topic("alarms", queue_count=1)
    producer = desk.client("p")
    since_ms = desk.clock.time_ms()
    producer.send("meters", 0, [b"between"])
    producer.send("alarms", 0, [b"before"])
    desk.clock.advance(1000)
    a = member(desk, "a")
    assert a.join("alarms", "meters", since_ms=[0, since_ms]).since_ms == [desk.clock.time_ms(), since_ms]
    assert (starts(a, "alarms"), starts(a)[0]) == ([(0, 1)], (0, 0))


def test_a_broker_tells_since_when_it_knows_which_subscription(desk: BrokerDesk) -> None:
    since_ms = desk.clock.time_ms()
    member(desk, "a").join("meters")
    desk.client("b", "consumer", "all", "host-1").join("meters", model=MessageModel.BROADCASTING)
    desk.clock.advance(1000)
    clustering, broadcasting = MessageModel.CLUSTERING, MessageModel.BROADCASTING
    too_many = [f"t{number}" for number in range(257)]
    assert member(desk, "asker", "askers").ask(QuerySubscriptions, clustering, too_many).code == Code.BAD_REQUEST
    assert member(desk, "c").ask(QuerySubscriptions, clustering, ["alarms", "meters"]).since_ms == [0, since_ms]
    assert member(desk, "d", "others").ask(QuerySubscriptions, clustering, ["meters"]).since_ms == [0]
    again, other = desk.client("e", "consumer", "all", "host-1"), desk.client("f", "consumer", "all", "host-2")
    assert again.ask(QuerySubscriptions, broadcasting, ["meters"]).since_ms == [since_ms]
    assert other.ask(QuerySubscriptions, broadcasting, ["meters"]).since_ms == [0]
    assert desk.client("g", "consumer", "all").ask(QuerySubscriptions, broadcasting, ["meters"]).code == Code.BAD_REQUEST


def test_where_a_group_begins_survives_a_power_cut_before_its_first_commit(desk: BrokerDesk) -> None:
    desk.client("p").send("meters", 0, [b"before"])
    since = member(desk, "a").join("meters").since_ms
    desk.crash()
    desk.client("p", epoch=2).send("meters", 0, [b"after"])
    a = member(desk, "a", epoch=2)
    assert a.join("meters").since_ms == since
    assert starts(a)[0] == (0, 1)


# --- broadcasting -----------------------------------------------------------------------------------------------------------


def test_broadcasting_instances_need_names_of_their_own(desk: BrokerDesk) -> None:
    model = MessageModel.BROADCASTING
    first = desk.client("a", "consumer", "all", "host-1")
    assert isinstance(first.join("meters", model=model), Joined)
    second = desk.client("b", "consumer", "all", "host-1").join("meters", model=model)
    assert second.code == Code.INSTANCE_NAME_TAKEN and "instance_name=" in second.message
    assert isinstance(desk.client("c", "consumer", "all", "host-2").join("meters", model=model), Joined)
    assert isinstance(first.join("meters", model=model), Joined)


def test_a_new_broadcasting_instance_begins_where_it_joins(desk: BrokerDesk) -> None:
    producer, model = desk.client("p"), MessageModel.BROADCASTING
    first = desk.client("a", "consumer", "all", "host-1")
    first.join("meters", model=model)
    producer.send("meters", 0, [b"1", b"2"])
    second = desk.client("b", "consumer", "all", "host-2")
    second.join("meters", model=model)
    assert starts(first)[0] == (0, 0)
    assert starts(second)[0] == (0, 2)


def test_an_instance_known_elsewhere_begins_here_when_it_began_there(desk: BrokerDesk) -> None:
    producer, model = desk.client("p"), MessageModel.BROADCASTING
    producer.send("meters", 0, [b"old"])
    desk.clock.advance(1000)
    since_ms = desk.clock.time_ms()
    producer.send("meters", 0, [b"between"])
    a = desk.client("a", "consumer", "all", "host-1")
    assert a.join("meters", model=model, since_ms=[since_ms]).since_ms == [since_ms]
    assert starts(a)[0] == (0, 1)


def test_an_instance_that_comes_back_misses_nothing_of_a_topic_created_since(desk: BrokerDesk) -> None:
    a = desk.client("a", "consumer", "all", "host-1")
    a.join("alarms", model=MessageModel.BROADCASTING)
    desk.topic("alarms", queue_count=1)
    desk.client("p").send("alarms", 0, [b"first"])
    back = desk.client("a", "consumer", "all", "host-1", epoch=2)
    back.join("alarms", model=MessageModel.BROADCASTING)
    assert starts(back, "alarms") == [(0, 0)]


def test_who_broadcasts_gives_its_instance_a_name(desk: BrokerDesk) -> None:
    nameless = desk.client("a", "consumer", "all")
    assert nameless.join("meters", model=MessageModel.BROADCASTING).code == Code.BAD_REQUEST
    desk.client("b", "consumer", "all", "host-1").join("meters", model=MessageModel.BROADCASTING)
    desk.client("p").send("meters", 0, [b"1", b"2"])
    refused = nameless.ask(CommitOffsets, [QueueOffset("meters", 0, 2)])
    assert refused.code == Code.FORBIDDEN and "instance_name" in refused.message
    assert starts(nameless)[0] == (0, -1), "nothing landed under no name"


def test_an_instance_commits_for_itself_whether_it_is_a_member_or_not(desk: BrokerDesk) -> None:
    desk.client("a", "consumer", "all", "host-1").join("meters", model=MessageModel.BROADCASTING)
    desk.client("p").send("meters", 0, [b"1", b"2"])
    guest = desk.client("b", "consumer", "all", "host-2")
    assert guest.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]).fenced == []
    assert starts(guest)[0] == (0, 1)


def test_an_instance_moves_nothing_in_a_clustering_group(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("meters")
    desk.client("p").send("meters", 0, [b"1", b"2"])
    guest = desk.client("b", "consumer", "readers", "host-1")
    assert guest.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]).fenced == []
    assert (starts(a)[0], starts(guest)[0]) == ((0, 0), (0, 1))


def test_an_instance_keeps_its_offsets_apart_while_it_is_no_member_after_a_restart(desk: BrokerDesk) -> None:
    desk.client("a", "consumer", "all", "host-1").join("meters", model=MessageModel.BROADCASTING)
    desk.client("p").send("meters", 0, [b"1", b"2"])
    desk.restart()
    back = desk.client("a", "consumer", "all", "host-1", epoch=2)  # a session again, and not joined yet
    assert back.ask(CommitOffsets, [QueueOffset("meters", 0, 2)]).fenced == []
    assert starts(back)[0] == (0, 2)
    assert starts(desk.client("b", "consumer", "all", "host-2"))[0] == (0, -1), "no other instance is moved"


# --- describing -------------------------------------------------------------------------------------------------------------


def test_a_group_is_described_with_members_leases_and_offsets(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.join("meters")
    a.acquire("meters", 1)
    info = desk.client("admin").ask(DescribeGroups, ["readers"]).groups[0]
    assert (info.group, info.message_model) == ("readers", MessageModel.CLUSTERING)
    assert [m.client_id for m in info.members] == ["a"]
    assert [(lease.topic, lease.queue_id, lease.client_id) for lease in info.leases] == [("meters", 1, "a")]
    assert info.offsets == [("", "meters", 0, 0, 0), ("", "meters", 1, 0, 0)]
    assert info.subscriptions == [Subscription("meters")]


def test_instances_are_described_with_their_own_topics_only(desk: BrokerDesk) -> None:
    """All of them times all topics would be more than what is remembered, and is bounded."""
    desk.topic("alarms", queue_count=1)
    a, b = member(desk, "a"), member(desk, "b")
    a.join("meters", model=MessageModel.BROADCASTING)
    a.ask(LeaveGroup)
    b.join("alarms", model=MessageModel.BROADCASTING)
    b.ask(CommitOffsets, [QueueOffset("meters", 1, 0)])
    info = desk.client("admin").ask(DescribeGroups, ["readers"]).groups[0]
    assert info.offsets == [
        ("a", "meters", 0, 0, 0), ("a", "meters", 1, 0, 0), ("b", "alarms", 0, 0, 0), ("b", "meters", 1, 0, 0)
    ]


def test_what_groups_make_a_broker_remember_is_bounded(desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with new topics, or new names for itself, each time it comes; what is remembered already goes on."""
    desk.topic("gone", queue_count=2)
    monkeypatch.setattr(limits, "PLACES_MAX", 10)
    a = member(desk, "a")
    assert isinstance(a.join("meters"), Joined)  # 3 places
    a.ask(CommitOffsets, [QueueOffset("meters", 1, 0)])  # not further than where it began
    assert isinstance(a.join("t1", "gone"), Joined)  # 4 more

    def refused(reply: object) -> bool:
        return isinstance(reply, Failed) and reply.code == Code.TOO_MANY_REQUESTS

    assert refused(a.join("t2", "t3", "t4", "t5"))
    assert a.ask(QuerySubscriptions, MessageModel.CLUSTERING, ["t2"]).since_ms == [0]
    desk.restart()
    a = member(desk, "a")
    assert refused(a.join("t2", "t3", "t4", "t5"))
    assert isinstance(a.join("t2", "t3", "t1", "meters"), Joined)  # 9 now
    desk.client("p").send("meters", 0, [b"x"])
    assert isinstance(a.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]), Committed)  # 10
    assert isinstance(a.ask(CommitOffsets, [QueueOffset("meters", 0, 1)], True), Committed)
    instance = desk.client("i", "consumer", "loud", instance_name="i")
    assert refused(instance.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]))
    assert refused(instance.join("meters", model=MessageModel.BROADCASTING))
    desk.client("admin").ask(DeleteTopic, "gone")
    assert isinstance(instance.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]), Committed)


def test_a_commit_makes_no_more_groups_than_a_broker_may_have(desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.client("p").send("meters", 0, [b"x"])
    monkeypatch.setattr(limits, "GROUPS_MAX", 1)
    replies = [
        desk.client(name, "consumer", name).ask(CommitOffsets, [QueueOffset("meters", 0, 1)]) for name in ("first", "second")
    ]
    assert isinstance(replies[0], Committed)
    assert isinstance(replies[1], Failed) and replies[1].code == Code.TOO_MANY_REQUESTS
    assert list(desk.store.tables.groups) == ["first"]


def test_an_unknown_group_is_told_so(desk: BrokerDesk) -> None:
    assert desk.client("admin").ask(DescribeGroups, ["nobody"]).code == Code.CONSUMER_GROUP_NOT_FOUND
