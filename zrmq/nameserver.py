"""The NameServer, as a program runs it: in a thread of its own, or until a signal ends it.

    with zrmq.NameServer(nameserver_port=0) as nameserver:
        print(nameserver.address)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from zrmq.config import NameServerConfig, take, tcp_address
from zrmq.errors import ClosedError
from zrmq.logs import get_logger
from zrmq.routing.core import NameServerCore
from zrmq.transport.host import Host
from zrmq.transport.interface import Loop

log = get_logger("nameserver")


class NameServerRole:
    """A NameServer as a `Host` runs it, alone or beside other roles."""

    def __init__(self, config: NameServerConfig, *, address: str | None = None) -> None:
        """`address` takes the place of the config's host and port, for one that is reached in memory only."""
        self._config = config
        self._where = address or tcp_address(config.host, config.nameserver_port)
        self._core: NameServerCore | None = None

    @property
    def address(self) -> str:
        """Where it listens, with the port that was picked for port 0. Raises `ClosedError` before it is open."""
        if self._core is None:
            raise ClosedError("The NameServer is not running; start it first.")
        return self._core.address

    def open(self, loop: Loop) -> None:
        """Listen. Raises `AddressInUseError`, `InvalidArgumentError`."""
        self._core = NameServerCore(
            loop, self._where, random.Random(),
            suspect_after_ms=self._config.suspect_after_ms,
            gone_after_ms=self._config.gone_after_ms,
            start_grace_ms=self._config.start_grace_ms,
        )
        log.info("nameserver_started", address=self._core.address)

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """Stop listening; clients and brokers move on to another NameServer."""
        try:
            if self._core is not None:
                self._core.close()
                log.info("nameserver_stopped", address=self._core.address)
        finally:
            on_stopped()

    def abandon(self) -> None:
        """It has sockets and nothing else, and those end with the loop."""


class NameServer(Host):
    """One NameServer. `options` are those of `zrmq nameserver --help`; any thread may use it; it is started once.

    Raises `ConfigError` for options that cannot be; starting raises `AddressInUseError`, `InvalidArgumentError`,
    `ResourceLimitError`.
    """

    def __init__(self, config: NameServerConfig | None = None, **options: Any) -> None:
        self._role = NameServerRole(take(NameServerConfig, config, options))
        super().__init__(self._role, name="zrmq-nameserver")

    @property
    def address(self) -> str:
        """What clients and brokers connect to; `ClosedError` before the start."""
        return self._role.address
