"""The admin client, over a real NameServer and two brokers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

import zrmq
from tests.unit.real_cluster import running_cluster
from zrmq.client.admin import Admin
from zrmq.errors import (
    ClosedError,
    Code,
    ConfigError,
    ConsumerGroupNotFoundError,
    InvalidArgumentError,
    RequestRefusedError,
    TopicNotFoundError,
    UnreachableError,
    ZrmqError,
)
from zrmq.message import FlushMode
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import DeleteTopic, PutTopic
from zrmq.serving.topics import TopicDesk
from zrmq.transport.sessions import Session


@pytest.fixture(scope="module")
def nameservers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), ("broker-a", "broker-b")) as address:
        yield address


@pytest.fixture
def admin(nameservers: str) -> Iterator[Admin]:
    with Admin(nameservers) as admin:
        yield admin


@pytest.mark.parametrize("timeout_ms", [0, -1, 1.5, float("inf"), 10**30, None, "x", True])
def test_a_time_that_cannot_be_waited_is_refused(timeout_ms: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_ms is .*; give a whole number from 1 to"):
        Admin("127.0.0.1:1", timeout_ms=timeout_ms)


# --- brokers ------------------------------------------------------------------------------------------------------------


def test_the_cluster_is_its_brokers(admin: Admin) -> None:
    assert [(broker.broker_name, broker.broker_id, broker.suspect) for broker in admin.cluster()] == [
        ("broker-a", 0, False), ("broker-b", 0, False),
    ]


def test_a_broker_tells_its_state(admin: Admin) -> None:
    facts = admin.broker_state("broker-b")
    assert facts["broker_name"] == "broker-b"
    assert facts["boot"] > 0


def test_a_broker_that_does_not_exist(admin: Admin) -> None:
    with pytest.raises(RequestRefusedError, match="No live broker is named 'broker-z'") as raised:
        admin.broker_state("broker-z")
    assert raised.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("name", [["broker-a"], None, 5, b"broker-a", "", "\ud800"])
def test_what_names_no_broker(admin: Admin, name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="The broker's name"):
        admin.broker_state(name)


# --- topics -------------------------------------------------------------------------------------------------------------


def test_a_topic_lives_at_every_broker(admin: Admin) -> None:
    admin.create_topic("created", queue_count=3, flush_mode="async", retention_ms=1_000)
    expected = TopicConfig("created", 3, 6, FlushMode.ASYNC, 1_000)
    assert {name: info.config for name, info in admin.topic("created").items()} == {"broker-a": expected, "broker-b": expected}
    assert admin.topics()["created"].keys() == {"broker-a", "broker-b"}


def test_creating_is_done_when_clients_can_see_it(nameservers: str, admin: Admin) -> None:
    admin.create_topic("seen", queue_count=1)
    with Admin(nameservers) as other:
        assert other.topic("seen")


def test_creating_again_changes_nothing(admin: Admin) -> None:
    admin.create_topic("again", queue_count=2)
    admin.create_topic("again")
    admin.create_topic("again", queue_count=2)
    assert len(admin.topic("again")["broker-a"].queues) == 2


def test_creating_with_other_settings_is_refused(admin: Admin) -> None:
    admin.create_topic("other", queue_count=2)
    with pytest.raises(RequestRefusedError, match="exists at broker-a with queue_count 2"):
        admin.create_topic("other", queue_count=5)


def test_updating_changes_what_is_given(admin: Admin) -> None:
    admin.create_topic("grown", queue_count=1, retention_ms=5_000)
    admin.update_topic("grown", queue_count=4, permission=4)
    for info in admin.topic("grown").values():
        assert info.config == TopicConfig("grown", 4, 4, FlushMode.SYNC, 5_000)


def test_a_broker_says_what_cannot_be(admin: Admin) -> None:
    admin.create_topic("shrunk", queue_count=2)
    with pytest.raises(RequestRefusedError, match="cannot shrink to 1") as raised:
        admin.update_topic("shrunk", queue_count=1)
    assert raised.value.facts["broker_name"] == "broker-a"


def test_what_one_broker_refuses_the_others_do(admin: Admin) -> None:
    for broker_name, queue_count in (("broker-a", 3), ("broker-b", 1)):
        admin._change(admin._ask(PutTopic, TopicConfig("uneven", queue_count), only=[broker_name]))
    with pytest.raises(RequestRefusedError, match="cannot shrink to 2") as raised:
        admin.update_topic("uneven", queue_count=2)
    assert raised.value.facts["broker_name"] == "broker-a"
    assert {name: info.config.queue_count for name, info in admin.topic("uneven").items()} == {"broker-a": 3, "broker-b": 2}


def test_a_deleted_topic_is_gone(admin: Admin) -> None:
    admin.create_topic("deleted")
    admin.delete_topic("deleted")
    for call in (admin.topic, admin.delete_topic, admin.update_topic):
        with pytest.raises(TopicNotFoundError, match="'deleted'"):
            call("deleted")


def test_a_topic_goes_at_every_broker_though_each_has_its_own_numbers(admin: Admin) -> None:
    admin._change(admin._ask(PutTopic, TopicConfig("only-there"), only=["broker-b"]))
    admin.create_topic("numbered")
    assert len({info.topic_id for info in admin.topic("numbered").values()}) == 2
    admin.delete_topic("numbered")
    assert "numbered" not in admin.topics()
    admin.delete_topic("only-there")
    assert "only-there" not in admin.topics()


def test_a_deletion_that_is_repeated_leaves_the_topic_that_was_made_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost with the connection, somebody makes the topic anew, and the request comes again."""
    delete, asked = TopicDesk.delete, []

    def delete_twice(desk: TopicDesk, session: Session, request: DeleteTopic, frames: list[bytes]) -> None:
        asked.append(request)
        unheard = 1 << 60  # the number of no request
        delete(desk, session, msgspec.structs.replace(request, number=unheard), frames)
        desk.put(session, PutTopic(unheard, 0, TopicConfig(request.topic)), [])
        delete(desk, session, request, frames)

    monkeypatch.setattr(TopicDesk, "delete", delete_twice)
    with running_cluster(tmp_path) as nameservers, Admin(nameservers) as admin:
        admin.create_topic("meters")
        former = admin.topic("meters")["broker-a"].topic_id
        admin.delete_topic("meters")
        assert [request.topic_id for request in asked] == [former]
        assert admin.topic("meters")["broker-a"].topic_id == former + 1


