"""Following the route: one NameServer at a time, the next one when it fails, and a question that waits there for changes.

The first NameServer is drawn, so that clients spread. It is kept until the session with it is lost, it does not open one, or an
answer is overdue; then the next one in the list is asked. When all have failed in turn, there is a pause that grows, and one line
in the log. What was known last stays good until there is an answer again.

A NameServer that knows no broker at all may be the one that is cut off from them. It is believed when the others know none
either, or cannot be asked and we have no session with a broker ourselves. Then all are asked in turn, as long as it is so.

When the topics are others than before, the question brings the version `ROUTE_OF_OTHERS` instead of none: a NameServer that has
just started answers a first question with the little that it knows, but lets one who has a route wait until it knows more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random

from zrmq.client.link import Identity, Link
from zrmq.errors import InvalidFrameError, NotReadyError, RequestTimeoutError, UnreachableError, ZrmqError
from zrmq.logs import get_logger
from zrmq.protocol.limits import QUERY_TOPICS_MAX
from zrmq.protocol.requests import ROUTE_OF_OTHERS, AnyReply, QueryRoute, Route
from zrmq.transport.address import parse_connect_address
from zrmq.transport.interface import Loop, Timer

QUERY_TIMEOUT_MS = 3_000
WATCH_TIMEOUT_MS = 30_000
EMPTY_WATCH_MS = 10_000  # of a route without brokers, when there are other NameServers that may know some
OPEN_MS_MIN = 500.0  # how long a NameServer gets to open a session, doubled after each round in which all failed
OPEN_MS_MAX = 5_000.0
PAUSE_MS_MIN = 100.0  # after a round in which all failed, doubled each time
PAUSE_MS_MAX = 5_000.0
NOT_READY_MS = 150.0  # a NameServer that has just started is asked again after
AGAIN_MS = 10.0  # between an answer and the next watch: changes that come together make one answer

log = get_logger("client")


class RouteWatch:
    """Tells `on_answer` each answer, and whether it is a new one: another version, or for other topics. Loop thread only.

    `trouble` is why there is no answer at present: of NameServers that cannot be reached an `UnreachableError`, else what they
    said; None while all is well.
    """

    def __init__(
        self,
        loop: Loop,
        nameservers: Sequence[str],
        identity: Identity,
        rng: Random,
        on_answer: Callable[[Route, bool], None],
        is_connected: Callable[[], bool],
    ) -> None:
        """Begins to connect. Raises `InvalidArgumentError` if one of the addresses cannot be one.

        `is_connected`: whether a session with a broker is open.
        """
        for address in nameservers:  # all, not only the one that is drawn: the others' turn comes when nobody looks
            parse_connect_address(address)
        self.trouble: ZrmqError | None = None
        self._loop = loop
        self._nameservers = tuple(nameservers)
        self._identity = identity
        self._rng = rng
        self._on_answer = on_answer
        self._is_connected = is_connected
        self._wanted: set[str] = set()
        self._answered: frozenset[str] | None = None  # the topics of the last answer
        self._version = 0
        self._number = 0  # of the question that is out, 0 for none
        self._is_empty = False  # the last answer: it had no broker
        self._failures = 0  # since the last answer
        self._empty_handed: set[int] = set()  # which NameServers knew no broker since then
        self._is_reported = False
        self._timer: Timer | None = None  # what comes next: moving on or asking
        self._turn = rng.randrange(len(self._nameservers))
        self._link = self._connect()
        self._ask()

    @property
    def address(self) -> str:
        """Of the NameServer that is asked now."""
        return self._link.address

    def want(self, topics: Iterable[str]) -> None:
        """Watch these too."""
        fresh = set(topics) - self._wanted
        if fresh:
            self._wanted |= fresh
            if self._link.is_open:
                self._do_later(0.0, self._ask)

    def covers(self, topic: str) -> bool:
        """Whether the last answer would have shown the topic."""
        return self._answered is not None and (topic in self._answered or "*" in self._answered)

    def close(self, on_closed: Callable[[], None] | None = None) -> None:
        """Leave; `on_closed` is called when the NameServer has been told."""
        self._stop_waiting()
        self._link.close(on_closed)

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Put the question. Before the session is open it only waits for that; it is put again then."""
        self._stop_waiting()
        topics = frozenset(self._wanted) if len(self._wanted) <= QUERY_TOPICS_MAX else frozenset("*")
        version = self._version if topics == self._answered or not self._version else ROUTE_OF_OTHERS
        timeout_ms = WATCH_TIMEOUT_MS if version else QUERY_TIMEOUT_MS
        if version and self._is_empty and len(self._nameservers) > 1:
            timeout_ms = EMPTY_WATCH_MS
        if not self._link.is_open:
            timeout_ms = round(self._growing(OPEN_MS_MIN, OPEN_MS_MAX))
        self._number = self._link.request(
            QueryRoute, sorted(topics), version, timeout_ms=timeout_ms, on_reply=partial(self._handle_reply, topics)
        )

    def _handle_reply(self, topics: frozenset[str], reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        self._number = 0
        if isinstance(reply, Route) and not reply.brokers and self._is_doubtful():
            self._fail(UnreachableError(f"The NameServer at {self.address} knows no broker.", addresses=self._nameservers))
        elif isinstance(reply, Route):
            self._handle_route(topics, reply)
        elif isinstance(reply, NotReadyError):
            self.trouble = reply
            self._do_later(NOT_READY_MS * self._rng.uniform(0.5, 1.0), self._ask)
        elif isinstance(reply, RequestTimeoutError) and not self._link.is_open:
            self._fail(self._unreachable())
        elif isinstance(reply, ZrmqError):
            self._fail(reply)
        else:
            self._fail(InvalidFrameError(f"{self.address} answered QueryRoute with {type(reply).__name__}; is it a NameServer?"))

    def _is_doubtful(self) -> bool:
        """Whether that this NameServer knows no broker is not to be believed yet."""
        self._empty_handed.add(self._turn % len(self._nameservers))
        if len(self._empty_handed) == len(self._nameservers):
            return False
        is_everybody_asked = self._failures + 1 >= len(self._nameservers)
        return not is_everybody_asked or self._is_connected()

    def _handle_route(self, topics: frozenset[str], route: Route) -> None:
        if self._is_reported:
            log.info("nameserver_reached", address=self.address)
        self._failures = 0
        self._empty_handed.clear()
        self._is_empty = not route.brokers
        self._is_reported = False
        self.trouble = None
        is_new = route.version != self._version or topics != self._answered
        self._answered = topics
        self._version = route.version
        self._do_later(AGAIN_MS * self._rng.uniform(0.5, 1.0), self._ask)
        self._on_answer(route, is_new)

    # --- one NameServer after the other -------------------------------------------------------------------------------

    def on_link_open(self, link: Link) -> None:
        """Of `LinkListener`."""
        if link is self._link:
            if self._version:  # what is known stays good, and the answer to a watch may take long
                self.trouble = None
            self._ask()

    def on_link_lost(self, link: Link) -> None:
        """Of `LinkListener`."""
        if link is self._link:
            self._fail(self._unreachable())

    def on_notice(self, link: Link, notice: AnyReply) -> None:
        """Of `LinkListener`. NameServers have nothing to tell unasked."""

    def _connect(self) -> Link:
        address = self._nameservers[self._turn % len(self._nameservers)]
        return Link(self._loop, address, self._identity, self, self._rng)

    def _fail(self, error: ZrmqError) -> None:
        """This NameServer is of no use now: go to the next one, after a pause when that was the last."""
        self._stop_waiting()
        self.trouble = error
        self._failures += 1
        is_round_over = self._failures % len(self._nameservers) == 0
        if is_round_over and not self._is_reported and (not self._empty_handed or self._is_connected()):
            self._is_reported = True
            log.warning("nameservers_failed", addresses=list(self._nameservers), reason=error.message)
        pause_ms = self._growing(PAUSE_MS_MIN, PAUSE_MS_MAX) if is_round_over else 0.0
        self._do_later(pause_ms, self._move_on)

    def _move_on(self) -> None:
        if len(self._nameservers) > 1 or not self._link.is_open:  # a new connection tries more often than an old one
            former = self._link
            self._turn += 1
            self._link = self._connect()
            former.close()
        self._ask()

    def _growing(self, least_ms: float, most_ms: float) -> float:
        rounds = self._failures // len(self._nameservers)
        return min(least_ms * 2.0 ** min(rounds, 10), most_ms) * self._rng.uniform(0.75, 1.0)

    def _unreachable(self) -> UnreachableError:
        names = ", ".join(self._nameservers)
        return UnreachableError(
            f"No NameServer answers at {names}; start one (zrmq up), or give the right addresses by nameservers= or "
            "ZRMQ_NAMESERVERS.",
            addresses=self._nameservers,
        )

    # --- one timer ----------------------------------------------------------------------------------------------------

    def _do_later(self, delay_ms: float, step: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self._loop.call_later(delay_ms, step)

    def _stop_waiting(self) -> None:
        """Forget the timer and the question that is out: there is one next step at a time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._number:
            self._link.cancel(self._number)
            self._number = 0
