"""Brokers as processes with what they cost, and clients that send ready-made batches, so that little but the broker is measured.

A client here is one DEALER that speaks the protocol and nothing else: no thread, no routes, no memory of its own. Several
requests are in flight, as a producer has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from zrmq.cli.children import Child
from zrmq.clock import SystemClock
from zrmq.errors import ZrmqError
from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import (
    AcquireLease,
    CommitOffsets,
    Failed,
    Hello,
    JoinGroup,
    Pull,
    Pulled,
    PullStatus,
    PutTopic,
    QueueOffset,
    Request,
    Send,
    Subscription,
    decode_reply,
    encode,
)
from zrmq.transport.options import Context, open_socket

WINDOW = 16  # requests in flight
WINDOW_BYTES = 8 << 20  # of batches in flight; a broker lets pulls wait whose client has twice as much to read
ANSWER_TIMEOUT_MS = 120_000
START_TIMEOUT_S = 200.0  # of a broker that reads all of a long log
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BROKER_OPTIONS = ("--session-timeout-ms", "600000", "--log-level", "warning")  # clients here are silent while others are measured

Asked = tuple[type[Request], tuple[Any, ...], tuple[bytes, ...]]  # a request without its number: kind, fields, payload


# --- what a process costs -----------------------------------------------------------------------------------------------


def cpu_us(pid: int) -> float:
    """CPU time of a process so far, all threads that still are, in microseconds; to the nanosecond where the kernel tells."""
    total_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((thread / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) * 1e6 / TICKS_PER_S
    return total_ns / 1000.0


def memory_mib(pid: int) -> dict[str, float]:
    """What a process holds: all that is resident, and of it what is its own and no file's."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("rss_mib", "VmRSS"), ("anonymous_mib", "RssAnon"))}


# --- a client -----------------------------------------------------------------------------------------------------------


class Client:
    """One connection with a session. One thread. What the broker refuses is raised as `ZrmqError`."""

    def __init__(self, context: Context, address: str, client_id: str, role: str = "producer", group: str = "") -> None:
        self.socket = open_socket(context, zmq.DEALER)
        self.socket.set(zmq.IMMEDIATE, 0)
        self.socket.set(zmq.RCVTIMEO, ANSWER_TIMEOUT_MS)
        self.socket.connect(address)
        self._number = 0
        epoch = SystemClock().time_ms()
        self.ask(Hello, 1, client_id, epoch, role, group)

    def post(self, kind: type[Request], *fields: Any, payload: Iterable[bytes] = ()) -> int:
        """Send a request; its number."""
        self._number += 1
        self.socket.send_multipart([encode(kind(self._number, ANSWER_TIMEOUT_MS, *fields)), *payload], copy=False)
        return self._number

    def reply(self) -> tuple[Any, list[bytes]]:
        """The next reply and its payload; notices are passed over."""
        while True:
            header, *payload = self.socket.recv_multipart()
            reply = decode_reply(header)
            if isinstance(reply, Failed):
                raise ZrmqError(f"The broker refused a request of the measurement: {reply.message}")
            if reply.number:
                return reply, payload

    def ask(self, kind: type[Request], *fields: Any, payload: Iterable[bytes] = ()) -> Any:
        """Send a request and wait for its reply."""
        self.post(kind, *fields, payload=payload)
        return self.reply()[0]

    def exchange(self, requests: Iterable[Asked], window: int = WINDOW) -> list[Any]:
        """Send all, so many of them ahead of their replies. The replies in their order."""
        replies = []
        in_flight = 0
        for kind, fields, payload in requests:
            if in_flight == window:
                replies.append(self.reply()[0])
                in_flight -= 1
            self.post(kind, *fields, payload=payload)
            in_flight += 1
        replies += [self.reply()[0] for _ in range(in_flight)]
        return replies

    def close(self) -> None:
        """Close the connection; its session stays until it times out."""
        self.socket.close(0)


# --- a broker with topics, and what is done to it -----------------------------------------------------------------------


class Queue(msgspec.Struct):
    """One queue as who fills and reads it knows it."""

    topic: str
    queue_id: int
    sequence: int = 1  # of the next message sent to it
    offset: int = 0  # where to read on


