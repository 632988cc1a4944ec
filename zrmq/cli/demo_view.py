"""What the demo shows while it runs: tables on a terminal, a line a second elsewhere; and its verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from zrmq.cli.demo_verdict import GroupVerdict, Verdict

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

LINE_EVERY_S = 1.0
RATE_OVER_S = 2.0  # rates are those of the last so many seconds
NOTES_MAX = 6  # last ones on the terminal

Write = Callable[[str], None]


class BrokerRow(msgspec.Struct, frozen=True):
    """One broker of the routes."""

    broker_name: str
    address: str
    is_suspect: bool
    queue_counts: dict[str, int]  # by topic


class Counts(msgspec.Struct, frozen=True):
    """Totals at one moment."""

    sent: int
    stored: int
    consumed: dict[str, int]  # by group


class Snapshot(msgspec.Struct, frozen=True):
    """What there is to see at one moment."""

    elapsed_s: float
    seconds: float
    counts: Counts
    brokers: Sequence[BrokerRow]
    owners: dict[str, list[str]]  # queue -> workers; every queue of the demo's topics is there
    lag: dict[str, int]  # by group: messages stored and not committed


class View(Protocol):
    """Where a demo is shown."""

    def show(self, snapshot: Snapshot) -> None:
        """The state now; called some ten times a second."""

    def note(self, text: str) -> None:
        """Something happened."""

    def close(self) -> None:
        """The end; what was noted stays to be seen."""


class Rates:
    """Rates from totals, over the last `RATE_OVER_S`."""

    def __init__(self) -> None:
        self._past: list[tuple[float, Counts]] = []

    def add(self, elapsed_s: float, counts: Counts) -> Counts:
        """Take the totals of now; the changes per second."""
        self._past.append((elapsed_s, counts))
        while len(self._past) > 2 and self._past[1][0] <= elapsed_s - RATE_OVER_S:
            del self._past[0]
        then_s, then = self._past[0]
        span_s = elapsed_s - then_s
        if span_s <= 0:
            return Counts(0, 0, dict.fromkeys(counts.consumed, 0))
        return Counts(
            round((counts.sent - then.sent) / span_s),
            round((counts.stored - then.stored) / span_s),
            {group: round((count - then.consumed.get(group, 0)) / span_s) for group, count in counts.consumed.items()},
        )


class SilentView:
    """Shows nothing."""

    def show(self, snapshot: Snapshot) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainView:
    """A line for each event and one a second."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._rates = Rates()
        self._next_s = 0.0

    def show(self, snapshot: Snapshot) -> None:
        rates = self._rates.add(snapshot.elapsed_s, snapshot.counts)
        if snapshot.elapsed_s >= self._next_s:
            self._next_s = snapshot.elapsed_s + LINE_EVERY_S
            self._write(plain_line(snapshot, rates))

    def note(self, text: str) -> None:
        self._write(text)

    def close(self) -> None: ...


def plain_line(snapshot: Snapshot, rates: Counts) -> str:
    """The state in one line."""
    counts = snapshot.counts
    parts = [f"{snapshot.elapsed_s:4.0f} s", f"sent {counts.sent:,} ({rates.sent:,}/s)", f"stored {counts.stored:,}"]
    for group, count in counts.consumed.items():
        parts.append(f"{group} {count:,} ({rates.consumed[group]:,}/s, lag {snapshot.lag.get(group, 0):,})")
    owned = sum(1 for workers in snapshot.owners.values() if workers)
    parts.append(f"{owned} of {len(snapshot.owners)} queues owned")
    return "  ".join(parts)


