"""Whole clusters through faults, one seed each; `tox -e sim -- --runs 10000 --seed N` runs any number."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zrmq.testing.simulation.run import run_seed

SEEDS = 120
CHUNK = 10


@pytest.mark.timeout(180)
@pytest.mark.parametrize("first", range(1, SEEDS, CHUNK))
def test_every_promise_is_kept(first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = run_seed(seed)  # raises with the seed and the last events
        assert result.counts, "a run in which nothing happens proves nothing"


@pytest.mark.timeout(120)
def test_a_seed_is_one_run_whatever_python_hashes() -> None:
    digests = [
        subprocess.run(
            [sys.executable, "-c", "from zrmq.testing.simulation.run import run_seed; print(run_seed(3).digest)"],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""}, capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1] != ""
    assert run_seed(4).digest != digests[0].strip()
