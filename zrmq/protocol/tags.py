"""Tag filters: `*`, or tags joined by `||`. The broker tests a 64-bit mask per batch, the client the tags themselves.

A batch's mask has one bit per tag that occurs in it: bit CRC-32(tag) modulo 64. A filter's mask has the bits of the tags it
wants; a batch with no bit in common is skipped unopened. Bits may collide, so the client compares again, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from zlib import crc32

from zrmq.errors import Code, InvalidArgumentError
from zrmq.protocol.limits import check_tag

ALL = "*"
EXPRESSION_CHARS_MAX = 4096


@lru_cache(maxsize=4096)
def tag_bit(tag: str) -> int:
    """The bit of one tag in a mask."""
    return 1 << (crc32(tag.encode()) & 63)


def tag_mask(tags: Iterable[str | None]) -> int:
    """The mask of a batch with these tags; untagged records set no bit."""
    mask = 0
    for tag in set(tags):
        if tag is not None:
            mask |= tag_bit(tag)
    return mask


def parse_expression(expression: str) -> frozenset[str] | None:
    """The wanted tags, or None for all messages. Raises `InvalidArgumentError` for what is none.

    >>> sorted(parse_expression("kitchen || hall"))
    ['hall', 'kitchen']
    """
    if not isinstance(expression, str):
        raise InvalidArgumentError(
            f"The filter is of type {type(expression).__name__}; give a str, tags joined by '||' as in 'a || b'.",
            code=Code.ILLEGAL_FILTER_EXPRESSION,
        )
    text = expression.strip()
    if len(text) > EXPRESSION_CHARS_MAX:
        raise InvalidArgumentError(
            f"The filter has {len(text)} characters; use at most {EXPRESSION_CHARS_MAX}.",
            code=Code.ILLEGAL_FILTER_EXPRESSION,
        )
    if text in ("", ALL):
        return None
    tags = [part.strip() for part in text.split("||")]
    for tag in tags:
        if "|" in tag:
            raise InvalidArgumentError(
                f"The filter {expression!r} has a single '|'; write tags joined by '||', as in 'a || b'.",
                code=Code.ILLEGAL_FILTER_EXPRESSION, expression=expression,
            )
        if not tag:
            raise InvalidArgumentError(
                f"The filter {expression!r} has an empty tag; write tags joined by '||', or '*' for all.",
                code=Code.ILLEGAL_FILTER_EXPRESSION, expression=expression,
            )
        check_tag(tag)
    return frozenset(tags)


def canonical_expression(expression: str) -> str:
    """One spelling for equal filters, so that `b||a` and `a || b` subscribe alike."""
    tags = parse_expression(expression)
    return ALL if tags is None else " || ".join(sorted(tags))


def filter_mask(expression: str) -> int:
    """The mask to send with a pull; 0 asks for everything."""
    tags = parse_expression(expression)
    return 0 if tags is None else tag_mask(tags)
