"""The golden bytes: today's code writes them, reads them, and so does the reference MessagePack library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from tests.corpus import samples
from tests.corpus.samples import BATCHES, EVENTS, REPLIES, REQUESTS, Batch
from zrmq.protocol import batch, events, requests
from zrmq.protocol.batch import decode_messages, decode_records, encode_batch, encode_entry, iter_batches, open_batch, stamp

CORPUS = Path(samples.__file__).parent
ENTRY = {"epoch": 1, "position": 64, "flushed_position": 0, "store_timestamp_ms": samples.NOW_MS}


def golden(file: str, name: str, made: bytes) -> bytes:
    """The frozen bytes of one name; a missing line is written, and fails this run so that somebody reads it."""
    path = CORPUS / file
    lines = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
    if name not in lines:
        with path.open("a") as out:
            out.write(f"{name} {made.hex()}\n")
        pytest.fail(f"tests/corpus/{file} had no line {name}; it has one now. Read it, run again, commit it.")
    return bytes.fromhex(lines[name])


def plain(value: Any) -> Any:
    """The value as the reference library unpacks it: arrays, maps, numbers, text, bytes."""
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return plain(msgspec.to_builtins(value, builtin_types=(bytes,))) if isinstance(value, msgspec.Struct) else value


def by_name(values: list[Any]) -> Any:
    return pytest.mark.parametrize("value", values, ids=lambda value: type(value).__name__)


def test_there_is_a_sample_of_everything() -> None:
    assert {type(value) for value in REQUESTS} == set(requests.AnyRequest.__args__)
    assert {type(value) for value in REPLIES} == set(requests.AnyReply.__args__)
    assert {type(value) for value in EVENTS} == set(events.AnyEvent.__args__)


@by_name([*REQUESTS, *REPLIES, *EVENTS])
def test_samples_set_every_field(value: Any) -> None:
    """A field left at its default would not be frozen."""
    for field in msgspec.structs.fields(value):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        assert getattr(value, field.name) != default, f"{type(value).__name__}.{field.name} has its default in samples.py"


@by_name(REQUESTS)
def test_requests(value: requests.Request) -> None:
    frozen = golden("requests.txt", type(value).__name__, requests.encode(value))
    assert requests.encode(value).hex() == frozen.hex()
    assert requests.decode_request(frozen) == value
    assert msgpack.unpackb(frozen) == plain(value)
    assert requests.decode_request(msgpack.packb(plain(value))) == value


@by_name(REPLIES)
def test_replies(value: requests.Reply) -> None:
    frozen = golden("replies.txt", type(value).__name__, requests.encode(value))
    assert requests.encode(value).hex() == frozen.hex()
    assert requests.decode_reply(frozen) == value
    assert msgpack.unpackb(frozen) == plain(value)
    assert requests.decode_reply(msgpack.packb(plain(value))) == value


@by_name(EVENTS)
def test_events(value: Any) -> None:
    frozen = golden("events.txt", type(value).__name__, events.encode_event(value))
    assert events.encode_event(value).hex() == frozen.hex()
    assert events.decode_event(frozen) == value
    assert msgpack.unpackb(frozen) == plain(value)
    assert events.decode_event(msgpack.packb(plain(value))) == value


@pytest.mark.parametrize("name, kind", [("event", batch.KIND_EVENT), ("segment-end", batch.KIND_SEGMENT_END)])
def test_entries(name: str, kind: int) -> None:
    payload = events.encode_event(EVENTS[0]) if kind == batch.KIND_EVENT else b""
    made = encode_entry(kind, payload, **ENTRY)
    frozen = golden("entries.txt", name, made)
    assert made.hex() == frozen.hex()
    header = batch.peek_entry(frozen)
    assert header is not None
    assert batch.entry_checks_out(frozen, header)
    assert header._asdict() == ENTRY | {
        "magic": b"ZR", "version": 1, "kind": kind, "length": len(frozen), "entry_crc": int.from_bytes(frozen[8:12], "little"),
    }
    assert frozen[batch.ENTRY_HEADER_BYTES :] == payload


def stored(sample: Batch) -> bytes:
    """A batch as it stands in the log: the producer's bytes under the broker's header."""
    frame = encode_batch(sample.columns, **sample.produced)
    return stamp(frame, **sample.assigned) + frame[batch.BATCH_HEADER_BYTES :]


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str) -> None:
    sample = BATCHES[name]
    frozen = golden("batches.txt", name, stored(sample))
    if name != "zlib":  # zlib may pack the same bytes in other ways, from version to version
        assert stored(sample).hex() == frozen.hex()
    [(header, view)] = iter_batches(frozen)
    assert decode_records(header, view) == sample.columns
    assert sample.assigned.items() <= header._asdict().items()
    assert (header.producer_id, header.first_sequence) == (0x0123_4567_89AB_CDEF, 500)
    assert header.record_count == len(sample.columns.bodies)
    assert (header.first_born_ms, header.born_span_ms) == (samples.NOW_MS - 20, 17)
    assert header.codec == (batch.CODEC_ZLIB if name == "zlib" else batch.CODEC_PLAIN)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_reference_library_reads_records(name: str) -> None:
    columns = BATCHES[name].columns
    records = msgpack.unpackb(stored(BATCHES[name])[batch.BATCH_HEADER_BYTES :])
    names = ("bodies", "tags", "keys", "properties", "message_groups")
    assert records == [getattr(columns, column) for column in names][: len(records)]
    assert all(getattr(columns, column) is None for column in names[len(records) :])


def test_reference_library_writes_records() -> None:
    """Records packed by msgpack, in a batch made by the drawing in zrmq/protocol/batch.py, are messages like any other."""
    sample = BATCHES["everything"]
    records = msgpack.packb(plain(sample.columns))
    frame = encode_batch(sample.columns, **sample.produced)
    assert records == frame[batch.BATCH_HEADER_BYTES :]
    header = open_batch(frame)
    messages = decode_messages(header, frame, topic="meters", broker_name="broker-a")
    assert [message.body for message in messages] == sample.columns.bodies
    assert [message.tag for message in messages] == sample.columns.tags
    assert messages[2].message_id == "0123456789ABCDEF00000000000001F6"
