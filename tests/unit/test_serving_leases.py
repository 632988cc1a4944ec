"""Leases: one holder at a time, told only when durable, fenced by epochs, kept over a restart for whoever comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit import broker_desk
from tests.unit.broker_desk import BrokerDesk, DeskClient
from zrmq.errors import Code, DiskFullError
from zrmq.protocol import limits
from zrmq.protocol.events import AnyEvent, LeaseGranted, TopicConfig
from zrmq.protocol.requests import (
    AcquireLease,
    Bye,
    CommitOffsets,
    Committed,
    DeleteTopic,
    DescribeGroups,
    Done,
    Failed,
    Heartbeat,
    Joined,
    Leased,
    LeaveGroup,
    Pull,
    PutTopic,
    QueryCommitted,
    QueueOffset,
    ReleaseLease,
)


@pytest.fixture
def desk() -> BrokerDesk:
    desk = BrokerDesk()
    desk.topic("meters", queue_count=2)
    return desk


def member(desk: BrokerDesk, name: str, *topics: str, epoch: int = 1) -> DeskClient:
    client = desk.client(name, "consumer", "readers", epoch=epoch)
    client.join(*topics or ("meters",))
    return client


def committed(client: DeskClient) -> int:
    return int(client.ask(QueryCommitted, "meters").offsets[0][1])


def test_a_free_queue_is_leased_after_the_flush(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    number = a.post(AcquireLease, "meters", 0)
    desk.turn(flush=False)
    assert a.reply(number) is None
    desk.turn()
    assert isinstance(a.reply(number), Leased)


def test_the_holder_gets_the_same_lease_again(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    assert a.acquire("meters", 0).lease_epoch == a.acquire("meters", 0).lease_epoch


def test_a_waiter_gets_the_queue_when_it_is_released_with_a_greater_epoch_and_the_final_offset(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    desk.client("p").send("meters", 0, [b"1", b"2", b"3"])
    first = a.acquire("meters", 0)
    waiting = b.post(AcquireLease, "meters", 0)
    desk.turn()
    assert b.reply(waiting) is None
    assert isinstance(a.ask(ReleaseLease, "meters", 0, first.lease_epoch, 2), Done)
    second = b.reply(waiting)
    assert second.lease_epoch > first.lease_epoch and second.offset == 2


def test_waiters_are_served_in_the_order_they_came(desk: BrokerDesk) -> None:
    a, b, c = (member(desk, name) for name in "abc")
    lease = a.acquire("meters", 0)
    numbers = [client.post(AcquireLease, "meters", 0) for client in (c, b)]
    a.ask(ReleaseLease, "meters", 0, lease.lease_epoch)
    assert isinstance(c.reply(numbers[0]), Leased) and b.reply(numbers[1]) is None


def test_one_client_cannot_wait_for_queues_without_bound(desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its waits end, there is room for others then; asking again for the same queue takes none."""
    monkeypatch.setattr(limits, "WAITS_PER_CLIENT_MAX", 2)
    desk.topic("wide", queue_count=4)
    desk.topic("gone", queue_count=4)
    a, b, c = (member(desk, name, "wide", "gone") for name in "abc")
    held = [a.acquire("wide", queue_id) for queue_id in range(4)]
    for queue_id in range(4):
        a.acquire("gone", queue_id)

    def refused(queue_id: int, topic: str = "wide") -> bool:
        reply = b.acquire(topic, queue_id, timeout_ms=2_000)
        return isinstance(reply, Failed) and reply.code == Code.TOO_MANY_REQUESTS

    assert [refused(queue_id) for queue_id in (0, 0, 1, 2)] == [False, False, False, True]
    assert c.acquire("wide", 2) is None
    a.ask(ReleaseLease, "wide", 0, held[0].lease_epoch)  # one is granted
    assert [refused(2), refused(3)] == [False, True]
    desk.pass_ms(2_000)  # both are overdue
    assert [refused(1), refused(0, "gone"), refused(3)] == [False, False, True]
    desk.client("admin").ask(DeleteTopic, "gone")
    assert [refused(3), refused(2)] == [False, True]
    b.ask(Bye)
    desk.pass_ms(500)
    b = member(desk, "b", "wide", "gone", epoch=2)
    assert [refused(2), refused(3), refused(1)] == [False, False, True]


