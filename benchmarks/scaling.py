"""What a batch costs a broker as something grows: queues, sessions, groups, the log, a message. `--help` tells the options.

    python -m benchmarks.scaling --curve queues --json queues.json --svg queues.svg
    python -m benchmarks.scaling --show queues.json

Each point of a curve has a broker of its own, and all take turns in every round, so that what is compared was measured in the
same minute. The CPU time of the broker's process is what counts: it hardly notices what else the machine does. Medians over the
rounds.
"""

from __future__ import annotations

import platform
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import click
import msgspec

from benchmarks.scaling_load import Load, cpu_us, memory_mib
from benchmarks.scaling_pages import Point, Result, Spread, svg, table
from zrmq.cli.children import start_nameserver
from zrmq.clock import SystemClock
from zrmq.errors import ZrmqError
from zrmq.message import FlushMode
from zrmq.transport.options import Context, end_context, make_context

KB, MB, GB = 1_000, 1_000_000, 1_000_000_000
QUEUES_PER_TOPIC = 1_000
BATCHES = 4_000  # a round and part, where they are short
DELIVERIES = 1_000
FILL_RECORDS = 500  # of 128 bytes: what fills a log comes in batches of 64 KB
GROUP_BACKLOG = 5_000  # batches that groups read
VIEWS = ("views.db", "views.db-wal", "views.db-shm", "consumequeue")
DISK_SHARE = 0.5  # of what is free that a curve may take

Part = Callable[[], int]  # plays once; how many batches, or other things, it was about


class Place:
    """One point of a curve: a broker with what the point wants in it, and the parts that are played there."""

    def __init__(self, load: Load, parts: dict[str, Part], batch_bytes: int = 0, restarts: bool = False) -> None:
        self.load = load
        self.parts = parts
        self._batch_bytes = batch_bytes
        self._restarts = restarts

    def round(self) -> dict[str, float]:
        """Play every part once; the values by name."""
        values: dict[str, float] = {}
        for name, part in self.parts.items():
            cpu, wall, count = timed(self.load, part)
            values[f"{name}, CPU us"] = cpu / count
            values[f"{name}, us"] = wall / count
            if self._batch_bytes:
                values[f"{name}, MB/s"] = self._batch_bytes * count / wall
        values |= {f"memory, {name.replace('_mib', ' MiB')}": value for name, value in memory_mib(self.load.broker.pid).items()}
        if self._restarts:
            values |= restart(self.load)
        return values


def timed(load: Load, part: Part) -> tuple[float, float, int]:
    """CPU time of the broker and time passed, in microseconds, and what the part returns."""
    clock, pid = SystemClock(), load.broker.pid
    cpu, began_ms = cpu_us(pid), clock.monotonic_ms()
    count = part()
    return cpu_us(pid) - cpu, (clock.monotonic_ms() - began_ms) * 1000.0, count


def restart(load: Load) -> dict[str, float]:
    """Kill the broker and start it: with what it has saved of its views, then without."""
    values = {}
    for name, lost in (("start after kill", ()), ("start without views", VIEWS)):
        load.kill()
        for path in (load.data / entry for entry in lost):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        clock = SystemClock()
        began_ms = clock.monotonic_ms()
        load.start()
        values[f"{name}, CPU us"] = cpu_us(load.broker.pid)
        values[f"{name}, us"] = (clock.monotonic_ms() - began_ms) * 1000.0
    return values


# --- curves -------------------------------------------------------------------------------------------------------------


NewLoad = Callable[[int, int], Load]  # records of a batch, bytes of a body


def queues_place(new_load: NewLoad, count: int) -> Place:
    """Batches of ten small messages to so many queues in turn, then read one by one in the same order."""
    load = new_load(10, 128)
    load.add_queues(count, QUEUES_PER_TOPIC)
    for first in range(0, count, QUEUES_PER_TOPIC):  # each has been used once
        load.produce(load.queues[first : first + QUEUES_PER_TOPIC])
        load.pull(load.queues[first : first + QUEUES_PER_TOPIC])

    def pull() -> int:
        return load.pull(load.last_queues)

    return Place(load, {"produce": lambda: load.produce(load.next_queues(BATCHES)), "pull": pull})


