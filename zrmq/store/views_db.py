"""views.db: the views as they were at some position of the log, in SQLite, saved now and then as a whole.

The database is a shortcut past the beginning of the log and nothing more: the log is replayed from `applied_position`. So it is
saved rarely (a restart replays what was written since), in one transaction, on a thread of its own, and synced: segments behind
`applied_position` may be deleted as soon as the save has returned, so a save that a power cut takes back would cost data.

    meta       name, value              see `Meta`
    topics     topic_id, config         config: TopicConfig as MessagePack
    queues     one column per field of `consume_queue.QueueRow`
    groups     name, state              state: MessagePack [subscriptions {instance: {topic: [since ms, {queue id: start}]}},
                                        leases [[topic id, queue id, client id, lease epoch], ...]]
    offsets    group_name, instance_name, topic_id, queue_id, queue_offset
    windows    producer_id (as a signed number), topic_id, queue_id, position, highest_sequence, sent: `tables.Window`
    segments   start, last_ms, scrubbed_ms, shares (MessagePack {topic id: [last ms, size bytes]})

A database that cannot be read is as good as none: everything is in the log, see `relocation`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from zrmq.errors import DamageError, FolderUnusableError
from zrmq.files import Files
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX, Natural
from zrmq.store.consume_queue import ENTRY_BYTES, QueueRow
from zrmq.store.tables import SENT_BYTES, Group, Lease, Subscribed, Subscriptions

VIEWS_FORMAT_VERSION = 1

_SCHEMA = """
create table if not exists meta (name text primary key, value integer not null) without rowid;
create table if not exists topics (topic_id integer primary key, config blob not null);
create table if not exists queues (
    topic_id integer not null, queue_id integer not null, min_offset integer not null, next_offset integer not null,
    first integer not null, filed integer not null, first_position integer not null, max_timestamp_ms integer not null,
    tail blob not null, primary key (topic_id, queue_id)
);
create table if not exists groups (name text primary key, state blob not null) without rowid;
create table if not exists offsets (
    group_name text not null, instance_name text not null, topic_id integer not null, queue_id integer not null,
    queue_offset integer not null, primary key (group_name, instance_name, topic_id, queue_id)
) without rowid;
create index if not exists offsets_by_topic on offsets (topic_id);
create table if not exists windows (
    producer_id integer not null, topic_id integer not null, queue_id integer not null, position integer not null,
    highest_sequence integer not null, sent blob not null, primary key (producer_id, topic_id, queue_id)
);
create index if not exists windows_by_position on windows (position);
create table if not exists segments (
    start integer primary key, last_ms integer not null, scrubbed_ms integer not null, shares blob not null
);
"""
_TABLES = ("meta", "topics", "queues", "groups", "offsets", "windows", "segments")

_IOERR_CORRUPTFS = 8458  # the disk cannot read a sector; the module has no name for it where SQLite is old
_DAMAGE = {  # what SQLite says of the file and of what is in it; the rest is of room, rights, descriptors and other programs
    sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, _IOERR_CORRUPTFS,
}

WindowRow = tuple[int, Natural, Natural, Natural, Natural, bytes]
SegmentRow = tuple[Natural, Natural, Natural, dict[int, tuple[int, int]]]
GroupState = tuple[Subscriptions, list[tuple[int, int, str, int]]]

_config_decoder = msgspec.msgpack.Decoder(TopicConfig)
_group_decoder = msgspec.msgpack.Decoder(GroupState)
_shares_decoder = msgspec.msgpack.Decoder(dict[int, tuple[int, int]])


class Meta(msgspec.Struct, kw_only=True):
    """The single numbers."""

    applied_position: Natural  # everything before it is in the views; the log is replayed from here
    flushed_position: Natural  # known to be on disk
    log_start: Natural  # segments before it are deleted, or about to be
    boot: Natural
    next_topic_id: Natural
    relocated_from: Natural = 0
    session_timeout_ms: Natural = 0
    stopped: int = 0  # 1: `applied_position` is the end of the log, and nobody has opened it since


class Saved(msgspec.Struct, kw_only=True):
    """What is saved at once: all rows that changed, and what goes. Also what is loaded: all rows."""

    meta: Meta
    topics: list[tuple[Natural, TopicConfig]] = []
    topics_deleted: list[int] = []
    queues: list[QueueRow] = []
    groups: list[tuple[str, Subscriptions, list[tuple[int, int, str, int]]]] = []
    groups_deleted: list[str] = []
    offsets: list[tuple[str, str, Natural, Natural, Natural]] = []
    windows: list[WindowRow] = []
    windows_from: int = 0  # position of the oldest window that is still remembered
    segments: list[SegmentRow] = []


class ViewsDb:
    """One thread at a time, any thread. Errors are `sqlite3.Error`."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self.flushed_position = 0  # what `load` has found of it, be anything else saved or not

    def load(self) -> Saved | None:
        """Everything that was saved; None if nothing was: then `begin` before saving.

        Raises `DamageError` when something is there that cannot be read, be it damaged or of another format version;
        `FolderUnusableError` when it may be whole and is out of reach; `OSError`.
        """
        try:
            self._files.size(self._path)
        except FileNotFoundError:
            return None
        try:
            connection = self._open()
            version = connection.execute("pragma user_version").fetchone()[0]
            if version == VIEWS_FORMAT_VERSION:
                saved = _load(connection)
                self.flushed_position = saved.meta.flushed_position if saved else _flushed_position(connection)
                return saved
            reason = f"its format version is {version}, this zrmq reads {VIEWS_FORMAT_VERSION}"
        except (sqlite3.Error, msgspec.MsgspecError, TypeError, ValueError) as error:
            self._require_damage(error)
            reason = str(error)
        raise DamageError(f"{self._path} cannot be read: {reason}.", path=str(self._path), reason=reason)

    def _require_damage(self, error: Exception) -> None:
        """Raise unless the error is one of what is in the file: any other must not be taken for damage, and the file removed."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # rows that do not decode are no business of SQLite's
        kind = code & 0xFF  # the rest are details
        if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise FolderUnusableError(
                f"{self._path} is locked by another program, such as an sqlite3 shell or a backup: {error}. End that, then start"
                " the broker again.",
                path=str(self._path), reason=str(error),
            ) from error
        if code not in _DAMAGE and kind not in _DAMAGE:
            reason = f"{error} ({getattr(error, 'sqlite_errorname', code)})"
            raise FolderUnusableError(
                f"{self._path} cannot be opened, and may be whole all the same: {reason}. Make sure that its disk has room, that"
                " this user may write there and that the process may open more files, then start the broker again.",
                path=str(self._path), reason=reason,
            ) from error

    def begin(self) -> None:
        """Begin with an empty database, but for the flushed position: nobody else may know it any more. Raises `OSError` too."""
        if self.flushed_position:
            return
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            self._files.unlink(self._path.with_name(self._path.name + suffix))
        self._files.fsync_dir(self._path.parent)
        self._transact(_create)

    def save(self, saved: Saved) -> None:
        """All of it, or nothing."""
        self._transact(lambda connection: _save(connection, saved))

    def mark_started(self, flushed_position: int) -> None:
        """From now on the log may be longer than the views know, and what said how far it was flushed may go."""
        self._transact(lambda connection: _mark_started(connection, flushed_position))

    def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = self._files.connect(self._path)
            self._connection = connection
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
        return self._connection

    def _transact(self, change: Callable[[sqlite3.Connection], object]) -> None:
        connection = self._open()
        connection.execute("begin immediate")
        try:
            change(connection)
            connection.execute("commit")
        except Exception:
            connection.rollback()
            raise


def _create(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute(f"pragma user_version = {VIEWS_FORMAT_VERSION}")


def _mark_started(connection: sqlite3.Connection, flushed_position: int) -> None:
    connection.execute("update meta set value = 0 where name = 'stopped'")
    _put(connection, "meta", 2, [("flushed_position", flushed_position)])


def _flushed_position(connection: sqlite3.Connection) -> int:
    rows = connection.execute("select value from meta").fetchall()
    return msgspec.convert(rows[0][0], Natural) if rows else 0


def _save(connection: sqlite3.Connection, saved: Saved) -> None:
    for topic_id in saved.topics_deleted:
        for table in ("topics", "queues", "offsets", "windows"):
            connection.execute(f"delete from {table} where topic_id = ?", (topic_id,))
    for name in saved.groups_deleted:
        connection.execute("delete from groups where name = ?", (name,))
        connection.execute("delete from offsets where group_name = ?", (name,))
    connection.execute("delete from windows where position < ?", (saved.windows_from,))
    connection.execute("delete from segments where start < ?", (saved.meta.log_start,))
    encode = msgspec.msgpack.encode
    _put(connection, "topics", 2, [(topic_id, encode(config)) for topic_id, config in saved.topics])
    _put(connection, "queues", 9, saved.queues)
    _put(connection, "groups", 2, [(name, encode((subscribed, leases))) for name, subscribed, leases in saved.groups])
    _put(connection, "offsets", 5, saved.offsets)
    _put(connection, "windows", 6, [(_signed(producer_id), *rest) for producer_id, *rest in saved.windows])
    _put(connection, "segments", 4, [(*row[:3], encode(row[3])) for row in saved.segments])
    _put(connection, "meta", 2, list(msgspec.structs.asdict(saved.meta).items()))


def _put(connection: sqlite3.Connection, table: str, columns: int, rows: Any) -> None:
    if rows:
        connection.executemany(f"insert or replace into {table} values ({', '.join('?' * columns)})", rows)


def _load(connection: sqlite3.Connection) -> Saved | None:
    rows = {table: connection.execute(f"select * from {table}").fetchall() for table in _TABLES}
    if [name for name, _ in rows["meta"]] in ([], ["flushed_position"]) and not any(rows[table] for table in _TABLES[1:]):
        return None  # a start ended before the first save
    rows["topics"] = [(topic_id, _config_decoder.decode(config)) for topic_id, config in rows["topics"]]
    rows["groups"] = [(name, *_group_decoder.decode(state)) for name, state in rows["groups"]]
    rows["segments"] = [(*row[:3], _shares_decoder.decode(row[3])) for row in rows["segments"]]
    saved = msgspec.convert(rows | {"meta": dict(rows["meta"])}, Saved)  # SQLite has no checksums, and takes text for a number
    _check(saved)
    saved.windows = [(row[0] % (1 << 64), *row[1:]) for row in sorted(saved.windows, key=lambda row: row[3])]
    return saved


def _check(saved: Saved) -> None:
    """Raise `ValueError` where rows contradict each other, as those of a damaged database do."""
    topic_ids = {topic_id for topic_id, _ in saved.topics}
    groups = {name for name, _, _ in saved.groups}
    for row in saved.queues:
        if row.topic_id not in topic_ids or row.queue_id >= QUEUES_PER_TOPIC_MAX:
            raise ValueError(f"it has queue {row.queue_id} of topic {row.topic_id}, which does not exist")
        if row.first > row.filed or len(row.tail) % ENTRY_BYTES or row.min_offset > row.next_offset:
            raise ValueError(f"what it says of queue {row.queue_id} of topic {row.topic_id} is contradictory")
    for topic_id, config in saved.topics:
        if config.queue_count > QUEUES_PER_TOPIC_MAX:
            raise ValueError(f"topic {topic_id} has {config.queue_count} queues in it")
    if any(len(window[-1]) % SENT_BYTES for window in saved.windows):
        raise ValueError("a window in it is cut off")
    for name, _, topic_id, _, _ in saved.offsets:
        if name not in groups or topic_id not in topic_ids:
            raise ValueError(f"it has an offset of {name!r} in topic {topic_id}, one of which does not exist")


def _signed(number: int) -> int:
    """SQLite's numbers have a sign; a producer id uses all 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def group_row(group: Group) -> tuple[str, Subscriptions, list[tuple[int, int, str, int]]]:
    """A group as it is saved, its offsets apart; a copy, for another thread."""
    leases = [(*key, lease.client_id, lease.lease_epoch) for key, lease in group.leases.items()]
    subscriptions = {
        instance_name: {topic: Subscribed(its.since_ms, dict(its.starts)) for topic, its in each.items()}
        for instance_name, each in group.subscriptions.items()
    }
    return group.name, subscriptions, leases


def group_of(name: str, subscriptions: Subscriptions, leases: list[tuple[int, int, str, int]]) -> Group:
    """A group as it was saved."""
    group = Group(name)
    group.subscriptions = subscriptions
    group.leases = {(topic_id, queue_id): Lease(client_id, epoch) for topic_id, queue_id, client_id, epoch in leases}
    return group
