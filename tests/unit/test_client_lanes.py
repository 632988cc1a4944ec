"""One message at a time in the caller's thread, and how it goes on through the core when its lane fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.unit.fake_cluster import FakeCluster, StoringBroker
from tests.unit.test_client_producing import A0, B0, Desk
from zrmq.client import lanes as lanes_module
from zrmq.client.batch import Extras
from zrmq.client.lanes import Lanes
from zrmq.errors import (
    Code,
    DiskFullError,
    InvalidArgumentError,
    PayloadTooLargeError,
    RequestRefusedError,
    RequestTimeoutError,
    StoppingError,
    UnreachableError,
    ZrmqError,
    refused,
)
from zrmq.message import MessageQueue, SendReceipt
from zrmq.protocol.requests import Done, Request

LANE_PRODUCER_ID = 99


class BrokerLane:
    """A lane that calls the fake broker's store as a function; `fail` may answer in its place, before or after."""

    def __init__(self, broker: StoringBroker) -> None:
        self.broker = broker
        self.is_closed = False
        self.was_resent = False
        self.before: ZrmqError | None = None
        self.after: ZrmqError | None = None
        self.requests = 0

    def request(
        self, kind: type[Request], *fields: object, payload: Sequence[Any] = (), timeout_ms: int
    ) -> tuple[Any, list[bytes]]:
        self.requests += 1
        if self.before is not None:
            raise self.before
        try:
            reply = self.broker._store(kind(1, timeout_ms, *fields), payload[0])  # type: ignore[arg-type]
        except ZrmqError as error:
            raise refused(error.code, error.message, error.facts) from error
        if self.after is not None:
            raise self.after
        return reply, []

    def close(self) -> None:
        self.is_closed = True


class LaneDesk(Desk):
    """A core with lanes. What a caller's thread waits for is run by a second thread, which turns the network meanwhile."""

    def __init__(self, cluster: FakeCluster, *topics: str, **config: Any) -> None:
        super().__init__(cluster, *topics, **config)
        self.opened: dict[str, BrokerLane] = {}
        self.lanes = Lanes(
            self.core, self.accumulator, LANE_PRODUCER_ID, open_lane=self.open_lane,
            post=self.post, new_lock=threading.Lock, new_owned_lock=threading.RLock,  # type: ignore[arg-type]
        )
        self.posted: list[Callable[[], None]] = []

    def open_lane(self, address: str) -> BrokerLane:
        (broker,) = [broker for broker in self.cluster.brokers.values() if broker.address == address]
        return self.opened.setdefault(broker.name, BrokerLane(broker))

    def post(self, call: Callable[[], None]) -> None:
        self.posted.append(call)

    def send_now(self, target: str | MessageQueue = "t", body: bytes = b"x", timeout_ms: int = 3_000) -> SendReceipt | None:
        return self.lanes.send(target, body, len(body) + 64, None, timeout_ms)

    def send_and_turn(self, target: str | MessageQueue = "t", body: bytes = b"x", timeout_ms: int = 8_000) -> SendReceipt:
        """For a send that is handed over: the network runs here while the send waits in a thread."""
        results: list[SendReceipt | BaseException | None] = []

        def run() -> None:
            try:
                results.append(self.send_now(target, body, timeout_ms))
            except ZrmqError as error:
                results.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: bool(results or self.posted))
        while self.posted:
            self.posted.pop()()
        wait_until(lambda: bool(results) or any(batch.waiters for batch in self.accumulator.unfinished()))
        self.network.run_until(lambda: not self.accumulator.unfinished())
        thread.join(30)
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        assert result is not None
        return result


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)


def one(**config: Any) -> LaneDesk:
    desk = LaneDesk(FakeCluster("a", queue_count=2), "t", **config)
    desk.send_now()  # opens the lane
    return desk


def two(**config: Any) -> LaneDesk:
    cluster = FakeCluster("a", "b", queue_count=1)
    for broker in cluster.brokers.values():
        broker.add_topic("t")
    desk = LaneDesk(cluster, "t", **config)
    desk.send_now()
    desk.send_now()
    return desk


