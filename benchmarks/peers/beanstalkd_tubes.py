"""beanstalkd: one put at a time, as its protocol and client know it; reserve and delete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.contestants import Level
from benchmarks.servers import Server, await_answer, free_port, missing_of, program, run_program
from benchmarks.session import IDLE_S_MAX, Session
from zrmq.cli.bench_players import Spec


def missing() -> str | None:
    """What is not installed."""
    return missing_of("greenstalk", beanstalkd=program("beanstalkd"))


def start(folder: Path, level: Level) -> Server:
    """With a write-ahead log; `-f 0` flushes each write before it answers, `-F` never."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    port = free_port()
    flush = ["-f", "0"] if level is Level.FLUSHED else ["-F"]
    command = [program("beanstalkd") or "", "-l", "127.0.0.1", "-p", str(port), "-b", str(data), *flush]
    child = run_program("beanstalkd", command, folder)
    try:
        await_answer(child, port, b"stats\r\n", b"OK")
    except BaseException:
        child.kill()
        raise
    return Server([child], f"127.0.0.1:{port}", data)


class BeanstalkdSession(Session):
    """One tube."""

    def __init__(self, spec: Spec) -> None:
        import greenstalk

        super().__init__(spec)
        self._client: Any = greenstalk.Client((self.host, self.port), encoding=None, use=self.topic, watch=self.topic)

    def discard(self) -> None:
        while self._client.stats_tube(self.topic)["current-jobs-ready"]:
            self._client.delete(self._client.reserve(IDLE_S_MAX))

    def close(self) -> None:
        self._client.close()

    def send(self, body: bytes) -> None:
        self._client.put(body)

    def receive_timed(self, count: int) -> list[float]:
        took_ms = []
        for _ in range(count):
            job = self._client.reserve(int(IDLE_S_MAX))
            took_ms.append(self.age_ms(job.body))
            self._client.delete(job)
        return took_ms
