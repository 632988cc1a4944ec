"""One object for a whole program: a cluster that runs somewhere, or one inside this process, and clients of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from zrmq.config import BrokerConfig, NameServerConfig, find_nameservers, load
from zrmq.errors import ClosedError, ConfigError, InvalidArgumentError
from zrmq.transport.options import check_fork, fork_count

if TYPE_CHECKING:
    import zmq

    from zrmq.client.admin import Admin
    from zrmq.consumer import Listener, PullConsumer, PushConsumer
    from zrmq.producer import Producer
    from zrmq.transport.host import Host

LISTENING = {"host", "broker_port", "ingest_port", "advertise_host", "insecure"}  # options of who opens ports

Client = TypeVar("Client", "Producer", "PushConsumer", "PullConsumer", "Admin")


class Fabric:
    """Makes producers and consumers that know where to go. Closing it closes those it made, then, if it is embedded, the broker.

    Any thread may use it. Made by `embedded` and `connect`. In a forked child an embedded one makes nothing: `ForkedClientError`.
    """

    def __init__(self, nameservers: Sequence[str], *, context: zmq.Context[Any] | None = None, host: Host | None = None) -> None:
        self.nameservers = tuple(nameservers)
        self._context = context
        self._host = host
        self._forks = fork_count()
        self._clients: dict[Any, None] = {}  # in the order made
        self._closed = False

    def producer(self, group: str = "DEFAULT_PRODUCER", **options: Any) -> Producer:
        """A `Producer` of this fabric; options as there."""
        from zrmq.producer import Producer

        return self._made(Producer(group, **self._where(), **options))

    def push_consumer(self, group: str, **options: Any) -> PushConsumer:
        """A `PushConsumer` of this fabric; options as there. Subscribe, then start or run it."""
        from zrmq.consumer import PushConsumer

        return self._made(PushConsumer(group, **self._where(), **options))

    def pull_consumer(self, group: str | None = None, *topics: str, **options: Any) -> PullConsumer:
        """A `PullConsumer` of this fabric, subscribed to `topics`; options as there."""
        from zrmq.consumer import PullConsumer

        consumer = self._made(PullConsumer(group, **self._where(), **options))
        for topic in topics:
            consumer.subscribe(topic)
        return consumer

    def consume(self, group: str, topic: str, listener: Listener, expression: str = "*", **options: Any) -> PushConsumer:
        """A started `PushConsumer` that calls `listener` for each message of `topic`."""
        consumer = self.push_consumer(group, **options)
        consumer.subscribe(topic, expression)(listener)  # so that None is a listener that cannot be called
        consumer.start()
        return consumer

    def admin(self) -> Admin:
        """Topics, groups and brokers, for programs that look after them."""
        from zrmq.client.admin import Admin

        return self._made(Admin(**self._where()))

    def close(self) -> None:
        """Close what was made here, newest first, and the embedded broker last, also when an exception (Ctrl-C, say) ends a step.

        Closing twice does nothing, or goes on where an exception ended the first time. Raises `InvalidArgumentError`, and closes
        nothing, in a callback of `send_async`, which runs on a thread that has to be ended.
        """
        for client in list(self._clients):
            if client._thread is not None and client._thread.is_current():
                raise InvalidArgumentError("close() waits, and a callback must not; call it in another thread.")
        self._closed = True
        with ExitStack() as steps:
            if self._host is not None:
                steps.callback(self._host.stop)
            for client in list(self._clients):
                steps.callback(client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _where(self) -> dict[str, Any]:
        self._check_open()
        if self._context is not None:  # without it the fabric is some addresses, which are good in a child too
            check_fork(self._forks)
        return {"nameservers": self.nameservers, "context": self._context}

    def _made(self, client: Client) -> Client:
        for each in list(self._clients):
            is_closed = each._is_closed if each._thread is None else each._thread.has_ended
            if is_closed:  # we need not close it
                self._clients.pop(each, None)
        self._clients[client] = None  # before looking: where another thread closes us, one of us sees what the other did
        if self._closed:
            client.close()
            self._check_open()
        return client

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The fabric was closed; make a new one with zrmq.embedded() or zrmq.connect().")


def connect(nameservers: str | Sequence[str] | None = None) -> Fabric:
    """A fabric over a running cluster. `nameservers` as everywhere: the argument, else `ZRMQ_NAMESERVERS`, else this machine's.

    Connects when the first producer or consumer does. Raises `ConfigError` for addresses that cannot be any.
    """
    return Fabric(find_nameservers(nameservers))


def embedded(data: str | Path = "./data", **options: Any) -> Fabric:
    """A NameServer and a broker inside this process, its messages in the folder `data`, which is made if it is missing.

    `options` are those of a broker (`default_queue_count=1`, `session_timeout_ms=3000`, ...; see `zrmq broker --help`). No port
    is opened: clients of this fabric reach it in memory. One process at a time owns a folder.

    Raises `FolderLockedError`, `FolderUnusableError`, `DiskFullError`, `ConfigError`, `ResourceLimitError`.
    """
    from zrmq.broker import BrokerRole
    from zrmq.nameserver import NameServerRole
    from zrmq.store.config import StoreConfig
    from zrmq.transport.host import Host

    if "nameservers" in options:
        raise ConfigError("An embedded broker has a NameServer of its own; leave nameservers out, or start a Broker.")
    if data is None:
        raise ConfigError("data is None; give the folder of the messages, or leave it out for ./data.")
    for unused in sorted(options.keys() & LISTENING):
        raise ConfigError(f"An embedded broker opens no port; leave {unused} out, or start a Broker.", key=unused)
    name = f"{random.SystemRandom().getrandbits(64):016x}"
    nameserver = f"inproc://zrmq-{name}-nameserver"
    flags: Mapping[str, Any] = {"data": data, "nameservers": nameserver, **options}
    config = load(BrokerConfig[StoreConfig], flags=flags)
    host = Host(
        NameServerRole(NameServerConfig(start_grace_ms=0), address=nameserver),
        BrokerRole(config, address=f"inproc://zrmq-{name}-broker", ingest_address=f"inproc://zrmq-{name}-ingest"),
        name="zrmq-embedded",
    )
    host.start()
    return Fabric([nameserver], context=host.reactor.context, host=host)
