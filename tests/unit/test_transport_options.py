"""zrmq/transport/options.py: the settings of every socket, contexts that end, and forks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import zmq

from zrmq.errors import ConfigError, ForkedClientError
from zrmq.protocol.limits import MESSAGE_BYTES_MAX
from zrmq.transport.options import (
    Context,
    check_fork,
    check_version,
    end_context,
    fork_count,
    make_context,
    open_socket,
)


@pytest.fixture
def context() -> Iterator[Context]:
    made = make_context()
    yield made
    assert end_context(made)


@pytest.mark.parametrize("version", [(4, 3, 4), (4, 2, 99), (3, 9, 9)])
def test_an_old_libzmq_is_refused_with_what_to_do(version: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="pip install --upgrade pyzmq") as caught:
        check_version(version)
    assert caught.value.facts["needed"] == "4.3.5"


@pytest.mark.parametrize("version", [(4, 3, 5), (4, 4, 0), (5, 0, 0)])
def test_newer_ones_are_not(version: tuple[int, int, int]) -> None:
    check_version(version)


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.DEALER, zmq.PUSH, zmq.PULL])
def test_every_socket_has_the_settings(context: Context, kind: int) -> None:
    socket = open_socket(context, kind)
    hwm_messages = 64 if kind in (zmq.PUSH, zmq.PULL) else 10_000
    unread_max = 64 if kind == zmq.ROUTER else hwm_messages
    try:
        assert {
            option: socket.get(option)
            for option in (
                zmq.SNDHWM, zmq.RCVHWM, zmq.MAXMSGSIZE, zmq.HEARTBEAT_IVL, zmq.TCP_MAXRT,
                zmq.HANDSHAKE_IVL, zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL, zmq.TCP_KEEPALIVE_CNT,
                zmq.CONNECT_TIMEOUT, zmq.RECONNECT_IVL_MAX, zmq.BACKLOG, zmq.IPV6,
            )
        } == {
            zmq.SNDHWM: hwm_messages, zmq.RCVHWM: unread_max, zmq.MAXMSGSIZE: MESSAGE_BYTES_MAX, zmq.HEARTBEAT_IVL: 0,
            zmq.TCP_MAXRT: 9_000, zmq.HANDSHAKE_IVL: 5_000, zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 3, zmq.TCP_KEEPALIVE_INTVL: 3, zmq.TCP_KEEPALIVE_CNT: 2,
            zmq.CONNECT_TIMEOUT: 3_000, zmq.RECONNECT_IVL_MAX: 1_000, zmq.BACKLOG: 1_024, zmq.IPV6: 1,
        }
        assert 100 <= socket.get(zmq.RECONNECT_IVL) <= 300
        assert socket.get(zmq.LINGER) == {zmq.ROUTER: 250, zmq.PUSH: 1_000}.get(kind, 0)
        assert socket.get(zmq.IMMEDIATE) == int(kind in (zmq.DEALER, zmq.PUSH))
    finally:
        socket.close(0)


def test_a_router_tells_of_peers_it_does_not_know(context: Context) -> None:
    socket = open_socket(context, zmq.ROUTER)
    try:
        with pytest.raises(zmq.ZMQError) as caught:
            socket.send_multipart([b"nobody", b"x"], zmq.DONTWAIT)
        assert caught.value.errno == zmq.EHOSTUNREACH
    finally:
        socket.close(0)


def test_reconnects_do_not_go_in_step(context: Context) -> None:
    seen = set()
    for _ in range(20):
        socket = open_socket(context, zmq.DEALER)
        seen.add(socket.get(zmq.RECONNECT_IVL))
        socket.close(0)
    assert len(seen) > 5


def test_a_context_ends_with_messages_unsent(context: Context) -> None:
    own = make_context()
    socket = own.socket(zmq.DEALER)  # without our settings: BLOCKY alone makes its linger 0
    socket.connect("tcp://127.0.0.1:9")
    socket.send(b"never delivered")
    socket.close()
    assert end_context(own, timeout_ms=5_000)


def test_a_context_with_an_open_socket_does_not_hang_who_ends_it() -> None:
    context = make_context()
    socket = open_socket(context, zmq.DEALER)
    assert not end_context(context, timeout_ms=50)
    with pytest.raises(zmq.ContextTerminated):
        socket.recv()
    waiting = [thread for thread in threading.enumerate() if thread.name == "zrmq-term"]
    socket.close(0)
    for thread in waiting:
        thread.join(5.0)
        assert not thread.is_alive()


def test_a_context_ends_where_there_is_no_thread_to_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    context = make_context()
    open_socket(context, zmq.DEALER).close(0)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert end_context(context)
    assert context.closed


def test_a_forked_child_is_told(tmp_path: object) -> None:
    count = fork_count()
    check_fork(count)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check_fork(count)
        except ForkedClientError as error:
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        assert "make a new one in the child" in answer.read()
    check_fork(count)
