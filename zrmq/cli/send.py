"""`zrmq send`: one message from the command line, or one for each line of stdin."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import msgspec

from zrmq.cli.options import client_options, examples
from zrmq.cli.printing import print_json
from zrmq.errors import InvalidArgumentError, RequestTimeoutError, ZrmqError

if TYPE_CHECKING:
    from zrmq.client.batch import SendHandle
    from zrmq.message import SendReceipt
    from zrmq.producer import Producer

GROUP = "zrmq-send"
AHEAD_MAX = 10_000  # lines sent whose receipts are not printed yet: enough for full batches, few to lose sight of
READ_BYTES = 1 << 16  # what a pipe holds
LOOK_S = 0.01  # while receipts are to come and no line does: soon enough for a person, and little work
CUT_SHORT_MS = 1_000  # Ctrl-C feels at once up to here, and a flush on a slow card takes less


def parse_property(text: str) -> tuple[str, str]:
    """Name and value of `K=V`. Raises `click.BadParameter`."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{text!r} is no property; write NAME=VALUE.", param_hint="'--property'")
    return name, value


@click.command(epilog=examples(
    "zrmq send meters 21.5 --tag kitchen --key dev-7",
    "zrmq send meters 21.5 --property unit=C --message-group house-1",
    "zrmq send meters -- -5",
    "journalctl -f | zrmq send logs - --json",
))
@click.argument("topic")
@click.argument("body")
@click.option("--tag", help="The message's tag; consumers select by it.")
@click.option("--key", "keys", multiple=True, help="A key of the message, for those who read it; give it again for more.")
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="A property; give it again for more.")
@click.option("--message-group", help="Messages of one group keep their order.")
@client_options
def send(topic: str, body: str, timeout_ms: int, nameservers: str | None, as_json: bool, **given: Any) -> None:
    """Send BODY to TOPIC; `-` sends each line of stdin as a message. Ends with 0 only when all of them are stored.

    Ctrl-C ends `-` after a moment for the answers that are on their way, and says how many are stored.
    """
    import zrmq

    parts = {
        "tag": given["tag"],
        "keys": given["keys"],
        "message_group": given["message_group"],
        "properties": dict(map(parse_property, given["properties"])) or None,
    }
    with zrmq.Producer(GROUP, nameservers=nameservers, send_timeout_ms=timeout_ms) as producer:
        if body != "-":
            receipt = producer.send(topic, body.encode(errors="surrogateescape"), **parts)
            with told_elsewhere(f"stored {receipt.message_id} in {topic}"):
                print_receipt(receipt, as_json)
            return
        send_stdin(producer, topic, parts, as_json)


