"""The producer's door on real brokers and sockets: every way of sending, and every wrong way to use it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

import zrmq
from tests.unit.real_cluster import await_brokers, running_cluster
from tests.unit.test_client_producing import one
from zrmq.client import accumulator as accumulator_module
from zrmq.client.batch import Batch, SendHandle, Span
from zrmq.client.link import Identity
from zrmq.client.outgoing import outgoing
from zrmq.errors import (
    BufferFullError,
    ClosedError,
    Code,
    ConfigError,
    ForkedClientError,
    InvalidArgumentError,
    PayloadTooLargeError,
    RequestRefusedError,
    RequestTimeoutError,
    TopicNotFoundError,
    UnreachableError,
    ZrmqError,
)
from zrmq.fabric import Fabric
from zrmq.message import FlushMode, Message, MessageQueue, Record
from zrmq.producer import Producer, _settled
from zrmq.protocol import limits
from zrmq.protocol.batch import decode_messages, iter_batches
from zrmq.protocol.requests import Pull, Pulled, PullStatus
from zrmq.transport.lane import Lane, open_lane

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Fabric]:
    """A broker in this process, where topics get two queues."""
    with zrmq.embedded(tmp_path / "data", default_queue_count=2) as fabric:
        yield fabric


@pytest.fixture
def producer(fabric: Fabric) -> Iterator[Producer]:
    with fabric.producer() as producer:
        yield producer


@pytest.fixture
def one_queue(tmp_path: Path) -> Iterator[Producer]:
    """A producer where every topic has one queue."""
    with zrmq.embedded(tmp_path / "data", default_queue_count=1) as fabric, fabric.producer() as producer:
        yield producer


def read(producer: Producer, topic: str) -> list[Message]:
    """All messages of a topic, queue by queue, read as a consumer would."""
    route = producer._core.route
    assert route is not None
    messages: list[Message] = []
    for queue in route.queues(topic):
        lane = open_lane(producer._thread.context, route.brokers[queue.broker_name].address, Identity("reader", "consumer"))
        messages += read_queue(lane, queue)
        lane.close()
    return messages


def read_queue(lane: Lane, queue: MessageQueue) -> list[Message]:
    messages: list[Message] = []
    offset = 0
    while True:
        reply, frames = lane.request(Pull, queue.topic, queue.queue_id, offset, 1 << 22, 0, timeout_ms=5_000)
        assert isinstance(reply, Pulled)
        if reply.status is not PullStatus.FOUND:
            return messages
        for frame in frames:
            for header, batch in iter_batches(frame):
                messages += decode_messages(header, batch, topic=queue.topic, broker_name=queue.broker_name)
        offset = reply.next_offset


def bodies(producer: Producer, topic: str) -> list[bytes]:
    return [message.body for message in read(producer, topic)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Another thread gets there; the test's own time limit is the bound."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)


# --- the ways of sending --------------------------------------------------------------------------------------------------


def test_send_returns_a_receipt_for_what_is_stored(producer: Producer) -> None:
    receipt = producer.send("meters", b"21.5", tag="kitchen", keys=["dev-7"], properties={"unit": "C"})
    (message,) = read(producer, "meters")
    assert (message.body, message.tag, list(message.keys), message.properties) == (b"21.5", "kitchen", ["dev-7"], {"unit": "C"})
    assert (message.message_id, message.queue, message.queue_offset) == (receipt.message_id, receipt.queue, receipt.queue_offset)
    assert (receipt.topic, receipt.durability, receipt.duplicate) == ("meters", FlushMode.SYNC, False)
    assert receipt.store_timestamp_ms == message.store_timestamp_ms


def test_one_at_a_time_takes_turns_over_the_queues_and_uses_the_lane(producer: Producer) -> None:
    producer.send("meters", b"first")  # by the I/O thread: its session came up meanwhile
    receipts = [producer.send("meters", b"%d" % number) for number in range(6)]
    assert {receipt.queue_id for receipt in receipts} == {0, 1}
    assert {receipt.message_id[:16] for receipt in receipts} == {f"{producer._lanes._producer_id:016X}"}
    assert sorted(bodies(producer, "meters")) == sorted([b"first", *(b"%d" % number for number in range(6))])


def test_send_async_gives_handles_that_become_receipts(producer: Producer) -> None:
    handles = [producer.send_async("meters", b"%d" % number) for number in range(2_500)]
    receipts = [handle.result(30_000) for handle in handles]
    assert len({receipt.message_id for receipt in receipts}) == 2_500
    assert [receipt.message_id for receipt in receipts] == [handle.message_id for handle in handles]
    stored = {message.message_id: message for message in read(producer, "meters")}
    assert all(stored[receipt.message_id].body == b"%d" % number for number, receipt in enumerate(receipts))
    assert all(stored[receipt.message_id].queue_offset == receipt.queue_offset for receipt in receipts)


def test_values_travel_as_messagepack(one_queue: Producer) -> None:
    values = [{"celsius": 21.5}, None, [1, "two"]]
    for value in values:
        one_queue.send("meters", value=value)
    assert [message.value() for message in read(one_queue, "meters")] == values


def test_callbacks_run_on_the_io_thread_and_may_send_on(producer: Producer) -> None:
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def on_stored(handle: SendHandle) -> None:
        seen.append((threading.current_thread().name, handle.result().queue_offset))
        producer.send_async("meters", b"from the callback").add_done_callback(lambda _: done.set())

    producer.flush()
    handle = producer.send_async("meters", b"first")
    handle.add_done_callback(on_stored)
    assert done.wait(30)
    assert seen[0][0] in ("zrmq-producer-DEFAULT_PRODUCER", threading.current_thread().name)
    assert sorted(bodies(producer, "meters")) == [b"first", b"from the callback"]


def test_send_batch_stores_all_and_gives_a_receipt_for_each(producer: Producer) -> None:
    records: list[Any] = [b"bytes", "text", bytearray(b"buffer"), Record(b"whole", "tag", ["k"], None, {"a": "b"})]
    receipts = producer.send_batch("meters", records)
    assert len(receipts) == 4
    stored = {message.message_id: message for message in read(producer, "meters")}
    assert [stored[receipt.message_id].body for receipt in receipts] == [b"bytes", b"text", b"buffer", b"whole"]
    assert stored[receipts[-1].message_id].tag == "tag"
    assert [receipt.message_id for receipt in receipts[1:3]] == [receipts[1].message_id, receipts[2].message_id]
    assert repr(receipts) == "<Receipts of 4 messages>"
    assert list(producer.send_batch("meters", [])) == []
    assert receipts[1:3] == [receipts[-3], receipts[-2]]
    for index in (4, -5):
        with pytest.raises(IndexError):
            receipts[index]


def test_send_batch_of_more_than_a_batch_takes(producer: Producer) -> None:
    receipts = producer.send_batch("meters", (b"%d" % number for number in range(3_000)))
    assert len({(receipt.queue_id, receipt.queue_offset) for receipt in receipts}) == 3_000
    stored = {message.message_id: message.body for message in read(producer, "meters")}
    assert [stored[receipt.message_id] for receipt in receipts] == [b"%d" % number for number in range(3_000)]


def test_of_records_that_fail_the_first_ones_error_is_raised_and_all_are_named(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = producer._accumulator.finish
    bound = MessageQueue("meters", "broker-a", 0)
    producer.send("meters", b"x")
    begin = producer._accumulator._next_sequence
    errors = {1_000: UnreachableError("of the second"), 3_000: RequestTimeoutError("of the fourth")}

    append_all = producer._accumulator.append_all
    all_added = threading.Event()

    def tell_when_added(*arguments: Any) -> None:
        append_all(*arguments)
        all_added.set()

    def fail_some(batch: Batch, outcome: Any, **options: Any) -> None:
        all_added.wait(30)  # else the rest is not even tried
        finish(batch, errors.get(batch.first_sequence - begin, outcome), **options)

    monkeypatch.setattr(producer._accumulator, "append_all", tell_when_added)
    monkeypatch.setattr(producer._accumulator, "finish", fail_some)
    with pytest.raises(UnreachableError, match="of the second") as caught:
        producer.send_batch("meters", [b"%d" % number for number in range(3_500)], queue=bound)
    assert caught.value.facts["failed_indexes"] == [*range(1_000, 2_000), *range(3_000, 3_500)]
    assert caught.value.facts["unknown_indexes"] == [*range(3_000, 3_500)]
    assert "Of 3500 records 2000 are stored, 500 may be" in caught.value.message


def test_whatever_it_failed_with_what_may_be_stored_is_named() -> None:
    desk = one()
    handles = [desk.send(b"%d" % number) for number in range(2)]
    sent = desk.send(b"2", MessageQueue("t", "a", 0))
    desk.cluster["a"].loses_answers = True
    desk.network.run_until(lambda: len(desk.cluster["a"].sends) == 2)
    kept = desk.send(b"3", timeout_ms=60_000)
    desk.core.close()
    spans = [Span(handles[0].batch, 0, 2), Span(sent.batch, 0, 1), Span(kept.batch, 0, 1)]
    with pytest.raises(ClosedError) as caught:
        _settled(spans, 4, None)
    assert (caught.value.facts["failed_indexes"], caught.value.facts["unknown_indexes"]) == ([0, 1, 2, 3], [0, 1, 2])


def test_once_a_record_has_failed_no_more_are_handed_over(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is gone would be tried for each of them, buffer after buffer."""
    finish = producer._accumulator.finish
    monkeypatch.setattr(
        producer._accumulator, "finish", lambda batch, outcome, **options: finish(batch, UnreachableError("gone"), **options)
    )
    records = [Record(bytes(8_000), message_group=f"g{number % 3}") for number in range(30_000)]  # more than the buffer takes
    producer.send_async("meters", b"x")
    with pytest.raises(UnreachableError, match="gone") as caught:
        producer.send_batch("meters", records)
    assert caught.value.facts["failed_indexes"] == list(range(30_000))
    assert producer._accumulator._next_sequence < 20_000 * 1_000, "most were never put into a batch"


