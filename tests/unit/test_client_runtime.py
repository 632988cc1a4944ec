"""zrmq/client/runtime.py: calls into the thread, and every way it ends: closed, collected, forked, at exit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from random import Random
from types import FrameType
from typing import Any

import pytest

from tests.unit.interrupts import Interrupt
from zrmq.client import runtime as runtime_module
from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.runtime import ClientThread
from zrmq.errors import ClosedError, ForkedClientError, ResourceLimitError
from zrmq.nameserver import NameServer
from zrmq.transport import threads as threads_module
from zrmq.transport.reactor import Reactor

JOIN_S = 30.0


@pytest.fixture
def thread() -> Iterator[ClientThread]:
    made = ClientThread("zrmq-test")
    yield made
    made.close()


def alive(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


# --- calls ----------------------------------------------------------------------------------------------------------


def test_call_runs_on_the_thread_and_returns_what_the_function_returns(thread: ClientThread) -> None:
    assert thread.call(lambda: threading.current_thread().name) == "zrmq-test"
    assert thread.call(lambda: None) is None


def test_call_raises_what_the_function_raises(thread: ClientThread) -> None:
    def fail() -> None:
        raise KeyError("of mine")

    with pytest.raises(KeyError, match="of mine"):
        thread.call(fail)
    assert thread.call(lambda: 1) == 1


def test_call_on_the_thread_itself_runs_at_once(thread: ClientThread) -> None:
    assert thread.call(lambda: thread.call(lambda: 7)) == 7


def test_calls_from_many_threads_each_get_their_answer(thread: ClientThread) -> None:
    found: dict[int, list[int]] = {}

    def work(start: int) -> None:
        found[start] = [thread.call(lambda number=number: number) for number in range(start, start + 50)]  # type: ignore[misc]

    workers = [threading.Thread(target=work, args=(start,)) for start in range(0, 400, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert found == {start: list(range(start, start + 50)) for start in range(0, 400, 50)}


def test_a_signal_handler_may_call_wherever_it_interrupts_a_call(thread: ClientThread) -> None:
    """Which it does to close a consumer. The thread is held up until then, so that the first call is certainly under way."""
    for at in count():
        held_up = threading.Event()
        thread.post(partial(held_up.wait, JOIN_S))

        def act(held_up: threading.Event = held_up) -> None:
            held_up.set()
            answered = threading.Event()
            thread.post(answered.set)
            assert answered.wait(JOIN_S)

        def begin_to_wait(frame: FrameType, event: str, called: Any, held_up: threading.Event = held_up) -> None:
            if event == "c_call" and called.__name__ in ("get", "acquire"):
                held_up.set()

        interrupt = Interrupt(at, runtime_module, threads_module, threading, act=act)
        sys.setprofile(begin_to_wait)
        try:
            with interrupt.may_come():
                assert thread.call(lambda: 7) == 7
        finally:
            sys.setprofile(None)
        if not interrupt.came:
            break
    assert at > 5


def test_posts_run_in_order_and_one_that_raises_ends_nothing(
    thread: ClientThread, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    thread.post(lambda: seen.append(1))
    thread.post(lambda: seen.append(1 // 0))
    thread.post(lambda: seen.append(2))
    thread.call(lambda: None)
    assert seen == [1, 2]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_timers_of_the_loop_run_on_the_thread(thread: ClientThread) -> None:
    fired = threading.Event()
    thread.call(lambda: thread.loop.call_later(1.0, fired.set))
    assert fired.wait(30)


# --- closing --------------------------------------------------------------------------------------------------------


def test_after_close_everything_is_refused(thread: ClientThread) -> None:
    thread.close()
    thread.close()
    for use in (lambda: thread.call(lambda: None), lambda: thread.post(lambda: None)):
        with pytest.raises(ClosedError, match="zrmq-test is closed"):
            use()
    assert alive("zrmq-test") == []


def test_close_on_the_thread_itself_ends_it_without_waiting(thread: ClientThread) -> None:
    thread.call(thread.close)
    thread.close()
    assert alive("zrmq-test") == []


def test_close_from_many_threads_at_once(thread: ClientThread) -> None:
    closers = [threading.Thread(target=thread.close) for _ in range(8)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(30)
    assert alive("zrmq-test") == []


def test_what_was_called_before_the_close_is_still_answered(thread: ClientThread) -> None:
    gate, outcomes = threading.Event(), []
    thread.post(lambda: gate.wait(30) and None)
    caller = threading.Thread(target=lambda: outcomes.append(thread.call(lambda: "done")))
    caller.start()
    while not thread._engine.reactor._calls:
        pass
    closer = threading.Thread(target=thread.close)
    closer.start()
    gate.set()
    caller.join(30)
    closer.join(30)
    assert outcomes == ["done"]


def test_last_steps_are_taken_on_the_thread_and_waited_for(thread: ClientThread) -> None:
    seen: list[str] = []

    def step(done: Callable[[], None]) -> None:
        def later() -> None:
            seen.append(threading.current_thread().name)
            done()

        thread.loop.call_later(20.0, later)

    thread.at_close(step)
    thread.at_close(step)
    thread.close()
    assert seen == ["zrmq-test", "zrmq-test"]


def test_a_last_step_that_fails_or_never_ends_does_not_hold_the_close(
    thread: ClientThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zrmq.client.runtime.LEAVE_MS", 50.0)
    thread.at_close(lambda done: [][0])
    thread.at_close(lambda done: None)
    thread.close()
    assert alive("zrmq-test") == []
    assert "last_step_failed" in capsys.readouterr().err


def test_a_callback_that_hangs_does_not_hold_the_close_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zrmq.client.runtime.JOIN_S", 0.05)
    thread, gate = ClientThread("zrmq-test"), threading.Event()
    thread.post(lambda: gate.wait(30) and None)
    thread.close()
    assert "client_thread_left" in capsys.readouterr().err
    gate.set()
    thread._engine._thread.join(30)


def test_a_hook_that_raises_ends_the_thread_and_later_calls_are_refused(
    thread: ClientThread, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    thread.post(lambda: thread.loop.before_sleep(fail))
    thread._engine._thread.join(30)
    with pytest.raises(ClosedError):
        thread.call(lambda: None)
    assert "the disk is gone" in capsys.readouterr().err


def test_one_that_ends_by_itself_says_so_and_takes_its_last_steps(
    thread: ClientThread, capsys: pytest.CaptureFixture[str]
) -> None:
    """A callback's sys.exit() counts: of that a thread would say nothing."""
    taken: list[str] = []
    thread.at_close(lambda done: sys.exit(4))
    thread.at_close(lambda done: taken.append(threading.current_thread().name))
    thread.post(lambda: sys.exit(3))
    thread._engine._thread.join(30)
    assert taken == ["zrmq-test"]
    logged = capsys.readouterr().err
    assert "client_thread_failed" in logged and "SystemExit: 3" in logged
    assert "last_step_failed" in logged and "SystemExit: 4" in logged
    with pytest.raises(ClosedError):
        thread.call(lambda: None)


