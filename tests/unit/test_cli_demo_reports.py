"""A demo worker's reports survive their way as JSON lines; a line that was cut off is refused."""

from __future__ import annotations

import json

import pytest

from zrmq.cli.demo_reports import (
    Acquired,
    AnyReport,
    Consumed,
    Ended,
    Joining,
    Ready,
    Released,
    decode_report,
    encode_report,
    queue_name,
)
from zrmq.errors import InvalidFrameError

REPORTS: list[AnyReport] = [
    Joining(1.5, "host@1"),
    Ready(2.0),
    Acquired(3.25, "t/b/0", (1 << 32) + 7),
    Consumed(4.0, "t/b/0", 12, "cpu.0", 3),
    Released(5.0, "t/b/0"),
    Ended(6.0),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_comes_back_as_it_went(report: AnyReport) -> None:
    line = encode_report(report)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_report(line) == report


def test_a_line_is_json_with_the_kind_in_it() -> None:
    expected = {"report": "acquired", "at_ms": 3.25, "queue": "t/b/0", "lease_epoch": (1 << 32) + 7}
    assert json.loads(encode_report(REPORTS[2])) == expected


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"Traceback", b'{"report":"consumed","at_ms":4.0,"que', b'{"report":"other","at_ms":1}', b"[]"]
)
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(InvalidFrameError, match="no report"):
        decode_report(line)


def test_queues_have_one_spelling() -> None:
    assert queue_name("meters", "broker-a", 3) == "meters/broker-a/3"
