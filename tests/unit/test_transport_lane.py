"""zrmq/transport/lane.py: a blocking request in its own thread, over tcp, ipc and inproc, and what can go wrong under it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from zrmq.client.link import Identity
from zrmq.errors import (
    ClosedError,
    Code,
    DiskFullError,
    ForkedClientError,
    InvalidArgumentError,
    RequestRefusedError,
    RequestTimeoutError,
    UnreachableError,
)
from zrmq.message import FlushMode
from zrmq.protocol.limits import FRAME_COUNT_MAX, PROTOCOL_VERSION
from zrmq.protocol.requests import (
    AnyRequest,
    Bye,
    Done,
    Failed,
    Hello,
    Limits,
    Reply,
    Send,
    Sent,
    Welcome,
    decode_request,
    encode,
)
from zrmq.transport.address import parse_address
from zrmq.transport.client import connect_socket
from zrmq.transport.lane import Lane, open_lane
from zrmq.transport.options import end_context, make_context
from zrmq.transport.reactor import Reactor
from zrmq.transport.sessions import SessionTable

DEADLINE_S = 20.0
TIMEOUT_MS = 20_000


class Desk:
    """A server in a thread of its own that stores what it is sent, unless told otherwise."""

    def __init__(self, address: str, context: Any = None) -> None:
        self.asked: list[AnyRequest] = []
        self.payloads: list[list[bytes]] = []
        self.answer: Callable[[AnyRequest, bytes], list[Reply]] = self.store
        self.session_timeout_ms = 10_000
        self.reactor = Reactor(context)
        self.ready = threading.Event()
        self.address = address
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.ready.wait(DEADLINE_S)

    def run(self) -> None:
        self.sessions = SessionTable(self.reactor.clock.monotonic_ms())
        self.endpoint = self.reactor.listen(self.address, self.handle)
        self.address = self.endpoint.address
        self.ready.set()
        self.reactor.run()
        self.reactor.close()

    def stop(self) -> None:
        self.reactor.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        assert self.reactor.failed_count == 0

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        request = decode_request(frames[0])
        self.asked.append(request)
        self.payloads.append(frames[1:])
        for reply in self.answer(request, peer):
            self.endpoint.send(peer, [encode(reply)])

    def store(self, request: AnyRequest, peer: bytes) -> list[Reply]:
        if isinstance(request, Hello):
            self.sessions.open(request, peer, self.reactor.clock.monotonic_ms())
            limits = Limits(1, 1, 1, 1, 1)
            return [Welcome(request.number, PROTOCOL_VERSION, "id", "desk", 0, self.session_timeout_ms, 2_000, limits)]
        if self.sessions.by_peer(peer) is None:
            return [Failed(request.number, Code.NO_SESSION, "say hello")]
        if isinstance(request, Bye):
            return [Done(request.number)]
        return [Sent(request.number, 7, 1, FlushMode.SYNC)]

    def forget_sessions(self) -> None:
        done = threading.Event()

        def forget() -> None:
            for session in self.sessions:
                self.sessions.close(session)
            done.set()

        self.reactor.call_soon_threadsafe(forget)
        assert done.wait(DEADLINE_S)

    @property
    def kinds(self) -> list[str]:
        return [type(request).__name__ for request in self.asked]


class Place:
    """Where servers and lanes meet: an address kind and a context."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        folder.chmod(0o700)
        self.context = make_context()
        self.address = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{folder}/s", "inproc": "inproc://desk"}[kind]
        self.desks: list[Desk] = []
        self.lanes: list[Lane] = []

    def desk(self) -> Desk:
        desk = Desk(self.address, self.context if self.kind == "inproc" else None)
        self.address = desk.address
        self.desks.append(desk)
        return desk

    def lane(self) -> Lane:
        lane = open_lane(self.context, self.address, Identity(f"lane-{len(self.lanes)}", "producer", "g"))
        self.lanes.append(lane)
        return lane

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        for desk in self.desks:
            desk.stop()
        assert end_context(self.context)


