"""Targets: everything that turns bytes or text of others into values, from frames of the wire to options in a TOML file."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgpack

from tests.corpus.samples import BATCHES, EVENTS, REPLIES, REQUESTS
from tests.fuzz.mutation import TEXTS, bend_batch, bend_bytes, bend_packed, bend_value
from tests.fuzz.probe import Target
from tests.unit.test_protocol_corpus import stored
from zrmq.broker import Config
from zrmq.config import NameServerConfig, load, parse_duration, parse_nameservers, parse_size
from zrmq.protocol import limits, requests
from zrmq.protocol.batch import (
    BATCH_HEADER_BYTES,
    decode_messages,
    encode_batch,
    entry_checks_out,
    iter_batches,
    open_batch,
    peek_entry,
)
from zrmq.protocol.events import decode_event, encode_event
from zrmq.protocol.tags import canonical_expression, filter_mask
from zrmq.transport.address import parse_address, parse_connect_address

PLACE = {"topic": "meters", "broker_name": "broker-a"}
MANY = " || ".join(f"tag-{number}" for number in range(400))
FILTERS = ["*", "", "kitchen", "kitchen || hall", "küche||a||b", " a ", "a|b", "|| a", MANY]
NAMES = ["meters", "a" * 127, "%RETRY%reports", "a|b", "", "a b", "ä", "a\n", "kitchen", "x" * 300]
AMOUNTS = ["10s", "1.5h", "64MiB", "4096", "7d", "0.000000001TB", "999999999999999999TiB", " 5 min ", "٣s", "1e9", "-1"]
AMOUNTS += ["1" * 5_000]
ADDRESSES = [
    "tcp://127.0.0.1:9876", "box", "box:9876", "a,b:1,tcp://c:2", "ipc:///tmp/x", "inproc://x", "tcp://[::1]:5", "tcp://*:0",
    "tcp://x:99999", "box:٣", "tcp://", ",,",
]
TOML = b"""# everything once
host = "127.0.0.1"
nameserver_port = 9876
broker_name = "broker-a"
suspect_after_ms = "3s"
start_grace_ms = 0
nameservers = ["tcp://127.0.0.1:9876", "box"]
auto_create_topics = true
session_timeout_ms = 10_000
[store]
segment_bytes = "64MiB"
retention_ms = "72h"
store_bytes_max = 1e3
scrub_ms = 1979-05-27T07:32:00Z
"""
TOML_PIECES = [
    b"= 0x" + b"f" * 5_000, b"= " + b"9" * 5_000, b"= [" * 3, b"= " + b"[" * 2_000,
    b"= {a={b={c=1}}}", b"[store.store]\n",
    b"[[store]]\n",
    b"= 1979-99-27\n", b"= nan\n", b"= -inf\n", b"= 1e999\n", b"= '''", b'= "\\ud800"\n',
    b"\xff", b"store = 1\n", b"host = ''\n", b"\0",
    b"= " + b"[{a=" * 300, b"a." * 50 + b"b = 1\n", b"= 00:00:60\n",
    b"= 9999-12-31T23:59:59.999999999999+23:59\n",
]


def _unpacked_bytes(batches: bytes) -> int:
    """What a batch counts for memory: its records unpacked, as far as they can be and up to the limit."""
    unpacker, size, rest = zlib.decompressobj(), 0, batches[BATCH_HEADER_BYTES:]
    with suppress(zlib.error):
        while rest and size <= limits.RECORDS_BYTES_MAX:
            size += len(unpacker.decompress(rest, 4096))
            rest = unpacker.unconsumed_tail
    return max(len(batches), size)


def _open_and_read(data: bytes) -> object:
    return decode_messages(open_batch(data), data, **PLACE)


def _read_all(data: bytes) -> object:
    return [decode_messages(*found, **PLACE) for found in iter_batches(data)]


def _entry(data: bytes) -> bool:
    header = peek_entry(data)
    return header is not None and entry_checks_out(data, header)


def _text(check: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: check(data.decode(errors="replace"))


def _bend_text(rng: Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return bend_bytes(rng, seeds)
    return str(bend_value(rng, rng.choice(seeds).decode())).encode() + rng.choice(TEXTS).encode() * rng.randrange(2)


def _extras(data: bytes) -> object:
    """What a message may have besides its body, from anything that MessagePack can say."""
    parts = msgpack.unpackb(data, strict_map_key=False)
    return limits.check_extras(*parts[:4]) if isinstance(parts, list) and len(parts) >= 4 else None


def _bend_extras(rng: Random, seeds: Sequence[bytes]) -> bytes:
    bent: bytes = msgpack.packb(bend_value(rng, msgpack.unpackb(rng.choice(seeds))))
    return bent


def _filter(text: str) -> object:
    return canonical_expression(text), filter_mask(text)


def _check_names(text: str) -> None:
    for check in (limits.check_topic, limits.check_group, limits.check_tag):
        check(text)


def _bend_toml(rng: Random, seeds: Sequence[bytes]) -> bytes:
    if rng.random() < 0.4:
        return bend_bytes(rng, seeds)
    lines = rng.choice(seeds).splitlines(keepends=True)
    at = rng.randrange(len(lines))
    name = lines[at].split(b"=")[0]
    piece = rng.choice(TOML_PIECES)
    lines[at] = name + piece if piece.startswith(b"=") else piece
    return b"".join(lines if rng.random() < 0.7 else rng.sample(lines, len(lines)))


def _load(path: Path, kind: type[Any]) -> Callable[[bytes], object]:
    def take(data: bytes) -> object:
        path.write_bytes(data)
        return load(kind, file=path)

    return take


def _encoded(values: Sequence[str]) -> list[bytes]:
    return [value.encode() for value in values]


def targets(folder: Path) -> list[Target]:
    """All of them; options are read from a file in `folder`."""
    asked, answered = [requests.encode(value) for value in REQUESTS], [requests.encode(value) for value in REPLIES]
    made = [encode_batch(sample.columns, **sample.produced) for sample in BATCHES.values()]
    kept = [stored(sample) for sample in BATCHES.values()]
    several = [*kept, b"".join(kept), kept[0] * 50]
    extras = [msgpack.packb(["kitchen", ["dev-7", "dev-8"], "house-1", {"unit": "C", "a": ""}])]
    file = folder / "zrmq.toml"
    return [
        Target("request", requests.decode_request, asked, bend_packed),
        Target("reply", requests.decode_reply, answered, bend_packed),
        Target("event", decode_event, [encode_event(value) for value in EVENTS], bend_packed),
        Target("number", requests.peek_number, asked, bend_packed),
        Target("batch", _open_and_read, made, bend_batch, _unpacked_bytes, weight=0.7),
        Target("pulled", _read_all, several, bend_batch, _unpacked_bytes, weight=0.7),
        Target("entry", _entry, kept, bend_batch),
        Target("filter", _text(_filter), _encoded(FILTERS), _bend_text, weight=0.3),
        Target("name", _text(_check_names), _encoded(NAMES), _bend_text, weight=0.3),
        Target("extras", _extras, extras, _bend_extras, weight=0.3),
        Target("duration", _text(parse_duration), _encoded(AMOUNTS), _bend_text, weight=0.3),
        Target("size", _text(parse_size), _encoded(AMOUNTS), _bend_text, weight=0.3),
        Target("nameservers", _text(parse_nameservers), _encoded(ADDRESSES), _bend_text, weight=0.3),
        Target("address", _text(parse_address), _encoded(ADDRESSES), _bend_text, weight=0.3),
        Target("connect", _text(parse_connect_address), _encoded(ADDRESSES), _bend_text, weight=0.3),
        Target("broker-toml", _load(file, Config), [TOML], _bend_toml, weight=0.03),
        Target("nameserver-toml", _load(file, NameServerConfig), [TOML], _bend_toml, weight=0.03),
    ]
