"""How a listener is called: units sized by how long it takes, and when a message that failed comes again.

A fast listener gets many messages at once, so that taking them from the inbox costs it little each; a slow one gets them one by
one, so that they run side by side on all threads. What raises comes again: in order it stops its queue until it succeeds;
otherwise the others go on and only the commit waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import AsyncGeneratorType, CoroutineType, GeneratorType

import msgspec

from zrmq.client.process_queue import Unit
from zrmq.clock import Clock
from zrmq.errors import InvalidArgumentError
from zrmq.message import Message

UNIT_MS = 5.0  # what a unit should take: far more than handing it out, far less than anybody waits for it to end
UNIT_MS_MAX = 20.0  # a listener that has become slow keeps no more than that to one thread
UNIT_MESSAGES_MAX = 256
LOOK_EVERY = 8  # messages between two looks at the clock; a power of two
PACE_WEIGHT = 0.3  # of the newest unit in the average

RETRY_MS_MIN = 1_000.0  # before the second attempt; doubled with each
RETRY_MS_MAX = 60_000.0

Listener = Callable[[Message], object]

UNRUN = (GeneratorType, AsyncGeneratorType)  # beside awaitables: what a listener returns that has not begun, and nobody would run


class Pace:
    """How many messages to give a listener at once. Several threads may measure; the last one counts."""

    __slots__ = ("_message_ms", "messages")

    def __init__(self) -> None:
        self.messages = 1
        self._message_ms = 0.0

    def measure(self, messages: int, elapsed_ms: float) -> None:
        """A unit of so many messages took so long. It at most doubles, because one quick message says little."""
        newest_ms = elapsed_ms / messages
        self._message_ms += (newest_ms - self._message_ms) * (PACE_WEIGHT if self._message_ms else 1.0)
        fitting = int(UNIT_MS / max(self._message_ms, UNIT_MS / UNIT_MESSAGES_MAX))
        self.messages = max(1, min(fitting, 2 * self.messages))


class Failure(msgspec.Struct, frozen=True):
    """A part of a unit that comes again, in `retry_ms`: its first message raised, or (no error) there was no time for it."""

    unit: Unit
    error: Exception | None
    retry_ms: float


class Outcome(msgspec.Struct, frozen=True):
    """What became of a unit. What lies from `stop_offset` on was not touched."""

    failures: list[Failure]
    stop_offset: int


def retry_ms(delivery_attempt: int) -> float:
    """How long to wait after this attempt failed; 1 was the first.

    >>> [retry_ms(attempt) for attempt in (1, 2, 3, 7, 100)]
    [1000.0, 2000.0, 4000.0, 60000.0, 60000.0]
    """
    return min(RETRY_MS_MIN * 2.0 ** min(delivery_attempt - 1, 16), RETRY_MS_MAX)


def run_unit(unit: Unit, listener: Listener, pace: Pace, clock: Clock, *, in_order: bool) -> Outcome:
    """Give the messages to the listener, one after the other.

    Ends early when the queue is given back or lost meanwhile; and when it is paused, or takes too long: then what is left comes
    again, when it may and a thread is idle. Lets through what is not an `Exception` (a listener that calls `sys.exit`).
    """
    queue, failures, handled = unit.process_queue, [], 0
    began_ms = clock.monotonic_ms()
    for message in unit.messages:
        if queue.is_draining or queue.is_dropped:
            break
        if queue.is_paused:
            failures.append(Failure(_tail(unit, handled), None, 0.0))
            break
        handled += 1
        try:
            result = listener(message)
            if result is not None and (isinstance(result, UNRUN) or hasattr(type(result), "__await__")):
                _refuse(result)
        except Exception as error:  # noqa: BLE001 - whatever a listener raises means: this message again
            failures.append(_fail(unit, handled - 1, error, in_order))
            if in_order:
                break
        if handled % LOOK_EVERY == 1 and clock.monotonic_ms() - began_ms > UNIT_MS_MAX and handled < len(unit.messages):
            failures.append(Failure(_tail(unit, handled), None, 0.0))
            break
    if handled:
        pace.measure(handled, clock.monotonic_ms() - began_ms)
    is_whole = handled == len(unit.messages)
    return Outcome(failures, unit.next_offset if is_whole else unit.messages[handled].queue_offset)


def _refuse(result: object) -> None:
    """Its message was not handled, whatever the listener meant."""
    if isinstance(result, CoroutineType):
        result.close()  # else Python warns that nobody awaited it, where nobody knows why
    raise InvalidArgumentError(
        f"The listener returned {result!r}, which nobody runs; give one that has handled the message when it returns."
    )


def _fail(unit: Unit, index: int, error: Exception, in_order: bool) -> Failure:
    message = unit.messages[index]
    wait_ms = retry_ms(message.delivery_attempt)
    message.delivery_attempt += 1
    offset = message.queue_offset
    part = _tail(unit, index) if in_order else Unit(unit.process_queue, [message], offset, offset + 1)
    return Failure(part, error, wait_ms)


def _tail(unit: Unit, index: int) -> Unit:
    return Unit(unit.process_queue, unit.messages[index:], unit.messages[index].queue_offset, unit.next_offset)
