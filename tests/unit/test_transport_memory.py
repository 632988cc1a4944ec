"""zrmq/transport/memory.py: the faults, and that a seed gives one run. What it shares with the reactor is in tests/contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import AddressInUseError, ClosedError
from zrmq.protocol.limits import MESSAGE_BYTES_MAX, UNREAD_BYTES_MAX
from zrmq.transport.circuit import KEEPALIVE_INTERVAL_MS, PIPE_MESSAGES_MAX, UNANSWERED_MS_MAX
from zrmq.transport.memory import RECONNECT_MS_MAX, START_TIME_MS, MemoryEndpoint, MemoryNetwork
from zrmq.transport.options import RECONNECT_BACKOFF_MS_MAX

ADDRESS = "tcp://server:1"
GIVE_UP_MS = UNANSWERED_MS_MAX + KEEPALIVE_INTERVAL_MS


class Pair:
    """A server that writes down, and a client that does too, with the time of everything."""

    def __init__(self, seed: int = 1, delay_ms: tuple[float, float] = (1.0, 5.0)) -> None:
        self.network = MemoryNetwork(Random(seed), delay_ms=delay_ms)
        self.there, self.here = self.network.loop("server"), self.network.loop("client")
        self.received: list[tuple[bytes, bytes]] = []
        self.heard: list[bytes] = []
        self.events: list[tuple[str, float]] = []
        self.endpoint = self.listen()
        self.connection = self.here.connect(ADDRESS, self)

    def listen(self) -> MemoryEndpoint:
        return self.there.listen(ADDRESS, lambda peer, frames: self.received.append((peer, frames[0])))

    def on_connected(self) -> None:
        self.events.append(("connected", self.network.now_ms))

    def on_disconnected(self) -> None:
        self.events.append(("disconnected", self.network.now_ms))

    def on_frames(self, frames: list[bytes]) -> None:
        self.heard.append(frames[0])

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def connect(self) -> bytes:
        """Be connected, and return the peer the server knows."""
        self.network.run_until(lambda: self.names[-1:] == ["connected"])
        return self.send_until_heard()

    def send_until_heard(self) -> bytes:
        count = len(self.received)
        assert self.connection.send([b"hello"])
        self.network.run_until(lambda: len(self.received) > count)
        return self.received[-1][0]

    def received_bodies(self) -> list[bytes]:
        return [body for _, body in self.received if body != b"hello"]


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def peer(pair: Pair) -> bytes:
    return pair.connect()


BODIES = [b"%d" % number for number in range(100)]


def send_all(send: Callable[[bytes], bool]) -> None:
    for body in BODIES:
        assert send(body)


# --- time ---------------------------------------------------------------------------------------------------------------


def test_time_passes_only_by_running(pair: Pair) -> None:
    assert pair.here.clock.monotonic_ms() == 0.0
    assert pair.here.clock.time_ms() == START_TIME_MS
    pair.network.run_for(1_234.5)
    assert pair.here.clock.monotonic_ms() == pair.there.clock.monotonic_ms() == 1_234.5
    assert pair.here.clock.time_ms() == START_TIME_MS + 1_234


def test_a_wall_clock_steps_alone(pair: Pair) -> None:
    pair.here.clock.step(-60_000)
    assert pair.here.clock.time_ms() == START_TIME_MS - 60_000
    assert pair.there.clock.time_ms() == START_TIME_MS
    assert pair.here.clock.monotonic_ms() == 0.0


def test_waiting_for_what_never_comes_ends(pair: Pair) -> None:
    with pytest.raises(TimeoutError, match="virtual ms"):
        pair.network.run_until(lambda: False, limit_ms=5_000)
    assert pair.network.now_ms <= 5_000


def test_waiting_when_nothing_can_happen_any_more_ends() -> None:
    network = MemoryNetwork(Random(1))
    with pytest.raises(TimeoutError):
        network.run_until(lambda: False)


def test_an_exception_of_a_callback_reaches_the_test(pair: Pair) -> None:
    pair.here.call_later(5, lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        pair.network.run_for(10)


def test_a_test_can_strike_at_a_time_of_its_choice(pair: Pair) -> None:
    struck: list[float] = []
    pair.network.schedule(None, 77.0, lambda: struck.append(pair.network.now_ms))
    pair.network.run_for(100)
    assert struck == [77.0]


# --- messages -----------------------------------------------------------------------------------------------------------


def test_each_message_takes_its_time_and_none_overtakes(pair: Pair, peer: bytes) -> None:
    sent_ms = pair.network.now_ms
    arrivals: list[float] = []
    pair.endpoint._handler = lambda peer, frames: arrivals.append(pair.network.now_ms)
    send_all(lambda body: pair.connection.send([body]))
    pair.network.run_for(100)
    assert len(arrivals) == 100
    assert arrivals == sorted(arrivals)
    assert arrivals[0] - sent_ms >= 1.0
    assert arrivals[-1] - sent_ms <= 5.0


def test_a_pipe_is_full_at_its_bound(pair: Pair, peer: bytes) -> None:
    for send in (lambda: pair.connection.send([b"x"]), lambda: pair.endpoint.send(peer, [b"x"])):
        assert all(send() for _ in range(PIPE_MESSAGES_MAX))
        assert not send()
    assert pair.endpoint.unreachable_count == 1
    pair.network.run_for(100)
    assert pair.connection.send([b"room again"])


def test_a_peer_with_much_under_way_has_no_room(pair: Pair, peer: bytes) -> None:
    assert pair.endpoint.has_room(peer)
    assert pair.endpoint.has_room(b"nobody")
    while pair.endpoint.has_room(peer):
        assert pair.endpoint.send(peer, [b"header", bytes(UNREAD_BYTES_MAX // 4)])
    heard = len(pair.heard)
    pair.network.run_until(lambda: len(pair.heard) == heard + 4)
    assert pair.endpoint.has_room(peer)


def test_a_frame_beyond_the_limit_costs_the_connection(pair: Pair, peer: bytes) -> None:
    assert pair.connection.send([b"h", bytes(MESSAGE_BYTES_MAX + 1)])
    pair.network.run_until(lambda: pair.names == ["connected", "disconnected", "connected"])


# --- connections that break ---------------------------------------------------------------------------------------------


def test_both_sides_hear_of_a_broken_connection_and_a_new_one_is_made(pair: Pair, peer: bytes) -> None:
    pair.network.break_connections("client", "server")
    assert pair.connection.send([b"into the void"]), "we have not heard of it yet"
    pair.network.run_for(20)
    assert pair.names == ["connected", "disconnected"]
    assert not pair.connection.send([b"now we have"])
    assert not pair.endpoint.send(peer, [b"so has the server"])
    assert pair.connect() != peer
    assert pair.received_bodies() == []


@given(seed=st.integers(0, 10_000))
def test_of_what_is_under_way_when_it_breaks_the_oldest_may_arrive(seed: int) -> None:
    pair = Pair(seed)
    peer = pair.connect()
    send_all(lambda body: pair.connection.send([body]))
    send_all(lambda body: pair.endpoint.send(peer, [body]))
    pair.network.break_connections("server", "client")
    pair.network.run_for(5_000)
    for arrived in (pair.received_bodies(), pair.heard):
        assert arrived == BODIES[: len(arrived)]


def test_seeds_differ_in_how_much_of_it_arrives() -> None:
    counts = set()
    for seed in range(20):
        pair = Pair(seed)
        pair.connect()
        send_all(lambda body, pair=pair: pair.connection.send([body]))  # type: ignore[misc]
        pair.network.break_connections("client", "server")
        pair.network.run_for(5_000)
        counts.add(len(pair.received_bodies()))
    assert min(counts) < 20
    assert max(counts) > 80


def test_what_had_arrived_before_a_pause_is_read_after_it(pair: Pair, peer: bytes) -> None:
    pair.there.pause()
    send_all(lambda body: pair.connection.send([body]))
    pair.network.run_for(100)
    pair.network.break_connections("client", "server")
    pair.there.resume()
    pair.network.run_for(100)
    assert pair.received_bodies() == BODIES


@given(seed=st.integers(0, 10_000))
def test_what_was_held_back_arrives_after_what_came_by_the_next_connection(seed: int) -> None:
    pair = Pair(seed)
    old = pair.connect()
    pair.network.hold_back("client", "server", 2_000.0)
    send_all(lambda body: pair.connection.send([body]))
    pair.network.break_connections("client", "server")
    pair.network.run_for(10.0)
    new = pair.connect()
    pair.network.run_for(1_000.0)
    assert [peer for peer, _ in pair.received] == [old, new]
    pair.network.run_for(2_000.0)
    late = [body for peer, body in pair.received[2:] if peer == old]
    assert late == BODIES[: len(late)], "in order, as far as they arrive, and never twice"
    assert pair.network.overtaken_count == len(late)
    assert not pair.endpoint.send(old, [b"the server has heard of its end by now"])
    assert pair.send_until_heard() == new


def test_what_is_held_back_only_comes_late_when_nothing_breaks(pair: Pair, peer: bytes) -> None:
    pair.network.hold_back("client", "server", 300.0)
    send_all(lambda body: pair.connection.send([body]))
    pair.network.run_for(299.0)
    assert pair.received_bodies() == []
    pair.network.run_for(10.0)
    assert pair.received_bodies() == BODIES
    assert pair.network.overtaken_count == 0


def test_a_crashed_server_is_noticed_and_its_successor_found(pair: Pair, peer: bytes) -> None:
    pair.there.call_later(50, lambda: pair.events.append(("ghost", 0.0)))
    pair.there.close()
    pair.network.run_for(5_000)
    assert pair.names == ["connected", "disconnected"]
    pair.there = pair.network.loop("server")
    pair.endpoint = pair.listen()
    assert pair.connect() != peer


def test_a_crashed_client_is_gone_for_the_server(pair: Pair, peer: bytes) -> None:
    pair.here.close()
    pair.network.run_for(20)
    assert not pair.endpoint.send(peer, [b"?"])
    assert pair.network.circuits == {}


def test_an_attempt_to_connect_slows_down_without_a_server() -> None:
    network = MemoryNetwork(Random(1))
    loop = network.loop("client")
    looks: list[float] = []

    class Endpoints(dict[str, MemoryEndpoint]):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            looks.append(network.now_ms)

    network.endpoints = Endpoints()
    loop.connect_push(ADDRESS)
    network.run_for(120_000)
    spans = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert spans[0] < 200
    assert max(spans) <= RECONNECT_MS_MAX
    assert len(looks) < 200


def test_attempts_come_as_seldom_as_those_of_zeromq() -> None:
    assert RECONNECT_MS_MAX == RECONNECT_BACKOFF_MS_MAX


def test_a_dealer_does_not_connect_to_a_pull(pair: Pair) -> None:
    pair.there.listen_pull("tcp://server:2", lambda peer, frames: None)
    other = pair.here.connect("tcp://server:2", pair)
    pair.network.run_for(5_000)
    assert not other.send([b"x"])
    assert pair.names == ["connected"], "that is the other connection's"


# --- cuts ---------------------------------------------------------------------------------------------------------------


def test_a_short_cut_only_delays(pair: Pair, peer: bytes) -> None:
    pair.network.cut("client", "server")
    send_all(lambda body: pair.connection.send([body]))
    send_all(lambda body: pair.endpoint.send(peer, [body]))
    pair.network.run_for(8_000)
    assert pair.received_bodies() == pair.heard == []
    pair.network.heal("server", "client")
    pair.network.run_for(10)
    assert pair.received_bodies() == pair.heard == BODIES
    pair.network.run_for(60_000)
    assert pair.names == ["connected"]


def test_messages_before_during_and_after_a_cut_stay_in_order(pair: Pair, peer: bytes) -> None:
    for part in range(4):
        for body in BODIES[part * 25 : part * 25 + 25]:
            pair.connection.send([body])
        pair.network.run_for(2)
        (pair.network.heal if part % 2 else pair.network.cut)("client", "server")
    pair.network.run_for(100)
    assert pair.received_bodies() == BODIES


@pytest.mark.parametrize("one_way", [("client", "server"), ("server", "client"), None])
def test_a_long_cut_ends_connections_by_heartbeat(pair: Pair, peer: bytes, one_way: tuple[str, str] | None) -> None:
    cut_ms = pair.network.now_ms
    if one_way is None:
        pair.network.cut("client", "server")
    else:
        pair.network.cut(*one_way, one_way=True)
    pair.network.run_for(8_999)
    assert pair.connection.send([b"x"])
    assert pair.endpoint.send(peer, [b"x"])
    pair.network.run_for(GIVE_UP_MS - 8_999)
    assert pair.names == ["connected", "disconnected"]
    assert UNANSWERED_MS_MAX <= pair.events[-1][1] - cut_ms <= GIVE_UP_MS
    assert not pair.endpoint.send(peer, [b"x"])
    pair.network.run_for(60_000)
    assert pair.names == ["connected", "disconnected"]
    pair.network.heal("client", "server")
    assert pair.connect() != peer


def test_a_one_way_cut_lets_the_other_way_pass(pair: Pair, peer: bytes) -> None:
    pair.network.cut("client", "server", one_way=True)
    pair.connection.send([b"held"])
    pair.endpoint.send(peer, [b"passes"])
    pair.network.run_for(100)
    assert (pair.received_bodies(), pair.heard) == ([], [b"passes"])


def test_a_cut_outlives_a_restart(pair: Pair, peer: bytes) -> None:
    pair.network.cut("client", "server")
    pair.there.close()
    pair.there = pair.network.loop("server")
    pair.endpoint = pair.listen()
    pair.network.run_for(30_000)
    assert pair.names == ["connected", "disconnected"]
    pair.network.heal("client", "server")
    pair.connect()


def test_a_crash_behind_a_cut_is_heard_of_when_it_heals(pair: Pair, peer: bytes) -> None:
    pair.network.cut("client", "server")
    pair.there.close()
    pair.network.run_for(1_000)
    assert pair.names == ["connected"]
    pair.network.heal("client", "server")
    pair.network.run_for(20)
    assert pair.names == ["connected", "disconnected"]


@given(seed=st.integers(0, 10_000))
def test_after_a_cut_one_side_may_believe_longer_than_the_other(seed: int) -> None:
    """The half-open connection: the client is back with a new one while the server still has the old."""
    pair = Pair(seed)
    peer = pair.connect()
    pair.network.cut("client", "server")
    client_ms = server_ms = 0.0
    while not (client_ms and server_ms):
        pair.network.run_for(10)
        if not client_ms and "disconnected" in pair.names:
            client_ms = pair.network.now_ms
        if not server_ms and peer not in pair.endpoint._peers:
            server_ms = pair.network.now_ms
    assert abs(client_ms - server_ms) <= KEEPALIVE_INTERVAL_MS + 20


# --- half-open connections ----------------------------------------------------------------------------------------------


def test_a_half_open_connection_swallows_and_new_ones_work(pair: Pair, peer: bytes) -> None:
    pair.connection.send([b"under way"])
    pair.network.half_open("client", "server")
    send_all(lambda body: pair.connection.send([body]))
    send_all(lambda body: pair.endpoint.send(peer, [body]))
    fresh = Pair.__new__(Pair)
    fresh.network, fresh.events, fresh.heard = pair.network, [], []
    other = pair.here.connect(ADDRESS, fresh)
    pair.network.run_for(1_000)
    assert other.send([b"fresh"])
    pair.network.run_for(100)
    assert pair.received_bodies() == [b"fresh"]
    assert pair.names == ["connected"]
    pair.network.run_for(GIVE_UP_MS)
    assert pair.names == ["connected"], "nothing tells them"
    assert pair.endpoint.send(peer, [b"to nobody"])
    assert pair.heard == []


def test_closing_a_half_open_connection_is_not_noticed_by_the_server(pair: Pair, peer: bytes) -> None:
    pair.network.half_open("client", "server")
    pair.connection.close()
    pair.network.run_for(5_000)
    pair.network.run_for(GIVE_UP_MS)
    assert pair.endpoint.send(peer, [b"nobody told us"])


# --- pauses -------------------------------------------------------------------------------------------------------------


def test_a_paused_loop_does_nothing_and_then_everything_in_one_turn(pair: Pair, peer: bytes) -> None:
    turns: list[int] = []
    fired: list[str] = []
    pair.there.before_sleep(lambda: turns.append(len(pair.received)))
    pair.there.call_later(100, lambda: fired.append("timer"))
    pair.there.pause()
    before = (len(turns), len(pair.received))
    send_all(lambda body: pair.connection.send([body]))
    pair.network.run_for(5_000)
    assert (len(turns), len(pair.received)) == before
    assert fired == []
    pair.there.resume()
    pair.network.run_for(0)
    assert pair.received_bodies() == BODIES
    assert fired == ["timer"]
    assert len(turns) == before[0] + 1
    assert pair.names == ["connected"]


def test_a_pause_that_outlasts_the_heartbeats_costs_the_connection(pair: Pair, peer: bytes) -> None:
    pair.there.pause()
    pair.connection.send([b"arrives all the same"])
    pair.network.run_for(60_000)
    assert pair.names == ["connected", "disconnected"]
    assert pair.endpoint.send(peer, [b"the server knows nothing yet"])
    pair.there.resume()
    pair.network.run_for(20)
    assert not pair.endpoint.send(peer, [b"now it does"])
    assert pair.received_bodies() == [b"arrives all the same"]
    assert pair.connect() != peer


def test_a_paused_client_finds_its_connection_gone(pair: Pair, peer: bytes) -> None:
    pair.here.pause()
    pair.network.run_for(30_000)
    assert not pair.endpoint.send(peer, [b"?"])
    assert pair.names == ["connected"]
    pair.here.resume()
    pair.network.run_for(20)
    assert pair.names == ["connected", "disconnected"]
    pair.connect()


def test_nobody_connects_to_a_paused_server(pair: Pair) -> None:
    pair.there.pause()
    pair.network.run_for(20_000)
    assert pair.names == []
    pair.there.resume()
    pair.connect()


def test_a_loop_closed_in_its_pause_never_wakes(pair: Pair, peer: bytes) -> None:
    fired: list[int] = []
    pair.there.call_later(10, lambda: fired.append(1))
    pair.there.pause()
    pair.network.run_for(20)
    pair.there.close()
    pair.there.resume()
    pair.network.run_for(20)
    assert fired == []


# --- loops and names ----------------------------------------------------------------------------------------------------


def test_a_name_is_free_again_after_a_crash(pair: Pair) -> None:
    with pytest.raises(AddressInUseError):
        pair.network.loop("server")
    pair.there.close()
    pair.network.loop("server")


def test_a_closed_loop_takes_no_sockets_and_no_calls(pair: Pair) -> None:
    pair.here.close()
    pair.here.close()
    for call in (
        lambda: pair.here.connect(ADDRESS, pair), lambda: pair.here.listen("tcp://x:1", lambda peer, frames: None),
        lambda: pair.here.call_soon_threadsafe(lambda: None),
    ):
        with pytest.raises(ClosedError):
            call()
    pair.here.call_later(1, lambda: pytest.fail("it has ended"))
    pair.network.run_for(10)


def test_a_loop_that_closes_itself_stops_in_the_middle_of_its_turn(pair: Pair) -> None:
    order: list[str] = []
    pair.here.before_sleep(lambda: order.append("hook"))
    pair.network.run_for(1_000)
    order.clear()
    pair.here.call_later(1, lambda: (order.append("closing"), pair.here.close()))  # type: ignore[func-returns-value]
    pair.here.call_later(1, lambda: order.append("never"))
    pair.network.run_for(1_000)
    assert order == ["closing"]


def test_port_zero_picks_ports_that_differ(pair: Pair) -> None:
    addresses = {pair.there.listen("tcp://server:0", lambda peer, frames: None).address for _ in range(10)}
    assert len(addresses) == 10
    assert all(not address.endswith(":0") for address in addresses)


# --- runs that repeat ---------------------------------------------------------------------------------------------------


def story(seed: int) -> list[object]:
    """A run with everything in it, told in full."""
    pair = Pair(seed, delay_ms=(0.1, 30.0))
    told: list[object] = []
    for step in range(40):
        pair.network.run_for(300)
        pair.connection.send([b"%d" % step])
        if pair.received:
            pair.endpoint.send(pair.received[-1][0], [b"%d" % step])
        strike = (
            lambda: pair.network.break_connections("client", "server"), lambda: pair.network.cut("client", "server"),
            lambda: pair.network.heal("client", "server"), lambda: pair.network.half_open("client", "server"),
            lambda: None, lambda: pair.network.run_for(11_000),
        )[step % 6]
        strike()
        told.append((pair.network.now_ms, tuple(pair.received), tuple(pair.heard), tuple(pair.events)))
    return told


def test_the_same_seed_gives_the_same_run() -> None:
    assert story(5) == story(5)
    assert story(5) != story(6)
