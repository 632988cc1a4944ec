"""The core's front: sessions, hostile frames, faults of ours, facts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.broker_desk import BrokerDesk
from zrmq.errors import Code
from zrmq.protocol.limits import FRAME_COUNT_MAX
from zrmq.protocol.requests import (
    DescribeBroker,
    DescribeGroups,
    DescribeTopics,
    Failed,
    Heartbeat,
    Hello,
    Pull,
    QueryOffsets,
    QueryRoute,
    Send,
    Welcome,
    decode_reply,
    encode,
)


def last_reply(desk: BrokerDesk, peer: bytes) -> object:
    return decode_reply(desk.sent[peer][-1][0])


def test_nothing_is_answered_without_a_session_but_the_way_to_one() -> None:
    desk = BrokerDesk()
    desk.core.handle(b"x", [encode(Heartbeat(7, 1000))])
    reply = last_reply(desk, b"x")
    assert isinstance(reply, Failed) and (reply.number, reply.code) == (7, Code.NO_SESSION)


def test_a_welcome_tells_who_answers_and_what_the_limits_are() -> None:
    desk = BrokerDesk(session_timeout_ms=5000)
    welcome = desk.client("c").hello
    assert isinstance(welcome, Welcome)
    assert (welcome.server_name, welcome.session_timeout_ms, welcome.limits.body_bytes_max) == ("broker-a", 5000, 4 << 20)


def test_each_start_has_a_server_id_of_its_own() -> None:
    desk = BrokerDesk()
    first = desk.client("c").hello
    desk.crash()
    assert desk.client("c", epoch=2).hello.server_id != first.server_id


def test_another_protocol_version_is_refused() -> None:
    desk = BrokerDesk()
    desk.core.handle(b"x", [encode(Hello(1, 1000, 99, "c", 1, "admin"))])
    assert last_reply(desk, b"x").code == Code.VERSION_UNSUPPORTED  # type: ignore[attr-defined]


def test_a_request_for_a_nameserver_is_told_where_to_go() -> None:
    reply = BrokerDesk().client("c").ask(QueryRoute, ["t"])
    assert reply.code == Code.UNSUPPORTED and "NameServer" in reply.message


def test_what_is_named_again_and_again_is_answered_once() -> None:
    """A small request must not cost the broker more than what exists."""
    desk = BrokerDesk()
    desk.topic("meters", queue_count=2)
    desk.topic("alarms", queue_count=2)
    client = desk.client("c", "consumer", "readers")
    client.join("meters")
    topics = client.ask(DescribeTopics, ["meters", "alarms", "meters"]).topics
    assert [info.config.topic for info in topics] == ["meters", "alarms"]
    assert [info.group for info in client.ask(DescribeGroups, ["readers"] * 3).groups] == ["readers"]
    assert client.ask(QueryOffsets, "meters", [1, 0, 1]).offsets == [(1, 0), (0, 0)]


@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_hostile_frames_get_an_error_and_nothing_else(frames: list[bytes]) -> None:
    desk = _shared_desk()
    desk.core.handle(b"hostile", frames)
    desk.core.ingest(b"", frames)
    assert isinstance(last_reply(desk, b"hostile"), Failed)


def test_a_message_that_was_cut_off_is_refused_with_its_number_and_counted() -> None:
    """Whatever it asks for: what is left of it must not pass for the whole."""
    desk = BrokerDesk()
    desk.topic("meters")
    client = desk.client("c")
    for number, request in enumerate((Heartbeat(8, 0), Pull(9, 0, "meters", 0, 0, 1000, 0)), 1):
        desk.core.handle(client.peer, [encode(request), *[b""] * FRAME_COUNT_MAX])
        reply = client.reply(request.number)
        assert isinstance(reply, Failed) and reply.code == Code.PAYLOAD_TOO_LARGE
        assert desk.core.facts()["frames_invalid"] == number
    desk.core.ingest(b"", [encode(Send(0, 0, "meters", 0)), client.batch([b"x"]), *[b""] * FRAME_COUNT_MAX])
    assert desk.core.facts()["batches_refused_one_way"] == 1


@given(
    request=st.sampled_from([Send, Pull]),
    fields=st.lists(st.one_of(st.integers(), st.text(max_size=20), st.none(), st.binary(max_size=20)), max_size=10),
)
def test_requests_with_wild_fields_get_an_error_or_an_answer(request: type, fields: list[object]) -> None:
    desk = _shared_desk()
    session = desk.core.sessions.by_client("wild")
    client = desk.client("wild", epoch=session.session_epoch + 1 if session else 1)
    tag = request.__struct_config__.tag
    desk.core.handle(client.peer, [_encode_wild([tag, 99, 0, *fields])])
    replies = [reply for reply, _ in client.inbox() if reply.number == 99]
    assert len(replies) <= 1


def _encode_wild(values: list[object]) -> bytes:
    try:
        return msgspec.msgpack.encode(values)
    except OverflowError:
        return b"\xc1"


_desks: list[BrokerDesk] = []


def _shared_desk() -> BrokerDesk:
    """One desk for all examples of a property: hostile input must not wear it out either."""
    if not _desks:
        _desks.append(BrokerDesk())
        _desks[0].topic("meters")
    return _desks[0]


def test_a_fault_of_ours_is_answered_and_logged_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = BrokerDesk()
    desk.topic("meters")
    client = desk.client("c")
    with monkeypatch.context() as broken:
        broken.setattr(desk.store, "read", lambda *args: 1 / 0)
        reply, _ = client.pull("meters", 0, 0)
    assert isinstance(reply, Failed) and reply.code == Code.INTERNAL_ERROR
    assert client.pull("meters", 0, 0)[0].max_offset == 0


def test_a_reply_to_a_peer_that_is_gone_is_dropped_and_counted() -> None:
    desk = BrokerDesk()
    client = desk.client("c")
    desk.gone.add(client.peer)
    client.post(Heartbeat)
    assert desk.core.facts()["replies_unroutable"] == 1


def test_a_pause_of_the_broker_is_not_the_clients_silence() -> None:
    desk = BrokerDesk()
    client = desk.client("c")
    desk.pass_ms(500)
    desk.clock.advance(60_000)
    desk.core.tick()
    assert client.ask(Heartbeat).number == client._number and desk.core.facts()["sessions"] == 1


def test_the_facts_are_numbers_and_text() -> None:
    state = BrokerDesk().client("c").ask(DescribeBroker)
    assert state.facts["broker_name"] == "broker-a" and state.facts["sessions"] == 1
