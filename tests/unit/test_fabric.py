"""One object for a program: embedded or connected, and what closing it closes."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

import zrmq
from tests.unit.real_cluster import running_cluster
from zrmq.client.admin import Admin
from zrmq.errors import (
    ClosedError,
    ConfigError,
    FolderLockedError,
    ForkedClientError,
    InvalidArgumentError,
    ResourceLimitError,
    UnreachableError,
)


def test_embedded_sends_and_reads_and_opens_no_port(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric:
        with fabric.producer() as producer:
            producer.send("meters", b"21.5")
        reader = fabric.pull_consumer("reports", "meters", consume_from=zrmq.ConsumeFrom.EARLIEST)
        assert [message.body for message in reader.poll(timeout_ms=5_000)] == [b"21.5"]
        assert all(address.startswith("inproc://") for address in fabric.nameservers)


def test_an_embedded_broker_keeps_its_messages(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric:
        fabric.producer().send("meters", b"21.5")
    with zrmq.embedded(tmp_path) as fabric:
        reader = fabric.pull_consumer(None, "meters", consume_from=zrmq.ConsumeFrom.EARLIEST)
        assert [message.body for message in reader.poll(timeout_ms=5_000)] == [b"21.5"]


def test_a_folder_is_embedded_once(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path), pytest.raises(FolderLockedError):
        zrmq.embedded(tmp_path)


@pytest.mark.parametrize("data", [0, b"data", True, "", "a\0b"])
def test_what_is_no_path_makes_no_folder(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for make in (zrmq.embedded, zrmq.Broker):
        with pytest.raises(ConfigError, match="it has to be text, not empty|may have a NUL"):
            make(data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (None, {}, "data is None; give the folder"),
        ("data", {"broker_port": 5}, "leave broker_port out"),
        ("data", {"host": "127.0.0.1"}, "leave host out"),
        ("data", {"nameservers": "box"}, "leave nameservers out"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    data: Any, options: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        zrmq.embedded(data, **options)
    assert list(tmp_path.iterdir()) == []


def test_two_embedded_brokers_do_not_meet(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path / "one") as one, zrmq.embedded(tmp_path / "two") as two:
        one.producer().send("meters", b"1")
        assert list(two.admin().topics()) == []


def test_closing_closes_what_was_made_and_ends_it(tmp_path: Path) -> None:
    fabric = zrmq.embedded(tmp_path)
    producer = fabric.producer()
    fabric.close()
    fabric.close()
    with pytest.raises(ClosedError):
        producer.send("meters", b"late")
    with pytest.raises(ClosedError, match="make a new one"):
        fabric.producer()


def test_a_fabric_is_not_closed_by_halves_in_a_callback(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric:
        errors: list[Exception] = []
        asked = threading.Event()

        def close(handle: zrmq.SendHandle) -> None:
            try:
                fabric.close()
            except InvalidArgumentError as error:
                errors.append(error)
            asked.set()

        producer = fabric.producer()
        producer.send_async("meters", b"1").add_done_callback(close)
        assert asked.wait(30)
        assert [str(error) for error in errors] == [
            "close() waits, and a callback must not; call it in another thread. [40000 BAD_REQUEST]"
        ]
        assert producer.send("meters", b"2").queue_offset >= 0


def test_an_exception_during_the_close_keeps_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = zrmq.embedded(tmp_path)
    before, interrupted = fabric.producer(), fabric.producer()
    close = interrupted.close

    def interrupt() -> None:
        monkeypatch.setattr(interrupted, "close", close)
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fabric.close()
    with pytest.raises(ClosedError):
        before.send("meters", b"late")
    with zrmq.embedded(tmp_path):
        fabric.close()
    with pytest.raises(ClosedError):
        interrupted.send("meters", b"late")


def test_what_was_closed_before_is_forgotten(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric:
        fabric.producer().send("meters", b"1")
        make_reader, collected = partial(fabric.pull_consumer, None, "meters"), []

        def started() -> zrmq.PullConsumer:
            consumer = make_reader()
            consumer.start()
            return consumer

        for make in (fabric.producer, fabric.admin, started, make_reader, partial(fabric.push_consumer, "a"), fabric.producer):
            client = make()
            client.close()
            collected.append(weakref.ref(client))
        del client
        gc.collect()
        assert [each() is None for each in collected] == [True] * 5 + [False], "the last one goes when the next is made"


def test_what_is_not_closed_yet_is_remembered(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric:
        clients = [fabric.pull_consumer(None, "meters"), fabric.producer()]
        fabric.producer()
    for client in clients:
        with pytest.raises(ClosedError):
            client.send("meters", b"late") if isinstance(client, zrmq.Producer) else client.poll()


@pytest.mark.parametrize("name", ["Producer", "PullConsumer"])
def test_what_is_made_while_another_thread_closes_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fabric = zrmq.embedded(tmp_path)
    made: list[Any] = []

    def meanwhile(fabric: zrmq.Fabric, client: Any) -> Any:
        monkeypatch.undo()
        made.append(client)
        fabric.close()
        return fabric._made(client)

    monkeypatch.setattr(zrmq.Fabric, "_made", meanwhile)
    with pytest.raises(ClosedError, match="The fabric was closed"):
        fabric.producer() if name == "Producer" else fabric.pull_consumer(None, "meters")
    assert made[0]._is_closed


def test_clients_that_wait_hear_of_it_when_what_they_are_embedded_in_ends(tmp_path: Path) -> None:
    fabric = zrmq.embedded(tmp_path)
    fabric.producer().send_async("meters", b"21.5").result()
    raised: dict[str, BaseException] = {}

    def wait(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except ClosedError as error:
            raised[name] = error

    messages = iter(fabric.pull_consumer(None, "meters", consume_from="earliest"))
    assert next(messages).body == b"21.5"
    polled = fabric.pull_consumer(None, "meters")
    polled.start()
    listening = fabric.consume("alarms", "meters", lambda message: None)
    admin = fabric.admin()
    admin.cluster()
    waiters = [
        threading.Thread(target=wait, args=each) for each in {
            "iteration": lambda: next(messages), "poll": lambda: polled.poll(timeout_ms=3_600_000), "run": listening.run,
            "admin": lambda: admin._wait(lambda finish: admin._instance.await_route(finish, 3_600_000, "never")),
        }.items()
    ]
    for waiter in waiters:
        waiter.start()
    assert fabric._host is not None
    fabric._host.stop()  # as when it fails
    for waiter in waiters:
        waiter.join(20)
    assert sorted(raised) == ["admin", "iteration", "poll", "run"]
    assert isinstance(polled.failure, ClosedError) and "Make a new consumer" in str(raised["run"])
    with pytest.raises(ClosedError):
        polled.poll()
    fabric.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_makes_no_client_of_an_embedded_broker(tmp_path: Path) -> None:
    with zrmq.embedded(tmp_path) as fabric, zrmq.connect("tcp://127.0.0.1:1") as connected:
        child = os.fork()
        if child == 0:
            told = 0
            try:
                for make in (fabric.producer, fabric.admin, fabric.pull_consumer):
                    with pytest.raises(ForkedClientError):
                        make()
                    told += 1
                connected.producer().close()
                fabric.close()
                told += 1
            finally:
                os._exit(told)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        assert fabric.producer().send("meters", b"21.5").broker_name == "broker-a"


def test_what_an_embedded_fabric_is_told_in_vain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a NameServer of its own"):
        zrmq.embedded(tmp_path, nameservers="tcp://127.0.0.1:1")
    listener: Any = None
    with zrmq.embedded(tmp_path) as fabric, pytest.raises(InvalidArgumentError, match="The listener None cannot be called"):
        fabric.consume("readers", "meters", listener)
    with pytest.raises(InvalidArgumentError, match="context is 5"):
        zrmq.Producer(context=listener or 5)


def test_a_context_that_cannot_be_used_says_why() -> None:
    """Not that the client is closed, which another one would be just so."""
    context: Any = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 1)
    admin, reader = partial(Admin, context=context), zrmq.PullConsumer(context=context)
    reader.assign([])
    with context.socket(zmq.PAIR):
        for make in (lambda: zrmq.Producer(context=context), admin, reader.start):
            with pytest.raises(ResourceLimitError, match="no more sockets"):
                make()
    context.term()
    for make in (lambda: zrmq.Producer(context=context), admin, reader.start):
        with pytest.raises(ClosedError, match="The context has ended"):
            make()


def test_connected_clients_reach_a_running_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as nameserver, zrmq.connect(nameserver) as fabric:
        assert fabric.producer().send("meters", b"21.5").broker_name == "broker-a"


def test_nobody_there_is_said_with_the_address() -> None:
    with zrmq.connect("tcp://127.0.0.1:1") as fabric:
        producer = fabric.producer()
        with pytest.raises(UnreachableError, match="127.0.0.1:1"):
            producer.send("meters", b"21.5", timeout_ms=1_500)


def test_wrong_addresses_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        zrmq.connect("no address")
    with pytest.raises(ConfigError, match="did you mean"):
        zrmq.embedded(tmp_path, default_queue_cuont=1)
