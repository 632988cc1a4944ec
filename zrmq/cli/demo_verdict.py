"""The demo's verdict: from what was sent, stored and reported to what was lost, doubled, overtaken or owned by two at once. Pure.

A `Ledger` collects while the demo runs, `judge` reads it at the end. A reading is (sensor, number), numbers counting from 1 for
each sensor. What each group has to show:

- a clustering group, as a whole, consumed every stored reading; a broadcasting group did so in every one of its instances;
- within one tenure (from acquiring a queue to losing it) a sensor's numbers only rise; and over all tenures no number comes for
  the first time after a greater one. So a killed worker's last readings may come again, but nothing may be overtaken;
- the tenures of one queue by different workers do not overlap, and what the brokers say of their leases does not contradict them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from zrmq.cli.demo_reports import Acquired, AnyReport, Consumed, Joining, Ready, Released

EXAMPLES_MAX = 3  # different reasons in one sentence

ReadingKey = tuple[str, int]  # sensor, number


class Worker(msgspec.Struct, frozen=True):
    """One consumer process of the demo."""

    name: str
    group: str
    clustering: bool


class Tenure(msgspec.Struct, gc=False):
    """One worker's time with one queue; `until_ms` is infinite while it lasts."""

    worker: str
    group: str
    queue: str
    lease_epoch: int
    from_ms: float
    until_ms: float = math.inf


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One message at one worker. `tenure`: None when the worker had not reported the queue as its own."""

    at_ms: float
    reading: ReadingKey
    place: tuple[str, int]  # queue and offset
    tenure: Tenure | None


class LeaseSeen(msgspec.Struct, frozen=True, gc=False):
    """What a broker said of a lease, at some moment between `asked_ms` and `answered_ms`."""

    asked_ms: float
    answered_ms: float
    group: str
    queue: str
    client_id: str
    lease_epoch: int


class Ledger:
    """Everything the verdict and the view need to know, as it comes in. One thread."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.client_ids: dict[str, str] = {}  # client id -> worker
        self.numbers: Counter[str] = Counter()  # last number of each sensor
        self.stored: set[ReadingKey] = set()
        self.refused: list[str] = []
        self.deliveries: dict[str, list[Delivery]] = {name: [] for name in self.workers}
        self.tenures: list[Tenure] = []
        self.leases: list[LeaseSeen] = []
        self.events: list[tuple[float, str]] = []  # what made the clustering group share anew: when, what
        self.crashes: list[str] = []
        self.ready: set[str] = set()
        self.last_report_ms = 0.0
        self._open: dict[tuple[str, str], Tenure] = {}  # (worker, queue)
        self._readers: dict[tuple[str, str], set[ReadingKey]] = {_reader(worker): set() for worker in workers}

    @property
    def sent_count(self) -> int:
        return sum(self.numbers.values())

    def number(self, sensor: str) -> int:
        """The number of the reading that is about to be sent."""
        self.numbers[sensor] += 1
        return self.numbers[sensor]

    def consumed_count(self, group: str) -> int:
        """Deliveries in a group so far, repeated ones too."""
        return sum(len(self.deliveries[worker.name]) for worker in self.workers.values() if worker.group == group)

    @property
    def missing_count(self) -> int:
        """Stored readings that have not come yet, where most are missing."""
        return max(len(self.stored - seen) for seen in self._readers.values())

    def owners(self) -> dict[str, list[str]]:
        """Who owns each queue now, by the clustering workers' own word."""
        owners: dict[str, list[str]] = defaultdict(list)
        for tenure in self._open.values():
            if self.workers[tenure.worker].clustering:
                owners[tenure.queue].append(tenure.worker)
        return owners

    def take(self, worker: str, report: AnyReport) -> None:
        """One report of a worker; each worker's in its order."""
        self.last_report_ms = max(self.last_report_ms, report.at_ms)
        if isinstance(report, Consumed):
            tenure = self._open.get((worker, report.queue))
            place = (report.queue, report.queue_offset)
            reading = (report.sensor, report.number)
            self.deliveries[worker].append(Delivery(report.at_ms, reading, place, tenure))
            self._readers[_reader(self.workers[worker])].add(reading)
        elif isinstance(report, Acquired):
            self._end(worker, report.queue, report.at_ms)
            tenure = Tenure(worker, self.workers[worker].group, report.queue, report.lease_epoch, report.at_ms)
            self._open[worker, report.queue] = tenure
            self.tenures.append(tenure)
        elif isinstance(report, Released):
            self._end(worker, report.queue, report.at_ms)
        elif isinstance(report, Joining):
            self.client_ids[report.client_id] = worker
            if self.workers[worker].clustering:
                self.events.append((report.at_ms, f"{worker} joins"))
        elif isinstance(report, Ready):
            self.ready.add(worker)

    def finish(self, at_ms: float) -> None:
        """Everybody is about to be told to end: from here on, who owns what does not matter."""
        for worker in self.workers:
            self.gone(worker, at_ms, killed=False)

    def gone(self, worker: str, at_ms: float, *, killed: bool) -> None:
        """The worker's process ended at this time: it owns nothing from then on."""
        for name, queue in [key for key in self._open if key[0] == worker]:
            self._end(name, queue, at_ms)
        if killed:
            self.events.append((at_ms, f"{worker} is killed"))

    def _end(self, worker: str, queue: str, at_ms: float) -> None:
        tenure = self._open.pop((worker, queue), None)
        if tenure is not None:
            tenure.until_ms = at_ms


