"""The checks of a whole run: bounds while it lasts, health when nothing goes wrong any more, and the accounts at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import inf

from zrmq.client.reading import PULL_BYTES_MIN
from zrmq.message import ConsumeFrom, MessageModel, MessageQueue
from zrmq.protocol.events import LeaseReleased
from zrmq.protocol.limits import WATCHES_PER_SESSION_MAX
from zrmq.store.tables import Subscribed
from zrmq.testing.simulation.consumers import BOUNDS, VirtualConsumer
from zrmq.testing.simulation.log_check import LogCheck
from zrmq.testing.simulation.log_watch import Placed
from zrmq.testing.simulation.plan import FAULTS, OF_CLIENTS, GroupPlan
from zrmq.testing.simulation.producers import BUFFER_BYTES
from zrmq.testing.simulation.promises import Posting
from zrmq.testing.simulation.readers import VirtualReader
from zrmq.testing.simulation.retention_check import check_relocated
from zrmq.testing.simulation.servers import VirtualBroker
from zrmq.testing.simulation.trace import BrokenPromise, spell
from zrmq.testing.simulation.world import World

REPLIES_HELD_MAX = 2_000
ISOLATING = FAULTS.keys() - OF_CLIENTS
GHOSTS_MAX = 100  # watches of clients that are gone and whose sessions have not run out


# --- while it lasts -----------------------------------------------------------------------------------------------------


def check_bounds(world: World) -> None:
    """Nobody's memory grows beyond what it is told to use."""
    for broker in world.brokers.values():
        if broker.machine is not None and broker.check is not None:
            _check_broker_bounds(world, broker)
    for consumer in world.consumers:
        consumer.note_told()
        held_bytes = consumer.inbox.account.size_bytes
        # A queue that holds nothing may always pull, or a full consumer would starve it; and what a listener has failed on is
        # held again, in place of which something else may have come by then.
        pulls = len(consumer.core.reader.readings) + consumer.group.workers
        bytes_max = BOUNDS.size_bytes + pulls * max(PULL_BYTES_MIN, world.plan.segment_bytes)
        if not 0 <= held_bytes <= bytes_max:
            raise BrokenPromise("memory", f"{consumer.who} holds {held_bytes} bytes of messages; its bound is {bytes_max}.")
    watches_max = WATCHES_PER_SESSION_MAX * len(world.network.loops) + GHOSTS_MAX
    for nameserver in world.nameservers:
        if nameserver.machine is not None and nameserver.watch_count > watches_max:
            raise BrokenPromise("memory", f"{nameserver.name} holds {nameserver.watch_count} watches.")
    for producer in world.producers:
        held_bytes = producer.accumulator.buffered_bytes
        if not 0 <= held_bytes <= BUFFER_BYTES:
            raise BrokenPromise("memory", f"{producer.who} holds {held_bytes} bytes of messages; its bound is {BUFFER_BYTES}.")


def _check_broker_bounds(world: World, broker: VirtualBroker) -> None:
    core = broker.core
    if len(core.outbox) > REPLIES_HELD_MAX:
        raise BrokenPromise("memory", f"{broker.name} holds {len(core.outbox)} replies.")
    awaited = sum(len(session.waiting or ()) for session in core.sessions)
    if core.pulling.held_count != awaited:
        raise BrokenPromise("memory", f"{broker.name} holds {core.pulling.held_count} pulls; its sessions wait for {awaited}.")


# --- when nothing goes wrong any more ---------------------------------------------------------------------------------------


def find_trouble(world: World) -> str:
    """What is not well yet, in one sentence; empty when all is."""
    return next(_troubles(world), "")


