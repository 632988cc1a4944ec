"""How commands that look after a cluster reach it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zrmq.cli.failures import Invocation

if TYPE_CHECKING:
    from zrmq.client.admin import Admin
    from zrmq.errors import ZrmqError
    from zrmq.protocol.requests import TopicInfo


def open_admin(nameservers: str | None, timeout_ms: int) -> Admin:
    """An admin client of the cluster. A broker that does not answer is told on stderr, and the command then ends with 1."""
    from zrmq.client.admin import Admin

    return Admin(nameservers, timeout_ms=timeout_ms, on_failure=tell_failure)


def find_topic(admin: Admin, name: str) -> dict[str, TopicInfo]:
    """The topic by broker name; empty when no broker has it."""
    from zrmq.errors import TopicNotFoundError

    try:
        return admin.topic(name)
    except TopicNotFoundError:
        return {}


def tell_failure(broker_name: str, error: ZrmqError) -> None:
    """Say which broker is missing in the output."""
    invocation = click.get_current_context().find_object(Invocation)
    if invocation is not None:
        invocation.is_partial = True
    click.echo(f"Warning: broker {broker_name} did not answer: {error.message}", err=True)
