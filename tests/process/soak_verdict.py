"""The soak's verdict: from what players reported and what the logs have in the end to what was promised and not kept. Pure.

A player that was killed comes back under a new life (`sorter-1#2`): nothing is expected of what its former one had in hand, but
all that it had reported counts. What every group has to show:

- a clustering group as a whole, and every instance of a broadcasting one, got every message that is in the logs, as it is there;
- within one tenure (from claiming a queue to losing it) offsets only rise;
- nobody hands a message to its listener when another has claimed the queue under a later lease. Repetitions are allowed: a crash
  may come between a listener's return and the commit. So are the few messages that a listener had in hand when its process was
  stopped: no process can know that it was.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec

from tests.process.soak_player import Acknowledged, AnyReport, Claimed, Consumed, Ended, Failed, Ready, Released
from zrmq.message import Message, MessageQueue

IN_HAND = 9  # messages that a listener may still get after a stop: it looks at the clock every 8
ORDERED_KINDS = ("group", "batch", "bound")
EXAMPLES_MAX = 5  # sentences of one kind of problem


class Tenure(msgspec.Struct, gc=False):
    """One life's time with one queue."""

    life: str
    queue: MessageQueue
    epoch: int
    from_ms: float
    until_ms: float = math.inf
    last_offset: int = -1


class Verdict(msgspec.Struct):
    """Numbers for a person. `problems` are sentences; none means that every promise held."""

    seed: int = 0
    seconds: float = 0.0
    faults: dict[str, int] = {}
    acknowledged: int = 0
    duplicates_recognized: int = 0
    failed: dict[str, int] = {}
    read_back: int = 0
    lost: int = 0
    doubled: int = 0
    moved: int = 0  # stored at two brokers, as a message of no lane may be when its first one stays away
    out_of_order: int = 0
    missed: dict[str, int] = {}
    repeated: dict[str, int] = {}
    two_owners: int = 0
    late_in_hand: int = 0
    healthy_after_s: float = -1.0
    memory_mib: dict[str, float] = {}
    problems: list[str] = []

    def blame(self, kind: str, sentence: str) -> None:
        """Remember a problem, but not thousands of one kind."""
        have = sum(problem.startswith(kind + ": ") for problem in self.problems)
        if have < EXAMPLES_MAX:
            self.problems.append(f"{kind}: {sentence}")


class Book:
    """All that was reported, as it comes in. A *reader* has to get everything: a clustering group, or an instance."""

    def __init__(self) -> None:
        self.readers: dict[str, str] = {}  # from a consumer's name
        self.acknowledged: dict[str, Acknowledged] = {}
        self.failed: dict[str, str] = {}
        self.consumed: dict[str, Counter[tuple[MessageQueue, int, str]]] = {}
        self.bodies: dict[str, set[str]] = {}
        self.tenures: dict[tuple[str, MessageQueue], list[Tenure]] = defaultdict(list)
        self.deliveries: list[tuple[Consumed, Tenure]] = []
        self.stops: dict[str, list[float]] = defaultdict(list)  # when a life went on after it was stopped
        self.ready: set[str] = set()
        self.ended: set[str] = set()
        self.problems: list[tuple[str, str]] = []
        self.disordered = 0
        self._last: dict[tuple[str, MessageQueue], Tenure] = {}

    def read_by(self, consumer: str, reader: str) -> None:
        """From now on the consumer's messages count for the reader."""
        self.readers[consumer] = reader
        self.consumed.setdefault(reader, Counter())
        self.bodies.setdefault(reader, set())

    def take(self, life: str, report: AnyReport) -> None:
        """One report of one life, each life's in their order."""
        if isinstance(report, Consumed):
            self._consume(life, report)
        elif isinstance(report, Acknowledged):
            self.acknowledged[report.body] = report
        elif isinstance(report, Claimed):
            self._close(life, report.queue, report.at_ms)
            tenure = self._last[life, report.queue] = Tenure(life, report.queue, report.epoch, report.at_ms)
            self.tenures[self._reader(life), report.queue].append(tenure)
        elif isinstance(report, Released):
            self._close(life, report.queue, report.at_ms)
        elif isinstance(report, Failed):
            self.failed[report.body] = report.error
        elif isinstance(report, Ready):
            self.ready.add(life)
        elif isinstance(report, Ended):
            self.ended.add(life)

    def gone(self, life: str, at_ms: float) -> None:
        """A life has ended; it owns nothing any more."""
        for key in [key for key in self._last if key[0] == life]:
            self._close(*key, at_ms)

    def owners(self, reader: str) -> dict[MessageQueue, list[str]]:
        """Who owns each queue by their own word."""
        found: dict[MessageQueue, list[str]] = {}
        for (name, queue), tenures in self.tenures.items():
            if name == reader:
                found[queue] = [tenure.life for tenure in tenures if tenure.until_ms == math.inf]
        return found

    def missing(self, bodies: Iterable[str]) -> dict[str, set[str]]:
        """By reader, which of these messages have not come yet."""
        wanted = set(bodies)
        return {reader: wanted - got for reader, got in self.bodies.items()}

    def _reader(self, life: str) -> str:
        return self.readers[life.partition("#")[0]]

    def _close(self, life: str, queue: MessageQueue, at_ms: float) -> None:
        tenure = self._last.get((life, queue))
        if tenure is not None:
            tenure.until_ms = min(tenure.until_ms, at_ms)

    def _consume(self, life: str, report: Consumed) -> None:
        reader = self._reader(life)
        self.consumed[reader][report.queue, report.offset, report.body] += 1
        self.bodies[reader].add(report.body)
        tenure = self._last.get((life, report.queue))
        if tenure is None:
            self.problems.append(("unclaimed", f"{life} got {report.body} of {report.queue}, which it had not claimed"))
            return
        if report.offset <= tenure.last_offset:
            self.disordered += 1
            self.problems.append(("order", f"{life} got offset {report.offset} of {report.queue} after {tenure.last_offset}"))
        tenure.last_offset = max(tenure.last_offset, report.offset)
        self.deliveries.append((report, tenure))


