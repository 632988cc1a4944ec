"""The demo's tables, lines and verdict, as a person reads them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from zrmq.cli.demo_verdict import GroupVerdict, Rebalance, Verdict
from zrmq.cli.demo_view import (
    NOTES_MAX,
    BrokerRow,
    Counts,
    PlainView,
    Rates,
    SilentView,
    Snapshot,
    TerminalView,
    draw,
    plain_line,
    verdict_lines,
)


def snapshot(elapsed_s: float = 4.0, sent: int = 1200) -> Snapshot:
    return Snapshot(
        elapsed_s, 20.0, Counts(sent, sent - 10, {"sorters": sent - 20, "screens": 2 * sent}),
        [
            BrokerRow("broker-a", "tcp://127.0.0.1:4001", False, {"demo-load": 4, "demo-devices": 4}),
            BrokerRow("broker-b", "tcp://127.0.0.1:4002", True, {"demo-load": 4}),
        ],
        {"demo-load/broker-a/0": ["worker-1"], "demo-load/broker-a/1": ["worker-2"], "demo-load/broker-b/0": []},
        {"sorters": 7},
    )


def text_of(view: object) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- rates --------------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_last_seconds() -> None:
    rates = Rates()
    assert rates.add(0.0, Counts(0, 0, {"g": 0})) == Counts(0, 0, {"g": 0})
    assert rates.add(1.0, Counts(100, 90, {"g": 50})) == Counts(100, 90, {"g": 50})
    for second in range(2, 10):
        latest = rates.add(float(second), Counts(100 + 500 * (second - 1), 90, {"g": 50}))
    assert latest == Counts(500, 0, {"g": 0}), "what was long ago counts no more"


def test_two_looks_at_one_moment_have_no_rate() -> None:
    rates = Rates()
    rates.add(1.0, Counts(0, 0, {}))
    assert rates.add(1.0, Counts(5, 5, {})) == Counts(0, 0, {})


# --- plain --------------------------------------------------------------------------------------------------------------


def test_a_line_has_everything() -> None:
    line = plain_line(snapshot(), Counts(300, 299, {"sorters": 298, "screens": 600}))
    assert line.split("  ")[1:] == [
        " 4 s", "sent 1,200 (300/s)", "stored 1,190", "sorters 1,180 (298/s, lag 7)", "screens 2,400 (600/s, lag 0)",
        "2 of 3 queues owned",
    ]


def test_the_plain_view_writes_a_line_a_second_and_every_note() -> None:
    lines: list[str] = []
    view = PlainView(lines.append)
    for tenth in range(25):
        view.show(snapshot(elapsed_s=tenth / 10))
    view.note("worker-2 is killed")
    view.close()
    assert [line[:6].strip() for line in lines] == ["0 s", "1 s", "2 s", "worker"]


def test_the_silent_view_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    view = SilentView()
    view.show(snapshot())
    view.note("x")
    view.close()
    assert capsys.readouterr() == ("", "")


# --- terminal -----------------------------------------------------------------------------------------------------------


def test_tables_show_routes_ownership_rates_and_lag() -> None:
    text = text_of(draw(snapshot(), Counts(300, 299, {"sorters": 298, "screens": 600}), ["a NameServer is killed"]))
    for part in ("broker-a", "tcp://127.0.0.1:4002 (suspect)", "worker-1", "worker-2", "nobody", "298", "a NameServer is killed"):
        assert part in text
    row = next(line for line in text.splitlines() if "demo-load/broker-b" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["demo-load/broker-b", "", "", "0"]


def test_a_queue_with_two_owners_shows_under_both() -> None:
    text = text_of(draw(Snapshot(0, 1, Counts(0, 0, {}), [], {"t/b/5": ["w1", "w2"]}, {}), Counts(0, 0, {}), []))
    row = next(line for line in text.splitlines() if "t/b" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["t/b", "5", "5", ""]


def test_the_terminal_view_keeps_the_last_notes() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    view = TerminalView(console)
    try:
        for number in range(NOTES_MAX + 2):
            view.note(f"note {number}")
        view.show(snapshot())
    finally:
        view.close()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "note 7" in shown
    assert "note 1" not in shown


# --- the verdict --------------------------------------------------------------------------------------------------------


def verdict(*faults: str) -> Verdict:
    groups = [GroupVerdict("sorters", "", 6003, 5980, 0, 23, 0, 0), GroupVerdict("screens", "screen-1", 5980, 5980, 0, 0, 0, 0)]
    rebalances = [Rebalance("worker-1 joins", 44.8, 1), Rebalance("worker-2 is killed", 3120.0, 5)]
    return Verdict(5980, 5980, 0, groups, [], [], rebalances, list(faults))


def test_a_good_verdict() -> None:
    assert verdict_lines(verdict(), 3000) == [
        "sent 5,980, stored 5,980, of these twice 0",
        "group    instance  consumed  readings  lost  duplicated  out of order",
        "sorters               6,003     5,980     0          23             0",
        "screens  screen-1     5,980     5,980     0           0             0",
        "worker-1 joins: 1 queue changed hands within 45 ms",
        "worker-2 is killed: 5 queues changed hands within 3,120 ms, of which the session timeout 3 s",
        "Good: nothing was lost, order held for each sensor, and no queue had two owners at once.",
    ]


def test_a_bad_verdict_says_why() -> None:
    lines = verdict_lines(verdict("sorters: 2 stored readings never came.", "broker-a ended with code -9."), 3000)
    assert lines[-3:] == ["Not good:", "- sorters: 2 stored readings never came.", "- broker-a ended with code -9."]
