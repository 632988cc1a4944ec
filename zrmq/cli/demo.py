"""`zrmq demo`: a small cluster on this machine, its own sensors as messages, two accidents, and a verdict."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

import zrmq
from zrmq.cli.children import work_folder
from zrmq.cli.demo_cast import Cast
from zrmq.cli.demo_observer import Observer
from zrmq.cli.demo_publisher import Publisher
from zrmq.cli.demo_readings import TOPICS, CsvReadings, HostSensors, Source
from zrmq.cli.demo_verdict import Ledger, Verdict, Worker, judge
from zrmq.cli.demo_view import Counts, PlainView, SilentView, Snapshot, TerminalView, View, verdict_lines
from zrmq.cli.failures import EXIT_DONE, EXIT_FAILED
from zrmq.cli.options import examples, json_option
from zrmq.cli.printing import print_json
from zrmq.clock import SystemClock
from zrmq.errors import RequestTimeoutError

BROKERS = ("broker-a", "broker-b")
SORTERS, SCREENS = "demo-sorters", "demo-screens"  # the clustering and the broadcasting group
FIRST_WORKERS = (
    Worker("worker-1", SORTERS, clustering=True),
    Worker("worker-2", SORTERS, clustering=True),
    Worker("screen-1", SCREENS, clustering=False),
    Worker("screen-2", SCREENS, clustering=False),
)
LATE_WORKER = Worker("worker-3", SORTERS, clustering=True)
QUEUE_COUNT = 4  # of each topic at each broker
SESSION_TIMEOUT_MS = 3_000  # short, so that a kill is noticed within the demo
TURN_S = 0.02
READY_TIMEOUT_S = 30.0
DRAIN_IDLE_S = 15.0  # without any delivery, before what is missing counts as lost
BAD_ROWS_SHOWN = 10

JOIN_AT, KILL_WORKER_AT, KILL_NAMESERVER_AT = 0.2, 0.4, 0.6  # of the time


class Demo:
    """One run. Make it, `run` it once; whoever made the cast and the observer closes them."""

    def __init__(self, cast: Cast, ledger: Ledger, publisher: Publisher, observer: Observer, view: View, seconds: float) -> None:
        self._cast = cast
        self._ledger = ledger
        self._publisher = publisher
        self._observer = observer
        self._view = view
        self._seconds = seconds
        self._clock = SystemClock()
        self._began_ms = 0.0
        self._invited = {worker.name for worker in FIRST_WORKERS}
        self._scenes: list[tuple[float, Callable[[], None]]] = [
            (JOIN_AT * seconds, self._join),
            (KILL_WORKER_AT * seconds, self._kill_worker),
            (KILL_NAMESERVER_AT * seconds, self._kill_nameserver),
        ]

    def run(self) -> Verdict:
        """Play it to the end. Raises `RequestTimeoutError` when the consumers do not get ready."""
        self._wait_for_workers()
        self._view.note(f"Publishing for {self._seconds:g} s.")
        self._began_ms = self._clock.monotonic_ms()
        while not self._is_over():
            self._publisher.publish(self._elapsed_s)
            self._play_scenes()
            self._turn()
        self._drain()
        return self._end()

    def _is_over(self) -> bool:
        """When the time is up; later where a slow machine has not come to all scenes; earlier when somebody crashed."""
        late_s = self._elapsed_s - self._seconds
        if self._scenes and late_s > READY_TIMEOUT_S:
            self._ledger.crashes.append(f"{LATE_WORKER.name} did not get ready within {READY_TIMEOUT_S:.0f} s.")
        return bool(self._ledger.crashes) or (late_s >= 0 and not self._scenes)

    @property
    def _elapsed_s(self) -> float:
        return (self._clock.monotonic_ms() - self._began_ms) / 1000.0

    def _wait_for_workers(self) -> None:
        self._view.note("Starting two NameServers, two brokers and the consumers.")
        deadline_ms = self._clock.monotonic_ms() + READY_TIMEOUT_S * 1000
        while not self._invited <= self._ledger.ready and not self._ledger.crashes:
            if self._clock.monotonic_ms() > deadline_ms:
                late = ", ".join(sorted(self._invited - self._ledger.ready))
                raise RequestTimeoutError(f"{late} did not get ready within {READY_TIMEOUT_S:.0f} s; see the logs with --data.")
            self._cast.feed(self._ledger, TURN_S)

    def _turn(self) -> None:
        """Everything that is done again and again."""
        self._cast.feed(self._ledger, TURN_S)
        self._publisher.settle()
        self._view.show(self._snapshot())

    # --- scenes -------------------------------------------------------------------------------------------------------

    def _play_scenes(self) -> None:
        """What is due; but nothing else happens while somebody is still on the way in, so that each has its own effects."""
        while self._scenes and self._scenes[0][0] <= self._elapsed_s and self._invited <= self._ledger.ready:
            self._scenes.pop(0)[1]()

    def _join(self) -> None:
        self._view.note(f"{LATE_WORKER.name} joins {SORTERS}.")
        self._invited.add(LATE_WORKER.name)
        self._cast.start_worker(LATE_WORKER)

    def _kill_worker(self) -> None:
        victim = FIRST_WORKERS[1].name
        self._cast.kill(victim)
        silence = f"{SESSION_TIMEOUT_MS / 1000:g} s of silence"
        self._view.note(f"{victim} is killed (SIGKILL); after {silence} its queues go to the others.")

    def _kill_nameserver(self) -> None:
        self._cast.kill("nameserver-1")
        self._view.note("nameserver-1 is killed (SIGKILL); everybody moves on to nameserver-2.")

    # --- the end ------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait until everybody has everything and every queue has an owner again, as long as anything happens."""
        self._view.note("The last readings are on their way.")
        if not self._ledger.crashes:
            self._publisher.publish(self._seconds)
        self._publisher.finish()
        began_ms = self._clock.monotonic_ms()
        while not self._is_complete() and not self._ledger.crashes:
            if self._clock.monotonic_ms() - max(began_ms, self._ledger.last_report_ms) > DRAIN_IDLE_S * 1000:
                break
            self._turn()
        self._turn()

    def _is_complete(self) -> bool:
        return not self._ledger.missing_count and self._ledger.owners().keys() >= set(self._observer.latest.queues)

    def _end(self) -> Verdict:
        self._observer.close()
        self._ledger.leases = self._observer.leases
        self._ledger.finish(self._clock.monotonic_ms())
        self._cast.end_workers()
        return judge(self._ledger)

    def _snapshot(self) -> Snapshot:
        ledger, sight = self._ledger, self._observer.latest
        counts = Counts(
            ledger.sent_count, len(ledger.stored), {group: ledger.consumed_count(group) for group in (SORTERS, SCREENS)}
        )
        owned = ledger.owners()
        owners = {queue: owned.get(queue, []) for queue in sight.queues}
        return Snapshot(self._elapsed_s, self._seconds, counts, sight.brokers, owners, sight.lag)


