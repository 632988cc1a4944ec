"""Brokers and NameServers that cannot start say why in one sentence, and touch nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zrmq.cli.children import Child, start_broker, start_nameserver

NOWHERE = "tcp://127.0.0.1:1"  # a NameServer nobody needs in these tests
FREE_PORTS = ("--broker-port", "0", "--ingest-port", "0", "--nameservers", NOWHERE)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[Child, str]]:
    """A broker that runs in the folder `taken`, and its address."""
    child, address = start_broker("broker-a", tmp_path / "broker.log", NOWHERE, tmp_path / "taken")
    with child:
        yield child, address


def refusal(*arguments: str) -> str:
    """What a role that ends at once says, without the address of its code."""
    done = subprocess.run([sys.executable, "-m", "zrmq", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return sentence


def test_a_folder_has_one_broker(broker: tuple[Child, str], tmp_path: Path) -> None:
    sentence = refusal("broker", "--data", str(tmp_path / "taken"), *FREE_PORTS)
    assert "FOLDER_LOCKED" in sentence
    assert str(broker[0].pid) in sentence, "it says who has it"


def test_a_folder_is_free_again_after_a_kill(broker: tuple[Child, str], tmp_path: Path) -> None:
    broker[0].kill()
    again, _ = start_broker("broker-a", tmp_path / "again.log", NOWHERE, tmp_path / "taken")
    assert again.stop() == 0


def test_another_broker_s_folder_is_left_alone(broker: tuple[Child, str], tmp_path: Path) -> None:
    broker[0].stop()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "taken").rglob("*.log"))
    sentence = refusal("broker", "--broker-name", "broker-b", "--data", str(tmp_path / "taken"), *FREE_PORTS)
    assert "'broker-a'" in sentence
    assert "'broker-b'" in sentence
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "taken").rglob("*.log")) == before


@pytest.mark.parametrize("option", ["--broker-port", "--ingest-port"])
def test_a_port_has_one_broker(broker: tuple[Child, str], tmp_path: Path, option: str) -> None:
    port = broker[1].rpartition(":")[2]
    sentence = refusal("broker", "--data", str(tmp_path / "other"), *FREE_PORTS, option, port)
    assert "ADDRESS_IN_USE" in sentence
    assert port in sentence


def test_a_port_has_one_nameserver(tmp_path: Path) -> None:
    child, address = start_nameserver("nameserver", tmp_path / "nameserver.log")
    with child:
        assert "ADDRESS_IN_USE" in refusal("nameserver", "--nameserver-port", address.rpartition(":")[2])


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for data in ("file", "file/below"):
        assert "FOLDER_UNUSABLE" in refusal("broker", "--data", str(tmp_path / data), *FREE_PORTS)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shell has seen to that: a file in its place is refused by its whole name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    for arguments in (("broker", *FREE_PORTS), ("up", "--nameserver-port", "0", *FREE_PORTS[:4])):
        assert str(tmp_path / "file") in refusal(*arguments, "--data=~/file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_has_to_be_writable(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "FOLDER_UNUSABLE" in refusal("broker", "--data", str(locked), *FREE_PORTS)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system where nobody may write")
def test_a_file_system_has_to_take_files() -> None:
    assert "FOLDER_UNUSABLE" in refusal("broker", "--data", "/proc/zrmq", *FREE_PORTS)
