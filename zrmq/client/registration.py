"""A broker at its NameServers: registers at each of them, heartbeats every second, leaves when it stops."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from zrmq.client.link import Identity, Link
from zrmq.errors import Code, ZrmqError
from zrmq.logs import get_logger
from zrmq.protocol.requests import BrokerInfo, RegisterBroker, Registered, TopicRoute, UnregisterBroker
from zrmq.transport.interface import Loop

log = get_logger("broker")

HEARTBEAT_MS = 1_000.0
REQUEST_TIMEOUT_MS = 3_000
UNREACHED_MS = 5_000.0  # after a start: which NameServer has opened no session by then is named

Topics = tuple[int, Callable[[], list[TopicRoute]]]  # version, and how to list them


class Registration:
    """One broker's registrations. The NameServers do not know of each other; each gets the table when it lacks this version.

    Loop thread only. `topics` is asked at each heartbeat for the table's version and how to list it.
    """

    def __init__(
        self, loop: Loop, nameservers: Sequence[str], broker: BrokerInfo, topics: Callable[[], Topics], rng: random.Random
    ) -> None:
        self._loop = loop
        self._broker = broker
        self._topics = topics
        client_id = f"{broker.broker_name}/{broker.broker_id}@{broker.epoch}-{rng.getrandbits(32):08x}"
        identity = Identity(client_id, role="broker")
        self._links = [Link(loop, address, identity, self, rng) for address in nameservers]
        self._known: dict[Link, int] = {}  # version of the table each NameServer has
        self._pending: set[Link] = set()
        self._reported: set[Link] = set()
        self._displaced: set[Link] = set()  # to NameServers where another broker has our name: leaving would sign that one off
        self._timer = loop.call_later(HEARTBEAT_MS, self._beat)
        self._unreached_timer = loop.call_later(UNREACHED_MS, self._report_unreached)
        for link in self._links:
            self._register(link)

    @property
    def registered_count(self) -> int:
        """How many NameServers know this broker with its present topics."""
        version, _ = self._topics()
        return sum(1 for link in self._links if link.is_open and self._known.get(link) == version)

    def topics_changed(self) -> None:
        """Tell every NameServer now, not with the next heartbeat."""
        for link in self._links:
            self._register(link)

    def close(self) -> None:
        """Leave every NameServer that is there, without waiting for its answer."""
        self._timer.cancel()
        self._unreached_timer.cancel()
        broker = self._broker
        for link in self._links:
            if link.is_open and link not in self._displaced:
                link.request(
                    UnregisterBroker, broker.broker_name, broker.broker_id, broker.epoch, broker.store_id,
                    timeout_ms=REQUEST_TIMEOUT_MS, on_reply=lambda reply, payload: None,
                )
            link.close()

    def on_link_open(self, link: Link) -> None:
        self._known.pop(link, None)
        self._register(link)

    def on_link_lost(self, link: Link) -> None:
        log.warning("nameserver_lost", address=link.address, broker_name=self._broker.broker_name)

    def on_notice(self, link: Link, notice: object) -> None:
        """NameServers have nothing to tell brokers."""

    def _report_unreached(self) -> None:
        """Say once which NameServers were never there; of one that is lost later that is said at once."""
        for link in self._links:
            if link.welcome is None:
                log.warning(
                    "nameserver_unreached", address=link.address, broker_name=self._broker.broker_name,
                    reason="Clients that ask it do not find this broker; start it, or give the right addresses by nameservers.",
                )

    def _beat(self) -> None:
        self._timer = self._loop.call_later(HEARTBEAT_MS, self._beat)
        for link in self._links:
            self._register(link)

    def _register(self, link: Link) -> None:
        if not link.is_open or link in self._pending:
            return
        version, list_topics = self._topics()
        table = None if self._known.get(link) == version else list_topics()
        self._pending.add(link)
        link.request(
            RegisterBroker, self._broker, version, table,
            timeout_ms=REQUEST_TIMEOUT_MS, on_reply=partial(self._answered, link, version),
        )

    def _answered(self, link: Link, version: int, reply: object, payload: list[bytes]) -> None:
        self._pending.discard(link)
        if isinstance(reply, Registered):
            self._reported.discard(link)
            self._displaced.discard(link)
            if reply.wants_topics:
                self._known.pop(link, None)
            else:
                self._known[link] = version
            if self._known.get(link) != self._topics()[0]:
                self._register(link)
        elif isinstance(reply, ZrmqError):
            if reply.code is Code.FORBIDDEN:
                self._displaced.add(link)
            if link in self._reported:
                return
            self._reported.add(link)
            log.warning("registration_failed", address=link.address, broker_name=self._broker.broker_name, reason=reply.message)
