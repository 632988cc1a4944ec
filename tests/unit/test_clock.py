"""The machine's clocks say what they are asked for."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime

import pytest

from zrmq.clock import SystemClock


def test_wall_clock_is_in_milliseconds_since_1970() -> None:
    before = datetime.now(UTC).timestamp() * 1_000
    shown = SystemClock().time_ms()
    assert before - 1 <= shown <= datetime.now(UTC).timestamp() * 1_000
    assert isinstance(shown, int)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the clocks have other names")
def test_a_suspend_of_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that slept through its lease must not believe that it has it still."""
    awake_s, suspended_s = 5.0, 15.0
    clocks = {time.CLOCK_MONOTONIC: awake_s, time.CLOCK_BOOTTIME: awake_s + suspended_s}
    monkeypatch.setattr(time, "clock_gettime", lambda clock: clocks[clock])
    monkeypatch.setattr(time, "monotonic", lambda: awake_s)
    assert SystemClock().monotonic_ms() == 20_000.0


def test_monotonic_clock_never_goes_back() -> None:
    clock = SystemClock()
    readings = [clock.monotonic_ms() for _ in range(1_000)]
    assert readings == sorted(readings)
