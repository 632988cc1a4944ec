"""Ctrl-C where the process of a command begins and ends, and in a role that is ending already: no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zrmq.cli.entry import end_by_ctrl_c

RAISE = "import signal; signal.raise_signal(signal.SIGINT)"
AT_EXIT = "import atexit, signal\natexit.register(signal.raise_signal, signal.SIGINT)\n"
RUN = "from zrmq.cli.entry import main\nmain()\n"


def ended(program: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """How a program in a process of its own ends: its code, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_ctrl_c_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(RAISE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run_as_module = "import runpy; runpy.run_module('zrmq', run_name='__main__')"
    assert ended(run_as_module, PYTHONPATH=path) == (-signal.SIGINT, "")


def test_ctrl_c_when_the_command_has_ended() -> None:
    assert ended(AT_EXIT + RUN, "--version") == (-signal.SIGINT, "")


def test_ctrl_c_just_before_the_command_can_take_it() -> None:
    program = "from zrmq.cli import main\ndef interrupted(): raise KeyboardInterrupt\nmain.main = interrupted\n"
    assert ended(program + RUN) == (-signal.SIGINT, "")


def test_ctrl_c_in_between_is_the_commands_own() -> None:
    program = f"from zrmq.cli import main\nmain.VERSION.callback = lambda *_: exec({RAISE!r})\n"
    code, told = ended(program + RUN, "--version")
    assert (code, told.strip()) == (1, "Error: Interrupted.")


def test_what_a_shell_ignores_stays_ignored() -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert ended(AT_EXIT + ignored + RUN, "--version") == (0, "")


def test_a_programs_own_handler_stays() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, own)
        end_by_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def own(number: int, frame: object) -> None:
    """Nothing."""


@pytest.mark.parametrize("role", ["up", "nameserver", "broker"])
def test_a_second_ctrl_c_ends_a_role_without_a_traceback(tmp_path: Path, role: str) -> None:
    """The first one as soon as it is ready, the second in the middle of its stop."""
    program = (
        "import signal\n"
        "from zrmq.broker import BrokerRole\nfrom zrmq.nameserver import NameServerRole\nfrom zrmq.cli import roles\n"
        "def interrupt(*_, **__): signal.raise_signal(signal.SIGINT)\n"
        "roles._print_ready = BrokerRole.stop = NameServerRole.stop = interrupt\n"
    ) + RUN
    nameserver, broker = ["--nameserver-port", "0"], ["--broker-port", "0", "--ingest-port", "0", "--data", str(tmp_path)]
    options = {"nameserver": nameserver, "broker": broker, "up": [*nameserver, *broker]}
    code, told = ended(program, role, *options[role])
    assert code == -signal.SIGINT
    assert "signal_received" in told
    assert "Traceback" not in told
