"""The demo's verdict tells each kind of fault from what is allowed. Stories are written as reports, times in milliseconds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.cli.demo_reports import Acquired, Consumed, Joining, Ready, Released
from zrmq.cli.demo_verdict import (
    LeaseSeen,
    Ledger,
    Tenure,
    Verdict,
    Worker,
    count_order_violations,
    find_lease_conflicts,
    find_overlaps,
    judge,
    time_rebalances,
)

WORKERS = [
    Worker("worker-1", "sorters", clustering=True),
    Worker("worker-2", "sorters", clustering=True),
    Worker("screen-1", "screens", clustering=False),
    Worker("screen-2", "screens", clustering=False),
]
Q = "demo-load/broker-a/0"


class Story:
    """A demo's run in short words. `at` is the present time; each message takes one millisecond."""

    def __init__(self) -> None:
        self.ledger = Ledger(WORKERS)
        self.at = 0.0

    def publish(self, count: int, sensor: str = "cpu.0") -> None:
        for _ in range(count):
            self.ledger.stored.add((sensor, self.ledger.number(sensor)))

    def acquire(self, worker: str, epoch: int = 1, queue: str = Q) -> None:
        self.ledger.take(worker, Acquired(self.at, queue, epoch))

    def release(self, worker: str, queue: str = Q) -> None:
        self.ledger.take(worker, Released(self.at, queue))

    def consume(self, worker: str, *numbers: int, queue: str = Q, sensor: str = "cpu.0") -> None:
        for number in numbers:
            self.at += 1
            self.ledger.take(worker, Consumed(self.at, queue, number - 1, sensor, number))

    def screens(self, *numbers: int) -> None:
        """Both broadcasting instances get what they have to."""
        for screen in ("screen-1", "screen-2"):
            self.consume(screen, *numbers)

    def judge(self) -> Verdict:
        return judge(self.ledger)


def story_of_a_kill() -> Story:
    """Worker 1 is killed with reading 3 read and not committed; worker 2 reads it again and goes on."""
    story = Story()
    story.publish(5)
    story.screens(1, 2, 3, 4, 5)
    story.acquire("worker-1", 1)
    story.consume("worker-1", 1, 2, 3)
    story.ledger.gone("worker-1", story.at, killed=True)
    story.at += 3000
    story.acquire("worker-2", 2)
    story.consume("worker-2", 3, 4, 5)
    return story


def test_a_kill_may_repeat_readings() -> None:
    verdict = story_of_a_kill().judge()
    assert verdict.faults == []
    assert verdict.is_good
    sorters, *screens = verdict.groups
    assert (sorters.group, sorters.instance, sorters.consumed, sorters.distinct, sorters.duplicated) == ("sorters", "", 6, 5, 1)
    assert [(screen.instance, screen.consumed) for screen in screens] == [("screen-1", 5), ("screen-2", 5)]
    assert (verdict.sent, verdict.stored, verdict.stored_twice) == (5, 5, 0)


def test_a_kill_s_rebalance_is_timed() -> None:
    (rebalance,) = story_of_a_kill().judge().rebalances
    assert (rebalance.cause, rebalance.took_ms, rebalance.queue_count) == ("worker-1 is killed", 3000.0, 1)


def test_a_lost_reading_is_a_fault() -> None:
    story = story_of_a_kill()
    story.publish(1)
    verdict = story.judge()
    assert not verdict.is_good
    assert [group.lost for group in verdict.groups] == [1, 1, 1]
    assert "sorters: 1 stored readings never came." in verdict.faults
    assert "screens (screen-2): 1 stored readings never came." in verdict.faults


def test_each_broadcasting_instance_has_to_have_everything() -> None:
    story = Story()
    story.publish(2)
    story.acquire("worker-1")
    story.consume("worker-1", 1, 2)
    story.consume("screen-1", 1, 2)
    story.consume("screen-2", 1)
    assert story.judge().faults == ["screens (screen-2): 1 stored readings never came."]


def test_a_clustering_group_has_everything_together() -> None:
    story = Story()
    story.publish(2)
    story.publish(2, "load.1min")
    story.screens(1, 2)
    for screen in ("screen-1", "screen-2"):
        story.consume(screen, 1, 2, queue="other", sensor="load.1min")
    story.acquire("worker-1")
    story.acquire("worker-2", queue="other")
    story.consume("worker-1", 1, 2)
    story.consume("worker-2", 1, 2, queue="other", sensor="load.1min")
    assert story.judge().faults == []


