"""How many instructions a batch takes on its way: a figure that repeats on a busy machine. `--help` tells the options.

    python -m benchmarks.instructions            count, and compare with benchmarks/instructions.json
    python -m benchmarks.instructions --check    the same; fails where a count has grown by more than 10 %
    python -m benchmarks.instructions --write    keep these counts

The real cores play in one process, without sockets and threads, on a clock that stands still and files on the disk. Each count is
that of a process which plays `BATCHES` batches less that of one which plays none; both have warmed up everything. Counted are
instructions in user space, by valgrind (cachegrind), so neither the system's work nor what a cache miss takes is in them: they
tell whether the code does more than it did, not how long it takes. Another Python has other counts, so a check needs the same.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from zrmq.client.accumulator import Accumulator, AccumulatorConfig
from zrmq.client.batch import Stored
from zrmq.errors import ZrmqError
from zrmq.files import DiskFiles
from zrmq.message import FlushMode
from zrmq.protocol.batch import BATCH_HEADER_BYTES, Columns, decode_messages, encode_batch, iter_batches, stamp
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import Hello, Pull, PutTopic, Send, encode
from zrmq.serving.context import ServingConfig
from zrmq.serving.core import BrokerCore
from zrmq.store.config import StoreConfig
from zrmq.store.store import Store
from zrmq.testing.clock import ManualClock

COUNTS_FILE = Path(__file__).with_suffix(".json")
GROWTH_MAX = 0.10  # the same run repeats to the digit; one with another environment differed by 1.7 % (produce) and 8.5 % (pull)
BATCHES = 200  # a case
WARM_BATCHES = 50
TURN_BATCHES = 8  # that a broker writes and flushes together
RECORDS = 100  # of a batch at the broker
CLIENT_RECORDS = 1_000  # of a batch as a busy producer makes them
BODY = bytes(128)
TOPIC, PEER, PRODUCER_ID = "meters", b"peer", 7

_COUNTED = re.compile(r"I\s+refs:\s+([\d,]+)")

Play = Callable[[int], None]  # so many batches


class Counts(msgspec.Struct, frozen=True):
    """Instructions a batch by case, and which Python they were counted with."""

    python: str
    machine: str
    instructions: dict[str, int]


# --- what is counted ----------------------------------------------------------------------------------------------------


class Broker:
    """A broker's core on a store on the disk; what it answers is counted and thrown away."""

    def __init__(self, folder: Path) -> None:
        clock = ManualClock()
        self._store = Store.open(
            folder, files=DiskFiles(), clock=clock, config=StoreConfig(segment_bytes=8 << 20), broker_name="broker-a",
            cluster="count",
        )
        self._answers = 0
        self._core = BrokerCore(
            self._store, clock, ServingConfig("broker-a", "count"), self._take, lambda peer: True, lambda: None
        )
        self._number = self._sequence = 1
        self._offset = 0
        self._handle(Hello, 1, "counter", 1, "producer")
        self._handle(PutTopic, TopicConfig(TOPIC, 1))
        self._turn()

    def _take(self, peer: bytes, frames: Sequence[Any]) -> bool:
        self._answers += 1
        return True

    def _handle(self, kind: Any, *fields: Any, payload: Sequence[bytes] = ()) -> None:
        self._number += 1
        self._core.handle(PEER, [encode(kind(self._number, 3_000, *fields)), *payload])

    def _turn(self) -> None:
        self._store.flush()
        self._core.after_commit()

    def produce(self, batches: int) -> None:
        """Send batches, a few to a turn. Making them is counted with it."""
        for first in range(0, batches, TURN_BATCHES):
            for _ in range(min(TURN_BATCHES, batches - first)):
                self._handle(Send, TOPIC, 0, payload=[batch_of(RECORDS, self._sequence)])
                self._sequence += RECORDS
            self._turn()

    def pull(self, batches: int) -> None:
        """Pull batches that were sent, one at a time."""
        before = self._answers
        for _ in range(batches):
            self._handle(Pull, TOPIC, 0, self._offset, 1, 0)
            self._offset += RECORDS
        if self._answers - before != batches:
            raise ZrmqError(f"{batches} pulls got {self._answers - before} answers.")


def batch_of(records: int, first_sequence: int) -> bytes:
    """A batch as a producer sends it."""
    columns = Columns([BODY] * records)
    return encode_batch(columns, producer_id=PRODUCER_ID, first_sequence=first_sequence, first_born_ms=1, last_born_ms=1)


