"""zrmq/client/instance.py, route_watch.py and waiting.py: routes, failover, links and topics on a virtual network."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.unit.cluster import Cluster
from zrmq.client import route_watch
from zrmq.client.instance import ClientInstance, RouteView
from zrmq.client.link import Identity, Link
from zrmq.errors import (
    ClosedError,
    Code,
    InvalidArgumentError,
    NotReadyError,
    RequestTimeoutError,
    TopicNotFoundError,
    UnreachableError,
    ZrmqError,
)
from zrmq.message import MessageQueue
from zrmq.protocol.requests import Alive, AnyReply, BrokerInfo, DescribeBroker, GroupChanged, Hello, Route, TopicRoute

PENDING = object()


class Client:
    """An instance and what it told."""

    def __init__(self, cluster: Cluster, name: str = "client", seed: int = 1, nameservers: list[str] | None = None) -> None:
        self.network = cluster.network
        self.events: list[tuple[str, ...]] = []
        self.routes: list[RouteView] = []
        self.loop = self.network.loop(name)
        identity = Identity(name, "producer")
        self.instance = ClientInstance(self.loop, nameservers or cluster.nameservers, identity, Random(seed), self)

    def on_route(self, route: RouteView) -> None:
        assert route is self.instance.route
        self.routes.append(route)

    def on_link_open(self, broker_name: str, link: Link) -> None:
        self.events.append(("open", broker_name))

    def on_link_lost(self, broker_name: str, link: Link) -> None:
        self.events.append(("lost", broker_name))

    def on_notice(self, broker_name: str, link: Link, notice: AnyReply) -> None:
        if not isinstance(notice, Alive):  # one a second, as long as all is well
            self.events.append(("notice", broker_name, type(notice).__name__))

    def queues(self, topic: str) -> list[tuple[str, int]]:
        """Broker name and id of each queue that the route has."""
        return [(q.broker_name, q.queue_id) for q in self.instance.route.queues(topic)] if self.instance.route else []

    def wait(self, call: Callable[..., None], *args: Any, timeout_ms: int = 5_000) -> ZrmqError | None:
        """Run until `call` says it is done, and return what it said."""
        outcomes: list[ZrmqError | None] = []
        call(*args, on_done=outcomes.append, timeout_ms=timeout_ms)
        assert outcomes == [], "never inside the call"
        self.network.run_until(lambda: bool(outcomes), limit_ms=timeout_ms + 1)
        self.network.run_for(100)
        assert len(outcomes) == 1
        return outcomes[0]

    @property
    def nameserver(self) -> str:
        return self.instance._watch.address


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


# --- the view -------------------------------------------------------------------------------------------------------


def broker(name: str, broker_id: int = 0, suspect: bool = False) -> BrokerInfo:
    return BrokerInfo("east", name, broker_id, "SLAVE" if broker_id else "MASTER", 1, f"tcp://{name}{broker_id}:1", "", suspect)


def view(brokers: list[BrokerInfo], *topics: TopicRoute) -> RouteView:
    return RouteView(Route(1, 7, brokers, list(topics)))


def test_a_view_lists_queues_of_all_masters_sorted() -> None:
    found = view([broker("b"), broker("a"), broker("a", 1)], TopicRoute("t", "b", 1, 6), TopicRoute("t", "a", 2, 6))
    assert found.version == 7
    assert {name: info.broker_id for name, info in found.brokers.items()} == {"a": 0, "b": 0}
    assert found.queues("t") == [MessageQueue("t", "a", 0), MessageQueue("t", "a", 1), MessageQueue("t", "b", 0)]
    assert found.topics == ["t"]
    assert found.queues("none") == found.writable_queues("none") == []


def test_writable_queues_leave_out_suspects_while_there_are_others() -> None:
    topics = [TopicRoute("t", "a", 1, 6), TopicRoute("t", "b", 1, 6), TopicRoute("t", "c", 1, 4)]
    with_another = view([broker("a", suspect=True), broker("b"), broker("c")], *topics)
    assert with_another.writable_queues("t") == [MessageQueue("t", "b", 0)]
    assert view([broker("a", suspect=True), broker("c")], *topics).writable_queues("t") == [MessageQueue("t", "a", 0)]
    assert view([broker("c")], *topics).writable_queues("t") == []
    assert view([broker("c")], *topics).queues("t") == [MessageQueue("t", "c", 0)]


def test_topics_of_a_broker_that_is_not_listed_are_left_out() -> None:
    assert view([broker("a")], TopicRoute("t", "ghost", 4, 6)).queues("t") == []


# --- the route ------------------------------------------------------------------------------------------------------


def test_a_route_comes_by_itself_and_changes_follow_in_milliseconds(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=2)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    assert client.instance.route is None
    cluster.network.run_until(lambda: client.instance.route is not None)
    assert client.queues("meters") == [("a", 0), ("a", 1)]
    cluster.network.run_for(100)
    a.put("meters", 3)
    cluster.network.run_until(lambda: client.queues("meters") == [("a", 0), ("a", 1), ("a", 2)], limit_ms=20)
    cluster.broker("b", meters=1)
    cluster.network.run_until(lambda: client.queues("meters")[-1] == ("b", 0), limit_ms=20)
    assert len({route.version for route in client.routes}) == len(client.routes) == 3


def test_an_unchanged_route_is_told_once_however_long(cluster: Cluster) -> None:
    cluster.broker("a", meters=2)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_for(100_000)
    assert len(client.routes) == 1
    assert client.instance.trouble is None


def test_topics_wanted_later_are_watched_too(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=1, alarms=1)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    assert client.queues("meters") == []
    client.instance.want_topics(["meters"])
    client.instance.want_topics(["alarms"])
    cluster.network.run_until(lambda: bool(client.queues("meters")) and bool(client.queues("alarms")), limit_ms=20)
    client.instance.want_topics(["new"])
    cluster.network.run_for(1_000)
    a.put("new", 1)
    cluster.network.run_until(lambda: bool(client.queues("new")), limit_ms=20)


def test_that_a_topic_does_not_exist_is_told_although_nothing_else_changed(cluster: Cluster) -> None:
    cluster.broker("a", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    told = len(client.routes)
    assert not client.instance.covers("none")
    client.instance.want_topics(["none"])
    cluster.network.run_until(lambda: len(client.routes) == told + 1, limit_ms=50)
    assert client.instance.covers("none")


def test_a_great_many_topics_are_watched_together(cluster: Cluster) -> None:
    cluster.broker("a", **{f"t{number}": 1 for number in range(1_500)})
    client = Client(cluster)
    client.instance.want_topics(f"t{number}" for number in range(1_500))
    cluster.network.run_until(lambda: bool(client.queues("t1499")))
    assert client.instance.covers("never asked for")


def test_a_topic_that_cannot_be_is_refused_at_once(cluster: Cluster) -> None:
    client = Client(cluster)
    for call in (lambda: client.instance.want_topics(["a b"]), lambda: client.instance.ensure_topic("", lambda _: None, 1)):
        with pytest.raises(InvalidArgumentError):
            call()


# --- NameServers that fail ------------------------------------------------------------------------------------------


def test_clients_begin_at_different_nameservers_and_stay_there() -> None:
    cluster = Cluster(3)
    cluster.broker("a", meters=1)
    clients = [Client(cluster, f"client{seed}", seed) for seed in range(12)]
    first = [client.nameserver for client in clients]
    assert set(first) == set(cluster.nameservers)
    cluster.network.run_for(90_000)
    assert [client.nameserver for client in clients] == first


@pytest.mark.parametrize("seed", range(8))
def test_a_nameserver_dies_and_returns_and_nobody_is_disturbed(seed: int) -> None:
    cluster = Cluster(2, seed)
    cluster.broker("a", meters=2)
    b = cluster.broker("b", meters=2)
    client = Client(cluster, seed=seed)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    links = [client.instance.link("a"), client.instance.link("b")]
    cluster.network.run_until(lambda: all(link is not None and link.is_open for link in links))
    cluster.network.run_for(100)
    for _ in range(2):
        victim = cluster.nameservers.index(client.nameserver)
        cluster.kill_nameserver(victim)
        cluster.network.run_for(4_000)
        assert client.nameserver != cluster.nameservers[victim]
        cluster.start_nameserver(victim)
        cluster.network.run_for(200)
        cluster.kill_nameserver(1 - victim)
        cluster.network.run_for(8_000)
        assert client.nameserver == cluster.nameservers[victim]
        cluster.start_nameserver(1 - victim)
        cluster.network.run_for(8_000)
    assert len(client.routes) == 1, "the route never changed"
    assert sorted(client.events) == [("open", "a"), ("open", "b")], "no link was touched"
    b.put("meters", 3)
    cluster.network.run_until(lambda: ("b", 2) in client.queues("meters"), limit_ms=50)


def test_failover_takes_milliseconds_when_the_connection_breaks() -> None:
    cluster = Cluster(2)
    a = cluster.broker("a", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.kill_nameserver(cluster.nameservers.index(client.nameserver))
    a.put("meters", 2)
    cluster.network.run_until(lambda: len(client.queues("meters")) == 2, limit_ms=100)


def test_a_nameserver_that_was_never_there_is_passed_over() -> None:
    cluster = Cluster(2)
    cluster.broker("a", meters=1)
    cluster.kill_nameserver(0)
    for seed in range(6):
        client = Client(cluster, f"client{seed}", seed)
        client.instance.want_topics(["meters"])
        cluster.network.run_until(lambda client=client: bool(client.queues("meters")), limit_ms=1_000)  # type: ignore[misc]


def test_a_nameserver_that_stands_still_is_left() -> None:
    cluster = Cluster(2)
    a = cluster.broker("a", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    frozen = cluster.nameservers.index(client.nameserver)
    cluster.network.run_for(100)
    cluster.network.loops[f"n{frozen}"].pause()
    a.put("meters", 2)
    cluster.network.run_until(lambda: len(client.queues("meters")) == 2, limit_ms=15_000)
    assert client.nameserver == cluster.nameservers[1 - frozen]


def connected(cluster: Cluster, count: int) -> list[Client]:
    """Clients that watch `meters` and have a session with each broker."""
    clients = [Client(cluster, f"client{seed}", seed) for seed in range(count)]
    for client in clients:
        client.instance.want_topics(["meters"])
        cluster.network.run_until(lambda client=client: bool(client.queues("meters")))  # type: ignore[misc]
        for name in client.instance.route.brokers if client.instance.route is not None else ():
            client.instance.link(name)
    cluster.network.run_for(100)
    return clients


def test_a_nameserver_that_is_cut_off_from_the_brokers_takes_no_client_with_it() -> None:
    cluster = Cluster(2)
    brokers = [cluster.broker(name, meters=1) for name in "ab"]
    clients = connected(cluster, 6)
    for broker in brokers:
        cluster.network.cut("n0", broker.name)
    cluster.network.run_for(60_000)
    assert {client.nameserver for client in clients} == {cluster.nameservers[1]}
    late = [Client(cluster, f"late{seed}", seed) for seed in range(6)]
    assert cluster.nameservers[0] in {client.nameserver for client in late}
    for client in [*clients, *late]:
        client.instance.want_topics(["meters"])
        cluster.network.run_until(lambda client=client: len(client.queues("meters")) == 2, limit_ms=1_000)  # type: ignore[misc]
    assert [sorted(client.events) for client in clients] == [[("open", "a"), ("open", "b")]] * 6


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("leaves_one_nameserver", [False, True])
def test_that_all_brokers_are_gone_is_noticed_and_that_one_comes_back_too(count: int, leaves_one_nameserver: bool) -> None:
    cluster = Cluster(count)
    brokers = [cluster.broker(name, meters=1) for name in "ab"]
    clients = connected(cluster, 4)
    for number in range(1, count if leaves_one_nameserver else 0):
        cluster.kill_nameserver(number)
    for broker in brokers:
        broker.kill()
    cluster.network.run_until(lambda: not any(client.queues("meters") for client in clients), limit_ms=25_000)
    cluster.network.run_for(60_000)
    for client in clients:
        assert client.instance._links == {}
        outcome: list[Any] = []
        client.instance.await_broker(outcome.append, 1)
        cluster.network.run_until(lambda outcome=outcome: bool(outcome))  # type: ignore[misc]
        assert isinstance(outcome[0], UnreachableError)
    cluster.broker("c", meters=3)
    cluster.network.run_until(lambda: all(len(client.queues("meters")) == 3 for client in clients), limit_ms=12_000)


def test_brokers_that_we_talk_to_are_kept_while_nobody_else_can_be_asked() -> None:
    cluster = Cluster(2)
    a = cluster.broker("a", meters=1)
    clients = connected(cluster, 4)
    cluster.kill_nameserver(1)
    cluster.network.cut("n0", "a")
    cluster.network.run_for(60_000)
    assert [client.events for client in clients] == [[("open", "a")]] * 4
    assert all(isinstance(client.instance.trouble, UnreachableError) for client in clients)
    a.kill()
    cluster.network.run_until(lambda: not any(client.queues("meters") for client in clients), limit_ms=25_000)
    assert all(client.instance.trouble is None for client in clients)


def test_while_all_nameservers_are_down_the_last_route_stays_and_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(2)
    cluster.broker("a", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    link = client.instance.link("a")
    assert link is not None
    cluster.network.run_until(lambda: link.is_open)
    cluster.kill_nameserver(0)
    cluster.kill_nameserver(1)
    cluster.network.run_for(120_000)
    assert client.queues("meters") == [("a", 0)]
    assert client.instance.link("a") is link
    assert link.is_open
    assert isinstance(client.instance.trouble, UnreachableError)
    assert capsys.readouterr().err.count("nameservers_failed") == 1
    cluster.start_nameserver(1)
    cluster.network.run_until(lambda: client.instance.trouble is None, limit_ms=12_000)
    cluster.network.run_for(60_000)
    assert len(client.routes) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_attempts_at_dead_nameservers_become_rare(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(count)
    for number in range(count):
        cluster.kill_nameserver(number)
    client = Client(cluster)
    failures: list[float] = []
    fail = client.instance._watch._fail

    def count_failure(error: ZrmqError) -> None:
        failures.append(cluster.network.now_ms)
        fail(error)

    monkeypatch.setattr(client.instance._watch, "_fail", count_failure)
    cluster.network.run_for(5_000)
    assert len(failures) >= count, "everybody was tried"
    del failures[:]
    cluster.network.run_for(60_000)
    assert 4 <= len(failures) <= 16 * count


def test_nameservers_that_answer_nothing_are_named_with_what_to_do(cluster: Cluster) -> None:
    client = Client(cluster, nameservers=["tcp://x:1", "tcp://y:2"])
    error = client.wait(client.instance.await_route, timeout_ms=3_000)
    assert isinstance(error, UnreachableError)
    assert "tcp://x:1, tcp://y:2" in error.message
    assert "zrmq up" in error.message
    assert error.facts["addresses"] == ("tcp://x:1", "tcp://y:2")


@pytest.mark.parametrize("seed", range(6))
def test_an_address_that_cannot_be_one_is_refused_whichever_is_drawn(cluster: Cluster, seed: int) -> None:
    with pytest.raises(InvalidArgumentError, match="Nobody can connect to"):
        Client(cluster, seed=seed, nameservers=["tcp://x:1", "tcp://*:9876"])


def test_what_a_nameserver_refuses_a_session_for_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zrmq.client.link.PROTOCOL_VERSION", 99)
    client = Client(cluster)
    error = client.wait(client.instance.await_route, timeout_ms=3_000)
    assert error is not None
    assert error.code is Code.VERSION_UNSUPPORTED


def test_a_server_that_is_no_nameserver_is_told(cluster: Cluster) -> None:
    a = cluster.broker("a")
    client = Client(cluster, nameservers=[a.endpoint.address])
    error = client.wait(client.instance.await_route, timeout_ms=5_000)
    assert error is not None, "it never answers QueryRoute"


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happened_in_the_end_the_route_is_right_and_all_links_are_open(seed: int) -> None:
    """NameServers and connections fail at random for a minute; then all is well again, and everybody knows it."""
    rng = Random(seed)
    cluster = Cluster(rng.choice([1, 2, 3]), seed)
    network = cluster.network
    brokers = [cluster.broker(name, meters=2) for name in ("a", "b")]
    clients = [Client(cluster, f"client{number}", seed + number) for number in range(2)]
    for client in clients:
        client.instance.want_topics(["meters"])
    outcomes: list[Any] = []
    asked = 0
    for step in range(rng.randrange(5, 25)):
        number = rng.randrange(len(cluster.nameservers))
        pair = rng.choice(["client0", "client1", "a", "b"]), f"n{number}"
        match rng.randrange(7):
            case 0 if pair[1] in network.loops:
                cluster.kill_nameserver(number)
            case 1 if pair[1] not in network.loops:
                cluster.start_nameserver(number)
            case 2:
                network.cut(*pair, one_way=rng.random() < 0.3)
            case 3:
                network.break_connections(*pair)
            case 4:
                network.half_open(*pair)
            case 5:
                network.heal(*pair)
            case 6:
                rng.choice(brokers).put("meters", 2 + step)
                asked += 1
                clients[0].instance.ensure_topic(f"t{step}", outcomes.append, 20_000)
        for client in clients:
            client.instance.link(rng.choice("ab"))
        network.run_for(rng.uniform(10, 5_000))
    for number in range(len(cluster.nameservers)):
        if f"n{number}" not in network.loops:
            cluster.start_nameserver(number)
        for name in ("client0", "client1", "a", "b"):
            network.heal(name, f"n{number}")
    network.run_for(60_000)
    truth = [("a", number) for number in range(brokers[0].topics["meters"])]
    truth += [("b", number) for number in range(brokers[1].topics["meters"])]
    for client in clients:
        assert client.queues("meters") == truth
        assert client.instance.trouble is None
        for name in ("a", "b"):
            client.instance.link(name)
    network.run_for(2_000)
    assert all(client.instance.link(name).is_open for client in clients for name in ("a", "b"))  # type: ignore[union-attr]
    assert len(outcomes) == asked, "each call was answered once"


# --- waiting for a route --------------------------------------------------------------------------------------------


def test_await_route_ends_with_the_first_answer(cluster: Cluster) -> None:
    client = Client(cluster)
    assert client.wait(client.instance.await_route) is None
    assert client.instance.route is not None
    assert client.wait(client.instance.await_route) is None


def test_await_route_of_a_topic_ends_when_it_appears(cluster: Cluster) -> None:
    a = cluster.broker("a")
    client = Client(cluster)
    cluster.network.schedule(None, 2_000, lambda: a.put("meters", 1))
    before_ms = cluster.network.now_ms
    assert client.wait(lambda **kwargs: client.instance.await_route(topic="meters", **kwargs)) is None
    assert 2_000 <= cluster.network.now_ms - before_ms < 2_300


def test_a_topic_that_does_not_appear_is_said_not_to_exist(cluster: Cluster) -> None:
    cluster.broker("a")
    client = Client(cluster)
    error = client.wait(lambda **kwargs: client.instance.await_route(topic="meters", **kwargs), timeout_ms=1_000)
    assert isinstance(error, TopicNotFoundError)
    assert "zrmq topic create meters" in error.message


def test_a_nameserver_in_its_grace_is_waited_for_and_told_of(cluster: Cluster) -> None:
    cluster.kill_nameserver(0)
    cluster.start_nameserver(0)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    error = client.wait(client.instance.await_route, timeout_ms=1_000)
    assert isinstance(error, NotReadyError)
    assert client.wait(client.instance.await_route, timeout_ms=4_000) is None


def test_a_broker_is_waited_for(cluster: Cluster) -> None:
    client = Client(cluster)
    assert client.wait(client.instance.await_route) is None, "an answer without brokers is one"
    cluster.network.schedule(None, 2_000, lambda: cluster.broker("a"))
    before_ms = cluster.network.now_ms
    assert client.wait(client.instance.await_broker) is None
    assert 2_000 <= cluster.network.now_ms - before_ms < 3_300, "routes without brokers are asked for each second"
    assert client.wait(client.instance.await_broker) is None


def test_a_broker_that_does_not_come_is_told_of(cluster: Cluster) -> None:
    client = Client(cluster)
    error = client.wait(client.instance.await_broker, timeout_ms=1_000)
    assert isinstance(error, UnreachableError)
    assert "knows no broker" in error.message
    nobody = Client(cluster, "lost", nameservers=["tcp://x:1"])
    error = nobody.wait(nobody.instance.await_broker, timeout_ms=1_000)
    assert error is not None
    assert "knows no broker" not in error.message


def test_a_hung_nameserver_is_no_answer(cluster: Cluster) -> None:
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance._watch._link.is_open)
    cluster.network.loops["n0"].pause()
    error = client.wait(client.instance.await_route, timeout_ms=1_000)
    assert isinstance(error, RequestTimeoutError | UnreachableError)


# --- creating topics ------------------------------------------------------------------------------------------------


def test_a_topic_that_exists_is_not_created_again(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=2)
    client = Client(cluster)
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert a.creations == []
    assert client.queues("meters") == [("a", 0), ("a", 1)]


def test_a_missing_topic_is_created_at_every_master(cluster: Cluster) -> None:
    brokers = [cluster.broker("a", queue_count=1), cluster.broker("b", queue_count=2)]
    client = Client(cluster)
    started_ms = cluster.network.now_ms
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert cluster.network.now_ms - started_ms < 200
    assert client.queues("meters") == [("a", 0), ("b", 0), ("b", 1)]
    for made in brokers:
        (creation,) = made.creations
        assert (creation.config.topic, creation.create_only, creation.auto_create) == ("meters", True, True)


def test_one_broker_that_creates_the_topic_is_enough(cluster: Cluster) -> None:
    cluster.broker("a", auto_create=False)
    cluster.broker("b", queue_count=1)
    client = Client(cluster)
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert client.queues("meters") == [("b", 0)]


def test_where_no_broker_creates_topics_the_error_says_how_to(cluster: Cluster) -> None:
    cluster.broker("a", auto_create=False)
    cluster.broker("b", auto_create=False)
    client = Client(cluster)
    started_ms = cluster.network.now_ms
    error = client.wait(client.instance.ensure_topic, "meters", timeout_ms=30_000)
    assert cluster.network.now_ms - started_ms < 200, "nobody waits for a no"
    assert isinstance(error, TopicNotFoundError)
    assert error.code is Code.TOPIC_NOT_FOUND
    assert "zrmq topic create meters" in error.message
    assert error.facts["brokers"] == ["a", "b"]


def test_another_refusal_is_handed_on(cluster: Cluster) -> None:
    cluster.broker("a", auto_create=False)
    cluster.broker("b").refuse_with = Code.DISK_FULL
    client = Client(cluster)
    error = client.wait(client.instance.ensure_topic, "meters")
    assert error is not None
    assert error.code is Code.DISK_FULL


def test_a_broker_that_hangs_delays_nobody_who_has_another(cluster: Cluster) -> None:
    cluster.broker("a")
    cluster.broker("b")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    started_ms = cluster.network.now_ms
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert cluster.network.now_ms - started_ms < 200
    cluster.network.loops["a"].resume()
    cluster.network.run_until(lambda: ("a", 0) in client.queues("meters"), limit_ms=5_000)


def test_a_topic_that_is_created_is_settled_when_all_that_were_asked_show_it(cluster: Cluster) -> None:
    for name in "abc":
        cluster.broker(name, queue_count=1)
    cluster.broker("never", auto_create=False)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    started_ms = cluster.network.now_ms
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert ("a", 0) not in client.queues("meters")
    assert client.instance.is_settling("meters")
    cluster.network.loop("later").call_later(300, cluster.network.loops["a"].resume)
    assert client.wait(lambda **kwargs: client.instance.ensure_topic("meters", everywhere=True, **kwargs)) is None
    assert client.queues("meters") == [("a", 0), ("b", 0), ("c", 0)]
    assert not client.instance.is_settling("meters")
    assert 300 < cluster.network.now_ms - started_ms < 1_000


def test_a_topic_settles_within_a_second_whoever_hangs(cluster: Cluster) -> None:
    cluster.broker("a")
    cluster.broker("b")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    error = client.wait(lambda **kwargs: client.instance.ensure_topic("meters", everywhere=True, **kwargs), timeout_ms=500)
    assert isinstance(error, RequestTimeoutError)
    assert error.facts["brokers"] == ["a"], "the one that is waited for"
    started_ms = cluster.network.now_ms
    assert client.wait(lambda **kwargs: client.instance.ensure_topic("meters", everywhere=True, **kwargs)) is None
    assert cluster.network.now_ms - started_ms < 700
    assert {name for name, _ in client.queues("meters")} == {"b"}


def test_a_broker_that_refuses_late_is_not_waited_for(cluster: Cluster) -> None:
    a = cluster.broker("a")
    cluster.broker("b")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    assert client.wait(client.instance.ensure_topic, "meters") is None
    assert client.instance.is_settling("meters")
    cluster.network.loops["a"].resume()
    a.refuse_with = Code.DISK_FULL
    cluster.network.run_until(lambda: not client.instance.is_settling("meters"), limit_ms=500)


def test_a_broker_that_hangs_alone_is_named_at_the_deadline(cluster: Cluster) -> None:
    cluster.broker("a")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    error = client.wait(client.instance.ensure_topic, "meters", timeout_ms=1_000)
    assert isinstance(error, RequestTimeoutError)
    assert "a" in error.message


def test_without_a_broker_the_error_says_to_start_one(cluster: Cluster) -> None:
    client = Client(cluster)
    error = client.wait(client.instance.ensure_topic, "meters", timeout_ms=1_000)
    assert isinstance(error, UnreachableError)
    assert "zrmq broker" in error.message
    assert error.facts["nameservers"] == ("tcp://n0:9876",)


def test_a_broker_that_comes_in_time_is_used(cluster: Cluster) -> None:
    client = Client(cluster)
    outcomes: list[Any] = []
    client.instance.ensure_topic("meters", outcomes.append, 10_000)
    cluster.network.run_for(1_000)
    assert outcomes == []
    cluster.broker("a", queue_count=1)
    cluster.network.run_until(lambda: outcomes == [None], limit_ms=2_000)
    assert client.queues("meters") == [("a", 0)]


def test_a_broker_that_restarts_meanwhile_is_asked_again(cluster: Cluster) -> None:
    first = cluster.broker("a")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    first.refuse_with = None
    cluster.network.cut("client", "a")
    outcomes: list[Any] = []
    client.instance.ensure_topic("meters", outcomes.append, 30_000)
    cluster.network.run_for(500)
    first.registration.close()
    cluster.network.run_for(100)
    first.kill()
    assert outcomes == []
    cluster.network.heal("client", "a")
    cluster.broker("a", epoch=2, address="tcp://a:7777", queue_count=1)
    cluster.network.run_until(lambda: outcomes == [None], limit_ms=5_000)


# --- links ----------------------------------------------------------------------------------------------------------


def test_a_link_is_made_on_demand_and_once(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=1)
    client = Client(cluster)
    assert client.instance.link("a") is None
    cluster.network.run_until(lambda: client.instance.route is not None)
    assert client.instance.link("ghost") is None
    assert a.client_ids == {}
    link = client.instance.link("a")
    assert link is not None
    assert client.instance.link("a") is link
    cluster.network.run_until(lambda: client.events == [("open", "a")])
    assert list(a.client_ids.values()) == ["client"]


def test_notices_are_handed_on_with_the_brokers_name(cluster: Cluster) -> None:
    a = cluster.broker("a")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    client.instance.link("a")
    cluster.network.run_until(lambda: bool(a.client_ids))
    a.send(next(iter(a.client_ids)), GroupChanged(0, "g", 1, []))
    cluster.network.run_until(lambda: ("notice", "a", "GroupChanged") in client.events)


def test_a_broker_that_left_the_route_loses_its_link(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=1)
    cluster.broker("b", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    link = client.instance.link("a")
    assert link is not None
    cluster.network.run_until(lambda: link.is_open)
    outcomes: list[Any] = []
    link.request(DescribeBroker, timeout_ms=60_000, on_reply=lambda reply, frames: outcomes.append(reply))
    a.registration.close()
    cluster.network.run_until(lambda: client.queues("meters") == [("b", 0)], limit_ms=100)
    assert client.events == [("open", "a"), ("lost", "a")]
    assert [type(outcome) for outcome in outcomes] == [ClosedError]
    assert client.instance.link("a") is None
    cluster.network.run_for(1_000)
    assert list(a.client_ids.values()) == ["client"], "it may be there, and keep what we have of it"


def test_a_broker_that_was_taken_out_of_the_route_in_error_is_used_again(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=1)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    for times in (1, 2, 3):
        link = client.instance.link("a")
        assert link is not None
        cluster.network.run_until(lambda: link.is_open, limit_ms=1_000)  # noqa: B023 - it is run here
        a.registration.close()
        cluster.network.run_until(lambda: client.instance.link("a") is None, limit_ms=100)
        client.loop.clock.step(-60_000)
        a.registration = a.register()
        cluster.network.run_until(lambda: client.instance.link("a") is not None, limit_ms=1_000)
        epochs = [request.session_epoch for request in a.heard if isinstance(request, Hello)]
        assert len(epochs) == times
    assert epochs == sorted(set(epochs)), "or the broker would refuse them while it keeps the session"


def test_a_broker_at_another_address_gets_a_new_link_by_itself(cluster: Cluster) -> None:
    first = cluster.broker("a", meters=1)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    old = client.instance.link("a")
    assert old is not None
    cluster.network.run_until(lambda: old.is_open)
    first.kill()
    cluster.network.run_for(10)
    second = cluster.broker("a", epoch=2, address="tcp://a:7777", meters=1)
    cluster.network.run_until(lambda: bool(second.client_ids), limit_ms=1_000)
    new = client.instance.link("a")
    assert new is not None
    assert new is not old
    assert new.address == "tcp://a:7777"
    cluster.network.run_until(lambda: new.is_open)
    assert client.events == [("open", "a"), ("lost", "a"), ("open", "a")]


def test_a_broker_restarted_at_its_address_keeps_the_link_and_what_it_owes(cluster: Cluster) -> None:
    first = cluster.broker("a", meters=1)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    link = client.instance.link("a")
    assert link is not None
    cluster.network.run_until(lambda: link.is_open)
    cluster.network.run_for(10)
    first.kill()
    cluster.network.run_for(10)
    outcomes: list[Any] = []
    link.request(DescribeBroker, timeout_ms=60_000, on_reply=lambda reply, frames: outcomes.append(reply))
    second = cluster.broker("a", epoch=2, meters=1)
    cluster.network.run_until(lambda: link.is_open)
    cluster.network.run_for(100)
    assert client.instance.route is not None
    assert client.instance.route.brokers["a"].epoch == 2
    assert client.instance.link("a") is link
    assert any(isinstance(request, DescribeBroker) for request in second.heard)
    assert outcomes == []
    assert client.events == [("open", "a"), ("lost", "a"), ("open", "a")]


def test_a_silent_broker_is_suspect_then_gone_for_the_client(cluster: Cluster) -> None:
    cluster.broker("a", meters=1)
    cluster.broker("b", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.network.loops["a"].pause()
    of_b = [MessageQueue("meters", "b", 0)]
    cluster.network.run_until(lambda: client.routes[-1].writable_queues("meters") == of_b, limit_ms=4_500)
    assert client.queues("meters") == [("a", 0), ("b", 0)]
    cluster.network.run_until(lambda: client.queues("meters") == [("b", 0)], limit_ms=8_000)


# --- the end --------------------------------------------------------------------------------------------------------


def test_close_ends_what_waits_and_tells_the_servers(cluster: Cluster) -> None:
    a = cluster.broker("a")
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    client.instance.link("a")
    cluster.network.run_until(lambda: client.events == [("open", "a")])
    outcomes: list[Any] = []
    client.instance.await_route(outcomes.append, 60_000, topic="never")
    closed: list[bool] = []
    client.instance.close(lambda: closed.append(True))
    client.instance.close(lambda: closed.append(False))
    assert [type(outcome) for outcome in outcomes] == [ClosedError]
    assert closed == []
    cluster.network.run_until(lambda: closed == [True, False], limit_ms=600)
    client.instance.close(lambda: closed.append(True))
    assert closed == [True, False, True], "who closes it later has nothing to wait for"
    assert a.client_ids == {}
    assert client.instance.link("a") is None
    with pytest.raises(ClosedError):
        client.instance.ensure_topic("meters", outcomes.append, 1_000)
    cluster.network.run_for(60_000)
    assert len(outcomes) == 1


def test_close_does_not_wait_for_servers_that_are_gone() -> None:
    cluster = Cluster(2)
    client = Client(cluster)
    cluster.network.run_until(lambda: client.instance.route is not None)
    cluster.kill_nameserver(0)
    cluster.kill_nameserver(1)
    closed: list[bool] = []
    client.instance.close(lambda: closed.append(True))
    cluster.network.run_until(lambda: closed == [True], limit_ms=600)


def test_an_answer_storm_is_slowed_down(cluster: Cluster) -> None:
    a = cluster.broker("a", meters=1)
    client = Client(cluster)
    client.instance.want_topics(["meters"])
    cluster.network.run_until(lambda: client.instance.route is not None)
    before = len(client.routes)
    for count in range(200):
        a.put("meters", 1 + count % 7)
        cluster.network.run_for(1)
    assert len(client.routes) - before < 200 / (route_watch.AGAIN_MS / 2)
    cluster.network.run_until(lambda: len(client.queues("meters")) == 1 + 199 % 7, limit_ms=50)