def test_a_receipt_comes_back_in_the_same_call() -> None:
    desk = one()
    receipt = desk.send_now(A0, b"body")
    assert receipt is not None
    assert (receipt.queue, receipt.topic, receipt.duplicate) == (A0, "t", False)
    assert receipt.message_id == f"{LANE_PRODUCER_ID:016X}{2:016X}"
    assert desk.cluster["a"].logs["t", 0][receipt.queue_offset].bodies == [b"body"]
    assert desk.accumulator.buffered_bytes == 0


def test_extras_travel_too() -> None:
    desk = one()
    desk.lanes.send(A0, b"x", 70, Extras("tag", ("k",), {"a": "b"}, "g"), 3_000)
    header = desk.cluster["a"].logs["t", 0][-1].header
    assert (header.flags, header.record_count) == (15, 1)


def test_free_messages_take_turns() -> None:
    desk = two()
    receipts = [desk.send_now() for _ in range(4)]
    assert {receipt.broker_name for receipt in receipts if receipt} == {"a", "b"}


def test_sequences_are_shared_by_all_lanes() -> None:
    desk = two()
    ids = [receipt.message_id for receipt in (desk.send_now() for _ in range(6)) if receipt]
    assert len(set(ids)) == 6


def test_a_lane_in_use_is_not_waited_for() -> None:
    desk = one()
    desk.lanes._slots["a"].lock.acquire()
    assert desk.send_now() is None
    desk.lanes._slots["a"].lock.release()
    assert desk.send_now() is not None


def test_another_brokers_lane_is_taken_instead() -> None:
    desk = two()
    desk.lanes._slots["a"].lock.acquire()
    receipts = [desk.send_now(), desk.send_now()]
    assert {receipt.broker_name for receipt in receipts if receipt} == {"b"}
    assert desk.send_now(A0) is None


def test_a_broker_without_a_session_has_no_lane() -> None:
    desk = two()
    desk.cluster["a"].crash()
    desk.network.run_until(lambda: desk.core.reachable == {"b"})
    assert desk.send_now(A0) is None
    assert desk.send_now("t") is not None


def test_the_batchs_own_fault_is_raised() -> None:
    desk = one()
    desk.opened["a"].before = PayloadTooLargeError("Too large.")
    with pytest.raises(PayloadTooLargeError):
        desk.send_now()
    desk.opened["a"].before = None
    assert desk.send_now() is not None  # the lane is free again


def test_a_strange_answer_is_an_error() -> None:
    desk = one()
    desk.opened["a"].request = lambda *a, **k: (Done(1), [])  # type: ignore[method-assign]
    with pytest.raises(ZrmqError, match="Done"):
        desk.send_now()


def test_trouble_moves_the_same_message_to_another_broker() -> None:
    desk = two()
    for name in ("a", "b"):
        desk.opened[name].before = DiskFullError("full")
    receipt = desk.send_and_turn(body=b"moved")
    other = receipt.broker_name
    assert receipt.message_id.startswith(f"{LANE_PRODUCER_ID:016X}")
    assert b"moved" in desk.cluster[other].bodies
    assert desk.core.faults.is_avoided({"a": "b", "b": "a"}[other], desk.network.now_ms)


def test_trouble_without_another_broker_is_tried_again_in_place() -> None:
    desk = one()
    desk.opened["a"].before = DiskFullError("full")
    started_ms = desk.network.now_ms
    receipt = desk.send_and_turn()
    assert receipt.broker_name == "a"
    assert desk.network.now_ms - started_ms >= 100


def test_trouble_without_retries_is_raised() -> None:
    desk = one(retries=0)
    desk.opened["a"].before = DiskFullError("full")
    with pytest.raises(DiskFullError):
        desk.send_and_turn()


def test_a_refusal_of_what_the_lane_has_sent_twice_leaves_the_first_time_open() -> None:
    desk = one(retries=0)
    for error in (StoppingError("stopping"), RequestRefusedError("Another release.", code=Code.VERSION_UNSUPPORTED)):
        desk.opened["a"].before, desk.opened["a"].was_resent = error, True
        with pytest.raises(RequestTimeoutError, match="unknown whether"):
            desk.send_and_turn()
        desk.opened["a"].was_resent = False
        with pytest.raises(RequestRefusedError, match=error.message):
            desk.send_and_turn()


