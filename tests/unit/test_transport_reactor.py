"""zrmq/transport/reactor.py: what it has beyond the loop contract: failures, threads, bursts, its end, and forks."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq

from zrmq.errors import ClosedError, ForkedClientError, ResourceLimitError
from zrmq.transport import reactor as reactor_module
from zrmq.transport import server as server_module
from zrmq.transport.options import end_context, make_context
from zrmq.transport.reactor import Reactor

DEADLINE_S = 10.0


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


class Deaf:
    """A listener that does nothing."""

    def on_connected(self) -> None: ...
    def on_disconnected(self) -> None: ...
    def on_frames(self, frames: list[bytes]) -> None: ...


def run_bounded(reactor: Reactor) -> None:
    """Run in this thread; give up after the deadline."""
    reactor.call_later(DEADLINE_S * 1_000, reactor.stop)
    started_ms = reactor.clock.monotonic_ms()
    reactor.run()
    assert reactor.clock.monotonic_ms() - started_ms < DEADLINE_S * 1_000, "nothing stopped the loop in time"


# --- failures -----------------------------------------------------------------------------------------------------------


def fail() -> None:
    raise LookupError("a bug")


def test_a_callback_that_raises_is_logged_and_the_rest_goes_on(reactor: Reactor, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    for later in (lambda call: reactor.call_later(1, call), reactor.call_soon_threadsafe):
        later(fail)
        later(lambda: done.append("next"))
    reactor.call_later(5, reactor.stop)
    run_bounded(reactor)
    assert done == ["next", "next"]
    assert reactor.failed_count == 2
    assert "LookupError: a bug" in capsys.readouterr().err


def test_a_handler_that_raises_costs_its_message_only(reactor: Reactor) -> None:
    seen: list[bytes] = []

    def handle(peer: bytes, frames: list[bytes]) -> None:
        seen.append(frames[0])
        if frames[0] == b"bad":
            fail()
        if len(seen) == 4:
            reactor.stop()

    endpoint = reactor.listen("inproc://fails", handle)

    class Sender(Deaf):
        def on_connected(self) -> None:
            assert all(connection.send([body]) for body in (b"good", b"bad", b"bad", b"good"))

    connection = reactor.connect(endpoint.address, Sender())
    run_bounded(reactor)
    assert seen == [b"good", b"bad", b"bad", b"good"]
    assert reactor.failed_count == 2


def test_timers_are_not_starved_by_handlers_that_fail_for_ever(reactor: Reactor) -> None:
    def again() -> None:
        reactor.call_soon_threadsafe(again)
        fail()

    reactor.call_soon_threadsafe(again)
    reactor.call_later(20, reactor.stop)
    run_bounded(reactor)
    assert reactor.failed_count > 1


def test_a_hook_that_raises_ends_the_loop(reactor: Reactor) -> None:
    reactor.before_sleep(fail)
    with pytest.raises(LookupError):
        reactor.run()
    with pytest.raises(ClosedError):
        reactor.call_soon_threadsafe(lambda: None)


# --- threads ------------------------------------------------------------------------------------------------------------


def in_thread(call: Callable[[], object]) -> BaseException | None:
    """What the call raises in another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  handed to the test
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_who_uses_it_first_owns_it(reactor: Reactor) -> None:
    reactor.call_later(1_000, lambda: None)
    for call in (
        lambda: reactor.call_later(0, lambda: None), lambda: reactor.connect("tcp://127.0.0.1:1", Deaf()),
        lambda: reactor.connect_push("tcp://127.0.0.1:1"), lambda: reactor.listen("inproc://x", lambda peer, frames: None),
        lambda: reactor.listen_pull("inproc://x", lambda peer, frames: None), reactor.run,
    ):
        assert isinstance(in_thread(call), AssertionError)
    endpoint = reactor.listen("inproc://owned", lambda peer, frames: None)
    for connection in (
        reactor.connect("inproc://owned", Deaf()), reactor.connect("tcp://127.0.0.1:1", Deaf()),
        reactor.connect_push("tcp://127.0.0.1:1"),
    ):
        assert isinstance(in_thread(lambda connection=connection: connection.send([b"x"])), AssertionError)  # type: ignore[misc]
    assert isinstance(in_thread(lambda: endpoint.send(b"peer", [b"x"])), AssertionError)
    assert in_thread(lambda: reactor.call_soon_threadsafe(lambda: None)) is None
    assert in_thread(reactor.stop) is None


def test_a_reactor_made_in_one_thread_runs_in_another() -> None:
    reactor = Reactor()
    reactor.call_soon_threadsafe(reactor.stop)
    assert in_thread(reactor.run) is None
    reactor.close()


def test_calls_from_many_threads_wake_it_and_none_is_lost(reactor: Reactor) -> None:
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda: [reactor.call_soon_threadsafe(lambda: made.append(1)) for _ in range(500)])
        for _ in range(8)
    ]

    def look() -> None:
        if len(made) == 4_000:
            reactor.stop()

    reactor.before_sleep(look)
    for thread in threads:
        thread.start()
    run_bounded(reactor)
    for thread in threads:
        thread.join()
    assert len(made) == 4_000


