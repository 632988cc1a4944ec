"""Real processes under faults for minutes, then a verdict: was anything lost, doubled, out of order, missed, or owned by two?

    python -m tests.process.soak --minutes 3 --seed 1 [--json] [--data DIR]

Two NameServers, two brokers, two producers that send in every way, a clustering group of three and a broadcasting group of two,
each a process of its own. The seed says who is killed, stopped (SIGSTOP), restarted, cut off, or gets a full disk, and when;
which moment of their work that meets is luck. In the end everything is healed and read back. Exit code 0 only if every promise
held; 130 after Ctrl-C. Nothing is left behind, unless a folder is given. Needs Linux; full disks need root.
"""

from __future__ import annotations

import argparse
import heapq
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import zrmq
from tests.process import small_disk
from tests.process.soak_cast import SORTERS_GROUP, Cast
from tests.process.soak_player import TOPICS, now_ms
from tests.process.soak_verdict import Verdict, judge

NAMESERVERS = ("nameserver-1", "nameserver-2")
BROKERS = ("broker-a", "broker-b")
PRODUCERS = ("producer-1", "producer-2")
SORTERS = ("sorter-1", "sorter-2", "sorter-3")
SCREENS = ("screen-1", "screen-2")
SETTLED_S = 3.0  # before the first fault
GAPS_S = (0.3, 6.0)  # between the beginnings of two faults
AGAIN_S = 0.5  # between two looks whether a producer has its last answers
NETWORK_FAULTS = ("cut", "stall", "freeze", "delay")
DISK_FAULTS = ("fill", "fill+kill")
LASTS_S = {
    "kill": (0.0, 8.0), "restart": (0.0, 3.0), "pause": (0.1, 15.0), "cut": (0.2, 12.0), "stall": (0.2, 12.0),
    "freeze": (0.2, 12.0), "delay": (2.0, 10.0), "fill": (2.0, 10.0), "fill+kill": (4.0, 10.0),
}
Say = Callable[[str], None]


class Fault(msgspec.Struct, frozen=True):
    """Something bad that begins and ends. `victim`: who alone meets it, for faults of the network."""

    at_s: float
    kind: str
    target: str
    lasts_s: float
    victim: str = ""
    delay_ms: float = 0.0

    def __str__(self) -> str:
        whom = f" for {self.victim}" if self.victim else ""
        amount = f" by {self.delay_ms:.0f} ms" if self.delay_ms else ""
        return f"{self.kind} {self.target}{whom}{amount}, {self.lasts_s:.1f} s"


def draw(rng: random.Random, seconds: float, *, has_disks: bool) -> Iterator[Fault]:
    """The faults of a run, by their beginnings; all end within the time. Nobody has two at once."""
    busy_until: dict[str, float] = {}
    at_s = SETTLED_S
    while (at_s := at_s + rng.uniform(*GAPS_S)) < seconds:
        kind = rng.choices(["kill", "restart", "pause", *NETWORK_FAULTS, *DISK_FAULTS], [6, 2, 5, 2, 2, 2, 1, 1, 1])[0]
        servers = NAMESERVERS + BROKERS * 2
        everybody = servers + PRODUCERS + SORTERS + SCREENS
        target = rng.choice(servers if kind in NETWORK_FAULTS else BROKERS if kind in DISK_FAULTS else everybody)
        victim = rng.choice(PRODUCERS + SORTERS + SCREENS) if kind in NETWORK_FAULTS[:3] and rng.random() < 0.5 else ""
        lasts_s = rng.uniform(*LASTS_S[kind])
        delay_ms = rng.uniform(5, 300) if kind == "delay" else 0.0
        involved = [target, *([victim] if victim else [])]
        is_free = all(busy_until.get(name, 0.0) < at_s for name in involved)
        if is_free and at_s + lasts_s < seconds and (has_disks or kind not in DISK_FAULTS):
            busy_until.update(dict.fromkeys(involved, at_s + lasts_s))
            yield Fault(at_s, kind, target, lasts_s, victim, delay_ms)


