"""Recovery: what the last run left on disk becomes a log that ends where it should, and views that are its fold.

Where does the log end? Entries are written in order and synced in groups; what was written and not synced may be there after a
crash, or not, or in part, in any order. So behind the last flushed position the log ends before the first entry that does not
check out, and whatever lies behind that is erased, or a later crash could mistake it for new. Nobody was told that it is stored.
But a torn entry can be read: where the disk refuses to, the start is refused too.

Before the last flushed position an entry that does not check out was on disk once: it is *damaged*, by the disk, not by the
crash. It is never cut off. It is stepped over, reported, and answered CORRUPT when it is read, and so is nothing else.

Telling the two apart needs the last flushed position, and the crash took the number that the process had in mind. But every
entry carries the flushed position of the moment it was appended, and views.db has one. The greatest of all that can be found, in
front of the doubtful place *and behind it*, is what is known:

      flushed      damaged, 3 says so        3: flushed = 2's end         torn: nothing behind says it was flushed
    |----1----|xxxxxxxxx2xxxxxxxxxxxx|----------3----------|-----4-----|~~~~5~~~~|
                                                                       ^ the log ends here

What is known goes into views.db before anything is erased or removed: the entry that said so may be erased, and the start that
erases it may be cut short.

A damaged stretch without a header may have held batches of any queue. Their offsets were told to producers and consumers, and who
goes on at an offset would pass over what is stored in its place. So a queue whose last batch lies in front of such a stretch goes
on behind all offsets that the stretch may have held, and the log says so: `RecoveryReport.advances`.

What is kept behind the last flushed position is written once more and synced: a sync that failed in the last run may have left it
in the page cache only, taken for written.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf

import msgspec

from zrmq.errors import DamageError, FolderUnusableError, InvalidFrameError
from zrmq.files import remove_tree
from zrmq.logs import get_logger
from zrmq.protocol import limits
from zrmq.protocol.batch import BATCH_HEADER_BYTES, ENTRY_HEADER_BYTES, KIND_EVENT, KIND_SEGMENT_END, BatchHeader
from zrmq.protocol.events import AnyEvent, BrokerStarted, QueuesAdvanced, StateRelocated, TopicDeleted, TopicPut, decode_event
from zrmq.store.commit_log import CommitLog, scan_segments
from zrmq.store.relocation import OFFSETS_PER_EVENT
from zrmq.store.segment import ENTRY_BYTES_MAX, UNREADABLE, EntryReader, Found, Segment, Share, newer_version, peek_header
from zrmq.store.tables import Queue, Topic, Window
from zrmq.store.views import Views, index_anew
from zrmq.store.views_db import Saved, ViewsDb, group_of

log = get_logger("store")


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found when the folder was opened."""

    is_clean: bool  # the last run ended by `close`, or there was none
    has_views: bool  # False: the views were made from the whole log
    is_complete: bool  # False: what deleted segments said is lost with the views
    replayed_from: int  # position in the log
    replayed_entries: int
    end_position: int  # where the log went on
    cut_bytes: int  # of unflushed entries behind one that did not check out
    damage: list[tuple[int, int]]  # stretches (position, end) of flushed bytes that do not check out, as far as they were read
    unplaced_batches: int  # of topics that are gone or that nobody knows any more
    queues_reindexed: int  # whose files were missing
    starts_lost: int = 0  # at most so many, behind the last one that is known, were said where damage is now
    advances: list[QueuesAdvanced] = []  # to be said in the log, before anything is stored


