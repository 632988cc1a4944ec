"""zrmq/client/link.py: a link and a server on the memory twin, and everything that can come between them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from zrmq.client import link as link_module
from zrmq.client.link import Identity, Link
from zrmq.errors import (
    ClosedError,
    Code,
    DiskFullError,
    InvalidArgumentError,
    InvalidFrameError,
    PayloadTooLargeError,
    RequestRefusedError,
    RequestTimeoutError,
    ZrmqError,
)
from zrmq.protocol.limits import FRAME_COUNT_MAX, MESSAGE_BYTES_MAX, PROTOCOL_VERSION
from zrmq.protocol.requests import (
    Alive,
    AnyReply,
    AnyRequest,
    Bye,
    DescribeTopics,
    Done,
    Failed,
    GroupChanged,
    Heartbeat,
    Hello,
    Limits,
    Reply,
    Send,
    Topics,
    Welcome,
    decode_request,
    encode,
)
from zrmq.transport import circuit
from zrmq.transport.interface import Timer
from zrmq.transport.memory import MemoryNetwork
from zrmq.transport.sessions import SessionTable

ADDRESS = "tcp://server:1"
LIMITS = Limits(1, 1, 1, 1, 1)


class Desk:
    """A server that keeps sessions, writes down what it is asked, and answers Done unless told otherwise."""

    def __init__(self, network: MemoryNetwork, heartbeat_ms: int = 2_000, session_timeout_ms: int = 10_000) -> None:
        self.loop = network.loop("server")
        self.heartbeat_ms, self.session_timeout_ms = heartbeat_ms, session_timeout_ms
        self.sessions = SessionTable(network.now_ms, session_timeout_ms=session_timeout_ms)
        self.asked: list[AnyRequest] = []  # all but heartbeats
        self.payloads: list[list[bytes]] = []
        self.server_id = "id"
        self.heartbeats: list[float] = []
        self.peer = b""
        self.answer: Callable[[AnyRequest], list[Reply]] = lambda request: [Done(request.number)]
        self.endpoint = self.loop.listen(ADDRESS, self.handle)

    @property
    def hellos(self) -> list[Hello]:
        return [request for request in self.asked if isinstance(request, Hello)]

    @property
    def numbers(self) -> list[int]:
        """Of the requests that are no HELLOs, in the order in which they came."""
        return [request.number for request in self.asked if not isinstance(request, Hello)]

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        request = decode_request(frames[0])
        self.peer = peer
        if isinstance(request, Heartbeat):
            self.heartbeats.append(self.loop.clock.monotonic_ms())
        else:
            self.asked.append(request)
            self.payloads.append(frames[1:])
        for reply in self.replies(request, peer):
            self.endpoint.send(peer, [encode(reply)])

    def replies(self, request: AnyRequest, peer: bytes) -> list[Reply]:
        if isinstance(request, Hello):
            return self.welcome(request, peer)
        if self.sessions.by_peer(peer) is None:
            return [Failed(request.number, Code.NO_SESSION, "say hello")]
        if isinstance(request, Heartbeat):
            return [Alive(request.number, 0)]
        return self.answer(request)

    def welcome(self, hello: Hello, peer: bytes) -> list[Reply]:
        self.sessions.open(hello, peer, self.loop.clock.monotonic_ms())
        return [
            Welcome(
                hello.number, PROTOCOL_VERSION, self.server_id, "server", 0, self.session_timeout_ms, self.heartbeat_ms, LIMITS
            )
        ]

    def forget_sessions(self) -> None:
        for session in self.sessions:
            self.sessions.close(session)


class World:
    """A network with a client's link on it; the listener of that link."""

    def __init__(self, seed: int = 1) -> None:
        self.network = MemoryNetwork(Random(seed))
        self.loop = self.network.loop("client")
        self.events: list[str] = []
        self.notices: list[AnyReply] = []
        self.replies: dict[int, list[AnyReply | ZrmqError]] = {}
        self.on_open: Callable[[], object] = lambda: None
        self.link = Link(self.loop, ADDRESS, Identity("c1", "producer", "g", "i"), self, Random(seed))

    def on_link_open(self, link: Link) -> None:
        assert link.is_open
        self.events.append("open")
        self.on_open()

    def on_link_lost(self, link: Link) -> None:
        assert not link.is_open
        self.events.append("lost")

    def on_notice(self, link: Link, notice: AnyReply) -> None:
        self.notices.append(notice)

    def ask(self, timeout_ms: int = 60_000, payload: list[bytes] | None = None) -> int:
        box: list[int] = []
        number = self.link.request(
            DescribeTopics, payload=payload or (), timeout_ms=timeout_ms,
            on_reply=lambda reply, frames: self.replies.setdefault(box[0], []).append(reply),
        )
        box.append(number)
        return number

    def run_until(self, condition: Callable[[], bool], limit_ms: float = 60_000.0) -> None:
        self.network.run_until(condition, limit_ms)

    def wait_open(self) -> None:
        self.run_until(lambda: self.link.is_open)

    def wait_lost_and_open(self) -> None:
        """A session of before is over, and a new one is open."""
        count = self.events.count("open")
        self.run_until(lambda: self.events.count("open") > count)

    def wait_answered(self, *numbers: int) -> None:
        self.run_until(lambda: all(number in self.replies for number in numbers))
        for number in numbers:
            assert self.replies[number] == [Done(number)]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def desk(world: World) -> Desk:
    return Desk(world.network)


