"""What commands print: JSON lines, tables that are drawn on a terminal and plain elsewhere, and text that cannot do harm."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import click
import msgspec

Row = Sequence[object]


def print_json(value: object) -> None:
    """One object, on one line. JSON is UTF-8, whatever the output's encoding is."""
    click.echo(msgspec.json.encode(value))


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Rows under a header. On a terminal with lines drawn by rich; elsewhere with blanks, for people and for awk."""
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw_table(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw_table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


def escape(text: str) -> str:
    """The text with control characters spelled out, and those that the output's encoding lacks: what a peer sent must not move
    the cursor, clear the screen or end the command."""
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    if text.isascii():
        return text
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape_bytes(body: bytes) -> str:
    """A body as text of one line; bytes that are not UTF-8 as `\\xff`."""
    return escape(body.decode("utf-8", "backslashreplace"))
