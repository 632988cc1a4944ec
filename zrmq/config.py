"""Options of every role: one definition each, read from a TOML file, from the environment and from flags.

An option is a field of a config struct below: its name, type, bounds, default and description are stated there and nowhere
else. From the field `session_timeout_ms` follow the key `session_timeout_ms` of the file, the variable
`ZRMQ_SESSION_TIMEOUT_MS` and the flag `--session-timeout-ms`; a field of a section (`[store]` in the file) has the section's
name in front (`store.segment_bytes`, `ZRMQ_STORE_SEGMENT_BYTES`, `--store-segment-bytes`). Flags win over the environment, the
environment over the file, the file over the defaults.

All roles of a box may share one file: a key that another role has is skipped, one that no role has is refused. Fields that end
in `_ms` or `_bytes` also take text with a unit: `"72h"`, `"64MiB"`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Annotated, Any, Generic, TypeVar, get_origin

import msgspec

from zrmq.errors import ConfigError
from zrmq.logs import LogFormat, LogLevel

NAMESERVER_PORT = 9876
BROKER_PORT = 10911
INGEST_PORT = 10912
DEFAULT_NAMESERVERS = (f"tcp://127.0.0.1:{NAMESERVER_PORT}",)
VARIABLE_PREFIX = "ZRMQ_"

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Name = Annotated[
    str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,120}$", extra={"expected": "a name of up to 120 letters, digits, '-' and '_'"})
]
Section = TypeVar("Section")
Config = TypeVar("Config", bound=msgspec.Struct)

_DURATION_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE_UNITS = {
    "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}
_QUANTITY = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*\Z", re.ASCII)
_HOST_PORT = re.compile(r"(?:tcp://)?(?P<host>[^\s,/:\[\]]+|\[[^\s,/\[\]]+\])(?::(?P<port>[0-9]{1,5}))?\Z")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,240}\Z")  # with the port it fits into what an address may have
LOOPBACK_OF = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # where who listens everywhere is reached


def meta(description: str, **bounds: Any) -> msgspec.Meta:
    """What an option means, for its help; and its bounds (`ge`, `le`, `pattern`, ...)."""
    return msgspec.Meta(description=description, **bounds)


# --- the roles ------------------------------------------------------------------------------------------------------


class RoleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every server process is told. Raises `ConfigError` when made for an address that `insecure` should have allowed."""

    host: Annotated[str, meta("Address to listen at.")] = "127.0.0.1"
    insecure: Annotated[bool, meta("Allow an address other machines can reach, although clients are not authenticated.")] = False
    log_format: Annotated[LogFormat, meta("Look of log lines; auto is pretty on a terminal and json otherwise.")] = "auto"
    log_level: Annotated[LogLevel, meta("Least important log lines to write.")] = "info"

    def __post_init__(self) -> None:
        if not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host!r}, which other machines can reach, and clients are not authenticated; listen at 127.0.0.1, "
                "or set insecure (--insecure, ZRMQ_INSECURE=true) in a network you trust.",
                host=self.host,
            )


class NameServerConfig(RoleConfig, frozen=True, kw_only=True):
    """Options of a NameServer."""

    nameserver_port: Annotated[Port, meta("Port of the NameServer; 0 picks a free one.")] = NAMESERVER_PORT
    suspect_after_ms: Annotated[int, meta("Silence after which producers avoid a broker.", ge=100)] = 3_000
    gone_after_ms: Annotated[int, meta("Silence after which a broker is forgotten.", ge=100)] = 10_000
    start_grace_ms: Annotated[int, meta("Time from the start in which unknown topics are answered 'not yet'.", ge=0)] = 3_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suspect_after_ms > self.gone_after_ms:
            raise ConfigError(
                f"suspect_after_ms is {self.suspect_after_ms}, longer than gone_after_ms with {self.gone_after_ms}: a broker"
                " would be forgotten before it is suspected; make it shorter.",
                suspect_after_ms=self.suspect_after_ms, gone_after_ms=self.gone_after_ms,
            )


