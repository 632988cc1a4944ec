"""The world of a run: builds the cluster of a plan, keeps who is alive, and passes on what happens to those who check it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zrmq.client.batch import OneWay
from zrmq.client.process_queue import ProcessQueue, Unit
from zrmq.errors import Code, ZrmqError
from zrmq.message import FlushMode, Message, MessageQueue, SendReceipt
from zrmq.protocol.events import PERMISSION_WRITE, TopicConfig, TopicPut
from zrmq.testing.simulation.admins import VirtualAdmin
from zrmq.testing.simulation.consumers import VirtualConsumer
from zrmq.testing.simulation.log_check import LogCheck
from zrmq.testing.simulation.log_watch import between
from zrmq.testing.simulation.network import MachineNetwork
from zrmq.testing.simulation.plan import FAULTS, OF_CLIENTS, GroupPlan, Plan, reader_groups
from zrmq.testing.simulation.producers import VirtualProducer
from zrmq.testing.simulation.promises import Posting, Promises, Seek
from zrmq.testing.simulation.pullers import VirtualPuller
from zrmq.testing.simulation.readers import VirtualReader
from zrmq.testing.simulation.retention_check import check_deleted
from zrmq.testing.simulation.servers import VirtualBroker, VirtualNameServer
from zrmq.testing.simulation.trace import BrokenPromise, Trace, spell
from zrmq.transport.memory import MemoryTimer

ADMIN = frozenset({"admin"})
GONE = frozenset({"gone"})  # the queue that a message is bound to, with its topic, until that is made again
HINDERING = FAULTS.keys() - OF_CLIENTS - {"nameserver_crash"}  # nobody who has a route minds that one
MAY_END_A_SEND = {  # what a producer may be told, and after which faults, or with an administrator who changes topics
    Code.DISK_FULL: {"full_disk"}, Code.STORE_FAILED: {"failing_disk"}, Code.STOPPING: {"broker_restart", "lost_views"},
    Code.REQUEST_TIMEOUT: HINDERING, Code.UNREACHABLE: HINDERING | GONE,
    Code.FORBIDDEN: ADMIN, Code.TOPIC_NOT_FOUND: ADMIN, Code.BAD_REQUEST: ADMIN,
}


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
        self.probes: list[Posting] = []  # sent in the end, when everything was well
        self.ready_ms: dict[tuple[str, str], float] = {}  # group and instance: when its first member had fixed where it begins
        self._unplaced: dict[str, list[tuple[str, Message, int]]] = {}  # given while their brokers were down: to whom, topic id
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

    def probe(self) -> None:
        """Everything is well: each producer sends to each queue that takes messages, and is to get an answer to all."""
        working = self._live_producers()
        queues = [queue for topic in self.plan.topics for queue in self.present_queues(topic.name) if self._takes_messages(queue)]
        self.probes = [producer.probe(queue) for producer in working for queue in queues]

    def start_prober(self) -> None:
        """Somebody has to be there for that."""
        if not self._live_producers():
            self.producers.append(VirtualProducer(self, "prober", 1))

    def _live_producers(self) -> list[VirtualProducer]:
        return [producer for producer in self.producers if not producer.machine.is_closed]

    def _takes_messages(self, queue: MessageQueue) -> bool:
        topic = self.brokers[queue.broker_name].store.tables.topics[queue.topic]
        return bool(topic.config.permission & PERMISSION_WRITE)

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

    def end(self) -> None:
        """The run is over: threads that would wait for more of it end."""
        for producer in self.producers:
            producer.threads.end()

    # --- what happens -------------------------------------------------------------------------------------------------

    def answered(self, posting: Posting, outcome: SendReceipt | ZrmqError) -> None:
        """A producer was told what became of a message."""
        self.promises.answered(posting, outcome, self.network.now_ms)
        if isinstance(outcome, ZrmqError):
            self._check_error(posting, outcome)
        if not isinstance(outcome, SendReceipt) or posting.kind is OneWay:
            return
        is_from_cache = outcome.durability is FlushMode.ASYNC
        if is_from_cache and not self.promises.was_async(outcome.broker_name, posting.topic, posting.posted_ms):
            raise BrokenPromise("flush", f"{posting} was acknowledged before its flush, in a topic that is flushed first.")
        is_gone = self.promises.is_gone(outcome.broker_name, posting.body)
        if not (is_gone or self.promises.may_be_lost(posting) or self.promises.is_damaged(posting.body)):
            self._check_stored(posting, outcome)

    def _check_error(self, posting: Posting, error: ZrmqError) -> None:
        causes = self.plan.faults.keys() | (ADMIN if self.admin is not None else set())
        if self.plan.work.remake_topics_every_ms and posting.queue is not None:
            causes |= GONE
        if not causes & MAY_END_A_SEND.get(error.code, set()):
            raise BrokenPromise("answer", f"{posting} failed, and nothing has happened that would explain it: {error}")

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
        topic_id = consumer.topic_id(unit.process_queue)
        may_be_short = bool(self.plan.work.session_timeouts_ms) and self.promises.is_timeout_lost(queue.broker_name)
        is_lost = may_be_short or consumer.is_lease_lost(unit.process_queue)
        if not (consumer.is_broadcasting or is_lost):
            for other in self.consumers:
                if other is not consumer and other.group is consumer.group:
                    _check_owner(consumer, other, unit)
        place = (consumer.group.name, consumer.instance_name, queue)
        if not is_lost and not self.promises.may_come(place, topic_id, unit.messages[0].queue_offset):
            what = f"{unit.messages[0].queue_offset} of {spell(queue)}"
            raise BrokenPromise("again", f"{consumer.who} was given {what}; its group was told that more is committed.")
        self._check_topic(consumer, queue, topic_id)
        for message in unit.messages:
            self._check_message(consumer, message, topic_id)

    def passed_over(self, consumer: VirtualConsumer, process_queue: ProcessQueue, start: int, end: int) -> None:
        """A consumer that goes on from `start` is given what is at `end` first: nothing in between is for it."""
        queue, topic_id = process_queue.queue, consumer.topic_id(process_queue)
        broker, promises = self.brokers[queue.broker_name], self.promises
        if broker.check is None or broker.machine is None or topic_id != promises.topic_ids.get((broker.name, queue.topic)):
            return
        for offset, placed in between(broker.contents(queue), start, end):
            if promises.is_damaged(placed.body) or promises.is_deleted(broker.name, placed.end):
                continue
            if promises.is_wanted(consumer.group.name, placed.body):
                posting = promises.postings[placed.body]
                what = f"{posting}, at {offset} of {spell(queue)}"
                raise BrokenPromise("missed", f"{consumer.who} sought {start} and never got {what}.")

    def _check_topic(self, consumer: VirtualConsumer, queue: MessageQueue, topic_id: int) -> None:
        """Who has got messages of a topic gets none any more of a former one of the name. What was read before its flush may
        be of one that a power cut has undone."""
        before = consumer.topic_ids.get(queue, 0)
        if 0 < topic_id < before and not self.promises.is_cut(queue.broker_name, queue.topic):
            raise BrokenPromise("former", f"{consumer.who} gets {spell(queue)} of topic {topic_id} after that of {before}.")
        consumer.topic_ids[queue] = topic_id or before

    def _check_message(self, consumer: VirtualConsumer, message: Message, topic_id: int) -> None:
        posting = self.promises.postings.get(message.body)
        if posting is None or posting.topic != message.topic or posting.tag != message.tag:
            raise BrokenPromise("content", f"{consumer.who} got {message!r}, which nobody sent.")
        if not self.promises.is_wanted(consumer.group.name, message.body):
            raise BrokenPromise("filter", f"{consumer.who} got {posting} with tag {posting.tag}, which its group does not want.")
        broker = self.brokers[message.queue.broker_name]
        if broker.check is None or broker.machine is None:
            self._unplaced.setdefault(broker.name, []).append((consumer.who, message, topic_id))
        else:
            self._check_placed(consumer.who, message, topic_id)

    def _check_placed(self, who: str, message: Message, topic_id: int) -> None:
        """It was given what its broker has, and has flushed where that comes first."""
        broker, posting = self.brokers[message.queue.broker_name], self.promises.postings[message.body]
        assert broker.check is not None
        is_cut = self.promises.is_cut(broker.name, message.topic)
        if is_cut or self.promises.may_have_lost(broker.name, message.body) or self.promises.is_damaged(message.body):
            return
        placed = broker.check.placed(message.queue, message.queue_offset, topic_id)
        is_expired = broker.check.is_expired(message.queue, message.queue_offset)
        is_former = self.promises.is_former(broker.name, topic_id)
        if placed is None and (is_expired or is_former or self.promises.is_gone(broker.name, message.body)):
            return  # the segments of deleted topics go first
        if placed is None or placed.body != message.body:
            place = f"{message.queue_offset} of {spell(message.queue)}"
            raise BrokenPromise("phantom", f"{who} got {posting} from {place}; {placed} is there.")
        is_async = self.promises.is_async(broker.name, message.topic)
        if placed.end > broker.store.flushed_position and not is_async:
            raise BrokenPromise("visible", f"{who} got {posting} of {spell(message.queue)} before it was flushed.")

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
            is_lost = self.promises.is_place_lost((consumer.group.name, consumer.instance_name, queue))
            if broker.role is None or is_lost or self.promises.may_be_reset(queue) or not consumer.holds(queue):
                continue
            topic, reading = broker.store.tables.topics.get(queue.topic), consumer.core.reader.readings[queue]
            if topic is None or consumer.topic_id(reading.process_queue) not in (0, topic.topic_id):
                continue  # deleted since
            if consumer.is_lease_lost(reading.process_queue):
                continue  # another member may have it too, and commit
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
            else:
                self.promises.ended_unflushed(check.unflushed_queues())
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
            for given in self._unplaced.pop(broker.name, ()):
                self._check_placed(*given)
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
    theirs = other.core.reader.readings[queue].process_queue if other.holds(queue) else None
    if theirs is not None and other.topic_id(theirs) == topic_id and not other.is_lease_lost(theirs):
        raise BrokenPromise("owner", f"{what} while {other.who} holds a lease that is valid by its own rules.")
    if other.is_giving_back(queue, topic_id):
        raise BrokenPromise("drain", f"{what} while {other.who} still works on some of it.")
