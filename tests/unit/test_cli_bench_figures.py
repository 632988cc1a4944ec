"""The bench's figures: what players are told, and how their reports become medians, ranges and ratios."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.cli import bench_limits, bench_players
from zrmq.cli.bench_figures import (
    FIGURES,
    PACED_MAX,
    SENDS_MAX,
    WARM_MESSAGES_MIN,
    Figure,
    chosen,
    percentile,
    read_rate,
    read_rate_of_both,
    read_times,
    rows_of,
    spec_of,
    spell,
)
from zrmq.protocol.batch import decode_records, open_batch

BY_NAME = {figure.name: figure for figure in FIGURES}


def test_a_rate_runs_from_the_first_start_to_the_last_end() -> None:
    assert read_rate([{"began_ms": 100.0, "ended_ms": 1100.0}], 5000) == {"rate": 5000.0}
    assert read_rate([{"ended_ms": 1100.0}, {"began_ms": 100.0}], 5000) == {"rate": 5000.0}


def test_a_player_s_own_count_goes_before_what_was_planned() -> None:
    assert read_rate([{"began_ms": 0.0, "ended_ms": 1000.0, "messages": 4800}], 5000) == {"rate": 4800.0}


def test_both_at_once_counts_from_producing_to_consumed() -> None:
    consumer, producer = {"began_ms": 50.0, "ended_ms": 2100.0}, {"began_ms": 100.0, "ended_ms": 1500.0}
    assert read_rate_of_both([consumer, producer], 4000) == {"rate": 2000.0}


def test_times_are_microseconds() -> None:
    took_ms = [number / 1000 for number in range(1, 101)]
    assert read_times([{}, {"took_ms": took_ms}], 100) == {"p50": pytest.approx(50), "p99": pytest.approx(99)}


@given(st.lists(st.floats(0, 1000), min_size=1), st.integers(1, 100))
def test_a_percentile_is_one_of_the_values_and_covers_its_share(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_rows_have_medians_ranges_and_ratios() -> None:
    (row,) = rows_of(BY_NAME["produce"], "sync", [{"rate": 300.0}, {"rate": 100.0}, {"rate": 200.0}], [{"rate": 400.0}] * 3)
    assert (row.median, row.least, row.most, row.limit, row.ratio, row.unit) == (200.0, 100.0, 300.0, 400.0, 0.5, "msg/s")


def test_times_have_a_row_for_each_percentile() -> None:
    rows = rows_of(BY_NAME["send"], "async", [{"p50": 130.0, "p99": 300.0}], [{"p50": 65.0, "p99": 100.0}])
    assert [(row.figure, row.flush, row.value, row.unit, row.ratio) for row in rows] == [
        ("send", "async", "p50", "us", 2.0), ("send", "async", "p99", "us", 3.0),
    ]


def test_slow_figures_play_fewer_messages() -> None:
    assert spec_of(BY_NAME["send"], "send", 10**6, 128, "", "t").messages == SENDS_MAX
    assert spec_of(BY_NAME["latency"], "send_paced", 10**6, 128, "", "t").messages == PACED_MAX
    assert spec_of(BY_NAME["send"], "send", 10, 128, "", "t").messages == 10
    assert spec_of(BY_NAME["produce"], "produce", 10**6, 128, "", "t").messages == 10**6


def test_both_sides_of_a_figure_warm_up_alike() -> None:
    for figure in FIGURES:
        specs = [spec_of(figure, part, 100_000, 128, "", "t") for part in figure.parts]
        assert len({spec.warm_messages for spec in specs}) == 1
        assert specs[0].warm_messages >= WARM_MESSAGES_MIN


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_every_part_exists(figure: Figure) -> None:
    assert all(part in bench_players.PARTS for part in figure.parts)
    assert all(callable(getattr(bench_limits, part)) for part in figure.limit_parts)


def test_figures_are_chosen_by_name() -> None:
    assert chosen([]) == list(FIGURES)
    assert [figure.name for figure in chosen(["send", "produce"])] == ["produce", "send"]


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(1_624_000, "msg/s", "1.62 M"), (512_300, "msg/s", "512 k"), (87, "msg/s", "87"), (1234, "us", "1,234"), (87.6, "us", "88")],
)
def test_numbers_as_people_read_them(number: float, unit: str, text: str) -> None:
    assert spell(number, unit) == text


# --- the limits move what zrmq moves ------------------------------------------------------------------------------------


def test_the_limit_s_batch_is_a_real_one() -> None:
    batch = bench_limits.batch_of(1000, 128)
    assert len(decode_records(open_batch(batch), batch).bodies) == 1000
    assert 128_000 < len(batch) < 134_000


@pytest.mark.parametrize(("messages", "batches"), [(1, 1), (1000, 1), (1001, 2)])
def test_batches_hold_all_messages(messages: int, batches: int) -> None:
    assert bench_limits.batch_count(messages) == batches


class Ticks:
    """A clock that shows the next of some times at each look."""

    def __init__(self, *times_ms: float) -> None:
        self._times_ms = iter(times_ms)

    def monotonic_ms(self) -> float:
        return next(self._times_ms)

    def time_ms(self) -> int:
        return 0


def test_without_a_pace_nothing_waits() -> None:
    assert list(bench_players.pace(5, 0, Ticks())) == [0, 1, 2, 3, 4]


def test_a_late_pace_catches_up_without_waiting() -> None:
    assert list(bench_players.pace(3, 1000, Ticks(0.0, 5.0, 5.1, 5.2))) == [0, 1, 2]
