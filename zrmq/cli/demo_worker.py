"""One consumer of the demo as a process of its own: reads until its stdin ends, and reports what happens on its stdout.

Which queues it owns it learns from the consumer's own log lines: they are written where the decision is made.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import MutableMapping
from typing import Any

import msgspec
import structlog

import zrmq
from zrmq.cli.demo_readings import TOPICS
from zrmq.cli.demo_reports import (
    Acquired,
    AnyReport,
    Consumed,
    Ended,
    Joining,
    Ready,
    Released,
    encode_report,
    queue_name,
)
from zrmq.clock import SystemClock
from zrmq.message import ConsumeFrom, MessageModel


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is told."""

    name: str
    group: str
    clustering: bool
    nameservers: str
    run: str  # readings of other runs in the same folder are none of its business


class Reporter:
    """Writes reports as they come, whole lines from any thread. A report is out before the message it is of can be committed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now_ms = SystemClock().monotonic_ms

    def report(self, report: AnyReport) -> None:
        """One line, at once."""
        with self._lock:
            sys.stdout.buffer.write(encode_report(report))
            sys.stdout.buffer.flush()

    def take_log_line(self, logger: object, level: str, facts: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor: lines about queues become reports, warnings go to stderr, the rest goes nowhere."""
        event = facts["event"]
        if event == "queue_claimed":
            self.report(Acquired(self.now_ms(), _queue_of(facts), facts["lease_epoch"]))
        elif event in ("queue_given_back", "queue_lost"):
            self.report(Released(self.now_ms(), _queue_of(facts)))
        if level not in ("warning", "error", "exception"):
            raise structlog.DropEvent
        return facts


def _queue_of(facts: MutableMapping[str, Any]) -> str:
    return queue_name(facts["topic"], facts["broker_name"], facts["queue_id"])


def work(spec: WorkerSpec, reporter: Reporter) -> None:
    """Consume until stdin ends."""

    def on_reading(message: zrmq.Message) -> None:
        reading = message.value()
        if reading["run"] == spec.run:
            place = message.queue
            queue = queue_name(place.topic, place.broker_name, place.queue_id)
            number, sensor = reading["number"], message.keys[0]
            reporter.report(Consumed(reporter.now_ms(), queue, message.queue_offset, sensor, number))

    consumer = zrmq.PushConsumer(
        spec.group,
        nameservers=spec.nameservers,
        message_model=MessageModel.CLUSTERING if spec.clustering else MessageModel.BROADCASTING,
        instance_name=spec.name,
        consume_from=ConsumeFrom.EARLIEST,
        in_order=True,
    )
    for topic in TOPICS:
        consumer.subscribe(topic, "*", on_reading)
    reporter.report(Joining(reporter.now_ms(), consumer.client_id))
    with consumer:
        reporter.report(Ready(reporter.now_ms()))
        sys.stdin.buffer.read()
    reporter.report(Ended(reporter.now_ms()))


def main(argument: str) -> None:
    """Work as the argument, a `WorkerSpec` in JSON, says."""
    reporter = Reporter()
    structlog.configure(
        processors=[reporter.take_log_line, structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    work(msgspec.json.decode(argument, type=WorkerSpec), reporter)


if __name__ == "__main__":
    main(sys.argv[1])
