"""Loops and connections in memory, on one virtual clock and one thread, for tests and the simulator.

What it shows of the world is what ZeroMQ would show:

- A connection delivers in order, each message after a delay of its own, or breaks. Of what is under way when it breaks a random
  number of the oldest still arrives and the rest is lost; neither side is told which.
- A server may read what it was *held back* on a connection that is gone after what came by the one that replaced it: each has a
  pipe of its own, and a busy server reads them in any order.
- A client's end reconnects by itself, ever more slowly. Each time the server sees a new peer.
- A *cut* between two loops holds everything back. What was sent before it heals arrives late, unless TCP gave up first,
  after 9 to 12 s and at each side at a time of its own, so that one side may still believe in a connection that the other has
  replaced. A one-way cut ends connections just so, since TCP needs both ways.
- A *half-open* connection swallows everything, and is never told to be so, as behind a proxy. New connections work.
- A *paused* loop (SIGSTOP, a machine that sleeps) does nothing; its peers give up on it as on one behind a cut, though for a
  stopped process the kernel goes on answering. Resumed, it finds what arrived, and all timers that are due, in one turn.
- A closed loop (a crash) never runs again; its peers see their connections break.

Everything random comes from one `random.Random`: the same seed and the same calls give the same run.

    network = MemoryNetwork(random.Random(7))
    server, client = network.loop("broker"), network.loop("client")
    ...
    network.run_until(lambda: link.is_open)      # raises TimeoutError after 60 virtual seconds
    network.run_for(500)                         # virtual milliseconds

An exception of a callback leaves `run_until` and `run_for`: a test must not miss it.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

from zrmq.errors import AddressInUseError, ClosedError
from zrmq.protocol.limits import UNREAD_BYTES_MAX
from zrmq.transport.address import Address, parse_address, parse_connect_address
from zrmq.transport.circuit import Circuit
from zrmq.transport.interface import ConnectionListener, Frames, RequestHandler

START_TIME_MS = 1_700_000_000_000  # of every wall clock when the network is made
RECONNECT_MS = 200.0
RECONNECT_MS_MAX = 1_000.0
FREE_PORT_MIN = 49_152

Callback = Callable[[], None]


class MemoryClock:
    """The network's time as one loop sees it."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._offset_ms = 0.0

    def time_ms(self) -> int:
        """Wall clock: starts at `START_TIME_MS`, steps by `step`."""
        return int(START_TIME_MS + self._network.now_ms + self._offset_ms)

    def monotonic_ms(self) -> float:
        """The virtual time."""
        return self._network.now_ms

    def step(self, offset_ms: float) -> None:
        """The wall clock is set forward or, when negative, back."""
        self._offset_ms += offset_ms