class Text(str):
    """What passes for a str, and what an encoder does not know."""


def test_what_is_a_str_by_inheritance_is_sent_as_one(producer: Producer) -> None:
    for tag, keys, properties in (
        (Text("a"), ["k"], {"n": "v"}), ("a", [Text("k")], {"n": "v"}), ("a", ["k"], {Text("n"): "v"}),
        ("a", ["k"], {"n": Text("v")}), ("a", ["k"], {"n": "v"}),
    ):
        producer.send(Text("meters"), b"x", tag=tag, keys=keys, properties=properties)
        producer.send_async(Text("meters"), b"x", tag=tag, keys=keys, properties=properties, message_group=Text("g")).result()
    assert producer.send(Text("fresh"), b"x").topic == "fresh"
    stored = read(producer, "meters")
    assert [(message.tag, list(message.keys), message.properties) for message in stored] == [("a", ["k"], {"n": "v"})] * 10


@pytest.mark.parametrize(
    "option",
    [
        {}, {"tag": "a"}, {"keys": ["k"]}, {"properties": {"n": "v"}}, {"message_group": "g"}, {"timeout_ms": 60_000},
        {"tag": "a", "keys": ["k"], "properties": {"n": "v"}, "message_group": "g", "timeout_ms": 60_000},
    ],
)
@pytest.mark.parametrize("before", [{}, {"tag": "before"}])
def test_the_quick_way_leaves_nothing_out(fabric: Fabric, before: dict[str, Any], option: dict[str, Any]) -> None:
    """Once a topic has a filler, everything a message may have still goes along, and its own time still holds."""
    with fabric.producer(linger_ms=60_000) as producer:
        for _ in range(20):
            producer.send_async("meters", b"x", **before)
        fillers = producer._record_fillers if before else producer._body_fillers
        assert "meters" in fillers
        used_bytes = used(producer)
        handle = producer.send_async("meters", b"x", **option)
        if not {"message_group", "timeout_ms"} & option.keys():
            assert used(producer) - used_bytes == outgoing(b"x", **option)[1]
        assert handle.batch.timeout_ms == option.get("timeout_ms", 3_000)
        producer.flush()
        (message,) = [each for each in read(producer, "meters") if each.message_id == handle.message_id]
    assert (message.tag, list(message.keys)) == (option.get("tag"), option.get("keys", []))
    assert (message.properties, message.message_group) == (option.get("properties", {}), option.get("message_group"))


