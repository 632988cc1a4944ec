"""`zrmq tail`: a topic's messages, one a line, as they come or up to the end of what there is."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from zrmq.cli.administration import find_topic, open_admin
from zrmq.cli.options import client_options, examples, parse_time, read_by
from zrmq.cli.printing import escape, escape_bytes, print_json
from zrmq.errors import Code, RequestRefusedError
from zrmq.message import ConsumeFrom, Message, MessageQueue
from zrmq.protocol.events import PERMISSION_READ
from zrmq.protocol.tags import parse_expression

if TYPE_CHECKING:
    from zrmq.client.admin import Admin
    from zrmq.consumer import PullConsumer
    from zrmq.protocol.requests import TopicInfo

POLL_MESSAGES = 1_000
POLL_MS = 200


def parse_start(text: str) -> ConsumeFrom | int:
    """`earliest`, `latest` or a time in milliseconds since 1970, as a consumer takes it. Raises `ConfigError`."""
    return ConsumeFrom(text) if text in (ConsumeFrom.EARLIEST.value, ConsumeFrom.LATEST.value) else parse_time(text)


@click.command(epilog=examples(
    "zrmq tail meters",
    "zrmq tail meters --from earliest --count 10 --json",
    "zrmq tail meters --from 2026-11-23T08:30 --until-end",
    "zrmq tail meters --group reports --filter 'kitchen || hall'",
))
@click.argument("topic")
@click.option("--group", help="Read as a member of this consumer group and commit.  [default: read beside all groups]")
@click.option("--from", "start", type=read_by(parse_start), metavar="earliest|latest|TIME", default="latest", show_default=True,
              help="Where to begin; a group that has read before goes on where it was.")
@click.option("--filter", "expression", default="*", help="Only messages with one of these tags: 'kitchen || hall'.")
@click.option("--count", type=click.IntRange(1), help="End after so many messages.")
@click.option("--until-end", is_flag=True, help="End when all there was at the start is read.")
@client_options
def tail(
    topic: str, group: str | None, start: ConsumeFrom | int, expression: str, count: int | None, until_end: bool, as_json: bool,
    nameservers: str | None, timeout_ms: int,
) -> None:
    """Print the messages of TOPIC as they come, until Ctrl-C."""
    import zrmq

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a group's queues are given back
    wanted = parse_expression(expression)
    with open_admin(nameservers, timeout_ms) as admin, suppress(KeyboardInterrupt):  # Ctrl-C is how a tail ends
        infos = admin.topic(topic) if until_end else find_topic(admin, topic)
        ends = find_ends(topic, infos) if until_end else None
        if infos:
            check_readable(topic, infos)
        else:
            click.echo(f"{topic} does not exist yet; waiting for it (Ctrl-C ends that).", err=True)
        with zrmq.PullConsumer(group, nameservers=nameservers, consume_from=start) as consumer:
            # A broker that skips for us says nothing until there is something: then nobody would see the end pass by.
            consumer.subscribe(topic, "*" if until_end and not group else expression)
            for message in messages(consumer, admin, wanted, count, ends):
                print_message(message, as_json)


def check_readable(topic: str, infos: dict[str, TopicInfo]) -> None:
    """Raise `RequestRefusedError` (FORBIDDEN) when no broker lets the topic be read; a consumer would wait until one does."""
    if not any(info.config.permission & PERMISSION_READ for info in infos.values()):
        raise RequestRefusedError(
            f"Topic {topic!r} may not be read; 'zrmq topic update {topic} --permission rw' lets it be.",
            code=Code.FORBIDDEN, topic=topic,
        )


def find_ends(topic: str, infos: dict[str, TopicInfo]) -> dict[MessageQueue, int]:
    """Where each queue of the topic ends, at the brokers that let it be read."""
    return {
        MessageQueue(topic, broker_name, queue.queue_id): queue.max_offset
        for broker_name, info in infos.items() if info.config.permission & PERMISSION_READ
        for queue in info.queues
    }


def messages(
    consumer: PullConsumer, admin: Admin, wanted: frozenset[str] | None, count: int | None, ends: dict[MessageQueue, int] | None
) -> Iterator[Message]:
    """The wanted messages as they come, up to `count`, or until every queue has been read to its end.

    Never asks for more than is still to be given, because a group's offsets move past everything that was taken.
    """
    if ends is None:
        admin.cluster()  # raises when nobody is there; a consumer would go on trying
    left = POLL_MESSAGES if count is None else count
    while left > 0 and (ends is None or ends):
        taken = consumer.poll(min(left, POLL_MESSAGES), POLL_MS)
        found = [message for message in taken if wanted is None or message.tag in wanted]
        yield from found
        if count is not None:
            left -= len(found)
        if ends is not None:
            ends = find_unread(consumer, admin, ends, is_idle=not taken)


def find_unread(
    consumer: PullConsumer, admin: Admin, ends: dict[MessageQueue, int], *, is_idle: bool
) -> dict[MessageQueue, int]:
    """The queues that are not read to their end yet. Those that another member of the group holds are that one's to read."""
    assigned = set(consumer.assigned())
    unread = {queue: end for queue, end in ends.items() if queue not in assigned or consumer.position(queue) < end}
    if not is_idle or not consumer.group or unread.keys() <= assigned:
        return unread
    others = {
        MessageQueue(lease.topic, broker_name, lease.queue_id)
        for broker_name, info in admin.group(consumer.group).items() for lease in info.leases
        if lease.client_id != consumer.client_id
    }
    return {queue: end for queue, end in unread.items() if queue not in others}


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
