"""A store on a disk that breaks, driven by hand: what the tests of the store share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zrmq.files import Files, read_file
from zrmq.message import FlushMode
from zrmq.protocol.batch import (
    ENTRY_HEADER_BYTES,
    KIND_BATCH,
    KIND_EVENT,
    KIND_SEGMENT_END,
    BatchHeader,
    Columns,
    EntryHeader,
    decode_records,
    encode_batch,
    entry_checks_out,
    iter_batches,
    open_batch,
    peek_batch,
    peek_entry,
)
from zrmq.protocol.events import AnyEvent, TopicConfig, TopicPut, decode_event
from zrmq.protocol.requests import PullStatus
from zrmq.protocol.tags import tag_mask
from zrmq.store.config import StoreConfig
from zrmq.store.job import Job
from zrmq.store.segment import segment_name, start_of
from zrmq.store.store import Placed, Store
from zrmq.store.tables import Queue, Tables
from zrmq.testing.clock import ManualClock
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/data/broker")
LOG = FOLDER / "commitlog"
QUEUES = FOLDER / "consumequeue"
SEGMENT_BYTES = 16 * 1024


class StoreBench:
    """One data folder and the store on it. Small segments, so that a few kilobytes make a long log."""

    def __init__(self, seed: int = 1, files: Files | None = None, folder: Path = FOLDER, **config: Any) -> None:
        self.disk = FaultyFiles(seed) if files is None else files
        self.clock = ManualClock()
        self.folder = folder
        self.config = StoreConfig(**{"segment_bytes": SEGMENT_BYTES, **config})
        self.sequences: dict[int, int] = {}
        self.open()

    @property
    def files(self) -> FaultyFiles:
        assert isinstance(self.disk, FaultyFiles)
        return self.disk

    def open(self) -> Store:
        self.store = Store.open(
            self.folder, files=self.disk, clock=self.clock, config=self.config, broker_name="broker-a", cluster="test"
        )
        return self.store

    def crash(self) -> Store:
        """Power off, on, and the broker starts again."""
        self.files.crash()
        return self.open()

    def kill(self) -> Store:
        """The process ends without a word and starts again."""
        self.files.kill()
        return self.open()

    def reopen(self) -> Store:
        """A clean end and a new start."""
        self.store.close()
        return self.open()

    # --- writing ------------------------------------------------------------------------------------------------------

    def topic(self, name: str = "meters", queue_count: int = 2, **config: Any) -> list[Queue]:
        """Create the topic or change it; returns its queues."""
        known = self.store.tables.topics.get(name)
        topic_id = known.topic_id if known else self.store.tables.next_topic_id
        self.store.append_event(TopicPut(topic_id, TopicConfig(name, queue_count, **config)))
        return self.store.tables.topics[name].queues

    def queue(self, name: str = "meters", queue_id: int = 0) -> Queue:
        return self.store.tables.topics[name].queues[queue_id]

    def append(
        self, queue: Queue, count: int = 1, size: int = 50, producer_id: int = 7, tag: str | None = None, first_sequence: int = 0
    ) -> Placed:
        """Append a batch of `count` bodies of `size` bytes, with the producer's next sequences if none is given."""
        first = first_sequence or self.sequences.get(producer_id, 1)
        self.sequences[producer_id] = max(first + count, self.sequences.get(producer_id, 1))
        return append(self.store, queue, count, size, producer_id, first, tag)

    def flush(self) -> None:
        """Write and flush, as the end of a turn does."""
        run(self.store.begin_flush())

    def checkpoint(self) -> None:
        """Save the views now."""
        job = self.store.begin_checkpoint(force=True)
        if job is None:
            self.flush()
            job = self.store.begin_checkpoint(force=True)
        assert job is not None
        run(job)

    def maintain(self, rounds: int = 1) -> None:
        """So many rounds of maintenance, a second apart."""
        for _ in range(rounds):
            self.clock.advance(1000)
            run(self.store.begin_maintenance())
            if self.store.needs_flush:  # something was relocated first
                self.flush()
                run(self.store.begin_maintenance())

    def fill_segments(self, queue: Queue, count: int, size: int = 500, **more: Any) -> None:
        """Append and flush until the log has so many more segments."""
        wanted = len(self.segments()) + count
        while len(self.segments()) < wanted:
            self.append(queue, size=size, **more)
            self.flush()

    # --- reading ------------------------------------------------------------------------------------------------------

    def bodies(self, queue: Queue) -> list[bytes]:
        """The bodies of all visible messages, by way of `read`."""
        return [body for _, columns in read_all(self.store, queue) for body in columns]

    def segments(self) -> list[int]:
        """Start positions of the segments on the disk."""
        return [start for start in map(start_of, self.disk.listdir(self.folder / "commitlog")) if start is not None]

    def path_at(self, position: int) -> tuple[Path, int]:
        """The file that has a position of the log, and where in it."""
        start = max(start for start in self.segments() if start <= position)
        return self.folder / "commitlog" / segment_name(start), position - start

    def rot(self, position: int) -> None:
        """Flip a bit of the log's byte at a position."""
        path, at = self.path_at(position)
        self.files.rot(path, at)