class Load:
    """One broker, the batches that are sent to it and the pulls that read them."""

    def __init__(self, context: Context, nameservers: str, folder: Path, name: str, records: int, body_bytes: int) -> None:
        self._context = context
        self.data = folder / name
        self._name, self._log = name, folder / "logs" / f"{name}.log"
        self._arguments = [
            "broker", "--broker-name", name, "--broker-port", "0", "--ingest-port", "0", "--data", str(self.data),
            "--nameservers", nameservers, *BROKER_OPTIONS,
        ]
        self.records = records
        self._columns = Columns([bytes(body_bytes)] * records)
        self.batch_bytes = len(self.batch(Queue("", 0)))
        self._window = max(min(WINDOW, WINDOW_BYTES // self.batch_bytes), 1)
        self.queues: list[Queue] = []
        self.last_queues: list[Queue] = []
        self._turn = 0
        self._members: list[Client] = []
        self.start()

    def start(self) -> None:
        """Start the broker and connect to it."""
        self.broker = Child(self._name, "zrmq", self._arguments, self._log)
        try:
            self.address = self.broker.wait_address(START_TIMEOUT_S)
            self.client = self.connect("load")
        except BaseException:
            self.broker.kill()
            raise

    def kill(self) -> None:
        """End the broker as a power cut would."""
        self.client.close()
        self.broker.kill()

    def close(self) -> None:
        """End everything."""
        for member in self._members:
            member.close()
        self.kill()

    def connect(self, client_id: str, role: str = "producer", group: str = "") -> Client:
        """One more client."""
        return Client(self._context, self.address, client_id, role, group)

    def add_queues(self, count: int, per_topic: int, flush: FlushMode = FlushMode.SYNC) -> None:
        """Make topics of so many queues until there are so many queues together."""
        while len(self.queues) < count:
            topic, queue_count = f"load-{len(self.queues)}", min(per_topic, count - len(self.queues))
            self.client.ask(PutTopic, TopicConfig(topic, queue_count, flush_mode=flush))
            self.queues += [Queue(topic, queue_id) for queue_id in range(queue_count)]

    def batch(self, queue: Queue) -> bytes:
        """The next batch for a queue."""
        first, queue.sequence = queue.sequence, queue.sequence + self.records
        return encode_batch(self._columns, producer_id=7, first_sequence=first, first_born_ms=1, last_born_ms=1)

    def next_queues(self, count: int) -> list[Queue]:
        """Whose turn it is, round about."""
        first, self._turn = self._turn, self._turn + count
        self.last_queues = [self.queues[index % len(self.queues)] for index in range(first, first + count)]
        return self.last_queues

    def produce(self, queues: Iterable[Queue]) -> int:
        """One batch to each of these, each acknowledged. How many."""
        requests = ((Send, (queue.topic, queue.queue_id), (self.batch(queue),)) for queue in queues)
        return len(self.client.exchange(requests, self._window))

    def pull(self, queues: Iterable[Queue], batches: int = 1) -> int:
        """So many batches from each of these, each queue from where it was read to. How many batches."""
        bytes_max = 1 if batches == 1 else batches * self.batch_bytes
        asked = list(queues)
        requests = []
        for queue in asked:
            requests.append((Pull, (queue.topic, queue.queue_id, queue.offset, bytes_max, 0), ()))
            queue.offset += batches * self.records
        for reply in self.client.exchange(requests, self._window):
            check_found(reply)
        return len(asked) * batches

    def pull_at(self, queue: Queue, offsets: Iterable[int]) -> int:
        """The batch at each of these offsets, which nobody expects."""
        requests = ((Pull, (queue.topic, queue.queue_id, offset, 1, 0), ()) for offset in offsets)
        replies = self.client.exchange(requests, self._window)
        for reply in replies:
            check_found(reply)
        return len(replies)

    # --- consumers ----------------------------------------------------------------------------------------------------

    def add_readers(self, count: int) -> None:
        """Clients that each wait for what comes next in a queue of their own."""
        for queue in self.queues[:count]:
            reader = self.connect(f"reader-{queue.topic}-{queue.queue_id}", "consumer", "readers")
            self._members.append(reader)
            self._await_next(reader, queue)

    def deliver(self, count: int) -> int:
        """So many batches, one after the other, each sent, acknowledged and brought to the reader that waits for it."""
        for number, queue in enumerate(self.next_queues(count), self._turn - count):
            self.client.ask(Send, queue.topic, queue.queue_id, payload=(self.batch(queue),))
            reader = self._members[number % len(self.queues)]
            reply, _ = reader.reply()
            check_found(reply)
            queue.offset = reply.next_offset
            self._await_next(reader, queue)
        return count

    @staticmethod
    def _await_next(reader: Client, queue: Queue) -> None:
        reader.post(Pull, queue.topic, queue.queue_id, queue.offset, 1 << 20, 60_000)

    def add_groups(self, count: int) -> None:
        """Clustering groups of one member each, which holds the lease of the first queue; they read at places apart."""
        queue = self.queues[0]
        self._leases: list[int] = []
        for number in range(count):
            member = self.connect(f"member-{number}", "consumer", f"group-{number}")
            self._members.append(member)
            member.ask(JoinGroup, MessageModel.CLUSTERING, [Subscription(queue.topic)], ConsumeFrom.EARLIEST)
            self._leases.append(member.ask(AcquireLease, queue.topic, queue.queue_id).lease_epoch)
        ahead = queue.sequence // self.records
        self._offsets = [index * ahead // count * self.records for index in range(count)]

    def pull_by_groups(self, count: int) -> int:
        """So many pulls of one batch, each in the name of the next group."""
        queue = self.queues[0]
        for index in self._next_members(count):
            pull = (queue.topic, queue.queue_id, self._offsets[index], 1, 0, 0, f"group-{index}", self._leases[index])
            reply = self._members[index].ask(Pull, *pull)
            check_found(reply)
            self._offsets[index] = reply.next_offset if reply.next_offset < reply.max_offset else 0
        return count

    def commit_by_groups(self, count: int) -> int:
        """So many commits, each of the next group."""
        queue = self.queues[0]
        for index in self._next_members(count):
            offset = QueueOffset(queue.topic, queue.queue_id, self._offsets[index], self._leases[index])
            self._members[index].ask(CommitOffsets, [offset])
        return count

    def _next_members(self, count: int) -> list[int]:
        first, self._turn = self._turn, self._turn + count
        return [index % len(self._members) for index in range(first, first + count)]


def check_found(reply: Pulled) -> None:
    """Raise unless a pull found something: what is fast because it finds nothing must not look fast."""
    if reply.status is not PullStatus.FOUND:
        raise ZrmqError(f"A pull of the measurement came to {reply!r}.")
