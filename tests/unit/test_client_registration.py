"""A broker at its NameServers: known at each, table sent once per version, back after a restart, gone at once when it stops."""

from __future__ import annotations

import random
from typing import Any

import pytest

from zrmq.client.link import Identity, Link
from zrmq.client.registration import Registration
from zrmq.protocol.requests import AnyReply, BrokerInfo, QueryRoute, TopicRoute
from zrmq.routing.core import NameServerCore
from zrmq.transport.memory import MemoryLoop, MemoryNetwork

ADDRESSES = ["tcp://127.0.0.1:9876", "tcp://127.0.0.1:9877"]


class World:
    """Two NameServers and one broker's registration on a virtual network."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(random.Random(1))
        self.nameservers = {address: self.start_nameserver(address) for address in ADDRESSES}
        self.version, self.listed = 1, 0
        self.topics = [TopicRoute("meters", "broker-a", 4, 6)]
        self.loop = self.network.loop("broker")
        self.registration = self.register("tcp://127.0.0.1:10911", store_id="one")

    def register(self, broker_address: str, loop: MemoryLoop | None = None, **more: Any) -> Registration:
        broker = BrokerInfo("test", "broker-a", 0, "MASTER", 1, broker_address, "", **more)
        rng = random.Random(broker_address)  # its client id is its own
        return Registration(loop or self.loop, ADDRESSES, broker, lambda: (self.version, self.list), rng)

    def start_nameserver(self, address: str) -> NameServerCore:
        return NameServerCore(self.network.loop(address), address, random.Random(3))

    def list(self) -> list[TopicRoute]:
        self.listed += 1
        return self.topics

    def brokers_known(self, address: str) -> list[str]:
        """What a client is told by this NameServer."""
        answers: list[Any] = []
        loop = self.network.loop(f"observer of {address}")
        observer = Link(loop, address, Identity("observer", "admin"), self, random.Random(4))
        observer.request(QueryRoute, ["*"], timeout_ms=1000, on_reply=lambda reply, payload: answers.append(reply))
        self.network.run_until(lambda: bool(answers))
        return [broker.broker_name for broker in answers[0].brokers]

    def on_link_open(self, link: Link) -> None: ...

    def on_link_lost(self, link: Link) -> None: ...

    def on_notice(self, link: Link, notice: AnyReply) -> None: ...

    def wait_registered(self, count: int = 2) -> None:
        self.network.run_until(lambda: self.registration.registered_count == count)


@pytest.fixture
def world() -> World:
    world = World()
    world.wait_registered()
    return world


def test_every_nameserver_gets_the_table_once(world: World) -> None:
    assert [world.brokers_known(address) for address in ADDRESSES] == [["broker-a"], ["broker-a"]]
    world.network.run_for(10_000)
    assert world.listed == 2


def test_a_changed_table_goes_out_at_once(world: World) -> None:
    world.version, world.topics = 2, [*world.topics, TopicRoute("alarms", "broker-a", 1, 6)]
    world.registration.topics_changed()
    world.network.run_until(lambda: world.registration.registered_count == 2, limit_ms=500)
    assert world.listed == 4


def test_a_restarted_nameserver_gets_the_table_again_and_the_other_does_not(world: World) -> None:
    world.network.loops[ADDRESSES[0]].close()
    world.network.run_until(lambda: world.registration.registered_count == 1)
    world.start_nameserver(ADDRESSES[0])
    world.wait_registered()
    assert world.listed == 3


def test_a_nameserver_that_is_not_there_is_named_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.network.loops[ADDRESSES[1]].close()
    second = world.register("tcp://127.0.0.1:10911", store_id="one")
    world.network.run_for(4_900)
    assert "nameserver_unreached" not in capsys.readouterr().err
    world.network.run_for(60_000)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "nameserver_unreached" in line]
    assert ADDRESSES[1] in line
    assert second.registered_count == 1


def test_closing_unregisters_at_once(world: World) -> None:
    world.network.run_for(4_000)  # the NameServers' start-up grace
    world.registration.close()
    world.network.run_for(100)
    assert [world.brokers_known(address) for address in ADDRESSES] == [[], []]


def test_a_broker_that_was_refused_does_not_sign_off_the_one_that_has_its_name(world: World) -> None:
    world.network.run_for(4_000)
    second = world.register("tcp://127.0.0.1:20911")
    world.network.run_for(2_000)
    second.close()
    world.network.run_for(100)
    assert [world.brokers_known(address) for address in ADDRESSES] == [["broker-a"], ["broker-a"]]


def test_a_broker_that_hung_does_not_sign_off_the_one_that_took_its_place(world: World) -> None:
    """It has heard of no refusal yet when it stops."""
    world.network.run_for(4_000)
    world.registration._timer.cancel()  # it hangs: connected, and without a heartbeat
    second = world.register("tcp://127.0.0.1:20911", loop=world.network.loop("second"), store_id="two")
    world.network.run_until(lambda: second.registered_count == 2)
    world.registration.close()
    world.network.run_for(100)
    assert [world.brokers_known(address) for address in ADDRESSES] == [["broker-a"], ["broker-a"]]