def used(producer: Producer) -> int:
    """Bytes of the buffer that are in open batches."""
    with producer._accumulator._lock:
        batches = list(producer._accumulator._open.values())
        for batch in batches:
            batch.stop_filler()
            producer._accumulator._start_filler(batch)
        return sum(batch.size_bytes - batch.room_bytes for batch in batches)


def test_records_of_several_groups_keep_what_they_bring(producer: Producer) -> None:
    records = [Record(b"%d" % number, tag=f"t{number}", message_group=f"g{number // 2}") for number in range(30)]
    producer.send_batch("meters", records)
    assert {message.body: message.tag for message in read(producer, "meters")} == {each.body: each.tag for each in records}


def test_a_list_that_is_changed_meanwhile_is_sent_as_it_was(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [b"%d" % number for number in range(2_500)]
    append_all = producer._accumulator.append_all

    def changed(*arguments: Any) -> None:
        records.clear()
        append_all(*arguments)

    monkeypatch.setattr(producer._accumulator, "append_all", changed)
    assert len(producer.send_batch("meters", records)) == 2_500


@pytest.mark.parametrize(
    ("records", "options", "text"),
    [
        (5, {}, "int"), ({"a": 1}, {}, "dict"), ([], {"message_group": 7}, "message group"),
        ([b"x"], {"selector": 3}, "selector"),
        ([b"x", 5, b"y"], {}, "Record 2 of 3"), ([b"x"], {"timeout_ms": 2_000.0}, "whole number"),
        ([Record(b"x", message_group="")], {}, "message group"),
    ],
)
def test_wrong_lists_are_refused(producer: Producer, records: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        producer.send_batch("meters", records, **options)


def test_after_the_end_a_send_says_that_the_producer_is_closed(fabric: Fabric) -> None:
    producer = fabric.producer()
    producer.send("meters", b"x")
    producer.close()
    for send in (producer.send, producer.send_async, producer.send_oneway, send_batch_of_one):
        with pytest.raises(ClosedError, match="producer is closed"):
            send("meters", b"x") if send is not send_batch_of_one else send(producer, "meters", b"x")


def test_send_batch_keeps_message_groups_in_their_queues(producer: Producer) -> None:
    records = [Record(b"%d" % number, message_group=f"g{number % 3}") for number in range(30)]
    receipts = producer.send_batch("meters", records)
    for group in range(3):
        assert len({receipt.queue for receipt in receipts[group::3]}) == 1
        offsets = [receipt.queue_offset for receipt in receipts[group::3]]
        assert offsets == sorted(offsets)


def test_one_way_messages_arrive(producer: Producer) -> None:
    for number in range(100):
        producer.send_oneway("meters", b"%d" % number, tag="t")
    producer.flush()
    wait_until(lambda: len(bodies(producer, "meters")) == 100)
    producer.send_oneway("meters", b"bound", message_group="g")
    producer.flush()
    wait_until(lambda: len(bodies(producer, "meters")) == 101)


def test_compressed_batches_are_read_like_others(fabric: Fabric) -> None:
    with fabric.producer(compression="zlib") as producer:
        producer.send_batch("meters", [bytes(1_000)] * 50)
        producer.send("meters", bytes(5_000))
        assert sorted(map(len, bodies(producer, "meters"))) == [1_000] * 50 + [5_000]


# --- order and queues -----------------------------------------------------------------------------------------------------


def test_what_one_thread_sends_is_in_order_however_it_is_sent(one_queue: Producer) -> None:
    expected = []
    for number in range(60):
        body = b"%d" % number
        expected.append(body)
        if number % 3 == 0:
            one_queue.send("meters", body)
        elif number % 3 == 1:
            one_queue.send_async("meters", body)
        else:
            one_queue.send_batch("meters", [body])
    assert bodies(one_queue, "meters") == expected


def test_a_message_group_has_the_documented_queue(producer: Producer) -> None:
    for group in ("dev-1", "dev-2", "gerät", "dev-3"):
        receipt = producer.send("meters", b"x", message_group=group)
        assert receipt.queue_id == crc32(group.encode()) % 2
        assert producer.send_async("meters", b"x", message_group=group).result().queue == receipt.queue
    assert {message.message_group for message in read(producer, "meters")} == {"dev-1", "dev-2", "gerät", "dev-3"}


def test_a_queue_can_be_given_or_picked(producer: Producer) -> None:
    queue = producer.send("meters", b"x").queue
    assert producer.send("meters", b"x", queue=queue).queue == queue
    seen: list[Any] = []

    def last(queues: Any) -> MessageQueue:
        seen.append(queues)
        return queues[-1]  # type: ignore[no-any-return]

    assert producer.send("meters", b"x", selector=last).queue_id == 1
    assert [queue.queue_id for queue in seen[0]] == [0, 1]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"queue": MessageQueue("meters", "broker-a", 9)}, "not a queue of topic"),
        ({"queue": MessageQueue("other", "broker-a", 0)}, "not a queue of topic"),
        ({"queue": 0}, "not a queue of topic"),
        ({"selector": lambda queues: None}, "not a queue of topic"),
        ({"selector": lambda queues: 1}, "not a queue of topic"),
        ({"selector": lambda queues: queues[0], "queue": MessageQueue("meters", "broker-a", 0)}, "not both"),
    ],
)
def test_a_wrong_queue_is_refused(producer: Producer, choice: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        producer.send("meters", b"x", **choice)
    assert bodies(producer, "meters") == []


def test_many_threads_share_one_producer(one_queue: Producer) -> None:
    def run(name: int) -> None:
        for number in range(50):
            send = one_queue.send if number % 2 else one_queue.send_async
            send("meters", b"%d %d" % (name, number))

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one_queue.flush()
    stored = [tuple(map(int, body.split())) for body in bodies(one_queue, "meters")]
    assert len(stored) == 200
    for name in range(4):
        assert [number for who, number in stored if who == name] == list(range(50))


# --- wrong arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["send", "send_async", "send_oneway"])
@pytest.mark.parametrize(
    ("topic", "arguments", "kind"),
    [
        ("a/b", {"body": b"x"}, InvalidArgumentError),
        ("", {"body": b"x"}, InvalidArgumentError),
        (b"meters", {"body": b"x"}, InvalidArgumentError),
        (["meters"], {"body": b"x"}, InvalidArgumentError),
        (None, {"body": b"x"}, InvalidArgumentError),
        ("t" * 128, {"body": b"x"}, InvalidArgumentError),
        ("meters", {}, InvalidArgumentError),
        ("meters", {"body": 21.5}, InvalidArgumentError),
        ("meters", {"body": b"x", "value": 1}, InvalidArgumentError),
        ("meters", {"body": b"x", "keys": "dev-7"}, InvalidArgumentError),
        ("meters", {"body": b"x", "tag": "a|b"}, InvalidArgumentError),
        ("meters", {"body": b"x", "properties": {"a": 1}}, InvalidArgumentError),
        ("meters", {"body": b"x", "message_group": 7}, InvalidArgumentError),
        ("meters", {"body": b"x", "timeout_ms": 0}, InvalidArgumentError),
        ("meters", {"body": b"x", "timeout_ms": "1"}, InvalidArgumentError),
        ("meters", {"body": bytes(limits.BODY_BYTES_MAX + 1)}, PayloadTooLargeError),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    producer: Producer, way: str, topic: Any, arguments: dict[str, Any], kind: type[ZrmqError]
) -> None:
    with pytest.raises(kind):
        getattr(producer, way)(topic, **arguments)
    assert producer._accumulator.buffered_bytes == 0


def test_every_send_takes_the_same() -> None:
    taken = [list(signature(way).parameters.values()) for way in (Producer.send, Producer.send_async, Producer.send_oneway)]
    assert taken[0] == taken[1] == taken[2]


def test_one_wrong_record_stops_the_whole_batch(producer: Producer) -> None:
    for records in ([b"x", 5], [b"x", Record(b"y", tag="a|b")], "text", b"bytes", Record(b"x")):
        with pytest.raises(InvalidArgumentError):
            producer.send_batch("meters", records)  # type: ignore[arg-type]
    producer.send("meters", b"only this")
    assert bodies(producer, "meters") == [b"only this"]


def test_the_largest_body_fits(producer: Producer) -> None:
    producer.send("meters", bytes(limits.BODY_BYTES_MAX))
    producer.send_async("meters", bytes(limits.BODY_BYTES_MAX), tag="t").result(30_000)
    assert list(map(len, bodies(producer, "meters"))) == [limits.BODY_BYTES_MAX] * 2


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"group": "a b"}, InvalidArgumentError),
        ({"buffer_bytes": 0}, InvalidArgumentError),
        ({"linger_ms": -1}, InvalidArgumentError),
        ({"block_when_full": 0}, InvalidArgumentError),
        ({"batch_records_max": 1 << 20}, InvalidArgumentError),
        ({"batch_bytes_max": 1 << 30}, InvalidArgumentError),
        ({"send_timeout_ms": "3000"}, InvalidArgumentError),
        ({"retries": True}, InvalidArgumentError),
        ({"compression": "gzip"}, InvalidArgumentError),
        ({"client_id": ""}, InvalidArgumentError),
        ({"client_id": "x" * 251}, InvalidArgumentError),
        ({"nameservers": "http://nowhere"}, ConfigError),
        ({"nameservers": []}, ConfigError),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing_behind(options: dict[str, Any], kind: type[ZrmqError]) -> None:
    with pytest.raises(kind):
        Producer(**options)


