"""One value of everything that travels or is stored, each field set to something: what the golden files are the bytes of."""

from __future__ import annotations

from typing import Any, NamedTuple

from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol import events, requests
from zrmq.protocol.batch import Columns
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    BrokerInfo,
    GroupInfo,
    LeaseInfo,
    Limits,
    MemberInfo,
    PullStatus,
    QueueOffset,
    QueueState,
    Subscription,
    TopicInfo,
    TopicRoute,
)

NOW_MS = 1_795_000_000_123

TOPIC = TopicConfig("meters", 8, 6, FlushMode.ASYNC, 86_400_000, 1 << 30)
BROKER = BrokerInfo("edge", "broker-a", 0, "MASTER", 3, "tcp://127.0.0.1:10911", "tcp://127.0.0.1:10912", True, "0123456789ab")
ROUTE = TopicRoute("meters", "broker-a", 8, 6)
GROUP = GroupInfo(
    "reports", MessageModel.CLUSTERING, [Subscription("meters", "hall || kitchen")], [MemberInfo("c-1", "box", 250)],
    [LeaseInfo("meters", 5, "c-1", (3 << 32) + 7)], [("", "meters", 5, 1_000, 1_024)],
)

REQUESTS: list[requests.Request] = [
    requests.Hello(1, 3_000, 1, "c-1", 4, "consumer", "reports", "box", "rust", b"\x00\xff"),
    requests.Heartbeat(2, 3_000),
    requests.Bye(3, 500),
    requests.RegisterBroker(4, 3_000, BROKER, 9, [ROUTE]),
    requests.UnregisterBroker(5, 500, "broker-a", 0, 3, "0123456789ab"),
    requests.QueryRoute(6, 30_000, ["meters", "alarms"], 0x1234_5678_9ABC_DEF0),
    requests.PutTopic(7, 3_000, TOPIC, True, True),
    requests.DeleteTopic(8, 3_000, "meters", 2),
    requests.DescribeTopics(9, 3_000, ["meters"]),
    requests.DescribeBroker(10, 3_000),
    requests.Send(11, 3_000, "meters", 5, 499),
    requests.Pull(12, 30_000, "meters", 5, 1_000, 262_144, 20_000, 1 << 63, "reports", (3 << 32) + 7, 2, True),
    requests.QueryOffsets(13, 3_000, "meters", [0, 5], NOW_MS),
    requests.JoinGroup(
        14, 3_000, MessageModel.BROADCASTING, [Subscription("meters", "hall || kitchen")], ConsumeFrom.TIMESTAMP, NOW_MS,
        [NOW_MS - 1],
    ),
    requests.LeaveGroup(15, 3_000),
    requests.AcquireLease(16, 30_000, "meters", 5),
    requests.ReleaseLease(17, 3_000, "meters", 5, (3 << 32) + 7, 1_000),
    requests.CommitOffsets(18, 3_000, [QueueOffset("meters", 5, 1_000, (3 << 32) + 7, 2)], True),
    requests.QueryCommitted(19, 3_000, "meters"),
    requests.DescribeGroups(20, 3_000, ["reports"]),
    requests.QuerySubscriptions(21, 3_000, MessageModel.CLUSTERING, ["meters", "alarms"]),
]

REPLIES: list[requests.Reply] = [
    requests.Failed(1, 40402, "No topic 'meters' here.", {"topic": "meters", "limit_bytes": 5, "known": [True, None, 1.5]}),
    requests.Done(2),
    requests.Welcome(3, 1, "5f0c", "broker-a", NOW_MS, 10_000, 1_000, Limits(4_194_304, 4_325_376, 65_536, 32, 8_388_608)),
    requests.Alive(4, NOW_MS, 12),
    requests.Registered(5, True),
    requests.Route(6, 0x1234_5678_9ABC_DEF0, [BROKER], [ROUTE]),
    requests.Topics(7, [TopicInfo(TOPIC, 2, [QueueState(5, 10, 1_024)])]),
    requests.BrokerState(8, {"broker_name": "broker-a", "appended_position": 1 << 40}),
    requests.Sent(9, 1_000, NOW_MS, FlushMode.SYNC, True),
    requests.Pulled(10, PullStatus.MOVED, 1_024, 10, 1_025, 1_000, True),
    requests.Offsets(11, [(0, 0), (5, 1_000)], 2, [0, 1_000]),
    requests.Joined(12, 13, ["c-1", "c-2"], [NOW_MS]),
    requests.Leased(13, (3 << 32) + 7, 1_000),
    requests.Committed(14, [0, 2]),
    requests.Groups(15, [GROUP]),
    requests.GroupChanged(0, "reports", 14, ["c-1"]),
    requests.SubscribedSince(16, [NOW_MS, 0]),
]

EVENTS: list[events.Event] = [
    events.BrokerStarted(3),
    events.TopicPut(2, TOPIC),
    events.TopicDeleted(2),
    events.GroupSubscribed("reports", "meters", NOW_MS, [(0, 0), (5, 1_000)], "box"),
    events.OffsetsCommitted("reports", "box", [(2, 5, 1_000)]),
    events.LeaseGranted("reports", 2, 5, "c-1", (3 << 32) + 7),
    events.LeaseReleased("reports", 2, 5, (3 << 32) + 7),
    events.BrokerStopped(),
    events.GroupDeleted("reports"),
    events.QueuesAdvanced(2, [(0, 7), (5, 1_000)]),
    events.StateRelocated(67_108_928, 3, 4, 10_000),
    events.SessionTimeoutChanged(10_000),
]


class Batch(NamedTuple):
    """A batch as a producer makes it, and what the broker adds."""

    columns: Columns
    produced: dict[str, Any]
    assigned: dict[str, Any]


PRODUCED = {"producer_id": 0x0123_4567_89AB_CDEF, "first_sequence": 500, "first_born_ms": NOW_MS - 20, "last_born_ms": NOW_MS - 3}
ASSIGNED = {
    "epoch": 1, "position": 67_108_928, "flushed_position": 67_108_864, "store_timestamp_ms": NOW_MS,
    "topic_id": 2, "queue_id": 5, "base_offset": 1_000,
}

BATCHES: dict[str, Batch] = {
    "plain": Batch(Columns([b"21.5", b"", bytes(range(40))]), PRODUCED, ASSIGNED),
    "everything": Batch(
        Columns(
            [b"21.5", b"22.0", "déjà vu".encode()],
            ["kitchen", None, "küche"],
            [["dev-7"], [], ["dev-8", "dev-9"]],
            [{"unit": "C"}, None, {}],
            [None, "house-1", "house-2"],
        ),
        PRODUCED, ASSIGNED,
    ),
    "zlib": Batch(Columns([b"21.5 " * 100, b"22.0 " * 100], ["kitchen", "hall"]), {**PRODUCED, "compress": True}, ASSIGNED),
}
