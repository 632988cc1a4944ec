"""One producer or consumer of the soak as a process of its own: does its part until its stdin ends, and reports on its stdout.

Bodies say all that is needed to judge: `PRODUCER:KIND:LANE:NUMBER`, with numbers that rise within a lane. A lane is what order is
promised in: a message group, a queue a message is bound to; `-` where there is none.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import structlog

import zrmq
from zrmq.clock import SystemClock
from zrmq.message import ConsumeFrom, MessageModel, MessageQueue, Record

SAFE, FAST = "soak-safe", "soak-fast"  # flushed before it is acknowledged, and after
TOPICS = (SAFE, FAST)
SEND_TIMEOUT_MS = 30_000
LANES = 4
BATCH_RECORDS = 6


class Spec(msgspec.Struct, frozen=True):
    """What a player is told. `model`: empty for a producer. `pause_ms`: between two sends of one kind."""

    name: str
    nameservers: str
    group: str = "soakers"
    model: str = ""
    pause_ms: int = 100


class Report(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all reports. Times are CLOCK_MONOTONIC, which all processes of a machine share."""

    at_ms: float


class Ready(Report, frozen=True, gc=False):
    """It takes part from now on."""


class Acknowledged(Report, frozen=True, gc=False):
    """A message has its receipt."""

    body: str
    queue: MessageQueue
    offset: int
    message_id: str
    handed_over_ms: float
    is_duplicate: bool


class Failed(Report, frozen=True, gc=False):
    """A message got an error instead."""

    body: str
    error: str


class Claimed(Report, frozen=True, gc=False):
    """From here on the consumer owns a queue."""

    queue: MessageQueue
    epoch: int


class Released(Report, frozen=True, gc=False):
    """It owned the queue until now."""

    queue: MessageQueue


class Consumed(Report, frozen=True, gc=False):
    """A listener was called with a message, and has returned; the time is that of the call."""

    queue: MessageQueue
    offset: int
    body: str


class Ended(Report, frozen=True, gc=False):
    """It has done all it was told to."""


AnyReport = Ready | Acknowledged | Failed | Claimed | Released | Consumed | Ended
decoder: msgspec.json.Decoder[AnyReport] = msgspec.json.Decoder(AnyReport)
now_ms = SystemClock().monotonic_ms


class Reporter:
    """Writes whole lines from any thread, each out before the call returns: what is reported is before what follows from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()

    def report(self, report: AnyReport) -> None:
        """One line, at once."""
        with self._lock:
            sys.stdout.buffer.write(self._encoder.encode(report) + b"\n")
            sys.stdout.buffer.flush()

    def take_log_line(self, logger: object, level: str, facts: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor: what a consumer says of its queues is a report too, written where it is decided."""
        if facts["event"] in ("queue_claimed", "queue_given_back", "queue_lost"):
            queue = MessageQueue(facts["topic"], facts["broker_name"], facts["queue_id"])
            is_claimed = facts["event"] == "queue_claimed"
            self.report(Claimed(now_ms(), queue, facts["lease_epoch"]) if is_claimed else Released(now_ms(), queue))
        return facts


# --- a producer ---------------------------------------------------------------------------------------------------------