def begin(cast: Cast, fault: Fault) -> None:
    """Do it."""
    if fault.kind == "kill":
        cast.kill(fault.target)
    elif fault.kind == "restart" and fault.target in NAMESERVERS + BROKERS:
        cast.stop(fault.target)
    elif fault.kind == "restart":
        cast.dismiss(fault.target)
    elif fault.kind == "pause":
        cast.pause(fault.target)
    elif fault.kind == "delay":
        cast.delay(fault.target, fault.delay_ms)
    elif fault.kind in DISK_FAULTS:
        cast.disk(fault.target).fill()
        if fault.kind == "fill+kill":
            cast.kill(fault.target)
            cast.start(fault.target)
    else:
        cast.network(fault.target, fault.kind, fault.victim)  # type: ignore[arg-type]  # the rest are the proxy's


def end(cast: Cast, fault: Fault) -> bool:
    """Undo it. False: not yet, it takes longer than was drawn."""
    if fault.target in cast.leaving:
        if not cast.has_left(fault.target):
            return False
        cast.stop(fault.target)
    if fault.kind in ("kill", "restart"):
        cast.start(fault.target)
    elif fault.kind == "pause":
        cast.resume(fault.target)
    elif fault.kind == "delay":
        cast.delay(fault.target, 0)
    elif fault.kind in DISK_FAULTS:
        cast.disk(fault.target).free()
    else:
        cast.network(fault.target, "open")
    return True


# --- a run --------------------------------------------------------------------------------------------------------------


def run(folder: Path, seconds: float, seed: int, say: Say, *, has_disks: bool) -> Verdict:
    """One soak. Raises when the cluster does not even come up."""
    verdict = Verdict(seed=seed, seconds=seconds)
    with Cast(folder, has_disks=has_disks) as cast:
        cast.raise_curtain(NAMESERVERS, BROKERS, SORTERS, SCREENS, PRODUCERS)
        say(f"seed {seed}: everybody is there; faults for {seconds:.0f} s")
        _play(cast, list(draw(random.Random(seed), seconds, has_disks=has_disks)), verdict, say)
        settle(cast, verdict, say)
    return verdict


def _play(cast: Cast, faults: list[Fault], verdict: Verdict, say: Say) -> None:
    """Begin and end every fault when its time has come."""
    started_ms = now_ms()
    events: list[tuple[float, int, bool, Fault]] = []
    for number, fault in enumerate(faults):
        heapq.heappush(events, (fault.at_s, number, True, fault))
    while events:
        at_s, number, is_beginning, fault = heapq.heappop(events)
        cast.feed(max(at_s - (now_ms() - started_ms) / 1000, 0.01))
        if is_beginning and cast.leaving.isdisjoint((fault.target, fault.victim)):
            say(f"{(now_ms() - started_ms) / 1000:6.1f} s  {fault}")
            verdict.faults[fault.kind] = verdict.faults.get(fault.kind, 0) + 1
            begin(cast, fault)
            heapq.heappush(events, (at_s + fault.lasts_s, number, False, fault))
        elif not is_beginning and not end(cast, fault):
            heapq.heappush(events, (at_s + AGAIN_S, number, False, fault))


def settle(cast: Cast, verdict: Verdict, say: Say = lambda _: None) -> None:
    """Everything is healed: wait until it works again and all are through, read it back, end everybody, and judge."""
    _await_health(cast, verdict, say)
    for name in cast.producers:
        cast.stop(name)
    messages = _read_back(cast, verdict, say)
    judge(cast.book, messages, [SORTERS_GROUP], verdict)
    for name in [name for name in reversed(cast.members) if name not in cast.producers]:  # servers after who uses them
        cast.stop(name)
    verdict.problems += [*cast.problems, *cast.complaints()]
    verdict.memory_mib = {name: round(used / (1 << 20), 1) for name, used in sorted(cast.memory_bytes.items())}


