"""The bare limits `zrmq bench` compares with: the same bytes through two ZeroMQ sockets and nothing else.

The only place besides zrmq.transport that opens sockets: a limit that went through our own transport would limit nothing.
"""

from __future__ import annotations

import zmq

from zrmq.cli.bench_players import Gate, Spec, pace
from zrmq.clock import SystemClock
from zrmq.message import FlushMode
from zrmq.protocol.batch import Columns, encode_batch
from zrmq.protocol.requests import Send, Sent, encode

BATCH_RECORDS = 1_000  # as many as a producer puts into a batch at most
WARM_BATCHES = 200
WARM_TRIPS = 200
WAIT_MS = 60_000  # for the other side; it ends with an error beyond


def batch_of(records: int, body_bytes: int) -> bytes:
    """One batch as a producer would send it."""
    columns = Columns([bytes(body_bytes)] * records)
    return encode_batch(columns, producer_id=1, first_sequence=1, first_born_ms=1, last_born_ms=1)


def push(spec: Spec, gate: Gate) -> dict[str, object]:
    """Send the batches of `spec.messages` messages, one way, as fast as they go."""
    clock, batch = SystemClock(), batch_of(BATCH_RECORDS, spec.body_bytes)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(spec.address)
        for _ in range(WARM_BATCHES):
            socket.send(batch, copy=False)
        gate.wait()
        began_ms = clock.monotonic_ms()
        for _ in range(batch_count(spec.messages)):
            socket.send(batch, copy=False)
        return {"began_ms": began_ms}


def pull(spec: Spec, gate: Gate) -> dict[str, object]:
    """Receive what `push` sends."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        gate.tell(address=f"tcp://127.0.0.1:{port}")
        for _ in range(WARM_BATCHES):
            socket.recv()
        gate.wait()
        for _ in range(batch_count(spec.messages)):
            socket.recv()
        return {"ended_ms": SystemClock().monotonic_ms()}


def batch_count(messages: int) -> int:
    """Batches that hold so many messages, the last one as full as the others."""
    return -(-messages // BATCH_RECORDS)


def ask(spec: Spec, gate: Gate) -> dict[str, object]:
    """Round trips one after the other, `spec.per_second` apart (0: none), each timed in milliseconds."""
    clock, took_ms = SystemClock(), []
    request = [encode(Send(1, 1, spec.topic, 0)), batch_of(1, spec.body_bytes)]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        socket.connect(spec.address)
        for _ in range(WARM_TRIPS):
            socket.send_multipart(request)
            socket.recv_multipart()
        gate.wait()
        for _ in pace(spec.messages, spec.per_second, clock):
            began_ms = clock.monotonic_ms()
            socket.send_multipart(request)
            socket.recv_multipart()
            took_ms.append(clock.monotonic_ms() - began_ms)
    return {"took_ms": took_ms}


def answer(spec: Spec, gate: Gate) -> dict[str, object]:
    """The other side of `ask`: back go the bytes of a broker's receipt; at a pace those of the batch, as to a consumer."""
    receipt = encode(Sent(1, 1, 1, FlushMode.SYNC))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        gate.tell(address=f"tcp://127.0.0.1:{port}")
        gate.ready()
        for _ in range(WARM_TRIPS + spec.messages):
            peer, header, batch = socket.recv_multipart()
            socket.send_multipart([peer, header, batch] if spec.per_second else [peer, receipt])
    return {}
