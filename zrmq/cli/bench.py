"""`zrmq bench`: what this machine does with zrmq, each figure beside the bare ZeroMQ limit of the same minute."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from zrmq.cli.bench_figures import FIGURES, Figure, Reports, Row, chosen, rows_of, spec_of, spell
from zrmq.cli.bench_players import Spec
from zrmq.cli.children import Child, await_brokers, start_broker, start_nameserver, work_folder
from zrmq.cli.options import examples, json_option
from zrmq.cli.printing import print_json, print_table
from zrmq.client.admin import Admin
from zrmq.errors import Code, UnreachableError, ZrmqError
from zrmq.message import FlushMode
from zrmq.protocol.requests import TopicInfo

PLAYER_TIMEOUT_S = 300.0  # for the longest part, of the largest number of messages
MESSAGES_MAX = 20_000_000
QUEUE_COUNT = 4

_JSON_LINE = re.compile(rb"^\{.*\}\s*$")

Progress = Callable[[str], None]


class Stage:
    """Where figures are played: the cluster, and a folder for the players' logs. One thread."""

    def __init__(self, nameservers: str, folder: Path, messages: int, body_bytes: int) -> None:
        self._nameservers = nameservers
        self._folder = folder
        self._messages = messages
        self._body_bytes = body_bytes

    def play(self, figure: Figure, flush: FlushMode, round_number: int) -> dict[str, float]:
        """One round of a figure, on a topic of its own that is deleted afterwards. Raises `ZrmqError` if messages are missing."""
        topic = f"bench-{figure.name}-{flush.value}-{round_number}"
        specs = [self._spec(figure, part, topic) for part in figure.parts]
        with Admin(self._nameservers) as admin:
            admin.create_topic(topic, queue_count=QUEUE_COUNT, flush_mode=flush)
            try:
                if figure.fill:
                    self._run([msgspec.structs.replace(specs[0], part="produce")])
                reports = self._run(specs)
                check_stored(admin.topic(topic), specs[0])
            finally:
                admin.delete_topic(topic)
        return figure.read(reports, specs[0].messages)

    def play_limit(self, figure: Figure) -> dict[str, float]:
        """The same bytes through bare sockets."""
        specs = [self._spec(figure, part, "bench-limit") for part in figure.limit_parts]
        return figure.read(self._run(specs, first_tells_address=True), specs[0].messages)

    def _spec(self, figure: Figure, part: str, topic: str) -> Spec:
        return spec_of(figure, part, self._messages, self._body_bytes, self._nameservers, topic)

    def _run(self, specs: Sequence[Spec], *, first_tells_address: bool = False) -> Reports:
        """Start the players in order, start the clock when all are warm, collect what they report."""
        with ExitStack() as stack:
            players = []
            address = ""
            for spec in specs:
                told = msgspec.structs.replace(spec, address=address)
                arguments = [msgspec.json.encode(told).decode()]
                log_file = self._folder / "logs" / f"{spec.part}.log"
                players.append(stack.enter_context(Child(spec.part, "zrmq.cli.bench_players", arguments, log_file)))
                if first_tells_address and not address:
                    address = _fact(players[0], "address")
            for player in players:
                _fact(player, "ready")
            for player in reversed(players):  # who consumes first was warm first; who produces starts the clock last
                player.tell(b"go")
            return [_fact(player, "result") for player in players]


def check_stored(brokers: Mapping[str, TopicInfo], spec: Spec) -> None:
    """Raise unless everything that was sent is there: what is fast because it fails must not look fast."""
    stored = sum(queue.max_offset for info in brokers.values() for queue in info.queues)
    sent = spec.warm_messages + spec.messages
    if stored != sent:
        raise ZrmqError(f"{stored} of {sent} messages are stored; the broker's log and those of the players say why.")


def _fact(player: Child, name: str) -> Any:
    """What a player tells under this name, next. Raises `ZrmqError` when it fails first, in one sentence that names its log."""
    while True:
        try:
            told = msgspec.json.decode(player.wait_line(_JSON_LINE, PLAYER_TIMEOUT_S)[0])
        except UnreachableError:  # a process that ends is no server that does not answer
            raise ZrmqError(
                f"The player {player.name} ended with code {player.wait()}; its log, {player.log_file}, says why."
            ) from None
        if "failed" in told:
            raise failure(player.name, player.log_file, *told["failed"])
        if name in told:
            return told[name]