def _await_health(cast: Cast, verdict: Verdict, say: Say) -> None:
    """Wait until new messages come through everywhere and each queue has one owner."""
    book, healed_ms = cast.book, now_ms()

    def is_flowing() -> bool:
        fresh = [report for report in book.acknowledged.values() if report.handed_over_ms > healed_ms]
        return all(
            any(report.body in got for report in fresh if report.queue.broker_name == broker)
            for broker in cast.brokers for got in book.bodies.values()
        )

    if cast.wait(lambda: cast.is_owned() and is_flowing()):
        verdict.healthy_after_s = round((now_ms() - healed_ms) / 1000, 2)
        say(f"healthy {verdict.healthy_after_s} s after the last fault")
    else:
        unowned = {str(queue): who for queue, who in book.owners(SORTERS_GROUP).items() if len(who) != 1}
        verdict.problems.append(f"unhealthy: after a minute; flowing: {is_flowing()}; queues without one owner: {unowned}")


def _read_back(cast: Cast, verdict: Verdict, say: Say) -> list[zrmq.Message]:
    """Everything in the logs, when everybody has got it, or patience is at its end."""
    cast.wait(lambda: not any(cast.book.missing(cast.book.acknowledged).values()))
    messages: list[zrmq.Message] = []
    with zrmq.connect(cast.nameservers) as fabric:
        for topic in TOPICS:
            left = sum(queue.max_offset for info in fabric.admin().topic(topic).values() for queue in info.queues)
            reader = fabric.pull_consumer(None, topic, consume_from=zrmq.ConsumeFrom.EARLIEST)
            while left > 0 and (got := reader.poll(timeout_ms=10_000)):
                messages += got
                left -= len(got)
            if left:
                verdict.problems.append(f"unread: {left} messages of {topic} cannot be read back")
    cast.wait(lambda: not any(cast.book.missing(message.body.decode() for message in messages).values()))
    say(f"{len(messages):,} messages read back")
    return messages


# --- the script ---------------------------------------------------------------------------------------------------------


def show(verdict: Verdict) -> str:
    """The verdict for a person."""
    lines = [
        f"seed {verdict.seed}, {verdict.seconds:.0f} s, faults: {_list(verdict.faults)}",
        f"acknowledged {verdict.acknowledged:,}, read back {verdict.read_back:,}, recognized as sent again"
        f" {verdict.duplicates_recognized:,}, not acknowledged: {_list(verdict.failed)}",
        f"lost {verdict.lost}, doubled in the log {verdict.doubled} (moved to the other broker: {verdict.moved}),"
        f" out of order {verdict.out_of_order}, missed: {_list(verdict.missed)}",
        f"two owners {verdict.two_owners} (in hand when stopped: {verdict.late_in_hand}), repeated: {_list(verdict.repeated)}",
        f"healthy after {verdict.healthy_after_s} s; most memory in MiB: {_list(verdict.memory_mib)}",
        *(f"- {problem}" for problem in verdict.problems),
        f"{len(verdict.problems)} problems" if verdict.problems else "Good: every promise held.",
    ]
    return "\n".join(lines)


def _list(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none"


def _interrupt(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # one is enough: what follows is cleaning up
    raise KeyboardInterrupt


def main() -> int:
    """The script; exit code 0 only when every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object for each fault, and one for the verdict")
    parser.add_argument("--data", type=Path, help="folder for logs, kept, and for data, which is not; a temporary one otherwise")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("needs Linux: elsewhere there is no 127.0.0.2 for the proxies")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)

    def say(line: str) -> None:
        print(msgspec.json.encode({"line": line}).decode() if options.json else line, flush=True)

    if why := small_disk.why_not():
        say(f"no full disks: {why}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.data or Path(temporary)
            verdict = run(folder, options.minutes * 60, options.seed, say, has_disks=not why)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(msgspec.json.encode(verdict).decode() if options.json else show(verdict), flush=True)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
