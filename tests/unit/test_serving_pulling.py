"""Pull: what is served, what waits, what wakes it, and how many may wait."""

from __future__ import annotations

import pytest

from tests.unit.broker_desk import BrokerDesk, DeskClient
from zrmq.errors import Code
from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import PERMISSION_WRITE, TopicConfig
from zrmq.protocol.requests import (
    Bye,
    CommitOffsets,
    DeleteTopic,
    Failed,
    Heartbeat,
    Pull,
    Pulled,
    PullStatus,
    PutTopic,
    QueryCommitted,
    QueryOffsets,
    QueueOffset,
    ReleaseLease,
    Send,
)
from zrmq.protocol.tags import filter_mask


@pytest.fixture
def desk() -> BrokerDesk:
    desk = BrokerDesk()
    desk.topic("meters")
    return desk


@pytest.fixture
def client(desk: BrokerDesk) -> DeskClient:
    return desk.client("c1")


def test_a_pull_begins_at_its_offset_and_says_where_to_go_on(client: DeskClient) -> None:
    for body in (b"a", b"b", b"c"):
        client.send("meters", 0, [body])
    reply, bodies = client.pull("meters", 0, 1)
    assert bodies == [b"b", b"c"]
    assert reply == Pulled(reply.number, PullStatus.FOUND, 3, 0, 3, 3)


def test_a_reader_is_told_what_survives_a_power_cut(desk: BrokerDesk, client: DeskClient) -> None:
    """However its topic is acknowledged: here that has just changed, and the change is not flushed itself."""
    client.send("meters", 0, [b"a"])
    client.post(PutTopic, TopicConfig("meters", queue_count=4, flush_mode=FlushMode.ASYNC))
    client.post(Send, "meters", 0, payload=[client.batch([b"b"])])
    desk.turn(flush=False)
    number = client.post(Pull, "meters", 0, 0, 1000, 0)
    assert client.bodies(number) == [b"a", b"b"]
    assert client.reply(number).flushed_offset == 1
    desk.turn()
    reply, _ = client.pull("meters", 0, 2)
    assert (reply.status, reply.flushed_offset) == (PullStatus.NOTHING, 2)
    desk.restart()
    reply, _ = desk.client("c2").pull("meters", 0, 2)
    assert (reply.status, reply.flushed_offset) == (PullStatus.NOTHING, 2)