def test_an_instance_says_goodbye_when_its_thread_is_closed() -> None:
    with NameServer(nameserver_port=0, start_grace_ms=0) as nameserver:
        thread = ClientThread("zrmq-test")
        identity, routed = Identity("me", "admin"), threading.Event()
        instance = thread.call(lambda: ClientInstance(thread.loop, [nameserver.address], identity, Random(1)))
        thread.at_close(instance.close)
        thread.call(lambda: instance.await_route(lambda error: routed.set() if error is None else None, 20_000))
        assert routed.wait(30)
        sessions = nameserver._role._core._sessions  # type: ignore[union-attr]
        assert sessions.by_client("me") is not None
        thread.close()
        assert sessions.by_client("me") is None


def test_one_that_gets_no_thread_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, thread: ClientThread) -> None:
    """What stayed among those that run would keep the others from being closed at the interpreter's exit."""
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made: list[Reactor] = []
    running = set(runtime_module._running)
    monkeypatch.setattr(runtime_module, "Reactor", lambda context: made.append(Reactor(context)) or made[0])  # type: ignore[func-returns-value]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with warnings.catch_warnings(), pytest.raises(ResourceLimitError, match="no thread for zrmq-refused"):
        warnings.simplefilter("error")
        ClientThread("zrmq-refused")
    gc.collect()
    assert made[0].context.closed
    assert runtime_module._running == running


