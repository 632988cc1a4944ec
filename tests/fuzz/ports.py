"""Live ports: a NameServer and a broker as processes under bent messages and raw bytes, while a producer and a consumer go on.

Hostile are clients that have opened a session and say what `talk.py` makes up, one that has not, a PUSH at the port for one-way
sends, and plain TCP connections. All they do is bent from what is valid, so topics are made and deleted, groups joined and
brokers registered, under names that the well-behaved two do not use. Those must see no error, and every message acknowledged
to the one must reach the other once; no process may end, log a fault of its own, or grow beyond `RSS_BYTES_MAX`.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import zmq

import zrmq
from tests.fuzz.cores import HEADERS, make_frames
from tests.fuzz.talk import NOBODY, Talk
from tests.process.cluster import Counting
from tests.unit.test_transport_server import raw_greetings
from zrmq.cli.children import Child, start_broker, start_nameserver
from zrmq.clock import SystemClock
from zrmq.errors import Code
from zrmq.protocol.limits import MESSAGE_BYTES_MAX
from zrmq.protocol.requests import Failed, Heartbeat, RegisterBroker, decode_reply, encode

RSS_BYTES_MAX = 256 << 20  # of either process; they begin with some 45 MiB, and a client may leave up to 16 MiB unread
TIMEOUT_MS = 60_000
RAW_EVERY = 150  # inputs per TCP connection
HUGE_EVERY = 25_000  # inputs per frame of more than a server takes
TOPIC, GROUP = "readings", "readers"
LAST_NUMBER = (1 << 63) - 1
FAULTS = re.compile(rb"Traceback|request_failed|one_way_send_failed|callback_failed|\"level\": ?\"critical\"")

TALK_SHARE = 0.9  # of what clients with a session send; the rest is bent from any samples
DOOR = frozenset({Code.NO_SESSION.name})  # what is answered to whoever has no session

HOSTILE_HEADERS = [*HEADERS, *[encode(RegisterBroker(4, 3_000, NOBODY, version, [])) for version in (8, 9)]]
HOSTILE_HEADERS = [header for header in HOSTILE_HEADERS if b":10911" not in header]


class Cluster:
    """The two processes, and the two clients that behave."""

    def __init__(self, folder: Path) -> None:
        self.nameserver, self.nameserver_address = start_nameserver("nameserver", folder / "nameserver.log")
        self.children: list[Child] = [self.nameserver]
        try:
            self.broker, self.broker_address = start_broker(
                "broker-w", folder / "broker.log", self.nameserver_address, folder / "data"
            )
            self.children.append(self.broker)
            self.fabric = zrmq.connect(self.nameserver_address)
        except BaseException:
            self.kill()
            raise

    def start_clients(self) -> None:
        self.fabric.admin().create_topic(TOPIC, queue_count=2)
        self.got = Counting()
        self.consumer = self.fabric.push_consumer(GROUP, consume_from=zrmq.ConsumeFrom.EARLIEST)
        self.consumer.subscribe(TOPIC, "*", self.got)
        self.consumer.start()
        self.sent: list[bytes] = []
        self.errors: list[BaseException] = []
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._produce)
        self._thread.start()

    def _produce(self) -> None:
        try:
            with self.fabric.producer() as producer:
                while not self._is_done.is_set():
                    body = b"reading %d" % len(self.sent)
                    producer.send(TOPIC, body)
                    self.sent.append(body)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test has to know
            self.errors.append(error)

    def finish(self) -> None:
        """Stop sending, and wait until everything that was acknowledged is read."""
        self._is_done.set()
        self._thread.join()
        if not self.errors:
            self.got.wait_for(set(self.sent))

    def ingest_address(self) -> str:
        return next(broker.ingest_address for broker in self.fabric.admin().cluster() if broker.broker_name == "broker-w")

    def kill(self) -> None:
        with suppress(AttributeError):
            self._is_done.set()
            self._thread.join()
        with suppress(AttributeError):
            self.fabric.close()
        for child in self.children:
            child.kill()


class Hostile:
    """One connection that sends what is bent."""

    def __init__(self, context: zmq.Context[Any], kind: int, address: str, name: str, rng: Random) -> None:
        self.name = name
        self.answers: Counter[str] = Counter()
        self._is_push = kind == zmq.PUSH
        self._rng = rng
        role = "broker" if name.startswith("n") else "consumer"
        has_session = not (self._is_push or name == "stranger")
        self._talk = Talk(rng, name, role, SystemClock().time_ms()) if has_session else None
        self._socket = context.socket(kind)
        self._socket.set(zmq.SNDTIMEO, TIMEOUT_MS)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, frames: list[bytes] | None = None) -> None:
        """These, or what it makes up."""
        if frames is None:
            is_talk = self._talk is not None and self._rng.random() < TALK_SHARE
            frames = self._talk.next() if is_talk and self._talk is not None else make_frames(self._rng, HOSTILE_HEADERS)
        self._socket.send_multipart(frames)
        while not self._is_push and self._socket.poll(0):
            self._take(self._socket.recv_multipart())

    def finish(self) -> None:
        """Everything sent was taken: what is asked last is answered last."""
        if self._is_push:
            return
        self._socket.send(encode(Heartbeat(LAST_NUMBER, 0)))
        while True:
            if not self._socket.poll(TIMEOUT_MS):
                raise TimeoutError(f"{self.name} got no answer to its last question")
            if self._take(self._socket.recv_multipart()) == LAST_NUMBER:
                return

    def close(self) -> None:
        self._socket.close(0)

    def _take(self, frames: list[bytes]) -> int:
        reply = decode_reply(frames[0])
        said = Code(reply.code).name if isinstance(reply, Failed) else type(reply).__name__
        self.answers[said] += 1
        if self._talk is not None:
            self._talk.learn(reply)
        return reply.number


def _targets(context: zmq.Context[Any], cluster: Cluster, rng: Random) -> list[Hostile]:
    found = [Hostile(context, zmq.DEALER, cluster.broker_address, name, rng) for name in ("c-1", "c-2", "c-3", "c-4", "stranger")]
    found += [Hostile(context, zmq.DEALER, cluster.nameserver_address, name, rng) for name in ("n-1", "n-2", "stranger")]
    return [*found, Hostile(context, zmq.PUSH, cluster.ingest_address(), "push", rng)]


def attack(cluster: Cluster, rng: Random, count: int) -> dict[str, int]:
    """So many inputs at all ports; how often each answer came."""
    context: zmq.Context[Any] = zmq.Context()
    ports = [int(at.rpartition(":")[2]) for at in (cluster.broker_address, cluster.nameserver_address, cluster.ingest_address())]
    greetings = raw_greetings(rng)
    clients = _targets(context, cluster, rng)
    try:
        for number in range(count):
            if number % RAW_EVERY == 0:
                _send_raw(rng.choice(ports), greetings)
            elif number % HUGE_EVERY == 1:
                rng.choice(clients).send([bytes(MESSAGE_BYTES_MAX + 1)])
            else:
                rng.choice(clients).send()
        answers: Counter[str] = Counter()
        for client in clients:
            client.finish()
            answers += client.answers
        return dict(answers)
    finally:
        for client in clients:
            client.close()
        context.term()


def _send_raw(port: int, greetings: Iterator[bytes]) -> None:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(next(greetings))


def run_ports(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Attack a new cluster with `count` inputs; what was done, and `faults`: everything that should not have been."""
    clock = SystemClock()
    began_ms = clock.monotonic_ms()
    cluster = Cluster(folder)
    try:
        cluster.start_clients()
        answers = attack(cluster, Random(f"{seed} ports"), count)
        cluster.finish()
        peaks = {child.name: _rss_peak_bytes(child) for child in cluster.children}
        faults = [f"{name} took {peak} bytes" for name, peak in peaks.items() if peak > RSS_BYTES_MAX]
        faults += [f"{child.name} ended with {child.exit_code}" for child in cluster.children if child.exit_code is not None]
        faults += [f"a log says: {line}" for child in cluster.children for line in _faults_in(child.log_file)]
        faults += [f"the producer saw {error!r}" for error in cluster.errors]
        extra = Counter(cluster.got.bodies) - Counter(cluster.sent)
        faults += [f"{extra.total()} messages too many were read"] if extra else []
        faults += ["a server failed"] if answers.get(Code.INTERNAL_ERROR.name) else []
        cluster.consumer.close()
    finally:
        cluster.kill()
    return {
        "inputs": count, "elapsed_ms": round(clock.monotonic_ms() - began_ms), "rss_peak_bytes": peaks, "answers": answers,
        "refused_at_the_door": sum(answers.get(name, 0) for name in DOOR),
        "answered_otherwise": sum(number for name, number in answers.items() if name not in DOOR),
        "messages": len(cluster.sent), "faults": faults,
    }


def _rss_peak_bytes(child: Child) -> int:
    status = Path(f"/proc/{child.pid}/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


def _faults_in(log_file: Path) -> list[str]:
    return [line.decode(errors="replace")[:300] for line in log_file.read_bytes().splitlines() if FAULTS.search(line)]