IMPOSSIBLE: list[dict[str, Any]] = [
    {"queue_count": -1}, {"queue_count": "4"}, {"flush_mode": "never"}, {"retention_ms": 1.5}, {"colour": 1}, {"topic": "x"},
    {"queue_count": object()}, {"flush_mode": object()}, {"retention_bytes": "\ud800"}, {"flush_mode": "\ud800"},
]


@pytest.mark.parametrize("settings", IMPOSSIBLE)
def test_settings_that_cannot_be(admin: Admin, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(settings))):
        admin.create_topic("wrong", **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"retention_ms": "24h"}, r"retention_ms cannot be '24h'; give a whole number from 0 to \d+, or None\."),
        ({"queue_count": "4"}, r"queue_count cannot be '4'; give a whole number from 0 to \d+\."),
        ({"flush_mode": "fast"}, r"flush_mode cannot be 'fast'; give one of 'sync', 'async'\."),
    ],
)
def test_what_a_setting_may_be_is_said_in_words(admin: Admin, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence):
        admin.create_topic("wrong", **settings)


@pytest.mark.parametrize("name", ["", "a b", "m" * 128])
def test_names_that_cannot_be(admin: Admin, name: str) -> None:
    for call in (admin.topic, admin.create_topic, admin.delete_topic, admin.group):
        with pytest.raises(InvalidArgumentError):
            call(name)


# --- groups -------------------------------------------------------------------------------------------------------------


def test_no_groups_at_first(admin: Admin) -> None:
    assert admin.groups() == {}
    with pytest.raises(ConsumerGroupNotFoundError, match="'reports'"):
        admin.group("reports")


