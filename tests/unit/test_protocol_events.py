"""Log events: round trips, growth, and bytes that are none."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.samples import EVENTS
from zrmq.errors import InvalidFrameError
from zrmq.message import FlushMode
from zrmq.protocol import events
from zrmq.protocol.events import (
    BrokerStopped,
    GroupSubscribed,
    LeaseGranted,
    OffsetsCommitted,
    TopicConfig,
    TopicPut,
    decode_event,
    encode_event,
)
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX

NATURAL = st.integers(0, (1 << 63) - 1)
ID = st.integers(0, (1 << 32) - 1)
COUNT = st.integers(0, QUEUES_PER_TOPIC_MAX)
NAME = st.text(max_size=20)

ANY_EVENT = st.one_of(
    st.builds(events.BrokerStarted, NATURAL),
    st.builds(
        TopicPut, NATURAL,
        st.builds(
            TopicConfig, NAME, COUNT, st.integers(0, 6), st.sampled_from(FlushMode), st.none() | NATURAL, st.none() | NATURAL
        ),
    ),
    st.builds(events.TopicDeleted, NATURAL),
    st.builds(GroupSubscribed, NAME, NAME, NATURAL, st.lists(st.tuples(ID, NATURAL), max_size=4)),
    st.builds(OffsetsCommitted, NAME, NAME, st.lists(st.tuples(NATURAL, ID, NATURAL), max_size=4)),
    st.builds(LeaseGranted, NAME, NATURAL, ID, NAME, NATURAL),
    st.builds(events.LeaseReleased, NAME, NATURAL, ID, NATURAL),
    st.just(BrokerStopped()),
    st.builds(events.GroupDeleted, NAME),
    st.builds(events.QueuesAdvanced, NATURAL, st.lists(st.tuples(ID, NATURAL), max_size=4)),
    st.builds(events.StateRelocated, NATURAL, NATURAL, NATURAL, NATURAL),
    st.builds(events.SessionTimeoutChanged, NATURAL),
)


@given(ANY_EVENT)
def test_round_trip(event: events.AnyEvent) -> None:
    payload = encode_event(event)
    assert decode_event(payload) == event
    assert decode_event(bytearray(payload)) == event
    assert decode_event(memoryview(payload)) == event


@given(ANY_EVENT)
def test_events_are_values(event: events.AnyEvent) -> None:
    """Folding the same log twice gives the same tables only if nobody can change an event."""
    with pytest.raises(AttributeError):
        event.anything = 1  # type: ignore[union-attr]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_fields_of_the_future_are_ignored(event: events.AnyEvent) -> None:
    assert decode_event(msgpack.packb([*msgpack.unpackb(encode_event(event)), None, {"a": 1}])) == event


def test_tags_are_used_once() -> None:
    tags = [kind.__struct_config__.tag for kind in events.AnyEvent.__args__]
    assert sorted(tags) == list(range(1, len(tags) + 1))


def test_a_topic_is_sync_unless_it_says_otherwise() -> None:
    assert decode_event(msgpack.packb([2, 1, ["meters"]])) == TopicPut(1, TopicConfig("meters", 4, 6, FlushMode.SYNC, None, None))


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\x80", b"\x90", b"\xc0", b"\x05", b"\xc1", b"\x91\x63", b"\x91\x01", b"\x92\x01\xa1x", b"\x91" * 5_000,
        b"\x93\x04\xa1\xff", encode_event(BrokerStopped()) + b"\x00", msgpack.packb([2, 1, ["meters", -1]]),
        msgpack.packb([4, "g", "t", 1, [[1]]]), msgpack.packb([4, "g", "t", 1, {"1": 2}]), msgpack.packb(["1", 1]),
    ],
)
def test_bytes_that_are_no_event(payload: bytes) -> None:
    with pytest.raises(InvalidFrameError, match="cannot be read"):
        decode_event(payload)


@pytest.mark.parametrize(
    "event",
    [[1, -1], [1, 1 << 63], [2, 1, ["t", (1 << 32) - 1]], [2, 1, ["t", 1025]], [2, -1, ["t"]], [4, "g", "t", -1, []],
     [5, "g", "", [[1, 0, -1]]], [5, "g", "", [[1, -1, 0]]], [10, 1, [[0, 1 << 63]]], [11, 0, 1, 1, -1]],
)
def test_numbers_that_the_tables_cannot_hold_are_refused(event: list[object]) -> None:
    """A queue of a negative number would be another one, and a topic of four thousand million queues the end of the memory."""
    with pytest.raises(InvalidFrameError, match="log event"):
        events.decode_event(msgpack.packb(event))
