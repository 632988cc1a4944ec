"""A host: roles are opened in order, and whatever happens those that were opened are stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest

from tests.unit.interrupts import Interrupt
from zrmq.errors import ResourceLimitError
from zrmq.transport import host as host_module
from zrmq.transport import threads as threads_module
from zrmq.transport.host import Host
from zrmq.transport.interface import Loop
from zrmq.transport.reactor import Reactor
from zrmq.transport.signals import STOP_SIGNALS


class Slow:
    """A role that takes a turn of the loop to stop."""

    def __init__(self, name: str, story: list[str], error: Exception | None = None) -> None:
        self.name, self.story, self.error = name, story, error

    def open(self, loop: Loop) -> None:
        if self.error is not None:
            raise self.error
        self.loop = loop
        self.story.append(f"{self.name} opened")

    def stop(self, on_stopped: Callable[[], None]) -> None:
        self.loop.call_later(1, lambda: self._stopped(on_stopped))

    def abandon(self) -> None:
        self.story.append(f"{self.name} abandoned")

    def _stopped(self, on_stopped: Callable[[], None]) -> None:
        self.story.append(f"{self.name} stopped")
        on_stopped()


def test_roles_are_opened_in_order_and_stopped_in_reverse() -> None:
    story: list[str] = []
    with Host(Slow("a", story), Slow("b", story)):
        assert story == ["a opened", "b opened"]
    assert story[2:] == ["b stopped", "a stopped"]


def test_roles_before_one_that_cannot_open_are_stopped_to_the_end() -> None:
    """A broker lets go of its folder in a later turn; a loop that never turned would leave it locked in this process."""
    story: list[str] = []
    with pytest.raises(ValueError, match="no"):
        Host(Slow("a", story), Slow("b", story, ValueError("no")), Slow("c", story)).start()
    assert story == ["a opened", "a stopped"]
    with pytest.raises(ValueError, match="no"):
        Host(Slow("a", story, ValueError("no"))).start()


def test_a_host_that_cannot_say_that_it_is_open_is_stopped() -> None:
    story: list[str] = []

    def fail() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Host(Slow("a", story)).run(on_open=fail)
    assert story == ["a opened", "a stopped"]


def test_a_host_that_gets_no_thread_says_so_and_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made: list[Reactor] = []
    make_reactor = Host._make_reactor
    monkeypatch.setattr(Host, "_make_reactor", lambda host: (make_reactor(host), made.append(host.reactor)))
    story: list[str] = []
    host = Host(Slow("a", story))
    with monkeypatch.context() as refused:
        refused.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceLimitError, match=r"no thread for zrmq \(can't start new thread\); end some, or raise"):
            host.start()
        assert made[0].context.closed
        host.stop()
    with host:
        assert story == ["a opened"]


def test_a_thread_that_comes_just_behind_the_look_at_it_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that stops in the middle of the start does not wait for what has not come, and blames nobody."""
    host = Host(Slow("a", []))
    host.start()
    with monkeypatch.context() as late:
        looks = iter([False])
        late.setattr(threading.Thread, "is_alive", lambda thread: next(looks, True))
        host.stop()
    host.stop()
    assert host._thread is not None
    assert not host._thread.is_alive()


def test_stop_may_be_called_while_another_stop_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, may_close = threading.Event(), threading.Event()
    close = Reactor.close

    def late_close(reactor: Reactor) -> None:
        ended.set()
        may_close.wait(10)
        close(reactor)

    monkeypatch.setattr(Reactor, "close", late_close)
    host = Host(Slow("a", []))
    host.start()
    first = threading.Thread(target=host.stop)
    first.start()
    assert ended.wait(10)
    second = threading.Timer(0.1, may_close.set)
    second.start()
    host.stop()
    first.join()
    second.join()


def fail() -> None:
    raise ValueError("a fault")


def end_by_a_fault(host: Host) -> None:
    host.start()
    host.reactor.before_sleep(fail)
    host.reactor.call_soon_threadsafe(lambda: None)
    assert host._thread is not None
    host._thread.join()


def test_a_loop_that_ends_by_a_fault_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """Who embeds it may not call it for days."""
    end_by_a_fault(Host(Slow("a", [])))
    told = capsys.readouterr().err
    assert "host_failed" in told
    assert "ValueError: a fault" in told


def test_roles_of_a_loop_that_ended_by_a_fault_are_abandoned_and_the_fault_is_told_once() -> None:
    story: list[str] = []
    host = Host(Slow("a", story), Slow("b", story))
    end_by_a_fault(host)
    assert story[2:] == ["a abandoned", "b abandoned"]
    with pytest.raises(ValueError, match="a fault"):
        host.stop()
    host.stop()


