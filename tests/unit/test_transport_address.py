"""zrmq/transport/address.py: what is an address, and the sentence for what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq.errors import InvalidArgumentError
from zrmq.transport.address import ADDRESS_CHARS_MAX, IPC_PATH_BYTES_MAX, Address, parse_address, parse_connect_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:9876", Address("tcp", "127.0.0.1", 9876)),
        ("tcp://broker-1.example.org:1", Address("tcp", "broker-1.example.org", 1)),
        ("tcp://[::1]:65535", Address("tcp", "[::1]", 65535)),
        ("tcp://[fe80::1%eth0]:9876", Address("tcp", "[fe80::1%eth0]", 9876)),
        ("tcp://127.0.0.1:0", Address("tcp", "127.0.0.1", 0)),
        ("tcp://*:9876", Address("tcp", "*", 9876)),
        ("ipc:///run/zrmq/broker", Address("ipc", "/run/zrmq/broker")),
        ("ipc://data/broker.sock", Address("ipc", "data/broker.sock")),
        ("inproc://x", Address("inproc", "x")),
    ],
)
def test_addresses_are_taken_apart_and_put_together(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "tcp", "tcp://", "tcp://:1", "tcp://host", "tcp://host:", "tcp://host:port", "tcp://host:65536", "tcp://host:-1",
        "tcp://host:1;tcp://other:2", "tcp://src:0;host:1", "tcp://::1:9876", "tcp://[::1:9876", "tcp://host:1/path",
        "tcp://a b:1",
        "tcp://host:1\n", "tcp://host\0:1", "TCP://host:1", "http://host:1", "pgm://host:1", "ipc://", "ipc://@name", "ipc://*",
        "ipc:///folder/", "inproc://", "inproc", "127.0.0.1:9876", "inproc://" + "x" * ADDRESS_CHARS_MAX, "tcp://host:٣",
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="write|correct|tcp address") as caught:
        parse_address(text)
    assert caught.value.facts["address"] == text


def test_an_ipc_path_has_a_length_that_libzmq_does_not_cut_short() -> None:
    path = "/" + "x" * (IPC_PATH_BYTES_MAX - 1)
    assert parse_address(f"ipc://{path}").place == path
    with pytest.raises(InvalidArgumentError, match="shorter folder") as caught:
        parse_address(f"ipc://{path}y")
    assert caught.value.facts["size_bytes"] == IPC_PATH_BYTES_MAX + 1
    with pytest.raises(InvalidArgumentError, match="shorter folder"):
        parse_address("ipc:///" + "ü" * 60)


@pytest.mark.parametrize("text", ["tcp://host:0", "tcp://*:1"])
def test_some_addresses_are_for_servers_only(text: str) -> None:
    parse_address(text)
    with pytest.raises(InvalidArgumentError, match="Nobody can connect"):
        parse_connect_address(text)


@pytest.mark.parametrize("text", ["tcp://host:1", "ipc:///x", "inproc://x"])
def test_the_others_are_for_both(text: str) -> None:
    assert parse_connect_address(text) == parse_address(text)


@given(st.text() | st.text("tcpi:/[]0123456789*.@;% ").map("tcp://".__add__))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except InvalidArgumentError:
        return
    assert str(address) == text or address.scheme == "tcp"
    assert parse_address(str(address)) == address
