"""Where jobs run: in the loop while they are quick, on a thread while they are not, one after the other in either case."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from zrmq.errors import ClosedError
from zrmq.store.flusher import ALWAYS_INLINE_MS, INLINE_BELOW_MS, NEVER_INLINE_MS, Flusher
from zrmq.store.job import Job
from zrmq.testing.clock import ManualClock

PATIENCE_S = 10.0


class Loop:
    """The loop's thread is the test's; what other threads post waits here."""

    def __init__(self) -> None:
        self.posted: deque[Callable[[], None]] = deque()
        self.is_closed = False
        self._arrived = threading.Semaphore(0)

    def post(self, call: Callable[[], None]) -> None:
        if self.is_closed:
            self._arrived.release()
            raise ClosedError("The loop has ended.")
        self.posted.append(call)
        self._arrived.release()

    def wait(self) -> None:
        """Wait for something to be posted."""
        assert self._arrived.acquire(timeout=PATIENCE_S)

    def turn(self) -> None:
        """Wait for something to be posted, and do it."""
        self.wait()
        self.posted.popleft()()


class Work(Job):
    """A job that takes a time, by the clock, and tells what happens to it."""

    def __init__(self, story: list[str], name: str = "job", takes_ms: float = 0, clock: ManualClock | None = None) -> None:
        self.story, self.name, self.takes_ms, self.clock = story, name, takes_ms, clock
        self.thread: threading.Thread | None = None
        self.may_run = threading.Event()
        self.may_run.set()

    def work(self) -> None:
        assert self.may_run.wait(PATIENCE_S)
        self.thread = threading.current_thread()
        if self.clock is not None:
            self.clock.advance(self.takes_ms)
        self.story.append(f"{self.name} runs")

    def finish(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.story.append(f"{self.name} finishes")


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def story() -> list[str]:
    return []


@pytest.fixture
def flusher(loop: Loop, clock: ManualClock) -> Iterator[Flusher]:
    made = Flusher(loop.post, clock)
    yield made
    made.close()


def test_quick_jobs_run_in_the_loop(flusher: Flusher, clock: ManualClock, story: list[str]) -> None:
    for _ in range(20):
        job = Work(story, takes_ms=0.3, clock=clock)
        flusher.start(job, lambda: story.append("told"))
        assert job.thread is threading.main_thread()
    assert story[:3] == ["job runs", "job finishes", "told"]
    assert (flusher.inline_count, flusher.thread_count, flusher.is_busy) == (20, 0, False)
    assert 0.2 < flusher.average_ms < INLINE_BELOW_MS


def test_slow_jobs_move_to_a_thread_and_quick_ones_back(
    flusher: Flusher, loop: Loop, clock: ManualClock, story: list[str]
) -> None:
    flusher.start(Work(story, takes_ms=20, clock=clock), lambda: None)
    assert flusher.average_ms > INLINE_BELOW_MS
    job = Work(story, takes_ms=20, clock=clock)
    flusher.start(job, lambda: None)
    loop.turn()
    assert job.thread is not threading.main_thread()
    on_thread = 0
    while flusher.average_ms >= INLINE_BELOW_MS:
        flusher.start(Work(story, takes_ms=0.1, clock=clock), lambda: None)
        loop.turn()
        on_thread += 1
        assert on_thread < 50, "the average is taken on the thread too"
    job = Work(story, takes_ms=0.1, clock=clock)
    flusher.start(job, lambda: None)
    assert job.thread is threading.main_thread()


def test_the_loop_goes_on_while_a_job_runs(loop: Loop, clock: ManualClock, story: list[str]) -> None:
    flusher = Flusher(loop.post, clock, NEVER_INLINE_MS)
    job = Work(story)
    job.may_run.clear()
    flusher.start(job, lambda: story.append("told"))
    assert flusher.is_busy
    assert story == []
    job.may_run.set()
    loop.wait()
    assert flusher.is_busy, "until it is finished on the loop's thread"
    assert story == ["job runs"]
    loop.posted.popleft()()
    assert story == ["job runs", "job finishes", "told"]
    assert not flusher.is_busy
    flusher.close()


def test_jobs_keep_their_order(loop: Loop, clock: ManualClock, story: list[str]) -> None:
    flusher = Flusher(loop.post, clock, NEVER_INLINE_MS)
    for name in ("one", "two", "three"):
        flusher.start(Work(story, name), lambda: None)
    while flusher.is_busy:
        loop.turn()
    assert [line for line in story if line.endswith("runs")] == ["one runs", "two runs", "three runs"]
    assert [line for line in story if line.endswith("finishes")] == ["one finishes", "two finishes", "three finishes"]
    flusher.close()


def test_a_quick_job_does_not_overtake_a_slow_one(flusher: Flusher, loop: Loop, story: list[str]) -> None:
    flusher.average_ms = 99
    slow = Work(story, "slow")
    slow.may_run.clear()
    flusher.start(slow, lambda: None)
    flusher.average_ms = 0
    flusher.start(Work(story, "quick"), lambda: None)
    slow.may_run.set()
    while flusher.is_busy:
        loop.turn()
    assert story.index("slow finishes") < story.index("quick finishes")
    assert story.index("slow runs") < story.index("quick runs")


def test_closing_finishes_what_was_begun(loop: Loop, clock: ManualClock, story: list[str]) -> None:
    flusher = Flusher(loop.post, clock, NEVER_INLINE_MS)
    for name in ("one", "two"):
        flusher.start(Work(story, name), lambda: story.append("told"))
    flusher.close()
    assert [line for line in story if not line.endswith("runs")] == ["one finishes", "told", "two finishes", "told"]
    while loop.posted:
        loop.posted.popleft()()
    assert story.count("one finishes") == 1
    flusher.close()


def test_a_loop_that_has_ended_loses_no_job(loop: Loop, clock: ManualClock, story: list[str]) -> None:
    flusher = Flusher(loop.post, clock, NEVER_INLINE_MS)
    loop.is_closed = True
    for name in ("one", "two"):
        flusher.start(Work(story, name), lambda: None)
    loop.wait()
    loop.wait()
    assert [line for line in story if line.endswith("runs")] == ["one runs", "two runs"]
    flusher.close()
    assert story.count("two finishes") == 1


def test_without_threads_all_is_inline(loop: Loop, clock: ManualClock, story: list[str]) -> None:
    flusher = Flusher(loop.post, clock, ALWAYS_INLINE_MS)
    for _ in range(5):
        flusher.start(Work(story, takes_ms=1e9, clock=clock), lambda: None)
    assert (flusher.inline_count, flusher.thread_count) == (5, 0)
    flusher.close()


def test_without_a_thread_the_loop_does_it_until_there_is_one(
    loop: Loop, clock: ManualClock, story: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    flusher = Flusher(loop.post, clock, NEVER_INLINE_MS)
    with monkeypatch.context() as refused:
        refused.setattr(threading.Thread, "start", refuse)
        for name in ("one", "two"):
            flusher.start(Work(story, name), lambda: story.append("told"))
    assert story == ["one runs", "one finishes", "told", "two runs", "two finishes", "told"]
    assert capsys.readouterr().err.count("thread_refused") == 1
    flusher.start(Work(story, "three"), lambda: None)
    flusher.close()
    assert (flusher.inline_count, flusher.thread_count) == (2, 1)


def test_what_goes_wrong_waits_for_the_loop(flusher: Flusher, loop: Loop) -> None:
    class Broken(Job):
        def work(self) -> None:
            raise ZeroDivisionError("a fault of ours")

        def finish(self) -> None:
            seen.append(self.error)

    seen: list[Exception | None] = []
    for average_ms in (0, 99):
        flusher.average_ms = average_ms
        flusher.start(Broken(), lambda: None)
    loop.turn()
    assert [type(error) for error in seen] == [ZeroDivisionError, ZeroDivisionError]
