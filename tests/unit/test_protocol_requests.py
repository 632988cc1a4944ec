"""Header frames: round trips, growth by appended fields, bounds of every number and name, and how refusals find their asker."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.samples import REPLIES, REQUESTS
from zrmq.errors import Code, InvalidFrameError
from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol import limits, requests
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    CommitOffsets,
    DeleteTopic,
    DescribeTopics,
    Done,
    Failed,
    Heartbeat,
    Hello,
    JoinGroup,
    Pull,
    QueryOffsets,
    QueryRoute,
    RegisterBroker,
    ReleaseLease,
    Request,
    Send,
    Sent,
    UnregisterBroker,
    decode_reply,
    decode_request,
    encode,
    peek_number,
)

NATURAL = st.integers(0, (1 << 63) - 1)
NAME = st.text(max_size=20)


def packed(*fields: Any) -> bytes:
    """A header written by the reference library."""
    return msgpack.packb(list(fields))


@given(NATURAL, NATURAL, NAME, st.integers(0, (1 << 32) - 1), NATURAL)
def test_sends_round_trip(number: int, timeout_ms: int, topic: str, queue_id: int, follows: int) -> None:
    request = Send(number, timeout_ms, topic, queue_id, follows)
    assert decode_request(encode(request)) == request


QUEUE_OFFSET = st.builds(requests.QueueOffset, NAME, st.integers(0, 1024), NATURAL, NATURAL)


@given(NATURAL, st.lists(QUEUE_OFFSET, max_size=5), st.booleans())
def test_commits_round_trip(number: int, offsets: list[requests.QueueOffset], reset: bool) -> None:
    request = CommitOffsets(number, 0, offsets, reset)
    assert decode_request(encode(request)) == request


SUBSCRIPTION = st.builds(requests.Subscription, NAME, NAME)


@given(st.sampled_from(MessageModel), st.lists(SUBSCRIPTION, max_size=5), st.sampled_from(ConsumeFrom))
def test_joins_round_trip(model: MessageModel, wanted: list[requests.Subscription], consume_from: ConsumeFrom) -> None:
    request = JoinGroup(1, 0, model, wanted, consume_from)
    assert decode_request(encode(request)) == request


FACT = st.none() | st.booleans() | NATURAL | st.floats(allow_nan=False) | NAME | st.lists(NAME)
FACTS = st.dictionaries(NAME, FACT, max_size=5)


@given(NATURAL, st.sampled_from(Code), st.text(), FACTS)
def test_refusals_round_trip(number: int, code: Code, message: str, facts: dict[str, Any]) -> None:
    reply = Failed(number, code, message, facts)
    assert decode_reply(encode(reply)) == reply


# --- growth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", REQUESTS, ids=lambda value: type(value).__name__)
def test_fields_of_the_future_are_ignored(value: Request) -> None:
    frame = msgpack.packb([*msgpack.unpackb(encode(value)), "new", [1, {"deep": b"x"}]])
    assert decode_request(frame) == value


@pytest.mark.parametrize("value", REPLIES, ids=lambda value: type(value).__name__)
def test_fields_of_a_future_reply_are_ignored(value: requests.Reply) -> None:
    assert decode_reply(msgpack.packb([*msgpack.unpackb(encode(value)), None, 7])) == value


def test_fields_with_a_default_may_be_left_out() -> None:
    assert decode_request(packed(30, 1, 0, "meters", 5)) == Send(1, 0, "meters", 5)
    assert decode_request(packed(31, 1, 0, "meters", 5, 0, 1, 2)) == Pull(1, 0, "meters", 5, 0, 1, 2)
    assert decode_request(packed(21, 1, 0, "meters")) == DeleteTopic(1, 0, "meters", topic_id=0)
    assert decode_request(packed(11, 1, 0, "broker-a", 0, 3)) == UnregisterBroker(1, 0, "broker-a", 0, 3, store_id="")
    assert decode_request(packed(1, 1, 0, 1, "c", 1, "admin")) == Hello(1, 0, 1, "c", 1, "admin")
    assert decode_request(packed(20, 1, 0, ["meters"])).config == TopicConfig("meters", 4, 6, FlushMode.SYNC)
    assert decode_reply(packed(130, 1, 0, 5, "sync")) == Sent(1, 0, 5, FlushMode.SYNC)


@pytest.mark.parametrize("frame", [packed(30, 1, 0, "meters"), packed(30, 1), packed(30), packed()])
def test_fields_without_a_default_may_not(frame: bytes) -> None:
    with pytest.raises(InvalidFrameError, match="cannot be read"):
        decode_request(frame)


def test_tags_are_used_once() -> None:
    kinds = [*requests.AnyRequest.__args__, *requests.AnyReply.__args__]
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert len(set(tags)) == len(tags)
    assert all(tag < 100 for tag in tags[: len(requests.AnyRequest.__args__)])
    assert all(tag >= 100 for tag in tags[len(requests.AnyRequest.__args__) :])


@pytest.mark.parametrize("tag", [0, 99, 100, 1 << 40, -1])
def test_an_unknown_request(tag: int) -> None:
    with pytest.raises(InvalidFrameError, match=r"at `\$\[0\]`"):
        decode_request(packed(tag, 1, 0))


def test_requests_are_no_replies() -> None:
    with pytest.raises(InvalidFrameError):
        decode_reply(encode(Heartbeat(1, 0)))
    with pytest.raises(InvalidFrameError):
        decode_request(encode(Done(1)))


# --- bounds -------------------------------------------------------------------------------------------------------------

TOO_LARGE = 1 << 63


@pytest.mark.parametrize(
    "frame",
    [
        packed(2, -1, 0),
        packed(2, TOO_LARGE, 0),
        packed(2, 1, -1),
        packed(2, 1, TOO_LARGE),
        packed(2, 1.0, 0),
        packed(2, True, 0),
        packed(2, None, 0),
        packed(2, "1", 0),
        packed(30, 1, 0, "meters", -1),
        packed(30, 1, 0, "meters", 1 << 32),
        packed(30, 1, 0, "meters", 0, -1),
        packed(30, 1, 0, b"meters", 0),
        packed(30, 1, 0, "m" * 256, 0),
        packed(31, 1, 0, "meters", 0, -1, 0, 0),
        packed(31, 1, 0, "meters", 0, TOO_LARGE, 0, 0),
        packed(31, 1, 0, "meters", 0, 0, -1, 0),
        packed(31, 1, 0, "meters", 0, 0, 0, -1),
        packed(31, 1, 0, "meters", 0, 0, 0, 0, -1),
        packed(32, 1, 0, "meters", [-1]),
        packed(32, 1, 0, "meters", [], -3),
        packed(32, 1, 0, "meters", [], TOO_LARGE),
        packed(43, 1, 0, "meters", 0, -1),
        packed(43, 1, 0, "meters", 0, 0, -2),
        packed(44, 1, 0, [["meters", 0, -1]]),
        packed(44, 1, 0, [["meters", 0, TOO_LARGE]]),
        packed(44, 1, 0, [["meters", 0, 0, -1]]),
        packed(20, 1, 0, ["meters", -1]),
        packed(20, 1, 0, ["meters", 4, 6, "never"]),
        packed(20, 1, 0, ["meters", 4, 6, "sync", -1]),
        packed(20, 1, 0, ["meters", 4, 6, "sync", None, TOO_LARGE]),
        packed(1, 1, 0, 1, "c" * 256, 1, "admin"),
        packed(1, 1, 0, 1, "c", 1, "admin", "g" * 256),
        packed(1, 1, 0, 1, "c", 1, "admin", "", "i" * 256),
        packed(1, 1, 0, 1, "c", 1, "admin", "", "", "l" * 256),
        packed(1, 1, 0, 1, "c", 1, "admin", "", "", "", bytes(4_097)),
        packed(40, 1, 0, "sharing", []),
        packed(40, 1, 0, "clustering", [], "newest"),
        packed(40, 1, 0, "clustering", [], "latest", -1),
        packed(12, 1, 0, ["m" * 256]),
    ],
)
def test_numbers_and_names_that_no_table_can_hold(frame: bytes) -> None:
    with pytest.raises(InvalidFrameError, match="cannot be read"):
        decode_request(frame)


def test_the_largest_numbers_pass() -> None:
    most, queue = (1 << 63) - 1, (1 << 32) - 1
    for request in (
        Pull(most, most, "m" * 255, queue, most, most, most, (1 << 64) - 1, "g" * 255, most),
        ReleaseLease(1, 0, "meters", queue, most, -1),
        QueryOffsets(1, 0, "meters", [queue], -2),
        QueryOffsets(1, 0, "meters", [queue], most),
        QueryRoute(1, 0, ["*"], (1 << 64) - 1),
    ):
        assert decode_request(encode(request)) == request


def test_headers_have_a_limit() -> None:
    frame = encode(DescribeTopics(1, 0, ["m" * 200] * 20_000))
    assert len(frame) > limits.HEADER_BYTES_MAX
    with pytest.raises(InvalidFrameError, match="the limit is") as raised:
        decode_request(frame)
    assert raised.value.code is Code.PAYLOAD_TOO_LARGE
    with pytest.raises(InvalidFrameError, match="the limit is"):
        decode_reply(bytes(limits.REPLY_HEADER_BYTES_MAX + 1))


def test_a_registration_of_all_topics_fits() -> None:
    """Be all names as long as they may be."""
    longest, broker_name = "x" * limits.NAME_CHARS_MAX, "b" * limits.GROUP_CHARS_MAX
    broker = requests.BrokerInfo(broker_name, broker_name, 0, "MASTER", (1 << 63) - 1, longest, longest, True, longest)
    name = "t" * (limits.TOPIC_CHARS_MAX - 5)
    topics = [requests.TopicRoute(f"{name}{number:05}", broker.broker_name, 1024, 6) for number in range(limits.TOPICS_MAX)]
    request = RegisterBroker((1 << 63) - 1, limits.TIMEOUT_MS_MAX, broker, (1 << 63) - 1, topics)
    assert decode_request(encode(request)) == request
    reply = requests.Route((1 << 63) - 1, (1 << 63) - 1, [broker] * 3, topics * 3)
    assert decode_reply(encode(reply)) == reply


# --- who asked ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 63) - 1), st.lists(st.text(), max_size=3))
def test_the_number_of_any_array_is_found(tag: int, number: int, rest: list[str]) -> None:
    assert peek_number(packed(tag, number, *rest)) == number


@pytest.mark.parametrize(
    "number", [b"\7", b"\xcc\7", b"\xcd\0\7", b"\xce\0\0\0\7", b"\xd0\7", b"\xd1\0\7", b"\xd3" + bytes(7) + b"\7"]
)
def test_a_number_may_be_written_in_more_bytes_than_it_needs(number: bytes) -> None:
    assert peek_number(b"\x92\x02" + number) == 7


@pytest.mark.parametrize("count", [2, 15, 16, 65_535, 65_536])
def test_the_number_is_found_in_arrays_of_any_length(count: int) -> None:
    assert peek_number(packed(*[7, 1234], *[None] * (count - 2))) == 1234


@pytest.mark.parametrize("value", REQUESTS, ids=lambda value: type(value).__name__)
def test_the_number_of_every_request_is_found(value: Request) -> None:
    assert peek_number(encode(value)) == value.number
    assert peek_number(encode(value)[:-1]) == value.number
    assert peek_number(encode(value) + b"\xc1") == value.number


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\x00", b"\x91\x01", b"\x92\x01", b"\x92\x01\xcd\x01", b"\x92\xa1x\x05", b"\x92\x01\xff", b"\x92\x01\xd0\xfb",
        b"\x92\x01\xc0", b"\x92\x01\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xdc\x00", b"\xdd\x00\x00", b"\x82\x01\x05\x02\x05",
        b"\x92\x01\x00", packed(1, 1.5), packed([1], 5), packed(1, "5"),
    ],
)
def test_where_there_is_no_number(frame: bytes) -> None:
    assert peek_number(frame) == 0


@given(st.binary(max_size=64))
def test_looking_for_a_number_never_fails(frame: bytes) -> None:
    assert 0 <= peek_number(frame) < 1 << 63


@given(st.binary(max_size=64))
def test_a_number_is_the_one_that_decoding_finds(frame: bytes) -> None:
    """Where the generic decoder reads an array with two natural numbers in front, the look at the bytes finds the same."""
    try:
        head = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return
    if isinstance(head, list) and len(head) > 1 and all(type(part) is int and 0 <= part < 1 << 63 for part in head[:2]):
        assert peek_number(frame) == head[1]
