"""The processes of a benchmark: each plays one part, warms up, waits for the start, and reports what it measured.

A player is started with its `Spec` as the only argument. It prints one JSON object per line: what others need to know before they
start (`address`), `{"ready": true}` when it is warm, and its result; between the last two it waits for a line on stdin. One that
fails prints the error's code and message (`failed`) instead of what would come next. Times are CLOCK_MONOTONIC in milliseconds,
which all processes of a machine share.
"""

from __future__ import annotations

import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module

import msgspec

import zrmq
from zrmq.clock import Clock, SystemClock
from zrmq.errors import RequestTimeoutError, ZrmqError
from zrmq.message import ConsumeFrom

LIST_RECORDS = 10_000  # of one `send_batch`
IDLE_MS_MAX = 20_000  # a consumer that gets nothing for so long gives up

_STAMP = struct.Struct("<d")


class Spec(msgspec.Struct, frozen=True):
    """What a player is told."""

    part: str
    nameservers: str = ""
    topic: str = ""
    messages: int = 0
    warm_messages: int = 0  # before the start; not measured
    body_bytes: int = 128
    per_second: int = 0  # a pace; 0: as fast as it goes
    address: str = ""  # of the other player


class Gate:
    """A player's line to the bench."""

    def tell(self, **facts: object) -> None:
        """One line for the bench."""
        sys.stdout.buffer.write(msgspec.json.encode(facts) + b"\n")
        sys.stdout.buffer.flush()

    def ready(self) -> None:
        """Warm; the bench may start."""
        self.tell(ready=True)

    def wait(self) -> None:
        """Warm, and nothing happens before the start. Ends the process when the bench is gone."""
        self.ready()
        if not sys.stdin.buffer.readline():
            sys.exit(1)


def pace(count: int, per_second: int, clock: Clock) -> Iterator[int]:
    """Count up to `count`, each number when its time has come."""
    if not per_second:
        yield from range(count)
        return
    pause = threading.Event()
    began_ms = clock.monotonic_ms()
    for number in range(count):
        early_ms = began_ms + number * 1000.0 / per_second - clock.monotonic_ms()
        if early_ms > 0:
            pause.wait(early_ms / 1000.0)
        yield number


# --- the parts ----------------------------------------------------------------------------------------------------------


def produce(spec: Spec, gate: Gate) -> dict[str, object]:
    """Send asynchronously, as fast as it goes, until everything is acknowledged."""
    topic, body = spec.topic, bytes(spec.body_bytes)

    def send(producer: zrmq.Producer, messages: int) -> None:
        send_async = producer.send_async
        for _ in range(messages):
            send_async(topic, body)

    return _produce(spec, gate, send)


def produce_tagged(spec: Spec, gate: Gate) -> dict[str, object]:
    """The same with a tag, a key and a property on each message."""
    topic, body, keys, properties = spec.topic, bytes(spec.body_bytes), ["device-7"], {"site": "north"}

    def send(producer: zrmq.Producer, messages: int) -> None:
        send_async = producer.send_async
        for _ in range(messages):
            send_async(topic, body, tag="kitchen", keys=keys, properties=properties)

    return _produce(spec, gate, send)


def produce_batches(spec: Spec, gate: Gate) -> dict[str, object]:
    """Send lists of bodies with `send_batch`, each list acknowledged before the next."""
    body = bytes(spec.body_bytes)

    def send(producer: zrmq.Producer, messages: int) -> None:
        for first in range(0, messages, LIST_RECORDS):
            producer.send_batch(spec.topic, [body] * min(LIST_RECORDS, messages - first))

    return _produce(spec, gate, send)


def _produce(spec: Spec, gate: Gate, send: Callable[[zrmq.Producer, int], None]) -> dict[str, object]:
    clock = SystemClock()
    with zrmq.Producer("bench", nameservers=spec.nameservers) as producer:
        send(producer, spec.warm_messages)
        producer.flush()
        gate.wait()
        began_ms = clock.monotonic_ms()
        send(producer, spec.messages)
        producer.flush()
        return {"began_ms": began_ms, "ended_ms": clock.monotonic_ms()}


def send(spec: Spec, gate: Gate) -> dict[str, object]:
    """Send one at a time, each receipt awaited and timed in milliseconds."""
    clock, body, took_ms = SystemClock(), bytes(spec.body_bytes), []
    with zrmq.Producer("bench", nameservers=spec.nameservers) as producer:
        for _ in range(spec.warm_messages):
            producer.send(spec.topic, body)
        gate.wait()
        for _ in range(spec.messages):
            began_ms = clock.monotonic_ms()
            producer.send(spec.topic, body)
            took_ms.append(clock.monotonic_ms() - began_ms)
    return {"took_ms": took_ms}


