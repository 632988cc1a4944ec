"""The pure parts of the comparison with peers: who plays, statistics, tables, the picture, confirms."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.contestants import CONTESTANTS, PEERS, Level, playing
from benchmarks.markdown import beside, page
from benchmarks.peers.rabbitmq_queues import Confirms
from benchmarks.plot import BAR_WIDTH, LABEL_WIDTH, panels, picture
from benchmarks.results import Line, Result, load, merged, ranked, save, spelled, spread
from benchmarks.rows import ROWS
from benchmarks.servers import MODULES, missing_of
from benchmarks.session import Countdown, Session
from benchmarks.stage import SHARED
from zrmq.cli.bench_figures import FIGURES

LIMIT, CACHE, FLUSHED = Level.LIMIT.value, Level.CACHE.value, Level.FLUSHED.value


def line(
    contestant: str, *rounds: float, row: str = "produce", level: str = CACHE, value: str = "rate", unit: str = "msg/s"
) -> Line:
    return Line(row, level, contestant, value, unit, list(rounds))


def result(*lines: Line) -> Result:
    return Result({"cores": "2"}, {"body_bytes": 128}, list(lines))


# --- who plays ----------------------------------------------------------------------------------------------------------


def test_every_contestant_is_one_of_a_kind() -> None:
    kinds = [(contestant.name, contestant.level) for contestant in CONTESTANTS]
    assert len(set(kinds)) == len(kinds)
    assert PEERS == ("bare", "zrmq", "redis", "nats", "rabbitmq", "mosquitto", "beanstalkd")


def test_every_server_has_a_way_to_be_started() -> None:
    servers = {contestant.server for contestant in CONTESTANTS} - {"", "zrmq"}
    assert servers == set(MODULES)
    assert set(SHARED) <= servers | {"zrmq"}


@pytest.mark.parametrize("row", ROWS)
def test_zrmq_plays_in_every_row_of_both_levels(row: str) -> None:
    assert {contestant.level for contestant in playing(row, ()) if contestant.name == "zrmq"} == {Level.CACHE, Level.FLUSHED}


def test_named_peers_play_and_no_others() -> None:
    assert {contestant.peer for contestant in playing("send", ("redis", "beanstalkd"))} == {"redis", "beanstalkd"}
    assert {contestant.peer for contestant in playing("produce", ("redis", "beanstalkd"))} == {"redis"}


def test_every_peer_has_a_session_with_that_name() -> None:
    for contestant in CONTESTANTS:
        module, _, kind = contestant.session.partition(":")
        assert bool(module) == (contestant.peer not in ("bare", "zrmq"))
        if module:
            assert issubclass(getattr(import_module(f"benchmarks.peers.{module}"), kind), Session)


def test_rows_are_those_of_zrmq_bench_and_three_of_whole_servers() -> None:
    figures = {row.figure.name for row in ROWS.values() if row.figure}
    assert figures == {figure.name for figure in FIGURES} - {"batches"}
    assert [name for name, row in ROWS.items() if row.figure is None] == ["storage", "recovery"]


def test_what_is_missing_is_named() -> None:
    assert missing_of("json", sh="/bin/sh") is None
    assert missing_of("json", "no_such_module", server=None) == "the program server, the Python module no_such_module"


# --- statistics ---------------------------------------------------------------------------------------------------------


def test_the_middle_is_a_median_and_the_spread_is_all_of_it() -> None:
    measured = line("zrmq", 1_500_000.0, 900_000.0, 1_200_000.0)
    assert measured.middle == 1_200_000.0
    assert spread(measured) == "900 k/s - 1.50 M/s"


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (12.0, "msg/s", "12.0 /s"), (5_230.0, "msg/s", "5.23 k/s"), (1_234_567.0, "msg/s", "1.23 M/s"), (87.4, "us", "87.4 us"),
        (1_234.4, "us", "1,234 us"), (0.5, "ms", "0.50 ms"), (132.4, "B/msg", "132 B/msg"),
    ],
)
def test_numbers_are_spelled_for_people(number: float, unit: str, text: str) -> None:
    assert spelled(number, unit) == text


def test_the_best_comes_first() -> None:
    fast, slow = line("fast", 9.0), line("slow", 1.0)
    assert ranked([slow, fast]) == [fast, slow]
    quick, late = line("quick", 1.0, unit="us"), line("late", 9.0, unit="us")
    assert ranked([late, quick]) == [quick, late]
    assert ranked([]) == []


def test_a_row_measured_again_replaces_the_older_one(tmp_path: Path) -> None:
    older = result(line("zrmq", 1.0), line("zrmq", 2.0, row="send"))
    newer = result(line("zrmq", 3.0))
    both = merged(older, newer)
    assert both.lines == [line("zrmq", 2.0, row="send"), line("zrmq", 3.0)]
    assert merged(None, newer) == newer
    file = tmp_path / "result.json"
    assert load(file) is None
    save(file, both)
    assert load(file) == both


def test_rows_come_in_their_own_order_whenever_they_were_measured() -> None:
    assert result(line("zrmq", 1.0, row="send"), line("zrmq", 2.0)).rows() == ["produce", "send"]


# --- tables and picture -------------------------------------------------------------------------------------------------


def test_levels_are_never_mixed() -> None:
    """zrmq's flushed rate is no yardstick for a peer that does not flush."""
    text = page(result(line("zrmq", 100.0, level=FLUSHED), line("Redis", 400.0), line("Redis", 50.0, level=FLUSHED)))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")][2:]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        (CACHE, "Redis", ""), (FLUSHED, "**zrmq**", ""), (FLUSHED, "Redis", "0.50 x"),
    ]