def test_an_unanswered_message_is_recognised_by_its_queue() -> None:
    desk = one()
    desk.opened["a"].after = RequestTimeoutError("no answer")
    receipt = desk.send_and_turn(A0, b"once")
    assert receipt.duplicate
    assert desk.cluster["a"].bodies.count(b"once") == 1


def test_an_unanswered_free_message_goes_elsewhere_with_its_id() -> None:
    desk = two()
    for name in ("a", "b"):
        desk.opened[name].after = RequestTimeoutError("no answer")
    receipt = desk.send_and_turn(body=b"twice at most")
    stored = [broker.name for broker in desk.cluster.brokers.values() if b"twice at most" in broker.bodies]
    assert sorted(stored) == ["a", "b"]
    ids = {
        entry.header.first_sequence
        for broker in desk.cluster.brokers.values() for entry in broker.logs["t", 0] if entry.bodies == [b"twice at most"]
    }
    assert len(ids) == 1
    assert not receipt.duplicate


def test_a_bound_message_that_nobody_took_waits_for_its_broker() -> None:
    desk = two()
    desk.opened["b"].before = UnreachableError("down")
    receipt = desk.send_and_turn(B0, b"bound")
    assert (receipt.broker_name, receipt.duplicate) == ("b", False)


def test_a_short_timeout_is_over_when_the_lane_gives_up() -> None:
    desk = one()
    desk.opened["a"].after = RequestTimeoutError("no answer")
    with pytest.raises(RequestTimeoutError):
        desk.send_now(timeout_ms=500)


def test_what_follows_a_bound_message_that_was_given_up_does_not_overtake_it() -> None:
    """It may lie in the lane's connection, and those that follow take another one: so it is sent there too."""
    desk = one()
    desk.opened["a"].before = RequestTimeoutError("on its way")
    with pytest.raises(RequestTimeoutError, match="on its way"):
        desk.send_now(A0, b"first", timeout_ms=500)
    desk.opened["a"].before = None
    assert desk.send_now(A0, b"second") is None, "no lane is free for it"
    (adopt,) = desk.posted
    adopt()
    assert not desk.accumulator.is_idle("t")
    desk.finish(desk.send(b"second", A0))
    assert [entry.bodies for entry in desk.cluster["a"].logs["t", 0]][-2:] == [[b"first"], [b"second"]]
    assert desk.accumulator.is_idle("t")


def test_a_broker_that_moved_gets_a_new_lane() -> None:
    desk = one()
    old = desk.opened.pop("a")
    assert desk.core.route is not None
    desk.lanes._slots["a"].address = "tcp://127.0.0.1:1"
    assert desk.send_now() is not None
    assert old.is_closed
    assert desk.opened["a"] is not old


def test_lanes_of_brokers_that_left_are_closed_when_the_next_one_is_opened() -> None:
    desk = two()
    left = desk.opened.pop("a")
    desk.cluster["a"].registration.close()
    desk.cluster["a"].crash()
    desk.network.run_until(lambda: desk.core.route is not None and "a" not in desk.core.route.brokers)
    desk.lanes._slots["b"].address = "tcp://127.0.0.1:1"
    assert desk.send_now() is not None
    assert left.is_closed
    assert set(desk.lanes._slots) == {"b"}


def test_a_lane_of_a_broker_that_left_is_kept_while_it_is_used() -> None:
    desk = two()
    left, slot = desk.opened["a"], desk.lanes._slots["a"]
    desk.cluster["a"].registration.close()
    desk.network.run_until(lambda: desk.core.route is not None and "a" not in desk.core.route.brokers)
    desk.lanes._slots["b"].address = "tcp://127.0.0.1:1"
    slot.is_handing_over = True
    assert desk.send_now() is not None
    assert (left.is_closed, desk.lanes._slots["a"]) == (False, slot)


def test_without_a_socket_there_is_no_lane() -> None:
    desk = LaneDesk(FakeCluster("a", queue_count=2), "t")

    def open_lane(address: str) -> BrokerLane:
        raise UnreachableError("Too many open files.")

    desk.lanes._open_lane = open_lane
    assert desk.send_now() is None
    desk.lanes._open_lane = desk.open_lane
    assert desk.send_now() is not None


