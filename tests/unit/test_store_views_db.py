"""views.db: what is saved is loaded, all or nothing; what cannot be read is said to be damaged."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zrmq.errors import DamageError, FolderUnusableError
from zrmq.files import DiskFiles, Files, replace_file
from zrmq.message import FlushMode
from zrmq.protocol.events import TopicConfig
from zrmq.store.consume_queue import QueueRow
from zrmq.store.tables import SENT_BYTES, Group, Lease, Subscribed
from zrmq.store.views_db import Meta, Saved, ViewsDb, group_of, group_row
from zrmq.testing.files import FaultyFiles


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Files, Path]:
    """A file system and a folder on it."""
    if request.param == "disk":
        return DiskFiles(), tmp_path
    files = FaultyFiles()
    files.mkdir(Path("/data"))
    return files, Path("/data")


@pytest.fixture
def database(place: tuple[Files, Path]) -> Iterator[ViewsDb]:
    made = ViewsDb(place[0], place[1] / "views.db")
    made.begin()
    yield made
    made.close()


def meta(**more: int) -> Meta:
    return Meta(**{"applied_position": 500, "flushed_position": 600, "log_start": 100, "boot": 3, "next_topic_id": 9, **more})


def full() -> Saved:
    """A few rows of everything."""
    return Saved(
        meta=meta(),
        topics=[
            (1, TopicConfig("meters", 2)),
            (2, TopicConfig("other", 1, flush_mode=FlushMode.ASYNC, retention_ms=5, retention_bytes=1 << 40)),
        ],
        queues=[
            QueueRow(1, 0, 5, 1 << 40, 3, 70, 1 << 50, 1_700_000_000_000, b"tail" * 11),
            QueueRow(2, 0, 0, 0, 0, 0, (1 << 63) - 1, 0, b""),
        ],
        groups=[("a", {"": {"meters": Subscribed(5, {0: 7, 1: 8})}}, [(1, 0, "client-ü", 1 << 40)]), ("b", {}, [])],
        offsets=[("a", "", 1, 0, 33), ("a", "host", 1, 1, 0), ("b", "", 2, 0, (1 << 63) - 1)],
        windows=[(5, 1, 0, 200, 10, bytes(SENT_BYTES)), ((1 << 64) - 1, 1, 1, 300, (1 << 63) - 1, b"\1" * SENT_BYTES)],
        segments=[(100, 900, 0, {1: (900, 50)}), (200, 1000, 77, {})],
    )


def test_what_is_saved_is_loaded(database: ViewsDb, place: tuple[Files, Path]) -> None:
    database.save(full())
    database.close()
    again = ViewsDb(place[0], place[1] / "views.db")
    loaded = again.load()
    assert loaded is not None
    assert msgspec.structs.asdict(loaded) == msgspec.structs.asdict(full())
    again.close()


def test_nothing_saved_is_nothing(database: ViewsDb, place: tuple[Files, Path]) -> None:
    assert database.load() is None
    fresh = ViewsDb(place[0], place[1] / "fresh.db")
    assert fresh.load() is None
    fresh.close()


def test_a_save_changes_what_it_has_and_leaves_the_rest(database: ViewsDb) -> None:
    database.save(full())
    database.save(
        Saved(
            meta=meta(applied_position=900, stopped=1), topics=[(1, TopicConfig("meters", 5))],
            queues=[QueueRow(1, 0, 6, 7, 0, 0, 8, 9, b"new!" * 11)], offsets=[("a", "", 1, 0, 34)],
            groups=[("b", {"host": {"x": Subscribed(1, {})}}, [])],
            windows=[(5, 1, 0, 400, 11, b"\2" * SENT_BYTES)], windows_from=300, segments=[(200, 1001, 78, {1: (1, 2)})],
        )
    )
    loaded = database.load()
    assert loaded is not None
    assert (loaded.meta.applied_position, loaded.meta.stopped) == (900, 1)
    assert dict(loaded.topics)[1].queue_count == 5
    assert len(loaded.topics) == 2
    assert {row.topic_id: (row.next_offset, row.tail) for row in loaded.queues} == {1: (7, b"new!" * 11), 2: (0, b"")}
    assert ("a", "", 1, 0, 34) in loaded.offsets
    assert len(loaded.offsets) == 3
    assert loaded.windows == [
        ((1 << 64) - 1, 1, 1, 300, (1 << 63) - 1, b"\1" * SENT_BYTES), (5, 1, 0, 400, 11, b"\2" * SENT_BYTES),
    ]
    assert loaded.segments == [(100, 900, 0, {1: (900, 50)}), (200, 1001, 78, {1: (1, 2)})]
    assert [name for name, _, _ in loaded.groups] == ["a", "b"]


def test_what_is_deleted_goes_everywhere(database: ViewsDb) -> None:
    database.save(full())
    gone = Saved(meta=meta(log_start=200), topics_deleted=[1], groups_deleted=["b"], groups=[("b", {}, [])])
    database.save(gone)
    loaded = database.load()
    assert loaded is not None
    assert [topic_id for topic_id, _ in loaded.topics] == [2]
    assert [row.topic_id for row in loaded.queues] == [2]
    assert loaded.offsets == []
    assert loaded.windows == []
    assert [name for name, _, _ in loaded.groups] == ["a", "b"], "deleted and made again"
    assert [row[0] for row in loaded.segments] == [200]


def test_old_windows_are_forgotten(database: ViewsDb) -> None:
    database.save(full())
    database.save(Saved(meta=meta(), windows_from=250))
    loaded = database.load()
    assert loaded is not None
    assert [row[3] for row in loaded.windows] == [300]


def test_a_start_takes_the_clean_end_back(database: ViewsDb) -> None:
    database.save(Saved(meta=meta(stopped=1)))
    database.mark_started(700)
    loaded = database.load()
    assert loaded is not None
    assert loaded.meta == meta(stopped=0, flushed_position=700)


def test_what_a_start_knows_to_be_flushed_is_kept_without_anything_saved(database: ViewsDb) -> None:
    assert database.load() is None
    assert database.flushed_position == 0
    database.mark_started(700)
    for _ in range(2):
        assert database.load() is None
        assert database.flushed_position == 700
        database.begin()
    database.save(full())
    assert database.load() == full()
    assert database.flushed_position == 600


def test_rows_without_a_position_are_damage(database: ViewsDb) -> None:
    database.save(full())
    database._open().execute("delete from meta where name <> 'flushed_position'")
    with pytest.raises(DamageError):
        database.load()


def test_a_failed_save_changes_nothing() -> None:
    files = FaultyFiles()
    files.mkdir(Path("/data"))
    database = ViewsDb(files, Path("/data/views.db"))
    database.begin()
    database.save(full())
    files.fail("commit")
    with pytest.raises(sqlite3.OperationalError):
        database.save(Saved(meta=meta(applied_position=900), topics_deleted=[1, 2]))
    loaded = database.load()
    assert loaded is not None
    assert loaded.meta.applied_position == 500
    assert len(loaded.topics) == 2
    database.save(Saved(meta=meta(applied_position=900)))


def test_a_save_is_synced(tmp_path: Path) -> None:
    """In WAL mode SQLite's usual setting gives saves back at a power cut; segments may have been deleted by then."""
    database = ViewsDb(DiskFiles(), tmp_path / "views.db")
    database.begin()
    connection = database._open()
    assert connection.execute("pragma synchronous").fetchone() == (2,)
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    database.close()


