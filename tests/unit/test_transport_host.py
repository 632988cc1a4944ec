"""A host: roles are opened in order, and whatever happens those that were opened are stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from zrmq.transport.host import Host
from zrmq.transport.interface import Loop
from zrmq.transport.reactor import Reactor


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


def test_a_loop_that_ends_by_a_fault_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """Who embeds it may not call it for days."""

    def fail() -> None:
        raise ValueError("a fault")

    host = Host(Slow("a", []))
    host.start()
    host.reactor.before_sleep(fail)
    host.reactor.call_soon_threadsafe(lambda: None)
    assert host._thread is not None
    host._thread.join()
    host.stop()
    told = capsys.readouterr().err
    assert "host_failed" in told
    assert "ValueError: a fault" in told