def judge(book: Book, messages: list[Message], clustering: Iterable[str], verdict: Verdict) -> None:
    """Fill the verdict. `messages`: everything in the logs, queue by queue. `clustering`: readers whose queues have one owner."""
    log = {(message.queue, message.queue_offset): message for message in messages}
    verdict.read_back = len(messages)
    verdict.acknowledged = len(book.acknowledged)
    verdict.duplicates_recognized = sum(report.is_duplicate for report in book.acknowledged.values())
    verdict.failed = dict(Counter(book.failed.values()))
    for kind, sentence in book.problems:
        verdict.blame(kind, sentence)
    verdict.out_of_order += book.disordered
    _judge_receipts(book, log, verdict)
    _judge_copies(messages, verdict)
    _judge_order(log, verdict)
    _judge_readers(book, log, verdict)
    for reader in clustering:
        _judge_owners(book, reader, verdict)


def _judge_receipts(book: Book, log: dict[tuple[MessageQueue, int], Message], verdict: Verdict) -> None:
    for report in book.acknowledged.values():
        found = log.get((report.queue, report.offset))
        if found is None or found.body.decode() != report.body or found.message_id != report.message_id:
            verdict.lost += 1
            there = found.body if found else "nothing"
            verdict.blame("lost", f"{report.body} was acknowledged at {report.queue}@{report.offset}, where {there!r} is")
    bodies = {message.body.decode() for message in log.values()}
    for body, error in book.failed.items():
        if error == "UnreachableError" and body in bodies:
            verdict.blame("stored", f"{body} is stored, and its producer was told that it certainly is not")
    ends: dict[MessageQueue, int] = defaultdict(int)
    for queue, offset in log:
        ends[queue] = max(ends[queue], offset + 1)
    for queue, end in ends.items():
        holes = [offset for offset in range(end) if (queue, offset) not in log]
        if holes:
            verdict.blame("hole", f"{queue} has nothing at {holes[:EXAMPLES_MAX]}")


def _judge_copies(messages: list[Message], verdict: Verdict) -> None:
    places: dict[str, list[Message]] = defaultdict(list)
    for message in messages:
        places[message.message_id].append(message)
    for copies in places.values():
        if len(copies) == 1:
            continue
        brokers = {message.queue.broker_name for message in copies}
        body = copies[0].body.decode()
        if len(brokers) == len(copies) and body.split(":")[1] not in ORDERED_KINDS:
            verdict.moved += len(copies) - 1
        else:
            verdict.doubled += len(copies) - 1
            where = ", ".join(f"{message.queue}@{message.queue_offset}" for message in copies)
            verdict.blame("doubled", f"{body} is stored at {where}")


def _judge_order(log: dict[tuple[MessageQueue, int], Message], verdict: Verdict) -> None:
    last: dict[tuple[MessageQueue, str], int] = {}
    for (queue, offset), message in sorted(log.items(), key=lambda item: item[0]):
        lane, _, number = message.body.decode().rpartition(":")
        if lane.split(":")[1] in ORDERED_KINDS:
            before = last.get((queue, lane), 0)
            if int(number) <= before:
                verdict.out_of_order += 1
                verdict.blame("order", f"{lane}:{number} is at {queue}@{offset}, behind number {before}")
            last[queue, lane] = max(before, int(number))


def _judge_readers(book: Book, log: dict[tuple[MessageQueue, int], Message], verdict: Verdict) -> None:
    stored = {(*place, message.body.decode()) for place, message in log.items()}
    for reader, got in book.consumed.items():
        missed = stored - got.keys()
        verdict.missed[reader] = len(missed)
        verdict.repeated[reader] = got.total() - len(got)
        for place in sorted(missed)[:EXAMPLES_MAX]:
            verdict.blame("missed", f"{reader} did not get {place[2]} of {place[0]}@{place[1]}")
        for place in sorted(got.keys() - stored)[:EXAMPLES_MAX]:
            verdict.blame("phantom", f"{reader} got {place[2]} of {place[0]}@{place[1]}, which is not there")


def _judge_owners(book: Book, reader: str, verdict: Verdict) -> None:
    in_hand: Counter[tuple[str, MessageQueue, float]] = Counter()
    for report, tenure in book.deliveries:
        if book.readers[tenure.life.partition("#")[0]] != reader:
            continue
        resumed_ms = max((at_ms for at_ms in book.stops[tenure.life] if at_ms <= report.at_ms), default=0.0)
        in_hand[tenure.life, tenure.queue, resumed_ms] += 1
        for other in book.tenures[reader, report.queue]:
            if other.life != tenure.life and other.epoch >= tenure.epoch and other.from_ms < report.at_ms:
                if resumed_ms > other.from_ms and in_hand[tenure.life, tenure.queue, resumed_ms] <= IN_HAND:
                    verdict.late_in_hand += 1
                    break
                verdict.two_owners += 1
                verdict.blame(
                    "owners",
                    f"{tenure.life} (lease {tenure.epoch}) got {report.body} of {report.queue}@{report.offset}"
                    f" {report.at_ms - other.from_ms:.0f} ms after {other.life} had claimed it (lease {other.epoch})",
                )
                break
