"""The result of a run: the numbers of each round, their medians and spread, as JSON. Pure but for `load` and `save`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.rows import ROWS

BETTER_MORE = ("msg/s",)  # units of which more is better; of all others less is


class Line(msgspec.Struct, frozen=True):
    """What one contestant did in one row at one level: the value of each round."""

    row: str
    level: str  # the value of a `Level`
    contestant: str
    value: str  # rate, p50, p99, idle, full, disk, start, restart
    unit: str
    rounds: list[float]

    @property
    def middle(self) -> float:
        """The median round."""
        return median(self.rounds)


class Result(msgspec.Struct, frozen=True):
    """A whole run, or the rows of several put together."""

    machine: dict[str, str]
    settings: dict[str, int]
    lines: list[Line]

    def rows(self) -> list[str]:
        """Names of the rows it has, in the order of `ROWS`, whenever they were measured."""
        return [row for row in ROWS if any(line.row == row for line in self.lines)]


def merged(older: Result | None, newer: Result) -> Result:
    """The newer result, and those rows of the older one that it does not have."""
    if older is None:
        return newer
    kept = [line for line in older.lines if line.row not in newer.rows()]
    return msgspec.structs.replace(newer, lines=[*kept, *newer.lines])


def load(file: Path) -> Result | None:
    """What a run saved; None if there is no file."""
    return msgspec.json.decode(file.read_bytes(), type=Result) if file.exists() else None


def save(file: Path, result: Result) -> None:
    """Write it, a value per line, for people and diffs."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def ranked(lines: Sequence[Line]) -> list[Line]:
    """Lines of one row, level and value, the best first."""
    return sorted(lines, key=lambda line: line.middle, reverse=bool(lines) and lines[0].unit in BETTER_MORE)


def spelled(number: float, unit: str) -> str:
    """A number with its unit, for a person."""
    if unit == "msg/s":
        power, letter = (1e6, " M") if number >= 1e6 else (1e3, " k") if number >= 1e3 else (1.0, " ")
        return f"{three_digits(number / power)}{letter}/s"
    return f"{three_digits(number)} {unit}"


def three_digits(number: float) -> str:
    """As many decimals as there is sense in."""
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def spread(line: Line) -> str:
    """Least and most of the rounds."""
    return f"{spelled(min(line.rounds), line.unit)} - {spelled(max(line.rounds), line.unit)}"
