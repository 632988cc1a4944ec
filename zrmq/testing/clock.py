"""A clock that is turned by hand."""

from __future__ import annotations


class ManualClock:
    """A `Clock` that stands still until it is told to go on. `step` moves only the wall clock, as an operator or NTP would."""

    def __init__(self, time_ms: int = 1_700_000_000_000, monotonic_ms: float = 1_000.0) -> None:
        self._time_ms = float(time_ms)
        self._monotonic_ms = monotonic_ms

    def time_ms(self) -> int:
        return int(self._time_ms)

    def monotonic_ms(self) -> float:
        return self._monotonic_ms

    def advance(self, ms: float) -> None:
        """Let time pass. Raises `ValueError` for a negative time: nothing lets time pass backwards."""
        if ms < 0:
            raise ValueError(f"time cannot pass by {ms} ms")
        self._time_ms += ms
        self._monotonic_ms += ms

    def step(self, ms: float) -> None:
        """Set the wall clock forward or back; the monotonic one does not notice."""
        self._time_ms += ms
