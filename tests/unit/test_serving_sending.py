"""Send: what is stored, what is recognized, what is refused, and when the answer may go out."""

from __future__ import annotations

import pytest

from tests.unit.broker_desk import BrokerDesk, DeskClient
from zrmq.errors import Code
from zrmq.message import FlushMode
from zrmq.protocol.limits import BATCH_BYTES_MAX
from zrmq.protocol.requests import Failed, Pull, Pulled, Send, Sent, encode


@pytest.fixture
def desk() -> BrokerDesk:
    desk = BrokerDesk()
    desk.topic("meters")
    desk.topic("notes", flush_mode=FlushMode.ASYNC)
    return desk


@pytest.fixture
def producer(desk: BrokerDesk) -> DeskClient:
    return desk.client("p1", "producer", "g")


def test_offsets_are_dense_per_queue(producer: DeskClient) -> None:
    assert [producer.send("meters", 0, [b"a", b"b"]).base_offset for _ in range(3)] == [0, 2, 4]
    assert producer.send("meters", 1, [b"c"]).base_offset == 0


def test_a_sync_send_is_answered_only_after_the_flush(desk: BrokerDesk, producer: DeskClient) -> None:
    number = producer.post(Send, "meters", 0, 0, payload=[producer.batch([b"x"])])
    desk.turn(flush=False)
    assert producer.reply(number) is None
    desk.turn()
    assert producer.reply(number) == Sent(number, 0, desk.clock.time_ms(), FlushMode.SYNC)


def test_an_async_send_is_answered_after_the_write(desk: BrokerDesk, producer: DeskClient) -> None:
    number = producer.post(Send, "notes", 0, 0, payload=[producer.batch([b"x"])])
    assert producer.reply(number) is None
    desk.turn(flush=False)
    assert producer.reply(number).durability is FlushMode.ASYNC


def test_a_message_is_not_seen_before_it_is_flushed(desk: BrokerDesk, producer: DeskClient) -> None:
    producer.post(Send, "meters", 0, 0, payload=[producer.batch([b"x"])])
    desk.turn(flush=False)
    number = producer.post(Pull, "meters", 0, 0, 1000, 0)
    reply = producer.reply(number)
    assert isinstance(reply, Pulled) and reply.max_offset == 0
    desk.turn()
    reply, bodies = producer.pull("meters", 0, 0)
    assert bodies == [b"x"]


def test_a_resent_batch_gets_its_first_receipt(desk: BrokerDesk, producer: DeskClient) -> None:
    batch = producer.batch([b"a", b"b"])
    first = producer.ask(Send, "meters", 0, 0, payload=[batch])
    producer.send("meters", 0, [b"c"])
    again = producer.ask(Send, "meters", 0, 0, payload=[batch])
    assert again.duplicate and again.base_offset == first.base_offset
    assert producer.pull("meters", 0, 0)[1] == [b"a", b"b", b"c"]


def test_a_resent_batch_is_recognized_after_a_power_cut(desk: BrokerDesk, producer: DeskClient) -> None:
    batch = producer.batch([b"a"])
    producer.ask(Send, "meters", 0, 0, payload=[batch])
    desk.crash()
    back = desk.client("p1", "producer", "g", epoch=2)
    assert back.ask(Send, "meters", 0, 0, payload=[batch]).duplicate
    assert back.pull("meters", 0, 0)[1] == [b"a"]


def test_the_receipt_of_a_duplicate_waits_for_the_flush_too(desk: BrokerDesk, producer: DeskClient) -> None:
    batch = producer.batch([b"a"])
    numbers = [producer.post(Send, "meters", 0, 0, payload=[batch]) for _ in range(2)]
    desk.turn(flush=False)
    assert [producer.reply(number) for number in numbers] == [None, None]
    desk.turn()
    assert [producer.reply(number).duplicate for number in numbers] == [False, True]


