"""The values users meet."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import InvalidFrameError
from zrmq.message import BatchSource, FlushMode, Message, MessageQueue, Record, SendReceipt, message_id

SOURCE = BatchSource("meters", "broker-a", 3, 100, 1_795_000_000_123, 1_795_000_000_100, 0xABC, 500)


def test_a_message_finds_in_its_batch_what_is_the_same_for_all() -> None:
    message = Message(b"21.5", SOURCE, 2, "kitchen", ["dev-7"], {"unit": "C"}, "house-1")
    assert message.topic == "meters"
    assert message.queue == MessageQueue("meters", "broker-a", 3)
    assert message.queue_offset == 102
    assert message.message_id == "0000000000000ABC00000000000001F6"
    assert (message.store_timestamp_ms, message.born_timestamp_ms) == (1_795_000_000_123, 1_795_000_000_100)
    assert (message.tag, message.keys, message.message_group) == ("kitchen", ["dev-7"], "house-1")
    assert message.properties == {"unit": "C"}
    assert message.delivery_attempt == 1


def test_a_bare_message() -> None:
    message = Message(b"", SOURCE, 0)
    assert (message.tag, message.keys, message.properties, message.message_group) == (None, (), {}, None)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 63) - 1))
def test_message_ids_are_unique_and_of_one_length(producer_id: int, sequence: int) -> None:
    text = message_id(producer_id, sequence)
    assert len(text) == 32
    assert divmod(int(text, 16), 1 << 64) == (producer_id, sequence)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(), st.lists))
def test_values_travel_as_messagepack(value: object) -> None:
    assert Message(msgpack.packb(value), SOURCE, 0).value() == value


def test_maps_may_have_keys_of_any_kind() -> None:
    assert Message(msgpack.packb({1: "a", "b": 2}), SOURCE, 0).value() == {1: "a", "b": 2}


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\xa5abc", b"21.5", b"\xa1\xff", b"\x91" * 5_000, b"\x81\x80\x01", b"\xdd\xff\xff\xff\xff"]
)
def test_a_body_that_is_no_value(body: bytes) -> None:
    with pytest.raises(InvalidFrameError, match="read message.body instead"):
        Message(body, SOURCE, 0).value()


def test_queues_sort_by_topic_broker_and_number() -> None:
    queues = [MessageQueue("b", "x", 0), MessageQueue("a", "y", 1), MessageQueue("a", "x", 10), MessageQueue("a", "x", 9)]
    assert [(queue.topic, queue.broker_name, queue.queue_id) for queue in sorted(queues)] == [
        ("a", "x", 9), ("a", "x", 10), ("a", "y", 1), ("b", "x", 0),
    ]
    assert len({*queues, MessageQueue("b", "x", 0)}) == 4


def test_receipts_know_their_queue_and_stay_as_they_are() -> None:
    receipt = SendReceipt("meters", "broker-a", 3, 102, "0" * 32, 5, FlushMode.SYNC)
    assert receipt.queue == MessageQueue("meters", "broker-a", 3)
    assert not receipt.duplicate
    with pytest.raises(AttributeError):
        receipt.queue_offset = 5  # type: ignore[misc]


def test_a_record_needs_a_body_only() -> None:
    assert Record(b"x") == Record(b"x", None, (), None, None)
