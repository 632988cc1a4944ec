"""A NameServer and brokers in threads of this process, over real sockets on free ports, for tests of what stands on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import zrmq


@contextmanager
def running_cluster(folder: Path, names: Sequence[str] = ("broker-a",), **options: Any) -> Iterator[str]:
    """The NameServer's address. The brokers are registered before the block begins."""
    with ExitStack() as stack:
        nameserver = stack.enter_context(zrmq.NameServer(nameserver_port=0, start_grace_ms=0))
        for name in names:
            ports = {"broker_port": 0, "ingest_port": 0}
            stack.enter_context(
                zrmq.Broker(folder / name, broker_name=name, nameservers=nameserver.address, **ports, **options)
            )
        await_brokers(nameserver.address, len(names))
        yield nameserver.address


def await_brokers(nameservers: str, count: int) -> None:
    """Return when so many brokers are registered."""
    from zrmq.client.admin import Admin

    with Admin(nameservers) as admin:
        while len(admin.cluster()) < count:
            pass  # each turn asks the route, and the test's own time bound ends what never happens
