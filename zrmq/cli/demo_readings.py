"""What the demo publishes: readings of this machine's own sensors, or of a CSV file.

A sensor's name begins with its kind: `cpu.0`, `temperature.coretemp.Package id 0`. The kind becomes the message's tag, the whole
name its key and its message group, so that order holds for each sensor.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Protocol
from zlib import crc32

import msgspec

from zrmq.clock import Clock, SystemClock
from zrmq.errors import Code, ConfigError, InvalidArgumentError
from zrmq.logs import get_logger
from zrmq.protocol.limits import MESSAGE_GROUP_BYTES_MAX, check_text

TOPICS = ("demo-load", "demo-devices")
ROWS_MAX = 1_000_000  # of a CSV file; they are held in memory, some 200 bytes each
MILLISECONDS_FROM = 1e11  # a number in the column `at` above this counts milliseconds, below it seconds, since 1970
TIMESTAMP_MS_MAX = 1e14  # in the year 5138

_LOAD_KINDS = {"cpu", "load", "memory", "swap"}

log = get_logger("demo")


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One value of one sensor. `at_ms`: milliseconds since 1970 UTC."""

    topic: str
    sensor: str
    value: float
    unit: str
    at_ms: int

    @property
    def kind(self) -> str:
        """What the name begins with; can be a tag."""
        return self.sensor.partition(".")[0].replace("|", "/").strip() or "reading"


class Source(Protocol):
    """Where readings come from."""

    def sample(self) -> list[Reading]:
        """The next readings, each sensor at most once; never empty."""


# --- this machine -----------------------------------------------------------------------------------------------------

Probe = Callable[[], Iterable[tuple[str, float, str]]]  # sensor, value, unit


