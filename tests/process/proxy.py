"""A TCP proxy that can lose, hold or slow what passes: the network between clients and one server, for tests that break it.

A server that listens at 127.0.0.1 advertises 127.0.0.2 (`--advertise-host`, which keeps the port), and there the proxy listens at
the same port; so everybody who learns of the server by its NameServer comes this way. Linux answers at all of 127.0.0.0/8.
Each fault may be for all connections or only for those of one process, so two clients can see two networks.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Literal

import psutil

HOST = "127.0.0.2"  # what a proxied server has to advertise
CHUNK_BYTES = 65_536

Mode = Literal["open", "cut", "stall", "freeze"]


def free_port() -> int:
    """A port that is free at the server's and at the proxy's address, unless somebody takes it at once."""
    while True:
        with socket.socket() as there, socket.socket() as here, suppress(OSError):
            there.bind((HOST, 0))
            here.bind(("127.0.0.1", there.getsockname()[1]))
            return int(here.getsockname()[1])


class _Connection:
    """One client's connection. It swallows from its first stall on for ever: nobody will send again what it has lost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._port: int = writer.get_extra_info("peername")[1]
        self.is_swallowing = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def is_of(self, pid: int | None) -> bool:
        """Whether the process is at its other end; None: any."""
        with suppress(psutil.NoSuchProcess):
            return pid is None or self._port in {each.laddr.port for each in psutil.Process(pid).net_connections("tcp")}
        return False


class Proxy:
    """Between clients and the server at 127.0.0.1:`port`. Any thread may use it; close it. `accepted` counts connections."""

    def __init__(self, port: int) -> None:
        self.accepted = 0
        self._port = port
        self._mode: Mode = "open"
        self._pid: int | None = None
        self._delay_s = 0.0
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{port}", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._take, HOST, port))

    def set(self, mode: Mode, pid: int | None = None) -> None:
        """All connections, or those of one process, and new ones: `cut` resets them, `stall` accepts everything and passes
        nothing on (half-open, for ever), `freeze` holds everything, as when packets get lost, `open` heals all but those."""
        self._run(self._set(mode, pid))

    def delay(self, ms: float) -> None:
        """Hold each piece of up to 64 KiB for so long, in both directions; 0 heals."""
        self._delay_s = ms / 1000

    def close(self) -> None:
        """Reset all connections and let go of the port."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _set(self, mode: Mode, pid: int | None) -> None:
        self._mode, self._pid = mode, pid
        for connection in self._connections:
            self._strike(connection)

    def _strike(self, connection: _Connection) -> None:
        if self._mode == "open":
            connection.goes_on.set()
        elif connection.is_of(self._pid):
            if self._mode == "cut":
                self._connections[connection].cancel()
            elif self._mode == "stall":
                connection.is_swallowing = True
            else:
                connection.goes_on.clear()

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = _Connection(reader, writer)
        task = self._connections[connection] = self._loop.create_task(self._serve(connection))
        task.add_done_callback(lambda _: self._connections.pop(connection))
        task.add_done_callback(lambda _: writer.transport.abort())
        self._strike(connection)

    async def _serve(self, connection: _Connection) -> None:
        pumps: list[asyncio.Task[None]] = []
        writer = connection.writer
        try:
            if not connection.is_swallowing:
                await connection.goes_on.wait()
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                pumps.append(asyncio.create_task(self._pump(connection, reader, connection.writer)))
            pumps.append(asyncio.create_task(self._pump(connection, connection.reader, writer)))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection.is_swallowing:  # the server may give it up, and its client hears nothing of that
                await pumps[-1]
        except (OSError, asyncio.CancelledError):
            pass  # there is no server, or this connection is cut
        finally:
            await _end(pumps)
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            held = asyncio.Event()
            self._loop.call_later(self._delay_s, held.set)
            await held.wait()
            await connection.goes_on.wait()
            if not connection.is_swallowing:
                writer.write(data)
                await writer.drain()

    async def _close(self) -> None:
        self._server.close()
        writers = [connection.writer for connection in self._connections]
        await _end(self._connections.values())
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