@pytest.fixture(params=["tcp", "ipc", "inproc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def desk(place: Place) -> Desk:
    return place.desk()


def send(lane: Lane, timeout_ms: int = TIMEOUT_MS, body: bytes = b"batch") -> Sent:
    reply, frames = lane.request(Send, "topic", 0, payload=[body], timeout_ms=timeout_ms)
    assert isinstance(reply, Sent)
    assert frames == []
    return reply


# --- the good case ------------------------------------------------------------------------------------------------------


def test_a_request_is_answered_in_the_thread_that_asks(place: Place, desk: Desk) -> None:
    lane = place.lane()
    threads = threading.active_count()
    assert send(lane).base_offset == 7
    assert threading.active_count() == threads
    assert desk.kinds == ["Hello", "Send"]
    assert desk.payloads[1] == [b"batch"]
    hello = desk.asked[0]
    assert isinstance(hello, Hello)
    assert (hello.client_id, hello.role, hello.group) == ("lane-0", "producer", "g")
    assert lane.welcome is not None
    assert lane.welcome.server_name == "desk"


def test_one_session_serves_many_requests_of_any_size(place: Place, desk: Desk) -> None:
    lane = place.lane()
    bodies = [bytes([number]) * (1 << number) for number in range(0, 22, 3)]
    for body in bodies:
        send(lane, body=body)
    assert desk.kinds == ["Hello"] + ["Send"] * len(bodies)
    assert [frames[0] for frames in desk.payloads[1:]] == bodies
    assert len({request.number for request in desk.asked}) == len(desk.asked)


def test_payload_frames_of_a_reply_come_with_it(place: Place, desk: Desk) -> None:
    store = desk.answer

    def answer(request: AnyRequest, peer: bytes) -> list[Reply]:
        if isinstance(request, Send):
            desk.endpoint.send(peer, [encode(Done(request.number)), b"a", bytes(100_000)])
            return []
        return store(request, peer)

    desk.answer = answer
    reply, frames = place.lane().request(Send, "topic", 0, timeout_ms=TIMEOUT_MS)
    assert isinstance(reply, Done)
    assert frames == [b"a", bytes(100_000)]


def test_lanes_do_not_mix_up_their_answers(place: Place, desk: Desk) -> None:
    desk.answer = lambda request, peer: (
        desk.store(request, peer) if not isinstance(request, Send)
        else [Sent(request.number, request.queue_id, 1, FlushMode.SYNC)]
    )
    lanes = [place.lane() for _ in range(4)]
    wrong: list[object] = []

    def work(lane: Lane, queue_id: int) -> None:
        for _ in range(50):
            reply, _ = lane.request(Send, "topic", queue_id, timeout_ms=TIMEOUT_MS)
            if not isinstance(reply, Sent) or reply.base_offset != queue_id:
                wrong.append(reply)

    threads = [threading.Thread(target=work, args=(lane, number)) for number, lane in enumerate(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert wrong == []


# --- sessions that are lost ---------------------------------------------------------------------------------------------


def test_no_session_opens_one_and_asks_again(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    desk.forget_sessions()
    send(lane)
    assert desk.kinds == ["Hello", "Send", "Send", "Hello", "Send"]
    first, second = [request for request in desk.asked if isinstance(request, Hello)]
    assert second.session_epoch > first.session_epoch
    assert desk.asked[2].number == desk.asked[4].number, "the same request, so that the server can tell"


def test_no_session_for_ever_does_not_flood_the_server(place: Place, desk: Desk) -> None:
    desk.answer = lambda request, peer: (
        desk.store(request, peer) if isinstance(request, Hello) else [Failed(request.number, Code.NO_SESSION, "again")]
    )
    with pytest.raises((RequestTimeoutError, UnreachableError)):  # as the time ends before or after it has been sent once more
        send(place.lane(), timeout_ms=1_000)
    assert 2 <= desk.kinds.count("Hello") <= 12


def test_who_has_no_session_any_more_has_done_nothing(place: Place, desk: Desk) -> None:
    """So a refusal of what is sent again is a refusal of all of it."""
    lane = place.lane()
    send(lane)
    refusals = [Code.NO_SESSION, Code.FORBIDDEN]
    desk.answer = lambda request, peer: (
        [Failed(request.number, refusals.pop(0), "no")] if isinstance(request, Send) else desk.store(request, peer)
    )
    with pytest.raises(RequestRefusedError, match="no"):
        send(lane)
    assert not lane.was_resent


def test_a_restarted_server_is_asked_again(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    desk.stop()
    place.desks.remove(desk)
    again = place.desk()
    send(lane)
    assert again.kinds[-2:] == ["Hello", "Send"]


def test_a_server_that_dies_with_the_request_in_hand_is_asked_again_when_it_is_back(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    taken = threading.Event()
    desk.answer = lambda request, peer: taken.set() or []  # type: ignore[func-returns-value]
    answers: list[Sent] = []
    asker = threading.Thread(target=lambda: answers.append(send(lane)))
    asker.start()
    assert taken.wait(DEADLINE_S)
    desk.stop()
    place.desks.remove(desk)
    again = place.desk()
    asker.join(DEADLINE_S)
    assert [answer.base_offset for answer in answers] == [7]
    assert again.kinds == ["Hello", "Send"]
    assert lane.was_resent
    send(lane)
    assert not lane.was_resent


def test_a_session_that_must_be_over_is_not_tried(place: Place, desk: Desk) -> None:
    desk.session_timeout_ms = 0
    lane = place.lane()
    send(lane)
    send(lane)
    assert desk.kinds == ["Hello", "Send", "Hello", "Send"]


def test_a_lane_made_before_its_server_waits_for_it(place: Place) -> None:
    first = place.desk()
    first.stop()
    place.desks.remove(first)
    lane = place.lane()
    answers: list[Sent] = []
    asker = threading.Thread(target=lambda: answers.append(send(lane)))
    asker.start()
    place.desk()
    asker.join(DEADLINE_S)
    assert len(answers) == 1


# --- refusals and deadlines ---------------------------------------------------------------------------------------------


def test_a_refusal_is_raised_with_its_type_and_facts(place: Place, desk: Desk) -> None:
    desk.answer = lambda request, peer: (
        desk.store(request, peer) if isinstance(request, Hello)
        else [Failed(request.number, Code.DISK_FULL, "full", {"free_bytes": 1})]
    )
    lane = place.lane()
    with pytest.raises(DiskFullError) as caught:
        send(lane)
    assert caught.value.facts == {"free_bytes": 1}
    desk.answer = desk.store
    send(lane)
    assert desk.kinds.count("Hello") == 1, "a refusal is no reason to open a session"


def test_a_refused_session_is_raised(place: Place, desk: Desk) -> None:
    desk.answer = lambda request, peer: [Failed(request.number, Code.UNAUTHORIZED, "not you")]
    lane = place.lane()
    with pytest.raises(RequestRefusedError) as caught:
        send(lane)
    assert caught.value.code == Code.UNAUTHORIZED
    desk.answer = desk.store
    send(lane)


def test_a_session_refused_for_now_is_asked_for_again(place: Place, desk: Desk) -> None:
    tries: list[int] = []

    def answer(request: AnyRequest, peer: bytes) -> list[Reply]:
        tries.append(1)
        return [Failed(request.number, Code.TOO_MANY_REQUESTS, "later")] if len(tries) < 4 else desk.store(request, peer)

    desk.answer = answer
    send(place.lane())
    assert desk.kinds == ["Hello"] * 4 + ["Send"]


@pytest.mark.parametrize("timeout_ms", [1, 150])
def test_nobody_there_is_unreachable_within_the_deadline(place: Place, timeout_ms: int) -> None:
    desk = place.desk()
    desk.stop()
    place.desks.remove(desk)
    with pytest.raises(UnreachableError, match="check that a zrmq server runs there") as caught:
        send(place.lane(), timeout_ms=timeout_ms)
    assert caught.value.facts["timeout_ms"] == timeout_ms


def test_no_answer_is_a_timeout_and_a_late_answer_is_not_the_next_ones(place: Place, desk: Desk) -> None:
    kept: list[tuple[AnyRequest, bytes]] = []

    def keep(request: AnyRequest, peer: bytes) -> list[Reply]:
        if isinstance(request, Hello):
            return desk.store(request, peer)
        kept.append((request, peer))
        return []

    desk.answer = keep
    lane = place.lane()
    with pytest.raises(RequestTimeoutError, match="may have been done all the same"):
        send(lane, timeout_ms=150)
    desk.answer = desk.store
    request, peer = kept[0]
    desk.reactor.call_soon_threadsafe(lambda: desk.endpoint.send(peer, [encode(Sent(request.number, 999, 1, FlushMode.SYNC))]))
    assert send(lane).base_offset == 7


def test_a_hello_without_an_answer_is_unreachable(place: Place, desk: Desk) -> None:
    desk.answer = lambda request, peer: []
    with pytest.raises(UnreachableError):
        send(place.lane(), timeout_ms=200)


def test_noise_does_not_keep_a_lane_waiting_beyond_its_deadline(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)

    def babble(peer: bytes) -> None:
        for noise in (b"\xc1", encode(Done(0)), encode(Done(99_999))):
            desk.endpoint.send(peer, [noise])
        if lane.undecodable_count < 10_000:
            desk.reactor.call_later(0.1, lambda: babble(peer))

    desk.answer = lambda request, peer: babble(peer) or []  # type: ignore[func-returns-value]
    with pytest.raises(RequestTimeoutError):
        send(lane, timeout_ms=200)
    assert lane.undecodable_count > 0
    lane.undecodable_count = 10_000


def test_an_answer_that_was_cut_off_is_no_answer(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)

    def answer(request: AnyRequest, peer: bytes) -> list[Reply]:
        desk.endpoint.send(peer, [encode(Sent(request.number, 7, 1, FlushMode.SYNC)), *[b""] * FRAME_COUNT_MAX])
        return []

    desk.answer = answer
    with pytest.raises(RequestTimeoutError):
        send(lane, timeout_ms=150)
    assert lane.undecodable_count == 1


# --- the end ------------------------------------------------------------------------------------------------------------


def test_close_says_bye(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    lane.close()
    assert desk.kinds == ["Hello", "Send", "Bye"]
    with pytest.raises(ClosedError):
        send(lane)
    lane.close()


@pytest.mark.timeout(20)
def test_close_does_not_wait_for_a_server_that_says_nothing(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    desk.answer = lambda request, peer: []
    lane.close()  # the test's own time bound ends what waits for ever


def test_close_before_it_was_used(place: Place) -> None:
    if place.kind == "tcp":
        place.address = "tcp://127.0.0.1:1"
    place.lane().close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "nowhere", "tcp://*:1", "tcp://-host:1"])
def test_an_address_that_cannot_be_one_is_refused(address: str) -> None:
    context = make_context()
    with pytest.raises(InvalidArgumentError):
        open_lane(context, address, Identity("c", "producer"))
    assert end_context(context)


def test_a_forked_child_is_refused_and_its_parent_undisturbed(place: Place, desk: Desk) -> None:
    lane = place.lane()
    send(lane)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            send(lane)
        except ForkedClientError:
            lane._is_closed = True  # the child ends without a word to the server
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        assert answer.read() == "refused"
    send(lane)
    assert desk.kinds == ["Hello", "Send", "Send"]


def test_a_context_that_has_ended_is_not_taken_for_a_wrong_address() -> None:
    """An inproc lane looks again and again for who listens, so its context may end just before it connects."""

    class Ended:
        def connect(self, address: str) -> None:
            raise zmq.ContextTerminated

    with pytest.raises(zmq.ContextTerminated):
        connect_socket(Ended(), parse_address("inproc://nobody"))  # type: ignore[arg-type]


def test_a_lane_whose_context_was_ended_says_so() -> None:
    context = make_context()
    lane = open_lane(context, "inproc://nobody", Identity("c", "producer"))
    ended = threading.Thread(target=lambda: end_context(context, timeout_ms=10_000))
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            send(lane)
        except ClosedError as error:
            raised.append(error)

    desk = Desk("inproc://nobody", context)
    desk.answer = lambda request, peer: []
    asker = threading.Thread(target=ask)
    asker.start()
    ended.start()
    asker.join(DEADLINE_S)
    lane.close()
    desk.stop()
    ended.join(DEADLINE_S)
    assert [str(error) for error in raised] != []
