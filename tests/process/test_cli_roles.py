"""The command line as real processes: roles start, tell where they are, survive a kill, and end in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.real_cluster import await_brokers
from zrmq.cli.children import Child, start_broker, start_nameserver

UP = ("up", "--nameserver-port", "0", "--broker-port", "0", "--ingest-port", "0")


def zrmq(*arguments: str, nameservers: str = "", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run one command to its end."""
    environment = {**os.environ, "ZRMQ_NAMESERVERS": nameservers}
    return subprocess.run([sys.executable, "-m", "zrmq", *arguments], input=stdin, capture_output=True, env=environment)


def rows(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def box(tmp_path: Path, folder: Path) -> Iterator[Child]:
    """A running `zrmq up`."""
    with start_up(tmp_path, folder) as child:
        yield child


def start_up(tmp_path: Path, folder: Path) -> Child:
    return Child("up", "zrmq", [*UP, "--data", str(folder)], tmp_path / "up.log")


def test_up_serves_until_it_is_told_to_end(box: Child, folder: Path) -> None:
    nameserver = box.wait_address()
    broker = box.wait_address()
    assert box.wait_line(re.compile(rb"data: (.+)\n"))[1].decode() == str(folder)
    [row] = rows(zrmq("cluster", "--json", nameservers=nameserver))
    assert row["address"] == broker
    [receipt] = rows(zrmq("send", "meters", "21.5", "--tag", "kitchen", "--json", nameservers=nameserver))
    assert receipt["durability"] == "sync"
    assert box.stop() == 0
    assert zrmq("cluster", "--timeout", "1s", nameservers=nameserver).returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_end_it_in_order(box: Child, number: signal.Signals) -> None:
    box.wait_line(re.compile(rb"data: "))
    box.signal(number)
    assert box.wait() == 0
    assert "broker_stopped" in box.log_file.read_text()


def test_what_was_stored_survives_a_kill(tmp_path: Path, folder: Path) -> None:
    with start_up(tmp_path, folder) as first:
        nameserver = first.wait_address()
        first.wait_address()
        done = zrmq("send", "meters", "-", nameservers=nameserver, stdin=b"".join(b"line %d\n" % n for n in range(1_000)))
        assert (done.returncode, done.stdout) == (0, b"stored 1000 messages in meters\n")
        first.kill()
    with start_up(tmp_path, folder) as second:
        nameserver = second.wait_address()
        second.wait_address()
        [row] = rows(zrmq("topic", "list", "--json", nameservers=nameserver))
        assert (row["topic"], row["messages"]) == ("meters", 1_000)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_up_registers_whatever_it_advertises(tmp_path: Path, folder: Path, host: str) -> None:
    """Its machine need not reach itself by the address that others reach it by."""
    options = ("--host", host, "--insecure", "--advertise-host", "nowhere.invalid")
    with Child("up", "zrmq", [*UP, *options, "--data", str(folder)], tmp_path / "up.log") as box:
        port = box.wait_address().rpartition(":")[2]
        await_brokers(f"127.0.0.1:{port}", 1)
        [row] = rows(zrmq("cluster", "--json", nameservers=f"127.0.0.1:{port}"))
        assert row["address"].startswith("tcp://nowhere.invalid:")


def test_ready_is_told_as_json_too(tmp_path: Path, folder: Path) -> None:
    with Child("up", "zrmq", [*UP, "--data", str(folder), "--json"], tmp_path / "up.log") as box:
        line = box.wait_line(re.compile(rb"^\{.*\}$", re.MULTILINE))[0]
    facts = json.loads(line)
    assert facts.keys() == {"nameserver", "broker", "data"}


def test_roles_apart(tmp_path: Path) -> None:
    nameserver, address = start_nameserver("nameserver", tmp_path / "nameserver.log")
    with nameserver:
        first, _ = start_broker("broker-a", tmp_path / "a.log", address, tmp_path / "a")
        with first:
            second, _ = start_broker("broker-b", tmp_path / "b.log", address, tmp_path / "b")
            with second:
                await_brokers(address, 2)
                names = {row["broker_name"] for row in rows(zrmq("cluster", "--json", nameservers=address))}
                assert names == {"broker-a", "broker-b"}
                [made] = rows(zrmq("topic", "create", "meters", "--queues", "1", "--json", nameservers=address))
                assert made["topic"] == "meters"
                assert second.stop() == first.stop() == nameserver.stop() == 0


# --- what cannot be -----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(box: Child, tmp_path: Path) -> None:
    port = box.wait_address().rpartition(":")[2]
    done = zrmq("nameserver", "--nameserver-port", port, "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["error"]["name"] == "ADDRESS_IN_USE"


def test_a_folder_that_is_taken(box: Child, folder: Path) -> None:
    box.wait_line(re.compile(rb"data: "))
    done = zrmq(*UP, "--data", str(folder), "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["error"]["name"] == "FOLDER_LOCKED"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = zrmq(*UP, "--data", str(tmp_path / "file"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["error"]["name"] == "FOLDER_UNUSABLE"


def test_a_wrong_option_touches_nothing(folder: Path) -> None:
    done = zrmq(*UP, "--data", str(folder), "--session-timeout-ms", "soon")
    assert done.returncode == 2
    assert not folder.exists()
