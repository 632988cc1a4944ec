"""What `zrmq bench` measures: the parts that are played for each figure, and how their reports become numbers. Pure.

A figure is played in every round, once for each flush mode, and right after it its bare limit; what is compared was measured
within seconds, on the same machine in the same mood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import msgspec

from zrmq.cli.bench_players import Spec

SENDS_MAX = 2_000  # one at a time; half a second a round
PACED_MAX = 3_000  # at PACE_PER_SECOND; three seconds a round
PACE_PER_SECOND = 1_000
WARM_SHARE = 5  # one in so many messages more, before the start
WARM_MESSAGES_MIN = 200

Reports = Sequence[Mapping[str, Any]]  # of the players, in the order of their parts


class Figure(msgspec.Struct, frozen=True):
    """One thing to measure: who plays, against which limit, and what counts."""

    name: str
    what: str
    fill: bool  # the topic is filled before the start
    parts: tuple[str, ...]
    limit_parts: tuple[str, ...]  # the first one tells its address
    read: Callable[[Reports, int], dict[str, float]]  # reports and messages -> values by kind
    messages_max: int | None = None
    per_second: int = 0


class Row(msgspec.Struct, frozen=True):
    """One line of the result: a value of a figure over all rounds, and its limit. `ratio` is value to limit, medians."""

    figure: str
    flush: str
    value: str  # rate, p50, p99
    unit: str
    median: float
    least: float
    most: float
    limit: float
    limit_least: float
    limit_most: float
    ratio: float


def read_rate(reports: Reports, messages: int) -> dict[str, float]:
    """Messages per second from the first start to the last end that a player reports."""
    began_ms = min(report["began_ms"] for report in reports if "began_ms" in report)
    ended_ms = max(report["ended_ms"] for report in reports if "ended_ms" in report)
    counted = next((report["messages"] for report in reports if "messages" in report), messages)
    return {"rate": counted * 1000.0 / max(ended_ms - began_ms, 1e-3)}


def read_rate_of_both(reports: Reports, messages: int) -> dict[str, float]:
    """From the producer's start to the consumer's end."""
    consumer, producer = reports
    return {"rate": messages * 1000.0 / max(consumer["ended_ms"] - producer["began_ms"], 1e-3)}


def read_times(reports: Reports, messages: int) -> dict[str, float]:
    """Median and 99th percentile of the times a player reports, in microseconds."""
    took_ms = next(report["took_ms"] for report in reports if "took_ms" in report)
    return {"p50": percentile(took_ms, 50) * 1000.0, "p99": percentile(took_ms, 99) * 1000.0}


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least so many percent of them do not exceed. There has to be one."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0)]


THROUGHPUT_LIMIT = ("pull", "push")
ROUND_TRIP_LIMIT = ("answer", "ask")

FIGURES = (
    Figure("produce", "send_async, one process, every batch acknowledged", False, ("produce",), THROUGHPUT_LIMIT, read_rate),
    Figure("tagged", "produce, a tag, a key and a property on each", False, ("produce_tagged",), THROUGHPUT_LIMIT, read_rate),
    Figure("batches", "send_batch, 10,000 bodies a call", False, ("produce_batches",), THROUGHPUT_LIMIT, read_rate),
    Figure("consume", "a backlog, one process, typed, committed", True, ("consume_backlog",), THROUGHPUT_LIMIT, read_rate),
    Figure("both", "one process produces, another consumes", False, ("consume", "produce"), THROUGHPUT_LIMIT, read_rate_of_both),
    Figure("send", "one send at a time, its receipt awaited", False, ("send",), ROUND_TRIP_LIMIT, read_times, SENDS_MAX),
    Figure(
        "latency", "from send to listener at 1,000 msg/s", False, ("receive_stamped", "send_paced"), ROUND_TRIP_LIMIT, read_times,
        PACED_MAX, PACE_PER_SECOND,
    ),
)


def chosen(names: Sequence[str]) -> list[Figure]:
    """The figures of these names, in the order above; all without names."""
    return [figure for figure in FIGURES if not names or figure.name in names]


def spec_of(figure: Figure, part: str, messages: int, body_bytes: int, nameservers: str, topic: str) -> Spec:
    """What one player of a figure is told."""
    count = min(messages, figure.messages_max or messages)
    return Spec(
        part=part, nameservers=nameservers, topic=topic, messages=count, body_bytes=body_bytes, per_second=figure.per_second,
        warm_messages=max(count // WARM_SHARE, WARM_MESSAGES_MIN),
    )


def rows_of(figure: Figure, flush: str, values: Sequence[dict[str, float]], limits: Sequence[dict[str, float]]) -> list[Row]:
    """The lines of one figure: a value and a limit for each round."""
    return [
        _row(figure.name, flush, kind, [value[kind] for value in values], [limit[kind] for limit in limits]) for kind in values[0]
    ]


def _row(figure: str, flush: str, kind: str, values: list[float], limits: list[float]) -> Row:
    middle, limit = median(values), median(limits)
    return Row(
        figure, flush, kind, "msg/s" if kind == "rate" else "us", round(middle, 1), round(min(values), 1), round(max(values), 1),
        round(limit, 1), round(min(limits), 1), round(max(limits), 1), round(middle / limit, 3),
    )


def spell(number: float, unit: str) -> str:
    """A number for a person: 1.62 M, 512 k, 87."""
    if unit != "msg/s" or number < 1000:
        return f"{number:,.0f}"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"