@pytest.fixture
def open_world(world: World, desk: Desk) -> World:
    world.wait_open()
    return world


# --- opening ------------------------------------------------------------------------------------------------------------


def test_hello_says_who_we_are(open_world: World, desk: Desk) -> None:
    hello = desk.hellos[0]
    assert (hello.client_id, hello.role, hello.group, hello.instance_name) == ("c1", "producer", "g", "i")
    assert hello.protocol_version == PROTOCOL_VERSION
    assert hello.number == 1
    assert open_world.events == ["open"]
    assert open_world.link.welcome is not None
    assert open_world.link.welcome.server_name == "server"


def test_an_address_that_cannot_be_one_is_refused(world: World) -> None:
    with pytest.raises(InvalidArgumentError):
        Link(world.loop, "nowhere", Identity("c", "producer"), world, Random(1))


def test_a_request_is_answered_once_and_numbered_from_one_up(open_world: World, desk: Desk) -> None:
    numbers = [open_world.ask() for _ in range(3)]
    assert numbers == [2, 3, 4]
    open_world.wait_answered(*numbers)
    assert desk.numbers == numbers


def test_payload_goes_and_comes_with_its_frames(open_world: World, desk: Desk) -> None:
    desk.answer = lambda request: desk.endpoint.send(desk.peer, [encode(Topics(request.number, [])), b"a", b"bb"]) and []
    got: list[Any] = []
    open_world.link.request(
        Send, "t", 3, payload=[b"batch", b"more"], timeout_ms=1_000, on_reply=lambda reply, frames: got.append((reply, frames))
    )
    open_world.run_until(lambda: bool(got))
    assert got == [(Topics(2, []), [b"a", b"bb"])]
    assert desk.asked[-1] == Send(2, 1_000, "t", 3)
    assert desk.payloads[-1] == [b"batch", b"more"]


def test_requests_made_before_the_session_is_open_wait_and_go_in_order(world: World) -> None:
    numbers = [world.ask() for _ in range(100)]
    world.network.run_for(5_000)
    desk = Desk(world.network)
    world.wait_answered(*numbers)
    assert desk.numbers == numbers
    assert isinstance(desk.asked[0], Hello)


def test_what_the_owner_asks_at_opening_goes_before_what_waited(world: World) -> None:
    waiting = [world.ask(), world.ask()]
    first: list[int] = []
    world.on_open = lambda: first.append(world.ask())
    desk = Desk(world.network)
    world.wait_answered(*waiting)
    assert desk.numbers == [*first, *waiting]


def test_what_the_owner_cancels_at_opening_is_not_sent(world: World) -> None:
    waiting = [world.ask(), world.ask()]
    world.on_open = lambda: world.link.cancel(waiting[0])
    desk = Desk(world.network)
    world.wait_answered(waiting[1])
    assert desk.numbers == [waiting[1]]


