"""This consumer as a member of its group, at every live master broker: joining, who else is there, and coming back.

A group, or a broadcasting instance, begins LATEST as of its first subscription anywhere in the cluster. Each broker fixes its own
queues' starts when it first hears of a subscription, so one that is new, or was away, has to be told when that was. Joining goes:

    ask      every broker since when it knows each subscription             (only where it matters: LATEST, several brokers)
    scout    join one of them, if nobody knows some subscription; it answers when that is made
    rest     join all others with these times, at once, and every broker that appears later

A subscription that only brokers know which do not answer is made anew, as of now, at those that do: nobody who is there knows
better, and who waits consumes nothing at all. What they stored between the two moments is missed.

A lost notice would leave a member with an old list for ever, so each answer to a heartbeat has the group's version. It comes by
the connection of the notices, behind those that were sent before it: another version than ours means that one was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import msgspec

from zrmq.client.link import Link
from zrmq.client.rebalance import shared_members
from zrmq.errors import ClosedError, Code, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageModel
from zrmq.protocol.requests import (
    Alive,
    AnyReply,
    GroupChanged,
    Joined,
    JoinGroup,
    QuerySubscriptions,
    SubscribedSince,
    Subscription,
)
from zrmq.transport.interface import Loop

log = get_logger("consumer")

REQUEST_TIMEOUT_MS = 10_000
RETRY_MS = 1_000.0  # after a refusal that time may heal
GHOST_MS = 10_000.0  # so late a broker may still hear of a former life, whose session that prolongs
SURVEY_MS_MAX = 3_000.0  # brokers that the route has but nobody reaches are waited for so long

# Refusals of JoinGroup that the same request may overcome later. All others are the user's to solve.
PASSING = frozenset({
    Code.REQUEST_TIMEOUT, Code.TOO_MANY_REQUESTS, Code.INTERNAL_ERROR, Code.NO_SESSION, Code.DISK_FULL, Code.STORE_FAILED,
    Code.NOT_READY, Code.STOPPING,
})


class Joining(msgspec.Struct, frozen=True):
    """What every broker is told."""

    group: str
    client_id: str
    message_model: MessageModel
    subscriptions: list[Subscription]
    consume_from: ConsumeFrom = ConsumeFrom.LATEST
    consume_timestamp_ms: int = 0


class Seat(msgspec.Struct, eq=False):
    """The membership at one broker, as long as its link is open."""

    link: Link
    opened_ms: float
    is_asked: bool = False  # it was asked which subscriptions it knows
    has_said: bool = False  # it has answered that, or will not
    is_joining: bool = False
    refusal_count: int = 0
    name_taken_ms: float | None = None  # since when an instance of our name is there
    version: int = -1
    members: list[str] | None = None  # None: not joined
    noticed: GroupChanged | None = None  # the last notice that came before we were joined


class Membership:
    """Loop thread only. `on_change` is called when the members or the joined brokers changed, `on_refused` when the group will
    not have us."""

    def __init__(
        self, loop: Loop, joining: Joining, rng: Random, on_change: Callable[[], None], on_refused: Callable[[ZrmqError], None]
    ) -> None:
        self._loop = loop
        self._joining = joining
        self._rng = rng
        self._on_change = on_change
        self._on_refused = on_refused
        self._seats: dict[str, Seat] = {}
        self._expected: frozenset[str] = frozenset()
        self._topics = [subscription.topic for subscription in joining.subscriptions]
        self._since_ms: dict[str, int] = {}  # by topic, when it was first subscribed to, as far as we have heard
        self._is_closed = False

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[str]:
        """The members that every joined broker knows, sorted."""
        return shared_members(seat.members for seat in self._seats.values() if seat.members is not None)

    @property
    def is_complete(self) -> bool:
        """Whether every broker of the route is joined."""
        return bool(self._expected) and all(map(self.is_joined, self._expected))

    def is_joined(self, broker_name: str) -> bool:
        """Whether we are a member there."""
        seat = self._seats.get(broker_name)
        return seat is not None and seat.members is not None

    # --- what happens -------------------------------------------------------------------------------------------------

    def expect(self, broker_names: frozenset[str]) -> None:
        """These are the cluster's brokers now."""
        self._expected = broker_names
        self._advance()

    def link_open(self, broker_name: str, link: Link) -> None:
        """A new session: join (again)."""
        seat = self._seats[broker_name] = Seat(link, self._loop.clock.monotonic_ms())
        if self._needs_survey():
            self._ask(seat)
        else:
            self._join(seat)

    def link_lost(self, broker_name: str, link: Link) -> None:
        """What this broker said of the members counts no more."""
        seat = self._seats.get(broker_name)
        if seat is not None and seat.link is link:
            del self._seats[broker_name]
            self._advance()
            self._on_change()

    def notice(self, broker_name: str, notice: AnyReply) -> None:
        """Members came or went, or a heartbeat was answered."""
        seat = self._seats.get(broker_name)
        if self._is_closed or seat is None:
            return
        if isinstance(notice, Alive):
            self._compare(seat, notice.group_version)
        elif isinstance(notice, GroupChanged) and notice.group == self._joining.group:
            if seat.members is None:  # a notice does not wait for the disk, which has our subscription when we are answered
                seat.noticed = notice
            else:
                self._take_members(seat, notice)

    def close(self) -> None:
        """Do nothing more, but know what was known. Leaving is the owner's to do, after its last commits."""
        self._is_closed = True

    # --- asking -------------------------------------------------------------------------------------------------------

    def _needs_survey(self) -> bool:
        is_latest = self._joining.consume_from is ConsumeFrom.LATEST
        return is_latest and len(self._since_ms) < len(self._topics) and len(self._expected) > 1

    def _ask(self, seat: Seat) -> None:
        seat.is_asked = True
        seat.link.request(
            QuerySubscriptions, self._joining.message_model, self._topics,
            timeout_ms=int(SURVEY_MS_MAX), on_reply=partial(self._asked, seat),
        )
        self._loop.call_later(SURVEY_MS_MAX, self._advance)

    def _asked(self, seat: Seat, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        seat.has_said = True
        if isinstance(reply, SubscribedSince):
            self._learn_since(reply.since_ms)
        self._advance()

    def _learn_since(self, since_ms: list[int]) -> None:
        for topic, heard_ms in zip(self._topics, since_ms, strict=False):
            if heard_ms > 0:
                self._since_ms[topic] = min(heard_ms, self._since_ms.get(topic, heard_ms))

    def _advance(self) -> None:
        """Join whom there is no reason to wait with."""
        waiting = {name: seat for name, seat in self._seats.items() if seat.members is None and not seat.is_joining}
        if self._is_closed or not waiting:
            return
        if not self._needs_survey():
            for seat in waiting.values():
                self._join(seat)
        elif unasked := [seat for seat in waiting.values() if not seat.is_asked]:
            for seat in unasked:  # when it opened there was no other broker, and it has refused us since
                self._ask(seat)
        elif self._is_surveyed() and not any(seat.is_joining for seat in self._seats.values()):
            # The same for all members that start side by side, so that a new group has one beginning.
            scout = min(waiting, key=lambda name: (waiting[name].refusal_count, name))
            self._join(waiting[scout])

    def _is_surveyed(self) -> bool:
        if not all(seat.has_said for seat in self._seats.values()):
            return False
        oldest_ms = min(seat.opened_ms for seat in self._seats.values())
        return self._expected <= self._seats.keys() or self._loop.clock.monotonic_ms() - oldest_ms >= SURVEY_MS_MAX

    # --- joining ------------------------------------------------------------------------------------------------------

    def _join(self, seat: Seat) -> None:
        joining = self._joining
        since_ms = [self._since_ms.get(topic, 0) for topic in self._topics]
        seat.is_joining = True
        seat.link.request(
            JoinGroup, joining.message_model, joining.subscriptions, joining.consume_from, joining.consume_timestamp_ms,
            since_ms, timeout_ms=REQUEST_TIMEOUT_MS, on_reply=partial(self._joined, seat),
        )

    def _joined(self, seat: Seat, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        seat.is_joining = False
        if self._is_closed or seat not in self._seats.values():
            return
        if isinstance(reply, Joined):
            seat.name_taken_ms = None
            self._learn_since(reply.since_ms)
            noticed, seat.noticed = seat.noticed, None
            for news in (reply, noticed):
                if news is not None:
                    self._take_members(seat, news)
            self._advance()
        elif isinstance(reply, ZrmqError) and not isinstance(reply, ClosedError):
            self._refused(seat, reply)

    def _compare(self, seat: Seat, group_version: int) -> None:
        if seat.members is not None and not seat.is_joining and group_version != seat.version:
            log.info("group_version_missed", group=self._joining.group, address=seat.link.address)
            self._join(seat)

    def _take_members(self, seat: Seat, news: Joined | GroupChanged) -> None:
        if news.group_version <= seat.version:
            return
        seat.version = news.group_version
        if self._joining.client_id in news.members:
            seat.members = news.members
        else:
            seat.members = None  # our session ended there without our noticing
            self._join(seat)
        self._on_change()

    def _refused(self, seat: Seat, error: ZrmqError) -> None:
        if error.code in PASSING or self._may_be_a_ghost(seat, error):
            if not seat.refusal_count:  # once for all that may follow
                log.warning("join_refused", group=self._joining.group, address=seat.link.address, reason=error.message)
            seat.refusal_count += 1
            self._loop.call_later(RETRY_MS * self._rng.uniform(0.8, 1.2), self._advance)
        else:
            self._on_refused(error)

    def _may_be_a_ghost(self, seat: Seat, error: ZrmqError) -> bool:
        """Whether an instance of our name may be our own former life, killed, whose session has not run out yet."""
        if error.code is not Code.INSTANCE_NAME_TAKEN or seat.link.welcome is None:
            return False
        now_ms = self._loop.clock.monotonic_ms()
        if seat.name_taken_ms is None:
            seat.name_taken_ms = now_ms
        return now_ms - seat.name_taken_ms <= seat.link.welcome.session_timeout_ms + GHOST_MS
