"""Allocation strategies: which of a topic's queues each member of a consumer group gets.

A strategy is called as `strategy(group, client_id, queues, members)` with all queues of one topic and all members, both sorted,
and returns the queues of the member `client_id`. It is a pure function: every member computes its own share, and the shares fit
together because all of them compute the same. Any callable with these arguments can be one; `allocate` catches what it may do
wrong.

Leases make a strategy that gives a queue to two members safe (one of them waits), but nobody reads a queue given to no member.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from zrmq.errors import InvalidArgumentError
from zrmq.message import MessageQueue
from zrmq.protocol.limits import check_number, check_queues

Strategy = Callable[[str, str, Sequence[MessageQueue], Sequence[str]], Iterable[MessageQueue]]

POINTS_PER_MEMBER = 10  # RocketMQ's number of virtual nodes


def allocate(
    strategy: Strategy, group: str, client_id: str, queues: Iterable[MessageQueue], members: Iterable[str]
) -> list[MessageQueue]:
    """The member's queues by `strategy`, sorted, each once. A client that is no member gets none.

    Raises `InvalidArgumentError` that names the strategy when it raises, or returns anything but some of `queues`.
    """
    known, everybody = sorted(set(queues)), sorted(set(members))
    if client_id not in everybody or not known:
        return []
    name = getattr(strategy, "__name__", type(strategy).__name__)
    available = set(known)
    try:
        chosen = list(strategy(group, client_id, list(known), list(everybody)))
        wrong = [queue for queue in chosen if queue not in available]
    except (Exception, SystemExit) as error:  # the latter would end the I/O thread, and say less
        raise InvalidArgumentError(
            f"The allocation strategy {name} failed with {error!r}; it is called with (group, client_id, queues, members) and "
            "has to return some of the queues.",
            strategy=name, group=group,
        ) from error
    if wrong:
        raise InvalidArgumentError(
            f"The allocation strategy {name} returned {wrong[0]!r}, which is none of the queues; it has to return some of those "
            "it was given.",
            strategy=name, group=group,
        )
    return sorted(set(chosen))


class AllocateAveragely:
    """Neighbouring queues, as many for each as for any other, give or take one. The default."""

    def __call__(
        self, group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]
    ) -> list[MessageQueue]:
        index = members.index(client_id)
        size, left = divmod(len(queues), len(members))
        start = index * size + min(index, left)
        return list(queues[start : start + size + (index < left)])


class AllocateByCircle:
    """Queues dealt out like cards, so that each member has some at every broker."""

    def __call__(
        self, group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]
    ) -> list[MessageQueue]:
        return list(queues[members.index(client_id) :: len(members)])


class AllocateConsistentHash:
    """Each queue goes to the next member on a ring of hashes: when one comes or goes, only its own queues move.

    Each member is on the ring `points` times; more make the shares more alike and the computing slower.
    """

    def __init__(self, points: int = POINTS_PER_MEMBER) -> None:
        """Raises `InvalidArgumentError` unless `points` is from 1 to 1,000."""
        self._points = check_number("points", points, 1, 1_000)

    def __call__(
        self, group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]
    ) -> list[MessageQueue]:
        ring = sorted((_hash(f"{member}-{point}"), member) for member in members for point in range(self._points))
        places = [place for place, _ in ring]

        def owner(queue: MessageQueue) -> str:
            place = _hash(f"{queue.topic}-{queue.broker_name}-{queue.queue_id}")
            return ring[bisect_left(places, place) % len(ring)][1]

        return [queue for queue in queues if owner(queue) == client_id]


class AllocateByConfig:
    """The queues named for this member, as far as they exist. Every queue has to be named for exactly one member."""

    def __init__(self, queues: Iterable[MessageQueue]) -> None:
        """Raises `InvalidArgumentError` for what are no message queues."""
        self._queues = frozenset(check_queues(queues))

    def __call__(
        self, group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]
    ) -> list[MessageQueue]:
        return [queue for queue in queues if queue in self._queues]


class AllocateMachineRoomNearby:
    """Queues of a machine room go to the members in it, by another strategy; those of rooms without members, to all members.

    `room_of_broker` and `room_of_client` say where a broker name and a client id are; every member has to use the same.
    """

    def __init__(
        self, strategy: Strategy, room_of_broker: Callable[[str], str], room_of_client: Callable[[str], str]
    ) -> None:
        self._strategy = strategy
        self._room_of_broker = room_of_broker
        self._room_of_client = room_of_client

    def __call__(
        self, group: str, client_id: str, queues: Sequence[MessageQueue], members: Sequence[str]
    ) -> list[MessageQueue]:
        rooms = {member: self._room_of_client(member) for member in members}
        inhabited = set(rooms.values())
        near = [queue for queue in queues if self._room_of_broker(queue.broker_name) == rooms[client_id]]
        left = [queue for queue in queues if self._room_of_broker(queue.broker_name) not in inhabited]
        neighbours = [member for member in members if rooms[member] == rooms[client_id]]
        mine = list(self._strategy(group, client_id, near, neighbours)) if near else []
        return mine + (list(self._strategy(group, client_id, left, members)) if left else [])


def _hash(text: str) -> int:
    """The same in every process and on every machine, unlike Python's own."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