class BrokerConfig(RoleConfig, Generic[Section], frozen=True, kw_only=True):
    """Options of a broker. `store` is the store's own section: `BrokerConfig[StoreConfig]`."""

    store: Section
    broker_name: Annotated[Name, meta("Name of the replica set; unique within the cluster.")] = "broker-a"
    cluster: Annotated[Name, meta("Name of the cluster.")] = "DefaultCluster"
    data: Annotated[str, meta("Folder of the broker's data.", min_length=1)] = "./data"
    broker_port: Annotated[Port, meta("Port for requests; 0 picks a free one.")] = BROKER_PORT
    ingest_port: Annotated[Port, meta("Port for one-way sends; 0 picks a free one.")] = INGEST_PORT
    nameservers: Annotated[tuple[str, ...], meta("NameServers to register with, separated by commas.")] = DEFAULT_NAMESERVERS
    advertise_host: Annotated[str, meta("Host as clients reach it; empty: the one listened at.")] = ""
    auto_create_topics: Annotated[bool, meta("Create topics on first use.")] = True
    default_queue_count: Annotated[int, meta("Queues of a topic created on first use.", ge=1, le=1024)] = 4
    session_timeout_ms: Annotated[int, meta("Silence that ends a client's session.", ge=500, le=600_000)] = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host in LOOPBACK_OF and not self.advertise_host:
            raise ConfigError(
                f"host is {self.host!r}, which no client can connect to; set advertise_host (--advertise-host) to this "
                "machine's name or address as clients see it.",
                host=self.host,
            )
        if self.advertise_host and not is_host(self.advertise_host):
            raise ConfigError(
                f"advertise_host is {self.advertise_host[:80]!r}, which no client can connect to; give this machine's name or"
                " address as clients see it, without a scheme and a port.",
                host=self.advertise_host,
            )
        if "\0" in self.data:
            raise ConfigError(f"data is {self.data!r}, and no folder's name may have a NUL in it; give another one.")
        if self.broker_port == self.ingest_port != 0:
            raise ConfigError(
                f"broker_port and ingest_port are both {self.broker_port}; give each a port of its own.", port=self.broker_port
            )
        msgspec.structs.force_setattr(self, "nameservers", parse_nameservers(self.nameservers))


ROLE_CONFIGS: tuple[Any, ...] = (NameServerConfig, BrokerConfig)


# --- what follows from a field --------------------------------------------------------------------------------------


class Option(msgspec.Struct, frozen=True):
    """One option, as the file, the environment, the flags and the documentation name it."""

    path: tuple[str, ...]
    annotation: Any
    default: Any  # msgspec.NODEFAULT: the option has to be given
    description: str

    @property
    def key(self) -> str:
        """As the file has it, sections before dots."""
        return ".".join(self.path)

    @property
    def name(self) -> str:
        """As a Python parameter."""
        return "_".join(self.path)

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def unit(self) -> str:
        """`ms`, `bytes` or nothing."""
        last = self.path[-1].removesuffix("_max").removesuffix("_min").rpartition("_")[2]
        return last if last in ("ms", "bytes") else ""

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        said = next((item.extra["expected"] for item in _metadata(self.annotation) if item.extra), None)
        if said is not None:
            return str(said)
        if self.unit == "ms":
            return "a duration such as '10s', or a number of milliseconds" + _bounds(_inner(self.annotation))
        if self.unit == "bytes":
            return "a size such as '64MiB', or a number of bytes" + _bounds(_inner(self.annotation))
        return describe(self.annotation)


def describe(annotation: Any) -> str:
    """What a value of a type has to be, in words; None, where it may be that, left out."""
    return _describe(_inner(annotation))


def options(kind: Any) -> tuple[Option, ...]:
    """All options of a config struct, those of its sections included, in the order of the fields."""
    return tuple(_walk(kind, ()))


def _walk(kind: Any, path: tuple[str, ...]) -> Iterator[Option]:
    for field in msgspec.structs.fields(kind):
        here = (*path, field.name)
        if _is_section(field.type):
            yield from _walk(field.type, here)
        else:
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            yield Option(here, field.type, default, _description(field.type))


def _is_section(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _description(annotation: Any) -> str:
    return next((item.description for item in _metadata(annotation) if item.description), "")


def _metadata(annotation: Any) -> list[msgspec.Meta]:
    return [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, msgspec.Meta)]


def _inner(annotation: Any) -> Any:
    """What msgspec knows of a type, without its metadata and without `| None`."""
    info = msgspec.inspect.type_info(annotation)
    if isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    if isinstance(info, msgspec.inspect.UnionType):
        kinds = [kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType)]
        info = kinds[0] if len(kinds) == 1 else info
    return info


