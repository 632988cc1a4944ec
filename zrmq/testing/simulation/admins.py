"""The administrator of a run: changes topics at one broker at a time, with the requests of `zrmq.client.admin`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import msgspec

from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity, Link, OnReply
from zrmq.errors import Code, ZrmqError
from zrmq.message import FlushMode
from zrmq.protocol.events import PERMISSION_READ, PERMISSION_WRITE, TopicConfig
from zrmq.protocol.requests import AnyReply, DeleteTopic, DescribeTopics, Done, PutTopic, Topics
from zrmq.testing.simulation.plan import DAMAGE

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

Change = Callable[[TopicConfig], TopicConfig] | None  # None: the topic is deleted and made again

ASK_MS = 5_000
QUEUES_MAX = 8
GONE_MS = (50.0, 4_000.0)  # how long a topic stays deleted
AGAIN_MS = 300.0
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

    def __init__(self, world: World) -> None:
        self.settled: dict[tuple[str, str], TopicConfig] = {}
        self._open_count = 0  # changes without an answer
        self._asked: dict[tuple[str, str], TopicConfig] = {}  # the last one, whatever has become of it
        self._world = world
        self._rng = Random(f"{world.plan.seed} {NAME}")
        self._flush_rng = Random(f"{world.plan.seed} {NAME} flush")
        self._remake_rng = Random(f"{world.plan.seed} {NAME} remake")
        self._remaking: set[tuple[str, str]] = set()
        self._machine = world.network.machine(NAME)
        identity = Identity(NAME, "admin")
        self._instance = ClientInstance(self._machine, world.nameserver_addresses, identity, self._rng)
        self._instance.listener = IdleListener()
        self._again(self._rng, world.plan.work.change_topics_every_ms, self._changed)
        self._again(self._flush_rng, world.plan.work.change_flush_every_ms, _flushed_otherwise)
        self._again(self._remake_rng, world.plan.work.remake_topics_every_ms, None)

    @property
    def is_busy(self) -> bool:
        """Whether something that it has begun may still change topics."""
        return bool(self._open_count or self._remaking)

    def _again(self, rng: Random, every_ms: float, change: Change) -> None:
        if every_ms:
            self._machine.call_later(rng.expovariate(1.0 / every_ms), partial(self._change_something, rng, every_ms, change))

    def _change_something(self, rng: Random, every_ms: float, change: Change) -> None:
        if not self._world.is_working:
            return
        self._again(rng, every_ms, change)
        topic = rng.choice(self._world.plan.topics).name
        broker_name = rng.choice(self._world.plan.broker_names)
        link = self._instance.link(broker_name)
        if link is not None:
            on_reply = partial(self._described, broker_name, change)
            link.request(DescribeTopics, [topic], timeout_ms=ASK_MS, on_reply=on_reply)

    def _described(self, broker_name: str, change: Change, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        link = self._instance.link(broker_name)
        if not isinstance(reply, Topics) or link is None or not self._world.is_working:
            return
        config = reply.topics[0].config
        if change is None:
            self._delete(broker_name, config, reply.topics[0].topic_id, link)
            return
        config = change(config)
        self._world.note(NAME, "changes_topic", f"{broker_name} {config}")
        self._ask(broker_name, config, link, partial(self._put, broker_name, config))

    def _ask(self, broker_name: str, config: TopicConfig, link: Link, on_reply: OnReply) -> None:
        self.settled.pop((broker_name, config.topic), None)
        self._asked[broker_name, config.topic] = config
        self._world.promises.flush_asked(broker_name, config.topic, config.flush_mode)
        self._open_count += 1
        link.request(PutTopic, config, timeout_ms=ASK_MS, on_reply=partial(self._answered, on_reply))

    def _answered(self, on_reply: OnReply, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        self._open_count -= 1
        on_reply(reply, frames)

    # --- deleted and made again ---------------------------------------------------------------------------------------

    def _delete(self, broker_name: str, config: TopicConfig, topic_id: int, link: Link) -> None:
        if (broker_name, config.topic) in self._remaking:
            return
        self._remaking.add((broker_name, config.topic))
        self._world.note(NAME, "deletes_topic", f"{broker_name} {config.topic}")
        self.settled.pop((broker_name, config.topic), None)
        self._asked.pop((broker_name, config.topic), None)  # what is still under way comes before this
        on_reply = partial(self._deleted, broker_name, config)
        link.request(DeleteTopic, config.topic, topic_id, timeout_ms=ASK_MS, on_reply=on_reply)

    def _deleted(self, broker_name: str, config: TopicConfig, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        """Or nobody knows. It is made again in any case."""
        if isinstance(reply, Done):
            self._world.note(NAME, "deleted_topic", f"{broker_name} {config.topic}")
        least, most = GONE_MS
        gone_ms = least * (most / least) ** self._remake_rng.random()
        self._machine.call_later(gone_ms, partial(self._make_anew, broker_name, config))

    def _make_anew(self, broker_name: str, config: TopicConfig) -> None:
        link = self._instance.link(broker_name)
        if link is None:
            self._machine.call_later(AGAIN_MS, partial(self._make_anew, broker_name, config))
        else:
            self._ask(broker_name, config, link, partial(self._made_anew, broker_name, config))

    def _made_anew(self, broker_name: str, config: TopicConfig, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, Topics):
            self._world.note(NAME, "made_topic_anew", f"{broker_name} {config.topic}")
            self._remaking.discard((broker_name, config.topic))
            self._put(broker_name, config, reply, frames)
            return
        if isinstance(reply, ZrmqError) and reply.code is Code.BAD_REQUEST:  # it is there, with more queues
            config = msgspec.structs.replace(config, queue_count=config.queue_count + 1)
        self._machine.call_later(AGAIN_MS, partial(self._make_anew, broker_name, config))

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
        if not isinstance(reply, Topics):
            return
        self._world.note(NAME, "changed_topic", f"{broker_name} {config.topic}")
        if self._asked.get((broker_name, config.topic)) is config:  # else it is something else already, or will be
            self.settled[broker_name, config.topic] = config
            self._world.promises.flush_settled(broker_name, config.topic, config.flush_mode, self._world.network.now_ms)


def _flushed_otherwise(config: TopicConfig) -> TopicConfig:
    flush_mode = FlushMode.SYNC if config.flush_mode is FlushMode.ASYNC else FlushMode.ASYNC
    return msgspec.structs.replace(config, flush_mode=flush_mode)