class Sending:
    """One producer with a thread for each kind of send."""

    def __init__(self, spec: Spec, reporter: Reporter, is_over: threading.Event) -> None:
        self._spec = spec
        self._report = reporter.report
        self._is_over = is_over
        self._producer = zrmq.Producer(spec.group, nameservers=spec.nameservers, send_timeout_ms=SEND_TIMEOUT_MS)
        kinds: dict[str, Callable[[str, int], None]] = {
            "send": self._send, "async": self._send_async, "group": self._send_grouped, "bound": self._send_bound,
            "batch": self._send_batch, "oneway": self._send_oneway,
        }
        self._threads = [threading.Thread(target=self._repeat, args=kind, name=kind[0]) for kind in kinds.items()]

    def run(self) -> None:
        """Send until it is over, and wait for every answer."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        self._producer.close()

    def _repeat(self, kind: str, send: Callable[[str, int], None]) -> None:
        number = 0
        while not self._is_over.wait(self._spec.pause_ms / 1000):
            number += 1
            try:
                send(kind, number)
            except zrmq.ZrmqError as error:
                self._fail(self._body(kind, "-", number), error)

    def _body(self, kind: str, lane: object, number: int) -> str:
        return f"{self._spec.name}:{kind}:{lane}:{number}"

    def _send(self, kind: str, number: int) -> None:
        body, begun_ms = self._body(kind, "-", number), now_ms()
        self._acknowledge(body, self._producer.send(SAFE, body), begun_ms)

    def _send_async(self, kind: str, number: int) -> None:
        self._hand_over(FAST, self._body(kind, "-", number))

    def _send_grouped(self, kind: str, number: int) -> None:
        lane = f"g{number % LANES}"
        self._hand_over(SAFE, self._body(kind, lane, number), message_group=lane)

    def _send_bound(self, kind: str, number: int) -> None:
        lane = number % LANES

        def pick(queues: Sequence[MessageQueue]) -> MessageQueue:
            return queues[lane % len(queues)]

        self._hand_over(FAST, self._body(kind, lane, number), selector=pick)

    def _send_batch(self, kind: str, number: int) -> None:
        begun_ms = now_ms()
        bodies = [self._body(kind, f"b{at % 2}", number * BATCH_RECORDS + at) for at in range(BATCH_RECORDS)]
        records = [Record(body.encode(), message_group=body.split(":")[2]) for body in bodies]
        for body, receipt in zip(bodies, self._producer.send_batch(SAFE, records), strict=True):
            self._acknowledge(body, receipt, begun_ms)

    def _send_oneway(self, kind: str, number: int) -> None:
        self._producer.send_oneway(FAST, self._body(kind, "-", number))

    def _hand_over(self, topic: str, body: str, **options: Any) -> None:
        begun_ms = now_ms()

        def done(handle: Any) -> None:
            try:
                self._acknowledge(body, handle.result(), begun_ms)
            except zrmq.ZrmqError as error:
                self._fail(body, error)

        self._producer.send_async(topic, body, **options).add_done_callback(done)

    def _acknowledge(self, body: str, receipt: zrmq.SendReceipt, begun_ms: float) -> None:
        self._report(Acknowledged(
            now_ms(), body, receipt.queue, receipt.queue_offset, receipt.message_id, begun_ms, receipt.duplicate
        ))

    def _fail(self, body: str, error: zrmq.ZrmqError) -> None:
        self._report(Failed(now_ms(), body, type(error).__name__))


# --- a consumer ---------------------------------------------------------------------------------------------------------


def consume(spec: Spec, reporter: Reporter, is_over: threading.Event) -> None:
    """Consume until it is over; then commit and leave."""

    def listen(message: zrmq.Message) -> None:
        at_ms = now_ms()
        reporter.report(Consumed(at_ms, message.queue, message.queue_offset, message.body.decode()))

    consumer = zrmq.PushConsumer(
        spec.group, nameservers=spec.nameservers, message_model=MessageModel(spec.model), instance_name=spec.name,
        consume_from=ConsumeFrom.EARLIEST, concurrency=2, in_order=True,
    )
    for topic in TOPICS:
        consumer.subscribe(topic, "*", listen)
    with consumer:
        reporter.report(Ready(now_ms()))
        is_over.wait()


def await_end(is_over: threading.Event) -> None:
    """Read stdin to its end, without the lock of `sys.stdin` that an interpreter which exits would want."""
    while os.read(0, 1024):
        pass
    is_over.set()


def main(argument: str) -> None:
    """Play the part that the argument, a `Spec` in JSON, says."""
    spec = msgspec.json.decode(argument, type=Spec)
    reporter, is_over = Reporter(), threading.Event()
    structlog.configure(
        processors=[
            reporter.take_log_line, structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    threading.Thread(target=await_end, args=(is_over,), name="stdin", daemon=True).start()
    if spec.model:
        consume(spec, reporter, is_over)
    else:
        sending = Sending(spec, reporter, is_over)
        reporter.report(Ready(now_ms()))
        sending.run()
    reporter.report(Ended(now_ms()))


if __name__ == "__main__":
    main(sys.argv[1])
