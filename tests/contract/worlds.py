"""Where the loop contract is checked: two loops over tcp, ipc, inproc, or in memory, and how a test waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

from zrmq.transport.interface import Connection, Endpoint, Frames, Loop
from zrmq.transport.memory import MemoryNetwork
from zrmq.transport.options import end_context, make_context
from zrmq.transport.reactor import Reactor

DEADLINE_S = 20.0

T = TypeVar("T")


class World(Protocol):
    """Two loops, `here` for clients and `there` for servers, and a test that stands outside both."""

    here: Loop
    there: Loop
    any_address: str  # a fresh one each time where the kind of address allows it

    def on(self, loop: Loop, call: Callable[[], T]) -> T:
        """Make the call on the loop's thread and return what it returns, or raise what it raises."""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Let the loops work until the condition holds; it is asked after each event that a test's recorder noted."""

    def note(self) -> None:
        """Something happened that a condition may depend on."""

    def end(self, loop: Loop) -> None:
        """End one of the loops for good."""

    def close(self) -> None:
        """End everything."""


class MemoryWorld:
    """Two loops of one network; the test turns its time."""

    def __init__(self, seed: int) -> None:
        self.network = MemoryNetwork(Random(seed))
        self.here, self.there = self.network.loop("client"), self.network.loop("server")
        self.any_address = "tcp://server:0"

    def on(self, loop: Loop, call: Callable[[], T]) -> T:
        answers: list[T] = []
        errors: list[Exception] = []

        def make_call() -> None:
            try:
                answers.append(call())
            except Exception as error:  # noqa: BLE001  raised again below, in the test
                errors.append(error)

        loop.call_soon_threadsafe(make_call)
        self.network.run_until(lambda: bool(answers or errors))
        for error in errors:
            raise error
        return answers[0]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        self.network.run_until(condition)

    def note(self) -> None:
        pass

    def end(self, loop: Loop) -> None:
        {self.here: self.here, self.there: self.there}[loop].close()  # type: ignore[index]

    def close(self) -> None:
        self.here.close()
        self.there.close()


class ReactorWorld:
    """Two reactors, each in a thread."""

    def __init__(self, any_address: str, *, shared_context: bool) -> None:
        self.any_address = any_address
        self._happened = threading.Condition()
        self._context = make_context() if shared_context else None
        self.here, self.there = Reactor(self._context), Reactor(self._context)
        self._threads = {loop: threading.Thread(target=self._run, args=(loop,)) for loop in (self.here, self.there)}
        for thread in self._threads.values():
            thread.start()

    def on(self, loop: Loop, call: Callable[[], T]) -> T:
        answers: list[T] = []
        errors: list[Exception] = []

        def make_call() -> None:
            try:
                answers.append(call())
            except Exception as error:  # noqa: BLE001  raised again below, in the test
                errors.append(error)
            self.note()

        loop.call_soon_threadsafe(make_call)
        self.wait_for(lambda: bool(answers or errors))
        for error in errors:
            raise error
        return answers[0]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._happened:
            assert self._happened.wait_for(condition, DEADLINE_S), "the condition did not hold in time"

    def note(self) -> None:
        with self._happened:
            self._happened.notify_all()

    def end(self, loop: Loop) -> None:
        for reactor, thread in self._threads.items():
            if reactor is loop:
                reactor.stop()
                thread.join(DEADLINE_S)
                assert not thread.is_alive(), "the loop did not end in time"

    def close(self) -> None:
        for reactor in self._threads:
            self.end(reactor)
            assert reactor.failed_count == 0, "a callback raised; the log has the traceback"
        if self._context is not None:
            assert end_context(self._context), "a socket was left open"

    @staticmethod
    def _run(reactor: Reactor) -> None:
        try:
            reactor.run()
        finally:
            reactor.close()


KINDS = ("tcp", "ipc", "inproc", "memory")


def make_world(kind: str, folder: Path, name: str) -> World:
    """A world of that kind. `folder` is the test's own, `name` no other test's."""
    if kind == "memory":
        return MemoryWorld(seed=len(name))
    if kind == "ipc":
        folder.chmod(0o700)
        return ReactorWorld(f"ipc://{folder}/s", shared_context=False)
    if kind == "inproc":
        return ReactorWorld(f"inproc://{name}", shared_context=True)
    return ReactorWorld("tcp://127.0.0.1:0", shared_context=False)


class Client:
    """A listener that writes down what its connection tells it, and on which thread."""

    def __init__(self, world: World, address: str) -> None:
        self.world = world
        self.events: list[str] = []
        self.messages: list[list[bytes]] = []
        self.connection: Connection = world.on(world.here, lambda: world.here.connect(address, self))

    def on_connected(self) -> None:
        self.events.append("connected")
        self.world.note()

    def on_disconnected(self) -> None:
        self.events.append("disconnected")
        self.world.note()

    def on_frames(self, frames: list[bytes]) -> None:
        self.messages.append(frames)
        self.world.note()

    def wait_connected(self, times: int = 1) -> None:
        self.world.wait_for(lambda: self.events.count("connected") == times)

    def send(self, *frames: bytes | bytearray | memoryview) -> bool:
        return self.world.on(self.world.here, lambda: self.connection.send(frames))

    def close(self) -> None:
        self.world.on(self.world.here, self.connection.close)


class Server:
    """A ROUTER that writes down what it got and sends it back, or does `answer` instead; or a PULL that only writes."""

    def __init__(
        self, world: World, address: str, *, pull: bool = False, answer: Callable[[bytes, list[bytes]], object] | None = None
    ) -> None:
        self.world = world
        self.answer = answer or ((lambda peer, frames: None) if pull else self.echo)
        self.unsent = 0
        self.messages: list[tuple[bytes, list[bytes]]] = []
        listen = world.there.listen_pull if pull else world.there.listen
        self.endpoint: Endpoint = world.on(world.there, lambda: listen(address, self.handle))
        self.address = self.endpoint.address

    def handle(self, peer: bytes, frames: list[bytes]) -> None:
        self.messages.append((peer, frames))
        self.answer(peer, frames)
        self.world.note()

    def echo(self, peer: bytes, frames: list[bytes]) -> None:
        self.unsent += not self.endpoint.send(peer, frames)

    def wait_messages(self, count: int) -> None:
        self.world.wait_for(lambda: len(self.messages) >= count)

    def send(self, peer: bytes, frames: Frames) -> bool:
        return self.world.on(self.world.there, lambda: self.endpoint.send(peer, frames))

    def close(self) -> None:
        self.world.on(self.world.there, self.endpoint.close)