DAMAGE = {
    "text for a number": "update queues set next_offset = 'many'",
    "a number for bytes": "update windows set sent = 2147483648",
    "a number below zero": "update meta set value = -9223372036854775808 where name = 'next_topic_id'",
    "a queue of no topic": "update queues set topic_id = 77 where topic_id = 2",
    "a queue beyond all": "update queues set queue_id = 4294967295 where topic_id = 2",
    "a tail cut off": "update queues set tail = x'0102' where topic_id = 2",
    "more first than filed": "update queues set first = 71 where topic_id = 1",
    "a topic of too many queues": "update topics set config = x'92a178ceffffffff'",
    "a window cut off": "update windows set sent = x'01'",
    "an offset of no group": "update offsets set group_name = 'c' where group_name = 'b'",
    "an offset of no topic": "update offsets set topic_id = 77",
}


@pytest.mark.parametrize("spoil", ["rubbish", "version", "row", "schema", *DAMAGE])
def test_what_cannot_be_read_is_damage_and_can_be_wiped(place: tuple[Files, Path], spoil: str) -> None:
    files, folder = place
    path = folder / "views.db"
    database = ViewsDb(files, path)
    database.begin()
    database.save(full())
    statements = {
        "version": "pragma user_version = 99",
        "row": "update topics set config = x'c1'",
        "schema": "drop table windows",
        "rubbish": "",
        **DAMAGE,
    }
    database._open().execute(statements[spoil])
    if spoil == "rubbish":
        database.close()
        for name in ("views.db-wal", "views.db-shm"):
            files.unlink(folder / name)
        replace_file(files, path, b"SQLite format 3\0" + b"no more" * 999)
    with pytest.raises(DamageError, match="cannot be read"):
        database.load()
    database.begin()
    assert database.load() is None
    database.save(full())
    assert database.load() is not None
    database.close()


