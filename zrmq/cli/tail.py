"""`zrmq tail`: a topic's messages, one a line, as they come or up to the end of what there is."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from zrmq.cli.options import client_options, examples, parse_time
from zrmq.cli.printing import escape, escape_bytes, print_json
from zrmq.message import ConsumeFrom, Message

if TYPE_CHECKING:
    from zrmq.consumer import PullConsumer

POLL_MS = 200


def parse_start(text: str) -> dict[str, Any]:
    """`earliest`, `latest` or a time, as the arguments a consumer takes. Raises `ConfigError`."""
    if text in (ConsumeFrom.EARLIEST.value, ConsumeFrom.LATEST.value):
        return {"consume_from": ConsumeFrom(text)}
    return {"consume_from": ConsumeFrom.TIMESTAMP, "consume_timestamp_ms": parse_time(text)}


@click.command(epilog=examples(
    "zrmq tail meters",
    "zrmq tail meters --from earliest --count 10 --json",
    "zrmq tail meters --from 2026-11-23T08:30 --until-end",
    "zrmq tail meters --group reports --filter 'kitchen || hall'",
))
@click.argument("topic")
@click.option("--group", help="Read as a member of this consumer group and commit.  [default: read beside all groups]")
@click.option("--from", "start", type=parse_start, metavar="earliest|latest|TIME", default="latest", show_default=True,
              help="Where to begin; a group that has read before goes on where it was.")
@click.option("--filter", "expression", default="*", help="Only messages with one of these tags: 'kitchen || hall'.")
@click.option("--count", type=click.IntRange(1), help="End after so many messages.")
@click.option("--until-end", is_flag=True, help="End when all there was at the start is read.")
@client_options
def tail(
    topic: str, group: str | None, start: dict[str, Any], expression: str, count: int | None, until_end: bool,
    nameservers: str | None, timeout_ms: int, as_json: bool,
) -> None:
    """Print the messages of TOPIC as they come, until Ctrl-C."""
    import zrmq

    with zrmq.PullConsumer(group, nameservers=nameservers, **start) as consumer:
        consumer.subscribe(topic, expression)
        try:
            for message in messages(consumer, count, until_end):
                print_message(message, as_json)
        except (KeyboardInterrupt, BrokenPipeError):
            return  # the way a tail ends


def messages(consumer: PullConsumer, count: int | None, until_end: bool) -> Iterator[Message]:
    """The messages, to the end that was asked for."""
    raise NotImplementedError


def print_message(message: Message, as_json: bool) -> None:
    """One message on one line."""
    if as_json:
        print_json(facts_of(message))
        return
    at = datetime.fromtimestamp(message.store_timestamp_ms / 1000).astimezone().isoformat(timespec="milliseconds")
    tag = f" [{escape(message.tag)}]" if message.tag is not None else ""
    queue = message.queue
    click.echo(f"{at} {queue.broker_name}/{queue.queue_id}@{message.queue_offset}{tag} {escape_bytes(message.body)}")


def facts_of(message: Message) -> dict[str, Any]:
    """The message as JSON: `body` as text, or `body_base64` where it is not UTF-8."""
    facts: dict[str, Any] = {
        "topic": message.topic,
        "broker_name": message.queue.broker_name,
        "queue_id": message.queue.queue_id,
        "queue_offset": message.queue_offset,
        "message_id": message.message_id,
        "tag": message.tag,
        "keys": list(message.keys),
        "message_group": message.message_group,
        "properties": message.properties,
        "store_timestamp_ms": message.store_timestamp_ms,
        "delivery_attempt": message.delivery_attempt,
    }
    try:
        return {**facts, "body": message.body.decode()}
    except UnicodeDecodeError:
        return {**facts, "body_base64": base64.b64encode(message.body).decode()}