def _troubles(world: World) -> Iterator[str]:
    for broker in world.brokers.values():
        if broker.machine is None or broker.check is None:
            yield f"{broker.name} is down."
            return
        missing = [topic.name for topic in world.plan.topics if topic.name not in broker.store.tables.topics]
        if missing:
            yield f"{broker.name} has no topics {missing}."
            return
    if world.admin is not None and world.admin.is_busy:
        yield "The administrator is not through with what it has begun."
    for producer in world.producers:
        if not producer.machine.is_closed and (producer.open_count or not producer.is_ready):
            yield f"{producer.who} has {producer.open_count} messages without an answer, or does not know all topics yet."
    for group in world.plan.groups:
        yield from _group_troubles(world, group)
    for group, _ in world.readers.values():
        yield from _reader_troubles(world, group)
    for broker in world.brokers.values():
        if len(broker.core.outbox) or broker.store.flushed_position < broker.store.written_position:
            yield f"{broker.name} holds {len(broker.core.outbox)} replies and has flushed {broker.store.flushed_position}."
        yield from _trim_troubles(broker)


def _trim_troubles(broker: VirtualBroker) -> Iterator[str]:
    check = broker.check
    assert check is not None
    if check.log_start == 0:
        return
    for topic_id, topic in broker.store.tables.topics_by_id.items():
        for queue in topic.queues:
            if queue.min_offset < check.watch.first_offset((topic_id, queue.queue_id), check.log_start, queue.next_offset):
                yield f"{broker.name}: {queue} begins with messages that are deleted."


def _group_troubles(world: World, group: GroupPlan) -> Iterator[str]:
    members = [consumer for consumer in world.consumers if consumer.group is group]
    if len(members) < group.members or not all(member.is_started for member in members):
        yield f"Of the {group.members} members of {group.name} {len(members)} are there, and not all have started."
        return
    for topic in group.topics:
        for queue in world.present_queues(topic):
            broker = world.brokers[queue.broker_name]
            if _is_stuck(world, group, queue):
                continue
            if group.message_model is MessageModel.CLUSTERING:
                yield from _lease_troubles(group, broker, queue, members)
            for instance_name in sorted({member.instance_name for member in members}):
                yield from _lag_troubles(world, group, broker, queue, instance_name)


def _reader_troubles(world: World, group: GroupPlan) -> Iterator[str]:
    reader = next((each for each in world.consumers if each.group is group), None)
    if not isinstance(reader, VirtualReader) or not reader.is_started:
        yield f"{group.name} is not there, or has not started."
        return
    yield from reader.troubles()
    for queue in reader.chosen if reader.has_group else ():
        broker = world.brokers[queue.broker_name]
        known = broker.store.tables.groups.get(group.name)
        is_lost = world.promises.is_commit_lost((group.name, "", queue))
        if is_lost and (known is None or known.start_offset(broker.store.tables.topics[queue.topic], queue.queue_id) is None):
            continue  # as of a lost commit below
        yield from _lag_troubles(world, group, broker, queue, "")


def _lease_troubles(
    group: GroupPlan, broker: VirtualBroker, queue: MessageQueue, members: list[VirtualConsumer]
) -> Iterator[str]:
    lease = broker.lease(group.name, queue)
    if lease is None or not any(member.who == lease.client_id and member.holds(queue) for member in members):
        yield f"{spell(queue)} is leased to {lease} of {group.name}, and no live member holds it."


def _is_stuck(world: World, group: GroupPlan, queue: MessageQueue) -> bool:
    """Whether the broker has lost that a lease has ended, of a member that is there and does not know that it has it again."""
    broker = world.brokers[queue.broker_name]
    lease = broker.lease(group.name, queue)
    if lease is None or not world.promises.is_lease_lost(LeaseReleased, broker.name, lease.lease_epoch):
        return False
    return any(each.who == lease.client_id and not each.holds(queue) for each in world.consumers)


