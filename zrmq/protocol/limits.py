"""Every bound of the protocol, and the checks of what users name things. RocketMQ's numbers where it has one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Annotated, NoReturn, TypeVar

import msgspec

from zrmq.errors import Code, InvalidArgumentError, PayloadTooLargeError
from zrmq.message import MessageQueue

N = TypeVar("N", bound=float)

PROTOCOL_VERSION = 1

BODY_BYTES_MAX = 4 * 1024 * 1024  # RocketMQ's maxMessageSize
PROPERTIES_BYTES_MAX = 16 * 1024  # user properties, tag and keys together, as RocketMQ 5's proxy counts them
PROPERTY_COUNT_MAX = 128
KEY_COUNT_MAX = 64
TOPIC_CHARS_MAX = 127
GROUP_CHARS_MAX = 120
MESSAGE_GROUP_BYTES_MAX = 64
CLIENT_ID_CHARS_MAX = 255
BATCH_RECORDS_MAX = 65_536  # bounds what one batch can unpack to in objects
BATCH_BYTES_MAX = BODY_BYTES_MAX + 128 * 1024  # one record of the largest kind always fits
RECORDS_BYTES_MAX = BATCH_BYTES_MAX  # of a compressed batch, unpacked: no more than a plain one may have
HEADER_BYTES_MAX = 3 * 1024 * 1024  # a request's header frame: a registration of 10,000 topics fits, be all names the longest
REPLY_HEADER_BYTES_MAX = 8 * 1024 * 1024  # a reply's: the routes of 10,000 such topics at three such broker names fit
FRAME_COUNT_MAX = 1026  # header and as many payload frames as one pwritev or pull may have
MESSAGE_BYTES_MAX = 32 * 1024 * 1024  # ZMQ_MAXMSGSIZE: beyond it libzmq cuts the connection without a word
PULL_BYTES_MAX = 8 * 1024 * 1024
RECEIVED_BYTES_MAX = REPLY_HEADER_BYTES_MAX + PULL_BYTES_MAX  # of a message with all its frames; the rest is dropped unread
UNREAD_BYTES_MAX = 16 * 1024 * 1024  # of answers that lie ready at a server for one client; while it has more, its pulls wait
ROOMLESS_BYTES_MAX = 4 * 1024  # an answer up to this size needs no room: 10,000 of them fill the pipe
PULL_WAIT_MS_MAX = 60_000
TIMEOUT_MS_MAX = 1 << 40  # 35 years; Python's locks take no more than some hundred
OFFSET_MAX = 1 << 62  # of an offset or a time that is named; half of what files and requests may have, so that none is reached
QUEUES_PER_TOPIC_MAX = 1024
TOPICS_MAX = 10_000
GROUPS_MAX = 10_000
PLACES_MAX = 1_000_000  # that a broker remembers of all groups: subscriptions, where each began in a queue, offsets; some 200 MB
SUBSCRIPTIONS_MAX = 256  # topics one group subscribes to
SESSIONS_MAX = 10_000
HELLOS_PER_S_MAX = 2_000  # a HELLO costs some 50 us: a whole fleet that comes back at once may take a tenth of the thread
QUERY_TOPICS_MAX = 1_000  # more are asked for as `*`
WATCHES_PER_SESSION_MAX = 4  # a client holds one; beyond, its oldest is answered at once
PULLS_HELD_PER_SESSION_MAX = 2 * QUEUES_PER_TOPIC_MAX  # one a queue, of two of the largest topics
WAITS_PER_CLIENT_MAX = 16 * QUEUES_PER_TOPIC_MAX  # for queues that others hold; 8 MB; a new member asks for its whole share
OFFSETS_PER_COMMIT_MAX = 65_536
NAME_CHARS_MAX = 255  # of any name or address in a request, before it is looked at more closely
CREDENTIALS_BYTES_MAX = 4096
INFLIGHT_BATCHES_MAX = 32  # remembered per producer and queue; a producer has fewer of them unanswered

REMEMBERED_TEXTS = 256  # tags and property names come again and again, so their checks are remembered; each has 16 KiB at most

# Types of request fields, checked while decoding, so that no handler meets a number or a name that its tables cannot hold.
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # counts, offsets, times, epochs
QueueId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]

_NAME = re.compile(r"[%|a-zA-Z0-9_-]+\Z")
_WRONG_NAME_CHARACTER = re.compile(r"[^%|a-zA-Z0-9_-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _check_name(name: str, what: str, chars_max: int, code: Code) -> None:
    if not isinstance(name, str):
        _wrong_type(name, what, code)
    if not name:
        raise InvalidArgumentError(f"A {what} needs a name; give at least one character.", code=code, name=name)
    if len(name) > chars_max:
        raise InvalidArgumentError(
            f"The {what} name {name[:40]!r}... has {len(name)} characters; use at most {chars_max}.",
            code=code, name=name, limit_chars=chars_max,
        )
    if not _NAME.match(name):
        wrong = _WRONG_NAME_CHARACTER.search(name)
        assert wrong is not None
        raise InvalidArgumentError(
            f"The {what} name {name!r} contains {wrong.group()!r}; use letters, digits, '-', '_', '%' or '|'.",
            code=code, name=name, character=wrong.group(),
        )


def check_topic(topic: str) -> None:
    """Raise `InvalidArgumentError` unless `topic` can be a topic's name."""
    _check_name(topic, "topic", TOPIC_CHARS_MAX, Code.ILLEGAL_TOPIC)