# --- when things are missing --------------------------------------------------------------------------------------------


def test_nobody_answers() -> None:
    with Admin("tcp://127.0.0.1:1", timeout_ms=1_000) as admin, pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        admin.topics()


def test_an_address_that_cannot_be() -> None:
    with pytest.raises(ConfigError):
        Admin("tcp://box:99999")


def test_a_cluster_without_brokers() -> None:
    with zrmq.NameServer(nameserver_port=0, start_grace_ms=0) as nameserver, Admin(nameserver.address) as admin:
        assert admin.cluster() == []
        with pytest.raises(UnreachableError, match="knows no broker"):
            admin.topics()


def test_a_topic_is_created_when_the_first_broker_is_there(tmp_path: Path) -> None:
    """One that listens is in the routes some moments later; who has started it need not know."""
    with (
        zrmq.NameServer(nameserver_port=0, start_grace_ms=0) as nameserver, Admin(nameserver.address) as admin,
        ThreadPoolExecutor(1) as pool,
    ):
        assert admin.cluster() == []
        created = pool.submit(admin.create_topic, "meters")
        with zrmq.Broker(tmp_path, nameservers=nameserver.address, broker_port=0, ingest_port=0):
            created.result()
            assert admin.topic("meters").keys() == {"broker-a"}


def test_a_broker_that_is_away_is_told_or_raised(tmp_path: Path) -> None:
    """The broker ends without a word to the NameServer that stays: what the others know is still listed."""
    failures: dict[str, ZrmqError] = {}
    with running_cluster(tmp_path, ("broker-a",)) as nameservers:
        with Admin(nameservers) as admin:
            admin.create_topic("meters")
        ghost = Ghost(nameservers)
        with (
            ghost, Admin(nameservers, timeout_ms=1_000, on_failure=failures.__setitem__) as tolerant,
            Admin(nameservers, timeout_ms=1_000) as strict,
        ):
            assert tolerant.topics()["meters"].keys() == {"broker-a"}
            assert failures.keys() == {"broker-ghost"}
            with pytest.raises(ZrmqError):
                strict.topics()
            with pytest.raises(ZrmqError):
                tolerant.delete_topic("meters")
            assert tolerant.broker_state("broker-a")["topics"] == 0


class Ghost:
    """A broker that is registered and never answers."""

    def __init__(self, nameservers: str) -> None:
        from random import Random

        from zrmq.client.registration import Registration
        from zrmq.client.runtime import ClientThread
        from zrmq.protocol.requests import BrokerInfo

        info = BrokerInfo("DefaultCluster", "broker-ghost", 0, "MASTER", 1, "tcp://127.0.0.1:1", "")
        self._thread = ClientThread("zrmq-ghost")
        self._registration = self._thread.call(
            lambda: Registration(self._thread.loop, [nameservers], info, lambda: (1, list), Random(1))
        )

    def __enter__(self) -> Self:
        while self._thread.call(lambda: self._registration.registered_count) == 0:
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.call(self._registration.close)
        self._thread.close()


def test_after_the_end(nameservers: str) -> None:
    admin = Admin(nameservers)
    admin.close()
    admin.close()
    with pytest.raises(ClosedError):
        admin.topics()


def test_a_call_that_is_waiting_ends_with_the_client(nameservers: str) -> None:
    admin = Admin("tcp://127.0.0.1:1", timeout_ms=30_000)
    errors: list[Exception] = []

    def ask() -> None:
        with pytest.raises(ClosedError) as raised:
            admin.topics()
        errors.append(raised.value)

    thread = threading.Thread(target=ask)
    thread.start()
    while not admin._thread.call(lambda: admin._instance._waits):
        pass
    admin.close()
    thread.join()
    assert len(errors) == 1


def test_several_threads_may_ask(nameservers: str, admin: Admin) -> None:
    admin.create_topic("shared")
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append("shared" in admin.topics())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_fabric_makes_one(nameservers: str) -> None:
    with zrmq.connect(nameservers) as fabric:
        assert len(fabric.admin().cluster()) == 2
