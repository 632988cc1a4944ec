"""Every error zrmq raises or sends: a code, the facts as attributes, and one sentence that says what to do next.

    ZrmqError                         code, message, facts
    |-- RequestRefusedError           a server said no; `code` tells why
    |   |-- TopicNotFoundError            40402
    |   |-- ConsumerGroupNotFoundError    40403
    |   |-- CorruptedError                40016, 60007
    |   |-- PayloadTooLargeError          41300, 41301, 43101
    |   |-- NoSessionError                60001
    |   |-- FencedError                   60002
    |   |-- OutOfOrderError               60003
    |   |-- SubscriptionMismatchError     60004
    |   |-- DiskFullError                 60005
    |   |-- StoreFailedError              60006
    |   |-- NotReadyError                 60008
    |   `-- StoppingError                 60009
    |-- InvalidArgumentError            (also a ValueError) refused before anything was sent
    |-- ConfigError                     a file, variable or flag that cannot be used
    |-- UnreachableError                nobody answered at the addresses given
    |-- RequestTimeoutError             (also a TimeoutError) no answer before the deadline
    |-- BufferFullError                 the producer's buffer is full and may not block
    |-- ClosedError                     used after, or interrupted by, close()
    |-- ForkedClientError               used in a forked child
    |-- FolderLockedError               another process owns the data folder
    |-- FolderUnusableError             the data folder cannot be written or is not ours
    |-- AddressInUseError               the port or path is taken
    |-- ResourceLimitError              the system gives no more threads, sockets or open files
    |-- DamageError                     bytes before the flushed position do not check out
    `-- InvalidFrameError               a peer's bytes are not zrmq's protocol

The numbers below 60000 are those of RocketMQ 5's `Code` (apache.rocketmq.v2); those from 60000 are ours, for things that
RocketMQ has no number for.
"""

from __future__ import annotations

from enum import IntEnum

MESSAGE_CHARS_MAX = 2_000  # of a sentence that repeats what it was given


class Code(IntEnum):
    """Result of a request, as it travels in a reply."""

    OK = 20000
    BAD_REQUEST = 40000
    ILLEGAL_TOPIC = 40002
    ILLEGAL_CONSUMER_GROUP = 40003
    ILLEGAL_MESSAGE_TAG = 40004
    ILLEGAL_MESSAGE_KEY = 40005
    ILLEGAL_MESSAGE_GROUP = 40006
    ILLEGAL_MESSAGE_PROPERTY_KEY = 40007
    ILLEGAL_FILTER_EXPRESSION = 40010
    MESSAGE_CORRUPTED = 40016
    CLIENT_ID_REQUIRED = 40017
    ILLEGAL_OFFSET = 40019
    UNAUTHORIZED = 40100
    FORBIDDEN = 40300
    NOT_FOUND = 40400
    TOPIC_NOT_FOUND = 40402
    CONSUMER_GROUP_NOT_FOUND = 40403
    OFFSET_NOT_FOUND = 40404
    REQUEST_TIMEOUT = 40800
    PAYLOAD_TOO_LARGE = 41300
    MESSAGE_BODY_TOO_LARGE = 41301
    TOO_MANY_REQUESTS = 42900
    MESSAGE_PROPERTIES_TOO_LARGE = 43101
    INTERNAL_ERROR = 50000
    UNSUPPORTED = 50500
    VERSION_UNSUPPORTED = 50501
    NO_SESSION = 60001
    FENCED = 60002
    OUT_OF_ORDER = 60003
    SUBSCRIPTION_MISMATCH = 60004
    DISK_FULL = 60005
    STORE_FAILED = 60006
    CORRUPT = 60007
    NOT_READY = 60008
    STOPPING = 60009
    LEASE_HELD = 60010
    INSTANCE_NAME_TAKEN = 60011
    UNREACHABLE = 61001
    BUFFER_FULL = 61002
    CLOSED = 61003
    FORKED = 61004
    CONFIG = 61005
    FOLDER_LOCKED = 61006
    FOLDER_UNUSABLE = 61007
    ADDRESS_IN_USE = 61008
    RESOURCE_LIMIT = 61009