def run(job: Job | None) -> None:
    """What a flusher does with a job."""
    if job is not None:
        job.run()
        job.finish()


def batch(
    count: int = 1, size: int = 50, producer_id: int = 7, first_sequence: int = 1, tag: str | None = None
) -> tuple[BatchHeader, bytes]:
    """A producer's batch; each body tells its sequence."""
    bodies = [(b"%d/%d " % (producer_id, first_sequence + index)).ljust(size, b".") for index in range(count)]
    tags = [tag] * count if tag else None
    frame = encode_batch(
        Columns(bodies, tags), producer_id=producer_id, first_sequence=first_sequence, first_born_ms=5, last_born_ms=9
    )
    header = open_batch(frame)
    assert header.tag_mask == tag_mask(tags or [])
    return header, frame


def append(
    store: Store, queue: Queue, count: int = 1, size: int = 50, producer_id: int = 7, first_sequence: int = 1,
    tag: str | None = None,
) -> Placed:
    """Append one batch."""
    return store.append_batch(queue, *batch(count, size, producer_id, first_sequence, tag))


def read_all(store: Store, queue: Queue, bytes_max: int = 4096) -> list[tuple[BatchHeader, list[bytes]]]:
    """All visible batches of a queue that are not damaged, from its first offset on."""
    found, offset = [], store.read(queue, queue.min_offset, 1).min_offset  # a read trims the queue where that is due
    while offset < queue.visible_offset:
        chunk = store.read(queue, offset, bytes_max)
        assert chunk.next_offset > offset, chunk
        assert (chunk.status is PullStatus.FOUND) == bool(chunk.frames), chunk
        assert chunk.status in (PullStatus.FOUND, PullStatus.CORRUPT), chunk
        for frame in chunk.frames:
            for header, whole in iter_batches(frame):
                found.append((header, decode_records(header, whole).bodies))
        offset = chunk.next_offset
    return found


def log_entries(files: Files, folder: Path = LOG) -> list[tuple[EntryHeader, BatchHeader | AnyEvent | None]]:
    """All entries of a log whose files are whole, read by the format alone: the store's own reading takes no part."""
    found: list[tuple[EntryHeader, BatchHeader | AnyEvent | None]] = []
    for start in (start for start in map(start_of, files.listdir(folder)) if start is not None):
        data, at = read_file(files, folder / segment_name(start)), 64
        while True:
            header = peek_entry(data, at)
            if header is None or header.position != start + at or not entry_checks_out(data, header, at):
                break
            if header.kind == KIND_BATCH:
                found.append((header, peek_batch(data, at)))
            elif header.kind == KIND_EVENT:
                found.append((header, decode_event(data[at + ENTRY_HEADER_BYTES : at + header.length])))
            else:
                assert header.kind == KIND_SEGMENT_END
                found.append((header, None))
            at += header.length
    return found


def fold(files: Files, folder: Path = LOG) -> Tables:
    """Tables folded from all of a log, afresh."""
    tables = Tables()
    for _, content in log_entries(files, folder):
        if isinstance(content, BatchHeader):
            tables.apply_batch(content)
        elif content is not None:
            tables.apply_event(content)
    return tables


def describe(tables: Tables) -> dict[str, Any]:
    """Tables as plain values, to be compared."""
    return {
        "topics": {
            topic_id: (topic.config, [(queue.min_offset, queue.next_offset) for queue in topic.queues])
            for topic_id, topic in sorted(tables.topics_by_id.items())
        },
        "names": {name: topic.topic_id for name, topic in sorted(tables.topics.items())},
        "groups": {
            name: (
                {
                    (instance_name, topic): (its.since_ms, its.starts)
                    for instance_name, each in group.subscriptions.items() for topic, its in each.items()
                },
                dict(group.offsets), dict(group.leases),
            )
            for name, group in sorted(tables.groups.items())
        },
        "windows": [(key, its.position, its.highest_sequence, bytes(its.sent)) for key, its in tables.windows.items()],
        "numbers": (
            tables.next_topic_id, tables.boot, tables.is_stopped, tables.relocated_from, tables.session_timeout_ms
        ),
    }


ASYNC = FlushMode.ASYNC
