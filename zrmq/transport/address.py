"""Addresses: `tcp://host:port`, `ipc://path`, `inproc://name`. Pure; the checks that need the machine are in `options.py`."""

from __future__ import annotations

import re

import msgspec

from zrmq.errors import InvalidArgumentError

ADDRESS_CHARS_MAX = 256
IPC_PATH_BYTES_MAX = 99  # of the 107 a socket's path may have; libzmq cuts longer ones short without a word

_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:.%a-z]+\]|[^\s:\[\]/;]+):([0-9]{1,5})\Z")
_CONTROL = re.compile(r"[\x00-\x20\x7f]")


class Address(msgspec.Struct, frozen=True):
    """The parts of an address. `place` is the host (IPv6 with its brackets), the path or the name; `port` is 0 but for tcp."""

    scheme: str
    place: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}:{self.port}" if self.scheme == "tcp" else f"{self.scheme}://{self.place}"


def parse_address(text: str) -> Address:
    """Raises `InvalidArgumentError` for what nobody can listen on or connect to."""
    if len(text) > ADDRESS_CHARS_MAX or _CONTROL.search(text):
        raise InvalidArgumentError(
            f"{text[:40]!r} has a blank or control character or more than {ADDRESS_CHARS_MAX} characters; correct it.",
            address=text,
        )
    scheme, _, place = text.partition("://")
    if scheme == "tcp":
        return _parse_tcp(text)
    if scheme == "ipc":
        _check_ipc_path(text, place)
    elif scheme != "inproc" or not place:
        raise InvalidArgumentError(
            f"{text!r} is no address; write tcp://host:port, ipc:///path/of/socket or inproc://name.", address=text
        )
    return Address(scheme, place)


def parse_connect_address(text: str) -> Address:
    """The same for an address to connect to: port 0 and `*` are for servers."""
    address = parse_address(text)
    if address.scheme == "tcp" and (address.port == 0 or address.place == "*"):
        raise InvalidArgumentError(f"Nobody can connect to {text}; give the server's host and port.", address=text)
    return address


def _parse_tcp(text: str) -> Address:
    match = _TCP.match(text)
    if match is None or int(match[2]) > 65_535:
        raise InvalidArgumentError(
            f"{text!r} is no tcp address; write tcp://host:port, with a port from 0 to 65535 and IPv6 hosts in brackets.",
            address=text,
        )
    return Address("tcp", match[1], int(match[2]))


def _check_ipc_path(text: str, path: str) -> None:
    if not path or path[0] in "@*" or path.endswith("/"):
        raise InvalidArgumentError(f"{text!r} names no file; write ipc:///path/of/socket.", address=text)
    size = len(path.encode(errors="surrogateescape"))
    if size > IPC_PATH_BYTES_MAX:
        raise InvalidArgumentError(
            f"The socket's path {path} has {size} bytes; use a shorter folder, {IPC_PATH_BYTES_MAX} bytes is the limit.",
            address=text, size_bytes=size, limit_bytes=IPC_PATH_BYTES_MAX,
        )
