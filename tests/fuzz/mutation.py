"""Bent inputs: valid bytes and values, changed by the dice so that what lies behind the first check is reached too.

Bytes are flipped, cut, spliced, repeated and given the headers of huge MessagePack values; values are unpacked, bent in one place
and packed again; whoever has a checksum over them computes it again in half of the cases. Everything comes from one `Random`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any
from zlib import crc32

import msgpack

from zrmq.protocol.batch import (
    ASSIGNED_AT,
    BATCH_CRC_AT,
    BATCH_HEADER_BYTES,
    CODEC_PLAIN,
    CODEC_ZLIB,
    ENTRY_CRC_AT,
    ENTRY_HEADER_BYTES,
    KIND_BATCH,
    PRODUCED_AT,
    START_BYTES,
)

NUMBERS = [0, 1, -1, 7, 127, 128, 255, 256, 65_535, 65_536]
NUMBERS += [edge + step for edge in (1 << 31, 1 << 32, 1 << 62, 1 << 63) for step in (-1, 0, 1)] + [(1 << 64) - 1, -(1 << 63)]
TEXTS = ["", " ", "*", "a||b", "||", "\0", "\x7f", "ä" * 70, "x" * 256, "%|-_", "🦀", "a\u2028b", "..", "/", "x" * 5_000]
VALUES: list[Any] = [
    None, True, False, 1.5, float("nan"), float("inf"), b"", b"\0" * 9, b"x" * 5_000, [], {}, [None] * 300, [[]] * 70, {"a": {}},
    {1: 2}, {"": None}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1), *NUMBERS, *TEXTS,
]
HEADERS = [
    head + length
    for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")  # array, map, bytes, text, ext: 32 bits of length
    for length in (b"\xff\xff\xff\xff", b"\x00\x01\x00\x01", b"\x7f\xff\xff\xff")
]
HEADERS += [b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc1", b"\xc7\xff\x05", b"\xd4\x05\x00", b"\xd8\xff" + bytes(16)]
BRACKETS = [b"\x91", b"\x81\xa1x", b"\x81\xc0", b"\xdc\x00\x01", b"\x92\x01", b"\x93\x90\xa0"]
REPEATS_MAX = 3_000
BYTES_MAX = 300_000  # an input is not bent any longer than that

Make = Callable[[Random, Sequence[bytes]], bytes]


def bend_bytes(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with one to four changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(_CHANGES)(rng, data, seeds)
        del data[BYTES_MAX:]
    return bytes(data)


def bend_packed(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, which are MessagePack, with a value in it replaced; or its bytes bent."""
    if rng.random() < 0.4:
        return bend_bytes(rng, seeds)
    data: bytes = msgpack.packb(bend_value(rng, msgpack.unpackb(rng.choice(seeds), strict_map_key=False)))
    return bend_bytes(rng, [data]) if rng.random() < 0.1 else data


