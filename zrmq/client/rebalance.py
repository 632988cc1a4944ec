"""Which queues a member of a consumer group acquires, keeps and gives back: a pure function of what everybody can see.

Each member computes its share from the same sorted queues and the same sorted members, so the shares fit together without anybody
handing them out. Members may disagree for a moment; then two want one queue, and its lease goes to one of them. So disagreement
costs a wait and never an owner too many.

A consumer believes in a member only when every broker it has a session with does (`shared_members`): one that has just reached
its first broker cannot take queues of the others yet, and one that has lost a broker must not hold its queues there for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from zrmq.errors import InvalidArgumentError
from zrmq.message import MessageQueue

Strategy = Callable[[str, str, Sequence[MessageQueue], Sequence[str]], Sequence[MessageQueue]]  # see zrmq/client/allocation.py


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
) -> set[MessageQueue]:
    """This member's queues of all topics, each topic allocated for itself.

    A strategy may be the user's: `InvalidArgumentError` when it raises, or returns a queue that the topic does not have.
    """
    mine: set[MessageQueue] = set()
    if client_id not in members:
        return mine
    for topic, known in sorted(queues.items()):
        ordered = sorted(known)
        mine.update(_allocate(strategy, group, client_id, topic, ordered, members))
    return mine


def _allocate(
    strategy: Strategy, group: str, client_id: str, topic: str, queues: Sequence[MessageQueue], members: Sequence[str]
) -> Sequence[MessageQueue]:
    name = getattr(strategy, "__name__", type(strategy).__name__)
    try:
        chosen = strategy(group, client_id, list(queues), list(members))
        unknown = set(chosen) - set(queues)
    except Exception as error:
        raise InvalidArgumentError(
            f"The allocation strategy {name} failed on topic {topic!r} with {error!r}; it must return some of the queues given.",
            strategy=name, topic=topic,
        ) from error
    if unknown:
        raise InvalidArgumentError(
            f"The allocation strategy {name} returned {min(unknown)}, which topic {topic!r} does not have; it must return some of"
            " the queues given.",
            strategy=name, topic=topic,
        )
    return chosen


def plan(mine: Collection[MessageQueue], held: Collection[MessageQueue]) -> Moves:
    """What to do so that `held` becomes `mine`."""
    wanted, present = set(mine), set(held)
    return Moves(sorted(wanted - present), sorted(wanted & present), sorted(present - wanted))
