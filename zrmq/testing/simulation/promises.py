"""What the cluster has promised to whom, as producers and consumers saw it; and what must follow from it.

A message is known by its body, which is unique. `Posting` is what became of it at its producer; `finished` what the listeners of
each group have got through. Both are what a user can see, taken at the public edge of the clients' cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, NamedTuple

from zrmq.client.batch import OneWay, SendHandle, Target
from zrmq.client.producing import OPEN_OUTCOMES
from zrmq.errors import ZrmqError
from zrmq.message import FlushMode, Message, MessageQueue, SendReceipt
from zrmq.protocol.events import (
    AnyEvent,
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    SessionTimeoutChanged,
)
from zrmq.testing.simulation.plan import GroupPlan, Plan, reader_groups
from zrmq.testing.simulation.trace import BrokenPromise, spell


class Posting:
    """One message handed to a producer, and its outcome."""

    __slots__ = (
        "answered_ms", "body", "error", "handle", "kind", "number", "posted_ms", "queue", "receipt", "sender", "tag", "topic",
    )

    def __init__(self, sender: str, number: int, target: Target, tag: str | None) -> None:
        self.sender = sender  # one thread of a program: what it sends has an order
        self.number = number
        self.topic = target if isinstance(target, str) else target.topic
        self.queue = target if isinstance(target, MessageQueue) else None  # that it is bound to
        self.kind: type = type(target)
        self.tag = tag
        self.body = b""
        self.posted_ms = 0.0
        self.answered_ms = -1.0
        self.handle: SendHandle | None = None
        self.receipt: SendReceipt | None = None
        self.error: ZrmqError | None = None

    def __repr__(self) -> str:
        return f"<message {self.number} of {self.sender}>"

    @property
    def is_answered(self) -> bool:
        """Whether its producer knows what became of it."""
        return self.receipt is not None or self.error is not None

    @property
    def is_in_order(self) -> bool:
        """Whether it must not stand behind younger ones: it is bound to its queue, or its batch never had to look for another."""
        if self.kind is OneWay:
            return False
        if self.queue is not None or self.handle is None:
            return True
        batch = self.handle.batch
        return not (getattr(batch, "attempts", 0) or getattr(batch, "avoid", ()))


class Seek(NamedTuple):
    """A consumer went on elsewhere: what lies between is skipped, or comes again."""

    before: int  # below which it was through with everything
    offset: int
    end: int  # the same, or the queue's end at that time, if that is before


class Gone(NamedTuple):
    """A topic that was deleted, and the messages it had."""

    topic_id: int
    bodies: set[bytes]


Place = tuple[str, str, MessageQueue]  # group, instance name, queue


class Promises:
    """Everything that was promised in a run, by all brokers together."""

    def __init__(self, plan: Plan) -> None:
        self.groups = {group.name: group for group in plan.groups}
        self.postings: dict[bytes, Posting] = {}
        self.producer_ids: dict[str, set[int]] = {}  # by sender: of the batches that its messages may be in
        self.acknowledged: dict[MessageQueue, dict[int, Posting]] = {}
        self.subscriptions: dict[tuple[str, str, str], dict[tuple[str, int], None]] = {}  # who: broker name, since when; in order
        self.deleted_until: dict[str, int] = {}  # by broker name: its log had begun there, whatever a power cut brought back
        self.lease_topics: dict[tuple[str, int], int] = {}  # by broker name and lease epoch: of which topic its queue is
        self.topic_ids: dict[tuple[str, str], int] = {}  # by broker name and topic: the one there is, or was last
        self.topic_names: dict[tuple[str, int], str] = {}  # by broker name and topic id
        self._gone: dict[str, dict[int, Gone]] = {}  # by broker name, and where its log says so
        self._losable: set[tuple[str, bytes]] = set()  # by broker name
        self._damaged: set[bytes] = set()
        self._went_back: set[MessageQueue] = set()
        self._unflushed: set[MessageQueue] = set()  # that were so when their broker ended, once
        self._lost_starts: set[tuple[str, str, str, str]] = set()  # by broker name, group, instance name and topic
        self._lost_commits: set[tuple[str, str, str, int, int]] = set()  # the same with topic id and queue id
        self._lost_leases: set[tuple[type[Any], str, int]] = set()  # what a broker said of a lease, by lease epoch
        self._lost_timeouts: set[str] = set()  # of brokers' sessions
        self._cut: set[tuple[str, str]] = set()  # by broker name and topic: the power went while it was async
        self._told: dict[tuple[Place, int], int] = {}  # by place and topic id: where consumers know that they stand
        self._async_until_ms: dict[tuple[str, str], float] = {  # by broker name and topic: inf, unless it is flushed first by now
            (broker_name, topic.name): inf
            for topic in plan.topics if topic.flush_mode is FlushMode.ASYNC for broker_name in plan.broker_names
        }
        self._wanted = {group.name: wanted_tags(group) for group in (*plan.groups, *reader_groups(plan))}
        self._finished: dict[Place, set[tuple[int, bytes]]] = {}
        self._seeks: dict[tuple[Place, int], list[Seek]] = {}  # by place and topic id
        self._begun: dict[tuple[Place, int], list[int]] = {}  # by place and topic id
        self._first_commits: dict[tuple[Place, int], set[object]] = {}

    # --- producers ----------------------------------------------------------------------------------------------------

    def answered(self, posting: Posting, outcome: SendReceipt | ZrmqError, now_ms: float) -> None:
        """A producer was told what became of a message."""
        if posting.is_answered:
            raise BrokenPromise("answer", f"{posting} was answered twice.")
        posting.answered_ms = now_ms
        if isinstance(outcome, ZrmqError):
            posting.error = outcome
            return
        posting.receipt = outcome
        if posting.kind is OneWay:
            return
        if posting.queue is not None and outcome.queue != posting.queue:
            raise BrokenPromise("bound", f"{posting} for {spell(posting.queue)} was stored in {spell(outcome.queue)}.")
        queue = self.acknowledged.setdefault(outcome.queue, {})
        other = queue.get(outcome.queue_offset)
        if other is not None and (self.is_gone(outcome.broker_name, posting.body) or self.may_be_lost(posting)):
            return  # of a former topic, or of before the power went, and told late
        is_excused = other is None or self.is_gone(outcome.broker_name, other.body)
        if other is not None and not (is_excused or self.may_be_lost(other) or self.is_damaged(other.body)):
            place = f"{outcome.queue_offset} of {spell(outcome.queue)}"
            raise BrokenPromise("double", f"{other} and {posting} were both acknowledged at {place}.")
        queue[outcome.queue_offset] = posting

    def may_lose(self, broker_name: str, bodies: Iterable[bytes], flushed_position: int) -> None:
        """The power of a broker goes, and these are written and not flushed. What was acknowledged, or read, from the page cache
        of a topic that was flushed first again before this moment is flushed."""
        unsafe = (body for body in bodies if self.is_async(broker_name, self.postings[body].topic))
        self._losable.update((broker_name, body) for body in unsafe)
        self._cut.update(key for key, until_ms in self._async_until_ms.items() if key[0] == broker_name and until_ms == inf)
        for position in [position for position in self._gone.get(broker_name, ()) if position >= flushed_position]:
            del self._gone[broker_name][position]  # unless it is seen again

    def may_be_lost(self, posting: Posting) -> bool:
        """Whether it was only promised to survive the end of the process, and the power went before it was flushed."""
        receipt = posting.receipt
        is_from_cache = receipt is not None and receipt.durability is FlushMode.ASYNC
        return receipt is not None and is_from_cache and self.may_have_lost(receipt.broker_name, posting.body)

    def may_have_lost(self, broker_name: str, body: bytes) -> bool:
        """Whether a broker may have shown this message, and lost it."""
        return (broker_name, body) in self._losable

    def is_deleted(self, broker_name: str, end: int) -> bool:
        """Whether an entry of a broker's log that ends there was in a segment that was deleted."""
        return end <= self.deleted_until.get(broker_name, 0)

    def flush_asked(self, broker_name: str, topic: str, flush_mode: FlushMode) -> None:
        """An administrator asks a broker to have a topic flushed so; whether it ever hears of it is unknown."""
        if flush_mode is FlushMode.ASYNC:
            self._async_until_ms[broker_name, topic] = inf

    def flush_settled(self, broker_name: str, topic: str, flush_mode: FlushMode, now_ms: float) -> None:
        """A broker has said so of the last that it was asked for: it is on its disk, with all that was stored before it."""
        if flush_mode is FlushMode.SYNC and self.is_async(broker_name, topic):
            self._async_until_ms[broker_name, topic] = now_ms

    def is_async(self, broker_name: str, topic: str) -> bool:
        """Whether its messages may be acknowledged from the page cache."""
        return self._async_until_ms.get((broker_name, topic)) == inf

    def was_async(self, broker_name: str, topic: str, since_ms: float) -> bool:
        """Whether they may have been at some time since then."""
        return self._async_until_ms.get((broker_name, topic), -inf) >= since_ms

    def is_gone(self, broker_name: str, body: bytes) -> bool:
        """Whether a broker had the message in a topic that was deleted. It may be stored once more, and that one is owed."""
        return any(body in gone.bodies for gone in self._gone.get(broker_name, {}).values())

    def is_former(self, broker_name: str, topic_id: int) -> bool:
        """Whether a broker has deleted the topic with this id."""
        return any(topic_id == gone.topic_id for gone in self._gone.get(broker_name, {}).values())

    def topic_deleted(self, broker_name: str, topic_id: int, position: int, bodies: Iterable[bytes]) -> None:
        """A broker's log says at `position` that a topic is deleted, which had these messages, and others that had expired."""
        gone = self._gone.setdefault(broker_name, {})
        if position not in gone:  # else some may be of the next topic of the name
            topic = self.topic_names[broker_name, topic_id]  # which a log that begins behind it does not tell any more
            gone[position] = Gone(topic_id, {
                posting.body for queue, postings in self.acknowledged.items()
                if (queue.broker_name, queue.topic) == (broker_name, topic) for posting in postings.values()
            })
        gone[position].bodies.update(bodies)

    # --- damage ---------------------------------------------------------------------------------------------------------

    def damaged(self, bodies: Iterable[bytes]) -> None:
        """The disk has been at the entries of these messages: they may be lost, and stored once more."""
        self._damaged.update(bodies)

    def is_damaged(self, body: bytes) -> bool:
        """Whether the disk has been at the message's entry."""
        return body in self._damaged

    def lost_batch(self, queue: MessageQueue) -> None:
        """Nobody knows any more of a batch of this queue: its offsets may be given again."""
        self._went_back.add(queue)

    def ended_unflushed(self, queues: Iterable[MessageQueue]) -> None:
        """The broker of these ended with messages that it had not flushed. They are there, as only the power may take them; but
        who has read them cannot know what it was that ended the broker."""
        self._unflushed.update(queue for queue in queues if self.is_async(queue.broker_name, queue.topic))

    def may_be_reset(self, queue: MessageQueue) -> bool:
        """Whether its end may have been lost that consumers knew, as far as they know: then they go back by a reset."""
        return self.is_cut(queue.broker_name, queue.topic) or queue in self._went_back or queue in self._unflushed

    def is_cut(self, broker_name: str, topic: str) -> bool:
        """Whether the power of a broker has gone while the topic was acknowledged from the page cache."""
        return (broker_name, topic) in self._cut

    def lost_event(self, broker_name: str, event: AnyEvent) -> None:
        """Nobody knows any more that the broker said this."""
        if isinstance(event, GroupSubscribed):
            self._lost_starts.add((broker_name, event.group, event.instance_name, event.topic))
        elif isinstance(event, OffsetsCommitted):
            who = (broker_name, event.group, event.instance_name)
            self._lost_commits.update((*who, topic_id, queue_id) for topic_id, queue_id, _ in event.offsets)
        elif isinstance(event, LeaseGranted | LeaseReleased):
            self._lost_leases.add((type(event), broker_name, event.lease_epoch))
        elif isinstance(event, SessionTimeoutChanged):
            self._lost_timeouts.add(broker_name)

    def is_start_lost(self, broker_name: str, group: str, instance_name: str, topic: str) -> bool:
        """Whether a broker has lost where the group began in this topic."""
        return (broker_name, group, instance_name, topic) in self._lost_starts

    def is_commit_lost(self, place: Place) -> bool:
        """Whether the broker has lost that the group committed in this queue."""
        group, instance_name, queue = place
        return (queue.broker_name, group, instance_name, self._now(place)[1], queue.queue_id) in self._lost_commits

    def is_place_lost(self, place: Place) -> bool:
        """Whether the broker may have lost where the group stands in this queue."""
        group, instance_name, queue = place
        return self.is_start_lost(queue.broker_name, group, instance_name, queue.topic) or self.is_commit_lost(place)

    def is_lease_lost(self, kind: type[LeaseGranted | LeaseReleased], broker_name: str, lease_epoch: int) -> bool:
        """Whether the broker has lost that this lease was granted, or has ended."""
        return (kind, broker_name, lease_epoch) in self._lost_leases

    def is_timeout_lost(self, broker_name: str) -> bool:
        """Whether the broker has lost for how long sessions were to last."""
        return broker_name in self._lost_timeouts

    def is_known_unstored(self, posting: Posting) -> bool:
        """Whether its producer was told that it is not stored."""
        return posting.error is not None and posting.error.code not in OPEN_OUTCOMES

    # --- consumers ----------------------------------------------------------------------------------------------------

    def subscribed(self, broker_name: str, event: GroupSubscribed) -> None:
        """A subscription is in a broker's log, unless it is lost again before it is flushed."""
        self.subscriptions.setdefault(_who(event), {})[broker_name, event.since_ms] = None

    def is_told(self, broker_name: str, event: GroupSubscribed) -> bool:
        """Whether the time of a subscription is that of another broker, which had it first."""
        known = self.subscriptions.get(_who(event), ())
        return next((name for name, since_ms in known if since_ms == event.since_ms), broker_name) != broker_name

    def finish(self, group: str, instance_name: str, message: Message) -> None:
        """A listener returned."""
        key = (group, instance_name, message.queue)
        self._finished.setdefault(key, set()).add((message.queue_offset, message.body))

    def sought(self, place: Place, seek: Seek) -> None:
        """A consumer goes on elsewhere."""
        self._seeks.setdefault(self._now(place), []).append(seek)
        key = self._now(place)
        if key in self._told:
            self._told[key] = min(self._told[key], seek.end)

    def told(self, place: Place, topic_id: int, offset: int) -> None:
        """A consumer knows that this is committed: what lies before does not come again, unless somebody seeks."""
        if not self.is_beyond_end(place):  # else the broker has committed less than it was told
            self._told[place, topic_id] = max(offset, self._told.get((place, topic_id), 0))

    def all_told(self) -> Iterator[tuple[Place, int, int]]:
        """What consumers know to be committed: place, topic id, offset. Not where their broker may have lost it."""
        for (place, topic_id), offset in self._told.items():
            if not (self.is_place_lost(place) or place[2] in self._went_back):
                yield place, topic_id, offset

    def may_come(self, place: Place, topic_id: int, offset: int) -> bool:
        """Whether a message may still be given to the group."""
        is_lost = self.is_place_lost(place) or place[2] in self._went_back
        return is_lost or offset >= self._told.get((place, topic_id), 0)

    def is_beyond_end(self, place: Place) -> bool:
        """Whether anybody sought beyond the end of the queue."""
        return any(seek.end < seek.offset for seek in self._seeks.get(self._now(place), ()))

    def _now(self, place: Place) -> tuple[Place, int]:
        """The place in the topic that there is: of a former one nothing counts."""
        queue = place[2]
        return place, self.topic_ids.get((queue.broker_name, queue.topic), 0)

    def began(self, place: Place, topic_id: int, offset: int) -> None:
        """A reader whose group stood nowhere began there, as it was told to: what lies before is nobody's."""
        self._begun.setdefault((place, topic_id), []).append(offset)

    def first_commit(self, place: Place, topic_id: int, offset: int, entry: object) -> int | None:
        """By this entry a group that stood nowhere stands at `offset`. Returns where its reader began; None if none ever did."""
        self._first_commits.setdefault((place, topic_id), set()).add(entry)
        begun = self._begun.get((place, topic_id), [])
        return max((each for each in begun if each <= offset), default=min(begun, default=None))  # or it sought back first

    def first_commits(self, group: str) -> dict[tuple[Place, int], int]:
        """How often that was so by now, by place and topic id: a broker may lose it."""
        return {key: len(entries) for key, entries in self._first_commits.items() if key[0][0] == group}

    def is_beyond(self, place: Place, offset: int, committed: int | None) -> bool:
        """Whether a consumer sought this offset where the queue had already ended, and that end, or more, is committed."""
        if committed is None:
            return False
        is_sure = not self.may_be_reset(place[2])  # else the broker may have lost that end before it heard of it
        seeks = self._seeks.get(self._now(place), ())
        return any(seek.end < offset == seek.offset and (committed >= seek.end or not is_sure) for seek in seeks)

    def may_go_back(self, place: Place, offset: int, times: int) -> int | None:
        """From where on a group that goes back to `offset`, for the so-many-th time, has finished everything before it; None if
        it must not go back. Who seeks beyond the end goes back twice."""
        seeks = self._seeks.get(self._now(place), [])
        times_max = sum(2 if seek.end < seek.offset else seek.end < seek.before for seek in seeks)
        return max((seek.end for seek in seeks if seek.end <= offset), default=None) if times <= times_max else None

    def is_finished(self, group: str, instance_name: str, queue: MessageQueue, offset: int, body: bytes) -> bool:
        """Whether a listener of the group got through this message, or the group does not want it, or a seek passed over it."""
        place = (group, instance_name, queue)
        done = self._finished.get(place)
        return (
            (done is not None and (offset, body) in done) or not self.is_wanted(group, body)
            or any(seek.before <= offset < seek.offset for seek in self._seeks.get(self._now(place), ()))
            or offset < max(self._begun.get(self._now(place), ()), default=0)
        )

    def is_wanted(self, group: str, body: bytes) -> bool:
        """Whether the group's filter lets the message through."""
        tags = self._wanted[group]
        return tags is None or self.postings[body].tag in tags


def _who(event: GroupSubscribed) -> tuple[str, str, str]:
    return event.group, event.instance_name, event.topic


def wanted_tags(group: GroupPlan) -> frozenset[str] | None:
    """The tags of the group's filter, None for all messages."""
    return None if group.expression == "*" else frozenset(tag.strip() for tag in group.expression.split("||"))
