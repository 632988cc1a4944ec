"""Fault isolation: which brokers to avoid for a while, by how long they took to answer. RocketMQ's table, on by default.

    answered after at least     50   100   550  1,800  3,000  5,000  15,000 ms
    is avoided for               0     0     2      5      6     10      30 s

A failure counts as 10 s. Each answer replaces what was known, so a broker that answers quickly again is used again. To avoid is a
preference: when all brokers of a topic are to be avoided, all of them are used.
"""

from __future__ import annotations

from bisect import bisect_right

LATENCY_MS = (50.0, 100.0, 550.0, 1_800.0, 3_000.0, 5_000.0, 15_000.0)
AVOID_MS = (0.0, 0.0, 2_000.0, 5_000.0, 6_000.0, 10_000.0, 30_000.0)
NOTICED_MS = LATENCY_MS[2]  # quicker answers avoid nobody
FAILURE_MS = 10_000.0


class FaultTable:
    """Broker names and the time until which each is avoided, in monotonic milliseconds.

    Any thread: every operation is one step on a dict, and what is lost in a race is one measurement.
    """

    def __init__(self) -> None:
        self._avoided_until_ms: dict[str, float] = {}

    def record(self, broker_name: str, latency_ms: float, now_ms: float) -> None:
        """The broker answered after `latency_ms`."""
        if latency_ms >= NOTICED_MS:
            self._avoided_until_ms[broker_name] = now_ms + AVOID_MS[bisect_right(LATENCY_MS, latency_ms) - 1]
        elif broker_name in self._avoided_until_ms:
            self._avoided_until_ms.pop(broker_name, None)

    def record_failure(self, broker_name: str, now_ms: float) -> None:
        """The broker refused for a reason of its own, or is not reachable."""
        self.record(broker_name, FAILURE_MS, now_ms)

    def is_avoided(self, broker_name: str, now_ms: float) -> bool:
        """Whether another broker is to be preferred."""
        until_ms = self._avoided_until_ms.get(broker_name)
        return until_ms is not None and now_ms < until_ms
