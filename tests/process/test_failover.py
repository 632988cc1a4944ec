"""NameServers, consumers and brokers that are killed or stopped while everybody works on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import zrmq
from tests.process.cluster import Cluster, Counting
from zrmq.cli.children import Child
from zrmq.client.admin import Admin

TIMEOUT_MS = 30_000


def await_suspect(cluster: Cluster) -> None:
    """Return when the NameServers have heard nothing of the broker for 3 s: longer than the sessions at it may be silent."""
    with Admin(cluster.addresses) as admin:
        while not all(broker.suspect for broker in admin.cluster()):
            pass  # each turn asks the NameServer, and the test's own time bound ends what never happens


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


def test_killing_and_restarting_one_of_two_nameservers_disturbs_nobody(cluster: Cluster) -> None:
    got = Counting()
    with zrmq.connect(cluster.addresses) as fabric:
        producer = fabric.producer(send_timeout_ms=TIMEOUT_MS)
        producer.send("meters", b"first")
        fabric.consume("readers", "meters", got, consume_from=zrmq.ConsumeFrom.EARLIEST)
        got.wait_for({b"first"})
        for index in (0, 1):
            cluster.restart_nameserver(index)
            bodies = {b"%d:%d" % (index, number) for number in range(50)}
            for body in bodies:
                producer.send("meters", body)
            got.wait_for(bodies)
        producer.send("new-topic", b"the route still grows")
    assert len(got.bodies) == len(set(got.bodies))


def test_a_paused_broker_goes_on_where_it_was(cluster: Cluster) -> None:
    got = Counting()
    with zrmq.connect(cluster.addresses) as fabric:
        producer = fabric.producer(send_timeout_ms=TIMEOUT_MS)
        producer.send("meters", b"before")
        fabric.consume("readers", "meters", got, consume_from=zrmq.ConsumeFrom.EARLIEST)
        got.wait_for({b"before"})
        cluster.broker.signal(signal.SIGSTOP)
        handles = [producer.send_async("meters", b"during %d" % number) for number in range(20)]
        await_suspect(cluster)
        assert not any(handle.done() for handle in handles)
        cluster.broker.signal(signal.SIGCONT)
        got.wait_for({b"during %d" % number for number in range(20)})
        receipts = [handle.result(TIMEOUT_MS) for handle in handles]
    assert len({(receipt.queue_id, receipt.queue_offset) for receipt in receipts}) == 20


def test_a_killed_consumers_queues_go_to_the_others_and_nothing_is_missed(cluster: Cluster, tmp_path: Path) -> None:
    mine, theirs = Counting(), Counting()
    reading = threading.Event()

    def note(child: Child, line: bytes | None) -> None:
        if line is not None:
            theirs.bodies.append(line.strip())
            reading.set()

    with zrmq.connect(cluster.addresses) as fabric:
        producer = fabric.producer(send_timeout_ms=TIMEOUT_MS)
        producer.send("meters", b"0")
        fabric.consume("readers", "meters", mine, consume_from=zrmq.ConsumeFrom.EARLIEST)
        mine.wait_for({b"0"})
        other = Child(
            "reader", "tests.process.reader", [cluster.addresses, "readers", "meters"], tmp_path / "reader.log", on_line=note
        )
        with other:
            number = 0
            while not reading.is_set():
                number += 1
                producer.send("meters", b"%d" % number)
            other.kill()
        for later in range(number + 1, number + 50):
            producer.send("meters", b"%d" % later)
        wanted = {b"%d" % each for each in range(number + 50)} - set(theirs.bodies)
        mine.wait_for(wanted)
