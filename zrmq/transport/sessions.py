"""Who is there: the sessions of one server, opened by HELLO and ended by BYE, by silence, or by a newer HELLO.

Pure: the caller hands in the time (monotonic milliseconds) and carries out what follows from the results. The NameServer and the
broker use the same table. A session belongs to a connection (the peer's routing id) and to a client id; both are unique in it.

    HELLO    session, superseded = sessions.open(hello, peer, now_ms)     raises a ZrmqError to answer with
    request  session = sessions.by_peer(peer)                             None: answer NO_SESSION
             sessions.touch(session, now_ms)
    timer    for session in sessions.expire(now_ms): ...                  every `expire_interval_ms`
    BYE: sessions.close(session)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from zrmq.errors import Code, InvalidArgumentError, refused
from zrmq.protocol.limits import CLIENT_ID_CHARS_MAX, HELLOS_PER_S_MAX, PROTOCOL_VERSION, SESSIONS_MAX, check_group, check_text
from zrmq.protocol.requests import Hello

SESSION_TIMEOUT_MS = 10_000.0  # silence that ends a session
EXPIRE_INTERVAL_MS = 500.0  # how often `expire` is called: a dead client is noticed at most that much late
HELLO_TIMEOUT_MS = 3_000.0  # a server that stands still longer gets a newer HELLO, and answers that one
PASSING_REFUSALS = frozenset({Code.TOO_MANY_REQUESTS, Code.NOT_READY, Code.STOPPING, Code.NO_SESSION})  # time heals them
ROLES = frozenset({"producer", "consumer", "admin", "broker"})


class Session(msgspec.Struct, eq=False):
    """One client's presence. `waiting` is the core's to use, None until it does.

    `last_seen_ms` is monotonic; after a pause of the server it is later than the client was heard.
    """

    peer: bytes
    client_id: str
    session_epoch: int
    role: str
    group: str
    instance_name: str
    last_seen_ms: float
    waiting: Any = None  # what the server holds for it: long polls, watches, lease requests


class SessionTable:
    """All sessions of one server. Loop thread only."""

    def __init__(
        self,
        now_ms: float,
        *,
        session_timeout_ms: float = SESSION_TIMEOUT_MS,
        expire_interval_ms: float = EXPIRE_INTERVAL_MS,
        sessions_max: int = SESSIONS_MAX,
        hellos_per_s_max: float = HELLOS_PER_S_MAX,
    ) -> None:
        self.session_timeout_ms = session_timeout_ms
        self.expire_interval_ms = expire_interval_ms
        self._sessions_max = sessions_max
        self._hellos_per_s_max = hellos_per_s_max
        self._hellos_allowed = float(hellos_per_s_max)
        self._hello_ms = now_ms
        self._expire_ms = now_ms
        self._scan_ms = now_ms + session_timeout_ms
        self._by_peer: dict[bytes, Session] = {}
        self._by_client: dict[str, Session] = {}
        self.by_peer = self._by_peer.get  # hot: the session of a connection, or None

    def __len__(self) -> int:
        return len(self._by_peer)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_peer.values()))

    def by_client(self, client_id: str) -> Session | None:
        """The session of a client id, or None."""
        return self._by_client.get(client_id)

    def open(self, hello: Hello, peer: bytes, now_ms: float) -> tuple[Session, Session | None]:
        """Open the session a HELLO asks for. Returns it and the session of the same client id that it ends, if there was one.

        The ended one is out of the table already; its connection gets NO_SESSION from now on. The same client goes on, so the
        caller moves what should survive a reconnect and drops what waits for the old connection (`waiting`).
        A HELLO repeated on its own connection gives a fresh session in the same way.

        Raises, with nothing changed: `InvalidArgumentError` for fields that cannot be; `RequestRefusedError` with
        VERSION_UNSUPPORTED, FORBIDDEN (the client id is open with a newer epoch), TOO_MANY_REQUESTS (`SESSIONS_MAX` reached or
        HELLOs come too fast; the client tries again later).
        """
        self._check_rate(now_ms)
        _check_hello(hello)
        old = self._by_client.get(hello.client_id)
        self._check_takeover(hello, peer, old)
        if old is None and len(self._by_peer) >= self._sessions_max:
            raise refused(
                Code.TOO_MANY_REQUESTS,
                f"The server has {self._sessions_max} sessions, its limit; close clients or try again later.",
                {"sessions_max": self._sessions_max},
            )
        if old is not None:
            self.close(old)
        session = Session(peer, hello.client_id, hello.session_epoch, hello.role, hello.group, hello.instance_name, now_ms)
        self._by_peer[peer] = session
        self._by_client[hello.client_id] = session
        return session, old

    def touch(self, session: Session, now_ms: float) -> None:
        """The client gave a sign of life."""
        session.last_seen_ms = now_ms

    def close(self, session: Session) -> bool:
        """Take a session out. False: it was not in the table any more."""
        if self._by_peer.get(session.peer) is not session:
            return False
        del self._by_peer[session.peer]
        del self._by_client[session.client_id]
        return True

    def expire(self, now_ms: float) -> list[Session]:
        """Take out and return the sessions silent for `session_timeout_ms`. Call it every `expire_interval_ms`.

        A call that comes much later than that means that this server stood still (stopped, swapped out, a slow disk): what
        clients sent meanwhile has not been read, so the time lost does not count as their silence.
        """
        lost_ms = now_ms - self._expire_ms - self.expire_interval_ms
        self._expire_ms = now_ms
        if lost_ms > self.expire_interval_ms:
            for session in self._by_peer.values():
                session.last_seen_ms = min(session.last_seen_ms + lost_ms, now_ms)
            self._scan_ms += lost_ms
        if now_ms < self._scan_ms:
            return []
        return self._take_silent(now_ms - self.session_timeout_ms)

    def _take_silent(self, since_ms: float) -> list[Session]:
        silent = [session for session in self._by_peer.values() if session.last_seen_ms <= since_ms]
        for session in silent:
            self.close(session)
        # Signs of life only move deadlines back, so before the earliest one of now there is nothing to look for.
        oldest_ms = min((session.last_seen_ms for session in self._by_peer.values()), default=self._expire_ms)
        self._scan_ms = oldest_ms + self.session_timeout_ms
        return silent

    def _check_rate(self, now_ms: float) -> None:
        earned = (now_ms - self._hello_ms) * self._hellos_per_s_max / 1000.0
        self._hello_ms = now_ms
        self._hellos_allowed = min(self._hellos_allowed + earned, self._hellos_per_s_max)
        if self._hellos_allowed < 1.0:
            raise refused(
                Code.TOO_MANY_REQUESTS,
                f"More than {self._hellos_per_s_max:g} sessions are opened per second; try again later.",
                {"hellos_per_s_max": self._hellos_per_s_max},
            )
        self._hellos_allowed -= 1.0

    def _check_takeover(self, hello: Hello, peer: bytes, old: Session | None) -> None:
        if old is not None and old.peer != peer and hello.session_epoch <= old.session_epoch:
            raise refused(
                Code.FORBIDDEN,
                f"The client id {hello.client_id!r} is open with a newer session; give each client an id of its own.",
                {"client_id": hello.client_id, "session_epoch": old.session_epoch},
            )
        here = self._by_peer.get(peer)
        if here is not None and here.client_id != hello.client_id:
            raise InvalidArgumentError(
                f"This connection is open as {here.client_id!r}; say BYE before opening it as {hello.client_id!r}.",
                client_id=here.client_id,
            )


def _check_hello(hello: Hello) -> None:
    if hello.protocol_version != PROTOCOL_VERSION:
        raise refused(
            Code.VERSION_UNSUPPORTED,
            f"The client speaks protocol version {hello.protocol_version}, this server {PROTOCOL_VERSION}; "
            "use the same release of zrmq on both sides.",
            {"protocol_version": hello.protocol_version, "supported_version": PROTOCOL_VERSION},
        )
    if not hello.client_id:
        raise InvalidArgumentError("HELLO has no client id; give one, unique to the client.", code=Code.CLIENT_ID_REQUIRED)
    _check_label(hello.client_id, "client id")
    if hello.role not in ROLES:
        raise InvalidArgumentError(f"The role {hello.role[:40]!r} does not exist; use one of {', '.join(sorted(ROLES))}.")
    if hello.group:
        check_group(hello.group)
    if hello.instance_name:
        _check_label(hello.instance_name, "instance name")


def _check_label(text: str, what: str) -> None:
    if len(text) > CLIENT_ID_CHARS_MAX:
        raise InvalidArgumentError(
            f"The {what} has {len(text)} characters; use at most {CLIENT_ID_CHARS_MAX}.", limit_chars=CLIENT_ID_CHARS_MAX
        )
    check_text(text, what, Code.BAD_REQUEST)