def recover(commit_log: CommitLog, views: Views, database: ViewsDb) -> RecoveryReport:
    """Fill the views, and let the log go on where it ends. `commit_log` has been loaded; nothing else runs.

    Raises `FolderUnusableError` when files are missing, unreadable where the log cannot make up for it, or of a newer version;
    `OSError`, `sqlite3.Error`.
    """
    whole = WholeLog(commit_log)
    saved = _load(commit_log, database, whole)
    returned: list[Segment] = []
    if saved is None:
        whole.look_through(database.flushed_position)
        if not whole.is_complete:
            log.error("state_lost", missing=whole.missing)
        database.begin()
        remove_tree(commit_log.files, views.shelf.folder)
    else:
        _restore(saved, commit_log, views)
        returned = commit_log.take_before(saved.meta.log_start)
    start = saved.meta.applied_position if saved else commit_log.start
    queues_reindexed = _reindex(commit_log, views, start)
    replay = Replay(commit_log, views, whole.topics, database.flushed_position)
    has_ended_there = saved is not None and bool(saved.meta.stopped) and not _goes_on(commit_log, start)
    if saved is not None:
        replay.report_missing(start, saved.meta.log_start if has_ended_there else None)
    if has_ended_there:
        _require(commit_log, start, start)
        end = start
    else:
        end = replay.run(start)
        _require_read(commit_log, end)
    database.mark_started(replay.flushed)  # before the entries go that say so, for this start may be cut short too
    for segment in returned:
        try:
            commit_log.files.unlink(segment.path)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            log.warning("segment_not_deleted", path=str(segment.path), reason=str(error))  # its disk is ill; it is not needed
    if not has_ended_there:
        replay.settle(end)
    commit_log.begin_at(end)
    _show(commit_log, views)
    report = RecoveryReport(
        is_clean=views.tables.is_stopped or has_ended_there or end == 0,
        has_views=saved is not None, is_complete=saved is not None or whole.is_complete, replayed_from=start,
        replayed_entries=replay.entries_count, end_position=end,
        cut_bytes=max(replay.valid_end - end, 0), damage=replay.damage, unplaced_batches=replay.unplaced_count,
        queues_reindexed=queues_reindexed,
        starts_lost=replay.lost_bytes // ENTRY_HEADER_BYTES, advances=replay.advances(),
    )
    facts = msgspec.structs.asdict(report)
    del facts["advances"], facts["starts_lost"]
    log.info("log_recovered", **facts)
    if report.advances:
        log.warning("offsets_skipped", queues=sum(len(event.next_offsets) for event in report.advances))
    return report


