"""Kill a broker under load again and again, then read everything back: nothing acknowledged is lost, doubled or out of order.

    python tests/process/kill_broker.py --times 100 [--seed 1] [--data DIR]

A producer sends numbered messages, some of any queue and some of message groups, while the broker's process is killed (SIGKILL)
at random moments and started again on the same port and folder. At the end the whole log is read back and compared with the
receipts.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import zrmq
from zrmq.cli.children import Child, start_broker, start_nameserver
from zrmq.clock import SystemClock

TOPIC = "kills"
GROUPS = 4  # message groups, besides messages of any queue
BURST = 50  # messages sent between two looks at the clock
UP_S = (0.05, 0.8)  # how long a broker lives after its first acknowledgement
SEND_TIMEOUT_MS = 60_000  # a broker is back long before: every message is acknowledged in the end


class Verdict(msgspec.Struct):
    """What was found. `problems` are sentences; none means that every promise held."""

    kills: int = 0
    acknowledged: int = 0
    duplicates_recognized: int = 0
    read_back: int = 0
    problems: list[str] = []

    def blame(self, problem: str) -> None:
        """Remember a problem, but not thousands of one kind."""
        if len(self.problems) < 20:
            self.problems.append(problem)


class Load:
    """Sends until it is told to end; `handles` has everything it handed over, in order."""

    def __init__(self, nameservers: str) -> None:
        self.handles: list[tuple[bytes, Any]] = []
        self._producer = zrmq.Producer("killers", nameservers=nameservers, send_timeout_ms=SEND_TIMEOUT_MS, buffer_bytes=8 << 20)
        self._producer.send(TOPIC, b"first", timeout_ms=SEND_TIMEOUT_MS)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send, name="load")
        self._thread.start()

    def wait_acknowledged(self, timeout_s: float = 60) -> None:
        """Return when a message handed over from now on is acknowledged."""
        have = len(self.handles)
        clock = SystemClock()
        deadline_ms = clock.monotonic_ms() + timeout_s * 1000
        while len(self.handles) <= have and clock.monotonic_ms() < deadline_ms:
            self._is_over.wait(0.01)
        self.handles[-1][1].result(deadline_ms - clock.monotonic_ms())

    def end(self) -> None:
        """Stop sending and wait for all answers."""
        self._is_over.set()
        self._thread.join()
        self._producer.flush(SEND_TIMEOUT_MS)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._producer.close(1_000)

    def _send(self) -> None:
        number = 0
        while not self._is_over.wait(0.005):
            for _ in range(BURST):
                number += 1
                group = number % (GROUPS + 1)
                body = b"%d:%d" % (group, number)
                self.handles.append(
                    (body, self._producer.send_async(TOPIC, body, message_group=f"group-{group}" if group else None))
                )


def run(folder: Path, times: int, seed: int, say: Callable[[str], None] = lambda _: None) -> Verdict:
    """Kill `times` times; the moments come from `seed`. Raises when a process does not come up."""
    rng, verdict, pause = random.Random(seed), Verdict(), threading.Event()
    nameserver, address = start_nameserver("nameserver", folder / "nameserver.log")
    with nameserver:
        broker, broker_address = _start(folder, address)
        load = None
        try:
            load = Load(address)
            port = int(broker_address.rpartition(":")[2])
            for kill in range(1, times + 1):
                load.wait_acknowledged()
                pause.wait(rng.uniform(*UP_S))
                broker.kill()
                broker, _ = _start(folder, address, port)
                verdict.kills = kill
                say(f"killed {kill} of {times}, {len(load.handles):,} messages handed over")
            load.end()
            _compare(load.handles, _read_back(address), verdict)
        finally:
            if load is not None:
                load.close()
            broker.kill()
    return verdict


def _start(folder: Path, address: str, port: int = 0) -> tuple[Child, str]:
    return start_broker("broker-a", folder / "broker.log", address, folder / "data", port=port)


def _read_back(nameservers: str) -> list[zrmq.Message]:
    """Everything in the log, queue by queue."""
    messages: list[zrmq.Message] = []
    with zrmq.connect(nameservers) as fabric:
        stored = sum(queue.max_offset for info in fabric.admin().topic(TOPIC).values() for queue in info.queues)
        reader = fabric.pull_consumer(None, TOPIC, consume_from=zrmq.ConsumeFrom.EARLIEST)
        while len(messages) < stored:
            got = reader.poll(timeout_ms=10_000)
            if not got:
                break
            messages += got
    return messages


def _compare(handles: list[tuple[bytes, Any]], messages: list[zrmq.Message], verdict: Verdict) -> None:
    verdict.read_back = len(messages)
    at: dict[tuple[int, int], zrmq.Message] = {}
    ids: set[str] = set()
    numbers: dict[tuple[int, bytes], int] = defaultdict(int)
    for message in messages:
        if message.message_id in ids:
            verdict.blame(f"{message.message_id} ({message.body!r}) is stored twice")
        ids.add(message.message_id)
        at[message.queue.queue_id, message.queue_offset] = message
        group, _, number = message.body.partition(b":")
        if number and group != b"0":
            if int(number) <= numbers[message.queue.queue_id, group]:
                verdict.blame(f"{message.body!r} is stored behind number {numbers[message.queue.queue_id, group]} of its group")
            numbers[message.queue.queue_id, group] = int(number)
    _check_dense(at, verdict)
    for body, handle in handles:
        try:
            receipt = handle.result(0)
        except zrmq.ZrmqError as error:
            verdict.blame(f"{body!r} was not acknowledged: {error}")
            continue
        verdict.acknowledged += 1
        verdict.duplicates_recognized += receipt.duplicate
        found = at.get((receipt.queue_id, receipt.queue_offset))
        if found is None or found.message_id != receipt.message_id or found.body != body:
            verdict.blame(f"{body!r} was acknowledged at {receipt.queue_id}/{receipt.queue_offset}, where {found} is")


def _check_dense(at: dict[tuple[int, int], zrmq.Message], verdict: Verdict) -> None:
    ends: dict[int, int] = defaultdict(int)
    for queue_id, offset in at:
        ends[queue_id] = max(ends[queue_id], offset + 1)
    for queue_id, end in ends.items():
        missing = [offset for offset in range(end) if (queue_id, offset) not in at]
        if missing:
            verdict.blame(f"queue {queue_id} has no message at {missing[:5]}")


def main() -> int:
    """The script; exit code 0 only when every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder to keep; a temporary one otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        verdict = run(options.data or Path(temporary), options.times, options.seed, lambda line: print(line, flush=True))
    print(
        f"{verdict.kills} kills: {verdict.acknowledged:,} acknowledged, {verdict.read_back:,} read back,"
        f" {verdict.duplicates_recognized:,} resent and recognized, {len(verdict.problems)} problems"
    )
    for problem in verdict.problems:
        print("-", problem)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
