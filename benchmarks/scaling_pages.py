"""A curve as a table in Markdown and as a drawing (SVG). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

import msgspec

FLAT_WITHIN = 1.5  # most to least of a value over the points that counts as flat

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 60, 170, 30, 40
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8d5a97", "#b8860b", "#444444")


class Spread(msgspec.Struct, array_like=True, frozen=True):
    """A value over the rounds."""

    median: float
    least: float
    most: float


class Point(msgspec.Struct, frozen=True):
    """One point of a curve."""

    at: int
    values: dict[str, Spread]


class Result(msgspec.Struct, frozen=True):
    """One curve as it was measured."""

    curve: str
    what: str
    rounds: int
    python: str
    machine: str
    points: list[Point]

    @property
    def names(self) -> list[str]:
        """The values each point has."""
        return list(self.points[0].values)

    def medians(self, name: str) -> list[float]:
        """One value over the points."""
        return [point.values[name].median for point in self.points]


def table(result: Result) -> str:
    """A row for each value, a column for each point, and how far apart they are: median (least-most)."""
    head = [result.what, *(spell(point.at) for point in result.points), "most / least"]
    rows = [
        [name, *(spell_spread(point.values[name]) for point in result.points), f"{ratio(result.medians(name)):.2f}"]
        for name in result.names
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def ratio(values: Sequence[float]) -> float:
    """Most to least."""
    return max(values) / max(min(values), 1e-9)


def spell(number: float) -> str:
    """A number for a person: 3.2, 47, 1,234, 12 M."""
    if number < 10:
        return f"{number:.3g}"
    if number < 1_000_000:
        return f"{number:,.0f}"
    return f"{number / 1e6:,.1f} M".replace(".0 M", " M")


def spell_spread(spread: Spread) -> str:
    """Median (least-most)."""
    return f"{spell(spread.median)} ({spell(spread.least)}-{spell(spread.most)})"


def svg(result: Result) -> str:
    """The CPU times over the points, both logarithmic, each beside its name; a band shows what counts as flat."""
    names = [name for name in result.names if name.endswith("CPU us")]
    values = [value for name in names for value in result.medians(name)]
    bottom, top = log10(max(min(values), 0.1)) - 0.1, log10(max(values)) + 0.1
    xs = [log10(max(point.at, 1)) for point in result.points]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(at: float) -> float:
        return LEFT + width * (at - xs[0]) / max(xs[-1] - xs[0], 1e-9)

    def y_of(value: float) -> float:
        return TOP + height * (top - log10(max(value, 0.1))) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">CPU of the broker, us each, over {result.what}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#999"/>',
    ]
    for at, point in zip(xs, result.points, strict=True):
        parts.append(f'<text x="{x_of(at):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{spell(point.at)}</text>')
    for mark in (base * 10.0**power for power in range(-1, 9) for base in (1, 2, 5)):
        if bottom <= log10(mark) <= top:
            parts.append(f'<text x="{LEFT - 6}" y="{y_of(mark) + 4:.1f}" text-anchor="end">{spell(mark)}</text>')
            parts.append(f'<path d="M{LEFT} {y_of(mark):.1f}H{WIDTH - RIGHT}" stroke="#eee"/>')
    for index, name in enumerate(names):
        parts += _line(name, COLOURS[index % len(COLOURS)], [
            (x_of(at), y_of(value)) for at, value in zip(xs, result.medians(name), strict=True)
        ])
    return "\n".join([*parts, "</svg>", ""])


def _line(name: str, colour: str, places: Sequence[tuple[float, float]]) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    x, y = places[-1]
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name.removesuffix(", CPU us")}</text>',
    ]
