"""zrmq against the bare limit and its peers, side by side in one run.

`python -m benchmarks.compare --rounds 5 [--only ROW] [--peers redis,nats] [--json FILE]`; README.md says what is compared.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks.contestants import PEERS, Contestant, Level, playing
from benchmarks.markdown import page
from benchmarks.results import Line, Result, load, merged, save
from benchmarks.rows import ROWS
from benchmarks.servers import start_of
from benchmarks.stage import Stage

UNITS = {
    "rate": "msg/s", "p50": "us", "p99": "us", "start": "ms", "restart": "ms", "idle": "MB", "full": "MB", "disk": "B/msg",
    "allocated": "B/msg",
}
WHOLE_SERVER_LEVEL = Level.CACHE  # rows about whole servers are played at this one

Progress = Callable[[str], None]


def cast(row: str, peers: tuple[str, ...], progress: Progress) -> list[Contestant]:
    """Who plays in a row on this machine; who cannot is named once."""
    found = []
    for contestant in playing(row, peers):
        if ROWS[row].figure is None and (contestant.level is not WHOLE_SERVER_LEVEL or contestant.name.endswith("send_batch")):
            continue
        lacks = start_of(contestant.server)[1] if contestant.server else None
        if lacks is None:
            found.append(contestant)
        else:
            progress(f"{row}: {contestant.name} is left out; it needs {lacks}")
    return found


def measure(stage: Stage, rows: Sequence[str], peers: tuple[str, ...], rounds: int, progress: Progress) -> list[Line]:
    """All rows in all rounds, the contestants of a row in turn."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        contestants = cast(row, peers, progress)
        for number in range(rounds):
            turn = number % max(len(contestants), 1)  # who begins a round has an easier or harder time; so each does
            for contestant in contestants[turn:] + contestants[:turn]:
                played = stage.play(contestant, row)
                told = ", ".join(f"{value} {figure:,.0f}" for value, figure in played.items())
                progress(f"{row}, round {number + 1} of {rounds}: {contestant.name}, {contestant.level.value}: {told}")
                for value, figure in played.items():
                    values.setdefault((row, contestant.level.value, contestant.name, value), []).append(figure)
    return [Line(*key, UNITS[key[3]], [round(figure, 1) for figure in figures]) for key, figures in values.items()]


def machine() -> dict[str, str]:
    """Facts of this machine that matter, and none that tell whose it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": str(os.cpu_count()), "memory": f"{memory / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}", "Python": platform.python_version(),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds; the median counts.")
@click.option("--messages", type=click.IntRange(100, 20_000_000), default=500_000, show_default=True, help="Messages of a round.")
@click.option("--body-bytes", type=click.IntRange(8, 1 << 20), default=128, show_default=True, help="Size of each body.")
@click.option("--stored-messages", type=click.IntRange(100), default=1_000_000, show_default=True, help="Messages of `storage`.")
@click.option("--log-mb", type=click.IntRange(1), default=500, show_default=True, help="Size of the log of `recovery`.")
@click.option("--only", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Play only this row; again for more.")
@click.option("--peers", default="", metavar="NAME[,NAME]", help=f"Only these: {', '.join(PEERS)}.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Put the rows into this file.")
@click.option(
    "--folder", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Where all data goes, in a folder of its own."
)
def compare(
    rounds: int, messages: int, body_bytes: int, stored_messages: int, log_mb: int, rows: tuple[str, ...], peers: str,
    json_file: Path | None, folder: Path | None,
) -> None:
    """Play every row with all contestants in turn, round after round, and print tables of medians with least and most."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is ended in order
    named = tuple(name for name in peers.split(",") if name)
    if unknown := set(named) - set(PEERS):
        raise click.UsageError(f"There is no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}.")
    work = Path(tempfile.mkdtemp(prefix="zrmq-compare-", dir=folder))
    try:
        with Stage(work, messages, body_bytes, stored_messages, log_mb * 1_000_000) as stage:
            lines = measure(stage, rows or list(ROWS), named, rounds, lambda text: click.echo(text, err=True))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    settings = {"body_bytes": body_bytes, "messages": messages, "stored_messages": stored_messages, "log_mb": log_mb}
    result = merged(load(json_file) if json_file else None, Result(machine(), settings, lines))
    if json_file is not None:
        save(json_file, result)
    sys.stdout.write(page(result))


if __name__ == "__main__":
    compare()
