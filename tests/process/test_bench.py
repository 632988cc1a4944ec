"""`zrmq bench` plays every figure with real processes and reports numbers that can be; which ones is no test's business."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zrmq.cli.bench import Stage, failure
from zrmq.cli.bench_figures import FIGURES
from zrmq.cli.bench_players import Spec
from zrmq.cli.children import await_brokers, start_broker, start_nameserver
from zrmq.cli.failures import EXIT_FAILED, Invocation, run_command
from zrmq.errors import InvalidArgumentError, UnreachableError, ZrmqError

pytestmark = pytest.mark.timeout(180)


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "zrmq", "bench", "--messages", "2000", "--rounds", "1", *options],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(temporary)}, timeout=150,
    )
    assert list(temporary.iterdir()) == [], "nothing is left behind"
    return done


def test_every_figure_has_its_values_and_its_limit(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["messages"], result["body_bytes"], result["rounds"]) == (2000, 128, 1)
    rows = {(row["figure"], row["flush"], row["value"]): row for row in result["figures"]}
    rates, times = ["rate"], ["p50", "p99"]
    kinds = dict.fromkeys(("produce", "tagged", "batches", "consume", "both"), rates) | {"send": times, "latency": times}
    names = [figure.name for figure in FIGURES]
    assert list(rows) == [(name, flush, kind) for name in names for flush in ("sync", "async") for kind in kinds[name]]
    for row in rows.values():
        assert row["least"] == row["median"] == row["most"] > 0, "there was one round"
        assert row["limit"] > 0
        assert row["ratio"] == pytest.approx(row["median"] / row["limit"], abs=0.01)
    assert "round 1 of 1: latency, flush async" in done.stderr


def test_one_figure_as_a_table_in_a_folder_that_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "send", "--body-bytes", "64", "--data", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["figure", "flush", "median", "least", "-", "most", "bare", "ZeroMQ", "ratio"]
    expected = [["send", flush, kind] for flush in ("sync", "async") for kind in ("p50", "p99")]
    assert [line.split()[:3] for line in lines[:4]] == expected
    assert lines[4] == "send: one send at a time, its receipt awaited"
    assert (tmp_path / "kept" / "broker" / "commitlog").is_dir()
    assert "broker_stopped" in (tmp_path / "kept" / "logs" / "broker.log").read_text()


def test_a_running_cluster_can_be_measured_and_is_left_clean(tmp_path: Path) -> None:
    nameserver, address = start_nameserver("nameserver", tmp_path / "nameserver.log")
    with nameserver:
        broker, _ = start_broker("broker-a", tmp_path / "broker.log", address, tmp_path / "data")
        with broker:
            await_brokers(address, 1)
            done = run(tmp_path, "--only", "produce", "--nameservers", address, "--json")
            assert done.returncode == 0, done.stderr
            command = [sys.executable, "-m", "zrmq", "topic", "list", "--json", "--nameservers", address]
            listed = subprocess.run(command, capture_output=True, text=True)
    assert (listed.returncode, listed.stdout) == (0, "")


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("produce", r"failed: The topic name 'a b' contains ' '; use letters, .* \[40002 ILLEGAL_TOPIC\]"),
        ("no_part", r"ended with code 1; its log, .*, says why\. \[\d+ INTERNAL_ERROR\]"),
    ],
)
def test_a_player_that_fails_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, sentence: str
) -> None:
    """With one code, though the player's log has its own; the log is named, and has the details."""
    nowhere = "tcp://127.0.0.1:1"
    spec = Spec(part, nameservers=nowhere, topic="a b", messages=1, warm_messages=1)
    stage = Stage(nowhere, tmp_path, 1, 8)
    assert run_command(lambda: stage._run([spec]), Invocation()) == EXIT_FAILED
    [told] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"Error: The player {part} .*{sentence}", told)
    log_file = tmp_path / "logs" / f"{part}.log"
    assert str(log_file) in told
    assert "Traceback" in log_file.read_text()


def test_a_player_that_reaches_nobody_ends_as_a_command_does_that_does_not(tmp_path: Path) -> None:
    assert type(failure("send", tmp_path, UnreachableError.code, "Nobody answers.")) is UnreachableError
    assert type(failure("send", tmp_path, InvalidArgumentError.code, "It cannot be.")) is ZrmqError


def test_wrong_usage(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "speed")
    assert done.returncode == 2
    assert "produce" in done.stderr


def test_a_folder_for_a_broker_that_runs_elsewhere_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--nameservers", "tcp://127.0.0.1:1", "--data", str(tmp_path / "kept"))
    assert done.returncode == 2
    assert "leave it out with --nameservers" in done.stderr
    assert not (tmp_path / "kept").exists()
