"""zrmq/transport/server.py: where it may listen, and what it does with peers that are gone, full or hostile."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import zmq
from zmq.utils import garbage

from zrmq.errors import AddressInUseError, InvalidArgumentError
from zrmq.protocol.limits import FRAME_COUNT_MAX, MESSAGE_BYTES_MAX
from zrmq.protocol.requests import Heartbeat, Send, encode
from zrmq.transport.reactor import Reactor
from zrmq.transport.server import SocketEndpoint

DEADLINE_MS = 20_000


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()
    assert made.failed_count == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """In here nothing more can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def ignore(peer: bytes, frames: list[bytes]) -> None:
    pass


def run_until(reactor: Reactor, condition: Callable[[], bool], step: Callable[[], object] = lambda: None) -> None:
    """Run the loop once, with `step` every few milliseconds, until the condition holds."""
    late: list[bool] = []

    def look() -> None:
        if condition():
            reactor.stop()
        else:
            step()
            reactor.call_later(2, look)

    reactor.call_later(0, look)
    reactor.call_later(DEADLINE_MS, lambda: (late.append(True), reactor.stop()))  # type: ignore[func-returns-value]
    reactor.run()
    assert not late, "the condition did not hold in time"


# --- tcp ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "*", "[::]"])
def test_port_zero_picks_a_port_and_keeps_the_host(reactor: Reactor, host: str) -> None:
    endpoint = reactor.listen(f"tcp://{host}:0", ignore)
    place, _, port = endpoint.address.removeprefix("tcp://").rpartition(":")
    assert place == host
    assert int(port) > 0
    with socket.create_connection(("::1" if host == "[::1]" else "127.0.0.1", int(port)), timeout=5):
        pass


def test_a_port_of_another_program_is_refused_with_what_to_do(reactor: Reactor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError, match="another port") as caught:
            reactor.listen(f"tcp://127.0.0.1:{port}", ignore)
        assert caught.value.facts["address"] == f"tcp://127.0.0.1:{port}"


@pytest.mark.parametrize("address", ["tcp://203.0.113.7:0", "tcp://no-such-interface:0"])
def test_an_address_of_another_machine_is_refused(reactor: Reactor, address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="of this machine"):
        reactor.listen(address, ignore)


def test_a_closed_port_can_be_used_at_once(reactor: Reactor) -> None:
    address = "tcp://127.0.0.1:0"
    for _ in range(20):
        endpoint = reactor.listen(address, ignore)
        address = endpoint.address
        endpoint.close()


@pytest.mark.skipif(sys.platform != "linux", reason="tells by /proc what is open")
def test_a_server_without_a_free_descriptor_can_be_closed(reactor: Reactor) -> None:
    endpoint = reactor.listen("tcp://127.0.0.1:0", ignore)
    with no_descriptor_left():
        endpoint.close()
    assert not endpoint.send(b"nobody", [b"x"])


# --- ipc ----------------------------------------------------------------------------------------------------------------


def test_a_live_ipc_path_is_not_stolen(reactor: Reactor, folder: Path) -> None:
    address = f"ipc://{folder}/s"
    reactor.listen(address, ignore)
    with pytest.raises(AddressInUseError):
        reactor.listen(address, ignore)
    other = Reactor()
    with pytest.raises(AddressInUseError):
        other.listen_pull(address, ignore)
    other.close()


def test_the_socket_of_a_killed_server_is_replaced(reactor: Reactor, folder: Path) -> None:
    path = folder / "s"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.listen()
    left_behind.close()
    assert path.is_socket()
    reactor.listen(f"ipc://{path}", ignore)


def test_a_server_whose_backlog_is_full_is_alive(reactor: Reactor, folder: Path) -> None:
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        waiting = []
        with suppress(BlockingIOError):
            for _ in range(100):
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(path)
        with pytest.raises(AddressInUseError):
            reactor.listen(f"ipc://{path}", ignore)
        for each in waiting:
            each.close()