def test_what_was_sent_and_not_stored_is_a_fault() -> None:
    story = story_of_a_kill()
    story.ledger.number("cpu.0")
    story.ledger.refused.append("The disk is full.")
    assert story.judge().faults == ["1 of 6 readings were not stored. The disk is full."]


def test_nothing_sent_proves_nothing() -> None:
    assert Story().judge().faults == ["Nothing was sent."]


def test_a_reading_stored_at_two_places_is_a_fault() -> None:
    story = Story()
    story.publish(1)
    story.acquire("worker-1")
    story.screens(1)
    story.consume("worker-1", 1)
    story.ledger.take("worker-1", Consumed(99, Q, 7, "cpu.0", 1))
    verdict = story.judge()
    assert verdict.stored_twice == 1
    assert "1 readings lie in the queues twice." in verdict.faults


def test_reading_without_owning_is_a_fault() -> None:
    story = Story()
    story.publish(2)
    story.screens(1, 2)
    story.acquire("worker-1")
    story.consume("worker-1", 1)
    story.release("worker-1")
    story.consume("worker-1", 2)
    assert story.judge().faults == ["sorters: 1 readings came from queues the worker had not acquired."]


def test_a_broken_broker_is_a_fault() -> None:
    story = story_of_a_kill()
    story.ledger.crashes.append("broker-a ended with code -9.")
    assert story.judge().faults == ["broker-a ended with code -9."]


# --- order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "violations"),
    [([1, 2, 3], 0), ([1, 3, 2], 1), ([3, 2, 1], 2), ([1, 1], 1), ([1, 2, 2, 3], 1), ([1, 3], 0)],
)
def test_within_a_tenure_numbers_only_rise(numbers: list[int], violations: int) -> None:
    story = Story()
    story.acquire("worker-1")
    story.consume("worker-1", *numbers)
    assert count_order_violations(story.ledger.deliveries["worker-1"]) == violations


def test_a_new_tenure_may_begin_again_but_not_fill_gaps() -> None:
    story = Story()
    story.acquire("worker-1", 1)
    story.consume("worker-1", 1, 2, 4)
    story.release("worker-1")
    story.acquire("worker-2", 2)
    story.consume("worker-2", 2, 3, 4)
    deliveries = [*story.ledger.deliveries["worker-2"], *story.ledger.deliveries["worker-1"]]
    assert count_order_violations(deliveries) == 1, "3 came for the first time after 4; the others only came again"


def test_sensors_have_orders_of_their_own() -> None:
    story = Story()
    story.acquire("worker-1")
    story.consume("worker-1", 1, 2)
    story.consume("worker-1", 1, 2, sensor="cpu.1")
    assert count_order_violations(story.ledger.deliveries["worker-1"]) == 0


@given(st.lists(st.integers(1, 30), unique=True, min_size=1))
def test_violations_are_the_numbers_that_come_after_a_greater_one(numbers: list[int]) -> None:
    story = Story()
    story.acquire("worker-1")
    story.consume("worker-1", *numbers)
    late = sum(1 for at, number in enumerate(numbers) if any(earlier > number for earlier in numbers[:at]))
    assert count_order_violations(story.ledger.deliveries["worker-1"]) == late


# --- ownership ----------------------------------------------------------------------------------------------------------


def tenure(worker: str, from_ms: float, until_ms: float = math.inf, epoch: int = 0, queue: str = Q) -> Tenure:
    return Tenure(worker, "sorters", queue, epoch, from_ms, until_ms)


def test_one_after_the_other_is_no_overlap() -> None:
    assert find_overlaps([tenure("a", 0, 10), tenure("b", 10, 20), tenure("a", 20)]) == []


def test_other_queues_and_groups_are_no_overlap() -> None:
    other_group = Tenure("b", "others", Q, 0, 0)
    assert find_overlaps([tenure("a", 0), tenure("b", 0, queue="demo-load/broker-a/1"), other_group]) == []


def test_a_queue_with_two_owners_is_found() -> None:
    (overlap,) = find_overlaps([tenure("b", 9.5, 20), tenure("a", 0, 10)])
    assert overlap == f"{Q} was a's when b got it, for 0.5 ms"


def test_an_owner_that_never_lets_go_overlaps_with_all_later_ones() -> None:
    assert len(find_overlaps([tenure("a", 0), tenure("b", 5, 6), tenure("c", 7, 8)])) == 2