def backlog_place(new_load: NewLoad, count: int) -> Place:
    """A backlog of sixteen batches in each of so many queues, which lie mixed in the log; read sixteen at once."""
    load = new_load(10, 128)
    load.add_queues(count, QUEUES_PER_TOPIC)
    rounds = 16 * max(BATCHES // count // 16, 1)

    def fill() -> int:
        return load.produce(load.queues * rounds)

    def read() -> int:
        return load.pull(load.queues * (rounds // 16), 16)

    fill()
    read()
    return Place(load, {"produce": fill, "pull of 16": read})


def sessions_place(new_load: NewLoad, count: int) -> Place:
    """So many consumers, each waiting for a queue of its own; a batch to one after the other. And a second without any work."""
    load = new_load(10, 128)
    load.add_queues(count, QUEUES_PER_TOPIC)
    load.add_readers(count)
    load.deliver(DELIVERIES)
    return Place(load, {"send and deliver": lambda: load.deliver(DELIVERIES), "idle for a second": rest})


def rest() -> int:
    """A second without work."""
    threading.Event().wait(1.0)
    return 1


def groups_place(new_load: NewLoad, count: int) -> Place:
    """So many groups that read one queue at places apart, in turn."""
    load = new_load(10, 128)
    load.add_queues(1, 1)
    load.produce(load.queues * GROUP_BACKLOG)
    load.add_groups(count)
    load.pull_by_groups(DELIVERIES)
    return Place(load, {
        "produce": lambda: load.produce(load.queues * DELIVERIES),
        "pull": lambda: load.pull_by_groups(DELIVERIES),
        "commit": lambda: load.commit_by_groups(DELIVERIES),
    })


def log_place(new_load: NewLoad, size_bytes: int) -> Place:
    """A log so long, of one queue. Read at its end and anywhere; then the broker is killed and started."""
    load = new_load(FILL_RECORDS, 128)
    load.add_queues(1, 1, FlushMode.ASYNC)
    [queue] = load.queues
    batches = max(size_bytes // load.batch_bytes, 1)
    for first in range(0, batches, BATCHES):
        load.produce([queue] * min(BATCHES, batches - first))
    queue.offset = batches * FILL_RECORDS
    rng = random.Random(size_bytes)
    load.pull_at(queue, [0])
    return Place(load, {
        "produce": lambda: load.produce([queue] * 200),
        "pull the newest": lambda: load.pull([queue] * 200),
        "pull anywhere": lambda: load.pull_at(queue, [rng.randrange(batches) * FILL_RECORDS for _ in range(1_000)]),
    }, restarts=True)


def messages_place(new_load: NewLoad, body_bytes: int) -> Place:
    """Batches as a producer makes them of bodies of that size: up to 1,000 records or 256 KiB."""
    records = min(max((256 << 10) // (body_bytes + 64), 1), 1_000)
    load = new_load(records, body_bytes)
    load.add_queues(1, 1, FlushMode.ASYNC)
    count = min(max(128 * MB // load.batch_bytes, 16), 1_000)

    def produce() -> int:
        return load.produce(load.queues * count)

    produce()
    load.queues[0].offset = count * records
    return Place(load, {"produce": produce, "pull": lambda: load.pull(load.queues * count)}, batch_bytes=records * body_bytes)


class Curve(msgspec.Struct, frozen=True):
    """What grows, the points, and what is made for each."""

    what: str
    points: tuple[int, ...]
    place: Callable[[NewLoad, int], Place]
    disk_bytes: Callable[[int], int] = lambda point: 100 * MB  # of all rounds together, roughly


CURVES = {
    "queues": Curve("queues, round robin", (1, 10, 100, 1_000, 10_000), queues_place, lambda _: 300 * MB),
    "backlog": Curve("queues with a backlog", (1, 10, 100, 1_000), backlog_place, lambda _: 500 * MB),
    "sessions": Curve("waiting consumers", (1, 10, 100, 500), sessions_place),
    "groups": Curve("groups that read one queue", (1, 10, 100, 1_000), groups_place),
    "log": Curve("bytes of log", (MB, 10 * MB, 100 * MB, GB, 10 * GB), log_place, lambda size: size + 500 * MB),
    "messages": Curve("bytes of a body", (16, 128, KB, 16 << 10, 256 << 10, 4 << 20), messages_place, lambda _: 2 * GB),
}


# --- a run --------------------------------------------------------------------------------------------------------------


@contextmanager
def stage(folder: Path) -> Iterator[Callable[[int], NewLoad]]:
    """What makes the load of a point, with a NameServer for all; everything ends with it."""
    with ExitStack() as stack:
        context: Context = make_context()
        stack.callback(end_context, context)
        nameserver, address = start_nameserver("nameserver", folder / "logs" / "nameserver.log")
        stack.callback(nameserver.kill)

        def for_point(point: int) -> NewLoad:
            def new_load(records: int, body_bytes: int) -> Load:
                load = Load(context, address, folder, f"broker-{point}", records, body_bytes)
                stack.callback(load.close)
                return load

            return new_load

        yield for_point


def measure(name: str, points: Sequence[int], rounds: int, folder: Path) -> Result:
    """A curve: all points in every round, after one round that does not count."""
    curve = CURVES[name]
    check_room(folder, sum(curve.disk_bytes(point) for point in points))
    values: dict[int, list[dict[str, float]]] = {point: [] for point in points}
    with stage(folder) as for_point:
        places = {}
        for point in points:
            click.echo(f"{name}: making {point:,}", err=True)
            places[point] = curve.place(for_point(point), point)
        for number in range(rounds + 1):
            click.echo(f"{name}: round {number} of {rounds}", err=True)
            for point, place in places.items():
                played = place.round()
                if number:
                    values[point].append(played)
    return Result(
        curve=name, what=curve.what, rounds=rounds, python=platform.python_version(), machine=platform.machine(),
        points=[Point(point, spreads(values[point])) for point in points],
    )


def spreads(rounds: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Median, least and most of each value over the rounds."""
    return {
        name: Spread(*(round(pick([each[name] for each in rounds]), 2) for pick in (median, min, max))) for name in rounds[0]
    }


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raise `ZrmqError` unless the disk has room for it, and as much again."""
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes * DISK_SHARE:
        raise ZrmqError(f"The curve takes some {wanted_bytes / GB:.1f} GB, and {folder} has {free_bytes / GB:.1f} GB free.")


@click.command()
@click.option("--curve", type=click.Choice(list(CURVES)), help="What grows.")
@click.option("--points", help="Other points than the curve's own: 1,100.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Where the brokers' data goes for the while.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the values here.")
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the CPU times here.")
@click.option("--show", type=click.Path(exists=True, path_type=Path), help="Measure nothing: take the values of this file.")
def main(
    curve: str | None, points: str | None, rounds: int, folder: str | None, json_file: Path | None, svg_file: Path | None,
    show: Path | None,
) -> None:
    """Measure one curve and print it as a table in Markdown."""
    if show is not None:
        result = msgspec.json.decode(show.read_bytes(), type=Result)
    elif curve is not None:
        chosen = [int(point) for point in points.split(",")] if points else CURVES[curve].points
        with tempfile.TemporaryDirectory(prefix="scaling-", dir=folder) as place:
            result = measure(curve, chosen, rounds, Path(place))
    else:
        raise click.UsageError("Give a --curve to measure, or a file to --show.")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if svg_file is not None:
        svg_file.write_text(svg(result))
    click.echo(table(result))


if __name__ == "__main__":
    main()