def send_stdin(producer: Producer, topic: str, parts: dict[str, Any], as_json: bool) -> None:
    """Send the lines of stdin, and say how many are stored, also when one of them fails or somebody has had enough."""
    if sys.stdin is None:
        raise InvalidArgumentError("There is no stdin to read lines from; give it, or the body itself.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is stored is counted
    sending = LineSending(producer, topic, parts, print_as_json if as_json else ignore)
    try:
        sending.run(read_lines(sys.stdin.buffer, sending.is_waiting))
    except KeyboardInterrupt:
        sending.cut_short()
        raise
    finally:
        unknown = f"; not acknowledged, so perhaps stored: {sending.unacknowledged}" if sending.unacknowledged else ""
        count = f"stored {sending.stored} message{'s' if sending.stored != 1 else ''} in {topic}{unknown}"
        with told_elsewhere(count):
            click.echo(count, err=as_json)


def read_lines(stream: BinaryIO, is_waiting: Callable[[], bool]) -> Iterator[bytes | None]:
    """Each line of the stream without its end, as soon as it is there. While something waits, None after each `LOOK_S` in which
    none came."""
    try:
        descriptor = stream.fileno()
    except OSError:  # no file: what a program has put in the place of its stdin never makes anybody wait
        yield from (line.removesuffix(b"\n") for line in stream)
        return
    rest = bytearray()
    while True:
        if not select.select([descriptor], [], [], LOOK_S if is_waiting() else None)[0]:
            yield None
            continue
        read = os.read(descriptor, READ_BYTES)
        rest += read
        if not read:
            break
        if b"\n" in read:
            *lines, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            yield from lines
    if rest:
        yield bytes(rest)


class LineSending:
    """Lines on their way, each a message, and their receipts in the order of the lines, each as soon as it and those before it
    are there. One thread.

    An exception, such as Ctrl-C's, may come anywhere in it: then a line is counted once or as unacknowledged, never as stored
    when that is not known.
    """

    def __init__(
        self, producer: Producer, topic: str, parts: dict[str, Any], on_receipt: Callable[[SendReceipt], None]
    ) -> None:
        self.stored = 0
        self._on_receipt = on_receipt
        self._broken: BrokenPipeError | None = None
        self._producer = producer
        self._topic = topic
        self._parts = parts
        self._begun = 0  # lines
        self._out: deque[tuple[int, SendHandle]] = deque()  # with the line's number, from 1
        self._failures: dict[int, ZrmqError] = {}  # by line

    def is_waiting(self) -> bool:
        """Whether there are lines whose receipts are still to come."""
        return bool(self._out)

    @property
    def unacknowledged(self) -> int:
        """Lines that may be stored, or not: the sending was cut short before their answers came."""
        return self._begun - self.stored - len(self._failures)

    def run(self, lines: Iterable[bytes | None]) -> None:
        """Send each line, and wait for all receipts. None: there is no line now.

        Sends no more when it notices that a line failed. Then, when the receipts of all that are stored have been handed on, it
        raises the error of the first line that is not, with its number in the sentence and in `facts["line"]`. When nobody takes
        the receipts any more (`BrokenPipeError`) the lines are sent all the same, and it is raised in the end.
        """
        for line in lines:
            if line is not None:
                self._send(line)
            while self._out and (len(self._out) > AHEAD_MAX or self._out[0][1].done()):
                self._take()
            if self._failures:
                break
        self._finish()

    def cut_short(self) -> None:
        """After Ctrl-C: hand on the receipts that come within `CUT_SHORT_MS`, and let go of the producer. Raises as `run`."""
        try:
            with suppress(RequestTimeoutError):
                self._producer.flush(CUT_SHORT_MS)
            self._out = deque(pair for pair in self._out if pair[1].done())
        finally:
            self._producer.close(0)  # it would wait for the others as long as they may take
        self._finish()

    def _send(self, line: bytes) -> None:
        self._begun += 1
        try:
            self._out.append((self._begun, self._producer.send_async(self._topic, line.rstrip(b"\r"), **self._parts)))
        except ZrmqError as error:
            self._failures[self._begun] = error

    def _take(self) -> None:
        """The outcome of the first line that is out, waiting for it."""
        number, handle = self._out[0]
        try:
            receipt = handle.result()
        except ZrmqError as error:
            self._failures[number] = error
            self._out.popleft()
            return
        self.stored += 1  # no call is between the answer and this, nor a place for Ctrl-C
        self._out.popleft()
        try:
            self._on_receipt(receipt)
        except BrokenPipeError as error:
            self._on_receipt, self._broken = ignore, error

    def _finish(self) -> None:
        """Take what is out, and raise what `run` raises."""
        while self._out:
            self._take()
        if self._failures:
            number, failure = min(self._failures.items())
            failure.message = f"Line {number}: {failure.message}"
            failure.facts = {**failure.facts, "line": number}
            raise failure
        if self._broken is not None:
            raise self._broken


@contextmanager
def told_elsewhere(stored: str) -> Iterator[None]:
    """Say on stderr what is stored when stdout does not take it: the command fails then, and who repeats it stores it twice."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            click.echo(f"{stored}; stdout did not take that", err=True)
        raise


def ignore(receipt: SendReceipt) -> None:
    """For who wants to know how many there are and no more."""


def print_as_json(receipt: SendReceipt) -> None:
    """One line of JSON."""
    print_receipt(receipt, as_json=True)


def print_receipt(receipt: SendReceipt, as_json: bool) -> None:
    """Where a message is, and how safe."""
    if as_json:
        print_json(msgspec.structs.asdict(receipt))
        return
    place = f"{receipt.topic}, queue {receipt.queue_id} of {receipt.broker_name}, offset {receipt.queue_offset}"
    click.echo(f"stored {receipt.message_id} in {place} ({receipt.durability.value})")