def _lag_troubles(
    world: World, group: GroupPlan, broker: VirtualBroker, queue: MessageQueue, instance_name: str
) -> Iterator[str]:
    topic = broker.store.tables.topics[queue.topic]
    known = broker.store.tables.groups.get(group.name)
    committed = known.start_offset(topic, queue.queue_id, instance_name) if known is not None else None
    min_offset, next_offset = topic.queues[queue.queue_id].min_offset, topic.queues[queue.queue_id].next_offset
    if committed is not None and world.promises.is_commit_lost((group.name, instance_name, queue)):
        is_finished = partial(world.promises.is_finished, group.name, instance_name, queue)
        open_offsets = [
            offset for offset, placed in broker.contents(queue).items()
            if offset >= committed and not (world.promises.is_damaged(placed.body) or is_finished(offset, placed.body))
        ]
        if not open_offsets:
            return  # the commit that said so is lost, and nobody has had a reason to commit again
    if world.promises.is_beyond((group.name, instance_name, queue), next_offset, committed):
        return  # the queue had ended earlier when that was sought, and the broker committed its end
    if committed is None or max(committed, min_offset) < next_offset:  # nobody commits what it could not read
        yield f"{group.name} {instance_name} has committed {committed} of {next_offset} on {spell(queue)}."


# --- the accounts at the end ----------------------------------------------------------------------------------------------


def check_accounts(world: World) -> None:
    """Every promise of the run, once more, against what the logs have in the end."""
    checks = {name: check for name, broker in world.brokers.items() if (check := broker.check) is not None}
    for name, check in checks.items():
        check.compare_tables(world.brokers[name].store.tables)
        world.brokers[name].compare_queues()
        world.brokers[name].check_damage_read()
        if not world.brokers[name].damage.hurt:  # views may have what is damaged in the log
            check_relocated(name, world.brokers[name].store, check, is_refused=bool(world.trace.counts["state_not_relocated"]))
    _check_topics(world)
    _check_commits(world)
    _check_acknowledged(world, checks)
    _check_copies(world, checks)
    for group in world.plan.groups:
        _check_consumed(world, group, checks)
    for consumer in world.consumers:
        if isinstance(consumer, VirtualReader):
            consumer.check_read()


def check_probes(world: World) -> None:
    """Every queue takes messages again."""
    for posting in world.probes:
        if posting.error is not None:
            raise BrokenPromise("health", f"When all was well, {posting} for {posting.queue} failed: {posting.error}")


def _check_topics(world: World) -> None:
    """Topics are what the administrator was told they are."""
    for (broker_name, topic), config in world.admin.settled.items() if world.admin is not None else ():
        known = world.brokers[broker_name].store.tables.topics[topic].config
        if known != config:
            raise BrokenPromise("topics", f"{broker_name} said that a topic is {config}, and it is {known}.")


def _check_commits(world: World) -> None:
    """Groups stand where their members were told that they do, or behind."""
    for (group, instance_name, queue), topic_id, offset in world.promises.all_told():
        tables = world.brokers[queue.broker_name].store.tables
        topic = tables.topics_by_id.get(topic_id)
        if topic is None:
            continue  # deleted since
        known = tables.groups[group].start_offset(topic, queue.queue_id, instance_name) if group in tables.groups else None
        if max(known or 0, topic.queues[queue.queue_id].min_offset) < offset:
            what = f"{offset} of {spell(queue)} is committed; in the end {known} is"
            raise BrokenPromise("commit", f"{group} {instance_name} was told that {what}.")


def _check_acknowledged(world: World, checks: dict[str, LogCheck]) -> None:
    """Everything acknowledged is at its acknowledged offset."""
    for queue, postings in world.promises.acknowledged.items():
        check = checks[queue.broker_name]
        contents = check.contents(queue)
        for offset, posting in postings.items():
            placed = contents.get(offset)
            if (placed is None and check.is_expired(queue, offset)) or world.promises.is_damaged(posting.body):
                continue
            if world.promises.is_gone(queue.broker_name, posting.body):
                continue
            if (placed is None or placed.body != posting.body) and not world.promises.may_be_lost(posting):
                place = f"{offset} of {spell(queue)}"
                raise BrokenPromise("lost", f"{posting} was acknowledged at {place}; in the end {placed} is there.")


