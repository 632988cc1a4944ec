"""Servers that the benchmark starts, on free ports and a folder each, and what they cost: memory, disk, time to be ready."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.contestants import Level
from zrmq.cli.children import Child, await_brokers, start_broker, start_nameserver
from zrmq.clock import SystemClock

READY_TIMEOUT_S = 120.0
POLL_S = 0.002

MODULES = {  # of a server, by its name in `Contestant.server`
    "redis": "redis_streams", "nats": "nats_jetstream", "rabbitmq": "rabbitmq_queues", "mosquitto": "mosquitto_qos1",
    "beanstalkd": "beanstalkd_tubes",
}


class Server:
    """A running server: its processes, its address, its data. `kill` it when done, or use it in `with`."""

    def __init__(self, children: Sequence[Child], address: str, data: Path) -> None:
        self.children = children
        self.address = address
        self.data = data

    def stop(self) -> None:
        """Ask the processes to end, the last started first; one that does not is killed."""
        for child in reversed(self.children):
            child.stop()

    def kill(self) -> None:
        """End them as a power cut would."""
        for child in reversed(self.children):
            child.kill()

    def memory_bytes(self) -> int:
        """Resident memory of all its processes, mapped files included."""
        return sum(_resident_bytes(pid) for child in self.children for pid in family(child.pid))

    def disk_bytes(self) -> int:
        """Blocks that its files occupy; what is sparse or not there yet does not count."""
        return sum(file.stat().st_blocks * 512 for file in self.data.rglob("*") if file.is_file())


def family(pid: int) -> list[int]:
    """A process and all its descendants that run now."""
    found = [pid]
    for parent in found:
        with suppress(FileNotFoundError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def _resident_bytes(pid: int) -> int:
    with suppress(FileNotFoundError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str, *folders: str) -> str | None:
    """Where a program is, also in folders that are not on the path of every user."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(["/usr/sbin", *folders]))


def missing_of(*modules: str, **programs: str | None) -> str | None:
    """What is not installed, for a person; None when everything is."""
    absent = [f"the program {name}" for name, path in programs.items() if path is None]
    absent += [f"the Python module {name}" for name in modules if find_spec(name) is None]
    return ", ".join(absent) or None


def run_program(name: str, arguments: Sequence[str], folder: Path) -> Child:
    """A program as a child that ends with the benchmark; what it prints goes into its log."""
    return Child(name, "benchmarks.execute", arguments, folder / f"{name}.log", on_line=lambda child, line: None)


def await_answer(child: Child, port: int, question: bytes, answer: bytes) -> None:
    """Return when the server answers so. Raises `RuntimeError` when it ends before, or takes too long."""
    clock, pause = SystemClock(), threading.Event()
    deadline_ms = clock.monotonic_ms() + READY_TIMEOUT_S * 1000
    while not _answers(port, question, answer):
        if child.exit_code is not None or clock.monotonic_ms() > deadline_ms:
            raise RuntimeError(f"{child.name} does not answer on port {port}. {child.log_tail()}")
        pause.wait(POLL_S)


def _answers(port: int, question: bytes, answer: bytes) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
        connection.sendall(question)
        return not answer or connection.recv(4096).startswith(answer)
    return False


def start_zrmq(folder: Path, level: Level) -> Server:
    """A NameServer and a broker; a topic says what its acknowledgements mean. The address is the NameServer's."""
    nameserver, address = start_nameserver("nameserver", folder / "nameserver.log")
    children = [nameserver]
    try:
        children.append(start_broker("bench", folder / "broker.log", address, folder / "data")[0])
        await_brokers(address, 1)
    except BaseException:
        Server(children, address, folder / "data").kill()
        raise
    return Server(children, address, folder / "data")


def start_zrmq_up(folder: Path, level: Level) -> Server:
    """Both in one process, as on a small box: `zrmq up`. The address is the NameServer's."""
    data = folder / "data"
    ports = ["--nameserver-port", "0", "--broker-port", "0", "--ingest-port", "0"]
    child = Child("zrmq", "zrmq", ["up", "--broker-name", "bench", "--data", str(data), *ports], folder / "up.log")
    try:
        address = child.wait_address()
        await_brokers(address, 1)
    except BaseException:
        child.kill()
        raise
    return Server([child], address, data)


Start = Callable[[Path, Level], Server]


def start_of(server: str) -> tuple[Start, str | None]:
    """How a server is started in a folder, ready at return; and what it lacks on this machine."""
    if server == "zrmq":
        return start_zrmq, None
    module = import_module(f"benchmarks.peers.{MODULES[server]}")
    return module.start, module.missing()


def start_whole(server: str) -> Start:
    """How a server is started that is looked at as a whole: with nothing apart that can be in its process."""
    return start_zrmq_up if server == "zrmq" else start_of(server)[0]