class Replay:
    """The fold of the log from one position to its end, which it finds."""

    def __init__(self, commit_log: CommitLog, views: Views, topics: dict[int, TopicPut], flushed: int) -> None:
        self.flushed = flushed  # the greatest flushed position known so far
        self.valid_end = 0  # behind the last entry that checks out, be it part of the log or not
        self.entries_count = 0
        self.unplaced_count = 0
        self.damage: list[tuple[int, int]] = []
        self._log = commit_log
        self._views = views
        self._topics = topics  # those of before the log's beginning, which it only tells of further on
        self._segment: Segment | None = None
        self.lost_bytes = 0  # in stretches without a header, since the last start that is known
        self._lost_records = 0  # that stretches without a header may have held
        self._lost_before: dict[Queue, int] = {}  # that of then, where a queue's next offset was known again

    def run(self, position: int) -> int:
        """Fold everything from `position` on. Returns where the log ends."""
        _require(self._log, position, self.flushed)
        for found in self._log.scan(position):
            if found.is_whole:
                self._fold(found)
                continue
            self._refuse_newer(found)
            if found.end > self.flushed:
                self._look_ahead(found)
            if found.position >= self.flushed:
                return found.position
            self._report(found)
            if found.header is not None:
                self._fold(found)
            if found.end > self.flushed:
                return self.flushed
        end = self._log.segments[-1].end if self._log.segments else position
        _require(self._log, end, self.flushed)
        return end

    def report_missing(self, position: int, log_start: int | None) -> None:
        """Report what is missing in front of `position`, where nothing is read. `log_start`: where the log began, if certain."""
        stretches = [] if log_start is None else [(log_start, self._log.start)]
        stretches += [(earlier.end, later.start) for earlier, later in pairwise(self._log.segments) if later.start <= position]
        for start, end in stretches:
            if start < end:
                self.damage.append((start, end))
                log.error("segments_missing", position=start, bytes=end - start)

    def settle(self, end: int) -> None:
        """Make the disk agree that the log ends at `end`, and that everything before is there."""
        self._log.remove_behind(end)
        self._log.erase(end, self.valid_end)
        self._log.rewrite(min(self.flushed, end), end)

    def _refuse_newer(self, found: Found) -> None:
        version = None if found.is_whole else newer_version(self._log.read, found.position)
        if version is not None:
            raise _newer(f"an entry of format {version}", found.position)

    def _look_ahead(self, doubtful: Found) -> None:
        """Look for entries behind the doubtful stretch that know more of what was flushed."""
        for found in (doubtful, *self._log.scan(doubtful.end)):
            self._refuse_newer(found)
            if found.header is not None:
                self.flushed = max(self.flushed, found.header.flushed_position)
                self.valid_end = max(self.valid_end, found.end)

    def _report(self, found: Found) -> None:
        end = min(found.end, self.flushed)
        self.damage.append((found.position, end))
        log.error("damage_found", position=found.position, bytes=end - found.position, during="recovery")
        if found.header is None:
            self.lost_bytes += end - found.position
            self._lost_records += (end - found.position) // BATCH_HEADER_BYTES * limits.BATCH_RECORDS_MAX

    def advances(self) -> list[QueuesAdvanced]:
        """Where the queues go on whose newest batches may be lost."""
        if not self._lost_records:
            return []
        events = []
        for topic in self._views.tables.topics.values():
            lost = [(queue, self._lost_records - self._lost_before.get(queue, 0)) for queue in topic.queues]
            offsets = [(queue.queue_id, queue.next_offset + count) for queue, count in lost if count]
            for at in range(0, len(offsets), OFFSETS_PER_EVENT):
                events.append(QueuesAdvanced(topic.topic_id, offsets[at : at + OFFSETS_PER_EVENT]))
        return events

    def _fold(self, found: Found) -> None:
        header = found.header
        assert header is not None
        self.flushed = max(self.flushed, header.flushed_position)
        self.entries_count += 1
        segment = self._segment
        if segment is None or not segment.start <= found.position < segment.end:
            self._segment = segment = self._log.segment_at(found.position)
            assert segment is not None
        if isinstance(header, BatchHeader):
            self._fold_batch(header, segment)
        elif header.kind == KIND_EVENT:
            self._fold_event(found)
            segment.note_event(header.store_timestamp_ms)
        elif header.kind != KIND_SEGMENT_END:
            raise _newer(f"an entry of kind {header.kind}", found.position)

    def _fold_batch(self, batch: BatchHeader, segment: Segment) -> None:
        if batch.base_offset + batch.record_count > limits.OFFSET_MAX:
            raise DamageError(
                f"The batch at {batch.position} of the log says that its offsets begin at {batch.base_offset}, and no queue is"
                " that long; its checksum is right, so it was written so. Restore the folder from a copy."
            )
        segment.note_batch(batch.topic_id, batch.store_timestamp_ms, batch.length)
        topic = self._topics.pop(batch.topic_id, None)
        if topic is not None:
            self._views.apply_event(topic)
        queue = self._views.apply_batch(batch)
        if queue is None:
            self.unplaced_count += 1
        elif self._lost_records:
            self._lost_before[queue] = self._lost_records

    def _fold_event(self, found: Found) -> None:
        event = _decode(found)
        if isinstance(event, TopicPut | TopicDeleted):
            self._topics.pop(event.topic_id, None)
        self._views.apply_event(event)
        if isinstance(event, BrokerStarted):
            self.lost_bytes = 0
        elif isinstance(event, QueuesAdvanced) and self._lost_records:
            topic = self._views.tables.topics_by_id.get(event.topic_id)
            said = {queue_id for queue_id, _ in event.next_offsets}
            queues = [queue for queue in topic.queues if queue.queue_id in said] if topic is not None else []
            self._lost_before |= dict.fromkeys(queues, self._lost_records)