class MemoryTimer:
    """A callback to come: of a loop, or of the network itself (loop None)."""

    __slots__ = ("callback", "loop")

    def __init__(self, loop: MemoryLoop | None, callback: Callback) -> None:
        self.loop = loop
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None

    def fire(self) -> None:
        """Call, unless cancelled; at most once."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class MemoryNetwork:
    """The world: virtual time, everybody's loops, and the faults between them. Loops are named; a name may be used again when its
    loop is closed (a restart)."""

    def __init__(self, rng: Random, *, delay_ms: tuple[float, float] = (0.05, 0.3)) -> None:
        """`delay_ms`: the shortest and longest time a message takes."""
        self.now_ms = 0.0
        self.rng = rng
        self.delay_ms = delay_ms
        self.loops: dict[str, MemoryLoop] = {}
        self.endpoints: dict[str, MemoryEndpoint] = {}
        self.circuits: dict[int, Circuit] = {}  # in the order made, so that a seed gives one run
        self.overtaken_count = 0  # messages that a server got after one of a newer connection of the same client
        self._cuts: set[tuple[str, str]] = set()
        self._events: list[tuple[float, int, MemoryTimer]] = []
        self._numbers = count(1)
        self._ports = count(FREE_PORT_MIN)

    # --- running ----------------------------------------------------------------------------------------------------

    def loop(self, name: str) -> MemoryLoop:
        """A new loop."""
        if name in self.loops:
            raise AddressInUseError(f"A loop named {name!r} is running; close it first.", name=name)
        self.loops[name] = MemoryLoop(self, name)
        return self.loops[name]

    def run_until(self, condition: Callable[[], bool], limit_ms: float = 60_000.0) -> None:
        """Run until the condition holds; it is asked after every turn. Raises `TimeoutError` after `limit_ms` of virtual time."""
        end_ms = self.now_ms + limit_ms
        while not condition():
            due_ms = self._next_ms()
            if due_ms is None or due_ms > end_ms:
                raise TimeoutError(f"The condition did not hold within {limit_ms:g} virtual ms.")
            self._step(due_ms)

    def run_for(self, duration_ms: float) -> None:
        """Run for that much virtual time."""
        end_ms = self.now_ms + duration_ms
        while (due_ms := self._next_ms()) is not None and due_ms <= end_ms:
            self._step(due_ms)
        self.now_ms = end_ms

    def schedule(self, loop: MemoryLoop | None, delay_ms: float, callback: Callback) -> MemoryTimer:
        """Call in a turn of the loop, or, for None, between turns: what happens in the network itself, or a test's fault."""
        timer = MemoryTimer(loop, callback)
        self.put(timer, delay_ms)
        return timer

    def put(self, timer: MemoryTimer, delay_ms: float) -> None:
        """Fire the timer in `delay_ms`, behind what is due then already."""
        heappush(self._events, (self.now_ms + max(0.0, delay_ms), next(self._numbers), timer))

    def _next_ms(self) -> float | None:
        while self._events and self._events[0][2].callback is None:
            heappop(self._events)
        return self._events[0][0] if self._events else None

    def _step(self, due_ms: float) -> None:
        """Everything due at that time: each loop that has something takes one turn."""
        self.now_ms = max(self.now_ms, due_ms)
        ready: dict[MemoryLoop, list[MemoryTimer]] = {}
        while self._events and self._events[0][0] <= self.now_ms:
            timer = heappop(self._events)[2]
            if timer.loop is None:
                timer.fire()
            else:
                ready.setdefault(timer.loop, []).append(timer)
        for loop, timers in ready.items():
            loop.turn(timers)

    def draw_delay_ms(self) -> float:
        """How long the next message takes."""
        return self.rng.uniform(*self.delay_ms)

    # --- faults -----------------------------------------------------------------------------------------------------

    def cut(self, name: str, other: str, *, one_way: bool = False) -> None:
        """Nothing passes between the loops of these names any more, or, `one_way`, from the first to the second."""
        self._cuts.add((name, other))
        if not one_way:
            self._cuts.add((other, name))
        for circuit in self._between(name, other):
            circuit.fall_mute()

    def heal(self, name: str, other: str) -> None:
        """Undo `cut`, both ways. What connections hold back arrives now, if they still exist."""
        self._cuts.discard((name, other))
        self._cuts.discard((other, name))
        for circuit in self._between(name, other):
            circuit.speak_again()

    def is_cut(self, name: str, other: str) -> bool:
        """Whether nothing passes from the first to the second."""
        return (name, other) in self._cuts

    def break_connections(self, name: str, other: str) -> None:
        """All connections between the two break now; both sides are told soon."""
        for circuit in self._between(name, other):
            circuit.break_now()

    def hold_back(self, name: str, other: str, late_ms: float) -> None:
        """What clients send by the present connections between the two takes `late_ms` at least: when these break before, it
        may arrive after what is sent by the next ones."""
        for circuit in self._between(name, other):
            circuit.hold_back(late_ms)

    def half_open(self, name: str, other: str) -> None:
        """All present connections between the two swallow everything from now on, and nobody is ever told."""
        for circuit in self._between(name, other):
            circuit.is_dead = True
            circuit.to_server.lose_all()
            circuit.to_client.lose_all()

    def _between(self, name: str, other: str) -> list[Circuit]:
        pair = {name, other}
        return [circuit for circuit in self.circuits.values() if {circuit.client.name, circuit.server.name} == pair]

    # --- for the parts below ----------------------------------------------------------------------------------------

    def claim(self, address: Address) -> str:
        """The address to listen on, with a port for port 0."""
        if address.scheme == "tcp" and address.port == 0:
            address = Address("tcp", address.place, next(self._ports))
        if str(address) in self.endpoints:
            raise AddressInUseError(
                f"Somebody listens on {address} already; stop it or use another address.", address=str(address)
            )
        return str(address)

    def draw_number(self) -> int:
        """A number nobody else has."""
        return next(self._numbers)


