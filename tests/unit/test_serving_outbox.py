"""The outbox: no reply leaves before it is true, none twice, and none that its client would not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import Code, StoreFailedError
from zrmq.message import FlushMode
from zrmq.protocol.limits import REPLY_HEADER_BYTES_MAX, ROOMLESS_BYTES_MAX
from zrmq.protocol.requests import BrokerState, Done, Failed, Reply, Sent, decode_reply, failed
from zrmq.serving.outbox import Outbox


class Wire:
    """Takes what an outbox sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Reply, list[bytes]]] = []
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self.outbox = Outbox(self.send, lambda peer: peer not in self.full)

    def send(self, peer: bytes, frames: Any) -> bool:
        header, *payload = frames
        self.sent.append((peer, decode_reply(header), payload))
        return peer not in self.gone

    @property
    def numbers(self) -> list[int]:
        return [reply.number for _, reply, _ in self.sent]


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_what_is_true_leaves_at_once(wire: Wire) -> None:
    wire.outbox.now(b"peer", Done(1), [b"payload"])
    assert wire.sent == [(b"peer", Done(1), [b"payload"])]


def test_a_large_answer_is_refused_to_a_peer_that_does_not_read_and_a_small_one_is_given(wire: Wire) -> None:
    wire.full.add(b"full")
    large = BrokerState(7, {"text": "x" * ROOMLESS_BYTES_MAX})
    for peer in (b"full", b"peer"):
        wire.outbox.now(peer, large)
        wire.outbox.now(peer, Done(8))
    (_, refused, _), *others = wire.sent
    assert isinstance(refused, Failed)
    assert (refused.number, refused.code) == (7, Code.TOO_MANY_REQUESTS)
    assert [reply for _, reply, _ in others] == [Done(8), large, Done(8)]


def test_what_waits_for_the_flush_waits(wire: Wire) -> None:
    wire.outbox.after_flush(100, b"peer", Sent(1, 0, 5, FlushMode.SYNC))
    wire.outbox.after_write(100, b"peer", Sent(2, 0, 5, FlushMode.ASYNC))
    assert len(wire.outbox) == 2
    wire.outbox.release(99, 99)
    assert wire.numbers == []
    wire.outbox.release(100, 99)
    assert wire.numbers == [2]
    wire.outbox.release(100, 100)
    assert wire.numbers == [2, 1]
    wire.outbox.release(200, 200)
    assert (wire.numbers, len(wire.outbox)) == ([2, 1], 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_each_reply_leaves_once_in_order_and_not_too_early(steps: list[int], data: st.DataObject) -> None:
    wire, position = Wire(), 0
    positions = []
    for number, step in enumerate(steps, 1):
        position += step
        positions.append(position)
        wire.outbox.after_flush(position, b"peer", Done(number))
    flushed = 0
    while wire.outbox:
        flushed += data.draw(st.integers(1, 10))
        wire.outbox.release(flushed, flushed)
        assert wire.numbers == [number for number, at in enumerate(positions, 1) if at <= flushed]
    assert wire.numbers == list(range(1, len(steps) + 1))


def test_a_failed_disk_refuses_what_waits(wire: Wire) -> None:
    wire.outbox.after_flush(1, b"a", Done(1))
    wire.outbox.after_write(1, b"b", Done(2))
    wire.outbox.refuse_held(StoreFailedError("The disk refused.", path=Path("/data")))
    assert {(peer, reply.number, reply.code) for peer, reply, _ in wire.sent if isinstance(reply, Failed)} == {
        (b"a", 1, Code.STORE_FAILED), (b"b", 2, Code.STORE_FAILED),
    }
    assert len(wire.outbox) == 0


def test_peers_that_are_gone_are_counted(wire: Wire) -> None:
    wire.gone.add(b"gone")
    wire.outbox.now(b"gone", Done(1))
    wire.outbox.now(b"here", Done(2))
    assert wire.outbox.unroutable_count == 1


def test_an_answer_that_nobody_would_read_is_refused(wire: Wire) -> None:
    wire.outbox.now(b"peer", BrokerState(7, {"text": "x" * REPLY_HEADER_BYTES_MAX}))
    [(_, reply, _)] = wire.sent
    assert isinstance(reply, Failed)
    assert (reply.number, reply.code) == (7, Code.PAYLOAD_TOO_LARGE)
    assert reply.facts["limit_bytes"] == REPLY_HEADER_BYTES_MAX


def test_facts_travel_as_plain_values() -> None:
    error = StoreFailedError("No.", path=Path("/data"), size_bytes=5, share=0.5, known=None, is_full=True, names=("a", "b"))
    assert failed(3, error) == Failed(
        3, Code.STORE_FAILED, "No.",
        {"path": "/data", "size_bytes": 5, "share": 0.5, "known": None, "is_full": True, "names": ["a", "b"]},
    )
