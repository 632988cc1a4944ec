"""Tag filters: what an expression wants, its mask, and that no wanted message hides behind a mask."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import Code, InvalidArgumentError
from zrmq.protocol.tags import (
    EXPRESSION_CHARS_MAX,
    canonical_expression,
    filter_mask,
    parse_expression,
    tag_bit,
    tag_mask,
)

LETTERS = st.characters(exclude_categories=("C", "Z"), exclude_characters="|")
TAG = st.text(LETTERS, min_size=1, max_size=10).filter(lambda tag: tag != "*")


@pytest.mark.parametrize(
    "expression, tags",
    [
        ("*", None), ("", None), ("  ", None), (" * ", None),
        ("kitchen", {"kitchen"}), (" kitchen||hall ", {"kitchen", "hall"}), ("a || a", {"a"}),
        ("küche || 温度", {"küche", "温度"}),
        ("a b || c", {"a b", "c"}),
    ],
)
def test_expressions(expression: str, tags: set[str] | None) -> None:
    assert parse_expression(expression) == tags


@pytest.mark.parametrize("expression", ["||", "a ||", "|| a", "a || || b", "a | b", "a|", "a\nb||c", "\ud800", "a ||\x00"])
def test_what_is_no_expression(expression: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        parse_expression(expression)
    assert raised.value.code in (Code.ILLEGAL_FILTER_EXPRESSION, Code.ILLEGAL_MESSAGE_TAG)


@pytest.mark.parametrize("expression", ["a |", "a | b", "a|b", "| a", "|", "a ||| b", "a || b | c"])
def test_a_single_bar_is_told_from_two(expression: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        parse_expression(expression)
    assert raised.value.message == f"The filter {expression!r} has a single '|'; write tags joined by '||', as in 'a || b'."
    assert raised.value.code is Code.ILLEGAL_FILTER_EXPRESSION


def test_expressions_have_a_limit() -> None:
    parse_expression("a" * EXPRESSION_CHARS_MAX)
    with pytest.raises(InvalidArgumentError, match="use at most 4096"):
        parse_expression("a" * (EXPRESSION_CHARS_MAX + 1))


@given(st.lists(TAG, min_size=1, max_size=6))
def test_equal_filters_have_one_spelling(tags: list[str]) -> None:
    spelled = canonical_expression("||".join(tags))
    assert spelled == canonical_expression(" ||  ".join(reversed(tags)))
    assert parse_expression(spelled) == set(tags)
    assert canonical_expression(spelled) == spelled
    assert filter_mask(spelled) == tag_mask(tags)


def test_all_is_spelled_as_a_star() -> None:
    assert canonical_expression("") == canonical_expression(" * ") == "*"
    assert filter_mask("*") == 0


@given(st.lists(st.none() | TAG, max_size=8), st.lists(TAG, min_size=1, max_size=4))
def test_a_skipped_batch_has_no_wanted_tag(tags: list[str | None], wanted: list[str]) -> None:
    mask = filter_mask(" || ".join(wanted))
    if not tag_mask(tags) & mask:
        assert not set(tags) & set(wanted)


@given(TAG)
def test_bits_are_those_of_the_document(tag: str) -> None:
    assert tag_bit(tag) == 1 << zlib.crc32(tag.encode()) % 64
    assert 0 < tag_bit(tag) < 1 << 64


def test_untagged_records_set_no_bit() -> None:
    assert tag_mask([None, None]) == tag_mask([]) == 0
    assert tag_mask(["a", None, "b"]) == tag_bit("a") | tag_bit("b")


@given(st.text(max_size=60))
def test_any_text_is_an_expression_or_refused(expression: str) -> None:
    try:
        tags = parse_expression(expression)
    except InvalidArgumentError:
        return
    assert tags is None or all(tag == tag.strip() and tag for tag in tags)