def failure(name: str, log_file: Path, code: int, message: str) -> ZrmqError:
    """What a player failed with, as this command's own: nobody answered, or it did not get done what was asked for."""
    kind = UnreachableError if code == UnreachableError.code else ZrmqError
    return kind(f"The player {name} (its log: {log_file}) failed: {message}", code=Code(code))


def measure(stage: Stage, figures: Sequence[Figure], rounds: int, progress: Progress) -> list[Row]:
    """All figures in all rounds, both flush modes and the limit in turn."""
    values: dict[tuple[str, str], list[dict[str, float]]] = {}
    limits: dict[tuple[str, str], list[dict[str, float]]] = {}
    for round_number in range(1, rounds + 1):
        for figure in figures:
            for flush in FlushMode:
                progress(f"round {round_number} of {rounds}: {figure.name}, flush {flush.value}")
                key = (figure.name, flush.value)
                values.setdefault(key, []).append(stage.play(figure, flush, round_number))
                limits.setdefault(key, []).append(stage.play_limit(figure))
    return [
        row
        for figure in figures for flush in FlushMode
        for row in rows_of(figure, flush.value, values[figure.name, flush.value], limits[figure.name, flush.value])
    ]


@contextmanager
def running_cluster(data: Path | None) -> Iterator[tuple[str, Path]]:
    """A NameServer and a broker as processes, and the folder they use; a temporary one is removed."""
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(data, "zrmq-bench-"))
        nameserver, address = start_nameserver("nameserver", folder / "logs" / "nameserver.log")
        stack.callback(nameserver.stop)
        broker, _ = start_broker("bench", folder / "logs" / "broker.log", address, folder / "broker")
        stack.callback(broker.stop)
        await_brokers(address, 1)
        yield address, folder


# --- the command --------------------------------------------------------------------------------------------------------


NAMES = [figure.name for figure in FIGURES]


@click.command(epilog=examples("zrmq bench", "zrmq bench --only produce --only send", "zrmq bench --body-bytes 1024 --json"))
@click.option("--messages", type=click.IntRange(1, MESSAGES_MAX), default=500_000, show_default=True, help="Messages a round.")
@click.option("--body-bytes", type=click.IntRange(8, 1 << 20), default=128, show_default=True, help="Size of each body.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds; the median counts.")
@click.option("--only", "names", multiple=True, type=click.Choice(NAMES), help="Measure only this figure; again for more.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder for the broker's data; kept.")
@click.option("--nameservers", metavar="ADDRESS[,ADDRESS]", help="Measure a running cluster instead of one started here.")
@json_option
def bench(
    messages: int, body_bytes: int, rounds: int, names: tuple[str, ...], data: Path | None, nameservers: str | None, as_json: bool
) -> None:
    """Measure this machine: produce, consume, both at once, one send at a time, latency from end to end.

    Every figure is measured with flushing before acknowledging (sync) and without (async), each beside the limit of bare ZeroMQ
    sockets that move the same bytes. The values are medians over the rounds, with the least and the most.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is ended in order
    figures = chosen(names)
    if data and nameservers:
        raise click.UsageError("--data is for a broker started here; leave it out with --nameservers.")
    with ExitStack() as stack:
        if nameservers:
            folder = stack.enter_context(work_folder(None, "zrmq-bench-"))
            address = nameservers
        else:
            address, folder = stack.enter_context(running_cluster(data))
        progress = stack.enter_context(_progress())
        rows = measure(Stage(address, folder, messages, body_bytes), figures, rounds, progress)
    if as_json:
        print_json({"messages": messages, "body_bytes": body_bytes, "rounds": rounds, "figures": rows})
        return
    print_table(("figure", "flush", "", "median", "least - most", "bare ZeroMQ", "ratio"), map(_cells, rows))
    for figure in figures:
        click.echo(f"{figure.name}: {figure.what}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Says on stderr what is measured now: a spinner on a terminal, else a line each."""
    if not sys.stderr.isatty():
        yield lambda text: click.echo(text, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)


def _cells(row: Row) -> tuple[str, ...]:
    """A row's texts; shares of a limit in percent, times as multiples of it."""
    ratio = f"{row.ratio:.0%}" if row.value == "rate" else f"{row.ratio:.1f} x"
    spread = f"{spell(row.least, row.unit)} - {spell(row.most, row.unit)}"
    return (
        row.figure, row.flush, row.value if row.value != "rate" else "", f"{spell(row.median, row.unit)} {row.unit}", spread,
        spell(row.limit, row.unit), ratio,
    )
