"""zrmq/transport/client.py: reconnects that the loop contract cannot show, and inproc's own way of having them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator

import psutil
import pytest
import zmq

from zrmq.client.link import Identity
from zrmq.errors import InvalidArgumentError, UnreachableError
from zrmq.transport import client
from zrmq.transport.inproc import Watch, directory_of
from zrmq.transport.lane import open_lane
from zrmq.transport.options import Context, Socket, end_context, make_context
from zrmq.transport.reactor import Reactor

DEADLINE_MS = 20_000


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()
    assert made.failed_count == 0


def ignore(peer: bytes, frames: list[bytes]) -> None:
    pass


class Notes:
    """A listener that writes down what it hears, in order."""

    def __init__(self) -> None:
        self.events: list[str | bytes] = []

    def on_connected(self) -> None:
        self.events.append("connected")

    def on_disconnected(self) -> None:
        self.events.append("disconnected")

    def on_frames(self, frames: list[bytes]) -> None:
        self.events.append(frames[0])


def run_until(reactor: Reactor, condition: Callable[[], bool], *, first: Callable[[], object] = lambda: None) -> None:
    late: list[bool] = []

    def look() -> None:
        if condition():
            reactor.stop()
        else:
            reactor.call_later(1, look)

    reactor.call_later(0, lambda: (first(), look()))  # type: ignore[func-returns-value]
    reactor.call_later(DEADLINE_MS, lambda: (late.append(True), reactor.stop()))  # type: ignore[func-returns-value]
    reactor.run()
    assert not late, "the condition did not hold in time"


# --- tcp and ipc --------------------------------------------------------------------------------------------------------


def test_a_connection_that_was_accepted_but_not_greeted_is_none(reactor: Reactor) -> None:
    """A port that accepts and says nothing, as a hung server's does: the handshake is the connection."""
    notes = Notes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = reactor.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", notes)
        accepted: list[socket.socket] = []
        server.settimeout(5)
        run_until(reactor, lambda: bool(accepted), first=lambda: accepted.append(server.accept()[0]))
        assert notes.events == []
        assert not connection.send([b"x"])
        accepted[0].close()


def test_connecting_to_a_name_that_does_not_resolve_waits(reactor: Reactor) -> None:
    notes = Notes()
    connection = reactor.connect("tcp://no-such-host.invalid:9876", notes)
    run_until(reactor, lambda: True)
    assert not connection.send([b"x"])
    assert notes.events == []


def test_an_address_libzmq_refuses_leaves_no_socket_open() -> None:
    context = make_context()
    reactor = Reactor(context)
    for connect in (lambda: reactor.connect("tcp://-host:1", Notes()), lambda: reactor.connect_push("tcp://%:1")):
        with pytest.raises(InvalidArgumentError, match="correct the address"):
            connect()
    reactor.close()
    assert end_context(context)


