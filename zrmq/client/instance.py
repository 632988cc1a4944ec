"""What a producer or consumer knows of the cluster: the route of its topics, and a link to each broker it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Protocol

from zrmq.client.link import Identity, Link
from zrmq.client.route_watch import RouteWatch
from zrmq.client.waiting import BrokerWait, OnDone, RouteWait, Settling, TopicCreation
from zrmq.errors import ClosedError, InvalidArgumentError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import MessageQueue
from zrmq.protocol.events import PERMISSION_WRITE
from zrmq.protocol.limits import check_topic
from zrmq.protocol.requests import MASTER_ID, AnyReply, BrokerInfo, Route, TopicRoute
from zrmq.transport.interface import Loop

log = get_logger("client")


class RouteView:
    """One answer of a NameServer, never changed: any thread may read it.

    `version` is the answer's digest, `brokers` the live masters by broker name; those that are `suspect` were silent for 3 s.
    """

    def __init__(self, route: Route) -> None:
        self.version = route.version
        self.brokers: dict[str, BrokerInfo] = {
            broker.broker_name: broker for broker in route.brokers if broker.broker_id == MASTER_ID
        }
        self._topics: dict[str, list[TopicRoute]] = {}
        for topic_route in route.topics:
            if topic_route.broker_name in self.brokers:
                self._topics.setdefault(topic_route.topic, []).append(topic_route)
        self._queues: dict[str, list[MessageQueue]] = {}  # made when first asked for
        self._writable: dict[str, list[MessageQueue]] = {}

    @property
    def topics(self) -> list[str]:
        """Those of the topics asked for that exist, sorted."""
        return sorted(self._topics)

    def queues(self, topic: str) -> list[MessageQueue]:
        """All queues of the topic, sorted; none when it does not exist. The list is the view's own: do not change it."""
        found = self._queues.get(topic)
        if found is None:
            found = self._queues[topic] = _queues(self._topics.get(topic, []))
        return found

    def writable_queues(self, topic: str) -> list[MessageQueue]:
        """The queues a producer may choose from, sorted: those at suspect brokers only when there are no others."""
        found = self._writable.get(topic)
        if found is None:
            routes = [route for route in self._topics.get(topic, []) if route.permission & PERMISSION_WRITE]
            sound = [route for route in routes if not self.brokers[route.broker_name].suspect]
            found = self._writable[topic] = _queues(sound or routes)
        return found


def _queues(routes: list[TopicRoute]) -> list[MessageQueue]:
    return sorted(
        MessageQueue(route.topic, route.broker_name, queue_id) for route in routes for queue_id in range(route.queue_count)
    )


class InstanceListener(Protocol):
    """What an instance tells its owner, on the loop's thread."""

    def on_route(self, route: RouteView) -> None:
        """The route has changed, or covers other topics now; it is in `instance.route` too. Links to brokers that left it are
        closed already."""

    def on_link_open(self, broker_name: str, link: Link) -> None:
        """The session with a broker is open (again); see `LinkListener.on_link_open`."""

    def on_link_lost(self, broker_name: str, link: Link) -> None:
        """The session that was open is gone. The link opens a new one by itself, unless its broker left the route."""

    def on_notice(self, broker_name: str, link: Link, notice: AnyReply) -> None:
        """The broker sent a notice, or `Alive` in answer to a heartbeat."""


