"""zrmq/transport/sessions.py: who may open a session, who takes it over, and when silence ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zrmq.errors import Code, InvalidArgumentError, RequestRefusedError, ZrmqError
from zrmq.protocol.limits import CLIENT_ID_CHARS_MAX, PROTOCOL_VERSION
from zrmq.protocol.requests import Hello
from zrmq.transport.sessions import SessionTable


def hello(client_id: str = "c", session_epoch: int = 1, **changes: Any) -> Hello:
    fields = {"role": "producer", "group": "", "instance_name": "", "protocol_version": PROTOCOL_VERSION, **changes}
    return Hello(
        1, 0, fields["protocol_version"], client_id, session_epoch, fields["role"], fields["group"], fields["instance_name"]
    )


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(0.0)


# --- opening ------------------------------------------------------------------------------------------------------------


def test_a_session_is_found_by_peer_and_by_client(table: SessionTable) -> None:
    session, old = table.open(hello(group="g", instance_name="i", role="consumer"), b"p", 5.0)
    assert old is None
    assert (session.peer, session.client_id, session.session_epoch) == (b"p", "c", 1)
    assert (session.role, session.group, session.instance_name) == ("consumer", "g", "i")
    assert session.last_seen_ms == 5.0
    assert session.waiting is None
    assert session.waiting is None
    assert table.by_peer(b"p") is session
    assert table.by_client("c") is session
    assert list(table) == [session]
    assert len(table) == 1


def test_who_has_no_session_is_not_found(table: SessionTable) -> None:
    assert table.by_peer(b"p") is None
    assert table.by_client("c") is None


def test_sessions_that_are_alike_are_not_the_same(table: SessionTable) -> None:
    first, _ = table.open(hello(), b"p", 0.0)
    second, _ = table.open(hello(), b"p", 0.0)
    assert first != second
    assert len({first, second}) == 2


def test_a_newer_epoch_takes_the_session_over(table: SessionTable) -> None:
    first, _ = table.open(hello(session_epoch=1), b"old", 0.0)
    first.waiting = "a watch"
    second, ended = table.open(hello(session_epoch=2), b"new", 1.0)
    assert ended is first
    assert ended.waiting == "a watch"
    assert second.waiting is None
    assert table.by_peer(b"old") is None
    assert table.by_peer(b"new") is second
    assert len(table) == 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_older_or_equal_epoch_from_elsewhere_is_refused(table: SessionTable, epoch: int) -> None:
    first, _ = table.open(hello(session_epoch=2), b"here", 0.0)
    with pytest.raises(RequestRefusedError, match="id of its own") as caught:
        table.open(hello(session_epoch=epoch), b"there", 1.0)
    assert caught.value.code == Code.FORBIDDEN
    assert table.by_peer(b"here") is first
    assert table.by_peer(b"there") is None


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_hello_on_its_own_connection_renews_the_session(table: SessionTable, epoch: int) -> None:
    first, _ = table.open(hello(session_epoch=2), b"p", 0.0)
    second, ended = table.open(hello(session_epoch=epoch), b"p", 1.0)
    assert ended is first
    assert table.by_peer(b"p") is second
    assert len(table) == 1


def test_one_connection_cannot_be_two_clients(table: SessionTable) -> None:
    first, _ = table.open(hello("a"), b"p", 0.0)
    with pytest.raises(InvalidArgumentError, match="say BYE"):
        table.open(hello("b"), b"p", 1.0)
    assert list(table) == [first]
    table.close(first)
    table.open(hello("b"), b"p", 2.0)


def test_an_ended_session_leaves_room_for_any_epoch(table: SessionTable) -> None:
    session, _ = table.open(hello(session_epoch=9), b"p", 0.0)
    assert table.close(session)
    table.open(hello(session_epoch=1), b"q", 1.0)


def test_closing_what_is_closed_or_was_taken_over_changes_nothing(table: SessionTable) -> None:
    first, _ = table.open(hello(session_epoch=1), b"p", 0.0)
    second, _ = table.open(hello(session_epoch=2), b"p", 0.0)
    assert not table.close(first)
    assert table.by_peer(b"p") is second
    assert table.close(second)
    assert not table.close(second)
    assert len(table) == 0


def test_sessions_may_be_closed_while_they_are_listed(table: SessionTable) -> None:
    for number in range(5):
        table.open(hello(f"c{number}"), b"%d" % number, 0.0)
    for session in table:
        table.close(session)
    assert len(table) == 0


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"protocol_version": 0}, Code.VERSION_UNSUPPORTED),
        ({"protocol_version": 2}, Code.VERSION_UNSUPPORTED),
        ({"client_id": ""}, Code.CLIENT_ID_REQUIRED),
        ({"client_id": "  "}, Code.BAD_REQUEST),
        ({"client_id": "a\nb"}, Code.BAD_REQUEST),
        ({"client_id": "x" * (CLIENT_ID_CHARS_MAX + 1)}, Code.BAD_REQUEST),
        ({"role": "emperor"}, Code.BAD_REQUEST),
        ({"role": ""}, Code.BAD_REQUEST),
        ({"group": "no blanks"}, Code.ILLEGAL_CONSUMER_GROUP),
        ({"instance_name": "\x00"}, Code.BAD_REQUEST),
        ({"instance_name": "x" * (CLIENT_ID_CHARS_MAX + 1)}, Code.BAD_REQUEST),
    ],
)
def test_a_hello_that_cannot_be_is_refused(table: SessionTable, wrong: dict[str, Any], code: Code) -> None:
    with pytest.raises(ZrmqError) as caught:
        table.open(hello(**wrong), b"p", 0.0)
    assert caught.value.code == code
    assert caught.value.message.endswith((".", "sides."))
    assert len(table) == 0


def test_the_version_that_is_needed_is_told(table: SessionTable) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        table.open(hello(protocol_version=7), b"p", 0.0)
    assert caught.value.facts == {"protocol_version": 7, "supported_version": PROTOCOL_VERSION}


def test_there_is_room_for_so_many_and_for_those_that_come_back() -> None:
    table = SessionTable(0.0, sessions_max=3)
    for number in range(3):
        table.open(hello(f"c{number}"), b"%d" % number, 0.0)
    with pytest.raises(RequestRefusedError) as caught:
        table.open(hello("one more"), b"x", 0.0)
    assert caught.value.code == Code.TOO_MANY_REQUESTS
    table.open(hello("c1", session_epoch=2), b"y", 0.0)
    found = table.by_client("c0")
    assert found is not None
    table.close(found)
    table.open(hello("one more"), b"x", 0.0)


def test_hellos_are_bounded_in_rate_and_the_bound_recovers() -> None:
    table = SessionTable(0.0, hellos_per_s_max=10)
    for number in range(10):
        table.open(hello(f"c{number}"), b"%d" % number, 0.0)
    with pytest.raises(RequestRefusedError, match="10 sessions are opened per second") as caught:
        table.open(hello("late"), b"x", 0.0)
    assert caught.value.code == Code.TOO_MANY_REQUESTS
    table.open(hello("late"), b"x", 100.0)
    with pytest.raises(RequestRefusedError):
        table.open(hello("later"), b"y", 150.0)
    table.open(hello("later"), b"y", 200.0)


def test_hellos_that_are_refused_count_for_the_rate() -> None:
    table = SessionTable(0.0, hellos_per_s_max=5)
    for _ in range(5):
        with pytest.raises(InvalidArgumentError):
            table.open(hello(""), b"p", 0.0)
    with pytest.raises(RequestRefusedError) as caught:
        table.open(hello(), b"p", 0.0)
    assert caught.value.code == Code.TOO_MANY_REQUESTS


# --- silence ------------------------------------------------------------------------------------------------------------


def expire_until(table: SessionTable, start_ms: float, end_ms: float) -> list[tuple[float, str]]:
    """Call `expire` as planned; when which client went."""
    gone = []
    now_ms = start_ms
    while now_ms <= end_ms:
        gone += [(now_ms, session.client_id) for session in table.expire(now_ms)]
        now_ms += table.expire_interval_ms
    return gone


def test_silence_ends_a_session_and_signs_of_life_do_not(table: SessionTable) -> None:
    table.open(hello("silent"), b"s", 0.0)
    alive, _ = table.open(hello("alive"), b"a", 0.0)
    gone = []
    for second in range(1, 41):
        now_ms = second * 500.0
        if second % 4 == 0:
            table.touch(alive, now_ms)
        gone += [(now_ms, session.client_id) for session in table.expire(now_ms)]
    assert gone == [(10_000.0, "silent")]
    assert list(table) == [alive]


def test_an_expired_session_is_out_of_the_table(table: SessionTable) -> None:
    session, _ = table.open(hello(), b"p", 0.0)
    assert expire_until(table, 500.0, 20_000.0) == [(10_000.0, "c")]
    assert table.by_peer(b"p") is None
    assert not table.close(session)


def test_sessions_opened_later_live_later(table: SessionTable) -> None:
    table.open(hello("a"), b"a", 0.0)
    gone = expire_until(table, 500.0, 3_000.0)
    table.open(hello("b"), b"b", 3_000.0)
    gone += expire_until(table, 3_500.0, 20_000.0)
    assert gone == [(10_000.0, "a"), (13_000.0, "b")]


def test_a_pause_of_the_server_is_not_the_clients_silence(table: SessionTable) -> None:
    table.open(hello(), b"p", 0.0)
    assert expire_until(table, 500.0, 2_000.0) == []
    assert table.expire(62_000.0) == []
    gone = expire_until(table, 62_500.0, 100_000.0)
    assert gone == [(69_500.0, "c")], "of its ten seconds those up to the call that did not come are used up"


def test_what_was_heard_after_a_pause_is_not_dated_ahead(table: SessionTable) -> None:
    session, _ = table.open(hello(), b"p", 0.0)
    expire_until(table, 500.0, 2_000.0)
    table.touch(session, 61_999.0)
    table.expire(62_000.0)
    assert session.last_seen_ms == 62_000.0
    assert expire_until(table, 62_500.0, 100_000.0) == [(72_000.0, "c")]


def test_a_call_that_is_a_little_late_is_no_pause(table: SessionTable) -> None:
    table.open(hello(), b"p", 0.0)
    now_ms = 0.0
    while not table.expire(now_ms):
        now_ms += 900.0
    assert now_ms == 10_800.0


def test_a_second_pause_is_forgiven_too(table: SessionTable) -> None:
    table.open(hello(), b"p", 0.0)
    for pause in range(1, 6):
        assert table.expire(pause * 30_000.0) == []
    assert len(table) == 1


@given(st.lists(st.tuples(st.floats(1.0, 900.0), st.integers(0, 4), st.booleans()), max_size=80))
def test_expire_agrees_with_a_look_at_every_session(steps: list[tuple[float, int, bool]]) -> None:
    """The scan that is left out while nothing can be due leaves nothing out."""
    table = SessionTable(0.0, session_timeout_ms=3_000.0)
    now_ms, seen_ms = 0.0, {}
    for span_ms, number, touches in steps:
        now_ms += span_ms
        session = table.by_client(f"c{number}")
        if session is None:
            table.open(hello(f"c{number}"), b"%d" % number, now_ms)
            seen_ms[f"c{number}"] = now_ms
        elif touches:
            table.touch(session, now_ms)
            seen_ms[f"c{number}"] = now_ms
        gone = {session.client_id for session in table.expire(now_ms)}
        expected = {client_id for client_id, at_ms in seen_ms.items() if at_ms <= now_ms - 3_000.0}
        assert gone == expected
        for client_id in gone:
            del seen_ms[client_id]


# --- the two indexes ----------------------------------------------------------------------------------------------------


class Sessions(RuleBasedStateMachine):
    """Whatever HELLOs come, a connection and a client id have one session at most, and the same one."""

    @initialize()
    def make(self) -> None:
        self.now_ms = 0.0
        self.table = SessionTable(0.0, sessions_max=4, hellos_per_s_max=50)
        self.epochs: dict[str, int] = {}

    @rule(client=st.sampled_from("abcdef"), peer=st.sampled_from([b"1", b"2", b"3", b"4", b"5"]), epoch=st.integers(0, 5))
    def say_hello(self, client: str, peer: bytes, epoch: int) -> None:
        before = self.table.by_client(client)
        try:
            session, ended = self.table.open(hello(client, epoch), peer, self.now_ms)
        except ZrmqError:
            assert self.table.by_client(client) is before
            return
        assert ended is before
        assert self.table.by_peer(peer) is session
        if before is not None and before.peer != peer:
            assert epoch > before.session_epoch

    @rule(client=st.sampled_from("abcdef"))
    def say_bye(self, client: str) -> None:
        session = self.table.by_client(client)
        if session is not None:
            assert self.table.close(session)

    @rule(span_ms=st.floats(0.0, 30_000.0))
    def wait(self, span_ms: float) -> None:
        self.now_ms += span_ms
        for session in self.table.expire(self.now_ms):
            assert self.table.by_client(session.client_id) is None

    @invariant()
    def indexes_agree(self) -> None:
        sessions = list(self.table)
        assert len(sessions) == len(self.table) <= 4
        assert len({session.client_id for session in sessions}) == len(sessions)
        for session in sessions:
            assert self.table.by_peer(session.peer) is session
            assert self.table.by_client(session.client_id) is session


TestSessions = Sessions.TestCase
