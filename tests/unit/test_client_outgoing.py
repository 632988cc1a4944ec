"""What callers give as messages: accepted kinds, and a typed refusal for every wrong one."""

from __future__ import annotations

from collections import UserDict, UserList
from typing import Any

import msgpack
import pytest

from zrmq.client import outgoing as outgoing_module
from zrmq.client.accumulator import ITEM_OVERHEAD_BYTES, RECORD_OVERHEAD_BYTES
from zrmq.client.batch import NO_EXTRAS, Extras
from zrmq.client.outgoing import NO_VALUE, outgoing, outgoing_records
from zrmq.errors import Code, InvalidArgumentError, PayloadTooLargeError
from zrmq.message import Record
from zrmq.protocol import limits


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"abc", b"abc"), (b"", b""), ("21.5 °C", "21.5 °C".encode()), (bytearray(b"abc"), b"abc"),
     (memoryview(b"xabcx")[1:4], b"abc"),
     (memoryview(b"a-b-c")[::2], b"abc")],
)
def test_bodies_become_bytes(body: Any, expected: bytes) -> None:
    assert outgoing(body) == (expected, len(expected) + RECORD_OVERHEAD_BYTES, None)


@pytest.mark.parametrize("value", [None, 0, 21.5, "text", b"raw", [1, 2], {"a": {"b": None}}, True])
def test_values_are_packed(value: Any) -> None:
    body, _, _ = outgoing(None, value)
    assert msgpack.unpackb(body) == value


def test_what_can_still_be_changed_is_copied() -> None:
    body, keys, properties = bytearray(b"abc"), ["dev-7"], {"unit": "C"}
    data, _, extras = outgoing(body, keys=keys, properties=properties)
    body[0] = 0
    keys.append("later")
    properties["later"] = "x"
    assert data == b"abc"
    assert extras == Extras(None, ("dev-7",), {"unit": "C"}, None)


def test_empty_extras_are_none() -> None:
    assert outgoing(b"x", keys=[], properties={})[2] is None


def test_the_size_counts_everything() -> None:
    _, size_bytes, extras = outgoing(b"12345", NO_VALUE, "tag", ["k1", "k22"], {"p": "vv"}, "group")
    assert extras == Extras("tag", ("k1", "k22"), {"p": "vv"}, "group")
    assert size_bytes == 5 + 3 + 2 + 3 + 3 + 5 + RECORD_OVERHEAD_BYTES + 4 * ITEM_OVERHEAD_BYTES


@pytest.mark.parametrize("keys", [["k"], ("k",), [], None])
@pytest.mark.parametrize("properties", [{"a": "b"}, {}, None])
def test_what_comes_again_is_the_same_again(keys: Any, properties: Any) -> None:
    given: dict[str, Any] = {"tag": "t", "keys": keys, "properties": properties, "message_group": "g"}
    first, second = outgoing(b"x", **given), outgoing(b"longer", **given)
    assert first[2] == Extras("t", tuple(keys or ()), properties or None, "g")
    assert first[2] is second[2] or not (keys and properties)
    assert first[2] == second[2]
    assert second[1] - first[1] == len("longer") - 1


def test_what_is_changed_afterwards_is_something_else() -> None:
    keys, properties = ["k"], {"a": "b"}
    outgoing(b"x", keys=keys, properties=properties)
    keys[0] = "other"
    assert outgoing(b"x", keys=keys, properties=properties)[2] == Extras(None, ("other",), {"a": "b"}, None)
    properties["a"] = "c"
    assert outgoing(b"x", keys=keys, properties=properties)[2] == Extras(None, ("other",), {"a": "c"}, None)
    properties["a"] = 5  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match="property"):
        outgoing(b"x", keys=keys, properties=properties)


@pytest.mark.parametrize("part", ["tag", "keys", "properties", "message_group"])
def test_one_part_that_differs_is_enough(part: str) -> None:
    one: dict[str, Any] = {"tag": "t", "keys": ("k",), "properties": {"a": "b"}, "message_group": "g"}
    other: dict[str, Any] = {"tag": "u", "keys": ("l",), "properties": {"a": "c"}, "message_group": "h"}
    for given in (one, {**one, part: other[part]}, {**one, part: None}, one):
        expected = {**given, part: given[part] or getattr(Extras(), part)}
        assert outgoing(b"x", **given)[2] == Extras(**expected)