def play(source: Source, folder: Path, view: View, seconds: float, per_second: int) -> Verdict:
    """A whole demo: start everything, run it, end everything."""
    run = f"{random.SystemRandom().getrandbits(64):016x}"
    with ExitStack() as stack:
        stack.callback(view.close)
        cast = Cast(folder, run)
        stack.callback(cast.close)
        cast.start_cluster(BROKERS, SESSION_TIMEOUT_MS)
        fabric = stack.enter_context(zrmq.connect(cast.nameservers))
        admin = fabric.admin()
        for topic in TOPICS:
            admin.create_topic(topic, queue_count=QUEUE_COUNT)
        ledger = Ledger([*FIRST_WORKERS, LATE_WORKER])
        for worker in FIRST_WORKERS:
            cast.start_worker(worker)
        observer = Observer(admin, TOPICS, (SORTERS, SCREENS))
        stack.callback(observer.close)
        observer.start()
        publisher = Publisher(fabric.producer("demo"), source, ledger, per_second, run)
        return Demo(cast, ledger, publisher, observer, view, seconds).run()


# --- the command --------------------------------------------------------------------------------------------------------


@click.command(epilog=examples("zrmq demo", "zrmq demo --seconds 60 --rate 1000", "zrmq demo --csv readings.csv --json"))
@click.option("--seconds", type=click.IntRange(5, 3600), default=20, show_default=True, help="How long to publish.")
@click.option("--rate", "per_second", type=click.IntRange(1, 5000), default=300, show_default=True, help="Readings a second.")
@click.option("--csv", "file", type=click.Path(path_type=Path), help="Replay a file with columns sensor,value[,unit][,at].")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder for data and logs; kept.")
@json_option
def demo(seconds: int, per_second: int, file: Path | None, data: Path | None, as_json: bool) -> int:
    """Run a cluster on this machine's sensors, kill parts of it, and show that nothing is lost.

    Two NameServers and two brokers start as processes of their own. This machine's readings go to two topics with four queues
    at each broker; a clustering group of three consumers and a broadcasting group of two read them. One clustering consumer is
    killed on the way, and one NameServer. At the end it says what was sent, stored, consumed, lost and repeated, and how long
    each rebalance took. The exit code is 0 when nothing was lost, order held for each sensor, and no queue had two owners at
    once.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is ended in order
    source: Source = _open_csv(file) if file is not None else HostSensors()
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(data, "zrmq-demo-"))
        verdict = play(source, folder, _view(as_json), seconds, per_second)
    if as_json:
        print_json({"good": verdict.is_good, **{name: getattr(verdict, name) for name in verdict.__struct_fields__}})
    else:
        for line in verdict_lines(verdict, SESSION_TIMEOUT_MS):
            click.echo(line)
    return EXIT_DONE if verdict.is_good else EXIT_FAILED


def _open_csv(file: Path) -> CsvReadings:
    source = CsvReadings(file)
    for bad in source.bad_rows[:BAD_ROWS_SHOWN]:
        click.echo(f"Warning: {file}, line {bad.line}, is left out: {bad.reason}", err=True)
    if len(source.bad_rows) > BAD_ROWS_SHOWN:
        click.echo(f"Warning: {len(source.bad_rows) - BAD_ROWS_SHOWN} more lines of {file} are left out.", err=True)
    return source


def _view(as_json: bool) -> View:
    if as_json:
        return SilentView()
    if not sys.stdout.isatty():
        return PlainView(click.echo)
    from rich.console import Console

    return TerminalView(Console())
