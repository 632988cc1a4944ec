"""The producer's core on a cluster in memory: where batches go, and what becomes of them when brokers refuse, vanish, dawdle."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.fake_cluster import LIMITS, NAMESERVER, FakeCluster, StoringBroker
from zrmq.client.accumulator import RECORD_OVERHEAD_BYTES, Accumulator, AccumulatorConfig
from zrmq.client.batch import Batch, OneWay, SendHandle, Target
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.producing import UNFILLED_MAX, ProducerCore, ProducingConfig
from zrmq.errors import (
    ClosedError,
    Code,
    DiskFullError,
    PayloadTooLargeError,
    RequestRefusedError,
    RequestTimeoutError,
    StoppingError,
    TopicNotFoundError,
    UnreachableError,
    ZrmqError,
)
from zrmq.message import MessageQueue
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.events import PERMISSION_READ
from zrmq.protocol.requests import Hello, Reply, Request, Send

A0, A1, B0 = MessageQueue("t", "a", 0), MessageQueue("t", "a", 1), MessageQueue("t", "b", 0)


class Desk:
    """A producer's core in a cluster; `send` is what callers' threads do."""

    def __init__(
        self, cluster: FakeCluster, *topics: str, records_max: int = 10, linger_ms: float = 0.0, buffer_bytes: int = 1 << 20,
        **config: Any,
    ) -> None:
        self.cluster = cluster
        self.network = cluster.network
        self.loop = loop = self.network.loop("producer")
        self.instance = ClientInstance(loop, [NAMESERVER], Identity("p", "producer", "G"), self.network.rng)
        self.accumulator = Accumulator(
            AccumulatorConfig(7, buffer_bytes, False, records_max, 1 << 16, linger_ms), loop.clock,
            new_lock=threading.Lock, new_owned_lock=threading.RLock,  # type: ignore[arg-type]
            wake=lambda: loop.call_soon_threadsafe(self.core.wake), may_wait=lambda: True,
        )
        self.core = ProducerCore(loop, self.accumulator, ProducingConfig(**config), self.instance, self.network.rng)
        self.instance.listener = self.core
        for topic in topics:
            assert self.prepare(topic) is None
        if topics:
            running = {broker.name for broker in cluster.brokers.values() if broker.loop is not None}
            self.network.run_until(lambda: self.core.reachable == running)

    def prepare(self, topic: str, timeout_ms: int = 3_000) -> ZrmqError | None:
        done: list[ZrmqError | None] = []
        self.core.prepare(topic, timeout_ms, done.append)
        self.network.run_until(lambda: bool(done))
        return done[0]

    def send(self, body: bytes = b"x", target: Target = "t", timeout_ms: int = 3_000) -> SendHandle:
        return self.accumulator.append(target, body, len(body) + RECORD_OVERHEAD_BYTES, None, timeout_ms)

    def finish(self, *handles: SendHandle, limit_ms: float = 60_000) -> None:
        self.network.run_until(lambda: all(handle.done() for handle in handles), limit_ms)


def error_of(handle: SendHandle) -> ZrmqError:
    with pytest.raises(ZrmqError) as caught:
        handle.result(0)
    return caught.value


def one(queue_count: int = 1) -> Desk:
    """One broker."""
    return Desk(FakeCluster("a", queue_count=queue_count), "t")


def two() -> Desk:
    """Two brokers, a queue each, both used."""
    cluster = FakeCluster("a", "b", queue_count=1)
    for broker in cluster.brokers.values():
        broker.add_topic("t")
    return Desk(cluster, "t")


# --- the good way ---------------------------------------------------------------------------------------------------------


def test_messages_are_stored_in_order_and_receipts_say_where() -> None:
    desk = one()
    handles = [desk.send(b"%d" % number) for number in range(25)]
    desk.finish(*handles)
    assert desk.cluster["a"].bodies == [b"%d" % number for number in range(25)]
    receipts = [handle.result() for handle in handles]
    assert [receipt.queue_offset for receipt in receipts] == list(range(25))
    assert {receipt.queue for receipt in receipts} == {A0}
    assert [receipt.message_id for receipt in receipts] == [handle.message_id for handle in handles]
    assert desk.accumulator.buffered_bytes == 0


@pytest.mark.parametrize("target", ["t", A0])
def test_batches_form_while_enough_is_on_its_way(target: Target) -> None:
    desk = one()
    desk.cluster["a"].answer_after_ms = 100
    sends = desk.cluster["a"].sends
    for number in range(UNFILLED_MAX):
        desk.send(b"lonely", target)
        desk.network.run_until(lambda: len(sends) == number + 1)  # noqa: B023 - waited for here
    assert sum(batch.message_count for batch in desk.accumulator.unfinished()) == UNFILLED_MAX, "none has its answer"
    later = [desk.send(b"later", target) for _ in range(5)]
    desk.network.run_for(50)
    assert len(sends) == UNFILLED_MAX
    desk.finish(*later)
    assert len(sends) == UNFILLED_MAX + 1


def test_full_batches_do_not_wait_for_anything() -> None:
    desk = one()
    desk.cluster["a"].answer_after_ms = 100
    handles = [desk.send() for _ in range(40)]
    desk.network.run_for(50)
    assert len(desk.cluster["a"].sends) == 4
    assert not any(handle.done() for handle in handles)


def test_free_messages_take_turns_over_all_queues_of_all_brokers() -> None:
    desk = Desk(FakeCluster("a", "b", queue_count=2))
    for broker in desk.cluster.brokers.values():
        broker.add_topic("t")
    assert desk.prepare("t") is None
    desk.network.run_until(lambda: len(desk.core.reachable) == 2)
    handles = [desk.send() for _ in range(80)]
    desk.finish(*handles)
    assert Counter(handle.result().queue for handle in handles) == {
        MessageQueue("t", name, queue_id): 20 for name in "ab" for queue_id in range(2)
    }


def test_bound_messages_stay_with_their_queue() -> None:
    desk = one(queue_count=2)
    handles = [desk.send(b"%d" % number, (A0, A1)[number % 2]) for number in range(30)]
    desk.finish(*handles)
    log = desk.cluster["a"].logs
    assert [body for entry in log["t", 0] for body in entry.bodies] == [b"%d" % number for number in range(0, 30, 2)]
    assert [body for entry in log["t", 1] for body in entry.bodies] == [b"%d" % number for number in range(1, 30, 2)]


def test_the_window_is_bounded_and_servers_may_lower_it() -> None:
    for server_max, expected in ((32, 16), (3, 3)):
        cluster = FakeCluster("a", queue_count=1)
        cluster["a"].limits = replace(LIMITS, inflight_batches_max=server_max)
        cluster["a"].answer_after_ms = 1_000
        desk = Desk(cluster, "t", records_max=1)
        handles = [desk.send() for _ in range(40)]
        desk.network.run_for(500)
        assert len(cluster["a"].sends) == expected
        cluster["a"].answer_after_ms = 0
        desk.finish(*handles)


def test_each_batch_names_the_unanswered_one_before_it() -> None:
    desk = one()
    desk.cluster["a"].answer_after_ms = 10
    handles = [desk.send() for _ in range(30)]
    desk.finish(*handles)
    assert [send.follows for send in desk.cluster["a"].sends] == [0, 10, 20]


def test_lingering_waits_for_more_unless_somebody_waits() -> None:
    desk = Desk(FakeCluster("a", queue_count=1), "t", linger_ms=20)
    handle = desk.send()
    desk.network.run_for(15)
    assert not handle.done()
    second = desk.send()
    desk.network.run_for(15)
    assert handle.done()
    assert second.done()
    assert len(desk.cluster["a"].sends) == 1
    third = desk.send()
    with pytest.raises(RequestTimeoutError):
        third.result(timeout_ms=0)
    desk.network.run_for(5)
    assert third.done()


# --- topics ---------------------------------------------------------------------------------------------------------------


def test_a_topic_is_created_by_use() -> None:
    desk = Desk(FakeCluster("a"))
    assert desk.prepare("new") is None
    handle = desk.send(target="new")
    desk.finish(handle)
    assert handle.result().topic == "new"


def test_a_topic_that_may_not_be_created_is_not_found() -> None:
    desk = Desk(FakeCluster("a", auto_create=False))
    assert isinstance(desk.prepare("new"), TopicNotFoundError)


def test_an_existing_topic_needs_no_permission_to_create() -> None:
    cluster = FakeCluster("a", auto_create=False)
    cluster["a"].add_topic("t")
    desk = Desk(cluster, "t")
    handle = desk.send()
    desk.finish(handle)
    assert handle.result().queue_offset == 0


def test_an_unreachable_nameserver_is_named_within_the_timeout() -> None:
    cluster = FakeCluster("a")
    cluster.nameserver.close()
    desk = Desk(cluster)
    error = desk.prepare("t", timeout_ms=500)
    assert isinstance(error, UnreachableError)
    assert NAMESERVER in error.message
    assert desk.network.now_ms < 1_000


@pytest.mark.parametrize("settle_ms", [0, 50])
def test_a_topic_deleted_under_the_producer_is_created_again(settle_ms: float) -> None:
    desk = one()
    desk.finish(desk.send())
    desk.cluster["a"].delete_topics()
    desk.network.run_for(settle_ms)
    handles = [desk.send(), desk.send(target=A0)]
    desk.finish(*handles)
    assert [handle.result().topic for handle in handles] == ["t", "t"]


def test_a_topic_deleted_for_good_fails_what_comes_after() -> None:
    desk = one()
    desk.finish(desk.send())
    desk.cluster["a"].auto_create = False
    desk.cluster["a"].delete_topics()
    desk.network.run_for(50)
    handle = desk.send()
    desk.finish(handle, limit_ms=100)
    assert isinstance(error_of(handle), TopicNotFoundError)


# --- lost connections -----------------------------------------------------------------------------------------------------


def test_what_was_on_its_way_is_sent_again_and_recognised() -> None:
    desk = one()
    broker = desk.cluster["a"]
    broker.loses_answers = True
    handles = [desk.send(b"%d" % number) for number in range(30)]
    desk.network.run_until(lambda: len(broker.bodies) == 30)
    broker.loses_answers = False
    desk.network.break_connections("producer", "a")
    desk.finish(*handles)
    assert broker.bodies == [b"%d" % number for number in range(30)]
    assert all(handle.result().duplicate for handle in handles)


def test_a_restarted_broker_gets_everything_in_order() -> None:
    desk = one()
    broker = desk.cluster["a"]
    broker.loses_answers = True
    handles = [desk.send(b"%d" % number) for number in range(60)]
    desk.network.run_until(lambda: len(broker.bodies) >= 20)
    broker.crash()
    broker.loses_answers = False
    desk.network.run_for(500)
    handles += [desk.send(b"%d" % number) for number in range(60, 80)]
    broker.start()
    desk.finish(*handles)
    assert broker.bodies == [b"%d" % number for number in range(80)]
    broker.check_log()


def test_a_broker_that_lost_its_log_makes_the_producer_send_everything_unanswered_again() -> None:
    desk = one()
    broker = desk.cluster["a"]
    broker.loses_answers = True
    handles = [desk.send(b"%d" % number) for number in range(30)]
    desk.network.run_until(lambda: len(broker.bodies) == 30)
    broker.crash()
    broker.logs.clear()
    broker.loses_answers = False
    broker.start()
    desk.finish(*handles)
    assert broker.bodies == [b"%d" % number for number in range(30)]


# --- failing over ---------------------------------------------------------------------------------------------------------


def test_a_broker_known_to_be_down_costs_nothing() -> None:
    desk = two()
    desk.cluster["a"].crash()
    desk.network.run_until(lambda: desk.core.reachable == {"b"})
    started_ms = desk.network.now_ms
    handles = [desk.send() for _ in range(30)]
    desk.finish(*handles)
    assert desk.network.now_ms - started_ms < 10
    assert {handle.result().broker_name for handle in handles} == {"b"}


def test_unknown_outcome_moves_to_another_broker_after_two_seconds_with_the_same_ids() -> None:
    desk = two()
    for broker in desk.cluster.brokers.values():
        broker.loses_answers = True
    handles = [desk.send(b"%d" % number) for number in range(40)]
    desk.network.run_until(lambda: len(desk.cluster.bodies) == 40)
    desk.cluster["a"].crash()
    desk.cluster["b"].loses_answers = False
    desk.network.break_connections("producer", "b")
    desk.network.run_for(1_900)
    assert not all(handle.done() for handle in handles)
    desk.finish(*handles)
    assert {handle.result().broker_name for handle in handles} == {"b"}
    assert sorted(desk.cluster["b"].bodies) == sorted(b"%d" % number for number in range(40))
    moved = {entry.header.first_sequence for entry in desk.cluster["a"].logs["t", 0]}
    assert moved
    assert moved <= {entry.header.first_sequence for entry in desk.cluster["b"].logs["t", 0]}


def test_a_broker_back_within_two_seconds_keeps_its_batches() -> None:
    desk = two()
    desk.cluster["a"].loses_answers = True
    handles = [desk.send() for _ in range(40)]
    desk.network.run_until(lambda: bool(desk.cluster["a"].bodies))
    desk.cluster["a"].crash()
    desk.network.run_for(800)
    desk.cluster["a"].loses_answers = False
    desk.cluster["a"].start()
    desk.finish(*handles)
    assert len(desk.cluster.bodies) == 40


def test_bound_messages_wait_for_their_broker() -> None:
    desk = two()
    desk.cluster["a"].loses_answers = True
    bound = desk.send(b"bound", A0, timeout_ms=20_000)
    desk.network.run_until(lambda: bool(desk.cluster["a"].bodies))
    desk.cluster["a"].crash()
    desk.network.run_for(5_000)
    assert not bound.done()
    desk.cluster["a"].loses_answers = False
    desk.cluster["a"].start()
    desk.finish(bound)
    assert (bound.result().broker_name, bound.result().duplicate) == ("a", True)
    assert desk.cluster["b"].bodies == []


def test_a_batch_never_returns_to_a_broker_that_may_have_it() -> None:
    desk = two()
    a, b = desk.cluster["a"], desk.cluster["b"]
    a.loses_answers = b.loses_answers = True
    handles = [desk.send(b"%d" % number, timeout_ms=30_000) for number in range(20)]
    desk.network.run_until(lambda: len(desk.cluster.bodies) == 20)
    first_at_a = {entry.header.first_sequence for entry in a.logs["t", 0]}
    a.crash()
    desk.network.run_until(lambda: first_at_a <= {entry.header.first_sequence for entry in b.logs["t", 0]})
    a.loses_answers = False
    a.start()
    b.crash()
    desk.network.run_for(10_000)
    assert not all(handle.done() for handle in handles)
    b.loses_answers = False
    b.start()
    desk.finish(*handles)
    a.check_log()
    b.check_log()


def test_a_silent_broker_is_left_although_its_connection_stands() -> None:
    desk = two()
    desk.network.loops["a"].pause()
    handles = [desk.send(timeout_ms=8_000) for _ in range(40)]
    desk.finish(*handles)
    assert desk.network.now_ms < 6_000
    assert {handle.result().broker_name for handle in handles} == {"b"}


def test_a_slow_broker_gets_nothing_new_while_others_serve() -> None:
    desk = two()
    desk.cluster["a"].answer_after_ms = 900
    handles = [desk.send() for _ in range(20)]
    desk.finish(*handles)
    assert {handle.result().broker_name for handle in handles} == {"a", "b"}
    later = [desk.send() for _ in range(100)]
    desk.finish(*later)
    assert {handle.result().broker_name for handle in later} == {"b"}
    desk.network.run_for(2_100)
    again = [desk.send() for _ in range(20)]
    desk.finish(*again)
    assert {handle.result().broker_name for handle in again} == {"a", "b"}


def test_a_slow_broker_is_used_when_it_is_the_only_one() -> None:
    desk = one()
    desk.cluster["a"].answer_after_ms = 900
    for _ in range(3):
        handle = desk.send()
        desk.finish(handle)
        assert handle.result().broker_name == "a"


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [DiskFullError("full"), StoppingError("stopping"), RequestRefusedError("no", code=Code.STORE_FAILED)]
)
def test_a_brokers_trouble_moves_free_messages_at_once(error: ZrmqError) -> None:
    desk = two()
    desk.cluster["a"].refuse = lambda request: error
    started_ms = desk.network.now_ms
    handles = [desk.send(b"%d" % number) for number in range(60)]
    desk.finish(*handles)
    assert desk.network.now_ms - started_ms < 100
    assert {handle.result().broker_name for handle in handles} == {"b"}
    assert sorted(desk.cluster["b"].bodies) == sorted(b"%d" % number for number in range(60))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_refusal_says_nothing_about_what_was_sent_since(leaves: bool) -> None:
    """A full disk refused the batch; sent again, its answer is lost, and only then it moves: now the broker may have it. Also
    when that has left the route by then, and nothing of the batch is under way any more."""
    desk = two()
    a, b = desk.cluster["a"], desk.cluster["b"]
    b.crash()
    desk.network.run_until(lambda: desk.core.reachable == {"a"})
    a.refuse = lambda request: DiskFullError("full")
    handle = desk.send(timeout_ms=60_000)
    desk.network.run_until(lambda: bool(a.sends))
    a.refuse, a.loses_answers = lambda request: None, True
    desk.network.run_until(lambda: bool(a.bodies))
    if leaves:
        a.crash()
        desk.network.run_until(lambda: desk.core.route is not None and "a" not in desk.core.route.brokers)
    b.start()
    desk.finish(handle)
    assert handle.result().broker_name == "b"
    assert handle.batch.avoid == {"a"}, "it never goes back there"


def test_trouble_that_passes_is_waited_for_and_order_is_kept() -> None:
    desk = one()
    broker = desk.cluster["a"]
    broker.refuse = lambda request: DiskFullError("full")
    handles = [desk.send(b"%d" % number, A0) for number in range(35)]
    desk.network.run_until(lambda: bool(broker.sends))
    desk.network.run_for(50)
    broker.refuse = lambda request: None
    desk.finish(*handles)
    assert broker.bodies == [b"%d" % number for number in range(35)]


def test_trouble_that_stays_is_reported_after_the_retries() -> None:
    desk = one()
    desk.cluster["a"].refuse = lambda request: DiskFullError("The disk is full.", free_bytes=3)
    handle = desk.send()
    desk.finish(handle)
    error = error_of(handle)
    assert isinstance(error, DiskFullError)
    assert error.facts == {"free_bytes": 3}
    assert len(desk.cluster["a"].sends) == 3


def test_without_retries_the_first_refusal_counts() -> None:
    desk = Desk(FakeCluster("a"), "t", retries=0)
    desk.cluster["a"].refuse = lambda request: DiskFullError("full")
    handle = desk.send()
    desk.finish(handle)
    assert len(desk.cluster["a"].sends) == 1


def test_a_fault_of_the_batch_is_final_and_those_behind_go_on() -> None:
    desk = one()
    broker = desk.cluster["a"]
    refused: list[Send] = []

    def refuse(request: Send) -> ZrmqError | None:
        if not refused:
            refused.append(request)
            return PayloadTooLargeError("Too large.")
        return None

    broker.refuse = refuse
    handles = [desk.send(b"%d" % number) for number in range(30)]
    desk.finish(*handles)
    assert isinstance(error_of(handles[0]), PayloadTooLargeError)
    assert broker.bodies == [b"%d" % number for number in range(10, 30)]


def test_failures_are_logged_together(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(FakeCluster("a"), "t", retries=0)
    desk.cluster["a"].refuse = lambda request: DiskFullError("The disk is full.")
    handles = [desk.send() for _ in range(25)]
    desk.finish(*handles)
    desk.network.run_for(1_100)
    lines = [line for line in capsys.readouterr().err.splitlines() if "messages_failed" in line]
    assert len(lines) == 1
    assert "messages=25" in lines[0]
    assert "DISK_FULL" in lines[0]


@pytest.mark.parametrize("is_session_lost", [False, True])
def test_a_topic_is_not_idle_while_what_was_given_up_may_still_arrive(is_session_lost: bool) -> None:
    """Of a queue: a lane, which is another connection, would overtake it."""
    desk = one()
    desk.network.loops["a"].pause()
    handles = [desk.send(b"late", A0, timeout_ms=100)]
    desk.finish(handles[0])
    handles += [desk.send(b"late too", A0, timeout_ms=100)]
    desk.finish(*handles)
    assert [type(error_of(handle)) for handle in handles] == [RequestTimeoutError] * 2
    assert not desk.accumulator.is_idle("t")
    assert desk.accumulator.unfinished() == []
    assert desk.accumulator.buffered_bytes == 0
    desk.network.loops["a"].resume()
    if is_session_lost:
        desk.network.break_connections("producer", "a")
        desk.network.run_until(lambda: not desk.core.reachable)
    else:
        desk.network.run_for(10)
        assert not desk.accumulator.is_idle("t"), "nobody knows yet that it has arrived"
        desk.finish(desk.send(b"next", A0))
        assert desk.cluster["a"].bodies == [b"late", b"late too", b"next"]
    assert desk.accumulator.is_idle("t")
    assert desk.core._late == {}


def test_what_was_given_up_has_arrived_when_a_later_heartbeat_is_answered() -> None:
    desk = two()
    desk.cluster["a"].loses_answers = True
    desk.finish(desk.send(b"late", A0, timeout_ms=500))
    assert not desk.accumulator.is_idle("t")
    desk.network.run_for(3_000)
    assert desk.accumulator.is_idle("t")


def of_a_lane(desk: Desk, body: bytes, timeout_ms: float) -> Batch:
    """A message as a lane hands it over, of another producer id."""
    frame = encode_batch(Columns([body]), producer_id=99, first_sequence=1, first_born_ms=0, last_born_ms=0, compress=False)
    deadline_ms = desk.loop.clock.monotonic_ms() + timeout_ms
    return desk.accumulator.encoded_batch("t", 99, 1, frame, len(body) + RECORD_OVERHEAD_BYTES, deadline_ms)


def test_what_waits_behind_another_producers_batch_fails_over_too() -> None:
    desk = two()
    a, b = desk.cluster["a"], desk.cluster["b"]
    b.crash()
    desk.network.run_until(lambda: desk.core.reachable == {"a"})
    a.loses_answers = True
    desk.send(b"first", A0, timeout_ms=40_000)
    desk.network.run_until(lambda: len(a.sends) == 1)
    batch = of_a_lane(desk, b"second", 30_000)
    desk.core.adopt(batch, A0, RequestTimeoutError("No answer."))
    desk.network.run_for(3_000)
    b.start()
    desk.network.run_until(lambda: batch.outcome is not None, 10_000)
    assert b.bodies == [b"second"]


def test_a_full_disk_says_nothing_of_what_a_lane_has_sent() -> None:
    """That may lie on another connection, and arrive when there is room again."""
    desk = one()
    desk.cluster["a"].refuse = lambda request: DiskFullError("The disk is full.") if isinstance(request, Send) else None
    batch = of_a_lane(desk, b"once", 2_000)
    desk.core.adopt(batch, A0, RequestTimeoutError("No answer."))
    desk.network.run_until(lambda: batch.outcome is not None)
    assert isinstance(batch.outcome, RequestTimeoutError)


def test_a_message_that_is_handed_over_to_a_closed_core_may_be_stored() -> None:
    desk = one()
    desk.core.close()
    batch = of_a_lane(desk, b"once", 2_000)
    desk.core.adopt(batch, A0, RequestTimeoutError("No answer."))
    assert "unknown whether it was stored" in str(batch.outcome)


def test_what_may_go_to_any_queue_keeps_no_order_and_its_topic_is_idle() -> None:
    desk = one()
    desk.cluster["a"].loses_answers = True
    desk.finish(desk.send(timeout_ms=100))
    assert desk.accumulator.is_idle("t")


# --- what may be stored all the same --------------------------------------------------------------------------------------


def stored_unheard(desk: Desk, target: Target = "t", **options: Any) -> SendHandle:
    """A message that broker a has stored, with the answer lost."""
    a = desk.cluster["a"]
    a.loses_answers = True
    handle = desk.send(b"once", target, **options)
    desk.network.run_until(lambda: b"once" in a.bodies)
    a.loses_answers = False
    return handle


def refuse_repetitions(desk: Desk, error: ZrmqError) -> None:
    """Before broker a looks for what it has stored."""

    def refuse(request: Request, frame: bytes) -> Reply:
        raise error

    desk.cluster["a"]._store = refuse  # type: ignore[method-assign]
    desk.network.break_connections("producer", "a")


@pytest.mark.parametrize("retries", [0, 2])
def test_the_refusal_of_a_repetition_does_not_say_that_nothing_is_stored(retries: int) -> None:
    desk = Desk(FakeCluster("a", queue_count=1), "t", retries=retries)
    handle = stored_unheard(desk)
    refuse_repetitions(desk, StoppingError("Shutting down."))
    desk.finish(handle)
    error = error_of(handle)
    assert isinstance(error, RequestTimeoutError)
    assert "refused: Shutting down. It is unknown whether" in error.message
    assert handle.batch.may_be_stored


def test_a_broker_that_stays_away_after_its_refusal_leaves_it_open_too() -> None:
    desk = one()
    handle = stored_unheard(desk)
    refuse_repetitions(desk, StoppingError("Shutting down."))
    desk.network.run_for(250)
    desk.cluster["a"].crash()
    desk.finish(handle)
    assert isinstance(error_of(handle), RequestTimeoutError)


def test_a_session_refused_for_good_says_nothing_about_what_was_sent_before() -> None:
    desk = one()
    a = desk.cluster["a"]
    handle = stored_unheard(desk)
    answer = a._answer

    def refuse_hello(peer: bytes, request: Request, frames: list[bytes]) -> Reply:
        if isinstance(request, Hello):
            raise RequestRefusedError("Use the same release.", code=Code.VERSION_UNSUPPORTED)
        return answer(peer, request, frames)

    a._answer = refuse_hello  # type: ignore[method-assign]
    desk.network.break_connections("producer", "a")
    desk.finish(handle)
    error = error_of(handle)
    assert isinstance(error, RequestTimeoutError)
    assert "Use the same release." in error.message


@pytest.mark.parametrize("code", [Code.STORE_FAILED, Code.INTERNAL_ERROR])
def test_a_refusal_that_leaves_it_open_is_told_as_it_is(code: Code) -> None:
    desk = one()
    desk.cluster["a"].refuse = lambda request: RequestRefusedError("Trouble.", code=code)
    handle = desk.send()
    desk.finish(handle)
    assert (error_of(handle).code, handle.batch.may_be_stored) == (code, True)


def test_what_a_full_disk_refuses_is_not_stored_there_whatever_came_before() -> None:
    desk = one()
    handle = stored_unheard(desk)
    desk.cluster["a"].logs.clear()  # the power went
    desk.cluster["a"].refuse = lambda request: DiskFullError("full")
    desk.network.break_connections("producer", "a")
    desk.finish(handle)
    assert (error_of(handle).code, handle.batch.may_be_stored) == (Code.DISK_FULL, False)


def test_closing_tells_apart_what_was_sent_and_what_was_not() -> None:
    desk = one()
    sent = stored_unheard(desk)
    kept = desk.send(b"later", timeout_ms=60_000)
    desk.core.close()
    assert "unknown whether" in error_of(sent).message
    assert "was not stored" in error_of(kept).message
    assert (sent.batch.may_be_stored, kept.batch.may_be_stored) == (True, False)


def test_what_may_be_stored_waits_for_a_broker_that_leaves_and_comes_back() -> None:
    desk = two()
    a, b = desk.cluster["a"], desk.cluster["b"]
    desk.core.faults.record_failure("b", desk.network.now_ms)  # so that a gets it
    handle = stored_unheard(desk)
    desk.core.faults.record("b", 0, desk.network.now_ms)
    a.registration.close()
    desk.network.run_until(lambda: desk.core.route is not None and "a" not in desk.core.route.brokers)
    a.crash()
    a.start()
    desk.finish(handle)
    assert (handle.result().broker_name, handle.result().duplicate) == ("a", True)
    assert b.bodies == []


def test_a_batch_whose_store_failed_waits_like_one_without_an_answer() -> None:
    """As long as no other broker is there its queue is where it is recognised; also when that is not reachable for a moment."""
    desk = two()
    a, b = desk.cluster["a"], desk.cluster["b"]
    b.crash()
    desk.network.run_until(lambda: desk.core.reachable == {"a"})
    store = a._store

    def store_and_fail(request: Send, frame: bytes) -> Reply:
        store(request, frame)
        raise RequestRefusedError("The disk failed.", code=Code.STORE_FAILED)

    a._store = store_and_fail  # type: ignore[method-assign]
    handle = desk.send(b"once")
    desk.network.run_until(lambda: handle.batch.is_sealed and handle.batch.refusal is not None)
    a._store = store  # type: ignore[method-assign]
    a.crash()
    b.start()
    desk.network.run_until(lambda: desk.core.reachable == {"b"})
    desk.network.run_for(200)
    a.start()
    desk.finish(handle)
    assert (handle.result().broker_name, handle.result().duplicate) == ("a", True)
    assert b.bodies == []


# --- deadlines ------------------------------------------------------------------------------------------------------------


def test_no_answer_in_time_means_that_nobody_knows() -> None:
    desk = one()
    desk.cluster["a"].loses_answers = True
    handle = desk.send(timeout_ms=500)
    desk.finish(handle, limit_ms=700)
    error = error_of(handle)
    assert isinstance(error, RequestTimeoutError)
    assert "unknown whether" in error.message
    assert desk.accumulator.buffered_bytes == 0


def test_brokers_that_are_all_down_are_named() -> None:
    desk = two()
    for broker in desk.cluster.brokers.values():
        broker.crash()
    desk.network.run_until(lambda: not desk.core.reachable)
    handles = [desk.send(timeout_ms=1_000), desk.send(target=B0, timeout_ms=1_000)]
    desk.finish(*handles, limit_ms=1_200)
    error = error_of(handles[0])
    assert isinstance(error, UnreachableError)
    assert f"a ({desk.cluster['a'].address}), b ({desk.cluster['b'].address})" in error.message
    assert error_of(handles[1]).facts["brokers"] == {"b": desk.cluster["b"].address}


def test_a_message_that_only_waited_says_so() -> None:
    desk = Desk(FakeCluster("a", queue_count=1), "t", records_max=1, window_max=1)
    desk.cluster["a"].answer_after_ms = 400
    handles = [desk.send(timeout_ms=500) for _ in range(5)]
    desk.finish(*handles)
    assert handles[0].result().queue_offset == 0
    assert "waited" in error_of(handles[-1]).message


def test_batches_behind_one_that_was_given_up_are_stored() -> None:
    desk = one()
    broker = desk.cluster["a"]
    first = desk.send(b"first", A0, timeout_ms=300)
    broker.crash()
    desk.network.run_for(10)
    second = desk.send(b"second", A0, timeout_ms=5_000)
    desk.network.run_for(1_000)
    assert isinstance(error_of(first), ZrmqError)
    broker.start()
    desk.finish(second)
    assert broker.bodies == [b"second"]


# --- one-way --------------------------------------------------------------------------------------------------------------


def test_one_way_messages_arrive_and_end_when_they_are_handed_over() -> None:
    desk = one()
    handles = [desk.send(b"%d" % number, OneWay("t")) for number in range(25)]
    desk.finish(*handles)
    desk.network.run_for(10)
    assert [body for entry in desk.cluster["a"].one_way for body in entry.bodies] == [b"%d" % number for number in range(25)]
    assert desk.cluster["a"].sends == []
    assert desk.accumulator.buffered_bytes == 0


def test_one_way_messages_wait_for_a_broker_and_are_counted_when_none_comes(capsys: pytest.CaptureFixture[str]) -> None:
    desk = one()
    desk.finish(desk.send(b"x", OneWay("t")))
    desk.cluster["a"].crash()
    desk.network.run_until(lambda: not desk.core.reachable)
    desk.network.run_for(20)
    handle = desk.send(b"late", OneWay("t"), timeout_ms=500)
    desk.finish(handle, limit_ms=800)
    desk.network.run_for(1_100)
    assert "messages_failed" in capsys.readouterr().err


def test_one_way_messages_to_a_topic_that_takes_none_fail_at_once() -> None:
    desk = one()
    desk.finish(desk.send(b"x", OneWay("t")))
    desk.cluster["a"].add_topic("t", permission=PERMISSION_READ)
    desk.cluster["a"].add_topic("another")  # the fake counts its topics to tell that a route is new
    desk.network.run_until(lambda: desk.core.route is not None and not desk.core.route.writable_queues("t"))
    handle = desk.send(b"late", OneWay("t"), timeout_ms=60_000)
    desk.finish(handle, limit_ms=100)
    with pytest.raises(RequestRefusedError, match="takes no messages"):
        handle.result(0)


def test_one_way_messages_take_a_new_connection_when_the_broker_was_silent() -> None:
    desk = one()
    desk.finish(desk.send(b"before", OneWay("t")))
    desk.network.run_for(10)
    desk.network.half_open("producer", "a")
    desk.network.run_until(lambda: not desk.core.reachable)
    desk.network.run_until(lambda: bool(desk.core.reachable))
    desk.finish(desk.send(b"after", OneWay("t")))
    desk.network.run_for(10)
    assert [body for entry in desk.cluster["a"].one_way for body in entry.bodies] == [b"before", b"after"]


def test_one_way_connections_to_addresses_that_nobody_has_any_more_are_closed() -> None:
    desk = one()
    a = desk.cluster["a"]
    for port in (21_000, 22_000):
        a.crash()
        desk.network.run_until(lambda: not desk.core.reachable)
        desk.send(b"lost", OneWay("t"))  # the route still shows the broker
        desk.network.run_for(10)
        a.address, a.ingest_address = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"
        a.start()
        desk.network.run_until(lambda: bool(desk.core.reachable))
    desk.finish(desk.send(b"kept", OneWay("t")))
    assert set(desk.core._pushes) == {a.ingest_address}


# --- the end --------------------------------------------------------------------------------------------------------------


def test_close_fails_what_is_left_and_says_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    desk = one()
    desk.cluster["a"].loses_answers = True
    handles = [desk.send() for _ in range(12)]
    desk.network.run_for(10)
    handles += [desk.send() for _ in range(3)]
    desk.core.close()
    assert all(isinstance(error_of(handle), ClosedError) for handle in handles)
    lines = [line for line in capsys.readouterr().err.splitlines() if "messages_given_up" in line]
    assert len(lines) == 1
    assert "messages=15" in lines[0]
    desk.instance.close()
    desk.network.run_for(1_000)
    assert desk.accumulator.buffered_bytes == 0


# --- everything at once ---------------------------------------------------------------------------------------------------


class Chaos:
    """Random traffic through random faults, from one seed. Checks what a producer promises, whatever happens."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cluster = FakeCluster("a", "b", seed=seed, queue_count=2)
        for broker in self.cluster.brokers.values():
            broker.add_topic("t")
        self.desk = Desk(self.cluster, "t", records_max=3, buffer_bytes=20_000)
        self.sent: list[tuple[bytes, Target, SendHandle]] = []
        self.ends: Counter[SendHandle] = Counter()
        self.number = 0

    def run(self, steps: int) -> None:
        faults: list[Callable[[StoringBroker], None]] = [self.fault_break, self.fault_crash, self.fault_refuse, self.fault_slow]
        for _ in range(steps):
            for _ in range(self.rng.randrange(8)):
                self.send()
            if self.rng.random() < 0.4:
                self.rng.choice(faults)(self.cluster[self.rng.choice("ab")])
            self.desk.network.run_for(self.rng.choice((0.1, 1, 20, 300, 1_500)))
            self.check_always()
        for broker in self.cluster.brokers.values():
            broker.refuse, broker.answer_after_ms, broker.loses_answers = (lambda request: None), 0, False
            if broker.loop is None:
                broker.start()
        self.desk.finish(*(handle for _, _, handle in self.sent))
        self.check_always()
        self.check_end()

    def send(self) -> None:
        targets: list[Target] = ["t", "t", A0, A1, B0]
        target = self.rng.choice(targets)
        body = b"%d" % self.number
        self.number += 1
        if self.desk.accumulator.buffered_bytes > 19_000:
            return
        handle = self.desk.send(body, target, timeout_ms=self.rng.choice((800, 3_000, 3_000, 12_000)))
        handle.add_done_callback(lambda done: self.ends.update([done]))
        self.sent.append((body, target, handle))

    def fault_break(self, broker: StoringBroker) -> None:
        self.desk.network.break_connections("producer", broker.name)

    def fault_crash(self, broker: StoringBroker) -> None:
        if broker.loop is None:
            broker.start()
        else:
            broker.crash()

    def fault_refuse(self, broker: StoringBroker) -> None:
        chance = self.rng.choice((0, 0, 0.3, 1))
        code = self.rng.choice((Code.DISK_FULL, Code.STOPPING, Code.STORE_FAILED, Code.INTERNAL_ERROR))
        broker.refuse = lambda request: (
            RequestRefusedError("trouble", code=code) if self.rng.random() < chance else None
        )

    def fault_slow(self, broker: StoringBroker) -> None:
        broker.answer_after_ms = self.rng.choice((0, 0, 5, 700))
        broker.loses_answers = self.rng.random() < 0.2

    def check_always(self) -> None:
        assert self.desk.accumulator.buffered_bytes <= 20_000
        for broker in self.cluster.brokers.values():
            broker.check_log()
            for log in broker.logs.values():
                self.check_order(log)

    def check_order(self, log: list[Any]) -> None:
        """Bound messages of one queue are in it in the order they were sent."""
        bound = [entry.header.first_sequence for entry in log if entry.header.first_sequence in self.bound_sequences()]
        assert bound == sorted(bound)

    def bound_sequences(self) -> set[int]:
        return {handle.batch.first_sequence for _, target, handle in self.sent if isinstance(target, MessageQueue)}

    def check_end(self) -> None:
        assert self.desk.accumulator.buffered_bytes == 0
        assert self.desk.accumulator.unfinished() == []
        assert set(self.ends.values()) <= {1}
        assert len(self.ends) == len(self.sent)
        for body, target, handle in self.sent:
            try:
                receipt = handle.result(0)
            except ZrmqError:
                continue
            if isinstance(target, MessageQueue):
                assert receipt.queue == target
            assert self.body_at(receipt.broker_name, receipt.queue_id, receipt.queue_offset) == body

    def body_at(self, name: str, queue_id: int, queue_offset: int) -> bytes:
        for entry in self.cluster[name].logs["t", queue_id]:
            if entry.base_offset <= queue_offset < entry.base_offset + len(entry.bodies):
                return entry.bodies[queue_offset - entry.base_offset]
        raise AssertionError(f"{name} has nothing at {queue_offset} of queue {queue_id}")


@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_promises_hold_through_any_faults(seed: int) -> None:
    Chaos(seed).run(steps=25)
