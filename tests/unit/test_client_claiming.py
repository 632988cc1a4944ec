"""Leases that are claimed and given back: whatever a broker answers, or does not, no queue stays with a member that forgot it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zrmq.client.claiming import LeaseClaims
from zrmq.client.link import Link
from zrmq.client.reading import Reading
from zrmq.errors import ClosedError, Code, FencedError, RequestRefusedError, RequestTimeoutError, ZrmqError
from zrmq.message import MessageQueue
from zrmq.protocol.requests import AcquireLease, AnyReply, Done, Leased, ReleaseLease

QUEUE = MessageQueue("meters", "broker-a", 0)
OTHER = -1  # as a lease's epoch: another member's

# What a broker may answer before it looks at the lease at all; what it may answer when its log took the event, or did not.
BEFORE = [Code.STOPPING, Code.DISK_FULL, Code.NOT_READY, Code.TOO_MANY_REQUESTS, Code.INTERNAL_ERROR, Code.FORBIDDEN]
AFTER = [Code.STORE_FAILED, Code.INTERNAL_ERROR]


class Member:
    """A member that wants the queue or does not, the queue's broker, and the one request that may be under way between them."""

    def __init__(self) -> None:
        self.lease_epoch: int | None = None  # at the broker; None: the queue is free
        self.committed_offset = 0
        self.begun_offset = self.known_offset = -1  # as the member was told
        self.is_wanted = True
        self.reading: Reading | None = None
        self.claims = LeaseClaims(self)
        self._link = cast("Link", self)
        self._granted_count = 0
        self._number = 0
        self._request: AcquireLease | ReleaseLease | None = None
        self._on_reply: Any = None

    # --- the member ---------------------------------------------------------------------------------------------------

    def rebalance(self) -> None:
        """As the consumer's core does it."""
        if self.reading is not None and not self.is_wanted:
            reading, self.reading = self.reading, None
            self.claims.let_go(reading, 0)
        if self.is_wanted and self.reading is None and QUEUE not in self.claims.pending:
            self.claims.claim([(QUEUE, self._link)])
        self.claims.settle(lambda queue, reading: None if self.is_wanted else self._link)

    def lose_touch(self, offset: int = 0) -> None:
        if self.reading is not None:
            reading, self.reading = self.reading, None
            self.claims.lose(reading, offset, ClosedError("Gone."))

    def on_claimed(
        self, queue: MessageQueue, link: Link, offset: int, lease_epoch: int, topic_id: int = 0, *, goes_back: bool = False,
        flushed_offset: int = -1, committed_offset: int = -1,
    ) -> bool:
        """Of `ClaimListener`."""
        self.begun_offset, self.known_offset = offset, committed_offset
        if self.is_wanted:
            process_queue = SimpleNamespace(queue=queue, lease_epoch=lease_epoch)
            self.reading = Reading(cast("Any", process_queue), link, committed_offset=0)
        return self.is_wanted

    def on_unclaimed(self, after_ms: float) -> None:
        """Of `ClaimListener`."""

    def on_refused(self, error: ZrmqError) -> None:
        """Of `ClaimListener`."""
        raise AssertionError(error)

    # --- the link -----------------------------------------------------------------------------------------------------

    def request(self, kind: Any, *fields: Any, timeout_ms: int, on_reply: Any) -> int:
        """Of `Link`."""
        assert self._request is None, "one at a time"
        self._number += 1
        self._request, self._on_reply = kind(self._number, timeout_ms, *fields), on_reply
        return self._number

    def cancel(self, number: int) -> None:
        """Of `Link`."""
        assert self._request is not None and self._request.number == number
        self._request = None

    @property
    def is_asking(self) -> bool:
        return self._request is not None

    def answer(self, reply: AnyReply | ZrmqError) -> None:
        """The request under way ends with this."""
        self._request = None
        self._on_reply(reply, [])

    # --- the broker ---------------------------------------------------------------------------------------------------

    def handle(self) -> AnyReply | ZrmqError:
        """What the broker makes of the request under way. One that the member does not hear of comes once more."""
        request = self._request
        assert request is not None
        if isinstance(request, AcquireLease):
            if self.lease_epoch == OTHER:
                return RequestRefusedError("Held.", code=Code.LEASE_HELD)
            if self.lease_epoch is None:
                self._granted_count += 1
                self.lease_epoch = self._granted_count
            return Leased(request.number, self.lease_epoch, self.committed_offset)
        if self.lease_epoch in (None, OTHER) or self.lease_epoch != request.lease_epoch:
            return FencedError("Fenced.")
        self.lease_epoch = None
        return Done(request.number)

    def settle(self) -> None:
        """Nothing goes wrong any more."""
        for _ in range(4):
            self.rebalance()
            while self.is_asking:
                self.answer(self.handle())


