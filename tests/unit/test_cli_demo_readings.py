"""Readings for the demo: what a CSV file may look like, what is said about its bad rows, and what this machine has."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.cli.demo_readings import TOPICS, CsvReadings, HostSensors, Reading
from zrmq.errors import Code, ConfigError
from zrmq.protocol.limits import MESSAGE_GROUP_BYTES_MAX, check_tag, check_text


class HandClock:
    """A clock turned by hand."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000.0

    def time_ms(self) -> int:
        return int(self.now_ms)

    def monotonic_ms(self) -> float:
        return self.now_ms


def readings_of(tmp_path: Path, text: str | bytes) -> CsvReadings:
    file = tmp_path / "readings.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return CsvReadings(file, HandClock())


# --- a file -----------------------------------------------------------------------------------------------------------


def test_columns_come_in_any_order_and_case(tmp_path: Path) -> None:
    source = readings_of(tmp_path, " Unit ,room,VALUE,Sensor\n°C,cellar,21.5,kitchen\n")
    assert source.bad_rows == []
    (reading,) = source.sample()
    assert (reading.sensor, reading.value, reading.unit) == ("kitchen", 21.5, "°C")


def test_without_time_a_reading_is_of_now(tmp_path: Path) -> None:
    assert readings_of(tmp_path, "sensor,value\na,1\n").sample()[0].at_ms == 1_700_000_000_000


@pytest.mark.parametrize(
    ("at", "at_ms"),
    [
        ("2024-05-01T12:00:00Z", 1_714_564_800_000),
        ("2024-05-01T14:00:00+02:00", 1_714_564_800_000),
        ("2024-05-01 12:00:00", 1_714_564_800_000),  # no zone: UTC
        ("1714564800", 1_714_564_800_000),
        ("1714564800.25", 1_714_564_800_250),
        ("1714564800250", 1_714_564_800_250),
    ],
)
def test_times_are_iso_or_numbers(tmp_path: Path, at: str, at_ms: int) -> None:
    assert readings_of(tmp_path, f"sensor,value,at\na,1,{at}\n").sample()[0].at_ms == at_ms


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_allow_decimal_commas(tmp_path: Path, delimiter: str) -> None:
    source = readings_of(tmp_path, f"sensor{delimiter}value\na{delimiter}21,5\n")
    assert source.sample()[0].value == 21.5


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    source = readings_of(tmp_path, b"\xef\xbb\xbfsensor,value\r\n\r\na,1\r\n\r\n")
    assert [reading.sensor for reading in source.sample()] == ["a"]
    assert source.bad_rows == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,warm", "the value 'warm' is not a number"),
        ("a,", "the value '' is not a number"),
        ("a", "the value '' is not a number"),
        ("a,nan", "the value 'nan' is not finite"),
        ("a,1e999", "the value '1e999' is not finite"),
        (",1", "The sensor name must be text and not blank"),
        ("a\x07b,1", "contains a control character"),
        ("x" * 65 + ",1", "the sensor's name has more than 64 bytes"),
        ("a,1,yesterday", "the time 'yesterday' is neither"),
        ("a,1,1e300", "the time '1e300' is neither"),
        ("a,1,inf", "the time 'inf' is neither"),
    ],
)
def test_bad_rows_are_reported_with_their_line(tmp_path: Path, row: str, reason: str) -> None:
    source = readings_of(tmp_path, f"sensor,value,at\ngood,1,\n{row}\nbetter,2,\n")
    assert [bad.line for bad in source.bad_rows] == [3]
    assert reason in source.bad_rows[0].reason
    assert [reading.sensor for reading in source.sample()] == ["good", "better"]


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    source = readings_of(tmp_path, 'sensor,value\n"two\nlines",1\ngood,1\nbad,x\n')
    assert [bad.line for bad in source.bad_rows] == [3, 5]


