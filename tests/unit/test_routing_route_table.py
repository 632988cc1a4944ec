"""zrmq/routing/route_table.py: who is registered, who lives, and when two answers are the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrmq.errors import Code, InvalidArgumentError, RequestRefusedError, ZrmqError
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX, TOPICS_MAX
from zrmq.protocol.requests import BrokerInfo, RegisterBroker, TopicRoute
from zrmq.routing import route_table
from zrmq.routing.route_table import ALL_TOPICS, TICK_MS, RouteTable, version_of


def info(name: str = "a", epoch: int = 1, broker_id: int = 0, **changes: Any) -> BrokerInfo:
    role = "SLAVE" if broker_id else "MASTER"
    found = BrokerInfo("east", name, broker_id, role, epoch, f"tcp://{name}{broker_id}:10911", f"tcp://{name}{broker_id}:10912")
    return msgspec.structs.replace(found, **changes)


def topics(name: str, **queue_counts: int) -> list[TopicRoute]:
    return [TopicRoute(topic, name, count, 6) for topic, count in queue_counts.items()]


def register(table: RouteTable, broker: BrokerInfo, now_ms: float = 0.0, version: int = 1, **queue_counts: int) -> bool:
    listed = topics(broker.broker_name, **queue_counts) if queue_counts else None
    return table.register(RegisterBroker(1, 0, broker, version, listed), now_ms)


@pytest.fixture
def table() -> RouteTable:
    return RouteTable(0.0)


def run_to(table: RouteTable, start_ms: float, end_ms: float) -> None:
    """Tick as the NameServer does."""
    now_ms = start_ms
    while now_ms < end_ms:
        now_ms += TICK_MS
        table.expire(now_ms)


# --- registering ----------------------------------------------------------------------------------------------------


def test_a_registered_broker_and_its_topics_are_answered_sorted(table: RouteTable) -> None:
    assert not register(table, info("b"), meters=4, alarms=1)
    assert not register(table, info("a"), meters=2)
    found = table.answer(ALL_TOPICS)
    assert found.brokers == [info("a"), info("b")]
    assert found.topics == [*topics("b", alarms=1), *topics("a", meters=2), *topics("b", meters=4)]
    assert table.answer(("meters",)).topics == [*topics("a", meters=2), *topics("b", meters=4)]
    assert table.answer(("none",)).topics == []
    assert table.answer(("none",)).brokers == found.brokers


def test_a_heartbeat_without_a_table_asks_for_it_only_when_the_version_differs(table: RouteTable) -> None:
    assert register(table, info(), version=7)
    assert not register(table, info(), version=7, meters=4)
    assert not register(table, info(), version=7)
    assert register(table, info(), version=8)
    assert table.answer(ALL_TOPICS).topics == topics("a", meters=4), "the old table stays until the new one is here"
    assert not register(table, info(), version=8, meters=5)
    assert table.answer(ALL_TOPICS).topics == topics("a", meters=5)


def test_only_what_alters_an_answer_counts_as_a_change(table: RouteTable) -> None:
    register(table, info(), meters=4)
    before, version = table.changes, table.answer(ALL_TOPICS).version
    register(table, info(), now_ms=100.0)
    register(table, info(), now_ms=200.0, meters=4)
    register(table, info(suspect=True), now_ms=300.0)
    assert (table.changes, table.answer(ALL_TOPICS).version) == (before, version)
    register(table, info(), now_ms=400.0, version=2, meters=5)
    assert table.changes == before + 1
    assert table.answer(ALL_TOPICS).version != version


def test_a_greater_epoch_takes_the_place_and_its_table_is_asked_for(table: RouteTable) -> None:
    register(table, info(epoch=1), version=5, meters=4)
    assert register(table, info(epoch=2, address="tcp://elsewhere:1"), version=5)
    found = table.answer(ALL_TOPICS)
    assert [broker.address for broker in found.brokers] == ["tcp://elsewhere:1"]
    assert found.topics == topics("a", meters=4)
    assert not register(table, info(epoch=2, address="tcp://elsewhere:1"), version=5, meters=4)


def test_a_stale_epoch_is_refused_and_changes_nothing(table: RouteTable) -> None:
    register(table, info(epoch=3), meters=4)
    before = table.changes
    with pytest.raises(RequestRefusedError, match="registered with epoch 3") as caught:
        register(table, info(epoch=2, address="tcp://other:1"), now_ms=5.0, meters=9)
    assert caught.value.code is Code.FORBIDDEN
    assert caught.value.facts["epoch"] == 3
    assert table.changes == before
    assert table.answer(ALL_TOPICS).topics == topics("a", meters=4)


def test_a_live_broker_keeps_its_name_from_one_with_other_data(table: RouteTable) -> None:
    """Whatever the epochs, which count the starts of different folders."""
    register(table, info(epoch=3, store_id="one"), meters=4)
    changes = table.changes
    for epoch in (1, 3, 9):
        with pytest.raises(RequestRefusedError, match="with other data than the one at tcp://other:1") as caught:
            register(table, info(epoch=epoch, store_id="two", address="tcp://other:1"), meters=9)
        assert caught.value.code is Code.FORBIDDEN
    assert table.changes == changes
    assert register(table, info(epoch=4, store_id="one", address="tcp://other:1")), "the same data, started again elsewhere"


def test_a_silent_broker_s_name_may_go_to_a_new_folder(table: RouteTable) -> None:
    register(table, info(epoch=3, store_id="one"), version=5, meters=4)
    run_to(table, 0.0, 3_500.0)
    new = info(epoch=1, store_id="two")
    assert register(table, new, version=5, now_ms=3_600.0), "its table is asked for, whatever its version"
    register(table, new, version=5, now_ms=3_700.0, alarms=1)
    with pytest.raises(RequestRefusedError, match="with other data"):
        register(table, info(epoch=4, store_id="one", address="tcp://other:1"), now_ms=3_800.0)


def test_a_second_broker_of_the_same_name_and_epoch_is_refused(table: RouteTable) -> None:
    register(table, info(epoch=1))
    with pytest.raises(RequestRefusedError, match="give each broker a name of its own") as caught:
        register(table, info(epoch=1, address="tcp://other:1"))
    assert caught.value.code is Code.FORBIDDEN


def test_a_refused_heartbeat_is_no_sign_of_life(table: RouteTable) -> None:
    register(table, info(epoch=2))
    run_to(table, 0.0, 9_000.0)
    with pytest.raises(RequestRefusedError):
        register(table, info(epoch=1), now_ms=9_000.0)
    run_to(table, 9_000.0, 10_250.0)
    assert len(table) == 0
    assert register(table, info(epoch=1), now_ms=10_300.0), "the place is free once its holder is gone"


def test_slaves_are_listed_but_only_masters_have_queues(table: RouteTable) -> None:
    register(table, info("a"), meters=4)
    register(table, info("a", broker_id=1), meters=4)
    found = table.answer(ALL_TOPICS)
    assert [broker.broker_id for broker in found.brokers] == [0, 1]
    assert found.topics == topics("a", meters=4)
    table.unregister("a", 0, 1)
    assert table.answer(ALL_TOPICS).topics == []


# --- leaving --------------------------------------------------------------------------------------------------------


def test_unregistering_takes_effect_at_once(table: RouteTable) -> None:
    register(table, info("a"), meters=4)
    register(table, info("b"), meters=4)
    assert table.unregister("a", 0, 1)
    assert table.answer(ALL_TOPICS).brokers == [info("b")]
    assert table.answer(ALL_TOPICS).topics == topics("b", meters=4)
    assert not table.unregister("a", 0, 1), "a second time there is nothing to do"


def test_a_former_life_cannot_unregister_the_present_one(table: RouteTable) -> None:
    register(table, info(epoch=2))
    with pytest.raises(RequestRefusedError) as caught:
        table.unregister("a", 0, 1)
    assert caught.value.code is Code.FORBIDDEN
    assert len(table) == 1
    assert table.unregister("a", 0, 3)


def test_a_displaced_broker_cannot_unregister_the_one_in_its_place(table: RouteTable) -> None:
    """Its epoch counts the starts of another folder, and may be the greater one."""
    register(table, info(epoch=7, store_id="one"))
    run_to(table, 0.0, 3_500.0)
    register(table, info(epoch=1, store_id="two"), now_ms=3_600.0)
    changes = table.changes
    for epoch in (0, 1, 7):
        assert not table.unregister("a", 0, epoch, "one")
    assert (len(table), table.changes) == (1, changes)
    assert table.unregister("a", 0, 1, "two")


def test_a_broker_that_does_not_say_its_data_leaves_by_its_epoch(table: RouteTable) -> None:
    register(table, info(epoch=2, store_id="one"))
    with pytest.raises(RequestRefusedError):
        table.unregister("a", 0, 1)
    assert table.unregister("a", 0, 2)


def test_silence_makes_suspect_then_gone(table: RouteTable) -> None:
    register(table, info(), meters=4)
    run_to(table, 0.0, 2_750.0)
    assert not table.answer(ALL_TOPICS).brokers[0].suspect
    assert table.expire(3_000.0) == ([info(suspect=True)], [])
    assert table.answer(ALL_TOPICS).brokers[0].suspect
    assert table.answer(ALL_TOPICS).topics == topics("a", meters=4)
    run_to(table, 3_000.0, 9_750.0)
    assert table.expire(10_000.0) == ([], [info(suspect=True)])
    assert table.answer(ALL_TOPICS).brokers == []
    assert table.answer(ALL_TOPICS).topics == []


def test_a_heartbeat_ends_suspicion(table: RouteTable) -> None:
    register(table, info(), meters=4)
    version = table.answer(ALL_TOPICS).version
    run_to(table, 0.0, 3_000.0)
    assert table.answer(ALL_TOPICS).version != version
    register(table, info(), now_ms=3_100.0)
    assert table.answer(ALL_TOPICS).version == version


def test_a_pause_of_the_nameserver_is_not_the_brokers_silence(table: RouteTable) -> None:
    register(table, info(), now_ms=0.0)
    run_to(table, 0.0, 1_000.0)
    assert table.expire(61_000.0) == ([], []), "a minute in which nothing was read"
    run_to(table, 61_000.0, 62_500.0)
    assert not table.answer(ALL_TOPICS).brokers[0].suspect
    run_to(table, 62_500.0, 69_500.0)
    assert len(table) == 1
    run_to(table, 69_500.0, 70_000.0)
    assert len(table) == 0, "from then on silence counts again"


# --- versions -------------------------------------------------------------------------------------------------------


def test_versions_mean_the_same_at_every_nameserver() -> None:
    one, other = RouteTable(0.0), RouteTable(500.0)
    register(one, info("a"), meters=4)
    register(one, info("b"), now_ms=3.0, meters=1, alarms=2)
    register(other, info("b"), now_ms=777.0, version=9, alarms=2, meters=1)
    register(other, info("a", epoch=1), now_ms=778.0, meters=9)
    assert one.answer(("meters",)).version != other.answer(("meters",)).version
    register(other, info("a"), now_ms=779.0, version=2, meters=4)
    for asked in (ALL_TOPICS, ("meters",), ("alarms", "meters"), ("none",), ()):
        assert one.answer(asked) == other.answer(asked)


def test_a_version_depends_on_the_topics_asked_for_only(table: RouteTable) -> None:
    register(table, info(), meters=4)
    version = table.answer(("meters",)).version
    register(table, info(), version=2, meters=4, alarms=1)
    assert table.answer(("meters",)).version == version


@given(st.lists(st.builds(info, st.sampled_from("abc"), st.integers(0, 2)), max_size=3))
def test_a_version_is_63_bits_and_never_zero(brokers: list[BrokerInfo]) -> None:
    assert 0 < version_of(brokers, []) < 1 << 63


def test_answers_are_kept_until_something_changes(table: RouteTable) -> None:
    register(table, info(), meters=4)
    first = table.answer(("meters",))
    assert table.answer(("meters",)) is first
    register(table, info("b"), meters=4)
    assert table.answer(("meters",)) is not first


def test_kept_answers_are_bounded(table: RouteTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_table, "ANSWERS_KEPT_MAX", 3)
    for number in range(20):
        table.answer((f"t{number}",))
        assert len(table._answers) <= 3
    long = tuple(f"t{number:03}" for number in range(route_table.ANSWER_TOPICS_KEPT_MAX + 1))
    kept = dict(table._answers)
    table.answer(long)
    assert long not in table._answers
    assert len(kept) <= 3


def test_a_topic_is_known_when_a_live_master_has_it(table: RouteTable) -> None:
    assert not table.knows(ALL_TOPICS)
    assert table.knows(())
    register(table, info("a", broker_id=1), meters=4)
    assert not table.knows(("meters",))
    register(table, info("a"), meters=4)
    register(table, info("b"), alarms=4)
    assert table.knows(("alarms", "meters"))
    assert not table.knows(("alarms", "none"))
    assert table.knows(ALL_TOPICS)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broker",
    [
        info("a b"), info(""), info("x" * 121), info(cluster=""), info(cluster="a/b"), info(broker_id=-1),
        info(broker_id=1024), info(role="LEADER"), info(epoch=-1), info(address=""), info(address="tcp://a:0"),
        info(address="somewhere"), info(address="tcp://" + "a" * 300 + ":1"), info(ingest_address="tcp://a"),
    ],
)
def test_a_broker_that_cannot_be_is_refused(table: RouteTable, broker: BrokerInfo) -> None:
    with pytest.raises(InvalidArgumentError):
        table.register(RegisterBroker(1, 0, broker, 1, []), 0.0)
    assert len(table) == 0
    assert table.changes == 0


@pytest.mark.parametrize(
    "listed",
    [
        topics("b", meters=4), topics("a", meters=0), topics("a", meters=QUEUES_PER_TOPIC_MAX + 1),
        [TopicRoute("meters", "a", 4, 8)], [TopicRoute("meters", "a", 4, -1)], [TopicRoute("me ters", "a", 4, 6)],
        [*topics("a", meters=4), *topics("a", meters=5)],
        [TopicRoute(f"t{number}", "a", 1, 6) for number in range(TOPICS_MAX + 1)],
    ],
)
def test_topics_that_cannot_be_are_refused_and_the_broker_lives_with_the_former(
    table: RouteTable, listed: list[TopicRoute]
) -> None:
    with pytest.raises(InvalidArgumentError):
        table.register(RegisterBroker(1, 0, info("a"), 1, listed), 0.0)
    assert len(table) == 0
    register(table, info("a"), meters=4)
    for second in range(12):
        run_to(table, second * 1_000.0, second * 1_000.0 + 1_000.0)
        with pytest.raises(InvalidArgumentError):
            table.register(RegisterBroker(1, 0, info("a"), 2, listed), second * 1_000.0 + 1_000.0)
    found = table.answer(ALL_TOPICS)
    assert (found.brokers, found.topics) == ([info("a")], topics("a", meters=4))


def test_a_broker_without_an_ingest_port_or_topics_is_fine(table: RouteTable) -> None:
    assert not table.register(RegisterBroker(1, 0, info(ingest_address=""), 1, []), 0.0)


def test_brokers_are_bounded(table: RouteTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_table, "BROKERS_MAX", 2)
    register(table, info("a"))
    register(table, info("b"))
    with pytest.raises(RequestRefusedError) as caught:
        register(table, info("c"))
    assert caught.value.code is Code.TOO_MANY_REQUESTS
    register(table, info("b"), now_ms=1.0)
    table.unregister("a", 0, 1)
    register(table, info("c"))


def test_topics_of_all_brokers_together_are_bounded(table: RouteTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_table, "TOPIC_ROUTES_MAX", 3)
    register(table, info("a"), t1=1, t2=1)
    with pytest.raises(RequestRefusedError) as caught:
        register(table, info("b"), t1=1, t2=1)
    assert caught.value.code is Code.TOO_MANY_REQUESTS
    assert table.answer(ALL_TOPICS).topics == [*topics("a", t1=1), *topics("b", t1=1), *topics("a", t2=1)]
    register(table, info("a"), version=2, t1=1)
    register(table, info("b"), t1=1, t2=1)
    table.unregister("b", 0, 1)
    register(table, info("a"), version=3, t1=1, t2=1, t3=1)


def test_one_topic_too_many_costs_a_broker_that_one_only(table: RouteTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_table, "TOPIC_ROUTES_MAX", 3)
    register(table, info("a"), t1=1)
    register(table, info("b"), t2=1, t3=1)
    for second in range(1, 13):
        run_to(table, second * 1_000.0 - 1_000.0, second * 1_000.0)
        register(table, info("a"), now_ms=second * 1_000.0)
        with pytest.raises(RequestRefusedError, match="1 of broker b have no route"):
            register(table, info("b", epoch=second), second * 1_000.0, 2, t0=1, t2=5, t3=1)
    found = table.answer(ALL_TOPICS)
    assert found.topics == [*topics("a", t1=1), *topics("b", t2=5, t3=1)], "those that had a route have it still, as they are now"
    assert found.brokers == [info("a"), info("b", epoch=12)]
    table.unregister("a", 0, 1)
    assert not register(table, info("b", epoch=12), version=2, t0=1, t2=5, t3=1)
    assert len(table.answer(ALL_TOPICS).topics) == 3


# --- any sequence ---------------------------------------------------------------------------------------------------

names, epochs = st.sampled_from("ab"), st.integers(0, 2)
tables_of_topics = st.none() | st.dictionaries(st.sampled_from(["x", "y"]), st.integers(1, 3), min_size=0)
steps = st.one_of(
    st.tuples(st.just("register"), names, epochs, st.integers(1, 2), tables_of_topics),
    st.tuples(st.just("unregister"), names, epochs),
    st.tuples(st.just("wait"), st.sampled_from([250.0, 3_000.0, 10_000.0])),
)


@given(st.lists(steps, max_size=30))
@settings(max_examples=200)
def test_whatever_happens_epochs_never_go_back_and_kept_answers_are_true(sequence: list[tuple[Any, ...]]) -> None:
    table, now_ms = RouteTable(0.0), 0.0
    for step in sequence:
        before = {(broker.broker_name): broker.epoch for broker in table.answer(ALL_TOPICS).brokers}
        changes, kept = table.changes, table.answer(ALL_TOPICS)
        try:
            if step[0] == "register":
                _, name, epoch, version, listed = step
                found = None if listed is None else topics(name, **listed)
                table.register(RegisterBroker(1, 0, info(name, epoch), version, found), now_ms)
            elif step[0] == "unregister":
                table.unregister(step[1], 0, step[2])
            else:
                run_to(table, now_ms, now_ms + step[1])
                now_ms += step[1]
        except ZrmqError:
            assert table.changes == changes, "a refusal changes nothing"
        fresh = table._make_answer(ALL_TOPICS)
        assert table.answer(ALL_TOPICS) == fresh
        assert (table.changes == changes) or (fresh != kept) or step[0] == "wait"
        if table.changes == changes:
            assert fresh == kept
        after = {broker.broker_name: broker.epoch for broker in fresh.brokers}
        assert all(after[name] >= epoch for name, epoch in before.items() if name in after)
        assert table._topic_route_count == sum(len(known.topics) for known in table._registrations.values())
