"""Redis streams: XADD in pipelines; XREADGROUP and one XACK for all that was read, both in one round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.contestants import Level
from benchmarks.servers import Server, await_answer, free_port, missing_of, program, run_program
from benchmarks.session import GROUP, IDLE_S_MAX, KEY, PIPELINE, SITE, TAG, Session
from zrmq.cli.bench_players import Spec


def missing() -> str | None:
    """What is not installed."""
    return missing_of("redis", **{"redis-server": program("redis-server")})


def start(folder: Path, level: Level) -> Server:
    """An append-only file, written before each reply; `always` flushes it before the reply, `everysec` later."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {
        "port": str(port), "bind": "127.0.0.1", "dir": str(folder), "save": "", "appendonly": "yes",
        "appendfsync": "always" if level is Level.FLUSHED else "everysec",
        "auto-aof-rewrite-percentage": "0",  # no rewrite in the middle of a measurement
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    child = run_program("redis-server", [program("redis-server") or "", *flags], folder)
    try:
        await_answer(child, port, b"PING\r\n", b"+PONG")
    except BaseException:
        child.kill()
        raise
    return Server([child], f"127.0.0.1:{port}", folder / "appendonlydir")


class RedisSession(Session):
    """One stream, one consumer group."""

    def __init__(self, spec: Spec) -> None:
        import redis

        super().__init__(spec)
        self._redis: Any = redis.Redis(self.host, self.port, protocol=2)
        self._read_ids: list[bytes] = []

    def prepare(self) -> None:
        self._redis.xgroup_create(self.topic, GROUP, id="0", mkstream=True)

    def discard(self) -> None:
        self._redis.delete(self.topic)

    def close(self) -> None:
        self._redis.close()

    def publish(self, count: int, *, tagged: bool) -> None:
        fields = {"body": self.body} | ({"tag": TAG, "key": KEY, "site": SITE} if tagged else {})
        for first in range(0, count, PIPELINE):
            pipeline = self._redis.pipeline(transaction=False)
            for _ in range(min(PIPELINE, count - first)):
                pipeline.xadd(self.topic, fields)
            pipeline.execute()

    def send(self, body: bytes) -> None:
        self._redis.xadd(self.topic, {"body": body})

    def read(self, count: int) -> int:
        done = 0
        while done < count:
            done += len(self._read_and_acknowledge())
        self._acknowledge()
        return done

    def receive_timed(self, count: int) -> list[float]:
        took_ms: list[float] = []
        while len(took_ms) < count:
            took_ms += [self.age_ms(fields[b"body"]) for _, fields in self._read_and_acknowledge()]
        self._acknowledge()
        return took_ms

    def _read_and_acknowledge(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The next messages; those of the last call are acknowledged by the way."""
        pipeline = self._redis.pipeline(transaction=False)
        if self._read_ids:
            pipeline.xack(self.topic, GROUP, *self._read_ids)
        pipeline.xreadgroup(GROUP, "reader", {self.topic: ">"}, count=PIPELINE, block=int(IDLE_S_MAX * 1000))
        answer = pipeline.execute()[-1]
        if not answer:
            raise TimeoutError(f"No message came for {IDLE_S_MAX:.0f} s.")
        messages: list[tuple[bytes, dict[bytes, bytes]]] = answer[0][1]
        self._read_ids = [message[0] for message in messages]
        return messages

    def _acknowledge(self) -> None:
        self._redis.xack(self.topic, GROUP, *self._read_ids)
        self._read_ids = []
