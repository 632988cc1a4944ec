"""The NameServer: takes what brokers register, answers clients' routes, and holds their watches until something changes.

Whatever a peer sends, the handler returns; the peer gets an error with a code and a sentence, nobody else notices.

A NameServer that has just started knows less than the clients that come to it, and must not spoil what they know:

- During its start-up grace a first question about a topic it does not know is answered NOT_READY.
- It cannot know that a broker is gone before it has listened for as long as that takes. Until then, a watch with a version that
  it has not come to by itself (another NameServer's, or from before the restart) waits: clients keep the good route they have,
  and a restart disturbs nobody. It is answered as usual once this NameServer has come to the same answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from zrmq.errors import Code, InvalidArgumentError, InvalidFrameError, NoSessionError, NotReadyError, ZrmqError, refused
from zrmq.logs import get_logger
from zrmq.protocol import limits
from zrmq.protocol.requests import (
    LIMITS,
    ROUTE_OF_OTHERS,
    Alive,
    Bye,
    Done,
    Failed,
    Heartbeat,
    Hello,
    QueryRoute,
    RegisterBroker,
    Registered,
    Reply,
    Request,
    Route,
    UnregisterBroker,
    Welcome,
    check_whole,
    decode_request,
    encode_fitting,
    failed,
    peek_number,
)
from zrmq.routing.route_table import ALL_TOPICS, GONE_AFTER_MS, SUSPECT_AFTER_MS, TICK_MS, RouteTable
from zrmq.transport.interface import Loop
from zrmq.transport.sessions import Session, SessionTable

log = get_logger("routing")

START_GRACE_MS = 3_000.0  # brokers reconnect within a second or two of a restart
HEARTBEAT_MS = 1_000
WATCH_MS_MAX = 60_000.0
WATCH_MARGIN_MS = 500.0  # a watch is answered this much before its client stops waiting: two ticks
WATCHES_MAX = 20_000
WATCHED_TOPICS_MAX = 1_000_000  # of all watches together; some 100 MB

Handler = Callable[[Session, Any], None]


class _Watch(msgspec.Struct, eq=False):
    session: Session
    number: int
    topics: tuple[str, ...]
    version: int
    deadline_ms: float


class NameServerCore:
    """One NameServer's decisions. Loop thread only; listens from the start, until `close`.

    Raises `AddressInUseError` or `InvalidArgumentError` when it cannot listen at `address`.
    """

    def __init__(
        self,
        loop: Loop,
        address: str,
        rng: random.Random,
        *,
        suspect_after_ms: float = SUSPECT_AFTER_MS,
        gone_after_ms: float = GONE_AFTER_MS,
        start_grace_ms: float = START_GRACE_MS,
    ) -> None:
        now_ms = loop.clock.monotonic_ms()
        self._loop = loop
        self._server_id = f"nameserver-{rng.getrandbits(64):016x}"
        self._table = RouteTable(now_ms, suspect_after_ms=suspect_after_ms, gone_after_ms=gone_after_ms)
        self._sessions = SessionTable(now_ms, expire_interval_ms=TICK_MS)
        self._watches: dict[tuple[bytes, int], _Watch] = {}
        self._watched_topic_count = 0
        self._changes_told = 0
        self._in_grace = True
        self._grace_until_ms = now_ms + start_grace_ms
        self._listened_ms = self._grace_until_ms + (gone_after_ms if start_grace_ms else 0.0)
        self._versions_of_ours: set[int] | None = set()  # those it has come to by itself; None when it has listened long enough
        self._closed = False
        self._handlers: dict[type[Request], Handler] = {
            Heartbeat: self._heartbeat,
            RegisterBroker: self._register,
            UnregisterBroker: self._unregister,
            QueryRoute: self._query,
            Bye: self._bye,
        }
        self._endpoint = loop.listen(address, self.handle)
        self._timer = loop.call_later(TICK_MS, self._tick)
        loop.before_sleep(self._tell_changes)

    @property
    def address(self) -> str:
        """Where it listens, with the port that was picked for port 0."""
        return self._endpoint.address

    @property
    def watch_count(self) -> int:
        """Watches held at present."""
        return len(self._watches)

    def close(self) -> None:
        """Stop listening and forget everything. Clients and brokers notice by themselves."""
        self._closed = True
        self._timer.cancel()
        self._endpoint.close()
        self._watches.clear()

    # --- what comes in ------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from a peer: header and payload frames, any bytes at all."""
        header = frames[0] if frames else b""
        try:
            check_whole(frames)
            request = decode_request(header)
        except InvalidFrameError as error:
            self._refuse(peer, peek_number(header), error)
            return
        try:
            self._dispatch(peer, request)
        except ZrmqError as error:
            self._refuse(peer, request.number, error)
        except Exception:  # a fault of ours must not end the NameServer, nor leave the client waiting
            log.exception("request_failed", request=type(request).__name__)
            self._send(peer, Failed(request.number, Code.INTERNAL_ERROR, "The NameServer failed to handle this; see its log."))

    def _dispatch(self, peer: bytes, request: Any) -> None:
        now_ms = self._loop.clock.monotonic_ms()
        if type(request) is Hello:
            self._hello(peer, request, now_ms)
            return
        session = self._sessions.by_peer(peer)
        if session is None:
            raise NoSessionError("This connection has no session; send HELLO first.")
        self._sessions.touch(session, now_ms)
        handler = self._handlers.get(type(request))
        if handler is None:
            name = type(request).__name__
            raise InvalidFrameError(f"A NameServer does not answer {name}; ask a broker.", code=Code.UNSUPPORTED)
        handler(session, request)

    def _hello(self, peer: bytes, request: Hello, now_ms: float) -> None:
        _, superseded = self._sessions.open(request, peer, now_ms)
        if superseded is not None:
            self._drop_watches(superseded)
        self._send(peer, Welcome(
            request.number, limits.PROTOCOL_VERSION, self._server_id, "NameServer", self._loop.clock.time_ms(),
            int(self._sessions.session_timeout_ms), HEARTBEAT_MS, LIMITS,
        ))

    def _heartbeat(self, session: Session, request: Heartbeat) -> None:
        self._send(session.peer, Alive(request.number, self._loop.clock.time_ms()))

    def _bye(self, session: Session, request: Bye) -> None:
        self._end(session)
        self._send(session.peer, Done(request.number))

    # --- brokers ------------------------------------------------------------------------------------------------------

    def _register(self, session: Session, request: RegisterBroker) -> None:
        _check_is_broker(session)
        count = len(self._table)
        try:
            wants_topics = self._table.register(request, self._loop.clock.monotonic_ms())
        finally:  # also when not all of its topics are taken
            if len(self._table) != count:
                log.info("broker_registered", **_facts(request.broker))
        self._send(session.peer, Registered(request.number, wants_topics))

    def _unregister(self, session: Session, request: UnregisterBroker) -> None:
        _check_is_broker(session)
        if self._table.unregister(request.broker_name, request.broker_id, request.epoch, request.store_id):
            log.info("broker_unregistered", broker_name=request.broker_name, broker_id=request.broker_id, epoch=request.epoch)
        self._send(session.peer, Done(request.number))

    # --- clients ------------------------------------------------------------------------------------------------------

    def _query(self, session: Session, request: QueryRoute) -> None:
        topics = _check_query(request)
        if self._must_wait(topics, request.version):
            self._watch(session, request, topics)
        elif self._in_grace and not self._table.knows(topics):
            raise _not_ready()
        else:
            self._answer(session.peer, request.number, self._route(topics))

    def _route(self, topics: tuple[str, ...]) -> Route:
        route = self._table.answer(topics)
        if self._versions_of_ours is not None:
            self._versions_of_ours.add(route.version)
        return route

    def _must_wait(self, topics: tuple[str, ...], version: int) -> bool:
        return version != 0 and (version == self._route(topics).version or self._is_strange(version))

    def _is_strange(self, version: int) -> bool:
        if self._versions_of_ours is None or version in self._versions_of_ours:
            return False
        return self._in_grace or version != ROUTE_OF_OTHERS

    def _watch(self, session: Session, request: QueryRoute, topics: tuple[str, ...]) -> None:
        if len(self._watches) >= WATCHES_MAX or self._watched_topic_count + len(topics) > WATCHED_TOPICS_MAX:
            raise refused(Code.TOO_MANY_REQUESTS, "The NameServer holds as many watches as it can; ask again later.")
        wait_ms = min(request.timeout_ms if request.timeout_ms > 0 else WATCH_MS_MAX, WATCH_MS_MAX)
        wait_ms -= min(WATCH_MARGIN_MS, wait_ms / 2)
        key = (session.peer, request.number)
        self._forget(key)
        self._watches[key] = _Watch(
            session, request.number, topics, request.version, self._loop.clock.monotonic_ms() + wait_ms
        )
        self._watched_topic_count += len(topics)
        held = session.waiting = [older for older in session.waiting or () if older in self._watches and older != key] + [key]
        if len(held) > limits.WATCHES_PER_SESSION_MAX:
            self._answer_watch(held[0])

    def _answer_watch(self, key: tuple[bytes, int]) -> None:
        """Answer with what is known now; to a version that is not ours, that it is too early."""
        watch = self._forget(key)
        if watch is None:
            return
        route = self._route(watch.topics)
        if route.version != watch.version and self._is_strange(watch.version):
            self._refuse(watch.session.peer, watch.number, _not_ready())
        else:
            self._answer(watch.session.peer, watch.number, route)

    def _answer(self, peer: bytes, number: int, route: Route) -> None:
        self._send(peer, msgspec.structs.replace(route, number=number))

    def _forget(self, key: tuple[bytes, int]) -> _Watch | None:
        watch = self._watches.pop(key, None)
        if watch is not None:
            self._watched_topic_count -= len(watch.topics)
        return watch

    def _drop_watches(self, session: Session) -> None:
        for key in session.waiting or ():
            self._forget(key)
        session.waiting = None

    # --- turns and time -----------------------------------------------------------------------------------------------

    def _tell_changes(self) -> None:
        """At the end of a turn: answer the watches whose answer is another one now, once for all that happened in the turn."""
        if self._changes_told == self._table.changes or self._closed:
            return
        self._changes_told = self._table.changes
        self._answer_those_changed()

    def _answer_those_changed(self) -> None:
        for key, watch in list(self._watches.items()):
            if not self._must_wait(watch.topics, watch.version):
                self._answer_watch(key)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_MS, self._tick)
        now_ms = self._loop.clock.monotonic_ms()
        suspects, gone = self._table.expire(now_ms)
        for broker in suspects:
            log.warning("broker_suspected", **_facts(broker))
        for broker in gone:
            log.warning("broker_expired", **_facts(broker))
        for session in self._sessions.expire(now_ms):
            log.info("session_expired", client_id=session.client_id, role=session.role)
            self._drop_watches(session)
        self._grow_up(now_ms)
        for key in [key for key, watch in self._watches.items() if watch.deadline_ms <= now_ms]:
            self._answer_watch(key)

    def _grow_up(self, now_ms: float) -> None:
        if self._in_grace and now_ms >= self._grace_until_ms:
            self._in_grace = False
            self._answer_those_changed()
        if self._versions_of_ours is not None and now_ms >= self._listened_ms:
            self._versions_of_ours = None
            self._answer_those_changed()

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _send(self, peer: bytes, reply: Reply) -> None:
        """Send, or end the session of a peer that is gone; it asks again on a new connection."""
        header = encode_fitting(reply, peer, self._endpoint.has_room)
        if not self._endpoint.send(peer, (header,)):
            session = self._sessions.by_peer(peer)
            if session is not None:
                self._end(session)

    def _refuse(self, peer: bytes, number: int, error: ZrmqError) -> None:
        self._send(peer, failed(number, error))

    def _end(self, session: Session) -> None:
        self._drop_watches(session)
        self._sessions.close(session)


def _check_is_broker(session: Session) -> None:
    if session.role != "broker":
        raise refused(Code.FORBIDDEN, f"The session is a {session.role}'s; only brokers register.", {"role": session.role})


def _check_query(request: QueryRoute) -> tuple[str, ...]:
    """The topics asked for, sorted, each once."""
    topics = tuple(sorted(set(request.topics)))
    if len(topics) > limits.QUERY_TOPICS_MAX:
        raise InvalidArgumentError(
            f"The question names {len(topics)} topics; name at most {limits.QUERY_TOPICS_MAX}, or ask for all by '*'.",
            limit_topics=limits.QUERY_TOPICS_MAX,
        )
    if "*" in topics:
        return ALL_TOPICS
    for topic in topics:
        limits.check_topic(topic)
    return topics


def _not_ready() -> NotReadyError:
    return NotReadyError("The NameServer has just started and waits for brokers to register; ask again shortly.")


def _facts(broker: Any) -> dict[str, Any]:
    return {"broker_name": broker.broker_name, "broker_id": broker.broker_id, "epoch": broker.epoch, "address": broker.address}
