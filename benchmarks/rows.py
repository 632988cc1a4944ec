"""The rows of the comparison. Those of `zrmq bench` are played with its figures; three more look at whole servers. Pure."""

from __future__ import annotations

import msgspec

from zrmq.cli.bench_figures import FIGURES, Figure

_FIGURES = {figure.name: figure for figure in FIGURES}


class Row(msgspec.Struct, frozen=True):
    """One thing to compare. Without a figure it is about whole servers, each started for it."""

    what: str
    figure: Figure | None = None


ROWS = {
    "produce": Row("one process, batches or pipelines, until all is acknowledged", _FIGURES["produce"]),
    "tagged": Row("the same with a tag, a key and a property (headers, fields) on each message", _FIGURES["tagged"]),
    "consume": Row("a backlog, one process, acknowledged or committed", _FIGURES["consume"]),
    "both": Row("one process produces, another consumes", _FIGURES["both"]),
    "send": Row("one send at a time, its acknowledgement awaited", _FIGURES["send"]),
    "latency": Row("from send to receipt in another process, 1,000 msg/s", _FIGURES["latency"]),
    "storage": Row("start to ready; memory of the servers, idle and after the messages; disk for each of them"),
    "recovery": Row("from the start to ready after kill -9, with a large log"),
}
