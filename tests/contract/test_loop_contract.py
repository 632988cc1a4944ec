"""One suite for every `Loop`: the reactor over tcp, ipc and inproc, and its twin in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.worlds import KINDS, Client, Server, World, make_world
from zrmq.errors import AddressInUseError, ClosedError, InvalidArgumentError
from zrmq.protocol.limits import FRAME_COUNT_MAX


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = make_world(request.param, tmp_path, request.node.name)
    yield made
    made.close()


@pytest.fixture
def server(world: World) -> Server:
    return Server(world, world.any_address)


# --- messages -----------------------------------------------------------------------------------------------------------


def test_answers_come_back(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    assert client.send(b"header", b"payload")
    world.wait_for(lambda: bool(client.messages))
    assert client.messages == [[b"header", b"payload"]]
    assert client.events == ["connected"]


def test_what_is_connected_before_the_server_is_up_connects_when_it_is(world: World) -> None:
    first = Server(world, world.any_address)
    address = first.address
    first.close()
    client = Client(world, address)
    assert not client.send(b"nobody hears this")
    server = Server(world, address)
    client.wait_connected()
    assert client.send(b"hello")
    server.wait_messages(1)
    assert server.messages[0][1] == [b"hello"]


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 1, 64 * 1024, 5_000_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_frames_of_any_size_and_kind_arrive_as_bytes(
    world: World, server: Server, size: int, kind: Callable[[bytes], bytes]
) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    pattern = bytes(range(256)) * (size // 256 + 1)
    body = pattern[:size]
    assert client.send(b"h", kind(body), kind(body[:100]))
    world.wait_for(lambda: bool(client.messages))
    assert client.messages == [[b"h", body, body[:100]]]
    assert all(type(frame) is bytes for frame in client.messages[0] + server.messages[0][1])


def test_a_message_of_many_frames_stays_one(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    frames = [b"%d" % number for number in range(FRAME_COUNT_MAX)]
    assert client.send(*frames)
    assert client.send(b"next")
    world.wait_for(lambda: len(client.messages) == 2)
    assert client.messages == [frames, [b"next"]]


def test_thousands_under_way_arrive_once_and_in_order(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    bodies = [b"%d" % number for number in range(5_000)]
    assert world.on(world.here, lambda: all(client.connection.send([body]) for body in bodies))
    world.wait_for(lambda: len(client.messages) == len(bodies))
    assert [frames[0] for frames in client.messages] == bodies
    assert [frames[0] for _, frames in server.messages] == bodies


def test_each_client_gets_its_own_answers(world: World, server: Server) -> None:
    clients = [Client(world, server.address) for _ in range(5)]
    for number, client in enumerate(clients):
        client.wait_connected()
        assert client.send(b"%d" % number)
    world.wait_for(lambda: all(client.messages for client in clients))
    assert [client.messages for client in clients] == [[[b"%d" % number]] for number in range(5)]
    assert len({peer for peer, _ in server.messages}) == 5


def test_a_server_may_speak_first_to_a_peer_it_knows(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    client.send(b"here I am")
    server.wait_messages(1)
    assert server.send(server.messages[0][0], [b"notice"])
    world.wait_for(lambda: [b"notice"] in client.messages)


# --- one way ------------------------------------------------------------------------------------------------------------


def push_until_taken(world: World, address: str, bodies: list[bytes]) -> None:
    """Send all, the first as often as it takes until somebody is connected."""
    connection = world.on(world.here, lambda: world.here.connect_push(address))
    left = list(bodies)

    def push() -> None:
        while left and connection.send([left[0]]):
            left.pop(0)
        if left:
            world.here.call_later(5, push)
        else:
            world.note()

    world.on(world.here, push)
    world.wait_for(lambda: not left)


def test_one_way_messages_arrive_in_order_from_a_peer_without_a_name(world: World) -> None:
    server = Server(world, world.any_address, pull=True)
    bodies = [b"%d" % number for number in range(1_000)]
    push_until_taken(world, server.address, bodies)
    server.wait_messages(len(bodies))
    assert server.messages == [(b"", [body]) for body in bodies]


def test_a_one_way_send_is_refused_while_nobody_listens(world: World) -> None:
    server = Server(world, world.any_address, pull=True)
    address = server.address
    server.close()
    connection = world.on(world.here, lambda: world.here.connect_push(address))
    assert not world.on(world.here, lambda: connection.send([b"lost?"]))
    world.on(world.here, connection.close)
    assert not world.on(world.here, lambda: connection.send([b"closed"]))


def test_one_way_messages_go_to_a_server_that_came_back(world: World) -> None:
    server = Server(world, world.any_address, pull=True)
    push_until_taken(world, server.address, [b"before"])
    server.wait_messages(1)
    server.close()
    again = Server(world, server.address, pull=True)
    push_until_taken(world, server.address, [b"after"])
    again.wait_messages(1)
    assert again.messages == [(b"", [b"after"])]


# --- coming and going ---------------------------------------------------------------------------------------------------


def test_a_send_to_a_peer_that_left_is_false(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    client.send(b"hello")
    world.wait_for(lambda: bool(client.messages))
    peer = server.messages[0][0]
    client.close()
    gone: list[bool] = []

    def try_send() -> None:
        if server.endpoint.send(peer, [b"are you there?"]):
            world.there.call_later(1, try_send)
        else:
            gone.append(True)
            world.note()

    world.on(world.there, try_send)
    world.wait_for(lambda: bool(gone))


def test_a_send_to_a_peer_that_never_was_is_false(world: World, server: Server) -> None:
    assert not server.send(b"\0nobody", [b"hello"])
    assert not server.send(b"", [b"hello"])


def test_a_restarted_server_is_found_again_and_sees_a_new_peer(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    client.send(b"1")
    world.wait_for(lambda: bool(client.messages))
    old_peer = server.messages[0][0]
    server.close()
    world.wait_for(lambda: "disconnected" in client.events)
    assert not client.send(b"between")
    again = Server(world, server.address)
    client.wait_connected(2)
    assert client.events == ["connected", "disconnected", "connected"]
    assert not again.send(old_peer, [b"to whom?"])
    assert client.send(b"2")
    world.wait_for(lambda: len(client.messages) == 2)
    assert again.messages[0][1] == [b"2"]


def test_all_clients_find_a_restarted_server(world: World, server: Server) -> None:
    clients = [Client(world, server.address) for _ in range(20)]
    for client in clients:
        client.wait_connected()
    server.close()
    Server(world, server.address)
    for client in clients:
        client.wait_connected(2)
        assert client.send(b"again")
    world.wait_for(lambda: all(client.messages for client in clients))


def test_nothing_is_called_back_after_a_close_in_the_middle_of_sending(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()

    def send_and_close() -> int:
        sent = sum(client.connection.send([b"%d" % number]) for number in range(2_000))
        client.connection.close()
        return sent

    assert world.on(world.here, send_and_close) == 2_000
    heard = (list(client.events), len(client.messages))
    assert not client.send(b"after the end")
    client.close()
    other = Client(world, server.address)
    other.wait_connected()
    other.send(b"other")
    world.wait_for(lambda: bool(other.messages))
    assert (list(client.events), len(client.messages)) == heard
    arrived = [frames[0] for _, frames in server.messages if frames != [b"other"]]
    assert arrived == [b"%d" % number for number in range(len(arrived))], "what arrived of it is its beginning, in order"


def test_a_connection_may_be_closed_by_what_it_calls(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    client.on_frames = lambda frames: (client.messages.append(frames), client.connection.close(), world.note())  # type: ignore
    world.on(world.here, lambda: [client.connection.send([b"x"]) for _ in range(100)])
    world.wait_for(lambda: len(client.messages) == 1)
    server.wait_messages(1)
    assert not client.send(b"closed")
    assert len(client.messages) == 1


def test_an_endpoint_may_be_closed_by_what_it_calls(world: World) -> None:
    server = Server(world, world.any_address, answer=lambda peer, frames: server.endpoint.close())
    client = Client(world, server.address)
    client.wait_connected()
    world.on(world.here, lambda: [client.connection.send([b"x"]) for _ in range(100)])
    world.wait_for(lambda: "disconnected" in client.events)
    assert len(server.messages) == 1
    assert not server.send(server.messages[0][0], [b"closed"])


def test_closing_twice_does_nothing(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.close()
    client.close()
    server.close()
    server.close()


# --- addresses ----------------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_is_refused_and_its_owner_undisturbed(world: World, server: Server) -> None:
    with pytest.raises(AddressInUseError, match="choose another|use another") as caught:
        Server(world, server.address)
    assert caught.value.facts["address"] == server.address
    client = Client(world, server.address)
    client.wait_connected()
    client.send(b"still here")
    world.wait_for(lambda: bool(client.messages))


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://host", "tcp://host:99999", "udp://host:1", "inproc://", "ipc://"])
def test_what_is_no_address_is_refused(world: World, address: str) -> None:
    for call in (
        lambda: world.here.connect(address, Client.__new__(Client)),
        lambda: world.here.connect_push(address),
        lambda: world.here.listen(address, lambda peer, frames: None),
        lambda: world.here.listen_pull(address, lambda peer, frames: None),
    ):
        with pytest.raises(InvalidArgumentError):
            world.on(world.here, call)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://*:9876"])
def test_what_only_a_server_can_use_is_refused_to_clients(world: World, address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="Nobody can connect"):
        world.on(world.here, lambda: world.here.connect_push(address))


# --- time and turns -----------------------------------------------------------------------------------------------------


def test_timers_fire_by_time_and_then_in_the_order_made(world: World) -> None:
    fired: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: (fired.append(name), world.note())  # type: ignore[return-value]

    def make() -> None:
        world.here.call_later(30, note("last"))
        for number in range(5):
            world.here.call_later(10, note(f"same {number}"))
        world.here.call_later(20, note("late")).cancel()
        world.here.call_later(0, note("first"))

    world.on(world.here, make)
    world.wait_for(lambda: "last" in fired)
    assert fired == ["first", "same 0", "same 1", "same 2", "same 3", "same 4", "last"]


def test_a_timer_never_fires_early(world: World) -> None:
    spans: list[float] = []

    def make(delay_ms: float) -> None:
        made_ms = world.here.clock.monotonic_ms()
        world.here.call_later(
            delay_ms, lambda: (spans.append(world.here.clock.monotonic_ms() - made_ms - delay_ms), world.note())  # type: ignore
        )

    world.on(world.here, lambda: [make(delay_ms) for delay_ms in (0.0, 0.3, 1.0, 5.5, 12.25)])
    world.wait_for(lambda: len(spans) == 5)
    assert min(spans) >= 0.0


def test_a_timer_that_fired_or_was_cancelled_can_be_cancelled(world: World) -> None:
    fired: list[int] = []

    def make() -> None:
        timer = world.here.call_later(0, lambda: fired.append(1))
        cancelled = world.here.call_later(0, lambda: fired.append(2))
        cancelled.cancel()
        cancelled.cancel()
        world.here.call_later(1, lambda: (timer.cancel(), fired.append(3), world.note()))  # type: ignore[func-returns-value]

    world.on(world.here, make)
    world.wait_for(lambda: 3 in fired)
    assert fired == [1, 3]


def test_a_timer_may_cancel_the_one_due_with_it(world: World) -> None:
    fired: list[str] = []

    def make() -> None:
        world.here.call_later(1, lambda: second.cancel())
        second = world.here.call_later(1, lambda: fired.append("second"))
        world.here.call_later(2, lambda: (fired.append("end"), world.note()))  # type: ignore[func-returns-value]

    world.on(world.here, make)
    world.wait_for(lambda: bool(fired))
    assert fired == ["end"]


def test_thousands_of_cancelled_timers_leave_the_others_in_order(world: World) -> None:
    fired: list[int] = []

    def make() -> None:
        timers = [
            world.here.call_later(1 + number * 0.001, lambda number=number: fired.append(number)) for number in range(3_000)
        ]
        for number, timer in enumerate(timers):
            if number % 10:
                timer.cancel()
        world.here.call_later(20, lambda: (fired.append(-1), world.note()))  # type: ignore[func-returns-value]

    world.on(world.here, make)
    world.wait_for(lambda: -1 in fired)
    assert fired == [*range(0, 3_000, 10), -1]


def test_calls_from_any_thread_are_made_on_the_loop_in_order(world: World) -> None:
    made: list[tuple[int, int]] = []

    def call(number: int) -> None:
        made.append((number, threading.get_ident()))
        world.note()

    def post() -> None:
        for number in range(200):
            world.here.call_soon_threadsafe(lambda number=number: call(number))

    thread = threading.Thread(target=post)
    thread.start()
    thread.join()
    world.wait_for(lambda: len(made) == 200)
    assert [number for number, _ in made] == list(range(200))
    assert {ident for _, ident in made} == {world.on(world.here, threading.get_ident)}


def test_the_hooks_end_each_turn_once(world: World) -> None:
    order: list[str] = []

    def begin() -> None:
        world.here.before_sleep(lambda: order.append("hook"))
        world.here.before_sleep(lambda: order.append("second hook"))
        order.clear()
        order.append("begin")
        world.here.call_soon_threadsafe(lambda: order.append("a"))
        world.here.call_soon_threadsafe(lambda: order.append("b"))

    world.on(world.here, begin)
    world.on(world.here, lambda: None)
    assert order[:6] == ["begin", "hook", "second hook", "a", "b", "hook"]


def test_what_a_hook_begins_happens_in_the_next_turn(world: World) -> None:
    order: list[str] = []

    def hook() -> None:
        order.append("hook")
        if order.count("hook") == 1:
            world.there.call_later(0, lambda: (order.append("timer"), world.note()))  # type: ignore[func-returns-value]
            world.there.call_soon_threadsafe(lambda: order.append("call"))

    world.on(world.there, lambda: world.there.before_sleep(hook))
    world.wait_for(lambda: "timer" in order)
    assert order[0] == "hook"
    assert set(order[1:3]) == {"call", "timer"}


def test_messages_of_one_turn_are_answered_by_one_hook(world: World) -> None:
    """Group commit: answers that a hook releases reach their askers."""
    waiting: list[tuple[bytes, list[bytes]]] = []
    server = Server(world, world.any_address, answer=lambda peer, frames: waiting.append((peer, frames)))

    def hook() -> None:
        while waiting:
            server.endpoint.send(*waiting.pop(0))

    world.on(world.there, lambda: world.there.before_sleep(hook))
    client = Client(world, server.address)
    client.wait_connected()
    world.on(world.here, lambda: [client.connection.send([b"%d" % number]) for number in range(500)])
    world.wait_for(lambda: len(client.messages) == 500)
    assert [frames[0] for frames in client.messages] == [b"%d" % number for number in range(500)]


# --- the end ------------------------------------------------------------------------------------------------------------


def test_a_loop_that_has_ended_refuses_calls(world: World) -> None:
    assert not world.here.has_ended
    world.end(world.here)
    assert world.here.has_ended
    with pytest.raises(ClosedError):
        world.here.call_soon_threadsafe(lambda: None)


def test_the_end_of_a_loop_disconnects_its_peers(world: World, server: Server) -> None:
    client = Client(world, server.address)
    client.wait_connected()
    world.end(world.there)
    world.wait_for(lambda: client.events == ["connected", "disconnected"])
    assert not client.send(b"gone")
