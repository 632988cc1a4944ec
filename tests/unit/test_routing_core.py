"""zrmq/routing/core.py: a NameServer between brokers and clients on a virtual network; hostile ones among them."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrmq.errors import AddressInUseError, Code
from zrmq.protocol import limits
from zrmq.protocol.limits import FRAME_COUNT_MAX, HEADER_BYTES_MAX, PROTOCOL_VERSION
from zrmq.protocol.requests import (
    ROUTE_OF_OTHERS,
    Alive,
    AnyReply,
    BrokerInfo,
    Bye,
    DescribeTopics,
    Done,
    Failed,
    Heartbeat,
    Hello,
    QueryRoute,
    RegisterBroker,
    Registered,
    Request,
    Route,
    TopicRoute,
    UnregisterBroker,
    Welcome,
    decode_reply,
    encode,
)
from zrmq.routing import core as core_module
from zrmq.routing.core import NameServerCore
from zrmq.transport import memory as memory_module
from zrmq.transport.memory import MemoryNetwork

ADDRESS = "tcp://nameserver:9876"


class Peer:
    """A client that speaks in requests and keeps what it hears."""

    def __init__(self, network: MemoryNetwork, name: str, role: str = "producer", address: str = ADDRESS) -> None:
        self.name, self.role = name, role
        self.network = network
        self.loop = network.loop(name)
        self.heard: list[AnyReply] = []
        self.is_connected = False
        self.number = 0
        self.connection = self.loop.connect(address, self)

    def on_connected(self) -> None:
        self.is_connected = True

    def on_disconnected(self) -> None:
        self.is_connected = False

    def on_frames(self, frames: list[bytes]) -> None:
        assert len(frames) == 1
        self.heard.append(decode_reply(frames[0]))

    def say(self, kind: type[Request], *fields: Any, timeout_ms: int = 1_000) -> int:
        """Send a request and return its number."""
        self.number += 1
        self.network.run_until(lambda: self.is_connected)
        assert self.connection.send([encode(kind(self.number, timeout_ms, *fields))])
        return self.number

    def answer(self, number: int) -> AnyReply | None:
        """What was heard of a request, if anything."""
        return next((reply for reply in self.heard if reply.number == number), None)

    def ask(self, kind: type[Request], *fields: Any, timeout_ms: int = 1_000) -> Any:
        """Send a request and return its answer."""
        number = self.say(kind, *fields, timeout_ms=timeout_ms)
        self.network.run_until(lambda: self.answer(number) is not None, limit_ms=timeout_ms)
        return self.answer(number)

    def hello(self, epoch: int = 1) -> Any:
        return self.ask(Hello, PROTOCOL_VERSION, self.name, epoch, self.role)


def info(name: str = "a", epoch: int = 1, **changes: Any) -> BrokerInfo:
    found = BrokerInfo("east", name, 0, "MASTER", epoch, f"tcp://{name}:10911", "")
    return msgspec.structs.replace(found, **changes)


class Brokers(Peer):
    """The brokers' side: registers, and heartbeats every second once told to."""

    def __init__(self, network: MemoryNetwork, name: str = "brokers", address: str = ADDRESS) -> None:
        super().__init__(network, name, "broker", address)
        self.hello()

    def register(self, name: str = "a", epoch: int = 1, version: int = 1, **queue_counts: int) -> Any:
        topics = [TopicRoute(topic, name, count, 6) for topic, count in queue_counts.items()]
        return self.ask(RegisterBroker, info(name, epoch), version, topics)

    def keep_alive(self, name: str = "a", epoch: int = 1, version: int = 1) -> None:
        self.say(RegisterBroker, info(name, epoch), version, None)
        self.loop.call_later(1_000.0, lambda: self.keep_alive(name, epoch, version))


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(Random(5))


def start(network: MemoryNetwork, grace_ms: float = 0.0, name: str = "nameserver", address: str = ADDRESS) -> NameServerCore:
    found = NameServerCore(network.loop(name), address, Random(1), start_grace_ms=grace_ms)
    if grace_ms == 0.0:
        network.run_for(300)
    return found