def test_a_file_is_replayed_from_the_top(tmp_path: Path) -> None:
    source = readings_of(tmp_path, "sensor,value\na,1\nb,2\na,3\n")
    values = [[(reading.sensor, reading.value) for reading in source.sample()] for _ in range(3)]
    assert values == [[("a", 1), ("b", 2)], [("a", 3)], [("a", 1), ("b", 2)]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no column sensor nor value; its first line names nothing"),
        ("a,b\n1,2\n", "has no column sensor nor value; its first line names a, b"),
        ("sensor,reading\na,1\n", "has no column value"),
        ("sensor,value\n", "has no usable row."),
        ("sensor,value\na,x\n", "has no usable row; line 2: the value 'x' is not a number."),
        (b"sensor,value\n\xff\xfe,1\n", "is not UTF-8 text"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"readings\.csv") as caught:
        readings_of(tmp_path, text)
    assert sentence in caught.value.message


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        CsvReadings(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        CsvReadings(tmp_path)


@given(text=st.text(max_size=400))
def test_no_text_breaks_the_reader(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("csv") / "any.csv"
    file.write_bytes(("sensor,value,unit,at\nfirst,1,,\n" + text).encode(errors="surrogatepass"))
    try:
        source = CsvReadings(file, HandClock())
    except ConfigError:  # lone surrogates are not UTF-8
        return
    for reading in source.sample():
        check_tag(reading.kind)
        check_text(reading.sensor, "sensor", Code.BAD_REQUEST)


def test_kinds_can_be_tags() -> None:
    assert Reading(TOPICS[0], "cpu.0", 1.0, "%", 0).kind == "cpu"
    assert Reading(TOPICS[0], "a|b.c", 1.0, "", 0).kind == "a/b"
    assert Reading(TOPICS[0], ".c", 1.0, "", 0).kind == "reading"
    assert Reading(TOPICS[0], "kitchen", 1.0, "", 0).kind == "kitchen"


def test_sensors_are_spread_over_both_topics(tmp_path: Path) -> None:
    source = readings_of(tmp_path, "sensor,value\n" + "".join(f"s{number},1\n" for number in range(40)))
    assert {reading.topic for reading in source.sample()} == set(TOPICS)


# --- this machine -----------------------------------------------------------------------------------------------------


def test_this_machine_has_readings_for_both_topics() -> None:
    readings = HostSensors().sample()
    assert {reading.topic for reading in readings} == set(TOPICS)
    assert {"cpu", "load", "memory", "swap", "disk", "network"} <= {reading.kind for reading in readings}
    sensors = [reading.sensor for reading in readings]
    assert len(sensors) == len(set(sensors))
    for reading in readings:
        check_tag(reading.kind)
        assert len(reading.sensor.encode()) <= MESSAGE_GROUP_BYTES_MAX


def test_counters_become_rates() -> None:
    clock = HandClock()
    sensors = HostSensors(clock)
    assert sensors._rate("x", 1000) == 0.0
    clock.now_ms += 500
    assert sensors._rate("x", 3000) == 4000.0
    assert sensors._rate("x", 9000) == 0.0, "no time has passed"


def test_what_a_machine_lacks_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    asked = []

    def refuse() -> Any:
        asked.append(1)
        raise OSError("no /sys here")

    monkeypatch.setattr(psutil, "sensors_temperatures", refuse, raising=False)
    monkeypatch.delattr(psutil, "sensors_fans", raising=False)
    sensors = HostSensors()
    assert sensors.sample()
    assert len(asked) == 1


def test_chips_become_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    from psutil._ntuples import shwtemp

    chips = {"core\x00temp" + "x" * 80: [shwtemp("Package", 41.0, None, None), shwtemp("Core 0", 40.0, None, None)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips, raising=False)
    found = [reading for reading in HostSensors().sample() if reading.kind == "temperature"]
    assert [reading.value for reading in found] == [41.0, 40.0]
    assert all(reading.unit == "°C" for reading in found)
    assert len({reading.sensor for reading in found}) == 2, "names that are too long stay unique"
    assert all(len(reading.sensor.encode()) <= MESSAGE_GROUP_BYTES_MAX for reading in found)


def test_without_psutil_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "psutil":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'zrmq\[demo\]'.*--csv FILE"):
        HostSensors()

