"""`zrmq group`: list and show consumer groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zrmq.cli.administration import open_admin
from zrmq.cli.options import client_options, examples
from zrmq.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from zrmq.protocol.requests import GroupInfo


@click.group()
def group() -> None:
    """List and show consumer groups."""


@group.command("list", epilog=examples("zrmq group list", "zrmq group list --json"))
@client_options
def list_groups(as_json: bool, **where: Any) -> None:
    """All consumer groups, with how far behind they are."""
    with open_admin(**where) as admin:
        rows = [summary(name, brokers) for name, brokers in sorted(admin.groups().items())]
    if as_json:
        for row in rows:
            print_json(row)
        return
    columns = ("group", "model", "members", "lag", "topics")
    print_table(
        columns,
        ((row["group"], row["message_model"] or "-", len(row["members"]), row["lag"], ",".join(row["topics"])) for row in rows),
    )


@group.command(epilog=examples("zrmq group show reports"))
@click.argument("name", metavar="GROUP")
@client_options
def show(name: str, as_json: bool, **where: Any) -> None:
    """One consumer group: its members, and each queue with who reads it and how far behind."""
    with open_admin(**where) as admin:
        brokers = admin.group(name)
    facts, queues = summary(name, brokers), queues_of(brokers)
    if as_json:
        print_json({**facts, "queues": queues})
        return
    click.echo(f"group: {name}\nmodel: {facts['message_model'] or 'no member now'}\nlag: {facts['lag']}")
    for topic, expression in facts["topics"].items():
        click.echo(f"topic: {topic} ({expression})" if facts["members"] else f"topic: {topic}")  # members say what they filter
    for member in facts["members"]:
        click.echo(f"member: {member}")
    print_table(
        ("topic", "broker", "queue", "instance", "committed", "max offset", "lag", "read by"),
        (["-" if value in (None, "") else value for value in queue.values()] for queue in queues),
    )


def summary(name: str, brokers: dict[str, GroupInfo]) -> dict[str, Any]:
    """What a group is over all brokers."""
    infos = sorted(brokers.values(), key=lambda info: info.message_model is not None)  # those that know the filters last
    queues = queues_of(brokers)
    return {
        "group": name,
        "message_model": next((info.message_model.value for info in infos if info.message_model is not None), None),
        "members": sorted({member.client_id for info in infos for member in info.members}),
        "topics": {each.topic: each.expression for info in infos for each in info.subscriptions},
        "lag": sum(queue["lag"] for queue in queues),
    }


def queues_of(brokers: dict[str, GroupInfo]) -> list[dict[str, Any]]:
    """Each queue of each subscribed topic, in order: where the group stands, and who holds it."""
    rows = []
    for broker, info in sorted(brokers.items()):
        holders = {(lease.topic, lease.queue_id): lease.client_id for lease in info.leases}
        for instance, topic, queue_id, committed, max_offset in info.offsets:
            rows.append({
                "topic": topic,
                "broker_name": broker,
                "queue_id": queue_id,
                "instance_name": instance,
                "committed_offset": committed if committed >= 0 else None,
                "max_offset": max_offset,
                "lag": max_offset - max(committed, 0),
                "client_id": holders.get((topic, queue_id)),
            })
    return sorted(rows, key=lambda row: (row["topic"], row["broker_name"], row["queue_id"], row["instance_name"]))