def send_paced(spec: Spec, gate: Gate) -> dict[str, object]:
    """Send at a pace, asynchronously, the moment of sending in each body; for `receive_stamped`."""
    clock, padding = SystemClock(), bytes(max(spec.body_bytes - _STAMP.size, 0))
    with zrmq.Producer("bench", nameservers=spec.nameservers) as producer:
        for _ in pace(spec.warm_messages, spec.per_second, clock):
            producer.send_async(spec.topic, _STAMP.pack(clock.monotonic_ms()) + padding)
        gate.wait()
        for _ in pace(spec.messages, spec.per_second, clock):
            producer.send_async(spec.topic, _STAMP.pack(clock.monotonic_ms()) + padding)
        producer.flush()
    return {}


def consume(spec: Spec, gate: Gate) -> dict[str, object]:
    """Read typed messages and commit them: the warm ones before the start, the others timed."""
    with _consumer(spec) as consumer:
        _read(consumer, spec.warm_messages)
        gate.wait()
        return _timed(consumer, spec.messages)


def consume_backlog(spec: Spec, gate: Gate) -> dict[str, object]:
    """The same, but the start comes before the warm messages, so that nothing is read ahead of the clock."""
    with _consumer(spec) as consumer:
        gate.wait()
        ahead = _read(consumer, spec.warm_messages)
        return _timed(consumer, spec.messages - ahead)


def receive_stamped(spec: Spec, gate: Gate) -> dict[str, object]:
    """How long each message took from `send_paced` to here, in milliseconds."""
    took_ms: list[float] = []
    done = threading.Event()
    warm = threading.Event()

    def on_message(message: zrmq.Message) -> None:
        took_ms.append(monotonic_ms() - _STAMP.unpack_from(message.body)[0])
        if len(took_ms) == spec.warm_messages:
            warm.set()
        if len(took_ms) == spec.warm_messages + spec.messages:
            done.set()

    monotonic_ms = SystemClock().monotonic_ms
    consumer = zrmq.PushConsumer(f"bench-{spec.topic}", nameservers=spec.nameservers, consume_from=ConsumeFrom.EARLIEST)
    consumer.subscribe(spec.topic, "*", on_message)
    with consumer:
        _await(warm, "the warm-up")
        gate.wait()
        _await(done, "all messages", spec.messages * 1000.0 / max(spec.per_second, 1))
    return {"took_ms": took_ms[spec.warm_messages :]}


def _await(event: threading.Event, what: str, expected_ms: float = 0.0) -> None:
    if not event.wait((expected_ms + IDLE_MS_MAX) / 1000.0):
        raise RequestTimeoutError(f"The consumer waited for {what} in vain; see the broker's log.")


def _consumer(spec: Spec) -> zrmq.PullConsumer:
    """A consumer of a group of its own, which begins with the first message."""
    consumer = zrmq.PullConsumer(f"bench-{spec.topic}", nameservers=spec.nameservers, consume_from=ConsumeFrom.EARLIEST)
    consumer.subscribe(spec.topic)
    return consumer


def _read(consumer: zrmq.PullConsumer, messages: int) -> int:
    """Read at least so many; how many more it were."""
    count = 0
    while count < messages:
        batch = consumer.poll(timeout_ms=IDLE_MS_MAX)
        if not batch:
            raise RequestTimeoutError(f"Only {count} of {messages} messages came; see the broker's log.")
        count += len(batch)
    return count - messages


def _timed(consumer: zrmq.PullConsumer, messages: int) -> dict[str, object]:
    clock = SystemClock()
    began_ms = clock.monotonic_ms()
    _read(consumer, messages)
    consumer.commit()
    return {"began_ms": began_ms, "ended_ms": clock.monotonic_ms(), "messages": messages}


PARTS: dict[str, Callable[[Spec, Gate], dict[str, object]]] = {
    part.__name__: part
    for part in (
        produce, produce_tagged, produce_batches, send, send_paced, consume, consume_backlog, receive_stamped,
    )
}


def play(argument: str) -> None:
    """Play the part that the argument, a `Spec` as JSON, names."""
    spec = msgspec.json.decode(argument, type=Spec)
    part = PARTS.get(spec.part) or getattr(import_module("zrmq.cli.bench_limits"), spec.part)
    gate = Gate()
    try:
        gate.tell(result=part(spec, gate))
    except ZrmqError as error:
        traceback.print_exc()  # before it is told: who hears it may end this process at once
        gate.tell(failed=(error.code, error.message))
        sys.exit(1)


if __name__ == "__main__":
    play(sys.argv[1])