class WholeLog:
    """What can be known of a log before it is folded from its beginning, where that is not the beginning of everything.

    Segments were deleted before; what they had said and what still held was said again, behind batches that need it.
    """

    def __init__(self, commit_log: CommitLog) -> None:
        self.topics: dict[int, TopicPut] = {}  # as the log first speaks of them
        self.missing: list[tuple[int, int]] = []  # stretches (position, end), ascending
        self._log = commit_log
        self._gaps = [
            (earlier.end, later.start) for earlier, later in pairwise(commit_log.segments) if earlier.end != later.start
        ]
        self.is_complete = commit_log.start == 0 and not self._gaps

    def look_through(self, flushed: int) -> None:
        """Read its events, unless nothing is missing anyway. `flushed`: as far as it is known to have been on disk."""
        if self.is_complete:
            return
        doubtful: list[int] = []
        relocated: list[tuple[int, int]] = []  # from and to where
        for found in self._log.scan(self._log.start):
            if found.header is not None:
                flushed = max(flushed, found.header.flushed_position)
            if not found.is_whole:
                doubtful.append(found.position)
            elif found.header is not None and found.header.kind == KIND_EVENT:
                event = _decode(found)
                if isinstance(event, TopicPut):
                    self.topics.setdefault(event.topic_id, event)
                elif isinstance(event, StateRelocated):
                    relocated.append((event.position, found.position))
        self.missing = self._missing(flushed)
        if not self.missing:
            self.topics.clear()
            self.is_complete = True
            return
        start = self.missing[-1][1]
        end = next((position for position in doubtful if position >= flushed), inf)  # see `Replay.run`
        self.is_complete = any(
            position >= start and to < end and not any(position <= doubt < to for doubt in doubtful) for position, to in relocated
        )

    def _missing(self, flushed: int) -> list[tuple[int, int]]:
        """A gap before what was flushed is a file that is lost, or a power cut has brought back one of those deleted and not the
        next; behind that the power has taken one of those that were new, and the log ends there."""
        deleted = [(0, self._log.start)] if self._log.start else []
        return deleted + [(position, end) for position, end in self._gaps if position < flushed]


def _decode(found: Found) -> AnyEvent:
    assert found.header is not None
    try:
        return decode_event(memoryview(found.block)[found.at + ENTRY_HEADER_BYTES : found.at + found.header.length])
    except InvalidFrameError as error:
        raise _newer("an event", found.position) from error


def _goes_on(commit_log: CommitLog, end: int) -> bool:
    """Whether the log has more than the views know, which say that it ended there: somebody has put back a copy of views.db."""
    segment = commit_log.segment_at(end)
    has_more = segment is not None and EntryReader(commit_log.read, segment.end).entry(end) is not None
    if has_more or (commit_log.segments and commit_log.segments[-1].start > end):
        log.warning("clean_end_refuted", applied_position=end)
        return True
    return False


def _require(commit_log: CommitLog, position: int, flushed: int) -> None:
    """Raise unless the log has `position`, and reaches as far as is known to be flushed."""
    end = commit_log.segments[-1].end if commit_log.segments else 0
    is_there = commit_log.segment_at(position) is not None or position in (end, commit_log.start)
    if not is_there or flushed > end:
        raise FolderUnusableError(
            f"The log in {commit_log.folder} ends at {end}, but it once reached {max(position, flushed)}: files are missing."
            " Bring them back; or delete views.db and consumequeue to go on with the messages that are left.",
            folder=str(commit_log.folder.parent), end_position=end, known_position=max(position, flushed),
        )


def _require_read(commit_log: CommitLog, end: int) -> None:
    """Raise where the disk does not give what would say that the log goes on at `end`, or what is to be removed behind it.

    A torn end can be read, mostly. What cannot be may have been acknowledged, and may be readable again by the next start."""
    header = peek_header(commit_log.read(end, BATCH_HEADER_BYTES), 0)
    claimed = header is not None and header.position == end and header.length <= ENTRY_BYTES_MAX
    entry_end = end + (header.length if header is not None and claimed else BATCH_HEADER_BYTES)
    segment = commit_log.segment_at(end)
    kept_end = segment.end if segment is not None and segment.start < end else end
    for position, to in commit_log.unreadable:
        if (to > end and position < entry_end) or position >= kept_end:
            lies_in = commit_log.segment_at(position)
            where = "" if lies_in is None else f" (bytes {position - lies_in.start} to {to - lies_in.start} of {lies_in.path})"
            raise FolderUnusableError(
                f"The disk does not give positions {position} to {to} of the log{where}, and the log may go on there. Check the"
                " disk and start again. If it stays so, as after a power cut that left a sector half written, write zeros over"
                " them (dd conv=notrunc), or copy the folder to a sound disk with zeros for what cannot be read; then what was"
                " there counts as never written.",
                folder=str(commit_log.folder.parent), position=position, end=to,
            )