def test_offsets_of_a_former_topic_are_refused_in_the_next_one_of_its_name(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    topic_id = client.ask(QueryOffsets, "meters").topic_id
    assert client.bodies(client.post(Pull, "meters", 0, 0, 1000, 0, 0, "", 0, topic_id)) == [b"a"]
    client.ask(DeleteTopic, "meters")
    desk.topic("meters")
    client.send("meters", 0, [b"b", b"c"])
    assert client.ask(Pull, "meters", 0, 1, 1000, 0, 0, "", 0, topic_id).code == Code.TOPIC_NOT_FOUND
    member = desk.client("m", role="consumer", group="reports", instance_name="hall")
    member.join("meters", model=MessageModel.BROADCASTING, consume_from=ConsumeFrom.EARLIEST)
    assert member.ask(CommitOffsets, [QueueOffset("meters", 0, 1, 0, topic_id)]).fenced == [0]
    found = member.ask(QueryCommitted, "meters")
    assert found.topic_id == client.ask(QueryOffsets, "meters").topic_id > topic_id
    assert dict(found.offsets)[0] == 0
    assert member.ask(CommitOffsets, [QueueOffset("meters", 0, 1, 0, found.topic_id)]).fenced == []
    assert client.bodies(client.post(Pull, "meters", 0, 1, 1000, 0, 0, "", 0, found.topic_id)) == [b"b", b"c"]


def test_a_pull_gets_at_least_one_batch_however_small_its_bound(client: DeskClient) -> None:
    client.send("meters", 0, [bytes(50_000)])
    client.send("meters", 0, [b"b"])
    assert client.pull("meters", 0, 0, bytes_max=1)[1] == [bytes(50_000)]


def test_an_empty_pull_waits_and_is_woken_by_a_flushed_message(desk: BrokerDesk, client: DeskClient) -> None:
    number = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    desk.turn()
    assert client.reply(number) is None
    desk.client("p").send("meters", 0, [b"x"])
    assert client.bodies(number) == [b"x"]


def test_an_empty_pull_is_answered_with_nothing_when_its_wait_ends(desk: BrokerDesk, client: DeskClient) -> None:
    number = client.post(Pull, "meters", 0, 0, 1000, 2_000)
    desk.pass_ms(1_500)
    assert client.reply(number) is None
    desk.pass_ms(1_000)
    assert client.reply(number).status is PullStatus.NOTHING


def test_a_message_wakes_only_its_own_queue(desk: BrokerDesk, client: DeskClient) -> None:
    numbers = [client.post(Pull, "meters", queue_id, 0, 1000, 10_000) for queue_id in range(4)]
    desk.client("p").send("meters", 2, [b"x"])
    assert [client.reply(number) is not None for number in numbers] == [False, False, True, False]


def test_unwanted_batches_are_skipped_unopened_and_the_wait_goes_on_behind_them(desk: BrokerDesk, client: DeskClient) -> None:
    producer = desk.client("p")
    producer.send("meters", 0, [b"k"] * 3, tag="kitchen")
    number = client.post(Pull, "meters", 0, 0, 1000, 10_000, filter_mask("hall"))
    producer.send("meters", 0, [b"k"], tag="kitchen")
    assert client.reply(number) is None
    producer.send("meters", 0, [b"h"], tag="hall")
    assert client.bodies(number) == [b"h"]
    assert client.reply(number).next_offset == 5


@pytest.mark.parametrize("offset", [5, 1_000_000])
def test_an_offset_beyond_the_end_is_told_where_to_go_on(client: DeskClient, offset: int) -> None:
    client.send("meters", 0, [b"a"])
    reply, _ = client.pull("meters", 0, offset, wait_ms=10_000)
    assert (reply.status, reply.next_offset) == (PullStatus.MOVED, 1)


def test_a_waiting_pull_learns_that_its_topic_was_deleted(desk: BrokerDesk, client: DeskClient) -> None:
    number = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    desk.client("admin").ask(DeleteTopic, "meters")
    assert client.reply(number).code == Code.TOPIC_NOT_FOUND


def test_a_newer_pull_of_a_queue_ends_the_wait_of_the_older(desk: BrokerDesk, client: DeskClient) -> None:
    older = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    elsewhere = client.post(Pull, "meters", 1, 0, 1000, 10_000)
    newer = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    assert client.reply(older).status is PullStatus.NOTHING
    assert (client.reply(elsewhere), client.reply(newer), desk.core.pulling.held_count) == (None, None, 2)
    desk.client("p").send("meters", 0, [b"x"])
    assert client.bodies(newer) == [b"x"]


def test_pulls_of_a_superseded_session_vanish(desk: BrokerDesk, client: DeskClient) -> None:
    number = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    again = desk.client("c1", epoch=2)
    assert desk.core.pulling.held_count == 0, "at once, or a client that reconnects in a storm holds any number"
    again.send("meters", 0, [b"x"])
    assert client.reply(number) is None


def test_pulls_of_a_session_that_ends_vanish_and_those_of_others_stay(desk: BrokerDesk, client: DeskClient) -> None:
    silent, other = desk.client("silent"), desk.client("other")
    for each in (client, silent, other):
        each.post(Pull, "meters", 0, 0, 1000, 100_000)
        each.post(Pull, "meters", 1, 0, 1000, 100_000)
    assert desk.core.pulling.held_count == 6
    client.ask(Bye)
    assert desk.core.pulling.held_count == 4
    for _ in range(12):
        desk.pass_ms(1_000)
        other.ask(Heartbeat)
    assert desk.core.pulling.held_count == 2
    desk.client("p").send("meters", 0, [b"x"])
    assert desk.core.pulling.held_count == 1
    assert client.payload_count == silent.payload_count == 0
    assert other.payload_count == 1


def test_a_pull_that_is_woken_for_nothing_waits_on(desk: BrokerDesk, client: DeskClient) -> None:
    number = client.post(Pull, "meters", 0, 0, 1000, 10_000, 1 << 3)
    producer = desk.client("p")
    for _ in range(2):
        producer.send("meters", 0, [b"x"])
        assert (client.reply(number), desk.core.pulling.held_count) == (None, 1)
    client.ask(Bye)
    assert desk.core.pulling.held_count == 0


# --- pulls that stay ----------------------------------------------------------------------------------------------------


def stay(client: DeskClient, offset: int, bytes_max: int = 10_000, wait_ms: int = 10_000, queue_id: int = 0) -> int:
    return client.post(Pull, "meters", queue_id, offset, bytes_max, wait_ms, 0, "", 0, 0, True)


def facts(client: DeskClient, number: int) -> list[tuple[PullStatus, int, bool]]:
    return [(answer.status, answer.next_offset, answer.more) for answer in client.answers(number)]


def test_a_pull_that_stays_brings_each_message_as_it_comes(desk: BrokerDesk, client: DeskClient) -> None:
    producer = desk.client("p")
    producer.send("meters", 0, [b"a"])
    number = stay(client, 0, wait_ms=2_000)
    for body in (b"b", b"c"):
        producer.send("meters", 0, [body])
    assert facts(client, number) == [(PullStatus.FOUND, offset, True) for offset in (1, 2, 3)]
    assert desk.core.pulling.held_count == 1
    desk.pass_ms(2_250)
    assert facts(client, number)[3:] == [(PullStatus.NOTHING, 3, False)]
    assert desk.core.pulling.held_count == 0


def test_a_pull_that_stays_ends_when_half_of_its_bytes_are_there(desk: BrokerDesk, client: DeskClient) -> None:
    """So that who is behind is not fed in small pieces; and what comes for one pull is bounded as for one that does not stay."""
    producer, number = desk.client("p"), stay(client, 0, bytes_max=2_000)
    for _ in range(4):
        producer.send("meters", 0, [bytes(300)])
    assert [more for _, _, more in facts(client, number)] == [True, True, False]
    assert desk.core.pulling.held_count == 0
    assert client.pull("meters", 0, 3)[1] == [bytes(300)]


def test_a_pull_that_asks_for_more_than_there_may_be_stays_too(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    assert facts(client, stay(client, 0, bytes_max=10 * limits.PULL_BYTES_MAX)) == [(PullStatus.FOUND, 1, True)]


def test_a_pull_that_stays_ends_with_an_answer_that_leaves_something(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [bytes(300)])
    client.send("meters", 0, [bytes(900)])
    assert facts(client, stay(client, 0, bytes_max=1_000)) == [(PullStatus.FOUND, 1, False)]


def test_a_pull_that_may_not_wait_does_not_stay(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    assert facts(client, stay(client, 0, wait_ms=0)) == [(PullStatus.FOUND, 1, False)]


def test_a_pull_that_stays_ends_with_a_newer_one_and_with_its_session(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    older, newer = stay(client, 0), stay(client, 1)
    assert facts(client, older) == [(PullStatus.FOUND, 1, True), (PullStatus.NOTHING, 1, False)]
    client.ask(Bye)
    desk.client("p").send("meters", 0, [b"b"])
    assert (facts(client, newer), desk.core.pulling.held_count) == ([], 0)


def test_a_pull_that_stays_brings_nothing_of_a_queue_that_went_to_somebody_else(desk: BrokerDesk) -> None:
    producer = desk.client("p")
    reader, other = (desk.client(name, "consumer", "readers") for name in ("reader", "other"))
    reader.join("meters", consume_from=ConsumeFrom.EARLIEST)
    other.join("meters")
    lease = reader.acquire("meters", 0)
    number = reader.post(Pull, "meters", 0, 0, 10_000, 10_000, 0, "readers", lease.lease_epoch, 0, True)
    producer.send("meters", 0, [b"a"])
    reader.ask(ReleaseLease, "meters", 0, lease.lease_epoch, 1)
    other.acquire("meters", 0)
    producer.send("meters", 0, [b"b"])
    first, last = reader.answers(number)
    assert (first.next_offset, first.more, last.code) == (1, True, Code.FENCED)
    assert reader.payload_count == 1


def test_a_pull_that_stays_ends_when_its_topic_may_not_be_read_any_more(desk: BrokerDesk, client: DeskClient) -> None:
    producer, number = desk.client("p"), stay(client, 0)
    producer.send("meters", 0, [b"a"])
    desk.topic("meters", permission=PERMISSION_WRITE)
    producer.send("meters", 0, [b"b"])
    first, last = client.answers(number)
    assert (first.more, last.code) == (True, Code.FORBIDDEN)
    assert "zrmq topic update meters --permission rw" in last.message


def test_a_pull_that_stays_waits_for_a_client_that_does_not_read(desk: BrokerDesk, client: DeskClient) -> None:
    producer, number = desk.client("p"), stay(client, 0)
    producer.send("meters", 0, [b"a"])
    desk.not_reading.add(client.peer)
    producer.send("meters", 0, [b"b"])
    producer.send("meters", 0, [b"c"])
    assert facts(client, number) == [(PullStatus.FOUND, 1, True)]
    desk.not_reading.clear()
    desk.turn()
    assert facts(client, number)[1:] == [(PullStatus.FOUND, 3, True)]


def test_one_client_cannot_hold_pulls_without_bound(
    desk: BrokerDesk, client: DeskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.topic("wide", queue_count=5)
    monkeypatch.setattr(limits, "PULLS_HELD_PER_SESSION_MAX", 3)
    replies = [client.ask(Pull, "wide", queue_id, 0, 1000, 10_000) for queue_id in range(5)]
    assert [reply.code for reply in replies if reply] == [Code.TOO_MANY_REQUESTS] * 2
    for _ in range(11):
        desk.pass_ms(1_000)
        client.ask(Heartbeat)
    assert desk.core.pulling.held_count == 0
    assert client.ask(Pull, "meters", 0, 0, 1000, 0).status is PullStatus.NOTHING


def test_pulls_of_a_client_that_does_not_read_wait_until_it_has_read(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    desk.not_reading.add(client.peer)
    numbers = [client.post(Pull, "meters", queue_id, 0, 1000, 10_000) for queue_id in range(3)]
    other = desk.client("other")
    other.send("meters", 1, [b"b"])
    assert [client.reply(number) for number in numbers] == [None] * 3
    assert other.pull("meters", 0, 0)[1] == [b"a"]
    desk.not_reading.clear()
    desk.turn()
    assert client.bodies(numbers[0]) == [b"a"]
    assert client.bodies(numbers[1]) == [b"b"]
    assert client.reply(numbers[2]) is None
    assert desk.core.pulling.held_count == 1


def test_pulls_that_were_answered_may_leave_no_room_for_the_next(
    desk: BrokerDesk, client: DeskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is with each answer: room is looked for again, and the pulls left over are answered later."""
    for queue_id in range(4):
        client.send("meters", queue_id, [b"x"])
    desk.not_reading.add(client.peer)
    numbers = [client.post(Pull, "meters", queue_id, 0, 1000, 10_000) for queue_id in range(4)]
    before = len(client.inbox())
    monkeypatch.setattr(desk.core.outbox, "has_room", lambda peer: len(client.inbox()) < before + 2)
    desk.turn()
    desk.turn()
    assert [client.reply(number) is not None for number in numbers] == [True, True, False, False]
    monkeypatch.undo()
    desk.not_reading.clear()
    desk.turn()
    assert all(client.bodies(number) == [b"x"] for number in numbers)


def test_a_client_that_does_not_read_is_told_nothing_rather_than_data(desk: BrokerDesk, client: DeskClient) -> None:
    """A pull that may not wait, one whose wait ends, and one that a newer one replaces: each is answered, in few bytes."""
    client.send("meters", 0, [b"a", b"b"])
    desk.not_reading.add(client.peer)
    client.send("meters", 1, [b"a", b"b"])
    pulls = (1, 0), (0, 10_000), (0, 2_000)
    numbers = [client.post(Pull, "meters", queue_id, 1, 1000, wait_ms) for queue_id, wait_ms in pulls]
    cannot_wait, replaced, waits = numbers
    nothing = {number: Pulled(number, PullStatus.NOTHING, 1, 0, 2, 2) for number in numbers}
    assert [client.reply(number) for number in numbers] == [nothing[cannot_wait], nothing[replaced], None]
    desk.pass_ms(2_500)
    assert client.reply(waits) == nothing[waits]
    assert client.payload_count == 0
    desk.not_reading.clear()
    assert client.pull("meters", 0, 1)[1]


def test_a_newer_pull_ends_the_wait_of_one_that_had_no_room(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a", b"b"])
    desk.not_reading.add(client.peer)
    older = client.post(Pull, "meters", 0, 0, 1000, 10_000)
    desk.not_reading.clear()
    assert client.pull("meters", 0, 1)[1]
    assert client.reply(older) == Pulled(older, PullStatus.NOTHING, 0, 0, 2, 2)
    assert client.bodies(older) == []


def test_a_pull_whose_time_is_up_brings_nothing_of_a_queue_that_went_to_somebody_else(desk: BrokerDesk) -> None:
    desk.client("p").send("meters", 0, [b"a"])
    slow, other = (desk.client(name, "consumer", "readers") for name in ("slow", "other"))
    slow.join("meters", consume_from=ConsumeFrom.EARLIEST)
    other.join("meters")
    lease = slow.acquire("meters", 0)
    desk.not_reading.add(slow.peer)
    number = slow.post(Pull, "meters", 0, 0, 1000, 1_000, 0, "readers", lease.lease_epoch)
    slow.ask(ReleaseLease, "meters", 0, lease.lease_epoch, -1)
    other.acquire("meters", 0)
    desk.clock.advance(1_100)
    desk.not_reading.clear()
    desk.core.tick()
    desk.turn()
    assert slow.bodies(number) == []


def test_a_client_that_does_not_read_and_leaves_is_forgotten(desk: BrokerDesk, client: DeskClient) -> None:
    client.send("meters", 0, [b"a"])
    desk.not_reading.add(client.peer)
    client.post(Pull, "meters", 0, 0, 1000, 10_000)
    client.ask(Bye)
    desk.not_reading.clear()
    desk.turn()
    assert (client.payload_count, desk.core.pulling.held_count) == (0, 0)


def test_a_topic_without_read_permission_is_not_read(desk: BrokerDesk, client: DeskClient) -> None:
    desk.topic("inbox", permission=2)
    reply, _ = client.pull("inbox", 0, 0)
    assert isinstance(reply, Failed) and reply.code == Code.FORBIDDEN