def test_a_file_is_not_replaced(reactor: Reactor, folder: Path) -> None:
    file = folder / "precious"
    file.write_text("data")
    with pytest.raises(InvalidArgumentError, match="no socket"):
        reactor.listen(f"ipc://{file}", ignore)
    assert file.read_text() == "data"


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
def test_a_folder_others_can_enter_is_refused(reactor: Reactor, folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(InvalidArgumentError, match=f"chmod 700 {folder}") as caught:
        reactor.listen(f"ipc://{folder}/s", ignore)
    assert caught.value.facts["mode"] == oct(mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user_is_refused(reactor: Reactor, folder: Path) -> None:
    os.chown(folder, 12_345, -1)
    with pytest.raises(InvalidArgumentError, match="this user's alone"):
        reactor.listen(f"ipc://{folder}/s", ignore)


def test_a_folder_that_is_missing_is_named(reactor: Reactor, folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{folder}/missing .*make it first"):
        reactor.listen(f"ipc://{folder}/missing/s", ignore)


def test_a_path_relative_to_here_works(reactor: Reactor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    reactor.listen("ipc://s", ignore)
    assert (folder / "s").is_socket()


def test_a_closed_ipc_path_can_be_used_at_once(reactor: Reactor, folder: Path) -> None:
    for _ in range(20):
        endpoint = reactor.listen(f"ipc://{folder}/s", ignore)
        assert (folder / "s").is_socket()
        endpoint.close()
        with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(folder / "s"))


# --- inproc -------------------------------------------------------------------------------------------------------------


def test_an_inproc_name_is_taken_once_and_free_after_close(reactor: Reactor) -> None:
    for _ in range(5):
        endpoint = reactor.listen("inproc://name", ignore)
        with pytest.raises(AddressInUseError):
            reactor.listen_pull("inproc://name", ignore)
        endpoint.close()


# --- peers that do not take what they are sent --------------------------------------------------------------------------


def test_sends_to_peers_that_are_gone_are_counted(reactor: Reactor) -> None:
    endpoint = reactor.listen("inproc://x", ignore)
    assert not endpoint.send(b"nobody", [b"x"])
    assert not endpoint.send(b"", [b"x", b"y"])
    assert (endpoint.unreachable_count, endpoint.full_count) == (2, 0)


def answer(reactor: Reactor, give: Callable[[SocketEndpoint, bytes], bool]) -> bool:
    """Let a client ask, and the server's end give its answer; whether that was sent."""
    heard: list[bytes] = []
    endpoint = reactor.listen("inproc://x", lambda peer, frames: heard.append(peer))
    dealer = reactor.context.socket(zmq.DEALER)
    dealer.connect(endpoint.address)
    dealer.send(b"hello")
    run_until(reactor, lambda: bool(heard))
    was_sent = give(endpoint, heard[0])
    dealer.close(0)
    return was_sent


@pytest.mark.skipif(sys.platform != "linux", reason="tells by /proc what is open")
def test_the_first_large_answer_needs_no_descriptor(reactor: Reactor) -> None:
    garbage.gc.stop()  # as in a process that has not sent anything yet

    def give(endpoint: SocketEndpoint, peer: bytes) -> bool:
        with no_descriptor_left():
            return endpoint.send(peer, [b"header", bytes(1_000_000)])

    assert answer(reactor, give)


def test_whatever_goes_wrong_with_an_answer_is_one_peers(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room for it")

    monkeypatch.setattr("zrmq.transport.server.send_message", fail)
    assert not answer(reactor, lambda endpoint, peer: endpoint.send(peer, [b"x"]))
    assert "OSError: no room for it" in capsys.readouterr().err


def test_a_peer_that_reads_nothing_is_full_and_others_are_served(reactor: Reactor) -> None:
    """Nothing blocks: the slow one gets False, the quick one its answers."""
    heard: dict[bytes, bytes] = {}
    endpoint = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: heard.__setitem__(frames[0], peer))
    own = zmq.Context()
    slow, quick = own.socket(zmq.DEALER), own.socket(zmq.DEALER)
    slow.set(zmq.RCVHWM, 1)
    for name, dealer in ((b"slow", slow), (b"quick", quick)):
        dealer.connect(endpoint.address)
        dealer.send(name)
    big = bytes(1_000_000)
    answered: list[bytes] = []

    def feed() -> None:
        while b"slow" in heard and not endpoint.full_count and endpoint.send(heard[b"slow"], [b"h" * 100]):
            endpoint.send(heard[b"slow"], [big])
        if endpoint.full_count and not answered and b"quick" in heard:
            assert endpoint.send(heard[b"quick"], [b"answer"])
            assert quick.poll(5_000)
            answered.append(quick.recv())

    run_until(reactor, lambda: bool(answered), feed)
    assert answered == [b"answer"]
    assert endpoint.full_count == 1
    assert endpoint.unreachable_count == 0
    own.destroy(linger=0)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "inproc://x"])
@pytest.mark.parametrize("size", [10_000, 100_000, 5_000_000])
def test_a_peer_that_reads_nothing_has_no_room_until_it_has_read(reactor: Reactor, address: str, size: int) -> None:
    heard: dict[bytes, bytes] = {}
    endpoint = reactor.listen(address, lambda peer, frames: heard.__setitem__(frames[0], peer))
    dealers = {name: reactor.context.socket(zmq.DEALER) for name in (b"slow", b"quick")}
    for name, dealer in dealers.items():
        dealer.connect(endpoint.address)
        dealer.send(name)
    message = [b"header", bytes(size)]
    sent: list[bool] = []
    room: dict[bytes, bool] = {}  # by name, when the slow one had none any more
    received: list[list[bytes]] = []

    def step() -> None:
        if len(heard) < 2:
            return
        while not room:
            sent.append(endpoint.send(heard[b"slow"], message))
            if len(sent) * size > 60_000_000 or not endpoint.has_room(heard[b"slow"]):
                room.update({name: endpoint.has_room(peer) for name, peer in (*heard.items(), (b"nobody", b"nobody"))})
                endpoint.send(heard[b"quick"], message)
        while dealers[b"slow"].poll(0):
            received.append(dealers[b"slow"].recv_multipart())

    run_until(reactor, lambda: 0 < len(sent) == len(received) and endpoint.has_room(heard[b"slow"]), step)
    assert room == {b"slow": False, b"quick": True, b"nobody": True}
    assert all(sent)
    assert all(frames == message for frames in received)
    for dealer in dealers.values():
        dealer.close(0)


def test_what_a_peer_that_is_gone_did_not_read_is_forgotten(reactor: Reactor) -> None:
    heard: list[bytes] = []
    endpoint = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: heard.append(peer))
    dealer = reactor.context.socket(zmq.DEALER)
    dealer.connect(endpoint.address)
    dealer.send(b"hello")
    was_full: list[bool] = []

    def step() -> None:
        if heard and not was_full:
            for _ in range(60):
                if endpoint.has_room(heard[0]):
                    endpoint.send(heard[0], [b"header", bytes(1_000_000)])
            was_full.append(not endpoint.has_room(heard[0]))
            dealer.close(0)

    run_until(reactor, lambda: bool(was_full) and endpoint.has_room(heard[0]), step)
    assert was_full == [True]


