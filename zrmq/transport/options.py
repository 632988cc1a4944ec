"""ZeroMQ as zrmq uses it: the version it needs, contexts that end, and every socket setting in one function.

docs/decisions/zeromq.md says which pitfall each setting is for.
"""

from __future__ import annotations

import os
import threading
from random import Random
from typing import Any

import zmq

from zrmq.errors import ConfigError, ForkedClientError, ResourceLimitError
from zrmq.logs import get_logger
from zrmq.protocol.limits import MESSAGE_BYTES_MAX
from zrmq.transport.threads import start_thread

LIBZMQ_VERSION_MIN = (4, 3, 5)  # older ones crash on hostile bytes (CVE-2019-6250 and others)
HWM_MESSAGES = 10_000  # a backstop; memory is bounded by our own credit
# Of one client, and not read yet: each may have megabytes, and who has no credit, or keeps to none, sends as many as it likes.
# Here the mark is what bounds them; what is beyond waits with the client.
UNREAD_REQUESTS_MAX = 64
# A connection whose other end is out of reach ends after some 9 s, by TCP itself. Not by ZMTP heartbeats: when a connection
# breaks while its pipe is full, libzmq 4.3.5 aborts the process at the next PING that it sends or answers (its issue 4364).
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_PROBES = 2
UNANSWERED_MS_MAX = 9_000
HANDSHAKE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 3_000  # else the next try waits for the kernel, which repeats a lost SYN after 1, 2, 4, ... 64 s
RECONNECT_MS_MIN, RECONNECT_MS_MAX = 100, 300  # drawn for each client, so that a fleet does not come back in step
RECONNECT_BACKOFF_MS_MAX = 1_000  # brokers have to be back within a NameServer's start-up grace
BACKLOG = 1_024
SOCKETS_MAX = 8_192  # of a context; a client's connection takes three
TERM_TIMEOUT_MS = 3_000
# How long a closed socket may still send what it took. A client waits for answers instead (`Link.close`).
LINGER_MS: dict[int, int] = {zmq.ROUTER: 250, zmq.PUSH: 1_000}

Context = zmq.Context[Any]
Socket = zmq.Socket[Any]

log = get_logger("transport")


def check_version(version: tuple[int, int, int]) -> None:
    """Raise `ConfigError` for a libzmq that is too old."""
    if version < LIBZMQ_VERSION_MIN:
        found, needed = (".".join(map(str, each)) for each in (version, LIBZMQ_VERSION_MIN))
        raise ConfigError(
            f"pyzmq uses libzmq {found}; zrmq needs {needed} or later. Install pyzmq's own wheel: pip install --upgrade pyzmq",
            version=found, needed=needed,
        )


check_version(zmq.zmq_version_info())


def make_context() -> Context:
    """A context of our own; end it with `end_context`. One for each process role, shared where roles talk over inproc."""
    context: Context = zmq.Context()
    context.set(zmq.BLOCKY, 0)  # before any socket: nothing waits for ever for unsent messages
    context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
    return context


def end_context(context: Context, timeout_ms: int = TERM_TIMEOUT_MS) -> bool:
    """Terminate the context, waiting at most `timeout_ms`. False: a socket of it is still open somewhere; a daemon thread waits.
    Where the system gives no thread for that, this one does, however long it takes.

    Threads that use such a socket get `zmq.ContextTerminated`, so that they can close it.
    """
    waiter = threading.Thread(target=context.term, name="zrmq-term", daemon=True)
    try:
        start_thread(waiter)
    except ResourceLimitError:
        context.term()
        return True
    waiter.join(timeout_ms / 1000.0)
    if waiter.is_alive():
        log.warning("context_left_open", timeout_ms=timeout_ms)
    return not waiter.is_alive()


def open_socket(context: Context, kind: int) -> Socket:
    """A socket with all settings made, to be bound or connected. Close it with `close(LINGER_MS.get(kind, 0))`."""
    socket: Socket = context.socket(kind)
    reconnect_ms = Random().randint(RECONNECT_MS_MIN, RECONNECT_MS_MAX)
    hwm_messages = UNREAD_REQUESTS_MAX if kind in (zmq.PUSH, zmq.PULL) else HWM_MESSAGES
    for option, value in {
        zmq.LINGER: LINGER_MS.get(kind, 0),
        zmq.SNDHWM: hwm_messages,
        zmq.RCVHWM: UNREAD_REQUESTS_MAX if kind == zmq.ROUTER else hwm_messages,
        zmq.MAXMSGSIZE: MESSAGE_BYTES_MAX,
        zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS,
        zmq.HANDSHAKE_IVL: HANDSHAKE_TIMEOUT_MS,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_INTERVAL_S,
        zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_S,
        zmq.TCP_KEEPALIVE_CNT: KEEPALIVE_PROBES,
        zmq.TCP_MAXRT: UNANSWERED_MS_MAX,
        zmq.RECONNECT_IVL: reconnect_ms,
        zmq.RECONNECT_IVL_MAX: RECONNECT_BACKOFF_MS_MAX,
        zmq.BACKLOG: BACKLOG,
        zmq.IPV6: 1,
    }.items():
        socket.set(option, value)
    if kind == zmq.ROUTER:
        socket.set(zmq.ROUTER_MANDATORY, 1)
    elif kind in (zmq.DEALER, zmq.PUSH):
        socket.set(zmq.IMMEDIATE, 1)  # no peer: the send fails at once, and we keep the message
    return socket


class _Forks:
    """How often this process is a fork of the one that imported us."""

    count = 0

    @classmethod
    def note(cls) -> None:
        cls.count += 1


os.register_at_fork(after_in_child=_Forks.note)


def fork_count() -> int:
    """Remember it where sockets are opened, for `check_fork`: contexts do not survive a fork, and pyzmq does not notice."""
    return _Forks.count


def check_fork(count: int) -> None:
    """Raise `ForkedClientError` in a child forked since `fork_count` returned `count`."""
    if count != _Forks.count:
        raise ForkedClientError("This was made before the process forked; make a new one in the child.")
