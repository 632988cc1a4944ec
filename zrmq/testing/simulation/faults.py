"""What goes wrong: one method per kind of fault, each drawn at the rate the plan gives it, until `stop` heals everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from zrmq.testing.simulation.disk_faults import DiskFaults
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.servers import VirtualBroker
from zrmq.testing.simulation.world import World
from zrmq.transport.memory import MemoryLoop

DOWN_MS = (50.0, 6_000.0)  # how long a server stays down
LATE_MS = (300.0, 8_000.0)  # how late messages of a connection arrive that breaks within that time
CUT_MS = (100.0, 14_000.0)
PAUSE_MS = (50.0, 14_000.0)  # longer than any session timeout, sometimes
SLOW_MS = (200.0, 5_000.0)
NETWORK_DELAY_MS = (20.0, 1_500.0)  # the longest a message takes while the network is slow
DISK_SLOWNESS = (10.0, 500.0)
CLOCK_STEP_MS = 60_000.0
CHANGES_MAX = 60  # changes of the disk until a torn write ends the machine


class FaultMaker:
    """Breaks a world by the dice of its seed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._network = world.network
        self._rng = Random(f"{world.plan.seed} faults")
        self._is_stopped = False
        self._heals: dict[int, Callable[[], None]] = {}
        self._numbers = 0
        self._kinds: dict[str, Callable[[], None]] = {
            "broker_power_cut": self._cut_power,
            "broker_torn_write": self._tear_write,
            "broker_kill": self._kill_broker,
            "broker_restart": self._restart_broker,
            "nameserver_crash": self._crash_nameserver,
            "break_connections": self._break_connections,
            "late_delivery": self._deliver_late,
            "cut": self._cut,
            "half_open": self._half_open,
            "pause": self._pause,
            "slow_network": self._slow_network,
            "slow_disk": self._slow_disk,
            "full_disk": self._fill_disk,
            "failing_disk": self._fail_disk,
            "producer_crash": self._crash_producer,
            "consumer_crash": self._crash_consumer,
            "consumer_leave": self._leave_consumer,
            "consumer_join": self._join_consumer,
            "clock_step": self._step_clock,
        }
        self._disks = DiskFaults(world, self._for_a_while)
        self._kinds |= self._disks.kinds

    def start(self) -> None:
        """From here on things go wrong."""
        for kind in self._world.plan.faults:
            self._plan_next(kind)

    def stop(self) -> None:
        """Nothing goes wrong any more, and what is broken is repaired now."""
        self._is_stopped = self._disks.is_stopped = True
        self._world.note("faults", "stopped")
        for heal in list(self._heals.values()):
            heal()
        self.repair()

    def repair(self) -> None:
        """Start what is down."""
        for nameserver in self._world.nameservers:
            if nameserver.machine is None:
                nameserver.start()
        for broker in self._world.brokers.values():
            if broker.machine is None:
                broker.start()

    def _plan_next(self, kind: str) -> None:
        self._world.later(self._rng.expovariate(1.0 / self._world.plan.faults[kind]), partial(self._strike, kind))

    def _strike(self, kind: str) -> None:
        if not self._is_stopped:
            self._kinds[kind]()
            self._plan_next(kind)

    def _for_a_while(self, span_ms: tuple[float, float], heal: Callable[[], None]) -> None:
        """Repair what was just broken after a time, or when everything is repaired."""
        self._numbers += 1
        number = self._numbers
        self._heals[number] = partial(self._heal, number, heal)
        least, most = span_ms
        self._world.later(least * (most / least) ** self._rng.random(), partial(self._heal, number, heal))

    def _heal(self, number: int, heal: Callable[[], None]) -> None:
        if self._heals.pop(number, None) is not None:
            heal()

    # --- servers ------------------------------------------------------------------------------------------------------

    def _broker(self) -> VirtualBroker | None:
        up = [broker for broker in self._world.brokers.values() if broker.machine is not None and not broker.machine.is_paused]
        return self._rng.choice(up) if up else None

    def _down(self, broker: VirtualBroker) -> None:
        self._for_a_while(DOWN_MS, lambda: broker.start() if broker.machine is None else None)

    def _cut_power(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.lose_power()
            self._down(broker)

    def _tear_write(self) -> None:
        broker = self._broker()
        if broker is not None:
            self._world.note(broker.name, "power_will_go")
            broker.files.cut_power_after(self._rng.randrange(CHANGES_MAX))
            self._for_a_while(DOWN_MS, partial(self._start_torn, broker, broker.machine))

    def _start_torn(self, broker: VirtualBroker, machine: Machine | None) -> None:
        if machine is not None and broker.machine is machine:
            broker.lose_power()  # it has not come to that many changes
        if broker.machine is None:
            broker.start()

    def _kill_broker(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.kill()
            self._down(broker)

    def _restart_broker(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.stop()
            self._down(broker)

    def _crash_nameserver(self) -> None:
        nameserver = self._rng.choice(self._world.nameservers)
        if nameserver.machine is not None and not nameserver.machine.is_paused:
            nameserver.crash()
            self._for_a_while(DOWN_MS, lambda: nameserver.start() if nameserver.machine is None else None)

    # --- the network --------------------------------------------------------------------------------------------------

    def _two(self) -> tuple[str, str]:
        """A server, and somebody it may talk to."""
        servers = [nameserver.name for nameserver in self._world.nameservers] + list(self._world.brokers)
        server = self._rng.choice(servers)
        others = [name for name in self._network.loops if name != server]
        return server, self._rng.choice(others) if others else server

    def _break_connections(self) -> None:
        server, other = self._two()
        self._world.note("faults", "broke_connections", f"{server} {other}")
        self._network.break_connections(server, other)

    def _deliver_late(self) -> None:
        circuits = list(self._network.circuits.values())
        if not circuits:
            return
        circuit = self._rng.choice(circuits)
        server, other = circuit.server.name, circuit.client.name
        least, most = LATE_MS
        late_ms = least * (most / least) ** self._rng.random()
        self._world.note("faults", "delivers_late", f"{server} {other} {late_ms:.0f} ms")
        self._network.hold_back(server, other, late_ms)
        self._for_a_while((0.01 * late_ms, 0.9 * late_ms), partial(self._network.break_connections, server, other))

    def _cut(self) -> None:
        server, other = self._two()
        if self._network.is_cut(server, other) or self._network.is_cut(other, server):
            return
        one_way = self._rng.random() < 0.3
        pair = (server, other) if self._rng.random() < 0.5 else (other, server)
        self._world.note("faults", "cut", f"{pair[0]} {pair[1]}{' one way' if one_way else ''}")
        self._network.cut(*pair, one_way=one_way)
        self._for_a_while(CUT_MS, partial(self._mend, *pair))

    def _mend(self, name: str, other: str) -> None:
        self._world.note("faults", "mended", f"{name} {other}")
        self._network.heal(name, other)

    def _half_open(self) -> None:
        server, other = self._two()
        self._world.note("faults", "half_open", f"{server} {other}")
        self._network.half_open(server, other)

    def _slow_network(self) -> None:
        if self._network.delay_ms != self._world.plan.delay_ms:
            return
        least, most = NETWORK_DELAY_MS
        delay_ms = least * (most / least) ** self._rng.random()
        self._world.note("faults", "slow_network", f"{delay_ms:.0f} ms")
        self._network.delay_ms = (0.05, delay_ms)
        self._for_a_while(SLOW_MS, self._speed_up)

    def _speed_up(self) -> None:
        self._network.delay_ms = self._world.plan.delay_ms

    # --- machines -----------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        loop = self._network.loops[self._rng.choice(list(self._network.loops))]
        if not loop.is_paused:
            self._world.note(loop.name, "paused")
            loop.pause()
            self._for_a_while(PAUSE_MS, partial(self._resume, loop))

    def _resume(self, loop: MemoryLoop) -> None:
        if not loop.is_closed:
            self._world.note(loop.name, "resumed")
            loop.resume()

    def _slow_disk(self) -> None:
        broker = self._broker()
        if broker is not None and broker.slowness == 1.0:
            least, most = DISK_SLOWNESS
            broker.slowness = least * (most / least) ** self._rng.random()
            self._world.note(broker.name, "slow_disk", f"{broker.slowness:.0f}")
            self._for_a_while(SLOW_MS, partial(setattr, broker, "slowness", 1.0))

    def _fill_disk(self) -> None:
        broker = self._broker()
        if broker is not None and broker.files.capacity_bytes is None:
            room_bytes = self._rng.randrange(4 * self._world.plan.segment_bytes)
            self._world.note(broker.name, "full_disk", f"{room_bytes}")
            broker.files.capacity_bytes = broker.files.used_bytes + room_bytes
            self._for_a_while(SLOW_MS, partial(setattr, broker.files, "capacity_bytes", None))

    def _fail_disk(self) -> None:
        """A flush fails. The broker takes nothing more, and somebody starts it again in a while."""
        broker = self._broker()
        if broker is not None:
            self._world.note(broker.name, "failing_disk")
            broker.files.fail(self._rng.choice(("fdatasync", "pwritev", "commit", "rename", "fsync_dir")))
            self._for_a_while(SLOW_MS, partial(self._restart_failed, broker, broker.machine))

    def _restart_failed(self, broker: VirtualBroker, machine: Machine | None) -> None:
        if machine is not None and broker.machine is machine:
            broker.kill()
            broker.start()

    def _step_clock(self) -> None:
        name = self._rng.choice(list(self._network.loops))
        by_ms = self._rng.choice((-1, 1)) * CLOCK_STEP_MS * self._rng.random() ** 3
        self._world.note(name, "clock_stepped", f"{by_ms:.0f} ms")
        self._network.step_clock(name, by_ms)

    # --- clients ------------------------------------------------------------------------------------------------------

    def _crash_producer(self) -> None:
        up = [producer for producer in self._world.producers if not producer.machine.is_closed]
        if up:
            producer = self._rng.choice(up)
            producer.crash()
            self._for_a_while(DOWN_MS, partial(self._world.start_producer, producer.name))

    def _crash_consumer(self) -> None:
        if self._world.consumers:
            consumer = self._rng.choice(self._world.consumers)
            self._world.crash_consumer(consumer)
            self._for_a_while(DOWN_MS, partial(self._world.start_consumer, consumer.group, consumer.slot))

    def _leave_consumer(self) -> None:
        staying = [consumer for consumer in self._world.consumers if not consumer.is_leaving and not consumer.machine.is_paused]
        if staying:
            consumer = self._rng.choice(staying)
            consumer.leave()
            self._for_a_while(DOWN_MS, partial(self._world.start_consumer, consumer.group, consumer.slot))

    def _join_consumer(self) -> None:
        group = self._rng.choice(self._world.plan.groups)
        self._world.start_consumer(group, self._rng.randrange(group.members))
