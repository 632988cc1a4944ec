"""What the demo sees of the cluster from outside: routes, leases and lag, asked of NameServers and brokers by an admin client."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from zrmq.cli.demo_reports import queue_name
from zrmq.cli.demo_verdict import LeaseSeen
from zrmq.cli.demo_view import BrokerRow
from zrmq.cli.group import summary
from zrmq.clock import SystemClock
from zrmq.errors import ZrmqError
from zrmq.logs import get_logger

if TYPE_CHECKING:
    from zrmq.client.admin import Admin
    from zrmq.protocol.requests import GroupInfo, TopicInfo

LOOK_EVERY_S = 0.25

log = get_logger("demo")


class Sight(msgspec.Struct, frozen=True):
    """What was seen at one look."""

    brokers: list[BrokerRow]
    lag: dict[str, int]  # by group

    @property
    def queues(self) -> list[str]:
        """Every queue of the demo's topics."""
        return [
            queue_name(topic, broker.broker_name, queue_id)
            for broker in self.brokers for topic, count in broker.queue_counts.items() for queue_id in range(count)
        ]


class Observer:
    """Looks at the cluster every `LOOK_EVERY_S` on a thread of its own: a NameServer that is killed must not stop the demo."""

    def __init__(self, admin: Admin, topics: tuple[str, ...], groups: tuple[str, ...]) -> None:
        self._admin = admin
        self._topics = topics
        self._groups = groups
        self._clock = SystemClock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="demo-observer", daemon=True)
        self.latest = Sight([], {})
        self.leases: list[LeaseSeen] = []

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more, and wait for the last look to end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look_again(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.latest = self.look()
            except ZrmqError as error:
                log.info("look_failed", reason=error.message)  # the next one goes to another NameServer

    def look(self) -> Sight:
        """Ask everybody, once."""
        asked_ms = self._clock.monotonic_ms()
        groups = self._admin.groups()
        answered_ms = self._clock.monotonic_ms()
        for group in self._groups:
            for broker_name, info in groups.get(group, {}).items():
                self.leases += leases_of(group, broker_name, info, asked_ms, answered_ms)
        return Sight(self._brokers(), {group: summary(group, groups[group])["lag"] for group in self._groups if group in groups})

    def _brokers(self) -> list[BrokerRow]:
        topics = self._admin.topics()
        return [
            BrokerRow(broker.broker_name, broker.address, broker.suspect, self._queue_counts(broker.broker_name, topics))
            for broker in self._admin.cluster()
        ]

    def _queue_counts(self, broker_name: str, topics: Mapping[str, Mapping[str, TopicInfo]]) -> dict[str, int]:
        return {topic: len(topics[topic][broker_name].queues) for topic in self._topics if broker_name in topics.get(topic, {})}


def leases_of(group: str, broker_name: str, info: GroupInfo, asked_ms: float, answered_ms: float) -> list[LeaseSeen]:
    """The leases of a group at one broker, as the ledger takes them."""
    return [
        LeaseSeen(asked_ms, answered_ms, group, queue, lease.client_id, lease.lease_epoch)
        for lease in info.leases
        for queue in (queue_name(lease.topic, broker_name, lease.queue_id),)
    ]
