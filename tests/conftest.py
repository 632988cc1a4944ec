"""What holds for every test: a bound in time, nothing left running or configured behind it, and failures that can be repeated.

The time bound is in tox.ini (60 seconds, `@pytest.mark.timeout` for the few that need another). What a test leaves behind is
checked here after each one, when its fixtures have ended. Hypothesis prints the blob that repeats a failure.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import structlog

GRACE_S = 5.0  # for threads and processes that were told to end and are about to
LATE_THREADS = ("zrmq-flusher", "zrmq-upkeep")  # a broker starts them when it first needs them

hypothesis.settings.register_profile(
    "zrmq",
    deadline=None,  # a machine with others on it says nothing about the code
    derandomize=bool(os.environ.get("CI")),  # by hand: new examples each time; in CI: the same for everybody
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("zrmq")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background ignores SIGINT, and so would every process that a test means to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """Warnings go to stderr, whatever tests before this one configured."""
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test after which a thread, a child process or a listening port of its own is still there."""
    before = (_threads(), _children(), _listening())
    yield
    _check(_threads, before[0], "threads", "stop or close what the test started: use `with`, or a fixture that closes it")
    _check(_children, before[1], "child processes", "kill and wait for each process the test started, in a fixture")
    _check(_listening, before[2], "listening ports", "close the server before the test ends")


def _check(look: Callable[[], dict[object, str]], before: dict[object, str], what: str, advice: str) -> None:
    """Look, and look again until the grace is over, before calling it a leak."""
    pause = threading.Event()
    served = any(name.startswith("zrmq") for name in before.values())  # a fixture of the module or session runs a broker
    for _ in range(int(GRACE_S / 0.02)):
        left = [text for key, text in look().items() if key not in before and not (served and text in LATE_THREADS)]
        if not left:
            return
        pause.wait(0.02)
    pytest.fail(f"The test left {what} behind: {', '.join(left)}; {advice}.", pytrace=False)


def _threads() -> dict[object, str]:
    """Live Python threads but those of the test tools and of pyzmq's own clean-up."""
    return {
        thread.ident: thread.name
        for thread in threading.enumerate()
        if not type(thread).__module__.startswith("zmq.") and not thread.name.startswith("pytest_timeout")
    }


def _children() -> dict[object, str]:
    """Processes started by this one; read from /proc where there is one, since a search through all processes is slow."""
    files = list(Path("/proc/self/task").glob("*/children"))
    if not files:
        return {child.pid: f"{child.pid} {child.name()}" for child in psutil.Process().children()}
    pids = [int(pid) for file in files for pid in _text(file).split()]
    return {pid: f"{pid} {_text(Path(f'/proc/{pid}/comm')).strip()}" for pid in pids}


def _listening() -> dict[object, str]:
    return {
        (connection.fd, connection.laddr): f"{connection.laddr.ip}:{connection.laddr.port}"
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def _text(file: Path) -> str:
    """The file's text, or nothing when its thread or process has just ended."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
