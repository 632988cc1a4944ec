"""The broker's door over real sockets and files: starts, stops, restarts, and what keeps it from starting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import zrmq
from tests.unit.real_cluster import await_brokers
from zrmq.client.admin import Admin
from zrmq.errors import AddressInUseError, ClosedError, ConfigError, FolderLockedError, FolderUnusableError


@pytest.fixture
def nameserver() -> Iterator[str]:
    with zrmq.NameServer(nameserver_port=0, start_grace_ms=0) as nameserver:
        yield nameserver.address


def make(folder: Path, nameserver: str, **options: Any) -> zrmq.Broker:
    return zrmq.Broker(folder, nameservers=nameserver, **{"broker_port": 0, "ingest_port": 0, **options})


def test_the_oldest_segment_does_not_wait_for_the_time_of_upkeep_when_the_log_is_too_long(
    tmp_path: Path, nameserver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zrmq.broker.UPKEEP_MS", 600_000.0)
    bound = {"store_segment_bytes": "8MiB", "store_store_bytes_max": "24MiB"}
    with make(tmp_path, nameserver, **bound), zrmq.Producer(nameservers=nameserver) as producer:
        await_brokers(nameserver, 1)
        for _ in range(12):
            producer.send_batch("meters", [bytes(1_000_000)] * 3)
        wait_until(lambda: not (tmp_path / "commitlog" / f"{0:020}.log").exists())


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path, nameserver: str) -> None:
    with make(tmp_path / "data", nameserver) as broker:
        await_brokers(nameserver, 1)
        with zrmq.Producer(nameservers=nameserver) as producer:
            first = producer.send("meters", b"the topic is there").message_id
            handles = [producer.send_async("meters", f"{number}") for number in range(500)]
            handles[100].result(10_000)
            broker.stop()  # a graceful stop answers what it took
            stored = [first, *(handle.message_id for handle in handles if _is_stored(handle))]
    with make(tmp_path / "data", nameserver), zrmq.connect(nameserver) as fabric:
        await_brokers(nameserver, 1)
        reader = fabric.pull_consumer(None, "meters", consume_from=zrmq.ConsumeFrom.EARLIEST)
        found: set[str] = set()
        while not found >= set(stored):
            messages = reader.poll(timeout_ms=5_000)
            assert messages, "an acknowledged message is missing"
            found |= {message.message_id for message in messages}


def _is_stored(handle: Any) -> bool:
    try:
        handle.result(200)
    except zrmq.ZrmqError:
        return False
    return True


def test_a_folder_has_one_broker(tmp_path: Path, nameserver: str) -> None:
    with make(tmp_path / "data", nameserver):
        second = make(tmp_path / "data", nameserver, broker_name="broker-b")
        with pytest.raises(FolderLockedError, match="pid"):
            second.start()


def test_a_folder_of_another_broker_is_refused(tmp_path: Path, nameserver: str) -> None:
    with make(tmp_path / "data", nameserver):
        pass
    with pytest.raises(FolderUnusableError, match="broker-a"):
        make(tmp_path / "data", nameserver, broker_name="broker-b").start()


def test_a_second_broker_of_that_name_takes_nothing_from_the_first(tmp_path: Path, nameserver: str) -> None:
    """Two that were both started without a name; the second one's folder has even been opened more often."""
    for _ in range(2):
        with make(tmp_path / "two", nameserver):
            pass
    with make(tmp_path / "one", nameserver) as first:
        await_brokers(nameserver, 1)
        with Admin(nameserver) as admin:
            second = make(tmp_path / "two", nameserver)
            second.start()
            wait_until(lambda: bool(second._role._registration._displaced))
            assert [broker.address for broker in admin.cluster()] == [first.address]
            second.stop()
            assert [broker.address for broker in admin.cluster()] == [first.address]


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass  # the test's own time bound ends what never happens


def test_a_file_is_no_folder(tmp_path: Path, nameserver: str) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(FolderUnusableError, match="Not a directory"):
        make(tmp_path / "data", nameserver).start()