def _reader(worker: Worker) -> tuple[str, str]:
    """Group and instance that have to have everything: a clustering group as a whole, a broadcasting one in each instance."""
    return (worker.group, "" if worker.clustering else worker.name)


# --- the verdict ------------------------------------------------------------------------------------------------------


class GroupVerdict(msgspec.Struct, frozen=True):
    """What one group, or one instance of a broadcasting group, got."""

    group: str
    instance: str  # empty for a clustering group: it is judged as a whole
    consumed: int  # deliveries
    distinct: int  # readings
    lost: int
    duplicated: int
    order_violations: int
    without_ownership: int  # deliveries from queues not acquired; clustering only


class Rebalance(msgspec.Struct, frozen=True):
    """From an event to the last change of owner it led to."""

    cause: str
    took_ms: float
    queue_count: int  # that got an owner


class Verdict(msgspec.Struct, frozen=True):
    """The demo's result; `faults` has a sentence for each thing that went wrong."""

    sent: int
    stored: int
    stored_twice: int
    groups: list[GroupVerdict]
    ownership_overlaps: list[str]
    lease_conflicts: list[str]
    rebalances: list[Rebalance]
    faults: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, order held and every queue had one owner at a time."""
        return not self.faults


def judge(ledger: Ledger) -> Verdict:
    """The verdict on all that was collected. Call it when every worker has ended or was killed."""
    groups = [_judge_readers(ledger, readers) for readers in _readers(ledger)]
    clustered = [tenure for tenure in ledger.tenures if ledger.workers[tenure.worker].clustering]
    overlaps = find_overlaps(clustered)
    conflicts = find_lease_conflicts(clustered, ledger.leases, ledger.client_ids)
    twice = count_stored_twice(delivery for deliveries in ledger.deliveries.values() for delivery in deliveries)
    faults = ledger.crashes + _sending_faults(ledger, twice) + [fault for group in groups for fault in _group_faults(group)]
    faults += [f"Two owners at once: {overlap}." for overlap in overlaps]
    faults += [f"Leases contradict: {conflict}." for conflict in conflicts]
    rebalances = time_rebalances(ledger.events, clustered)
    return Verdict(ledger.sent_count, len(ledger.stored), twice, groups, overlaps, conflicts, rebalances, faults)


def _readers(ledger: Ledger) -> list[list[Worker]]:
    """The workers that have to have everything together."""
    together: dict[tuple[str, str], list[Worker]] = defaultdict(list)
    for worker in ledger.workers.values():
        together[_reader(worker)].append(worker)
    return list(together.values())


def _judge_readers(ledger: Ledger, readers: list[Worker]) -> GroupVerdict:
    deliveries = [delivery for worker in readers for delivery in ledger.deliveries[worker.name]]
    distinct = {delivery.reading for delivery in deliveries}
    return GroupVerdict(
        group=readers[0].group,
        instance=_reader(readers[0])[1],
        consumed=len(deliveries),
        distinct=len(distinct),
        lost=len(ledger.stored - distinct),
        duplicated=len(deliveries) - len(distinct),
        order_violations=count_order_violations(deliveries),
        without_ownership=sum(1 for delivery in deliveries if delivery.tenure is None) if readers[0].clustering else 0,
    )


def count_order_violations(deliveries: Iterable[Delivery]) -> int:
    """Deliveries of one reader that came too late: see the rule on top of this file."""
    highest: Counter[str] = Counter()
    last: Counter[tuple[str, int]] = Counter()  # (sensor, tenure)
    seen: set[ReadingKey] = set()
    violations = 0
    for delivery in sorted(deliveries, key=lambda delivery: delivery.at_ms):
        sensor, number = delivery.reading
        tenure = (sensor, id(delivery.tenure))
        overtaken = delivery.reading not in seen and number < highest[sensor]
        violations += overtaken or number <= last[tenure]
        seen.add(delivery.reading)
        highest[sensor] = max(highest[sensor], number)
        last[tenure] = max(last[tenure], number)
    return violations


def count_stored_twice(deliveries: Iterable[Delivery]) -> int:
    """Readings that lie at more than one place in the queues."""
    places: dict[ReadingKey, set[tuple[str, int]]] = defaultdict(set)
    for delivery in deliveries:
        places[delivery.reading].add(delivery.place)
    return sum(1 for found in places.values() if len(found) > 1)


def find_overlaps(tenures: Iterable[Tenure]) -> list[str]:
    """A sentence for each time that a worker got a queue before another one had lost it."""
    overlaps = []
    for (_, queue), ordered in _by_queue(tenures).items():
        holder = ordered[0]  # who keeps the queue longest of those so far
        for tenure in ordered[1:]:
            if tenure.from_ms < holder.until_ms and tenure.worker != holder.worker:
                how_long = min(tenure.until_ms, holder.until_ms) - tenure.from_ms
                overlaps.append(f"{queue} was {holder.worker}'s when {tenure.worker} got it, for {how_long:.1f} ms")
            holder = max(holder, tenure, key=lambda one: one.until_ms)
    return overlaps


def find_lease_conflicts(tenures: Sequence[Tenure], leases: Sequence[LeaseSeen], client_ids: dict[str, str]) -> list[str]:
    """A sentence for each contradiction between the workers' tenures and the leases that the brokers tell of."""
    return [*_epochs_that_fall(tenures), *_epochs_shared(leases), *_leases_of_others(tenures, leases, client_ids)]