class TerminalView:
    """Tables that change in place. Close it, or the terminal stays as the tables left it."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._rates = Rates()
        self._notes: list[str] = []
        self._live = Live(console=console, refresh_per_second=8)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(draw(snapshot, self._rates.add(snapshot.elapsed_s, snapshot.counts), self._notes))

    def note(self, text: str) -> None:
        self._notes = [*self._notes, text][-NOTES_MAX:]

    def close(self) -> None:
        self._live.stop()


def draw(snapshot: Snapshot, rates: Counts, notes: Sequence[str]) -> RenderableType:
    """The tables of one moment."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    return Group(
        ProgressBar(total=snapshot.seconds, completed=min(snapshot.elapsed_s, snapshot.seconds)),
        Columns([_routes(snapshot), _flow(snapshot, rates)]),
        _ownership(snapshot),
        Text("\n".join(notes)),
    )


def _routes(snapshot: Snapshot) -> Table:
    from rich.table import Table

    topics = sorted({topic for broker in snapshot.brokers for topic in broker.queue_counts})
    table = Table("broker", "address", *topics, title="routes (queues)")
    for broker in snapshot.brokers:
        counts = [str(broker.queue_counts.get(topic, "")) for topic in topics]
        table.add_row(broker.broker_name, broker.address + (" (suspect)" if broker.is_suspect else ""), *counts)
    return table


def _flow(snapshot: Snapshot, rates: Counts) -> Table:
    from rich.table import Table

    table = Table("", "readings", "per second", "lag", title=f"{snapshot.elapsed_s:.0f} of {snapshot.seconds:.0f} s")
    table.add_row("sent", f"{snapshot.counts.sent:,}", f"{rates.sent:,}", "")
    table.add_row("stored", f"{snapshot.counts.stored:,}", f"{rates.stored:,}", "")
    for group, count in snapshot.counts.consumed.items():
        table.add_row(group, f"{count:,}", f"{rates.consumed[group]:,}", f"{snapshot.lag.get(group, 0):,}")
    return table


def _ownership(snapshot: Snapshot) -> Table:
    """A column for each worker, a row for each topic at each broker: the numbers of the queues it owns."""
    from rich.table import Table

    workers = sorted({worker for owners in snapshot.owners.values() for worker in owners})
    table = Table("topic and broker", *workers, "nobody", title="who owns which queue")
    for place in sorted({queue.rpartition("/")[0] for queue in snapshot.owners}):
        cells: dict[str, list[str]] = {name: [] for name in [*workers, "nobody"]}
        for queue, owners in sorted(snapshot.owners.items()):
            where, _, number = queue.rpartition("/")
            if where == place:
                for owner in owners or ["nobody"]:
                    cells[owner].append(number)
        table.add_row(place, *(" ".join(numbers) for numbers in cells.values()))
    return table


# --- the verdict --------------------------------------------------------------------------------------------------------


def verdict_lines(verdict: Verdict, session_timeout_ms: int) -> list[str]:
    """The verdict in words and numbers."""
    lines = [f"sent {verdict.sent:,}, stored {verdict.stored:,}, of these twice {verdict.stored_twice:,}"]
    heads = ("group", "instance", "consumed", "readings", "lost", "duplicated", "out of order")
    rows = [heads, *(_group_cells(group) for group in verdict.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines += ["  ".join(_pad(cell, width, at) for at, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    for rebalance in verdict.rebalances:
        waited = f", of which the session timeout {session_timeout_ms / 1000:g} s" if "killed" in rebalance.cause else ""
        queues = "1 queue" if rebalance.queue_count == 1 else f"{rebalance.queue_count} queues"
        lines.append(f"{rebalance.cause}: {queues} changed hands within {rebalance.took_ms:,.0f} ms{waited}")
    if verdict.is_good:
        return [*lines, "Good: nothing was lost, order held for each sensor, and no queue had two owners at once."]
    return [*lines, "Not good:", *(f"- {fault}" for fault in verdict.faults)]


def _group_cells(group: GroupVerdict) -> tuple[str, ...]:
    counts = (group.consumed, group.distinct, group.lost, group.duplicated, group.order_violations)
    return (group.group, group.instance, *(f"{count:,}" for count in counts))


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
