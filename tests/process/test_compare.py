"""`python -m benchmarks.compare` plays a small row with real processes, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contestants import Level
from tests.tidy.source import ROOT

pytestmark = pytest.mark.timeout(120)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.compare", "--rounds", "1", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


def test_a_small_row_of_zrmq_and_the_bare_limit(tmp_path: Path) -> None:
    data, result, plot = tmp_path / "data", tmp_path / "result.json", tmp_path / "plot.svg"
    data.mkdir()
    done = run(
        "--only", "produce", "--peers", "zrmq,bare", "--messages", "2000", "--folder", str(data), "--json", str(result),
    )
    assert done.returncode == 0, done.stderr
    assert list(data.iterdir()) == [], "nothing is left behind"
    lines = json.loads(result.read_text())["lines"]
    names = [(line["contestant"], line["level"]) for line in lines]
    assert sorted(names) == sorted(
        [("bare ZeroMQ", Level.LIMIT.value)]
        + [(name, level.value) for name in ("zrmq", "zrmq send_batch") for level in (Level.CACHE, Level.FLUSHED)]
    )
    assert all(rate > 0 for line in lines for rate in line["rounds"])
    assert "### produce: " in done.stdout
    command = [sys.executable, "-m", "benchmarks.report", str(result), "--svg", str(plot)]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert again.stdout.strip() == done.stdout.strip()
    assert plot.read_text().startswith("<svg ")
    assert "produce, round 1 of 1: zrmq, flushed: rate" in done.stderr


def test_the_cost_of_a_server_that_is_killed_and_started_again(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = run(
        "--only", "storage", "--only", "recovery", "--peers", "zrmq", "--stored-messages", "2000", "--log-mb", "1",
        "--folder", str(tmp_path), "--json", str(result),
    )
    assert done.returncode == 0, done.stderr
    values = {line["value"]: line["rounds"][0] for line in json.loads(result.read_text())["lines"]}
    assert list(values) == ["start", "idle", "full", "disk", "allocated", "restart"]
    assert 128 < values["disk"] < 256
    assert list(tmp_path.iterdir()) == [result]


def test_an_unknown_peer_is_refused() -> None:
    done = run("--peers", "zrmq,carrier-pigeon")
    assert done.returncode == 2
    assert "There is no peer carrier-pigeon" in done.stderr
