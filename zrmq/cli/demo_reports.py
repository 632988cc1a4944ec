"""What a demo's consumer process tells the demo: one JSON object per line on its stdout.

Times are CLOCK_MONOTONIC in milliseconds, which all processes of a machine share.
"""

from __future__ import annotations

import msgspec

from zrmq.errors import InvalidFrameError


class Report(msgspec.Struct, frozen=True, gc=False, tag_field="report"):
    """Base of all reports."""

    at_ms: float


class Joining(Report, frozen=True, gc=False, tag="joining"):
    """The consumer is about to start."""

    client_id: str


class Ready(Report, frozen=True, gc=False, tag="ready"):
    """The consumer is a member of its group: what is published from now on is for it too."""


class Acquired(Report, frozen=True, gc=False, tag="acquired"):
    """From here on the worker owns a queue. `lease_epoch` is 0 where there are no leases (broadcasting)."""

    queue: str
    lease_epoch: int


class Released(Report, frozen=True, gc=False, tag="released"):
    """The worker owned the queue until now."""

    queue: str


class Consumed(Report, frozen=True, gc=False, tag="consumed"):
    """One message came to the listener. `number` counts the readings of a sensor from 1."""

    queue: str
    queue_offset: int
    sensor: str
    number: int


class Ended(Report, frozen=True, gc=False, tag="ended"):
    """The consumer stopped as it was told to; it owns nothing any more."""


AnyReport = Joining | Ready | Acquired | Released | Consumed | Ended

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyReport] = msgspec.json.Decoder(AnyReport)


def encode_report(report: AnyReport) -> bytes:
    """One line, with its end."""
    return _encoder.encode(report) + b"\n"


def decode_report(line: bytes) -> AnyReport:
    """Raises `InvalidFrameError` for a line that is not a whole report, such as the last one of a killed worker."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError as error:
        raise InvalidFrameError(f"A worker's line is no report: {error}.") from error


def queue_name(topic: str, broker_name: str, queue_id: int) -> str:
    """A queue as reports and tables name it."""
    return f"{topic}/{broker_name}/{queue_id}"
