"""Clusters of real processes for tests: started on free ports, killed when the test ends; and a listener to wait with."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

import zrmq
from zrmq.cli.children import Child, start_broker, start_nameserver


class Cluster:
    """Two NameServers and one broker as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nameservers = [self._start_nameserver(name) for name in ("one", "two")]
        self.addresses = ",".join(address for _, address in self.nameservers)
        self.broker, self.broker_address = start_broker(
            "broker-a", folder / "broker.log", self.addresses, folder / "data", "--session-timeout-ms", "2000"
        )

    def _start_nameserver(self, name: str, port: int = 0) -> tuple[Child, str]:
        return start_nameserver(name, self.folder / f"{name}.log", port=port)

    def restart_nameserver(self, index: int) -> None:
        """Kill it and start it again where it was."""
        child, address = self.nameservers[index]
        child.kill()
        self.nameservers[index] = self._start_nameserver(child.name, int(address.rpartition(":")[2]))

    def close(self) -> None:
        self.broker.kill()
        for child, _ in self.nameservers:
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Counting:
    """A listener that remembers what it got and lets a test wait for it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self._more = threading.Condition()

    def __call__(self, message: zrmq.Message) -> None:
        with self._more:
            self.bodies.append(message.body)
            self._more.notify_all()

    def wait_for(self, wanted: set[bytes], timeout_s: float = 30) -> None:
        with self._more:
            assert self._more.wait_for(lambda: wanted <= set(self.bodies), timeout_s), wanted - set(self.bodies)