def test_what_a_server_does_not_read_waits_with_its_client(reactor: Reactor) -> None:
    received: list[int] = []
    endpoint = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: received.append(len(frames[1])))
    own = zmq.Context()
    dealer = own.socket(zmq.DEALER)
    dealer.set(zmq.SNDHWM, 1)
    dealer.connect(endpoint.address)
    size, sent = 500_000, 0
    while sent < 400 and dealer.poll(500, zmq.POLLOUT):
        dealer.send_multipart([b"header", bytes(size)])
        sent += 1
    assert 0 < sent < 200
    run_until(reactor, lambda: len(received) == sent)
    assert received == [size] * sent
    own.destroy(linger=0)


# --- hostile bytes ------------------------------------------------------------------------------------------------------


class Witness:
    """A well-behaved client that asks again and again, and notes what it loses."""

    def __init__(self, reactor: Reactor, address: str) -> None:
        self.asked = self.answered = 0
        self.lost = 0
        self.is_connected = False
        self.connection = reactor.connect(address, self)

    def on_connected(self) -> None:
        self.is_connected = True
        self.ask()

    def on_disconnected(self) -> None:
        self.lost += 1

    def on_frames(self, frames: list[bytes]) -> None:
        assert frames == [b"witness %d" % self.answered]
        self.answered += 1
        self.ask()

    def ask(self) -> None:
        assert self.connection.send([b"witness %d" % self.asked])
        self.asked += 1


def mutations(rng: Random) -> Iterator[list[bytes]]:
    """Messages as a hostile client may send them: good ones, then bent, cut, grown and shuffled."""
    good = [encode(Heartbeat(1, 0)), encode(Send(2, 1_000, "topic", 3)), rng.randbytes(400)]
    while True:
        frames = [bytearray(rng.choice(good)) for _ in range(rng.choice((1, 1, 2, 3, 8)))]
        for frame in frames:
            for _ in range(rng.randrange(4)):
                if frame:
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
            kind = rng.randrange(5)
            if kind == 0:
                del frame[rng.randrange(len(frame) + 1) :]
            elif kind == 1:
                frame += rng.randbytes(rng.randrange(300))
            elif kind == 2:
                frame[:] = frame[::-1]
        yield [bytes(frame) for frame in frames]