def test_the_owner_may_close_at_opening(world: World) -> None:
    number = world.ask()
    world.on_open = world.link.close
    desk = Desk(world.network)
    world.run_until(lambda: number in world.replies)
    world.network.run_for(2_000)
    assert isinstance(world.replies[number][0], ClosedError)
    assert [type(request) for request in desk.asked] == [Hello, Bye]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_refusal_becomes_the_typed_error_with_its_facts(open_world: World, desk: Desk) -> None:
    desk.answer = lambda request: [Failed(request.number, Code.DISK_FULL, "no room", {"free_bytes": 7})]
    number = open_world.ask()
    open_world.run_until(lambda: number in open_world.replies)
    error = open_world.replies[number][0]
    assert isinstance(error, DiskFullError)
    assert (error.message, error.facts) == ("no room", {"free_bytes": 7})


def refuse_hellos(desk: Desk, code: Code) -> None:
    desk.welcome = lambda hello, peer: [Failed(hello.number, code, "not you")]  # type: ignore[method-assign]


@pytest.mark.parametrize("code", [Code.VERSION_UNSUPPORTED, Code.UNAUTHORIZED, Code.FORBIDDEN, Code.BAD_REQUEST])
def test_a_refused_hello_fails_what_waits_and_is_tried_again_slowly(world: World, desk: Desk, code: Code) -> None:
    refuse_hellos(desk, code)
    number = world.ask()
    world.run_until(lambda: number in world.replies)
    error = world.replies[number][0]
    assert isinstance(error, RequestRefusedError)
    assert error.code == code
    assert world.events == []
    world.network.run_for(60_000)
    assert 10 <= len(desk.hellos) <= 25, "every 2.5 to 5 seconds"
    del desk.welcome  # back to the class's
    number = world.ask()
    world.wait_answered(number)
    assert len(world.replies) == 2


@pytest.mark.parametrize("code", [Code.TOO_MANY_REQUESTS, Code.NOT_READY, Code.STOPPING])
def test_a_hello_refused_for_now_leaves_what_waits_waiting(world: World, desk: Desk, code: Code) -> None:
    refuse_hellos(desk, code)
    number = world.ask()
    world.network.run_for(20_000)
    assert not world.replies
    assert 4 <= len(desk.hellos) <= 15
    del desk.welcome
    world.wait_answered(number)


def test_a_server_that_answers_hello_with_something_else_is_refused(world: World, desk: Desk) -> None:
    desk.welcome = lambda hello, peer: [Done(hello.number)]  # type: ignore[method-assign]
    number = world.ask()
    world.run_until(lambda: number in world.replies)
    assert isinstance(world.replies[number][0], InvalidFrameError)


# --- losing and finding the server --------------------------------------------------------------------------------------


def hold_answers(desk: Desk) -> None:
    desk.answer = lambda request: []


