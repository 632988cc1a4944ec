"""`zrmq demo` ends by itself with a verdict, leaves nothing behind, and does not call good what is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(120)

CSV = "unit;Value;sensor\n°C;21,5;kitchen.temperature\n%;hot;kitchen.humidity\n%;55;kitchen.humidity\n°C;12;cellar.temperature\n"


class Running:
    """A demo as a process; its temporary files go below `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        environment = {**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zrmq", "demo", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )

    def wait_for(self, text: bytes) -> list[psutil.Process]:
        """Read lines up to one with this text; the demo's children then."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return psutil.Process(self.process.pid).children(recursive=True)
        raise AssertionError(lines)

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), error.decode()


def ended(children: list[psutil.Process]) -> bool:
    """Whether all of them are gone, or are within a moment."""
    return not [child for child in psutil.wait_procs(children, timeout=20)[1] if child.status() != psutil.STATUS_ZOMBIE]


def run_json(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    demo = Running(tmp_path, "--json", *options)
    code, out, error = demo.end()
    assert list(demo.temporary.iterdir()) == []
    return code, json.loads(out), error


def test_a_short_demo_ends_well(tmp_path: Path) -> None:
    demo = Running(tmp_path, "--seconds", "5", "--rate", "200")
    children = demo.wait_for(b"Publishing for 5 s.")
    assert len(children) == 8  # two NameServers, two brokers, two and two consumers
    code, out, error = demo.end()
    assert code == 0, out + error
    assert "worker-2 is killed (SIGKILL)" in out
    assert "nameserver-1 is killed (SIGKILL)" in out
    assert "worker-2 is killed: " in out.rpartition("sent ")[2], "the rebalance is timed"
    assert out.splitlines()[-1].startswith("Good: nothing was lost")
    assert ended(children)
    assert list(demo.temporary.iterdir()) == []


def test_a_csv_file_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "readings.csv"
    file.write_text(CSV)
    code, verdict, error = run_json(tmp_path, "--seconds", "5", "--csv", str(file))
    assert code == 0, verdict["faults"]
    assert error == f"Warning: {file}, line 3, is left out: the value 'hot' is not a number\n"
    assert verdict["good"] is True
    assert verdict["sent"] == verdict["stored"] == 1500
    assert verdict["stored_twice"] == 0
    assert [(group["group"], group["instance"], group["distinct"], group["lost"]) for group in verdict["groups"]] == [
        ("demo-sorters", "", 1500, 0), ("demo-screens", "screen-1", 1500, 0), ("demo-screens", "screen-2", 1500, 0),
    ]
    assert verdict["ownership_overlaps"] == verdict["lease_conflicts"] == verdict["faults"] == []
    assert any("killed" in rebalance["cause"] for rebalance in verdict["rebalances"])


def test_a_folder_can_be_kept_and_used_again(tmp_path: Path) -> None:
    data = tmp_path / "kept"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for turn in ("first", "second"):
        code, verdict, _ = run_json(tmp_path / turn, "--seconds", "5", "--rate", "50", "--data", str(data))
        assert (code, verdict["stored"]) == (0, 250), verdict["faults"]
    assert (data / "logs" / "broker-a.log").exists()
    assert (data / "broker-a" / "commitlog").is_dir()


def test_a_broker_that_dies_is_a_bad_verdict_with_its_log(tmp_path: Path) -> None:
    demo = Running(tmp_path, "--seconds", "60")
    children = demo.wait_for(b"Publishing")
    (victim,) = [child for child in children if {"broker", "broker-b"} <= set(child.cmdline())]
    victim.kill()
    code, out, _ = demo.end()
    assert code == 1
    assert "- broker-b ended with code -9. The end of its log" in out
    assert '"logger": "' in out.rpartition("Not good:")[2], "lines of its log"
    assert ended(children)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order(tmp_path: Path, number: signal.Signals) -> None:
    demo = Running(tmp_path)
    children = demo.wait_for(b"Publishing")
    demo.process.send_signal(number)
    code, _, error = demo.end()
    assert code == 1
    assert "Traceback" not in error
    assert "Interrupted" in error
    assert ended(children)
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_children_do_not_outlive_a_demo_that_is_killed(tmp_path: Path) -> None:
    demo = Running(tmp_path)
    children = demo.wait_for(b"Publishing")
    demo.process.kill()
    demo.end()
    assert ended(children)


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path: Path) -> None:
    demo = Running(tmp_path, "--csv", str(tmp_path / "none.csv"))
    code, out, error = demo.end()
    assert (code, out) == (2, "")
    assert "none.csv cannot be read" in error
