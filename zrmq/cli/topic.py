"""`zrmq topic`: list, create, update, delete and show topics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from zrmq.cli.administration import find_topic, open_admin
from zrmq.cli.options import F, client_options, examples, read_by
from zrmq.cli.printing import print_json, print_table
from zrmq.config import parse_duration, parse_size
from zrmq.errors import ConfigError, InvalidArgumentError
from zrmq.message import FlushMode
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX

if TYPE_CHECKING:
    from zrmq.protocol.requests import TopicInfo

QUEUE_COUNT = click.IntRange(1, QUEUES_PER_TOPIC_MAX)
PERMISSIONS = {"rw": 6, "r": 4, "w": 2, "none": 0}
PERMISSION_NAMES = {value: name for name, value in PERMISSIONS.items()}
FLUSH_MODES = [mode.value for mode in FlushMode]
BOUNDS = ("retention_ms", "retention_bytes")
NO_BOUND = "none"
BOUND_MAX = (1 << 62) - 1  # milliseconds or bytes; a broker takes no more
FROM_THE_FRONT = "but none behind what another topic keeps longer: the broker's one log is deleted from its front"
TAKEN_BACK = "none takes the bound back; a topic without any has the broker's, --store-retention-ms"
RETENTION_HELP = f"Older messages are deleted (72h), {FROM_THE_FRONT}. {TAKEN_BACK}."
RETENTION_BYTES_HELP = f"Oldest messages beyond it are deleted (1GiB), {FROM_THE_FRONT}. {TAKEN_BACK}."
AS_THE_BROKERS = "as the broker's"  # which no broker tells its clients


def bound(parse: Callable[[str], int]) -> Callable[[str], int | str]:
    """The type of a bound on what is kept: a quantity as `parse` reads it, or `NO_BOUND`."""

    def parse_bound(text: str) -> int | str:
        if text == NO_BOUND:
            return NO_BOUND
        quantity = parse(text)
        if not 0 < quantity <= BOUND_MAX:
            raise ConfigError(f"{text!r} is no bound for what is kept; give one above 0 and up to {BOUND_MAX}, or {NO_BOUND}.")
        return quantity

    return read_by(parse_bound)


def settings(command: F) -> F:
    """What can be set for a topic. What is not given stays None."""
    for option in (
        click.option("--retention-bytes", type=bound(parse_size), metavar="SIZE|none", help=RETENTION_BYTES_HELP),
        click.option("--retention-ms", "--retention", type=bound(parse_duration), metavar="AGE|none", help=RETENTION_HELP),
        click.option("--permission", type=click.Choice(list(PERMISSIONS)), help="What clients may do: read, write."),
        click.option("--flush-mode", type=click.Choice(FLUSH_MODES), help="Acknowledge after the flush (sync) or not."),
        click.option("--queue-count", "--queues", type=QUEUE_COUNT, help="Queues at each broker; only ever more."),
    ):
        command = option(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, as `Admin` takes them: None is a bound that is taken back."""
    known = {name: chosen for name, chosen in options.items() if chosen is not None}
    if "permission" in known:
        known["permission"] = PERMISSIONS[known["permission"]]
    if "flush_mode" in known:
        known["flush_mode"] = FlushMode(known["flush_mode"])
    return {name: None if name in BOUNDS and chosen == NO_BOUND else chosen for name, chosen in known.items()}


@click.group()
def topic() -> None:
    """List, create, update, delete and show topics."""


@topic.command("list", epilog=examples("zrmq topic list", "zrmq topic list --json"))
@client_options
def list_topics(as_json: bool, **where: Any) -> None:
    """All topics, with what they hold."""
    with open_admin(**where) as admin:
        rows = [summary(name, brokers) for name, brokers in sorted(admin.topics().items())]
    if as_json:
        for row in rows:
            print_json(row)
        return
    shown = ("topic", "brokers", "queue_count", "messages", "flush_mode", "permission")
    cells = ({**row, "brokers": ",".join(row["brokers"])} for row in rows)
    print_table(("topic", "brokers", "queues", "messages", "flush", "permission"), ([row[key] for key in shown] for row in cells))


def summary(name: str, brokers: dict[str, TopicInfo]) -> dict[str, Any]:
    """What a topic is over all its brokers. Settings are those of the first; `zrmq topic show` has each."""
    first = brokers[min(brokers)].config
    queues = [queue for info in brokers.values() for queue in info.queues]
    return {
        "topic": name,
        "brokers": sorted(brokers),
        "queue_count": len(queues),
        "messages": sum(queue.max_offset - queue.min_offset for queue in queues),
        "flush_mode": first.flush_mode.value,
        "permission": PERMISSION_NAMES.get(first.permission, first.permission),
        "retention_ms": first.retention_ms,
        "retention_bytes": first.retention_bytes,
        "retention_of": "broker" if first.retention_ms is None and first.retention_bytes is None else "topic",
    }


