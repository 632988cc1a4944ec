"""Target: a data folder with one bent file, opened, read, written to, saved and closed by the store, on the disk in memory.

A folder has segments and a spare one, queue files, broker.toml, the lock and views.db. Any file is bent as a disk or a hand bends
it: bits, zeros, blocks that change places, what is cut off, put behind it or taken from another file; it is gone, or has another
name. Of a segment entries are bent and sealed again too, so that what recovery believes is wrong; of views.db values are, for
SQLite has no checksums of its own.

What nobody sealed again must not cost anything but itself: a store that opens serves every message of the log that is whole and
was known to be flushed, as it was written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from random import Random
from typing import Any
from zlib import crc32

import msgpack

from tests.fuzz.mutation import NUMBERS, VALUES, bend_bytes, bend_packed, seal
from tests.fuzz.probe import Target
from tests.unit.store_bench import ASYNC, FOLDER, StoreBench, run
from zrmq.errors import NotReadyError
from zrmq.files import read_file
from zrmq.protocol.batch import (
    BATCH_CRC_AT,
    ENTRY_HEADER_BYTES,
    KIND_BATCH,
    KIND_EVENT,
    EntryHeader,
    entry_checks_out,
    iter_batches,
    peek_batch,
    peek_entry,
)
from zrmq.protocol.events import GroupSubscribed, LeaseGranted, OffsetsCommitted, TopicDeleted
from zrmq.protocol.requests import PullStatus
from zrmq.store.consume_queue import ENTRY_BYTES
from zrmq.store.views_db import ViewsDb
from zrmq.testing.files import FaultyFiles

CONFIG: dict[str, Any] = {"segment_bytes": 4 * 1024, "checkpoint_bytes": 20_000, "checkpoint_ms": 1_000_000}
VIEWS = FOLDER / "views.db"
RAW_VIEWS = "views.db as it lies on the disk"  # in place of the rows
NAMES = ("commitlog/00000000000000000001.log", "commitlog/spare-3", "commitlog/x.log", "commitlog/.log", "consumequeue/z/0", "x")
BLOCK_BYTES = 512
TOPIC_NAMES = {1: "a"}  # of what is not deleted again
TRACED_EVERY = 20
TABLES = ("meta", "topics", "queues", "groups", "offsets", "windows", "segments")
SEGMENT_HEADER_BYTES = 64
ENTRY_FIELDS = [(3, 1), (4, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 4), (44, 4), (48, 8), (72, 8), (80, 4), (96, 8)]

Image = dict[str, bytes]  # of a folder: what each file holds, by its path; a database's rows as MessagePack


def make_folder() -> Image:
    """A folder with some of everything, whose store was not closed: its log goes on behind views.db."""
    bench = StoreBench(**CONFIG)
    bench.topic("a", 2)
    bench.topic("b", 1, flush_mode=ASYNC)
    for number in range(24):
        bench.append(bench.queue("a", number % 2), 2, 20, producer_id=number % 3, tag="kitchen")
        bench.flush()
    bench.append(bench.queue("b"), 3, 500)
    for event in (
        GroupSubscribed("reports", "a", 5, [(0, 0), (1, 3)]), OffsetsCommitted("reports", "", [(1, 0, 5)]),
        LeaseGranted("reports", 1, 0, "c-1", 7),
    ):
        bench.store.append_event(event)
    bench.flush()
    bench.store._views.spill(bench.store._views.index(bench.queue("a")))  # one queue has a file
    bench.checkpoint()
    for number in range(24):  # a segment, and what follows
        bench.append(bench.queue("a", number % 2), 2, 20, producer_id=1)
        bench.flush()
    bench.topic("c", 3)
    bench.store.append_event(TopicDeleted(2))
    bench.store.append_event(OffsetsCommitted("reports", "box", [(1, 1, 2)]))
    bench.flush()
    return image_of(bench.files)


def image_of(files: FaultyFiles) -> Image:
    """Everything in the broker's folder."""
    image: Image = {"views.db": _rows_of(files.connect(VIEWS))}
    folders = [FOLDER]
    while folders:
        folder = folders.pop()
        for name in files.listdir(folder):
            path = folder / name
            if name == "views.db":
                continue
            try:
                image[str(path.relative_to(FOLDER))] = read_file(files, path)
            except (OSError, KeyError):
                folders.append(path)
    return image


