"""The views of the log together: the tables, and each queue's entries. One fold for what happens and for what is replayed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from zrmq.logs import get_logger
from zrmq.protocol.batch import BatchHeader
from zrmq.protocol.events import AnyEvent, TopicDeleted, TopicPut
from zrmq.store.consume_queue import ConsumeQueue, Shelf
from zrmq.store.segment import Found
from zrmq.store.tables import Queue, Tables

log = get_logger("store")


class Views:
    """Everything that is folded from the log. Loop thread only."""

    def __init__(self, shelf: Shelf) -> None:
        self.tables = Tables()
        self.shelf = shelf
        self.dead_folders: list[Path] = []  # of deleted topics; removed when the views without them are saved
        self._indexes: dict[Queue, ConsumeQueue] = {}
        self._is_spilling_refused = False

    def index(self, queue: Queue) -> ConsumeQueue:
        """The queue's entries."""
        index = self._indexes.get(queue)
        if index is None:
            index = ConsumeQueue(queue, self.shelf)
            if self.tables.topics_by_id.get(queue.topic.topic_id) is queue.topic:  # else it was deleted and is nobody's any more
                self._indexes[queue] = index
        return index

    def indexes(self) -> list[ConsumeQueue]:
        """Those of all queues that ever had entries."""
        return list(self._indexes.values())

    def apply_event(self, event: AnyEvent) -> None:
        """Fold one event."""
        topic = None
        if isinstance(event, TopicDeleted):
            topic = self.tables.topics_by_id.get(event.topic_id)
        elif isinstance(event, TopicPut):
            topic = self.tables.topics.get(event.config.topic)
        self.tables.apply_event(event)
        if topic is not None and topic.topic_id not in self.tables.topics_by_id:
            self.dead_folders.append(self.shelf.folder_of_topic(topic))
            self.shelf.forget(self.dead_folders[-1])
            for queue in topic.queues:
                self._indexes.pop(queue, None)

    def apply_batch(self, header: BatchHeader) -> Queue | None:
        """Fold one batch of the log; None when the tables have no place for it."""
        queue = self.tables.apply_batch(header)
        if queue is None:
            return None
        index = self.index(queue)
        index.add(
            header.base_offset, header.position, header.length, header.record_count, header.store_timestamp_ms, header.tag_mask
        )
        if index.is_long:
            self.spill(index)
        return queue

    def spill(self, index: ConsumeQueue) -> None:
        """Move the queue's newest entries to its files; without room for that they stay in memory."""
        try:
            index.spill()
        except OSError as error:
            if not self._is_spilling_refused:
                log.warning("queue_file_refused", path=str(index.folder), reason=str(error))
            self._is_spilling_refused = True
        else:
            self._is_spilling_refused = False


def index_anew(entries: Iterable[Found], queues: Collection[Queue], shelf: Shelf) -> list[ConsumeQueue]:
    """The entries of these queues, made from those of the log. Any thread: the queues themselves are not touched."""
    made = {(queue.topic.topic_id, queue.queue_id): ConsumeQueue(queue, shelf) for queue in queues}
    next_offsets = dict.fromkeys(made, 0)
    for found in entries:
        batch = found.header
        if not isinstance(batch, BatchHeader):
            continue
        key = (batch.topic_id, batch.queue_id)
        if key in made and batch.base_offset >= next_offsets[key]:
            next_offsets[key] = batch.next_offset
            made[key].add(
                batch.base_offset, batch.position, batch.length, batch.record_count, batch.store_timestamp_ms, batch.tag_mask
            )
    return list(made.values())