class Faults(RuleBasedStateMachine):
    """Any order of what may happen; at the end all of it stops, and the queue has to be free for others, and then ours again."""

    def __init__(self) -> None:
        super().__init__()
        self.member = Member()

    @rule(is_wanted=st.booleans())
    def rebalance(self, is_wanted: bool) -> None:
        self.member.is_wanted = is_wanted
        self.member.rebalance()

    @precondition(lambda self: self.member.is_asking)
    @rule()
    def answer(self) -> None:
        self.member.answer(self.member.handle())

    @precondition(lambda self: self.member.is_asking)
    @rule()
    def lose_answer(self) -> None:
        self.member.handle()

    @precondition(lambda self: self.member.is_asking)
    @rule(code=st.sampled_from(BEFORE))
    def refuse(self, code: Code) -> None:
        self.member.answer(RequestRefusedError("Not now.", code=code))

    @precondition(lambda self: self.member.is_asking)
    @rule(code=st.sampled_from(AFTER), is_kept=st.booleans())
    def fail(self, code: Code, is_kept: bool) -> None:
        before = self.member.lease_epoch
        self.member.handle()
        if not is_kept:
            self.member.lease_epoch = before
        self.member.answer(RequestRefusedError("Who knows.", code=code))

    @precondition(lambda self: self.member.is_asking)
    @rule(error=st.sampled_from([RequestTimeoutError("Late."), ClosedError("The broker left.")]))
    def give_up(self, error: ZrmqError) -> None:
        self.member.answer(error)

    @rule()
    def restart(self) -> None:
        self.member.claims.restarted(cast("Link", self.member))

    @rule()
    def lose_touch(self) -> None:
        self.member.lose_touch()

    @precondition(lambda self: self.member.reading is None)  # nobody reads longer than the broker waits
    @rule(lease_epoch=st.sampled_from([None, OTHER]))
    def expire(self, lease_epoch: int | None) -> None:
        self.member.lease_epoch = lease_epoch

    @invariant()
    def what_is_read_is_held(self) -> None:
        reading = self.member.reading
        assert reading is None or reading.process_queue.lease_epoch == self.member.lease_epoch

    def teardown(self) -> None:
        member = self.member
        member.is_wanted = False
        member.settle()
        assert member.lease_epoch in (None, OTHER), "a queue that is not wanted stays with a member that has forgotten it"
        assert member.reading is None and not member.claims.pending
        member.lease_epoch, member.is_wanted = None, True
        member.settle()
        assert member.reading is not None
        member.is_wanted = False
        member.settle()
        assert member.lease_epoch is None


TestNoLeaseIsForgotten = Faults.TestCase


def granted_and_not_heard() -> Member:
    member = Member()
    member.rebalance()
    member.handle()
    return member


def lost_touch() -> Member:
    member = Member()
    member.settle()
    member.lose_touch()
    return member


def doubted_and_settling() -> Member:
    member = granted_and_not_heard()
    member.answer(RequestRefusedError("Who knows.", code=Code.STORE_FAILED))
    member.is_wanted = False
    member.rebalance()
    return member


def granted_anew_and_not_heard() -> Member:
    member = lost_touch()
    member.lease_epoch = None
    member.rebalance()
    member.handle()
    return member


@pytest.mark.parametrize("member_of", [granted_and_not_heard, doubted_and_settling, granted_anew_and_not_heard])
@pytest.mark.parametrize("code", BEFORE)
def test_a_refusal_says_nothing_of_what_was_granted_before(member_of: Any, code: Code) -> None:
    """The request had been heard already, or one like it, and the answer was lost."""
    member: Member = member_of()
    member.answer(RequestRefusedError("Not now.", code=code))
    member.is_wanted = False
    member.settle()
    assert member.lease_epoch is None


@pytest.mark.parametrize(("is_same", "offset"), [(True, 7), (False, 3)])
def test_the_same_lease_goes_on_where_it_was_left(is_same: bool, offset: int) -> None:
    member = Member()
    member.settle()
    member.committed_offset = 3
    member.lose_touch(7)
    if not is_same:
        member.lease_epoch = None
    member.settle()
    assert (member.begun_offset, member.known_offset) == (offset, 3)


def test_a_seek_back_that_nobody_was_told_of_is_not_finished_work() -> None:
    member = Member()
    member.settle()
    assert member.reading is not None
    member.reading.goes_back = True
    member.committed_offset = 3
    member.lose_touch(1)
    member.settle()
    assert member.begun_offset == 3


def test_what_is_not_flushed_is_read_again() -> None:
    """A power cut may have put other messages in its place."""
    member = Member()
    member.settle()
    assert member.reading is not None
    member.reading.flushed_offset = 5
    member.lose_touch(7)
    member.settle()
    assert member.begun_offset == 5


@pytest.mark.parametrize("code", [Code.LEASE_HELD, Code.TOPIC_NOT_FOUND, Code.BAD_REQUEST])
def test_a_lease_that_cannot_be_ours_is_not_asked_for_again(code: Code) -> None:
    member = lost_touch()
    member.rebalance()
    member.answer(RequestRefusedError("No.", code=code))
    member.is_wanted = False
    member.rebalance()
    assert not member.is_asking
