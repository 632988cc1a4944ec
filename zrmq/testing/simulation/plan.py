"""What a run consists of, all of it drawn from its seed: the cluster, the work, and what goes wrong how often.

A run has some of the faults, at rates of its own, and not all of them always: what is rare in the crowd is common in some runs.
"""

from __future__ import annotations

import math
from random import Random

import msgspec

from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.testing.simulation.work import ReaderPlan, RetentionPlan, WorkPlan, draw_work
from zrmq.transport.memory import START_TIME_MS

FAULTS = {  # kind of fault: the shortest and longest mean time between two of them, in virtual ms
    "broker_power_cut": (3_000, 20_000),
    "broker_torn_write": (3_000, 20_000),
    "broker_kill": (3_000, 20_000),
    "broker_restart": (6_000, 30_000),
    "nameserver_crash": (4_000, 20_000),
    "break_connections": (500, 6_000),
    "cut": (4_000, 20_000),
    "half_open": (5_000, 20_000),
    "pause": (3_000, 15_000),
    "slow_network": (3_000, 15_000),
    "slow_disk": (3_000, 15_000),
    "full_disk": (4_000, 20_000),
    "failing_disk": (6_000, 30_000),
    "producer_crash": (5_000, 20_000),
    "consumer_crash": (2_500, 15_000),
    "consumer_leave": (2_000, 10_000),
    "consumer_join": (2_000, 10_000),
    "clock_step": (2_000, 10_000),
    "late_delivery": (500, 6_000),
}
DISK_FAULTS = {  # drawn apart from the others
    "recovery_power_cut": (2_000, 15_000),
    "lost_views": (2_000, 15_000),
    "bit_rot": (500, 10_000),
    "bad_block": (2_000, 15_000),
    "misdirected_write": (1_000, 12_000),
}
FAULTS |= DISK_FAULTS
DRAWN_APART = frozenset({"misdirected_write", "late_delivery"})  # with their own dice: a run without them stays what it was
OF_CLIENTS = frozenset({"clock_step", "producer_crash", "consumer_crash", "consumer_leave", "consumer_join"})
DAMAGE = frozenset({"bit_rot", "bad_block", "misdirected_write"})  # of what is in no file but the log


class TopicPlan(msgspec.Struct, frozen=True):
    """One topic, the same at all brokers."""

    name: str
    queue_count: int
    flush_mode: FlushMode


class GroupPlan(msgspec.Struct, frozen=True):
    """One consumer group and how its members work."""

    name: str
    topics: tuple[str, ...]
    expression: str
    message_model: MessageModel
    consume_from: ConsumeFrom
    consume_timestamp_ms: int  # 0 unless it begins at a time
    members: int  # at most
    allocation: str
    in_order: bool
    workers: int  # units a member works on at once
    message_ms: float  # a listener's mean time for one message
    failure_share: float  # of messages whose listener raises
    starts_ms: float  # when its first members come


class Plan(msgspec.Struct, frozen=True):
    """Everything a run is determined by. Times in virtual ms."""

    seed: int
    duration_ms: float  # how long there is work and things go wrong
    broker_names: tuple[str, ...]
    nameserver_count: int
    producer_count: int
    topics: tuple[TopicPlan, ...]
    groups: tuple[GroupPlan, ...]
    faults: dict[str, float]  # kind: mean time between two
    send_every_ms: float  # mean, of one producer
    burst_max: int
    body_bytes: tuple[int, int]  # of most messages; equal ones make what a crash left behind fit what is written over it
    linger_ms: float
    batch_records_max: int
    send_timeout_ms: int
    session_timeout_ms: int
    segment_bytes: int
    checkpoint_ms: int
    flush_ms: tuple[float, float]
    has_short_writes: bool
    delay_ms: tuple[float, float]
    work: WorkPlan = WorkPlan()


