"""zrmq/logs.py: who gets our log lines, and what loading it costs."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest
import structlog

from zrmq.errors import ConfigError
from zrmq.logs import configure_logging, get_logger, quiet


def test_nothing_is_loaded_before_the_first_written_line() -> None:
    program = (
        "import sys\n"
        "from zrmq.logs import get_logger\n"
        "log = get_logger('store')\n"
        "log.debug('a_thing_done'); log.info('segment_rolled', position=1)\n"
        "assert 'structlog' not in sys.modules\n"
        "log.warning('disk_filled')\n"
        "assert 'structlog' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "disk_filled" in done.stderr
    assert "segment_rolled" not in done.stderr
    assert done.stdout == ""


def test_who_logs_when_no_file_can_be_opened_goes_on() -> None:
    program = (
        "import os, resource\n"
        "from zrmq.logs import get_logger\n"
        "log = get_logger('store')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "log.warning('disk_filled', free_bytes=7)\n"
        "try:\n"
        "    1 // 0\n"
        "except ZeroDivisionError:\n"
        "    log.exception('callback_failed')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "log.warning('disk_freed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    plain, with_error, usual = done.stderr.strip().split("\n")
    assert plain == "disk_filled [store] free_bytes=7"
    assert with_error.startswith("callback_failed [store] exception=") and "ZeroDivisionError" in with_error
    assert "[warning" in usual and "disk_freed" in usual


def test_without_configuration_only_warnings_and_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("store")
    log.debug("seen_never")
    log.info("seen_never")
    log.warning("disk_filled", free_bytes=7)
    log.error("disk_failed")
    out, err = capsys.readouterr()
    assert out == ""
    assert "seen_never" not in err
    for part in ("disk_filled", "free_bytes=7", "store"):
        assert part in err
    assert "disk_failed" in err


def test_in_quiet_only_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        get_logger("client").warning("nameservers_failed")
        get_logger("client").error("session_refused")
    get_logger("client").warning("broker_left")
    told = capsys.readouterr().err
    assert "nameservers_failed" not in told
    assert "session_refused" in told
    assert "broker_left" in told


def test_quiet_is_nothing_to_a_process_that_configured_its_logs(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    with quiet():
        get_logger("client").warning("nameservers_failed")
    assert "nameservers_failed" in capsys.readouterr().err


def test_a_program_that_configured_structlog_gets_every_level_its_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    lines = structlog.testing.CapturingLoggerFactory()
    structlog.configure(processors=[structlog.processors.KeyValueRenderer(sort_keys=True)], logger_factory=lines)
    log = get_logger("routing")
    log.debug("broker_registered", broker_name="a")
    log.error("broker_refused")
    rendered = [call.args[0] for call in lines.logger.calls]
    assert rendered == [
        "broker_name='a' event='broker_registered' logger='routing'",
        "event='broker_refused' logger='routing'",
    ]
    assert capsys.readouterr().err == ""


def test_json_lines_carry_time_level_part_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    get_logger("store").info("segment_rolled", position=64, data=b"\x00")
    get_logger("store").debug("seen_never")
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    entry = json.loads(line)
    assert out == ""
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": "segment_rolled", "level": "info", "logger": "store", "position": 64, "data": "b'\\x00'"}


def test_the_level_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "error")
    get_logger("store").warning("seen_never")
    assert capsys.readouterr().err == ""
    configure_logging("json", "debug")
    get_logger("store").debug("seen_now")
    assert "seen_now" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["pretty", "json"])
def test_an_exception_is_written_without_the_values_of_variables(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(log_format)  # type: ignore[arg-type]
    body = "".join(["sec", "ret"])
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        get_logger("serving").exception("request_failed", size_bytes=len(body))
    err = capsys.readouterr().err
    assert "request_failed" in err
    assert "RuntimeError: it broke" in err
    assert body not in err


def test_unconfigured_exceptions_show_no_variables_either(capsys: pytest.CaptureFixture[str]) -> None:
    body = "".join(["sec", "ret"])
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        get_logger("serving").exception("request_failed", size_bytes=len(body))
    err = capsys.readouterr().err
    assert "RuntimeError: it broke" in err
    assert body not in err


def test_auto_is_json_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    get_logger("store").info("store_opened")
    assert json.loads(capsys.readouterr().err)["event"] == "store_opened"


@pytest.mark.parametrize(("log_format", "level"), [("xml", "info"), ("json", "loud")])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(log_format: str, level: str) -> None:
    with pytest.raises(ConfigError, match="use one of") as caught:
        configure_logging(log_format, level)  # type: ignore[arg-type]
    assert caught.value.facts["value"] in ("xml", "loud")
    assert not structlog.is_configured()


class _Broken:
    def write(self, text: str) -> int:
        raise BrokenPipeError("gone")

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("stderr", [_Broken(), None])
@pytest.mark.parametrize("configured", [False, True])
def test_a_stderr_that_is_gone_ends_nobody(monkeypatch: pytest.MonkeyPatch, stderr: object, configured: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    if configured:
        configure_logging()
    get_logger("store").error("disk_failed")


# --- a line in the middle of a line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("configured", [False, True])
def test_a_signal_handler_may_log_whatever_its_thread_is_writing(monkeypatch: pytest.MonkeyPatch, configured: bool) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "disk_failed" in text:
                signal.raise_signal(signal.SIGUSR1)
            return super().write(text)

    told = Interrupted()
    monkeypatch.setattr(sys, "stderr", told)
    if configured:
        configure_logging("json")
    before = signal.signal(signal.SIGUSR1, lambda number, frame: get_logger("host").error("signal_received"))
    try:
        get_logger("store").error("disk_failed")
    finally:
        signal.signal(signal.SIGUSR1, before)
    first, second = told.getvalue().splitlines()
    assert "signal_received" in first
    assert "disk_failed" in second


def test_a_line_that_python_refuses_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own stderr does that to a signal handler that came in the middle of a write of its buffer."""

    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    get_logger("host").error("signal_received")


def test_a_forked_child_may_log_whatever_threads_of_its_parent_were_writing() -> None:
    program = (
        "import os, signal, sys, threading\n"
        "from zrmq.logs import get_logger\n"
        "writing, may_end = threading.Event(), threading.Event()\n"
        "class Slow:\n"
        "    def write(self, text):\n"
        "        if 'parents' in text:\n"
        "            writing.set(); may_end.wait(20)\n"
        "        else:\n"
        "            print(text, end='')\n"
        "    def flush(self): sys.stdout.flush()\n"
        "    def isatty(self): return False\n"
        "sys.stderr, log = Slow(), get_logger('client')\n"
        "thread = threading.Thread(target=log.warning, args=('parents',))\n"
        "thread.start(); writing.wait(20)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    signal.alarm(20)\n"
        "    log.warning('childs'); os._exit(0)\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "may_end.set(); thread.join(); sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "childs" in done.stdout
