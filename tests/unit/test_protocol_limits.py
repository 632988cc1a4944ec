"""What may be said and how much of it: each limit at its edge, each refusal with what it is about and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import Code, InvalidArgumentError, PayloadTooLargeError, ZrmqError
from zrmq.protocol import limits
from zrmq.protocol.limits import check_body, check_extras, check_group, check_tag, check_topic


def record(**parts: Any) -> int:
    """Check one message; all parts but the named ones are empty."""
    every: dict[str, Any] = {"body": b"", "tag": None, "keys": (), "message_group": None, "properties": None}
    every.update(parts)
    return check_body(every.pop("body")) + check_extras(**every)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m", "meters", "%RETRY%reports", "A-b_9|%", "m" * 127])
def test_names_of_topics(name: str) -> None:
    check_topic(name)


@pytest.mark.parametrize("name", ["g", "reports", "%DLQ%", "g" * 120])
def test_names_of_groups(name: str) -> None:
    check_group(name)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("", "at least one character"),
        ("m" * 128, "has 128 characters; use at most 127"),
        ("a b", "contains ' '"),
        ("meters\n", "contains '\\\\n'"),
        ("mètres", "contains 'è'"),
        ("a.b", "contains '.'"),
        ("a/../b", "contains"),
        ("\x00", "contains"),
        (None, "The topic is of type NoneType; give a str"),
        (5, "The topic is of type int; give a str"),
        (b"meters", "The topic is of type bytes; give a str"),
    ],
)
def test_what_is_no_name(name: Any, sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence) as raised:
        check_topic(name)
    assert raised.value.code is Code.ILLEGAL_TOPIC


def test_a_group_of_another_type_is_told_which() -> None:
    with pytest.raises(InvalidArgumentError, match="The group is of type bytes; give a str") as raised:
        check_group(b"g")  # type: ignore[arg-type]
    assert raised.value.code is Code.ILLEGAL_CONSUMER_GROUP
    assert raised.value.facts == {"type": "bytes"}


def test_groups_have_a_code_and_a_limit_of_their_own() -> None:
    with pytest.raises(InvalidArgumentError, match="group name .* has 121 characters") as raised:
        check_group("g" * 121)
    assert raised.value.code is Code.ILLEGAL_CONSUMER_GROUP
    assert raised.value.facts["limit_chars"] == 120


@given(st.text())
def test_a_name_passes_or_is_refused(name: str) -> None:
    try:
        check_topic(name)
    except InvalidArgumentError as error:
        assert error.message.endswith(".")
        return
    assert name.isascii()
    assert 0 < len(name) <= limits.TOPIC_CHARS_MAX
    assert not set(name) & set(" ./\\\0\n")


# --- tags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["kitchen", "küche", "a b", "*", "温度", "a&b"])
def test_tags(tag: str) -> None:
    check_tag(tag)


@pytest.mark.parametrize(
    "tag, sentence",
    [
        ("", "not blank"), ("  ", "not blank"), ("a|b", r"contains '\|'"), ("a\tb", "control character"), ("a\x9f", "control"),
        ("\ud800", "surrogate"), (" a", "blank"), ("a ", "blank"), ("a\u2003", "blank"),
        (5, "The tag is of type int; give a str"),
        (b"a", "The tag is of type bytes; give a str"),
    ],
)
def test_what_is_no_tag(tag: Any, sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence) as raised:
        check_tag(tag)
    assert raised.value.code is Code.ILLEGAL_MESSAGE_TAG


# --- messages -----------------------------------------------------------------------------------------------------------


def test_the_size_counts_bytes() -> None:
    assert record(body=b"21.5") == 4
    assert record(body=b"21.5", tag="é", keys=["a", "bc"], message_group="ü", properties={"k": "vé"}) == 4 + 2 + 3 + 2 + 4


def test_empty_parts_are_no_parts() -> None:
    assert record(keys=[], properties={}) == 0


@pytest.mark.parametrize("body", ["text", None, 5, bytearray(b"x"), memoryview(b"x"), [b"x"]])
def test_bodies_are_bytes(body: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"of type {type(body).__name__}; give bytes"):
        record(body=body)


def test_a_body_at_its_limit() -> None:
    assert record(body=bytes(limits.BODY_BYTES_MAX)) == limits.BODY_BYTES_MAX
    with pytest.raises(PayloadTooLargeError, match="4194305 bytes; the limit is 4194304") as raised:
        record(body=bytes(limits.BODY_BYTES_MAX + 1))
    assert raised.value.code is Code.MESSAGE_BODY_TOO_LARGE
    assert raised.value.facts == {"size_bytes": 4_194_305, "limit_bytes": 4_194_304}


def test_properties_at_their_limit() -> None:
    room = limits.PROPERTIES_BYTES_MAX - len("tagkeygroupname")
    parts: dict[str, Any] = {"tag": "tag", "keys": ["key"], "message_group": "group"}
    assert record(**parts, properties={"name": "x" * room}) == limits.PROPERTIES_BYTES_MAX
    with pytest.raises(PayloadTooLargeError, match="together") as raised:
        record(**parts, properties={"name": "x" * (room + 1)})
    assert raised.value.code is Code.MESSAGE_PROPERTIES_TOO_LARGE


@pytest.mark.parametrize(
    "parts, code",
    [
        ({"tag": "a|b"}, Code.ILLEGAL_MESSAGE_TAG),
        ({"tag": 5}, Code.ILLEGAL_MESSAGE_TAG),
        ({"keys": "dev-7"}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": {"dev-7"}}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": 5}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": [""]}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": [5]}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": ["a\n"]}, Code.ILLEGAL_MESSAGE_KEY),
        ({"keys": ["k"] * 65}, Code.ILLEGAL_MESSAGE_KEY),
        ({"message_group": ""}, Code.ILLEGAL_MESSAGE_GROUP),
        ({"message_group": "g" * 65}, Code.ILLEGAL_MESSAGE_GROUP),
        ({"message_group": "ü" * 33}, Code.ILLEGAL_MESSAGE_GROUP),
        ({"message_group": 5}, Code.ILLEGAL_MESSAGE_GROUP),
        ({"properties": [("a", "b")]}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": "a=b"}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {"": "b"}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {5: "b"}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {"a": 5}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {"a": "\udfff"}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {"a\x00": "b"}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
        ({"properties": {str(n): "" for n in range(129)}}, Code.ILLEGAL_MESSAGE_PROPERTY_KEY),
    ],
)
def test_what_is_no_message(parts: dict[str, Any], code: Code) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        record(**parts)
    assert raised.value.code is code
    assert raised.value.message.endswith((".", "]."))


@pytest.mark.parametrize(
    "parts, sentence",
    [
        ({"tag": 5}, "The tag is of type int; give a str."),
        ({"keys": ["a", b"b"]}, "The key is of type bytes; give a str."),
        ({"message_group": 5}, "The message group is of type int; give a str."),
        ({"properties": {5: "b"}}, "The property name is of type int; give a str."),
        ({"properties": {None: "b"}}, "The property name is of type NoneType; give a str."),
    ],
)
def test_a_wrong_type_is_named(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        record(**parts)
    assert raised.value.message == sentence


@pytest.mark.parametrize(
    "parts",
    [
        {"keys": ["k"] * 64}, {"keys": ("a", "b c")}, {"message_group": "ü" * 32}, {"properties": {"a": ""}},
        {"properties": {"a": "line\nline"}}, {"properties": {str(n): "" for n in range(128)}},
    ],
)
def test_messages_at_the_edge(parts: dict[str, Any]) -> None:
    assert record(**parts) > 0


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.lists(st.text()), st.dictionaries(st.text(), st.text())
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_anything_is_a_message_or_refused(body: Any, tag: Any, keys: Any, message_group: Any, properties: Any) -> None:
    try:
        size = check_body(body) + check_extras(tag, keys, properties, message_group)
    except ZrmqError as error:
        assert 40000 <= error.code < 50000
        return
    assert size >= len(body)
    assert isinstance(body, bytes)
