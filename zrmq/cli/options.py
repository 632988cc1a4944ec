"""Options that several commands share, each defined once; those of the roles come from `zrmq.config`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, TypeVar

import click
import msgspec

from zrmq.cli.failures import Invocation
from zrmq.config import Option, options, parse_duration
from zrmq.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

WAIT_MS_MAX = 3_600_000  # as a producer's


def parse_time(text: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time (of this machine's zone, unless it names one) or of a number of them.

    Raises `ConfigError`.
    """
    if text.isascii() and text.isdecimal():
        return int(text)
    try:
        time_ms = round(datetime.fromisoformat(text).astimezone().timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{text!r} is no time; write 2026-11-23T08:30, with +01:00 or Z behind it for another zone.") from error
    if time_ms < 0:
        raise ConfigError(f"{text!r} is no time that a message can have; write one from 1970 on.")
    return time_ms


def parse_timeout(text: str) -> int:
    """Milliseconds to wait for an answer. Raises `ConfigError`."""
    timeout_ms = parse_duration(text)
    if not 1 <= timeout_ms <= WAIT_MS_MAX:
        raise ConfigError(f"{text!r} cannot be waited; give a time from 1ms to {WAIT_MS_MAX // 60_000}min.")
    return timeout_ms


def read_by(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The type of an option that `parse` reads: what it refuses (`ConfigError`) is wrong usage, told with the option's name."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ConfigError as error:
            raise click.BadParameter(error.message) from error

    return read


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _note_json(ctx: click.Context, parameter: click.Parameter, as_json: bool) -> bool:
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.as_json = as_json
    return as_json


def json_option(command: F) -> F:
    """`--json`: the output, and the error if there is one, as JSON."""
    return click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=_note_json, help="Print JSON, one object a line."
    )(command)


def client_options(command: F) -> F:
    """`--nameservers`, `--timeout` (as `timeout_ms`) and `--json`, for commands that are clients of a cluster."""
    timeout = click.option(
        "--timeout", "timeout_ms", type=read_by(parse_timeout), metavar="TIME", default="5s", show_default=True,
        help="How long to wait for an answer; a number alone is milliseconds.",
    )
    nameservers = click.option(
        "--nameservers", metavar="ADDRESS[,ADDRESS]", help="NameServers to ask.  [default: ZRMQ_NAMESERVERS, else this machine's]"
    )
    return json_option(nameservers(timeout(command)))


def role_options(*kinds: Any, without: Collection[str] = ()) -> Callable[[F], F]:
    """All options of the config structs `kinds`, but those named in `without`; `--config` and `--json`.

    The command gets them as keyword arguments by `Option.name`, as text, None where they were not given.
    """
    known = {option.name: option for kind in kinds for option in options(kind) if option.name not in without}

    def decorate(command: F) -> F:
        for option in reversed(known.values()):
            command = _role_option(option)(command)
        config = click.option("--config", type=click.Path(exists=True, dir_okay=False), help="TOML file with these options.")
        return json_option(config(command))

    return decorate


def _role_option(option: Option) -> Callable[[F], F]:
    text = f"{option.description}  [default: {_spell(option.default)}]"
    if isinstance(option.default, bool):
        flags = f"{option.flag}/--no-{option.flag[2:]}" if option.default else option.flag
        return click.option(flags, option.name, is_flag=True, default=None, help=text)
    return click.option(option.flag, option.name, metavar=option.unit.upper() or "VALUE", help=text)


def _spell(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "none" if default is None or default is msgspec.NODEFAULT else str(default)
