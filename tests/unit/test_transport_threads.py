"""zrmq/transport/threads.py: threads are started or refused; a latch wakes everybody, whatever signal handlers do meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import pytest

from tests.unit.interrupts import Interrupt
from zrmq.errors import ResourceLimitError
from zrmq.transport import threads as threads_module
from zrmq.transport.threads import Latch, start_thread

JOIN_S = 30.0


def set_here(latch: Latch) -> None:
    latch.set()


def set_elsewhere(latch: Latch) -> None:
    """As a `close` that waits for the I/O thread."""
    setter = threading.Thread(target=latch.set)
    setter.start()
    setter.join(JOIN_S)
    assert not setter.is_alive()


def test_a_thread_that_the_system_refuses_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse, raising=False)
    monkeypatch.setattr(threading, "_start_joinable_thread", refuse, raising=False)
    with pytest.raises(ResourceLimitError, match="no thread for worker-1") as caught:
        start_thread(threading.Thread(name="worker-1"))
    assert caught.value.facts == {"thread": "worker-1"}


def test_a_thread_is_started() -> None:
    latch = Latch()
    start_thread(threading.Thread(target=latch.set))
    assert latch.wait(JOIN_S)


def test_nothing_has_happened_at_first() -> None:
    latch = Latch()
    assert not latch.is_set
    assert not latch.wait(0)
    assert not latch.wait(0.001)


def test_what_has_happened_is_not_waited_for() -> None:
    latch = Latch()
    latch.set()
    latch.set()
    assert latch.is_set
    assert latch.wait()
    assert latch.wait(0)


def test_all_who_wait_are_woken() -> None:
    latch, woken = Latch(), []
    waiters = [threading.Thread(target=lambda: woken.append(latch.wait())) for _ in range(8)]
    for waiter in waiters:
        waiter.start()
    while len(latch._waiters) < len(waiters):
        pass
    assert not latch.wait(0), "who has given up costs the others nothing"
    latch.set()
    for waiter in waiters:
        waiter.join(JOIN_S)
    assert woken == [True] * len(waiters)


@pytest.mark.parametrize("happen", [set_here, set_elsewhere])
def test_a_signal_handler_may_set_it_wherever_it_interrupts_a_wait(happen: Callable[[Latch], None]) -> None:
    """Or wait for the thread that does."""
    for at in count():
        latch = Latch()
        interrupt = Interrupt(at, threads_module, threading, act=lambda latch=latch: happen(latch))  # type: ignore[misc]
        with interrupt.may_come():
            assert latch.wait(0) == interrupt.came
        if not interrupt.came:
            break
    assert at > 3


@pytest.mark.parametrize("happen", [set_here, set_elsewhere])
def test_a_signal_handler_may_set_it_wherever_it_interrupts_a_set(happen: Callable[[Latch], None]) -> None:
    for at in count():
        latch = Latch()
        waiter = threading.Thread(target=latch.wait)
        waiter.start()
        while not latch._waiters:
            pass
        interrupt = Interrupt(at, threads_module, threading, act=lambda latch=latch: happen(latch))  # type: ignore[misc]
        with interrupt.may_come():
            latch.set()
        waiter.join(JOIN_S)
        assert not waiter.is_alive()
        if not interrupt.came:
            break
    assert at > 1


def test_an_exception_of_a_signal_handler_ends_a_wait_and_nothing_else() -> None:
    for at in count():
        latch = Latch()
        interrupt = Interrupt(at, threads_module, threading)
        with interrupt.may_come():
            latch.wait(0)
        set_elsewhere(latch)
        assert latch.wait()
        if not interrupt.came:
            break
    assert at > 3
