"""The views together: a batch is in the tables and in its queue, and neither outlives its topic."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.unit.test_store_tables import PUT, header
from zrmq.protocol.events import TopicDeleted
from zrmq.store.consume_queue import TAIL_BYTES_MAX, Shelf
from zrmq.store.open_files import OpenFiles
from zrmq.store.segment import Found
from zrmq.store.views import Views, index_anew
from zrmq.testing.files import FaultyFiles

FOLDER = Path("/data/consumequeue")


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def views(files: FaultyFiles) -> Views:
    made = Views(Shelf(files, FOLDER, OpenFiles(files)))
    made.apply_event(PUT)
    return made


def test_a_batch_is_in_both(views: Views) -> None:
    queue = views.apply_batch(header(count=3, position=64))
    assert queue is views.tables.topics["meters"].queues[0]
    assert [entry[:4] for entry in views.index(queue).entries(0)] == [(0, 64, 200, 3)]
    assert queue.next_offset == 3
    assert views.apply_batch(header(topic_id=9)) is None
    assert views.apply_batch(header(base_offset=2)) is None
    assert views.index(queue).end == 1


def test_a_queue_without_batches_has_no_entries_to_keep(views: Views) -> None:
    assert views.indexes() == []
    index = views.index(views.tables.topics["meters"].queues[1])
    assert views.index(index.queue) is index
    assert views.indexes() == [index]


def test_a_deleted_topic_s_files_are_not_kept_open(views: Views, files: FaultyFiles) -> None:
    queue = views.apply_batch(header())
    assert queue is not None
    index = views.index(queue)
    index.spill()
    assert index.entry(0).base_offset == 0
    held = views.shelf._open_files.get(index.folder / f"{0:020d}")
    views.apply_event(TopicDeleted(1))
    with pytest.raises(OSError, match="Bad file"):
        held.pread(1, 0)


def test_a_deleted_topic_takes_its_queues_along(views: Views) -> None:
    queue = views.apply_batch(header())
    assert queue is not None
    views.apply_event(TopicDeleted(1))
    assert views.indexes() == []
    assert views.dead_folders == [FOLDER / "meters@1"]
    views.apply_event(TopicDeleted(1))
    assert len(views.dead_folders) == 1
    views.index(queue)
    assert views.indexes() == [], "whoever still has the queue does not bring it back"


def test_long_tails_go_to_files_while_the_log_is_replayed(views: Views, files: FaultyFiles) -> None:
    count = TAIL_BYTES_MAX // 44 + 10
    for number in range(count):
        views.apply_batch(header(base_offset=number, first_sequence=number + 1, position=number))
    (index,) = views.indexes()
    assert index.filed > 0
    assert len(index.tail) < TAIL_BYTES_MAX
    assert [entry.base_offset for entry in index.entries(0)] == list(range(count))


def test_without_room_for_files_entries_stay_in_memory(
    views: Views, files: FaultyFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = views.apply_batch(header())
    assert queue is not None
    files.fail("open", errno.ENOSPC, times=3)
    for _ in range(3):
        views.spill(views.index(queue))
    assert views.index(queue).filed == 0
    assert capsys.readouterr().err.count("queue_file_refused") == 1
    views.spill(views.index(queue))
    assert views.index(queue).filed == 1


def test_entries_are_made_anew_for_the_queues_asked_for(views: Views) -> None:
    batches = [header(queue_id=number % 2, base_offset=number // 2, position=100 * number) for number in range(10)]
    overlapping = header(queue_id=0, base_offset=1, position=5000)
    found = [Found(batch.position, batch.position + 100, batch, b"", 0, True) for batch in (*batches, overlapping)]
    found.insert(3, Found(250, 300, None, b"", 0, False))
    queue = views.tables.topics["meters"].queues[0]
    (made,) = index_anew(found, [queue], views.shelf)
    assert [entry.base_offset for entry in made.entries(0)] == [0, 1, 2, 3, 4]
    assert queue.next_offset == 0, "the queue itself is not touched"
    assert index_anew(found, [], views.shelf) == []
