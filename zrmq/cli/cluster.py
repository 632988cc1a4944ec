"""`zrmq cluster` and `zrmq broker-status`: which brokers there are, and what one of them counts and holds."""

from __future__ import annotations

from typing import Any

import click

from zrmq.cli.administration import open_admin
from zrmq.cli.options import client_options, examples
from zrmq.cli.printing import print_json, print_table


@click.command(epilog=examples("zrmq cluster", "zrmq cluster --json --nameservers box-1,box-2"))
@client_options
def cluster(as_json: bool, **where: Any) -> None:
    """The brokers that the NameServer knows."""
    with open_admin(**where) as admin:
        brokers = admin.cluster()
    rows = [
        {
            "cluster": broker.cluster,
            "broker_name": broker.broker_name,
            "broker_id": broker.broker_id,
            "role": broker.role,
            "address": broker.address,
            "epoch": broker.epoch,
            "state": "suspect" if broker.suspect else "alive",
        }
        for broker in brokers
    ]
    if as_json:
        for row in rows:
            print_json(row)
    else:
        print_table(("cluster", "broker", "id", "role", "address", "epoch", "state"), (list(row.values()) for row in rows))


@click.command(epilog=examples("zrmq broker-status", "zrmq broker-status broker-a --json"))
@click.argument("broker_name", metavar="[BROKER]", required=False)
@client_options
def broker_status(broker_name: str | None, as_json: bool, **where: Any) -> None:
    """What a broker counts and holds, since its start. Without a name: every broker."""
    with open_admin(**where) as admin:
        names = [broker_name] if broker_name else sorted({broker.broker_name for broker in admin.cluster()})
        states = [admin.broker_state(name) for name in names]
    for facts in states:
        if as_json:
            print_json(facts)
        else:
            print_table(("fact", "value"), facts.items())
