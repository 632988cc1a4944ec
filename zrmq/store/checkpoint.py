"""Checkpoints: the views saved as they are at one position of the log, without stopping the loop.

    capture   loop    a copy of everything that has changed since the last checkpoint, at `appended_position`
    (wait)            until that position is flushed: views.db must never know more than the log
    write     thread  queue files, and sync them; then one SQLite transaction; then files nobody needs any more
    finish    loop    what is saved is marked so; on failure everything is still to be saved

Only the order protects anybody: an entry that views.db says is in a queue file is on disk there, a segment that is deleted is
behind a saved position.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from zrmq.files import remove_tree
from zrmq.logs import get_logger
from zrmq.store.commit_log import CommitLog
from zrmq.store.consume_queue import QueueSave, SyncFailedError
from zrmq.store.job import Job
from zrmq.store.segment import Segment
from zrmq.store.tables import Changed, Tables
from zrmq.store.views import Views
from zrmq.store.views_db import Meta, Saved, SegmentRow, ViewsDb, WindowRow, group_row

log = get_logger("store")


class Checkpoint(Job):
    """One save. Made on the loop's thread; `is_saved` says whether it is done."""

    def __init__(
        self, commit_log: CommitLog, views: Views, database: ViewsDb, saved_position: int,
        on_finished: Callable[[Checkpoint], None],
    ) -> None:
        self.position = commit_log.appended_position
        self._views = views
        self._database = database
        self._on_finished = on_finished
        self._files = commit_log.files
        self._changed = views.tables.take_changed()
        self._queues = [index.begin_save() for index in views.indexes() if not index.is_saved]
        self._segments = [
            segment for segment in commit_log.segments
            if segment.end > saved_position or (segment.corrections, segment.scrubbed_ms) != segment.saved
        ]
        self._captured = [(segment.corrections, segment.scrubbed_ms) for segment in self._segments]
        self._dead_folders, views.dead_folders = views.dead_folders, []
        self.saved = _capture(views.tables, self._changed, self._queues, self._segments, saved_position)
        self.saved.meta.log_start = commit_log.start
        self.saved.meta.applied_position = self.saved.meta.flushed_position = self.position
        self.is_saved = False

    @property
    def is_disk_unsure(self) -> bool:
        """Whether what is read from a queue file may not be what is on disk."""
        return isinstance(self.error, SyncFailedError)

    def mark_stopped(self) -> None:
        """This is the last save of a store that ends with everything flushed."""
        self.saved.meta.stopped = 1

    def abandon(self) -> None:
        """It was not run, or failed: what it took is still to be saved."""
        for save in self._queues:
            save.index.finish_save(save, False)
        self._views.tables.give_back(self._changed)
        self._views.dead_folders += self._dead_folders

    def work(self) -> None:
        for save in self._queues:
            save.write()
        for save in self._queues:
            save.sync()
        self._database.save(self.saved)
        self.is_saved = True
        self._clean()

    def _clean(self) -> None:
        """Remove what nobody needs any more; what one queue's folder refuses keeps no other's files."""
        refused = None
        for save in self._queues:
            try:
                save.clean()
            except OSError as error:
                refused = error
        for folder in self._dead_folders:
            remove_tree(self._files, folder)
        if refused is not None:
            raise refused

    def finish(self) -> None:
        if self.is_saved:
            for save in self._queues:
                save.index.finish_save(save, True)
            for segment, captured in zip(self._segments, self._captured, strict=True):
                segment.saved = captured
            log.debug("views_saved", position=self.position, queues=len(self._queues), offsets=len(self.saved.offsets))
            if self.error is not None:
                self._views.dead_folders += self._dead_folders
                log.warning("queue_files_not_removed", position=self.position, reason=str(self.error))
        else:
            self.abandon()
            log.warning("views_not_saved", position=self.position, reason=str(self.error))
        self._on_finished(self)


def _capture(
    tables: Tables, changed: Changed, queues: list[QueueSave], segments: list[Segment], saved_position: int
) -> Saved:
    groups = [tables.groups[name] for name in changed.groups if name in tables.groups]
    oldest = next(iter(tables.windows.values()), None)
    topics = [tables.topics_by_id[topic_id] for topic_id in changed.topics if topic_id in tables.topics_by_id]
    return Saved(
        meta=Meta(
            applied_position=0, flushed_position=0, log_start=0, boot=tables.boot, next_topic_id=tables.next_topic_id,
            relocated_from=tables.relocated_from, session_timeout_ms=tables.session_timeout_ms,
        ),
        topics=[(topic.topic_id, topic.config) for topic in topics],
        topics_deleted=list(changed.topics_deleted),
        queues=[save.row for save in queues],
        groups=[group_row(group) for group in groups],
        groups_deleted=list(changed.groups_deleted),
        offsets=_offset_rows(tables, changed),
        windows=_window_rows(tables, saved_position),
        windows_from=oldest.position if oldest else 0,
        segments=[_segment_row(segment) for segment in segments],
    )


def _offset_rows(tables: Tables, changed: Changed) -> list[tuple[str, str, int, int, int]]:
    rows = []
    for name, instance_name, topic_id, queue_id in changed.offsets:
        group = tables.groups.get(name)
        offset = group.offsets.get((instance_name, topic_id, queue_id)) if group else None
        if offset is not None:
            rows.append((name, instance_name, topic_id, queue_id, offset))
    return rows


def _window_rows(tables: Tables, saved_position: int) -> list[WindowRow]:
    """The windows that were added to since, found from the newest end of their order."""
    newest_first = takewhile(lambda item: item[1].position >= saved_position, reversed(tables.windows.items()))
    return [(*key, window.position, window.highest_sequence, bytes(window.sent)) for key, window in newest_first]


def _segment_row(segment: Segment) -> SegmentRow:
    shares = {topic_id: (share.last_ms, share.size_bytes) for topic_id, share in segment.shares.items()}
    return segment.start, segment.last_ms, segment.scrubbed_ms, shares
