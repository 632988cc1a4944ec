"""The processes that use a peer: each plays one part as those of `zrmq.cli.bench_players` do, through a session.

`spec.part` is `module:class:part`; gate, specs and reports are those of `zrmq bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec

from benchmarks.session import Session, session_of
from zrmq.cli.bench_players import Gate, Spec
from zrmq.clock import SystemClock


def produce(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """Send as fast as it goes until everything is acknowledged."""
    return _produce(session, spec, gate, tagged=False)


def produce_tagged(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """The same with a tag, a key and a property on each message."""
    return _produce(session, spec, gate, tagged=True)


def _produce(session: Session, spec: Spec, gate: Gate, *, tagged: bool) -> dict[str, object]:
    clock = SystemClock()
    session.publish(spec.warm_messages, tagged=tagged)
    gate.wait()
    began_ms = clock.monotonic_ms()
    session.publish(spec.messages, tagged=tagged)
    return {"began_ms": began_ms, "ended_ms": clock.monotonic_ms()}


def send(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """Send one at a time, each timed."""
    session.send_timed(spec.warm_messages)
    gate.wait()
    return {"took_ms": session.send_timed(spec.messages)}


def send_paced(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """Send at a pace, for `receive_stamped`."""
    session.send_paced(spec.warm_messages, spec.per_second)
    gate.wait()
    session.send_paced(spec.messages, spec.per_second)
    return {}


def consume(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """Read and acknowledge: the warm ones before the start, the others timed."""
    ahead = session.read(spec.warm_messages) - spec.warm_messages
    gate.wait()
    return _timed(session, spec.messages - ahead)


def consume_backlog(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """The same, but the start comes before the warm messages, so that nothing is read ahead of the clock."""
    gate.wait()
    ahead = session.read(spec.warm_messages) - spec.warm_messages
    return _timed(session, spec.messages - ahead)


def _timed(session: Session, messages: int) -> dict[str, object]:
    clock = SystemClock()
    began_ms = clock.monotonic_ms()
    session.read(messages)
    return {"began_ms": began_ms, "ended_ms": clock.monotonic_ms(), "messages": messages}


def receive_stamped(session: Session, spec: Spec, gate: Gate) -> dict[str, object]:
    """How old each message of `send_paced` was on arrival."""
    session.receive_timed(spec.warm_messages)
    gate.wait()
    return {"took_ms": session.receive_timed(spec.messages)}


PARTS: dict[str, Callable[[Session, Spec, Gate], dict[str, object]]] = {
    part.__name__: part for part in (produce, produce_tagged, send, send_paced, consume, consume_backlog, receive_stamped)
}


def play(argument: str) -> None:
    """Play the part that the argument, a `Spec` as JSON, names."""
    spec = msgspec.json.decode(argument, type=Spec)
    name, _, part = spec.part.rpartition(":")
    session, gate = session_of(name, spec), Gate()
    gate.tell(result=PARTS[part](session, spec, gate))
    session.close()


if __name__ == "__main__":
    play(sys.argv[1])
