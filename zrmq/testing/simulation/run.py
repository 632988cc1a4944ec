"""One run: build the world of a seed, let things go wrong for a while, heal it, and check that every promise was kept."""

from __future__ import annotations

import msgspec

from zrmq.routing.core import START_GRACE_MS
from zrmq.routing.route_table import GONE_AFTER_MS
from zrmq.testing.simulation.checks import check_accounts, check_bounds, check_probes, find_trouble
from zrmq.testing.simulation.faults import FaultMaker
from zrmq.testing.simulation.log_lines import captured_logs
from zrmq.testing.simulation.plan import Plan, draw_plan
from zrmq.testing.simulation.trace import EVENTS_KEPT, BrokenPromise, SimulationError, Trace
from zrmq.testing.simulation.world import World

BOUNDS_MS = 250.0  # between two looks at the bounds
HEALTH_MS = 250.0
HEALTHY_MS_MAX = 90_000.0  # from the last fault until everything is well
PROBED_MS_MAX = 10_000.0  # and from there until everybody has got one message more of each queue: before a pull that waits ends
ROUTED_MS_MAX = START_GRACE_MS + GONE_AFTER_MS + 1_000.0  # until a NameServer that has just started tells the others' clients
SILENT = frozenset({"half_open", "cut", "pause", "slow_network", "late_delivery"})  # a connection may be dead for longer


class Result(msgspec.Struct, frozen=True):
    """What a run came to. `digest` is equal for two runs in which the same happened."""

    seed: int
    digest: str
    virtual_ms: float
    healed_ms: float  # from the last fault until everything was well
    counts: dict[str, int]  # events by kind


def run_seed(seed: int, *, events_kept: int = EVENTS_KEPT, plan: Plan | None = None) -> Result:
    """Run a seed, or a plan made from it. Raises `SimulationError` when a promise is broken."""
    trace = Trace(events_kept)
    plan = plan if plan is not None else draw_plan(seed)
    world = World(plan, trace)
    try:
        with captured_logs(world):
            healed_ms = _run(world)
    except BrokenPromise as broken:
        raise SimulationError(seed, broken.kind, broken.reason, _story(world)) from broken
    except Exception as fault:
        raise SimulationError(seed, "raised", f"{type(fault).__name__}: {fault}", _story(world)) from fault
    finally:
        world.end()
    trace.mix([(name, broker.check.watch.entries if broker.check else ()) for name, broker in world.brokers.items()])
    trace.mix(world.network.rng.getstate())
    trace.counts["overtaken"] = world.network.overtaken_count
    return Result(seed, trace.digest, world.network.now_ms, healed_ms, dict(trace.counts))


def _run(world: World) -> float:
    faults = FaultMaker(world)
    world.build()
    faults.start()
    _advance(world, world.plan.duration_ms)
    faults.stop()
    world.is_working = False
    for producer in world.producers:
        producer.is_working = False
    world.start_prober()
    healed_ms = _heal(world, faults, HEALTHY_MS_MAX)
    world.note("checks", "healthy", f"after {healed_ms:.0f} ms")
    world.probe()
    _heal(world, faults, _probed_ms_max(world.plan))
    check_probes(world)
    check_accounts(world)
    return healed_ms


def _heal(world: World, faults: FaultMaker, healthy_ms_max: float) -> float:
    """Let time pass until everything is well; return how much that was."""
    began_ms = world.network.now_ms
    while True:
        faults.repair()
        _fill_groups(world)
        _advance(world, HEALTH_MS)
        trouble = find_trouble(world)
        if not trouble:
            return world.network.now_ms - began_ms
        if world.network.now_ms - began_ms > healthy_ms_max:
            raise BrokenPromise("health", f"{healthy_ms_max:.0f} ms after the last fault: {trouble}")


def _probed_ms_max(plan: Plan) -> float:
    if SILENT & plan.faults.keys():
        return HEALTHY_MS_MAX
    return ROUTED_MS_MAX if "nameserver_crash" in plan.faults else PROBED_MS_MAX


def _advance(world: World, duration_ms: float) -> None:
    end_ms = world.network.now_ms + duration_ms
    while world.network.now_ms < end_ms:
        world.network.run_for(min(BOUNDS_MS, end_ms - world.network.now_ms))
        check_bounds(world)


def _fill_groups(world: World) -> None:
    """Every group has all its members in the end."""
    for group in world.groups:
        for slot in range(group.members):
            world.start_consumer(group, slot)


def _story(world: World) -> str:
    return "\n".join([
        f"repeat it with: python -m zrmq.testing.simulation --seed {world.plan.seed}",
        f"plan: {world.plan}",
        "the last events (virtual ms, who, what):",
        *world.trace.last,
    ])
