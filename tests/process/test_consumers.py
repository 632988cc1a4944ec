"""Consumers of one group as processes: whatever happens to one, no queue is read by two at a time and nothing is missed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zrmq
from zrmq.cli.demo_cast import Cast
from zrmq.cli.demo_readings import TOPICS
from zrmq.cli.demo_verdict import Ledger, Worker, judge
from zrmq.clock import SystemClock

SENSORS = [f"sensor.{number}" for number in range(12)]
QUEUE_COUNT = 4
DEADLINE_MS = 30_000
SESSION_TIMEOUT_MS = 2_000
RUN = "test"


class Group:
    """One broker and the members of one clustering group, with a ledger of all they report."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.workers = [Worker(name, "sorters", clustering=True) for name in names]
        self.ledger = Ledger(self.workers)
        self.cast = Cast(folder, RUN)
        self._clock = SystemClock()

    def start(self) -> None:
        """The cluster, the topics, and every member."""
        self.cast.start_cluster(["broker-a"], SESSION_TIMEOUT_MS)
        self.fabric = zrmq.connect(self.cast.nameservers)
        for topic in TOPICS:
            self.fabric.admin().create_topic(topic, queue_count=QUEUE_COUNT)
        self.producer = self.fabric.producer()
        for worker in self.workers:
            self.cast.start_worker(worker)
        self.wait(lambda: len(self.ledger.ready) == len(self.workers) and len(self.owned()) == len(self.workers))

    def close(self) -> None:
        if hasattr(self, "fabric"):
            self.fabric.close()
        self.cast.close()

    def publish(self, count: int) -> None:
        """So many readings of every sensor, acknowledged."""
        for _ in range(count):
            for at, sensor in enumerate(SENSORS):
                number = self.ledger.number(sensor)
                self.producer.send(TOPICS[at % 2], value={"run": RUN, "number": number}, keys=[sensor], message_group=sensor)
                self.ledger.stored.add((sensor, number))

    def owned(self) -> dict[str, set[str]]:
        """Queues by the worker that owns them; every queue has one owner when the values cover all."""
        found: dict[str, set[str]] = {}
        for queue, owners in self.ledger.owners().items():
            for owner in owners:
                found.setdefault(owner, set()).add(queue)
        return found

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Take reports until it is so."""
        deadline_ms = self._clock.monotonic_ms() + DEADLINE_MS
        while not is_so():
            assert self._clock.monotonic_ms() < deadline_ms, (self.owned(), self.ledger.missing_count, self.cast.crashes())
            self.cast.feed(self.ledger, 0.02)

    def wait_for_all(self) -> None:
        """Everything stored was consumed."""
        self.wait(lambda: not self.ledger.missing_count)

    def wait_for_owners(self, *names: str) -> None:
        """These and no others own queues, all of them together."""
        everything = QUEUE_COUNT * len(TOPICS)
        self.wait(lambda: self.owned().keys() == set(names) and sum(map(len, self.owned().values())) == everything)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path, "one", "two", "three")
    try:
        group.start()
        yield group
    finally:
        group.close()


@pytest.mark.timeout(120)
def test_a_killed_member_s_queues_go_over_one_by_one(group: Group) -> None:
    group.publish(10)
    group.cast.kill("two")
    group.publish(10)
    group.wait_for_owners("one", "three")
    group.publish(10)
    group.wait_for_all()
    verdict = judge(group.ledger)
    assert verdict.faults == []
    assert verdict.groups[0].distinct == 30 * len(SENSORS)
    assert [one.queue_count > 0 for one in verdict.rebalances if one.cause == "two is killed"] == [True]


@pytest.mark.timeout(120)
def test_a_member_that_was_paused_does_not_go_on_with_queues_that_others_have(group: Group) -> None:
    group.publish(5)
    group.wait_for_all()
    queues = group.owned()["two"]
    paused_ms = SystemClock().monotonic_ms()
    group.cast.signal("two", signal.SIGSTOP)
    group.publish(5)  # some of it lies in the sockets of the one that is paused
    group.wait(lambda: queues <= acquired_since(group.ledger, paused_ms, "one", "three") and not group.ledger.missing_count)
    resumed_ms = SystemClock().monotonic_ms()
    group.cast.signal("two", signal.SIGCONT)
    group.publish(5)
    group.wait(lambda: bool(acquired_since(group.ledger, resumed_ms, "two")))
    group.publish(5)
    group.wait_for_all()
    late = [delivery for delivery in group.ledger.deliveries["two"] if delivery.at_ms > paused_ms]
    assert late, "it takes part again"
    assert [delivery for delivery in late if delivery.tenure is None or delivery.tenure.from_ms < resumed_ms] == []
    assert judge(group.ledger).groups[0].order_violations == 0
    assert group.cast.crashes() == []


def acquired_since(ledger: Ledger, since_ms: float, *workers: str) -> set[str]:
    """Queues that one of the workers acquired since then."""
    return {tenure.queue for tenure in ledger.tenures if tenure.worker in workers and tenure.from_ms > since_ms}