def check_group(group: str) -> None:
    """Raise `InvalidArgumentError` unless `group` can be a producer's or consumer's group."""
    _check_name(group, "group", GROUP_CHARS_MAX, Code.ILLEGAL_CONSUMER_GROUP)


def check_text(text: str, what: str, code: Code) -> None:
    """Raise unless `text` is non-empty, has no control character and can be written as UTF-8."""
    if isinstance(text, str) and text.isprintable() and text.strip():
        return  # hot: what can be printed has neither, and nearly everything can
    if not isinstance(text, str):
        _wrong_type(text, what, code)
    if not text.strip():
        raise InvalidArgumentError(f"The {what} must be text and not blank; leave it out instead.", code=code)
    if _CONTROL.search(text) or _SURROGATE.search(text):
        raise InvalidArgumentError(
            f"The {what} {text[:40]!r} contains a control character or half of a surrogate pair; remove it.", code=code
        )


def _wrong_type(given: object, what: str, code: Code) -> NoReturn:
    kind = type(given).__name__
    raise InvalidArgumentError(f"The {what} is of type {kind}; give a str.", code=code, type=kind)


def check_tag(tag: str) -> None:
    """Raise unless `tag` can be a message's tag: text that a filter can ask for, so no `|` and no blanks around it."""
    check_text(tag, "tag", Code.ILLEGAL_MESSAGE_TAG)
    if tag != tag.strip():
        raise InvalidArgumentError(
            f"The tag {tag!r} begins or ends with a blank; remove it.", code=Code.ILLEGAL_MESSAGE_TAG, tag=tag
        )
    if "|" in tag:
        raise InvalidArgumentError(
            f"The tag {tag!r} contains '|'; a message has one tag without it.", code=Code.ILLEGAL_MESSAGE_TAG, tag=tag
        )


def check_body(body: bytes) -> int:
    """Raise unless `body` can be a message's body; return its size in bytes.

    Raises `InvalidArgumentError` for another type, `PayloadTooLargeError` beyond the limit.
    """
    if not isinstance(body, bytes):
        raise InvalidArgumentError(
            f"The body is of type {type(body).__name__}; give bytes, as from text.encode() or bytes(buffer).",
            type=type(body).__name__,
        )
    size = len(body)
    if size > BODY_BYTES_MAX:
        raise PayloadTooLargeError(
            f"The body has {size} bytes; the limit is {BODY_BYTES_MAX}. Split it, or send a reference to it.",
            code=Code.MESSAGE_BODY_TOO_LARGE, size_bytes=size, limit_bytes=BODY_BYTES_MAX,
        )
    return size


def check_extras(
    tag: str | None, keys: Sequence[str], properties: dict[str, str] | None, message_group: str | None
) -> int:
    """Raise unless a message can have these besides its body; return their size in bytes as the limits count it.

    Raises `InvalidArgumentError` for wrong types or characters, `PayloadTooLargeError` beyond a limit.
    """
    size = 0
    if tag is not None:
        size += _tag_bytes(tag) if isinstance(tag, str) else _wrong_type(tag, "tag", Code.ILLEGAL_MESSAGE_TAG)
    if keys:
        size += _check_keys(keys)
    if message_group is not None:
        check_text(message_group, "message group", Code.ILLEGAL_MESSAGE_GROUP)
        group_bytes = len(message_group.encode())
        if group_bytes > MESSAGE_GROUP_BYTES_MAX:
            raise InvalidArgumentError(
                f"The message group has {group_bytes} bytes; use at most {MESSAGE_GROUP_BYTES_MAX}.",
                code=Code.ILLEGAL_MESSAGE_GROUP, size_bytes=group_bytes, limit_bytes=MESSAGE_GROUP_BYTES_MAX,
            )
        size += group_bytes
    if properties:
        size += _check_property_map(properties)
    return size if size <= PROPERTIES_BYTES_MAX else _checked_size(size)