def test_one_that_is_interrupted_as_it_starts_leaves_nothing(monkeypatch: pytest.MonkeyPatch, thread: ClientThread) -> None:
    """Wherever Ctrl-C comes: before the thread is there, or behind that."""
    running = set(runtime_module._running)
    for at in count(1):  # at 0 it has not begun
        reactor = Reactor()
        monkeypatch.setattr(runtime_module, "Reactor", lambda context, reactor=reactor: reactor)
        engine = runtime_module._Engine("zrmq-interrupted", None)
        interrupt = Interrupt(at, runtime_module, threads_module)
        with interrupt.may_come():
            engine.start()
        if not interrupt.came:
            break
        assert engine.is_closing, at
        if engine._thread.ident is not None:
            engine._thread.join(JOIN_S)
        assert reactor.context.closed, at
        assert runtime_module._running == running, at
    engine.close()
    assert at > 3


# --- never closed ---------------------------------------------------------------------------------------------------


def test_one_that_is_collected_unclosed_warns_and_its_thread_ends() -> None:
    thread = ClientThread("zrmq-test")
    worker, cycle = thread._engine._thread, [thread]
    cycle.append(cycle)  # type: ignore[arg-type]
    del cycle
    del thread
    with pytest.warns(ResourceWarning, match="zrmq-test was never closed"):
        gc.collect()
    worker.join(30)
    assert not worker.is_alive()


def test_its_thread_ends_even_if_the_warning_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    thread = ClientThread("zrmq-test")
    worker = thread._engine._thread
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del thread
        gc.collect()
    worker.join(30)
    assert not worker.is_alive()


def test_a_closed_one_is_collected_silently() -> None:
    thread = ClientThread("zrmq-test")
    thread.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del thread
        gc.collect()


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=50, check=False
    )


def test_one_left_unclosed_is_closed_at_exit_with_its_last_steps() -> None:
    done = run(
        "from zrmq.client.runtime import ClientThread\n"
        "thread = ClientThread()\n"
        "thread.at_close(lambda done: (print('last step'), done()))\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "last step\n", "")


def test_one_that_cannot_be_closed_at_exit_keeps_no_other_from_it() -> None:
    done = run(
        "from zrmq.client.runtime import ClientThread\n"
        "threads = [ClientThread(), ClientThread()]\n"
        "for thread in threads: thread.at_close(lambda done: (print('last step'), done()))\n"
        "def fail(*given): raise RuntimeError('cannot join')\n"
        "for thread in threads: thread._engine._thread.join = fail\n"
    )
    assert (done.returncode, done.stderr.count("client_thread_not_closed")) == (0, 2)


def test_exit_does_not_hang_on_a_thread_that_does(tmp_path: object) -> None:
    done = run(
        "import threading\n"
        "from zrmq.client import runtime\n"
        "runtime.JOIN_S = 0.1\n"
        "thread = runtime.ClientThread()\n"
        "thread.post(lambda: threading.Event().wait())\n"
    )
    assert done.returncode == 0
    assert "client_thread_left" in done.stderr


def test_exit_while_another_thread_waits_for_an_answer() -> None:
    done = run(
        "import threading\n"
        "from zrmq.client.runtime import ClientThread\n"
        "thread = ClientThread()\n"
        "started = threading.Event()\n"
        "def work():\n"
        "    started.set()\n"
        "    while True: thread.call(lambda: None)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "started.wait()\n"
    )
    assert done.returncode == 0


# --- forked ---------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], str]) -> str:
    """Fork, run `work` in the child and return what it returned there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("use", ["call", "post"])
def test_a_forked_child_gets_a_clear_error(thread: ClientThread, use: str) -> None:
    def work() -> str:
        try:
            getattr(thread, use)(lambda: None)
        except ForkedClientError as error:
            return error.message
        return "nothing"

    assert "make a new one in the child" in in_child(work)
    assert thread.call(lambda: 1) == 1, "the parent goes on"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_closing_in_a_forked_child_leaves_the_parents_thread_alone(thread: ClientThread) -> None:
    def work() -> str:
        thread.close()
        return "closed"

    assert in_child(work) == "closed"
    assert thread.call(lambda: 1) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_makes_one_of_its_own(thread: ClientThread) -> None:
    def work() -> str:
        own = ClientThread("zrmq-child")
        found = own.call(lambda: "works")
        own.close()
        return found

    assert in_child(work) == "works"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_exits_without_touching_the_parents_thread() -> None:
    done = run(
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "from zrmq.client.runtime import ClientThread\n"
        "thread = ClientThread()\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(3)\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "print(status, thread.call(lambda: 'alive'))\n"
        "thread.close()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 alive\n", "")
