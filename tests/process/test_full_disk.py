"""A broker whose disk fills: it refuses, damages nothing, serves what it has, and takes messages again by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import zrmq
from tests.process import small_disk
from tests.process.small_disk import SmallDisk
from zrmq.cli.children import Child, await_brokers, start_broker, start_nameserver
from zrmq.errors import DiskFullError

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
TOPIC = "meters"
BODY = bytes(10_000)
SMALL = ("--store-segment-bytes", "8MiB", "--store-free-delete-bytes", "0", "--store-spare-segments-max", "1")


class Desk:
    """A NameServer and a broker with its data in `data`, and what was acknowledged."""

    def __init__(self, folder: Path, data: Path, *options: str) -> None:
        self._logs, self._data, self._options = folder / "logs", data, options
        self.nameserver, self.address = start_nameserver("nameserver", self._logs / "nameserver.log")
        self.broker, address = self._start(0)
        self._port = int(address.rpartition(":")[2])
        await_brokers(self.address, 1)
        self.fabric = zrmq.connect(self.address)
        self.producer = self.fabric.producer(send_timeout_ms=30_000, retries=0)
        self.acknowledged: list[str] = []

    def _start(self, port: int) -> tuple[Child, str]:
        return start_broker("broker-a", self._logs / "broker.log", self.address, self._data, *SMALL, *self._options, port=port)

    def kill_and_restart(self) -> None:
        """As a power cut would, if it left the page cache."""
        self.broker.kill()
        self.broker, _ = self._start(self._port)

    def send(self) -> bool:
        """One message; whether there was room for it."""
        try:
            self.acknowledged.append(self.producer.send(TOPIC, BODY).message_id)
        except DiskFullError:
            return False
        return True

    def send_until(self, has_room: bool) -> None:
        """Send until that is so. The broker looks at its disk once a second, or is told so by a failed write."""
        while self.send() is not has_room:
            pass  # the test's own time bound ends what never happens

    def read(self) -> list[str]:
        """The ids of everything in the log."""
        left = sum(queue.max_offset for info in self.fabric.admin().topic(TOPIC).values() for queue in info.queues)
        reader = self.fabric.pull_consumer(None, TOPIC, consume_from=zrmq.ConsumeFrom.EARLIEST)
        ids: list[str] = []
        while len(ids) < left:
            ids += [message.message_id for message in reader.poll(timeout_ms=10_000)]
        return ids

    def close(self) -> None:
        self.fabric.close()
        self.broker.kill()
        self.nameserver.kill()


@contextmanager
def running(folder: Path, data: Path, *options: str) -> Iterator[Desk]:
    """A desk that is closed in the end."""
    desk = Desk(folder, data, *options)
    try:
        yield desk
    finally:
        desk.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if why := small_disk.why_not():
        pytest.skip(why)
    try:
        disk = SmallDisk(tmp_path / "disk", 96 * MIB)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    with disk:
        yield disk


@pytest.mark.parametrize("leave_bytes", [0, 10 * MIB])
def test_a_disk_that_others_filled(disk: SmallDisk, tmp_path: Path, leave_bytes: int) -> None:
    with running(tmp_path, disk.folder / "data", "--store-free-refuse-bytes", "16MiB") as desk:
        assert desk.send()
        disk.fill(leave_bytes)
        desk.send_until(has_room=False)
        assert sorted(desk.read()) == sorted(desk.acknowledged), "it serves what it has"
        desk.kill_and_restart()
        desk.send_until(has_room=False)
        assert sorted(desk.read()) == sorted(desk.acknowledged), "and nothing is damaged"
        disk.free()
        desk.send_until(has_room=True)
        desk.kill_and_restart()
        assert desk.send()
        assert sorted(desk.read()) == sorted(desk.acknowledged)
        assert desk.broker.stop() == 0
        assert "Traceback" not in desk.broker.log_file.read_text()


def test_a_disk_that_the_broker_itself_filled(disk: SmallDisk, tmp_path: Path) -> None:
    with running(tmp_path, disk.folder / "data", "--store-free-refuse-bytes", "16MiB") as desk:
        disk.fill(48 * MIB)
        desk.send_until(has_room=False)
        assert len(desk.acknowledged) > 8 * MIB // len(BODY), "there was room for more than a segment"
        desk.kill_and_restart()
        assert sorted(desk.read()) == sorted(desk.acknowledged)
        disk.free()
        desk.send_until(has_room=True)
        assert sorted(desk.read()) == sorted(desk.acknowledged)
        assert desk.broker.stop() == 0


def test_room_that_has_to_stay_free(tmp_path: Path) -> None:
    """The same without a disk of its own: so much has to stay free that a ballast file makes the difference."""
    ballast, size_bytes = tmp_path / "ballast", 512 * MIB
    if shutil.disk_usage(tmp_path).free < 2 * size_bytes:
        pytest.skip("needs 1 GiB of free space")
    try:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        refuse_bytes = shutil.disk_usage(tmp_path).free + size_bytes // 2  # what others write or delete meanwhile is less
        with running(tmp_path, tmp_path / "data", "--store-free-refuse-bytes", str(refuse_bytes)) as desk:
            desk.send_until(has_room=False)
            ballast.unlink()
            desk.send_until(has_room=True)
            assert sorted(desk.read()) == sorted(desk.acknowledged)
    finally:
        ballast.unlink(missing_ok=True)