def test_a_wait_ends_before_its_client_gives_up(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.acquire("meters", 0)
    number = b.post(AcquireLease, "meters", 0, timeout_ms=2000)
    desk.pass_ms(1950, step_ms=50)
    assert b.reply(number).code == Code.LEASE_HELD


def test_a_former_holder_is_fenced(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    producer = desk.client("p")
    producer.send("meters", 0, [b"1"])
    producer.send("meters", 0, [b"2"])
    old = a.acquire("meters", 0)
    a.ask(ReleaseLease, "meters", 0, old.lease_epoch, 1)
    new = b.acquire("meters", 0)
    assert a.pull("meters", 0, 0, group="readers", lease_epoch=old.lease_epoch)[0].code == Code.FENCED
    assert a.ask(CommitOffsets, [QueueOffset("meters", 0, 2, old.lease_epoch)]) == Committed(a._number, [0])
    assert a.ask(CommitOffsets, [QueueOffset("meters", 0, 2, 0)]).fenced == [0]
    assert a.ask(ReleaseLease, "meters", 0, old.lease_epoch).code == Code.FENCED
    assert committed(b) == 1
    assert b.pull("meters", 0, 1, group="readers", lease_epoch=new.lease_epoch)[1] == [b"2"]


def test_nobody_is_told_that_a_lease_has_ended_before_that_is_flushed(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    lease = a.acquire("meters", 0)
    waiting = a.post(Pull, "meters", 0, 0, 1000, 10_000, 0, "readers", lease.lease_epoch)
    a.post(ReleaseLease, "meters", 0, lease.lease_epoch)
    again = a.post(ReleaseLease, "meters", 0, lease.lease_epoch)  # the first one was not answered in time
    newer = a.post(Pull, "meters", 0, 0, 1000, 10_000, 0, "readers", lease.lease_epoch)
    desk.turn(flush=False)
    assert [a.reply(number) for number in (again, newer)] == [None, None]
    assert a.reply(waiting) is None
    desk.crash()
    a = member(desk, "a", epoch=2)
    assert a.acquire("meters", 0).lease_epoch == lease.lease_epoch, "a power cut made it theirs again"
    a.ask(ReleaseLease, "meters", 0, lease.lease_epoch)
    assert a.ask(ReleaseLease, "meters", 0, lease.lease_epoch).code == Code.FENCED


def test_nobody_is_told_that_another_holds_the_queue_before_that_is_flushed(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    lease = a.acquire("meters", 0)
    b.post(AcquireLease, "meters", 0)
    a.post(ReleaseLease, "meters", 0, lease.lease_epoch)  # and it is granted to b
    again = a.post(AcquireLease, "meters", 0, timeout_ms=1)
    desk.core.tick()
    desk.turn(flush=False)
    assert a.reply(again) is None
    desk.turn()
    assert a.reply(again).code == Code.LEASE_HELD


def test_nobody_is_told_that_there_is_no_such_queue_before_that_is_flushed(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    a.acquire("meters", 1)
    admin = desk.client("admin")
    admin.post(DeleteTopic, "meters")
    admin.post(PutTopic, TopicConfig("meters", queue_count=1))
    again = a.post(AcquireLease, "meters", 1)
    desk.turn(flush=False)
    assert a.reply(again) is None
    desk.turn()
    assert a.reply(again).code == Code.BAD_REQUEST


def test_nobody_is_told_that_a_topic_is_gone_before_that_is_flushed(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    lease = a.acquire("meters", 0)
    waiting = a.post(Pull, "meters", 0, 0, 1000, 10_000, 0, "readers", lease.lease_epoch)
    desk.client("admin").post(DeleteTopic, "meters")
    release = a.post(ReleaseLease, "meters", 0, lease.lease_epoch)
    desk.turn(flush=False)
    assert [a.reply(waiting), a.reply(release)] == [None, None]
    desk.turn()
    assert [a.reply(waiting).code, a.reply(release).code] == [Code.TOPIC_NOT_FOUND, Code.TOPIC_NOT_FOUND]


def test_nobody_is_told_of_a_commit_before_it_is_flushed(desk: BrokerDesk) -> None:
    """Who goes on there takes everything before it to be on the disk."""
    desk.client("p").send("meters", 0, [b"1", b"2", b"3"])
    reader = desk.client("reader", "consumer", "readers")
    other = desk.client("other", "consumer", "readers")
    commit = reader.post(CommitOffsets, [QueueOffset("meters", 0, 2, 0)], False)
    query = other.post(QueryCommitted, "meters")
    desk.turn(flush=False)
    assert [reader.reply(commit), other.reply(query)] == [None, None]
    desk.turn()
    assert other.reply(query).offsets[0] == (0, 2)
    assert committed(other) == 2, "at once when it is flushed"


def test_a_pull_that_waits_is_fenced_when_the_lease_goes(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    lease = a.acquire("meters", 0)
    number = a.post(Pull, "meters", 0, 0, 1000, 10_000, 0, "readers", lease.lease_epoch)
    a.ask(ReleaseLease, "meters", 0, lease.lease_epoch)
    b.acquire("meters", 0)
    desk.client("p").send("meters", 0, [b"x"])
    assert a.reply(number).code == Code.FENCED


def test_the_queues_of_a_member_that_leaves_or_dies_go_on(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.acquire("meters", 0)
    a.acquire("meters", 1)
    first = b.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    a.ask(LeaveGroup)
    assert isinstance(b.reply(first), Leased)
    c = member(desk, "c")
    second = c.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    for _ in range(11):
        desk.pass_ms(1000)
        c.ask(Heartbeat)
    assert isinstance(c.reply(second), Leased)


def test_a_waiter_that_is_gone_is_passed_over(desk: BrokerDesk) -> None:
    a, b, c = (member(desk, name) for name in "abc")
    lease = a.acquire("meters", 0)
    b.post(AcquireLease, "meters", 0)
    number = c.post(AcquireLease, "meters", 0)
    b.ask(LeaveGroup)
    a.ask(ReleaseLease, "meters", 0, lease.lease_epoch)
    assert isinstance(c.reply(number), Leased)


def test_a_client_that_asks_twice_is_granted_once(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    lease = a.acquire("meters", 0)
    first, second = b.post(AcquireLease, "meters", 0), b.post(AcquireLease, "meters", 0)
    a.ask(ReleaseLease, "meters", 0, lease.lease_epoch)
    assert b.reply(first) is None and isinstance(b.reply(second), Leased)


# --- restarts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [BrokerDesk.crash, BrokerDesk.restart])
def test_after_a_restart_the_holder_goes_on_with_its_lease(desk: BrokerDesk, end: Callable[[BrokerDesk], None]) -> None:
    lease = member(desk, "a").acquire("meters", 0)
    end(desk)
    rival = member(desk, "b")
    waiting = rival.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    desk.pass_ms(5_000)
    back = member(desk, "a", epoch=2)
    assert back.acquire("meters", 0).lease_epoch == lease.lease_epoch
    for _ in range(12):
        desk.pass_ms(1000)
        back.ask(Heartbeat)
        rival.ask(Heartbeat)
    assert rival.reply(waiting) is None


def test_after_a_power_cut_a_holder_that_stays_away_loses_its_lease_after_the_session_timeout(desk: BrokerDesk) -> None:
    lease = member(desk, "a").acquire("meters", 0)
    desk.crash()
    b = member(desk, "b")
    number = b.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    for _ in range(9):
        desk.pass_ms(1000)
        b.ask(Heartbeat)
    assert b.reply(number) is None
    desk.pass_ms(1500)
    assert b.reply(number).lease_epoch > lease.lease_epoch


def silent_until_taken(desk: BrokerDesk, rival: DeskClient, number: int) -> float:
    """How long the rival waits, in ms, while nobody else says anything."""
    start_ms = desk.clock.monotonic_ms()
    while rival.reply(number) is None:
        desk.pass_ms(250)
        rival.ask(Heartbeat)
        assert desk.clock.monotonic_ms() - start_ms < 100_000
    assert isinstance(rival.reply(number), Leased)
    return desk.clock.monotonic_ms() - start_ms


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_shorter_session_timeout_takes_nothing_from_who_was_told_the_longer_one(desk: BrokerDesk, restarts: int) -> None:
    member(desk, "a").acquire("meters", 0)
    for _ in range(restarts):
        desk.restart(session_timeout_ms=1_000)
    b = member(desk, "b")
    assert 9_500 <= silent_until_taken(desk, b, b.post(AcquireLease, "meters", 0, timeout_ms=90_000)) <= 11_000
    desk.restart()
    c = member(desk, "c")
    assert silent_until_taken(desk, c, c.post(AcquireLease, "meters", 0, timeout_ms=90_000)) <= 2_000, "the grace is over"


def test_a_holder_whose_welcome_got_lost_still_goes_by_the_longer_timeout(desk: BrokerDesk) -> None:
    member(desk, "a").acquire("meters", 0)
    desk.restart(session_timeout_ms=1_000)
    desk.client("a", "consumer", "readers", epoch=2)
    b = member(desk, "b")
    assert silent_until_taken(desk, b, b.post(AcquireLease, "meters", 0, timeout_ms=90_000)) >= 9_500


def test_who_says_that_it_leaves_is_believed_at_once_after_a_restart_with_a_shorter_timeout(desk: BrokerDesk) -> None:
    member(desk, "a").acquire("meters", 0)
    desk.restart(session_timeout_ms=1_000)
    a, b = member(desk, "a", epoch=2), member(desk, "b")
    number = b.post(AcquireLease, "meters", 0, timeout_ms=90_000)
    a.ask(LeaveGroup)
    assert isinstance(b.reply(number), Leased)


def test_a_longer_session_timeout_is_on_the_disk_before_anybody_is_told(desk: BrokerDesk) -> None:
    member(desk, "a").acquire("meters", 0)
    desk.restart(session_timeout_ms=30_000)
    member(desk, "a", epoch=2)
    desk.crash()
    desk.restart(session_timeout_ms=1_000)
    b = member(desk, "b")
    assert silent_until_taken(desk, b, b.post(AcquireLease, "meters", 0, timeout_ms=90_000)) >= 29_500


def test_a_holder_that_came_back_and_died_loses_its_lease_without_having_joined(desk: BrokerDesk) -> None:
    member(desk, "a").acquire("meters", 0)
    desk.crash()
    desk.client("a", "consumer", "readers", epoch=2)
    b = member(desk, "b")
    number = b.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    for _ in range(11):
        desk.pass_ms(1000)
        b.ask(Heartbeat)
    assert isinstance(b.reply(number), Leased)


# --- commits ----------------------------------------------------------------------------------------------------------------


def test_commits_never_go_back_but_by_reset(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    desk.client("p").send("meters", 0, [b"x"] * 10)
    epoch = a.acquire("meters", 0).lease_epoch
    a.ask(CommitOffsets, [QueueOffset("meters", 0, 7, epoch)])
    a.ask(CommitOffsets, [QueueOffset("meters", 0, 3, epoch)])
    assert committed(a) == 7
    a.ask(CommitOffsets, [QueueOffset("meters", 0, 3, epoch)], True)
    assert committed(a) == 3


def test_a_commit_survives_a_power_cut(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    desk.client("p").send("meters", 0, [b"x"] * 10)
    a.ask(CommitOffsets, [QueueOffset("meters", 0, 7, a.acquire("meters", 0).lease_epoch)])
    desk.crash()
    assert committed(member(desk, "a", epoch=2)) == 7


def test_a_commit_beyond_the_end_is_the_end_and_a_negative_one_is_refused(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    desk.client("p").send("meters", 0, [b"x"])
    epoch = a.acquire("meters", 0).lease_epoch
    a.ask(CommitOffsets, [QueueOffset("meters", 0, 99, epoch)])
    assert committed(a) == 1
    assert a.ask(CommitOffsets, [QueueOffset("meters", 0, -5, epoch)]).code == Code.BAD_REQUEST


def test_a_commit_on_a_topic_that_is_gone_costs_the_others_nothing(desk: BrokerDesk) -> None:
    a = member(desk, "a")
    desk.client("p").send("meters", 0, [b"x"])
    epoch = a.acquire("meters", 0).lease_epoch
    reply = a.ask(CommitOffsets, [QueueOffset("gone", 0, 1, 5), QueueOffset("meters", 0, 1, epoch)])
    assert reply.fenced == [0] and committed(a) == 1


def test_a_group_reads_without_leases_where_nobody_holds_any(desk: BrokerDesk) -> None:
    reader = desk.client("r", "consumer", "assigned")
    desk.client("p").send("meters", 0, [b"x"])
    assert reader.ask(CommitOffsets, [QueueOffset("meters", 0, 1)]).fenced == []
    assert committed(reader) == 1


def test_only_members_acquire_and_only_what_they_subscribe_to(desk: BrokerDesk) -> None:
    desk.topic("alarms")
    assert desk.client("x", "consumer", "readers").acquire("meters", 0).code == Code.FORBIDDEN
    assert member(desk, "a").acquire("alarms", 0).code == Code.FORBIDDEN
    assert member(desk, "b").acquire("meters", 9).code == Code.BAD_REQUEST


def test_the_leases_of_a_deleted_topic_end(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.acquire("meters", 0)
    number = b.post(AcquireLease, "meters", 0)
    desk.client("admin").ask(DeleteTopic, "meters")
    assert b.reply(number).code == Code.TOPIC_NOT_FOUND
    desk.topic("meters", queue_count=2)
    assert isinstance(b.acquire("meters", 0), Leased)


# --- a disk that takes nothing ------------------------------------------------------------------------------------------


@pytest.fixture
def small_desk(monkeypatch: pytest.MonkeyPatch) -> BrokerDesk:
    """One whose segments are soon full."""
    monkeypatch.setattr(broker_desk, "SEGMENT_BYTES", 4096)
    desk = BrokerDesk()
    desk.topic("meters", queue_count=2)
    return desk


def fill_disk(desk: BrokerDesk) -> None:
    """There is no room for another segment, and the present one is full."""
    desk.files.capacity_bytes = desk.files.used_bytes
    filler = desk.client("filler", "consumer", "fillers")
    for offset in range(1_000):
        if isinstance(filler.ask(CommitOffsets, [QueueOffset("meters", 0, offset % 2)], True), Failed):
            return
    pytest.fail("the disk does not fill up")


def test_queues_of_a_silent_member_are_given_on_when_the_disk_has_room_again(small_desk: BrokerDesk) -> None:
    a, b = member(small_desk, "a"), member(small_desk, "b")
    lease = a.acquire("meters", 0)
    number = b.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    fill_disk(small_desk)
    for _ in range(12):  # only `b` lives on
        small_desk.pass_ms(1_000)
        b.post(Heartbeat)
    assert b.reply(number) is None
    small_desk.files.capacity_bytes = None
    small_desk.pass_ms(500)
    assert b.reply(number).lease_epoch > lease.lease_epoch


def test_who_leaves_while_the_disk_is_full_is_gone_and_its_queue_follows(small_desk: BrokerDesk) -> None:
    a, b = member(small_desk, "a"), member(small_desk, "b")
    a.acquire("meters", 0)
    fill_disk(small_desk)
    assert isinstance(a.ask(Bye), Done)
    small_desk.files.capacity_bytes = None
    small_desk.pass_ms(500)
    assert isinstance(b.acquire("meters", 0), Leased)


def test_who_waits_is_told_when_the_log_takes_the_release_and_not_the_grant(
    desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    lease = a.acquire("meters", 0)
    number = b.post(AcquireLease, "meters", 0, timeout_ms=60_000)
    append_event = desk.store.append_event

    def append_what_fits(event: AnyEvent) -> int:
        if isinstance(event, LeaseGranted):
            raise DiskFullError("full")
        return append_event(event)

    monkeypatch.setattr(desk.store, "append_event", append_what_fits)
    assert isinstance(a.ask(ReleaseLease, "meters", 0, lease.lease_epoch, 0), Done)
    assert b.reply(number).code == Code.DISK_FULL
    monkeypatch.undo()
    assert b.acquire("meters", 0).lease_epoch > lease.lease_epoch


def test_a_group_that_could_not_be_noted_is_none(small_desk: BrokerDesk) -> None:
    fill_disk(small_desk)
    late = small_desk.client("late", "consumer", "latecomers")
    assert late.join("meters").code == Code.DISK_FULL
    assert late.ask(DescribeGroups, ["latecomers"]).code == Code.CONSUMER_GROUP_NOT_FOUND
    small_desk.files.capacity_bytes = None
    small_desk.pass_ms(500)
    assert isinstance(late.join("meters"), Joined)


def test_sessions_end_although_their_leases_cannot_on_a_disk_that_failed(desk: BrokerDesk) -> None:
    a, b = member(desk, "a"), member(desk, "b")
    a.acquire("meters", 0)
    desk.files.fail("fdatasync", times=1_000)
    b.post(AcquireLease, "meters", 1)
    desk.turn()
    desk.pass_ms(12_000)
    assert len(desk.core.sessions) == 0