class MemoryLoop:
    """One process: implements `zrmq.transport.interface.Loop`."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.network = network
        self.name = name
        self.clock = MemoryClock(network)
        self.is_closed = False
        self.is_paused = False
        self._hooks: list[Callback] = []
        self._held: list[MemoryTimer] = []
        self._sockets: list[MemoryConnection | MemoryEndpoint] = []

    @property
    def has_ended(self) -> bool:
        return self.is_closed

    def call_later(self, delay_ms: float, callback: Callback) -> MemoryTimer:
        return self.network.schedule(self, delay_ms, callback)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        self._check_open()
        self.network.schedule(self, 0.0, callback)

    def before_sleep(self, callback: Callback) -> None:
        self._hooks.append(callback)

    def connect(self, address: str, listener: ConnectionListener) -> MemoryConnection:
        return self._connect(address, listener, "router")

    def connect_push(self, address: str) -> MemoryConnection:
        return self._connect(address, None, "pull")

    def listen(self, address: str, handler: RequestHandler) -> MemoryEndpoint:
        return self._listen(address, handler, "router")

    def listen_pull(self, address: str, handler: RequestHandler) -> MemoryEndpoint:
        return self._listen(address, handler, "pull")

    def pause(self) -> None:
        """Stand still. Only between turns: from a test, or `network.schedule(None, ...)`."""
        self.is_paused = True
        for circuit in self._circuits():
            circuit.fall_mute()

    def resume(self) -> None:
        """Go on, with everything that came meanwhile."""
        self.is_paused = False
        held, self._held = self._held, []
        for timer in held:
            self.network.put(timer, 0.0)
        for circuit in self._circuits():
            circuit.speak_again()

    def close(self) -> None:
        """End for good, like a killed process."""
        if not self.is_closed:
            self.is_closed = True
            for socket in list(self._sockets):
                socket.close()
            del self.network.loops[self.name]

    def turn(self, timers: list[MemoryTimer]) -> None:
        """Call what is due, then the hooks. For the network."""
        if self.is_paused:
            self._held.extend(timers)
            return
        for timer in timers:
            if not self.is_closed:
                timer.fire()
        for hook in self._hooks:
            if not self.is_closed:
                hook()

    def forget(self, socket: MemoryConnection | MemoryEndpoint) -> None:
        """The socket was closed."""
        self._sockets.remove(socket)

    def _connect(self, address: str, listener: ConnectionListener | None, kind: str) -> MemoryConnection:
        self._check_open()
        connection = MemoryConnection(self, str(parse_connect_address(address)), listener, kind)
        self._sockets.append(connection)
        return connection

    def _listen(self, address: str, handler: RequestHandler, kind: str) -> MemoryEndpoint:
        self._check_open()
        endpoint = MemoryEndpoint(self, self.network.claim(parse_address(address)), handler, kind)
        self._sockets.append(endpoint)
        return endpoint

    def _check_open(self) -> None:
        if self.is_closed:
            raise ClosedError(f"The loop {self.name!r} has ended; make a new one.", name=self.name)

    def _circuits(self) -> list[Circuit]:
        return [circuit for circuit in self.network.circuits.values() if self in (circuit.client, circuit.server)]


class MemoryConnection:
    """A client's end: implements `Connection`."""

    def __init__(self, loop: MemoryLoop, address: str, listener: ConnectionListener | None, kind: str) -> None:
        self.loop = loop
        self.address = address
        self.listener = listener
        self._kind = kind
        self._circuit: Circuit | None = None
        self._is_established = False
        self._is_closed = False
        self._attempts = 0
        self._retry = loop.network.schedule(None, loop.network.draw_delay_ms(), self._attempt)

    def send(self, frames: Frames) -> bool:
        if self._circuit is None or not self._is_established:
            return False
        return self._circuit.to_server.send(frames)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._is_established = False
        self._retry.cancel()
        self.loop.forget(self)
        if self._circuit is not None:
            self._circuit.close_client()

    def _attempt(self) -> None:
        network = self.loop.network
        endpoint = network.endpoints.get(self.address)
        if endpoint is None or not self._reaches(endpoint):
            pause_ms = min(RECONNECT_MS * 2.0 ** min(self._attempts, 10), RECONNECT_MS_MAX)
            self._attempts += 1
            self._retry = network.schedule(None, pause_ms * network.rng.uniform(0.5, 1.0), self._attempt)
            return
        self._attempts = 0
        self._circuit = circuit = Circuit(self, endpoint)
        network.schedule(self.loop, network.draw_delay_ms(), lambda: self._establish(circuit))

    def _reaches(self, endpoint: MemoryEndpoint) -> bool:
        network, here, there = self.loop.network, self.loop, endpoint.loop
        is_cut = network.is_cut(here.name, there.name) or network.is_cut(there.name, here.name)
        return endpoint.kind == self._kind and not (is_cut or here.is_paused or there.is_paused)

    def _establish(self, circuit: Circuit) -> None:
        if self._circuit is circuit and not self._is_closed:
            self._is_established = True
            if self.listener is not None:
                self.listener.on_connected()

    def receive(self, circuit: Circuit, frames: list[bytes]) -> None:
        """A message arrived."""
        if self._circuit is circuit and not self._is_closed and self.listener is not None:
            self.listener.on_frames(frames)

    def lose(self, circuit: Circuit) -> None:
        """The circuit is gone."""
        if self._circuit is not circuit or self._is_closed:
            return
        was_established, self._is_established = self._is_established, False
        self._circuit = None
        network = self.loop.network
        self._retry = network.schedule(None, RECONNECT_MS * network.rng.uniform(0.5, 1.0), self._attempt)
        if was_established and self.listener is not None:
            self.listener.on_disconnected()