def test_the_nameservers_may_come_from_the_environment(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRMQ_NAMESERVERS", "tcp://127.0.0.1:1,tcp://127.0.0.1:2")
    with Producer() as producer:
        assert producer.nameservers == ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")


# --- nobody there ---------------------------------------------------------------------------------------------------------


def test_an_unreachable_nameserver_is_named_within_the_timeout() -> None:
    with Producer(nameservers="tcp://127.0.0.1:1", send_timeout_ms=300) as producer:
        for send in (producer.send, producer.send_async, producer.send_oneway):
            with pytest.raises(UnreachableError, match="tcp://127.0.0.1:1"):
                send("meters", b"x")


def test_a_topic_that_may_not_be_created_is_not_found(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path / "data", auto_create_topics=False) as fabric, fabric.producer() as producer:
        for send in (producer.send, producer.send_async):
            with pytest.raises(TopicNotFoundError) as caught:
                send("meters", b"x")
            assert caught.value.facts["topic"] == "meters"


BROKER = """
import sys, zrmq
data, nameservers, port = sys.argv[1:]
broker = zrmq.Broker(data, nameservers=nameservers, broker_port=int(port), ingest_port=0, default_queue_count=1)
broker.run(lambda: print(broker.address, flush=True))
"""


class BrokerProcess:
    """A broker that can be killed and started again at its port, with its data."""

    def __init__(self, data: Path, nameservers: str) -> None:
        self.data, self.nameservers, self.address = data, nameservers, ":0"

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        self.process = subprocess.Popen(
            [sys.executable, "-c", BROKER, str(self.data), self.nameservers, port], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def nameserver() -> Iterator[str]:
    with zrmq.NameServer(nameserver_port=0, start_grace_ms=0) as nameserver:
        yield nameserver.address


@pytest.fixture
def broker(tmp_path: Path, nameserver: str) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "data", nameserver)
    broker.start()
    yield broker
    broker.kill()


def test_brokers_that_are_all_down_are_named(nameserver: str, broker: BrokerProcess) -> None:
    await_brokers(nameserver, 1)
    with Producer(nameservers=nameserver, send_timeout_ms=700) as producer:
        producer.send("meters", b"x")
        broker.kill()
        wait_until(lambda: not producer._core.reachable)
        for wait in (producer.send, lambda topic, body: producer.send_async(topic, body).result()):
            with pytest.raises(UnreachableError, match="broker-a") as caught:
                wait("meters", b"x")
            assert caught.value.facts["brokers"] == {"broker-a": broker.address}
        producer.send_oneway("meters", b"lost")
        broker.start()


def send_batch_of_one(producer: Producer, topic: str, body: bytes, **options: Any) -> object:
    return producer.send_batch(topic, [body], **options)


@pytest.mark.parametrize("send", [Producer.send, Producer.send_async, send_batch_of_one])
def test_a_message_group_waits_for_a_broker_that_was_ended_in_order(
    tmp_path: Path, nameserver: str, send: Callable[..., Any]
) -> None:
    """It has left the routes at once, so the topic has no queue at all until it is back."""
    options: dict[str, Any] = {"nameservers": nameserver, "broker_port": 0, "ingest_port": 0}
    with Producer(nameservers=nameserver, send_timeout_ms=30_000) as producer:
        with zrmq.Broker(tmp_path / "data", **options):
            await_brokers(nameserver, 1)
            producer.send("meters", b"before", message_group="dev-7")
        wait_until(lambda: not producer._core.queues("meters"))
        with pytest.raises(UnreachableError, match="knows no broker; start one"):
            send(producer, "meters", b"too early", message_group="dev-7", timeout_ms=1)
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send, producer, "meters", b"after", message_group="dev-7")
            with zrmq.Broker(tmp_path / "data", **options):
                sent.result()
                producer.flush()
                assert bodies(producer, "meters") == [b"before", b"after"]


