"""docs/protocol.md says what the code does: every tag, field, default, code, limit and byte position."""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

import msgspec
import pytest

from tests.tidy.source import ROOT
from zrmq.errors import Code
from zrmq.protocol import batch, limits, requests
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import AnyReply, AnyRequest

PAGE = (ROOT / "docs" / "protocol.md").read_text()
REQUESTS = {kind.__name__: kind for kind in AnyRequest.__args__}
REPLIES = {kind.__name__: kind for kind in AnyReply.__args__}
VALUES: dict[str, Any] = {
    kind.__name__: kind
    for kind in vars(requests).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__name__ not in REQUESTS.keys() | REPLIES.keys()
    and kind not in (requests.Request, requests.Reply, msgspec.Struct)
} | {"TopicConfig": TopicConfig}


def rows(section: str) -> list[list[str]]:
    """The cells of all table rows of one numbered section; a bar within code is written with a backslash."""
    text = PAGE.split(f"\n## {section}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def spelled(default: Any) -> str:
    """A default as the page writes it."""
    if default is None:
        return "nil"
    return json.dumps(default.value if isinstance(default, Enum) else default)


def header(kind: Any) -> str:
    """The array of a struct, as the page writes it."""
    parts = [] if kind.__struct_config__.tag is None else [str(kind.__struct_config__.tag)]
    for field in msgspec.structs.fields(kind):
        factory = field.default_factory
        default = field.default if factory is msgspec.NODEFAULT else factory()
        parts.append(field.name if default is msgspec.NODEFAULT else f"{field.name}={spelled(default)}")
    return f"`[{', '.join(parts)}]`"


def described(section: str, column: int) -> dict[str, str]:
    return {cells[0]: cells[column] for cells in rows(section)[1:]}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name: str) -> None:
    assert described("9. Requests", 2)[name] == header(REQUESTS[name])


@pytest.mark.parametrize("name", REPLIES)
def test_replies(name: str) -> None:
    assert described("10. Replies", 1)[name] == header(REPLIES[name])


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    assert described("11. Values", 1)[name] == header(VALUES[name])


def test_nothing_is_described_that_does_not_exist() -> None:
    assert described("9. Requests", 2).keys() == REQUESTS.keys()
    assert described("10. Replies", 1).keys() == REPLIES.keys()
    assert described("11. Values", 1).keys() == VALUES.keys()


@pytest.mark.parametrize("name", REQUESTS)
def test_who_answers_and_what_is_said_in_the_code_too(name: str) -> None:
    """The docstring of a request begins with who answers it and names its reply."""
    _, who, _, reply = next(cells for cells in rows("9. Requests") if cells[0] == name)
    text = REQUESTS[name].__doc__ or ""
    assert text.startswith(f"{who} ")
    assert f"`{reply}`" in text
    assert reply in REPLIES


def test_codes() -> None:
    table = {cells[1]: int(cells[0]) for cells in rows("12. Codes")[1:]}
    assert table == {code.name: code.value for code in Code}


def test_limits() -> None:
    table = {cells[0].strip("`"): int(cells[1]) for cells in rows("13. Limits")[1:]}
    assert table == {name: value for name, value in vars(limits).items() if name.endswith("_MAX")}


def test_statuses_of_a_pull() -> None:
    table = [cells[0].split() for cells in rows("7. Reading")[1:]]
    assert [(int(number), name) for number, name in table] == [(status.value, status.name) for status in requests.PullStatus]


def test_the_layout_of_a_batch() -> None:
    """Field for field: the offsets add up, and they are those of the header that the code packs."""
    cells = rows("5. Record batches")[1:]
    names = [row[2].replace(" ", "_") for row in cells if row[2] != "records"]
    assert names == [{"version": "format_version"}.get(name, name) for name in batch.BatchHeader._fields]
    at = 0
    for offset, size, *_ in cells[:-1]:
        assert int(offset) == at
        at += int(size)
    assert at == batch.BATCH_HEADER_BYTES == int(cells[-1][0])
    assigned = [int(row[0]) for row in cells if row[3] == "broker"]
    assert (assigned[0], assigned[-1]) == (batch.ENTRY_CRC_AT, 48)


def test_numbers_in_the_text() -> None:
    assert f"{limits.RECORDS_BYTES_MAX:,} bytes" in PAGE
    assert f"{limits.MESSAGE_BYTES_MAX:,} |" in PAGE
    assert f"`protocol_version` is {limits.PROTOCOL_VERSION}." in PAGE
    assert f"at most {limits.INFLIGHT_BATCHES_MAX - 1} batches unanswered" in PAGE
