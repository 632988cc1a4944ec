"""The consumers' doors, with a real NameServer and broker: what users do, and what they do wrong."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import structlog

import zrmq
from tests.unit.real_cluster import running_cluster
from zrmq.client import membership
from zrmq.client.allocation import AllocateByCircle
from zrmq.client.consumer_engine import Engine
from zrmq.client.process_queue import ProcessQueue
from zrmq.client.runtime import ClientThread
from zrmq.errors import (
    ClosedError,
    Code,
    ConfigError,
    FencedError,
    ForkedClientError,
    InvalidArgumentError,
    RequestRefusedError,
    ResourceLimitError,
    SubscriptionMismatchError,
    TopicNotFoundError,
    UnreachableError,
)
from zrmq.message import ConsumeFrom, Message, MessageModel, MessageQueue

EARLIEST = ConsumeFrom.EARLIEST


@pytest.fixture(scope="module")
def nameserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One broker for all tests; each has topics and groups of its own."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), default_queue_count=2, session_timeout_ms=1_000) as address:
        yield address


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A topic and group that no other test has."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:100]


@pytest.fixture
def producer(nameserver: str) -> Iterator[zrmq.Producer]:
    with zrmq.Producer(nameservers=nameserver) as made:
        yield made


@pytest.fixture
def consumers(nameserver: str) -> Iterator[Callable[..., Any]]:
    """Makes consumers and closes them."""
    with ExitStack() as stack:

        def make(kind: type[Any], *arguments: Any, **options: Any) -> Any:
            made = kind(*arguments, **{"nameservers": nameserver, **options})
            stack.callback(made.close)
            return made

        yield make


def until(condition: Callable[[], Any]) -> None:
    """Wait for it; the test's time bound is the bound."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def bodies(messages: list[Message]) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int, begin: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(begin, begin + count)]


def poll_all(consumer: zrmq.PullConsumer, count: int) -> list[Message]:
    """Poll until so many have come."""
    found: list[Message] = []
    while len(found) < count:
        found += consumer.poll(timeout_ms=10_000)
    return found


def pull_consumer(make: Callable[..., Any], name: str, **options: Any) -> Any:
    """A started one, subscribed to its topic, that begins with the first message."""
    made = make(zrmq.PullConsumer, name, **{"consume_from": EARLIEST, **options})
    made.subscribe(name)
    made.start()
    return made


# --- push ---------------------------------------------------------------------------------------------------------------


