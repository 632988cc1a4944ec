"""The demo's producer: publishes readings at a pace and keeps the receipts."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from zrmq.cli.demo_readings import Reading, Source
from zrmq.cli.demo_verdict import Ledger, ReadingKey
from zrmq.errors import ZrmqError

if TYPE_CHECKING:
    from zrmq.client.batch import SendHandle
    from zrmq.producer import Producer

RECEIPT_TIMEOUT_MS = 30_000.0  # for the last receipts


class Publisher:
    """Sends what is due and enters it, and what was stored of it, into the ledger. One thread."""

    def __init__(self, producer: Producer, source: Source, ledger: Ledger, per_second: int, run: str) -> None:
        self._producer = producer
        self._source = source
        self._ledger = ledger
        self._per_second = per_second
        self._run = run
        self._ready: deque[Reading] = deque()
        self._handles: deque[tuple[ReadingKey, SendHandle]] = deque()

    def publish(self, elapsed_s: float) -> None:
        """Everything that is due `elapsed_s` after the start and was not sent yet."""
        for _ in range(int(elapsed_s * self._per_second) - self._ledger.sent_count):
            if not self._ready:
                self._ready.extend(self._source.sample())
            self._send(self._ready.popleft())

    def _send(self, reading: Reading) -> None:
        number = self._ledger.number(reading.sensor)
        value = {"run": self._run, "number": number, "value": reading.value, "unit": reading.unit, "at_ms": reading.at_ms}
        try:
            handle = self._producer.send_async(
                reading.topic, value=value, tag=reading.kind, keys=[reading.sensor], message_group=reading.sensor
            )
        except ZrmqError as error:
            self._ledger.refused.append(error.message)
        else:
            self._handles.append(((reading.sensor, number), handle))

    def settle(self, timeout_ms: float = 0.0) -> None:
        """Enter the receipts that are there; with a timeout, wait so long for each of the others."""
        waiting: deque[tuple[ReadingKey, SendHandle]] = deque()
        for key, handle in self._handles:
            if not timeout_ms and not handle.done():
                waiting.append((key, handle))
                continue
            try:
                handle.result(timeout_ms or None)
            except ZrmqError as error:
                self._ledger.refused.append(error.message)
            else:
                self._ledger.stored.add(key)
        self._handles = waiting

    def finish(self) -> None:
        """Wait for the last receipts."""
        self.settle(RECEIPT_TIMEOUT_MS)
