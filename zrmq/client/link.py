"""A session with one server that heals itself: numbered requests, resent until answered or overdue, over a breakable connection.

    connecting --on_connected--> greeting --WELCOME--> open
        ^                           |  ^                |
        |                           |  '--NO_SESSION----|      (a restarted server, or one that gave the session up)
        '------on_disconnected------'-------------------'

Each HELLO has a higher session epoch than the one before, so of two connections of one client the newest wins. Whatever is
outstanding when the session is lost stays outstanding: after the next WELCOME all of it is sent again in the order of its
numbers, and the server recognises what it has done already. A caller knows a lost connection only by the time an answer takes.

Loop thread only. Sans I/O: connection, time and timers come from the `Loop`, luck from the `random.Random`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf
from random import Random
from typing import Protocol

import msgspec

from zrmq.errors import ClosedError, Code, InvalidFrameError, PayloadTooLargeError, RequestTimeoutError, ZrmqError, refused
from zrmq.logs import get_logger
from zrmq.protocol.limits import MESSAGE_BYTES_MAX, PROTOCOL_VERSION
from zrmq.protocol.requests import (
    Alive,
    AnyReply,
    Bye,
    Failed,
    Heartbeat,
    Hello,
    Pull,
    Pulled,
    Request,
    Send,
    Welcome,
    check_whole,
    decode_reply,
    encode,
)
from zrmq.transport.interface import Connection, Frames, Loop, Timer
from zrmq.transport.sessions import HELLO_TIMEOUT_MS, PASSING_REFUSALS

HELLO_PAUSE_MS_MIN = 100.0  # between two HELLOs, doubled with each that did not lead to a lasting session, or to a new server
HELLO_PAUSE_MS_MAX = 5_000.0
TAKEN_TOLD = 3  # so often a session is taken over by another client of the id before that is told
STABLE_MS = 5_000.0  # a session that lived so long ends the pauses
SILENCE_MS_MAX = 10_000.0  # until a WELCOME says otherwise
FULL_PAUSE_MS = 5.0  # a full pipe is tried again after
BYE_TIMEOUT_MS = 500.0
LEASE_MARGIN = 0.8  # of the session timeout, for which we are sure to be known; the rest is for clocks that run unlike
HEARTBEAT_MS_MIN = 50.0  # no server makes us beat faster
OVERDUE_SLACK = 1_024  # answered requests the heap of deadlines may still name before it is rebuilt

OnReply = Callable[[AnyReply | ZrmqError, list[bytes]], None]

log = get_logger("client")


class Identity(msgspec.Struct, frozen=True):
    """Who opens the session. `client_id` is unique to the client: a second link with the same one takes the session over."""

    client_id: str
    role: str  # producer, consumer, admin, broker
    group: str = ""
    instance_name: str = ""


class LinkListener(Protocol):
    """What a link tells its owner. A listener may use the link from inside these calls, closing included."""

    def on_link_open(self, link: Link) -> None:
        """The session is open (again), and `link.welcome` says with whom. Requests made inside this call go out at once; what
        is outstanding from before follows them. So make here what a session needs first, and cancel what lost its sense."""

    def on_link_lost(self, link: Link) -> None:
        """The session that was open is gone: connection lost, server restarted, or silent. The link opens a new one by itself."""

    def on_notice(self, link: Link, notice: AnyReply) -> None:
        """The server sent something that no request of the owner asked for: a notice, or its answer to a heartbeat, `Alive`."""


class Outstanding(msgspec.Struct, eq=False):
    """A request without its answer."""

    request: Request
    header: bytes
    payload: Frames
    deadline_ms: float
    on_reply: OnReply


class Link:
    """One session with one server. Loop thread only.

    `welcome` is what the server said last, kept while the session is lost. `last_heard_ms` (monotonic) is when anything came,
    `confirmed_ms` when the newest heartbeat or HELLO was *sent* that the server answered: at that time it knew we live, so a
    lease is safe until `confirmed_ms` plus the session timeout. Both are -inf before the first. `gap_count` counts the sessions
    that opened so late that the server may have given up the one before, and all leases with it, whatever it confirms later.
    `ignored_count` counts replies nobody waits for, `undecodable_count` those that are not zrmq's protocol.
    """

    def __init__(
        self, loop: Loop, address: str, identity: Identity, listener: LinkListener, rng: Random, *, session_epoch: int = 0
    ) -> None:
        """Begins to connect. Raises `InvalidArgumentError` for an address that cannot be one.

        `session_epoch`: the last one of an earlier link of this client to the server, which may not have given that session up.
        """
        self.address = address
        self.is_open = False
        self.welcome: Welcome | None = None
        self.last_heard_ms = -inf
        self.confirmed_ms = -inf
        self._taken_count = 0  # of this connection, how often somebody else got the session, by all signs
        self.gap_count = 0
        self.ignored_count = 0
        self.undecodable_count = 0
        self._loop = loop
        self._now_ms = loop.clock.monotonic_ms
        self._identity = identity
        self._listener = listener
        self._rng = rng
        self._is_closed = False
        self._on_closed: Callable[[], None] | None = None
        self._is_connected = False
        self._connected_ms = -inf
        self._number = 0
        self._outstanding: dict[int, Outstanding] = {}  # in the order of numbers, because nothing is ever put back
        self._unsent: deque[int] = deque()  # while open: numbers a full pipe keeps, and everything made after them
        self._full_timer: Timer | None = None
        self._deadlines: list[tuple[float, int]] = []  # a heap; may name requests that are answered
        self._deadline_timer: Timer | None = None
        self._deadline_timer_ms = inf
        self.session_epoch = session_epoch
        self._hello_number = 0
        self._hello_sent_ms = -inf
        self._hello_due_ms = -inf
        self._hello_attempts = 0
        self._hello_timer: Timer | None = None
        self._opened_ms = -inf
        self._heartbeats: dict[int, float] = {}  # number: when it was sent
        self._heartbeat_due_ms = inf
        self._heartbeat_timer: Timer | None = None
        self._bye_number = 0
        self._connection: Connection = loop.connect(address, self)

    # --- for the owner ----------------------------------------------------------------------------------------------

    def request(
        self, kind: type[Request], *fields: object, payload: Frames = (), timeout_ms: int, on_reply: OnReply
    ) -> int:
        """Send `kind(number, timeout_ms, *fields)` with `payload`, now or when the session is open. Returns the number.

        `on_reply` is called once, never inside this call: with the reply and its payload frames, or with the typed error of a
        refusal, `RequestTimeoutError` when `timeout_ms` (at least 1) have passed, `ClosedError` when the link is closed. A pull
        that stays may have answers with `more` before that. It must not raise. After a timeout it is unknown whether the server
        did what was asked. Raises `ClosedError` after `close`, and `PayloadTooLargeError` for a frame beyond `MESSAGE_BYTES_MAX`,
        on which every server cuts the connection.
        """
        if self._is_closed:
            raise ClosedError(f"The link to {self.address} is closed; make a new one.", address=self.address)
        if payload and max(map(len, payload)) > MESSAGE_BYTES_MAX:
            raise _too_large(payload)
        number = self._number = self._number + 1
        request = kind(number, timeout_ms, *fields)
        header = encode(request)
        deadline_ms = self._now_ms() + timeout_ms
        self._outstanding[number] = Outstanding(request, header, payload, deadline_ms, on_reply)
        heappush(self._deadlines, (deadline_ms, number))
        if deadline_ms < self._deadline_timer_ms:
            self._set_deadline_timer(deadline_ms)
        if self.is_open and (self._unsent or not self._connection.send((header, *payload))):
            self._unsent.append(number)
            self._retry_when_full()
        if len(self._deadlines) > 2 * len(self._outstanding) + OVERDUE_SLACK:
            self._forget_answered()
        return number

    def cancel(self, number: int) -> None:
        """Forget a request: its `on_reply` is never called. The server may still do what was asked."""
        self._outstanding.pop(number, None)

    def close(self, on_closed: Callable[[], None] | None = None, *, says_bye: bool = True) -> None:
        """End the session: outstanding requests end with `ClosedError`, and if it is open the server is told (BYE).

        The connection stays for at most 500 ms until the server has answered; then `on_closed` is called. Whoever ends the loop
        waits for that, or the server thinks the client alive until the session timeout. Who may be back, or has something of the
        server in hand, does not say BYE. Only the first call has an effect.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._on_closed = on_closed
        was_open = self.is_open
        self.is_open = False
        self._hello_number = 0
        for timer in (self._hello_timer, self._heartbeat_timer, self._full_timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        if was_open and says_bye and self._say_bye():
            self._hello_timer = self._loop.call_later(BYE_TIMEOUT_MS, self._end)
        else:
            self._hello_timer = self._loop.call_later(0, self._end)
        self._fail_all(ClosedError(f"The link to {self.address} was closed before an answer came.", address=self.address))

    # --- what the connection says -----------------------------------------------------------------------------------

    def on_connected(self) -> None:
        """Of `ConnectionListener`: open a session."""
        self._is_connected = True
        self._taken_count = 0
        self._connected_ms = self._now_ms()
        if not self._is_closed:
            self._greet()

    def on_disconnected(self) -> None:
        """Of `ConnectionListener`: everything outstanding waits for the next session."""
        self._is_connected = False
        if self._is_closed:
            self._end()
            return
        self._stop_greeting()
        self._lose("disconnected")

    def on_frames(self, frames: list[bytes]) -> None:
        """Of `ConnectionListener`: an answer, a notice, or noise."""
        try:
            check_whole(frames)
            reply = decode_reply(frames[0])
        except InvalidFrameError as error:
            self._count_undecodable(error)
            return
        self.last_heard_ms = self._now_ms()
        waiting = self._outstanding.get(reply.number)
        if waiting is None:
            self._handle_own(reply)
        elif type(reply) is not Failed:
            if not (type(reply) is Pulled and reply.more and type(waiting.request) is Pull):
                del self._outstanding[reply.number]
            del frames[0]
            waiting.on_reply(reply, frames)
        elif reply.code == Code.NO_SESSION:
            self._handle_no_session()
        else:
            del self._outstanding[reply.number]
            waiting.on_reply(refused(reply.code, reply.message, reply.facts), [])

    def _handle_own(self, reply: AnyReply) -> None:
        number = reply.number
        if number == 0:
            self._handle_notice(reply)
        elif number == self._hello_number:
            self._handle_hello_reply(reply)
        elif number in self._heartbeats:
            self._handle_heartbeat_reply(reply)
        elif number == self._bye_number:
            self._end()
        else:
            self.ignored_count += 1

    def _handle_notice(self, reply: AnyReply) -> None:
        if isinstance(reply, Failed):
            self.ignored_count += 1  # the server could not read something; whatever it was will be overdue
        elif not self._is_closed:
            self._listener.on_notice(self, reply)

    def _count_undecodable(self, error: InvalidFrameError) -> None:
        self.undecodable_count += 1
        if self.undecodable_count == 1:
            log.warning("reply_not_decoded", address=self.address, reason=error.message)

    # --- opening a session ------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        """Send a HELLO as soon as the pause after the last one is over."""
        self._stop_greeting()
        pause_ms = self._hello_due_ms - self._now_ms()
        if pause_ms > 0:
            self._hello_timer = self._loop.call_later(pause_ms, self._say_hello)
        else:
            self._say_hello()

    def _stop_greeting(self) -> None:
        self._hello_number = 0
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None

    def _say_hello(self) -> None:
        now_ms = self._now_ms()
        number = self._number = self._number + 1
        self.session_epoch = max(self.session_epoch + 1, self._loop.clock.time_ms())
        who = self._identity
        hello = Hello(
            number, int(HELLO_TIMEOUT_MS), PROTOCOL_VERSION,
            who.client_id, self.session_epoch, who.role, who.group, who.instance_name,
        )
        if not self._connection.send([encode(hello)]):
            self._hello_timer = self._loop.call_later(FULL_PAUSE_MS, self._greet)
            return
        self._hello_number = number
        self._hello_sent_ms = now_ms
        self._set_hello_pause(now_ms)
        self._hello_timer = self._loop.call_later(HELLO_TIMEOUT_MS, self._handle_hello_overdue)

    def _set_hello_pause(self, now_ms: float) -> None:
        pause_ms = min(HELLO_PAUSE_MS_MIN * 2.0 ** min(self._hello_attempts, 10), HELLO_PAUSE_MS_MAX)
        self._hello_attempts += 1
        self._hello_due_ms = now_ms + pause_ms * self._rng.uniform(0.5, 1.0)

    def _handle_hello_overdue(self) -> None:
        if self._is_silent(self._now_ms()):
            self._recycle()
        else:
            self._greet()

    def _handle_hello_reply(self, reply: AnyReply) -> None:
        self._stop_greeting()
        if isinstance(reply, Welcome):
            self._open(reply)
            return
        if isinstance(reply, Failed):
            error: ZrmqError = refused(reply.code, reply.message, reply.facts)
        else:
            error = InvalidFrameError(f"{self.address} answered HELLO with {type(reply).__name__}; is it a zrmq server?")
        if error.code not in PASSING_REFUSALS:
            log.warning("session_refused", address=self.address, code=error.code.name, reason=error.message)
            self._hello_due_ms = max(self._hello_due_ms, self._now_ms() + HELLO_PAUSE_MS_MAX * self._rng.uniform(0.5, 1.0))
        self._greet()
        if error.code not in PASSING_REFUSALS:
            self._fail_all(error)

    def _open(self, welcome: Welcome) -> None:
        self._opened_ms = self._now_ms()
        if self.welcome is not None and self._opened_ms - self.confirmed_ms >= LEASE_MARGIN * self.welcome.session_timeout_ms:
            self.gap_count += 1
        if self.welcome is not None and self.welcome.server_id != welcome.server_id:
            self._hello_attempts = 0  # it was started again: no fault of the session that ended with it
        self.welcome = welcome
        self.is_open = True
        self.confirmed_ms = self._hello_sent_ms
        self._unsent.clear()
        self._start_heartbeats(welcome)
        older = list(self._outstanding)
        log.info("session_opened", address=self.address, server=welcome.server_name, resent_requests=len(older))
        self._listener.on_link_open(self)
        if self.is_open:
            self._unsent.extend(older)
            self._send_unsent()

    # --- losing it --------------------------------------------------------------------------------------------------

    def _handle_no_session(self) -> None:
        # Of everything that was on its way one NO_SESSION each comes back; the first one already started over.
        if self.is_open:
            self._look_for_rival()
            self._lose("no session")
            self._greet()

    def _look_for_rival(self) -> None:
        """A server that has just heard of us, by a connection that holds, gives our session up for another client of our id."""
        assert self.welcome is not None
        if self._now_ms() - self.confirmed_ms > self.welcome.session_timeout_ms / 2:
            return
        self._taken_count += 1
        if self._taken_count == TAKEN_TOLD:
            log.warning(
                "session_taken_over", address=self.address, client_id=self._identity.client_id, times=TAKEN_TOLD,
                advice="Another client seems to use this client id; give each one of its own.",
            )

    def _lose(self, reason: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._now_ms() - self._opened_ms >= STABLE_MS:
            self._hello_attempts = 0
            self._hello_due_ms = -inf
        self._unsent.clear()
        self._heartbeats.clear()
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
        log.info("session_lost", address=self.address, reason=reason)
        self._listener.on_link_lost(self)

    def _is_silent(self, now_ms: float) -> bool:
        bound_ms = SILENCE_MS_MAX if self.welcome is None else self.welcome.session_timeout_ms
        return self._is_connected and now_ms - max(self.last_heard_ms, self._connected_ms) > bound_ms

    def _recycle(self) -> None:
        """Connected by all signs, yet nothing comes: a half-open link or a hung server. A new connection finds out."""
        silent_ms = self._now_ms() - max(self.last_heard_ms, self._connected_ms)
        log.warning("link_recycled", address=self.address, silent_ms=round(silent_ms))
        self._stop_greeting()
        self._connection.close()
        self._is_connected = False
        self._connection = self._loop.connect(self.address, self)
        self._lose("silent")

    # --- heartbeats -------------------------------------------------------------------------------------------------

    def _start_heartbeats(self, welcome: Welcome) -> None:
        self._heartbeats.clear()
        delay_ms = max(welcome.heartbeat_ms, HEARTBEAT_MS_MIN)
        self._heartbeat_due_ms = self._now_ms() + delay_ms
        self._heartbeat_timer = self._loop.call_later(delay_ms, self._beat)

    def _beat(self) -> None:
        assert self.welcome is not None
        now_ms = self._now_ms()
        delay_ms = max(self.welcome.heartbeat_ms, HEARTBEAT_MS_MIN)
        # A late beat means that we stood still ourselves: what the server said meanwhile may be waiting to be read.
        is_late = now_ms - self._heartbeat_due_ms > delay_ms
        if self._is_silent(now_ms) and not is_late:
            self._recycle()
            return
        number = self._number = self._number + 1
        if self._connection.send([encode(Heartbeat(number, int(delay_ms)))]):
            self._heartbeats[number] = now_ms
        self._heartbeat_due_ms = now_ms + delay_ms
        self._heartbeat_timer = self._loop.call_later(delay_ms, self._beat)

    def _handle_heartbeat_reply(self, reply: AnyReply) -> None:
        sent_ms = self._heartbeats.pop(reply.number)
        if isinstance(reply, Alive):
            self.confirmed_ms = max(self.confirmed_ms, sent_ms)
            self._handle_notice(reply)
        elif isinstance(reply, Failed) and reply.code == Code.NO_SESSION:
            self._handle_no_session()

    # --- a full pipe ------------------------------------------------------------------------------------------------

    def _send_unsent(self) -> None:
        """Send what waits, oldest first, with the time that is left to it, until the pipe is full."""
        self._full_timer = None
        unsent, now_ms = self._unsent, self._now_ms()
        while unsent:
            waiting = self._outstanding.get(unsent[0])
            if waiting is not None and waiting.deadline_ms > now_ms:
                left_ms = max(1, round(waiting.deadline_ms - now_ms))
                header = encode(msgspec.structs.replace(waiting.request, timeout_ms=left_ms))
                if not self._connection.send((header, *waiting.payload)):
                    self._retry_when_full()
                    return
            unsent.popleft()

    def _retry_when_full(self) -> None:
        if self._full_timer is None:
            self._full_timer = self._loop.call_later(FULL_PAUSE_MS, self._send_unsent)

    # --- deadlines --------------------------------------------------------------------------------------------------

    def _set_deadline_timer(self, due_ms: float) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._deadline_timer_ms = due_ms
        self._deadline_timer = self._loop.call_later(max(0.0, due_ms - self._now_ms()), self._fail_overdue)

    def _fail_overdue(self) -> None:
        now_ms = self._now_ms()
        deadlines, outstanding = self._deadlines, self._outstanding
        overdue: list[int] = []
        while deadlines and (deadlines[0][0] <= now_ms or deadlines[0][1] not in outstanding):
            overdue.append(heappop(deadlines)[1])
        self._deadline_timer_ms = inf
        self._deadline_timer = None
        if deadlines:
            self._set_deadline_timer(deadlines[0][0])
        for number in overdue:
            waiting = outstanding.pop(number, None)
            if waiting is not None:
                waiting.on_reply(self._timeout_error(waiting.request), [])

    def _forget_answered(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if entry[1] in self._outstanding]
        heapify(self._deadlines)

    def _timeout_error(self, request: Request) -> RequestTimeoutError:
        what, timeout_ms = type(request).__name__, request.timeout_ms
        if self.is_open:
            text = f"{self.address} did not answer {what} within {timeout_ms} ms; it is slow or stands still."
        else:
            text = f"{self.address} could not be reached for {what} within {timeout_ms} ms; check that a zrmq server runs there."
        text += " It is unknown whether the message was stored." if isinstance(request, Send) else " Try again."
        return RequestTimeoutError(text, address=self.address, request=what, timeout_ms=timeout_ms)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _fail_all(self, error: ZrmqError) -> None:
        for number in list(self._outstanding):
            waiting = self._outstanding.pop(number, None)
            if waiting is not None:
                waiting.on_reply(error, [])

    def _say_bye(self) -> bool:
        self._bye_number = self._number = self._number + 1
        return self._connection.send([encode(Bye(self._bye_number, int(BYE_TIMEOUT_MS)))])

    def _end(self) -> None:
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._connection.close()
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is not None:
            on_closed()


def _too_large(payload: Frames) -> PayloadTooLargeError:
    size = max(map(len, payload))
    return PayloadTooLargeError(
        f"A payload frame has {size} bytes; no server takes more than {MESSAGE_BYTES_MAX}. Send less at once.",
        size_bytes=size, limit_bytes=MESSAGE_BYTES_MAX,
    )