class ClientInstance:
    """One client's view of the cluster. Loop thread only.

    While no NameServer can be reached the last route stays in use. A broker that left the route loses its link, and what was
    outstanding there ends with `ClosedError`; one that came back at another address gets a new link. A broker that was started
    again at its address keeps the link, which opens a new session and sends again what has no answer.

    A broker that left is not told BYE: perhaps the NameServer is wrong and it is there, and what our callers have in hand of its
    queues would go to somebody else at once. It keeps our leases until we are back, or for the session timeout.
    """

    def __init__(
        self,
        loop: Loop,
        nameservers: Sequence[str],
        identity: Identity,
        rng: Random,
        listener: InstanceListener | None = None,
    ) -> None:
        """Begins to connect. Raises `InvalidArgumentError` if one of the addresses cannot be one.

        `listener` may also be set afterwards, in the same turn.
        """
        self.route: RouteView | None = None
        self.listener = listener
        self._loop = loop
        self._identity = identity
        self._rng = rng
        self._links: dict[str, Link] = {}
        self._names: dict[Link, str] = {}
        self._session_epochs: dict[str, int] = {}  # of brokers that left, as of then
        self._waits: list[RouteWait] = []
        self._settling: dict[str, Settling] = {}
        self._is_closed = False
        self._on_closed: list[Callable[[], None]] | None = None  # while the servers are told
        self.nameservers = tuple(nameservers)
        self._watch = RouteWatch(loop, nameservers, identity, rng, self._take_route, self._is_connected)

    # --- for the owner ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> ZrmqError | None:
        """Why no NameServer answers at present; None while one does."""
        return self._watch.trouble

    def covers(self, topic: str) -> bool:
        """Whether `route` would show the topic if it existed."""
        return self._watch.covers(topic)

    def want_topics(self, topics: Iterable[str]) -> None:
        """Watch these topics too. Raises `InvalidArgumentError` for a name that cannot be one."""
        topics = list(topics)
        for topic in topics:
            check_topic(topic)
        self._watch.want(topics)

    def link(self, broker_name: str) -> Link | None:
        """The link to the broker's master, made when it is first asked for; None when the route does not have it."""
        found = self._links.get(broker_name)
        broker = self.route.brokers.get(broker_name) if self.route is not None else None
        if found is not None or broker is None or self._is_closed:
            return found
        try:
            epoch = self._session_epochs.get(broker_name, 0)
            made = Link(self._loop, broker.address, self._identity, self, self._rng, session_epoch=epoch)
        except InvalidArgumentError as error:
            log.warning("broker_address_refused", broker_name=broker_name, address=broker.address, reason=error.message)
            return None
        self._links[broker_name] = made
        self._names[made] = broker_name
        return made

    def await_route(self, on_done: OnDone, timeout_ms: int, topic: str | None = None) -> None:
        """Call `on_done(None)` when a route is known, and shows `topic` if one is given (it is watched from now on).

        Called once and never inside this call; after `timeout_ms` with `UnreachableError` that names the addresses, with what the
        NameServers answered instead, or with `TopicNotFoundError`; with `ClosedError` at `close`.
        """
        if topic is not None:
            self.want_topics([topic])
        self._check_open()
        self._waits.append(RouteWait(self, self._loop, topic, on_done, timeout_ms))

    def await_broker(self, on_done: OnDone, timeout_ms: int) -> None:
        """As `await_route`, but the route has to show a broker; `on_done(UnreachableError)` when none has registered by then."""
        self._check_open()
        self._waits.append(BrokerWait(self, self._loop, None, on_done, timeout_ms))

    def ensure_topic(self, topic: str, on_done: OnDone, timeout_ms: int, everywhere: bool = False) -> None:
        """Create the topic by use at every live master, unless it exists; `on_done(None)` when the route shows it, or shows it
        at all that were asked, refusals and a second of patience aside.

        Called once and never inside this call; with `TopicNotFoundError` when no broker creates topics by use, else with the
        errors of `await_route`, of the brokers, or `RequestTimeoutError`. Raises `InvalidArgumentError` for a bad name.
        """
        self.want_topics([topic])
        self._check_open()
        self._waits.append(TopicCreation(self, self._loop, topic, on_done, timeout_ms, everywhere))

    def is_settling(self, topic: str) -> bool:
        """Whether the topic is being created, and the route is about to show it at more brokers than now. Any thread."""
        return topic in self._settling

    def settling(self, topic: str) -> Settling:
        """Whom the topic's creation waits for, to add to."""
        found = self._settling.get(topic)
        if found is None:
            found = self._settling[topic] = Settling(self._loop, topic, self._settled)
        return found

    def close(self, on_closed: Callable[[], None] | None = None) -> None:
        """End all sessions; what waits ends with `ClosedError`. `on_closed` is called when the servers have been told, or after
        500 ms; of a later call too."""
        if self._is_closed:
            if on_closed is not None and self._on_closed is not None:
                self._on_closed.append(on_closed)
            elif on_closed is not None:
                on_closed()
            return
        self._is_closed = True
        self._on_closed = [] if on_closed is None else [on_closed]
        waits, self._waits = self._waits, []
        for wait in waits:
            wait.end(ClosedError("The client was closed before it was done."))
        for settling in list(self._settling.values()):
            settling.end()
        links = list(self._links.values())
        self._links.clear()
        self._names.clear()
        left = len(links) + 1

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0 and self._on_closed is not None:
                callbacks, self._on_closed = self._on_closed, None
                for callback in callbacks:
                    callback()

        self._watch.close(count)
        for link in links:
            link.close(count)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("The client is closed; make a new one.")

    # --- the route ----------------------------------------------------------------------------------------------------

    def _is_connected(self) -> bool:
        return any(link.is_open for link in self._links.values())

    def _take_route(self, route: Route, is_new: bool) -> None:
        if is_new:
            view = self.route = RouteView(route)
            self._drop_links(view)
            if self.listener is not None:
                self.listener.on_route(view)
            for settling in list(self._settling.values()):
                settling.advance(view)
        self._advance_waits()

    def _settled(self, topic: str) -> None:
        if self._settling.pop(topic, None) is not None:
            self._advance_waits()

    def _advance_waits(self) -> None:
        self._waits = [wait for wait in self._waits if not wait.is_over]
        for wait in self._waits[:]:
            wait.advance()

    def _drop_links(self, view: RouteView) -> None:
        for name, link in list(self._links.items()):
            broker = view.brokers.get(name)
            if broker is not None and broker.address == link.address:
                continue
            log.info("broker_left" if broker is None else "broker_moved", broker_name=name, address=link.address)
            del self._links[name], self._names[link]
            self._session_epochs[name] = link.session_epoch
            if link.is_open and self.listener is not None:
                self.listener.on_link_lost(name, link)
            link.close(says_bye=False)
            if broker is not None:
                self.link(name)

    # --- what links say -----------------------------------------------------------------------------------------------

    def on_link_open(self, link: Link) -> None:
        """Of `LinkListener`."""
        name = self._names.get(link)
        if name is not None and self.listener is not None:
            self.listener.on_link_open(name, link)

    def on_link_lost(self, link: Link) -> None:
        """Of `LinkListener`."""
        name = self._names.get(link)
        if name is not None and self.listener is not None:
            self.listener.on_link_lost(name, link)

    def on_notice(self, link: Link, notice: AnyReply) -> None:
        """Of `LinkListener`."""
        name = self._names.get(link)
        if name is not None and self.listener is not None:
            self.listener.on_notice(name, link, notice)