def _epochs_that_fall(tenures: Iterable[Tenure]) -> list[str]:
    """A later owner has to have a greater epoch; the same worker may go on under its old one."""
    return [
        f"{queue} went from {before.worker} under epoch {before.lease_epoch} to {after.worker} under {after.lease_epoch}"
        for (_, queue), ordered in _by_queue(tenures).items()
        for before, after in pairwise(ordered)
        if after.lease_epoch < before.lease_epoch
        or (after.lease_epoch == before.lease_epoch and after.lease_epoch and after.worker != before.worker)
    ]


def _epochs_shared(leases: Iterable[LeaseSeen]) -> list[str]:
    holders: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for lease in leases:
        holders[lease.group, lease.queue, lease.lease_epoch].add(lease.client_id)
    return [
        f"the broker of {queue} gave epoch {epoch} to {' and '.join(sorted(clients))}"
        for (_, queue, epoch), clients in holders.items() if len(clients) > 1
    ]


def _leases_of_others(tenures: Iterable[Tenure], leases: Iterable[LeaseSeen], client_ids: dict[str, str]) -> list[str]:
    """A worker that held a queue from before a broker was asked until after it answered is whom the broker must name."""
    ordered = _by_queue(tenures)
    return [
        f"{tenure.worker} read {lease.queue} while its broker says {client_ids.get(lease.client_id, lease.client_id)} holds it"
        for lease in leases
        for tenure in ordered.get((lease.group, lease.queue), ())
        if tenure.from_ms <= lease.asked_ms and lease.answered_ms <= tenure.until_ms
        and client_ids.get(lease.client_id) != tenure.worker
    ]


def _by_queue(tenures: Iterable[Tenure]) -> dict[tuple[str, str], list[Tenure]]:
    """Tenures of each (group, queue) in the order they began."""
    queues: dict[tuple[str, str], list[Tenure]] = defaultdict(list)
    for tenure in sorted(tenures, key=lambda tenure: tenure.from_ms):
        queues[tenure.group, tenure.queue].append(tenure)
    return queues


def time_rebalances(events: Iterable[tuple[float, str]], tenures: Sequence[Tenure]) -> list[Rebalance]:
    """How long after each event the last queue changed hands, the next event aside."""
    ordered = sorted(events)
    rebalances = []
    for (at_ms, cause), (next_ms, _) in pairwise([*ordered, (math.inf, "")]):
        acquired = [tenure.from_ms for tenure in tenures if at_ms <= tenure.from_ms < next_ms]
        if acquired:
            rebalances.append(Rebalance(cause, round(max(acquired) - at_ms, 1), len(acquired)))
    return rebalances


# --- in words ---------------------------------------------------------------------------------------------------------


def _sending_faults(ledger: Ledger, stored_twice: int) -> list[str]:
    faults = []
    if not ledger.sent_count:
        faults.append("Nothing was sent.")
    missing = ledger.sent_count - len(ledger.stored)
    if missing:
        reasons = " ".join(list(dict.fromkeys(ledger.refused))[:EXAMPLES_MAX]) or "No receipt came."
        faults.append(f"{missing} of {ledger.sent_count} readings were not stored. {reasons}")
    if stored_twice:
        faults.append(f"{stored_twice} readings lie in the queues twice.")
    return faults


def _group_faults(group: GroupVerdict) -> list[str]:
    who = f"{group.group} ({group.instance})" if group.instance else group.group
    counts = (
        (group.lost, "stored readings never came"),
        (group.order_violations, "readings came after a later one of their sensor"),
        (group.without_ownership, "readings came from queues the worker had not acquired"),
    )
    return [f"{who}: {count} {what}." for count, what in counts if count]
