"""The broker's core: who asks, what is asked, who answers; and what happens at the end of a turn and with time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zrmq.clock import Clock
from zrmq.errors import Code, InvalidFrameError, NoSessionError, ZrmqError
from zrmq.logs import get_logger
from zrmq.protocol import limits
from zrmq.protocol.requests import (
    LIMITS,
    AcquireLease,
    Alive,
    BrokerState,
    Bye,
    CommitOffsets,
    DeleteTopic,
    DescribeBroker,
    DescribeGroups,
    DescribeTopics,
    Done,
    Failed,
    Heartbeat,
    Hello,
    JoinGroup,
    LeaveGroup,
    Pull,
    PutTopic,
    QueryCommitted,
    QueryOffsets,
    QuerySubscriptions,
    ReleaseLease,
    Request,
    Send,
    Welcome,
    check_whole,
    decode_request,
    failed,
    peek_number,
)
from zrmq.serving.context import Context, ServingConfig
from zrmq.serving.groups import GroupDesk
from zrmq.serving.leases import LeaseDesk
from zrmq.serving.offsets import OffsetDesk
from zrmq.serving.outbox import HasRoom, Outbox
from zrmq.serving.outbox import Send as SendFrames
from zrmq.serving.pulling import Pulling
from zrmq.serving.sending import Sending, stopping_error
from zrmq.serving.topics import TopicDesk
from zrmq.store.store import Store
from zrmq.store.tables import Topic
from zrmq.transport.sessions import Session, SessionTable

log = get_logger("serving")

TICK_MS = 250.0  # how late a wait, a session or a lease may end

Handler = Callable[[Session, Any, list[bytes]], None]


class BrokerCore:
    """One broker's decisions. Loop thread only.

    The shell calls `handle` and `ingest` for what comes in, `after_commit` when the log was written or flushed, and `tick` every
    `TICK_MS`. Whatever a peer sends, these return; the peer gets an error, nobody else notices.
    """

    def __init__(
        self, store: Store, clock: Clock, config: ServingConfig, send: SendFrames, has_room: HasRoom,
        on_topics_changed: Callable[[], None],
    ) -> None:
        self.config = config
        self._store = store
        self._clock = clock
        self._server_id = f"{config.broker_name}@{store.boot}"
        self.outbox = Outbox(send, has_room)
        self.context = Context(store, self.outbox, clock, config)
        self.sessions = SessionTable(
            clock.monotonic_ms(), session_timeout_ms=config.session_timeout_ms, expire_interval_ms=TICK_MS
        )
        self.topics = TopicDesk(self.context, on_topics_changed, self._topic_deleted)
        self.sending = Sending(self.context)
        self.leases = LeaseDesk(self.context, self._is_open, lambda session: self.groups.membership(session))
        self.groups = GroupDesk(self.context, self.leases.release_all)
        self.offsets = OffsetDesk(self.context, self.groups, self.leases)
        self.pulling = Pulling(self.context, self.leases.may_read)
        self.frames_invalid = 0
        self._stopping = False
        self._handlers: dict[type[Request], Handler] = {
            Send: self.sending.send,
            Pull: self.pulling.pull,
            Heartbeat: self._heartbeat,
            CommitOffsets: self.offsets.commit,
            QueryCommitted: self.offsets.query_committed,
            QueryOffsets: self.offsets.query_offsets,
            AcquireLease: self.leases.acquire,
            ReleaseLease: self.leases.release,
            JoinGroup: self.groups.join,
            LeaveGroup: self.groups.leave,
            DescribeGroups: self.groups.describe,
            QuerySubscriptions: self.groups.query_subscriptions,
            PutTopic: self.topics.put,
            DeleteTopic: self.topics.delete,
            DescribeTopics: self.topics.describe,
            DescribeBroker: self._describe,
            Bye: self._bye,
        }

    # --- what comes in ------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from the ROUTER."""
        try:
            check_whole(frames)
            request = decode_request(frames[0])
        except InvalidFrameError as error:
            self.frames_invalid += 1
            self.outbox.now(peer, failed(peek_number(frames[0]), error))
            return
        try:
            self._dispatch(peer, request, frames)
        except ZrmqError as error:
            self.context.refuse(peer, request.number, error)
        except Exception:  # a fault of ours must not end the broker, nor leave the client waiting
            log.exception("request_failed", request=type(request).__name__)
            self.outbox.now(peer, Failed(request.number, Code.INTERNAL_ERROR, "The broker failed to handle this; see its log."))

    def ingest(self, peer: bytes, frames: list[bytes]) -> None:
        """One message from the PULL: a one-way send. Nobody can be told what is wrong with it, so it is counted."""
        try:
            check_whole(frames)
            request = decode_request(frames[0])
            if not isinstance(request, Send) or self._stopping:
                raise InvalidFrameError("Only one-way sends come in here.")
            self.sending.ingest(request, frames)
        except ZrmqError as error:
            self.sending.batches_refused_one_way += 1
            log.debug("one_way_send_refused", code=int(error.code), reason=error.message)
        except Exception:  # as in `handle`
            self.sending.batches_refused_one_way += 1
            log.exception("one_way_send_failed")

    def _dispatch(self, peer: bytes, request: Any, frames: list[bytes]) -> None:
        session = self.sessions.by_peer(peer)
        if session is None or type(request) is Hello:
            self._without_session(peer, request)
            return
        session.last_seen_ms = self._clock.monotonic_ms()
        handler = self._handlers.get(type(request))
        if handler is None:
            name = type(request).__name__
            raise InvalidFrameError(f"A broker does not answer {name}; ask a NameServer.", code=Code.UNSUPPORTED)
        if self._stopping and type(request) in (JoinGroup, AcquireLease, PutTopic):
            raise stopping_error(self.config.broker_name)
        handler(session, request, frames)

    def _without_session(self, peer: bytes, request: Any) -> None:
        if type(request) is not Hello:
            raise NoSessionError("This connection has no session; send HELLO first.")
        session, old = self.sessions.open(request, peer, self._clock.monotonic_ms())
        if old is not None:
            self.groups.move(session, old)
            self.pulling.drop(old)
        self.leases.returned(session)
        welcome = Welcome(
            request.number, limits.PROTOCOL_VERSION, self._server_id, self.config.broker_name, self._clock.time_ms(),
            self.config.session_timeout_ms, self.config.heartbeat_ms, LIMITS,
        )
        self.outbox.now(peer, welcome)

    def _heartbeat(self, session: Session, request: Heartbeat, frames: list[bytes]) -> None:
        self.outbox.now(session.peer, Alive(request.number, self._clock.time_ms(), self.groups.version_for(session)))

    def _bye(self, session: Session, request: Bye, frames: list[bytes]) -> None:
        self.groups.drop(session)
        self.pulling.drop(session)
        self.sessions.close(session)
        self.outbox.now(session.peer, Done(request.number))

    # --- turns and time -----------------------------------------------------------------------------------------------

    def after_commit(self) -> None:
        """The log was written or flushed: tell those who wait for that, and show what became visible."""
        self.outbox.release(self._store.written_position, self._store.flushed_position)
        if self._store.failure is not None:
            self.outbox.refuse_held(self._store.failure)
        visible = self._store.take_visible()
        if visible:
            self.pulling.wake(visible)
        self.pulling.go_on()

    def tick(self) -> None:
        """Time has passed: end what took too long."""
        now_ms = self._clock.monotonic_ms()
        for session in self.sessions.expire(now_ms):
            log.info("session_expired", client_id=session.client_id, role=session.role, group=session.group)
            self.groups.drop(session, is_silent=True)
            self.pulling.drop(session)
        self.leases.expire(now_ms)
        self.pulling.expire(now_ms)

    def stop(self) -> None:
        """Take no new work: clients go elsewhere with what is left. What was accepted is still answered."""
        self._stopping = self.sending.is_stopping = True

    def _topic_deleted(self, topic: Topic) -> None:
        self.pulling.drop_topic(topic)
        self.leases.drop_topic(topic.topic_id)
        self.groups.recount_places()

    def _is_open(self, session: Session) -> bool:
        return self.sessions.by_peer(session.peer) is session

    # --- facts for people ---------------------------------------------------------------------------------------------

    def _describe(self, session: Session, request: DescribeBroker, frames: list[bytes]) -> None:
        self.outbox.now(session.peer, BrokerState(request.number, self.facts()))

    def facts(self) -> dict[str, Any]:
        """Numbers and names for `zrmq broker-status` and tests; counts since the start."""
        store, tables = self._store, self._store.tables
        return {
            "broker_name": self.config.broker_name,
            "cluster": self.config.cluster,
            "boot": store.boot,
            "sessions": len(self.sessions),
            "topics": len(tables.topics),
            "groups": len(tables.groups),
            "pulls_held": self.pulling.held_count,
            "replies_held": len(self.outbox),
            "replies_unroutable": self.outbox.unroutable_count,
            "frames_invalid": self.frames_invalid,
            "batches_in": self.sending.batches_in,
            "messages_in": self.sending.records_in,
            "bytes_in": self.sending.bytes_in,
            "batches_duplicate": self.sending.batches_duplicate,
            "batches_refused_one_way": self.sending.batches_refused_one_way,
            "pulls": self.pulling.pulls,
            "bytes_out": self.pulling.bytes_out,
            "appended_position": store.appended_position,
            "flushed_position": store.flushed_position,
        }
