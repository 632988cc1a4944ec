"""benchmarks/: how measured values become tables and drawings, and when a count of instructions has grown."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from benchmarks.instructions import CASES, COUNTS_FILE, Counts, grown
from benchmarks.scaling import CURVES, check_room, spreads
from benchmarks.scaling_pages import Point, Result, Spread, ratio, spell, svg, table
from zrmq.errors import ZrmqError

RESULT = Result(
    curve="queues", what="queues", rounds=3, python="3.11.7", machine="x86_64",
    points=[
        Point(1, {"produce, CPU us": Spread(50.0, 45.0, 60.0), "memory, rss MiB": Spread(38.0, 38.0, 38.5)}),
        Point(10_000, {"produce, CPU us": Spread(80.0, 70.0, 90.0), "memory, rss MiB": Spread(49.0, 49.0, 49.0)}),
    ],
)


def test_a_table_has_a_row_for_each_value_and_says_how_far_apart_they_are() -> None:
    assert table(RESULT).splitlines() == [
        "| queues | 1 | 10,000 | most / least |",
        "| --- | --- | --- | --- |",
        "| produce, CPU us | 50 (45-60) | 80 (70-90) | 1.60 |",
        "| memory, rss MiB | 38 (38-38) | 49 (49-49) | 1.29 |",
    ]


@pytest.mark.parametrize("points", [RESULT.points, RESULT.points[:1]], ids=["two", "one"])
def test_a_drawing_is_xml_with_a_line_for_each_cpu_time(points: list[Point]) -> None:
    drawing = ElementTree.fromstring(svg(msgspec.structs.replace(RESULT, points=points)))
    texts = [part.text for part in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "produce" in texts
    assert "memory, rss MiB" not in texts
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == len(points)


def test_a_result_survives_its_file() -> None:
    assert msgspec.json.decode(msgspec.json.encode(RESULT), type=Result) == RESULT


def test_numbers_are_short() -> None:
    assert [spell(number) for number in (0.25, 3.256, 47.2, 1234, 10_000_000, 1_500_000)] == [
        "0.25", "3.26", "47", "1,234", "10 M", "1.5 M"
    ]
    assert ratio([2.0, 3.0, 1.0]) == 3.0


def test_values_are_medians_with_least_and_most() -> None:
    assert spreads([{"a": 3.0}, {"a": 1.0}, {"a": 2.0}]) == {"a": Spread(2.0, 1.0, 3.0)}


def test_a_curve_that_would_fill_the_disk_is_not_begun(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(ZrmqError, match="GB free"):
        check_room(tmp_path, 1 << 60)


def test_every_curve_begins_small() -> None:
    for curve in CURVES.values():
        assert list(curve.points) == sorted(set(curve.points))


# --- instructions -------------------------------------------------------------------------------------------------------


KEPT = Counts("3.11.7", "x86_64", {"a": 1_000, "b": 2_000, "gone": 1})


def test_only_what_has_grown_by_more_is_told() -> None:
    counted = Counts("3.11.7", "x86_64", {"a": 1_049, "b": 2_200, "new": 5})
    assert grown(KEPT, counted, 0.05) == {"b": pytest.approx(0.1)}
    assert grown(KEPT, KEPT) == {}


@pytest.mark.parametrize("other", [Counts("3.12.1", "x86_64", {}), Counts("3.11.7", "aarch64", {})])
def test_counts_of_another_python_are_not_compared(other: Counts) -> None:
    with pytest.raises(ZrmqError, match="--write"):
        grown(KEPT, other)


def test_the_kept_counts_are_of_all_cases() -> None:
    assert set(msgspec.json.decode(COUNTS_FILE.read_bytes(), type=Counts).instructions) == set(CASES)