def test_a_send_in_the_middle_of_opening_a_lane_does_without_one() -> None:
    """A signal handler or finalizer of the thread that opens it would wait for its own lock."""
    desk = LaneDesk(FakeCluster("a", queue_count=2), "t")
    within: list[object] = []

    def open_lane(address: str) -> BrokerLane:
        within.append(desk.send_now())
        with pytest.raises(InvalidArgumentError, match="signal handler"):
            desk.lanes.close()
        return desk.open_lane(address)

    desk.lanes._open_lane = open_lane
    assert desk.send_now() is not None
    assert within == [None]


def test_closed_lanes_send_nothing_more() -> None:
    desk = two()
    desk.lanes.close()
    assert all(lane.is_closed for lane in desk.opened.values())
    assert desk.send_now() is None


def test_closing_waits_for_a_lane_in_use() -> None:
    desk = one()
    slot = desk.lanes._slots["a"]
    slot.lock.acquire()
    thread = threading.Thread(target=desk.lanes.close)
    thread.start()
    wait_until(lambda: desk.lanes._is_closed)
    assert not desk.opened["a"].is_closed
    slot.lock.release()
    thread.join(30)
    assert desk.opened["a"].is_closed


def test_an_exception_in_the_middle_leaves_the_lane_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the message is encoded: a lane that stays taken is lost, and closing would wait for it for ever."""
    desk = one()

    def encode(*given: object, **named: object) -> bytes:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes_module, "encode_batch", encode)
    with pytest.raises(KeyboardInterrupt):
        desk.send_now()
    assert desk.send_now() is not None


class TakenLock:
    """A lock that somebody has taken and will never give back."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        assert timeout > 0, "it would wait for ever"
        self.waited_s.append(timeout)
        return False


def test_closing_does_not_wait_for_ever_for_a_lane_in_use() -> None:
    desk = two()
    lock = desk.lanes._slots["a"].lock = TakenLock()  # type: ignore[assignment]
    desk.lanes.close()
    assert lock.waited_s == [2.5]
    assert (desk.opened["a"].is_closed, desk.opened["b"].is_closed) == (False, True), "its user may still be there"


def test_an_exception_while_a_message_is_handed_over_leaves_nothing_that_never_ends() -> None:
    desk = one()
    desk.opened["a"].after = RequestTimeoutError("no answer")

    def post(call: Callable[[], None]) -> None:
        raise KeyboardInterrupt

    desk.lanes._post = post
    with pytest.raises(KeyboardInterrupt):
        desk.send_now(timeout_ms=8_000)
    assert desk.accumulator.unfinished() == []
    assert desk.accumulator.buffered_bytes == 0
    desk.opened["a"].after = None
    assert desk.send_now() is not None, "its lane is free"


def test_nothing_passes_a_message_that_is_being_handed_over() -> None:
    """Its queue remembers the last 32 of the lanes; were it passed by so many, it would be stored again."""
    desk = one()
    desk.opened["a"].after = RequestTimeoutError("no answer")
    receipts: list[SendReceipt | None] = []
    thread = threading.Thread(target=lambda: receipts.append(desk.send_now(A0, b"once", 8_000)))
    thread.start()
    wait_until(lambda: bool(desk.posted))  # the loop's thread is in somebody's callback
    desk.opened["a"].after = None
    assert desk.send_now(A0) is None
    desk.posted.pop()()
    desk.network.run_until(lambda: not desk.accumulator.unfinished())
    thread.join(30)
    assert receipts[0] is not None
    assert receipts[0].duplicate
    assert desk.send_now(A0) is not None


def test_a_handed_over_message_ends_when_the_core_is_closed() -> None:
    desk = one()
    desk.opened["a"].after = RequestTimeoutError("no answer")
    desk.core.close()
    with pytest.raises(ZrmqError, match="closed"):
        desk.send_and_turn()


def test_a_topic_deleted_under_a_lane_is_created_again() -> None:
    desk = one()
    desk.cluster["a"].delete_topics()
    assert desk.send_and_turn(body=b"after").topic == "t"
    assert desk.cluster["a"].bodies == [b"after"]
