"""`zrmq send`: one message from the command line, or one for each line of stdin."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zrmq.cli.options import client_options, examples
from zrmq.cli.printing import print_json
from zrmq.errors import InvalidArgumentError, ZrmqError

if TYPE_CHECKING:
    from zrmq.client.batch import SendHandle
    from zrmq.message import SendReceipt
    from zrmq.producer import Producer

GROUP = "zrmq-send"
AHEAD_MAX = 10_000  # lines sent whose receipts are not printed yet: enough for full batches, few to lose sight of


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
    """Send BODY to TOPIC; `-` sends each line of stdin as a message. Ends with 0 only when all of them are stored."""
    import zrmq

    parts = {
        "tag": given["tag"],
        "keys": given["keys"],
        "message_group": given["message_group"],
        "properties": dict(map(parse_property, given["properties"])) or None,
    }
    with zrmq.Producer(GROUP, nameservers=nameservers, send_timeout_ms=timeout_ms) as producer:
        if body != "-":
            print_receipt(producer.send(topic, body.encode(errors="surrogateescape"), **parts), as_json)
            return
        send_stdin(producer, topic, parts, as_json)


def send_stdin(producer: Producer, topic: str, parts: dict[str, Any], as_json: bool) -> None:
    """Send the lines of stdin, and say how many are stored, also when one of them fails."""
    if sys.stdin is None:
        raise InvalidArgumentError("There is no stdin to read lines from; give it, or the body itself.")
    count = 0
    receipts = send_lines(producer, topic, sys.stdin.buffer, parts)
    try:
        for receipt in receipts:
            count += 1
            if as_json:
                print_receipt(receipt, as_json)
    except BrokenPipeError:  # nobody reads the receipts any more; the lines are sent all the same
        for _ in receipts:
            count += 1
        raise
    finally:
        click.echo(f"stored {count} message{'s' if count != 1 else ''} in {topic}", err=as_json)


def send_lines(producer: Producer, topic: str, lines: Iterable[bytes], parts: dict[str, Any]) -> Iterator[SendReceipt]:
    """Send each line without its end; the receipts in the order of the lines, a while behind them.

    Sends no more when it notices that one failed. The receipts of all that are stored come first; then the error of the first
    line that is not is raised, with its number, from 1, in the sentence and in `facts["line"]`.
    """
    handles: deque[tuple[int, SendHandle]] = deque()
    failures: dict[int, ZrmqError] = {}  # by line
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            handles.append((number, producer.send_async(topic, line.rstrip(b"\r\n"), **parts)))
            while handles and (len(handles) > AHEAD_MAX or handles[0][1].done()):
                number, handle = handles.popleft()
                yield handle.result()
    except ZrmqError as error:
        failures[number] = error
    for number, handle in handles:
        try:
            yield handle.result()
        except ZrmqError as error:
            failures[number] = error
    if failures:
        number, failure = min(failures.items())
        failure.message = f"Line {number}: {failure.message}"
        failure.facts = {**failure.facts, "line": number}
        raise failure


def print_receipt(receipt: SendReceipt, as_json: bool) -> None:
    """Where a message is, and how safe."""
    if as_json:
        print_json(msgspec.structs.asdict(receipt))
        return
    place = f"{receipt.topic}, queue {receipt.queue_id} of {receipt.broker_name}, offset {receipt.queue_offset}"
    click.echo(f"stored {receipt.message_id} in {place} ({receipt.durability.value})")
