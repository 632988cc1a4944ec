"""Hostile bytes to every decoder: a value or a typed error, nothing else, and never memory without bound."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.samples import BATCHES, EVENTS, REPLIES, REQUESTS
from tests.memory import peak_bytes
from tests.unit.test_protocol_batch import with_records
from tests.unit.test_protocol_corpus import stored
from zrmq.errors import InvalidFrameError
from zrmq.protocol import batch, limits, requests
from zrmq.protocol.batch import decode_messages, entry_checks_out, iter_batches, open_batch, peek_entry
from zrmq.protocol.events import decode_event, encode_event

Decoder = Callable[[bytes], Any]


def open_and_read(frame: bytes) -> Any:
    """A batch's whole way: checked by the broker, opened by a consumer."""
    return decode_messages(open_batch(frame), frame, topic="meters", broker_name="broker-a")


def read_all(payload: bytes) -> Any:
    """What a consumer does with a frame of a pull's reply."""
    return [decode_messages(*found, topic="meters", broker_name="broker-a") for found in iter_batches(payload)]


def look_at_entry(buffer: bytes) -> Any:
    """What recovery does with bytes of the log."""
    header = peek_entry(buffer)
    return header is not None and entry_checks_out(buffer, header)


DECODERS: dict[str, Decoder] = {
    "request": requests.decode_request,
    "reply": requests.decode_reply,
    "event": decode_event,
    "batch": open_and_read,
    "pulled": read_all,
    "entry": look_at_entry,
    "number": requests.peek_number,
}
VALID: dict[str, list[bytes]] = {
    "request": [requests.encode(value) for value in REQUESTS],
    "reply": [requests.encode(value) for value in REPLIES],
    "event": [encode_event(value) for value in EVENTS],
    "batch": [batch.encode_batch(sample.columns, **sample.produced) for sample in BATCHES.values()],
    "pulled": [stored(sample) for sample in BATCHES.values()],
    "entry": [stored(sample) for sample in BATCHES.values()],
    "number": [requests.encode(value) for value in REQUESTS],
}
every_decoder = pytest.mark.parametrize("name", DECODERS)


def feed(name: str, frame: bytes) -> None:
    """Anything but a value or `InvalidFrameError` fails the test."""
    with suppress(InvalidFrameError):
        DECODERS[name](frame)


@every_decoder
@given(frame=st.binary(max_size=300))
def test_noise(name: str, frame: bytes) -> None:
    feed(name, frame)


@every_decoder
@given(data=st.data())
def test_valid_bytes_with_damage(name: str, data: st.DataObject) -> None:
    """Close to valid, so that the damage gets past the first check."""
    frame = bytearray(data.draw(st.sampled_from(VALID[name])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(frame) - 1, 0)))
        frame[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    feed(name, bytes(frame))


MESSAGEPACK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["request", "reply", "event", "number"])
@given(tag=st.integers(0, 150), fields=st.lists(MESSAGEPACK, max_size=10))
def test_well_formed_nonsense(name: str, tag: int, fields: list[Any]) -> None:
    feed(name, msgpack.packb([tag, *fields]))


@given(st.lists(MESSAGEPACK, max_size=6), st.integers(1, 5), st.sampled_from([0, 1]))
def test_well_formed_nonsense_as_records(columns: list[Any], count: int, codec: int) -> None:
    records = msgpack.packb(columns)
    feed("batch", with_records(zlib.compress(records) if codec else records, count=count, codec=codec))


@given(st.lists(st.lists(MESSAGEPACK, max_size=3), min_size=1, max_size=5))
def test_nonsense_in_columns(columns: list[list[Any]]) -> None:
    feed("batch", with_records(msgpack.packb([[b"body"], *columns]), count=1))


