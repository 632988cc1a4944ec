"""The virtual network of a run: `MemoryNetwork` whose loops are machines that may lose their power in the middle of a turn.

Each machine has clocks of its own, which may run faster or slower than the network's time.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zrmq.errors import AddressInUseError
from zrmq.testing.files import PowerCut
from zrmq.transport.memory import START_TIME_MS, MemoryClock, MemoryLoop, MemoryNetwork, MemoryTimer

ROUNDING_MS = 1e-6  # so much later a timer fires than it is due, so that it is never early by the clock of its own machine


class DriftingClock(MemoryClock):
    """The clocks of a machine, wall and steady, that run `rate` times as fast as the network's time."""

    def __init__(self, network: MemoryNetwork, rate: float) -> None:
        super().__init__(network)
        self._rate = rate

    def time_ms(self) -> int:
        return int(START_TIME_MS + self.monotonic_ms() + self._offset_ms)

    def monotonic_ms(self) -> float:
        return self._network.now_ms * self._rate


class Machine(MemoryLoop):
    """One process. `on_power_cut` is called when its disk took the power away; `after_turn` when a turn has ended well.

    Its clocks outlive it: `MachineNetwork` gives the next machine of that name the same error and rate.
    """

    def __init__(self, network: MachineNetwork, name: str, clock_rate: float) -> None:
        super().__init__(network, name)
        self.clock = DriftingClock(network, clock_rate)
        self._clock_rate = clock_rate
        self.on_power_cut: Callable[[], None] = _refuse_to_lose_power
        self.after_turn: Callable[[], None] | None = None

    def call_later(self, delay_ms: float, callback: Callable[[], None]) -> MemoryTimer:
        """In `delay_ms` by the clock of the machine."""
        if self._clock_rate != 1.0 and delay_ms > 0.0:
            delay_ms = delay_ms / self._clock_rate + ROUNDING_MS
        return super().call_later(delay_ms, callback)

    def turn(self, timers: list[MemoryTimer]) -> None:
        """One turn, unless the power goes in the middle of it."""
        try:
            super().turn(timers)
        except PowerCut:
            self.on_power_cut()
            return
        if self.after_turn is not None and not (self.is_closed or self.is_paused):
            self.after_turn()


class MachineNetwork(MemoryNetwork):
    """All machines of a run, and what is wrong with their clocks."""

    def __init__(self, rng: Random, *, delay_ms: tuple[float, float], clock_rate: Callable[[str], float]) -> None:
        """`clock_rate`: how fast the clocks of the machine of a name run; 1.0 is right."""
        super().__init__(rng, delay_ms=delay_ms)
        self._clock_rate = clock_rate
        self._clock_errors_ms: dict[str, float] = {}

    def machine(self, name: str) -> Machine:
        """A new machine; an earlier one of the name is closed."""
        if name in self.loops:
            raise AddressInUseError(f"A machine named {name!r} is running; close it first.", name=name)
        machine = Machine(self, name, self._clock_rate(name))
        machine.clock.step(self._clock_errors_ms.get(name, 0.0))
        self.loops[name] = machine
        return machine

    def is_clock_right(self, name: str) -> bool:
        """Whether the clocks of a machine, running or not, have shown the network's time so far."""
        return name not in self._clock_errors_ms and self._clock_rate(name) == 1.0

    def step_clock(self, name: str, by_ms: float) -> None:
        """Set the wall clock of a machine, running or not."""
        self._clock_errors_ms[name] = self._clock_errors_ms.get(name, 0.0) + by_ms
        if name in self.loops:
            self.loops[name].clock.step(by_ms)


def _refuse_to_lose_power() -> None:
    raise AssertionError("a machine without a disk lost its power")
