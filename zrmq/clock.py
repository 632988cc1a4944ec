"""The only reader of time. Everything else is given a `Clock`, so that tests and the simulator can turn it by hand."""

from __future__ import annotations

import time
from typing import Protocol

# Goes on while the machine is suspended, as the leases do that others count. What `time.monotonic` reads stands still then.
STEADY_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Two times: one to show and store, one to measure with."""

    def time_ms(self) -> int:
        """Wall clock, milliseconds since 1970-01-01 UTC; it may step. For timestamps only."""

    def monotonic_ms(self) -> float:
        """Milliseconds since some fixed moment, suspends included; never goes back. For deadlines and intervals only."""


class SystemClock:
    """The machine's clocks."""

    def time_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> float:
        return time.clock_gettime(STEADY_CLOCK) * 1000.0
