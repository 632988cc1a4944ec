"""Processes beside a command: their lines are read, their end is noticed, and they end with whoever started them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from zrmq.cli.children import Child, work_folder
from zrmq.errors import RequestTimeoutError, UnreachableError

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0

PROGRAMS = {
    "speaker": """
import sys
print("first", flush=True)
print(*sys.argv[1:], "ready at tcp://127.0.0.1:4711", flush=True)
sys.stdin.read()
""",
    "echo": """
import sys
for line in sys.stdin:
    print("heard", line.strip(), flush=True)
""",
    "broken": """
import sys
print("one", flush=True)
sys.exit("the disk is on fire")
""",
    "stubborn": """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
""",
}

Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Starts one of the programs above; all are ended after the test."""
    for name, program in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    started: list[Child] = []

    def begin(program: str, *arguments: str, **options: object) -> Child:
        child = Child(program, program, arguments, tmp_path / "logs" / f"{program}.log", **options)  # type: ignore[arg-type]
        started.append(child)
        return child

    yield begin
    for child in started:
        child.kill()


def test_the_address_is_found_among_the_lines(start: Start) -> None:
    assert start("speaker", "Broker").wait_address() == "tcp://127.0.0.1:4711"


def test_lines_are_waited_for_in_order(start: Start) -> None:
    child = start("speaker", "a", "b")
    assert child.wait_line(re.compile(rb"^first"))[0] == b"first"
    assert child.wait_line(re.compile(rb"^(a b) ready"))[1] == b"a b"


def test_a_line_that_does_not_come(start: Start) -> None:
    child = start("speaker")
    child.wait_address()
    with pytest.raises(RequestTimeoutError, match="speaker did not print what was expected"):
        child.wait_line(re.compile(rb"never"), timeout_s=0.05)


def test_a_process_that_ends_early_is_told_with_its_log(start: Start) -> None:
    child = start("broken")
    with pytest.raises(UnreachableError, match=r"(?s)broken ended with code 1\. .*broken\.log.*the disk is on fire"):
        child.wait_address()
    with pytest.raises(UnreachableError, match="ended with code 1"):
        child.wait_line(re.compile(rb"again"))
    assert child.exit_code == 1


def test_an_empty_log_is_called_empty(start: Start) -> None:
    child = start("speaker")
    child.wait_address()
    assert "is empty" in child.log_tail()


def test_talking_to_a_process(start: Start) -> None:
    child = start("echo")
    child.tell(b"you")
    assert child.wait_line(re.compile(rb"heard (\w+)"))[1] == b"you"
    child.end_input()
    assert child.wait(DEADLINE_S) == 0
    child.tell(b"nobody is there")


def test_lines_can_go_to_a_handler(start: Start) -> None:
    lines: list[bytes | None] = []
    ended = threading.Event()

    def on_line(child: Child, line: bytes | None) -> None:
        lines.append(line)
        if line is None:
            ended.set()

    start("broken", on_line=on_line)
    assert ended.wait(DEADLINE_S)
    assert lines == [b"one\n", None]


def test_stopping_ends_it_in_order(start: Start) -> None:
    child = start("speaker")
    child.wait_address()
    assert child.exit_code is None
    assert child.stop() in (0, -signal.SIGTERM)
    assert not psutil.pid_exists(child.pid)


def test_what_does_not_stop_is_killed(start: Start) -> None:
    child = start("stubborn")
    child.wait_line(re.compile(rb"up"))
    assert child.stop(timeout_s=0.1) == -signal.SIGKILL


def test_it_does_not_hear_the_terminal_s_signals(start: Start) -> None:
    child = start("speaker")
    child.wait_address()
    assert os.getpgid(child.pid) != os.getpgid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_it_ends_with_a_parent_that_is_killed(start: Start, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom zrmq.cli.children import Child\n"
        f"child = Child('speaker', 'speaker', [], Path({str(tmp_path / 'child.log')!r}))\n"
        "child.wait_address()\nprint(child.pid, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    psutil.wait_procs([child], timeout=DEADLINE_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_without_its_parent_it_does_not_even_begin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zrmq.cli.children", "1", "this"], cwd=ROOT, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stdout == b""


# --- where they work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "is_kept"), [(None, False), (KeyboardInterrupt(), False), (UnreachableError("See its log in the folder."), True)]
)
def test_a_temporary_folder_is_kept_when_an_error_names_logs_in_it(
    end: BaseException | None, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        with work_folder(None, "zrmq-test-") as folder:
            (folder / "log").touch()
            if end is not None:
                raise end
    except (KeyboardInterrupt, UnreachableError) as error:
        assert error is end
    assert folder.parent == tmp_path
    assert (folder / "log").exists() == is_kept


def test_a_folder_that_is_given_is_kept(tmp_path: Path) -> None:
    with work_folder(tmp_path, "zrmq-test-") as folder:
        assert folder == tmp_path
    assert tmp_path.exists()
