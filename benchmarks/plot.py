"""A result as an SVG picture: a panel for each row, level and value, a bar for each contestant, a line least to most. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.contestants import Level
from benchmarks.results import Line, Result, ranked, spelled

WIDTH, LABEL_WIDTH, BAR_WIDTH = 860, 190, 480  # pixels; what is left of the width is for the number
BAR_HEIGHT, GAP, TITLE_HEIGHT, MARGIN = 18, 6, 30, 14
HOME_COLOUR, PEER_COLOUR, LIMIT_COLOUR = "#1f6feb", "#8c959f", "#d0d7de"

Panel = tuple[str, list[Line]]  # a title, and bars that may be compared


def picture(result: Result) -> str:
    """The whole picture."""
    parts, top = [], MARGIN
    for title, lines in panels(result):
        parts += list(_panel(title, lines, top))
        top += panel_height(lines)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top}" fill="white"/>', *parts, "</svg>", ""])


def panels(result: Result) -> Iterator[Panel]:
    """What is compared with each other, in the order of the result. The bare limit has panels of its own."""
    for row in result.rows():
        for level in Level:
            found = [line for line in result.lines if (line.row, line.level) == (row, level.value)]
            for value in dict.fromkeys(line.value for line in found):
                kind = "" if value == "rate" else f", {value}"
                yield f"{row}{kind}: {level.value}", ranked([line for line in found if line.value == value])


def panel_height(lines: Sequence[Line]) -> int:
    """Pixels from the title of a panel to that of the next."""
    return TITLE_HEIGHT + len(lines) * (BAR_HEIGHT + GAP) + MARGIN


def _panel(title: str, lines: Sequence[Line], top: int) -> Iterator[str]:
    yield f'<text x="{MARGIN}" y="{top + 16}" font-weight="bold">{escape(title)}</text>'
    most = max(max(line.rounds) for line in lines) or 1.0
    for number, line in enumerate(lines):
        yield from _bar(line, top + TITLE_HEIGHT + number * (BAR_HEIGHT + GAP), BAR_WIDTH / most)


def _bar(line: Line, top: int, scale: float) -> Iterator[str]:
    """`scale`: pixels for one of the unit."""
    left, base, middle = LABEL_WIDTH, top + BAR_HEIGHT - 5, top + BAR_HEIGHT / 2
    least, length, most = (value * scale for value in (min(line.rounds), line.middle, max(line.rounds)))
    colour = HOME_COLOUR if line.contestant.startswith("zrmq") else PEER_COLOUR
    if line.level == Level.LIMIT.value:
        colour = LIMIT_COLOUR
    yield f'<text x="{left - 8}" y="{base}" text-anchor="end">{escape(line.contestant)}</text>'
    yield f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{colour}"/>'
    yield f'<path d="M{left + least:.1f} {middle:.1f}H{left + most:.1f}" stroke="#24292f"/>'
    yield f'<text x="{left + most + 8:.1f}" y="{base}">{escape(spelled(line.middle, line.unit))}</text>'
