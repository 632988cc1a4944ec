"""The world of a run: builds the cluster of a plan, keeps who is alive, and passes on what happens to those who check it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zrmq.client.batch import OneWay
from zrmq.client.process_queue import Unit
from zrmq.errors import ZrmqError
from zrmq.message import FlushMode, Message, MessageQueue, SendReceipt
from zrmq.protocol.events import (
    GroupSubscribed,
    LeaseGranted,
    LeaseReleased,
    OffsetsCommitted,
    SessionTimeoutChanged,
    TopicConfig,
    TopicPut,
)
from zrmq.testing.simulation.admins import VirtualAdmin
from zrmq.testing.simulation.consumers import VirtualConsumer
from zrmq.testing.simulation.log_check import LogCheck
from zrmq.testing.simulation.network import MachineNetwork
from zrmq.testing.simulation.plan import GroupPlan, Plan, reader_groups
from zrmq.testing.simulation.producers import VirtualProducer
from zrmq.testing.simulation.promises import Posting, Promises, Seek
from zrmq.testing.simulation.pullers import VirtualPuller
from zrmq.testing.simulation.readers import VirtualReader
from zrmq.testing.simulation.retention_check import check_deleted
from zrmq.testing.simulation.servers import VirtualBroker, VirtualNameServer
from zrmq.testing.simulation.trace import BrokenPromise, Trace, spell
from zrmq.transport.memory import MemoryTimer


class World:
    """Everything there is in one run."""

    def __init__(self, plan: Plan, trace: Trace) -> None:
        self.plan = plan
        self.trace = trace
        self.network = MachineNetwork(Random(f"{plan.seed} network"), delay_ms=plan.delay_ms, clock_rate=self._clock_rate)
        self.promises = Promises(plan)
        self.nameservers = [VirtualNameServer(self, f"nameserver-{number}") for number in range(plan.nameserver_count)]
        self.brokers = {name: VirtualBroker(self, name) for name in plan.broker_names}
        self.producers: list[VirtualProducer] = []  # all that ever were
        self.consumers: list[VirtualConsumer] = []  # those that are
        self.readers = {group.name: (group, reader) for group, reader in zip(reader_groups(plan), plan.work.readers, strict=True)}
        self.admin: VirtualAdmin | None = None
        self.is_working = True
        self.ready_ms: dict[tuple[str, str], float] = {}  # group and instance: when its first member had fixed where it begins
        self._lives: dict[str, int] = {}
        self._former: dict[str, tuple[LogCheck, int]] = {}  # broker name: its log's last check, and up to where it must survive

    def _clock_rate(self, name: str) -> float:
        drift = self.plan.work.clock_drift
        return 1.0 + Random(f"{self.plan.seed} {name} drift").uniform(-drift, drift) if drift else 1.0

    @property
    def nameserver_addresses(self) -> list[str]:
        """Where clients and brokers ask."""
        return [nameserver.address for nameserver in self.nameservers]

    @property
    def groups(self) -> list[GroupPlan]:
        """Those of the plan, and those of readers."""
        return [*self.plan.groups, *[group for group, _ in self.readers.values()]]

    def note(self, who: str, what: str, detail: str = "") -> None:
        """Something happened."""
        self.trace.add(self.network.now_ms, who, what, detail)

    def later(self, delay_ms: float, callback: Callable[[], None]) -> MemoryTimer:
        """Call between the turns of the machines."""
        return self.network.schedule(None, delay_ms, callback)

    def all_queues(self, topic: str) -> list[MessageQueue]:
        """The queues of a topic at all brokers of the plan, sorted."""
        count = next(each.queue_count for each in self.plan.topics if each.name == topic)
        return [MessageQueue(topic, name, queue_id) for name in self.plan.broker_names for queue_id in range(count)]

    def present_queues(self, topic: str) -> list[MessageQueue]:
        """The queues of a topic at all brokers, which are up, sorted."""
        return [
            MessageQueue(topic, name, queue_id)
            for name, broker in self.brokers.items() for queue_id in range(len(broker.store.tables.topics[topic].queues))
        ]

    # --- coming and going ---------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Start everything the plan begins with."""
        for nameserver in self.nameservers:
            nameserver.start()
        for broker in self.brokers.values():
            broker.start()
            self._create_topics(broker)
        for number in range(self.plan.producer_count):
            self.start_producer(f"producer-{number}")
        if self.plan.work.has_admin:
            self.admin = VirtualAdmin(self)
        for group in self.groups:
            for slot in range(group.members):
                self.later(group.starts_ms, lambda group=group, slot=slot: self.start_consumer(group, slot))  # type: ignore[misc]

    def _create_topics(self, broker: VirtualBroker) -> None:
        """As an administrator did before the run: flushed, with no faults yet."""
        tables = broker.store.tables
        kept = self.plan.work.retention
        for topic in self.plan.topics:
            config = TopicConfig(
                topic.name, queue_count=topic.queue_count, flush_mode=topic.flush_mode, retention_ms=kept.topic_ms or None,
                retention_bytes=kept.topic_bytes or None,
            )
            broker.store.append_event(TopicPut(tables.next_topic_id, config))
        broker.store.write()
        job = broker.store.begin_flush()
        if job is not None:
            job.run()
            job.finish()

    def start_producer(self, name: str) -> None:
        """A producer comes, unless there is no work any more or one of the name is there."""
        if self.is_working and name not in self.network.loops:
            self.producers.append(VirtualProducer(self, name, self._next_life(name)))

    def start_consumer(self, group: GroupPlan, slot: int) -> None:
        """A member comes, unless the one of this slot is there."""
        name = f"{group.name}-{slot}"
        if name not in self.network.loops:
            self.consumers.append(self._new_consumer(group, slot, self._next_life(name)))

    def _new_consumer(self, group: GroupPlan, slot: int, life: int) -> VirtualConsumer:
        if group.name in self.readers:
            return VirtualReader(self, group, slot, life, self.readers[group.name][1])
        pulls = self.plan.work.pulls.get(group.name)
        return VirtualConsumer(self, group, slot, life) if pulls is None else VirtualPuller(self, group, slot, life, pulls)

    def crash_consumer(self, consumer: VirtualConsumer) -> None:
        """A member ends without a word."""
        self.consumers.remove(consumer)
        consumer.crash()

    def consumer_left(self, consumer: VirtualConsumer) -> None:
        """A member has said goodbye."""
        self.consumers.remove(consumer)

    def _next_life(self, name: str) -> int:
        life = self._lives[name] = self._lives.get(name, 0) + 1
        return life

    # --- what happens -------------------------------------------------------------------------------------------------

    def answered(self, posting: Posting, outcome: SendReceipt | ZrmqError) -> None:
        """A producer was told what became of a message."""
        self.promises.answered(posting, outcome, self.network.now_ms)
        if not isinstance(outcome, SendReceipt) or posting.kind is OneWay:
            return
        is_from_cache = outcome.durability is FlushMode.ASYNC
        if is_from_cache and not self.promises.was_async(outcome.broker_name, posting.topic, posting.posted_ms):
            raise BrokenPromise("flush", f"{posting} was acknowledged before its flush, in a topic that is flushed first.")
        is_gone = self.promises.is_gone(outcome.broker_name, posting.body)
        if not (is_gone or self.promises.may_be_lost(posting) or self.promises.is_damaged(posting.body)):
            self._check_stored(posting, outcome)

    def _check_stored(self, posting: Posting, receipt: SendReceipt) -> None:
        broker = self.brokers[receipt.broker_name]
        if broker.check is None or broker.machine is None:
            return  # down, or not looked at yet: looked at when it is back
        placed = broker.check.placed(receipt.queue, receipt.queue_offset)
        if placed is None and broker.check.is_expired(receipt.queue, receipt.queue_offset):
            return
        place = f"{receipt.queue_offset} of {spell(receipt.queue)}"
        if placed is None or placed.body != posting.body:
            raise BrokenPromise("lost", f"{posting} was acknowledged at {place}; {placed} is there.")
        if placed.end > broker.store.flushed_position and receipt.durability is FlushMode.SYNC:
            raise BrokenPromise("flush", f"{posting} was acknowledged before it was flushed, at {place}.")

    def handed_out(self, consumer: VirtualConsumer, unit: Unit) -> None:
        """A consumer gives messages to a listener."""
        queue = unit.process_queue.queue
        self.note(consumer.who, "handed_out", f"{spell(queue)} {unit.offset}..{unit.next_offset}")
        is_unsure = self.promises.is_unsure(SessionTimeoutChanged, queue.broker_name, "") or any(
            self.promises.is_unsure(kind, queue.broker_name, consumer.group.name) for kind in (LeaseGranted, LeaseReleased)
        )
        if not (consumer.is_broadcasting or is_unsure):
            for other in self.consumers:
                if other is not consumer and other.group is consumer.group:
                    _check_owner(consumer, other, unit)
        topic_id = consumer.topic_id(unit.process_queue)
        self._check_topic(consumer, queue, topic_id)
        for message in unit.messages:
            self._check_message(consumer, message, topic_id)

    def _check_topic(self, consumer: VirtualConsumer, queue: MessageQueue, topic_id: int) -> None:
        """Who has got messages of a topic gets none any more of a former one of the name. What was read before its flush may
        be of one that a power cut has undone."""
        before = consumer.topic_ids.get(queue, 0)
        if 0 < topic_id < before and not self.promises.is_async(queue.broker_name, queue.topic):
            raise BrokenPromise("former", f"{consumer.who} gets {spell(queue)} of topic {topic_id} after that of {before}.")
        consumer.topic_ids[queue] = topic_id or before

    def _check_message(self, consumer: VirtualConsumer, message: Message, topic_id: int) -> None:
        posting = self.promises.postings.get(message.body)
        if posting is None or posting.topic != message.topic or posting.tag != message.tag:
            raise BrokenPromise("content", f"{consumer.who} got {message!r}, which nobody sent.")
        if not self.promises.is_wanted(consumer.group.name, message.body):
            raise BrokenPromise("filter", f"{consumer.who} got {posting} with tag {posting.tag}, which its group does not want.")
        broker = self.brokers[message.queue.broker_name]
        is_async = self.promises.is_async(message.queue.broker_name, message.topic)
        is_lost = self.promises.may_have_lost(message.queue.broker_name, message.body)
        is_excused = is_async or is_lost or self.promises.is_damaged(message.body)
        if is_excused or broker.check is None or broker.machine is None:
            return
        placed = broker.check.placed(message.queue, message.queue_offset, topic_id)
        is_expired = broker.check.is_expired(message.queue, message.queue_offset)
        is_former = self.promises.is_former(broker.name, topic_id)
        if placed is None and (is_expired or is_former or self.promises.is_gone(broker.name, message.body)):
            return  # the segments of deleted topics go first
        if placed is None or placed.body != message.body:
            place = f"{message.queue_offset} of {spell(message.queue)}"
            raise BrokenPromise("phantom", f"{consumer.who} got {posting} from {place}; {placed} is there.")
        if placed.end > broker.store.flushed_position:
            raise BrokenPromise("visible", f"{consumer.who} got {posting} of {spell(message.queue)} before it was flushed.")

    def checked(self, broker: VirtualBroker) -> dict[int, tuple[int, int]]:
        """The entries that the broker's log had in its last life."""
        return self._former[broker.name][0].watch.entries if broker.name in self._former else {}

    def listened(self, consumer: VirtualConsumer, message: Message, is_failing: bool) -> None:
        """A listener was called."""
        if is_failing:
            self.note(consumer.who, "listener_raised", f"{message.queue.queue_id}@{message.queue_offset}")
        else:
            self.promises.finish(consumer.group.name, consumer.instance_name, message)

    def sought(self, consumer: VirtualConsumer, queue: MessageQueue, before: int, offset: int) -> None:
        """A consumer that was through with everything below `before` goes on from `offset`."""
        seek = Seek(before, offset, min(offset, self._end_of(queue)))
        self.promises.sought((consumer.group.name, consumer.instance_name, queue), seek)

    def _end_of(self, queue: MessageQueue) -> int:
        """Where a queue ends for consumers; while its broker is down, where what is safe of it does."""
        broker = self.brokers[queue.broker_name]
        if broker.role is not None:
            topic = broker.store.tables.topics.get(queue.topic)
            is_there = topic is not None and queue.queue_id < len(topic.queues)  # one that was made anew may have fewer
            return topic.queues[queue.queue_id].visible_offset if topic is not None and is_there else 0
        if broker.name not in self._former:
            return 0
        former, survives_until = self._former[broker.name]
        contents = former.contents(queue)
        return max((offset + 1 for offset, placed in contents.items() if placed.end <= survives_until), default=0)

    def committed(self, consumer: VirtualConsumer, offsets: dict[MessageQueue, int]) -> None:
        """A consumer was told that the brokers have these offsets, or, where it went on meanwhile, later ones."""
        for queue, offset in offsets.items():
            broker = self.brokers[queue.broker_name]
            is_lost = any(
                self.promises.is_unsure(kind, broker.name, consumer.group.name) for kind in (OffsetsCommitted, GroupSubscribed)
            )
            if broker.role is None or is_lost or self.promises.may_be_reset(queue) or not consumer.holds(queue):
                continue
            topic, reading = broker.store.tables.topics.get(queue.topic), consumer.core.reader.readings[queue]
            if topic is None or consumer.topic_id(reading.process_queue) not in (0, topic.topic_id):
                continue  # deleted since
            group = broker.store.tables.groups.get(consumer.group.name)
            known = group.start_offset(topic, queue.queue_id, consumer.instance_name) if group is not None else None
            if self.promises.is_beyond((consumer.group.name, consumer.instance_name, queue), offset, known):
                continue
            latest = max(offset, consumer.inbox.commit_offset(reading.process_queue))
            if known is None or not offset <= max(known, topic.queues[queue.queue_id].min_offset) or known > latest:
                what = f"{offset} of {spell(queue)} is committed; {known} is"
                raise BrokenPromise("commit", f"{consumer.who} was told that {what}.")

    def consumer_ready(self, consumer: VirtualConsumer) -> None:
        """Everything that fixes where its group, or for broadcasting its instance, begins has been done."""
        self.ready_ms.setdefault((consumer.group.name, consumer.instance_name), self.network.now_ms)

    def broker_down(self, broker: VirtualBroker, is_power_cut: bool) -> None:
        """A broker ended; remember what must survive."""
        check, broker.check = broker.check, None
        if check is not None:
            if is_power_cut:
                self.promises.may_lose(broker.name, check.unflushed_bodies(), check.flushed_position)
            self._former[broker.name] = (check, check.flushed_position if is_power_cut else check.watch.end)
        elif broker.name in self._former and is_power_cut:  # again, before anybody had a look
            former, survives_until = self._former[broker.name]
            self.promises.may_lose(broker.name, former.unflushed_bodies(), former.flushed_position)
            self._former[broker.name] = (former, min(survives_until, former.flushed_position))

    def broker_up(self, broker: VirtualBroker) -> None:
        """A broker is back, and its first turn is over."""
        former = self._former.pop(broker.name, None)
        check = broker.check
        if former is not None and check is not None:
            self.log_begins(broker, former[0])
            check.advance(broker.store.written_position, broker.store.flushed_position)
            check.compare_with_former(*former)
            check.compare_tables(broker.store.tables)
            broker.note_losses()
            if broker.is_disk_suspect:
                broker.compare_queues()
            for consumer in self.consumers:
                consumer.broker_up(broker.name)

    def log_begins(self, broker: VirtualBroker, check: LogCheck) -> None:
        """Segments may have been deleted. `check`: it knows what was in them."""
        start, before = broker.store.start_position, self.promises.deleted_until.get(broker.name, 0)
        check.log_start = max(check.log_start, start)
        if start > before:
            self.note(broker.name, "log_begins", f"{start}")
            assert broker.machine is not None
            check_deleted(broker.name, check.watch, broker.store, self.plan, before, broker.machine.clock.time_ms())
            self.promises.deleted_until[broker.name] = start


def _check_owner(consumer: VirtualConsumer, other: VirtualConsumer, unit: Unit) -> None:
    queue, topic_id = unit.process_queue.queue, consumer.topic_id(unit.process_queue)
    what = f"{consumer.who} delivers {spell(queue)} from {unit.offset}"
    if other.holds(queue) and other.topic_id(other.core.reader.readings[queue].process_queue) == topic_id:
        raise BrokenPromise("owner", f"{what} while {other.who} holds a lease that is valid by its own rules.")
    if other.is_giving_back(queue, topic_id):
        raise BrokenPromise("drain", f"{what} while {other.who} still works on some of it.")
