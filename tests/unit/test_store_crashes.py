"""Whatever happens, and whenever the power goes: what was flushed is there, unchanged and in order, and the views are its fold.

One model, driven by hypothesis: it appends, writes, flushes, saves, cleans up, ends, kills and cuts the power at any change of
the disk, deletes what can be rebuilt, and opens again. After each opening the log's files are read by the format alone and
compared with what was appended, and the store's tables and queues with a fresh fold of those files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store_bench import ASYNC, FOLDER, LOG, QUEUES, StoreBench, describe, fold, log_entries, read_all, run
from zrmq.files import remove_tree
from zrmq.protocol.batch import BatchHeader
from zrmq.protocol.events import (
    BrokerStarted,
    BrokerStopped,
    GroupDeleted,
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    TopicDeleted,
)
from zrmq.store.job import Job
from zrmq.testing.files import FaultyFiles, PowerCut

Batch = tuple[int, int, int, int, int]  # topic id, queue id, base offset, producer id, first sequence


class Model:
    """A store, and what its log must have."""

    def __init__(self, seed: int, short_writes: bool) -> None:
        files = FaultyFiles(seed)
        self.bench = StoreBench(files=files, segment_bytes=8 * 1024, checkpoint_bytes=20_000, checkpoint_ms=1_000_000)
        files.short_writes = short_writes
        self.appended: list[tuple[int, Any]] = []  # end position, what was appended
        self.jobs: dict[str, Job] = {}
        self.leases = 0
        self.bench.topic("a", 2)
        self.bench.topic("b", 1, flush_mode=ASYNC)
        self.note_all()

    def note_all(self) -> None:
        """Take over what setting up has appended."""
        self.bench.flush()
        self.appended = [(header.position + header.length, content) for header, content in contents(self.bench)]

    # --- what may happen ----------------------------------------------------------------------------------------------

    def append(self, topic: int, queue_id: int, count: int, size: int, producer: int) -> None:
        names = sorted(self.bench.store.tables.topics)
        if not names:
            return
        queues = self.bench.store.tables.topics[names[topic % len(names)]].queues
        queue = queues[queue_id % len(queues)]
        first = self.bench.sequences.get(producer, 1)
        placed = self.bench.append(queue, count, size, producer)
        self.appended.append(
            (placed.end_position, (queue.topic.topic_id, queue.queue_id, placed.base_offset, producer, first))
        )

    def event(self, kind: int, number: int) -> None:
        tables = self.bench.store.tables
        ids = sorted(tables.topics_by_id)
        topic_id = ids[number % len(ids)] if ids else 99
        group = f"group-{number % 3}"
        next_offset = tables.topics_by_id[topic_id].queues[0].next_offset if ids else 0
        self.leases += 1
        events = [
            OffsetsCommitted(group, "", [(topic_id, 0, min(number, next_offset))]),
            GroupSubscribed(group, "a", number, [(0, number), (1, 3)]),
            LeaseGranted(group, topic_id, number % 2, f"client-{number}", self.leases),
            LeaseReleased(group, topic_id, number % 2, self.leases - 1),
            OffsetsCommitted(group, f"instance-{number}", [(topic_id, 0, 0), (77, 0, 5)]),
            GroupDeleted(group),
        ]
        event = events[kind % len(events)]
        self.appended.append((self.bench.store.append_event(event), event))

    def change_topic(self, number: int) -> None:
        tables = self.bench.store.tables
        name = "abc"[number % 3]
        if name in tables.topics and number % 5 == 0:
            event = TopicDeleted(tables.topics[name].topic_id)
            self.appended.append((self.bench.store.append_event(event), event))
        else:
            known = tables.topics.get(name)
            queue_count = max(1 + number % 4, len(known.queues) if known else 0)
            queues = self.bench.topic(name, queue_count, flush_mode=ASYNC if number % 2 else "sync")
            end = self.bench.store.appended_position
            self.appended.append((end, ("topic", queues[0].topic.topic_id, queue_count)))

    def begin(self, kind: str) -> None:
        """Begin a job, and leave it begun."""
        store = self.bench.store
        begins: dict[str, Callable[[], Job | None]] = {
            "flush": store.begin_flush, "checkpoint": lambda: store.begin_checkpoint(force=True),
            "maintenance": store.begin_maintenance,
        }
        if kind not in self.jobs:
            self.bench.clock.advance(1000)
            job = begins[kind]()
            if job is not None:
                self.jobs[kind] = job

    def finish(self, kind: str) -> None:
        """Finish a job that was begun."""
        run(self.jobs.pop(kind, None))

    def flush(self) -> None:
        self.finish("flush")
        self.bench.flush()

    # --- ends and new beginnings --------------------------------------------------------------------------------------

    def end(self, how: str, lose_views: bool, lose_queues: bool, cut_after: int | None) -> None:
        """End this life in one of three ways, and begin the next, perhaps with another power cut in the middle of recovery."""
        store = self.bench.store
        safe_position = store.flushed_position
        if how == "close":
            for kind in list(self.jobs):
                self.finish(kind)
            store.close()
            safe_position = store.flushed_position
        elif how == "kill":
            safe_position = store.written_position
            self.bench.files.kill()
        else:
            self.bench.files.crash()
        self.jobs.clear()
        self._lose(lose_views, lose_queues)
        if cut_after is not None:
            self.bench.files.cut_power_after(cut_after)
        try:
            self.bench.open()
        except PowerCut:
            safe_position = min(safe_position, store.flushed_position)
            self.bench.crash()
        self.bench.files._changes_left = None
        self.check(safe_position)

    def _lose(self, views: bool, queues: bool) -> None:
        files = self.bench.files
        if views:
            files.unlink(FOLDER / "views.db")
            files.fsync_dir(FOLDER)
        if queues:
            remove_tree(files, QUEUES)
            files.fsync_dir(FOLDER)

    def check(self, safe_position: int) -> None:
        """The promises."""
        store = self.bench.store
        assert store.failure is None
        assert store.recovery.damage == []
        found = [same(content) for _, content in contents(self.bench)]
        must = sum(end <= safe_position for end, _ in self.appended)
        expected = [same(content) for _, content in self.appended]
        assert found == expected[: len(found)], "the log has what was appended, in order"
        assert len(found) >= must, "nothing that was safe is lost"
        del self.appended[len(found) :]
        assert describe(store.tables) == describe(fold(self.bench.disk)), "the tables are the fold of the log"
        for topic in store.tables.topics.values():
            for queue in topic.queues:
                wanted = [
                    content for _, content in self.appended
                    if is_batch(content) and content[:2] == (topic.topic_id, queue.queue_id)
                ]
                assert [key(header) for header, _ in read_all(store, queue)] == wanted
                assert queue.visible_offset == queue.next_offset
        self.bench.sequences = {
            window_key[0]: max(window.highest_sequence + 1, self.bench.sequences.get(window_key[0], 1))
            for window_key, window in store.tables.windows.items()
        }


def contents(bench: StoreBench) -> list[tuple[Any, Any]]:
    """The log's batches and events, but for what the store says by itself."""
    return [
        (header, key(content) if isinstance(content, BatchHeader) else content)
        for header, content in log_entries(bench.disk)
        if content is not None and not isinstance(content, BrokerStarted | BrokerStopped)
    ]