def raw_greetings(rng: Random) -> Iterator[bytes]:
    """Bytes below the level of messages: port scans, half greetings, wrong versions, frames that lie about their length."""
    greeting = bytes.fromhex("ff00000000000000017f03004e554c4c") + bytes(48)
    ready = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    while True:
        data = bytearray(rng.choice((greeting, greeting + ready, b"GET / HTTP/1.1\r\n\r\n", b"", rng.randbytes(100))))
        if rng.random() < 0.5:
            data += rng.choice((b"\x02" + b"\xff" * 8, b"\x03" + bytes(8), b"\x00\xffabc", b"\x04\x00", b"\x01\x00" * 50))
        for _ in range(rng.randrange(3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        yield bytes(data[: rng.randrange(len(data) + 1)])


@pytest.mark.parametrize("pull", [False, True], ids=["router", "pull"])
def test_thousands_of_hostile_messages_disturb_nobody(reactor: Reactor, pull: bool) -> None:
    rng = Random(12)
    wrong: list[object] = []
    received = [0]

    def handle(peer: bytes, frames: list[bytes]) -> None:
        received[0] += 1
        if not frames or not all(type(frame) is bytes for frame in frames):
            wrong.append(frames)
        if peer and frames[0].startswith(b"witness"):
            router.send(peer, frames)

    router = reactor.listen("tcp://127.0.0.1:0", handle)
    target: SocketEndpoint = reactor.listen_pull("tcp://127.0.0.1:0", handle) if pull else router
    witness = Witness(reactor, router.address)
    own = zmq.Context()
    hostile = own.socket(zmq.PUSH if pull else zmq.DEALER)
    hostile.connect(target.address)
    messages = mutations(rng)
    left = [4_000]

    def attack() -> None:
        for _ in range(min(100, left[0])):
            hostile.send_multipart(next(messages))
            left[0] -= 1

    run_until(reactor, lambda: not left[0] and received[0] - witness.asked >= 3_900 and witness.answered > 50, attack)
    assert wrong == []
    assert witness.lost == 0
    own.destroy(linger=0)


def test_bytes_that_are_no_zmtp_disturb_nobody(reactor: Reactor) -> None:
    rng = Random(5)
    router = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: router.send(peer, frames) and None)
    port = int(router.address.rpartition(":")[2])
    witness = Witness(reactor, router.address)
    greetings = raw_greetings(rng)
    left = [400]

    def attack() -> None:
        for _ in range(min(10, left[0])):
            left[0] -= 1
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw, suppress(OSError):
                raw.sendall(next(greetings))

    run_until(reactor, lambda: not left[0] and witness.answered > 100, attack)
    assert witness.lost == 0


def test_a_message_of_endless_frames_is_cut_off_where_it_is_too_long(reactor: Reactor) -> None:
    lengths: list[int] = []
    router = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: lengths.append(len(frames)))
    own = zmq.Context()
    hostile = own.socket(zmq.DEALER)
    hostile.connect(router.address)
    hostile.send_multipart([b"x"] * 20_000)
    hostile.send_multipart([b"x"] * FRAME_COUNT_MAX)
    run_until(reactor, lambda: len(lengths) == 2)
    assert lengths == [FRAME_COUNT_MAX + 1, FRAME_COUNT_MAX]
    own.destroy(linger=0)


def test_a_frame_beyond_the_limit_costs_its_sender_the_connection_and_nobody_else(reactor: Reactor) -> None:
    seen: list[int] = []
    router = reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: seen.append(len(frames[0])) or router.send(peer, frames))
    witness = Witness(reactor, router.address)
    own = zmq.Context()
    hostile = own.socket(zmq.DEALER)
    events = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    hostile.connect(router.address)
    hostile.send(bytes(MESSAGE_BYTES_MAX + 1))
    run_until(reactor, lambda: bool(events.poll(0)) and witness.answered > 50)
    assert max(seen) < MESSAGE_BYTES_MAX
    assert witness.lost == 0
    hostile.disable_monitor()
    events.close(0)
    own.destroy(linger=0)
