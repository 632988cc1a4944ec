"""Rebalancing: no queue has two owners, none has no owner, and members that disagree for a moment do no harm."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zrmq.client.allocation import AllocateAveragely, AllocateByCircle, AllocateConsistentHash, Strategy
from zrmq.client.rebalance import Moves, plan, share, shared_members
from zrmq.errors import InvalidArgumentError
from zrmq.message import MessageQueue

GROUP = "reports"


def by_turns(group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]) -> list[MessageQueue]:
    return list(queues[members.index(client_id) :: len(members)])


def queues_of(topic: str, *counts: int) -> list[MessageQueue]:
    """As many queues as each count says, at brokers 0, 1, ..."""
    return [MessageQueue(topic, f"broker-{at}", queue_id) for at, count in enumerate(counts) for queue_id in range(count)]


ROUTES = st.dictionaries(st.sampled_from(["meters", "doors", "gates"]), st.lists(st.integers(0, 5), max_size=3), max_size=3).map(
    lambda counts: {topic: queues_of(topic, *each) for topic, each in counts.items()}
)
MEMBERS = st.lists(st.sampled_from([f"client-{number}" for number in range(8)]), min_size=1, unique=True).map(sorted)


# --- members ------------------------------------------------------------------------------------------------------------


def test_members_are_those_every_broker_knows() -> None:
    assert shared_members([["b", "a", "c"], ["a", "c"], ["c", "d", "a"]]) == ["a", "c"]


def test_nobody_is_known_before_a_broker_was_heard() -> None:
    assert shared_members([]) == []


@given(st.lists(st.sets(st.sampled_from("abcdef")), min_size=1))
def test_a_shared_member_is_known_everywhere(views: list[set[str]]) -> None:
    shared = shared_members(views)
    assert shared == sorted(set(shared))
    for name in "abcdef":
        assert (name in shared) == all(name in view for view in views)


# --- shares -------------------------------------------------------------------------------------------------------------


@given(ROUTES, MEMBERS)
def test_shares_are_disjoint_and_complete(queues: dict[str, list[MessageQueue]], members: list[str]) -> None:
    shares = [share(by_turns, GROUP, member, queues, members) for member in members]
    everything = {queue for each in queues.values() for queue in each}
    assert sum(map(len, shares)) == len(everything)
    assert set().union(*shares) == everything


@given(ROUTES, MEMBERS, st.randoms(use_true_random=False))
def test_the_order_in_which_queues_are_known_does_not_matter(queues, members, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = {topic: random.sample(each, len(each)) for topic, each in queues.items()}
    assert share(by_turns, GROUP, members[0], queues, members) == share(by_turns, GROUP, members[0], shuffled, members)


def test_who_is_no_member_has_no_share() -> None:
    assert share(by_turns, GROUP, "stranger", {"meters": queues_of("meters", 4)}, ["client-0"]) == set()


def test_a_strategy_is_told_the_group_and_sorted_lists() -> None:
    told = []

    def strategy(group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]) -> Sequence[MessageQueue]:
        told.append((group, client_id, list(queues), list(members)))
        return queues

    queues = queues_of("meters", 2, 1)
    share(strategy, GROUP, "a", {"meters": queues[::-1]}, ["a", "b"])
    assert told == [(GROUP, "a", sorted(queues), ["a", "b"])]


def test_a_strategy_cannot_change_the_lists() -> None:
    def greedy(group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]) -> Sequence[MessageQueue]:
        taken = list(queues)
        queues.clear()  # type: ignore[attr-defined]
        return taken

    queues = {"meters": queues_of("meters", 3)}
    assert share(greedy, GROUP, "a", queues, ["a"]) == share(greedy, GROUP, "a", queues, ["a"]) != set()


class Broken:
    def __call__(self, *_: object) -> list[MessageQueue]:
        raise KeyError("room 7")


def test_a_strategy_that_raises_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"strategy Broken failed with KeyError\('room 7'\)"):
        share(Broken(), GROUP, "a", {"meters": queues_of("meters", 1)}, ["a"])


def test_a_strategy_cannot_take_queues_of_another_topic() -> None:
    queues = {"doors": queues_of("doors", 1), "meters": queues_of("meters", 1)}
    with pytest.raises(InvalidArgumentError, match=r"strategy <lambda> returned MessageQueue\(topic='doors'"):
        share(lambda *_: queues["doors"], GROUP, "a", queues, ["a"])


@pytest.mark.parametrize("strategy", [AllocateAveragely(), AllocateByCircle(), AllocateConsistentHash()])
@given(queues=ROUTES, members=MEMBERS)
def test_the_strategies_share_out_everything(
    strategy: Strategy, queues: dict[str, list[MessageQueue]], members: list[str]
) -> None:
    shares = [share(strategy, GROUP, member, queues, members) for member in members]
    everything = {queue for each in queues.values() for queue in each}
    assert sum(map(len, shares)) == len(everything)
    assert set().union(*shares) == everything


# --- moves --------------------------------------------------------------------------------------------------------------


def test_moves_are_sorted_and_apart() -> None:
    a, b, c, d = queues_of("meters", 4)
    assert plan({d, b, a}, {c, b}) == Moves(acquire=[a, d], keep=[b], give_back=[c])


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_moves_lead_from_what_is_held_to_the_share(mine: set[int], held: set[int]) -> None:
    def queues(numbers: set[int]) -> set[MessageQueue]:
        return {MessageQueue("meters", "broker-0", number) for number in numbers}

    moves = plan(queues(mine), queues(held))
    assert set(moves.acquire) | set(moves.keep) == queues(mine)
    assert set(moves.keep) | set(moves.give_back) == queues(held)
    assert not set(moves.acquire) & queues(held)
    assert not set(moves.give_back) & queues(mine)


class Cluster(RuleBasedStateMachine):
    """Members that see different brokers and different members, and a broker that gives each queue one lease at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = {"meters": queues_of("meters", 3, 4), "doors": queues_of("doors", 2)}
        self.views: dict[str, set[str]] = {broker: set() for broker in ("broker-0", "broker-1")}
        self.leases: dict[MessageQueue, str] = {}
        self.held: dict[str, set[MessageQueue]] = {}

    @rule(member=st.sampled_from("abcd"), broker=st.sampled_from(["broker-0", "broker-1"]))
    def join(self, member: str, broker: str) -> None:
        self.views[broker].add(member)
        self.held.setdefault(member, set())

    @rule(member=st.sampled_from("abcd"))
    def leave(self, member: str) -> None:
        for view in self.views.values():
            view.discard(member)
        self.leases = {queue: holder for queue, holder in self.leases.items() if holder != member}
        self.held.pop(member, None)

    @rule(member=st.sampled_from("abcd"))
    def rebalance(self, member: str) -> None:
        if member not in self.held:
            return
        views = [view for view in self.views.values() if member in view]
        moves = plan(share(by_turns, GROUP, member, self.queues, shared_members(views)), self.held[member])
        for queue in moves.give_back:
            del self.leases[queue]
            self.held[member].remove(queue)
        for queue in moves.acquire:
            if member in self.views[queue.broker_name] and queue not in self.leases:
                self.leases[queue] = member
                self.held[member].add(queue)

    @rule()
    def settle(self) -> None:
        """When all members have joined everywhere, two rounds give every queue an owner."""
        members = sorted(self.held)
        for member in members:
            for broker in self.views:
                self.join(member, broker)
        for _ in range(2):
            for member in members:
                self.rebalance(member)
        if members:
            assert set().union(*self.held.values()) == {queue for each in self.queues.values() for queue in each}

    @invariant()
    def each_queue_has_one_owner(self) -> None:
        assert sum(map(len, self.held.values())) == len(self.leases)
        for member, queues in self.held.items():
            assert all(self.leases[queue] == member for queue in queues)


TestCluster = Cluster.TestCase
