"""zrmq/client/allocation.py: disjoint and complete shares, few moves, and strategies of users that go wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zrmq.client.allocation import (
    AllocateAveragely,
    AllocateByCircle,
    AllocateByConfig,
    AllocateConsistentHash,
    AllocateMachineRoomNearby,
    Strategy,
    allocate,
)
from zrmq.errors import InvalidArgumentError
from zrmq.message import MessageQueue


def room(name: str) -> str:
    """The first letter of a broker's or client's name."""
    return name[0]


STRATEGIES = [
    AllocateAveragely(), AllocateByCircle(), AllocateConsistentHash(), AllocateConsistentHash(points=1),
    AllocateMachineRoomNearby(AllocateAveragely(), room, room),
    AllocateMachineRoomNearby(AllocateByCircle(), room, room),
    AllocateMachineRoomNearby(AllocateConsistentHash(), room, room),
]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)

names = st.text("abc12", min_size=1, max_size=4)
queue_sets = st.sets(st.builds(MessageQueue, st.just("meters"), names, st.integers(0, 15)), max_size=40)
member_sets = st.sets(names, min_size=1, max_size=12)


def shares(
    strategy: Strategy, queues: Iterable[MessageQueue], members: Iterable[str]
) -> dict[str, list[MessageQueue]]:
    members = list(members)
    return {member: allocate(strategy, "g", member, queues, members) for member in members}


def queues_of(*broker_names: str, count: int = 4) -> list[MessageQueue]:
    return [MessageQueue("meters", name, queue_id) for name in broker_names for queue_id in range(count)]


# --- what holds for all ---------------------------------------------------------------------------------------------


@each_strategy
@given(queues=queue_sets, members=member_sets)
def test_shares_are_disjoint_and_complete(strategy: Strategy, queues: set[MessageQueue], members: set[str]) -> None:
    taken = [queue for share in shares(strategy, queues, members).values() for queue in share]
    assert sorted(taken) == sorted(queues)


@each_strategy
@given(queues=queue_sets, members=member_sets, seed=st.integers(0, 2**32))
def test_the_order_of_the_input_does_not_matter(
    strategy: Strategy, queues: set[MessageQueue], members: set[str], seed: int
) -> None:
    shuffled_queues, shuffled_members = sorted(queues), sorted(members)
    Random(seed).shuffle(shuffled_queues)
    Random(seed).shuffle(shuffled_members)
    assert shares(strategy, shuffled_queues, shuffled_members) == shares(strategy, sorted(queues), sorted(members))


@each_strategy
def test_a_client_that_is_no_member_gets_nothing(strategy: Strategy) -> None:
    assert allocate(strategy, "g", "stranger", queues_of("a"), ["m1", "m2"]) == []
    assert allocate(strategy, "g", "m1", queues_of("a"), []) == []
    assert allocate(strategy, "g", "m1", [], ["m1"]) == []


# --- averagely and by circle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [AllocateAveragely(), AllocateByCircle()])
@given(queues=queue_sets, members=member_sets)
def test_even_shares_differ_by_one_at_most(strategy: Strategy, queues: set[MessageQueue], members: set[str]) -> None:
    sizes = [len(share) for share in shares(strategy, queues, members).values()]
    assert max(sizes) - min(sizes) <= 1


def test_averagely_gives_neighbours() -> None:
    found = shares(AllocateAveragely(), queues_of("a", "b"), ["m1", "m2", "m3"])
    assert found == {
        "m1": queues_of("a")[:3],
        "m2": [*queues_of("a")[3:], *queues_of("b")[:2]],
        "m3": queues_of("b")[2:],
    }


def test_circle_deals_queues_like_cards() -> None:
    found = shares(AllocateByCircle(), queues_of("a", "b"), ["m1", "m2", "m3"])
    assert [(queue.broker_name, queue.queue_id) for queue in found["m1"]] == [("a", 0), ("a", 3), ("b", 2)]
    assert [(queue.broker_name, queue.queue_id) for queue in found["m3"]] == [("a", 2), ("b", 1)]


def test_members_beyond_the_queues_get_none() -> None:
    found = shares(AllocateAveragely(), queues_of("a", count=2), ["m1", "m2", "m3"])
    assert [len(found[member]) for member in ("m1", "m2", "m3")] == [1, 1, 0]


# --- consistent hash ------------------------------------------------------------------------------------------------


@given(queues=queue_sets, members=member_sets, newcomer=names)
def test_when_a_member_joins_queues_move_only_to_it(queues: set[MessageQueue], members: set[str], newcomer: str) -> None:
    assume(newcomer not in members)
    before = shares(AllocateConsistentHash(), queues, members)
    after = shares(AllocateConsistentHash(), queues, members | {newcomer})
    for member in members:
        assert set(after[member]) <= set(before[member])


@given(queues=queue_sets, members=member_sets)
def test_when_a_member_leaves_only_its_queues_move(queues: set[MessageQueue], members: set[str]) -> None:
    assume(len(members) > 1)
    before = shares(AllocateConsistentHash(), queues, members)
    after = shares(AllocateConsistentHash(), queues, sorted(members)[1:])
    for member in sorted(members)[1:]:
        assert set(after[member]) >= set(before[member])


def test_a_join_moves_about_one_share() -> None:
    queues, members = queues_of("a", "b", "c", "d", count=64), [f"m{number}" for number in range(7)]
    before = shares(AllocateConsistentHash(100), queues, members)
    after = shares(AllocateConsistentHash(100), queues, [*members, "m7"])
    moved = len(queues) - sum(len(set(before[member]) & set(after[member])) for member in members)
    assert moved == len(after["m7"])
    assert 0 < moved < 2 * len(queues) / 8


def test_hashes_are_the_same_in_every_process() -> None:
    found = shares(AllocateConsistentHash(), queues_of("a", "b"), ["m1", "m2", "m3"])
    assert {member: [(q.broker_name, q.queue_id) for q in share] for member, share in found.items()} == GOLDEN


GOLDEN = {
    "m1": [("a", 1), ("b", 0), ("b", 3)],
    "m2": [("a", 0), ("a", 2), ("a", 3), ("b", 1), ("b", 2)],
    "m3": [],
}


@pytest.mark.parametrize("points", [0, -1, 1_001, "10"])
def test_the_number_of_points_is_bounded(points: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="give a whole number from 1 to 1000"):
        AllocateConsistentHash(points)


# --- by config, nearby ----------------------------------------------------------------------------------------------


A_QUEUE = MessageQueue("meters", "a", 0)


@pytest.mark.parametrize("queues", [5, "meters", A_QUEUE, [A_QUEUE, ("meters", "a", 1)], [[A_QUEUE]]])
def test_by_config_takes_queues_only(queues: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is no (list of )?message queue"):
        AllocateByConfig(queues)


def test_by_config_takes_what_is_named_and_exists() -> None:
    named = [MessageQueue("meters", "a", 1), MessageQueue("meters", "gone", 0), MessageQueue("other", "a", 0)]
    strategy = AllocateByConfig(named)
    assert allocate(strategy, "g", "m1", queues_of("a"), ["m1", "m2"]) == [MessageQueue("meters", "a", 1)]


def test_nearby_keeps_queues_in_their_room() -> None:
    strategy = AllocateMachineRoomNearby(AllocateAveragely(), room, room)
    found = shares(strategy, queues_of("e1", "w1"), ["e-1", "e-2", "w-1"])
    assert {queue.broker_name for queue in found["e-1"] + found["e-2"]} == {"e1"}
    assert found["w-1"] == queues_of("w1")


def test_queues_of_an_empty_room_are_shared_by_all() -> None:
    strategy = AllocateMachineRoomNearby(AllocateAveragely(), room, room)
    found = shares(strategy, queues_of("e1", "n1", count=3), ["e-1", "w-1", "w-2"])
    assert found["e-1"] == [*queues_of("e1", count=3), MessageQueue("meters", "n1", 0)]
    assert [len(found["w-1"]), len(found["w-2"])] == [1, 1]


# --- strategies of users --------------------------------------------------------------------------------------------


def test_any_callable_can_be_a_strategy() -> None:
    seen: list[tuple[Any, ...]] = []

    def mine(group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]) -> list[MessageQueue]:
        seen.append((group, client_id, list(queues), list(members)))
        return [queues[1], queues[0], queues[0]]

    queues = queues_of("a", count=3)
    assert allocate(mine, "g", "m1", reversed(queues), ["m2", "m1", "m2"]) == queues[:2]
    assert seen == [("g", "m1", queues, ["m1", "m2"])]


def test_a_strategy_cannot_spoil_what_it_was_given() -> None:
    queues, members = queues_of("a"), ["m1"]

    def greedy(group: str, client_id: str, queues: Any, members: Any) -> list[MessageQueue]:
        queues.append(MessageQueue("meters", "ghost", 0))
        members.clear()
        return list(queues[:1])

    assert allocate(greedy, "g", "m1", queues, members) == queues[:1]
    assert (len(queues), members) == (4, ["m1"])


def raising(*_: Any) -> Any:
    raise ZeroDivisionError("of mine")


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (raising, "raising failed with ZeroDivisionError('of mine')"),
        (lambda *_: None, "failed with TypeError"),
        (lambda *_: sys.exit(3), "failed with SystemExit(3)"),
        (lambda group, client_id: [], "failed with TypeError"),
        (AllocateAveragely, "AllocateAveragely failed with TypeError"),
        (lambda *_: [MessageQueue("meters", "ghost", 0)], "returned MessageQueue(topic='meters', broker_name='ghost'"),
        (lambda *_: [("meters", "a", 0)], "returned ('meters', 'a', 0)"),
        (lambda *_: [[1], "x"], "failed with TypeError"),
        (lambda *_: "meters", "returned 'm'"),
    ],
)
def test_what_a_strategy_does_wrong_is_told_with_its_name(strategy: Callable[..., Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        allocate(strategy, "g", "m1", queues_of("a"), ["m1", "m2"])
    assert said in caught.value.message
    assert caught.value.facts["group"] == "g"
