"""Target: a data folder with one bent file, opened, read, written to, saved and closed by the store, on the disk in memory.

A folder has segments, queue files, broker.toml and views.db. Of a segment entries are bent and sealed again half of the time, so
that what recovery believes is wrong; of views.db values are, for SQLite has no checksums of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any
from zlib import crc32

import msgpack

from tests.fuzz.mutation import NUMBERS, VALUES, bend_bytes, bend_packed, seal
from tests.fuzz.probe import Target
from tests.unit.store_bench import ASYNC, FOLDER, StoreBench, run
from zrmq.errors import NotReadyError
from zrmq.files import read_file
from zrmq.protocol.batch import ENTRY_HEADER_BYTES, KIND_EVENT
from zrmq.protocol.events import GroupSubscribed, LeaseGranted, OffsetsCommitted, TopicDeleted
from zrmq.protocol.requests import PullStatus
from zrmq.store.consume_queue import ENTRY_BYTES
from zrmq.store.views_db import ViewsDb
from zrmq.testing.files import FaultyFiles

CONFIG: dict[str, Any] = {"segment_bytes": 4 * 1024, "checkpoint_bytes": 20_000, "checkpoint_ms": 1_000_000}
VIEWS = FOLDER / "views.db"
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
    bench.append(bench.queue("b"), 3, 500)
    for event in (
        GroupSubscribed("reports", "a", 5, [(0, 0), (1, 3)]), OffsetsCommitted("reports", "", [(1, 0, 5)]),
        LeaseGranted("reports", 1, 0, "c-1", 7),
    ):
        bench.store.append_event(event)
    bench.flush()
    bench.store._views.spill(bench.store._views.index(bench.queue("a")))  # one queue has a file
    bench.checkpoint()
    bench.append(bench.queue("a"), 2, 20, producer_id=1)
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
            if name in ("views.db", "lock") or name.startswith("spare-"):
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
    for name, data in image.items():
        if name != "views.db":
            path = FOLDER / name
            files.mkdir(path.parent)
            file = files.open(path, create=True)
            if data:
                file.pwritev([data], 0)
            file.fdatasync()
            file.close()
    return files


def _empty_database() -> bytes:
    files = FaultyFiles(1)
    files.mkdir(FOLDER)
    ViewsDb(files, VIEWS).wipe()
    return files.connect(VIEWS).serialize()


_EMPTY = _empty_database()


def _fill_database(files: FaultyFiles, rows: bytes) -> None:
    connection = files.connect(VIEWS)
    connection.deserialize(_EMPTY)
    connection.execute("begin")
    for table, values in msgpack.unpackb(rows, strict_map_key=False).items():
        for row in values:
            with suppress(sqlite3.Error, OverflowError, TypeError):  # what the tables' own rules refuse cannot be there
                connection.execute(f"insert into {table} values ({', '.join('?' * len(row))})", row)
    connection.execute("commit")


def take(data: bytes) -> None:
    """Open the folder with this image, and use everything in it."""
    image: Image = msgpack.unpackb(data)
    files = _disk_of(image)
    if "views.db" in image:
        _fill_database(files, image["views.db"])
    bench = StoreBench(files=files, **CONFIG)
    store = bench.store
    try:
        for topic in list(store.tables.topics.values())[:8]:
            for queue in topic.queues[:4]:
                _read(bench, queue)
        if "a" in store.tables.topics:
            bench.append(bench.queue("a"))
        bench.flush()
        bench.checkpoint()
        bench.maintain(2)
    finally:
        store.close()


def _read(bench: StoreBench, queue: Any) -> None:
    """Every batch; a queue whose index is damaged says so until maintenance has made it anew."""
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
        offset = chunk.next_offset
    with suppress(NotReadyError):
        bench.store.offset_at(queue, 3)


# --- bending --------------------------------------------------------------------------------------------------------------


def bend_folder(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """The image with one file, seldom two, bent or gone."""
    image = msgpack.unpackb(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(image))
        if rng.random() < 0.03:
            del image[name]
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
    return [Target("folder", take, [msgpack.packb(make_folder())], bend_folder)]