class ZrmqError(Exception):
    """Base of all errors of this package.

    `code` is the number, `message` the sentence for a person, `facts` what the sentence speaks of (sizes with their unit
    in the name, topics, addresses), for a program.
    """

    code: Code = Code.INTERNAL_ERROR

    def __init__(self, message: str, *, code: Code | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        if code is not None:
            self.code = code

    def plain_facts(self) -> dict[str, object]:
        """The facts as MessagePack and JSON have them: numbers, text and lists of them as they are, anything else as text."""
        return {name: _plain(fact) for name, fact in self.facts.items()}

    def __str__(self) -> str:
        return f"{self.message} [{int(self.code)} {self.code.name}]"


def _shortened(message: str) -> str:
    """What was given may be a whole body in the wrong place; what to do next is said at the end."""
    half = MESSAGE_CHARS_MAX // 2
    return message if len(message) <= MESSAGE_CHARS_MAX else f"{message[:half]} ... {message[-half:]}"


def _plain(fact: object) -> object:
    if isinstance(fact, list | tuple):
        return [_plain(part) for part in fact]
    return fact if isinstance(fact, int | float | str | None) else str(fact)


class RequestRefusedError(ZrmqError):
    """A server answered a request with an error; `code` says which."""


class TopicNotFoundError(RequestRefusedError):
    """The topic does not exist and may not be created by use."""

    code = Code.TOPIC_NOT_FOUND


class ConsumerGroupNotFoundError(RequestRefusedError):
    """No broker knows the consumer group."""

    code = Code.CONSUMER_GROUP_NOT_FOUND


class CorruptedError(RequestRefusedError):
    """A batch failed its checksum: on arrival (40016) or on disk (60007)."""

    code = Code.CORRUPT


class PayloadTooLargeError(RequestRefusedError):
    """A body, a batch or a message's properties exceed their limit."""

    code = Code.PAYLOAD_TOO_LARGE


class NoSessionError(RequestRefusedError):
    """The server does not know this connection; the client opens a session and asks again by itself."""

    code = Code.NO_SESSION


class FencedError(RequestRefusedError):
    """The queue's lease went to another member of the group; what was read under the old one must not be committed."""

    code = Code.FENCED


class OutOfOrderError(RequestRefusedError):
    """A batch arrived before the one it follows; the client sends both again."""

    code = Code.OUT_OF_ORDER


class SubscriptionMismatchError(RequestRefusedError):
    """Members of one consumer group must subscribe alike; both subscriptions are in the message."""

    code = Code.SUBSCRIPTION_MISMATCH


class DiskFullError(RequestRefusedError):
    """The broker's disk is nearly full, or its log may open no file for now; it takes messages again when that is over."""

    code = Code.DISK_FULL


class StoreFailedError(RequestRefusedError):
    """The disk refused a write or a flush; the broker takes nothing more until it is restarted."""

    code = Code.STORE_FAILED


class NotReadyError(RequestRefusedError):
    """The server has just started and does not know yet; ask again shortly."""

    code = Code.NOT_READY


class StoppingError(RequestRefusedError):
    """The server is shutting down; use another one, or this one when it is back."""

    code = Code.STOPPING


class InvalidArgumentError(ZrmqError, ValueError):
    """An argument was refused before anything was sent or stored."""

    code = Code.BAD_REQUEST

    def __init__(self, message: str, *, code: Code | None = None, **facts: object) -> None:
        super().__init__(_shortened(message), code=code, **facts)


class ConfigError(ZrmqError):
    """A configuration file, variable or flag cannot be used."""

    code = Code.CONFIG


class UnreachableError(ZrmqError):
    """Nothing answered at the addresses given."""

    code = Code.UNREACHABLE


class RequestTimeoutError(ZrmqError, TimeoutError):
    """No answer came before the deadline; for a send it is unknown whether the message was stored."""

    code = Code.REQUEST_TIMEOUT


class BufferFullError(ZrmqError):
    """The producer holds `buffer_bytes` of unacknowledged messages and was told not to block."""

    code = Code.BUFFER_FULL


class ClosedError(ZrmqError):
    """The object was closed before or during the call."""

    code = Code.CLOSED


class ForkedClientError(ZrmqError):
    """A producer or consumer was used in a forked child; make a new one there."""

    code = Code.FORKED


class FolderLockedError(ZrmqError):
    """Another process owns the data folder."""

    code = Code.FOLDER_LOCKED


class FolderUnusableError(ZrmqError):
    """The data folder cannot be read or written, or belongs to another broker."""

    code = Code.FOLDER_UNUSABLE


class AddressInUseError(ZrmqError):
    """Another program listens at the address."""

    code = Code.ADDRESS_IN_USE


class ResourceLimitError(ZrmqError):
    """The system gives this process no more threads, sockets or open files. Nothing was begun; it may be tried again."""

    code = Code.RESOURCE_LIMIT


class DamageError(ZrmqError):
    """Bytes before the flushed position do not check out; nothing was cut off."""

    code = Code.CORRUPT


class InvalidFrameError(ZrmqError):
    """Bytes from a peer or a file are not zrmq's protocol."""

    code = Code.BAD_REQUEST


_BY_CODE: dict[Code, type[RequestRefusedError]] = {
    Code.TOPIC_NOT_FOUND: TopicNotFoundError,
    Code.CONSUMER_GROUP_NOT_FOUND: ConsumerGroupNotFoundError,
    Code.MESSAGE_CORRUPTED: CorruptedError,
    Code.CORRUPT: CorruptedError,
    Code.PAYLOAD_TOO_LARGE: PayloadTooLargeError,
    Code.MESSAGE_BODY_TOO_LARGE: PayloadTooLargeError,
    Code.MESSAGE_PROPERTIES_TOO_LARGE: PayloadTooLargeError,
    Code.NO_SESSION: NoSessionError,
    Code.FENCED: FencedError,
    Code.OUT_OF_ORDER: OutOfOrderError,
    Code.SUBSCRIPTION_MISMATCH: SubscriptionMismatchError,
    Code.DISK_FULL: DiskFullError,
    Code.STORE_FAILED: StoreFailedError,
    Code.NOT_READY: NotReadyError,
    Code.STOPPING: StoppingError,
}


def refused(code: int, message: str, facts: dict[str, object] | None = None) -> RequestRefusedError:
    """The typed error for a code that came over the wire; an unknown code keeps its number in the facts."""
    details = dict(facts or {})
    try:
        known = Code(code)
    except ValueError:
        known, details["unknown_code"] = Code.INTERNAL_ERROR, code
    error = _BY_CODE.get(known, RequestRefusedError)(message, code=known)
    error.facts = details  # not as keywords: a peer may name a fact like an argument
    return error