@pytest.mark.parametrize("send", [Producer.send, Producer.send_async, send_batch_of_one])
def test_a_message_group_waits_until_a_new_topic_has_all_its_queues(
    tmp_path: Path, nameserver: str, send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another broker's queues make the group's queue another one; what may go anywhere does not wait for them."""
    options: dict[str, Any] = {"nameservers": nameserver, "broker_port": 0, "ingest_port": 0, "default_queue_count": 1}
    monkeypatch.setattr("zrmq.client.waiting.SETTLE_MS", 600_000)
    moving = next(name for name in ("dev-1", "dev-2", "dev-3", "dev-4") if crc32(name.encode()) % 2)
    let_go = threading.Event()
    with (
        zrmq.Broker(tmp_path / "a", broker_name="a", **options),
        zrmq.Broker(tmp_path / "b", broker_name="b", **options) as late,
        Producer(nameservers=nameserver) as producer,
    ):
        await_brokers(nameserver, 2)
        late.reactor.call_soon_threadsafe(let_go.wait)
        assert producer.send("meters", b"free").queue.broker_name == "a"
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send, producer, "meters", b"bound", message_group=moving)
            wait_until(lambda: sent.done() or bool(producer._core._instance._waits))
            let_go.set()
            sent.result()
        for _ in range(2):
            send(producer, "meters", b"bound", message_group=moving)
        producer.flush()
        assert [message.queue.broker_name for message in read(producer, "meters") if message.body == b"bound"] == ["b"] * 3


@pytest.mark.parametrize("group", [None, "dev-7"])
def test_a_topic_that_takes_no_messages_says_so_at_once(fabric: Fabric, group: str | None) -> None:
    with fabric.producer(send_timeout_ms=60_000) as producer:
        producer.send("meters", b"before")
        fabric.admin().update_topic("meters", permission=4)
        wait_until(lambda: producer._core.route is not None and not producer._core.route.writable_queues("meters"))
        with pytest.raises(RequestRefusedError, match="takes no messages") as caught:
            producer.send("meters", b"after", message_group=group)
        assert caught.value.code is Code.FORBIDDEN


def test_a_killed_broker_that_comes_back_has_everything_once_and_in_order(nameserver: str, broker: BrokerProcess) -> None:
    await_brokers(nameserver, 1)
    with Producer(nameservers=nameserver, send_timeout_ms=30_000) as producer:
        producer.send("meters", b"0")
        handles = []
        for number in range(1, 20_001):
            handles.append(producer.send_async("meters", b"%d" % number))
            if number == 5_000:
                handles[2_000].result()
                broker.kill()
                broker.start()
        stuck = producer.send("meters", b"20001")
        producer.flush()
        assert all(handle.result().queue_offset == number for number, handle in enumerate(handles, 1))
        assert stuck.queue_offset == 20_001
        assert bodies(producer, "meters") == [b"%d" % number for number in range(20_002)]


def test_a_send_that_meets_the_broker_being_killed_is_stored_once(nameserver: str, broker: BrokerProcess) -> None:
    await_brokers(nameserver, 1)
    with Producer(nameservers=nameserver, send_timeout_ms=30_000) as producer:
        receipts = [producer.send("meters", b"0")]

        def restart_the_broker() -> None:
            wait_until(lambda: len(receipts) > 20)
            broker.kill()
            broker.start()

        killer = threading.Thread(target=restart_the_broker)
        killer.start()
        while killer.is_alive():
            receipts.append(producer.send("meters", b"%d" % len(receipts)))
        killer.join()
        assert bodies(producer, "meters") == [b"%d" % number for number in range(len(receipts))]
        assert [receipt.queue_offset for receipt in receipts] == list(range(len(receipts)))


# --- a full buffer --------------------------------------------------------------------------------------------------------


def hold(producer: Producer) -> None:
    """Let nothing out any more, as if every session were gone."""

    def forget_links() -> None:
        producer._core._links.clear()
        producer._core._publish_reachable()

    producer._thread.call(forget_links)


def test_a_full_buffer_raises_at_once_when_it_may_not_block(fabric: Fabric) -> None:
    producer = fabric.producer(buffer_bytes=10_000, block_when_full=False, send_timeout_ms=60_000)
    producer.send("meters", b"x")
    hold(producer)
    producer.send_async("meters", bytes(9_000))
    for send in (producer.send_async, producer.send_oneway, producer.send):
        with pytest.raises(BufferFullError) as caught:
            send("meters", bytes(900))
        assert caught.value.facts["buffer_bytes"] == 10_000
    producer.close(timeout_ms=0)


def test_a_batch_that_meets_a_full_buffer_says_what_is_stored(fabric: Fabric) -> None:
    with fabric.producer(buffer_bytes=10_000, block_when_full=False) as producer:
        producer.send("meters", b"before")
        records = [b"%d" % number + bytes(100) for number in range(200)]
        with pytest.raises(BufferFullError, match=r"Of 200 records \d+ are stored, 0 may be; see failed_indexes") as caught:
            producer.send_batch("meters", records)
        failed = caught.value.facts["failed_indexes"]
        stored = [record for index, record in enumerate(records) if index not in failed]
        assert sorted(bodies(producer, "meters")) == sorted([b"before", *stored])


def test_a_full_buffer_blocks_as_long_as_the_message_may_take(fabric: Fabric) -> None:
    producer = fabric.producer(buffer_bytes=10_000, send_timeout_ms=60_000)
    producer.send("meters", b"x")
    blocked = threading.Thread(target=lambda: raised.append(error_of(lambda: producer.send_async("meters", bytes(20_000)))))
    raised: list[BaseException | None] = []
    hold(producer)
    producer.send_async("meters", bytes(9_000))
    with pytest.raises(BufferFullError, match="buffer_bytes"):
        producer.send_async("meters", bytes(9_000), timeout_ms=20)
    blocked.start()
    wait_until(lambda: producer._accumulator.is_pressed)
    producer.close(timeout_ms=0)
    blocked.join(30)
    assert isinstance(raised[0], ClosedError)


def test_one_way_messages_wait_for_a_broker_that_stands_still(nameserver: str, broker: BrokerProcess) -> None:
    await_brokers(nameserver, 1)
    with Producer(nameservers=nameserver, buffer_bytes=1 << 20, block_when_full=False) as producer:
        producer.send_oneway("meters", b"x")
        producer.flush()
        broker.process.send_signal(signal.SIGSTOP)
        sent = 0
        with pytest.raises(BufferFullError):
            while sent < 300 << 20:
                sent += 250_000
                producer.send_oneway("meters", bytes(250_000), timeout_ms=60_000)
                with suppress(RequestTimeoutError):  # what the pipe does not take stays in the buffer
                    producer.flush(timeout_ms=300)
        broker.process.send_signal(signal.SIGCONT)
        producer.flush()


def error_of(function: Callable[[], object]) -> BaseException | None:
    try:
        function()
    except ZrmqError as error:
        return error
    return None


# --- the end --------------------------------------------------------------------------------------------------------------


def test_flush_waits_for_everything(producer: Producer) -> None:
    handles = [producer.send_async("meters", b"x") for _ in range(1_500)]
    producer.send_oneway("meters", b"y")
    producer.flush()
    assert all(handle.done() for handle in handles)
    producer.flush(timeout_ms=0)


def test_flush_says_how_much_is_left(producer: Producer) -> None:
    producer.send("meters", b"x")
    hold(producer)
    producer.send_async("meters", b"x", timeout_ms=60_000)
    with pytest.raises(RequestTimeoutError, match="1 messages") as caught:
        producer.flush(timeout_ms=10)
    assert caught.value.facts["messages"] == 1
    producer.close(timeout_ms=0)


def test_close_lets_out_what_is_there(fabric: Fabric) -> None:
    with fabric.producer(linger_ms=60_000) as first:
        handles = [first.send_async("meters", b"x") for _ in range(1_500)]
    assert all(handle.result().topic == "meters" for handle in handles)


def test_what_cannot_go_out_fails_and_is_counted(fabric: Fabric, capsys: pytest.CaptureFixture[str]) -> None:
    producer = fabric.producer()
    producer.send("meters", b"x")
    hold(producer)
    handles = [producer.send_async("meters", b"x", timeout_ms=60_000) for _ in range(30)]
    producer.close(timeout_ms=10)
    for handle in handles:
        with pytest.raises(ClosedError):
            handle.result()
    lines = [line for line in capsys.readouterr().err.splitlines() if "messages_given_up" in line]
    assert len(lines) == 1
    assert "messages=30" in lines[0]


def test_a_closed_producer_sends_nothing(fabric: Fabric) -> None:
    producer = fabric.producer()
    producer.send("meters", b"x")
    producer.close()
    producer.close()
    producer.flush()
    for topic in ("meters", "new"):
        for send in (producer.send, producer.send_async, producer.send_oneway):
            with pytest.raises(ClosedError):
                send(topic, b"x")
        with pytest.raises(ClosedError):
            producer.send_batch(topic, [b"x"])


def test_closing_goes_on_where_an_exception_ended_it(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = fabric.producer()
    handle = producer.send_async("meters", b"x")

    def interrupt(_: int | None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(producer, "_wait_for_all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        producer.close()
    producer.close()
    assert handle.done()
    with pytest.raises(ClosedError):
        producer._thread.post(print)


def test_a_signal_handler_may_close_while_its_thread_closes(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = fabric.producer()
    handle = producer.send_async("meters", b"x")

    def close_within(_: int | None) -> int:
        monkeypatch.undo()
        producer.close()
        return 0

    monkeypatch.setattr(producer, "_wait_for_all", close_within)
    producer.close()
    assert handle.done()


def test_closing_in_the_middle_of_a_send_changes_nothing(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a signal handler: it raises, and so does the send that it interrupted, most likely, and a `with` closes then."""

    def make_span(batch: Batch, first: int, count: int) -> Span:
        monkeypatch.undo()
        with pytest.raises(InvalidArgumentError, match="signal handler"):
            producer.close()
        return Span(batch, first, count)

    producer.send("meters", b"x")
    monkeypatch.setattr(accumulator_module, "Span", make_span)
    assert producer.send_async("meters", b"y").result().topic == "meters"


def test_closing_while_others_send_loses_nothing_silently(fabric: Fabric) -> None:
    producer = fabric.producer()
    producer.send("meters", b"x")
    stored: list[bytes] = []
    refused = threading.Semaphore(0)

    def run(name: int, send: Callable[[bytes], object]) -> None:
        number = 0
        while True:
            body = b"%d %d" % (name, number)
            try:
                send(body)
            except ClosedError:
                refused.release()
                return
            stored.append(body)
            number += 1

    handles: dict[bytes, SendHandle] = {}

    def send_later(body: bytes) -> None:
        handles[body] = producer.send_async("meters", body)

    ways: list[Callable[[bytes], object]] = [lambda body: producer.send("meters", body)] * 2 + [send_later]
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(ways)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(stored) > 500)
    producer.close()
    for thread in threads:
        thread.join(30)
    assert refused.acquire(timeout=0)
    with fabric.producer() as reader:
        reader.send("meters", b"x")
        there = bodies(reader, "meters")
    assert set(stored) <= set(there)
    assert len(there) == len(set(there)) + 1  # the two x
    assert all(handle.result().topic == "meters" for handle in handles.values())


