"""The servers of a run: NameServers and brokers that crash and come back, each on a machine of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from zrmq.broker import BrokerRole
from zrmq.config import BrokerConfig
from zrmq.errors import DiskFullError, FolderUnusableError, NotReadyError
from zrmq.message import MessageQueue
from zrmq.protocol.batch import decode_records, iter_batches
from zrmq.protocol.requests import PullStatus
from zrmq.routing.core import NameServerCore
from zrmq.serving.core import BrokerCore
from zrmq.store.config import StoreConfig
from zrmq.store.flusher import Flusher
from zrmq.store.job import Job
from zrmq.store.store import Store
from zrmq.store.tables import Lease, Queue
from zrmq.testing.files import FaultyFiles, PowerCut
from zrmq.testing.simulation.damage import LogDamage
from zrmq.testing.simulation.log_check import LogCheck
from zrmq.testing.simulation.log_watch import Entry, LogWatch, Placed, State
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.plan import DISK_FAULTS
from zrmq.testing.simulation.trace import BrokenPromise

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World

PAUSED_POLL_MS = 5.0  # how often a job of a paused machine looks whether it may go on
READ_BYTES = 16 * 1024
ROW_TAIL_BYTES_MAX = 400  # where disks break: a queue has a file from ten batches on
RESTART_MS = 500.0  # a broker whose disk is full is started again after


class VirtualNameServer:
    """One NameServer, up or down."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.address = f"tcp://{name}:9876"
        self.machine: Machine | None = None
        self._world = world
        self._rng = Random(f"{world.plan.seed} {name}")

    def start(self) -> None:
        """Come up, knowing nothing."""
        self._world.note(self.name, "started")
        self.machine = self._world.network.machine(self.name)
        self._core = NameServerCore(self.machine, self.address, self._rng)

    @property
    def watch_count(self) -> int:
        """Of the running one."""
        return self._core.watch_count

    def crash(self) -> None:
        """End without a word."""
        if self.machine is not None:
            self._world.note(self.name, "crashed")
            self.machine.close()
            self.machine = None


