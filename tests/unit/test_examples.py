"""Every example runs by itself, says what it should, and stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "broadcast_configuration.py": "2 of 2 boxes have it",
    "embedded.py": "read 21.5 from the kitchen",
    "ordered_by_device.py": "in order: fan 100, pump 100, valve 100",
    "sensor_to_dashboard.py": "hall     19.0 C",
    "tail_from_script.py": "event 4",
    "two_brokers.py": "before: north south after: north",
    "work_queue.py": "12 of 12 jobs are done",
}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs_and_ends_by_itself(name: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stderr
    assert SAYS[name] in run.stdout
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 30