def test_waiting_calls_are_refused_in_callbacks(producer: Producer) -> None:
    errors: list[BaseException | None] = []
    done = threading.Event()

    def on_stored(_: SendHandle) -> None:
        for call in (
            lambda: producer.send("meters", b"x"), lambda: producer.send_batch("meters", [b"x"]), producer.close,
            lambda: producer.send_async("unknown", b"x"), lambda: producer.send_async("meters", b"x").result(),
        ):
            errors.append(error_of(call))
        done.set()

    producer.send("meters", b"x")
    producer._thread.post(lambda: on_stored(None))  # type: ignore[arg-type]
    assert done.wait(30)
    assert [type(error) for error in errors] == [InvalidArgumentError] * 5


def test_a_forked_child_is_told_to_make_its_own(fabric: Fabric) -> None:
    with fabric.producer() as producer:
        producer.send("meters", b"x")
        handle = producer.send_async("meters", b"x")
        handle.result()
        ends = os.pipe()
        producer._accumulator._lock.acquire()  # as another thread may at the moment of the fork
        child = os.fork()
        if child == 0:
            calls: list[Callable[[], object]] = [
                lambda: producer.send("meters", b"x"), lambda: producer.send_async("meters", b"x"),
                lambda: producer.send_batch("meters", [b"x"]), lambda: producer.send_oneway("meters", b"x"),
                lambda: producer.send("new", b"x"),
            ]
            text = " ".join(type(error_of(call)).__name__ for call in calls)
            producer.close()
            os.write(ends[1], text.encode())
            os._exit(0)
        producer._accumulator._lock.release()
        os.waitpid(child, 0)
        os.close(ends[1])
        assert os.read(ends[0], 1_000).decode().split() == [ForkedClientError.__name__] * 5
        os.close(ends[0])
        assert producer.send("meters", b"parent").topic == "meters"