def key(header: BatchHeader) -> Batch:
    return header.topic_id, header.queue_id, header.base_offset, header.producer_id, header.first_sequence


def same(content: Any) -> Any:
    """Topics are compared by what the model knows of them."""
    config = getattr(content, "config", None)
    return ("topic", content.topic_id, config.queue_count) if config is not None else content


def is_batch(content: Any) -> bool:
    return isinstance(content, tuple) and len(content) == 5


number = st.integers(0, 12)
job = st.sampled_from(["flush", "checkpoint", "maintenance"])
steps = st.one_of(
    st.tuples(st.just("append"), number, number, st.integers(1, 4), st.sampled_from([10, 100, 700]), st.integers(1, 3)),
    st.tuples(st.just("append"), number, number, st.integers(1, 4), st.sampled_from([10, 100, 700]), st.integers(1, 3)),
    st.tuples(st.just("event"), number, number),
    st.tuples(st.just("change_topic"), number),
    st.tuples(st.just("write")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("begin"), job),
    st.tuples(st.just("finish"), job),
    st.tuples(st.just("cut_power_after"), st.integers(0, 30)),
    st.tuples(
        st.just("end"), st.sampled_from(["crash", "crash", "kill", "close"]), st.booleans(), st.booleans(),
        st.one_of(st.none(), st.integers(0, 25)),
    ),
)


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 32), short_writes=st.booleans(), script=st.lists(steps, max_size=60))
def test_what_was_flushed_is_there_and_the_views_are_its_fold(
    seed: int, short_writes: bool, script: list[tuple[Any, ...]]
) -> None:
    model = Model(seed, short_writes)
    for name, *arguments in script:
        target = {"write": lambda: model.bench.store.write(), "cut_power_after": model.bench.files.cut_power_after}
        try:
            target.get(name, getattr(model, name, None))(*arguments)  # type: ignore[misc]
        except PowerCut:
            model.end("crash", False, False, None)
    model.end("crash", True, False, None)
    model.end("close", False, True, None)


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), cut=st.integers(0, 120))
def test_the_power_may_go_at_every_change_of_a_busy_day(seed: int, cut: int) -> None:
    """The same day each time, with rolls, saves, and upkeep; only the moment of the cut differs."""
    model = Model(seed, False)
    model.bench.files.cut_power_after(cut)
    try:
        for step in range(60):
            model.append(step, step, 3, 300, 1 + step % 3)
            model.event(step, step)
            if step % 3 == 0:
                model.flush()
            if step % 7 == 0:
                model.begin("checkpoint")
                model.flush()
                model.begin("checkpoint")
                model.finish("checkpoint")
            if step % 11 == 0:
                model.begin("maintenance")
                model.finish("maintenance")
    except PowerCut:
        pass
    model.end("crash", False, False, cut % 40)
    model.end("crash", cut % 2 == 0, cut % 3 == 0, None)
    assert model.bench.store.tables.topics.keys() == {"a", "b"}
    assert LOG.name in model.bench.files.listdir(FOLDER)