def _describe(info: Any) -> str:
    match info:
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return "a whole number" + _bounds(info)
        case msgspec.inspect.FloatType():
            return "a number" + _bounds(info)
        case msgspec.inspect.StrType():
            return "text, not empty" if info.min_length else "text"
        case msgspec.inspect.LiteralType():
            return "one of " + ", ".join(repr(value) for value in info.values)
        case msgspec.inspect.EnumType():
            return "one of " + ", ".join(repr(member.value) for member in info.cls)
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
            return f"a list, each {_describe(info.item_type)}"
        case _:
            return "another kind of value"


def _bounds(info: Any) -> str:
    least, most = getattr(info, "ge", None), getattr(info, "le", None)
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f", {least} or more"
    return f", at most {most}" if most is not None else ""


# --- reading --------------------------------------------------------------------------------------------------------


def load(
    kind: type[Config],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """A role's config from all sources. `flags` go by `Option.name`; a None among them was not given; an empty variable neither.

    Raises `ConfigError` that names the file, variable or flag, the option, and what it may be.
    """
    known = {option.key: option for option in options(kind)}
    given: dict[str, Any] = {key: option.default for key, option in known.items() if option.default is not msgspec.NODEFAULT}
    given.update(_from_file(known, file) if file is not None else {})
    given.update(_from_environment(known, environ or {}))
    given.update(_from_flags(known, flags or {}))
    for option in known.values():
        if option.key not in given:
            raise ConfigError(f"{option.key} is missing; give {option.flag} or {option.variable}.", key=option.key)
    config: Config = _build(kind, given, ())
    return config


def take(kind: type[Config], config: Config | None, flags: Mapping[str, Any]) -> Config:
    """A role's config as a program gives it: whole, or by its options.

    Raises `ConfigError` for options that cannot be, for a config of another kind, and for both at once.
    """
    if config is None:
        return load(kind, flags=flags)
    expected = get_origin(kind) or kind
    if not isinstance(config, expected):
        raise ConfigError(f"config is {config!r}; give a {expected.__name__}, or options by name.")
    if given := sorted(name for name, value in flags.items() if value is not None):
        raise ConfigError(f"{given[0]} is given beside a whole config; set it in the config, or give options only.")
    return config


def _build(kind: Any, given: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    values = {}
    for field in msgspec.structs.fields(kind):
        here = (*path, field.name)
        values[field.name] = _build(field.type, given, here) if _is_section(field.type) else given[".".join(here)]
    return (get_origin(kind) or kind)(**values)


def _from_file(known: Mapping[str, Option], file: Path) -> dict[str, Any]:
    elsewhere = {option.key for role in ROLE_CONFIGS for option in options(role)}
    sections = {".".join(option.path[:end]) for option in known.values() for end in range(1, len(option.path))}
    given = {}
    for key, value in _leaves(_read(file), "", sections):
        if key in known:
            given[key] = _convert(known[key], value, f"{file}: {key}", from_text=False)
        elif key in sections:
            raise ConfigError(f"{file}: {key} is {value!r}; it has to be a section, [{key}].", file=str(file), key=key)
        elif key not in elsewhere:
            instead = suggestion(key, [*known, *elsewhere, *sections])
            raise ConfigError(f"{file}: {key} is no option; {instead}", file=str(file), key=key)
    return given


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; check the path.", file=str(file)) from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number of more digits than Python reads
        raise ConfigError(f"{file} is not TOML: {error}; correct it there.", file=str(file)) from error


def _leaves(table: Mapping[str, Any], prefix: str, sections: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if key in sections and isinstance(value, dict):
            yield from _leaves(value, key + ".", sections)
        else:
            yield key, value


def _from_environment(known: Mapping[str, Option], environ: Mapping[str, str]) -> dict[str, Any]:
    given = {
        option.key: _convert(option, environ[option.variable], option.variable, from_text=True)
        for option in known.values()
        if environ.get(option.variable)
    }
    elsewhere = {option.variable for role in ROLE_CONFIGS for option in options(role)}
    variables = {option.variable for option in known.values()} | elsewhere
    for variable in sorted(environ):
        if not variable.startswith(VARIABLE_PREFIX) or variable in variables:
            continue
        # Only what looks like a slip of the finger is refused: other programs have variables with our prefix too.
        close = get_close_matches(variable, variables, n=1, cutoff=0.9)
        if close:
            raise ConfigError(f"The variable {variable} is no option; did you mean {close[0]}?", variable=variable)
    return given


def _from_flags(known: Mapping[str, Option], flags: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {option.name: option for option in known.values()}
    given = {}
    for name, value in flags.items():
        if name not in by_name:
            raise ConfigError(f"{name} is no option; {suggestion(name, by_name)}", key=name)
        if value is not None:
            option = by_name[name]
            plain = str(value) if isinstance(value, PurePath) else value
            given[option.key] = _convert(option, plain, option.flag, from_text=True)
    return given


def suggestion(key: str, known: Iterable[str]) -> str:
    """The rest of a sentence that refuses an unknown name: the known one that is like it, or all of them."""
    names = sorted(set(known))
    close = get_close_matches(key, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}."


def _convert(option: Option, value: Any, source: str, *, from_text: bool) -> Any:
    try:
        plain = _from_text(option, value) if isinstance(value, str) else value
        return msgspec.convert(plain, option.annotation, strict=not from_text)
    except (ValueError, ConfigError) as error:
        raise ConfigError(
            f"{source} is {value!r}; it has to be {option.expected}.", source=source, key=option.key, value=value
        ) from error


def _from_text(option: Option, text: str) -> Any:
    if option.unit:
        return parse_duration(text) if option.unit == "ms" else parse_size(text)
    if isinstance(_inner(option.annotation), msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


# --- values ---------------------------------------------------------------------------------------------------------


def parse_duration(text: str) -> int:
    """Milliseconds of `500ms`, `10s`, `1.5m`, `72h`, `7d`; of a bare number, itself. Raises `ConfigError`."""
    return _quantity(text, _DURATION_UNITS, "ms", "a duration such as '500ms', '10s', '5m', '72h' or '7d'")


def parse_size(text: str) -> int:
    """Bytes of `64MiB`, `1.5GB`, `4096B`; of a bare number, itself. Raises `ConfigError`."""
    return _quantity(text, _SIZE_UNITS, "B", "a size such as '4096', '64MiB' or '10GB'")


def _quantity(text: str, units: Mapping[str, int], default_unit: str, expected: str) -> int:
    match = _QUANTITY.match(text)
    factor = units.get(match[2] or default_unit) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not {expected}.", value=text)
    amount = Fraction(match[1]) * factor
    if amount.denominator != 1:
        raise ConfigError(f"{text!r} is not a whole number of {default_unit}; give {expected}.", value=text)
    return int(amount)


def parse_nameservers(addresses: str | Iterable[str]) -> tuple[str, ...]:
    """Addresses as ZeroMQ wants them: `box` and `box:9876` become `tcp://box:9876`; text is split at commas.

    Raises `ConfigError` when there is none, or for one that cannot be an address.
    """
    if not isinstance(addresses, str | Iterable) or isinstance(addresses, bytes):
        raise ConfigError(f"{addresses!r} names no NameServer; name one as tcp://HOST:PORT.")
    parts = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{parts!r} are no NameServers; name each as tcp://HOST:PORT.")
    found = dict.fromkeys(_address(part.strip()) for part in parts if part.strip())
    if not found:
        raise ConfigError("No NameServer is given; name one as tcp://HOST:PORT.")
    return tuple(found)


def _address(text: str) -> str:
    if text.startswith(("ipc://", "inproc://")):
        return text
    match = _HOST_PORT.match(text)
    if match is None or not 0 < int(match["port"] or NAMESERVER_PORT) < 65536:
        raise ConfigError(f"{text!r} cannot be a NameServer's address; write tcp://HOST:PORT.", address=text)
    return f"tcp://{match['host']}:{match['port'] or NAMESERVER_PORT}"


def find_nameservers(argument: str | Iterable[str] | None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """What a client connects to: its argument, else `ZRMQ_NAMESERVERS`, else the NameServer of this machine."""
    if argument is not None:
        return parse_nameservers(argument)
    variable = (os.environ if environ is None else environ).get(VARIABLE_PREFIX + "NAMESERVERS")
    return parse_nameservers(variable) if variable else DEFAULT_NAMESERVERS


def is_host(text: str) -> bool:
    """Whether it can be the name or address of one machine: IPv6 with its brackets or without, no wildcard."""
    if text in LOOPBACK_OF:
        return False
    if _HOST.match(text):
        return True
    try:
        return ipaddress.ip_address(text[1:-1] if text[:1] + text[-1:] == "[]" else text).version == 6
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def tcp_address(host: str, port: int) -> str:
    """The ZeroMQ address of a host and port; IPv6 hosts get their brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"
