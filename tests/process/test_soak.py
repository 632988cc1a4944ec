"""The soak itself: its verdict notices what it is there for, a short one is clean, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.process.soak import BROKERS, PRODUCERS, draw
from tests.process.soak_player import Acknowledged, AnyReport, Claimed, Consumed, Failed, Released
from tests.process.soak_verdict import IN_HAND, Book, Verdict, judge
from zrmq.message import BatchSource, Message, MessageQueue

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without being told")

HERE = MessageQueue("t", "broker-a", 0)
THERE = MessageQueue("t", "broker-b", 0)


def stored(body: str, offset: int, queue: MessageQueue = HERE, sequence: int | None = None) -> Message:
    number = offset if sequence is None else sequence
    source = BatchSource(queue.topic, queue.broker_name, queue.queue_id, offset, 0, 0, 1, number)
    return Message(body.encode(), source, 0)


def acknowledged(message: Message) -> Acknowledged:
    return Acknowledged(0.0, message.body.decode(), message.queue, message.queue_offset, message.message_id, 0.0, False)


def told(message: Message, at_ms: float = 1.0) -> Consumed:
    return Consumed(at_ms, message.queue, message.queue_offset, message.body.decode())


def verdict_of(messages: list[Message], *reports: tuple[str, AnyReport], stops: dict[str, list[float]] | None = None) -> Verdict:
    """What is said of a group of `a` and `b` that reported this, with these messages in the log."""
    book, verdict = Book(), Verdict()
    book.read_by("a", "group")
    book.read_by("b", "group")
    book.stops.update(stops or {})
    for life, report in reports:
        book.take(life, report)
    judge(book, messages, ["group"], verdict)
    return verdict


def kinds(verdict: Verdict) -> list[str]:
    return [problem.partition(":")[0] for problem in verdict.problems]


FIRST, SECOND = stored("p:group:g:1", 0), stored("p:group:g:2", 1)
CLAIM: tuple[str, AnyReport] = ("a", Claimed(0.0, HERE, 1))
GOOD: list[tuple[str, AnyReport]] = [
    ("p", acknowledged(FIRST)), ("p", acknowledged(SECOND)), CLAIM, ("a", told(FIRST)), ("a", told(SECOND)),
]


def test_all_is_well() -> None:
    verdict = verdict_of([FIRST, SECOND], *GOOD)
    assert verdict.problems == []
    assert (verdict.acknowledged, verdict.read_back, verdict.missed) == (2, 2, {"group": 0})


def test_losses() -> None:
    assert kinds(verdict_of([FIRST], *GOOD)) == ["lost", "phantom"]
    assert kinds(verdict_of([FIRST, stored("p:group:g:3", 1)], *GOOD)) == ["lost", "missed", "phantom"]
    assert kinds(verdict_of([SECOND], *GOOD)) == ["lost", "hole", "phantom"]
    assert kinds(verdict_of([FIRST, SECOND], *GOOD[:-1])) == ["missed"]


def test_copies() -> None:
    again = stored("p:group:g:1", 0, THERE, sequence=0)
    reports: list[tuple[str, AnyReport]] = [*GOOD, ("a", Claimed(0.0, THERE, 1)), ("a", told(again))]
    assert kinds(verdict_of([FIRST, SECOND, again], *reports)) == ["doubled"]
    free, copy = stored("p:send:-:1", 0), stored("p:send:-:1", 0, THERE, sequence=0)
    verdict = verdict_of([free, copy], CLAIM, ("a", told(free)), ("a", Claimed(0.0, THERE, 1)), ("a", told(copy)))
    assert (verdict.problems, verdict.moved) == ([], 1)


def test_order() -> None:
    behind = [stored("p:bound:0:2", 0), stored("p:bound:0:1", 1)]
    assert kinds(verdict_of(behind, CLAIM, *(("a", told(message)) for message in behind))) == ["order"]
    assert kinds(verdict_of([FIRST, SECOND], *GOOD, ("a", told(FIRST)))) == ["order"]
    anew = verdict_of([FIRST, SECOND], *GOOD, ("a", Released(2.0, HERE)), ("a", Claimed(3.0, HERE, 2)), ("a", told(FIRST, 4.0)))
    assert (anew.problems, anew.repeated) == ([], {"group": 1})


def test_what_was_said_not_to_be_stored() -> None:
    assert kinds(verdict_of([FIRST, SECOND], *GOOD, ("p", Failed(0.0, "p:group:g:2", "UnreachableError")))) == ["stored"]
    assert kinds(verdict_of([FIRST, SECOND], *GOOD, ("p", Failed(0.0, "p:group:g:2", "RequestTimeoutError")))) == []


def test_two_owners_but_for_what_was_in_hand_when_a_process_was_stopped() -> None:
    messages = [stored(f"p:send:-:{number}", number) for number in range(2 * IN_HAND)]
    theirs: list[tuple[str, AnyReport]] = [("b", Claimed(5.0, HERE, 2)), *(("b", told(message, 6.0)) for message in messages)]
    late: list[tuple[str, AnyReport]] = [("a", told(message, 20.0)) for message in messages]
    assert kinds(verdict_of(messages, CLAIM, *theirs, late[0])) == ["owners"]
    in_hand = verdict_of(messages, CLAIM, *theirs, *late[:IN_HAND], stops={"a": [19.0]})
    assert (in_hand.problems, in_hand.late_in_hand) == ([], IN_HAND)
    assert verdict_of(messages, CLAIM, *theirs, *late, stops={"a": [19.0]}).two_owners == IN_HAND
    assert kinds(verdict_of(messages, CLAIM, *theirs, late[0], stops={"a": [4.0]})) == ["owners"], "it went on before"


def test_the_seed_says_what_happens_and_nobody_has_two_faults_at_once() -> None:
    faults = list(draw(random.Random(7), 600, has_disks=True))
    assert faults == list(draw(random.Random(7), 600, has_disks=True))
    assert len({fault.kind for fault in faults}) == 9
    assert not any(fault.kind.startswith("fill") for fault in draw(random.Random(7), 600, has_disks=False))
    for name in (*BROKERS, *PRODUCERS):
        times = [(fault.at_s, fault.at_s + fault.lasts_s) for fault in faults if name in (fault.target, fault.victim)]
        assert all(ended < begun for (_, ended), (begun, _) in pairwise(times))


# --- real ones ----------------------------------------------------------------------------------------------------------


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.process.soak", *options], stdout=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )


def read_until(soak: subprocess.Popen[str], is_wanted: Callable[[str], bool]) -> None:
    assert soak.stdout is not None
    assert any(is_wanted(line) for line in soak.stdout)


@on_linux
@pytest.mark.timeout(150)
def test_a_short_soak_is_clean(tmp_path: Path) -> None:
    soak = start(tmp_path, "--minutes", "0.25", "--seed", "3", "--json")
    out, _ = soak.communicate(timeout=140)
    verdict = json.loads(out.splitlines()[-1])
    assert (soak.returncode, verdict["problems"]) == (0, [])
    assert verdict["read_back"] >= verdict["acknowledged"] > 0
    assert sum(verdict["faults"].values()) > 0
    assert list(tmp_path.iterdir()) == []


@on_linux
@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    soak = start(tmp_path, "--minutes", "1", "--seed", "3")
    read_until(soak, lambda line: "everybody is there" in line)
    children = psutil.Process(soak.pid).children(recursive=True)
    assert len(children) == 11
    soak.send_signal(number)
    soak.communicate(timeout=60)
    assert soak.returncode == 130
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == [], "no file, and no disk"