@every_decoder
@pytest.mark.parametrize("bracket", [b"\x91", b"\x81\xa1x", b"\x92\x01", b"\xdc\x00\x01", b"\x95\x64\x01\x01\xa0\x81\xa1x"])
def test_deep_nesting(name: str, bracket: bytes) -> None:
    deep = bracket * 100_000
    feed(name, deep)
    feed(name, b"\x95\x64\x01\x01\xa0\x81\xa1x" + deep)  # inside a refusal's facts, which may be anything
    feed("batch", with_records(deep[:500_000]))


@every_decoder
@pytest.mark.parametrize(
    "start", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9", b"\x92\x1e\xdd", b"\x94\x0c\x01\x00\xdd", b"\x91\xdd"]
)
def test_huge_lengths(name: str, start: bytes) -> None:
    frame = start + b"\xff\xff\xff\xff" + bytes(50)
    assert peak_bytes(lambda: feed(name, frame)) < 1_000_000
    assert peak_bytes(lambda: feed("batch", with_records(frame))) < 1_000_000


# --- memory -------------------------------------------------------------------------------------------------------------


def test_a_zip_bomb_ends_at_the_limit() -> None:
    bomb = with_records(zlib.compress(bytes(400 * 1024 * 1024), 9), codec=1)
    assert len(bomb) < 500_000
    assert peak_bytes(lambda: feed("batch", bomb)) < 4 * limits.RECORDS_BYTES_MAX


@pytest.mark.parametrize("filler", [b"\x90", b"\x80", b"\xa0", b"\xc4\x00", b"\xc0"])
@pytest.mark.parametrize("column", range(5))
def test_a_column_of_more_records_than_a_batch_has_is_not_built(filler: bytes, column: int) -> None:
    """Thirty thousand zipped bytes would otherwise become hundreds of megabytes of empty lists."""
    count = limits.RECORDS_BYTES_MAX // 2 // len(filler)
    columns = [b"\x91\xc4\x00"] + [b"\xc0"] * 4
    columns[column] = b"\xdd" + count.to_bytes(4, "big") + filler * count
    frame = with_records(zlib.compress(b"\x95" + b"".join(columns), 9), codec=1)
    assert peak_bytes(lambda: feed("batch", frame)) < 4 * limits.RECORDS_BYTES_MAX


def test_properties_cost_a_consumer_a_bounded_multiple() -> None:
    """The worst that a batch of the largest size can hold: as many tiny keys as fit."""
    count = limits.RECORDS_BYTES_MAX // 7
    pairs = b"".join(b"\xa5" + str(number).encode().rjust(5, b"x")[-5:] + b"\xa0" for number in range(count))
    frame = with_records(b"\x94\x91\xc4\x00\xc0\xc0\x91\xdf" + count.to_bytes(4, "big") + pairs[: 7 * count], count=1)
    assert peak_bytes(lambda: feed("batch", frame[: limits.BATCH_BYTES_MAX])) < 64 * limits.BATCH_BYTES_MAX


@pytest.mark.parametrize("filler", [b"\x90", b"\xa0", b"\x80", b"\x92\xa0\xa0", b"\x94\xa0\x00\x00\x00"])
@pytest.mark.parametrize(
    "head", [b"\x94\x0c\x01\x00", b"\x95\x28\x01\x00\xaaclustering", b"\x94\x2c\x01\x00", b"\x94\x16\x01\x00", b""]
)
def test_a_request_costs_a_server_a_bounded_multiple(head: bytes, filler: bytes) -> None:
    count = (limits.HEADER_BYTES_MAX - len(head) - 5) // len(filler)
    frame = head + b"\xdd" + count.to_bytes(4, "big") + filler * count
    assert len(frame) <= limits.HEADER_BYTES_MAX
    assert peak_bytes(lambda: feed("request", frame)) < 64 * limits.HEADER_BYTES_MAX
    assert peak_bytes(lambda: feed("number", frame)) < 100_000


def test_looking_for_the_number_of_a_huge_header_costs_nothing() -> None:
    frame = b"\xdd\x01\xe8\x48\x00\x07\x05" + b"\x80" * 32_000_000
    assert peak_bytes(lambda: requests.peek_number(frame)) < 100_000
    assert requests.peek_number(frame) == 5