def test_what_cannot_be_abandoned_or_closed_keeps_nobody_and_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stubborn(Slow):
        def abandon(self) -> None:
            super().abandon()
            raise OSError("cannot be abandoned")

    close = Reactor.close

    def unsure(reactor: Reactor) -> None:
        close(reactor)
        raise OSError("cannot be closed")

    monkeypatch.setattr(Reactor, "close", unsure)
    story: list[str] = []
    host = Host(Stubborn("a", story), Slow("b", story))
    end_by_a_fault(host)
    with pytest.raises(ValueError, match="a fault"):
        host.stop()
    assert story[2:] == ["a abandoned", "b abandoned"]
    told = capsys.readouterr().err
    assert "OSError: cannot be abandoned" in told
    assert "OSError: cannot be closed" in told


def test_a_role_whose_stop_raises_keeps_no_other_from_stopping() -> None:
    story: list[str] = []

    class Unsure(Slow):
        def stop(self, on_stopped: Callable[[], None]) -> None:
            super().stop(on_stopped)
            raise OSError("not as it should")

    host = Host(Slow("a", story), Unsure("b", story))
    host.start()
    with pytest.raises(OSError, match="not as it should"):
        host.stop()
    assert story[2:] == ["b stopped", "a stopped"]


# --- signals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def meanings() -> Iterator[dict[signal.Signals, Any]]:
    """What the signals mean before a test, and after it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


class Acting(Slow):
    """Does something when it is opened, and when it is stopped."""

    def __init__(
        self, story: list[str], on_open: Callable[[], None] = lambda: None, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__("a", story)
        self.on_open, self.on_stop = on_open, on_stop

    def open(self, loop: Loop) -> None:
        super().open(loop)
        self.on_open()

    def stop(self, on_stopped: Callable[[], None]) -> None:
        self.on_stop()
        super().stop(on_stopped)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_logged_where_its_thread_is_not_in_the_middle_of_anything(
    monkeypatch: pytest.MonkeyPatch, meanings: dict[signal.Signals, Any], number: signal.Signals
) -> None:
    """A program's own logs may have a lock, which the handler would wait for in the very thread that has it."""
    story: list[str] = []

    def interrupted() -> None:
        signal.raise_signal(number)
        story.append("goes on")

    class Log:
        def info(self, event: str, **facts: object) -> None:
            story.append(f"{event} {facts}")

    monkeypatch.setattr("zrmq.transport.host.log", Log())
    Host(Acting(story, interrupted)).run()
    assert story == ["a opened", "goes on", f"signal_received {{'signal': '{number.name}'}}", "a stopped"]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == meanings


def test_ctrl_c_while_it_starts_leaves_nothing_that_nobody_could_stop() -> None:
    story: list[str] = []
    main = threading.get_ident()
    host = Host(Acting(story, lambda: signal.pthread_kill(main, signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        host.start()
    assert host._thread is not None
    host._thread.join(10)
    assert story == ["a opened", "a stopped"]


def test_a_signal_handler_may_stop_it_wherever_it_interrupts_a_start() -> None:
    """It waits for the end where it can; where the thread is not there yet it cannot, and another stop does."""
    for at in count():
        story: list[str] = []
        host = Host(Slow("a", story))
        interrupt = Interrupt(at, host_module, threads_module, threading, act=partial(host.stop, 5_000))
        with interrupt.may_come():
            host.start()
        host.stop()
        assert story == ["a opened", "a stopped"], at
        if not interrupt.came:
            break
    assert at > 5


def test_a_second_signal_ends_what_does_not_stop(meanings: dict[signal.Signals, Any]) -> None:
    def never_stops() -> None:
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == meanings
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Host(Acting([], lambda: signal.raise_signal(signal.SIGTERM), never_stops)).run()


def test_a_signal_that_comes_when_the_loop_has_ended_is_nothing(
    monkeypatch: pytest.MonkeyPatch, meanings: dict[signal.Signals, Any]
) -> None:
    close = Reactor.close

    def late(reactor: Reactor) -> None:
        close(reactor)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Reactor, "close", late)
    host = Host(Slow("a", []))
    host.run(on_open=lambda: host.reactor.call_soon_threadsafe(host._stop_roles))


def test_a_handler_that_python_cannot_put_back_is_followed_by_the_default(
    monkeypatch: pytest.MonkeyPatch, meanings: dict[signal.Signals, Any]
) -> None:
    set_handler = signal.signal

    def of_an_embedding_program(number: signal.Signals, handler: Any) -> None:
        set_handler(number, handler)

    monkeypatch.setattr(signal, "signal", of_an_embedding_program)
    Host(Acting([], lambda: signal.raise_signal(signal.SIGTERM))).run()
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_DFL] * 2
