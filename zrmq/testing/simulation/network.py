"""The virtual network of a run: `MemoryNetwork` whose loops are machines that may lose their power in the middle of a turn."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zrmq.errors import AddressInUseError
from zrmq.testing.files import PowerCut
from zrmq.transport.memory import MemoryLoop, MemoryNetwork, MemoryTimer


class Machine(MemoryLoop):
    """One process. `on_power_cut` is called when its disk took the power away; `after_turn` when a turn has ended well.

    Its wall clock outlives it: `MachineNetwork` gives the next machine of that name the same error.
    """

    def __init__(self, network: MachineNetwork, name: str) -> None:
        super().__init__(network, name)
        self.on_power_cut: Callable[[], None] = _refuse_to_lose_power
        self.after_turn: Callable[[], None] | None = None

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

    def __init__(self, rng: Random, *, delay_ms: tuple[float, float]) -> None:
        super().__init__(rng, delay_ms=delay_ms)
        self._clock_errors_ms: dict[str, float] = {}

    def machine(self, name: str) -> Machine:
        """A new machine; an earlier one of the name is closed."""
        if name in self.loops:
            raise AddressInUseError(f"A machine named {name!r} is running; close it first.", name=name)
        machine = Machine(self, name)
        machine.clock.step(self._clock_errors_ms.get(name, 0.0))
        self.loops[name] = machine
        return machine

    def step_clock(self, name: str, by_ms: float) -> None:
        """Set the wall clock of a machine, running or not."""
        self._clock_errors_ms[name] = self._clock_errors_ms.get(name, 0.0) + by_ms
        if name in self.loops:
            self.loops[name].clock.step(by_ms)


def _refuse_to_lose_power() -> None:
    raise AssertionError("a machine without a disk lost its power")