@pytest.mark.parametrize("taken", ["broker_port", "ingest_port"])
def test_a_taken_port_is_named_and_the_folder_left_to_whom_it_is_given_next(
    tmp_path: Path, nameserver: str, taken: str
) -> None:
    with make(tmp_path / "one", nameserver) as broker:
        port = int(broker.address.rpartition(":")[2])
        with pytest.raises(AddressInUseError, match=str(port)):
            make(tmp_path / "two", nameserver, **{taken: port}).start()
    assert not (tmp_path / "two").exists()
    with make(tmp_path / "two", nameserver, broker_name="broker-b"):
        pass


def test_a_refused_folder_leaves_the_ports_to_the_next_start(tmp_path: Path, nameserver: str) -> None:
    with make(tmp_path / "one", nameserver) as broker:
        port = int(broker.address.rpartition(":")[2])
    (tmp_path / "file").write_text("not a folder")
    refused = make(tmp_path / "file", nameserver, broker_port=port)
    with pytest.raises(FolderUnusableError):
        refused.start()
    with pytest.raises(ClosedError, match="start it first"):
        _ = refused.address
    with make(tmp_path / "one", nameserver, broker_port=port) as broker:
        assert broker.address.endswith(f":{port}")


def fail() -> None:
    raise ZeroDivisionError("a fault of ours")


def test_a_broker_that_ends_by_a_fault_lets_its_folder_go_and_says_so(tmp_path: Path, nameserver: str) -> None:
    """The process that embeds it lives on, and may open the folder again."""
    with pytest.raises(ZeroDivisionError), make(tmp_path / "data", nameserver) as broker:
        await_brokers(nameserver, 1)
        with zrmq.Producer(nameservers=nameserver) as producer:
            producer.send("meters", b"21.5")
        broker.reactor.before_sleep(fail)
        assert broker._thread is not None
        broker._thread.join()
    with make(tmp_path / "data", nameserver) as broker:
        assert broker._role.store.tables.topics["meters"].queues
        assert broker._role.store.recovery.is_clean is False


@pytest.mark.parametrize("part", ["core.stop", "_registration.close", "_flusher.close", "_router.close"])
def test_whatever_goes_wrong_while_it_stops_it_stops_and_lets_its_folder_go(
    tmp_path: Path, nameserver: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = make(tmp_path / "data", nameserver)
    broker.start()
    owner, _, name = part.rpartition(".")
    place = attrgetter(owner)(broker._role) if owner else broker._role
    call = getattr(place, name)

    def unsure() -> None:
        call()
        if broker._stopping:
            raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(place, name, unsure)
    with suppress(ZeroDivisionError):
        broker.stop()
    assert "ZeroDivisionError: a fault of ours" in capsys.readouterr().err
    with make(tmp_path / "data", nameserver) as broker:
        assert broker._role.store.recovery.is_clean


def test_it_is_started_once_and_stopped_any_number_of_times(tmp_path: Path, nameserver: str) -> None:
    broker = make(tmp_path / "data", nameserver)
    with pytest.raises(ClosedError, match="start it first"):
        _ = broker.address
    broker.stop()
    broker.start()
    with pytest.raises(ClosedError, match="make a new one"):
        broker.start()
    broker.stop()
    broker.stop()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"brocker_name": "x"}, "did you mean broker_name"),
        ({"host": "0.0.0.0"}, "insecure"),
        ({"session_timeout_ms": "soon"}, "duration"),
        ({"broker_port": 70_000}, "65535"),
        ({"nameservers": ""}, "No NameServer"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_touched(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        zrmq.Broker(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_a_broker_without_a_nameserver_serves_when_one_appears(tmp_path: Path) -> None:
    with zrmq.NameServer(nameserver_port=0) as first:
        address = first.address
    port = int(address.rpartition(":")[2])
    with make(tmp_path / "data", address), zrmq.NameServer(nameserver_port=port, start_grace_ms=0):
        await_brokers(address, 1)
        with zrmq.Producer(nameservers=address) as producer:
            assert producer.send("meters", b"21.5").queue_offset == 0