def test_what_another_thread_changes_meanwhile_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, properties = ["k"], {"a": "b"}
    check = outgoing_module.check_extras

    def change(*parts: Any) -> int:
        size_bytes = check(*parts)
        keys[0], properties["a"] = "changed", 5  # type: ignore[assignment]
        return size_bytes

    monkeypatch.setattr(outgoing_module, "check_extras", change)
    assert outgoing(b"x", keys=keys, properties=properties)[2] == Extras(None, ("k",), {"a": "b"}, None)
    monkeypatch.undo()
    assert outgoing(b"x", keys=["k"], properties={"a": "b"})[2] == Extras(None, ("k",), {"a": "b"}, None)
    with pytest.raises(InvalidArgumentError):
        outgoing(b"x", keys=keys, properties=properties)


@pytest.mark.parametrize("again", [{"keys": {"k": 1}.keys()}, {"keys": UserList(["k"])}, {"properties": UserDict(a="b")}])
def test_what_is_equal_and_of_another_type_is_refused(again: dict[str, Any]) -> None:
    given: dict[str, Any] = {"keys": ["k"], "properties": {"a": "b"}}
    outgoing(b"x", **given)
    with pytest.raises(InvalidArgumentError):
        outgoing(b"x", **{**given, **again})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"body": None}, "NoneType"),
        ({"body": 5}, "int"),
        ({"body": ["a"]}, "list"),
        ({"body": "\ud800"}, "UTF-8"),
        ({"body": b"x", "value": 1}, "not both"),
        ({"body": None, "value": object()}, "MessagePack"),
        ({"body": None, "value": 1 << 70}, "MessagePack"),
        ({"body": None, "value": "\ud800"}, "MessagePack"),
        ({"body": b"x", "tag": ""}, "tag"),
        ({"body": b"x", "tag": 5}, "tag"),
        ({"body": b"x", "tag": "a|b"}, "tag"),
        ({"body": b"x", "keys": "dev-7"}, "keys"),
        ({"body": b"x", "keys": {"dev-7"}}, "keys"),
        ({"body": b"x", "keys": [5]}, "key"),
        ({"body": b"x", "keys": ["k"] * (limits.KEY_COUNT_MAX + 1)}, "keys"),
        ({"body": b"x", "properties": [("a", "b")]}, "properties"),
        ({"body": b"x", "properties": {"a": 1}}, "property"),
        ({"body": b"x", "message_group": "g" * 65}, "message group"),
        ({"body": b"x", "message_group": 7}, "message group"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        outgoing(**arguments)


def test_too_much_is_refused() -> None:
    with pytest.raises(PayloadTooLargeError) as caught:
        outgoing(bytes(limits.BODY_BYTES_MAX + 1))
    assert caught.value.code is Code.MESSAGE_BODY_TOO_LARGE
    with pytest.raises(PayloadTooLargeError) as caught:
        outgoing(b"", properties={"p": "v" * limits.PROPERTIES_BYTES_MAX})
    assert caught.value.code is Code.MESSAGE_PROPERTIES_TOO_LARGE


@pytest.mark.parametrize("group", [None, "g"])
@pytest.mark.parametrize(
    "records", [[], [b"a", b"bc"], ["a", b"bc"], [b"a", bytearray(b"bc")], [b"a", Record(b"bc")], [Record(b"a", "t"), b"bc"]]
)
def test_records_of_a_batch_are_messages_one_by_one(records: list[Any], group: str | None) -> None:
    bodies, sizes_bytes, extras = outgoing_records(records, group)
    singly = [outgoing(record.body, NO_VALUE, record.tag, message_group=group) if isinstance(record, Record)
              else outgoing(record, message_group=group) for record in records]
    assert bodies == [body for body, _, _ in singly]
    assert sizes_bytes == [size_bytes for _, size_bytes, _ in singly]
    each = [each_extras for _, _, each_extras in singly]
    assert extras == (None if each == [None] * len(each) else [each_extras or NO_EXTRAS for each_extras in each])


def test_records_may_bring_what_a_message_may_have() -> None:
    whole = Record(b"x", "tag", ["k"], "g", {"a": "b"})
    for group in (None, "g"):
        assert outgoing_records([whole, "text"], group)[2] == [
            Extras("tag", ("k",), {"a": "b"}, "g"), Extras(message_group=group)
        ]
    with pytest.raises(InvalidArgumentError, match="message_group"):
        outgoing_records([whole], "other")


def test_the_largest_record_of_a_batch_is_checked_too() -> None:
    largest = bytes(limits.BODY_BYTES_MAX)
    assert outgoing_records([b"x", largest], None)[0] == [b"x", largest]
    with pytest.raises(PayloadTooLargeError):
        outgoing_records([b"x", largest + b"x", b"y"], None)
