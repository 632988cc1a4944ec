"""zrmq/transport/wire.py: frames in and out, large ones by reference, and messages that end in the middle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import Code, InvalidFrameError
from zrmq.protocol.limits import FRAME_COUNT_MAX
from zrmq.protocol.requests import check_whole
from zrmq.transport import wire
from zrmq.transport.options import Context, Socket, end_context, make_context, open_socket
from zrmq.transport.wire import COPY_BYTES_MAX, is_readable, receive_message, send_message


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    made = make_context()
    yield made
    assert end_context(made)


@pytest.fixture(scope="module")
def pair(context: Context) -> Iterator[tuple[Socket, Socket]]:
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind("inproc://wire")
    other.connect("inproc://wire")
    yield one, other
    one.close(0)
    other.close(0)


BODY = st.binary(max_size=300) | st.sampled_from([bytes(COPY_BYTES_MAX - 1), bytes(COPY_BYTES_MAX)])


@given(st.lists(BODY, min_size=1, max_size=8))
def test_what_goes_in_comes_out(pair: tuple[Socket, Socket], frames: list[bytes]) -> None:
    send_message(pair[0], frames)
    assert is_readable(pair[1])
    assert receive_message(pair[1]) == frames
    assert not is_readable(pair[1])


def test_nothing_to_receive_says_so(pair: tuple[Socket, Socket]) -> None:
    with pytest.raises(zmq.Again):
        receive_message(pair[1])


def test_large_frames_are_not_copied_and_small_ones_are(pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[bool] = []
    send = wire._send

    def spy(socket: Socket, frame: bytes, flags: int, copy: bool) -> object:
        copied.append(copy)
        return send(socket, frame, flags, copy)

    monkeypatch.setattr(wire, "_send", spy)
    big = bytearray(b"x" * COPY_BYTES_MAX)
    send_message(pair[0], [b"header", big, memoryview(big)[:-1], b""])
    assert copied == [True, False, True, True]
    assert receive_message(pair[1]) == [b"header", bytes(big), bytes(big[:-1]), b""]


def test_a_message_too_long_is_cut_and_the_next_one_whole(pair: tuple[Socket, Socket]) -> None:
    send_message(pair[0], [b"%d" % number for number in range(FRAME_COUNT_MAX + 500)])
    send_message(pair[0], [b"next"])
    cut = receive_message(pair[1])
    assert cut == [b"%d" % number for number in range(FRAME_COUNT_MAX + 2)]
    assert receive_message(pair[1]) == [b"next"]


def test_of_a_message_too_large_only_the_beginning_is_kept_and_the_next_one_is_whole(
    pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "RECEIVED_BYTES_MAX", 1_000)
    send_message(pair[0], [b"id", b"header", *[bytes(400)] * 61])
    send_message(pair[0], [b"next", bytes(1_000)])
    cut = receive_message(pair[1])
    assert cut[:5] == [b"id", b"header", *[bytes(400)] * 3]
    assert sum(map(len, cut)) == 8 + 3 * 400
    with pytest.raises(InvalidFrameError, match="frames or .* bytes") as caught:
        check_whole(cut[1:])
    assert caught.value.code is Code.PAYLOAD_TOO_LARGE
    whole = receive_message(pair[1])
    assert whole == [b"next", bytes(1_000)]
    check_whole(whole)


def test_a_message_that_is_too_large_in_its_last_frame_is_not_cut(
    pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is missing, and whoever reads it says what is wrong with it."""
    monkeypatch.setattr(wire, "RECEIVED_BYTES_MAX", 1_000)
    send_message(pair[0], [b"id", b"header", bytes(1_001)])
    assert receive_message(pair[1]) == [b"id", b"header", bytes(1_001)]


def test_a_send_without_room_leaves_nothing_behind(context: Context) -> None:
    dealer = open_socket(context, zmq.DEALER)
    with pytest.raises(zmq.Again):
        send_message(dealer, [b"a", b"b", b"c"])
    router = open_socket(context, zmq.ROUTER)
    router.bind("inproc://late")
    dealer.connect("inproc://late")
    send_message(dealer, [b"next"])
    assert receive_message(router, 0)[1:] == [b"next"]
    dealer.close(0)
    router.close(0)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_peer_lost_in_the_middle_does_not_swallow_the_next_message(
    pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """As libzmq does it: after a failed frame with MORE it drops all up to the next last frame."""
    sent: list[tuple[bytes, bool]] = []

    def fail_once(socket: Socket, frame: bytes, flags: int, copy: bool) -> None:
        if len(sent) == fails_at and frame != b"":
            raise zmq.Again
        sent.append((frame, bool(flags & zmq.SNDMORE)))

    monkeypatch.setattr(wire, "_send", fail_once)
    with pytest.raises(zmq.Again):
        send_message(pair[0], [b"a", b"b", b"c", b"d"])
    assert sent == [*[(b"a", True), (b"b", True)][:fails_at], (b"", False)]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("is_sent", [True, False])
def test_an_exception_in_the_middle_does_not_swallow_the_next_message(
    pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch, at: int, is_sent: bool
) -> None:
    """Ctrl-C while a frame is handed over, before or after it is: what arrives of that message is whole, or not its own."""
    send, left = wire._send, [at]

    def interrupted(socket: Socket, frame: bytes, flags: int, copy: bool) -> object:
        if left[0] == 0:
            monkeypatch.undo()
            if is_sent:
                send(socket, frame, flags, copy)
            raise KeyboardInterrupt
        left[0] -= 1
        return send(socket, frame, flags, copy)

    monkeypatch.setattr(wire, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        send_message(pair[0], [b"a", b"b", b"c"])
    send_message(pair[0], [b"next", b"one"])
    received: list[list[bytes]] = []
    while is_readable(pair[1]):
        received.append(receive_message(pair[1]))
    assert received[-1] == [b"next", b"one"]
    assert all(message == [b"a", b"b", b"c"] or message[-1] == b"" for message in received[:-1])


def test_a_peer_lost_at_the_last_frame_needs_no_end(pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def fail_at_c(socket: Socket, frame: bytes, flags: int, copy: bool) -> None:
        if frame == b"c":
            raise zmq.Again
        sent.append(frame)

    monkeypatch.setattr(wire, "_send", fail_at_c)
    with pytest.raises(zmq.Again):
        send_message(pair[0], [b"a", b"b", b"c"])
    assert sent == [b"a", b"b"]