def _newer(what: str, position: int) -> FolderUnusableError:
    return FolderUnusableError(
        f"The log has {what} at {position} that this version cannot read: a newer zrmq wrote it. Upgrade.", position=position
    )


def _load(commit_log: CommitLog, database: ViewsDb, whole: WholeLog) -> Saved | None:
    """What was saved; None to make the views from the whole log. Raises `FolderUnusableError` where the log is not whole."""
    try:
        return database.load()
    except DamageError as error:
        whole.look_through(flushed=0)
        if not whole.is_complete:
            missing = " and ".join(f"{position} to {end}" for position, end in whole.missing)
            raise FolderUnusableError(
                f"{error.message} What the log had at positions {missing} is gone, and the rest does not say as a whole which"
                " topics and offsets there were: there was no room for it yet, or it is damaged. Bring the file back; or delete"
                " it and consumequeue to go on with what the log still has.",
                folder=str(commit_log.folder.parent), missing=whole.missing, reason=error.message,
            ) from error
        log.warning("views_not_read", **error.facts)
        return None


def _restore(saved: Saved, commit_log: CommitLog, views: Views) -> None:
    tables = views.tables
    tables.boot, tables.next_topic_id = saved.meta.boot, saved.meta.next_topic_id
    tables.relocated_from, tables.session_timeout_ms = saved.meta.relocated_from, saved.meta.session_timeout_ms
    for topic_id, config in saved.topics:
        topic = Topic(topic_id, config)
        topic.grow(config.queue_count)
        tables.topics[config.topic] = tables.topics_by_id[topic_id] = topic
    for row in saved.queues:
        topic = tables.topics_by_id[row.topic_id]
        topic.grow(row.queue_id + 1)
        queue = topic.queues[row.queue_id]
        queue.min_offset, queue.next_offset = row.min_offset, row.next_offset
        views.index(queue).restore(row)
    for name, subscriptions, leases in saved.groups:
        tables.groups[name] = group_of(name, subscriptions, leases)
    for name, instance_name, topic_id, queue_id, offset in saved.offsets:
        tables.groups[name].offsets[instance_name, topic_id, queue_id] = offset
    for producer_id, topic_id, queue_id, position, highest_sequence, sent in saved.windows:
        tables.windows[producer_id, topic_id, queue_id] = Window(position, highest_sequence, sent)
    _restore_segments(saved, commit_log)


def _restore_segments(saved: Saved, commit_log: CommitLog) -> None:
    segments = {segment.start: segment for segment in commit_log.segments}
    for start, last_ms, scrubbed_ms, shares in saved.segments:
        segment = segments.get(start)
        if segment is not None:
            segment.last_ms, segment.scrubbed_ms, segment.saved = last_ms, scrubbed_ms, (0, scrubbed_ms)
            segment.shares = {topic_id: Share(*share) for topic_id, share in shares.items()}


def _reindex(commit_log: CommitLog, views: Views, end: int) -> int:
    """Make the entries of queues whose files are missing from the log. Returns their number."""
    indexes = {index.queue: index for index in views.indexes() if not index.has_files()}
    if indexes:
        entries = scan_segments(commit_log.files, commit_log.segments, commit_log.start, end)
        for made in index_anew(entries, indexes, views.shelf):
            index = indexes[made.queue]
            index.replace(made, index.end)
            if index.is_long:
                views.spill(index)
        log.warning("queues_reindexed", queues=len(indexes))
    return len(indexes)


def _show(commit_log: CommitLog, views: Views) -> None:
    """Everything that was recovered is flushed, so it is visible; what is not in the log any more is not in a queue either."""
    for topic in views.tables.topics.values():
        for queue in topic.queues:
            queue.visible_offset = queue.flushed_offset = queue.next_offset
            if queue.next_offset:
                views.index(queue)  # of an empty one too, or the next checkpoint would not know how far it has come
    live = [views.shelf.folder_of_topic(topic) for topic in views.tables.topics.values()]
    folders = {folder.name for folder in (*live, *views.dead_folders)}
    for name in commit_log.files.listdir(views.shelf.folder):
        if name not in folders:
            remove_tree(commit_log.files, views.shelf.folder / name)