def draw_plan(seed: int, *, has_work: bool = True, has_disk_faults: bool = True) -> Plan:
    """The plan of a seed; the same for every Python and machine. Not `has_work`: only messages are sent and read. Not
    `has_disk_faults`: none of `DISK_FAULTS`, nor other faults that are drawn apart."""
    plan = _plan(seed)
    if has_disk_faults:
        plan = msgspec.structs.replace(plan, faults=plan.faults | _disk_faults(seed) | _network_faults(seed, plan.faults))
    return with_work(plan, _beside(plan.faults, draw_work(seed))) if has_work else plan


def reader_groups(plan: Plan) -> tuple[GroupPlan, ...]:
    """Each reader that names its queues itself, as a group of its own. One without a group has that name only in the run."""
    return tuple(_reader_group(plan, number, reader) for number, reader in enumerate(plan.work.readers))


def _reader_group(plan: Plan, number: int, reader: ReaderPlan) -> GroupPlan:
    topics = dict.fromkeys(plan.topics[topic % len(plan.topics)].name for topic in reader.topics)
    is_timed = reader.consume_from is ConsumeFrom.TIMESTAMP
    return GroupPlan(
        name=f"reader-{number}", topics=tuple(topics), expression="*", message_model=MessageModel.CLUSTERING,
        consume_from=reader.consume_from, consume_timestamp_ms=START_TIME_MS + reader.consume_after_ms if is_timed else 0,
        members=1, allocation="averagely", in_order=False, workers=1, message_ms=0.0, failure_share=0.0,
        starts_ms=reader.starts_ms,
    )


def _beside(faults: dict[str, float], work: WorkPlan) -> WorkPlan:
    """What of the work goes with these faults. Nothing is deleted where the log is damaged: the checks know what a log must have
    that begins late, and what one must have that was hurt, but not both at once.

    A deleted topic's segments go at once, on a full disk also before what only they and the views say is said again. Losing the
    views too then costs topics, which is told (`state_lost`) and more than the checks excuse."""
    if DAMAGE & faults.keys():
        return msgspec.structs.replace(work, retention=RetentionPlan(), remake_topics_every_ms=0.0)
    if faults.keys() >= {"full_disk", "lost_views"}:
        return msgspec.structs.replace(work, remake_topics_every_ms=0.0)
    return work


def with_work(plan: Plan, work: WorkPlan) -> Plan:
    """The plan with this work, and what that takes."""
    kept = work.retention
    return msgspec.structs.replace(
        plan, work=work, segment_bytes=kept.segment_bytes or plan.segment_bytes,
        checkpoint_ms=kept.checkpoint_ms or plan.checkpoint_ms,
    )


def _plan(seed: int) -> Plan:
    rng = Random(f"plan {seed}")
    topics = tuple(_topic(rng, number) for number in range(rng.randint(1, 3)))
    duration_ms = rng.uniform(4_000.0, 16_000.0)
    producer_count = rng.randint(1, 3)
    messages, burst_max = round(_log_uniform(rng, 60.0, 900.0) / producer_count), rng.choice((1, 3, 10, 30))
    return Plan(
        seed=seed,
        duration_ms=duration_ms,
        broker_names=("broker-a", "broker-b"),
        nameserver_count=2,
        producer_count=producer_count,
        topics=topics,
        groups=_groups(rng, topics),
        faults=_faults(rng),
        send_every_ms=duration_ms * (burst_max + 1) / (2 * messages),
        burst_max=burst_max,
        body_bytes=rng.choice(((32, 32), (24, 64), (24, 64), (24, 1_000))),
        linger_ms=rng.choice((0.0, 0.0, 5.0, 50.0)),
        batch_records_max=rng.choice((1, 4, 16, 1000)),
        send_timeout_ms=rng.choice((1_500, 5_000, 15_000)),
        session_timeout_ms=rng.choice((2_000, 4_000, 10_000)),
        segment_bytes=rng.choice((4_096, 8_192, 65_536)),
        checkpoint_ms=rng.choice((200, 2_000, 30_000)),
        flush_ms=rng.choice(((0.05, 0.3), (0.2, 5.0), (1.0, 40.0))),
        has_short_writes=rng.random() < 0.2,
        delay_ms=rng.choice(((0.05, 0.3), (0.05, 0.3), (0.2, 10.0))),
    )