def bend_value(rng: Random, value: Any, keep: int = 0) -> Any:
    """The value with one place in it changed. The first `keep` parts of the outermost list stay, but for one time in ten."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return _bent_leaf(rng, value)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        return {**value, (rng.choice(TEXTS) if rng.random() < 0.3 else key): bend_value(rng, value[key])}
    parts = list(value)
    at = rng.randrange(keep, len(parts)) if keep < len(parts) and rng.random() < 0.9 else rng.randrange(len(parts))
    kind = rng.randrange(8)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, rng.choice(VALUES))
    elif kind == 2:
        parts[at : at + 1] = [parts[at]] * rng.choice((2, 3, 300))
    elif kind == 3:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    else:
        parts[at] = bend_value(rng, parts[at])
    return parts


def _bent_leaf(rng: Random, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice(NUMBERS) if rng.random() < 0.7 else max(-(1 << 63), value + rng.choice((-1, 1)))
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice((rng.choice(TEXTS), value * rng.randrange(5), value[:-1], value + rng.choice(TEXTS)))
    return rng.choice(VALUES)


# --- changes of bytes -----------------------------------------------------------------------------------------------------


def _flip(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, rng.randrange(256)))


def _cut(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : rng.choice((len(data), at + 1, at + rng.randrange(20)))]


def _insert(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.choice(HEADERS), rng.choice(HEADERS), rng.randbytes(rng.randrange(1, 12))))


def _overwrite(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    """A length or count with an extreme one, of either byte order."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % (1 << 8 * size)
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _swap(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    size = rng.choice((1, 4, 8))
    if len(data) >= 2 * size:
        one, other = rng.randrange(len(data) - size + 1), rng.randrange(len(data) - size + 1)
        data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def _splice(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


def _repeat(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.randrange(1, 16)] * rng.choice((1, 2, 50, rng.randrange(REPEATS_MAX)))


def _nest(rng: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(BRACKETS) * rng.choice((2, 60, 600, REPEATS_MAX))


_CHANGES = (_flip, _flip, _set, _set, _cut, _insert, _insert, _overwrite, _overwrite, _swap, _splice, _repeat, _nest)


# --- what has checksums ---------------------------------------------------------------------------------------------------


def seal(entry: bytes) -> bytes:
    """An entry or batch with the length and the checksums that belong to its bytes, as far as there is room for them."""
    if len(entry) < ENTRY_HEADER_BYTES:
        return entry
    data = bytearray(entry)
    data[4:8] = len(data).to_bytes(4, "little")
    end = len(data)
    if data[3] == KIND_BATCH and len(data) >= BATCH_HEADER_BYTES:
        crc = crc32(data[PRODUCED_AT:], crc32(data[:START_BYTES]))
        data[BATCH_CRC_AT:PRODUCED_AT] = crc.to_bytes(4, "little")
        end = BATCH_HEADER_BYTES
    crc = crc32(data[ASSIGNED_AT:end], crc32(data[:START_BYTES]))
    data[ENTRY_CRC_AT:ASSIGNED_AT] = crc.to_bytes(4, "little")
    return bytes(data)


def bend_batch(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """A batch with bent bytes, a bent header field or bent records, sealed again half of the time."""
    kind = rng.random()
    if kind < 0.3:
        data = bend_bytes(rng, seeds)
    elif kind < 0.5:
        at, size = rng.choice(_FIELDS)
        batch = rng.choice(seeds)
        data = batch[:at] + (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little") + batch[at + size :]
    else:
        data = _with_bent_records(rng, rng.choice(seeds), seeds)
    return seal(data) if rng.random() < 0.5 or kind >= 0.5 else data


_FIELDS = [(0, 2), (2, 1), (3, 1), (4, 4), (8, 4), (56, 4), (60, 1), (61, 1), (62, 2), (64, 8), (72, 8)]
_FIELDS += [(80, 4), (84, 4), (88, 8), (96, 8)]


def _with_bent_records(rng: Random, batch: bytes, seeds: Sequence[bytes]) -> bytes:
    records = batch[BATCH_HEADER_BYTES : int.from_bytes(batch[4:8], "little")]
    if batch[60] == CODEC_ZLIB:
        records = zlib.decompress(records)
    bent = bend_packed(rng, [records])
    codec = CODEC_PLAIN
    if rng.random() < 0.4:
        codec = CODEC_ZLIB
        bent = zlib.compress(bent * rng.choice((1, 1, 1, 1, 40)), 1)
        if rng.random() < 0.2:
            bent = bend_bytes(rng, [bent])
        elif rng.random() < 0.02:
            bent = zlib.compress(bytes(8 << 20), 1)  # more than records may unpack to
    head = bytearray(batch[:BATCH_HEADER_BYTES])
    head[60] = codec
    if rng.random() < 0.1:
        struct.pack_into("<I", head, 80, rng.choice(NUMBERS) % (1 << 32))
    return bytes(head) + bent