def _rows_of(database: sqlite3.Connection) -> bytes:
    rows: bytes = msgpack.packb({table: database.execute(f"select * from {table}").fetchall() for table in TABLES})
    return rows


def _disk_of(image: Image) -> FaultyFiles:
    files = FaultyFiles(1)
    files.mkdir(FOLDER)
    made = {FOLDER}
    for name, data in image.items():
        if name not in ("views.db", RAW_VIEWS):
            path = FOLDER / name
            if path.parent not in made:
                made.add(path.parent)
                files.mkdir(path.parent)
            file = files.open(path, create=True)  # not synced: the power stays
            if data:
                file.pwritev([data], 0)
            file.close()
    return files


def _empty_database() -> bytes:
    files = FaultyFiles(1)
    files.mkdir(FOLDER)
    ViewsDb(files, VIEWS).begin()
    return files.connect(VIEWS).serialize()


_EMPTY = _empty_database()


@lru_cache(maxsize=4)
def _database(rows: bytes) -> bytes:
    """views.db with these rows."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(_EMPTY)
    connection.execute("begin")
    for table, values in msgpack.unpackb(rows, strict_map_key=False).items():
        for row in values:
            with suppress(sqlite3.Error, OverflowError, TypeError):  # what the tables' own rules refuse cannot be there
                connection.execute(f"insert into {table} values ({', '.join('?' * len(row))})", row)
    connection.execute("commit")
    filled = connection.serialize()
    connection.close()
    return filled


class LostMessageError(Exception):
    """A store that opened does not serve what is whole."""


def take(data: bytes) -> None:
    """Open the folder with this image, and use everything in it."""
    image: Image = msgpack.unpackb(data)
    files = _disk_of(image)
    if "views.db" in image or RAW_VIEWS in image:
        views = image[RAW_VIEWS] if RAW_VIEWS in image else _database(image["views.db"])
        connection = files.connect(VIEWS)
        if views:  # an empty file is an empty database
            connection.deserialize(views)
    bench = StoreBench(files=files, **CONFIG)
    store = bench.store
    try:
        served: set[tuple[str, int, int, bytes]] = set()
        for topic in list(store.tables.topics.values())[:8]:
            for queue in topic.queues[:4]:
                _read(bench, queue, served)
        lost = owed(image) - served
        if lost:
            raise LostMessageError(f"{len(lost)} of {len(served)} and more, such as {min(lost)}")
        if "a" in store.tables.topics:
            bench.append(bench.queue("a"))
        bench.flush()
        bench.checkpoint()
        bench.maintain(2)
    finally:
        store.close()


def _read(bench: StoreBench, queue: Any, served: set[tuple[str, int, int, bytes]]) -> None:
    """Every batch, which is `served`; a queue whose index is damaged says so until maintenance has made it anew."""
    offset, rounds = queue.min_offset, 0
    while offset < queue.visible_offset and rounds < 200:
        rounds += 1
        try:
            chunk = bench.store.read(queue, offset, 4096)
        except NotReadyError:
            run(bench.store.begin_maintenance())
            continue
        if chunk.status is PullStatus.NOTHING or chunk.next_offset == offset:
            break
        for frame in chunk.frames:
            for header, batch in iter_batches(frame):
                served.add((queue.topic.config.topic, queue.queue_id, header.base_offset, bytes(batch[BATCH_CRC_AT:])))
        offset = chunk.next_offset
    with suppress(NotReadyError):
        bench.store.offset_at(queue, 3)


# --- what is owed ---------------------------------------------------------------------------------------------------------


def _entries(name: str, data: bytes) -> Iterator[tuple[int, EntryHeader]]:
    """Where the entries of a segment are in it, as far as they check out."""
    at = SEGMENT_HEADER_BYTES
    while (header := peek_entry(data, at)) is not None and header.position == int(name[-24:-4]) + at:
        if not entry_checks_out(data, header, at):
            return
        yield at, header
        at += header.length


def owed(image: Image) -> set[tuple[str, int, int, bytes]]:
    """The batches that must be served: one file at most was bent, it was not sealed again, and they are not in what was.

    A flushed entry with nothing whole behind it that tells of the flush looks like one that a power cut tore: nobody owes it.
    """
    base = _base()
    bent = [name for name in base.keys() | image.keys() if base.get(name) != image.get(name)]
    if len(bent) > 1 or any(not _is_plain(name, base.get(name, b""), image.get(name, b"")) for name in bent):
        return set()
    batches, flushed_position = [], 0
    for name, at, header, data in _base_entries():
        if image.get(name, b"")[at : at + header.length] == data:
            flushed_position = max(flushed_position, header.flushed_position)
            if header.kind == KIND_BATCH:
                batches.append((peek_batch(data), data))
    return {
        (TOPIC_NAMES[batch.topic_id], batch.queue_id, batch.base_offset, data[BATCH_CRC_AT:])
        for batch, data in batches if batch.topic_id in TOPIC_NAMES and batch.position + batch.length <= flushed_position
    }


def _is_plain(name: str, before: bytes, after: bytes) -> bool:
    """Whether what was changed tells by its checksums that it was."""
    if name == "views.db":
        return not after  # the log has everything
    if name.endswith(".log") and len(name) == len("commitlog/") + 24:
        wholes = (entry for entry in _entries_anywhere(after) if before[entry[0] : entry[1]] != after[entry[0] : entry[1]])
        return name in _base() and next(wholes, None) is None
    if name.startswith("consumequeue"):
        ends = range(ENTRY_BYTES, len(after) + 1, ENTRY_BYTES)
        entries = {before[end - ENTRY_BYTES : end] for end in ends}
        return not any(
            crc32(after[end - ENTRY_BYTES : end - 4]).to_bytes(4, "little") == after[end - 4 : end]
            and after[end - ENTRY_BYTES : end] not in entries for end in ends
        )
    return name != RAW_VIEWS


def _entries_anywhere(data: bytes) -> Iterator[tuple[int, int]]:
    at = data.find(b"ZR")
    while at >= 0:
        header = peek_entry(data, at) if at + ENTRY_HEADER_BYTES <= len(data) else None
        if header is not None and entry_checks_out(data, header, at):
            yield at, at + header.length
        at = data.find(b"ZR", at + 1)


@lru_cache(maxsize=1)
def _base() -> Image:
    return make_folder()


@lru_cache(maxsize=1)
def _base_entries() -> list[tuple[str, int, EntryHeader, bytes]]:
    names = sorted(name for name in _base() if name.endswith(".log"))
    found = [(name, at, header) for name in names for at, header in _entries(name, _base()[name])]
    return [(name, at, header, _base()[name][at : at + header.length]) for name, at, header in found]


# --- bending --------------------------------------------------------------------------------------------------------------


def bend_folder(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """The image with one file, seldom two, bent or gone."""
    image = msgpack.unpackb(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(image))
        if name == "views.db" and rng.random() < 0.5:
            image[RAW_VIEWS] = bend_file(rng, image, _database(image.pop(name)))
        elif rng.random() < 0.4:
            _bend_plainly(rng, image, name)
        elif name == "views.db":
            image[name] = _bent_rows(rng, image[name])
        elif name.endswith(".log") and rng.random() < 0.7:
            image[name] = _bent_segment(rng, image[name])
        elif name.startswith("consumequeue"):
            image[name] = _bent_entries(rng, image[name])
        else:
            image[name] = bend_bytes(rng, [image[name]])
        if not image:
            break
    bent: bytes = msgpack.packb(image)
    return bent


def _bend_plainly(rng: Random, image: Image, name: str) -> None:
    """A file is gone, bears another name, or has other bytes; or there is one more."""
    kind = rng.random()
    if kind < 0.1:
        del image[name]
    elif kind < 0.2:
        other = rng.choice((*NAMES, *image))
        image[RAW_VIEWS if other == "views.db" else other] = image.pop(name)
    elif kind < 0.25:
        image[rng.choice(NAMES)] = rng.choice((b"", b"x", image[name]))
    elif name != "views.db":
        image[name] = bend_file(rng, image, image[name])


def bend_file(rng: Random, image: Image, data: bytes) -> bytes:
    """As a disk does it: whole blocks more often than single bits."""
    kind, at, end = rng.randrange(8), rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        at, end = at - at % BLOCK_BYTES, end - end % BLOCK_BYTES
    at, end = sorted((at, end))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(end - at) + data[end:]
    if kind == 2:
        return data + rng.choice((b"\0", bytes(BLOCK_BYTES), data[at:end], rng.randbytes(100), bytes(10_000)))
    if kind == 3:
        size = min(BLOCK_BYTES, end - at, len(data) - end)
        return data[:at] + data[end : end + size] + data[at + size : end] + data[at : at + size] + data[end + size :]
    if kind == 4:
        other = image[rng.choice(sorted(image))]
        return data[:at] + other[at:end].ljust(end - at, b"\0") + data[end:]
    if kind == 5:
        return data[:at] + data[end:]
    if kind == 6:
        return data[:at] + rng.randbytes(end - at) + data[end:]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5)) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _bent_segment(rng: Random, data: bytes) -> bytes:
    """One entry changed within its length: its header, its payload, or an event with other values."""
    entries, at = [], SEGMENT_HEADER_BYTES
    while at + ENTRY_HEADER_BYTES <= len(data) and data[at : at + 2] == b"ZR":
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        entries.append((at, length))
        at += length
    if not entries:
        return bend_bytes(rng, [data])
    at, length = rng.choice(entries)
    entry = data[at : at + length]
    if entry[3] == KIND_EVENT and rng.random() < 0.8:
        bent = entry[:ENTRY_HEADER_BYTES] + bend_packed(rng, [entry[ENTRY_HEADER_BYTES:]])
        rest = b"" if rng.random() < 0.5 else data[at + length :]
        return (data[:at] + seal(bent) + rest).ljust(len(data), b"\0")[: len(data)]
    if rng.random() < 0.5:
        field, size = rng.choice(ENTRY_FIELDS)
        number = rng.choice(NUMBERS) % (1 << 8 * size)
        bent = entry[:field] + number.to_bytes(size, "little") + entry[field + size :]
        bent = bent[:length] if rng.random() < 0.5 or field == 4 else seal(bent[:length])
    else:
        bent = bend_bytes(rng, [entry])[:length].ljust(length, b"\0")
        bent = seal(bent) if rng.random() < 0.5 else bent
    return data[:at] + bent + data[at + length :]


def _bent_entries(rng: Random, data: bytes) -> bytes:
    if len(data) < ENTRY_BYTES or rng.random() < 0.3:
        return bend_bytes(rng, [data or b"x"])
    at = rng.randrange(len(data) // ENTRY_BYTES) * ENTRY_BYTES
    body = bytearray(data[at : at + ENTRY_BYTES - 4])
    field, size = rng.choice(((0, 8), (8, 8), (16, 4), (20, 4), (24, 8), (32, 8)))
    body[field : field + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return data[:at] + bytes(body) + crc32(body).to_bytes(4, "little") + data[at + ENTRY_BYTES :]


def _bent_rows(rng: Random, rows: bytes) -> bytes:
    tables = msgpack.unpackb(rows)
    table = rng.choice([name for name in tables if tables[name]])
    at = rng.randrange(len(tables[table]))
    row = list(tables[table][at])
    kind = rng.random()
    if kind < 0.15:
        del tables[table][at]
    else:
        column = rng.randrange(len(row))
        value = row[column]
        if isinstance(value, bytes) and rng.random() < 0.8:
            row[column] = bend_packed(rng, [value]) if table in ("topics", "groups", "segments") else bend_bytes(rng, [value])
        elif isinstance(value, int) and rng.random() < 0.6:
            row[column] = rng.choice(NUMBERS)
        else:
            row[column] = rng.choice([value for value in VALUES if isinstance(value, int | str | bytes | float)])
        tables[table][at] = row
    bent: bytes = msgpack.packb(tables)
    return bent


def targets() -> list[Target]:
    """One: the folder as a whole."""
    return [Target("folder", take, [msgpack.packb(_base())], bend_folder, traced_every=TRACED_EVERY)]

