"""The machine's clocks say what they are asked for."""

from __future__ import annotations

from datetime import UTC, datetime

from zrmq.clock import SystemClock


def test_wall_clock_is_in_milliseconds_since_1970() -> None:
    before = datetime.now(UTC).timestamp() * 1_000
    shown = SystemClock().time_ms()
    assert before - 1 <= shown <= datetime.now(UTC).timestamp() * 1_000
    assert isinstance(shown, int)


def test_monotonic_clock_never_goes_back() -> None:
    clock = SystemClock()
    readings = [clock.monotonic_ms() for _ in range(1_000)]
    assert readings == sorted(readings)
