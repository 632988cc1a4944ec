"""Machines whose clocks run too fast or too slow, each at a rate of its own."""

from __future__ import annotations

from functools import partial
from random import Random

import msgspec
import pytest

from zrmq.client.link import LEASE_MARGIN
from zrmq.testing.simulation.network import MachineNetwork
from zrmq.testing.simulation.plan import draw_plan
from zrmq.testing.simulation.run import run_seed
from zrmq.testing.simulation.work import WorkPlan, draw_work
from zrmq.transport.memory import START_TIME_MS

RATES = {"fast": 1.1, "right": 1.0, "slow": 0.9}


@pytest.fixture
def network() -> MachineNetwork:
    return MachineNetwork(Random(1), delay_ms=(0.05, 0.3), clock_rate=RATES.__getitem__)


def test_a_timer_is_due_by_the_clock_of_its_machine(network: MachineNetwork) -> None:
    fired: list[tuple[str, float, float]] = []
    network.run_for(77.7)
    for name in RATES:
        machine = network.machine(name)
        began_ms = machine.clock.monotonic_ms()

        def fire(name: str = name, began_ms: float = began_ms) -> None:
            fired.append((name, network.now_ms, network.loops[name].clock.monotonic_ms() - began_ms))

        machine.call_later(1_000.0, fire)
        machine.call_soon_threadsafe(partial(machine.call_later, 0.0, fire))
    network.run_for(2_000.0)
    soon, later = fired[:3], fired[3:]
    assert all(now_ms == 77.7 for _, now_ms, _ in soon)
    assert [name for name, _, _ in later] == ["fast", "right", "slow"]
    assert [round(now_ms - 77.7) for _, now_ms, _ in later] == [909, 1000, 1111]
    assert all(1_000.0 <= passed_ms < 1_000.001 for _, _, passed_ms in later), "never early by its own clock"


def test_both_clocks_of_a_machine_go_on_wrong_after_a_restart(network: MachineNetwork) -> None:
    network.machine("fast")
    network.step_clock("fast", -5_000.0)
    network.run_for(1_000.0)
    network.loops["fast"].close()
    network.run_for(1_000.0)
    clock = network.machine("fast").clock
    assert clock.monotonic_ms() == pytest.approx(2_200.0)
    assert clock.time_ms() == pytest.approx(START_TIME_MS + 2_200 - 5_000, abs=1.0)


def test_drawn_clocks_are_as_unlike_as_leases_bear() -> None:
    drifts = {draw_work(seed).clock_drift for seed in range(1, 500)}
    assert 0.0 in drifts
    assert max(drifts) == 0.1
    assert (1 + max(drifts)) / (1 - max(drifts)) < 1 / LEASE_MARGIN


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(1, 5))
def test_every_promise_is_kept_with_clocks_that_run_unlike(seed: int) -> None:
    plan = draw_plan(seed, has_work=False)
    run_seed(seed, plan=msgspec.structs.replace(plan, work=WorkPlan(clock_drift=0.1)))