def test_a_call_is_made_or_refused_however_close_to_the_end(reactor: Reactor) -> None:
    made: list[int] = []
    refused: list[int] = []
    begun = threading.Event()

    def post() -> None:
        number = 0
        while not refused:
            number += 1
            try:
                reactor.call_soon_threadsafe(lambda: made.append(1))
            except ClosedError:
                refused.append(number)
            if number == 100:
                begun.set()

    thread = threading.Thread(target=post)
    thread.start()
    begun.wait(DEADLINE_S)
    reactor.call_later(5, reactor.stop)
    reactor.run()
    thread.join(DEADLINE_S)
    assert len(made) == refused[0] - 1


def test_a_signal_handler_may_call(reactor: Reactor) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: reactor.call_soon_threadsafe(reactor.stop))
    try:
        sender = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGUSR1))
        reactor.call_later(20, sender.start)
        run_bounded(reactor)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="it rings otherwise here")
def test_a_signal_handler_that_interrupted_a_ring_may_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that closes a producer does: the loop ends meanwhile, and its descriptor only when the ring is over."""
    reactor = Reactor()
    thread = threading.Thread(target=lambda: (reactor.run(), reactor.close()))
    interrupted: list[bool] = []

    def write(descriptor: int, value: int) -> None:
        real_write(descriptor, value)
        if threading.current_thread() is not thread and not interrupted:
            interrupted.append(True)
            reactor.stop()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
            real_write(descriptor, value)  # still ours: no OSError

    real_write = reactor_module.os.eventfd_write
    monkeypatch.setattr(reactor_module.os, "eventfd_write", write)
    thread.start()
    while not interrupted:
        reactor.call_soon_threadsafe(lambda: None)
    with pytest.raises(ClosedError):
        reactor.call_soon_threadsafe(lambda: None)


def test_it_wakes_by_a_pair_of_sockets_where_there_is_no_eventfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reactor_module.os, "eventfd", raising=False)
    reactor = Reactor()
    assert socket.socket(fileno=os.dup(reactor._bell.descriptor)).close() is None
    ringer = threading.Thread(target=lambda: [reactor.call_soon_threadsafe(lambda: None) for _ in range(20_000)])
    reactor.call_later(20, lambda: (ringer.start(), ringer.join(), reactor.call_soon_threadsafe(reactor.stop)))  # type: ignore
    run_bounded(reactor)
    for _ in range(100_000):
        reactor.stop()  # more rings than the pair has room for
    reactor.close()


# --- bursts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "size", "most"), [(1_000, 10, 256), (100, 1_000_000, 9)])
def test_a_busy_socket_is_read_in_bursts(reactor: Reactor, messages: int, size: int, most: int) -> None:
    """Timers, other sockets and group commit have their turn between bursts, bounded in messages and in bytes."""
    turns: list[int] = []
    count = 0

    def handle(peer: bytes, frames: list[bytes]) -> None:
        nonlocal count
        count += 1

    def hook() -> None:
        nonlocal count
        turns.append(count)
        count = 0
        if sum(turns) == messages:
            reactor.stop()

    endpoint = reactor.listen("inproc://busy", handle)
    reactor.before_sleep(hook)
    body = bytes(size)

    class Sender(Deaf):
        def on_connected(self) -> None:
            assert all(connection.send([body]) for _ in range(messages))

    connection = reactor.connect(endpoint.address, Sender())
    run_bounded(reactor)
    assert max(turns) <= most
    assert max(turns) >= min(most, server_module.BURST_MESSAGES_MAX) - 1
    assert sum(turns) == messages


# --- the end ------------------------------------------------------------------------------------------------------------


def test_close_without_run_frees_everything() -> None:
    reactor = Reactor()
    reactor.connect("tcp://127.0.0.1:1", Deaf())
    reactor.connect_push("tcp://127.0.0.1:1")
    reactor.listen("tcp://127.0.0.1:0", lambda peer, frames: None)
    reactor.close()
    assert reactor.context.closed
    reactor.close()
    reactor.stop()
    for call in (
        lambda: reactor.connect("tcp://127.0.0.1:1", Deaf()), lambda: reactor.call_soon_threadsafe(lambda: None), reactor.run,
    ):
        with pytest.raises(ClosedError):
            call()
    reactor.call_later(0, lambda: None)


@pytest.mark.timeout(20)
def test_close_does_not_wait_for_what_nobody_takes(reactor: Reactor) -> None:
    """One-way messages to a server that does not read them: the linger is bounded, and so is the end."""
    stuck = zmq.Context()
    pull = stuck.socket(zmq.PULL)
    pull.set(zmq.RCVHWM, 1)
    port = pull.bind_to_random_port("tcp://127.0.0.1")
    connection = reactor.connect_push(f"tcp://127.0.0.1:{port}")
    sent: list[int] = []

    def push() -> None:
        while len(sent) < 500 and connection.send([bytes(100_000)]):
            sent.append(1)
        if sent:
            reactor.stop()
        else:
            reactor.call_later(5, push)

    reactor.call_later(0, push)
    run_bounded(reactor)
    reactor.close()  # the test's own time bound ends what waits for ever
    pull.close(0)
    stuck.term()


def test_a_context_that_was_handed_in_is_left_alone() -> None:
    context = make_context()
    reactor = Reactor(context)
    reactor.listen("inproc://a", lambda peer, frames: None)
    reactor.close()
    assert not context.closed
    assert end_context(context)


def test_a_context_that_has_ended_is_told_to_the_maker() -> None:
    """Not by the loop's end, which says nothing of the cause."""
    context = make_context()
    context.term()
    with pytest.raises(ClosedError, match="The context has ended; leave context= out"):
        Reactor(context)


