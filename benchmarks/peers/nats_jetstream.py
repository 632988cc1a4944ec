"""NATS JetStream: publish_async with many unacknowledged; a pull consumer that acknowledges the last of 1,000."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants import Level
from benchmarks.servers import Server, await_answer, free_port, missing_of, program, run_program
from benchmarks.session import GROUP, IDLE_S_MAX, KEY, PIPELINE, SITE, TAG, UNACKNOWLEDGED_MAX, AsyncSession
from zrmq.cli.bench_players import Spec


def _program() -> str | None:
    return program("nats-server", str(Path(sys.executable).parent))


def missing() -> str | None:
    """What is not installed."""
    return missing_of("nats", **{"nats-server": _program()})


def start(folder: Path, level: Level) -> Server:
    """JetStream on disk; it flushes every two minutes unless told to do so before each acknowledgement."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    jetstream: dict[str, object] = {"store_dir": str(folder / "data")}
    if level is Level.FLUSHED:
        jetstream["sync_interval"] = "always"
    config = folder / "nats.conf"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": port, "jetstream": jetstream}))
    child = run_program("nats-server", [_program() or "", "--config", str(config)], folder)
    try:
        await_answer(child, port, b"", b"INFO")
    except BaseException:
        child.kill()
        raise
    return Server([child], f"127.0.0.1:{port}", folder / "data")


class NatsSession(AsyncSession):
    """One stream with one subject of the same name, one durable consumer."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._pull: Any = None
        self._push: Any = None
        self._posted: list[asyncio.Future[Any]] = []
        self.run(self._connect())

    async def _connect(self) -> None:
        import nats

        self._nats: Any = await nats.connect(f"nats://{self.host}:{self.port}", pending_size=64 << 20)
        self._jetstream: Any = self._nats.jetstream(publish_async_max_pending=UNACKNOWLEDGED_MAX, timeout=IDLE_S_MAX)

    def prepare(self) -> None:
        self.run(self._jetstream.add_stream(name=self.topic, subjects=[self.topic]))

    def discard(self) -> None:
        self.run(self._jetstream.delete_stream(self.topic))

    def close(self) -> None:
        self.run(self._nats.close())

    def publish(self, count: int, *, tagged: bool) -> None:
        self.run(self._publish(count, {"tag": TAG, "key": KEY, "site": SITE} if tagged else None))

    async def _publish(self, count: int, headers: dict[str, str] | None) -> None:
        publish_async, topic, body = self._jetstream.publish_async, self.topic, self.body
        for first in range(0, count, UNACKNOWLEDGED_MAX):
            number = min(UNACKNOWLEDGED_MAX, count - first)
            await asyncio.gather(*[await publish_async(topic, body, headers=headers) for _ in range(number)])

    async def send_one(self, body: bytes) -> None:
        await self._jetstream.publish(self.topic, body)

    async def post(self, body: bytes) -> None:
        self._posted.append(await self._jetstream.publish_async(self.topic, body))

    async def settle(self) -> None:
        await asyncio.gather(*self._posted)
        self._posted.clear()

    def read(self, count: int) -> int:
        return self.run(self._read(count))

    async def _read(self, count: int) -> int:
        from nats.js.api import AckPolicy, ConsumerConfig

        if self._pull is None:
            config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=UNACKNOWLEDGED_MAX)
            self._pull = await self._jetstream.pull_subscribe(self.topic, durable=GROUP, config=config)
        done = 0
        while done < count:
            messages = await self._pull.fetch(min(PIPELINE, count - done), timeout=IDLE_S_MAX)
            done += len(messages)
            await (messages[-1].ack_sync() if done >= count else messages[-1].ack())
        return done

    def receive_timed(self, count: int) -> list[float]:
        return self.run(self._receive_timed(count))

    async def _receive_timed(self, count: int) -> list[float]:
        """A push consumer: lower latency than a pull."""
        if self._push is None:
            self._push = await self._jetstream.subscribe(self.topic, durable="push", manual_ack=True)
        took_ms = []
        for _ in range(count):
            message = await self._push.next_msg(timeout=IDLE_S_MAX)
            took_ms.append(self.age_ms(message.data))
            await message.ack()
        return took_ms