def kept(facts: dict[str, Any]) -> list[str]:
    """How long messages are kept, in words: by the topic's bounds, or, where it has none, by the age that its broker is told."""
    bounds = [f"retention {facts[key]} {key[10:]}" for key in BOUNDS if facts[key] is not None]
    return bounds or [f"retention {AS_THE_BROKERS}"]


@topic.command(epilog=examples("zrmq topic show meters"))
@click.argument("name", metavar="TOPIC")
@client_options
def show(name: str, as_json: bool, **where: Any) -> None:
    """One topic: its settings and its queues, broker by broker."""
    with open_admin(**where) as admin:
        brokers = admin.topic(name)
    facts = summary(name, brokers)
    queues = [
        {"broker_name": broker, "queue_id": queue.queue_id, "min_offset": queue.min_offset, "max_offset": queue.max_offset}
        for broker, info in sorted(brokers.items()) for queue in info.queues
    ]
    if as_json:
        print_json({**facts, "queues": queues})
        return
    for key in ("topic", "flush_mode", "permission", *BOUNDS):
        if facts[key] is not None:
            click.echo(f"{key}: {facts[key]}")
    if facts["retention_of"] == "broker":
        click.echo(f"retention_ms: {AS_THE_BROKERS}")
    print_table(("broker", "queue", "min offset", "max offset"), (list(queue.values()) for queue in queues))


@topic.command(epilog=examples("zrmq topic create meters", "zrmq topic create alarms --queues 1 --retention 7d"))
@click.argument("name", metavar="TOPIC")
@settings
@client_options
def create(name: str, nameservers: str | None, timeout_ms: int, as_json: bool, **options: Any) -> None:
    """Create a topic at every broker. A topic that exists with these settings is left as it is; with others it is refused."""
    with open_admin(nameservers, timeout_ms) as admin:
        is_known = bool(find_topic(admin, name))
        admin.create_topic(name, **given(options))
        _print_done("left as it is:" if is_known else "created", name, admin.topic(name), as_json)


@topic.command(epilog=examples(
    "zrmq topic update meters --queues 8", "zrmq topic update meters --permission r", "zrmq topic update meters --retention none"
))
@click.argument("name", metavar="TOPIC")
@settings
@client_options
def update(name: str, nameservers: str | None, timeout_ms: int, as_json: bool, **options: Any) -> None:
    """Change what is given of a topic, at every broker that has it."""
    changes = given(options)
    if not changes:
        raise click.UsageError("Nothing to change is given; see --help for what can be set.")
    with open_admin(nameservers, timeout_ms) as admin:
        admin.update_topic(name, **changes)
        _print_done("updated", name, admin.topic(name), as_json)


@topic.command(epilog=examples("zrmq topic delete meters", "zrmq topic delete meters --yes"))
@click.argument("name", metavar="TOPIC")
@click.option("--yes", is_flag=True, help="Do not ask.")
@client_options
def delete(name: str, yes: bool, as_json: bool, **where: Any) -> None:
    """Delete a topic with its messages and all groups' offsets on it, at every broker that is live.

    A broker that is away keeps the topic, and brings it back when it starts: delete it again then.
    """
    with open_admin(**where) as admin:
        facts = summary(name, admin.topic(name))
        if not yes and not confirm(f"Delete {name} with its {facts['messages']} messages?"):
            raise InvalidArgumentError(f"{name} was not deleted; say --yes to delete without being asked.", topic=name)
        admin.delete_topic(name)
    if as_json:
        print_json({"topic": name, "deleted": True, "brokers": facts["brokers"]})
    else:
        click.echo(f"deleted {name} at {', '.join(facts['brokers'])}")


def confirm(question: str) -> bool:
    """Ask, where there is somebody to ask."""
    return stdin_is_terminal() and click.confirm(question)


def stdin_is_terminal() -> bool:
    """Whether a question would be seen and answered."""
    return sys.stdin is not None and sys.stdin.isatty()


def _print_done(what: str, name: str, brokers: dict[str, TopicInfo], as_json: bool) -> None:
    facts = summary(name, brokers)
    if as_json:
        print_json(facts)
    else:
        settings = [f"flush {facts['flush_mode']}", f"permission {facts['permission']}", *kept(facts)]
        click.echo(f"{what} {name}: {facts['queue_count']} queues at {', '.join(facts['brokers'])}, {', '.join(settings)}")
