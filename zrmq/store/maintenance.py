"""Upkeep: segments that expired go, files for the next ones are made, the disk's room is watched, damage is looked for.

Decisions are taken on the loop's thread from what is in memory; one job at a time carries out what takes long. A segment leaves
the log before its file is touched, so nobody reads what is about to be overwritten; a file becomes a spare, to be overwritten,
only after its old name is gone from the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zrmq.clock import Clock
from zrmq.errors import DamageError
from zrmq.files import FULL, NO_DESCRIPTOR, fill_zeros
from zrmq.logs import get_logger
from zrmq.protocol.events import AnyEvent
from zrmq.store.commit_log import CommitLog, scan_segments
from zrmq.store.config import StoreConfig
from zrmq.store.consume_queue import ConsumeQueue
from zrmq.store.job import Job
from zrmq.store.relocation import Relocation
from zrmq.store.retention import expired_count, unexpired
from zrmq.store.segment import SEGMENT_HEADER_BYTES, UNREADABLE, Segment
from zrmq.store.tables import Queue
from zrmq.store.views import Views, index_anew

log = get_logger("store")

INTERVAL_MS = 1_000  # between two looks at the disk
SCRUB_BYTES = 4 << 20  # checked by one job
TRIMS_MAX = 200  # queues cut at their front by one call; each may read from a file
WARN_AGAIN_MS = 3_600_000
SPARE_AGAIN_MS = 60_000  # between two tries to make a spare if nothing goes and nothing is saved meanwhile: each writes all of it
STEP_MS = 60_000  # what the wall clock gains or loses on the steady one between two looks when somebody has set it

Damage = tuple[int, int]  # stretch of the log: position, end


class Leaving:
    """A file that is to go: of a segment that is out of the log already, or a spare that was given up."""

    __slots__ = ("path", "spare")

    def __init__(self, path: Path, spare: Path | None = None) -> None:
        self.path = path
        self.spare = spare  # what it becomes; None: it is unlinked


class Upkeep:
    """Decides what is to be done. Loop thread only."""

    def __init__(
        self, clock: Clock, config: StoreConfig, commit_log: CommitLog, views: Views, append: Callable[[AnyEvent], int],
        on_damage: Callable[[Damage], None], on_free_bytes: Callable[[int], None],
    ) -> None:
        self.free_bytes: int | None = None  # of the file system, as last seen
        self.reindexing: list[Queue] = []  # whose entries are being made anew
        self.is_save_failing = False  # of the views, at the last try
        self.is_save_wanted = False  # a segment is to make room, and the views are not saved as far as that
        self.corrected_ms = -1.0  # when stamps were last made younger, by the steady clock
        self._clock = clock
        self._config = config
        self._log = commit_log
        self._views = views
        self._relocation = Relocation(commit_log, views.tables, append)
        self._on_damage = on_damage
        self._on_free_bytes = on_free_bytes
        self._damaged_queues: dict[Queue, None] = {}
        self._running: Maintenance | None = None
        self._unremoved: list[Leaving] = []  # the disk refused to let go of them
        self._late_since_ms = clock.time_ms()  # what was stored before is by a clock that nothing is known of
        self._set_back_in: dict[Segment, int] = {}  # written to when the clock was set back, and how far that one still is ahead
        self._seen_ms = clock.time_ms(), clock.monotonic_ms()
        self._next_ms = -1.0
        self._is_look_due = False  # at the segments, before its time
        self._next_warning_ms = -1.0
        self._is_trimming = True
        self._is_spare_refused = False  # the disk has room, but not for us (a quota): the oldest segment is to go for the next
        self._next_spare_ms = -1.0  # none is tried before
        self._scrubbing: tuple[Segment, int] | None = None  # how far

    def queue_damaged(self, queue: Queue) -> None:
        """The queue's files do not check out: its entries are to be made anew."""
        if queue not in self._damaged_queues and queue not in self.reindexing:
            log.error("queue_files_damaged", topic=queue.topic.config.topic, queue_id=queue.queue_id)
            self._damaged_queues[queue] = None

    @property
    def is_urgent(self) -> bool:
        """Whether somebody may be refused until upkeep has gone on."""
        return self._is_look_due or (self.is_save_wanted and not self.is_save_failing)

    def segment_begun(self) -> None:
        """The log has gone on in a new segment, for which the oldest may have to go."""
        bytes_max = self._config.store_bytes_max
        self._is_look_due = self._is_look_due or 0 < bytes_max < self._log.size_bytes

    def save_finished(self, is_saved: bool) -> None:
        """The views were saved, or could not be. Then what goes for a quota leaves its room to the next save: a log that took it
        would go round until nothing in it is saved, and nothing may go any more."""
        if is_saved:
            self._next_spare_ms = -1.0
            self._is_look_due, self.is_save_wanted = self._is_look_due or self.is_save_wanted, False
        self.is_save_failing, self._log.is_room_kept = not is_saved, False

    def begin(self, saved_position: int, may_reindex: bool) -> Maintenance | None:
        """The next job, if there is something to do. `saved_position`: what views.db has; segments before it may go."""
        if self._running is not None:
            return None
        if self._is_trimming:
            self._is_trimming = self._trim()
        now_ms = self._clock.monotonic_ms()
        if now_ms < self._next_ms and not self._is_look_due:
            return None
        self._is_look_due = False
        self._notice_step(now_ms)
        spares = self._excess_spares()
        excess_bytes = self._excess_bytes(spares)
        count = self._expired_count(saved_position, excess_bytes)
        self.is_save_wanted = excess_bytes > 0 and self._expired_count(self._log.appended_position, excess_bytes) > count
        if self._is_relocating(count):
            self._is_look_due = excess_bytes > 0
            return None
        self._next_ms = now_ms + INTERVAL_MS
        if excess_bytes > 0:
            self._tell_loss(count)
        job = Maintenance(self._log, self._finish)
        job.removed = self._unremoved + self._give_up(spares)
        job.removed += self._take(count, job.removed, is_forced=excess_bytes > 0)
        job.new_spare = self._wanted_spare(job)
        job.scrub = self._next_scrub()
        if may_reindex and self._damaged_queues:
            self._begin_reindex(job)
        self._running = job
        return job

    def trim(self, index: ConsumeQueue) -> None:
        """Let the queue begin where the log does; later, if its files cannot be read now."""
        try:
            index.trim(self._log.start)
        except DamageError:
            self.queue_damaged(index.queue)
        except OSError as error:
            log.warning("queue_not_trimmed", topic=index.queue.topic.config.topic, reason=str(error))

    def _trim(self) -> bool:
        """Some of the queues that begin before the log does. Returns whether there are more."""
        behind = [index for index in self._views.indexes() if index.first_position < self._log.start]
        for index in behind[:TRIMS_MAX]:
            self.trim(index)
        return bool(behind)

    # --- segments -----------------------------------------------------------------------------------------------------

    def _notice_step(self, now_ms: float) -> None:
        """A clock that is set forward (a box without a battery has found the time) makes nothing older that it stamped before.

        Not even what it stamped after it had been set back: what this run stores is never from before its own beginning. Stamps
        that are ahead of a clock set back stay as they are: they may be the right ones, and retention does not go by them. But
        they hide what came into the same segment later, so that counts as stored no earlier than what is behind it, and so do
        those of an earlier run. Nor were they the right ones if the clock is set forward beyond that one: then all count so.
        """
        wall_ms = self._clock.time_ms()
        (seen_wall_ms, seen_ms), self._seen_ms = self._seen_ms, (wall_ms, now_ms)
        until_ms = seen_wall_ms + round(now_ms - seen_ms)
        step_ms = wall_ms - until_ms
        if abs(step_ms) < STEP_MS:
            return
        log.warning("clock_set_forward" if step_ms > 0 else "clock_set_back", step_ms=abs(step_ms))
        self._set_back_in = {segment: ahead_ms - step_ms for segment, ahead_ms in self._set_back_in.items()}
        if step_ms < 0:
            for segment in self._log.segments[-1:]:
                self._set_back_in.setdefault(segment, -step_ms)
        else:
            self._correct(until_ms, step_ms)
            ahead = ((segment, max(ahead_ms, 0)) for segment, ahead_ms in self._set_back_in.items() if segment.last_ms > wall_ms)
            self._set_back_in = dict(ahead)
            self.corrected_ms = now_ms
        self._late_since_ms += step_ms

    def _correct(self, until_ms: int, step_ms: int) -> None:
        """What this run has stored until now, by a clock `step_ms` late, is younger than its stamps say."""
        behind_ms, began = until_ms + step_ms, self._log.began_position
        was_late = False  # the clock before it was set back
        for segment in reversed(self._log.segments):
            was_late = was_late or self._set_back_in.get(segment, 0) <= -STEP_MS
            is_late = was_late and segment.end > began and segment.last_ms > until_ms
            segment.rejuvenate(self._late_since_ms, until_ms, step_ms)
            if is_late or segment in self._set_back_in or segment.start < began < segment.end:
                segment.corrections += 1
                segment.note_event(behind_ms)
                for topic_id in segment.shares:
                    segment.note_batch(topic_id, behind_ms, 0)
            behind_ms = segment.last_ms

    @property
    def _is_disk_low(self) -> bool:
        return self.free_bytes is not None and self.free_bytes < self._config.free_delete_bytes

    def _excess_spares(self) -> int:
        """How many spares have to go: empty files, before any with messages."""
        bytes_max = self._config.store_bytes_max
        excess_bytes = self._log.size_bytes - bytes_max if bytes_max else 0
        if self.free_bytes is not None:
            excess_bytes = max(excess_bytes, self._config.free_delete_bytes - self.free_bytes)
        return min(max(-(-excess_bytes // self._log.segment_bytes), 0), len(self._log.spares))

    def _excess_bytes(self, spares: int) -> int:
        """How much has to go, expired or not, beside so many spares."""
        bytes_max = self._config.store_bytes_max
        size_bytes = self._log.size_bytes - spares * self._log.segment_bytes
        excess_bytes = max(size_bytes - bytes_max, 0) if bytes_max else 0
        is_wanting = (self._is_disk_low and not spares) or self._is_spare_refused  # spares may be enough; it is looked at again
        if is_wanting and not self._unremoved:  # else more would leave the log, and nothing would be free for it
            return max(excess_bytes, 1)  # one segment; then the disk is looked at again
        return excess_bytes

    def _expired_count(self, saved_position: int, excess_bytes: int) -> int:
        return expired_count(
            self._log.segments, self._views.tables.topics_by_id, now_ms=self._clock.time_ms(), began_ms=self._late_since_ms,
            retention_ms=self._config.retention_ms, saved_position=saved_position, excess_bytes=excess_bytes,
        )

    def _tell_loss(self, count: int) -> None:
        """Somebody may still want what goes with so many segments, and is to know why it is gone."""
        size_bytes, last_ms = unexpired(
            self._log.segments, count, self._views.tables.topics_by_id, now_ms=self._clock.time_ms(),
            began_ms=self._late_since_ms, retention_ms=self._config.retention_ms,
        )
        if size_bytes == 0:
            return
        reason = "the disk gives the log no more room"
        if self._is_disk_low:
            reason = f"the disk has less than free_delete_bytes ({self._config.free_delete_bytes}) left"
        elif not self._is_spare_refused:
            reason = f"the log is longer than store_bytes_max ({self._config.store_bytes_max})"
        log.warning("unexpired_messages_deleted", bytes=size_bytes, stored_until_ms=last_ms, reason=reason)

    def _is_relocating(self, count: int) -> bool:
        """Whether so many segments stay until what they said was said again, which goes on with each call."""
        start = self._log.segments[count - 1].end if count else self._log.start
        if self._relocation.reaches(start):
            return False
        free_bytes = None if self.free_bytes is None else max(self.free_bytes - self._config.free_delete_bytes, 0)
        return self._relocation.go_on(start, free_bytes)

    def _give_up(self, count: int) -> list[Leaving]:
        """So many spares; and nothing becomes one that the disk has not let go of until it was low."""
        if self._is_disk_low:
            for leaving in self._unremoved:
                leaving.spare = None
        given_up = [self._log.spares.pop() for _ in range(min(count, len(self._log.spares)))]
        if given_up:
            log.info("spares_given_up", count=len(given_up), free_bytes=self.free_bytes)
        return [Leaving(path) for path in given_up]

    def _take(self, count: int, leaving: list[Leaving], is_forced: bool) -> list[Leaving]:
        config = self._config
        removed: list[Leaving] = []
        for _ in range(count):
            segment = self._log.take_front()
            may_recycle = not self.is_save_failing if self._is_spare_refused else not (is_forced or self._is_disk_low)
            spares = len(self._log.spares) + sum(each.spare is not None for each in leaving + removed)
            is_whole = segment.end - segment.start == self._log.segment_bytes
            is_kept = may_recycle and is_whole and spares < config.spare_segments_max
            removed.append(Leaving(segment.path, self._log.next_spare() if is_kept else None))
            log.info("segment_deleted", position=segment.start, forced=is_forced, recycled=is_kept)
        if removed:
            self._is_trimming = True
            self._log.is_room_kept = self._is_spare_refused and self.is_save_failing
            self._next_spare_ms = -1.0
        return removed

    def _wanted_spare(self, job: Maintenance) -> Path | None:
        """A spare is made when half of the segment is used up, and there is room for it beside what has to stay free."""
        if self._log.spares or any(leaving.spare for leaving in job.removed):
            return None
        if self._log.is_room_kept or self._clock.monotonic_ms() < self._next_spare_ms:
            return None
        half_bytes = self._log.segment_bytes // 2
        is_half_full = self._log.limit - self._log.appended_position < half_bytes
        return self._log.next_spare() if is_half_full and self._has_room_for_spare() else None

    def _has_room_for_spare(self) -> bool:
        """None is made that would have to go again at the next look. But where the disk has refused a segment a spare shows
        whether it does so for a quota, so that the oldest one is to go."""
        config, segment_bytes = self._config, self._log.segment_bytes
        kept_bytes = max(config.free_refuse_bytes, config.free_delete_bytes)
        is_within = not config.store_bytes_max or self._log.size_bytes + segment_bytes <= config.store_bytes_max
        if self._log.is_refused:
            self._log.is_refused = False
            kept_bytes, is_within = config.free_refuse_bytes, True
        return is_within and (self.free_bytes or 0) - kept_bytes >= segment_bytes

    # --- damage -------------------------------------------------------------------------------------------------------

    def _next_scrub(self) -> tuple[Segment, int] | None:
        """Where to look on for damage: in the segment begun, or in the first closed one whose last check is long ago; or was made
        by a clock that was as far ahead."""
        if self._scrubbing is not None and self._scrubbing[0] in self._log.segments:
            return self._scrubbing
        now_ms, scrub_ms = self._clock.time_ms(), self._config.scrub_ms
        closed = (segment for segment in self._log.segments[:-1] if segment.end <= self._log.flushed_position)
        segment = next((segment for segment in closed if abs(now_ms - segment.scrubbed_ms) > scrub_ms), None)
        return (segment, segment.start) if segment is not None else None

    def _begin_reindex(self, job: Maintenance) -> None:
        self.reindexing, self._damaged_queues = list(self._damaged_queues), {}
        position = self._log.written_position
        for queue in self.reindexing:
            index = self._views.index(queue)
            index.is_spilling = True
            job.reindex.append((index, index.number_at(position)))
        job.reindex_segments, job.reindex_end = list(self._log.segments), position

    # --- what a job brought -------------------------------------------------------------------------------------------

    def _finish(self, job: Maintenance) -> None:
        self._running = None
        self._unremoved = job.removed
        self._log.spares += job.spares
        self._is_spare_refused = job.is_spare_refused and self._config.free_delete_bytes > 0
        if job.is_spare_refused:
            self._next_spare_ms = self._clock.monotonic_ms() + SPARE_AGAIN_MS
        if job.free_bytes is not None:
            self.free_bytes = job.free_bytes
            self._warn_of_full_disk(job.free_bytes)
            self._on_free_bytes(job.free_bytes)
        for stretch in job.damage:
            self._on_damage(stretch)
        self._scrubbing = None
        if job.scrub is not None and job.scrubbed_to is not None:
            segment = job.scrub[0]
            if job.scrubbed_to < segment.end:
                self._scrubbing = segment, job.scrubbed_to
            else:
                segment.scrubbed_ms = self._clock.time_ms()
        self._finish_reindex(job)
        if job.error is not None:
            log.warning("maintenance_failed", reason=str(job.error))

    def _finish_reindex(self, job: Maintenance) -> None:
        made = {index.queue: index for index in job.remade}
        for index, end in job.reindex:
            index.is_spilling = False
            if index.queue in made:
                index.replace(made[index.queue], end)
                log.info("queue_reindexed", topic=index.queue.topic.config.topic, queue_id=index.queue.queue_id)
            else:
                self._damaged_queues[index.queue] = None
        if job.reindex:
            self.reindexing = []

    def _warn_of_full_disk(self, free_bytes: int) -> None:
        now_ms = self._clock.monotonic_ms()
        if free_bytes < self._config.free_warn_bytes and now_ms >= self._next_warning_ms:
            self._next_warning_ms = now_ms + WARN_AGAIN_MS
            log.warning("disk_space_ran_low", free_bytes=free_bytes, folder=str(self._log.folder.parent))


class Maintenance(Job):
    """One round of upkeep. What is to be done is in its attributes before, what came of it after."""

    def __init__(self, commit_log: CommitLog, on_finished: Callable[[Maintenance], None]) -> None:
        self.removed: list[Leaving] = []  # none after the work
        self.new_spare: Path | None = None
        self.scrub: tuple[Segment, int] | None = None
        self.reindex: list[tuple[ConsumeQueue, int]] = []  # up to which entry's number
        self.reindex_segments: list[Segment] = []
        self.reindex_end = 0
        self.spares: list[Path] = []
        self.is_spare_refused = False  # there was no room for a new one
        self.free_bytes: int | None = None
        self.damage: list[Damage] = []
        self.scrubbed_to: int | None = None
        self.remade: list[ConsumeQueue] = []
        self._files = commit_log.files
        self._folder = commit_log.folder
        self._segment_bytes = commit_log.segment_bytes
        self._on_finished = on_finished

    def work(self) -> None:
        try:
            self._remove()
        finally:
            self.free_bytes = self._files.free_bytes(self._folder)
        if self.new_spare is not None:
            self._make_spare(self.new_spare)
        if self.scrub is not None:
            self._scrub(*self.scrub)
        if self.reindex and self.reindex_segments:
            shelf = self.reindex[0][0].shelf
            entries = scan_segments(self._files, self.reindex_segments, self.reindex_segments[0].start, self.reindex_end)
            self.remade = index_anew(entries, [index.queue for index, _ in self.reindex], shelf)

    def finish(self) -> None:
        self._on_finished(self)

    def _remove(self) -> None:
        while self.removed:
            leaving = self.removed[0]
            spare = leaving.spare
            try:
                if spare is None:
                    self._files.unlink(leaving.path)
                elif leaving.path != spare:
                    self._files.rename(leaving.path, spare)
                    leaving.path = spare  # if the folder cannot be synced, only that is tried again
            except OSError as error:
                if error.errno not in UNREADABLE or not self._is_ill(leaving.path):
                    raise
                log.warning("segment_not_deleted", path=str(leaving.path), reason=str(error))
                del self.removed[0]  # the next start tries again; those behind are not to wait for it
                continue
            self._files.fsync_dir(self._folder)  # one by one: a power cut brings back none but the last: no gap
            if spare is not None:
                self.spares.append(spare)
            del self.removed[0]

    def _is_ill(self, path: Path) -> bool:
        """Whether the disk cannot even say what file that is: then it is this file that it does not let go of, and not all."""
        try:
            self._files.size(path)
        except OSError as error:
            return error.errno in UNREADABLE
        return False

    def _make_spare(self, path: Path) -> None:
        """Zero-filled, not only allocated: the first write to an allocated block changes metadata, and a flush pays for it."""
        file = self._files.open(path, create=True)
        try:
            fill_zeros(file, 0, self._segment_bytes)
            file.fdatasync()
        except OSError as error:
            self._files.unlink(path)
            if error.errno not in FULL:
                raise
            self.is_spare_refused = True
        else:
            self.spares.append(path)
        finally:
            file.close()

    def _scrub(self, segment: Segment, position: int) -> None:
        self.scrubbed_to = segment.end
        try:
            for found in scan_segments(self._files, [segment], position):
                if not found.is_whole:
                    self.damage.append((found.position, found.end))
                if found.end - max(position, segment.start + SEGMENT_HEADER_BYTES) >= SCRUB_BYTES:
                    self.scrubbed_to = found.end
                    break
        except OSError as error:
            if error.errno in UNREADABLE:
                self.damage.append((position, segment.end))
                return
            if error.errno in NO_DESCRIPTOR:
                self.scrubbed_to = position  # nothing was looked at; it passes
            raise