def test_a_context_that_gives_no_socket_is_told_to_the_maker() -> None:
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 1)
    with context.socket(zmq.PAIR), pytest.raises(ResourceLimitError, match="no more sockets or open files .*MAX_SOCKETS"):
        Reactor(context)
    context.term()


def test_a_system_that_gives_no_descriptor_is_told_to_the_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "eventfd", refuse, raising=False)
    with pytest.raises(ResourceLimitError, match=r"\(Too many open files\); close some, or raise the limits \(ulimit -n"):
        Reactor()


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="it needs others here")
def test_a_context_of_its_own_is_made_only_where_libzmq_finds_what_it_cannot_do_without() -> None:
    """Else it aborts the process. What is opened before the first socket takes nothing from it."""
    done = subprocess.run([sys.executable, "-c", WITH_FEW_DESCRIPTORS], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stdout.split()
    assert set(told) == {"refused", "made"}
    assert told == sorted(told, reverse=True), "from some number on it is made"


WITH_FEW_DESCRIPTORS = """
import os, resource, zmq.utils.garbage
from zrmq.errors import ResourceLimitError
from zrmq.transport.reactor import RESERVE, Reactor

def take():
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass

def use():
    reactor = Reactor()
    take()
    reactor.listen("tcp://127.0.0.1:0", print)
    reactor.listen_pull("tcp://127.0.0.1:0", print)

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
take()
for free in range(RESERVE + 6):
    child = os.fork()
    if child == 0:
        for descriptor in taken[:free]:
            os.close(descriptor)
        try:
            use()
        except ResourceLimitError:
            os._exit(3)
        os._exit(0)
    print({0: "made", 3: "refused"}.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "failed"))
"""


def test_the_end_of_the_context_ends_the_loop() -> None:
    context = make_context()
    reactor = Reactor(context)
    reactor.connect("inproc://nowhere", Deaf())
    reactor.listen("inproc://here", lambda peer, frames: None)
    ended = threading.Event()
    reactor.call_later(0, lambda: threading.Thread(target=lambda: (end_context(context), ended.set())).start())  # type: ignore
    run_bounded(reactor)
    reactor.close()
    assert ended.wait(DEADLINE_S)
    assert context.closed


def test_the_end_of_the_context_ends_a_loop_that_has_no_socket_open() -> None:
    context = make_context()
    reactor = Reactor(context)
    reactor.call_later(0, lambda: threading.Thread(target=context.term).start())
    run_bounded(reactor)
    reactor.close()


def test_the_end_of_the_context_costs_no_call_that_was_asked_for(reactor: Reactor) -> None:
    done: list[int] = []

    def fail_so() -> None:
        raise zmq.ContextTerminated

    for call in (fail_so, fail_so, lambda: done.append(1), fail_so, lambda: done.append(2)):
        reactor.call_soon_threadsafe(call)
    run_bounded(reactor)
    assert done == [1, 2]


def test_a_loop_is_run_once(reactor: Reactor) -> None:
    reactor.call_soon_threadsafe(reactor.stop)
    reactor.run()
    with pytest.raises(ClosedError):
        reactor.run()


def test_what_was_called_before_stop_is_still_done(reactor: Reactor) -> None:
    done: list[int] = []
    reactor.stop()
    reactor.call_soon_threadsafe(lambda: done.append(1))
    reactor.call_soon_threadsafe(fail)
    reactor.call_soon_threadsafe(lambda: done.append(2))
    reactor.run()
    assert done == [1, 2]


def test_a_forked_child_is_refused(reactor: Reactor) -> None:
    reactor.call_later(1_000, lambda: None)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = 0
        for call in (
            lambda: reactor.call_soon_threadsafe(lambda: None), lambda: reactor.connect("inproc://x", Deaf()), reactor.run,
            lambda: reactor.listen("inproc://x", lambda peer, frames: None),
        ):
            try:
                call()
            except ForkedClientError:
                told += 1
        os.write(writer, b"%d" % told)
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        assert answer.read() == "4"