def test_better_is_more_of_a_rate_and_less_of_a_time() -> None:
    home, more = line("zrmq", 100.0), line("peer", 200.0)
    assert beside(more, home) == "2.00 x (better)"
    assert beside(home, more) == "0.50 x"
    assert beside(line("peer", 50.0, unit="us"), line("zrmq", 100.0, unit="us")) == "0.50 x (better)"
    assert beside(line("peer", 0.34), home) == "0.0034 x"
    assert beside(home, home) == ""
    assert beside(more, None) == ""


def test_a_page_has_the_facts_and_a_table_for_each_row() -> None:
    text = page(result(line("zrmq", 1e6), line("zrmq", 90.0, row="send", value="p50", unit="us")))
    assert text.startswith("cores: 2.\nbody bytes: 128.\n")
    assert f"### produce: {ROWS['produce'].what}" in text
    assert f"| {CACHE} | p50 | **zrmq** | 90.0 us | 90.0 us - 90.0 us | 1 |  |" in text


def test_the_picture_has_a_panel_for_each_level_and_a_bar_for_each_contestant() -> None:
    whole = result(
        line("bare ZeroMQ", 8e6, level=LIMIT), line("Redis <streams>", 2e5), line("zrmq", 1e6, 5e5, 2e6),
        line("zrmq", 9e5, level=FLUSHED),
    )
    assert [title for title, _ in panels(whole)] == [f"produce: {level}" for level in (LIMIT, CACHE, FLUSHED)]
    drawn = ElementTree.fromstring(picture(whole))
    space = "{http://www.w3.org/2000/svg}"
    _, *bars = drawn.findall(f"{space}rect")
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == [BAR_WIDTH, BAR_WIDTH / 2, BAR_WIDTH / 10, BAR_WIDTH]
    assert {bar.attrib["x"] for bar in bars} == {str(LABEL_WIDTH)}
    assert "Redis <streams>" in [text.text for text in drawn.findall(f"{space}text")]
    height = float(drawn.attrib["height"])
    assert all(float(bar.attrib["y"]) + float(bar.attrib["height"]) < height for bar in bars)


# --- counting -----------------------------------------------------------------------------------------------------------


async def count_from_elsewhere(countdown: Countdown) -> int:
    asyncio.get_running_loop().call_soon(countdown.add, 2)
    await countdown.wait(2)
    return countdown.count


def test_a_countdown_waits_until_there_is_enough() -> None:
    assert asyncio.run(count_from_elsewhere(Countdown())) == 2


def test_a_countdown_gives_up_when_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Countdown, "idle_s_max", 0.01)
    with pytest.raises(TimeoutError, match="2 of 3 came"):
        asyncio.run(count_in_vain())


async def count_in_vain() -> None:
    countdown = Countdown()
    countdown.add(2)
    await countdown.wait(3)


# --- confirms -----------------------------------------------------------------------------------------------------------


def test_confirms_count_each_publish_once() -> None:
    confirms = Confirms()
    assert confirms.add(3, multiple=False) == 1
    assert confirms.add(2, multiple=True) == 2
    assert confirms.add(3, multiple=True) == 0
    assert confirms.add(5, multiple=False) == 1
    assert confirms.add(6, multiple=True) == 2
    assert confirms.add(4, multiple=False) == 0
    assert confirms.count == 6