def test_what_another_program_has_locked_is_not_damage(tmp_path: Path) -> None:
    class Impatient(DiskFiles):
        def connect(self, path: Path) -> sqlite3.Connection:
            connection = super().connect(path)
            connection.execute("pragma busy_timeout = 0")
            return connection

    database = ViewsDb(Impatient(), tmp_path / "views.db")
    database.begin()
    database.save(full())
    database.close()
    shell = sqlite3.connect(tmp_path / "views.db", isolation_level=None)
    shell.execute("pragma locking_mode = exclusive")
    shell.execute("begin exclusive")
    with pytest.raises(FolderUnusableError, match="sqlite3 shell or a backup"):
        database.load()
    shell.close()
    assert database.load() is not None
    database.close()


def test_what_cannot_be_opened_is_not_damage(tmp_path: Path) -> None:
    (tmp_path / "views.db").mkdir()
    with pytest.raises(FolderUnusableError, match="unable to open"):
        ViewsDb(DiskFiles(), tmp_path / "views.db").load()


def test_what_cannot_be_opened_without_room_is_not_damage(tmp_path: Path) -> None:
    """SQLite makes a file beside it before it reads, which is an I/O error where no block is left."""
    database = ViewsDb(DiskFiles(), tmp_path / "views.db")
    database.begin()
    database.save(full())
    database.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(FolderUnusableError, match="Make sure that its disk has room"):
            database.load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    database.close()
    assert database.load() is not None
    database.close()


class Refusing(DiskFiles):
    """SQLite answers the first statement with this error."""

    def __init__(self, name: str, code: int) -> None:
        self.error = sqlite3.OperationalError("disk I/O error")
        self.error.sqlite_errorname, self.error.sqlite_errorcode = name, code

    def connect(self, path: Path) -> sqlite3.Connection:
        error = self.error

        class Refused(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                raise error

        return sqlite3.connect(path, factory=Refused)


@pytest.mark.parametrize("name", [
    "FULL", "READONLY", "PERM", "PROTOCOL", "IOERR", "IOERR_SHMOPEN", "IOERR_SHMSIZE", "IOERR_SHMMAP", "IOERR_SHMLOCK",
    "IOERR_WRITE", "IOERR_FSYNC", "IOERR_TRUNCATE", "IOERR_LOCK", "IOERR_FSTAT",
])
def test_what_is_wrong_elsewhere_is_not_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / "views.db").touch()
    database = ViewsDb(Refusing(f"SQLITE_{name}", getattr(sqlite3, f"SQLITE_{name}")), tmp_path / "views.db")
    with pytest.raises(FolderUnusableError, match=rf"disk I/O error \(SQLITE_{name}\)\. Make sure") as caught:
        database.load()
    assert caught.value.facts["path"] == str(tmp_path / "views.db")
    database.close()


@pytest.mark.parametrize(("name", "code"), [
    ("IOERR_READ", 266), ("IOERR_SHORT_READ", 522), ("IOERR_CORRUPTFS", 8458), ("CORRUPT_INDEX", 779), ("NOTADB", 26),
])
def test_what_the_disk_cannot_read_is_damage(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "views.db").touch()
    database = ViewsDb(Refusing(f"SQLITE_{name}", code), tmp_path / "views.db")
    with pytest.raises(DamageError, match="cannot be read"):
        database.load()
    database.close()


def test_a_group_is_copied_for_the_other_thread() -> None:
    group = Group("g")
    group.subscriptions[""] = {"meters": Subscribed(5, {0: 1})}
    group.leases[1, 0] = Lease("c", 9)
    row = group_row(group)
    group.subscriptions[""]["meters"].starts[0] = 99
    group.leases.clear()
    again = group_of(*row)
    assert again.subscriptions == {"": {"meters": Subscribed(5, {0: 1})}}
    assert again.leases == {(1, 0): Lease("c", 9)}


def test_every_field_of_meta_is_kept(database: ViewsDb) -> None:
    values: dict[str, Any] = {name: number + 1 for number, name in enumerate(Meta.__struct_fields__)}
    database.save(Saved(meta=Meta(**values)))
    loaded = database.load()
    assert loaded is not None
    assert msgspec.structs.asdict(loaded.meta) == values
