"""`zrmq up`, `zrmq nameserver`, `zrmq broker`: the server roles, each until SIGINT or SIGTERM; a second one ends it at once.

Everything that can be checked is checked before a port is opened or a folder touched. When a role is ready it prints where it
listens, on stdout; its log goes to stderr.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from zrmq.cli.entry import end_by_ctrl_c
from zrmq.cli.options import examples, role_options
from zrmq.cli.printing import print_json
from zrmq.config import LOOPBACK_OF, BrokerConfig, NameServerConfig, load, options, tcp_address
from zrmq.logs import configure_logging
from zrmq.store.config import StoreConfig

if TYPE_CHECKING:
    from zrmq.transport.interface import Loop

SWITCH_INTERVAL_S = 0.0005  # the reactor shares the process with threads that flush and save: it must not wait 5 ms for its turn
DECIDED_BY_UP = ("nameservers", "start_grace_ms")  # its broker registers in the same moment: there is nothing to wait for
FUTURE_PORTS = ("proxy_port", "console_port")  # roles of `up` that this version does not have

Config = TypeVar("Config", NameServerConfig, BrokerConfig[StoreConfig])


@click.command(epilog=examples("zrmq nameserver", "zrmq nameserver --nameserver-port 0 --json"))
@role_options(NameServerConfig)
def nameserver(config: str | None, as_json: bool, **flags: Any) -> None:
    """Run a NameServer: it tells clients which brokers have which topics."""
    settings = _load(NameServerConfig, config, flags)
    from zrmq.nameserver import NameServer

    server = NameServer(settings)
    server.run(lambda: _print_ready(as_json, NameServer=server.address))


@click.command(epilog=examples(
    "zrmq broker --data /var/lib/zrmq", "zrmq broker --broker-name broker-b --broker-port 10921 --ingest-port 10922 --data ./b"
))
@role_options(BrokerConfig[StoreConfig])
def broker(config: str | None, as_json: bool, **flags: Any) -> None:
    """Run a broker: it stores messages and serves them."""
    settings = _load(BrokerConfig[StoreConfig], config, flags)
    from zrmq.broker import Broker

    server = Broker(config=settings)
    server.run(lambda: _print_ready(as_json, Broker=server.address, data=settings.data))


def future_ports(command: Callable[..., None]) -> Callable[..., None]:
    """Ports that the contract of `zrmq up` names, so that scripts for later versions start this one too."""
    for name in FUTURE_PORTS:
        command = click.option(f"--{name.replace('_', '-')}", name, type=int, hidden=True)(command)
    return command


@click.command(epilog=examples("zrmq up", "zrmq up --data /var/lib/zrmq --nameserver-port 0 --broker-port 0 --ingest-port 0"))
@role_options(NameServerConfig, BrokerConfig[StoreConfig], without=DECIDED_BY_UP)
@future_ports
def up(config: str | None, as_json: bool, **flags: Any) -> None:
    """Run a NameServer and a broker in one process, with everything in one folder."""
    for name in FUTURE_PORTS:
        if flags.pop(name) is not None:
            click.echo(f"Warning: --{name.replace('_', '-')} is not used: this version has no such role.", err=True)
    for_nameserver = _load(NameServerConfig, config, {**_those_of(NameServerConfig, flags), "start_grace_ms": "0"})
    for_broker = _load(BrokerConfig[StoreConfig], config, _those_of(BrokerConfig[StoreConfig], flags))
    from zrmq.transport.host import Host

    box = Box(for_nameserver, for_broker)
    Host(box, name="zrmq-up").run(
        lambda: _print_ready(as_json, NameServer=box.nameserver.address, Broker=box.broker.address, data=for_broker.data)
    )


class Box:
    """A NameServer and the broker that registers there, as one role."""

    def __init__(self, for_nameserver: NameServerConfig, for_broker: BrokerConfig[StoreConfig]) -> None:
        from zrmq.broker import BrokerRole
        from zrmq.nameserver import NameServerRole

        self._for_broker = for_broker
        self._nameserver_host = LOOPBACK_OF.get(for_nameserver.host, for_nameserver.host)
        self._make_broker = BrokerRole
        self.nameserver = NameServerRole(for_nameserver)
        self.broker = BrokerRole(for_broker)

    def open(self, loop: Loop) -> None:
        """The NameServer first: only then its port is known. The broker registers where that one listens: by what is advertised
        others reach this machine, but perhaps not it itself."""
        self.nameserver.open(loop)
        port = int(self.nameserver.address.rpartition(":")[2])
        address = tcp_address(self._nameserver_host, port)
        self.broker = self._make_broker(msgspec.structs.replace(self._for_broker, nameservers=(address,)))
        self.broker.open(loop)

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """The broker first: it unregisters."""
        self.broker.stop(lambda: self.nameserver.stop(on_stopped))

    def abandon(self) -> None:
        """The broker's folder; the NameServer has none."""
        self.broker.abandon()


def _load(kind: type[Config], file: str | None, flags: dict[str, Any]) -> Config:
    """The role's options from file, environment and flags; and the process made ready to be a server."""
    texts = {name: _text(value) for name, value in flags.items()}
    settings = _at_home(load(kind, file=Path(file) if file else None, environ=os.environ, flags=texts))
    configure_logging(settings.log_format, settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    end_by_ctrl_c()  # what it means again when the role has taken the first: a second one is a kill, which costs nothing stored
    _raise_file_limit()
    return settings


def _at_home(settings: Config) -> Config:
    """With a folder's `~` spelled out: shells do so for `--data ~/x`, and not for `--data=~/x`, a variable or a file."""
    if not isinstance(settings, BrokerConfig):
        return settings
    return msgspec.structs.replace(settings, data=os.path.expanduser(settings.data))


def _those_of(kind: Any, flags: dict[str, Any]) -> dict[str, Any]:
    known = {option.name for option in options(kind)}
    return {name: value for name, value in flags.items() if name in known}


def _text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _raise_file_limit() -> None:
    """Each client is an open file, and so is each segment: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _print_ready(as_json: bool, **facts: str) -> None:
    if as_json:
        print_json({name.lower(): value for name, value in facts.items()})
        return
    for name, value in facts.items():
        click.echo(f"{name}: {value}" if name == "data" else f"{name} ready at {value}")
    sys.stdout.flush()