def _log_uniform(rng: Random, least: float, most: float) -> float:
    return least * math.exp(math.log(most / least) * rng.random())


def _topic(rng: Random, number: int) -> TopicPlan:
    flush_mode = FlushMode.ASYNC if rng.random() < 0.15 else FlushMode.SYNC
    return TopicPlan(f"topic-{number}", rng.randint(1, 4), flush_mode)


def _groups(rng: Random, topics: tuple[TopicPlan, ...]) -> tuple[GroupPlan, ...]:
    models = [MessageModel.CLUSTERING] * rng.randint(1, 2)
    if rng.random() < 0.5:
        models.append(MessageModel.BROADCASTING)
    return tuple(_group(rng, f"group-{number}", topics, model) for number, model in enumerate(models))


def _group(rng: Random, name: str, topics: tuple[TopicPlan, ...], model: MessageModel) -> GroupPlan:
    chosen = rng.sample(topics, rng.randint(1, len(topics)))
    expression = "*" if rng.random() < 0.75 else "a || b"
    consume_from, consume_timestamp_ms = _beginning(rng.random())
    return GroupPlan(
        name=name,
        topics=tuple(topic.name for topic in chosen),
        expression=expression,
        message_model=model,
        consume_from=consume_from,
        consume_timestamp_ms=consume_timestamp_ms,
        members=rng.randint(1, 4) if model is MessageModel.CLUSTERING else rng.randint(1, 2),
        allocation=rng.choice(("averagely", "by circle", "consistent hash")),
        in_order=rng.random() < 0.3,
        workers=rng.randint(1, 3),
        message_ms=rng.choice((0.0, 0.5, 5.0, 30.0)),
        failure_share=rng.choice((0.0, 0.0, 0.02)),
        starts_ms=rng.choice((0.0, 0.0, rng.uniform(0.0, 3_000.0))),
    )


def _beginning(drawn: float) -> tuple[ConsumeFrom, int]:
    if drawn < 0.4:
        return ConsumeFrom.EARLIEST, 0
    if drawn < 0.5:
        return ConsumeFrom.TIMESTAMP, START_TIME_MS + round((drawn - 0.4) * 50_000)  # some time in the first 5 s
    return ConsumeFrom.LATEST, 0


def _faults(rng: Random) -> dict[str, float]:
    share = rng.choice((0.0, 0.15, 0.3, 0.5, 0.8))
    kinds = FAULTS.keys() - DISK_FAULTS.keys() - DRAWN_APART
    return {kind: _log_uniform(rng, *bounds) for kind, bounds in FAULTS.items() if kind in kinds and rng.random() < share}


def _disk_faults(seed: int) -> dict[str, float]:
    """Most runs have none: what a disk has lost nobody can be asked for, so with them the checks ask for less."""
    rng = Random(f"plan {seed} disk")
    share = rng.choice((0.0, 0.0, 0.0, 0.3, 0.7))
    drawn = {}
    for kind, bounds in DISK_FAULTS.items():
        dice = Random(f"plan {seed} disk {kind}") if kind in DRAWN_APART else rng
        if dice.random() < share:
            drawn[kind] = _log_uniform(dice, *bounds)
    return drawn


def _network_faults(seed: int, others: dict[str, float]) -> dict[str, float]:
    """In some of the runs in which something goes wrong."""
    dice = Random(f"plan {seed} late_delivery")
    is_chosen = bool(others) and dice.random() < 0.35
    return {"late_delivery": _log_uniform(dice, *FAULTS["late_delivery"])} if is_chosen else {}
