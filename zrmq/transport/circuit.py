"""A connection in memory: two streams of messages under way, and which of its sides still believe in it. Part of `memory.py`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from zrmq.protocol.limits import MESSAGE_BYTES_MAX
from zrmq.transport.interface import Frames

if TYPE_CHECKING:
    from zrmq.transport.memory import MemoryConnection, MemoryEndpoint, MemoryLoop

UNANSWERED_MS_MAX = 9_000.0  # as in options.py
KEEPALIVE_INTERVAL_MS = 3_000.0
PIPE_MESSAGES_MAX = 10_000  # under way in one direction; then send() is False


class Circuit:
    """One connection that was made: two streams, and which of its sides still believe in it."""

    def __init__(self, connection: MemoryConnection, endpoint: MemoryEndpoint) -> None:
        self.network = connection.loop.network
        self.client, self.server = connection.loop, endpoint.loop
        self.is_dead = False  # half-open: swallows everything, the news of its end included
        self._connection, self._endpoint = connection, endpoint
        self._client_believes = self._server_believes = True
        self._silence = 0  # counts the times it fell mute, so that an old one's end is recognised
        self.number = number = self.network.draw_number()  # greater than those of all earlier ones
        self.peer = b"\0" + number.to_bytes(8, "big")
        self.to_server = Stream(self, self.client, self.server, lambda frames: endpoint.receive(self, frames))
        self.to_client = Stream(self, self.server, self.client, lambda frames: connection.receive(self, frames))
        self.network.circuits[number] = self
        endpoint.accept(self)

    def break_now(self) -> None:
        """Gone for both sides, which hear of it after what still arrives."""
        self._tell_client()
        self._tell_server()

    def hold_back(self, late_ms: float) -> None:
        """What the client sends from now on takes `late_ms` at least, whatever becomes of the connection meanwhile."""
        self.to_server.hold_back(late_ms)

    def close_client(self) -> None:
        """The client's end was closed."""
        self._client_believes = False
        self.to_client.lose_all()
        self._tell_server()

    def close_server(self) -> None:
        """The server's end was closed."""
        self._server_believes = False
        self.to_server.lose_all()
        self._tell_client()

    def fall_mute(self) -> None:
        """Nothing passes any more: each side that is awake gives up when its time is over, unless something passes again."""
        self._silence += 1
        silence = self._silence
        for give_up in (self._give_up_client, self._give_up_server):
            wait_ms = UNANSWERED_MS_MAX + self.network.rng.uniform(0.0, KEEPALIVE_INTERVAL_MS)
            self.network.schedule(None, wait_ms, lambda give_up=give_up: give_up(silence))  # type: ignore[misc]

    def speak_again(self) -> None:
        """Nothing stands in the way any more, or less does."""
        if self._is_blocked():
            return
        self._silence += 1
        self.to_server.flow()
        self.to_client.flow()
        if not self._client_believes:
            self._tell_server()
        if not self._server_believes:
            self._tell_client()

    def _is_blocked(self) -> bool:
        cut = self.network.is_cut(self.client.name, self.server.name) or self.network.is_cut(self.server.name, self.client.name)
        return cut or self.is_dead or self.client.is_paused or self.server.is_paused

    def _give_up_client(self, silence: int) -> None:
        if silence == self._silence and self._client_believes and not self.client.is_paused:
            self._client_believes = False
            self.to_client.lose_all()
            self.network.schedule(self.client, 0.0, self._end_client)
            self._tell_server()

    def _give_up_server(self, silence: int) -> None:
        if silence == self._silence and self._server_believes and not self.server.is_paused:
            self._server_believes = False
            self.to_server.lose_all()
            self.network.schedule(self.server, 0.0, self._end_server)
            self._tell_client()

    def _tell_client(self) -> None:
        """The news of the end travels behind what is under way."""
        arrives_ms = self.to_client.end()
        if self._client_believes and not self.is_dead and not self.network.is_cut(self.server.name, self.client.name):
            self.network.schedule(self.client, arrives_ms, self._end_client)
        self._forget_if_over()

    def _tell_server(self) -> None:
        arrives_ms = self.to_server.end()
        if self._server_believes and not self.is_dead and not self.network.is_cut(self.client.name, self.server.name):
            self.network.schedule(self.server, arrives_ms, self._end_server)
        self._forget_if_over()

    def _end_client(self) -> None:
        self._client_believes = False
        self._connection.lose(self)
        self._forget_if_over()

    def _end_server(self) -> None:
        self._server_believes = False
        self._endpoint.lose(self)
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        if not (self._client_believes or self._server_believes):
            self.network.circuits.pop(self.number, None)


class Stream:
    """One direction of a circuit: messages under way, in order."""

    def __init__(
        self, circuit: Circuit, sender: MemoryLoop, receiver: MemoryLoop, deliver: Callable[[list[bytes]], None]
    ) -> None:
        self._circuit = circuit
        self._network = circuit.network
        self._sender, self._receiver = sender, receiver
        self._deliver = deliver
        self._under_way: deque[tuple[float, list[bytes]]] = deque()  # when it is due, and what
        self._due_ms = 0.0
        self._is_ended = False

    def send(self, frames: Frames) -> bool:
        """Put a message on its way. False: too many are."""
        if len(self._under_way) >= PIPE_MESSAGES_MAX:
            return False
        if self._is_ended or self._circuit.is_dead:
            return True
        message = [bytes(frame) for frame in frames]
        if any(len(frame) > MESSAGE_BYTES_MAX for frame in message):
            self._circuit.break_now()  # libzmq cuts the connection without a word
            return True
        now_ms = self._network.now_ms
        self._due_ms = max(self._due_ms, now_ms + self._network.draw_delay_ms())
        self._under_way.append((self._due_ms, message))
        self._network.schedule(self._receiver, self._due_ms - now_ms, self._arrive)
        return True

    def hold_back(self, late_ms: float) -> None:
        """What is sent from now on arrives in `late_ms` at the earliest."""
        self._due_ms = max(self._due_ms, self._network.now_ms + late_ms)

    @property
    def size_bytes(self) -> int:
        """Of all that is under way."""
        return sum(len(frame) for _, message in self._under_way for frame in message)

    def flow(self) -> None:
        """What was held back may pass: arrives now."""
        for due_ms, _ in self._under_way:
            if due_ms <= self._network.now_ms:
                self._network.schedule(self._receiver, 0.0, self._arrive)

    def lose_all(self) -> None:
        """Nobody reads it any more."""
        self._under_way.clear()

    def end(self) -> float:
        """Nothing more can be sent. Decides how much of what is under way arrives; returns in how many ms the last of it does."""
        if not self._is_ended:
            self._is_ended = True
            arrived = sum(due_ms <= self._network.now_ms for due_ms, _ in self._under_way) if not self._is_cut() else 0
            kept = self._network.rng.randint(arrived, len(self._under_way))
            while len(self._under_way) > kept:
                self._under_way.pop()
        last_ms = self._under_way[-1][0] if self._under_way else 0.0
        return max(last_ms - self._network.now_ms, 0.0) + self._network.draw_delay_ms()

    def _is_cut(self) -> bool:
        return self._network.is_cut(self._sender.name, self._receiver.name)

    def _arrive(self) -> None:
        # One call is scheduled for each message. A cut makes calls come to nothing; `flow` makes up for them.
        if self._under_way and self._under_way[0][0] <= self._network.now_ms and not self._is_cut():
            self._deliver(self._under_way.popleft()[1])