class MemoryEndpoint:
    """A server's end: implements `Endpoint`. `unreachable_count` counts sends to peers that are gone or full."""

    def __init__(self, loop: MemoryLoop, address: str, handler: RequestHandler, kind: str) -> None:
        self.loop = loop
        self.address = address
        self.kind = kind
        self.unreachable_count = 0
        self._handler = handler
        self._peers: dict[bytes, Circuit] = {}
        self._newest: dict[str, int] = {}  # by the client's name: the number of the newest circuit it was heard by
        self._is_closed = False
        loop.network.endpoints[address] = self

    def send(self, peer: bytes, frames: Frames) -> bool:
        circuit = self._peers.get(peer)
        if circuit is not None and circuit.to_client.send(frames):
            return True
        self.unreachable_count += 1
        return False

    def has_room(self, peer: bytes) -> bool:
        circuit = self._peers.get(peer)
        return circuit is None or circuit.to_client.size_bytes < UNREAD_BYTES_MAX

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        del self.loop.network.endpoints[self.address]
        self.loop.forget(self)
        peers, self._peers = self._peers, {}
        for circuit in peers.values():
            circuit.close_server()

    def accept(self, circuit: Circuit) -> None:
        """A client connected. As with ZeroMQ nobody is told before it sends something."""
        self._peers[circuit.peer] = circuit

    def receive(self, circuit: Circuit, frames: list[bytes]) -> None:
        """A message arrived."""
        if not self._is_closed:
            newest = self._newest.get(circuit.client.name, 0)
            if circuit.number < newest:
                self.loop.network.overtaken_count += 1
            else:
                self._newest[circuit.client.name] = circuit.number
            self._handler(circuit.peer if self.kind == "router" else b"", frames)

    def lose(self, circuit: Circuit) -> None:
        """A client's connection is gone."""
        self._peers.pop(circuit.peer, None)
