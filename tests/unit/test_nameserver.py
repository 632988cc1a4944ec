"""zrmq/nameserver.py: the NameServer over real sockets, as programs start and stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from zrmq.client.instance import ClientInstance, RouteView
from zrmq.client.link import Identity, Link
from zrmq.client.registration import Registration
from zrmq.client.runtime import ClientThread
from zrmq.config import NameServerConfig
from zrmq.errors import AddressInUseError, ClosedError, ConfigError
from zrmq.nameserver import NameServer
from zrmq.protocol.requests import AnyReply, BrokerInfo, TopicRoute


class Watcher:
    """A client that waits for routes."""

    def __init__(self, thread: ClientThread, nameservers: list[str], client_id: str = "watcher") -> None:
        self.thread = thread
        self.changed = threading.Condition()
        self.route: RouteView | None = None
        self.route_count = 0
        identity = Identity(client_id, "consumer")
        self.instance = thread.call(
            lambda: ClientInstance(thread.loop, nameservers, identity, Random(client_id), self)
        )
        thread.at_close(self.instance.close)
        thread.call(lambda: self.instance.want_topics(["meters"]))

    def on_route(self, route: RouteView) -> None:
        with self.changed:
            self.route = route
            self.route_count += 1
            self.changed.notify_all()

    def on_link_open(self, broker_name: str, link: Link) -> None: ...
    def on_link_lost(self, broker_name: str, link: Link) -> None: ...
    def on_notice(self, broker_name: str, link: Link, notice: AnyReply) -> None: ...

    def wait(self, queue_count: int) -> None:
        """Until the topic has so many queues."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: self.route is not None and len(self.route.queues("meters")) == queue_count, timeout=40
            )


@pytest.fixture
def thread() -> Iterator[ClientThread]:
    made = ClientThread("zrmq-test")
    yield made
    made.close()


def register(thread: ClientThread, nameservers: list[str], name: str, topics: dict[str, int]) -> Registration:
    info = BrokerInfo("east", name, 0, "MASTER", 1, "tcp://127.0.0.1:1", "")

    def listed() -> Any:
        return len(topics), lambda: [TopicRoute(topic, name, count, 6) for topic, count in topics.items()]

    return thread.call(lambda: Registration(thread.loop, nameservers, info, listed, Random(name)))


def test_routes_pass_from_a_broker_to_a_client_over_tcp(thread: ClientThread) -> None:
    with NameServer(nameserver_port=0, start_grace_ms=0) as nameserver:
        assert nameserver.address.startswith("tcp://127.0.0.1:")
        watcher = Watcher(thread, [nameserver.address])
        topics = {"meters": 4}
        registration = register(thread, [nameserver.address], "a", topics)
        watcher.wait(4)
        thread.call(registration.close)
        watcher.wait(0)


def test_one_of_two_nameservers_dies_and_returns_and_nobody_is_disturbed(thread: ClientThread) -> None:
    patience = {"suspect_after_ms": 30_000, "gone_after_ms": 60_000}
    first, second = (NameServer(nameserver_port=0, **patience) for _ in range(2))
    first.start()
    second.start()
    addresses = [first.address, second.address]
    register(thread, addresses, "a", {"meters": 4})
    watchers = [Watcher(thread, addresses, f"client{number}") for number in range(4)]
    for watcher in watchers:
        watcher.wait(4)
    counts = [watcher.route_count for watcher in watchers]
    first.stop()
    again = NameServer(nameserver_port=int(addresses[0].rpartition(":")[2]), **patience)
    again.start()
    other = register(thread, addresses, "b", {"meters": 1})
    for watcher in watchers:
        watcher.wait(5)
    assert [watcher.route_count for watcher in watchers] == [count + 1 for count in counts]
    thread.call(other.close)
    for watcher in watchers:
        watcher.wait(4)
    again.stop()
    second.stop()


def test_a_port_has_one_nameserver() -> None:
    with NameServer(nameserver_port=0) as nameserver:
        port = int(nameserver.address.rpartition(":")[2])
        second = NameServer(nameserver_port=port)
        with pytest.raises(AddressInUseError):
            second.start()
        second.stop()


def test_options_are_checked_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="insecure"):
        NameServer(host="0.0.0.0")
    with pytest.raises(ConfigError, match="did you mean nameserver_port"):
        NameServer(nameserver_prt=1)
    assert NameServer(NameServerConfig(nameserver_port=0))._role is not None


def test_before_the_start_there_is_no_address_and_stopping_does_nothing() -> None:
    nameserver = NameServer(nameserver_port=0)
    with pytest.raises(ClosedError, match="start it first"):
        _ = nameserver.address
    nameserver.stop()


def test_stopping_twice_and_starting_again() -> None:
    nameserver = NameServer(nameserver_port=0)
    nameserver.start()
    nameserver.stop()
    nameserver.stop()
    with pytest.raises(ClosedError):
        nameserver.start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ends_at_a_signal(number: signal.Signals) -> None:
    program = (
        "import zrmq\n"
        "nameserver = zrmq.NameServer(nameserver_port=0)\n"
        "nameserver.run(lambda: print(nameserver.address, flush=True))\n"
        "print('ended')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("tcp://127.0.0.1:")
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=40)
        assert (process.returncode, out) == (0, "ended\n")
    finally:
        process.kill()
        process.wait()