def test_a_connection_without_a_descriptor_is_tried_again(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REOPEN_MS", 1.0)
    endpoint, notes, opened = reactor.listen("tcp://127.0.0.1:0", ignore), Notes(), refuse_monitors(monkeypatch)
    connection = reactor.connect(endpoint.address, notes)
    assert not connection.send([b"x"])
    assert [each.closed for each in opened] == [True]
    monkeypatch.undo()
    run_until(reactor, lambda: notes.events == ["connected"])


def test_a_connection_may_be_closed_before_it_has_a_socket(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REOPEN_MS", 1.0)
    opened = refuse_monitors(monkeypatch)
    reactor.connect("tcp://127.0.0.1:1", Notes()).close()
    reactor.call_later(2, reactor.stop)
    reactor.run()
    assert len(opened) == 1


def test_a_lane_without_a_descriptor_leaves_no_socket_open(monkeypatch: pytest.MonkeyPatch) -> None:
    context, opened = make_context(), refuse_monitors(monkeypatch)
    with pytest.raises(UnreachableError, match="No socket"):
        open_lane(context, "tcp://127.0.0.1:1", Identity("c", "producer"))
    assert [each.closed for each in opened] == [True]
    assert end_context(context)


def refuse_monitors(monkeypatch: pytest.MonkeyPatch) -> list[Socket]:
    """As when the process has a descriptor left for the first socket and none for its monitor. Returns those opened."""
    opened: list[Socket] = []
    make = zmq.Context.socket

    def make_but_monitors(context: Context, kind: int) -> Socket:
        if kind == zmq.PAIR:
            raise zmq.ZMQError(errno.EMFILE)
        opened.append(make(context, kind))
        return opened[-1]

    monkeypatch.setattr(zmq.Context, "socket", make_but_monitors)
    return opened


def test_many_connections_open_and_close_without_leaking_descriptors(reactor: Reactor) -> None:
    endpoint = reactor.listen("tcp://127.0.0.1:0", ignore)
    notes = [Notes() for _ in range(30)]
    reactor.connect(endpoint.address, Notes()).close()
    before = psutil.Process().num_fds()
    connections = [reactor.connect(endpoint.address, each) for each in notes]

    def all_connected() -> bool:
        if not all(each.events == ["connected"] for each in notes):
            return False
        for connection in connections:
            connection.close()
        return True

    settled: list[bool] = []

    def few_left() -> bool:
        settled.extend([True] if not settled and all_connected() else [])
        return bool(settled) and psutil.Process().num_fds() <= before + 5

    run_until(reactor, few_left)


# --- inproc -------------------------------------------------------------------------------------------------------------


def test_the_last_words_of_an_inproc_server_are_heard(reactor: Reactor) -> None:
    notes = Notes()

    def say_bye_and_go(peer: bytes, frames: list[bytes]) -> None:
        endpoint.send(peer, [b"bye"])
        endpoint.close()

    def ask() -> None:
        assert connection.send([b"x"])

    endpoint = reactor.listen("inproc://last-words", say_bye_and_go)
    connection = reactor.connect(endpoint.address, notes)
    run_until(reactor, lambda: "disconnected" in notes.events, first=lambda: reactor.call_later(1, ask))
    assert notes.events == ["connected", b"bye", "disconnected"]


def test_an_inproc_server_that_comes_and_goes_is_followed(reactor: Reactor) -> None:
    notes = Notes()
    reactor.connect("inproc://restless", notes)

    def flicker() -> None:
        for _ in range(10):
            reactor.listen("inproc://restless", ignore).close()
        reactor.listen("inproc://restless", ignore)

    run_until(reactor, lambda: notes.events.count("connected") == 11, first=flicker)
    assert notes.events == ["connected", "disconnected"] * 10 + ["connected"]


def test_an_inproc_server_of_another_context_is_another(reactor: Reactor) -> None:
    other = Reactor()
    other.listen("inproc://same-name", ignore)
    notes = Notes()
    connection = reactor.connect("inproc://same-name", notes)
    run_until(reactor, lambda: True)
    assert notes.events == []
    assert not connection.send([b"x"])
    other.close()


def test_the_directory_numbers_each_listener_and_forgets_watches() -> None:
    context = make_context()
    directory = directory_of(context)
    assert directory_of(context) is directory
    news: list[bool] = []
    watch = Watch("inproc://a", lambda call: call(), news.append)
    directory.add_watch(watch)
    assert news == []
    assert directory.listener_number("inproc://a") == 0
    directory.note_up("inproc://a")
    first = directory.listener_number("inproc://a")
    directory.wait_up("inproc://a", 1)
    directory.note_down("inproc://a")
    directory.wait_up("inproc://a", 1)
    directory.note_up("inproc://a")
    directory.note_up("inproc://b")
    assert directory.listener_number("inproc://a") > first > 0
    late: list[bool] = []
    directory.add_watch(Watch("inproc://a", lambda call: call(), late.append))
    assert late == [True]
    directory.remove_watch(watch)
    directory.remove_watch(watch)
    directory.note_down("inproc://a")
    assert news == [True, False, True]
    assert late == [True, False]
    assert end_context(context)


def test_news_for_a_loop_that_has_ended_are_dropped(reactor: Reactor) -> None:
    context = make_context()
    ended = Reactor(context)
    ended.connect("inproc://x", Notes())
    ended.call_soon_threadsafe(ended.stop)
    ended.run()
    directory_of(context).note_up("inproc://x")
    ended.close()
    assert end_context(context)
