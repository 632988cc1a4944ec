"""A result as Markdown tables, one for each row, levels apart from each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.contestants import Level
from benchmarks.results import BETTER_MORE, Line, Result, ranked, spelled, spread
from benchmarks.rows import ROWS

HOME = "zrmq"  # what the others are compared with


def page(result: Result) -> str:
    """All tables, below the facts of the machine."""
    machine = [f"{name}: {fact}" for name, fact in result.machine.items()]
    settings = [f"{name.replace('_', ' ')}: {number:,}" for name, number in result.settings.items()]
    facts = ["; ".join(machine) + ".", "; ".join(settings) + "."]
    return "\n".join([*facts, "", *(line for row in result.rows() for line in _row(result, row))])


def _row(result: Result, row: str) -> Iterator[str]:
    yield f"### {row}: {ROWS[row].what}"
    yield ""
    yield "| acknowledged from | | who | median | least - most | rounds | beside zrmq |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for level in Level:
        found = [line for line in result.lines if (line.row, line.level) == (row, level.value)]
        for value in dict.fromkeys(line.value for line in found):
            yield from _group(level, value, ranked([line for line in found if line.value == value]))
    yield ""


def _group(level: Level, value: str, lines: Sequence[Line]) -> Iterator[str]:
    """Only these are comparable: one row, one level, one value."""
    home = next((line for line in lines if line.contestant == HOME), None)
    for line in lines:
        who = f"**{line.contestant}**" if line is home else line.contestant
        yield (
            f"| {level.value} | {value} | {who} | {spelled(line.middle, line.unit)} | {spread(line)} | {len(line.rounds)} "
            f"| {beside(line, home)} |"
        )


def beside(line: Line, home: Line | None) -> str:
    """How many times the median of zrmq this one is; empty for itself, and where zrmq has no line to compare with."""
    if home is None or line is home or not home.middle:
        return ""
    ratio = line.middle / home.middle
    is_better = (ratio > 1) == (line.unit in BETTER_MORE)
    digits = 2 if ratio >= 0.1 else 4
    return f"{ratio:.{digits}f} x{' (better)' if is_better and ratio != 1 else ''}"