@pytest.fixture
def nameserver(network: MemoryNetwork) -> NameServerCore:
    """One whose grace is over."""
    return start(network)


@pytest.fixture
def brokers(network: MemoryNetwork, nameserver: NameServerCore) -> Brokers:
    return Brokers(network)


@pytest.fixture
def client(network: MemoryNetwork, nameserver: NameServerCore) -> Peer:
    peer = Peer(network, "client")
    peer.hello()
    return peer


# --- sessions -------------------------------------------------------------------------------------------------------


def test_hello_is_welcomed_with_the_limits(network: MemoryNetwork, nameserver: NameServerCore) -> None:
    peer = Peer(network, "client")
    welcome = peer.hello()
    assert isinstance(welcome, Welcome)
    assert (welcome.protocol_version, welcome.session_timeout_ms, welcome.heartbeat_ms) == (PROTOCOL_VERSION, 10_000, 1_000)
    assert welcome.server_id.startswith("nameserver-")
    assert isinstance(peer.ask(Heartbeat), Alive)


def test_each_start_has_a_server_id_of_its_own(network: MemoryNetwork) -> None:
    ids = set()
    for seed in (1, 2):
        core = NameServerCore(network.loop(f"n{seed}"), f"tcp://n{seed}:1", Random(seed))
        peer = Peer(network, f"p{seed}", address=core.address)
        ids.add(peer.hello().server_id)
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(Heartbeat, ()), (QueryRoute, (["*"],)), (RegisterBroker, (info(), 1)), (Bye, ()), (DescribeTopics, ())],
)
def test_everything_else_needs_a_session(
    network: MemoryNetwork, nameserver: NameServerCore, kind: type[Request], fields: tuple[Any, ...]
) -> None:
    reply = Peer(network, "client").ask(kind, *fields)
    assert isinstance(reply, Failed)
    assert reply.code == Code.NO_SESSION


def test_bye_ends_the_session_and_its_watches(client: Peer, nameserver: NameServerCore) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    client.say(QueryRoute, ["*"], version, timeout_ms=30_000)
    assert isinstance(client.ask(Bye), Done)
    assert nameserver.watch_count == 0
    assert client.ask(Heartbeat).code == Code.NO_SESSION


def test_a_silent_client_loses_session_and_watches(network: MemoryNetwork, client: Peer, nameserver: NameServerCore) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    client.say(QueryRoute, ["*"], version, timeout_ms=60_000)
    network.run_for(9_000)
    assert nameserver.watch_count == 1
    network.run_for(2_000)
    assert nameserver.watch_count == 0
    assert client.ask(Heartbeat).code == Code.NO_SESSION


def test_a_newer_session_of_the_client_takes_the_watches_away(
    network: MemoryNetwork, client: Peer, nameserver: NameServerCore
) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    client.say(QueryRoute, ["*"], version, timeout_ms=60_000)
    assert isinstance(client.hello(epoch=2), Welcome)
    assert nameserver.watch_count == 0


def test_a_request_for_brokers_is_refused_as_unsupported(client: Peer) -> None:
    reply = client.ask(DescribeTopics)
    assert (reply.code, "ask a broker" in reply.message) == (Code.UNSUPPORTED, True)


# --- brokers --------------------------------------------------------------------------------------------------------


def test_a_registered_broker_is_in_the_answers(client: Peer, brokers: Brokers) -> None:
    assert brokers.register("a", meters=4) == Registered(brokers.number, False)
    route = client.ask(QueryRoute, ["meters"])
    assert route.brokers == [info("a")]
    assert route.topics == [TopicRoute("meters", "a", 4, 6)]


def test_only_brokers_register(client: Peer) -> None:
    for reply in (client.ask(RegisterBroker, info(), 1), client.ask(UnregisterBroker, "a", 0, 1)):
        assert isinstance(reply, Failed)
        assert reply.code == Code.FORBIDDEN


