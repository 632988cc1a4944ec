"""The client's side of a peer: what every session can do, for the parts that `benchmarks.player` plays."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from zrmq.cli.bench_players import Spec, pace
from zrmq.clock import SystemClock

PIPELINE = 1_000  # messages a request or a read, as a zrmq batch holds at most
UNACKNOWLEDGED_MAX = 16 * PIPELINE  # as a zrmq producer has in flight
IDLE_S_MAX = 30.0  # nothing for so long: something is wrong
GROUP = "bench"
TAG, KEY, SITE = "kitchen", "device-7", "north"  # what `tagged` puts on each message

STAMP = struct.Struct("<d")
Result = TypeVar("Result")


class Session:
    """A connection to a server, for one topic (stream, queue, tube). One thread. Errors end the benchmark."""

    def __init__(self, spec: Spec) -> None:
        host, _, port = spec.address.partition(":")
        self.host, self.port = host, int(port)
        self.topic = spec.topic
        self.body = bytes(spec.body_bytes)
        self.clock = SystemClock()

    def prepare(self) -> None:
        """Make the topic, and what reads it from the first message on."""

    def discard(self) -> None:
        """Delete the topic with all that is in it."""

    def close(self) -> None:
        """End the connection."""

    def publish(self, count: int, *, tagged: bool) -> None:
        """Send so many as fast as it goes; all are acknowledged at return."""
        raise NotImplementedError

    def send_timed(self, count: int) -> list[float]:
        """Send one after the other, each acknowledged before the next; how long each took, in milliseconds."""
        took_ms = []
        for _ in range(count):
            began_ms = self.clock.monotonic_ms()
            self.send(self.body)
            took_ms.append(self.clock.monotonic_ms() - began_ms)
        return took_ms

    def send(self, body: bytes) -> None:
        """Send one, acknowledged at return."""
        raise NotImplementedError

    def send_paced(self, count: int, per_second: int) -> None:
        """Send at a pace, the moment of sending in each body."""
        for _ in pace(count, per_second, self.clock):
            self.send(self.stamped())

    def stamped(self) -> bytes:
        """A body that tells when it was sent."""
        return STAMP.pack(self.clock.monotonic_ms()) + self.body[STAMP.size :]

    def age_ms(self, body: bytes) -> float:
        """How long ago that body was sent."""
        return self.clock.monotonic_ms() - float(STAMP.unpack_from(body)[0])

    def read(self, count: int) -> int:
        """Read at least so many and acknowledge all that came; how many came."""
        raise NotImplementedError

    def receive_timed(self, count: int) -> list[float]:
        """Receive so many of `send_paced`, each acknowledged; how old each was, in milliseconds."""
        raise NotImplementedError


class AsyncSession(Session):
    """A session over a client library of coroutines. Its loop runs only inside a call, so nothing is read ahead between calls."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.runner = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine."""
        return self.runner.run(coroutine)

    def send_timed(self, count: int) -> list[float]:
        return self.run(self._send_timed(count))

    async def _send_timed(self, count: int) -> list[float]:
        took_ms = []
        for _ in range(count):
            began_ms = self.clock.monotonic_ms()
            await self.send_one(self.body)
            took_ms.append(self.clock.monotonic_ms() - began_ms)
        return took_ms

    def send_paced(self, count: int, per_second: int) -> None:
        self.run(self._send_paced(count, per_second))

    async def _send_paced(self, count: int, per_second: int) -> None:
        """Sends do not wait for each other, as with `send_async`; all are acknowledged at return."""
        began_ms = self.clock.monotonic_ms()
        for number in range(count):
            early_ms = began_ms + number * 1000.0 / per_second - self.clock.monotonic_ms()
            await asyncio.sleep(max(early_ms, 0.0) / 1000.0)
            await self.post(self.stamped())
        await self.settle()

    async def send_one(self, body: bytes) -> None:
        """Send one, acknowledged at return."""
        raise NotImplementedError

    async def post(self, body: bytes) -> None:
        """Send one; its acknowledgement is not awaited."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Return when everything is acknowledged that was sent."""
        raise NotImplementedError


class Countdown:
    """Counts what callbacks report, for a coroutine of the same loop that waits until there is enough of it."""

    idle_s_max: ClassVar[float] = IDLE_S_MAX

    def __init__(self) -> None:
        self.count = 0
        self._wanted = 0
        self._enough = asyncio.Event()

    def add(self, count: int = 1) -> None:
        self.count += count
        if self.count >= self._wanted:
            self._enough.set()

    async def wait(self, wanted: int) -> None:
        """Return when so many were counted. Raises `TimeoutError` when nothing was for `idle_s_max`."""
        while self.count < wanted:
            before, self._wanted = self.count, wanted
            self._enough.clear()
            try:
                await asyncio.wait_for(self._enough.wait(), self.idle_s_max)
            except TimeoutError:
                if self.count == before:
                    raise TimeoutError(f"{self.count} of {wanted} came, and nothing more for {self.idle_s_max:.0f} s.") from None


def session_of(name: str, spec: Spec) -> Session:
    """A session, by the `module:class` of its contestant."""
    module, _, kind = name.partition(":")
    made: Session = getattr(import_module(f"benchmarks.peers.{module}"), kind)(spec)
    return made
