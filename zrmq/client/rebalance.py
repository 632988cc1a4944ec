"""Which queues a member of a consumer group acquires, keeps and gives back: a pure function of what everybody can see.

Each member computes its share from the same sorted queues and the same sorted members, so the shares fit together without anybody
handing them out. Members may disagree for a moment; then two want one queue, and its lease goes to one of them. So disagreement
costs a wait and never an owner too many.

A consumer believes in a member only when every broker it has a session with does (`shared_members`): one that has just reached
its first broker cannot take queues of the others yet, and one that has lost a broker must not hold its queues there for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from zrmq.client.allocation import Strategy, allocate
from zrmq.message import MessageQueue


class Moves(NamedTuple):
    """What a rebalance asks for; each list is sorted. Together `acquire` and `keep` are the member's share."""

    acquire: list[MessageQueue]
    keep: list[MessageQueue]
    give_back: list[MessageQueue]


def shared_members(views: Iterable[Collection[str]]) -> list[str]:
    """The members that all brokers know, sorted; nobody when no broker was heard."""
    known = [set(view) for view in views]
    return sorted(set.intersection(*known)) if known else []


def share(
    strategy: Strategy, group: str, client_id: str, queues: Mapping[str, Sequence[MessageQueue]], members: Sequence[str]
) -> frozenset[MessageQueue]:
    """This member's queues of all topics, each topic allocated for itself. Raises as `allocate`: a strategy may be the user's."""
    return frozenset(
        queue for each in queues.values() for queue in allocate(strategy, group, client_id, each, members)
    )


def plan(mine: Collection[MessageQueue], held: Collection[MessageQueue]) -> Moves:
    """What to do so that `held` becomes `mine`."""
    wanted, present = set(mine), set(held)
    return Moves(sorted(wanted - present), sorted(wanted & present), sorted(present - wanted))