def test_a_heartbeat_with_another_version_asks_for_the_table(brokers: Brokers) -> None:
    brokers.register("a", version=3, meters=4)
    assert not brokers.ask(RegisterBroker, info(), 3, None).wants_topics
    assert brokers.ask(RegisterBroker, info(), 4, None).wants_topics


def test_a_stale_registration_is_refused_with_facts(brokers: Brokers) -> None:
    brokers.register("a", epoch=5)
    reply = brokers.register("a", epoch=4)
    assert (reply.code, reply.facts["epoch"], reply.facts["broker_name"]) == (Code.FORBIDDEN, 5, "a")
    assert brokers.ask(UnregisterBroker, "a", 0, 4).code == Code.FORBIDDEN
    assert isinstance(brokers.ask(UnregisterBroker, "a", 0, 5), Done)
    assert isinstance(brokers.ask(UnregisterBroker, "a", 0, 5), Done), "leaving twice is leaving"


def test_a_broker_that_falls_silent_is_suspected_and_then_gone(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    brokers.register("a", meters=4)
    network.run_for(2_500)
    assert not client.ask(QueryRoute, ["*"]).brokers[0].suspect
    network.run_for(900)
    assert client.ask(QueryRoute, ["*"]).brokers[0].suspect
    for _ in range(7):
        network.run_for(1_000)
        client.ask(Heartbeat)
    assert client.ask(QueryRoute, ["*"]).brokers == []


def test_a_broker_that_heartbeats_stays(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    brokers.register("a", meters=4)
    brokers.keep_alive("a")
    for _ in range(30):
        network.run_for(1_000)
        client.ask(Heartbeat)
    assert client.ask(QueryRoute, ["*"]).brokers == [info("a")]


def test_a_pause_of_the_nameserver_is_not_the_brokers_silence(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    brokers.register("a", meters=4)
    brokers.keep_alive("a")
    network.run_for(2_000)
    loop = network.loops["nameserver"]
    loop.pause()
    network.run_for(8_000)
    number = client.say(QueryRoute, ["*"], timeout_ms=60_000)
    loop.resume()
    network.run_until(lambda: client.answer(number) is not None)
    assert client.answer(number).brokers == [info("a")]  # type: ignore[union-attr]


# --- watches --------------------------------------------------------------------------------------------------------


def test_a_watch_is_answered_within_milliseconds_of_a_change(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    version = client.ask(QueryRoute, ["meters"]).version
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=30_000)
    network.run_for(1_000)
    assert client.answer(number) is None
    brokers.register("a", meters=4)
    network.run_for(5)
    route = client.answer(number)
    assert isinstance(route, Route)
    assert route.version != version
    assert route.topics == [TopicRoute("meters", "a", 4, 6)]


def test_an_old_version_is_answered_at_once(client: Peer, brokers: Brokers) -> None:
    version = client.ask(QueryRoute, ["meters"]).version
    brokers.register("a", meters=4)
    assert client.ask(QueryRoute, ["meters"], version, timeout_ms=30_000).topics


def test_a_watch_sleeps_through_changes_of_other_topics(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    brokers.register("a", meters=4)
    version = client.ask(QueryRoute, ["meters"]).version
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=30_000)
    brokers.register("a", version=2, meters=4, alarms=1)
    network.run_for(500)
    assert client.answer(number) is None
    brokers.register("a", version=3, meters=5)
    network.run_for(5)
    assert client.answer(number) is not None


def test_a_watch_repeats_its_version_shortly_before_the_client_gives_up(
    network: MemoryNetwork, client: Peer, brokers: Brokers
) -> None:
    version = client.ask(QueryRoute, ["meters"]).version
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=5_000)
    network.run_for(4_400)
    assert client.answer(number) is None
    network.run_for(500)
    assert client.answer(number).version == version  # type: ignore[union-attr]


def test_an_endless_watch_is_answered_after_a_minute(network: MemoryNetwork, client: Peer) -> None:
    version = client.ask(QueryRoute, ["meters"]).version
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=0)
    for _ in range(59):
        network.run_for(1_000)
        client.ask(Heartbeat)
    assert client.answer(number) is None
    network.run_for(1_000)
    assert client.answer(number) is not None


def test_changes_of_one_turn_wake_a_watch_once(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    number = client.say(QueryRoute, ["*"], version, timeout_ms=30_000)
    network.run_for(10)
    nameserver_loop = network.loops["nameserver"]
    nameserver_loop.pause()
    numbers = [
        brokers.say(RegisterBroker, info(name), 1, [TopicRoute("meters", name, 4, 6)]) for name in ("a", "b", "c")
    ]
    network.run_for(50)
    nameserver_loop.resume()
    network.run_until(lambda: brokers.answer(numbers[-1]) is not None)
    network.run_for(10)
    answers = [reply for reply in client.heard if reply.number == number]
    assert [len(route.brokers) for route in answers] == [3]  # type: ignore[union-attr]


def test_suspicion_wakes_watches(network: MemoryNetwork, client: Peer, brokers: Brokers) -> None:
    brokers.register("a", meters=4)
    version = client.ask(QueryRoute, ["meters"]).version
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=30_000)
    network.run_for(3_500)
    assert client.answer(number).brokers[0].suspect  # type: ignore[union-attr]


def test_beyond_its_bound_a_sessions_oldest_watch_is_answered(
    network: MemoryNetwork, client: Peer, nameserver: NameServerCore
) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    numbers = [client.say(QueryRoute, ["*"], version, timeout_ms=30_000) for _ in range(limits.WATCHES_PER_SESSION_MAX)]
    network.run_for(100)
    assert all(client.answer(number) is None for number in numbers)
    client.say(QueryRoute, ["*"], version, timeout_ms=30_000)
    network.run_for(100)
    assert [client.answer(number) is None for number in numbers] == [False, True, True, True]
    assert nameserver.watch_count == limits.WATCHES_PER_SESSION_MAX


@pytest.mark.parametrize(("name", "bound"), [("WATCHES_MAX", 1), ("WATCHED_TOPICS_MAX", 1)])
def test_watches_of_all_clients_are_bounded(
    network: MemoryNetwork, client: Peer, monkeypatch: pytest.MonkeyPatch, name: str, bound: int
) -> None:
    monkeypatch.setattr(core_module, name, bound)
    version = client.ask(QueryRoute, ["*"]).version
    client.say(QueryRoute, ["*"], version, timeout_ms=30_000)
    assert client.ask(QueryRoute, ["*"], version, timeout_ms=30_000).code == Code.TOO_MANY_REQUESTS
    assert isinstance(client.ask(Bye), Done)
    client.hello()
    number = client.say(QueryRoute, ["*"], version, timeout_ms=30_000)
    network.run_for(100)
    assert client.answer(number) is None, "the bound counts what is held, not what was"


def test_a_client_that_vanished_holds_no_watch_after_the_next_change(
    network: MemoryNetwork, client: Peer, brokers: Brokers, nameserver: NameServerCore
) -> None:
    version = client.ask(QueryRoute, ["*"]).version
    client.say(QueryRoute, ["*"], version, timeout_ms=60_000)
    network.run_for(10)
    client.loop.close()
    network.run_for(100)
    brokers.register("a", meters=4)
    network.run_for(10)
    assert nameserver.watch_count == 0


# --- the start-up grace ---------------------------------------------------------------------------------------------


def test_during_the_grace_an_unknown_topic_is_not_yet_known(network: MemoryNetwork) -> None:
    start(network, grace_ms=3_000)
    client, brokers = Peer(network, "client"), Brokers(network)
    client.hello()
    assert client.ask(QueryRoute, ["meters"]).code == Code.NOT_READY
    assert client.ask(QueryRoute, ["*"]).code == Code.NOT_READY
    brokers.register("a", meters=4)
    assert client.ask(QueryRoute, ["meters"]).topics
    assert client.ask(QueryRoute, ["meters", "alarms"]).code == Code.NOT_READY
    network.run_for(3_000)
    assert client.ask(QueryRoute, ["alarms"]).topics == []


def test_after_a_restart_a_client_keeps_its_route_until_the_nameserver_knows_as_much(network: MemoryNetwork) -> None:
    first = start(network)
    brokers, client = Brokers(network), Peer(network, "client")
    client.hello()
    brokers.register("a", meters=4)
    brokers.register("b", meters=4)
    version = client.ask(QueryRoute, ["meters"]).version
    network.loops["nameserver"].close()
    assert first is not start(network, grace_ms=3_000)
    network.run_until(lambda: not client.is_connected and not brokers.is_connected)
    client.hello(epoch=2)
    brokers.hello(epoch=2)
    number = client.say(QueryRoute, ["meters"], version, timeout_ms=60_000)
    brokers.register("a", meters=4)
    network.run_for(500)
    assert client.answer(number) is None, "half of the brokers is less than the client knows"
    brokers.register("b", meters=4)
    network.run_for(500)
    assert client.answer(number) is None, "it knows just that"
    brokers.register("b", version=2, meters=5)
    network.run_for(10)
    assert [route.queue_count for route in client.answer(number).topics] == [4, 5]  # type: ignore[union-attr]


def listen_long(network: MemoryNetwork, brokers: Brokers, client: Peer, until_ms: float) -> None:
    """Time passes and everybody gives signs of life."""
    while network.now_ms < until_ms:
        network.run_for(500)
        client.say(Heartbeat)


def test_what_a_client_knows_is_spoilt_only_when_a_broker_would_be_gone(network: MemoryNetwork) -> None:
    start(network, grace_ms=3_000)
    client, brokers = Peer(network, "client"), Brokers(network)
    client.hello()
    brokers.register("a", meters=4)
    brokers.keep_alive("a")
    number = client.say(QueryRoute, ["meters"], 12_345, timeout_ms=60_000)
    listen_long(network, brokers, client, 12_500)
    assert client.answer(number) is None
    listen_long(network, brokers, client, 14_000)
    assert [broker.broker_name for broker in client.answer(number).brokers] == ["a"]  # type: ignore[union-attr]


def test_a_question_for_other_topics_waits_for_the_grace_only(network: MemoryNetwork) -> None:
    start(network, grace_ms=3_000)
    client, brokers = Peer(network, "client"), Brokers(network)
    client.hello()
    brokers.register("a", meters=4)
    number = client.say(QueryRoute, ["meters"], ROUTE_OF_OTHERS, timeout_ms=60_000)
    network.run_for(2_500)
    assert client.answer(number) is None
    network.run_for(1_000)
    assert client.answer(number) is not None


def test_a_watch_that_ends_within_the_grace_is_told_it_is_too_early(network: MemoryNetwork) -> None:
    start(network, grace_ms=3_000)
    client = Peer(network, "client")
    client.hello()
    assert client.ask(QueryRoute, ["meters"], 12_345, timeout_ms=900).code == Code.NOT_READY


# --- hostile --------------------------------------------------------------------------------------------------------


def test_too_many_topics_in_one_question_are_refused(client: Peer) -> None:
    topics = [f"t{number}" for number in range(limits.QUERY_TOPICS_MAX + 1)]
    assert client.ask(QueryRoute, topics).code == Code.BAD_REQUEST
    assert isinstance(client.ask(QueryRoute, topics[1:]), Route)
    assert isinstance(client.ask(QueryRoute, ["t1"] * (limits.QUERY_TOPICS_MAX + 1)), Route)


def test_a_topic_that_cannot_be_is_refused(client: Peer) -> None:
    assert client.ask(QueryRoute, ["a b"]).code == Code.ILLEGAL_TOPIC
    assert client.ask(QueryRoute, ["x" * 200]).code == Code.ILLEGAL_TOPIC


def test_an_answer_beyond_a_headers_size_is_refused_not_sent(client: Peer, brokers: Brokers) -> None:
    for name in (letter * 110 for letter in "abcde"):
        brokers.register(name, **{f"{name}{number}": 4 for number in range(8_000)})
    reply = client.ask(QueryRoute, ["*"])
    assert isinstance(reply, Failed)
    assert reply.code == Code.PAYLOAD_TOO_LARGE
    assert isinstance(client.ask(QueryRoute, [f"{'a' * 110}7"]), Route)


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x93\x01\x07\x00" + b"x" * HEADER_BYTES_MAX, b"\x93\xff\x07\x00"])
def test_what_is_no_request_gets_an_error(client: Peer, header: bytes) -> None:
    heard = len(client.heard)
    client.connection.send([header])
    client.network.run_until(lambda: len(client.heard) > heard)
    reply = client.heard[-1]
    assert isinstance(reply, Failed)
    assert reply.code in (Code.BAD_REQUEST, Code.PAYLOAD_TOO_LARGE)
    assert isinstance(client.ask(Heartbeat), Alive)


def test_a_large_answer_to_a_client_that_does_not_read_is_refused(
    client: Peer, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    brokers.register("a", **{f"topic-{number}": 4 for number in range(500)})
    with monkeypatch.context() as full:
        full.setattr(memory_module, "UNREAD_BYTES_MAX", 0)
        assert client.ask(QueryRoute, ["*"]).code == Code.TOO_MANY_REQUESTS
        assert isinstance(client.ask(QueryRoute, ["topic-7"]), Route)
    assert isinstance(client.ask(QueryRoute, ["*"]), Route)


def test_a_message_that_was_cut_off_is_refused(client: Peer) -> None:
    heard = len(client.heard)
    client.connection.send([encode(Heartbeat(77, 0)), *[b""] * FRAME_COUNT_MAX])
    client.network.run_until(lambda: len(client.heard) > heard)
    reply = client.heard[-1]
    assert isinstance(reply, Failed)
    assert (reply.number, reply.code) == (77, Code.PAYLOAD_TOO_LARGE)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=6) | st.binary(max_size=6)
    | st.sampled_from(["a", "*", "broker", "MASTER", "tcp://a:1"]),
    lambda inner: st.lists(inner, max_size=7), max_leaves=20,
)
tags = st.sampled_from([1, 2, 3, 10, 11, 12, 20, 30, 31, 100])