def test_a_batch_does_not_overtake_the_one_it_follows(desk: BrokerDesk, producer: DeskClient) -> None:
    first, second = producer.batch([b"1", b"2"]), producer.batch([b"3"])
    refused = producer.ask(Send, "meters", 0, 2, payload=[second])
    assert isinstance(refused, Failed) and refused.code == Code.OUT_OF_ORDER
    producer.ask(Send, "meters", 0, 0, payload=[first])
    assert producer.ask(Send, "meters", 0, 2, payload=[second]).base_offset == 2
    assert producer.pull("meters", 0, 0)[1] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("topic", "queue_id", "payload", "code"),
    [
        ("unknown", 0, [b""], Code.TOPIC_NOT_FOUND),
        ("meters", 4, [b""], Code.BAD_REQUEST),
        ("meters", -1, [b""], Code.BAD_REQUEST),
        ("meters", 0, [], Code.BAD_REQUEST),
        ("meters", 0, [b"", b""], Code.BAD_REQUEST),
        ("meters", 0, [b"no batch"], Code.BAD_REQUEST),
        ("meters", 0, [bytes(BATCH_BYTES_MAX + 1)], Code.BAD_REQUEST),
    ],
)
def test_what_cannot_be_stored_is_refused(
    producer: DeskClient, topic: str, queue_id: int, payload: list[bytes], code: Code
) -> None:
    reply = producer.ask(Send, topic, queue_id, 0, payload=payload)
    assert isinstance(reply, Failed) and reply.code == code and reply.message.endswith(".")


def test_a_batch_damaged_on_the_way_is_refused(producer: DeskClient) -> None:
    batch = bytearray(producer.batch([b"hello"]))
    batch[-1] ^= 1
    assert producer.ask(Send, "meters", 0, 0, payload=[bytes(batch)]).code == Code.MESSAGE_CORRUPTED
    assert producer.pull("meters", 0, 0)[1] == []


def test_a_topic_without_write_permission_takes_nothing(desk: BrokerDesk, producer: DeskClient) -> None:
    desk.topic("archive", permission=4)
    assert producer.send("archive", 0, [b"x"]).code == Code.FORBIDDEN


def test_one_way_sends_are_stored_and_bad_ones_counted(desk: BrokerDesk, producer: DeskClient) -> None:
    desk.core.ingest(b"", [encode(Send(0, 0, "meters", 2)), producer.batch([b"one-way"])])
    desk.core.ingest(b"", [encode(Send(0, 0, "unknown", 2)), producer.batch([b"lost"])])
    desk.core.ingest(b"", [b"\xc1"])
    desk.turn()
    assert producer.pull("meters", 2, 0)[1] == [b"one-way"]
    assert desk.core.facts()["batches_refused_one_way"] == 2


def test_a_stopping_broker_takes_nothing_new_and_answers_what_it_took(desk: BrokerDesk, producer: DeskClient) -> None:
    taken = producer.post(Send, "meters", 0, 0, payload=[producer.batch([b"x"])])
    desk.core.stop()
    assert producer.send("meters", 0, [b"y"]).code == Code.STOPPING
    assert isinstance(producer.reply(taken), Sent)


def test_a_stopping_broker_answers_the_repetition_of_what_it_has_stored(desk: BrokerDesk, producer: DeskClient) -> None:
    batch = producer.batch([b"x"])
    first = producer.ask(Send, "meters", 0, 0, payload=[batch])
    desk.core.stop()
    again = producer.ask(Send, "meters", 0, 0, payload=[batch])
    assert (again.duplicate, again.base_offset) == (True, first.base_offset)
    assert producer.send("meters", 0, [b"y"]).code == Code.STOPPING


def test_what_was_stored_before_the_topic_became_read_only_is_recognized(desk: BrokerDesk, producer: DeskClient) -> None:
    batch = producer.batch([b"x"])
    first = producer.ask(Send, "meters", 0, 0, payload=[batch])
    desk.topic("meters", permission=4)
    again = producer.ask(Send, "meters", 0, 0, payload=[batch])
    assert (again.duplicate, again.base_offset) == (True, first.base_offset)
    assert producer.send("meters", 0, [b"y"]).code == Code.FORBIDDEN


def test_a_full_disk_refuses_and_takes_again_when_space_returns(desk: BrokerDesk, producer: DeskClient) -> None:
    desk.files.capacity_bytes = desk.files.used_bytes
    replies = [producer.send("meters", 0, [bytes(100_000)]) for _ in range(30)]
    refused = [reply for reply in replies if isinstance(reply, Failed)]
    assert refused and {reply.code for reply in refused} == {Code.DISK_FULL}
    stored = len(replies) - len(refused)
    desk.files.capacity_bytes = None
    desk.pass_ms(2_000)
    assert isinstance(producer.send("meters", 0, [b"again"]), Sent)
    assert producer.pull("meters", 0, 0, bytes_max=8 << 20)[0].max_offset == stored + 1


def test_a_failed_flush_promises_nothing_more(desk: BrokerDesk, producer: DeskClient) -> None:
    desk.files.fail("fdatasync")
    assert producer.send("meters", 0, [b"x"]).code == Code.STORE_FAILED
    assert producer.send("meters", 0, [b"y"]).code == Code.STORE_FAILED