def test_after_a_reconnect_all_outstanding_goes_again_in_order(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    numbers = [open_world.ask() for _ in range(50)]
    open_world.run_until(lambda: desk.numbers == numbers)
    open_world.network.break_connections("client", "server")
    desk.answer = lambda request: [Done(request.number)]
    open_world.wait_answered(*numbers)
    assert open_world.events == ["open", "lost", "open"]
    assert desk.numbers == numbers + numbers
    assert len(desk.hellos) == 2
    assert desk.hellos[1].session_epoch > desk.hellos[0].session_epoch
    assert desk.hellos[1].client_id == "c1"


def test_a_server_that_restarts_gets_everything_again(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    numbers = [open_world.ask() for _ in range(20)]
    open_world.run_until(lambda: desk.numbers == numbers)
    desk.loop.close()
    open_world.network.run_for(3_000)
    later = [open_world.ask() for _ in range(20)]
    again = Desk(open_world.network)
    open_world.wait_answered(*numbers, *later)
    assert again.numbers == numbers + later


def test_what_is_sent_again_carries_the_time_that_is_left(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    number = open_world.ask(timeout_ms=10_000)
    open_world.run_until(lambda: desk.numbers == [number])
    desk.loop.close()
    open_world.network.run_for(4_000)
    again = Desk(open_world.network)
    open_world.wait_answered(number)
    assert 0 < again.asked[-1].timeout_ms < 6_000


def test_a_session_that_lived_is_opened_again_at_once(open_world: World, desk: Desk) -> None:
    open_world.network.run_for(30_000)
    asked_ms = open_world.network.now_ms
    desk.forget_sessions()
    number = open_world.ask()
    open_world.wait_answered(number)
    assert open_world.network.now_ms - asked_ms < 5.0


def test_no_session_opens_a_new_one_and_the_requests_stay(open_world: World, desk: Desk) -> None:
    desk.forget_sessions()
    numbers = [open_world.ask() for _ in range(10)]
    open_world.wait_answered(*numbers)
    assert open_world.events == ["open", "lost", "open"]
    assert len(desk.hellos) == 2, "ten refusals are one reason to open a session"
    assert desk.numbers == numbers + numbers


def test_no_session_for_ever_is_asked_about_ever_more_slowly(open_world: World, desk: Desk) -> None:
    desk.answer = lambda request: [Failed(request.number, Code.NO_SESSION, "again")]
    number = open_world.ask(timeout_ms=29_000)
    open_world.network.run_for(30_000)
    assert isinstance(open_world.replies[number][0], RequestTimeoutError)
    assert 5 <= len(desk.hellos) <= 20


def test_two_links_of_one_client_id_take_the_session_from_each_other_slowly(open_world: World, desk: Desk) -> None:
    other_loop = open_world.network.loop("other")
    Link(other_loop, ADDRESS, Identity("c1", "producer"), open_world, Random(2))
    with structlog.testing.capture_logs() as logs:
        open_world.network.run_for(30_000)
    assert len(desk.hellos) < 40
    told = [line for line in logs if line["event"] == "session_taken_over"]
    assert [line["client_id"] for line in told] == ["c1"] * 2, "each of them is told, once"


def test_a_server_that_gives_sessions_up_is_no_rival(open_world: World, desk: Desk) -> None:
    with structlog.testing.capture_logs() as logs:
        for _ in range(10):
            open_world.network.break_connections("client", "server")
            open_world.network.run_for(1_000)
            desk.forget_sessions()
            open_world.wait_answered(open_world.ask())
    assert not [line for line in logs if line["event"] == "session_taken_over"]


def test_hello_without_an_answer_is_said_again_and_only_the_last_counts(world: World, desk: Desk) -> None:
    kept: list[tuple[Hello, bytes]] = []
    desk.welcome = lambda hello, peer: kept.append((hello, peer)) or []  # type: ignore[method-assign, func-returns-value]
    world.run_until(lambda: len(kept) == 3)
    assert world.network.now_ms > 6_000
    assert [hello.session_epoch for hello, _ in kept] == sorted({hello.session_epoch for hello, _ in kept})
    del desk.welcome
    for hello, peer in kept[:2]:
        desk.endpoint.send(peer, [encode(desk.welcome(hello, peer)[0])])
    world.network.run_for(10)
    assert not world.link.is_open
    desk.endpoint.send(kept[2][1], [encode(desk.welcome(*kept[2])[0])])
    world.wait_open()


def test_a_server_that_never_answers_hello_gets_new_connections(world: World, desk: Desk) -> None:
    peers: set[bytes] = set()
    desk.welcome = lambda hello, peer: peers.add(peer) or []  # type: ignore[method-assign, func-returns-value]
    world.network.run_for(40_000)
    assert 2 <= len(peers) <= 4, "a new one after each ten seconds of silence"


# --- silence ------------------------------------------------------------------------------------------------------------


def test_heartbeats_keep_time_and_confirm_when_they_were_sent(open_world: World, desk: Desk) -> None:
    link = open_world.link
    opened_ms = open_world.network.now_ms
    assert link.confirmed_ms == pytest.approx(opened_ms, abs=2), "the HELLO was sent then"
    open_world.network.run_for(20_500)
    assert len(desk.heartbeats) == 10
    spans = [later - earlier for earlier, later in zip(desk.heartbeats, desk.heartbeats[1:], strict=False)]
    assert spans == pytest.approx([2_000] * 9, abs=1)
    assert link.confirmed_ms == pytest.approx(opened_ms + 20_000, abs=2)
    assert link.confirmed_ms <= desk.heartbeats[-1] <= link.last_heard_ms


def test_confirmed_stands_still_while_heartbeats_are_not_answered(open_world: World, desk: Desk) -> None:
    open_world.network.run_for(5_000)
    desk.loop.pause()
    confirmed_ms = open_world.link.confirmed_ms
    open_world.network.run_for(5_000)
    assert open_world.link.confirmed_ms == confirmed_ms
    desk.loop.resume()
    open_world.network.run_for(10)
    assert open_world.link.confirmed_ms > confirmed_ms


def test_any_answer_counts_as_heard_but_only_heartbeats_confirm(open_world: World) -> None:
    confirmed_ms = open_world.link.confirmed_ms
    open_world.network.run_for(1_000)
    number = open_world.ask()
    open_world.wait_answered(number)
    assert open_world.link.last_heard_ms == open_world.network.now_ms
    assert open_world.link.confirmed_ms == confirmed_ms


def test_a_heartbeat_answered_no_session_opens_a_new_one(open_world: World, desk: Desk) -> None:
    desk.forget_sessions()
    open_world.run_until(lambda: open_world.events == ["open", "lost", "open"])
    assert open_world.network.now_ms < 3_000


def test_a_half_open_link_is_replaced_after_the_session_timeout(open_world: World, desk: Desk) -> None:
    desk.session_timeout_ms = 4_000
    desk.heartbeat_ms = 1_000
    desk.forget_sessions()
    open_world.run_until(lambda: open_world.events == ["open", "lost", "open"])
    open_world.network.half_open("client", "server")
    asked_ms = open_world.network.now_ms
    number = open_world.ask()
    open_world.wait_answered(number)
    assert 4_000 < open_world.network.now_ms - asked_ms < 7_000
    assert open_world.events[-2:] == ["lost", "open"]


def test_a_server_that_is_started_again_and_again_is_found_each_time(world: World) -> None:
    for life in range(10):
        desk = Desk(world.network)
        desk.server_id = f"life {life}"
        world.network.run_for(1_000)
        assert world.link.is_open, f"in life {life}"
        world.network.run_for(1_500)
        desk.loop.close()
        world.network.run_for(200)


def test_our_own_pause_is_not_the_servers_silence(world: World) -> None:
    desk = Desk(world.network, heartbeat_ms=500, session_timeout_ms=2_000)
    world.wait_open()
    world.network.run_for(1_000)
    world.loop.pause()
    world.network.run_for(6_000)
    world.loop.resume()
    world.network.run_for(3_000)
    assert world.events == ["open"]
    assert len(desk.hellos) == 1


def test_no_server_makes_us_beat_like_mad(world: World) -> None:
    desk = Desk(world.network, heartbeat_ms=-5)
    world.wait_open()
    world.network.run_for(1_000)
    assert len(desk.heartbeats) <= 20


# --- deadlines ----------------------------------------------------------------------------------------------------------


def test_an_unanswered_request_ends_at_its_deadline_and_not_before(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    made_ms = open_world.network.now_ms
    number = open_world.ask(timeout_ms=1_500)
    open_world.network.run_for(1_499)
    assert not open_world.replies
    open_world.run_until(lambda: number in open_world.replies)
    assert open_world.network.now_ms - made_ms == pytest.approx(1_500, abs=1)
    error = open_world.replies[number][0]
    assert isinstance(error, RequestTimeoutError)
    assert error.facts == {"address": ADDRESS, "request": "DescribeTopics", "timeout_ms": 1_500}
    assert "did not answer" in error.message


def test_a_timeout_without_a_server_says_so(world: World) -> None:
    number = world.ask(timeout_ms=700)
    world.run_until(lambda: number in world.replies)
    error = world.replies[number][0]
    assert isinstance(error, RequestTimeoutError)
    assert "could not be reached" in error.message


def test_an_answer_after_the_deadline_is_ignored_and_counted(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    number = open_world.ask(timeout_ms=100)
    open_world.run_until(lambda: number in open_world.replies)
    desk.endpoint.send(desk.peer, [encode(Done(number))])
    desk.endpoint.send(desk.peer, [encode(Done(999_999))])
    open_world.network.run_for(10)
    assert len(open_world.replies[number]) == 1
    assert open_world.link.ignored_count == 2


def test_an_answer_that_comes_twice_counts_once(open_world: World, desk: Desk) -> None:
    desk.answer = lambda request: [Done(request.number), Done(request.number)]
    number = open_world.ask()
    open_world.network.run_for(100)
    assert open_world.replies[number] == [Done(number)]
    assert open_world.link.ignored_count == 1


def test_deadlines_of_any_order_end_in_their_order(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    timeouts = [900, 100, 500, 100, 700, 300]
    numbers = [open_world.ask(timeout_ms=timeout_ms) for timeout_ms in timeouts]
    open_world.network.run_for(1_000)
    expected = [number for _, number in sorted(zip(timeouts, numbers, strict=True))]
    assert list(open_world.replies) == expected


def test_many_requests_need_few_timers(open_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    call_later = open_world.loop.call_later

    def counting(delay_ms: float, callback: Callable[[], None]) -> Timer:
        made.append(delay_ms)
        return call_later(delay_ms, callback)

    monkeypatch.setattr(open_world.loop, "call_later", counting)
    for _ in range(50):
        numbers = [open_world.ask(timeout_ms=3_000) for _ in range(100)]
        open_world.wait_answered(*numbers)
    assert len(made) < 20
    assert len(open_world.link._deadlines) < 2_000, "what was answered is forgotten in time"


# --- giving up ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_is_never_answered(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    numbers = [open_world.ask(timeout_ms=500) for _ in range(2)]
    open_world.run_until(lambda: desk.numbers == numbers)
    for number in (*numbers, numbers[0], 12_345):
        open_world.link.cancel(number)
    desk.endpoint.send(desk.peer, [encode(Done(numbers[0]))])
    open_world.network.run_for(1_000)
    assert not open_world.replies


def test_a_request_cancelled_while_waiting_is_not_sent(world: World) -> None:
    numbers = [world.ask() for _ in range(3)]
    world.link.cancel(numbers[1])
    desk = Desk(world.network)
    world.wait_answered(numbers[0], numbers[2])
    assert desk.numbers == [numbers[0], numbers[2]]


def test_close_says_bye_and_ends_what_is_outstanding(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    numbers = [open_world.ask() for _ in range(3)]
    desk.answer = lambda request: [Done(request.number)] if isinstance(request, Bye) else []
    closed: list[float] = []
    open_world.link.close(lambda: closed.append(open_world.network.now_ms))
    assert all(isinstance(open_world.replies[number][0], ClosedError) for number in numbers)
    assert not closed
    asked_ms = open_world.network.now_ms
    open_world.run_until(lambda: bool(closed))
    assert closed[0] - asked_ms < 5.0
    assert isinstance(desk.asked[-1], Bye)
    open_world.network.run_for(20_000)
    assert all(len(replies) == 1 for replies in open_world.replies.values())
    assert open_world.events == ["open"], "who closes is not told that it is lost"
    assert not desk.endpoint.send(desk.peer, [b"gone"])


def test_close_does_not_wait_for_a_server_that_says_nothing(open_world: World, desk: Desk) -> None:
    desk.loop.pause()
    closed: list[float] = []
    asked_ms = open_world.network.now_ms
    open_world.link.close(lambda: closed.append(open_world.network.now_ms))
    open_world.run_until(lambda: bool(closed))
    assert closed[0] - asked_ms == pytest.approx(500.0)


def test_close_ends_when_the_connection_breaks_under_it(open_world: World, desk: Desk) -> None:
    hold_answers(desk)
    closed: list[bool] = []
    open_world.link.close(lambda: closed.append(True))
    desk.loop.close()
    open_world.run_until(lambda: bool(closed), limit_ms=100)
    open_world.network.run_for(5_000)
    assert closed == [True]


def test_close_before_it_was_open(world: World) -> None:
    number = world.ask()
    closed: list[bool] = []
    world.link.close(lambda: closed.append(True))
    world.link.close(lambda: closed.append(False))
    desk = Desk(world.network)
    world.network.run_for(5_000)
    assert isinstance(world.replies[number][0], ClosedError)
    assert closed == [True]
    assert not desk.asked


def test_a_welcome_that_comes_after_close_opens_nothing(world: World, desk: Desk) -> None:
    world.run_until(lambda: bool(desk.hellos))
    world.link.close()
    world.network.run_for(5_000)
    assert world.events == []
    assert not world.link.is_open


def test_a_closed_link_refuses_requests_also_from_within_its_last_answers(open_world: World) -> None:
    refused: list[bool] = []

    def ask_again(reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        with pytest.raises(ClosedError):
            open_world.ask()
        refused.append(True)

    open_world.link.request(DescribeTopics, timeout_ms=1_000, on_reply=ask_again)
    open_world.link.close()
    assert refused == [True]
    with pytest.raises(ClosedError, match="make a new one"):
        open_world.ask()


def test_a_request_that_fails_may_be_made_again_from_within_its_answer(world: World, desk: Desk) -> None:
    refuse_hellos(desk, Code.UNAUTHORIZED)
    tries: list[int] = []

    def ask() -> None:
        tries.append(1)
        if len(tries) < 4:
            world.link.request(DescribeTopics, timeout_ms=60_000, on_reply=lambda reply, frames: ask())

    ask()
    world.run_until(lambda: len(tries) == 4)
    assert len(desk.hellos) >= 3, "each try lives until the next refusal"


def test_a_session_that_opens_late_is_counted_as_a_gap(open_world: World, desk: Desk) -> None:
    network, link = open_world.network, open_world.link
    network.break_connections("client", "server")
    open_world.wait_lost_and_open()
    assert link.gap_count == 0, "the server cannot have given the session up"
    network.break_connections("client", "server")
    open_world.run_until(lambda: open_world.events[-1] == "lost")
    network.cut("client", "server")
    network.run_for(0.9 * desk.session_timeout_ms)
    assert open_world.events[-1] == "lost"
    network.heal("client", "server")
    open_world.wait_lost_and_open()
    assert link.gap_count == 1, "it may have"


def test_who_left_without_bye_takes_its_session_over_although_its_clock_went_back(open_world: World, desk: Desk) -> None:
    left = open_world.link
    left.close(says_bye=False)
    open_world.network.run_for(100)
    assert not any(isinstance(request, Bye) for request in desk.asked)
    assert desk.sessions.by_client("c1") is not None, "until the session timeout"
    open_world.loop.clock.step(-60_000)
    identity = Identity("c1", "producer", "g", "i")
    back = Link(open_world.loop, ADDRESS, identity, open_world, Random(2), session_epoch=left.session_epoch)
    open_world.run_until(lambda: back.is_open, 1_000)
    assert len(desk.sessions) == 1


# --- what a server may send ---------------------------------------------------------------------------------------------


def test_a_notice_reaches_the_owner(open_world: World, desk: Desk) -> None:
    notice = GroupChanged(0, "g", 4, ["a", "b"])
    desk.endpoint.send(desk.peer, [encode(notice)])
    open_world.network.run_for(10)
    assert open_world.notices == [notice]


def test_the_answers_to_heartbeats_reach_the_owner(open_world: World, desk: Desk) -> None:
    open_world.run_until(lambda: len(open_world.notices) == 2)
    assert [type(notice) for notice in open_world.notices] == [Alive, Alive]
    assert len(desk.heartbeats) == 2


@pytest.mark.parametrize(
    "frames", [[b""], [b"\xc1"], [b"nonsense", b"payload"], [b"\x93\x01\x02\x03"], [b"\x92\xcc\x65\xff"], [b"\x00" * 100]]
)
def test_noise_is_ignored_counted_and_logged_once(
    open_world: World, desk: Desk, frames: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(type(link_module.log), "warning", lambda self, event, **facts: lines.append(event))
    for _ in range(3):
        desk.endpoint.send(desk.peer, frames)
    number = open_world.ask()
    open_world.wait_answered(number)
    noise = open_world.link.undecodable_count
    assert noise + open_world.link.ignored_count == 3
    assert lines == (["reply_not_decoded"] if noise else [])


def test_an_answer_that_was_cut_off_is_no_answer(open_world: World, desk: Desk) -> None:
    """Its payload would be taken for all there is, and the rest for read."""
    desk.endpoint.send(desk.peer, [encode(Alive(0, 5)), *[b""] * FRAME_COUNT_MAX])
    open_world.wait_answered(open_world.ask())
    assert open_world.link.undecodable_count == 1
    assert not any(notice == Alive(0, 5) for notice in open_world.notices)


@pytest.mark.parametrize("number", [0, -1, 1, 2**62])
def test_replies_with_odd_numbers_do_no_harm(open_world: World, desk: Desk, number: int) -> None:
    for reply in (
        Failed(number, Code.NO_SESSION, "?"), Failed(number, 1, "?"), Done(number), Alive(number, 0),
        Welcome(number, 9, "", "", 0, 0, 0, LIMITS),
    ):
        desk.endpoint.send(desk.peer, [encode(reply)])
    asked = open_world.ask()
    open_world.wait_answered(asked)
    assert open_world.events == ["open"]
    assert len(desk.hellos) == 1


def test_a_refusal_nobody_asked_for_while_greeting_does_no_harm(world: World, desk: Desk) -> None:
    welcome = desk.welcome
    desk.welcome = lambda hello, peer: [Failed(0, Code.BAD_REQUEST, "?"), *welcome(hello, peer)]  # type: ignore[method-assign]
    number = world.ask()
    world.wait_answered(number)
    assert world.link.ignored_count == 1


# --- full pipes and big frames ------------------------------------------------------------------------------------------


def test_what_a_full_pipe_refuses_follows_in_order(
    open_world: World, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "PIPE_MESSAGES_MAX", 7)
    numbers = [open_world.ask() for _ in range(200)]
    open_world.wait_answered(*numbers)
    assert desk.numbers == numbers


def test_a_hello_that_finds_the_pipe_full_is_said_soon_after(
    world: World, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "PIPE_MESSAGES_MAX", 0)
    world.network.run_for(1_000)
    assert not desk.hellos
    monkeypatch.undo()
    world.run_until(lambda: world.link.is_open, limit_ms=20)
    assert len(desk.hellos) == 1


def test_what_a_full_pipe_keeps_may_end_by_its_deadline_or_be_cancelled(
    open_world: World, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.loop.pause()
    monkeypatch.setattr(circuit, "PIPE_MESSAGES_MAX", 1)
    first, overdue, cancelled, last = open_world.ask(), open_world.ask(timeout_ms=300), open_world.ask(), open_world.ask()
    open_world.link.cancel(cancelled)
    open_world.network.run_for(500)
    assert list(open_world.replies) == [overdue]
    monkeypatch.undo()
    desk.loop.resume()
    open_world.wait_answered(first, last)
    assert desk.numbers == [first, last]


def test_a_full_pipe_whose_connection_breaks_is_sent_by_the_next(
    open_world: World, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.loop.pause()
    monkeypatch.setattr(circuit, "PIPE_MESSAGES_MAX", 3)
    numbers = [open_world.ask() for _ in range(20)]
    open_world.network.run_for(100)
    open_world.network.break_connections("client", "server")
    desk.loop.resume()
    open_world.wait_answered(*numbers)
    assert desk.numbers[-20:] == numbers


def test_a_frame_that_would_cost_the_connection_is_refused_before_it_is_sent(open_world: World) -> None:
    with pytest.raises(PayloadTooLargeError) as caught:
        open_world.ask(payload=[b"small", bytes(MESSAGE_BYTES_MAX + 1)])
    assert caught.value.facts == {"size_bytes": MESSAGE_BYTES_MAX + 1, "limit_bytes": MESSAGE_BYTES_MAX}
    number = open_world.ask()
    open_world.wait_answered(number)


# --- everything at once -------------------------------------------------------------------------------------------------

FAULTS = ("break", "half_open", "cut", "cut_one_way", "heal", "restart", "pause", "resume", "forget")


def strike(fault: str, world: World, desk: Desk) -> Desk:
    network = world.network
    if fault == "break":
        network.break_connections("client", "server")
    elif fault == "half_open":
        network.half_open("client", "server")
    elif fault in ("cut", "cut_one_way"):
        network.cut("server", "client", one_way=fault == "cut_one_way")
    elif fault == "heal":
        network.heal("client", "server")
    elif fault == "restart":
        desk.loop.close()
        return Desk(network)
    elif fault == "pause" and not desk.loop.is_paused:
        desk.loop.pause()
    elif fault == "resume" and desk.loop.is_paused:
        desk.loop.resume()
    else:
        desk.forget_sessions()
    return desk


@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.tuples(st.sampled_from(FAULTS), st.floats(0.0, 12_000.0), st.integers(0, 5)), max_size=12),
)
def test_whatever_happens_each_request_is_answered_exactly_once(seed: int, steps: list[tuple[str, float, int]]) -> None:
    world = World(seed)
    desk = Desk(world.network)
    numbers: list[int] = []
    for fault, wait_ms, requests in steps:
        numbers.extend(world.ask(timeout_ms=600_000) for _ in range(requests))
        world.network.run_for(wait_ms)
        desk = strike(fault, world, desk)
    world.network.heal("client", "server")
    if desk.loop.is_paused:
        desk.loop.resume()
    numbers.append(world.ask(timeout_ms=600_000))
    world.wait_answered(*numbers)
    opened = [event for event in world.events if event == "open"]
    assert world.events == ["open", "lost"] * (len(opened) - 1) + ["open"], "open and lost take turns"