headers = st.binary(max_size=40) | st.tuples(tags, values, values, values, values, values).map(msgspec.msgpack.encode)


@given(st.lists(headers, max_size=8))
@settings(max_examples=50)
def test_no_bytes_end_a_nameserver(messages: list[bytes]) -> None:
    network = MemoryNetwork(Random(5))
    nameserver = start(network)
    hostile, other = Brokers(network, "hostile"), Peer(network, "other")
    for message in messages:
        hostile.connection.send([message])
        nameserver.handle(b"nobody", [message, b"payload"])
        nameserver.handle(b"nobody", [])
    network.run_for(100)
    assert isinstance(other.hello(), Welcome)
    assert isinstance(other.ask(QueryRoute, ["*"]), Route)


def test_a_fault_of_ours_is_answered_and_logged(
    client: Peer, nameserver: NameServerCore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nameserver._table, "answer", lambda topics: 1 // 0)
    reply = client.ask(QueryRoute, ["meters"])
    assert reply.code == Code.INTERNAL_ERROR
    assert "ZeroDivisionError" in capsys.readouterr().err


# --- life cycle -----------------------------------------------------------------------------------------------------


def test_an_address_has_one_nameserver(network: MemoryNetwork, nameserver: NameServerCore) -> None:
    with pytest.raises(AddressInUseError):
        NameServerCore(network.loop("other"), ADDRESS, Random(2))


def test_port_0_is_shown_as_the_port_that_was_picked(network: MemoryNetwork) -> None:
    core = NameServerCore(network.loop("other"), "tcp://other:0", Random(2))
    assert core.address.startswith("tcp://other:")
    assert not core.address.endswith(":0")


def test_a_closed_nameserver_lets_go_of_its_address(network: MemoryNetwork, nameserver: NameServerCore, client: Peer) -> None:
    nameserver.close()
    network.run_until(lambda: not client.is_connected)
    core = NameServerCore(network.loop("other"), ADDRESS, Random(2))
    network.run_until(lambda: client.is_connected)
    assert isinstance(client.hello(epoch=2), Welcome)
    core.close()
    network.run_for(5_000)