def test_a_killed_owner_ends_with_its_process() -> None:
    story = Story()
    story.acquire("worker-1", 1)
    story.ledger.gone("worker-1", 5.0, killed=True)
    story.at = 6.0
    story.acquire("worker-2", 2)
    assert find_overlaps(story.ledger.tenures) == []
    assert story.ledger.owners() == {Q: ["worker-2"]}


def test_acquiring_again_begins_a_new_tenure() -> None:
    story = Story()
    story.acquire("worker-1", 1)
    story.at = 4.0
    story.acquire("worker-1", 3)
    assert [(one.from_ms, one.until_ms) for one in story.ledger.tenures] == [(0.0, 4.0), (4.0, math.inf)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(1, 20)), max_size=8))
def test_overlaps_are_found_as_by_comparing_all_pairs(spans: list[tuple[str, int, int]]) -> None:
    tenures = [tenure(worker, start, start + length) for worker, start, length in spans]
    pairs = [
        (one, two) for at, one in enumerate(tenures) for two in tenures[:at]
        if one.worker != two.worker and one.from_ms < two.until_ms and two.from_ms < one.until_ms
    ]
    assert bool(find_overlaps(tenures)) == bool(pairs)


# --- leases -------------------------------------------------------------------------------------------------------------

IDS = {"client-a": "a", "client-b": "b"}


def seen(asked_ms: float, client_id: str, epoch: int, answered_ms: float | None = None) -> LeaseSeen:
    return LeaseSeen(asked_ms, asked_ms + 1 if answered_ms is None else answered_ms, "sorters", Q, client_id, epoch)


def test_leases_that_agree_with_the_workers() -> None:
    tenures = [tenure("a", 0, 10, epoch=1), tenure("b", 20, epoch=2)]
    leases = [seen(5, "client-a", 1), seen(12, "client-a", 1), seen(15, "client-b", 2), seen(30, "client-b", 2)]
    assert find_lease_conflicts(tenures, leases, IDS) == []


def test_a_broker_that_names_another_holder_contradicts() -> None:
    (conflict,) = find_lease_conflicts([tenure("a", 0, 10, epoch=1)], [seen(5, "client-b", 2)], IDS)
    assert conflict == f"a read {Q} while its broker says b holds it"


def test_an_answer_that_may_be_older_than_the_tenure_proves_nothing() -> None:
    assert find_lease_conflicts([tenure("a", 5, 10, epoch=2)], [seen(4, "client-b", 1, answered_ms=6)], IDS) == []


def test_one_epoch_for_two_clients_contradicts() -> None:
    (conflict,) = find_lease_conflicts([], [seen(5, "client-a", 7), seen(9, "client-b", 7)], IDS)
    assert conflict == f"the broker of {Q} gave epoch 7 to client-a and client-b"


@pytest.mark.parametrize(("worker", "epoch", "conflicts"), [("b", 2, 1), ("b", 3, 1), ("b", 4, 0), ("a", 3, 0), ("a", 2, 1)])
def test_epochs_rise_from_owner_to_owner(worker: str, epoch: int, conflicts: int) -> None:
    tenures = [tenure("a", 0, 10, epoch=3), tenure(worker, 10, epoch=epoch)]
    assert len(find_lease_conflicts(tenures, [], IDS)) == conflicts


# --- times --------------------------------------------------------------------------------------------------------------


def test_each_event_has_its_own_changes() -> None:
    tenures = [tenure("a", 2, 100), tenure("a", 4, 100), tenure("b", 111), tenure("b", 130)]
    rebalances = time_rebalances([(100.0, "b joins"), (0.0, "a joins"), (200.0, "b is killed")], tenures)
    assert [(one.cause, one.took_ms, one.queue_count) for one in rebalances] == [("a joins", 4.0, 2), ("b joins", 30.0, 2)]


def test_only_clustering_workers_make_the_group_share_anew() -> None:
    ledger = Ledger(WORKERS)
    for worker in WORKERS:
        ledger.take(worker.name, Joining(1.0, f"client-{worker.name}"))
        ledger.take(worker.name, Ready(2.0))
    assert ledger.events == [(1.0, "worker-1 joins"), (1.0, "worker-2 joins")]
    assert ledger.client_ids["client-screen-2"] == "screen-2"


def test_the_view_s_counts() -> None:
    story = story_of_a_kill()
    assert story.ledger.sent_count == 5
    assert story.ledger.consumed_count("sorters") == 6
    assert story.ledger.consumed_count("screens") == 10