def test_what_it_is_embedded_in_may_be_closed_first(tmp_path: Path) -> None:
    fabric = zrmq.embedded(tmp_path / "data")
    producer = Producer(**fabric._where())
    producer.send_async("meters", b"x").result()  # not send(): its lane would be waited for
    hold(producer)
    handle = producer.send_async("meters", b"x", timeout_ms=500)
    fabric.close()
    with pytest.raises(ZrmqError):
        handle.result()
    with pytest.raises(ZrmqError):
        producer.send("meters", b"x", timeout_ms=500)
    producer.close()


def test_a_producer_that_nobody_holds_warns_and_ends(fabric: Fabric) -> None:
    producer = Producer(**fabric._where())
    producer.send("meters", b"x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del producer
        gc.collect()
    assert any("was never closed" in str(warning.message) for warning in caught)


SCRIPT = """
import sys, zrmq
producer = zrmq.Producer(nameservers=sys.argv[1])
for number in range(5000):
    producer.send_async("meters", b"x")
"""


def test_a_program_that_just_ends_has_sent_everything(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as nameservers, Producer(nameservers=nameservers) as producer:
        subprocess.run([sys.executable, "-c", SCRIPT, nameservers], cwd=ROOT, check=True, timeout=50)
        producer.send("meters", b"x")
        assert len(bodies(producer, "meters")) == 5_001


FORKING = """
import os, sys, zrmq
producer = zrmq.Producer(nameservers=sys.argv[1])
producer.send("meters", b"x")
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
producer.close()
"""


def test_a_forked_child_ends_without_a_word(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as nameservers:
        words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, nameservers]  # fork() itself warns since 3.12
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")


def test_codes_of_errors_are_those_of_the_protocol(producer: Producer) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        producer.send("a/b", b"x")
    assert caught.value.code is Code.ILLEGAL_TOPIC
