"""What commands print: nothing that a peer sent can do harm, and tables that people and programs can read."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.cli.printing import escape, escape_bytes, print_json, print_table
from zrmq.message import FlushMode


@given(st.text())
def test_escaped_text_is_one_printable_line(text: str) -> None:
    assert escape(text).isprintable()
    assert text.isprintable() is (escape(text) == text) or "\\" in escape(text)


@given(st.binary())
def test_escaped_bodies_are_one_printable_line(body: bytes) -> None:
    assert escape_bytes(body).isprintable()


@pytest.mark.parametrize(
    ("body", "shown"),
    [(b"21.5", "21.5"), ("küche".encode(), "küche"), (b"a\nb", "a\\nb"), (b"\x1b[2J", "\\x1b[2J"), (b"\xff\x00", "\\xff\\x00")],
)
def test_bodies(body: bytes, shown: str) -> None:
    assert escape_bytes(body) == shown


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "a\nb", "mode": FlushMode.SYNC, "none": None})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "a\nb", "mode": "sync", "none": None}


def test_an_output_that_is_not_utf_8_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    print_table(("body",), [(escape_bytes("grün → x\n".encode()),)])
    print_json({"body": "grün → 😀"})
    first, second, third = written.getvalue().splitlines()
    assert (first, second) == (b"body", "grün \\u2192 x\\n".encode("latin-1"))
    assert json.loads(third) == {"body": "grün → 😀"}, "JSON is UTF-8 everywhere"


def test_tables_are_plain_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("topic", "messages"), [("meters", 5), ("a\x1b[2J", 1_000)])
    assert capsys.readouterr().out == "topic     messages\nmeters    5\na\\x1b[2J  1000\n"


def test_a_table_without_rows_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("topic", "messages"), [])
    assert capsys.readouterr().out == "topic  messages\n"


def test_tables_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table(("topic", "messages"), [("[red]meters", 5)])
    assert "[red]meters" in terminal.getvalue()
    assert "┃" in terminal.getvalue() or "|" in terminal.getvalue()