def _checked_size(size: int) -> int:
    if size > PROPERTIES_BYTES_MAX:
        raise PayloadTooLargeError(
            f"Tag, keys and properties have {size} bytes together; the limit is {PROPERTIES_BYTES_MAX}. Put data into the body.",
            code=Code.MESSAGE_PROPERTIES_TOO_LARGE, size_bytes=size, limit_bytes=PROPERTIES_BYTES_MAX,
        )
    return size


@lru_cache(REMEMBERED_TEXTS)
def _tag_bytes(tag: str) -> int:
    check_tag(tag)
    return _checked_size(len(tag.encode()))


@lru_cache(REMEMBERED_TEXTS)
def _property_name_bytes(name: str) -> int:
    check_text(name, "property name", Code.ILLEGAL_MESSAGE_PROPERTY_KEY)
    return _checked_size(len(name.encode()))


def _check_keys(keys: Sequence[str]) -> int:
    if not isinstance(keys, (list, tuple)):
        raise InvalidArgumentError(
            f"keys={keys!r} is of type {type(keys).__name__}; give a list of str: keys=['dev-7'].", code=Code.ILLEGAL_MESSAGE_KEY
        )
    if len(keys) > KEY_COUNT_MAX:
        raise InvalidArgumentError(
            f"The message has {len(keys)} keys; use at most {KEY_COUNT_MAX}.", code=Code.ILLEGAL_MESSAGE_KEY
        )
    size = 0
    for key in keys:
        if not (isinstance(key, str) and key.isprintable() and key.strip()):
            check_text(key, "key", Code.ILLEGAL_MESSAGE_KEY)
        size += len(key) if key.isascii() else len(key.encode())
    return size


def _check_property_map(properties: dict[str, str]) -> int:
    if not isinstance(properties, dict):
        raise InvalidArgumentError(
            f"properties={properties!r} is of type {type(properties).__name__}; give a dict of str to str.",
            code=Code.ILLEGAL_MESSAGE_PROPERTY_KEY,
        )
    if len(properties) > PROPERTY_COUNT_MAX:
        raise InvalidArgumentError(
            f"The message has {len(properties)} properties; use at most {PROPERTY_COUNT_MAX}.",
            code=Code.ILLEGAL_MESSAGE_PROPERTY_KEY,
        )
    size = 0
    for name, value in properties.items():
        size += _property_name_bytes(name)
        if isinstance(value, str) and value.isascii():
            size += len(value)
        elif isinstance(value, str) and not _SURROGATE.search(value):
            size += len(value.encode())
        else:
            raise InvalidArgumentError(
                f"The property {name!r} has the value {value!r}; give a str.", code=Code.ILLEGAL_MESSAGE_PROPERTY_KEY
            )
    return size


def check_number(name: str, value: N, least: int, most: int | None = None, kind: type = int) -> N:
    """`value`, or `InvalidArgumentError` unless it is a whole number (of `kind` float: any number) within the bounds."""
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not least <= value or (most is not None and value > most):
        what = "a whole number" if kind is int else "a number"
        bounds = f"{what} from {least} to {most}" if most is not None else f"{what}, {least} or more"
        raise InvalidArgumentError(f"{name} is {value!r}; give {bounds}.", name=name, value=value)
    return value


def check_flag(name: str, value: bool) -> bool:
    """`value`, or `InvalidArgumentError` for what is neither True nor False, such as text that says no."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} is {value!r}; give True or False.", name=name, value=value)
    return value


def check_timeout(timeout_ms: float) -> None:
    """`InvalidArgumentError` unless it is a number of milliseconds that can be waited."""
    if not isinstance(timeout_ms, int | float) or isinstance(timeout_ms, bool) or not 0 <= timeout_ms <= TIMEOUT_MS_MAX:
        raise InvalidArgumentError(f"timeout_ms is {timeout_ms!r}; wait for 0 or more, at most {TIMEOUT_MS_MAX} milliseconds.")


def check_queues(queues: Iterable[MessageQueue]) -> list[MessageQueue]:
    """A list of them, or `InvalidArgumentError` unless each is a message queue."""
    if not isinstance(queues, Iterable):
        raise InvalidArgumentError(f"{queues!r} is no list of message queues; give one, such as queues() has.")
    chosen = list(queues)
    for queue in chosen:
        if not isinstance(queue, MessageQueue):
            raise InvalidArgumentError(f"{queue!r} is no message queue; take some from queues(), or make a MessageQueue.")
        check_topic(queue.topic)
        if not isinstance(queue.broker_name, str):
            raise InvalidArgumentError(f"{queue!r} has a broker name that is no text; give a str.")
        check_number("queue_id", queue.queue_id, 0)
    return chosen
