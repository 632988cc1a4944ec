"""The store: everything a broker remembers. One log written once, views of it in memory, and jobs that keep both in order.

A turn of the loop, and what becomes of a batch in it:

    append_batch, append_event    stamped, in memory, folded into the tables at once
    write                         one pwritev for all of the turn; batches of async topics are visible now
    begin_flush -> run -> finish  one fdatasync for all that was written; batches of sync topics are visible now
    take_visible                  whose readers to wake

Now and then, when the owner finds the time: `begin_checkpoint`, `begin_maintenance`. A job's `run` may be called on any thread,
everything else belongs to the loop's (`flusher.Flusher` does both).

What can go wrong: the disk is full, or there is no descriptor for the log's next file (`DiskFullError`, before anything has
changed; heals by itself), the disk refuses (`StoreFailedError`, for everything after it: what the page cache holds cannot be
trusted any more, only a restart finds out what is on the disk), bytes rot (only their batch answers CORRUPT).
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from zrmq.clock import Clock
from zrmq.errors import (
    ClosedError,
    DiskFullError,
    FolderUnusableError,
    PayloadTooLargeError,
    ResourceLimitError,
    StoreFailedError,
    ZrmqError,
)
from zrmq.files import NO_DESCRIPTOR, Files, FolderLock
from zrmq.logs import get_logger
from zrmq.message import FlushMode
from zrmq.protocol.batch import BATCH_HEADER_BYTES, ENTRY_HEADER_BYTES, KIND_EVENT, BatchHeader, encode_entry, stamp
from zrmq.protocol.events import AnyEvent, BrokerStarted, BrokerStopped, SessionTimeoutChanged, encode_event
from zrmq.store.checkpoint import Checkpoint
from zrmq.store.commit_log import EPOCH, CommitLog, LogFlush
from zrmq.store.config import StoreConfig
from zrmq.store.consume_queue import Shelf
from zrmq.store.identity import claim
from zrmq.store.job import Job
from zrmq.store.maintenance import Damage, Upkeep
from zrmq.store.open_files import OpenFiles
from zrmq.store.reading import Chunk, Reader
from zrmq.store.recovery import RecoveryReport, recover
from zrmq.store.tables import Queue, Tables
from zrmq.store.views import Views
from zrmq.store.views_db import ViewsDb

__all__ = ["Chunk", "Placed", "Store", "StoreConfig"]

log = get_logger("store")

LOOK_AGAIN_MS = 100.0  # between two looks whether a full disk has room again
SAVE_AGAIN_MS = 2_000  # after a save that failed: upkeep, which may make room for the next one, is to have its turn
DAMAGE_MAX = 1_000  # stretches remembered
YEAR_2020_S = 1_577_836_800  # boot numbers made of the time count from here
BOOT_MAX = (1 << 31) - 1  # times 2**32 it is an epoch, and these have 63 bits
BOOT_SECONDS_MAX = 1 << 30  # until 2054; a clock beyond is wrong, and half of all numbers are left for the starts that follow
STARTS_LOST_MAX = 1 << 20  # between two known ones, be the stretch without a header as long as it may


class Placed(NamedTuple):
    """Where a batch was put."""

    base_offset: int
    store_timestamp_ms: int
    end_position: int  # it is flushed once `flushed_position` is as far


class Store:
    """One data folder. Loop thread only, but for the `run` of its jobs."""

    def __init__(
        self, folder: Path, files: Files, clock: Clock, config: StoreConfig, folder_lock: FolderLock
    ) -> None:
        """Not for callers: see `open`."""
        self.failure: StoreFailedError | None = None  # set once the disk has refused
        self.needs_flush = False  # something waits for a flush: a batch of a sync topic, an event, a checkpoint
        self.store_id = ""  # the folder's, for ever
        self.damage: list[Damage] = []  # stretches of the log found not to check out
        self._folder = folder
        self._files = files
        self._clock = clock
        self._config = config
        self._lock = folder_lock
        self._open_files = OpenFiles(files)
        self._log = CommitLog(files, folder / "commitlog", config.segment_bytes, self._open_files)
        self._views = Views(Shelf(files, folder / "consumequeue", self._open_files))
        self._database = ViewsDb(files, folder / "views.db")
        self._upkeep = Upkeep(
            clock, config, self._log, self._views, self.append_event, self._damage_found, self._disk_seen
        )
        self._reader = Reader(self._log, self._views, self._upkeep, self._damage_found)
        self._batch_limit = 0  # the log's limit while batches are accepted without a second look, else 0
        self._touched: dict[Queue, int] = {}  # appended to in this turn, with the offset that follows
        self._awaiting: dict[Queue, int] = {}  # written; after the next flush it is safe, and visible if it was not before
        self._visible: dict[Queue, None] = {}
        self._flush: LogFlush | None = None
        self._checkpoint: Checkpoint | None = None
        self._is_checkpoint_running = False
        self._may_checkpoint = True
        self._saved_position = 0
        self._said_position = -1
        self._is_flush_unsaid = False  # nothing in the log said it yet when the last checkpoint was taken
        self._saved_ms = clock.monotonic_ms()
        self._copied_ms = -1.0  # when the copy for the last save was taken
        self._is_disk_full = False
        self._looked_ms = 0.0
        self._is_closed = False

    @classmethod
    def open(
        cls, folder: Path, *, files: Files, clock: Clock, config: StoreConfig, broker_name: str, cluster: str,
        new_store_id: str = "",
    ) -> Store:
        """Open the folder, made if it is missing, and bring log and views to where the last run left them.

        `new_store_id`, drawn at random, tells a folder that is made now from all others.

        Raises `FolderLockedError`; `FolderUnusableError` when it is another broker's, of a newer version, incomplete, or cannot
        be read and written; `ResourceLimitError` without a descriptor to read it by; `DiskFullError` when there is no room, or
        no descriptor, to say that the broker has started.
        """
        started = datetime.fromtimestamp(clock.time_ms() / 1000, UTC).isoformat(timespec="seconds")
        try:
            files.mkdir(folder)
            folder_lock = files.lock(folder / "lock", f"since {started}")
        except OSError as error:
            raise _unusable(folder, error) from error
        store = cls(folder, files, clock, config, folder_lock)
        try:
            store.store_id = claim(files, folder, broker_name, cluster, new_store_id)
            store._start()
        except (OSError, sqlite3.Error) as error:
            store._release()
            raise _unusable(folder, error) from error
        except BaseException:
            store._release()
            raise
        return store

    def _start(self) -> None:
        self._files.mkdir(self._log.folder)
        self._log.load()
        self.recovery: RecoveryReport = recover(self._log, self._views, self._database)
        self.damage += self.recovery.damage[:DAMAGE_MAX]
        self._saved_position = self.recovery.replayed_from if self.recovery.has_views else 0
        for index in self._views.indexes():
            self._upkeep.trim(index)
        self.append_event(BrokerStarted(self._next_boot()))
        for event in self.recovery.advances:
            self.append_event(event)
        self.flush()
        self._show_advanced()

    def _show_advanced(self) -> None:
        """What was skipped is a hole, which its readers are to pass."""
        for event in self.recovery.advances:
            for queue_id, next_offset in event.next_offsets:
                queue = self.tables.topics_by_id[event.topic_id].queues[queue_id]
                queue.visible_offset = queue.flushed_offset = next_offset
                self._views.index(queue)

    def _next_boot(self) -> int:
        """More than every start before, some of which may have been said where damage is now. Where the event that said the last
        is deleted or damaged, the time, which is more too (that of the newest entry, where the clock has been set back since); so
        in a new folder, which may be the next one of a broker whose disk was emptied: what clients remember of the former (lease
        epochs, topic ids) is not to mean anything here.

        Neither a wrong clock nor a large loss may lead beyond `BOOT_MAX`: the log would hold what no start can read."""
        last = self.tables.boot
        if not last or not (self.recovery.has_views or self.recovery.is_complete):
            newest_ms = max([self._clock.time_ms(), *(segment.last_ms for segment in self._log.segments)])
            last = max(last, min(newest_ms // 1000 - YEAR_2020_S, BOOT_SECONDS_MAX))
        return min(last + min(self.recovery.starts_lost, STARTS_LOST_MAX) + 1, BOOT_MAX)

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def tables(self) -> Tables:
        """The fold of the log, everything appended included. Changed by `append_event` and `append_batch` only."""
        return self._views.tables

    @property
    def shelf(self) -> Shelf:
        """The files of the queues."""
        return self._views.shelf

    @property
    def boot(self) -> int:
        """Grows with each opening of the folder."""
        return self.tables.boot

    @property
    def appended_position(self) -> int:
        """End of the log, in memory."""
        return self._log.appended_position

    @property
    def written_position(self) -> int:
        """What is before survives the end of this process."""
        return self._log.written_position

    @property
    def flushed_position(self) -> int:
        """What is before survives a power cut."""
        return self._log.flushed_position

    @property
    def checkpoint_position(self) -> int:
        """What is before is in views.db."""
        return self._saved_position

    @property
    def start_position(self) -> int:
        """Where the log begins: what was before is deleted."""
        return self._log.start

    # --- writing ------------------------------------------------------------------------------------------------------

    def append_batch(self, queue: Queue, header: BatchHeader, frame: bytes) -> Placed:
        """Append one batch, checked by `open_batch`, to a queue of `tables`. The produce path.

        Raises, before anything has changed, `DiskFullError`, `StoreFailedError`, and `PayloadTooLargeError` for a batch longer
        than a segment.
        """
        commit_log = self._log
        position = commit_log.appended_position
        length = header.length
        if position + length > self._batch_limit:
            self._admit_batch(length)
            position = commit_log.appended_position
        now_ms = self._clock.time_ms()
        topic_id, queue_id, base_offset = queue.topic.topic_id, queue.queue_id, queue.next_offset
        stamped = stamp(
            frame, epoch=EPOCH, position=position, flushed_position=commit_log.flushed_position, store_timestamp_ms=now_ms,
            topic_id=topic_id, queue_id=queue_id, base_offset=base_offset,
        )
        commit_log.append_parts(stamped, memoryview(frame)[BATCH_HEADER_BYTES:], length)
        views = self._views
        views.tables.place(queue, position, header.producer_id, header.first_sequence, base_offset, now_ms, header.record_count)
        views.index(queue).add(base_offset, position, length, header.record_count, now_ms, header.tag_mask)
        commit_log.note_batch(topic_id, now_ms, length)
        self._touched[queue] = queue.next_offset
        return Placed(base_offset, now_ms, position + length)

    def append_event(self, event: AnyEvent) -> int:
        """Append one event and fold it into the tables. Returns its end position: it holds once that is flushed.

        Allowed on a disk that is full for batches. Raises, before anything has changed, `DiskFullError` when there is no room at
        all, or no descriptor, `StoreFailedError`, and `PayloadTooLargeError`.
        """
        payload = encode_event(event)
        self._admit(ENTRY_HEADER_BYTES + len(payload), reserve_bytes=0)
        commit_log = self._log
        now_ms = self._clock.time_ms()
        end = commit_log.append(
            encode_entry(
                KIND_EVENT, payload, epoch=EPOCH, position=commit_log.appended_position,
                flushed_position=commit_log.flushed_position, store_timestamp_ms=now_ms,
            )
        )
        commit_log.note_event(now_ms)
        self._views.apply_event(event)
        self.needs_flush = True
        return end

    def write(self) -> None:
        """Write what was appended since the last call, in one system call. Raises `StoreFailedError`."""
        self._require_working()
        try:
            self._log.write()
        except OSError as error:
            raise self._fail("write to the log", error) from error
        if not self._touched:
            return
        touched, self._touched = self._touched, {}
        for queue, offset in touched.items():
            self._awaiting[queue] = offset
            if queue.topic.config.flush_mode is FlushMode.ASYNC:
                self._show(queue, offset)
            else:
                self.needs_flush = True
            index = self._views.index(queue)
            if index.is_long:
                self._views.spill(index)

    def begin_flush(self) -> Job | None:
        """Write, and return the job that brings everything written to the disk; None when it is there, or on its way there.

        When the job has finished, look at `failure`. Raises `StoreFailedError`.
        """
        if self._flush is not None:
            return None
        self.write()
        self.needs_flush = False
        if self._log.written_position == self._log.flushed_position:
            return None
        awaiting, self._awaiting = self._awaiting, {}
        self._flush = self._log.begin_flush(lambda flush: self._finish_flush(flush, awaiting))
        return self._flush

    def flush(self) -> None:
        """Write and flush here and now, while the loop does nothing else. Raises `StoreFailedError`."""
        job = self.begin_flush()
        if job is not None:
            job.run()
            job.finish()
        self._require_working()

    def _finish_flush(self, flush: LogFlush, awaiting: dict[Queue, int]) -> None:
        self._flush = None
        if flush.error is not None:
            self._fail("bring the log to the disk", flush.error)
            return
        self._log.finish_flush(flush)
        for queue, offset in awaiting.items():
            queue.flushed_offset = offset
            self._show(queue, offset)

    def take_visible(self) -> list[Queue]:
        """The queues that have more to show than at the last call."""
        visible, self._visible = self._visible, {}
        return list(visible)

    def _show(self, queue: Queue, offset: int) -> None:
        if offset > queue.visible_offset:
            queue.visible_offset = offset
            self._visible[queue] = None

    # --- may it be written? -------------------------------------------------------------------------------------------

    def _admit_batch(self, length: int) -> None:
        """The slow path of the check: a segment is full, the disk is, or the store has failed."""
        reserve_bytes = self._config.free_refuse_bytes
        self._require_working()
        if self._is_disk_full:
            self._look_again()
        self._admit(length, reserve_bytes)
        self._batch_limit = self._log.limit

    def _admit(self, length: int, reserve_bytes: int) -> None:
        self._require_working()
        commit_log = self._log
        if length > commit_log.entry_bytes_max:
            raise PayloadTooLargeError(
                f"An entry of the log has {length} bytes; a segment holds {commit_log.entry_bytes_max}. Send less at once, or"
                " raise segment_bytes.",
                size_bytes=length, limit_bytes=commit_log.entry_bytes_max,
            )
        if commit_log.appended_position + length <= commit_log.limit:
            return
        try:
            commit_log.roll(self._clock.time_ms(), reserve_bytes)
        except OSError as error:
            raise self._fail("go on in a new segment", error) from error
        self._batch_limit = 0
        self._upkeep.segment_begun()

    def _look_again(self) -> None:
        """Raise unless the disk has room again; asks the system now and then only."""
        now_ms = self._clock.monotonic_ms()
        if now_ms >= self._looked_ms + LOOK_AGAIN_MS:
            self._looked_ms = now_ms
            try:
                self._disk_seen(self._files.free_bytes(self._folder))
            except OSError as error:
                raise self._fail("tell how much room it has", error) from error
        if self._is_disk_full:
            raise DiskFullError(
                f"The disk of {self._folder} has less than {self._config.free_refuse_bytes} bytes left, and those stay free. Free"
                " some space or lower retention_ms; sending works again by itself.",
                folder=str(self._folder), free_refuse_bytes=self._config.free_refuse_bytes,
            )

    def _disk_seen(self, free_bytes: int) -> None:
        is_full = free_bytes < self._config.free_refuse_bytes
        if is_full != self._is_disk_full:
            log.warning("disk_filled" if is_full else "disk_freed", free_bytes=free_bytes, folder=str(self._folder))
        self._is_disk_full = is_full
        self._batch_limit = 0

    def _require_working(self) -> None:
        if self.failure is not None:
            again = StoreFailedError(self.failure.message)
            again.facts = self.failure.facts
            raise again
        if self._is_closed:
            raise ClosedError("The store is closed.")

    def _fail(self, what: str, error: Exception) -> StoreFailedError:
        if self.failure is None:
            log.error("store_failed", what=what, reason=str(error), folder=str(self._folder))
            self.failure = StoreFailedError(
                f"The disk refused to {what} in {self._folder}: {error}. Nothing more is stored until the broker is restarted;"
                " check the disk first.",
                folder=str(self._folder), reason=str(error),
            )
        self._batch_limit = 0
        return self.failure

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, queue: Queue, offset: int, bytes_max: int, tag_mask: int = 0) -> Chunk:
        """Visible batches from the one with `offset` on, each checked; up to `bytes_max`, but one batch in any case.

        With a `tag_mask` batches without a wanted tag are passed over; NOTHING with a `next_offset` before `max_offset` says that
        many were, and to read on there. MOVED: the offset is outside the queue. CORRUPT is one damaged batch; what is before it
        comes first. An offset not visible yet has NOTHING. Raises `NotReadyError` while the queue's entries are made anew.
        """
        return self._reader.read(queue, offset, bytes_max, tag_mask)

    def offset_at(self, queue: Queue, timestamp_ms: int) -> int:
        """Offset of the first message stored at or after this time; the visible end if there is none yet.

        Raises `NotReadyError` while the queue's entries are made anew.
        """
        return self._reader.offset_at(queue, timestamp_ms)

    # --- upkeep -------------------------------------------------------------------------------------------------------

    @property
    def is_upkeep_urgent(self) -> bool:
        """Whether room is waited for, so that the next steps of upkeep are not to wait for their time."""
        is_stopped = self.failure is not None or self._is_closed or not self._may_checkpoint
        return self._upkeep.is_urgent and not is_stopped and not self._upkeep.reindexing

    def begin_checkpoint(self, force: bool = False) -> Job | None:
        """The job that saves the views, when it is due and everything it saves is flushed; None otherwise.

        When it is due, the first call takes a copy and asks for a flush by `needs_flush`; the job comes from a later call.
        """
        if self.failure is not None or self._is_closed or self._is_checkpoint_running or self._upkeep.reindexing:
            return None
        if self._checkpoint is None:
            if not self._may_checkpoint or not (force or self._is_checkpoint_due()):
                return None
            if not force and not self._say_flushed():
                return None
            self._copied_ms = self._clock.monotonic_ms()
            self._checkpoint = Checkpoint(self._log, self._views, self._database, self._saved_position, self._finish_checkpoint)
        if self._log.flushed_position < self._checkpoint.position:
            self.needs_flush = True
            return None
        self._is_checkpoint_running = True
        return self._checkpoint

    def _is_checkpoint_due(self) -> bool:
        waited_ms = self._clock.monotonic_ms() - self._saved_ms
        if self._upkeep.is_save_failing and waited_ms < SAVE_AGAIN_MS:
            return False
        if self._log.is_room_kept or self._upkeep.is_save_wanted:
            return True
        unsaved_bytes = self._log.appended_position - self._saved_position
        if unsaved_bytes >= self._config.checkpoint_bytes or self._upkeep.corrected_ms > self._copied_ms:
            return True  # stamps that a clock set forward has left too old are all that the next start would go by
        if waited_ms < self._config.checkpoint_ms:
            return False
        return self._is_flush_unsaid or self._has_unsaved

    @property
    def _has_unsaved(self) -> bool:
        is_longer = self._log.appended_position > self._saved_position
        return is_longer or any(segment.corrections != segment.saved[0] for segment in self._log.segments)

    def _say_flushed(self) -> bool:
        """Let the log itself say how far it is flushed, by one more entry where none is about to follow. False when the
        disk refuses. If views.db is lost nobody else knows, and what is damaged in the last group is taken for a torn end."""
        self._is_flush_unsaid = self._log.appended_position > self._log.flushed_position
        if not self._is_flush_unsaid and self._log.appended_position != self._said_position:
            try:
                self.append_event(SessionTimeoutChanged(self.tables.session_timeout_ms))  # changes nothing
                self._said_position = self._log.appended_position  # behind it nothing has to be said again
            except DiskFullError:
                self._is_flush_unsaid = True
                if not (self._has_unsaved or self._log.is_room_kept):
                    self._saved_ms = self._clock.monotonic_ms()  # it is tried again then, and not to save the same once more
                    return False
            except StoreFailedError:
                return False
        return True

    def _finish_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = None
        self._is_checkpoint_running = False
        self._saved_ms = self._clock.monotonic_ms()
        self._upkeep.save_finished(checkpoint.is_saved or checkpoint.is_disk_unsure)
        if checkpoint.is_saved:
            self._saved_position = checkpoint.position
        elif checkpoint.is_disk_unsure:
            self._may_checkpoint = False  # what a queue file holds is not known; the next start makes the views from the log
            log.error("views_given_up", reason=str(checkpoint.error))

    def begin_maintenance(self) -> Job | None:
        """The job that deletes expired segments, makes files for the next ones, looks at the disk's room and for damage; None
        when there is nothing to do. To be called about once a second."""
        if self.failure is not None or self._is_closed:
            return None
        return self._upkeep.begin(self._saved_position, may_reindex=self._checkpoint is None)

    def _damage_found(self, stretch: Damage) -> None:
        if stretch not in self.damage and len(self.damage) < DAMAGE_MAX:
            log.error("damage_found", position=stretch[0], bytes=stretch[1] - stretch[0])
            self.damage.append(stretch)

    def close(self) -> None:
        """Say in the log that the broker has stopped, flush, save the views, and let others have the folder.

        Jobs that were begun have to be finished before. Of a store that has failed only the files are closed.
        """
        if self._is_closed:
            return
        try:
            if self.failure is None:
                self._stop()
        finally:
            self._is_closed = True
            self._batch_limit = 0
            self._release()

    def _stop(self) -> None:
        try:
            self.flush()  # so that the event says how far
            self.append_event(BrokerStopped())
            self.flush()
        except (DiskFullError, StoreFailedError) as error:
            log.warning("store_not_closed_cleanly", reason=error.message)
            return
        if self._checkpoint is not None and not self._is_checkpoint_running:
            self._checkpoint.abandon()
            self._checkpoint = None
        job = self.begin_checkpoint(force=True)
        if isinstance(job, Checkpoint):
            job.mark_stopped()
            job.run()
            job.finish()

    def _release(self) -> None:
        self._log.close()
        self._open_files.close()
        self._database.close()
        self._lock.release()


def _unusable(folder: Path, error: Exception) -> ZrmqError:
    if isinstance(error, OSError) and error.errno in NO_DESCRIPTOR:
        return ResourceLimitError(
            f"The system gives no more open files for the data folder {folder}; close some, or raise the limit (ulimit -n), and"
            " try again.",
            folder=str(folder),
        )
    return FolderUnusableError(
        f"The data folder {folder} cannot be used: {error}. Check that its disk has room and that this user may read and write"
        " there, or use another one.",
        folder=str(folder), reason=str(error),
    )