def accumulate(batches: int) -> None:
    """Fill batches as `send_async` does, have them encoded and end them."""
    config = AccumulatorConfig(PRODUCER_ID, 64 << 20, False, CLIENT_RECORDS, 1 << 20)
    accumulator = Accumulator(
        config, ManualClock(), new_lock=threading.Lock, new_owned_lock=threading.RLock,  # type: ignore[arg-type]
        wake=lambda: None, may_wait=lambda: True,
    )
    fillers = accumulator.body_fillers
    for _ in range(batches):
        for _ in range(CLIENT_RECORDS):
            fill = fillers.get(TOPIC)
            if fill is None:
                accumulator.append(TOPIC, BODY, len(BODY) + 64, None, 3_000)
                continue
            try:
                fill(BODY)
            except StopIteration as end:
                accumulator.filled(end)
        for batch in accumulator.take_sealed():
            if not batch.encoded():
                raise ZrmqError("A batch came to nothing.")
            accumulator.finish(batch, Stored("broker-a", 0, 0, 1, FlushMode.SYNC))


def decode(batches: int) -> None:
    """Open what a pull brought, to typed messages."""
    frame = stamped_batch(CLIENT_RECORDS)
    for _ in range(batches):
        for header, batch in iter_batches(frame):
            if len(decode_messages(header, batch, topic=TOPIC, broker_name="broker-a")) != CLIENT_RECORDS:
                raise ZrmqError("Messages are missing.")


def stamped_batch(records: int) -> bytes:
    """A batch as a broker serves it."""
    frame = batch_of(records, 1)
    header = stamp(
        frame, epoch=0, position=64, flushed_position=0, store_timestamp_ms=1, topic_id=1, queue_id=0, base_offset=0
    )
    return bytes(header) + frame[BATCH_HEADER_BYTES:]


def encode_alone(batches: int) -> None:
    """What the broker's cases have in them besides the broker: batches and requests being made."""
    for number in range(batches):
        encode(Send(number + 1, 3_000, TOPIC, 0))
        batch_of(RECORDS, number + 1)


CASES = ("accumulate and encode 1,000", "broker: produce 100", "broker: pull 100", "decode 1,000", "encode 100")


def play(case: str) -> None:
    """Warm up all cases, then play one, or none."""
    with tempfile.TemporaryDirectory(prefix="instructions-") as folder:
        broker = Broker(Path(folder))
        plays: dict[str, Play] = dict(zip(CASES, (accumulate, broker.produce, broker.pull, decode, encode_alone), strict=True))
        broker.produce(BATCHES)  # for the pulls
        for each in plays.values():
            each(WARM_BATCHES)
        if case:
            plays[case](BATCHES)


# --- counting -----------------------------------------------------------------------------------------------------------


def count_run(case: str) -> int:
    """Instructions of a process that plays the case. Raises `ZrmqError` when valgrind fails."""
    command = [
        "valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
        sys.executable, "-m", "benchmarks.instructions", "--play", case,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    counted = _COUNTED.search(done.stderr)
    if done.returncode or counted is None:
        raise ZrmqError(f"valgrind counted nothing: {done.stderr[-2_000:]}")
    return int(counted[1].replace(",", ""))


def count() -> Counts:
    """All cases."""
    if shutil.which("valgrind") is None:
        raise ZrmqError("valgrind is not installed; it is what counts.")
    idle = count_run("")
    instructions = {case: round((count_run(case) - idle) / BATCHES) for case in CASES}
    return Counts(platform.python_version(), platform.machine(), instructions)


def grown(kept: Counts, counted: Counts, growth_max: float = GROWTH_MAX) -> dict[str, float]:
    """The cases that take more than before, with by how much. Raises `ZrmqError` where they cannot be compared."""
    if (kept.python, kept.machine) != (counted.python, counted.machine):
        raise ZrmqError(
            f"The kept counts are of Python {kept.python} on {kept.machine}, these of {counted.python} on {counted.machine};"
            " count with the same, or keep new ones by --write."
        )
    both = kept.instructions.keys() & counted.instructions.keys()
    growth = {case: counted.instructions[case] / kept.instructions[case] - 1 for case in sorted(both)}
    return {case: share for case, share in growth.items() if share > growth_max}


@click.command()
@click.option("--check", is_flag=True, help="Fail where a count has grown by more than 10 %.")
@click.option("--write", is_flag=True, help="Keep the counts.")
@click.option("--play", "case", type=click.Choice(["", *CASES]), hidden=True)
def main(check: bool, write: bool, case: str | None) -> None:
    """Count instructions a batch and compare them with those that are kept."""
    if case is not None:
        play(case)
        return
    try:
        counted = count()
        if write:
            COUNTS_FILE.write_bytes(msgspec.json.format(msgspec.json.encode(counted), indent=1) + b"\n")
        kept = msgspec.json.decode(COUNTS_FILE.read_bytes(), type=Counts)
        for name, number in counted.instructions.items():
            before = kept.instructions.get(name, number)
            click.echo(f"{name:30} {number:12,} a batch, kept {before:12,}, {number / before - 1:+.2%}")
        more = grown(kept, counted)
    except ZrmqError as error:
        raise click.ClickException(error.message) from error
    if check and more:
        told = ", ".join(f"{name} {share:+.1%}" for name, share in more.items())
        raise click.ClickException(f"More instructions than before: {told}")


if __name__ == "__main__":
    main()