class HostSensors:
    """This machine, by psutil. Raises `ConfigError` where psutil is not installed."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._psutil = _load_psutil()
        self._clock = clock or SystemClock()
        self._totals: dict[str, tuple[float, float]] = {}  # counter -> total and monotonic time at the last look
        self._probes: list[Probe] = [
            self._cpu, self._load, self._memory, self._disk, self._network, self._temperatures, self._fans, self._battery,
        ]
        self.sample()  # rates need an earlier look

    def sample(self) -> list[Reading]:
        """One reading of everything this machine has."""
        at_ms = self._clock.time_ms()
        readings = []
        for probe in list(self._probes):
            for sensor, value, unit in self._ask(probe):
                topic = TOPICS[0] if sensor.partition(".")[0] in _LOAD_KINDS else TOPICS[1]
                readings.append(Reading(topic, _fit(sensor), round(value, 3), unit, at_ms))
        return readings

    def _ask(self, probe: Probe) -> list[tuple[str, float, str]]:
        """What the probe says; one that fails (a container without /sys, a platform without fans) is not asked again."""
        try:
            return list(probe())
        except (self._psutil.Error, OSError, AttributeError, NotImplementedError, RuntimeError) as error:
            log.info("sensor_skipped", sensor=getattr(probe, "__name__", "").lstrip("_"), reason=str(error))
            self._probes.remove(probe)
            return []

    def _cpu(self) -> Iterator[tuple[str, float, str]]:
        for core, percent in enumerate(self._psutil.cpu_percent(percpu=True)):
            yield f"cpu.{core}", percent, "%"

    def _load(self) -> Iterator[tuple[str, float, str]]:
        for span, load in zip(("1min", "5min", "15min"), self._psutil.getloadavg(), strict=True):
            yield f"load.{span}", load, ""

    def _memory(self) -> Iterator[tuple[str, float, str]]:
        memory = self._psutil.virtual_memory()
        yield "memory.used", memory.percent, "%"
        yield "memory.available", memory.available / (1 << 20), "MiB"
        yield "swap.used", self._psutil.swap_memory().percent, "%"

    def _disk(self) -> Iterator[tuple[str, float, str]]:
        yield "disk.used", self._psutil.disk_usage("/").percent, "%"
        counters = self._psutil.disk_io_counters()
        if counters is not None:
            yield "disk.read", self._rate("disk.read", counters.read_bytes), "B/s"
            yield "disk.written", self._rate("disk.written", counters.write_bytes), "B/s"

    def _network(self) -> Iterator[tuple[str, float, str]]:
        for card, counters in sorted(self._psutil.net_io_counters(pernic=True).items()):
            yield f"network.{card}.received", self._rate(f"{card}.received", counters.bytes_recv), "B/s"
            yield f"network.{card}.sent", self._rate(f"{card}.sent", counters.bytes_sent), "B/s"

    def _temperatures(self) -> Iterator[tuple[str, float, str]]:
        return self._chips(self._psutil.sensors_temperatures(), "temperature", "°C")

    def _fans(self) -> Iterator[tuple[str, float, str]]:
        return self._chips(self._psutil.sensors_fans(), "fan", "rpm")

    def _battery(self) -> Iterator[tuple[str, float, str]]:
        battery = self._psutil.sensors_battery()
        if battery is not None:
            yield "battery.charge", battery.percent, "%"

    def _chips(self, chips: dict[str, list[object]], kind: str, unit: str) -> Iterator[tuple[str, float, str]]:
        for chip, entries in sorted(chips.items()):
            for index, entry in enumerate(entries):
                yield f"{kind}.{chip}.{index}", float(getattr(entry, "current", 0.0)), unit

    def _rate(self, counter: str, total: float) -> float:
        """Change per second since the last look; 0 at the first."""
        now_ms = self._clock.monotonic_ms()
        before, before_ms = self._totals.get(counter, (total, now_ms))
        self._totals[counter] = (total, now_ms)
        return (total - before) * 1000.0 / (now_ms - before_ms) if now_ms > before_ms else 0.0


def _load_psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise ConfigError(
            "zrmq demo reads this machine's sensors with psutil, which is not installed; `pip install 'zrmq[demo]'`, or replay"
            " a file of readings with --csv FILE."
        ) from error
    module: ModuleType = psutil
    return module


def _fit(name: str) -> str:
    """A name as psutil has it, as a message group may be. One that is too long ends in a checksum, so that it stays unique."""
    printable = "".join(character if character.isprintable() else "?" for character in name)
    if len(printable.encode()) <= MESSAGE_GROUP_BYTES_MAX:
        return printable
    checksum = f"~{crc32(printable.encode()):08x}"
    return printable.encode()[: MESSAGE_GROUP_BYTES_MAX - len(checksum)].decode(errors="ignore") + checksum


# --- a file -----------------------------------------------------------------------------------------------------------


class BadRow(msgspec.Struct, frozen=True):
    """A row that was skipped, and what is wrong with it. `line`: in the file, from 1."""

    line: int
    reason: str


class CsvReadings:
    """A CSV file of readings, replayed from the top again when it ends.

    The first row names the columns, in any order and case: `sensor` and `value`, if wanted `unit` and `at` (ISO 8601, or seconds
    or milliseconds since 1970); others are ignored. Separated by comma, semicolon or tab; with these two, `21,5` is a number.
    Rows beyond `ROWS_MAX` are left out. `bad_rows` has what was skipped. Raises `ConfigError` for a file that cannot be read or
    has no usable row.
    """

    def __init__(self, file: Path, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._next = 0
        self.bad_rows: list[BadRow] = []
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                self._rows = self._read(lines, file)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}; check the path.", file=str(file)) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text; save it as such.", file=str(file)) from error
        if not self._rows:
            raise ConfigError(f"{file} has no usable row{self._first_fault()}.", file=str(file))

    def sample(self) -> list[Reading]:
        """The next rows, up to the first whose sensor is among them already."""
        readings: dict[str, Reading] = {}
        while True:
            reading = self._rows[self._next % len(self._rows)]
            if reading.sensor in readings or len(readings) == len(self._rows):
                return list(readings.values())
            readings[reading.sensor] = reading
            self._next += 1

    def _read(self, lines: Iterable[str], file: Path) -> list[Reading]:
        iterator = iter(lines)
        header = next(iterator, "")
        delimiter = max(",;\t", key=header.count)
        columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        missing = {"sensor", "value"} - set(columns)
        if missing:
            raise ConfigError(
                f"{file} has no column {' nor '.join(sorted(missing))}; its first line names {', '.join(columns) or 'nothing'},"
                " and has to name sensor, value and, if wanted, unit and at.",
                file=str(file), missing=sorted(missing),
            )
        reader = csv.reader(iterator, delimiter=delimiter)
        return list(islice(self._good_rows(reader, columns, delimiter != ","), ROWS_MAX))

    def _good_rows(self, reader: Iterator[list[str]], columns: Sequence[str], decimal_comma: bool) -> Iterator[Reading]:
        while True:
            try:
                cells = next(reader)
                if cells:
                    yield _parse(dict(zip(columns, cells, strict=False)), decimal_comma, self._clock.time_ms())
            except StopIteration:
                return
            except (ValueError, csv.Error) as error:
                # line_num counts the lines the reader took, which the header was not among.
                self.bad_rows.append(BadRow(getattr(reader, "line_num", 0) + 1, _reason(error)))

    def _first_fault(self) -> str:
        return f"; line {self.bad_rows[0].line}: {self.bad_rows[0].reason}" if self.bad_rows else ""


def _parse(cells: dict[str, str], decimal_comma: bool, now_ms: int) -> Reading:
    """Raises `ValueError` that says what is wrong."""
    sensor, text = cells.get("sensor", "").strip(), cells.get("value", "").strip()
    check_text(sensor, "sensor name", Code.ILLEGAL_MESSAGE_GROUP)
    if len(sensor.encode()) > MESSAGE_GROUP_BYTES_MAX:
        raise ValueError(f"the sensor's name has more than {MESSAGE_GROUP_BYTES_MAX} bytes")
    try:
        value = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError as error:
        raise ValueError(f"the value {text!r} is not a number") from error
    if not math.isfinite(value):
        raise ValueError(f"the value {text!r} is not finite")
    at, topic = cells.get("at", "").strip(), TOPICS[crc32(sensor.encode()) & 1]
    return Reading(topic, sensor, value, cells.get("unit", "").strip(), _time_ms(at) if at else now_ms)


def _time_ms(text: str) -> int:
    try:
        return _number_ms(float(text))
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
            return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"the time {text!r} is neither ISO 8601 nor a number of seconds since 1970") from error


def _number_ms(number: float) -> int:
    if not abs(number) < TIMESTAMP_MS_MAX:
        raise ValueError
    return int(number if number > MILLISECONDS_FROM else number * 1000)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, InvalidArgumentError) else str(error)