def _check_copies(world: World, checks: dict[str, LogCheck]) -> None:
    """Nothing is stored more often than its producer moved it to another broker, and nothing that was reported as not stored."""
    copies: Counter[bytes] = Counter()
    for check in checks.values():
        for (topic_id, _), contents in check.watch.queues.items():
            is_there = topic_id in check.watch.tables.topics_by_id
            for placed in contents.values():
                copies[placed.body] += is_there
    for body, count in copies.items():
        posting = world.promises.postings[body]
        if count > _copies_max(posting) + world.promises.is_damaged(body):
            raise BrokenPromise("double", f"{posting} is stored {count} times.")
        if count and world.promises.is_known_unstored(posting):
            raise BrokenPromise("answer", f"{posting} is stored, although its producer was told: {posting.error}")


def _copies_max(posting: Posting) -> int:
    """Once, and once more for each broker that it was moved away from with an unknown outcome."""
    handle = posting.handle
    return 1 if handle is None else 1 + len(getattr(handle.batch, "avoid", ()))


def _check_consumed(world: World, group: GroupPlan, checks: dict[str, LogCheck]) -> None:
    """Each group got everything it subscribed to; what was sent after it was ready counts as that."""
    for topic in group.topics:
        for queue in world.present_queues(topic):
            if _is_stuck(world, group, queue):
                continue
            contents = checks[queue.broker_name].contents(queue)
            for known, instance_name in world.ready_ms:
                is_lost = world.promises.is_start_lost(queue.broker_name, group.name, instance_name, topic)
                if known == group.name and not is_lost:
                    owed_ms = _owed_ms(world, group, instance_name, queue, checks)
                    subscribed = _subscribed(checks[queue.broker_name], group, instance_name, topic)
                    start = subscribed.starts.get(queue.queue_id, 0) if subscribed is not None else 0
                    _check_instance(world, group, instance_name, queue, contents, start, owed_ms)


def _check_instance(
    world: World, group: GroupPlan, instance_name: str, queue: MessageQueue, contents: dict[int, Placed], start: int,
    owed_ms: float,
) -> None:
    """Everybody is owed everything from the start on, and what was sent after `owed_ms`."""
    for offset, placed in contents.items():
        posting = world.promises.postings[placed.body]
        if (posting.posted_ms <= owed_ms and offset < start) or world.promises.is_damaged(placed.body):
            continue
        if world.promises.is_deleted(queue.broker_name, placed.end):
            continue
        if not world.promises.is_finished(group.name, instance_name, queue, offset, placed.body):
            raise BrokenPromise(
                "missed", f"{group.name} {instance_name} never got {posting}, at {offset} of {spell(queue)}; it began at {start}."
            )


def _subscribed(check: LogCheck, group: GroupPlan, instance_name: str, topic: str) -> Subscribed | None:
    """What a broker's log has of a subscription."""
    known = check.watch.tables.groups.get(group.name)
    return known.subscribed(topic, instance_name) if known is not None else None


def _owed_ms(
    world: World, group: GroupPlan, instance_name: str, queue: MessageQueue, checks: dict[str, LogCheck]
) -> float:
    """From when on everything that is sent is owed, wherever the group began.

    Nothing is when its broker did not know that the group had subscribed, as it cannot where nobody who did could be asked, or
    was told the time of another one's clock while one of the two was wrong; nor when the group begins at a time, which may be
    yet to come.
    """
    ready_ms = world.ready_ms[group.name, instance_name]
    if group.consume_from is ConsumeFrom.TIMESTAMP:
        return inf
    if group.consume_from is ConsumeFrom.EARLIEST or not ISOLATING & world.plan.faults.keys():
        return ready_ms
    subscribed = {name: _subscribed(check, group, instance_name, queue.topic) for name, check in checks.items()}
    found = {name: each.since_ms for name, each in subscribed.items() if each is not None}
    who = (group.name, instance_name, queue.topic)
    first, first_ms = next(
        (broker_name, since_ms) for broker_name, since_ms in world.promises.subscriptions[who]
        if found.get(broker_name) == since_ms or world.promises.is_start_lost(broker_name, *who)  # that one said so, and forgot
    )
    is_comparable = first == queue.broker_name or all(map(world.network.is_clock_right, (first, queue.broker_name)))
    return ready_ms if found.get(queue.broker_name) == first_ms and is_comparable else inf