def test_a_listener_gets_every_message_and_they_are_committed(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    seen: list[bytes] = []
    consumer = consumers(zrmq.PushConsumer, name)

    @consumer.subscribe(name)
    def on_message(message: zrmq.Message) -> None:
        seen.append(message.body)

    consumer.start()
    producer.send_batch(name, numbered(100))
    until(lambda: len(seen) == 100)
    consumer.close()
    assert sorted(seen) == sorted(numbered(100))
    producer.send(name, b"later")
    after = pull_consumer(consumers, name)
    assert bodies(poll_all(after, 1)) == [b"later"]


def test_a_decorated_listener_stays_what_it_was(consumers: Callable[..., Any], name: str) -> None:
    def on_message(message: zrmq.Message) -> None: ...

    assert consumers(zrmq.PushConsumer, name).subscribe(name)(on_message) is on_message


def test_only_wanted_tags_come(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    seen: list[str | None] = []
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "kitchen || hall", lambda message: seen.append(message.tag))
    consumer.start()
    for tag in ("hall", "cellar", None, "kitchen", "hal", "kitchens"):
        producer.send(name, b"", tag=tag)
    producer.send(name, b"", tag="hall")
    until(lambda: len(seen) == 3)
    assert sorted(map(str, seen)) == ["hall", "hall", "kitchen"]


def test_several_topics_have_a_listener_each(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    seen: list[tuple[str, str]] = []
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name + "-a", "*", lambda message: seen.append(("a", message.topic)))
    consumer.subscribe(name + "-b", "*", lambda message: seen.append(("b", message.topic)))
    with consumer:
        producer.send(name + "-a", b"")
        producer.send(name + "-b", b"")
        until(lambda: len(seen) == 2)
    assert sorted(seen) == [("a", name + "-a"), ("b", name + "-b")]


def test_listeners_run_side_by_side(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    meeting = threading.Barrier(4)
    passed = threading.Semaphore(0)

    def on_message(message: zrmq.Message) -> None:
        meeting.wait(30)
        passed.release()

    consumer = consumers(zrmq.PushConsumer, name, concurrency=4)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    producer.send_batch(name, numbered(4))
    for _ in range(4):
        assert passed.acquire(timeout=30)


def test_in_order_each_queue_has_one_call_at_a_time(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    busy: dict[int, threading.Lock] = {0: threading.Lock(), 1: threading.Lock()}
    overlaps = []

    def on_message(message: zrmq.Message) -> None:
        queue_id = message.queue.queue_id
        if not busy[queue_id].acquire(blocking=False):
            overlaps.append(message.queue_offset)
            return
        seen[queue_id].append(message.queue_offset)
        busy[queue_id].release()

    consumer = consumers(zrmq.PushConsumer, name, concurrency=4, in_order=True, consume_from=EARLIEST)
    consumer.subscribe(name, "*", on_message)
    for begin in range(0, 2_000, 50):
        producer.send_batch(name, numbered(50, begin))
    consumer.start()
    until(lambda: len(seen[0]) + len(seen[1]) + len(overlaps) >= 2_000)
    assert not overlaps
    assert seen == {queue_id: list(range(len(each))) for queue_id, each in seen.items()}


@pytest.fixture
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zrmq.client.listening.RETRY_MS_MIN", 20.0)


@pytest.mark.usefixtures("_quick_retries")
def test_a_message_that_fails_comes_again_while_others_go_on(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts: list[int] = []
    others: list[bytes] = []

    def on_message(message: zrmq.Message) -> None:
        if message.body == b"0":
            attempts.append(message.delivery_attempt)
            if len(attempts) < 4:
                raise ValueError("not yet")
        else:
            others.append(message.body)

    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    producer.send_batch(name, numbered(50))
    until(lambda: len(attempts) == 4 and len(others) == 49)
    assert attempts == [1, 2, 3, 4]
    text = capsys.readouterr().err
    assert text.count("message_failed") == 3
    assert "ValueError('not yet')" in text


@pytest.mark.usefixtures("_quick_retries")
def test_in_order_a_message_that_fails_stops_its_queue_only(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    gate = threading.Event()
    seen: dict[int, list[int]] = {0: [], 1: []}

    def on_message(message: zrmq.Message) -> None:
        if message.queue.queue_id == 0 and message.queue_offset == 2 and not gate.is_set():
            raise ValueError("not yet")
        seen[message.queue.queue_id].append(message.queue_offset)

    consumer = consumers(zrmq.PushConsumer, name, in_order=True)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    queues = [MessageQueue(name, "broker-a", queue_id) for queue_id in (0, 1)]
    for queue in queues:
        producer.send_batch(name, numbered(10), queue=queue)
    until(lambda: len(seen[1]) == 10)
    assert seen[0] == [0, 1]
    gate.set()
    until(lambda: len(seen[0]) == 10)
    assert seen[0] == seen[1] == list(range(10))


@pytest.mark.usefixtures("_quick_retries")
def test_what_failed_is_not_committed(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    failed = threading.Event()
    others: list[bytes] = []

    def on_message(message: zrmq.Message) -> None:
        if message.body == b"2":
            failed.set()
            raise ValueError("never")
        others.append(message.body)

    consumer = consumers(zrmq.PushConsumer, name, commit_interval_ms=10)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    producer.send_batch(name, numbered(5), queue=MessageQueue(name, "broker-a", 0))
    until(lambda: failed.is_set() and len(others) == 4)
    consumer.close()
    assert bodies(poll_all(pull_consumer(consumers, name), 3)) == [b"2", b"3", b"4"]


def test_closing_waits_for_the_listener(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    entered, leave = threading.Event(), threading.Event()
    seen: list[bytes] = []

    def on_message(message: zrmq.Message) -> None:
        entered.set()
        assert leave.wait(30)
        seen.append(message.body)

    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    producer.send_batch(name, numbered(3), queue=MessageQueue(name, "broker-a", 0))
    assert entered.wait(30)
    closer = threading.Thread(target=consumer.close)
    closer.start()
    assert closer.is_alive()
    leave.set()
    closer.join()
    assert seen == [b"0"], "what it had, and no more"
    assert bodies(poll_all(pull_consumer(consumers, name), 2)) == [b"1", b"2"]


def test_a_listener_that_does_not_return_is_left_alone(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def on_message(message: zrmq.Message) -> None:
        entered.set()
        leave.wait(30)

    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", on_message)
    consumer.start()
    producer.send(name, b"again")
    assert entered.wait(30)
    consumer.close(timeout_ms=100)
    assert "listeners_left" in capsys.readouterr().err
    leave.set()
    assert bodies(poll_all(pull_consumer(consumers, name), 1)) == [b"again"]


def test_a_listener_may_close_its_consumer(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", lambda message: consumer.close())
    runner = threading.Thread(target=consumer.run)
    runner.start()
    until(lambda: consumer._engine is not None and consumer._engine.started.is_set)
    producer.send(name, b"the end")
    runner.join()
    after = pull_consumer(consumers, name)
    assert after.poll(timeout_ms=50) == [], "the message that ended it is finished"


def test_pausing_and_resuming(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    seen: list[bytes] = []
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", lambda message: seen.append(message.body))
    consumer.start()
    consumer.pause()
    producer.send(name, b"one")
    other = consumers(zrmq.PushConsumer, name + "-other", consume_from=EARLIEST)
    reached = threading.Event()
    other.subscribe(name, "*", lambda message: reached.set())
    other.start()
    assert reached.wait(30)
    assert seen == []
    consumer.resume()
    until(lambda: seen == [b"one"])


def test_a_listener_that_ends_its_consumer_leaves_the_queues_to_others(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    """Not only when somebody closes it: nobody knows of its end where it was only started."""
    leaving, others = consumers(zrmq.PushConsumer, name), consumers(zrmq.PushConsumer, name)

    def leave(message: Message) -> None:
        sys.exit(3)

    seen: set[bytes] = set()
    leaving.subscribe(name, "*", leave)
    others.subscribe(name, "*", lambda message: seen.add(message.body))
    leaving.start()
    producer.send(name, b"leave")
    others.start()
    sent = {b"%d" % number for number in range(20)}
    for body in sent:
        producer.send(name, body)
    until(lambda: seen >= {b"leave", *sent})


def test_no_other_thread_goes_on_behind_what_ended_the_consumer(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    consumer = consumers(zrmq.PushConsumer, name, in_order=True, concurrency=4)
    seen: list[bytes] = []

    def listen(message: Message) -> None:
        seen.append(message.body)
        if message.body == b"2":
            sys.exit(3)

    consumer.subscribe(name, "*", listen)
    consumer.start()
    for number in range(20):
        producer.send(name, b"%d" % number, message_group="one")
    with pytest.raises(SystemExit):
        consumer.run()
    assert seen == [b"0", b"1", b"2"]


# --- run ----------------------------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, zrmq
consumer = zrmq.PushConsumer(sys.argv[1], nameservers=sys.argv[2])

@consumer.subscribe(sys.argv[1])
def on_message(message):
    print(message.body.decode(), flush=True)
    if message.body == b"leave":
        sys.exit(7)

before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
consumer.start()
print("ready", flush=True)
consumer.run()
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
print("done", flush=True)
"""


HOPELESS = """
import sys, zrmq
from zrmq.client import consumer_base
consumer_base.START_MS = 600_000
consumer = zrmq.PushConsumer("reports", nameservers="tcp://127.0.0.1:1")
consumer.subscribe("meters", "*", print)
open_engine = consumer._open
def open_and_tell():
    engine = open_engine()
    print("ready", flush=True)
    return engine
consumer._open = open_and_tell
consumer.run()
print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_run_while_nobody_is_there(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOPELESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert (out, process.returncode) == ("done\n", 0)


def test_run_says_that_the_start_takes_long(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zrmq.consumer.START_MS", 1)
    consumer = consumers(zrmq.PushConsumer, name, nameservers="tcp://127.0.0.1:1")
    consumer.subscribe(name, "*", print)
    with structlog.testing.capture_logs() as logs:
        runner = threading.Thread(target=consumer.run)
        runner.start()
        until(lambda: any(line["event"] == "consumer_start_delayed" for line in logs))
        consumer.close()
        runner.join()


def test_who_could_not_start_is_told_so_when_it_seeks(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zrmq.client.consumer_base.START_MS", 1)
    consumer = consumers(zrmq.PullConsumer, name, nameservers="tcp://127.0.0.1:1")
    consumer.subscribe(name)
    for seek in (consumer.seek_to_earliest, consumer.seek_to_latest, partial(consumer.seek_to_timestamp, 1)):
        with pytest.raises(UnreachableError, match="No broker of this consumer's queues is there"):
            seek()


@pytest.fixture
def program(nameserver: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """A consumer as a program of its own, ready."""
    arguments = [sys.executable, "-c", PROGRAM, name, nameserver]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_run_in_order(
    program: subprocess.Popen[str], producer: zrmq.Producer, consumers: Callable[..., Any], name: str, number: signal.Signals
) -> None:
    producer.send(name, b"one")
    assert program.stdout is not None
    assert program.stdout.readline() == "one\n"
    program.send_signal(number)
    out, err = program.communicate(timeout=30)
    assert (out, program.returncode, err) == ("done\n", 0, "")
    producer.send(name, b"two")
    assert bodies(poll_all(pull_consumer(consumers, name), 1)) == [b"two"], "the first was committed on the way out"


def test_what_a_listener_ends_the_program_with_ends_it(
    program: subprocess.Popen[str], producer: zrmq.Producer, name: str
) -> None:
    producer.send(name, b"leave")
    out, err = program.communicate(timeout=30)
    assert program.returncode == 7
    assert "done" not in out
    assert "Traceback" not in err


def test_a_killed_member_is_followed_by_another(
    program: subprocess.Popen[str], producer: zrmq.Producer, consumers: Callable[..., Any], name: str
) -> None:
    other = pull_consumer(consumers, name)
    until(lambda: len(other.assigned()) == 1)
    program.kill()
    until(lambda: len(other.assigned()) == 2)
    producer.send_batch(name, numbered(4))
    assert sorted(bodies(poll_all(other, 4))) == numbered(4)


def test_run_ends_with_close_and_in_any_thread(consumers: Callable[..., Any], name: str) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    runner = threading.Thread(target=consumer.run)
    runner.start()
    until(lambda: consumer._engine is not None)
    consumer.close()
    runner.join()


def test_a_signal_may_come_just_when_run_begins_to_wait(consumers: Callable[..., Any], name: str) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    consumer.start()

    def profile(frame: FrameType, event: str, called: Any) -> None:
        is_wait = event == "call" and frame.f_code is threading.Condition.wait.__code__
        if is_wait or (event == "c_call" and called.__name__ == "get"):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGTERM)

    sys.setprofile(profile)
    try:
        consumer.run()
    finally:
        sys.setprofile(None)
    with pytest.raises(ClosedError):
        consumer.assigned()


def test_a_signal_handler_may_close_in_the_middle_of_a_poll(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has the lock that the consumer's own thread waits for."""
    consumer = pull_consumer(consumers, name)
    thread = consumer._thread
    cut = ProcessQueue.cut

    def interrupted(queue: ProcessQueue, messages_max: int) -> Any:
        monkeypatch.undo()
        with pytest.raises(InvalidArgumentError, match="A signal handler interrupted"):
            consumer.assigned()
        consumer.close()
        return cut(queue, messages_max)

    monkeypatch.setattr(ProcessQueue, "cut", interrupted)
    producer.send(name, b"1")
    with pytest.raises(ClosedError):
        while True:
            consumer.poll()
    consumer.close()
    with pytest.raises(ClosedError):
        thread.call(lambda: None)


def close_while_it_is_made(consumer: Any, monkeypatch: pytest.MonkeyPatch, *, is_there: bool) -> None:
    """Let a signal handler close it when its thread is about to make what runs there, or (`is_there`) just has."""
    call = ClientThread.call

    def interrupted(thread: ClientThread, function: Callable[[], Any]) -> Any:
        monkeypatch.undo()
        if not is_there:
            consumer.close()
        made = call(thread, function)
        if is_there:
            consumer.close()
        return made

    monkeypatch.setattr(ClientThread, "call", interrupted)


def test_a_signal_handler_may_close_in_the_middle_of_a_start(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    close_while_it_is_made(consumer, monkeypatch, is_there=True)
    with pytest.raises(ClosedError, match="The consumer is closed"):
        consumer.start()
    with pytest.raises(ClosedError):
        consumer._thread.call(lambda: None)
    consumer._workers[0].join(30)
    assert not consumer._workers[0].is_alive()


def test_a_signal_handler_may_close_what_is_about_to_run(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is anything to close: that ends `run` as it does later."""
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    close_while_it_is_made(consumer, monkeypatch, is_there=False)
    consumer.run()
    with pytest.raises(ClosedError):
        consumer._thread.call(lambda: None)


def test_a_signal_handler_may_close_what_has_only_begun_to_run(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)

    @contextmanager
    def interrupted(on_signal: object) -> Iterator[None]:
        consumer.close()
        yield

    monkeypatch.setattr("zrmq.consumer.until_signal", interrupted)
    consumer.run()


def test_a_closed_consumer_does_not_run(consumers: Callable[..., Any], name: str) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    consumer.close()
    with pytest.raises(ClosedError, match="The consumer is closed; make a new one"):
        consumer.run()


def test_a_thread_that_ends_just_when_its_consumer_is_made_says_so(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the broker it is embedded in fails: who then waits for messages would wait for ever."""
    consumer = consumers(zrmq.PullConsumer, name)
    consumer.subscribe(name)
    call = ClientThread.call

    def ended(thread: ClientThread, function: Callable[[], Any]) -> Any:
        monkeypatch.undo()
        result = call(thread, function)
        thread._engine.reactor.stop()
        thread._engine._thread.join(30)
        return result

    monkeypatch.setattr(ClientThread, "call", ended)
    with pytest.raises(ClosedError, match="The consumer's I/O thread has ended"):
        next(iter(consumer))


def test_a_consumer_that_gets_no_thread_for_a_listener_joins_nothing_and_may_be_started_again(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group would share its queues anew for a member that leaves at once."""
    consumer = consumers(zrmq.PushConsumer, name, concurrency=3)
    consumer.subscribe(name, "*", print)
    start = threading.Thread.start
    made: list[object] = []
    monkeypatch.setattr("zrmq.client.consumer_base.Engine", lambda *given, **options: made.append(1) or Engine(*given, **options))

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "zrmq-listener-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as refused:
        refused.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceLimitError, match="no thread for zrmq-listener-1"):
            consumer.start()
    consumer._workers[0].join(30)
    assert not any(worker.is_alive() for worker in consumer._workers)
    assert made == []
    consumer.start()
    assert all(worker.is_alive() for worker in consumer._workers)


def test_a_signal_handler_that_closes_before_the_listeners_have_begun_does_not_wait_for_them(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    consumer = consumers(zrmq.PushConsumer, name, concurrency=3)
    consumer.subscribe(name, "*", print)
    opened = consumer._open

    def interrupted() -> Any:
        engine = opened()
        consumer.close(1_000)
        return engine

    monkeypatch.setattr(consumer, "_open", interrupted)
    consumer.start()
    assert not any(worker.is_alive() for worker in consumer._workers)
    assert "listeners_left" not in capsys.readouterr().err


def test_a_close_that_an_exception_ends_gives_the_queues_back(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it waits for a listener: with its thread alive, the leases would be too."""
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    consumer.start()

    def interrupt(*given: object) -> None:
        monkeypatch.undo()
        consumer.close()  # as a handler may that interrupts a close
        raise KeyboardInterrupt

    monkeypatch.setattr(consumer, "_await_workers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        consumer.close()
    with pytest.raises(ClosedError):
        consumer._thread.post(print)


def test_run_raises_what_the_group_refuses(consumers: Callable[..., Any], name: str) -> None:
    first = consumers(zrmq.PushConsumer, name)
    first.subscribe(name, "*", print)
    first.start()
    second = consumers(zrmq.PushConsumer, name)
    second.subscribe(name, "hall", print)
    with pytest.raises(SubscriptionMismatchError):
        second.run()


# --- sharing ------------------------------------------------------------------------------------------------------------


def test_members_share_the_queues_and_hand_them_over(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    seen: dict[str, list[bytes]] = {"one": [], "two": []}
    members = {}
    for who in ("one", "two"):
        members[who] = consumers(zrmq.PushConsumer, name, allocation=AllocateByCircle())
        members[who].subscribe(name, "*", lambda message, who=who: seen[who].append(message.body))
        members[who].start()
    until(lambda: all(len(member.assigned()) == 1 for member in members.values()))
    for number in range(40):
        producer.send(name, b"%d" % number)
    until(lambda: len(seen["one"]) + len(seen["two"]) == 40)
    assert seen["one"]
    assert seen["two"]
    members["one"].close()
    until(lambda: len(members["two"].assigned()) == 2)
    for number in range(40, 60):
        producer.send(name, b"%d" % number)
    until(lambda: len(seen["one"]) + len(seen["two"]) >= 60)
    assert sorted(map(int, seen["one"] + seen["two"])) == list(range(60)), "nothing twice, nothing lost"


def test_broadcasting_gives_every_instance_every_message(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    seen: dict[str, list[bytes]] = {"one": [], "two": []}
    for who in seen:
        member = consumers(zrmq.PushConsumer, name, message_model=MessageModel.BROADCASTING, instance_name=who)
        member.subscribe(name, "*", lambda message, who=who: seen[who].append(message.body))
        member.start()
    producer.send_batch(name, numbered(20))
    until(lambda: len(seen["one"]) == len(seen["two"]) == 20)


def test_two_brokers_are_read_as_one(tmp_path: Path, name: str) -> None:
    with (
        running_cluster(tmp_path, ("broker-a", "broker-b"), default_queue_count=1) as address,
        zrmq.PullConsumer(name, nameservers=address) as consumer,
        zrmq.Producer(nameservers=address) as producer,
    ):
        consumer.subscribe(name)
        consumer.start()
        until(lambda: len(consumer.assigned()) == 2)
        for queue in consumer.assigned():
            producer.send(name, queue.broker_name.encode(), queue=queue)
        assert sorted(bodies(poll_all(consumer, 2))) == [b"broker-a", b"broker-b"]


def test_an_embedded_fabric_has_consumers_too(tmp_path: Path, name: str) -> None:
    seen: list[bytes] = []
    with zrmq.embedded(tmp_path) as fabric:
        fabric.consume("listeners", name, lambda message: seen.append(message.body))
        reader = fabric.pull_consumer("readers", name)
        reader.start()
        fabric.producer().send(name, b"hello")
        until(lambda: seen == [b"hello"])
        assert bodies(poll_all(reader, 1)) == [b"hello"]


# --- pull ---------------------------------------------------------------------------------------------------------------


def test_polls_return_what_there_is_up_to_the_bound(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    consumer = pull_consumer(consumers, name)
    assert consumer.poll(timeout_ms=0) == []
    producer.send_batch(name, numbered(10), queue=MessageQueue(name, "broker-a", 0))
    got: list[list[bytes]] = []  # the first message may have travelled alone, so how many a poll finds is chance
    while sum(map(len, got)) < 10:
        got.append(bodies(consumer.poll(3, 10_000)))
        assert 1 <= len(got[-1]) <= 3
    assert [body for poll in got for body in poll] == numbered(10)


def test_a_poll_begins_by_itself(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    producer.send(name, b"early")
    consumer = consumers(zrmq.PullConsumer, name, consume_from=EARLIEST)
    consumer.subscribe(name)
    assert bodies(poll_all(consumer, 1)) == [b"early"]


def test_a_poll_finishes_what_the_one_before_returned(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    consumer = pull_consumer(consumers, name, commit_interval_ms=10)
    producer.send_batch(name, numbered(6), queue=queue)
    consumer.poll(2, 10_000)
    consumer.poll(2)
    until(lambda: consumer.committed(queue) == 2)
    consumer.close()
    again = pull_consumer(consumers, name)
    assert bodies(poll_all(again, 4)) == numbered(4, 2), "what the last poll returned was not finished"


def test_leaving_the_block_finishes_what_was_given(nameserver: str, producer: zrmq.Producer, name: str) -> None:
    producer.send_batch(name, numbered(6), queue=MessageQueue(name, "broker-a", 0))
    for expected in (numbered(2), numbered(2, 2)):
        with zrmq.PullConsumer(name, nameservers=nameserver, consume_from=EARLIEST) as consumer:
            consumer.subscribe(name)
            assert bodies(consumer.poll(2, 10_000)) == expected
    with zrmq.PullConsumer(name, nameservers=nameserver) as consumer:
        consumer.subscribe(name)
        for message in consumer:
            assert message.body == b"4"
            break
    with zrmq.PullConsumer(name, nameservers=nameserver) as consumer:
        consumer.subscribe(name)
        assert bodies(poll_all(consumer, 1)) == [b"5"]


def test_an_exception_in_the_block_finishes_nothing_more(nameserver: str, producer: zrmq.Producer, name: str) -> None:
    producer.send_batch(name, numbered(3), queue=MessageQueue(name, "broker-a", 0))
    for _ in range(2):
        with pytest.raises(KeyError), zrmq.PullConsumer(name, nameservers=nameserver, consume_from=EARLIEST) as consumer:
            consumer.subscribe(name)
            assert bodies(consumer.poll(3, 10_000)) == numbered(3)
            raise KeyError


def test_an_iteration_commits_what_lies_before_the_message_it_gave(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    consumer = pull_consumer(consumers, name, commit_interval_ms=10)
    producer.send_batch(name, numbered(6), queue=queue)
    for message in consumer:
        if message.body == b"3":
            break
    until(lambda: consumer.committed(queue) == 3)
    assert (consumer.position(queue), consumer.lag()[queue]) == (4, 3)
    assert bodies([message for _, message in zip(range(2), consumer, strict=False)]) == [b"4", b"5"]
    consumer.commit()
    assert (consumer.committed(queue), consumer.lag()[queue]) == (6, 0)


def test_iterating_and_polling_may_be_mixed(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    consumer = pull_consumer(consumers, name)
    producer.send_batch(name, numbered(9), queue=MessageQueue(name, "broker-a", 0))
    first = next(iter(consumer)).body
    polled = bodies(consumer.poll(3))
    second = next(iter(consumer)).body
    assert [first, *polled, second, *bodies(consumer.poll())] == numbered(9)


def test_an_iteration_ends_when_the_consumer_is_closed(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    consumer = pull_consumer(consumers, name)
    producer.send(name, b"only")
    seen = []
    closer = threading.Thread(target=consumer.close)
    for message in consumer:
        seen.append(message.body)
        closer.start()
    closer.join()
    assert seen == [b"only"]


def test_a_poll_is_interrupted_by_close(consumers: Callable[..., Any], name: str) -> None:
    consumer = pull_consumer(consumers, name)
    closer = threading.Timer(0.05, consumer.close)
    closer.start()
    with pytest.raises(ClosedError, match=r"closed during poll\(\)"):
        consumer.poll(timeout_ms=30_000)
    closer.join()


def test_a_commit_that_is_repeated_knows_what_the_first_one_was_to_commit(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = pull_consumer(consumers, name, auto_commit=False)
    core = consumer._engine.core
    with monkeypatch.context() as patch:
        patch.setattr(core._committer, "commit", lambda readings, on_done, timeout_ms: on_done(UnreachableError("Commit again.")))
        for reading in (b"first", b"second"):
            producer.send(name, reading, queue=MessageQueue(name, "broker-a", 0))
            assert bodies(consumer.poll()) == [reading]
            with pytest.raises(UnreachableError):
                consumer.commit()
    assert len(consumer._uncommitted) == 1, "however often it fails"
    consumer._call(lambda: [core._lose(reading, UnreachableError("It is gone.")) for reading in [*core.reader.readings.values()]])
    with pytest.raises(FencedError, match="was lost before the commit"):
        consumer.commit()
    consumer.commit()  # that it is told once


def test_who_has_lost_all_queues_is_told_so_when_it_seeks(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = pull_consumer(consumers, name)
    core = consumer._engine.core
    monkeypatch.setattr(core, "_rebalance", lambda: None)  # as while its broker is away
    consumer._call(lambda: [core._lose(reading, UnreachableError("It is gone.")) for reading in [*core.reader.readings.values()]])
    with pytest.raises(UnreachableError, match="No broker of this consumer's queues is there"):
        consumer.seek_to_earliest()


def test_commits_by_hand(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    consumer = pull_consumer(consumers, name, auto_commit=False, commit_interval_ms=10)
    producer.send_batch(name, numbered(6), queue=queue)
    consumer.poll(2, 10_000)
    consumer.poll(2)
    assert consumer.committed(queue) == 0
    consumer.commit()
    assert consumer.committed(queue) == 4
    consumer.poll(2)
    consumer.close()
    assert bodies(poll_all(pull_consumer(consumers, name), 2)) == [b"4", b"5"]


def test_seeking(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    consumer = pull_consumer(consumers, name, commit_interval_ms=10)
    producer.send_batch(name, numbered(4), queue=queue)
    assert bodies(poll_all(consumer, 4)) == numbered(4)
    consumer.poll(timeout_ms=0)
    until(lambda: consumer.committed(queue) == 4)
    consumer.seek(queue, 1)
    assert consumer.position(queue) == 1
    until(lambda: consumer.committed(queue) == 1)
    assert bodies(poll_all(consumer, 3)) == numbered(3, 1)
    consumer.seek(queue, ConsumeFrom.EARLIEST)
    assert bodies(poll_all(consumer, 4)) == numbered(4)
    consumer.seek(queue, 0)
    consumer.seek_to_latest()
    assert consumer.poll(timeout_ms=50) == []
    consumer.seek_to_earliest(queue)
    assert bodies(poll_all(consumer, 4)) == numbered(4)


def test_seeking_by_time(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    consumer = pull_consumer(consumers, name)
    first = producer.send(name, b"first", queue=queue)
    until(lambda: time.time() * 1000 > first.store_timestamp_ms + 5)
    second = producer.send(name, b"second", queue=queue)
    for when in (second.store_timestamp_ms, datetime.fromtimestamp(second.store_timestamp_ms / 1000, UTC)):
        consumer.seek_to_timestamp(when)
        assert bodies(poll_all(consumer, 1)) == [b"second"]
    consumer.seek(queue, datetime.fromtimestamp(first.store_timestamp_ms / 1000, UTC))
    assert bodies(poll_all(consumer, 2)) == [b"first", b"second"]


def test_beginning_at_a_time(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    first = producer.send(name, b"first")
    until(lambda: time.time() * 1000 > first.store_timestamp_ms + 5)
    second = producer.send(name, b"second")
    when = datetime.fromtimestamp(second.store_timestamp_ms / 1000, UTC)
    assert bodies(poll_all(pull_consumer(consumers, name, consume_from=when), 1)) == [b"second"]


def test_pausing_queues(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    quiet, loud = (MessageQueue(name, "broker-a", queue_id) for queue_id in (0, 1))
    consumer = pull_consumer(consumers, name)
    consumer.pause(quiet)
    for queue in (quiet, loud):
        producer.send(name, b"%d" % queue.queue_id, queue=queue)
    assert bodies(poll_all(consumer, 1)) == [b"1"]
    assert consumer.poll(timeout_ms=20) == []
    consumer.resume()
    assert bodies(poll_all(consumer, 1)) == [b"0"]


def test_reading_beside_all_groups(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    producer.send(name, b"before")
    reader = consumers(zrmq.PullConsumer)
    reader.subscribe(name)
    reader.start()
    producer.send(name, b"after")
    assert bodies(poll_all(reader, 1)) == [b"after"]
    with pytest.raises(InvalidArgumentError, match="without a group has nowhere to commit to"):
        reader.commit()
    with pytest.raises(InvalidArgumentError, match="without a group has committed nothing"):
        reader.committed(MessageQueue(name, "broker-a", 0))


def test_assigned_queues(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    producer.send(name, b"")
    reader = consumers(zrmq.PullConsumer, consume_from=EARLIEST)
    queues = reader.queues(name)
    assert queues == [MessageQueue(name, "broker-a", 0), MessageQueue(name, "broker-a", 1)]
    for queue in queues:
        producer.send(name, b"%d" % queue.queue_id, queue=queue)
    reader.assign(queues[:1])
    assert reader.assigned() == queues[:1]
    assert {message.queue for message in poll_all(reader, 1)} == {queues[0]}
    reader.assign(queues[1:])
    assert reader.assigned() == queues[1:]
    assert {message.queue for message in poll_all(reader, 1)} == {queues[1]}


def test_without_a_group_what_was_given_is_finished_by_the_next_poll(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    producer.send_batch(name, numbered(3), queue=MessageQueue(name, "broker-a", 0))
    reader = consumers(zrmq.PullConsumer, group=None, consume_from=EARLIEST, auto_commit=False)
    queue, other = reader.queues(name)
    reader.assign([queue])
    assert len(poll_all(reader, 3)) == 3
    assert reader.poll(1, 0) == []
    assert reader.lag() == {queue: 0}
    reader.assign([other])
    reader.assign([queue])
    assert reader.assigned() == [queue]


def test_seeking_right_after_assigning(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    for queue_id in (0, 1):
        producer.send(name, b"%d" % queue_id, queue=MessageQueue(name, "broker-a", queue_id))
    reader = consumers(zrmq.PullConsumer)  # which begins with what comes next
    reader.assign(reader.queues(name))
    reader.seek_to_earliest()
    assert sorted(bodies(poll_all(reader, 2))) == [b"0", b"1"]


def test_a_queue_that_is_not_there_keeps_assigning_for_a_moment_only(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    producer.send(name, b"")
    reader = consumers(zrmq.PullConsumer)
    reader.queues(name)
    reader.assign([MessageQueue(name, "nobody", 0)])
    assert reader.assigned() == []


def test_assigned_queues_begin_where_the_group_stands(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    queue = MessageQueue(name, "broker-a", 0)
    member = pull_consumer(consumers, name)
    producer.send_batch(name, numbered(4), queue=queue)
    member.poll(2, 10_000)
    member.commit()
    helper = consumers(zrmq.PullConsumer, name)
    helper.assign([queue])
    assert bodies(poll_all(helper, 2)) == numbered(2, 2)
    with pytest.raises(FencedError):
        helper.commit()
    member.close()
    helper.commit()
    assert helper.committed(queue) == 4


def test_what_there_is_to_know_of_queues(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    consumer = pull_consumer(consumers, name)
    assert consumer.queues(name) == consumer.assigned()
    assert set(consumer.lag().values()) == {0}
    producer.send_batch(name, numbered(5), queue=MessageQueue(name, "broker-a", 0))
    until(lambda: sorted(consumer.lag().values()) == [0, 5])
    poll_all(consumer, 5)
    assert sorted(consumer.lag().values()) == [0, 5], "returned, but not finished"
    consumer.poll(timeout_ms=0)
    assert sorted(consumer.lag().values()) == [0, 0]
    assert (consumer.skipped_count, consumer.failure) == (0, None)


def test_much_is_read_in_full(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    """More than the buffer holds, through poll and through a listener."""
    queue = MessageQueue(name, "broker-a", 0)
    for begin in range(0, 20_000, 1_000):
        producer.send_batch(name, numbered(1_000, begin), queue=queue)
    consumer = pull_consumer(consumers, name, buffer_messages=3_000, buffer_bytes=200_000)
    assert bodies(poll_all(consumer, 20_000)) == numbered(20_000)
    seen: list[bytes] = []
    listening = consumers(zrmq.PushConsumer, name + "-2", consume_from=EARLIEST, in_order=True, buffer_messages=3_000)
    listening.subscribe(name, "*", lambda message: seen.append(message.body))
    listening.start()
    until(lambda: len(seen) == 20_000)
    assert seen == numbered(20_000)


# --- wrong use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [zrmq.PushConsumer, zrmq.PullConsumer])
def test_a_topic_is_subscribed_once(kind: type[Any]) -> None:
    consumer = kind("reports")
    arguments = (print,) if kind is zrmq.PushConsumer else ()
    consumer.subscribe("meters", "hall", *arguments)
    with pytest.raises(InvalidArgumentError, match=r"'meters' is subscribed already; subscribe once, with all tags joined by"):
        consumer.subscribe("meters", "kitchen", *arguments)


def test_subscriptions_come_before_the_start(consumers: Callable[..., Any], name: str) -> None:
    for consumer, arguments in ((consumers(zrmq.PushConsumer, name), (print,)), (consumers(zrmq.PullConsumer, name), ())):
        consumer.subscribe(name, "*", *arguments)
        consumer.start()
        with pytest.raises(InvalidArgumentError, match="'doors' comes too late; subscribe before the consumer is started"):
            consumer.subscribe("doors", "*", *arguments)


def test_something_has_to_be_subscribed(nameserver: str) -> None:
    calls: list[Callable[[], object]] = [
        zrmq.PushConsumer("reports", nameservers=nameserver).start,
        zrmq.PushConsumer("reports", nameservers=nameserver).run,
        zrmq.PullConsumer("reports", nameservers=nameserver).poll,
        zrmq.PullConsumer("reports", nameservers=nameserver).start,
        lambda: next(iter(zrmq.PullConsumer("reports", nameservers=nameserver))),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=r"Nothing is subscribed; call subscribe\(\) with a topic before"):
            call()


@pytest.mark.parametrize("group", ["a b", "a/b", "", "ä", "x" * 121])
def test_a_group_has_a_groups_name(group: str) -> None:
    for kind in (zrmq.PushConsumer, zrmq.PullConsumer):
        with pytest.raises(InvalidArgumentError, match="group") as caught:
            kind(group)
        assert caught.value.code is Code.ILLEGAL_CONSUMER_GROUP


def test_a_text_that_says_no_is_no_flag() -> None:
    with pytest.raises(InvalidArgumentError, match="auto_commit is 'no'; give True or False"):
        zrmq.PullConsumer("reports", auto_commit="no")  # type: ignore[arg-type]


def test_a_push_consumer_needs_a_group() -> None:
    with pytest.raises(InvalidArgumentError, match="The group is of type NoneType; give a str"):
        zrmq.PushConsumer(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("topic", ["", "a b", "x" * 128])
def test_a_topic_has_a_topics_name(topic: str) -> None:
    with pytest.raises(InvalidArgumentError, match="topic"):
        zrmq.PullConsumer("reports").subscribe(topic)


@pytest.mark.parametrize(("expression", "reason"), [("a ||", "empty tag"), ("|| b", "empty tag"), ("a | b", r"as in 'a \|\| b'")])
def test_a_filter_is_tags_joined_by_bars(expression: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        zrmq.PullConsumer("reports").subscribe("meters", expression)
    with pytest.raises(InvalidArgumentError, match=reason):
        zrmq.PushConsumer("reports").subscribe("meters", expression, print)


def subscribe_by_decorator(listener: Any) -> None:
    zrmq.PushConsumer("reports").subscribe("meters")(listener)


def subscribe_by_call(listener: Any) -> None:
    zrmq.PushConsumer("reports").subscribe("meters", "*", listener)


@pytest.mark.parametrize("subscribe", [subscribe_by_decorator, subscribe_by_call])
def test_a_listener_can_be_called(subscribe: Callable[[Any], None]) -> None:
    with pytest.raises(InvalidArgumentError, match="The listener 'print' cannot be called; give a function that takes a message"):
        subscribe("print")


async def coroutine(message: zrmq.Message) -> None: ...


def generator(message: zrmq.Message) -> Iterator[None]:
    yield


async def generator_to_await(message: zrmq.Message) -> AsyncIterator[None]:
    yield


class CoroutineToCall:
    async def __call__(self, message: zrmq.Message) -> None: ...


@pytest.mark.parametrize("listener", [coroutine, generator, generator_to_await, CoroutineToCall(), partial(coroutine)])
def test_a_listener_that_does_nothing_when_it_is_called_is_refused(listener: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is a coroutine function or a generator; give a plain one"):
        subscribe_by_call(listener)


def test_what_is_subscribed_wrongly_is_refused_at_once() -> None:
    consumer = zrmq.PushConsumer("reports")
    with pytest.raises(InvalidArgumentError, match=r"a listener comes third: subscribe\(t, '\*', f\)"):
        consumer.subscribe("meters", print)  # type: ignore[call-overload]
    with pytest.raises(InvalidArgumentError, match="The topic is of type builtin_function_or_method; give a str"):
        consumer.subscribe(print)  # type: ignore[call-overload]
    with pytest.raises(InvalidArgumentError, match="has an empty tag"):
        consumer.subscribe("meters", "a || ")


@pytest.mark.parametrize(("option", "value", "reason"), [
    ("concurrency", 0, "concurrency is 0; give a whole number from 1 to 1024"),
    ("concurrency", 1_025, "concurrency is 1025"),
    ("concurrency", 1.5, "concurrency is 1.5"),
    ("buffer_messages", 0, "buffer_messages is 0; give a whole number, 1 or more"),
    ("buffer_bytes", "32MiB", "buffer_bytes is '32MiB'"),
    ("in_order", "no", "in_order is 'no'; give True or False"),
    ("commit_interval_ms", 5, "commit_interval_ms is 5; give a whole number, 10 or more"),
    ("allocation", "averagely", "allocation='averagely' is no strategy; give one such as AllocateAveragely"),
    ("consume_from", ConsumeFrom.TIMESTAMP, "names no time; give the time itself"),
    ("consume_from", -5, "-5 is no time"),
    ("consume_from", 1_795_000_000, "1795000000 would be a time in the seventies; give milliseconds"),
    ("consume_from", 10**30, "is no time"),
    ("consume_from", "earliest?", "is 'earliest\\?'; use 'earliest', 'latest', or a time"),
    ("instance_name", "", "instance name must be text and not blank"),
    ("instance_name", "x" * 256, "instance name has 256 characters; use at most 255"),
    ("message_model", "sharing", "message_model is 'sharing'; use one of clustering, broadcasting"),
])
def test_options_are_checked_at_once(option: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        zrmq.PushConsumer("reports", **{option: value})


def test_addresses_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot be a NameServer's address"):
        zrmq.PullConsumer("reports", nameservers="tcp://")


def test_it_is_started_once(consumers: Callable[..., Any], name: str) -> None:
    consumer = consumers(zrmq.PushConsumer, name)
    consumer.subscribe(name, "*", print)
    consumer.start()
    with pytest.raises(InvalidArgumentError, match="started already; make another one"):
        consumer.start()


def test_questions_come_after_the_start() -> None:
    with pytest.raises(InvalidArgumentError, match=r"not started; call start\(\) first"):
        zrmq.PushConsumer("reports").assigned()
    with pytest.raises(InvalidArgumentError, match="not started"):
        zrmq.PushConsumer("reports").pause()


def test_nothing_is_done_after_the_close(consumers: Callable[..., Any], name: str) -> None:
    pulling = pull_consumer(consumers, name)
    pushing = consumers(zrmq.PushConsumer, name + "-2")
    pushing.subscribe(name, "*", print)
    for consumer in (pulling, pushing):
        consumer.close()
        consumer.close()
    queue = MessageQueue(name, "broker-a", 0)
    calls: list[Callable[[], object]] = [
        pulling.poll, pulling.commit, pulling.lag, pulling.assigned, pulling.pause, pushing.start, pushing.run, pushing.pause,
        lambda: next(iter(pulling)), lambda: pulling.seek(queue, 0), lambda: pulling.committed(queue),
        lambda: pulling.queues(name),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="The consumer is closed; make a new one"):
            call()


def test_closing_what_was_never_started_does_nothing() -> None:
    zrmq.PullConsumer("reports").close()
    zrmq.PushConsumer("reports").stop()


def test_only_queues_that_are_ours_are_sought(consumers: Callable[..., Any], name: str) -> None:
    consumer = pull_consumer(consumers, name)
    elsewhere = MessageQueue("doors", "broker-a", 3)
    calls: list[Callable[[], object]] = [
        lambda: consumer.seek(elsewhere, 0), lambda: consumer.seek(elsewhere, EARLIEST), lambda: consumer.position(elsewhere),
        lambda: consumer.seek_to_latest(elsewhere), lambda: consumer.pause(elsewhere),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=r"Queue 3 of 'doors' at broker-a is not assigned to this consumer now"):
            call()
    with pytest.raises(InvalidArgumentError, match="where is -1; give a whole number from 0 to"):
        consumer.seek(consumer.assigned()[0], -1)
    with pytest.raises(InvalidArgumentError, match="is no place"):
        consumer.seek(consumer.assigned()[0], ConsumeFrom.TIMESTAMP)


def test_a_poll_asks_for_something(consumers: Callable[..., Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="max_messages is 0; ask for 1 or more"):
        pull_consumer(consumers, name).poll(0)
    with pytest.raises(InvalidArgumentError, match="timeout_ms is -5; wait for 0 or more"):
        pull_consumer(consumers, name).poll(1, -5)


def test_subscribing_and_assigning_exclude_each_other() -> None:
    consumer = zrmq.PullConsumer("reports")
    consumer.subscribe("meters")
    with pytest.raises(InvalidArgumentError, match="subscribes to topics; use another one to assign queues"):
        consumer.assign([])
    consumer = zrmq.PullConsumer("reports")
    consumer.assign([MessageQueue("meters", "broker-a", 0)])
    with pytest.raises(InvalidArgumentError, match="Queues are assigned to this consumer; use another one to subscribe"):
        consumer.subscribe("meters")


def test_assigning_what_is_no_queue() -> None:
    with pytest.raises(InvalidArgumentError, match="'meters' is no message queue; take some from queues"):
        zrmq.PullConsumer().assign(["meters"])  # type: ignore[list-item]


TOO_EARLY = [datetime(1969, 12, 31, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)]
NO_QUEUE: list[Any] = [5, None, "meters", [MessageQueue("meters", "broker-a", 0)], ("meters", "broker-a", 0)]
NO_TIMEOUT: list[Any] = ["1", None, -1, True, float("nan"), float("inf"), 1 << 70, [1]]
QUEUE = MessageQueue("meters", "broker-a", 0)


@pytest.mark.parametrize(("kind", "call", "wrong", "reason"), [
    (zrmq.PushConsumer, lambda it, x: it.subscribe("meters", x, print), [["a", "b"], 5, b"a", None], "The filter is of type"),
    (zrmq.PushConsumer, lambda it, x: it.subscribe("meters", x), [["a", "b"], 5, b"a", None, {"a"}], "The filter is of type"),
    (zrmq.PushConsumer, lambda it, x: it.subscribe("meters", "*", x), [5, "print", [print]], "cannot be called; give a function"),
    (zrmq.PushConsumer, lambda it, x: it.subscribe("meters")(x), [5, None, "print"], "cannot be called; give a function"),
    (zrmq.PushConsumer, lambda it, x: it.subscribe(x, "*", print), [5, None, ["meters"]], "The topic is of type"),
    (zrmq.PushConsumer, lambda it, x: it.close(x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PushConsumer, lambda it, x: it.stop(x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PullConsumer, lambda it, x: it.subscribe("meters", x), [["a", "b"], 5, b"a", None, print], "The filter is of type"),
    (zrmq.PullConsumer, lambda it, x: it.subscribe(x), [5, None, ["meters"]], "The topic is of type"),
    (zrmq.PullConsumer, lambda it, x: it.close(x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PullConsumer, lambda it, x: it.commit(x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PullConsumer, lambda it, x: it.poll(1, x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PullConsumer, lambda it, x: it.queues("meters", x), NO_TIMEOUT, "timeout_ms is .*; wait for 0 or more"),
    (zrmq.PullConsumer, lambda it, x: it.queues(x), [5, None, ["meters"]], "The topic is of type"),
    (zrmq.PullConsumer, lambda it, x: it.poll(x), ["1", None, 0, 1.5, True, [1]], "max_messages is .*; ask for 1 or more"),
    (zrmq.PullConsumer, lambda it, x: it.assign(x), [5, None, QUEUE], "is no list of message queues"),
    (zrmq.PullConsumer, lambda it, x: it.assign([x]), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek(x, 0), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek(x, EARLIEST), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek(QUEUE, x), ["0", None, 1.5, [0], "timestamp"], "is no place"),
    (zrmq.PullConsumer, lambda it, x: it.seek(QUEUE, x), [-1, True, 2**63], "where is .*; give a whole number"),
    (zrmq.PullConsumer, lambda it, x: it.seek_to_earliest(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek_to_latest(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek_to_timestamp(0, x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.seek_to_timestamp(x), ["0", None, 1.5, [0], 10**30, *TOO_EARLY], "is no time"),
    (zrmq.PullConsumer, lambda it, x: it.position(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.committed(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.pause(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.resume(x), NO_QUEUE, "is no message queue"),
    (zrmq.PullConsumer, lambda it, x: it.assign([MessageQueue(x, "broker-a", 0)]), [5, None], "The topic is of type"),
    (zrmq.PullConsumer, lambda it, x: it.pause(MessageQueue("meters", x, 0)), [5, None], "broker name that is no text"),
    (zrmq.PullConsumer, lambda it, x: it.pause(MessageQueue("meters", "broker-a", x)), ["0", None, -1], "queue_id is"),
])
def test_what_a_door_cannot_use_is_refused_in_a_sentence(
    kind: type[Any], call: Callable[[Any, Any], object], wrong: list[Any], reason: str
) -> None:
    """Before anything is started, so by a consumer without a cluster."""
    for value in wrong:
        with pytest.raises(InvalidArgumentError, match=reason) as caught:
            call(kind("reports"), value)
        assert caught.value.message.endswith(".")
        assert "\n" not in caught.value.message


def test_queues_of_a_topic_that_does_not_exist(consumers: Callable[..., Any], name: str) -> None:
    with pytest.raises(TopicNotFoundError, match=f"Topic '{name}' does not exist"):
        consumers(zrmq.PullConsumer).queues(name, timeout_ms=200)


def test_members_subscribe_alike(consumers: Callable[..., Any], name: str) -> None:
    pull_consumer(consumers, name)
    other = consumers(zrmq.PullConsumer, name)
    other.subscribe(name, "hall")
    with pytest.raises(SubscriptionMismatchError) as caught:
        other.poll()
    assert f"{name} (*) clustering" in caught.value.message
    assert f"{name} (hall) clustering" in caught.value.message


def test_members_have_one_model(consumers: Callable[..., Any], name: str) -> None:
    pull_consumer(consumers, name)
    other = consumers(zrmq.PushConsumer, name, message_model=MessageModel.BROADCASTING)
    other.subscribe(name, "*", print)
    with pytest.raises(SubscriptionMismatchError, match="broadcasting"):
        other.start()


def test_broadcasting_instances_have_names_of_their_own(
    consumers: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "GHOST_MS", 0.0)
    for expected in (None, Code.INSTANCE_NAME_TAKEN):
        consumer = consumers(zrmq.PushConsumer, name, message_model=MessageModel.BROADCASTING, instance_name="hall")
        consumer.subscribe(name, "*", print)
        if expected is None:
            consumer.start()
            continue
        with pytest.raises(RequestRefusedError, match="give each one a name of its own with instance_name=") as caught:
            consumer.run()
        assert caught.value.code is expected


def test_a_forked_child_gets_an_error_and_harms_nobody(consumers: Callable[..., Any], producer: zrmq.Producer, name: str) -> None:
    pulling = pull_consumer(consumers, name)
    pushing = consumers(zrmq.PushConsumer, name + "-2")
    pushing.subscribe(name, "*", lambda message: None)
    pushing.start()
    producer.send(name, b"first")
    iteration = iter(pulling)
    assert next(iteration).body == b"first"
    child = os.fork()
    if child == 0:
        calls = [
            pulling.poll, pulling.commit, pulling.assigned, pushing.pause, pushing.run, lambda: next(iter(pulling)),
            lambda: next(iteration),
        ]
        os._exit(sum(not _raises_forked(call) for call in calls) + _fails(pulling.close) + _fails(pushing.close))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    producer.send(name, b"still there")
    assert bodies(poll_all(pulling, 1)) == [b"still there"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_block_ends_in_a_child_that_was_forked_while_the_inbox_was_locked(
    consumers: Callable[..., Any], producer: zrmq.Producer, name: str
) -> None:
    """By the I/O thread, which stayed with the parent and gives it back there only."""
    consumer = pull_consumer(consumers, name)
    producer.send(name, b"1")
    assert bodies(poll_all(consumer, 1)) == [b"1"]
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with consumer._engine._inbox_lock:
            locked.set()
            forked.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(30)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # ends it where it would wait for ever
        os._exit(_fails(lambda: consumer.__exit__(None, None, None)))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    forked.set()
    holder.join()
    assert status == 0


def _raises_forked(call: Callable[[], object]) -> bool:
    try:
        call()
    except ForkedClientError:
        return True
    return False


def _fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except BaseException:  # noqa: BLE001 - the child only has its exit code to tell with
        return True
    return False


def test_a_consumer_nobody_holds_any_more_warns_and_ends(nameserver: str, name: str) -> None:
    consumer: Any = zrmq.PullConsumer(name, nameservers=nameserver)
    consumer.subscribe(name)
    consumer.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del consumer
        gc.collect()
    assert [str(each.message) for each in caught] == [f"zrmq-consumer-{name} was never closed; call close() or use `with`."]
