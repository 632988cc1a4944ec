"""The administrator of a run: changes topics at one broker at a time, with the requests of `zrmq.client.admin`."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

import msgspec

from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.errors import ZrmqError
from zrmq.protocol.events import PERMISSION_READ, PERMISSION_WRITE, TopicConfig
from zrmq.protocol.requests import AnyReply, DescribeTopics, PutTopic, Topics
from zrmq.testing.simulation.plan import DAMAGE

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

ASK_MS = 5_000
QUEUES_MAX = 8
NAME = "admin"


class IdleListener:
    """Nothing that an instance tells is of interest."""

    def on_route(self, route: object) -> None:
        """Of `InstanceListener`."""

    def on_link_open(self, broker_name: str, link: object) -> None:
        """Of `InstanceListener`."""

    def on_link_lost(self, broker_name: str, link: object) -> None:
        """Of `InstanceListener`."""

    def on_notice(self, broker_name: str, link: object, notice: object) -> None:
        """Of `InstanceListener`."""


class VirtualAdmin:
    """One administrator, from the beginning to the end. `settled` is what topics were last said to be, by broker and name."""

    def __init__(self, world: World, every_ms: float) -> None:
        self.settled: dict[tuple[str, str], TopicConfig] = {}
        self._world = world
        self._every_ms = every_ms
        self._rng = Random(f"{world.plan.seed} {NAME}")
        self._machine = world.network.machine(NAME)
        identity = Identity(NAME, "admin")
        self._instance = ClientInstance(self._machine, world.nameserver_addresses, identity, self._rng)
        self._instance.listener = IdleListener()
        self._later()

    def _later(self) -> None:
        self._machine.call_later(self._rng.expovariate(1.0 / self._every_ms), self._change_something)

    def _change_something(self) -> None:
        if not self._world.is_working:
            return
        self._later()
        topic = self._rng.choice(self._world.plan.topics).name
        broker_name = self._rng.choice(self._world.plan.broker_names)
        link = self._instance.link(broker_name)
        if link is not None:
            link.request(DescribeTopics, [topic], timeout_ms=ASK_MS, on_reply=partial(self._described, broker_name))

    def _described(self, broker_name: str, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        link = self._instance.link(broker_name)
        if not isinstance(reply, Topics) or link is None or not self._world.is_working:
            return
        config = self._changed(reply.topics[0].config)
        self._world.note(NAME, "changes_topic", f"{broker_name} {config}")
        self.settled.pop((broker_name, config.topic), None)
        link.request(PutTopic, config, timeout_ms=ASK_MS, on_reply=partial(self._put, broker_name, config))

    def _changed(self, config: TopicConfig) -> TopicConfig:
        luck = self._rng.random()
        if luck < 0.4:
            return msgspec.structs.replace(config, queue_count=min(config.queue_count + self._rng.randint(1, 2), QUEUES_MAX))
        if luck < 0.8 or DAMAGE & self._world.plan.faults.keys():  # nothing is deleted of a damaged log
            return msgspec.structs.replace(config, permission=config.permission ^ PERMISSION_WRITE | PERMISSION_READ)
        return msgspec.structs.replace(
            config, retention_ms=self._rng.choice((None, 500, 5_000)), retention_bytes=self._rng.choice((None, 2_000, 20_000))
        )

    def _put(self, broker_name: str, config: TopicConfig, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, Topics):
            self._world.note(NAME, "changed_topic", f"{broker_name} {config.topic}")
            self.settled[broker_name, config.topic] = config