class VirtualFlusher(Flusher):
    """The `Flusher` of a machine without threads: a job takes its time, and the loop goes on meanwhile.

    Some jobs run in the loop, as they do on a fast disk.
    """

    def __init__(self, machine: Machine, rng: Random, draw_ms: Callable[[], float], inline_share: float) -> None:
        super().__init__(machine.call_soon_threadsafe, machine.clock)
        self._machine = machine
        self._rng = rng
        self._draw_ms = draw_ms
        self._inline_share = inline_share
        self._jobs: deque[tuple[Job, Callable[[], None]]] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether jobs are under way."""
        return bool(self._jobs)

    def start(self, job: Job, on_finished: Callable[[], None]) -> None:
        """Run the job and finish it, now or after some time."""
        if not self._jobs and self._rng.random() < self._inline_share:
            job.run()
            job.finish()
            on_finished()
            return
        self._jobs.append((job, on_finished))
        if len(self._jobs) == 1:
            self._begin()

    def close(self) -> None:
        """What is under way is done before this returns."""
        while self._jobs:
            job, on_finished = self._jobs.popleft()
            if not job.has_run:
                job.run()
            job.finish()
            on_finished()

    def _begin(self) -> None:
        whole_ms = self._draw_ms()
        before_ms = self._rng.uniform(0.0, whole_ms)
        self._later(before_ms, partial(self._run_first, self._jobs[0][0], whole_ms - before_ms))

    def _later(self, delay_ms: float, step: Callable[[], None]) -> None:
        self._machine.network.schedule(None, delay_ms, partial(self._step, step))

    def _step(self, step: Callable[[], None]) -> None:
        if self._machine.is_paused:
            self._later(PAUSED_POLL_MS, step)
        elif not self._machine.is_closed:
            step()

    def _run_first(self, job: Job, after_ms: float) -> None:
        if not self._jobs or self._jobs[0][0] is not job:
            return
        try:
            job.run()
        except PowerCut:
            self._machine.on_power_cut()
            return
        self._later(after_ms, partial(self._machine.call_soon_threadsafe, partial(self._finish_job, job)))

    def _finish_job(self, job: Job) -> None:
        if self._jobs and self._jobs[0][0] is job:
            _, on_finished = self._jobs.popleft()
            if self._jobs:
                self._begin()
            job.finish()
            on_finished()


class VirtualRole(BrokerRole):
    """`BrokerRole` whose jobs take virtual time."""

    machine: Machine
    draw_ms: Callable[[], float]

    def _make_flusher(self, inline_below_ms: float) -> Flusher:
        return VirtualFlusher(self.machine, self._rng, self.draw_ms, 0.3 if inline_below_ms else 0.0)


class VirtualBroker:
    """One broker, up or down, with its disk. `check` watches its log."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.address = f"tcp://{name}:10911"
        self.files = FaultyFiles(seed=Random(f"{world.plan.seed} {name} disk").getrandbits(48))
        self.folder = Path("/") / name
        self.files.short_writes = world.plan.has_short_writes
        self.machine: Machine | None = None
        self.role: BrokerRole | None = None
        self.check: LogCheck | None = None
        self.slowness = 1.0  # of the disk
        self.damage = LogDamage(self.files, self.folder / "commitlog", Random(f"{world.plan.seed} {name} damage"))
        self.is_disk_suspect = False  # a fault has been at its files: after each start its queues are read as a whole
        self.life = 0  # counts starts, and stops in good order, with which all leases end
        self._world = world
        self._rng = Random(f"{world.plan.seed} {name}")
        self._work_rng = Random(f"{world.plan.seed} {name} work")

    @property
    def store(self) -> Store:
        """Of the running broker."""
        assert self.role is not None
        return self.role.store

    @property
    def core(self) -> BrokerCore:
        """Of the running broker."""
        assert self.role is not None
        return self.role.core

    def lease(self, group: str, queue: MessageQueue) -> Lease | None:
        """Who may read a queue for a group by the tables of the running broker."""
        topic, known = self.store.tables.topics.get(queue.topic), self.store.tables.groups.get(group)
        return None if known is None or topic is None else known.leases.get((topic.topic_id, queue.queue_id))

    def contents(self, queue: MessageQueue) -> dict[int, Placed]:
        """What a queue of the running broker has."""
        assert self.check is not None
        return self.check.contents(queue)

    # --- lives --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Recover and serve."""
        self._world.note(self.name, "starting")
        self.life += 1
        machine = self.machine = self._world.network.machine(self.name)
        machine.on_power_cut = self.lose_power
        role = VirtualRole(
            self._config(), address=self.address, ingest_address=f"tcp://{self.name}:10912", files=self.files, rng=self._rng
        )
        role.machine, role.draw_ms = machine, self._draw_job_ms
        try:
            role.open(machine)
        except PowerCut:
            self.lose_power()
            return
        except (DiskFullError, FolderUnusableError) as error:
            if self.files.capacity_bytes is None:
                raise
            self._end(f"could not start: {error.message}", is_power_cut=False)
            self._world.later(RESTART_MS, self.start_again)
            return
        if DISK_FAULTS.keys() & self._world.plan.faults.keys() or self._world.plan.work.remake_topics_every_ms:
            role.store.shelf.row_tail_bytes_max = ROW_TAIL_BYTES_MAX  # or there would hardly be a queue file to be lost, or left
        self.role = role
        machine.after_turn = self.look
        self._world.note(self.name, "started", f"boot={self.store.boot} log={self.store.appended_position}")

    def start_again(self) -> None:
        """Start, unless somebody has done it."""
        if self.machine is None:
            self.start()

    def _config(self) -> BrokerConfig[StoreConfig]:
        plan = self._world.plan
        return BrokerConfig(
            store=StoreConfig(
                segment_bytes=plan.segment_bytes, checkpoint_ms=plan.checkpoint_ms, free_warn_bytes=0,
                free_delete_bytes=plan.work.retention.free_delete_bytes, free_refuse_bytes=2 * plan.segment_bytes,
                retention_ms=plan.work.retention.store_ms, store_bytes_max=plan.work.retention.store_bytes_max,
            ),
            broker_name=self.name, cluster="simulated", data=str(self.folder),
            nameservers=tuple(self._world.nameserver_addresses), session_timeout_ms=self._draw_session_timeout_ms(),
        )

    def _draw_session_timeout_ms(self) -> int:
        timeouts_ms = self._world.plan.work.session_timeouts_ms if self.life > 1 else ()
        return self._work_rng.choice(timeouts_ms) if timeouts_ms else self._world.plan.session_timeout_ms

    def _draw_job_ms(self) -> float:
        return self._rng.uniform(*self._world.plan.flush_ms) * self.slowness

    def lose_power(self) -> None:
        """The machine goes dark; what was not synced is subject to the dice."""
        self._end("lost power", is_power_cut=True)

    def kill(self) -> None:
        """The process ends; the page cache stays."""
        self._end("killed", is_power_cut=False)

    def stop(self) -> None:
        """End in good order."""
        if self.role is not None:
            self._world.note(self.name, "stopping")
            self.life += 1
            self.role.stop(self._stopped)

    def _stopped(self) -> None:
        self.look()
        self._end("stopped", is_power_cut=False)

    def _end(self, how: str, is_power_cut: bool) -> None:
        machine, self.machine, self.role = self.machine, None, None
        if machine is None:
            return
        machine.close()
        self._world.note(self.name, how)
        if is_power_cut:
            self.files.crash()
        else:
            self.files.kill()
        self._world.broker_down(self, is_power_cut)

    # --- checks -------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read what is new in the log."""
        if self.check is None:
            self.check = self._make_check()
            self._world.broker_up(self)
        self._world.log_begins(self, self.check)
        self.check.advance(self.store.written_position, self.store.flushed_position)

    def _make_check(self) -> LogCheck:
        saved_position = self.store.recovery.replayed_from if self.store.recovery.has_views else 0
        unsaved = self.damage.missing_before(saved_position)
        folder, start = self.folder / "commitlog", self.store.start_position
        watch = LogWatch(self.files, folder, start, dict(self.damage.hurt), saved_position, unsaved)
        checked = self._world.checked(self) if self.damage.hurt else {}
        return LogCheck(self.name, watch, self._world.promises, checked, self.store.recovery.end_position)

    def hurt(self, entries: list[Entry]) -> None:
        """The disk has been at these entries of its log."""
        self._world.promises.damaged(body for entry in entries for body in entry.bodies)

    def note_losses(self) -> None:
        """After a start: what of its log the broker has lost for good; it must have told."""
        assert self.check is not None
        report, watch, promises = self.store.recovery, self.check.watch, self._world.promises
        self.damage.begin_life(report.end_position, watch)
        replayed = [position for position in watch.damaged if position >= watch.saved_position]
        self.check.check_reported(report.damage, replayed)
        for position in watch.missing:
            entry = self.damage.hurt[position]
            if entry.event is not None:
                promises.lost_event(self.name, entry.event)
            elif entry.batch is not None:
                topic = watch.tables.topics_by_id[entry.batch.topic_id]
                promises.lost_batch(MessageQueue(topic.config.topic, self.name, entry.batch.queue_id))

    def check_damage_read(self) -> None:
        """What is damaged of queues that were just read as a whole must have been told."""
        assert self.check is not None
        watch = self.check.watch
        known = [
            position for position, entry in self.damage.hurt.items()
            if entry.batch is not None and watch.damaged.get(position, State.HEADER) is State.HEADER
            and position not in watch.missing and not watch.is_whole(entry)
        ]
        self.check.check_reported(self.store.damage, known)

    def compare_queues(self) -> None:
        """What the store reads by its queue files must be what the log has."""
        assert self.check is not None
        for topic in self.store.tables.topics.values():
            for queue in topic.queues:
                contents = self.check.watch.queues.get((topic.topic_id, queue.queue_id), {})
                bodies = dict(self.read_all(queue))
                may = {
                    offset: placed.body for offset, placed in contents.items()
                    if offset < queue.visible_offset and placed.end > self.check.log_start
                }
                must = {offset: body for offset, body in may.items() if not self._world.promises.is_damaged(body)}
                if not must.items() <= bodies.items() <= may.items():
                    counts = f"{len(bodies)} messages of {queue}; its log has {len(must)}, and {len(may)} with the damaged ones"
                    raise BrokenPromise("views", f"{self.name} serves {counts}.")

    def read_all(self, queue: Queue) -> Iterator[tuple[int, bytes]]:
        """Every message of a queue as consumers get it: offset and body."""
        offset = queue.min_offset
        while offset < queue.visible_offset:
            try:
                chunk = self.store.read(queue, offset, READ_BYTES)
            except NotReadyError as error:
                raise BrokenPromise("views", f"{self.name}: {error.message}") from error
            if chunk.status is PullStatus.MOVED and offset < queue.min_offset:  # a queue is trimmed when it is read
                offset = queue.min_offset
                continue
            is_damage = bool(self.damage.hurt) and chunk.status is PullStatus.CORRUPT
            if chunk.next_offset <= offset or not (chunk.frames or is_damage):
                raise BrokenPromise("views", f"{self.name}: a read of {queue!r} at {offset} came to {chunk.status.name}.")
            for frame in chunk.frames:
                for header, batch in iter_batches(frame):
                    for index, body in enumerate(decode_records(header, batch).bodies):
                        yield header.base_offset + index, body
            offset = chunk.next_offset
